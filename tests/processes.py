"""Processes that the tests start: forks of one that has imported torch, and work that begins before the first test."""
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

# It has imported what takes long, and nothing of this repository.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["hypothesis", "numpy", "pytest", "sentencepiece", "torch", "torch._dynamo"])


class Early:
    """Work that starts processes and waits for them. Begun, it goes on beside the tests, one after the other, in a
    process that knows nothing of what they replace; it must be a function of a module and return what pickle knows.
    """

    def __init__(self) -> None:
        self.begun: list[Callable[[], Any]] = []
        self.results: dict[Callable[[], Any], Any] = {}

    def begin(self, works: Sequence[Callable[[], Any]]) -> None:
        self.begun, self.folder = list(works), tempfile.TemporaryDirectory(prefix="early_")
        self.process = FORKS.Process(target=_work_off, args=(self.begun, Path(self.folder.name)))
        self.process.start()

    def __call__(self, work: Callable[[], Any]) -> Any:
        """What the work returned; it is done here and now unless it was begun."""
        if work not in self.results:
            self.results[work] = self._wait(work) if work in self.begun else work()
        return self.results[work]

    def _wait(self, work: Callable[[], Any]) -> Any:
        path = Path(self.folder.name) / f"{self.begun.index(work)}.pickle"
        while not path.exists():
            assert self.process.is_alive() or path.exists(), f"{work.__name__} ended with its process"
            time.sleep(0.02)
        is_done, result = pickle.loads(path.read_bytes())
        if not is_done:
            pytest.fail(f"{work.__name__}:\n{result}", pytrace=False)
        return result

    def end(self) -> None:
        """Also of what nobody waits for any more."""
        if self.begun:
            if self.process.is_alive():
                os.killpg(self.process.pid, signal.SIGTERM)
            self.process.join()
            self.folder.cleanup()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGTERM)


def _work_off(works: Sequence[Callable[[], Any]], folder: Path) -> None:
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(folder / "output.txt", "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for number, work in enumerate(works):
        try:
            result = True, work()
        except BaseException:
            result = False, traceback.format_exc()
        path = folder / f"{number}.pickle"
        path.with_suffix(".part").write_bytes(pickle.dumps(result))
        path.with_suffix(".part").rename(path)
