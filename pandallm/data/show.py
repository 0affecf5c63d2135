"""`panda data show`: rows or documents decoded, with what is trained made visible; and what was dropped, and where."""

from __future__ import annotations

from itertools import groupby

from transformers import PreTrainedTokenizerBase

from pandallm import tokenizer
from pandallm.config import UserError
from pandallm.data import tokenize
from pandallm.data.shards import Shards
from pandallm.data.stats import read_report, readable


def run(folder: str, count: int, source: str | None, colour: bool) -> list[str]:
    """The first `count` rows, or with `source` that source's first documents, as text.

    Trained tokens are green, or between ⟦ and ⟧ without colour.
    """
    data = Shards(folder)
    tok = tokenizer_of(data)
    before, after = ("\x1b[32m", "\x1b[0m") if colour else ("⟦", "⟧")
    groups = (
        [("document", [int(n)]) for n in data.documents_of(source)[:count]]
        if source
        else [(f"row {i}", data.row(i).tolist()) for i in range(min(count, len(data)))]
    )
    shown = []
    for title, numbers in groups:
        lines = []
        for number in numbers:
            ids, mask = data.document(number)
            name, file, line = data.provenance(number)
            lines.append(f"--- {title}, {name}, {readable(file)}:{line}, {len(ids)} tokens, {int(mask.sum())} trained")
            lines.append(_marked(tok, ids.tolist(), mask.tolist(), before, after))
        shown.append("\n".join(lines))
    return shown


def dropped(folder: str, cause: str, count: int, source: str | None) -> list[str]:
    """The first `count` samples of the records dropped for `cause`, of one source or of all: place, beginning, and
    what it is like. UserError, with the causes there are, where none was dropped for it."""
    data = Shards(folder)
    table = {s["name"]: s["dropped"] for s in data.manifest["sources"]}
    if source and source not in table:
        raise UserError(f"{folder}: no source '{source}'; it has {', '.join(sorted(table))}")
    names = [source] if source else list(table)
    if not any(cause in table[name] for name in names):
        causes = ", ".join(sorted({known for name in names for known in table[name]})) or "none"
        of = f" of {source}" if source else ""
        raise UserError(f"{folder}: no record{of} was dropped for '{cause}'; causes: {causes}")
    samples = read_report(data)["samples"]
    shown = []
    for name in names:
        for sample in samples.get(name, {}).get(cause, []):
            text = f"--- {cause}, {name}, {sample['file']}:{sample['line']}\n{sample['text']}"
            shown.append(readable(text + (f"\n--- like\n{sample['like']}" if "like" in sample else "")))
    number = sum(table[name].get(cause, 0) for name in names)
    return shown[:count] or [f"--- {cause}: {number} records, of which no samples are kept"]


def tokenizer_of(data: Shards) -> PreTrainedTokenizerBase:
    """The tokenizer that the shards were made with, as they keep it."""
    folder = tokenize.tokenizer_folder(data.folder)
    try:
        found = tokenizer.reload(folder)
    except Exception as e:  # tokenizers raises no narrower one for a file that is cut short
        said = " ".join(str(e).split())[:100]
        raise UserError(f"{folder}: no tokenizer could be loaded ({said}); prepare the shards again") from None
    if tokenizer.fingerprint(found) != data.manifest["tokenizer_hash"]:
        raise UserError(f"{folder}: not the tokenizer the shards were made with; prepare them again")
    return found


def _marked(tok: PreTrainedTokenizerBase, ids: list[int], mask: list[bool], before: str, after: str) -> str:
    """The text of ids, with `before` and `after` around what is trained."""
    text, shown, end = "", 0, 0
    for trained, group in groupby(mask):
        end += len(list(group))
        # Decoded from the start: a border may lie inside a character, and pieces alone lose their blanks.
        whole = str(tok.decode(ids[:end], clean_up_tokenization_spaces=False))
        if end < len(ids):
            whole = whole.rstrip("\ufffd")
        piece = readable(whole[shown:])  # a corpus must not steer the terminal
        text += f"{before}{piece}{after}" if trained else piece
        shown = max(shown, len(whole))
    return text
