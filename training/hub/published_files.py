"""Which files of a checkpoint folder are published, and the checks on them.

Only files that match a pattern below are published: safetensors, the model's code, the processor, the generation config,
the memory, the reranker, the card and its pictures. Optimizer states, logs and pickles match none.
"""

import fnmatch
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from blipren.training.errors import UserError
from blipren.training.hub.local_paths import find_local_path, remove_local_paths

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
ADAPTER = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json")
PROCESSOR = (
    "processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "chat_template.jinja", "additional_chat_templates/*.jinja", "qformer_tokenizer/*.json", "qformer_tokenizer/vocab.txt",
)  # fmt: skip
CONFIGS = ("config.json", "generation_config.json")
CODE = ("*_blipren.py",)
MEMORY = ("memory/memory.json", "memory/embeddings.safetensors", "memory/texts.arrow", "memory/index.usearch")
RERANKER = ("reranker/reranker.json", "reranker/reranker.safetensors")
CARD = ("README.md", "pictures/*.png", "pictures/*.jpg", ".eval_results/*.yaml")


@dataclass(frozen=True)
class PublishedFile:
    """A file to publish: its name in the repository, and its content (small files) or the path that holds it."""

    name: str
    source: Path | bytes

    @property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    def sha256(self) -> str:
        """The Hub's hash of files in LFS."""
        return self._hexdigest(hashlib.sha256())

    def git_sha1(self) -> str:
        """The Hub's hash of files outside of LFS: git's name of the content."""
        return self._hexdigest(hashlib.sha1(b"blob %d\0" % self.size))

    def _hexdigest(self, digest) -> str:
        if isinstance(self.source, bytes):
            digest.update(self.source)
        else:
            with open(self.source, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()


def is_published(name: str) -> bool:
    """Whether a file of that name belongs to what `blipren push` publishes."""
    return _matches(name, WEIGHTS + ADAPTER + PROCESSOR + CONFIGS + CODE + MEMORY + RERANKER + CARD)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def collect_checkpoint_files(folder: Path, config: dict) -> list[PublishedFile]:
    """Return the files of a checkpoint folder that are published, checked and without local paths, sorted by name.

    The card and its pictures are not among them: they are made when the checkpoint is published.

    Raises:
        UserError: code, weights or processor are missing, a safetensors file is damaged, or a local path is left.
    """
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    files = []
    for name in names:
        path = folder / name
        if not is_published(name) or _matches(name, CARD):
            continue
        if name.endswith(".safetensors"):
            check_safetensors(path)
            files.append(PublishedFile(name, path))
        elif name.endswith(".json"):
            files.append(PublishedFile(name, remove_local_paths(name, path.read_bytes())))
        elif name.endswith((".jinja", ".py", ".txt")):
            files.append(PublishedFile(name, path.read_bytes()))
        else:
            files.append(PublishedFile(name, path))
    check_complete(folder, config, {file.name for file in files})
    for file in files:
        check_no_local_path(file)
    return files


def check_safetensors(path: Path) -> None:
    """Raise `UserError` if a file is not in safetensors format, is truncated, or its metadata hold a local path."""
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file, or it is damaged or truncated: {error}") from error
    if where := find_local_path(path.name, json.dumps(metadata).encode()):
        raise UserError(f"the metadata of {path} hold the local path {where}: save the file again without it")


def check_no_local_path(file: PublishedFile) -> None:
    """Raise `UserError` if a text file holds a path of this machine."""
    if isinstance(file.source, bytes) and not file.name.endswith((".png", ".jpg")):
        if where := find_local_path(file.name, file.source):
            raise UserError(f"{file.name} holds the local path {where!r}, which would be published: remove it")


def check_complete(folder: Path, config: dict, names: set[str]) -> None:
    """Raise `UserError` if weights, code or processor files that loading needs are not among the files `names`."""
    if "model.safetensors.index.json" in names:
        shards = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
        missing = sorted(shards - names)
        if missing:
            raise UserError(f"{folder} lacks {missing[0]}, which model.safetensors.index.json names")
    elif "model.safetensors" not in names:
        raise UserError(f"{folder} has no model.safetensors: only safetensors are published")
    modules = [target.split(".")[0] for target in (config.get("auto_map") or {}).values()]
    if not modules:
        raise UserError(f"config.json in {folder} has no auto_map, so nobody could load it: save with save_pretrained")
    seen = set()
    while modules:
        module = modules.pop()
        if module in seen:
            continue
        seen.add(module)
        if f"{module}.py" not in names:
            raise UserError(f"{folder} lacks {module}.py, which its auto_map needs: save with save_pretrained")
        source = (folder / f"{module}.py").read_text()
        modules += re.findall(r"^\s*from \.(\w+) import", source, flags=re.MULTILINE)
    if "processor_config.json" not in names or not names & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        raise UserError(f"{folder} has no processor: save the processor beside the model with save_pretrained")
