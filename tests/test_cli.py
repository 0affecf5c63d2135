"""The command line: instant help, examples, exit codes, one line for a user's mistake."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

VERBS = [
    "data prepare",
    "data show",
    "data stats",
    "train",
    "delta make",
    "delta apply",
    "delta verify",
    "eval",
    "eval compare",
    "chat",
]


def panda(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pandallm.cli", *args], capture_output=True, text=True)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom pandallm.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 20  # only a hang fails here: speed is a benchmark's affair


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_helps_with_an_example(verb: str) -> None:
    done = panda(*verb.split(), "--help")
    assert done.returncode == 0 and "Example: panda" in done.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["eval", "--task", "c3-m"], "--model"),
        (["eval", "--model", "tiny", "--task", "c9", "--data", ".", "--out", "x"], "c9"),
        (["eval", "--json", "compare", "a", "b"], "--json: stands before 'compare'"),
        (["eval", "--model", "tiny", "--task", "c3-m/", "--out", "x"], "has no subjects"),
        (["eval", "--model", "tiny", "--task", "cmmlu/", "--out", "x"], "name a subject"),
        (["chat", "no-such-model"], "no-such-model"),
        (["chat", "tiny"], "no chat template"),
        (["chat", "tiny", "--chat-format", "chatlm"], "chatml"),
        (["chat", "tiny", "--temperature", "-1"], "temperature"),
        (["data", "show", "nowhere"], "nowhere"),
        (["delta", "verify", "--base", "tiny", "--delta", "nowhere"], "nowhere"),
        (["delta", "make", "--base", "tiny", "--tuned", "nowhere", "--delta", "d"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(args: list[str], said: str) -> None:
    done = panda(*args)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_no_such_command_and_option() -> None:
    assert panda("trian").returncode == 2
    assert panda("train").returncode == 2
    assert panda("chat", "tiny", "--nope").returncode == 2


def test_eval_and_compare(tmp_path: Path) -> None:
    """The figures are printed, and a model compared with itself differs in nothing."""
    from pandallm import demo

    args = ["--model", "tiny", "--chat-format", "chatml", "--task", "c3-d", "--data", str(demo.ROOT / "eval")]
    args += ["--split", "dev", "--limit", "3", "--protocol", "choice", "--out", str(tmp_path / "a")]
    done = panda("eval", *args)
    assert done.returncode == 0 and "c3-d" in done.stderr, done.stderr
    compared = panda("eval", "compare", str(tmp_path / "a"), str(tmp_path / "a"))
    assert compared.returncode == 0 and "McNemar" in compared.stdout and "+0.00" in compared.stdout
