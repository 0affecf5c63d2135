"""How a rank comes to know its place: torchrun, the deepspeed launcher and srun alike; and what its device can't do."""

from __future__ import annotations

import os
import re
import threading
import time
from typing import Any

import torch

from pandallm import log
from pandallm.config import UserError
from pandallm.model import load

BEAT = 3.0  # seconds between two signs of life of a rank
SILENCE = 20.0  # seconds without one after which a rank counts as dead


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
        load.keep_memory()
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= torch.cuda.device_count():
        raise UserError(f"rank {number} of this node has no GPU: there are {torch.cuda.device_count()}; start fewer")
    found = torch.device("cuda", number)
    torch.cuda.set_device(found)
    return found


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
        self.rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._watched = range(1, ranks) if self.rank == 0 else range(1)
        store: Any = torch.distributed.distributed_c10d._get_default_store()
        self._store = torch.distributed.PrefixStore("panda_heartbeat", store.clone())  # a connection of its own
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
