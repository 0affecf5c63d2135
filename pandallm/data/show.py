"""`panda data show`: rows or documents decoded, with what is trained made visible."""

from __future__ import annotations

from itertools import groupby

from transformers import PreTrainedTokenizerBase

from pandallm import prompt, tokenizer
from pandallm.data.shards import Shards
from pandallm.model.load import resolve


def run(folder: str, count: int, source: str | None, colour: bool) -> list[str]:
    """The first `count` rows, or with `source` that source's first documents, as text.

    Trained tokens are green, or between ⟦ and ⟧ without colour.
    """
    data = Shards(folder)
    tok = tokenizer.load(resolve(data.manifest["config"]["tokenizer"]))
    if data.manifest["config"]["pad_token"]:
        tokenizer.add_pad(tok, data.manifest["config"]["pad_token"])
    tok.chat_template = prompt.template(data.manifest["chat_format"], tok)
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
            lines.append(f"--- {title}, {name}, {file}:{line}, {len(ids)} tokens, {int(mask.sum())} trained")
            lines.append(_marked(tok, ids.tolist(), mask.tolist(), before, after))
        shown.append("\n".join(lines))
    return shown


def _marked(tok: PreTrainedTokenizerBase, ids: list[int], mask: list[bool], before: str, after: str) -> str:
    """The text of ids, with `before` and `after` around what is trained."""
    text, shown, end = "", 0, 0
    for trained, group in groupby(mask):
        end += len(list(group))
        # Decoded from the start: a border may lie inside a character, and pieces alone lose their blanks.
        whole = str(tok.decode(ids[:end], clean_up_tokenization_spaces=False))
        if end < len(ids):
            whole = whole.rstrip("\ufffd")
        piece = whole[shown:]
        text += f"{before}{piece}{after}" if trained else piece
        shown = max(shown, len(whole))
    return text
