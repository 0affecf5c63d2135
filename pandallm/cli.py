"""Verb -> module, imported only when it runs: `panda --help` is instant."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from pandallm.config import UserError

# Before torch is loaded. On a CPU that other programs use too, threads that spin while they wait cost a step its speed
# several times over (docs/log.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

OWN_MISTAKE = 3.0  # seconds after which a rank other than the first tells what went wrong, if it is there still

app = typer.Typer(
    help="Take a LLaMA-family language model to Chinese and ship it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Corpora -> packed token shards.", no_args_is_help=True)
delta_app = typer.Typer(help="Publish the difference to a base model, exactly.", no_args_is_help=True)
eval_app = typer.Typer(invoke_without_command=True, no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(delta_app, name="delta")
app.add_typer(eval_app, name="eval")

Overrides = Annotated[list[str] | None, typer.Argument(help="key=value put over the file, for example seed=1")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _print(result: dict[str, Any], as_json: bool, line: str = "") -> None:
    """A command's result, once: of several ranks the first one prints it."""
    from pandallm import log

    if log.rank() == 0 and (as_json or line):
        print(json.dumps(result, ensure_ascii=False) if as_json else line)


@data_app.command(epilog="Example: panda data prepare conf/demo/pretrain_data.yaml workers=2")
def prepare(
    conf: str,
    overrides: Overrides = None,
    ray: Annotated[
        str | None, typer.Option(help=r"Run on this Ray cluster (auto, or host:port); needs pandallm\[ray].")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Corpora -> packed token shards. A rerun finds them made; after a kill the same command goes on."""
    from pandallm.data import prepare as module

    _print(module.run(conf, overrides or [], ray=ray), as_json)


@data_app.command(epilog="Example: panda data show shards/demo -n 3 --source wiki")
def show(
    shards: str,
    n: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 3,
    source: Annotated[str | None, typer.Option(help="Documents of this source instead of rows.")] = None,
    dropped_by: Annotated[str | None, typer.Option(help="Samples of what was dropped for this cause instead.")] = None,
) -> None:
    """Decode rows; trained tokens are green (between ⟦ ⟧ where there is no terminal)."""
    from pandallm.data import show as module

    if dropped_by is None:
        texts = module.run(shards, n, source, sys.stdout.isatty())
    else:
        texts = module.dropped(shards, dropped_by, n, source)
    for text in texts:
        print(text)


@data_app.command(epilog="Example: panda data stats shards/demo")
def stats(
    shards: str,
    out: Annotated[
        Path | None, typer.Option(help="Folder for stats.html and stats.png; the shards' own if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What became of every record: read, dropped by cause, kept, packed; a page with samples, and a picture."""
    from pandallm.data import stats as module

    figures = module.run(shards, out)
    _print(figures, as_json, module.text(figures))


@data_app.command(epilog="Example: panda data fetch c3-m --out eval")
def fetch(
    task: Annotated[str, typer.Argument(help="c3-d, c3-m, logiqa-v2 or logiqa-v2-en.")],
    out: Annotated[Path, typer.Option(help="Folder to put the files in, for --data of panda eval.")],
    as_json: AsJson = False,
) -> None:
    """A task's question files, from where their authors publish them; licences stay theirs and are said."""
    from pandallm.evaluate import fetch as module

    _print(module.run(task, out), as_json)


@app.command(epilog="Example: panda train conf/demo/sft.yaml learning_rate=1e-4")
def train(conf: str, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Train a stage: pretraining or instruction tuning. After a kill the same command goes on."""
    from pandallm.train import run as module

    _print(module.run(conf, overrides or []), as_json)


Base = Annotated[str, typer.Option(help="Folder, hub id or built-in name of the base model.")]
DeltaFolder = Annotated[Path, typer.Option(help="The delta's folder.")]


def _print_delta(done: str, r: dict[str, Any], as_json: bool) -> None:
    size = f"{r['bytes']:,} bytes for a model of {r['tuned_bytes']:,} ({r['ratio']:.1%})"
    _print(r, as_json, f"{done}: {r['tensors']} tensors, {size}, {r['seconds']} s")


@delta_app.command(epilog="Example: panda delta make --base llama-7b --tuned runs/sft/model --delta panda-7b-delta")
def make(
    base: Base,
    tuned: Annotated[Path, typer.Option(help="Folder of the tuned model.")],
    delta: DeltaFolder,
    as_json: AsJson = False,
) -> None:
    """Write the difference of TUNED to its base: exact, compressed, with a hash for every tensor."""
    from pandallm.model import load
    from pandallm.release import delta as module

    _print_delta(f"{delta}: made", module.make(load.resolve(base), tuned, delta), as_json)


@delta_app.command(epilog="Example: panda delta apply --base llama-7b --delta panda-7b-delta --out panda-7b")
def apply(
    base: Base,
    delta: DeltaFolder,
    out: Annotated[Path, typer.Option(help="Folder of the model to write.")],
    as_json: AsJson = False,
) -> None:
    """Base + delta = the tuned model, bit for bit. A wrong base is refused before anything is written."""
    from pandallm.model import load
    from pandallm.release import delta as module

    _print_delta(f"{out}: base + delta, bit for bit", module.apply(load.resolve(base), delta, out), as_json)


@delta_app.command(epilog="Example: panda delta verify --base llama-7b --delta panda-7b-delta")
def verify(
    base: Base,
    delta: DeltaFolder,
    tuned: Annotated[Path | None, typer.Option(help="Compare with this folder too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check a delta, its base, and what they make, without writing."""
    from pandallm.model import load
    from pandallm.release import delta as module

    _print_delta(f"{delta}: verified", module.verify(load.resolve(base), delta, tuned), as_json)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


@eval_app.callback(
    epilog="Example: panda eval --model smollm2-135m --task c3-m,logiqa-v2 --data DIR --split dev --out runs/eval"
)
def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Folder, hub id or built-in name.")] = "",
    task: Annotated[
        str,
        typer.Option(
            help="c3-d, c3-m, logiqa-v2, logiqa-v2-en, cmmlu, ceval, agieval, gaokao; a subject: cmmlu/anatomy; or a"
            " task of yours: mine.yaml. Several with commas."
        ),
    ] = "",
    data: Annotated[Path | None, typer.Option(help="Folder of the tasks' files.")] = None,
    split: Annotated[str, typer.Option(help="test, dev, train; val of ceval.")] = "test",
    protocol: Annotated[
        str, typer.Option(help="generate (the original's), choice, cloze; several with commas.")
    ] = "generate",
    wordings: Annotated[
        str, typer.Option(help="original, all, or names with commas: the accuracy is the mean over them.")
    ] = "original",
    shots: Annotated[int, typer.Option(help="Show the first K questions of the train split, answered, before.")] = 0,
    permute: Annotated[int, typer.Option(help="Ask each question with N orders of its options.")] = 1,
    limit: Annotated[int | None, typer.Option(help="The first N questions of each task or subject.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.json and predictions.jsonl.")] = Path(),
    chat_format: Annotated[str | None, typer.Option(help="none, model (its own), or a format's name.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Bits per character of this file; may be repeated.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a batch; near-ties in bf16 may move with it. Default: by device.")
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
    training: Annotated[
        list[Path] | None,
        typer.Option(help="Shards it was trained on: questions in them are flagged. May be repeated."),
    ] = None,
    backend: Annotated[str, typer.Option(help="torch, or vllm where that is installed.")] = "torch",
    checkpoints: Annotated[
        Path | None, typer.Option(help="In place of --model: every checkpoint of this training run, into OUT/step-….")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy on C3 and LogiQA-v2 with intervals, and bits per character of any text."""
    if context.invoked_subcommand:
        _refuse_options(context, context.invoked_subcommand)
        return
    if bool(model) == bool(checkpoints):
        raise UserError("--model is needed (a folder, hub id or built-in name), or --checkpoints, and not both")
    if checkpoints and out == Path():
        raise UserError("out: name the folder for the checkpoints' results")
    from pandallm import ranks
    from pandallm.evaluate import run as module
    from pandallm.evaluate.checkpoints import models_of

    with ranks.group():
        found = ranks.from_first(lambda: models_of(checkpoints)) if checkpoints else {"": model}
        results = {
            name: module.run(
                str(folder),
                _listed(task),
                data,
                split,
                _listed(protocol),
                limit,
                out / name,
                chat_format,
                text or [],
                batch_tokens,
                precision,
                _listed(wordings),
                shots,
                permute,
                training or [],
                backend,
            )
            for name, folder in found.items()
        }
    _print(results if checkpoints else results[""], as_json)


def _refuse_options(context: typer.Context, subcommand: str) -> None:
    """UserError for options that stand before a subcommand, which would not see them."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            raise UserError(f"{parameter.opts[0]}: stands before '{subcommand}'; see panda eval {subcommand} --help")


@eval_app.command(epilog="Example: panda eval compare runs/eval/base runs/eval/tuned")
def compare(run_a: Path, run_b: Path, as_json: AsJson = False) -> None:
    """Is B better than A? The difference question by question, its interval, and a verdict."""
    from pandallm.evaluate import report, runs

    result = runs.compare(run_a, run_b)
    _print(result, as_json, report.comparison_table(result))


@eval_app.command("report", epilog="Example: panda eval report runs/eval/base runs/eval/tuned --out runs/eval/report")
def eval_report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Evaluations, or folders of a run's checkpoints'.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.md, report.html and pictures.")],
    as_json: AsJson = False,
) -> None:
    """Evaluations beside the original's published figures: Markdown, pictures, a page with every answer and filters."""
    from pandallm.evaluate import publish

    _print(publish.write(runs, out), as_json)


@eval_app.command(
    epilog="Example: panda eval export-lm-eval --model smollm2-135m --task c3-m --data DIR --split dev --out lm_eval"
)
def export_lm_eval(
    model: Annotated[str, typer.Option(help="Folder, hub id or built-in name: whose tokenizer and window to use.")],
    task: Annotated[str, typer.Option(help="c3-d, c3-m, logiqa-v2; several with commas.")],
    out: Annotated[Path, typer.Option(help="Folder for a YAML and a JSONL file a task and protocol.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the tasks' files.")] = None,
    split: Annotated[str, typer.Option(help="test, dev or train.")] = "test",
    protocol: Annotated[str, typer.Option(help="Several with commas.")] = "generate,choice,cloze",
    wordings: Annotated[str, typer.Option(help="Names with commas, or all.")] = "original",
    chat_format: Annotated[str | None, typer.Option(help="none, model (its own), or a format's name.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the tasks for lm-evaluation-harness, with the prompts as panda gives them; print how to run it."""
    from pandallm.evaluate import export as module

    result = module.run(model, _listed(task), data, split, _listed(protocol), _listed(wordings), out, chat_format)
    _print(result, as_json, result["command"])


@app.command(epilog="Example: panda chat runs/demo/sft/model --temperature 0.7")
def chat(
    model: str,
    chat_format: Annotated[str | None, typer.Option(help="In place of the model's own.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.7,
    top_p: float = 0.9,
    top_k: Annotated[int, typer.Option(help="0: all.")] = 0,
    repetition_penalty: float = 1.0,
    max_new_tokens: int = 512,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same answers.")] = None,
) -> None:
    """Talk to a model in the terminal. /reset forgets, /exit leaves."""
    from pandallm.model.generate import Sampling
    from pandallm.serve import chat as module

    sampling = Sampling(temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed)
    module.run(model, chat_format, system, sampling)


@app.command(hidden=True)
def demo_report(runs: Path) -> None:
    """The demo's report (conf/demo/run.sh calls this)."""
    from pandallm.demo import report as module

    module.run(runs)


def main() -> None:
    """Entry point: a user's mistake is one line and exit 2; ours is a traceback."""
    # The deepspeed launcher adds an option that the environment holds already.
    sys.argv = [argument for argument in sys.argv if not re.fullmatch(r"--local[_-]rank=\d+", argument)]
    try:
        app()
    except UserError as e:
        from pandallm import log

        if log.rank():
            # Mostly rank 0 says the same, and its end has the launcher end this one before it repeats it.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(OWN_MISTAKE)
        print(f"panda: {f'rank {log.rank()}: ' if log.rank() else ''}{e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
