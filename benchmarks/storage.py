"""Features stored in int8 against float16: bytes, held-out loss and CIDEr of one trained model.

    python benchmarks/storage.py MODEL CACHE --out storage.json

CACHE is a float16 or float32 cache made with MODEL. Its test split is evaluated as it is stored, and again rounded to int8
with a scale for each token, as `blipren embed --dtype int8` stores it.
"""

import argparse
import json
from pathlib import Path

import torch

from blipren.training.data.cache import FeatureCache
from blipren.training.data.cache.encoder import to_storage
from blipren.training.engine.loading import load_checkpoint
from blipren.training.evaluation.features import PatchFeatures
from blipren.training.evaluation.generation import generate_answers
from blipren.training.evaluation.metrics.captions import caption_metrics


def as_int8(features: torch.Tensor) -> torch.Tensor:
    """Return features as an int8 cache returns them."""
    values, scales = to_storage(features, "int8", [""] * len(features))
    return torch.from_numpy(values).float() * torch.from_numpy(scales)[..., None]


@torch.no_grad()
def held_out_loss(model, processor, features: torch.Tensor, answers: list[list[str]]) -> float:
    """Return the mean loss per token of all captions of all images. A batch is one image."""
    total, tokens = 0.0, 0
    prompt = processor.encode_prompt(num_visual_tokens=[model.config.num_visual_tokens])
    for patches, texts in zip(features, answers):
        rows = [processor.encode_answer(text) for text in texts]
        longest = max(map(len, rows))
        pad = processor.tokenizer.pad_token_id
        ids = torch.tensor([prompt + row + [pad] * (longest - len(row)) for row in rows])
        labels = torch.tensor([[-100] * len(prompt) + row + [-100] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * (len(prompt) + len(row)) + [0] * (longest - len(row)) for row in rows])
        count = sum(map(len, rows))
        repeated = patches[None].expand(len(rows), -1, -1)
        loss = model(input_ids=ids, attention_mask=mask, patch_features=repeated, labels=labels).loss
        total += loss.item() * count
        tokens += count
    return total / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("cache")
    parser.add_argument("--split", default="test")
    parser.add_argument("--images", type=int, default=None, help="only the first images")
    parser.add_argument("--out", help="JSON file for the figures")
    a = parser.parse_args()
    model, processor = load_checkpoint(a.model)
    cache = FeatureCache.open(a.cache)
    cache.check_model(model, processor)
    rows = cache.split(a.split)
    count = len(rows) if a.images is None else min(a.images, len(rows))
    ids, answers = rows["id"][:count], rows["answers"][:count]
    exact, mask = cache.patch_features(a.split, range(count))
    if mask is not None:
        raise SystemExit("this measurement is for encoders with a fixed number of patches")
    patches, width = exact.shape[1:]
    stored = {"float16": 2, "float32": 4}[cache.dtype]
    result = {"images": count}
    for name, features, size in (
        (cache.dtype, exact, patches * width * stored),
        ("int8", as_int8(exact), patches * width + 4 * patches),
    ):
        captions = generate_answers(model, processor, PatchFeatures(features), None, batch_size=50, max_new_tokens=30)
        predictions = {row: caption["text"] for row, caption in zip(ids, captions)}
        metrics = caption_metrics(predictions, dict(zip(ids, answers)))
        result[name] = {
            "bytes_per_image": size,
            "loss": held_out_loss(model, processor, features, answers),
            **{key: float(metrics[key]) for key in ("CIDEr", "BLEU-4")},
        }
        result[name]["captions"] = list(predictions.values())
    first, second = (result[name].pop("captions") for name in (cache.dtype, "int8"))
    result["same_captions"] = sum(a == b for a, b in zip(first, second)) / count
    print(json.dumps(result, indent=1))
    if a.out:
        Path(a.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
