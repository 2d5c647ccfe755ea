"""Check, on request, that `blipren caption --engine vllm` gives the captions of the local engine, with --ray also in Ray actors.

    python tests/with_vllm/prove_captions.py --environment DIR [--ray] [--checkpoint DIR] [--dataset DIR] [--limit N]

DIR is an environment with vLLM's CPU build (tests/with_vllm/prove.py makes one) and our package with what it needs. Without a
checkpoint a tiny random one captions drawn scenes. All engines compute in float32 and greedily. Exit status 0 only if all
captions, their lengths and ends are equal; log-probabilities may differ by 0.001.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets

sys.path.insert(0, str(Path(__file__).resolve().parent))
from prove import environment, make_checkpoint  # noqa: E402

from blipren.training.quickstart.scenes import Scene, Split, draw_scene, iterate_rows  # noqa: E402

PROMPTS = ["Short caption:", "What is in the picture?"]


def draw(folder: Path, count: int) -> Path:
    """Write drawn scenes as a folder of pictures with metadata."""
    folder.mkdir()
    lines = []
    for number, row in enumerate(iterate_rows(0, (Split("train", "seen", count),))):
        draw_scene(Scene.from_json(row["scene"])).save(folder / f"{number:03}.png")
        lines.append(json.dumps({"file_name": f"{number:03}.png", "captions": row["captions"]}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def processor_seconds() -> float:
    """Return the processor time of all ended children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def caption(python: Path, arguments: list[str], engine: list[str], out: Path) -> tuple[list[dict], float]:
    """Return the rows of a captioned data set and the processor seconds that it took, the start included."""
    began = processor_seconds()
    command = [python, "-m", "blipren.training.cli", "caption", *arguments, "--engine", *engine, "--out", out]
    subprocess.run(list(map(str, command)), env=environment(), check=True)
    seconds = processor_seconds() - began
    return list(datasets.load_dataset(str(out), split="train", cache_dir=str(out.parent / "library"))), seconds


def differences(local: list[dict], other: list[dict]) -> int:
    """Print and count the values that differ from those of the local engine."""
    wrong = 0
    for ours, theirs in zip(local, other, strict=True):
        for name, value in ours.items():
            if name.endswith("_mean_logprob"):
                same = abs(value - theirs[name]) < 1e-3
            else:
                same = not name.startswith("caption_") or value == theirs[name]
            if not same:
                wrong += 1
                print(f"{ours['file_name']} {name}: local {value!r}, vLLM {theirs[name]!r}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, required=True)
    parser.add_argument("--ray", action="store_true", help="also with vLLM inside of Ray actors")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=12)
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint = given.checkpoint or make_checkpoint(folder, 384)
        dataset = given.dataset or draw(folder / "scenes", given.limit)
        arguments = [checkpoint, dataset, "--device", "cpu", "--precision", "float32", "--limit", given.limit]
        arguments += ["--max-new-tokens", given.max_new_tokens, "--workers", 0, "--prompts", *given.prompts]
        local, seconds = caption(Path(sys.executable), arguments, ["local"], folder / "local")
        texts = {row["caption_0"] for row in local}
        print(
            f"local: {len(local)} pictures, {len(texts)} different captions, {seconds:.1f} processor seconds with its start"
        )
        if len(texts) < 2:
            raise ValueError("the model gives one caption for all pictures, so equal captions prove nothing")
        python, wrong = given.environment / "bin" / "python", 0
        shards = ["--actor-engine", "vllm", "--actors", "1", "--rows-per-shard", str(-(-given.limit // 2))]
        for engine in [["vllm"], ["ray", *shards]][: 2 if given.ray else 1]:
            rows, seconds = caption(python, arguments, engine, folder / engine[0])
            found = differences(local, rows)
            print(
                f"{' '.join(engine)}: {len(rows)} pictures, {found} differences, {seconds:.1f} processor seconds with its start"
            )
            wrong += found
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
