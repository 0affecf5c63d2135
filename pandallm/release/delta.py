"""Delta weights: what a tuned model adds to its base, lossless and small; base + delta = tuned, bit for bit.

A delta folder holds `manifest.json`, `delta-00001.bin`, … (a zstd frame a tensor) and the tuned model's files that are
not weights. Hashes are of tensors (dtype, shape, bytes), whatever the shards. One tensor is in memory at a time.

The codec. Bits of a float, the negative ones flipped, order as the floats do (M. Herf, "Radix Tricks", 2001), so
tuned - base modulo 2^n is exact for every pattern (NaN, -0.0), and small. Zigzag makes small negative differences
small too; byte planes keep the high bytes, nearly all zero, apart from the low ones.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open

from pandallm import __version__, files, log
from pandallm.config import Config, UserError

MANIFEST, SINGLE, INDEX = "manifest.json", "model.safetensors", "model.safetensors.index.json"
BLOB_FILE_BYTES, SHARD_BYTES = 4 << 30, 5 * 10**9  # a blob never begins after the first; a shard keeps below the second
CHUNK = 1 << 18  # elements worked on at once: they fit in a core's cache
ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
ITEM_BYTES |= {"F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8}  # by safetensors' names
DIFFERENCED = ("BF16", "F16", "F32", "F64")
WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")
# Bytes of weights repeat by chance only: long matches and a table of 64 entries leave the work to the entropy coder.
# Delta / model, SmolLM2-135M in bf16, noise 1e-3 / 1e-4 / 1e-5 on all weights: 0.255 / 0.106 / 0.021. Level 3: 0.282 /
# 0.111 / 0.022, slower; level 9: 0.278 / 0.099 / 0.020, at a tenth of the speed. No zigzag: 0.347 / 0.156 / 0.028.
PACKING = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6, threads=-1)
MAX_RATIO = 1 << 15  # zstd: a block gives at most 2^17 bytes and takes at least 4

Uints = NDArray[Any]  # one dimension, of u1, u2, u4 or u8
Count = Annotated[int, Field(ge=0)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Shape = tuple[int, ...]
Model = dict[str, "Tensor"]


class Tensor(NamedTuple):
    """A tensor in a safetensors file."""

    path: Path
    name: str
    dtype: str
    shape: Shape

    def raw(self) -> Uints:
        """Its bytes, mapped. The file is opened anew each time, so that pages already read don't count as ours."""
        with safe_open(self.path, framework="pt") as f:
            tensor: torch.Tensor = f.get_tensor(self.name)
        return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()

    def hash(self) -> str:
        return _hash(self.dtype, self.shape, self.raw())


class Entry(Config):
    """A tensor of a delta. `kind` grown: the base's rows as differences, the new rows below them whole."""

    model_config = ConfigDict(strict=True)
    name: str
    dtype: str
    shape: tuple[Count, ...]
    kind: Literal["diff", "grown", "whole"]
    file: Annotated[str, Field(pattern=r"^delta-[0-9]{5}\.bin$")]
    offset: Count
    nbytes: Count
    base_shape: tuple[Count, ...] | None = None
    base_hash: Hash | None = None
    tuned_hash: Hash
    blob_hash: Hash

    @property
    def size(self) -> int:  # bytes of the tuned tensor
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @model_validator(mode="after")
    def _consistent(self) -> Entry:
        known = self.dtype in ITEM_BYTES and self.name != "__metadata__"
        absent = {self.kind == "whole", self.base_shape is None, self.base_hash is None}
        if not known or len(absent) > 1 or self.kind != _kind(self.dtype, self.shape, self.dtype, self.base_shape):
            raise ValueError(f"{self.name}: name, dtype, kind, shapes and hashes don't fit")
        if self.size > self.nbytes * MAX_RATIO:
            raise ValueError(f"{self.name}: the blob is too small for the shape")
        return self


class Manifest(Config):
    """`manifest.json` of a delta folder. `files`: hashes of the files that are not weights, by name."""

    model_config = ConfigDict(strict=True)
    format: Literal["pandallm-delta"] = "pandallm-delta"
    version: Literal[1] = 1
    pandallm: str = __version__
    tuned_bytes: Count
    delta_bytes: Count
    tensors: tuple[Entry, ...]
    files: dict[str, Hash]

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        sizes = {e.name: e.size for e in self.tensors}
        if len(sizes) != len(self.tensors) or self.tuned_bytes != sum(sizes.values()):
            raise ValueError("a tensor is listed twice, or the sizes don't add up")
        if wrong := [name for name in self.files if not _is_carried(name)]:
            raise ValueError(f"'{wrong[0]}' is not the name of a file that a delta carries")
        return self


def make(base: Path, tuned: Path, out: Path) -> dict[str, Any]:
    """Writes the delta folder `out` and returns a summary (bytes, seconds); no work where it is there already.

    Raises UserError: folders that can't be read, tensors of unknown dtype, `out` in use for something else.
    """
    start = time.monotonic()
    was, now, carried = _open(base), _open(tuned), _carried(tuned)
    if _is_done(out, lambda: verify(base, out, tuned)):
        return _summary(_read_manifest(out), start)
    if other := [name for name, t in now.items() if name in was and was[name].dtype != t.dtype]:
        log.warn(f"{len(other)} of {len(now)} tensors have another dtype than in the base and are stored whole")
    with files.atomic_dir(out) as tmp:
        # Wide dtypes first, as safetensors itself orders them: every tensor of the result is then aligned.
        order = sorted(now.values(), key=lambda t: -ITEM_BYTES[t.dtype])
        entries = tuple(_encode(was.get(t.name), t, tmp) for t in log.watch(order, "delta made"))
        for name in carried:
            shutil.copyfile(_inside(tuned, name), tmp / name)
        size, nbytes = sum(e.size for e in entries), sum(e.nbytes for e in entries)
        manifest = Manifest(tuned_bytes=size, delta_bytes=nbytes, tensors=entries, files=carried)
        files.write_json(tmp / MANIFEST, manifest.model_dump(mode="json"))
    return _summary(manifest, start)


def apply(base: Path, delta: Path, out: Path) -> dict[str, Any]:
    """Writes base + delta as the model folder `out` and returns a summary; no work where it is there already.

    Raises UserError: not the delta's base (before anything is written), a damaged delta, no room, `out` in use.
    """
    start = time.monotonic()
    manifest, was = _read_manifest(delta), _open(base)
    _check_base(base, was, manifest)
    if _is_done(out, lambda: _check_tuned(out, manifest)):
        return _summary(manifest, start)
    free = shutil.disk_usage(next(p for p in out.absolute().parents if p.exists())).free
    if free < manifest.tuned_bytes:
        raise UserError(f"{out}: {manifest.tuned_bytes / 1e9:.1f} GB are needed there, {free / 1e9:.1f} GB are free")
    with files.atomic_dir(out) as tmp:
        _write_model(was, delta, manifest, tmp)
        for name in manifest.files:
            shutil.copyfile(_inside(delta, name), tmp / name)
    return _summary(manifest, start)


def verify(base: Path, delta: Path, tuned: Path | None = None) -> dict[str, Any]:
    """Checks a delta against its base, and against `tuned` if given; writes nothing. {"ok": True, …} or a UserError."""
    start = time.monotonic()
    manifest, was = _read_manifest(delta), _open(base)
    _check_base(base, was, manifest)
    for entry in log.watch(manifest.tensors, "delta verified"):
        _decode(was, delta, entry)
    if tuned is not None:
        _check_tuned(tuned, manifest)
    return {"ok": True, **_summary(manifest, start)}


def _kind(dtype: str, shape: Shape, base_dtype: str, base_shape: Shape | None) -> Literal["diff", "grown", "whole"]:
    if base_shape is None or dtype != base_dtype or dtype not in DIFFERENCED:
        return "whole"
    if shape == base_shape:
        return "diff"
    grown = len(shape) == len(base_shape) and shape[1:] == base_shape[1:] and shape[:1] > base_shape[:1]
    return "grown" if grown else "whole"


def _hash(dtype: str, shape: Sequence[int], raw: Uints) -> str:
    return files.hash_bytes(f"{dtype} {list(shape)} {files.hash_bytes(raw.data)}".encode())


def _order(bits: Uints, back: bool = False) -> Uints:
    """Bits of floats -> integers of the same order: negative ones flipped, the others' sign bit set; or back."""
    last = 8 * bits.itemsize - 1
    ones = (bits.view(f"i{bits.itemsize}") >> last).view(bits.dtype)  # where the top bit is set, else zeros
    return bits ^ ((~ones if back else ones) | bits.dtype.type(1 << last))


def _pack(base: Uints, tuned: Uints) -> bytes:
    """`tuned` as a zstd frame of byte planes, low bytes first; where there is a `base`, zigzagged differences."""
    planes = np.empty((tuned.itemsize, tuned.size), np.uint8)
    for i in range(0, tuned.size, CHUNK):
        part, old = tuned[i : i + CHUNK].copy(), base[i : i + CHUNK]
        diff = _order(part[: old.size]) - _order(old)
        part[: old.size] = (diff << 1) ^ (diff.view(f"i{diff.itemsize}") >> (8 * diff.itemsize - 1)).view(diff.dtype)
        planes[:, i : i + CHUNK] = part.view(np.uint8).reshape(-1, part.itemsize).T
    return zstandard.ZstdCompressor(compression_params=PACKING).compress(planes.reshape(-1).data)


def _unpack(blob: bytes, base: Uints, out: Uints) -> None:
    """Undoes `_pack` into `out`. Raises zstandard.ZstdError for what is not a frame of just that size."""
    if zstandard.frame_content_size(blob) != out.nbytes:  # zstd would allocate what the frame asks for
        raise zstandard.ZstdError("another size")
    content = zstandard.ZstdDecompressor().decompress(blob, allow_extra_data=False)
    planes = np.frombuffer(content, np.uint8).reshape(out.itemsize, out.size)
    for i in range(0, out.size, CHUNK):
        part, old = out[i : i + CHUNK], base[i : i + CHUNK]
        part.view(np.uint8).reshape(-1, part.itemsize)[:] = planes[:, i : i + CHUNK].T
        code = part[: old.size]
        part[: old.size] = _order(((code >> 1) ^ -(code & 1)) + _order(old), back=True)


def _encode(was: Tensor | None, now: Tensor, folder: Path) -> Entry:
    """One tensor: its blob appended to the folder's newest file, its entry returned."""
    kind = _kind(now.dtype, now.shape, was.dtype, was.shape) if was else "whole"
    uint, raw, base, about = f"u{ITEM_BYTES[now.dtype]}", now.raw(), np.empty(0, np.uint8), dict[str, Any]()
    if was and kind != "whole":
        base = was.raw()
        about = {"base_shape": was.shape, "base_hash": _hash(was.dtype, was.shape, base)}
    blob = _pack(base.view(uint), raw.view(uint))
    full = [path for path in folder.glob("delta-*.bin") if path.stat().st_size >= BLOB_FILE_BYTES]
    path = folder / f"delta-{len(full) + 1:05d}.bin"
    with open(path, "ab") as f:
        about |= {"file": path.name, "offset": f.tell(), "nbytes": f.write(blob), "blob_hash": files.hash_bytes(blob)}
    tuned_hash = _hash(now.dtype, now.shape, raw)
    return Entry(name=now.name, dtype=now.dtype, shape=now.shape, kind=kind, tuned_hash=tuned_hash, **about)


def _decode(was: Model, delta: Path, entry: Entry) -> Uints:
    """The tuned tensor's bytes, checked. Raises UserError for a damaged blob or an edited manifest."""
    with open(_inside(delta, entry.file), "rb") as f:
        f.seek(entry.offset)
        blob = f.read(entry.nbytes)
    if files.hash_bytes(blob) != entry.blob_hash:
        raise UserError(f"{delta / entry.file}: damaged at tensor {entry.name} (wrong hash); get the file again")
    base = np.empty(0, np.uint8) if entry.base_shape is None else was[entry.name].raw()
    out = np.empty(math.prod(entry.shape), f"u{ITEM_BYTES[entry.dtype]}")
    try:
        _unpack(blob, base.view(out.dtype), out)
    except zstandard.ZstdError:
        raise UserError(f"{delta / entry.file}: tensor {entry.name} does not unpack; get the delta again") from None
    if _hash(entry.dtype, entry.shape, out.view(np.uint8)) != entry.tuned_hash:
        raise UserError(f"{delta / MANIFEST}: tensor {entry.name} does not give its hash; get the delta again")
    return out.view(np.uint8)


def _write_model(was: Model, delta: Path, manifest: Manifest, folder: Path) -> None:
    """Streams the tuned tensors into safetensors shards (the format: README of github.com/huggingface/safetensors)."""
    shards, end = list[list[Entry]](), 0
    for e in manifest.tensors:
        if not shards or end + e.size > SHARD_BYTES:
            shards, end = [*shards, []], 0
        shards[-1].append(e)
        end += e.size
    entries, where = log.watch(manifest.tensors, "model written"), dict[str, str]()
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, end = dict[str, Any](__metadata__={"format": "pt"}), 0
        for e in shard:
            header[e.name] = {"dtype": e.dtype, "shape": e.shape, "data_offsets": [end, end := end + e.size]}
            where[e.name] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / name, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for _ in shard:
                f.write(_decode(was, delta, next(entries)).data)
    if len(shards) > 1:
        files.write_json(folder / INDEX, {"metadata": {"total_size": manifest.tuned_bytes}, "weight_map": where})


def _open(folder: Path) -> Model:
    """Tensors of a Hugging Face folder, by name. Raises UserError for files that can't be read."""
    where: dict[str, str] = {}
    if (folder / INDEX).exists() and not (folder / SINGLE).exists():  # as Transformers chooses
        try:
            where = {name: str(shard) for name, shard in files.read_json(_inside(folder, INDEX))["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{folder / INDEX}: not an index of shards; get the file again") from None
    model: Model = {}
    for shard in sorted(set(where.values())) or [SINGLE]:
        path = _inside(folder, shard)
        try:
            with safe_open(path, framework="pt") as f:
                slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 (not a mapping)
                found = [Tensor(path, name, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()]
        except (SafetensorError, OSError) as e:
            raise UserError(f"{path}: not a readable safetensors file ({e}); get the file again") from None
        model |= {t.name: t for t in found if where.get(t.name, shard) == shard}
    if lost := where.keys() - model:
        raise UserError(f"{folder / INDEX}: {min(lost)} is not in the shard it names; get the model again")
    if unknown := [t for t in model.values() if t.dtype not in ITEM_BYTES]:
        raise UserError(f"{unknown[0].path}: tensor {unknown[0].name}: dtype {unknown[0].dtype} is not supported")
    return model


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`, links followed. Raises UserError where it isn't there or leads out of the folder."""
    try:
        home, real = folder.resolve(), (folder / name).resolve()
    except (OSError, RuntimeError, ValueError):
        raise UserError(f"{folder}: '{name}' is not the name of a file") from None
    roots = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]  # the hub's cache
    plain = not PurePath(name).is_absolute() and ".." not in PurePath(name).parts
    if not plain or not any(real.is_relative_to(root) for root in roots):
        raise UserError(f"{folder}: '{name}' leads outside the folder; put the file itself there")
    if not real.is_file():
        raise UserError(f"{folder / name}: no such file; a whole model in safetensors, or a whole delta, is wanted")
    return real


def _is_carried(name: str) -> bool:
    """Is this the plain name of a file that goes along unchanged? Not weights, not git's files, not our manifest."""
    plain = name != MANIFEST and not set(name) & set("/\\\0") and not name.startswith(".")
    return plain and name != "" and not name.lower().endswith(WEIGHTS)


def _carried(folder: Path) -> dict[str, str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and _is_carried(p.name))
    return {name: files.hash_file(_inside(folder, name)) for name in names}


def _is_done(out: Path, check: Callable[[], object]) -> bool:
    """Is the result in `out` already? UserError where it does not pass `check`, or where it could not be made."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        files.check_writable(out.parent)
        return False
    try:
        check()
    except UserError as e:
        raise UserError(f"{out}: holds something else ({e}); choose another folder or remove it") from None
    log.say(f"{out}: there already, whole and checked; nothing to do")
    return True


def _read_manifest(delta: Path) -> Manifest:
    """The manifest, with all but the blobs checked. Raises UserError for a damaged or edited folder."""
    try:
        manifest = Manifest.model_validate_json(_inside(delta, MANIFEST).read_bytes())
    except ValidationError as e:
        where, what = ".".join(map(str, e.errors()[0]["loc"])), e.errors()[0]["msg"]
        raise UserError(f"{delta / MANIFEST}: damaged or of another version: {where}: {what}") from None
    sizes = {name: _inside(delta, name).stat().st_size for name in {e.file for e in manifest.tensors}}
    if cut := [e for e in manifest.tensors if e.offset + e.nbytes > sizes[e.file]]:
        raise UserError(f"{delta / cut[0].file}: ends before tensor {cut[0].name} does; get the file again")
    for name, wanted in manifest.files.items():
        if files.hash_file(_inside(delta, name)) != wanted:
            raise UserError(f"{delta / name}: not the file that the manifest lists (wrong hash); get it again")
    return manifest


def _check_tuned(folder: Path, manifest: Manifest) -> None:
    """Raises UserError where the folder is not the tuned model, tensors and other files alike."""
    model, carried = _open(folder), _carried(folder)
    odd = [name for name in carried | manifest.files if carried.get(name) != manifest.files.get(name)]
    odd += sorted(model.keys() ^ {e.name for e in manifest.tensors})
    same_names = log.watch([] if odd else manifest.tensors, "tuned model checked")
    if odd := odd or [e.name for e in same_names if model[e.name].hash() != e.tuned_hash]:
        raise UserError(f"{folder}: not the tuned model of this delta: {odd[0]} differs, of {len(odd)} that do")


def _check_base(folder: Path, was: Model, manifest: Manifest) -> None:
    """Raises UserError, with the likely cause, where the model is not the one that the delta was made from."""
    wanted = [e for e in manifest.tensors if e.base_shape is not None]
    bad = [e for e in wanted if e.name not in was or was[e.name].shape != e.base_shape]
    cause = "missing or of another shape: a model of another architecture or size"
    if not bad and (bad := [e for e in wanted if was[e.name].dtype != e.dtype]):
        cause = f"{was[bad[0].name].dtype} where {bad[0].dtype} is wanted: a conversion of the base to another dtype"
    if not bad:  # the headers agree: only now is it worth reading every byte
        bad = [e for e in log.watch(wanted, "base checked") if was[e.name].hash() != e.base_hash]
        cause = "of the right shape and dtype with other values: another conversion, or tuned already"
    if bad:
        first = f"{len(bad)} of {len(wanted)} tensors differ, first {bad[0].name}"
        raise UserError(f"{folder}: not the base of this delta: {first}: {cause}")


def _summary(manifest: Manifest, start: float) -> dict[str, Any]:
    kinds = [e.kind for e in manifest.tensors]
    counts = {"tensors": len(kinds), **{kind: kinds.count(kind) for kind in ("diff", "grown", "whole")}}
    nbytes, size = manifest.delta_bytes, manifest.tuned_bytes
    sizes = {"bytes": nbytes, "tuned_bytes": size, "ratio": round(nbytes / max(1, size), 4)}
    return {**counts, **sizes, "seconds": round(time.monotonic() - start, 2)}
