"""Conversion of the script: OpenCC's own pairs, and what of a text it leaves alone."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
from test_clean import clean

from pandallm.config import UserError
from pandallm.data import script
from pandallm.data.clean import Clean, Cleaner
from pandallm.prompt import Text


def test_script() -> None:
    pytest.importorskip("opencc")
    assert clean("開放中文轉換，頭髮與發現", script="t2s") == "开放中文转换，头发与发现"
    assert clean("头发与发现", script="s2t") == "頭髮與發現"
    assert clean("鼠标和软件", script="s2twp") == "滑鼠和軟體"
    assert clean("轉換 English https://a.cn/x\n```\n# 轉換\n```", script="t2s") == (
        "转换 English https://a.cn/x\n```\n# 轉換\n```"
    )
    notes: Counter[str] = Counter()
    same = Text("简体，不变。")
    assert Cleaner(Clean(script="t2s"))(same, notes) is same and not notes


def test_a_missing_opencc_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opencc", None)
    script.converter.cache_clear()
    with pytest.raises(UserError, match="pip install"):
        Cleaner(Clean(script="t2s"))
    Cleaner(Clean())
    script.converter.cache_clear()


def test_gold_pairs_of_the_scripts(real_data: Path) -> None:
    pytest.importorskip("opencc")
    names = set(get_args(script.Script)) - {"keep"}
    tried: Counter[str] = Counter()
    for line in (real_data / "traditional" / "opencc_testcases.jsonl").read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        for name, expected in pair["expected"].items():
            if name in names:
                assert script.converter(name)(pair["input"]) == expected, (name, pair["id"])
                tried[name] += 1
    assert set(tried) == names and sum(tried.values()) >= 500
