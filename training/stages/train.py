"""Stage 2, `blipren train`: the bridge learns to caption and to answer through the language model.

`LikelihoodTrainer.compute_loss` is the step. Around it: `train` puts model, batches and run folder together; trainer.py
keeps checkpoints and stops; data/batches.py says what a batch is; tuning.py what is trained.
"""

import math
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import EarlyStoppingCallback

from blipren.training.commands.train import TrainSettings
from blipren.training.console import print_line
from blipren.training.data.batches.blocks import PromptEncoder
from blipren.training.data.batches.datasets import EvalBatches, Layout, TrainBatches
from blipren.training.data.batches.masks import build_attention_mask, dense_attention
from blipren.training.data.batches.plan import BatchPlan
from blipren.training.data.batches.training_data import open_caches, open_online, read_caches
from blipren.training.engine import checkpoints, flops
from blipren.training.engine import deepspeed as zero
from blipren.training.engine.device import choose_device
from blipren.training.engine.fsdp import full_tensor, is_sharded, shard
from blipren.training.engine.model_setup import (
    check_fused_loss,
    choose_precision,
    layout_for,
    load,
    load_quantised,
    set_attention,
    set_precision,
)
from blipren.training.engine.run_folder import RunFolder
from blipren.training.engine.trained_parts import (
    Average,
    checkpoint_activations,
    choose_trained,
    merge_lora,
    parameter_groups,
)
from blipren.training.engine.trainer import StageTrainer, clock_text, stopped_early, training_arguments
from blipren.training.errors import UserError
from blipren.training.objectives.experiments.bag_of_words import BagOfWords, add_words_head
from blipren.training.objectives.experiments.consensus import replace_captions_by_consensus
from blipren.training.objectives.experiments.self_critical import SelfCritical


def answer_losses(logits: torch.Tensor, targets: torch.Tensor, smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, vocabulary] logits, [n] targets -> summed negative log-likelihood, and summed objective (with smoothing)."""
    if not smoothing:
        nll = F.cross_entropy(logits.float(), targets, reduction="sum")
        return nll, nll
    log_probs = logits.float().log_softmax(dim=-1)
    nll = -log_probs.gather(1, targets[:, None]).sum()
    return nll, (1 - smoothing) * nll - smoothing * log_probs.mean(dim=-1).sum()


class LikelihoodTrainer(StageTrainer):
    """Trains on `TrainBatches`, validates on all of `EvalBatches`; loss is summed over answer tokens and divided by
    their global number, whatever the batching, accumulation or world size."""

    def __init__(
        self,
        *,
        settings: TrainSettings,
        processor,
        validation: EvalBatches | None,
        samples: list,
        critic: SelfCritical | None = None,
        words: BagOfWords | None = None,
        **keywords,
    ):
        super().__init__(eval_dataset=validation, **keywords)
        self.critic, self.words = critic, words
        self.settings, self.processor, self.validation, self.samples = settings, processor, validation, samples
        self.half_precision = choose_precision(settings.precision, self.args.device.type) != "fp32"
        self.seconds: float | None = None  # in steps, of the whole run
        self.window = Window()
        self.drawn = time.perf_counter()
        self.flops_per_token: float | None = None

    def compute_loss(self, model, batch, return_outputs=False, num_items_in_batch=None):
        """One micro-batch: features and tokens in, this process's part of the step's loss out."""
        s, (tokens_in_step, images_in_step) = self.settings, num_items_in_batch
        # ---------------------------------------------------------------------------------------------------------
        loss = nll = torch.zeros((), device=batch["targets"].device)
        router_probs = None
        if s.likelihood_weight or not model.training:
            inputs, attention_mask = self.regularised(batch) if model.training else self.plain(batch)
            outputs = model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                attention_mask=attention_mask,
                logits_at=batch["predict_from"],
                targets=batch["targets"] if s.fused_loss else None,
                use_cache=False,
                **inputs,
            )
            if s.fused_loss:
                nll = objective = outputs.loss
            else:
                nll, objective = answer_losses(outputs.logits, batch["targets"], s.label_smoothing)
            loss, router_probs = s.likelihood_weight * objective / tokens_in_step, outputs.router_probs
            if outputs.router_aux_loss is not None:
                loss = loss + outputs.router_aux_loss * len(batch["ids"]) / images_in_step
        if self.words is not None:
            loss = loss + s.words_weight * self.words_loss(batch) / images_in_step
        if self.critic is not None:
            loss = loss + s.reward_weight * self.reward_loss(model, batch) / images_in_step
        # ---------------------------------------------------------------------------------------------------------
        if not self.window.nll:
            self.window.first_step = self.state.global_step
        self.window.add(batch, nll.detach(), loss.detach(), router_probs)
        return loss * self.accelerator.num_processes  # DDP averages gradients over processes; the loss is a sum

    def words_loss(self, batch: dict) -> torch.Tensor:
        """Binary cross-entropy of the words of each image's answers, summed over vocabulary and images."""
        inputs, _ = self.regularised(batch)
        features = self.model.get_image_features(**inputs).pooler_output
        pooled = torch.stack([tokens.mean(dim=0) for tokens in features])  # [images, width]
        wanted = self.words.targets(batch).to(pooled.device)
        return F.binary_cross_entropy_with_logits(self.model.words_head(pooled), wanted, reduction="sum")

    def reward_loss(self, model, batch: dict) -> torch.Tensor | float:
        """Self-critical loss of a micro-batch, as a sum over its images: sampled captions, weighed by their advantage."""
        with dense_attention(self.model.parts()["llm"]):
            sampled = self.critic.batch(self.model, batch)
        if sampled is None:
            return 0.0
        inputs, attention_mask = self.regularised(sampled)
        outputs = model(
            input_ids=sampled["input_ids"],
            position_ids=sampled["position_ids"],
            attention_mask=attention_mask,
            logits_at=sampled["predict_from"],
            use_cache=False,
            **inputs,
        )
        nll = F.cross_entropy(outputs.logits.float(), sampled["targets"], reduction="none")
        self.window.rewards.append(sampled["reward"])
        return (sampled["weights"] * nll).mean() * len(sampled["ids"])

    def plain(self, batch: dict) -> tuple[dict, torch.Tensor | BlockMask]:
        """Model inputs and mask of a batch, nothing dropped."""
        return batch["inputs"], build_attention_mask(batch, self.model.parts()["llm"])

    def regularised(self, batch: dict) -> tuple[dict, torch.Tensor | BlockMask]:
        """Model inputs and mask of a training batch, with dropped patches, noise and dropped words."""
        s, inputs = self.settings, dict(batch["inputs"])
        features = inputs.get("patch_features")
        if features is not None and s.feature_noise:
            features = features.float()
            features = features + torch.randn_like(features) * s.feature_noise * features.std()
        if features is not None and s.feature_dropout:
            mask = inputs.get("patch_attention_mask")
            kept = torch.rand(features.shape[:2], device=features.device) >= s.feature_dropout
            kept[:, 0] = True  # an image keeps at least one
            if self.model.config.connector == "qformer":  # nobody looks at what is dropped
                inputs["patch_attention_mask"] = kept.long() if mask is None else mask * kept
            else:  # every patch is a visual token: what is dropped says no more than the whole image does
                features = torch.where(kept[..., None], features, features.mean(dim=1, keepdim=True))
        if features is not None:
            inputs["patch_features"] = features
        unseen = None
        if s.word_dropout:
            answer = batch["is_answer"]
            unseen = answer & (torch.rand(answer.shape, device=answer.device) < s.word_dropout)
        return inputs, build_attention_mask(batch, self.model.parts()["llm"], unseen)

    def count_step(self, batches: list[dict]) -> torch.Tensor:
        """[answer tokens, images] of this process's part of a step."""
        return torch.tensor(
            [float(sum(len(b["targets"]) for b in batches)), float(sum(len(b["ids"]) for b in batches))]
        )

    # ---- log ------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "learning_rate" not in logs:  # the Trainer's own summary at the end; validation logs for itself
            return
        rewards = self.window.rewards
        counts = self.window.drain(self.accelerator)
        seconds, step = self.clock.elapsed(), self.state.global_step
        if self.seconds is None:  # those of the run that this one goes on from
            self.seconds = max((event.get("seconds", 0.0) for event in self.run_folder.events()), default=0.0)
        self.seconds += seconds
        steps = step - self.window.first_step
        self.clock.reset()
        values = {
            "epoch": round(step / self.train_dataset.plan.steps_per_epoch, 4),
            "loss": counts["nll"] / counts["targets"],
            "objective": counts["loss"] / steps,
            "grad_norm": float(logs.get("grad_norm") or 0.0),
            "learning_rate": logs["learning_rate"],
            "tokens_per_second": counts["tokens"] / seconds,
            "images_per_second": counts["images"] / seconds,
            "useful_tokens": counts["tokens"] / counts["positions"],
            "seconds": round(self.seconds, 2),
            **({"reward": sum(rewards) / len(rewards)} if rewards else {}),
            **{f"expert_{i}": share for i, share in enumerate(counts["experts"])},
        }
        if self.flops_per_token:
            rate = values["tokens_per_second"] * self.flops_per_token
            values["tflops"] = rate / 1e12
            peak = flops.peak(self.args.device, half=self.half_precision)
            if peak is not None:
                values["mfu"] = rate / (peak * self.accelerator.num_processes)
        left = (self.state.max_steps - step) * seconds / steps
        super().log(dict(values), start_time)
        self.run_folder.log("train", step, **values)
        if self.args.should_save:
            self.progress.print_line(train_line(step, self.state.max_steps, values, left))
            self.progress.show(
                f"{values['images_per_second']:.1f} images/s, {values['tokens_per_second']:,.0f} tokens/s"
            )

    # ---- validation -----------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Loss over all of validation, CIDEr where it chooses the model, and the sample captions."""
        step, images, began = self.state.global_step, len(self.validation.data.texts), time.perf_counter()
        with self.clock, self.average.in_place() if self.average is not None else nullcontext():
            metrics = {"loss": self.validation_loss()}
            if self.settings.keep_best == "CIDEr":
                metrics["CIDEr"] = self.validation_cider()
            self.log_samples()
            self.run_folder.log("validation", step, images=images, **metrics)
            if time.perf_counter() - self.drawn > 60:
                self.run_folder.draw_curves()
                self.drawn = time.perf_counter()
        if self.args.should_save:
            text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            self.progress.print_line(
                f"validation at step {step}: {text}  ({images} images, {time.perf_counter() - began:.1f} s)"
            )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        super().log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Negative log-likelihood per answer token over every image and answer of validation."""
        model, rank, world = self.model, self.accelerator.process_index, self.accelerator.num_processes
        was_training = model.training
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for item in range(rank, -(-len(self.validation) // world) * world, world):
            # a sharded model runs on all processes together: who has no batch left repeats one that does not count
            counts = item < len(self.validation)
            batch = self._prepare_inputs(self.validation[item if counts else 0])
            inputs, attention_mask = self.plain(batch)
            outputs = model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                attention_mask=attention_mask,
                logits_at=batch["predict_from"],
                use_cache=False,
                **inputs,
            )
            nll = F.cross_entropy(outputs.logits.float(), batch["targets"], reduction="sum")
            if counts:
                sums += torch.tensor([nll.item(), len(batch["targets"])], dtype=torch.float64)
        model.train(was_training)
        if world > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum")
        return (sums[0] / sums[1]).item()

    def captions(self, images: Sequence[int]) -> list[dict]:
        """Captions of validation images, as `generate_captions` gives them."""
        from blipren.training.evaluation.captioning import Features, generate_captions

        source, was_training = self.validation.data, self.model.training
        self.model.eval()
        found: list[dict] = []
        for start in range(0, len(images), 32):
            inputs = source.inputs(list(images[start : start + 32]), None)
            if "patch_features" not in inputs:
                inputs = {k: v.to(self.args.device) for k, v in inputs.items()}
                mask = inputs.get("pixel_attention_mask")
                inputs = {"patch_features": self.model.encode_images(**inputs), "patch_attention_mask": mask}
            features = Features(inputs["patch_features"], inputs.get("patch_attention_mask"))
            with dense_attention(self.model.parts()["llm"]):
                found += generate_captions(
                    self.model,
                    self.processor,
                    features,
                    max_new_tokens=self.settings.max_new_tokens,
                    num_beams=self.settings.num_beams,
                    **({"length_penalty": self.settings.length_penalty} if self.settings.num_beams > 1 else {}),
                )
        self.model.train(was_training)
        return found

    def validation_cider(self) -> float:
        """CIDEr of greedy or beam captions over every validation image that has captions."""
        from blipren.training.evaluation.metrics.captions import score_captions

        source, rank, world = self.validation.data, self.accelerator.process_index, self.accelerator.num_processes
        references = source.references()
        if is_sharded(self.model):  # all processes generate together
            rank, world = 0, 1
        mine = sorted(references)[rank::world]
        made = {str(i): found["text"] for i, found in zip(mine, self.captions(mine))}
        if world > 1:
            parts: list = [None] * world
            torch.distributed.all_gather_object(parts, made)
            made = {name: text for part in parts for name, text in part.items()}
        references = {str(i): texts for i, texts in references.items()}
        return score_captions(made, references, tokenizer="python", meteor=False).corpus["CIDEr"]

    def log_samples(self, when: str = "during") -> None:
        """Captions of the same few validation images, into the log and on the screen."""
        if not self.samples or not (self.args.should_save or is_sharded(self.model)):
            return
        captions = self.captions(self.samples)
        if not self.args.should_save:
            return
        self.progress.print_line(f"captions {when} training:")
        for image, found in zip(self.samples, captions):
            name = self.validation.data.ids[image]
            self.run_folder.log("sample", self.state.global_step, image=name, text=found["text"], when=when)
            self.progress.print_line(f"  {name}: {found['text']}")


def train_line(step: int, steps: int, values: dict, seconds_left: float) -> str:
    """The one log line of a training step."""
    speed = f"{values['tokens_per_second']:,.0f} tokens/s  {values['images_per_second']:.1f} images/s"
    if "mfu" in values:
        speed += f"  MFU {values['mfu']:.1%}"
    elif "tflops" in values:
        speed += f"  {values['tflops']:.3f} TFLOP/s"
    experts = [values[name] for name in sorted(values) if name.startswith("expert_")]
    load = "  experts " + "/".join(f"{share:.2f}" for share in experts) if experts else ""
    reward = f"reward {values['reward']:.3f}  " if "reward" in values else ""
    return (
        f"step {step}/{steps}  loss {values['loss']:.4f}  {reward}lr {values['learning_rate']:.2e}  "
        f"norm {values['grad_norm']:.2f}  {speed}{load}  left {clock_text(seconds_left)}"
    )


class Window:
    """Sums between two log lines. What lies on the device is fetched once a line."""

    def __init__(self):
        self.first_step = 0
        self._clear()

    def _clear(self) -> None:
        self.nll: list[torch.Tensor] = []
        self.loss: list[torch.Tensor] = []
        self.experts: list[torch.Tensor] = []
        self.rewards: list[float] = []
        self.counts = dict.fromkeys(("targets", "images", "tokens", "positions"), 0)

    def add(self, batch: dict, nll: torch.Tensor, loss: torch.Tensor, router_probs: torch.Tensor | None) -> None:
        used = batch["block_ids"] >= 0 if "block_ids" in batch else batch["attention_mask"] > 0
        self.nll.append(nll)
        self.loss.append(loss)
        if router_probs is not None:
            self.experts.append(router_probs.detach().float().sum(dim=0))
        self.counts["targets"] += len(batch["targets"])
        self.counts["images"] += len(batch["ids"])
        self.counts["tokens"] += used.sum()
        self.counts["positions"] += used.numel()

    def drain(self, accelerator) -> dict:
        """Sums over all processes since the last call; `experts` are shares of the routing weight."""
        names = list(self.counts)
        values = [float(self.counts[n]) for n in names]
        values += [torch.stack(self.nll).sum().item(), torch.stack(self.loss).sum().item()]
        values += torch.stack(self.experts).sum(dim=0).tolist() if self.experts else []
        sums = torch.tensor(values, dtype=torch.float32, device=accelerator.device)
        sums = (accelerator.reduce(sums, "sum") if accelerator.num_processes > 1 else sums).tolist()
        self._clear()
        found = dict(zip([*names, "nll", "loss"], sums))
        loads = sums[len(names) + 2 :]
        return found | {"experts": [load / sum(loads) for load in loads]}


# ---- putting it together ------------------------------------------------------------------------------------------


def whole_steps(settings: TrainSettings, plan: BatchPlan) -> int:
    return settings.max_steps or math.ceil(settings.epochs * plan.steps_per_epoch)


def make_plan(settings: TrainSettings, sources: Sequence, world: int) -> BatchPlan:
    """The batch plan; a step is cut into a multiple of the number of processes."""
    try:
        return BatchPlan(
            sizes=tuple(len(source.texts) for source in sources),
            weights=tuple(source.weight for source in sources),
            seed=settings.seed,
            images_per_step=settings.batch_size,
            micro_batches=-(-settings.micro_batches // world) * world,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def make_critic(settings: TrainSettings, processor, sources, layout: Layout) -> SelfCritical:
    """Samples and rewards captions; validation references stay out of the rewards."""
    return SelfCritical(
        processor,
        sources,
        settings.reward_samples,
        settings.reward_temperature,
        settings.reward_max_tokens,
        layout.shared_prefix,
    )


def try_step(trainer: LikelihoodTrainer, model) -> None:
    """The first micro-batch, forward and backward, without an update: counts FLOPs per useful token. In SDPA where the
    run takes FlexAttention, whose arithmetic torch cannot count.

    Raises:
        UserError: when no gradient reaches the connector, which would then learn nothing from any image.
    """
    if not trainer.settings.likelihood_weight:
        return  # no token goes through the language model
    batch = trainer._prepare_inputs(trainer.train_dataset[0])
    model.train()
    counts = torch.tensor([float(len(batch["targets"])), float(len(batch["ids"]))], device=trainer.args.device)
    extra, trainer.critic, trainer.words = (trainer.critic, trainer.words), None, None  # not what a useful token costs

    def step() -> None:
        loss = trainer.compute_loss(model, batch, num_items_in_batch=counts)
        if loss.requires_grad:
            loss.backward()

    with dense_attention(model.parts()["llm"]):
        total = flops.count(step)
    trainer.critic, trainer.words = extra
    projector = model.parts()["projector"].named_parameters()  # a router has a loss of its own
    trained = [p for name, p in projector if p.requires_grad and not name.startswith("router")]
    if trained and not any(full_tensor(p.grad).any() for p in trained if p.grad is not None):
        raise UserError(
            "no gradient reaches the projector: the language model lets none through, so that training would ignore "
            "every image. Leave out what is special about it (such as --llm-bits), or take another, with another OUT"
        )
    model.zero_grad()
    tokens = trainer.window.counts["tokens"]
    trainer.window = Window()
    trainer.flops_per_token = total / int(tokens)


def train(settings: TrainSettings) -> int:
    """The `train` command. Returns the exit status: 0 when all was done, 130 when it was interrupted and saved."""
    zero.refuse_foreign_launch()
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    zero_config = zero.read_config(settings.deepspeed, device)
    if zero_config and precision == "fp16":
        raise UserError("deepspeed trains in bf16 or fp32 here, not fp16; give --precision bf16")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not settings.likelihood_weight and not settings.reward_weight:
        # the language model is out of the step, so DDP's forward is never called and gradients are not averaged
        raise UserError(f"likelihood_weight 0 with words_weight alone trains on one process; there are {world}")
    run = RunFolder(settings.out, writes=int(os.environ.get("RANK", 0)) == 0)
    if done := run.finished():
        run.claim(settings)
        print_line(f"{run.path} is finished: {done['steps']} steps; the model is in {run.path}")
        return 0
    torch.manual_seed(settings.seed)
    caches = [] if settings.online else read_caches(settings.cache)
    model, processor = load_quantised(settings, precision) if settings.llm_bits else load(settings)
    if settings.online:
        sources, validation = open_online(settings.cache, model, processor, settings, settings.augment)
    else:
        sources, validation = open_caches(caches, model, processor)
    if settings.consensus_captions:
        for source in sources:
            print_line(replace_captions_by_consensus(source, settings.consensus_captions, processor))
    words = BagOfWords(sources, processor) if settings.words_weight else None
    if words is not None:
        add_words_head(model, words)
    choose_trained(model, settings)
    if settings.attention:
        set_attention(model, settings.attention, device)
    if settings.fused_loss:
        check_fused_loss(model)
    set_precision(model, precision)
    plan, prompts = make_plan(settings, sources, world), PromptEncoder(processor)
    layout = layout_for(model, processor, settings, sources)
    steps = whole_steps(settings, plan)
    run.claim(settings)
    if run.writes:
        print_line(model.describe_trainable())
        print_line(
            f"{steps} steps of {plan.images_per_epoch / plan.steps_per_epoch:.0f} images in {plan.micro_batches} "
            f"micro-batches, {plan.steps_per_epoch} an epoch of {plan.images_per_epoch:,} images; {precision} on "
            f"{device}, {world} process{'es' if world > 1 else ''}; validation on "
            f"{len(validation.texts) if validation else 0} images; run folder {run.path}"
        )
    if settings.gradient_checkpointing:
        checkpoint_activations(model)

    judge = settings.keep_best if validation is not None and settings.keep_best != "last" else None
    every = (settings.eval_every or min(plan.steps_per_epoch, steps)) if validation is not None else None
    if settings.compile:
        os.environ["ACCELERATE_DYNAMO_USE_DYNAMIC"] = "true"  # lengths differ from batch to batch
    args = training_arguments(
        settings,
        run,
        steps,
        plan.micro_batches // world,
        eval_steps=every,
        use_cpu=device == "cpu" and not zero_config,  # DeepSpeed chooses the device, which is the same
        bf16=precision == "bf16" and not zero_config,
        fp16=precision == "fp16",
        deepspeed=zero_config,
        **(zero.start(device) if zero_config else {}),
        metric_for_best_model=judge,
        greater_is_better=judge == "CIDEr",
        torch_compile=settings.compile,
        torch_compile_backend=settings.compile_backend if settings.compile else None,
        ddp_find_unused_parameters=False,
    )
    if zero_config and precision == "bf16":  # inside of DeepSpeed's engine, where it would cast the weights themselves
        model.forward = torch.autocast(device, torch.bfloat16)(model.forward)
    if settings.fsdp and world > 1:
        shard(model)
    trainer = LikelihoodTrainer(
        settings=settings,
        processor=processor,
        validation=EvalBatches(validation, prompts, layout, settings.batch_size) if validation is not None else None,
        samples=list(range(min(settings.generate_samples, len(validation.texts)))) if validation is not None else [],
        words=words,
        critic=make_critic(settings, processor, sources, layout) if settings.reward_weight else None,
        run=run,
        average=Average(model, settings.ema) if settings.ema else None,
        groups=parameter_groups(model, settings),
        betas=settings.adam_betas,
        model=model,
        args=args,
        train_dataset=TrainBatches(sources, prompts, plan, layout, steps),
        callbacks=[EarlyStoppingCallback(settings.patience)] if settings.patience and judge else None,
    )
    checkpoint, damaged = checkpoints.newest_verified(run.checkpoints)
    if run.writes:
        for bad in damaged:
            print_line(f"passed over a damaged checkpoint, {bad}")
        if checkpoint is not None:
            print_line(f"going on from {checkpoint}")
    run.rewind(checkpoints.step_of(checkpoint) if checkpoint is not None else -1)
    try_step(trainer, model)
    if checkpoint is None and validation is not None:
        trainer.log_samples("before")
    if checkpoint is not None and stopped_early(checkpoint):
        trainer.restore(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    if trainer.interrupted:
        print_line(f"interrupted: saved at step {trainer.state.global_step}; run the same command again to go on")
        return 130
    finish(trainer, settings, run)
    return 0


def finish(trainer: LikelihoodTrainer, settings: TrainSettings, run: RunFolder) -> None:
    """The chosen weights into OUT, with processor, curves and summary."""
    best = trainer.load_best()
    state, trained = trainer.state, trainer.trained_weights()
    trainer.log_samples("after")
    if not run.writes:
        return
    # into a fresh copy, whose frozen parts are bit for bit what they were, in the precision that they had
    model, _ = load(settings)
    choose_trained(model, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.copy_(trained[name])
    full = settings.full or settings.llm_tuning == "full" or settings.train_vision
    if settings.merge_lora:
        merge_lora(model)
    model.save_pretrained(run.path) if full else model.save_bridge(run.path)
    trainer.processor.save_pretrained(run.path)
    run.draw_curves()
    summary = {"steps": state.global_step, "kept": "last" if best is None else f"step {best}"}
    if state.best_metric is not None:
        summary[settings.keep_best] = state.best_metric
    run.finish(summary)
    which = (
        "last weights"
        if best is None
        else f"best of validation, {settings.keep_best} {state.best_metric:.4f} at step {best}"
    )
    print_line(
        f"done: {state.global_step} steps; {which}. {'Full' if full else 'Bridge'} checkpoint, log.jsonl and curves.png in {run.path}"
    )
