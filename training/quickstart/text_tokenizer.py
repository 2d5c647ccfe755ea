"""The WordPiece tokenizer of the scenes' captions, for the text side of the Q-Former: whole words and letters."""

import random
import re
import string
from pathlib import Path

from transformers import BertTokenizerFast

from blipren.training.quickstart.scenes import make_scene
from blipren.training.quickstart.wording import write_captions, write_questions

SPECIAL = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SCENES = 2000  # enough for every word


def scene_words(seed: int = 0) -> list[str]:
    """Return all words of captions, questions and answers of scenes, in alphabetical order."""
    words: set[str] = set()
    for index in range(SCENES):
        rng = random.Random(f"{seed}/vocabulary/{index}")
        scene = make_scene(seed, index, ("seen", "unseen")[index % 2])
        texts = write_captions(scene, rng) + [
            text for pair in write_questions(scene, rng, held_out=True) for text in pair
        ]
        words.update(re.findall(r"[a-z]+", " ".join(texts).lower()))
    return sorted(words)


def write_tokenizer(folder: Path) -> Path:
    """Write the tokenizer into `folder`. Letters are pieces, so that every English word has tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [*string.ascii_lowercase, *string.digits, *",.:?!'-"]
    pieces = [*SPECIAL, *letters, *(f"##{c}" for c in string.ascii_lowercase + string.digits)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, *scene_words()]))}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    return folder
