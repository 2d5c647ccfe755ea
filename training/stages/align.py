"""Stage 1: the Q-Former learns from image-caption pairs, without a language model, over cached patch features.

Three losses (BLIP-2, arXiv 2301.12597): contrast (ITC), matching (ITM), generation (ITG). `AlignTrainer.compute_loss`
is the step; where the contrast's batch is larger than what one graph holds, `AlignTrainer.cached_step` gives the same
gradient piece by piece.
"""

from __future__ import annotations

import contextlib
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from blipren.training.commands.align import AlignSettings
from blipren.training.console import print_line
from blipren.training.data.batches.draws import VIEW, seeded_generator
from blipren.training.data.batches.plan import BatchPlan
from blipren.training.data.cache import FeatureCache
from blipren.training.engine import checkpoints
from blipren.training.engine import deepspeed as zero
from blipren.training.engine.device import choose_device
from blipren.training.engine.run_folder import RunFolder
from blipren.training.engine.trained_parts import Average, without_decay
from blipren.training.engine.trainer import StageTrainer, seed_of, training_arguments
from blipren.training.errors import UserError
from blipren.training.evaluation.metrics.retrieval import evaluate_retrieval
from blipren.training.objectives import alignment as objectives
from blipren.training.stages.align_start import starting_point


# ----------------------------------------------------------------------------------------------------------- the data
class CaptionPairs:
    """Every image-caption pair of a split. Answers to questions are no captions and are left out.

    Attributes:
        images: `[pairs]`, row of each pair's image. text_ids: `[pairs]`, equal for equal captions, whatever their
        case and spaces. tokens: each caption's ids. left_out: answers to questions.
    """

    def __init__(self, rows, tokenizer, max_tokens: int):
        images, self.texts, self.left_out = [], [], 0
        for image, (prompts, answers) in enumerate(zip(rows["prompts"], rows["answers"], strict=True)):
            for prompt, answer in zip(prompts, answers, strict=True):
                if prompt is None:
                    images.append(image)
                    self.texts.append(answer)
                else:
                    self.left_out += 1
        self.names = list(rows["id"])
        self.images = np.asarray(images, dtype=np.int64)
        same: dict[str, int] = {}
        text_ids = [same.setdefault(" ".join(text.lower().split()), len(same)) for text in self.texts]
        self.text_ids = np.asarray(text_ids, dtype=np.int64)
        options = {"truncation": True, "max_length": max_tokens, "split_special_tokens": True}
        self.tokens = tokenizer(self.texts, **options)["input_ids"] if self.texts else []

    def __len__(self) -> int:
        return len(self.images)

    def captions(self) -> list[list[str]]:
        """Each image's captions."""
        captions: list[list[str]] = [[] for _ in self.names]
        for image, text in zip(self.images, self.texts, strict=True):
            captions[image].append(text)
        return captions


class PairBatches(Dataset):
    """Item k is the k-th batch of the run: patch features, right-padded tokens, and the ids that tell true pairs.

    It is a function of the pairs, the seed and k alone. Processes take turns: item `step * processes + rank`.
    """

    def __init__(self, pairs: CaptionPairs, cache, split: str, tokenizer, plan: BatchPlan, steps: int):
        self.pairs, self.cache, self.split, self.tokenizer = pairs, cache, split, tokenizer
        self.plan, self.steps = plan, steps

    def __len__(self) -> int:
        return self.steps * self.plan.micro_batches

    def __getitem__(self, item: int) -> dict:
        step, part = divmod(item, self.plan.micro_batches)
        numbers = self.plan.micro_batch(step, part)[1][:, 1]
        images = self.pairs.images[numbers]
        views = None
        if self.cache.views > 1:
            views = seeded_generator(self.plan.seed, VIEW, item).integers(self.cache.views, size=len(images))
        features, mask = self.cache.patch_features(self.split, images, views)
        tokens = self.tokenizer.pad({"input_ids": [self.pairs.tokens[n] for n in numbers]}, return_tensors="pt")
        batch = {
            "item": item,
            "ids": [self.pairs.names[image] for image in images],
            "patch_features": features,
            "patch_attention_mask": mask,
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "image_ids": torch.from_numpy(images),
            "text_ids": torch.from_numpy(self.pairs.text_ids[numbers]),
        }
        return {name: value for name, value in batch.items() if value is not None}


ROWS = ("patch_features", "patch_attention_mask", "input_ids", "attention_mask")


def gather_rows(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of all processes, for negatives from anywhere. Features are frozen: no gradient flows here."""
    if objectives.world()[1] == 1:
        return {name: inputs[name] for name in ROWS if name in inputs}
    length = torch.tensor([inputs["input_ids"].shape[1], inputs["patch_features"].shape[1]])
    lengths = objectives.gather(length.to(inputs["input_ids"].device)[None]).amax(0).tolist()
    gathered = {}
    for name in ROWS:
        if name in inputs:
            missing = lengths["patch" in name] - inputs[name].shape[1]
            padding = (0, 0, 0, missing) if inputs[name].dim() == 3 else (0, missing)
            gathered[name] = objectives.gather(F.pad(inputs[name], padding))
    return gathered


# -------------------------------------------------------------------------------------------------------- the trainer
class AlignTrainer(StageTrainer):
    """The three losses, two learning rates, and validation by recall."""

    def __init__(self, *, settings: AlignSettings, validate, timer: Timer, **keywords):
        super().__init__(**keywords)
        self.settings, self.validate, self.timer = settings, validate, timer
        self.noted: dict[str, dict[int, list[Tensor | float]]] = {}
        self.offset = 0
        self.judged: tuple[int, dict[str, float]] = (-1, {})

    # ==================================================================================================== the step
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """All three losses of a batch that one graph holds."""
        inputs = self.without_some_patches(inputs)
        contrast = self.contrast(*self.encode(model, inputs), inputs, *self.temperature())
        loss = self.settings.itc_weight * contrast.loss
        for part in self.match_and_generate(model, inputs, self.negatives(contrast), slice(None)):
            loss = loss + part
        self.note(itc=contrast.loss, itc_accuracy=contrast.accuracy)
        return loss

    def cached_step(self, model, inputs, size: int) -> Tensor:
        """The same for a batch of which a graph holds `size` rows: the contrast by gradient caching, the rest in pieces."""
        model.train()
        inputs = self.without_some_patches(self._prepare_inputs(inputs))
        rows = len(inputs["image_ids"])
        pieces = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
        chunks = [{name: inputs[name][piece] for name in ROWS if name in inputs} for piece in pieces]

        with self.compute_loss_context_manager():
            cache = objectives.GradientCache(lambda chunk: self.encode(model, chunk), chunks)
        scale, bias = (value.detach().requires_grad_() for value in self.temperature())
        contrast = self.contrast(*cache.embeddings, inputs, scale, bias)
        (self.settings.itc_weight * contrast.loss).backward()
        total = self.settings.itc_weight * contrast.loss.detach()

        negatives = self.negatives(contrast)
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss = cache.surrogate(number)  # its gradient is the contrast's; its value means nothing
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

    # =================================================================================================== its parts
    def without_some_patches(self, inputs: dict) -> dict:
        if not self.settings.feature_dropout:
            return inputs
        features = inputs["patch_features"]
        kept = torch.rand(features.shape[:2], device=features.device) >= self.settings.feature_dropout
        return {**inputs, "patch_features": features * kept.unsqueeze(-1)}

    def temperature(self) -> tuple[Tensor, Tensor]:
        """(1 / temperature, bias) of the contrast. The temperature stays at or above 0.01, as in CLIP."""
        model = self.accelerator.unwrap_model(self.model)
        return model.logit_scale.clamp(max=math.log(100)).exp(), model.logit_bias

    def encode(self, model, inputs: dict) -> tuple[Tensor, Tensor]:
        """Image embeddings `[n, Q, E]` and text embeddings `[n, E]`."""
        outputs = model(**{name: inputs[name] for name in ROWS if name in inputs}, objective="itc")
        return outputs.image_embeds, outputs.text_embeds

    def contrast(self, image_embeds, text_embeds, inputs, scale, bias) -> objectives.ItcOutput:
        with torch.autocast(image_embeds.device.type, enabled=False):
            return objectives.itc(
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

    def negatives(self, contrast: objectives.ItcOutput) -> tuple[Tensor, Tensor]:
        """For each row a text, and an image, that are not true and that the contrast finds likely."""
        self.offset = contrast.offset
        seed = seed_of(self.args.seed, 2 * self.state.global_step)
        texts = objectives.hard_negatives(contrast.image_to_text, contrast.pairs, seed, contrast.offset)
        images = objectives.hard_negatives(contrast.text_to_image, contrast.pairs, seed + 1, contrast.offset)
        return texts, images

    def match_and_generate(self, model, inputs: dict, negatives: tuple[Tensor, Tensor], piece: slice):
        """Weighted ITM and ITG of the rows `piece`, divided by the counts of all rows of all processes."""
        if self.settings.itm_weight:
            yield self.settings.itm_weight * self.matching(model, inputs, *negatives, piece)
        if self.settings.itg_weight:
            yield self.settings.itg_weight * self.generation(model, inputs, piece)

    def matching(self, model, inputs: dict, texts: Tensor, images: Tensor, piece: slice) -> Tensor:
        everyone = gather_rows(inputs)
        own = torch.arange(self.offset, self.offset + len(texts), device=texts.device)
        count = objectives.global_count(len(own) + (texts >= 0).sum() + (images >= 0).sum(), texts.device)
        own, texts, images = own[piece], texts[piece], images[piece]
        which_image = torch.cat([own, own[texts >= 0], images[images >= 0]])
        which_text = torch.cat([own, texts[texts >= 0], own[images >= 0]])
        labels = (torch.arange(len(which_image), device=own.device) < len(own)).long()
        chosen = {n: rows[which_image if n.startswith("patch") else which_text] for n, rows in everyone.items()}
        logits = model(**chosen, objective="itm").logits
        loss = objectives.itm(logits, labels, count)
        self.note(itm=loss, itm_accuracy=(logits.argmax(-1) == labels).float().mean())
        return loss

    def generation(self, model, inputs: dict, piece: slice) -> Tensor:
        mask = inputs["attention_mask"]
        count = objectives.global_count(mask[:, 1:].sum(), mask.device)
        chunk = {name: inputs[name][piece] for name in ROWS if name in inputs}
        # position t predicts token t + 1, the last one the end
        labels = chunk["input_ids"][:, 1:].masked_fill(chunk["attention_mask"][:, 1:] == 0, -100)
        labels = F.pad(labels, (0, 1), value=-100)
        logits = model(**chunk, objective="itg", logits_mask=labels != -100).logits
        loss = objectives.itg(logits, labels[labels != -100], self.settings.itg_label_smoothing, count)
        self.note(itg=loss)
        return loss

    # ================================================================================================== bookkeeping
    def count_step(self, batches: list[dict]) -> Tensor:
        return torch.tensor([sum(len(batch["ids"]) for batch in batches)])

    def note(self, **values) -> None:
        """Keeps values for the next log line."""
        for name, value in values.items():
            value = value.detach() if isinstance(value, Tensor) else value  # read when it is logged, not earlier
            self.noted.setdefault(name, {}).setdefault(self.state.global_step, []).append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            for name, steps in self.noted.items():
                # the losses of pieces add up to their step's, shares and norms are averaged
                fold = sum if name in ("itm", "itg") else np.mean
                logs[name] = float(np.mean([fold([float(v) for v in values]) for values in steps.values()]))
            self.noted.clear()
            logs["temperature"] = 1 / self.temperature()[0].item()
            logs["seconds"] = round(self.timer.elapsed(), 2)
            self.run_folder.log("train", self.state.global_step, **logs)
            if self.args.should_save:
                shown = ("loss", "itc", "itm", "itg", "itc_accuracy", "itm_accuracy", "temperature", "learning_rate")
                text = "  ".join(f"{name} {logs[name]:.4g}" for name in shown if name in logs)
                self.progress.print_line(f"step {self.state.global_step}  {text}  {logs['seconds']:.0f} s")
        super().log(logs, start_time)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """As the settings say; a run of limited time goes by the clock, and ends its course when the time is up."""
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

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Recall on the validation split."""
        if self.judged[0] == self.state.global_step:  # the last step asks twice
            return self.judged[1]
        with self.average.in_place() if self.average else contextlib.nullcontext():
            found = self.validate(self.accelerator.unwrap_model(self.model))
        self.run_folder.log("validation", self.state.global_step, **found)
        if self.args.should_save:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
            self.progress.print_line(f"step {self.state.global_step}  {shown}")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.judged = (self.state.global_step, metrics)
        return metrics


NEW_PARTS = ("query_tokens", "cross_attention", "patch_projection", "_proj.", "itm_head", "text_head", "logit_")


def is_new_part(name: str) -> bool:
    """Queries, cross-attention, projections and heads: no BERT brings them."""
    return any(part in name for part in NEW_PARTS)


def parameter_groups(model: nn.Module, settings: AlignSettings) -> list[dict]:
    """Body and new parts, each with and without weight decay."""
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
    """Norm of the gradients, before clipping, of the body and of the new parts."""
    squares = {"grad_norm_body": 0.0, "grad_norm_new": 0.0}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            key = "grad_norm_new" if is_new_part(name) else "grad_norm_body"
            squares[key] += parameter.grad.detach().float().square().sum().item()
    return {name: math.sqrt(value) for name, value in squares.items()}


class Timer(TrainerCallback):
    """Time spent in a run, all its continuations together; ends one whose time is limited."""

    def __init__(self, max_minutes: float | None = None, before: float = 0.0):
        self.limit = None if max_minutes is None else 60 * max_minutes
        self.before, self.begin = before, time.perf_counter()

    def elapsed(self) -> float:
        return self.before + time.perf_counter() - self.begin

    def share(self) -> float:
        return min(self.elapsed() / self.limit, 1.0)

    def on_step_end(self, args, state, control, **keywords):
        over = self.limit is not None and self.elapsed() >= self.limit
        if self.limit is not None and args.world_size > 1:  # all processes stop at the same step
            over = objectives.global_count(int(over), args.device) > 0
        if over:
            control.should_training_stop = control.should_evaluate = control.should_save = True
        return control


# -------------------------------------------------------------------------------------------------------- the command
def mean_recall(metrics: dict) -> float:
    """Mean of R@1, R@5 and R@10 both ways: what the best model is chosen by."""
    return float(np.mean([metrics[way][f"R@{k}"] for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]))


def flat(metrics: dict) -> dict[str, float]:
    """`{"image_to_text": {"R@1": x}}` -> `{"i2t_R@1": x}`, with the mean recall and chance's in front."""
    ways = (("i2t", "image_to_text"), ("t2i", "text_to_image"))
    values = {f"{short}_{name}": value for short, way in ways for name, value in metrics[way].items()}
    return {"recall": mean_recall(metrics), "chance": mean_recall(metrics["chance"]), **values}


def validator(settings: AlignSettings, cache, pairs: CaptionPairs, tokenizer):
    """Function from a model to the recall on the validation split, images without captions left out."""
    captions = pairs.captions()
    kept = [image for image, own in enumerate(captions) if own][: settings.eval_images]

    def validate(model) -> dict[str, float]:
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

    return validate


def prepare(settings: AlignSettings, folder: RunFolder, cache: FeatureCache | None = None) -> AlignTrainer:
    """Everything up to the first step. The cache is opened where it is not given."""
    zero.refuse_foreign_launch()
    torch.manual_seed(settings.seed)
    cache = FeatureCache.open(settings.cache) if cache is None else cache
    for split in ("train", "validation"):
        if not cache.num_with_captions(split):
            raise UserError(f"{settings.cache} has no caption in its {split} split: stage 1 learns from captions")
    model, processor, tokenizer = starting_point(settings)
    cache.check_model(model, processor)
    pairs = {s: CaptionPairs(cache.split(s), tokenizer, settings.max_text_tokens) for s in ("train", "validation")}
    processes = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's; nothing is distributed yet
    size = min(settings.batch_size, len(pairs["train"]))
    if size < processes:
        raise UserError(f"batch_size {size} cannot be shared by {processes} processes")
    plan = BatchPlan(
        sizes=(len(pairs["train"]),), weights=(1.0,), seed=settings.seed, images_per_step=size, micro_batches=processes
    )
    steps = settings.max_steps or math.ceil(settings.epochs * plan.steps_per_epoch)
    if settings.max_minutes and not settings.max_steps:
        steps = 10_000_000  # the clock ends it
    bf16 = settings.precision == "bf16" or (
        settings.precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    )
    args = training_arguments(
        settings,
        folder,
        steps,
        1,
        eval_steps=settings.eval_every or min(plan.steps_per_epoch, steps),
        metric_for_best_model="recall",
        greater_is_better=True,
        bf16=bf16,
        use_cpu=choose_device(settings.device) == "cpu",  # bf16 on a CPU is refused unless it is told
        ddp_find_unused_parameters=False,
    )
    timer = Timer(settings.max_minutes)
    average = Average(model, settings.ema) if settings.ema else None
    trainer = AlignTrainer(
        model=model,
        args=args,
        train_dataset=PairBatches(pairs["train"], cache, "train", tokenizer, plan, steps),
        eval_dataset=pairs["validation"],
        callbacks=[timer],
        processing_class=processor,
        settings=settings,
        validate=validator(settings, cache, pairs["validation"], tokenizer),
        timer=timer,
        run=folder,
        average=average,
        groups=parameter_groups(model, settings),
        betas=settings.adam_betas,
    )
    print_line(model.describe_trainable())
    left_out = f", {pairs['train'].left_out} answers to questions left out" if pairs["train"].left_out else ""
    until = f"{settings.max_minutes:g} minutes" if settings.max_minutes else f"{steps} steps"
    print_line(
        f"{len(pairs['train'])} image-caption pairs of {len(set(pairs['train'].images))} images{left_out}; "
        f"{size} pairs a step, {plan.steps_per_epoch} steps an epoch; {until}"
    )
    return trainer


def run_align(settings: AlignSettings) -> dict:
    """`align`, with its summary: validation recall `before` and `after`, steps, seconds."""
    folder = RunFolder(settings.out, writes=int(os.environ.get("RANK", 0)) == 0)
    folder.claim(settings)
    if (summary := folder.finished()) is not None:
        print_line(f"{folder.path} is finished already")
        return summary
    trainer = prepare(settings, folder)
    resumed, damaged = checkpoints.newest_verified(folder.checkpoints)
    for checkpoint in damaged:
        print_line(f"passed over {checkpoint}")
    step = checkpoints.step_of(resumed) if resumed else -1
    folder.rewind(step)
    if resumed:
        trainer.timer.before = max((event.get("seconds", 0.0) for event in folder.events()), default=0.0)
        print_line(f"going on from {resumed}")
    else:
        trainer.evaluate()  # what the starting weights give
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    folder.draw_curves()
    if trainer.interrupted:
        raise UserError(f"interrupted at step {trainer.state.global_step}: the same command goes on from there")

    best = trainer.load_best()
    validations = [event for event in folder.events() if event["kind"] == "validation"]
    chosen = next(event for event in validations if event["step"] == (best or trainer.state.global_step))
    summary = {
        "before": validations[0],
        "after": chosen,
        "steps": trainer.state.global_step,
        "seconds": round(trainer.timer.elapsed(), 1),
    }
    if folder.writes:
        model = trainer.model
        (model.save_pretrained if settings.full else model.save_bridge)(folder.path)
        trainer.processing_class.save_pretrained(folder.path)
    folder.finish(summary)
    return summary


def align(settings: AlignSettings) -> None:
    """`blipren align MODEL CACHE OUT`."""
    print_line(f"stage 1 of {settings.model} over {settings.cache}; results in {settings.out}")
    summary = run_align(settings)
    before, after = summary["before"], summary["after"]
    for name, way in (("i2t", "image to text"), ("t2i", "text to image")):
        recalls = ", ".join(f"R@{k} {100 * after[f'{name}_R@{k}']:.1f}%" for k in (1, 5, 10))
        print_line(f"validation, {way}: {recalls}")
    print_line(f"mean recall {before['recall']:.3f} -> {after['recall']:.3f} (chance {after['chance']:.3f})")
    print_line(f"model: {settings.out}   log: {settings.out}/log.jsonl   curves: {settings.out}/curves.png")
