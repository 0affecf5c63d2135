"""Verb -> module, imported only when it runs: `panda --help` is instant."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pandallm.config import UserError

# transformers picks frameworks and prints advice at import; neither is wanted in a tool's output.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

app = typer.Typer(
    help="Take a LLaMA-family language model to Chinese and ship it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Corpora -> packed token shards.", no_args_is_help=True)
delta_app = typer.Typer(help="Publish the difference to a base model, exactly.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(delta_app, name="delta")

Overrides = Annotated[list[str] | None, typer.Argument(help="key=value put over the file, for example seed=1")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, ensure_ascii=False))


@data_app.command(epilog="Example: panda data prepare conf/demo/pretrain_data.yaml workers=2")
def prepare(conf: str, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Corpora -> packed token shards. A rerun finds them made; after a kill the same command goes on."""
    from pandallm.data import prepare as module

    _print(module.run(conf, overrides or []), as_json)


@data_app.command(epilog="Example: panda data show shards/demo -n 3 --source wiki")
def show(
    shards: str,
    n: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 3,
    source: Annotated[str | None, typer.Option(help="Documents of this source instead of rows.")] = None,
) -> None:
    """Decode rows; trained tokens are green (between ⟦ ⟧ where there is no terminal)."""
    from pandallm.data import show as module

    for text in module.run(shards, n, source, sys.stdout.isatty()):
        print(text)


@app.command(epilog="Example: panda train conf/demo/sft.yaml learning_rate=1e-4")
def train(conf: str, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Train a stage: pretraining or instruction tuning. After a kill the same command goes on."""
    from pandallm.train import run as module

    _print(module.run(conf, overrides or []), as_json)


def main() -> None:
    """Entry point: a user's mistake is one line and exit 2; ours is a traceback."""
    try:
        app()
    except UserError as e:
        print(f"panda: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
