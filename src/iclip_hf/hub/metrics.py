"""Installation and publication of the metric modules of the `evaluate` library."""

import shutil
from importlib.resources import files
from pathlib import Path

from ..utils.extras import require_extra
from ..utils.files import atomic_write


with require_extra("eval"):
    from datasets import DownloadMode
    from evaluate.loading import LocalEvaluationModuleFactory


def metric_folders() -> dict[str, Path]:
    """Returns the folders of the metric modules by name."""
    return {
        path.name: path for path in sorted(files("iclip_hf.evaluate_metrics").iterdir()) if (path / "app.py").is_file()
    }


def install_metrics() -> list[str]:
    """
    Installs the metric scripts in the module cache of `evaluate`. Replaces earlier versions. Then `evaluate.load` finds them by
    their bare names in any working directory, also offline.

    Returns:
        `list[str]`: the names, `["mfmb", "mmiou", "text_contrast"]`.
    """
    for name, folder in metric_folders().items():
        factory = LocalEvaluationModuleFactory(str(folder / f"{name}.py"), download_mode=DownloadMode.FORCE_REDOWNLOAD)
        factory.name = f"evaluate-metric/{name}"  # `load(name)` looks for this repository, also in its cache
        factory.get_module()
    return list(metric_folders())


def export_space(metric: str, directory: str | Path) -> Path:
    """
    Writes the files of a metric's Space into a new folder or an existing clone.

    Args:
        metric (`str`): name of the metric.
        directory (`str` or `Path`): folder to write into; created if it does not exist.

    Returns:
        `Path`: the folder.

    Raises:
        `ValueError`: the metric does not exist.
    """
    folders = metric_folders()
    if metric not in folders:
        raise ValueError(f"Expected `metric` to be one of {tuple(folders)}, got {metric!r}: choose one of them.")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for source in folders[metric].iterdir():
        if source.is_file():
            with atomic_write(directory / source.name) as partial:
                shutil.copyfile(source, partial)
    return directory
