"""Assisted generation with images gives the tokens of greedy generation, and assistants see the right prompt."""

import pytest
import torch
from tiny_models import make_llm, random_image
from transformers import AutoModelForCausalLM, AutoTokenizer

SETTINGS = {"max_new_tokens": 12, "min_new_tokens": 12}
QUESTION = "What colour is the small ball ?"


@pytest.fixture(scope="module", params=["llama", "opt", "spare rows"])
def prepared(request, pair, tmp_path_factory):
    """Model, inputs, greedy tokens, and a text-only assistant; the placeholder lies inside the vocabulary or beyond it."""
    family, values = ("llama", {"vocab_size": 400}) if request.param == "spare rows" else (request.param, {})
    model, processor = pair(llm=family, llm_values=values)
    assert (model.config.image_token_id < model.config.text_config.vocab_size) == (request.param == "spare rows")
    inputs = processor(images=[random_image(0), random_image(1)], text=QUESTION, return_tensors="pt")
    folder = make_llm(tmp_path_factory.mktemp("assistant"), family, seed=1, **values)
    assistant = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, inputs, model.generate(**inputs, **SETTINGS), assistant


def forward_calls(module) -> list:
    """Outputs of all forward passes of a module from now on."""
    outputs = []
    module.register_forward_hook(lambda *arguments: outputs.append(arguments[-1]))
    return outputs


def test_text_only_assistant(prepared):
    model, inputs, greedy, assistant = prepared
    calls = forward_calls(assistant)
    assert torch.equal(model.generate(**inputs, **SETTINGS, assistant_model=assistant), greedy)
    text = inputs["input_ids"][inputs["input_ids"] != model.config.image_token_id][None]
    assert text.shape[1] == inputs["input_ids"].shape[1] - 8
    expected = assistant(text).logits[:, -1]
    torch.testing.assert_close(calls[0].logits[:, -1], expected, rtol=1e-4, atol=1e-5)
    without_images = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    expected = model.generate(**without_images, **SETTINGS)
    assert torch.equal(model.generate(**without_images, **SETTINGS, assistant_model=assistant), expected)


@pytest.mark.parametrize("cached", [False, True])
def test_assistant_that_reads_images(cached, prepared, pair):
    model, inputs, greedy, _ = prepared
    family = model.config.text_config.model_type
    values = {"vocab_size": model.config.text_config.vocab_size} if family == "llama" else {}
    torch.manual_seed(3)
    other, _ = pair(llm=family, llm_values=values, projector="linear")
    inputs = dict(inputs)
    if cached:
        inputs["patch_features"] = model.encode_images(inputs.pop("pixel_values"))
    assert torch.equal(model.generate(**inputs, **SETTINGS, assistant_model=other), greedy)
    # the images reach the assistant: a copy of the model proposes only tokens that are accepted
    copy, _ = pair(llm=family, llm_values=values)
    copy.load_state_dict(model.state_dict())
    copy.generation_config.assistant_confidence_threshold = 0.0  # propose all tokens at once
    calls = forward_calls(model.model)
    assert torch.equal(model.generate(**inputs, **SETTINGS, assistant_model=copy), greedy)
    assert len(calls) == 1


def test_assistant_with_another_number_of_visual_tokens_is_refused(prepared, pair):
    model, inputs, _, _ = prepared
    patches, _ = pair(llm=model.config.text_config.model_type, connector="patches")
    with pytest.raises(ValueError, match=r"has \[16, 16\] visual tokens for the images, this model \[4, 4\]"):
        model.generate(**inputs, **SETTINGS, assistant_model=patches)


@pytest.mark.parametrize("count", [1, 5])
def test_prompt_lookup(count, prepared):
    """Candidates are copied from the prompt, but never a placeholder: here the answer begins as the text before them."""
    model, inputs, greedy, _ = prepared
    assert torch.equal(model.generate(**inputs, **SETTINGS, prompt_lookup_num_tokens=count), greedy)
    ids = inputs["input_ids"]
    start = int((ids == model.config.image_token_id).nonzero()[0, 1])
    end = ids[:, -1:]
    repeated = torch.cat(
        [ids[:, :start], end, ids[:, start:]], dim=1
    )  # the prompt's last token stands before the image
    inputs = {**inputs, "input_ids": repeated, "attention_mask": torch.ones_like(repeated)}
    expected = model.generate(**inputs, **SETTINGS)
    assert torch.equal(model.generate(**inputs, **SETTINGS, prompt_lookup_num_tokens=count), expected)


def test_text_only_assistant_with_another_tokenizer(pair, tmp_path):
    model, processor = pair()
    inputs = processor(images=random_image(0), text=QUESTION, return_tensors="pt")
    folder = make_llm(tmp_path, "llama", seed=1, vocab_size=500)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["What colour"])
    options = {"assistant_tokenizer": tokenizer, "tokenizer": processor.tokenizer}
    assistant = AutoModelForCausalLM.from_pretrained(folder)
    expected = model.generate(**inputs, **SETTINGS)
    assert torch.equal(model.generate(**inputs, **SETTINGS, assistant_model=assistant, **options), expected)
