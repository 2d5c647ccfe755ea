"""Time until the validation CIDEr at which a notebook's loop ends: `blipren train`, and a memory.

    python benchmarks/time_to_quality.py DATASET --vision ENCODER --llm LLM --recipe flickr8k-mini --out quality.json
    python benchmarks/time_to_quality.py scenes                 # draws scenes and takes the quickstart's towers and recipe

All ways start from the same untrained checkpoint with a frozen language model. The notebook's loop is arm (a) of train.py: every
step decodes and encodes its photos again, has one row per caption, padded to 64 tokens, and computes all logits; AdamW with a
half cosine. Only its first steps are made so and timed. The others read the cache and pad to the longest row, which learns the
same in less time; they count as much as the timed ones.

The other ways embed the data set once, without views, and take the first `--steps` of the recipe's `train` section, each as a
run of its own whose learning rate falls to its end; `--train` changes settings. Step 0 is the untrained checkpoint. Each is
measured alone, with a reranker where `--reranker-steps` are given, and with a memory, whose making counts. With `--max-copies`
below 1 its copy penalty is chosen on the same validation images, which counts too. CIDEr is that of beam search with three beams
and no length penalty, on all validation images, for all ways; measuring it is not part of the times.
Times are processor time: run it with one thread (`--threads 1`) on a shared machine.
"""

import argparse
import json
import math
import random
import tempfile
import time
from pathlib import Path

import torch
import yaml
from parts.notebook_rows import padded_with_labels
from torch import nn

from blipren.training.cli import build_settings
from blipren.training.commands.embed import EmbedSettings
from blipren.training.commands.embed import run as embed
from blipren.training.commands.new import run as new
from blipren.training.data.batches.blocks import PromptEncoder, Segment, build_blocks
from blipren.training.data.batches.training_data import open_caches, read_caches, read_images
from blipren.training.engine.loading import load_checkpoint
from blipren.training.engine.memory import keep_freed_memory
from blipren.training.evaluation.features import PatchFeatures
from blipren.training.evaluation.generation import generate_answers
from blipren.training.evaluation.metrics.captions import score_captions
from blipren.training.evaluation.metrics.tokenizer import tokenize
from blipren.training.memory.build import make_memory
from blipren.training.quickstart.scenes import Split, write_scenes
from blipren.training.quickstart.steps import TOWERS
from blipren.training.reranker.fit import make_reranker
from blipren.training.stages.train import train

CAPTION_LENGTH = 64
GENERATION = {"max_new_tokens": 40, "num_beams": 3, "length_penalty": 0.0}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a data set with a train and a validation split, or `scenes`")
    parser.add_argument("--vision", help="not for scenes")
    parser.add_argument("--llm", help="not for scenes")
    parser.add_argument("--scenes", type=int, default=1000, help="scenes to train on")
    parser.add_argument("--validation-scenes", type=int, default=200, help="half of them with unseen combinations")
    parser.add_argument("--recipe", default="flickr8k-mini", help="whose sections new, embed and train are taken")
    parser.add_argument("--notebook-epochs", type=int, default=2)
    parser.add_argument("--notebook-pairs", type=int, default=40, help="pairs of a step of the notebook way")
    parser.add_argument("--timed-steps", type=int, default=12, help="its steps that are made in full")
    parser.add_argument("--notebook-learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 60, 120, 200], help="of ours")
    parser.add_argument(
        "--train",
        type=yaml.safe_load,
        default={},
        help="settings of ours over the recipe's, as YAML: '{optimizer: muon}'",
    )
    parser.add_argument("--reranker-steps", type=int, default=0, help="of `blipren reranker`; 0 measures none")
    parser.add_argument(
        "--max-copies",
        type=float,
        default=1.0,
        help="share of captions that may be copies; 1 keeps the default penalty",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("time_to_quality.json"))
    return parser.parse_args()


def quality(model, processor, source, copied: set[str] | None = None) -> dict:
    """Return CIDEr on the validation images, the share of copies, and processor seconds a caption."""
    model.eval()
    references = {str(image): texts for image, texts in source.references().items()}
    began = time.process_time()
    captions: dict[str, str] = {}
    for start in range(0, len(source.texts), 50):
        images = range(start, min(start + 50, len(source.texts)))
        inputs = source.inputs(list(images), None)
        features = PatchFeatures(inputs["patch_features"], inputs.get("patch_attention_mask"))
        made = generate_answers(model, processor, features, **GENERATION)
        captions |= {str(image): answer["text"] for image, answer in zip(images, made)}
    seconds = (time.process_time() - began) / len(captions)
    cider = score_captions(captions, references, tokenizer="python", meteor=False).corpus["CIDEr"]
    found = {"cider": cider, "seconds_a_caption": seconds}
    if copied is not None:
        found["copies"] = sum(text in copied for text in tokenize(list(captions.values()), "python")) / len(captions)
    return found


class Notebook:
    """A notebook's training loop on the files of the data set."""

    def __init__(self, options: argparse.Namespace, source: EmbedSettings, model, processor, text, validation):
        self.options, self.model, self.processor = options, model, processor
        self.text, self.validation = text, validation  # the same tokens as ours
        by_id = {p.row.id: p for p in read_images(options.dataset, processor, source)["train"]}
        self.images = [by_id[id] for id in self.text.ids]
        prompts, self.rows = PromptEncoder(processor), []
        for image in range(len(text.texts)):
            for block in build_blocks((0, image), text.texts.answers(image), text.visual_tokens(image), prompts):
                pairs = map(Segment.last_answer, block.segments)
                self.rows += [(image, block.prefix + rest, answer) for rest, answer in pairs]

    def inputs(self, rows: list, timed: bool) -> dict[str, torch.Tensor]:
        """Return a batch: pixels and rows of one length, or cached features and rows as long as the longest."""
        images = [image for image, _, _ in rows]
        length, pad = max(len(p) + len(a) for _, p, a in rows), self.processor.tokenizer.pad_token_id
        if not timed:
            return {**padded_with_labels(rows, length, pad), **self.text.inputs(images, None)}
        pictures = [self.images[image].row.load() for image in images]
        pixels = self.processor.image_processor(images=pictures, return_tensors="pt")
        return {**padded_with_labels(rows, len(rows[0][1]) + CAPTION_LENGTH, pad), **pixels}

    def train(self) -> dict:
        """Train. Returns steps, processor seconds of a full step and of all of them, and the quality at the end."""
        options, model = self.options, self.model
        model.freeze()
        trained = [p for p in model.parameters() if p.requires_grad]
        rate = options.notebook_learning_rate
        optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
        per_step = options.notebook_pairs
        steps = options.notebook_epochs * (len(self.rows) // per_step)
        full_steps: list[float] = []
        for step in range(steps):
            place = step * per_step % (len(self.rows) // per_step * per_step)
            if place == 0:
                random.Random(options.seed * 1000 + step).shuffle(self.rows)
            model.train()
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 30) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            began = time.process_time()
            batch = self.inputs(self.rows[place : place + per_step], step < options.timed_steps)
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step < options.timed_steps:
                full_steps.append(time.process_time() - began)
            if (step + 1) % 50 == 0:
                print(f"notebook step {step + 1}/{steps} loss {loss.item():.4f}", flush=True)
        a_step = sorted(full_steps)[len(full_steps) // 2]
        found = quality(model, self.processor, self.validation)
        return {"steps": steps, "seconds_a_step": a_step, "seconds": a_step * steps, **found}


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        report = run(options, Path(folder))
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def timed(function, *args) -> float:
    """Return the processor seconds of a call."""
    began = time.process_time()
    function(*args)
    return time.process_time() - began


def draw(options: argparse.Namespace, folder: Path) -> None:
    """Draw the scenes if they are the data set, and set their towers and recipe."""
    if options.dataset != "scenes":
        return
    half = options.validation_scenes // 2
    splits = (Split("train", "seen", options.scenes), Split("validation", "seen", half))
    write_scenes(folder / "scenes", options.seed, (*splits, Split("validation", "unseen", half)))
    options.dataset, options.recipe = str(folder / "scenes"), "quickstart"
    options.vision, options.llm = str(TOWERS / "vision"), str(TOWERS / "llm")


def run(options: argparse.Namespace, folder: Path) -> dict:
    draw(options, folder)
    untrained, cache = str(folder / "untrained"), str(folder / "cache")
    torch.manual_seed(options.seed)
    new(build_settings("new", {"out": untrained, "vision": options.vision, "llm": options.llm}, options.recipe))
    given = {"model": untrained, "dataset": options.dataset, "cache": cache, "views": 1}
    source: EmbedSettings = build_settings("embed", given, options.recipe)
    report: dict = {"embedding_seconds": timed(embed, source), "ours": []}
    model, processor = load_checkpoint(untrained)
    (text,), (validation,) = open_caches(read_caches(cache), model, processor)
    report["notebook"] = Notebook(options, source, model, processor, text, validation).train()
    print("notebook", report["notebook"], flush=True)
    copied = set(tokenize([caption for own in text.references().values() for caption in own], "python"))
    for steps in options.steps:
        report["ours"] += ours(options, steps, folder, validation, copied)
    for name in ("alone", "reranker", "memory"):
        made = [way for way in report["ours"] if way["with"] == name and way["seconds"]]  # not what is untrained
        enough = [way for way in made if way["cider"] >= report["notebook"]["cider"]]
        if enough:
            best = min(enough, key=lambda way: way["seconds"])
            report[name] = {
                "way": best,
                "ratio_on_a_cache": report["notebook"]["seconds"] / best["seconds"],
                "ratio": report["notebook"]["seconds"] / (best["seconds"] + report["embedding_seconds"]),
            }
    return report


def ours(options: argparse.Namespace, steps: int, folder: Path, validation, copied: set[str]) -> list[dict]:
    """Return what so many steps take and bring alone, with a reranker and with a memory."""
    checkpoint, memory, seconds = str(folder / "untrained"), str(folder / f"memory-{steps}"), 0.0
    if steps:
        given = {
            "model": checkpoint, "cache": str(folder / "cache"), "out": str(folder / f"run-{steps}"), "max_steps": steps,
            "eval_every": steps, "keep_best": "last", "generate_samples": 0, "seed": options.seed, "device": "cpu",
            **options.train,
        }  # fmt: skip
        seconds = timed(train, build_settings("train", given, options.recipe))
        checkpoint = given["out"]
    on_cache = {"model": checkpoint, "cache": str(folder / "cache"), "device": "cpu"}
    given = {**on_cache, "out": memory, "max_copies": options.max_copies, **GENERATION}
    memory_seconds = timed(make_memory, build_settings("memory", given, options.recipe))
    model, processor = load_checkpoint(checkpoint)
    ways = [{"steps": steps, "with": "alone", "seconds": seconds, **quality(model, processor, validation, copied)}]
    if options.reranker_steps:
        given = {**on_cache, "out": f"{memory}-reranker", "max_steps": options.reranker_steps, "seed": options.seed}
        reranker_seconds = timed(make_reranker, build_settings("reranker", given, None))
        model.load_reranker(given["out"])
        found = quality(model, processor, validation, copied)
        ways.append({"steps": steps, "with": "reranker", "seconds": seconds + reranker_seconds, **found})
        model.load_reranker(None)
    model.load_memory(memory)
    found = quality(model, processor, validation, copied)
    ways.append({"steps": steps, "with": "memory", "seconds": seconds + memory_seconds, **found})
    print("ours", ways, flush=True)
    return ways


if __name__ == "__main__":
    main()
