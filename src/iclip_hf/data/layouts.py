"""
The segmentation data sets: titles, files, class names and mask values. Their readers are elsewhere, so that the help
of commands does not import them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from ..model.prompts import IMAGENET_TEMPLATES
from .class_names import (
    ADE20K,
    ADE20K_STUFF_CLASSES,
    CAMVID,
    CAMVID_STUFF_CLASSES,
    CITYSCAPES,
    COCO_STUFF,
    COCO_THINGS,
    CONTEXT,
    VOC,
)


VOID = 255  # in files of index masks


class Layout(NamedTuple):
    """
    Title, files and mask values of a data set.

    Attributes:
        title: name on model cards and in reports.
        images, masks: patterns of the files below the root, with `<split>` for the split. Braces hold alternatives:
            the first that finds files is used. `*` stands for the same text in an image and its mask. If the pattern
            of images ends with `*`, images have any format, and every image needs a mask. Otherwise, every mask needs
            an image, and an image without a mask is left out.
        classes: names of the classes, by ascending id; None if `classes.txt` or COCO's file of instances holds them.
        default_split: the split that is read if none is named; None if the data set has no splits.
        split_sizes: number of images of each split with public masks; empty for the user's own data.
        image_list: pattern of the file that names the images of a split; empty if a split has its own folder.
        instances: whether COCO's file of instances is read if there are no masks.
        class_values: values of the classes in the masks, by default 1..K.
        background_values, void_values: values of background and of ignored pixels. 255 is void unless it is a value of
            the background. A value in none of the three is an error.
        stuff: classes without instances; None if the data set does not mark them.
        templates: prompt templates. Folders and the data sets of ICLIP's paper have ICLIP's template; all others have
            CLIP's templates, as in papers on segmentation.
    """

    title: str
    images: str
    masks: str
    classes: Sequence[str] | None
    default_split: str | None
    split_sizes: Mapping[str | None, int] = MappingProxyType({})
    image_list: str = ""
    instances: bool = False
    class_values: Sequence[int] | None = None
    background_values: Sequence[int] = (0,)
    void_values: Sequence[int] = ()
    stuff: Sequence[str] | None = ()
    templates: tuple[str, ...] = IMAGENET_TEMPLATES


_PHOTO = ("a photo of the {}",)
_VOC = Layout(
    "PASCAL VOC 2012",
    "{VOCdevkit/VOC2012/,VOC2012/,}JPEGImages/*.jpg",
    "{VOCdevkit/VOC2012/,VOC2012/,}SegmentationClass/*.png",
    VOC,
    "val",
    {"train": 1464, "val": 1449, "trainval": 2913},
    "{VOCdevkit/VOC2012/,VOC2012/,}ImageSets/Segmentation/<split>.txt",
)
_CONTEXT = Layout(
    "PASCAL Context",
    "{VOCdevkit/VOC2010/,VOC2010/,}JPEGImages/*.jpg",
    "{VOCdevkit/VOC2010/,VOC2010/,}SegmentationClassContext/*.png",
    CONTEXT,
    "val",
    {"train": 4996, "val": 5104},  # as MMSegmentation converts it
    "{VOCdevkit/VOC2010/,VOC2010/,}ImageSets/SegmentationContext/<split>.txt",
    stuff=None,
)
_WITHOUT_BACKGROUND = {"background_values": (), "void_values": (0,)}
_COCO_SIZES = {"train2017": 118_287, "val2017": 5000}
# Values of COCO's things, then of its stuff, in the masks of COCO-Stuff: one less than the category ids. 11 values are
# not used.
_COCO_VALUES = [value for value in range(182) if value not in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)]
_COCO_STUFF = Layout(
    "COCO-Stuff 164k",
    "{images/,}<split>/*.jpg",
    "{stuffthingmaps,annotations}/<split>/*.png",
    COCO_STUFF,
    "val2017",
    _COCO_SIZES,
    class_values=_COCO_VALUES,
    background_values=(),
    stuff=COCO_STUFF[len(COCO_THINGS) :],
)
# Label ids of Cityscapes' 19 classes.
_CITYSCAPES_VALUES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_FOLDER = Layout("folder", "images/*", "masks/*.png", None, None, stuff=None, templates=_PHOTO)
DATASETS = {
    "voc2012": _VOC._replace(templates=_PHOTO),
    "coco2017": Layout("COCO 2017", "", "", None, "val2017", _COCO_SIZES, instances=True, templates=_PHOTO),
    "folder": _FOLDER,
    "voc21": _VOC,
    "voc20": _VOC._replace(title=f"{_VOC.title}, without background", **_WITHOUT_BACKGROUND),
    "context60": _CONTEXT,
    "context59": _CONTEXT._replace(title=f"{_CONTEXT.title}, without background", **_WITHOUT_BACKGROUND),
    # All other pixels are background, also unlabelled ones, as in GroupViT's conversion.
    "coco_object": _COCO_STUFF._replace(
        title="COCO-Object",
        classes=COCO_THINGS,
        instances=True,
        class_values=_COCO_VALUES[:80],
        background_values=(*_COCO_VALUES[80:], VOID),
        stuff=(),
    ),
    "coco_stuff": _COCO_STUFF,
    "ade20k": Layout(
        "ADE20K",
        "{ADEChallengeData2016/,}images/<split>/*.jpg",
        "{ADEChallengeData2016/,}annotations/<split>/*.png",
        ADE20K,
        "validation",
        {"training": 20_210, "validation": 2000},
        stuff=ADE20K_STUFF_CLASSES,
        **_WITHOUT_BACKGROUND,
    ),
    "cityscapes": Layout(
        "Cityscapes",
        "leftImg8bit/<split>/**/*_leftImg8bit.png",
        "gtFine/<split>/**/*_gtFine_labelIds.png",
        CITYSCAPES,
        "val",
        {"train": 2975, "val": 500},
        class_values=_CITYSCAPES_VALUES,
        background_values=(),
        void_values=range(35),
        stuff=CITYSCAPES[: CITYSCAPES.index("person")],
    ),
    "camvid": _FOLDER._replace(
        title="CamVid",
        split_sizes={None: 701},
        classes=CAMVID,
        class_values=range(11),
        background_values=(),
        void_values=(11,),
        stuff=CAMVID_STUFF_CLASSES,
        templates=IMAGENET_TEMPLATES,
    ),
}
