"""Build a model card from the files of a run, with its pictures and `.eval_results`.

    from blipren.model_card.build import CardSources, build_card
    files = build_card("user/name", CardSources(model=Path("out"), run=Path("out"), evaluation=Path("evaluation")))

`files` maps names in the repository (README.md, pictures/..., .eval_results/...) to their content.
"""

import io
import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from PIL import Image

from blipren.model_card.commands import training_commands
from blipren.model_card.facts import (
    CardSources,
    count_parameters,
    find_license,
    human_count,
    log_summary,
    read_json,
    run_settings,
    strictness,
)
from blipren.training.checkpoint_config import is_local, read_config
from blipren.training.errors import UserError

TEMPLATE = Path(__file__).with_name("card.md")
TASKS = {"captioning": "image-to-text", "vqa": "visual-question-answering", "retrieval": "image-text-to-text"}
SHOWN_SETTINGS = (
    "llm_tuning", "steps", "epochs", "batch_size", "gradient_accumulation", "learning_rate", "weight_decay", "warmup",
    "warmup_steps", "schedule", "max_grad_norm", "dropout", "precision", "dtype", "seed", "augmentation", "label_smoothing",
)  # fmt: skip
DECODING = ("max_new_tokens", "num_beams", "length_penalty", "no_repeat_ngram_size")
METRIC = re.compile(r"^(CIDEr.*|BLEU.*|ROUGE.*|METEOR.*|accuracy.*|R@\d+)$")
PLACEHOLDERS = re.compile(r"\{\{|\}\}|\{%|TODO|FIXME|More Information Needed|lorem ipsum", re.IGNORECASE)


def build_card(repo: str, sources: CardSources) -> dict[str, bytes]:
    """Return the card and the files beside it: content by name in the repository.

    Raises:
        UserError: a file of the run is damaged, or the card is invalid.
    """
    config = read_config(sources.model)
    metrics = read_json(sources.evaluation / "metrics.json" if sources.evaluation else None)
    if sources.evaluation and not metrics:
        raise UserError(f"{sources.evaluation} has no metrics.json: it was not written by `blipren evaluate`")
    files: dict[str, bytes] = {}
    curves, samples = "pictures/curves.png", "pictures/samples.png"
    attention, example = "pictures/attention.png", "pictures/example.png"
    if sources.pictures:
        files |= _picture(sources.run, curves)
        for name in (samples, attention, example):
            files |= _picture(sources.evaluation, name)
    widget = [{"src": f"https://huggingface.co/{repo}/resolve/main/{example}", "example_title": "Held-out image"}]
    parts = _parts(config, sources)
    license_name, license_text = _license(parts, sources)
    dataset = _dataset(metrics)
    results = list(_results(metrics))
    data = ModelCardData(
        license=license_name,
        license_name="mixed" if license_name == "other" else None,
        license_link="#parts" if license_name == "other" else None,
        library_name="transformers",
        pipeline_tag="image-to-text",
        language="en",
        tags=["blipren", "vision-language", "image-captioning", "q-former", "custom_code"],
        base_model=[p["id"] for p in parts if p.get("id")] or None,
        datasets=[dataset] if _on_hub(metrics) else None,
        metrics=sorted({row["type"] for row in results}) or None,
        model_name=repo.split("/")[-1],
        eval_results=[_eval_result(row, dataset) for row in results] or None,
        widget=widget if example in files else None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=repo.split("/")[-1],
        repo=repo,
        tag=sources.tag,
        summary=_summary(config, parts),
        checkpoint_type=config.get("checkpoint_type", "full"),
        parts=parts,
        license_text=license_text,
        data=_data(read_json(sources.cache / "cache.json" if sources.cache else None), dataset),
        settings=_settings(sources),
        curves=curves if curves in files else None,
        results=results,
        results_text=_results_text(metrics),
        samples=samples if samples in files else None,
        attention=attention if attention in files else None,
        space=sources.space,
        commands=training_commands(config, run_settings(sources.run), dataset),
        limits=_limits(metrics),
        cost=_cost(sources),
    )
    content = re.sub(r"\n{3,}", "\n\n", str(card))
    check_card(content)
    files["README.md"] = content.encode()
    if _on_hub(metrics) and "/" in dataset:
        files.update(_eval_result_files(results, dataset))
    return files


def check_card(content: str) -> None:
    """Check a card without the Hub: its metadata are valid, and no placeholder is left in its text.

    Raises:
        UserError: the message names what is wrong.
    """
    if left := PLACEHOLDERS.search(content.split("```bibtex")[0]):
        raise UserError(f"the card still holds {left.group(0)!r}")
    try:
        card = ModelCard(content)
    except ValueError as error:
        raise UserError(f"the card's metadata is invalid: {error}") from error
    for name in ("license", "library_name", "pipeline_tag"):
        if not isinstance(card.data.get(name), str):
            raise UserError(f"the card's metadata has no {name}")


def _picture(folder: Path | None, target: str) -> dict[str, bytes]:
    """Return the picture of a folder under its name in the repository, without its metadata; {} if there is none."""
    path = folder / Path(target).name if folder else None
    if path is None or not path.is_file():
        return {}
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(buffer, "PNG", optimize=True)
    return {target: buffer.getvalue()}


def _parts(config: dict, sources: CardSources) -> list[dict]:
    """Return the rows of the table of parts: vision encoders, connector, language model."""
    counts = count_parameters(sources.model)
    connector = {"name": "connector", "source": "this training run", "training": "trained", "license": "apache-2.0"}
    second = "second_vision" in (config.get("base_models") or {})
    return [
        _base_model(config, sources, "vision", "vision encoder", counts) | {"training": "frozen"},
        *(
            [_base_model(config, sources, "second_vision", "second vision encoder", counts) | {"training": "frozen"}]
            if second
            else []
        ),
        connector | {"parameters": human_count(counts.get("connector", 0))},
        _base_model(config, sources, "llm", "language model", counts) | {"training": _llm_training(sources)},
    ]


def _base_model(config: dict, sources: CardSources, part: str, name: str, counts: dict[str, int]) -> dict:
    base = (config.get("base_models") or {}).get(part) or {}
    base_id, revision = base.get("id"), base.get("revision")
    local = base_id is None or is_local(base_id)
    if not local:
        source = f"[{base_id}](https://huggingface.co/{base_id})" + (f" at `{revision[:12]}`" if revision else "")
    else:
        source = f"`{Path(base_id).name}`, a local folder" if base_id else "this training run"
    license_name = sources.base_licenses.get(part) or (find_license(base_id, revision) if base_id else None)
    parameters = human_count(counts[part]) if part in counts else "in its own repository"
    return {
        "name": name, "source": source, "parameters": parameters, "license": license_name or "not stated",
        "id": None if local else base_id,
    }  # fmt: skip


def _llm_training(sources: CardSources) -> str:
    tuning = "lora" if (sources.model / "adapter").is_dir() else run_settings(sources.run).get("llm_tuning", "frozen")
    return {"frozen": "frozen", "lora": "LoRA", "full": "trained"}[tuning]


def _license(parts: list[dict], sources: CardSources) -> tuple[str, str]:
    """Return the licence of the card's metadata, and the sentences about it."""
    known = [part for part in parts if part["license"] != "not stated"]
    unknown = [part["name"] for part in parts if part["license"] == "not stated"]
    strictest = max(known, key=lambda part: strictness(part["license"]))
    text = f"The strictest licence among the parts is **{strictest['license']}** ({strictest['name']})."
    if unknown:
        text += f" The licence of the {' and the '.join(unknown)} was not found: ask its authors."
    if sources.license:
        return sources.license, f"{text} These weights are published under **{sources.license}**."
    return "other" if unknown else strictest["license"], text


def _summary(config: dict, parts: list[dict]) -> str:
    llm = parts[-1]
    vision_type = (config.get("vision_config") or {}).get("model_type", "vision")
    if second := config.get("second_vision_config"):
        vision_type += f" and a frozen {second.get('model_type', 'vision')}"
    text_type = (config.get("text_config") or {}).get("model_type", "language")
    tokens = config.get("num_visual_tokens")
    count = f"{tokens} visual tokens" if tokens else "visual tokens, as many as it has patches,"
    if config.get("connector") == "qformer":
        layers = (config.get("qformer_config") or {}).get("num_hidden_layers")
        bridge = f"a Q-Former of {layers} layers and a `{config.get('projector')}` projector"
    else:
        bridge = f"a `{config.get('projector')}` projector on every patch"
    scales, tiles, frames = (config.get(name) for name in ("vision_scales", "vision_tiles", "num_frames"))
    vision = f"A frozen {vision_type} vision encoder"
    if scales and len(scales) > 1:
        vision += f" that sees the image at scales {', '.join(map(str, scales))}"
    if tiles:
        vision += f" that sees the image and up to {tiles} tiles of it"
    kinds = f"images and videos (of which it sees {frames} frames)" if frames else "images"
    state = {"frozen": "frozen", "LoRA": "tuned with LoRA", "trained": "trained with it"}[llm["training"]]
    return (
        f"Describes {kinds} and answers questions about them. {vision}, {bridge}, and a "
        f"{text_type} language model ({state}): an image becomes {count} in front of the prompt. "
        "Made with BLIPren."
    )


def _dataset(metrics: dict) -> str | None:
    """Return the name of the evaluated data set; of a local folder only the last part."""
    name = metrics.get("dataset")
    return Path(name).name if name and is_local(name) else name


def _on_hub(metrics: dict) -> bool:
    """Return whether the evaluated data set is one of the Hub."""
    return bool(metrics.get("dataset")) and not is_local(metrics["dataset"])


def _data(cache: dict, dataset: str | None) -> list[tuple[str, str]]:
    rows = [("dataset", dataset)] if dataset else []
    counts = cache.get("counts") or {}
    for key, value in counts.items():
        if isinstance(value, dict):
            rows += [(f"{key}: {name}", f"{number:,}") for name, number in value.items() if isinstance(number, int)]
        elif isinstance(value, int):
            rows.append((str(key).replace("_", " "), f"{value:,}"))
    return rows


def _settings(sources: CardSources) -> list[tuple[str, object]]:
    settings = run_settings(sources.run)
    rows = [
        (key.replace("_", " "), settings[key]) for key in SHOWN_SETTINGS if settings.get(key) not in (None, "", [])
    ]
    summary = log_summary(sources.run)
    if summary.get("steps"):
        rows.append(("optimizer updates", summary["steps"]))
    if summary.get("validation_loss") is not None:
        rows.append(("best validation loss", f"{summary['validation_loss']:.4f} at update {summary['best_step']}"))
    return rows


def _results(metrics: dict):
    """Yield one row per metric of each task; nested metrics have their full name."""
    for task in TASKS:
        values = metrics.get(task) or {}
        for name, value in _numbers(values):
            bounds = values["intervals"].get(name)
            yield {
                "task": task,
                "metric": name,
                "type": re.sub(r"[^a-z0-9]+", "_", name.split(".")[-1].lower()).strip("_"),
                "number": value,
                "bounds": bounds,
                "value": f"{value:.4f}",
                "interval": f"{bounds[0]:.4f} to {bounds[1]:.4f}" if bounds else "",
                "images": values["images"] if "images" in values else values["counts"]["images"],
            }


def _numbers(values: dict, prefix: str = ""):
    """Yield full name and value of the metrics in a task's results."""
    for name, value in values.items():
        if isinstance(value, dict) and name not in ("intervals", "by_question_type"):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and METRIC.match(name):
            yield prefix + name, float(value)


def _eval_result(row: dict, dataset: str | None) -> EvalResult:
    return EvalResult(
        task_type=TASKS[row["task"]],
        task_name=row["task"],
        dataset_type=dataset or "held-out",
        dataset_name=dataset or "held-out split of the training data",
        metric_type=row["type"],
        metric_name=row["metric"],
        metric_value=round(row["number"], 6),
        metric_args={"interval_95": [round(bound, 6) for bound in row["bounds"]]} if row["bounds"] else None,
    )


def _eval_result_files(results: list[dict], dataset: str) -> dict[str, bytes]:
    """Return `.eval_results/TASK.yaml` for results on a data set of the Hub: only such a data set has an id there."""
    files = {}
    for task in dict.fromkeys(row["task"] for row in results):
        entries = [
            EvalResultEntry(
                dataset_id=dataset,
                task_id=row["metric"],
                value=round(row["number"], 6),
                notes=f"95% interval {row['interval']}" if row["interval"] else None,
            )
            for row in results
            if row["task"] == task
        ]
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
        files[f".eval_results/{task}.yaml"] = text.encode()
    return files


def _results_text(metrics: dict) -> str:
    text = "Captioning metrics are those of pycocoevalcap; intervals are from resampling images."
    settings = metrics.get("settings") or {}
    decoding = [f"{name} {settings[name]}" for name in DECODING if settings.get(name) is not None]
    return text + (f" Decoding: {', '.join(decoding)}." if decoding else "")


def _limits(metrics: dict) -> list[str]:
    limits = [
        f"Hallucination, measured on held-out images: `{name}` is {value:.3f}."
        for name, value in (metrics.get("hallucination") or {}).items()
        if isinstance(value, float)
    ]
    unmeasured = "Bias was" if limits else "Hallucination and bias were"
    limits.append(f"{unmeasured} not measured for this checkpoint: expect it, and check what the model says.")
    if image_use := metrics.get("image_use"):
        limits.append(f"Whether the model uses its image, measured: {image_use['because']}")
    return limits + [
        "Captions follow the wording and the prejudices of the training captions and of the language model; people's "
        "gender, age and origin are guessed from looks and are often wrong.",
        "It reads little text in images, counts badly beyond a few, and is not meant for decisions about people, "
        "medicine or safety.",
        "Prompts and captions are in English.",
    ]


def _cost(sources: CardSources) -> str:
    environment = read_json(sources.run / "environment.json" if sources.run else None)
    seconds = log_summary(sources.run).get("seconds")
    sentences = []
    if seconds:
        sentences.append(
            f"Training took {seconds / 3600:.2f} hours."
            if seconds >= 3600
            else f"Training took {seconds / 60:.1f} minutes."
        )
    if gpus := environment.get("gpus"):
        sentences.append(f"Hardware: {len(gpus)} x {gpus[0]}.")
    elif "threads" in environment:
        sentences.append(f"Hardware: CPU, {environment['threads']} threads.")
    sentences.append("Energy was not measured." if sentences else "")
    return " ".join(sentences)


__all__ = ["CardSources", "build_card", "check_card"]
