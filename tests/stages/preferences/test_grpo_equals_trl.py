"""Advantages, loss and gradients of packed completions equal those of TRL's GRPOTrainer, which takes pixels and a row a
completion."""

import json

import pytest
import torch
from datasets import Dataset
from PIL import Image
from trl import GRPOConfig, GRPOTrainer

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.commands.grpo import GrpoSettings
from blipren.training.engine.run_folder import RunFolder
from blipren.training.stages.grpo import build_trainer

GENERATIONS, TEMPERATURE, LONGEST = 3, 0.7, 9


def red_words(completions, **columns):
    """Count a letter, so that completions differ in reward."""
    texts = [(c if isinstance(c, str) else c[0]["content"]).strip() for c in completions]
    return [float(text.count("e") + len(text) / 7) for text in texts]


def short(completions, **columns):
    texts = [(c if isinstance(c, str) else c[0]["content"]).strip() for c in completions]
    return [1.0 / (1 + len(text)) for text in texts]


def nudge(model):
    """Move the connector away from where it began, so that the reference differs."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.model.projector.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss_type": "grpo", "beta": 0.1},
        {"loss_type": "bnpo", "scale_rewards": "batch", "mask_truncated_completions": True},
        {"loss_type": "dr_grpo", "scale_rewards": "none", "top_entropy_quantile": 0.5},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"loss_type": "cispo", "multi_objective_aggregation": "normalize_then_sum"},
        {"loss_type": "sapo"},
        {"shared_prefix": False},
    ],
    ids=lambda changes: " ".join(f"{k} {v}" for k, v in changes.items()) or "defaults",
)
def test_loss_and_gradients(policy_dir, policy_cache, dataset_dir, tmp_path, changes):
    settings = GrpoSettings(
        model=str(policy_dir),
        cache=str(policy_cache),
        out=str(tmp_path / "run"),
        rewards=[f"{__name__}:red_words", f"{__name__}:short"],
        reward_weights=[1.0, 0.5],
        batch_size=3,
        num_generations=GENERATIONS,
        temperature=TEMPERATURE,
        max_completion_length=LONGEST,
        device="cpu",
        **changes,
    )
    ours = build_trainer(settings, RunFolder(settings.out))
    nudge(ours.model)
    batch = ours.train_dataset[0]
    prompts = batch["prompts"]
    generator = torch.Generator().manual_seed(0)
    end = ours.processor.answer_end_id
    completions = []
    for number in range(len(prompts) * GENERATIONS):  # every third one does not end
        length = int(torch.randint(2, LONGEST, (1,), generator=generator))
        ids = torch.randint(100, 300, (length if number % 3 else LONGEST,), generator=generator).tolist()
        completions.append([*ids, end] if number % 3 else ids)
    ours.sample = lambda *_: completions
    counts = ours.count_step([batch])
    ours.sample_step([batch])
    ours.model.train()
    loss = ours.compute_loss(ours.model, batch, num_items_in_batch=counts)
    loss.backward()

    # ---- TRL, on pixels ----
    processor = BliprenProcessor.from_pretrained(policy_dir)
    files = {r["file_name"]: r for r in map(json.loads, (dataset_dir / "metadata.jsonl").read_text().splitlines())}
    rows = []
    for prompt in prompts:
        text = prompt.text if prompt.text is not None else processor.prompts[0]
        picture = Image.open(dataset_dir / prompt.image_id).convert("RGB")
        assert prompt.image_id in files
        message = {"role": "user", "content": text}
        rows += [{"prompt": [dict(message)], "image": picture} for _ in range(GENERATIONS)]
    tokens = []

    class GivenCompletions(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *arguments, **keywords):
            tokens.extend(prompt_ids)
            return completions, None

    names = {name: getattr(settings, name) for name in ("num_generations", "temperature", "max_completion_length")}
    theirs = GivenCompletions(
        model=BliprenForConditionalGeneration.from_pretrained(policy_dir),
        reward_funcs=[red_words, short],
        args=GRPOConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=len(rows),
            reward_weights=[1.0, 0.5],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            chat_template_kwargs={"padding": False},  # our processor pads, and TRL would take padding for tokens
            trust_remote_code=True,
            **names | {k: v for k, v in changes.items() if k != "shared_prefix"},
        ),
        train_dataset=Dataset.from_list([{"prompt": "unused"}]),
        processing_class=processor,
    )
    nudge(theirs.model)
    theirs.model.train()
    theirs.current_gradient_accumulation_steps = 1  # set by train()
    inputs = theirs._generate_and_score_completions(rows)
    assert tokens[::GENERATIONS] == [p.prefix + p.rest for p in prompts], "the prompts are the same tokens"
    torch.testing.assert_close(batch["completions"]["advantages"], inputs["advantages"], atol=1e-6, rtol=1e-6)
    assert inputs["advantages"].abs().max() > 0.1
    expected = theirs._compute_loss(theirs.model, inputs)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    gradients = {n: p.grad for n, p in theirs.model.named_parameters() if p.grad is not None}
    for name, parameter in ours.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3, msg=name)
