"""The check that a refactor changes no number: short runs of a commit before and of the working tree, bit for bit.

    python tests/numerics/compare_commits.py [BEFORE_COMMIT] [--keep FOLDER]

runs `new`, `embed`, `align`, `train` (frozen, LoRA, MoE projector, without shared prefix, experiments, online) and
`evaluate` on 200 drawn scenes, once with the code of BEFORE_COMMIT and once with the working tree: in fresh processes,
on the CPU, with one thread and fixed seeds, through the entry point of the command line. It compares the scenes, the
cached features and token ids, each value of the logs, each tensor of the checkpoints, the metrics and the predictions.
One line is printed for each file compared; a file that differs is named with its first differing value, before and
now. Times, speeds, versions and paths are left out. A value or a file that only the working tree has is counted as new
and is no difference; a new tensor is one. About two minutes on one core.

    python tests/numerics/compare_commits.py --quickstart BEFORE_OUT NOW_OUT

compares the folders of two quickstarts in the same way, `summary.json` (without its times) among the files. Make
BEFORE_OUT with `blipren quickstart --out BEFORE_OUT` in a checkout of the commit before, NOW_OUT in the working tree,
both on the same machine with the same number of threads (OMP_NUM_THREADS=2): sums depend on it.

With --keep the outputs stay in FOLDER, and the next call takes those of BEFORE_COMMIT from there: half the time. Remove
FOLDER when the runs below change.

Exit status: 0 all equal, 1 differences, 2 a run failed.

After a wanted change of numbers, set BEFORE_COMMIT to the commit that made it.
"""

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

BEFORE_COMMIT = "4f01eca07f9a0a762f5b04bd229528a138627361"  # the last commit before files of training/ moved
ROOT = Path(__file__).resolve().parents[2]

BRIDGE = {
    "vision": "towers/vision", "llm": "towers/llm", "queries": 8, "dtype": "float32",
    "qformer": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
                "cross_attention_frequency": 1, "norm_position": "pre", "initializer_range": 0.08},
}  # fmt: skip
STEPS = {"batch_size": 16, "log_every": 1, "learning_rate": 2e-3}
TRAIN = {**STEPS, "answers_per_image": 2, "generate_samples": 2, "max_new_tokens": 12}
JUDGE = {"limit": 16, "tokenizer": "python", "meteor": False, "report": False, "resamples": 50, "max_new_tokens": 24}
# Name of the run: command, positional arguments, settings. Names of settings are those of BEFORE_COMMIT.
RUNS = {
    "new": ("new", ["untrained"], BRIDGE),
    "new with MoE": ("new", ["untrained-moe"], {**BRIDGE, "projector": "moe"}),
    "embed": ("embed", ["untrained", "scenes", "cache"], {"near_duplicates": "keep", "workers": 0}),
    "align": (
        "align",
        ["untrained", "cache", "aligned"],
        {**STEPS, "tokenizer": "words", "max_steps": 20, "eval_every": 10, "embedding_width": 32},
    ),
    "train": (
        "train",
        ["aligned", "cache", "trained"],
        {**TRAIN, "max_steps": 20, "eval_every": 10, "keep_best": "CIDEr"},
    ),
    "train with LoRA": (
        "train",
        ["untrained", "cache", "trained-lora"],
        {**TRAIN, "max_steps": 10, "llm_tuning": "lora", "ema": 0.8, "micro_batches": 2},
    ),
    "train with MoE": (
        "train",
        ["untrained-moe", "cache", "trained-moe"],
        {**TRAIN, "max_steps": 10, "router_noise": 0.1},
    ),
    "train without shared prefix": (
        "train",
        ["untrained", "cache", "trained-padded"],
        {
            **TRAIN, "max_steps": 5, "shared_prefix": False, "word_dropout": 0.1, "feature_dropout": 0.1,
            "feature_noise": 0.1, "label_smoothing": 0.1,
        },
    ),
    "train with experiments": (
        "train",
        ["aligned", "cache", "trained-experiments"],
        {
            **TRAIN, "max_steps": 5, "words_weight": 0.5, "consensus_captions": 2,
        },
    ),
    "train online": (
        "train",
        ["untrained", "scenes", "trained-online"],
        {**TRAIN, "max_steps": 3, "online": True, "augment": True},
    ),
    "evaluate": ("evaluate", ["trained", "scenes", "evaluated"], {**JUDGE, "tasks": ["captioning", "vqa", "pope"]}),
    "evaluate retrieval": (
        "evaluate",
        ["aligned", "scenes", "retrieved"],
        {**JUDGE, "tasks": ["retrieval"], "rerank": 4},
    ),
}  # fmt: skip
# The one place where settings of the working tree differ: name of the run -> settings laid over those above; None takes
# a setting away. Enter a renamed setting here; empty it when BEFORE_COMMIT moves.
CHANGED_SETTINGS: dict[str, dict] = {
    "train with experiments": {
        **dict.fromkeys(("words_weight", "consensus_captions")),
        "experiments": {"bag_of_words": {"weight": 0.5}, "consensus": {"captions": 2}},
    },
}  # fmt: skip


def command_arguments(run: str, changed: dict[str, dict]) -> list[str]:
    """Arguments of the `blipren` command of a run."""
    command, positional, settings = RUNS[run]
    arguments = [command, *positional]
    for name, value in (settings | changed.get(run, {})).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            arguments += [f"--{flag}", *value]
        elif value is not None:
            arguments += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return arguments


def run_all(folder: Path, changed: dict[str, dict]) -> None:
    """Run every command with the package `folder/blipren`; the outputs lie in `folder/out` once all are done."""
    running = folder / "running"
    running.mkdir()
    environment = os.environ | {
        "PYTHONPATH": str(folder),  # comes before an editable install
        "HF_HOME": str(folder / "huggingface"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    commands = json.dumps([command_arguments(run, changed) for run in RUNS])
    script = Path(__file__).with_name("run_commands.py")
    with open(folder / "output.txt", "w+") as output:
        status = subprocess.run(
            [sys.executable, script, folder / "blipren", commands],
            cwd=running, env=environment, stdout=output, stderr=subprocess.STDOUT,
        ).returncode  # fmt: skip
        if status:
            output.seek(0)
            print("".join(output.readlines()[-30:]), file=sys.stderr)
            print(f"the runs with the code of {folder.name!r} failed, see above", file=sys.stderr)
            sys.exit(2)
    running.rename(folder / "out")


def has_commit(commit: str) -> bool:
    """Whether the history here holds a commit; a shallow clone lacks older ones."""
    command = ["git", "-C", ROOT, "cat-file", "-e", f"{commit}^{{commit}}"]
    return subprocess.run(command, capture_output=True).returncode == 0


def extract_commit(commit: str, folder: Path) -> None:
    """The files of a commit in `folder`."""
    archive = subprocess.run(["git", "-C", ROOT, "archive", commit], check=True, capture_output=True).stdout
    tarfile.open(fileobj=io.BytesIO(archive)).extractall(folder, filter="data")


# ---- what is compared ----------------------------------------------------------------------------------------------

NOT_NUMERICS = re.compile(r"(.*_)?seconds?|minutes|tflops|mfu|versions|settings")
SPLITS = ("train", "validation", "test")
JSON_FILES = ("metrics.json", "summary.json", "finished.json")
LINE_FILES = ("log.jsonl", "predictions.jsonl", "metadata.jsonl")


def tensor_digests(path: Path) -> dict[str, str]:
    """Type, shape and SHA-256 of each tensor of a safetensors file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8:start])
    tensors.pop("__metadata__", None)
    digests = {}
    for name, tensor in tensors.items():
        begin, end = (start + offset for offset in tensor["data_offsets"])
        digests[name] = f"{tensor['dtype']} {tensor['shape']} {hashlib.sha256(data[begin:end]).hexdigest()}"
    return digests


def column_digests(files: list[Path]) -> dict[str, str]:
    """SHA-256 of each column of a table that lies in several Arrow files: lengths of the lists, then the values."""
    import pyarrow as pa

    table = pa.concat_tables([pa.ipc.open_stream(file.read_bytes()).read_all() for file in files])
    digests = {}
    for name in table.column_names:
        digest, array = hashlib.sha256(), table[name].combine_chunks()
        while pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
            digest.update(repr([None if row is None else len(row) for row in array]).encode())
            array = array.flatten()
        numbers = pa.types.is_integer(array.type) or pa.types.is_floating(array.type)
        digest.update(array.to_numpy(False).tobytes() if numbers else repr(array.to_pylist()).encode())
        digests[name] = f"{table[name].type} {digest.hexdigest()}"
    return digests


def leaves(value: object, name: str) -> Iterator[tuple[str, object]]:
    """Names and values of the numbers and texts in JSON, without times, speeds, versions and settings."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not NOT_NUMERICS.fullmatch(key):
                yield from leaves(item, f"{name} {key}".strip())
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from leaves(item, f"{name}[{number}]")
    else:
        yield name, value


def line_values(path: Path) -> dict[str, object]:
    """All values of a file of JSON lines. A line is named by its kind and step or its id; repeats are numbered."""
    seen: dict[str, int] = defaultdict(int)
    values = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        label = " ".join(str(row[key]) for key in ("kind", "step", "id", "file_name") if key in row)
        seen[label] += 1
        values.update(leaves(row, f"{label} #{seen[label]}:"))
    return values


def read_values(folder: Path) -> dict[str, dict[str, object]]:
    """Everything that is compared: name of the file in `folder` -> name of the value -> value."""
    values: dict[str, dict[str, object]] = {}
    tables: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if "checkpoints" in place.parts:  # states to go on from; the run's model lies beside them
            continue
        if path.suffix == ".safetensors":
            values[str(place)] = tensor_digests(path)
        elif path.name in LINE_FILES:
            values[str(place)] = line_values(path)
        elif path.name in JSON_FILES:
            found = leaves(json.loads(path.read_text(encoding="utf-8")), "")
            values[str(place)] = {name: value for name, value in found if isinstance(value, int | float)}
        elif path.suffix == ".arrow" and path.parent.name in SPLITS:
            # token ids lie in a folder that is named by a hash
            tables[re.sub(r"\b[0-9a-f]{16}\b", "*", str(place.parent))].append(path)
    return values | {f"{name}/*.arrow": column_digests(files) for name, files in tables.items()}


def differences(before: dict[str, object], now: dict[str, object], new_allowed: bool) -> list[str]:
    """One text for each name whose values are not the same bits, or that only one side has."""
    found = []
    for name, value in before.items():
        if name not in now:
            found.append(f"{name}: before {value!r}, now missing")
        elif repr(value) != repr(now[name]):  # repr tells 0.0 from -0.0, and a NaN equals a NaN
            found.append(f"{name}: before {value!r}, now {now[name]!r}")
    if not new_allowed:
        found += [f"{name}: before missing, now {value!r}" for name, value in now.items() if name not in before]
    return found


def compare_folders(before: Path, now: Path) -> int:
    """Print one line for each file compared; returns the number of files that differ."""
    old, new = read_values(before), read_values(now)
    if not old:
        print(f"{before} holds nothing to compare", file=sys.stderr)
        sys.exit(2)
    differing = 0
    for name, values in old.items():
        found = differences(values, new.get(name, {}), new_allowed=not name.endswith(".safetensors"))
        added = len(new.get(name, {}).keys() - values.keys())
        if found:
            differing += 1
            print(f"DIFFERENT  {name}: {len(found)} of {len(values)} values, first {found[0]}")
        else:
            print(f"same       {name}: {len(values)} values" + (f", {added} new" if added else ""))
    for name in new.keys() - old.keys():
        print(f"new        {name}")
    print(f"{len(old)} files compared, {differing} differ" if differing else f"{len(old)} files compared, all equal")
    return differing


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all equal, 1 differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", nargs="?", default=BEFORE_COMMIT, metavar="BEFORE_COMMIT")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="folder in which the outputs stay")
    parser.add_argument("--quickstart", type=Path, nargs=2, metavar=("BEFORE_OUT", "NOW_OUT"))
    given = parser.parse_args(arguments)
    if given.quickstart:
        return int(compare_folders(*given.quickstart) > 0)
    if not has_commit(given.before):
        parser.error(f"commit {given.before} is not in the git history of {ROOT}: fetch it (git fetch --unshallow)")
    with tempfile.TemporaryDirectory() as temporary:
        parent = given.keep.resolve() if given.keep else Path(temporary)
        before, now = parent / given.before, parent / "now"
        if not (before / "out").is_dir():
            shutil.rmtree(before, ignore_errors=True)
            extract_commit(given.before, before / "blipren")
            run_all(before, {})
        shutil.rmtree(now, ignore_errors=True)
        now.mkdir(parents=True)
        (now / "blipren").symlink_to(ROOT)
        run_all(now, CHANGED_SETTINGS)
        return int(compare_folders(before / "out", now / "out") > 0)


if __name__ == "__main__":
    sys.exit(main())
