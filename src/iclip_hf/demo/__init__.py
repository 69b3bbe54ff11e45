"""The embedded checkpoint and the live demo."""
