"""`blipren dpo`: chosen answers become likelier than rejected ones, through TRL.

Chosen and rejected answers stand behind the prefix of their images in packed rows. The reference is the model before
training: its log-probabilities of all pairs are computed once and stored in the run's folder. The loss is TRL's
(engine/trainer/trl_overrides.py).
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save
from trl import DPOConfig

from blipren.training.commands.dpo import DpoSettings
from blipren.training.data.batches.datasets import EvalBatches
from blipren.training.data.batches.preferences import AllPairs, PairBatches
from blipren.training.data.batches.samples import CachedSamples
from blipren.training.data.batches.training_data import open_split, read_caches
from blipren.training.engine.run_folder import RunFolder
from blipren.training.engine.trainer.log_window import token_log_line
from blipren.training.engine.trainer.run import run_stage
from blipren.training.engine.trainer.trl_overrides import PackedDPO
from blipren.training.errors import UserError
from blipren.training.files import write_atomically
from blipren.training.objectives.token_scores import TokenScores, answer_places, token_scores
from blipren.training.stages.answer_trainer import AnswerTrainer
from blipren.training.stages.preference_setup import prepare_run

REFERENCE = "reference.safetensors"


class DpoTrainer(AnswerTrainer):
    """Trains on `PairBatches`, validates on `AllPairs` of the validation split. The loss is the mean over the pairs of a
    step, whatever the batching, accumulation or world size.

    Args:
        objective: TRL's loss.
        every_pair: all pairs of `train` and `validation`, whose reference is computed.
    """

    compared = ("chosen_likelier", "rewards/accuracies", "rewards/margins")

    def __init__(self, *, objective: PackedDPO, every_pair: dict[str, AllPairs], **keywords):
        super().__init__(**keywords)
        self.objective, self.every_pair = objective, every_pair
        self.reference: dict[str, list[torch.Tensor]] = {}
        """For `train` and `validation` a tensor `[samples, 2]` a cache: log-probabilities of chosen and rejected answers."""

    # ---- the reference --------------------------------------------------------------------------------------------

    def reference_log_probs(self, folder: Path) -> dict[str, list[torch.Tensor]]:
        """Return the log-probabilities of all pairs by the model before training, from the run's folder if it has them."""
        file = folder / REFERENCE
        if not file.is_file():
            tables = {
                f"{split}/{number}": table
                for split, pairs in self.every_pair.items()
                for number, table in enumerate(self.compute_reference(pairs))
            }
            if self.args.should_save:
                write_atomically(file, save(tables))
            self.accelerator.wait_for_everyone()
        tables = {name: table.to(self.args.device) for name, table in load_file(file).items()}
        return {
            split: [tables[f"{split}/{number}"] for number in range(len(pairs.data))]
            for split, pairs in self.every_pair.items()
        }

    @torch.no_grad()
    def compute_reference(self, every: AllPairs) -> list[torch.Tensor]:
        """Return a tensor `[samples, 2]` for each cache; the processes compute a part each."""
        tables = [torch.zeros(len(own.names), 2) for own in every.data]
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.model.eval()
        for item in range(rank, len(every), world):
            batch = self._prepare_inputs(every[item])
            with self.compute_loss_context_manager():
                scores, lengths, _ = self.score(self.model, batch)
                chosen, rejected = self.objective.reference(scores, lengths)
            for (cache, sample), *values in zip(batch["pairs"], chosen.tolist(), rejected.tolist()):
                tables[cache][sample] = torch.tensor(values)
        if world > 1:
            tables = [self.accelerator.reduce(table.to(self.args.device), "sum").cpu() for table in tables]
        return tables

    def reference_of(self, batch: dict, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the reference's log-probabilities of chosen and rejected answers of a batch, each `[pairs]`."""
        both = torch.stack([self.reference[split][cache][sample] for cache, sample in batch["pairs"]])
        return both[:, 0], both[:, 1]

    # ---- the step -------------------------------------------------------------------------------------------------

    def compute_loss(self, model, batch, return_outputs=False, num_items_in_batch=None):
        """One micro-batch: packed pairs in, this process's part of the step's loss out."""
        pairs_in_step, images_in_step = num_items_in_batch
        scores, lengths, outputs = self.score(model, batch)
        loss, metrics = self.objective.loss(scores, lengths, *self.reference_of(batch, "train"))
        pairs = float(len(batch["pairs"]))
        loss = loss * pairs / pairs_in_step
        if outputs.router_aux_loss is not None:
            loss = loss + outputs.router_aux_loss * len(batch["ids"]) / images_in_step
        if not self.window.nll:
            self.window.first_step = self.state.global_step
        self.window.add(batch, -scores.log_probs.detach().sum(), loss.detach(), outputs.router_probs)
        self.window.add_metrics(metrics, pairs)
        return loss * self.accelerator.num_processes  # DDP averages gradients over processes; the loss is a sum

    def score(self, model, batch: dict) -> tuple[TokenScores, torch.Tensor, object]:
        """Return scores and lengths of the answers of a batch, all chosen ones first, and the model's outputs."""
        inputs, attention_mask = self.plain(batch)
        outputs = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=attention_mask,
            logits_at=batch["predict_from"],
            use_cache=False,
            **inputs,
        )
        pairs, segment = len(batch["pairs"]), batch["segment_of"]
        answer = segment // 2 + pairs * (segment % 2)
        lengths = torch.bincount(answer, minlength=2 * pairs)
        scores = token_scores(outputs.logits, batch["targets"])
        return scores.rows(answer, answer_places(segment), (2 * pairs, int(lengths.max()))), lengths, outputs

    def count_step(self, batches: list[dict]) -> torch.Tensor:
        """Return [pairs, images] of this process's part of a step."""
        return torch.tensor([float(sum(len(b["pairs"]) for b in batches)), float(sum(len(b["ids"]) for b in batches))])

    # ---- log and validation ---------------------------------------------------------------------------------------

    def objective_values(self, counts: dict) -> dict[str, float]:
        return {name: value for name, value in counts["metrics"].items() if name != "num_tokens"}

    def log_line(self, values: dict[str, float]) -> str:
        step, steps = self.state.global_step, self.state.max_steps
        shown = ["objective", "rewards/accuracies", "rewards/margins"]
        return token_log_line(step, steps, values, shown, (steps - step) * self.seconds_per_step)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return loss and rewards of the validation pairs, and `chosen_likelier`, the share whose chosen answer the model
        finds likelier, without a reference; CIDEr where it chooses the model. The sample captions are logged."""
        every = self.every_pair["validation"]
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        was_training = self.model.training
        self.model.eval()
        names = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
        sums = torch.zeros(3 + len(names), dtype=torch.float64)
        for item in range(rank, len(every), world):
            batch = self._prepare_inputs(every[item])
            with self.compute_loss_context_manager():
                scores, lengths, _ = self.score(self.model, batch)
                loss, metrics = self.objective.loss(scores, lengths, *self.reference_of(batch, "validation"))
                chosen, rejected = self.objective.reference(scores, lengths)
            likelier = (chosen > rejected).float().mean()
            means = [1.0, loss.item(), likelier.item(), *(metrics[name] for name in names)]
            sums += torch.tensor(means, dtype=torch.float64) * len(batch["pairs"])
        self.model.train(was_training)
        if world > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum").cpu()
        pairs, *totals = sums.tolist()
        metrics = {
            "pairs": int(pairs),
            **dict(zip(("loss", "chosen_likelier", *names), (total / pairs for total in totals))),
        }
        if self.settings.keep_best == "CIDEr":
            metrics["CIDEr"] = self.validation.cider()
        self.validation.log_samples("during" if self.state.global_step else "before")
        return metrics

    # ---- begin and end --------------------------------------------------------------------------------------------

    def text_sources(self) -> list:
        return self.every_pair["validation"].data

    def begin(self, resumed: bool) -> None:
        self.reference = self.reference_log_probs(self.run_folder.path)
        self.try_step()
        if not resumed and "validation" in self.every_pair:
            self.log_text_loss()
            self.evaluate()
        self.clock.reset()  # the reference is no part of the steps


def build_trainer(settings: DpoSettings, run: RunFolder) -> DpoTrainer:
    """Return the trainer of a run."""
    caches = read_caches(settings.cache)

    def open_sources(model, processor):
        train, held_out = [], []
        for cache, weight in caches:
            cache.check_model(model, processor)
            own = (
                CachedSamples(cache, "train", model, processor, weight, pairs=True)
                if cache.num_samples("train")
                else []
            )
            if not len(own):
                raise UserError(
                    f"cache {cache.folder} has no preferences: embed a data set with the columns prompt, chosen, rejected"
                )
            train.append(own)
            if not held_out and cache.num_samples("validation"):
                pairs = CachedSamples(cache, "validation", model, processor, pairs=True)
                held_out = [pairs] if len(pairs) else []
        return train, held_out

    ready = prepare_run(settings, run, open_sources, best_is_greater=settings.keep_best == "CIDEr")
    config = DPOConfig(
        output_dir=str(run.path),
        use_cpu=ready.device.type == "cpu",
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        loss_weights=settings.loss_weights or None,
        **{
            name: getattr(settings, name)
            for name in (
                "loss_type", "beta", "label_smoothing", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef",
                "use_weighting", "discopop_tau",
            )
        },
    )  # fmt: skip
    every_pair = {"train": AllPairs(ready.sources, ready.prompts, ready.layout, settings.batch_size)}
    batches = None
    if ready.validation:
        every_pair["validation"] = AllPairs(ready.validation, ready.prompts, ready.layout, settings.batch_size)
        shown = open_split(ready.validation[0].cache, "validation", ready.model, ready.processor)
        batches = EvalBatches(shown, ready.prompts, ready.layout, settings.batch_size)
    return DpoTrainer(
        objective=PackedDPO(config, ready.model, ready.device),
        every_pair=every_pair,
        validation=batches,
        train_dataset=PairBatches(ready.sources, ready.prompts, ready.plan, ready.layout, ready.steps),
        **ready.keywords,
    )


def dpo(settings: DpoSettings) -> int:
    """Run `blipren dpo`. Returns the exit status."""
    return run_stage(settings, build_trainer)
