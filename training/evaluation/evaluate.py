"""The `evaluate` command: a checkpoint on a held-out split -> metrics.json, predictions, report.html."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from importlib import metadata
from pathlib import Path

import torch

from blipren.base_models_blipren import hash_weights, weight_files
from blipren.training.commands.evaluate import EvaluateSettings
from blipren.training.engine.device import choose_device
from blipren.training.errors import UserError
from blipren.training.evaluation.captioning import Features, encode_photos, load_model
from blipren.training.evaluation.examples import Split, open_split
from blipren.training.evaluation.inference import SweepPlan, batches_of_photos, fixed_answers, sweep, sweep_pope
from blipren.training.evaluation.metrics.pope import pope_questions, pope_scores, scene_objects
from blipren.training.evaluation.results import (
    Evaluation,
    add_answers,
    add_captions,
    add_image_use,
    add_ranks,
    add_routing,
    add_similarity,
    is_caption,
    prediction_rows,
    read_lines,
    split_counts,
    write_predictions,
)
from blipren.training.files import write_atomically

NO_TEXT_TOWER = "No image-text similarity: the vision encoder has no text tower, or is not here."
VERSIONS = ("blipren", "torch", "transformers", "datasets", "pycocoevalcap", "numpy", "pillow")


def model_fingerprint(path: str) -> str:
    """What a checkpoint is, whatever its folder is called: a hash of its weights (samples of large ones)."""
    return hash_weights(weight_files(path), sampled=True)[:16]


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in VERSIONS:
        found[name] = metadata.version(name)
    return found


def read_predictions(path: str, split: Split) -> dict[str, dict]:
    """Captions by image id, from JSON lines with `id` and `caption`, or from one JSON object.

    Raises:
        UserError: no such file, not JSON, or images of the split without a caption.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: there is no such file of predictions")
    try:
        if file.suffix == ".json":
            given = {str(key): value for key, value in json.loads(file.read_text(encoding="utf-8")).items()}
        else:
            given = {str(row["id"]): row["caption"] for row in read_lines(file) if is_caption(row)}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path}: predictions are JSON lines with id and caption, or one JSON object of captions by id "
            f"({type(error).__name__}: {error})"
        ) from error
    missing = [e.id for e in split.examples if e.references and not isinstance(given.get(e.id), str)]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of the {len(split.examples)} images have no caption there, such as {missing[0]!r}"
        )
    return {e.id: {"text": given[e.id]} for e in split.examples if isinstance(given.get(e.id), str)}


def _check_texts(settings: EvaluateSettings, split: Split) -> None:
    has_references = any(e.references for e in split.examples)
    has_questions = any(e.questions for e in split.examples)
    for task, there, what in (
        ("captioning", has_references, "captions"),
        ("retrieval", has_references, "captions"),
        ("vqa", has_questions, "questions"),
    ):
        if task in settings.tasks and not there:
            others = "vqa" if has_questions else "captioning"
            raise UserError(
                f"{settings.dataset}: split {split.name!r} has no {what}, which --tasks {task} needs; name the column "
                f"(--caption-columns, --question-column), or choose --tasks {others}"
            )


def _retrieval(settings: EvaluateSettings, split: Split, result: Evaluation) -> torch.Tensor:
    """Recall of all images and captions. Returns their similarities, of which the report shows a grid."""
    from blipren import BliprenForImageTextRetrieval
    from blipren.training.engine.loading import load_checkpoint
    from blipren.training.evaluation.metrics.retrieval import (
        evaluate_retrieval,
        first_grid,
        ranks_of_images,
        zero_shot_beside,
    )

    model, processor = load_checkpoint(settings.model, BliprenForImageTextRetrieval)
    model = model.to(choose_device(settings.device)).eval()
    if processor.qformer_tokenizer is None:
        raise UserError(f"{settings.model} has no text side: --tasks retrieval needs a checkpoint of `blipren align`")
    examples = [e for e in split.examples if e.references]
    parts, kept = [], []
    for good, photos in batches_of_photos(examples, settings.batch_size):
        parts.append(encode_photos(model, processor, photos, settings.batch_size))
        kept += good
    masks = [p.mask for p in parts]
    features = Features(torch.cat([p.patches for p in parts]), None if masks[0] is None else torch.cat(masks))

    def take(indices: list[int]):
        chosen = features[indices]
        return chosen.patches, chosen.mask

    metrics, scores = evaluate_retrieval(
        model,
        processor.qformer_tokenizer,
        take,
        [e.references for e in kept],
        batch_size=settings.batch_size,
        rerank=settings.rerank,
    )
    metrics["ids"] = [e.id for e in kept]
    captions = [e.references for e in kept]
    metrics["encoder_zero_shot"] = zero_shot_beside(model, lambda index: kept[index].load(), captions)
    first_grid(Path(settings.out) / "similarity.png", lambda index: kept[index].load(), captions, scores)
    result.metrics["retrieval"] = metrics
    add_ranks(result, settings, dict(zip(metrics["ids"], ranks_of_images(scores, captions))))
    return scores


def _similarity(settings: EvaluateSettings, result: Evaluation, model) -> None:
    """CLIPScore or SigLIPScore, where the encoder has a text tower."""
    from blipren.training.evaluation.metrics.clip_score import caption_scores, towers_beside

    towers = towers_beside(model, choose_device(settings.device))
    if towers is None:
        result.caption_scores.notes.append(NO_TEXT_TOWER)
        return
    scored = [e for e in result.examples if e.id in set(result.caption_scores.ids)]
    batches = (
        (photos, [result.captions[e.id]["text"] for e in good], [e.references for e in good])
        for good, photos in batches_of_photos(scored, settings.batch_size)
    )
    add_similarity(result, settings, caption_scores(towers, batches), model.config.base_models["vision"]["id"])


def _pope(settings: EvaluateSettings, split: Split, result: Evaluation, model, processor) -> None:
    objects = {}
    for example in split.examples:
        if "scene" in example.facts:
            objects[example.id] = scene_objects(example.facts["scene"])
        elif example.facts.get("objects"):
            objects[example.id] = [o["category"] for o in example.facts["objects"]]
    if not objects:
        raise UserError(
            f"{settings.dataset}: nothing says what is in its pictures, which --tasks pope needs: its metadata.jsonl "
            "has neither `objects` (with a category each) nor `scene`"
        )
    questions = pope_questions(objects, seed=settings.seed)
    result.asked, result.said = sweep_pope(model, processor, split.examples, questions, settings.batch_size)
    scores = pope_scores(result.asked, result.said, settings.resamples, settings.seed)
    result.metrics["pope"] = {**scores, "images": len({question.image for question in result.asked})}


def _headline(metrics: dict) -> list[str]:
    lines = []
    captioning = metrics.get("captioning")
    if captioning:
        low, high = captioning["intervals"]["CIDEr"]
        values = {name: captioning[name] for name in ("BLEU-4", "ROUGE-L", "METEOR")}
        rest = ", ".join(f"{n} {'none' if v is None else format(v, '.4f')}" for n, v in values.items())
        lines.append(f"captioning: CIDEr {captioning['CIDEr']:.4f} ({low:.4f} to {high:.4f}), {rest}")
        lines += [f"  {note}" for note in captioning["notes"]]
    if "hallucination" in metrics:
        shown = {n: v for n, v in metrics["hallucination"].items() if isinstance(v, float)}
        lines.append("hallucination: " + ", ".join(f"{n} {v:.3f}" for n, v in shown.items()))
    if "vqa" in metrics:
        vqa = metrics["vqa"]
        lines.append(
            f"vqa: accuracy {vqa['accuracy']:.4f}, soft score {vqa['soft_score']:.4f} ({vqa['questions']} questions)"
        )
    if "retrieval" in metrics:
        for way in ("image_to_text", "text_to_image"):
            for kind in ("", "reranked", "encoder_zero_shot", "chance"):
                values = metrics["retrieval"] if not kind else metrics["retrieval"].get(kind)
                if values is not None:
                    shown = ", ".join(f"{n} {values[way][n]:.3f}" for n in ("R@1", "R@5", "R@10"))
                    lines.append(f"{way}{kind and ', ' + kind.replace('_', ' ')}: {shown}")
    for strategy, values in metrics.get("pope", {}).items():
        if isinstance(values, dict):
            lines.append(f"POPE {strategy}: accuracy {values['accuracy']:.3f}, F1 {values['F1']:.3f}")
    if "image_use" in metrics:
        lines.append(f"verdict: the model {metrics['image_use']['verdict']}. {metrics['image_use']['because']}")
    return lines


def evaluate(settings: EvaluateSettings) -> None:
    """The `evaluate` command. Raises `UserError` for what the user can repair."""
    begin = time.perf_counter()
    split = open_split(settings.dataset, settings.split, settings.limit, **settings.source_options())
    _check_texts(settings, split)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    print(f"evaluating {settings.model} on {split.describe()}; tasks: {', '.join(settings.tasks)}")

    result = Evaluation(examples=split.examples)
    model = processor = similarities = None
    generates = {"captioning", "vqa", "pope"} & set(settings.tasks) and settings.predictions is None
    partial = out / "partial.jsonl"
    if settings.predictions is not None:
        captions = read_predictions(settings.predictions, split)
        add_captions(result, settings, captions, settings.meteor)
    elif generates:
        model, processor = load_model(settings.model, settings.device)
        plan = SweepPlan(
            captions="captioning" in settings.tasks,
            questions="vqa" in settings.tasks,
            probe=settings.probe,
            prompt=settings.prompt,
            generation=settings.generate_options(),
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        records = sweep(model, processor, split, plan, partial, model_fingerprint(settings.model))
        result.records = {record["id"]: record for record in records}
        result.examples = [e for e in split.examples if "rejected" not in result.records[e.id]]
        if not result.examples:
            raise UserError(f"{settings.dataset}: none of the {len(split.examples)} images could be read")
        captions = {
            e.id: result.records[e.id]["caption"] for e in result.examples if "caption" in result.records[e.id]
        }
        if plan.captions:
            add_captions(result, settings, captions, settings.meteor)
            if settings.similarity:
                _similarity(settings, result, model)
        if plan.questions:
            add_answers(result, settings)
        if plan.probe:
            first = [next(iter(e.questions)) for e in result.examples if e.questions and plan.questions]
            prompts = [settings.prompt] * plan.captions + first
            add_image_use(result, settings, fixed_answers(model, processor, prompts, plan) if prompts else {})
        add_routing(result)
        if "pope" in settings.tasks:
            _pope(settings, split, result, model, processor)
    if "retrieval" in settings.tasks:
        similarities = _retrieval(settings, split, result)
    before = _before(settings, split, result) if settings.before is not None else None

    result.metrics["counts"] = split_counts(split, list(result.records.values()))
    result.metrics["split"] = split.name
    result.metrics["dataset"] = settings.dataset
    result.metrics["model"] = {"path": settings.model}
    if settings.predictions is None:
        result.metrics["model"]["weights"] = model_fingerprint(settings.model)
    result.metrics["settings"] = dataclasses.asdict(settings)
    result.metrics["versions"] = versions()
    if before is not None:
        result.metrics["before"] = before.metrics
    result.metrics["seconds"] = round(time.perf_counter() - begin, 2)
    prompt = settings.prompt if settings.prompt is not None or processor is None else processor.prompts[0]
    write_predictions(out, prediction_rows(result, prompt))
    write_atomically(out / "metrics.json", json.dumps(result.metrics, indent=1, ensure_ascii=False) + "\n")
    print("\n".join(_headline(result.metrics)))
    if settings.report:
        from blipren.training.evaluation.report.page import write_report

        write_report(out, result, settings, model, processor, before=before, similarities=similarities)
    partial.unlink(missing_ok=True)  # not before: a run killed while the report is made keeps its answers
    kinds = "metrics.json predictions.jsonl predictions.csv" + " report.html" * settings.report
    print(f"{result.metrics['counts']['images']:,} images of split {split.name!r}: {kinds} are in {out}")


def _before(settings: EvaluateSettings, split: Split, result: Evaluation) -> Evaluation:
    """Captions of an earlier checkpoint on the same photos, scored the same way; its evaluation spares making them."""
    same = Split(split.dataset, split.name, result.examples, split.rows, split.fingerprint)
    partial, said = Path(settings.out) / "partial-before.jsonl", Path(settings.before) / "predictions.jsonl"
    if said.is_file():
        captions = read_predictions(str(said), same)
    else:
        model, processor = load_model(settings.before, settings.device)
        generation = settings.generate_options()
        plan = SweepPlan(probe=False, prompt=settings.prompt, generation=generation, batch_size=settings.batch_size)
        records = sweep(model, processor, same, plan, partial, model_fingerprint(settings.before))
        captions = {record["id"]: record["caption"] for record in records}
    earlier = Evaluation(examples=result.examples)
    add_captions(earlier, settings, captions, meteor=False)
    partial.unlink(missing_ok=True)
    return earlier
