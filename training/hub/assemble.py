"""`blipren new`: vision encoder + language model -> an untrained checkpoint."""

import inspect
from pathlib import Path

import torch
from transformers import AutoTokenizer, set_seed

from blipren import BliprenConfig, BliprenForConditionalGeneration, BliprenProcessor, BliprenQFormerConfig
from blipren.configuration_blipren import split_revision
from blipren.training.commands.new import NewSettings
from blipren.training.errors import UsageError, UserError
from blipren.training.files import check_new_folder, complete_or_absent_folder


def _check_names(given: dict, config_class: type, allowed_prefixes: tuple[str, ...], setting: str) -> None:
    known = {
        name
        for name, parameter in inspect.signature(config_class.__init__).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD and name.startswith(allowed_prefixes)
    }
    for name in given:
        if name not in known:
            raise UsageError(f"unknown name {name!r} in {setting}; names are: {', '.join(sorted(known - {'self'}))}")


def new(settings: NewSettings) -> None:
    """Writes an untrained checkpoint; OUT is complete or absent.

    Raises:
        UserError: a base model is not there, is none, or does not fit.
    """
    _check_names(settings.qformer, BliprenQFormerConfig, ("",), "qformer")
    _check_names(
        settings.projector_options,
        BliprenConfig,
        ("projector_", "num_experts", "experts_", "router_"),
        "projector_options",
    )
    out = Path(settings.out)
    check_new_folder(out)
    for name in filter(None, (settings.vision, settings.llm, settings.qformer_init)):
        if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
            raise UserError(f"there is no folder {name}")
    kind = "full" if settings.full else "bridge"
    print(
        f"new: {settings.vision} + {settings.connector}/{settings.projector} + {settings.llm} -> {out} ({kind} checkpoint)"
    )
    set_seed(settings.seed)
    layers = settings.vision_feature_layer
    shared = {
        "connector": settings.connector,
        "num_queries": settings.queries,
        "vision_feature_layer": layers[0] if len(layers) == 1 else layers,
        "vision_feature_select": settings.vision_feature_select,
        "image_processor_options": settings.image_processor,
    }
    qformer = dict(settings.qformer)
    if settings.qformer_init is not None:
        qformer.setdefault("use_text", True)
    try:
        model = BliprenForConditionalGeneration.from_vision_text_pretrained(
            settings.vision,
            settings.llm,
            **shared,
            projector=settings.projector,
            projector_options=settings.projector_options,
            qformer=qformer,
            qformer_init=settings.qformer_init,
            dtype="auto" if settings.dtype == "auto" else getattr(torch, settings.dtype),
        )
        processor = BliprenProcessor.from_vision_text_pretrained(
            settings.vision,
            settings.llm,
            **shared,
            prompts=settings.prompts or None,
            system_prompts=settings.system_prompts or None,
        )
        if settings.qformer_init is not None:
            name, revision = split_revision(settings.qformer_init)
            processor.qformer_tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot join {settings.vision} and {settings.llm}: {' '.join(str(error).split())[:600]}"
        ) from error
    with complete_or_absent_folder(out) as folder:
        if settings.full:
            model.save_pretrained(folder)
        else:
            model.save_bridge(folder)
        processor.save_pretrained(folder)
    print(model.describe_trainable())
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    grid = "x".join(map(str, model.config.vision_grid)) if model.config.vision_grid else "variable"
    print(
        f"patch grid {grid}, {model.config.num_prefix_tokens} prefix tokens left out, "
        f"{model.config.num_visual_tokens or 'as many as patches'} visual tokens an image\n"
        f"prompt: {processor.prompt_text()!r}\n"
        f"checkpoint: {out} ({size / 2**20:.1f} MiB). Next: blipren doctor {out}"
    )
