"""CLIPScore and SigLIPScore by the formula, and through the evaluate command."""

import json

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel, ViTImageProcessor

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.commands.evaluate import EvaluateSettings
from blipren.training.evaluation.evaluate import evaluate
from blipren.training.evaluation.metrics.clip_score import CLIP_PROMPT, TwoTowers, clip_scores, load_towers
from tests.evaluation.conftest import colour_picture
from tests.tiny_models import QFORMER, make_llm, make_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module", params=["clip", "siglip"])
def encoder(request, tmp_path_factory):
    """Folder of a tiny random encoder with a text tower."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = make_tokenizer()
    text = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 40, "pad_token_id": 0, "eos_token_id": 2}
    vision = SIZES | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    if request.param == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    else:
        model = SiglipModel(SiglipConfig(text_config=text | {"projection_size": 32}, vision_config=vision))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_scores_are_the_formula(encoder):
    towers = TwoTowers.load(str(encoder))
    photos = [colour_picture(i) for i in range(3)]
    captions, references = ["A red ball .", "dogs", "blue"], [["a ball"], ["A dog .", "two dogs"], ["a blue one"]]
    scores = clip_scores(
        towers, [(photos[:2], captions[:2], references[:2]), (photos[2:], captions[2:], references[2:])]
    )
    name = towers.name
    assert name == ("CLIPScore" if towers.is_clip else "SigLIPScore") and set(scores) == {name, f"Ref{name}"}

    def text(written):
        if towers.is_clip:
            tokens = towers.tokenizer([CLIP_PROMPT + written], return_tensors="pt")
            inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        else:
            tokens = towers.tokenizer([written.lower()], padding="max_length", max_length=40, return_tensors="pt")
            inputs = {"input_ids": tokens["input_ids"]}
        with torch.no_grad():
            output = towers.model.get_text_features(**inputs)
        output = getattr(output, "pooler_output", output)[0]
        return output / output.norm()

    for i in range(3):
        image = towers.embed_images([photos[i]])[0]
        plain = 2.5 * max(float(image @ text(captions[i])), 0)
        nearest = max(max(float(text(captions[i]) @ text(r)) for r in references[i]), 0)
        assert scores[name][i] == pytest.approx(plain, abs=1e-5)
        expected = 2 * plain * nearest / (plain + nearest) if plain + nearest else 0
        assert scores[f"Ref{name}"][i] == pytest.approx(expected, abs=1e-5)


def test_evaluate_reports_it_where_there_is_a_text_tower(encoder, colours, tmp_path):
    llm = make_llm(tmp_path / "llm")
    model = BliprenForConditionalGeneration.from_vision_text_pretrained(encoder, llm, num_queries=2, qformer=QFORMER)
    model.save_pretrained(tmp_path / "model")
    BliprenProcessor.from_vision_text_pretrained(encoder, llm, num_queries=2).save_pretrained(tmp_path / "model")
    evaluate(
        EvaluateSettings(
            model=str(tmp_path / "model"), dataset=str(colours), out=str(tmp_path / "out"), meteor=False, resamples=20,
            max_new_tokens=3, device="cpu", probe=False, attention_images=0, limit=6,
        )
    )  # fmt: skip
    captioning = json.loads((tmp_path / "out" / "metrics.json").read_text())["captioning"]
    name = "CLIPScore" if "clip" == model.config.vision_config.model_type.split("_")[0] else "SigLIPScore"
    low, high = captioning["intervals"][name]
    assert low <= captioning[name] <= high and f"Ref{name}" in captioning
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert sum(row[name] for row in rows) / len(rows) == pytest.approx(captioning[name], abs=1e-4)
    model.config.base_models["vision"]["id"] = str(tmp_path / "gone")
    assert load_towers(model) is None
