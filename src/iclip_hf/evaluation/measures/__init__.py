"""
Measures over a data set: recognition, maps, label maps and faithfulness. Their names and options are known without torch, so
that the help of a command does not load it.
"""

from importlib import import_module


# For each measure its module here and its class.
MEASURES = {
    "mAP": "recognition:AveragePrecision",
    "mMIoU": "pairs:MMIoU",
    "mFMB": "pairs:MFMB",
    "text_contrast": "contrast:TextContrast",
    "stuff_contrast": "contrast:StuffContrast",
    "presence": "recognition:Presence",
    "segmentation": "segmentation:Segmentation",
    "typed_segments": "typed_segments:TypedSegments",
    "deletion_insertion": "deletion_insertion:DeletionInsertion",
    "max_sensitivity": "max_sensitivity:MaxSensitivity",
    "randomization": "randomization:Randomization",
    "pointing_game": "pairs:PointingGame",
}
# The measures of each task of `iclip evaluate`.
TASKS = {
    "interpretability": ("mAP", "mMIoU", "mFMB", "text_contrast", "stuff_contrast", "presence"),
    "segmentation": ("segmentation",),
    "faithfulness": ("deletion_insertion", "max_sensitivity", "randomization", "pointing_game"),
}

_RANDOM = ("typed_segments", "deletion_insertion", "max_sensitivity", "randomization")
# Options of `iclip evaluate` that are parameters of measures: which have it, its form, and its help. The form is that of a number ("pixels" and
# "count" from 1, "integer", "number", "share" in [0, 1]), "texts", or a tuple of choices.
OPTIONS = {
    "aggregate": (
        ("mMIoU", "mFMB"),
        ("image", "pixel"),
        "image is the mean over the images of a class, pixel pools the pixels of all its images (default: image)",
    ),
    "window": (("segmentation",), "pixels", "side of sliding windows, for example 224 (default: the whole image)"),
    "stride": (("segmentation",), "pixels", "distance of the windows (default: half of the window)"),
    "background": (
        ("segmentation",),
        "texts",
        "texts that describe the background, such as sky, between commas, or by repeating the option",
    ),
    "threshold": (
        ("segmentation",),
        "share",
        "confidence up to which a pixel is background, in [0, 1] (default: the best one for the images at even positions is used for "
        "those at odd positions, and the reverse; none with texts for the background)",
    ),
    "logit_scale": (
        ("segmentation",),
        "number",
        "take as confidence the softmax of similarities times this number, for example 40 (default: the map of the best class, "
        "stretched to [0, 1])",
    ),
    "steps": (("deletion_insertion",), "count", "number of steps (default: 10)"),
    "seed": (_RANDOM, "integer", "seed of all random values (default: 0)"),
}


def make_measure(name: str, **options):
    """Creates a [`~measure.Measure`] by its name in `MEASURES`, with the options of its class. Raises `ValueError` if it is unknown."""
    if name not in MEASURES:
        raise ValueError(f"{name!r} is no measure: choose one of {', '.join(MEASURES)}.")
    module, _, kind = MEASURES[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), kind)(**options)
