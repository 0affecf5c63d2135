"""The rules of numerics, as equalities (DESIGN, Numerics): each fails when its mechanism is broken."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WriteYaml

from pandallm import log
from pandallm.data.loader import Loader, collate
from pandallm.data.shards import Shards
from pandallm.model import attention, load
from pandallm.train import run as train
from pandallm.train.objectives import CausalLM, HeadLoss
from pandallm.train.settings import TrainConfig

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
ARCHITECTURES = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 8}),
    ("qwen2", {}),
    ("qwen3", {}),
]
VOCABULARY = 300


def documents(seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Documents of 2 to 40 tokens with random masks; position 0 is never trained."""
    rng = np.random.default_rng(seed)
    found = []
    for length in (17, 2, 40, 9):
        mask = rng.random(length) < 0.6
        mask[0], mask[-1] = False, True
        found.append((rng.integers(0, VOCABULARY, length), mask))
    return found


def plain_loss(model: Any, docs: list[tuple[np.ndarray, np.ndarray]]) -> torch.Tensor:
    """Transformers' own loss of each document alone, its own attention and mask, summed over trained tokens."""
    total = torch.zeros(())
    for ids, mask in docs:
        labels = torch.from_numpy(np.where(mask, ids, -100))[None]
        total = total + model(input_ids=torch.from_numpy(ids)[None], labels=labels).loss * mask.sum()
    return total


@pytest.mark.parametrize(("model_type", "extra"), ARCHITECTURES)
def test_packed_is_unpacked(model_type: str, extra: dict[str, Any]) -> None:
    """Loss and every gradient of a packed row are those of its documents alone under Transformers."""
    attention.register()
    config = {"model_type": model_type, **SHAPE, **extra}
    packed = load.from_scratch(config, VOCABULARY, seed=1, attention=attention.PACKED)
    alone = load.from_scratch(config, VOCABULARY, seed=1, attention="sdpa")
    loss = CausalLM(packed)(collate(documents(), rows=[0]))
    wanted = plain_loss(alone, documents())
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    gradients = dict(alone.named_parameters())
    for name, parameter in packed.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_head_loss_in_chunks_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(50, 16, generator=generator), torch.randn(VOCABULARY, 16, generator=generator)
    targets = torch.randint(0, VOCABULARY, (50,), generator=generator)
    results = []
    for at_once, in_cache in ((7 * 4 * VOCABULARY, 3 * VOCABULARY), (1 << 27, 1 << 21)):  # bytes, numbers
        monkeypatch.setattr("pandallm.train.objectives.LOGITS_AT_ONCE", at_once)
        monkeypatch.setattr("pandallm.train.objectives.LOGITS_IN_CACHE", in_cache)
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = HeadLoss.apply(h, w, targets)
        (loss * 0.5).backward()
        results.append((loss, h.grad, w.grad))
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(h @ w.T, targets, reduction="sum")
    (loss * 0.5).backward()
    for result in results:
        torch.testing.assert_close(result, (loss, h.grad, w.grad), rtol=1e-5, atol=1e-5)


def config(write_yaml: WriteYaml, shards: Path, out: Path, **keys: Any) -> str:
    base = {
        "model": "tiny",
        "data": str(shards),
        "out": str(out),
        "micro_batch_size": 4,
        "global_batch_size": 4,
        "max_steps": 20,
        "learning_rate": 2e-3,
        "warmup_ratio": 0.1,
        "precision": "fp32",
        "activation_checkpointing": "none",
        "save_every": 6,
    }
    return str(write_yaml("train.yaml", **{**base, **keys}))


def metrics(out: Path) -> list[tuple[float, ...]]:
    """What must be equal of each step's line: not the times."""
    lines = log.read_metrics(out / "metrics.jsonl")
    return [tuple(line[key] for key in ("step", "loss", "lr", "grad_norm", "tokens")) for line in lines]


def same(run: Path, whole: Path) -> None:
    """Losses, gradient norms and weights agree; the step's tokens exactly."""
    np.testing.assert_allclose(metrics(run), metrics(whole), rtol=1e-3)
    one, two = (load.load(folder / "model", torch.float32) for folder in (whole, run))
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(two.get_parameter(name), parameter, rtol=1e-3, atol=1e-4)


def panda(*args: str, ranks: int = 1) -> list[str]:
    """A command line of `panda`, on several ranks by torchrun."""
    if ranks == 1:
        return [sys.executable, "-m", "pandallm.cli", *args]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [*launcher, "--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "pandallm.cli", *args]


@pytest.fixture(scope="module")
def reference(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps of the tiny model on one device, undisturbed."""
    folder = tmp_path_factory.mktemp("reference")

    def write(name: str, **keys: Any) -> Path:
        import yaml

        (folder / name).write_text(yaml.safe_dump(keys), encoding="utf-8")
        return folder / name

    train.run(config(write, demo_shards, folder / "run"), [])
    assert len(metrics(folder / "run")) == 20
    return folder / "run"


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulation_does_not_matter(
    micro: int, demo_shards: Path, reference: Path, tmp_path: Path, write_yaml: WriteYaml
) -> None:
    """4 x 1 and 2 x 2 micro batches give the losses of 1 x 4."""
    train.run(config(write_yaml, demo_shards, tmp_path / "run", micro_batch_size=micro), [])
    np.testing.assert_allclose(metrics(tmp_path / "run"), metrics(reference), rtol=1e-4)


@pytest.mark.parametrize("how", ["full", "every-2"])
def test_activation_checkpointing_does_not_matter(
    how: str, demo_shards: Path, reference: Path, tmp_path: Path, write_yaml: WriteYaml
) -> None:
    train.run(config(write_yaml, demo_shards, tmp_path / "run", activation_checkpointing=how), [])
    assert metrics(tmp_path / "run") == metrics(reference)


FAST = [(1, 2, 1)]  # ZeRO stage, ranks, rows of a micro batch; the rest are micro batches that add up
SLOW = [(1, 1, 4), (1, 1, 1), (1, 2, 2), (1, 4, 1), (2, 2, 1), (2, 2, 2), (2, 4, 1), (3, 2, 1), (3, 2, 2), (3, 4, 1)]


@pytest.mark.parametrize("split", [*FAST, *(pytest.param(s, marks=pytest.mark.slow) for s in SLOW)], ids=str)
def test_deepspeed_is_one_process(
    split: tuple[int, int, int], demo_shards: Path, reference: Path, tmp_path: Path, write_yaml: WriteYaml
) -> None:
    """However a step of 4 rows is split over gloo ranks and micro batches: the 20 losses, and the weights, of one torch
    process."""
    stage, ranks, micro = split
    zero_is_one_process(
        f"deepspeed={{zero_optimization: {{stage: {stage}}}}}",
        ranks,
        micro,
        demo_shards,
        reference,
        tmp_path,
        write_yaml,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "offload",
    [
        "{stage: 2, offload_optimizer: {device: cpu}}",
        "{stage: 3, offload_optimizer: {device: cpu}, offload_param: {device: cpu}}",
    ],
)
def test_offload_is_one_process(
    offload: str, demo_shards: Path, reference: Path, tmp_path: Path, write_yaml: WriteYaml
) -> None:
    zero_is_one_process(
        f"deepspeed={{zero_optimization: {offload}}}", 2, 1, demo_shards, reference, tmp_path, write_yaml
    )


def zero_is_one_process(
    setting: str, ranks: int, micro: int, shards: Path, reference: Path, tmp_path: Path, write_yaml: WriteYaml
) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    conf = config(write_yaml, shards, tmp_path / "run", engine="deepspeed", micro_batch_size=micro)
    done = subprocess.run(panda("train", conf, setting, ranks=ranks), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    same(tmp_path / "run", reference)


@pytest.mark.slow
def test_compiled_blocks_are_the_model(
    demo_shards: Path, reference: Path, tmp_path: Path, write_yaml: WriteYaml
) -> None:
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile needs a C++ compiler")
    train.run(config(write_yaml, demo_shards, tmp_path / "run", compile=True), [])
    np.testing.assert_allclose(metrics(tmp_path / "run"), metrics(reference), rtol=1e-4)


def test_bf16_master_weights_follow_fp32(
    demo_shards: Path, reference: Path, tmp_path: Path, write_yaml: WriteYaml
) -> None:
    """bf16 compute with fp32 masters stays near fp32, though each update is below bf16's resolution of the weights."""
    train.run(config(write_yaml, demo_shards, tmp_path / "run", precision="bf16"), [])
    np.testing.assert_allclose([m[1] for m in metrics(tmp_path / "run")], [m[1] for m in metrics(reference)], rtol=5e-3)


def start_and_kill(command: list[str], out: Path, step: int, after: float) -> None:
    """Runs a training until its metrics reach `step`, and `after` seconds more, then kills it with SIGKILL."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(log.read_metrics(out / "metrics.jsonl")) < step:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"the run ended before step {step}: {process.communicate()[1][-2000:]}")
        time.sleep(0.005)
    time.sleep(after)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    ("precision", "kills"), [("fp32", 2), ("bf16", 2), pytest.param("bf16", 10, marks=pytest.mark.slow)]
)
def test_killed_and_resumed_is_uninterrupted(
    precision: str, kills: int, demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml
) -> None:
    """kill -9 at random moments, the same command each time: metrics and weights identical to the undisturbed run."""
    steps = 30 * kills
    whole = config(write_yaml, demo_shards, tmp_path / "whole", precision=precision, max_steps=steps, save_every=3)
    train.run(whole, [])
    rng = np.random.default_rng()  # really random: the steps are in the message
    moments = sorted(int(k) for k in rng.choice(np.arange(2, steps - 8), kills, replace=False))
    out = tmp_path / "killed"
    command = panda("train", whole, f"out={out}")
    for step in moments:
        start_and_kill(command, out, step, after=rng.random() * 0.05)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics(out) == metrics(tmp_path / "whole"), f"killed at {moments}"
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (out, tmp_path / "whole")]
    assert weights[0] == weights[1], f"killed at {moments}"


def test_deepspeed_resumes(demo_shards: Path, tmp_path: Path, write_yaml: WriteYaml) -> None:
    """Two ranks killed and resumed go on to the metrics of two ranks undisturbed."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    keys = {"engine": "deepspeed", "micro_batch_size": 2, "max_steps": 14, "precision": "bf16"}
    conf = config(write_yaml, demo_shards, tmp_path / "whole", **keys)
    assert subprocess.run(panda("train", conf, ranks=2), capture_output=True).returncode == 0
    out = tmp_path / "killed"
    first = subprocess.Popen(
        panda("train", conf, f"out={out}", ranks=2), stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while len(log.read_metrics(out / "metrics.jsonl")) < 9 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = subprocess.run(panda("train", conf, f"out={out}", ranks=2), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics(out) == metrics(tmp_path / "whole")


def test_ranks_share_the_rows_of_a_step(demo_shards: Path) -> None:
    """Whatever the number of ranks and the micro batch, a step's rows are the same, each seen once."""
    shards = Shards(demo_shards)
    wanted = Loader(shards, 1, 7, 7).rows_of(3)
    for world, micro in ((1, 2), (2, 2), (4, 1), (3, 3)):
        loaders = [Loader(shards, 1, 7, micro, rank, world) for rank in range(world)]
        seen = [row for loader in loaders for batch in loader.micro_batches(loader.rows_of(3)) for row in batch.rows]
        assert sorted(seen) == sorted(wanted)
        assert len({len(loader.micro_batches(loader.rows_of(3))) for loader in loaders}) == 1
        trained = sum(len(b.targets) for loader in loaders for b in loader.micro_batches(loader.rows_of(3)))
        assert trained == loaders[0].trained_tokens(wanted)


def test_an_epoch_sees_each_row_once(demo_shards: Path) -> None:
    shards = Shards(demo_shards)
    loader = Loader(shards, 5, 7, 1)
    size = len(shards)
    rows = [row for step in range(1, loader.steps(2) + 1) for row in loader.rows_of(step, 2 * size)]
    assert sorted(rows[:size]) == list(range(size)) and sorted(rows[size:]) == list(range(size))
    assert rows[:size] != rows[size:]  # another order


@pytest.mark.parametrize(("how", "flags"), [("none", [0, 0]), ("full", [1, 1]), ("every-2", [1, 0])])
def test_activation_checkpointing_is_on(how: str, flags: list[int]) -> None:
    """Its result equals that without it, so that it works at all has to be asked apart."""
    model = load.load(load.resolve("tiny"), torch.float32)
    train._prepare(model, TrainConfig(model="tiny", data="", out="", max_steps=1, activation_checkpointing=how))
    assert [int(layer.gradient_checkpointing) for layer in model.model.layers] == flags
