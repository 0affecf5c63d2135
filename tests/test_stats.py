"""`panda data stats` and `panda data show --dropped-by`: figures that add up, aligned text, a page by itself."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len

from pandallm import files, tokenizer
from pandallm.config import UserError
from pandallm.data import shards, show, stats
from pandallm.model.names import resolve

SEQ_LEN = 64
EVIL = "<script>alert(1)</script>\x1b[31m\x00&amp;\u202e坏"
Make = Callable[..., Path]


def source(name: str, kept: int, dropped: dict[str, int], **keys: Any) -> dict[str, Any]:
    about = {"epochs": 1.0, "repeats": 1, "changed": {}} | keys
    return {"name": name, "read": kept + sum(dropped.values()), "kept": kept, "dropped": dropped, "share": 0.5} | about


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make({name: lengths of its documents, a part each}, rows, tables, report, ...) -> a folder of shards."""

    def make_(
        parts: dict[str, list[list[int]]],
        rows: list[list[int]],
        tables: list[dict[str, Any]],
        samples: dict[str, Any] | None = None,
        hits: list[dict[str, Any]] | None = None,
        seq_len: int = SEQ_LEN,
    ) -> Path:
        out = tmp_path / "碎片"
        (out / "parts").mkdir(parents=True, exist_ok=True)
        listed, lengths, of = [], [], []
        for name, groups in parts.items():
            for number, group in enumerate(groups):
                part = f"{name}-{number:05d}"
                listed.append({"name": part, "source": name, "files": [f"{name}.jsonl"], "first_lines": [0]})
                ends = np.cumsum([0, *group])
                documents = [(ends[i], n, n - 1, i, 0) for i, n in enumerate(group)]
                records = [(b"", 0, i + 1, 0) for i in range(len(group))]
                np.array(records, shards.RECORD).tofile(out / f"parts/{part}.records.bin")
                np.array(documents, shards.DOCUMENT).tofile(out / f"parts/{part}.documents.bin")
                np.zeros(int(ends[-1]), "<u2").tofile(out / f"parts/{part}.tokens.bin")
                np.zeros(int(ends[-1]), "u1").tofile(out / f"parts/{part}.mask.bin")
                lengths += group
                of += [name] * len(group)
        flat = [n for row in rows for n in row]
        np.array(flat, "<u4").tofile(out / "rows.documents.bin")
        np.array([len(row) for row in rows], "<u4").tofile(out / "rows.sizes.bin")
        files.write_json(out / "report.json", {"samples": samples or {}, "contamination": hits or []})
        for table in tables:
            mine = [lengths[n] for n in flat if of[n] == table["name"]]
            table |= {"documents": len(mine), "tokens": sum(mine), "trained_tokens": sum(mine) - len(mine)}
        names = [str(p.relative_to(out)) for p in out.rglob("*") if p.is_file() and p.name != "manifest.json"]
        manifest = {
            "format": shards.FORMAT,
            "rows": len(rows),
            "utilisation": sum(t["tokens"] for t in tables) / (len(rows) * seq_len),
            "seq_len": seq_len,
            "chat_format": "chatml",
            "token_dtype": "<u2",
            "sources": tables,
            "parts": listed,
            "config": {"seq_len": seq_len, "out": str(out), "decontaminate": ["题库.json"] if hits else []},
            "sizes": {name: (out / name).stat().st_size for name in names if not name.startswith("stats")},
            "fingerprint": "f00d",
            "tokenizer_hash": "",
        }
        files.write_json(out / "manifest.json", manifest)
        return out

    return make_


def hit(item: str, dropped: bool, item_share: float, text_share: float = 0.1) -> dict[str, Any]:
    place = {"source": "新闻", "file": "新闻.jsonl", "line": 3, "text": f"碰到了{item}"}
    return place | {"item": item, "item_share": item_share, "text_share": text_share, "dropped": dropped}


@pytest.fixture
def small(make: Make) -> Path:
    """Two sources, one of a Chinese name in two parts; a document used twice; one not used."""
    samples = {
        "新闻": {
            "contaminated": [{"file": "新闻.jsonl", "line": 3, "text": "碰到了题", "like": "题库.json:7"}],
            "near_duplicate": [{"file": "新闻.jsonl", "line": 9, "text": EVIL, "like": "<b>原文</b>"}],
        },
        "web": {"bad_json": [{"file": "web<1>.jsonl", "line": 2, "text": "{"}, {"file": "w", "line": 5, "text": "["}]},
    }
    return make(
        {"新闻": [[10, 20], [30, 64]], "web": [[5, 40, 24]]},
        [[3], [5, 4, 4], [0, 1, 2]],
        [
            source("新闻", 4, {"contaminated": 2, "near_duplicate": 3}, changed={"texts_cut_up": 1}),
            source("web", 3, {"bad_json": 2, "duplicate": 1, "not_sampled": 4}, epochs=1.5, repeats=2),
        ],
        samples,
        [hit("题库.json:7", True, 0.9), hit("题库.json:7", False, 0.2), hit("c3.json:1", False, 0.3)],
    )


def test_figures_are_those_of_the_rows(small: Path) -> None:
    figures = stats.run(str(small))
    news, web = figures["sources"]
    keys = ("mean", "least", "median", "p90", "most")
    assert [news["lengths"][key] for key in keys] == [31.0, 10, 20, 64, 64]
    assert [web["lengths"][key] for key in keys] == [16.7, 5, 5, 40, 40], "used twice counts twice, unused not at all"
    for s in figures["sources"]:
        edges, counts = s["lengths"]["histogram"]["edges"], s["lengths"]["histogram"]["counts"]
        assert sum(counts) == s["documents"] and edges[0] == 0 and edges[-1] == SEQ_LEN and edges == sorted(set(edges))
        assert s["read"] == s["kept"] + s["dropped_total"]
    assert news["lengths"]["histogram"]["counts"][-1] == 1, "a document that fills a row lies in the last bin"
    rows = figures["row_tokens"]  # 64, 50 and 60 of 64
    assert (rows["least"], rows["median"], rows["most"]) == (50, 60, 64) and sum(rows["histogram"]["counts"]) == 3
    assert rows["histogram"]["counts"][15:] == [1, 0, 0, 1, 1]
    for key in ("read", "kept", "dropped_total", "documents", "tokens", "trained_tokens"):
        assert figures["total"][key] == news[key] + web[key]
    found = figures["contamination"]
    assert (found["dropped"], found["touching"]) == (2, 2)
    assert found["items"] == [
        {"item": "题库.json:7", "dropped": 1, "touching": 1, "item_share": 0.9, "text_share": 0.1},
        {"item": "c3.json:1", "dropped": 0, "touching": 1, "item_share": 0.3, "text_share": 0.1},
    ]


@pytest.mark.parametrize("block", [1, 2, 1000])
def test_blocks_change_nothing(make: Make, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random shards, counted the plain way and in blocks of any size; an empty part among them."""
    rng = np.random.default_rng(3)
    a, b = rng.integers(1, 9, 50).tolist(), rng.integers(1, 9, 70).tolist()
    parts: dict[str, list[list[int]]] = {"a": [a, []], "空": [[]], "b": [b]}
    lengths = a + b
    rows = [rng.integers(0, 120, rng.integers(1, 8)).tolist() for _ in range(40)]
    folder = make(parts, rows, [source(name, 1, {}) for name in parts])
    monkeypatch.setattr(stats, "BLOCK_ROWS", block)
    by_length, by_use = stats._counts(shards.Shards(folder))
    flat = [n for row in rows for n in row]
    for mine, numbers in zip(by_length, (range(50), (), range(50, 120)), strict=True):
        wanted = np.bincount([lengths[n] for n in flat if n in numbers], minlength=SEQ_LEN + 1)
        assert mine.tolist() == wanted.tolist()
    assert by_use.tolist() == np.bincount([sum(lengths[n] for n in row) for row in rows], minlength=65).tolist()


@pytest.mark.parametrize("seq_len", [8, 9, 100, 2048, 131072])
def test_edges(seq_len: int) -> None:
    edges = stats._edges(seq_len)
    assert edges[:2] == [0, 1] and edges[-1] == seq_len and all(b > a for a, b in zip(edges, edges[1:], strict=False))
    assert all(b <= 2 * a for a, b in zip(edges[1:], edges[2:], strict=False)), "none wider than an octave"


def test_text_is_aligned_and_narrow(small: Path) -> None:
    text = stats.text(stats.run(str(small)))
    lines = text.splitlines()
    assert max(map(cell_len, lines[1:-2])) <= 100
    head, news, web, total = lines[lines.index("Records") + 1 :][:4]
    ends = [cell_len(head[: m.end()]) for m in re.finditer(r"\S+", head)][1:]
    for line in (news, web):
        assert [cell_len(line[: m.end()]) for m in re.finditer(r"\S+", line)][1:] == ends, "by columns, not characters"
    assert news.split() == ["新闻", "9", "4", "5", "4", "124", "120", "50.0", "1", "1"]
    assert web.split() == ["web", "10", "3", "7", "3", "50", "47", "50.0", "1.5", "2"]
    assert total.split() == ["total", "19", "7", "12", "7", "174", "167", "2"]
    dropped = [" ".join(line.split()[:3]) for line in lines[lines.index("Dropped") + 2 :][:5]]
    causes = ["web bad_json 2", "web duplicate 1", "web not_sampled 4"]
    assert dropped == ["新闻 contaminated 2", "新闻 near_duplicate 3", *causes]
    assert "texts_cut_up" in text
    assert "items: 2; records that hold one (dropped): 2, that only touch one: 2 listed" in text
    assert lines[-2:] == [str(small / "stats.html"), str(small / "stats.png")]


def test_huge_numbers_and_long_names_stay_narrow(make: Make) -> None:
    name = "很长的名字" * 9 + "-end"
    table = source(name, 12_345_678_901, {"duplicate": 999_999_500, "not_sampled": 999_950})
    folder = make({name: [[1]]}, [[0]], [table])
    figures = stats.run(str(folder))
    figures["sources"][0] |= {"documents": 10**12, "tokens": 987_654_321_000, "trained_tokens": 10**15}
    text = stats.text(figures)
    body = text[text.index("Records") : text.index("Dropped")].splitlines()
    assert max(map(cell_len, body)) <= 100 and "12.35G" in text and "987.7G" in text and "…" in text and "-end" in text
    assert "12,345,678,901" in (folder / "stats.html").read_text(encoding="utf-8"), "the page has them in full"
    assert name in (folder / "stats.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("n", "shown"),
    [
        (0, "0"),
        (999_999, "999,999"),
        (1_000_000, "1M"),
        (999_949_999, "999.9M"),
        (999_950_000, "1G"),
        (10**15, "1000T"),
    ],
)
def test_short_numbers(n: int, shown: str) -> None:
    assert stats._short(n) == shown and len(shown) <= 7


class Tags(HTMLParser):
    """What a browser would see."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object", "b"), tag
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_page_stands_alone_and_escapes(small: Path) -> None:
    stats.run(str(small))
    page = (small / "stats.html").read_text(encoding="utf-8")
    tags = Tags(page)
    assert len(tags.links) == 1 and tags.links[0].startswith("data:image/png;base64,iVBOR")
    assert "url(" not in page and "@import" not in page and "\x1b" not in page and "\x00" not in page
    texts = tags.texts
    assert "<script>alert(1)</script>\\x1b[31m\\x00&amp;\u202e坏" in texts, "shown as it stands in the corpus"
    assert "<b>原文</b>" in texts and "web<1>.jsonl:2" in texts and "题库.json:7" in texts
    assert "decontaminate:\n- 题库.json" in html.unescape(page)


def test_funnel_goes_down_to_what_is_kept(small: Path) -> None:
    for s in stats.run(str(small))["sources"]:
        steps = stats.funnel(s)
        assert {cause: n for cause, n, _ in steps} == s["dropped"] and steps[-1][2] == s["kept"]
        left = s["read"]
        for _, n, after in steps:
            assert after == left - n
            left = after
    order = [cause for cause, _, _ in stats.funnel(source("x", 1, dict.fromkeys(["duplicate", "spam", "bad_json"], 1)))]
    assert order == ["spam", "bad_json", "duplicate"], "duplicates are looked for last"


def test_a_rerun_gives_the_same_bytes_and_touches_nothing_else(small: Path, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in small.rglob("*") if p.is_file()}
    stats.run(str(small), tmp_path / "a" / "b")
    assert {p: p.read_bytes() for p in small.rglob("*") if p.is_file()} == before
    stats.run(str(small))
    made = {p.name: p.read_bytes() for p in small.rglob("*") if p.is_file() and p not in before}
    assert made.keys() == {"stats.html", "stats.png"}
    assert {p.name: p.read_bytes() for p in (tmp_path / "a" / "b").iterdir()} == made


def test_labels_without_a_chinese_font(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "FONTS", ())
    assert stats._labels(["web", "新闻", "été"]) == (["web", "source 2 of the table", "été"], ["DejaVu Sans"])


@pytest.mark.filterwarnings("error:Glyph")
@pytest.mark.parametrize("fonts", [(), stats.FONTS])
def test_no_glyph_is_missing(small: Path, fonts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "FONTS", fonts)
    assert stats.run(str(small))["rows"] == 3


def test_sources_that_gave_nothing(make: Make) -> None:
    folder = make({"空": [[]], "a": [[7]]}, [[0]], [source("空", 0, {}, epochs=0.0, repeats=0), source("a", 1, {})])
    figures = stats.run(str(folder))
    assert figures["sources"][0]["lengths"]["median"] == 0
    text = stats.text(figures)
    assert "No record was dropped" in text and "No record was changed" in text and "were not looked for" in text


def test_mistakes(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no manifest.json"):
        stats.run(str(tmp_path))
    (blocker := tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file: the report can't be written there"):
        stats.run(str(small), blocker)
    with pytest.raises(UserError, match="below: the report can't be written there"):
        stats.run(str(small), blocker / "below")
    assert blocker.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("report.json", b"?" * 10, "report.json: damaged"),
        ("report.json", b"[]", "report.json: damaged"),
        ("report.json", b"\xff\xfe", "report.json: damaged"),
        ("rows.documents.bin", np.array([0, 1, 2, 99, 4, 5, 6], "<u4").tobytes(), "the rows don't hold"),
        ("rows.documents.bin", np.array([0, 1, 2, 3, 4, 5, 6], "<u4").tobytes(), "the rows don't hold"),
        ("rows.sizes.bin", np.array([7, 0, 0], "<u4").tobytes(), "the rows don't hold"),
        ("rows.sizes.bin", np.array([1, 3, 4], "<u4").tobytes(), "the rows don't hold"),
        ("rows.sizes.bin", b"", "rows.sizes.bin: missing or not 12 bytes long"),
    ],
)
def test_damaged_shards(small: Path, name: str, content: bytes, said: str) -> None:
    (small / name).write_bytes(content)
    if name == "report.json":  # as long as it was promised to be
        manifest = files.read_json(small / "manifest.json")
        manifest["sizes"][name] = len(content)
        files.write_json(small / "manifest.json", manifest)
    with pytest.raises(UserError, match=said):
        stats.run(str(small))
    assert not (small / "stats.html").exists()


def test_show_what_was_dropped(small: Path) -> None:
    folder = str(small)
    (only,) = show.dropped(folder, "near_duplicate", 3, None)
    place, text, *like = only.split("\n")
    assert (place, like) == ("--- near_duplicate, 新闻, 新闻.jsonl:9", ["--- like", "<b>原文</b>"])
    assert text == "<script>alert(1)</script>\\x1b[31m\\x00&amp;\u202e坏", "nothing steers the terminal"
    assert show.dropped(folder, "near_duplicate", 3, "新闻") == [only]
    both = ["--- bad_json, web, web<1>.jsonl:2\n{", "--- bad_json, web, w:5\n["]
    assert show.dropped(folder, "bad_json", 3, None) == both
    assert show.dropped(folder, "bad_json", 1, "web") == both[:1]
    assert show.dropped(folder, "not_sampled", 1, None) == ["--- not_sampled: 4 records, of which no samples are kept"]


@pytest.mark.parametrize(
    ("cause", "name", "said"),
    [
        ("spam", None, "'spam'; causes: bad_json, contaminated, duplicate, near_duplicate, not_sampled$"),
        ("", None, "was dropped for ''; causes: bad_json"),
        ("bad_json", "新闻", "no record of 新闻 was dropped for 'bad_json'; causes: contaminated, near_duplicate$"),
        ("bad_json", "none", "no source 'none'; it has web, 新闻$"),
    ],
)
def test_show_names_the_causes_there_are(small: Path, cause: str, name: str | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        show.dropped(str(small), cause, 3, name)


def test_show_needs_only_the_shards(small: Path) -> None:
    """The tokenizer is the one beside the rows, checked; the config's may be gone."""
    with pytest.raises(UserError, match="tokenizer: no tokenizer could be loaded .*; prepare the shards again"):
        show.run(str(small), 1, None, colour=False)
    tiny = tokenizer.load(resolve("tiny"))
    tiny.save_pretrained(str(small / "tokenizer"))
    with pytest.raises(UserError, match="not the tokenizer the shards were made with"):
        show.run(str(small), 1, None, colour=False)
    manifest = files.read_json(small / "manifest.json")
    manifest |= {"tokenizer_hash": tokenizer.fingerprint(tiny)}
    files.write_json(small / "manifest.json", manifest)
    (row,) = show.run(str(small), 1, None, colour=False)
    assert row.startswith("--- row 0, 新闻, 新闻.jsonl:2, 64 tokens, 0 trained\n") and "⟦" not in row
    (small / "tokenizer" / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        show.run(str(small), 1, None, colour=False)


def test_what_prepare_makes(demo_shards: Path, tmp_path: Path) -> None:
    manifest = files.read_json(demo_shards / "manifest.json")
    figures = stats.run(str(demo_shards), tmp_path)
    for key in ("documents", "tokens", "trained_tokens"):
        assert figures["total"][key] == manifest[key] > 0
    assert sum(figures["row_tokens"]["histogram"]["counts"]) == manifest["rows"]
    assert figures["row_tokens"]["mean"] == pytest.approx(manifest["utilisation"] * manifest["seq_len"], abs=0.1)
    assert f"seq_len: {manifest['seq_len']}" in (tmp_path / "stats.html").read_text(encoding="utf-8")
    assert "instruct_home.jsonl:1, " in show.run(str(demo_shards), 1, "home", colour=False)[0]


def panda(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pandallm.cli", "data", *args], capture_output=True, text=True)


def test_command(small: Path, tmp_path: Path) -> None:
    assert "Example: panda data stats" in panda("stats", "--help").stdout
    done = panda("stats", str(small), "--out", str(tmp_path / "x"), "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["files"] == [str(tmp_path / "x" / name) for name in ("stats.html", "stats.png")]
    assert figures == json.loads(json.dumps(stats.run(str(small), tmp_path / "x")))
    plain = panda("stats", str(small), "--out", str(tmp_path / "x"))
    assert plain.stdout == stats.text(figures) + "\n"
    dropped = panda("show", str(small), "--dropped-by", "bad_json", "-n", "1")
    assert dropped.stdout == "--- bad_json, web, web<1>.jsonl:2\n{\n", dropped.stderr
    wrong = panda("show", str(small), "--dropped-by", "spam", "--source", "web")
    assert wrong.returncode == 2 and "causes: bad_json, duplicate, not_sampled" in wrong.stderr
    wrong = panda("stats", str(tmp_path / "nowhere"))
    assert wrong.returncode == 2 and len(wrong.stderr.strip().splitlines()) == 1 and "nowhere" in wrong.stderr
