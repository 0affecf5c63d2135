"""`panda train`: a user's mistakes are one line and leave nothing behind, or what was there as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteYaml
from test_equalities import config, panda

from pandallm.config import UserError
from pandallm.train import run as train

SCRATCH = {"config": {"hidden_size": 10, "num_attention_heads": 4}, "tokenizer": "tiny"}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"seed": 1 << 40}, "seed: Input should be less than"),
        ({"epochs": 0.001, "max_steps": None}, r"epochs: 0.001 of \d+ rows is no row"),
        ({"adam_betas": [0.9]}, "adam_betas.1: this key is needed"),
        ({"adam_betas": []}, "adam_betas"),
        ({"adam_betas": [1.0, 0.9]}, "adam_betas.0: Input should be less than 1"),
        ({"model": None, "init": SCRATCH}, r"init.config: .*10"),
        ({"deepspeed": {"zero_optimization": {"stage": 7}}}, "deepspeed.zero_optimization: a mapping with the stage"),
        ({"deepspeed": {"zero_optimization": 3}}, "deepspeed.zero_optimization: a mapping with the stage"),
        (
            {"deepspeed": {"gradient_clipping": 1.0}},
            "deepspeed.gradient_clipping: leave it out; max_grad_norm decides it",
        ),
        ({"deepspeed": {"train_batch_size": 8}}, "deepspeed.train_batch_size: leave it out; global_batch_size"),
        ({"trackers": ["wandb"]}, "wandb"),
    ],
)
def test_mistakes(
    keys: dict[str, Any],
    said: str,
    demo_shards: Path,
    tmp_path: Path,
    write_yaml: WriteYaml,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed, whatever is
    with pytest.raises(UserError, match=said) as e:
        train.run(config(write_yaml, demo_shards, tmp_path / "run", **keys), [])
    assert "\n" not in str(e.value) and not (tmp_path / "run" / "run.json").exists()
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_out_that_can_not_be_written(place: str, demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run: can't be written \(.*\); choose another folder"):
        train.run(config(write_yaml, demo_shards, tmp_path / place), [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "train.yaml"]


@pytest.mark.parametrize("text", ["[]", "{", '{"settings": 5}', "5"])
def test_a_record_that_is_none(text: str, demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run.json.*: (not valid JSON|is no run's record)"):
        train.run(config(write_yaml, demo_shards, tmp_path / "run"), [])
    assert (tmp_path / "run" / "run.json").read_text() == text


@pytest.mark.slow
def test_a_mistake_that_deepspeed_finds(demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    keys = {"engine": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 1, "reduce_bucket_size": "x"}}}
    command = panda("train", config(write_yaml, demo_shards, tmp_path / "run", **keys))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "panda: deepspeed: DeepSpeedZeroConfig: reduce_bucket_size: " in done.stderr
    assert not (tmp_path / "run").exists()
