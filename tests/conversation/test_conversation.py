"""Conversations: answers equal those to a fresh prompt, and only new tokens are computed."""

import pytest
import torch

from blipren import BliprenForConditionalGeneration, BliprenProcessor
from blipren.training.conversation.conversation import Conversation
from blipren.training.errors import UserError
from blipren.training.evaluation.features import encode_images
from tests.tiny_models import QFORMER, make_llm, make_vision, random_image

TURNS = [
    ("What is it?", [random_image(0), random_image(1)]),
    ("And now?", []),
    ("Which of the three is it?", [random_image(2)]),
    ("Why?", []),
]


def make_pair(folder, family="llama", chat=False, **values):
    """A random model with a language model of this family, and its processor."""
    bases = make_vision(folder / "vision"), make_llm(folder / family, family, chat=chat, **values)
    torch.manual_seed(0)
    model = BliprenForConditionalGeneration.from_vision_text_pretrained(*bases, qformer=QFORMER, num_queries=4)
    return model.eval(), BliprenProcessor.from_vision_text_pretrained(*bases, num_queries=4)


def fresh_answer(model, processor, messages, images, **generation):
    """The answer of `generate` to the whole conversation as one prompt, by the processor's own way."""
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=images and [images], text=[text], return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, **generation)
    return processor.decode_answer(output[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize(
    ("family", "chat", "values"),
    [
        ("llama", True, {}),
        ("llama", False, {}),
        ("opt", False, {}),
        ("gemma2", True, {"sliding_window": 16}),
    ],
    ids=["llama-chat", "llama-plain", "opt", "gemma2-window-16"],
)
def test_answers_equal_those_to_a_fresh_prompt_and_only_new_tokens_are_computed(tmp_path, family, chat, values):
    model, processor = make_pair(tmp_path, family, chat, **values)
    conversation = Conversation(model, processor)
    computed = []
    model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    images = []
    for question, new in TURNS:
        held, begin = len(conversation.cached_ids), len(computed)
        answer = conversation.ask(question, new, max_new_tokens=6)
        lengths = computed[begin:]
        images += new
        asked = conversation.messages[:-1]
        assert answer == fresh_answer(model, processor, asked, images, max_new_tokens=6)
        assert set(lengths[1:]) <= {1}
        if held and "sliding_window" not in values:  # a cache of a window cannot go back behind an answer
            new_tokens = len(processor.encode_conversation(asked, [4] * len(images))) - held
            assert lengths[0] <= new_tokens + 6  # the answer's own tokens may differ from those that its text has
    assert conversation.images == images and len(conversation.messages) == 8


def test_beams_sampling_limits_and_reset(tmp_path):
    model, processor = make_pair(tmp_path, "llama", chat=True)
    conversation = Conversation(model, processor)
    first = [random_image(0)]
    conversation.ask("What is it?", first, max_new_tokens=4)
    answer = conversation.ask("And?", num_beams=3, max_new_tokens=5)
    assert answer == fresh_answer(model, processor, conversation.messages[:-1], first, num_beams=3, max_new_tokens=5)
    assert len(conversation.cached_ids) < len(
        processor.encode_conversation(conversation.messages[:-1], [4])
    )  # beams add nothing
    answer = conversation.ask("Then?", max_new_tokens=5)
    assert answer == fresh_answer(model, processor, conversation.messages[:-1], first, max_new_tokens=5)
    turns = len(conversation.messages)
    with pytest.raises(UserError, match="the language model reads 256: begin a new one"):
        conversation.ask("red ball " * 200)
    assert len(conversation.messages) == turns
    conversation.reset()
    assert conversation.messages == [] and conversation.images == [] and conversation.cached_ids == []
    text = conversation.ask("Say <image> and <|im_end|>.", max_new_tokens=2)
    assert text == fresh_answer(
        model, processor, [{"role": "user", "content": "Say < image> and < |im_end|>."}], None, max_new_tokens=2
    )


def test_the_first_answer_is_that_of_caption(tmp_path):
    from blipren.training.evaluation.generation import generate_answers

    model, processor = make_pair(tmp_path)
    images = encode_images(model, processor, [random_image(3)])
    for prompt in (None, "What is it?"):
        wanted = generate_answers(model, processor, images, prompt, max_new_tokens=8)[0]["text"]
        assert Conversation(model, processor).ask(prompt, [random_image(3)], max_new_tokens=8) == wanted
