"""Tasks for lm-evaluation-harness: the prompts are ours, and (slow) so are the harness's answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pandallm import cli, demo, files, tokenizer
from pandallm.config import UserError
from pandallm.data.questions import WORDINGS, letter
from pandallm.evaluate import export, score, tasks, variants
from pandallm.evaluate import run as evaluation
from pandallm.evaluate.tasks import Question
from pandallm.model import generate, load

DEMO = demo.ROOT / "eval"
BASE: dict[str, Any] = {
    "model": "tiny",
    "tasks": ["c3-m", "logiqa-v2"],
    "data": DEMO,
    "split": "dev",
    "protocols": ["generate", "choice", "cloze"],
    "wordings": ["original"],
    "chat_format": "none",
}


def exported(out: Path, **changes: Any) -> dict[str, Any]:
    return export.run(out=out, **(BASE | changes))


def records(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def conf_of(out: Path, name: str) -> Any:
    return yaml.safe_load((out / f"{name}.yaml").read_text(encoding="utf-8"))


def test_records_are_the_questions_as_panda_asks_them(tmp_path: Path) -> None:
    result = exported(tmp_path)
    assert len(result["tasks"]) == 6
    assert {p.name for p in tmp_path.iterdir()} == {f"{n}.{e}" for n in result["tasks"] for e in ("yaml", "jsonl")}
    evaluation.run("tiny", ["c3-m", "logiqa-v2"], DEMO, "dev", ["choice"], 3, tmp_path / "ours", "none")
    ours = [json.loads(line) for line in (tmp_path / "ours" / "predictions.jsonl").read_text("utf-8").splitlines()]
    for task in ("c3-m", "logiqa-v2"):
        questions = tasks.load(task, DEMO, "dev")
        for protocol in ("generate", "choice"):
            found = records(tmp_path, f"panda_{task}_{protocol}")
            assert [r["prompt"] for r in found] == [tasks.prompt_for(q, "original") for q in questions]
            assert [r["prompt"] for r in found[:3]] == [row["prompt"] for row in ours if row["task"] == task]
        for record, question in zip(records(tmp_path, f"panda_{task}_cloze"), questions, strict=True):
            assert record["options"] == list(question.options) and record["id"] == question.id
            assert record["letters"] == ["A", "B", "C", "D"][: len(question.options)]
            assert record["gold"] == question.gold and record["answer"] == letter(question.gold)
            assert record["options"][record["gold"]] == question.options[question.gold]
            listed = "Options:\n" + "".join(f"{letter(i)}: {o}\n" for i, o in enumerate(question.options)) + "\n"
            assert listed in tasks.prompt_for(question, "original")
            assert record["prompt"] == tasks.prompt_for(question, "original").replace(listed, "").replace(
                "从选项中选择的答案", ""
            )
    assert {len(r["letters"]) for r in records(tmp_path, "panda_c3-m_choice")} >= {2, 4}
    assert "阅读下面的文章" in (tmp_path / "panda_c3-m_choice.jsonl").read_text(encoding="utf-8")


def test_task_files(tmp_path: Path) -> None:
    result = exported(tmp_path)
    for name in result["tasks"]:
        conf = conf_of(tmp_path, name)
        assert conf["task"] == name and conf["tag"] == "panda" and conf["num_fewshot"] == 0
        assert conf["target_delimiter"] == " " and conf["doc_to_text"] == "prompt"
        assert conf["dataset_kwargs"] == {"data_files": {conf["test_split"]: f"{name}.jsonl"}}
        assert conf["metadata"]["version"] == 2 and conf["metadata"]["truncated"] == 0
        assert str(tmp_path) not in (tmp_path / f"{name}.yaml").read_text(encoding="utf-8")
    choice, cloze, generate = (conf_of(tmp_path, f"panda_c3-m_{p}") for p in ("choice", "cloze", "generate"))
    assert choice["output_type"] == cloze["output_type"] == "multiple_choice"
    assert (choice["doc_to_choice"], cloze["doc_to_choice"]) == ("letters", "options")
    assert choice["doc_to_target"] == cloze["doc_to_target"] == "gold"
    assert [m["metric"] for m in cloze["metric_list"]] == ["acc", "acc_norm"]
    assert generate["output_type"] == "generate_until" and generate["doc_to_target"] == "answer"
    assert generate["generation_kwargs"] == {"until": [], "do_sample": False, "max_gen_toks": 64}
    assert generate["filter_list"][0]["filter"][0]["regex_pattern"] == "[A-D]"
    command = result["command"]
    assert command.startswith(f"cd {tmp_path} && lm-eval run ") and f"--tasks {','.join(result['tasks'])} " in command
    assert f"pretrained={load.resolve('tiny').absolute()},dtype=float32 " in command


def test_all_wordings_are_in_one_file(tmp_path: Path) -> None:
    exported(tmp_path, wordings=["all"], tasks=["c3-d"])
    found = records(tmp_path, "panda_c3-d_choice")
    questions = tasks.load("c3-d", DEMO, "dev")
    names = list(WORDINGS)
    assert [(r["wording"], r["id"]) for r in found] == [(w, q.id) for w in names for q in questions]
    assert found[-1]["prompt"] == tasks.prompt_for(questions[-1], names[-1])
    assert conf_of(tmp_path, "panda_c3-d_choice")["metadata"]["wordings"] == names


def test_a_chat_format_is_rendered(tmp_path: Path) -> None:
    exported(tmp_path, chat_format="chatml", tasks=["logiqa-v2"])
    question = tasks.load("logiqa-v2", DEMO, "dev")[0]
    record = records(tmp_path, "panda_logiqa-v2_choice")[0]
    text = tasks.prompt_for(question, "original")
    assert record["prompt"] == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    conf = conf_of(tmp_path, "panda_logiqa-v2_generate")
    assert conf["target_delimiter"] == "" and conf["generation_kwargs"]["until"] == ["<|im_end|>"]
    assert conf_of(tmp_path, "panda_logiqa-v2_choice")["target_delimiter"] == ""


def test_a_long_context_is_cut_as_in_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "small"
    shutil.copytree(load.resolve("tiny"), folder)
    config = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", config | {"max_position_embeddings": 400})
    exported(tmp_path / "out", model=str(folder), tasks=["c3-m"])
    words = tokenizer.load(folder)
    for protocol in ("generate", "choice", "cloze"):
        found = records(tmp_path / "out", f"panda_c3-m_{protocol}")
        cut = sum(r["truncated"] for r in found)
        assert 0 < cut == conf_of(tmp_path / "out", f"panda_c3-m_{protocol}")["metadata"]["truncated"]
        for record, question in zip(found, tasks.load("c3-m", DEMO, "dev"), strict=True):
            asked = score.ask(words, "none", question, "original", protocol, 400)
            longest = max(len(words(o)["input_ids"]) for o in question.options) if protocol == "cloze" else 64
            assert record["prompt"] == asked.text and len(asked.ids) + longest <= 400
    assert "were cut to the model's window" in capsys.readouterr().err


def test_special_tokens(tmp_path: Path) -> None:
    """A tokenizer that opens texts with bos: the harness does so by itself, but mustn't where panda doesn't."""
    from tokenizers.processors import TemplateProcessing

    words = tokenizer.load(load.resolve("tiny"))
    words.bos_token = "<|im_start|>"
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", words.bos_token_id)]
    )
    question = Question("c3-d", "1-0", "男：下雨了。", "他们要做什么？", ("带伞", "等车"), 0)
    raw = score.ask(words, "none", question, "original", "choice", 4000)
    assert raw.ids[0] == words.bos_token_id and export._special_tokens(words, [raw]) == ""
    bare = replace(raw, ids=raw.ids[1:])
    assert export._special_tokens(words, [bare]) == ",add_bos_token=False"
    opened = replace(raw, text="<|im_start|>" + raw.text)
    assert export._special_tokens(words, [opened]) == ""
    with pytest.raises(UserError, match="other token ids"):
        export._special_tokens(words, [raw, bare])
    with pytest.raises(UserError, match="other token ids"):
        export._special_tokens(words, [replace(raw, ids=[*raw.ids, words.eos_token_id])])


def test_a_models_own_generation_config_is_left_aside(tmp_path: Path) -> None:
    """Greedy is greedy, here and, by the exported arguments, in whatever calls model.generate with them."""
    folder = tmp_path / "model"
    shutil.copytree(load.resolve("tiny"), folder)
    own = {"repetition_penalty": 1.5, "suppress_tokens": list(range(300, 340)), "no_repeat_ngram_size": 2, "top_k": 5}
    files.write_json(folder / "generation_config.json", own)
    arguments: Any = (["c3-d"], DEMO, "dev", ["generate"], ["original"], tmp_path / "out")
    export.run(str(folder), *arguments)
    told = conf_of(tmp_path / "out", "panda_c3-d_generate")["generation_kwargs"]
    neutral = {"repetition_penalty": 1.0, "suppress_tokens": None, "no_repeat_ngram_size": 0}
    assert {key: told[key] for key in told if key not in ("until", "do_sample", "max_gen_toks")} == neutral
    model, words = load.load(folder, torch.float32).eval(), tokenizer.load(folder)
    prompts = [words(record["prompt"])["input_ids"] for record in records(tmp_path / "out", "panda_c3-d_generate")[:4]]
    ours = generate.greedy_batch(model, prompts, 12, {words.eos_token_id}, 4096)
    for ids, written in zip(prompts, ours, strict=True):
        batch = torch.tensor([ids])
        plain = model.generate(batch, do_sample=False, max_new_tokens=12, eos_token_id=words.eos_token_id, **neutral)
        quirky = model.generate(batch, do_sample=False, max_new_tokens=12, eos_token_id=words.eos_token_id)
        assert plain[0, len(ids) :].tolist()[: len(written)] == written != quirky[0, len(ids) :].tolist()


def test_what_the_harness_can_not_read_is_refused() -> None:
    def question(*options: str) -> Question:
        return Question("c3-d", "1-0", "一", "问？", options, 0)

    assert export._pattern("t", [question("甲", "乙"), question(*"甲乙丙丁")]) == "[A-D]"
    assert export._pattern("t", [question(*"甲乙丙丁戊")] * 2) == "[A-E]"
    with pytest.raises(UserError, match="A-D and A-E.*leave generate out"):
        export._pattern("t", [question("甲", "乙"), question(*"甲乙丙丁戊")])
    asked = [
        variants.Asked(question("甲", "乙"), "original"),
        variants.Asked(replace(question("甲", ""), id="2"), "original"),
    ]
    part = variants.Set(tasks.get("c3-d"), asked, "", "", {})
    assert export._askable(part, "cloze", "t") == (asked[:1], {"an empty option": 1})
    assert export._askable(part, "choice", "t") == (asked, {})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": ["c3-x"]}, "task 'c3-x': unknown"),
        ({"tasks": []}, "no task"),
        ({"tasks": ["c3-m", "c3-m"]}, "given twice"),
        ({"protocols": ["guess"]}, "generate, choice, cloze"),
        ({"protocols": []}, "no protocol"),
        ({"wordings": ["mine"]}, "wording 'mine': unknown; known: original"),
        ({"wordings": []}, "no wording"),
        ({"split": "valid"}, "split 'valid'"),
        ({"data": Path("/nowhere")}, "/nowhere/c3/c3-m-dev.json"),
        ({"chat_format": "vicuna"}, "chatml"),
        ({"chat_format": "model"}, "no chat template"),
        ({"model": "no-such-model"}, "no-such-model"),
        ({"out": Path("")}, "out"),
        ({"out": Path("/dev/null/out")}, "choose another --out"),
    ],
)
def test_bad_arguments_leave_nothing(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as e:
        export.run(**(BASE | {"out": tmp_path / "out"} | changes))
    assert said in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["panda", "eval", "export-lm-eval", "--model", "tiny", "--split", "dev", "--data", str(DEMO)]
    command += ["--task", "c3-d", "--protocol", "choice", "--chat-format", "none"]
    for more, code in ((["--out", str(tmp_path / "a b")], 0), (["--out", str(tmp_path), "--wordings", "x"], 2)):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(SystemExit) as e:
            cli.main()
        assert e.value.code == code
        shown = capsys.readouterr()
        if code:
            assert shown.err == f"panda: wording 'x': unknown; known: {', '.join(WORDINGS)}; or all, alone\n"
        else:
            assert shown.out.startswith(f"cd '{tmp_path}/a b' && lm-eval run --model hf ")
    assert len(records(tmp_path / "a b", "panda_c3-d_choice")) == len(tasks.load("c3-d", DEMO, "dev"))


@pytest.mark.slow
def test_the_harness_gives_our_answers(tmp_path: Path) -> None:
    python = os.environ.get("PANDALLM_LM_EVAL")
    if not python:
        pytest.skip("PANDALLM_LM_EVAL doesn't name a Python that has lm-eval")
    protocols = [p for p in BASE["protocols"] if p in score.PROTOCOLS]
    result = exported(tmp_path / "tasks", protocols=protocols)
    evaluation.run("tiny", BASE["tasks"], DEMO, "dev", protocols, None, tmp_path / "ours", "none", precision="fp32")
    lines = (tmp_path / "ours" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ours = {(row["task"], row["protocol"], row["id"]): row for row in map(json.loads, lines)}
    command = result["command"].replace("lm-eval run", f"{python} -m lm_eval run")
    command += f" --log_samples --output_path {tmp_path / 'theirs'}"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = 0
    for name in result["tasks"]:
        _, task, protocol = name.split("_")
        (path,) = (tmp_path / "theirs").rglob(f"samples_{name}_*.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            row = ours[task, protocol, sample["doc"]["id"]]
            seen += 1
            if protocol == "generate":
                found = sample["filtered_resps"][0]
                assert row["pred"] == (None if found == "[invalid]" else found)
                assert sample["exact_match"] == row["correct"]
            else:
                theirs = [float(value) for value, _ in sample["filtered_resps"]]
                assert row["log_likelihoods"] == pytest.approx(theirs, abs=1e-3)
                assert sample["acc"] == row["correct"]
    assert seen == len(ours)
