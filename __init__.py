"""BLIPren: give any language model eyes.

Names are imported when they are first used, so that `import blipren` imports no torch. Type checkers read the imports
under `TYPE_CHECKING`.
"""

import importlib
import importlib.abc
import importlib.util
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


def __getattr__(name: str):
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_FILES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


# With the package installed, the auto classes need no remote code. Importing them here would import torch, so they are
# told of our classes right behind the first import of either side.


def _register_config(auto) -> None:
    from .configuration_blipren import BliprenConfig

    auto.AutoConfig.register("blipren", BliprenConfig, exist_ok=True)


def _register_models(auto) -> None:
    from .configuration_blipren import BliprenConfig
    from .modeling_blipren import BliprenForConditionalGeneration, BliprenForImageTextRetrieval

    # a checkpoint's `architectures` says which of the two it is
    models = (BliprenForConditionalGeneration, BliprenForImageTextRetrieval)
    auto.AutoModel.register(BliprenConfig, models, exist_ok=True)
    auto.AutoModelForImageTextToText.register(BliprenConfig, models[0], exist_ok=True)
    auto.AutoModelForMultimodalLM.register(BliprenConfig, models[0], exist_ok=True)


def _register_processor(auto) -> None:
    from .configuration_blipren import BliprenConfig
    from .processing_blipren import BliprenProcessor

    auto.AutoProcessor.register(BliprenConfig, BliprenProcessor, exist_ok=True)


class _Registration(importlib.abc.MetaPathFinder):
    """Registers our classes once transformers' files of auto classes are imported. Python has no hook of its own.

    Those files and ours import each other, so registration waits for the outermost of these imports to end.
    """

    def __init__(self):
        self.waiting = {
            "transformers.models.auto.configuration_auto": _register_config,
            "transformers.models.auto.modeling_auto": _register_models,
            "transformers.models.auto.processing_auto": _register_processor,
        }
        self.names = {*self.waiting, *(f"{__name__}.{file}" for file in _FILES.values())}
        self.depth = 0

    def find_spec(self, name, path=None, target=None):
        if name not in self.names:
            return None
        self.names.remove(name)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_then_register(module) -> None:
            self.depth += 1
            try:
                execute(module)
            finally:
                self.depth -= 1
            self.register()

        spec.loader.exec_module = execute_then_register
        return spec

    def register(self) -> None:
        """Call what waits for a module that is imported by now."""
        while not self.depth and (ready := [name for name in self.waiting if name in sys.modules]):
            function, self.depth = self.waiting.pop(ready[0]), 1
            try:
                function(sys.modules[ready[0]])
            finally:
                self.depth = 0


_registration = _Registration()
sys.meta_path.insert(0, _registration)
_registration.register()
