"""LLaMA-Factory's full SFT on the same dialogues: padded as by default, or with `neat_packing`.

llamafactory_sft.py MODEL DATA OUT [--steps N] [--packing]   writes OUT/result.json

What `llamafactory-cli train` runs, with its own reader and its template `chatml`, which trains the line break behind an
answer too. Gradient checkpointing, on by default, is off. How to make an environment without a GPU:
llamafactory_pack.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import meter
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from llamafactory.train.tuner import run_exp


def main() -> None:
    args = meter.arguments(__doc__)
    (Path(args.out) / "dataset_info.json").write_text(json.dumps({"bench": {"file_name": args.data}}))
    watch = meter.Meter(args)
    watch.watch(CustomSeq2SeqTrainer)
    settings = {
        **meter.training(args),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": args.model,
        "template": "chatml",
        "dataset": "bench",
        "dataset_dir": args.out,
        "cutoff_len": args.length,
        "disable_gradient_checkpointing": True,
    }
    if args.packing:
        settings["neat_packing"] = True
    run_exp(settings, callbacks=[watch])
    how = {"packing": "neat_packing"} if args.packing else {"padding": "right, to a multiple of 8"}
    watch.write("llamafactory", "accelerate", "datasets", **how)


if __name__ == "__main__":
    main()
