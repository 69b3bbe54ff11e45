"""Pictures of images, maps and label maps. They are drawn with Pillow."""

# Colours of maps, see `colors.py`; the first is the default.
COLORMAPS = ("heat", "cividis", "jet")
