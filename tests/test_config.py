"""Configurations: what is read, and that each mistake is one line with its place and remedy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pandallm import config
from pandallm.config import Config, UserError


class Corpus(Config):
    name: str
    weight: float | None = None
    instruction: str | list[str] = []


class Mixture(Config):
    seq_len: int = 2048
    learning_rate: float = 1e-5
    flag: bool = False
    sources: list[Corpus] = []
    free: dict[str, Any] = {}
    init: Corpus | None = None


SOURCES = "sources:\n- name: wiki\n- name: coig\n  weight: 0.5\n"


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """load(text, *overrides) -> Mixture, from conf.yaml with this text."""

    def load_(text: str | bytes, *overrides: str) -> Mixture:
        path = tmp_path / "conf.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return config.load(Mixture, path, overrides)

    return load_


@pytest.fixture
def complaint(load: Any, tmp_path: Path) -> Any:
    """complaint(text, *overrides) -> the UserError's one line, its folder left out."""

    def complain(text: str | bytes, *overrides: str) -> str:
        with pytest.raises(UserError) as e:
            load(text, *overrides)
        assert "\n" not in str(e.value)
        return str(e.value).replace(f"{tmp_path}/", "")

    return complain


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "1.e-5", "+1e-05", "0.00001", ".00001", "1_0e-6", '"1e-5"'])
def test_numbers(load: Any, text: str) -> None:
    assert load(f"learning_rate: {text}").learning_rate == 1e-5
    assert load("", f"learning_rate={text}").learning_rate == 1e-5


def test_words_stay_words(load: Any) -> None:
    free = load("free: {a: 1e, b: e5, c: e-5, d: 1e5x, e: 12e3}").free
    assert free == {"a": "1e", "b": "e5", "c": "e-5", "d": "1e5x", "e": 12000.0}


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "{}", b"\xef\xbb\xbfseq_len: 2048"])
def test_defaults(load: Any, text: str | bytes) -> None:
    assert load(text) == Mixture()


def test_overrides(load: Any) -> None:
    conf = load(
        SOURCES,
        "seq_len=16",
        "sources.1.weight=1e-3",
        "sources.0.instruction=[问, 答]",
        "free.a.b=c=d",
        "init={name: x}",
        "init.weight=0.25",
        "flag=true",
    )
    assert (conf.seq_len, conf.flag, conf.free) == (16, True, {"a": {"b": "c=d"}})
    assert conf.sources == [Corpus(name="wiki", instruction=["问", "答"]), Corpus(name="coig", weight=1e-3)]
    assert conf.init == Corpus(name="x", weight=0.25)
    assert load("seq_len: 3", "seq_len=4", "seq_len=5").seq_len == 5


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("flag: true\nseq_lenn: 3", "conf.yaml:2: seq_lenn: unknown key; did you mean 'seq_len'?"),
        ("sources:\n- name: a\n  wieght: 1", "conf.yaml:3: sources.0.wieght: unknown key; did you mean 'weight'?"),
        ("init:\n  nam: a", "conf.yaml:2: init.nam: unknown key; did you mean 'name'?"),
        (
            "init:\n  zzz: a",
            "conf.yaml:2: init.zzz: unknown key; known keys: instruction, name, weight",
        ),
        ("sources:\n- weight: 1", "conf.yaml:2: sources.0.name: this key is needed"),
        ("flag: no\nflag: yes", "conf.yaml:2: not valid YAML: key 'flag' is given twice"),
        ("sources:\n- {name: a, name: b}", "conf.yaml:2: not valid YAML: key 'name' is given twice"),
        ("\nseq_len: 1.5", "conf.yaml:2: seq_len: Input should be a valid integer, got a number with a frac"),
        ("seq_len: many", "conf.yaml:1: seq_len: Input should be a valid integer, unable to parse string"),
        ("seq_len:", "conf.yaml:1: seq_len: Input should be a valid integer (got None)"),
        ("flag: perhaps", "conf.yaml:1: flag: Input should be a valid boolean"),
        ("flag: 1\nsources: 3", "conf.yaml:2: sources: Input should be a valid list (got 3)"),
        ("sources:\n- 3", "conf.yaml:2: sources.0: Input should be a valid dictionary"),
        (
            "sources:\n- name: a\n  instruction:\n  - 问\n  - 3",
            "conf.yaml:5: sources.0.instruction.1: Input should be a valid string (got 3)",
        ),
        ("learning_rate: .nan", "conf.yaml:1: learning_rate: Input should be a finite number (got nan)"),
        ("learning_rate: .inf", "conf.yaml:1: learning_rate: Input should be a finite number (got inf)"),
        ("- seq_len: 1", "conf.yaml: a configuration is a mapping of keys to values"),
        ("seq_len", "conf.yaml: a configuration is a mapping of keys to values"),
        ("1: 2", "conf.yaml: 1: Keys should be strings"),
        ("a: [1, 2", "conf.yaml:1: not valid YAML"),
        ("a: 1\n\tb: 2", "conf.yaml:2: not valid YAML"),
        ("a: b: c", "conf.yaml:1: not valid YAML: mapping values are not allowed here"),
        ("? [a]\n: 1", "conf.yaml:1: not valid YAML: a key is a word"),
        ("a: !!python/object/apply:os.system [ls]", "conf.yaml:1: not valid YAML: could not determine a constructor"),
        ("a: 2026-13-45", "conf.yaml: not valid YAML: month must be in 1..12"),
        ("a: &a [*a]", "conf.yaml: not valid YAML: nested too deeply, or inside itself"),
        ("[" * 3000, "conf.yaml: not valid YAML: nested too deeply, or inside itself"),
        ("a: \x01", "conf.yaml: not valid YAML: unacceptable character"),
        ("名: 值".encode("gb18030"), "conf.yaml: not UTF-8 at byte 0: save it as UTF-8"),
    ],
)
def test_mistakes_in_the_file(complaint: Any, text: str | bytes, line: str) -> None:
    assert complaint(text).startswith(line)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seq_lenn=3", "'seq_lenn=3': seq_lenn: unknown key; did you mean 'seq_len'?"),
        ("sources.0.wieght=1", "'sources.0.wieght=1': sources.0.wieght: unknown key; did you mean 'weight'?"),
        ("sources=[{nam: a}]", "'sources=[{nam: a}]': sources.0.nam: unknown key; did you mean 'name'?"),
        ("sources=[{}]", "'sources=[{}]': sources.0.name: this key is needed"),
        ("seq_len=many", "'seq_len=many': seq_len: Input should be a valid integer"),
        ("sources.2.name=a", "'sources.2.name=a': sources is a list of 2; '2' is not in it"),
        ("sources.-1.name=a", "'sources.-1.name=a': sources is a list of 2; '-1' is not in it"),
        ("sources.².name=a", "'sources.².name=a': sources is a list of 2; '²' is not in it"),
        ("sources.0.name.x=a", "'sources.0.name.x=a': sources.0.name is 'wiki' and has no keys"),
        ("seq_len", "'seq_len': an override is written key=value"),
        ("=3", "'=3': an override is written key=value"),
        ("seq_len=[", "'seq_len=[':1: not valid YAML"),
        ("free={a: 1, a: 2}", "'free={a: 1, a: 2}':1: not valid YAML: key 'a' is given twice"),
    ],
)
def test_mistakes_on_the_command_line(complaint: Any, override: str, line: str) -> None:
    assert complaint(SOURCES, override).startswith(line)


def test_an_override_mends_the_file(load: Any) -> None:
    assert load("seq_len: many", "seq_len=8").seq_len == 8


def test_long_values_are_shortened(complaint: Any) -> None:
    assert len(complaint(f"sources: {'x' * 5000}")) < 200
    assert len(complaint(f"sources:\n- name: {list(range(5000))}")) < 200


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "conf.yaml").write_text("a: 1")
    for name, why in (("none.yaml", "no such file"), (".", "is a folder"), ("conf.yaml/x", "can't be read")):
        with pytest.raises(UserError, match=why):
            config.load(Mixture, tmp_path / name)
    with pytest.raises(UserError, match="can't be read"):
        config.load(Mixture, tmp_path / ("x" * 300))


def test_values_do_not_change(load: Any) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load("").seq_len = 3


def test_without_torch() -> None:
    """`import pandallm.config` works where neither torch nor transformers can be imported."""
    code = "import sys; sys.modules.update(torch=None, transformers=None); import pandallm.config, pandallm.prompt"
    subprocess.run([sys.executable, "-c", code], check=True)
