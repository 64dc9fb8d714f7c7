#!/usr/bin/env python3
"""Measure the training step of the record run: its speed, where its time goes, its memory, and its start.

    python benchmarks/training.py --out table.txt               hand-written kernels and compiled blocks, one GPU
    python benchmarks/training.py --paths kernels --startup     one path; start once more with everything compiled
    python benchmarks/training.py --tiny --paths compiled       seconds on any machine, to try the command itself

Each path runs in a process of its own, on shards made here: random tokens with the frequencies of Zipf's law, in
documents as long as the record's validation documents. It does what train() does: warm_up, then steps of train_rows,
Optimizer and WeightAverage, at record settings unless the environment names others, and times STEPS of every kind
that training would come to: with and without loops, of whole rows and of parts. Then a profile of two steps adds up
the GPU's kernels by name.

Columns: ms is milliseconds of one step of 8 rows; share is the part's floor over its time. Floors:
  products     their arithmetic at the speed of one large product measured on the same GPU
  attention    its arithmetic (backward counted as 2.5 times forward) at that same speed
  blocks       the bytes that must move (see stream_passes) at the speed of a large copy measured on the same GPU
  loss         logits read and their gradient written once, at that speed
Start is the time from the start of the process to its first timed step: cold with empty folders of compiled code, warm
with the folders that the first start has filled (--startup). FlashAttention-4 keeps compiled code only where
FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 is set.
"""
from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

# Middles of 200 equally large groups of the record's validation documents, tokens each.
DOC_LENGTHS = (
    89, 101, 109, 115, 120, 125, 129, 133, 137, 141, 145, 149, 153, 157, 161, 165, 168, 171, 174, 178, 182,
    185, 190, 192, 196, 200, 203, 206, 210, 213, 217, 220, 224, 228, 232, 235, 239, 242, 246, 250, 254, 257,
    263, 266, 269, 273, 276, 281, 284, 289, 294, 298, 302, 306, 310, 315, 319, 324, 329, 332, 337, 342, 347,
    352, 357, 362, 367, 372, 377, 382, 388, 393, 398, 402, 409, 415, 421, 427, 431, 439, 444, 451, 457, 462,
    467, 474, 479, 486, 491, 498, 503, 511, 517, 524, 530, 537, 544, 550, 557, 564, 571, 578, 585, 592, 599,
    607, 615, 621, 630, 637, 644, 652, 660, 669, 677, 685, 693, 701, 710, 719, 727, 736, 744, 755, 765, 774,
    783, 794, 804, 814, 825, 837, 848, 859, 870, 883, 894, 905, 918, 930, 942, 954, 967, 981, 995, 1008, 1022,
    1038, 1052, 1072, 1085, 1102, 1118, 1135, 1152, 1170, 1187, 1206, 1227, 1249, 1271, 1289, 1313, 1335,
    1359, 1384, 1408, 1434, 1460, 1487, 1514, 1543, 1577, 1608, 1643, 1680, 1719, 1762, 1806, 1849, 1899,
    1952, 2015, 2084, 2157, 2245, 2339, 2452, 2560, 2696, 2847, 3041, 3279, 3537, 3892, 4356, 4987, 5921,
    7881, 14278)
PATHS = {"kernels": {}, "compiled": {"BLOCK_KERNELS": "0", "ALLOW_SLOW": "1"}}
TINY = {"VOCAB_SIZE": "64", "NUM_LAYERS": "3", "MODEL_DIM": "32", "NUM_HEADS": "2", "NUM_KV_HEADS": "1",
        "MLP_MULT": "2", "LOOP_START": "1", "LOOP_END": "1", "PARALLEL_START_LAYER": "2", "ROPE_DIMS": "4",
        "TRAIN_BATCH_TOKENS": "512", "TRAIN_SEQ_LEN": "32", "VAL_BATCH_TOKENS": "512", "EVAL_SEQ_LEN": "32",
        "TTT_EVAL_SEQ_LEN": "64", "GLOBAL_TTT_CHUNK_TOKENS": "64", "WARMUP_STEPS": "1",
        "GPTQ_CALIBRATION_BATCHES": "1", "HALF_ROWS_UNTIL": "0.35", "COMPILE": "0"}
CACHE_FOLDERS = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "QUACK_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR",
                 "CUTE_DSL_CACHE_DIR", "CUDA_CACHE_PATH", "XDG_CACHE_HOME", "TMPDIR")
PARTS = ("products", "attention", "blocks", "loss", "other kernels", "optimizer", "no kernel")
PROFILED_STEPS = 2
SKIPPED_STEPS = 3            # after a change of the loops, before the first that counts
PACKAGES = ("torch", "triton", "flash-attn-4", "flash-attn-3", "quack-kernels", "nvidia-cutlass-dsl", "numpy")


# --- data ---------------------------------------------------------------------------------------------------

def write_shards(folder: Path, num_tokens: int, vocab_size: int) -> None:
    """One training shard, and a validation shard with byte counts, because a data folder must have them."""
    rng = np.random.default_rng(0)
    rank = np.arange(vocab_size - 8)
    weight = np.cumsum(1 / (rank + 2.7))
    tokens = 8 + np.searchsorted(weight / weight[-1], rng.random(num_tokens)).clip(max=vocab_size - 9)
    ends = np.cumsum(rng.choice(DOC_LENGTHS, num_tokens // min(DOC_LENGTHS)))
    tokens[0] = tokens[ends[ends < num_tokens]] = 1        # BOS
    few = tokens[:4096]
    for name, values in (("train", tokens), ("val", few), ("val_bytes", np.where(few == 1, 0, 4))):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(values)
        (folder / f"fineweb_{name}_000000.bin").write_bytes(header.tobytes() + values.astype("<u2").tobytes())


# --- floors -------------------------------------------------------------------------------------------------

def product_flops(cfg: Any, tokens: int, executions: int) -> float:
    """Multiplications and additions of all products of a step: forward, and twice that backward."""
    D, F = cfg.model_dim, cfg.mlp_dim
    layer = D * (D + 2 * cfg.kv_dim) + D * D + 2 * D * F
    return 6.0 * tokens * (executions * layer + D * cfg.vocab_size)


def attention_flops(cfg: Any, lengths: np.ndarray, executions: int) -> float:
    """Those of causal attention over segments: two products over half of each square, 3.5 times with the backward."""
    pairs = (lengths.astype(np.float64) * (lengths + 1) / 2).sum()
    return 3.5 * executions * 4 * cfg.num_heads * cfg.head_dim * pairs


def stream_passes(plan: Iterable[Any], kv: float) -> float:
    """How often a tensor of (tokens, D) must be read or written around the products and attention of one step, when
    every kernel reads what it needs once, writes what others need once, and the activation is computed in the
    products. kv is the width of all key heads over D.

                          forward                                      backward
    mix_and_norm          x, x0 -> z, n                                dn, n, dz, x, x0, dx0 -> dx, dx0
      with skip           + skip                                       + skip -> dskip; + dskip where it is added
      on a lane           without z, unless there is a skip
    prepare_qk            q, k -> q, k                                 q, k, dq, dk, dv, own dv -> dq, dk, dv
    remove_own_value      y, v -> y                                    dy, y, v -> dy, own dv
    norm before the MLP   z -> n                                       dn, n, dz -> dz
    lanes                 lane 0, 1, attention, MLP -> lane 0, 1       both d, those four -> dattention, dMLP
    where lanes part                                                   + d lane 1
    once: embed           e -> x0                                      x0, dx0, dx, e
    once: finish          lane 0, 1 -> hidden                          dhidden, hidden -> d
    """
    passes, has_lanes = 2 + 4 + 3 + 3, False
    for execution in plan:
        has_skip = execution.skip_from is not None
        passes += 4 + 8 + (4 if has_skip else 0)
        passes += 2 * (1 + kv) + (2 + 5 * kv) + (1 + 2 * kv)
        passes += (2 + kv) + (3 + 2 * kv)
        passes += 2 + 4
        if execution.is_parallel:
            passes += 6 + 8 - (0 if has_skip else 1) + (0 if has_lanes else 1)
            has_lanes = True
    return passes


def measured_peaks(device: Any) -> dict[str, float]:
    """FLOP/s of a large bf16 product and bytes/s of a large copy, medians."""
    import torch

    def seconds(work: Callable[[], Any], repeats: int) -> float:
        times = []
        for _ in range(repeats + 3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        return statistics.median(times[3:])

    n, count = 8192, 2 ** 29
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    flops = 2 * n ** 3 / seconds(lambda: torch.mm(a, b, out=out), 60)
    source, target = (torch.ones(count, device=device, dtype=torch.bfloat16) for _ in range(2))
    copied = 2 * 2 * count / seconds(lambda: target.copy_(source), 20)
    return {"flops_per_s": flops, "copy_bytes_per_s": copied}


# --- profile ------------------------------------------------------------------------------------------------

def part_of(kernel: str) -> str:
    """The part of a step to which a GPU kernel of this name belongs, outside the optimizer."""
    name = kernel.lower()
    if "flash" in name or "fmha" in name:
        return "attention"
    if "softcap_ce" in name:
        return "loss"
    if re.search("gemm|nvjet|cutlass|quack|cublas|xmma|splitk", name):
        return "products"
    if re.match("triton_|_(mix_norm|prepare_qk|own_value|leaky_square|lanes|finish|embed)_", name):
        return "blocks"                                    # the compiler's kernels, and those of train_gpt.py
    return "other kernels"


def profile(work: Callable[[], None], sync: Callable[[], None]) -> dict[str, list[float]]:
    """{kernel name: [milliseconds, launches]} of everything that `work` runs on the GPU."""
    import torch
    sync()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        work()
        sync()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            entry = total[event["name"]]
            entry[0] += event["dur"] / 1000
            entry[1] += 1
    if not total:
        raise RuntimeError("the profiler recorded no kernels")
    return dict(total)


# --- one path, in a process of its own ----------------------------------------------------------------------

class Report:
    """What one process has found out, rewritten after every piece: a crash later on loses nothing."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, {"errors": {}}

    def add(self, **facts: Any) -> None:
        self.found.update(facts)
        self.path.write_text(json.dumps(self.found))

    def attempt(self, name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """work(*arguments), or None and a note of what went wrong."""
        try:
            return work(*arguments)
        except Exception as error:                         # whatever it is, the other pieces still count
            traceback.print_exc()
            self.found["errors"][name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            self.add()
            return None


def measure(options: argparse.Namespace, report: Report) -> None:
    """Start as a run does, and unless only the start is wanted, time and profile its steps."""
    import torch

    import train_gpt as gpt
    cfg = gpt.Config.from_env(os.environ)
    with gpt.Run.start(cfg) as run:
        lines: list[str] = []
        plain_log = run.log
        run.log = lambda line, **where: (lines.append(line), plain_log(line, **where))
        data = gpt.Dataset.open(cfg)
        torch.manual_seed(cfg.seed)
        model = gpt.build_model(cfg, run)
        report.add(backends=[line for line in lines if " backend:" in line])
        optimizer = gpt.Optimizer(cfg, run, model)
        if is_gpu := run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(run.device)
        work = gpt.RowGradients(cfg, run, model, optimizer)
        report.attempt("warm-up", gpt.warm_up, cfg, run, data, work)
        average = gpt.WeightAverage(model, cfg.ema_decay)
        loader = gpt.make_loader(cfg, run, data)
        run.sync()
        report.add(start_s=time.time() - options.started,
                   warm_up_s=[line for line in lines if line.startswith("warmup elapsed_s")])
        if is_gpu:
            report.add(device=torch.cuda.get_device_name(run.device), cuda=torch.version.cuda)
        if not options.only_start:
            peaks = report.attempt("peaks", measured_peaks, run.device) if is_gpu else None
            torch.cuda.empty_cache()
            report.add(peaks=peaks)
            for parts, looping in gpt.row_states(cfg):
                name = state_name(parts, looping)
                rows = gpt.split_rows(loader, gpt.ROWS_PER_STEP, parts)
                found = report.attempt(name, measure_steps, work, average, rows, looping, options.steps)
                if found is None:
                    continue
                found["tokens"] = cfg.train_batch_tokens // parts
                report.add(**{name: found})
                if is_gpu:
                    profiled = report.attempt(f"profile of {name}", measure_parts, work, average, rows, looping)
                    report.add(**{name: {**found, **(profiled or {})}})
            if work.replay:
                report.add(graphs=work.replay.captures, rows_without_graph=work.replay.missed)
            if is_gpu:
                report.add(peak_allocated_mib=torch.cuda.max_memory_allocated(run.device) >> 20,
                           peak_reserved_mib=torch.cuda.max_memory_reserved(run.device) >> 20)
        loader.close()


def state_name(parts: int, looping: bool) -> str:
    """What the table calls steps of rows in that many parts: loops_off, half_loops_on and so on."""
    import train_gpt as gpt
    prefix = f"{gpt.ROW_PARTS[parts]}_" if parts > 1 else ""
    return f"{prefix}loops_{'on' if looping else 'off'}"


def measure_steps(work: Any, average: Any, rows: Any, looping: bool, steps: int) -> dict[str, Any]:
    """Milliseconds of every step that counts, and the last loss."""
    import train_gpt as gpt
    clock = gpt.StepClock(work.run)
    for step in range(steps + SKIPPED_STEPS + 1):          # the clock knows of a step's end one step later
        loss = gpt.train_rows(work, rows, gpt.ROWS_PER_STEP, looping)
        work.optimizer.step(step, 1.0)
        average.update()
        clock.step_done()
    work.run.sync()
    times = [1000 * (b - a) for a, b in zip(clock.ends, clock.ends[1:])]
    return {"step_ms": times[-steps:], "loss": loss.item() / gpt.ROWS_PER_STEP}


def measure_parts(work: Any, average: Any, loader: Any, looping: bool) -> dict[str, Any]:
    """The kernels of the gradients' and the optimizer's half of a step, and what the floors are computed from."""
    import train_gpt as gpt
    cfg, run, optimizer = work.cfg, work.run, work.optimizer
    rows = []

    class Recorded:
        """The loader, noting the segments of every row."""
        def __next__(self) -> Any:
            rows.append(next(loader))
            return rows[-1]

    def gradients() -> None:
        gpt.train_rows(work, Recorded(), gpt.ROWS_PER_STEP, looping)

    def update() -> None:
        optimizer.step(0, 1.0)
        average.update()

    profile(gradients, run.sync)                           # the first profile pays for starting the profiler
    profile(update, run.sync)
    rows.clear()
    kernels: dict[str, dict[str, list[float]]] = {"gradients": {}, "update": {}}
    for _ in range(PROFILED_STEPS):
        for half, queue in (("gradients", gradients), ("update", update)):
            for name, (ms, launches) in profile(queue, run.sync).items():
                before = kernels[half].get(name, (0.0, 0))
                kernels[half][name] = [before[0] + ms / PROFILED_STEPS, before[1] + launches / PROFILED_STEPS]
    lengths = np.concatenate([row.cu_seqlens.diff().cpu().numpy() for row in rows])
    plan = gpt.execution_plan(cfg, looping)
    tokens = gpt.ROWS_PER_STEP * len(rows[0].inputs)
    return {"kernels": kernels, "flops": product_flops(cfg, tokens, len(plan)),
            "attention_flops": attention_flops(cfg, lengths, len(plan)) / PROFILED_STEPS,
            "block_bytes": 2.0 * tokens * cfg.model_dim * stream_passes(plan, cfg.kv_dim / cfg.model_dim),
            "loss_bytes": 2 * 2.0 * tokens * cfg.vocab_size}


# --- the table ----------------------------------------------------------------------------------------------

def step_parts(state: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """{part: (milliseconds, launches)} of one step; "no kernel" is what the median step lasts beyond its kernels."""
    parts = {part: (0.0, 0.0) for part in PARTS}
    for half, kernels in state["kernels"].items():
        for name, (ms, launches) in kernels.items():
            part = "optimizer" if half == "update" else part_of(name)
            parts[part] = parts[part][0] + ms, parts[part][1] + launches
    on_gpu = sum(ms for ms, _ in parts.values())
    parts["no kernel"] = statistics.median(state["step_ms"]) - on_gpu, 0.0
    return parts


def part_floors(state: dict[str, Any], peaks: dict[str, float]) -> dict[str, float]:
    """Milliseconds below which a part cannot come."""
    return {"products": 1000 * state["flops"] / peaks["flops_per_s"],
            "attention": 1000 * state["attention_flops"] / peaks["flops_per_s"],
            "blocks": 1000 * state["block_bytes"] / peaks["copy_bytes_per_s"],
            "loss": 1000 * state["loss_bytes"] / peaks["copy_bytes_per_s"]}


def describe_path(path: str, found: dict[str, Any], warm: dict[str, Any] | None) -> list[str]:
    lines = [f"== {path} =="]
    lines += [f"  {line}" for line in found.get("backends", [])]
    if peaks := found.get("peaks"):
        lines.append(f"  measured: large product {peaks['flops_per_s'] / 1e12:.0f} TFLOP/s, large copy "
                     f"{peaks['copy_bytes_per_s'] / 1e12:.2f} TB/s")
    for label, start in (("cold", found), ("warm", warm)):
        if start and "start_s" in start:
            lines.append(f"  start to first timed step, {label}: {start['start_s']:.1f} s  "
                         f"{'; '.join(start['warm_up_s'])}")
    if "peak_allocated_mib" in found:
        lines.append(f"  peak memory: {found['peak_allocated_mib']:,} MiB allocated, "
                     f"{found['peak_reserved_mib']:,} MiB reserved")
    if "graphs" in found:
        lines.append(f"  CUDA graphs: {found['graphs']}; rows that found none: {found['rows_without_graph']}")
    for name in found:
        if name.endswith(("loops_off", "loops_on")):
            lines += ["", *describe_state(name, found[name], found.get("peaks"))]
    for label, errors in (("", found.get("errors", {})), ("warm start: ", (warm or {}).get("errors", {}))):
        lines += [f"  FAILED {label}{piece}: {error}" for piece, error in errors.items()]
    return lines


def describe_state(name: str, state: dict[str, Any], peaks: dict[str, float] | None) -> list[str]:
    times = state["step_ms"]
    median = statistics.median(times)
    lines = [f"  {name}: {1000 * state['tokens'] / median:,.0f} tokens/s, {median:.2f} ms per step (median of "
             f"{len(times)}; {min(times):.2f} to {max(times):.2f}), loss {state['loss']:.4f}"]
    if "kernels" not in state:
        return lines
    floors = part_floors(state, peaks) if peaks else {}
    lines.append(f"    {'part':<14}{'ms':>9}{'of step':>9}{'launches':>10}{'floor ms':>10}{'share':>8}")
    for part, (ms, launches) in step_parts(state).items():
        row = f"    {part:<14}{ms:>9.2f}{ms / median:>9.1%}{launches:>10,.0f}"
        if part in floors and ms:
            row += f"{floors[part]:>10.2f}{floors[part] / ms:>8.0%}"
        lines.append(row)
    lines.append(f"    {'step':<14}{median:>9.2f}")
    lines.append("    largest kernels (ms, launches):")
    for half, kernels in state["kernels"].items():
        largest = sorted(kernels.items(), key=lambda item: -item[1][0])[:24 if half == "gradients" else 6]
        for kernel, (ms, launches) in largest:
            part = "optimizer" if half == "update" else part_of(kernel)
            lines.append(f"    {ms:>9.2f}{launches:>8,.0f}  {part:<14}{re.sub(r'[^ -~]', '?', kernel)[:90]}")
    return lines


def describe_machine(found: Iterable[dict[str, Any]], settings: dict[str, str], steps: int) -> list[str]:
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    device = next((f"{facts['device']}, CUDA {facts['cuda']}" for facts in found if "device" in facts),
                  platform.machine())
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=REPO, capture_output=True, text=True,
                                check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    shown = " ".join(f"{name}={value}" for name, value in sorted(settings.items())) or "those of the record run"
    return [f"training benchmark {datetime.date.today()} commit {commit}", f"device: {device}",
            f"versions: python {platform.python_version()}, {', '.join(versions)}",
            f"settings: {shown}; {steps} steps per state; random text with the record's document lengths"]


# --- main ---------------------------------------------------------------------------------------------------

def start_path(path: str, settings: dict[str, str], work: Path, options: argparse.Namespace,
               only_start: bool) -> dict[str, Any]:
    """Run one path in a process of its own and return what it found, as far as it came."""
    caches = work / f"compiled_{path}"
    env = {**os.environ, **settings, **PATHS[path]}
    for name in CACHE_FOLDERS:
        folder = caches / name.lower()
        folder.mkdir(parents=True, exist_ok=True)
        env[name] = str(folder)
    report = work / f"{path}{'_start' if only_start else ''}.json"
    command = [sys.executable, str(Path(__file__).resolve()), "--report", str(report), "--steps", str(options.steps)]
    command += ["--only-start"] if only_start else []
    print(f"... {path}{', warm start' if only_start else ''}", file=sys.stderr, flush=True)
    try:
        done = subprocess.run([*command, "--started", repr(time.time())], cwd=work, env=env, stdout=sys.stderr,
                              timeout=options.timeout)
        failed = f"exit status {done.returncode}, see stderr" if done.returncode else ""
    except subprocess.TimeoutExpired:
        failed = f"not done after {options.timeout:g} s"
    found = json.loads(report.read_text()) if report.exists() else {"errors": {}}
    if failed:
        found["errors"]["process"] = failed
    return found


def new_file(text: str) -> Path:
    """An option's value: a file that can be written, told before anything is measured."""
    path = Path(text)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: expected a file in a folder that is there and can be written to")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", default=",".join(PATHS), help="comma-separated: kernels, compiled")
    parser.add_argument("--steps", type=int, default=30, help="timed steps per state")
    parser.add_argument("--startup", action="store_true", help="start each path again, with its compiled code kept")
    parser.add_argument("--tiny", action="store_true", help="a tiny model without compilation, for any machine")
    parser.add_argument("--out", type=new_file, help="also write the table to this file")
    parser.add_argument("--timeout", type=float, default=540.0, help="seconds that one path may take")
    for name, kind in (("--report", Path), ("--started", float)):      # what the processes started here are called with
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--only-start", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report:
        report = Report(options.report)
        report.attempt("run", measure, options, report)
        return 0
    paths = options.paths.split(",")
    if unknown := sorted(set(paths) - PATHS.keys()):
        parser.error(f"--paths {options.paths}: expected some of {','.join(PATHS)}, found {unknown}")

    import train_gpt as gpt
    settings = dict(TINY) if options.tiny else {}
    for name in gpt.Config.__dataclass_fields__:
        if name.upper() in os.environ and name != "data_path":         # it makes its own
            settings[name.upper()] = os.environ[name.upper()]
    try:
        cfg = gpt.Config.from_env({**os.environ, **settings})
    except gpt.ConfigError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_shards(work, 16 * cfg.train_batch_tokens + 65536, cfg.vocab_size)
        extra = {"DATA_PATH": str(work), "ALLOW_UNVERIFIED": "1"}
        found, warm = {}, {}
        for path in paths:
            named = {**settings, **extra, "RUN_ID": path}
            found[path] = start_path(path, named, work, options, only_start=False)
            if options.startup:
                warm[path] = start_path(path, named | {"RUN_ID": f"{path}_warm"}, work, options, only_start=True)
            lines = describe_machine(found.values(), settings, options.steps)
            for name, facts in found.items():
                lines += ["", *describe_path(name, facts, warm.get(name))]
            if options.out:                                # after every path, so that nothing is lost
                options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 1 if any(facts["errors"] for facts in (*found.values(), *warm.values())) else 0


if __name__ == "__main__":
    sys.exit(main())
