"""`panda data prepare` killed, run again or changed: only what must be is made anew, with a fresh run's bytes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Prepare, WriteYaml
from test_prepare import CORPORA, DEMO, check, contents, documents

from pandallm import files, tokenizer
from pandallm.data import prepare, show, tokenize, workers
from pandallm.model.names import resolve


def times(out: Path) -> dict[str, int]:
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in sorted(out.rglob("*")) if p.is_file()}


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
