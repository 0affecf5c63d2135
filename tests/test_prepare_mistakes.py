"""`panda data prepare`: a user's mistakes and broken corpora are one line and exit 2, and leave nothing behind."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteYaml
from test_prepare import DEMO, check, contents

from pandallm import cli
from pandallm.model.names import resolve


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
        ({"path": "good"}, {"out": "good"}, "source own: good lies in out (good)"),
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
        ({"path": "good"}, {"out": ""}, "out: String should have at least 1 character"),
        ({"path": "good"}, {"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"path": "good", "sample": 1, "by": "task"}, {}, "good:1: no_by_key: "),
        ({"path": "good", "epochs": 0.001}, {}, "nothing to train on: epochs, weights and samples leave no text"),
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


@pytest.mark.parametrize(
    "names",
    [
        ["parts/mine.txt"],
        ["parts/below/mine.txt"],
        ["manifest.json"],
        ["tokenizer/tokenizer.json"],
        ["report.json", "a"],
    ],
)
@pytest.mark.parametrize("corpus", ["好", ""])
def test_what_is_not_ours_is_left_alone(
    names: list[str],
    corpus: str,
    tmp_path: Path,
    write_yaml: WriteYaml,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text('{"mine": 1}')
    (tmp_path / "good").write_text(json.dumps({"text": corpus}) + "\n")
    before = contents(out)
    sources = [{"name": "own", "path": str(tmp_path / "good")}]
    conf = write_yaml("c.yaml", tokenizer="tiny", seq_len=64, workers=1, out=str(out), sources=sources)
    code, lines = panda(monkeypatch, capsys, conf)
    assert code == 2 and len(lines) == 1 and "which is not of shards; choose another folder" in lines[0]
    assert contents(out) == before


def test_other_files_in_the_folder_stay(
    tmp_path: Path, write_yaml: WriteYaml, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the shards, in a run that fails and in one that does not."""
    out = tmp_path / "out"
    (out / "x.partial").mkdir(parents=True)
    mine = ["README.md", "film.iso.partial", "x.partial/y"]
    for name in mine:
        (out / name).write_text("mine")
    (tmp_path / "good").write_text(json.dumps({"text": "好" * 30}) + "\n")
    sources = [{"name": "own", "path": str(tmp_path / "good")}]
    conf = write_yaml("c.yaml", tokenizer="tiny", seq_len=64, workers=1, out=str(out), sources=sources)
    assert panda(monkeypatch, capsys, conf, "sources.0.epochs=0.001")[0] == 2
    assert {name for name in contents(out) if (out / name).is_file()} == set(mine)
    assert panda(monkeypatch, capsys, conf)[0] == 0 and (out / "manifest.json").exists()
    assert all((out / name).read_text() == "mine" for name in mine)


def test_a_corpus_in_out(
    tmp_path: Path, write_yaml: WriteYaml, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "good.jsonl").write_text(json.dumps({"text": "好" * 30}) + "\n")
    sources = [{"name": "own", "path": str(tmp_path / "here")}]
    conf = write_yaml("c.yaml", tokenizer="tiny", seq_len=64, workers=1, out=str(tmp_path / "here"), sources=sources)
    code, lines = panda(monkeypatch, capsys, conf)
    assert code == 2 and "good.jsonl lies in out" in lines[0] and len(lines) == 1
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["good.jsonl"]
