"""Import weights that the code of three other projects saves, by the names which that code gives them.

- `blipren`: the notebooks of github.com/eren23/blipren_release, normal and mixture of experts. They save the state dicts
  of the Q-Former and of the projector, `qformer_best.pt` and `projector_best.pt`. The notebooks drop the first patch of
  SigLIP, which has no class token, and train no end of the caption; imported, the Q-Former sees every patch.
- `two-stage`: the tutorial github.com/avbiswas/vlm, names read in the copy github.com/mysticalseeker24/vlm-training. It
  saves a folder with `qformer/pytorch_model.bin`, `adapter.pt` and PEFT's `lora_adapter/`, which is merged here.
- `minimal`: the notebook nipunbatra.github.io/blog/posts/2025-12-24-minimal-vlm-from-scratch.html, names read in the
  author's next one, 2025-12-25-vlm-vqa-instruction-tuning.ipynb, which loads `mini_vlm_full.pt`. Its caption prompt was
  not to be seen there: the one of our recipe `minimal-notebook` is assumed; another is given by `--prompts`.

A single file with the state dict of the whole model is read too. Frozen parts in it are left out with a line on the screen.
"""

import pickle
from pathlib import Path

import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.configuration_blipren import split_revision
from blipren.training.commands.import_ import ImportSettings
from blipren.training.errors import UserError, one_line
from blipren.training.hub import weight_names
from blipren.training.hub.prompt_templates import adds_bos, image_behind_user_turn, image_first
from blipren.training.hub.weight_names import Weights, copy_by_name

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
# first component of a name in the file -> our part; None for frozen parts
PARTS: dict[str, dict[str, str | None]] = {
    "blipren": {"qformer": "qformer", "projector": "projector", "llm": None, "vision": None},
    "two-stage": {"qformer": "qformer", "adapter": "projector", "llm": "llm"},
    "minimal": {"projector": "projector", "language_model": "llm", "vision_encoder": None},
}
HEADS = {"blipren": 8, "two-stage": 12}
PROMPTS = {"blipren": "Short caption:", "two-stage": "Describe this picture.", "minimal": "Short caption:"}
TWO_STAGE_SYSTEM_PROMPT = "Answer the user's question truthfully"
LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def import_weights(settings: ImportSettings) -> tuple[BliprenForConditionalGeneration, BliprenProcessor]:
    """Make a model of a vision encoder, a language model and the weights in `settings.source`.

    Returns:
        Model, whose image features and logits equal those of the source's own code, and processor, which writes prompts in
        that code's layout.

    Raises:
        UserError: a weight is missing, unknown or of another shape, or the file cannot be read safely.
    """
    parts, lora = read_parts(Path(settings.source), settings.format)
    for part in ("qformer", "projector"):
        if part in PARTS[settings.format].values() and part not in parts:
            raise UserError(f"{settings.source} has no weights of the {part}")
    build = {"blipren": blipren_options, "two-stage": two_stage_options, "minimal": minimal_options}[settings.format]
    options, qformer_names, projector_names = build(parts, settings.heads or HEADS.get(settings.format))
    shared = {name: options[name] for name in ("connector", "num_queries", "vision_feature_select") if name in options}
    try:
        model = BliprenForConditionalGeneration.from_vision_text_pretrained(settings.vision, settings.llm, **options)
        processor = BliprenProcessor.from_vision_text_pretrained(settings.vision, settings.llm, **shared)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot join {settings.vision} and {settings.llm}: {one_line(error)}") from error
    if parts.get("qformer"):
        copy_by_name(model.model.qformer.state_dict(), parts["qformer"], "Q-Former", qformer_names)
    if settings.format == "blipren" and (width := model.config.qformer_config.hidden_size) != model_width(model):
        raise UserError(f"the Q-Former is {width} wide and {settings.llm} {model_width(model)}: it is another --llm")
    copy_by_name(model.model.projector.state_dict(), parts["projector"], "projector", projector_names)
    if "llm" in parts or lora is not None:
        replace_llm(model, settings.llm, parts.get("llm", {}), lora)

    processor.prompts = settings.prompts or [PROMPTS[settings.format]]
    if settings.format == "two-stage":
        processor.system_prompts = [TWO_STAGE_SYSTEM_PROMPT]
        name, revision = split_revision(settings.llm)
        own = AutoTokenizer.from_pretrained(name, revision=revision).chat_template
        processor.chat_template = image_behind_user_turn(processor.image_token, own)
    else:
        processor.answer_start = " "
        bos = adds_bos(processor.tokenizer)
        processor.chat_template = image_first(processor.tokenizer, processor.image_token, bos)
    return model.eval(), processor


# ---- files ----------------------------------------------------------------------------------------------------------


def read_parts(source: Path, format: str) -> tuple[dict[str, Weights], Path | None]:
    """Return the weights by part, and the folder of a LoRA adapter where there is one."""
    if format == "two-stage" and source.is_dir():
        qformer, lora = source / "qformer" / "pytorch_model.bin", source / "lora_adapter"
        for path in (qformer, source / "adapter.pt", lora / "adapter_config.json"):
            if not path.is_file():
                raise UserError(f"{source} has no {path.relative_to(source)}, which the tutorial's code saves there")
        return {"qformer": read_file(qformer), "projector": read_file(source / "adapter.pt")}, lora
    if format == "minimal" and source.is_dir():
        source = source / "mini_vlm_full.pt"
    if format == "blipren":
        if source.is_dir():
            source = only_file(source, "qformer")
        if source.name.startswith("qformer"):
            projector = source.with_name(source.name.replace("qformer", "projector", 1))
            return {"qformer": read_file(source), "projector": read_file(projector)}, None
    return split_parts(read_file(source), source, PARTS[format]), None


def only_file(folder: Path, start: str) -> Path:
    """Return the one file of weights in a folder whose name begins with `start`."""
    found = sorted(path for path in folder.iterdir() if path.name.startswith(start) and path.suffix in SUFFIXES)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{folder} must hold one file {start}*.pt, and holds {names}: name the file instead")
    return found[0]


def read_file(path: Path) -> dict:
    """Return the content of a file of weights, read without running code from it."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is not a file of weights: their names end in {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged or holds more than weights: {one_line(error, 200)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; it must hold a state dict")
    return content


def split_parts(content: dict, path: Path, names: dict[str, str | None]) -> dict[str, Weights]:
    """Return the weights of one file by part. A file has them flat, or as `PART_state_dict` beside other facts."""
    nested = {key.removesuffix("_state_dict"): value for key, value in content.items() if isinstance(value, dict)}
    if any(key in names for key in nested):
        content = {
            f"{part}.{name}": tensor for part in nested if part != "config" for name, tensor in nested[part].items()
        }
    parts: dict[str, Weights] = {}
    frozen = 0
    for name, tensor in content.items():
        top, _, rest = name.partition(".")
        if top not in names or not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path}: {name!r} is unknown; weights begin with {', '.join(f'{top}.' for top in names)}")
        if names[top] is None:
            frozen += 1
        else:
            parts.setdefault(names[top], {})[rest] = tensor
    if frozen:
        print(f"{path}: {frozen} weights of frozen parts are left out; they are those of --vision and --llm")
    return parts


def shape_of(weights: Weights, name: str, part: str) -> torch.Size:
    """Return the shape of a weight. Raises `UserError` where there is none."""
    if name not in weights:
        raise UserError(f"{part}: the weight {name!r} is missing")
    return weights[name].shape


def count_blocks(weights: Weights, prefix: str) -> int:
    """Return the number of blocks `PREFIX0.`, `PREFIX1.`, ... that the names have."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)})


# ---- sizes of the connector, read from the shapes ---------------------------------------------------------------------


def blipren_options(parts: dict[str, Weights], heads: int):
    """Return the options of the model, and the names of the weights of Q-Former and projector."""
    qformer, projector = parts["qformer"], parts["projector"]
    queries, width = shape_of(qformer, "query", "Q-Former")
    mixture = any(name.startswith("experts.") for name in projector)
    hidden = shape_of(projector, "experts.0.1.weight" if mixture else "mlp.0.weight", "projector")[0]
    options = {
        "projector": "moe" if mixture else "mlp",
        "num_queries": queries,
        "qformer": {
            "hidden_size": width,
            "num_hidden_layers": count_blocks(qformer, "layers."),
            "num_attention_heads": heads,
            "intermediate_size": shape_of(qformer, "layers.0.mlp.0.weight", "Q-Former")[0],
            "layer_norm_eps": 1e-5,
            "cross_attention_frequency": 1,
            "norm_position": "pre",
            "normalize_keys": True,
            "project_patches": True,
            "query_init_std": 1.0,
        },
        "projector_options": {"projector_hidden_size": hidden},
    }
    if mixture:
        options["projector_options"] |= {"num_experts": count_blocks(projector, "experts."), "router_input": "first"}
    names = weight_names.BLIPREN_EXPERTS if mixture else weight_names.BLIPREN_PROJECTOR
    return options, weight_names.BLIPREN_QFORMER, names


def two_stage_options(parts: dict[str, Weights], heads: int):
    """As [`blipren_options`]."""
    qformer = parts["qformer"]
    _, queries, width = shape_of(qformer, "query_embeddings", "Q-Former")
    layers = count_blocks(qformer, "encoder_layers.")
    cross = sorted(int(name.split(".")[1]) for name in qformer if name.endswith(".cross_attn.in_proj_weight"))
    frequency = cross[0] + 1 if cross else 0
    if not cross or cross != list(range(frequency - 1, layers, frequency)):
        raise UserError(f"Q-Former: cross-attention in layers {cross} of {layers} is not that of the tutorial")
    options = {
        "projector": "mlp2",
        "num_queries": queries,
        "vision_feature_select": "full",
        "qformer": {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": shape_of(qformer, "encoder_layers.0.ffn.lin1.weight", "Q-Former")[0],
            "layer_norm_eps": 1e-12,
            "cross_attention_norm_eps": 1e-5,
            "cross_attention_frequency": frequency,
            "cross_attention_offset": frequency - 1,
            "query_feed_forward": "after_cross_attention",
            "normalize_queries": False,
            "query_init_std": 1.0,
            "use_text": True,
            "vocab_size": shape_of(qformer, "embeddings.word_embeddings.weight", "Q-Former")[0],
            "max_position_embeddings": shape_of(qformer, "embeddings.position_embeddings.weight", "Q-Former")[0],
        },
        "projector_options": {
            "projector_hidden_size": shape_of(parts["projector"], "0.weight", "projector")[0],
            "projector_hidden_act": "relu",
        },
    }
    return options, weight_names.TWO_STAGE_QFORMER, weight_names.TWO_STAGE_PROJECTOR


def minimal_options(parts: dict[str, Weights], heads: int | None):
    """As [`blipren_options`], without a Q-Former."""
    options = {
        "connector": "patches",
        "projector": "mlp2",
        "vision_feature_select": "full",
        "projector_options": {
            "projector_hidden_size": shape_of(parts["projector"], "projection.0.weight", "projector")[0],
            "projector_mid_norm": True,
        },
    }
    return options, (), weight_names.MINIMAL_PROJECTOR


# ---- language model ---------------------------------------------------------------------------------------------------


def model_width(model: BliprenForConditionalGeneration) -> int:
    """Return the width of the language model's embeddings."""
    return model.get_input_embeddings().weight.shape[1]


@torch.no_grad()
def replace_llm(model: BliprenForConditionalGeneration, llm: str, weights: Weights, lora: Path | None) -> None:
    """Load trained weights into the language model of `model`: all of them, or a LoRA adapter, which is merged."""
    name, revision = split_revision(llm)
    trained = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=model.dtype)
    if lora is not None:
        found = [lora / f"adapter_model{end}" for end in (".safetensors", ".bin")]
        if not any(file.is_file() for file in found):
            raise UserError(f"{lora} has no adapter_model.safetensors or adapter_model.bin")
        adapted = get_peft_model(trained, LoraConfig.from_pretrained(lora))
        adapter = read_file(next(file for file in found if file.is_file()))
        copy_by_name(get_peft_model_state_dict(adapted), adapter, "LoRA adapter")
        trained = adapted.merge_and_unload()
    elif any(".lora_A." in key for key in weights):
        rank = next(tensor.shape[0] for key, tensor in weights.items() if ".lora_A." in key)
        adapted = get_peft_model(trained, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_LAYERS))
        copy_by_name(adapted.state_dict(), weights, "language model")
        trained = adapted.merge_and_unload()
    else:
        copy_by_name(trained.state_dict(), weights, "language model")
    model.model.language_model.load_state_dict(trained.base_model.state_dict())
    model.lm_head.load_state_dict(trained.get_output_embeddings().state_dict())
