"""Pictures of images, maps and label maps, drawn with Pillow; and a photograph to try the model on."""

from pathlib import Path


# Colours of maps, see `colors.py`; the first is the default.
COLORMAPS = ("heat", "cividis", "jet")


def example_image() -> str:
    """
    Returns the path of a JPEG file of 640 x 462 pixels: the Eiffel Tower under clouds, behind trees and lawns. The
    photograph is in the public domain (CC0). It was chosen because the embedded model is right about it.
    """
    return str(Path(__file__).with_name("tower.jpg"))
