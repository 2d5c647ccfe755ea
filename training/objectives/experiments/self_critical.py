"""Self-critical training: captions sampled from the model, rewarded by CIDEr-D against the photo's captions.

Rennie et al. 2017 (arXiv 1612.00563), with the mean of the other samples as baseline (Luo 2020, arXiv 2003.09971).
Likelihood alone teaches the average caption, rare details included; the reward teaches what the references agree on.
"""

import torch
from torch.nn import functional as F

from blipren.training.data.batches.blocks import Block, PromptEncoder, Segment
from blipren.training.data.batches.collate import collate_padded, collate_shared
from blipren.training.data.batches.masks import dense_attention
from blipren.training.objectives.experiments.experiment import Experiment
from blipren.training.objectives.experiments.settings import SelfCriticalSettings
from blipren.training.objectives.rewards.cider import CiderReward
from blipren.training.objectives.sampling import sample_answers

ENDED_ONLY = True  # a caption that does not end gets no reward, however good its beginning


class SelfCritical(Experiment):
    """Sample captions for the photos of a batch, and weight each by its reward above that of the photo's other samples."""

    calls_model = True

    def __init__(self, settings: SelfCriticalSettings):
        self.weight = settings.weight
        self.samples, self.temperature, self.max_new_tokens = (
            settings.samples,
            settings.temperature,
            settings.max_tokens,
        )
        self.rewards: list[float] = []

    def prepare(self, model, processor, sources: list) -> None:
        self.processor, self.prompts = processor, PromptEncoder(processor)
        references = {source.ids[i]: texts for source in sources for i, texts in source.references().items()}
        self.reward = CiderReward(references)

    def loss(self, trainer, model, batch: dict) -> torch.Tensor | float:
        """Return the loss of sampled captions, weighted by their advantage and summed over images."""
        with dense_attention(trainer.model.parts()["llm"]):
            sampled = self.batch(trainer.model, batch, trainer.train_dataset.layout.shared_prefix)
        if sampled is None:
            return 0.0
        inputs, attention_mask = trainer.regularized(sampled)
        outputs = model(
            input_ids=sampled["input_ids"],
            position_ids=sampled["position_ids"],
            attention_mask=attention_mask,
            logits_at=sampled["predict_from"],
            use_cache=False,
            **inputs,
        )
        nll = F.cross_entropy(outputs.logits.float(), sampled["targets"], reduction="none")
        self.rewards.append(sampled["reward"])
        return (sampled["weights"] * nll).mean() * len(sampled["ids"])

    def log_values(self) -> dict[str, float]:
        """Return `reward`, the mean CIDEr-D of the samples."""
        found = {"reward": sum(self.rewards) / len(self.rewards)} if self.rewards else {}
        self.rewards = []
        return found

    @torch.no_grad()
    def batch(self, model, batch: dict, shared_prefix: bool) -> dict | None:
        """Return a batch of sampled captions as the collate functions make it, or None where no photo has captions.

        It also holds `weights` `[targets]`, the advantage of the caption that a target belongs to in standard
        deviations, and the mean `reward`. Sampling is without dropout, as generation is.
        """
        chosen = [i for i, image in enumerate(batch["ids"]) if image in self.reward.references]
        chosen = list({batch["ids"][i]: i for i in reversed(chosen)}.values())[::-1]  # a photo's first block
        if not chosen:
            return None
        features = {name: tensor[chosen] for name, tensor in batch["inputs"].items()}
        device = features["patch_features"].device
        pieces = [
            self.prompts.encode(self.prompts.caption_prompts[0], self.prompts.system_prompts[0], n)
            for n in self._visual_tokens(model, features)
        ]
        longest = max(len(prefix) + len(rest) for prefix, rest in pieces)
        pad = self.processor.tokenizer.pad_token_id
        rows = [[pad] * (longest - len(p) - len(r)) + p + r for p, r in pieces]
        mask = [[0] * (longest - len(p) - len(r)) + [1] * (len(p) + len(r)) for p, r in pieces]
        training = model.training
        model.eval()
        made = sample_answers(
            model,
            torch.tensor(rows, device=device),
            torch.tensor(mask, device=device),
            features,
            self.processor.answer_end_id,
            samples=self.samples,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
        )
        model.train(training)
        images = [batch["ids"][i] for i in chosen for _ in range(self.samples)]
        rewards = torch.tensor(self.reward(images, [self.processor.decode_answer(ids) for ids in made]))
        if ENDED_ONLY:
            rewards *= torch.tensor([float(ids[-1] == self.processor.answer_end_id) for ids in made])
        rewards = rewards.view(len(chosen), self.samples)
        others = (rewards.sum(dim=1, keepdim=True) - rewards) / (self.samples - 1)
        advantages = rewards - others
        advantages = advantages / advantages.std().clamp_min(1e-6)
        blocks = [
            Block(
                [(0, n)], prefix, [Segment.of_answer(rest, a) for a in made[n * self.samples : (n + 1) * self.samples]]
            )
            for n, (prefix, rest) in enumerate(pieces)
        ]
        collate = collate_shared if shared_prefix else collate_padded
        sampled = collate(blocks, pad)
        order = [image for _, image in sampled.pop("images")]
        sampled = {name: tensor.to(device) for name, tensor in sampled.items()}
        # collate keeps a photo's captions together, in order: padded rows repeat the photo, packed ones do not
        photos = list(dict.fromkeys(order))
        weights = [
            advantages[photo, k].repeat(len(made[photo * self.samples + k]))
            for photo in photos
            for k in range(self.samples)
        ]
        sampled["weights"] = torch.cat(weights).to(device)
        sampled["inputs"] = {name: tensor[order] for name, tensor in features.items()}
        sampled["reward"] = rewards.mean().item()
        sampled["ids"] = [batch["ids"][chosen[n]] for n in photos]
        return sampled

    def _visual_tokens(self, model, features: dict) -> list[int]:
        if model.config.num_visual_tokens is not None:
            return [model.config.num_visual_tokens] * len(features["patch_features"])
        return features["patch_attention_mask"].sum(dim=1).tolist()
