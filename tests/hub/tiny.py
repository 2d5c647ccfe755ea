"""Tiny random base models on disk, and a BLIPren model made of them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = ["a red ball on the green grass", "two dogs run on a beach", "What is in the picture? Short caption: describe"]


def tiny_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 320 entries that can write any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    if chat:
        fast.chat_template = CHAT
    return fast


def tiny_llm_config(**options) -> LlamaConfig:
    """A Llama of two layers; head width 16, which every attention kernel takes."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return LlamaConfig(**sizes | tokens | {"max_position_embeddings": 256} | options)


def write_llm(folder: Path, config: PreTrainedConfig | None = None, chat: bool = False, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or tiny_llm_config())
    model.save_pretrained(folder)
    tiny_tokenizer(chat).save_pretrained(folder)
    return folder


def write_vision(folder: Path, seed: int = 0, **options) -> Path:
    """A SigLIP of two layers that sees a 4x4 grid of patches."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipVisionConfig(**sizes | {"image_size": 32, "patch_size": 8} | options)
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


TINY_QFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def write_model(folder: Path, vision: Path, llm: Path, seed: int = 0, **options) -> Path:
    """Joins the two, fills the connector with random numbers large enough to matter, and saves a full checkpoint."""
    from blipren import BliprenForConditionalGeneration, BliprenProcessor

    options = {"num_queries": 4, "qformer": TINY_QFORMER} | options
    torch.manual_seed(seed)
    model = BliprenForConditionalGeneration.from_vision_text_pretrained(vision, llm, **options)
    kept = {k: v for k, v in options.items() if k not in ("qformer", "projector", "dtype")}
    model.save_pretrained(folder)
    BliprenProcessor.from_vision_text_pretrained(vision, llm, **kept).save_pretrained(folder)
    return folder


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)
