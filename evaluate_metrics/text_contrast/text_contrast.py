"""Text contrast as an `evaluate` module. The arithmetic is `iclip_hf.evaluation.metrics.TextContrast`."""

from iclip_hf.evaluation.evaluate_modules import StreamingMetric
from iclip_hf.evaluation.metrics import TextContrast as Contrast


class TextContrast(StreamingMetric):
    """Text contrast of maps and masks."""

    accumulator, per_image = Contrast, True
