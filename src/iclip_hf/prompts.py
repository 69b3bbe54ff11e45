"""Prompt templates by name."""

_KINDS_OF_PHOTO = (
    "bad", "low resolution", "cropped", "bright", "dark", "close-up", "black and white", "pixelated", "jpeg corrupted", "blurry",
    "good",
)  # fmt: skip
_KINDS_OF_OBJECT = ("", "hard to see ", "clean ", "dirty ", "cool ", "nice ", "weird ", "small ", "large ")
_WORKS = (
    "a sculpture", "a rendering", "a tattoo", "a drawing", "a painting", "a doodle", "a sketch", "a rendition", "graffiti", "art",
    "itap",
)  # fmt: skip
_MATERIALS = ("embroidered", "plastic", "origami", "toy", "cartoon", "plushie")

# The 80 templates that CLIP's authors average on ImageNet.
IMAGENET_TEMPLATES = (
    *(f"a {kind} photo of {article} {{}}." for kind in _KINDS_OF_PHOTO for article in ("a", "the")),
    *(f"a photo of {article} {kind}{{}}." for kind in _KINDS_OF_OBJECT for article in ("a", "the")),
    *(f"{work} of {article} {{}}." for work in _WORKS for article in ("a", "the")),
    *(f"{article} {material} {{}}." for material in _MATERIALS for article in ("a", "the")),
    *(f"{article} {{}} in a video game." for article in ("a", "the")),
    "a photo of many {}.",
    "a photo of one {}.",
    "a photo of my {}.",
    "itap of my {}.",
)
NAMED_TEMPLATES = {"imagenet": IMAGENET_TEMPLATES}
