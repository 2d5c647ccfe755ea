"""Stage 1, `blipren align`: the Q-Former learns from image-caption pairs, without a language model.

Three losses (BLIP-2, arXiv 2301.12597) over cached patch features: contrast (ITC), matching (ITM), generation (ITG).
`AlignTrainer.compute_loss` is the step. Where the batch of the contrast is larger than one graph holds,
`AlignTrainer.cached_step` gives the same gradient piece by piece.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blipren.training.checkpoint_config import missing_bases
from blipren.training.commands.align import AlignSettings
from blipren.training.console import print_line
from blipren.training.data.batches.pairs import CaptionPairs, PairBatches
from blipren.training.data.batches.plan import BatchPlan
from blipren.training.data.cache import FeatureCache
from blipren.training.engine.device import choose_device, choose_precision
from blipren.training.engine.optimizer import Average
from blipren.training.engine.run_folder import RunFolder
from blipren.training.engine.trainer.arguments import training_arguments
from blipren.training.engine.trainer.callbacks import TimeLimit
from blipren.training.engine.trainer.run import process_count, run_stage
from blipren.training.engine.trainer.stage_trainer import StageTrainer, seed_of
from blipren.training.errors import UserError
from blipren.training.evaluation.metrics.retrieval import evaluate_retrieval
from blipren.training.objectives.contrast import ItcOutput, itc
from blipren.training.objectives.gathering import gather, global_count, world
from blipren.training.objectives.generation import itg
from blipren.training.objectives.gradient_cache import GradientCache
from blipren.training.objectives.matching import hard_negatives, itm
from blipren.training.stages.align_start import gradient_norms, parameter_groups, starting_point

ROWS = ("patch_features", "patch_attention_mask", "input_ids", "attention_mask")


def gather_rows(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the rows of all processes, to draw negatives from. Features are frozen: no gradient flows here."""
    if world()[1] == 1:
        return {name: inputs[name] for name in ROWS if name in inputs}
    length = torch.tensor([inputs["input_ids"].shape[1], inputs["patch_features"].shape[1]])
    lengths = gather(length.to(inputs["input_ids"].device)[None]).amax(0).tolist()
    gathered = {}
    for name in ROWS:
        if name in inputs:
            missing = lengths["patch" in name] - inputs[name].shape[1]
            padding = (0, 0, 0, missing) if inputs[name].dim() == 3 else (0, missing)
            gathered[name] = gather(F.pad(inputs[name], padding))
    return gathered


class AlignTrainer(StageTrainer):
    """The three losses, two learning rates, and validation by recall.

    Args:
        recall: function from a model to its recall on the validation split.
        timer: the time of the run, which may limit it.
    """

    def __init__(self, *, settings: AlignSettings, recall, timer: TimeLimit, **keywords):
        super().__init__(**keywords)
        self.settings, self.recall, self.timer = settings, recall, timer
        self.noted: dict[str, dict[int, list[Tensor | float]]] = {}
        self.offset = 0

    # ---- the step -------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the weighted sum of the three losses, for a batch that one graph holds."""
        inputs = self.drop_patches(inputs)
        contrast = self.contrast(*self.encode(model, inputs), inputs, *self.temperature())
        loss = self.settings.itc_weight * contrast.loss
        for part in self.match_and_generate(model, inputs, self.negatives(contrast), slice(None)):
            loss = loss + part
        self.note(itc=contrast.loss, itc_accuracy=contrast.accuracy)
        return loss

    def cached_step(self, model, inputs, size: int) -> Tensor:
        """Do the same for a batch of which a graph holds `size` rows: contrast by gradient caching, the rest in pieces."""
        model.train()
        inputs = self.drop_patches(self._prepare_inputs(inputs))
        rows = len(inputs["image_ids"])
        pieces = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
        chunks = [{name: inputs[name][piece] for name in ROWS if name in inputs} for piece in pieces]

        with self.compute_loss_context_manager():
            cache = GradientCache(lambda chunk: self.encode(model, chunk), chunks)
        scale, bias = (value.detach().requires_grad_() for value in self.temperature())
        contrast = self.contrast(*cache.embeddings, inputs, scale, bias)
        (self.settings.itc_weight * contrast.loss).backward()
        total = self.settings.itc_weight * contrast.loss.detach()

        negatives = self.negatives(contrast)
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss = cache.surrogate(number)  # has the gradient of the contrast, not its value
                    if last:
                        for value, leaf in zip(self.temperature(), (scale, bias), strict=True):
                            if leaf.grad is not None:
                                loss = loss + value * leaf.grad
                    for part in self.match_and_generate(model, inputs, negatives, piece):
                        loss, total = loss + part, total + part.detach()
                self.accelerator.backward(loss)
        self.note(itc=contrast.loss, itc_accuracy=contrast.accuracy)
        return total

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        rows = len(inputs["image_ids"])
        if (self.settings.micro_batch_size or rows) >= rows:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            torch.manual_seed(seed_of(self.args.seed, inputs["item"]))
            loss = self.cached_step(model, inputs, self.settings.micro_batch_size)
            self._pending.append((loss, inputs["ids"]))
        if (self.state.global_step + 1) % self.args.logging_steps == 0:
            self.note(**gradient_norms(self.accelerator.unwrap_model(model)))
        return loss

    # ---- its parts ------------------------------------------------------------------------------------------------

    def drop_patches(self, inputs: dict) -> dict:
        """Zero a share of the patches."""
        if not self.settings.feature_dropout:
            return inputs
        features = inputs["patch_features"]
        kept = torch.rand(features.shape[:2], device=features.device) >= self.settings.feature_dropout
        return {**inputs, "patch_features": features * kept.unsqueeze(-1)}

    def temperature(self) -> tuple[Tensor, Tensor]:
        """Return (1 / temperature, bias) of the contrast. The temperature stays at or above 0.01, as in CLIP."""
        model = self.accelerator.unwrap_model(self.model)
        return model.logit_scale.clamp(max=math.log(100)).exp(), model.logit_bias

    def encode(self, model, inputs: dict) -> tuple[Tensor, Tensor]:
        """Return image embeddings `[n, Q, E]` and text embeddings `[n, E]`."""
        outputs = model(**{name: inputs[name] for name in ROWS if name in inputs}, objective="itc")
        return outputs.image_embeds, outputs.text_embeds

    def contrast(self, image_embeds, text_embeds, inputs, scale, bias) -> ItcOutput:
        with torch.autocast(image_embeds.device.type, enabled=False):
            return itc(
                image_embeds,
                text_embeds,
                inputs["image_ids"],
                inputs["text_ids"],
                scale,
                bias,
                kind=self.settings.itc,
                pooling=self.settings.pooling,
                label_smoothing=self.settings.itc_label_smoothing,
            )

    def negatives(self, contrast: ItcOutput) -> tuple[Tensor, Tensor]:
        """Return a hard negative text, and image, for each row: drawn by the similarity of the contrast."""
        self.offset = contrast.offset
        seed = seed_of(self.args.seed, 2 * self.state.global_step)
        texts = hard_negatives(contrast.image_to_text, contrast.pairs, seed, contrast.offset)
        images = hard_negatives(contrast.text_to_image, contrast.pairs, seed + 1, contrast.offset)
        return texts, images

    def match_and_generate(self, model, inputs: dict, negatives: tuple[Tensor, Tensor], piece: slice):
        """Yield weighted ITM and ITG of the rows `piece`, divided by the counts of all rows of all processes."""
        if self.settings.itm_weight:
            yield self.settings.itm_weight * self.matching(model, inputs, *negatives, piece)
        if self.settings.itg_weight:
            yield self.settings.itg_weight * self.generation(model, inputs, piece)

    def matching(self, model, inputs: dict, texts: Tensor, images: Tensor, piece: slice) -> Tensor:
        everyone = gather_rows(inputs)
        own = torch.arange(self.offset, self.offset + len(texts), device=texts.device)
        count = global_count(len(own) + (texts >= 0).sum() + (images >= 0).sum(), texts.device)
        own, texts, images = own[piece], texts[piece], images[piece]
        which_image = torch.cat([own, own[texts >= 0], images[images >= 0]])
        which_text = torch.cat([own, texts[texts >= 0], own[images >= 0]])
        labels = (torch.arange(len(which_image), device=own.device) < len(own)).long()
        chosen = {n: rows[which_image if n.startswith("patch") else which_text] for n, rows in everyone.items()}
        logits = model(**chosen, objective="itm").logits
        loss = itm(logits, labels, count)
        self.note(itm=loss, itm_accuracy=(logits.argmax(-1) == labels).float().mean())
        return loss

    def generation(self, model, inputs: dict, piece: slice) -> Tensor:
        mask = inputs["attention_mask"]
        count = global_count(mask[:, 1:].sum(), mask.device)
        chunk = {name: inputs[name][piece] for name in ROWS if name in inputs}
        # position t predicts token t + 1, the last one the end
        labels = chunk["input_ids"][:, 1:].masked_fill(chunk["attention_mask"][:, 1:] == 0, -100)
        labels = F.pad(labels, (0, 1), value=-100)
        logits = model(**chunk, objective="itg", logits_mask=labels != -100).logits
        loss = itg(logits, labels[labels != -100], self.settings.itg_label_smoothing, count)
        self.note(itg=loss)
        return loss

    # ---- log, schedule and validation -----------------------------------------------------------------------------

    def count_step(self, batches: list[dict]) -> Tensor:
        return torch.tensor([sum(len(batch["ids"]) for batch in batches)])

    def note(self, **values) -> None:
        """Keep values for the next log line."""
        for name, value in values.items():
            value = value.detach() if isinstance(value, Tensor) else value  # read when it is logged, not earlier
            self.noted.setdefault(name, {}).setdefault(self.state.global_step, []).append(value)

    def log_values(self, logs: dict[str, float]) -> dict[str, float]:
        values = dict(logs)
        for name, steps in self.noted.items():
            # the losses of pieces add up to their step's, shares and norms are averaged
            fold = sum if name in ("itm", "itg") else np.mean
            values[name] = float(np.mean([fold([float(v) for v in found]) for found in steps.values()]))
        self.noted.clear()
        return values | {
            "temperature": 1 / self.temperature()[0].item(),
            "seconds": round(self.timer.elapsed(), 2),
        }

    def log_line(self, values: dict[str, float]) -> str:
        shown = ("loss", "itc", "itm", "itg", "itc_accuracy", "itm_accuracy", "temperature", "learning_rate")
        text = "  ".join(f"{name} {values[name]:.4g}" for name in shown if name in values)
        return f"step {self.state.global_step}  {text}  {values['seconds']:.0f} s"

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Make the scheduler of the settings. In a run of limited time it follows the time instead of the steps."""
        if not self.settings.max_minutes or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup, floor = min(self.settings.warmup, 0.5), self.settings.min_learning_rate

        def factor(step: int) -> float:
            done = self.timer.share()
            if done < warmup:
                return max(done / warmup, 0.01)
            done = (done - warmup) / (1 - warmup)
            shapes = {
                "constant": 1.0,
                "linear": 1 - done,
                "cosine": floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2,
            }
            return shapes[self.settings.schedule]

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def validate(self) -> dict[str, float]:
        return self.recall(self.accelerator.unwrap_model(self.model))

    # ---- begin and end --------------------------------------------------------------------------------------------

    def begin(self, resumed: bool) -> None:
        if resumed:
            self.timer.before = max((event.get("seconds", 0.0) for event in self.run_folder.events()), default=0.0)
        else:
            self.evaluate()  # the recall of the starting weights

    def summary(self, best_step: int | None) -> dict:
        step = self.state.global_step
        validations = [event for event in self.run_folder.events() if event["kind"] == "validation"]
        return {
            "before": validations[0],
            "after": next(event for event in validations if event["step"] == (best_step or step)),
            "steps": step,
            "seconds": round(self.timer.elapsed(), 1),
        }

    def write_model(self, folder: Path) -> None:
        if self.args.should_save:
            full = self.settings.full or missing_bases(self.model.config)
            (self.model.save_pretrained if full else self.model.save_bridge)(folder)
            self.processing_class.save_pretrained(folder)

    def summary_lines(self, summary: dict) -> list[str]:
        before, after, out = summary["before"], summary["after"], self.run_folder.path
        lines = []
        for name, way in (("i2t", "image to text"), ("t2i", "text to image")):
            recalls = ", ".join(f"R@{k} {100 * after[f'{name}_R@{k}']:.1f}%" for k in (1, 5, 10))
            lines.append(f"validation, {way}: {recalls}")
        lines.append(f"mean recall {before['recall']:.3f} -> {after['recall']:.3f} (chance {after['chance']:.3f})")
        lines.append(f"model: {out}   log: {out}/log.jsonl   curves: {out}/curves.png")
        return lines


# ---- validation and the run -----------------------------------------------------------------------------------------


def mean_recall(metrics: dict) -> float:
    """Return the mean of R@1, R@5 and R@10 both ways, which the best model is chosen by."""
    return float(np.mean([metrics[way][f"R@{k}"] for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]))


def flat(metrics: dict) -> dict[str, float]:
    """Return `{"image_to_text": {"R@1": x}}` as `{"i2t_R@1": x}`, after the mean recall and that of chance."""
    ways = (("i2t", "image_to_text"), ("t2i", "text_to_image"))
    values = {f"{short}_{name}": value for short, way in ways for name, value in metrics[way].items()}
    return {"recall": mean_recall(metrics), "chance": mean_recall(metrics["chance"]), **values}


def recall_function(settings: AlignSettings, cache, pairs: CaptionPairs, tokenizer):
    """Return a function from a model to its recall on the validation split. Images without captions are left out."""
    captions = pairs.captions()
    kept = [image for image, own in enumerate(captions) if own][: settings.eval_images]

    def recall(model) -> dict[str, float]:
        was_training = model.training
        model.eval()
        metrics, _ = evaluate_retrieval(
            model,
            tokenizer,
            lambda indices: cache.patch_features("validation", [kept[i] for i in indices]),
            [captions[image] for image in kept],
            max_length=settings.max_text_tokens,
        )
        model.train(was_training)
        return flat(metrics)

    return recall


def build_trainer(settings: AlignSettings, run: RunFolder, cache: FeatureCache | None = None) -> AlignTrainer:
    """Return the trainer of a run: model, pairs, batches. The cache is opened where it is not given."""
    device = choose_device(settings.device)
    torch.manual_seed(settings.seed)
    cache = FeatureCache.open(settings.cache) if cache is None else cache
    for split in ("train", "validation"):
        if not cache.num_with_captions(split):
            raise UserError(f"{settings.cache} has no caption in its {split} split: stage 1 learns from captions")
    model, processor, tokenizer = starting_point(settings)
    cache.check_model(model, processor)
    pairs = {s: CaptionPairs(cache.split(s), tokenizer, settings.max_text_tokens) for s in ("train", "validation")}

    processes = process_count()
    size = min(settings.batch_size, len(pairs["train"]))
    if size < processes:
        raise UserError(f"batch_size {size} cannot be shared by {processes} processes")
    plan = BatchPlan(
        sizes=(len(pairs["train"]),), weights=(1.0,), seed=settings.seed, images_per_step=size, micro_batches=processes
    )
    steps = settings.max_steps or math.ceil(settings.epochs * plan.steps_per_epoch)
    if settings.max_minutes and not settings.max_steps:
        steps = 10_000_000  # the time ends it

    run.claim(settings)
    if run.writes:
        left_out = f", {pairs['train'].left_out} answers to questions left out" if pairs["train"].left_out else ""
        until = f"{settings.max_minutes:g} minutes" if settings.max_minutes else f"{steps} steps"
        print_line(model.describe_trainable())
        print_line(
            f"{len(pairs['train'])} image-caption pairs of {len(set(pairs['train'].images))} images{left_out}; "
            f"{size} pairs a step, {plan.steps_per_epoch} steps an epoch; {until}"
        )
    args = training_arguments(
        settings,
        run,
        max_steps=steps,
        accumulation=1,
        eval_steps=settings.eval_every or min(plan.steps_per_epoch, steps),
        metric_for_best_model="recall",
        greater_is_better=True,
        bf16=choose_precision(settings.precision, device) == "bf16",
        use_cpu=device == "cpu",
    )
    timer = TimeLimit(settings.max_minutes)
    return AlignTrainer(
        model=model,
        args=args,
        train_dataset=PairBatches(pairs["train"], cache, "train", tokenizer, plan, steps),
        eval_dataset=pairs["validation"],
        callbacks=[timer],
        processing_class=processor,
        settings=settings,
        recall=recall_function(settings, cache, pairs["validation"], tokenizer),
        timer=timer,
        run=run,
        average=Average(model, settings.ema) if settings.ema else None,
        groups=parameter_groups(model, settings),
        betas=settings.adam_betas,
    )


def align(settings: AlignSettings) -> int:
    """Run `blipren align`. Returns the exit status."""
    print_line(f"stage 1 of {settings.model} over {settings.cache}; results in {settings.out}")
    return run_stage(settings, build_trainer)
