"""Installation and publication of the metric modules of the `evaluate` library."""

from importlib.resources import files
from pathlib import Path

from ..utils.extras import require_extra


def metric_folders() -> dict[str, Path]:
    """Returns the folders of the metric modules by name."""
    return {
        path.name: path for path in sorted(files("iclip_hf.evaluate_metrics").iterdir()) if (path / "app.py").is_file()
    }


def install_metrics() -> dict[str, Path]:
    """
    Installs the metric scripts in the module cache of `evaluate`, beside other versions. Then `evaluate.load` finds them by their bare
    names in any working directory, also offline.

    Returns:
        `dict[str, Path]`: the folder of each script by the name of its metric, `"mfmb"`, `"mmiou"` and `"text_contrast"`.
    """
    with require_extra("eval"):
        from evaluate.loading import LocalEvaluationModuleFactory, init_dynamic_modules
    modules, installed = init_dynamic_modules(), {}
    for name, folder in metric_folders().items():
        factory = LocalEvaluationModuleFactory(str(folder / f"{name}.py"))
        factory.name = f"evaluate-metric/{name}"  # `load(name)` looks for this repository, also in its cache
        installed[name] = Path(modules).parent.joinpath(*factory.get_module().module_path.split(".")[:-1])
        # Written again, because `load` takes the newest version.
        (installed[name] / f"{name}.py").write_bytes((folder / f"{name}.py").read_bytes())
    return installed
