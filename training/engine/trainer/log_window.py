"""Sums between two log lines of a stage that trains through the language model, and the line itself."""

import math

import torch

from blipren.training.engine.trainer.callbacks import clock_text


class LogWindow:
    """Sums since the last log line. What lies on the device is read once a line."""

    def __init__(self):
        self.first_step = 0
        self._clear()

    def _clear(self) -> None:
        self.nll: list[torch.Tensor] = []
        self.loss: list[torch.Tensor] = []
        self.experts: list[torch.Tensor] = []
        self.metrics: dict[str, list[float]] = {}  # sum and weight
        self.counts = dict.fromkeys(("targets", "images", "tokens", "positions"), 0)

    def add(self, batch: dict, nll: torch.Tensor, loss: torch.Tensor, router_probs: torch.Tensor | None) -> None:
        """Add a micro-batch: its summed negative log-likelihood, its part of the step's loss, the router's shares."""
        used = batch["block_ids"] >= 0 if "block_ids" in batch else batch["attention_mask"] > 0
        self.nll.append(nll)
        self.loss.append(loss)
        if router_probs is not None:
            self.experts.append(router_probs.detach().float().sum(dim=0))
        self.counts["targets"] += len(batch["targets"])
        self.counts["images"] += len(batch["ids"])
        self.counts["tokens"] += used.sum()
        self.counts["positions"] += used.numel()

    def add_metrics(self, metrics: dict[str, float], weight: float) -> None:
        """Add means that are averaged by weight. The names are the same on all processes; nan is left out."""
        for name, value in metrics.items():
            own = self.metrics.setdefault(name, [0.0, 0.0])
            if not math.isnan(value):
                own[0] += value * weight
                own[1] += weight

    def drain(self, accelerator) -> dict:
        """Return the sums over all processes since the last call; `experts` are shares of the routing weight, `metrics`
        means."""
        names = list(self.counts)
        values = [float(self.counts[n]) for n in names]
        values += [torch.stack(self.nll).sum().item(), torch.stack(self.loss).sum().item()]
        values += [part for name in sorted(self.metrics) for part in self.metrics[name]]
        values += torch.stack(self.experts).sum(dim=0).tolist() if self.experts else []
        sums = torch.tensor(values, dtype=torch.float32, device=accelerator.device)
        sums = (accelerator.reduce(sums, "sum") if accelerator.num_processes > 1 else sums).tolist()
        found, position = dict(zip([*names, "nll", "loss"], sums)), len(names) + 2
        found["metrics"] = {}
        for name in sorted(self.metrics):
            total, weight = sums[position : position + 2]
            position += 2
            if weight:
                found["metrics"][name] = total / weight
        self._clear()
        loads = sums[position:]
        return found | {"experts": [load / sum(loads) for load in loads]}


def token_log_line(step: int, steps: int, values: dict, shown: list[str], seconds_left: float) -> str:
    """Return the log line of a step.

    Args:
        values: what log.jsonl gets.
        shown: names of the losses and rewards among them that this run trains.
    """
    losses = "  ".join(f"{name} {values[name]:.4f}" for name in shown if name in values)
    speed = f"{values['tokens_per_second']:,.0f} tokens/s  {values['images_per_second']:.1f} images/s"
    if "mfu" in values:
        speed += f"  MFU {values['mfu']:.1%}"
    elif "tflops" in values:
        speed += f"  {values['tflops']:.3f} TFLOP/s"
    experts = [values[name] for name in sorted(values) if name.startswith("expert_")]
    load = "  experts " + "/".join(f"{share:.2f}" for share in experts) if experts else ""
    return (
        f"step {step}/{steps}  {losses}  lr {values['learning_rate']:.2e}  norm {values['grad_norm']:.2f}  "
        f"{speed}{load}  left {clock_text(seconds_left)}"
    )
