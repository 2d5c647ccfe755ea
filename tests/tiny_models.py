"""Tiny random vision encoders and language models of many families, saved as real local checkpoints."""

import functools
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Siglip2ImageProcessor,
    ViTImageProcessor,
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_TEXTS = [
    "A black dog runs through the green grass .",
    "Two children play with a red ball on the beach .",
    "A man in a blue shirt rides a bicycle down the street .",
    "Short caption: What colour is the small circle ? Question: Answer: yes no left of right above below",
] * 4

_TRANSFORMER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_GQA = {**_TRANSFORMER, "num_key_value_heads": 2, "max_position_embeddings": 256}
# model type -> config values; sizes small enough that a family costs a fraction of a second
LLM_FAMILIES: dict[str, dict] = {
    "llama": {**_GQA, "tie_word_embeddings": True},
    "smollm3": {**_GQA, "no_rope_layers": [1, 0]},
    "qwen2": {**_GQA},
    "qwen3": {**_GQA, "head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {**_GQA, "head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_GQA, "head_dim": 16, "query_pre_attn_scalar": 16},
    "phi": {**_TRANSFORMER, "max_position_embeddings": 256},
    "mistral": {**_GQA},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 16,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": {**_TRANSFORMER, "max_position_embeddings": 256},
    "granite": {**_GQA, "logits_scaling": 8.0, "embedding_multiplier": 12.0},
}
_VIT = {**_TRANSFORMER, "image_size": 32, "patch_size": 8}
VISION_FAMILIES: dict[str, dict] = {
    "siglip_vision_model": {**_VIT, "vision_use_head": False},
    "siglip2_vision_model": {**_TRANSFORMER, "patch_size": 8, "num_patches": 16, "vision_use_head": False},
    "clip_vision_model": {**_VIT, "projection_dim": 16},
    "vit": _VIT,
    "dinov2": {**_VIT, "mlp_ratio": 2},
    "dinov2_with_registers": {**_VIT, "mlp_ratio": 2, "num_register_tokens": 4},
    "dinov3_vit": {**_VIT, "num_register_tokens": 4},
    "mobilenet_v2": {"image_size": 64, "depth_multiplier": 0.35, "finegrained_output": False},
    "convnext": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "image_size": 64},
    "resnet": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "embedding_size": 8, "layer_type": "basic"},
}


@functools.cache
def _bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer.to_str()


def make_tokenizer(chat: bool = False, pad: bool = True, bos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most 400 pieces; with a ChatML template when `chat`."""
    tokens = {"eos_token": "<|im_end|>" if chat else "</s>"}
    tokens |= {"pad_token": "<pad>"} if pad else {}
    tokens |= {"bos_token": "<s>"} if bos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_bpe()), **tokens)
    if chat:
        tokenizer.chat_template = CHATML
    return tokenizer


def make_llm(
    folder: Path, family: str = "llama", chat: bool = False, pad: bool = True, seed: int = 0, **values
) -> Path:
    """Saves a tiny random language model of a family, with its tokenizer. Returns the folder."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(chat=chat, pad=pad)
    values = {"vocab_size": len(tokenizer), **LLM_FAMILIES[family], **values}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids["pad_token_id"] = tokenizer.pad_token_id
    config = AutoConfig.for_model(family, **values, **ids)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # larger than usual, so that differences show
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_vision(folder: Path, family: str = "siglip_vision_model", seed: int = 0, **values) -> Path:
    """Saves a tiny random vision encoder of a family, with its image processor. Returns the folder."""
    torch.manual_seed(seed)
    values = {**VISION_FAMILIES[family], **values}
    config = AutoConfig.for_model(family, **values)
    AutoModel.from_config(config).save_pretrained(folder)
    if family == "siglip2_vision_model":
        Siglip2ImageProcessor(patch_size=values["patch_size"], max_num_patches=values["num_patches"]).save_pretrained(
            folder
        )
    else:
        size = values.get("image_size", 64)
        ViTImageProcessor(
            size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ).save_pretrained(folder)
    return folder


def random_image(seed: int = 0, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A noise image, `(width, height)`."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


QFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
