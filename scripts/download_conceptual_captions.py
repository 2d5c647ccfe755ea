"""Download Conceptual Captions (3.3 million pictures of the web with their alt texts), or the first part of it.

    python scripts/download_conceptual_captions.py cc3m --limit 200000
    blipren embed MODEL cc3m/tars CACHE

The table is that of the Hub, or the TSV `Train-GCC-training.tsv` (caption, tab, address) by `--source`. A caption that
more than 20 pictures have is rejected. Pictures keep their shape, at most 256 pixels long: the recipe
`two-stage-tutorial` wants 50,000 to 200,000 of them.
"""

import itertools

import datasets
from picture_download import parse_arguments, run

if __name__ == "__main__":
    hub = "google-research-datasets/conceptual_captions"
    options = parse_arguments(__doc__, hub, 256, "{max_images_per_caption: 20}")
    if options.source.endswith(".tsv"):
        columns = {
            "sep": "\t",
            "column_names": ["caption", "image_url"],
            "quoting": 3,
        }  # no quotes: texts may have some
        table = datasets.load_dataset("csv", data_files=options.source, split="train", streaming=True, **columns)
    else:
        table = datasets.load_dataset(options.source, "unlabeled", split="train", streaming=True)
    rows = (
        {"url": row["image_url"], "caption": row["caption"], "caption_to_check": row["caption"] or ""}
        for row in itertools.islice(table, options.limit)
    )
    run(rows, options, [], "")
