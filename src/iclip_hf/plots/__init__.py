"""Pictures of images, maps and label maps, drawn with Pillow; and a photograph to try the model on."""

from pathlib import Path


# Colours of maps, see `colors.py`; the first is the default.
COLORMAPS = ("heat", "cividis", "jet")


def example_image() -> str:
    """
    Returns the path of a JPEG file of 512 x 512 pixels: an astronaut in an orange suit with her helmet, a flag and a
    model of a space shuttle. The photograph is by NASA and in the public domain.
    """
    return str(Path(__file__).with_name("astronaut.jpg"))
