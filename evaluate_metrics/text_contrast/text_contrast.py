"""Text contrast as an `evaluate` module. The arithmetic is `iclip_hf.evaluation.metrics.TextContrast`."""

from iclip_hf.evaluation.evaluate_modules import StreamingMetric
from iclip_hf.evaluation.metrics import TextContrast as Accumulator


_DESCRIPTION = """
Text contrast measures how much the heat maps of an image depend on their texts. For two classes of one image it is the
probability that the map of the one is higher at its own pixels than at those of the other, averaged over both maps; the
mean over the images and partners of a class, then over the classes. Maps that are the same for every text score 50 percent.
"""

_OUTPUTS = """
Returns:
    text_contrast: mean over classes, in percent.
    per_class: {class id: its mean over images and partners, in percent}.
    images: number of images in the mean.
    left_out: {"fewer_than_two_classes": number of images without two classes that each have pixels of their own}.

Example:

    >>> metric = evaluate.load("text_contrast")
    >>> maps = [[[0.9, 0.2, 0.4]], [[0.1, 0.5, 0.3]]]
    >>> metric.compute(predictions=[maps], references=[[[3, 5, 5]]], labels=[[3, 5]])["text_contrast"]
    100.0
"""


class TextContrast(StreamingMetric):
    """See `_DESCRIPTION`."""

    accumulator, per_image = Accumulator, True

    def _info(self):
        return self._metric_info(_DESCRIPTION, _OUTPUTS)
