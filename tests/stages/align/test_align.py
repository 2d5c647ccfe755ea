"""The align stage on a real, tiny cache: what a run leaves, gradient caching, resuming, what is refused."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, TrainerCallback

from blipren import BliprenForConditionalGeneration, BliprenForImageTextRetrieval, BliprenProcessor
from blipren.training.cli import main
from blipren.training.commands.evaluate import EvaluateSettings
from blipren.training.data.batches.pairs import CaptionPairs
from blipren.training.data.cache import FeatureCache
from blipren.training.engine.run_folder import RunFolder
from blipren.training.errors import UserError
from blipren.training.evaluation.metrics.retrieval import matcher
from blipren.training.stages import align as stage
from blipren.training.stages.align_start import parameter_groups, starting_point


def trainer_of(settings):
    return stage.build_trainer(settings, RunFolder(settings.out))


def summary_of(settings) -> dict:
    """Run the stage to its end. Returns what it says of itself."""
    assert stage.align(settings) == 0
    return RunFolder(settings.out).finished()


def without_dropout(trainer):
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    return trainer


@pytest.fixture(scope="module")
def run(untrained, cache, bases, tmp_path_factory):
    """One finished run: (settings, summary)."""
    settings = stage.AlignSettings(
        model=str(untrained), cache=str(cache), out=str(tmp_path_factory.mktemp("run") / "out"),
        tokenizer=bases["tokenizer"], embedding_width=16, batch_size=24, max_steps=60, learning_rate=3e-3, log_every=10,
        eval_every=30, max_text_tokens=16, device="cpu", itc_label_smoothing=0.0, seed=1,
    )  # fmt: skip
    return settings, summary_of(settings)


def test_a_run_learns_and_logs(run):
    settings, summary = run
    assert summary["after"]["recall"] > summary["before"]["recall"] + 0.1
    assert summary["after"]["recall"] > summary["after"]["chance"] + 0.1
    events = [json.loads(line) for line in open(f"{settings.out}/log.jsonl")]
    train = [event for event in events if event["kind"] == "train"]
    assert {"itc", "itm", "itg", "temperature", "itc_accuracy", "itm_accuracy", "grad_norm", "grad_norm_body",
            "grad_norm_new", "learning_rate", "loss", "seconds"} <= set(train[-1])  # fmt: skip
    assert train[-1]["itc"] < train[0]["itc"]
    assert train[-1]["itg"] < 0.7 * train[0]["itg"]
    total = train[-1]["itc"] + train[-1]["itm"] + train[-1]["itg"]
    assert train[-1]["loss"] == pytest.approx(total, rel=1e-4)
    assert [e["step"] for e in events if e["kind"] == "validation"] == [0, 30, 60]
    best = max(e["recall"] for e in events if e["kind"] == "validation" and e["step"])
    assert summary["after"]["recall"] == best
    curves = json.loads(Path(settings.out, "curves.json").read_text())
    assert {"train itc", "train temperature", "validation recall"} <= set(curves)
    assert os.path.exists(f"{settings.out}/curves.png")


def test_the_best_model_is_the_one_that_is_left(run, cache):
    settings, summary = run
    model = BliprenForImageTextRetrieval.from_pretrained(settings.out).eval()
    tokenizer = BliprenProcessor.from_pretrained(settings.out).qformer_tokenizer
    opened = FeatureCache.open(cache)
    pairs = CaptionPairs(opened.split("validation"), tokenizer, 16)
    assert stage.recall_function(settings, opened, pairs, tokenizer)(model)["recall"] == summary["after"]["recall"]


def test_the_next_stage_goes_on_from_it(run, untrained):
    settings, _ = run
    aligned = BliprenForImageTextRetrieval.from_pretrained(settings.out)
    generator = BliprenForConditionalGeneration.from_pretrained(settings.out)
    begun = BliprenForConditionalGeneration.from_pretrained(untrained)
    for name, weight in aligned.model.qformer.state_dict().items():
        assert torch.equal(generator.model.qformer.state_dict()[name], weight), name
    for part in ("vision_tower", "projector", "language_model"):
        for name, weight in getattr(begun.model, part).state_dict().items():
            assert torch.equal(getattr(generator.model, part).state_dict()[name], weight), f"{part}.{name} moved"
    assert generator.config.base_models == begun.config.base_models
    processor = BliprenProcessor.from_pretrained(settings.out)
    assert processor.qformer_tokenizer("a red circle")["input_ids"] == [3, 6, 10, 14, 4]
    assert processor.encode_prompt(num_visual_tokens=[4])


def test_a_finished_run_is_not_repeated(run, capsys):
    settings, summary = run
    assert summary_of(settings) == summary
    assert f"is finished: {summary['steps']} steps" in capsys.readouterr().out


@pytest.mark.parametrize("itc", ["softmax", "sigmoid"])
def test_pieces_give_the_gradient_of_the_whole(settings, tmp_path, itc):
    """All three losses of 12 rows, held whole and five at a time: the same loss, the same gradient of every weight."""
    found = []
    for name, size in (("whole", None), ("pieces", 5)):
        trainer = without_dropout(trainer_of(settings(out=str(tmp_path / name), micro_batch_size=size, itc=itc)))
        trainer.model.double()
        batch = trainer.train_dataset[0]
        batch["patch_features"] = batch["patch_features"].double()
        loss = trainer.training_step(trainer.model, batch)
        found.append((loss.item(), {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}))
    (whole, wanted), (pieces, gradients) = found
    assert pieces == pytest.approx(whole, rel=1e-9)
    for name, gradient in wanted.items():
        assert gradient is not None, f"{name} has no gradient: a distributed run would wait for it"
        assert torch.allclose(gradients[name], gradient, atol=1e-10), name


def test_matching_uses_no_true_pair(settings):
    """Two pictures in three share their captions with others: what is drawn as a negative is never one of them."""
    trainer = trainer_of(settings(batch_size=40, learning_rate=1e-4))
    pairs = trainer.train_dataset.pairs
    batch = trainer.train_dataset[0]
    with torch.no_grad():
        contrast = trainer.contrast(*trainer.encode(trainer.model, batch), batch, *trainer.temperature())
    texts, images = trainer.negatives(contrast)
    assert (texts >= 0).all()
    for row, (text, image) in enumerate(zip(texts.tolist(), images.tolist(), strict=True)):
        assert batch["text_ids"][text] != batch["text_ids"][row]
        assert batch["image_ids"][text] != batch["image_ids"][row]
        assert batch["text_ids"][image] != batch["text_ids"][row]
    captions = {pairs.text_ids[n]: pairs.texts[n].lower() for n in range(len(pairs))}
    assert len(captions) == len(set(captions.values())) < len(pairs), "equal captions have one id"


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **keywords):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_killed_run_ends_with_the_weights_of_one_never_killed(settings, tmp_path, monkeypatch, capsys):
    changes = {"max_steps": 5, "ema": 0.9, "feature_dropout": 0.2, "micro_batch_size": 7}
    stage.align(settings(out=str(tmp_path / "whole"), **changes))
    build_trainer = stage.build_trainer

    def with_kill(*arguments):
        trainer = build_trainer(*arguments)
        trainer.add_callback(KillAt(2))  # noticed at the end of the step after it
        return trainer

    monkeypatch.setattr(stage, "build_trainer", with_kill)
    assert stage.align(settings(out=str(tmp_path / "killed"), **changes)) == 130
    assert "interrupted: saved at step 3" in capsys.readouterr().out
    monkeypatch.setattr(stage, "build_trainer", build_trainer)
    assert stage.align(settings(out=str(tmp_path / "killed"), **changes)) == 0
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(killed[name], weight) for name, weight in whole.items())
    steps = [json.loads(line)["step"] for line in open(tmp_path / "killed" / "log.jsonl") if '"train"' in line]
    assert steps == [1, 2, 3, 4, 5]


def test_a_run_of_limited_time_ends(settings):
    summary = summary_of(settings(max_steps=None, max_minutes=0.03, eval_every=1000))
    assert 0 < summary["steps"] < 1000
    assert summary["after"]["step"] == summary["steps"], "the last weights were judged"


def test_start_from_bert(settings, untrained, bases, tmp_path):
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    bert = BertModel(BertConfig(vocab_size=26, max_position_embeddings=40, **sizes))
    bert.save_pretrained(tmp_path / "bert")
    model, processor, tokenizer = starting_point(settings(qformer_init=str(tmp_path / "bert")))
    qformer = model.model.qformer
    assert torch.equal(qformer.word_embeddings.weight, bert.embeddings.word_embeddings.weight)
    layer = bert.encoder.layer[1]
    assert torch.equal(qformer.layers[1].self_attention.query.weight, layer.attention.self.query.weight)
    assert torch.equal(qformer.layers[1].text_feed_forward.fc1.weight, layer.intermediate.dense.weight)
    assert torch.equal(qformer.layers[1].query_feed_forward.fc1.weight, layer.intermediate.dense.weight)
    groups = parameter_groups(model, settings(new_learning_rate=1e-2))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(qformer.layers[0].self_attention.query.weight)] == 1e-3
    for new in (qformer.query_tokens, qformer.layers[0].cross_attention.key.weight, model.itm_head.weight):
        assert rates[id(new)] == 1e-2
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(rates) == len(trained), "every trained weight is in one group"
    undecayed = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert {id(qformer.query_tokens), id(model.logit_scale), id(qformer.norm.weight)} <= undecayed


def test_what_is_refused(settings, untrained, bases, tmp_path):
    with pytest.raises(UserError, match="no tokenizer for the Q-Former's text side"):
        stage.align(settings(tokenizer=None))
    with pytest.raises(UserError, match="has no cls_token"):
        stage.align(settings(tokenizer=bases["llm"], out=str(tmp_path / "b")))
    with pytest.raises(UserError, match="no tokenizer in"):
        stage.align(settings(tokenizer=str(tmp_path / "nowhere"), out=str(tmp_path / "c")))
    patches = tmp_path / "patches"
    BliprenForConditionalGeneration.from_vision_text_pretrained(
        bases["vision"], bases["llm"], connector="patches", projector="linear"
    ).save_bridge(patches)
    processor = BliprenProcessor.from_pretrained(untrained)
    processor.num_visual_tokens = 16
    processor.save_pretrained(patches)
    with pytest.raises(UserError, match="connector of this model is 'patches'"):
        stage.align(settings(model=str(patches), out=str(tmp_path / "d")))
    with pytest.raises(UserError, match="loss weights"):
        settings(itc_weight=0, itm_weight=0, itg_weight=0)


def test_evaluate_retrieval(run, scenes, tmp_path):
    """`blipren evaluate --tasks retrieval` on the same pictures gives the recall that training saw."""
    from blipren.training.evaluation.evaluate import evaluate

    settings, summary = run
    evaluate(
        EvaluateSettings(
            model=settings.out, dataset=str(scenes), out=str(tmp_path), tasks=["retrieval"], rerank=4, report=False,
            split="validation", device="cpu", caption_columns=["captions"],
        )
    )  # fmt: skip
    metrics = json.loads((tmp_path / "metrics.json").read_text())["retrieval"]
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    first = [row["image_to_text_rank"] == 1 for row in rows]
    assert metrics["image_to_text"]["R@1"] == pytest.approx(sum(first) / len(first))
    own = [rank <= 5 for row in rows for rank in row["text_to_image_ranks"]]
    assert metrics["text_to_image"]["R@5"] == pytest.approx(sum(own) / len(own))
    low, high = metrics["intervals"]["text_to_image.R@5"]
    assert low <= metrics["text_to_image"]["R@5"] <= high
    for short, way in (("i2t", "image_to_text"), ("t2i", "text_to_image")):
        for k in (1, 5, 10):
            assert metrics[way][f"R@{k}"] == summary["after"][f"{short}_R@{k}"]
            assert 0 <= metrics["reranked"][way][f"R@{k}"] <= 1
    assert metrics["counts"]["images"] == 8
    assert metrics["counts"]["captions"] == 16
    assert metrics["encoder_zero_shot"] is None, "the encoder has no text tower"
    assert {"embed_images", "embed_texts", "search", "rerank"} == set(metrics["seconds"])
    assert (tmp_path / "similarity.png").stat().st_size > 5000


def test_evaluate_refuses_what_needs_an_untrained_head(settings, run, scenes, tmp_path, capsys):
    """A checkpoint says which heads its runs trained; a conversion keeps that, and a second run adds to it."""

    def evaluate(model, *options: str) -> tuple[int, str]:
        out = tmp_path / f"results-{len(list(tmp_path.iterdir()))}"
        command = ["evaluate", str(model), str(scenes), str(out), "--tasks", "retrieval", "--split", "validation"]
        status = main([*command, "--caption-columns", "captions", "--device", "cpu", "--no-report", *options])
        return status, capsys.readouterr().err

    def trained_heads(folder) -> list[str]:
        return json.loads(Path(folder, "config.json").read_text())["trained_heads"]

    assert trained_heads(run[0].out) == ["contrast", "matching", "generation"]
    contrast_only, more, matching_only = (str(tmp_path / name) for name in ("contrast", "more", "matching"))
    stage.align(settings(out=contrast_only, itm_weight=0, itg_weight=0, max_steps=2))
    assert trained_heads(contrast_only) == ["contrast"]
    full = tmp_path / "full"
    assert main(["convert", contrast_only, str(full)]) == 0
    assert trained_heads(full) == ["contrast"]
    for folder in (contrast_only, full):
        assert evaluate(folder)[0] == 0
        status, error = evaluate(folder, "--rerank", "4")
        assert status == 1 and "the matching head of this model was never trained" in error
        assert "--itm-weight 1" in error and error.count("\n") == 1
    stage.align(settings(model=contrast_only, out=more, tokenizer=None, itc_weight=0, itg_weight=0, max_steps=2))
    assert trained_heads(more) == ["contrast", "matching"]
    assert evaluate(more, "--rerank", "4")[0] == 0
    stage.align(settings(out=matching_only, itc_weight=0, itg_weight=0, max_steps=2))
    status, error = evaluate(matching_only)
    assert status == 1 and "the contrast head of this model was never trained" in error
    older = json.loads((full / "config.json").read_text())
    del older["trained_heads"]
    (full / "config.json").write_text(json.dumps(older))
    assert evaluate(full, "--rerank", "4")[0] == 0  # unknown


def test_matcher_equals_the_model(run, cache):
    settings, _ = run
    model = BliprenForImageTextRetrieval.from_pretrained(settings.out).eval()
    tokenizer = BliprenProcessor.from_pretrained(settings.out).qformer_tokenizer
    opened = FeatureCache.open(cache)
    texts = ["a red circle", "the big blue star above two dogs", "dogs"]
    match = matcher(model, tokenizer, lambda i: opened.patch_features("validation", i), texts, batch_size=2)
    found = match(torch.tensor([3, 3, 0]), torch.tensor([1, 0, 2]))
    with torch.no_grad():
        for value, image, text in zip(found, (3, 3, 0), (1, 0, 2), strict=True):
            alone = tokenizer([texts[text]], return_tensors="pt", return_token_type_ids=False)
            patches = opened.patch_features("validation", [image])[0]
            logits = model(**alone, patch_features=patches, objective="itm").logits[0]
            assert value.item() == pytest.approx((logits[1] - logits[0]).item(), abs=1e-5)


def test_train_goes_on_from_it(run, cache, tmp_path):
    """`blipren train` takes an align checkpoint as it takes a new one; the connector begins where stage 1 ended."""
    from blipren.training.commands.train import TrainSettings
    from blipren.training.stages.train import train

    settings, _ = run
    train(
        TrainSettings(
            model=settings.out, cache=str(cache), out=str(tmp_path / "out"), max_steps=2, batch_size=8, device="cpu",
            generate_samples=0, learning_rate=1e-3,
        )
    )  # fmt: skip
    fresh = BliprenForConditionalGeneration.from_pretrained(settings.out)
    text = {n for n, p in fresh.model.qformer.named_parameters() if not p.requires_grad}
    assert {n.split(".")[-2] for n in text} >= {"word_embeddings", "position_embeddings", "fc1"}
    assert all("word_" in n or "position_" in n or "text_feed_forward" in n for n in text), (
        "nothing reads the text side"
    )
    begun = BliprenForImageTextRetrieval.from_pretrained(settings.out).model.qformer.state_dict()
    trained = BliprenForConditionalGeneration.from_pretrained(tmp_path / "out").model.qformer.state_dict()
    moved = {name for name, weight in trained.items() if not torch.equal(weight, begun[name])}
    assert "query_tokens" in moved
    assert not moved & text
    assert max((trained[name] - begun[name]).abs().max().item() for name in trained) < 0.01
