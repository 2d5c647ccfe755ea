"""Chat templates of imported models, whose prompts have another layout than ours."""

from transformers import PreTrainedTokenizerBase

from blipren.prompts_blipren import CHECK_PARTS
from blipren.training.errors import UserError

# placeholder, beginning of text, prompt, a space, answer, end
_IMAGE_FIRST = (
    CHECK_PARTS
    + """{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ ' ' + message['content'] }}{% if not (loop.last and continue_final_message) %}{{ eos_token }}{% endif %}{% endgeneration %}
{%- elif message['content'] is string -%}{{ BEGINNING }}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}{%- if part['type'] in ('image', 'image_url') -%}IMAGE_TOKEN{%- endif -%}{%- endfor -%}
{{ BEGINNING }}{%- for part in message['content'] -%}{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}
{%- endif -%}
{%- endfor -%}"""
)
# ChatML, with the placeholder between the user's turn and the assistant's
_BEHIND_USER_TURN = (
    CHECK_PARTS
    + """{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ '<|im_start|>assistant\\n' }}{% generation %}{{ message['content'] }}{% if not (loop.last and continue_final_message) %}{{ '<|im_end|>' }}{% endif %}{% endgeneration %}{% if not (loop.last and continue_final_message) %}{{ '\\n' }}{% endif %}
{%- elif message['content'] is string -%}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- else -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}{%- for part in message['content'] -%}{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{{ '<|im_end|>\\n' }}
{%- for part in message['content'] -%}{%- if part['type'] in ('image', 'image_url') -%}IMAGE_TOKEN{%- endif -%}{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer puts a beginning-of-text token in front of a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id


def image_first(tokenizer: PreTrainedTokenizerBase, image_token: str, bos: bool = True) -> str:
    """Return a template with the image in front of everything, as in BLIP-2, and with BOS behind the image if `bos`.

    The tokenizer is changed to add no BOS itself.
    """
    if adds_bos(tokenizer):
        tokenizer.add_bos_token = False
    if adds_bos(tokenizer):  # one of a tokenizer class without that setting
        tokenizer.backend_tokenizer.post_processor = None
    template = _IMAGE_FIRST.replace("BEGINNING", "bos_token" if bos else "''")
    return template.replace("IMAGE_TOKEN", image_token)


def image_behind_user_turn(image_token: str, text_template: str | None) -> str:
    """Return a ChatML template with the image behind the user's turn, as the two-stage tutorial has it.

    Raises:
        UserError: `text_template`, the language model's own, is not ChatML.
    """
    if "<|im_start|>" not in (text_template or ""):
        raise UserError(
            "the two-stage tutorial needs a language model with a ChatML template, such as SmolLM-135M-Instruct"
        )
    return _BEHIND_USER_TURN.replace("IMAGE_TOKEN", image_token)
