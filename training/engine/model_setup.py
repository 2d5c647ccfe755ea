"""Model, precision, attention and layout of a run that trains through the language model."""

import os
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from blipren.modeling_blipren import summed_cross_entropy
from blipren.training.console import print_line
from blipren.training.data.batches import shared_prefix as prefix
from blipren.training.data.batches.blocks import PromptEncoder
from blipren.training.data.batches.datasets import Layout
from blipren.training.data.batches.masks import FLEX, dense_attention
from blipren.training.engine.loading import load_checkpoint
from blipren.training.engine.settings import TrainedPartsSettings
from blipren.training.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_to_train(path: str, settings: TrainedPartsSettings, precision: str | None = None):
    """Return model and processor of a checkpoint, with the router settings of a run.

    Args:
        precision: of the run; where `llm_bits` is set too, the language model is loaded in few bits. Without it all
            weights are as the checkpoint has them, which is what a cache was made with.
    """
    if precision is not None and settings.llm_bits:
        model, processor = load_quantized(path, settings.llm_bits, precision)
    else:
        model, processor = load_checkpoint(path)
    for name in ("router_balance_weight", "router_z_weight", "router_noise"):
        if getattr(settings, name) is not None:
            setattr(model.config, name, getattr(settings, name))
    return model, processor


def load_quantized(path: str, bits: int, precision: str):
    """Return model and processor with the language model in 4 or 8 bit; connector, head and vision tower as they are.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError("llm_bits needs bitsandbytes: pip install bitsandbytes") from error
    from transformers import BitsAndBytesConfig

    if torch.cuda.is_available():  # bitsandbytes loads to the current GPU, the first one until the Trainer is made
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    few_bits = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=DTYPES[precision],
        llm_int8_skip_modules=["model.vision_tower"],
    )
    model, processor = load_checkpoint(path, quantization_config=few_bits)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # its packed kernel for CPUs lets no gradient through
    model.is_quantized = False  # the Trainer would refuse to train a connector beside a quantized language model
    return model, processor


def set_precision(model, precision: str) -> None:
    """Cast frozen parts to the precision of the run, and what is trained to float32."""
    dtype = DTYPES[precision]
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    for part in ("qformer", "projector"):
        if part in model.parts():
            model.parts()[part].float()


def choose_layout(
    model,
    processor,
    settings,
    sources: Sequence,
    answers_per_image: int | None = None,
    max_answer_tokens: int | None = None,
    longest_completion: int = 0,
) -> Layout:
    """Return how batches are laid out: shared prefixes, or padded rows where the language model cannot take them.

    Args:
        settings: with `shared_prefix`, `row_tokens`.
        answers_per_image, max_answer_tokens: of `Layout`.
        longest_completion: most tokens of an answer that the model gives itself in training.
    """
    shared = settings.shared_prefix
    if shared:
        with dense_attention(model.parts()["llm"]):
            reason = prefix.unsupported_reason(model, longest_row(model, processor, sources, longest_completion))
        if reason is not None:
            shared = False
            print_line(
                f"padded rows, one for each answer, in place of shared prefixes: the language model cannot take them, {reason}"
            )
    pad = processor.tokenizer.pad_token_id
    return Layout(
        pad_token_id=pad if pad is not None else 0,
        shared_prefix=shared,
        row_tokens=settings.row_tokens,
        answers_per_image=answers_per_image,
        max_answer_tokens=max_answer_tokens,
        multiple=8 if torch.cuda.is_available() else 1,
    )


def longest_row(model, processor, sources: Sequence, longest_completion: int = 0) -> int:
    """Return the tokens of the longest prompt and answer together; 0 where attention has no window that could be shorter.

    Args:
        longest_completion: most tokens of an answer that is not in the sources.
    """
    if prefix.attention_window(model.config.text_config) is None:
        return 0
    prompts = PromptEncoder(processor)
    return max(source.longest_row(prompts) for source in sources) + longest_completion


def set_attention(model, name: str, device: str) -> None:
    """Set the attention of the language model.

    Raises:
        UserError: the language model has no such attention, or it cannot be trained on the device.
    """
    if name == FLEX and device != "cuda":
        raise UserError(f"attention {name} cannot be trained on {device}: torch has its backward pass for CUDA alone")
    try:
        model.parts()["llm"].set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise UserError(f"attention {name}: {error}") from error


def check_fused_loss(model) -> None:
    """Try the fused loss on one position.

    Raises:
        UserError: torch or the language model's head does not support it.
    """
    if not hasattr(F, "linear_cross_entropy"):
        raise UserError(f"fused_loss needs torch 2.13 or newer; this is {torch.__version__}")
    weight = model.get_output_embeddings().weight
    position = torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    try:
        summed_cross_entropy(
            model.lm_head, position, torch.zeros(1, dtype=torch.long, device=weight.device), model.config.text_config
        )
    except ValueError as error:
        raise UserError(f"fused_loss: {error}") from error
