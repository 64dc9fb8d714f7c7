"""What two gloo processes and one process must compute alike; run by launch.py and imported by test_training.py."""
import os
import sys
from pathlib import Path

import numpy as np
import torch

import train_gpt as gpt
import twins
from helpers import random_model, tiny_config

STEPS = 4


def config(folder: Path) -> gpt.Config:
    # One step each of quarter rows, half rows, half rows that loop, and whole rows that loop.
    return tiny_config(data_path=str(folder), iterations=STEPS, quarter_rows_until=0.25, half_rows_until=0.75,
                       enable_looping_at=0.5, run_id="two_process", gptq_calibration_batches=5, rdo_lambda=1.0)


def results(cfg: gpt.Config, run: gpt.Run) -> dict[str, np.ndarray]:
    """Weights after training, evaluation totals, calibration statistics, and what the collectives return."""
    torch.set_num_threads(1)
    data = gpt.Dataset.open(cfg)
    model = random_model(cfg)
    found = {}
    score = gpt.evaluate_plain(cfg, run, model, *data.load_validation())
    found.update({f"score_{name}": np.array(value) for name, value in score._asdict().items()})
    stats = gpt.collect_hessians(cfg, run, model, data.train, cfg.gptq_calibration_batches)
    for key, total in stats[0].items():
        found[f"hessian_{key}"], found[f"count_{key}"] = total.numpy(), np.array(stats[1][key])
    single = gpt.collect_hessians(cfg, run, model, data.train, 1)          # fewer batches than ranks
    found.update({f"hessian_single_{key}": total.numpy() for key, total in single.sums.items()})
    with twins.fast_trellis:
        quantized, _ = gpt.quantize(cfg, run, model, stats)                # each rank rounds its share
    found.update({f"codes_{name}": q.codes.numpy() for name, q in quantized.items()})
    gpt.train(cfg, run, data, model)
    found.update({f"weight_{name}": p.detach().numpy() for name, p in model.named_parameters()})
    rank = torch.tensor([float(run.rank)])
    found.update(world_size=np.array(run.world_size), sum=run.sum(rank + 1).numpy(),
                 broadcast=run.broadcast(rank + 5).numpy(), agree=np.array(run.agree([run.rank + 0.1, 1e300])))
    run.barrier("the end")
    return found


def main(folder: Path) -> None:
    cfg = config(folder)
    with gpt.Run.start(cfg, os.environ) as run:
        np.savez(folder / f"rank{run.rank}.npz", **results(cfg, run))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
