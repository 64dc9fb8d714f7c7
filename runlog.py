"""Read the logs of this family of runs, and say what in them cannot be believed or breaks a rule.

Reads this project's logs and those of the public reference (openai/parameter-golf PR #2123/#2124 and relatives):
both keep the lines that people diff and grep. `read_runs` gives one Run for every start that a file holds;
`check` compares what the lines of a run, and the runs with each other, say about the same thing.
Plain Python, nothing to install.
"""

from __future__ import annotations

import ast
import functools
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

# The log grammar: an event in words (perhaps none), then key:value pairs. Settings have two leading blanks.
PAIR = re.compile(r'([^\s:=]+)[:=] ?("[^"]*"|\[[^\]]*\]|[^\s:]+)')
SETTING = re.compile(r"  ([a-z][a-z0-9_]*): ?(.*)")
SOURCE = re.compile(r"^source:\n.*?^source_end$\n?", re.M | re.S)  # older logs carry the script's text

# Lines of this project's logs by a name for them, with the values in them that PAIR does not find.
LINES = {
    "versions": r"versions ",
    "run": r"run run_id:",
    "command": r'run command:"(?P<command>.*)"$',
    "code": r"code commit:",
    "train_shards": r"train_shards:",
    "val_tokens": r"val_tokens:",
    "model_params": r"model_params:",
    "reserve": r"gptq:reserving ",
    "warmup": r"warmup (done )?elapsed_s:",
    "progress": r"\d+/(?P<iterations>\d+) train_loss:",
    "layer_loop": r"layer_loop:enabled ",
    "stop": r"stopping_early:.* step: (?P<step>\d+)/(?P<iterations>\d+)",
    "speed": r"train speed ",
    "checkpoint": r"Serialized model: (?P<num_bytes>\d+) bytes",
    "calibration": r"GPTQ:collected \d+ Hessians in (?P<seconds>[\d.]+s)",
    "clock": r"train clock_s:",
    "train_excess": r"train warning over_budget_ms:",
    "pre": r"diagnostic pre-quantization post-ema ",
    "code_form": r"artifact code_form:",
    "code_size": r"Code size \(compressed\): (?P<num_bytes>\d+) bytes",
    "attempt": r"artifact attempt:",
    "artifact": r"artifact written ",
    "model_size": r"Serialized model quantized\S*: (?P<num_bytes>\d+) bytes",
    "total_size": r"Total submission size quantized\S*: (?P<num_bytes>\d+) bytes",
    "load": r"artifact load_s:",
    "quantized": r"diagnostic quantized ",
    "compile": r"ttt_lora:compile warmup done \((?P<seconds>[\d.]+s)\)",
    "phased": r"ttt_phased:",
    "plan": r"ttt plan ",
    "batch": r"ttt batch:(?P<number>\d+)/(?P<total>\d+)",
    "adaptation_stopped": r"ttt adaptation_stopped ",
    "adapted": r"ttt adapted_base ",
    "barrier": r"barrier ",
    "hints": r"ngram_tilt:hints ",
    "hints_made": r"ngram_tilt:precompute_done ",
    "audit": r"audit ",
    "final": r"quantized_ttt_phased ",
    "total_eval": r"total_eval_time:",
    "eval_excess": r"eval warning over_budget_s:",
    "eval": r"eval eval_ms:",
}
REPEATED = {"progress", "attempt", "batch", "barrier"}  # all others are written once in a start
# Logs of the present form: younger than this, or with a line or field that came with that form. They hold every
# line that `_lines_of_a_whole_run` lists, every setting but the later ones, and each clock in milliseconds too.
LAST_DATE_OF_OLDER_FORM = "2026-11-24"
PRESENT_FIELDS = ("command.command", "progress.train_time_ms", "clock.clock_ms", "load.load_ms",
                  "compile.elapsed_ms", "total_eval.total_eval_ms", "eval.eval_ms")
LATER_SETTINGS = {"half_rows_until", "quarter_rows_until"}  # the first logs of the present form lack them

# What a log says twice: rule, and two places that agree to their last digits. A place is line.field.
STATED_TWICE = (
    ("clocks", "stop.train_time", "clock.steps_ms"),
    ("clocks", "stop.train_time", "clock.steps_s"),
    ("clocks", "clock.steps_s", "clock.steps_ms"),
    ("clocks", "clock.clock_s", "clock.clock_ms"),
    ("clocks", "clock.calibration_s", "clock.calibration_ms"),
    ("clocks", "calibration.seconds", "clock.calibration_s"),
    ("clocks", "calibration.elapsed_ms", "clock.calibration_ms"),
    ("clocks", "settings.max_wallclock_seconds", "clock.budget_s"),
    ("clocks", "load.load_s", "load.load_ms"),
    ("clocks", "compile.seconds", "compile.elapsed_ms"),
    ("clocks", "final.eval_time", "total_eval.total_eval_ms"),
    ("clocks", "settings.eval_wallclock_seconds", "eval.limit_ms"),
    ("training steps", "stop.step", "speed.steps"),
    ("training steps", "settings.iterations", "stop.iterations"),
    ("training steps", "settings.iterations", "progress.iterations"),
    ("totals", "hints.total", "hints_made.total_targets"),
    ("totals", "final.targets", "audit.targets"),
)
# The same, where the second says what the slowest rank needed; how much longer that may be, in ms.
OF_SLOWEST_RANK = (
    ("final.eval_time", "eval.eval_ms", 5_000),
    ("load.load_ms", "eval.load_ms", math.inf),
    ("compile.elapsed_ms", "eval.compile_ms", math.inf),
)
# Files that bear the run's name.
NAMED_FILES = (
    ("code.source_file", "logs/{}.source.py.xz"),
    ("artifact.file", "{}.artifact"),
    ("audit.order_file", "logs/{}.order.bin"),
)

CODE_MARGIN = 256  # bytes that a run leaves free beside the limit
MOST_HEADER_BYTES = 1 << 12  # of a container: names, shapes and checksums
CODE_FORMS = ("packed", "packed_file", "lzma_of_source")
SIZE_LIMIT, CLOCK_LIMIT_MS = 16_000_000, 600_000
RECORD_GPUS, RECORD_GPU_NAME = 8, "H100"
PUBLISHED_SHARDS = 80
# The published validation split; the reference drops the last partial sequence, this project scores all of it.
PUBLISHED_TARGETS = (47_851_520, 47_853_567)
PUBLISHED_BYTES, BYTES_TOLERANCE, BYTES_PER_LATER_TARGET = 151_074_499, 2, 3.157
LATER_TARGETS_SPREAD = 0.5  # by which the few targets that only this project scores may be longer or shorter
# bytes per target of the reference's plain evaluation, which leaves out the end of every rank's share
TRUNCATED_BYTES_PER_TARGET = 2.188561 / math.log(2)

# Settings that name a run, its place or its process, and do not shape its numbers.
NAMING = {
    "seed",
    "run_id",
    "logfile",
    "data_path",
    "data_dir",
    "datasets_dir",
    "tokenizer_path",
    "train_files",
    "val_files",
    "val_bytes_files",
    "model_path",
    "quantized_model_path",
    "artifact_dir",
    "checkpoint_dir",
    "rank",
    "local_rank",
    "is_main_process",
    "quiet",
    "skip_check",
    "audit",
}
STEPS_OF_ROW = {"whole": 1, "half": 2, "quarter": 4}  # steps that one training row makes
WATCHING = {"val_loss_every", "train_log_every"}  # say what is logged; the reference's clock stops meanwhile


STAGES = (
    "warm-up and compilation",
    "training",
    "calibration",
    "diagnostic before",
    "rounding and coding",
    "loading",
    "compilation of diagnostics",
    "diagnostic after",
    "compilation of scoring",
    "scoring with test-time training",
)


class LogError(ValueError):
    """A file is not a log of this family, or a known line lacks a field."""

    exit_code = 1  # of the command that was given the file


class WrongFile(LogError):
    """The file is not there or cannot be read."""

    exit_code = 2


class NotALog(WrongFile):
    """The file holds no settings, so it is something else."""


class Point(NamedTuple):
    """A training progress line."""

    step: int
    loss: float
    minutes: float  # one decimal in the log
    tok_per_s: float  # since the first step


class Diagnostic(NamedTuple):
    loss: float  # nats per token
    bpb: float
    ms: float
    targets: int | None  # None where the log does not say
    bytes: int | None


class Batch(NamedTuple):
    """A progress line of test-time training; bpb is the running score of the rank that wrote it."""

    number: int
    total: int
    bpb: float
    phase: str
    adapted: int | None  # documents the base had been adapted on (reference: gd)


@dataclass
class Run:
    """What one start of a run wrote; None or empty where the log says nothing (the run stopped before)."""

    name: str  # file name without its end; #2 is the second start in the file
    path: Path
    starts: int = 1  # how many starts the file holds
    settings: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    identity: dict[str, str] = field(default_factory=dict)  # run_id, date, data_source, commit, command, ...
    train_shards: int | None = None
    val_tokens: int | None = None
    params: int | None = None
    reserve_s: float | None = None  # of the line gptq:reserving
    effective_ms: float | None = None
    warmup_s: float | None = None
    curve: list[Point] = field(default_factory=list)
    row_parts: list[tuple[int, int]] = field(default_factory=list)  # (first step, steps that one row makes)
    loop_step: int | None = None
    loop_progress: float | None = None
    stop_ms: float | None = None  # optimizer steps only
    steps: int | None = None
    speed: dict[str, str] = field(default_factory=dict)
    clock_ms: float | None = None  # steps and calibration, as the log says
    calibration_s: float | None = None
    peak_mib: int | None = None  # of training
    eval_peak_mib: int | None = None  # of scoring
    pre: Diagnostic | None = None
    quantized: Diagnostic | None = None
    ttt: Diagnostic | None = None
    total_eval_s: float | None = None
    code_bytes: int | None = None
    source_bytes: int | None = None
    model_bytes: int | None = None
    total_bytes: int | None = None
    groups: dict[str, int] = field(default_factory=dict)  # bytes by tensor group
    quantize_s: float | None = None  # rounding and coding
    load_s: float | None = None
    compile_s: dict[str, float] = field(default_factory=dict)  # by what was compiled
    hints: dict[str, int] = field(default_factory=dict)
    hints_s: float | None = None
    phased: dict[str, int] = field(default_factory=dict)  # the line ttt_phased
    boundaries: list[int] = field(default_factory=list)  # of its phases, in documents
    adapted: set[int] = field(default_factory=set)  # documents the base was adapted on, as the body says
    batches: list[Batch] = field(default_factory=list)
    finals: int = 0  # final score lines
    warnings: list[str] = field(default_factory=list)  # the run's own warnings
    lines: dict[str, list[dict[str, str]]] = field(default_factory=dict)  # the fields of every line of LINES

    def text(self, place: str) -> str | None:
        """What a place, line.field, says; of a line that is repeated, the last."""
        line, name = place.split(".")
        return (self.settings if line == "settings" else self.lines.get(line, [{}])[-1]).get(name)

    def said(self, place: str) -> float:
        """The number at a place, times in ms; NaN, which equals nothing, where the log does not say."""
        return measure(place, self.text(place) or "")[0]

    @property
    def is_present_form(self) -> bool:
        """Whether a whole run must have left the lines and fields that this project's logs have now."""
        is_young = self.identity.get("date", "") > LAST_DATE_OF_OLDER_FORM
        return self.is_ours and (is_young or any(map(self.text, PRESENT_FIELDS)))

    @property
    def seed(self) -> int | None:
        return int(self.settings["seed"]) if self.settings.get("seed", "").lstrip("-").isdigit() else None

    def setting(self, name: str) -> float:
        """A setting as a number; NaN, which equals nothing, when it is none."""
        try:
            return number(self.settings[name])
        except (KeyError, ValueError):
            return math.nan

    def tokens_at(self, step: int) -> float:
        """Training tokens that the first `step` steps took: of rows in parts, as many as the parts hold. NaN if
        not said."""
        parts = self.row_parts
        if not parts and self.setting("half_rows_until") > 0:  # said nothing: halves until layers looped
            parts = [(0, 2)] if self.loop_step is None else [(0, 2), (self.loop_step, 1)]
        tokens, since, now = 0.0, 0, 1
        for change, following in [*parts, (step, 1)]:
            tokens += (min(step, change) - since) / now
            since, now = min(step, change), following
        return tokens * self.setting("train_batch_tokens")

    @property
    def budget_s(self) -> float | None:
        value = self.setting("max_wallclock_seconds")
        return None if math.isnan(value) else value

    @property
    def world_size(self) -> int | None:
        text = self.versions.get("world_size") or self.settings.get("world_size")
        return int(text) if text and text.isdigit() else None

    @property
    def hardware(self) -> str:
        return f"{self.world_size or '?'}x {self.versions.get('device', 'unnamed GPU')}"

    @property
    def is_ours(self) -> bool:
        """Whether this project wrote it: the reference logs no versions in this form."""
        return "compute_dtype" in self.versions

    @property
    def merges(self) -> int:
        """Token pairs that `fuse` joined in the shards."""
        return count(self.identity.get("merges", "0"))

    @property
    def is_published_data(self) -> bool:
        """By the number of tokens; joined tokens are fewer, but of the same bytes."""
        low, high = PUBLISHED_TARGETS
        if not self.merges:
            return self.val_tokens is not None and low <= self.val_tokens <= high + 1
        most = PUBLISHED_BYTES + BYTES_TOLERANCE + (BYTES_PER_LATER_TARGET + LATER_TARGETS_SPREAD) * (high - low)
        scored = [s.bytes for s in (self.pre, self.quantized, self.ttt) if s and s.bytes]
        return bool(scored) and all(PUBLISHED_BYTES - BYTES_TOLERANCE <= n <= most for n in scored)

    @property
    def is_record(self) -> bool:
        """Complete, uninterrupted, on the record machine, budget and data, whether or not within the limits."""
        return (
            self.world_size == RECORD_GPUS
            and RECORD_GPU_NAME in self.hardware
            and self.budget_s == 600
            and self.is_published_data
            and self.starts == 1
            and self.resumed is None
            and None not in (self.seed, self.stop_ms, self.pre, self.quantized, self.ttt, self.total_bytes)
        )

    @property
    def resumed(self) -> str | None:
        """The setting that made the run go on from an earlier one."""
        return next(
            (name for name in ("quantize_only", "ttt_eval_only") if self.settings.get(name) == "1"), None
        )

    @property
    def train_clock_ms(self) -> float | None:
        """Steps plus calibration: the log's own figure, or the sum of what it says."""
        if self.clock_ms is not None or self.stop_ms is None:
            return self.clock_ms
        return self.stop_ms + 1000 * (self.calibration_s or 0)

    @property
    def eval_ms(self) -> float | None:
        return self.ttt.ms if self.ttt else None

    @property
    def tok_per_s(self) -> tuple[float | None, float | None]:
        """Training speed with loops off and on: the log's own figures, else from its progress lines."""
        names = ("loops_off_tok_per_s", "loops_on_tok_per_s")
        if any(name in self.speed for name in names):
            return tuple(number(self.speed[name]) if name in self.speed else None for name in names)
        before = [p for p in self.curve if self.loop_step is None or p.step <= self.loop_step]
        if not before or not self.tokens_at(1) > 0:
            return None, None
        off = before[-1].tok_per_s
        after = [p for p in self.curve if self.loop_step is not None and p.step > self.loop_step]
        if not after:
            return off, None
        switch, end = self.tokens_at(self.loop_step), self.tokens_at(after[-1].step)
        seconds = end / after[-1].tok_per_s - switch / off
        return off, (end - switch) / seconds if seconds > 0 else None

    def stages(self) -> list[tuple[str, float]]:
        """(stage, seconds) in order, for every stage the log times; compilation is a stage of its own."""
        seconds = (
            self.warmup_s,
            self.stop_ms and self.stop_ms / 1000,
            self.calibration_s,
            self.pre and self.pre.ms / 1000,
            self.quantize_s,
            self.load_s,
            self.compile_s.get("diagnostic"),
            self.quantized and self.quantized.ms / 1000,
            self.compile_s.get("ttt"),
            self.ttt and self.ttt.ms / 1000,
        )
        return [(name, value) for name, value in zip(STAGES, seconds) if value is not None and value >= 0]


def parse_line(line: str) -> tuple[str, dict[str, str]]:
    """(event, fields) of one log line; the event is what stands before the first field."""
    fields = {m[1]: m[2].strip('"') for m in PAIR.finditer(line)}
    first = PAIR.search(line)
    return (line[: first.start()] if first else line).strip(), fields


def number(text: str) -> float:
    """The leading number of a value with a unit: "596047ms" is 596047; nan and inf are numbers too."""
    match = re.match(r"[-+]?(nan|inf|\d[\d,]*\.?\d*(e[+-]?\d+)?|\.\d+)", text, re.I)
    if match is None:
        raise ValueError(f"expected a number, found {text!r}")
    return float(match[0].replace(",", ""))


def count(text: str) -> int:
    value = number(text)
    if value != value or math.isinf(value):
        raise ValueError(f"expected a count, found {text!r}")
    return int(value)


def measure(place: str, text: str) -> tuple[float, float]:
    """The number at a place and half a unit of its last digit; times, known by their unit or name, in ms."""
    match = re.match(r"[-+]?\d+(?:\.(\d+))?(ms|s)?", text)
    if match is None:
        return math.nan, math.nan
    is_in_s = match[2] == "s" or not match[2] and place.endswith(("_s", "_seconds")) and not place.endswith("_per_s")
    unit = 1000 if is_in_s else 1
    return number(text) * unit, 0.5 * 10.0 ** -len(match[1] or "") * unit


def _value(fields: dict[str, str], name: str) -> float:
    return measure(name, fields.get(name, ""))[0]


@functools.cache
def default_settings() -> dict[str, str]:
    """Every setting's default as logs show it, read from the text of train_gpt.py, which is not run."""
    tree = ast.parse((Path(__file__).parent / "train_gpt.py").read_text(encoding="utf-8"))
    (config,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    defaults = {}
    for node in config.body:
        if isinstance(node, ast.AnnAssign):
            value = ast.literal_eval(node.value.args[0])
            defaults[node.target.id] = str(int(value) if isinstance(value, bool) else value)
    for name in ("data_path", "tokenizer_path", "checkpoint_dir"):
        defaults[name] = "/".join(Path(defaults[name]).parts[-2:])
    return defaults


def read_runs(path: Path) -> list[Run]:
    """Every start in a log file, in order. Raises LogError naming the file if it holds none or is damaged."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise WrongFile(
            f"{path}: expected a log file, found {error.strerror.lower()}; correct the path"
        ) from error
    runs: list[Run] = []
    in_settings = False
    for line_number, line in enumerate(SOURCE.sub("", text).splitlines(), 1):
        setting = SETTING.fullmatch(line)
        if setting and not in_settings:
            runs.append(Run(path.stem, path))
            in_settings = True
        if setting and in_settings:
            runs[-1].settings[setting[1]] = setting[2].strip()
            continue
        in_settings = False
        if runs:
            try:
                _read_line(runs[-1], line)
            except (KeyError, ValueError, IndexError) as error:
                raise LogError(
                    f"{path}: line {line_number} without its source text: expected a complete line of a "
                    f"log, found {line[:80]!r} ({error}); logs are kept as they were written, restore it or "
                    "remove it"
                ) from error
    if not runs or not any(run.settings.get("seed") or run.val_tokens for run in runs):
        raise NotALog(
            f"{path}: expected a log of train_gpt.py with its settings, found none; pass a log file"
        )
    for start, run in enumerate(runs, 1):
        run.starts = len(runs)
        if len(runs) > 1:
            run.name = f"{path.stem}#{start}"
    return runs


def _diagnostic(fields: dict[str, str]) -> Diagnostic:
    return Diagnostic(
        float(fields["val_loss"]),
        float(fields["val_bpb"]),
        number(fields["eval_time"]),
        count(fields["targets"]) if "targets" in fields else None,
        count(fields["bytes"]) if "bytes" in fields else None,
    )


def _milliseconds(fields: dict[str, str], name: str) -> float | None:
    """A duration by name, in milliseconds: unrounded NAME_ms where the line has it, else NAME_s."""
    if f"{name}_ms" in fields:
        return number(fields[f"{name}_ms"])
    return 1000 * number(fields[f"{name}_s"]) if f"{name}_s" in fields else None


def _read_line(run: Run, line: str) -> None:
    event, fields = parse_line(line)
    for name in ("commit", "code_sha256", "code_hash", "command"):
        if name in fields:
            run.identity[name] = fields[name]
    if " warning" in f" {event}" or " warning " in f" {line} " or "warning" in fields:
        run.warnings.append(line.strip())
    for name, pattern in LINES.items():
        if match := re.match(pattern, line):
            run.lines.setdefault(name, []).append(fields | match.groupdict())
    if event == "versions":
        run.versions = fields
    elif event == "run":
        run.identity |= fields
    elif line.startswith("train_shards:"):
        run.train_shards = count(fields["train_shards"])
    elif line.startswith("val_tokens:"):
        run.val_tokens = count(fields["val_tokens"])
    elif line.startswith("model_params:"):
        run.params = count(fields["model_params"])
    elif line.startswith("gptq:reserving"):
        run.reserve_s, run.effective_ms = number(line.split()[1]), number(fields["effective"])
    elif event in ("warmup", "warmup done"):
        run.warmup_s = number(fields["elapsed_s"])
    elif re.match(r"\d+/\d+ train_loss:", line):
        run.curve.append(
            Point(
                count(line.split("/")[0]),
                float(fields["train_loss"]),
                number(fields["train_time"]),
                number(fields["tok/s"]),
            )
        )
    elif line.startswith("rows:") and fields["rows"] in STEPS_OF_ROW:
        run.row_parts.append((count(fields["step"]), STEPS_OF_ROW[fields["rows"]]))
    elif line.startswith("layer_loop:enabled"):
        run.loop_step, run.loop_progress = count(fields["step"]), number(fields["frac"])
    elif line.startswith("stopping_early:"):
        run.stop_ms, run.steps = number(fields["train_time"]), count(fields["step"].split("/")[0])
    elif event == "train speed":
        run.speed, run.steps = fields, count(fields["steps"])
    elif event == "train" and {"clock_s", "clock_ms"} & fields.keys():
        run.clock_ms, steps_ms = _milliseconds(fields, "clock"), _milliseconds(fields, "steps")
        run.stop_ms = run.stop_ms if run.stop_ms is not None else steps_ms
        if "calibration_ms" in fields:
            run.calibration_s = number(fields["calibration_ms"]) / 1000
    elif event == "peak memory" or line.startswith("peak memory"):
        run.peak_mib = count(fields["allocated"])
    elif event == "eval" and "compile_ms" in fields:
        run.compile_s["ttt"], run.load_s = number(fields["compile_ms"]) / 1000, number(fields["load_ms"]) / 1000
    elif event == "diagnostic pre-quantization post-ema":
        run.pre = _diagnostic(fields)
    elif event == "diagnostic quantized":
        run.quantized = _diagnostic(fields)
    elif match := re.match(r"(diagnostic compile|ttt_lora:compile warmup) done \(([\d.]+)s\)", line):
        key = match[1].split("_")[0].split()[0]
        run.compile_s[key] = run.compile_s.get(key, 0.0) + float(match[2])
    elif match := re.match(r"GPTQ:collected \d+ Hessians in ([\d.]+)s", line):
        run.calibration_s = float(match[1])
    elif match := re.match(r"Code size \((\w+)\): (\d+) bytes", line):
        if match[1] == "compressed":
            run.code_bytes = int(match[2])
        else:
            run.source_bytes = int(match[2])
    elif match := re.match(r"Serialized model quantized\S*: (\d+) bytes", line):
        run.model_bytes = int(match[1])
    elif match := re.match(r"Total submission size quantized\S*: (\d+) bytes", line):
        run.total_bytes = int(match[1])
    elif "tok_emb_bytes" in fields:
        run.groups = {
            name.removesuffix("_bytes"): count(value)
            for name, value in fields.items()
            if name.endswith("_bytes") and name not in ("model_bytes", "room_bytes")
        }
        if "elapsed_s" in fields:
            run.quantize_s = (run.quantize_s or 0.0) + number(fields["elapsed_s"])
    elif match := re.match(r"pergroup:(\w+)(?: \w+)? \d+ raw \S+ (\d+)", line):
        run.groups[match[1]] = int(match[2])
    elif match := re.match(r"Serialize: .*compression done in ([\d.]+)s", line):
        run.quantize_s = float(match[1])
    elif match := re.match(r"Deserialize: decompression done in ([\d.]+)s", line):
        run.load_s = (run.load_s or 0.0) + float(match[1])
    elif event == "artifact" and {"load_s", "load_ms"} & fields.keys():
        run.load_s = _milliseconds(fields, "load") / 1000
    elif line.startswith("ngram_tilt:hints"):
        run.hints = {name: count(fields[name]) for name in ("total", "gated")}
    elif line.startswith("ngram_tilt:precompute_done"):
        run.hints_s = number(fields["elapsed"])
    elif line.startswith("ttt_phased:"):
        _, fields = parse_line(line.removeprefix("ttt_phased:"))
        run.phased = {name: count(fields[name]) for name in ("total_docs", "prefix_docs", "suffix_docs")}
        run.boundaries = [int(text) for text in re.findall(r"\d+", fields.get("boundaries", ""))]
    elif event == "ttt" and "peak_allocated_mib" in fields:
        run.eval_peak_mib = count(fields["peak_allocated_mib"])
    elif event == "ttt" and "batch" in fields:
        done, total = fields["batch"].split("/")
        run.batches.append(
            Batch(count(done), count(total), float(fields["bpb"]), fields.get("phase", ""), None)
        )
    elif match := re.match(r"ttp: b(\d+)/(\d+) .* rb:(\S+) dl:\S+ gd:(\d+)", line):
        run.batches.append(Batch(int(match[1]), int(match[2]), float(match[3]), match[4], int(match[4])))
    elif line.startswith("ttpp:"):
        run.adapted.add(count(fields["gd"]))
    elif event == "ttt adapted_base":
        run.adapted.add(count(fields["documents"]))
    elif event == "quantized_ttt_phased":
        run.ttt, run.finals = _diagnostic(fields), run.finals + 1
    elif line.startswith("total_eval_time:"):
        run.total_eval_s = number(fields["total_eval_time"])


# --- checks -------------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """One thing that is wrong ("error") or only under the harshest reading ("warning")."""

    level: str
    run: str  # "all runs" when it concerns their comparison
    rule: str
    text: str

    def __str__(self) -> str:
        return f"{self.level}: {self.run}: {self.rule}: {self.text}"


def check(runs: Sequence[Run]) -> list[Finding]:
    """Everything that is false or against the rules in these runs, errors first."""
    findings = [finding for run in runs for finding in _check_run(run)] + list(_check_together(runs))
    return sorted(findings, key=lambda finding: finding.level != "error")


def _check_run(run: Run) -> Iterator[Finding]:
    parts = (_check_whole, _check_finite, _check_header, _check_totals, _check_limits, _check_source)
    for part in (*parts, _check_lines, _check_command, _check_stated_twice, _check_sums, _check_batches):
        for level, rule, text in part(run):
            yield Finding(level, run.name, rule, text)


def _check_whole(run: Run) -> Iterator[tuple[str, str, str]]:
    rule = "one uninterrupted run"
    if run.starts > 1:
        yield (
            "error",
            rule,
            f"{run.path.name} holds {run.starts} starts, expected one; submit a log of one whole run",
        )
    if run.resumed:
        yield (
            "error",
            rule,
            (
                f"{run.resumed.upper()}=1: the run went on from an earlier one, so its clocks do not show "
                "the whole; run again from the start"
            ),
        )
    missing = [
        name
        for name, value in (
            ("training stop", run.stop_ms),
            ("diagnostic before quantization", run.pre),
            ("diagnostic after quantization", run.quantized),
            ("final score", run.ttt),
            ("total_eval_time", run.total_eval_s),
            ("artifact size", run.model_bytes),
            ("code size", run.code_bytes),
            ("total size", run.total_bytes),
            ("val_tokens", run.val_tokens),
            ("train_shards", run.train_shards),
            ("seed", run.seed),
            ("max_wallclock_seconds", run.budget_s),
            ("the number of processes", run.world_size),
        )
        if value is None
    ]
    if missing and not (run.resumed and missing == ["training stop"]):
        yield "error", "complete log", f"no line says {', '.join(missing)}; the run did not reach its end"
    if run.finals > 1:
        yield "error", rule, f"{run.finals} final score lines in one start, expected one"
    steps = [point.step for point in run.curve]
    if any(after <= before for before, after in zip(steps, steps[1:])):
        yield (
            "error",
            rule,
            "training steps do not increase from line to line; lines were added or two runs mixed",
        )
    minutes = [point.minutes for point in run.curve]
    if any(after < before for before, after in zip(minutes, minutes[1:])):
        yield "error", rule, "training time falls from one line to the next"
    if run.curve and run.steps is not None and run.curve[-1].step > run.steps:
        yield (
            "error",
            rule,
            f"progress reached step {run.curve[-1].step}, yet training stopped at step {run.steps}",
        )


def _check_finite(run: Run) -> Iterator[tuple[str, str, str]]:
    scores = {"before quantization": run.pre, "after quantization": run.quantized, "final score": run.ttt}
    values = {
        f"{name} {key}": getattr(score, key)
        for name, score in scores.items()
        if score
        for key in ("loss", "bpb", "ms")
    }
    values |= {f"train_loss at step {point.step}": point.loss for point in run.curve}
    values |= {f"tok/s at step {point.step}": point.tok_per_s for point in run.curve}
    values |= {f"running bpb of batch {batch.number}": batch.bpb for batch in run.batches}
    wrong = [
        f"{name} is {value}" for name, value in values.items() if not (math.isfinite(value) and value > 0)
    ]
    if wrong:
        yield (
            "error",
            "finite values",
            f"{wrong[0]}, expected a positive number"
            + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""),
        )


def _check_header(run: Run) -> Iterator[tuple[str, str, str]]:
    """What the settings say against what the body says."""
    rule, settings = "header against body", run.settings
    if run.reserve_s is not None and "gptq_reserve_seconds" in settings:
        said = run.setting("gptq_reserve_seconds")
        if f"{said:.0f}" != f"{run.reserve_s:.0f}" and abs(said - run.reserve_s) > 1e-6:
            yield (
                "error",
                rule,
                f"the header reserves {said:g} s for calibration, the body {run.reserve_s:g} s",
            )
        if run.budget_s and abs(1000 * (run.budget_s - said) - run.effective_ms) > 1:
            yield (
                "error",
                rule,
                (
                    f"{run.budget_s:g} s less {said:g} s of reserve leave {1000 * (run.budget_s - said):,.0f} "
                    f"ms of training, the body says {run.effective_ms:,.0f} ms"
                ),
            )
    if run.phased and "phased_ttt_prefix_docs" in settings:
        total = run.phased["total_docs"]
        said = min(run.setting("phased_ttt_prefix_docs"), total)
        wrong = sorted({run.phased["prefix_docs"], *run.boundaries, *run.adapted} - {said})
        if wrong:
            yield (
                "error",
                rule,
                (
                    f"the header adapts the base on {said:,.0f} documents, the body on "
                    f"{', '.join(f'{n:,}' for n in wrong)} (prefix_docs, boundaries or gd)"
                ),
            )
        if run.phased["prefix_docs"] + run.phased["suffix_docs"] != total:
            yield "error", rule, f"prefix and suffix documents do not add up to total_docs:{total}"
    if run.loop_progress is not None and "enable_looping_at" in settings:
        said = run.setting("enable_looping_at")
        step = 2 / run.steps if run.steps else 0.05             # the switch waits for the next step
        if not said - 6e-4 <= run.loop_progress <= said + max(0.05, step):
            yield (
                "error",
                rule,
                f"looping was to begin at {said:g} of the budget, the body says {run.loop_progress:g}",
            )
    if run.stop_ms is not None and run.effective_ms is not None:
        steps_ms = [measure(name, value)[0] for name, value in run.speed.items() if name.endswith("_step_ms")]
        longest_ms = max(steps_ms, default=4 * run.stop_ms / run.steps if run.steps else 0.0)
        if run.stop_ms > run.effective_ms + max(2000, longest_ms):
            yield (
                "error",
                rule,
                (
                    f"training stopped at {run.stop_ms:,.0f} ms, expected at most a step after "
                    f"{run.effective_ms:,.0f} ms"
                ),
            )
    for point in run.curve:
        minutes = run.tokens_at(point.step) / point.tok_per_s / 60 if point.tok_per_s else math.nan
        if abs(minutes - point.minutes) > 0.06 + 1e-3 * minutes:
            yield (
                "error",
                rule,
                (
                    f"step {point.step}: {point.tok_per_s:,.0f} tokens/s make {minutes:.2f} minutes, the "
                    f"line says {point.minutes:g}"
                ),
            )
            break
    if run.stop_ms and run.steps and run.curve:
        last = run.curve[-1]
        seconds = run.tokens_at(last.step) / last.tok_per_s if last.tok_per_s else math.nan
        if seconds > run.stop_ms / 1000 + 0.5:
            yield (
                "error",
                rule,
                (
                    f"step {last.step} was reached after {seconds:.1f} s, yet training of {run.steps} steps "
                    f"stopped after {run.stop_ms / 1000:.1f} s"
                ),
            )


def _check_totals(run: Run) -> Iterator[tuple[str, str, str]]:
    """Losses, tokens and bytes must fit each other and the data."""
    scores = {"before quantization": run.pre, "after quantization": run.quantized, "final": run.ttt}
    scores = {
        name: s
        for name, s in scores.items()
        if s and math.isfinite(s.loss + s.bpb) and s.bpb > 0 and s.loss > 0
    }
    rule = "val_loss against val_bpb"
    ratios = {name: s.loss / s.bpb / math.log(2) for name, s in scores.items()}  # bytes per target
    tolerances = {name: ratios[name] * (1e-8 / s.loss + 1e-8 / s.bpb) for name, s in scores.items()}
    for name, s in scores.items():
        if s.targets and s.bytes and abs(ratios[name] - s.bytes / s.targets) > tolerances[name]:
            yield (
                "error",
                rule,
                (
                    f"{name}: loss and BPB make {ratios[name]:.6f} bytes per target, the line's totals "
                    f"{s.bytes / s.targets:.6f}"
                ),
            )
        elif s.targets is None and run.is_published_data:
            full = PUBLISHED_BYTES / PUBLISHED_TARGETS[0]
            allowed = [full] if name == "final" else [full, TRUNCATED_BYTES_PER_TARGET]
            if min(abs(ratios[name] - value) for value in allowed) > 2e-6:
                yield (
                    "error",
                    rule,
                    (
                        f"{name}: loss / BPB is {ratios[name] * math.log(2):.6f}, on the published split "
                        f"{' or '.join(f'{value * math.log(2):.6f}' for value in allowed)}"
                    ),
                )
    if {"before quantization", "after quantization"} <= ratios.keys():
        before, after = ratios["before quantization"], ratios["after quantization"]
        if abs(before - after) > tolerances["before quantization"] + tolerances["after quantization"]:
            yield (
                "error",
                rule,
                (
                    f"loss / BPB is {before * math.log(2):.6f} before and {after * math.log(2):.6f} after "
                    "quantization; both score the same tokens"
                ),
            )
    rule = "totals"
    if run.is_ours and (silent := [name for name, s in scores.items() if not (s.targets and s.bytes)]):
        yield "error", rule, f"no totals in the score line: {', '.join(silent)}; lines were cut"
    said = {name: (s.targets, s.bytes) for name, s in scores.items() if s.targets and s.bytes}
    if len(set(said.values())) > 1:
        yield "error", rule, f"evaluations scored different totals (targets, bytes): {said}"
    for name, (targets, num_bytes) in said.items():
        if run.val_tokens is not None and run.is_ours and targets != run.val_tokens - 1:
            yield (
                "error",
                rule,
                f"{name}: {targets:,} targets of {run.val_tokens:,} validation tokens, expected all but one",
            )
        if run.is_published_data and not run.merges:
            expected = PUBLISHED_BYTES + BYTES_PER_LATER_TARGET * (targets - PUBLISHED_TARGETS[0])
            later = max(0, targets - PUBLISHED_TARGETS[0])
            if abs(num_bytes - expected) > BYTES_TOLERANCE + LATER_TARGETS_SPREAD * later:
                yield (
                    "error",
                    rule,
                    (
                        f"{name}: {num_bytes:,} bytes for {targets:,} targets, the published split has about "
                        f"{expected:,.0f}; the byte sidecar is not the published one"
                    ),
                )
    if run.hints and run.ttt:
        expected = run.ttt.targets or run.val_tokens
        if expected and run.hints["total"] != expected:
            yield (
                "error",
                rule,
                f"hints were made for {run.hints['total']:,} targets, {expected:,} were scored",
            )
    if None not in (run.code_bytes, run.model_bytes, run.total_bytes):
        if run.code_bytes + run.model_bytes != run.total_bytes:
            yield (
                "error",
                "sizes",
                (
                    f"code {run.code_bytes:,} and model {run.model_bytes:,} bytes make "
                    f"{run.code_bytes + run.model_bytes:,}, the log says {run.total_bytes:,}"
                ),
            )
    if run.ttt and run.total_eval_s is not None and abs(run.ttt.ms / 1000 - run.total_eval_s) > 0.051:
        yield "error", "clocks", f"eval_time is {run.ttt.ms:,.0f} ms, total_eval_time {run.total_eval_s:g} s"
    if run.clock_ms is not None and run.stop_ms is not None and run.calibration_s is not None:
        if abs(run.stop_ms + 1000 * run.calibration_s - run.clock_ms) > 200:
            yield (
                "error",
                "clocks",
                (
                    f"steps {run.stop_ms:,.0f} ms and calibration {run.calibration_s:g} s do not make a "
                    f"train clock of {run.clock_ms:,.0f} ms"
                ),
            )
    if run.batches and run.ttt and run.ttt.bpb > 0:
        last = run.batches[-1].bpb
        if run.is_ours and run.world_size == 1 and abs(last - run.ttt.bpb) > 2e-6:
            yield (
                "error",
                "running score",
                f"the last batch left {last:.6f} BPB, the final line says {run.ttt.bpb:.6f}",
            )
        elif abs(last / run.ttt.bpb - 1) > 0.03:
            yield (
                "warning",
                "running score",
                (
                    f"the first rank ended at {last:.4f} BPB, all ranks at {run.ttt.bpb:.4f}; "
                    "that is far apart for documents dealt evenly"
                ),
            )


def _check_limits(run: Run) -> Iterator[tuple[str, str, str]]:
    """Unrounded: 600,400 ms is over 600 s."""
    rule = "600 s of training"
    eval_ms = max(run.eval_ms or 0, run.said("eval.eval_ms"))  # of the slowest rank; the first, where that is NaN
    clocks_ms = {"train": run.train_clock_ms or 0, "eval": eval_ms}
    if run.stop_ms is not None:
        if run.stop_ms > CLOCK_LIMIT_MS:
            yield "error", rule, f"optimizer steps took {run.stop_ms:,.0f} ms"
        elif run.train_clock_ms > CLOCK_LIMIT_MS:
            yield (
                "warning",
                rule,
                (
                    f"steps and calibration took {run.train_clock_ms:,.0f} ms; the steps alone "
                    f"{run.stop_ms:,.0f} ms"
                ),
            )
    if run.eval_ms is not None:
        rule = "600 s of evaluation"
        outside = 1000 * (run.compile_s.get("ttt", 0) + (run.load_s or 0))
        if eval_ms > CLOCK_LIMIT_MS:
            yield "error", rule, f"evaluation took {eval_ms:,.0f} ms"
        elif eval_ms + outside > CLOCK_LIMIT_MS:
            yield (
                "warning",
                rule,
                (
                    f"evaluation took {eval_ms:,.0f} ms, and {eval_ms + outside:,.0f} ms with "
                    "loading and compilation, which are outside its clock"
                ),
            )
    if run.total_bytes is not None:
        if max(run.total_bytes, (run.code_bytes or 0) + (run.model_bytes or 0)) > SIZE_LIMIT:
            yield "error", "16,000,000 bytes", f"code and model hold {run.total_bytes:,} bytes"
        if run.total_bytes <= SIZE_LIMIT and any("over_limit" in line for line in run.warnings):
            yield "error", "sizes", f"{run.total_bytes:,} bytes, yet the run warned of more than its limit"
    rule = "the run's own warning"
    for line in run.warnings:
        is_said_above = "over_budget" in line and clocks_ms.get(line.split()[0], 0) > CLOCK_LIMIT_MS
        if not (is_said_above or "over_limit" in line):
            yield "warning", rule, line
    for fields in run.lines.get("adaptation_stopped", []):
        yield "warning", rule, f"test-time training stopped learning after {fields.get('chunks_learnt')} chunks"
    if after := run.settings.get("ttt_stop_after"):
        yield "warning", rule, f"TTT_STOP_AFTER={after}: test-time training was told where to stop learning"


def _check_source(run: Run) -> Iterator[tuple[str, str, str]]:
    source = run.identity.get("data_source")
    if source == "unverified" or run.is_ours and source is None:
        yield (
            "error",
            "known data",
            f"data_source:{source}; run on data with a manifest or on the published export",
        )
    elif not run.is_published_data:
        yield (
            "warning",
            "known data",
            (
                f"{run.val_tokens or 0:,} validation tokens are not the published FineWeb split; "
                "BPB compares only with runs on the same data"
            ),
        )
    if run.identity.get("commit", "").endswith("+dirty"):
        yield (
            "warning",
            "known code",
            f"commit {run.identity['commit']}: the code had changes that are not committed",
        )
    if run.train_shards is not None and run.is_published_data:
        if run.train_shards > PUBLISHED_SHARDS or run.train_shards < 1:
            yield (
                "error",
                "training shards",
                f"{run.train_shards} shards, the published export has {PUBLISHED_SHARDS}",
            )
        elif run.train_shards < PUBLISHED_SHARDS:
            yield (
                "warning",
                "training shards",
                f"{run.train_shards} of the {PUBLISHED_SHARDS} published shards",
            )
    if run.is_ours and (run.world_size != RECORD_GPUS or RECORD_GPU_NAME not in run.hardware):
        yield "warning", "record machine", f"ran on {run.hardware}; the record machine is 8x H100"


def _lines_of_a_whole_run(run: Run) -> Iterator[str]:
    """Names of the lines that a whole run of the present form leaves."""
    yield from ("versions", "run", "command", "code", "train_shards", "val_tokens", "model_params", "warmup")
    yield from ("progress", "speed", "checkpoint", "calibration", "clock", "pre", "code_form", "code_size")
    yield from ("attempt", "artifact", "model_size", "total_size", "load", "quantized", "compile", "phased")
    yield from ("plan", "batch", "final", "total_eval", "eval")
    is_short_of_looping = any("looping never began" in line for line in run.warnings)
    is_stopped = "adaptation_stopped" in run.lines or run.settings.get("ttt_stop_after")
    conditions = {
        "reserve": run.setting("max_wallclock_seconds") > 0,
        "stop": run.steps != run.setting("iterations"),
        "layer_loop": run.setting("num_loops") > 0 and not is_short_of_looping,
        "hints": run.setting("ngram_tilt_enabled") > 0,
        "hints_made": run.setting("ngram_tilt_enabled") > 0,
        "audit": run.setting("audit") > 0,
        "adapted": 0 < run.phased.get("prefix_docs", 0) < run.phased.get("total_docs", 0) and not is_stopped,
        "barrier": (run.world_size or 1) > 1,
    }
    yield from (name for name, is_due in conditions.items() if is_due)


def _check_lines(run: Run) -> Iterator[tuple[str, str, str]]:
    """Every line once, in whole runs of the present form none missing, and as many ranks as are said."""
    for name, lines in run.lines.items():
        if name not in REPEATED and len(lines) > 1:
            yield "error", "one uninterrupted run", f"{len(lines)} lines say {name} in one start, expected one"
    for fields in run.lines.get("barrier", []):
        if (ranks := fields.get("waits_ms", "").count(",") + 1) != run.world_size:
            yield "error", "number of processes", f"world_size:{run.world_size}, yet {ranks} waited at a barrier"
            break
    if not run.is_present_form or run.resumed or run.ttt is None or run.stop_ms is None:
        return
    missing = [name for name in _lines_of_a_whole_run(run) if name not in run.lines]
    places = dict.fromkeys(place for pair in STATED_TWICE + OF_SLOWEST_RANK for place in pair if "." in str(place))
    missing += [place for place in places if place.split(".")[0] in run.lines and math.isnan(run.said(place))]
    logged = {step for step in range(1, (run.steps or 0) + 1)
              if step <= 5 or step % (10 if step <= 100 else 50) == 0 or step == run.setting("iterations")}
    if cut := logged - {point.step for point in run.curve}:
        missing.append(f"step {min(cut)}" + f" and {len(cut) - 1} more" * (len(cut) > 1))
    if missing:
        yield "error", "complete log", f"lines or values are missing: {', '.join(missing)}; logs are kept whole"


def _check_command(run: Run) -> Iterator[tuple[str, str, str]]:
    """The command names every setting that has not its default."""
    rule, command = "settings against command", run.text("command.command")
    if command is None:
        return
    try:
        words = shlex.split(command)
    except ValueError as error:
        yield "error", rule, f"the line `run command` cannot be read: {error}"
        return
    named = dict(word.split("=", 1) for word in words if re.match(r"[A-Z][A-Z0-9_]*=", word))
    expected = default_settings() | {name.lower(): value for name, value in named.items()}
    missing = sorted(expected.keys() - run.settings.keys() - (LATER_SETTINGS - {name.lower() for name in named}))
    if missing:
        yield "error", rule, f"the header lacks {', '.join(missing)}"
    for name, value in expected.items():
        if (told := run.settings.get(name, value)) != value.strip():
            source = "the command" if name.upper() in named else "the default, which the command leaves,"
            yield "error", rule, f"the header says {name} is {told or '(empty)'}, {source} {value or '(empty)'}"


def _check_stated_twice(run: Run) -> Iterator[tuple[str, str, str]]:
    pairs = [(rule, one, other, 0.0) for rule, one, other in STATED_TWICE]
    pairs += [("clocks", one, other, more if run.world_size != 1 else 0) for one, other, more in OF_SLOWEST_RANK]
    for rule, one, other, more in pairs:
        (first, half), (second, other_half) = (measure(place, run.text(place) or "") for place in (one, other))
        tolerance = 1e-6 + (half + other_half if half != other_half else 0)  # one number, rounded alike, is equal
        if first - second > tolerance or second - first > tolerance + more:
            yield "error", rule, f"{one} is {run.text(one)}, {other} {run.text(other)}"
    run_id = run.identity.get("run_id", "")
    told = {"settings.run_id": run.settings.get("run_id") or run_id}
    told |= {place: text for place, _ in NAMED_FILES if (text := run.text(place)) is not None}
    for place, form in (("settings.run_id", "{}"), *NAMED_FILES):
        if place in told and told[place] != form.format(run_id):
            yield "error", "one name", f"the run is {run_id}, {place} {told[place]}"


def _check_sums(run: Run) -> Iterator[tuple[str, str, str]]:
    """What the values of several lines make together."""
    if not run.is_present_form:
        return
    for rule, name, told, made, tolerance in _sums(run):
        if abs(told - made) > tolerance:
            yield "error", rule, f"{name} {told:,.10g}, the log's other lines make {made:,.10g}"
    attempts = run.lines.get("attempt", [])
    if [fields.get("attempt") for fields in attempts] != [str(n + 1) for n in range(len(attempts))]:
        yield "error", "sizes", "the artifact's attempts are not numbered from 1 without a gap"
    if attempts and run.model_bytes not in {_value(fields, "model_bytes") for fields in attempts}:
        yield "error", "sizes", f"no attempt gave the model's {run.model_bytes or 0:,} bytes"
    if (form := run.text("code_form.code_form")) and form not in CODE_FORMS:
        yield "error", "sizes", f"code_form:{form}, expected one of {', '.join(CODE_FORMS)}"


def _sums(run: Run) -> Iterator[tuple[str, str, float, float, float]]:
    """(rule, name, the log's value, what other lines make of it, tolerance); NaN where one is not said."""
    said, none = run.said, math.nan
    yield "clocks", "clock.clock_ms", said("clock.clock_ms"), said("clock.steps_ms") + said("clock.calibration_ms"), 1.6
    parts_ms = said("eval.eval_ms") + said("eval.load_ms") + said("eval.compile_ms")
    yield "clocks", "eval.sum_ms", said("eval.sum_ms"), parts_ms, 2.1
    for name, took_ms, limit_s, scale in (
        ("train_excess.over_budget_ms", said("clock.clock_ms"), run.setting("max_wallclock_seconds"), 1.6),
        ("eval_excess.over_budget_s", said("final.eval_time"), run.setting("eval_wallclock_seconds"), 1.6),
    ):
        excess = max(0.0, took_ms - 1000 * limit_s) if limit_s > 0 and took_ms > 0 else none
        yield "clocks", name, said(name) if name.split(".")[0] in run.lines else 0.0, excess, scale

    steps, switch, stop_ms = run.steps or 0, run.loop_step, run.stop_ms or none
    switch = steps if switch is None else switch
    parts = {"loops_off": (0, switch), "loops_on": (switch, steps)}
    parts = {name: (since, until) for name, (since, until) in parts.items() if until > since}
    made_ms = sum((until - since) * said(f"speed.{name}_step_ms") for name, (since, until) in parts.items())
    yield "clocks", "stop.train_time", stop_ms, made_ms, 0.06 * steps + 1
    for name, (since, until) in parts.items():
        speed, step_ms = said(f"speed.{name}_tok_per_s"), said(f"speed.{name}_step_ms")
        tokens = (run.tokens_at(until) - run.tokens_at(since)) / (until - since)
        rounding = (0.06 / step_ms if step_ms else 0.0) + (0.6 / speed if speed else 0.0)
        yield "clocks", f"tokens of a step, {name}", speed * step_ms / 1000, tokens, tokens * rounding
    for point, fields in zip(run.curve, run.lines.get("progress", [])):
        told_ms = _value(fields, "train_time_ms")
        speed = point.tok_per_s or none
        made_ms, rounding = 1000 * run.tokens_at(point.step) / speed, 0.6 + 0.6 * told_ms / speed
        yield "clocks", f"train_time_ms of step {point.step}", told_ms, made_ms, rounding
        yield "clocks", f"train_time of step {point.step} in minutes", point.minutes, told_ms / 60000, 0.0501
        if told_ms > stop_ms + 1:
            yield "clocks", "stop.train_time", stop_ms, told_ms, 0.0

    header = MOST_HEADER_BYTES / 2
    yield "sizes", "checkpoint.num_bytes", said("checkpoint.num_bytes"), 4 * (run.params or none) + header, header
    for fields in run.lines.get("attempt", []):
        model, room = _value(fields, "model_bytes"), _value(fields, "room_bytes")
        groups = [_value(fields, name) for name in fields if name.endswith("_bytes")]
        yield "sizes", "attempt.model_bytes", model, sum(groups) - model - room + header, header
        yield "sizes", "attempt.room_bytes", room, SIZE_LIMIT - CODE_MARGIN - (run.code_bytes or none) - model, 0.0


def _check_batches(run: Run) -> Iterator[tuple[str, str, str]]:
    """The first rank logs every batch of its own, by phase; one process has them all."""
    lines = run.lines.get("batch", [])
    planned = [int(text) for text in re.findall(r"\d+", run.text("plan.batches") or "")]
    if not (run.is_present_form and run.ttt and lines and planned and run.phased):
        return
    rule, is_alone = "documents", run.world_size == 1
    for phase_number, num_batches in enumerate(planned, 1):
        phase = f"{phase_number}/{len(planned)}"
        mine = [fields for fields in lines if fields.get("phase") == phase]
        total = int(mine[0]["total"]) if mine else 0
        told = [(int(fields["number"]), int(fields["total"])) for fields in mine]
        if told != [(number, total) for number in range(1, total + 1)] or not told:
            yield "error", rule, f"phase {phase}: the batches are not numbered from 1 to their total"
        elif total > num_batches or is_alone and total < num_batches:
            yield "error", rule, f"phase {phase}: {total} batches, {num_batches} were planned"
    scored, total = sum(_value(fields, "documents") for fields in lines), run.phased["total_docs"]
    if not scored <= total or is_alone and scored != total:
        yield "error", rule, f"the batches hold {scored:,.0f} documents, total_docs is {total:,}"


def _check_together(runs: Sequence[Run]) -> Iterator[Finding]:
    """Runs of one submission differ in their seed only."""
    if len(runs) < 2:
        return
    names = sorted({name for run in runs for name in run.settings} - NAMING)
    for name in names:
        values = {run.name: run.settings.get(name, "(not set)") for run in runs}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{value or '(empty)'} in {run}" for run, value in values.items())
            yield Finding(
                "warning" if name in WATCHING else "error", "all runs", "same settings", f"{name} is {listed}"
            )
    seeds = [run.seed for run in runs]
    for seed in sorted({seed for seed in seeds if seeds.count(seed) > 1}, key=str):
        yield Finding(
            "error", "all runs", "one log per seed", f"seed {seed} occurs {seeds.count(seed)} times"
        )
    for label, get in (
        ("training progress", lambda r: r.curve),
        ("scores", lambda r: [r.pre, r.quantized, r.ttt] if r.ttt else []),
    ):
        for position, run in enumerate(runs):
            if twins := [other.name for other in runs[:position] if get(run) and get(other) == get(run)]:
                text = f"{run.name} and {twins[0]} have equal {label} to the last digit and millisecond"
                yield Finding("error", "all runs", "one log per run", f"{text}: one run under two names")
    for label, get in (
        ("world size", lambda r: r.world_size),
        ("device", lambda r: r.versions.get("device")),
        ("validation tokens", lambda r: r.val_tokens),
        ("training shards", lambda r: r.train_shards),
        ("parameters", lambda r: r.params),
    ):
        values = {run.name: get(run) for run in runs}
        if len(set(values.values())) > 1:
            yield Finding(
                "error", "all runs", f"same {label}", ", ".join(f"{v} in {run}" for run, v in values.items())
            )
    lists = {run.name: run.identity["merges_sha256"] for run in runs if "merges_sha256" in run.identity}
    if len(set(lists.values())) > 1:
        yield Finding(
            "error", "all runs", "same joined pairs", ", ".join(f"{v} in {run}" for run, v in lists.items())
        )
    code = {
        run.name: run.identity.get("code_sha256")
        or run.identity.get("code_hash")
        or (f"{run.source_bytes} bytes" if run.source_bytes else None)
        for run in runs
    }
    if len(set(code.values())) > 1:
        yield Finding(
            "warning",
            "all runs",
            "same code",
            ", ".join(f"{str(v)[:16]} in {run}" for run, v in code.items()),
        )
    gated = {run.hints["gated"] for run in runs if run.hints}
    if len(gated) > 1:
        yield Finding(
            "warning",
            "all runs",
            "same hints",
            f"hints depend on data and settings only, yet {sorted(gated)} targets had one",
        )
