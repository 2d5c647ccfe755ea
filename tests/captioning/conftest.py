"""A model that names colours, an aligned one with the same encoder, and a folder of pictures with broken ones."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from tests.evaluation.conftest import COLOURS, QUESTION, colour_picture, colour_rows, learn, new_model, save

__all__ = ["COLOURS", "QUESTION"]


def caption_in_actor(settings, elsewhere, monkeypatch) -> None:
    """Caption as a Ray actor does, in this process: unit by unit, last one first, from another working directory."""
    from blipren.training.captioning.engines.ray_cluster import CaptionUnits, absolute
    from blipren.training.captioning.job import CaptionJob

    settings = absolute(settings)
    job, folder = CaptionJob.open(settings), os.getcwd()
    out = job.folder(Path(settings.out))
    out.start()
    elsewhere.mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(elsewhere)
        units = range(-(-job.source.count_rows() // settings.rows_per_shard))
        CaptionUnits(dataclasses.asdict(settings), folder)({"unit": units[::-1]})
    job.complete(out)


@pytest.fixture(scope="session")
def seeing(tmp_path_factory):
    """Full checkpoint that names the colour of a picture."""
    folder = tmp_path_factory.mktemp("seeing")
    model, processor = new_model(folder)
    learn(model, processor, colour_rows(6), [colour_picture(i) for i in range(6)], steps=150)
    return save(folder / "model", model, processor)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Folder of 22 pictures with captions, numbers and splits; two are broken."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for i in range(22):
        row = {"file_name": f"{i:02d}.png", "captions": [f"picture {i}"], "weight": i / 2, "tags": {"colour": i % 6}}
        colour_picture(i).save(folder / row["file_name"])
        rows.append(row | {"split": "test" if i % 5 == 4 else "train"})
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:60])
    (folder / "12.png").write_text("<!doctype html>")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def aligned(seeing, tmp_path_factory):
    """Checkpoint of stage 1 with the encoder of `seeing`, with random heads that count as trained."""
    from transformers import BertTokenizerFast

    from blipren import BliprenForConditionalGeneration, BliprenForImageTextRetrieval, BliprenProcessor

    folder = tmp_path_factory.mktemp("aligned")
    words = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "picture", "is", ".", *COLOURS]
    (folder / "vocab.txt").write_text("\n".join(words))
    generator = BliprenForConditionalGeneration.from_pretrained(seeing)
    processor = BliprenProcessor.from_pretrained(seeing)
    processor.qformer_tokenizer = BertTokenizerFast(vocab_file=str(folder / "vocab.txt"))
    torch.manual_seed(0)
    text = {"vocab_size": len(words), "pad_token_id": 0, "max_position_embeddings": 64, "decoder_start_token_id": 1}
    model = BliprenForImageTextRetrieval.from_generator(generator, text=text, image_text_hidden_size=16)
    for module in (model.model.qformer, model.itm_head, model.vision_proj, model.text_proj):
        for parameter in module.parameters():  # scores of small weights hardly differ
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.config.trained_heads = ["contrast", "matching"]
    return save(folder / "model", model.eval(), processor)
