"""Speed of `blipren dpo` and `blipren grpo` against TRL's DPOTrainer and GRPOTrainer on the same rows.

    python benchmarks/preferences.py --out preferences.json       # SigLIP-B/16, 12-layer Q-Former, 135M Llama shape
    python benchmarks/preferences.py --shape tiny --steps 2       # seconds, to try the script

DPO: five pairs an image. GRPO: eight completions of each image's prompt, generation included; with random weights no
completion ends before `--completion-tokens`. Ours reads cached features; TRL reads the photos, as it takes them. Weights,
rows and what is trained (the connector) are equal, and so is DPO's loss of the first step. TRL computes DPO's reference in
every step; ours computes it once before training: `with_reference` adds all of it to the steps of one epoch. Beside the
ratio of the times stands the ratio of the floating point operations, which is what the arithmetic allows.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import trl
from chat import WORDS, first_loss, make_checkpoint, ratios_of
from datasets import Dataset
from datasets import Image as ImageFeature
from parts.measure import print_report
from parts.train_arms import SHAPES
from parts.turns import train_in_turns
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.commands.dpo import DpoSettings
from blipren.training.commands.embed import EmbedSettings
from blipren.training.commands.embed import run as embed
from blipren.training.commands.grpo import GrpoSettings
from blipren.training.engine.memory import keep_freed_memory
from blipren.training.engine.run_folder import RunFolder
from blipren.training.stages import dpo, grpo

SAMPLES = 8


def length_reward(completions, **columns):
    """Return a reward that differs between completions."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(len(text)) for text in texts]


def write_rows(folder: Path, images: int, pairs: int) -> list[dict]:
    """Write photos and preferences about them. Answers have 6 to 24 words, 13 in the mean."""
    random, rows = np.random.default_rng(0), []
    folder.mkdir(parents=True)

    def words(count: int) -> str:
        return " ".join(random.choice(WORDS, count))

    for number in range(images):
        coarse = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((640, 480), 3)
        coarse.save(folder / f"{number}.jpg", quality=90)
        for _ in range(pairs):
            answers = {k: words(int(np.clip(random.gamma(9, 1.45), 6, 24))) for k in ("chosen", "rejected")}
            rows.append({"image": f"{number}.jpg", "split": "train", "prompt": f"What {words(5)}?", **answers})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def flops_of(step) -> float:
    """Return the floating point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def embed_rows(checkpoint: Path, rows: Path, cache: Path) -> Path:
    embed(EmbedSettings(
        model=str(checkpoint), dataset=str(rows), cache=str(cache), workers=0, dtype="float32", near_duplicates="keep",
    ))  # fmt: skip
    return cache


def common(checkpoint: Path, cache: Path, out: Path, options) -> dict:
    """Return the settings that both stages share."""
    return dict(
        model=str(checkpoint), cache=str(cache), out=str(out), batch_size=options.images, workers=0, warmup=0.0,
        max_steps=options.steps + 1, learning_rate=1e-9, keep_best="last", generate_samples=0, log_every=1,
        device=options.device,
    )  # fmt: skip


def their_arguments(folder: Path, options, rows: int) -> dict:
    """Return the arguments that both of TRL's trainers share."""
    return dict(
        output_dir=str(folder / "trl"), per_device_train_batch_size=rows, max_steps=options.steps + 1, bf16=False,
        learning_rate=1e-9, lr_scheduler_type="constant", report_to="none", save_strategy="no", logging_steps=1,
        gradient_checkpointing=False, use_cpu=options.device == "cpu", weight_decay=0.0,
    )  # fmt: skip


def load(checkpoint: Path) -> BliprenForConditionalGeneration:
    model = BliprenForConditionalGeneration.from_pretrained(checkpoint)
    model.freeze()
    return model


def our_dpo(checkpoint: Path, folder: Path, options) -> tuple[Trainer, float, dict]:
    """Return the trainer of `blipren dpo`, the operations of a step, and what its reference took."""
    cache = embed_rows(checkpoint, folder / "rows.jsonl", folder / "cache")
    settings = DpoSettings(**common(checkpoint, cache, folder / "run", options))
    trainer = dpo.build_trainer(settings, RunFolder(settings.out))
    began, wall = time.process_time(), time.perf_counter()
    trainer.reference = trainer.reference_log_probs(folder / "run")
    reference = {"cpu_seconds": time.process_time() - began, "wall_seconds": time.perf_counter() - wall}
    batch = trainer._prepare_inputs(trainer.train_dataset[0])
    trainer.model.train()
    counts = trainer.count_step([batch])
    step = flops_of(lambda: trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts).backward())
    reference["flops"] = flops_of(lambda: trainer.compute_reference(trainer.every_pair["train"]))
    trainer.model.zero_grad()
    trainer.window = type(trainer.window)()
    return trainer, step, reference


def their_dpo(checkpoint: Path, folder: Path, rows: list[dict], options) -> tuple[Trainer, float]:
    """Return TRL's DPOTrainer on the photos and the operations of a step."""
    processor = BliprenProcessor.from_pretrained(checkpoint)
    answers = ({k: row[k] + processor.answer_end for k in ("chosen", "rejected")} for row in rows)
    data = Dataset.from_list([
        {"prompt": processor.prompt_text(row["prompt"]), **own, "image": str(folder / row["image"])}
        for row, own in zip(rows, answers)
    ]).cast_column("image", ImageFeature())  # fmt: skip
    trainer = trl.DPOTrainer(
        model=load(checkpoint),
        ref_model=load(checkpoint),
        args=trl.DPOConfig(**their_arguments(folder, options, len(rows)), max_length=None),
        train_dataset=data,
        processing_class=processor,
    )
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    flops = flops_of(lambda: trainer.compute_loss(trainer.model, batch).backward())
    trainer.model.zero_grad()
    return trainer, flops


def our_grpo(checkpoint: Path, folder: Path, options) -> tuple[Trainer, float]:
    """Return the trainer of `blipren grpo` on one prompt an image and the operations of a step."""
    lines = [{"image": f"{n}.jpg", "split": "train", "caption": "a red circle"} for n in range(options.images)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cache = embed_rows(checkpoint, folder / "captions.jsonl", folder / "caption-cache")
    settings = GrpoSettings(
        **common(checkpoint, cache, folder / "grpo", options), rewards=["preferences:length_reward"],
        num_generations=SAMPLES, max_completion_length=options.completion_tokens,
    )  # fmt: skip
    trainer = grpo.build_trainer(settings, RunFolder(settings.out))
    batch = trainer._prepare_inputs(trainer.train_dataset[0])
    counts = trainer.count_step([batch])

    def step():
        trainer.sample_step([batch])
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts).backward()

    flops = flops_of(step)
    trainer.model.zero_grad()
    trainer.window = type(trainer.window)()
    return trainer, flops


def their_grpo(checkpoint: Path, folder: Path, options) -> tuple[Trainer, float]:
    """Return TRL's GRPOTrainer on the photos and the operations of a step."""
    processor = BliprenProcessor.from_pretrained(checkpoint)
    turn = [{"role": "user", "content": processor.prompts[0]}]
    rows = [{"prompt": turn, "image": str(folder / f"{n}.jpg")} for n in range(options.images)]
    trainer = trl.GRPOTrainer(
        model=load(checkpoint),
        reward_funcs=length_reward,
        args=trl.GRPOConfig(
            **their_arguments(folder, options, SAMPLES * options.images),
            num_generations=SAMPLES,
            max_completion_length=options.completion_tokens,
            chat_template_kwargs={"padding": False},
        ),
        train_dataset=Dataset.from_list(rows).cast_column("image", ImageFeature()),
        processing_class=processor,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))
    flops = flops_of(lambda: trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).backward())
    trainer.model.zero_grad()
    trainer._step, trainer._buffered_inputs = 0, None
    return trainer, flops


def compare_dpo(checkpoint: Path, folder: Path, rows: list[dict], options) -> dict:
    """Train both with DPO in turns. Returns both arms and the ratios, without and with our reference."""
    (theirs, their_flops), (ours, our_flops, reference) = (
        their_dpo(checkpoint, folder, rows, options),
        our_dpo(checkpoint, folder, options),
    )
    their_clock, our_clock = train_in_turns(theirs, ours)
    trl_arm = {**their_clock.seconds(), "flops": their_flops, "loss": theirs.state.log_history[0]["loss"]}
    our_arm = {**our_clock.seconds(), "flops": our_flops, "loss": first_loss(folder, "objective")}
    if abs(trl_arm["loss"] - our_arm["loss"]) > 1e-3:
        raise SystemExit(f"the losses of dpo differ: {trl_arm}, {our_arm}")
    whole = {name: our_arm[name] + reference[name] for name in reference}
    return {
        "trl": trl_arm,
        "blipren": our_arm | {"reference": reference},
        "ratios": ratios_of(trl_arm, our_arm),
        "with_reference": ratios_of(trl_arm, whole),
    }


def compare_grpo(checkpoint: Path, folder: Path, options) -> dict:
    """Train both with GRPO in turns. Returns both arms and the ratios."""
    (theirs, their_flops), (ours, our_flops) = (
        their_grpo(checkpoint, folder, options),
        our_grpo(checkpoint, folder, options),
    )
    their_clock, our_clock = train_in_turns(theirs, ours)
    trl_arm = {**their_clock.seconds(), "flops": their_flops}
    our_arm = {**our_clock.seconds(), "flops": our_flops}
    return {"trl": trl_arm, "blipren": our_arm, "ratios": ratios_of(trl_arm, our_arm)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="b16-135m")
    parser.add_argument("--images", type=int, default=4, help="images of a step")
    parser.add_argument("--pairs", type=int, default=5, help="pairs an image")
    parser.add_argument("--completion-tokens", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2, help="steps that are timed, behind one that is not")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    report: dict = {"settings": {name: value for name, value in vars(options).items() if name != "out"}}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "rows"
        checkpoint = make_checkpoint(options.shape, Path(place) / "model")
        rows = write_rows(folder, options.images, options.pairs)
        report["dpo"] = compare_dpo(checkpoint, folder, rows, options)
        report["grpo"] = compare_grpo(checkpoint, folder, options)
    print_report(report, options.out)


if __name__ == "__main__":
    main()
