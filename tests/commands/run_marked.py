"""Runs blipren commands, a JSON list of arguments a line of stdin, and marks every line that our code writes.

What reaches the screen without the mark was written by another library, in Python or beneath it.
"""

import json
import os
import re
import sys

MARK = "\x01"


class MarkedStream:
    """A text stream that puts `MARK` before each line whose writer is a file of the package.

    The writer is the innermost frame that is neither this file nor Python's own library.
    """

    def __init__(self, stream, package: str):
        self.stream, self.package, self.at_start = stream, package, True

    def write(self, text: str) -> int:
        if text and self._written_by_package():
            text = MARK * self.at_start + re.sub(r"([\n\r])(?=.)", rf"\1{MARK}", text)
        self.at_start = text.endswith(("\n", "\r")) if text else self.at_start
        return self.stream.write(text)

    def _written_by_package(self) -> bool:
        python = (__file__, os.path.dirname(os.__file__) + os.sep, "<frozen")
        frame = sys._getframe(2)
        while frame is not None:
            name = frame.f_code.co_filename
            if "site-packages" in name:
                if f"{os.sep}tqdm{os.sep}" not in name:  # tqdm writes progress bars for others
                    return False
            elif not name.startswith(python):
                return name.startswith(self.package)
            frame = frame.f_back
        return False

    def __getattr__(self, name):
        return getattr(self.stream, name)


def main() -> None:
    from blipren.training import cli

    package = os.path.dirname(os.path.dirname(os.path.abspath(cli.__file__))) + os.sep
    sys.stdout, sys.stderr = MarkedStream(sys.stdout, package), MarkedStream(sys.stderr, package)
    for line in sys.stdin:
        sys.argv = ["blipren", *json.loads(line)]
        try:
            cli.command()
        except SystemExit as stop:
            sys.stdout.stream.write(f"{MARK}{sys.argv[1]}: exit status {stop.code}\n")


if __name__ == "__main__":
    main()
