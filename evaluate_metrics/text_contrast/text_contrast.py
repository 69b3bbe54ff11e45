"""Text contrast as a module of `evaluate`."""

from iclip_hf.evaluation.evaluate_modules import MetricModule
from iclip_hf.evaluation.metrics.maps import TextContrast as Contrast


class TextContrast(MetricModule):
    """Text contrast of maps and masks."""

    metric = Contrast
