"""The mixture: every kept document appears exactly as often as it says, unchanged, with its mask."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteYaml

from pandallm import prompt, tokenizer
from pandallm.data import prepare, tokenize
from pandallm.data.shards import Shards
from pandallm.model.names import resolve
from pandallm.prompt import Dialogue, Text

Run = Callable[..., tuple[dict[str, Any], Shards]]


@pytest.fixture
def run(tmp_path: Path, write_yaml: WriteYaml) -> Run:
    """run({name: records}, {name: keys}, **config) -> (manifest, shards)."""

    def run_(corpora: dict[str, list[Any]], keys: dict[str, Any], **config: Any) -> tuple[dict[str, Any], Shards]:
        sources = []
        for name, records in corpora.items():
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
            sources.append({"name": name, "path": str(path), **keys.get(name, {})})
        out = tmp_path / "shards"
        conf = write_yaml("conf.yaml", tokenizer="tiny", workers=1, out=str(out), sources=sources, **config)
        return prepare.run(str(conf), []), Shards(out)

    return run_


def seen(data: Shards) -> Counter[tuple[str, int]]:
    """How often each record of each source stands in the rows, counted by its first piece."""
    counts: Counter[tuple[str, int]] = Counter()
    for i in range(len(data)):
        for n in data.row(i).tolist():
            source, _, line = data.provenance(n)
            part, document = data._locate(n)
            counts[source, line] += int(document["piece"]) == 0
    return counts


@pytest.mark.parametrize("seed", range(8))
def test_property(seed: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "PART_BYTES", (700, 700))  # several parts of each file: places count from the whole
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return "".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(rng.randint(low, high)))

    corpora: dict[str, list[Any]] = {
        "raw": [{"text": words(1, 90)} for _ in range(rng.randint(5, 60))],
        "talk": [
            [{"inputs": words(1, 9), "targets": words(1, 20)} for _ in range(rng.randint(1, 5))]
            for _ in range(rng.randint(5, 40))
        ],
        "ask": [{"instruction": words(1, 9), "output": words(1, 30)} for _ in range(rng.randint(5, 60))],
    }
    corpora["ask"] += rng.choices(corpora["ask"], k=5)  # exact duplicates
    epochs = {name: rng.choice([0.3, 1, 1.5, 2, 3.7]) for name in corpora}
    keys: dict[str, Any] = {name: {"epochs": epochs[name]} for name in corpora}
    if seed % 2:
        keys["ask"]["sample"] = 4
    packing = rng.choice(["best_fit", "none"])
    manifest, data = run(corpora, keys, seq_len=rng.choice([48, 64, 200]), packing=packing, seed=seed)

    assert len(manifest["parts"]) > 6
    tok = tokenizer.load(resolve("tiny"))
    prompt.set_format(tok, "chatml")
    counts = seen(data)
    for table in manifest["sources"]:
        name = table["name"]
        mine = [counts[name, line] for line in range(1, len(corpora[name]) + 1) if counts[name, line]]
        used = len(mine)
        assert used <= table["kept"] == table["read"] - sum(table["dropped"].values())
        assert used == table["kept"] or epochs[name] < 1
        assert set(mine) <= {int(epochs[name]), int(epochs[name]) + 1}
        assert table["repeats"] == max(mine, default=0)
        if name == "ask":
            assert table["dropped"]["duplicate"] == 5
            assert not seed % 2 or table["kept"] == 4

    # What stands in the rows are the records, in pieces, as often as counted.
    texts: Counter[tuple[str, int]] = Counter()
    for i in range(len(data)):
        for n in data.row(i).tolist():
            source, _, line = data.provenance(n)
            ids, mask = data.document(n)
            texts[source, line] += len(ids)
            record = corpora[source][line - 1]
            if source == "raw":
                (whole,) = prompt.render(tok, [Text(record["text"])])
                assert " ".join(map(str, ids.tolist())) in " ".join(map(str, whole.input_ids))
                assert mask.tolist() == [False] + [True] * (len(ids) - 1)
            else:
                turns = record if isinstance(record, list) else [record]
                pairs = [list(turn.values()) for turn in turns]
                possible = [
                    prompt.render(
                        tok, [Dialogue(tuple((("user", "assistant")[k], x[k]) for x in some for k in (0, 1)))]
                    )[0]
                    for a in range(len(pairs))
                    for b in range(a + 1, len(pairs) + 1)
                    for some in [pairs[a:b]]
                ]
                assert any(
                    ids.tolist() == r.input_ids[: len(ids)] and mask.tolist() == r.loss_mask[: len(ids)]
                    for r in possible
                )
    for (source, line), length in texts.items():
        if source == "raw":
            (whole,) = prompt.render(tok, [Text(corpora[source][line - 1]["text"])])
            assert length == len(whole.input_ids) * counts[source, line], "all its pieces, each time"


def test_flan_is_sampled_by_task(run: Run) -> None:
    """Proportional, with a cap: no task swamps the others; the same seed draws the same."""
    records = [
        {"inputs": f"{task} {i}?", "targets": str(i), "task": task}
        for task, n in (("big", 400), ("mid", 60), ("small", 5))
        for i in range(n)
    ]
    keys = {"flan": {"sample": 105, "by": "task", "cap": 100}}
    manifest, data = run({"flan": records}, keys, seq_len=64)
    drawn = {line for _, line in seen(data)}
    tasks = Counter(records[line - 1]["task"] for line in drawn)
    assert sum(tasks.values()) == 105 and manifest["sources"][0]["dropped"] == {"not_sampled": 360}
    assert abs(tasks["big"] - 105 * 100 / 165) <= 1 and abs(tasks["mid"] - 105 * 60 / 165) <= 1
    again = {line for _, line in seen(run({"flan": records}, keys, seq_len=64)[1])}
    other = {line for _, line in seen(run({"flan": records}, keys, seq_len=64, seed=7)[1])}
    assert again == drawn != other


def test_a_sample_without_the_key_is_bad(run: Run) -> None:
    records = [{"inputs": "问", "targets": "答", "task": "a"}, {"inputs": "再问", "targets": "答"}]
    manifest, _ = run({"flan": records}, {"flan": {"sample": 2, "by": "task"}}, max_bad=0.5)
    assert manifest["sources"][0]["dropped"] == {"no_by_key": 1}


def test_up_sampling_to_a_share(run: Run) -> None:
    """COIG from a few percent to what is asked, each record as often as any other."""
    corpora = {
        "wiki": [{"text": f"第{i}条" + "字" * 40} for i in range(200)],
        "coig": [{"instruction": f"问{i}", "output": f"答{i}"} for i in range(20)],
    }
    manifest, data = run(corpora, {"coig": {"weight": 0.25}}, seq_len=128)
    table = {s["name"]: s for s in manifest["sources"]}
    assert table["coig"]["share"] == pytest.approx(0.25, abs=0.005)
    counts = [n for (source, _), n in seen(data).items() if source == "coig"]
    assert len(counts) == 20 and max(counts) - min(counts) <= 1 and table["coig"]["repeats"] == max(counts) > 5


def test_what_a_layout_says_in_every_record_makes_none_alike(run: Run) -> None:
    """Short questions on short texts, asked in the evaluation's words, are no near-duplicates; nor are answers to one
    long instruction of the config."""
    asked = [
        [["火车8点开，别迟到了。"], [{"question": "火车几点开？", "choice": ["七点", "八点"], "answer": "八点"}], "1"],
        [
            ["抽烟对身体不好。"],
            [{"question": "说话人劝别人做什么？", "choice": ["少抽烟", "多喝水"], "answer": "少抽烟"}],
            "2",
        ],
        [["她明天去北京出差。"], [{"question": "她去哪里？", "choice": ["上海", "北京"], "answer": "北京"}], "3"],
    ]
    long = "下面是网友在论坛上提出的一个问题，请你以专家的身份，用通俗易懂的话，耐心而完整地回答他，不要有遗漏。"
    baike = [
        {"qid": str(i), "title": title, "answer": title[::-1]}
        for i, title in enumerate(("盐是什么", "山有多高", "谁写的诗"))
    ]
    manifest, _ = run(
        {"c3": asked, "baike": baike}, {"baike": {"instruction": long}}, dedup={"near": True}, seq_len=512
    )
    assert [s["dropped"] for s in manifest["sources"]] == [{}, {}]


def test_a_near_duplicate_is_shown_beside_what_it_is_like(run: Run, tmp_path: Path) -> None:
    text = (
        "立秋过后，江边的芦苇渐渐白了。渔民们把船拖上岸，补网、上油，等着下一个汛期。孩子们在沙滩上捡贝壳，偶尔抬头看看远处的灯塔。"
        "老人说，从前这里没有堤坝，潮水一来，半个村子都要搬家；如今路修到了门口，日子也就安稳下来了。"
    )
    copy = text.replace("渔民", "船工").replace("老人", "长辈").replace("灯塔", "山影")
    manifest, _ = run({"a": [{"text": text}], "b": [{"text": copy}]}, {}, dedup={"near": True}, seq_len=512)
    assert [s["dropped"] for s in manifest["sources"]] == [{}, {"near_duplicate": 1}]
    report = json.loads((tmp_path / "shards" / "report.json").read_text(encoding="utf-8"))
    (sample,) = report["samples"]["b"]["near_duplicate"]
    assert sample["line"] == 1 and "船工" in sample["text"] and "渔民" in sample["like"]
