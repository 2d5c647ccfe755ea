"""Which caption texts are worth learning: small rules, each on or off, each rejection kept with rule and value.

The rules are for captions (answers to the default caption prompt). Answers to questions are only asked to hold text:
"yes" and "3" are good answers and bad captions.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

_TAGS = (
    "a|abbr|article|b|blockquote|body|br|button|center|code|div|em|embed|font|footer|form|frame|h[1-6]|head|header|hr|"
    "html|i|iframe|img|input|li|link|meta|nav|object|ol|p|pre|script|section|small|span|strong|style|sub|sup|svg|"
    "table|tbody|td|th|tr|u|ul|video"
)
_MARKUP = re.compile(
    rf"</?(?:{_TAGS})(?:\s[^<>]*)?/?>"
    r"|&(?:[a-z]{2,8}|#\d{1,6}|#x[0-9a-f]{1,5});"
    r"|https?://|\bwww\.[a-z0-9]|\b[a-z0-9\-]+\.(?:com|org|net|jpe?g|png|gif|html?)\b"
    r"|\[/?(?:url|img|b|i)[\]=]|\{\{|\}\}",
    re.IGNORECASE,
)
_BOILERPLATE = re.compile(
    r"click (?:here|to|on|for)|read more|learn more\b|sign up|log ?in to|subscribe|all rights reserved|©|\(c\) ?\d{4}"
    r"|copyright \d|stock (?:photo|image|vector|illustration|footage)|royalty[- ]free|shutterstock|getty ?images|istock"
    r"|alamy|dreamstime|(?:photo|image) (?:by|credit|courtesy)|no (?:description|caption|image) available"
    r"|image (?:may contain|not found|description)|download (?:free|now|this)|free (?:download|shipping)|add to cart"
    r"|buy (?:now|online)|(?:img|dsc|dscn|image|photo)[_\-]?\d{3,}|untitled(?: |$)|powered by"
    r"|\bas an ai\b|i(?:'m| am) (?:sorry|unable)|i can(?:no|')t (?:see|describe)",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w+(?:['’]\w+)*")


@dataclass(kw_only=True)
class CaptionFilter:
    """The rules and their limits; None, 0 or False switches a rule off."""

    min_words: int = 1
    """Fewest words."""
    max_words: int | None = 256
    """Most words."""
    max_chars: int | None = 2000
    """Most characters: a megabyte of text is no caption."""
    max_repetition: float | None = 0.5
    """Largest share of a caption's three-word sequences that are repeats of an earlier one; also refuses one word five
    times in a row."""
    markup: bool = True
    """Refuse HTML tags, entities, URLs and file names."""
    boilerplate: bool = True
    """Refuse what web pages write around pictures: credits, shop words, camera file names."""
    script: str | None = None
    """Script that the letters must be of, as Unicode names it: LATIN, CYRILLIC, ARABIC, CJK, HIRAGANA, ..."""
    min_script_share: float = 0.9
    """Least share of letters in that script."""
    tidy: bool = False
    """Refuses nothing: takes away doubled white space and spaces before punctuation marks, as in "a dog runs ."."""
    duplicates: bool = True
    """Keep only the first of equal captions of an image (letters and digits compared, in lower case)."""
    max_images_per_caption: int | None = None
    """A caption that more images than this have word for word says nothing about any of them. Reads all texts first."""

    def check(self, text: str) -> tuple[str, str] | None:
        """The first rule that the caption breaks, and the value that breaks it; None for a good caption."""
        if self.max_chars and len(text) > self.max_chars:  # first: no other rule has to read a megabyte
            return "max_chars", str(len(text))
        words = _WORD.findall(text.lower())
        if len(words) < self.min_words:
            return "min_words", str(len(words))
        if self.max_words and len(words) > self.max_words:
            return "max_words", str(len(words))
        if self.markup and (found := _MARKUP.search(text)):
            return "markup", found.group(0)[:80]
        if self.boilerplate and (found := _BOILERPLATE.search(text)):
            return "boilerplate", found.group(0)[:80]
        if self.max_repetition is not None and len(words) >= 5:
            if any(len(set(words[i : i + 5])) == 1 for i in range(len(words) - 4)):
                return "max_repetition", "one word five times in a row"
            triples = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
            share = 1 - len(set(triples)) / len(triples)
            if share > self.max_repetition:
                return "max_repetition", f"{share:.2f}"
        if self.script:
            letters = [letter for letter in text if letter.isalpha()]
            fitting = sum(unicodedata.name(letter, "").startswith(self.script.upper()) for letter in letters)
            if letters and fitting / len(letters) < self.min_script_share:
                return "script", f"{fitting / len(letters):.2f} {self.script.upper()}"
        return None

    def as_dict(self) -> dict:
        return asdict(self)


def tidied(text: str) -> str:
    """`"A dog  runs ."` -> `"A dog runs."`"""
    return re.sub(r"\s+([.,;:!?])", r"\1", " ".join(text.split()))


def normalized(text: str) -> str:
    """What two captions are compared by: words in lower case, without punctuation."""
    return " ".join(_WORD.findall(text.lower()))


def count_captions(pairs: Iterable[tuple[Sequence[str | None], Sequence[str]]]) -> Counter[str]:
    """How many images have each caption; captions of one image only are left out to save memory."""
    seen: set[int] = set()
    counts: Counter[str] = Counter()
    for prompts, answers in pairs:
        for text in {normalized(answer) for prompt, answer in zip(prompts, answers) if prompt is None}:
            if hash(text) in seen:
                counts[text] += 1
            seen.add(hash(text))
    return Counter({text: count + 1 for text, count in counts.items()})


@dataclass
class FilteredTexts:
    """What is left of a row's texts, which pairs they were, and what went for which reason."""

    prompts: list[str | None]
    answers: list[str]
    kept: list[int]
    rejected: list[tuple[str, str, str]]
    """`(rule, value, text)`"""


def filter_texts(
    prompts: Sequence[str | None],
    answers: Sequence[str],
    rules: CaptionFilter,
    counts: Counter[str] | None = None,
) -> FilteredTexts:
    """Applies the rules to the captions of one image; pairs of question and answer pass."""
    result = FilteredTexts([], [], [], [])
    seen: set[str] = set()
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        broken = None
        if prompt is None:
            answer = tidied(answer) if rules.tidy else answer
            broken = rules.check(answer)
            if broken is None and (rules.duplicates or rules.max_images_per_caption):
                text = normalized(answer)
                if rules.duplicates and text in seen:
                    broken = ("duplicates", "same caption of the same image")
                seen.add(text)
                if broken is None and counts and rules.max_images_per_caption:
                    if counts[text] > rules.max_images_per_caption:
                        broken = ("max_images_per_caption", str(counts[text]))
        elif rules.max_chars and max(len(prompt), len(answer)) > rules.max_chars:
            broken = ("max_chars", str(max(len(prompt), len(answer))))
        if broken is None:
            result.prompts.append(prompt)
            result.answers.append(answer)
            result.kept.append(index)
        else:
            result.rejected.append((*broken, answer[:200]))
    return result


def summary_table(rejected: Iterable[dict], rows: int, texts: int) -> str:
    """One line a reason: how many rows and texts went, their share, and an example."""
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    for line in rejected:
        key = (line["kind"], line["reason"])
        counts[key] += 1
        examples.setdefault(key, line.get("text") or line.get("value") or "")
    lines = [f"{'rejected':9}{'reason':24}{'count':>9}{'share':>8}  example"]
    for (kind, reason), count in sorted(counts.items(), key=lambda item: (item[0][0], -item[1])):
        share = count / max(1, rows if kind == "row" else texts)
        example = json.dumps(examples[kind, reason][:50], ensure_ascii=False)
        lines.append(f"{kind:9}{reason:24}{count:>9,}{share:>8.1%}  {example}")
    return "\n".join(lines) if counts else "nothing rejected"
