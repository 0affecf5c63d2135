"""Shared by all tests: a cache of their own, the tiny model, small shards, and the folder of real test data."""

from __future__ import annotations

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


@pytest.fixture
def write_yaml(tmp_path: Path) -> WriteYaml:
    """write_yaml(name, **keys) -> path of a YAML file with these keys."""

    def write(name: str, **keys: Any) -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(keys, allow_unicode=True), encoding="utf-8")
        return path

    return write


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
