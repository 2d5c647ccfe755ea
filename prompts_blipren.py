"""Prompts: chat templates, the placeholder of an image, the token that ends an answer."""

import re

from transformers import AddedToken, PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"
VIDEO_TOKEN = "<video>"
DEFAULT_PROMPT = "Short caption:"
DEFAULT_CHAT_PROMPT = "Write a short caption for this image."
# Jinja in front of every chat template: a part of a message that would be ignored is an error
CHECK_PARTS = """{%- for message in messages if message['content'] and message['content'] is not string -%}
  {%- for part in message['content'] if part['type'] not in ('image', 'image_url', 'text') -%}
    {{- raise_exception('a message has a part of type ' ~ part['type'] ~ ', and this model reads images and text only') -}}
  {%- endfor -%}
{%- endfor -%}
"""
# sets what a template would otherwise vary between training and inference (date, thinking block), then replaces images
# by the placeholder
_TEMPLATE_HEAD = """{%- if enable_thinking is not defined -%}{%- set enable_thinking = false -%}{%- endif -%}
{%- if date_string is not defined -%}{%- set date_string = '26 Jul 2024' -%}{%- endif -%}
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- if message['content'] is string or message['content'] is none or message['content'] is not defined -%}
    {%- set flat.messages = flat.messages + [message] -%}
  {%- else -%}
    {%- set content = namespace(text='') -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] in ('image', 'image_url') -%}{%- set content.text = content.text + 'IMAGE_TOKEN' -%}VIDEO_PART
      {%- else -%}{%- set content.text = content.text + part['text'] -%}{%- endif -%}
    {%- endfor -%}
    {%- set flat.messages = flat.messages + [dict(message, content=content.text)] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
_VIDEO_PART = """
      {%- elif part['type'] in ('video', 'video_url') -%}{%- set content.text = content.text + 'VIDEO_TOKEN' -%}"""
# for language models without a template: prompt, space, answer, end token
_PLAIN_TEMPLATE = """{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ 'ANSWER_START' + message['content'] }}{% if not (loop.last and continue_final_message) %}{{ eos_token }}{% endif %}{% endgeneration %}
{%- else -%}{{ message['content'] }}{%- endif -%}
{%- endfor -%}"""


def build_chat_template(
    text_template: str | None, image_token: str, answer_start: str = " ", video_token: str | None = None
) -> str:
    """Return a Jinja template that places images and then renders as the language model's own template does.

    Args:
        text_template: template of the language model; `None` for a model without one.
        image_token: placeholder of an image.
        answer_start: text between prompt and answer, where the language model has no template.
        video_token: placeholder of a video, of a model that takes videos.
    """
    head = CHECK_PARTS + _TEMPLATE_HEAD.replace("IMAGE_TOKEN", image_token)
    video = "" if video_token is None else _VIDEO_PART.replace("VIDEO_TOKEN", video_token)
    head = head.replace("VIDEO_PART", video)
    if video_token is not None:
        head = head.replace("'image_url', 'text'", "'image_url', 'video', 'video_url', 'text'")
        head = head.replace("reads images and text", "reads images, videos and text")
    return head + (text_template or _PLAIN_TEMPLATE.replace("ANSWER_START", answer_start))


def pick_image_token(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """Return the placeholder of an image and its id; the model's vocabulary does not change.

    It is a token that the tokenizer reserves for images or for later use. If there is none, `<image>` is added to the
    tokenizer, with the id of a spare embedding row or one beyond the vocabulary; the model never embeds it.
    """
    return _pick_token(tokenizer, r"<\|?image(_pad)?\|?>", IMAGE_TOKEN, [])


def pick_video_token(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """Return the placeholder of a video and its id, found as that of an image and another one."""
    image_token, _ = pick_image_token(tokenizer)
    return _pick_token(tokenizer, r"<\|?video(_pad)?\|?>", VIDEO_TOKEN, [image_token])


def _pick_token(tokenizer, own: str, new: str, taken: list[str]) -> tuple[str, int]:
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    for pattern in (own, r"<\|?reserved_special_token_\d+\|?>", r"<\|?(unused|extra_id_)\d+\|?>"):
        for token, index in sorted(added.items(), key=lambda item: item[1]):
            if re.fullmatch(pattern, token) and token not in taken:
                return token, index
    tokenizer.add_tokens([AddedToken(new, special=True, normalized=False)], special_tokens=True)
    return new, tokenizer.convert_tokens_to_ids(new)


def end_of_answer_id(tokenizer: PreTrainedTokenizerBase, generation_eos: list[int]) -> int:
    """Return the id of the token that ends an answer.

    It is the one that the chat template writes behind an answer if generation stops at it, otherwise EOS.

    Args:
        tokenizer: tokenizer of the language model.
        generation_eos: end-of-sequence ids of the language model's generation config.

    Raises:
        ValueError: when neither tokenizer nor model has an end-of-sequence token.
    """
    if tokenizer.chat_template:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": "ANSWER"}], tokenize=False
        )
        tail = tokenizer(rendered.rpartition("ANSWER")[2].lstrip(), add_special_tokens=False).input_ids
        if tail and tail[0] in {tokenizer.eos_token_id, *generation_eos}:
            return tail[0]
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id
    if generation_eos:
        return generation_eos[0]
    raise ValueError(
        f"the tokenizer of {tokenizer.name_or_path} has no end-of-sequence token, so generation could not stop; set "
        "tokenizer.eos_token and save the tokenizer"
    )


__all__ = [
    "CHECK_PARTS",
    "DEFAULT_CHAT_PROMPT",
    "DEFAULT_PROMPT",
    "IMAGE_TOKEN",
    "build_chat_template",
    "end_of_answer_id",
    "pick_image_token",
    "pick_video_token",
]
