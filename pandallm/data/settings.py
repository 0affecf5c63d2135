"""The keys of a mixture: what `panda data prepare` reads."""

from __future__ import annotations

import codecs
import os
import re
from collections import Counter
from typing import Literal

from pydantic import Field, field_validator, model_validator

from pandallm import prompt
from pandallm.config import Config
from pandallm.data import read, sources
from pandallm.data.clean import Clean
from pandallm.data.dedup import Dedup


class Source(Config):
    """One corpus of the mixture."""

    name: str
    path: str  # a file, a folder whose files are all read, or a pattern such as corpora/*.jsonl.gz
    format: str = "auto"  # a name of sources.LAYOUTS or read.PLAIN
    encoding: str = ""  # gb18030, big5 …, where it isn't told from the content
    instruction: str | list[str] = []  # replaces the corpus's fixed one; of several, one is drawn a record
    values: dict[str, str] = {}  # what the records' placeholders stand for: {name: 小熊} fills {{name}}
    min_score: float | None = None  # records with a lower quality score are dropped
    sample: int | None = Field(None, ge=1)  # so many records, drawn at random
    by: str | None = None  # … in proportion to the number of records that share this key's value (FLAN's task)
    cap: int | None = Field(None, ge=1)  # … which counts as this at most, so that no task swamps the others
    epochs: float | None = Field(None, ge=0)
    weight: float | None = Field(None, gt=0, le=1)  # share of the trained tokens

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not re.fullmatch(r"[\w-]+", value):
            raise ValueError("letters, digits, _ and - only: it names files")
        return value

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        known = ("auto", *read.PLAIN, *(name for name in sources.LAYOUTS if name not in read.PLAIN))
        if value not in known:
            raise ValueError(f"not one of {', '.join(known)}")
        return value

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            name = codecs.lookup(value).name if value else ""
            "字".encode(name or "utf-8")
        except (LookupError, UnicodeError):
            raise ValueError("not an encoding of Chinese text: utf-8, gb18030, big5, utf-16 …") from None
        return {"utf-8-sig": "utf-8", "gb2312": "gb18030", "gbk": "gb18030"}.get(name, name)

    @model_validator(mode="after")
    def _one_amount(self) -> Source:
        if self.epochs is not None and self.weight is not None:
            raise ValueError("give epochs or weight, not both")
        if (self.by or self.cap) and not self.sample:
            raise ValueError("by and cap say how a sample is drawn: give sample too")
        if self.cap and not self.by:
            raise ValueError("cap limits the groups of by: give by too")
        return self

    def reading(self, seed: int) -> sources.Reading:
        """What decides how a record of it is read."""
        phrasings = (self.instruction,) if isinstance(self.instruction, str) else tuple(self.instruction)
        values = tuple(sorted(self.values.items()))
        seed = seed if len(phrasings) > 1 else 0  # so that another seed mixes the same parts anew
        return sources.Reading(self.format, phrasings, seed, self.min_score, values, self.by)


class PrepareConfig(Config):
    """A mixture."""

    tokenizer: str
    chat_format: prompt.ChatFormat = "chatml"
    pad_token: str | None = None  # added where the tokenizer has no pad token, as the original did
    seq_len: int = Field(2048, ge=8)
    packing: Literal["best_fit", "none"] = "best_fit"
    out: str = Field(min_length=1)
    seed: int = Field(42, ge=0, lt=1 << 32)
    workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    max_bad: float = Field(0.01, ge=0, le=1)  # share of a source's records that may be unreadable
    sources: list[Source] = Field(min_length=1)
    clean: Clean = Clean()
    dedup: Dedup = Dedup()
    decontaminate: list[str] = []  # evaluation files (or folders, or patterns) whose items must not be trained on

    @field_validator("sources")
    @classmethod
    def _names_differ(cls, value: list[Source]) -> list[Source]:
        twice = [name for name, n in Counter(source.name for source in value).items() if n > 1]
        if twice:
            raise ValueError(f"two sources are called '{twice[0]}'")
        return value

    @field_validator("sources")
    @classmethod
    def _weights_leave_room(cls, value: list[Source]) -> list[Source]:
        weights = [source.weight for source in value if source.weight is not None]
        if len(weights) < len(value) and sum(weights) > 1 - 1e-6:
            raise ValueError("the weights add up to 1 or more, which leaves nothing for the sources with epochs")
        return value
