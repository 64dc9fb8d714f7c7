#!/usr/bin/env python3
"""Compare settings fairly: arms (named sets of settings) x seeds, one run of train_gpt.py after the other.

    python ablate.py ARMS.toml --out DIR                 run what is not finished yet, then write the table
    python ablate.py ARMS.toml --out DIR --table         only write the table of what is finished

Arms of one seed see the same data in the same order, so their differences are paired. A run is known by its
settings, seed, data and the hash of train_gpt.py; one that is finished is not run again. All runs share one
compile cache. Settings come from the arms file alone: those in the environment are ignored. The table,
DIR/results.md and DIR/results.json, gives differences to the base arm with paired standard errors, and the
steps and seconds saved at equal score. Runs on different cards or different text are never compared.

ARMS.toml:

    base = "record"                      # the arm that others are compared with
    seeds = [42, 1337]
    curve = [120, 240]                   # optional: more values of curve_setting, for the base arm alone, so
    curve_setting = "MAX_WALLCLOCK_SECONDS"      # that its score is known at several lengths; the default

    [common]                             # settings of every arm
    DATA_PATH = "$DATA/shards"           # with environment variables; relative to where ablate.py starts

    [arms.record]
    [arms.wide]
    MLP_MULT = 5
"""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import train_gpt as gpt
from report import table
from runlog import number, parse_line

REPO = Path(__file__).resolve().parent
PATHS = ("DATA_PATH", "TOKENIZER_PATH")
METRICS = {"pre_bpb": "before quantization", "quantized_bpb": "quantized", "ttt_bpb": "after TTT"}
KINDS = {"base": str, "seeds": list, "curve": list, "curve_setting": str, "common": dict, "arms": dict}
# Losses per token compare at equal steps only where these, and so tokens and batches, are the same.
BATCHES = ("DATA_PATH", "TRAIN_BATCH_TOKENS", "VOCAB_SIZE", "HALF_ROWS_UNTIL", "QUARTER_ROWS_UNTIL")


class AblationError(ValueError):
    """The arms file is wrong, or runs cannot be compared."""


# --- arms ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Run:
    """One arm with one seed; `key` tells it from every run with other settings, data or code."""
    arm: str
    seed: int
    settings: dict[str, str]
    text: str                       # hash of the token shards before pairs were joined
    key: str

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.seed}-{self.key}"


@dataclass(frozen=True)
class Arms:
    """An arms file: settings by arm, seeds, the base arm, and in `curve` the base arm at other lengths."""
    base: str
    seeds: tuple[int, ...]
    settings: dict[str, dict[str, str]]
    curve: tuple[str, ...]

    def runs(self, script: Path) -> list[Run]:
        """Every run, seed by seed with the base first, so that what is compared runs close together."""
        code = hashlib.sha256(script.read_bytes()).hexdigest()
        data = {path: data_hashes(Path(path)) for path in
                {settings.get("DATA_PATH", gpt.Config().data_path) for settings in self.settings.values()}}
        found = []
        for seed in self.seeds:
            for arm in sorted(self.settings, key=lambda arm: arm != self.base):
                settings = self.settings[arm] | {"SEED": str(seed)}
                text, shards = data[settings.get("DATA_PATH", gpt.Config().data_path)]
                identity = {name: value for name, value in settings.items() if name not in PATHS}
                content = json.dumps([sorted(identity.items()), shards, code])
                key = hashlib.sha256(content.encode()).hexdigest()[:12]
                found.append(Run(arm, seed, settings, text, key))
        return found


def read_arms(path: Path) -> Arms:
    """Read an arms file and check every setting. Raises AblationError with what is wrong."""
    try:
        import tomllib
    except ImportError:                                  # Python 3.10
        try:
            import tomli as tomllib
        except ImportError:
            raise AblationError("reading TOML needs Python 3.11 or the package tomli; run "
                                "`pip install tomli`") from None
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AblationError(f"{path}: expected an arms file, found: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AblationError(f"{path}: expected TOML, found: {error}") from None
    wrong = [name for name, value in content.items() if not isinstance(value, KINDS.get(name, ()))]
    arms, common = content.get("arms", {}), content.get("common", {})
    wrong = wrong or [f"arms.{name}" for name, arm in arms.items() if not isinstance(arm, dict)]
    if wrong:
        raise AblationError(f'{path}: expected base = "NAME", seeds = [...], curve = [...], curve_setting = "NAME", '
                            f"[common], [arms.NAME] and nothing else; found {wrong}, unknown or of another kind")
    base, seeds = content.get("base"), content.get("seeds", [42])
    if base not in arms:
        raise AblationError(f"{path}: expected `base`, the name of one of [arms.NAME]; found base {base!r}, "
                            f"arms {sorted(arms)}")
    if not seeds or not all(type(seed) is int for seed in seeds) or len(set(seeds)) < len(seeds):
        raise AblationError(f"{path}: expected `seeds` to be different whole numbers, found {seeds}")
    arms = {name: common | arm for name, arm in arms.items()}
    setting = content.get("curve_setting", "MAX_WALLCLOCK_SECONDS")
    extra = {f"{base}@{value}": arms[base] | {setting: value} for value in content.get("curve", [])}
    settings = {name: {key: _value(key, value) for key, value in arm.items()}
                for name, arm in (arms | extra).items()}
    for name, arm in settings.items():
        if not re.fullmatch(r"[\w.+@-]+", name) or "SEED" in arm or "RUN_ID" in arm:
            raise AblationError(f"{path}: arm {name!r}: expected a name of letters, digits and . _ + - "
                                "without SEED and RUN_ID, which are set for each run")
        try:
            gpt.Config.from_env(arm)
        except gpt.ConfigError as error:
            raise AblationError(f"{path}: arm {name}: {error}") from None
        unread = sorted(arm.keys() - {f.upper() for f in asdict(gpt.Config())} - gpt.FIXED_SETTINGS.keys())
        if unread:
            raise AblationError(f"{path}: arm {name}: expected settings of train_gpt.py, found {unread}; see "
                                "`python train_gpt.py --help`")
    return Arms(base, tuple(seeds), settings, tuple(extra))


def _value(name: str, value: Any) -> str:
    """A setting as train_gpt.py reads it; paths become absolute, because runs have their own directory."""
    if name in PATHS and not isinstance(value, str):
        raise AblationError(f"{name}={value}: expected a path in quotes")
    if not isinstance(value, (str, int, float)):
        raise AblationError(f"{name}={value}: expected a text, a number or a boolean")
    if isinstance(value, bool):
        return str(int(value))
    if name not in PATHS or not value:
        return str(value)
    filled = os.path.expandvars(value)
    if "$" in filled:
        raise AblationError(f"{name}={value}: expected the variable to be set; export it first")
    return str(Path(filled).expanduser().absolute())


def data_hashes(folder: Path) -> tuple[str, str]:
    """(hash of the text, hash of the shards) of a data folder; joined shards have the text of their source.

    Without a manifest both come from names and sizes. Raises AblationError when there are no shards.
    """
    shards = {path.name: path.stat().st_size for path in sorted(folder.glob("fineweb_*.bin"))}
    if not shards:
        raise AblationError(f"{folder}: expected token shards, found none; correct DATA_PATH")
    manifest = folder / "manifest.json"
    if not manifest.exists():
        digest = hashlib.sha256(json.dumps(shards).encode()).hexdigest()
        return digest, digest
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        files, original = content["files"], content.get("fused_from", content)["files"]
        # A download may leave out training shards that the manifest lists.
        hashes = [hashlib.sha256(json.dumps({name: listed.get(name) for name in shards}).encode()).hexdigest()
                  for listed in (original, files)]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise AblationError(f"{manifest}: expected a manifest of token shards, found something else; prepare "
                            "the data again") from None
    return hashes[0], hashes[1]


# --- results ------------------------------------------------------------------------------------------------

@dataclass
class Result:
    """What one log says. None: the run did not get there, or does not do that."""
    device: str = ""
    torch: str = ""
    steps: int | None = None
    train_s: float | None = None
    pre_bpb: float | None = None
    quantized_bpb: float | None = None
    ttt_bpb: float | None = None
    eval_s: float | None = None
    val_bytes: int | None = None
    params: int | None = None
    total_bytes: int | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)      # (step, training loss in nats)
    wall_s: float | None = None

    @property
    def final_bpb(self) -> float | None:
        """The score after the last stage that the run has."""
        stage = last_stage([self])
        return stage and getattr(self, stage)


def last_stage(results: list[Result]) -> str | None:
    """The last of METRICS that all of them have: scores of different stages are no comparison."""
    return next((name for name in reversed(METRICS) if all(getattr(each, name) is not None for each in results)), None)


def read_result(lines: list[str]) -> Result:
    """Read the lines of one run's log. Raises AblationError naming a known line that lacks a field."""
    result, loop_step, is_source = Result(), None, False
    for line in lines:
        is_source = line == "source:" or is_source and line != "source_end"
        if is_source:
            continue
        event, fields = parse_line(line)
        try:
            if "layer_loop" in fields:
                loop_step = int(fields["step"])
            elif event == "train speed":
                _read_speed(result, fields, loop_step)
            else:
                _read_line(result, line, event, fields)
        except (KeyError, ValueError, TypeError) as error:
            raise AblationError(f"expected a log line of train_gpt.py, found {line[:80]!r} without "
                                f"{error}") from error
    return result


def _read_speed(result: Result, fields: dict[str, str], loop_step: int | None) -> None:
    """Steps and seconds of training, from the mean step of each loop state."""
    result.steps = int(fields["steps"])
    loops_off = result.steps if loop_step is None else loop_step
    counts = {"loops_off_step_ms": loops_off, "loops_on_step_ms": result.steps - loops_off}
    result.train_s = sum(count * number(fields[name]) for name, count in counts.items() if count) / 1000


def _read_line(result: Result, line: str, event: str, fields: dict[str, str]) -> None:
    if match := re.match(r"(\d+)/\d+ train_loss: (\S+)", line):
        result.curve.append((int(match[1]), float(match[2])))
    elif event == "versions":
        result.device, result.torch = f"{fields['world_size']}x {fields['device']}", fields["torch"]
    elif event == "" and "model_params" in fields:
        result.params = int(fields["model_params"])
    elif event == "train" and "steps_s" in fields:
        result.train_s = number(fields["steps_s"])
    elif event.startswith("diagnostic ") and "val_bpb" in fields:
        is_before = event == "diagnostic pre-quantization post-ema"
        setattr(result, "pre_bpb" if is_before else "quantized_bpb", float(fields["val_bpb"]))
        result.val_bytes = int(fields["bytes"]) if "bytes" in fields else result.val_bytes
    elif event == "quantized_ttt_phased":
        result.ttt_bpb, result.eval_s = float(fields["val_bpb"]), number(fields["eval_time"]) / 1000
    elif event == "Total submission size":
        result.total_bytes = int(next(iter(fields.values())))


# --- running ------------------------------------------------------------------------------------------------

def run_one(run: Run, folder: Path, script: Path, keep_checkpoints: bool) -> Result:
    """Run train_gpt.py in `folder`/runs/NAME and return what it logged; AblationError when it fails."""
    place, cache = folder / "runs" / run.name, folder / "cache"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    known = {name.upper() for name in asdict(gpt.Config())}
    known |= gpt.FIXED_SETTINGS.keys() | gpt.RETIRED_SETTINGS.keys()
    env = {name: value for name, value in os.environ.items()
           if name not in known and not name.startswith(gpt.OWNED_PREFIXES)}
    caches = {"TORCHINDUCTOR_CACHE_DIR": str((cache / "inductor").absolute()),
              "TRITON_CACHE_DIR": str((cache / "triton").absolute())}
    env = caches | env | run.settings | {"RUN_ID": run.name.replace("@", "_at_")}
    start = time.monotonic()
    with open(place / "log.txt", "w", encoding="utf-8") as log:
        process = subprocess.Popen([sys.executable, str(script.absolute())], cwd=place, env=env, stdout=log,
                                   stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        except BaseException:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
    lines = (place / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    if not keep_checkpoints:
        shutil.rmtree(place / "checkpoints", ignore_errors=True)
    if code:
        raise AblationError(f"{run.name}: train_gpt.py ended with exit code {code}; the end of "
                            f"{place / 'log.txt'}:\n"
                            + "\n".join(lines[-8:]))
    result = read_result(lines)
    result.wall_s = round(time.monotonic() - start, 1)
    if result.final_bpb is None:
        raise AblationError(f"{run.name}: expected a score in {place / 'log.txt'}, found none; is this "
                            "train_gpt.py?")
    temporary = place / "result.json.partial"
    identity = {"arm": run.arm, "seed": run.seed, "settings": run.settings, "text": run.text}
    temporary.write_text(json.dumps(identity | asdict(result), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, place / "result.json")
    return result


def finished(run: Run, folder: Path) -> Result | None:
    """The result of an earlier run with the same key, if it was completed. Raises AblationError if it is damaged."""
    path = folder / "runs" / run.name / "result.json"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["curve"] = [tuple(point) for point in content["curve"]]
        return Result(**{name: content[name] for name in asdict(Result())})
    except (ValueError, KeyError, TypeError) as error:
        raise AblationError(f"{path}: expected the result of a finished run, found a damaged file ({error}); remove "
                            "it, then the run is made again") from None


# --- comparing ----------------------------------------------------------------------------------------------

Curve = list[tuple[float, float]]


def reach(curve: Curve, level: float) -> float | None:
    """Where a falling curve (x, y) first comes down to `level`, between its points; None outside of them."""
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        if y0 >= level >= y1 and y0 > y1:
            return x0 + (x1 - x0) * (y0 - level) / (y0 - y1)
    return None


def saved_at_equal(base: Curve, arm: Curve, base_end: tuple[float, float]) -> float | None:
    """Share of the base arm's steps (or seconds) that the arm does without, at equal score.

    base, arm   scores over steps; base_end is the base run of the arm's own length.
    The base curve says how far the base needs to go for the arm's last score. Where it does not reach that
    score, the arm's curve says when the arm had the base's last one. None when neither does. Negative: the
    arm needs more.
    """
    x_arm, level = arm[-1]
    if level == base_end[1]:
        return 1 - x_arm / base_end[0]
    needed = reach(base, level)
    if needed:
        return 1 - x_arm / needed
    had = reach(arm, base_end[1])
    return None if had is None else 1 - had / base_end[0]


def smooth(curve: list[tuple[int, float]], window: int = 3) -> Curve:
    """Means of `window` neighbouring losses. The first steps, logged one by one, are left out."""
    regular = [point for point in curve if point[0] > 10] or curve
    window = min(window, len(regular))
    return [(statistics.fmean(x for x, _ in part), statistics.fmean(y for _, y in part))
            for part in (regular[at:at + window] for at in range(len(regular) - window + 1))]


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds and its standard error (None with one seed)."""
    mean: float
    error: float | None
    count: int

    @classmethod
    def of(cls, values: list[float | None]) -> "Estimate | None":
        known = [value for value in values if value is not None]
        if not known:
            return None
        error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
        return cls(statistics.fmean(known), error, len(known))

    def show(self, form: str, scale: float = 1.0) -> str:
        spread = "" if self.error is None else f" ± {format(scale * self.error, form.replace('+', ''))}"
        return f"{format(scale * self.mean, form)}{spread}"


def compare(arms: Arms, results: dict[tuple[str, int], Result],
            text: dict[tuple[str, int], str]) -> dict[str, dict]:
    """Facts of each arm and its paired differences to the base arm, over the seeds that both have.

    Raises AblationError when two runs differ in card, torch release or text.
    """
    for what, fact in (("cards", lambda key: results[key].device),
                       ("torch releases", lambda key: results[key].torch),
                       ("texts", lambda key: text[key][:12]),
                       ("numbers of validation bytes", lambda key: results[key].val_bytes)):
        found = {key: fact(key) for key in results}
        if len(set(found.values())) > 1:
            groups = {value: sorted(f"{arm} {seed}" for (arm, seed), each in found.items() if each == value)
                      for value in set(found.values())}
            raise AblationError(f"runs on different {what} cannot be compared: " + "; ".join(
                f"{value}: {', '.join(names)}" for value, names in sorted(groups.items(), key=str))
                + "; run all arms in one place, into a new --out")
    present = {arm for arm, _ in results}
    return {arm: _compare_arm(arms, arm, results) for arm in arms.settings if arm in present}


def _compare_arm(arms: Arms, arm: str, results: dict[tuple[str, int], Result]) -> dict:
    seeds = [seed for seed in arms.seeds if (arm, seed) in results]
    own = [results[arm, seed] for seed in seeds]
    facts: dict[str, Any] = {"settings": arms.settings[arm], "seeds": seeds}
    for name in (*METRICS, "steps", "train_s", "eval_s", "wall_s", "total_bytes", "params"):
        facts[name] = Estimate.of([getattr(result, name) for result in own])
    pairs = [(seed, results[arm, seed], results[arms.base, seed])
             for seed in seeds if (arms.base, seed) in results]
    if arm == arms.base or not pairs:
        return facts
    for name in (*METRICS, "steps", "train_s", "eval_s"):
        facts[f"{name}_difference"] = Estimate.of([
            getattr(ours, name) - getattr(base, name) for _, ours, base in pairs
            if getattr(ours, name) is not None and getattr(base, name) is not None])
    if arm in arms.curve:
        return facts
    steps, seconds, by_loss = [], [], []
    for seed, ours, base in pairs:
        curve = [results[name, seed] for name in (*arms.curve, arms.base) if (name, seed) in results]
        stage = last_stage([ours, *curve])
        for axis, saved in (("steps", steps), ("train_s", seconds)):
            if stage and getattr(ours, axis) and getattr(base, axis):
                points = sorted((getattr(run, axis), getattr(run, stage)) for run in curve if getattr(run, axis))
                saved.append(saved_at_equal(points, [(getattr(ours, axis), getattr(ours, stage))],
                                            (getattr(base, axis), getattr(base, stage))))
        same = all(arms.settings[arm].get(name) == arms.settings[arms.base].get(name) for name in BATCHES)
        if same and len(ours.curve) > 1 and len(base.curve) > 1:
            base_curve = smooth(base.curve)
            by_loss.append(saved_at_equal(base_curve, smooth(ours.curve), base_curve[-1]))
    facts["steps_saved"], facts["seconds_saved"] = Estimate.of(steps), Estimate.of(seconds)
    facts["steps_saved_by_train_loss"] = Estimate.of(by_loss)
    return facts


def markdown(arms: Arms, compared: dict[str, dict], device: str) -> str:
    """The comparison as a table."""
    def show(facts: dict, name: str, form: str) -> str:
        return "" if facts.get(name) is None else format(facts[name].mean, form)

    def show_paired(facts: dict, name: str, form: str, scale: float = 1.0, unit: str = "") -> str:
        return "" if facts.get(name) is None else facts[name].show(form, scale) + unit

    head = ["arm", "seeds", "steps", "train s", *(f"BPB {name}" for name in METRICS.values()),
            *(f"difference {name}" for name in METRICS.values()), "steps saved at equal BPB",
            "seconds saved at equal BPB", "steps saved at equal training loss", "bytes", "wall s"]
    rows = []
    for arm, facts in compared.items():
        rows.append([f"**{arm}** (base)" if arm == arms.base else arm, " ".join(map(str, facts["seeds"])),
                     show(facts, "steps", ",.0f"), show(facts, "train_s", ",.1f"),
                     *(show(facts, name, ".5f") for name in METRICS),
                     *(show_paired(facts, f"{name}_difference", "+.5f") for name in METRICS),
                     *(show_paired(facts, name, "+.1f", 100, " %") for name in
                       ("steps_saved", "seconds_saved", "steps_saved_by_train_loss")),
                     show(facts, "total_bytes", ",.0f"), show(facts, "wall_s", ",.0f")])
    changes = []
    for arm, facts in compared.items():
        differing = [f"`{name}={'/'.join(Path(value).parts[-2:]) if name in PATHS else value}`"
                     for name, value in facts["settings"].items()
                     if arm == arms.base or arms.settings[arms.base].get(name) != value]
        changes.append(f"- `{arm}`: {', '.join(differing) or 'the same settings'}")
    return (f"Paired differences to `{arms.base}` (mean ± standard error over seeds) on {device}. Saved: "
            "share of the base arm's steps or seconds that the arm does without, by BPB after the last stage that the "
            "arm, the base and the base's other lengths have.\n\n" + table(head, rows)
            + "\n\nSettings (of other arms than the base: what differs from it):\n\n" + "\n".join(changes)
            + "\n")


def write_table(arms: Arms, runs: list[Run], folder: Path) -> str:
    """Compare what is finished, write results.md and results.json, and return the Markdown."""
    done = [(run, result) for run in runs if (result := finished(run, folder)) is not None]
    if not done:
        raise AblationError(f"{folder}: expected finished runs, found none; run the arms first")
    results = {(run.arm, run.seed): result for run, result in done}
    compared = compare(arms, results, {(run.arm, run.seed): run.text for run, _ in done})
    text = markdown(arms, compared, done[0][1].device)
    missing = [run.name for run in runs if (run.arm, run.seed) not in results]
    if missing:
        text += "\nNot finished: " + ", ".join(f"`{name}`" for name in missing) + "\n"
    (folder / "results.md").write_text(text, encoding="utf-8")
    content = {"base": arms.base, "arms": compared, "missing": missing,
               "runs": [{"arm": run.arm, "seed": run.seed, "key": run.key} | asdict(result)
                        for run, result in done]}
    (folder / "results.json").write_text(json.dumps(content, indent=1, default=asdict) + "\n",
                                         encoding="utf-8")
    return text


# --- main ---------------------------------------------------------------------------------------------------

def main(arguments: list[str] | None = None, script: Path = REPO / "train_gpt.py") -> int:
    """Run the command line; returns 0, 1 (a run failed, or nothing can be compared) or 2 (bad arms file or usage)."""
    parser = argparse.ArgumentParser(prog="ablate.py", description=__doc__.split("\n\nARMS.toml")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", type=Path, metavar="ARMS.toml")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="runs, compile cache and results")
    parser.add_argument("--only", metavar="A,B", help="only these arms besides the base")
    parser.add_argument("--seeds", metavar="S,T", help="these seeds instead of the file's")
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="S",
                        help="begin no run that would probably end later than S seconds from now")
    parser.add_argument("--keep-checkpoints", action="store_true",
                        help="keep weights and artifacts of every run")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    try:
        arms = _chosen(read_arms(options.arms), options.only, options.seeds)
        runs = arms.runs(script)
        _open_out(options.out, is_made=not options.table)
    except AblationError as error:
        print(f"ablate.py: {error}", file=sys.stderr)
        return 2
    failed = 0
    signal.signal(signal.SIGTERM, _terminate)
    try:
        if not options.table:
            failed = _run_all(runs, options.out, script, options.seconds, options.keep_checkpoints)
        print(write_table(arms, runs, options.out))
    except (AblationError, OSError) as error:
        print(f"ablate.py: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, _Terminated) as error:
        print("ablate.py: interrupted; finished runs are kept, start again to go on", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 143
    return 1 if failed else 0


class _Terminated(BaseException):
    """SIGTERM as an exception, so that a run in progress is ended, too."""


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def _chosen(arms: Arms, only: str | None, seeds: str | None) -> Arms:
    names = set(only.split(",")) if only else set(arms.settings)
    unknown = sorted(names - arms.settings.keys())
    if unknown:
        raise AblationError(f"--only: expected some of {sorted(arms.settings)}, found {unknown}")
    try:
        chosen = tuple(int(seed) for seed in seeds.split(",")) if seeds else arms.seeds
    except ValueError:
        chosen = ()
    if not chosen or len(set(chosen)) < len(chosen):
        raise AblationError(f"--seeds {seeds}: expected different whole numbers with commas between them")
    settings = {name: arm for name, arm in arms.settings.items() if name in names | {arms.base}}
    return Arms(arms.base, chosen, settings, tuple(name for name in arms.curve if name in settings))


def _open_out(folder: Path, is_made: bool) -> None:
    try:
        if is_made:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AblationError(f"--out {folder}: expected a folder or a new name, found: {error.strerror}; name "
                            "another") from None
    if not folder.is_dir():
        raise AblationError(f"--out {folder}: expected the folder of finished runs, found none; correct the path")


def _run_all(runs: list[Run], folder: Path, script: Path, limit_s: float, keep_checkpoints: bool) -> int:
    """Run what is not finished; returns how many runs failed."""
    start, longest, failed = time.monotonic(), 0.0, 0
    for count, run in enumerate(runs, start=1):
        if finished(run, folder) is not None:
            print(f"ablate run:{run.name} number:{count}/{len(runs)} finished before", flush=True)
            continue
        if time.monotonic() - start + longest > limit_s:
            print(f"ablate stopping: {limit_s:g} s would not do for run {count}/{len(runs)}; start again to "
                  "go on")
            break
        began = time.monotonic()
        try:
            result = run_one(run, folder, script, keep_checkpoints)
            print(f"ablate run:{run.name} number:{count}/{len(runs)} wall_s:{result.wall_s} "
                  f"steps:{result.steps} bpb:{result.final_bpb:.5f}", flush=True)
        except AblationError as error:
            failed += 1
            print(f"ablate.py: {error}", file=sys.stderr, flush=True)
        longest = max(longest, time.monotonic() - began)
    return failed


if __name__ == "__main__":
    sys.exit(main())
