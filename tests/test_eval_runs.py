"""evaluate/: whole runs, which are kept, go on, and are compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pandallm import demo, files, log, tokenizer
from pandallm.config import UserError
from pandallm.data.questions import letter
from pandallm.evaluate import report, runs, score, statistics, tasks
from pandallm.evaluate import run as evaluation
from pandallm.model import load

DEMO = demo.ROOT / "eval"
BASE = {"split": "dev", "limit": 3, "data": DEMO, "model": "tiny", "protocols": ["generate"], "precision": "fp32"}


@pytest.fixture(scope="module")
def tiny() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = load.resolve("tiny")
    return load.load(folder, torch.float32).eval(), tokenizer.load(folder)


def words_of_tiny(chat_format: str) -> PreTrainedTokenizerBase:
    words = tokenizer.load(load.resolve("tiny"))
    assert score.use_format(words, chat_format) == chat_format
    return words


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything in it."""
    out = tmp_path_factory.mktemp("run") / "deep" / "out"
    texts = tmp_path_factory.mktemp("texts")
    (texts / "a.txt").write_bytes("\ufeff你好，\r\n世界。".encode())
    (texts / "b.jsonl").write_text('{"text": "山"}\n\n{"content": "水"}\n', encoding="utf-8")
    arguments = BASE | {"protocols": ["generate", "choice"], "texts": [texts / "a.txt", texts / "b.jsonl"]}
    evaluation.run(tasks=["c3-m", "logiqa-v2"], out=out, **arguments)
    files.write_json(out.parent / "arguments.json", {"texts": [str(texts / "a.txt"), str(texts / "b.jsonl")]})
    return out


def rerun(out: Path, **changes: Any) -> dict[str, Any]:
    texts = [Path(p) for p in files.read_json(out.parent / "arguments.json")["texts"]]
    arguments = BASE | {"protocols": ["generate", "choice"], "tasks": ["c3-m", "logiqa-v2"], "texts": texts} | changes
    return evaluation.run(out=out, **arguments)


def test_results(finished: Path) -> None:
    results = files.read_json(finished / "results.json")
    assert sorted(p.name for p in finished.iterdir()) == ["predictions.jsonl", "results.json"]
    assert results["model"] == "tiny" and results["precision"] == "fp32" and results["versions"]["torch"]
    assert list(results["tasks"]) == ["c3-m", "logiqa-v2"] and "commit" in results
    rows = [json.loads(line) for line in (finished / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2 * 2 * 3
    for (task, protocol), entry in report.entries(results).items():
        mine = [row for row in rows if (row["task"], row["protocol"]) == (task, protocol)]
        assert entry["n"] == 3 == len(mine) and entry["protocol"] == protocol
        assert entry["accuracy"] == pytest.approx(sum(row["correct"] for row in mine) / 3)
        assert entry["ci95"] == list(statistics.wilson(sum(row["correct"] for row in mine), 3))
        assert entry["wordings"] == [{"wording": "original", "accuracy": entry["accuracy"]}]
        assert entry["accuracy_std"] == 0.0 and entry["truncated"] == 0
        assert entry["no_letter"] == sum(row["pred"] is None for row in mine)
        assert entry["chat_format"] == "none" and entry["split"] == "dev" and entry["seconds"] >= 0
        assert entry["data"] == files.hash_file(tasks.find(task, DEMO, "dev")[0])
        for row, question in zip(mine, tasks.load(task, DEMO, "dev"), strict=False):
            assert row["id"] == question.id and row["prompt"] == tasks.prompt_for(question, "original")
            assert row["gold"] == letter(question.gold) and row["correct"] == (row["pred"] == row["gold"])
            assert row["wording"] == "original" and row["truncated"] is False
    assert set(results["tasks"]["c3-m"]["protocols"]) == {"choice"}
    assert results["bits_per_character"]["a.txt"]["characters"] == len("你好，\n世界。")
    assert results["bits_per_character"]["b.jsonl"]["characters"] == 2
    shown = report.table(results)
    assert "c3-m" in shown and "choice" in shown and "b.jsonl" in shown


def test_rerun_does_no_work(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in finished.iterdir()}
    monkeypatch.setattr(load, "load", lambda *a, **k: pytest.fail("loaded"))
    assert rerun(finished) == json.loads(before["results.json"][0])
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in finished.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"limit": 2}, "limit"),
        ({"protocols": ["choice"]}, "protocols"),
        ({"tasks": ["c3-m"]}, "tasks"),
        ({"chat_format": "panda"}, "chat_format"),
        ({"precision": "bf16"}, "precision"),
        ({"split": "train"}, "data"),
        ({"texts": []}, "texts"),
    ],
)
def test_another_evaluation_needs_another_out(finished: Path, changes: dict[str, Any], name: str) -> None:
    before = (finished / "results.json").read_bytes()
    with pytest.raises(UserError, match=f"another {name}.*choose another --out"):
        rerun(finished, **changes)
    assert (finished / "results.json").read_bytes() == before


def test_other_weights_need_another_out(
    finished: Path, tmp_path: Path, tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]
) -> None:
    shutil.copytree(load.resolve("tiny"), tmp_path / "copy")
    assert rerun(finished, model=str(tmp_path / "copy"))["model"] == "tiny"  # the same files elsewhere are the same
    changed = load.load(tmp_path / "copy", torch.float32)
    with torch.no_grad():
        changed.get_output_embeddings().weight[0, 0] += 1
    changed.save_pretrained(tmp_path / "copy")
    with pytest.raises(UserError, match="another model"):
        rerun(finished, model=str(tmp_path / "copy"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": ["c3-x"]}, "c3-x"),
        ({"tasks": []}, "nothing to evaluate"),
        ({"tasks": ["c3-m", "c3-m"]}, "given twice"),
        ({"data": None}, "--data"),
        ({"data": Path("/nowhere")}, "/nowhere/c3/c3-m-dev.json"),
        ({"split": "valid"}, "split"),
        ({"protocols": ["guess"]}, "generate, choice"),
        ({"protocols": []}, "protocol"),
        ({"limit": 0}, "limit"),
        ({"token_budget": 0}, "token_budget"),
        ({"chat_format": "vicuna"}, "chatml"),
        ({"precision": "fp8"}, "bf16"),
        ({"out": Path("")}, "out"),
        ({"texts": [Path("nowhere.txt")]}, "nowhere.txt"),
        ({"texts": [Path("/etc/hostname")]}, "/etc/hostname"),
        ({"model": "no-such-model"}, "no-such-model"),
    ],
)
def test_bad_arguments_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(load, "load", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(UserError) as e:
        evaluation.run(**(BASE | {"tasks": ["c3-m"], "out": tmp_path / "out"} | changes))
    assert said in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_out_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(UserError, match="out: can't be written .* choose another folder"):
            evaluation.run(tasks=["c3-m"], out=out, **BASE)


@pytest.mark.parametrize("text", ['{"text": 5}', '{"title": "x"}', "{", "[]", "", '{"text": ""}'])
def test_bad_texts(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"t\.jsonl"):
        evaluation.read_documents(tmp_path / "t.jsonl")


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> list[score.Answer]:
        raise KeyboardInterrupt

    how: dict[str, Any] = BASE | {"protocols": ["generate", "choice"], "wordings": ["original", "zh-bare"]}
    whole = evaluation.run(tasks=["c3-m"], out=tmp_path / "whole", **how)
    out, generate, asked = tmp_path / "out", score.generate, []
    monkeypatch.setattr(score, "choice", fail)
    with pytest.raises(KeyboardInterrupt):
        evaluation.run(tasks=["c3-m"], out=out, **how)
    assert [path.name for path in out.iterdir()] == ["unfinished"]
    monkeypatch.undo()
    monkeypatch.setattr(score, "generate", lambda *args: asked.append(args) or generate(*args))
    again = evaluation.run(tasks=["c3-m"], out=out, **how)
    assert not asked and sorted(p.name for p in out.iterdir()) == ["predictions.jsonl", "results.json"]
    assert (out / "predictions.jsonl").read_bytes() == (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    assert again["tasks"]["c3-m"]["accuracy"] == whole["tasks"]["c3-m"]["accuracy"]


def test_what_a_kill_after_the_results_leaves_is_removed(tmp_path: Path) -> None:
    evaluation.run(tasks=["c3-m"], out=tmp_path / "out", **BASE)
    (tmp_path / "out" / "unfinished").mkdir()
    evaluation.run(tasks=["c3-m"], out=tmp_path / "out", **BASE)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["predictions.jsonl", "results.json"]


def test_a_stopped_run_is_kept_from_other_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any) -> list[score.Answer]:
        raise KeyboardInterrupt

    out, how = tmp_path / "out", BASE | {"protocols": ["generate", "choice"]}
    monkeypatch.setattr(score, "choice", fail)
    with pytest.raises(KeyboardInterrupt):
        evaluation.run(tasks=["c3-m"], out=out, **how)
    before = sorted(p.name for p in (out / "unfinished").iterdir())
    assert len(before) == 2
    with pytest.raises(UserError, match="unfinished evaluation with another limit"):
        evaluation.run(tasks=["c3-m"], out=out, **(how | {"limit": 2}))
    assert sorted(p.name for p in (out / "unfinished").iterdir()) == before
    # Told before anything long begins.
    monkeypatch.setattr(evaluation, "_load", lambda *args: pytest.fail("loaded"))
    with pytest.raises(UserError, match="unfinished evaluation with another wordings"):
        evaluation.run(tasks=["c3-m"], out=out, **(how | {"wordings": ["zh-bare"]}))
    monkeypatch.undo()
    monkeypatch.setattr(score, "choice", fail)
    monkeypatch.setattr(log, "code", lambda: "edited")  # nobody can take that back
    with pytest.raises(KeyboardInterrupt):
        evaluation.run(tasks=["c3-m"], out=out, **how)
    assert "another version of the toolkit or a library: begins again" in capsys.readouterr().err
    monkeypatch.setattr(log, "commit", lambda: "another")  # that alone is nothing to an answer
    with pytest.raises(KeyboardInterrupt):
        evaluation.run(tasks=["c3-m"], out=out, **how)
    assert "goes on where it was stopped" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["predictions.jsonl", "unfinished/thesis.txt"])
def test_what_is_not_ours_is_left_alone(tmp_path: Path, name: str) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(UserError, match=f"holds {name}.*; remove what you don't need, or choose another --out"):
        evaluation.run(tasks=["c3-m"], out=tmp_path / "out", **BASE)
    assert path.read_text() == "mine" and [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == [path]


def test_truncated_contexts_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    shutil.copytree(load.resolve("tiny"), folder)
    config = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", config | {"max_position_embeddings": 500})
    results = evaluation.run(
        tasks=["c3-m"], out=tmp_path / "out", **(BASE | {"model": str(folder), "protocols": ["choice"], "limit": 8})
    )
    lines = (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    cut = sum(json.loads(line)["truncated"] for line in lines)
    assert 0 < cut == results["tasks"]["c3-m"]["truncated"]


def doctored(source: Path, target: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """A copy of a run with its predictions changed."""
    shutil.copytree(source, target)
    lines = (source / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [change(json.loads(line)) for line in lines]
    files.write_text(target / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return target


def test_compare(finished: Path, tmp_path: Path) -> None:
    right = doctored(finished, tmp_path / "right", lambda row: row | {"correct": True})
    wrong = doctored(finished, tmp_path / "wrong", lambda row: row | {"correct": False})
    found = runs.compare(wrong, right)
    assert found["a"] == found["b"] == "tiny" and list(found["tasks"]) == ["c3-m", "logiqa-v2"]
    for entry in report.entries(found).values():
        assert entry["n"] == entry["only_b"] == 3 and entry["difference"] == 1.0 and entry["ci95"] == [1.0, 1.0]
        assert entry["mcnemar_p"] == 0.25 and (entry["accuracy_a"], entry["accuracy_b"]) == (0.0, 1.0)
    assert len(report.entries(found)) == 4
    assert runs.compare(right, wrong)["tasks"]["c3-m"]["difference"] == -1.0
    assert runs.compare(finished, finished)["tasks"]["c3-m"]["mcnemar_p"] == 1.0
    assert "+100.00" in report.comparison_table(found)


def test_compare_refuses_unlike_runs(finished: Path, tmp_path: Path) -> None:
    other = doctored(finished, tmp_path / "other", lambda row: row | {"id": row["id"].replace("0", "x")})
    with pytest.raises(UserError, match="other questions"):
        runs.compare(finished, other)
    other = doctored(finished, tmp_path / "gold", lambda row: row | {"gold": "Z"})
    with pytest.raises(UserError, match="other questions"):
        runs.compare(finished, other)
    alone = tmp_path / "alone"
    evaluation.run(tasks=["c3-d"], out=alone, **BASE)
    with pytest.raises(UserError, match="nothing to compare.*c3-d by generate"):
        runs.compare(finished, alone)
    with pytest.raises(UserError, match="no such file"):
        runs.compare(finished, tmp_path / "nowhere")
    (alone / "results.json").write_text("[]")
    with pytest.raises(UserError, match="not the record"):
        runs.compare(alone, finished)
    other = doctored(finished, tmp_path / "edited", lambda row: row)
    results = files.read_json(other / "results.json")
    results["tasks"]["c3-m"] |= {"data": "of the same ids and answers, but other texts", "shots": 2}
    files.write_json(other / "results.json", results)
    with pytest.raises(UserError, match=r"c3-m: .* were asked from different files"):
        runs.compare(finished, other)


def test_what_else_differs_is_told(finished: Path, tmp_path: Path) -> None:
    other = doctored(finished, tmp_path / "other", lambda row: row)
    results = files.read_json(other / "results.json")
    results["tasks"]["c3-m"]["shots"] = 2
    files.write_json(other / "results.json", results | {"precision": "bf16"})
    compared = report.comparison_table(runs.compare(finished, other))
    assert "equally often; asked otherwise: shots 0 and 2, precision fp32 and bf16" in compared
    assert "asked otherwise" not in report.comparison_table(runs.compare(finished, finished))


@pytest.mark.parametrize(
    ("key", "value"), [("pred", "AB"), ("gold", 1), ("gold", None), ("correct", "yes"), ("id", 5), ("pred", "")]
)
def test_damaged_predictions_are_told(finished: Path, tmp_path: Path, key: str, value: Any) -> None:
    other = doctored(finished, tmp_path / "other", lambda row: row | {key: value})
    with pytest.raises(UserError, match=rf"predictions.jsonl:1: is no prediction: '{key}' is"):
        runs.compare(finished, other)


@pytest.mark.parametrize("entry", [1, {}, {"protocol": "choice"}, {"protocols": 3}])
def test_damaged_results_are_told(finished: Path, tmp_path: Path, entry: Any) -> None:
    other = doctored(finished, tmp_path / "other", lambda row: row)
    files.write_json(other / "results.json", {"tasks": {"c3-m": entry}})
    with pytest.raises(UserError, match="results.json: the figures of c3-m aren't whole"):
        runs.compare(finished, other)
