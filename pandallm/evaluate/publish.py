"""`panda eval report`: evaluations on one page, beside what the original published, and every answer to look through.

OUT/report.md and OUT/report.html say the same; the page also has all predictions, with filters. It needs no other file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pandallm import files, log
from pandallm.config import UserError
from pandallm.evaluate import charts, page, report, runs
from pandallm.evaluate.report import Cells, Entry, Row, percent

# The original's table, in its order: tasks, then models with their accuracies in %. All with the protocol generate on
# the test splits (RECIPE section 5).
TASKS = {"logiqa-v2": "LogiQA-v2", "c3-d": "C3-d", "c3-m": "C3-m"}
PUBLISHED = {
    "belle-llama-ext-7b": (26.41, 29.52, 28.87),
    "Linly-Chinese-LLaMA-7b-hf": (25.91, 32.28, 34.52),
    "Panda-7B": (27.41, 43.02, 43.66),
    "Panda-Instruct-7B, step 2000": (26.22, 39.05, 42.11),
    "Panda-Instruct-7B, step 3000": (26.22, 39.05, 42.11),
    "Panda-Instruct-7B, step 6000": (30.30, 47.14, 56.94),
    "Panda-Instruct-7B, step 9000": (31.93, 47.30, 57.04),
}
_STEP = re.compile(r"step-(\d{8})")
Key = tuple[str, str]  # task, protocol


@dataclass(frozen=True)
class Run:
    """A finished evaluation. `series` and `step`: the training run and step where the model is a checkpoint."""

    folder: Path
    label: str
    results: dict[str, Any]
    rows: dict[Key, list[Row]]
    entries: dict[Key, Entry]
    series: str
    step: int | None


Section = tuple[str, list[str | Cells | Path]]  # title; paragraphs, tables and pictures


def write(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Writes report.md, report.html and the pictures to OUT; returns {"runs", "predictions", "files"}.

    A folder is an evaluation's, or holds those of a run's checkpoints as step-XXXXXXXX. Raises UserError: a folder is
    neither, the same one twice, figures that the predictions don't give, OUT can't be written.
    """
    found = [_read(folder) for folder in _expanded(folders)]
    found = _labelled(_in_order(found))
    try:
        sections = _sections(found, out)
        title = "Evaluation: " + ", ".join(dict.fromkeys(run.label for run in found))
        title = title if len(title) < 100 else f"Evaluation of {len(found)} models"
        files.write_text(out / "report.md", page.markdown(title, sections))
        rows = [(run.label, row) for run in found for some in run.rows.values() for row in some]
        files.write_text(out / "report.html", page.html(title, sections, rows))
    except OSError as e:
        raise UserError(f"{out}: the report can't be written there: {e.strerror}; choose another --out") from None
    log.say(f"{out / 'report.html'}: {len(found)} evaluations, {len(rows):,} predictions")
    names = [name for name in ("report.md", "report.html", *PICTURES) if (out / name).exists()]
    return {"runs": [str(run.folder) for run in found], "predictions": len(rows), "files": names}


PICTURES = ("accuracy.png", "steps.png")


def _expanded(folders: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for folder in folders:
        inner = sorted(path.parent for path in folder.glob("step-*/results.json"))
        if not (folder / "results.json").exists() and inner:
            found += inner
            for other in sorted(set(folder.glob("step-*")) - set(inner)):
                log.warn(f"{other}: its evaluation isn't finished: left out")
        elif (folder / "run.json").exists() and not (folder / "results.json").exists():
            raise UserError(f"{folder}: a training run; evaluate it first: panda eval --checkpoints {folder} --out DIR")
        else:
            found.append(folder)
    if not found:
        raise UserError("nothing to report: name the folders of finished evaluations")
    for i, folder in enumerate(found):
        if folder.resolve() in [other.resolve() for other in found[:i]]:
            raise UserError(f"{folder}: given twice")
    return found


def _read(folder: Path) -> Run:
    results, rows = runs.results(folder), runs.predictions(folder)
    entries = {}
    for key, told in report.entries(results).items():
        if key not in rows:
            raise UserError(f"{folder / 'predictions.jsonl'}: has no line of {' by '.join(key)}; evaluate again")
        # Counted again, so that figures are there that an older version did not write.
        entries[key] = told | report.summary(rows[key], key[1])
        if abs(entries[key]["accuracy"] - told["accuracy"]) > 1e-9:
            raise UserError(
                f"{folder}: results.json and predictions.jsonl disagree on {' by '.join(key)}; evaluate again"
            )
    if not entries:
        raise UserError(f"{folder}: has no task's figures; bits per character alone make no report")
    model = str(results.get("model", folder))
    named, placed = _STEP.search(model), _STEP.fullmatch(folder.resolve().name)
    step = named or placed
    series = model[: named.start()] if named else str(folder.resolve().parent)
    if placed:  # `panda eval --checkpoints` puts all of a run into one folder, its finished model too
        series = str(folder.resolve().parent)
    rows = {key: rows[key] for key in entries}
    return Run(folder, model, results, rows, entries, series if step else "", int(step[1]) if step else None)


def _in_order(found: list[Run]) -> list[Run]:
    """Checkpoints of a run by step, where the first of them was given; all else as given."""
    first = {run.series: i for i, run in reversed(list(enumerate(found)))}
    places = {id(run): (first[run.series], run.step, i) if run.series else (i, 0, i) for i, run in enumerate(found)}
    return sorted(found, key=lambda run: places[id(run)])


def _labelled(found: list[Run]) -> list[Run]:
    """Short names, different for every run."""
    labels = []
    for run in found:
        path = Path(run.label)
        parts = [p for p in path.parts if not _STEP.fullmatch(p) and p not in ("model", "checkpoints", "/")]
        name = "/".join(parts[-2:]) if path.is_absolute() or len(path.parts) > 2 else run.label
        labels.append(f"{name}, step {run.step}" if run.step is not None else name)
    for i, run in enumerate(found):
        label = labels[i] if labels.count(labels[i]) == 1 else f"{labels[i]} ({run.folder})"
        found[i] = Run(run.folder, label, run.results, run.rows, run.entries, run.series, run.step)
    return found


def _sections(found: list[Run], out: Path) -> list[Section]:
    keys = list(dict.fromkeys(key for run in found for key in run.entries))
    out.mkdir(parents=True, exist_ok=True)
    for name in PICTURES if (out / "report.html").exists() else ():  # of an earlier report
        (out / name).unlink(missing_ok=True)
    sections = [_overview(found, keys, out), _steps(found, keys, out), _comparison(found)]
    sections += [_details(found), _wordings(found), _positions(found), _subjects(found), _bits(found), _made(found)]
    return [section for section in sections if len(section[1])]


def _figure(entry: Entry) -> str:
    spread = f" ± {percent(entry['accuracy_std'])}" if len(entry["wordings"]) > 1 else ""
    return f"{percent(entry['accuracy'])}{spread} ({report.interval(entry['ci95'], '.1f')})"


def _overview(found: list[Run], keys: list[Key], out: Path) -> Section:
    """The original's table, its rows first, and bars of ours."""
    tasks = [*TASKS, *dict.fromkeys(task for task, _ in keys if task not in TASKS)]
    lines = [["model", "protocol", *(TASKS.get(task, task) for task in tasks)]]
    empty = [""] * (len(tasks) - len(TASKS))
    for model, values in PUBLISHED.items():
        lines.append([f"{model} (published)", "generate", *(f"{value:.2f}" for value in values), *empty])
    for run in found:
        for protocol in dict.fromkeys(protocol for _, protocol in run.entries):
            shown = [_figure(run.entries[t, protocol]) if (t, protocol) in run.entries else "" for t in tasks]
            lines.append([run.label, protocol, *shown])
    last = {run.series: run for run in found if run.series}
    drawn = [run for run in found if not run.series or last[run.series] is run]
    chances: dict[str, float] = {}
    groups: dict[str, dict[str, charts.Figure95]] = {}
    for task in dict.fromkeys(task for task, _ in keys):
        groups[task] = {
            f"{run.label}, {key[1]}": _interval(entry)
            for run in drawn for key, entry in run.entries.items() if key[0] == task
        }  # fmt: skip
        known = [e["chance"] for run in drawn for key, e in run.entries.items() if key[0] == task and "chance" in e]
        chances |= {task: known[0]} if known else {}
    charts.bars({task: group for task, group in groups.items() if group}, chances, out / "accuracy.png")
    text = (
        "Accuracy in %, and its 95 % interval (Wilson) over questions; with several wordings their mean ± standard"
        " deviation. The published figures are the original's, on the test splits, in one wording; compare with them"
        " only what was asked in the same way (see the end)."
    )
    return "Accuracy", [text, lines, out / "accuracy.png"]


def _interval(entry: Entry) -> charts.Figure95:
    return charts.Figure95(entry["accuracy"], *entry["ci95"])


def _steps(found: list[Run], keys: list[Key], out: Path) -> Section:
    """Accuracy by step, for training runs of which several checkpoints were evaluated."""
    series: dict[str, list[Run]] = {}
    for run in found:
        if run.series:
            series.setdefault(run.series, []).append(run)
    series = {name: some for name, some in series.items() if len(some) > 1}
    blocks: list[str | Cells | Path] = []
    panels: dict[str, dict[str, dict[int, charts.Figure95]]] = {}
    for some in series.values():
        name = some[0].label.split(", step ")[0]
        table = [["step", *(" ".join(key) for key in keys)]]
        for run in some:
            table.append([str(run.step), *(_figure(run.entries[k]) if k in run.entries else "" for k in keys)])
        blocks += [f"Checkpoints of {name}", table]
        for key in keys:
            label = f"{name}, {key[1]}" if len(series) > 1 else key[1]
            points = {run.step or 0: _interval(run.entries[key]) for run in some if key in run.entries}
            panels.setdefault(key[0], {}).update({label: points} if points else {})
    panels = {task: lines for task, lines in panels.items() if lines}
    if panels:
        charts.curves(panels, out / "steps.png")
        blocks.append(out / "steps.png")
    return "Accuracy by step", blocks


def _comparison(found: list[Run]) -> Section:
    """Every run against the first that has a task and a protocol of its; of a run's checkpoints only the last."""
    blocks: list[str | Cells | Path] = []
    last = {run.series: run for run in found if run.series}
    for i, run in enumerate(found):
        first = next((other for other in found[:i] if other.entries.keys() & run.entries.keys()), None)
        if first is None or (run.series and last[run.series] is not run):
            continue
        try:
            figures = runs.compare(first.folder, run.folder)
        except UserError as e:
            blocks.append(f"{run.label} can't be compared with {first.label}: {e}")
            continue
        blocks += [f"A: {first.label}; B: {run.label}.", report.comparison_cells(figures)]
        blocks += report.verdicts(figures)
    return "Compared with the first", blocks


def _details(found: list[Run]) -> Section:
    text = (
        "Position bias: how much of the answers would have to move to another position for each to be said as often as"
        " it is right (total variation, %). No letter: answers in which no option is named; they count as wrong."
    )
    return "All figures", [
        text,
        *(block for run in found for block in (run.label, report.cells(run.results | {"tasks": _nested(run)}))),
    ]


def _nested(run: Run) -> dict[str, Any]:
    """The counted figures, laid out as in results.json."""
    tasks: dict[str, Any] = {}
    for (task, protocol), entry in run.entries.items():
        entry = {key: value for key, value in entry.items() if key != "protocols"}
        if task in tasks:
            tasks[task].setdefault("protocols", {})[protocol] = entry
        else:
            tasks[task] = entry
    return tasks


def _wordings(found: list[Run]) -> Section:
    lines = [["model", "task", "protocol", "wording", "accuracy %"]]
    for run in found:
        for (task, protocol), entry in run.entries.items():
            if len(entry["wordings"]) > 1:
                lines += [[run.label, task, protocol, w["wording"], percent(w["accuracy"])] for w in entry["wordings"]]
    return "By wording", [lines] if len(lines) > 1 else []


def _positions(found: list[Run]) -> Section:
    heads = ["model", "task", "protocol", "options", "rows", "answered, %", "right, %", "accuracy where right, %"]
    lines = [heads]
    for run in found:
        for (task, protocol), entry in run.entries.items():
            for options, e in entry.get("position_bias", {}).get("by_options", {}).items():
                shares = (_shares(e[key]) for key in ("answered", "gold", "accuracy"))
                lines.append([run.label, task, protocol, options, str(e["rows"]), *shares])
    text = "By position A, B, …: how often it was answered, how often it was right, and the accuracy where it was."
    return "By position of the option", [text, lines] if len(lines) > 1 else []


def _shares(values: Sequence[float | None]) -> str:
    return " / ".join("–" if value is None else f"{100 * value:.0f}" for value in values)


def _subjects(found: list[Run]) -> Section:
    lines = [["model", "task", "protocol", "subject", "n", "accuracy %"]]
    for run in found:
        for (task, protocol), entry in run.entries.items():
            ids = {(row.get("subject"), row["id"]) for row in run.rows[task, protocol]}
            n = Counter(subject for subject, _ in ids)
            for name, accuracy in entry.get("subjects", {}).items():
                lines.append([run.label, task, protocol, name, str(n[name]), percent(accuracy)])
    return "By subject", [lines] if len(lines) > 1 else []


def _bits(found: list[Run]) -> Section:
    """Bits per character of texts, a column each."""
    texts = list(dict.fromkeys(name for run in found for name in run.results.get("bits_per_character", {})))
    lines = [["model", *texts]]
    for run in found:
        told = run.results.get("bits_per_character", {})
        lines.append([run.label, *(f"{told[t]['bits_per_character']:.4f}" if t in told else "" for t in texts)])
    return "Bits per character", ["Lower is better.", lines] if texts else []


def _made(found: list[Run]) -> Section:
    heads = ["model", "name", "split", "limit", "chat format", "shots", "orders", "precision", "backend"]
    lines = [[*heads, "device", "seconds", "commit", "folder"]]
    for run in found:
        given, entry = run.results.get("arguments", {}), next(iter(run.entries.values()))
        what = (
            *(run.results.get("model"), entry.get("split"), given.get("limit") or "all", entry.get("chat_format")),
            *(entry.get("shots"), entry.get("permute"), run.results.get("precision"), given.get("backend")),
            *(run.results.get("device"), run.results.get("seconds")),
            *((run.results.get("commit") or "")[:10] or "unknown", run.folder),
        )
        lines.append([run.label, *("" if value is None else str(value) for value in what)])
    return "How they were made", [lines]
