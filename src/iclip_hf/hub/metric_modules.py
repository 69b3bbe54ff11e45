"""Installation and publication of the metric modules of the `evaluate` library."""

from importlib.resources import files
from pathlib import Path

from ..utils.extras import require_extra
from ..utils.files import write_files


def metric_folders() -> dict[str, Path]:
    """Returns the folders of the metric modules by name."""
    return {
        path.name: path for path in sorted(files("iclip_hf.evaluate_metrics").iterdir()) if (path / "app.py").is_file()
    }


def install_metrics() -> dict[str, Path]:
    """
    Installs the metric scripts in the module cache of `evaluate`. Replaces earlier versions. Then `evaluate.load` finds them by
    their bare names in any working directory, also offline. Returns the folder of each script by the name of its metric.
    """
    with require_extra("eval"):
        from datasets import DownloadMode
        from evaluate.loading import LocalEvaluationModuleFactory, init_dynamic_modules
    modules, installed = init_dynamic_modules(), {}
    for name, folder in metric_folders().items():
        factory = LocalEvaluationModuleFactory(str(folder / f"{name}.py"), download_mode=DownloadMode.FORCE_REDOWNLOAD)
        factory.name = f"evaluate-metric/{name}"  # `load(name)` looks for this repository, also in its cache
        installed[name] = Path(modules).parent.joinpath(*factory.get_module().module_path.split(".")[:-1])
    return installed


def export_space(metric: str, directory: str | Path, overwrite: bool = False) -> Path:
    """
    Writes the files of a metric's Space into a folder, new or such as a clone, and returns it.

    Raises:
        `ValueError`: the metric does not exist. `FileExistsError`: a file exists, and not `overwrite`.
    """
    folders = metric_folders()
    if metric not in folders:
        raise ValueError(f"Expected `metric` to be one of {tuple(folders)}, got {metric!r}: choose one of them.")
    sources = sorted(source for source in folders[metric].iterdir() if source.is_file())
    write_files(Path(directory), {source.name: source.read_bytes() for source in sources}, overwrite)
    return Path(directory)
