"""
ICLIP: contrastive image-text models that explain themselves, for the Hugging Face ecosystem.

Importing the package makes the Auto classes know it, and `evaluate.load` its metrics. Nothing heavy is loaded until it is used:
every name below comes from its module on first access, and a module registers its class as soon as the Auto class it belongs to is
imported.
"""

import importlib
from typing import TYPE_CHECKING

from wrapt import register_post_import_hook


if TYPE_CHECKING:
    from .configuration_iclip import ICLIPConfig
    from .localization.localizer import explain
    from .modeling_iclip import ICLIPImageFeatures, ICLIPModel, ICLIPOutput, ICLIPTextFeatures
    from .models.embedded import embedded_model
    from .pipeline_iclip import ImageTextSimilarityMapPipeline
    from .processing_iclip import ICLIPProcessor

__version__ = "0.1.0"

_MODULES = {
    "embedded_model": "models.embedded",
    "explain": "localization.localizer",
    "ICLIPConfig": "configuration_iclip",
    "ICLIPImageFeatures": "modeling_iclip",
    "ICLIPModel": "modeling_iclip",
    "ICLIPOutput": "modeling_iclip",
    "ICLIPProcessor": "processing_iclip",
    "ICLIPTextFeatures": "modeling_iclip",
    "ImageTextSimilarityMapPipeline": "pipeline_iclip",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])


def _register_when_imported(auto_module: str, module: str):
    register_post_import_hook(lambda _: importlib.import_module(module, __name__), auto_module)


_register_when_imported("transformers.models.auto.configuration_auto", ".configuration_iclip")
_register_when_imported("transformers.models.auto.modeling_auto", ".modeling_iclip")
_register_when_imported("transformers.models.auto.processing_auto", ".processing_iclip")
_register_when_imported("transformers.pipelines", ".pipeline_iclip")
_register_when_imported("evaluate", ".hub.metrics")
