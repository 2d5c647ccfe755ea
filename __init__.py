"""BLIPren: connect a frozen vision encoder to any causal language model.

Each public name is imported when it is first used, so that `import blipren` imports no torch.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # "as" marks a public name for type checkers; a test compares these imports with _NAMES
    from .configuration_blipren import BliprenConfig as BliprenConfig
    from .modeling_blipren import BliprenForConditionalGeneration as BliprenForConditionalGeneration
    from .modeling_blipren import BliprenModel as BliprenModel
    from .pipeline_blipren import BliprenImageToTextPipeline as BliprenImageToTextPipeline
    from .processing_blipren import BliprenProcessor as BliprenProcessor
    from .qformer_blipren import BliprenQFormer as BliprenQFormer
    from .qformer_configuration_blipren import BliprenQFormerConfig as BliprenQFormerConfig
    from .retrieval_blipren import BliprenForImageTextRetrieval as BliprenForImageTextRetrieval

_NAMES = {  # file -> its public names
    "configuration_blipren": ("BliprenConfig",),
    "modeling_blipren": ("BliprenForConditionalGeneration", "BliprenModel"),
    "pipeline_blipren": ("BliprenImageToTextPipeline",),
    "processing_blipren": ("BliprenProcessor",),
    "qformer_blipren": ("BliprenQFormer",),
    "qformer_configuration_blipren": ("BliprenQFormerConfig",),
    "retrieval_blipren": ("BliprenForImageTextRetrieval",),
}
_FILES = {name: file for file, names in _NAMES.items() for name in names}
__all__ = sorted(_FILES)


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_FILES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


# With the package installed, transformers' auto classes load our checkpoints without remote code. They find our classes
# as they find transformers' own: by model type and class name in tables, imported at first use from
# `transformers.models.MODEL_TYPE`. `AutoModel.register` would import torch here, and importing our files while
# transformers imports its own would be circular.
_AUTO_CLASSES: dict[str, dict[str, str | tuple[str, ...]]] = {  # module -> its tables -> our class names
    "transformers.models.auto.configuration_auto": {"CONFIG_MAPPING": "BliprenConfig"},
    "transformers.models.auto.modeling_auto": {
        # `architectures` of a checkpoint's config says which of the two it is
        "MODEL_MAPPING": ("BliprenForConditionalGeneration", "BliprenForImageTextRetrieval"),
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING": "BliprenForConditionalGeneration",
        "MODEL_FOR_MULTIMODAL_LM_MAPPING": "BliprenForConditionalGeneration",
    },
    "transformers.models.auto.processing_auto": {"PROCESSOR_MAPPING": "BliprenProcessor"},
}


def _add_to_auto_classes(module: ModuleType) -> None:
    for mapping, names in _AUTO_CLASSES[module.__name__].items():
        getattr(module, f"{mapping}_NAMES")["blipren"] = names
        if mapping != "CONFIG_MAPPING":  # the other tables are read by the name of the config class
            getattr(module, mapping)._reverse_config_mapping["BliprenConfig"] = "blipren"


class _AutoClassesFinder:
    """Import finder that adds our names to a module of auto classes right after its import."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _AUTO_CLASSES:
            return None
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            _add_to_auto_classes(module)

        spec.loader.exec_module = execute_and_add
        return spec


sys.modules["transformers.models.blipren"] = sys.modules[__name__]
sys.meta_path.insert(0, _AutoClassesFinder)
for _name in _AUTO_CLASSES.keys() & sys.modules.keys():
    _add_to_auto_classes(sys.modules[_name])
