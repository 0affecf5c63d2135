"""`panda data prepare`: documents are the rendered records, the same bytes however it was run, counts that add up."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Prepare

from pandallm import files, prompt, tokenizer
from pandallm.data import prepare, read, tokenize, workers
from pandallm.data.shards import Shards
from pandallm.model.names import resolve
from pandallm.prompt import Dialogue, Text

CORPORA = ROOT / "pandallm" / "demo" / "corpora"
DEMO = [
    {"name": "wiki", "path": str(CORPORA / "wiki_zh_hant.jsonl")},
    {"name": "home", "path": str(CORPORA / "instruct_home.jsonl")},
]


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def tok() -> Any:
    tiny = tokenizer.load(resolve("tiny"))
    prompt.set_format(tiny, "chatml")
    return tiny


def check(out: Path) -> Shards:
    """Everything the manifest says, counted again over the rows."""
    data = Shards(out)
    manifest = data.manifest
    total: Counter[str] = Counter()
    by_source: dict[str, Counter[str]] = {s["name"]: Counter() for s in manifest["sources"]}
    for i in range(len(data)):
        used = 0
        for number in data.row(i):
            ids, mask = data.document(int(number))
            assert len(ids) == len(mask) > 0 and not mask[0] and mask.any()
            assert data.size(int(number)) == (len(ids), mask.sum())
            used += len(ids)
            found = Counter(documents=1, tokens=len(ids), trained_tokens=int(mask.sum()))
            total += found
            by_source[data.provenance(int(number))[0]] += found
        assert 0 < used <= manifest["seq_len"]
    assert len(data) == manifest["rows"]
    for key in ("documents", "tokens", "trained_tokens"):
        assert manifest[key] == total[key]
    assert manifest["utilisation"] == pytest.approx(total["tokens"] / (len(data) * manifest["seq_len"]), abs=1e-6)
    for s in manifest["sources"]:
        assert s["read"] == s["kept"] + sum(s["dropped"].values()) and s["kept"] >= 0
        for key in ("documents", "tokens", "trained_tokens"):
            assert s[key] == by_source[s["name"]][key]
        assert s["share"] == pytest.approx(s["trained_tokens"] / total["trained_tokens"], abs=1e-6)
    assert manifest["files"] == {name: files.hash_file(out / name) for name in manifest["files"]}
    kinds = (*tokenize.KINDS, "sketches") if manifest["config"]["dedup"]["near"] else tokenize.KINDS
    names = {f"parts/{p['name']}.{kind}" for p in manifest["parts"] for kind in (*(f"{k}.bin" for k in kinds), "json")}
    names |= {"manifest.json", "report.json", *prepare.ROWS}
    if manifest["config"]["decontaminate"]:
        names |= {"items.bin", "items.json"}
    assert {name for name in contents(out) if not name.startswith("tokenizer/")} == names
    return data


def documents(data: Shards) -> list[int]:
    return [int(n) for i in range(len(data)) for n in data.row(i)]


def test_manifest_is_what_the_rows_hold(run: Prepare, tmp_path: Path) -> None:
    manifest = run(DEMO, seq_len=512)
    data = check(tmp_path / "shards")
    assert [(s["name"], s["read"], s["kept"], s["epochs"]) for s in manifest["sources"]] == [
        ("wiki", 13, 13, 1.0),
        ("home", 78, 78, 1.0),
    ]
    assert sorted(documents(data)) == list(range(manifest["documents"])), "each document once"
    assert manifest["utilisation"] > 0.9


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_documents_are_the_rendered_records(run: Prepare, tmp_path: Path, packing: str) -> None:
    """Whatever the packing: the ids and masks of the shards are those of `render`, each once."""
    run(DEMO[1:], seq_len=2048, packing=packing)
    data = check(tmp_path / "shards")
    lines = (CORPORA / "instruct_home.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    examples = []
    for record in records:
        turns = record if isinstance(record, list) else [record]
        talk = [(role, t[key]) for t in turns for role, key in (("user", "inputs"), ("assistant", "targets"))]
        examples.append(Dialogue(tuple(talk)))
    wanted = sorted((r.input_ids, r.loss_mask) for r in prompt.render(tok(), examples))
    got = [data.document(n) for n in documents(data)]
    assert sorted((ids.tolist(), mask.tolist()) for ids, mask in got) == wanted
    if packing == "none":
        assert all(len(data.row(i)) == 1 for i in range(len(data))) and len(data) == len(lines)


def test_one_and_two_workers_make_the_same_bytes(run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(DEMO, workers=1)
    one = contents(tmp_path / "shards")
    shutil.rmtree(tmp_path / "shards")
    monkeypatch.setattr(workers, "PROCESSES_PAY", 0)
    pids: list[int] = []
    monkeypatch.setattr(tokenize, "_batches", lambda *_: pids.append(os.getpid()))  # unknown to spawned workers
    run(DEMO, workers=2)
    assert contents(tmp_path / "shards") == one and not pids


def test_thousands_of_files(run: Prepare, tmp_path: Path) -> None:
    """The original's COIG dialogues are 13,653 files, more than a process may open at once."""
    folder = tmp_path / "talks"
    folder.mkdir()
    for i in range(700):
        (folder / f"{i:05d}.json").write_text(json.dumps({"round_1": {"prompt": f"问{i}", "response": f"答{i}"}}))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        manifest = run([{"name": "talks", "path": str(folder)}])
        data = check(tmp_path / "shards")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert manifest["sources"][0]["kept"] == 700 and len(list((tmp_path / "shards/parts").iterdir())) == 5
    for n in documents(data)[::50]:
        _, file, line = data.provenance(n)
        assert f"问{int(Path(file).stem)}<" in tok().decode(data.document(n)[0]) and line == 1


def test_parts_are_cut_by_size(run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, size in enumerate((10, 10, 10, 50, 5, 5)):
        (folder / str(i)).write_text("a" * size)
    monkeypatch.setattr(tokenize, "PART_BYTES", (30, 30))
    spans = (span for path in sorted(folder.iterdir()) for span in read.spans_of(path, "text", 30))
    groups = [[int(Path(span.path).name) for span in group] for group in tokenize.groups(spans, 30)]
    assert groups == [[0, 1, 2], [3], [4, 5]]
    manifest = run([{"name": "texts", "path": str(folder), "format": "text"}], dedup={"exact": False})
    check(tmp_path / "shards")
    assert [(p["name"], len(p["files"])) for p in manifest["parts"]] == [
        ("texts-00000", 3),
        ("texts-00001", 1),
        ("texts-00002", 2),
    ]


def test_duplicates(run: Prepare, corpus: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """A source whose records are all another's gives none, in whatever layout and spacing; without dedup, all."""
    first = corpus("first", [{"inputs": f"问 {i}", "targets": "答"} for i in range(20)] + [{"text": "甲\n乙"}])
    again = [{"instruction": f"问\n{i}", "input": "", "output": " 答"} for i in range(20)] + [{"text": " 甲 乙\r\n"}]
    second = corpus("second", again + again[:3])
    manifest = run([first, second])
    check(tmp_path / "shards")
    one, two = manifest["sources"]
    assert (one["kept"], one["dropped"], one["documents"]) == (21, {}, 21)
    assert (two["kept"], two["dropped"], two["documents"]) == (0, {"duplicate": 24}, 0)
    assert [s["kept"] for s in run([second, first])["sources"]] == [21, 0]
    manifest = run([first, second], dedup={"exact": False})
    check(tmp_path / "shards")
    assert [s["documents"] for s in manifest["sources"]] == [21, 24]


@pytest.mark.parametrize("extra", range(4))
def test_long_texts_are_cut_up(extra: int, run: Prepare, corpus: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """The pieces, joined, are the text's ids, the last one too; each trains all but its first token."""
    seq_len = 16
    text = "a b" + "x y" * 20
    ids = prompt.render(tok(), [Text(text)])[0].input_ids
    while len(ids) % seq_len != extra:
        text += "。"
        ids = prompt.render(tok(), [Text(text)])[0].input_ids
    manifest = run([corpus("own", [{"text": text}])], seq_len=seq_len)
    data = check(tmp_path / "shards")
    pieces = [data.document(n) for n in sorted(documents(data))]
    assert [i for piece, _ in pieces for i in piece.tolist()] == ids
    assert all(mask.tolist() == [False] + [True] * (len(mask) - 1) for _, mask in pieces)
    assert manifest["sources"][0]["changed"] == {"texts_cut_up": 1} and manifest["sources"][0]["kept"] == 1
    assert -(-len(ids) // seq_len) <= len(pieces) <= len(ids) // (seq_len - 8) + 1


def test_long_dialogues_lose_their_end(run: Prepare, corpus: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    records = [
        {"inputs": "短", "targets": "答"},
        {"inputs": "问", "targets": "长" * 100},
        {"inputs": "长" * 100, "targets": "答"},
        {"english": "Hi", "chinese": "长" * 70},
    ]
    manifest = run([corpus("own", records)], seq_len=64, chat_format="panda")
    data = check(tmp_path / "shards")
    (table,) = manifest["sources"]
    assert (table["kept"], table["dropped"]) == (3, {"too_long": 1})
    assert table["changed"] == {"answers_shortened": 2, "examples_too_long": 1, "exchanges_too_long": 2}
    plain = tokenizer.load(resolve("tiny"))
    prompt.set_format(plain, "panda")
    whole = prompt.render(plain, [Dialogue((("user", "问"), ("assistant", "长" * 100)))])[0]
    cut = (whole.input_ids[:64], whole.loss_mask[:64])
    assert cut in [(ids.tolist(), mask.tolist()) for ids, mask in map(data.document, documents(data))]


def test_mutated_records_are_kept_or_counted(run: Prepare, tmp_path: Path) -> None:
    rng = random.Random(11)
    lines = []
    for path in sorted(CORPORA.glob("*.jsonl")):
        for line in path.read_bytes().splitlines()[:40]:
            wounded = bytearray(line[:600] + line[-20:] if rng.random() < 0.2 else line)
            for _ in range(rng.randrange(4)):
                at = rng.randrange(len(wounded))
                wounded[at : at + rng.randrange(3)] = bytes(rng.randrange(256) for _ in range(rng.randrange(3)))
            lines.append(bytes(wounded).replace(b"\n", b" "))
    (tmp_path / "soup").write_bytes(b"\n".join(lines))
    manifest = run([{"name": "soup", "path": str(tmp_path / "soup")}], max_bad=1)
    check(tmp_path / "shards")
    (table,) = manifest["sources"]
    assert table["read"] == sum(bool(line.strip()) for line in lines)
    assert table["kept"] > 20 and sum(table["dropped"].values()) > 20
