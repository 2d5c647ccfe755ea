"""Names that other training code gives the weights of a Q-Former and a projector, and the copying of weights by them.

A table has pairs (pattern in our name, replacement); all that match are applied in order. torch's `MultiheadAttention`
stacks the weights of query, key and value: they are cut out of its `in_proj`.
"""

import re
from collections.abc import Sequence

import torch

from blipren.training.errors import UserError

Names = Sequence[tuple[str, str]]
Weights = dict[str, torch.Tensor]

_FEED_FORWARD = ((r"\.fc1\.", ".0."), (r"\.fc2\.", ".2."))

BLIPREN_QFORMER: Names = (
    (r"^query_tokens$", "query"),
    (r"^patch_projection\.", "vis_proj."),
    (r"^norm\.", "final_ln."),
    (r"\.self_attention_norm\.", ".ln1."),
    (r"\.cross_attention_norm\.", ".ln2."),
    (r"\.query_feed_forward_norm\.", ".ln3."),
    (r"\.self_attention\.", ".self_attn."),
    (r"\.cross_attention\.", ".cross_attn."),
    (r"\.query_feed_forward\.", ".mlp."),
    *_FEED_FORWARD,
)
BLIPREN_PROJECTOR: Names = (
    (r"^norm\.", "ln1."),
    (r"^output_norm\.", "ln2."),
    (r"^fc1\.", "mlp.0."),
    (r"^fc2\.", "mlp.3."),
)
BLIPREN_EXPERTS: Names = (
    (r"^(experts\.\d+)\.norm\.", r"\1.0."),
    (r"^(experts\.\d+)\.fc1\.", r"\1.1."),
    (r"^(experts\.\d+)\.fc2\.", r"\1.4."),
    (r"^(experts\.\d+)\.output_norm\.", r"\1.6."),
)
TWO_STAGE_QFORMER: Names = (
    (r"^query_tokens$", "query_embeddings"),
    (r"^(word_embeddings|position_embeddings)\.", r"embeddings.\1."),
    (r"^norm\.", "embeddings.LayerNorm."),
    (r"^layers\.(\d+)\.self_attention\.out\.", r"encoder_layers.\1.attention.out_lin."),
    (r"^layers\.(\d+)\.self_attention\.(.)\w+\.", r"encoder_layers.\1.attention.\2_lin."),
    (r"^layers\.(\d+)\.self_attention_norm\.", r"encoder_layers.\1.sa_layer_norm."),
    (r"^layers\.(\d+)\.text_feed_forward\.fc(.)\.", r"encoder_layers.\1.ffn.lin\2."),
    (r"^layers\.(\d+)\.text_feed_forward_norm\.", r"encoder_layers.\1.output_layer_norm."),
    (r"^layers\.(\d+)\.cross_attention\.", r"cross_blocks.\1.cross_attn."),
    (r"^layers\.(\d+)\.cross_attention_norm\.", r"cross_blocks.\1.layernorm."),
    (r"^layers\.(\d+)\.query_feed_forward\.", r"cross_blocks.\1.ffn."),
    (r"^layers\.(\d+)\.query_feed_forward_norm\.", r"cross_blocks.\1.ln2."),
    *_FEED_FORWARD,
)
TWO_STAGE_PROJECTOR: Names = ((r"^fc1\.", "0."), (r"^fc2\.", "2."))
MINIMAL_PROJECTOR: Names = (
    (r"^fc1\.", "projection.0."),
    (r"^norm\.", "projection.2."),
    (r"^fc2\.", "projection.3."),
)
# not weights: older versions of transformers save these buffers of positions
_BUFFERS = ("position_ids", "inv_freq")


def source_name(name: str, names: Names) -> tuple[str, int | None]:
    """Return the source's name of our weight `name`, and which third of it that is where three are stacked."""
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    name = re.sub(r"(_attn)\.out\.", r"\1.out_proj.", name)
    stacked = re.search(r"(_attn\.)(query|key|value)\.", name)
    if stacked is None:
        return name, None
    third = ("query", "key", "value").index(stacked[2])
    return name.replace(f"{stacked[0]}", f"{stacked[1]}in_proj_"), third


@torch.no_grad()
def copy_by_name(own: Weights, weights: Weights, part: str, names: Names = ()) -> None:
    """Copy the weights of a state dict with other names into a module's `own` state dict. Tied weights may be there once.

    Raises:
        UserError: a weight is missing, unknown, or has another shape; the message has the source's name.
    """
    sources = {name: source_name(name, names) for name in own}
    present = {own[name].data_ptr() for name, (source, _) in sources.items() if source in weights}
    for name, (source, third) in sources.items():
        target = own[name]
        if source not in weights:
            if target.data_ptr() in present:
                continue
            raise UserError(f"{part}: the weight {source!r} is missing")
        value, shape = weights[source], list(target.shape)
        if third is not None:
            shape[0] *= 3
        if value.dim() == len(shape) - 1 and name == "query_tokens":
            shape = shape[1:]
        if list(value.shape) != shape:
            raise UserError(
                f"{part}: the weight {source!r} has shape {tuple(value.shape)}; with the given vision encoder and language "
                f"model it must have {tuple(shape)}"
            )
        target.copy_(value if third is None else value.chunk(3)[third])
    known = {source for source, _ in sources.values()}
    if unknown := [name for name in weights if name not in known and not name.endswith(_BUFFERS)]:
        raise UserError(f"{part}: the weight {unknown[0]!r} is unknown ({len(unknown)} such weights)")
