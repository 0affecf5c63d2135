"""Deltas of model folders: what goes along loads and comes back, and every damage or wrong base is one clear line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from safetensors.torch import save_file
from test_delta import assert_same, folder, llama, noisy, tensors
from transformers import AutoModelForCausalLM

from pandallm import files
from pandallm.config import UserError
from pandallm.release import delta

ROOT = Path(__file__).parent.parent


def refused(act: Callable[[], object], *words: str) -> str:
    """Runs what must end in a UserError of one line that holds the words."""
    with pytest.raises(UserError) as e:
        act()
    text = str(e.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text
    return text


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    """(base, tuned, delta) of a tiny bf16 model, with a tokenizer's file beside the weights."""
    base, tuned, out = tmp_path / "base", tmp_path / "tuned", tmp_path / "delta"
    llama().save_pretrained(base)
    noisy(llama()).save_pretrained(tuned)
    (tuned / "tokenizer.json").write_text('{"熊": "猫"}', encoding="utf-8")
    delta.make(base, tuned, out)
    return base, tuned, out


def edit(out: Path, change: Callable[[Any], object]) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    change(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))


def test_applied_loads_in_transformers(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, out = pair
    delta.apply(base, out, tmp_path / "made")
    ids = torch.arange(12)[None]
    logits = [AutoModelForCausalLM.from_pretrained(p)(ids).logits for p in (tuned, tmp_path / "made", base)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_files_that_go_along(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, _ = pair
    for name in ("training_args.bin", "optimizer.pt", "x.gguf", "stale.safetensors.index.json", ".gitattributes"):
        (tuned / name).write_text("x")
    (tuned / "chat_template.jinja").write_text("{{ x }}")
    (tuned / "checkpoint-1").mkdir()
    delta.make(base, tuned, tmp_path / "d")
    config = {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    assert {p.name for p in (tmp_path / "d").iterdir()} == config | {"manifest.json", "delta-00001.bin"}
    delta.apply(base, tmp_path / "d", tmp_path / "made")
    assert {p.name for p in (tmp_path / "made").iterdir()} == config | {"model.safetensors"}
    (tuned / "secret").symlink_to("/etc/hostname")
    refused(lambda: delta.make(base, tuned, tmp_path / "d2"), "secret", "outside")


@pytest.mark.parametrize("kind", ["architecture", "fewer", "dtype", "values"])
def test_wrong_base_is_refused(pair: tuple[Path, Path, Path], tmp_path: Path, kind: str) -> None:
    base, _, out = pair
    other, made = tmp_path / "other", tmp_path / "made"
    if kind == "architecture":
        llama(hidden_size=32).save_pretrained(other)
        words = ["20 of 20", "another architecture or size"]
    elif kind == "fewer":
        llama(num_hidden_layers=1).save_pretrained(other)
        words = ["9 of 20", "model.layers.1.", "another architecture or size"]
    elif kind == "dtype":
        llama(torch.float16).save_pretrained(other)
        words = ["20 of 20", "F16 where BF16 is wanted", "conversion"]
    else:
        weights = tensors(base)
        weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
        folder(other, weights)
        words = ["1 of 20", "model.layers.1.mlp.up_proj.weight", "other values", "tuned already"]
    before = sorted(tmp_path.iterdir())
    refused(lambda: delta.apply(other, out, made), str(other), "not the base of this delta", *words)
    refused(lambda: delta.verify(other, out), *words)
    assert sorted(tmp_path.iterdir()) == before  # nothing left, not even a temporary folder


def test_verify_compares_the_tuned_model(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, out = pair
    assert delta.verify(base, out)["ok"] is True
    refused(lambda: delta.verify(base, out, base), "tuned model of this delta")
    weights = tensors(tuned)
    for change, word in (("model.norm.weight", "model.norm.weight"), (None, "extra")):
        other = shutil.copytree(tuned, tmp_path / word)
        changed = {name: t.clone() for name, t in weights.items()} | ({} if change else {"extra": torch.ones(1)})
        if change:
            changed[change][0] += 1
        save_file(changed, other / "model.safetensors", {"format": "pt"})
        refused(lambda other=other: delta.verify(base, out, other), word)  # type: ignore[misc]
    (tuned / "tokenizer.json").write_text("{}")
    refused(lambda: delta.verify(base, out, tuned), "tokenizer.json")


def test_damaged_blobs(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, out = pair
    blob, whole = out / "delta-00001.bin", (out / "delta-00001.bin").read_bytes()
    made = tmp_path / "made"
    for damage, words in (
        (whole[:-1], ["delta-00001.bin", "ends before"]),
        (b"", ["delta-00001.bin", "ends before"]),
        (whole[:500] + bytes([whole[500] ^ 4]) + whole[501:], ["delta-00001.bin", "damaged at tensor", "hash"]),
        (whole[:-1] + bytes([whole[-1] ^ 1]), ["damaged at tensor"]),
    ):
        blob.write_bytes(damage)
        refused(lambda words=words: delta.apply(base, out, made), *words)  # type: ignore[misc]
        refused(lambda words=words: delta.verify(base, out), *words)  # type: ignore[misc]
        assert not made.exists() and not list(tmp_path.glob("*.partial"))
    blob.unlink()
    refused(lambda: delta.verify(base, out), "delta-00001.bin", "no such file")
    blob.write_bytes(whole)
    (out / "config.json").write_text("{}")
    refused(lambda: delta.apply(base, out, made), "config.json", "hash")


def first(**changes: Any) -> Callable[[Any], object]:
    return lambda manifest: manifest["tensors"][0].update(changes)


EDITS: dict[str, Callable[[Any], object]] = {
    "file outside": first(file="../delta/delta-00001.bin"),
    "absolute file": first(file="/etc/passwd"),
    "carried file outside": lambda m: m["files"].update({"../evil.json": "0" * 64}),
    "carried weights": lambda m: m["files"].update({"model.safetensors": "0" * 64}),
    "carried file absent": lambda m: m["files"].update({"absent.json": "0" * 64}),
    "offset outside": first(offset=10**9),
    "huge offset": first(offset=10**30),
    "negative offset": first(offset=-1),
    "other offset": first(offset=1),
    "nbytes": first(nbytes=10**9),
    "text for a number": first(nbytes="7"),
    "dtype": first(dtype="F99"),
    "other dtype": first(dtype="F16"),
    "shape": first(shape=[10**9, 10**9]),
    "negative shape": first(shape=[-1, 4]),
    "smaller shape": first(shape=[1]),
    "kind": first(kind="sum"),
    "whole with a base": first(kind="whole"),
    "no base hash": first(base_hash=None),
    "wrong tuned hash": first(tuned_hash="0" * 64),
    "no hash": first(blob_hash="x"),
    "reserved name": first(name="__metadata__"),
    "other name": first(name="nothing"),
    "missing key": lambda m: m["tensors"][0].pop("blob_hash"),
    "unknown key": first(surprise=1),
    "twice": lambda m: m["tensors"].append(m["tensors"][0]),
    "no tensors": lambda m: m.pop("tensors"),
    "version": lambda m: m.update(version=2),
    "format": lambda m: m.update(format="other"),
    "sizes": lambda m: m.update(tuned_bytes=1),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_manifest(pair: tuple[Path, Path, Path], tmp_path: Path, name: str) -> None:
    base, _, out = pair
    edit(out, EDITS[name])
    refused(lambda: delta.apply(base, out, tmp_path / "made"))
    refused(lambda: delta.verify(base, out))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "delta", "tuned"]


def test_edited_whole_tensor(tmp_path: Path) -> None:
    """Other shapes, of the same bytes or far too many: nothing in the base contradicts them, the delta itself does."""
    base = folder(tmp_path / "base", {"v": torch.ones(2)})
    delta.make(base, folder(tmp_path / "tuned", {"w": torch.randn(3, 4)}), tmp_path / "d")
    edit(tmp_path / "d", first(shape=[4, 3]))
    refused(lambda: delta.verify(base, tmp_path / "d"), "does not give its hash")
    edit(tmp_path / "d", first(shape=[10**9, 10**9]))
    edit(tmp_path / "d", lambda manifest: manifest.update(tuned_bytes=4 * 10**18))
    refused(lambda: delta.verify(base, tmp_path / "d"), "too small for the shape")


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "sub/x.json", "../x.json", ".profile", ""])
def test_names_of_carried_files(pair: tuple[Path, Path, Path], tmp_path: Path, name: str) -> None:
    """A delta from elsewhere can't place weights, or files outside, even where file and hash are in order."""
    base, _, out = pair
    (out / "sub").mkdir()
    if name and name != "manifest.json":
        (out / name).write_text("x")
    edit(out, lambda manifest: manifest["files"].update({name: files.hash_bytes(b"x")}))
    refused(lambda: delta.apply(base, out, tmp_path / "made"), "not the name of a file that a delta carries")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_manifest_that_is_none(pair: tuple[Path, Path, Path], text: bytes) -> None:
    base, _, out = pair
    (out / "manifest.json").write_bytes(text)
    refused(lambda: delta.verify(base, out), "manifest.json", "damaged")
    (out / "manifest.json").unlink()
    refused(lambda: delta.verify(base, out), "manifest.json", "no such file")


def test_frames_cannot_grow_past_the_tensor(tmp_path: Path) -> None:
    """A manifest in order with itself whose frame holds, or says it holds, more than dtype and shape imply."""
    base = folder(tmp_path / "base", {"w": torch.zeros(64)})
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 20))
    tail = zstandard.ZstdCompressor().compress(bytes(256)) + b"tail"
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(256))
    for i, blob in enumerate((bomb, tail, unsized, b"not zstd at all")):
        out = tmp_path / f"d{i}"
        delta.make(base, folder(tmp_path / f"tuned{i}", {"w": torch.ones(64)}), out)
        (out / "delta-00001.bin").write_bytes(blob)
        edit(out, first(nbytes=len(blob), blob_hash=files.hash_bytes(blob)))
        refused(lambda out=out: delta.verify(base, out), "does not unpack")  # type: ignore[misc]


@pytest.mark.parametrize(
    "shard", ["../other/model.safetensors", "../base/part.safetensors", "OUT", "IN", "link.safetensors", "absent"]
)
def test_index_stays_in_its_folder(pair: tuple[Path, Path, Path], tmp_path: Path, shard: str) -> None:
    base, tuned, _ = pair
    other = shutil.copytree(base, tmp_path / "other")
    os.rename(base / "model.safetensors", base / "part.safetensors")
    (base / "link.safetensors").symlink_to(other / "model.safetensors")
    absolute = {"OUT": str(other / "model.safetensors"), "IN": str(base / "part.safetensors")}
    name = absolute.get(shard, shard)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    word = "no such file" if shard == "absent" else "outside the folder"
    refused(lambda: delta.make(base, tuned, tmp_path / "d"), word)
    refused(lambda: delta.make(tuned, base, tmp_path / "d"), word)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"absent": "model-1.safetensors"}}'])
def test_broken_models(pair: tuple[Path, Path, Path], tmp_path: Path, index: str) -> None:
    base, tuned, _ = pair
    whole = (base / "model.safetensors").read_bytes()
    os.rename(base / "model.safetensors", base / "model-1.safetensors")
    (base / "model.safetensors.index.json").write_text(index)
    refused(lambda: delta.make(base, tuned, tmp_path / "d"), "model.safetensors.index.json")
    for damaged in (b"", b"x" * 40, whole[:-2]):
        (base / "model.safetensors").write_bytes(damaged)
        refused(lambda: delta.make(base, tuned, tmp_path / "d"), "safetensors", "get the file again")
    refused(lambda: delta.make(tmp_path / "absent", tuned, tmp_path / "d"), "absent", "no such file")


def test_hub_cache(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """In the hub's cache every file is a link to ../../blobs: base and delta work from there."""
    base, tuned, out = pair
    for source in (base, out):
        snapshot = tmp_path / "hub" / source.name / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot.parent.parent / "blobs").mkdir()
        for i, path in enumerate(source.iterdir()):
            shutil.copyfile(path, snapshot.parent.parent / "blobs" / str(i))
            (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    hub = tmp_path / "hub"
    delta.apply(hub / "base" / "snapshots" / "abc", hub / "delta" / "snapshots" / "abc", tmp_path / "made")
    assert_same(tuned, tmp_path / "made")


def test_done_already(pair: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned, out = pair
    made = tmp_path / "made"
    (made).mkdir()  # an empty folder is as good as none
    delta.apply(base, out, made)
    stamps = {p: p.stat().st_mtime_ns for folder in (made, out) for p in folder.iterdir()}
    assert delta.apply(base, out, made)["tensors"] == delta.make(base, tuned, out)["tensors"] == 20
    assert capsys.readouterr().err.count("nothing to do") == 2
    assert {p: p.stat().st_mtime_ns for folder in (made, out) for p in folder.iterdir()} == stamps
    advice = "choose another folder or remove it"
    refused(lambda: delta.make(base, base, out), str(out), advice)
    refused(lambda: delta.make(tuned, tuned, out), str(out), advice)
    refused(lambda: delta.apply(base, out, tuned.parent), advice)
    (made / "config.json").write_text("{}")
    refused(lambda: delta.apply(base, out, made), "config.json", advice)
    (tuned / "chat_template.jinja").write_text("new")  # the tuned model has changed: that delta is not its own
    refused(lambda: delta.make(base, tuned, out), "chat_template.jinja", advice)
    (tmp_path / "file").write_text("")
    refused(lambda: delta.apply(base, out, tmp_path / "file"), advice)


def test_no_room(pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _, out = pair
    monkeypatch.setattr(delta.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    refused(lambda: delta.apply(base, out, tmp_path / "deep" / "made"), "GB are needed")
    assert not (tmp_path / "deep").exists()


def test_folders_that_can_not_be_written(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, out = pair
    (tmp_path / "file").touch()
    for where in (tmp_path / "file" / "made", Path("/proc/made")):
        refused(lambda where=where: delta.apply(base, out, where), "choose another folder")
        refused(lambda where=where: delta.make(base, tuned, where), "choose another folder")


KILLED = """
import os, signal, sys
from pathlib import Path
from pandallm.release import delta
decode, left = delta._decode, [int(sys.argv[4])]
def dying(*args):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return decode(*args)
delta._decode = dying
delta.apply(*map(Path, sys.argv[1:4]))
"""


def test_killed_apply(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, out = pair
    made = tmp_path / "made"
    run = subprocess.run([sys.executable, "-c", KILLED, base, out, made, "11"], cwd=ROOT, capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    assert not made.exists()
    assert list(tmp_path.glob("made*.partial"))  # it died in the middle, not before
    delta.apply(base, out, made)
    assert_same(tuned, made)
    assert not list(tmp_path.glob("made*.partial"))
    delta.apply(base, out, tmp_path / "other")
    assert (made / "model.safetensors").read_bytes() == (tmp_path / "other" / "model.safetensors").read_bytes()
