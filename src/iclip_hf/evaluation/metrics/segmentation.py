"""Open-vocabulary semantic segmentation: mIoU of label maps over a data set, as papers measure it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from ...model.batches import map_tensors
from ...model.label_maps import BACKGROUND_LABEL
from ...model.windows import Tiling, mean_of_windows, sliding_windows
from ...utils.tables import known
from ..argmax import argmax_label_map, protocol_label_map
from ..functional import THRESHOLDS
from ..protocols import PROTOCOLS, protocol_settings
from ..window_maps import AuthorsPositions, WindowMaps, resized
from .mean_iou import MeanIoU
from .metric import EvaluatedImage, Metric


# Short side in pixels of images that windows slide over, as in SCLIP and its successors.
SHORT_SIDE = 336
# Options that a protocol sets if they are not given.
_PROTOCOL_OPTIONS = ("window", "stride", "logit_scale", "threshold")


class SlidingWindows(Tiling):
    """
    Square windows that slide over the image, as in benchmarks of segmentation. The value of a patch is its mean over
    the windows that contain the patch.

    Args:
        window, stride (`int`): side and distance of the windows in pixels, multiples of `patch_size`.
        patch_size (`int`): side of a patch in pixels.
    """

    def __init__(self, window: int, stride: int, patch_size: int):
        self.window, self.stride, self.patch_size = window, stride, patch_size

    def _windows(self, size: tuple[int, int]) -> list[tuple[slice, slice]]:
        return sliding_windows(size, (self.window,) * 2, (self.stride,) * 2)

    def views(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        return [pixel_values[..., rows, columns] for rows, columns in self._windows(pixel_values.shape[2:])]

    def join_maps(self, maps: Sequence[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        return mean_of_windows(maps, self._windows(size), size, self.patch_size)


class Segmentation(Metric):
    """
    The scores of [`MeanIoU`] for label maps that give each pixel the class with the highest raw map among all classes
    of the data set, see [`argmax_label_map`]. `prepare` takes classes and background from the data set. Without a data
    set, use [`MeanIoU`].

    In a data set with a background, a pixel is background if its confidence is not above a threshold, or if a text
    that describes the background is best. If neither a threshold nor such texts are given, the threshold is chosen on
    other images: the images at even positions take the best of 0, 0.01, ..., 1 for the images at odd positions, and
    the reverse.

    Args:
        window (`int`, *optional*): side in pixels of windows that slide over the image; the whole image if not given.
            Images then keep their proportions, with a short side of 336 pixels unless `image_size` says otherwise.
        stride (`int`, *optional*): distance in pixels of the windows; half of the window if not given.
        background: texts that describe the background; those of the data set if not given. Where such a text and a
            class have equal values, the pixel is background.
        threshold (`float` in [0, 1], *optional*): background threshold.
        logit_scale (`float`, *optional*): makes the confidence a probability, see [`argmax_label_map`].
        protocol (`str`, *optional*): name of a paper. The metric follows the steps of the paper, and takes its values
            for options that are not given, see [`~iclip_hf.evaluation.protocols.protocol_settings`]. Pass the paper's
            method to [`evaluate_model`], and its class names to `load_segmentation`.
    """

    name = "segmentation"
    columns = {
        "miou": ("mIoU %", 2),
        "pixel_accuracy": ("pixel accuracy %", 2),
        "floor": ("floor of mIoU %", 2),
        "floor_class": ("floor's class", None),
        "thresholds": ("background threshold", None),
    }
    legend = (
        "mIoU: overlap of label maps and masks over the pixels of all images, mean over the classes. Floor: the mIoU "
        "of one class everywhere."
    )
    rows = {"IoU": "per_class", "accuracy": "per_class_accuracy"}
    needs = frozenset()  # `run_model` computes the maps
    definition = "raw maps of all classes, bicubic to the image's size; the highest one counts"
    protocol_definition = (
        "image resized to int(factor * side + 0.5), bilinear in fixed point as by OpenCV; position embeddings "
        "interpolated by the factor (n + 0.1) / sqrt(N); maps of windows averaged in pixels, bilinear to the image's "
        "size, PAMR there; softmax over all texts; the highest class counts"
    )

    def __init__(
        self,
        window: int | None = None,
        stride: int | None = None,
        background: Sequence[str] | None = None,
        threshold: float | None = None,
        logit_scale: float | None = None,
        protocol: str | None = None,
    ):
        super().__init__()
        self.window, self.stride = window, stride or (window and window // 2)
        self.background, self.threshold, self.logit_scale = background, threshold, logit_scale
        self.protocol = protocol and known(protocol, PROTOCOLS, "protocol")
        if window and not protocol:
            self.image_size = {"shortest_edge": SHORT_SIDE}

    def prepare(self, run) -> None:
        if self.protocol:
            self._resolve_protocol(run)
        if self.window:
            self._check_windows(run)
        dataset = run.dataset
        self.background_texts = list(dataset.background_texts if self.background is None else self.background)
        if not dataset.background and (self.background_texts or self.threshold is not None):
            raise ValueError(
                f"Leave out the threshold and the texts of the background: {dataset.name!r} has no background."
            )
        self.chooses_threshold = dataset.background and self.threshold is None and not self.background_texts
        if self.chooses_threshold and run.num_images < 2:
            raise ValueError(
                "The background threshold is chosen on other images, and there is only one image: give a threshold."
            )
        texts = [*self.background_texts, *itertools.chain(*dataset.synonyms)]
        self.classes = [BACKGROUND_LABEL] * len(self.background_texts)  # class of each text
        self.classes += [index for index, synonyms in enumerate(dataset.synonyms) for _ in synonyms]
        unique = [*dict.fromkeys(texts)]  # a text of a class and of the background has one map
        self.map_indices = [unique.index(text) for text in texts]
        self.text_features = run.engine.encode(unique)
        self.new_mean_iou = partial(MeanIoU, len(dataset.class_ids) + 1, dataset.background, dataset.void)
        super().prepare(run)

    def _check_windows(self, run) -> None:
        """Raises `ValueError` unless the windows suit the patches and the other options."""
        if run.engine.multi_scale:
            raise ValueError("Leave out window or multi_scale: each has windows of its own.")
        patch_size = run.model.processor.patch_size
        # A protocol leaves out the incomplete patches of a window.
        fits_patches = self.protocol or (self.window % patch_size == 0 and self.stride % patch_size == 0)
        if not (fits_patches and 0 < self.stride <= self.window):
            raise ValueError(
                f"window and stride are multiples of the patch size of {patch_size} pixels, and the stride is at most "
                f"the window, not {self.window} and {self.stride}."
            )

    def _resolve_protocol(self, run) -> None:
        """Takes the values of the protocol for the options that are not given."""
        size = run.engine.image_size or {}
        if run.engine.refine or run.engine.multi_scale or "height" in size:
            raise ValueError(
                "Leave out protocol, or else refine, multi_scale and image_size: a protocol has a refinement, windows "
                "and a size of its own."
            )
        options = {name: getattr(self, name) for name in _PROTOCOL_OPTIONS}
        options["short_side"] = size.get("shortest_edge")
        given = {name: value for name, value in options.items() if value is not None}
        self.resolved_protocol = replace(protocol_settings(self.protocol, run.dataset.name), **given)
        for name in _PROTOCOL_OPTIONS:
            setattr(self, name, getattr(self.resolved_protocol, name))

    def run_model(self, images: list[EvaluatedImage]) -> list[dict[str, torch.Tensor | WindowMaps]]:
        """
        Returns for each image the raw maps of all texts, `(T, h, w)`, by method. With a protocol, returns the maps of
        windows.
        """
        if self.protocol:
            return [self._window_maps(image) for image in images]
        pixel_values = torch.cat([image.prepared.pixel_values for image in images])
        tiling = self.window and SlidingWindows(self.window, self.stride, self.run.model.processor.patch_size)
        method_maps = {
            method: engine.raw_maps(pixel_values, self.text_features, tiling=tiling)[0][:, self.map_indices].cpu()
            for method, engine in self.run.engines.items()
        }
        return [{method: maps[index] for method, maps in method_maps.items()} for index in range(len(images))]

    def _window_maps(self, image: EvaluatedImage) -> dict[str, WindowMaps]:
        """Returns for each method the raw maps of the windows of an image, by the steps of the protocol."""
        processor, resolved = self.run.model.processor, self.resolved_protocol
        windows = WindowMaps.cut(
            resized(image.sample.image, resolved.short_side),
            self.window,
            self.stride,
            size=image.sample.size,
            dilations=resolved.pamr_dilations,
            padding=resolved.padding,
        )
        pixel_values = processor(images=windows.crops(processor.patch_size), do_resize=False)["pixel_values"]
        batches = windows.pad(pixel_values).split(self.run.batch_size)
        # Equal texts count twice for methods that compare all texts, as in the papers' code.
        texts = map_tensors(lambda embeds: embeds[self.map_indices], self.text_features)
        method_maps = {}
        for method, engine in self.run.engines.items():
            with AuthorsPositions():
                maps = torch.cat([engine.raw_maps(batch, texts)[0] for batch in batches])
            method_maps[method] = replace(windows, maps=maps)
        return method_maps

    def update_from(self, image: EvaluatedImage, method: str, maps: torch.Tensor | None) -> None:
        raw_maps = image.outputs[self.name][method]
        if self.protocol:
            label_map, confidence = protocol_label_map(
                raw_maps, self.classes, self.threshold, self.logit_scale, self.resolved_protocol.min_area
            )
            label_map, confidence = label_map.cpu(), confidence.cpu()
        else:
            label_map, confidence = argmax_label_map(
                raw_maps, image.sample.size, self.classes, self.threshold, self.logit_scale
            )
        class_ids = label_map + 1  # 0 is the background
        self.update(class_ids, image.sample.label_map, confidence, image.index)

    def update(self, prediction, reference, confidence, index: int) -> None:
        """Adds the image at the position `index` of the data set. The other arguments are those of [`MeanIoU`]."""
        mean_iou = self.new_mean_iou()
        mean_iou.update(prediction, reference, confidence if self.chooses_threshold else None)
        self.state.add(mean_iou.areas, index % 2)  # by even and odd positions

    def compute(self) -> dict:
        """
        Returns the scores of [`MeanIoU`], with a name as `floor_class`, and `thresholds`: the background thresholds of
        the images at even and at odd positions, or None.
        """
        halves = [self.new_mean_iou(), self.new_mean_iou()]  # images at even, and at odd positions
        for parity, areas in self.state.sums.items():
            halves[parity].add_counts(areas)
        thresholds = None
        best_indices = [0, 0]
        if self.chooses_threshold:  # each half takes the best threshold of the other
            best_indices = [int(half.curve().argmax()) for half in reversed(halves)]
            thresholds = [float(THRESHOLDS[index]) for index in best_indices]
        elif self.threshold is not None:
            thresholds = [self.threshold] * 2
        whole = self.new_mean_iou()
        for half, index in zip(halves, best_indices):
            whole.add_counts(half.areas[..., [index]])
        scores = whole.compute()
        scores["floor_class"] = ["background", *self.run.dataset.class_names][scores["floor_class"]]
        return scores | {"thresholds": thresholds}

    def settings(self) -> dict:
        settings = super().settings() | {
            "synonyms": [list(texts) for texts in self.run.dataset.synonyms],
            "background": self.background_texts,
        }
        if self.chooses_threshold:
            settings["threshold"] = "the best of the images at the other (even or odd) positions"
        if self.protocol:
            for name in ("short_side", "min_area", "pamr_dilations", "padding"):
                settings[name] = getattr(self.resolved_protocol, name)
            settings["definition"] = self.protocol_definition
        return settings
