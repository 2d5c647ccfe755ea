"""The first steps of stage 1 on drawn scenes and on flickr8k-mini give the stored losses: what training computes must
not change by accident. After a wanted change: `python -m tests.stages.align.test_reference_curves` writes the file anew."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from blipren.training.engine.run_folder import RunFolder
from blipren.training.quickstart.scenes import draw_scene, make_scene
from blipren.training.quickstart.text_tokenizer import write_tokenizer
from blipren.training.quickstart.wording import write_captions
from blipren.training.stages import align as stage
from tests.conftest import SHARED_DATA
from tests.tiny_models import make_llm, make_vision

REFERENCE = Path(__file__).with_name("reference_losses.json")
STEPS = 4
LOSSES = ("itc", "itm", "itg", "grad_norm")


class Encoded:
    """The part of a feature cache that stage 1 reads, encoded by the real encoder when it is asked for."""

    views = 1

    def __init__(self, vision, rows: dict[str, list[dict]], load):
        self.model = AutoModel.from_pretrained(vision, dtype=torch.float32).eval()
        self.processor = AutoImageProcessor.from_pretrained(vision)
        self.rows, self.load = rows, load

    def split(self, name):
        captions = [row["captions"] for row in self.rows[name]]
        return {
            "id": [row["file_name"] for row in self.rows[name]],
            "prompts": [[None] * len(own) for own in captions],
            "answers": captions,
        }

    def num_with_captions(self, name):
        return len(self.rows[name])

    def check_model(self, model, processor):
        assert model.config.vision_hidden_size == 32 or model.config.vision_config.model_type == "mobilenet_v2"

    @torch.no_grad()
    def patch_features(self, split, indices, views=None):
        images = [self.load(self.rows[split][index]) for index in indices]
        states = self.model(**self.processor(images, return_tensors="pt")).last_hidden_state
        return states.flatten(2).transpose(1, 2) if states.dim() == 4 else states, None


def scene_rows(count, first):
    rows = []
    for index in range(first, first + count):
        scene = make_scene(0, index)
        captions = write_captions(scene, random.Random(index))
        rows.append({"file_name": f"scene-{index}", "captions": captions, "scene": scene})
    return rows


def scenes_cache(folder):
    vision = make_vision(folder / "vision", image_size=64)
    rows = {"train": scene_rows(200, 0), "validation": scene_rows(4, 1000)}
    return (
        vision,
        make_llm(folder / "llm"),
        write_tokenizer(folder / "words"),
        Encoded(vision, rows, lambda row: draw_scene(row["scene"])),
    )


def flickr_cache(folder):
    rows = [json.loads(line) for line in open(SHARED_DATA / "flickr8k-mini" / "metadata.jsonl", encoding="utf-8")]
    splits = {name: [row for row in rows if row["split"] == name] for name in ("train", "validation")}
    splits["validation"] = splits["validation"][:4]
    vision = SHARED_DATA / "tiny-vision"
    load = lambda row: Image.open(SHARED_DATA / "flickr8k-mini" / row["file_name"]).convert("RGB")  # noqa: E731
    return vision, SHARED_DATA / "caption-lm", SHARED_DATA / "bert-vocab", Encoded(vision, splits, load)


def first_losses(make, folder) -> dict[str, list[float]]:
    """Losses and gradient norms of the first steps, computed in float64 so that machines agree."""
    from blipren import BliprenForConditionalGeneration, BliprenProcessor

    vision, llm, words, cache = make(folder)
    torch.manual_seed(0)
    qformer = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "project_patches": True}
    BliprenForConditionalGeneration.from_vision_text_pretrained(
        vision, llm, num_queries=4, projector="linear", qformer={**qformer, "initializer_range": 0.1}
    ).save_bridge(folder / "new")
    BliprenProcessor.from_vision_text_pretrained(vision, llm, num_queries=4).save_pretrained(folder / "new")
    settings = stage.AlignSettings(
        model=str(folder / "new"), cache="", out=str(folder / "out"), tokenizer=str(words), batch_size=16, seed=0,
        max_steps=STEPS, learning_rate=1e-3, log_every=1, embedding_width=16, device="cpu", precision="fp32",
        warmup=1, eval_every=1000, save_every=1000,
    )  # fmt: skip
    run = RunFolder(settings.out)
    trainer = stage.build_trainer(settings, run, cache)
    trainer.model.double()
    read = cache.patch_features
    cache.patch_features = lambda *arguments: (read(*arguments)[0].double(), None)
    trainer.train()
    events = [event for event in run.events() if event["kind"] == "train"]
    return {name: [event[name] for event in events] for name in LOSSES}


CASES = {"scenes": scenes_cache, "flickr8k-mini": flickr_cache}


@pytest.mark.parametrize("name", CASES)
def test_first_steps_are_those_of_the_reference(name, tmp_path, shared_data):
    if name == "flickr8k-mini":
        shared_data("flickr8k-mini")
    found = first_losses(CASES[name], tmp_path)
    wanted = json.loads(REFERENCE.read_text())[name]
    for loss in LOSSES:
        assert found[loss] == pytest.approx(wanted[loss], rel=1e-5), loss


if __name__ == "__main__":
    import tempfile

    losses = json.loads(REFERENCE.read_text()) if REFERENCE.exists() else {}
    for case in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as scratch:
            losses[case] = first_losses(CASES[case], Path(scratch))
    REFERENCE.write_text(json.dumps(losses, indent=1) + "\n")
