"""mMIoU as a module of `evaluate`."""

from iclip_hf.evaluation.evaluate_modules import MetricModule
from iclip_hf.evaluation.metrics.maps import MeanMaxIoU


class Mmiou(MetricModule):
    """mMIoU of maps and masks."""

    metric = MeanMaxIoU
