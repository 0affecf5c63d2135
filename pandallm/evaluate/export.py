"""`panda eval export-lm-eval`: tasks for lm-evaluation-harness, so that anyone can check our figures with it.

A task and protocol become a YAML file and, beside it, a JSONL file with the prompts as `panda eval` gives them to the
model: the harness adds nothing but the answer, after `target_delimiter`.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from pandallm import files, log, prompt, tokenizer
from pandallm.config import UserError
from pandallm.data.questions import letter
from pandallm.evaluate import layouts, score, variants
from pandallm.evaluate.tasks import TASKS, Question
from pandallm.model import generate as generation
from pandallm.model import load as models

CHAT_FORMATS = ("none", "model", *prompt.TEMPLATES)


def run(
    model: str,
    tasks: Sequence[str],
    data: Path | None,
    split: str,
    protocols: Sequence[str],
    wordings: Sequence[str],
    out: Path,
    chat_format: str | None = None,
) -> dict[str, Any]:
    """Writes OUT/panda_TASK_PROTOCOL.yaml and .jsonl; returns {"out", "tasks": their names, "command"}.

    `model`: whose tokenizer and window the prompts are for. `wordings`: keys of WORDINGS, or "all"; the harness's
    accuracy is the mean over them. `chat_format`: as in `panda eval`.
    Raises UserError for every mistake in these, before anything is written.
    """
    _check(tasks, protocols, out, chat_format)
    sets = variants.sets(tasks, data, split, names=wordings)
    folder = models.resolve(model)
    words = tokenizer.load(folder)
    used_format = score.use_format(words, chat_format)
    window = int(models.read_config(folder).max_position_embeddings)
    lead = score.answer_lead(words, used_format)
    written: dict[str, str] = {}  # name -> content
    prompts: list[score.Prompt] = []
    for part, protocol in product(sets.values(), protocols):
        name = _name(part, protocol)
        asked, left_out = _askable(part, protocol, name)
        read = [score.ask(words, used_format, a.question, a.wording, protocol, window) for a in asked]
        about = {"version": part.task.version, "split": split, "chat_format": used_format}
        about |= {"wordings": variants.wordings(wordings)}
        about |= {"truncated": sum(p.truncated for p in read), "data": part.data, "left_out": left_out}
        if about["truncated"]:
            log.warn(f"{name}: {about['truncated']} contexts were cut to the model's window")
        questions = [a.question for a in asked]
        how = _how(name, protocol, questions, words, folder)
        conf = _frame(name, split, lead) | how | {"metadata": about}
        written[f"{name}.yaml"] = yaml.safe_dump(conf, allow_unicode=True, sort_keys=False)
        written[f"{name}.jsonl"] = "".join(map(_record, asked, read))
        prompts += read
    model_args = f"pretrained={folder.absolute()},dtype=float32{_special_tokens(words, prompts)}"
    try:
        for file, content in written.items():
            files.write_text(out / file, content)
    except OSError as e:
        raise UserError(f"{out}: can't be written ({e.strerror}); choose another --out") from None
    names = [_name(part, protocol) for part, protocol in product(sets.values(), protocols)]
    return {"out": str(out), "tasks": names, "command": _command(out, names, model_args)}


def _askable(part: variants.Set, protocol: str, name: str) -> tuple[list[variants.Asked], dict[str, int]]:
    """What the harness can ask, and what is left out by cause: it can't score an empty text."""
    if protocol != "cloze":
        return part.asked, part.left_out
    asked = [a for a in part.asked if all(option.strip() for option in a.question.options)]
    empty = len({a.question.id for a in part.asked}) - len({a.question.id for a in asked})
    if not empty:
        return asked, part.left_out
    log.warn(f"{name}: questions with an empty option, which the harness can't score: {empty}, left out")
    return asked, part.left_out | {layouts.EMPTY_OPTION: empty}


def _name(part: variants.Set, protocol: str) -> str:
    return f"panda_{part.task.name.replace('/', '-')}_{protocol}"


def _check(tasks: Sequence[str], protocols: Sequence[str], out: Path, chat_format: str | None) -> None:
    """Raises UserError for arguments that can't be meant."""
    formats = [] if chat_format is None else [chat_format]
    for what, values, known in (("protocol", protocols, score.PROTOCOLS), ("chat_format", formats, CHAT_FORMATS)):
        for value, times in Counter(values).items():
            if value not in known:
                raise UserError(f"{what} '{value}': unknown; known: {', '.join(known)}")
            if times > 1:
                raise UserError(f"{what} '{value}': given twice")
    if not tasks:
        raise UserError(f"no task: name some of {', '.join(TASKS)}")
    if not protocols:
        raise UserError(f"no protocol: name one of {', '.join(score.PROTOCOLS)}")
    if str(out) in ("", "."):  # Path("") is "."
        raise UserError("out: name the folder for the tasks")


def _special_tokens(words: PreTrainedTokenizerBase, prompts: Sequence[score.Prompt]) -> str:
    """The model argument with which the harness gives prompts the ids that we give them; "" where none is needed."""
    opening = str(words.decode(words.bos_token_id if words.bos_token_id is not None else words.eos_token_id))
    # By itself the harness adds the tokenizer's special tokens, but none to a text that begins with bos.
    if all(words(p.text, add_special_tokens=not p.text.startswith(opening))["input_ids"] == p.ids for p in prompts):
        return ""
    if all(words(p.text, add_special_tokens=False)["input_ids"] == p.ids for p in prompts):
        return ",add_bos_token=False"
    raise UserError(
        "lm-evaluation-harness would give this tokenizer's prompts other token ids than panda does: choose another"
        " --chat-format"
    )


def _frame(name: str, split: str, lead: str) -> dict[str, Any]:
    """What all tasks have. The file's path is relative to where the harness is started: to the tasks' folder."""
    return {
        "task": name,
        "tag": "panda",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: f"{name}.jsonl"}},
        "test_split": split,
        "num_fewshot": 0,
        "doc_to_text": "prompt",
        "target_delimiter": lead,
    }


def _how(
    name: str, protocol: str, questions: Sequence[Question], words: PreTrainedTokenizerBase, folder: Path
) -> dict[str, Any]:
    """How a protocol's answer is read off."""
    if protocol == "generate":
        filters = [{"function": "regex", "regex_pattern": _pattern(name, questions)}, {"function": "take_first"}]
        limits = {"until": _marks(words), "do_sample": False, "max_gen_toks": score.MAX_NEW_TOKENS}
        # What the model's own generation config asks for besides would hold in the harness.
        limits |= {key: generation.PLAIN[key] for key in generation.not_plain(models.generation_config(folder))}
        return {
            "output_type": "generate_until",
            "generation_kwargs": limits,
            "doc_to_target": "answer",
            "filter_list": [{"name": "first-letter", "filter": filters}],
            "metric_list": [_mean("exact_match")],
        }
    return {
        "output_type": "multiple_choice",
        "doc_to_choice": "letters" if protocol == "choice" else "options",
        "doc_to_target": "gold",
        "metric_list": [_mean("acc")] if protocol == "choice" else [_mean("acc"), _mean("acc_norm")],
    }


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _marks(words: PreTrainedTokenizerBase) -> list[str]:
    """The end marks of the tokenizer's template; eos and those of the model's own list the harness knows."""
    template, vocabulary = str(words.chat_template or ""), words.get_vocab()
    return [mark for mark in dict.fromkeys(prompt.END_MARKS.values()) if mark in template and mark in vocabulary]


def _pattern(name: str, questions: Sequence[Question]) -> str:
    """tasks.parse_letter's pattern, which the harness can't choose question by question."""
    last = {letter(max(len(q.options), 4) - 1) for q in questions}
    if len(last) > 1:
        raise UserError(
            f"{name}: its questions are read by different letters (A-{' and A-'.join(sorted(last))}), and the harness"
            " has one pattern a task: leave generate out"
        )
    return f"[A-{last.pop()}]"


def _record(asked: variants.Asked, read: score.Prompt) -> str:
    question = asked.question
    record = {
        "id": question.id,
        "wording": asked.wording,
        "prompt": read.text,
        "letters": [letter(i) for i in range(len(question.options))],
        "options": list(question.options),
        "gold": question.gold,
        "answer": letter(question.gold),
        "truncated": read.truncated,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def _command(out: Path, names: Sequence[str], model_args: str) -> str:
    return (
        f"cd {shlex.quote(str(out.absolute()))} && lm-eval run --model hf --model_args {shlex.quote(model_args)}"
        f" --include_path . --tasks {','.join(names)} --batch_size 8"
    )
