"""One launch writes a cache at a time; another that is started beside it waits, then goes on."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

LOCK = ".writing.lock"  # stays in the folder; a process that is killed holds it no longer
SAID_AGAIN = 60.0  # seconds between log lines
ASKED_AGAIN = 0.5


@contextmanager
def only_one_writes(cache: Path) -> Iterator[None]:
    """Inside the block no other launch writes into the folder, which is made.

    Raises:
        OSError: the folder cannot be written.
    """
    cache.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache / LOCK)
    try:
        _wait(lock, cache)
    except NotImplementedError as error:  # some network file systems
        logger.warning(
            "%s: the file system has no locks (%s): do not write the cache from two launches at "
            "once",
            *(cache, error),
        )
    try:
        yield
    finally:
        lock.release()


def _wait(lock: FileLock, cache: Path) -> None:
    said = -float("inf")
    while True:
        try:
            lock.acquire(timeout=ASKED_AGAIN)
        except Timeout:
            if time.monotonic() - said >= SAID_AGAIN:
                said = time.monotonic()
                logger.warning(
                    "%s is being written by another launch (it holds %s): waiting for its end",
                    *(cache, LOCK),
                )
        else:
            return
