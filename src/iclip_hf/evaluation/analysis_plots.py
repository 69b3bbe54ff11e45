"""Figures of the analyses: channels in images, and recognition against interpretability."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure
from PIL import Image

from ..figures.lettering import more_scripts
from .analysis import ChannelMatch, Relation


# Safe for colour-blind readers, on white and on gray (Okabe and Ito).
BLUE, ORANGE = "#0072B2", "#D55E00"


def _verbatim() -> dict:
    """Returns matplotlib's options for text of a user: dollar signs start no formula, and further fonts cover other scripts."""
    return {"parse_math": False, "fontfamily": [*rcParams["font.family"], *more_scripts()]}


def channel_scatter(images: Sequence[Image.Image], matches: Sequence[Mapping[str, ChannelMatch]]) -> Figure:
    """
    Draws the patches that the channels of pooled vectors match (Fig. 3). A row shows an image, a panel a pooling, and a point a
    channel. A point lies in the channel's patch, and its area is proportional to the magnitude of the pooled value.
    `matches` are results of `channel_matches` for the images, with the same poolings.
    """
    poolings = list(matches[0])
    rows, columns = len(images), len(poolings)
    heights = [image.height / image.width for image in images]
    figure = Figure(figsize=(2.8 * columns, 2.8 * sum(heights) + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axis, pooling in zip(axes[0], poolings):
        axis.set_title(pooling.replace("_", " "), fontsize=11)
    figure.supxlabel("each point is a channel; its area is the magnitude of the pooled value", fontsize=9)
    panels = [(image, found[pooling]) for image, found in zip(images, matches) for pooling in poolings]
    for axis, (image, match) in zip(axes.flat, panels):
        axis.axis("off")
        axis.imshow(image.convert("L").point(lambda gray: (gray + 255) // 2).convert("RGB"))
        # The points of one patch are spread evenly over it (Roberts' R2 sequence), so that they do not hide each other.
        places = (np.arange(len(match.tokens))[:, None] * (0.5698402910, 0.7548776662)) % 1
        corners = np.stack(np.divmod(match.tokens, match.grid[1]), 1)
        y, x = ((corners + places) / match.grid * (image.height, image.width)).T - 0.5
        sizes = np.abs(match.values) / (np.abs(match.values).max() or 1)
        axis.autoscale(False)
        axis.scatter(x, y, s=40 * sizes, c=ORANGE, alpha=0.6, edgecolors="white", linewidths=0.3)
    return figure


def relation_plot(relation: Relation, x_label: str, y_label: str) -> Figure:
    """
    Plots recognition against interpretability (Fig. 9), with a point for each class, the least-squares line, and the names of
    classes that do not overlap, outermost first.
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
    figure.draw_without_rendering()  # determines the positions of the points
    points = axis.transData.transform(np.stack([x, y], 1))
    taken = []
    for index in np.argsort(-np.hypot(*((points - points.mean(0)) / points.std(0)).T)):
        side = 1 if x[index] < x.mean() else -1  # inwards
        offset = {"xytext": (5 * side, 0), "textcoords": "offset points", "ha": "left" if side > 0 else "right"}
        name = relation.names[index]
        text = axis.annotate(name, (x[index], y[index]), va="center", fontsize=8, **offset, **_verbatim())
        box = text.get_window_extent()
        if box.count_contains(points) or any(box.overlaps(other) for other in taken):
            text.remove()
        else:
            taken.append(box)
    return figure
