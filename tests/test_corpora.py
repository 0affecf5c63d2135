"""Every file of the real corpora: its records, layout, drops and masks; questions as evaluation asks them."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from test_layouts import auto
from test_sources import whole

from pandallm import prompt, tokenizer
from pandallm.data import read, sources
from pandallm.data.sources import Reading
from pandallm.model.names import resolve
from pandallm.prompt import Text

# file or folder, records, drops, layout, examples a record where it isn't one; counts of the data's README and MANIFEST
REAL: list[tuple[Any, ...]] = [
    ("baike2018qa/baike_qa_real_4.json", 4, {}, "baike"),
    ("baike2018qa/baike_qa_relaid_toyhom.json", 3000, {}, "baike"),
    ("c3/c3-d-dev.json", 1628, {}, "c3", 1825),
    ("c3/c3-d-train.json", 4885, {}, "c3", 5856),
    ("c3/c3-m-dev.json", 1046, {}, "c3", 1991),
    ("c3/c3-m-train.json", 3138, {}, "c3", 6013),
    ("coig_schema/counterfactural_correction_multi_round_chat", 150, {}, "rounds"),
    ("coig_schema/exam_instructions.jsonl", 2811, {}, "exam"),
    ("coig_schema/human_value_alignment_instructions_part1.json", 92, {}, "alpaca"),
    ("coig_schema/human_value_alignment_instructions_part2.json", 600, {}, "exam"),
    ("coig_schema/leetcode_instructions.jsonl", 48, {}, "alpaca"),
    ("coig_schema/translated_instructions.jsonl", 2000, {"empty_answer": 2}, "translated"),
    ("flan/cot_tsv/qasc_train.tsv", 1084, {}, "cot"),
    ("flan/cot_tsv/strategyqa_train.tsv", 2061, {}, "cot"),
    ("flan/flan_cot_relaid_2100.jsonl", 2100, {}, "unified"),
    ("flan/p3_t0_sample.jsonl", 3372, {"empty_answer": 84}, "unified"),  # nothing but an end mark
    ("instruct/alpaca_bilingual_v3_part1-6.json", 6000, {"empty_answer": 5}, "bilingual"),
    ("instruct/alpaca_en_0-3252.json", 3252, {"empty_answer": 4}, "alpaca"),
    ("instruct/alpaca_zh_carbonz0_part-00.json", 10021, {"empty_answer": 6}, "alpaca"),
    ("instruct/belle_eval_set.json", 1000, {"empty_answer": 369}, "belle_eval"),
    ("instruct/belle_zh_seed_tasks.json", 175, {}, "seed_tasks"),
    ("instruct/chatlm_mini_train_3k.jsonl", 3000, {}, "prompt_response"),
    ("instruct/chinese_vicuna_sample_chat.jsonl", 3, {}, "input_output"),
    ("instruct/chinese_vicuna_sample_instruct.jsonl", 10, {}, "alpaca"),
    ("instruct/firefly_dummy_data.jsonl", 33, {}, "conversation"),
    ("instruct/flagai_convo_samples.jsonl", 100, {}, "sharegpt"),
    ("instruct/huatuo_llama_data.json", 8658, {}, "alpaca"),
    ("instruct/lawyer_judical_examination.json", 2000, {}, "alpaca_turns"),
    ("instruct/lawyer_legal_advice.json", 5000, {}, "alpaca_turns"),
    ("instruct/llama_chinese_dev_sft.csv", 200, {}, "marked"),
    ("instruct/llamafactory_alpaca_en_demo.json", 999, {}, "alpaca"),
    ("instruct/llamafactory_alpaca_zh_demo.json", 1000, {}, "alpaca"),
    ("instruct/llamafactory_dpo_zh_demo.json", 300, {}, "preference"),
    ("instruct/llamafactory_identity.json", 91, {"placeholder": 85}, "alpaca"),
    ("instruct/moss_original_layout", 20, {}, "moss"),
    ("instruct/moss_sft_with_plugins.jsonl", 500, {"needs_tools": 100}, "moss"),
    ("instruct/moss_sft_without_plugins.jsonl", 600, {}, "moss"),
    ("instruct/oasst_sft_zh.json", 689, {}, "alpaca"),
    ("logiqa_v2/dev_zh.txt", 1593, {}, "logiqa"),
    ("logiqa_v2/train_zh.relaid_from_v1.txt", 374, {}, "logiqa"),
    ("news2016zh/news2016zh_real_1.json", 1, {}, "news"),
    ("news2016zh/news2016zh_relaid_xwlb.json", 2458, {}, "news"),
    ("raw/CLUECorpusSmall_sampled.even_lines.txt", 1250, {}, "text"),
    ("raw/luxun_pd", 57, {}, "text"),
    ("traditional/DRCD_dev.json", 383, {}, "squad", 1000),
    ("traditional/opencc_testcases.jsonl", 232, {}, "opencc", 543),
    ("traditional/poet.tang.0.json", 1000, {}, "poem"),
    ("traditional/poet.tang.1000.json", 1000, {}, "poem"),
    ("traditional/simplified_counterpart_yuanqu_500.json", 500, {"empty_text": 13}, "poem"),
    # One line has no tab.
    ("traditional/tatoeba_cmn_unconverted_mixed_script.txt", 30980, {"bad_record": 1}, "pairs", 2 * 30979),
    # One translation is a quotation mark.
    ("translation2019zh/news-commentary-v13-en-zh_sampled.txt", 1000, {"same_language": 1}, "pairs", 2 * 999),
    ("translation2019zh/tatoeba_cmn.txt", 29155, {}, "pairs", 2 * 29155),
    ("translation2019zh/translation2019zh_real_readme_6.json", 6, {}, "translation", 12),
    ("translation2019zh/translation2019zh_relaid_tatoeba_5000.json", 5000, {}, "translation", 10000),
    ("translation2019zh/translation2019zh_valid.real_500.json", 500, {}, "translation", 1000),
    ("webtext2019zh/web_text_zh_real_4.json", 4, {}, "webtext"),
    ("webtext2019zh/web_text_zh_relaid_cluecorpussmall.json", 268, {}, "webtext"),
    ("wiki2019zh/AA/wiki_00", 64, {}, "wiki"),
    ("wiki2019zh/relaid_cmrc2018.jsonl", 1104, {}, "wiki"),
]


def _items(path: Path) -> list[Any]:
    """What read.py yields of a file or folder."""
    spans = [span for file in read.files_of(path, path.name) for span in read.spans_of(file, "auto", 1 << 26)]
    return [item for span in spans for item in read.records(span, "auto")]


def _read(path: Path) -> list[Any]:
    return [item.value for item in _items(path)]


@pytest.mark.parametrize("case", REAL, ids=lambda case: case[0])
def test_real_data(real_data: Path, case: tuple[Any, ...]) -> None:
    name, count, drops, layout, *amount = case
    items = _items(real_data / name)
    assert len(items) == count
    assert {sources.recognise(item.value) for item in items if isinstance(item, read.Record)} == {layout}
    dropped: Counter[str] = Counter()
    examples = []
    for item in items:
        if isinstance(item, read.Bad):
            dropped[item.cause] += 1
            continue
        try:
            examples += auto(item.value)
        except sources.Drop as e:
            dropped[str(e)] += 1
    assert dropped == drops
    assert [len(examples)] == (amount or [count - sum(drops.values())])
    assert all(whole(example) for example in examples)
    _check_masks(examples[:: max(1, len(examples) // 25)])


def test_every_real_file_is_listed(real_data: Path) -> None:
    listed = [real_data / case[0] for case in REAL]
    for path in real_data.rglob("*"):
        if path.is_file() and path.parent != real_data and path.name != "license.txt":
            assert any(path.is_relative_to(one) for one in listed), path


def test_real_scores_and_names(real_data: Path) -> None:
    kept: Counter[str] = Counter()
    for record in _read(real_data / "instruct/alpaca_bilingual_v3_part1-6.json"):
        try:
            sources.examples_of(record, Reading(min_score=4))
        except sources.Drop as e:
            kept[str(e)] += 1
    assert kept == {"low_score": 631, "empty_answer": 4}  # the fifth empty answer is among the poor ones
    reading = Reading(values=(("name", "小熊"), ("author", "某人")))
    named = [sources.examples_of(r, reading) for r in _read(real_data / "instruct/llamafactory_identity.json")]
    assert len(named) == 91 and "{{" not in str(named) and str(named).count("小熊") > 70


def _check_masks(examples: list[Any]) -> None:
    """What is trained, decoded, is each answer and its end mark; all of a raw text."""
    tok = tokenizer.load(resolve("tiny"))
    prompt.set_format(tok, "chatml")
    for example, rendered in zip(examples, prompt.render(tok, examples), strict=True):
        pairs = list(zip(rendered.loss_mask, rendered.input_ids, strict=True))
        if isinstance(example, Text):
            assert tok.decode(rendered.input_ids) == example.text + tok.eos_token
            assert [trained for trained, _ in pairs] == [False] + [True] * (len(pairs) - 1)
            continue
        spans = [tok.decode([i for _, i in group]) for trained, group in groupby(pairs, lambda p: p[0]) if trained]
        assert spans == [text + "<|im_end|>" for role, text in example.messages if role == "assistant"]


def test_questions_are_asked_as_in_evaluation() -> None:
    """A model trained on a question file reads, letter for letter, what `panda eval` asks of the same file."""
    from pandallm import demo
    from pandallm.evaluate import tasks

    for task, path in (("c3-m", "c3/c3-m-train.json"), ("logiqa-v2", "logiqa_v2/train_zh.txt")):
        trained = [example.messages for record in _read(demo.ROOT / "eval" / path) for example in auto(record)]
        asked = tasks.load(task, demo.ROOT / "eval", "train")
        wanted = [(("user", tasks.prompt_for(q, "original")), ("assistant", "ABCD"[q.gold])) for q in asked]
        assert trained == wanted
