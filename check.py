#!/usr/bin/env python3
"""Preflight: everything that could waste a paid run and can be known in the first seconds. `./run.sh check`.

    python check.py            one line per item: ok, warning, or error with the fix; exit code 1 on errors
    python check.py --quiet    warnings and errors only, as before every record run (SKIP_CHECK=1 skips it)

Looks at the settings in the environment, the GPUs and what runs on them, the software, the compiler, disk space
and write access, the data folder (of the validation files only the headers), the clocks, memory, and the files a
run would write. Starts nothing and reads no validation token. Works without a GPU and says what is missing.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parent
# Free bytes wanted where the run writes.
CACHE_BYTES, LOG_BYTES, HINT_BYTES = 4 << 30, 64 << 20, 256 << 20
CALIBRATION_S = 3.2  # of one H100 for 16 batches, measured in warm-up: logs/h100_180s.txt
GPU_FIELDS = ("index", "uuid", "name", "memory.total", "memory.free", "driver_version")
GPU_MODULES = {"flash-attn-4": "flash_attn", "nvidia-cutlass-dsl": "cutlass", "quack-kernels": "quack"}
UNSEEN_MIB = 2048  # memory in use beyond this belongs to somebody
# Not sw_power_cap: every H100 that works at full load reports it.
THROTTLE_FLAGS = ("hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")
THROTTLE_NAMES = ("clocks_event_reasons", "clocks_throttle_reasons")  # newer and older drivers


class Item(NamedTuple):
    """Level "ok", "warning" or "error", what was looked at, and what was found (with the fix)."""

    level: str
    name: str
    text: str


def ask_smi(*query: str) -> list[list[str]]:
    """Rows that nvidia-smi gives for a query; empty when it is missing or refuses."""
    lines = run_smi(*query, "--format=csv,noheader,nounits")
    return [[cell.strip() for cell in row] for row in csv.reader(lines) if row]


def run_smi(*arguments: str) -> list[str]:
    """Lines that nvidia-smi prints; empty when it is missing or refuses."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [] if done.returncode else done.stdout.splitlines()


def mib(text: str) -> float:
    """A memory cell of nvidia-smi; NaN where it says [N/A] or [Insufficient Permissions]."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def mig_parents() -> dict[str, str]:
    """{UUID of a MIG slice: UUID of its GPU}, from `nvidia-smi -L`."""
    parents, gpu = {}, ""
    for line in run_smi("-L"):
        if match := re.search(r"\(UUID: ([^)]+)\)", line):
            if match[1].startswith("MIG-"):
                parents[match[1]] = gpu
            else:
                gpu = match[1]
    return parents


def choose_visible(gpus: list[dict[str, str]], text: str | None) -> list[dict[str, str]]:
    """The GPUs that CUDA_VISIBLE_DEVICES names: by number, by UUID or its beginning, by a MIG slice.

    As in CUDA a name that fits nothing ends the list, and no variable means all.
    """
    if text is None:
        return gpus
    parents = mig_parents() if "MIG-" in text else {}
    found = []
    for name in (name.strip() for name in text.split(",")):
        if name.startswith("MIG-GPU-"):                  # of older drivers: MIG-GPU-<uuid>/<gi>/<ci>
            uuid = name.removeprefix("MIG-").split("/")[0]
        elif name.startswith("MIG-"):
            uuid = next((gpu for mig, gpu in parents.items() if mig.startswith(name)), None)
        else:
            uuid = name if name.startswith("GPU-") else None
        fitting = (gpu for gpu in gpus if gpu["index"] == name or uuid and gpu["uuid"].startswith(uuid))
        gpu = next(fitting, None)
        if gpu is None:
            break
        found += [gpu] if gpu not in found else []
    return found


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def pinned(path: Path) -> dict[str, str]:
    """{package: version} of the lines name==version that hold for this Python."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.match(r'([\w.-]+)==([\w.]+)(?:; python_version (<|==|>=) "3\.(\d+)")?$', line.strip()):
            name, version, relation, minor = match.groups()
            mine = sys.version_info[1]
            holds = {
                None: True,
                "<": mine < int(minor or 0),
                "==": mine == int(minor or 0),
                ">=": mine >= int(minor or 0),
            }
            if holds[relation]:
                found[name] = version
    return found


# --- software -----------------------------------------------------------------------------------------------


def check_software() -> Iterator[Item]:
    python = platform.python_version()
    yield Item(
        "ok" if (3, 10) <= sys.version_info[:2] <= (3, 13) else "warning",
        "python",
        f"{python} ({sys.executable}); tested are 3.10 to 3.13",
    )
    missing = [name for name in ("torch", "numpy", "sentencepiece") if importlib.util.find_spec(name) is None]
    if missing:
        yield Item(
            "error",
            "packages",
            f"missing: {', '.join(missing)}; {sys.executable} -m pip install -r requirements.txt",
        )
        return
    told = []
    for name, wanted in pinned(REPO / "requirements.txt").items():
        have = version_of(name)
        if name in ("numpy", "sentencepiece") and have != wanted:
            told.append(f"{name} {have}, requirements.txt has {wanted}")
    yield Item(
        "warning" if told else "ok",
        "packages",
        "; ".join(told)
        or f"torch {version_of('torch')}, numpy {version_of('numpy')}, sentencepiece {version_of('sentencepiece')}",
    )


def check_compiler(gpt) -> Iterator[Item]:
    compiler = os.environ.get("CC", "cc")
    try:
        gpt.compile_c("int check(void) { return 0; }\n")
    except Exception as error:  # whatever it is, it would end the run after training
        yield Item("error", "compiler", f"{error}; Debian, Ubuntu: apt-get install gcc libc6-dev")
        return
    told = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.splitlines()
    yield Item("ok", "compiler", told[0] if told else compiler)


# --- GPUs ---------------------------------------------------------------------------------------------------


def check_gpus(cfg, env: Mapping[str, str]) -> Iterator[Item]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        driver = ask_smi("--query-gpu=name,driver_version")
        reason = (
            (
                f"the driver lists {len(driver)}x {driver[0][0]}, but torch {torch.__version__} cannot use them; install a "
                "CUDA build of torch or check CUDA_VISIBLE_DEVICES"
            )
            if driver
            else "no NVIDIA GPU found"
        )
        small = cfg is not None and cfg.train_batch_tokens < 100_000
        yield Item(
            "warning" if small else "error",
            "gpu",
            f"{reason}; a run would use the CPU, which is for small models: "
            "./run.sh demo, or a machine with GPUs",
        )
        return
    # Asked before torch opens the GPUs, which would list this very process.
    gpus = [
        dict(zip(GPU_FIELDS, row))
        for row in ask_smi(f"--query-gpu={','.join(GPU_FIELDS)}")
        if len(row) == len(GPU_FIELDS)
    ]
    gpus = choose_visible(gpus, env.get("CUDA_VISIBLE_DEVICES"))
    apps = ask_smi("--query-compute-apps=gpu_uuid,pid,process_name,used_memory")
    names = [torch.cuda.get_device_name(i) for i in range(count)]
    processes = number_of_processes(env) or count
    if processes not in (1, 2, 4, 8) or processes > count:
        yield Item(
            "error",
            "gpu",
            f"{processes} processes on {count} GPUs: expected 1, 2, 4 or 8, at most the GPUs; set "
            "NPROC_PER_NODE",
        )
    slices = [name for name in names if " MIG " in name]
    record = processes == 8 and all("H100" in name for name in names) and not slices
    fewer = ", for the same result on fewer use ./run.sh one-gpu" if processes < 8 else ""
    yield Item(
        "ok" if record else "warning",
        "gpu",
        f"{count}x {names[0]}, {processes} processes"
        + ("" if record else f"; record runs are 8x H100{fewer}"),
    )
    if slices:
        yield Item("warning", "gpu models", f"{slices[0]}: a slice, with a part of a GPU's speed and memory")
    if len(set(names)) > 1:
        yield Item("warning", "gpu models", f"{sorted(set(names))}: the slowest sets the pace")
    yield from check_kernels(cfg, torch.cuda.get_device_capability(0))
    if not gpus:
        yield Item(
            "warning",
            "driver",
            "nvidia-smi gives no answer; free memory, driver and throttling are not known",
        )
        return
    yield Item("ok", "driver", f"{gpus[0]['driver_version']}, torch built for CUDA {torch.version.cuda}")
    uuids = {gpu["uuid"] for gpu in gpus}
    yield check_throttling(uuids)
    others = [
        f"process {pid} ({name.rsplit('/', 1)[-1]}, {memory} MiB)"
        for uuid, pid, name, memory, *_ in apps
        if uuid in uuids
    ]
    used = [mib(gpu["memory.total"]) - mib(gpu["memory.free"]) for gpu in gpus]
    if others:
        yield Item(
            "warning" if slices else "error",            # they may be on other slices
            "other runs",
            f"on these GPUs: {', '.join(others)}; end them or choose other GPUs with CUDA_VISIBLE_DEVICES",
        )
    elif max(used) > UNSEEN_MIB:                         # false for NaN
        yield Item(
            "warning",
            "other runs",
            f"{max(used):,.0f} MiB of a GPU are in use by a process that is not visible here",
        )
    else:
        yield Item("ok", "other runs", "none on these GPUs")
    free = [mib(gpu["memory.free"]) for gpu in gpus]
    if slices:                                           # nvidia-smi told of whole GPUs
        free = [torch.cuda.get_device_properties(i).total_memory / 2**20 for i in range(count)]
    yield from check_memory(cfg, [value for value in free if not math.isnan(value)])


def check_throttling(uuids: set[str]) -> Item:
    """Of the GPUs of this run; others of the machine may be at work."""
    for name in THROTTLE_NAMES:
        rows = {flag: ask_smi(f"--query-gpu=uuid,index,{name}.{flag}") for flag in THROTTLE_FLAGS}
        if any(rows.values()):
            active = []
            for flag, gpus in rows.items():
                active += [f"GPU {index}: {flag}" for uuid, index, value in gpus if uuid in uuids and value == "Active"]
            if active:
                return Item(
                    "warning",
                    "throttling",
                    f"{'; '.join(active)}: the run would be slow; exchange this machine",
                )
            return Item("ok", "throttling", "none")
    return Item("ok", "throttling", "not known: nvidia-smi does not say")


def check_processes(env: Mapping[str, str]) -> Iterator[Item]:
    """Wherever it runs: run.sh refuses other numbers."""
    text = env.get("NPROC_PER_NODE", "1")
    if text not in ("1", "2", "4", "8"):
        yield Item("error", "processes", f"NPROC_PER_NODE={text}: expected 1, 2, 4 or 8, because one optimizer step is "
                   "8 rows dealt evenly")


def number_of_processes(env: Mapping[str, str]) -> int | None:
    text = env.get("NPROC_PER_NODE", "")
    return int(text) if text.isdigit() else None


def check_kernels(cfg, capability: tuple[int, int]) -> Iterator[Item]:
    slow_ok = cfg is not None and cfg.allow_slow
    bad = "warning" if slow_ok else "error"
    if importlib.util.find_spec("triton") is None:
        yield Item(bad, "triton", "not installed; it comes with CUDA builds of torch")
    else:
        yield Item("ok", "triton", version_of("triton") or "installed")
    if cfg is not None and not cfg.block_kernels:
        yield Item(bad, "blocks", "BLOCK_KERNELS=0 is slower by a third; needs ALLOW_SLOW=1")
    if cfg is not None and not cfg.compile and (capability < (9, 0) or not cfg.block_kernels):
        yield Item(bad, "torch.compile", "COMPILE=0 without block kernels is several times slower; unset it")
    if capability < (9, 0):
        yield Item(
            bad,
            "attention",
            f"compute capability {capability[0]}.{capability[1]}: only torch's FlashAttention-2, about "
            "half as fast; needs ALLOW_SLOW=1",
        )
        return
    if capability[0] == 9 and importlib.util.find_spec("flash_attn_interface"):
        yield Item("ok", "attention", "FlashAttention-3")
        return
    wanted = pinned(REPO / "requirements-gpu.txt")
    have = {name: version_of(name) for name in wanted}
    if have.get("flash-attn-4") is None:
        yield Item(
            bad,
            "attention",
            f"no FlashAttention-3 or -4; {sys.executable} -m pip install -r requirements-gpu.txt",
        )
    elif unseen := [name for name, module in GPU_MODULES.items() if have[name] and not has_module(module)]:
        yield Item(
            bad,
            "attention",
            f"{unseen[0]} is installed, but `import {GPU_MODULES[unseen[0]]}` finds nothing: .pth files are "
            f"read in site-packages only, not on PYTHONPATH; {sys.executable} -m pip install -r requirements-gpu.txt",
        )
    elif have != wanted:
        yield Item(
            "warning",
            "attention",
            ", ".join(
                f"{name} {have[name]} (tested: {wanted[name]})"
                for name in wanted
                if have[name] != wanted[name]
            ),
        )
    else:
        yield Item("ok", "attention", f"FlashAttention-4 {have['flash-attn-4']}")


def check_memory(cfg, free_mib: list[float]) -> Iterator[Item]:
    """Against the peak of the newest log of an equal model and row length."""
    known = (
        None
        if cfg is None
        else find_log(
            cfg,
            (
                "train_batch_tokens",
                "half_rows_until",
                "quarter_rows_until",
                "model_dim",
                "num_layers",
                "num_loops",
                "mlp_mult",
                "vocab_size",
            ),
            "peak_mib",
        )
    )
    if not free_mib:
        return
    if known is None:
        yield Item(
            "ok", "memory", f"{min(free_mib):,.0f} MiB free; no log of such a model says what it needs"
        )
    elif known.peak_mib > min(free_mib):
        yield Item(
            "error",
            "memory",
            f"needs about {known.peak_mib:,} MiB per rank ({known.path.name}), free are "
            f"{min(free_mib):,.0f}; end other processes or lower TRAIN_BATCH_TOKENS",
        )
    else:
        yield Item(
            "ok",
            "memory",
            f"{min(free_mib):,.0f} MiB free, about {known.peak_mib:,} needed per rank ({known.path.name})",
        )


# --- settings, clocks, files --------------------------------------------------------------------------------


def transposed_distance(a: str, b: str) -> int:
    """Edits that turn a into b, where two swapped neighbours count as one."""
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            best = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, rows[-2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return rows[-1][-1]


def near_names(env: Mapping[str, str], names: list[str]) -> Iterator[Item]:
    """Variables that are probably misspelt settings; the run itself refuses only the clearest."""
    for key in sorted(env):
        if key in names or len(key) < 4:
            continue
        near = [
            name for name in names if abs(len(name) - len(key)) <= 1 and transposed_distance(key, name) == 1
        ]
        if near:
            yield Item(
                "error",
                "settings",
                f"{key}={env[key]}: did you mean {' or '.join(near)}? Correct or unset it",
            )


def check_settings(gpt, env: Mapping[str, str]) -> tuple[object | None, list[Item]]:
    """(settings, or None when they are refused; items)."""
    names = [name.upper() for name in gpt.Config.__dataclass_fields__] + list(gpt.FIXED_SETTINGS)
    items = list(near_names(env, [*names, "NPROC_PER_NODE", "SKIP_CHECK", "PYTHON"]))
    try:
        cfg = gpt.Config.from_env({key: value for key, value in env.items() if key != "SKIP_CHECK"})
    except gpt.ConfigError as error:
        told = str(error)
        return None, [item for item in items if item.text.split("=")[0] not in told] + [
            Item("error", "settings", told)
        ]
    default = gpt.Config()
    changed = [
        f"{name.upper()}={getattr(cfg, name)}"
        for name in gpt.Config.__dataclass_fields__
        if getattr(cfg, name) != getattr(default, name)
    ]
    return cfg, [
        *items,
        Item(
            "ok",
            "settings",
            f"differ from the record recipe: {' '.join(changed)}" if changed else "the record recipe",
        ),
    ]


def find_log(cfg, same: tuple[str, ...], having: str):
    """The newest run in logs/ with these settings equal that knows `having`; None if there is none."""
    import runlog

    def told(run: runlog.Run, name: str) -> float:
        """A log from before this setting ran with what is its default."""
        return run.setting(name) if name in run.settings else float(getattr(type(cfg), name))

    found = []
    for path in sorted((REPO / "logs").glob("*.txt")):
        try:
            found += runlog.read_runs(path)
        except runlog.LogError:
            continue
    fitting = [
        run
        for run in found
        if getattr(run, having) is not None
        and all(told(run, name) == float(getattr(cfg, name)) for name in same)
    ]
    # Dates are whole days: of equal ones the last by name counts.
    ranked = [(run.identity.get("date", ""), place) for place, run in enumerate(fitting)]
    return fitting[max(ranked)[1]] if ranked else None


def check_clocks(cfg, env: Mapping[str, str], val_tokens: int | None) -> Iterator[Item]:
    if cfg.max_wallclock_seconds == 0:
        yield Item("ok", "train clock", f"{cfg.iterations:,} steps, no time limit (MAX_WALLCLOCK_SECONDS=0)")
    else:
        ranks = number_of_processes(env) or max(1, gpu_count())
        calibration = CALIBRATION_S * cfg.gptq_calibration_batches / 16 / ranks
        fits = calibration <= cfg.gptq_reserve_seconds
        steps = cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds
        yield Item(
            "ok" if fits else "warning",
            "train clock",
            f"{steps:g} s of steps + {cfg.gptq_reserve_seconds:g} s reserve "
            f"= {cfg.max_wallclock_seconds:g} s; calibration takes about {calibration:.1f} s on H100"
            + (
                ""
                if fits
                else ", more than the reserve: training will stop earlier than the schedule expects"
            ),
        )
    if not cfg.ttt_enabled or cfg.prequant_only:
        return
    known = find_log(
        cfg, ("ttt_chunk_size", "ttt_eval_seq_len", "model_dim", "num_layers", "num_loops"), "eval_ms"
    )
    if known is None or not known.val_tokens or not val_tokens or not known.world_size:
        yield Item(
            "ok", "eval clock", f"budget {cfg.eval_wallclock_seconds:g} s; no log of such a model predicts it"
        )
        return
    predicted = (
        known.eval_ms
        / 1000
        * val_tokens
        / known.val_tokens
        * known.world_size
        / (number_of_processes(env) or max(1, gpu_count()))
    )
    over = predicted > cfg.eval_wallclock_seconds > 0
    near = (
        ""
        if 0.5 < val_tokens / known.val_tokens < 2
        else f", a rough guess: that run scored {known.val_tokens:,} tokens"
    )
    yield Item(
        "warning" if over else "ok",
        "eval clock",
        f"about {predicted:,.0f} s of {cfg.eval_wallclock_seconds:g} s by {known.path.name}{near}",
    )


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_data(gpt, cfg) -> tuple[int | None, list[Item]]:
    """(validation tokens, items)."""
    try:
        data = gpt.Dataset.open(cfg)
    except (gpt.DataError, OSError) as error:
        hint = "" if "prepare_caseops_data" in str(error) else "; python3 prepare_caseops_data.py download"
        return None, [Item("error", "data", f"{error}{hint}")]
    items = []
    low, high = gpt.CHECK_FIGURES["val_tokens"]
    published = low <= data.val_tokens <= high
    shards = f"{len(data.train)} training shards, {data.val_tokens:,} validation tokens"
    if published and len(data.train) < gpt.CHECK_FIGURES["train_shards"]:
        items.append(
            Item(
                "warning",
                "data",
                f"{shards}: fewer than the {gpt.CHECK_FIGURES['train_shards']} published; "
                "python3 prepare_caseops_data.py download",
            )
        )
    else:
        items.append(
            Item(
                "ok" if published else "warning",
                "data",
                f"{data.folder}: {shards}"
                + ("" if published else "; not the published split, BPB compares only with itself"),
            )
        )
    source = (
        "manifest.json"
        if data.manifest
        else "published figures"
        if published
        else "nothing (ALLOW_UNVERIFIED=1)"
    )
    items.append(
        Item("ok" if data.manifest or published else "warning", "data origin", f"checked against {source}")
    )
    remembered = data.folder / getattr(gpt, "CHECKED_NAME", ".checked.json")
    try:
        known = set(json.loads(remembered.read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        known = set()
    unread = [path.name for path in (*data.val, *data.val_bytes) if path.name not in known]
    items.append(
        Item(
            "ok" if not unread else "warning",
            "data hashes",
            "every validation file was verified before"
            if not unread
            else f"{len(unread)} validation files were never verified; a damaged one would show only after "
            f"training: python3 prepare_caseops_data.py verify {data.folder}",
        )
    )
    try:
        tokenizer = gpt.check_tokenizer(cfg, data)
        items.append(Item("ok", "tokenizer", f"{tokenizer.name}, hash and ids as the data say"))
    except (gpt.DataError, ImportError) as error:
        items.append(Item("error", "tokenizer", str(error)))
    return data.val_tokens, items


def check_folder(folder: Path, wanted: int, purpose: str) -> Item:
    """Write access and room, tried by writing a file."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        return Item("error", purpose, f"{existing} is a file, expected a folder; move it away")
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".check_"):
            pass
    except OSError as error:
        return Item(
            "error",
            purpose,
            f"cannot write to {existing} ({error.strerror}); choose another folder or fix its rights",
        )
    free = shutil.disk_usage(existing).free
    if free < wanted:
        return Item(
            "error", purpose, f"{folder}: {free / 1e9:.1f} GB free, wanted {wanted / 1e9:.1f}; make room"
        )
    return Item("ok", purpose, f"{folder}: {free / 1e9:,.0f} GB free, {wanted / 1e9:.1f} wanted")


def check_places(cfg, env: Mapping[str, str]) -> Iterator[Item]:
    weights = (
        4
        * (
            cfg.vocab_size * cfg.model_dim
            + cfg.num_layers * cfg.model_dim * (2 * cfg.model_dim + 2 * cfg.kv_dim + 2 * cfg.mlp_dim)
        )
        if cfg
        else 150_000_000
    )
    checkpoints = Path(env.get("CHECKPOINT_DIR") or "checkpoints")
    yield check_folder(checkpoints, 2 * weights + 32_000_000, "checkpoints")
    yield check_folder(Path("logs"), LOG_BYTES, "logs")
    yield check_folder(Path(tempfile.gettempdir()), HINT_BYTES, "temporary files, hints among them")
    for name, default in (
        ("TORCHINDUCTOR_CACHE_DIR", Path(tempfile.gettempdir())),
        ("TRITON_CACHE_DIR", Path.home() / ".triton"),
    ):
        if gpu_count():
            yield check_folder(Path(env.get(name) or default), CACHE_BYTES, f"cache {name}")


def check_names(cfg, env: Mapping[str, str]) -> Iterator[Item]:
    """Files that the run would meet under its name."""
    checkpoints = Path(env.get("CHECKPOINT_DIR") or "checkpoints")
    if not cfg.run_id:
        yield Item("ok", "files", "RUN_ID is not set: names carry seed and time, nothing is overwritten")
        return
    names = [Path("logs") / f"{cfg.run_id}.txt", checkpoints / f"{cfg.run_id}.weights"]
    names.append(checkpoints / f"{cfg.run_id}.artifact")
    found = [path for path in names if path.is_file()]
    present = sorted(
        str(path) for path in found if path.stat().st_size
    )  # a failed start may leave an empty log
    resumes = cfg.quantize_only or cfg.ttt_eval_only
    if resumes and not any(Path(name).parent == checkpoints for name in present):
        yield Item(
            "error",
            "files",
            f"nothing of RUN_ID={cfg.run_id} in {checkpoints}/ to go on from; correct RUN_ID",
        )
    elif present and not resumes:
        yield Item(
            "error",
            "files",
            f"RUN_ID={cfg.run_id} has run before: {', '.join(present)}; name another RUN_ID or move "
            "them away",
        )
    else:
        yield Item("ok", "files", f"RUN_ID={cfg.run_id} {'goes on' if resumes else 'is new'}")


# --- main ---------------------------------------------------------------------------------------------------


def check_all(env: Mapping[str, str]) -> Iterator[Item]:
    software = list(check_software())
    yield from software
    if any(item.level == "error" for item in software):
        return  # without torch nothing else can be asked
    import train_gpt as gpt

    cfg, items = check_settings(gpt, env)
    yield from items
    yield from check_gpus(cfg, env)
    if not gpu_count():
        yield from check_processes(env)
    yield from check_compiler(gpt)
    yield from check_places(cfg, env)
    if cfg is None:
        return
    val_tokens, items = check_data(gpt, cfg)
    yield from items
    yield from check_clocks(cfg, env, val_tokens)
    yield from check_names(cfg, env)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:
        return stop.code or 0
    counts = {"ok": 0, "warning": 0, "error": 0}
    for item in check_all(os.environ):
        counts[item.level] += 1
        if item.level != "ok" or not options.quiet:
            print(f"{item.level:<8} {item.name:<16} {item.text}", flush=True)
    print(
        f"check ok:{counts['ok']} warnings:{counts['warning']} errors:{counts['error']}"
        + ("; SKIP_CHECK=1 runs all the same" if counts["error"] else ""),
        flush=True,
    )
    return 1 if counts["error"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
