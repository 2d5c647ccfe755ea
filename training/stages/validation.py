"""Validation of a model that answers through the language model: loss, CIDEr, captions of a few images."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from blipren.training.data.batches.datasets import EvalBatches
from blipren.training.data.batches.masks import build_attention_mask, dense_attention
from blipren.training.data.batches.samples import CachedSamples
from blipren.training.data.batches.training_data import AnswersOfImages
from blipren.training.engine.fsdp import is_sharded
from blipren.training.engine.settings import GeneratedCaptionSettings
from blipren.training.errors import UserError
from blipren.training.evaluation.features import PatchFeatures
from blipren.training.evaluation.generation import generate_answers, generate_batch, pad_id
from blipren.training.evaluation.image_use import token_losses
from blipren.training.evaluation.metrics.captions import score_captions

IMAGES_PER_BATCH = 32
TEXTS = 200  # of the loss on text without images


class AnswerValidation:
    """Measures on all of the validation split.

    Args:
        trainer: whose model, processes and device are used.
        batches: of the validation split.
        settings: of generation.
    """

    def __init__(self, trainer, processor, batches: EvalBatches, settings: GeneratedCaptionSettings):
        self.trainer, self.processor, self.batches, self.settings = trainer, processor, batches, settings
        self.images = len(batches.units)
        captioned = [data for data in batches.data if isinstance(data, AnswersOfImages)]
        self.captioned = captioned[0] if captioned else None
        self.conversations = next((data for data in batches.data if isinstance(data, CachedSamples)), None)
        self.samples = [] if self.captioned is None else self.captioned.units[: settings.generate_samples]

    @torch.no_grad()
    def loss(self) -> float:
        """Return the negative log-likelihood per answer token, over every image and answer."""
        trainer, model = self.trainer, self.trainer.model
        rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
        was_training = model.training
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for item in range(rank, -(-len(self.batches) // world) * world, world):
            # a sharded model runs on all processes together: one without a batch repeats one that does not count
            counts = item < len(self.batches)
            batch = trainer._prepare_inputs(self.batches[item if counts else 0])
            outputs = model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                attention_mask=build_attention_mask(batch, model.parts()["llm"]),
                logits_at=batch["predict_from"],
                use_cache=False,
                **batch["inputs"],
            )
            nll = F.cross_entropy(outputs.logits.float(), batch["targets"], reduction="sum")
            if counts:
                sums += torch.tensor([nll.item(), len(batch["targets"])], dtype=torch.float64)
        model.train(was_training)
        if world > 1:
            sums = trainer.accelerator.reduce(sums.to(trainer.args.device), "sum")
        return (sums[0] / sums[1]).item()

    @torch.no_grad()
    def text_loss(self, sources: Sequence) -> float:
        """Return the language model's loss per token on answers of some sources without image and prompt."""
        model, bos = self.trainer.model, self.processor.tokenizer.bos_token_id
        rows = []
        for data in sources:
            for unit in range(min(len(data), TEXTS)):
                for ids in data.answer_ids(unit):
                    prompt, answer = ([bos], ids) if bos is not None else (ids[:1], ids[1:])
                    rows += [(prompt, answer)] if answer else []
        rows = rows[:TEXTS]
        was_training = model.training
        model.eval()
        sums = [0.0, 0]
        with dense_attention(model.parts()["llm"]):
            for start in range(0, len(rows), IMAGES_PER_BATCH):
                part = rows[start : start + IMAGES_PER_BATCH]
                for loss, count in token_losses(model, part, pad_id(model, self.processor), {}):
                    sums = [sums[0] + loss, sums[1] + count]
        model.train(was_training)
        return sums[0] / sums[1]

    @torch.compiler.set_stance("force_eager")  # generation has too many forms to be compiled for
    def captions(self, images: Sequence[int]) -> list[str]:
        """Return a generated caption for each image number of the validation split."""
        model, device = self.trainer.model, self.trainer.args.device
        beams = {"length_penalty": self.settings.length_penalty} if self.settings.num_beams > 1 else {}
        was_training = model.training
        model.eval()
        found: list[str] = []
        for start in range(0, len(images), IMAGES_PER_BATCH):
            inputs = self.captioned.inputs(list(images[start : start + IMAGES_PER_BATCH]), None)
            if "patch_features" not in inputs:
                inputs = {k: v.to(device) for k, v in inputs.items()}
                mask = inputs.get("pixel_attention_mask")
                inputs = {"patch_features": model.encode_images(**inputs), "patch_attention_mask": mask}
            features = PatchFeatures(inputs["patch_features"], inputs.get("patch_attention_mask"))
            with dense_attention(model.parts()["llm"]):
                made = generate_answers(
                    model,
                    self.processor,
                    features,
                    max_new_tokens=self.settings.max_new_tokens,
                    num_beams=self.settings.num_beams,
                    use_memory=False,  # a run measures what it trains
                    use_reranker=False,
                    **beams,
                )
            found += [caption["text"] for caption in made]
        model.train(was_training)
        return found

    def cider(self) -> float:
        """Return the CIDEr of generated captions, over every image that has captions."""
        accelerator = self.trainer.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        if self.captioned is None:
            raise UserError("keep_best CIDEr needs captions in the validation split: give --keep-best loss")
        references = self.captioned.references()
        if is_sharded(self.trainer.model):  # all processes generate together
            rank, world = 0, 1
        mine = sorted(references)[rank::world]
        made = {str(image): text for image, text in zip(mine, self.captions(mine))}
        if world > 1:
            parts: list = [None] * world
            torch.distributed.all_gather_object(parts, made)
            made = {name: text for part in parts for name, text in part.items()}
        references = {str(i): texts for i, texts in references.items()}
        return score_captions(made, references, tokenizer="python", meteor=False).corpus["CIDEr"]

    @torch.compiler.set_stance("force_eager")  # generation has too many forms to be compiled for
    def replies(self, samples: Sequence[int]) -> list[str]:
        """Return a generated answer to the last turn of conversations of the validation split."""
        model, data = self.trainer.model, self.conversations
        contexts = [data.context(sample) for sample in samples]
        images = [image for _, own in contexts for image in own]
        inputs = (
            {name: tensor.to(model.device) for name, tensor in data.inputs(images, None).items()} if images else {}
        )
        was_training = model.training
        model.eval()
        with dense_attention(model.parts()["llm"]):
            made = generate_batch(
                model,
                self.processor,
                [ids for ids, _ in contexts],
                inputs,
                max_new_tokens=self.settings.max_new_tokens,
            )
        model.train(was_training)
        return [reply["text"] for reply in made]

    def log_samples(self, when: str) -> None:
        """Write captions of a few images, and answers in a few conversations, to the log and the screen.

        Args:
            when: before, during or after training.
        """
        trainer = self.trainer
        if not self.settings.generate_samples or not (trainer.args.should_save or is_sharded(trainer.model)):
            return
        if len(self.samples):
            captions = self.captions(self.samples)
            if trainer.args.should_save:
                trainer.progress.print_line(f"captions {when} training:")
            for image, text in zip(self.samples, captions):
                self._log_sample(
                    when, f"  {self.captioned.ids[image]}: {text}", image=self.captioned.ids[image], text=text
                )
        if self.conversations is not None:
            chosen = [unit[0] for unit in self.conversations.units[: self.settings.generate_samples]]
            replies = self.replies(chosen)
            if trainer.args.should_save:
                trainer.progress.print_line(f"answers in conversations {when} training:")
            for sample, text in zip(chosen, replies):
                name, asked = self.conversations.names[sample], self.conversations.last_question(sample)
                self._log_sample(when, f"  {name}: {asked} -> {text}", image=name, text=text, prompt=asked)

    def _log_sample(self, when: str, line: str, **values: str) -> None:
        if self.trainer.args.should_save:
            self.trainer.run_folder.log("sample", self.trainer.state.global_step, **values, when=when)
            self.trainer.progress.print_line(line)
