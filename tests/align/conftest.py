"""Tiny models of the retrieval tests: made once a session."""

import pytest
import torch

from blipren.modeling_blipren import BliprenForConditionalGeneration
from blipren.processing_blipren import BliprenProcessor
from tests.tiny_models import QFORMER, make_llm, make_vision

WORDS = (
    "[PAD] [unused0] [UNK] [CLS] [SEP] [MASK] a the big small red green blue yellow circle square star left right of "
    "above below two three dogs run"
).split()


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Folders of a tiny vision encoder, LLM and WordPiece tokenizer."""
    from transformers import BertTokenizerFast

    folder = tmp_path_factory.mktemp("bases")
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(folder / "bert" / "vocab.txt")).save_pretrained(folder / "bert")
    return {
        "vision": str(make_vision(folder / "vision")),
        "llm": str(make_llm(folder / "llm")),
        "tokenizer": str(folder / "bert"),
    }


@pytest.fixture(scope="session")
def untrained(bases, tmp_path_factory):
    """Bridge checkpoint of `blipren new`'s kind, without a text side."""
    folder = tmp_path_factory.mktemp("new")
    torch.manual_seed(0)
    model = BliprenForConditionalGeneration.from_vision_text_pretrained(
        bases["vision"], bases["llm"], num_queries=4, qformer=QFORMER
    )
    model.save_bridge(folder)
    BliprenProcessor.from_vision_text_pretrained(bases["vision"], bases["llm"], num_queries=4).save_pretrained(folder)
    return folder
