"""Penn-Treebank tokens for caption metrics: Stanford's tokenizer through Java, or the same tokens in pure Python.

The reference implementation of BLEU, ROUGE-L, METEOR and CIDEr for captions (coco-caption, here `pycocoevalcap`) runs
Stanford's `PTBTokenizer -preserveLines -lowerCase` and then removes punctuation. Scores of two tools are only
comparable after the same tokenizer, so `ptb_tokens` gives the same tokens for English captions without Java. It was
written from the tokenizer's output, not from its source; the tests compare both.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from pycocoevalcap.tokenizer import ptbtokenizer

from blipren.training.errors import UserError

TOKENIZERS = ("auto", "java", "python", "whitespace")
PUNCTUATION = frozenset(ptbtokenizer.PUNCTUATIONS)

# Java ends a line at more characters than "\n"; one caption has to stay one line.
_LINE_BREAKS = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]+")

_TYPOGRAPHY = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "--",
        "\u2014": "--",
        "\u2026": "...",
        "\u00a0": " ",
        "\u00bd": "1/2",
        "\u00bc": "1/4",
        "\u00be": "3/4",
        "\u00ad": "",
        "\u20ac": "$",
        "\u00a3": "#",
    }
)
_BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"})
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&nbsp;": " "}

# Words that keep their full stop, as observed for 40,000 words: always, only when capitalised (American states that are
# everyday words too), only in front of a number.
_ABBREVIATIONS = """
al az cf co ct dr ft ga jr ky lt md mo mr ms mt ph rd rt sq sr st va vs vt wm adj adm adv ala apr aug ave bhd cie col cos
cpl dak dec det drs ens esq est etc ext feb fla fri gen gov hon inc ind jan jos jul jun kan ltd maj mar mfg mme mon mrs
mtg neb nev nov oct pfc plc pte pty pvt rep rev sen sep seq sfc sgt spc ste sys tel thu tue wed wis wyo alex ariz assn
bldg blvd brig bros capt cmdr colo corp dept elec intl mich minn mont msgr natl okla penn prof reps sens sept supt tenn
univ assoc calif messrs
""".split()
_CAPITALISED_ABBREVIATIONS = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash".split()
_NUMBERED_ABBREVIATIONS = "no nos fig op pp prop art ca".split()

_LETTER, _ALNUM = r"[^\W\d_]", r"[^\W_]"
# endings that are tokens of their own: 's 'm 'd 're 've 'll, n't
_CLITIC = rf"(?i:'(?:s|m|d|re|ve|ll)(?!{_ALNUM}))"
_NOT = rf"(?i:n['`]t(?!{_ALNUM}))"
_TOKEN = re.compile(
    rf"""
      </?[A-Za-z][^<>\s]*>
    | (?i:https?://|www\.)[^\s"<>|()]*[^\s"<>|().!?,;:-]
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
    | [@\#][A-Za-z_]\w*
    | {_CLITIC} | {_NOT}
    | [:;=]-?[()DP](?!{_ALNUM})
    | '\d0s(?!{_ALNUM}) | '[Nn](?:'|(?!{_ALNUM})) | '(?i:em|til|cause)(?!{_ALNUM}) | '[Tt](?=(?i:is|was)(?!{_ALNUM})) | [Yy]'(?=all(?!{_ALNUM}))
    | {_LETTER}(?:\.{_LETTER})+(?:\.|(?!{_ALNUM})) | (?i:ph\.d\.?)
    | {_LETTER}\.(?![^\W]|\.)
    | (?i:{"|".join(_ABBREVIATIONS)})\.(?!{_ALNUM}|\.) | (?:{"|".join(_CAPITALISED_ABBREVIATIONS)})\.(?!{_ALNUM}|\.)
    | (?i:{"|".join(_NUMBERED_ABBREVIATIONS)})\.(?=\s?\d)
    | \d+:\d\d(?=(?i:[ap]m)) | \d+\.\d+(?={_LETTER})
    | [-+]?(?:\d+(?:[.,:/-]\d+)*|\.\d+)(?!{_ALNUM}|-{_LETTER}|[.&/@_]{_ALNUM})
    | (?:{_ALNUM}(?!{_NOT}))*?{_ALNUM}(?={_NOT})
    | {_ALNUM}+(?:(?:[-_./@]|(?<=[A-Z])&(?=[A-Z])|(?!{_CLITIC})(?<=\b{_LETTER})'|(?i:(?<=\bma)'(?=am)))(?!{_LETTER}+{_NOT}){_ALNUM}+)*(?:\+\+|\#(?!{_ALNUM}))?
    | \.\.\. | [?!]+ | --+ | \*+ | ''? | ``? | \S
    """,
    re.VERBOSE,
)
_TWO_WORDS = {w: (w[:n], w[n:]) for w, n in dict(cannot=3, gonna=3, gotta=3, wanna=3, gimme=3, lemme=3).items()}


def ptb_tokens(caption: str) -> list[str]:
    """Return the tokens of a caption as the reference scorers see them: Penn Treebank, lower case, without punctuation.

    Pure Python, equal to `java ... PTBTokenizer -preserveLines -lowerCase` for English captions (the tests compare
    both); rare typography (SGML attributes, telephone numbers in brackets) may be split differently.
    """
    for entity, character in _ENTITIES.items():
        caption = caption.replace(entity, character)
    caption = _LINE_BREAKS.sub(" ", caption).translate(_TYPOGRAPHY)
    caption = "".join(
        c for c in caption if ord(c) <= 0xFFFF
    )  # Stanford's tokenizer drops characters of two code units
    tokens: list[str] = []
    for token in _TOKEN.findall(caption):
        token = token.lower()
        tokens.extend(_TWO_WORDS.get(token) or [token.translate(_BRACKETS)])
    # double quotes and dashes of any length become ``, '' and -- there, which are punctuation
    return [token for token in tokens if token not in PUNCTUATION and token != '"' and token.strip("-")]


def java_available() -> bool:
    """Whether a `java` command is on the PATH (a Java that does not start is an error when it is used)."""
    return shutil.which("java") is not None


def _java_tokens(captions: list[str]) -> list[list[str]]:
    """Tokenise by pycocoevalcap's jar. Its own wrapper writes into site-packages and fails at rare line breaks."""
    folder = Path(ptbtokenizer.__file__).parent
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "captions.txt"
        # a lone "." keeps an empty caption on a line of its own; as punctuation it is removed again
        lines = [_LINE_BREAKS.sub(" ", caption).strip() or "." for caption in captions]
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(folder / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)]
        command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
        done = subprocess.run([*command, str(source)], capture_output=True, check=False)
    output = done.stdout.decode("utf-8").removesuffix("\n").split("\n")
    if done.returncode != 0 or len(output) != len(lines):
        raise UserError(
            f"the Java PTB tokenizer failed (exit {done.returncode}, {len(output)} lines for {len(lines)} captions): "
            f"{done.stderr.decode(errors='replace').strip()[-300:]}; repair Java or use tokenizer='python'"
        )
    return [[token for token in line.split() if token not in PUNCTUATION] for line in output]


def choose_tokenizer(name: str = "auto") -> str:
    """Return the tokenizer to use: `auto` is `java` if there is one, else `python`. Raises `UserError` for other names."""
    if name not in TOKENIZERS:
        raise UserError(f"tokenizer {name!r} is not one of {', '.join(TOKENIZERS)}")
    if name == "auto":
        return "java" if java_available() else "python"
    if name == "java" and not java_available():
        raise UserError("tokenizer 'java' was asked for, but there is no java on the PATH; use tokenizer='python'")
    return name


def tokenize(captions: Iterable[str], tokenizer: str = "auto") -> list[str]:
    """Tokenise captions. Returns them in the same order, with tokens joined by one space.

    Args:
        tokenizer: `java` (Stanford's), `python` (`ptb_tokens`), `whitespace` (texts that are tokens already), `auto`.
    """
    captions = list(captions)
    tokenizer = choose_tokenizer(tokenizer)
    if tokenizer == "java" and captions:
        return [" ".join(tokens) for tokens in _java_tokens(captions)]
    split = str.split if tokenizer == "whitespace" else ptb_tokens
    return [" ".join(split(caption)) for caption in captions]
