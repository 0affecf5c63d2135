"""Multiple-choice questions as a model reads them: the same text in training and in evaluation."""

from __future__ import annotations

from collections.abc import Sequence

# Instruction, headings and the answer's lead are the original's (RECIPE section 5).
WORDINGS: dict[str, str] = {
    "original": (
        "阅读下面的文章并从选项中选择的答案回答问题：\n\nContext:\n{context}\n\nQuestion:\n{question}\n\n"
        "Options:\n{options}\n\n本题的答案是："
    )
}


def letter(index: int) -> str:
    """The letter of an option: A, B, … in their order."""
    return chr(ord("A") + index)


def text_of(context: str, question: str, options: Sequence[str], wording: str = "original") -> str:
    """The text that asks a question, ending where the answer begins. `wording`: a key of WORDINGS.

    Without options, the wording's paragraph that lists them is left out.
    """
    wanted = WORDINGS[wording]
    if not options:
        wanted = "\n\n".join(part for part in wanted.split("\n\n") if "{options}" not in part)
    listed = "\n".join(f"{letter(i)}: {option}" for i, option in enumerate(options))
    return wanted.format(context=context, question=question, options=listed)
