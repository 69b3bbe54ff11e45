"""Installation of the metric modules of the `evaluate` library."""

from importlib.resources import files
from pathlib import Path

from ..utils.extras import require_extra


def metric_scripts() -> dict[str, Path]:
    """Returns the scripts of the metric modules by name, `"mfmb"`, `"mmiou"` and `"text_contrast"`."""
    return {path.stem: path for path in sorted(files("iclip_hf.evaluate_metrics").glob("*/*.py"))}


def install_metrics() -> dict[str, Path]:
    """
    Installs the metric scripts in the module cache of `evaluate`, beside other versions. Then `evaluate.load` finds them by their bare
    names in any working directory, also offline. Returns the folder of each script by the name of its metric.
    """
    with require_extra("eval"):
        from evaluate.loading import LocalEvaluationModuleFactory, init_dynamic_modules
    modules, installed = init_dynamic_modules(), {}
    for name, script in metric_scripts().items():
        factory = LocalEvaluationModuleFactory(str(script))
        factory.name = f"evaluate-metric/{name}"  # `load(name)` looks for this repository, also in its cache
        installed[name] = Path(modules).parent.joinpath(*factory.get_module().module_path.split(".")[:-1])
        # Written again, because `load` takes the newest version.
        (installed[name] / script.name).write_bytes(script.read_bytes())
    return installed
