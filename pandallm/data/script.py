"""Simplified <-> traditional Chinese, by OpenCC, which goes by words: 头发 is 頭髮, 发现 is 發現."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal

from pandallm.config import UserError

# OpenCC's names: s simplified, t traditional, tw Taiwan, hk Hong Kong; p: phrases too (鼠标 -> 滑鼠).
Script = Literal[
    "keep",
    "t2s",
    "s2t",
    "s2tw",
    "s2twp",
    "s2hk",
    "s2hkp",
    "tw2s",
    "tw2sp",
    "hk2s",
    "hk2sp",
    "t2tw",
    "t2hk",
    "tw2t",
    "hk2t",
]


@cache
def converter(script: Script) -> Callable[[str], str]:
    """A function that converts a text by any script but `keep`. UserError where OpenCC isn't installed."""
    try:
        import opencc
    except ImportError:
        raise UserError(f"clean: script: {script} needs OpenCC: pip install OpenCC") from None
    try:
        convert: Callable[[str], str] = opencc.OpenCC(script).convert
    except Exception as e:  # an older OpenCC lacks s2hkp and hk2sp, and says so in several ways
        raise UserError(f"clean: script: OpenCC can't do {script} ({e}): pip install -U OpenCC") from None
    return convert
