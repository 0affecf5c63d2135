"""Ranks: how one comes to know its place (torchrun, the deepspeed launcher and srun alike) and its device, how work
without gradients is shared out among them, and how one ends when another dies."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed

from pandallm import log
from pandallm.config import UserError

BEAT = 3.0  # seconds between two signs of life of a rank
SILENCE = 20.0  # seconds without one after which a rank counts as dead

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def environment() -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK and the master's address where srun started this process."""
    env = os.environ
    if "RANK" in env or int(env.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
    env.setdefault("MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")))
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes: "gpu[03-05,9],cpu1" -> "gpu03"; this machine where the list is empty."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0]) if match else "127.0.0.1"


def device() -> torch.device:
    """This rank's device. UserError where a node has fewer GPUs than ranks."""
    if not torch.cuda.is_available():
        _keep_memory()
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= torch.cuda.device_count():
        raise UserError(f"rank {number} of this node has no GPU: there are {torch.cuda.device_count()}; start fewer")
    found = torch.device("cuda", number)
    torch.cuda.set_device(found)
    return found


def _keep_memory() -> None:
    """Where tensors come from glibc's heap, makes it keep what a batch's end frees: the next one wants it again,
    and having it from the system anew took 7 % of a training step. Other C libraries have their own ways."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)  # a large tensor still goes back at once


def check_precision(precision: str, device: torch.device) -> None:
    """Warns of what a card of before Ampere (compute capability 8.0) can't do well."""
    if device.type != "cuda":
        return
    name, ampere = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device) >= (8, 0)
    if precision.startswith("bf16") and not ampere:
        log.warn(f"precision: {name} emulates bf16, which is slow; fp16 (engine: deepspeed) or fp32 run natively")
    if precision == "fp16":
        log.warn(
            "precision: fp16 overflows where a model was trained in bf16, as LLaMA's descendants were; steps whose"
            " gradient overflows are skipped and marked in metrics.jsonl"
            + ("; this card can do bf16" if ampere else "")
        )


class Heartbeat:
    """Ends this rank soon after another one's death, when its partners would wait for it in a collective.

    Rank 0 watches all, the others watch rank 0. Every rank counts up its own key in the process group's store.
    """

    def __init__(self) -> None:
        self.rank, ranks = distributed.get_rank(), distributed.get_world_size()
        self._watched = range(1, ranks) if self.rank == 0 else range(1)
        store: Any = distributed.distributed_c10d._get_default_store()
        self._store = distributed.PrefixStore("panda_heartbeat", store.clone())  # a connection of its own
        self._over = threading.Event()
        self._answered = time.monotonic()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._guard)]
        for thread in self._threads:
            thread.start()

    def _beat(self) -> None:
        seen = {rank: (0, time.monotonic()) for rank in self._watched}
        while not self._over.wait(BEAT):
            try:
                self._store.add(str(self.rank), 1)
                counts = {rank: self._store.add(str(rank), 0) for rank in self._watched}
            except RuntimeError:
                self._die("the ranks' store is gone")
                return
            self._answered = now = time.monotonic()
            for rank, count in counts.items():
                before, since = seen[rank]
                if count != before:
                    seen[rank] = (count, now)
                elif now - since > SILENCE:
                    self._die(f"rank {rank} has been silent for {now - since:.0f} s")

    def _guard(self) -> None:
        """The store lives in rank 0 where no launcher holds it: where that machine hangs, so does whoever asks it."""
        while not self._over.wait(BEAT):
            if time.monotonic() - self._answered > 2 * SILENCE:
                self._die("the ranks' store, which rank 0 or the launcher holds, does not answer")

    def _die(self, why: str) -> None:
        if not self._over.is_set():
            print(f"panda: rank {self.rank} ends: {why}", flush=True)
            os._exit(1)

    def close(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


@contextmanager
def group() -> Iterator[None]:
    """Inside it, `share` and `from_first` are over all ranks that a launcher has started; without one, over this."""
    environment()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    distributed.init_process_group("gloo")  # results go between them, no tensors of a GPU
    heart = Heartbeat()
    try:
        yield
    except BaseException:
        heart.close()
        raise
    heart.close()
    distributed.barrier()  # rank 0 may hold the store: it leaves when all hearts have stopped
    distributed.destroy_process_group()


def world() -> int:
    """How many ranks share the work."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def share(batches: Sequence[Batch], work: Callable[[Batch], dict[int, Result]]) -> dict[int, Result]:
    """What `work` makes of all batches, on every rank: the ranks take the batches in turn.

    The batches are the same however many ranks there are, and so is what is made of them. A UserError of one is
    raised by all.
    """
    if world() == 1:
        return {key: value for batch in batches for key, value in work(batch).items()}
    mine: dict[int, Result] | UserError = {}
    try:
        mine = {k: v for batch in batches[distributed.get_rank() :: world()] for k, v in work(batch).items()}
    except UserError as e:
        mine = e
    parts: list[Any] = [None] * world()
    distributed.all_gather_object(parts, mine)
    for part in parts:
        if isinstance(part, UserError):
            raise part
    return {key: value for part in parts for key, value in part.items()}


def from_first(make: Callable[[], Result]) -> Result:
    """What rank 0 makes, on every rank; so with a UserError."""
    if world() == 1:
        return make()
    made: list[Any] = [None]
    if distributed.get_rank() == 0:
        try:
            made = [make()]
        except UserError as e:
            made = [e]
    distributed.broadcast_object_list(made, 0)
    if isinstance(made[0], UserError):
        raise made[0]
    return made[0]
