#!/usr/bin/env python3
"""Predict how long the final evaluation takes, from measured chunk steps, and check the prediction.

    python benchmarks/evaluation.py --save TABLE.json       on a GPU: measure every part, predict the record run
    python benchmarks/evaluation.py --plan-only TABLE.json  anywhere: the same prediction from a saved table
    python benchmarks/evaluation.py --validate 500          on a GPU: also score 500 documents and compare
    torchrun --standalone --nproc_per_node=2 benchmarks/evaluation.py --validate 500

Settings are those of train_gpt.py; weights and tokens are random, which costs the same as trained ones.
Documents have the record's lengths (`record_lengths.json`: 1,001 quantiles, the 200 longest exactly). The table
to paste into train_gpt.py (`STEP_MS`) is printed. Predictions are for 8 GPUs, one lane each; what is marked est.
in this file has not been measured.
"""
import argparse
import dataclasses
import gc
import json
import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as gpt  # noqa: E402

BAR_STEPS = ((8, 2560, True), (64, 624, True))       # (rows, window, learn) of which the README gives the time
REPEATS = 10
ALL_REDUCE_MS = 2.0          # est.: sum of all gradients over 8 GPUs joined by NVLink
READ_S = 0.5                 # est.: tokens and bytes of the split from the page cache
TABLE_KEYS = {"device", "learn", "score", "batch", "base_step", "plan", "warm_up_s", "hints_ns_per_target"}
Table = dict[str, Any]       # what `measure` returns, as it is saved


def record_lengths() -> np.ndarray:
    """Tokens of the record's validation documents, ascending."""
    saved = json.loads(Path(__file__).with_name("record_lengths.json").read_text())
    places, count = np.linspace(0, 1, len(saved["quantiles"])), saved["documents"] - len(saved["longest"])
    shorter = np.rint(np.interp(np.linspace(0, 1, count), places, saved["quantiles"]))
    return np.concatenate([shorter, saved["longest"]]).astype(np.int64)


def documents_of(lengths: np.ndarray) -> gpt.Documents:
    """Documents of these lengths, which count the BOS of the next one, in a fixed random order."""
    lengths = np.random.default_rng(0).permutation(lengths)
    return gpt.Documents(np.cumsum(lengths - 1) - (lengths - 1), lengths)


def random_stream(cfg: gpt.Config, docs: gpt.Documents) -> np.ndarray:
    count = int((docs.length - 1).sum()) + 1
    tokens = np.random.default_rng(1).integers(8, cfg.vocab_size, count).astype(np.uint16)
    tokens[docs.start] = tokens[-1] = gpt.BOS
    return tokens


def plan_of(cfg: gpt.Config, docs: gpt.Documents, prefix_docs: int) -> list[gpt.Phase]:
    return gpt.plan_batches(docs, batch_size=cfg.ttt_batch_size, lanes=gpt.LANES, max_tokens=gpt.BATCH_TOKENS,
                            max_chunks=gpt.BATCH_CHUNKS, prefix_docs=prefix_docs, chunk=cfg.ttt_chunk_size,
                            window=cfg.ttt_eval_seq_len)


# --- measuring ----------------------------------------------------------------------------------------------

def milliseconds(run: gpt.Run, work: Any, repeats: int = REPEATS) -> float:
    """Time of one call when they follow each other."""
    work()
    timer = gpt.Timer(run)
    for _ in range(repeats):
        work()
    return 1000 * timer.seconds() / repeats


def measured_keys(cfg: gpt.Config) -> list[tuple[int, int, bool]]:
    """The steps of STEP_MS that a plan can need."""
    sizes = [(rows, window) for rows in gpt.STEP_MS for window in gpt.STEP_WINDOWS
             if rows <= cfg.ttt_batch_size and window <= cfg.ttt_eval_seq_len]
    keys = [(*size, learn) for size in sizes if math.prod(size) <= gpt.BATCH_TOKENS for learn in (True, False)]
    return sorted(keys, key=lambda key: (key[0] * key[1], key), reverse=True)


def measure(cfg: gpt.Config, run: gpt.Run, model: gpt.GPT) -> Table:
    """Every part of the clock on this device; milliseconds unless named otherwise."""
    docs = documents_of(record_lengths())
    start = time.perf_counter()
    phases = plan_of(cfg, docs, cfg.phased_ttt_prefix_docs)
    gpt.certified_order(phases, docs, cfg.ttt_chunk_size)
    plan_ms = 1000 * (time.perf_counter() - start)
    warm_up = gpt.Timer(run)
    scorer, _ = gpt.warm_up_ttt(cfg, run, model, 2 * cfg.ttt_eval_seq_len)
    warm_up_s = warm_up.seconds()
    columns = gpt.ChunkTable(0, cfg.ttt_eval_seq_len, 0, cfg.ttt_chunk_size, 0, 1)
    scorer.table.copy_(torch.tensor(columns, device=run.device)[:, None].expand_as(scorer.table))
    steps: dict[tuple, float] = {}
    for key in measured_keys(cfg):
        steps[key] = milliseconds(run, lambda key=key: scorer.steps(*key))
        if not key[2]:
            learn = (*key[:2], True)
            run.log(f"step rows:{key[0]} window:{key[1]} learn_ms:{steps[learn]:.2f} "
                    f"score_ms:{steps[key]:.2f}")

    for key in BAR_STEPS:                                  # not all of them are steps of a plan
        steps_of_bar = gpt.CapturedSteps(run, scorer.step, [key]) if run.device.type == "cuda" else scorer.step
        run.log(f"bar step rows:{key[0]} window:{key[1]} "
                f"learn_ms:{milliseconds(run, lambda: steps_of_bar(*key)):.2f}")
    busy = busy_share(run, scorer)

    def batch() -> None:
        scorer.bank.start(cfg.ttt_batch_size, gpt.lane_draws(cfg, run, 0))
        scorer.bank.settle(torch.ones(cfg.ttt_batch_size, dtype=torch.int64, device=run.device))
        scorer.table.copy_(gpt.to_device(run, np.zeros(scorer.table.shape, np.int64)))
    batch_ms = milliseconds(run, batch)
    tokens = random_stream(cfg, documents_of(record_lengths()[::50]))
    table = gpt.NgramTable(tokens, len(tokens), cfg.token_order - 1, cfg.token_threshold)
    start = time.perf_counter()
    table.feed(np.arange(len(tokens) - 1), np.zeros(len(tokens) - 1, np.int64))
    hints_ns = 1e9 * (time.perf_counter() - start) / len(tokens)
    return {"device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu",
            "windows": list(gpt.STEP_WINDOWS), "learn": fill(steps, True), "score": fill(steps, False),
            "batch": batch_ms, "base_step": measure_base(cfg, run, model), "plan": plan_ms,
            "warm_up_s": warm_up_s,
            "hints_ns_per_target": hints_ns, "busy_share": busy}


def fill(steps: dict[tuple, float], learn: bool) -> dict[str, list[float]]:
    """The whole table: steps that no plan can need continue the line of the last two windows."""
    table: dict[str, list[float]] = {}
    for rows in gpt.STEP_MS:
        known = [(window, steps[rows, window, learn]) for window in gpt.STEP_WINDOWS
                 if (rows, window, learn) in steps]
        if not known:
            continue
        (x0, y0), (x1, y1) = (known[-2:] if len(known) > 1 else [(0, 0.0), known[0]])
        table[str(rows)] = [round(dict(known).get(window, y1 + (y1 - y0) / (x1 - x0) * (window - x1)), 2)
                            for window in gpt.STEP_WINDOWS]
    return table


def measure_base(cfg: gpt.Config, run: gpt.Run, model: gpt.GPT) -> float:
    """One step of the base adaptation with the share of one of 8 ranks, without the sum over ranks."""
    alone = SimpleNamespace(rank=1, world_size=8, device=run.device, sum=lambda x: x, log=run.log)
    saved = [p.detach().clone() for p in model.parameters()]
    base = gpt.BaseAdaptation(cfg, alone, model)
    lengths = record_lengths()[-cfg.phased_ttt_prefix_docs:]
    tokens = random_stream(cfg, documents_of(lengths)).astype(np.int64)
    row = tokens[:cfg.global_ttt_chunk_tokens // cfg.ttt_eval_seq_len * cfg.ttt_eval_seq_len + 1]
    base.load(row)
    if run.device.type == "cuda":
        base.replay = gpt.CapturedSteps(run, base.gradient, [()])
    ms = milliseconds(run, lambda: base.step(row, 0.0))
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), saved)
    return ms


def busy_share(run: gpt.Run, scorer: gpt.Scorer) -> dict[str, float]:
    """Part of the time in which a kernel runs while steps of one size follow each other; {} without a GPU."""
    shares: dict[str, float] = {}
    for rows, width in ((2, 2560), (8, 2560), (32, 2560), (64, 528), (64, 1248)):
        if (rows, width, True) not in getattr(scorer.steps, "graphs", {}):
            continue
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            timer = gpt.Timer(run)
            for _ in range(REPEATS):
                scorer.steps(rows, width, True)
            wall_us = 1e6 * timer.seconds()
        kernels_us = sum(event.self_device_time_total for event in profile.key_averages())
        shares[f"{rows}x{width}"] = round(kernels_us / wall_us, 3)
    return shares


# --- predicting ---------------------------------------------------------------------------------------------

def lane_seconds(cfg: gpt.Config, table: Table, phase: gpt.Phase) -> list[float]:
    """Seconds of each lane by the measured table; the last step of a batch only scores."""
    buckets = gpt.step_buckets(cfg.ttt_batch_size, cfg.ttt_eval_seq_len, cfg.ttt_chunk_size)
    learn, score = ({int(rows): ms for rows, ms in table[name].items()} for name in ("learn", "score"))
    seconds = []
    for lane in phase:
        total_ms = 0.0
        for batch in lane:
            rows = gpt.pad_to(buckets.rows, batch.steps.rows)
            width = gpt.pad_to(buckets.windows, batch.steps.width)
            total_ms += table["batch"] + gpt.step_cost_us(rows[:-1], width[:-1], learn).sum() / 1000
            total_ms += gpt.step_cost_us(rows[-1:], width[-1:], score).sum() / 1000
        seconds.append(float(total_ms) / 1000)
    return seconds


def predict(cfg: gpt.Config, table: Table, docs: gpt.Documents, prefix_docs: int, world_size: int) -> float:
    """Print all parts of the clock for these documents and return their sum in seconds."""
    phases = plan_of(cfg, docs, prefix_docs)
    scored = gpt.certified_order(phases, docs, cfg.ttt_chunk_size)
    joined = int(docs.length[gpt.select_prefix(scored, docs, cfg.ttt_chunk_size, prefix_docs)].sum())
    sgd_steps = max(0, -(-(joined - 1) // cfg.global_ttt_chunk_tokens) - 1) if len(phases) > 1 else 0
    share = len(docs.start) / 50_000
    parts = {"read_s": READ_S * share, "plan_s": table["plan"] / 1000 * share}
    for number, phase in enumerate(phases):
        lanes = lane_seconds(cfg, table, phase)
        ranks = [sum(lanes[rank::world_size]) for rank in range(world_size)]
        steps = [sum(len(batch.steps.rows) for batch in lane) for lane in phase]
        print(f"plan phase:{number + 1}/{len(phases)} batches:{sum(map(len, phase))} "
              f"carried:{sum(batch.carries for lane in phase for batch in lane)} steps_per_lane:{steps} "
              f"lane_s:{[round(x, 1) for x in lanes]}".replace(", ", ","))
        parts[f"phase{number + 1}_s"] = max(ranks)
        if number == 0 and sgd_steps:
            parts["base_adaptation_s"] = sgd_steps * (table["base_step"] + ALL_REDUCE_MS * (world_size > 1)) / 1000
    total = sum(parts.values())
    made_s = table["hints_ns_per_target"] * int((docs.length - 1).sum()) / 1e9
    print(f"predicted device:\"{table['device']}\" world_size:{world_size} documents:{len(docs.start)} "
          f"targets:{int((docs.length - 1).sum())} sgd_steps:{sgd_steps} "
          + " ".join(f"{name}:{value:.2f}" for name, value in parts.items())
          + f" hints_beside_s:{made_s:.1f} clock_s:{total:.1f} warm_up_s:{table['warm_up_s']:.1f}")
    return total


def validate(cfg: gpt.Config, run: gpt.Run, model: gpt.GPT, table: Table, count: int) -> None:
    """Score `count` documents, whose lengths are evenly spaced quantiles of the record's, and compare."""
    lengths = record_lengths()
    docs = documents_of(lengths[np.linspace(0, len(lengths) - 1, count).astype(int)])
    prefix = max(1, cfg.phased_ttt_prefix_docs * count // len(lengths))
    cfg = dataclasses.replace(cfg, phased_ttt_prefix_docs=prefix)
    tokens = random_stream(cfg, docs)
    data = SimpleNamespace(load_validation=lambda: (tokens, np.ones_like(tokens)), val_tokens=len(tokens))
    gpt.evaluate_ttt(cfg, run, model, data)
    measured = run.clocks["eval"]
    if run.rank == 0:
        predicted = predict(cfg, table, docs, prefix, run.world_size)
        print(f"validated documents:{count} world_size:{run.world_size} predicted_s:{predicted:.1f} "
              f"measured_s:{measured:.1f} ratio:{measured / predicted:.3f}")


def new_file(text: str) -> Path:
    """An option's value: a file that can be written, told before anything is measured."""
    path = Path(text)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: expected a file in a folder that is there and can be written to")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan-only", metavar="TABLE.json", help="predict from a saved table; needs no GPU")
    parser.add_argument("--save", type=new_file, metavar="TABLE.json", help="save the measured table")
    parser.add_argument("--validate", type=int, metavar="DOCUMENTS", help="score that many documents and compare")
    options = parser.parse_args()
    try:
        cfg = gpt.Config.from_env(os.environ)
    except gpt.ConfigError as error:
        parser.error(str(error))
    if options.plan_only:
        try:
            table = json.loads(Path(options.plan_only).read_text())
            missing = sorted(TABLE_KEYS - table.keys())
        except (OSError, ValueError, AttributeError) as error:
            parser.error(f"{options.plan_only}: expected a table that --save has written, found: {error}")
        if missing:
            parser.error(f"{options.plan_only}: expected a table that --save has written, found none of {missing}")
        predict(cfg, table, documents_of(record_lengths()), cfg.phased_ttt_prefix_docs, gpt.LANES)
        return
    with gpt.Run.start(dataclasses.replace(cfg, run_id=cfg.run_id or "evaluation_benchmark")) as run:
        model = gpt.build_model(cfg, run)
        table = measure(cfg, run, model)
        if run.rank == 0:
            print("STEP_MS = {")
            for rows, ms in table["learn"].items():
                print(f"    {rows}: ({', '.join(map(str, ms))}),")
            print(f"}}\nbatch_ms:{table['batch']:.2f} base_step_ms:{table['base_step']:.2f} plan_ms:{table['plan']:.0f} "
                  f"hints_ns_per_target:{table['hints_ns_per_target']:.0f} gpu_busy_share:{table['busy_share']}")
            if options.save:
                options.save.write_text(json.dumps(table, indent=1) + "\n")
            predict(cfg, table, documents_of(record_lengths()), cfg.phased_ttt_prefix_docs, gpt.LANES)
        gc.collect()                          # graphs and the buffers they read hold each other
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        if options.validate:
            validate(cfg, run, model, table, options.validate)


if __name__ == "__main__":
    main()
