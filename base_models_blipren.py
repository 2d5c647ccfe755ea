"""Base models: files and hashes of their weights, and the code of architectures that transformers does not have."""

import hashlib
import json
import logging
import os
from pathlib import Path

from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

logger = logging.getLogger(__name__)

# environment variable with the code that may run: "user/name@COMMIT", several separated by spaces
TRUST_VARIABLE = "BLIPREN_TRUST_BASE_CODE"
_AUTO_CLASSES = {"vision": (AutoModel,), "llm": (AutoModel, AutoModelForCausalLM)}
_registered: dict[str, str] = {}  # model type -> id@commit


def optional_file(path: str | os.PathLike, name: str, hub_kwargs: dict) -> Path | None:
    """Return a file that a checkpoint may have, fetched if it is on the Hub; `None` if it has none.

    A warning says so where that is not known, since the Hub does not answer and the cache does not tell.

    Raises:
        OSError: the checkpoint is not there, or may not be read.
    """
    try:
        return Path(cached_file(path, name, **hub_kwargs))
    except OSError as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            logger.warning("%s is loaded without %s: the Hub was not reached, so that it may have one", path, name)
        elif error.__cause__ is not None:  # a file that is missing has no cause
            raise
        return None


def find_part(
    path: str | os.PathLike, kind: str, names: tuple[str, ...], hub_kwargs: dict, optional: tuple[str, ...] = ()
) -> Path | None:
    """Return the folder of a part of a checkpoint, fetched if it is on the Hub; `None` if the checkpoint has none.

    Args:
        kind: memory or reranker, the name of the folder. names: its files; the first one says whether it is there.
        optional: files that it may have.
    """
    first = optional_file(path, f"{kind}/{names[0]}", hub_kwargs)
    if first is None:
        return None
    for name in names[1:]:
        cached_file(path, f"{kind}/{name}", **hub_kwargs)
    for name in optional:
        optional_file(path, f"{kind}/{name}", hub_kwargs)
    return first.parent


def read_part(folder: Path, kind: str, name: str, newest: int) -> dict:
    """Return the JSON file of a memory's or reranker's folder, without its format.

    Args:
        kind: memory or reranker. name: of the file. newest: format that this code reads.

    Raises:
        ValueError: the file is not there, or has a newer format.
    """
    if not (folder / name).is_file():
        raise ValueError(f"{folder} has no {kind}: it lacks {name}; make one with `blipren {kind} MODEL CACHE`")
    info = json.loads((folder / name).read_text())
    if info.pop("format") > newest:
        raise ValueError(f"the {kind} in {folder} has a newer format than {newest}: update BLIPren")
    return info


def weight_files(model_id: str, revision: str | None = None, **hub_kwargs) -> list[Path]:
    """Return the files of a checkpoint's weights, one or several shards.

    Raises:
        OSError: when the checkpoint has no weights.
    """
    keywords = {**hub_kwargs, "revision": revision, "_raise_exceptions_for_missing_entries": False}
    for name in ("model.safetensors", "pytorch_model.bin"):
        if path := cached_file(model_id, name, **keywords):
            return [Path(path)]
        if index := cached_file(model_id, f"{name}.index.json", **keywords):
            shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
            return [Path(cached_file(model_id, shard, **hub_kwargs, revision=revision)) for shard in shards]
    raise OSError(f"{model_id} has no weights: neither model.safetensors nor pytorch_model.bin, single or sharded")


def hash_weights(files: list[Path], sampled: bool = False) -> str:
    """Return the SHA-256 of weight files: of all bytes, or of sizes and 66 samples of 256 KiB a file if `sampled`."""
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
    """Return id, revision (the commit on the Hub) and hashes of the weights of a base model."""
    files = weight_files(model_id, revision, **hub_kwargs)
    # the path of a cached file contains its commit
    commit = None if os.path.isdir(model_id) else extract_commit_hash(str(files[0]), None)
    return {
        "id": str(model_id),
        "revision": commit or revision,
        "sha256": hash_weights(files),
        "sampled_sha256": hash_weights(files, sampled=True),
    }


def load_base_code(part: str, config: dict, model_id: str, revision: str | None, **hub_kwargs) -> None:
    """Register the classes of a base model's repository with the auto classes, if transformers lacks its model type.

    The environment variable `BLIPREN_TRUST_BASE_CODE` must name the repository and the commit. A checkpoint stores the
    commit of its base models, so the code that runs is always the code that was read. A checkpoint alone cannot make
    the code of another repository run.

    Args:
        part: `"vision"` or `"llm"`.
        config: content of the base model's `config.json`.
        model_id, revision: Hub id or folder, and revision; a branch only in `from_vision_text_pretrained`.
        hub_kwargs: `cache_dir`, `token`, `local_files_only`.

    Raises:
        ValueError: when the code has no commit, is not named in `BLIPREN_TRUST_BASE_CODE`, or lacks a class.
    """
    model_type, auto_map = config.get("model_type"), config.get("auto_map")
    if not auto_map or (model_type in CONFIG_MAPPING and model_type not in _registered):
        return
    needs = f"{model_id} needs the Python code of its own repository for model type {model_type!r}; "
    if os.path.isdir(model_id):
        raise ValueError(
            f"{needs}a folder has no commit to trust: register its classes with AutoConfig.register and "
            "AutoModel.register, or load it from the Hub"
        )
    commit = extract_commit_hash(cached_file(model_id, "config.json", revision=revision, **hub_kwargs), None)
    pinned = f"{model_id}@{commit}"
    if pinned not in os.environ.get(TRUST_VARIABLE, "").split():
        raise ValueError(f'{needs}to allow it, read the code at this commit and set {TRUST_VARIABLE}="{pinned}"')
    if _registered.get(model_type, pinned) != pinned:
        raise ValueError(
            f"{needs}this process already uses the code of {_registered[model_type]}: use another process"
        )
    if model_type in _registered:
        return

    def load(auto_class: str) -> type:
        # an entry of another repository, such as "other/name--file.Class", was not trusted
        reference = auto_map.get(auto_class, "").removeprefix(f"{model_id}--")
        if not reference or "--" in reference:
            raise ValueError(f"{needs}its auto_map names no {auto_class} of this repository: {auto_map}")
        return get_class_from_dynamic_module(reference, model_id, revision=commit, code_revision=commit, **hub_kwargs)

    config_class: type[PreTrainedConfig] = load("AutoConfig")
    classes = {auto: load(auto.__name__) for auto in _AUTO_CLASSES[part]}
    AutoConfig.register(model_type, config_class)
    for auto, model_class in classes.items():
        auto.register(config_class, model_class)
    _registered[model_type] = pinned


__all__ = ["TRUST_VARIABLE", "base_model_reference", "hash_weights", "load_base_code", "weight_files"]
