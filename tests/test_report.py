"""Tables, verdicts and pictures of evaluations, and the page that shows every answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_statistics import row
from typer.testing import CliRunner

from pandallm import cli, files
from pandallm.config import UserError
from pandallm.evaluate import charts, checkpoints, page, publish, report


class Checked(HTMLParser):
    """Every element ends where it should; keeps the tables' cells and the data."""

    VOID = ("meta", "img", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.data = ""
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)
        if self.open and self.open[-1] == "script" and data.startswith("{"):
            self.data += data


def checked(path: Path) -> Checked:
    parser = Checked()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    assert not parser.open
    return parser


HOSTILE = "</script><script>alert(1)</script><!-- & \u2028 \ud800 \x00 |*_`"


def made_run(folder: Path, model: str, right: int, n: int = 20, protocol: str = "generate", **changes: Any) -> Path:
    """An evaluation's folder with the first `right` of n questions right."""
    rows = [
        row(
            task=task,
            protocol=protocol,
            id=f"{task}{i}",
            pred="A" if i < right else "B",
            prompt=f"第{i}题",
            options=4,
        )
        | changes
        for task in ("c3-m", "logiqa-v2", "mine")
        for i in range(n)
    ]
    tasks = {
        name: report.summary([r for r in rows if r["task"] == name], protocol) for name in ("c3-m", "logiqa-v2", "mine")
    }
    results = {"model": model, "tasks": tasks}
    files.write_text(folder / "predictions.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    bits = {"a.txt": {"bits_per_character": 7.25, "characters": 10, "tokens": 20, "bits": 72.5}}
    files.write_json(folder / "results.json", results | {"bits_per_character": bits, "commit": None})
    return folder


def test_report(tmp_path: Path) -> None:
    a = made_run(tmp_path / "a", "some/model", 5)
    b = made_run(tmp_path / "b", "some/model", 15, output=HOSTILE)
    result = publish.write([a, b], tmp_path / "out")
    assert result == {
        "runs": [str(a), str(b)],
        "predictions": 120,
        "files": ["report.md", "report.html", "accuracy.png"],
    }
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    head = next(line for line in text.splitlines() if line.startswith("| model"))
    assert head == "| model | protocol | LogiQA-v2 | C3-d | C3-m | mine |"
    assert "| Panda-Instruct-7B, step 9000 (published) | generate | 31.93 | 47.30 | 57.04 |  |" in text
    assert f"| some/model ({b}) | generate | 75.00 (53.1 … 88.8) |  | 75.00 (53.1 … 88.8) |".replace("_", "\\_") in text
    assert "| some/model " in text.split("## Bits per character")[1] and "| 7.2500 |" in text
    assert "B is better than A by 50.0 points" in text and "![accuracy](accuracy.png)" in text
    parser = checked(tmp_path / "out" / "report.html")
    assert "Panda-7B (published)" in parser.cells
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in parser.loaded)  # nothing from elsewhere
    data = json.loads(parser.data)
    assert len(data["rows"]) == 120 and HOSTILE in data["texts"]
    line = dict(zip(data["fields"], data["rows"][-1], strict=True))
    assert line["run"] == f"some/model ({b})" and line["right"] == 0 and line["pred"] == "B" and line["gold"] == "A"
    assert data["texts"][line["prompt"]] == "第19题" and data["texts"][line["output"]] == HOSTILE
    assert "alert(1)</script>" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_checkpoints_in_order(tmp_path: Path) -> None:
    for step, right in ((9000, 12), (2000, 5), (10000, 14)):
        made_run(tmp_path / "evals" / f"step-{step:08d}", f"runs/sft/checkpoints/step-{step:08d}/model", right)
    base = made_run(tmp_path / "base", "base", 4)
    result = publish.write([base, tmp_path / "evals"], tmp_path / "out")
    assert [Path(run).name for run in result["runs"]] == ["base", "step-00002000", "step-00009000", "step-00010000"]
    assert "steps.png" in result["files"]
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    steps = [
        line.split(" | ")[0] for line in text.split("## Accuracy by step")[1].splitlines() if line.startswith("| ")
    ]
    assert steps[:5] == ["| step", "| ---", "| 2000", "| 9000", "| 10000"]
    # Only the last one is compared with the base.
    assert text.count("B is better") == 3 and "B: runs/sft, step 10000." in text
    publish.write([base], tmp_path / "out")  # what an earlier report left is gone
    assert not (tmp_path / "out" / "steps.png").exists()


def test_unlike_runs_are_reported_not_compared(tmp_path: Path) -> None:
    a, b = made_run(tmp_path / "a", "a", 5), made_run(tmp_path / "b", "b", 5, n=10)
    publish.write([a, b], tmp_path / "out")
    assert "b can't be compared with a: " in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_runs_are_compared_by_their_protocol(tmp_path: Path) -> None:
    folders = [
        made_run(tmp_path / f"{model}-{protocol}", model, right, protocol=protocol)
        for protocol in ("generate", "choice")
        for model, right in (("a", 5), ("b", 6))
    ]
    publish.write(folders, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"A: a \(.*a-(\w+)\); B: b \(.*b-(\w+)\)\.", text) == [("generate",) * 2, ("choice",) * 2]
    assert "can't be compared" not in text


def test_many_predictions_share_their_texts(tmp_path: Path) -> None:
    rows = [(f"run {i % 5}", row(id=str(i), prompt="长" * 2000, output="A")) for i in range(10_000)]
    text = page.html("many", [("Nothing", ["no figures"])], rows)
    assert len(text) < 2_000_000 and text.count("长" * 2000) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: (run / "predictions.jsonl").unlink(), "no such file"),
        (lambda run: (run / "predictions.jsonl").write_text("{"), "predictions.jsonl:1: not valid JSON"),
        (lambda run: (run / "predictions.jsonl").write_text("[]"), "predictions.jsonl:1: is no prediction"),
        (lambda run: (run / "predictions.jsonl").write_text(""), "has no line of c3-m by generate"),
        (lambda run: (run / "results.json").unlink(), "no such file"),
        (lambda run: (run / "results.json").write_text('{"tasks": []}'), "not the record"),
        (lambda run: (run / "results.json").write_text('{"tasks": {}}'), "no task's figures"),
        (lambda run: swap(run / "predictions.jsonl", '"correct": true', '"correct": false'), "disagree"),
    ],
)
def test_damaged_runs(tmp_path: Path, change: Callable[[Path], Any], said: str) -> None:
    run = made_run(tmp_path / "run", "m", 5)
    change(run)
    with pytest.raises(UserError) as e:
        publish.write([run], tmp_path / "out")
    assert said in str(e.value) and "\n" not in str(e.value) and not (tmp_path / "out").exists()


def swap(path: Path, old: str, new: str) -> None:
    files.write_text(path, path.read_text(encoding="utf-8").replace(old, new))


def test_bad_arguments(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", "m", 5)
    with pytest.raises(UserError, match="given twice"):
        publish.write([run, tmp_path / "x" / ".." / "run"], tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        publish.write([tmp_path / "nowhere"], tmp_path / "out")
    files.write_json(tmp_path / "sft" / "run.json", {})
    with pytest.raises(UserError, match="panda eval --checkpoints"):
        publish.write([tmp_path / "sft"], tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another --out"):
        publish.write([run], tmp_path / "file" / "out")


def test_pictures_of_others_are_left_alone(tmp_path: Path) -> None:
    photo = tmp_path / "report" / "steps.png"
    photo.parent.mkdir()
    photo.write_text("a photo")
    publish.write([made_run(tmp_path / "a", "one", 5)], photo.parent)
    assert photo.read_text() == "a photo"


def test_command(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", "m", 5)
    done = CliRunner().invoke(cli.app, ["eval", "report", str(run), "--out", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["predictions"] == 60


def test_pictures_of_awkward_names(tmp_path: Path) -> None:
    figure = charts.Figure95(0.5, 0.4, 0.6)
    names = dict.fromkeys(("_hidden", "$x^", "长名字" * 40, *(f"m{i}" for i in range(10))), figure)
    charts.bars({"一": names, "two": {"m1": figure}}, {"two": 0.25}, tmp_path / "bars.png")
    charts.curves({name: {name: {1: figure}} for name in names}, tmp_path / "curves.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("bars.png", "curves.png"))


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_models_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no training run"):
        checkpoints.models_of(tmp_path)
    files.write_json(tmp_path / "run.json", {"finished": False, "steps": 30})
    with pytest.raises(UserError, match="no checkpoint yet"):
        checkpoints.models_of(tmp_path)
    for step in (20, 10):
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "model").mkdir(parents=True)
        files.write_json(tmp_path / "checkpoints" / f"step-{step:08d}" / "complete.json", {})
    (tmp_path / "checkpoints" / "step-00000015").mkdir()  # never finished
    (tmp_path / "model").mkdir()
    assert list(checkpoints.models_of(tmp_path)) == ["step-00000010", "step-00000020"]
    files.write_json(tmp_path / "run.json", {"finished": True, "steps": 30})
    found = checkpoints.models_of(tmp_path)
    assert list(found) == ["step-00000010", "step-00000020", "step-00000030"]
    assert found["step-00000030"] == tmp_path / "model"
    files.write_json(tmp_path / "run.json", [])
    with pytest.raises(UserError, match="damaged"):
        checkpoints.models_of(tmp_path)
