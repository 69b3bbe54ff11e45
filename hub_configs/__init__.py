"""Model configurations: one folder a model."""
