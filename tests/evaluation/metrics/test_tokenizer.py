"""The pure-Python Penn-Treebank tokenizer gives Stanford's tokens."""

import json

import pytest

from blipren.training.errors import UserError
from blipren.training.evaluation.metrics.tokenizer import choose_tokenizer, java_available, ptb_tokens, tokenize

needs_java = pytest.mark.skipif(not java_available(), reason="there is no java on the PATH to compare with")

# what Stanford's tokenizer (CoreNLP 3.4.1, -preserveLines -lowerCase) made of these, minus punctuation
KNOWN = {
    'A man\'s T-shirt says "STOP" .': "a man 's t-shirt says stop",
    "It can't be; he'll go, won't he?": "it ca n't be he 'll go wo n't he",
    "dogs' ears (two) [three]": "dogs ears -lrb- two -rrb- -lsb- three -rsb-",
    "Mr. Smith of the U.S. team at 5 a.m. No. 7 says no.": "mr. smith of the u.s. team at 5 a.m. no. 7 says no",
    "A black-and-white dog, red/white ball...": "a black-and-white dog red/white ball",
    "She cannot see what he's gonna do!!": "she can not see what he 's gon na do !!",
    "“curly” ‘quotes’ it’s – here — café": "curly quotes it 's here café",
    "It costs $5.50 or 1,000 or 50% at 10:30": "it costs $ 5.50 or 1,000 or 50 % at 10:30",
    "2x4 mp3 c++ 10-year-old 1990s": "2x4 mp3 c++ 10-year-old 1990s",
    "R&B and AT&T but black&white &amp; more": "r&b and at&t but black & white & more",
    "😀 smile": "smile",
    "": "",
    " . ": "",
}


@pytest.mark.parametrize("caption", KNOWN)
def test_known_tokens(caption):
    assert " ".join(ptb_tokens(caption)) == KNOWN[caption]


@needs_java
def test_known_tokens_are_java_s():
    assert tokenize(KNOWN, "java") == list(KNOWN.values())


@needs_java
def test_equal_to_java_on_real_captions(shared_data):
    captions = []
    for name in ("flickr8k-mini", "coco-mini"):
        for line in (shared_data(name) / "metadata.jsonl").read_text().splitlines():
            captions += json.loads(line)["captions"]
    assert len(captions) > 13_000
    different = [
        (c, java, ours)
        for c, java, ours in zip(captions, tokenize(captions, "java"), tokenize(captions, "python"))
        if java != ours
    ]
    assert not different


@pytest.mark.parametrize("tokenizer", [pytest.param("java", marks=needs_java), "python", "whitespace"])
def test_a_caption_stays_one_line(tokenizer):
    odd = ["a\nb", "", "c\r\nd\u2028e\x0bf", "   ", "last"]
    assert tokenize(odd, tokenizer) == ["a b", "", "c d e f", "", "last"]


def test_no_java_falls_back_and_asking_for_it_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert choose_tokenizer("auto") == "python"
    with pytest.raises(UserError, match="no java"):
        choose_tokenizer("java")
    with pytest.raises(UserError, match="'ptb' is not one of"):
        choose_tokenizer("ptb")


def test_java_that_fails_is_an_error(monkeypatch, tmp_path):
    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\necho no memory >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match=r"exit 3, .*no memory"):
        tokenize(["a dog"], "java")
