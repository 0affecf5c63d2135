"""The token shards on disk: flat, memory-mapped files and a manifest.

    manifest.json             counts at every step, causes of drops, tokenizer and file hashes, config
    report.json               samples of what was dropped, records that touch evaluation items
    tokenizer/                the tokenizer, with its chat template
    items.bin                 the n-grams of the evaluation items to keep out, where some are named
    parts/NAME.tokens.bin     token ids of some corpus files' documents, end to end (uint16 or uint32)
    parts/NAME.mask.bin       uint8 a token: 1 where it is trained
    parts/NAME.documents.bin  a DOCUMENT a document: where it lies, and which record it came from
    parts/NAME.records.bin    a RECORD a kept record: its corpus file and line, and its content's hash
    parts/NAME.sketches.bin   a sketch a kept record, where near-duplicates are looked for (dedup.py)
    parts/NAME.json           the part's counts and samples, and what it was made from
    rows.documents.bin        uint32: document numbers (over all parts, in the manifest's order), row by row
    rows.sizes.bin            uint32 a row: how many of those it holds

Documents are stored once and rows refer to them, so that repeats and a new mixture cost nothing, and every row knows
the source and record of all that is in it.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pandallm import files
from pandallm.config import UserError

FORMAT = 3
NEEDED = ("seq_len", "parts", "token_dtype", "sizes")
DOCUMENT = np.dtype(
    [("offset", "<u8"), ("length", "<u4"), ("trained", "<u4"), ("record", "<u4"), ("piece", "<u4")]
)  # offset in tokens within the part; record: index into its records; piece: number within a text that was cut up
RECORD = np.dtype([("key", "S16"), ("file", "<u4"), ("line", "<u8"), ("group", "<u8")])
# file: number within the part's; line: counted from its `first_lines`; group: hash of what the source is sampled by


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def read_flat(path: Path, dtype: np.dtype[Any] | str) -> NDArray[Any]:
    """A flat file, memory-mapped read-only (an empty one can't be mapped)."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def is_manifest(path: Path) -> bool:
    """Whether a file is the manifest of shards, of whatever format, or so damaged that nothing can be said."""
    try:
        found = files.read_json(path)
    except (ValueError, RecursionError):
        return True
    return isinstance(found, dict) and "format" in found


class Shards:
    """Prepared shards, opened for reading. UserError when the folder holds none or its files have other sizes."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = self.folder / "manifest.json"
        if not manifest.exists():
            raise UserError(f"{folder}: no manifest.json; make the shards with: panda data prepare CONF.yaml")
        try:
            self.manifest: dict[str, Any] = files.read_json(manifest)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{manifest}: damaged ({e}); prepare the shards again") from None
        if not isinstance(self.manifest, dict) or "format" not in self.manifest:
            raise UserError(f"{manifest}: is no shards' manifest; make the shards with: panda data prepare CONF.yaml")
        if self.manifest["format"] != FORMAT:
            raise UserError(f"{folder}: shards of format {self.manifest['format']}, not {FORMAT}; prepare them again")
        if lacking := [key for key in NEEDED if key not in self.manifest]:
            raise UserError(f"{manifest}: damaged ('{lacking[0]}' is missing); prepare the shards again")
        self.seq_len: int = self.manifest["seq_len"]
        self.parts: list[dict[str, Any]] = self.manifest["parts"]
        dtype = np.dtype(self.manifest["token_dtype"])
        names = [part["name"] for part in self.parts]
        for name, size in self.manifest["sizes"].items():
            path = self.folder / name
            if not path.exists() or path.stat().st_size != size:
                raise UserError(f"{path}: missing or not {size} bytes long; prepare the shards again")
        self._tokens = [read_flat(self.folder / f"parts/{name}.tokens.bin", dtype) for name in names]
        self._masks = [read_flat(self.folder / f"parts/{name}.mask.bin", "u1") for name in names]
        self._documents = [read_flat(self.folder / f"parts/{name}.documents.bin", DOCUMENT) for name in names]
        self._first = np.cumsum([0, *(len(d) for d in self._documents)])  # [parts + 1] global document numbers
        self._row_documents = read_flat(self.folder / "rows.documents.bin", "<u4")
        self._row_ends = np.cumsum(read_flat(self.folder / "rows.sizes.bin", "<u4"), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._row_ends)

    @cached_property
    def hash(self) -> str:
        """Identifies the content: hash of the manifest's file hashes."""
        return files.hash_json([self.manifest["files"], self.manifest["tokenizer_hash"]])

    def row(self, index: int) -> NDArray[np.int64]:
        """Document numbers of a row, in their order in it."""
        start = self._row_ends[index - 1] if index else 0
        return np.asarray(self._row_documents[start : self._row_ends[index]], np.int64)

    def _locate(self, document: int) -> tuple[int, Any]:
        part = int(np.searchsorted(self._first, document, side="right")) - 1
        return part, self._documents[part][document - self._first[part]]

    def document(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(input_ids [L], loss_mask [L]) of a document."""
        part, d = self._locate(number)
        span = slice(int(d["offset"]), int(d["offset"]) + int(d["length"]))
        return self._tokens[part][span].astype(np.int64), self._masks[part][span].astype(bool)

    def size(self, number: int) -> tuple[int, int]:
        """(tokens, trained tokens) of a document."""
        _, d = self._locate(number)
        return int(d["length"]), int(d["trained"])

    def provenance(self, number: int) -> tuple[str, str, int]:
        """(source, corpus file, line) of a document."""
        part, d = self._locate(number)
        about = self.parts[part]
        record = read_flat(self.folder / f"parts/{about['name']}.records.bin", RECORD)[int(d["record"])]
        file = int(record["file"])
        return about["source"], about["files"][file], about["first_lines"][file] + int(record["line"])

    def documents_of(self, source: str) -> NDArray[np.int64]:
        """Document numbers of a source that stand in some row."""
        names = sorted({part["source"] for part in self.parts})
        if source not in names:
            raise UserError(f"{self.folder}: no source '{source}'; it has {', '.join(names)}")
        used = np.unique(np.asarray(self._row_documents, np.int64))
        part = np.searchsorted(self._first, used, side="right") - 1
        wanted = [i for i, p in enumerate(self.parts) if p["source"] == source]
        return used[np.isin(part, wanted)]
