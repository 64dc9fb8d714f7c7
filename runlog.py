"""Read the logs of this family of runs, and say what in them cannot be believed or breaks a rule.

Reads this project's logs and those of the public reference (openai/parameter-golf PR #2123/#2124 and relatives):
both keep the lines that people diff and grep. `read_runs` gives one Run for every start that a file holds;
`check` compares what the lines of a run, and the runs with each other, say about the same thing.
Plain Python, nothing to install.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

# The log grammar: an event in words (perhaps none), then key:value pairs. Settings have two leading blanks.
PAIR = re.compile(r'([^\s:=]+)[:=] ?("[^"]*"|\[[^\]]*\]|[^\s:]+)')
SETTING = re.compile(r"  ([a-z][a-z0-9_]*): ?(.*)")
SOURCE = re.compile(r"^source:\n.*?^source_end$\n?", re.M | re.S)  # older logs carry the script's text

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
    if " warning" in f" {event}" or " warning " in f" {line} ":
        run.warnings.append(line.strip())
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
    for part in (_check_whole, _check_finite, _check_header, _check_totals, _check_limits, _check_source):
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
        steps_ms = [number(value) for name, value in run.speed.items() if name.endswith("_step_ms")]
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
        if run.eval_ms > CLOCK_LIMIT_MS:
            yield "error", rule, f"evaluation took {run.eval_ms:,.0f} ms"
        elif run.eval_ms + outside > CLOCK_LIMIT_MS:
            yield (
                "warning",
                rule,
                (
                    f"evaluation took {run.eval_ms:,.0f} ms, and {run.eval_ms + outside:,.0f} ms with "
                    "loading and compilation, which are outside its clock"
                ),
            )
    if run.total_bytes is not None:
        if max(run.total_bytes, (run.code_bytes or 0) + (run.model_bytes or 0)) > SIZE_LIMIT:
            yield "error", "16,000,000 bytes", f"code and model hold {run.total_bytes:,} bytes"
    for line in run.warnings:
        if "over_budget" not in line and "over_limit" not in line:
            yield "warning", "the run's own warning", line


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
