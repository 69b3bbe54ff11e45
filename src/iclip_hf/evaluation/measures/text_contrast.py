"""Text contrast: whether the maps of different texts differ."""

from ..metrics import TextContrast as TextContrastMetric
from ..results import measured
from .measure import RegionMeasure


class TextContrast(RegionMeasure):
    """Text contrast in percent; 50 for maps that do not depend on the text. Rows: `text_contrast`."""

    name = "text_contrast"
    figures = {"text_contrast": ("text contrast %", 2)}
    metric = TextContrastMetric

    def report(self, method: str) -> tuple[dict, dict[int, dict]]:
        scores = self.totals[method].compute()
        figures = {"text_contrast": measured(scores["text_contrast"]), "left_out": scores["left_out"]}
        return figures, {label: {"text_contrast": one} for label, one in scores["per_class"].items()}

    def protocol(self) -> dict:
        return {
            "text_contrast": "c_ij = (P(M_i at i > M_i at j) + P(M_j at j > M_j at i)) / 2 for classes i, j of an image, ties half, "
            "without pixels of both; mean over a class's images and partners, then over classes"
        }
