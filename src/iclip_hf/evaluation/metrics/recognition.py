"""
Recognition: mAP of the scores of all classes, and how well presence separates the classes that an image shows from the
others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ...model.presence import MIN_PRESENCE, at_prior, is_present
from ...utils.errors import require_extra
from ..functional import reliability, to_numpy
from ..tables import cell, markdown
from .metric import CannotMeasure, EvaluatedImage, Metric, mean, none_if_nan


with require_extra("eval"):
    from sklearn.metrics import average_precision_score, roc_auc_score


class StoredScores:
    """
    The scores of all images, and whether each image shows each class, in arrays `(B, K)`. A ranking needs all scores,
    not sums.
    """

    def __init__(self):
        self.batches: list[tuple[np.ndarray, np.ndarray]] = []

    def merge(self, other: StoredScores) -> None:
        self.batches += other.batches

    def joined(self) -> tuple[np.ndarray, np.ndarray]:
        scores, shown = zip(*self.batches or [(np.zeros((0, 0)), np.zeros((0, 0), bool))])
        return np.concatenate(scores), np.concatenate(shown)


class MultiLabelAveragePrecision(Metric):
    """
    mAP: the average precision of each class over the images, as scikit-learn defines it, averaged over the classes
    that some image shows.

    The metric stores all scores, nine bytes for each image and class. Column k is class id k + 1. In
    [`evaluate_model`] the scores are cosines, and mAP is the same for all methods.

    Example:
        >>> metric = MultiLabelAveragePrecision()
        >>> metric.update(np.array([[0.9, 0.1], [0.8, 0.3]]), np.array([[1, 0], [0, 1]]))
        >>> metric.compute()["map"]
        100.0
    """

    name = "mAP"
    columns = {"map": ("mAP %", 2)}
    legend = (
        "mAP: average precision of ranking the images by the score of a class, mean over the classes. It does not "
        "depend on the method."
    )
    rows = {"AP": "per_class"}
    needs = frozenset({"scores"})
    by_method = False
    state_type = StoredScores
    ranked_by = "scores"  # attribute of `EvaluatedImage` with a number for each class

    def update(self, scores, shown) -> None:
        """
        Adds images. Both arguments are arrays or tensors of shape `(B, K)`: the score of each class, and whether the
        image shows the class (1 or 0).
        """
        self.state.batches.append((to_numpy(scores).astype(np.float64), to_numpy(shown).astype(bool)))

    def update_from(self, image: EvaluatedImage, method: None, maps: None) -> None:
        shown = np.isin(self.run.dataset.class_ids, image.sample.class_ids)
        self.update(getattr(image, self.ranked_by)[None], shown[None])

    def compute(self) -> dict:
        """
        Returns the scores of all images so far.

        - **map** -- mean over classes, percent (NaN if no class is shown).
        - **per_class** -- {class id: average precision in percent}.
        - **always_shown** -- number of classes that every image shows. Their average precision is 100 for any scores.
        - **images**, **left_out** -- number of images, and {"no_positive": number of classes that no image shows}.
        """
        scores, shown = self.state.joined()
        classes = np.flatnonzero(shown.any(axis=0))
        per_class = {
            int(column) + 1: 100 * float(average_precision_score(shown[:, column], scores[:, column]))
            for column in classes
        }
        return {
            "map": mean(per_class.values()),
            "per_class": per_class,
            "always_shown": int(shown.all(axis=0).sum()),
            "images": len(scores),
            "left_out": {"no_positive": scores.shape[1] - len(classes)},
        }

    def tables(self, scores: Mapping) -> list[str]:
        """Returns a remark on classes that every image shows."""
        always_shown, num_classes = scores["always_shown"], len(self.run.dataset.class_ids)
        if not always_shown:
            return []
        counts = f"{always_shown} of {num_classes}"
        return [f"Classes that every image shows: {counts}. Their average precision is always 100."]


class Presence(MultiLabelAveragePrecision):
    """
    How well presence separates the classes that an image shows from the others. Presence does not depend on the
    method. [`evaluate_model`] takes `like` from the data set.

    Args:
        like (`np.ndarray` of shape `(K, K)`, *optional*): whether class j is like class i, see [`like_classes`].
            Without `like`, `auc_hard` and `passed_hard` are None.
    """

    name = "presence"
    columns = rows = {}  # all scores are in `tables`
    legend = ""
    needs = frozenset({"presence"})
    ranked_by = "presence"

    def __init__(self, like: np.ndarray | None = None):
        super().__init__()
        self.like = like

    def prepare(self, run) -> None:
        if run.model.presence(torch.zeros(1, 1)) is None:
            raise CannotMeasure(
                f"{self.name} needs a model that was trained with a sigmoid, and this one has no presence of its own: "
                "leave the metric out."
            )
        super().prepare(run)
        self.like = like_classes(run.dataset.supercategories, run.texts.text_embeds)

    def compute(self) -> dict:
        """
        Returns the scores of all image-class pairs so far. A score without data is None.

        - **auc** -- area under the ROC curve of shown against absent classes, in [0, 1].
        - **auc_hard** -- the same against absent classes that are like a shown one.
        - **auc_of_classes** -- mean over classes of the AUC of one class over the images. Classes that all images or
          none show are left out.
        - **min_presence** -- presence from which a class counts as present.
        - **kept** -- share of the shown classes whose presence is at least `min_presence`, percent.
        - **passed** -- share of the absent classes whose presence is at least `min_presence`, percent;
          **passed_hard** is the share of the absent classes that are like a shown one.
        - **map** -- mAP of images ranked by presence, percent.
        - **pairs** -- numbers of image-class pairs: `shown`, `absent`, and `absent_hard`, whose class is absent and
          like a shown one.
        - **prior** -- share of image-class pairs whose class is shown.
        - **reliability** -- for each of ten bins of the presence at this prior ([`at_prior`]): mean presence, share of
          image-class pairs whose class is shown, number of pairs; None if the prior is 0 or 1.
        - **calibration_error** -- mean over the bins of the distance between mean presence and share, weighted by the
          number of pairs (expected calibration error), in [0, 1]; None if the prior is 0 or 1.
        """
        values, shown = self.state.joined()
        if self.like is None or not shown.size:
            hard = np.zeros_like(shown)
        else:  # absent, and like a class that is shown
            hard = (shown @ self.like) & ~shown
        varying = np.flatnonzero(shown.any(0) & ~shown.all(0))
        class_aucs = [roc_auc_score(shown[:, column], values[:, column]) for column in varying]
        prior = float(shown.mean()) if shown.size else None
        bins, error = _calibration(values, shown, prior) if prior and prior < 1 else (None, None)
        return {
            "min_presence": MIN_PRESENCE,
            "auc": _auc(values, shown, ~shown),
            "auc_hard": _auc(values, shown, hard),
            "auc_of_classes": none_if_nan(mean(class_aucs)),
            "kept": _share_present(values[shown]),
            "passed": _share_present(values[~shown]),
            "passed_hard": _share_present(values[hard]),
            "map": none_if_nan(super().compute()["map"]),
            "pairs": {"shown": int(shown.sum()), "absent": int((~shown).sum()), "absent_hard": int(hard.sum())},
            "prior": prior,
            "calibration_error": error,
            "reliability": bins,
        }

    def settings(self) -> dict:
        by_features = "the nearest tenth by the features of the texts"
        return {"like_classes": "of its supercategory" if self.run.dataset.supercategories else by_features}

    def tables(self, scores: Mapping) -> list[str]:
        """Returns the tables, without scores that are None and without empty bins."""
        at_least, pairs = f"with a presence of at least {scores['min_presence']}, %", scores["pairs"]
        # Name, heading and decimals of a score, and the numbers of shown and of absent pairs that it has.
        table = (
            ("auc", "AUC: a shown class has more presence than an absent one, 0.5 is chance", 3, "shown", "absent"),
            ("auc_hard", "AUC against absent classes that resemble a shown one", 3, "shown", "absent_hard"),
            ("auc_of_classes", "AUC of each class over the images, mean over the classes", 3, "shown", "absent"),
            ("kept", f"kept: shown classes {at_least}", 1, "shown", None),
            ("passed", f"passed: absent classes {at_least}", 1, None, "absent"),
            ("passed_hard", "passed, of those that resemble a shown class, %", 1, None, "absent_hard"),
            ("map", "mAP of ranking the images by presence, %", 1, "shown", "absent"),
            (
                "calibration_error",
                "calibration error: mean distance of presence and share shown",
                3,
                "shown",
                "absent",
            ),
        )
        rows = [
            [heading, cell(scores[name], decimals), *(str(pairs.get(kind, "")) for kind in kinds)]
            for name, heading, decimals, *kinds in table
            if scores[name] is not None
        ]
        tables = [markdown(["presence of the classes in the images", "", "shown pairs", "absent pairs"], rows)]
        if bins := scores["reliability"]:
            rows = [
                [
                    f"{index / len(bins):.1f} to {(index + 1) / len(bins):.1f}",
                    cell(interval["mean"], 2),
                    cell(interval["shown"], 2),
                    str(interval["pairs"]),
                ]
                for index, interval in enumerate(bins)
                if interval["pairs"]
            ]
            presence = f"presence at a prior of {100 * scores['prior']:.1f} %"
            headings = [presence, "its mean", "share that is shown", "pairs of image and class"]
            tables.append(markdown(headings, rows))
        return tables


def _auc(values: np.ndarray, shown: np.ndarray, absent: np.ndarray) -> float | None:
    """Returns the area under the ROC curve of shown against absent classes; None if one kind is missing."""
    counted = shown | absent
    return float(roc_auc_score(shown[counted], values[counted])) if shown.any() and absent.any() else None


def _share_present(values: np.ndarray) -> float | None:
    """Returns the share of presence values that count as present, percent; None without values."""
    return 100 * float(is_present(values).mean()) if len(values) else None


def _calibration(values: np.ndarray, shown: np.ndarray, prior: float) -> tuple[list[dict], float]:
    """Returns `reliability` and `calibration_error` of [`Presence`] from presence and `shown`, `(B, K)`."""
    bins = reliability(at_prior(values, prior).ravel(), shown.ravel())
    distances = np.abs(bins["mean"] - bins["shown"])
    error = float(np.nansum(distances * bins["items"]) / values.size)
    rows = [
        {"mean": none_if_nan(mean_presence), "shown": none_if_nan(share), "pairs": int(items)}
        for mean_presence, share, items in zip(bins["mean"], bins["shown"], bins["items"])
    ]
    return rows, error


def like_classes(supercategories: Sequence[str] | None, text_embeds: torch.Tensor) -> np.ndarray:
    """
    Returns whether class j is like class i, `(K, K)` boolean. If supercategories are given, like classes have the same
    one. Otherwise class j is among the nearest tenth of the other classes (at least one) by the cosine with class i;
    the text features `(K, P)` are unit vectors. No class is like itself.
    """
    num_classes = len(text_embeds)
    if supercategories is not None:
        names = np.array(supercategories)
        like = names[:, None] == names
    else:
        cosines = (text_embeds @ text_embeds.T).float().fill_diagonal_(-torch.inf)
        num_like = min(max(1, round(num_classes / 10)), num_classes - 1)
        nearest = cosines.topk(num_like).indices.numpy(force=True)
        like = np.zeros((num_classes, num_classes), bool)
        np.put_along_axis(like, nearest, True, 1)
    np.fill_diagonal(like, False)
    return like
