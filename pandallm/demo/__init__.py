"""The embedded demo data, written for this project (Apache-2.0): where it lies."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parent


def texts() -> list[str]:
    """The raw texts of the training articles, in a fixed order."""
    found = []
    for path in sorted((ROOT / "corpora").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if isinstance(record, dict) and "id" in record:
                found.append(record["text"])
    return found
