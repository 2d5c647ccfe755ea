"""Speed of `blipren train` on conversations against TRL's SFTTrainer on the same rows.

    python benchmarks/chat.py --out chat.json                # SigLIP-B/16, 12-layer Q-Former, 135M Llama shape
    python benchmarks/chat.py --shape tiny --steps 2         # seconds, to try the script

Two data sets: `questions`, five of them an image, each a conversation of its own; `turns`, one conversation of five turns an
image. Ours reads cached features; TRL reads the photos, as it takes them. The two take turns, a step each. Weights, rows, optimizer and what is trained (the
connector) are equal, and so is the loss of the first step. Beside the ratio of the times stands the ratio of the floating
point operations of a step, which is what the arithmetic allows.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import trl
from datasets import Dataset, List
from datasets import Image as ImageFeature
from parts.measure import print_report
from parts.train_arms import SHAPES
from parts.turns import train_in_turns
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    Trainer,
)

from blipren import BliprenConfig, BliprenForConditionalGeneration, BliprenProcessor
from blipren.configuration_blipren import BliprenQFormerConfig
from blipren.prompts_blipren import build_chat_template
from blipren.training.commands.embed import EmbedSettings
from blipren.training.commands.embed import run as embed
from blipren.training.commands.train import TrainSettings
from blipren.training.engine.memory import keep_freed_memory
from blipren.training.engine.run_folder import RunFolder
from blipren.training.quickstart.steps import TOWERS
from blipren.training.stages.train import build_trainer

WORDS = "a red circle is above the large blue square on left and small green star below it".split()


def make_checkpoint(shape: str, folder: Path) -> Path:
    """Write a full checkpoint with random weights and no dropout."""
    vision, qformer, llm, queries = SHAPES[shape]
    tokenizer = AutoTokenizer.from_pretrained(TOWERS / "llm")
    image_token = "<image>"
    torch.manual_seed(0)
    model = BliprenForConditionalGeneration(
        BliprenConfig(
            vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
            text_config=LlamaConfig(
                **llm | {"vocab_size": max(llm["vocab_size"], len(tokenizer))},
                max_position_embeddings=2048,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            ),
            qformer_config=BliprenQFormerConfig(
                **qformer,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                encoder_hidden_size=vision["hidden_size"],
                num_query_tokens=queries,
            ),
            projector="linear",
            image_token_id=tokenizer.convert_tokens_to_ids(image_token),
        )
    )
    side = {"height": vision["image_size"], "width": vision["image_size"]}
    processor = BliprenProcessor(
        SiglipImageProcessorPil(size=side),
        tokenizer,
        chat_template=build_chat_template(None, image_token),
        image_token=image_token,
        num_visual_tokens=queries,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_rows(folder: Path, images: int, turns: int, kind: str) -> list[dict]:
    """Write photos and conversations about them. Answers have 6 to 24 words, 13 in the mean."""
    random, rows = np.random.default_rng(0), []
    folder.mkdir(parents=True)
    for number in range(images):
        coarse = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((640, 480), 3)
        coarse.save(folder / f"{number}.jpg", quality=90)
        messages = []
        for _ in range(turns):
            words = random.choice(WORDS, int(np.clip(random.gamma(9, 1.45), 6, 24)))
            messages.append({"role": "user", "content": "What " + " ".join(random.choice(WORDS, 5)) + "?"})
            messages.append({"role": "assistant", "content": " ".join(words)})
        parts = [messages] if kind == "turns" else [messages[k : k + 2] for k in range(0, 2 * turns, 2)]
        rows += [{"image": f"{number}.jpg", "messages": own, "split": "train"} for own in parts]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def count_flops(trainer, batch) -> float:
    """Return the floating point operations of a step, forward and backward."""
    model = trainer.model.train()
    with FlopCounterMode(display=False) as counter:
        inputs = trainer._prepare_inputs(batch)
        counts = trainer.count_step([batch]) if hasattr(trainer, "count_step") else None
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=counts)
        loss.backward()
    model.zero_grad()
    return float(counter.get_total_flops())


def build_ours(checkpoint: Path, folder: Path, options) -> tuple[Trainer, float]:
    """Embed, and return the trainer of `blipren train` with the floating point operations of a step."""
    cache = folder / "cache"
    embed(EmbedSettings(
        model=str(checkpoint), dataset=str(folder / "rows.jsonl"), cache=str(cache), workers=0, dtype="float32",
        near_duplicates="keep",
    ))  # fmt: skip
    settings = TrainSettings(
        model=str(checkpoint), cache=str(cache), out=str(folder / "run"), batch_size=options.images, workers=0,
        max_steps=options.steps + 1, learning_rate=1e-9, keep_best="last", generate_samples=0, device=options.device,
        log_every=1, warmup=0.0,
    )  # fmt: skip
    trainer = build_trainer(settings, RunFolder(settings.out, writes=True))
    flops = count_flops(trainer, trainer.train_dataset[0])
    trainer.window = type(trainer.window)()
    return trainer, flops


def build_theirs(checkpoint: Path, folder: Path, rows: list[dict], options) -> tuple[Trainer, float]:
    """Return TRL's SFTTrainer on the photos with the floating point operations of a step."""
    data = Dataset.from_list(
        [{"messages": row["messages"], "images": [str(folder / row["image"])]} for row in rows]
    ).cast_column("images", List(ImageFeature()))
    model = BliprenForConditionalGeneration.from_pretrained(checkpoint)
    model.freeze()
    arguments = trl.SFTConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=len(rows), max_steps=options.steps + 1,
        learning_rate=1e-9, lr_scheduler_type="constant", max_length=None, report_to="none", bf16=False, save_strategy="no",
        gradient_checkpointing=False, assistant_only_loss=True, logging_steps=1, use_cpu=options.device == "cpu",
        weight_decay=0.0,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=BliprenProcessor.from_pretrained(checkpoint)
    )
    return trainer, count_flops(trainer, next(iter(trainer.get_train_dataloader())))


def first_loss(folder: Path, name: str = "loss") -> float:
    """Return the loss of the first step of a run of ours."""
    events = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return next(event[name] for event in events if event["kind"] == "train")


def compare(checkpoint: Path, folder: Path, rows: list[dict], options) -> dict:
    """Train both in turns. Returns both arms, and how many times TRL's figures are ours."""
    (theirs, their_flops), (ours, our_flops) = (
        build_theirs(checkpoint, folder, rows, options),
        build_ours(checkpoint, folder, options),
    )
    their_clock, our_clock = train_in_turns(theirs, ours)
    arms = {
        "trl": {**their_clock.seconds(), "flops": their_flops, "loss": theirs.state.log_history[0]["loss"]},
        "blipren": {**our_clock.seconds(), "flops": our_flops, "loss": first_loss(folder)},
    }
    if abs(arms["trl"]["loss"] - arms["blipren"]["loss"]) > 1e-3 * arms["trl"]["loss"]:
        raise SystemExit(f"the losses differ: {arms}")
    return {**arms, "ratios": ratios_of(arms["trl"], arms["blipren"])}


def ratios_of(theirs: dict, ours: dict) -> dict:
    """Return how many times TRL's figures are ours, and which share of the arithmetic's ratio the time reaches."""
    ratios = {name: theirs[name] / ours[name] for name in ("cpu_seconds", "wall_seconds", "flops")}
    return ratios | {"share": ratios["cpu_seconds"] / ratios["flops"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="b16-135m")
    parser.add_argument("--images", type=int, default=4, help="images of a step")
    parser.add_argument("--turns", type=int, default=5, help="turns or questions an image")
    parser.add_argument("--steps", type=int, default=2, help="steps that are timed, behind one that is not")
    parser.add_argument("--kinds", nargs="+", choices=["questions", "turns"], default=["questions", "turns"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    report: dict = {"settings": settings, "kinds": {}}
    with tempfile.TemporaryDirectory() as place:
        checkpoint = make_checkpoint(options.shape, Path(place) / "model")
        for kind in options.kinds:
            folder = Path(place) / kind
            rows = write_rows(folder, options.images, options.turns, kind)
            report["kinds"][kind] = compare(checkpoint, folder, rows, options)
    print_report(report, options.out)


if __name__ == "__main__":
    main()
