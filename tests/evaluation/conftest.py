"""A tiny model that has learned to see colours, one whose image path is cut, and pictures to judge them on."""

import json
import shutil

import pytest
import torch
from PIL import Image

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from tests.tiny_models import QFORMER, make_llm, make_vision

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 60, 220),
    "yellow": (240, 220, 40),
    "black": (10, 10, 10),
    "white": (245, 245, 245),
}
QUESTION = "What colour is it ?"


def colour_rows(count: int) -> list[dict]:
    """Rows of metadata.jsonl: pictures of one colour each, with captions and a question."""
    names = list(COLOURS)
    rows = []
    for i in range(count):
        name = names[i % len(names)]
        captions = [f"A {name} picture .", f"The picture is {name} ."]
        row = {"file_name": f"{i:03d}.png", "captions": captions, "questions": [QUESTION], "answers": [name]}
        rows.append(row | {"split": "test" if i >= 6 else "train"})
    return rows


def colour_picture(i: int, size=(40, 32)) -> Image.Image:
    r, g, b = list(COLOURS.values())[i % len(COLOURS)]
    shift = (i * 7) % 20
    return Image.new("RGB", size, (max(r - shift, 0), max(g - shift, 0), max(b - shift, 0)))


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """Folder of 30 pictures, 24 of them in the test split."""
    folder = tmp_path_factory.mktemp("colours")
    rows = colour_rows(30)
    for i, row in enumerate(rows):
        colour_picture(i).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def learn(model, processor, rows, pictures, steps: int) -> None:
    """Teaches captions and answers of a few pictures, connector and language model together."""
    from blipren.training.evaluation.features import encode_images
    from blipren.training.evaluation.generation import pad_right

    model.freeze(train=("connector", "llm"))
    features = encode_images(model, processor, pictures)
    texts, owners = [], []
    for i, row in enumerate(rows):
        for prompt, answer in [(None, row["captions"][0]), (row["questions"][0], row["answers"][0])]:
            texts.append((processor.encode_prompt(prompt), processor.encode_answer(answer)))
            owners.append(i)
    ids, mask = pad_right([p + a for p, a in texts], 0)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(texts):
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, patch_features=features.patches[owners]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    model.freeze()
    assert loss.item() < 0.2, f"the tiny model did not learn its six pictures: loss {loss.item():.3f}"


def save(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def new_model(folder, vision="siglip_vision_model", **options):
    """A random model and its processor, from bases in `folder`."""
    bases = make_vision(folder / "vision", vision), make_llm(folder / "llm")
    torch.manual_seed(0)
    shared = ("connector", "scales", "scale_join", "tiles")
    keywords = {"num_queries": 4, **{k: options[k] for k in shared if k in options}}
    model = BliprenForConditionalGeneration.from_vision_text_pretrained(
        *bases, qformer=QFORMER, **{"num_queries": 4, **options}
    )
    return model, BliprenProcessor.from_vision_text_pretrained(*bases, **keywords)


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """Full checkpoint of a random model."""
    folder = tmp_path_factory.mktemp("untrained")
    model, processor = new_model(folder)
    return save(folder / "model", model, processor)


@pytest.fixture(scope="session")
def seeing(tmp_path_factory):
    """Full checkpoint that names the colour of a picture."""
    folder = tmp_path_factory.mktemp("seeing")
    model, processor = new_model(folder)
    rows = colour_rows(6)
    learn(model, processor, rows, [colour_picture(i) for i in range(6)], steps=150)
    return save(folder / "model", model, processor)


@pytest.fixture(scope="session")
def blind(seeing, tmp_path_factory):
    """The same checkpoint with its image path cut: image features are zero whatever the picture."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("blind") / "model"
    shutil.copytree(seeing, folder)
    weights = load_file(folder / "model.safetensors")
    cut = [name for name in weights if name.startswith("model.projector.output_norm")]
    assert cut
    save_file({k: torch.zeros_like(v) if k in cut else v for k, v in weights.items()}, folder / "model.safetensors")
    return folder
