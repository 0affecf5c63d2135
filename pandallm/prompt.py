"""The only file that knows chat formats: a dialogue -> (input_ids, loss_mask). Training, evaluation and serving use it.

A format is a Jinja template with `{% generation %}` marks around what the model is to learn (an assistant's turn and
its end mark). It is saved in the tokenizer's `chat_template`, so that Transformers and vLLM render the very same ids.

Train = serve, token for token, holds when the text up to an answer has the same ids alone (serving) and with the answer
behind it (training). Templates end the prompt where tokenizers split anyway; `check_format` tries it for a tokenizer.

What someone writes never becomes a control token: a special token's name inside a message or a raw text gets a blank
after its first character (`<|im_end|>` -> `< |im_end|>`). The template itself does that, so that all engines do.
Formats whose marks are plain text (`### Response:`) can't be guarded so; a model's own template is used as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from pandallm.config import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChatFormat = Literal["panda", "chatml", "llama2", "llama3", "alpaca", "belle", "linly"]

# plain() trims contents: white space at the edge of an answer is noise, and the place where tokenizers render a prompt
# differently with and without the answer behind it. And it breaks the names of special tokens (BREAKS).
_PLAIN = "{%- macro plain(text) -%}{{ text | trimBREAKS }}{%- endmacro -%}"
# BOS stands for the tokenizer's own habit.
_TURNS = (  # system text first; then prompt and answer by the two patterns; turns joined by JOIN
    "BOS{%- for m in messages -%}"
    "{%- if m['role'] == 'system' -%}{{ plain(m['content']) + SYSTEM_END }}"
    "{%- elif m['role'] == 'user' -%}{{ USER + plain(m['content']) + ASSISTANT }}"
    "{%- else -%}{% generation %}{{ LEAD + plain(m['content']) + eos_token }}{% endgeneration %}"
    "{%- if not loop.last -%}{{ JOIN }}{%- endif -%}{%- endif -%}{%- endfor -%}"
)


def _plain(user: str, assistant: str, lead: str = "", join: str = "\n\n", system_end: str = "\n\n") -> str:
    text = _TURNS
    for name, value in (("SYSTEM_END", system_end), ("USER", user), ("ASSISTANT", assistant), ("LEAD", lead)):
        text = text.replace(name, _quote(value))
    return text.replace("JOIN", _quote(join))


def _quote(text: str) -> str:
    """A Jinja string."""
    return json.dumps(text, ensure_ascii=False)


TEMPLATES: dict[str, str] = {
    # The original's own (RECIPE section 2): inputs + " " + targets + eos. The space belongs to the answer, so that the
    # prompt of a server, which ends before it, is a prefix of what was trained.
    "panda": _plain("", "", lead=" "),
    "alpaca": _plain("### Instruction:\n", "\n\n### Response:\n"),
    "belle": _plain("Human: \n", "\n\nAssistant: \n", join="\n\n"),
    "linly": _plain("### Instruction:", "  ### Response:", join="\n"),
    "chatml": (
        "BOS{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{%- if m['role'] == 'assistant' -%}{% generation %}{{ plain(m['content']) + '<|im_end|>' }}{% endgeneration %}"
        "{%- else -%}{{ plain(m['content']) + '<|im_end|>' }}{%- endif -%}{{ '\\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    ),
    "llama2": (  # every exchange opens with bos; a system text sits inside the first user turn
        "{%- set ns = namespace(system='') -%}{%- for m in messages -%}"
        "{%- if m['role'] == 'system' -%}"
        "{%- set ns.system = '<<SYS>>\\n' + plain(m['content']) + '\\n<</SYS>>\\n\\n' -%}"
        "{%- elif m['role'] == 'user' -%}"
        "{{ bos_token + '[INST] ' + ns.system + plain(m['content']) + ' [/INST]' }}{%- set ns.system = '' -%}"
        "{%- else -%}{% generation %}{{ ' ' + plain(m['content']) + ' ' + eos_token }}{% endgeneration %}"
        "{%- endif -%}{%- endfor -%}"
    ),
    "llama3": (
        "{{ bos_token }}{%- for m in messages -%}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
        "{%- if m['role'] == 'assistant' -%}{% generation %}{{ plain(m['content']) + '<|eot_id|>' }}{% endgeneration %}"
        "{%- else -%}{{ plain(m['content']) + '<|eot_id|>' }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"
    ),
}
END_MARKS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}  # the others end a turn with the tokenizer's eos
_MARK = re.compile(r"<\|\w+\|>")

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": …}


@dataclass(frozen=True)
class Text:
    """A raw text: every token is trained."""

    text: str


@dataclass(frozen=True)
class Dialogue:
    """Turns of a talk: every assistant turn and its end mark is trained."""

    messages: tuple[tuple[str, str], ...]  # (role, content)

    def as_messages(self) -> list[Message]:
        return [{"role": role, "content": content} for role, content in self.messages]


Example = Text | Dialogue


@dataclass(frozen=True)
class Rendered:
    """Token ids of one example and, for each, whether it is trained. `loss_mask[0]` is False: nothing predicts it."""

    input_ids: list[int]
    loss_mask: list[bool]


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself opens a text with bos."""
    return bool(tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)


def template(chat_format: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja template of a format for this tokenizer. UserError if the tokenizer lacks a mark the format needs."""
    text = TEMPLATES[chat_format].replace("BOS", "{{ bos_token }}" if adds_bos(tokenizer) else "")
    marks = [end_mark(chat_format, tokenizer), *_MARK.findall(text)]
    lacking = [repr(mark) for mark in marks if mark not in tokenizer.get_added_vocab()]
    if "bos_token" in text and tokenizer.bos_token is None:
        lacking.append("bos")
    if lacking:
        raise UserError(
            f"chat_format {chat_format}: {lacking[0]} is not a special token of this tokenizer; choose a format it"
            " knows (panda and alpaca need nothing but eos)"
        )
    # A name stands in two halves, so that a template holds no mark whole but those it sets itself.
    halves = [(name[0], name[1:]) for name in _names(tokenizer)]
    breaks = [f" | replace({_quote(a)} ~ {_quote(b)}, {_quote(f'{a} {b}')})" for a, b in halves]
    return _PLAIN.replace("BREAKS", "".join(breaks)) + text


def _names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Names of the special tokens; of families like `<|reserved_special_token_7|>` the common beginning."""
    added = tokenizer.added_tokens_decoder.values()
    names = [token.content for token in added if token.special or _MARK.fullmatch(token.content)]
    names = [re.sub(r"(\w{4,}_)\d+\W*$", r"\1", name) for name in names]
    return sorted({name for name in names if len(name) > 1}, key=lambda name: (-len(name), name))


def end_mark(chat_format: str, tokenizer: PreTrainedTokenizerBase) -> str:
    return END_MARKS.get(chat_format) or str(tokenizer.eos_token)


def set_format(tokenizer: PreTrainedTokenizerBase, chat_format: str) -> None:
    """Puts a format into the tokenizer, from where saving, rendering and other engines take it."""
    tokenizer.chat_template = template(chat_format, tokenizer)
    check_format(tokenizer, chat_format)


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Ids of a talk up to the answer that is to be generated. For serving and evaluation."""
    _require_template(tokenizer)
    ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=False)
    return list(ids)


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The text whose ids `render_prompt` gives."""
    _require_template(tokenizer)
    return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))


def render(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[Rendered]:
    """Ids and loss masks of examples, in order. For training."""
    texts = iter(_render_texts(tokenizer, [e.text for e in examples if isinstance(e, Text)]))
    dialogues = iter(_render_dialogues(tokenizer, [e for e in examples if isinstance(e, Dialogue)]))
    return [next(texts) if isinstance(example, Text) else next(dialogues) for example in examples]


def _render_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Rendered]:
    """The tokenizer's own encoding (bos where it adds one) and eos; all but the first token is trained."""
    if not texts:
        return []
    names, eos, rendered = _names(tokenizer), int(tokenizer.eos_token_id), []
    encoded = tokenizer([_break(text, names) for text in texts], return_attention_mask=False)
    for ids in encoded["input_ids"]:
        whole = ids if ids[-1:] == [eos] else [*ids, eos]  # some tokenizers close every text themselves
        rendered.append(Rendered(whole, [False] + [True] * (len(whole) - 1)))
    return rendered


def _break(text: str, names: Sequence[str]) -> str:
    """As the templates' plain() does."""
    for name in names:
        text = text.replace(name, f"{name[0]} {name[1:]}")
    return text


def _render_dialogues(tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Dialogue]) -> list[Rendered]:
    if not dialogues:
        return []
    texts, spans = _texts_of(tokenizer, dialogues)
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
    rendered = []
    for i, generated in enumerate(spans):
        ids = list[int](encoded["input_ids"][i])
        mask = [False] * len(ids)
        for start, end in generated:
            first, last = encoded.char_to_token(i, start), encoded.char_to_token(i, end - 1)
            # A tokenizer may drop a character (leading blanks): the span then begins at the next one it kept.
            while first is None and start < end - 1:
                start += 1
                first = encoded.char_to_token(i, start)
            if first is None or last is None:
                continue
            mask[first : last + 1] = [True] * (last + 1 - first)
        if mask:
            mask[0] = False
        rendered.append(Rendered(ids, mask))
    return rendered


def _texts_of(
    tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Dialogue]
) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """Text of each dialogue and the (start, end) characters of what the model is to say."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _require_template(tokenizer)
    marks: dict[str, Any] = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    rendered: Any = render_jinja_template(
        [dialogue.as_messages() for dialogue in dialogues],
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **marks,
    )
    return rendered


def _require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise UserError(f"{tokenizer.name_or_path}: this tokenizer has no chat template; name a chat format")


# Openings that tokenizers treat in different ways: Chinese, Latin, digits, quotes, punctuation, code, emoji.
_PROBES = ("你好，世界。", "Hello", "3.14", "“好”", "：是", "(a)", "```py\nx=1\n```", "🐼", "- 项", "A")


def check_format(tokenizer: PreTrainedTokenizerBase, chat_format: str) -> None:
    """Raises UserError if a served prompt's ids differ from the same prompt's ids in training, or if the name of a
    special token inside a message becomes that token."""
    forged = " ".join(_names(tokenizer))
    if _control_tokens(tokenizer, forged) != _control_tokens(tokenizer, "A"):
        raise UserError(
            f"chat_format {chat_format}: with this tokenizer the name of a special token, written in a message, becomes"
            " that token; its normalizer must leave blanks alone"
        )
    talks = []
    for question, answer in product(_PROBES, _PROBES):
        turns = (("user", question), ("assistant", answer))
        talks += [Dialogue(turns), Dialogue((*turns, ("user", answer), ("assistant", question)))]
    for talk, trained in zip(talks, render(tokenizer, talks), strict=True):
        served = render_prompt(tokenizer, talk.as_messages()[:-1])
        edge = len(served)
        if trained.input_ids[:edge] != served or trained.loss_mask[edge - 1 : edge + 1] != [False, True]:
            raise UserError(
                f"chat_format {chat_format}: with this tokenizer a prompt has other ids in training than in serving"
                f" (before the answer {talk.messages[-1][1]!r}); choose another format"
            )


def _control_tokens(tokenizer: PreTrainedTokenizerBase, content: str) -> list[int]:
    """The special tokens of a dialogue with this content."""
    special = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
    ids = render(tokenizer, [Dialogue((("user", content), ("assistant", content)))])[0].input_ids
    return [i for i in ids if i in special]
