"""The modules of the notebooks and the tutorial, re-implemented plainly with the names that their weights have."""

import copy

import torch
from torch import nn

VISION_WIDTH, LLM_WIDTH, QUERIES, TOLERANCE = 32, 32, 4, 1e-5


# ---- the modules, as the sources have them ----------------------------------------------------------------------------


class NotebookBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln1, self.ln2, self.ln3 = (nn.LayerNorm(width) for _ in range(3))
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True, dropout=0.1)
        self.cross_attn = nn.MultiheadAttention(width, heads, batch_first=True, dropout=0.1)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, q, v):
        x = self.ln1(q)
        q = q + self.self_attn(x, x, x)[0]
        v = self.ln2(v)
        q = q + self.cross_attn(self.ln2(q), v, v)[0]
        return q + self.mlp(self.ln3(q))


class NotebookQFormer(nn.Module):
    def __init__(self, vision_width, width, layers=3, heads=8):
        super().__init__()
        self.query = nn.Parameter(torch.randn(QUERIES, width))
        self.vis_proj = nn.Linear(vision_width, width)
        self.layers = nn.ModuleList([NotebookBlock(width, heads) for _ in range(layers)])
        self.final_ln = nn.LayerNorm(width)

    def forward(self, patches):
        v = self.vis_proj(patches)
        q = self.query[None].expand(len(v), -1, -1)
        for layer in self.layers:
            q = layer(q, v)
        return self.final_ln(q)


class NotebookProjector(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        hidden = 4 * width
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, width), nn.Dropout(0.1)
        )

    def forward(self, x, patches):
        return self.ln2(x + self.mlp(self.ln1(x)))


class NotebookExperts(nn.Module):
    def __init__(self, width, vision_width, experts=4):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1),
                nn.Linear(4 * width, width), nn.Dropout(0.1), nn.LayerNorm(width),
            )
            for _ in range(experts)
        )  # fmt: skip
        half = vision_width // 2
        self.router = nn.Sequential(
            nn.LayerNorm(vision_width), nn.Linear(vision_width, half), nn.GELU(), nn.Linear(half, experts)
        )

    def forward(self, x, patches):
        weights = self.router(patches[:, 0]).softmax(-1)
        return torch.einsum("be,bend->bnd", weights, torch.stack([expert(x) for expert in self.experts], 1))


class TutorialCross(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.cross_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.layernorm, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, q, v):
        q = self.layernorm(q + self.cross_attn(q, v, v)[0])
        return self.ln2(q + self.ffn(q))


class TutorialQFormer(nn.Module):
    def __init__(self, bert, heads):
        super().__init__()
        self.embeddings = copy.deepcopy(bert.embeddings)
        self.encoder_layers = nn.ModuleList([copy.deepcopy(layer) for layer in bert.transformer.layer])
        width = bert.config.hidden_size
        self.cross_blocks = nn.ModuleDict(
            {str(i): TutorialCross(width, heads) for i in range(len(self.encoder_layers)) if i % 2 == 1}
        )
        self.query_embeddings = nn.Parameter(torch.randn(1, QUERIES, width))

    def forward(self, patches):
        q = self.query_embeddings.expand(len(patches), -1, -1)
        for i, layer in enumerate(self.encoder_layers):
            out = layer(q)
            q = out if isinstance(out, torch.Tensor) else out[0]
            if str(i) in self.cross_blocks:
                q = self.cross_blocks[str(i)](q, patches)
        return q

    def encode_text(self, ids):
        x = self.embeddings(input_ids=ids)
        for layer in self.encoder_layers:
            out = layer(x)
            x = out if isinstance(out, torch.Tensor) else out[0]
        return x


class MinimalProjector(nn.Module):
    def __init__(self, vision_width, width):
        super().__init__()
        self.projection = nn.Sequential(
            nn.Linear(vision_width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, width)
        )

    def forward(self, patches):
        return self.projection(patches)


def randomize(module: nn.Module) -> nn.Module:
    """Fill all parameters with numbers large enough that a wrong one shows."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=0.1 if parameter.dim() == 1 else 0.0, std=0.3)
    return module.eval()
