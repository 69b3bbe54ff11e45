"""The `evaluate` modules, one folder a metric. The package carries them, so that `iclip install-metrics` works anywhere."""
