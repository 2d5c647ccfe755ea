"""`blipren new --qformer-init ALIGNED`: the Q-Former of one stage 1 under another language model."""

import json

import pytest
import torch
from safetensors.torch import load_file

from blipren import BliprenForConditionalGeneration, BliprenForImageTextRetrieval, BliprenProcessor
from blipren.training.cli import main
from blipren.training.stages.align import align
from tests.tiny_models import QFORMER, make_llm, make_vision


@pytest.fixture(scope="module")
def aligned(untrained, cache, bases, tmp_path_factory):
    """A run of `align` of a few steps."""
    from blipren.training.commands.align import AlignSettings

    out = tmp_path_factory.mktemp("aligned") / "run"
    settings = dict(model=str(untrained), cache=str(cache), out=str(out), tokenizer=bases["tokenizer"])
    assert align(AlignSettings(**settings, max_steps=6, batch_size=16, eval_every=6, max_text_tokens=12)) == 0
    return out


@pytest.fixture(scope="module")
def other_llm(tmp_path_factory):
    """A language model of another family, width and vocabulary, with a chat template."""
    return make_llm(tmp_path_factory.mktemp("other"), "qwen2", chat=True, hidden_size=48, intermediate_size=64)


def test_one_stage_1_serves_another_language_model(aligned, other_llm, cache, scenes, bases, tmp_path, capsys):
    out = tmp_path / "other"
    assert main(["new", str(out), "--llm", str(other_llm), "--qformer-init", str(aligned)]) == 0
    assert "Q-Former, text side, its tokenizer and heads from" in capsys.readouterr().out
    theirs, ours = load_file(aligned / "model.safetensors"), load_file(out / "model.safetensors")
    for name, value in theirs.items():
        if not name.startswith("model.projector."):
            assert torch.equal(value, ours[name]), name
    retrieval = BliprenForImageTextRetrieval.from_pretrained(out)
    assert retrieval.config.text_config.model_type == "qwen2"
    processor, aligned_processor = BliprenProcessor.from_pretrained(out), BliprenProcessor.from_pretrained(aligned)
    assert (
        processor.qformer_tokenizer("a red circle")["input_ids"]
        == aligned_processor.qformer_tokenizer("a red circle")["input_ids"]
    )
    assert processor.image_processor.to_dict() == aligned_processor.image_processor.to_dict()
    # retrieval needs no training, and captioning goes on from it on the cache of the first language model
    evaluate = ["evaluate", str(out), str(scenes), str(tmp_path / "results"), "--tasks", "retrieval"]
    assert main([*evaluate, "--split", "validation", "--no-report"]) == 0
    train = ["train", str(out), str(cache), str(tmp_path / "run"), "--max-steps", "2", "--batch-size", "4"]
    assert main([*train, "--device", "cpu"]) == 0
    model = BliprenForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert model.config.text_config.model_type == "qwen2" and model.get_input_embeddings().weight.shape[1] == 48


def test_the_projector_is_new_and_the_same_as_without_the_start(aligned, other_llm, bases, tmp_path):
    """So a run with the start and one without it differ in the Q-Former alone."""
    same = ["--llm", str(other_llm), "--seed", "3"]
    assert main(["new", str(tmp_path / "a"), *same, "--qformer-init", str(aligned)]) == 0
    qformer = QFORMER | {"initializer_range": 0.2, "query_init_std": 1.0, "use_text": True, "vocab_size": 26}
    qformer |= {"max_position_embeddings": 12}
    shape = ["--vision", bases["vision"], "--queries", "4", "--qformer", json.dumps(qformer)]
    assert main(["new", str(tmp_path / "b"), *same, *shape]) == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], value) for name, value in b.items() if name.startswith("model.projector."))
    assert not torch.equal(a["model.qformer.query_tokens"], b["model.qformer.query_tokens"])


def test_what_does_not_fit_is_refused_with_the_difference(aligned, untrained, other_llm, bases, tmp_path, capsys):
    start = ["new", str(tmp_path / "out"), "--llm", str(other_llm), "--qformer-init", str(aligned)]

    def refused(*more, status=1):
        assert main([*start, *more]) == status
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    other_weights = make_vision(tmp_path / "vision", seed=7)
    error = refused("--vision", str(other_weights))
    assert "has other weights" in error and bases["vision"] in error and str(other_weights) in error
    assert "queries is 16, and 4 in" in refused("--queries", "16")
    assert "vision_feature_layer is [-2], and [-1] in" in refused("--vision-feature-layer", "-2")
    assert "qformer hidden_size is 64, and 32 in" in refused("--qformer", "{hidden_size: 64}")
    assert "connector is 'patches', and 'qformer' in" in refused("--connector", "patches")
    assert "image_processor image_mean is" in refused("--image-processor", "{image_mean: [0.4, 0.4, 0.4]}")
    start[-1] = str(untrained)
    assert "is not a checkpoint of `blipren align`" in refused()
    start[-1] = bases["tokenizer"]
    assert main([*start]) == 1
    assert main(start[:-2]) == 2
    assert "needs --vision" in capsys.readouterr().err
