"""The Q-Former: learned queries that self-attend, and cross-attend to patch features (BLIP-2, arXiv 2301.12597)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from .qformer_configuration_blipren import BliprenQFormerConfig


@dataclass
class BliprenQFormerOutput(ModelOutput):
    """
    Args:
        query_states (`torch.Tensor` of shape `(batch, num_queries, hidden_size)`, *optional*): last states of queries.
        text_states (`torch.Tensor` of shape `(batch, text_length, hidden_size)`, *optional*): last states of text.
        cross_attentions (`tuple[torch.Tensor]` of shape `(batch, heads, num_queries, num_patches)`, *optional*):
            weights of each layer with cross-attention, before dropout.
        hidden_states (`tuple[torch.Tensor]` of shape `(batch, num_queries + text_length, hidden_size)`, *optional*):
            embeddings, then the output of every layer.
    """

    query_states: torch.Tensor | None = None
    text_states: torch.Tensor | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


def build_qformer_attention_mask(
    pattern: str, num_queries: int, text_attention_mask: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Build the self-attention mask of a stage-1 objective (BLIP-2, https://arxiv.org/abs/2301.12597, figure 2).

    Args:
        pattern: `"unimodal"` (ITC: queries attend to queries, text to text), `"bidirectional"` (ITM: all attend to all)
            or `"causal"` (ITG: queries attend to queries, text to queries and to text up to itself).
        num_queries: number of queries in front of the text.
        text_attention_mask: `(batch, text_length)`, 1 for text and 0 for padding; `None` without text.

    Returns:
        Boolean mask `(batch, 1, num_queries + text_length, num_queries + text_length)`, True where attention is allowed;
        `None` without text.

    Raises:
        ValueError: for another pattern.
    """
    if text_attention_mask is None:
        return None
    batch, text_length = text_attention_mask.shape
    length = num_queries + text_length
    device = text_attention_mask.device
    is_text = torch.arange(length, device=device) >= num_queries
    rows, columns = is_text[:, None], is_text[None, :]
    if pattern == "unimodal":
        allowed = rows == columns
    elif pattern == "bidirectional":
        allowed = torch.ones(length, length, dtype=torch.bool, device=device)
    elif pattern == "causal":
        position = torch.arange(length, device=device)
        allowed = ~columns | (rows & (position[None, :] <= position[:, None]))
    else:
        raise ValueError(f"attention pattern is {pattern!r}; it must be 'unimodal', 'bidirectional' or 'causal'")
    valid = F.pad(text_attention_mask.bool(), (num_queries, 0), value=True)  # [batch, length]
    # a padding token attends to itself: the softmax of a row without keys would be NaN
    itself = torch.eye(length, dtype=torch.bool, device=device)
    return ((allowed & valid[:, None, :]) | itself).unsqueeze(1)


class BliprenQFormerAttention(nn.Module):
    """Multi-head self- or cross-attention by SDPA, or with explicit weights if `output_attentions`."""

    def __init__(self, config: BliprenQFormerConfig, key_value_size: int):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(key_value_size, config.hidden_size)
        self.value = nn.Linear(key_value_size, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,  # [B, N, D]
        key_value_states: torch.Tensor,  # [B, M, Dkv]
        attention_mask: torch.Tensor | None,  # bool, broadcastable to [B, heads, N, M]
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = (
            layer(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, N or M, D/heads]
            for layer, states in (
                (self.query, hidden_states),
                (self.key, key_value_states),
                (self.value, key_value_states),
            )
        )
        dropout = self.dropout if self.training else 0.0
        weights = None
        if output_attentions:
            scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
            if attention_mask is not None:
                scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
            weights = scores.softmax(dim=-1)  # [B, heads, N, M]
            context = F.dropout(weights, dropout, self.training) @ value
        else:
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, dropout_p=dropout)
        return self.out(context.transpose(1, 2).flatten(2)), weights


class BliprenQFormerFeedForward(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, config: BliprenQFormerConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class BliprenQFormerLayer(GradientCheckpointingLayer):
    """Self-attention of queries and text, cross-attention of queries in some layers, feed-forward of each."""

    def __init__(self, config: BliprenQFormerConfig, layer_idx: int):
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.has_cross_attention = (
            layer_idx >= config.cross_attention_offset
            and (layer_idx - config.cross_attention_offset) % config.cross_attention_frequency == 0
        )
        self.shares_feed_forward = config.query_feed_forward == "after_cross_attention"
        self.has_query_feed_forward = self.has_cross_attention or not self.shares_feed_forward
        self.normalize_keys = config.normalize_keys
        width, eps = config.hidden_size, config.layer_norm_eps
        cross_eps = config.cross_attention_norm_eps if config.cross_attention_norm_eps is not None else eps
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.self_attention = BliprenQFormerAttention(config, width)
        self.self_attention_norm = nn.LayerNorm(width, eps=eps)
        if self.has_cross_attention:
            self.cross_attention = BliprenQFormerAttention(
                config, width if config.project_patches else config.encoder_hidden_size
            )
            self.cross_attention_norm = nn.LayerNorm(width, eps=cross_eps)
        if self.has_query_feed_forward:
            self.query_feed_forward = BliprenQFormerFeedForward(config)
            self.query_feed_forward_norm = nn.LayerNorm(width, eps=cross_eps if self.shares_feed_forward else eps)
        if config.use_text or self.shares_feed_forward:
            self.text_feed_forward = BliprenQFormerFeedForward(config)
            self.text_feed_forward_norm = nn.LayerNorm(width, eps=eps)

    def _residual(self, states: torch.Tensor, norm: nn.LayerNorm, block) -> torch.Tensor:
        if self.pre_norm:
            return states + self.dropout(block(norm(states)))
        return norm(states + self.dropout(block(states)))

    def forward(
        self,
        hidden_states: torch.Tensor,  # [B, Q + T, D]
        num_queries: int,
        attention_mask: torch.Tensor | None,  # bool [B, 1, Q + T, Q + T]
        patch_features: torch.Tensor | None,  # [B, P, Dv]
        patch_mask: torch.Tensor | None,  # bool [B, 1, 1, P]
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden_states = self._residual(
            hidden_states, self.self_attention_norm, lambda x: self.self_attention(x, x, attention_mask)[0]
        )
        queries, text = hidden_states[:, :num_queries], hidden_states[:, num_queries:]
        cross_attention = None
        if num_queries:
            if self.shares_feed_forward:
                queries = self._residual(queries, self.text_feed_forward_norm, self.text_feed_forward)
            if self.has_cross_attention:
                keys = self.cross_attention_norm(patch_features) if self.normalize_keys else patch_features

                def attend(x):
                    nonlocal cross_attention
                    context, cross_attention = self.cross_attention(x, keys, patch_mask, output_attentions)
                    return context

                queries = self._residual(queries, self.cross_attention_norm, attend)
            if self.has_query_feed_forward:
                queries = self._residual(queries, self.query_feed_forward_norm, self.query_feed_forward)
        if text.shape[1]:
            text = self._residual(text, self.text_feed_forward_norm, self.text_feed_forward)
        return torch.cat([queries, text], dim=1), cross_attention


class BliprenQFormer(PreTrainedModel):
    """Q-Former with its learned queries; text beside the queries if `config.use_text` (stage 1, InstructBLIP)."""

    config_class = BliprenQFormerConfig
    config: BliprenQFormerConfig
    base_model_prefix = "qformer"
    main_input_name = "patch_features"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BliprenQFormerLayer"]
    # it calls SDPA itself, whatever implementation is chosen for the other parts
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: BliprenQFormerConfig):
        super().__init__(config)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, config.hidden_size))
        if config.normalize_patches:
            self.patch_norm = nn.LayerNorm(config.encoder_hidden_size, eps=1e-6)
        if config.project_patches:
            self.patch_projection = nn.Linear(config.encoder_hidden_size, config.hidden_size)
        width = config.hidden_size if config.project_patches else config.encoder_hidden_size
        if config.num_pieces > 1:
            self.piece_embeddings = nn.Embedding(config.num_pieces, width)
        if config.patch_position_embeddings:
            self.patch_position_embeddings = nn.Embedding(config.num_patches, width)
        if config.time_embedding == "learned":
            self.time_embeddings = nn.Embedding(config.num_frames, width)
        if config.use_text:
            self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        # post-norm: norm of the embeddings, as in BERT; pre-norm: norm of the output
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList([BliprenQFormerLayer(config, i) for i in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BliprenQFormer):
            init.normal_(module.query_tokens, std=module.config.query_init_std)
            if module.config.num_pieces > 1:  # about as large as patch features, or a piece's place is learned late
                init.normal_(module.piece_embeddings.weight, std=1.0)
            if module.config.time_embedding == "learned":  # likewise
                init.normal_(module.time_embeddings.weight, std=1.0)

    def text_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that only text uses: embeddings, and feed-forwards that queries do not share."""
        if not self.config.use_text:
            return []
        modules = [self.word_embeddings, self.position_embeddings]
        if self.config.norm_position == "post" and not self.config.normalize_queries:
            modules.append(self.norm)
        for layer in self.layers:
            if not layer.shares_feed_forward:
                modules += [layer.text_feed_forward, layer.text_feed_forward_norm]
        return [parameter for module in modules for parameter in module.parameters()]

    def _embed_time(self, times: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return the embedding `(..., width)` of places of frames or of seconds; sinusoids are those of the Transformer."""
        if self.config.time_embedding == "learned":
            return self.time_embeddings(times)
        half = torch.arange(0, like.shape[-1], 2, device=like.device, dtype=torch.float32)
        angles = times[..., None] / 10000 ** (half / like.shape[-1])
        waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., : like.shape[-1]]
        return (self.config.time_embedding_scale * waves).to(like.dtype)

    def get_input_embeddings(self) -> nn.Module | None:
        return self.word_embeddings if self.config.use_text else None

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.word_embeddings = value

    def forward(
        self,
        patch_features: torch.Tensor | None = None,
        patch_attention_mask: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        text_attention_mask: torch.Tensor | None = None,
        attention_pattern: str = "bidirectional",
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        **kwargs,
    ) -> BliprenQFormerOutput:
        r"""Compute the states of queries on patch features, of text, or of both.

        Args:
            patch_features: `(batch, num_patches, encoder_hidden_size)`; `None` for text alone, without queries. With
                `time_embedding="seconds"` one wider: the last column is the time of the patch's frame.
            patch_attention_mask: `(batch, num_patches)`, 1 for patches and 0 for padding.
            input_ids: `(batch, text_length)` of the Q-Former's own tokenizer; needs `config.use_text`.
            text_attention_mask: `(batch, text_length)`; all ones by default.
            attention_pattern: see [`build_qformer_attention_mask`].
            output_attentions: return the cross-attention weights.
            output_hidden_states: return the states of every layer.

        Raises:
            ValueError: without patch features and text, with text for a Q-Former without a text side, with text that is
                too long, or with patch features of another width.
        """
        if patch_features is None and input_ids is None:
            raise ValueError("the Q-Former needs patch_features, input_ids, or both")
        if input_ids is not None and not self.config.use_text:
            raise ValueError("this Q-Former has no text side: make it with use_text=True to pass input_ids")
        parts, num_queries = [], 0
        if patch_features is not None:
            by_seconds = self.config.time_embedding == "seconds"
            width = self.config.encoder_hidden_size + by_seconds
            if patch_features.shape[-1] != width:
                raise ValueError(
                    f"patch_features are {patch_features.shape[-1]} wide, the Q-Former expects {width}: they come from "
                    "another vision encoder or layer"
                )
            if by_seconds:
                patch_features, times = patch_features[..., :-1], patch_features[..., -1].float()
            patch_features = patch_features.to(self.query_tokens.dtype)
            num_queries = self.query_tokens.shape[1]
            parts.append(self.query_tokens.expand(patch_features.shape[0], -1, -1))
            if self.config.normalize_patches:
                patch_features = self.patch_norm(patch_features)
            if self.config.project_patches:
                patch_features = self.patch_projection(patch_features)
            if self.config.num_pieces > 1:
                patches = torch.arange(patch_features.shape[1], device=patch_features.device)
                pieces = patches // self.config.patches_per_piece % self.config.num_pieces
                patch_features = patch_features + self.piece_embeddings(pieces)
            if self.config.patch_position_embeddings:
                frames, rest = divmod(patch_features.shape[1], self.config.num_patches)
                if rest:
                    raise ValueError(
                        f"images have {patch_features.shape[1]} patches, and the Q-Former has position embeddings for "
                        f"{self.config.num_patches}: make it for this encoder and image size"
                    )
                patch_features = patch_features + self.patch_position_embeddings.weight.repeat(frames, 1)
            if by_seconds:
                patch_features = patch_features + self._embed_time(times, patch_features)
            elif self.config.time_embedding is not None:
                patches = torch.arange(patch_features.shape[1], device=patch_features.device)
                patch_features = patch_features + self._embed_time(
                    patches // self.config.patches_per_frame, patch_features
                )
        if input_ids is not None:
            if input_ids.shape[1] > self.config.max_position_embeddings:
                raise ValueError(
                    f"text has {input_ids.shape[1]} tokens, the Q-Former takes {self.config.max_position_embeddings}"
                )
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            parts.append(self.word_embeddings(input_ids) + self.position_embeddings(positions))
            if text_attention_mask is None:
                text_attention_mask = torch.ones_like(input_ids)
        if self.config.norm_position == "post" and not self.config.normalize_queries and input_ids is not None:
            parts[-1] = self.norm(parts[-1])
        hidden_states = torch.cat(parts, dim=1)  # [B, Q + T, D]
        if self.config.norm_position == "post" and self.config.normalize_queries:
            hidden_states = self.norm(hidden_states)
        hidden_states = self.dropout(hidden_states)

        mask = build_qformer_attention_mask(
            attention_pattern, num_queries, text_attention_mask if input_ids is not None else None
        )
        patch_mask = patch_attention_mask.bool()[:, None, None, :] if patch_attention_mask is not None else None
        cross_attentions, all_states = [], [hidden_states]
        for layer in self.layers:
            hidden_states, cross_attention = layer(
                hidden_states, num_queries, mask, patch_features, patch_mask, output_attentions
            )
            all_states.append(hidden_states)
            if cross_attention is not None:
                cross_attentions.append(cross_attention)
        if self.config.norm_position == "pre":
            hidden_states = self.norm(hidden_states)
        return BliprenQFormerOutput(
            query_states=hidden_states[:, :num_queries] if num_queries else None,
            text_states=hidden_states[:, num_queries:] if input_ids is not None else None,
            cross_attentions=tuple(cross_attentions) if output_attentions else None,
            hidden_states=tuple(all_states) if output_hidden_states else None,
        )


__all__ = [
    "BliprenQFormer",
    "BliprenQFormerOutput",
    "build_qformer_attention_mask",
]
