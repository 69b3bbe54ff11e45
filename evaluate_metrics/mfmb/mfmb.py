"""mFMB as an `evaluate` module. The arithmetic is `iclip_hf.evaluation.metrics.MeanForegroundMinusBackground`."""

from iclip_hf.evaluation.evaluate_modules import StreamingMetric
from iclip_hf.evaluation.metrics import MeanForegroundMinusBackground


class Mfmb(StreamingMetric):
    """mFMB of maps and masks."""

    accumulator = MeanForegroundMinusBackground
