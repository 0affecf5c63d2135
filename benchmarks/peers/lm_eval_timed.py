"""lm-evaluation-harness's own command line, with a clock around what its model scores.

PYTHON lm_eval_timed.py RESULT.json run --model hf …   as `lm-eval run --model hf …`; seconds and versions go to RESULT
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.models.huggingface import HFLM

spent = 0.0  # seconds, tokenisation of the prompts included


def clocked(name: str) -> None:
    """Adds the time of a method of the model to `spent`."""
    method: Callable[..., Any] = getattr(HFLM, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        global spent
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            spent += time.perf_counter() - start

    setattr(HFLM, name, run)


def main() -> None:
    result = Path(sys.argv.pop(1))
    clocked("loglikelihood")
    clocked("generate_until")
    cli_evaluate()
    versions = {name: version(name) for name in ("lm_eval", "torch", "transformers")}
    result.write_text(json.dumps({"seconds": spent, "versions": versions}))


if __name__ == "__main__":
    main()
