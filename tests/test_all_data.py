"""All of the real data in one config: every record is kept or accounted for by cause, and nothing else is there."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from pandallm.data import prepare, sources
from pandallm.data.shards import Shards

WITHOUT_A_TAB = "traditional/tatoeba_cmn_unconverted_mixed_script.txt"  # its line 13 holds both languages in one cell
pytestmark = pytest.mark.slow


def counted(folder: Path) -> dict[str, int]:
    """Records of each source (a file, or a folder of files that hold one object each), as the data's own list says."""
    counts: Counter[str] = Counter()
    with open(folder / "MANIFEST.tsv", encoding="utf-8", newline="") as f:
        for row in csv.DictReader(f, delimiter="\t"):
            path = Path(row["path"])
            several = {
                "coig_schema/counterfactural_correction_multi_round_chat",
                "instruct/moss_original_layout",
                "raw/luxun_pd",
            }
            name = next((name for name in several if path.is_relative_to(name)), str(path))
            counts[name] += 1 if name in several else int(row["records_or_lines"])
    return dict(counts)


@pytest.fixture(scope="module")
def prepared(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, int], dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("all")
    counts = counted(real_data)
    names = {f"s{i:02d}": name for i, name in enumerate(sorted(counts))}
    keys: dict[str, Any] = {"tokenizer": "tiny", "seq_len": 1024, "out": str(folder / "shards"), "workers": 2}
    values = {"name": "小熊", "author": "pandallm"}
    keys["sources"] = [
        {"name": short, "path": str(real_data / name)} | ({"values": values} if "identity" in name else {})
        for short, name in names.items()
    ]
    conf = folder / "all.yaml"
    conf.write_text(yaml.safe_dump(keys, allow_unicode=True), encoding="utf-8")
    manifest = prepare.run(str(conf), [])
    return counts, {names[s["name"]]: s for s in manifest["sources"]}, folder / "shards"


def test_every_record_is_kept_or_accounted_for(prepared: tuple[dict[str, int], dict[str, Any], Path]) -> None:
    counts, table, _ = prepared
    assert {name: s["read"] for name, s in table.items()} == counts
    for name, s in table.items():
        assert s["read"] == s["kept"] + sum(s["dropped"].values()), name
        bad = {cause: n for cause, n in s["dropped"].items() if cause in sources.BAD}
        assert bad == ({"bad_record": 1} if name == WITHOUT_A_TAB else {}), (name, s["dropped"])


def test_what_is_dropped_is_what_the_data_are_known_for(prepared: tuple[dict[str, int], dict[str, Any], Path]) -> None:
    """Empty outputs and exact duplicates as listed beside the data."""
    _, table, _ = prepared
    known = {
        "instruct/alpaca_zh_carbonz0_part-00.json": {"empty_answer": 6},
        "instruct/alpaca_en_0-3252.json": {"empty_answer": 4},
        "coig_schema/translated_instructions.jsonl": {"empty_answer": 2},
    }
    for name, dropped in known.items():
        found = {cause: n for cause, n in table[name]["dropped"].items() if cause.startswith("empty")}
        assert found == dropped, (name, table[name]["dropped"])


def test_rows_hold_what_the_table_says(prepared: tuple[dict[str, int], dict[str, Any], Path]) -> None:
    _, table, out = prepared
    data = Shards(out)
    documents = sum(len(data.row(i)) for i in range(len(data)))
    assert documents == sum(s["documents"] for s in table.values()) and documents > 100_000
    assert data.manifest["utilisation"] > 0.99
