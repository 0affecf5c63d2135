"""`panda eval`: a model's answers to the tasks' questions and its bits per character, written down with what made them.

OUT/predictions.jsonl has every prompt and output; OUT/results.json, written last, the figures. A run that finished is
not run again; one that did not finish goes on, task by task, protocol by protocol, wording by wording.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pandallm import files, log, prompt, ranks, tokenizer
from pandallm.config import UserError, parse_json, read_text
from pandallm.data.questions import letter
from pandallm.data.shards import Shards
from pandallm.evaluate import report, runs, score, seen, unfinished, variants
from pandallm.evaluate.layouts import LONE_SURROGATE
from pandallm.evaluate.tasks import TASKS
from pandallm.evaluate.unfinished import Unfinished
from pandallm.evaluate.variants import Asked
from pandallm.evaluate.vllm import Vllm
from pandallm.model import generate as generation
from pandallm.model import load as models
from pandallm.model import trees

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
BACKENDS = ("torch", "vllm")
CHAT_FORMATS = ("none", "model", *prompt.TEMPLATES)
# The files of a model folder that decide its answers.
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "tokenizer*", "special_tokens*", "*.jinja")
SECOND = {"generate": "pred_strict", "cloze": "pred_norm"}  # what a protocol's other rule is called in a row
SAY_EVERY = 10.0  # seconds between two lines of progress


def run(
    model: str,
    tasks: Sequence[str],
    data: Path | None,
    split: str,
    protocols: Sequence[str],
    limit: int | None,
    out: Path,
    chat_format: str | None = None,
    texts: Sequence[Path] = (),
    token_budget: int | None = None,
    precision: str = "auto",
    wordings: Sequence[str] = ("original",),
    shots: int = 0,
    permute: int = 1,
    training: Sequence[Path] = (),
    backend: str = "torch",
) -> dict[str, Any]:
    """Evaluates a model and returns what it wrote to OUT/results.json.

    `tasks`: see tasks.get. `limit`, `wordings`, `shots`, `permute`: see variants.sets. `chat_format`: see
    score.use_format. `texts`: files for bits per character. `token_budget`: tokens of a batch, padding counted (None:
    see Asking.budget). `precision`: fp32, bf16, or auto (bf16 where the device computes in it). `training`: see
    seen.flags. `backend`: torch, or vllm (no texts). Raises UserError for mistakes in these, and if OUT is another's.
    """
    _check(tasks, protocols, limit, out, chat_format, texts, token_budget, precision, backend)
    sets = variants.sets(tasks, data, split, limit, wordings, shots, permute)
    documents = {path.name: read_documents(path) for path in texts}
    folder = models.resolve(model)
    precision = _precision(precision)
    hashes = _hashes(sets, texts)
    how: dict[str, Any] = {"split": split, "shots": shots, "permute": permute}
    arguments = {
        "model": ranks.from_first(partial(_hash_model, folder)),
        "tasks": {name: part.task.version for name, part in sets.items()},
        "texts": list(documents),
        "data": hashes,
        "protocols": list(protocols),
        "chat_format": chat_format,
        "precision": precision,
        "backend": backend,
        "limit": limit,
        "wordings": variants.wordings(wordings),
        "training": [Shards(folder).hash for folder in training],
    } | how
    if (finished := ranks.from_first(partial(_finished, out, arguments))) is not None:
        return finished
    started = time.monotonic()
    flagged = seen.flags([a.question for part in sets.values() for a in part.asked], training)
    words = tokenizer.load(folder)
    how["chat_format"] = score.use_format(words, chat_format)
    asking = Asking(_load(folder, precision, backend, protocols), words, how["chat_format"], token_budget)
    kept = Unfinished(out, arguments)
    results: dict[str, Any] = {"model": model, "tasks": {}, "bits_per_character": {}, "arguments": arguments}
    rows: list[report.Row] = []
    for name, part in sets.items():
        results["tasks"][name] = _evaluate(asking, part, protocols, how, kept, rows, flagged)
    for name, found in documents.items():
        results["bits_per_character"][name] = {"data": hashes[name]} | asking.bits(name, found)
    results |= {"precision": precision, "seconds": round(time.monotonic() - started + kept.before, 1)}
    _write(out, results, rows)
    return results


def _hashes(sets: dict[str, variants.Set], texts: Sequence[Path]) -> dict[str, str]:
    """Of the files that questions, examples and texts come from."""
    examples = {f"{name}, examples": part.examples for name, part in sets.items() if part.examples}
    return {n: part.data for n, part in sets.items()} | examples | {path.name: files.hash_file(path) for path in texts}


def _load(folder: Path, precision: str, backend: str, protocols: Sequence[str]) -> PreTrainedModel | Vllm:
    if "generate" in protocols and (other := generation.not_plain(models.generation_config(folder))):
        log.warn(f"generate is greedy: the model's generation_config is left aside ({', '.join(other)})")
    if backend == "vllm":
        return Vllm(folder, PRECISIONS[precision])
    device = ranks.device()
    network = models.load(folder, PRECISIONS[precision]).eval()
    network.to(device)
    return network


def _precision(asked: str) -> str:
    """The one to compute in."""
    if asked != "auto":
        return asked
    return "bf16" if models.inference_dtype(_device()) is torch.bfloat16 else "fp32"


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _write(out: Path, results: dict[str, Any], rows: list[report.Row]) -> None:
    results |= {"device": _device(), "ranks": ranks.world(), "versions": log.versions(), "commit": log.commit()}
    if log.rank() != 0:
        return
    files.write_text(out / "predictions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    files.write_json(out / "results.json", results)
    unfinished.clear(out)
    log.say(report.table(results))


def _check(
    tasks: Sequence[str],
    protocols: Sequence[str],
    limit: int | None,
    out: Path,
    chat_format: str | None,
    texts: Sequence[Path],
    token_budget: int | None,
    precision: str,
    backend: str,
) -> None:
    """Raises UserError for arguments that can't be meant."""
    if not tasks and not texts:
        raise UserError(f"nothing to evaluate: name tasks ({', '.join(TASKS)}) or texts")
    for what, values, known in (
        ("protocol", protocols, score.PROTOCOLS),
        ("chat_format", [chat_format] if chat_format is not None else [], CHAT_FORMATS),
        ("precision", [precision], ("auto", *PRECISIONS)),
        ("backend", [backend], BACKENDS),
    ):
        for value in values:
            if value not in known:
                raise UserError(f"{what} '{value}': unknown; known: {', '.join(known)}")
    if tasks and not protocols:
        raise UserError(f"no protocol: name one of {', '.join(score.PROTOCOLS)}")
    if texts and backend != "torch":
        raise UserError("backend vllm answers questions; leave it out for bits per character of texts")
    names = [path.name for path in texts]
    for what, given in (("protocol", protocols), ("text file", names)):
        for value, times in Counter(given).items():
            if times > 1:
                raise UserError(f"{what} '{value}': given twice")
    for number, count in (("limit", limit), ("token_budget", token_budget)):
        if count is not None and count < 1:
            raise UserError(f"{number}: {count} is out of range; 1 or more is wanted")
    if str(out) in ("", "."):  # Path("") is "."
        raise UserError("out: name the folder for results.json and predictions.jsonl")
    ranks.from_first(partial(files.check_writable, out))


def read_documents(path: Path) -> list[str]:
    """Texts for bits per character: a .txt is one document; .jsonl and .json are JSON lines with `text` or `content`.

    Raises UserError: no such file, another kind of file, a line that has neither, no text at all.
    """
    text = read_text(path)
    documents = []
    if path.suffix == ".txt":
        documents.append(text)
    elif path.suffix in (".jsonl", ".json"):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                documents.append(_document(parse_json(line, path, number), f"{path}:{number}"))
    else:
        raise UserError(f"{path}: a .txt file or JSON lines (.jsonl, .json) are wanted")
    if not any(documents):
        raise UserError(f"{path}: has no text")
    return documents


def _document(record: Any, where: str) -> str:
    text = record.get("text", record.get("content")) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{where}: an object with a text under 'text' or 'content' is wanted")
    if LONE_SURROGATE.search(text):
        raise UserError(f"{where}: holds half a character (a lone surrogate); write it again")
    return text


def _hash_model(folder: Path) -> str:
    paths = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)})
    return files.hash_json({path.name: files.hash_file(path) for path in paths})


def _finished(out: Path, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """What a finished run with the same arguments wrote; UserError if OUT is another evaluation's, finished or not."""
    if not (out / "results.json").exists():
        unfinished.check(out, arguments)
        return None
    results = runs.results(out)
    before = results.get("arguments", {})
    for key, value in arguments.items():
        if before.get(key) != value:
            shown = "" if key in ("model", "data") else f" ({before.get(key)}, now {value})"
            raise UserError(f"{out}: holds an evaluation with another {key}{shown}; choose another --out")
    unfinished.clear(out)  # where the run was killed between its last two steps
    log.say(f"{out}: this evaluation is done already\n{report.table(results)}")
    return results


@dataclass(frozen=True)
class Asking:
    """A model, and how it is asked."""

    network: PreTrainedModel | Vllm
    words: PreTrainedTokenizerBase
    chat_format: str
    token_budget: int | None

    def rows(self, asked: Sequence[Asked], protocol: str) -> list[report.Row]:
        """What it answers, as lines of predictions.jsonl."""
        window = int(self.network.config.max_position_embeddings)
        questions, budget = [a.question for a in asked], self.budget(protocol)
        progress = _progress(f"{questions[0].task}, {asked[0].wording}, {protocol}")
        prompts = [
            score.ask(self.words, self.chat_format, a.question, a.wording, protocol, window, a.examples) for a in asked
        ]
        if protocol == "generate":
            answers = score.generate(self.network, self.words, questions, prompts, budget, progress)
        else:
            answers = (score.choice if protocol == "choice" else score.cloze)(
                self.network, self.words, questions, prompts, self.chat_format, budget, progress
            )
        return [_row(a, protocol, p, answer) for a, p, answer in zip(asked, prompts, answers, strict=True)]

    def bits(self, name: str, texts: Sequence[str]) -> dict[str, Any]:
        """Bits per character of a file's texts."""
        progress = _progress(f"bits per character of {name}, windows")
        budget = self.budget("choice")
        assert isinstance(self.network, PreTrainedModel)  # _check
        return score.bits_per_character(self.network, self.words, texts, token_budget=budget, progress=progress)

    def budget(self, protocol: str) -> int:
        """Tokens of a batch. A CPU reads few at once fastest, but writes many texts at once fastest."""
        if self.token_budget:
            return self.token_budget
        if _device() == "cuda":
            return 16_384
        return 4096 if protocol == "generate" else trees.IN_CACHE


def _evaluate(
    asking: Asking,
    part: variants.Set,
    protocols: Sequence[str],
    how: dict[str, Any],
    kept: Unfinished,
    rows: list[report.Row],
    flagged: set[tuple[str, str]] | None,
) -> dict[str, Any]:
    """A task's entry in results.json: the first protocol's figures, the others' below "protocols".

    `how`: what every entry says of how it was made. The predictions are appended to `rows`. `flagged`: see seen.flags.
    """
    task, shots = part.task.name, how["shots"]
    how = how | {"data": part.data} | ({"left_out": part.left_out} if part.left_out else {})
    how |= {"examples": part.examples} if part.examples else {}
    by_wording: dict[str, list[Asked]] = {}
    for asked in part.asked:
        by_wording.setdefault(asked.wording, []).append(asked)
    entries = {}
    for protocol in protocols:
        lines: list[report.Row] = []
        seconds = 0.0
        for wording, some in by_wording.items():
            found, spent = kept.rows((task, protocol, wording), partial(asking.rows, some, protocol))
            lines, seconds = lines + found, seconds + spent
        if flagged is not None:
            lines = [line | {"flagged": (line["task"], line["id"]) in flagged} for line in lines]
        rows += lines
        figures = report.summary(lines, protocol)
        entries[protocol] = figures | how | {"seconds": round(seconds, 1)}
        if short := sum(line.get("shots", 0) < shots for line in lines):
            entries[protocol]["fewer_shots"] = short
            log.warn(f"{task}: {short} of {len(lines)} prompts show fewer than {shots} examples, for want of room")
        if figures["truncated"]:
            log.warn(f"{task}: {figures['truncated']} contexts were cut to the model's window")
    first, *others = entries.values()
    return first | ({"protocols": {e["protocol"]: e for e in others}} if others else {})


def _row(asked: Asked, protocol: str, read: score.Prompt, answer: score.Answer) -> report.Row:
    """A line of predictions.jsonl; `pred` and `gold` are letters as shown, `pred` null where the output has none."""
    question = asked.question
    row: report.Row = {
        "task": question.task,
        "id": question.id,
        "wording": asked.wording,
        "protocol": protocol,
        "prompt": read.text,
        "output": answer.output,
        "pred": None if answer.pred is None else letter(answer.pred),
        "gold": letter(question.gold),
        "options": len(question.options),
        "correct": answer.pred == question.gold,
        "truncated": read.truncated,
    }
    if second := SECOND.get(protocol):
        row[second] = None if answer.second is None else letter(answer.second)
    row |= asked.fields() | ({"shots": read.shots} if asked.examples else {})
    if answer.log_likelihoods:  # null: of an option without a text
        row["log_likelihoods"] = [value if math.isfinite(value) else None for value in answer.log_likelihoods]
    return row


def _progress(label: str) -> score.Progress:
    last = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SAY_EVERY:
            last = time.monotonic()
            all_done = min(done * ranks.world(), total)  # `done` is this rank's: they keep pace
            log.say(f"{label}: {all_done} of {total}")

    return say
