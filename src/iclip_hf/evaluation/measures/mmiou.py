"""mMIoU (Eq. 7): overlap of map and object at the best threshold."""

from ..metrics import MeanMaxIoU
from ..results import measured
from .measure import PairMeasure


class MMIoU(PairMeasure):
    """mMIoU, and as `floor` the mMIoU of a map that marks every pixel, both in percent. Rows: `MIoU` and its best `threshold`."""

    name = "mMIoU"
    figures = {"mMIoU": ("mMIoU %", 2), "floor": ("floor %", 2)}
    metric = MeanMaxIoU

    def report(self, method: str) -> tuple[dict, dict[int, dict]]:
        scores = self.totals[method].compute()
        figures = {"mMIoU": measured(scores["mmiou"]), "floor": measured(scores["floor"]), "pairs": scores["pairs"]}
        best = scores["thresholds"]
        rows = {label: {"MIoU": iou, "threshold": best[label]} for label, iou in scores["per_class"].items()}
        return figures | {"left_out": scores["left_out"]}, rows
