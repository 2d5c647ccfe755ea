"""BLIPren: give any language model eyes.

Names are imported when they are first used, so that `import blipren` imports no torch; with them, transformers' auto
classes get to know our classes. Type checkers read the imports under `TYPE_CHECKING`.
"""

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .configuration_blipren import BliprenConfig, BliprenQFormerConfig
    from .modeling_blipren import BliprenForConditionalGeneration, BliprenForImageTextRetrieval, BliprenModel
    from .pipeline_blipren import BliprenImageToTextPipeline
    from .processing_blipren import BliprenProcessor
    from .qformer_blipren import BliprenQFormer

_FILES = {
    "BliprenConfig": "configuration_blipren",
    "BliprenForConditionalGeneration": "modeling_blipren",
    "BliprenForImageTextRetrieval": "modeling_blipren",
    "BliprenImageToTextPipeline": "pipeline_blipren",
    "BliprenModel": "modeling_blipren",
    "BliprenProcessor": "processing_blipren",
    "BliprenQFormer": "qformer_blipren",
    "BliprenQFormerConfig": "configuration_blipren",
}
__all__ = [  # noqa: F822 - defined by __getattr__
    "BliprenConfig",
    "BliprenForConditionalGeneration",
    "BliprenForImageTextRetrieval",
    "BliprenImageToTextPipeline",
    "BliprenModel",
    "BliprenProcessor",
    "BliprenQFormer",
    "BliprenQFormerConfig",
]


def _register() -> None:
    """Tell transformers' auto classes of ours, so that they need no remote code."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )

    from .configuration_blipren import BliprenConfig
    from .modeling_blipren import BliprenForConditionalGeneration, BliprenForImageTextRetrieval
    from .processing_blipren import BliprenProcessor

    AutoConfig.register("blipren", BliprenConfig, exist_ok=True)
    # a checkpoint's `architectures` says which of the two it is
    models = (BliprenForConditionalGeneration, BliprenForImageTextRetrieval)
    AutoModel.register(BliprenConfig, models, exist_ok=True)
    AutoModelForImageTextToText.register(BliprenConfig, BliprenForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(BliprenConfig, BliprenForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(BliprenConfig, BliprenProcessor, exist_ok=True)


def __getattr__(name: str):
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _register()
    for public, file in _FILES.items():
        globals()[public] = getattr(importlib.import_module(f".{file}", __name__), public)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


if "transformers.models.auto.modeling_auto" in sys.modules:  # torch is imported already
    _register()
