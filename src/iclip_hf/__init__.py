"""
ICLIP: contrastive image-text models that explain themselves, for the Hugging Face ecosystem.

Importing the package makes the Auto classes and `pipeline` know it. It does not import torch or Transformers: names
are imported on first access, and the classes are registered as soon as Transformers is imported.
"""

import importlib
import logging
import re
import sys
from typing import TYPE_CHECKING

from wrapt import register_post_import_hook

from .utils.lazy import lazy_names


if TYPE_CHECKING:
    from .backends.embedded import embedded_model
    from .backends.loading import load
    from .evaluation.evaluate import evaluate_model
    from .explainers.explain import explain
    from .model.configuration_iclip import ICLIPConfig
    from .model.explanation import Explanation, coco_annotations
    from .model.modeling_iclip import ICLIPImageFeatures, ICLIPModel, ICLIPOutput, ICLIPTextFeatures
    from .model.pipeline_iclip import ImageTextSimilarityMapPipeline, ZeroShotImageSegmentationPipeline
    from .model.processing_iclip import ICLIPProcessor
    from .plots import example_image
    from .plots.sheets import draw


__version__ = "0.2.0.dev0"

_MODULES = {
    "coco_annotations": ".model.explanation",
    "draw": ".plots.sheets",
    "embedded_model": ".backends.embedded",
    "example_image": ".plots",
    "evaluate_model": ".evaluation.evaluate",
    "explain": ".explainers.explain",
    "Explanation": ".model.explanation",
    "ICLIPConfig": ".model.configuration_iclip",
    "ICLIPImageFeatures": ".model.modeling_iclip",
    "ICLIPModel": ".model.modeling_iclip",
    "ICLIPOutput": ".model.modeling_iclip",
    "ICLIPProcessor": ".model.processing_iclip",
    "ICLIPTextFeatures": ".model.modeling_iclip",
    "load": ".backends.loading",
    "ImageTextSimilarityMapPipeline": ".model.pipeline_iclip",
    "ZeroShotImageSegmentationPipeline": ".model.pipeline_iclip",
}
__all__ = [*_MODULES]
__getattr__, __dir__ = lazy_names(__name__, _MODULES)


# Each registers a class with the Auto classes.
_REGISTERING = [f"{__name__}.model.{kind}_iclip" for kind in ("configuration", "modeling", "processing")]


def _register(imported) -> None:
    """
    Called after Transformers and after each of these modules: where one was being imported first, the others wait for
    its end.
    """
    started = [name for name in sys.modules if name in _REGISTERING]
    if not started or imported.__name__ == started[0]:
        for name in _REGISTERING:
            importlib.import_module(name)


# After Transformers as a whole, because its Auto classes are also imported in the middle of its other modules.
for _name in ("transformers", *_REGISTERING):  # called at once if it is imported already
    register_post_import_hook(_register, _name)
register_post_import_hook(
    lambda _: importlib.import_module(".model.pipeline_iclip", __name__), "transformers.pipelines"
)
register_post_import_hook(
    lambda _: importlib.import_module(".backends.embedded", __name__).set_as_default(),
    f"{__name__}.model.pipeline_iclip",
)


def _show_in_notebooks(imported) -> None:
    imported.Explanation._repr_png_ = lambda self: importlib.import_module(".plots.sheets", __name__).png(self)


register_post_import_hook(_show_in_notebooks, f"{__name__}.model.explanation")

# `evaluate.load` warns that it takes the installed metrics, because the Hub has none of these names. That is what they
# are installed for.
_INSTALLED = re.compile("latest cached version .*evaluate-metric--(mfmb|mmiou|text_contrast)")
logging.getLogger("evaluate.loading").addFilter(lambda record: not _INSTALLED.search(record.getMessage()))
