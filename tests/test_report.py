"""What is said of predictions: figures against a known script, verdicts, tables, and the page that shows them all."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_statistics import row
from typer.testing import CliRunner

from pandallm import cli, files, tokenizer
from pandallm.config import UserError
from pandallm.evaluate import charts, checkpoints, page, publish, report, runs, score, statistics
from pandallm.evaluate import run as evaluation
from pandallm.model import generate, load

# --- a scripted oracle, through the whole path -----------------------------------------------------------------------

N = 240
LETTERS = "ABCD"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A C3 file of N questions of 2, 3 and 4 options whose right ones stand where the place says."""
    folder = tmp_path_factory.mktemp("questions")
    records = []
    for i in range(N):
        options = [f"选项{i}之{k}" for k in range(2 + i % 3)]
        question = {"question": f"第{i}题选哪个？", "choice": options, "answer": options[gold_of(i)]}
        records.append([[f"第{i}篇。"], [question], f"q{i}"])
    files.write_json(folder / "c3-m-dev.json", records)
    return folder


def gold_of(i: int) -> int:
    return i // 3 % (2 + i % 3)


Script = Callable[[int], str]  # number of a question -> what the model writes


def scripted(monkeypatch: pytest.MonkeyPatch, script: Script) -> None:
    """A model that writes what the script says, and finds it the likeliest; all else is the real path."""
    words = tokenizer.load(load.resolve("tiny"))

    def said(ids: Sequence[int]) -> str:
        asked = re.search(r"第(\d+)题", words.decode(ids))
        assert asked
        return script(int(asked[1]))

    def greedy_batch(model: Any, prompts: Sequence[list[int]], max_new_tokens: int, *_: Any) -> list[list[int]]:
        written = [words(said(ids), add_special_tokens=False)["input_ids"] for ids in prompts]
        assert max(map(len, written)) <= max_new_tokens
        return written

    def likely(ids: Sequence[int], position: int, token: int) -> float:
        """Decided by an answer's last token: its letter, or its option's number."""
        if position < len(ids) - 1:
            return 0.0
        name = words.decode([token])[-1]
        return -1.0 if (LETTERS[int(name)] if name.isdigit() else name) == said(ids) else -2.0

    def log_likelihoods(model: Any, inputs: Sequence[list[int]], wanted: Any, *_: Any) -> list[list[float]]:
        return [[likely(ids, *pair) for pair in pairs] for ids, pairs in zip(inputs, wanted, strict=True)]

    monkeypatch.setattr(generate, "greedy_batch", greedy_batch)
    monkeypatch.setattr(score, "log_likelihoods", log_likelihoods)


def evaluate(planted: Path, out: Path, protocols: Sequence[str] = ("generate",), **changes: Any) -> dict[str, Any]:
    arguments = {"limit": None, "precision": "fp32"} | changes
    results = evaluation.run("tiny", ["c3-m"], planted, "dev", list(protocols), out=out, **arguments)
    return results["tasks"]["c3-m"]


def right_with(p: float, seed: int) -> Script:
    """Right with probability p, else one of the wrong options, evenly."""
    chance = random.Random(seed)
    plan = []
    for i in range(N):
        wrong = [LETTERS[k] for k in range(2 + i % 3) if k != gold_of(i)]
        plan.append(LETTERS[gold_of(i)] if chance.random() < p else chance.choice(wrong))
    return plan.__getitem__


@pytest.mark.parametrize("p", [0.0, 0.3, 0.7, 1.0])
def test_oracle_right_with_probability_p(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, p: float
) -> None:
    script = right_with(p, 11)
    scripted(monkeypatch, script)
    entry = evaluate(planted, tmp_path / "out", score.PROTOCOLS)
    right = sum(script(i) == LETTERS[gold_of(i)] for i in range(N))
    assert entry["accuracy_strict"] == entry["accuracy"] == entry["protocols"]["cloze"]["accuracy_norm"]
    for figures in (entry, *entry["protocols"].values()):
        assert figures["n"] == N and figures["accuracy"] == pytest.approx(right / N) and figures["no_letter"] == 0
        low, high = figures["ci95"]
        assert low <= p <= high  # of this seed; 95 of 100 would do
        for bound in {low, high} - {0.0, 1.0}:  # the score test is just not significant there
            z = abs(right / N - bound) / math.sqrt(bound * (1 - bound) / N)
            assert z == pytest.approx(1.959964, abs=1e-5)
        assert figures["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
        assert figures["position_bias"]["total_variation"] < 0.12


def test_oracle_biased_to_a(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, lambda i: "A")
    entry = evaluate(planted, tmp_path / "out")
    assert entry["accuracy"] == pytest.approx(sum(gold_of(i) == 0 for i in range(N)) / N)
    bias, distances = entry["position_bias"], []
    for options in (2, 3, 4):
        mine = [i for i in range(N) if 2 + i % 3 == options]
        gold = [sum(gold_of(i) == place for i in mine) / len(mine) for place in range(options)]
        assert bias["by_options"][str(options)]["answered"] == [1.0] + [0.0] * (options - 1)
        assert bias["by_options"][str(options)]["gold"] == pytest.approx(gold)
        assert bias["by_options"][str(options)]["accuracy"] == [1.0] + [0.0] * (options - 1)
        distances.append(1 - gold[0])  # what must move away from A
    assert bias["total_variation"] == pytest.approx(sum(distances) / 3)
    assert bias["accuracy_spread"] == 1.0


def test_every_order_of_the_options_undoes_a_bias(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 orders: all of 4 options once, of 3 four times, of 2 twelve times. Always A is then right by chance."""
    scripted(monkeypatch, lambda i: "A")
    entry = evaluate(planted, tmp_path / "out", limit=24, permute=24, wordings=["all"])
    assert entry["n"] == 24 and len(entry["wordings"]) >= 8 and entry["accuracy_std"] == 0.0
    assert entry["accuracy"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3) == entry["chance"]
    assert entry["accuracy_as_given"] == pytest.approx(sum(gold_of(i) == 0 for i in range(24)) / 24)
    assert entry["ci95"] == pytest.approx(statistics.wilson(24 * entry["accuracy"], 24))  # questions, not rows
    bias = entry["position_bias"]
    assert bias["total_variation"] == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3) and bias["accuracy_spread"] == 1.0
    assert [bias["by_options"][k]["gold"] for k in "234"] == [pytest.approx([1 / n] * n) for n in (2, 3, 4)]


def test_silent_oracle(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, lambda i: "" if i % 2 else "我不知道。")
    entry = evaluate(planted, tmp_path / "out")
    assert entry["accuracy"] == 0.0 and entry["no_letter"] == N and entry["ci95"][0] == 0.0
    assert entry["ci95"][1] == pytest.approx(1.959964**2 / (N + 1.959964**2))
    assert entry["position_bias"]["total_variation"] == 0.0 == entry["position_bias"]["accuracy_spread"]


def test_verbose_oracle(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first letter counts: one who thinks aloud before answering is taken at the first word."""
    said = ("经过仔细的分析，我认为答案是{}，因为其他的都不对。", "\n\n{}: 是它。不是B", "Answer: {}")
    scripted(monkeypatch, lambda i: said[i // 12 % 3].format(LETTERS[gold_of(i)]))
    entry = evaluate(planted, tmp_path / "out")
    # "Answer" begins with an A, which is then the answer.
    right = sum(i // 12 % 3 != 2 or gold_of(i) == 0 for i in range(N))
    assert entry["accuracy"] == pytest.approx(right / N) and entry["no_letter"] == 0
    assert entry["accuracy_strict"] == 1.0 and entry["no_letter_strict"] == 0


def test_oracles_compared(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = {"bad": right_with(0.4, 1), "good": right_with(0.6, 2), "nearly": right_with(0.42, 3)}
    for name, script in scripts.items():
        scripted(monkeypatch, script)
        evaluate(planted, tmp_path / name)
    right = {name: [script(i) == LETTERS[gold_of(i)] for i in range(N)] for name, script in scripts.items()}
    found = runs.compare(tmp_path / "bad", tmp_path / "good")["tasks"]["c3-m"]
    assert found["only_b"] == sum(b and not a for a, b in zip(right["bad"], right["good"], strict=True))
    assert found["difference"] == pytest.approx((sum(right["good"]) - sum(right["bad"])) / N)
    assert found["verdict"].startswith("B is better than A by")
    found = runs.compare(tmp_path / "bad", tmp_path / "nearly")["tasks"]["c3-m"]
    assert found["verdict"].startswith("no difference shown: ") and found["questions_needed"] > N


# --- reports ---------------------------------------------------------------------------------------------------------


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


def made_run(folder: Path, model: str, right: int, n: int = 20, **changes: Any) -> Path:
    """An evaluation's folder with the first `right` of n questions right."""
    rows = [
        row(
            task=task,
            protocol="generate",
            id=f"{task}{i}",
            pred="A" if i < right else "B",
            prompt=f"第{i}题",
            options=4,
        )
        | changes
        for task in ("c3-m", "logiqa-v2", "mine")
        for i in range(n)
    ]
    tasks = {name: report.summary([r for r in rows if r["task"] == name], "generate") for name in ("c3-m", "logiqa-v2")}
    results = {"model": model, "tasks": tasks | {"mine": report.summary(rows[2 * n :], "generate")}}
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


def test_every_checkpoint_is_evaluated_once(
    tmp_path: Path, planted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "sft"
    for step in (10, 20):
        shutil.copytree(load.resolve("tiny"), run / "checkpoints" / f"step-{step:08d}" / "model")
        files.write_json(run / "checkpoints" / f"step-{step:08d}" / "complete.json", {})
    files.write_json(run / "run.json", {"finished": False, "steps": 30})
    scripted(monkeypatch, right_with(0.5, 1))
    line = ["eval", "--checkpoints", str(run), "--task", "c3-m", "--data", str(planted), "--split", "dev", "--json"]
    line += ["--out", str(tmp_path / "evals")]
    done = CliRunner().invoke(cli.app, line)
    assert done.exit_code == 0, done.output
    assert list(json.loads(done.stdout.splitlines()[-1])) == ["step-00000010", "step-00000020"]
    monkeypatch.setattr(load, "load", lambda *a, **k: pytest.fail("loaded"))
    assert CliRunner().invoke(cli.app, line).exit_code == 0
    result = publish.write([tmp_path / "evals"], tmp_path / "out")
    assert len(result["runs"]) == 2 and "steps.png" in result["files"]
    for wrong in (["--model", "tiny"], ["--out", "."]):
        assert isinstance(CliRunner().invoke(cli.app, [*line, *wrong]).exception, UserError)
