"""Recall of stage 1 among 500 held-out drawn scenes whose captions are all different.

    python benchmarks/scenes_retrieval.py --out scenes-retrieval.json

Draws the quickstart's training scenes and 500 others. Each of the 500 has one caption that names every size, colour, shape
and place; a scene whose caption was drawn before is skipped. Then the script runs `new`, `embed`, `align` and
`evaluate --tasks retrieval` with the quickstart's vision tower. Half of the held-out scenes have combinations of colour and
shape, or of objects, on which neither the tower nor the Q-Former was trained.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from blipren.training.quickstart.scenes import Split, draw_scene, make_scene, write_scenes
from blipren.training.quickstart.steps import TOWERS, run_step
from blipren.training.quickstart.text_tokenizer import write_tokenizer
from blipren.training.quickstart.wording import full_caption

TRAINING = (Split("train", "seen", 6000), Split("validation", "seen", 200))


def add_held_out(folder: Path, seed: int, count: int) -> None:
    """Append `count` test rows with different captions to the folder's metadata, half of them of the group "unseen"."""
    rows, captions, index = [], set(), 10**6
    while len(rows) < count:
        group = ("seen", "unseen")[len(rows) % 2]
        scene = make_scene(seed, index, group)
        index += 1
        caption = full_caption(scene)
        if caption is None or caption in captions:
            continue
        captions.add(caption)
        name = f"images/held-out-{len(rows):06d}.png"
        draw_scene(scene).save(folder / name, compress_level=1)
        rows.append(
            {"file_name": name, "captions": [caption], "split": "test", "group": group, "scene": scene.to_json()}
        )
    with (folder / "metadata.jsonl").open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"questions": [], "answers": [], **row}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--itg-weight", type=float, default=0.0, help="generation beside contrast")
    parser.add_argument("--pooling", default="max", choices=("max", "mean"))
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--work", type=Path, help="folder that keeps everything; a temporary one by default")
    parser.add_argument("--out", type=Path, default=Path("scenes-retrieval.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run(options, options.work or Path(scratch))


def run(options: argparse.Namespace, work: Path) -> None:
    scenes, cache = work / "scenes", work / "cache"
    if not cache.exists():
        write_scenes(scenes, options.seed, TRAINING)
        add_held_out(scenes, options.seed, 500)
        run_step("new", out=work / "model", vision=TOWERS / "vision", llm=TOWERS / "llm", seed=options.seed)
        run_step("embed", model=work / "model", dataset=scenes, cache=cache)
    started = time.perf_counter()
    run_step(
        "align",
        model=work / "model",
        cache=cache,
        out=work / "aligned",
        tokenizer=write_tokenizer(work / "words"),
        itg_weight=options.itg_weight,
        pooling=options.pooling,
        batch_size=options.batch_size,
        max_steps=options.steps,
        eval_every=options.steps // 2,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    seconds = time.perf_counter() - started
    run_step(
        "evaluate", model=work / "aligned", dataset=scenes, out=work / "results", tasks=["retrieval"], report=False
    )
    metrics = json.loads((work / "results" / "metrics.json").read_text(encoding="utf-8"))
    result = {"align_seconds": seconds, **metrics["retrieval"]}
    del result["ids"]
    text = json.dumps(result, indent=2)
    options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
