"""
Base class and demo of the metric modules of the `evaluate` library. The scripts are in the folder `evaluate_metrics` of the
repository, which is installed as `iclip_hf.evaluate_metrics`.
"""

import json
from abc import ABC, abstractmethod
from inspect import getdoc
from pathlib import Path

import numpy as np

from ..model.images import open_image
from ..utils.extras import require_extra


with require_extra("eval"):
    import evaluate
    from datasets import Features, Sequence, Value


_INPUTS = """
An item is one image and {what}.

Args:
    predictions: maps {shape} in [0, 1], numpy or torch, float16, bfloat16, float32 or float64; sizes may differ between items.
    references: label masks of integers, {masks}.
    labels: {labels}; pixels of the mask equal to an id belong to its class.
    ignore_index: mask value of the pixels that are ignored, 255 by default; it applies to the items of the same call.{aggregate}

`add` also accepts the singular names. Options can also be set in `evaluate.load`.

"""
_PAIRS = {
    "what": "one class",
    "shape": "(H, W)",
    "masks": "(H, W)",
    "labels": "class ids",
    "aggregate": '\n    aggregate: "image" (default) averages the ratios of the images of a class; "pixel" pools their pixels.',
}
_IMAGES = {
    "what": "all of its K classes",
    "shape": "(K, H, W)",
    "masks": "(H, W), or (K, H, W) with a mask for each class where classes overlap",
    "labels": "lists of K class ids",
    "aggregate": "",
}
_CITATION = """
@article{li2022exploring,
  title={Exploring Visual Interpretability for Contrastive Language-Image Pre-training},
  author={Li, Yi and Wang, Hualiang and Duan, Yiqun and Xu, Hang and Li, Xiaomeng},
  journal={arXiv preprint arXiv:2209.07046},
  year={2022}
}
"""


class StreamingMetric(evaluate.Metric, ABC):
    """
    A metric of `evaluate` over maps and masks. It stores the counts of each item instead of its pixels.

    A subclass sets `accumulator` to a metric of `iclip_hf.evaluation.metrics`, whose docstrings describe the module, and `per_image` if an
    item is an image with all of its classes instead of one class.
    """

    per_image = False

    @property
    @abstractmethod  # because `evaluate.load` instantiates the first metric class of a script that is not abstract
    def accumulator(self) -> type: ...

    def __init__(self, *args, ignore_index: int = 255, aggregate: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.ignore_index, self.aggregate = ignore_index, aggregate
        self._accumulator(aggregate)  # refuses a wrong one before any item is added

    @classmethod
    def of_one_image(cls, maps: list[np.ndarray], mask: np.ndarray, labels: list[int]) -> dict:
        """Returns the inputs for K maps (H, W) of one image, its label mask (H, W) and K class ids."""
        if cls.per_image:
            return {"predictions": [np.stack(maps)], "references": [mask], "labels": [labels]}
        return {"predictions": maps, "references": [mask] * len(maps), "labels": labels}

    def _accumulator(self, aggregate: str | None):
        return self.accumulator() if aggregate is None else self.accumulator(aggregate=aggregate)

    def _info(self) -> evaluate.MetricInfo:
        # An item is stored as its two rows of counts and its class or classes. The columns keep the names of the inputs, because
        # `evaluate.combine` passes no others.
        row, label = Sequence(Value("float64")), Value("int64")
        labels = Sequence(label) if self.per_image else label
        inputs = _INPUTS.format(**(_IMAGES if self.per_image else _PAIRS))
        return evaluate.MetricInfo(
            description=getdoc(self.accumulator).partition("Example:")[0].strip(),
            citation=_CITATION,
            inputs_description=inputs + getdoc(self.accumulator.compute),
            features=Features({"predictions": row, "references": row, "labels": labels}),
            reference_urls=["https://arxiv.org/abs/2209.07046"],
        )

    def add(self, *, ignore_index: int | None = None, **item):
        """Adds one item: `prediction`, `reference`, and `label` or `labels`."""
        plural = {"prediction": "predictions", "reference": "references", "label": "labels"}
        self.add_batch(ignore_index=ignore_index, **{plural.get(name, name): [value] for name, value in item.items()})

    def add_batch(self, *, predictions, references, labels, ignore_index: int | None = None):
        """Adds items: `predictions`, `references` and `labels` of equal length."""
        ignore_index = self.ignore_index if ignore_index is None else ignore_index
        items = zip(predictions, references, labels, strict=True)
        counts = [self.accumulator.count(*item, ignore_index) for item in items]
        super().add_batch(
            predictions=[second for _, second in counts],
            references=[first for first, _ in counts],
            labels=[np.asarray(label).tolist() for label in labels],
        )

    def compute(self, *, aggregate: str | None = None, ignore_index: int | None = None, **items) -> dict | None:
        """Returns the scores of all items that were added or are given here, on process 0; None on other processes."""
        # First, so that an error does not lose the added items.
        accumulator = self._accumulator(self.aggregate if aggregate is None else aggregate)
        items = {name: values for name, values in items.items() if values is not None}  # None is of `evaluate.combine`
        if not items and ignore_index is not None:
            raise ValueError("ignore_index belongs to the call that adds the items, or to `evaluate.load`.")
        if not items and self.num_process > 1:
            # Process 0 waits for a file of every process, so a process without items writes an empty one.
            items = dict.fromkeys(self.features, ())
        if items:
            self.add_batch(ignore_index=ignore_index, **items)
        return super().compute(accumulator=accumulator)

    def _compute(self, predictions, references, labels, accumulator) -> dict:
        for first, second, label in zip(references, predictions, labels):
            accumulator.add_counts(np.array([first, second]), label)
        return accumulator.compute()


def metric_demo(script: str | Path):
    """
    Builds the app of a metric's Space, a `gradio.Interface`, from the script of the metric. Its inputs are maps and a label mask as image
    files, and class ids. The app shows the `README.md` beside the script.
    """
    with require_extra("demo"):
        import gradio as gr

    metric = evaluate.load(str(script))

    def score(maps: list[str], mask: str, labels: str) -> str:
        maps = [np.asarray(open_image(path).convert("L")).astype(np.float32) / 255 for path in maps]
        labels = [int(label) for label in labels.split(",")]
        result = metric.compute(**metric.of_one_image(maps, np.asarray(open_image(mask)), labels))
        return json.dumps(result, indent=2)

    images = {"file_types": ["image"], "type": "filepath"}
    sheet = "Maps: grayscale images of the mask's size, one for each class; black is 0, white is 1"
    return gr.Interface(
        score,
        inputs=[
            gr.File(file_count="multiple", label=sheet, **images),
            gr.File(label="Label mask: palette or grayscale PNG of class ids", **images),
            gr.Textbox(value="1", label="Class ids of the maps, for example: 1, 2"),
        ],
        outputs=gr.Code(language="json", label=metric.name),
        title=f"Metric: {metric.name}",
        description=metric.description,
        article=evaluate.utils.parse_readme(Path(script).with_name("README.md")),
    )
