"""Recall of `blipren search` against `evaluate --tasks retrieval`, with the same checkpoint of stage 1 and held-out images.

    blipren quickstart --out run
    python benchmarks/search.py run/aligned run/scenes --query "a small orange circle below a large black circle" --out found

Searches for every caption of the test split in the index that `blipren search` writes, and runs the retrieval task on the same
split. OUT gets recall.json, and the contact sheet of the query (sheet.png).
"""

import argparse
import json
from pathlib import Path

from blipren import BliprenForImageTextRetrieval, BliprenProcessor
from blipren.training.evaluation.metrics.retrieval import embed_texts
from blipren.training.quickstart.steps import run_step
from blipren.training.search.index import ImageIndex


def search_recall(model: Path, index: ImageIndex) -> dict[str, float]:
    """Return the share of captions whose image is among the first 1, 5, 10; equal scores count against the search."""
    network, processor = BliprenForImageTextRetrieval.from_pretrained(model), BliprenProcessor.from_pretrained(model)
    captions = [(number, text) for number, row in enumerate(index.rows) for text in row["captions"]]
    queries = embed_texts(network.eval(), processor.qformer_tokenizer, [text for _, text in captions])
    scores, numbers = index.search(queries, len(index.rows))
    own = scores[numbers == numbers.new_tensor([number for number, _ in captions])[:, None]]
    ranks = (scores >= own[:, None]).sum(1)
    return {f"R@{k}": float((ranks <= k).float().mean()) for k in (1, 5, 10)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint of stage 1")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--query", required=True, help="for the contact sheet")
    parser.add_argument("--out", type=Path, default=Path("found"))
    given = parser.parse_args()
    shown = {"query": given.query, "split": "test", "top": 12, "workers": 0}
    run_step("search", model=given.model, dataset=given.dataset, out=given.out, **shown)
    found = search_recall(given.model, ImageIndex(given.out / "index"))
    evaluation = given.out / "evaluation"
    run_step("evaluate", model=given.model, dataset=given.dataset, out=evaluation, tasks=["retrieval"], report=False)
    metrics = json.loads((evaluation / "metrics.json").read_text())["retrieval"]["text_to_image"]
    result = {"search": found, "evaluate": {name: metrics[name] for name in found}}
    (given.out / "recall.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
