"""BLIPren: give any language model eyes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from .configuration_blipren import BliprenConfig, BliprenQFormerConfig
from .modeling_blipren import BliprenForConditionalGeneration, BliprenForImageTextRetrieval, BliprenModel
from .pipeline_blipren import BliprenImageToTextPipeline
from .processing_blipren import BliprenProcessor
from .qformer_blipren import BliprenQFormer

# with the package installed, the auto classes need no remote code
AutoConfig.register("blipren", BliprenConfig)
# a checkpoint's `architectures` says which of the two it is
AutoModel.register(BliprenConfig, (BliprenForConditionalGeneration, BliprenForImageTextRetrieval))
AutoModelForImageTextToText.register(BliprenConfig, BliprenForConditionalGeneration)
AutoModelForMultimodalLM.register(BliprenConfig, BliprenForConditionalGeneration)
AutoProcessor.register(BliprenConfig, BliprenProcessor)

__all__ = [
    "BliprenConfig",
    "BliprenForConditionalGeneration",
    "BliprenForImageTextRetrieval",
    "BliprenImageToTextPipeline",
    "BliprenModel",
    "BliprenProcessor",
    "BliprenQFormer",
    "BliprenQFormerConfig",
]
