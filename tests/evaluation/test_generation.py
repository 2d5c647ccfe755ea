"""Captions and answers in batches, losses, padding."""

from collections import Counter

import pytest
import torch
from transformers import LogitsProcessorList

from blipren.training.evaluation.features import encode_images
from blipren.training.evaluation.generation import (
    Sampling,
    end_ids,
    generate_answers,
    generate_batch,
    load_model,
    pad_left,
    pad_right,
)
from blipren.training.evaluation.image_use import answer_losses
from tests.evaluation.conftest import QUESTION, colour_picture, new_model


@pytest.fixture(scope="module")
def seeing_model(seeing):
    return load_model(str(seeing), "cpu")


def test_batches_of_any_size_say_the_same(seeing_model):
    model, processor = seeing_model
    photos = [colour_picture(i) for i in range(7)]
    prompts = [None, QUESTION, None, "A", QUESTION, None, "What is in the picture, and where does it come from ?"]
    single = generate_answers(model, processor, photos, prompts, batch_size=1, max_new_tokens=20)
    batched = generate_answers(model, processor, photos, prompts, batch_size=4, max_new_tokens=20)
    assert batched == single  # in the order given, although the batches were sorted by length
    assert single[1]["text"] == "green" and single[0]["text"] == "A red picture ."
    assert single[0]["ended_by_eos"] and single[0]["num_tokens"] > 1
    cut = generate_answers(model, processor, photos[:1], max_new_tokens=2)[0]
    assert not cut["ended_by_eos"] and cut["num_tokens"] == 2
    from_features = generate_answers(model, processor, encode_images(model, processor, photos), prompts, 3)
    assert [r["text"] for r in from_features if r["ended_by_eos"]] == [r["text"] for r in single if r["ended_by_eos"]]


def test_no_image_at_all(seeing_model):
    model, processor = seeing_model
    answers = generate_answers(model, processor, None, [None, QUESTION], max_new_tokens=3)
    assert len(answers) == 2 and all(isinstance(a["text"], str) for a in answers)
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        generate_answers(model, processor, [colour_picture(0)] * 2, ["one"])


@pytest.mark.parametrize("options", [{}, {"connector": "patches"}, {"vision": "siglip2_vision_model"}])
def test_losses_are_the_models_own(tmp_path, options):
    model, processor = new_model(tmp_path, **options)
    photos = [colour_picture(0, (40, 32)), colour_picture(1, (24, 60)), colour_picture(2)]
    features = encode_images(model, processor, photos)
    texts = ["A red picture .", "green", "The picture is blue ."]
    found = answer_losses(model, processor, features, [None, QUESTION, None], texts, batch_size=2)
    for i, (prompt, text) in enumerate(zip([None, QUESTION, None], texts)):
        count = features[[i]].visual_tokens(model.config)
        before, answer = processor.encode_prompt(prompt, num_visual_tokens=count), processor.encode_answer(text)
        ids = torch.tensor([before + answer])
        labels = torch.tensor([[-100] * len(before) + answer])
        pixels = processor.image_processor(images=[photos[i]], return_tensors="pt")
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, **pixels).loss
        assert found[i][1] == len(answer)
        assert found[i][0] / found[i][1] == pytest.approx(loss.item(), abs=1e-4)


def test_padding_sides():
    assert pad_left([[1], [2, 3]], 9)[0].tolist() == [[9, 1], [2, 3]]
    assert pad_right([[1], [2, 3]], 9)[1].tolist() == [[1, 0], [1, 1]]


def test_samples_follow_the_distribution(untrained):
    """First tokens of many seeds come as often as temperature and top-p say."""
    model, processor = load_model(str(untrained), "cpu")
    count = 2000
    features = encode_images(model, processor, [colour_picture(0)])
    prompt = processor.encode_prompt(None, num_visual_tokens=features.visual_tokens(model.config))
    sampling = Sampling(0.7, 0.5, seeds=list(range(count)))
    inputs = features[[0] * count].model_inputs("cpu")
    rows = [list(prompt)] * count
    processors = sampling.processors(range(count), len(prompt))
    answers = generate_batch(model, processor, rows, inputs, max_new_tokens=1, logits_processor=processors)
    ids = torch.tensor(rows[:1])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **features.model_inputs("cpu")).logits[0, -1]
    wanted = LogitsProcessorList(processors[:2])(ids, logits[None].float()).softmax(-1)[0]
    expected, found = Counter(), Counter(answer["text"] for answer in answers)
    for token in wanted.nonzero()[:, 0].tolist():
        expected["" if token in end_ids(model) else processor.decode_answer([token])] += wanted[token].item()
    assert set(found) <= set(expected) and 5 < len(expected)
    for text, probability in expected.most_common(5):
        assert found[text] / count == pytest.approx(probability, abs=4 * (probability / count) ** 0.5)
