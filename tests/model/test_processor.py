"""The processor: equal prompt tokens in training and inference, one end token, no special token from a text."""

import numpy as np
import pytest
from jinja2 import TemplateError
from tiny_models import CHATML, make_llm, make_tokenizer, random_image

from blipren import BliprenProcessor
from blipren.prompts_blipren import end_of_answer_id, pick_image_token
from blipren.training.hub.prompt_templates import image_behind_user_turn, image_first


@pytest.fixture(scope="module", params=["plain", "chat"])
def processor(request, bases, tmp_path_factory):
    llm = make_llm(tmp_path_factory.mktemp("llm"), "llama", chat=request.param == "chat")
    system = ["You are terse ."] if request.param == "chat" else None
    return BliprenProcessor.from_vision_text_pretrained(
        bases("vision", "vit"), llm, num_queries=4, system_prompts=system
    )


PROMPTS = [None, "What colour is it ?", "Is it over </s> ?", "  spaces around  "]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_training_and_inference_prompts_are_the_same_tokens(processor, prompt):
    inference = processor(images=random_image(), text=prompt, return_tensors="pt")["input_ids"][0].tolist()
    assert inference == processor.encode_prompt(prompt)
    assert inference.count(processor.image_token_id) == 4
    assert not processor.prompt_text(prompt).endswith(" ")
    assert inference.count(processor.tokenizer.bos_token_id) <= 1
    # a rendered prompt passed as text is not rendered again
    again = processor(images=random_image(), text=processor.prompt_text(prompt), return_tensors="pt")
    assert again["input_ids"][0].tolist() == inference


def test_special_tokens_in_a_question_are_escaped(processor):
    ids = processor.encode_prompt("Is <image> here </s> ?")
    assert ids.count(processor.image_token_id) == 4
    assert "< image> here < /s>" in processor.prompt_text("Is <image> here </s> ?")


@pytest.mark.parametrize("answer", ["A dog runs .", "x", "</s> <image> <|im_end|> done"])
def test_answers_end_once_and_hold_no_special_token(processor, answer):
    ids = processor.encode_answer(answer)
    assert ids.count(processor.answer_end_id) == 1 and ids[-1] == processor.answer_end_id
    assert not set(ids[:-1]) & {*processor.tokenizer.all_special_ids, processor.image_token_id}
    assert processor.decode_answer(ids + [5, 6, 7]) == answer
    with pytest.raises(ValueError, match="empty"):
        processor.encode_answer("  ")


def test_prompt_and_answer_join_as_one_text(processor):
    """Prompt and answer tokenised apart are what the whole conversation is, tokenised at once."""
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is it ?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is red ."}]},
    ]
    if processor.system_prompts:
        conversation.insert(0, {"role": "system", "content": processor.system_prompts[0]})
    text = processor.apply_chat_template(conversation, tokenize=False)
    whole = processor(images=random_image(), text=text, return_tensors="pt")["input_ids"][0].tolist()
    parts = processor.encode_prompt("What colour is it ?") + processor.encode_answer("It is red .")
    assert whole[: len(parts)] == parts


def test_chats_with_images_and_several_turns(processor):
    chat = [
        {"role": "user", "content": [{"type": "image", "image": random_image()}, {"type": "text", "text": "Who ?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog ."}]},
        {"role": "user", "content": "And where ?"},
    ]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert inputs["pixel_values"].shape[0] == 1
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 4
    assert int((inputs["input_ids"] == processor.tokenizer.bos_token_id).sum()) <= 1


def test_save_and_load(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = BliprenProcessor.from_pretrained(tmp_path)
    for prompt in PROMPTS:
        assert again.encode_prompt(prompt) == processor.encode_prompt(prompt)
    assert again.tokenizer.padding_side == "left" and again.answer_end == processor.answer_end
    assert again.prompts == processor.prompts and again.system_prompts == processor.system_prompts
    batch = again(images=[random_image(), random_image()], text=["Hi", "What colour is it ?"])
    assert batch["attention_mask"][0][0] == 0 and batch["attention_mask"][0][-1] == 1


def test_texts_and_images_that_do_not_fit_are_an_error(processor):
    with pytest.raises(ValueError, match="3 texts and 2 images"):
        processor(images=[random_image(), random_image()], text=["a", "b", "c"])


def test_prompts_that_end_in_a_space_are_refused(bases):
    with pytest.raises(ValueError, match="ends in a space"):
        BliprenProcessor.from_vision_text_pretrained(
            bases("vision", "vit"), bases("llm", "llama"), prompts=["Caption: "]
        )
    with pytest.raises(ValueError, match="no chat template"):
        BliprenProcessor.from_vision_text_pretrained(
            bases("vision", "vit"), bases("llm", "llama"), system_prompts=["Be brief."]
        )


def test_placeholder_is_reserved_or_new():
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    assert pick_image_token(tokenizer) == ("<image>", size)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|reserved_special_token_7|>"], special_tokens=True)
    assert pick_image_token(tokenizer) == ("<|reserved_special_token_7|>", size)
    tokenizer.add_tokens(["<|image_pad|>"], special_tokens=True)
    assert pick_image_token(tokenizer) == ("<|image_pad|>", size + 1)


def test_end_of_answer_follows_the_template_where_generation_stops():
    chat = make_tokenizer(chat=True)
    chat.eos_token = "</s>"  # as Gemma: the template ends a turn with another token than EOS
    turn_end = chat.convert_tokens_to_ids("<|im_end|>")
    assert end_of_answer_id(chat, [turn_end]) == turn_end
    assert end_of_answer_id(chat, []) == chat.eos_token_id
    nothing = make_tokenizer()
    nothing.eos_token = None
    with pytest.raises(ValueError, match="could not stop"):
        end_of_answer_id(nothing, [])


def test_missing_pad_and_bos(tmp_path, bases):
    llm = make_llm(tmp_path, "llama", pad=False)
    processor = BliprenProcessor.from_vision_text_pretrained(bases("vision", "vit"), llm, num_queries=4)
    assert processor.tokenizer.pad_token == "</s>"
    batch = processor(images=[random_image(), random_image()], text=["Hi", "What colour is it ?"])
    assert batch["attention_mask"][0][0] == 0


def test_an_answer_to_the_empty_prompt_follows_the_image(bases):
    processor = BliprenProcessor.from_vision_text_pretrained(
        bases("vision", "vit"), bases("llm", "llama"), num_queries=4, prompts=[""]
    )
    prompt = processor(images=random_image(), return_tensors="pt")["input_ids"][0].tolist()
    assert prompt == processor.encode_prompt() and prompt[-4:] == [processor.image_token_id] * 4
    answer = "A dog runs ."
    assert processor.encode_answer(answer)[:-1] == processor.tokenizer(answer, add_special_tokens=False).input_ids


def test_videos_and_audio_are_refused(processor):
    """A model of images and text ignores nothing that it is given: as an argument, and in a chat."""
    for name in ("videos", "audio"):
        with pytest.raises(ValueError, match=f"{name} were given to the processor"):
            processor(text="What happens ?", **{name: [np.zeros((2, 3, 32, 32))]})
    templates = processor.chat_template, image_first(make_tokenizer(), "<image>"), image_behind_user_turn("", CHATML)
    for kind in ("video", "audio", "input_text"):
        chat = [{"role": "user", "content": [{"type": kind, kind: "somewhere"}, {"type": "text", "text": "What ?"}]}]
        for template in templates:
            with pytest.raises(TemplateError, match=f"a message has a part of type {kind}"):
                processor.apply_chat_template(chat, tokenize=False, chat_template=template)
