"""Download LIVIS (laion/220k-GPT4Vision-captions-from-LIVIS): pictures of LVIS with long and short captions.

    python scripts/download_livis.py livis
    blipren embed MODEL livis/tars CACHE --caption-columns json.short_caption/json.caption

The table has 217,868 rows. Pictures keep their shape, at most 384 pixels long, as the recipes `blipren-normal` and
`blipren-moe` want them.
"""

import itertools
from pathlib import Path

import datasets
from picture_download import parse_arguments, run

if __name__ == "__main__":
    options = parse_arguments(__doc__, "laion/220k-GPT4Vision-captions-from-LIVIS", 384, "{}")
    if Path(options.source).exists():
        files = str(Path(options.source) / "**/*.parquet") if Path(options.source).is_dir() else options.source
        table = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    else:
        table = datasets.load_dataset(options.source, split="train", streaming=True)
    rows = (
        {
            "url": row["url"],
            "caption": row["caption"] or "",
            "short_caption": row["short_caption"] or "",
            "caption_to_check": row["short_caption"] or row["caption"] or "",
        }
        for row in itertools.islice(table, options.limit)
    )
    run(rows, options, ["short_caption"], "--caption-columns json.short_caption/json.caption")
