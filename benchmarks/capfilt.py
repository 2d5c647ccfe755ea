"""CapFilt on drawn scenes: does it help to train on filtered captions of the model's own?

    python benchmarks/capfilt.py --out capfilt.json

Few scenes have captions, many have none. A captioner is trained on the few, behind stage 1 with a matching head. It captions
the many; the matching head chooses among sampled candidates and refuses those that do not fit. Then captioners are trained
from the same stage 1 with equal steps, and all are evaluated on 500 held-out scenes:

- labels: the few alone.
- unfiltered: the few, and one greedy caption for each of the many.
- filtered: the few, and the chosen and filtered captions of the many (the recipe `capfilt`).
- truth: the few, and true captions of the many, as the bound.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import datasets

from blipren.training.quickstart.scenes import Scene, Split, write_scenes
from blipren.training.quickstart.steps import TOWERS, run_step
from blipren.training.quickstart.text_tokenizer import write_tokenizer
from blipren.training.quickstart.truth import judge_caption

HELD_OUT = (Split("validation", "seen", 200), Split("test", "seen", 250), Split("test", "unseen", 250))
SMALL = {"probe": False, "report": False, "meteor": False, "resamples": 100}


def write_data(folder: Path, seed: int, few: int, many: int) -> None:
    """Write the scenes: `few` with captions and the held-out ones, `many` with and without captions."""
    write_scenes(folder / "few", seed, (Split("train", "seen", few), *HELD_OUT))
    write_scenes(folder / "truth", seed + 1000, (Split("train", "seen", many),))
    for name, removed in (("few", ()), ("truth", ()), ("many", ("captions",))):
        source = folder / ("truth" if name == "many" else name)
        rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
        if name == "many":
            shutil.copytree(source / "images", folder / name / "images", copy_function=os.link)
        removed = {"questions", "answers", *removed}
        lines = [json.dumps({key: value for key, value in row.items() if key not in removed}) + "\n" for row in rows]
        (folder / name / "metadata.jsonl").write_text("".join(lines))


def share_true(captioned: Path) -> tuple[int, float]:
    """Return the number of captions of a captioned data set, and the share of true ones."""
    rows = datasets.load_dataset(str(captioned), split="train", cache_dir=str(captioned.parent / "library"))
    rows = rows.select_columns(["caption", "scene"])
    true = [judge_caption(row["caption"], Scene.from_json(row["scene"])).true for row in rows]
    return len(true), sum(true) / len(true)


def run(given: argparse.Namespace, work: Path) -> dict:
    write_data(work, given.seed, given.few, given.many)
    model, aligned = work / "model", work / "aligned"
    run_step("new", out=model, vision=TOWERS / "vision", llm=TOWERS / "llm", seed=given.seed)
    for name in ("few", "truth"):
        run_step("embed", model=model, dataset=work / name, cache=work / f"{name}-cache")
    losses = {"itm_weight": 1.0, "max_steps": given.align_steps, "eval_every": given.align_steps}
    words = write_tokenizer(work / "words")
    run_step("align", model=model, cache=work / "few-cache", out=aligned, tokenizer=words, seed=given.seed, **losses)

    result: dict = {"few": given.few, "many": given.many, "seed": given.seed, "arms": {}, "captions": {}}
    few = f"{work / 'few-cache'}"
    greedy = {"matching_model": str(aligned), "batch_size": 64}
    sampled = greedy | {"temperature": 0.7, "top_p": 0.9, "candidates": given.candidates, "seed": given.seed}
    sampled["filter"] = {"min_matching_score": given.threshold, "ended": True, "max_repetition": 0.7}
    for arm in ("labels", "unfiltered", "filtered", "truth"):
        cache, began = few, time.process_time()
        if arm == "truth":
            cache = f"{few}=1,{work / 'truth-cache'}=1"
        elif arm != "labels":
            own, options = work / f"{arm}-captions", greedy if arm == "unfiltered" else sampled
            run_step("caption", model=work / "labels-run", images=[str(work / "many")], out=str(own), **options)
            result["captions"][arm] = dict(zip(("captions", "true"), share_true(own)))
            columns = ["caption"]
            run_step("embed", model=model, dataset=own, cache=work / f"{arm}-cache", caption_columns=columns)
            cache = f"{few}=1,{work / f'{arm}-cache'}=1"
        steps = {"max_steps": given.steps, "eval_every": given.steps, "seed": given.seed}
        run_step("train", model=aligned, cache=cache, out=work / f"{arm}-run", **steps)
        out = work / f"{arm}-results"
        run_step("evaluate", model=work / f"{arm}-run", dataset=work / "few", out=out, tasks=["captioning"], **SMALL)
        metrics = json.loads((out / "metrics.json").read_text())
        truth = metrics["hallucination"]
        result["arms"][arm] = {
            "captions_true_seen": truth["seen"]["captions_true"],
            "captions_true_unseen": truth["unseen"]["captions_true"],
            "hallucinated_objects": truth["hallucinated_objects"],
            "CIDEr": metrics["captioning"]["CIDEr"],
            "processor_seconds": time.process_time() - began,
        }
        print(json.dumps(result["arms"][arm]), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--few", type=int, default=600)
    parser.add_argument("--many", type=int, default=2000)
    parser.add_argument("--align-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--candidates", type=int, default=3)
    parser.add_argument("--threshold", type=float, default=0.5, help="of the matching score")
    parser.add_argument("--out", type=Path, default=Path("capfilt.json"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = run(given, Path(scratch))
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
