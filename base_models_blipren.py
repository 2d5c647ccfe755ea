"""Base models whose architecture is not transformers' own: their repository's code, run only where a person names it."""

import hashlib
import json
import os
from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

# names, by whoever runs the process, the code that may run: "user/name@COMMIT", several apart by spaces
TRUST_VARIABLE = "BLIPREN_TRUST_BASE_CODE"
_AUTO_CLASSES = {"vision": (AutoModel,), "llm": (AutoModel, AutoModelForCausalLM)}
_registered: dict[str, str] = {}  # model type -> id@commit


def weight_files(model_id: str, revision: str | None = None, **hub_kwargs) -> list[Path]:
    """The files that hold a checkpoint's weights, single or sharded. Raises `OSError` when there is none."""
    keywords = {**hub_kwargs, "revision": revision, "_raise_exceptions_for_missing_entries": False}
    for name in ("model.safetensors", "pytorch_model.bin"):
        if path := cached_file(model_id, name, **keywords):
            return [Path(path)]
        if index := cached_file(model_id, f"{name}.index.json", **keywords):
            shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
            return [Path(cached_file(model_id, shard, **hub_kwargs, revision=revision)) for shard in shards]
    raise OSError(f"{model_id} has no weights: neither model.safetensors nor pytorch_model.bin, single or sharded")


def hash_weights(files: list[Path], sampled: bool = False) -> str:
    """SHA-256 over weight files, whole, or over their sizes and 66 samples of each (fast at any size)."""
    digest = hashlib.sha256()
    sample = 1 << 18
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            if not sampled or size <= 66 * sample:
                while block := file.read(1 << 22):
                    digest.update(block)
                continue
            for i in range(66):
                file.seek((size - sample) * i // 65)
                digest.update(file.read(sample))
    return digest.hexdigest()


def base_model_reference(model_id: str, revision: str | None, **hub_kwargs) -> dict:
    """Where a frozen part came from: id, revision (the commit, where there is one), hashes of its weights."""
    files = weight_files(model_id, revision, **hub_kwargs)
    # a file of the Hub lies in the cache under its commit
    commit = None if os.path.isdir(model_id) else extract_commit_hash(str(files[0]), None)
    return {
        "id": str(model_id),
        "revision": commit or revision,
        "sha256": hash_weights(files),
        "sampled_sha256": hash_weights(files, sampled=True),
    }


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


__all__ = ["TRUST_VARIABLE", "base_model_reference", "hash_weights", "load_base_code", "weight_files"]
