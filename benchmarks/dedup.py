"""Near-duplicates: how many planted copies of real records are found, and what else is dropped.

    .venv/bin/python benchmarks/dedup.py [FOLDER] [--show 20]

FOLDER holds the real corpora (default: $PANDALLM_TEST_DATA, else ../shared/data). Records are mainly Chinese and of 50
characters or more. Copies are made of records that have no near-duplicate of their own.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pandallm.data import dedup, ngrams, read, sources
from pandallm.prompt import Text

FILES = [
    "instruct/alpaca_zh_carbonz0_part-00.json",
    "instruct/huatuo_llama_data.json",
    "instruct/lawyer_legal_advice.json",
    "instruct/lawyer_judical_examination.json",
    "coig_schema/exam_instructions.jsonl",
    "coig_schema/translated_instructions.jsonl",  # partly the same questions as alpaca_zh's, translated by another
    "baike2018qa/baike_qa_relaid_toyhom.json",
    "webtext2019zh/web_text_zh_relaid_cluecorpussmall.json",
    "news2016zh/news2016zh_relaid_xwlb.json",
    "wiki2019zh/relaid_cmrc2018.jsonl",
    "wiki2019zh/AA/wiki_00",
    "raw/CLUECorpusSmall_sampled.even_lines.txt",
]
SHORTEST = 50  # characters
DISTINCT = 0.7  # two records of a lower edit similarity are different ones: dropping one of them is a mistake
BATCH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = os.environ.get("PANDALLM_TEST_DATA") or Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    parser.add_argument("folder", nargs="?", type=Path, default=default)
    parser.add_argument("--show", type=int, default=20, help="wrong drops that are printed")
    args = parser.parse_args()
    texts = [text for name in FILES for text in texts_of(args.folder / name)]
    keep = dedup.exact([np.array([dedup.key([Text(text)]) for text in texts], "S16")])
    texts = [text for text, stays in zip(texts, keep, strict=True) if stays]
    like = near(texts)
    false_drops(texts, like, args.show)
    print("\nCopies planted behind the records that have no near-duplicate:")
    print("| change | of the characters | copies | recall | precision |\n|---|---|---|---|---|")
    rng = random.Random(0)
    distinct = [text for text, i in zip(texts, like, strict=True) if i < 0]
    common = re.findall("[\u4e00-\u9fff]", "".join(rng.sample(distinct, 2000)))  # as often as they occur
    for mixed, share in product((False, True), (0.05, 0.1, 0.2)):
        copies = [changed(text, share, common, rng, mixed) for text in distinct]
        plant("replaced, left out, put in" if mixed else "replaced", f"{share:.0%}", distinct, distinct, copies)
    numbered = [text for text in distinct if len(re.findall("[0-9]+", text)) >= 3]
    plant("every digit (should stay)", "-", distinct, numbered, [other_digits(text, rng) for text in numbered])


def texts_of(path: Path) -> list[str]:
    texts = []
    for span in read.spans_of(path, "auto", 1 << 30):
        for item in read.records(span, "auto"):
            if isinstance(item, read.Bad):
                continue
            try:
                text = dedup.text_of(sources.examples_of(item.value, sources.Reading()))
            except sources.Drop:
                continue
            if len(text) >= SHORTEST and len(re.findall("[\u4e00-\u9fff]", text)) > len(text) / 2:
                texts.append(text)
    return texts


def near(texts: list[str]) -> NDArray[np.int64]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sketches.bin"
        with open(path, "wb") as f:
            for at in range(0, len(texts), BATCH):
                batch = texts[at : at + BATCH]
                f.write(dedup.sketches(ngrams.units(batch), len(batch)).tobytes())
        return dedup.near([path], [len(texts)], np.ones(len(texts), bool))


def false_drops(texts: list[str], like: NDArray[np.int64], show: int) -> None:
    drops = [(similarity(texts[i], texts[j]), i, j) for i, j in enumerate(like.tolist()) if j >= 0]
    wrong = sorted(drop for drop in drops if drop[0] < DISTINCT)
    distinct = len(texts) - len(drops) + len(wrong)
    print(f"{len(texts)} real records, {len(drops)} dropped; edit similarity to the one that stays:")
    print("  " + ", ".join(f"{n} from {low:.1f}" for low in (0.9, 0.8, 0.7, 0.6, 0.5, 0) if (n := count(drops, low))))
    print(f"false drops: {len(wrong)} of {distinct} distinct records ({len(wrong) / distinct:.4%}):")
    for value, i, j in wrong[:show]:
        print(f"  {value:.2f}  {' '.join(texts[j].split())[:150]}\n        {' '.join(texts[i].split())[:150]}")


def count(drops: list[tuple[float, int, int]], low: float) -> int:
    high = low + 0.1 if low else 0.5
    return sum(low <= value < high or (low == 0.9 and value == 1) for value, _, _ in drops)


def similarity(a: str, b: str) -> float:
    """1 - edit distance / the longer one's length, of what counts of two texts."""
    one, two = (ngrams.units([text]).codes for text in (a, b))
    place = np.arange(len(two) + 1)
    row = place
    for i, code in enumerate(one, 1):
        step = np.minimum(row[1:] + 1, row[:-1] + (two != code))
        row = np.minimum.accumulate(np.append(i, step) - place) + place
    return 1 - int(row[-1]) / max(len(one), len(two))


def plant(name: str, share: str, texts: list[str], of: list[str], copies: list[str]) -> None:
    """Recall: copies dropped. Precision: of those, for the record they were made of."""
    places = {text: i for i, text in enumerate(texts)}
    found = near([*texts, *copies])[len(texts) :]
    own = np.array([places[text] for text in of])
    right = int((found == own).sum())
    dropped = int((found >= 0).sum())
    print(f"| {name} | {share} | {len(of)} | {dropped / len(of):.3f} | {right / max(dropped, 1):.4f} |")


def changed(text: str, share: float, others: list[str], rng: random.Random, mixed: bool) -> str:
    """`text` with a share of its characters replaced; or, mixed, some of them left out or followed by another."""
    chars = list(text)
    for i in rng.sample(range(len(chars)), round(share * len(chars))):
        other = rng.choice(others)
        chars[i] = rng.choice((other, "", chars[i] + other)) if mixed else other
    return "".join(chars)


def other_digits(text: str, rng: random.Random) -> str:
    return re.sub("[0-9]", lambda m: rng.choice([d for d in "123456789" if d != m[0]]), text)


if __name__ == "__main__":
    main()
