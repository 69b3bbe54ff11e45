"""
Modules of the `evaluate` library from metrics. The scripts are in the folder `evaluate_metrics` of the repository,
which is installed as `iclip_hf.evaluate_metrics`.
"""

from abc import ABC, abstractmethod
from importlib.resources import files
from inspect import getdoc, signature
from pathlib import Path

import numpy as np

from ..utils.errors import require_extra
from ..utils.files import atomic_write
from .metrics.maps import ImageClassMetric, MaskMetric


with require_extra("eval"):
    import evaluate
    from datasets import Features, Sequence, Value
    from evaluate.loading import LocalEvaluationModuleFactory, init_dynamic_modules


_INPUTS = """
An item is one image and {what}.

Args:
    predictions: maps {shape} in [0, 1], numpy or torch, float16, bfloat16, float32 or float64; sizes may differ
        between items.
    references: label masks of integers, {masks}.
    labels: {labels}; pixels of the mask equal to an id belong to its class.
    ignore_index: mask value of the pixels that are ignored, 255 by default; it applies to the items of the same
        call.{aggregate}

`add` also accepts the singular names. Options can also be set in `evaluate.load`.

"""
_ONE_CLASS = {
    "what": "one class",
    "shape": "(H, W)",
    "masks": "(H, W)",
    "labels": "class ids",
    "aggregate": '\n    aggregate: "image" (default) averages over the images of a class, "pixel" pools their pixels.',
}
_ALL_CLASSES = {
    "what": "all of its T classes",
    "shape": "(T, H, W)",
    "masks": "(H, W), or (T, H, W) with a mask for each class where classes overlap",
    "labels": "lists of T class ids",
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


class MetricModule(evaluate.Metric, ABC):
    """
    A metric as a module of `evaluate`, which stores the counts of each item instead of pixels. The script of a module
    has a subclass that sets `metric`.
    """

    @property
    @abstractmethod  # because `evaluate.load` instantiates the first metric class of a script that is not abstract
    def metric(self) -> type[MaskMetric]: ...

    def __init__(self, *args, ignore_index: int = 255, **kwargs):
        self.ignore_index, self.options = ignore_index, self._pop_options(kwargs)
        # The base class would ignore a misspelt option.
        if unknown := kwargs.keys() - signature(evaluate.Metric.__init__).parameters.keys():
            raise TypeError(f"{type(self).__name__} has no option {sorted(unknown)}.")
        super().__init__(*args, **kwargs)
        self.metric(**self.options)  # refuses a wrong option before any item is added

    def _pop_options(self, keywords: dict) -> dict:
        """Removes the options of the metric from `keywords`, and returns those that are not None."""
        names = signature(self.metric).parameters.keys() & keywords.keys()
        options = {name: keywords.pop(name) for name in names}
        return {name: value for name, value in options.items() if value is not None}

    def _info(self) -> evaluate.MetricInfo:
        # An item is stored as its class or classes and two lists of counts, the first as a reference and the second as
        # a prediction. The columns keep the names of the inputs, because `evaluate.combine` passes no others.
        counts, label = Sequence(Value("float64")), Value("int64")
        has_one_class = issubclass(self.metric, ImageClassMetric)
        labels = label if has_one_class else Sequence(label)
        inputs = _INPUTS.format(**(_ONE_CLASS if has_one_class else _ALL_CLASSES))
        return evaluate.MetricInfo(
            description=getdoc(self.metric).partition("Example:")[0].strip(),
            citation=_CITATION,
            inputs_description=inputs + getdoc(self.metric.compute),
            features=Features({"predictions": counts, "references": counts, "labels": labels}),
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
        counts = [self.metric.count_item(*item, ignore_index) for item in items]
        super().add_batch(
            predictions=[second for _, second in counts],
            references=[first for first, _ in counts],
            labels=[np.asarray(label).tolist() for label in labels],
        )

    def compute(self, *, ignore_index: int | None = None, **items) -> dict | None:
        """Returns the scores of all items that were added or are given here, on process 0; None on other processes."""
        # The metric is made first, so that a wrong option does not lose the added items.
        metric = self.metric(**self.options | self._pop_options(items))
        items = {name: values for name, values in items.items() if values is not None}  # `evaluate.combine` gives None
        if not items and self.num_process > 1:
            # Process 0 waits for a file of every process, so a process without items writes an empty one.
            items = dict.fromkeys(self.features, ())
        if items:
            self.add_batch(ignore_index=ignore_index, **items)
        return super().compute(metric=metric)

    def _compute(self, predictions, references, labels, metric) -> dict:
        for first, second, label in zip(references, predictions, labels):
            metric.add_counts(np.array([first, second]), label)
        return metric.compute()


def install_metrics() -> dict[str, Path]:
    """
    Installs the metric scripts in the module cache of `evaluate`, beside other versions. Then `evaluate.load` finds
    the scripts by their bare names in any working directory, also offline. Returns the folder of each script by the
    name of its metric.
    """
    modules_folder, installed = init_dynamic_modules(), {}
    for script in sorted(files("iclip_hf.evaluate_metrics").glob("*/*.py")):
        factory = LocalEvaluationModuleFactory(str(script))  # internals of evaluate, read in 0.4.6
        factory.name = f"evaluate-metric/{script.stem}"  # `load` looks for this repository, also in its cache
        packages = factory.get_module().module_path.split(".")[:-1]
        installed[script.stem] = Path(modules_folder).parent.joinpath(*packages)
        # The script is written again, because `load` takes the newest version.
        with atomic_write(installed[script.stem] / script.name) as temporary:
            temporary.write_bytes(script.read_bytes())
    return installed
