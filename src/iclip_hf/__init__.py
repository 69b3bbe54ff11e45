"""
ICLIP: contrastive image-text models that explain themselves, for the Hugging Face ecosystem.

Importing the package makes the Auto classes and `pipeline` know it.
"""

from .configuration_iclip import ICLIPConfig
from .localization.localizer import explain
from .modeling_iclip import ICLIPImageFeatures, ICLIPModel, ICLIPOutput, ICLIPTextFeatures
from .models.embedded import embedded_model
from .pipeline_iclip import ImageTextSimilarityMapPipeline, ZeroShotImageSegmentationPipeline
from .processing_iclip import ICLIPProcessor


__version__ = "0.1.0"

__all__ = [
    "embedded_model",
    "explain",
    "ICLIPConfig",
    "ICLIPImageFeatures",
    "ICLIPModel",
    "ICLIPOutput",
    "ICLIPProcessor",
    "ICLIPTextFeatures",
    "ImageTextSimilarityMapPipeline",
    "ZeroShotImageSegmentationPipeline",
]
