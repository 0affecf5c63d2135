"""Tables, CSV, TSV and parquet: rows as they were written; a broken one costs itself and at most its neighbour."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from test_read import PACK, causes, good, values, zipped

from pandallm.config import UserError
from pandallm.data import read


def table(rows: list[list[str]], **keys: Any) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n", **keys).writerows(rows)
    return out.getvalue()


ROWS = [["1", "第一行\n第二行"], ["2", '他说："好, 好"'], ["3", ""], ["4", "x" * 200_000], ["5", "甲,乙"], ["6", "丙"]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16", "zip"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("keys", [{}, {"quoting": csv.QUOTE_ALL}, {"delimiter": "\t", "quoting": csv.QUOTE_ALL}])
def test_csv(of: Any, encoding: str, ending: str, keys: dict[str, Any]) -> None:
    def read_back(rows: list[list[str]]) -> list[Any]:
        text = table(rows, **keys).replace("\n", ending)
        found = values(of(PACK[encoding](text.encode()) if encoding in PACK else text.encode(encoding)))
        return json.loads(json.dumps(found).replace("\\r\\n", "\\n"))  # line ends within a cell are as they were

    assert read_back([["id", "text"], *ROWS]) == [{"id": a, "text": b} for a, b in ROWS]
    assert read_back([["", "label", "text"], ["0", "a", "b,\nc"]]) == [{"": "0", "label": "a", "text": "b,\nc"}]
    assert read_back(ROWS) == ROWS
    assert read_back([["text"], *(row[1:] for row in ROWS if row[1])]) == [{"text": row[1]} for row in ROWS if row[1]]


def test_places_in_tables(of: Any) -> None:
    assert [item.line for item in of(table([["id", "text"], *ROWS]))] == [2, 4, 5, 6, 7, 8]
    assert [item.line for item in of("a\tb\n\nc\td\n")] == [1, 3]


def test_tsv_has_no_quotes(of: Any) -> None:
    rows = [["He said.", '"你好。'], ['"Hi', "嗨"], ["Go", '走"开"'], ["\\n", "字面"]]
    text = "\n".join(map("\t".join, rows))
    assert values(of(text)) == rows
    assert values(of("english\tchinese\n" + text)) == [{"english": a, "chinese": b} for a, b in rows]


@pytest.mark.parametrize("broken", ['7,"开着', '7,"开着\n续', '7,"a"b', "7,甲,乙", "7", '"', "7,\0", '7,"\n"\n"'])
@pytest.mark.parametrize("at", range(7))
def test_one_broken_row(of: Any, at: int, broken: str) -> None:
    """Costs itself and what it swallowed of the next, never the rest of the file; it is counted."""
    rows = [[str(i), f"第{i}行，\n{i}续" if i % 2 else f"第{i}行"] for i in range(40)]
    lines = [table([row]) for row in rows]
    lines.insert(at, broken + "\n")
    found = of("id,text\n" + "".join(lines))
    read_rows = [[item["id"], item["text"]] for item in good(found)]
    assert [row for row in rows if row not in read_rows] in ([], [rows[min(at, 39)]])
    assert 1 <= sum(map(bool, causes(found))) <= 4 and set(causes(found)) <= {None, "bad_record", "bad_encoding"}


def parquet(path: Path, rows: list[dict[str, Any]], size: int = 3) -> None:
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), path, row_group_size=size)


def test_parquet(of: Any, tmp_path: Path) -> None:
    rows = [{"id": i, "text": f"第{i}篇", "turns": [{"role": "user", "content": "问"}] * (i % 3)} for i in range(10)]
    parquet(tmp_path / "table", rows)
    data = (tmp_path / "table").read_bytes()
    whole = of(data)
    assert values(whole) == rows and [item.line for item in whole] == list(range(1, 11))
    assert len(read.spans_of(tmp_path / "corpus", "auto", 1)) == 4
    assert of(data, limit=1) == whole
    assert causes(of(data[:-20])) == causes(of(zipped(data))) == causes(of(data, "lines")) == ["bad_archive"]


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "table", [{"text": "好"}])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="needs pyarrow; pip install pyarrow"):
        read.spans_of(tmp_path / "table", "auto", 1)
