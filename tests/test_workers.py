"""Workers: the same bytes from any number of them, here or on a Ray cluster; faults that end in one line."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, WriteYaml

from pandallm.config import UserError
from pandallm.data import prepare, tokenize, workers

CORPORA = ROOT / "pandallm" / "demo" / "corpora"


@pytest.fixture
def conf(tmp_path: Path, write_yaml: WriteYaml, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mixture of several parts: files that are cut, repairs, near-duplicates, held-out items."""
    monkeypatch.setattr(tokenize, "PART_BYTES", (20_000, 20_000))
    monkeypatch.setattr(workers, "PROCESSES_PAY", 0)
    rng = random.Random(4)
    lines = (CORPORA / "instruct_home.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "home.jsonl").write_text("\n".join(lines + rng.sample(lines, 20)) + "\n", encoding="utf-8")
    held_out = [json.loads(line)["text"] for line in (CORPORA / "wiki_zh.jsonl").read_text("utf-8").splitlines()[:2]]
    (tmp_path / "eval.json").write_text(json.dumps([{"text": text} for text in held_out]), encoding="utf-8")
    names = ("wiki_zh", "wiki_zh_hant", "news_zh", "instruct_out")
    sources: list[dict[str, Any]] = [{"name": name, "path": str(CORPORA / f"{name}.jsonl")} for name in names]
    sources.append({"name": "home", "path": str(tmp_path / "home.jsonl"), "weight": 0.4})
    keys: dict[str, Any] = {"clean": {"preset": "light"}, "dedup": {"near": True}}
    keys["decontaminate"] = [str(tmp_path / "eval.json")]
    return write_yaml("conf.yaml", tokenizer="tiny", seq_len=256, out="-", sources=sources, **keys)


def made(out: Path) -> dict[str, bytes]:
    """The bytes of all files; where the config names `out`, it is blanked."""
    return {
        str(path.relative_to(out)): path.read_bytes().replace(str(out).encode(), b"OUT")
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def without_names(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without the hash of the config, which holds the name of `out`."""
    return {
        name: b"\n".join(line for line in data.split(b"\n") if not line.startswith(b' "fingerprint"'))
        for name, data in files.items()
    }


def test_one_two_and_four_workers(conf: Path, tmp_path: Path) -> None:
    for n in (1, 2, 4):
        manifest = prepare.run(str(conf), [f"out={tmp_path / f'out{n}'}", f"workers={n}"])
    assert len(manifest["parts"]) > 6
    dropped = {cause for source in manifest["sources"] for cause in source["dropped"]}
    assert dropped >= {"duplicate", "contaminated"}
    one = without_names(made(tmp_path / "out1"))
    assert one == without_names(made(tmp_path / "out2")) == without_names(made(tmp_path / "out4"))


RAY = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
from pandallm.data import prepare, tokenize
tokenize.PART_BYTES = (20_000, 20_000)
prepare.run(sys.argv[1], [f"out={sys.argv[2]}"], ray=cluster.address)
cluster.shutdown()
"""


@pytest.mark.slow
def test_two_ray_nodes(conf: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'pandallm[ray]'")
    prepare.run(str(conf), [f"out={tmp_path / 'here'}", "workers=1"])
    command = [sys.executable, "-c", RAY, str(conf), str(tmp_path / "there")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert without_names(made(tmp_path / "here")) == without_names(made(tmp_path / "there"))


def test_no_ray_cluster_is_one_line(conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--ray: Ray is not installed; pip install 'pandallm\[ray\]'"):
        prepare.run(str(conf), [f"out={out}"], ray="auto")
    assert not out.exists()


@pytest.mark.slow
def test_a_ray_address_without_a_cluster(conf: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'pandallm[ray]'")
    with pytest.raises(UserError, match="--ray 127.0.0.1:1: no cluster there"):
        prepare.run(str(conf), [f"out={tmp_path / 'out'}"], ray="127.0.0.1:1")


def test_a_killed_worker_is_one_line(conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel does when memory runs out. The whole parts are used by the next try."""
    monkeypatch.setattr(tokenize.Job, "__reduce__", lambda self: (_die, ()), raising=False)
    with pytest.raises(
        UserError, match="a worker was killed, most likely for want of memory; the same command goes on"
    ):
        prepare.run(str(conf), [f"out={tmp_path / 'out'}", "workers=2"])
    monkeypatch.undo()
    assert prepare.run(str(conf), [f"out={tmp_path / 'out'}", "workers=1"])["rows"] > 0


def _die() -> None:
    assert multiprocessing.parent_process(), "only in a worker"
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_bad_source_stops_the_run_before_the_next(conf: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    """Hours of other sources aren't tokenised first; what they have made stays if it was much."""
    (tmp_path / "bad.jsonl").write_text("{}\n" * 9, encoding="utf-8")
    read: list[str] = []
    wiki = {"name": "wiki", "path": str(CORPORA / "wiki_zh.jsonl")}
    bad = {"name": "bad", "path": str(tmp_path / "bad.jsonl"), "format": "auto"}
    news = {"name": "news", "path": str(CORPORA / "news_zh.jsonl")}
    keys = {"tokenizer": "tiny", "seq_len": 256, "out": str(tmp_path / "out"), "workers": 1}
    run = tokenize.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "run", lambda job: (read.append(job.source), run(job))[1])
        with pytest.raises(UserError, match=r"bad.jsonl:1: unknown_layout: .* \(9 of 9 records of bad are bad"):
            prepare.run(str(write_yaml("c.yaml", sources=[wiki, bad, news], **keys)), [])
    assert set(read) == {"wiki", "bad"} and not (tmp_path / "out").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "WORTH_KEEPING", 1)
        with pytest.raises(UserError, match="bad.jsonl:1: unknown_layout: "):
            prepare.run(str(write_yaml("c.yaml", sources=[wiki, bad, news], **keys)), [])
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "parts").glob("wiki*")}
    assert before and not (tmp_path / "out" / "manifest.json").exists()
    prepare.run(str(write_yaml("c.yaml", sources=[wiki, news], **keys)), [])
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "parts").glob("wiki*")}


def test_a_bad_source_stops_early(tmp_path: Path, write_yaml: WriteYaml, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the bad records of its first parts are too many for the whole, the rest isn't read; before that, it is."""
    monkeypatch.setattr(tokenize, "PART_BYTES", (1000, 1000))
    good, bad = '{"text": "好好学习，天天向上"}\n', '{"text": 7}\n'
    read: list[str] = []
    run = tokenize.run
    monkeypatch.setattr(tokenize, "run", lambda job: (read.append(job.name), run(job))[1])
    keys = {"tokenizer": "tiny", "seq_len": 64, "workers": 1, "max_bad": 0.05, "out": str(tmp_path / "out")}
    path = tmp_path / "c.jsonl"
    conf = write_yaml("c.yaml", sources=[{"name": "c", "path": str(path)}], **keys)
    path.write_text(bad * 200 + good * 500, encoding="utf-8")
    with pytest.raises(UserError, match=r"c.jsonl:1: bad_record: .* of \d+ records of c are bad; max_bad is 0.05"):
        prepare.run(str(conf), [])
    assert len(read) < 4
    path.write_text(bad * 10 + good * 500, encoding="utf-8")  # a fifth of the first part, 2 % of the whole
    assert prepare.run(str(conf), ["dedup.exact=false"])["sources"][0]["dropped"] == {"bad_record": 10}
