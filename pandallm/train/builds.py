"""The lock under which DeepSpeed's operators are compiled, made to end with the process that holds it."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress

from torch.utils import cpp_extension


class Baton:
    """Stands in for torch's FileBaton: a lock on the file, which the system lets go at any death.

    torch's own is the file's mere presence. A build killed midway leaves it behind, and every later run of the user's
    waits for it without a word (as of torch 2.13). Here the processes take turns, and each asks ninja what is left to
    build; so a build cut short is finished by the next.
    """

    def __init__(self, lock_file_path: str, **_: object) -> None:
        self.path = lock_file_path
        self.fd = -1

    def try_acquire(self) -> bool:
        """Waits for the lock; always True."""
        while True:
            self.fd = os.open(self.path, os.O_CREAT | os.O_RDWR)
            fcntl.flock(self.fd, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self.fd), os.stat(self.path)):
                    return True
            os.close(self.fd)  # its last holder has removed this file: the lock is on another by now

    def release(self) -> None:
        with suppress(FileNotFoundError):
            os.remove(self.path)  # another toolkit's torch would take it for held
        os.close(self.fd)


def end_with_their_process() -> None:
    """From now on, builds of this process take turns by `Baton`."""
    cpp_extension.FileBaton = Baton  # type: ignore[assignment, misc]
