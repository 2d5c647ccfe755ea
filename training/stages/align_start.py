"""The start of stage 1: a checkpoint with a Q-Former, a tokenizer, BERT's weights if asked for; what is trained."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

from blipren import BliprenForConditionalGeneration, BliprenForImageTextRetrieval, BliprenProcessor
from blipren.configuration_blipren import HEADS, split_revision
from blipren.qformer_weights_blipren import copy_bert_weights
from blipren.training.commands.align import AlignSettings
from blipren.training.console import print_line
from blipren.training.engine.loading import load_checkpoint, load_config
from blipren.training.engine.optimizer import without_decay
from blipren.training.errors import UserError

START_TOKENS = ("[DEC]", "[unused0]")  # LAVIS adds the first to BERT's vocabulary; the second lies there unused
SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0  # SigLIP's initial values


def starting_point(settings: AlignSettings):
    """Return (model, processor, tokenizer of the text side), the model with what stage 1 trains unfrozen."""
    aligned = "BliprenForImageTextRetrieval" in (load_config(settings.model).architectures or [])
    kind = BliprenForImageTextRetrieval if aligned else BliprenForConditionalGeneration
    generator, processor = load_checkpoint(settings.model, kind)
    tokenizer = text_tokenizer(settings, processor)
    # BERT fills the text side too: that of an earlier checkpoint, with another vocabulary, is not kept
    bert = settings.qformer_init and bert_weights(settings.qformer_init)
    if isinstance(generator, BliprenForImageTextRetrieval):
        model = generator
        check_vocabulary(model, tokenizer, settings)
    else:
        try:
            model = BliprenForImageTextRetrieval.from_generator(
                generator, text_side(settings, tokenizer, bert), settings.embedding_width, settings.pooling
            )
        except ValueError as error:
            raise UserError(f"{settings.model}: {error}") from error
        check_vocabulary(model, tokenizer, settings)
        with torch.no_grad():
            model.logit_scale.fill_(math.log(1 / settings.temperature))
            if settings.itc == "sigmoid":
                model.logit_scale.fill_(math.log(SIGMOID_SCALE))
                model.logit_bias.fill_(SIGMOID_BIAS)
    model.config.itc_pooling = settings.pooling
    text_config = model.config.qformer_config
    if text_config.decoder_start_token_id is None:
        text_config.decoder_start_token_id = start_token(tokenizer)
    if bert is not None:
        try:
            copied = copy_bert_weights(model.model.qformer, bert)
        except ValueError as error:
            raise UserError(
                f"the Q-Former of {settings.model} cannot start from {settings.qformer_init}: {error}"
            ) from error
        print_line(f"{len(copied)} weights of the Q-Former from {settings.qformer_init}")
    set_trained_heads(model, settings)
    processor.qformer_tokenizer = tokenizer
    freeze_unused_heads(model, settings)
    return model, processor, tokenizer


def text_tokenizer(settings: AlignSettings, processor: BliprenProcessor):
    """Return the tokenizer that is asked for, else BERT's, else the checkpoint's."""
    wanted = settings.tokenizer or settings.qformer_init
    if wanted is None:
        if processor.qformer_tokenizer is None:
            raise UserError(
                f"{settings.model} has no tokenizer for the Q-Former's text side: name a WordPiece one by --tokenizer "
                "(such as bert-base-uncased), or a BERT to start from by --qformer-init"
            )
        return processor.qformer_tokenizer
    name, revision = split_revision(wanted)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer in {wanted}: {error}") from error
    missing = [kind for kind in ("cls", "sep", "pad") if getattr(tokenizer, f"{kind}_token_id") is None]
    if missing:
        raise UserError(f"the tokenizer of {wanted} has no {missing[0]}_token: the text side needs BERT's WordPiece")
    return tokenizer


def bert_weights(name: str):
    name, revision = split_revision(name)
    try:
        return AutoModel.from_pretrained(name, revision=revision, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"no BERT or DistilBERT in {name}: {error}") from error


def start_token(tokenizer) -> int:
    """Return the first token of generation: one that contrast and matching do not begin with, if the vocabulary has it."""
    vocabulary = tokenizer.get_vocab()
    return next((vocabulary[token] for token in START_TOKENS if token in vocabulary), tokenizer.cls_token_id)


def text_side(settings: AlignSettings, tokenizer, bert) -> dict:
    """Return the sizes of a new text side."""
    sizes = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "decoder_start_token_id": start_token(tokenizer),
        "max_position_embeddings": settings.max_text_tokens,
    }
    if bert is not None:
        sizes["vocab_size"] = bert.config.vocab_size
        sizes["max_position_embeddings"] = bert.config.max_position_embeddings
    return sizes


def check_vocabulary(model, tokenizer, settings: AlignSettings) -> None:
    config = model.config.qformer_config
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the Q-Former of {settings.model} embeds {config.vocab_size}: "
            "take the tokenizer that it was made with"
        )
    if settings.max_text_tokens > config.max_position_embeddings:
        raise UserError(
            f"max_text_tokens is {settings.max_text_tokens}, the Q-Former has {config.max_position_embeddings} positions"
        )


def set_trained_heads(model: BliprenForImageTextRetrieval, settings: AlignSettings) -> None:
    """Add the heads that this run trains to `config.trained_heads`, which stays None (unknown) in older checkpoints."""
    before = [] if settings.qformer_init else model.config.trained_heads
    if before is not None:
        weights = dict(zip(HEADS, (settings.itc_weight, settings.itm_weight, settings.itg_weight), strict=True))
        model.config.trained_heads = [head for head in HEADS if head in before or weights[head]]


def freeze_unused_heads(model, settings: AlignSettings) -> None:
    """Freeze the heads that no chosen loss reads: a distributed run would wait for their gradients."""
    model.freeze()
    frozen = []
    if not settings.itc_weight:
        frozen += [*model.vision_proj.parameters(), *model.text_proj.parameters(), model.logit_scale]
    if not settings.itc_weight or settings.itc == "softmax":
        frozen.append(model.logit_bias)
    if not settings.itm_weight:
        frozen += model.itm_head.parameters()
    if not settings.itg_weight:
        frozen += model.text_head.parameters()
    for parameter in frozen:
        parameter.requires_grad_(False)


NEW_PARTS = ("query_tokens", "cross_attention", "patch_projection", "_proj.", "itm_head", "text_head", "logit_")


def is_new_part(name: str) -> bool:
    """Return whether a weight begins at random: queries, cross-attention, projections, heads. BERT has none of them."""
    return any(part in name for part in NEW_PARTS)


def parameter_groups(model: nn.Module, settings: AlignSettings) -> list[dict]:
    """Return the optimizer's groups: body and new parts, each with and without weight decay."""
    bare = without_decay(model)
    groups = []
    for is_new in (False, True):
        rate = settings.new_learning_rate or settings.learning_rate if is_new else settings.learning_rate
        for decayed in (True, False):
            members = [
                parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and is_new_part(name) == is_new and (name not in bare) == decayed
            ]
            if members:
                decay = settings.weight_decay if decayed else 0.0
                groups.append(
                    {"params": members, "lr": rate, "weight_decay": decay, "part": "new" if is_new else "body"}
                )
    return groups


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Return the norm of the gradients of the body and of the new parts, before clipping."""
    squares = {"grad_norm_body": 0.0, "grad_norm_new": 0.0}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            key = "grad_norm_new" if is_new_part(name) else "grad_norm_body"
            squares[key] += parameter.grad.detach().float().square().sum().item()
    return {name: math.sqrt(value) for name, value in squares.items()}
