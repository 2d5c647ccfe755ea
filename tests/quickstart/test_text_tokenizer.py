"""The tokenizer of the scenes' captions: every word whole, nothing unknown, letters for the rest."""

import random

from transformers import AutoTokenizer

from blipren.training.quickstart.scenes import make_scene
from blipren.training.quickstart.text_tokenizer import write_tokenizer
from blipren.training.quickstart.wording import write_captions


def test_every_caption_is_whole_words(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "words"))
    assert tokenizer.pad_token_id == 0
    for index in range(5000, 5100):
        for caption in write_captions(make_scene(3, index, ("seen", "unseen")[index % 2]), random.Random(index)):
            pieces = tokenizer.tokenize(caption)
            assert "[UNK]" not in pieces
            assert not any(piece.startswith("##") for piece in pieces), caption
            assert len(tokenizer(caption)["input_ids"]) <= 48, "the recipe's longest caption"
    assert "[UNK]" not in tokenizer.tokenize("two zebras")
