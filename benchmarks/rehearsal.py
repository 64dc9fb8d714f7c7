#!/usr/bin/env python3
"""Rehearse the record run on the GPUs of one host: each measurement that a rehearsal owes is one command.

    python benchmarks/rehearsal.py validation DIR --source SHARDS
        shards whose validation documents are as long as the record's, a stratified eighth of them
    python benchmarks/rehearsal.py run --data DIR [--against LOG]
        the record run on all GPUs, then its table
    python benchmarks/rehearsal.py table LOG [--data DIR] [--against LOG]
        the table of a log
    python benchmarks/rehearsal.py faults [--together]
        a rank killed or stopped in three stages
    python benchmarks/rehearsal.py nodes
        two rendezvous members against one launch

Each takes --processes (1, 2, 4 or 8; default: the GPUs; without one, a run is one process on the CPU, `faults`
and `nodes` are two) and --set NAME=VALUE. `faults` and `nodes` run a small model, on a CPU too; their data are
made unless --data names shards. Linux only: ranks are found in /proc. Exit codes: 0 done, 1 something did not hold, 2 bad usage.
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "benchmarks")]
import demo  # noqa: E402
import evaluation  # noqa: E402
import runlog  # noqa: E402
import train_gpt as gpt  # noqa: E402
from launch import free_port  # noqa: E402

TOY_VOCAB = 512
STEP_TABLES = {gpu: REPO / "benchmarks" / f"evaluation_{gpu.lower()}.json" for gpu in ("H200", "H100")}
POLL_S = 0.02
START_LIMIT_S = 900.0                    # for a stage to be reached; a first start compiles
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# A line of the log that says that a stage has begun: by it faults are timed and GPU samples counted.
BEGINS = {
    "compilation": r"gptq:reserving |warmup_step: ",
    "training": r"1/\d+ train_loss: ",
    "calibration": r"Serialized model: ",
    "diagnostic before": r"GPTQ:collected ",
    "quantization": r"diagnostic pre-quantization ",
    "diagnostic after": r"artifact load_s:",
    "compilation of scoring": r"diagnostic quantized ",
    "scoring": r"ttt plan ",
    "end": r"quantized_ttt_phased ",
}


class RehearsalError(Exception):
    """A request that cannot be fulfilled, in one sentence."""
    exit_code = 2


class RunFailed(RehearsalError):
    """A run that all others need went wrong."""
    exit_code = 1


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RehearsalError(f"{path}: expected a name for a folder, found: {error.strerror}; name another") from None


# --- shards -------------------------------------------------------------------------------------------------

def write_shard(path: Path, values: np.ndarray) -> Path:
    header = np.zeros(gpt.SHARD_HEADER_BYTES // 4, "<i4")
    header[:3] = gpt.SHARD_MAGIC, gpt.SHARD_VERSION, len(values)
    path.write_bytes(header.tobytes() + values.astype("<u2").tobytes())
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_validation(folder: Path, tokens: np.ndarray, num_bytes: np.ndarray, tokenizer: Mapping[str, object],
                     **notes: object) -> None:
    """Validation shard, byte sidecar and manifest of a folder that holds its training shards already."""
    write_shard(folder / "fineweb_val_000000.bin", tokens)
    write_shard(folder / "fineweb_val_bytes_000000.bin", num_bytes)
    hashes: dict[Path, str] = {}                          # a training shard may stand there under many names
    files = {}
    for path in sorted(folder.glob("fineweb_*.bin")):
        target = path.resolve()
        hashes[target] = hashes.get(target) or sha256(target)
        files[path.name] = {"values": gpt.read_shard_header(path), "sha256": hashes[target]}
    totals = {"tokens": len(tokens), "sidecar_bytes": int(num_bytes.sum(dtype=np.int64))}
    manifest = {"files": files, "val": totals, "tokenizer": dict(tokenizer), **notes}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def describe_tokenizer(path: Path, vocab_size: int) -> dict[str, object]:
    return {"file": path.name, "sha256": sha256(path), "vocab_size": vocab_size, "bos_id": gpt.BOS,
            "operator_ids": list(gpt.OPERATOR_IDS)}


def write_toy(folder: Path, documents: int, longest: int) -> Path:
    """Shards that a small model can learn from, and their tokenizer: documents repeat a few phrases."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    tokenizer = io.BytesIO()
    words = ("".join(rng.choice(list("abcdefghijklmnop"), 5)) for _ in range(2000))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words, model_writer=tokenizer, model_type="bpe", vocab_size=TOY_VOCAB, pad_id=0,
        bos_id=gpt.BOS, eos_id=2, unk_id=3, user_defined_symbols=[chr(0xE001 + k) for k in range(4)],
        minloglevel=2)
    (folder / "toy.model").write_bytes(tokenizer.getvalue())
    phrases = rng.integers(8, TOY_VOCAB, (4, 50))

    def stream(count: int) -> np.ndarray:
        lengths = rng.integers(40, longest, count)
        return np.concatenate([np.append(gpt.BOS, np.resize(phrases[rng.integers(4)], n)) for n in lengths])

    write_shard(folder / "fineweb_train_000000.bin", stream(400))
    tokens = stream(documents)
    described = describe_tokenizer(folder / "toy.model", TOY_VOCAB)
    write_validation(folder, tokens, np.where(tokens == gpt.BOS, 0, 3), described)
    return folder


def stratified_lengths(share: int) -> np.ndarray:
    """Lengths of every `share`-th of the record's documents in the order of length, from the middle."""
    return evaluation.record_lengths()[share // 2::share]


def record_targets(lengths: np.ndarray) -> int:
    return int((lengths - 1).sum())


def make_validation(folder: Path, source: Path, share: int, train_shards: int) -> dict[str, int]:
    """Write a data folder: the record's document lengths, filled with the text of the source's validation
    split over and over, and the source's training shards, repeated, as links. Returns the manifest's notes.
    """
    data = gpt.Dataset.open(gpt.Config(data_path=str(source), allow_unverified=True))
    manifest = data.manifest or {}
    vocab_size = manifest.get("tokenizer", {}).get("vocab_size", gpt.Config().vocab_size)
    cfg = gpt.Config(data_path=str(source), allow_unverified=True, vocab_size=vocab_size)
    tokenizer, merges = gpt.check_tokenizer(cfg, data), manifest.get("merges")
    text, text_bytes = data.load_validation()
    text, text_bytes = text[text != gpt.BOS], text_bytes[text != gpt.BOS]
    docs = evaluation.documents_of(stratified_lengths(share))
    count = record_targets(docs.length) + 1
    tokens, num_bytes = np.resize(text, count), np.resize(text_bytes, count)
    borders = np.append(docs.start, count - 1)
    tokens[borders], num_bytes[borders] = gpt.BOS, 0
    prefix_docs = gpt.Config().phased_ttt_prefix_docs // share
    notes = {"share": share, "documents": len(docs.start), "prefix_docs": prefix_docs}

    make_folder(folder)
    for number in range(train_shards):
        shard = data.train[number % len(data.train)].resolve()
        (folder / f"fineweb_train_{number:06d}.bin").symlink_to(shard)
    shutil.copy(tokenizer, folder)
    if merges:
        shutil.copy(source / Path(merges["file"]).name, folder)
    write_validation(folder, tokens, num_bytes, describe_tokenizer(tokenizer, vocab_size), rehearsal=notes,
                     **({"merges": merges} if merges else {}))
    return notes


def notes_of(folder: Path | None) -> dict[str, int]:
    """What make_validation noted in a folder; empty for any other."""
    try:
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["rehearsal"]
    except (TypeError, OSError, ValueError, KeyError):
        return {}


# --- processes ----------------------------------------------------------------------------------------------

def environment(settings: Mapping[str, object]) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    env |= {"OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", "1")}
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        env.setdefault(name, "lo")                        # the host's name may lead nowhere
    return env | {name: str(value) for name, value in settings.items()}


def end_group(process: subprocess.Popen) -> None:
    """End a launcher that leads a process group. It is asked first: torchrun's workers are outside."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)


def children(parent: int) -> Iterator[int]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):               # a process may end while it is looked at
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                yield int(stat.parent.name)


class Launch:
    """A run in a folder of its own, its output in files there; as a context manager nothing outlives it."""

    def __init__(self, folder: Path, command: Sequence[str], settings: Mapping[str, object],
                 name: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.out, self.err = folder / f"stdout{name}.txt", folder / f"stderr{name}.txt"
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.process = subprocess.Popen(command, cwd=folder, env=environment(settings), stdout=out,
                                            stderr=err, start_new_session=True)

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *error: object) -> None:
        end_group(self.process)

    def texts(self) -> tuple[str, str]:
        return self.out.read_text(errors="replace"), self.err.read_text(errors="replace")

    def wait_for(self, pattern: str) -> bool:
        """Whether a line that begins so was written before the run ended or START_LIMIT_S were over."""
        end = time.monotonic() + START_LIMIT_S
        while time.monotonic() < end:
            is_over = self.process.poll() is not None
            if re.search(f"^(?:{pattern})", self.texts()[0], re.M):
                return True
            if is_over:
                return False
            time.sleep(POLL_S)
        return False

    def ranks(self) -> dict[int, int]:
        """{rank: process id} of the launcher's children."""
        found = {}
        for pid in children(self.process.pid):
            with contextlib.suppress(OSError):
                env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                rank = next(entry for entry in env if entry.startswith(b"RANK="))
                found[int(rank[5:])] = pid
        return found


def launch_command(processes: int, script: Path) -> list[str]:
    if processes == 1:
        return [sys.executable, str(script)]
    return [sys.executable, str(REPO / "launch.py"), str(processes), str(script)]


# For a CPU: every part of the model, as few layers as that takes.
CPU_MODEL = dict(NUM_LAYERS=4, LOOP_START=1, LOOP_END=1, PARALLEL_START_LAYER=3, MODEL_DIM=64, ROPE_DIMS=8)


def small_settings(data: Path) -> dict[str, object]:
    """The demo's model and settings with the record's head width, which the attention kernels know."""
    vocab_size = json.loads((data / "manifest.json").read_text(encoding="utf-8"))["tokenizer"]["vocab_size"]
    model = demo.MODEL | dict(VOCAB_SIZE=vocab_size, NUM_HEADS=2, NUM_KV_HEADS=1)
    return demo.TRAINING | demo.SCORING | model | ({} if torch.cuda.is_available() else CPU_MODEL) | dict(
        TRAIN_BATCH_TOKENS=8 * 128, TRAIN_SEQ_LEN=128, EVAL_SEQ_LEN=256, VAL_BATCH_TOKENS=8 * 2048,
        TTT_EVAL_SEQ_LEN=256, GLOBAL_TTT_CHUNK_TOKENS=1024, TTT_CHUNK_SIZE=32, MAX_WALLCLOCK_SECONDS=0,
        ITERATIONS=5, COMPILE=0, ALLOW_SLOW=1, RUN_ID="rehearsal", DATA_PATH=data.resolve())


# --- (a) the run and its table ------------------------------------------------------------------------------

class BusySampler:
    """Once a second the share of time in which a kernel ran on each GPU of the run, with the stage that is reached.

    A collective that waits for another rank is a kernel too: idle time shows where ranks do not wait inside
    collectives, as in test-time training, and between kernels.
    """

    def __init__(self, log: Path, save: Path, processes: int) -> None:
        self.log, self.save, self.gpus = log, save, set(visible_gpus(processes)[:processes])
        self.smi: subprocess.Popen | None = None

    def __enter__(self) -> "BusySampler":
        if shutil.which("nvidia-smi"):
            self.smi = subprocess.Popen(["nvidia-smi", "--query-gpu=index,uuid,utilization.gpu",
                                         "--format=csv,noheader,nounits", "-l", "1"],
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def _read(self) -> None:
        with open(self.save, "w", encoding="utf-8") as file:
            for line in self.smi.stdout:
                cells = [cell.strip() for cell in line.split(",")]
                if self.gpus & set(cells[:2]) and cells[-1].isdigit():
                    text = self.log.read_text(errors="replace") if self.log.exists() else ""
                    file.write(f"{stage_of(text)},{cells[0]},{cells[-1]}\n")
                    file.flush()

    def __exit__(self, *error: object) -> None:
        if self.smi is not None:
            self.smi.terminate()
            self.smi.wait()


def stage_of(log: str) -> str:
    """The last stage that a log says has begun."""
    reached = "start"
    for stage, pattern in BEGINS.items():
        if re.search(f"^(?:{pattern})", log, re.M):
            reached = stage
    return reached


def busy_rows(path: Path) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        return
    with open(path, newline="", encoding="utf-8") as file:
        samples = [(stage, int(gpu), float(share)) for stage, gpu, share in csv.reader(file)]
    for stage in BEGINS:
        by_gpu: dict[int, list[float]] = {}
        for sampled, gpu, share in samples:
            if sampled == stage:
                by_gpu.setdefault(gpu, []).append(share)
        if by_gpu and stage != "end":
            means = [sum(shares) / len(shares) for _, shares in sorted(by_gpu.items())]
            yield (f"GPU without a kernel in {stage}, mean by GPU ({max(map(len, by_gpu.values()))} samples)",
                   ", ".join(f"{100 - mean:.0f} %" for mean in means))


def read_log(path: Path) -> runlog.Run:
    """The last start that trained, in a log that may go on with starts that only scored; else the last."""
    runs = runlog.read_runs(path)
    return next((run for run in reversed(runs) if run.steps is not None), runs[-1])


def pair(values: Sequence[float | None], form: str) -> str:
    return " / ".join("not reached" if value is None else form.format(value) for value in values)


def measurements(run: runlog.Run, against: runlog.Run | None) -> Iterator[tuple[str, str]]:
    """(what, value) of everything that the log knows about speed, time and memory."""
    ranks = run.world_size or 1
    yield "machine", run.hardware
    yield "training shards", f"{run.train_shards}"
    if run.steps is None:
        yield "training", "not finished"
        return
    yield "steps", f"{run.steps:,}"
    yield "steps and calibration of the budget", " of ".join(
        f"{seconds:,.2f} s" for seconds in ((run.train_clock_ms or 0) / 1000, run.budget_s or 0))
    speeds = run.tok_per_s
    yield "tokens/s, loops off / on", pair(speeds, "{:,.0f}")
    yield "tokens/s per GPU, loops off / on", pair([speed and speed / ranks for speed in speeds], "{:,.0f}")
    if against is not None:
        single = [speed and speed / (against.world_size or 1) for speed in against.tok_per_s]
        efficiency = [a and b and 100 * a / ranks / b for a, b in zip(speeds, single)]
        name = f"scaling efficiency against {against.world_size} GPU ({against.name})"
        yield name, pair(efficiency, "{:.1f} %")
    for stage, seconds in run.stages():
        yield f"time: {stage}", f"{seconds:,.1f} s"
    if run.peak_mib:
        yield "peak memory allocated per GPU, training", f"{run.peak_mib:,} MiB"
    if run.eval_peak_mib:
        yield "peak memory allocated per GPU, scoring", f"{run.eval_peak_mib:,} MiB"
    if run.total_bytes:
        yield "artifact and code", f"{run.total_bytes:,} of {runlog.SIZE_LIMIT:,} bytes"
    scores = [score and score.bpb for score in (run.pre, run.quantized, run.ttt)]
    yield "BPB before quantization / after / with test-time training", pair(scores, "{:.5f}")


def barrier_rows(log: Path) -> Iterator[tuple[str, str]]:
    """Which rank came last to each barrier, and how long the others waited for it, by the log."""
    found = False
    for line in log.read_text(encoding="utf-8").splitlines():
        event, fields = runlog.parse_line(line)
        if event == "barrier":
            found = True
            yield (f"barrier before {fields['before']}: last rank, wait of each",
                   f"{fields['last_rank']}; {fields['waits_ms'].strip('[]')} ms")
    if not found:
        yield "barriers", "not in the log, as of one process"


def step_table(hardware: str) -> str:
    """The GPU whose measured steps predict those of this hardware: itself, else the H100."""
    return next((gpu for gpu in STEP_TABLES if gpu in hardware), "H100")


def predicted_seconds(cfg: gpt.Config, lengths: np.ndarray, prefix_docs: int, ranks: int, gpu: str) -> float:
    """Evaluation clock of these documents by benchmarks/evaluation.py's plan and its committed step times."""
    table = json.loads(STEP_TABLES[gpu].read_text(encoding="utf-8"))
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluation.predict(cfg, table, evaluation.documents_of(lengths), prefix_docs, ranks)


def scale_evaluation(run: runlog.Run, notes: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """From the documents that were scored to all of the record's, beside what the prediction says of both."""
    if not notes or run.ttt is None or run.world_size is None:
        return
    shapes = {name: int(run.setting(name)) for name in (
        "ttt_batch_size", "ttt_eval_seq_len", "ttt_chunk_size", "global_ttt_chunk_tokens")}
    cfg, ranks = dataclasses.replace(gpt.Config(), **shapes), run.world_size
    part, whole = stratified_lengths(notes["share"]), evaluation.record_lengths()
    if run.phased["total_docs"] != len(part):
        raise RehearsalError(f"{run.path}: scored {run.phased['total_docs']:,} documents, the folder's "
                             f"manifest says {len(part):,}; name the folder that the run read with --data")
    prefix = cfg.phased_ttt_prefix_docs
    gpu, measured_s = step_table(run.hardware), run.ttt.ms / 1000
    of_part = predicted_seconds(cfg, part, run.phased["prefix_docs"], ranks, gpu)
    of_whole = predicted_seconds(cfg, whole, prefix, ranks, gpu)
    ratio = record_targets(whole) / record_targets(part)
    yield "documents and targets scored, of the record's", (
        f"{len(part):,} of {len(whole):,}, {record_targets(part):,} of {record_targets(whole):,}")
    of_all = f"evaluation of all on {ranks} GPUs"
    by_plan = of_whole / of_part
    yield (f"evaluation of these on {ranks} GPUs, measured / predicted from steps of an {gpu}",
           f"{measured_s:.1f} s / {of_part:.1f} s")
    yield f"{of_all}, measured times {ratio:.3f} (targets)", f"{measured_s * ratio:.1f} s"
    yield f"{of_all}, measured times {by_plan:.3f} (planned steps)", f"{measured_s * by_plan:.1f} s"
    yield f"{of_all}, predicted", f"{of_whole:.1f} s"
    if ranks != gpt.LANES:
        of_eight = predicted_seconds(cfg, whole, prefix, gpt.LANES, gpu)
        yield (f"evaluation of all on {gpt.LANES} GPUs, measured times {of_eight / of_part:.3f} "
               "(planned steps) / predicted", f"{measured_s * of_eight / of_part:.1f} s / {of_eight:.1f} s")


def as_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def describe(log: Path, data: Path | None, against: runlog.Run | None, busy: Path) -> str:
    run = read_log(log)
    rows = [*measurements(run, against), *barrier_rows(log), *scale_evaluation(run, notes_of(data)),
            *busy_rows(busy)]
    return as_table(("measured", run.name), rows)


def run_command(options: argparse.Namespace) -> int:
    against = read_log(options.against) if options.against else None       # a wrong name shows before the run
    settings: dict[str, object] = {"DATA_PATH": options.data.resolve(), "RUN_ID": "rehearsal"}
    notes = notes_of(options.data)
    if notes:
        settings["PHASED_TTT_PREFIX_DOCS"] = notes["prefix_docs"]
    for name, value in (("MAX_WALLCLOCK_SECONDS", options.train_seconds), ("ITERATIONS", options.iterations),
                        ("GPTQ_RESERVE_SECONDS", options.reserve_seconds)):
        if value is not None:
            settings[name] = value
    settings |= options.set
    out = options.out or Path("rehearsal_out")
    log, busy = out / "logs" / f"{settings['RUN_ID']}.txt", out / "gpu_busy.csv"
    if log.exists():
        raise RehearsalError(f"{log} exists from an earlier rehearsal; name another folder with --out")
    make_folder(out)
    start = time.monotonic()
    command = launch_command(options.processes, REPO / "train_gpt.py")
    with BusySampler(log, busy, options.processes):
        process = subprocess.Popen(command, cwd=out, env=environment(settings), start_new_session=True)
        try:
            code = process.wait()
        finally:
            end_group(process)
    wall_s = time.monotonic() - start
    print(f"rehearsal processes:{options.processes} exit_code:{code} wall_s:{wall_s:.0f} log:{log}")
    if log.exists():
        text = describe(log, options.data, against, busy)
        (out / "table.md").write_text(text + "\n", encoding="utf-8")
        print(text)
    return 1 if code else 0


def table_command(options: argparse.Namespace) -> int:
    against = read_log(options.against) if options.against else None
    print(describe(options.log, options.data, against, options.log.parent.parent / "gpu_busy.csv"))
    return 0


def validation_command(options: argparse.Namespace) -> int:
    if options.folder.exists():
        raise RehearsalError(f"{options.folder} exists; name a new folder or remove it")
    notes = make_validation(options.folder, options.source, options.share, options.train_shards)
    part, whole = stratified_lengths(options.share), evaluation.record_lengths()
    cfg, ranks = gpt.Config(), options.processes
    print(f"validation folder:{options.folder} documents:{notes['documents']} targets:{record_targets(part)} "
          f"scale:{record_targets(whole) / record_targets(part):.4f} train_shards:{options.train_shards}")
    gpu = step_table(torch.cuda.get_device_name() if torch.cuda.is_available() else "")
    of_part = predicted_seconds(cfg, part, notes["prefix_docs"], ranks, gpu)
    of_whole = predicted_seconds(cfg, whole, cfg.phased_ttt_prefix_docs, ranks, gpu)
    print(f"predicted gpu:{gpu} processes:{ranks} these_s:{of_part:.1f} all_s:{of_whole:.1f} "
          f"ratio:{of_whole / of_part:.4f}")
    print(f"use it with DATA_PATH={options.folder} PHASED_TTT_PREFIX_DOCS={notes['prefix_docs']}, as `run` "
          "does")
    return 0


# --- (c) faults ---------------------------------------------------------------------------------------------

class Fault(NamedTuple):
    signal: signal.Signals
    limit_s: float               # the other ranks and the launcher must have ended by then


class Stage(NamedTuple):
    name: str                    # as messages call it
    settings: dict[str, object]
    leaves: tuple[str, ...]      # files in checkpoints/ that must still read


# The slowest first: others can run meanwhile.
FAULTS = {"stopped": Fault(signal.SIGSTOP, 120.0), "killed": Fault(signal.SIGKILL, 15.0)}
STAGES = {"training": Stage("training", {"ITERATIONS": 10**6}, ()),
          "calibration": Stage("calibration", {}, (".weights",)),
          "evaluation": Stage("scoring", {"TTT_EVAL_ONLY": 1}, (".weights", ".artifact"))}
CALIBRATION_S = 3.0                      # of one rank, so that the fault comes in the middle


class Outcome(NamedTuple):
    case: str
    ended_s: float
    exit_code: int | None
    last_words: str
    problems: list[str]


def make_base(options: argparse.Namespace, out: Path, data: Path) -> int:
    """An undisturbed run whose checkpoint and artifact the evaluation cases go on from. Returns the
    calibration batches that keep a rank busy for CALIBRATION_S."""
    settings = small_settings(data) | {"TTT_ENABLED": 0} | options.set
    with Launch(out / "base", launch_command(options.processes, options.script), settings) as base:
        code = base.process.wait(START_LIMIT_S)
    if code:
        raise RunFailed(f"the undisturbed run failed with exit code {code}: {base.texts()[1][-1500:]}")
    seconds = read_log(out / "base" / "logs" / "rehearsal.txt").calibration_s
    return min(10**6, round(int(settings["GPTQ_CALIBRATION_BATCHES"]) * CALIBRATION_S / max(seconds, 0.01)))


def check_outcome(launch: Launch, fault: Fault, stage: Stage, ended_s: float, folder: Path,
                  settings: Mapping[str, object]) -> list[str]:
    """What does not hold, in sentences."""
    problems = []
    output, errors = launch.texts()
    code = launch.process.returncode
    if code is None:
        return [f"still running after {ended_s:.0f} s"]
    if ended_s > fault.limit_s:
        problems.append(f"ended after {ended_s:.1f} s, allowed are {fault.limit_s:g}")
    if code == 0:
        problems.append("exit code 0")
    if f"in stage {stage.name}" not in errors:
        problems.append(f"no message names stage {stage.name}")
    if not re.search(r"\brank \d", errors):
        problems.append("no message names a rank")
    cfg = gpt.Config.from_env({name: str(value) for name, value in settings.items()})
    magic = {".weights": gpt.CHECKPOINT_MAGIC, ".artifact": gpt.ARTIFACT_MAGIC}
    written = {path.suffix for path in (folder / "checkpoints").glob("rehearsal.*")}
    for suffix in sorted(written | set(stage.leaves)):
        try:
            gpt.read_container(folder / "checkpoints" / f"rehearsal{suffix}", magic[suffix], cfg)
        except (gpt.ArtifactError, KeyError) as error:
            problems.append(str(error))
    return problems


def run_case(options: argparse.Namespace, out: Path, data: Path, case: str, batches: int,
             starting: threading.Lock) -> Outcome:
    """Launch a run, hit its last rank and see how it ends; `starting` is held until the rank is hit."""
    fault_name, stage_name = case.split(":")
    fault, stage = FAULTS[fault_name], STAGES[stage_name]
    folder = out / case.replace(":", "_")
    settings = small_settings(data) | stage.settings | options.set
    if stage.name == "calibration":
        settings["GPTQ_CALIBRATION_BATCHES"] = batches
    if "TTT_EVAL_ONLY" in stage.settings:
        shutil.copytree(out / "base" / "checkpoints", folder / "checkpoints")
    with contextlib.ExitStack() as launches:
        with starting:
            launch = launches.enter_context(
                Launch(folder, launch_command(options.processes, options.script), settings))
            if not launch.wait_for(BEGINS[stage.name]):
                text = "\n".join(text[-600:] for text in launch.texts())
                return Outcome(case, 0.0, launch.process.returncode, text,
                               [f"stage {stage.name} was not reached"])
            time.sleep(0.3)                               # the line stands just before the stage's first work
            ranks, victim = launch.ranks(), options.processes - 1
            start = time.monotonic()
            if victim in ranks:
                os.kill(ranks[victim], fault.signal)
        with contextlib.suppress(subprocess.TimeoutExpired):
            launch.process.wait(fault.limit_s + 60)
        ended_s = time.monotonic() - start
        problems = check_outcome(launch, fault, stage, ended_s, folder, settings)
        if victim not in ranks:
            problems.append(f"rank {victim} had ended before the fault; the stage is too short here")
        left = [rank for rank, pid in ranks.items() if is_alive(pid)]
        if left and launch.process.returncode is not None:
            problems.append(f"ranks {left} outlived the launch")
    told = [line for line in launch.texts()[1].splitlines()
            if re.match(r"error: |interrupted by |RuntimeError: ", line)]
    return Outcome(case, ended_s, launch.process.returncode, "; ".join(told), problems)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def data_of(options: argparse.Namespace, out: Path) -> Path:
    """--data, or toy shards with enough documents for a few seconds of test-time training."""
    if options.data:
        return options.data
    if torch.cuda.is_available():
        return write_toy(out / "data", documents=1000 * options.processes, longest=500)
    return write_toy(out / "data", documents=50, longest=300)


@contextlib.contextmanager
def work_folder(options: argparse.Namespace) -> Iterator[Path]:
    """--out, which must not exist, or a folder that is removed afterwards."""
    if options.out is not None:
        if options.out.exists():
            raise RehearsalError(f"{options.out} exists; name a new folder or remove it")
        make_folder(options.out)
        yield options.out.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="rehearsal_") as folder:
        yield Path(folder)


def faults_command(options: argparse.Namespace) -> int:
    if options.processes < 2:
        raise RehearsalError("faults need at least two processes; set --processes")
    cases = options.only or [f"{fault}:{stage}" for fault in FAULTS for stage in STAGES]
    starting = threading.Lock()
    with work_folder(options) as out:
        data = data_of(options, out)
        needs_base = any(not case.endswith(":training") for case in cases)
        batches = make_base(options, out, data) if needs_base else 0
        with ThreadPoolExecutor(len(cases) if options.together else 1) as pool:
            outcomes = list(pool.map(lambda case: run_case(options, out, data, case, batches, starting),
                                     cases))
    rows = [(outcome.case.replace(":", " in "), f"{outcome.ended_s:.1f} s", f"{outcome.exit_code}",
             "; ".join(outcome.problems) or "as it should",
             outcome.last_words.replace("|", "/").replace("\n", " ")) for outcome in outcomes]
    head = ("last rank", f"all {options.processes} ended after", "exit code", "result", "last words")
    print(as_table(head, rows))
    return 1 if any(outcome.problems for outcome in outcomes) else 0


# --- (d) two rendezvous members -----------------------------------------------------------------------------

def visible_gpus(count: int) -> list[str]:
    """Indices or UUIDs; of all GPUs of the host, the first `count`."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return re.split(r"\s*,\s*", named.strip()) if named else [str(number) for number in range(count)]


def agent_command(port: int, processes: int, script: Path) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={processes}",
            "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=rehearsal",
            "--local-addr=127.0.0.1", str(script)]


LOSSES = re.compile(r"^(\d+/\d+ train_loss: \S+|.* val_loss:\S+ val_bpb:\S+)", re.M)


def losses_of(output: str) -> list[str]:
    return LOSSES.findall(output)


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for name in ("logs", "checkpoints")
                  for path in (folder / name).rglob("*") if path.is_file())


def largest_difference(one: Sequence[str], two: Sequence[str]) -> float:
    """Of the losses in two lists of log lines; infinite when the lines are not of the same kind."""
    numbers = [[float(re.search(r"loss: ?(\S+)", line)[1]) for line in lines] for lines in (one, two)]
    heads = [[re.split(r"(?:train|val)_loss", line)[0] for line in lines] for lines in (one, two)]
    if heads[0] != heads[1]:
        return float("inf")
    return max((abs(a - b) for a, b in zip(*numbers)), default=float("inf"))


def nodes_command(options: argparse.Namespace) -> int:
    if options.processes < 2 or options.processes % 2:
        raise RehearsalError("two members need an even number of processes; set --processes")
    half, problems = options.processes // 2, []
    with work_folder(options) as out:
        settings = small_settings(data_of(options, out)) | {"ITERATIONS": 20} | options.set
        alone = ["one", "again"][:options.launches]
        launches, codes = [], []
        for name in alone:
            with Launch(out / name, launch_command(options.processes, options.script), settings) as launch:
                codes.append(launch.process.wait(START_LIMIT_S))
                launches.append(launch)
        command, gpus = agent_command(free_port(), half, options.script), visible_gpus(options.processes)
        # Both in one folder: nodes share the file system that holds logs/ and checkpoints/.
        with contextlib.ExitStack() as stack:
            members = []
            for number in range(2):
                mine = dict(settings)
                if torch.cuda.is_available():
                    mine["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[number * half:(number + 1) * half])
                members.append(stack.enter_context(Launch(out / "two", command, mine, f"_{number}")))
            codes += [member.process.wait(START_LIMIT_S) for member in members]
        if any(codes):
            errors = "\n".join(launch.texts()[1][-1500:] for launch in (*launches, *members))
            print(f"error: exit codes {codes} of {' and '.join(alone)} and both members\n{errors}", file=sys.stderr)
            return 1
        found = [losses_of(launches[0].texts()[0]), losses_of("".join(member.texts()[0] for member in members))]
        spread = largest_difference(found[0], losses_of(launches[-1].texts()[0]))
        difference, allowed = largest_difference(*found), max(options.tolerance, 2 * spread)
        if spread == float("inf"):                        # not even the same lines
            problems.append("two equal launches logged other lines")
        elif difference > allowed:
            problems.append(f"losses differ by {difference:g}, allowed are {allowed:g}")
        files = [files_below(out / name) for name in ("one", "two")]
        if files[0] != files[1]:
            problems.append(f"files differ: {files[0]} and {files[1]}")
        artifacts = [sha256(out / name / "checkpoints" / "rehearsal.artifact")[:16]
                     for name in ("one", "two")]
    rows = [("processes", f"{options.processes}", f"2 x {half}"),
            ("loss lines", *(f"{len(x)}" for x in found)),
            ("last training loss", *([x for x in lines if "train_loss" in x][-1] for lines in found)),
            ("final score", *(lines[-1].replace("|", "/") for lines in found)),
            ("artifact SHA-256", *artifacts), ("files", *(f"{len(x)}" for x in files))]
    print(as_table(("", "one launch", "two rendezvous members"), rows))
    print(f"nodes identical:{int(found[0] == found[1])} largest_difference:{difference:g} "
          f"of_two_equal_launches:{spread:g} files_written_once:{int(files[0] == files[1])}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


# --- main ---------------------------------------------------------------------------------------------------

def setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=VALUE")
    return name, value


def small_count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 to 1000")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run, text: str, processes: int) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        command.add_argument("--processes", type=int, choices=(1, 2, 4, 8), default=processes)
        command.add_argument("--data", type=Path, metavar="DIR", help="folder of shards")
        command.add_argument("--out", type=Path, metavar="DIR", help="folder for what is written")
        command.add_argument("--set", type=setting, action="append", default=[], metavar="NAME=VALUE")
        return command

    validation = add("validation", validation_command, "write shards with the record's document lengths", 8)
    validation.add_argument("folder", type=Path, metavar="DIR")
    validation.add_argument("--source", type=Path, required=True, metavar="SHARDS",
                            help="folder the text comes from")
    validation.add_argument("--share", type=small_count, default=8, help="one document of so many (default 8)")
    validation.add_argument("--train-shards", type=small_count, default=8,
                            help="links to the source's shards (default 8)")
    run = add("run", run_command, "the record run, then its table", max(1, gpus))
    run.add_argument("--train-seconds", type=float, help="MAX_WALLCLOCK_SECONDS; default: the record's")
    run.add_argument("--reserve-seconds", type=float, help="GPTQ_RESERVE_SECONDS; default: the record's")
    run.add_argument("--iterations", type=int, help="ITERATIONS; default: the record's")
    table = add("table", table_command, "the table of a log", 8)
    table.add_argument("log", type=Path, metavar="LOG")
    for command in (run, table):
        command.add_argument("--against", type=Path, metavar="LOG", help="log of one GPU of the same machine")
    faults = add("faults", faults_command, "kill and stop a rank in three stages", max(2, gpus))
    faults.add_argument("--together", action="store_true",
                        help="a case begins as soon as a rank of the one before was hit")
    faults.add_argument("--only", action="append", metavar="FAULT:STAGE", help="such as killed:training",
                        choices=[f"{fault}:{stage}" for fault in FAULTS for stage in STAGES])
    nodes = add("nodes", nodes_command, "two rendezvous members against one launch", max(2, gpus))
    nodes.add_argument("--tolerance", type=float, default=1e-3 if gpus else 0.0,
                       help="largest difference of a loss in nats that passes (default %(default)s)")
    nodes.add_argument("--launches", type=int, choices=(1, 2), default=2 if gpus else 1,
                       help="2: twice the difference between two equal launches passes too, because GPUs add in any "
                            "order (default %(default)s)")
    for command in (faults, nodes):
        command.add_argument("--script", type=Path, default=REPO / "train_gpt.py", help=argparse.SUPPRESS)
    return parser


def end_all(number: int, frame: object) -> None:
    """A signal ends every launch, those of other threads too."""
    for pid in children(os.getpid()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGTERM)
    raise SystemExit(128 + number)


def main(argv: Sequence[str]) -> int:
    parser = make_parser()
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:                            # argparse has said why
        return stop.code or 0
    options.set = dict(options.set)
    try:
        if options.run is run_command and options.data is None:
            raise RehearsalError("run needs --data, a folder of shards; `validation` makes one")
        if options.data is not None and not options.data.is_dir():
            raise RehearsalError(f"--data {options.data}: no such folder; correct the path")
        return options.run(options)
    except (RehearsalError, runlog.LogError, gpt.ConfigError, gpt.DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)


if __name__ == "__main__":
    for handled in (signal.SIGINT, signal.SIGTERM):
        signal.signal(handled, end_all)
    sys.exit(main(sys.argv[1:]))
