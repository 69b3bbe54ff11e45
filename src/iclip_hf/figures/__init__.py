"""Pictures of images, maps and label maps. They are drawn with Pillow; charts are in `evaluation.analysis_plots`."""

# Colours of maps by name; the first is the default. Nothing is imported here, because the help of a command needs the names.
COLORMAPS = ("heat", "cividis", "jet")
