"""evaluate/: prompts byte for byte, questions read or refused, scores equal to plain Transformers, runs that keep."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pandallm import demo, files, prompt, tokenizer
from pandallm.config import UserError
from pandallm.data.questions import letter
from pandallm.evaluate import report, runs, score, statistics, tasks
from pandallm.evaluate import run as evaluation
from pandallm.evaluate.tasks import Question
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


# --- questions and prompts -------------------------------------------------------------------------------------------

DIALOGUE = Question("c3-d", "1-0", "男：下雨了。\n女：带伞吧。", "他们要做什么？", ("带伞", "等车", "回家"), 0)
MIXED = Question("c3-m", "2-1", "湖边有一家{小}店。", "店在湖边。", ("正确", "错误"), 0)
LOGIC = Question("logiqa-v2", "7", "凡是甲都是乙。", "可以推出哪一项？", ("甲是乙", "乙是甲", "没有甲", "没有乙"), 0)

GOLDEN = {
    DIALOGUE: "阅读下面的文章并从选项中选择的答案回答问题：\n\nContext:\n男：下雨了。\n女：带伞吧。\n\n"
    "Question:\n他们要做什么？\n\nOptions:\nA: 带伞\nB: 等车\nC: 回家\n\n本题的答案是：",
    MIXED: "阅读下面的文章并从选项中选择的答案回答问题：\n\nContext:\n湖边有一家{小}店。\n\n"
    "Question:\n店在湖边。\n\nOptions:\nA: 正确\nB: 错误\n\n本题的答案是：",
    LOGIC: "阅读下面的文章并从选项中选择的答案回答问题：\n\nContext:\n凡是甲都是乙。\n\n"
    "Question:\n可以推出哪一项？\n\nOptions:\nA: 甲是乙\nB: 乙是甲\nC: 没有甲\nD: 没有乙\n\n本题的答案是：",
}


@pytest.mark.parametrize("question", GOLDEN)
def test_prompt(question: Question) -> None:
    assert tasks.prompt_for(question, "original").encode() == GOLDEN[question].encode()


@pytest.mark.parametrize(
    ("output", "n_options", "index"),
    [
        ("A", 4, 0),
        (" D: 回家", 4, 3),
        ("选B，不选A", 4, 1),
        ("Answer: B", 4, 0),  # the original's rule, literally
        ("the answer is C", 4, 2),
        ("C", 2, 2),  # an answer, and a wrong one
        ("b", 4, None),
        ("Ｂ", 4, None),
        ("E", 4, None),
        ("E", 5, 4),
        ("", 4, None),
        ("没有答案\n\n", 4, None),
        ("(C)", 4, 2),
        ("\n\n  D\n", 4, 3),
        ("答案是：　Ｂ，也就是 B", 4, 1),  # full-width letters don't count
        ("DNA 和 A", 4, 3),  # a word's letter does
        ("CBA", 4, 2),
        ("Ａ／Ｂ／Ｃ", 4, None),
        ("選項丙", 4, None),
        ("option c", 4, None),
        ("The answer is B", 4, 1),  # "T" and "h" are none of them
        ("🐼D", 4, 3),
        ("\ufffdB", 4, 1),
    ],
)
def test_parse_letter(output: str, n_options: int, index: int | None) -> None:
    assert tasks.parse_letter(output, n_options) == index


def test_demo_questions_load() -> None:
    for task, n in (("c3-d", 4), ("c3-m", 4), ("logiqa-v2", 4)):
        for split in ("dev", "train"):
            questions = tasks.load(task, DEMO, split)
            assert len(questions) >= n and all(q.task == task for q in questions)
    assert {len(q.options) for q in tasks.load("c3-m", DEMO, "dev")} >= {2, 4}
    record = json.loads((DEMO / "c3" / "c3-d-dev.json").read_text(encoding="utf-8"))[1]
    question = next(q for q in tasks.load("c3-d", DEMO, "dev") if q.id == f"{record[2]}-1")
    assert question.context == "\n".join(record[0])
    assert question.options[question.gold] == record[1][1]["answer"]


def test_line_ends_and_byte_order_mark_do_not_matter(tmp_path: Path) -> None:
    for name in ("c3/c3-d-dev.json", "c3/c3-m-dev.json", "logiqa_v2/dev_zh.txt"):
        text = (DEMO / name).read_text(encoding="utf-8")
        flat = tmp_path / Path(name).name  # and without the subfolder
        flat.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    for task in ("c3-d", "c3-m", "logiqa-v2"):
        assert tasks.load(task, tmp_path, "dev") == tasks.load(task, DEMO, "dev")


def test_files_are_found(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'c3-d'"):
        tasks.find("c3d", tmp_path, "dev")
    with pytest.raises(UserError, match="split 'valid'"):
        tasks.find("c3-d", tmp_path, "valid")
    with pytest.raises(UserError) as e:
        tasks.find("c3-d", tmp_path, "test")
    assert str(tmp_path / "c3/c3-d-test.json") in str(e.value) and str(tmp_path / "c3-d-test.json") in str(e.value)
    (tmp_path / "train_zh.part.txt").touch()
    (tmp_path / "test_zh.part.txt").touch()
    assert [p.name for p in tasks.find("logiqa-v2", tmp_path, "train")] == ["train_zh.part.txt"]
    with pytest.raises(UserError):  # a stray file is not the test set
        tasks.find("logiqa-v2", tmp_path, "test")
    (tmp_path / "train_zh.more.txt").touch()
    with pytest.raises(UserError, match="both fit"):
        tasks.find("logiqa-v2", tmp_path, "train")
    (tmp_path / "train_zh.txt").touch()
    assert [p.name for p in tasks.find("logiqa-v2", tmp_path, "train")] == ["train_zh.txt"]


def c3(**changes: Any) -> list[Any]:
    entry = {"question": "问？", "choice": ["甲", "乙", "甲"], "answer": "甲"} | changes
    return [["一", "二"], [{k: v for k, v in entry.items() if v is not None}], "1-2"]


def logiqa(**changes: Any) -> dict[str, Any]:
    entry = {"example_id": 3, "answer": 1, "text": "文\u2028本", "question": "问？", "options": ["甲", "乙"]} | changes
    return {k: v for k, v in entry.items() if v is not None}


def test_good_records(tmp_path: Path) -> None:
    files.write_json(tmp_path / "c3-d-dev.json", [c3()])
    assert tasks.load("c3-d", tmp_path, "dev") == [Question("c3-d", "1-2-0", "一\n二", "问？", ("甲", "乙", "甲"), 0)]
    lines = [json.dumps(logiqa(), ensure_ascii=False), "", json.dumps(logiqa(example_id="x")), ""]
    (tmp_path / "dev_zh.txt").write_text("\n".join(lines), encoding="utf-8")
    loaded = tasks.load("logiqa-v2", tmp_path, "dev")
    assert loaded[0] == Question("logiqa-v2", "3", "文\u2028本", "问？", ("甲", "乙"), 1) and loaded[1].id == "x"


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (c3(answer="丙"), "record 2, question 1: the answer '丙'"),
        (c3(choice=["甲"]), "record 2, question 1: 1 options"),
        (c3(choice=["甲"] * 27), "27 options"),
        (c3(choice=["甲", 2]), "record 2, question 1: the options"),
        (c3(question=None), "record 2, question 1: the key 'question'"),
        (c3(question=["问"]), "record 2, question 1: the context or the question"),
        ([["一"], []], "record 2"),
        ([["一", 2], [], "x"], "record 2: the first part"),
        ([["一"], ["问"], "x"], "record 2, question 1"),
        ({}, "record 2"),
        (c3(), "'1-2-0' is there twice"),
    ],
)
def test_bad_c3_record(tmp_path: Path, bad: Any, said: str) -> None:
    path = tmp_path / "c3-m-dev.json"
    files.write_json(path, [c3(), bad])
    with pytest.raises(UserError) as e:
        tasks.load("c3-m", tmp_path, "dev")
    assert str(e.value).startswith(str(path)) and said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('{"example_id": 1, ', ":2: not valid JSON"),
        ("[1]", ":2: an object"),
        (json.dumps(logiqa(example_id=4, answer=2)), ":2: the answer 2"),
        (json.dumps(logiqa(example_id=4, answer=-1)), ":2: the answer -1"),
        (json.dumps(logiqa(example_id=4, answer="1")), ":2: the answer '1'"),
        (json.dumps(logiqa(example_id=4, answer=True)), ":2: the answer True"),
        (json.dumps(logiqa(text=None)), ":2: the key 'text'"),
        (json.dumps(logiqa(text=5)), ":2: the context"),
        (json.dumps(logiqa(options="AB")), ":2: the options"),
        (json.dumps(logiqa()), "'3' is there twice"),
    ],
)
def test_bad_logiqa_line(tmp_path: Path, bad: str, said: str) -> None:
    path = tmp_path / "dev_zh.txt"
    path.write_text(json.dumps(logiqa()) + "\n" + bad + "\n")
    with pytest.raises(UserError) as e:
        tasks.load("logiqa-v2", tmp_path, "dev")
    assert str(path) in str(e.value) and said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", "[1,"])
def test_bad_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "c3-d-dev.json").write_text(text)
    with pytest.raises(UserError, match=r"c3-d-dev\.json"):
        tasks.load("c3-d", tmp_path, "dev")


# --- scores ----------------------------------------------------------------------------------------------------------


def naive_choice(model: PreTrainedModel, words: PreTrainedTokenizerBase, text: str, letter: str, raw: bool) -> float:
    """Log-likelihood of `letter` after `text`, by the whole logits of plain Transformers, one sequence."""
    head = words(text, add_special_tokens=raw)["input_ids"]
    whole = words(text + letter, add_special_tokens=raw)["input_ids"]
    shared = 0
    while shared < len(head) and head[shared] == whole[shared]:
        shared += 1
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(logits[i - 1, whole[i]]) for i in range(shared, len(whole)))


@pytest.mark.parametrize("chat_format", ["none", "panda", "chatml", "alpaca"])
def test_choice_is_transformers_one_by_one(
    tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase], chat_format: str
) -> None:
    model, words = tiny[0], words_of_tiny(chat_format)
    questions = [*tasks.load("c3-m", DEMO, "dev")[:5], *tasks.load("logiqa-v2", DEMO, "dev")[:2]]
    prompts = [score.build_prompt(words, chat_format, q, "original", 4000) for q in questions]
    assert score.answer_lead(words, chat_format) == (" " if chat_format in ("none", "panda") else "")
    expected = []
    for question, asked in zip(questions, prompts, strict=True):
        lead = " " if chat_format in ("none", "panda") else ""
        letters = ["A", "B", "C", "D"][: len(question.options)]
        expected.append([naive_choice(model, words, asked.text, lead + c, chat_format == "none") for c in letters])
    for budget in (1, 3000, 10**6):
        answers = score.choice(model, words, questions, prompts, chat_format, budget)
        for answer, values in zip(answers, expected, strict=True):
            assert answer.log_likelihoods == pytest.approx(values, abs=1e-4)
            assert answer.pred == int(np.argmax(values)) and answer.output == "ABCD"[answer.pred]


def test_choice_where_the_answer_joins_the_prompt(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    """A tokenizer without word borders, in which "： A" is one token, "： B" and "： C" three."""
    bpe = Tokenizer(tokenizer_models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], show_progress=False)
    bpe.train_from_iterator([*sorted(set("".join(GOLDEN.values()))), *["： A"] * 9], trainer)
    words = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    asked = score.build_prompt(words, "none", DIALOGUE, "original", 4000)
    assert words(asked.text + " A")["input_ids"][: len(asked.ids)] != asked.ids
    expected = []
    shared = min(len(_common(asked.ids, words(asked.text + f" {c}")["input_ids"])) for c in "ABC")
    for name in "ABC":
        ids = words(asked.text + f" {name}")["input_ids"]
        with torch.no_grad():
            logits = tiny[0](torch.tensor([ids])).logits[0].log_softmax(-1)
        expected.append(sum(float(logits[i - 1, ids[i]]) for i in range(shared, len(ids))))
    answer = score.choice(tiny[0], words, [DIALOGUE], [asked], "none", 4096)[0]
    assert answer.log_likelihoods == pytest.approx(expected, abs=1e-4)


def _common(a: list[int], b: list[int]) -> list[int]:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return a[:n]


def test_tails_refuse_what_has_no_letter() -> None:
    assert score._tails([1, 2, 3], [[1, 2, 3, 7], [1, 2, 9]]) == ([1, 2], [[3, 7], [9]])
    with pytest.raises(UserError):
        score._tails([1, 2], [[1, 2], [1, 2, 3]])
    with pytest.raises(UserError):
        score._tails([1, 2], [[5, 2], [1, 2, 3]])


def test_an_input_is_run_once(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, words = tiny
    asked = score.build_prompt(words, "none", LOGIC, "original", 4000)
    seen: list[int] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        score.choice(model, words, [LOGIC, LOGIC], [asked, asked], "none", 10**6)
    finally:
        hook.remove()
    assert sum(seen) <= len(asked.ids) + 1  # + 1: the blank before the letter, where it is a token of its own


def test_ties_go_to_the_first(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    flat = load.load(load.resolve("tiny"), torch.float32)
    with torch.no_grad():
        flat.get_output_embeddings().weight.zero_()
    asked = score.build_prompt(tiny[1], "none", LOGIC, "original", 4000)
    answer = score.choice(flat, tiny[1], [LOGIC], [asked], "none", 4096)[0]
    assert answer.pred == 0 and len(set(answer.log_likelihoods)) == 1


def test_prompt_ids_are_the_formats(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    raw = words_of_tiny("none")
    assert raw.chat_template is None and score.use_format(raw, None) == "none"
    asked = score.build_prompt(raw, "none", LOGIC, "original", 4000)
    assert asked.text == GOLDEN[LOGIC] and asked.ids == raw(GOLDEN[LOGIC])["input_ids"] and not asked.truncated
    with pytest.raises(UserError, match="no chat template"):
        score.use_format(raw, "model")
    chat = words_of_tiny("chatml")
    assert score.use_format(chat, None) == "model"
    asked = score.build_prompt(chat, "model", LOGIC, "original", 4000)
    assert asked.text == f"<|im_start|>user\n{GOLDEN[LOGIC]}<|im_end|>\n<|im_start|>assistant\n"
    assert asked.ids == prompt.render_prompt(chat, [{"role": "user", "content": GOLDEN[LOGIC]}])


@pytest.mark.parametrize("chat_format", ["none", "chatml"])
def test_a_long_context_is_cut_from_the_left(chat_format: str) -> None:
    words = words_of_tiny(chat_format)
    context = "".join(f"第{i}句。" for i in range(200))
    question = Question("c3-m", "9-0", context, "最后一句是第几句？", ("199", "200"), 0)
    whole = score.build_prompt(words, chat_format, question, "original", 10**6)
    assert not whole.truncated
    assert score.build_prompt(words, chat_format, question, "original", len(whole.ids)) == whole
    cut = score.build_prompt(words, chat_format, question, "original", 300)
    assert cut.truncated and 290 < len(cut.ids) <= 300
    before, _, after = whole.text.partition(context)
    assert cut.text.startswith(before) and cut.text.endswith(after)
    kept = cut.text[len(before) : len(cut.text) - len(after)]
    assert context.endswith(kept) and kept
    with pytest.raises(UserError, match="question 9-0"):
        score.build_prompt(words, chat_format, question, "original", 60)


def test_generate_reads_the_first_letter(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    """A model made to say one token after any prompt, again and again."""
    model = load.load(load.resolve("tiny"), torch.float32)
    words = tiny[1]
    asked = score.build_prompt(words, "none", LOGIC, "original", 4000)
    for text, pred in (("B", 1), ("好", None)):
        token = words(text)["input_ids"][0]
        model.get_output_embeddings().register_forward_hook(
            lambda module, args, output, token=token: torch.nn.functional.one_hot(
                torch.full(output.shape[:-1], token), output.shape[-1]
            ).float()
        )
        answer = score.generate(model, words, [LOGIC], [asked], 4096)[0]
        assert answer == score.Answer(words.decode([token] * 64), pred)


def naive_bits(model: PreTrainedModel, start: int, ids: list[int], window: int) -> float:
    """-log2 p of every token: each from the window that the rule gives it, by whole logits, one window a token."""
    total, sequence = 0.0, [start, *ids]
    begin = 0
    for i in range(1, len(sequence)):
        if i - begin > window:
            begin = i - 1 - window // 2
        with torch.no_grad():
            logits = model(torch.tensor([sequence[begin:i]])).logits[0, -1].double()
        total -= float(logits.log_softmax(-1)[sequence[i]]) / math.log(2)
    return total


def test_bits_per_character_is_the_sum_over_tokens(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, words = tiny
    texts = ["你好，世界。", "", "A short English text; 中文 mixed in. " * 3, "🐼", "山" * 30 + "水", "x"]
    ids = [words(text)["input_ids"] for text in texts if text]
    assert words.bos_token_id is None  # eos opens a text
    for window, budget in ((2048, 4096), (2048, 1), (16, 50), (7, 4096), (1, 10)):
        found = score.bits_per_character(model, words, texts, window=window, token_budget=budget)
        bits = sum(naive_bits(model, words.eos_token_id, x, window) for x in ids)
        assert found["bits"] == pytest.approx(bits, rel=1e-5)
        assert found["characters"] == sum(map(len, texts)) and found["tokens"] == sum(map(len, ids))
        assert found["bits_per_character"] == found["bits"] / found["characters"]
    with_bos = tokenizer.load(load.resolve("tiny"))
    with_bos.bos_token = "<|im_start|>"
    bits = sum(naive_bits(model, with_bos.bos_token_id, x, 2048) for x in ids)
    assert score.bits_per_character(model, with_bos, texts)["bits"] == pytest.approx(bits, rel=1e-5)
    with pytest.raises(UserError, match="empty"):
        score.bits_per_character(model, words, [""])


def test_bits_per_character_of_a_known_model(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    uniform = load.load(load.resolve("tiny"), torch.float32)
    with torch.no_grad():
        uniform.get_output_embeddings().weight.zero_()
    found = score.bits_per_character(uniform, tiny[1], ["一二三四五六七八九十"])
    assert found["bits_per_character"] == pytest.approx(found["tokens"] * math.log2(512) / 10)


def test_a_broken_model_has_no_score(tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    broken = load.load(load.resolve("tiny"), torch.float32)
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(float("nan"))
    asked = score.build_prompt(tiny[1], "none", LOGIC, "original", 4000)
    with pytest.raises(UserError, match="finite"):
        score.choice(broken, tiny[1], [LOGIC], [asked], "none", 4096)


# --- figures ---------------------------------------------------------------------------------------------------------


def test_wilson() -> None:
    assert statistics.wilson(15, 50) == pytest.approx((0.19103, 0.43750), abs=1e-5)  # Newcombe 1998's kind of example
    assert statistics.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert statistics.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)  # the same
    assert statistics.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)  # the same
    assert statistics.wilson(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=1e-4)


def test_mcnemar() -> None:
    assert statistics.mcnemar(0, 0) == 1.0 and statistics.mcnemar(5, 5) == 1.0
    assert statistics.mcnemar(1, 9) == statistics.mcnemar(9, 1) == pytest.approx(22 / 1024)
    assert 0 <= statistics.mcnemar(900, 1100) < 1e-5


def test_bootstrap() -> None:
    differences = [1.0] * 30 + [-1.0] * 10 + [0.0] * 60
    low, high = statistics.bootstrap(differences)
    assert (low, high) == statistics.bootstrap(differences)
    drawn = np.random.default_rng(7).choice(differences, size=(10_000, 100)).mean(1)
    assert (low, high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.011)
    assert statistics.bootstrap([0.0] * 5) == (0.0, 0.0)


def test_summary_over_wordings() -> None:
    rows = [
        {"id": str(i), "wording": w, "correct": i < n, "pred": "A", "gold": "A"}
        | ({"truncated": True} if i == 9 else {})
        for w, n in (("original", 4), ("other", 6))
        for i in range(10)
    ]
    rows[0]["pred"] = None
    figures = report.summary(rows, "generate")
    assert figures["accuracy"] == 0.5 and figures["n"] == 10 and figures["no_letter"] == 1 and figures["truncated"] == 2
    assert figures["accuracy_std"] == pytest.approx(math.sqrt(0.02))
    assert figures["ci95"] == list(statistics.wilson(5, 10))
    assert figures["wordings"] == [{"wording": "original", "accuracy": 0.4}, {"wording": "other", "accuracy": 0.6}]
    assert report.summary(rows[:10], "generate")["accuracy_std"] == 0.0


# --- runs ------------------------------------------------------------------------------------------------------------


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
    with pytest.raises(UserError, match="choose another --out"):
        evaluation.run(tasks=["c3-m"], out=tmp_path / "file" / "out", **BASE)


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


def test_a_stopped_run_of_other_arguments_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> list[score.Answer]:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as m:
        m.setattr(score, "choice", fail)
        with pytest.raises(KeyboardInterrupt):
            evaluation.run(tasks=["c3-m"], out=out, **(BASE | {"protocols": ["generate", "choice"]}))
    evaluation.run(tasks=["c3-m"], out=out, **(BASE | {"limit": 2}))
    assert files.read_json(out / "results.json")["tasks"]["c3-m"]["n"] == 2 and not (out / "unfinished").exists()


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
