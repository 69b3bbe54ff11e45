"""Pictures of images, maps and label maps. They are drawn with Pillow; charts are in `evaluation.analysis_plots`."""
