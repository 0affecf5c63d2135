"""TRL's SFTTrainer on the same dialogues, loss on the answers only: padded, or packed by its own default strategy.

trl_sft.py MODEL DATA OUT [--steps N] [--packing]   writes OUT/result.json

The model is given by its folder, so TRL loads it as it likes (in fp32). Gradient checkpointing, on by default, is off.
Its packing (`bfd`) lays a batch's rows end to end with positions that restart; it is made for FlashAttention, but for
SDPA Transformers makes a mask of the documents from those positions.
"""

from __future__ import annotations

import meter
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    args = meter.arguments(__doc__)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    watch = meter.Meter(args)
    watch.watch(SFTTrainer)
    settings = SFTConfig(
        **meter.training(args),
        max_length=args.length,
        packing=args.packing,
        assistant_only_loss=True,
        gradient_checkpointing=False,
    )
    trainer = SFTTrainer(
        model=args.model,
        args=settings,
        train_dataset=Dataset.from_list([{"messages": talk} for talk in meter.talks(args.data)]),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.train()
    trainer.save_model()
    how = {"packing": settings.packing_strategy} if args.packing else {"padding": "right"}  # its collator's own
    watch.write("trl", "accelerate", "datasets", **how)


if __name__ == "__main__":
    main()
