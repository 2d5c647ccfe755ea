"""CapFilt on photos: does it help to train on captions of the model's own, those that fit their photos best?

    python benchmarks/capfilt_photos.py flickr8k-mini --vision ENCODER --llm LLM --tokenizer BERT --out capfilt.json

Some training photos have captions, the others have none. A captioner is trained on the former, behind the run
`flickr8k-mini-words` on them, and captions the others (three beams). Stage 1's contrast, trained on the former too, compares each of
these captions with its photo. Then captioners are trained from the same start with equal steps, on people's captions as they are,
and evaluated on the validation photos:

- labels: the photos with captions alone.
- unfiltered: and own captions of all others.
- filtered: and own captions of the half of the others whose similarity is higher.
- truth: and people's captions of all others, as the bound.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

from blipren import BliprenForImageTextRetrieval
from blipren.training.data.cache import FeatureCache
from blipren.training.engine.loading import load_checkpoint
from blipren.training.evaluation.metrics.captions import score_captions
from blipren.training.evaluation.metrics.retrieval import embed_images, embed_texts
from blipren.training.quickstart.steps import run_step

ARMS = ("labels", "unfiltered", "filtered", "truth")
SEARCH = {"num_beams": 3, "length_penalty": 0.0, "batch_size": 64}
CONTRAST = {"precision": "fp32", "learning_rate": 1e-3}


def read_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def write_photos(rows: list[dict], source: Path, folder: Path) -> None:
    """Write rows and their photos as a data set."""
    for row in rows:
        (folder / row["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / row["file_name"], folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def split_photos(source: Path, work: Path, seed: int, few: int) -> None:
    """Write `few` (photos with captions, and those for validation), and the others with captions (`truth`) and without (`many`)."""
    rows = read_rows(source)
    train = [row for row in rows if row["split"] == "train"]
    random.Random(seed).shuffle(train)
    write_photos(train[:few] + [row for row in rows if row["split"] == "validation"], source, work / "few")
    write_photos(train[few:], source, work / "truth")
    without = [{name: value for name, value in row.items() if name != "captions"} for row in train[few:]]
    write_photos(without, source, work / "many")


def compare(cache: FeatureCache, aligned: Path) -> list[float]:
    """Return the similarity of each photo and its caption by the contrast of stage 1."""
    model, processor = load_checkpoint(str(aligned), BliprenForImageTextRetrieval)
    rows = cache.split("train")
    images = embed_images(model.eval(), partial(cache.patch_features, "train"), len(rows))
    longest = model.config.qformer_config.max_position_embeddings
    captions = [answers[0] for answers in rows["answers"]]
    texts = embed_texts(model, processor.qformer_tokenizer, captions, max_length=longest)
    return model.similarity(images, texts).diagonal().tolist()


def judge(captions: dict[str, str], truth: Path) -> dict:
    """Return how many captions these are, and their CIDEr against people's."""
    people = {row["file_name"]: row["captions"] for row in read_rows(truth)}
    references = {name: people[name] for name in captions}
    scores = score_captions(captions, references, tokenizer="python", meteor=False)
    return {"captions": len(captions), "CIDEr": scores.corpus["CIDEr"]}


def run(given: argparse.Namespace, work: Path) -> dict:
    model, words, aligned, few = work / "model", work / "words", work / "aligned", work / "few-cache"
    step = partial(run_step, recipe="flickr8k-mini")
    split_photos(given.dataset, work, given.seed, given.few)
    step("new", out=model, vision=given.vision, llm=given.llm, seed=given.seed)
    for name in ("few", "truth"):
        step("embed", model=model, dataset=work / name, cache=work / f"{name}-cache", views=1)
    step("train", recipe="flickr8k-mini-words", model=model, cache=few, out=words, eval_every=1000, seed=given.seed)
    length = {"max_steps": given.align_steps, "eval_every": given.align_steps, "seed": given.seed}
    length |= {"tokenizer": given.tokenizer, **CONTRAST}
    step("align", recipe="align-flickr8k-mini", model=model, cache=few, out=aligned, **length)

    result: dict = {"few": given.few, "seed": given.seed, "arms": {}, "own captions": {}}
    length = {"max_steps": given.steps, "eval_every": given.steps, "seed": given.seed}
    for arm in ARMS:
        cache, began = str(few), time.process_time()
        if arm != "labels":
            cache += f"=1,{work / arm}-cache=1"
        if arm == "unfiltered":
            own = work / "own"
            step("caption", model=work / "labels-run", images=[str(work / "many")], out=own, **SEARCH)
            columns = {"caption_columns": ["caption"], "views": 1}
            step("embed", model=model, dataset=own, cache=work / "unfiltered-cache", **columns)
            embedded = FeatureCache.open(work / "unfiltered-cache")
            rows, similarities = embedded.split("train"), compare(embedded, aligned)
            captions = {name: answers[0] for name, answers in zip(rows["id"], rows["answers"])}
            order = sorted(zip(similarities, captions), reverse=True)
            better = [name for _, name in order[: len(order) // 2]]
            others = {name: caption for name, caption in captions.items() if name not in set(better)}
            result["own captions"]["all"] = judge(captions, work / "truth")
            result["own captions"]["lower half"] = judge(others, work / "truth")
        if arm == "filtered":
            captions = {name: captions[name] for name in better}
            result["own captions"]["higher half"] = judge(captions, work / "truth")
            kept = [{"file_name": name, "captions": [caption]} for name, caption in captions.items()]
            write_photos([row | {"split": "train"} for row in kept], work / "many", work / "better")
            step("embed", model=model, dataset=work / "better", cache=work / "filtered-cache", views=1)
        step("train", model=words, cache=cache, out=work / f"{arm}-run", experiments={}, **length)
        out = work / f"{arm}-results"
        small = {"tasks": ["captioning"], "probe": False, "report": False, "meteor": False, "resamples": 1000}
        step("evaluate", model=work / f"{arm}-run", dataset=work / "few", out=out, split="validation", **small)
        metrics = json.loads((out / "metrics.json").read_text())
        figures = {"CIDEr": metrics["captioning"]["CIDEr"], "CHAIR_i": metrics["hallucination"]["CHAIR_i"]}
        result["arms"][arm] = figures | {"processor_seconds": time.process_time() - began}
        print(json.dumps(result["arms"][arm]), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="folder with metadata.jsonl and splits")
    parser.add_argument("--vision", required=True)
    parser.add_argument("--llm", required=True)
    parser.add_argument("--tokenizer", required=True, help="WordPiece tokenizer of stage 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--few", type=int, default=600, help="photos with captions")
    parser.add_argument("--align-steps", type=int, default=140)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("capfilt_photos.json"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = run(given, Path(scratch))
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
