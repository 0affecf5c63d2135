"""How the records of a source are read: parsed record -> examples (Text | Dialogue), or the cause of its drop."""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from pandallm.data.layouts import HAN, INSTRUCTIONS, LAYOUTS, PAIRS
from pandallm.data.questions import WORDINGS
from pandallm.data.talks import Drop, Reader, clean, turn_mark
from pandallm.prompt import Dialogue, Example, Text

__all__ = ["BAD", "LAYOUTS", "Drop", "Reading", "examples_of", "fixed_phrases", "group_of", "recognise"]

# Causes that mean "this is not what the corpus says it is": they count towards `max_bad`. The others are expected.
BAD = (
    *("bad_json", "bad_encoding", "bad_archive", "broken_array", "too_large"),  # read.py's
    *("bad_record", "unknown_layout", "no_by_key"),
)


@dataclass(frozen=True)
class Reading:
    """How the records of a source are read."""

    layout: str = "auto"  # a name of LAYOUTS
    instruction: tuple[str, ...] = ()  # replaces the layout's fixed one; of several, one is drawn a record
    seed: int = 0
    min_score: float | None = None  # records with a lower quality score are dropped
    values: tuple[tuple[str, str], ...] = ()  # ("name", "小熊") replaces {{name}}
    by: str | None = None  # the key whose value groups records for sampling


@cache
def fixed_phrases(reading: Reading) -> tuple[str, ...]:
    """What a layout or a config puts into every record: no sign that two records are alike. The longest first."""
    # Corpora are asked in the original's wording alone (layouts.py).
    wordings = [part.strip() for part in re.split(r"\{\w+\}", WORDINGS["original"].template)]
    languages = [INSTRUCTIONS["translation"].replace("{language}", language) for language in ("中文", "英文")]
    phrases = {*wordings, *languages, *INSTRUCTIONS.values(), *reading.instruction} - {""}
    return tuple(sorted(phrases, key=lambda phrase: (-len(phrase), phrase)))


def examples_of(record: Any, reading: Reading) -> list[Example]:
    """The examples of one record, at least one. Raises Drop with the cause, and nothing else whatever the record."""
    name = recognise(record) if reading.layout == "auto" else reading.layout
    if name is None:
        raise Drop("unknown_layout")
    read = LAYOUTS[name][1]
    phrasings = reading.instruction or (INSTRUCTIONS.get(name, ""),)
    try:
        if reading.min_score is not None:
            _check_score(record, reading.min_score)
        if isinstance(record, dict) and isinstance(record.get("instruction"), list):
            record = _with_one_phrasing(record, read, reading.seed)
        instruction = phrasings[0]
        if len(phrasings) > 1:
            instruction = phrasings[_draw(read(record, ""), reading.seed, len(phrasings))]
        examples = read(record, instruction)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise Drop("bad_record") from None
    if reading.values:
        examples = [_filled(example, reading.values) for example in examples]
    if any(_has_placeholder(example) for example in examples):
        raise Drop("placeholder")
    return examples


def group_of(record: Any, reading: Reading) -> str:
    """What a record is sampled by: the value of its key `by`, a text or number. Drop("no_by_key") if it has none."""
    value = record.get(reading.by) if isinstance(record, dict) else None
    if isinstance(value, int | float):
        value = str(value) if abs(value) < 1 << 64 else ""  # Python refuses to write out what has thousands of digits
    if not isinstance(value, str) or not value.strip():
        raise Drop("no_by_key")
    return value.strip()


def _draw(examples: list[Example], seed: int, count: int) -> int:
    """One of `count` phrasings for a record: by what it says, not by its ids, so that duplicates stay duplicates, and
    the same whatever the order of work."""
    return zlib.crc32(f"{seed} {examples}".encode()) % count


def _with_one_phrasing(record: dict[str, Any], read: Reader, seed: int) -> dict[str, Any]:
    """A record that brings several phrasings of its own instruction, with one of them."""
    phrasings = record["instruction"]
    if not all(isinstance(phrasing, str) and phrasing.strip() for phrasing in phrasings):
        raise Drop("bad_record")
    said = read(record | {"instruction": phrasings[0]}, "")
    return record | {"instruction": phrasings[_draw(said, seed, len(phrasings))]}


# Recognition


def recognise(record: Any) -> str | None:
    """The layout of a record: by the keys it has, or by what kind of items a list holds. None: none of LAYOUTS."""
    if isinstance(record, dict):
        # A null is a column of another set, where several were joined into one.
        keys = tuple(key for key, value in record.items() if value is not None)
        # Only few keys are remembered: each of a million talks of many rounds may have its own.
        by_keys = _by_keys if len(record) <= 32 else _by_keys.__wrapped__
        name = by_keys(keys) or by_keys(tuple(record))
        return "marked" if name == "json_text" and _is_talk(record["text"]) else name
    if isinstance(record, str):
        return "marked" if _is_talk(record) else "text"
    if not isinstance(record, list) or not record:
        return None
    if len(record) == 3 and isinstance(record[0], list) and isinstance(record[1], list):
        return "c3"
    if isinstance(record[0], dict):
        return "unified" if "inputs" in record[0] else "alpaca_turns" if "instruction" in record[0] else None
    return _by_cells(record) if all(isinstance(cell, str) for cell in record) else None


# A text that is asked about is no raw text, and a question without its options can't be answered.
_ASKS = frozenset({"question", "prompt", "query", "instruction", "input", "inputs", "options", "choices"})
_CHOICES = frozenset({"options", "choices", "A", "label"})


@lru_cache(maxsize=1024)
def _by_keys(keys: tuple[str, ...]) -> str | None:
    """The layout of records with these keys; a corpus has few sets of them."""
    has = frozenset(keys)
    for name, (wanted, _) in LAYOUTS.items():
        if wanted and wanted <= has:
            if name in ("article", "json_text", "content") and has & _ASKS:
                return None
            return None if (name in PAIRS or name == "squad_flat") and has & _CHOICES else name
    return "rounds" if "round_1" in has else None


def _by_cells(cells: list[str]) -> str | None:
    """Rows of a table without a header: a sentence and its translation, perhaps with its licence, or a question with
    its answer and the reasons for it."""
    if len(cells) == 2 or (len(cells) == 3 and cells[2].lstrip().startswith("CC")):
        return "pairs"
    if len(cells) != 3 or not re.search(r"[^\W\d]", cells[2]):  # no reasons: a score
        return None
    translated = HAN.search(cells[1]) and not HAN.search(cells[0])
    return None if translated else "cot"


def _is_talk(text: Any) -> bool:
    return isinstance(text, str) and turn_mark(clean(text[:200])) is not None


# Scores and placeholders


def _check_score(record: Any, least: float) -> None:
    """Raises Drop for a record below the score, and for one without: nothing says that it is as good as was asked."""
    score = _score(record) if isinstance(record, dict) else None
    if score is None:
        raise Drop("no_score")
    if score < least:
        raise Drop("low_score")


def _score(record: dict[str, Any]) -> float | None:
    """The first number among metadata.score, score and star."""
    metadata = record.get("metadata")
    inner = metadata.get("score") if isinstance(metadata, dict) else None
    for value in (inner, record.get("score"), record.get("star")):
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                score = float(value)
            except (ValueError, OverflowError):
                continue
            if math.isfinite(score):
                return score
    return None


# Who is to be named in an answer: {{name}}, in prose. Behind a command, ^, _, $ or a brace such braces are LaTeX's
# or a shell's, in code a template's; with blanks, dots or bars inside they are Jinja's, Vue's or a wiki's.
_PLACEHOLDER = re.compile(r"(?<![\\^_{}$A-Za-z0-9])\{\{[^\W\d_]\w+\}\}")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)


def _has_placeholder(example: Example) -> bool:
    """Whether a talk leaves a name open. Raw texts keep what they have: braces in an article are its own subject."""
    return isinstance(example, Dialogue) and any(
        "{{" in text and _PLACEHOLDER.search(_CODE.sub("", text)) for _, text in example.messages
    )


def _filled(example: Example, values: tuple[tuple[str, str], ...]) -> Example:
    if isinstance(example, Text):
        return Text(_fill(example.text, values))
    if not any("{{" in text for _, text in example.messages):
        return example
    return Dialogue(tuple((role, _fill(text, values)) for role, text in example.messages))


def _fill(text: str, values: tuple[tuple[str, str], ...]) -> str:
    for name, value in values:
        text = text.replace("{{" + name + "}}", value)
    return text
