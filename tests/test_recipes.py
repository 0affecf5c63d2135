"""Every config that ships: the figures of the original's recipes, and two steps of each on the tiny model."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from pandallm import config, log
from pandallm.data import prepare
from pandallm.data.prepare import PrepareConfig
from pandallm.train import run as train
from pandallm.train.settings import TrainConfig

ZH = ROOT / "conf" / "llama" / "zh"
# RECIPE section 3: (micro batch per GPU, accumulation, learning rate, epochs, save every), on 16 GPUs.
FIGURES = {
    "llama_7b_zh_instruct_v1_0_ds": (4, 128, 1e-5, 1, 250),
    "llama_13b_zh_instruct_v1_0_ds": (2, 128, 1e-5, 1, 250),
    "llama_7b_zh_instruct_coig_sft_v1_0_ds": (4, 2, 3e-5, 5, 50),
}


def test_all_recipes_are_there() -> None:
    assert {path.stem for path in ZH.glob("*.yaml")} == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_figures(name: str) -> None:
    conf = config.load(TrainConfig, ZH / f"{name}.yaml")
    micro, accumulation, lr, epochs, save_every = FIGURES[name]
    assert (conf.micro_batch_size, conf.global_batch_size) == (micro, 16 * micro * accumulation)
    assert (conf.learning_rate, conf.epochs, conf.save_every) == (lr, epochs, save_every)
    assert (conf.schedule, conf.warmup_ratio) == ("warmup_decay", 0.01)
    assert (conf.adam_betas, conf.adam_eps, conf.weight_decay) == ((0.9, 0.99), 1e-6, 0.0)
    assert (conf.max_grad_norm, conf.precision, conf.activation_checkpointing) == (5.0, "bf16", "full")
    assert (conf.engine, conf.seed, conf.pad_token) == ("deepspeed", 42, "<pad>")
    zero = conf.deepspeed["zero_optimization"]
    assert zero == {
        "stage": 1,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 500_000_000,
        "allgather_bucket_size": 500_000_000,
    }
    data = yaml.safe_load((ZH / "data" / f"{Path(conf.data).name}.yaml").read_text(encoding="utf-8"))
    assert (data["seq_len"], data["out"], data["chat_format"], data["pad_token"]) == (2048, conf.data, "panda", "<pad>")


@pytest.mark.parametrize(
    "path", sorted(ZH.parent.glob("*/data/*.yaml")) + sorted((ROOT / "conf" / "demo").glob("*_data.yaml"))
)
def test_data_configs_load(path: Path) -> None:
    config.load(PrepareConfig, path)


@pytest.fixture(scope="module")
def panda_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demo data as the recipes want theirs: plain format, a pad token, one example a row."""
    folder = tmp_path_factory.mktemp("recipes")
    corpora = ROOT / "pandallm" / "demo" / "corpora"
    source = f"sources=[{{name: coig, path: {corpora / 'instruct_home.jsonl'}}}]"
    out = folder / "shards"
    prepare.run(str(ZH / "data" / "coig_sft_v1_0.yaml"), ["tokenizer=tiny", f"out={out}", "seq_len=256", source])
    return out


@pytest.mark.parametrize("name", FIGURES)
def test_two_steps(name: str, panda_shards: Path, tmp_path: Path) -> None:
    """Two steps of each recipe: only the model, data, sizes and engine are others. The vocabulary grows by the pad."""
    small = ["model=tiny", f"data={panda_shards}", f"out={tmp_path / 'run'}", "global_batch_size=8", "max_steps=2"]
    record = train.run(str(ZH / f"{name}.yaml"), [*small, "engine=torch"])
    lines = log.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2] and all(math.isfinite(line["loss"]) for line in lines)
    saved = yaml.safe_load((tmp_path / "run" / "model" / "config.json").read_text())
    assert (saved["vocab_size"], saved["pad_token_id"]) == (513, 512)
    assert record["finished"]


def test_two_steps_with_deepspeed(panda_shards: Path, tmp_path: Path) -> None:
    """The recipe's own engine and ZeRO section, in a process group of one."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    name = "llama_7b_zh_instruct_coig_sft_v1_0_ds"
    small = ["model=tiny", f"data={panda_shards}", f"out={tmp_path / 'run'}", "global_batch_size=8", "max_steps=2"]
    command = [sys.executable, "-m", "pandallm.cli", "train", str(ZH / f"{name}.yaml"), *small]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(log.read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2


def test_demo_configs(demo_shards: Path, tmp_path: Path) -> None:
    for stage in ("pretrain", "sft"):
        keys: list[Any] = ["model=tiny", f"data={demo_shards}", f"out={tmp_path / stage}", "max_steps=2"]
        assert train.run(str(ROOT / "conf" / "demo" / f"{stage}.yaml"), keys)["finished"]
