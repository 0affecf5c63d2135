"""Corpora as they come: joined tables with nulls, archives of other things, lines of one width, endless talks, signs
for the terminal, and a passage with many questions."""

from __future__ import annotations

import io
import json
import random
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Prepare
from test_decontaminate import BAMBOO, HARBOUR, index, only, planted

from pandallm import prompt, tokenizer
from pandallm.data import clean, cut, decontaminate, show, sources
from pandallm.data.read import Bad
from pandallm.data.sources import Reading
from pandallm.model.names import resolve
from pandallm.prompt import Dialogue


def archive(*members: tuple[str, str]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two members with one name
        for name, content in members:
            file.writestr(name, content)
    return made.getvalue()


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a.jsonl", '{"text": "一"}'), ("a.jsonl", '{"text": "二"}')], "two members are called a.jsonl"),
        ([("[Content_Types].xml", "<Types/>"), ("xl/workbook.xml", "<workbook/>")], "an office document"),
        ([("mimetype", "application/epub+zip"), ("a.xhtml", "<p/>")], "an office document or e-book"),
    ],
)
def test_archives_that_are_no_corpora(of: Any, members: list[tuple[str, str]], said: str) -> None:
    (bad,) = of(archive(*members))
    assert isinstance(bad, Bad) and bad.cause == "bad_archive" and said in bad.detail


def test_nulls_of_joined_tables() -> None:
    said = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    wanted = sources.examples_of({"messages": said}, Reading())
    joined = {"messages": said, "prompt": None, "instruction": None, "output": None, "text": None}
    assert sources.examples_of(joined, Reading()) == wanted
    both = [{**turn, "from": None, "value": None, "human": None, "assistant": None} for turn in said]
    assert sources.examples_of({"messages": both}, Reading()) == wanted
    with pytest.raises(sources.Drop, match="empty_text"):
        sources.examples_of({"text": None}, Reading())


@pytest.mark.parametrize("line", ["- 词语", "|0001|字字字|", "a 词语 语词", "“好”，他说。"])
def test_shares_of_lines_of_one_width(line: str) -> None:
    """Whatever the text's length: no sample falls on the same place of every line."""
    one = f"{line}\n" * 20
    for count in range(1000, 1400, 7):
        many = f"{line}\n" * count
        assert clean.symbol_share(many) == pytest.approx(clean.symbol_share(one), abs=0.02)
        assert clean.han_share(many) == pytest.approx(clean.han_share(one), abs=0.02)


def test_a_long_talk_is_not_rendered_whole_for_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    tok = tokenizer.load(resolve("tiny"))
    prompt.set_format(tok, "chatml")
    talk = Dialogue(tuple((role, f"{role[0]}{i}") for i in range(400) for role in ("user", "assistant")))
    rendered: list[int] = []
    real = prompt.render

    def counted(words: Any, examples: list[Any], **keys: Any) -> Any:
        rendered.extend(len(example.messages) for example in examples)
        return real(words, examples, **keys)

    monkeypatch.setattr(prompt, "render", counted)
    (mine,) = cut.pieces(tok, [talk], 64, Counter())
    assert len(mine) > 50 and sum(rendered) < 800 + len(mine) * 3 * 64
    texts = "".join(str(tok.decode(piece.input_ids)) for piece in mine)
    assert all(f"a{i}<" in texts for i in range(400))


def test_a_corpus_does_not_steer_the_terminal(
    run: Prepare, corpus: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run([corpus("own", [{"text": "标题\x1b]0;owned\x07\x1b[2J，清屏。"}])])
    (text,) = show.run(str(tmp_path / "shards"), 1, "own", colour=False)
    assert "\x1b" not in text and "\x07" not in text and "标题" in text and "清屏" in text


def test_a_passage_with_many_questions_is_protected(tmp_path: Path) -> None:
    """Its n-grams are in many items, and yet no phrasing."""
    passage = "".join(random.Random(1).choices(HARBOUR + BAMBOO, k=400))
    for count in (decontaminate.COMMON - 5, decontaminate.COMMON + 5):
        asked = [{"instruction": f"{passage}\n问题{i}：第{i}天发生了什么？", "output": f"答{i}"} for i in range(count)]
        folder = tmp_path / str(count)
        folder.mkdir()
        (folder / "asked.json").write_text(json.dumps(asked))
        assert only(index(folder, many=asked), planted(passage)).contaminated
