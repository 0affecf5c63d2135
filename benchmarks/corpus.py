"""Makes corpora of any size for the benchmarks: real sentences, drawn anew and altered by rule.

A copied corpus would collapse in deduplication, and its repeated words would come from the tokenizer's cache. So each
document is a row of sentences drawn at random from one real corpus, one Chinese character in ten of which gives way to
another (drawn by how often each occurs), and every digit to another. One document in a hundred is a near-duplicate:
deduplication has something to find. The same seed and real files give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

ALTERED = 0.1  # share of the Chinese characters
REPEATED = 0.01  # share of the documents that are near-duplicates
BATCH = 4  # times a corpus is drawn at once: the more text it has, the more is made of it
LENGTHS = {
    "title": (2, 40),
    "question": (4, 60),
    "sentence": (6, 200),
}  # characters; texts without punctuation are left out

# Where the text comes from: file (below the folder of real corpora), keys of its records. `instruct` takes questions
# from the first key and answers from the second.
INSTRUCT = {
    "instruct/alpaca_zh_carbonz0_part-00.json": ("instruction", "output"),
    "instruct/alpaca_bilingual_v3_part1-6.json": ("zh_instruction", "zh_output"),
    "instruct/llamafactory_alpaca_zh_demo.json": ("instruction", "output"),
    "instruct/huatuo_llama_data.json": ("instruction", "output"),
    "instruct/chatlm_mini_train_3k.jsonl": ("prompt", "response"),
    "baike2018qa/baike_qa_relaid_toyhom.json": ("title", "answer"),
    "webtext2019zh/web_text_zh_relaid_cluecorpussmall.json": ("title", "content"),
}
RAW = {
    "wiki2019zh/AA/wiki_00": ("title", "text"),
    "wiki2019zh/relaid_cmrc2018.jsonl": ("title", "text"),
    "news2016zh/news2016zh_relaid_xwlb.json": ("title", "content"),
    "raw/CLUECorpusSmall_sampled.even_lines.txt": ("", ""),
}

Codes = NDArray[np.uint32]
Rng = np.random.Generator


@dataclass(frozen=True)
class Pool:
    """Sentences end to end: codes [C] (code points), starts [S] and sizes [S] of the sentences."""

    codes: Codes
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def draw(self, rng: Rng, count: int) -> tuple[Codes, NDArray[np.int64]]:
        """`count` random sentences, altered: (codes end to end [D], sizes [count])."""
        chosen = rng.integers(0, len(self.starts), count)
        sizes = self.sizes[chosen]
        ends = np.cumsum(sizes)
        codes = self.codes[np.arange(ends[-1]) + np.repeat(self.starts[chosen] - (ends - sizes), sizes)]
        at = np.flatnonzero(rng.random(len(codes), np.float32) < ALTERED)
        codes[at] = self._others(codes[at], rng)
        digits = np.flatnonzero((codes >= ord("0")) & (codes <= ord("9")))
        codes[digits] = rng.integers(ord("0"), ord("9") + 1, len(digits))
        return codes, sizes

    def _others(self, codes: Codes, rng: Rng) -> Codes:
        """A Chinese character for each that is one."""
        others = self.codes[rng.integers(0, len(self.codes), len(codes))]
        return np.where(_is_han(codes) & _is_han(others), others, codes)

    def alter_one(self, text: str, rng: Rng) -> str:
        """`text` with its middle character changed: a near-duplicate."""
        other = next(
            c for c in iter(lambda: int(self.codes[rng.integers(len(self.codes))]), -1) if 0x4E00 <= c < 0x9FA5
        )
        middle = len(text) // 2
        return text[:middle] + chr(other) + text[middle + 1 :]


def _is_han(codes: Codes) -> NDArray[np.bool_]:
    return (codes >= 0x4E00) & (codes < 0x9FA5)


def write(path: Path, kind: str, size: int, data: Path, seed: int = 0) -> int:
    """Writes `size` bytes (or one record more) of JSON lines to `path`; returns the number of records. `kind`:
    `instruct` (the alpaca layout, some 170 characters a record) or `raw` (wiki2019zh's, 500 to 3,000 characters).
    `data`: the folder of real corpora. FileNotFoundError if it lacks one that is needed."""
    rng = np.random.default_rng([seed, len(kind)])
    make: Callable[[Path, Rng], Iterator[bytes]] = {"instruct": _instruct, "raw": _raw}[kind]
    written = count = 0
    with open(path, "wb") as f:
        for line in make(data, rng):
            f.write(line)
            written += len(line)
            count += 1
            if written >= size:
                break
    return count


def _instruct(data: Path, rng: Rng) -> Iterator[bytes]:
    pools = [
        (_pool(texts[0], *LENGTHS["question"]), _pool(texts[1], *LENGTHS["sentence"]))
        for texts in (_texts(data / name, keys) for name, keys in INSTRUCT.items())
    ]
    while True:
        for questions, sentences in pools:
            answers = _documents(sentences, rng, lambda n: rng.gamma(1.5, 77.0, n) + 10)
            asked = _split(*questions.draw(rng, len(answers)))
            inputs = _split(*sentences.draw(rng, len(answers)))
            has_input = rng.random(len(answers)) < 0.4
            records = [
                {"instruction": q.strip(), "input": i.strip() if has else "", "output": a}
                for q, i, has, a in zip(asked, inputs, has_input.tolist(), answers, strict=True)
            ]
            yield from _lines(records, "output", sentences, rng)


def _raw(data: Path, rng: Rng) -> Iterator[bytes]:
    pools = []
    for name, keys in RAW.items():
        headings, texts = _texts(data / name, keys)
        sentences = _pool(texts, *LENGTHS["sentence"])
        pools.append((_pool(headings, *LENGTHS["title"]) if headings else sentences, sentences))
    number = 0
    while True:
        for titles, sentences in pools:
            texts = _documents(sentences, rng, lambda n: rng.uniform(500, 3000, n))
            named = [title.strip() for title in _split(*titles.draw(rng, len(texts)))]
            records = [
                {"id": str(i), "url": f"https://zh.wikipedia.org/wiki?curid={i}", "title": t, "text": f"{t}\n\n{text}"}
                for i, (t, text) in enumerate(zip(named, texts, strict=True), number)
            ]
            number += len(records)
            yield from _lines(records, "text", sentences, rng)


def _lines(records: list[dict[str, Any]], key: str, pool: Pool, rng: Rng) -> Iterator[bytes]:
    """JSON lines of records, some of which come again with one character of `key` changed."""
    again = rng.random(len(records)) < REPEATED / (1 - REPEATED)
    for record, twice in zip(records, again.tolist(), strict=True):
        yield orjson.dumps(record) + b"\n"
        if twice:
            yield orjson.dumps(record | {key: pool.alter_one(record[key], rng)}) + b"\n"


def _documents(pool: Pool, rng: Rng, lengths: Callable[[int], NDArray[np.float64]]) -> list[str]:
    """Documents of whole sentences, whose lengths follow `lengths(n)` [n] as nearly as sentences allow."""
    codes, sizes = pool.draw(rng, BATCH * len(pool.sizes))
    ends = np.cumsum(sizes)
    wanted = np.cumsum(lengths(int(len(codes) / lengths(1000).mean())))
    borders = np.unique(ends[np.searchsorted(ends, wanted[wanted < len(codes)])])
    texts = _split(codes[: borders[-1]], np.diff(borders, prepend=0))
    return [text for text in (text.strip() for text in texts) if text]


def _split(codes: Codes, sizes: NDArray[np.int64]) -> list[str]:
    text = codes.astype("<u4").tobytes().decode("utf-32-le")
    ends = np.cumsum(sizes).tolist()
    return [text[first:end] for first, end in zip([0, *ends], ends, strict=False)]


def _texts(path: Path, keys: tuple[str, str]) -> tuple[list[str], list[str]]:
    """The two fields of a file's records (JSON array, JSON lines, or plain lines for the second alone)."""
    data = path.read_bytes()
    if not keys[0]:
        return [], data.decode().splitlines()
    records = orjson.loads(data) if data.startswith(b"[") else [orjson.loads(line) for line in data.splitlines()]
    return [r[keys[0]] for r in records], [r[keys[1]] for r in records]


def _pool(texts: list[str], shortest: int, longest: int) -> Pool:
    """The sentences of texts, each with the punctuation and line break behind it; each once."""
    parts = (part for text in texts for part in re.findall(r"[^。！？\n]+[。！？]*[”」]?\n*", text))
    sentences = sorted({part.lstrip() for part in parts if shortest <= len(part) <= longest})
    sizes = np.array([len(sentence) for sentence in sentences])
    codes = np.frombuffer("".join(sentences).encode("utf-32-le"), np.uint32)
    return Pool(codes, np.cumsum(sizes) - sizes, sizes)
