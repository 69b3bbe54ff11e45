"""The metrics as modules of the `evaluate` library: how they are installed and published."""

import shutil
from importlib.resources import files
from pathlib import Path

from ..utils.extras import require_extra
from ..utils.files import atomic_write


with require_extra("eval"):
    from datasets import DownloadMode
    from evaluate.loading import LocalEvaluationModuleFactory


def metric_folders() -> dict[str, Path]:
    """The folders of the metric modules by name."""
    return {
        path.name: path for path in sorted(files("iclip_hf.evaluate_metrics").iterdir()) if (path / "app.py").is_file()
    }


def install_metrics() -> list[str]:
    """Puts the metric scripts into the module cache of `evaluate`, in place of earlier ones.

    Afterwards `evaluate.load` knows them by their bare names in any working directory, also offline.

    Returns:
        The names: `["mfmb", "mmiou"]`.
    """
    for name, folder in metric_folders().items():
        factory = LocalEvaluationModuleFactory(str(folder / f"{name}.py"), download_mode=DownloadMode.FORCE_REDOWNLOAD)
        factory.name = (
            f"evaluate-metric/{name}"  # the repository that `load(name)` asks for, and whose cache it falls back on
        )
        factory.get_module()
    return list(metric_folders())


def export_space(metric: str, directory: str | Path) -> Path:
    """Writes the files of a metric's Space into a folder, new or an existing clone, ready to be pushed.

    Args:
        metric: name of the metric.
        directory: where the files go; created if missing.

    Returns:
        The folder.

    Raises:
        ValueError: there is no such metric.
    """
    folders = metric_folders()
    if metric not in folders:
        raise ValueError(f"Expected `metric` to be one of {tuple(folders)}, got {metric!r}.")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for source in folders[metric].iterdir():
        if source.is_file():
            with atomic_write(directory / source.name) as partial:
                shutil.copyfile(source, partial)
    return directory
