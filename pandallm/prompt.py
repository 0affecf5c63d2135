"""The only file that knows chat formats: a dialogue -> (input_ids, loss_mask). Training, evaluation and serving use it.

A format is a Jinja template with `{% generation %}` marks around what the model is to learn (an assistant's turn and
its end mark). It is saved in the tokenizer's `chat_template`, so that Transformers and vLLM render the very same ids.

Train = serve, token for token, holds when the text up to an answer has the same ids alone (serving) and with the answer
behind it (training). Templates end the prompt where tokenizers split anyway; `check_format` proves it for a tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pandallm.config import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChatFormat = Literal["panda", "chatml", "llama2", "llama3", "alpaca", "belle", "linly"]

# Every template trims contents: white space at the edge of an answer is noise, and the place where tokenizers
# render a prompt differently with and without the answer behind it. BOS stands for the tokenizer's own habit.
_PLAIN = (  # system text first; then prompt and answer by the two patterns; turns joined by JOIN
    "BOS{%- for m in messages -%}"
    "{%- if m['role'] == 'system' -%}{{ m['content'] | trim + SYSTEM_END }}"
    "{%- elif m['role'] == 'user' -%}{{ USER + m['content'] | trim + ASSISTANT }}"
    "{%- else -%}{% generation %}{{ LEAD + m['content'] | trim + eos_token }}{% endgeneration %}"
    "{%- if not loop.last -%}{{ JOIN }}{%- endif -%}{%- endif -%}{%- endfor -%}"
)


def _plain(user: str, assistant: str, lead: str = "", join: str = "\n\n", system_end: str = "\n\n") -> str:
    text = _PLAIN
    for name, value in (("SYSTEM_END", system_end), ("USER", user), ("ASSISTANT", assistant), ("LEAD", lead)):
        text = text.replace(name, _quote(value))
    return text.replace("JOIN", _quote(join))


def _quote(text: str) -> str:
    return "'" + text.replace("'", "\\'").replace("\n", "\\n") + "'"


TEMPLATES: dict[str, str] = {
    # The original's own (RECIPE section 2): inputs + " " + targets + eos. The space belongs to the answer, so that the
    # prompt of a server, which ends before it, is a prefix of what was trained.
    "panda": _plain("", "", lead=" "),
    "alpaca": _plain("### Instruction:\n", "\n\n### Response:\n"),
    "belle": _plain("Human: \n", "\n\nAssistant: \n", join="\n\n"),
    "linly": _plain("### Instruction:", "  ### Response:", join="\n"),
    "chatml": (
        "BOS{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{%- if m['role'] == 'assistant' -%}{% generation %}{{ m['content'] | trim + '<|im_end|>' }}{% endgeneration %}"
        "{%- else -%}{{ m['content'] | trim + '<|im_end|>' }}{%- endif -%}{{ '\\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    ),
    "llama2": (  # every exchange opens with bos; a system text sits inside the first user turn
        "{%- set ns = namespace(system='') -%}{%- for m in messages -%}"
        "{%- if m['role'] == 'system' -%}"
        "{%- set ns.system = '<<SYS>>\\n' + m['content'] | trim + '\\n<</SYS>>\\n\\n' -%}"
        "{%- elif m['role'] == 'user' -%}"
        "{{ bos_token + '[INST] ' + ns.system + m['content'] | trim + ' [/INST]' }}{%- set ns.system = '' -%}"
        "{%- else -%}{% generation %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endgeneration %}"
        "{%- endif -%}{%- endfor -%}"
    ),
    "llama3": (
        "{{ bos_token }}{%- for m in messages -%}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
        "{%- if m['role'] == 'assistant' -%}{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{%- else -%}{{ m['content'] | trim + '<|eot_id|>' }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"
    ),
}
END_MARKS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}  # the others end a turn with the tokenizer's eos

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
    end = end_mark(chat_format, tokenizer)
    if len(tokenizer(end, add_special_tokens=False)["input_ids"]) != 1:
        raise UserError(
            f"chat_format {chat_format}: {end!r} is not one token of this tokenizer; choose a format it knows"
            " (panda and alpaca need nothing but eos)"
        )
    return text


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
    """Ids and loss masks of examples, in order. For training.

    A raw text is the tokenizer's own encoding (bos where it adds one) and eos.
    """
    texts, spans = [], []
    for example in examples:
        if isinstance(example, Text):
            bos = str(tokenizer.bos_token) if adds_bos(tokenizer) else ""
            texts.append(bos + example.text + str(tokenizer.eos_token))
            spans.append([(0, len(texts[-1]))])
        else:
            text, generated = _render_dialogue(tokenizer, example)
            texts.append(text)
            spans.append(generated)
    if not texts:
        return []
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


def _render_dialogue(tokenizer: PreTrainedTokenizerBase, example: Dialogue) -> tuple[str, list[tuple[int, int]]]:
    """Text of a dialogue and the (start, end) characters of what the model is to say."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _require_template(tokenizer)
    marks: dict[str, Any] = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    rendered: Any = render_jinja_template(
        [example.as_messages()],
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **marks,
    )
    texts, generated = rendered
    return str(texts[0]), generated[0]


def _require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise UserError(f"{tokenizer.name_or_path}: this tokenizer has no chat template; name a chat format")


# Openings that tokenizers treat in different ways: Chinese, Latin, digits, quotes, punctuation, code, emoji.
_PROBES = ("你好，世界。", "Hello", "3.14", "“好”", "：是", "(a)", "```py\nx=1\n```", "🐼", "- 项", "A")


def check_format(tokenizer: PreTrainedTokenizerBase, chat_format: str) -> None:
    """Raises UserError if a served prompt's ids differ from the same prompt's ids in training."""
    for answer in _PROBES:
        for question in _PROBES:
            turns: list[tuple[str, str]] = [("user", question), ("assistant", answer)]
            for _ in range(2):  # the first answer, then the second of a longer talk
                trained = render(tokenizer, [Dialogue(tuple(turns))])[0]
                served = render_prompt(tokenizer, Dialogue(tuple(turns[:-1])).as_messages())
                if trained.input_ids[: len(served)] != served or not trained.loss_mask[len(served)]:
                    raise UserError(
                        f"chat_format {chat_format}: with this tokenizer a prompt has other ids in training than in"
                        f" serving (before the answer {answer!r}); choose another format"
                    )
                turns += [("user", answer), ("assistant", question)]
