"""The caption filter: rules that reject captions, each rejection with its rule and value.

The rules are for captions (answers to the default caption prompt). Answers to questions have to hold text and not be
too long; the other rules would reject "yes" and "3".
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields

from blipren.training.data.sources.settings import CaptionFilterSettings

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
class CaptionFilter(CaptionFilterSettings):
    """The rules and their limits. None, 0 or False switches a rule off."""

    @classmethod
    def from_settings(cls, settings: CaptionFilterSettings) -> CaptionFilter:
        """Return the filter of a command's settings."""
        return cls(**{rule.name: getattr(settings, rule.name) for rule in fields(cls)})

    def check(self, text: str) -> tuple[str, str] | None:
        """Return the first rule that a caption breaks and the value that breaks it; None for a good caption."""
        if self.max_chars and len(text) > self.max_chars:  # first, so that no other rule reads a megabyte
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
        """Return the settings of the rules, as a fingerprint holds them."""
        return asdict(self)


def tidied(text: str) -> str:
    """Return the text without doubled spaces and spaces before punctuation: "A dog  runs ." becomes "A dog runs."."""
    return re.sub(r"\s+([.,;:!?])", r"\1", " ".join(text.split()))


def normalized(text: str) -> str:
    """Return the words of a caption in lower case, without punctuation, by which captions are compared."""
    return " ".join(_WORD.findall(text.lower()))


def count_captions(pairs: Iterable[tuple[Sequence[str | None], Sequence[str]]]) -> Counter[str]:
    """Count the images that have each caption. Captions of one image alone are left out to save memory."""
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
    """The texts of a row that passed, their places among the row's own, and the texts that were rejected."""

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
    """Apply the rules to the texts of one image.

    Args:
        prompts, answers: its texts; the prompt of a caption is None.
        counts: images that have each caption, for `max_images_per_caption`.
    """
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
    """Return a table with one line a reason: number of rejected rows or texts, their share, and an example.

    Args:
        rejected: lines of `rejected.jsonl`.
        rows, texts: numbers of all rows and texts.
    """
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
