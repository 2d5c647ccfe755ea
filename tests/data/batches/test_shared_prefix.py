"""Which language models take a shared prefix, found by trying; the others get padded rows and a line that says why."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from blipren.training.data.batches import shared_prefix as prefix

SIZES = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


class Holder(torch.nn.Module):
    """What `unsupported_reason` reads of a model: its language model and the text config."""

    def __init__(self, family, **values):
        super().__init__()
        torch.manual_seed(0)
        text_config = AutoConfig.for_model(family, **SIZES | values)
        self.llm = AutoModel.from_config(text_config).eval()
        for p in self.llm.parameters():
            p.data.add_(torch.randn_like(p), alpha=0.1)
        self.config = type("Config", (), {"text_config": text_config})()

    def parts(self):
        return {"llm": self.llm}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "phi", "olmo2"])
def test_families_that_can(family):
    extra = {"head_dim": 8, "num_key_value_heads": 2} if family == "qwen3" else {}
    assert prefix.unsupported_reason(Holder(family, **extra), longest=50) is None


@pytest.mark.parametrize("window, can", [(64, True), (16, False)])
def test_a_window_must_be_longer_than_a_row(window, can):
    reason = prefix.unsupported_reason(Holder("mistral", num_key_value_heads=2, sliding_window=window), longest=40)
    assert (reason is None) == can
    assert can or "window of 16 tokens is shorter than the longest row of 40" in reason


def test_a_window_that_is_switched_off_does_not_count():
    assert prefix.attention_window(AutoConfig.for_model("qwen2", sliding_window=8)) is None


def test_recurrent_layers_carry_one_answer_into_the_next():
    layers = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "num_key_value_heads": 2}
    reason = prefix.unsupported_reason(Holder("lfm2", **layers), longest=40)
    assert reason is not None and "pass states from one answer to the next" in reason


def test_alibi_takes_no_mask():
    assert prefix.unsupported_reason(Holder("bloom", n_layer=2, n_head=4), longest=40) is not None
