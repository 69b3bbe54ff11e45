"""mFMB as an `evaluate` module. The arithmetic is `iclip_hf.evaluation.metrics.MeanForegroundMinusBackground`."""

from iclip_hf.evaluation.evaluate_modules import StreamingMetric
from iclip_hf.evaluation.metrics import MeanForegroundMinusBackground


_DESCRIPTION = """
mFMB (mean foreground minus background) is the mean of a map in [0, 1] over the pixels of its class minus its mean over the
other pixels, averaged over the images of a class, then over the classes. A negative value means an inverted map.
"""

_OUTPUTS = """
Returns:
    mfmb: mean over classes, in [-1, 1].
    per_class: {class id: its difference}.
    pairs: number of items in the mean.
    left_out: {reason: number of items that have no difference}: no foreground, no background, or all of the mask void.

Example:

    >>> metric = evaluate.load("mfmb")
    >>> metric.compute(predictions=[[[1.0, 0.25], [0.0, 0.5]]], references=[[[3, 0], [0, 255]]], labels=[3])["mfmb"]
    0.875
"""


class Mfmb(StreamingMetric):
    """See `_DESCRIPTION`."""

    accumulator = MeanForegroundMinusBackground

    def _info(self):
        return self._metric_info(_DESCRIPTION, _OUTPUTS)
