"""`panda data prepare`: the same bytes however it was run, counts that add up, shares as asked, faults named."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, WriteYaml

from pandallm import cli, files, prompt, tokenizer
from pandallm.config import UserError
from pandallm.data import prepare, read, shards, show, tokenize, workers
from pandallm.data.shards import Shards
from pandallm.model.names import resolve
from pandallm.prompt import Dialogue, Text

CORPORA = ROOT / "pandallm" / "demo" / "corpora"
DEMO = [
    {"name": "wiki", "path": str(CORPORA / "wiki_zh_hant.jsonl")},
    {"name": "home", "path": str(CORPORA / "instruct_home.jsonl")},
]
Prepare = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, write_yaml: WriteYaml) -> Prepare:
    """run(sources, out="shards", **keys) -> manifest of the shards made at tmp_path/out."""

    def run_(sources: list[dict[str, Any]], out: str = "shards", **keys: Any) -> dict[str, Any]:
        keys = {"tokenizer": "tiny", "seq_len": 64, "workers": 1, "out": str(tmp_path / out), **keys}
        return prepare.run(str(write_yaml(f"{out}.yaml", sources=sources, **keys)), [])

    return run_


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """corpus(name, records, **keys) -> a source of these records as JSON lines."""

    def make(name: str, records: list[Any], **keys: Any) -> dict[str, Any]:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
        return {"name": name, "path": str(path), **keys}

    return make


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def times(out: Path) -> dict[str, int]:
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in sorted(out.rglob("*")) if p.is_file()}


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


# Runs in a process that has imported everything, where a run is a fork and costs a tenth of a second.
KILLS = """
import os, random, shutil, signal, sys, time
os.environ["TOKENIZERS_PARALLELISM"] = "false"
from pandallm.data import prepare

def start(conf, kill_at=None, after=False):
    pid = os.fork()
    if pid:
        return pid
    replace, calls = os.replace, 0
    def replace_or_die(*paths):
        nonlocal calls
        calls += 1
        if calls == kill_at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    os.replace = replace_or_die
    sys.stderr = open(os.devnull, "w")
    try:
        prepare.run(conf, [])
    except BaseException as e:
        print("failed:", repr(e), flush=True)
        os._exit(1)
    os._exit(0)

def killed(pid):
    return os.waitpid(pid, 0)[1] == signal.SIGKILL

a, b, out, results = sys.argv[2:]
n = points = 0
while True:
    rename, after = n // 2 + 1, n % 2
    was_killed = killed(start(a, rename, after))
    assert not killed(start(a))
    shutil.copytree(out, f"{results}/a-{n}")
    killed(start(b, rename, after))
    last = (n // 3) % 2
    assert not killed(start((a, b)[last]))
    os.rename(out, f"{results}/{'ab'[last]}-{n}-again")
    if not was_killed:
        break
    n, points = n + int(sys.argv[1]), points + 1

begin = time.time()
assert not killed(start(a))
whole = time.time() - begin
shutil.rmtree(out)
rng, deaths = random.Random(5), 0
while deaths < 4:
    pid = start(a)
    time.sleep(rng.random() * whole)
    os.kill(pid, signal.SIGKILL)
    if killed(pid):
        deaths += 1
    else:
        shutil.rmtree(out)
assert not killed(start(a))
os.rename(out, f"{results}/a-random")
print(points)
"""


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_kills(stride: int, corpus: Callable[..., dict[str, Any]], tmp_path: Path, write_yaml: WriteYaml) -> None:
    """Killed before or after each file appears, or at random moments, and started again: the same bytes, nothing left
    over. So too where the folder held another mixture, and where it is to hold that one again."""
    third = {"name": "out", "path": str(CORPORA / "instruct_out.jsonl"), "weight": 0.5}
    out = tmp_path / "shards"
    keys = {"tokenizer": "tiny", "seq_len": 128, "workers": 1, "out": str(out)}
    # A part of another content but the same size and the same shape; one that is shared; one that only one has.
    qa = corpus("qa", [{"qid": i, "title": f"问{i}", "answer": f"答{i}"} for i in range(9)], instruction="A")
    a = write_yaml("a.yaml", sources=[qa, *DEMO], **keys)
    b = write_yaml("b.yaml", sources=[qa | {"instruction": "B"}, DEMO[1], third], **{**keys, "packing": "none"})
    wanted = {}
    for name, conf in (("a", a), ("b", b)):
        prepare.run(str(conf), [])
        check(out)
        wanted[name] = contents(out)
        shutil.rmtree(out)
    results = tmp_path / "results"
    results.mkdir()
    command = [sys.executable, "-c", KILLS, *map(str, (stride, a, b, out, results))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr[-3000:]
    assert int(done.stdout) >= 30 // stride
    for folder in results.iterdir():
        assert contents(folder) == wanted[folder.name[0]], folder.name


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path: Path, write_yaml: WriteYaml) -> None:
    """After kill -9 of the command no worker writes on; the rerun's bytes are those of an undisturbed run."""
    text = (CORPORA / "wiki_zh.jsonl").read_text(encoding="utf-8")
    for name in ("a", "b"):
        lines = [json.loads(line) for line in text.splitlines() for _ in range(60)]
        for i, line in enumerate(lines):
            line["text"] += f"{name}{i}"
        (tmp_path / name).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    sources = [{"name": name, "path": str(tmp_path / name)} for name in ("a", "b")]
    keys = {"tokenizer": "tiny", "seq_len": 256, "sources": sources}
    conf = write_yaml("conf.yaml", out=str(tmp_path / "shards"), workers=2, **keys)
    parent = subprocess.Popen([sys.executable, "-m", "pandallm.cli", "data", "prepare", str(conf)])
    parts = tmp_path / "shards" / "parts"
    while parent.poll() is None and len(list(parts.glob(f"*tokens.bin.*{files.TEMPORARY}"))) < 2:
        time.sleep(0.05)
    workers = {int(path.name.split(".")[-2]) for path in parts.glob(f"*{files.TEMPORARY}")}
    assert len(workers) == 2 and parent.pid not in workers
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    time.sleep(2)
    for pid in workers:
        status = Path(f"/proc/{pid}/status")
        assert not status.exists() or "State:\tZ" in status.read_text()
    prepare.run(str(conf), ["workers=1"])
    prepare.run(str(conf), ["workers=1", f"out={tmp_path / 'fresh'}"])
    left, right = contents(tmp_path / "shards"), contents(tmp_path / "fresh")
    assert {k: v for k, v in left.items() if k.endswith("bin")} == {k: v for k, v in right.items() if k.endswith("bin")}


def test_a_rerun_does_no_work(run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(DEMO)
    before = times(tmp_path / "shards")
    monkeypatch.setattr(workers, "run_all", None)
    assert run(DEMO) == run(DEMO, workers=7) == json.loads(json.dumps(first))
    assert times(tmp_path / "shards") == before


def test_a_changed_config_redoes_what_it_must(run: Prepare, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    run(DEMO)
    before = times(out)

    def redone(sources: list[dict[str, Any]], **keys: Any) -> set[str]:
        """Parts made anew; after a check that they are what a fresh folder would hold."""
        nonlocal before
        run(sources, **keys)
        check(out)
        found = contents(out)
        after = times(out)
        run(sources, out="fresh", **keys)
        fresh = contents(tmp_path / "fresh")
        assert {k: v for k, v in found.items() if "json" not in k} == {
            k: v for k, v in fresh.items() if "json" not in k
        }
        shutil.rmtree(tmp_path / "fresh")
        changed = {
            name.split("/")[1].split("-")[0]
            for name in after
            if name.startswith("parts/") and before.get(name) != after[name]
        }
        before = after
        return changed

    extra = {"name": "out", "path": str(CORPORA / "instruct_out.jsonl")}
    assert redone([*DEMO, extra]) == {"out"}
    assert redone([extra, *DEMO]) == set()
    assert redone([*DEMO, extra | {"weight": 0.3}], seed=1, packing="none", max_bad=0.5) == set()
    assert redone(DEMO) == set() and not any("out-" in name for name in before)
    assert redone([DEMO[0], DEMO[1] | {"instruction": ["甲", "乙"]}]) == {"home"}
    assert redone([DEMO[0], DEMO[1] | {"instruction": ["甲", "乙"]}], seed=9) == {"home"}
    assert redone(DEMO, seq_len=65) == {"wiki", "home"}
    assert redone(DEMO, seq_len=65, chat_format="panda") == {"wiki", "home"}


def test_a_changed_corpus_file_is_read_again(
    run: Prepare, corpus: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    source = corpus("own", [{"text": "原来的文字"}])
    run([*DEMO, source])
    before = times(tmp_path / "shards")
    corpus("own", [{"text": "后来的文字"}])  # as many bytes
    run([*DEMO, source])
    check(tmp_path / "shards")
    after = times(tmp_path / "shards")
    assert {name for name in before if "parts/" in name and before[name] != after[name]} == {
        f"parts/own-00000.{kind}" for kind in (*(f"{k}.bin" for k in tokenize.KINDS), "json")
    }
    (shown,) = show.run(str(tmp_path / "shards"), 9, "own", False)
    assert "后⟦来的文字" in shown


def test_another_eos_is_another_tokenizer(run: Prepare, tmp_path: Path) -> None:
    """Which of its tokens ends a text is said beside the tokenizer proper."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(resolve("tiny"), folder)
    settings = folder / "tokenizer_config.json"
    for eos in ("<|endoftext|>", "<|im_end|>"):
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token": eos}))
        run(DEMO[:1], tokenizer=str(folder))
        data = check(tmp_path / "shards")
        last = max(documents(data))
        assert data.document(last)[0][-1] == tokenizer.load(folder).convert_tokens_to_ids(eos)


@pytest.mark.parametrize(
    ("name", "how"),
    [("parts/home-00000.mask.bin", "gone"), ("parts/home-00000.tokens.bin", "cut"), ("rows.sizes.bin", "cut")]
    + [("rows.documents.bin", "gone"), ("manifest.json", "gone"), ("manifest.json", "cut")],
)
def test_a_damaged_file_is_made_again(run: Prepare, tmp_path: Path, name: str, how: str) -> None:
    """And what a killed run left half written goes."""
    run(DEMO)
    out = tmp_path / "shards"
    whole = contents(out)
    if how == "gone":
        (out / name).unlink()
    else:
        (out / name).write_bytes(whole[name][:-3])
    (out / "parts" / f"home-00000.tokens.bin.123{files.TEMPORARY}").write_bytes(b"x")
    (out / f"manifest.json.123{files.TEMPORARY}").write_bytes(b"x")
    run(DEMO)
    assert contents(out) == whole


def chars(n: int, at: int) -> str:
    """n Chinese characters, others for each `at`."""
    rng = random.Random(at)
    return "".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(n))


def test_weights(run: Prepare, corpus: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """The share of the trained tokens is the one asked for, to within a document; where all have weights too."""
    rng = random.Random(3)
    big, small, other = (
        [{"text": chars(rng.randrange(2, 60), at + i)} for i in range(n)]
        for at, n in ((0, 150), (1000, 20), (2000, 40))
    )
    longest = 60 * 3 + 1
    for weights in ((None, 0.25, None), (None, 0.6, 0.3), (None, 0.02, 0.9), (0.5, 0.25, 0.25), (0.3, 0.1, 0.2)):
        given = [{} if w is None else {"weight": w} for w in weights]
        sources = [corpus(name, r, **g) for name, r, g in zip("abc", (big, small, other), given, strict=True)]
        manifest = run(sources, seq_len=256)
        check(tmp_path / "shards")
        whole, asked = manifest["trained_tokens"], sum(w or 0 for w in weights)
        for w, s in zip(weights, manifest["sources"], strict=True):
            if w is not None:
                wanted = w / asked if None not in weights else w
                assert abs(s["trained_tokens"] - wanted * whole) <= longest, (weights, s)


def test_weight_of_a_source_of_many_files(run: Prepare, tmp_path: Path) -> None:
    """COIG's dialogues are one a file: a share of them is drawn from all, not from each."""
    folder = tmp_path / "talks"
    folder.mkdir()
    for i in range(300):
        talk = {"round_1": {"prompt": f"第{i}问", "response": chars(5 + i % 7, i)}}
        (folder / f"{i}.json").write_text(json.dumps(talk, ensure_ascii=False, indent=1), encoding="utf-8")
    for epochs in (0.4, 0.5, 1.6):
        manifest = run([{"name": "talks", "path": str(folder), "epochs": epochs}])
        data = check(tmp_path / "shards")
        assert manifest["documents"] == pytest.approx(300 * epochs, rel=0.05)
        counts = Counter(data.provenance(n)[1] for n in documents(data))
        assert set(counts.values()) <= {1, int(epochs), int(epochs) + 1}
    manifest = run([DEMO[0], {"name": "talks", "path": str(folder), "weight": 0.25}])
    assert manifest["sources"][1]["share"] == pytest.approx(0.25, abs=0.002)


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


def test_epochs(run: Prepare, corpus: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    source = corpus("own", [{"text": chars(12, i)} for i in range(100)], epochs=2.5)
    manifest = run([source], seq_len=256)
    data = check(tmp_path / "shards")
    seen = Counter(documents(data))
    assert len(seen) == 100 and set(seen.values()) == {2, 3} and abs(manifest["documents"] - 250) <= 3
    assert manifest["trained_tokens"] == pytest.approx(2.5 * sum(data.size(n)[1] for n in seen), abs=20)
    assert run([source | {"epochs": 0}, *DEMO])["sources"][0]["documents"] == 0


def panda(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, list[str]]:
    """The command line's exit code and lines on standard error."""
    monkeypatch.setattr(sys, "argv", ["panda", "data", "prepare", *map(str, args)])
    with pytest.raises(SystemExit) as e:
        cli.main()
    return int(e.value.code or 0), capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("content", "line", "cause"),
    [
        ('{"text": "好"}\n{"text": "断\n{"text": "好好"}\n', 2, "bad_json"),
        ('\n\n{"text": 3}\n{"text": "好"}\n', 3, "bad_record"),
        ('[\n{"text": "好"},\n{"text": "断\n', 2, "bad_json"),  # in an array the number stands for the line
        ('{"text": "好"}\n{"body": "好"}\n', 2, "unknown_layout"),
    ],
)
def test_too_many_bad_records(
    content: str,
    line: int,
    cause: str,
    tmp_path: Path,
    write_yaml: WriteYaml,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line that names the file and the line, exit 2, nothing left behind; allowed, they are counted and named."""
    path = tmp_path / "broken.jsonl"
    path.write_text(content, encoding="utf-8")
    sources = [*DEMO, {"name": "broken", "path": str(path)}]
    conf = write_yaml("c.yaml", tokenizer="tiny", seq_len=64, workers=1, out=str(tmp_path / "shards"), sources=sources)
    code, lines = panda(monkeypatch, capsys, conf)
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith(f"panda: {path}:{line}: {cause}: ") and "max_bad is 0.01" in lines[0]
    assert not (tmp_path / "shards").exists()
    code, lines = panda(monkeypatch, capsys, conf, "max_bad=1")
    assert code == 0 and lines[0].startswith(f"warning: {path}:{line}: {cause}: ")
    (table,) = (s for s in check(tmp_path / "shards").manifest["sources"] if s["name"] == "broken")
    assert table["dropped"] == {cause: 1}


@pytest.mark.parametrize(
    ("source", "keys", "message"),
    [
        ({"path": "empty"}, {}, "nothing to train on: the corpora are empty (dropped: nothing)"),
        ({"path": "blank"}, {}, "nothing to train on: the corpora are empty (dropped: nothing)"),
        ({"path": "unanswered"}, {}, "nothing to train on: the corpora are empty (dropped: {'empty_answer': 1})"),
        ({"path": "long"}, {"seq_len": 8}, "nothing to train on: the corpora are empty (dropped: {'too_long': 1})"),
        ({"path": "none.jsonl"}, {}, "source own: none.jsonl: no such file or folder"),
        ({"path": "folder"}, {}, "source own: folder: the folder holds no files"),
        ({"path": "good"}, {"out": "good"}, "out: good can't be made: "),
        ({"path": "good"}, {"out": "good/below"}, "out: good/below can't be made: "),
        ({"path": "good"}, {"tokenizer": "no-eos"}, "no-eos: the tokenizer has no eos token"),
        ({"path": "good"}, {"tokenizer": "no-such"}, "no-such: no such folder"),
        ({"path": "good"}, {"chat_format": "llama3"}, "chat_format llama3: '<|eot_id|>' is not a special token"),
        ({"path": "good"}, {"chat_format": "chatlm"}, ":1: chat_format: Input should be 'panda', 'chatml'"),
        ({"path": "good"}, {"seq_len": 4}, "seq_len: Input should be greater than or equal to 8 (got 4)"),
        ({"path": "good", "format": "wikipedia"}, {}, "sources.0.format: not one of auto, text, lines, paragraphs, "),
        ({"path": "good", "name": "a/b"}, {}, "sources.0.name: letters, digits, _ and - only"),
        ({"path": "good", "weight": 0.5, "epochs": 1}, {}, "sources.0: give epochs or weight, not both"),
        ({"path": "good", "epochs": float("inf")}, {}, "sources.0.epochs: Input should be a finite number"),
        ({"path": "good", "weight": 0}, {}, "sources.0.weight: Input should be greater than 0"),
        ({"path": "good", "encoding": "latin-1"}, {}, "sources.0.encoding: not an encoding of Chinese text"),
        ({"path": "good", "encoding": "gbq"}, {}, "sources.0.encoding: not an encoding of Chinese text"),
        ({"path": "good", "by": "task"}, {}, "sources.0: by and cap say how a sample is drawn: give sample too"),
        ({"path": "good", "sample": 5, "cap": 3}, {}, "sources.0: cap limits the groups of by: give by too"),
        ({"path": "*.csv"}, {}, "source own: *.csv: no file has a name like that"),
        ({"path": "good"}, {"clean": {"preset": "strong"}}, "clean.preset: Input should be 'off', 'light' or 'web'"),
        ({"path": "good"}, {"clean": {"script": "s2x"}}, "clean.script: Input should be 'keep', 't2s'"),
        ({"path": "good"}, {"decontaminate": ["none.json"]}, "decontaminate: none.json: no such file or folder"),
        ({"path": "good"}, {"decontaminate": ["blank"]}, "decontaminate: blank: holds no evaluation items"),
    ],
)
def test_mistakes(
    source: dict[str, Any],
    keys: dict[str, Any],
    message: str,
    tmp_path: Path,
    write_yaml: WriteYaml,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each is one line and exit 2, and leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("")
    Path("blank").write_text("\n \n")
    Path("unanswered").write_text('{"inputs": "问", "targets": ""}')
    Path("long").write_text(json.dumps({"inputs": "问" * 100, "targets": "答"}))
    Path("good").write_text('{"inputs": "问", "targets": "答"}')
    Path("folder").mkdir()
    shutil.copytree(resolve("tiny"), "no-eos")
    settings = json.loads(Path("no-eos/tokenizer_config.json").read_text())
    del settings["eos_token"]
    Path("no-eos/tokenizer_config.json").write_text(json.dumps(settings))
    before = contents(tmp_path)
    conf = {"tokenizer": "tiny", "seq_len": 64, "workers": 1, "out": "shards", "sources": [{"name": "own", **source}]}
    write_yaml("c.yaml", **conf | keys)
    code, lines = panda(monkeypatch, capsys, "c.yaml")
    assert code == 2 and len(lines) == 1 and message in lines[0], lines
    Path("c.yaml").unlink()
    assert contents(tmp_path) == before and not Path("shards").exists()


def test_weights_that_cannot_be(run: Prepare, corpus: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    a, b = corpus("a", [{"text": "甲"}]), corpus("b", [{"text": "乙"}])
    nothing = corpus("n", [{"inputs": "问", "targets": ""}])
    with pytest.raises(UserError, match="the weights add up to 1 or more"):
        run([a | {"weight": 0.4}, b | {"weight": 0.6}, *DEMO])
    with pytest.raises(UserError, match="source n: it can't have weight 0.5: it holds nothing to train on"):
        run([a, nothing | {"weight": 0.5}])
    with pytest.raises(UserError, match="those hold nothing to train on"):
        run([a | {"weight": 0.5}, nothing])
    assert not (tmp_path / "shards").exists()
    assert run([a | {"weight": 0.4}, b | {"weight": 0.6}])["documents"] > 0


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


def test_provenance(run: Prepare, tmp_path: Path) -> None:
    """Source, file and line of every document, in every layout of files; of an array, the record's number."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "甲一"}\n\n\n{"text": "甲四"}\n{"text": ""}\n{"text": "甲六"}\n')
    (folder / "b.json").write_text(json.dumps([{"text": "乙一"}, {"text": "乙二"}], indent=2))
    (folder / "c").write_text("丙一\n不是标题\n")
    (folder / "d.json").write_text('{"english": "four", "chinese": "丁一"}')
    run([{"name": "own", "path": str(folder)}, *DEMO])
    data = check(tmp_path / "shards")
    found = {}
    for n in data.documents_of("own").tolist():
        source, file, line = data.provenance(n)
        found[tok().decode(data.document(n)[0])] = (source, Path(file).name, line)
    end = "<|endoftext|>"
    raw = {text: where for text, where in found.items() if text.endswith(end)}
    assert raw == {
        f"甲一{end}": ("own", "a.jsonl", 1),
        f"甲四{end}": ("own", "a.jsonl", 4),
        f"甲六{end}": ("own", "a.jsonl", 6),
        f"乙一{end}": ("own", "b.json", 1),
        f"乙二{end}": ("own", "b.json", 2),
        f"丙一\n不是标题{end}": ("own", "c", 1),
    }
    assert sorted(found[text] for text in found.keys() - raw) == [("own", "d.json", 1)] * 2
    with pytest.raises(UserError, match="no source 'none'; it has home, own, wiki"):
        data.documents_of("none")


def test_show_marks_what_is_trained(run: Prepare, corpus: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    talk = [{"inputs": "问", "targets": "答🐼"}, {"inputs": "a b", "targets": " 再 答 "}]
    path = corpus("own", [talk, {"text": "ab 𠮷野家"}])["path"]
    run([{"name": "own", "path": path}], seq_len=256)
    dialogue, text = show.run(str(tmp_path / "shards"), 9, "own", colour=False)
    header, _, body = dialogue.partition("\n")
    assert header.startswith(f"--- document, own, {path}:1, ") and header.endswith("trained")
    assert body == (
        "<|im_start|>user\n问<|im_end|>\n<|im_start|>assistant\n⟦答🐼<|im_end|>⟧\n"
        "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\n⟦再 答<|im_end|>⟧\n"
    )
    assert text.partition("\n")[2] == "a⟦b 𠮷野家<|endoftext|>⟧"
    (row,) = show.run(str(tmp_path / "shards"), 9, None, colour=True)
    assert "--- row 0, own, " in row and "\x1b[32m再 答<|im_end|>\x1b[0m" in row


def test_show_where_a_border_lies_inside_a_character(
    run: Prepare, corpus: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """A raw text's first token, not trained, may be a third of a character."""
    run([corpus("own", [{"text": "𠮷野家"}])])
    (text,) = show.run(str(tmp_path / "shards"), 1, "own", colour=False)
    assert text.partition("\n")[2] == "⟦𠮷野家<|endoftext|>⟧"


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


def test_token_dtype() -> None:
    assert shards.token_dtype(1 << 16) == np.dtype("<u2") and shards.token_dtype((1 << 16) + 1) == np.dtype("<u4")


def test_shards_that_cannot_be_read(run: Prepare, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no manifest.json; make the shards with: panda data prepare"):
        Shards(tmp_path)
    run(DEMO)
    manifest = tmp_path / "shards" / "manifest.json"
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text(text.replace('"format": 3', '"format": 1'), encoding="utf-8")
    with pytest.raises(UserError, match="shards of format 1, not 3; prepare them again"):
        Shards(tmp_path / "shards")
    manifest.write_text(text[:100], encoding="utf-8")
    with pytest.raises(UserError, match=r"manifest.json: damaged \(.*\); prepare the shards again"):
        Shards(tmp_path / "shards")
    manifest.write_text(text, encoding="utf-8")
    (tmp_path / "shards" / "parts" / "home-00000.mask.bin").write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"home-00000.mask.bin: missing or not \d+ bytes long; prepare the shards again"
    ):
        Shards(tmp_path / "shards")
