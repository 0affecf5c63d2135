"""The floor of any preparation: `tokenizers` encoding the texts that the rows are made of, and nothing else.

bare_tokenizers.py TOKENIZER KIND CORPUS prints {"tokens", "seconds"}: the best of three passes in batches of 1,000.
TOKENIZER: a folder whose tokenizer has a chat template. KIND and CORPUS: as corpus.py writes them.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import orjson
from transformers import AutoTokenizer, PreTrainedTokenizerBase

BATCH = 1000


def texts_of(tokenizer: PreTrainedTokenizerBase, kind: str, corpus: str) -> list[str]:
    """The text of each record as it is encoded: raw, or rendered by the chat template."""
    with open(corpus, "rb") as f:
        records = [orjson.loads(line) for line in f]
    if kind == "raw":
        return [record["text"] for record in records]
    talks = []
    for r in records:
        question = f"{r['instruction']}\n{r['input']}" if r["input"] else r["instruction"]
        talks.append([{"role": "user", "content": question}, {"role": "assistant", "content": r["output"]}])
    rendered: Any = tokenizer.apply_chat_template(talks, tokenize=False)
    return rendered


def main() -> None:
    folder, kind, corpus = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = texts_of(tokenizer, kind, corpus)
    backend = tokenizer.backend_tokenizer
    best = float("inf")
    for _ in range(3):
        tokens, seconds = 0, 0.0
        for first in range(0, len(texts), BATCH):
            start = time.perf_counter()
            encodings = backend.encode_batch(texts[first : first + BATCH], add_special_tokens=False)
            seconds += time.perf_counter() - start
            tokens += sum(len(encoding) for encoding in encodings)
        best = min(best, seconds)
    print(json.dumps({"tokens": tokens, "seconds": best}))


if __name__ == "__main__":
    main()
