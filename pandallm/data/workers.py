"""Jobs -> parts, in this process, in local processes or on a Ray cluster: the same function, the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from pandallm import log
from pandallm.config import UserError
from pandallm.data import tokenize
from pandallm.data.tokenize import Job

SAY_EVERY = 10.0  # seconds between two lines of progress
PROCESSES_PAY = 4_000_000  # bytes of corpora below which starting processes takes longer than the work

Counts = dict[str, Any]


def run_all(jobs: list[Job], workers: int, ray: str | None, check: Callable[[list[Counts]], None]) -> list[Counts]:
    """Makes the parts; results in the jobs' order. `check` sees those that are done after each, and may raise."""
    done: list[Counts] = []
    last = time.monotonic()
    with _results(jobs, workers, ray) as results:
        for result in results:
            done.append(result)
            check(done)
            if time.monotonic() - last >= SAY_EVERY:
                last = time.monotonic()
                log.say(f"{jobs[0].out}: {len(done)} of {len(jobs)} parts, {sum(d['read'] for d in done)} records")
    return done


@contextmanager
def _results(jobs: list[Job], workers: int, ray: str | None) -> Iterator[Iterator[Counts]]:
    workers = min(workers, len(jobs))
    if ray:
        with _cluster(ray, jobs) as results:
            yield results
    elif workers == 1 or sum(span.size for job in jobs for span in job.spans) < PROCESSES_PAY:
        yield map(tokenize.run, jobs)
    else:
        context = multiprocessing.get_context("spawn")  # a forked tokenizer with threads may hang
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
        try:
            yield pool.map(tokenize.run, jobs)
        except BrokenProcessPool:
            raise UserError(
                f"{jobs[0].out}: a worker was killed, most likely for want of memory; the same command goes on"
                " (fewer workers need less)"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed must not go on: the next run writes the same files."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


@contextmanager
def _cluster(address: str, jobs: list[Job]) -> Iterator[Iterator[Counts]]:
    """Each job a task of one core. All nodes must see the corpora, the tokenizer and `out` under the same paths."""
    try:
        import ray
    except ImportError:
        raise UserError("--ray: Ray is not installed; pip install 'pandallm[ray]'") from None
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():
            socket.create_connection((host, int(port)), timeout=10).close()  # Ray itself would try for minutes
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(
            f"--ray {address}: no cluster there ({str(e).splitlines()[0]}); start one: ray start --head"
        ) from None
    env = {"TOKENIZERS_PARALLELISM": "false"}
    work = ray.remote(num_cpus=1, max_retries=3, runtime_env={"env_vars": env})(_run_in)
    try:
        tasks = [work.remote(os.getcwd(), job) for job in jobs]
        yield (ray.get(task) for task in tasks)
    finally:
        ray.shutdown()  # ends the tasks too


def _run_in(folder: str, job: Job) -> Counts:
    os.chdir(folder)  # relative paths mean what they mean here
    return tokenize.run(job)
