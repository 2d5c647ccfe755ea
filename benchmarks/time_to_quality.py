"""Time of `blipren embed` and `blipren train` until the final validation loss of a notebook's loop.

    python benchmarks/time_to_quality.py DATASET --vision ENCODER --llm LLM --recipe flickr8k-mini --out quality.json

Both arms train the same untrained checkpoint with a frozen language model. The notebook's loop is arm (a) of train.py: every
step decodes and encodes its photos again, has one row per caption, padded to 64 tokens, and computes all logits; AdamW with a
half cosine. The other arm embeds the data set once and runs `blipren train` with the same learning rate and its own batch size;
its time includes the embedding. Both are validated in the same way, on all captions of the validation split, and validation is
not part of the times. Times are processor time: run it with one thread (`--threads 1`) on a shared machine.
"""

import argparse
import json
import math
import random
import tempfile
import time
from pathlib import Path

import torch
from parts.notebook_rows import padded_with_labels
from torch import nn

from blipren.training.cli import build_settings
from blipren.training.commands.embed import EmbedSettings
from blipren.training.commands.embed import run as embed
from blipren.training.commands.new import NewSettings
from blipren.training.commands.new import run as new
from blipren.training.commands.train import TrainSettings
from blipren.training.data.batches.blocks import PromptEncoder, Segment, build_blocks
from blipren.training.data.batches.training_data import open_caches, read_caches, read_images
from blipren.training.data.sources.settings import SourceSettings
from blipren.training.engine.loading import load_checkpoint
from blipren.training.engine.memory import keep_freed_memory
from blipren.training.stages.train import train

CAPTION_LENGTH = 64


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a data set with a train and a validation split")
    parser.add_argument("--vision", required=True)
    parser.add_argument("--llm", required=True)
    parser.add_argument("--recipe", default="flickr8k-mini", help="whose sections new and embed are taken")
    parser.add_argument("--notebook-epochs", type=int, default=2)
    parser.add_argument("--notebook-pairs", type=int, default=40, help="pairs of a step of the notebook way")
    parser.add_argument("--epochs", type=int, default=4, help="of ours")
    parser.add_argument("--batch-size", type=int, default=16, help="images of a step of ours")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of both")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("time_to_quality.json"))
    return parser.parse_args()


class Notebook:
    """A notebook's training loop on the files of the data set."""

    def __init__(self, options: argparse.Namespace, model, processor, cache: Path, settings: TrainSettings):
        self.options, self.model, self.processor = options, model, processor
        (self.text,), (self.validation,) = open_caches(
            read_caches(settings.cache), model, processor
        )  # the same tokens as ours
        by_id = {p.row.id: p for p in read_images(options.dataset, processor, SourceSettings())["train"]}
        self.images = [by_id[id] for id in self.text.ids]
        prompts = PromptEncoder(processor)
        self.rows = self.pairs_of(self.text, prompts)
        self.validation_rows = self.pairs_of(self.validation, prompts)

    def pairs_of(self, source, prompts: PromptEncoder) -> list[tuple[int, list[int], list[int]]]:
        """Return (image, prompt, answer) of every caption."""
        found = []
        for image in range(len(source.texts)):
            for block in build_blocks((0, image), source.texts.answers(image), source.visual_tokens(image), prompts):
                pairs = map(Segment.last_answer, block.segments)
                found += [(image, block.prefix + rest, answer) for rest, answer in pairs]
        return found

    def tensors(self, rows: list, length: int) -> dict[str, torch.Tensor]:
        return padded_with_labels(rows, length, self.processor.tokenizer.pad_token_id)

    @torch.no_grad()
    def validation_loss(self) -> float:
        self.model.eval()
        total = tokens = 0.0
        for begin in range(0, len(self.validation_rows), 50):
            rows = self.validation_rows[begin : begin + 50]
            batch = self.tensors(rows, max(len(p) + len(a) for _, p, a in rows))
            features = self.validation.inputs([image for image, _, _ in rows], None)
            count = int((batch["labels"] != -100).sum())
            total += self.model(**batch, **features, use_cache=False).loss.item() * count
            tokens += count
        self.model.train()
        return total / tokens

    def train(self) -> list[dict]:
        """Train. Returns one event per epoch with `seconds` and `loss`."""
        options, model = self.options, self.model
        model.freeze()
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
        rows, per_step = list(self.rows), options.notebook_pairs
        steps = options.notebook_epochs * (len(rows) // per_step)
        events, seconds, step = [{"seconds": 0.0, "loss": self.validation_loss()}], 0.0, 0
        print("notebook", events[-1], flush=True)
        for epoch in range(options.notebook_epochs):
            random.Random(epoch).shuffle(rows)
            began = time.process_time()
            for begin in range(0, len(rows) - per_step + 1, per_step):
                for group in optimizer.param_groups:
                    warm = min(1.0, (step + 1) / 30)
                    group["lr"] = options.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))
                some = rows[begin : begin + per_step]
                pictures = [self.images[image].row.load() for image, _, _ in some]
                pixels = self.processor.image_processor(images=pictures, return_tensors="pt")
                batch = self.tensors(some, len(some[0][1]) + CAPTION_LENGTH)
                loss = model(**batch, **pixels, use_cache=False).loss
                loss.backward()
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                if step % 50 == 0:
                    print(f"notebook step {step}/{steps} loss {loss.item():.4f}", flush=True)
            seconds += time.process_time() - began
            events.append({"seconds": seconds, "loss": self.validation_loss()})
            print("notebook", events[-1], flush=True)
        return events


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        report = run(options, Path(folder))
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def run(options: argparse.Namespace, folder: Path) -> dict:
    untrained, cache, out = folder / "untrained", folder / "cache", folder / "run"
    settings: NewSettings | EmbedSettings
    settings = build_settings(
        "new", {"out": str(untrained), "vision": options.vision, "llm": options.llm}, options.recipe
    )
    new(settings)
    began = time.process_time()
    embed(
        build_settings(
            "embed",
            {"model": str(untrained), "dataset": options.dataset, "cache": str(cache)},
            options.recipe,
        )
    )
    embedding = time.process_time() - began
    ours = TrainSettings(
        model=str(untrained), cache=str(cache), out=str(out), epochs=options.epochs, batch_size=options.batch_size,
        learning_rate=options.learning_rate, warmup=30, min_learning_rate=0.02, generate_samples=0, device="cpu",
    )  # fmt: skip
    began = time.process_time()
    train(ours)
    whole = time.process_time() - began
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    validations = [e for e in events if e["kind"] == "validation"]
    print("ours", [(e["step"], e["loss"]) for e in validations], f"{embedding:.0f} s + {whole:.0f} s", flush=True)
    model, processor = load_checkpoint(str(untrained))
    notebook = Notebook(options, model, processor, cache, ours).train()
    return {"embedding_seconds": embedding, "whole_seconds": whole, "ours": events, "notebook": notebook}


if __name__ == "__main__":
    main()
