"""TRL's DPOTrainer and GRPOTrainer for packed rows: their losses run as they are, and this file says what is overridden.

Neither class's `__init__` is run. Both want a `datasets.Dataset` of pixels and make data loaders, a second model as the
reference, and a forward that takes one row an answer; DPOTrainer refuses reference log-probabilities that are computed
before training where there are images. Batches, checkpoints, resume and log are those of `StageTrainer`. So what a loss
reads of the trainer is set here, and the model's part of it, the scores of each answer token, comes from packed rows.
"""

from collections import defaultdict, deque
from contextlib import nullcontext

import torch
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from blipren.training.objectives.token_scores import TokenScores


class OneProcess:
    """Stands for accelerate's `Accelerator` of a run of one process.

    TRL gathers metrics and rewards from all processes, and expects the same number of rows of each. Here the number
    differs. Metrics are summed at the log line, and every process gets all rewards before the advantages.
    """

    process_index, num_processes, is_main_process, sync_gradients = 0, 1, True, True

    def __init__(self, device: torch.device):
        self.device = device

    def gather(self, tensor):
        return tensor

    gather_for_metrics = gather

    def reduce(self, tensor, reduction: str = "sum"):
        return tensor

    def pad_across_processes(self, tensor, **keywords):
        return tensor

    def autocast(self):
        return nullcontext()


def drain_metrics(trainer: DPOTrainer | GRPOTrainer) -> dict[str, float]:
    """Return the metrics of the last call of a loss by TRL's names."""
    found = {}
    for own in trainer._metrics.values():
        found |= {name: values[-1] for name, values in own.items()}
        own.clear()
    return found


class PackedDPO(DPOTrainer):
    """DPO's loss on the scores of packed rows.

    Args:
        config: TRL's settings.
        model: its `training` says which metrics are written.
    """

    def __init__(self, config: DPOConfig, model, device: torch.device):
        self.args, self.model, self.ref_model, self.accelerator = config, model, None, OneProcess(device)
        for name in (
            "beta",
            "ld_alpha",
            "f_divergence_type",
            "f_alpha_divergence_coef",
            "label_smoothing",
            "use_weighting",
        ):
            setattr(self, name, getattr(config, name))
        self.loss_types, self.loss_weights = config.loss_type, config.loss_weights or [1.0] * len(config.loss_type)
        self.precompute_ref_logps, self.aux_loss_enabled = True, False
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._total_train_tokens, self._tp_size = 0, 1

    @staticmethod
    def rows(lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the padded rows that TRL reads lengths from: a token for the prompt, and the tokens of the answer.

        Args:
            lengths: `[2 * pairs]`, tokens of the chosen answers, then of the rejected ones.
        """
        place = torch.arange(int(lengths.max()) + 1, device=lengths.device)
        mask = (place[None] <= lengths[:, None]).long()
        return {"input_ids": torch.zeros_like(mask), "attention_mask": mask, "completion_mask": mask * (place > 0)}

    def reference(self, scores: TokenScores, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probabilities of chosen and rejected answers, each `[pairs]`, as the loss takes the reference's."""
        return self.compute_ref_log_probs(lambda **_: scores, self.rows(lengths))

    def loss(
        self, scores: TokenScores, lengths: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the mean loss of some pairs, and TRL's metrics.

        Args:
            scores: `[2 * pairs, longest]`, chosen answers first.
            lengths: `[2 * pairs]`, tokens of each.
            chosen, rejected: `[pairs]`, log-probabilities of the reference.
        """
        inputs = {**self.rows(lengths), "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        return self._compute_loss(lambda **_: scores, inputs, return_outputs=False), drain_metrics(self)


class PackedGRPO(GRPOTrainer):
    """GRPO's advantages and loss on given completions and the scores of packed rows.

    A step generates once and updates once, which is TRL's default (`num_iterations` 1, `steps_per_generation` the
    accumulation).
    """

    def __init__(self, config: GRPOConfig, model, device: torch.device, rewards: list[str], pad: int, ends: set[int]):
        self.args, self.model, self.ref_model, self.accelerator = config, model, None, OneProcess(device)
        for name in (
            "beta", "num_generations", "max_completion_length", "temperature", "loss_type", "scale_rewards",
            "importance_sampling_level", "multi_objective_aggregation", "mask_truncated_completions",
            "top_entropy_quantile", "off_policy_mask_threshold", "num_iterations", "use_vllm",
        ):  # fmt: skip
            setattr(self, name, getattr(config, name))
        self.num_generations_eval = config.num_generations
        self.epsilon_low = config.epsilon
        self.epsilon_high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        self.reward_funcs = self.reward_func_names = rewards
        self.reward_weights = torch.tensor(config.reward_weights or [1.0] * len(rewards), dtype=torch.float32)
        self.current_gradient_accumulation_steps = 1  # the parts of a step are weighed by `part_of_step`
        self.aux_loss_enabled = self._entropy_bonus_enabled = self.log_multimodal = False
        self.environment_factories = self.environments = self.tools = self.pad_to_multiple_of = None
        self.vllm_importance_sampling_correction = False
        self.eos_token_ids, self._tokenizer = sorted(ends), PadToken(pad)
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._logs = {name: deque(maxlen=1) for name in ("images", "prompt", "completion", "advantages")}
        self._logs |= {name: defaultdict(lambda: deque(maxlen=1)) for name in ("rewards", "extra")}
        self._pending_extra_logs, self._pending_metrics = defaultdict(list), defaultdict(list)
        self._given: tuple[list[list[int]], torch.Tensor] | None = None
        self._scores: TokenScores | None = None

    # ---- overridden -----------------------------------------------------------------------------------------------

    def _generate(self, prompts: list):
        # TRL generates from pixels, one row a sample with its own image prefix. The completions are there already.
        completions, _ = self._given
        return [[0]] * len(completions), completions, None, prompts, None, {}, None, []

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        # TRL gathers the same number of rewards from each process. They are there already, of all processes.
        return self._given[1]

    def _get_per_token_logps_and_entropies(self, model, *arguments, **keywords):
        # TRL runs one padded row a completion. The scores come from packed rows.
        return self._scores.log_probs, self._scores.entropy, None

    # ---- called ---------------------------------------------------------------------------------------------------

    def advantages(self, completions: list[list[int]], rewards: torch.Tensor) -> tuple[dict, dict[str, float]]:
        """Return TRL's inputs of the loss for all completions of a step, and its metrics.

        Args:
            completions: token ids of every completion, those of a prompt together.
            rewards: `[completions, rewards]`, nan where a reward does not apply.

        Returns:
            `completion_ids`, `completion_mask` `[completions, longest]`, `advantages` `[completions]`,
            `num_items_in_batch` among them.
        """
        self._given, beta, self.beta = (completions, rewards.to(self.accelerator.device)), self.beta, 0.0
        try:  # without beta: the reference's scores come from packed rows, too, one micro-batch at a time
            inputs = self._generate_and_score_completions([{"prompt": ""}] * len(completions))
        finally:
            self.beta = beta
        return inputs, drain_metrics(self)

    def loss(self, scores: TokenScores, inputs: dict) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss of some completions, and TRL's metrics.

        Args:
            scores: `[completions, longest]`.
            inputs: rows of what `advantages` returned, and `ref_per_token_logps` where beta is above 0.
        """
        self._scores = scores
        return self._compute_loss(self.model, inputs), drain_metrics(self)

    def part_of_step(self, inputs: dict, completions: int) -> float:
        """Return the factor that makes the loss of some completions their part of the step's loss.

        TRL divides by the completions or the tokens of a micro-batch, or by the tokens of the whole step.

        Args:
            inputs: of the loss.
            completions: their number in the whole step, over all processes.
        """
        if self.loss_type in ("dapo", "cispo", "vespo"):
            return 1.0
        if self.loss_type == "bnpo":
            return float(inputs["completion_mask"].sum() / inputs["num_items_in_batch"].clamp(min=1))
        return len(inputs["completion_ids"]) / completions


class PadToken:
    """What `GRPOTrainer` reads of a tokenizer."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id
