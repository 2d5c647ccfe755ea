"""A conversation in the terminal, line by line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import TextStreamer

from blipren.training.conversation.conversation import Conversation
from blipren.training.errors import UserError
from blipren.training.evaluation.generation import Sampling, read_image
from blipren.training.files import write_atomically

HELP = """/image PATH   add a picture to the next question; with an empty question the model writes a caption
/reset        forget all turns and pictures but those of the command line
/save FILE    write the conversation as JSON
/quit         end (also Ctrl-D); Ctrl-C stops an answer"""


def read_lines() -> Iterator[str]:
    """Yield the lines that a user types, or those of standard input."""
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        import readline  # noqa: F401  input() then has a history and can be edited
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return


class Terminal:
    """The commands of a conversation in the terminal.

    Args:
        conversation: a new conversation.
        paths: pictures of the command line.
        sampling, generation: as for `Conversation.ask`.
    """

    def __init__(self, conversation: Conversation, paths: Sequence[str], sampling: Sampling | None, generation: dict):
        self.conversation, self.first_paths = conversation, list(paths)
        self.sampling, self.generation = sampling, generation
        self.reset("")

    def reset(self, _: str) -> None:
        """Begin again."""
        self.conversation.reset()
        self.paths = list(self.first_paths)  # of all pictures, those of the next question at the end
        self.waiting = [read_image(path) for path in self.first_paths]

    def add_image(self, path: str) -> None:
        """Add a picture to the next question."""
        self.waiting.append(read_image(path))
        self.paths.append(path)
        print(f"({path} comes with the next question)")

    def save(self, path: str) -> None:
        """Write the conversation to a file."""
        if not path or not Path(path).absolute().parent.is_dir():
            raise UserError(f"{path!r} cannot be written: /save takes a file name in a folder that exists")
        paths = iter(self.paths)
        messages = []
        for message in self.conversation.messages:
            content = message["content"]
            if not isinstance(content, str):
                content = [part | {"image": next(paths)} if part["type"] == "image" else part for part in content]
            messages.append(message | {"content": content})
        write_atomically(Path(path), json.dumps({"messages": messages}, indent=1, ensure_ascii=False) + "\n")
        print(f"(the conversation is in {path})")

    def ask(self, question: str) -> None:
        """Print the answer to a question as it is generated."""
        tokenizer = self.conversation.processor.tokenizer
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            self.conversation.ask(question or None, self.waiting, streamer, self.sampling, **self.generation)
        except KeyboardInterrupt:
            print("\n(stopped; question and answer are forgotten)")
        else:
            self.waiting = []

    def run(self, lines: Iterator[str]) -> None:
        """Read lines until they end or one is `/quit`. What goes wrong with a line is told, and the next one is read."""
        commands = {"/image": self.add_image, "/reset": self.reset, "/save": self.save}
        for line in map(str.strip, lines):
            name, _, rest = line.partition(" ")
            if name == "/quit":
                return
            try:
                if name in commands:
                    commands[name](rest.strip())
                elif name.startswith("/"):
                    print(HELP if name == "/help" else f"there is no {name}; there are:\n{HELP}")
                elif line or self.waiting:
                    self.ask(line)
            except UserError as error:
                print(error)
