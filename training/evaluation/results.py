"""Numbers from answers: one object a task for metrics.json, and the rows of predictions.jsonl."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from blipren.training.evaluation.conversations import Asked
from blipren.training.evaluation.examples import Example, Split
from blipren.training.evaluation.image_parts import FINE, ORDER, SECOND, part_use
from blipren.training.evaluation.image_use import IGNORES, image_use
from blipren.training.evaluation.judges import find_judge
from blipren.training.evaluation.metrics.bootstrap import Statistic, grouped_statistic, interval, mean_statistic
from blipren.training.evaluation.metrics.boxes import PlaceAnswer
from blipren.training.evaluation.metrics.captions import CaptionScores, score_captions
from blipren.training.evaluation.metrics.hallucination import Hallucination, chair, judge_captions
from blipren.training.evaluation.metrics.pope import PopeQuestion
from blipren.training.evaluation.metrics.retrieval import RECALL_AT
from blipren.training.evaluation.metrics.tokenizer import tokenize
from blipren.training.evaluation.metrics.vqa import answer_table, most_frequent_accuracy, vqa_scores
from blipren.training.evaluation.refer import place_rows
from blipren.training.files import write_atomically

SIMILARITIES = ("CLIPScore", "RefCLIPScore", "SigLIPScore", "RefSigLIPScore")
PER_IMAGE = ("CIDEr", "BLEU-4", "ROUGE-L", "METEOR", *SIMILARITIES)


@dataclass
class Evaluation:
    """The results from which metrics.json, the predictions and the report are made.

    Attributes:
        metrics: task -> values, intervals and counts.
        examples: the images that were evaluated, in order. captions: id -> caption.
        caption_scores, hallucination: None without captions.
        answers: (image id, question) -> answer, its scores and the people's answers.
        places: answers about boxes and points.
        asked, said_yes: POPE's questions, and whether "yes" is likelier than "no" for each.
        ranks: image id -> its retrieval ranks: of its best ranked caption, and of the image for each of its captions.
        records: the records of the inference pass by image id.
        asked_in_context: the questions of conversations with their answers.
    """

    metrics: dict = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)
    captions: dict[str, dict] = field(default_factory=dict)
    caption_scores: CaptionScores | None = None
    hallucination: Hallucination | None = None
    answers: dict[tuple[str, str], dict] = field(default_factory=dict)
    places: list[PlaceAnswer] = field(default_factory=list)
    asked: list[PopeQuestion] = field(default_factory=list)
    said_yes: list[bool] = field(default_factory=list)
    ranks: dict[str, dict] = field(default_factory=dict)
    records: dict[str, dict] = field(default_factory=dict)
    asked_in_context: list[Asked] = field(default_factory=list)


def split_counts(split: Split, records: Sequence[Mapping]) -> dict:
    """Return the numbers of images, references, questions, rejected images and rows."""
    rejected = Counter(record["rejected"][0] for record in records if "rejected" in record)
    return {
        "split": split.name,
        "images": len(split.examples) - rejected.total(),
        "references": sum(len(example.references) for example in split.examples),
        "questions": sum(len(example.questions) for example in split.examples),
        "conversations": sum(example.row.conversation is not None for example in split.examples),
        "rejected": dict(rejected),
        "rows": dict(split.rows),
    }


def _caption_object(scores: CaptionScores, resamples: int, seed: int, references: int) -> dict:
    """Return the object `captioning` of metrics.json."""
    return {
        **scores.corpus,
        "intervals": scores.intervals(resamples, seed),
        "images": len(scores.ids),
        "references": references,
        "tokenizer": scores.tokenizer,
        "notes": scores.notes,
    }


def add_captions(result: Evaluation, settings, captions: dict[str, dict], meteor: bool = True) -> None:
    """Add caption metrics and hallucination of the captions of images that have references."""
    examples = [e for e in result.examples if e.references and e.id in captions]
    predictions = {e.id: captions[e.id]["text"] for e in examples}
    references = {e.id: e.references for e in examples}
    known = all("ended_by_eos" in captions[key] for key in predictions)
    ended = {key: captions[key]["ended_by_eos"] for key in predictions} if known else None
    scores = score_captions(predictions, references, settings.tokenizer, ended, meteor)
    result.captions, result.caption_scores = captions, scores
    total = sum(len(texts) for texts in references.values())
    result.metrics["captioning"] = _caption_object(scores, settings.resamples, settings.seed, total)

    judge = None
    if found := find_judge(e.facts for e in examples):
        column, judge = found
        contents = {e.id: e.facts[column] for e in examples if column in e.facts}
        result.hallucination = judge_captions({key: predictions[key] for key in contents}, contents, judge)
    else:
        boxes = {e.id: [o["category"] for o in e.facts["objects"]] for e in examples if e.facts.get("objects")}
        result.hallucination = chair(predictions, references, boxes or None)
    hallucination = result.hallucination
    result.metrics["hallucination"] = {
        **hallucination.values,
        "intervals": {n: interval(s, settings.resamples, settings.seed) for n, s in hallucination.statistics.items()},
        "truth": hallucination.basis,
    }
    judged = [e for e in examples if judge is not None and e.id in contents]
    groups = {e.facts.get("group") for e in judged} - {None}
    if len(groups) > 1:
        # combinations that training had and had not: the difference shows whether the model generalises
        for group in sorted(groups):
            ids = [e.id for e in judged if e.facts.get("group") == group]
            part = judge_captions({key: predictions[key] for key in ids}, {key: contents[key] for key in ids}, judge)
            result.metrics["hallucination"][group] = part.values


def add_memory(result: Evaluation, memory) -> None:
    """Add how many captions are captions of the model's memory, word for word after the metrics' tokenizer."""
    known = set(tokenize([text for own in memory.texts["captions"].to_pylist() for text in own], "python"))
    said = dict(zip(result.captions, tokenize([caption["text"] for caption in result.captions.values()], "python")))
    for name, text in said.items():
        result.captions[name]["copied"] = text in known
    copies = sum(text in known for text in said.values())
    result.metrics["memory"] = {"entries": len(memory), "copies": copies, "share_of_copies": copies / len(said)}


def add_clip_scores(result: Evaluation, settings, scores: Mapping[str, Sequence[float]], encoder: str) -> None:
    """Add CLIPScore or SigLIPScore to the caption metrics, with the encoder: values of two encoders do not compare."""
    found, values = result.caption_scores, result.metrics["captioning"]
    values["similarity_encoder"] = encoder
    for name, per_image in scores.items():
        statistic = mean_statistic(per_image)
        found.corpus[name] = values[name] = statistic.value
        found.statistics[name] = statistic
        found.per_image[name] = dict(zip(found.ids, per_image, strict=True))
        values["intervals"][name] = interval(statistic, settings.resamples, settings.seed)


def add_answers(result: Evaluation, settings) -> None:
    """Add VQA accuracy over all questions of all images."""
    given, people, questions = {}, {}, {}
    by_id = {example.id: example for example in result.examples}
    for key, record in result.records.items():
        for answer in record.get("answers", []):
            name = (key, answer["question"])
            given[name], questions[name] = answer["text"], answer["question"]
            people[name] = by_id[key].questions[answer["question"]]
    values, per_question = vqa_scores(given, people)
    images = [key for key, _ in given]
    statistics = {
        name: grouped_statistic([s[part] for s in per_question.values()], images)
        for name, part in (("accuracy", "exact"), ("soft_score", "soft"))
    }
    by_type = answer_table(questions, people, per_question)
    result.answers = {name: {"text": given[name], "people": people[name], **per_question[name]} for name in given}
    result.metrics["vqa"] = {
        **values,
        "intervals": {n: interval(s, settings.resamples, settings.seed) for n, s in statistics.items()},
        "questions": len(given),
        "images": len({key for key, _ in given}),
        "most_frequent_accuracy": most_frequent_accuracy(by_type),
        "by_question_type": by_type,
    }


def add_image_use(result: Evaluation, settings, fixed: Mapping[str, Mapping]) -> None:
    """Add losses and scores with the right image, another one, a black one and none, and the verdict.

    Args:
        fixed: condition (`black`, `none`) -> prompt -> answer without the image.
    """
    ids = [key for key, record in result.records.items() if record.get("losses")]
    losses: dict[str, list] = {}
    for condition in ("right", "shuffled", "black", "none"):
        values = [result.records[key]["losses"].get(condition) for key in ids]
        if values and all(value is not None for value in values):
            losses[condition] = [tuple(value) for value in values]
    if not losses:
        return
    scores: dict[str, dict[str, list[float]]] = {}
    if result.caption_scores is not None and "captioning" in settings.tasks:
        scored = result.caption_scores.ids
        references = {e.id: e.references for e in result.examples if e.id in set(scored)}
        texts = {"right": {key: result.captions[key]["text"] for key in scored}}
        if all("other" in result.records[key] for key in scored):
            texts["shuffled"] = {key: result.captions[result.records[key]["other"]]["text"] for key in scored}
        for condition in ("black", "none"):
            texts[condition] = dict.fromkeys(scored, fixed[condition][settings.prompt])
        scores["CIDEr"] = {
            condition: list(
                score_captions(own, references, settings.tokenizer, meteor=False).per_image["CIDEr"].values()
            )
            for condition, own in texts.items()
        }
    asked = [key for key, record in result.records.items() if "answer_to_other_image" in record]
    if asked and "vqa" in settings.tasks:
        by_id = {example.id: example for example in result.examples}
        first = {key: next(iter(by_id[key].questions)) for key in asked}
        people = {key: by_id[key].questions[first[key]] for key in asked}
        texts = {
            "right": {key: result.answers[key, first[key]]["text"] for key in asked},
            "shuffled": {key: result.records[key]["answer_to_other_image"] for key in asked},
            **{c: {key: fixed[c][first[key]] for key in asked} for c in ("black", "none")},
        }
        scores["VQA accuracy"] = {
            condition: [s["exact"] for s in vqa_scores(own, people)[1].values()] for condition, own in texts.items()
        }
    found = image_use(losses, scores, settings.resamples, settings.seed)
    exchanged = {}
    for part in (FINE, SECOND, ORDER):
        values = [result.records[key]["losses"].get(part) for key in ids]
        if all(value is not None for value in values):
            exchanged[part] = [tuple(value) for value in values]
    if exchanged:
        found["parts"] = part_use(losses["right"], exchanged, settings.resamples, settings.seed)
        for part, use in found["parts"].items():
            gap = use["loss_gap"]
            found["because"] += (
                f" It {'ignores' if use['verdict'] == 'ignored' else 'uses'} {part}: exchanged, the loss changes by "
                f"{gap['value']:+.3f} (95% interval {gap['low']:+.3f} to {gap['high']:+.3f})."
            )
        if ignored := [part for part, use in found["parts"].items() if use["verdict"] == "ignored"]:
            found["verdict"] += f", but ignores {' and '.join(ignored)}" if found["verdict"] != IGNORES else ""
    result.metrics["image_use"] = found


def add_routing(result: Evaluation) -> None:
    """Add the routing statistics of a mixture of experts."""
    routed = {key: record["router"] for key, record in result.records.items() if "router" in record}
    if not routed:
        return
    table = np.array(list(routed.values()))
    entropy = -(table * np.log(np.maximum(table, 1e-9))).sum(axis=1)
    result.metrics["routing"] = {
        "mean_probability": table.mean(axis=0).tolist(),
        "share_of_images": (np.bincount(table.argmax(axis=1), minlength=table.shape[1]) / len(table)).tolist(),
        "mean_entropy": float(entropy.mean()),
        "largest_entropy": float(np.log(table.shape[1])),
        "images": len(table),
    }


def add_ranks(result: Evaluation, settings, ranks: Mapping[str, Mapping]) -> None:
    """Add the ranks and the intervals of recall over images. The captions of an image are drawn together."""
    result.ranks = dict(ranks)
    statistics = recall_statistics(list(ranks.values()))
    result.metrics["retrieval"]["intervals"] = {
        name: interval(statistic, settings.resamples, settings.seed) for name, statistic in statistics.items()
    }


def recall_statistics(ranks: Sequence[Mapping]) -> dict[str, Statistic]:
    """Return `image_to_text.R@1`, ... from the ranks of each image, as predictions.jsonl holds them."""
    found = {}
    for way, key in (("image_to_text", "image_to_text_rank"), ("text_to_image", "text_to_image_ranks")):
        own = [row[key] if isinstance(row[key], list) else [row[key]] for row in ranks]
        for k in RECALL_AT:
            hits = [[sum(rank <= k for rank in some), len(some)] for some in own]
            found[f"{way}.R@{k}"] = Statistic(np.array(hits, dtype=np.float64), lambda s: s[..., 0] / s[..., 1])
    return found


def prediction_rows(result: Evaluation, prompt: str | None) -> list[dict]:
    """Return a row for each caption and answer, in the order of the images, then a row for each POPE question."""
    rows = []
    scores = result.caption_scores
    scored = set(scores.ids) if scores is not None else set()
    for example in result.examples:
        caption = result.captions.get(example.id)
        if caption is not None:
            row = {
                "id": example.id,
                "prompt": prompt,
                "caption": caption["text"],
                "references": example.references,
                "ended_by_eos": caption.get("ended_by_eos"),
                "tokens": caption.get("num_tokens"),
            }
            if example.id in scored:
                row |= {n: round(scores.per_image[n][example.id], 6) for n in PER_IMAGE if n in scores.per_image}
            if result.hallucination is not None and example.id in result.hallucination.per_image:
                row |= result.hallucination.per_image[example.id]
            if "copied" in caption:
                row |= {"copied": caption["copied"], "neighbours": result.records[example.id]["neighbours"]}
            rows.append(row | result.ranks.get(example.id, {}))
        elif example.id in result.ranks:
            rows.append({"id": example.id, "references": example.references, **result.ranks[example.id]})
        answered = {a["question"]: a for a in result.records.get(example.id, {}).get("answers", [])}
        for question in example.questions:
            if (example.id, question) in result.answers:
                answer = result.answers[example.id, question]
                rows.append(
                    {
                        "id": example.id,
                        "prompt": question,
                        "caption": answer["text"],
                        "references": answer["people"],
                        "ended_by_eos": answered[question].get("ended_by_eos"),
                        "tokens": answered[question].get("num_tokens"),
                        "exact": answer["exact"],
                        "soft": answer["soft"],
                    }
                )
    rows += place_rows(result.places)
    for question, yes in zip(result.asked, result.said_yes):
        words = {"caption": "yes" if yes else "no", "references": ["yes" if question.answer else "no"]}
        own = {"id": question.image, "prompt": question.text, **words}
        rows.append(own | {"pope": question.strategy, "right": float(yes == question.answer)})
    return rows


def _safe_cell(value):
    """Return a value for a CSV cell. Spreadsheets run text that begins with = + - @ as a formula, so it gets a quote."""
    if isinstance(value, list):
        return " | ".join(map(str, value))
    if isinstance(value, str) and value[:1] in "=+-@\t\r" and value[:1]:
        return "'" + value
    return value


def read_lines(path: Path) -> list:
    """Read a file of JSON lines. Captions may hold characters at which `splitlines` would split."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def is_caption(row: Mapping) -> bool:
    """Whether a row of predictions.jsonl is a caption, and not an answer, a question of refer or POPE, or ranks alone."""
    return not {"exact", "pope", "refer"} & row.keys() and ("caption" in row or "image_to_text_rank" not in row)


def csv_text(rows: Sequence[Mapping]) -> str:
    """Return rows as CSV, with a column for every name that a row has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, columns)
    writer.writeheader()
    writer.writerows({name: _safe_cell(value) for name, value in row.items()} for row in rows)
    return buffer.getvalue()


def write_predictions(folder: Path, rows: Sequence[Mapping]) -> None:
    """Write predictions.jsonl and predictions.csv."""
    write_atomically(folder / "predictions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_atomically(folder / "predictions.csv", csv_text(rows))
