"""The arms of `train.py`: one bridge with the same weights, trained by a notebook's loop, as BLIP-2, and as in `blipren`."""

from pathlib import Path

import numpy as np
import torch
from parts.notebook_rows import padded_with_labels
from PIL import Image
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    LlamaConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from blipren import BliprenConfig, BliprenForConditionalGeneration, BliprenQFormerConfig
from blipren.modeling_blipren import copy_weights
from blipren.qformer_weights_blipren import copy_blip2_weights
from blipren.training.data.batches.blocks import PromptEncoder, Segment, build_blocks
from blipren.training.data.batches.collate import collate_padded, collate_shared, useful_share
from blipren.training.data.batches.masks import build_attention_mask, shared_prefix_block_mask
from blipren.training.objectives.likelihood import answer_losses

LLAMA_135M = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                  num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)  # fmt: skip
LLAMA_1B = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True)  # fmt: skip
VIT_B = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224,
             patch_size=16)  # fmt: skip
VIT_SO400M = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
                  image_size=384, patch_size=14)  # fmt: skip
QFORMER = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
               cross_attention_frequency=2)  # fmt: skip
SMALL = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
SHAPES = {
    "b16-135m": (VIT_B, QFORMER, LLAMA_135M, 32),
    "so400m-1b": (VIT_SO400M, QFORMER, LLAMA_1B, 32),
    "tiny": (
        SMALL | dict(image_size=32, patch_size=8),
        SMALL | dict(cross_attention_frequency=2),
        SMALL | dict(num_key_value_heads=2, vocab_size=500, tie_word_embeddings=True),
        4,
    ),
}
EOS, PAD, CAPTION_LENGTH = 2, 0, 64


class Words:
    """In place of a processor: a plain prompt of four tokens after the image."""

    prompts, system_prompts = ["Short caption:"], []

    def __init__(self, image_token_id: int):
        self.image_token_id = image_token_id

    def encode_prompt(self, prompt=None, system=None, num_visual_tokens=()):
        return [1] + [self.image_token_id] * num_visual_tokens[0] + [11, 12, 13]


class CachedFeatures(nn.Module):
    """In place of BLIP-2's vision encoder: returns features that were computed before."""

    main_input_name = "pixel_values"
    features: torch.Tensor

    def forward(self, pixel_values=None, **keywords):
        return BaseModelOutputWithPooling(last_hidden_state=self.features)


class Bench:
    """The two models with equal weights, the data, and a method for each arm."""

    def __init__(self, options, folder: Path):
        vision, qformer, llm, self.queries = SHAPES[options.shape]
        self.options, self.device = options, torch.device(options.device)
        torch.manual_seed(0)
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        text_config = LlamaConfig(
            **llm, max_position_embeddings=2048, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS
        )
        image_token = llm["vocab_size"] - 1  # BLIP-2 embeds its placeholder, so it must be in the vocabulary
        self.blip2 = Blip2ForConditionalGeneration(
            Blip2Config(
                vision_config=Blip2VisionConfig(**vision),
                qformer_config=Blip2QFormerConfig(**qformer, **no_dropout, encoder_hidden_size=vision["hidden_size"], vocab_size=8),
                text_config=text_config,
                num_query_tokens=self.queries,
                image_token_index=image_token,
            )
        )  # fmt: skip
        self.ours = BliprenForConditionalGeneration(
            BliprenConfig(
                vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
                text_config=text_config,
                qformer_config=BliprenQFormerConfig(
                    **qformer, **no_dropout, encoder_hidden_size=vision["hidden_size"], num_query_tokens=self.queries
                ),
                projector="linear",
                image_token_id=image_token,
            )
        )
        copy_weights(self.ours.model.language_model, self.blip2.language_model.model)
        self.ours.tie_weights()
        weights = {k: v for k, v in self.blip2.state_dict().items() if k.startswith(("qformer.", "query_tokens"))}
        copy_blip2_weights(self.ours.model.qformer, weights)
        self.ours.model.projector.load_state_dict(self.blip2.language_projection.state_dict())
        self.vision_model, self.cached = self.blip2.vision_model, CachedFeatures()
        for model in (self.ours, self.blip2):
            model.to(self.device).train()
        self.ours.freeze()
        self.blip2.requires_grad_(False)
        self.blip2.vision_model.eval()
        self.blip2.language_model.eval()
        trained = [
            self.blip2.query_tokens,
            *self.blip2.qformer.parameters(),
            *self.blip2.language_projection.parameters(),
        ]
        for parameter in trained:
            parameter.requires_grad_(True)
        self.optimizers = {
            "ours": torch.optim.AdamW([p for p in self.ours.parameters() if p.requires_grad], lr=0.0),
            "blip2": torch.optim.AdamW(trained, lr=0.0),  # a rate of zero keeps all arms' losses comparable
        }
        self.image_processor = SiglipImageProcessorPil(
            size={"height": vision["image_size"], "width": vision["image_size"]}
        )
        self.photos = self.draw(folder, options.images)
        random = np.random.default_rng(1)
        # lengths as of Flickr8k's captions under a small BPE: 6 to 24 tokens, 13 in the mean
        self.captions = [
            [
                [*random.integers(20, llm["vocab_size"] - 2, int(np.clip(random.gamma(9, 1.45), 6, 24))).tolist(), EOS]
                for _ in range(options.captions)
            ]
            for _ in range(options.images)
        ]
        prompts = PromptEncoder(Words(image_token))
        self.blocks = [
            block
            for i, answers in enumerate(self.captions)
            for block in build_blocks((0, i), [(None, a) for a in answers], self.queries, prompts)
        ]
        self.pairs = options.images * options.captions
        self.num_targets = sum(len(a) for answers in self.captions for a in answers)
        with torch.no_grad():
            self.features = self.ours.encode_images(self.pixels(range(options.images)))

    def draw(self, folder: Path, count: int) -> list[Path]:
        random, paths = np.random.default_rng(0), []
        for number in range(count):
            coarse = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((640, 480), 3)
            paths.append(folder / f"{number}.jpg")
            coarse.save(paths[-1], quality=90)
        return paths

    def pixels(self, images) -> torch.Tensor:
        pictures = [Image.open(self.photos[i]).convert("RGB") for i in images]
        return self.image_processor(images=pictures, return_tensors="pt")["pixel_values"].to(self.device)

    # ---- rows for the arms without packing -----------------------------------------------------------

    def rows(self, text_length: int | None) -> tuple[list[int], dict[str, torch.Tensor]]:
        """Return one right-padded row per pair; captions padded to `text_length`, or to the longest row."""
        rows = [
            (b.images[0][1], b.prefix + prompt, answer)
            for b in self.blocks
            for prompt, answer in map(Segment.last_answer, b.segments)
        ]
        head = len(rows[0][1])
        length = head + text_length if text_length else max(len(p) + len(a) for _, p, a in rows)
        tensors = padded_with_labels(rows, length, PAD)
        return [image for image, _, _ in rows], {k: v.to(self.device) for k, v in tensors.items()}

    # ---- arms: each returns its loss and the share of positions that are tokens -------------------------------------

    def notebook(self):
        """(a) Decode, encode and run the Q-Former for every pair; captions padded to 64 tokens; all logits."""
        images, batch = self.rows(CAPTION_LENGTH)
        share = batch["attention_mask"].float().mean().item()
        return self.ours(**batch, pixel_values=self.pixels(images), use_cache=False).loss, share

    def blip2_pixels(self):
        """(b) BLIP-2 as it is, padded to the longest row. It has its own encoder, so its loss differs."""
        images, batch = self.rows(None)
        self.blip2.vision_model = self.vision_model
        share = batch["attention_mask"].float().mean().item()
        return self.blip2(**batch, pixel_values=self.pixels(images), use_cache=False).loss, share

    def blip2_features(self):
        """(b) BLIP-2 on cached features."""
        images, batch = self.rows(None)
        self.cached.features = self.features[images]
        self.blip2.vision_model = self.cached
        share = batch["attention_mask"].float().mean().item()
        pixels = torch.empty(len(images), 3, 1, 1, device=self.device)
        return self.blip2(**batch, pixel_values=pixels, use_cache=False).loss, share

    def ours_on(self, batch: dict, fused: bool = False):
        images = [image for _, image in batch.pop("images")]
        share = useful_share(batch)
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        batch["inputs"] = {"patch_features": self.features[images]}
        inputs, mask = batch["inputs"], build_attention_mask(batch, self.ours.parts()["llm"])
        outputs = self.ours(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask,
            logits_at=batch["predict_from"], targets=batch["targets"] if fused else None, use_cache=False, **inputs,
        )  # fmt: skip
        if fused:
            return outputs.loss / self.num_targets, share
        return answer_losses(outputs.logits, batch["targets"], 0.0)[1] / self.num_targets, share

    def padded(self):
        """(c) Cached features, rows padded dynamically, logits at labels only."""
        return self.ours_on(collate_padded(self.blocks, PAD))

    def shared(self):
        """(d) Cached features, one prefix an image, packed rows, logits at labels only."""
        return self.ours_on(collate_shared(self.blocks, PAD))

    def fused(self):
        """(d) with the fused loss: logits of few positions at a time."""
        return self.ours_on(collate_shared(self.blocks, PAD), fused=True)

    def long_rows(self):
        """(d) in rows of 2,048 tokens, whose empty blocks FlexAttention skips."""
        return self.ours_on(collate_shared(self.blocks, PAD, 2048))

    # ---- measuring ------------------------------------------------------------------------------------------------

    def step(self, arm: str) -> tuple[float, float]:
        optimizer = self.optimizers["blip2" if arm.startswith("blip2") else "ours"]
        loss, share = getattr(self, arm)()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss.item(), share


def attention_pieces(bench: Bench) -> dict[str, float]:
    """Return the positions that FlexAttention computes in blocks of 128 x 128, relative to a dense mask in rows of least
    cost, by row length."""
    batches = {length: collate_shared(bench.blocks, PAD, length) for length in (None, 2048)}
    dense = batches[None]["input_ids"].numel() * batches[None]["input_ids"].shape[1]
    shares = {}
    for length, batch in batches.items():
        mask = shared_prefix_block_mask(batch["block_ids"], batch["segment_ids"])
        pieces = mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()
        shares[str(length or "least cost")] = pieces.item() * 128**2 / dense
    return shares
