"""One restartable pass over the photos of a split: each is decoded and encoded once for all that is asked about it.

The pass goes in chunks of images. A chunk's answers are appended to `partial.jsonl` together, so that a killed run goes
on behind the last whole chunk, with the same results as one never killed. "Another image" is another one of the chunk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from blipren.training.data.sources.images import ImageError
from blipren.training.evaluation.captioning import Features, encode_photos, generate_captions
from blipren.training.evaluation.examples import Example, Split
from blipren.training.evaluation.image_use import answer_losses, other_images
from blipren.training.evaluation.metrics.pope import PopeQuestion, ask_pope


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """What is asked about every image; part of the fingerprint that a resumed pass must share.

    Attributes:
        captions, questions: generate captions, answer the data set's questions. probe: losses with other images.
        prompt: caption prompt, None for the model's own. generation: settings of `generate`.
        chunk: images of one chunk; another image is another one of it.
    """

    captions: bool = True
    questions: bool = False
    probe: bool = True
    prompt: str | None = None
    generation: dict = dataclasses.field(default_factory=dict)
    batch_size: int = 32
    chunk: int = 128
    seed: int = 0

    def fingerprint(self, model_fingerprint: str, split: Split) -> str:
        ids = [example.id for example in split.examples]
        parts = [dataclasses.asdict(self), model_fingerprint, split.fingerprint, split.name, ids]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def chunks(count: int, size: int) -> list[range]:
    """Chunks of a split; a last one of a single image joins the one before, or it would have no other image."""
    starts = list(range(0, count, size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return [range(start, end) for start, end in zip(starts, [*starts[1:], count])]


def read_partial(path: Path, fingerprint: str) -> dict[str, dict]:
    """Finished records by id; empty where the file is another run's. A line cut short by a kill is left out."""
    if not path.exists():
        return {}
    records = {}
    with path.open(encoding="utf-8") as file:
        try:
            if json.loads(file.readline()).get("fingerprint") != fingerprint:
                return {}
        except ValueError:
            return {}
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                break
            records[record["id"]] = record
    return records


def _load(examples: Sequence[Example]) -> tuple[list[Example], list[Image.Image], list[dict]]:
    """Examples whose photo could be read, the photos, and records of the others."""
    good, photos, rejected = [], [], []
    for example in examples:
        try:
            photos.append(example.load())
            good.append(example)
        except ImageError as error:
            rejected.append({"id": example.id, "rejected": [error.reason, error.detail]})
    return good, photos, rejected


def probe_pair(example: Example, plan: SweepPlan) -> tuple[str | None, str] | None:
    """The text whose loss is taken with each image: the first reference caption, else the first question's answer."""
    if example.references and plan.captions:
        return plan.prompt, example.references[0]
    if example.questions and plan.questions:
        question, answers = next(iter(example.questions.items()))
        return question, answers[0]
    return None


@torch.no_grad()
def _sweep_chunk(model, processor, examples: list[Example], plan: SweepPlan, black: Features | None) -> list[dict]:
    good, photos, records = _load(examples)
    if not good:
        return records
    features = encode_photos(model, processor, photos, plan.batch_size)
    own = [{"id": example.id} for example in good]
    others = other_images(len(good), plan.seed)
    for record, other in zip(own, others):
        record["other"] = good[other].id
    if model.config.projector == "moe":
        routed = model.get_image_features(**features.model_inputs(model.device)).router_probs
        for record, probabilities in zip(own, routed.float().cpu().tolist()):
            record["router"] = [round(p, 5) for p in probabilities]

    if plan.captions:
        captions = generate_captions(model, processor, features, plan.prompt, plan.batch_size, **plan.generation)
        for record, caption in zip(own, captions):
            record["caption"] = caption
    if plan.questions:
        asked = [(i, question) for i, example in enumerate(good) for question in example.questions]
        if asked:
            rows, texts = [i for i, _ in asked], [q for _, q in asked]
            answers = generate_captions(model, processor, features[rows], texts, plan.batch_size, **plan.generation)
            for (i, question), answer in zip(asked, answers):
                own[i].setdefault("answers", []).append({"question": question, **answer})
        if plan.probe and others:
            first = [i for i, example in enumerate(good) if example.questions]
            if first:
                swapped = [next(iter(good[i].questions)) for i in first]
                of_other = features[[others[i] for i in first]]
                answers = generate_captions(model, processor, of_other, swapped, plan.batch_size, **plan.generation)
                for i, answer in zip(first, answers):
                    own[i]["answer_to_other_image"] = answer["text"]
    if plan.probe:
        pairs = {i: pair for i, example in enumerate(good) if (pair := probe_pair(example, plan))}
        if pairs:
            _probe(model, processor, features, others, pairs, black, plan, own)
    return records + own


def _probe(model, processor, features: Features, others, pairs: dict, black: Features, plan: SweepPlan, own) -> None:
    rows, (prompts, answers) = list(pairs), zip(*pairs.values())
    inputs = {"right": features[rows], "black": black[[0] * len(rows)], "none": None}
    if others:
        inputs["shuffled"] = features[[others[i] for i in rows]]
    for condition, given in inputs.items():
        losses = answer_losses(model, processor, given, prompts, answers, plan.batch_size)
        for i, (loss, tokens) in zip(rows, losses):
            own[i].setdefault("losses", {})[condition] = [round(loss, 6), tokens]


def black_features(model, processor) -> Features:
    """Patch features of a black picture."""
    return encode_photos(model, processor, [Image.new("RGB", (320, 240))])


def sweep(model, processor, split: Split, plan: SweepPlan, path: Path, model_fingerprint: str) -> list[dict]:
    """Records of all images of a split, in its order: answers, losses, routing, or why an image was rejected.

    Args:
        path: the partial results, written as the pass goes and used where they fit; kept until the caller removes them.
    """
    fingerprint = plan.fingerprint(model_fingerprint, split)
    done = read_partial(path, fingerprint)
    parts = [[split.examples[i] for i in part] for part in chunks(len(split.examples), plan.chunk)]
    finished = [part for part in parts if all(example.id in done for example in part)]
    done = {example.id: done[example.id] for part in finished for example in part}
    # written anew, so that lines of a chunk that was cut short do not stay
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"fingerprint": fingerprint}) + "\n")
        file.writelines(json.dumps(record) + "\n" for record in done.values())
    temporary.replace(path)
    if done:
        print(f"going on behind {len(done):,} images that are already done ({path})")
    black = black_features(model, processor) if plan.probe else None
    with tqdm(total=len(split.examples), initial=len(done), unit="image", desc=f"evaluate {split.name}") as bar:
        with path.open("a", encoding="utf-8") as file:
            for part in parts:
                if part[0].id in done:
                    continue
                records = _sweep_chunk(model, processor, part, plan, black)
                file.write("".join(json.dumps(record) + "\n" for record in records))
                file.flush()
                os.fsync(file.fileno())
                done.update((record["id"], record) for record in records)
                bar.update(len(records))
    return [done[example.id] for example in split.examples]


@torch.no_grad()
def fixed_answers(model, processor, prompts: Sequence[str | None], plan: SweepPlan) -> dict[str, dict]:
    """What the model says without looking: condition (`black`, `none`) -> prompt -> text. One answer a prompt."""
    distinct = list(dict.fromkeys(prompts))
    black = black_features(model, processor)[[0] * len(distinct)]
    generation = {"batch_size": plan.batch_size, **plan.generation}
    result = {}
    for condition, given in (("black", black), ("none", None)):
        answers = generate_captions(model, processor, given, distinct, **generation)
        result[condition] = {prompt: answer["text"] for prompt, answer in zip(distinct, answers)}
    return result


def batches_of_photos(examples: Sequence[Example], size: int) -> Iterator[tuple[list[Example], list[Image.Image]]]:
    """Readable photos in batches, unreadable ones left out."""
    for start in range(0, len(examples), size):
        good, photos, _ = _load(examples[start : start + size])
        if good:
            yield good, photos


@torch.no_grad()
def sweep_pope(model, processor, examples: Sequence[Example], questions: Sequence[PopeQuestion], batch_size: int = 32):
    """(questions that were asked, whether the model finds "yes" likelier), over photos that can be read."""
    by_image: dict[str, list[PopeQuestion]] = {}
    for question in questions:
        by_image.setdefault(question.image, []).append(question)
    wanted = [example for example in examples if example.id in by_image]
    asked, said = [], []
    with tqdm(total=len(wanted), unit="image", desc="POPE") as bar:
        for good, photos in batches_of_photos(wanted, batch_size):
            features = encode_photos(model, processor, photos, batch_size)
            own = [(row, question) for row, example in enumerate(good) for question in by_image[example.id]]
            asked += [question for _, question in own]
            said += ask_pope(model, processor, features, [q for _, q in own], [row for row, _ in own], batch_size)
            bar.update(len(good))
    return asked, said
