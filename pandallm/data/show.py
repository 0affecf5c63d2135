"""`panda data show`: rows or documents decoded, with what is trained made visible."""

from __future__ import annotations

from itertools import groupby

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
            text = ""
            for trained, pairs in groupby(zip(ids.tolist(), mask.tolist(), strict=True), key=lambda pair: pair[1]):
                piece = str(tok.decode([i for i, _ in pairs]))
                text += f"{before}{piece}{after}" if trained else piece
            lines.append(text)
        shown.append("\n".join(lines))
    return shown
