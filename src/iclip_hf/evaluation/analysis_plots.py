"""Figures of the analyses: channels in their images, recognition against interpretability."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ..utils.plots import picture_grid, verbatim
from .analysis import ChannelMatch, Relation


# Safe for colour-blind readers, on white and on gray (Okabe and Ito).
BLUE, ORANGE = "#0072B2", "#D55E00"


def channel_scatter(images: Sequence[Image.Image], matches: Sequence[Mapping[str, ChannelMatch]]) -> Figure:
    """
    Where the channels of the pooled vectors come from (Fig. 3): a row an image, a panel a pooling, a point a channel,
    somewhere in its patch, with an area in proportion to the magnitude of its pooled value.

    Args:
        images: RGB.
        matches: of each image, from `channel_matches`; of the same poolings.
    """
    poolings = list(matches[0])
    pale = [(np.asarray(image.convert("L"), dtype=np.float32) / 255 + 1) / 2 for image in images]
    pictures = [np.stack([gray] * 3, -1) for gray in pale for _ in poolings]
    titles = [name.replace("_", " ") for name in poolings] + [""] * (len(pictures) - len(poolings))
    caption = "a point a channel, its area the magnitude of the pooled value"
    figure = picture_grid(pictures, titles, len(poolings), caption=caption)
    panels = [(image, one[pooling]) for image, one in zip(images, matches) for pooling in poolings]
    for axis, (image, match) in zip(figure.axes, panels):
        # Channels of one patch are spread evenly over it (Roberts' R2 sequence), or they would hide each other.
        places = (np.arange(len(match.tokens))[:, None] * (0.5698402910, 0.7548776662)) % 1
        corners = np.stack(np.divmod(match.tokens, match.grid[1]), 1)
        y, x = ((corners + places) / match.grid * (image.height, image.width)).T - 0.5
        sizes = np.abs(match.values) / (np.abs(match.values).max() or 1)
        axis.autoscale(False)
        axis.scatter(x, y, s=40 * sizes, c=ORANGE, alpha=0.6, edgecolors="white", linewidths=0.3)
    return figure


def relation_plot(relation: Relation, x_label: str, y_label: str) -> Figure:
    """
    Recognition against interpretability (Fig. 9): a point a class, the line of least squares, and names of classes as far as
    they fit, from the outermost on.

    Args:
        relation: of [`relation`].
        x_label, y_label: what recognition and interpretability are measured in.
    """
    x, y = relation.recognition, relation.interpretability
    figure = Figure(figsize=(6.4, 5), layout="constrained")
    axis = figure.subplots()
    axis.scatter(x, y, s=28, c=BLUE, alpha=0.8, linewidths=0)
    axis.set(xlabel=x_label, ylabel=y_label)
    axis.set_title(f"{len(x)} classes, Pearson correlation {relation.correlation:.2f}", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    if math.isnan(relation.correlation):
        return figure
    ends = np.array([x.min(), x.max()])
    axis.plot(ends, np.poly1d(np.polyfit(x, y, 1))(ends), color=ORANGE, linestyle="--", linewidth=1.2)
    figure.draw_without_rendering()  # now the names' places are known
    points = axis.transData.transform(np.stack([x, y], 1))
    taken = []
    for index in np.argsort(-np.hypot(*((points - points.mean(0)) / points.std(0)).T)):
        side = 1 if x[index] < x.mean() else -1  # inwards
        offset = {"xytext": (5 * side, 0), "textcoords": "offset points", "ha": "left" if side > 0 else "right"}
        name = relation.names[index]
        text = axis.annotate(name, (x[index], y[index]), va="center", fontsize=8, **offset, **verbatim())
        box = text.get_window_extent()
        if box.count_contains(points) or any(box.overlaps(other) for other in taken):
            text.remove()
        else:
            taken.append(box)
    return figure


def class_bars(relation: Relation, x_label: str, y_label: str) -> Figure:
    """
    Both scores of every class as bars, by falling interpretability, with their means as lines (Fig. 9). Arguments are those
    of [`relation_plot`].
    """
    order = np.argsort(relation.interpretability)
    names = [relation.names[index] for index in order]
    figure = Figure(figsize=(8, 1 + 0.19 * len(names)), layout="constrained")
    panels = zip(
        figure.subplots(1, 2, sharey=True),
        ((relation.recognition, x_label, BLUE), (relation.interpretability, y_label, ORANGE)),
    )
    for axis, (scores, label, color) in panels:
        axis.barh(range(len(names)), scores[order], color=color, height=0.75)
        axis.axvline(scores.mean(), color="black", linestyle="--", linewidth=0.9)
        axis.set_title(f"{label}\nmean {scores.mean():.3g}", fontsize=10)
        axis.set_ylim(-0.6, len(names) - 0.4)
        axis.tick_params(labelsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_yticks(range(len(names)), names, **verbatim())
    return figure
