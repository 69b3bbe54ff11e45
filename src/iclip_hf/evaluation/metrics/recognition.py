"""
Recognition: mAP of the scores of all classes, and how well presence separates the classes that an image shows from the
others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ...data.class_names import COCO_THINGS
from ...model.presence import MIN_PRESENCE, at_prior, is_present
from ...utils.extras import require_extra
from ..functional import reliability, to_numpy
from ..tables import cell, markdown
from .metric import CannotMeasure, EvaluatedImage, Metric, mean, none_if_nan


with require_extra("eval"):
    from sklearn.metrics import average_precision_score, roc_auc_score


class StoredScores:
    """Scores of images, and whether they show the classes, `(B, K)` each. A ranking needs all scores, not sums."""

    def __init__(self):
        self.batches: list[tuple[np.ndarray, np.ndarray]] = []

    def merge(self, other: StoredScores) -> None:
        self.batches += other.batches

    def joined(self) -> tuple[np.ndarray, np.ndarray]:
        scores, shown = zip(*self.batches or [(np.zeros((0, 0)), np.zeros((0, 0), bool))])
        return np.concatenate(scores), np.concatenate(shown)


class MultiLabelAveragePrecision(Metric):
    """
    mAP: average precision of each class over the images, averaged over the classes that occur in some image, as
    scikit-learn defines it.

    Stores all scores, nine bytes for each image and class. Column k is class id k + 1. In [`evaluate_model`] the
    scores are cosines, and mAP is the same for all methods.

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
    ranked_by = "scores"  # attribute of an image with a number for each class

    def update(self, scores, shown) -> None:
        """
        Adds images: scores, and whether the class is shown (zeros and ones), arrays or tensors of shape `(B, K)`.
        """
        self.state.batches.append((to_numpy(scores).astype(np.float64), to_numpy(shown).astype(bool)))

    def update_from(self, image: EvaluatedImage, method: None, maps: None) -> None:
        self.update(
            getattr(image, self.ranked_by)[None], np.isin(self.run.dataset.class_ids, image.sample.class_ids)[None]
        )

    def compute(self) -> dict:
        """
        Returns the scores of all images so far.

        - **map** -- mean over classes, percent (NaN without any positive).
        - **per_class** -- {class id: average precision in percent}.
        - **always_shown** -- number of classes that every image shows. Their average precision is 100 for any scores.
        - **images**, **left_out** -- number of images, and {"no_positive": number of classes without an image}.
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
        shares = f"{always_shown} of {num_classes}"
        return [f"Classes that every image shows: {shares}. Their average precision is always 100."]


class _Row(NamedTuple):
    """A row of the table of presence: how a score is shown, and which numbers of image-class pairs stand beside it."""

    heading: str
    digits: int
    shown: str | None = "shown"
    absent: str | None = "absent"


class Presence(MultiLabelAveragePrecision):
    """
    How well presence separates the classes that an image shows from the others. It is the same for all methods. In
    [`evaluate_model`], `like`, `stuff` and `groups` are those of the data set.

    Args:
        like (`np.ndarray` of shape `(K, K)`, *optional*): whether class j is like class i, see [`like_classes`].
            Without it there is no `auc_hard` and no `passed_hard`.
        stuff: the class ids of the background.
        groups (`dict`): the class ids of each group of classes that is measured by itself, by its name.
    """

    name = "presence"
    columns = rows = {}  # tables of their own
    legend = ""
    needs = frozenset({"presence"})
    ranked_by = "presence"

    def __init__(
        self,
        like: np.ndarray | None = None,
        stuff: Collection[int] = (),
        groups: Mapping[str, Collection[int]] | None = None,
    ):
        super().__init__()
        self.like, self.stuff, self.groups = like, stuff, groups or {}

    def prepare(self, run) -> None:
        if run.model.presence(torch.zeros(1, 1)) is None:
            raise CannotMeasure(
                f"{self.name} needs a model that was trained with a sigmoid: this one has no presence of its own."
            )
        super().prepare(run)
        self.like = like_classes(run.dataset.supercategories, run.texts.text_embeds)
        self.stuff = run.dataset.stuff or ()
        self.groups = class_groups(run.dataset.class_names, self.stuff)

    def compute(self) -> dict:
        """
        Returns the scores of all image-class pairs so far. A score without data is None.

        - **auc** -- area under the ROC curve of shown against absent classes, in [0, 1].
        - **auc_hard** -- the same against absent classes that are like one that the image shows.
        - **auc_of_classes** -- mean over classes of the AUC of one class over the images. Classes that all images or
          none show are left out.
        - **auc_without_image** -- AUC where all images have the mean logit of each class over the images: what
          frequent classes contribute to `auc`.
        - **kept** -- share of the shown classes whose presence is at least `min_presence`, percent; **kept_things**
          and **kept_stuff** are the shares of each kind.
        - **passed** -- the same share of the absent classes; **passed_hard** is that of absent classes that are like a
          shown one.
        - **map** -- mAP of images ranked by presence, percent.
        - **pairs** -- number of image-class pairs whose class is `shown` or `absent`, of `shown_things` and
          `shown_stuff`, and of `absent_hard`, whose class is absent and like a shown one.
        - **groups** -- `auc`, `auc_of_classes`, `kept`, `passed` and `pairs` of the classes of each group alone.
        - **prior** -- share of image-class pairs whose class is shown.
        - **reliability** -- for each of ten bins of the presence at this prior ([`at_prior`]): mean presence, share of
          image-class pairs whose class is shown, number of pairs; None if the prior is 0 or 1.
        - **calibration_error** -- mean over the bins of the distance between mean presence and share, weighted by the
          number of pairs (expected calibration error), in [0, 1]; None if the prior is 0 or 1.
        """
        values, shown = self.state.joined()
        class_ids = np.arange(shown.shape[1]) + 1
        hard = np.zeros_like(shown) if self.like is None or not shown.size else (shown @ self.like) & ~shown
        stuff = np.broadcast_to(np.isin(class_ids, list(self.stuff)), shown.shape)
        logits = np.log(values.clip(1e-12, 1 - 1e-12)) - np.log1p(-values.clip(1e-12, 1 - 1e-12))
        without_image = np.broadcast_to(logits.mean(0) if len(logits) else 0.0, values.shape)

        prior = float(shown.mean()) if shown.size else None
        bins = None
        error = None
        if prior and prior < 1:
            bins = reliability(at_prior(values, prior).ravel(), shown.ravel())
            distances = np.abs(bins["mean"] - bins["shown"])
            error = float(np.nansum(distances * bins["items"]) / values.size)
            bins = [
                {"mean": none_if_nan(center), "shown": none_if_nan(share), "pairs": int(items)}
                for center, share, items in zip(*bins.values())
            ]
        groups = {}
        for name, classes in self.groups.items():
            columns = np.isin(class_ids, list(classes))
            groups[name] = _separation(values[:, columns], shown[:, columns])
        separation = _separation(values, shown)
        counted = {"shown_things": shown & ~stuff, "shown_stuff": shown & stuff, "absent_hard": hard}
        separation["pairs"].update((name, int(mask.sum())) for name, mask in counted.items())
        return {
            "min_presence": MIN_PRESENCE,
            **separation,
            "auc_hard": _auc(values, shown, hard),
            "auc_without_image": _auc(without_image, shown, ~shown),
            "kept_things": _share_present(values[shown & ~stuff]) if self.stuff else None,
            "kept_stuff": _share_present(values[shown & stuff]),
            "passed_hard": _share_present(values[hard]),
            "map": none_if_nan(super().compute()["map"]),
            "groups": groups,
            "prior": prior,
            "calibration_error": error,
            "reliability": bins,
        }

    def settings(self) -> dict:
        nearest = "the nearest tenth by the features of the texts"
        return {"like_classes": "of its supercategory" if self.run.dataset.supercategories else nearest}

    def tables(self, scores: Mapping) -> list[str]:
        """Returns the tables, without rows that the data cannot measure and without empty bins."""
        least, pairs = scores["min_presence"], scores["pairs"]
        table = {
            "auc": _Row("AUC: a shown class has a higher presence than an absent one, 0.5 is chance", 3),
            "auc_hard": _Row("AUC against absent classes that resemble a shown one", 3, absent="absent_hard"),
            "auc_of_classes": _Row("AUC of each class over the images, mean over the classes", 3),
            "auc_without_image": _Row("AUC without the image: of the mean of each class over all images", 3),
            "kept": _Row(f"kept: shown classes with a presence of at least {least}, %", 1, absent=None),
            "kept_things": _Row("kept things, %", 1, "shown_things", None),
            "kept_stuff": _Row("kept stuff, %", 1, "shown_stuff", None),
            "passed": _Row(f"passed: absent classes with a presence of at least {least}, %", 1, shown=None),
            "passed_hard": _Row(
                "passed, of those that resemble a shown class, %", 1, shown=None, absent="absent_hard"
            ),
            "map": _Row("mAP of ranking the images by presence, %", 1),
            "calibration_error": _Row(
                "calibration error: mean distance of presence and share that is shown, in the table below", 3
            ),
        }
        rows = [
            [
                row.heading,
                cell(scores[name], row.digits),
                str(pairs.get(row.shown, "")),
                str(pairs.get(row.absent, "")),
            ]
            for name, row in table.items()
            if scores[name] is not None
        ]
        counted = ["shown pairs", "absent pairs"]
        tables = [markdown(["presence of the classes in the images", "", *counted], rows)]
        if scores["groups"]:
            digits = {"auc": 3, "auc_of_classes": 3, "kept": 1, "passed": 1}
            rows = []
            for group, separation in scores["groups"].items():
                cells = [cell(separation[name], decimals) for name, decimals in digits.items()]
                rows.append([group, *cells, *(str(separation["pairs"][kind]) for kind in ("shown", "absent"))])
            tables.append(markdown(["presence of", "AUC", "AUC of each class", "kept %", "passed %", *counted], rows))
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
    """Returns the area under the ROC curve of shown against absent classes; None if one of both is missing."""
    counted = shown | absent
    return float(roc_auc_score(shown[counted], values[counted])) if shown.any() and absent.any() else None


def _share_present(values: np.ndarray) -> float | None:
    """Returns the share of presence values that count as shown, percent; None without values."""
    return 100 * float(is_present(values).mean()) if len(values) else None


def _separation(values: np.ndarray, shown: np.ndarray) -> dict:
    """Returns the scores of [`Presence`] that any classes have; presence and `shown` are `(B, K)`."""
    varying = np.flatnonzero(shown.any(0) & ~shown.all(0))
    class_aucs = [roc_auc_score(shown[:, column], values[:, column]) for column in varying]
    return {
        "auc": _auc(values, shown, ~shown),
        "auc_of_classes": none_if_nan(mean(class_aucs)),
        "kept": _share_present(values[shown]),
        "passed": _share_present(values[~shown]),
        "pairs": {"shown": int(shown.sum()), "absent": int((~shown).sum())},
    }


def class_groups(class_names: Sequence[str], stuff: Collection[int]) -> dict[str, list[int]]:
    """Groups the class ids 1, ..., K, without empty groups; no groups if there is no stuff."""
    groups: dict[str, list[int]] = {"stuff": [], "things that COCO names": [], "other things": []}
    for class_id, name in enumerate(class_names, 1) if stuff else ():
        things = "things that COCO names" if name in COCO_THINGS else "other things"
        groups["stuff" if class_id in stuff else things].append(class_id)
    return {group: class_ids for group, class_ids in groups.items() if class_ids}


def like_classes(supercategories: Sequence[str] | None, text_embeds: torch.Tensor) -> np.ndarray:
    """
    Returns whether class j is like class i, `(K, K)` boolean: of the same supercategory if these are given, otherwise
    among the nearest tenth of the other classes (at least one) by the cosine of the unit text features `(K, P)`. No
    class is like itself.
    """
    num_classes = len(text_embeds)
    if supercategories is not None:
        like = np.equal.outer(*[np.array(supercategories)] * 2)
    else:
        cosines = (text_embeds @ text_embeds.T).float().fill_diagonal_(-torch.inf)
        nearest = cosines.topk(min(max(1, round(num_classes / 10)), num_classes - 1)).indices.numpy(force=True)
        like = np.zeros((num_classes, num_classes), bool)
        np.put_along_axis(like, nearest, True, 1)
    np.fill_diagonal(like, False)
    return like
