"""The page of a run shows the numbers of its metrics, survives what is missing from them, and escapes what is text."""

from __future__ import annotations

import html
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pandallm.train import charts, page

RECORD: dict[str, Any] = {
    "settings": {"model": "tiny", "deepspeed": {"zero_optimization": {"stage": 1}}, "adapter": None},
    "command": "panda train conf.yaml out=<runs>",
    "versions": {"torch": "2.9.0"},
    "commit": "0123456789abcdef",
    "steps": 200,
    "ranks": 2,
    "device": "cpu",
    "finished": False,
}


def metrics(n: int, **changes: Any) -> list[dict[str, Any]]:
    def one(step: int) -> dict[str, Any]:
        noise = math.sin(step * step)
        return {
            **{"step": step, "loss": 2 + 1 / step + 0.1 * noise, "lr": 1e-5 * step / n, "grad_norm": 1 + 0.5 * noise},
            **{"tokens": 1000, "input_tokens": 1024, "tokens_per_s": 512.0, "mfu": 0.25, "seconds": 2.0},
            **{"memory": 3 << 29},
        } | changes

    return [one(step) for step in range(1, n + 1)]


def evaluation(step: int, wiki: float | None, **more: Any) -> dict[str, Any]:
    return {"step": step, "bits_per_character": {"wiki": wiki, "新闻": 2.0}, "samples": []} | more


def written(
    tmp_path: Path,
    rows: list[dict[str, Any]],
    heldout: list[dict[str, Any]] | None = None,
    refresh: int | None = 20,
    **record: Any,
) -> str:
    page.write(tmp_path / "run.html", "runs/demo", RECORD | record, rows, heldout or [], refresh)
    assert [path.name for path in tmp_path.iterdir()] == ["run.html"]
    return (tmp_path / "run.html").read_text(encoding="utf-8")


def points(text: str) -> dict[str, dict[str, list[list[float]]]]:
    """{chart: {line: [[step, value]]}}, as the page's pointer reads them."""
    found = {}
    for figure in re.findall(r"<figure>.*?</figure>", text, re.S):
        if data := re.search(r'data-lines="([^"]*)"', figure):
            lines = json.loads(html.unescape(data[1]))["lines"]
            title = re.search(r"<b>(.*?)</b>", figure)
            assert title
            found[title[1]] = {line["name"]: line["points"] for line in lines}
    return found


def words(text: str) -> str:
    """What a reader sees."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", text, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def test_the_numbers_are_the_metrics(tmp_path: Path) -> None:
    steps = metrics(120)
    heldout = [evaluation(0, 1.5, mean=1.75), evaluation(100, 1.2, mean=1.6)]
    text = written(tmp_path, steps, heldout)
    shown = points(text)
    for title, line, key, factor in (
        ("Loss", "each step", "loss", 1),
        ("Learning rate", "", "lr", 1),
        ("Gradient norm", "", "grad_norm", 1),
        ("Speed", "", "tokens_per_s", 1),
        ("MFU", "", "mfu", 100),
        ("Memory", "", "memory", 2**-30),
    ):
        assert [step for step, _ in shown[title][line]] == [m["step"] for m in steps]
        assert [v for _, v in shown[title][line]] == pytest.approx([m[key] * factor for m in steps], rel=1e-5)
    assert shown["Held-out text"] == {
        "wiki": [[0, 1.5], [100, 1.2]],
        "新闻": [[0, 2.0], [100, 2.0]],
        "mean": [[0, 1.75], [100, 1.6]],
    }
    seen = words(text)
    assert "step 120 of 200 60.0 %" in seen
    assert "wiki 1.5 1.2 −20.0 %" in seen and "新闻 2 2 +0.0 %" in seen
    assert "time in steps 4:00" in seen and "about left 2:40" in seen  # 2 seconds a step
    assert "tokens trained 120,000" in seen
    assert "2 × cpu" in seen
    assert "deepspeed.zero_optimization.stage 1" in seen and "versions.torch 2.9.0" in seen and "adapter null" in seen


def test_the_smooth_line_is_the_mean_of_the_last_tenth(tmp_path: Path) -> None:
    losses = [m["loss"] for m in metrics(150)]
    drawn = points(written(tmp_path, metrics(150), steps=1000))["Loss"]["mean"]
    for step, width in ((1, 1), (10, 1), (11, 2), (100, 10), (150, 15)):
        assert drawn[step - 1] == pytest.approx([step, sum(losses[step - width : step]) / width], rel=1e-5)
    values = np.arange(5000.0)
    values[4500] = math.nan
    mean = charts.smooth(values, 5000)  # a fiftieth of the whole run is the most
    assert (mean[4400], mean[4510]) == pytest.approx((4350.5, (values[4411:4500].sum() + values[4501:4511].sum()) / 99))
    assert np.flatnonzero(np.isnan(mean)).tolist() == [4500]


def test_the_page_is_loaded_again_only_while_it_changes(tmp_path: Path) -> None:
    assert '<meta http-equiv="refresh" content="20">' in written(tmp_path, metrics(3))
    ended = written(tmp_path, metrics(200), refresh=None, finished=True, seconds=3723.0, loss=2.0)
    assert 'http-equiv="refresh"' not in ended
    assert "finished" in words(ended) and "time 1:02:03" in words(ended) and "about left" not in words(ended)
    stopped = words(written(tmp_path, metrics(3), refresh=None, stopped="step 4: the loss is <nan>"))
    assert "Stopped: step 4: the loss is <nan>" in stopped and "about left" not in stopped


def test_before_the_first_step(tmp_path: Path) -> None:
    seen = words(written(tmp_path, []))
    assert "starting" in seen and "step 0 of 200 0.0 %" in seen and "the charts come with the first" in seen
    assert points(written(tmp_path, [], [evaluation(0, 1.5)]))["Held-out text"]["wiki"] == [[0, 1.5]]


@pytest.mark.parametrize("hole", [None, math.nan, math.inf, -math.inf, 1e300])
def test_what_is_no_number_is_a_gap(hole: float | None, tmp_path: Path) -> None:
    steps = metrics(9)
    for key in ("loss", "grad_norm", "tokens_per_s", "memory"):
        steps[4][key] = hole
    text = written(tmp_path, steps, [evaluation(0, 1.5), evaluation(5, hole), evaluation(9, 1.2)])
    shown = points(text)
    for title, line in (("Loss", "each step"), ("Loss", "mean"), ("Gradient norm", ""), ("Memory", "")):
        assert [step for step, _ in shown[title][line]] == [1, 2, 3, 4, 6, 7, 8, 9]
    assert shown["Held-out text"]["wiki"] == [[0, 1.5], [9, 1.2]]
    raw = re.search(r'<path class="raw" d="([^"]*)"', text)
    assert raw and raw[1].count("M") == 2  # begins anew after the gap
    assert not re.search(r'(nan|inf)[ "hL]', "".join(re.findall(r'd="[^"]*"', text)))


def test_what_nothing_is_known_of_has_no_chart(tmp_path: Path) -> None:
    steps = metrics(5, mfu=None)
    for m in steps:
        del m["memory"]
    assert set(points(written(tmp_path, steps))) == {"Loss", "Learning rate", "Gradient norm", "Speed"}


def test_texts_are_escaped_and_chinese_stays(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\x1b\udc80"
    samples = [{"prompt": f"大熊猫{evil}", "text": f"吃竹子{evil}"}]
    name = f'"{evil}'
    heldout = [
        {"step": step, "bits_per_character": {name: 1.0}, "samples": samples, "warnings": [f"english: {evil}"]}
        for step in (0, 3)
    ]
    text = written(tmp_path, metrics(3), heldout, settings={"model": evil}, command=evil, device=evil, stopped=evil)
    assert text.count("<script>") == 1  # the page's own
    assert "alert(" not in re.sub(r"&lt;script&gt;alert\(&#39;x&#39;\)&lt;/script&gt;", "", text)
    seen = words(text)
    assert "大熊猫<script>alert('x')</script>\\x1b\\udc80 吃竹子" in seen
    assert "2 warnings , the newest at step 3" in seen
    assert '<meta charset="utf-8">' in text


def test_the_newest_samples_are_open_and_some_older_ones_folded(tmp_path: Path) -> None:
    heldout = [evaluation(step, 1.0, samples=[{"prompt": "", "text": f"said at {step}"}]) for step in range(0, 200, 10)]
    heldout.append(evaluation(200, 1.0))  # without samples
    text = written(tmp_path, metrics(200), heldout)
    folded = re.findall(r"<details.*?</details>", text, re.S)
    assert "said at 190" in text and not any("said at 190" in part for part in folded)
    assert [int(n) for part in folded for n in re.findall(r"said at (\d+)", part)] == [*range(180, 90, -10), 0]
    assert "and 9 more between, not shown here" in words(text)


def test_thinning_keeps_extremes_gaps_and_both_ends(tmp_path: Path) -> None:
    steps = metrics(5000)
    steps[1234]["loss"], steps[3456]["loss"], steps[2222]["loss"] = 9.0, 0.5, math.nan
    text = written(tmp_path, steps, steps=5000)
    raw = points(text)["Loss"]["each step"]
    assert len(raw) <= charts.MOST_POINTS
    assert [1235, 9.0] in raw and [3457, 0.5] in raw
    assert (raw[0][0], raw[-1][0]) == (1, 5000)
    by_step = {m["step"]: m["loss"] for m in steps}
    assert all(v == pytest.approx(by_step[step], rel=1e-5) for step, v in raw)
    assert re.search(r'<path class="raw" d="M[^"]*M[^"]*"', text)


def test_it_is_cheap(tmp_path: Path) -> None:
    steps = metrics(5000)
    took = []
    for _ in range(5):
        began = time.perf_counter()
        written(tmp_path, steps)
        took.append(time.perf_counter() - began)
    assert min(took) < 0.3  # some 0.03 s; the bound is for a busy machine
    assert (tmp_path / "run.html").stat().st_size < 300_000


@given(st.lists(st.floats(-1e99, 1e99), min_size=1, max_size=20), st.booleans())
def test_axes_hold_the_values_and_have_few_round_ticks(values: list[float], zero: bool) -> None:
    low, high, ticks = charts._axis(np.array(values), zero)
    slack = 1e-6 * max(abs(low), abs(high))
    assert low - slack <= min(values) and max(values) <= high + slack
    assert 2 <= len(ticks) <= 9
    labels = [charts._label(tick, ticks) for tick in ticks]
    assert len(set(labels)) == len(labels) or high - low <= 1e-4 * max(abs(low), abs(high))


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([2.1, 3.9], ["2", "2.5", "3", "3.5", "4"]),
        ([0.0, 2e-5], ["0", "5e-6", "1e-5", "1.5e-5", "2e-5"]),
        ([0.0, 51_000.0], ["0", "10k", "20k", "30k", "40k", "50k", "60k"]),
        ([0.0, 4_000.0], ["0", "1,000", "2,000", "3,000", "4,000"]),
        ([3.0], ["2.6", "2.8", "3", "3.2", "3.4"]),
    ],
)
def test_ticks(values: list[float], labels: list[str]) -> None:
    ticks = charts._axis(np.array(values), zero=False)[2]
    assert [charts._label(tick, ticks) for tick in ticks] == labels


def test_a_wide_gradient_norm_is_logarithmic(tmp_path: Path) -> None:
    steps = metrics(50)
    assert "logarithmic" not in words(written(tmp_path, steps))
    steps[20]["grad_norm"] = 300.0
    seen = words(written(tmp_path, steps))
    assert "logarithmic" in seen and " 1 10 100 " in seen
    steps[30]["grad_norm"] = 0.0  # can't be
    assert "logarithmic" not in words(written(tmp_path, steps))
