"""What `datasets` and TRL do for the same rows: load, map with the chat template, pack (best fit), save to disk.

trl_pack.py TOKENIZER KIND CORPUS OUT [--masks] [--one-by-one]   makes them with two processes
trl_pack.py count OUT                                            prints {"tokens", "rows", "versions"}

In batches of 1,000; with --one-by-one example by example, as TRL's own trainer does. Without --masks the rows don't say
which tokens are an answer's. Raw texts are packed by `bfd_split`, for `bfd` throws away what exceeds a row.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any

from datasets import load_dataset, load_from_disk
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import pack_dataset

SEQ_LEN, PROCESSES = 2048, 2


def talks(batch: dict, tokenizer: PreTrainedTokenizerBase, masks: bool) -> dict:
    messages = []
    for instruction, more, output in zip(batch["instruction"], batch["input"], batch["output"], strict=True):
        question = f"{instruction}\n{more}" if more else instruction
        messages.append([{"role": "user", "content": question}, {"role": "assistant", "content": output}])
    encoded: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=masks)
    columns = {"input_ids": encoded["input_ids"]}
    return columns | {"assistant_masks": encoded["assistant_masks"]} if masks else columns


def texts(batch: dict, tokenizer: PreTrainedTokenizerBase, masks: bool) -> dict:
    encoded = tokenizer([text + tokenizer.eos_token for text in batch["text"]], return_attention_mask=False)
    return {"input_ids": encoded["input_ids"]}


def talk(example: dict, tokenizer: PreTrainedTokenizerBase, masks: bool) -> dict:
    done = talks({key: [value] for key, value in example.items()}, tokenizer, masks)
    return {key: values[0] for key, values in done.items()}


def text(example: dict, tokenizer: PreTrainedTokenizerBase, masks: bool) -> dict:
    return {"input_ids": tokenizer(example["text"] + tokenizer.eos_token)["input_ids"]}


def make(folder: str, kind: str, corpus: str, out: str, masks: bool, one_by_one: bool) -> None:
    dataset = load_dataset("json", data_files=corpus, split="train")
    rows = dataset.map(
        {("instruct", False): talks, ("instruct", True): talk, ("raw", False): texts, ("raw", True): text}[
            kind, one_by_one
        ],
        batched=not one_by_one,
        num_proc=PROCESSES,
        remove_columns=dataset.column_names,
        fn_kwargs={"tokenizer": AutoTokenizer.from_pretrained(folder), "masks": masks},
    )
    packed = pack_dataset(rows, SEQ_LEN, "bfd" if kind == "instruct" else "bfd_split", {"num_proc": PROCESSES})
    packed.save_to_disk(out)


def count(out: str) -> dict:
    packed = load_from_disk(out)
    tokens = sum(
        sum(batch) for column in packed.with_format("arrow").iter(1000) for batch in column["seq_lengths"].to_pylist()
    )
    return {"tokens": tokens, "rows": len(packed), "versions": {name: version(name) for name in ("trl", "datasets")}}


if __name__ == "__main__":
    if sys.argv[1] == "count":
        print(json.dumps(count(sys.argv[2])))
    else:
        folder, kind, corpus, out = sys.argv[1:5]
        make(folder, kind, corpus, out, "--masks" in sys.argv, "--one-by-one" in sys.argv)
