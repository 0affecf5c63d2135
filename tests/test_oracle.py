"""A scripted oracle, scored through the whole path: accuracies, intervals and bias figures are what they must be."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pandallm import cli, files, tokenizer
from pandallm.config import UserError
from pandallm.evaluate import publish, runs, score, statistics
from pandallm.evaluate import run as evaluation
from pandallm.model import generate, load

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
        if figures["protocol"] == "cloze":
            assert "position_bias" not in figures  # no positions are shown
        else:
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
