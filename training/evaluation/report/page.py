"""report.html: an evaluation as one self-contained page. Everything is embedded; nothing is fetched."""

from __future__ import annotations

import datetime
import html
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from blipren.training.data.sources.images import ImageError
from blipren.training.evaluation.attention import Explanation, explain, query_statistics
from blipren.training.evaluation.conversations import conversation_items
from blipren.training.evaluation.metrics.hallucination import COCO_WORDS, singular
from blipren.training.evaluation.report.boxes import draw_samples, place_items
from blipren.training.evaluation.report.card_pictures import write_example
from blipren.training.evaluation.report.pictures import image_url, map_bytes, sample_grid
from blipren.training.evaluation.report.training import preference_lines, text_loss_line, training_curves
from blipren.training.evaluation.results import PER_IMAGE, SIMILARITIES, Evaluation
from blipren.training.files import write_atomically

HERE = Path(__file__).parent
SHOWN_SETTINGS = (
    "model", "dataset", "tasks", "split", "limit", "prompt", "max_new_tokens", "num_beams", "length_penalty",
    "no_repeat_ngram_size", "batch_size", "tokenizer", "resamples", "seed", "before", "predictions",
)  # fmt: skip
HIDDEN_SCORES = ("BLEU-4", "RefCLIPScore", "RefSigLIPScore")
"""Scores that the report does not show for single images."""


def render_page(data: dict, script: str, title: str, subtitle: str) -> str:
    """Return the page as one text, with style, scripts and data inside.

    Captions are untrusted text: inside the data block `<` is escaped, so that no caption can end the block.
    """
    embedded = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    scripts = "\n".join((HERE / name).read_text(encoding="utf-8") for name in ("report_common.js", script))
    parts = {
        "title": html.escape(title),
        "subtitle": html.escape(subtitle),
        "style": (HERE / "report.css").read_text(encoding="utf-8"),
        "data": embedded,
        "script": scripts,
    }
    page = (HERE / "report.html").read_text(encoding="utf-8")
    return re.sub(r"@@(\w+)@@", lambda found: parts[found.group(1)], page)


def _finite(value):
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ------------------------------------------------------------------------------------------------------- headline
def _tile(name: str, values: dict, key: str, before: dict | None = None, full: float | None = None, note: str = ""):
    tile = {"name": name, "value": values.get(key), "note": note, "full": full}
    if key in values.get("intervals", {}):
        tile["low"], tile["high"] = values["intervals"][key]
    if before is not None and before.get(key) is not None:
        tile["before"] = before[key]
    return tile


def headline_tiles(metrics: dict) -> list[dict]:
    """Return name, value and interval of the most important numbers."""
    tiles: list[dict] = []
    before = metrics.get("before", {})
    captioning = metrics.get("captioning")
    if captioning:
        earlier = before.get("captioning")
        tiles += [_tile(n, captioning, n, earlier) for n in ("CIDEr", "BLEU-4", "ROUGE-L", "METEOR")]
        similar = [n for n in SIMILARITIES if n in captioning]
        tiles[3]["note"] = next((note for note in captioning["notes"] if note.startswith("METEOR")), "")
        tiles += [_tile(n, captioning, n) for n in similar]
    found = metrics.get("hallucination")
    if found:
        earlier = before.get("hallucination")
        names = {"captions_true": "true captions", "hallucinated_objects": "hallucinated objects"}
        if "captions_true" not in found:
            names = {"CHAIR_i": "hallucinated objects", "CHAIR_s": "captions with such an object"}
        tiles += [_tile(label, found, key, earlier, 1.0) for key, label in names.items()]
        tiles[-1]["note"] = f"by {found['truth']}"
    if "vqa" in metrics:
        tiles.append(_tile("question accuracy", metrics["vqa"], "accuracy", None, 1.0))
    if "choice" in metrics:
        choice = metrics["choice"]
        for name in ("likelihood", "generation"):
            tiles.append(_tile(f"choices, by {name}", choice, f"accuracy_{name}", None, 1.0))
            tiles[-1]["note"] = f"chance {choice['chance']:.3f}"
    for key in ("accuracy", "several_F1", "absent_refused", "counting", "pointing"):
        if key in metrics.get("refer", {}):
            tiles.append(_tile(f"boxes: {key.replace('_', ' ')}", metrics["refer"], key, None, 1.0))
            if (fixed := metrics["refer"].get("centre_box", {}).get(key)) is not None:
                tiles[-1]["note"] = f"centre box {fixed:.3f}"
    for way, label in (("image_to_text", "image → text R@1"), ("text_to_image", "text → image R@1")):
        if "retrieval" in metrics:
            tile = {"name": label, "value": metrics["retrieval"][way]["R@1"], "full": 1.0}
            low, high = metrics["retrieval"]["intervals"][f"{way}.R@1"]
            tiles.append(tile | {"low": low, "high": high})
    if captioning:
        tiles.append({"name": "different captions", "value": captioning["unique_captions"], "full": 1.0})
        tiles.append({"name": "words per caption", **_interval_of(captioning, "length")})
        if "cut_off" in captioning:
            tiles.append({"name": "cut off", **_interval_of(captioning, "cut_off"), "full": 1.0})
    return tiles


def _interval_of(values: dict, key: str) -> dict:
    low, high = values["intervals"][key]
    return {"value": values[key], "low": low, "high": high}


# --------------------------------------------------------------------------------------------------------- images
def choose_images(result: Evaluation, count: int) -> list[int]:
    """Return the positions of the examples to show: the best, the worst, the most hallucinated, and some between."""
    scores = result.caption_scores
    positions = [i for i, e in enumerate(result.examples) if scores is None or e.id in scores.per_image["CIDEr"]]
    if len(positions) <= count:
        return positions
    examples = result.examples

    def score(i: int) -> float:
        if scores is not None:
            return scores.per_image["CIDEr"][examples[i].id]
        own = [result.answers[examples[i].id, q]["exact"] for q in examples[i].questions]
        return sum(own) / max(1, len(own))

    ordered = sorted(positions, key=lambda i: (-score(i), i))
    part = count // 4
    chosen = dict.fromkeys(ordered[:part] + ordered[-part:])
    if result.hallucination is not None:
        wrong = result.hallucination.per_image
        worst = sorted(positions, key=lambda i: (-len(wrong.get(examples[i].id, {}).get("hallucinated", [])), i))
        chosen |= dict.fromkeys(worst[:part])
    for k in range(count):
        if len(chosen) >= count:
            break
        chosen.setdefault(ordered[k * len(ordered) // count])
    return sorted(chosen)


def _wrong_words(caption: str, categories: Sequence[str]) -> list[str]:
    """Return the words of a caption that name hallucinated categories."""
    words = {w for c in categories for w in (*c.split(), *COCO_WORDS.get(c, "").replace("_", " ").split())}
    return [w for w in re.findall(r"[a-z]+", caption.lower()) if singular(w) in words or w in words]


def image_items(result: Evaluation, positions: Sequence[int], before: Evaluation | None) -> list[dict]:
    """Return what the grid shows of each image."""
    items = []
    for position in positions:
        example = result.examples[position]
        try:
            url = image_url(example.load())
        except ImageError:
            continue  # the images of given captions may be missing
        caption = result.captions.get(example.id, {})
        item = {
            "id": example.id,
            "index": position,
            "image": url,
            "caption": caption.get("text", ""),
            "references": example.references,
            "ended": caption.get("ended_by_eos"),
            "scores": {},
            "hallucinated": 0,
            "group": example.facts.get("group"),
        }
        if result.caption_scores is not None and example.id in result.caption_scores.per_image["CIDEr"]:
            per_image = result.caption_scores.per_image
            item["scores"] = {
                n: per_image[n][example.id] for n in PER_IMAGE if n in per_image and n not in HIDDEN_SCORES
            }
        if result.hallucination is not None and example.id in result.hallucination.per_image:
            found = result.hallucination.per_image[example.id]
            item["hallucinated"] = len(found["hallucinated"])
            if "objects" in found:
                item["wrong_words"] = _wrong_words(item["caption"], found["hallucinated"])
            else:
                item |= {"true": found["true"], "problems": found["problems"]}
        if "copied" in caption:
            item |= {"copied": caption["copied"], "neighbours": result.records[example.id]["neighbours"]}
        if before is not None and example.id in before.captions:
            item["before"] = before.captions[example.id]["text"]
            item["before_score"] = before.caption_scores.per_image["CIDEr"].get(example.id)
        answers = [(q, result.answers[example.id, q]) for q in example.questions if (example.id, q) in result.answers]
        item["answers"] = [{"question": q, **answer} for q, answer in answers]
        if not item["caption"] and answers:
            item["caption"] = f"{answers[0][0]} {answers[0][1]['text']}"
            item["scores"] = {"exact": sum(a["exact"] for _, a in answers) / len(answers)}
        items.append(item)
    return items


# ------------------------------------------------------------------------------------------------------ attention
def attention_item(shown: Explanation) -> dict:
    """Return an image of the attention explorer. The mean over layers follows the maps of the layers."""
    item = {
        "seen": image_url(shown.seen, 420, 85),
        "caption": shown.caption,
        "words": shown.words,
        "word_maps": map_bytes(shown.word_maps) if shown.words else "",
        "norms": map_bytes(shown.norms),
        "height": shown.norms.shape[-2],
        "width": shown.norms.shape[-1],
        "layers": 0,
        "queries": 0,
        "router": shown.router,
    }
    if shown.queries is not None:
        maps = torch.cat([shown.queries, shown.queries.mean(dim=0, keepdim=True)])
        item |= {"layers": len(shown.queries), "queries": shown.queries.shape[1]}
        item |= {"query_maps": map_bytes(maps), "mean_maps": map_bytes(maps.mean(dim=1))}
    return item


def explain_images(result: Evaluation, model, processor, settings) -> tuple[list[dict], dict | None]:
    """Return the images of the attention explorer, and statistics of the queries over them if they share a grid.

    The images are spread evenly over the split and do not depend on scores, so that two reports show the same ones.
    """
    examples, shown = (
        [example for example in result.examples if example.row.image is not None and not example.row.video],
        [],
    )
    count = min(settings.attention_images, len(examples))
    for position in (k * len(examples) // count for k in range(count)):
        example = examples[position]
        prompt, text = settings.prompt, result.captions.get(example.id, {}).get("text")
        if text is None and example.questions:
            prompt = next(iter(example.questions))
            text = result.answers.get((example.id, prompt), {}).get("text")
        limit = {"max_new_tokens": settings.max_new_tokens}  # used if nothing was generated yet
        shown.append((example.id, explain(model, processor, example.load(), prompt, text, **limit)))
    maps = [s.queries for _, s in shown if s.queries is not None]
    statistics = None
    if maps and len({m.shape for m in maps}) == 1:
        statistics = vars(query_statistics(torch.stack(maps)))
    return [{"id": key, **attention_item(s)} for key, s in shown], statistics


# --------------------------------------------------------------------------------------------------- retrieval
def retrieval_item(result: Evaluation, similarities: torch.Tensor | None, count: int = 8) -> dict | None:
    """Return recall in both directions, and the similarity of a few images with their first captions."""
    values = result.metrics.get("retrieval")
    if values is None:
        return None
    kinds = ("image_to_text", "text_to_image", "reranked", "chance", "encoder_zero_shot")
    item = {kind: values[kind] for kind in kinds if values.get(kind) is not None}
    if similarities is not None:
        by_id = {example.id: example for example in result.examples}
        examples = [by_id[key] for key in values["ids"]]
        starts, position = [], 0
        for example in examples:
            starts.append(position)
            position += len(example.references)
        rows = [i * len(examples) // count for i in range(min(count, len(examples)))]
        item["grid"] = {
            "images": [image_url(examples[i].load(), 140) for i in rows],
            "captions": [examples[i].references[0] for i in rows],
            "scores": similarities[rows][:, [starts[i] for i in rows]].tolist(),
        }
    return item


# ----------------------------------------------------------------------------------------------------------- page
def report_data(result: Evaluation, settings, model=None, processor=None, before=None, similarities=None) -> dict:
    """Return everything that the page shows, as JSON values."""
    metrics = result.metrics
    positions = choose_images(result, settings.report_images) if result.captions or result.answers else []
    explained, queries = [], None
    if model is not None and settings.attention_images > 0:
        explained, queries = explain_images(result, model, processor, settings)
    curves, chosen = training_curves(settings.run or settings.model)
    counts, captioning = metrics["counts"], metrics.get("captioning", {})
    tokenizer = captioning.get("tokenizer")
    tokenizers = {
        "java": "Stanford's PTB tokenizer (Java)",
        "python": "PTB tokenizer in Python",
        "whitespace": "white space",
    }
    config = getattr(model, "config", None)
    measured = {
        "images": f"{counts['images']:,} of split {counts['split']!r}",
        "rows of the data set": ", ".join(f"{name} {count:,}" for name, count in counts["rows"].items()),
        "references": f"{counts['references']:,}",
        "questions": f"{counts['questions']:,}" if counts["questions"] else None,
        "rejected images": ", ".join(f"{name} {n}" for name, n in counts["rejected"].items()) or "none",
        "tokenizer of the metrics": tokenizers.get(tokenizer),
        "intervals": f"95%, {settings.resamples:,} bootstrap samples of images",
        "weights": metrics["model"].get("weights"),
        "vision encoder": _base(config, "vision"),
        "second vision encoder": _base(config, "second_vision"),
        "language model": _base(config, "llm"),
        "connector": f"{config.connector}, {config.projector}" if config is not None else None,
        "versions": ", ".join(f"{name} {version}" for name, version in metrics["versions"].items()),
        "loss of text without images": text_loss_line(settings.run or settings.model),
        **preference_lines(settings.run or settings.model),
        "seconds": metrics["seconds"],
        "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    chosen_settings = {name: getattr(settings, name) for name in SHOWN_SETTINGS}
    shown = {k: ", ".join(v) if isinstance(v, list) else v for k, v in chosen_settings.items() if v not in (None, [])}
    return _finite(
        {
            "tiles": [tile for tile in headline_tiles(metrics) if tile["value"] is not None or tile.get("note")],
            "notes": captioning.get("notes", []),
            "image_use": metrics.get("image_use"),
            "gallery": image_items(result, positions, before),
            "images": len(result.examples),
            "explained": explained,
            "queries": queries,
            "retrieval": retrieval_item(result, similarities),
            "vqa": metrics.get("vqa"),
            "choice": metrics.get("choice"),
            "conversations": conversation_items(result.asked_in_context, settings.report_images),
            "places": place_items(result, settings.report_images),
            "pope": metrics.get("pope"),
            "routing": metrics.get("routing"),
            "curves": curves,
            "chosen_step": chosen,
            "measured": {k: str(v) for k, v in measured.items() if v is not None},
            "settings": {k: str(v) for k, v in shown.items()},
            "metrics": metrics,
        }
    )


def _base(config, part: str) -> str | None:
    """Return id and revision of a frozen part."""
    base = (getattr(config, "base_models", None) or {}).get(part)
    if base is None:
        return None
    revision = f" @ {base['revision'][:12]}" if base.get("revision") else ""
    return f"{base['id']}{revision}"


def embedded_data(page: Path) -> dict:
    """Return the data of a report that was written earlier."""
    found = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    return json.loads(found.group(1)) if found else {}


def write_report(
    out: Path, result: Evaluation, settings, model=None, processor=None, before=None, similarities=None
) -> Path:
    """Write report.html into the evaluation folder, and samples.png, attention.png and example.png for the model card."""
    data = report_data(result, settings, model, processor, before, similarities)
    title = f"Evaluation of {Path(settings.model).name}"
    if settings.predictions is not None:
        title = f"Captions of {Path(settings.predictions).name}"
    counts = result.metrics["counts"]
    subtitle = f"{counts['images']:,} images of split {counts['split']!r} of {settings.dataset}"
    images, captions = draw_samples(result)
    if images:
        sample_grid(out / "samples.png", images, captions)
    if model is not None and settings.attention_images > 0:
        write_example(out, result, model, processor, settings.prompt)
    path = out / "report.html"
    write_atomically(path, render_page(data, "report.js", title, subtitle))
    return path
