"""Transformers' Trainer on the same dialogues: padded to the longest of a batch, loss on the answers only.

hf_trainer.py MODEL DATA OUT [--steps N] [--fp32-weights]   writes OUT/result.json

Tokenized before training, by the chat template with its marks. Weights are as `from_pretrained` gives them, which is
the type they were saved in.
"""

from __future__ import annotations

from typing import Any

import meter
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments


def encode(tokenizer: Any, path: str, length: int) -> list[dict[str, list[int]]]:
    encoded = tokenizer.apply_chat_template(meter.talks(path), return_dict=True, return_assistant_tokens_mask=True)
    rows = []
    for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        labels = [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]
        rows.append({"input_ids": ids[:length], "labels": labels[:length]})
    return rows


def main() -> None:
    args = meter.arguments(__doc__)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dtype = {"dtype": torch.float32} if args.fp32_weights else {}
    watch = meter.Meter(args)
    watch.watch(Trainer)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, **dtype),
        args=TrainingArguments(**meter.training(args)),
        train_dataset=encode(tokenizer, args.data, args.length),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.train()
    trainer.save_model()
    watch.write("accelerate", padding=tokenizer.padding_side)


if __name__ == "__main__":
    main()
