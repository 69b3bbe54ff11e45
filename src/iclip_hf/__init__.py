"""
ICLIP: contrastive image-text models that explain themselves, for the Hugging Face ecosystem.

Importing the package imports neither torch nor Transformers. Names of the package are imported on first access, and
its classes are registered with the Auto classes and `pipeline` as soon as Transformers is imported.
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
    from .explainers.explain import explain, explain_images
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
    "explain_images": ".explainers.explain",
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


# Each module registers its classes when it is imported: the last with `pipeline`, the others with the Auto classes.
_REGISTERING_MODULES = [
    f"{__name__}.model.{part}_iclip" for part in ("configuration", "modeling", "processing", "pipeline")
]
_MODEL_MODULES = [f"{__name__}.model.{file.stem}" for file in Path(__file__).parent.joinpath("model").glob("[!_]*.py")]


def _register(imported_module) -> None:
    """
    Registers the classes. This hook runs after the import of Transformers, of its pipelines and of each module of
    `model/`. It does not import Transformers' pipelines, which are slow to import. While another module of `model/` is
    being imported, nothing is registered: the hook runs again after that module.
    """
    if "transformers" not in sys.modules:
        return
    model_modules = [sys.modules[name] for name in _MODEL_MODULES if name in sys.modules]
    if any(module.__spec__._initializing for module in model_modules if module is not imported_module):
        return
    has_pipelines = hasattr(sys.modules.get("transformers.pipelines"), "PIPELINE_REGISTRY")
    for name in _REGISTERING_MODULES if has_pipelines else _REGISTERING_MODULES[:-1]:
        importlib.import_module(name)
    if has_pipelines:
        importlib.import_module(".backends.embedded", __name__).set_as_default()


def _add_notebook_picture(explanation_module) -> None:
    """
    Makes notebooks show an [`Explanation`] as a picture. Its module travels with exported models, so it cannot import
    `plots` itself.
    """

    def notebook_png(explanation) -> bytes | None:
        from .plots.sheets import png

        return png(explanation)

    explanation_module.Explanation._repr_png_ = notebook_png


register_post_import_hook(_add_notebook_picture, f"{__name__}.model.explanation")
# The hook waits for the whole of Transformers, because other modules of Transformers import its Auto classes midway.
for _name in ("transformers", "transformers.pipelines", *_MODEL_MODULES):  # runs at once for imported modules
    register_post_import_hook(_register, _name)
