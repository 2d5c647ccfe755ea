"""Loss, rewards and gradients of packed pairs equal those of TRL's DPOTrainer, which takes pixels and a row an answer."""

import pytest
import torch
from datasets import Dataset
from PIL import Image
from trl import DPOConfig, DPOTrainer

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.commands.dpo import LOSSES, DpoSettings
from blipren.training.engine.run_folder import RunFolder
from blipren.training.stages.dpo import build_trainer
from tests.stages.preferences.test_grpo_equals_trl import nudge

CASES = [
    {},
    {"loss_type": ["robust", "sft"], "loss_weights": [1.0, 0.5], "label_smoothing": 0.1},
    {"ld_alpha": 0.5},
    {"use_weighting": True, "f_divergence_type": "js_divergence"},
    {"shared_prefix": False},
]
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "entropy")


def their_rows(processor, pair_dir, rows: list[dict]) -> list[dict]:
    """Pairs in TRL's form, as texts: its chat form puts what a template has behind an end token into the answer, too."""
    found = []
    for row in rows:
        answers = {name: row[name] + processor.answer_end for name in ("chosen", "rejected")}
        image = Image.open(pair_dir / row["file_name"]).convert("RGB")
        found.append({"prompt": processor.prompt_text(row["prompt"]), **answers, "image": image})
    return found


@pytest.fixture
def both(policy_dir, pair_cache, pair_dir, pair_rows, tmp_path):
    """Function from settings to our trainer with a batch, and TRL's with the same pairs; neither is where it began."""

    def build(**changes):
        out = tmp_path / "run"
        settings = DpoSettings(
            model=str(policy_dir), cache=str(pair_cache), out=str(out), batch_size=3, device="cpu", **changes
        )
        ours = build_trainer(settings, RunFolder(settings.out))
        ours.reference = ours.reference_log_probs(out)
        batch = ours.train_dataset[0]
        processor = BliprenProcessor.from_pretrained(policy_dir)
        names = [ours.train_dataset.data[0].names[sample] for _, sample in batch["pairs"]]
        rows = their_rows(processor, pair_dir, [pair_rows[name] for name in names])
        theirs = DPOTrainer(
            model=BliprenForConditionalGeneration.from_pretrained(policy_dir),
            ref_model=BliprenForConditionalGeneration.from_pretrained(policy_dir),
            args=DPOConfig(
                output_dir=str(tmp_path / "trl"),
                max_length=None,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                trust_remote_code=True,
                **{k: v for k, v in changes.items() if k != "shared_prefix"},
            ),
            train_dataset=Dataset.from_list(rows[:1]),
            processing_class=processor,
        )
        for trainer in (ours, theirs):
            nudge(trainer.model)
            trainer.model.train()
        return ours, batch, theirs, theirs._prepare_inputs(theirs.data_collator(rows))

    return build


def losses(ours, batch, theirs, inputs):
    """The two losses, after a check of the rewards."""
    loss = ours.compute_loss(ours.model, batch, num_items_in_batch=ours.count_step([batch]))
    expected = theirs._compute_loss(theirs.model, inputs, return_outputs=False)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    metrics = ours.window.drain(ours.accelerator)["metrics"]
    for name in METRICS:
        assert metrics[name] == pytest.approx(theirs._metrics["train"][name][-1], rel=1e-3, abs=1e-5), name
    return loss, expected


@pytest.mark.parametrize("changes", CASES, ids=lambda changes: " ".join(changes) or "defaults")
def test_loss_rewards_and_gradients(both, changes):
    ours, batch, theirs, inputs = both(**changes)
    loss, expected = losses(ours, batch, theirs, inputs)
    loss.backward()
    expected.backward()
    gradients = {n: p.grad for n, p in theirs.model.named_parameters() if p.grad is not None}
    for name, parameter in ours.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3, msg=name)


def test_every_loss_type(both):
    ours, batch, theirs, inputs = both(label_smoothing=1e-3)
    for name in LOSSES:
        ours.objective.loss_types = theirs.loss_types = [name]
        losses(ours, batch, theirs, inputs)
