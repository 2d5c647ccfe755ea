"""`blipren grpo`: completions are sampled from the model, rewarded, and compared with each other, through TRL.

A step samples for all of its prompts with the weights as they are, then updates once. The samples of a prompt share its
prefix in generation (one prefill, whose key-value cache is expanded) and in the update (a packed row). Advantages and
loss are TRL's (engine/trainer/trl_overrides.py).
"""

import math

import torch
from trl import GRPOConfig

from blipren.training.commands.grpo import GrpoSettings
from blipren.training.data.batches.datasets import EvalBatches
from blipren.training.data.batches.masks import dense_attention
from blipren.training.data.batches.prompts import (
    EvalPromptBatches,
    Prompt,
    PromptBatches,
    PromptSource,
    completion_blocks,
)
from blipren.training.data.batches.training_data import CachedData, open_caches, read_caches
from blipren.training.engine.optimizer import Average
from blipren.training.engine.run_folder import RunFolder
from blipren.training.engine.trainer.log_window import token_log_line
from blipren.training.engine.trainer.run import run_stage
from blipren.training.engine.trainer.stage_trainer import seed_of
from blipren.training.engine.trainer.trl_overrides import PackedGRPO
from blipren.training.errors import UserError
from blipren.training.evaluation.examples import read_facts
from blipren.training.evaluation.generation import end_ids, pad_left
from blipren.training.objectives.rewards.build import Completions, Reward, build_rewards
from blipren.training.objectives.sampling import sample_answers
from blipren.training.objectives.token_scores import TokenScores, answer_places, token_scores
from blipren.training.stages.answer_trainer import AnswerTrainer
from blipren.training.stages.preference_setup import prepare_run


class GrpoTrainer(AnswerTrainer):
    """Trains on `PromptBatches`, validates the rewards of greedy answers to all of `EvalPromptBatches`.

    Args:
        objective: TRL's advantages and loss.
        rewards: what they compare.
        facts: what is known of each image.
        eval_prompts: prompts of the validation split.
        reference: weights before training; None where beta is 0.
    """

    compared = ("reward",)

    def __init__(
        self,
        *,
        objective: PackedGRPO,
        rewards: list[Reward],
        facts: dict[str, dict],
        layout,
        eval_prompts: EvalPromptBatches | None,
        reference: Average | None,
        **keywords,
    ):
        super().__init__(**keywords)
        self.objective, self.rewards, self.facts, self.layout = objective, rewards, facts, layout
        self.eval_prompts, self.reference = eval_prompts, reference

    # ---- before the step: completions and their advantages --------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of a step with sampled, rewarded completions, and the counts of the step."""
        batches, counts = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self.sample_step(batches)
        return batches, counts

    def count_step(self, batches: list[dict]) -> torch.Tensor:
        """Return [completions, images] of this process's part of a step."""
        prompts = sum(len(b["prompts"]) for b in batches)
        samples = self.settings.num_generations
        return torch.tensor([float(prompts * samples), float(sum(len(b["ids"]) for b in batches))])

    def sample_step(self, batches: list[dict]) -> None:
        """Sample completions for the prompts of a step, and put their rows and advantages into its micro-batches."""
        made = [self.sample(batch, self.settings.num_generations, self.settings.temperature) for batch in batches]
        rewards = [
            [reward(rows) for reward in self.rewards] for rows in (self.describe(b, m) for b, m in zip(batches, made))
        ]
        own = [
            (ids, [math.nan if own[i] is None else own[i] for own in found])
            for completions, found in zip(made, rewards)
            for i, ids in enumerate(completions)
        ]
        everybody, start = self.gather_lists(own)
        inputs, metrics = self.objective.advantages(
            [ids for ids, _ in everybody], torch.tensor([values for _, values in everybody])
        )
        lengths = torch.tensor([float(len(ids)) for ids, _ in own])
        ended = torch.tensor([float(ids[-1] == self.processor.answer_end_id) for ids, _ in own])
        self.window.add_metrics(metrics, 1.0)
        lengths = {
            "completions/mean_length": lengths.mean().item(),
            "completions/clipped_ratio": 1 - ended.mean().item(),
        }
        self.window.add_metrics(lengths, float(len(own)))
        for batch, completions in zip(batches, made):
            end = start + len(completions)
            batch["completions"] = {
                name: value[start:end] if value.ndim and name != "num_items_in_batch" else value
                for name, value in inputs.items()
            }
            start = end
            self.pack(batch, completions)

    @torch.no_grad()
    def sample(self, batch: dict, samples: int, temperature: float) -> list[list[int]]:
        """Return the token ids of `samples` completions of each prompt of a batch. Nothing is dropped out."""
        model, prompts = self.model, batch["prompts"]
        ids, mask = pad_left([p.prefix + p.rest for p in prompts], self.layout.pad_token_id)
        device = self.args.device
        places = [p.place for p in prompts]
        training = model.training
        model.eval()
        if "item" in batch:
            torch.manual_seed(seed_of(self.args.seed, batch["item"]))
        with dense_attention(model.parts()["llm"]), self.compute_loss_context_manager():
            made = sample_answers(
                model,
                ids.to(device),
                mask.to(device),
                {name: tensor[places] for name, tensor in batch["inputs"].items()},
                self.processor.answer_end_id,
                samples=samples,
                temperature=temperature,
                max_new_tokens=self.settings.max_completion_length,
            )
        model.train(training)
        return made

    def describe(self, batch: dict, made: list[list[int]]) -> Completions:
        """Return completions with what rewards may look at."""
        prompts: list[Prompt] = batch["prompts"]
        each = [prompt for prompt in prompts for _ in range(len(made) // len(prompts))]
        return Completions(
            prompts=[p.text for p in each],
            completions=[self.processor.decode_answer(ids) for ids in made],
            completion_ids=made,
            references=[p.references for p in each],
            image_ids=[p.image_id for p in each],
            facts=[self.facts.get(p.image_id, {}) for p in each],
            ended=[ids[-1] == self.processor.answer_end_id for ids in made],
        )

    def pack(self, batch: dict, completions: list[list[int]]) -> None:
        """Put the packed rows of completions into a batch, behind the prefixes of their images."""
        packed = self.layout.collate(completion_blocks(batch["prompts"], completions))
        places = [place for _, place in packed.pop("images")]
        device = self.args.device
        batch |= {name: tensor.to(device) for name, tensor in packed.items()}
        batch["inputs"] = {name: tensor[places] for name, tensor in batch["inputs"].items()}

    def gather_lists(self, own: list) -> tuple[list, int]:
        """Return the items of all processes behind each other, and where this process's begin."""
        if self.accelerator.num_processes == 1:
            return own, 0
        parts: list = [None] * self.accelerator.num_processes
        torch.distributed.all_gather_object(parts, own)
        return [item for part in parts for item in part], sum(map(len, parts[: self.accelerator.process_index]))

    # ---- the step -------------------------------------------------------------------------------------------------

    def compute_loss(self, model, batch, return_outputs=False, num_items_in_batch=None):
        """One micro-batch: packed completions in, this process's part of the step's loss out."""
        completions_in_step, images_in_step = num_items_in_batch
        inputs = batch["completions"]
        if self.reference is not None:
            with torch.no_grad(), self.reference.in_place():
                inputs["ref_per_token_logps"] = self.score(model, batch)[0].log_probs
        scores, outputs = self.score(model, batch)
        loss, metrics = self.objective.loss(scores, inputs)
        loss = loss * self.objective.part_of_step(inputs, int(completions_in_step))
        if outputs.router_aux_loss is not None:
            loss = loss + outputs.router_aux_loss * len(batch["ids"]) / images_in_step
        if not self.window.nll:
            self.window.first_step = self.state.global_step
        self.window.add(batch, -scores.log_probs.detach().sum(), loss.detach(), outputs.router_probs)
        # the update is at the weights that sampled: no ratio is ever clipped
        metrics = {name: value for name, value in metrics.items() if "clip" not in name}
        self.window.add_metrics(metrics, float(len(inputs["completion_ids"])))
        return loss * self.accelerator.num_processes  # DDP averages gradients over processes; the loss is a sum

    def score(self, model, batch: dict) -> tuple[TokenScores, object]:
        """Return the scores of the completions of a batch, one row each, and the model's outputs."""
        inputs, attention_mask = self.plain(batch)
        outputs = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=attention_mask,
            logits_at=batch["predict_from"],
            use_cache=False,
            **inputs,
        )
        scores = token_scores(outputs.logits, batch["targets"], self.settings.temperature)
        shape = batch["completions"]["completion_ids"].shape
        return scores.rows(batch["segment_of"], answer_places(batch["segment_of"]), shape), outputs

    # ---- log and validation ---------------------------------------------------------------------------------------

    def objective_values(self, counts: dict) -> dict[str, float]:
        return counts["metrics"]

    def log_line(self, values: dict[str, float]) -> str:
        step, steps = self.state.global_step, self.state.max_steps
        shown = ["reward", "kl"]
        return token_log_line(step, steps, values, shown, (steps - step) * self.seconds_per_step)

    def validate(self) -> dict[str, float]:
        """Return the mean rewards of greedy answers, CIDEr where it chooses the model; the sample captions are logged."""
        metrics: dict[str, float] = {"images": self.validation.images, **self.mean_rewards()}
        if self.settings.keep_best == "CIDEr":
            metrics["CIDEr"] = self.validation.cider()
        self.validation.log_samples("during" if self.state.global_step else "before")
        return metrics

    def mean_rewards(self) -> dict[str, float]:
        """Return the mean of each reward over the greedy answers that it applies to, and of their weighted sum."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        own = []
        for item in range(rank, len(self.eval_prompts), world):
            batch = self._prepare_inputs(self.eval_prompts[item])
            rows = self.describe(batch, self.sample(batch, 1, 0.0))
            own += zip(*(reward(rows) for reward in self.rewards))
        every, _ = self.gather_lists(own)
        found = {}
        for k, reward in enumerate(self.rewards):
            values = [row[k] for row in every if row[k] is not None]
            if values:
                found[f"rewards/{reward.name}"] = sum(values) / len(values)
        sums = [
            sum(r.weight * v for r, v in zip(self.rewards, row) if v is not None)
            for row in every
            if any(v is not None for v in row)
        ]
        return {"reward": sum(sums) / len(sums), **found}

    # ---- begin and end --------------------------------------------------------------------------------------------

    def begin(self, resumed: bool) -> None:
        if not resumed and self.validation is not None:
            self.log_text_loss()
            self.evaluate()
        self.clock.reset()


def build_trainer(settings: GrpoSettings, run: RunFolder) -> GrpoTrainer:
    """Return the trainer of a run."""
    caches = read_caches(settings.cache)
    facts = read_facts(settings.facts) if settings.facts is not None else {}
    rewards: list[Reward] = []

    def open_sources(model, processor):
        train, held_out = open_caches(caches, model, processor)
        sources = [PromptSource(data, settings.prompt_kinds()) for data in train if isinstance(data, CachedData)]
        held_out = next((data for data in held_out if isinstance(data, CachedData)), None)
        for source in sources:
            if not source.ids:
                kinds = " and ".join(sorted(settings.prompt_kinds()))
                raise UserError(f"{source.data.cache.folder} has no {kinds}, which the rewards are of")
        validation = [PromptSource(held_out, settings.prompt_kinds())] if held_out is not None else []
        validation = [source for source in validation if source.ids]
        references = {name: texts for source in sources for name, texts in source.captions().items()}
        others = {name: texts for source in validation for name, texts in source.captions().items()}
        rewards.extend(build_rewards(settings, references, others, facts))
        return sources, validation

    ready = prepare_run(settings, run, open_sources, True, settings.max_completion_length)
    config = GRPOConfig(
        output_dir=str(run.path),
        per_device_train_batch_size=settings.num_generations,
        use_cpu=ready.device.type == "cpu",
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        reward_weights=settings.reward_weights or None,
        **{
            name: getattr(settings, name)
            for name in (
                "num_generations", "max_completion_length", "temperature", "loss_type", "beta", "scale_rewards",
                "multi_objective_aggregation", "importance_sampling_level", "mask_truncated_completions",
                "top_entropy_quantile",
            )
        },
    )  # fmt: skip
    ends = end_ids(ready.model) | {ready.processor.answer_end_id}
    names = [reward.name for reward in rewards]
    (validation,), plan = ready.validation or [None], ready.plan
    return GrpoTrainer(
        objective=PackedGRPO(config, ready.model, ready.device, names, ready.layout.pad_token_id, ends),
        rewards=rewards,
        facts=facts,
        layout=ready.layout,
        eval_prompts=EvalPromptBatches(validation, ready.prompts, settings.batch_size) if validation else None,
        validation=EvalBatches([validation.data], ready.prompts, ready.layout, settings.batch_size)
        if validation
        else None,
        reference=Average(ready.model, 0.0) if settings.beta else None,
        train_dataset=PromptBatches(ready.sources, ready.prompts, plan, ready.steps, settings.prompts_per_image),
        **ready.keywords,
    )


def grpo(settings: GrpoSettings) -> int:
    """Run `blipren grpo`. Returns the exit status."""
    return run_stage(settings, build_trainer)
