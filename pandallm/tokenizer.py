"""Tokenizers: load one, the pad rule, and growing the vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pandallm import files
from pandallm.config import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load(folder: str | Path) -> PreTrainedTokenizerBase:
    """Loads a fast tokenizer from a local folder. UserError if there is none, or it has no end-of-sequence token."""
    try:
        if _is_plain(Path(folder)):
            return _checked(reload(Path(folder)), folder)
        from transformers import AutoTokenizer  # loads torch: seconds, and 270 MB

        tokenizer = AutoTokenizer.from_pretrained(str(folder), use_fast=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{folder}: no tokenizer could be loaded: {str(e).splitlines()[0]}") from None
    return _checked(tokenizer, folder)


def _is_plain(folder: Path) -> bool:
    """Whether a folder's tokenizer is just its tokenizer.json, with no class of its own."""
    settings = folder / "tokenizer_config.json"
    if not (settings.exists() and (folder / "tokenizer.json").exists()):
        return False
    return files.read_json(settings).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")


def _checked(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> PreTrainedTokenizerBase:
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: only a slow tokenizer is there; convert it to tokenizer.json first")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{folder}: the tokenizer has no eos token, so a text's end can't be marked;"
            ' set "eos_token" in tokenizer_config.json'
        )
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The pad rule: padding is masked wherever there is any, so eos serves where there is no pad token."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def add_pad(tokenizer: PreTrainedTokenizerBase, pad_token: str) -> int:
    """Gives a tokenizer without a pad token one, as the original did (RECIPE section 2); returns the tokens added."""
    return 0 if tokenizer.pad_token_id is not None else tokenizer.add_special_tokens({"pad_token": pad_token})


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what decides the ids: the serialised tokenizer, which tokens are special, and the chat template."""
    marks = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return files.hash_json([tokenizer.backend_tokenizer.to_str(), marks, tokenizer.chat_template])


def reload(folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer that is just the tokenizer.json in `folder`, without loading torch: 120 MB a process, not 400."""
    from transformers import PreTrainedTokenizerFast

    loaded: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(str(folder))
    return loaded
