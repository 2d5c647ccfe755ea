"""Runs `blipren` commands one after the other in the working folder (see compare_commits.py).

`python run_commands.py TREE COMMANDS`: TREE is the folder of the package `blipren` that must be imported, COMMANDS a
JSON list with the arguments of each command. Each command runs in a fork, so that none inherits random state from
another and torch is imported once. The scenes, the towers and the tokenizer that the commands read are written first.
"""

import json
import os
import re
import shutil
import string
import sys
import traceback
from importlib import import_module
from pathlib import Path

import datasets  # noqa: F401 - imported before the forks, so that no command spends time on it
import torch  # noqa: F401
import transformers

import blipren
from blipren.training.cli import main

SPLITS = (("train", "seen", 160), ("validation", "seen", 16), ("test", "seen", 12), ("test", "unseen", 12))


def write_inputs(tree: Path) -> int:
    """Write scenes, towers and a WordPiece tokenizer; the writer of scenes is found in whatever folder holds it."""
    file = next((tree / "training").rglob("scenes.py"))
    scenes = import_module(".".join(["blipren", *file.relative_to(tree).with_suffix("").parts]))
    scenes.write_scenes(Path("scenes"), 0, tuple(scenes.Split(*split) for split in SPLITS))
    towers = next(folder for folder in (tree / "training").rglob("towers") if (folder / "vision").is_dir())
    shutil.copytree(towers, "towers")
    words = sorted(set(re.findall("[a-z]+", Path("scenes/metadata.jsonl").read_text(encoding="utf-8").lower())))
    letters = string.ascii_lowercase + string.digits
    pieces = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *".,:?!'-", *words]
    pieces += [f"##{letter}" for letter in letters]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained("words")
    return 0


def run_in_fork(function, argument) -> int:
    """Exit status of `function(argument)`, which runs in a fork."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        status = function(argument)
    except SystemExit as exit_:  # argparse
        status = exit_.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    tree = Path(sys.argv[1])
    if Path(blipren.__file__).parent != tree:
        sys.exit(f"blipren was imported from {Path(blipren.__file__).parent}, not from {tree}")
    if run_in_fork(write_inputs, tree):
        sys.exit("the inputs could not be written")
    for arguments in json.loads(sys.argv[2]):
        print("\n==", *arguments, flush=True)
        if status := run_in_fork(main, arguments):
            sys.exit(f"blipren {' '.join(arguments)} ended with status {status}")
