"""Records of every corpus of the recipe, and the common instruction layouts -> Text | Dialogue (RECIPE section 2)."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pandallm.data import questions
from pandallm.prompt import Dialogue, Example, Text

Json = Mapping[str, Any]


class Drop(Exception):
    """A record that is not used; the message is the cause it is counted under."""


# Causes that mean "this is not what the corpus says it is": they count towards `max_bad`. The others are expected.
BAD = ("bad_json", "bad_encoding", "bad_gzip", "bad_record", "unknown_layout")

# The fixed instruction of each corpus that carries none. A config's `instruction` replaces it.
INSTRUCTIONS = {
    "baike": "请回答下面的百科问题。",
    "webtext": "请回答下面网友提出的问题。",
    "translation": "请把下面的内容翻译成{language}。",
}


def examples_of(record: Any, layout: str, instruction: Sequence[str], seed: int) -> list[Example]:
    """The examples of one record. `layout`: a name of LAYOUTS, or `auto`. Raises Drop with the cause."""
    name = recognise(record) if layout == "auto" else layout
    if name is None:
        raise Drop("unknown_layout")
    read = LAYOUTS[name][1]
    phrasings = list(instruction) or [INSTRUCTIONS.get(name, "")]
    try:
        if len(phrasings) == 1:
            return read(record, phrasings[0])
        # Drawn by the content, not by ids: duplicates stay duplicates. The same whatever the order of work.
        return read(record, phrasings[zlib.crc32(f"{seed} {read(record, '')}".encode()) % len(phrasings)])
    except (LookupError, TypeError, ValueError, AttributeError):
        raise Drop("bad_record") from None


def recognise(record: Any) -> str | None:
    """The layout of a record by the keys it has, or None."""
    if isinstance(record, str):
        return "text"
    if isinstance(record, list):
        if len(record) == 3 and isinstance(record[0], list) and isinstance(record[1], list):
            return "c3"
        if not record or not isinstance(record[0], dict):
            return None
        return "unified" if "inputs" in record[0] else "alpaca_turns" if "instruction" in record[0] else None
    if isinstance(record, dict):
        for name, (keys, _) in LAYOUTS.items():
            if keys and keys <= record.keys():
                return name
        if "round_1" in record:
            return "rounds"
    return None


def _clean(value: Any) -> str:
    """A string with LF line ends and no white space around it; null is an empty one."""
    if not isinstance(value, str | None):
        raise Drop("bad_record")
    return (value or "").replace("\r\n", "\n").replace("\r", "\n").strip()


def _string(record: Json, key: str) -> str:
    return _clean(record[key])


def _optional(record: Json, key: str) -> str:
    return _clean(record.get(key))


def _text(text: str) -> list[Example]:
    if not text:
        raise Drop("empty_text")
    return [Text(text)]


def _ask(question: str, answer: str) -> list[Example]:
    return _talk([("user", question), ("assistant", answer)])


def _talk(turns: list[tuple[str, str]]) -> list[Example]:
    """A dialogue, after checks: user and assistant in turn, ending in an answer that isn't empty."""
    if turns and turns[0] == ("system", ""):
        turns = turns[1:]
    body = turns[1:] if turns and turns[0][0] == "system" else turns
    while body and body[-1][0] == "user":  # a question nobody answered
        body = body[:-1]
        turns = turns[:-1]
    if not body:
        raise Drop("no_answer")
    if [role for role, _ in body] != ["user", "assistant"] * (len(body) // 2):
        raise Drop("roles_out_of_order")
    if any(not text for role, text in body if role == "assistant"):
        raise Drop("empty_answer")
    if any(not text for role, text in body if role == "user"):
        raise Drop("empty_question")
    return [Dialogue(tuple(turns))]


def _join(*parts: str) -> str:
    return "\n".join(part for part in parts if part)


def _plain(record: str, _: str) -> list[Example]:
    return _text(_clean(record))


def _wiki(r: Json, _: str) -> list[Example]:
    return _text(_string(r, "text"))


def _title_and(content: str) -> Callable[[Json, str], list[Example]]:
    def read(r: Json, _: str) -> list[Example]:
        title, body = _optional(r, "title"), _string(r, content)
        if not body:
            raise Drop("empty_text")
        return _text(f"{title}\n\n{body}" if title and not body.startswith(title) else body)

    return read


def _question(answer: str) -> Callable[[Json, str], list[Example]]:
    def read(r: Json, instruction: str) -> list[Example]:
        title, desc = _string(r, "title"), _optional(r, "desc")
        if not (title or desc):
            raise Drop("empty_question")
        return _ask(_join(instruction, title, desc if desc != title else ""), _string(r, answer))

    return read


def _translation(r: Json, instruction: str) -> list[Example]:
    english, chinese = _string(r, "english"), _string(r, "chinese")
    return [
        *_ask(_join(instruction.replace("{language}", "中文"), english), chinese),
        *_ask(_join(instruction.replace("{language}", "英文"), chinese), english),
    ]


def _exam(r: Json, _: str) -> list[Example]:
    question = [_optional(r, f"textbox_{key}") for key in ("q_instruction", "q_context", "question")]
    answer, analysis = _string(r, "textbox_answer"), _optional(r, "textbox_answer_analysis")
    return _ask(_join(*question), _join(answer, analysis) if answer else "")


def _alpaca(r: Json, _: str) -> list[Example]:
    turns: list[tuple[str, str]] = [("system", _optional(r, "system"))]
    for past in r.get("history") or []:
        if not isinstance(past, list):  # two letters would pass for a question and an answer
            raise Drop("bad_record")
        question, answer = past
        turns += [("user", _clean(question)), ("assistant", _clean(answer))]
    question = _join(_string(r, "instruction"), _optional(r, "input"))
    return _talk([*turns, ("user", question), ("assistant", _string(r, "output"))])


def _alpaca_turns(r: Sequence[Json], _: str) -> list[Example]:
    turns = []
    for turn in r:
        question = _join(_string(turn, "instruction"), _optional(turn, "input"))
        turns += [("user", question), ("assistant", _string(turn, "output"))]
    return _talk(turns)


def _translated(r: Json, _: str) -> list[Example]:
    return _ask(_join(_string(r, "trans_instruction"), _optional(r, "trans_input")), _string(r, "trans_output"))


def _unified(r: Json | Sequence[Json], _: str) -> list[Example]:
    turns = []
    for turn in [r] if isinstance(r, Mapping) else r:
        turns += [("user", _string(turn, "inputs")), ("assistant", _string(turn, "targets"))]
    return _talk(turns)


def _rounds(r: Json, _: str) -> list[Example]:
    turns = []
    for key in sorted((k for k in r if k.startswith("round_")), key=lambda k: int(k.removeprefix("round_"))):
        turns += [("user", _string(r[key], "prompt")), ("assistant", _string(r[key], "response"))]
    return _talk(turns)


ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
}


def _listed(key: str, role: str, content: str) -> Callable[[Json, str], list[Example]]:
    def read(r: Json, _: str) -> list[Example]:
        turns: list[tuple[str, str]] = []
        for turn in r[key]:
            if turn[role].lower() not in ROLES:
                raise Drop("unknown_role")
            turns.append((ROLES[turn[role].lower()], _string(turn, content)))
        return _talk(turns)

    return read


_MOSS_MARKS = re.compile(r"^\s*<\|(?:Human|MOSS)\|>\s*[:：]\s*|<eo[hm]>|<eo[a-z]>\s*$")


def _moss(r: Json, _: str) -> list[Example]:
    turns: list[tuple[str, str]] = []
    chat = r["chat"]
    for key in sorted(chat, key=lambda k: int(k.removeprefix("turn_"))):
        for role, name in (("user", "Human"), ("assistant", "MOSS")):
            turns.append((role, _MOSS_MARKS.sub("", _string(chat[key], name)).strip()))
    # meta_instruction is the same English preamble in every record; the model's name in it is not ours to teach.
    return _talk(turns)


def _choose(context: str, question: str, options: Sequence[str], gold: int) -> list[Example]:
    """A multiple-choice question, asked as `panda eval` asks it; the answer is the letter."""
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise Drop("bad_record")
    if not 2 <= len(options) <= 26 or not 0 <= gold < len(options):
        raise Drop("bad_record")
    return _ask(questions.text_of(context, question, options), questions.letter(gold))


def _c3(r: Sequence[Any], _: str) -> list[Example]:
    paragraphs, asked, _id = r
    if not asked:
        raise Drop("empty_question")
    context = "\n".join(map(_clean, paragraphs))
    return [
        example
        for q in asked
        for example in _choose(context, _string(q, "question"), q["choice"], q["choice"].index(q["answer"]))
    ]


def _logiqa(r: Json, _: str) -> list[Example]:
    return _choose(_string(r, "text"), _string(r, "question"), r["options"], int(r["answer"]))


# name -> (keys that tell it, reader). The first whose keys a record has is taken: the more telling ones stand first.
# Lists, strings and COIG's rounds have no keys of their own; `recognise` knows them.
LAYOUTS: dict[str, tuple[frozenset[str], Callable[[Any, str], list[Example]]]] = {
    "wiki": (frozenset({"id", "url", "title", "text"}), _wiki),
    "news": (frozenset({"news_id", "title", "content"}), _title_and("content")),
    "webtext": (frozenset({"qid", "title", "star", "content"}), _question("content")),
    "baike": (frozenset({"qid", "title", "answer"}), _question("answer")),
    "translation": (frozenset({"english", "chinese"}), _translation),
    "exam": (frozenset({"textbox_question", "textbox_answer"}), _exam),
    "translated": (frozenset({"trans_instruction", "trans_output"}), _translated),
    "alpaca": (frozenset({"instruction", "output"}), _alpaca),
    "unified": (frozenset({"inputs", "targets"}), _unified),  # COIG's unified form, and FLAN
    "moss": (frozenset({"chat"}), _moss),
    "sharegpt": (frozenset({"conversations"}), _listed("conversations", "from", "value")),
    "messages": (frozenset({"messages"}), _listed("messages", "role", "content")),
    "article": (frozenset({"title", "content"}), _title_and("content")),  # WuDao
    "logiqa": (frozenset({"text", "question", "options", "answer"}), _logiqa),
    "json_text": (frozenset({"text"}), _wiki),  # C4
    "alpaca_turns": (frozenset(), _alpaca_turns),
    "c3": (frozenset(), _c3),
    "rounds": (frozenset(), _rounds),
    "text": (frozenset(), _plain),
}
