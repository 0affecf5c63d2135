"""Checkpoints that appear whole, written while training goes on, and readable by any number of ranks.

OUT/checkpoints/step-00000250/{model/, state-00000.safetensors, …, complete.json}. `model/` is a plain Transformers
folder. The optimizer's state is one flat tensor a weight and kind ("exp_avg.NAME"), held in pieces: each rank writes
what it owns as "exp_avg.NAME@START", and reads whatever part of it is its own when it goes on.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pandallm import files, log
from pandallm.config import UserError

COMPLETE = "complete.json"  # written last: sizes and hashes of all other files, and the trainer's state
LISTING = "listing-{:05d}.json"  # a rank's files, in a folder that isn't complete yet
SHARD_BYTES = 2 << 30  # a model's files are about this large: what one rank holds of it while it is written
Tensors = dict[str, torch.Tensor]
Content = dict[str, Tensors]  # path within the checkpoint -> what a rank writes there


def model_files(model: PreTrainedModel, most: int = SHARD_BYTES) -> dict[str, list[str]]:
    """File name -> names of the weights in it, as Transformers lays a model out. Tied weights stand once."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, p in model.named_parameters():
        size = _numel(p) * p.element_size()
        if groups[-1] and held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _numel(p: torch.nn.Parameter) -> int:
    return int(getattr(p, "ds_numel", p.numel()))  # ZeRO-3 leaves an empty tensor in place of a weight


def save_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """All of a Transformers folder but the weights: configuration, index of the files, tokenizer with its template."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = dict(model.named_parameters())
    model.config.dtype = next(iter(parameters.values())).dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    layout = model_files(model)
    if len(layout) > 1:
        size = sum(_numel(p) * p.element_size() for p in parameters.values())
        index = {name: file for file, names in layout.items() for name in names}
        files.write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index}
        )


def folder_of(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}"


def steps(out: Path) -> list[int]:
    """Steps that have a checkpoint folder, newest first; whether each is whole is for `newest` to say."""
    names = (out / "checkpoints").glob("step-*") if (out / "checkpoints").is_dir() else ()
    found = [re.fullmatch(r"step-(\d{8})", path.name) for path in names]
    return sorted((int(m[1]) for m in found if m), reverse=True)


class Writer:
    """Writes one folder at a time in the background, from copies that each rank hands over.

    Ranks share a folder and don't talk from their threads: each says at a step's end (`report`) how far it is, and when
    all are through, `settle` publishes the folder. A write that fails costs that folder, with a warning, and no more.
    """

    def __init__(self, rank: int, ranks: int, barrier: Callable[[], None]) -> None:
        self.rank, self.ranks, self.barrier = rank, ranks, barrier
        self._thread: threading.Thread | None = None
        self._fault: str | None = None
        self._final = Path()
        self._complete: dict[str, Any] | None = None
        self._then: Callable[[], None] | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None

    def begin(
        self,
        final: Path,
        content: Content,
        rest: Callable[[Path], None],
        complete: dict[str, Any] | None = None,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Starts writing `final`: every rank its `content`, rank 0 also what `rest(folder)` writes.

        With `complete`, complete.json holds it and the hash of every file. `then` is called once the folder is there.
        """
        assert not self.busy
        self._final, self._complete, self._then, self._fault = final, complete, then, None
        tmp = self._folder()
        if self.rank == 0:
            try:
                shutil.rmtree(tmp, ignore_errors=True)
                tmp.mkdir(parents=True)
            except OSError as e:
                self._fault = str(e)
        self.barrier()
        self._thread = threading.Thread(target=self._write, args=(tmp, content, rest), name="checkpoint")
        self._thread.start()

    def _folder(self) -> Path:
        return self._final.with_name(self._final.name + files.TEMPORARY)

    def _write(self, tmp: Path, content: Content, rest: Callable[[Path], None]) -> None:
        try:
            if self.rank == 0 and self._fault is None:
                rest(tmp)
            for name, tensors in content.items():
                (tmp / name).parent.mkdir(parents=True, exist_ok=True)
                save_file(tensors, tmp / name, metadata={"format": "pt"})
                files.fsync_file(tmp / name)
            if self._complete is not None:
                files.write_json(tmp / LISTING.format(self.rank), _listing(tmp, [tmp / name for name in content]))
        except Exception as e:  # whatever it is, a folder that isn't whole must not be published
            self._fault = self._fault or f"{type(e).__name__}: {' '.join(str(e).split())}"

    def report(self) -> list[float]:
        """[this rank is through, this rank failed], to be summed over the ranks and given to `settle`."""
        through = self._thread is not None and not self._thread.is_alive()
        return [float(through), float(through and self._fault is not None)]

    def settle(self, through: float, failed: float) -> None:
        """Publishes the folder once all ranks are through; gives it up where one failed."""
        if not self.busy or through < self.ranks:
            return
        self._thread = None
        if failed:
            reason = self._fault or "another rank could not write"
            log.warn(f"{self._final} could not be written ({reason}); training goes on, without it")
        if self.rank == 0:
            try:
                if not failed:
                    self._publish()
            except OSError as e:
                log.warn(f"{self._final} could not be written ({e}); training goes on, without it")
            finally:
                shutil.rmtree(self._folder(), ignore_errors=True)
        if self._then and not failed:
            self._then()

    def wait(self, total: Callable[[list[float]], list[float]]) -> None:
        """Until what was begun is published or given up; `total` sums over the ranks."""
        if self._thread is not None:
            self._thread.join()
            self.settle(*total(self.report()))
        self.barrier()

    def _publish(self) -> None:
        tmp = self._folder()
        if self._complete is not None:
            listing: dict[str, Any] = {}
            for path in [tmp / LISTING.format(rank) for rank in range(self.ranks)]:
                listing |= files.read_json(path)
                path.unlink()
            rest = [p for p in sorted(tmp.rglob("*")) if p.is_file() and str(p.relative_to(tmp)) not in listing]
            files.write_json(tmp / COMPLETE, self._complete | {"files": listing | _listing(tmp, rest)})
        files.publish_dir(tmp, self._final)


def _listing(folder: Path, paths: list[Path]) -> dict[str, Any]:
    """Size and hash of files; an empty one has no bytes to guard."""
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "blake3": files.hash_file(path)}
        for path in paths
        if path.stat().st_size
    }


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        listing = files.read_json(folder / COMPLETE)["files"]
    except (OSError, ValueError, KeyError):
        return f"{COMPLETE} is missing or broken"
    for name, known in listing.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != known["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {known['bytes']}"
        if files.hash_file(path) != known["blake3"]:
            return f"{name} is damaged: its content changed since it was written"
    return None


def newest(out: Path) -> Path | None:
    """The newest checkpoint that is whole, every byte checked; a damaged one is passed over with a warning."""
    for step in steps(out):
        folder = folder_of(out, step)
        fault = _fault(folder)
        if fault is None:
            return folder
        log.warn(f"{folder}: {fault}; going back to the checkpoint before it")
    return None


def prune(out: Path, keep: int, newest: int) -> None:
    """Removes all but the `keep` checkpoints up to that of step `newest`, and what killed runs left. What is newer was
    damaged: the run went back behind it."""
    there = steps(out)
    kept = [step for step in there if step <= newest][:keep]
    for step in set(there) - set(kept):
        shutil.rmtree(folder_of(out, step))
    for path in (out / "checkpoints").glob(f"*{files.TEMPORARY}"):
        shutil.rmtree(path, ignore_errors=True)


class Pieces:
    """A checkpoint's optimizer state, whoever wrote it: `fill` reads any stretch of it, from any rank's files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[str, list[tuple[int, int, Any]]] = {}  # kind.name -> (start, end, open file)
        for path in sorted(folder.glob("state-*.safetensors")):
            file = safe_open(path, "pt")
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                name, _, start = key.rpartition("@")
                size = file.get_slice(key).get_shape()[0]
                self._found.setdefault(name, []).append((int(start), int(start) + size, file))

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def fill(self, name: str, start: int, out: torch.Tensor) -> None:
        """Copies elements start … start + len(out) of `name` into `out` [n]. UserError if some were never written."""
        missing = out.numel()
        for first, last, file in self._found.get(name, ()):
            a, b = max(start, first), min(start + out.numel(), last)
            if a < b:
                out[a - start : b - start] = file.get_slice(f"{name}@{first}")[a - first : b - first]
                missing -= b - a
        if missing:
            raise UserError(f"{self.folder}: holds no state of {name}; it was written by a run of another model")
