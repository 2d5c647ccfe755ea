"""The download scripts against a loopback server of pictures, through img2dataset itself, to a feature cache.

img2dataset is taken from BLIPREN_IMG2DATASET (its command), else from an environment in the cache folder, which pip
fills once: it wants an older pandas than ours.
"""

import http.server
import io
import json
import os
import subprocess
import sys
import threading
import venv
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import load_from_disk

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.cli import main
from tests import tiny_models

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
IMG2DATASET = "img2dataset>=1.47,<2"


@pytest.fixture(scope="session")
def img2dataset() -> str:
    """Path of the command; the tests are skipped where it cannot be installed."""
    if given := os.environ.get("BLIPREN_IMG2DATASET"):
        return given
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "blipren" / "img2dataset"
    command = folder / "bin" / "img2dataset"
    if not command.exists():
        venv.create(folder, with_pip=True, clear=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "-q", IMG2DATASET]
        done = subprocess.run(pip, capture_output=True, text=True, timeout=500)
        if done.returncode:
            pytest.skip(f"{IMG2DATASET} cannot be installed: {done.stderr[-300:]}")
    return str(command)


@pytest.fixture(scope="module")
def pictures():
    """Address of a server: /N.png is a picture, /broken.png no picture, everything else is not there."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.strip("/").removesuffix(".png")
            body = b"no picture"
            if name.isdigit():
                buffer = io.BytesIO()
                tiny_models.random_image(int(name), (500, 300)).save(buffer, "PNG")
                body = buffer.getvalue()
            self.send_response(200 if name.isdigit() or name == "broken" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint folder that `embed` takes."""
    root = tmp_path_factory.mktemp("model")
    bases = tiny_models.make_vision(root / "vision"), tiny_models.make_llm(root / "llm")
    shape = {"connector": "qformer", "num_queries": 4}
    BliprenForConditionalGeneration.from_vision_text_pretrained(
        *bases, **shape, qformer=tiny_models.QFORMER
    ).save_bridge(root / "model")
    BliprenProcessor.from_vision_text_pretrained(*bases, **shape).save_pretrained(root / "model")
    return root / "model"


def download(script: str, out: Path, img2dataset: str, *flags: str) -> str:
    """Run a script in a process of its own. Return what it printed."""
    few = ["--processes", "1", "--threads", "4", "--rows-per-tar", "4", "--img2dataset", img2dataset]
    command = [sys.executable, SCRIPTS / script, out, *flags, *few]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def cached_texts(model: Path, tars: Path, cache: Path, *flags: str) -> list[str]:
    assert main(["embed", str(model), str(tars), str(cache), "--workers", "0", "--device", "cpu", *flags]) == 0
    return sorted(text for split in load_from_disk(cache).values() for row in split for text in row["answers"])


def test_livis(pictures, img2dataset, model, tmp_path):
    rows = [
        {
            "url": f"{pictures}/{n}.png",
            "caption": f"A long caption of picture {n} .",
            "short_caption": f"picture {n} here",
        }
        for n in range(6)
    ]
    rows[1]["short_caption"] = ""  # the long one is taken
    rows[2]["short_caption"] = "Buy now! Stock photo"  # refused by the caption filter, before the download
    rows[3]["url"] = f"{pictures}/gone.png"
    rows[4]["url"] = f"{pictures}/broken.png"
    rows.append({"url": None, "caption": "a picture without address", "short_caption": ""})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "livis.parquet")
    out = tmp_path / "livis"
    printed = download("download_livis.py", out, img2dataset, "--source", str(tmp_path / "livis.parquet"))
    assert "7 rows = 5 to download + 2 rejected captions" in printed
    assert "5 rows = 3 success + 1 failed_to_download + 1 failed_to_resize" in printed
    assert "blipren embed MODEL" in printed
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in rejected] == ["boilerplate", "no_url"]
    columns = ["--caption-columns", "json.short_caption/json.caption"]
    texts = cached_texts(model, out / "tars", tmp_path / "cache", *columns)
    assert texts == ["A long caption of picture 1 .", "picture 0 here", "picture 5 here"]
    again = download("download_livis.py", out, img2dataset, "--source", str(tmp_path / "livis.parquet"))
    assert again.splitlines()[1] == printed.splitlines()[1]  # nothing is fetched a second time


def test_conceptual_captions(pictures, img2dataset, model, tmp_path):
    lines = [f'a "quoted" caption number {n}\t{pictures}/{n}.png' for n in range(4)]
    lines += [f"the same words\t{pictures}/{n}.png" for n in range(10, 13)]
    (tmp_path / "Train-GCC-training.tsv").write_text("\n".join(lines) + "\n")
    out = tmp_path / "cc3m"
    flags = ["--source", str(tmp_path / "Train-GCC-training.tsv"), "--filter", "{max_images_per_caption: 2}"]
    printed = download("download_conceptual_captions.py", out, img2dataset, *flags)
    assert "7 rows = 4 to download + 3 rejected captions (max_images_per_caption 3)" in printed
    assert "4 rows = 4 success" in printed
    assert cached_texts(model, out / "tars", tmp_path / "cache") == [
        f'a "quoted" caption number {n}' for n in range(4)
    ]
    limited = download("download_conceptual_captions.py", tmp_path / "two", img2dataset, *flags, "--limit", "2")
    assert "2 rows = 2 success" in limited


def test_without_img2dataset_it_is_one_clear_line(tmp_path):
    command = [sys.executable, SCRIPTS / "download_livis.py", tmp_path / "out", "--img2dataset", "no-such-command"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "pipx install img2dataset" in done.stderr
