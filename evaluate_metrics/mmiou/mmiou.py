"""mMIoU as an `evaluate` module. The arithmetic is `iclip_hf.evaluation.metrics.MeanMaxIoU`."""

from iclip_hf.evaluation.evaluate_modules import StreamingMetric
from iclip_hf.evaluation.metrics import MeanMaxIoU


_DESCRIPTION = """
mMIoU (mean max IoU) scores maps in [0, 1] without a threshold chosen by hand: for each class, the IoU of M > t and the
pixels of the class, averaged over its images, at the best t of 0, 0.01, ..., 1; then the mean over the classes.
"""

_OUTPUTS = """
Returns:
    mmiou: mean over classes, in percent.
    per_class: {class id: its best IoU in percent}.
    thresholds: {class id: the threshold of that IoU, the lowest of equals}.
    floor: mMIoU of a map that marks every pixel, in percent.
    pairs: number of items in the mean.
    left_out: {reason: number of items that have no IoU}: their class is not in the mask, or all of the mask is void.

Example:

    >>> metric = evaluate.load("mmiou")
    >>> metric.compute(predictions=[[[0.9, 0.4], [0.6, 0.1]]], references=[[[3, 0], [3, 255]]], labels=[3])["mmiou"]
    100.0
"""


class Mmiou(StreamingMetric):
    """See `_DESCRIPTION`."""

    accumulator = MeanMaxIoU

    def _info(self):
        return self._metric_info(_DESCRIPTION, _OUTPUTS)
