"""`panda data stats`: what became of the corpora, as text, as figures, as a picture and as one self-contained page.

The counts are the manifest's; lengths and the rows' use are counted again from the rows, and must agree with it.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len, set_cell_size

from pandallm import files
from pandallm.config import UserError
from pandallm.data import shards
from pandallm.data.shards import Shards

Figures = dict[str, Any]
Cells = list[list[str]]

BLOCK_ROWS = 1 << 15  # rows looked at together
WIDTH = 100  # columns of a terminal
WORDS = ("source", "cause", "what", "item")  # columns that hold no numbers
NAME_CELLS = 20  # longer names are cut in the terminal and the picture; the page has them whole
ITEMS_SHOWN = 20  # the figures have all
HITS_SHOWN = 100  # on the page; report.json has all
BINS_PER_OCTAVE = 4
ROW_BINS = 20
# What comes after a part's records are read and cleaned, in its order: the causes before it stand first in the funnel.
LATE_CAUSES = ("contaminated", "too_long", "duplicate", "near_duplicate", "not_sampled")
FONTS = (  # with Chinese, if one is installed
    *("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Micro Hei"),
    *("WenQuanYi Zen Hei", "SimHei", "Microsoft YaHei", "PingFang SC", "Hiragino Sans GB", "Noto Sans CJK JP"),
)
UNREADABLE = {c: f"\\x{c:02x}" for c in (*range(32), *range(0x7F, 0xA0)) if chr(c) not in "\n\t"}
UNREADABLE |= {c: f"\\u{c:04x}" for c in range(0xD800, 0xE000)}  # halves of characters: no file can hold them


def run(folder: str, out: Path | None = None) -> Figures:
    """Writes stats.html and stats.png to `out` (the shards' own folder if None); returns the figures in them.

    UserError: no shards there, damaged ones, or `out` can't be written.
    """
    data = Shards(folder)
    report = read_report(data)
    figures = _figures(data, report)
    picture = _chart(figures)
    out = out or data.folder
    page = _page(figures, report, data.manifest["config"], picture)
    try:
        with files.atomic_file(out / "stats.png") as tmp:
            tmp.write_bytes(picture)
        files.write_text(out / "stats.html", page)
    except OSError as e:
        raise UserError(f"{out}: the report can't be written there: {e.strerror}") from None
    return figures | {"files": [str(out / "stats.html"), str(out / "stats.png")]}


def read_report(data: Shards) -> dict[str, Any]:
    """report.json: {"samples": {source: {cause: [sample]}}, "contamination": [hit]}. UserError if it is damaged."""
    path = data.folder / "report.json"
    try:
        report: dict[str, Any] = files.read_json(path)
        report["samples"], report["contamination"]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"{path}: damaged; prepare the shards again") from None
    return report


def readable(text: str) -> str:
    """Text for people, in which no character of a corpus can steer a terminal or break a file."""
    return text.translate(UNREADABLE)


def _counts(data: Shards) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many documents of each source have each length [sources, seq_len + 1], repeats included, and how many rows
    hold each number of tokens [seq_len + 1]. Holds 2 or 4 bytes a document."""
    names = [source["name"] for source in data.manifest["sources"]]
    source_of = np.array([names.index(part["source"]) for part in data.parts])
    paths = [data.folder / f"parts/{part['name']}.documents.bin" for part in data.parts]
    first = np.cumsum([0, *(path.stat().st_size // shards.DOCUMENT.itemsize for path in paths)])
    lengths = np.empty(int(first[-1]), np.min_scalar_type(data.seq_len + 1))
    for path, begin, end in zip(paths, first[:-1], first[1:], strict=True):
        lengths[begin:end] = np.minimum(np.fromfile(path, shards.DOCUMENT)["length"], data.seq_len + 1)
    sizes = shards.read_flat(data.folder / "rows.sizes.bin", "<u4")
    numbers = shards.read_flat(data.folder / "rows.documents.bin", "<u4")
    bins = data.seq_len + 2  # the last one: more than a row holds
    by_length, by_use = np.zeros(len(names) * bins, np.int64), np.zeros(bins, np.int64)
    at, sound = 0, int(sizes.sum(dtype=np.int64)) == len(numbers)
    for begin in range(0, len(sizes) if sound else 0, BLOCK_ROWS):
        size = sizes[begin : begin + BLOCK_ROWS]
        some = numbers[at : at + int(size.sum(dtype=np.int64))]
        at += len(some)
        if sound := bool((some < len(lengths)).all()):
            found = lengths[some].astype(np.int64)
            source = source_of[np.searchsorted(first, some, side="right") - 1]
            by_length += np.bincount(source * bins + found, minlength=len(by_length))
            used = np.bincount(np.repeat(np.arange(len(size)), size), found, len(size)).astype(np.int64)
            by_use += np.bincount(np.minimum(used, bins - 1), minlength=bins)
    table = by_length.reshape(len(names), bins)
    counted = [(int(row.sum()), int(row @ np.arange(bins))) for row in table]
    promised = [(source["documents"], source["tokens"]) for source in data.manifest["sources"]]
    if counted != promised or table[:, -1].any() or by_use[-1]:
        raise UserError(f"{data.folder}: damaged: the rows don't hold what the manifest says; prepare the shards again")
    return table[:, :-1], by_use[:-1]


def _figures(data: Shards, report: dict[str, Any]) -> Figures:
    lengths, used = _counts(data)
    manifest = data.manifest
    edges = _edges(data.seq_len)
    sources = [
        source | {"dropped_total": sum(source["dropped"].values()), "lengths": _summary(counts, edges)}
        for source, counts in zip(manifest["sources"], lengths, strict=True)
    ]
    summed = ("read", "kept", "dropped_total", "documents", "tokens", "trained_tokens")
    total = {key: sum(source[key] for source in sources) for key in summed}
    rows = _summary(used, [math.floor(data.seq_len * i / ROW_BINS) for i in range(ROW_BINS + 1)])
    return {
        "shards": str(data.folder),
        "rows": manifest["rows"],
        "seq_len": data.seq_len,
        "utilisation": manifest["utilisation"],
        "chat_format": manifest["chat_format"],
        "sources": sources,
        "total": total | {"repeats": max(source["repeats"] for source in sources)},
        "row_tokens": rows,
        "contamination": _contamination(manifest, report["contamination"]),
        "fingerprint": manifest["fingerprint"],
    }


def _edges(seq_len: int) -> list[int]:
    """Borders of lengths, evenly apart on a logarithmic axis, the last one `seq_len`; a bin has its upper border."""
    steps = range(math.ceil(BINS_PER_OCTAVE * math.log2(seq_len)) + 1)
    return sorted({0, *(math.floor(seq_len * 2 ** (-step / BINS_PER_OCTAVE)) for step in steps)})


def _summary(counts: NDArray[np.int64], edges: list[int]) -> dict[str, Any]:
    """Mean and quantiles of values counted by their size, and how many lie above one edge and not above the next."""
    up_to = np.cumsum(counts)
    total = int(up_to[-1])

    def quantile(q: float) -> int:
        return int(np.searchsorted(up_to, max(1, math.ceil(q * total)))) if total else 0

    return {
        "mean": round(float(counts @ np.arange(len(counts))) / total, 1) if total else 0.0,
        **{"least": quantile(0), "median": quantile(0.5), "p90": quantile(0.9), "most": quantile(1)},
        "histogram": {"edges": edges, "counts": np.diff(up_to[edges]).tolist()},
    }


def _contamination(manifest: dict[str, Any], hits: list[dict[str, Any]]) -> dict[str, Any]:
    """How many records hold an evaluation item or only touch one, and which items those are, worst first."""
    items: dict[str, dict[str, Any]] = {}
    for hit in hits:
        item = items.setdefault(hit["item"], dict.fromkeys(("dropped", "touching"), 0) | {"item": hit["item"]})
        item["dropped" if hit["dropped"] else "touching"] += 1
        for share in ("item_share", "text_share"):
            item[share] = max(item.get(share, 0.0), hit[share])
    return {
        "looked_for": list(manifest["config"]["decontaminate"]),
        "dropped": sum(source["dropped"].get("contaminated", 0) for source in manifest["sources"]),
        "touching": sum(not hit["dropped"] for hit in hits),  # those listed: of a part, the worst
        "items": sorted(items.values(), key=lambda i: (-i["dropped"], -max(i["item_share"], i["text_share"]))),
    }


def funnel(source: dict[str, Any]) -> list[tuple[str, int, int]]:
    """(cause, records dropped, records left) of each step a source's records pass, in the order of the work."""
    left, steps = source["read"], []
    rank = {cause: i + 1 for i, cause in enumerate(LATE_CAUSES)}
    for cause, n in sorted(source["dropped"].items(), key=lambda item: rank.get(item[0], 0)):
        left -= n
        steps.append((cause, n, left))
    return steps


def _short(n: int) -> str:
    """A number in at most 7 columns."""
    if n < 1_000_000:
        return f"{n:,}"
    step = min(4, (len(f"{float(f'{n:.4g}'):.0f}") - 1) // 3)
    return f"{n / 1000**step:.4g}{' kMGT'[step]}"


def _tables(figures: Figures, number: Callable[[int], str]) -> list[tuple[str, Cells]]:
    """(title, rows under a head) of each table; where there is nothing to list, a title that says so and no rows."""
    sources, total, found = figures["sources"], figures["total"], figures["contamination"]
    keys = ("read", "kept", "dropped_total", "documents", "tokens", "trained_tokens")
    rows = [
        [
            s["name"],
            *(number(s[key]) for key in keys),
            f"{100 * s['share']:.1f}",
            f"{s['epochs']:.4g}",
            f"{s['repeats']}",
        ]
        for s in sources
    ]
    rows.append(["total", *(number(total[key]) for key in keys), "", "", str(total["repeats"])])
    lengths = [[s["name"], *(f"{s['lengths'][k]:,}" for k in ("mean", "median", "p90", "most"))] for s in sources]
    dropped = [[s["name"], cause, f"{n:,}", f"{100 * n / s['read']:.2f}"] for s in sources for cause, n, _ in funnel(s)]
    changed = [[s["name"], note, f"{n:,}"] for s in sources for note, n in s["changed"].items()]
    items = [
        [i["item"], str(i["dropped"]), str(i["touching"]), *(f"{100 * i[k]:.1f}" for k in ("item_share", "text_share"))]
        for i in found["items"][:ITEMS_SHOWN]
    ]
    touched = (
        f"Evaluation items: {len(found['items']):,}{', the worst below' if len(found['items']) > ITEMS_SHOWN else ''};"
        f" records that hold one (dropped): {found['dropped']:,}, that only touch one: {found['touching']:,} listed"
        if found["looked_for"]
        else "Evaluation items were not looked for: the config's `decontaminate` names none"
    )
    tables = [
        ("Records", "source|read|kept|dropped|documents|tokens|trained|share%|epochs|repeats", rows),
        ("Tokens a document", "source|mean|median|90%|longest", lengths),
        ("Dropped" if dropped else "No record was dropped", "source|cause|records|% of read", dropped),
        ("Changed, not dropped" if changed else "No record was changed", "source|what|times", changed),
        (touched, "item|dropped|touching|% of item|% of text", items),
    ]
    return [(title, [head.split("|"), *body] if body else []) for title, head, body in tables]


def _rows_line(figures: Figures) -> str:
    median, least = (100 * figures["row_tokens"][key] / figures["seq_len"] for key in ("median", "least"))
    return (
        f"{figures['rows']:,} rows of {figures['seq_len']:,} tokens, {100 * figures['utilisation']:.2f} % used;"
        f" the median row {median:.0f} %, the emptiest {least:.0f} %"
    )


def text(figures: Figures) -> str:
    """The figures for a terminal of 100 columns: numbers in full, if they are narrow enough."""
    exact = _lines(_tables(figures, "{:,}".format))
    lines = exact if max(map(cell_len, exact)) <= WIDTH else _lines(_tables(figures, _short))
    return "\n".join([readable(figures["shards"]), _rows_line(figures), *lines, *figures.get("files", [])])


def _lines(tables: list[tuple[str, Cells]]) -> list[str]:
    out = []
    for title, rows in tables:
        out += ["", title, *_aligned([[_cut(readable(row[0])), *row[1:]] for row in rows])]
    return [*out, ""]


def _aligned(rows: Cells) -> list[str]:
    """Columns under each other, Chinese counted as two wide; words begin alike, numbers end alike."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for head, cell, width in zip(rows[0], row, widths, strict=True):
            blanks = " " * (width - cell_len(cell))
            cells.append(cell + blanks if head in WORDS else blanks + cell)
        lines.append("  ".join(cells).rstrip())
    return lines


def _cut(name: str) -> str:
    """A name of at most NAME_CELLS columns: its beginning and end."""
    if cell_len(name) <= NAME_CELLS:
        return name
    end = name[-8:]
    return set_cell_size(name, NAME_CELLS - 1 - cell_len(end)).rstrip() + "…" + end


def _labels(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names as they can be drawn, and the fonts for it: a number stands for a name that no font here can draw."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *[name for name in FONTS if name in installed][:1]]
    known: set[int] = set()
    for font in fonts:
        path = font_manager.findfont(font_manager.FontProperties(family=font))
        known |= set(font_manager.get_font(path).get_charmap())
    shown = [
        _cut(name) if {ord(c) for c in name} <= known else f"source {i} of the table" for i, name in enumerate(names, 1)
    ]
    return shown, fonts


def _chart(figures: Figures) -> bytes:
    """A PNG: documents by length, a strip a source, and rows by how full they are."""
    from matplotlib.figure import Figure

    sources = figures["sources"]
    labels, fonts = _labels([s["name"] for s in sources])
    figure = Figure(figsize=(9, 3.6 + 0.55 * len(sources)), dpi=120, layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1 + 0.55 * len(sources), 2.6], squeeze=False)[:, 0]
    strips = upper.subplots(len(sources), 1, sharex=True, squeeze=False)[:, 0]
    borders = np.array(figures["sources"][0]["lengths"]["histogram"]["edges"]) + 0.5
    for axes, s, label in zip(strips, sources, labels, strict=True):
        # Per octave, as whole numbers can't be shared out evenly where there are few.
        density = np.array(s["lengths"]["histogram"]["counts"]) / np.diff(np.log2(borders))
        axes.stairs(density, borders, fill=True, color="tab:blue", alpha=0.75)
        if s["documents"]:
            axes.axvline(s["lengths"]["median"], color="tab:red", linewidth=1.2)
        axes.set(xscale="log", yticks=[], xlim=(borders[0], borders[-1]), ylim=(0, 1.08 * max(density.max(), 1e-9)))
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontfamily=fonts)
        about = f"{s['documents']:,} documents\nmedian {s['lengths']['median']:,}" if s["documents"] else "no documents"
        axes.annotate(about, (1.01, 0.5), xycoords="axes fraction", va="center", fontsize=8)
        axes.spines[["top", "left", "right"]].set_visible(False)
        axes.tick_params(axis="x", which="both", bottom=axes is strips[-1])
    strips[-1].xaxis.set_major_formatter("{x:,.0f}")
    strips[-1].set_xlabel("tokens a document (each source to its own height; red: median)")
    rows = figures["row_tokens"]["histogram"]
    axes = lower.subplots()
    at = (np.arange(ROW_BINS) + 0.5) * 100 / ROW_BINS
    axes.bar(at, rows["counts"], 92 / ROW_BINS, color="tab:green", alpha=0.75)
    axes.set(yscale="log", xlim=(0, 100), ylim=(0.7, 2 * max(rows["counts"])))
    axes.set(xlabel=f"% of a row's {figures['seq_len']:,} tokens that is used", ylabel="rows")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1.5rem;color:#222}
h1{font-size:1.5rem;overflow-wrap:anywhere}h2{margin:2.5rem 0 .5rem;font-size:1.2rem}
h3{margin:1.5rem 0 .3rem;font-size:1rem}img{max-width:100%}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}table.wide{width:100%}
td,th{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #ddd;vertical-align:top}
th{background:#f4f4f4;font-weight:600}.t1 tr:last-child td{font-weight:600;border-top:2px solid #888}
.words,.place{text-align:left}.t1 .words,.place{overflow-wrap:anywhere}
.place{width:15rem;color:#555;font-size:.85rem}
.steps td:nth-child(1){width:11rem}.steps td:nth-child(2){width:9rem}
.bar{width:24rem;text-align:left}.bar div{background:#4a83c4;height:.8rem;margin-top:.3rem}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;font:14px/1.5 system-ui,sans-serif}
pre.like{color:#555;border-left:3px solid #ccc;padding-left:.6rem;margin-top:.4rem}
pre.yaml{font:13px/1.5 monospace;background:#f7f7f7;padding:1rem}
"""
PAGE = """<!doctype html>
<html lang="zh"><head><meta charset="utf-8"><title>{{ f.shards|readable }}</title>
<style>{{ style }}</style></head><body>
<h1>{{ f.shards|readable }}</h1><p>{{ line }}</p>
{% for title, rows in tables %}<h2>{{ title }}</h2><table class="t{{ loop.index }}">
{% for row in rows %}{% set tag = "th" if loop.first else "td" %}<tr>{% for cell in row %}
<{{ tag }}{% if rows[0][loop.index0] in words %} class="words"{% endif %}>{{ cell|readable }}</{{ tag }}>
{% endfor %}</tr>{% endfor %}</table>{% endfor %}
<h2>Lengths, and the use of rows</h2><img alt="documents by length; rows by use" src="data:image/png;base64,{{ png }}">
<h2>Step by step</h2>{% for s in f.sources %}<h3>{{ s.name }}</h3><table class="steps">
<tr><td class="words">read</td><td>{{ "{:,}".format(s.read) }}</td><td class="bar">{{ bar(s.read, s.read) }}</td></tr>
{% for cause, n, left in funnel(s) %}<tr><td class="words">{{ cause }}</td><td>−{{ "{:,}".format(n) }}</td>
<td class="bar">{{ bar(left, s.read) }}</td></tr>{% endfor %}
<tr><td class="words">kept</td><td>{{ "{:,}".format(s.kept) }}</td><td class="bar">{{ bar(s.kept, s.read) }}</td></tr>
<tr><td class="words">documents</td><td>{{ "{:,}".format(s.documents) }}</td>
<td class="bar">in the rows; epochs: {{ "%.4g"|format(s.epochs) }}, most uses of a record: {{ s.repeats }}</td></tr>
<tr><td class="words">tokens</td><td>{{ "{:,}".format(s.tokens) }}</td>
<td class="bar">{{ "{:,}".format(s.trained_tokens) }} of them trained</td></tr></table>{% endfor %}
{% if hits %}<h2>Records that touch evaluation items, worst first</h2>
<table class="wide"><tr><th class="words">record</th><th class="words">item</th><th>% of item</th><th>% of text</th>
<th>dropped</th><th class="words">text</th></tr>
{% for h in hits[:most] %}<tr><td class="place">{{ h.source }}<br>{{ h.file|readable }}:{{ h.line }}</td>
<td class="words">{{ h.item|readable }}</td><td>{{ "%.1f"|format(100 * h.item_share) }}</td>
<td>{{ "%.1f"|format(100 * h.text_share) }}</td><td>{{ "yes" if h.dropped else "no" }}</td>
<td class="words"><pre>{{ h.text|readable }}</pre></td></tr>{% endfor %}</table>
{% if hits|length > most %}<p>and {{ hits|length - most }} more: see report.json</p>{% endif %}{% endif %}
<h2>Samples of what was dropped, and what it is like</h2>
{% for source, causes in samples.items() %}{% for cause, some in causes.items() %}
<h3>{{ source }}: {{ cause }}</h3><table class="wide">{% for s in some %}
<tr><td class="place">{{ s.file|readable }}:{{ s.line }}</td><td class="words"><pre>{{ s.text|readable }}</pre>
{% if s.like is defined %}<pre class="like">{{ s.like|readable }}</pre>{% endif %}</td></tr>
{% endfor %}</table>{% endfor %}{% else %}<p>none</p>{% endfor %}
<h2>Config</h2><pre class="yaml">{{ config|readable }}</pre><p>Fingerprint {{ f.fingerprint }}</p></body></html>
"""


def _page(figures: Figures, report: dict[str, Any], conf: dict[str, Any], picture: bytes) -> str:
    """One HTML file that needs no other; whatever comes from a corpus is escaped."""
    import jinja2
    import yaml
    from markupsafe import Markup

    def bar(part: int, whole: int) -> Markup:
        return Markup('<div style="width:{:.2f}%"></div>').format(100 * part / whole if whole else 0)

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["readable"] = readable
    return environment.from_string(PAGE).render(
        f=figures, line=_rows_line(figures), tables=_tables(figures, "{:,}".format), style=Markup(STYLE), words=WORDS,
        hits=report["contamination"], most=HITS_SHOWN, png=base64.b64encode(picture).decode(), bar=bar, funnel=funnel,
        samples={name: causes for name, causes in report["samples"].items() if causes},
        config=yaml.safe_dump(conf, allow_unicode=True, sort_keys=False, width=100),
    )  # fmt: skip
