"""Space of the metric: a form for one image."""

from pathlib import Path

from iclip_hf.evaluation.evaluate_modules import metric_demo


demo = metric_demo(Path(__file__).with_name("text_contrast.py"))

if __name__ == "__main__":
    demo.launch()
