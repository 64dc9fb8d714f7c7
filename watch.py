"""Watch a run in the terminal: loss, speed and time left, redrawn while its log grows. Needs rich.

`report.py watch LOG` calls it; it only reads the log, so it can start and end at any time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

import runlog
from runlog import Run

BARS = "▁▂▃▄▅▆▇█"
REDRAW_S = 1.0


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values as bars between their smallest and largest."""
    values = list(values)[-width:]
    if not values:
        return ""
    low, high = min(values), max(values)
    return "".join(
        BARS[round((v - low) / (high - low) * (len(BARS) - 1)) if high > low else 0] for v in values
    )


def train_progress(run: Run) -> tuple[float, float | None]:
    """(share of training done, seconds left), by the clock, else by the number of steps."""
    if run.stop_ms is not None or run.pre is not None:
        return 1.0, 0.0
    if not run.curve:
        return 0.0, None
    last = run.curve[-1]
    spent = run.tokens_at(last.step) / last.tok_per_s
    if run.effective_ms:
        return min(1.0, 1000 * spent / run.effective_ms), max(0.0, run.effective_ms / 1000 - spent)
    total = run.setting("iterations")
    return min(1.0, last.step / total), max(0.0, spent * (total / last.step - 1))


def scoring_progress(run: Run) -> float:
    """Share of the batches of test-time training that are done, of all phases together."""
    if run.ttt is not None:
        return 1.0
    if not run.batches:
        return 0.0
    last = run.batches[-1]
    if "/" not in last.phase:  # the reference counts its batches down
        return 1 - last.number / last.total
    phase, phases = map(int, last.phase.split("/"))
    return (phase - 1 + last.number / last.total) / phases


def has_last_score(run: Run) -> bool:
    """Whether the run has the last score that its settings ask for."""
    if run.settings.get("prequant_only") == "1":
        return run.pre is not None
    if run.settings.get("ttt_enabled") == "0":
        return run.quantized is not None
    return run.total_eval_s is not None


def draw(run: Run, width: int = 100) -> Group:
    """What the terminal shows of one run."""
    spark = max(20, width - 40)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(justify="right", style="dim")
    facts.add_column()
    if run.curve:
        last = run.curve[-1]
        settled = [point.loss for point in run.curve if point.step > 5] or [last.loss]
        facts.add_row("loss", f"{last.loss:.4f}  {sparkline(settled, spark)}")
        facts.add_row(
            "tokens/s", f"{last.tok_per_s:,.0f}  {sparkline([p.tok_per_s for p in run.curve[1:]], spark)}"
        )
        facts.add_row(
            "step",
            f"{run.steps or last.step:,}"
            + (f", layers loop since step {run.loop_step:,}" if run.loop_step is not None else ""),
        )
    for name, score in (
        ("before quantization", run.pre),
        ("after quantization", run.quantized),
        ("final score", run.ttt),
    ):
        if score:
            facts.add_row(name, f"{score.bpb:.6f} bits per byte")
    if run.batches:
        facts.add_row(
            "running score", f"{run.batches[-1].bpb:.6f}  {sparkline([b.bpb for b in run.batches], spark)}"
        )
    if run.total_bytes:
        facts.add_row("bytes", f"{run.total_bytes:,} of {runlog.SIZE_LIMIT:,}")
    done, left = train_progress(run)
    bars = Table.grid(padding=(0, 2))
    bars.add_row(
        "training",
        ProgressBar(1.0, done, width=40),
        f"{100 * done:.0f} %",
        "" if left is None else "done" if done == 1 else f"{left:.0f} s left",
    )
    scored = scoring_progress(run)
    bars.add_row(
        "scoring", ProgressBar(1.0, scored, width=40), f"{100 * scored:.0f} %", "done" if scored == 1 else ""
    )
    lines = [Text(line, style="yellow") for line in run.warnings]
    return Group(
        Panel(Group(bars, facts, *lines), title=f"{run.name}  {run.hardware}", width=min(width, 120))
    )


def watch(log: Path, once: bool = False) -> int:
    """Redraw until the run has its last score (or Ctrl-C); returns the exit code. LogError for what is no log
    and does not grow."""
    console = Console()
    if not once and not log.exists():
        print(f"watch: {log} does not exist yet; waiting for it", file=sys.stderr)
    if once or log.is_dir():  # which read_runs refuses
        console.print(draw(runlog.read_runs(log)[-1], console.width))
        return 0
    try:
        with Live(console=console, refresh_per_second=4) as live:
            size, broken = -1, None
            while True:
                if log.exists() and log.stat().st_size != size:
                    size = log.stat().st_size
                    try:
                        run = runlog.read_runs(log)[-1]
                        broken = None
                    except runlog.LogError as error:  # the last line is still being written
                        broken = error
                        time.sleep(REDRAW_S)
                        continue
                    live.update(draw(run, console.width))
                    if has_last_score(run):
                        return 0
                elif size > 0 and isinstance(broken, runlog.NotALog):
                    raise broken
                elif not log.exists():
                    live.update(Text(f"waiting for {log}"))
                time.sleep(REDRAW_S)
    except KeyboardInterrupt:
        return 130
