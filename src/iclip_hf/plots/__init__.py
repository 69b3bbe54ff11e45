"""Pictures of maps and label maps, drawn with Pillow, and a photograph to try the model on."""

from pathlib import Path


# Colours of maps, see `colors.py`; the first is the default.
COLORMAPS = ("heat", "cividis", "jet")


def example_image() -> str:
    """Returns the path of a photograph that the embedded model is right about, 640 x 462 pixels, CC0."""
    return str(Path(__file__).with_name("tower.jpg"))
