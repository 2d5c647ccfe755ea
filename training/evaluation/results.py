"""From what the model said to numbers: one object a task for metrics.json, and a line an image for predictions.jsonl."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from blipren.training.evaluation.examples import Example, Split
from blipren.training.evaluation.image_use import image_use
from blipren.training.evaluation.metrics.bootstrap import Statistic, grouped_statistic, interval, mean_statistic
from blipren.training.evaluation.metrics.captions import CaptionScores, score_captions
from blipren.training.evaluation.metrics.hallucination import Hallucination, chair, scene_truth
from blipren.training.evaluation.metrics.pope import PopeQuestion
from blipren.training.evaluation.metrics.retrieval import RECALL_AT
from blipren.training.evaluation.metrics.vqa import answer_table, vqa_scores
from blipren.training.files import write_atomically

SIMILARITIES = ("CLIPScore", "RefCLIPScore", "SigLIPScore", "RefSigLIPScore")
PER_IMAGE = ("CIDEr", "BLEU-4", "ROUGE-L", "METEOR", *SIMILARITIES)


@dataclass
class Evaluation:
    """Everything that metrics.json, the predictions and the report are made from.

    Attributes:
        metrics: task -> values, intervals and counts.
        examples: the images that were evaluated, in order. captions: id -> caption.
        caption_scores: None without captions. hallucination: None where nothing is known of the pictures.
        answers: (image id, question) -> answer, its scores and the people's answers.
        asked, said: POPE's questions, and whether the model says yes to each.
        ranks: image id -> its retrieval ranks, of the best of its captions and of its photo for each of them.
        records: what the pass wrote about each image.
    """

    metrics: dict = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)
    captions: dict[str, dict] = field(default_factory=dict)
    caption_scores: CaptionScores | None = None
    hallucination: Hallucination | None = None
    answers: dict[tuple[str, str], dict] = field(default_factory=dict)
    asked: list[PopeQuestion] = field(default_factory=list)
    said: list[bool] = field(default_factory=list)
    ranks: dict[str, dict] = field(default_factory=dict)
    records: dict[str, dict] = field(default_factory=dict)


def split_counts(split: Split, records: Sequence[Mapping]) -> dict:
    """How many of what, and what was left out."""
    rejected = Counter(record["rejected"][0] for record in records if "rejected" in record)
    return {
        "split": split.name,
        "images": len(split.examples) - rejected.total(),
        "references": sum(len(example.references) for example in split.examples),
        "questions": sum(len(example.questions) for example in split.examples),
        "rejected": dict(rejected),
        "rows": dict(split.rows),
    }


def _caption_object(scores: CaptionScores, resamples: int, seed: int, references: int) -> dict:
    return {
        **scores.corpus,
        "intervals": scores.intervals(resamples, seed),
        "images": len(scores.ids),
        "references": references,
        "tokenizer": scores.tokenizer,
        "notes": scores.notes,
    }


def add_captions(result: Evaluation, settings, captions: dict[str, dict], meteor: bool = True) -> None:
    """Caption metrics and hallucination of the captions of images that have references."""
    examples = [e for e in result.examples if e.references and e.id in captions]
    predictions = {e.id: captions[e.id]["text"] for e in examples}
    references = {e.id: e.references for e in examples}
    known = all("ended_by_eos" in captions[key] for key in predictions)
    ended = {key: captions[key]["ended_by_eos"] for key in predictions} if known else None
    scores = score_captions(predictions, references, settings.tokenizer, ended, meteor)
    result.captions, result.caption_scores = captions, scores
    total = sum(len(texts) for texts in references.values())
    result.metrics["captioning"] = _caption_object(scores, settings.resamples, settings.seed, total)

    scenes = {e.id: e.facts["scene"] for e in examples if "scene" in e.facts}
    if scenes:
        result.hallucination = scene_truth({key: predictions[key] for key in scenes}, scenes)
    else:
        boxes = {e.id: [o["category"] for o in e.facts["objects"]] for e in examples if e.facts.get("objects")}
        result.hallucination = chair(predictions, references, boxes or None)
    found = result.hallucination
    result.metrics["hallucination"] = {
        **found.values,
        "intervals": {n: interval(s, settings.resamples, settings.seed) for n, s in found.statistics.items()},
        "truth": found.basis,
    }
    groups = {e.facts.get("group") for e in examples} - {None}
    if scenes and len(groups) > 1:
        # seen and unseen combinations: the number that says whether anything was learned beyond the training pairs
        for group in sorted(groups):
            ids = [e.id for e in examples if e.facts.get("group") == group]
            part = scene_truth({key: predictions[key] for key in ids}, {key: scenes[key] for key in ids})
            result.metrics["hallucination"][group] = part.values


def add_similarity(result: Evaluation, settings, scores: Mapping[str, Sequence[float]], encoder: str) -> None:
    """Image-text similarity beside the other caption metrics, and whose it is: that of another does not compare."""
    found, values = result.caption_scores, result.metrics["captioning"]
    values["similarity_encoder"] = encoder
    for name, per_image in scores.items():
        statistic = mean_statistic(per_image)
        found.corpus[name] = values[name] = statistic.value
        found.statistics[name] = statistic
        found.per_image[name] = dict(zip(found.ids, per_image, strict=True))
        values["intervals"][name] = interval(statistic, settings.resamples, settings.seed)


def add_answers(result: Evaluation, settings) -> None:
    """VQA accuracy over every question of every image."""
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
    result.answers = {name: {"text": given[name], "people": people[name], **per_question[name]} for name in given}
    result.metrics["vqa"] = {
        **values,
        "intervals": {n: interval(s, settings.resamples, settings.seed) for n, s in statistics.items()},
        "questions": len(given),
        "images": len({key for key, _ in given}),
        "by_question_type": answer_table(questions, per_question),
    }


def add_image_use(result: Evaluation, settings, fixed: Mapping[str, Mapping]) -> None:
    """The probe: losses and scores with the right image, another one, a black one and none; the verdict.

    Args:
        fixed: condition (`black`, `none`) -> prompt -> what the model says without looking.
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
        said = {"right": {key: result.captions[key]["text"] for key in scored}}
        if all("other" in result.records[key] for key in scored):
            said["shuffled"] = {key: result.captions[result.records[key]["other"]]["text"] for key in scored}
        for condition in ("black", "none"):
            said[condition] = dict.fromkeys(scored, fixed[condition][settings.prompt])
        scores["CIDEr"] = {
            condition: list(
                score_captions(texts, references, settings.tokenizer, meteor=False).per_image["CIDEr"].values()
            )
            for condition, texts in said.items()
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
    result.metrics["image_use"] = image_use(losses, scores, settings.resamples, settings.seed)


def add_routing(result: Evaluation) -> None:
    """How a mixture of experts divides the images."""
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
    """Intervals of recall over images: the captions of one are drawn together."""
    result.ranks = dict(ranks)
    statistics = recall_statistics(list(ranks.values()))
    result.metrics["retrieval"]["intervals"] = {
        name: interval(statistic, settings.resamples, settings.seed) for name, statistic in statistics.items()
    }


def recall_statistics(ranks: Sequence[Mapping]) -> dict[str, Statistic]:
    """`image_to_text.R@1`, ... of the ranks of each image, as predictions.jsonl holds them."""
    found = {}
    for way, key in (("image_to_text", "image_to_text_rank"), ("text_to_image", "text_to_image_ranks")):
        own = [row[key] if isinstance(row[key], list) else [row[key]] for row in ranks]
        for k in RECALL_AT:
            hits = [[sum(rank <= k for rank in some), len(some)] for some in own]
            found[f"{way}.R@{k}"] = Statistic(np.array(hits, dtype=np.float64), lambda s: s[..., 0] / s[..., 1])
    return found


def prediction_rows(result: Evaluation, prompt: str | None) -> list[dict]:
    """One object a caption or answer, in the order of the images; POPE's questions behind them."""
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
    for question, yes in zip(result.asked, result.said):
        words = {"caption": "yes" if yes else "no", "references": ["yes" if question.answer else "no"]}
        own = {"id": question.image, "prompt": question.text, **words}
        rows.append(own | {"pope": question.strategy, "right": float(yes == question.answer)})
    return rows


def _safe_cell(value):
    """Spreadsheets run cells that begin with = + - @; captions are foreign text."""
    if isinstance(value, list):
        return " | ".join(map(str, value))
    if isinstance(value, str) and value[:1] in "=+-@\t\r" and value[:1]:
        return "'" + value
    return value


def read_lines(path: Path) -> list:
    """The values of a file of JSON lines. Captions may hold characters that `splitlines` takes for line ends."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def is_caption(row: Mapping) -> bool:
    """Whether a line of predictions.jsonl is an image's caption: no answer, no question of POPE, no ranks alone."""
    return not {"exact", "pope"} & row.keys() and ("caption" in row or "image_to_text_rank" not in row)


def write_predictions(folder: Path, rows: Sequence[Mapping]) -> None:
    """predictions.jsonl and predictions.csv."""
    import io

    write_atomically(folder / "predictions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, columns)
    writer.writeheader()
    writer.writerows({name: _safe_cell(value) for name, value in row.items()} for row in rows)
    write_atomically(folder / "predictions.csv", buffer.getvalue())
