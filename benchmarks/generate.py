"""Speed of generating captions in batches against one by one.

    python benchmarks/generate.py MODEL DATASET --out generate.json [--images 64] [--rounds 3]

Both arms start from the same patch features and must give the same captions. They take turns, and a figure is the median
over the rounds. The ratio is the result: absolute figures depend on the machine and its load.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from blipren.training.data.sources.images import ImageError
from blipren.training.evaluation.examples import open_split
from blipren.training.evaluation.features import encode_images
from blipren.training.evaluation.generation import generate_answers, load_model


def measure(
    model: str, dataset: str, images: int, batch_size: int, rounds: int, max_new_tokens: int, device: str
) -> dict:
    """Return the seconds and captions per second of each arm, and their ratio."""
    network, processor = load_model(model, device)
    photos = []
    for example in open_split(dataset, limit=images).examples:
        try:
            photos.append(example.load())
        except ImageError as error:
            print(f"left out: {error}")
    features = encode_images(network, processor, photos)
    arms = {"one by one": 1, f"batches of {batch_size}": batch_size}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    captions: dict[str, list[str]] = {}
    for _ in range(rounds):
        for name, size in arms.items():
            begin = time.perf_counter()
            found = generate_answers(network, processor, features, batch_size=size, max_new_tokens=max_new_tokens)
            if network.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
            captions[name] = [caption["text"] for caption in found]
            print(f"{name}: {seconds[name][-1]:.2f} s for {len(photos)} captions", flush=True)
    single, batched = captions.values()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    slow, fast = medians.values()
    return {
        "model": model,
        "images": len(photos),
        "arms": {n: {"seconds": seconds[n], "captions_per_second": len(photos) / medians[n]} for n in arms},
        "ratio": slow / fast,
        "equal_captions": sum(a == b for a, b in zip(single, batched)) / len(photos),
        "threads": torch.get_num_threads(),
        "device": str(network.device),
        "platform": platform.platform(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("dataset")
    parser.add_argument("--out", required=True)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=30)
    parser.add_argument("--device", default="auto")
    told = vars(parser.parse_args())
    out = Path(told.pop("out"))
    result = measure(**told)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"batches are {result['ratio']:.1f} times as fast; {100 * result['equal_captions']:.0f}% of captions equal; {out}"
    )


if __name__ == "__main__":
    main()
