"""A resumed scoring run that keeps its results; run by launch.py and imported by test_pipeline.py."""
import os
import sys
from pathlib import Path

import numpy as np
import torch

import train_gpt as gpt


def results(cfg: gpt.Config, run: gpt.Run) -> dict[str, np.ndarray]:
    """Scores of both evaluations, which lanes this rank ran, and the weights after the base has been adapted."""
    torch.set_num_threads(1)
    found: dict[str, np.ndarray] = {}

    def keep(name, function):
        def wrapped(cfg, run, model, data, *rest):
            score = function(cfg, run, model, data, *rest)
            found.update({f"{name}_{field}": np.array(value) for field, value in score._asdict().items()})
            if name == "ttt":
                found.update({f"weight_{key}": p.detach().numpy().copy() for key, p in model.named_parameters()})
            return score
        return wrapped

    plain, ttt = gpt.diagnose, gpt.evaluate_ttt
    gpt.diagnose, gpt.evaluate_ttt = keep("plain", plain), keep("ttt", ttt)
    try:
        gpt.run_pipeline(cfg, run)
    finally:
        gpt.diagnose, gpt.evaluate_ttt = plain, ttt
    return found


def main(folder: Path) -> None:
    cfg = gpt.Config.from_env(os.environ)
    with gpt.Run.start(cfg) as run:
        np.savez(folder / f"rank{run.rank}.npz", **results(cfg, run))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
