"""Prompts, conversations and answers as tokens: the same in training, inference and serving."""


class BliprenTextEncodingMixin:
    """Text side of a processor with a `tokenizer`, prompts, an `image_token` and a chat template."""

    def escape_special_tokens(self, text: str) -> str:
        """Break special tokens and placeholders in a text of the user: `<image>` becomes `< image>`."""
        for token in sorted(
            {self.image_token, *self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()},
            key=len,
            reverse=True,
        ):
            if len(token.strip()) > 1 and token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def prompt_text(
        self, prompt: str | None = None, system: str | None = None, num_images: int = 1, num_videos: int = 0
    ) -> str:
        """Render a prompt as text up to the answer, with one placeholder an image and without a space at the end.

        Args:
            prompt: caption prompt or question; the first of `prompts` by default.
            system: system prompt; the first of `system_prompts` by default, `""` for none.
            num_images, num_videos: number of images, and of videos behind them, in front of the prompt.
        """
        prompt = self.prompts[0] if prompt is None else self.escape_special_tokens(prompt.strip())
        content = [{"type": "image"}] * num_images + [{"type": "video"}] * num_videos
        content.append({"type": "text", "text": prompt})
        return self._render([{"role": "user", "content": content}], system)

    def conversation_text(self, messages: list[dict], system: str | None = None, thinking: bool = False) -> str:
        """Render a conversation as text up to the next answer, with one placeholder an image.

        Args:
            messages: `role` and `content`, a text or a list of `{"type": "text", "text"}` and `{"type": "image"}`.
            system: system prompt for a conversation without one; the first of `system_prompts` by default.
            thinking: let the answer begin with a trace of reasoning, where the chat template has a choice.
        """
        escaped = []
        for message in messages:
            content = message["content"]
            if not isinstance(content, str):
                content = [
                    {"type": "text", "text": self.escape_special_tokens(part["text"])}
                    if part["type"] == "text"
                    else {"type": "image"}
                    for part in content
                ]
                if all(part["type"] == "text" for part in content):
                    content = "".join(part["text"] for part in content)
            else:
                content = self.escape_special_tokens(content)
            escaped.append({"role": message["role"], "content": content})
        return self._render(escaped, "" if messages[0]["role"] == "system" else system, thinking)

    def _render(self, messages: list[dict], system: str | None, thinking: bool = False) -> str:
        """Render escaped messages up to the next answer, behind a system prompt if there is one."""
        if system is None:
            system = self.system_prompts[0] if self.system_prompts else ""
        if system:
            messages = [{"role": "system", "content": self.escape_special_tokens(system)}, *messages]
        options = {"enable_thinking": True} if thinking else {}
        return self.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)

    def encode_prompt(
        self, prompt: str | None = None, system: str | None = None, num_visual_tokens: list[int] | None = None
    ) -> list[int]:
        """Return the token ids of a prompt with its placeholders, as `processor(images, text)` does.

        Args:
            prompt, system: as in [`prompt_text`].
            num_visual_tokens: number of placeholders of each image; one image of `self.num_visual_tokens` by default.
        """
        counts = [self.num_visual_tokens] if num_visual_tokens is None else num_visual_tokens
        return self._encode_text(self.prompt_text(prompt, system, len(counts)), counts)

    def encode_conversation(
        self, messages: list[dict], num_visual_tokens: list[int], system: str | None = None, thinking: bool = False
    ) -> list[int]:
        """Return the token ids of a conversation up to the next answer, the same in training and inference.

        Args:
            messages, system, thinking: as in [`conversation_text`]. The last message is the user's.
            num_visual_tokens: number of placeholders of each image, in order.

        Raises:
            ValueError: the numbers of images in the messages and in `num_visual_tokens` differ.
        """
        return self._encode_text(self.conversation_text(messages, system, thinking), num_visual_tokens)

    def _encode_text(self, text: str, num_visual_tokens: list[int]) -> list[int]:
        """Return the token ids of a rendered text, each of its placeholders repeated for the visual tokens."""
        pieces = self._strip_duplicate_bos(text).split(self.image_token)
        if len(pieces) != len(num_visual_tokens) + 1:
            raise ValueError(f"the text speaks of {len(pieces) - 1} images, and {len(num_visual_tokens)} are given")
        text = pieces[0] + "".join(self.image_token * n + piece for n, piece in zip(num_visual_tokens, pieces[1:]))
        return self.tokenizer(text).input_ids

    def encode_answer(self, answer: str) -> list[int]:
        """Return the token ids of an answer behind a prompt, with one end token; special tokens in it are plain text.

        Raises:
            ValueError: when the answer is empty, or the tokenizer joins it with the end of the prompt.
        """
        return self.encode_answers([answer])[0]

    def encode_trace(self, trace: str) -> list[int]:
        """Return the token ids of a trace of reasoning in front of an answer, in `<think>` and `</think>`.

        These two are the tokenizer's own tokens, where it has them. An empty line is behind them.
        """
        keywords = {"add_special_tokens": False, "split_special_tokens": True}
        space = self.tokenizer("\n\n", **keywords).input_ids
        if not {"<think>", "</think>"} <= self.tokenizer.get_vocab().keys():
            return self.encode_answer(f"<think>\n{trace}\n</think>")[:-1] + space
        inner = self.tokenizer(f"\n{trace}\n", **keywords).input_ids
        begin, end = self.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
        return [begin, *inner, end, *space]

    def encode_answers(self, answers: list[str]) -> list[list[int]]:
        """Return the token ids of several answers, see [`encode_answer`]; faster than one at a time."""
        answers = [answer.strip() for answer in answers]
        if not all(answers):
            raise ValueError("an answer is empty: give it a text, or leave it out")
        anchor = ":" if self.answer_start else "\n" if any(self.prompts) else ""
        keywords = {"add_special_tokens": False, "split_special_tokens": True}
        before = self.tokenizer(anchor, **keywords).input_ids
        encoded = self.tokenizer([anchor + self.answer_start + answer for answer in answers], **keywords).input_ids
        for answer, whole in zip(answers, encoded):
            if whole[: len(before)] != before:
                raise ValueError(
                    f"the tokenizer joins the end of the prompt {anchor!r} with the answer {answer[:40]!r}: the tokens of "
                    "the prompt would differ between training and inference"
                )
        return [whole[len(before) :] + [self.answer_end_id] for whole in encoded]

    @property
    def answer_end_id(self) -> int:
        """Id of the token that ends an answer."""
        return self.tokenizer.convert_tokens_to_ids(self.answer_end)

    def decode_answer(self, ids) -> str:
        """Return the text of generated ids up to the first end token, without space around it."""
        ids = [int(i) for i in ids]
        for end in {self.answer_end_id, self.tokenizer.eos_token_id} & set(ids):
            ids = ids[: ids.index(end)] if end in ids else ids
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _strip_duplicate_bos(self, text: str) -> str:
        """Remove BOS in front of a rendered prompt if the tokenizer adds it."""
        bos = self.tokenizer.bos_token
        if bos and text.startswith(bos) and self.tokenizer("a").input_ids[0] == self.tokenizer.bos_token_id:
            return text[len(bos) :]
        return text
