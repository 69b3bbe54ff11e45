"""mMIoU as an `evaluate` module. The arithmetic is `iclip_hf.evaluation.metrics.MeanMaxIoU`."""

from iclip_hf.evaluation.evaluate_modules import StreamingMetric
from iclip_hf.evaluation.metrics import MeanMaxIoU


class Mmiou(StreamingMetric):
    """mMIoU of maps and masks."""

    accumulator = MeanMaxIoU
