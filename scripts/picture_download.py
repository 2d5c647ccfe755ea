"""What the download scripts share: filter captions, then fetch the pictures with img2dataset into WebDataset tars.

img2dataset (at least 1.47) wants pandas below 3, so it lives in an environment of its own; the scripts run its command:

    pipx install img2dataset        # or: uv tool install img2dataset
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import yaml

from blipren.training.data.sources.caption_filter import CaptionFilter, count_captions, filter_texts


def parse_arguments(description: str, source: str, image_size: int, caption_filter: str) -> argparse.Namespace:
    """Parse the flags that all download scripts have; the arguments are the defaults of one script."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the tars; the same command continues a stopped download")
    parser.add_argument("--source", default=source, help=f"table of captions and addresses; by default {source}")
    parser.add_argument("--limit", type=int, help="only the first so many rows of the table")
    parser.add_argument("--image-size", type=int, default=image_size, help="longest side in pixels of a saved picture")
    parser.add_argument(
        "--filter", default=caption_filter, metavar="{RULE: VALUE}", help="rules of blipren embed --help"
    )
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--threads", type=int, default=64, help="downloads at a time in each process")
    parser.add_argument("--rows-per-tar", type=int, default=10_000)
    parser.add_argument("--img2dataset", default="img2dataset", help="command, where it is not found by its name")
    options = parser.parse_args()
    if shutil.which(options.img2dataset) is None:
        parser.error(f"no command {options.img2dataset}: install it by `pipx install img2dataset`, or name it")
    return options


def filter_rows(rows: Iterable[dict], rules: CaptionFilter, rejected: Path) -> list[dict]:
    """Return the rows whose caption, their key "caption_to_check", passes. The others are written to `rejected`."""
    rows = list(rows)
    counts = (
        count_captions(([None], [row["caption_to_check"]]) for row in rows) if rules.max_images_per_caption else None
    )
    kept, reasons = [], Counter()
    with open(rejected, "w", encoding="utf-8") as file:
        for row in rows:
            text = row.pop("caption_to_check")
            broken = filter_texts([None], [text], rules, counts).rejected
            if not row["url"]:
                broken = [("no_url", "", text)]
            if broken:
                rule, value, _ = broken[0]
                reasons[rule] += 1
                file.write(json.dumps({"url": row["url"], "reason": rule, "value": value, "caption": text}) + "\n")
            else:
                kept.append(row)
    found = ", ".join(f"{rule} {count:,}" for rule, count in reasons.most_common()) or "none"
    print(f"{len(rows):,} rows = {len(kept):,} to download + {sum(reasons.values()):,} rejected captions ({found})")
    return kept


def download(rows: list[dict], options: argparse.Namespace, more_columns: list[str]) -> Counter:
    """Fetch the pictures of the rows. Return how many rows ended in which status of img2dataset.

    Args:
        rows: with "url", "caption" and `more_columns`; the latter are in the `.json` beside each picture.
    """
    table = options.out / "urls.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    command = [
        options.img2dataset, f"--url_list={table}", "--input_format=parquet", "--url_col=url", "--caption_col=caption",
        f"--save_additional_columns={json.dumps(more_columns)}", "--output_format=webdataset",
        f"--output_folder={options.out / 'tars'}", f"--number_sample_per_shard={options.rows_per_tar}",
        f"--image_size={options.image_size}", "--resize_mode=keep_ratio_largest", "--resize_only_if_bigger=True",
        f"--processes_count={options.processes}", f"--thread_count={options.threads}", "--retries=1",
        "--incremental_mode=incremental",
    ]  # fmt: skip
    # albumentations, which img2dataset imports, would ask PyPI for a newer version of itself
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-3000:]}\nimg2dataset failed; the same command continues")
    return Counter(row["status"] for row in log_rows(options.out / "tars"))


def log_rows(tars: Path) -> Iterator[dict]:
    """Yield the rows of the logs that img2dataset writes beside its tars: url, caption, status, error_message, ..."""
    for log in sorted(tars.glob("*.parquet")):
        yield from pyarrow.parquet.read_table(log).to_pylist()


def run(rows: Iterable[dict], options: argparse.Namespace, more_columns: list[str], embed_flags: str) -> None:
    """Filter, download and say what came out."""
    options.out.mkdir(parents=True, exist_ok=True)
    rules = CaptionFilter(**yaml.safe_load(options.filter))
    kept = filter_rows(rows, rules, options.out / "rejected.jsonl")
    statuses = download(kept, options, more_columns)
    by_count = sorted(statuses.items(), key=lambda item: (-item[1], item[0]))
    print(f"{len(kept):,} rows = " + " + ".join(f"{count:,} {status}" for status, count in by_count))
    if not statuses["success"]:
        sys.exit(f"no picture was downloaded; the reasons are in the .parquet files in {options.out / 'tars'}")
    print(f"next: blipren embed MODEL {options.out / 'tars'} CACHE {embed_flags}")
