"""Tiny models and a tiny cache of the align tests: made once a session."""

import json

import pytest
import torch
from PIL import Image, ImageDraw

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.commands.align import AlignSettings
from blipren.training.commands.embed import EmbedSettings
from blipren.training.commands.embed import run as embed
from tests.tiny_models import QFORMER, make_llm, make_vision

WORDS = (
    "[PAD] [unused0] [UNK] [CLS] [SEP] [MASK] a the big small red green blue yellow circle square star left right of "
    "above below two three dogs run"
).split()


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Folders of a tiny vision encoder, LLM and WordPiece tokenizer."""
    from transformers import BertTokenizerFast

    folder = tmp_path_factory.mktemp("bases")
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(folder / "bert" / "vocab.txt")).save_pretrained(folder / "bert")
    return {
        "vision": str(make_vision(folder / "vision")),
        "llm": str(make_llm(folder / "llm")),
        "tokenizer": str(folder / "bert"),
    }


@pytest.fixture(scope="session")
def untrained(bases, tmp_path_factory):
    """Bridge checkpoint of `blipren new`'s kind, without a text side."""
    folder = tmp_path_factory.mktemp("new")
    torch.manual_seed(0)
    model = BliprenForConditionalGeneration.from_vision_text_pretrained(
        bases["vision"],
        bases["llm"],
        num_queries=4,
        qformer={**QFORMER, "initializer_range": 0.2, "query_init_std": 1.0},
    )
    model.save_bridge(folder)
    BliprenProcessor.from_vision_text_pretrained(bases["vision"], bases["llm"], num_queries=4).save_pretrained(folder)
    return folder


COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Folder of one coloured shape a picture, left or right, with two captions each; 32 to train on, 8 to validate."""
    folder = tmp_path_factory.mktemp("scenes")
    lines = []
    for number in range(40):
        colour, shape, right = COLOURS[number % 4], SHAPES[number // 4 % 2], number // 8 % 2
        image = Image.new("RGB", (32, 32), "white")
        box = [16 * right + 2, 4 + number % 5, 16 * right + 14, 16 + number % 5]
        draw = ImageDraw.Draw(image)
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=colour)
        image.save(folder / f"{number}.png")
        captions = [f"a {colour} {shape} {'right' if right else 'left'}", f"the {colour} {shape}"]
        split = "validation" if number >= 32 else "train"
        lines.append(json.dumps({"file_name": f"{number}.png", "captions": captions, "split": split}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def cache(untrained, scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "cache"
    embed(
        EmbedSettings(
            model=str(untrained), dataset=str(scenes), cache=str(folder), workers=0, near_duplicates="keep",
            dtype="float32", caption_columns=["captions"],
        )
    )  # fmt: skip
    return folder


@pytest.fixture
def settings(untrained, cache, bases, tmp_path):
    """Settings of a short run, changed by keywords."""

    def make(**changes) -> AlignSettings:
        values = {
            "model": str(untrained),
            "cache": str(cache),
            "out": str(tmp_path / "out"),
            "tokenizer": bases["tokenizer"],
            "embedding_width": 16,
            "batch_size": 12,
            "max_steps": 4,
            "log_every": 1,
            "learning_rate": 1e-3,
            "precision": "fp32",
            "device": "cpu",
            "max_text_tokens": 16,
        }
        return AlignSettings(**{**values, **changes})

    return make
