"""Builds a model card from what a run left behind, with its pictures and `.eval_results`.

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

from blipren.model_card.facts import (
    CardSources,
    count_parameters,
    human_count,
    license_of,
    log_summary,
    read_json,
    run_settings,
    strictness,
)
from blipren.training.errors import UserError
from blipren.training.hub.package import is_local, read_config

TEMPLATE = Path(__file__).with_name("card.md")
TASKS = {"captioning": "image-to-text", "vqa": "visual-question-answering", "retrieval": "image-text-to-text"}
SHOWN_SETTINGS = (
    "llm_tuning", "steps", "epochs", "batch_size", "gradient_accumulation", "learning_rate", "weight_decay", "warmup",
    "warmup_steps", "schedule", "max_grad_norm", "dropout", "precision", "dtype", "seed", "augmentation", "label_smoothing",
)  # fmt: skip
LEFT_OVER = re.compile(r"\{\{|\}\}|\{%|TODO|FIXME|More Information Needed|lorem ipsum", re.IGNORECASE)


def build_card(repo: str, sources: CardSources) -> dict[str, bytes]:
    """The card with everything that belongs to it, by name in the repository.

    Raises:
        UserError: when a file of the run is damaged, or the card would be invalid.
    """
    config = read_config(sources.model)
    metrics = read_json(sources.evaluation / "metrics.json" if sources.evaluation else None)
    if sources.evaluation and not metrics:
        raise UserError(f"{sources.evaluation} has no metrics.json: it is no folder of `blipren evaluate`")
    files: dict[str, bytes] = {}
    curves = _picture(files, sources, sources.run, ("curves.png",), "pictures/curves.png")
    samples = _picture(files, sources, sources.evaluation, ("samples.png",), "pictures/samples.png")
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
        curves=curves,
        results=results,
        results_text=_results_text(metrics),
        samples=samples,
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
    """Validates a card without the Hub: metadata that its own classes read back, and no text that is left to fill in.

    Raises:
        UserError: naming what is wrong.
    """
    left = LEFT_OVER.search(content.split("```bibtex")[0])
    if left:
        raise UserError(f"the card still holds {left.group(0)!r}")
    try:
        card = ModelCard(content)
    except ValueError as error:
        raise UserError(f"the card's metadata is invalid: {error}") from error
    for name in ("license", "library_name", "pipeline_tag"):
        if not isinstance(card.data.get(name), str):
            raise UserError(f"the card's metadata has no {name}")


def _picture(files: dict, sources: CardSources, folder: Path | None, names: tuple, target: str) -> str | None:
    """Takes the first picture that exists, without its metadata, and returns its name in the repository."""
    if not sources.pictures or folder is None:
        return None
    for path in (folder / name for name in names):
        if path.is_file():
            buffer = io.BytesIO()
            with Image.open(path) as image:
                image.convert("RGB").save(buffer, "PNG", optimize=True)
            files[target] = buffer.getvalue()
            return target
    return None


def _parts(config: dict, sources: CardSources) -> list[dict]:
    counts = count_parameters(sources.model)
    tuned = str(run_settings(sources.run).get("llm_tuning", "frozen"))
    has_adapter = (sources.model / "adapter").is_dir()
    bases = config.get("base_models") or {}
    rows = []
    for part, name in (("vision", "vision encoder"), ("llm", "language model")):
        base = bases.get(part) or {}
        base_id = base.get("id")
        local = base_id is None or is_local(str(base_id))
        license_name = sources.base_licenses.get(part) or (
            license_of(base_id, base.get("revision")) if base_id else None
        )
        shown = f"`{Path(str(base_id)).name}`, a local folder" if local and base_id else "this training run"
        if not local:
            shown = f"[{base_id}](https://huggingface.co/{base_id})"
            shown += f" at `{base['revision'][:12]}`" if base.get("revision") else ""
        training = "frozen"
        if part == "llm" and (has_adapter or tuned != "frozen"):
            training = "LoRA" if has_adapter or tuned == "lora" else "trained"
        parameters = human_count(counts[part]) if counts.get(part) else "in its own repository"
        rows.append(
            {"name": name, "source": shown, "parameters": parameters, "training": training,
             "license": license_name or "not stated", "id": None if local else base_id}
        )  # fmt: skip
    connector = {"name": "connector", "training": "trained", "source": "this training run", "license": "apache-2.0"}
    rows.insert(1, connector | {"parameters": human_count(counts.get("qformer", 0) + counts.get("projector", 0))})
    return rows


def _license(parts: list[dict], sources: CardSources) -> tuple[str, str]:
    known = [part for part in parts if part["license"] != "not stated"]
    unknown = [part["name"] for part in parts if part["license"] == "not stated"]
    strictest = max(known, key=lambda part: strictness(part["license"]))
    text = f"The strictest licence among the parts is **{strictest['license']}** ({strictest['name']})."
    if unknown:
        text += (
            f" The licence of the {' and the '.join(unknown)} is not stated where it was looked for: ask its authors."
        )
    if sources.license:
        return sources.license, f"{text} These weights are published under **{sources.license}**."
    mixed = unknown or strictness(strictest["license"]) >= strictness("other")
    return ("other" if mixed and strictest["license"] == "other" or unknown else strictest["license"]), text


def _summary(config: dict, parts: list[dict]) -> str:
    vision, _, llm = parts
    vision_type = (config.get("vision_config") or {}).get("model_type", "vision")
    text_type = (config.get("text_config") or {}).get("model_type", "language")
    tokens = config.get("num_visual_tokens")
    count = f"{tokens} visual tokens" if tokens else "visual tokens, as many as it has patches,"
    if config.get("connector") == "qformer":
        layers = (config.get("qformer_config") or {}).get("num_hidden_layers")
        bridge = f"a Q-Former of {layers} layers and a `{config.get('projector')}` projector"
    else:
        bridge = f"a `{config.get('projector')}` projector on every patch"
    state = {"frozen": "frozen", "LoRA": "tuned with LoRA", "trained": "trained with it"}[llm["training"]]
    return (
        f"Describes images and answers questions about them. A frozen {vision_type} vision encoder, {bridge}, and a "
        f"{text_type} language model ({state}): an image becomes {count} in front of the prompt. "
        "Made with BLIPren."
    )


def _dataset(metrics: dict) -> str | None:
    """Name of the evaluated data; of a local folder only the last part."""
    name = metrics.get("dataset")
    return Path(name).name if name and is_local(name) else name


def _on_hub(metrics: dict) -> bool:
    """Whether that name is an id of the Hub."""
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
    """One row a metric: numbers of each task, nested ones by their full name."""
    for task, values in metrics.items():
        if task not in TASKS or not isinstance(values, dict):
            continue
        intervals = values.get("intervals") or {}
        images = values.get("images") or (metrics.get("counts") or {}).get("images") or ""
        for name, value in _numbers(values):
            interval = intervals.get(name)
            if isinstance(interval, dict):
                interval = [interval.get("low"), interval.get("high")]
            if interval and any(bound is None for bound in interval):
                interval = None
            yield {
                "task": task,
                "metric": name,
                "type": re.sub(r"[^a-z0-9]+", "_", name.split(".")[-1].lower()).strip("_"),
                "number": value,
                "bounds": interval,
                "value": f"{value:.4f}",
                "interval": f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "",
                "images": images,
            }


_METRIC = re.compile(r"^(CIDEr.*|BLEU.*|ROUGE.*|METEOR.*|SPICE|accuracy.*|R@\d+|CHAIR.*|hallucinat.*)$", re.IGNORECASE)


def _numbers(values: dict, prefix: str = ""):
    for name, value in values.items():
        if isinstance(value, dict) and name not in ("intervals", "counts", "decoding", "generation"):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and _METRIC.match(name):
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
    """`.eval_results/TASK.yaml` for results on a dataset of the Hub; only such datasets have an id there."""
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
    decoding = (
        (metrics.get("captioning") or {}).get("decoding") or metrics.get("decoding") or metrics.get("generation")
    )
    text = "Captioning metrics are those of pycocoevalcap; intervals are from resampling images."
    if isinstance(decoding, dict):
        text += (
            " Decoding: " + ", ".join(f"{key} {value}" for key, value in decoding.items() if value is not None) + "."
        )
    return text


def _limits(metrics: dict) -> list[str]:
    limits = []
    for name, value in _numbers({k: v for k, v in metrics.items() if isinstance(v, dict)}):
        key = name.split(".")[-1].lower()
        if key.startswith(("hallucinat", "chair")):
            limits.append(f"Hallucination, measured on held-out images: `{name}` is {value:.3f}.")
    unmeasured = "Bias was" if limits else "Hallucination and bias were"
    limits.append(f"{unmeasured} not measured for this checkpoint: expect it, and check what it says.")
    if because := (metrics.get("image_use") or {}).get("because"):
        limits.append(f"How much it looks at its image, measured: {because}")
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
