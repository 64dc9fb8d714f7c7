#!/usr/bin/env python3
"""From logs to tables, pictures, submission.json, README and the pull request. Nobody types a number.

    python report.py                           rewrite README.md's marked parts and submission.json from logs/
    python report.py --check                   change nothing; exit code 1 when something is stale
    python report.py table LOG... [--against LOG...] [--json FILE]     table, means, differences, tests
    python report.py check LOG...              what is false or against the rules; exit code 1 on errors
    python report.py html LOG... --out FILE    one page with pictures; the PNG files go beside it
    python report.py pr LOG...                 the text of a pull request
    python report.py pack DIR LOG...           the whole submission folder
    python report.py watch LOG                 loss, speed and time left of a run that is going on

`table`, `check`, `pr` and the plain call need nothing beyond requirements.txt; p-values, pictures and `watch`
need requirements-report.txt. A marked part of README.md lies between `<!-- NAME -->` and `<!-- /NAME -->`.
Exit codes: 0 done, 1 a check or the work failed, 2 wrong usage, as when a LOG is not there or is no log.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import runlog
from runlog import LogError, Run

REPO = Path(__file__).resolve().parent
PUBLIC_LOGS = Path("tests/data")  # excerpts of the logs of others, for comparison
NAME = "One-file rewrite: looped two-lane transformer, GPTQ, score-first LoRA TTT with causal n-gram tilt"
PARENT = "PR #2124"
MISSING_EXTRAS = "python3 -m pip install -r requirements-report.txt"
RECORD_MARGIN_NATS, RECORD_P = 0.005, 0.01  # what the leaderboard asks of a new record


class ReportError(Exception):
    """A request that cannot be fulfilled, in one sentence."""

    exit_code = 1


class UsageError(ReportError):
    """What the command line names is wrong."""

    exit_code = 2


def read_all(paths: Sequence[Path]) -> list[Run]:
    """Every start in every file."""
    return [run for path in paths for run in runlog.read_runs(Path(path))]


def read_folder(folder: Path, pattern: str = "*.txt") -> list[Run]:
    """The runs of a folder that reached a score; files that are no logs are passed over, damaged ones refused."""
    runs = []
    for path in sorted(folder.glob(pattern)):
        try:
            runs += runlog.read_runs(path)
        except runlog.NotALog:
            continue
    return [run for run in runs if run.pre or run.quantized or run.ttt]


# --- tables -------------------------------------------------------------------------------------------------

# What the record table shows: heading, value of a run, and how it is printed.
COLUMNS: tuple[tuple[str, Callable[[Run], float | None], str], ...] = (
    ("steps", lambda r: r.steps, ",.0f"),
    ("train ms", lambda r: r.stop_ms, ",.0f"),
    ("BPB before quantization", lambda r: r.pre and r.pre.bpb, ".8f"),
    ("BPB after", lambda r: r.quantized and r.quantized.bpb, ".8f"),
    ("BPB with TTT", lambda r: r.ttt and r.ttt.bpb, ".8f"),
    ("loss with TTT", lambda r: r.ttt and r.ttt.loss, ".8f"),
    ("TTT eval s", lambda r: r.eval_ms and r.eval_ms / 1000, ",.1f"),
    ("code bytes", lambda r: r.code_bytes, ",.0f"),
    ("model bytes", lambda r: r.model_bytes, ",.0f"),
    ("total bytes", lambda r: r.total_bytes, ",.0f"),
)
LOWER_IS_BETTER = "BPB with TTT", "loss with TTT"


def show(value: float | None, form: str = ",", unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    )


def values_of(runs: Sequence[Run], get: Callable[[Run], float | None]) -> list[float]:
    return [value for run in runs if (value := get(run)) is not None]


def summarize(values: Sequence[float]) -> tuple[float | None, float | None]:
    """(mean, sample standard deviation); None where there are too few values."""
    return (
        statistics.fmean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
    )


def record_table(runs: Sequence[Run]) -> str:
    """One row per run, then mean and sample standard deviation of each column."""
    rows = [
        [
            f"`{run.name}`",
            str(run.seed if run.seed is not None else ""),
            *(show(get(run), form) for _, get, form in COLUMNS),
        ]
        for run in runs
    ]
    if len(runs) > 1:
        summaries = [(summarize(values_of(runs, get)), form) for _, get, form in COLUMNS]
        for label, which in (("**mean**", 0), ("standard deviation", 1)):
            rows.append(
                [
                    label,
                    f"n = {len(runs)}" if which == 0 else "",
                    *(
                        show(summary[which], ",.1f" if which and form == ",.0f" else form)
                        for summary, form in summaries
                    ),
                ]
            )
    return table(["log", "seed", *(name for name, _, _ in COLUMNS)], rows)


def welch(ours: Sequence[float], theirs: Sequence[float], margin: float = 0.0) -> tuple[float, float] | None:
    """(t, degrees of freedom) of mean(theirs) - margin - mean(ours), unequal variances; None below two values."""
    if len(ours) < 2 or len(theirs) < 2:
        return None
    a, b = statistics.variance(ours) / len(ours), statistics.variance(theirs) / len(theirs)
    gap = statistics.fmean(theirs) - margin - statistics.fmean(ours)
    if a + b == 0:
        return (math.copysign(math.inf, gap) if gap else 0.0), float(len(ours) + len(theirs) - 2)
    return gap / math.sqrt(a + b), (a + b) ** 2 / (a**2 / (len(ours) - 1) + b**2 / (len(theirs) - 1))


def p_better(ours: Sequence[float], theirs: Sequence[float], margin: float = 0.0) -> float | None:
    """One-sided p-value of "ours are lower by more than margin"; None without scipy or with too few runs."""
    statistic = welch(ours, theirs, margin)
    try:
        from scipy import stats
    except ImportError:
        return None
    return None if statistic is None else float(stats.t.sf(*statistic))


def incomparable(runs: Sequence[Run]) -> dict[str, str]:
    """Why scores of these runs do not compare, for the readings "per token" and "per byte"; empty where they do."""
    scored = [(run, score) for run in runs if (score := run.ttt or run.quantized or run.pre)]
    published = {run.is_published_data for run, _ in scored}
    totals = {score.bytes for _, score in scored if score.bytes}
    if len(published) > 1 or published == {False} and len(totals) > 1:
        return dict.fromkeys(("per token", "per byte"), "the runs scored other data")
    # The published split is scored with a few targets more or less; on other data every target counts.
    spread = runlog.PUBLISHED_TARGETS[1] - runlog.PUBLISHED_TARGETS[0] if published == {True} else 0
    targets = [score.targets for _, score in scored if score.targets]
    if len({run.merges for run, _ in scored}) > 1 or targets and max(targets) - min(targets) > spread:
        return {"per token": "a token is not the same text in all of them (merges, tokenizer)"}
    return {}


def compare(ours: Sequence[Run], theirs: Sequence[Run]) -> dict[str, dict[str, float | None]]:
    """Difference of the means (ours - theirs) and two-sided p-value of every column; None for scores that do not
    compare."""
    reasons, result = incomparable([*ours, *theirs]), {}
    for name, get, _ in COLUMNS:
        a, b = values_of(ours, get), values_of(theirs, get)
        reading = {"BPB": "per byte", "loss": "per token"}.get(name.split()[0])
        compares = a and b and reading not in reasons
        p = p_better(a, b) if compares else None
        result[name] = {
            "ours": summarize(a)[0],
            "theirs": summarize(b)[0],
            "difference": statistics.fmean(a) - statistics.fmean(b) if compares else None,
            "p": None if p is None else 2 * min(p, 1 - p),
        }
    return result


def record_rule(ours: Sequence[Run], theirs: Sequence[Run]) -> list[str]:
    """Whether the leaderboard's rule for a new record holds, in sentences, one for each reading of "nats"."""
    told, reasons = [], incomparable([*ours, *theirs])
    for reading, unit, get in (
        ("per token", "nats of val_loss", lambda r: r.ttt and r.ttt.loss),
        ("per byte", "nats of val_bpb times ln 2", lambda r: r.ttt and r.ttt.bpb * math.log(2)),
    ):
        a, b = values_of(ours, get), values_of(theirs, get)
        if not a or not b:
            told.append(f"Read {reading}: no final score on one side.")
            continue
        if reading in reasons:
            told.append(f"Read {reading}: not to be compared, {reasons[reading]}.")
            continue
        gain, p = statistics.fmean(b) - statistics.fmean(a), p_better(a, b, RECORD_MARGIN_NATS)
        holds = gain >= RECORD_MARGIN_NATS
        if p is not None:
            significance = f"p = {p:.2g} that the true gain is smaller (one-sided Welch)"
            holds = holds and p < RECORD_P
        else:
            significance = (
                "untested: needs two runs on each side"
                if min(len(a), len(b)) < 2
                else f"untested: scipy is missing, {MISSING_EXTRAS}"
            )
            holds = False
        told.append(
            f"Read {reading}: {'better' if gain > 0 else 'worse'} by {abs(gain):.5f} {unit}, asked are "
            f"{RECORD_MARGIN_NATS} at p < {RECORD_P}; {significance}. "
            f"The rule {'holds' if holds else 'does not hold'} in this reading."
        )
    return told


def comparison(ours: Sequence[Run], theirs: Sequence[Run]) -> str:
    rows = []
    for (name, numbers), (_, _, form) in zip(compare(ours, theirs).items(), COLUMNS):
        rows.append(
            [
                name,
                show(numbers["ours"], form),
                show(numbers["theirs"], form),
                show(numbers["difference"], "+" + form),
                show(numbers["p"], ".2g"),
            ]
        )
    notes = (
        []
        if p_better([1.0, 2.0], [1.0, 2.0]) is not None
        else [f"No p-values: scipy is missing, {MISSING_EXTRAS}"]
    )
    return "\n\n".join(
        [
            table(["mean of", "these runs", "against", "difference", "p (Welch, two-sided)"], rows),
            *notes,
            *record_rule(ours, theirs),
        ]
    )


# --- what a run was -----------------------------------------------------------------------------------------


def changed_settings(run: Run) -> list[str]:
    """NAME=value of every setting that differs from the record recipe and shapes the numbers."""
    import train_gpt as gpt

    changed = []
    for name, field in gpt.Config.__dataclass_fields__.items():
        told = run.settings.get(name)
        if told is None or name in runlog.NAMING:
            continue
        default = field.default
        if isinstance(default, bool):
            same = told in (str(default), str(int(default)))
        elif isinstance(default, (int, float)):
            same = run.setting(name) == default
        else:
            same = told == default
        if not same:
            told = {"True": "1", "False": "0"}.get(told, told)
            changed.append(f"{name.upper()}={told if isinstance(default, str) else told.removesuffix('.0')}")
    return changed


def technique(run: Run) -> str:
    """What the run is, in two sentences, from its settings; what a log does not say is the record's."""
    import train_gpt as gpt

    def setting(name: str) -> float:
        told = run.setting(name)
        return getattr(gpt.Config, name) if math.isnan(told) else told

    levers = loops = ""
    if run.loop_step is not None or not run.curve:
        loops = f"layers {setting('loop_start'):g} to {setting('loop_end'):g} run {setting('num_loops') + 1:g} times, "
    if run.merges:
        levers += f"{run.merges} frequent token pairs joined into ids that no text can give; "
    if run.setting("half_rows_until") > 0 or run.setting("quarter_rows_until") > 0:
        levers += "smaller steps at first; "
    if run.setting("rdo_lambda") > 0:
        levers += "trellis-coded rounding; "
    return (
        f"{setting('num_layers'):g} layers of width {setting('model_dim'):g}, {loops}two lanes from layer "
        f"{setting('parallel_start_layer'):g}, gated exclusive self attention; {levers}Muon and AdamW, averaged "
        f"weights; GPTQ at {setting('matrix_bits'):g} and {setting('embed_bits'):g} bits with protected columns and "
        "low-rank corrections; weights coded by a context-mixing arithmetic coder in the script; score-first "
        "test-time training of per-document adapters and one adaptation of the base on scored documents; exact "
        f"{setting('token_order') - 1:g}-token n-gram hints counted in the order of scoring."
    )


def data_of(run: Run) -> str:
    name = (
        "FineWeb, published split"
        if run.is_published_data
        else f"own text ({run.settings.get('data_path', 'unnamed').split('/')[-1] or 'unnamed'})"
    )
    joined = f", {run.merges} joined pairs" if run.merges else ""
    return f"{name}{joined}, {show(run.train_shards)} shards"


def fate_of(run: Run) -> str:
    """Why a complete run is none of its own, in few words."""
    notes = []
    if run.starts > 1:
        notes.append(f"one of {run.starts} starts in this log")
    if run.resumed:
        notes.append("resumed from an earlier run's weights")
    if run.total_bytes and run.total_bytes > runlog.SIZE_LIMIT:
        notes.append("over the size limit")
    if not run.ttt:
        notes.append("stopped before the final score")
    return "; ".join(notes)


# --- README -------------------------------------------------------------------------------------------------


def headline(records: Sequence[Run]) -> str:
    if not records:
        return (
            "**Not measured yet at full scale:** no run on 8 H100s has been logged (see Results for what has)."
        )
    mean, spread = summarize([run.ttt.bpb for run in records])
    kept = all(all(compliance(run).values()) for run in records)
    return (
        f"**{mean:.5f}{'' if spread is None else f' ± {spread:.5f}'} bits per byte** on the FineWeb validation split, "
        f"{len(records)} seed{'s' * (len(records) > 1)}, {'all limits kept' if kept else 'NOT within all limits'}."
    )


def results(records: Sequence[Run], partial: Sequence[Run], findings: Sequence[runlog.Finding]) -> str:
    parts = []
    if records:
        parts += [
            "Record runs (8x H100, 600 s of training, FineWeb validation split):",
            record_table(records),
        ]
        parts += [f"* {finding}" for finding in findings if finding.level == "error"]
    else:
        parts.append("Record runs: none logged yet.")
    if partial:
        parts += [
            "Partial runs, on other hardware, data or budgets; their BPB compares only with runs on the same data. "
            "Settings are those that differ from the record:",
            table(
                [
                    "log",
                    "hardware",
                    "data",
                    "settings",
                    "steps",
                    "tok/s loops off / on",
                    "BPB before quantization",
                    "after",
                    "with TTT",
                    "TTT eval",
                    "total bytes",
                    "peak MiB",
                    "remarks",
                ],
                [
                    [
                        f"`{run.name}`",
                        run.hardware,
                        f"{data_of(run)}, {show(run.val_tokens)} validation tokens",
                        " ".join(f"`{setting}`" for setting in changed_settings(run)),
                        show(run.steps),
                        " / ".join(show(speed, ",.0f") for speed in run.tok_per_s)
                        if any(run.tok_per_s)
                        else "",
                        show(run.pre and run.pre.bpb, ".5f"),
                        show(run.quantized and run.quantized.bpb, ".5f"),
                        show(run.ttt and run.ttt.bpb, ".5f"),
                        show(run.eval_ms and run.eval_ms / 1000, ".1f", " s"),
                        show(run.total_bytes),
                        show(run.peak_mib),
                        fate_of(run),
                    ]
                    for run in partial
                ],
            ),
        ]
    return "\n\n".join(parts)


def public_table(records: Sequence[Run], public: Sequence[Run]) -> str:
    """The comparison with the runs of others, from excerpts of their own logs, and with ours if there are some."""
    rows, groups = [], {}
    for run in public:
        groups.setdefault(run.name.split("_")[0], []).append(run)
    for name, runs in groups.items():
        errors = {f.run for f in runlog.check(runs) if f.level == "error"}
        for run in runs:
            rows.append(
                [
                    f"PR #{name.removeprefix('pr')}",
                    f"{run.seed}{' (other settings)' if run.name in errors else ''}",
                    *_short(run),
                ]
            )
        sound = [run for run in runs if run.name not in errors]
        rows.append([f"PR #{name.removeprefix('pr')}", f"mean of {len(sound)}", *_short_means(sound)])
    for run in records:
        rows.append(["this project", str(run.seed), *_short(run)])
    if len(records) > 1:
        rows.append(["this project", f"mean of {len(records)}", *_short_means(records)])
    if not records:
        rows.append(["this project", "not measured", *[""] * len(SHORT)])
    return table(["run", "seed", *(name for name, _, _ in SHORT)], rows)


SHORT = (
    ("BPB before quantization", lambda r: r.pre and r.pre.bpb, ".5f"),
    ("after", lambda r: r.quantized and r.quantized.bpb, ".5f"),
    ("with TTT", lambda r: r.ttt and r.ttt.bpb, ".5f"),
    ("steps", lambda r: r.steps, ",.0f"),
    ("train stop", lambda r: r.stop_ms and r.stop_ms / 1000, ",.1f"),
    ("TTT eval", lambda r: r.eval_ms and r.eval_ms / 1000, ",.1f"),
    ("training shards", lambda r: r.train_shards, ",.0f"),
    ("total bytes", lambda r: r.total_bytes, ",.0f"),
)


def _short(run: Run) -> list[str]:
    return [
        show(get(run), form, " s" if name in ("train stop", "TTT eval") else "") for name, get, form in SHORT
    ]


def _short_means(runs: Sequence[Run]) -> list[str]:
    return [
        show(summarize(values_of(runs, get))[0], form, " s" if name in ("train stop", "TTT eval") else "")
        for name, get, form in SHORT
    ]


# The lines that a reader of a log meets, and what each says; the README shows them from a real log.
EXPLAINED = (
    (r"  matrix_lr:", "one line per setting, sorted"),
    (r"versions ", "software, GPU, number of processes"),
    (r"run run_id", "name, date, tokenizer, and how the data were checked"),
    (r"run command", "the settings that differ from the defaults, and the command"),
    (r"code commit", "commit, hash of what counts as code, and the file with the script's text"),
    (r"train_shards:", "training files found"),
    (r"val_tokens:", "validation tokens; all but the first are scored"),
    (r"model_params:", "parameters"),
    (r"attention backend", "the attention kernel and why the better ones are not used"),
    (r"gptq:reserving", "part of the budget kept for calibration; the schedule's length"),
    (r"warmup done", "compilation and warm-up, undone before the clock starts"),
    (
        r"50/\d+ train_loss|500/\d+ train_loss",
        "step, mean loss in nats per token, minutes, tokens/s since the start",
    ),
    (r"layer_loop:enabled", "from here the looped layers run three times"),
    (r"stopping_early", "the budget ended training: time of the steps alone, number of steps"),
    (r"rows:", "from here a step takes whole, half or quarter rows"),
    (
        r"train speed",
        "tokens/s and milliseconds per step, loops off and on; CUDA graphs of rows, rows that found none",
    ),
    (r"peak memory", "of warm-up and training"),
    (r"GPTQ:collected", "calibration on training data"),
    (r"train clock", "steps and calibration, the clock that the rule limits"),
    (
        r"diagnostic pre-quantization",
        "plain score of the averaged weights: nats per token, bits per byte, time, totals",
    ),
    (r"Code size \(compressed\)", "what counts as code: the packed script"),
    (r"artifact attempt", "one round of quantizing and coding, bytes by tensor group"),
    (r"Total submission size", "code plus weights; at most 16,000,000"),
    (r"diagnostic quantized", "plain score of the restored artifact"),
    (r"ttt_lora:compile", "compilation for test-time training, on random tokens, before its clock"),
    (
        r'barrier before:"scoring"',
        "of several ranks: which came last, how long each waited; one line at every barrier",
    ),
    (r"ngram_tilt:hints", "targets, and how many got a hint"),
    (r"ttt_phased:", "documents scored before and after the adaptation of the base"),
    (r"ttt batch:", "running score, documents of the batch, their lengths, lane and phase"),
    (r"ttt adapted_base", "the base has learnt from scored documents"),
    (
        r"quantized_ttt_phased",
        "THE score: nats per token, bits per byte, time on the evaluation clock, totals",
    ),
    (r"total_eval_time", "the same time in seconds"),
)


def sample_log(runs: Sequence[Run]) -> str:
    """Real lines of the newest complete run, each with what it says."""
    complete = [run for run in runs if run.ttt and run.curve]
    if not complete:
        return "No complete run has been logged yet."
    run = max(complete, key=lambda run: (run.identity.get("date", ""), run.name))
    lines = runlog.SOURCE.sub("", run.path.read_text(encoding="utf-8")).splitlines()
    rows = []
    for pattern, meaning in EXPLAINED:
        found = [line for line in lines if re.match(pattern, line)]
        if found:
            line = found[-1]
            rows.append(
                f"| `{line.strip() if len(line) < 150 else line[:147].strip() + '...'}` | {meaning} |"
            )
    return "\n".join([f"From `{run.path.name}`, in order:", "", "| line | meaning |", "|---|---|", *rows])


def fill(text: str, name: str, content: str) -> str:
    """Replace the part of `text` between the markers of `name`; ReportError unless there is exactly one."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ReportError(
            f"README.md: expected exactly one {start} followed by one {end}; put the markers back"
        )
    return text[: text.index(start) + len(start)] + f"\n{content}\n" + text[text.index(end) :]


# --- submission.json ----------------------------------------------------------------------------------------


def compliance(run: Run) -> dict[str, bool]:
    """The limits of the rules, unrounded, on the reading the maintainers used: steps count as training."""
    return {
        "train_within_600s": run.stop_ms <= runlog.CLOCK_LIMIT_MS,
        "eval_within_600s": run.eval_ms <= runlog.CLOCK_LIMIT_MS,
        "total_within_16000000_bytes": max(run.total_bytes, run.code_bytes + run.model_bytes)
        <= runlog.SIZE_LIMIT,
    }


def seed_result(run: Run) -> dict[str, Any]:
    return {
        "val_bpb": run.ttt.bpb,
        "val_loss": run.ttt.loss,
        "pre_quant_val_bpb": run.pre.bpb,
        "quantized_val_bpb": run.quantized.bpb,
        "steps": run.steps,
        "train_time_s": run.stop_ms / 1000,
        "train_clock_s": run.train_clock_ms / 1000,
        "eval_time_s": run.eval_ms / 1000,
        "artifact_bytes": run.total_bytes,
        "model_bytes": run.model_bytes,
        "code_bytes": run.code_bytes,
    }


def submission(
    records: Sequence[Run], author: str | None, github_id: str | None, findings: Sequence[runlog.Finding] = ()
) -> dict[str, Any]:
    """The submission's facts; scores are null while there is no record run."""

    def over(fold: Callable, values: list) -> Any:
        return fold(values) if values and None not in values else None

    def distinct(values: list) -> str | None:
        return ", ".join(dict.fromkeys(map(str, values))) if values and None not in values else None

    scores = [run.ttt.bpb for run in records]
    losses = [run.ttt.loss for run in records]
    checks = [compliance(run) for run in records]
    facts = {
        "author": author,
        "github_id": github_id,
        "name": NAME,
        "blurb": f"{PARENT} rewritten as one readable script with causal n-gram hints in the scored order."
        if records
        else "No record run has been logged yet; this file holds no score. `python report.py` fills it from "
        "logs/.",
        "date": over(max, [run.identity.get("date") for run in records]),
        "track": "10min_16mb",
        "val_bpb": summarize(scores)[0],
        "val_loss": summarize(losses)[0],
        "val_bpb_std": summarize(scores)[1],
        "val_loss_std": summarize(losses)[1],
        "seeds": [run.seed for run in records],
        "seed_results": {str(run.seed): seed_result(run) for run in records},
        "train_time_s_mean": over(statistics.fmean, [run.stop_ms / 1000 for run in records]),
        "eval_time_s_mean": over(statistics.fmean, [run.eval_ms / 1000 for run in records]),
        "bytes_total": over(max, [run.total_bytes for run in records]),
        "bytes_code": over(max, [run.code_bytes for run in records]),
        "hardware": distinct([run.hardware for run in records]),
        "pytorch_version": distinct([run.versions.get("torch") for run in records]),
        "python_version": distinct([run.versions.get("python") for run in records]),
        "commit": distinct([run.identity.get("commit") for run in records]),
        "val_tokens": over(max, [run.val_tokens for run in records]),
        "train_shards": over(min, [run.train_shards for run in records]),
        "technique_summary": technique(records[0] if records else Run("none yet", Path())),
        "compliance": {name: all(check[name] for check in checks) for name in checks[0]}
        | {"three_seeds": len(records) >= 3}
        if checks
        else {},
        "warnings": [str(finding) for finding in findings if finding.level == "warning"],
        "logs": {str(run.seed): f"logs/{run.path.name}" for run in records},
    }
    if errors := [str(finding) for finding in findings if finding.level == "error"]:
        facts["errors"] = errors
    return facts


def _git_config(name: str, repo: Path) -> str | None:
    try:
        told = subprocess.run(["git", "config", name], cwd=repo, capture_output=True, text=True)
    except OSError:
        return None
    return told.stdout.strip() or None


def identity(options: argparse.Namespace, repo: Path, has_records: bool) -> tuple[str | None, str | None]:
    """(author, GitHub id): as told, else as submission.json has them, else from git config with a score."""
    try:
        before = json.loads((repo / "submission.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    author = (
        options.author or before.get("author") or (_git_config("user.name", repo) if has_records else None)
    )
    github_id = (
        options.github_id
        or before.get("github_id")
        or (_git_config("github.user", repo) if has_records else None)
    )
    return author, github_id


def as_json(facts: dict[str, Any]) -> str:
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"


def require_sound(findings: Sequence[runlog.Finding], force: bool, what: str, advice: str) -> None:
    """ReportError with every error among the findings, unless force is on."""
    errors = [str(finding) for finding in findings if finding.level == "error"]
    if errors and not force:
        raise ReportError("\n".join([f"{what} do not bear a submission:", *errors, advice]))


def _logs_of_git(repo: Path) -> set[str] | None:
    """Names of the logs that are committed or added; None where `repo` is no git checkout."""
    try:
        done = subprocess.run(
            ["git", "ls-files", "logs"], cwd=repo, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {Path(line).name for line in done.stdout.splitlines()}


def generate(repo: Path, options: argparse.Namespace) -> dict[Path, str]:
    """The content that every generated file should have. ReportError when the logs do not bear it."""
    import train_gpt as gpt

    found, known = read_folder(repo / "logs"), _logs_of_git(repo)
    if left := sorted({run.path.name for run in found if known is not None and run.path.name not in known}):
        print(f"left out, because git does not know them (`git add` what counts): {', '.join(left)}", file=sys.stderr)
        found = [run for run in found if run.path.name in known]
    records = sorted((run for run in found if run.is_record), key=lambda run: run.seed)
    findings = runlog.check(records)
    require_sound(
        findings,
        options.force,
        "the record runs in logs/",
        "keep the logs that count, or pass --force, and the files will say what is wrong",
    )
    submitted = repo / "submission.json"
    author, github_id = identity(options, repo, bool(records))
    if not records and not options.force and submitted.exists():
        try:
            before = json.loads(submitted.read_text(encoding="utf-8"))
        except ValueError:
            before = {}
        if before.get("seed_results"):
            raise ReportError(
                f"submission.json holds results of seeds {sorted(before['seed_results'])}, and logs/ no "
                "record run: nothing is emptied silently; put the logs back or pass --force"
            )
    readme = (repo / "README.md").read_text(encoding="utf-8")
    public = read_folder(REPO / PUBLIC_LOGS, "*.log")
    for name, content in (
        ("headline", headline(records)),
        ("settings", gpt.settings_table()),
        ("results", results(records, [run for run in found if not run.is_record], findings)),
        ("public", public_table(records, public)),
        ("sample", sample_log(found)),
    ):
        readme = fill(readme, name, content)
    return {repo / "README.md": readme, submitted: as_json(submission(records, author, github_id, findings))}


# --- commands -----------------------------------------------------------------------------------------------


def regenerate_command(options: argparse.Namespace, repo: Path) -> int:
    wanted = generate(repo, options)
    stale = [
        path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path in stale:
        if options.check:
            print(f"{path.name} is stale: run `python report.py` and commit the result", file=sys.stderr)
        else:
            path.write_text(wanted[path], encoding="utf-8")
            print(f"{path.name} rewritten")
    return 1 if options.check and stale else 0


def table_command(options: argparse.Namespace, repo: Path) -> int:
    runs, against = read_all(options.logs), read_all(options.against or [])
    if options.json:  # first: a path that cannot be written is told before anything else
        facts = {
            "runs": [_plain(run) for run in runs],
            "mean": {name: summarize(values_of(runs, get))[0] for name, get, _ in COLUMNS},
            "standard_deviation": {name: summarize(values_of(runs, get))[1] for name, get, _ in COLUMNS},
        }
        if against:
            facts |= {
                "against": [_plain(run) for run in against],
                "comparison": compare(runs, against),
                "record_rule": record_rule(runs, against),
            }
        options.json.write_text(as_json(facts), encoding="utf-8")
    print(record_table(runs))
    if against:
        print("\nAgainst:\n")
        print(record_table(against))
        print()
        print(comparison(runs, against))
    for run in (*runs, *against):
        if run.starts > 1:
            print(
                f"\nnote: {run.path.name} holds {run.starts} starts; {run.name} is one of them",
                file=sys.stderr,
            )
    return 0


def _plain(run: Run) -> dict[str, Any]:
    return {
        "log": run.path.name,
        "name": run.name,
        "seed": run.seed,
        "hardware": run.hardware,
        **{name: get(run) for name, get, _ in COLUMNS},
    }


def check_command(options: argparse.Namespace, repo: Path) -> int:
    runs = read_all(options.logs)
    findings = runlog.check(runs)
    for finding in findings:
        print(finding)
    errors = sum(finding.level == "error" for finding in findings)
    print(f"check runs:{len(runs)} errors:{errors} warnings:{len(findings) - errors}")
    return 1 if errors else 0


def html_command(options: argparse.Namespace, repo: Path) -> int:
    try:
        import pictures
    except ImportError as error:
        raise ReportError(f"html needs matplotlib ({error}): {MISSING_EXTRAS}") from error
    runs, against = read_all(options.logs), read_all(options.against or [])
    parts = [("Results", record_table(runs))]
    if against:
        parts += [("Against", record_table(against)), ("Difference", comparison(runs, against))]
    findings = runlog.check(runs)
    parts.append(("Checks", "\n".join(f"* {finding}" for finding in findings) or "Nothing to report."))
    for path in pictures.write_page(options.out, runs, against, parts):
        print(f"wrote {path}")
    return 0


def _sound(options: argparse.Namespace) -> tuple[list[Run], list[runlog.Finding]]:
    """The runs of a submission and what is to be said about them; ReportError when they do not bear one."""
    runs = sorted(read_all(options.logs), key=lambda run: (run.seed is None, run.seed))
    findings = runlog.check(runs)
    if len(runs) < 3:
        findings.append(
            runlog.Finding("warning", "all runs", "three seeds", f"{len(runs)} of the three runs that a row needs")
        )
    require_sound(
        findings,
        options.force,
        "these logs",
        "run again, or pass --force, and the text will say what is wrong",
    )
    if incomplete := [
        run.name
        for run in runs
        if None
        in (run.pre, run.quantized, run.ttt, run.stop_ms, run.total_bytes, run.code_bytes, run.model_bytes)
    ]:
        raise ReportError(f"{', '.join(incomplete)}: expected complete runs, see `python report.py check`")
    return runs, findings


def starts_of(runs: Sequence[Run]) -> list[str]:
    """The commands that make these runs from the published shards. Not `frontier`: it joins all pairs and has
    settings of its own, and these runs may have joined fewer or kept the record's."""
    import train_gpt as gpt

    shards = gpt.Config().data_path
    joined = {run.merges: f"{shards}_fused{run.merges}" for run in runs if run.merges}
    lines = [
        f"python3 prepare_caseops_data.py fuse {shards} {folder} --merges {count}"
        for count, folder in joined.items()
    ]
    for run in runs:
        data = [f"DATA_PATH={joined[run.merges]}"] if run.merges else []
        lines.append(" ".join([f"SEED={run.seed}", *data, *changed_settings(run), "./run.sh"]))
    return lines


def pull_request(runs: Sequence[Run], findings: Sequence[runlog.Finding], against: Sequence[Run] = ()) -> str:
    """The whole text of a pull request, also the README of the submission folder."""
    mean, spread = summarize([run.ttt.bpb for run in runs])
    errors = [finding for finding in findings if finding.level == "error"]
    warnings = [finding for finding in findings if finding.level == "warning"]
    commits = dict.fromkeys(run.identity["commit"] for run in runs if "commit" in run.identity)
    parts = [
        f"# {'NOT A RECORD: ' if errors else ''}{NAME}",
        f"**val_bpb {mean:.5f}{'' if spread is None else f' ± {spread:.5f}'}** ({len(runs)} "
        f"seed{'s' * (len(runs) > 1)}), largest total {max(run.total_bytes for run in runs):,} bytes, "
        f"{', '.join(dict.fromkeys(run.hardware for run in runs))}",
        "## Results",
        record_table(runs),
    ]
    if errors:
        parts += ["**These logs fail the checks:**", "\n".join(f"* {finding}" for finding in errors)]
    if against:
        parts += ["## Against the runs before", record_table(against), comparison(runs, against)]
    limits = [compliance(run) for run in runs]
    parts += [
        "## What it is",
        technique(runs[0]),
        "## Rules",
        "\n".join(
            f"* {name.replace('_', ' ')}: {'yes' if all(limit[name] for limit in limits) else 'NO'}"
            for name in limits[0]
        ),
        "* every target is scored before anything learns from it; hints and adapters see only tokens scored before, in "
        "one fixed order that depends on document lengths and settings only\n"
        "* document lengths form the batches of evaluation, as everyone in this family does; as side information they "
        "would cost about 0.004 BPB\n* validation data are not read before the last training step",
    ]
    if warnings:
        parts += ["What a reader must know:", "\n".join(f"* {finding}" for finding in warnings)]
    parts += [
        "## Reproduce",
        "```\npython3 -m pip install -r requirements.txt -r requirements-gpu.txt\n"
        "python3 prepare_caseops_data.py download\n"
        + "\n".join(starts_of(runs))
        + "\n```",
    ]
    if commits:
        parts.append(f"Commit: {', '.join(commits)}. The logs hold the exact command of each run.")
    parts += [
        "## Credits",
        f"Follows {PARENT} in behaviour and settings; README.md of the project names what each earlier "
        "pull request contributed.",
        "## Files",
        "`train_gpt.py` (packed, self-extracting), `run.sh`, `README.md`, "
        "`submission.json`, the training logs, requirements, tokenizer and data preparation.",
    ]
    return "\n\n".join(parts) + "\n"


def pr_command(options: argparse.Namespace, repo: Path) -> int:
    runs, findings = _sound(options)
    print(pull_request(runs, findings, read_all(options.against or [])), end="")
    return 0


def pack_command(options: argparse.Namespace, repo: Path) -> int:
    """Write the submission folder, and check it by running it; a folder that fails is removed."""
    (runs, findings), against = _sound(options), read_all(options.against or [])
    folder, code = options.folder, 1
    if folder.exists():
        raise UsageError(f"{folder} exists; name a new folder or remove it")
    try:
        code = _fill_folder(options, repo, runs, findings, against)
    finally:
        if code == 1:  # with 2 it was not made
            shutil.rmtree(folder, ignore_errors=True)
    return code


def _fill_folder(
    options: argparse.Namespace,
    repo: Path,
    runs: Sequence[Run],
    findings: Sequence[runlog.Finding],
    against: Sequence[Run],
) -> int:
    import pack

    folder = options.folder
    if code := pack.main([str(folder)]):
        return code  # it has said why
    packed = (folder / "train_gpt.py").read_bytes()
    if wrong := [run for run in runs if not _is_code_of(packed, run)]:
        message = (
            f"{wrong[0].name} was made by other code: it counted {wrong[0].code_bytes:,} bytes, the packed script "
            f"has {len(packed):,}, hash {hashlib.sha256(packed).hexdigest()[:16]}; check out the log's commit"
        )
        if not options.force:
            raise ReportError(f"{message}, or pass --force")
        findings = [*findings, runlog.Finding("error", wrong[0].name, "same code", message)]
    author, github_id = identity(options, repo, True)
    facts = submission(runs, author, github_id, findings)
    facts["logs"] = {str(run.seed): f"train_seed{run.seed}.log" for run in runs}
    for run in runs:
        shutil.copy2(run.path, folder / f"train_seed{run.seed}.log")
    (folder / "submission.json").write_text(as_json(facts), encoding="utf-8")
    (folder / "README.md").write_text(pull_request(runs, findings, against), encoding="utf-8")
    run_folder(folder)
    print(f"pack folder:{folder} code_bytes:{len(packed)} logs:{len(runs)} run_sh:works")
    return 0


def _is_code_of(packed: bytes, run: Run) -> bool:
    """Whether a run counted this packed script, by its hash where the log has it."""
    told = run.identity.get("code_sha256")
    return run.code_bytes == len(packed) and told in (None, hashlib.sha256(packed).hexdigest())


def run_folder(folder: Path) -> None:
    """Run the folder's run.sh, in a copy, for two steps of a small model on a CPU; ReportError if it fails."""
    import pack

    with tempfile.TemporaryDirectory(prefix="submission_") as work:
        copy = Path(work) / "submission"
        shutil.copytree(folder, copy)
        pack.write_toy_shards(copy / "toy")
        settings = pack.toy_environment(
            PYTHON=sys.executable,
            NPROC_PER_NODE="1",
            DATA_PATH="toy",
            ALLOW_UNVERIFIED="1",
            TOKENIZER_PATH="tokenizers/caseops_8192.model",
            ITERATIONS="2",
            COMPILE="0",
            MAX_WALLCLOCK_SECONDS="0",
            WARMUP_STEPS="0",
            PREQUANT_ONLY="1",
            MODEL_DIM="32",
            NUM_HEADS="2",
            NUM_KV_HEADS="1",
            ROPE_DIMS="8",
            TRAIN_BATCH_TOKENS="2048",
            TRAIN_SEQ_LEN="64",
            VAL_BATCH_TOKENS="2048",
            EVAL_SEQ_LEN="64",
            RUN_ID="submission_check",
        )
        done = subprocess.run(["bash", "run.sh"], cwd=copy, env=settings, capture_output=True, text=True)
        if done.returncode or "diagnostic pre-quantization" not in done.stdout:
            raise ReportError(
                f"{folder}/run.sh fails there (exit code {done.returncode}): "
                f"{(done.stderr or done.stdout).strip()[-1500:]}"
            )


def watch_command(options: argparse.Namespace, repo: Path) -> int:
    try:
        import watch
    except ImportError as error:
        raise ReportError(f"watch needs rich ({error}): {MISSING_EXTRAS}") from error
    return watch.watch(options.log, once=options.once)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="report.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit code 1 when a file is stale"
    )
    parser.set_defaults(run=regenerate_command)
    commands = parser.add_subparsers(metavar="COMMAND")

    def add(name: str, run: Callable, text: str, against: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
        )
        command.set_defaults(run=run)
        if name == "pack":
            command.add_argument("folder", metavar="DIR", type=Path, help="new folder")
        if name == "watch":
            command.add_argument("log", metavar="LOG", type=Path)
            command.add_argument("--once", action="store_true", help="draw once and end")
            return command
        command.add_argument("logs", metavar="LOG", type=Path, nargs="+", help="log files, one per seed")
        if against:
            command.add_argument(
                "--against", metavar="LOG", type=Path, nargs="+", help="logs to compare with"
            )
        return command

    def add_identity(command: argparse.ArgumentParser) -> None:
        command.add_argument("--author", help="default: submission.json's, else git config user.name")
        command.add_argument("--github-id", help="default: submission.json's, else git config github.user")
        command.add_argument(
            "--force", action="store_true", help="go on although the logs fail checks, and say so"
        )

    add_identity(parser)
    add("table", table_command, "print a Markdown table with means and differences").add_argument(
        "--json", metavar="FILE", type=Path, help="also write everything as JSON"
    )
    add("check", check_command, "say what in these logs is false or against the rules", against=False)
    add("html", html_command, "write one page with table and pictures").add_argument(
        "--out", metavar="FILE", type=Path, required=True, help="the page; PNG files go to a folder beside it"
    )
    add_identity(add("pr", pr_command, "print the text of a pull request"))
    add_identity(add("pack", pack_command, "write the whole submission folder and run it"))
    add("watch", watch_command, "redraw loss, speed and time left while a run goes on")
    return parser


def main(argv: Sequence[str], repo: Path = REPO) -> int:
    try:
        options = make_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help or the sentence
        return stop.code or 0
    try:
        return options.run(options, repo)
    except (ReportError, LogError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `report.py table ... | head`
        sys.stderr.close()
        return 0
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        print(f"error: {error.filename}: {error.strerror}; correct the path", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
