"""The command `evaluate`: from a checkpoint and a split to metrics.json, the predictions and report.html."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from importlib import metadata
from pathlib import Path

import torch

from blipren.training.commands.evaluate import EvaluateSettings
from blipren.training.data.sources.open_rows import grounding_options
from blipren.training.engine.device import choose_device
from blipren.training.engine.loading import load_config, model_fingerprint
from blipren.training.errors import UserError
from blipren.training.evaluation.conversations import ask_conversations, conversation_metrics, conversation_rows
from blipren.training.evaluation.examples import Split, open_split
from blipren.training.evaluation.features import PatchFeatures, encode_images
from blipren.training.evaluation.generation import load_model
from blipren.training.evaluation.inference import (
    InferencePlan,
    answer_pope,
    answers_without_image,
    image_batches,
    run_inference,
)
from blipren.training.evaluation.judges import find_judge, installed_judges
from blipren.training.evaluation.metrics.pope import pope_questions, pope_scores
from blipren.training.evaluation.refer import add_places, place_lines
from blipren.training.evaluation.results import (
    Evaluation,
    add_answers,
    add_captions,
    add_clip_scores,
    add_image_use,
    add_memory,
    add_ranks,
    add_routing,
    is_caption,
    prediction_rows,
    read_lines,
    split_counts,
    write_predictions,
)
from blipren.training.files import write_atomically

NO_TEXT_TOWER = "No image-text similarity: the vision encoder has no text tower, or is not here."
VERSIONS = ("blipren", "torch", "transformers", "datasets", "pycocoevalcap", "numpy", "pillow")


def evaluate(settings: EvaluateSettings) -> None:
    """Run the command `evaluate`. Raises `UserError` for what the user can repair."""
    begin = time.perf_counter()
    _check_heads(settings)
    options = settings.source_options() | grounding_options(settings)
    split = open_split(settings.dataset, settings.split, settings.limit, **options)
    _check_texts(settings, split)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    print(f"evaluating {settings.model} on {split.describe()}; tasks: {', '.join(settings.tasks)}")

    result = Evaluation(examples=split.examples)
    model = processor = similarities = before = None
    partial = out / "partial.jsonl"
    if settings.predictions is not None:
        add_captions(result, settings, read_predictions(settings.predictions, split), settings.meteor)
    elif {"captioning", "vqa", "choice", "pope", "refer"} & set(settings.tasks):
        model, processor = load_model(settings.model, settings.device)
        conversations = [example for example in split.examples if example.row.conversation is not None]
        rest = {"captioning", "pope", "refer"} | ({"vqa"} if len(conversations) < len(split.examples) else set())
        alone = not rest & set(settings.tasks)
        if not alone:
            _evaluate_answers(settings, split, result, model, processor, partial)
        if conversations and {"vqa", "choice"} & set(settings.tasks):
            result.asked_in_context, rejected = ask_conversations(
                model, processor, conversations, settings, "choice" in settings.tasks
            )
            result.metrics |= conversation_metrics(result.asked_in_context, settings)
            result.records |= {record["id"]: record for record in rejected} if alone else {}
    if "retrieval" in settings.tasks:
        similarities = _evaluate_retrieval(settings, split, result)
    if settings.before is not None:
        before = _evaluate_before(settings, split, result)

    _add_provenance(settings, split, result)
    if before is not None:
        result.metrics["before"] = before.metrics
    result.metrics["seconds"] = round(time.perf_counter() - begin, 2)
    prompt = settings.prompt if settings.prompt is not None or processor is None else processor.prompts[0]
    write_predictions(out, prediction_rows(result, prompt) + conversation_rows(result.asked_in_context))
    write_atomically(out / "metrics.json", json.dumps(result.metrics, indent=1, ensure_ascii=False) + "\n")
    print("\n".join(summary_lines(result.metrics)))
    if settings.report:
        from blipren.training.evaluation.report.page import write_report

        write_report(out, result, settings, model, processor, before=before, similarities=similarities)
    partial.unlink(missing_ok=True)  # only now: a run that is killed while it writes the report keeps its answers
    kinds = "metrics.json predictions.jsonl predictions.csv" + " report.html" * settings.report
    print(f"{result.metrics['counts']['images']:,} images of split {split.name!r}: {kinds} are in {out}")


# ---------------------------------------------------------------------------------------------------------- tasks
def _evaluate_answers(
    settings: EvaluateSettings, split: Split, result: Evaluation, model, processor, partial: Path
) -> None:
    """Run the inference pass and add captioning, VQA, image use, routing and POPE to the result."""
    options = settings.generate_options()
    if model.memory is not None and settings.memory:
        model.memory.leave_out_duplicates = True  # the data set may be the one of the memory
    options |= {f"use_{name}": False for name in ("memory", "reranker") if not getattr(settings, name)}
    plan = InferencePlan(
        captions="captioning" in settings.tasks,
        questions="vqa" in settings.tasks,
        image_use=settings.probe,
        prompt=settings.prompt,
        generation=options,
        num_frames=model.config.num_frames if split.examples[0].row.video else None,
        batch_size=settings.batch_size,
        seed=settings.seed,
        grounding=tuple(settings.grounding),
        bbox_format=settings.bbox_format,
        category_names=split.category_names,
    )
    fingerprint = model_fingerprint(settings.model)
    for ranking in (model.memory, model.reranker):
        fingerprint += "" if ranking is None else ranking.fingerprint()
    records = run_inference(model, processor, split, plan, partial, fingerprint)
    result.records = {record["id"]: record for record in records}
    result.examples = [e for e in split.examples if "rejected" not in result.records[e.id]]
    if not result.examples:
        raise UserError(f"{settings.dataset}: none of the {len(split.examples)} images could be read")
    if plan.captions:
        captions = {e.id: result.records[e.id]["caption"] for e in result.examples}
        add_captions(result, settings, captions, settings.meteor)
        ranked = plan.num_frames is None and settings.prompt in (None, *processor.prompts)
        if ranked and model.memory is not None and settings.memory:
            add_memory(result, model.memory)
        elif ranked and model.reranker is not None and settings.reranker:
            made = {"images": model.reranker.info["images"]}
            result.metrics["reranker"] = dataclasses.asdict(model.reranker.settings) | made
        if settings.similarity:
            _score_similarity(settings, result, model)
    if plan.questions:
        add_answers(result, settings)
    if plan.grounding:
        if not any("places" in record for record in records):
            raise UserError(
                f"{settings.dataset}: no image of split {split.name!r} has boxes or points for --tasks refer; see "
                "docs/how-to/boxes.md for the columns, or choose other --tasks"
            )
        add_places(result, settings)
    if plan.image_use:
        first = [next(iter(e.questions)) for e in result.examples if e.questions and plan.questions]
        prompts = [settings.prompt] * plan.captions + first
        add_image_use(result, settings, answers_without_image(model, processor, prompts, plan) if prompts else {})
    add_routing(result)
    if "pope" in settings.tasks:
        _evaluate_pope(settings, split, result, model, processor)


def _score_similarity(settings: EvaluateSettings, result: Evaluation, model) -> None:
    """Add CLIPScore or SigLIPScore, if the vision encoder has a text tower."""
    from blipren.training.evaluation.metrics.clip_score import clip_scores, load_towers

    towers = load_towers(model, choose_device(settings.device))
    if towers is None:
        result.caption_scores.notes.append(NO_TEXT_TOWER)
        return
    scored = [e for e in result.examples if e.id in set(result.caption_scores.ids)]
    batches = (
        (images, [result.captions[e.id]["text"] for e in good], [e.references for e in good])
        for good, images in image_batches(scored, settings.batch_size)
    )
    add_clip_scores(result, settings, clip_scores(towers, batches), model.config.base_models["vision"]["id"])


def _evaluate_pope(settings: EvaluateSettings, split: Split, result: Evaluation, model, processor) -> None:
    """Ask about the objects that a judge or the annotations know, and add the scores."""
    column, judge = find_judge(e.facts for e in split.examples) or (None, None)
    objects = {}
    for example in split.examples:
        if column in example.facts:
            objects[example.id] = judge.list_objects(example.facts[column])
        elif example.facts.get("objects"):
            objects[example.id] = [o["category"] for o in example.facts["objects"]]
    if not objects:
        raise UserError(
            f"{settings.dataset}: --tasks pope needs to know the objects in the images: its metadata.jsonl has neither "
            f"`objects` (with a category each) nor the column of a judge ({', '.join(installed_judges()) or 'none'})"
        )
    questions = pope_questions(objects, seed=settings.seed)
    result.asked, result.said_yes = answer_pope(model, processor, split.examples, questions, settings.batch_size)
    scores = pope_scores(result.asked, result.said_yes, settings.resamples, settings.seed)
    result.metrics["pope"] = {**scores, "images": len({question.image for question in result.asked})}


def _evaluate_retrieval(settings: EvaluateSettings, split: Split, result: Evaluation) -> torch.Tensor:
    """Add recall among all images and captions. Returns their similarities, of which the report shows a grid."""
    from blipren import BliprenForImageTextRetrieval
    from blipren.training.engine.loading import load_checkpoint
    from blipren.training.evaluation.metrics.retrieval import encoder_recall_of, evaluate_retrieval, ranks_of_images
    from blipren.training.evaluation.report.pictures import first_grid

    model, processor = load_checkpoint(settings.model, BliprenForImageTextRetrieval)
    model = model.to(choose_device(settings.device)).eval()
    if processor.qformer_tokenizer is None:
        raise UserError(f"{settings.model} has no text side: --tasks retrieval needs a checkpoint of `blipren align`")
    parts, examples = [], []
    for good, images in image_batches([e for e in split.examples if e.references], settings.batch_size):
        parts.append(encode_images(model, processor, images, settings.batch_size))
        examples += good
    masks = [p.mask for p in parts]
    features = PatchFeatures(torch.cat([p.patches for p in parts]), None if masks[0] is None else torch.cat(masks))
    captions = [e.references for e in examples]

    def select(indices: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        chosen = features[indices]
        return chosen.patches, chosen.mask

    metrics, scores = evaluate_retrieval(
        model,
        processor.qformer_tokenizer,
        select,
        captions,
        batch_size=settings.batch_size,
        rerank=settings.rerank,
    )
    metrics["ids"] = [e.id for e in examples]
    metrics["encoder_zero_shot"] = encoder_recall_of(model, lambda index: examples[index].load(), captions)
    first_grid(Path(settings.out) / "similarity.png", lambda index: examples[index].load(), captions, scores)
    result.metrics["retrieval"] = metrics
    add_ranks(result, settings, dict(zip(metrics["ids"], ranks_of_images(scores, captions))))
    return scores


def _evaluate_before(settings: EvaluateSettings, split: Split, result: Evaluation) -> Evaluation:
    """Score the captions of an earlier checkpoint on the same images. Its evaluation folder has them already."""
    same = Split(split.dataset, split.name, result.examples, split.rows, split.fingerprint)
    partial, predictions = Path(settings.out) / "partial-before.jsonl", Path(settings.before) / "predictions.jsonl"
    if predictions.is_file():
        captions = read_predictions(str(predictions), same)
    else:
        model, processor = load_model(settings.before, settings.device)
        plan = InferencePlan(
            image_use=False,
            prompt=settings.prompt,
            generation=settings.generate_options(),
            batch_size=settings.batch_size,
        )
        records = run_inference(model, processor, same, plan, partial, model_fingerprint(settings.before))
        captions = {record["id"]: record["caption"] for record in records}
    earlier = Evaluation(examples=result.examples)
    add_captions(earlier, settings, captions, meteor=False)
    partial.unlink(missing_ok=True)
    return earlier


# --------------------------------------------------------------------------------------------------------- inputs
def _check_heads(settings: EvaluateSettings) -> None:
    """Raise `UserError` if the retrieval task needs a head that was never trained."""
    if "retrieval" in settings.tasks:
        try:
            load_config(settings.model).check_trained_heads("contrast", *(["matching"] if settings.rerank else []))
        except ValueError as error:
            raise UserError(f"{settings.model} cannot be evaluated by --tasks retrieval: {error}") from error


def _check_texts(settings: EvaluateSettings, split: Split) -> None:
    """Raise `UserError` if the split lacks the captions or questions of a task."""
    has_references = any(e.references for e in split.examples)
    has_conversations = any(e.row.conversation is not None for e in split.examples)
    has_questions = has_conversations or any(e.questions for e in split.examples)
    for task, has_texts, texts in (
        ("captioning", has_references, "captions"),
        ("retrieval", has_references, "captions"),
        ("vqa", has_questions, "questions"),
        ("choice", has_conversations, "questions with choices"),
    ):
        if task in settings.tasks and not has_texts:
            others = "vqa" if has_questions else "captioning"
            raise UserError(
                f"{settings.dataset}: split {split.name!r} has no {texts}, which --tasks {task} needs; name the column "
                f"(--caption-columns, --question-column), or choose --tasks {others}"
            )


def read_predictions(path: str, split: Split) -> dict[str, dict]:
    """Read captions by image id, from JSON lines with `id` and `caption`, or from one JSON object.

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


# -------------------------------------------------------------------------------------------------------- outputs
def _add_provenance(settings: EvaluateSettings, split: Split, result: Evaluation) -> None:
    """Add counts, data, model, settings and versions to the metrics."""
    result.metrics["counts"] = split_counts(split, list(result.records.values()))
    result.metrics["split"] = split.name
    result.metrics["dataset"] = settings.dataset
    result.metrics["model"] = {"path": settings.model}
    if settings.predictions is None:
        result.metrics["model"]["weights"] = model_fingerprint(settings.model)
    result.metrics["settings"] = dataclasses.asdict(settings)
    result.metrics["versions"] = {"python": platform.python_version(), "platform": platform.platform()}
    result.metrics["versions"] |= {name: metadata.version(name) for name in VERSIONS}


def summary_lines(metrics: dict) -> list[str]:
    """Return the most important numbers as lines for the screen."""
    lines = []
    captioning = metrics.get("captioning")
    if captioning:
        low, high = captioning["intervals"]["CIDEr"]
        values = {name: captioning[name] for name in ("BLEU-4", "ROUGE-L", "METEOR")}
        rest = ", ".join(f"{n} {'none' if v is None else format(v, '.4f')}" for n, v in values.items())
        lines.append(f"captioning: CIDEr {captioning['CIDEr']:.4f} ({low:.4f} to {high:.4f}), {rest}")
        lines += [f"  {note}" for note in captioning["notes"]]
    if "memory" in metrics:
        memory = metrics["memory"]
        lines.append(
            f"memory: {memory['entries']:,} images; {memory['copies']} captions ({memory['share_of_copies']:.1%}) are "
            "captions of it, word for word"
        )
    if "reranker" in metrics:
        reranker = metrics["reranker"]
        lines.append(f"reranker: chose among {reranker['num_beams']} captions of the model and ones joined from them")
    if "hallucination" in metrics:
        shown = {n: v for n, v in metrics["hallucination"].items() if isinstance(v, float)}
        lines.append("hallucination: " + ", ".join(f"{n} {v:.3f}" for n, v in shown.items()))
    if "vqa" in metrics:
        vqa = metrics["vqa"]
        lines.append(
            f"vqa: accuracy {vqa['accuracy']:.4f}, soft score {vqa['soft_score']:.4f} ({vqa['questions']} questions)"
        )
    if "choice" in metrics:
        choice = metrics["choice"]
        low, high = choice["intervals"]["accuracy_likelihood"]
        lines.append(
            f"choice: accuracy by likelihood {choice['accuracy_likelihood']:.4f} ({low:.4f} to {high:.4f}), by generation "
            f"{choice['accuracy_generation']:.4f}, chance {choice['chance']:.4f} ({choice['questions']} questions)"
        )
    if "retrieval" in metrics:
        for way in ("image_to_text", "text_to_image"):
            for kind in ("", "reranked", "encoder_zero_shot", "chance"):
                values = metrics["retrieval"] if not kind else metrics["retrieval"].get(kind)
                if values is not None:
                    shown = ", ".join(f"{n} {values[way][n]:.3f}" for n in ("R@1", "R@5", "R@10"))
                    lines.append(f"{way}{kind and ', ' + kind.replace('_', ' ')}: {shown}")
    lines += place_lines(metrics["refer"]) if "refer" in metrics else []
    for strategy, values in metrics.get("pope", {}).items():
        if isinstance(values, dict):
            lines.append(f"POPE {strategy}: accuracy {values['accuracy']:.3f}, F1 {values['F1']:.3f}")
    if "image_use" in metrics:
        lines.append(f"verdict: the model {metrics['image_use']['verdict']}. {metrics['image_use']['because']}")
    return lines
