"""TRL's `SFTTrainer` on a checkpoint named by its path, plain and with LoRA; what it saves loads back to equal logits.
`GRPOTrainer` on a model with a memory: it samples from the model itself, and saves the memory."""

import pytest
import torch

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from tests.hub.tiny import picture, write_llm, write_model, write_vision
from tests.memory.tools import random_memory

trl = pytest.importorskip("trl", reason="TRL is an extra: pip install blipren[trl]")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    root = tmp_path_factory.mktemp("trl")
    return write_model(root / "full", write_vision(root / "vision"), write_llm(root / "llm", chat=True))


def conversations():
    from datasets import Dataset

    rows = [
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": f"a red ball {i}"}]}],
            "images": [picture(i)],
        }
        for i in range(4)
    ]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("tuning", ["connector", "lora"])
def test_sft_trainer_from_a_path(full, tuning, tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(
        r=2,
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        modules_to_save=["qformer", "projector"],
    )
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "run"),
        trust_remote_code=True,
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        max_length=None,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
    )
    trainer = trl.SFTTrainer(
        model=str(full),
        args=arguments,
        train_dataset=conversations(),
        processing_class=BliprenProcessor.from_pretrained(full),
        peft_config=lora if tuning == "lora" else None,
    )
    before = BliprenForConditionalGeneration.from_pretrained(full)
    result = trainer.train()
    assert result.training_loss > 0 and result.global_step == 2
    inputs = BliprenProcessor.from_pretrained(full)(images=picture(9), return_tensors="pt")
    trained = trainer.model.eval().float()
    with torch.no_grad():
        expected = trained(**inputs).logits
        assert (expected - before(**inputs).logits).abs().max() > 1e-3, "nothing was learned"
    trainer.save_model(str(tmp_path / "saved"))
    if tuning == "lora":
        from peft import PeftModel

        base = BliprenForConditionalGeneration.from_pretrained(full).float()
        again = PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    else:
        again = BliprenForConditionalGeneration.from_pretrained(tmp_path / "saved").float()
    with torch.no_grad():
        found = again(**inputs).logits
    assert torch.allclose(found, expected, atol=1e-5)
    # the frozen towers are what they were, bit for bit
    frozen = {n: p for n, p in before.named_parameters() if ".vision_tower." in n or ".language_model." in n}
    inner = trained.get_base_model() if tuning == "lora" else trained
    same = {n.replace(".base_layer.", "."): p for n, p in inner.named_parameters()}
    assert frozen and all(torch.equal(p.float(), same[n].float()) for n, p in frozen.items())


def test_grpo_trainer_samples_from_a_model_with_a_memory_and_saves_it(full, tmp_path):
    from datasets import Dataset

    model, processor = BliprenForConditionalGeneration.from_pretrained(full), BliprenProcessor.from_pretrained(full)
    model.memory = random_memory(model, processor, seed=0)
    rows = [{"prompt": [{"role": "user", "content": processor.prompts[0]}], "image": picture(i)} for i in range(2)]
    sampled = []

    def length(completions, **columns):
        sampled.extend(completions)
        return [float(len(completion[0]["content"])) for completion in completions]

    def trainer(name: str):
        return trl.GRPOTrainer(
            model=model,
            reward_funcs=length,
            args=trl.GRPOConfig(
                output_dir=str(tmp_path / name),
                max_steps=1,
                per_device_train_batch_size=4,
                num_generations=2,
                max_completion_length=8,
                learning_rate=0.0,
                seed=3,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
                chat_template_kwargs={"padding": False},
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=processor,
        )

    remembering = trainer("with")
    assert remembering.train().global_step == 1
    found, sampled[:] = list(sampled), []
    remembering.save_model(str(tmp_path / "saved"))
    assert len(BliprenForConditionalGeneration.from_pretrained(tmp_path / "saved").memory) == 12
    model.memory = None
    trainer("without").train()
    assert sampled == found and len(found) == 4
