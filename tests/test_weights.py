"""Weights and epochs: sources have the shares asked for, and what can't be is said."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Prepare
from test_prepare import DEMO, check, documents

from pandallm.config import UserError


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


def test_epochs(run: Prepare, corpus: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    source = corpus("own", [{"text": chars(12, i)} for i in range(100)], epochs=2.5)
    manifest = run([source], seq_len=256)
    data = check(tmp_path / "shards")
    seen = Counter(documents(data))
    assert len(seen) == 100 and set(seen.values()) == {2, 3} and abs(manifest["documents"] - 250) <= 3
    assert manifest["trained_tokens"] == pytest.approx(2.5 * sum(data.size(n)[1] for n in seen), abs=20)
    assert run([source | {"epochs": 0}, *DEMO])["sources"][0]["documents"] == 0


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
