"""No line of another library reaches the screen of a command, with the optional packages and without them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import blipren
from tests.commands.run_marked import MARK
from tests.stages.tools import draw_dataset
from tests.tiny_models import make_llm, make_vision

OPTIONAL = ("bitsandbytes", "deepspeed", "lmms_eval", "pytest", "ray", "tensorboard", "trackio", "trl")
QFORMER = "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 64}"
COMMANDS = [
    "new model --vision vision --llm llm --queries 4 --qformer",  # QFORMER follows
    "doctor model --steps 10",
    "embed model photos cache --workers 0",
    "align model cache aligned --tokenizer words --max-steps 2 --batch-size 8",
    "train model cache run --max-steps 2 --batch-size 8 --eval-every 1 --generate-samples 1",
    "train model photos online --online --workers 1 --max-steps 1 --batch-size 8",
    "train model cache lora --max-steps 1 --batch-size 8 --llm-tuning lora --full --merge-lora",
    "evaluate run photos before --limit 4 --max-new-tokens 4 --resamples 10",
    "evaluate run photos after --limit 4 --max-new-tokens 4 --resamples 10 --tasks captioning vqa --before before",
    "compare before after --resamples 10",
    "evaluate aligned photos recall --tasks retrieval --resamples 10",
    "caption run photos/0.png --max-new-tokens 4",
    "convert run full",
    "push full user/name --dry-run",
]
WITH_OPTIONAL = [
    "train model cache bits --max-steps 1 --batch-size 8 --llm-tuning lora --llm-bits 4 --report-to tensorboard",
]


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory):
    """A folder with two tiny base models, a WordPiece tokenizer and a data set."""
    from transformers import BertTokenizerFast

    folder = tmp_path_factory.mktemp("screen")
    make_vision(folder / "vision"), make_llm(folder / "llm")
    draw_dataset(folder / "photos")
    (folder / "words").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a red green blue circle square the is .".split()]
    (folder / "words" / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(folder / "words" / "vocab.txt")).save_pretrained(folder / "words")
    return folder


def link_packages(folder: Path) -> None:
    """Make a folder of all installed packages but the optional ones and ours."""
    folder.mkdir()
    ours = "blipren.", "__editable__"
    for place in filter(lambda place: place.endswith("-packages"), sys.path):
        for entry in Path(place).iterdir():
            if not entry.name.lower().startswith(OPTIONAL + ours) and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)


@pytest.mark.parametrize("packages", ["all", "required"])
def test_every_line_is_ours(packages, work_folder, tmp_path):
    place = tmp_path / "work"
    place.mkdir()
    for entry in work_folder.iterdir():
        (place / entry.name).symlink_to(entry)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_HUB_DISABLE", "PYTHON"))}
    environment |= {"OMP_NUM_THREADS": "1"}
    interpreter = [sys.executable]
    if packages == "required":
        link_packages(tmp_path / "site-packages")
        interpreter += ["-S"]  # nothing but the folder of links
        (tmp_path / "ours").mkdir()
        (tmp_path / "ours" / "blipren").symlink_to(Path(blipren.__file__).parent)
        environment["PYTHONPATH"] = f"{tmp_path / 'site-packages'}{os.pathsep}{tmp_path / 'ours'}"
    lines = [line.split() for line in COMMANDS + (WITH_OPTIONAL if packages == "all" else [])]
    lines[0].append(QFORMER)
    result = subprocess.run(
        [*interpreter, str(Path(__file__).with_name("run_marked.py"))],
        input="".join(json.dumps(line) + "\n" for line in lines),
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
    )
    screen = result.stdout + result.stderr
    done = dict(re.findall(r"^\x01(\w+): exit status (\d)$", result.stdout, flags=re.MULTILINE))
    assert done.pop("doctor") == "1"  # random weights: the model ignores its image
    assert set(done.values()) == {"0"} and len(done) == len({line[0] for line in lines}) - 1, screen[-3000:]
    shown = [line for line in re.split(r"[\n\r]", screen) if line.strip()]
    foreign = [line for line in shown if not line.startswith(MARK)]
    assert not foreign, "\n".join(foreign)
