"""Multiple-choice questions as a model reads them: the same text in training and in evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """A way to ask: opening, answered examples, then context and rest of the question, and the lead to its answer.

    What comes before a context is the same for all questions on it, so that their common beginning is long.
    """

    reading: str  # opens a question on a text
    knowledge: str  # opens a question without one
    context: str
    question: str
    listing: str  # of the options; left out where their texts are the answers
    lead: str
    option: str = "{letter}: {option}"
    example: str = ""  # how an answered example ends, where not with the lead and the letter
    unlisted: tuple[str, str] | None = None  # `reading` and `knowledge` where no options are listed, if others

    @property
    def template(self) -> str:
        """The whole text of a question on a text, with {context}, {question} and {options} in their places."""
        return self.reading + self.context + self.question + self.listing + self.lead


WORDINGS: dict[str, Wording] = {
    # Instruction, headings and lead are the original's (RECIPE section 5). It asked no question without a text: there
    # its own words without the text.
    "original": Wording(
        "阅读下面的文章并从选项中选择的答案回答问题：\n\n",
        "从选项中选择的答案回答问题：\n\n",
        "Context:\n{context}\n\n",
        "Question:\n{question}\n\n",
        "Options:\n{options}\n\n",
        "本题的答案是：",
        example="The answer is {letter}",
        unlisted=("阅读下面的文章并回答问题：\n\n", "回答问题：\n\n"),
    ),
    "zh-headings": Wording(
        "阅读下面的文章并从选项中选择的答案回答问题：\n\n",
        "从选项中选择的答案回答问题：\n\n",
        "文章：\n{context}\n\n",
        "问题：\n{question}\n\n",
        "选项：\n{options}\n\n",
        "本题的答案是：",
        unlisted=("阅读下面的文章并回答问题：\n\n", "回答问题：\n\n"),
    ),
    "zh-direct": Wording(
        "请阅读短文，回答后面的单项选择题，只写出正确选项的字母。\n\n",
        "请回答下面的单项选择题，只写出正确选项的字母。\n\n",
        "短文：{context}\n\n",
        "题目：{question}\n",
        "{options}\n",
        "答案：",
        "{letter}. {option}",
        unlisted=("请阅读短文，回答后面的问题。\n\n", "请回答下面的问题。\n\n"),
    ),
    "zh-exam": Wording(
        "以下是一道阅读理解单项选择题，请根据材料选出正确答案。\n\n",
        "以下是一道单项选择题，请选出正确答案。\n\n",
        "【材料】\n{context}\n\n",
        "【题目】\n{question}\n\n",
        "【选项】\n{options}\n\n",
        "【答案】",
        "{letter}．{option}",
        unlisted=("以下是一道阅读理解题，请根据材料作答。\n\n", "以下是一道题，请作答。\n\n"),
    ),
    "zh-person": Wording(
        "你是一位认真的考生。读完下面的文字，从可选的答案里选出最合适的一个。\n\n",
        "你是一位认真的考生。读完题目，从可选的答案里选出最合适的一个。\n\n",
        "文字：\n{context}\n\n",
        "提问：{question}\n\n",
        "可选的答案：\n{options}\n\n",
        "我选择的答案是",
        "{letter}、{option}",
        unlisted=("你是一位认真的考生。读完下面的文字，回答提问。\n\n", "你是一位认真的考生。读完题目，回答提问。\n\n"),
    ),
    "zh-bare": Wording("", "", "{context}\n\n", "{question}\n", "{options}\n", "答案是", "{letter}. {option}"),
    "hant-read": Wording(
        "請閱讀下面的文章，並從選項中選出問題的正確答案：\n\n",
        "請從選項中選出問題的正確答案：\n\n",
        "文章：\n{context}\n\n",
        "問題：\n{question}\n\n",
        "選項：\n{options}\n\n",
        "本題的答案是：",
        unlisted=("請閱讀下面的文章，並回答問題：\n\n", "請回答問題：\n\n"),
    ),
    "hant-exam": Wording(
        "以下是單項選擇題，請依據短文作答，只須寫出選項的字母。\n\n",
        "以下是單項選擇題，只須寫出正確選項的字母。\n\n",
        "短文：{context}\n\n",
        "題目：{question}\n",
        "{options}\n",
        "正確答案：",
        "({letter}) {option}",
        unlisted=("請依據短文作答。\n\n", "請作答。\n\n"),
    ),
    "en-read": Wording(
        "Read the text and answer the question with the letter of the right option.\n\n",
        "Answer the question with the letter of the right option.\n\n",
        "Text:\n{context}\n\n",
        "Question:\n{question}\n\n",
        "Options:\n{options}\n\n",
        "Answer:",
        example="Answer: {letter}",
        unlisted=("Read the text and answer the question.\n\n", "Answer the question.\n\n"),
    ),
    "en-exam": Wording(
        "The following is a multiple choice question about a passage. Choose the best option.\n\n",
        "The following is a multiple choice question. Choose the best option.\n\n",
        "Passage: {context}\n\n",
        "Question: {question}\n",
        "{options}\n",
        "The correct option is",
        "{letter}. {option}",
        "The correct option is {letter}",
        unlisted=("The following is a question about a passage.\n\n", "The following is a question.\n\n"),
    ),
}


def letter(index: int) -> str:
    """The letter of an option: A, B, … in their order."""
    return chr(ord("A") + index)


def text_of(
    context: str,
    question: str,
    options: Sequence[str],
    wording: str = "original",
    examples: Sequence[str] = (),
    on_text: bool | None = None,
) -> str:
    """The text that asks a question, ending where the answer begins. Without options they aren't listed.

    `wording`: a key of WORDINGS. `examples`: texts of `example_of`. `on_text`: whether the question is on a text; if
    not given, whether there is one (a text may have been cut off to the last character).
    """
    words = WORDINGS[wording]
    on_text = bool(context) if on_text is None else on_text
    openings = (words.reading, words.knowledge)
    opening = (words.unlisted if words.unlisted and not options else openings)[0 if on_text else 1]
    return opening + "".join(examples) + _body(words, context, question, options, on_text) + words.lead


def example_of(
    context: str, question: str, options: Sequence[str], gold: int, wording: str = "original", listing: bool = True
) -> str:
    """A question with its answer, to stand before others: the letter, or without a `listing` the option itself."""
    words = WORDINGS[wording]
    answer = (words.example or words.lead + "{letter}").format(letter=letter(gold))
    if not listing:
        answer = words.lead + options[gold]
    return _body(words, context, question, options if listing else (), bool(context)) + answer + "\n\n"


def _body(words: Wording, context: str, question: str, options: Sequence[str], on_text: bool) -> str:
    listed = "\n".join(words.option.format(letter=letter(i), option=option) for i, option in enumerate(options))
    above = words.context.format(context=context) if on_text else ""
    below = words.listing.format(options=listed) if options else ""
    return above + words.question.format(question=question) + below
