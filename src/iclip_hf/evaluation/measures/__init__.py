"""
Measures over a data set: recognition, maps, label maps and faithfulness. Their names are known without torch, so that
the help of a command does not load it.
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


def make_measure(name: str, **options):
    """Creates a [`~measure.Measure`] by its name in `MEASURES`, with the options of its class. Raises `ValueError` if it is unknown."""
    if name not in MEASURES:
        raise ValueError(f"{name!r} is no measure: choose one of {', '.join(MEASURES)}.")
    module, _, kind = MEASURES[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), kind)(**options)
