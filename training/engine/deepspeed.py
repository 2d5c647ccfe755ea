"""DeepSpeed ZeRO, stages 1 and 2: gradients and optimizer state sharded over processes; weights and checkpoints whole.

DeepSpeed's engine shards and steps our AdamW. Its own checkpoints are not used: the state is gathered into the same
`optimizer.pt` that every other run writes, so that a run may resume on other numbers of processes, or without DeepSpeed.
"""

import json
import os
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import is_deepspeed_available

from blipren.training.errors import UserError

OURS = {
    "optimizer": "--learning-rate", "scheduler": "--schedule", "bf16": "--precision", "fp16": "--precision",
    "gradient_clipping": "--clip", "gradient_accumulation_steps": "--micro-batches",
    "train_batch_size": "--batch-size", "train_micro_batch_size_per_gpu": "--batch-size",
}  # fmt: skip
FILLED = {  # "auto" is what the Trainer fills in from its own arguments
    "gradient_clipping": "auto", "gradient_accumulation_steps": "auto", "train_micro_batch_size_per_gpu": "auto",
    "zero_force_ds_cpu_optimizer": False,  # else accelerate replaces our AdamW where its state is offloaded
}  # fmt: skip


def refuse_foreign_launch() -> None:
    """Raise `UserError` where accelerate or DeepSpeed launched the process with a DeepSpeed setup of its own."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UserError(
            "launch without DeepSpeed; `blipren train` takes --deepspeed CONFIG (docs/how-to/several-gpus.md)"
        )


def read_config(path: str | None, device: str) -> dict | None:
    """Return the DeepSpeed configuration of a run, or None where it has none.

    Raises:
        UserError: it has values that settings of the run decide, or cannot be used.
    """
    if path is None:
        return None
    if "RANK" not in os.environ:
        raise UserError(
            "deepspeed needs torchrun: torchrun --standalone --nproc-per-node=1 -m blipren.training.cli train ..."
        )
    if device == "cpu" and torch.cuda.is_available():
        raise UserError("deepspeed runs on the GPUs that are there: leave --device cpu out, or hide them")
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"deepspeed: {path} cannot be read: {error}") from error
    if said := sorted(key for key in set(config) & set(OURS) if config[key] != "auto"):
        raise UserError(f"deepspeed: {path} has {said[0]!r}, which {OURS[said[0]]} decides: take it out")
    stage = config.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2):
        raise UserError(
            f"deepspeed: {path} has zero_optimization.stage {stage}; it must be 1 or 2 (--fsdp shards as stage 3 does)"
        )
    if not is_deepspeed_available():
        raise UserError("deepspeed is not installed: pip install deepspeed")
    return config | FILLED


def start(device: str) -> dict:
    """Join the processes. Returns the `TrainingArguments` by which the Trainer takes them as joined.

    On GPUs accelerate would do it; on CPUs the backend has to be named.
    """
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo" if device == "cpu" else None)
    return {"accelerator_config": {"use_configured_state": True}}


def link(zero) -> None:
    """Make DeepSpeed find the state of every parameter: it looks only once, after the first group's first step."""
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()


def optimizer_state(engine) -> dict:
    """Return the optimizer's state as torch's AdamW has it without DeepSpeed; every process must call it."""
    from deepspeed.utils import safe_get_full_optimizer_state

    zero = engine.optimizer
    link(zero)
    state, groups = {}, []
    for flat, parameters, group in zip(
        zero.single_partition_of_fp32_groups, zero.bit16_groups, zero.optimizer.param_groups
    ):
        indices = range(len(state), len(state) + len(parameters))
        for index, parameter in zip(indices, parameters):
            moments = {key: safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
            step = zero.optimizer.state[flat]["step"].clone()  # one each, as without DeepSpeed: AdamW counts in place
            state[index] = {"step": step} | {name: moment.cpu() for name, moment in moments.items()}
        groups.append({k: v for k, v in group.items() if k != "params"} | {"params": list(indices)})
    return {"state": state, "param_groups": groups}


def load_optimizer_state(engine, saved: dict) -> None:
    """Load what `optimizer_state` returns, or what a run without DeepSpeed wrote."""
    from deepspeed.utils import safe_set_full_optimizer_state

    zero = engine.optimizer
    for flat, group in zip(zero.single_partition_of_fp32_groups, saved["param_groups"]):
        step = saved["state"][group["params"][0]]["step"].clone()
        zero.optimizer.state[flat] = {
            "step": step,
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
    link(zero)
    indices = iter(saved["state"])
    for parameters, group, theirs in zip(zero.bit16_groups, zero.optimizer.param_groups, saved["param_groups"]):
        for parameter in parameters:
            values = saved["state"][next(indices)]
            for key in ("exp_avg", "exp_avg_sq"):
                safe_set_full_optimizer_state(parameter, values[key].to(parameter.device), key)
        group.update({k: v for k, v in theirs.items() if k != "params"})
