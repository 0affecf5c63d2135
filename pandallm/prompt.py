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
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, product
from typing import TYPE_CHECKING, Any, Literal

from pandallm.config import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChatFormat = Literal["panda", "chatml", "llama2", "llama3", "alpaca", "stanford_alpaca", "belle", "linly"]

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


_ALPACA = (  # Stanford's own opening, where no system text is given
    "{%- if messages[0]['role'] != 'system' -%}{{ 'Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\\n\\n' }}{%- endif -%}"
)
TEMPLATES: dict[str, str] = {
    # The original's own (RECIPE section 2): inputs + " " + targets + eos. The space belongs to the answer, so that the
    # prompt of a server, which ends before it, is a prefix of what was trained.
    "panda": _plain("", "", lead=" "),
    "alpaca": _plain("### Instruction:\n", "\n\n### Response:\n"),
    "stanford_alpaca": _plain("### Instruction:\n", "\n\n### Response:").replace("BOS", f"BOS{_ALPACA}"),
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
    """Token ids of one example and which of them are trained, never the first: nothing predicts it."""

    input_ids: list[int]
    trained: list[tuple[int, int]]  # ranges [first, end) in input_ids
    text: str = field(default="", compare=False)  # what was encoded
    encoding: Any = field(default=None, compare=False)  # the tokenizers.Encoding: which characters a token stands for

    @property
    def loss_mask(self) -> list[bool]:
        mask = [False] * len(self.input_ids)
        for first, end in self.trained:
            mask[first:end] = [True] * (end - first)
        return mask


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


def render(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], offsets: bool = False) -> list[Rendered]:
    """Ids and what of them is trained, in order. For training. With `offsets`, texts bring their encoding."""
    texts = iter(_render_texts(tokenizer, [e.text for e in examples if isinstance(e, Text)], offsets))
    dialogues = iter(_render_dialogues(tokenizer, [e for e in examples if isinstance(e, Dialogue)]))
    return [next(texts) if isinstance(example, Text) else next(dialogues) for example in examples]


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], offsets: bool, add_special_tokens: bool = False
) -> list[Any]:
    """The backend's own encodings: Transformers' wrapper copies each several times. Without offsets in 3/4 the time."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    encodings: list[Any] = encode(texts, add_special_tokens=add_special_tokens)
    return encodings


def _render_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], offsets: bool) -> list[Rendered]:
    """The tokenizer's own encoding (bos where it adds one) and eos; all but the first token is trained."""
    if not texts:
        return []
    names, eos, rendered = _names(tokenizer), int(tokenizer.eos_token_id), []
    texts = [_break(text, names) for text in texts]
    for text, encoding in zip(texts, _encode(tokenizer, texts, offsets, add_special_tokens=True), strict=True):
        ids = encoding.ids
        if ids[-1:] != [eos]:  # some tokenizers close every text themselves
            ids.append(eos)
        known = (text, encoding) if offsets else ("", None)
        rendered.append(Rendered(ids, [(1, len(ids))] if len(ids) > 1 else [], *known))
    return rendered


def _break(text: str, names: Sequence[str]) -> str:
    """As the templates' plain() does."""
    heads = {name[0] for name in names}
    if not any(head in text for head in heads):  # most texts: names begin with < or [
        return text
    for name in names:
        text = text.replace(name, f"{name[0]} {name[1:]}")
    return text


def _render_dialogues(tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Dialogue]) -> list[Rendered]:
    if not dialogues:
        return []
    _require_template(tokenizer)
    if not str(tokenizer.chat_template).startswith(_PLAIN[:30]):  # a model's own, which may look into the contents
        texts, spans = _texts_by_jinja(tokenizer, [dialogue.as_messages() for dialogue in dialogues])
        encodings = _encode(tokenizer, texts, offsets=True)
        return [Rendered(e.ids, _by_offsets(e, some)) for e, some in zip(encodings, spans, strict=True)]
    marks = tuple(sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items()))
    names = _names(tokenizer)
    skeletons, pieces = [], []
    for dialogue in dialogues:
        roles = tuple(role for role, _ in dialogue.messages)
        skeleton = _skeleton(tokenizer, tokenizer.chat_template, marks, roles)
        contents = [_break(content.strip(), names) for _, content in dialogue.messages]
        skeletons.append(skeleton)
        pieces.append([p for pair in zip(skeleton.literals, [*contents, ""], strict=True) for p in pair])
    texts = ["".join(some) for some in pieces]
    rendered = []
    for skeleton, some, text, encoding in zip(
        skeletons, pieces, texts, _encode(tokenizer, texts, offsets=False), strict=True
    ):
        ids = encoding.ids
        trained = skeleton.by_marks(ids)
        if trained is None:
            trained = _by_offsets(_encode(tokenizer, [text], offsets=True)[0], skeleton.spans(some))
        rendered.append(Rendered(ids, trained))
    return rendered


Spans = list[tuple[int, int]]  # (start, end) characters of what the model is to say


def _by_offsets(encoding: Any, spans: Spans) -> list[tuple[int, int]]:
    """The tokens of `spans`, as ranges, without the first token of all."""
    trained = []
    for start, end in spans:
        first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
        # A tokenizer may drop a character (leading blanks): the span then begins at the next one it kept.
        while first is None and start < end - 1:
            start += 1
            first = encoding.char_to_token(start)
        if first is not None and last is not None and last > 0:
            trained.append((max(first, 1), last + 1))
    return trained


def _texts_by_jinja(
    tokenizer: PreTrainedTokenizerBase, talks: list[list[Message]]
) -> tuple[Sequence[str], Sequence[Spans]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    marks: dict[str, Any] = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    rendered: Any = render_jinja_template(
        talks, chat_template=tokenizer.chat_template, return_assistant_tokens_mask=True, **marks
    )
    return rendered


Edge = tuple[int, int]  # (number of a literal, characters into it)


@dataclass(frozen=True)
class _Skeleton:
    """What a template of ours writes around the contents of a talk with certain roles."""

    literals: list[str]  # [roles + 1]
    edges: list[tuple[Edge, Edge]]  # where in them each span of the model begins and ends
    marks: list[int]  # the special tokens in the literals
    enclosed: list[tuple[int, list[int], int]] | None  # by span: the mark before it, ids between, the mark that ends it

    def spans(self, pieces: list[str]) -> Spans:
        """The model's spans in the text made of `pieces`: literals and contents in turn."""
        ends = list(accumulate(map(len, pieces), initial=0))
        return [(ends[2 * i] + before, ends[2 * j] + after) for (i, before), (j, after) in self.edges]

    def by_marks(self, ids: list[int]) -> list[tuple[int, int]] | None:
        """The model's tokens, found by the special tokens around them; None where that can't be told for certain."""
        if self.enclosed is None:
            return None
        at, found = -1, []
        try:
            for mark in self.marks:  # contents hold none: their names are broken
                at = ids.index(mark, at + 1)
                found.append(at)
        except ValueError:
            return None
        trained = []
        for before, lead, last in self.enclosed:
            first = found[before] + 1 + len(lead)
            if ids[found[before] + 1 : first] != lead:  # what leads in has merged with the content
                return None
            trained.append((first, found[last] + 1))
        return trained


@lru_cache(maxsize=1024)
def _skeleton(
    tokenizer: PreTrainedTokenizerBase, template: str, marks: tuple[Any, ...], roles: tuple[str, ...]
) -> _Skeleton:
    """Rendered once for each sequence of roles: Jinja takes forty microseconds a talk, joining strings two."""
    stand_ins = [f"\ue000{i}\ue001" for i in range(len(roles))]
    talk = [{"role": role, "content": text} for role, text in zip(roles, stand_ins, strict=True)]
    (text,), (spans,) = _texts_by_jinja(tokenizer, [talk])
    literals, starts, at = [], [], 0
    for stand_in in [*stand_ins, None]:
        found = text.index(stand_in, at) if stand_in else len(text)
        literals.append(text[at:found])
        starts.append(at)
        at = found + len(stand_in or "")

    def edge(place: int) -> Edge:
        number = bisect_right(starts, place) - 1
        return number, place - starts[number]

    edges = [(edge(start), edge(end)) for start, end in spans]
    (encoding,) = _encode(tokenizer, [text], offsets=True)
    names = set(_names(tokenizer))
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content in names}
    places = [place for place, i in enumerate(encoding.ids) if i in special]
    marks_there = [encoding.ids[place] for place in places]
    enclosed = []
    for (start, end), ((literal, _), _) in zip(spans, edges, strict=True):
        first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
        before = (0 if first is None else bisect_left(places, first)) - 1  # the last mark before the answer
        if before < 0 or last not in places or encoding.token_to_chars(places[before])[0] < starts[literal]:
            # No special token between the question and the answer, or none behind the answer.
            return _Skeleton(literals, edges, marks_there, None)
        enclosed.append((before, encoding.ids[places[before] + 1 : first], places.index(last)))
    return _Skeleton(literals, edges, marks_there, enclosed)


def _require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise UserError(f"{tokenizer.name_or_path}: this tokenizer has no chat template; name a chat format")


# Openings that tokenizers treat in different ways: Chinese, Latin, digits, quotes, punctuation, code, emoji.
_PROBES = ("你好，世界。", "Hello", "3.14", "“好”", "：是", "(a)", "```py\nx=1\n```", "🐼", "- 项", "A")


def check_format(tokenizer: PreTrainedTokenizerBase, chat_format: str) -> None:
    """Raises UserError if a served prompt's ids differ from the same prompt's ids in training, or if the name of a
    special token inside a message becomes that token."""
    if _control_tokens(tokenizer, " ".join(_names(tokenizer))) != _control_tokens(tokenizer, "A"):
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
