"""Weights of a Q-Former copied from BERT, DistilBERT or BLIP-2."""

import torch
from torch import nn

from .qformer_blipren import BliprenQFormer

# names inside a layer: of BERT, DistilBERT or BLIP-2 -> ours
_BERT_NAMES = {
    "attention.self.query": ["self_attention.query"],
    "attention.self.key": ["self_attention.key"],
    "attention.self.value": ["self_attention.value"],
    "attention.output.dense": ["self_attention.out"],
    "attention.output.LayerNorm": ["self_attention_norm"],
    # both feed-forwards start from that of BERT, as in LAVIS
    "intermediate.dense": ["text_feed_forward.fc1", "query_feed_forward.fc1"],
    "output.dense": ["text_feed_forward.fc2", "query_feed_forward.fc2"],
    "output.LayerNorm": ["text_feed_forward_norm", "query_feed_forward_norm"],
}
_DISTILBERT_NAMES = {
    "attention.q_lin": ["self_attention.query"],
    "attention.k_lin": ["self_attention.key"],
    "attention.v_lin": ["self_attention.value"],
    "attention.out_lin": ["self_attention.out"],
    "sa_layer_norm": ["self_attention_norm"],
    "ffn.lin1": ["text_feed_forward.fc1", "query_feed_forward.fc1"],
    "ffn.lin2": ["text_feed_forward.fc2", "query_feed_forward.fc2"],
    "output_layer_norm": ["text_feed_forward_norm", "query_feed_forward_norm"],
}
_BLIP2_NAMES = {
    "attention.attention.query": ["self_attention.query"],
    "attention.attention.key": ["self_attention.key"],
    "attention.attention.value": ["self_attention.value"],
    "attention.output.dense": ["self_attention.out"],
    "attention.output.LayerNorm": ["self_attention_norm"],
    "crossattention.attention.query": ["cross_attention.query"],
    "crossattention.attention.key": ["cross_attention.key"],
    "crossattention.attention.value": ["cross_attention.value"],
    "crossattention.output.dense": ["cross_attention.out"],
    "crossattention.output.LayerNorm": ["cross_attention_norm"],
    "intermediate.dense": ["text_feed_forward.fc1"],
    "output.dense": ["text_feed_forward.fc2"],
    "output.LayerNorm": ["text_feed_forward_norm"],
    "intermediate_query.dense": ["query_feed_forward.fc1"],
    "output_query.dense": ["query_feed_forward.fc2"],
    "output_query.LayerNorm": ["query_feed_forward_norm"],
}


def _rename_layers(source: dict, prefix: str, names: dict, own: dict) -> dict:
    """Return the tensors of the layers under our names, without those that `own` does not have."""
    renamed = {}
    for key, tensor in source.items():
        if not key.startswith(prefix):
            continue
        index, _, rest = key[len(prefix) :].partition(".")
        module, _, kind = rest.rpartition(".")
        for target in names.get(module, []):
            name = f"layers.{index}.{target}.{kind}"
            if name in own:
                renamed[name] = tensor
    return renamed


@torch.no_grad()
def copy_bert_weights(qformer: BliprenQFormer, bert: nn.Module) -> list[str]:
    """Copy self-attention, feed-forward and embeddings of BERT or DistilBERT into a Q-Former.

    Cross-attention and queries keep their values.

    Args:
        qformer: post-norm Q-Former of the same width and at most as many layers.
        bert: `BertModel` or `DistilBertModel`.

    Returns:
        Names of the copied parameters.

    Raises:
        ValueError: for another width, number of layers, norm position or architecture.
    """
    source, own = bert.state_dict(), qformer.state_dict()
    if qformer.config.norm_position != "post":
        raise ValueError("a Q-Former starts from BERT only with norm_position='post', as BERT is post-norm")
    if bert.config.hidden_size != qformer.config.hidden_size:
        raise ValueError(f"BERT is {bert.config.hidden_size} wide, the Q-Former {qformer.config.hidden_size}")
    if bert.config.num_hidden_layers < qformer.config.num_hidden_layers:
        raise ValueError(
            f"BERT has {bert.config.num_hidden_layers} layers, the Q-Former {qformer.config.num_hidden_layers}"
        )
    if any(key.startswith("encoder.layer.") for key in source):
        renamed = _rename_layers(source, "encoder.layer.", _BERT_NAMES, own)
    elif any(key.startswith("transformer.layer.") for key in source):
        renamed = _rename_layers(source, "transformer.layer.", _DISTILBERT_NAMES, own)
    else:
        raise ValueError(f"{type(bert).__name__} is neither a BERT nor a DistilBERT encoder")
    if qformer.config.query_feed_forward == "after_cross_attention":  # which BERT does not have
        renamed = {name: tensor for name, tensor in renamed.items() if "query_feed_forward" not in name}
    for kind in ("weight", "bias"):
        renamed[f"norm.{kind}"] = source[f"embeddings.LayerNorm.{kind}"]
    if qformer.config.use_text:
        renamed["word_embeddings.weight"] = source["embeddings.word_embeddings.weight"]
        positions = source["embeddings.position_embeddings.weight"]
        token_types = source.get("embeddings.token_type_embeddings.weight")
        # BERT adds the embedding of token type 0 everywhere; the Q-Former has no token types
        renamed["position_embeddings.weight"] = positions if token_types is None else positions + token_types[0]
    for name, tensor in renamed.items():
        if own[name].shape != tensor.shape:
            raise ValueError(f"{name} is {tuple(own[name].shape)} in the Q-Former, {tuple(tensor.shape)} in BERT")
        own[name].copy_(tensor)
    return sorted(renamed)


@torch.no_grad()
def copy_blip2_weights(qformer: BliprenQFormer, source: dict[str, torch.Tensor]) -> list[str]:
    """Copy the Q-Former of a transformers BLIP-2 model.

    Args:
        qformer: Q-Former of the same sizes.
        source: state dict with `query_tokens`, `qformer.*`, and `embeddings.*` for a text side.

    Returns:
        Names of the copied parameters.

    Raises:
        ValueError: for parameters that the source lacks, or that differ in shape.
    """
    own = qformer.state_dict()
    renamed = _rename_layers(source, "qformer.encoder.layer.", _BLIP2_NAMES, own)
    renamed["query_tokens"] = source["query_tokens"]
    for kind in ("weight", "bias"):
        renamed[f"norm.{kind}"] = source[f"qformer.layernorm.{kind}"]
    for name in ("word_embeddings.weight", "position_embeddings.weight"):
        for key in (f"embeddings.{name}", f"qformer.embeddings.{name}"):
            if name in own and key in source:
                renamed[name] = source[key]
    missing = sorted(set(own) - set(renamed))
    if missing:
        raise ValueError(f"the BLIP-2 weights lack {len(missing)} parameters of the Q-Former, such as {missing[0]}")
    for name, tensor in renamed.items():
        if own[name].shape != tensor.shape:
            raise ValueError(f"{name} is {tuple(own[name].shape)} in the Q-Former, {tuple(tensor.shape)} in BLIP-2")
        own[name].copy_(tensor)
    return sorted(renamed)


__all__ = ["copy_bert_weights", "copy_blip2_weights"]
