"""Base models whose architecture is not transformers' own: their repository's code, run only where a person names it."""

import os

from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

# names, by whoever runs the process, the code that may run: "user/name@COMMIT", several apart by spaces
TRUST_VARIABLE = "BLIPREN_TRUST_BASE_CODE"
_AUTO_CLASSES = {"vision": (AutoModel,), "llm": (AutoModel, AutoModelForCausalLM)}
_registered: dict[str, str] = {}  # model type -> id@commit


def load_base_code(part: str, config: dict, model_id: str, revision: str | None, **hub_kwargs) -> None:
    """Registers the classes that a base model's repository brings with the auto classes, where transformers has none.

    A checkpoint names the commit of its base models, so what was read and trusted once is what runs ever after. The
    word of trust is the process's, not the checkpoint's: a checkpoint must not bring code of others to nobody's notice.

    Args:
        part: `"vision"` or `"llm"`.
        config: the base model's `config.json`.
        model_id, revision: where it lies; `revision` may be a branch in `from_vision_text_pretrained` alone.
        hub_kwargs: `cache_dir`, `token`, `local_files_only`.

    Raises:
        ValueError: when the code is of no known commit, not named in `BLIPREN_TRUST_BASE_CODE`, or lacks a class.
    """
    model_type, auto_map = config.get("model_type"), config.get("auto_map")
    if not auto_map or (model_type in CONFIG_MAPPING and model_type not in _registered):
        return
    needs = f"{model_id} needs the Python code of its own repository, for {model_type!r}; "
    if os.path.isdir(model_id):
        raise ValueError(
            f"{needs}a folder has no commit that could be named as trusted: register its classes with "
            "AutoConfig.register and AutoModel.register, or take it from the Hub"
        )
    commit = extract_commit_hash(cached_file(model_id, "config.json", revision=revision, **hub_kwargs), None)
    pinned = f"{model_id}@{commit}"
    if pinned not in os.environ.get(TRUST_VARIABLE, "").split():
        raise ValueError(
            f"{needs}such code is never run unless it is named with its commit: read it at that commit, then set "
            f'{TRUST_VARIABLE}="{pinned}"'
        )
    if _registered.get(model_type, pinned) != pinned:
        raise ValueError(f"{needs}this process already runs that of {_registered[model_type]}: use another process")
    if model_type in _registered:
        return

    def load(auto_class: str) -> type:
        # an entry of another repository, as "other/name--file.Class", is not what was named
        reference = auto_map.get(auto_class, "").removeprefix(f"{model_id}--")
        if not reference or "--" in reference:
            raise ValueError(f"{needs}its auto_map has no {auto_class} of its own, but {auto_map}")
        return get_class_from_dynamic_module(reference, model_id, revision=commit, code_revision=commit, **hub_kwargs)

    config_class: type[PreTrainedConfig] = load("AutoConfig")
    classes = {auto: load(auto.__name__) for auto in _AUTO_CLASSES[part]}
    AutoConfig.register(model_type, config_class)
    for auto, model_class in classes.items():
        auto.register(config_class, model_class)
    _registered[model_type] = pinned


__all__ = ["TRUST_VARIABLE", "load_base_code"]
