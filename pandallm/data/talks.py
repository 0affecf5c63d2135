"""Turns -> a Dialogue, after checks; the layouts that list turns, and the marks some leave around what is said."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from pandallm.prompt import Dialogue, Example

Json = Mapping[str, Any]
Reader = Callable[[Any, str], list[Example]]  # a record, the layout's fixed instruction -> examples; raises Drop
Turns = list[tuple[str, str]]  # (role, text)


class Drop(Exception):
    """A record that is not used; the message is the cause it is counted under."""


ROLES = {
    **dict.fromkeys(("system", "系统"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "用户", "人类", "问"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model", "moss"), "assistant"),
    **dict.fromkeys(("助手", "助理", "机器人", "答"), "assistant"),
}


def clean(value: Any) -> str:
    """A string with LF line ends and no white space around it; null is an empty one."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Drop("bad_record")
    if "\r" in value:
        value = value.replace("\r\n", "\n").replace("\r", "\n")
    return value.strip()


def string(record: Json, key: str) -> str:
    return clean(record[key])


def optional(record: Json, key: str) -> str:
    return clean(record.get(key))


def items_of(value: Any) -> list[Any]:
    if not isinstance(value, list):  # a string's letters would pass for items
        raise Drop("bad_record")
    return value


def join(*parts: str) -> str:
    return "\n".join(part for part in parts if part)


# The end of a turn or text as other trainers wrote it into their corpora: none of it is the answer.
END_MARKS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<eoh>", "<eom>", "<eoa>")


def _unmarked(text: str) -> str:
    if not text.endswith(">"):
        return text
    marks = END_MARKS if "<s>" in text else (*END_MARKS, "</s>")  # <s>…</s> strikes words out in HTML
    end = len(text)
    while text.endswith(marks, 0, end):
        end = text.rindex("<", 0, end)
        while end and text[end - 1].isspace():
            end -= 1
    return text[:end]


def talk(turns: Turns) -> list[Example]:
    """A dialogue, after checks: user and assistant in turn, ending in an answer that isn't empty."""
    turns = [(role, _unmarked(text)) for role, text in turns]
    if turns and turns[0] == ("system", ""):
        del turns[0]
    start = 1 if turns and turns[0][0] == "system" else 0
    while len(turns) > start and turns[-1][0] == "user":  # a question nobody answered
        del turns[-1]
    if len(turns) == start:
        raise Drop("no_answer")
    if (len(turns) - start) % 2 or any(
        role != ("user", "assistant")[i % 2] for i, (role, _) in enumerate(turns[start:])
    ):
        raise Drop("roles_out_of_order")
    if not all(text for role, text in turns if role == "assistant"):
        raise Drop("empty_answer")
    if not all(text for _, text in turns):
        raise Drop("empty_question")
    return [Dialogue(tuple(turns))]


def ask(question: str, answer: str) -> list[Example]:
    return talk([("user", question), ("assistant", answer)])


def before(r: Json) -> Turns:
    """The system text and the turns that came before what a record asks."""
    turns = [("system", optional(r, "system"))]
    for past in r.get("history") or []:
        question, answer = items_of(past)
        turns += [("user", clean(question)), ("assistant", clean(answer))]
    return turns


def role_of(name: str) -> str:
    role = ROLES.get(name.strip("<|> ").lower())
    if role is None:
        raise Drop("unknown_role")
    return role


TOOL_RESULTS = "工具给出的结果："  # heads what a MOSS plugin found, in the turn that asked for it


def rounds(r: Json, _: str) -> list[Example]:
    turns = []
    for key in sorted((k for k in r if k.startswith("round_")), key=lambda k: int(k.removeprefix("round_"))):
        turns += [("user", string(r[key], "prompt")), ("assistant", string(r[key], "response"))]
    return talk(turns)


def _turns(items: Any) -> Turns:
    """Turns of {from, value}, {role, content} or (Firefly) {human, assistant}."""
    turns = []
    for item in items_of(items):
        if item.get("human") is not None:
            turns += [("user", string(item, "human")), ("assistant", string(item, "assistant"))]
            continue
        role = role_of(item["from"] if item.get("from") is not None else item["role"])
        turns.append((role, clean(item["value"] if item.get("value") is not None else item["content"])))
    return turns


def _whole(r: Json, key: str) -> Turns:
    """The turns listed under a key, under the system text that stands beside them (FlagAI calls it instruction)."""
    turns, system = _turns(r[key]), optional(r, "system") or optional(r, "instruction")
    if system and turns and turns[0][0] == "system":
        system = join(system, turns.pop(0)[1])
    return [("system", system), *turns] if system else turns


def listed(key: str) -> Reader:
    return lambda r, _: talk(_whole(r, key))


def chosen_of(r: Json, _: str) -> list[Example]:
    """Preference data: the answer that was preferred. The question is a text, a talk, or within the answer's talk."""
    chosen = r["chosen"]
    prompt = r.get("prompt") or r.get("question") or r.get("instruction")
    if key := next((key for key in ("conversations", "messages") if r.get(key)), None):
        asked = _whole(r, key)
    elif isinstance(prompt, list):
        asked = _turns(prompt)
    else:
        asked = [*before(r), ("user", join(clean(prompt), optional(r, "input")))]
    if isinstance(chosen, str):
        return talk([*asked, ("assistant", clean(chosen))])
    answer = _turns(chosen if isinstance(chosen, list) else [chosen])
    return talk(answer if answer and answer[0][0] != "assistant" else [*asked, *answer])


_MOSS_START = re.compile(r"^\s*<\|[\w ]+\|>\s*[:：]?\s*")
_MOSS_END = re.compile(r"<eo[a-z]>")
_MOSS_CITED = re.compile(r"(?:<sup>)?<\|(\d+)\|>(?:</sup>)?")


def _said(value: Any) -> str:
    return _MOSS_END.sub("", _MOSS_START.sub("", clean(value))).strip()


def moss(r: Json, _: str) -> list[Example]:
    """MOSS's talks, whose values are wrapped in marks. Plugins' results become part of the turn that asks, without
    which the answer would teach to make them up; thoughts and commands are for MOSS's own tools, and left out. So is
    meta_instruction, the same English text in every record: the model's name in it is not ours to teach."""
    turns: Turns = []
    chat = r["chat"]
    for key in sorted(chat, key=lambda k: int(k.removeprefix("turn_"))):
        question, answer = _said(chat[key]["Human"]), _said(chat[key]["MOSS"])
        if "Text2Image(" in _said(chat[key].get("Commands")):  # "here is your picture", which a text model hasn't
            raise Drop("needs_tools")
        results = _said(chat[key].get("Tool Responses"))
        if results not in ("", "None"):
            question = _MOSS_CITED.sub(r"[\1]", f"{question}\n\n{TOOL_RESULTS}\n{results}")
            answer = _MOSS_CITED.sub(r"[\1]", answer)
        turns += [("user", question), ("assistant", answer)]
    return talk(turns)


_NAMES = "|".join(sorted(ROLES, key=len, reverse=True))
# How a talk is written into one text, told by its start. The mark of each turn names its role.
_TURN_MARKS = [
    re.compile(pattern, re.IGNORECASE | re.MULTILINE)
    for pattern in (
        rf"<s>\s*({_NAMES})\s*[:：]",
        r"<\|im_start\|>(\w+)$",
        rf"<\|({_NAMES})\|>[:：]?",
        rf"\[({_NAMES})\][:：]",
        rf"^###\s?({_NAMES})\s*[:：]",
    )
]


def turn_mark(text: str) -> re.Pattern[str] | None:
    """The marks by which a text is a talk, or None."""
    if not text.startswith(("<", "[", "#")):
        return None
    return next((mark for mark in _TURN_MARKS if mark.match(text)), None)


def marked(r: str | Json, _: str) -> list[Example]:
    text = clean(r if isinstance(r, str) else r.get("plain_text", r.get("text")))
    mark = turn_mark(text)
    if mark is None:
        raise Drop("bad_record")
    _, *parts = mark.split(text)
    return talk([(role_of(name), part.strip()) for name, part in zip(parts[::2], parts[1::2], strict=True)])
