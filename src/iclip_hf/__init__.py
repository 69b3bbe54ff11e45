"""
ICLIP: contrastive image-text models that explain themselves, for the Hugging Face ecosystem.

Importing the package makes the Auto classes and `pipeline` know it. It does not import torch or Transformers: names
are imported on first access, and the classes are registered as soon as Transformers is imported.
"""

import importlib
import sys
from pathlib import Path
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
    from .model.modeling_iclip import ICLIPModel
    from .model.outputs import ICLIPImageFeatures, ICLIPOutput, ICLIPTextFeatures
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
    "ICLIPImageFeatures": ".model.outputs",
    "ICLIPModel": ".model.modeling_iclip",
    "ICLIPOutput": ".model.outputs",
    "ICLIPProcessor": ".model.processing_iclip",
    "ICLIPTextFeatures": ".model.outputs",
    "load": ".backends.loading",
    "ImageTextSimilarityMapPipeline": ".model.pipeline_iclip",
    "ZeroShotImageSegmentationPipeline": ".model.pipeline_iclip",
}
__all__ = [*_MODULES]
__getattr__, __dir__ = lazy_names(__name__, _MODULES)


# Each registers its classes with the Auto classes, the last with `pipeline`.
_REGISTERING = [f"{__name__}.model.{kind}_iclip" for kind in ("configuration", "modeling", "processing", "pipeline")]
_OF_MODEL = [f"{__name__}.model.{file.stem}" for file in Path(__file__).parent.joinpath("model").glob("[!_]*.py")]


def _register(imported) -> None:
    """
    Registers the classes. It is called after the import of Transformers, of its pipelines and of each module of the
    model. The pipelines are slow to import, so they are not imported here. If a module of the model imports
    Transformers, the registration waits for the end of this module.
    """
    started = [sys.modules[name] for name in _OF_MODEL if name in sys.modules]
    if "transformers" not in sys.modules or any(
        module.__spec__._initializing for module in started if module is not imported
    ):
        return
    has_pipelines = hasattr(sys.modules.get("transformers.pipelines"), "PIPELINE_REGISTRY")
    for name in _REGISTERING if has_pipelines else _REGISTERING[:-1]:
        importlib.import_module(name)
    if has_pipelines:
        importlib.import_module(".backends.embedded", __name__).set_as_default()


def _draw_in_notebooks(module) -> None:
    """Gives explanations their picture. Their module travels with exported models, so it knows no plots."""

    def picture(explanation) -> bytes | None:
        from .plots.sheets import png

        return png(explanation)

    module.Explanation._repr_png_ = picture


register_post_import_hook(_draw_in_notebooks, f"{__name__}.model.explanation")
# After Transformers as a whole, because its Auto classes are also imported in the middle of its other modules.
for _name in ("transformers", "transformers.pipelines", *_OF_MODEL):  # called at once if it is imported already
    register_post_import_hook(_register, _name)
