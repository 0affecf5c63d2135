"""The page of a run: one HTML file that needs no other, written again while the run goes, to be opened at any time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pandallm import files
from pandallm.data.stats import readable
from pandallm.train.charts import charts, column, number, smooth

if TYPE_CHECKING:
    from jinja2 import Template

MOST_OLDER = 10  # older evaluations with samples on the page, the first one included
MOST_WARNINGS = 50

STYLE = """
:root{color-scheme:light dark;--back:#fff;--card:#fff;--ink:#1c2126;--soft:#67707a;--line:#e3e6e9;--mark:#eef1f4;
--warn:#9a5b00;--bad:#c0392b;--good:#1a7f4b;
--c0:#2a78d6;--c1:#eb6834;--c2:#1b9e70;--c3:#7a5bd6;--c4:#d9a000;--c5:#d55187;--c6:#5f8a1f;--c7:#8a6d5a}
@media(prefers-color-scheme:dark){:root{--back:#14171a;--card:#1a1e22;--ink:#e4e7ea;--soft:#98a1aa;--line:#2c3238;
--mark:#242a30;--warn:#e0a54a;--bad:#ef7b6e;--good:#5cc48d;
--c0:#5a9df0;--c1:#f08a5d;--c2:#3fbf90;--c3:#a58df0;--c4:#dcb13c;--c5:#e57fab;--c6:#94bd55;--c7:#b79b88}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:74rem;padding:1.5rem 1.25rem 3rem;background:var(--back);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI","PingFang SC","Microsoft YaHei","Noto Sans CJK SC",sans-serif;
font-variant-numeric:tabular-nums}
h1{font-size:1.4rem;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:1.05rem;margin:2.25rem 0 .6rem}h3{font-size:.85rem;color:var(--soft);font-weight:600;margin:1rem 0 .3rem}
.about{margin:.3rem 0 0;color:var(--soft);font-size:.875rem;overflow-wrap:anywhere}
.about span+span::before{content:"·";margin:0 .45em}
.state{font-weight:600}.running,.starting{color:var(--c0)}.finished{color:var(--good)}.stopped{color:var(--bad)}
.far{display:flex;justify-content:space-between;margin:1.1rem 0 .35rem}
.bar{height:8px;border-radius:4px;background:var(--mark);overflow:hidden}
.bar div{height:100%;border-radius:4px;background:var(--c0)}.bar.finished div{background:var(--good)}
.bar.stopped div{background:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.75rem 1rem;margin:1.1rem 0 0}
.tiles dt{color:var(--soft);font-size:.8rem}.tiles dd{margin:0;font-size:1.25rem;line-height:1.3}
.note{margin:1rem 0 0;padding:.5rem .8rem;border-left:3px solid var(--warn);background:var(--mark);
overflow-wrap:anywhere}
.note a{color:inherit}.note.bad{border-color:var(--bad)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1rem;margin-top:1.75rem}
figure{display:flex;flex-direction:column;min-width:0;margin:0;padding:.8rem .9rem 1.8rem;
border:1px solid var(--line);border-radius:8px;background:var(--card)}
figcaption{display:flex;flex-wrap:wrap;align-items:baseline;gap:0 .6rem}figcaption b{font-weight:600}
figcaption span{color:var(--soft);font-size:.8rem}figcaption output{margin-left:auto;font-size:.8rem}
.legend{display:flex;flex-wrap:wrap;gap:0 .9rem;font-size:.8rem;margin:.1rem 0 .6rem;color:var(--soft)}
.legend span{overflow-wrap:anywhere}.legend output{color:var(--ink)}
.legend i{display:inline-block;width:.9rem;height:0;border-top:3px solid;margin-right:.35rem;vertical-align:.25em}
.legend i.dashed{border-top-style:dashed}
.plot{position:relative;flex:1 0 11.5rem;margin:.6rem .6rem 0 2.9rem;touch-action:pan-y}
svg{position:absolute;width:100%;height:100%;overflow:visible}
path{fill:none;stroke:currentColor;stroke-width:1.8px;stroke-linecap:round;stroke-linejoin:round;
vector-effect:non-scaling-stroke}
.grid{stroke:var(--line);stroke-width:1px}path.dashed{stroke-dasharray:5 4}
.raw{color:var(--c0);opacity:.45}path.raw{stroke-width:1px}.mean{color:var(--ink)}path.mean{stroke-width:2.4px}
path.dot{stroke-width:6px;stroke-dasharray:none}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}
.c6{color:var(--c6)}.c7{color:var(--c7)}
.x,.y{position:absolute;color:var(--soft);font-size:.72rem;line-height:1;white-space:nowrap}
.x{top:calc(100% + .5rem);transform:translateX(-50%)}.y{right:calc(100% + .5rem);transform:translateY(-50%)}
.rule{position:absolute;top:0;bottom:0;border-left:1px solid var(--soft);pointer-events:none}
.tip{position:absolute;top:0;padding:.3rem .5rem;border:1px solid var(--line);border-radius:4px;background:var(--card);
font-size:.75rem;line-height:1.4;white-space:pre;pointer-events:none}
table{border-collapse:collapse}figure table{margin-top:.6rem}figure td:last-child,figure th:last-child{padding-right:0}
td,th{padding:.3rem .9rem .3rem 0;text-align:right;vertical-align:top;
border-bottom:1px solid var(--line)}
th{font-weight:600;font-size:.8rem;color:var(--soft)}td:first-child,th:first-child{text-align:left;overflow-wrap:anywhere}
.pairs{width:100%;table-layout:fixed;font-size:.875rem}.pairs td{text-align:left;overflow-wrap:anywhere}
.pairs td:first-child{width:38%;color:var(--soft)}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:0 2rem;align-items:start}
pre{margin:0 0 .6rem;padding:.7rem .9rem;border-radius:6px;background:var(--mark);font:inherit;white-space:pre-wrap;
overflow-wrap:anywhere;unicode-bidi:isolate}
pre b{font-weight:400;color:var(--soft)}details{margin-top:.6rem}summary{cursor:pointer;color:var(--soft)}
ul{margin:0;padding-left:1.2rem}li{overflow-wrap:anywhere}
"""
SCRIPT = """
const text = value => value && Math.abs(value) < 1e-3 ? value.toExponential(3)
  : value.toLocaleString('en', {maximumSignificantDigits: 5});
for (const plot of document.querySelectorAll('.plot')) {
  const {last, lines} = JSON.parse(plot.dataset.lines);
  const rule = document.createElement('div'), tip = document.createElement('div');
  rule.className = 'rule'; tip.className = 'tip'; rule.hidden = tip.hidden = true; plot.append(rule, tip);
  const near = (points, step) => points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a);
  plot.onpointermove = event => {
    const box = plot.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * last;
    const found = lines.map(line => [line.name, near(line.points, at)]), step = near(found.map(f => f[1]), at)[0];
    tip.textContent = ['step ' + step.toLocaleString('en'), ...found.filter(f => Math.abs(f[1][0] - step) <= last / 100)
      .map(f => (f[0] + ' ' + text(f[1][1])).trim())].join('\\n');
    rule.hidden = tip.hidden = false; rule.style.left = 100 * step / last + '%';
    tip.style.left = step < last / 2 ? `calc(${100 * step / last}% + 8px)` : 'auto';
    tip.style.right = step < last / 2 ? 'auto' : `calc(${100 - 100 * step / last}% + 8px)`;
  };
  plot.onpointerleave = () => { rule.hidden = tip.hidden = true; };
}
for (const part of document.querySelectorAll('details')) {  // what is open stays open when the page is loaded again
  const key = location.pathname + '#' + part.id;
  try {
    part.open = sessionStorage.getItem(key) === '1';
    part.ontoggle = () => sessionStorage.setItem(key, part.open ? '1' : '0');
  } catch { break; }
}
const old = document.getElementById('old');
if (old) {
  const minutes = Math.floor((Date.now() / 1000 - old.dataset.written) / 60);
  if (minutes >= 5) { old.hidden = false; old.querySelector('b').textContent = minutes.toLocaleString('en'); }
}
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
{% if refresh is not none %}<meta http-equiv="refresh" content="{{ refresh }}">{% endif %}
<title>{% if head.total %}{{ "%.0f"|format(head.share) }} % {% endif %}{{ title|readable }}</title>
<style>{{ style|safe }}</style></head><body>
{% macro samples_of(e) %}{% for s in e.samples %}
<pre lang="zh"><b>{{ s.prompt|readable }}</b>{{ s.text|readable }}</pre>{% endfor %}{% endmacro %}
<header><h1>{{ title|readable }}</h1>
<p class="about"><span class="state {{ head.state }}">{{ head.state }}</span>
{% for part in head.about %}<span>{{ part|readable }}</span>{% endfor %}<span>written {{ clock }}</span></p>
<div class="far"><span>step {{ head.step|thousands }} of {{ head.total|thousands }}</span>
<span>{{ "%.1f"|format(head.share) }} %</span></div>
<div class="bar {{ head.state }}"><div style="width:{{ "%.2f"|format(head.share) }}%"></div></div>
<dl class="tiles">{% for name, value in head.tiles %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>
{% if head.reason %}<p class="note bad">Stopped: {{ head.reason|string|readable }}</p>{% endif %}
{% if refresh is not none %}<p class="note" id="old" data-written="{{ written }}" hidden>
Nothing new for <b></b> minutes: the run may have ended.</p>{% endif %}
{% if warnings %}<p class="note"><a href="#warnings">{{ warnings|length }}
warning{{ "s" if warnings|length > 1 }}</a>, the newest at step {{ warnings[0][0]|thousands }}:
{{ warnings[0][1]|readable }}</p>{% endif %}</header>
<main><div class="charts">{% for c in charts %}
<figure><figcaption><b>{{ c.title }}</b><span>{{ c.note }}</span>
{% if not c.legend[0][0] %}<output>{{ c.legend[0][2] }}</output></figcaption>{% else %}</figcaption>
<div class="legend">{% for name, style, value in c.legend %}<span><i class="{{ style }}"></i>{{ name|readable }}
<output>{{ value }}</output></span>{% endfor %}</div>{% endif %}
<div class="plot" data-lines="{{ c.data }}">
<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{{ c.title }} over the steps">
{% for y, _ in c.y_ticks %}<path class="grid" d="M0 {{ "%.1f"|format(10 * y) }}h1000"/>{% endfor %}
{% for style, path in c.paths %}<path class="{{ style }}" d="{{ path }}"/>{% endfor %}</svg>
{% for y, label in c.y_ticks %}<span class="y" style="top:{{ "%.2f"|format(y) }}%">{{ label }}</span>{% endfor %}
{% for x, label in c.x_ticks %}<span class="x" style="left:{{ "%.2f"|format(x) }}%">{{ label }}</span>{% endfor %}
</div></figure>{% else %}<p class="about">No step is done yet: the charts come with the first.</p>{% endfor %}
{% if sources %}<figure><figcaption><b>Held-out text</b><span>bits per character</span></figcaption>
<table><tr><th>source</th>
<th>step {{ sources.steps[0]|thousands }}</th><th>step {{ sources.steps[1]|thousands }}</th><th>change</th></tr>
{% for row in sources.rows %}<tr>{% for cell in row %}<td>{{ cell|readable }}</td>{% endfor %}</tr>{% endfor %}</table>
</figure>{% endif %}</div>
{% if samples %}<h2>Samples, step {{ samples[0].step|thousands }}</h2>{{ samples_of(samples[0]) }}
{% set older = samples[1:most] + (samples[most:])[-1:] %}{% for e in older %}
<details id="step{{ e.step }}"><summary>step {{ e.step|thousands }}</summary>{{ samples_of(e) }}</details>{% endfor %}
{% if samples|length > older|length + 1 %}<p class="about">and {{ samples|length - older|length - 1 }} more between,
not shown here</p>{% endif %}{% endif %}
{% if warnings %}<h2 id="warnings">Warnings</h2><ul>{% for step, text in warnings %}
<li>step {{ step|thousands }}: {{ text|readable }}</li>{% endfor %}</ul>{% endif %}
<div class="two">{% for name, rows in tables.items() %}<section><h2>{{ name }}</h2>
<table class="pairs">{% for key, value in rows %}
<tr><td>{{ key|readable }}</td><td>{{ value|readable }}</td></tr>{% endfor %}</table></section>{% endfor %}</div></main>
<script>{{ script|safe }}</script></body></html>
"""


def write(
    path: Path,
    title: str,
    record: dict[str, Any],
    metrics: list[dict[str, Any]],
    heldout: list[dict[str, Any]],
    refresh: int | None,
) -> None:
    """Writes the page of a run: `record` is run.json's content, `metrics` its steps, `heldout` its evaluations.

    `refresh`: seconds after which a browser loads the page again; None: never, as after the end.
    """
    now = time.time()
    page = _template().render(
        title=title, refresh=refresh, written=int(now), clock=time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now)),
        head=_head(record, metrics, heldout), charts=charts(record, metrics, heldout), sources=_sources(heldout),
        warnings=_warnings(heldout), style=STYLE, script=SCRIPT,
        samples=[e for e in reversed(heldout) if e.get("samples")], most=MOST_OLDER,
        tables={
            "Config": list(_flat(record.get("settings") or {})),
            "Run": list(_flat({k: v for k, v in record.items() if k != "settings"})),
        },
    )  # fmt: skip
    files.write_text(path, page)


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours:,}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def _head(record: dict[str, Any], metrics: list[dict[str, Any]], heldout: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the run is: its state, how far, the figures on top."""
    step, total = int(metrics[-1]["step"]) if metrics else 0, int(record.get("steps") or 0)
    seconds = column(metrics, "seconds")
    seconds = seconds[np.isfinite(seconds)]
    finished, stopped = bool(record.get("finished")), record.get("stopped")
    state = "finished" if finished else "stopped" if stopped else "running" if metrics else "starting"
    took = record.get("seconds") if finished else None
    tiles = [("time" if took else "time in steps", _clock(took or seconds.sum()))]
    if state == "running" and len(seconds) and total > step:
        # The newest steps alone: the first ones are slow, and a resumed run may be on another machine.
        tiles.append(("about left", _clock(float(seconds[-50:].mean()) * (total - step))))
    if metrics:
        tiles.append(("loss, smoothed", number(float(smooth(column(metrics, "loss"), total)[-1]))))
    if means := [v for v in column(heldout, "mean").tolist() if math.isfinite(v)]:
        tiles.append(("bits per character", number(means[-1])))
    if metrics:
        tiles.append(("tokens a second", number(float(column(metrics[-1:], "tokens_per_s")[0]))))
    tiles.append(("tokens trained", number(float(np.nansum(column(metrics, "tokens"))))))
    ranks = int(record.get("ranks") or 1)
    where = f"{ranks} × {record.get('device')}" if ranks > 1 else record.get("device")
    return {
        "state": state,
        "reason": stopped if state == "stopped" else None,
        "about": [str(part) for part in (where, (record.get("commit") or "")[:10]) if part],
        "step": step,
        "total": total,
        "share": min(100.0, 100 * step / total) if total else 0.0,
        "tiles": tiles,
    }


def _sources(heldout: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Bits per character of each source at the first and the newest evaluation, and the change in %."""
    if len(heldout) < 2:
        return None
    first, last = heldout[0], heldout[-1]
    before, now = ((e.get("bits_per_character") or {}) | {"mean": e.get("mean")} for e in (first, last))
    rows = []
    for name in dict.fromkeys([*before, *now]):
        a, b = column([before, now], name).tolist()
        if math.isfinite(a) or math.isfinite(b):
            change = 100 * (b / a - 1) if a else math.nan
            rows.append(
                (name, number(a), number(b), f"{change:+.1f} %".replace("-", "−") if math.isfinite(change) else "–")
            )
    return {"steps": (first["step"], last["step"]), "rows": rows}


def _warnings(heldout: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """(step, warning), the newest first."""
    return [(e["step"], text) for e in reversed(heldout) for text in e.get("warnings") or ()][:MOST_WARNINGS]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(a.b.c, value) of nested settings, as the command line takes them."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            yield f"{prefix}{key}", text


@cache
def _template() -> Template:
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["readable"] = readable
    environment.filters["thousands"] = "{:,}".format
    return environment.from_string(PAGE)
