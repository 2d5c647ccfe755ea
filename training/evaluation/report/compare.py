"""The command `compare`: a paired comparison of two evaluations of the same images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from blipren.training.commands.compare import CompareSettings
from blipren.training.data.sources.images import ImageError
from blipren.training.data.sources.settings import SOURCE_OPTIONS
from blipren.training.errors import UserError
from blipren.training.evaluation.examples import open_split
from blipren.training.evaluation.metrics.bootstrap import (
    Statistic,
    grouped_statistic,
    mean_statistic,
    paired_difference,
)
from blipren.training.evaluation.metrics.captions import CaptionScores, score_captions
from blipren.training.evaluation.metrics.hallucination import image_statistics
from blipren.training.evaluation.report.page import embedded_data, render_page
from blipren.training.evaluation.report.pictures import image_url
from blipren.training.evaluation.report.training import training_curves
from blipren.training.evaluation.results import SIMILARITIES, is_caption, read_lines, recall_statistics
from blipren.training.files import write_atomically

LOWER_IS_BETTER = ("hallucinated_objects", "CHAIR_i", "CHAIR_s", "repetition", "cut_off")
NO_DIRECTION = ("length",)
Pairs = dict[str, tuple[Statistic, Statistic]]
"""Metric -> its statistics in run A and in run B, over the same images."""


@dataclass
class Run:
    """An evaluation folder.

    Attributes:
        captions: image id -> row of predictions.jsonl. answers: (image id, question) -> row. pope: (strategy, image id,
            question) -> row. ranks: image id -> row with its retrieval ranks.
    """

    path: Path
    metrics: dict
    captions: dict[str, dict]
    answers: dict[tuple[str, str], dict]
    pope: dict[tuple[str, str, str], dict]
    ranks: dict[str, dict]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def images(self) -> set[str]:
        """Ids of all images of the run."""
        questions = [image for image, _ in self.answers] + [image for _, image, _ in self.pope]
        return {*self.captions, *questions, *self.ranks}


def read_run(path: str) -> Run:
    """Read an evaluation folder. Raises `UserError` if it is none or is incomplete."""
    folder = Path(path)
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        rows = read_lines(folder / "predictions.jsonl")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a finished evaluation: metrics.json or predictions.jsonl cannot be read ({error}); "
            "make one with `blipren evaluate`"
        ) from error
    answers = {(row["id"], row["prompt"]): row for row in rows if "exact" in row}
    pope = {(row["pope"], row["id"], row["prompt"]): row for row in rows if "pope" in row}
    captions = {row["id"]: row for row in rows if is_caption(row)}
    ranks = {row["id"]: row for row in rows if "image_to_text_rank" in row}
    return Run(folder, metrics, captions, answers, pope, ranks)


def _score(run: Run, ids: list[str], tokenizer: str, meteor: bool) -> CaptionScores:
    """Score the captions of some images of a run."""
    known = all(run.captions[key].get("ended_by_eos") is not None for key in ids)
    return score_captions(
        {key: run.captions[key]["caption"] for key in ids},
        {key: run.captions[key]["references"] for key in ids},
        tokenizer,
        {key: run.captions[key]["ended_by_eos"] for key in ids} if known else None,
        meteor,
    )


def _pairs(a: dict, b: dict, statistics: Callable[[list[dict]], dict[str, Statistic]]) -> Pairs:
    """Return the metrics of the rows that both runs have."""
    keys = [key for key in a if key in b]
    if not keys:
        return {}
    first, second = (statistics([rows[key] for key in keys]) for rows in (a, b))
    return {name: (first[name], second[name]) for name in first if name in second}


def _caption_pairs(a: Run, b: Run, ids: list[str]) -> Pairs:
    """Return the metrics whose values predictions.jsonl holds: hallucination and image-text similarity."""

    def rows_with(name: str) -> list[dict[str, dict]]:
        return [{key: run.captions[key] for key in ids if name in run.captions[key]} for run in (a, b)]

    pairs = _pairs(*rows_with("mentions"), image_statistics)
    encoders = [run.metrics["captioning"].get("similarity_encoder") for run in (a, b)]
    for name in SIMILARITIES if encoders[0] == encoders[1] else ():  # values of two encoders do not compare
        pairs |= _pairs(*rows_with(name), lambda rows, name=name: {name: mean_statistic([row[name] for row in rows])})
    return pairs


def _answer_statistics(rows: list[dict]) -> dict[str, Statistic]:
    """Return VQA accuracy and soft score of rows of predictions.jsonl."""
    images = [row["id"] for row in rows]
    columns = (("VQA accuracy", "exact"), ("VQA soft score", "soft"))
    return {name: grouped_statistic([row[column] for row in rows], images) for name, column in columns}


def _pope_statistics(rows: list[dict]) -> dict[str, Statistic]:
    """Return the accuracy of each POPE strategy of rows of predictions.jsonl."""
    found = {}
    for strategy in dict.fromkeys(row["pope"] for row in rows):
        own = [row for row in rows if row["pope"] == strategy]
        found[f"POPE {strategy}"] = grouped_statistic([row["right"] for row in own], [row["id"] for row in own])
    return found


def paired_statistics(a: Run, b: Run) -> tuple[Pairs, dict[str, tuple[float, float]]]:
    """Return the statistics of each metric in both runs over the same images in the same order, and CIDEr of each image.

    Raises:
        UserError: the runs have no image in common, or other references for one.
    """
    pairs: Pairs = {}
    per_image: dict[str, tuple[float, float]] = {}
    ids = [key for key in a.captions if key in b.captions and a.captions[key]["references"]]
    other = [key for key in ids if a.captions[key]["references"] != b.captions[key]["references"]]
    if other:
        raise UserError(
            f"{a.path} and {b.path} have different references for {other[0]!r}: they are evaluations of different data"
        )
    if ids:
        tokenizer = a.metrics["captioning"]["tokenizer"]
        meteor = all(run.metrics["captioning"].get("METEOR") is not None for run in (a, b))
        first, second = (_score(run, ids, tokenizer, meteor) for run in (a, b))
        pairs |= {n: (first.statistics[n], second.statistics[n]) for n in first.statistics if n in second.statistics}
        pairs |= _caption_pairs(a, b, ids)
        per_image = {key: (first.per_image["CIDEr"][key], second.per_image["CIDEr"][key]) for key in ids}
    pairs |= _pairs(a.answers, b.answers, _answer_statistics)
    pairs |= _pairs(a.pope, b.pope, _pope_statistics)
    pairs |= _pairs(a.ranks, b.ranks, recall_statistics)
    if not pairs:
        raise UserError(f"{a.path} and {b.path} have no image in common: nothing can be compared")
    return pairs, per_image


def verdict(name: str, low: float, high: float) -> str:
    """Return `better`, `worse`, `different` (a metric without a better direction) or `no difference seen` for B against A."""
    if low <= 0 <= high:
        return "no difference seen"
    if name in NO_DIRECTION:
        return "different"
    return "better" if (low > 0) != (name in LOWER_IS_BETTER) else "worse"


def _image_urls(run: Run, ids: list[str]) -> dict[str, str]:
    """Return some images as `data:` URLs, without those that cannot be read any more."""
    found: dict[str, str] = {}
    settings = run.metrics.get("settings", {})
    options = {name: settings[name] for name in SOURCE_OPTIONS if name in settings}
    try:
        split = open_split(run.metrics["dataset"], run.metrics["split"], settings.get("limit"), **options)
    except UserError as error:
        print(f"the images cannot be shown: {error}")
        return found
    wanted = set(ids)
    for example in split.examples:
        if example.id in wanted:
            try:
                found[example.id] = image_url(example.load())
            except ImageError as error:
                print(f"{example.id} cannot be shown: {error}")
    return found


def _explained(a: Run, b: Run) -> list[dict]:
    """Return the attention maps of both runs for the images that both reports have."""
    both = []
    for run in (a, b):
        page = run.path / "report.html"
        items = embedded_data(page).get("explained", []) if page.is_file() else []
        both.append({item["id"]: item for item in items if item.get("id")})
    return [{"id": key, "a": both[0][key], "b": both[1][key]} for key in both[0] if key in both[1]]


def _curves(a: Run, b: Run) -> list[dict]:
    """Return the training curves of both runs, one panel a quantity."""
    panels: dict[str, list[dict]] = {}
    for label, run in (("A", a), ("B", b)):
        settings = run.metrics.get("settings", {})
        for panel in training_curves(settings.get("run") or settings.get("model"))[0]:
            lines = [{"name": f"{label}: {line['name']}", "points": line["points"]} for line in panel["lines"]]
            panels.setdefault(panel["title"], []).extend(lines)
    return [{"title": title, "lines": lines} for title, lines in panels.items()]


def compare(settings: CompareSettings) -> None:
    """Run the command `compare`. Raises `UserError` for what the user can repair."""
    a, b = read_run(settings.run_a), read_run(settings.run_b)
    out = Path(settings.out or settings.run_b)
    print(f"comparing A = {a.path} with B = {b.path}, paired over the images of both")
    pairs, per_image = paired_statistics(a, b)
    table = {}
    for name, (first, second) in pairs.items():
        difference = asdict(paired_difference(first, second, settings.resamples, settings.seed))
        table[name] = difference | {"b_is": verdict(name, difference["low"], difference["high"])}
    changed = sorted(per_image, key=lambda key: (-abs(per_image[key][1] - per_image[key][0]), key))
    same_text = sum(a.captions[key]["caption"] == b.captions[key]["caption"] for key in per_image)
    counts = {
        "images": len(a.images & b.images),
        "only_in_a": len(a.images - b.images),
        "only_in_b": len(b.images - a.images),
        "same_caption": same_text,
    }
    result = {
        "a": str(a.path),
        "b": str(b.path),
        "metrics": table,
        "counts": counts,
        "resamples": settings.resamples,
        "seed": settings.seed,
        "changed_most": [
            {
                "id": key,
                "a": a.captions[key]["caption"],
                "b": b.captions[key]["caption"],
                "cider_a": per_image[key][0],
                "cider_b": per_image[key][1],
            }
            for key in changed[: settings.images]
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "compare.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    urls = _image_urls(b, [item["id"] for item in result["changed_most"]])
    for item in result["changed_most"]:
        item["image"] = urls.get(item["id"])
        item["references"] = a.captions[item["id"]]["references"]
    looks = {label: run.metrics.get("image_use", {}).get("verdict") for label, run in (("a", a), ("b", b))}
    page = result | {"verdicts": looks, "explained": _explained(a, b), "curves": _curves(a, b)}
    subtitle = f"A: {a.path}; B: {b.path}; {counts['images']:,} images in common"
    write_atomically(out / "compare.html", render_page(page, "compare.js", f"{a.name} and {b.name}", subtitle))
    for name, row in table.items():
        print(
            f"{name:>22}: {row['a']:.4f} -> {row['b']:.4f}, difference {row['difference']:+.4f} "
            f"({row['low']:+.4f} to {row['high']:+.4f}), p {row['p_value']:.3f}: {row['b_is']}"
        )
    print(f"compare.json and compare.html are in {out}")
