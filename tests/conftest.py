"""Shared by tests: a cache of their own, the tiny model, small corpora and shards, and the folder of real test data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
os.environ["OMP_NUM_THREADS"] = "1"  # results don't depend on how many cores a machine has; set before torch loads
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built-in models of this test run; subprocesses inherit it."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["PANDALLM_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real corpora, which are not in the repository for their licences' sake."""
    folder = Path(os.environ.get("PANDALLM_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no real test data here: set PANDALLM_TEST_DATA to its folder")
    return folder


WriteYaml = Callable[..., Path]
Prepare = Callable[..., dict[str, Any]]


@pytest.fixture
def write_yaml(tmp_path: Path) -> WriteYaml:
    """write_yaml(name, **keys) -> path of a YAML file with these keys."""

    def write(name: str, **keys: Any) -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(keys, allow_unicode=True), encoding="utf-8")
        return path

    return write


@pytest.fixture
def run(tmp_path: Path, write_yaml: WriteYaml) -> Prepare:
    """run(sources, out="shards", **keys) -> manifest of the shards made at tmp_path/out."""
    from pandallm.data import prepare

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


@pytest.fixture
def of(tmp_path: Path) -> Any:
    """of(content, layout, limit) -> the records of a file with this content; a name without a suffix."""
    from pandallm.data import read
    from pandallm.data.read import Bad, Record

    def of_(content: str | bytes, layout: str = "auto", limit: int = 1 << 40) -> list[Record | Bad]:
        path = tmp_path / "corpus"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        found, before = [], 0
        for span in read.spans_of(path, layout, limit):
            for item in read.records(span, layout):
                moved = {**vars(item), "line": item.line + before}
                found.append(Record(**moved) if isinstance(item, Record) else Bad(**moved))
            before += read.lines_in(span) if span.part else 0
        assert all(item.cause in read.CAUSES and "\n" not in item.detail for item in found if isinstance(item, Bad))
        return found

    return of_


@pytest.fixture(scope="session")
def demo_shards(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Shards of the demo's data for the tiny model: articles and dialogues, rows of 256 tokens."""
    from pandallm.data import prepare

    folder = tmp_path_factory.mktemp("demo")
    conf = folder / "data.yaml"
    corpora = ROOT / "pandallm" / "demo" / "corpora"
    keys = {
        "tokenizer": "tiny",
        "chat_format": "chatml",
        "seq_len": 256,
        "out": str(folder / "shards"),
        "workers": 1,
        "sources": [
            {"name": "news", "path": str(corpora / "news_zh.jsonl")},
            {"name": "home", "path": str(corpora / "instruct_home.jsonl")},
        ],
    }
    conf.write_text(yaml.safe_dump(keys), encoding="utf-8")
    prepare.run(str(conf), [])
    return folder / "shards"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Short texts: each fits into a row, so that both ways of measuring read them alike."""
    lines = [
        json.loads(line)
        for line in (ROOT / "pandallm/demo/heldout/news_zh.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    found = [next(value for value in line.values() if len(str(value)) > 80)[:60] for line in lines]
    path = tmp_path / "short.jsonl"
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in found), encoding="utf-8")
    return path
