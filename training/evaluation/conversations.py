"""Questions in conversations: each in its context, with any number of images, and multiple choice.

Every answer of the data is asked for once, behind the turns in front of it as the data has them. Images are decoded and
encoded once a chunk of conversations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from tqdm import tqdm

from blipren.training.data.sources.conversations import LETTERS
from blipren.training.data.sources.images import ImageError, content_hash, decode_image, image_bytes
from blipren.training.errors import UserError
from blipren.training.evaluation.examples import Example
from blipren.training.evaluation.features import PatchFeatures, encode_images
from blipren.training.evaluation.generation import generate_batch, pad_id
from blipren.training.evaluation.image_use import image_use, token_losses
from blipren.training.evaluation.metrics.bootstrap import grouped_statistic, interval
from blipren.training.evaluation.metrics.vqa import answer_table, most_frequent_accuracy, normalize_answer, vqa_scores

CHUNK = 128  # conversations whose images are held at a time


@dataclasses.dataclass
class Asked:
    """One question of a conversation, and what the model did.

    Attributes:
        images: numbers of the images among those of the chunk.
        losses: (summed loss, tokens) of the reference by condition: `right`, `image 1`, `image 2`, ... exchanged.
        likelihood: number of the likeliest of `choices`.
    """

    id: str
    turn: int
    messages: list[dict]
    reference: str
    images: list[int]
    choices: list[str] | None
    answer: str = ""
    num_tokens: int = 0
    ended_by_eos: bool = False
    likelihood: int | None = None
    losses: dict[str, tuple[float, int]] = dataclasses.field(default_factory=dict)

    @property
    def question(self) -> str:
        """Text of the last turn of the user."""
        return text_of(self.messages[-1])

    @property
    def context(self) -> str:
        """The turns in front of the answer as text, `<image>` for each image."""
        return "\n".join(f"{m['role']}: {text_of(m, '<image>')}" for m in self.messages)


def text_of(message: dict, image: str = "") -> str:
    """Return the text of a message; `image` stands for each of its images."""
    return "".join(image if part["type"] == "image" else part["text"] for part in message["content"]).strip()


def _questions(example: Example, numbers: list[int]) -> list[Asked]:
    """Return the questions of a conversation whose images have these numbers."""
    conversation, found = example.row.conversation, []
    for turn, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        before = conversation.messages[:turn]
        count = sum(part["type"] == "image" for m in before for part in m["content"])
        found.append(Asked(example.id, turn, before, text_of(message), numbers[:count], conversation.choices))
    return found


def _load_chunk(
    model, processor, examples: Sequence[Example], batch_size: int
) -> tuple[list[Asked], PatchFeatures | None, list[dict]]:
    """Return the questions of a chunk, the patch features of its distinct images, and what was rejected."""
    numbers: dict[str, int] = {}
    pictures, asked, rejected = [], [], []
    for example in examples:
        own = []
        try:
            for cell in example.row.conversation.images:
                data = image_bytes(cell, example.row.folder)
                key = content_hash(data)
                if key not in numbers:
                    pictures.append(decode_image(data))
                    numbers[key] = len(numbers)
                own.append(numbers[key])
        except ImageError as error:
            rejected.append({"id": example.id, "rejected": [error.reason, error.detail]})
            continue
        asked += _questions(example, own)
    features = encode_images(model, processor, pictures, batch_size) if pictures else None
    return asked, features, rejected


def _inputs(features: PatchFeatures | None, images: list[int], device) -> dict[str, torch.Tensor]:
    return features[images].model_inputs(device) if images else {}


def _answer(model, processor, asked: list[Asked], features, counts, batch_size: int, generation: dict) -> None:
    encoded = [processor.encode_conversation(one.messages, [counts[i] for i in one.images]) for one in asked]
    order = sorted(range(len(asked)), key=lambda i: len(encoded[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        images = [image for row in rows for image in asked[row].images]
        made = generate_batch(
            model, processor, [encoded[row] for row in rows], _inputs(features, images, model.device), **generation
        )
        for row, answer in zip(rows, made):
            asked[row].answer, asked[row].num_tokens = answer["text"], answer["num_tokens"]
            asked[row].ended_by_eos = answer["ended_by_eos"]


def _losses(
    model, processor, rows: list[tuple[Asked, list[int], str]], features, counts, batch_size: int
) -> list[tuple[float, int]]:
    """Return (summed loss, tokens) of answers: each a question, the images that it is given, and a text."""
    encoded = [
        (processor.encode_conversation(one.messages, [counts[i] for i in images]), processor.encode_answer(text))
        for one, images, text in rows
    ]
    found: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i][0]) + len(encoded[i][1]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        images = [image for i in chosen for image in rows[i][1]]
        pairs = [encoded[i] for i in chosen]
        for i, loss in zip(
            chosen, token_losses(model, pairs, pad_id(model, processor), _inputs(features, images, model.device))
        ):
            found[i] = loss
    return found


def _exchange(asked: list[Asked], num_images: int) -> list[tuple[Asked, int, list[int]]]:
    """Return (question, place, images) with the image at each place exchanged for the next one of the chunk."""
    found = []
    for one in asked:
        for place, image in enumerate(one.images):
            other = next(
                (n % num_images for n in range(image + 1, image + num_images) if n % num_images not in one.images),
                None,
            )
            if other is not None:
                found.append((one, place, one.images[:place] + [other] + one.images[place + 1 :]))
    return found


@torch.no_grad()
def ask_conversations(
    model, processor, examples: Sequence[Example], settings, choices: bool
) -> tuple[list[Asked], list[dict]]:
    """Ask every question of conversations. Returns the questions with their answers, and rejected conversations.

    Args:
        settings: of `evaluate`.
        choices: compute the likelihood of each choice.
    """
    found, rejected = [], []
    generation = settings.generate_options()
    with tqdm(total=len(examples), unit="conversation", desc="conversations") as bar:
        for start in range(0, len(examples), CHUNK):
            part = examples[start : start + CHUNK]
            asked, features, refused = _load_chunk(model, processor, part, settings.batch_size)
            rejected += refused
            counts = features.visual_tokens(model.config) if features is not None else []
            _answer(model, processor, asked, features, counts, settings.batch_size, generation)
            if choices:
                options = [(one, n) for one in asked if one.choices for n in range(len(one.choices))]
                rows = [(one, one.images, LETTERS[n]) for one, n in options]
                best: dict[int, float] = {}
                for (one, n), (loss, _) in zip(
                    options, _losses(model, processor, rows, features, counts, settings.batch_size)
                ):
                    if loss < best.get(id(one), float("inf")):
                        best[id(one)], one.likelihood = loss, n
            if settings.probe and features is not None:
                shown = [one for one in asked if one.images]
                exchanged = _exchange(shown, len(features))
                rows = [(one, one.images, one.reference) for one in shown]
                rows += [(one, images, one.reference) for one, _, images in exchanged]
                losses = _losses(model, processor, rows, features, counts, settings.batch_size)
                names = [(one, "right") for one in shown] + [
                    (one, f"image {place + 1}") for one, place, _ in exchanged
                ]
                for (one, name), loss in zip(names, losses):
                    one.losses[name] = loss
            found += asked
            bar.update(len(part))
    return found, rejected


# ---------------------------------------------------------------------------------------------------------- numbers
def conversation_metrics(asked: Sequence[Asked], settings) -> dict:
    """Return the objects `vqa`, `choice` and `image_use` of metrics.json, as the tasks ask for them."""
    if not asked:
        raise UserError(f"{settings.dataset}: no conversation of the split could be read")
    found = {}
    if "vqa" in settings.tasks:
        found["vqa"] = _vqa(asked, settings)
    if "choice" in settings.tasks:
        chosen = [one for one in asked if one.choices]
        if not chosen:
            raise UserError(
                f"{settings.dataset}: --tasks choice needs questions with choices: the columns question, choices, answer"
            )
        found["choice"] = choice_metrics(chosen, settings)
    if any("image 1" in one.losses for one in asked):
        found["image_use"] = _image_use(asked, settings)
    return found


def _vqa(asked: Sequence[Asked], settings) -> dict:
    given = {n: one.answer for n, one in enumerate(asked)}
    references = {n: [one.reference] for n, one in enumerate(asked)}
    values, scores = vqa_scores(given, references)
    by_type = answer_table({n: one.question for n, one in enumerate(asked)}, references, scores)
    groups = [one.id for one in asked]
    statistics = {
        name: grouped_statistic([s[part] for s in scores.values()], groups)
        for name, part in (("accuracy", "exact"), ("soft_score", "soft"))
    }
    by_images: dict[str, dict] = {}
    for count in sorted({len(one.images) for one in asked}):
        exact = [scores[n]["exact"] for n, one in enumerate(asked) if len(one.images) == count]
        by_images[str(count)] = {"questions": len(exact), "accuracy": sum(exact) / len(exact)}
    return {
        **values,
        "intervals": {n: interval(s, settings.resamples, settings.seed) for n, s in statistics.items()},
        "questions": len(asked),
        "conversations": len(set(groups)),
        "by_number_of_images": by_images,
        "most_frequent_accuracy": most_frequent_accuracy(by_type),
        "by_question_type": by_type,
    }


def choice_of(answer: str, choices: Sequence[str]) -> int | None:
    """Return the number of the choice that a generated answer names, by letter or by text; None for none."""
    first = answer.strip().lstrip("(").split()[:1]
    letter = first[0].rstrip(".:),").upper() if first else ""
    if len(letter) == 1 and letter in LETTERS[: len(choices)]:
        return LETTERS.index(letter)
    said = normalize_answer(answer)
    return next((n for n, choice in enumerate(choices) if normalize_answer(choice) == said), None)


def choice_metrics(asked: Sequence[Asked], settings) -> dict:
    """Return accuracy by likelihood and by generation with intervals, and what chance gives."""
    right = [LETTERS.index(one.reference) for one in asked]
    groups = [one.id for one in asked]
    hits = {
        "accuracy_likelihood": [float(one.likelihood == answer) for one, answer in zip(asked, right)],
        "accuracy_generation": [float(choice_of(one.answer, one.choices) == a) for one, a in zip(asked, right)],
    }
    statistics = {name: grouped_statistic(values, groups) for name, values in hits.items()}
    return {
        **{name: statistic.value for name, statistic in statistics.items()},
        "intervals": {n: interval(s, settings.resamples, settings.seed) for n, s in statistics.items()},
        "chance": sum(1 / len(one.choices) for one in asked) / len(asked),
        "no_choice_named": sum(choice_of(one.answer, one.choices) is None for one in asked) / len(asked),
        "questions": len(asked),
    }


def _image_use(asked: Sequence[Asked], settings) -> dict:
    """Return the verdict for the images of conversations: exchanged all together where there is one, each by itself where
    there are several. The whole verdict is that of the image that is used least."""
    parts: dict[str, dict] = {}
    several = {name for one in asked if len(one.images) > 1 for name in one.losses if name != "right"}
    kinds = [("the image", [one for one in asked if len(one.images) == 1], "image 1")]
    kinds += [(name, [one for one in asked if len(one.images) > 1], name) for name in sorted(several)]
    for label, group, name in kinds:
        own = [one for one in group if name in one.losses]
        if own:
            losses = {"right": [one.losses["right"] for one in own], "shuffled": [one.losses[name] for one in own]}
            parts[label] = image_use(losses, {}, settings.resamples, settings.seed)
    worst = min(parts, key=lambda label: parts[label].get("loss_gap", {"value": 0.0})["value"])
    return parts[worst] | {"part": worst, "parts": parts}


def conversation_rows(asked: Sequence[Asked]) -> list[dict]:
    """Return the rows of predictions.jsonl."""
    rows = []
    for one in asked:
        row = {
            "id": one.id,
            "turn": one.turn,
            "prompt": one.question,
            "context": one.context,
            "caption": one.answer,
            "references": [one.reference],
            "ended_by_eos": one.ended_by_eos,
            "tokens": one.num_tokens,
            "exact": float(normalize_answer(one.answer) == normalize_answer(one.reference)),
        }
        if one.likelihood is not None:
            row["likeliest"] = LETTERS[one.likelihood]
        rows.append(row)
    return rows


def conversation_items(asked: Sequence[Asked], count: int) -> list[dict]:
    """Return what the report shows of `count` questions, spread evenly over the split."""
    rows, count = conversation_rows(asked), min(count, len(asked))
    return [
        {
            "context": row["context"],
            "answer": row["caption"],
            "reference": row["references"][0],
            "right": bool(row["exact"]),
        }
        for row in (rows[k * len(rows) // count] for k in range(count))
    ]
