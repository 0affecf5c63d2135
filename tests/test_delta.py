"""Delta weights: base + delta = tuned, bit for bit, whatever the dtypes, shapes and shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pandallm.release import delta

Tensors = dict[str, torch.Tensor]


def llama(dtype: torch.dtype = torch.bfloat16, vocab: int = 32, tied: bool = True, **sizes: int) -> LlamaForCausalLM:
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        **sizes,
    }
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, tie_word_embeddings=tied, **shape))
    return model.to(dtype=dtype)  # type: ignore[call-arg,arg-type,unused-ignore]


def noisy(model: LlamaForCausalLM, sigma: float = 1e-3, seed: int = 2) -> LlamaForCausalLM:
    """The model with noise on every parameter, as training leaves it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p.float() + sigma * torch.randn(p.shape, generator=generator)).to(p.dtype))
    return model


def tensors(folder: Path) -> Tensors:
    found: Tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as f:
            found |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    return found


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(a: Path, b: Path) -> None:
    """Same tensors bit for bit (read by safetensors itself, not by the module), same other files."""
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    for name in left:
        assert (left[name].dtype, left[name].shape) == (right[name].dtype, right[name].shape), name
        assert bits(left[name]) == bits(right[name]), name
    others = [{p.name: p.read_bytes() for p in f.iterdir() if "safetensors" not in p.name} for f in (a, b)]
    assert others[0] == others[1]


def folder(path: Path, weights: Tensors) -> Path:
    """A model folder of bare tensors."""
    path.mkdir()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
def test_applied_is_tuned(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    base, tuned, out, made = (tmp_path / n for n in ("base", "tuned", "delta", "made"))
    llama(dtype, tied=tied).save_pretrained(base)
    noisy(llama(dtype, tied=tied)).save_pretrained(tuned)
    summary = delta.make(base, tuned, out)
    assert summary["diff"] == summary["tensors"] == len(tensors(tuned))
    assert summary["tuned_bytes"] == sum(t.nbytes for t in tensors(tuned).values())
    assert delta.verify(base, out, tuned)["ok"] is True
    assert delta.apply(base, out, made)["bytes"] == summary["bytes"]
    assert_same(tuned, made)


@pytest.mark.parametrize("tied", [True, False])
def test_grown_vocabulary(tmp_path: Path, tied: bool) -> None:
    base, tuned, out = tmp_path / "base", tmp_path / "tuned", tmp_path / "delta"
    llama(vocab=4096, tied=tied).save_pretrained(base)
    model = llama(vocab=4096, tied=tied)
    model.resize_token_embeddings(4097, mean_resizing=False)
    model.save_pretrained(tuned)
    summary = delta.make(base, tuned, out)
    assert (summary["grown"], summary["whole"]) == (1 if tied else 2, 0)
    assert summary["ratio"] < 0.02  # the other rows are the base's: only the new one costs
    delta.apply(base, out, tmp_path / "made")
    assert_same(tuned, tmp_path / "made")
    # From 32 to 33 rows, with changes in the old ones too; and back to 32: another shape, so whole.
    small, grown = {"w": torch.randn(32, 4).bfloat16()}, {"w": torch.randn(33, 4).bfloat16()}
    a, b = folder(tmp_path / "a", small), folder(tmp_path / "b", grown)
    assert delta.make(a, b, tmp_path / "ab")["grown"] == 1
    assert delta.make(b, a, tmp_path / "ba")["whole"] == 1
    for start, way, end in ((a, "ab", b), (b, "ba", a)):
        delta.apply(start, tmp_path / way, tmp_path / f"{way}-made")
        assert_same(end, tmp_path / f"{way}-made")


def test_shards_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "SHARD_BYTES", 4000)
    monkeypatch.setattr(delta, "BLOB_FILE_BYTES", 1000)
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    llama().save_pretrained(base)
    llama().save_pretrained(tmp_path / "base3", max_shard_size="3KB")
    noisy(llama()).save_pretrained(tuned, max_shard_size="5KB")
    assert len(list((tmp_path / "base3").glob("*.safetensors"))) > 2
    delta.make(base, tuned, tmp_path / "delta")
    assert len(list((tmp_path / "delta").glob("delta-*.bin"))) > 2
    delta.apply(tmp_path / "base3", tmp_path / "delta", tmp_path / "made")
    made = sorted((tmp_path / "made").glob("*.safetensors"))
    assert len(made) > 2 and all(sum(t.nbytes for t in tensors_of(p).values()) <= 4000 for p in made)
    assert_same(tuned, tmp_path / "made")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made").state_dict()
    wanted = AutoModelForCausalLM.from_pretrained(tuned).state_dict()
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)
    delta.make(tmp_path / "base3", tuned, tmp_path / "delta3")
    assert (tmp_path / "delta3" / "manifest.json").read_bytes() == (tmp_path / "delta" / "manifest.json").read_bytes()


def tensors_of(path: Path) -> Tensors:
    with safe_open(path, framework="pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_bit_pattern(tmp_path: Path, dtype: torch.dtype) -> None:
    """NaNs with payloads, infinities, zeros of both signs, subnormals, extremes: each against each, and random bits."""
    width = dtype.itemsize
    inf = int.from_bytes(bits(torch.tensor(float("inf"), dtype=dtype)), "little")
    special = np.array([0, 1, 2, inf - 1, inf, inf + 1, (1 << 8 * width - 1) - 1], f"u{width}")
    special = np.concatenate([special, special | np.array(1 << 8 * width - 1, f"u{width}")])
    dice = np.random.default_rng(3).integers(0, 256, (2, 70_001 * width), np.uint8).view(f"u{width}")
    halves = [np.concatenate(c) for c in ((np.repeat(special, 14), dice[0]), (np.tile(special, 14), dice[1]))]
    base, tuned = (torch.from_numpy(h.view(f"i{width}")).view(dtype) for h in halves)
    a, b = folder(tmp_path / "a", {"w": base, "back": tuned}), folder(tmp_path / "b", {"w": tuned, "back": base})
    assert delta.make(a, b, tmp_path / "d")["diff"] == 2
    delta.apply(a, tmp_path / "d", tmp_path / "made")
    assert_same(b, tmp_path / "made")


def test_chunks_and_order() -> None:
    """The map keeps the order of floats and goes back; borders of chunks fall anywhere."""
    x = np.array([-np.inf, -3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3e38, np.inf], np.float32).view(np.uint32)
    ordered = delta._order(x)
    assert (np.diff(ordered.astype(np.int64)) > 0).all()
    assert (delta._order(ordered, back=True) == x).all()
    rng = np.random.default_rng(0)
    c = delta.CHUNK
    for old, new in ((c - 1, c + 1), (c, 2 * c), (c + 1, c + 1), (0, 7)):
        base, tuned = (rng.integers(0, 1 << 16, n, np.uint16) for n in (old, new))
        out = np.empty_like(tuned)
        delta._unpack(delta._pack(base, tuned), base, out)
        assert (out == tuned).all()


def test_small_changes_cost_little(tmp_path: Path) -> None:
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    step = (x.view(torch.int16) + torch.randint(-1, 2, x.shape, dtype=torch.int16)).view(torch.bfloat16)
    base = folder(tmp_path / "base", {"w": x})
    assert delta.make(base, folder(tmp_path / "same", {"w": x.clone()}), tmp_path / "d0")["ratio"] < 0.001
    # -1, 0 or 1 unit in the last place: log2(3) / 16 bits is 0.1; signs must not leak into the high plane.
    assert delta.make(base, folder(tmp_path / "step", {"w": step}), tmp_path / "d1")["ratio"] < 0.13


def test_other_dtypes_shapes_and_names(tmp_path: Path) -> None:
    base = {"ids": torch.arange(9), "mask": torch.tensor([True, False, True]), "reshaped": torch.ones(2, 6).half()}
    base |= {"cast": torch.ones(4).half(), "gone": torch.ones(3), "scalar": torch.tensor(1.5)}
    base |= {"empty": torch.ones(0, 3), "rank": torch.ones(3)}
    tuned = {"ids": torch.arange(9) * -3, "mask": torch.tensor([False] * 3), "reshaped": torch.ones(3, 4).half()}
    tuned |= {"cast": torch.ones(4).bfloat16(), "new": torch.randn(5), "scalar": torch.tensor(float("nan"))}
    tuned |= {"empty": torch.ones(0, 3), "rank": torch.ones(3, 1), "f8": torch.randn(7).to(torch.float8_e4m3fn)}
    tuned |= {"i8": torch.arange(-3, 4, dtype=torch.int8), "nothing": torch.ones(0)}
    a, b = folder(tmp_path / "a", base), folder(tmp_path / "b", tuned)
    summary = delta.make(a, b, tmp_path / "d")
    assert (summary["diff"], summary["whole"]) == (2, 9)  # scalar and empty
    delta.apply(a, tmp_path / "d", tmp_path / "made")
    assert_same(b, tmp_path / "made")
    # As safetensors itself writes: the data and every tensor begin at a multiple of the element's size.
    raw = (tmp_path / "made" / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"} and length % 8 == 0
    assert all(t["data_offsets"][0] % tuned[name].element_size() == 0 for name, t in header.items())
