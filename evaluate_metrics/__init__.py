"""The `evaluate` modules, one folder a metric; installed with the package as `iclip_hf.evaluate_metrics`."""
