"""The demo's report: what conf/demo/run.sh left in its folder, on one self-contained page and in Markdown."""

from __future__ import annotations

import base64
import html
import json
import os
from pathlib import Path
from typing import Any

from pandallm import files, log
from pandallm.evaluate import report as figures

WHEN = ("before", "after")
COLOURS = {"before": "tab:gray", "after": "tab:green"}


def run(runs: Path) -> None:
    """Writes RUNS/report.html and RUNS/report.md from the stages' own files."""
    results = {when: files.read_json(runs / "eval" / when / "results.json") for when in WHEN}
    bits = {when: _bits(results[when]) for when in WHEN}
    _bits_chart(bits, runs / "bits.png")
    _accuracy_chart(results, runs / "accuracy.png")
    sections = _sections(runs, results, bits)
    files.write_text(runs / "report.md", _markdown(sections))
    files.write_text(runs / "report.html", _html(sections, runs))
    log.say(f"{runs / 'report.html'}: held-out bits per character {_change(bits)}")


def _bits(results: dict[str, Any]) -> dict[str, float]:
    """Bits per character of each held-out text, and of them all together."""
    texts = results["bits_per_character"]
    values = {Path(name).stem: e["bits_per_character"] for name, e in texts.items()}
    values["all"] = sum(e["bits"] for e in texts.values()) / sum(e["characters"] for e in texts.values())
    return values


def _change(bits: dict[str, dict[str, float]]) -> str:
    before, after = bits["before"]["all"], bits["after"]["all"]
    return f"{before:.3f} -> {after:.3f} ({100 * (after / before - 1):+.1f} %)"


Table = list[list[str]]
Groups = dict[str, list[tuple[float, list[float] | None]]]  # (value, interval) before and after
Section = tuple[str, list[str | Table | Path]]  # title; paragraphs, tables and pictures


def _sections(runs: Path, results: dict[str, Any], bits: dict[str, dict[str, float]]) -> list[Section]:
    record = files.read_json(runs / "sft" / "run.json")
    delta = files.read_json(runs / "delta_verify.json")
    made = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return [
        ("Held-out bits per character 留出文本每字比特数", [
            f"All held-out articles together: {_change(bits)}. Lower is better; the model never saw these texts.",
            _bits_table(bits), runs / "bits.png",
        ]),
        ("Accuracy before and after 训练前后的准确率", [
            "A few questions a task, written for this demo: the 95 % intervals (Wilson) are wide, and a model of 135M"
            f" parameters is near chance on such questions. Chance: {_chance(runs)}.",
            _accuracy_table(results), runs / "accuracy.png",
        ]),
        ("Loss 训练损失", [runs / "pretrain" / "loss.png", runs / "sft" / "loss.png", _training_table(runs)]),
        ("Delta 差分权重", [
            f"{delta['bytes'] / 1e6:.1f} MB, {100 * delta['ratio']:.1f} % of the tuned model's"
            f" {delta['tuned_bytes'] / 1e6:.1f} MB. Base + delta = tuned, bit for bit: verified over"
            f" {delta['tensors']} tensors. The figures after training are those of the applied delta.",
        ]),
        ("Sample answers 回答示例", [
            "Decoded greedily with a repetition penalty of 1.05, at most 80 tokens: a taste, not a measure.",
            _talk_table(runs),
        ]),
        ("Data 数据", [_data_table(runs)]),
        ("Time 用时", [
            f"Wall-clock seconds of the run that finished each stage, on {os.cpu_count()} cores.", _time_table(runs),
        ]),
        ("Made with 版本", [f"{made}; commit {record['commit'] or 'unknown'}."]),
    ]  # fmt: skip


def _bits_table(bits: dict[str, dict[str, float]]) -> Table:
    rows = [["text", "before", "after", "change"]]
    for name, before in bits["before"].items():
        after = bits["after"][name]
        rows.append([name, f"{before:.3f}", f"{after:.3f}", f"{100 * (after / before - 1):+.1f} %"])
    return rows


def _percent(entry: dict[str, Any]) -> str:
    low, high = entry["ci95"]
    return f"{100 * entry['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _accuracy_table(results: dict[str, Any]) -> Table:
    rows = [["task", "protocol", "questions", "before, % (95 %)", "after, % (95 %)", "no letter before", "after"]]
    before, after = (figures.entries(results[when]) for when in WHEN)
    for (task, protocol), b in before.items():
        a = after[task, protocol]
        rows.append([task, protocol, str(b["n"]), _percent(b), _percent(a), str(b["no_letter"]), str(a["no_letter"])])
    return rows


def _chance(runs: Path) -> str:
    """Accuracy of guessing evenly, from the numbers of options in the prompts."""
    odds: dict[str, list[float]] = {}
    for line in (runs / "eval" / "before" / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "log_likelihoods" in row:
            odds.setdefault(row["task"], []).append(1 / len(row["log_likelihoods"]))
    return ", ".join(f"{task} {100 * sum(o) / len(o):.1f} %" for task, o in odds.items())


def _training_table(runs: Path) -> Table:
    rows = [["stage", "steps", "trained tokens", "first loss", "last loss", "tokens/s (median)", "seconds"]]
    for stage in ("pretrain", "sft"):
        metrics = log.read_metrics(runs / stage / "metrics.jsonl")
        speed = sorted(m["tokens_per_s"] for m in metrics)[len(metrics) // 2]
        rows.append([
            stage, str(len(metrics)), f"{sum(m['tokens'] for m in metrics):,}", f"{metrics[0]['loss']:.3f}",
            f"{metrics[-1]['loss']:.3f}", f"{speed:.0f}", f"{sum(m['seconds'] for m in metrics):.0f}",
        ])  # fmt: skip
    return rows


def _talk_table(runs: Path) -> Table:
    """Questions with both answers, from the transcripts of `panda chat`."""
    answers: list[list[str]] = []
    questions: list[str] = []
    for when in WHEN:
        exchanges = (runs / f"chat_{when}.txt").read_text(encoding="utf-8").split("你> ")[1:]
        pairs = [e.split("\n", 1) for e in exchanges if e.strip() and not e.startswith("/")]
        questions = [question for question, _ in pairs]
        answers.append([answer.strip() for _, answer in pairs])
    return [["question", *WHEN], *(list(row) for row in zip(questions, *answers, strict=True))]


def _data_table(runs: Path) -> Table:
    rows = [["stage", "source", "records read", "kept", "dropped", "documents", "tokens", "trained tokens"]]
    for stage in ("pretrain", "sft"):
        for s in files.read_json(runs / "shards" / stage / "manifest.json")["sources"]:
            dropped = ", ".join(f"{cause} {n}" for cause, n in s["dropped"].items()) or "0"
            counts = [f"{s[key]:,}" for key in ("documents", "tokens", "trained_tokens")]
            rows.append([stage, s["name"], str(s["read"]), str(s["kept"]), dropped, *counts])
    return rows


def _time_table(runs: Path) -> Table:
    times = {path.name: int(path.read_text()) for path in sorted((runs / "times").iterdir(), key=os.path.getmtime)}
    return [["stage", "seconds"], *([name, str(s)] for name, s in times.items()), ["all", str(sum(times.values()))]]


def _bits_chart(bits: dict[str, dict[str, float]], path: Path) -> None:
    groups: Groups = {name: [(bits[when][name], None) for when in WHEN] for name in bits["before"]}
    _bars(groups, "bits per character", path)


def _accuracy_chart(results: dict[str, Any], path: Path) -> None:
    entries = [figures.entries(results[when]) for when in WHEN]
    groups: Groups = {
        f"{task}\n{protocol}": [(100 * e[task, protocol]["accuracy"], e[task, protocol]["ci95"]) for e in entries]
        for task, protocol in entries[0]
    }
    _bars(groups, "accuracy, %, with 95 % interval", path)


def _bars(groups: Groups, label: str, path: Path) -> None:
    """A bar before and after for each group; an interval is given as shares."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=120)
    for i, when in enumerate(WHEN):
        values = [group[i][0] for group in groups.values()]
        intervals = [group[i][1] for group in groups.values()]
        errors = None
        if any(intervals):
            errors = [
                [max(0.0, v - 100 * c[0]) for v, c in zip(values, intervals, strict=True) if c],
                [max(0.0, 100 * c[1] - v) for v, c in zip(values, intervals, strict=True) if c],
            ]
        at = [n + (i - 0.5) * 0.38 for n in range(len(groups))]
        axes.bar(at, values, 0.36, yerr=errors, capsize=3, label=when, color=COLOURS[when])
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel(label)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    axes.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    with files.atomic_file(path) as tmp:
        figure.savefig(tmp, format="png")
    plt.close(figure)


TITLE = "pandallm demo: SmolLM2-135M taken to Chinese"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


def _markdown(sections: list[Section]) -> str:
    out = [f"# {TITLE}"]
    for title, blocks in sections:
        out.append(f"## {title}")
        for block in blocks:
            if isinstance(block, str):
                out.append(block)
            elif isinstance(block, Path):
                out.append(f"![{block.stem}]({'/'.join(block.parts[2:])})")
            else:
                rows = ["| " + " | ".join(_cell(text) for text in row) + " |" for row in block]
                out.append("\n".join([rows[0], "|" + " --- |" * len(block[0]), *rows[1:]]))
    return "\n\n".join(out) + "\n"


STYLE = (
    "body{font:15px/1.6 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:left;"
    "vertical-align:top;white-space:pre-wrap}th{background:#f3f3f3}img{max-width:100%}h2{margin-top:2rem}"
)


def _html(sections: list[Section], runs: Path) -> str:
    out = [
        f'<!doctype html><html lang="zh"><meta charset="utf-8"><title>{TITLE}</title><style>{STYLE}</style>',
        f"<h1>{TITLE}</h1>",
    ]
    for title, blocks in sections:
        out.append(f"<h2>{html.escape(title)}</h2>")
        for block in blocks:
            if isinstance(block, str):
                out.append(f"<p>{html.escape(block)}</p>")
            elif isinstance(block, Path):
                picture = base64.b64encode(block.read_bytes()).decode()
                out.append(f'<img alt="{html.escape(block.stem)}" src="data:image/png;base64,{picture}">')
            else:
                head, *rows = ["".join(f"<td>{html.escape(cell.strip())}</td>" for cell in row) for row in block]
                body = "".join(f"<tr>{row}</tr>" for row in rows)
                out.append(f"<table><tr>{head.replace('td>', 'th>')}</tr>{body}</table>")
    return "\n".join([*out, "</html>"]) + "\n"
