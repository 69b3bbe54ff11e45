"""The metrics as modules of the `evaluate` library: what their scripts share, how to install and to publish them.

The scripts live in the repository's folder `evaluate_metrics`, which is installed as `iclip_hf.evaluate_metrics`.
"""

import json
import shutil
from abc import ABC, abstractmethod
from importlib.resources import files
from pathlib import Path

import numpy as np

from ..images import open_image
from ..utils.extras import require_extra
from ..utils.files import atomic_write


with require_extra("eval"):
    import evaluate
    from datasets import DownloadMode, Features, Sequence, Value
    from evaluate.loading import LocalEvaluationModuleFactory


# What `evaluate` stores of a pair: the counts of its foreground, those of its background, and the class. The columns
# keep the names of the inputs, because `evaluate.combine` passes on only those.
_STORED = Features(
    {"predictions": Sequence(Value("int64")), "references": Sequence(Value("int64")), "labels": Value("int64")}
)
_INPUTS = """
One item is one image and one class.

Args:
    predictions: maps (H, W) in [0, 1], numpy or torch, float16, float32 or float64; sizes may differ between items.
    references: label masks (H, W) of integers, each of the size of its map.
    labels: class ids; the pixels of the mask equal to it are the foreground, all others the background.
    ignore_index: mask value of the pixels that count nowhere, 255 by default; it applies where items are given.
    aggregate: "image" (default) takes each image's ratio, then the mean over the images of a class; "pixel" pools the
        pixels of a class over its images.

`add` takes the singular names too. Both options can also be set in `evaluate.load`.
"""
_CITATION = """
@article{li2022exploring,
  title={Exploring Visual Interpretability for Contrastive Language-Image Pre-training},
  author={Li, Yi and Wang, Hualiang and Duan, Yiqun and Xu, Hang and Li, Xiaomeng},
  journal={arXiv preprint arXiv:2209.07046},
  year={2022}
}
"""


class PairMetric(evaluate.Metric, ABC):
    """An `evaluate` metric over pairs of a map and a class. It stores the counts of each pair, not its pixels.

    A subclass names its `accumulator` from `iclip_hf.evaluation.metrics` and returns `self._pair_info(...)` from `_info`. This
    class stays abstract, because `evaluate.load` takes the first metric class it finds in a script that is not.
    """

    accumulator: type

    def __init__(self, *args, aggregate: str = "image", ignore_index: int = 255, **kwargs):
        super().__init__(*args, **kwargs)
        self.aggregate = self.accumulator(aggregate).aggregate
        self.ignore_index = ignore_index
        self._ignored = set()  # every ignore_index of the stored pairs

    @abstractmethod
    def _info(self) -> evaluate.MetricInfo: ...

    def _pair_info(self, description: str, outputs: str) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=description,
            citation=_CITATION,
            inputs_description=_INPUTS + outputs,
            features=_STORED,
            reference_urls=["https://arxiv.org/abs/2209.07046"],
        )

    def add(self, *, ignore_index: int | None = None, **pair):
        """Adds one pair: `prediction` (H, W), `reference` (H, W) and `label`."""
        plural = {"prediction": "predictions", "reference": "references", "label": "labels"}
        self.add_batch(ignore_index=ignore_index, **{plural.get(name, name): [value] for name, value in pair.items()})

    def add_batch(self, *, predictions, references, labels, ignore_index: int | None = None):
        """Adds pairs: `predictions`, `references` and `labels` of one length."""
        if not len(predictions) == len(references) == len(labels):
            raise ValueError(
                "Expected predictions, references and labels of one length, "
                f"got {len(predictions)}, {len(references)} and {len(labels)}."
            )
        ignore_index = self.ignore_index if ignore_index is None else ignore_index
        counts = [self.accumulator.count(*pair, ignore_index) for pair in zip(predictions, references, labels)]
        self._ignored.add(ignore_index)
        super().add_batch(
            predictions=[foreground for _, foreground in counts],
            references=[background for background, _ in counts],
            labels=[int(label) for label in labels],
        )

    def compute(self, *, aggregate: str | None = None, ignore_index: int | None = None, **pairs) -> dict | None:
        """Returns the scores of all pairs added before or given here, on process 0; None on the others."""
        # Both options are checked first: a mistake must not cost the pairs that were added.
        accumulator = self.accumulator(self.aggregate if aggregate is None else aggregate)
        if ignore_index is not None and not self._ignored <= {ignore_index}:
            raise ValueError(
                f"The pairs were counted with ignore_index {sorted(self._ignored)}, not {ignore_index}. "
                "Give ignore_index to `evaluate.load`, or wherever pairs are added."
            )
        pairs = {name: values for name, values in pairs.items() if values is not None}
        if not pairs and self.num_process > 1:
            pairs = dict.fromkeys(
                _STORED, ()
            )  # process 0 waits for a file of every process, also of one without pairs
        if pairs:
            self.add_batch(ignore_index=ignore_index, **pairs)
        self._ignored = set()
        return super().compute(accumulator=accumulator)

    def _compute(self, predictions, references, labels, accumulator) -> dict:
        for background, foreground, label in zip(references, predictions, labels):
            accumulator.add_counts(np.array([background, foreground]), label)
        return accumulator.compute()


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


def metric_demo(script: str | Path):
    """The app of a metric's Space, a `gradio.Interface`: a map and a label mask as image files, and a class id.

    Args:
        script: the metric's script; the `README.md` beside it is shown below the form.
    """
    with require_extra("demo"):
        import gradio as gr

    metric = evaluate.load(str(script))

    def score(heatmap: np.ndarray, mask: str, label: int) -> str:
        result = metric.compute(
            predictions=[heatmap.astype(np.float32) / 255],
            references=[np.asarray(open_image(mask))],
            labels=[label],
        )
        return json.dumps(result, indent=2)

    return gr.Interface(
        score,
        inputs=[
            gr.Image(image_mode="L", type="numpy", label="Map: grey image of the size of the mask, black 0, white 1"),
            gr.File(
                file_types=["image"],
                type="filepath",
                label="Label mask: palette or grey PNG whose values are class ids",
            ),
            gr.Number(value=1, precision=0, label="Class id"),
        ],
        outputs=gr.Code(language="json", label=metric.name),
        title=f"Metric: {metric.name}",
        description=metric.description,
        article=evaluate.utils.parse_readme(Path(script).with_name("README.md")),
    )
