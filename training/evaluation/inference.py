"""The inference pass over a split: each image is decoded and encoded once for everything that is asked about it.

The pass takes the images in chunks. The records of a chunk are appended to `partial.jsonl` together. A killed run
resumes after the last complete chunk and gives the same results as one that was never killed. "Another image" is another
image of the same chunk.
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
from blipren.training.evaluation.examples import Example, Split
from blipren.training.evaluation.features import PatchFeatures, encode_images
from blipren.training.evaluation.generation import SHOWN_NEIGHBOURS, generate_answers
from blipren.training.evaluation.image_parts import exchange_parts
from blipren.training.evaluation.image_use import answer_losses, other_images
from blipren.training.evaluation.metrics.pope import PopeQuestion
from blipren.training.evaluation.refer import ANSWER_TOKENS, place_questions
from blipren.video_blipren import VideoFrames


@dataclasses.dataclass(frozen=True)
class InferencePlan:
    """What is asked about every image. A resumed pass must have the same plan.

    Attributes:
        captions: generate captions. questions: answer the data set's questions.
        image_use: compute losses with other images, a black one and none.
        prompt: caption prompt, None for the model's own. generation: keyword arguments of `generate`.
        grounding: kinds of questions about boxes and points. bbox_format: form of the data set's boxes. category_names: its names of
            numbered categories.
        num_frames: frames of a video; None where the data set holds images.
        chunk: number of images in a chunk.
    """

    captions: bool = True
    questions: bool = False
    image_use: bool = True
    prompt: str | None = None
    generation: dict = dataclasses.field(default_factory=dict)
    num_frames: int | None = None
    batch_size: int = 32
    chunk: int = 128
    seed: int = 0
    grounding: tuple[str, ...] = ()
    bbox_format: str = "xywh"
    category_names: tuple[str, ...] | None = None

    def fingerprint(self, model_fingerprint: str, split: Split) -> str:
        """Return a hash of everything that the records depend on."""
        ids = [example.id for example in split.examples]
        parts = [dataclasses.asdict(self), model_fingerprint, split.fingerprint, split.name, ids]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def split_into_chunks(count: int, size: int) -> list[range]:
    """Return the chunks of a split. A last chunk of one image joins the chunk before, since it has no other image."""
    starts = list(range(0, count, size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return [range(start, end) for start, end in zip(starts, [*starts[1:], count])]


def read_partial(path: Path, fingerprint: str) -> dict[str, dict]:
    """Return the finished records by id, none if the file belongs to another run. An incomplete last line is left out."""
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


def load_images(
    examples: Sequence[Example], num_frames: int | None = None
) -> tuple[list[Example], list[Image.Image] | list[VideoFrames], list[dict]]:
    """Return the examples whose image can be read, their images, and a record with the reason for each of the others.

    Args:
        num_frames: give so many frames of each video, in place of the middle one.
    """
    good, images, rejected = [], [], []
    for example in examples:
        try:
            images.append(example.load() if num_frames is None else example.load_frames(num_frames))
            good.append(example)
        except ImageError as error:
            rejected.append({"id": example.id, "rejected": [error.reason, error.detail]})
    return good, images, rejected


def image_batches(examples: Sequence[Example], size: int) -> Iterator[tuple[list[Example], list[Image.Image]]]:
    """Yield batches of examples and their images, without those whose image cannot be read."""
    for start in range(0, len(examples), size):
        good, images, _ = load_images(examples[start : start + size])
        if good:
            yield good, images


def choose_reference(example: Example, plan: InferencePlan) -> tuple[str | None, str] | None:
    """Return the prompt and text whose loss is computed: the first reference caption, or the first question's answer."""
    if example.references and plan.captions:
        return plan.prompt, example.references[0]
    if example.questions and plan.questions:
        question, answers = next(iter(example.questions.items()))
        return question, answers[0]
    return None


@torch.no_grad()
def run_chunk(
    model, processor, examples: list[Example], plan: InferencePlan, black: PatchFeatures | None
) -> list[dict]:
    """Return the records of the images of one chunk. `black` are the patch features of a black image."""
    good, images, rejected = load_images(examples, plan.num_frames)
    if not good:
        return rejected
    features = encode_images(model, processor, images, plan.batch_size)
    records = [{"id": example.id} for example in good]
    others = other_images(len(good), plan.seed)
    for record, other in zip(records, others):
        record["other"] = good[other].id
    if model.config.projector == "moe":
        routed = model.get_image_features(**features.model_inputs(model.device)).router_probs
        for record, probabilities in zip(records, routed.float().cpu().tolist()):
            record["router"] = [round(p, 5) for p in probabilities]
    if plan.captions:
        captions = generate_answers(model, processor, features, plan.prompt, plan.batch_size, **plan.generation)
        for record, caption in zip(records, captions):
            record["caption"] = caption
        if model.memory is not None and plan.generation.get("use_memory") is not False and plan.num_frames is None:
            names = [example.id for example in good]
            found = model.find_neighbours(SHOWN_NEIGHBOURS, names, **features.model_inputs(model.device))
            for record, neighbours in zip(records, found):
                record["neighbours"] = neighbours
    if plan.questions:
        _answer_questions(model, processor, features, good, others, plan, records)
    if plan.grounding:
        _answer_about_places(model, processor, features, good, images, plan, records)
    if plan.image_use:
        _compute_losses(model, processor, features, good, others, black, plan, records)
    return rejected + records


def _answer_questions(
    model,
    processor,
    features: PatchFeatures,
    examples: list[Example],
    others: list[int],
    plan: InferencePlan,
    records: list[dict],
) -> None:
    """Add to each record the answers to the image's questions, and to its first question about another image."""
    asked = [(i, question) for i, example in enumerate(examples) for question in example.questions]
    if not asked:
        return
    rows, texts = [i for i, _ in asked], [question for _, question in asked]
    answers = generate_answers(model, processor, features[rows], texts, plan.batch_size, **plan.generation)
    for (i, question), answer in zip(asked, answers):
        records[i].setdefault("answers", []).append({"question": question, **answer})
    if plan.image_use and others:
        rows = [i for i, example in enumerate(examples) if example.questions]
        first_questions = [next(iter(examples[i].questions)) for i in rows]
        of_others = features[[others[i] for i in rows]]
        answers = generate_answers(model, processor, of_others, first_questions, plan.batch_size, **plan.generation)
        for i, answer in zip(rows, answers):
            records[i]["answer_to_other_image"] = answer["text"]


def _answer_about_places(
    model, processor, features: PatchFeatures, examples: list[Example], images: list, plan: InferencePlan, records
) -> None:
    """Add to each record the questions about boxes and points, with their true answers and the model's."""
    asked = [
        (i, question)
        for i, (example, image) in enumerate(zip(examples, images))
        for question in place_questions(example, image, plan.grounding, plan.bbox_format, plan.category_names)
    ]
    rows, texts = [i for i, _ in asked], [question["question"] for _, question in asked]
    options = plan.generation | {"max_new_tokens": max(ANSWER_TOKENS, plan.generation.get("max_new_tokens", 0))}
    answers = generate_answers(model, processor, features[rows], texts, plan.batch_size, **options) if rows else []
    for (i, question), answer in zip(asked, answers):
        records[i].setdefault("places", []).append(question | {"text": answer["text"]})


def _compute_losses(
    model,
    processor,
    features: PatchFeatures,
    examples: list[Example],
    others: list[int],
    black: PatchFeatures,
    plan: InferencePlan,
    records: list[dict],
) -> None:
    """Add to each record the loss of its reference with its image, another image, a black one and none."""
    chosen = {i: pair for i, example in enumerate(examples) if (pair := choose_reference(example, plan))}
    if not chosen:
        return
    rows, (prompts, texts) = list(chosen), zip(*chosen.values())
    conditions = {"right": features[rows], "black": black[[0] * len(rows)], "none": None}
    if others:
        conditions["shuffled"] = features[[others[i] for i in rows]]
        parts = exchange_parts(model.config, features, others, plan.seed)
        conditions |= {part: exchanged[rows] for part, exchanged in parts.items()}
    for condition, given in conditions.items():
        losses = answer_losses(model, processor, given, prompts, texts, plan.batch_size)
        for i, (loss, tokens) in zip(rows, losses):
            records[i].setdefault("losses", {})[condition] = [round(loss, 6), tokens]


def encode_black_image(model, processor, num_frames: int | None = None) -> PatchFeatures:
    """Return the patch features of a black image, or of a video of `num_frames` such frames."""
    black = Image.new("RGB", (320, 240))
    video = None if num_frames is None else VideoFrames([black] * num_frames, seconds=num_frames)
    return encode_images(model, processor, [video or black])


def run_inference(
    model, processor, split: Split, plan: InferencePlan, path: Path, model_fingerprint: str
) -> list[dict]:
    """Return a record for each image of a split, in order: answers, losses, routing, or why the image was rejected.

    Args:
        path: file of partial results. Records of an interrupted run with the same plan are taken from it. The caller
            removes it.
    """
    fingerprint = plan.fingerprint(model_fingerprint, split)
    done = read_partial(path, fingerprint)
    parts = [[split.examples[i] for i in part] for part in split_into_chunks(len(split.examples), plan.chunk)]
    finished = [part for part in parts if all(example.id in done for example in part)]
    done = {example.id: done[example.id] for part in finished for example in part}
    # the file is rewritten, so that no line of an incomplete chunk stays in it
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"fingerprint": fingerprint}) + "\n")
        file.writelines(json.dumps(record) + "\n" for record in done.values())
    temporary.replace(path)
    if done:
        print(f"resuming after {len(done):,} images that are already done ({path})")
    black = encode_black_image(model, processor, plan.num_frames) if plan.image_use else None
    with tqdm(total=len(split.examples), initial=len(done), unit="image", desc=f"evaluate {split.name}") as bar:
        with path.open("a", encoding="utf-8") as file:
            for part in parts:
                if part[0].id in done:
                    continue
                records = run_chunk(model, processor, part, plan, black)
                file.write("".join(json.dumps(record) + "\n" for record in records))
                file.flush()
                os.fsync(file.fileno())
                done.update((record["id"], record) for record in records)
                bar.update(len(records))
    return [done[example.id] for example in split.examples]


@torch.no_grad()
def answers_without_image(
    model, processor, prompts: Sequence[str | None], plan: InferencePlan
) -> dict[str, dict[str | None, str]]:
    """Return the answers to a black image and to no image: condition (`black`, `none`) -> prompt -> text."""
    distinct = list(dict.fromkeys(prompts))
    black = encode_black_image(model, processor, plan.num_frames)[[0] * len(distinct)]
    result = {}
    for condition, given in (("black", black), ("none", None)):
        answers = generate_answers(model, processor, given, distinct, plan.batch_size, **plan.generation)
        result[condition] = {prompt: answer["text"] for prompt, answer in zip(distinct, answers)}
    return result


@torch.no_grad()
def answer_pope(
    model, processor, examples: Sequence[Example], questions: Sequence[PopeQuestion], batch_size: int = 32
) -> tuple[list[PopeQuestion], list[bool]]:
    """Return the POPE questions about images that can be read, and for each whether "yes" is likelier than "no"."""
    by_image: dict[str, list[PopeQuestion]] = {}
    for question in questions:
        by_image.setdefault(question.image, []).append(question)
    wanted = [example for example in examples if example.id in by_image]
    asked, said_yes = [], []
    with tqdm(total=len(wanted), unit="image", desc="POPE") as bar:
        for good, images in image_batches(wanted, batch_size):
            own = [(row, question) for row, example in enumerate(good) for question in by_image[example.id]]
            rows, texts = [row for row, _ in own], [question.text for _, question in own]
            features = encode_images(model, processor, images, batch_size)[rows]
            yes, no = (
                answer_losses(model, processor, features, texts, [answer] * len(texts), batch_size)
                for answer in ("yes", "no")
            )
            asked += [question for _, question in own]
            said_yes += [a[0] < b[0] for a, b in zip(yes, no)]
            bar.update(len(good))
    return asked, said_yes
