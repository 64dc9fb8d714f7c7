"""Sections 14 and 19: a whole run on a tiny model, its log, its resumed modes and its exit codes."""
import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import train_gpt as gpt
import twins
import two_process_ttt
from helpers import write_shard
from toy_data import VAL_LENGTHS, environment, write_run_data

SETTINGS = dict(run_id="toy", iterations=3, warmup_steps=1, ema_decay=0.5, allow_unverified=False, audit=True,
                ttt_batch_size=3, ttt_lora_lr=0.01, global_ttt_lr=0.01, phased_ttt_prefix_docs=5)

# The least model with a loop and two lanes, for runs whose scores are compared with no other run's.
SMALL = dict(num_layers=2, num_loops=1, loop_start=0, loop_end=0, parallel_start_layer=1)

# What a run needs of this process' environment; every other variable would be compared with every setting's name.
KEPT_VARIABLES = {"PATH", "HOME", "TMPDIR", "CC", "LD_LIBRARY_PATH", "TRITON_INTERPRET", "OMP_NUM_THREADS"}


class Finished:
    """What a run in this process left: exit code, lines on stdout, text on stderr, and its folder."""

    def __init__(self, folder: Path, arguments: tuple[str, ...] = (), **changes) -> None:
        self.folder = folder
        env = environment(**{**SETTINGS, "data_path": folder / "data", **changes})
        out, err = io.StringIO(), io.StringIO()
        with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out),
              contextlib.redirect_stderr(err)):
            for name in os.environ.keys() - KEPT_VARIABLES:
                patch.delenv(name)
            for name, value in env.items():
                patch.setenv(name, value)
            patch.chdir(folder)
            self.code = gpt.main(list(arguments))
        self.lines, self.errors = out.getvalue().splitlines(), err.getvalue()

    def matches(self, pattern: str) -> list[re.Match]:
        return [m for line in self.lines if (m := re.fullmatch(pattern, line))]

    def one(self, pattern: str) -> re.Match:
        """The only line that matches."""
        found = self.matches(pattern)
        assert len(found) == 1, f"{len(found)} lines match {pattern!r}:\n" + "\n".join(self.lines)
        return found[0]

    def score(self, name: str) -> tuple[str, ...]:
        """(loss, bpb, targets, bytes) of a diagnostic, or of the final score, as printed."""
        return self.one(rf"{name} val_loss:(\S+) val_bpb:(\S+) eval_time:\d+ms "
                        r"targets:(\d+) bytes:(\d+)").groups()


PREQUANT, QUANTIZED = "diagnostic pre-quantization post-ema", "diagnostic quantized"
TTT = "quantized_ttt_phased"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Finished:
    """One uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    write_run_data(folder / "data")
    return Finished(folder)


@pytest.fixture
def resumable(whole, tmp_path) -> Path:
    """A copy of the folder the uninterrupted run left."""
    return Path(shutil.copytree(whole.folder, tmp_path / "copy"))


# --- the log ------------------------------------------------------------------------------------------------

N = r"\d+"
FLOAT = r"\d+\.\d+"
LINES = {                                                           # logging.md, one line each
    "settings": r"  matrix_lr: 0\.028",
    "train_shards": "train_shards: 2",
    "val_tokens": f"val_tokens: {sum(VAL_LENGTHS)}",
    "params": rf"model_params:{N}",
    "warmup": "warmup_step: 1/1",
    "loop_warmup": "loop_warmup_step: 1/1",
    "loops": r"layer_loop:enabled step:2 frac:0\.667 encoder:\[0, 1, 2, 1\] decoder:\[2, 1, 2, 3, 4\]",
    "ema": "ema:applying EMA weights",
    "prequant": rf"{PREQUANT} val_loss:\d+\.\d{{8}} val_bpb:\d+\.\d{{8}} eval_time:{N}ms( .*)?",
    "serialized": rf"Serialized model: {N} bytes",
    "code": rf"Code size \(uncompressed\): {N} bytes",
    "code_compressed": rf"Code size \(compressed\): {N} bytes",
    "hessians": r"GPTQ:collected 31 Hessians in \d+\.\ds",
    "artifact": rf"Serialized model quantized\+pergroup: {N} bytes",
    "total": rf"Total submission size quantized\+pergroup: {N} bytes",
    "quantized": rf"{QUANTIZED} val_loss:\d+\.\d{{8}} val_bpb:\d+\.\d{{8}} eval_time:{N}ms( .*)?",
    "ttt_warmup": r"ttt_lora:compile warmup done \(\d+\.\ds\)",
    "hints": rf"ngram_tilt:hints total={sum(VAL_LENGTHS) - 1} gated=({N}) token_gate=\1 within_gate=0 "
             "word_gate=0 agree2plus=0",
    "precompute": rf"ngram_tilt:precompute_done elapsed=\d+\.\d\ds total_targets={sum(VAL_LENGTHS) - 1}",
    "phases": r"ttt_phased: total_docs:13 prefix_docs:5 suffix_docs:8 num_phases:1 boundaries:\[5\]",
    "ttt": rf"{TTT} val_loss:\d+\.\d{{8}} val_bpb:\d+\.\d{{8}} eval_time:{N}ms( .*)?",
    "total_eval": r"total_eval_time:\d+\.\ds"}


def test_whole_run_succeeds(whole):
    assert whole.code == 0 and whole.errors == ""


@pytest.mark.parametrize("line", LINES)
def test_log_has_the_line_people_grep(whole, line):
    whole.one(LINES[line] + "( .*)?")                               # more fields may follow


def test_log_reports_training_progress(whole):
    steps = whole.matches(rf"({N})/3 train_loss: {FLOAT} train_time: \d+\.\dm tok/s: {N} train_time_ms:{N}( .*)?")
    assert [int(m[1]) for m in steps] == [1, 2, 3]


def test_log_lines_come_in_the_order_of_the_stages(whole):
    stages = ["settings", "params", "warmup", "loop_warmup", "loops", "ema", "serialized", "hessians",
              "prequant", "artifact", "quantized", "ttt_warmup", "phases", "hints", "ttt", "total_eval"]
    places = [next(k for k, line in enumerate(whole.lines) if re.match(LINES[name], line)) for name in stages]
    assert places == sorted(places)


def test_log_lists_every_setting_sorted_and_no_home_folder(whole):
    listed = [m[1] for m in whole.matches(r"  (\w+): .*")]
    assert listed == sorted(field.name for field in dataclasses.fields(gpt.Config))
    folder = whole.one(r"  data_path: (.*)")[1]
    assert folder == "/".join((whole.folder / "data").parts[-2:])
    assert not any(str(whole.folder) in line for line in whole.lines)


def test_log_file_has_the_lines_of_stdout(whole):
    assert (whole.folder / "logs" / "toy.txt").read_text().splitlines() == whole.lines


def test_the_source_lies_beside_the_log_which_has_its_hash_and_the_commit(whole):
    source = lzma.decompress((whole.folder / "logs" / "toy.source.py.xz").read_bytes())
    assert source == Path(gpt.__file__).read_bytes()
    line = whole.one(r"code commit:(\S+) code_sha256:(\w{64}) source_sha256:(\w{64}) "
                     r"source_file:logs/toy\.source\.py\.xz")
    assert line[3] == hashlib.sha256(source).hexdigest() and line[2] == gpt.shipped_code().sha256
    assert re.fullmatch(r"[0-9a-f]{40}(\+dirty)?|none", line[1])


def test_the_command_in_the_log_repeats_the_settings(whole):
    command = whole.one('run command:"(.*)"')[1].split()
    stated = dict(word.split("=", 1) for word in command if "=" in word)
    assert stated["DATA_PATH"] == "/".join((whole.folder / "data").parts[-2:])
    cfg = gpt.Config.from_env({**stated, "DATA_PATH": str(whole.folder / "data")})
    assert cfg == gpt.Config.from_env(environment(**{**SETTINGS, "data_path": whole.folder / "data"}))


def test_new_log_lines_follow_the_grammar(whole):
    """An event word (or two), then key:value pairs."""
    for event in ("versions", "run", "code commit", "data checked", "eval eval_ms", "artifact written",
                  "attention", "loss", "blocks", "warmup elapsed_s", "train speed", "train clock_s",
                  "quantize", "artifact", "ttt batch", "ttt adapted_base", "audit"):
        found = [line for line in whole.lines if line.startswith(event)]
        assert found, event
        for line in found:
            assert re.fullmatch(r'\w+( \w+)*( [\w.]+:("[^"]*"|\[[^]]*\]|\S+))+', line), line


def test_all_three_scores_cover_the_same_targets_and_bytes(whole):
    counts = np.fromfile(whole.folder / "data" / "fineweb_val_bytes_000000.bin", "<u2", offset=1024)
    want = str(sum(VAL_LENGTHS) - 1), str(counts[1:].sum())
    assert [whole.score(name)[2:] for name in (PREQUANT, QUANTIZED, TTT)] == [want] * 3
    for name in (PREQUANT, QUANTIZED, TTT):
        loss, bpb, targets, num_bytes = map(float, whole.score(name))
        assert bpb == pytest.approx(loss * targets / num_bytes / np.log(2), abs=1e-7)


def test_reported_sizes_are_those_on_disk(whole):
    size = {name: int(re.search(rf"({N}) bytes", whole.one(LINES[name])[0])[1])
            for name in ("serialized", "artifact", "total", "code", "code_compressed")}
    folder = whole.folder / "checkpoints"
    assert size["serialized"] == (folder / "toy.weights").stat().st_size
    assert size["artifact"] == (folder / "toy.artifact").stat().st_size
    assert size["total"] == size["artifact"] + size["code_compressed"]
    assert size["code"] == Path(gpt.__file__).stat().st_size
    assert sorted(path.name for path in folder.iterdir()) == ["toy.artifact", "toy.weights"]


def test_audit_leaves_the_full_scoring_order_beside_the_log(whole):
    order = np.fromfile(whole.folder / "logs" / "toy.order.bin", "<i8")
    assert np.array_equal(np.sort(order), np.arange(sum(VAL_LENGTHS) - 1))
    audit = whole.one(rf"audit targets:({N}) order_file:logs/toy\.order\.bin sha256:([0-9a-f]{{64}})")
    assert int(audit[1]) == len(order) and audit[2] == hashlib.sha256(order.tobytes()).hexdigest()


# --- resumed and shortened runs -----------------------------------------------------------------------------

def test_quantizing_a_checkpoint_again_gives_the_same_artifact_and_scores(whole, resumable):
    artifact = resumable / "checkpoints" / "toy.artifact"
    before = artifact.read_bytes()
    artifact.unlink()
    again = Finished(resumable, quantize_only=True)
    assert again.code == 0 and artifact.read_bytes() == before
    for name in (PREQUANT, QUANTIZED, TTT):
        assert again.score(name) == whole.score(name)
    assert not again.matches(r".*train_loss.*")


@twins.fast_trellis
def test_trellis_rounding_goes_through_the_whole_run(whole, resumable):
    trellis = Finished(resumable, quantize_only=True, rdo_lambda=1.0, ttt_enabled=False)
    assert trellis.code == 0 and trellis.score(PREQUANT) == whole.score(PREQUANT)
    before, plain, rounded = (float(score[0]) for score in (whole.score(PREQUANT), whole.score(QUANTIZED),
                                                           trellis.score(QUANTIZED)))
    assert rounded != plain and rounded == pytest.approx(before, rel=1e-2)


def test_scoring_an_artifact_again_gives_the_same_scores(whole, resumable):
    (resumable / "checkpoints" / "toy.weights").unlink()
    again = Finished(resumable, ttt_eval_only=True)
    assert again.code == 0
    for name in (QUANTIZED, TTT):
        assert again.score(name) == whole.score(name)
    assert not again.matches(rf"{PREQUANT}.*") and not again.matches("GPTQ:.*")


def test_same_seed_repeats_the_whole_run_and_another_seed_does_not(whole, tmp_path):
    write_run_data(tmp_path / "data")
    again = Finished(tmp_path, prequant_only=True)
    assert again.score(PREQUANT) == whole.score(PREQUANT)
    other = Finished(tmp_path, prequant_only=True, run_id="other", seed=1)
    assert other.score(PREQUANT)[:2] != whole.score(PREQUANT)[:2]


def test_prequant_only_stops_before_quantization(tmp_path):
    write_run_data(tmp_path / "data")
    short = Finished(tmp_path, prequant_only=True, **SMALL)
    assert short.code == 0 and short.score(PREQUANT)
    assert not short.matches("GPTQ:.*") and not short.matches(f"{QUANTIZED}.*")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["toy.weights"]


def test_without_ttt_the_run_ends_with_the_quantized_diagnostic(whole, resumable):
    short = Finished(resumable, ttt_eval_only=True, ttt_enabled=False)
    assert short.code == 0 and short.lines[-1].startswith(QUANTIZED)
    assert short.score(QUANTIZED) == whole.score(QUANTIZED)


def test_without_tilt_no_hints_are_made(whole, resumable):
    plain = Finished(resumable, ttt_eval_only=True, ngram_tilt_enabled=False)
    assert plain.code == 0 and not plain.matches("ngram_tilt:.*")
    assert plain.score(TTT)[2:] == whole.score(TTT)[2:] and plain.score(TTT)[1] != whole.score(TTT)[1]


def test_wall_clock_stops_training_early_and_says_so(tmp_path):
    write_run_data(tmp_path / "data")
    stopped = Finished(tmp_path, prequant_only=True, iterations=10**6, max_wallclock_seconds=1.0,
                       gptq_reserve_seconds=0.5, enable_looping_at=0.0, **SMALL)
    assert stopped.code == 0
    stopped.one("gptq:reserving 0.5s, effective=500ms")
    steps = int(stopped.one(rf"stopping_early: wallclock_cap train_time: {N}ms step: ({N})/1000000")[1])
    stopped.one(r"layer_loop:enabled step:0 frac:0\.000 .*")
    assert 0 < steps < 10**6


def test_validation_tokens_are_not_read_before_training_has_ended(whole, tmp_path, monkeypatch):
    """While training runs the validation shards hold nothing but their headers."""
    write_run_data(tmp_path / "data")
    shards = sorted((tmp_path / "data").glob("fineweb_val_*.bin"))
    contents = {path: path.read_bytes() for path in shards}
    open_data, train = gpt.Dataset.open, gpt.train

    def open_then_hide(cfg):
        data = open_data(cfg)
        for path, content in contents.items():
            path.write_bytes(content[:gpt.SHARD_HEADER_BYTES])
        return data

    def train_then_show(*args):
        seconds = train(*args)
        for path, content in contents.items():
            path.write_bytes(content)
        return seconds
    monkeypatch.setattr(gpt.Dataset, "open", open_then_hide)
    monkeypatch.setattr(gpt, "train", train_then_show)
    run = Finished(tmp_path, prequant_only=True)
    assert run.code == 0 and len(shards) == 2
    assert run.score(PREQUANT) == whole.score(PREQUANT)
    weights = [(folder / "checkpoints" / "toy.weights").read_bytes() for folder in (tmp_path, whole.folder)]
    assert weights[0] == weights[1]


def test_before_training_only_headers_of_validation_shards_are_read(whole):
    """Opening the data folder does not look at a single validation token."""
    folder = whole.folder / "data"
    read = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt, "read_shard", lambda path: read.append(path))
        patch.setattr(np, "fromfile", lambda path, *args, **kwargs: read.append(path))
        patch.setattr(np, "memmap", lambda path, *args, **kwargs: read.append(path))
        data = gpt.Dataset.open(gpt.Config(data_path=str(folder)))
    assert data.val_tokens == sum(VAL_LENGTHS) and not read


# --- exit codes and messages --------------------------------------------------------------------------------

def test_bad_settings_and_usage_end_with_two(tmp_path):
    for changes, message in (({"iteration": 3}, "did you mean ITERATIONS"),
                             ({"iterations": "three"}, "a whole number"),
                             ({"quantize_only": True, "ttt_eval_only": True}, "at most one of"),
                             ({"within_boost": 1}, "not causal")):
        run = Finished(tmp_path, **changes)
        assert run.code == 2 and message in run.errors and run.lines == []
    usage = Finished(tmp_path, ("--quick",))
    assert usage.code == 2 and "--quick" in usage.errors
    assert not list(tmp_path.iterdir())                             # nothing was started


def test_help_ends_with_zero_and_lists_every_setting(tmp_path):
    run = Finished(tmp_path, ("--help",))
    assert run.code == 0
    for field in dataclasses.fields(gpt.Config):
        assert any(f"`{field.name.upper()}`" in line for line in run.lines), field.name


def test_missing_data_checkpoint_and_artifact_end_with_one(tmp_path):
    assert "no such folder" in check_failure(Finished(tmp_path))
    write_run_data(tmp_path / "data")
    assert "toy.weights: cannot be read" in check_failure(Finished(tmp_path, quantize_only=True))
    assert "toy.artifact: cannot be read" in check_failure(Finished(tmp_path, ttt_eval_only=True))


def test_damaged_and_foreign_artifacts_end_with_one(resumable):
    assert "NUM_LOOPS=2 (now 1)" in check_failure(Finished(resumable, ttt_eval_only=True, num_loops=1))
    path = resumable / "checkpoints" / "toy.artifact"
    path.write_bytes(path.read_bytes()[:-1])
    assert "truncated or corrupted" in check_failure(Finished(resumable, ttt_eval_only=True))


def test_validation_without_bytes_ends_with_one(resumable):
    path = resumable / "data" / "fineweb_val_bytes_000000.bin"
    write_shard(path, np.zeros(sum(VAL_LENGTHS)))
    (resumable / "data" / "manifest.json").unlink()
    run = Finished(resumable, ttt_eval_only=True, allow_unverified=True,
                   tokenizer_path=resumable / "data" / "toy.model")
    assert "sidecar is all zero" in check_failure(run)


def check_failure(run: Finished) -> str:
    assert run.code == 1 and run.errors.startswith("error: ") and "Traceback" not in run.errors
    assert run.errors.count("\n") == 1
    return run.errors


def environment_without_ranks() -> dict[str, str]:
    return {name: value for name, value in os.environ.items()
            if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}


def test_command_line_passes_the_exit_code_on(repo, tmp_path):
    env = {**environment_without_ranks(), "ITERATION": "3"}
    done = subprocess.run([sys.executable, str(repo / "train_gpt.py")], cwd=tmp_path, env=env,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "did you mean ITERATIONS" in done.stderr
    assert "Traceback" not in done.stderr


# --- nothing false gets out ---------------------------------------------------------------------------------

def change_value(path: Path, index: int = -1) -> None:
    """Change one value of a shard, leaving its length and the time of its last change as they were."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[2 * index] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def test_a_changed_byte_count_is_refused_once_the_checkpoint_is_written(tmp_path):
    write_run_data(tmp_path / "data")
    change_value(tmp_path / "data" / "fineweb_val_bytes_000000.bin")
    run = Finished(tmp_path, **SMALL)
    assert "fineweb_val_bytes_000000.bin: SHA-256" in check_failure(run)
    # no score, nothing lost
    assert run.matches("Serialized model: .*") and not run.matches(f"{PREQUANT}.*")
    assert "but manifest.json says" in check_failure(Finished(tmp_path, quantize_only=True, **SMALL))


def test_a_changed_training_token_is_refused_before_training(tmp_path):
    write_run_data(tmp_path / "data")
    change_value(tmp_path / "data" / "fineweb_train_000001.bin")
    run = Finished(tmp_path)
    assert "fineweb_train_000001.bin: SHA-256" in check_failure(run)
    assert not run.matches(".*train_loss.*") and not list((tmp_path / "logs").iterdir())


def test_what_was_checked_is_remembered_and_a_changed_file_is_checked_again(resumable):
    again = Finished(resumable, ttt_eval_only=True, ttt_enabled=False)
    assert again.one(r"data checked split:val files:2 read:(\d) .*")[1] == "0"
    change_value(resumable / "data" / "fineweb_val_000000.bin")
    assert "fineweb_val_000000.bin: SHA-256" in check_failure(Finished(resumable, ttt_eval_only=True))


def test_a_remembered_fault_of_the_validation_split_is_told_before_training(tmp_path):
    write_run_data(tmp_path / "data")
    path = tmp_path / "data" / "fineweb_val_000000.bin"
    change_value(path)
    facts = gpt.read_facts(path, 10**6)
    stamp = gpt.file_stamp(path, sum(VAL_LENGTHS))
    sidecar = path.with_name("fineweb_val_bytes_000000.bin")
    (tmp_path / "data" / gpt.CHECKED_NAME).write_text(json.dumps({"files": {
        path.name: [stamp, facts],
        sidecar.name: [gpt.file_stamp(sidecar, sum(VAL_LENGTHS)), gpt.read_facts(sidecar, 10**6)]}}))
    run = Finished(tmp_path)
    assert "fineweb_val_000000.bin: SHA-256" in check_failure(run) and not run.matches(".*train_loss.*")


def test_weights_that_are_not_finite_end_the_run_without_a_checkpoint(tmp_path, monkeypatch):
    write_run_data(tmp_path / "data")
    apply = gpt.WeightAverage.apply

    def spoil(average):
        apply(average)
        if average.decay < 1:                                       # not the copy that warm-up goes back to
            average.params[0].data[0] = float("nan")
    monkeypatch.setattr(gpt.WeightAverage, "apply", spoil)
    message = check_failure(Finished(tmp_path, **SMALL))
    assert "the averaged weights after step 3 holds NaN or infinity in stage training" in message
    assert "last good value: train_loss" in message and not list((tmp_path / "checkpoints").iterdir())


def make_seventh_step_infinite(monkeypatch):
    train_rows, steps = gpt.train_rows, []

    def one_bad_step(*args, **kwargs):
        steps.append(train_rows(*args, **kwargs))
        return steps[-1] * (float("inf") if len(steps) == 7 else 1)
    monkeypatch.setattr(gpt, "train_rows", one_bad_step)


def test_a_loss_that_is_not_finite_between_two_log_lines_ends_the_run(tmp_path, monkeypatch):
    write_run_data(tmp_path / "data")
    make_seventh_step_infinite(monkeypatch)
    message = check_failure(Finished(tmp_path, iterations=9, warmup_steps=0, **SMALL))
    assert "train_loss up to step 9 is inf" in message and "at step 5;" in message


def test_a_loss_that_is_not_finite_after_the_last_log_line_ends_the_run(tmp_path, monkeypatch):
    """A run that its clock stops ends between two log lines."""
    write_run_data(tmp_path / "data")
    make_seventh_step_infinite(monkeypatch)
    monkeypatch.setattr(gpt, "plan_step", lambda cfg, step, *rest: (step / cfg.iterations, step == 8))
    message = check_failure(Finished(tmp_path, iterations=100, warmup_steps=0, **SMALL))
    assert "train_loss up to step 8 is inf" in message and "at step 5;" in message


@pytest.mark.parametrize("stage, changes", [
    ("diagnostic pre-quantization post-ema", dict(quantize_only=True)),
    ("scoring", dict(ttt_eval_only=True))])
def test_a_score_that_is_not_finite_ends_with_one(resumable, monkeypatch, stage, changes):
    result = gpt.BpbMeter.result

    def spoil(meter):
        if meter.run.stage_name == stage:
            meter.sums[0] = float("nan")
        return result(meter)
    monkeypatch.setattr(gpt.BpbMeter, "result", spoil)
    run = Finished(resumable, **changes)
    assert f"val_loss is nan in stage {stage}; last good value: " in check_failure(run)
    assert not run.matches(".*val_bpb:nan.*")


def test_calibration_that_is_not_finite_ends_with_one(resumable, monkeypatch):
    collect = gpt.collect_hessians

    def spoil(*args):
        stats = collect(*args)
        stats.sums["head"][0, 0] = float("nan")
        return stats
    monkeypatch.setattr(gpt, "collect_hessians", spoil)
    assert "a calibration statistic holds NaN or infinity in stage calibration" in check_failure(
        Finished(resumable, quantize_only=True))


def test_an_artifact_other_than_the_one_written_is_refused(resumable, monkeypatch):
    write_artifact = gpt.write_artifact

    def replaced(cfg, run, *rest):
        digest, path = write_artifact(cfg, run, *rest), gpt.artifact_path(run)
        streams, notes = gpt.read_container(path, gpt.ARTIFACT_MAGIC, cfg)
        notes["more"] = 1
        path.write_bytes(gpt.build_container(gpt.ARTIFACT_MAGIC, cfg, streams, notes, run.origin))
        return digest
    monkeypatch.setattr(gpt, "write_artifact", replaced)
    assert "toy.artifact: SHA-256" in check_failure(Finished(resumable, quantize_only=True))


def test_the_log_has_the_hash_and_the_size_of_the_file_that_ships(whole):
    path = whole.folder / "checkpoints" / "toy.artifact"
    whole.one(f"artifact written file:toy.artifact sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}")
    code = int(whole.one(rf"Code size \(compressed\): ({N}) bytes")[1])
    assert code == gpt.shipped_code().num_bytes
    whole.one(rf"Total submission size quantized\+pergroup: {path.stat().st_size + code} bytes")


def test_the_size_is_that_of_the_file_on_disk(resumable, monkeypatch):
    write_file = gpt.write_file
    monkeypatch.setattr(gpt, "write_file", lambda path, data: write_file(
        path, data + b"more" * (path.suffix == ".artifact")))
    run = Finished(resumable, quantize_only=True)
    written = (resumable / "checkpoints" / "toy.artifact").stat().st_size
    run.one(rf"Serialized model quantized\+pergroup: {written} bytes")
    assert "checksum mismatch" in check_failure(run)


def test_a_run_does_not_overwrite_an_earlier_one(whole):
    before = {path: path.read_bytes() for path in whole.folder.rglob("*") if path.is_file()}
    again = Finished(whole.folder)
    assert again.code == 2 and "RUN_ID=toy: logs/toy.txt exists from an earlier run" in again.errors
    assert before == {path: path.read_bytes() for path in whole.folder.rglob("*") if path.is_file()}


def test_resuming_with_another_setting_or_tokenizer_is_refused_by_name(resumable):
    for changes, message in ((dict(quantize_only=True, matrix_lr=0.5), "MATRIX_LR=0.028 (now 0.5)"),
                             (dict(quantize_only=True, seed=3), "SEED=42 (now 3)"),
                             (dict(quantize_only=True, muon_row_normalize=False), "MUON_ROW_NORMALIZE=1 (now 0)"),
                             (dict(ttt_eval_only=True, embed_bits=6), "EMBED_BITS=7 (now 6)")):
        assert message in check_failure(Finished(resumable, **changes))
    manifest, merges = (resumable / "data" / name for name in ("manifest.json", "merges.json"))
    facts = json.loads(manifest.read_text())
    merges.write_text("a list")
    joined = {"file": merges.name, "count": 1, "sha256": hashlib.sha256(b"a list").hexdigest()}
    manifest.write_text(json.dumps({**facts, "merges": joined}))
    for mode in ("quantize_only", "ttt_eval_only"):
        assert "made with other joined pairs" in check_failure(Finished(resumable, **{mode: True}))
    run = Finished(resumable, run_id="joined", prequant_only=True, iterations=1, **SMALL)
    run.one(rf"run run_id:joined .* data_source:manifest merges:1 merges_sha256:{joined['sha256'][:16]}")
    model = resumable / "data" / "toy.model"
    model.write_bytes(model.read_bytes() + b"\x9a\x06\0")           # an empty field that readers skip
    facts["tokenizer"]["sha256"] = hashlib.sha256(model.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(facts))
    for mode in ("quantize_only", "ttt_eval_only"):
        assert "made with a tokenizer of SHA-256" in check_failure(Finished(resumable, **{mode: True}))


def test_resuming_that_fails_at_its_start_leaves_everything_as_it_was(resumable):
    source = resumable / "logs" / "toy.source.py.xz"
    source.write_bytes(b"the text of an earlier script")
    before = {path: path.read_bytes() for path in resumable.rglob("*") if path.is_file()}
    for changes in (dict(quantize_only=True, seed=3), dict(ttt_eval_only=True, embed_bits=6)):
        check_failure(Finished(resumable, **changes))
        check_failure(Finished(resumable, run_id="nothing", **changes))
        assert before == {path: path.read_bytes() for path in resumable.rglob("*") if path.is_file()}
    assert Finished(resumable, ttt_eval_only=True).code == 0
    assert lzma.decompress(source.read_bytes()) == Path(gpt.__file__).read_bytes()


def test_settings_of_later_stages_may_change_on_resuming_and_other_code_is_a_warning(resumable, monkeypatch):
    monkeypatch.setattr(gpt, "shipped_code", lambda: gpt.ShippedCode("packed", 40_000, "0" * 64, 200_000))
    run = Finished(resumable, quantize_only=True, ttt_enabled=False, embed_bits=6, eval_seq_len=16)
    assert run.code == 0
    run.one(r"artifact warning file:toy\.weights made_with_code:[0-9a-f]{16} code:0{16}")


def test_a_file_in_place_of_the_checkpoint_folder_is_found_before_training(tmp_path):
    write_run_data(tmp_path / "data")
    (tmp_path / "weights").write_text("no folder")
    run = Finished(tmp_path, checkpoint_dir="weights")
    assert "CHECKPOINT_DIR=weights: expected a folder to write to, found: " in check_failure(run)
    assert not run.matches(".*train_loss.*")


def test_too_little_room_and_a_missing_compiler_are_found_before_training(tmp_path, monkeypatch):
    write_run_data(tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 10**6))
        run = Finished(tmp_path)
        assert re.search(r"expected room for 16,\d{3},\d{3} bytes, found 1,000,000", check_failure(run))
        assert not run.matches(".*train_loss.*")
    monkeypatch.setenv("CC", "no-such-compiler")
    gpt.compile_c.cache_clear()
    assert "no C compiler: expected `no-such-compiler`" in check_failure(Finished(tmp_path))


def test_scoring_alone_needs_no_folder_to_write_checkpoints_to(resumable, monkeypatch):
    write_file = gpt.write_file

    def read_only(path, data):
        if "checkpoints" in path.parts:
            raise OSError(errno.EROFS, "Read-only file system")
        write_file(path, data)
    monkeypatch.setattr(gpt, "write_file", read_only)
    assert Finished(resumable, ttt_eval_only=True).code == 0


def test_an_artifact_that_cannot_be_read_is_an_error_in_words(resumable, monkeypatch):
    read = Path.read_bytes

    def locked(path):
        if path.suffix == ".artifact":
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(path)
    monkeypatch.setattr(Path, "read_bytes", locked)
    assert "toy.artifact: cannot be read (Permission denied)" in check_failure(Finished(resumable, ttt_eval_only=True))


def test_too_little_room_for_hints_is_found_before_training(tmp_path, monkeypatch):
    write_run_data(tmp_path / "data")
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 900)
                        if Path(folder) == Path(tempfile.gettempdir()) else usage(folder))
    run = Finished(tmp_path)
    assert f"expected room for {4 * sum(VAL_LENGTHS)} bytes, found 900" in check_failure(run)
    assert not run.matches(".*train_loss.*")
    assert Finished(tmp_path, ngram_tilt_enabled=False, prequant_only=True, iterations=1, **SMALL).code == 0


def test_checkpoint_dir_holds_checkpoint_and_artifact(tmp_path):
    write_run_data(tmp_path / "data")
    assert Finished(tmp_path, checkpoint_dir="elsewhere/weights", ttt_enabled=False, **SMALL).code == 0
    left = sorted(path.name for path in (tmp_path / "elsewhere" / "weights").iterdir())
    assert left == ["toy.artifact", "toy.weights"]
    assert not (tmp_path / "checkpoints").exists()


def test_calibration_belongs_to_the_training_clock_and_comes_first(whole):
    clock = whole.one(rf"train clock_s:.* clock_ms:({N}) steps_ms:({N}) calibration_ms:({N})")
    total, steps, calibration = map(int, clock.groups())
    assert abs(total - steps - calibration) <= 1 and calibration > 0
    assert calibration == int(whole.one(r"GPTQ:collected .* elapsed_ms:(\d+)")[1])
    order = [k for start in ("GPTQ:collected", "train clock_s", PREQUANT)
             for k, line in enumerate(whole.lines) if line.startswith(start)]
    assert order == sorted(order)


def test_evaluation_clocks_are_in_the_log_in_milliseconds_with_their_sum(whole):
    line = whole.one(rf"eval eval_ms:({N}) load_ms:({N}) compile_ms:({N}) sum_ms:({N}) .*")
    parts = list(map(int, line.groups()))
    assert abs(sum(parts[:3]) - parts[3]) <= 2
    assert parts[0] == int(whole.one(rf"total_eval_time:\S+s total_eval_ms:({N})")[1])
    assert parts[0] == int(whole.one(rf"{TTT} .*eval_time:({N})ms.*")[1])


def test_a_training_clock_over_its_budget_is_reported(resumable, monkeypatch):
    monkeypatch.setattr(gpt, "train", lambda cfg, *rest: cfg.max_wallclock_seconds - 0.0001)
    run = Finished(resumable, run_id="late", max_wallclock_seconds=9.0, ttt_enabled=False, iterations=10**6)
    assert int(run.one(rf"train warning over_budget_ms:({N}) budget_s:9")[1]) >= 0
    assert Finished(resumable, run_id="later", ttt_enabled=False).matches("train warning.*") == []


# --- signals and launches -----------------------------------------------------------------------------------

def launch(folder: Path, processes: int, script: str = "train_gpt.py", **changes) -> subprocess.Popen:
    """A run as run.sh starts it."""
    env = environment_without_ranks()
    env |= environment(**{**SETTINGS, "data_path": folder / "data", **changes})
    env |= {"PYTHONPATH": f"{gpt.REPO}{os.pathsep}{gpt.REPO / 'tests'}", "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable]
    if processes > 1:
        command += [str(gpt.REPO / "launch.py"), str(processes)]
    return subprocess.Popen([*command, str(gpt.REPO / script)], cwd=folder, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


class Ended(NamedTuple):
    """How a launch ended; ended_s is counted from the signal that was sent once it trained."""
    code: int
    errors: str
    log: str
    ended_s: float


def end_of(processes: int, number: signal.Signals | None = None, script: str = "train_gpt.py", **changes) -> Ended:
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), Path(name) / "logs" / "toy.txt"
        write_run_data(folder / "data")
        with launch(folder, processes, script, **changes) as run:
            try:
                if number is not None:
                    while not run.stdout.readline().startswith("5/1000000 train_loss"):
                        assert run.poll() is None, run.stderr.read()
                    run.send_signal(number)
                started = time.monotonic()
                _, errors = run.communicate(timeout=60)
            finally:
                run.terminate()                                     # one that does not end by itself
        return Ended(run.returncode, errors, log.read_text() if log.exists() else "", time.monotonic() - started)


# Those that wait for a time to pass come first: the others run meanwhile.
LAUNCHES = {
    "hang": dict(processes=2, script="tests/two_process_hang.py", iterations=10**6, **SMALL),
    "SIGTERM": dict(processes=2, number=signal.SIGTERM, iterations=10**6, **SMALL),
    "SIGINT": dict(processes=1, number=signal.SIGINT, iterations=10**6, **SMALL),
    "no checkpoint": dict(processes=2, quantize_only=True),
    "bad setting": dict(processes=2, iteration=3)}


def endings() -> dict[str, Ended]:
    with ThreadPoolExecutor(2) as pool:
        ends = {name: pool.submit(end_of, **arguments) for name, arguments in LAUNCHES.items()}
    return {name: end.result() for name, end in ends.items()}


@pytest.mark.two_process
@pytest.mark.early(work=endings)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_all_ranks_with_one_line(early, name):
    end = early(endings)[name]
    assert end.code == 128 + signal.Signals[name]
    assert end.errors == f"interrupted by {name} in stage training\n"
    assert end.ended_s < 30
    assert end.log.endswith("error Interrupted\n")


@pytest.mark.two_process
@pytest.mark.early(work=endings)
@pytest.mark.parametrize("name, code, message", [
    ("bad setting", 2, "did you mean ITERATIONS"), ("no checkpoint", 1, "toy.weights: cannot be read")])
def test_two_processes_tell_an_error_once_and_keep_the_exit_code(early, name, code, message):
    end = early(endings)[name]
    assert end.code == code and message in end.errors
    assert end.errors.startswith("error: ") and end.errors.count("\n") == 1


@pytest.mark.two_process
@pytest.mark.early(work=endings)
def test_a_rank_that_hangs_is_noticed_with_its_stage(early):
    end = early(endings)["hang"]
    assert end.code == 1 and "made no progress for" in end.errors and "in stage training" in end.errors
    assert end.errors.count("\n") == 1
    assert gpt.HANG_LIMIT_S + 5 <= 120


# --- two processes ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def one_and_two(whole, tmp_path_factory):
    """Results of scoring the same artifact in one process and on both ranks, and the launch's output."""
    folder = Path(shutil.copytree(whole.folder, tmp_path_factory.mktemp("two") / "run"))
    repo = gpt.REPO
    settings = environment(**{**SETTINGS, "data_path": folder / "data", "ttt_eval_only": True,
                              "global_ttt_lr": 0.05})
    env = {**os.environ, **settings, "PYTHONPATH": f"{repo}{os.pathsep}{repo / 'tests'}",
           "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(repo / "launch.py"), "2",
                           str(repo / "tests" / "two_process_ttt.py"), str(folder)],
                          cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    order = (folder / "logs" / "toy.order.bin").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cfg = gpt.Config.from_env(settings)
        with gpt.Run.start(cfg, {}) as run:
            one = two_process_ttt.results(cfg, run)
    assert order == (folder / "logs" / "toy.order.bin").read_bytes()
    return one, *(dict(np.load(folder / f"rank{rank}.npz")) for rank in (0, 1)), done.stdout.splitlines()


@pytest.mark.two_process
def test_two_processes_score_what_one_scores(one_and_two):
    one, rank0, rank1, _ = one_and_two
    for name in ("plain", "ttt"):
        for field in ("tokens", "bytes"):
            assert one[f"{name}_{field}"] == rank0[f"{name}_{field}"] == rank1[f"{name}_{field}"]
        for field in ("loss", "bpb"):
            assert rank0[f"{name}_{field}"] == rank1[f"{name}_{field}"]
            assert rank0[f"{name}_{field}"] == pytest.approx(one[f"{name}_{field}"], abs=1e-6)


@pytest.mark.two_process
def test_two_processes_adapt_the_base_as_one_does(one_and_two):
    """Both ranks end with the same weights, and their token-weighted halves are the whole gradient."""
    one, rank0, rank1, lines = one_and_two
    names = [name for name in one if name.startswith("weight_")]
    assert len(names) == sum(map(len, gpt.PARAMETER_TABLE.values()))
    for name in names:
        assert np.array_equal(rank0[name], rank1[name]), name
        np.testing.assert_allclose(rank0[name], one[name], rtol=0, atol=1e-5, err_msg=name)
    assert sum(bool(re.match(r"ttt adapted_base documents:5 sgd_steps:[1-9]", line)) for line in lines) == 1


@pytest.mark.two_process
def test_two_processes_follow_the_same_plan_and_log_once(whole, one_and_two):
    """The scoring order is the same file (checked where it is made) with the same digest; only rank 0
    writes."""
    lines = one_and_two[-1]
    audits = [line for line in lines if line.startswith("audit ")]
    assert audits == [whole.one("audit .*")[0]]
    assert sum(line.startswith(TTT) for line in lines) == 1


@pytest.mark.two_process
def test_the_log_tells_which_rank_came_last_to_a_barrier(one_and_two):
    barriers = [re.fullmatch(r'barrier before:"(.*)" last_rank:([01]) waits_ms:\[([\d.]+), ([\d.]+)\]', line)
                for line in one_and_two[-1] if line.startswith("barrier ")]
    assert [found[1] for found in barriers] == ["scoring", "hints", "hints", "base adaptation", "the score"]
    for found in barriers:
        assert float(found[3 + int(found[2])]) == min(float(found[3]), float(found[4]))
