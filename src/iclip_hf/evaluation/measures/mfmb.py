"""mFMB (Eq. 8): mean of the map on the object minus its mean elsewhere."""

from ..metrics import MeanForegroundMinusBackground
from ..results import measured
from .measure import PairMeasure


class MFMB(PairMeasure):
    """mFMB, in [-1, 1]. Rows: `FMB`."""

    name = "mFMB"
    figures = {"mFMB": ("mFMB", 4)}
    metric = MeanForegroundMinusBackground

    def report(self, method: str) -> tuple[dict, dict[int, dict]]:
        scores = self.totals[method].compute()
        figures = {"mFMB": measured(scores["mfmb"]), "left_out": scores["left_out"]}
        return figures, {label: {"FMB": fmb} for label, fmb in scores["per_class"].items()}
