"""What `blipren train` trains: connector, LoRA, all of the language model, beside one in few bits."""

import json

import pytest
import torch
from safetensors.torch import load_file

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.engine import optimizer, trained_parts
from blipren.training.errors import UsageError, UserError
from blipren.training.stages import train as caption
from tests import tiny_models
from tests.stages.tools import events, make_model, weights


def logits_of(model):
    torch.manual_seed(0)
    n = model.config.num_visual_tokens
    ids = torch.tensor([[model.config.image_token_id] * n + [5, 6, 7]])
    features = torch.randn(1, 16, model.config.vision_hidden_size)
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), patch_features=features).logits


def test_lora_saves_with_the_bridge_and_reloads(settings, tmp_path, model_dir):
    caption.train(settings(llm_tuning="lora", keep_best="last", learning_rates={"llm": 1e-2}))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert not [name for name in weights(tmp_path / "run") if "language_model" in name]
    before, after = (BliprenForConditionalGeneration.from_pretrained(p) for p in (model_dir, tmp_path / "run"))
    trained = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-6" / "trained.safetensors")
    state = after.state_dict()
    adapters = [n for n in trained if "lora_" in n]
    assert len(adapters) == 2 * 7 * 2  # two layers, seven linears, A and B
    assert all(torch.equal(trained[n], state[n]) for n in adapters)
    assert any(trained[n].abs().sum() > 0 for n in adapters if "lora_B" in n)
    assert not torch.equal(logits_of(before), logits_of(after))
    trained_parts.merge_lora(after)
    torch.testing.assert_close(
        logits_of(after),
        logits_of(BliprenForConditionalGeneration.from_pretrained(tmp_path / "run")),
        rtol=1e-4,
        atol=1e-5,
    )


def test_merged_lora_is_a_full_checkpoint_with_equal_logits(settings, tmp_path):
    caption.train(settings(llm_tuning="lora", keep_best="last", learning_rates={"llm": 1e-2}))
    caption.train(
        settings(llm_tuning="lora", keep_best="last", learning_rates={"llm": 1e-2}, full=True, merge_lora=True,
                 out=str(tmp_path / "merged"))
    )  # fmt: skip
    assert not (tmp_path / "merged" / "adapter").exists()
    models = [BliprenForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("run", "merged")]
    torch.testing.assert_close(*map(logits_of, models), rtol=1e-4, atol=1e-5)


def test_full_tuning_trains_the_llm_and_saves_everything(settings, tmp_path, model_dir):
    caption.train(settings(llm_tuning="full", keep_best="last", gradient_checkpointing=True))
    before, after = (
        BliprenForConditionalGeneration.from_pretrained(p).state_dict() for p in (model_dir, tmp_path / "run")
    )
    names = [n for n in before if "language_model.layers" in n and n.endswith("proj.weight")]
    assert names and all(not torch.equal(before[n], after[n]) for n in names)
    assert all(torch.equal(before[n], after[n]) for n in before if "vision_tower" in n)


@pytest.mark.parametrize("tuned", [{"llm_tuning": "full"}, {"llm_tuning": "lora", "full": True, "merge_lora": True}])
def test_a_frozen_run_keeps_the_language_model_that_an_earlier_run_trained(plain_two_steps, tuned):
    first = plain_two_steps(f"first-{tuned['llm_tuning']}", **tuned)
    second = plain_two_steps(f"second-{tuned['llm_tuning']}", model=str(first))
    config = json.loads((second / "config.json").read_text())
    assert config["checkpoint_type"] == "bridge" and config["base_models"]["llm"]["trained"]
    before, after = (BliprenForConditionalGeneration.from_pretrained(p).state_dict() for p in (first, second))
    frozen = [n for n in before if "language_model" in n or "lm_head" in n or "vision_tower" in n]
    assert frozen and all(torch.equal(before[n], after[n]) for n in frozen)
    assert any(not torch.equal(before[n], after[n]) for n in before if "qformer" in n)


def test_run_from_a_full_checkpoint_without_its_base_models_writes_a_full_one(
    plain_two_steps, model_dir, tmp_path, capsys
):
    full = tmp_path / "full"
    model = BliprenForConditionalGeneration.from_pretrained(model_dir)
    for part, base in model.config.base_models.items():
        base["id"] = str(tmp_path / f"no-{part}")
    model.save_pretrained(full)
    BliprenProcessor.from_pretrained(model_dir).save_pretrained(full)
    run = plain_two_steps("without-bases", model=str(full))
    assert "a full checkpoint is written, since" in capsys.readouterr().out
    BliprenForConditionalGeneration.from_pretrained(run)
    assert json.loads((run / "config.json").read_text())["checkpoint_type"] == "full"


def test_gradient_checkpointing_gives_the_same_weights(settings, tmp_path, deterministic_model, monkeypatch):
    values = dict(model=str(deterministic_model), max_steps=2, keep_best="last")
    recomputed, checkpoint = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda f, *a, **k: recomputed.append(f) or checkpoint(f, *a, **k)
    )
    caption.train(settings(**values))
    assert not recomputed
    caption.train(settings(**values, gradient_checkpointing=True, out=str(tmp_path / "other")))
    assert recomputed
    for name, tensor in weights(tmp_path / "run").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "other")[name])


def test_frozen_qformer_and_learning_rate_groups(model_dir, settings):
    model = BliprenForConditionalGeneration.from_pretrained(model_dir)
    trained_parts.choose_trained(model, settings(train_qformer=False))
    model.train()
    assert not any(p.requires_grad for p in model.model.qformer.parameters())
    assert not any(m.training for m in model.model.qformer.modules())
    assert all(p.requires_grad for p in model.model.projector.parameters())

    s = settings(learning_rates={"projector": 7e-3, "llm": 1e-5}, llm_tuning="full")
    trained_parts.choose_trained(model, s)
    groups = optimizer.parameter_groups(model, s)
    rates = {g["part"]: g["lr"] for g in groups}
    assert rates == {"qformer": 3e-3, "projector": 7e-3, "llm": 1e-5}
    named = {name: g for g in groups for name in g["names"]}
    assert set(named) == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, group in named.items():
        bare = name.endswith("bias") or "norm" in name or "query_tokens" in name or "embed" in name
        assert group["weight_decay"] == (0.0 if bare else s.weight_decay), name


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon, with which it is compared, from 2.9 on")
def test_muon_updates_the_matrices_of_the_connector_and_adamw_the_rest(model_dir, settings):
    """A step is that of torch's own two optimizers, each on its weights."""
    model = BliprenForConditionalGeneration.from_pretrained(model_dir)
    s = settings(optimizer="muon", muon_momentum=0.8, muon_learning_rate=2e-2, llm_tuning="full", weight_decay=0.1)
    trained_parts.choose_trained(model, s)
    groups = optimizer.parameter_groups(model, s)
    optimizer.mark_matrices(groups, s)
    matrices = {name for group in groups if group.get("muon") for name in group["names"]}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert matrices == {
        n
        for n, p in trained.items()
        if p.ndim == 2 and n.startswith(("model.qformer.", "model.projector.")) and "embed" not in n
    }
    torch.manual_seed(0)
    for parameter in trained.values():
        parameter.grad = torch.randn_like(parameter)
    copies = {n: torch.nn.Parameter(p.detach().clone()) for n, p in trained.items()}
    for name, copy in copies.items():
        copy.grad = trained[name].grad.clone()
    theirs = [
        torch.optim.Muon(
            [copies[n] for n in matrices], 2e-2, weight_decay=0.1, momentum=0.8, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [{**g, "params": [copies[n] for n in g["names"]]} for g in groups if not g.get("muon")],
            betas=(0.9, 0.98),
        ),
    ]
    ours = optimizer.MuonWithAdamW(groups, (0.9, 0.98), 1e-8)
    for _ in range(3):
        for each in (ours, *theirs):
            each.step()
    assert [name for name in copies if not torch.equal(copies[name], trained[name])] == []


@pytest.mark.parametrize("tuning_mode, bits", [("frozen", 8), ("frozen", 4), ("lora", 4)])
def test_bridge_trains_beside_a_language_model_in_few_bits(settings, tmp_path, tuning_mode, bits, bases):
    pytest.importorskip("bitsandbytes")
    llm = tiny_models.make_llm(tmp_path / "llm", hidden_size=64, intermediate_size=128)  # a block of 4 bits is 64 wide
    start = make_model(tmp_path / "start", bases[0], llm)
    run = settings(model=str(start), llm_tuning=tuning_mode, max_steps=6, learning_rate=1e-2, log_every=1)
    few = type(run)(**run.__dict__ | {"llm_bits": bits, "out": str(tmp_path / "few")})
    caption.train(run)
    caption.train(few)
    losses, few_losses = ([e["loss"] for e in events(tmp_path / name, "train")] for name in ("run", "few"))
    assert few_losses[0] == pytest.approx(losses[0], rel=0.05) and few_losses[0] != losses[0]  # rounded, and really so
    assert few_losses[-1] < few_losses[0]
    assert events(tmp_path / "few", "train")[0]["grad_norm"] == pytest.approx(
        events(tmp_path / "run", "train")[0]["grad_norm"], rel=0.3
    )  # it reaches the bridge
    model = BliprenForConditionalGeneration.from_pretrained(tmp_path / "few")
    before = BliprenForConditionalGeneration.from_pretrained(start).state_dict()
    after = {n.replace(".base_layer.", "."): t for n, t in model.state_dict().items()}
    assert all(torch.equal(before[n], after[n]) for n in before if "language_model" in n)


@pytest.mark.parametrize("tuning_mode, projector", [("frozen", "mlp"), ("lora", "mlp"), ("frozen", "moe")])
def test_a_language_model_that_lets_no_gradient_through_is_refused(
    settings, tmp_path, bases, monkeypatch, tuning_mode, projector
):
    def without_gradient(model, precision):
        language_model = model.parts()["llm"]
        language_model.forward = torch.no_grad()(language_model.forward)

    monkeypatch.setattr(caption, "set_precision", without_gradient)
    with pytest.raises(UserError, match="no gradient reaches the projector"):
        caption.train(
            settings(model=str(make_model(tmp_path / "m", *bases, projector=projector)), llm_tuning=tuning_mode)
        )


def test_few_bits_cannot_be_trained_fully(settings):
    with pytest.raises(UsageError, match="cannot be trained fully"):
        settings(llm_bits=4, llm_tuning="full")
