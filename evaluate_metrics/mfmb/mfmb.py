"""mFMB as a module of `evaluate`."""

from iclip_hf.evaluation.evaluate_modules import MetricModule
from iclip_hf.evaluation.metrics.maps import MeanForegroundMinusBackground


class Mfmb(MetricModule):
    """mFMB of maps and masks."""

    metric = MeanForegroundMinusBackground
