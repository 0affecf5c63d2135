"""What LLaMA-Factory makes of the same alpaca file: its own reader, template and packing, saved to `tokenized_path`.

llamafactory_pack.py TOKENIZER instruct CORPUS OUT   makes the rows with two workers
llamafactory_pack.py count OUT                       prints {"tokens", "rows", "versions"}

Its functions are called, not its command, which would go on to load a model and train it. An environment without a GPU:
torch's CPU build first, then llamafactory; then uninstall torchvision and torchaudio, whose builds don't fit, and put
an empty torchaudio.py into site-packages.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

SEQ_LEN, WORKERS = 2048, 2


def make(folder: str, corpus: str, out: str) -> None:
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    work = Path(out + ".settings")
    work.mkdir(parents=True, exist_ok=True)
    (work / "dataset_info.json").write_text(json.dumps({"bench": {"file_name": corpus}}))
    arguments = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": folder,
        "template": "chatml",
        "dataset": "bench",
        "dataset_dir": str(work),
        "cutoff_len": SEQ_LEN,
        "packing": True,
        "neat_packing": True,
        "preprocessing_num_workers": WORKERS,
        "tokenized_path": out,
        "output_dir": str(work / "runs"),
        "report_to": "none",
    }
    model, data, training, _, _ = get_train_args(arguments)
    modules = load_tokenizer(model)
    template = get_template_and_fix_tokenizer(modules["tokenizer"], data)
    get_dataset(template, model, data, training, stage="sft", **modules)


def count(out: str) -> dict:
    from datasets import load_from_disk

    rows = load_from_disk(out)["train"]
    # Rows are filled up to SEQ_LEN; what is no padding has the number of its document in the attention mask.
    tokens = sum(n > 0 for batch in rows.iter(100) for mask in batch["attention_mask"] for n in mask)
    return {"tokens": tokens, "rows": len(rows), "versions": {"llamafactory": version("llamafactory")}}


if __name__ == "__main__":
    if sys.argv[1] == "count":
        print(json.dumps(count(sys.argv[2])))
    else:
        make(sys.argv[1], sys.argv[3], sys.argv[4])
