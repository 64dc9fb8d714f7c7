"""Fixtures shared by all tests: golden vectors, tiny models and data, and what the machine can run."""
import gc
import os
from collections.abc import Callable
from pathlib import Path

# One thread, here and in every process that a test starts: the tensors are tiny, the result does not depend on the
# machine's number of cores, and OpenMP's threads, which wait by spinning, stand still where the cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from processes import Early  # noqa: E402

# Where no GPU can run Triton's kernels, its interpreter does. It must be on before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)
settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.load_profile("deterministic")

REPO = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip_gpu = pytest.mark.skip(reason="needs a CUDA device")
    skip_gloo = pytest.mark.skip(reason="this torch has no gloo backend")
    has_gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip_gpu)
        if "two_process" in item.keywords and not has_gloo:
            item.add_marker(skip_gloo)
    items.sort(key=lambda item: "early" in item.keywords)            # what they wait for needs its time


EARLY = Early()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Early work begins, unless several processes share the tests and with them the machine's cores.

    The garbage collector need not walk over all that was imported, again and again, and not after every few objects:
    with torch, Triton and sympy in memory it took a tenth of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    works = [mark.kwargs["work"] for item in session.items if not item.get_closest_marker("skip")
             for mark in item.iter_markers("early")]
    if works and not hasattr(session.config, "workerinput"):
        EARLY.begin(list(dict.fromkeys(works)))


def pytest_unconfigure() -> None:
    EARLY.end()
    gc.unfreeze()                                          # libraries report what nobody has freed at the exit


@pytest.fixture(autouse=True)
def _same_seed_for_every_test() -> None:
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def early() -> Early:
    """early(work) is the result of the work named in a test's mark `early`."""
    return EARLY


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of this repository."""
    return REPO


def _vector_folders() -> list[Path]:
    named = os.environ.get("VECTORS_DIR")
    first = Path(named) if named else REPO.parent / "shared" / "vectors"
    return [first, REPO / "tests" / "vectors"]


@pytest.fixture(scope="session")
def vectors_dir() -> Path:
    """The folder of golden vectors: VECTORS_DIR, ../shared/vectors, or tests/vectors."""
    for folder in _vector_folders():
        if folder.is_dir():
            return folder
    pytest.skip(f"no golden vectors in {' or '.join(map(str, _vector_folders()))}; set VECTORS_DIR")


@pytest.fixture(scope="session")
def load_vectors() -> Callable[[str], dict[str, np.ndarray]]:
    """load_vectors(name) returns all arrays of NAME.npz; skips the test when no folder has it."""
    loaded: dict[str, dict[str, np.ndarray]] = {}

    def load(name: str) -> dict[str, np.ndarray]:
        if name not in loaded:
            path = next((folder / f"{name}.npz" for folder in _vector_folders()
                         if (folder / f"{name}.npz").is_file()), None)
            if path is None:
                pytest.skip(f"no {name}.npz in {' or '.join(map(str, _vector_folders()))}; set VECTORS_DIR")
            with np.load(path) as archive:
                loaded[name] = {key: archive[key] for key in archive.files}
        return loaded[name]
    return load
