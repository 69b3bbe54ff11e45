"""A photograph to try the model on, which is part of the package."""

from pathlib import Path


def example_image() -> str:
    """
    Returns the path of a JPEG file of 512 x 512 pixels: an astronaut in an orange suit with her helmet, a flag and a model of a space
    shuttle. The photograph is by NASA and in the public domain.
    """
    return str(Path(__file__).with_name("astronaut.jpg"))
