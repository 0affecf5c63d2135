"""The embedded demo data: its layouts, amounts, and that nothing held out is trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pandallm import demo
from pandallm.data import sources

CORPORA, HELDOUT, EVAL = demo.ROOT / "corpora", demo.ROOT / "heldout", demo.ROOT / "eval"


def records(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def chinese(text: str) -> int:
    return len(re.findall(r"[\u4e00-\u9fff]", text))


def all_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "\n".join(
        all_text(v) for v in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
    )


def test_articles() -> None:
    """At least 25,000 Chinese characters, a part of them in traditional script, in the layouts they claim."""
    wiki = [r for name in ("wiki_zh", "wiki_zh_hant") for r in records(CORPORA / f"{name}.jsonl")]
    news = records(CORPORA / "news_zh.jsonl")
    assert {sources.recognise(r) for r in wiki} == {"wiki"} and {sources.recognise(r) for r in news} == {"news"}
    assert sum(chinese(r["text"]) for r in wiki) + sum(chinese(r["content"]) for r in news) >= 25_000
    hant = "".join(r["text"] for r in records(CORPORA / "wiki_zh_hant.jsonl"))
    assert chinese(hant) >= 5_000 and sum(hant.count(c) for c in "這個們來時國會說對學") > 100
    assert len({r["id"] for r in wiki}) == len(wiki) and len({r["news_id"] for r in news}) == len(news)


def test_instructions() -> None:
    found = [r for name in ("home", "out") for r in records(CORPORA / f"instruct_{name}.jsonl")]
    assert len(found) >= 200 and {sources.recognise(r) for r in found} == {"unified"}
    assert sum(isinstance(r, list) and len(r) > 1 for r in found) >= 40
    assert sum(bool(re.search(r"[A-Za-z]{3}", all_text(r)) and chinese(all_text(r))) for r in found) >= 40
    for record in found:
        sources.examples_of(record, sources.Reading())  # raises where one is empty or out of order


@pytest.mark.parametrize("name", ["c3-d-train", "c3-d-dev", "c3-m-train", "c3-m-dev"])
def test_reading_questions(name: str) -> None:
    for paragraphs, questions, _ in json.loads((EVAL / "c3" / f"{name}.json").read_text(encoding="utf-8")):
        assert all(isinstance(p, str) and p for p in paragraphs)
        for q in questions:
            assert 2 <= len(q["choice"]) <= 4 and len(set(q["choice"])) == len(q["choice"])
            assert q["answer"] in q["choice"]


def test_enough_questions() -> None:
    c3 = [q for path in (EVAL / "c3").iterdir() for d in json.loads(path.read_text(encoding="utf-8")) for q in d[1]]
    logic = [q for name in ("train", "dev") for q in records(EVAL / "logiqa_v2" / f"{name}_zh.txt")]
    assert len(c3) >= 60 and {len(q["choice"]) for q in c3} == {2, 3, 4}
    assert len(logic) >= 30 and all(len(q["options"]) == 4 and q["answer"] in range(4) for q in logic)


def test_nothing_held_out_is_trained_on() -> None:
    """No run of 13 Chinese characters of the held-out texts and questions stands in the training texts."""

    def runs(text: str) -> set[str]:
        text = "".join(re.findall(r"[\u4e00-\u9fff]", text))
        return {text[i : i + 13] for i in range(len(text) - 12)}

    trained = set().union(*(runs(all_text(r)) for path in CORPORA.iterdir() for r in records(path)))
    held = [r for path in HELDOUT.iterdir() for r in records(path)]
    held += [q for path in (EVAL / "c3").iterdir() for q in json.loads(path.read_text(encoding="utf-8"))]
    held += [q for path in (EVAL / "logiqa_v2").iterdir() for q in records(path)]
    assert not [r for r in held if runs(all_text(r)) & trained]
