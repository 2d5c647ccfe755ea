"""Each line of the doctor is tested by breaking what it proves."""

from pathlib import Path

import pytest
import torch
from tiny_models import QFORMER, make_llm, make_vision

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.cli import main
from blipren.training.commands.doctor import DoctorSettings
from blipren.training.doctor.checks import (
    CHECKS,
    CheckFailure,
    ModelUnderTest,
    check_batch_equals_single,
    check_dimensions,
    check_end_of_sequence,
    check_gradients,
    check_prompt,
    check_reload,
    check_sees_image,
    check_two_images,
    draw_test_images,
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return make_vision(root / "vision"), make_llm(root / "llm")


@pytest.fixture
def model_under_test(bases):
    torch.manual_seed(0)
    model = BliprenForConditionalGeneration.from_vision_text_pretrained(
        *bases, num_queries=4, qformer=QFORMER, dtype="float32"
    )
    processor = BliprenProcessor.from_vision_text_pretrained(*bases, num_queries=4)
    settings = DoctorSettings(model="x", steps=20, learning_rate=5e-3)
    return ModelUnderTest(model, processor, settings, *draw_test_images(0))


def test_a_trained_pair_passes_every_check(tmp_path, capsys):
    towers = (
        Path(__file__).resolve().parents[2] / "training" / "quickstart" / "towers"
    )  # a pair that was really trained
    vision, llm = str(towers / "vision"), str(towers / "llm")
    out = str(tmp_path / "model")
    qformer = "{hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4}"
    assert main(["new", out, "--vision", vision, "--llm", llm, "--queries", "8", "--qformer", qformer]) == 0
    assert main(["doctor", out]) == 0
    shown = capsys.readouterr().out
    assert all(f"ok   {name}" in shown for name in CHECKS)


def test_dimensions(model_under_test):
    model_under_test.processor.num_visual_tokens = 5
    with pytest.raises((CheckFailure, ValueError), match="4"):
        check_dimensions(model_under_test)


def test_infinite_features(model_under_test):
    model_under_test.model.model.projector.output_norm.weight.data[0] = float("inf")
    with pytest.raises(CheckFailure, match="not finite"):
        check_dimensions(model_under_test)


def test_end_of_sequence_that_generation_does_not_know(model_under_test):
    model_under_test.model.generation_config.eos_token_id = 77
    with pytest.raises(CheckFailure, match="would never stop"):
        check_end_of_sequence(model_under_test)


def test_answers_without_an_end(model_under_test, monkeypatch):
    whole = BliprenProcessor.encode_answer
    monkeypatch.setattr(BliprenProcessor, "encode_answer", lambda self, answer: whole(self, answer)[:-1])
    with pytest.raises(CheckFailure, match="0 end tokens"):
        check_end_of_sequence(model_under_test)


def test_prompts_that_differ_between_training_and_inference(model_under_test, monkeypatch):
    whole = BliprenProcessor.encode_prompt
    monkeypatch.setattr(BliprenProcessor, "encode_prompt", lambda self, *a, **k: whole(self, *a, **k) + [7])
    with pytest.raises(CheckFailure, match="in training and"):
        check_prompt(model_under_test)


def test_gradients_that_do_not_reach_the_connector(model_under_test):
    torch.nn.init.zeros_(model_under_test.model.model.projector.output_norm.weight)
    with pytest.raises(CheckFailure, match="no gradient reaches the qformer"):
        check_gradients(model_under_test)
    model_under_test.model.freeze(train=[])
    with pytest.raises((CheckFailure, RuntimeError)):
        check_gradients(model_under_test)


def test_a_language_model_that_ignores_its_mask(model_under_test, monkeypatch):
    forward = type(model_under_test.model.model.language_model).forward

    def without_mask(self, *args, attention_mask=None, **kwargs):
        return forward(self, *args, attention_mask=None, **kwargs)

    monkeypatch.setattr(type(model_under_test.model.model.language_model), "forward", without_mask)
    with pytest.raises(CheckFailure, match="does not honour the attention mask"):
        check_batch_equals_single(model_under_test)


def test_a_copy_that_lost_a_weight(model_under_test, monkeypatch):
    load = BliprenForConditionalGeneration.from_pretrained.__func__

    def lossy(cls, *args, **kwargs):
        model = load(cls, *args, **kwargs)
        torch.nn.init.zeros_(model.model.qformer.query_tokens)
        return model

    monkeypatch.setattr(BliprenForConditionalGeneration, "from_pretrained", classmethod(lossy))
    with pytest.raises(CheckFailure, match="differs by"):
        check_reload(model_under_test)


def test_a_model_that_ignores_its_image(model_under_test, monkeypatch):
    encode = model_under_test.model.encode_images
    monkeypatch.setattr(model_under_test.model, "encode_images", lambda *a, **k: torch.zeros_like(encode(*a, **k)))
    before = model_under_test.model.model.qformer.query_tokens.clone()
    with pytest.raises(CheckFailure, match="ignores its image"):
        check_sees_image(model_under_test)
    assert torch.equal(model_under_test.model.model.qformer.query_tokens, before)  # the check is undone


@pytest.mark.parametrize(("ignored", "place"), [(0, "first"), (1, "second")])
def test_a_model_that_ignores_one_image_of_two(model_under_test, monkeypatch, ignored, place):
    assert "exchanging the first changes the loss" in check_two_images(model_under_test)
    encode = model_under_test.model.model.get_image_features

    def ignore_one(*arguments, **options):
        found = encode(*arguments, **options)
        found.pooler_output[ignored] = torch.zeros_like(found.pooler_output[ignored])
        return found

    monkeypatch.setattr(model_under_test.model.model, "get_image_features", ignore_one)
    with pytest.raises(CheckFailure, match=f"exchanging the {place} of two images does not change the loss"):
        check_two_images(model_under_test)


def test_exit_status_1_with_the_reason(bases, tmp_path, capsys, monkeypatch):
    model = BliprenForConditionalGeneration.from_vision_text_pretrained(*bases, num_queries=4, qformer=QFORMER)
    model.generation_config.eos_token_id = 77
    model.save_pretrained(tmp_path)
    BliprenProcessor.from_vision_text_pretrained(*bases, num_queries=4).save_pretrained(tmp_path)
    monkeypatch.setattr("blipren.training.doctor.checks.CHECKS", {"end of sequence": check_end_of_sequence})
    assert main(["doctor", str(tmp_path)]) == 1
    assert "FAIL end of sequence" in capsys.readouterr().out
