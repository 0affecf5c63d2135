"""A report as Markdown, and as one HTML file that needs no other, in which every answer can be looked through."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pandallm.data.stats import readable
from pandallm.evaluate.report import Row

Section = tuple[str, Sequence[str | list[list[str]] | Path]]  # title; paragraphs, tables and pictures

# Of each prediction, in this order, in the page's data; `prompt` and `output` are numbers of texts: thousands of rows
# share a prompt.
FIELDS = (
    "run",
    "task",
    "id",
    "wording",
    "protocol",
    "gold",
    "pred",
    "right",
    "flagged",
    "truncated",
    "prompt",
    "output",
)
MORE = ("pred_strict", "pred_norm", "order", "log_likelihoods", "subject")  # shown where a row has it
_LONELY = re.compile("[\ud800-\udfff]")


def markdown(title: str, sections: Sequence[Section]) -> str:
    out = [f"# {_cell(title)}"]
    for name, blocks in sections:
        out.append(f"## {name}")
        for block in blocks:
            if isinstance(block, str):
                out.append(_cell(block))
            elif isinstance(block, Path):
                out.append(f"![{block.stem}]({block.name})")
            else:
                rows = ["| " + " | ".join(map(_cell, row)) + " |" for row in block]
                out.append("\n".join([rows[0], "|" + " --- |" * len(block[0]), *rows[1:]]))
    return "\n\n".join(out) + "\n"


def _cell(text: str) -> str:
    """Text that neither ends a table's cell nor becomes markup."""
    return re.sub(r"([\\|<*_`\[])", r"\\\1", " ".join(readable(text).split()))


def html(title: str, sections: Sequence[Section], rows: Sequence[tuple[str, Row]]) -> str:
    """`rows`: (name of the run, prediction). Whatever comes from a model or a question is escaped, or is data that the
    script puts in as text."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["readable"] = readable
    environment.tests["text"] = lambda block: isinstance(block, str)
    environment.tests["picture"] = lambda block: isinstance(block, Path)
    environment.filters["png"] = lambda path: base64.b64encode(path.read_bytes()).decode()
    return environment.from_string(PAGE).render(
        title=title, sections=sections, style=Markup(STYLE), script=Markup(SCRIPT), data=Markup(_data(rows))
    )


def _data(rows: Sequence[tuple[str, Row]]) -> str:
    """The predictions as JSON that can't end the element it stands in."""
    texts: dict[str, int] = {}
    lines = []
    for run, row in rows:
        prompt, output = (texts.setdefault(str(row.get(key, "")), len(texts)) for key in ("prompt", "output"))
        flags = (int(bool(row.get(key))) for key in ("correct", "flagged", "truncated"))
        told = (row[key] for key in ("task", "id", "wording", "protocol", "gold", "pred"))
        more = {key: row[key] for key in MORE if key in row}
        lines.append([run, *told, *flags, prompt, output, more])
    data: dict[str, Any] = {"fields": [*FIELDS, "more"], "texts": list(texts), "rows": lines}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return _LONELY.sub(lambda half: f"\\u{ord(half.group()):04x}", text)  # which UTF-8 can't hold


STYLE = """
:root{color-scheme:light dark;--back:#fff;--ink:#1c2126;--soft:#67707a;--line:#e3e6e9;--mark:#eef1f4;--good:#1a7f4b;
--bad:#c0392b;--warn:#9a5b00}
@media(prefers-color-scheme:dark){:root{--back:#14171a;--ink:#e4e7ea;--soft:#98a1aa;--line:#2c3238;--mark:#242a30;
--good:#5cc48d;--bad:#ef7b6e;--warn:#e0a54a}}
*{box-sizing:border-box}[hidden]{display:none!important}
body{margin:0 auto;max-width:78rem;padding:1.5rem 1.25rem 3rem;background:var(--back);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI","PingFang SC","Microsoft YaHei","Noto Sans CJK SC",sans-serif;
font-variant-numeric:tabular-nums}
h1{font-size:1.4rem;line-height:1.25;margin:0;overflow-wrap:anywhere}h2{font-size:1.05rem;margin:2.25rem 0 .6rem}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:.6rem 0 0;font-size:.875rem}a{color:var(--soft)}
p{margin:.6rem 0;max-width:60rem;overflow-wrap:anywhere}img{max-width:100%;background:#fff;border-radius:6px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;margin:.4rem 0 1rem}
td,th{padding:.3rem .9rem .3rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
td:not(:first-child){white-space:nowrap}td:first-child{min-width:12rem;overflow-wrap:anywhere}
th{font-weight:600;font-size:.8rem;color:var(--soft)}tr.published td{color:var(--soft)}
form{display:flex;flex-wrap:wrap;gap:.5rem .8rem;align-items:end;position:sticky;top:0;padding:.6rem 0;
background:var(--back);border-bottom:1px solid var(--line)}
form label{display:flex;flex-direction:column;font-size:.75rem;color:var(--soft)}
select,input{font:inherit;font-size:.875rem;padding:.2rem .3rem;max-width:14rem;color:inherit;background:var(--mark);
border:1px solid var(--line);border-radius:4px}
form output{margin-left:auto;font-size:.875rem}
details{border-bottom:1px solid var(--line)}summary{cursor:pointer;padding:.25rem 0;overflow-wrap:anywhere}
summary span{margin-right:.8rem}summary .soft{color:var(--soft)}.right{color:var(--good)}.wrong{color:var(--bad)}
.tag{font-size:.75rem;color:var(--warn)}
pre{margin:0 0 .6rem;padding:.6rem .9rem;border-radius:6px;background:var(--mark);font:inherit;white-space:pre-wrap;
overflow-wrap:anywhere;unicode-bidi:isolate}
h3{font-size:.8rem;color:var(--soft);font-weight:600;margin:.4rem 0 .2rem}#end{height:1px}
"""
SCRIPT = """
const data = JSON.parse(document.getElementById('data').textContent);
const at = Object.fromEntries(data.fields.map((name, i) => [name, i]));
const form = document.forms.filters, list = document.getElementById('list'), PAGE = 100;
const kinds = ['run', 'task', 'wording', 'protocol'];
for (const kind of kinds) {
  const values = [...new Set(data.rows.map(row => row[at[kind]]))], select = form[kind];
  for (const value of values) select.append(new Option(value, '=' + value));
  select.parentElement.hidden = values.length < 2;
}
for (const flag of ['flagged', 'truncated'])
  form[flag].parentElement.hidden = !data.rows.some(row => row[at[flag]]);
// Rows that ask the same in several runs: do they differ in being right?
const keyOf = row => JSON.stringify([row[at.task], row[at.id], row[at.wording], row[at.protocol], row[at.more].order]);
const sides = new Map();
for (const row of data.rows) sides.set(keyOf(row), (sides.get(keyOf(row)) ?? 0) | (row[at.right] ? 1 : 2));
const differ = data.rows.map(row => sides.get(keyOf(row)) === 3);
form.verdict.querySelector('[value=differ]').hidden = form.run.parentElement.hidden;
const lower = data.texts.map(text => text.toLowerCase());
let found = [], shown = 0;
const add = (parent, tag, text, name) => {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  parent.append(made);
  return made;
};
function line(row) {
  const part = document.createElement('details'), head = add(part, 'summary'), right = row[at.right];
  add(head, 'span', right ? '✓' : '✗', right ? 'right' : 'wrong');
  add(head, 'span', row[at.task] + ' ' + row[at.id]);
  add(head, 'span', (row[at.pred] ?? 'no letter') + (right ? '' : ', right is ' + row[at.gold]));
  const about = kinds.filter(kind => kind !== 'task' && !form[kind].parentElement.hidden).map(kind => row[at[kind]]);
  add(head, 'span', about.join(' · '), 'soft');
  for (const flag of ['flagged', 'truncated']) if (row[at[flag]]) add(head, 'span', flag, 'tag');
  part.addEventListener('toggle', () => {  // made only when it is looked at
    for (const name of ['prompt', 'output']) {
      add(part, 'h3', name);
      add(part, 'pre', data.texts[row[at[name]]]);
    }
    const number = v => v === null ? '–' : +(+v).toFixed(4);  // null: an option without a text
    for (const [name, value] of Object.entries(row[at.more]))
      add(part, 'p', name + ': ' + (Array.isArray(value) ? value.map(number).join(', ') : value));
  }, {once: true});
  return part;
}
function more() {
  list.append(...found.slice(shown, shown + PAGE).map(line));
  shown = Math.min(shown + PAGE, found.length);
}
const tests = {
  '': () => true, right: row => row[at.right], wrong: row => !row[at.right], none: row => row[at.pred] === null,
  differ: (row, i) => differ[i],
};
function filter() {
  const want = kinds.filter(kind => form[kind].value).map(kind => [at[kind], form[kind].value.slice(1)]);
  for (const flag of ['flagged', 'truncated']) if (form[flag].value) want.push([at[flag], +form[flag].value]);
  const test = tests[form.verdict.value], text = form.text.value.trim().toLowerCase();
  const hit = text ? lower.map(other => other.includes(text)) : null;
  found = data.rows.filter((row, i) => want.every(([place, value]) => row[place] === value) && test(row, i)
    && (!hit || hit[row[at.prompt]] || hit[row[at.output]] || String(row[at.id]).toLowerCase().includes(text)));
  if (form.verdict.value === 'differ') {  // answers to the same question side by side
    const places = new Map([...sides.keys()].map((key, i) => [key, i]));
    found = found.map(row => [places.get(keyOf(row)), row]).sort((a, b) => a[0] - b[0]).map(pair => pair[1]);
  }
  shown = 0;
  list.replaceChildren();
  more();
  const right = found.filter(row => row[at.right]).length, percent = found.length ? 100 * right / found.length : 0;
  form.count.value = `${found.length.toLocaleString('en')} of ${data.rows.length.toLocaleString('en')}, `
    + `${percent.toFixed(1)} % right`;
}
let timer;
form.addEventListener('input', () => { clearTimeout(timer); timer = setTimeout(filter, 120); });
form.addEventListener('submit', event => event.preventDefault());
const end = document.getElementById('end');
new IntersectionObserver(() => {
  while (shown < found.length && end.getBoundingClientRect().top < innerHeight + 600) more();
}, {rootMargin: '600px'}).observe(end);
form.reset();
filter();
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{{ title|readable }}</title><style>{{ style }}</style></head><body>
<header><h1>{{ title|readable }}</h1><nav>
{% for name, _ in sections %}<a href="#s{{ loop.index }}">{{ name }}</a>
{% endfor %}<a href="#answers">Every answer</a></nav></header><main>
{% for name, blocks in sections %}<h2 id="s{{ loop.index }}">{{ name }}</h2>
{% for block in blocks %}{% if block is text %}<p>{{ block|readable }}</p>
{% elif block is picture %}<p><img alt="{{ block.stem }}" src="data:image/png;base64,{{ block|png }}"></p>
{% else %}<div class="scroll"><table><thead><tr>
{% for cell in block[0] %}<th>{{ cell|readable }}</th>{% endfor %}</tr></thead><tbody>{% for row in block[1:] %}
<tr{% if row[0].endswith("(published)") %} class="published"{% endif %}>
{% for cell in row %}<td>{{ cell|readable }}</td>{% endfor %}</tr>{% endfor %}</tbody></table></div>
{% endif %}{% endfor %}{% endfor %}
<h2 id="answers">Every answer</h2>
<form name="filters">
{% for kind in ("run", "task", "wording", "protocol") %}<label>{{ kind }}
<select name="{{ kind }}"><option value="">all</option></select></label>
{% endfor %}<label>answer<select name="verdict"><option value="">all</option><option value="right">right</option>
<option value="wrong">wrong</option><option value="none">no letter</option>
<option value="differ">runs differ</option></select></label>
{% for flag, yes in (("flagged", "seen in training"), ("truncated", "context cut")) %}<label>{{ flag }}
<select name="{{ flag }}"><option value="">all</option><option value="1">{{ yes }}</option>
<option value="0">not</option></select></label>
{% endfor %}<label>text<input name="text" type="search" placeholder="in prompt, output or id"></label>
<output name="count"></output></form>
<div id="list" lang="zh"></div><div id="end"></div></main>
<script type="application/json" id="data">{{ data }}</script>
<script>{{ script }}</script></body></html>
"""
