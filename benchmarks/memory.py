"""A memory of 1,800, 100,000 and a million entries: bytes, seconds to build, milliseconds a query.

    python benchmarks/memory.py --out memory.json

Embeddings are random and captions are drawn from a small vocabulary: their number and length count here, not what they say.
The query is what `generate` does beside the language model's work: nearest entries, then the regression, scores of the 200 nearest
captions, and scores of captions that are joined from these.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from blipren.consensus_blipren import letters_of_tokens, search_joined
from blipren.memory_blipren import BliprenMemory
from blipren.ranked_generation_blipren import memory_score

WORDS, LENGTH = 4_000, 12  # different tokens; tokens of a caption


def draw_texts(entries: int, captions: int, generator: np.random.Generator) -> dict[str, list]:
    """Return texts of entries with captions of tokens whose frequencies fall as those of words do.

    A third of the tokens follow from the one before, so that captions share pairs of tokens and can be joined.
    """
    ranks = 1 / np.arange(1, WORDS + 1)
    tokens = generator.choice(WORDS, (entries, captions, LENGTH), p=ranks / ranks.sum())
    follows = generator.random((entries, captions, LENGTH)) < 1 / 3
    for place in range(1, LENGTH):
        next_tokens = tokens[..., place - 1] * 7 % WORDS
        tokens[..., place] = np.where(follows[..., place], next_tokens, tokens[..., place])
    tokens += 3
    return {
        "id": [f"{i:08}.jpg" for i in range(entries)],
        "image_hash": [f"{i:032x}" for i in range(entries)],
        "captions": [["a caption of about fifty characters, such as this one"] * captions for _ in range(entries)],
        "tokens": tokens.tolist(),
    }


def measure(entries: int, settings: argparse.Namespace) -> dict:
    """Return the figures of a memory of one size."""
    generator = np.random.default_rng(0)
    embeddings = torch.from_numpy(generator.standard_normal((entries, settings.width), dtype=np.float32))
    texts = draw_texts(entries, settings.captions, generator)
    queries = embeddings[:: max(1, entries // settings.queries)][: settings.queries] + 0.5
    with tempfile.TemporaryDirectory() as folder:
        begin, cpu = time.perf_counter(), time.process_time()
        letters = letters_of_tokens([f"word{token}" for token in range(WORDS + 3)])
        info = {"encoder": {}, "language_model": {}, "prompts": [], "end": 2}
        memory = BliprenMemory.build(embeddings, texts, info, letters)
        memory.save(folder)
        built = time.perf_counter() - begin, time.process_time() - cpu
        del embeddings, texts, memory
        size = {file.name: file.stat().st_size for file in Path(folder).iterdir()}
        begin = time.perf_counter()
        memory = BliprenMemory.load(folder)
        loaded = time.perf_counter() - begin
        counts, times = [], {"search of one": [], "search, a batch": [], "regression and scores": []}
        memory.frequencies()  # counted once
        for row in range(3):
            begin = time.process_time()
            memory.find(queries[row : row + 1], memory.num_regressed)
            times["search of one"].append(time.process_time() - begin)
        begin = time.process_time()
        found = memory.find(queries, memory.num_regressed)
        times["search, a batch"].append((time.process_time() - begin) / len(queries))
        memory.regress(memory.standardise(queries[:1])[0], found.indices[0])  # a small memory inverts its kernel once
        for query, indices in zip(memory.standardise(queries[:3]), found.indices):
            begin = time.process_time()
            table, weights = memory.regress(query, indices)
            candidates = [tuple(caption) for own in memory.tokens(indices[:200].tolist()) for caption in own]
            joins, joined = memory.settings.joins, memory.settings.joined
            score = memory_score(memory, table, weights)
            ranked, _ = search_joined(candidates, score, joins, joined, 2 * LENGTH)
            times["regression and scores"].append(time.process_time() - begin)
            counts.append(len(ranked))
    return {
        "entries": entries,
        "bytes": size,
        "MiB": round(sum(size.values()) / 2**20, 1),
        "seconds to build and save (wall, processor)": [round(value, 2) for value in built],
        "seconds to load": round(loaded, 2),
        "processor milliseconds a query": {name: round(1000 * float(np.median(v)), 2) for name, v in times.items()},
        "candidates with joined ones": int(np.median(counts)),
        "peak GiB of the process": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--entries", type=int, nargs="+", default=[1_800, 100_000, 1_000_000])
    parser.add_argument("--width", type=int, default=256, help="width of an embedding")
    parser.add_argument("--captions", type=int, default=1, help="captions of an entry")
    parser.add_argument("--queries", type=int, default=32, help="images in a batch")
    parser.add_argument("--out", default="memory.json")
    settings = parser.parse_args()
    results = []
    for entries in settings.entries:
        results.append(measure(entries, settings))
        print(json.dumps(results[-1], indent=1), flush=True)
        Path(settings.out).write_text(json.dumps({"settings": vars(settings), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
