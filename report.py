#!/usr/bin/env python3
"""Regenerate everything that states a measured number from the logs: README.md's tables and submission.json.

    python report.py            rewrite the marked parts of README.md, and submission.json
    python report.py --check    change nothing; exit code 1 when something is stale
    python report.py pack DIR   write the submission folder with the packed script, see pack.py

A marked part of README.md lies between `<!-- NAME -->` and `<!-- /NAME -->`; names: headline, results, settings.
Record runs are those that count for a submission: 8 H100s, 600 s, the published validation split, one uninterrupted
run. All other finished runs are listed as partial. Nothing here is typed by hand.
"""
from __future__ import annotations

import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pack
import train_gpt as gpt

REPO = Path(__file__).resolve().parent
RECORD_GPUS, RECORD_GPU_NAME, RECORD_SECONDS = 8, "H100", 600.0

# The log grammar: an event in words (perhaps none), then key:value pairs. Settings have two leading blanks.
PAIR = re.compile(r'([^\s:=]+)[:=] ?("[^"]*"|\[[^\]]*\]|[^\s:]+)')


def parse_line(line: str) -> tuple[str, dict[str, str]]:
    """(event, fields) of one log line; the event is what stands before the first field."""
    fields = {m[1]: m[2].strip('"') for m in PAIR.finditer(line)}
    first = PAIR.search(line)
    return (line[:first.start()] if first else line).strip(), fields


def number(text: str) -> float:
    """The leading number of a value with a unit: "596047ms" is 596047."""
    return float(re.match(r"-?[\d.]+(e[+-]?\d+)?", text)[0])


@dataclass(frozen=True)
class Result:
    """What one log says; None where it says nothing (the run stopped before)."""
    name: str
    seed: int
    starts: int                     # 2 or more when the run was resumed
    hardware: str
    world_size: int
    torch: str
    budget_s: float
    val_tokens: int
    date: str | None = None
    steps: int | None = None
    train_s: float | None = None
    train_clock_s: float | None = None
    tok_per_s: tuple[int | None, int | None] = (None, None)       # loops off, loops on
    peak_mib: int | None = None
    pre_bpb: float | None = None
    quantized_bpb: float | None = None
    ttt_bpb: float | None = None
    ttt_loss: float | None = None
    eval_s: float | None = None
    code_bytes: int | None = None
    total_bytes: int | None = None

    @property
    def is_record(self) -> bool:
        """A complete run under the rules' conditions, whether or not it kept to the limits."""
        low, high = gpt.CHECK_FIGURES["val_tokens"]
        return (self.world_size == RECORD_GPUS and RECORD_GPU_NAME in self.hardware and self.budget_s == RECORD_SECONDS
                and low <= self.val_tokens <= high and self.starts == 1 and None not in (
                    self.steps, self.train_clock_s, self.ttt_bpb, self.eval_s, self.total_bytes))

    @property
    def compliance(self) -> dict[str, bool]:
        return {"train_within_600s": self.train_clock_s <= 600, "eval_within_600s": self.eval_s <= 600,
                "total_within_16000000_bytes": self.total_bytes <= gpt.SIZE_LIMIT}


def read_log(path: Path) -> Result | None:
    """Parse a log; None when it holds no run that reached a score. Later lines win over earlier ones.

    Raises ValueError naming the file when a known line lacks a field.
    """
    try:
        return _read_log(path)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path.name}: expected a log of train_gpt.py, found a line without {error}; "
                         "logs are kept as they were written, restore or remove it") from error


def _read_log(path: Path) -> Result | None:
    lines = re.sub(r"^source:\n.*?^source_end$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S).splitlines()
    settings: dict[str, str] = {}
    facts: dict[str, Any] = {"starts": 0}
    speed: dict[str, str] = {}
    for line in lines:
        event, fields = parse_line(line)
        if line.startswith("  "):
            settings |= fields
        elif event == "versions":
            facts |= {"starts": facts["starts"] + 1, "world_size": int(fields["world_size"]), "torch": fields["torch"],
                      "hardware": f"{fields['world_size']}x {fields['device']}"}
        elif event == "run":
            facts["date"] = fields.get("date")
        elif "val_tokens" in fields and not event:
            facts["val_tokens"] = int(fields["val_tokens"])
        elif event == "train speed":
            speed, facts["steps"] = fields, int(fields["steps"])
        elif event == "train" and "clock_s" in fields:
            facts |= {"train_clock_s": number(fields["clock_s"]), "train_s": number(fields["steps_s"])}
        elif event == "peak memory":
            facts["peak_mib"] = int(fields["allocated"])
        elif event == "diagnostic pre-quantization post-ema":
            facts["pre_bpb"] = float(fields["val_bpb"])
        elif event == "diagnostic quantized":
            facts["quantized_bpb"] = float(fields["val_bpb"])
        elif event == "Code size" and "(compressed)" in fields:
            facts["code_bytes"] = int(fields["(compressed)"])
        elif event == "Total submission size":
            facts["total_bytes"] = int(next(iter(fields.values())))
        elif event == "quantized_ttt_phased":
            facts |= {"ttt_bpb": float(fields["val_bpb"]), "ttt_loss": float(fields["val_loss"])}
        elif "total_eval_time" in fields:
            facts["eval_s"] = number(fields["total_eval_time"])
    if not facts["starts"] or not facts.keys() & {"pre_bpb", "quantized_bpb", "ttt_bpb"}:
        return None
    pace = tuple(int(speed[key]) if key in speed else None for key in ("loops_off_tok_per_s", "loops_on_tok_per_s"))
    return Result(name=path.stem, seed=int(settings["seed"]), budget_s=float(settings["max_wallclock_seconds"]),
                  tok_per_s=pace, **facts)


def read_logs(folder: Path) -> list[Result]:
    return [result for path in sorted(folder.glob("*.txt")) if (result := read_log(path)) is not None]


# --- README -------------------------------------------------------------------------------------------------

def show(value: float | None, form: str = ",", unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in
                     [head, ["---", *["---:"] * (len(head) - 1)], *rows])


def headline(records: list[Result]) -> str:
    if not records:
        return "**Not measured yet at full scale:** no run on 8 H100s has been logged (see Results for what has)."
    mean = statistics.fmean(r.ttt_bpb for r in records)
    spread = f" ± {statistics.stdev(r.ttt_bpb for r in records):.5f}" if len(records) > 1 else ""
    kept = all(all(r.compliance.values()) for r in records)
    return (f"**{mean:.5f}{spread} bits per byte** on the FineWeb validation split, {len(records)} "
            f"seed{'s' * (len(records) > 1)}, {'all limits kept' if kept else 'NOT within all limits'}.")


def results(records: list[Result], partial: list[Result]) -> str:
    parts = []
    if records:
        parts += ["Record runs (8x H100, 600 s of training, FineWeb validation split):", table(
            ["seed", "BPB before quantization", "after", "after TTT", "steps", "train clock", "TTT eval",
             "total bytes"],
            [[str(r.seed), show(r.pre_bpb, ".5f"), show(r.quantized_bpb, ".5f"), show(r.ttt_bpb, ".5f"), show(r.steps),
              show(r.train_clock_s, ".1f", " s"), show(r.eval_s, ".1f", " s"), show(r.total_bytes)] for r in records])]
    else:
        parts.append("Record runs: none logged yet.")
    if partial:
        parts += ["Partial runs, on other hardware, data or budgets; their BPB compares only with runs on the same "
                  "data:", table(
            ["log", "hardware", "budget", "validation tokens", "steps", "tok/s loops off / on",
             "BPB before quantization", "after", "after TTT", "TTT eval", "total bytes"],
            [[f"`{r.name}`", r.hardware, show(r.budget_s, "g", " s"), show(r.val_tokens), show(r.steps),
              " / ".join(map(show, r.tok_per_s)) if any(r.tok_per_s) else "",
              show(r.pre_bpb, ".5f"), show(r.quantized_bpb, ".5f"), show(r.ttt_bpb, ".5f"),
              show(r.eval_s, ".1f", " s"), show(r.total_bytes)] for r in partial])]
    return "\n\n".join(parts)


def fill(text: str, name: str, content: str) -> str:
    """Replace the part of `text` between the markers of `name`; ValueError unless there is exactly one such part."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"README.md: expected exactly one {start} followed by one {end}; put the markers back")
    return text[:text.index(start) + len(start)] + f"\n{content}\n" + text[text.index(end):]


# --- submission.json ----------------------------------------------------------------------------------------

def submission(records: list[Result]) -> dict[str, Any]:
    """The submission's facts; scores are null while there is no record run."""
    def over_seeds(fold, attribute: str) -> Any:
        return fold([getattr(r, attribute) for r in records]) if records else None

    checks = [r.compliance for r in records]
    return {
        "author": "the parameter golf project contributors",
        "github_id": None,
        "name": "One-file rewrite: looped two-lane transformer, GPTQ, score-first LoRA TTT with n-gram tilt",
        "blurb": "Reference PR #2124 rewritten as one readable script with causal n-gram hints in the scored order."
                 if records else "No record run has been logged yet; this file holds no score. "
                                 "`python report.py` fills it from logs/.",
        "date": over_seeds(max, "date") if all(r.date for r in records) else None,
        "track": "10min_16mb",
        "val_bpb": over_seeds(statistics.fmean, "ttt_bpb"),
        "val_loss": over_seeds(statistics.fmean, "ttt_loss"),
        "val_bpb_std": over_seeds(statistics.stdev, "ttt_bpb") if len(records) > 1 else None,
        "seeds": [r.seed for r in records],
        "seed_results": {str(r.seed): {
            "val_bpb": r.ttt_bpb, "val_loss": r.ttt_loss, "pre_quant_val_bpb": r.pre_bpb,
            "quantized_val_bpb": r.quantized_bpb, "steps": r.steps, "train_time_s": r.train_clock_s,
            "eval_time_s": r.eval_s, "artifact_bytes": r.total_bytes} for r in records},
        "bytes_total": over_seeds(max, "total_bytes"),
        "bytes_code": over_seeds(max, "code_bytes"),
        "hardware": over_seeds(lambda names: ", ".join(dict.fromkeys(names)), "hardware"),
        "pytorch_version": over_seeds(lambda names: ", ".join(dict.fromkeys(names)), "torch"),
        "val_tokens": over_seeds(max, "val_tokens"),
        "compliance": {name: all(check[name] for check in checks) for name in checks[0]} if checks else {},
        "logs": {str(r.seed): f"logs/{r.name}.txt" for r in records},
    }


def generate(repo: Path) -> dict[Path, str]:
    """The content that every generated file should have. ValueError when two record runs share a seed."""
    found = read_logs(repo / "logs")
    records = sorted((r for r in found if r.is_record), key=lambda r: r.seed)
    seeds = [r.seed for r in records]
    if len(seeds) != len(set(seeds)):
        raise ValueError(f"logs: record runs have seeds {seeds}; expected one log per seed, keep the run that counts")
    readme = (repo / "README.md").read_text(encoding="utf-8")
    for name, content in (("headline", headline(records)), ("settings", gpt.settings_table()),
                          ("results", results(records, [r for r in found if not r.is_record]))):
        readme = fill(readme, name, content)
    return {repo / "README.md": readme,
            repo / "submission.json": json.dumps(submission(records), indent=2) + "\n"}


def main(argv: list[str], repo: Path = REPO) -> int:
    if argv[:1] == ["pack"]:
        return pack.main(argv[1:])
    if argv not in ([], ["--check"]):
        print(__doc__, file=sys.stdout if argv in (["--help"], ["-h"]) else sys.stderr)
        return 0 if argv in (["--help"], ["-h"]) else 2
    try:
        wanted = generate(repo)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if argv:
            print(f"{path.name} is stale: run `python report.py` and commit the result", file=sys.stderr)
        else:
            path.write_text(wanted[path], encoding="utf-8")
            print(f"{path.name} rewritten")
    return 1 if argv and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
