"""Cleaning: repairs that change an example, filters that drop it. Each has its switch and is counted by its name.

A repair leaves alone what it isn't sure of, and whatever stands in a ``` fence. Repairs are made until none finds
anything more, so cleaning again changes nothing. Clean text costs little: a repair first looks if there is work for it.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, model_validator

from pandallm.config import Config
from pandallm.data.script import Script, converter
from pandallm.data.sources import Drop
from pandallm.prompt import Dialogue, Example, Text

Step = Callable[[str], str]
_LIGHT = {"unicode": True, "html": True, "brackets": True, "blanks": True, "repeated_lines": True}
_WEB = {"min_chars": 10, "max_replacement": 0.02, "max_symbols": 0.6, "max_repetition": 0.6}
PRESETS: dict[str, dict[str, Any]] = {"off": {}, "light": _LIGHT, "web": _LIGHT | _WEB}


class Clean(Config):
    """What is cleaned. A preset sets the switches that aren't given: light the repairs, web the filters too."""

    preset: Literal["off", "light", "web"] = "off"
    script: Script = "keep"
    unicode: bool = False  # NFC, control and invisible characters, full-width letters and digits, odd blanks
    html: bool = False  # &lt; &nbsp; <br> <p>
    brackets: bool = False  # raw texts: the wiki extractor's empty （）, （，…） and 「」
    blanks: bool = False  # 中 国 人, blanks at a line's end, indents of U+3000, more than one empty line
    repeated_lines: bool = False  # raw texts: the same line three times or more in a row
    mask_phones: bool = False  # -> [电话]
    mask_ids: bool = False  # mainland identity numbers -> [身份证号]
    mask_emails: bool = False  # -> [邮箱]
    min_chars: int = Field(default=0, ge=0)  # raw texts: shorter ones are dropped
    max_chars: int | None = Field(default=None, ge=1)  # a dialogue counts as a whole
    max_replacement: float = Field(default=1, ge=0, le=1)  # share of U+FFFD and private use; two are borne
    max_symbols: float = Field(default=1, ge=0, le=1)  # raw texts: share of punctuation, signs, drawings, emoji
    max_repetition: float = Field(default=1, ge=0, le=1)  # share of a text, or of a turn, that repeats itself
    min_han: float = Field(default=0, ge=0, le=1)  # share of Chinese letters; a dialogue counts as a whole

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("preset") is False:  # YAML's reading of `off`
            data = data | {"preset": "off"}
        return PRESETS.get(str(data.get("preset")), {}) | data

    @model_validator(mode="after")
    def _bounds_leave_room(self) -> Clean:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(f"max_chars {self.max_chars} is below min_chars {self.min_chars}: nothing would be left")
        return self


class Cleaner:
    """Cleans examples as a `Clean` says. UserError if the script can't be converted here."""

    def __init__(self, conf: Clean) -> None:
        self.conf = conf
        repairs: list[tuple[bool, bool, str, Step]] = [  # switched on, in dialogues too, counted as, made by
            (conf.unicode, True, "unicode_mended", mend_unicode),
            (conf.blanks, True, "blanks_removed", remove_blanks),
            # In a dialogue an empty （） is a blank to fill in, and lines repeat because somebody asked for it.
            (conf.brackets, False, "brackets_removed", remove_brackets),
            (conf.repeated_lines, False, "repeated_lines_removed", remove_repeated_lines),
        ]
        masks: list[tuple[bool, str, Step]] = [
            (conf.mask_emails, "emails_masked", mask_emails),
            (conf.mask_ids, "ids_masked", mask_ids),
            (conf.mask_phones, "phones_masked", mask_phones),
        ]
        self._text_steps = [(note, step) for on, _, note, step in repairs if on]
        self._turn_steps = [(note, step) for on, talks, note, step in repairs if on and talks]
        self._masks = [(note, step) for on, note, step in masks if on]
        self._convert = None if conf.script == "keep" else converter(conf.script)

    def __call__(self, example: Example, notes: Counter[str]) -> Example:
        """The example repaired; `notes` counts, once an example, each repair that changed it. Raises Drop."""
        raw = isinstance(example, Text)
        texts = [example.text] if isinstance(example, Text) else [text for _, text in example.messages]
        changed: set[str] = set()
        texts = self._repair(texts, self._text_steps if raw else self._turn_steps, changed)
        if self._convert:
            texts = _each(texts, self._convert, "script_converted", changed)
        for note, mask in self._masks:
            texts = _each(texts, mask, note, changed, fences=True)
        if changed:
            example = _rebuilt(example, texts)
        self._check(texts, raw)
        notes.update(changed)
        return example

    def _repair(self, texts: list[str], steps: list[tuple[str, Step]], changed: set[str]) -> list[str]:
        for _ in range(MAX_PASSES):
            before = texts
            if self.conf.html and any(("<" in text or "&" in text) and _HTML.search(text) for text in texts):
                texts = _each(texts, html_repair(texts), "html_removed", changed)
            for note, step in steps:
                texts = _each(texts, step, note, changed)
            if texts is before:
                break
            texts = [text.strip(" \t\n") for text in texts]  # what a repair has laid open
        return texts

    def _check(self, texts: list[str], raw: bool) -> None:
        """Raises Drop if a filter finds something."""
        conf = self.conf
        size = sum(map(len, texts))
        if raw and size < conf.min_chars:
            raise Drop("too_short")
        if conf.max_chars is not None and size > conf.max_chars:
            raise Drop("too_long_text")
        lost = sum(len(_LOST.findall(text)) for text in texts) if conf.max_replacement < 1 else 0
        if lost > max(2, conf.max_replacement * size):
            raise Drop("replacement_chars")
        if raw and conf.max_symbols < 1 and symbol_share(texts[0]) > conf.max_symbols:
            raise Drop("symbols")
        # Turn by turn: that an answer repeats the question's text, as in proof-reading, is no fault.
        if conf.max_repetition < 1 and any(repetition(text) > conf.max_repetition for text in texts):
            raise Drop("repetitive")
        if conf.min_han > 0 and han_share("\n".join(texts)) < conf.min_han:
            raise Drop("little_chinese")


MAX_PASSES = 10  # two are usual: one that repairs, one that finds nothing more
_FENCE = re.compile(r"(```.*?(?:```|\Z))", re.DOTALL)


def _each(texts: list[str], step: Step, note: str, changed: set[str], fences: bool = False) -> list[str]:
    """`texts` after `step`, in fenced code or not; the very same list where nothing changed."""
    done = [step(text) if fences or "```" not in text else _outside_fences(text, step) for text in texts]
    if done == texts:
        return texts
    changed.add(note)
    return done


def _outside_fences(text: str, step: Step) -> str:
    return "".join(part if part.startswith("```") else step(part) for part in _FENCE.split(text))


def _rebuilt(example: Example, texts: list[str]) -> Example:
    """The example with these texts. Raises Drop, under the readers' causes, where one is empty now."""
    if isinstance(example, Text):
        if not texts[0]:
            raise Drop("empty_text")
        return Text(texts[0])
    turns = [(role, text) for (role, _), text in zip(example.messages, texts, strict=True) if text or role != "system"]
    for role, text in turns:
        if not text:
            raise Drop("empty_answer" if role == "assistant" else "empty_question")
    return Dialogue(tuple(turns))


HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"

# Private-use characters stay: each stands for something lost, and taking it out would hide that.
_ODD = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\xa0\xad\u0300-\u036f\u061c\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f\u2e80-\u2fdf"
    "\ufb00-\ufb06\ufeff０-９Ａ-Ｚａ-ｚ\ufff9-\ufffc\ufffe\uffff]"
)  # one character: a search for `[…]+` takes three times as long
_FULL_WIDTH_POINT = re.compile("．(?<=[０-９]．)(?=[０-９])")
# Joiners belong to emoji, Arabic and Indic scripts; after Latin, punctuation or Chinese they are refuse.
_JOINERS = re.compile("[\u200c\u200d](?<![^\x00-\u058f\u2000-\u206f\u2e80-\ua4cf\uff00-\uffef].)")
_STACKED = re.compile("[\u0300-\u036f]{5,}")  # accents on one letter: more than any script needs
# JSON readers make \bar and \frac of LaTeX, written with one backslash, into control characters.
_LATEX = ((re.compile("\x08(?=[a-z])"), r"\\b"), (re.compile(r"\x0c(?=rac\{)"), r"\\f"))
_WIDE_BLANK = re.compile("\u3000(?<=[A-Za-z0-9.,;:!?].)(?=[A-Za-z0-9])")
# The radicals that PDF files put for characters. Unicode's decompositions know the Kangxi block, not these.
_RADICALS = "⻁虎⻄西⻅见⻆角⻉贝⻋车⻓长⻔门⻘青⻙韦⻚页⻛风⻜飞⻝食⻢马⻣骨⻤鬼⻥鱼⻦鸟⻨麦⻩黄⻬齐⻮齿⻰龙⻳龟"


def _table() -> dict[int, str | None]:
    table: dict[int, str | None] = dict.fromkeys([*range(9), *range(14, 32), 0x7F])
    for code in range(0x80, 0xA0):  # Windows-1252 read as Latin-1
        table[code] = bytes([code]).decode("cp1252", "ignore") or None
    invisible = (0xAD, 0x61C, 0x180E, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x2070))
    table |= dict.fromkeys([*invisible, 0xFEFF, *range(0xFFF9, 0xFFFD), 0xFFFE, 0xFFFF])
    table |= dict.fromkeys([0xB, 0xC, 0xD, 0x2028, 0x2029], "\n")
    table |= dict.fromkeys([0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F], " ")
    wide = (*range(0xFF10, 0xFF1A), *range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B))
    for code in (*range(0x2F00, 0x2FD6), *range(0xFB00, 0xFB07), *wide):  # radicals, ligatures
        table[code] = unicodedata.normalize("NFKC", chr(code))
    table |= {ord(a): b for a, b in zip(_RADICALS[::2], _RADICALS[1::2], strict=True)}
    return table


_TABLE = _table()


def mend_unicode(text: str) -> str:
    """NFC; no control or invisible characters; half-width Latin letters and digits. Chinese punctuation and U+3000, an
    exam paper's blank, stay."""
    if _ODD.search(text):
        text = text.replace("\r\n", "\n")
        for pattern, put in _LATEX:
            text = pattern.sub(put, text)
        text = _FULL_WIDTH_POINT.sub(".", _JOINERS.sub("", _STACKED.sub("", text)))
        text = _ODD.sub(lambda odd: odd.group().translate(_TABLE), text)  # text.translate takes ten times as long
    text = unicodedata.normalize("NFC", text)
    return _WIDE_BLANK.sub(" ", text) if "\u3000" in text else text


# HTML. Left alone: what code needs, and what a text about HTML speaks of.
_NAMES = "lt|gt|amp|quot|apos|nbsp|[lr][ds]quo|[mn]dash|hellip|middot|e[mn]sp"  # no &sum; &num;: in C these are code
_ENTITY = re.compile(rf"&(?:amp;|#38;)*(#[0-9]{{2,6}}|#[xX][0-9a-fA-F]{{2,5}}|{_NAMES});")
_HTML = re.compile(r"&(?:#|[a-z]{2,6};)|</?(?i:br|p)[ />]")  # whether there may be anything
_BREAK = re.compile(r"(?<![ \t])[ \t]*<(?i:br) ?/?>[ \t]*")
_PARAGRAPH = re.compile(r"(?<![ \t])[ \t]*(?:(?:</?(?i:p)>|<(?i:p) [^<>\n]*>)[ \t]*)+")
_OTHER_TAG = re.compile(r"</?(?!(?i:br|p)\b)[A-Za-z][A-Za-z0-9]*(?:\s[^<>]*|/)?>|<!")
# Not IGNORECASE, which takes twenty times as long.
_ON_ENTITIES = re.compile("转义|轉義|字符实体|字元實體|HTML实体|HTML 实体|HTML entit|html entit|escape (?:char|seq)")
_ON_HTML = re.compile("HTML|Html|html|XML|xml|标签|標籤|标记|標記|网页|網頁| tag|Tag|Markdown|markdown")


def html_repair(texts: list[str]) -> Step:
    """The repair of HTML left-overs that suits an example with these texts: a question about HTML spares its answer."""
    whole = "\n".join(texts)
    tags, on_html = _OTHER_TAG.search(whole), _ON_HTML.search(whole)
    entities = not (tags or _ON_ENTITIES.search(whole) or (on_html and "<" in whole))
    breaks = not (tags or on_html)

    def repair(text: str) -> str:
        done = _ENTITY.sub(_character, text) if entities and "&" in text else text
        if done == text and breaks and "<" in text:  # not at once: the entities may spell code
            paragraphs = "</p>" in text.lower()
            return "\n".join(_broken(line, paragraphs) for line in text.split("\n"))
        return done

    return repair


def _character(entity: re.Match[str]) -> str:
    text, whole = entity.string, entity.group()
    before, after = text[entity.start() - 1 : entity.start()], text[entity.end() : entity.end() + 1]
    if before and after and before in "`'\"“‘「" and after in "`'\"”’」":  # the entity itself is spoken of
        return whole
    char = html.unescape(f"&{entity.group(1)};")
    return {"\xa0": " ", "\ufffd": whole}.get(char, char)  # half an emoji has no character of its own


def _broken(line: str, paragraphs: bool) -> str:
    if "<" not in line or "|" in line:  # a table's cell holds <br> because it can't hold a line's end
        return line
    line = _BREAK.sub("\n", line)
    return (_PARAGRAPH.sub("\n\n", line) if paragraphs else line).strip("\n")


# Brackets that held what the wiki extractor doesn't know: other scripts, pronunciations. Patterns open with a literal,
# which is found ten times faster than what stands before it is tried at every character; hence the lookbehinds.
def _bracket(opening: str, rest: str) -> list[re.Pattern[str]]:
    after = rf"(?<=[{HAN}A-Za-z0-9」』》”·]OPEN)(?<![是为為有于於的在了到对對成填号號法]OPEN)(?<!函数OPEN)"
    return [re.compile((f"OPEN{after}{rest}").replace("OPEN", blank + opening)) for blank in ("", " ")]


_PAUSES = "[，、；：,; ]{0,9}[，、；：,;][，、；：,; ]{0,9}"
_EMPTY = [
    *_bracket("（", rf"(?:{_PAUSES}）|）(?![中内內里裡函方？?：:．.\s]|\Z|。?(?:\s|\Z|[A-F①])))"),
    *_bracket("[(]", r"(?<![A-Za-z0-9]OPEN)\)(?=[\u3001-\u9fff，；（])"),
]
_LEADING = re.compile(rf"（{_PAUSES}(?=[{HAN}A-Za-z0-9「《“])")
_NO_QUOTE = re.compile(rf"「(?<=[{HAN}，]「)(?<![号號]「)」(?=[{HAN}（，])")


def remove_brackets(text: str) -> str:
    """圆周率（，）是 -> 圆周率是; 高德纳（，1938年－） -> 高德纳（1938年－）. Blanks to fill in stay: 正确的是（）。"""
    if "（" in text or "()" in text:
        for pattern in _EMPTY:
            text = pattern.sub("", text)
        text = _LEADING.sub("（", text)
    return _NO_QUOTE.sub("", text) if "「」" in text else text


_SPACED_HINT = re.compile(rf" [{HAN}] [{HAN}，。、；：？！（）]")  # opens with a blank: fast where there are few
_SPACED = re.compile(rf"(?<![{HAN}])[{HAN}](?: [{HAN}，。、；：？！（）]){{2,}}(?![{HAN}])")
_INDENT = re.compile(r"^\u3000{1,2}(?=[^\s])", re.MULTILINE)
_MANY_LINES = re.compile(r"\n\n\n+")
# A run of only these is a list or a table's row, not a word torn apart.
_LISTED = frozenset(
    "甲乙丙丁戊己庚辛壬癸子丑寅卯辰巳午未申酉戌亥一二三四五六七八九十〇零百千万东南西北春夏秋冬金木水火土"
    "红橙黄绿青蓝紫黑白灰大中小高低多少强弱长短上下左右前后有无是否对错男女老幼唐宋元明清秦汉隋周日月年星"
    "宫商角徵羽酸甜苦辣咸琴棋书画梅兰竹菊东南西北東紅黃綠藍強長後無對錯漢宮書畫蘭優良差优赵钱孙李趙錢孫"
)


def remove_blanks(text: str) -> str:
    """中 国 人 -> 中国人 (three or more single characters); no blanks at a line's end; one empty line at most."""
    if _SPACED_HINT.search(text):
        text = _SPACED.sub(_joined, text)
    if " \n" in text or "\t\n" in text:
        text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    if "\u3000" in text:
        text = _INDENT.sub("", text)
    return _MANY_LINES.sub("\n\n", text) if "\n\n\n" in text else text


def _joined(run: re.Match[str]) -> str:
    joined = run.group().replace(" ", "")
    han = {char for char in joined if char not in "，。、；：？！（）"}
    return run.group() if len(han) < 3 or _LISTED.issuperset(han) else joined


# Shorter lines (an answer's letter) and those of code and tables repeat with reason.
_REPEATED = re.compile(r"^(?=.*\w)([^\n<>|{};=\\]{8,})(?:\n+\1(?=\n|\Z)){2,}", re.MULTILINE)


def remove_repeated_lines(text: str) -> str:
    """The same line, three times or more in a row, stands once; empty lines between don't count."""
    lines = [line for line in text.split("\n") if line]
    alike = any(a == b for a, b in zip(lines, lines[2:], strict=False))
    return _REPEATED.sub(r"\1", text) if alike else text


# Masks. Numbers are told by their form; what may be an amount or part of a longer number stays.
_EMAIL = re.compile(r"(?<![A-Za-z0-9._%+-])(?!git@)[A-Za-z0-9][A-Za-z0-9._%+-]*@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,}")
_ID = re.compile(r"(?<![0-9A-Za-z])[1-9][0-9]{5}(?:19|20)[0-9]{2}[01][0-9][0-3][0-9]{4}[0-9Xx](?![0-9A-Za-z])")
_NUMBER = re.compile(r"[0-9+][0-9 ()（）-]{7}")
_PHONE = re.compile(
    r"(?<![0-9A-Za-z+.,=/_-])(?:"
    r"(?:(?:\+|00)86[- ]?)?1[3-9][0-9](?:[- ]?[0-9]{4}){2}"  # mainland mobile
    r"|(?:\+|00)86[- ]?(?:10|2[0-9]|[3-9][0-9]{2})[- ]?[0-9]{3,4}[- ]?[0-9]{4}"  # mainland landline from abroad
    r"|(?:0(?:10|2[0-9]|[3-9][0-9]{2})[- ]|[(（]0(?:10|2[0-9]|[3-9][0-9]{2})[)）][- ]?)[0-9]{3,4}[- ]?[0-9]{4}"
    r"(?:[-转轉][0-9]{1,5})?"  # … with its area code
    r"|[(（]0[2-9][)）][- ]?[0-9]{3,4}[- ][0-9]{4}|09[0-9]{2}[- ][0-9]{3}[- ][0-9]{3}"  # Taiwan
    r"|\+[1-9][0-9]{9,13}|\+[1-9][0-9]{0,2}(?:[- ]?[(（][0-9]{1,4}[)）])?(?:[- ][0-9]{2,5}){2,4}"  # any country
    r"|(?!400|800)(?:[2-9][0-9]{2}-|[(][0-9]{3}[)] ?)[0-9]{3}-[0-9]{4}"  # North America
    r")(?![0-9A-Za-z+=*]|[.,][0-9]|-[0-9]| ?[元块塊个個人吨噸万萬亿億%％美])"
)


def mask_emails(text: str) -> str:
    return _EMAIL.sub("[邮箱]", text) if "@" in text else text


def mask_ids(text: str) -> str:
    """Mainland identity numbers of 18 digits, told from other numbers by their check digit."""
    return _ID.sub(lambda found: "[身份证号]" if is_id(found.group()) else found.group(), text)


def is_id(number: str) -> bool:
    """Whether the last of 18 digits is the check digit of GB 11643 (ISO 7064 MOD 11-2)."""
    total = sum(int(digit) * pow(2, 17 - i, 11) for i, digit in enumerate(number[:17]))
    return "10X98765432"[total % 11] == number[17].upper()


def mask_phones(text: str) -> str:
    """Mobile and landline numbers; public service numbers (400, 12345) stay."""
    return _PHONE.sub("[电话]", text) if _NUMBER.search(text) else text


# Filters.
_LOST = re.compile("[\ue000-\uf8ff\ufffd]")  # what stands for lost characters
_SYMBOLS = re.compile(
    "[!-/:-@[-^`{-~\xa1-\xbf\u0300-\u036f\u2010-\u2bff\u3001-\u3004\u3008-\u3020\u3030\uff01-\uff0f\uff1a-\uff20"
    "\uff3b-\uff40\uff5b-\uff65\U0001f000-\U0001faff]+"
)
_LETTERS = re.compile(r"[^\W\d_]+")
_HANS = re.compile(f"[{HAN}]+")


def _sample(text: str) -> str:
    """Pieces from all over a text. Neighbours: single characters might all stand at one place of their lines."""
    return "".join(text[at : at + 256] for at in range(0, len(text), max(256, len(text) // 16)))


def symbol_share(text: str) -> float:
    """Punctuation, signs, drawings and emoji among all characters, 0 to 1."""
    sample = _sample(text)
    return sum(map(len, _SYMBOLS.findall(sample))) / max(1, len(sample))


def repetition(text: str) -> float:
    """Share of a text, code in fences aside, that repeats itself, 0 to 1: of its characters, those in lines that stood
    before; or of 32 pieces of 16 characters, spread evenly, those found three times. The larger counts; 0 for texts
    below 128 characters."""
    text = _FENCE.sub("", text)
    size = len(text)
    if size < 128:
        return 0.0
    pieces = [text[at : at + 16] for at in range(0, size - 15, max(16, size // 32))]
    found = sum(text.count(piece) >= 3 for piece in pieces) / len(pieces)
    lines = text.split("\n")
    return max(found, (sum(map(len, lines)) - sum(map(len, set(lines)))) / size)


def han_share(text: str) -> float:
    """Chinese characters among letters, 0 to 1; 1 where there are no letters, as in sums."""
    sample = _sample(text)
    letters = sum(map(len, _LETTERS.findall(sample)))
    return sum(map(len, _HANS.findall(sample))) / letters if letters else 1.0
