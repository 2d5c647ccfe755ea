"""Projectors: from the width of the connector to the width of the language model's embeddings."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_blipren import BliprenConfig


class BliprenMlp(nn.Module):
    """`LN(x + MLP(LN(x)))`, behind a linear layer if input and output differ in width."""

    def __init__(self, config: BliprenConfig, out_size: int):
        super().__init__()
        hidden = config.projector_hidden_size or 4 * out_size
        width = config.connector_hidden_size
        self.input = nn.Linear(width, out_size) if width != out_size else nn.Identity()
        self.norm = nn.LayerNorm(out_size)
        self.fc1 = nn.Linear(out_size, hidden)
        self.activation = ACT2FN[config.projector_hidden_act]
        self.dropout = nn.Dropout(config.projector_dropout)
        self.fc2 = nn.Linear(hidden, out_size)
        self.output_norm = nn.LayerNorm(out_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.input(hidden_states)
        update = self.fc2(self.dropout(self.activation(self.fc1(self.norm(hidden_states)))))
        return self.output_norm(hidden_states + self.dropout(update))


class BliprenMlp2(nn.Module):
    """Linear, activation, linear, as in LLaVA-1.5 (https://arxiv.org/abs/2310.03744); optionally a norm in between."""

    def __init__(self, config: BliprenConfig, out_size: int):
        super().__init__()
        hidden = config.projector_hidden_size or out_size
        self.fc1 = nn.Linear(config.connector_hidden_size, hidden)
        self.activation = ACT2FN[config.projector_hidden_act]
        self.norm = nn.LayerNorm(hidden) if config.projector_mid_norm else nn.Identity()
        self.fc2 = nn.Linear(hidden, out_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.norm(self.activation(self.fc1(hidden_states))))


class BliprenExpert(nn.Module):
    """One expert of the mixture: LN, linear, activation, linear, LN."""

    def __init__(self, config: BliprenConfig, out_size: int):
        super().__init__()
        hidden = config.projector_hidden_size or 4 * out_size
        self.norm = nn.LayerNorm(config.connector_hidden_size)
        self.fc1 = nn.Linear(config.connector_hidden_size, hidden)
        self.activation = ACT2FN[config.projector_hidden_act]
        self.fc2 = nn.Linear(hidden, out_size)
        self.output_norm = nn.LayerNorm(out_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.output_norm(self.fc2(self.activation(self.fc1(self.norm(hidden_states)))))


class BliprenMoeProjector(nn.Module):
    """Mixture of experts with one routing per image; the router reads the image's mean (or first) patch feature."""

    def __init__(self, config: BliprenConfig, out_size: int):
        super().__init__()
        self.config = config
        width = config.vision_hidden_size
        self.router = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, config.num_experts)
        )
        self.experts = nn.ModuleList([BliprenExpert(config, out_size) for _ in range(config.num_experts)])

    def forward(
        self, hidden_states: torch.Tensor, patch_features: torch.Tensor, patch_attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Mix the experts' outputs: all of them, or the `config.experts_top_k` most probable ones.

        The weights of several chosen experts sum to 1. A single one is weighted with its probability (Switch Transformer,
        arXiv 2101.03961).

        Args:
            hidden_states: `(batch, num_visual_tokens, connector_hidden_size)`.
            patch_features: `(batch, num_patches, vision_hidden)`, for the router.
            patch_attention_mask: `(batch, num_patches)`, 1 for patches and 0 for padding.

        Returns:
            Image features `(batch, num_visual_tokens, text_hidden)`, router probabilities `(batch, num_experts)`, and in
            training the weighted balance loss and z-loss `()`.
        """
        if self.config.router_input == "first":
            pooled = patch_features[:, 0]
        elif patch_attention_mask is None:
            pooled = patch_features.mean(dim=1)
        else:
            mask = patch_attention_mask.unsqueeze(-1).to(patch_features.dtype)
            pooled = (patch_features * mask).sum(dim=1) / mask.sum(dim=1)
        logits = self.router(pooled)  # [B, E]
        if self.training and self.config.router_noise:
            logits = logits + torch.randn_like(logits) * self.config.router_noise
        probs = logits.softmax(dim=-1)
        weights, top_k = probs, self.config.experts_top_k
        if top_k is not None:
            values, chosen = probs.topk(top_k, dim=-1)
            if top_k > 1:  # one expert keeps its probability, as in Switch: normalised to 1, it has no gradient
                values = values / values.sum(dim=-1, keepdim=True)
            weights = torch.zeros_like(probs).scatter(-1, chosen, values)
        if top_k is None:
            outputs = torch.stack([expert(hidden_states) for expert in self.experts], dim=1)  # [B, E, N, D]
            mixed = torch.einsum("be,bend->bnd", weights, outputs)
        else:
            mixed = 0.0
            for index, expert in enumerate(self.experts):
                # each expert computes only the images that are routed to it
                rows = weights[:, index].nonzero(as_tuple=True)[0]
                update = expert(hidden_states[rows]) * weights[rows, index, None, None]
                base = torch.zeros(
                    *hidden_states.shape[:2], update.shape[-1], dtype=update.dtype, device=update.device
                )
                mixed = mixed + base.index_add(0, rows, update)
        aux_loss = None
        if self.training:
            # Switch Transformer: share of images of an expert times its mean probability; 1 if balanced
            load = (weights > 0).to(probs.dtype).mean(dim=0) / (top_k or 1) if top_k is not None else probs.mean(dim=0)
            balance = self.config.num_experts * (load * probs.mean(dim=0)).sum()
            z_loss = logits.logsumexp(dim=-1).square().mean()
            aux_loss = self.config.router_balance_weight * balance + self.config.router_z_weight * z_loss
        return mixed, probs, aux_loss


def build_projector(config: BliprenConfig, out_size: int) -> nn.Module:
    """Build the projector that `config.projector` names; its output is `out_size` wide."""
    if config.projector == "linear":
        return nn.Linear(config.connector_hidden_size, out_size)
    return {"mlp2": BliprenMlp2, "mlp": BliprenMlp, "moe": BliprenMoeProjector}[config.projector](config, out_size)


__all__ = ["BliprenExpert", "BliprenMlp", "BliprenMlp2", "BliprenMoeProjector", "build_projector"]
