"""mAP, recognition by the scores of all classes, and presence, how well it tells the classes that an image shows from the others."""

from collections.abc import Sequence

import numpy as np
import torch

from ...model.presence import MIN_PRESENCE, at_prior
from ..metrics import MultiLabelAveragePrecision, reliability, roc_auc
from ..results import measured
from .measure import EvaluatedImage, Measure


class AveragePrecision(Measure):
    """Zero-shot multi-label mAP of the cosines, see [`MultiLabelAveragePrecision`]. It is the same for all methods."""

    name = "mAP"
    needs = frozenset({"scores"})
    scores = {"mAP": ("mAP %", 2)}
    by_method = False
    metric = MultiLabelAveragePrecision
    rows = {"AP": "per_class"}
    ranked_by = "scores"  # of an image, one number for each class

    def count(self, image: EvaluatedImage, method: None, heatmaps: None) -> list[tuple]:
        numbers = getattr(image, self.ranked_by)
        if numbers is None:  # the model has no presence
            return []
        return [(numbers[None], np.isin(self.run.dataset.labels, image.sample.labels)[None])]


class Presence(AveragePrecision):
    """
    How well presence tells the classes that an image shows from the others, over all pairs of an image and a class:

    - `auc`, the area under the ROC curve, and `auc_hard`, the same where the only absent classes are those like one that the image
      shows: classes of its supercategory or, in a data set without these, the nearest tenth of the class names by the cosine of
      their features. In [0, 1].
    - `kept` and `passed`, the share of the shown and of the absent classes whose presence is at least `MIN_PRESENCE`, `passed_hard`
      of the absent ones that are like a shown class, and `kept_things` and `kept_stuff`. In percent.
    - `mAP` of images ranked by presence, in percent.
    - `prior`, the share of pairs that is shown; `reliability`, for each of ten bins of the presence at this prior ([`at_prior`]) its
      mean, the share of pairs that is shown and the number of pairs; and `calibration_error`, the mean distance of the two, weighted
      by the number (expected calibration error). In [0, 1].

    They are the same for all methods.
    """

    name = "presence"
    scores = {}  # tables of their own, see `EvaluationResult.table`
    ranked_by = "presence"

    def prepare(self, run) -> None:
        super().prepare(run)
        self.like = like_classes(run.dataset.supercategories, run.texts.text_embeds)

    def report(self, method: None) -> tuple[dict, dict[int, dict]]:
        ranked, dataset = self.totals[method], self.run.dataset
        if not ranked._images:  # the model has no presence
            return {}, {}
        values, shown = ranked.images()
        hard = (shown @ self.like) & ~shown
        stuff = np.broadcast_to(np.isin(dataset.labels, dataset.stuff or ()), shown.shape)

        def share(pairs: np.ndarray) -> float | None:
            return 100 * float((values[pairs] >= MIN_PRESENCE).mean()) if pairs.any() else None

        prior = float(shown.mean())
        bins = reliability(at_prior(values, prior).ravel(), shown.ravel())
        error = np.abs(bins["mean"] - bins["shown"])
        return {
            "presence": {
                "min_presence": MIN_PRESENCE,
                "auc": measured(roc_auc(values[shown], values[~shown])),
                "auc_hard": measured(roc_auc(values[shown], values[hard])),
                "kept": share(shown),
                "kept_things": share(shown & ~stuff) if dataset.stuff else None,
                "kept_stuff": share(shown & stuff),
                "passed": share(~shown),
                "passed_hard": share(hard),
                "mAP": measured(ranked.compute()["map"]),
                "prior": prior,
                "calibration_error": float(np.nansum(error * bins["items"]) / values.size),
                "reliability": [
                    {"mean": measured(mean), "shown": measured(share), "pairs": int(items)}
                    for mean, share, items in zip(*bins.values())
                ],
            }
        }, {}

    def protocol(self) -> dict:
        nearest = "the nearest tenth by the features of the texts"
        return {"like_classes": "of its supercategory" if self.run.dataset.supercategories else nearest}


def like_classes(supercategories: Sequence[str] | None, text_embeds: torch.Tensor) -> np.ndarray:
    """
    Returns whether class j is like class i, `(K, K)` boolean: of the same supercategory if these are given, otherwise among the nearest
    tenth of the other classes (at least one) by the cosine of the unit text features `(K, P)`. No class is like itself.
    """
    number = len(text_embeds)
    if supercategories is not None:
        like = np.equal.outer(*[np.array(supercategories)] * 2)
    else:
        cosines = (text_embeds @ text_embeds.T).float().fill_diagonal_(-torch.inf)
        nearest = cosines.topk(min(max(1, round(number / 10)), number - 1)).indices.numpy(force=True)
        like = np.zeros((number, number), bool)
        np.put_along_axis(like, nearest, True, 1)
    np.fill_diagonal(like, False)
    return like
