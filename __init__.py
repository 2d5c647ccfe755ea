"""BLIPren: give any language model eyes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from .configuration_blipren import BliprenConfig, BliprenQFormerConfig
from .modeling_blipren import BliprenForConditionalGeneration, BliprenModel
from .pipeline_blipren import BliprenImageToTextPipeline
from .processing_blipren import BliprenProcessor
from .qformer_blipren import BliprenQFormer

# with the package installed, the auto classes need no remote code
AutoConfig.register("blipren", BliprenConfig)
AutoModel.register(BliprenConfig, BliprenForConditionalGeneration)
AutoModelForImageTextToText.register(BliprenConfig, BliprenForConditionalGeneration)
AutoModelForMultimodalLM.register(BliprenConfig, BliprenForConditionalGeneration)
AutoProcessor.register(BliprenConfig, BliprenProcessor)

__all__ = [
    "BliprenConfig",
    "BliprenForConditionalGeneration",
    "BliprenImageToTextPipeline",
    "BliprenModel",
    "BliprenProcessor",
    "BliprenQFormer",
    "BliprenQFormerConfig",
]
