"""The fields of a parsed record of each layout -> examples (Text | Dialogue). RECIPE section 2 has the corpora.

A reader raises Drop where a record can't be used. What it raises over a field that is missing or of a wrong type
(KeyError and the like) its caller counts as `bad_record`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pandallm.data import questions, talks
from pandallm.data.talks import Drop, Json, Reader, ask, before, clean, items_of, join, optional, string, talk
from pandallm.prompt import Example, Text

# The fixed instruction of each layout that carries none. A config's `instruction` replaces it.
INSTRUCTIONS = {
    "baike": "请回答下面的百科问题。",
    "webtext": "请回答下面网友提出的问题。",
    **dict.fromkeys(("translation", "en_zh", "opus", "pairs"), "请把下面的内容翻译成{language}。"),
    "cot": "Answer the question. Give your reasons first, then the answer.",
    "opencc": "请把下面的文字由{source}转换成{target}。",
    **dict.fromkeys(("squad", "squad_flat"), "请阅读下面的文章并回答问题，答案用文章里的原话。"),
}


def _text(text: str) -> list[Example]:
    if not text:
        raise Drop("empty_text")
    return [Text(text)]


# Raw texts


def _plain(record: str, _: str) -> list[Example]:
    return _text(clean(record))


def _field(key: str) -> Reader:
    return lambda r, _: _text(string(r, key))


def _title_and_content(r: Json, _: str) -> list[Example]:
    title, body = optional(r, "title"), string(r, "content")
    return _text(f"{title}\n\n{body}" if title and body and not body.startswith(title) else body)


def _poem(r: Json, _: str) -> list[Example]:
    lines = "\n".join(filter(None, map(clean, items_of(r["paragraphs"]))))
    title = optional(r, "title") or optional(r, "rhythmic")  # of a ci: the tune it is written to
    return _text(f"{join(title, optional(r, 'author'))}\n\n{lines}".strip() if lines else "")


# Questions and instructions


def _question(answer: str) -> Reader:
    def read(r: Json, instruction: str) -> list[Example]:
        title, desc = string(r, "title"), optional(r, "desc")
        if not (title or desc):
            raise Drop("empty_question")
        return ask(join(instruction, title, desc if desc != title else ""), string(r, answer))

    return read


def _exam(r: Json, _: str) -> list[Example]:
    question = [optional(r, f"textbox_{key}") for key in ("q_instruction", "q_context", "question")]
    answer, analysis = string(r, "textbox_answer"), optional(r, "textbox_answer_analysis")
    return ask(join(*question), join(answer, analysis) if answer else "")


def _alpaca(r: Json, _: str) -> list[Example]:
    question = join(string(r, "instruction"), optional(r, "input"))
    return talk([*before(r), ("user", question), ("assistant", string(r, "output"))])


def _alpaca_turns(r: Sequence[Json], _: str) -> list[Example]:
    turns = []
    for turn in r:
        question = join(string(turn, "instruction"), optional(turn, "input"))
        turns += [("user", question), ("assistant", string(turn, "output"))]
    return talk(turns)


def _prefixed(prefix: str) -> Reader:
    """Alpaca's three fields under names with a prefix."""

    def read(r: Json, _: str) -> list[Example]:
        question = join(string(r, f"{prefix}_instruction"), optional(r, f"{prefix}_input"))
        return ask(question, string(r, f"{prefix}_output"))

    return read


def _seed_task(r: Json, _: str) -> list[Example]:
    instruction, instances = string(r, "instruction"), items_of(r["instances"])
    if not instances:
        raise Drop("no_answer")
    return [
        example
        for each in instances
        for example in ask(join(instruction, optional(each, "input")), string(each, "output"))
    ]


def _pair(ask: str, answer: str) -> Reader:
    """A question and its answer under these keys; what the question is about may stand beside it."""
    about = [key for key in ("input", "context") if key != ask]

    def read(r: Json, _: str) -> list[Example]:
        question = join(string(r, ask), *(optional(r, key) for key in about))
        return talk([*before(r), ("user", question), ("assistant", string(r, answer))])

    return read


# name -> keys of the question and the answer
PAIRS = {
    "belle_eval": ("question", "std_answer"),
    "question_answer": ("question", "answer"),
    "prompt_response": ("prompt", "response"),
    "prompt_completion": ("prompt", "completion"),
    "query_response": ("query", "response"),
    "instruction_response": ("instruction", "response"),
    "input_target": ("input", "target"),  # Firefly's training set
    "wen_da": ("问", "答"),
}


def _first(answers: Any) -> str:
    """The first of the answers to a question about a text; empty where it has none."""
    if isinstance(answers, Mapping):  # {"text": [...], "answer_start": [...]}
        answers = answers["text"]
    if not items_of(answers):
        return ""
    return string(answers[0], "text") if isinstance(answers[0], Mapping) else clean(answers[0])


def _about(instruction: str, context: str, question: str) -> str:
    if not (context and question):
        raise Drop("empty_question")
    return join(instruction, context, question)


def _squad(r: Json, instruction: str) -> list[Example]:
    """An article of a SQuAD file, or the whole of a small one: a dialogue a paragraph, read once and asked about until
    its questions are through. A reading test is a question corpus, so the answers are what is trained. Questions that
    the text doesn't answer (SQuAD 2) are left out."""
    examples = []
    for article in items_of(r["data"]) if "data" in r else [r]:
        for paragraph in items_of(article["paragraphs"]):
            turns = []
            for asked in items_of(paragraph["qas"]):
                if answer := _first(asked["answers"]):
                    turns += [("user", string(asked, "question")), ("assistant", answer)]
            if turns:
                turns[0] = ("user", _about(instruction, string(paragraph, "context"), turns[0][1]))
                examples += talk(turns)
    if not examples:
        raise Drop("no_answer")
    return examples


def _squad_flat(r: Json, instruction: str) -> list[Example]:
    question, answer = string(r, "question"), _first(r["answers"])
    if not answer:
        raise Drop("no_answer")
    return ask(_about(instruction, string(r, "context"), question), answer)


def _choose(context: str, question: str, options: Sequence[str], gold: int) -> list[Example]:
    """A multiple-choice question, asked as `panda eval` asks it; the answer is the letter."""
    if not all(isinstance(option, str) for option in items_of(options)):
        raise Drop("bad_record")
    if not 2 <= len(options) <= 26 or not 0 <= gold < len(options):
        raise Drop("bad_record")
    return ask(questions.text_of(context, question, options), questions.letter(gold))


def _c3(r: Sequence[Any], _: str) -> list[Example]:
    paragraphs, asked, _id = r
    if not asked:
        raise Drop("empty_question")
    context = "\n".join(map(clean, paragraphs))
    return [
        example
        for q in asked
        for example in _choose(context, string(q, "question"), q["choice"], q["choice"].index(q["answer"]))
    ]


def _logiqa(r: Json, _: str) -> list[Example]:
    return _choose(string(r, "text"), string(r, "question"), r["options"], int(r["answer"]))


def _input_output(r: Json, _: str) -> list[Example]:
    """One question and answer, or (Chinese-Vicuna) the list of each side's turns."""
    if isinstance(r["input"], str):
        return ask(string(r, "input"), string(r, "output"))
    turns = []
    for question, answer in zip(items_of(r["input"]), items_of(r["output"]), strict=True):
        turns += [("user", clean(question)), ("assistant", clean(answer))]
    return talk(turns)


def _unified(r: Json | Sequence[Json], _: str) -> list[Example]:
    turns = []
    for turn in [r] if isinstance(r, Mapping) else r:
        turns += [("user", string(turn, "inputs")), ("assistant", string(turn, "targets"))]
    return talk(turns)


# Translation and script


def _both_ways(instruction: str, english: str, chinese: str) -> list[Example]:
    return [
        *ask(join(instruction.replace("{language}", "中文"), english), chinese),
        *ask(join(instruction.replace("{language}", "英文"), chinese), english),
    ]


def _translation(english: str, chinese: str, inside: str = "") -> Reader:
    def read(r: Json, instruction: str) -> list[Example]:
        pair = r[inside] if inside else r
        return _both_ways(instruction, string(pair, english), string(pair, chinese))

    return read


HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_LATIN = re.compile("[A-Za-z]")


def _han_share(text: str) -> float:
    """Chinese characters among the letters of a text."""
    han = len(HAN.findall(text))
    return han / (han + len(_LATIN.findall(text)) or 1)


def _pairs(r: Sequence[Any], instruction: str) -> list[Example]:
    """Cells of a table: two languages in either order, and perhaps where they are from, which isn't taught."""
    first, second = (clean(cell) for cell in items_of(r)[:2])
    low, high = sorted((_han_share(first), _han_share(second)))
    if not (first and second):
        raise Drop("empty_answer")
    if low > 0.5 or low == high:  # both Chinese, or neither
        raise Drop("same_language")
    if _han_share(first) > _han_share(second):
        first, second = second, first
    return _both_ways(instruction, first, second)


def _cot(r: Sequence[Any], instruction: str) -> list[Example]:
    """Cells of FLAN's chain-of-thought tables, where \\n stands for a line break. The reasons lead to the answer."""
    question, answer, reasons = (clean(cell).replace("\\n", "\n") for cell in items_of(r))
    return ask(join(instruction, question) if question else "", answer and join(reasons, f"The answer is {answer}"))


# The two ends of an OpenCC configuration such as s2twp; a p (phrases) turns words, too, into those of the place.
SCRIPTS = {
    "s": "简体中文",
    "sp": "简体中文（用大陆的词语）",
    "t": "繁体中文",
    "tw": "台湾正体",
    "twp": "台湾正体（用台湾的词语）",
    "hk": "香港繁体",
    "hkp": "香港繁体（用香港的词语）",
    "jp": "日文新字体",
}


def _opencc(r: Json, instruction: str) -> list[Example]:
    examples = []
    for name, converted in r["expected"].items():
        source, target = (SCRIPTS[end] for end in name.split("2"))
        asked = instruction.replace("{source}", source).replace("{target}", target)
        examples += ask(join(asked, string(r, "input")), clean(converted))
    if not examples:
        raise Drop("no_answer")
    return examples


# name -> (keys that tell it, reader). The first whose keys a record has is taken: the more telling ones stand first.
# Those without keys are strings and lists, and COIG's rounds; `sources.recognise` knows them.
LAYOUTS: dict[str, tuple[frozenset[str], Reader]] = {
    "wiki": (frozenset({"id", "url", "title", "text"}), _field("text")),
    "news": (frozenset({"news_id", "title", "content"}), _title_and_content),
    "webtext": (frozenset({"qid", "title", "star", "content"}), _question("content")),
    "baike": (frozenset({"qid", "title", "answer"}), _question("answer")),
    "translation": (frozenset({"english", "chinese"}), _translation("english", "chinese")),
    "exam": (frozenset({"textbox_question", "textbox_answer"}), _exam),
    "translated": (frozenset({"trans_instruction", "trans_output"}), _prefixed("trans")),
    "bilingual": (frozenset({"zh_instruction", "zh_output"}), _prefixed("zh")),
    "bilingual_en": (frozenset({"en_instruction", "en_output"}), _prefixed("en")),  # by name, where it has both
    "alpaca": (frozenset({"instruction", "output"}), _alpaca),
    "seed_tasks": (frozenset({"instruction", "instances"}), _seed_task),
    "unified": (frozenset({"inputs", "targets"}), _unified),  # COIG's unified form, and FLAN
    "moss": (frozenset({"chat"}), talks.moss),
    "preference": (frozenset({"chosen"}), talks.chosen_of),
    "sharegpt": (frozenset({"conversations"}), talks.listed("conversations")),
    "messages": (frozenset({"messages"}), talks.listed("messages")),
    "conversation": (frozenset({"conversation"}), talks.listed("conversation")),  # Firefly
    "poem": (frozenset({"author", "paragraphs"}), _poem),
    "squad": (frozenset({"paragraphs"}), _squad),
    "squad_flat": (frozenset({"context", "question", "answers"}), _squad_flat),
    "logiqa": (frozenset({"text", "question", "options", "answer"}), _logiqa),
    "opencc": (frozenset({"input", "expected"}), _opencc),
    "en_zh": (frozenset({"en", "zh"}), _translation("en", "zh")),
    "opus": (frozenset({"translation"}), _translation("en", "zh", inside="translation")),
    **{name: (frozenset(keys), _pair(*keys)) for name, keys in PAIRS.items()},
    "input_output": (frozenset({"input", "output"}), _input_output),  # Chinese-Vicuna
    "article": (frozenset({"title", "content"}), _title_and_content),  # WuDao
    "json_text": (frozenset({"text"}), _field("text")),  # C4
    "content": (frozenset({"content"}), _field("content")),
    "marked": (frozenset({"plain_text"}), talks.marked),
    "alpaca_turns": (frozenset(), _alpaca_turns),
    "c3": (frozenset(), _c3),
    "rounds": (frozenset(), talks.rounds),
    "pairs": (frozenset(), _pairs),
    "cot": (frozenset(), _cot),
    "text": (frozenset(), _plain),
    "lines": (frozenset(), _plain),  # a text file cut into lines or paragraphs by read.py
    "paragraphs": (frozenset(), _plain),
}
