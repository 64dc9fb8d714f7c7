#!/usr/bin/env python3
"""Break one rule at a time in a copy of the repository and see whether the tests that claim the rule notice.

    python tests/mutants.py                 every mutation; the table is committed as tests/mutants.txt
    python tests/mutants.py NAME ...        only these
    python tests/mutants.py --fast          those that continuous integration runs
    python tests/mutants.py --list

A mutation is an exact replacement in train_gpt.py. One whose text is not found is an error: a change of the
program must
carry its mutations along. Exit code 1 when a mutation survives, that is when its tests pass.
"""
from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".pytest_cache", "demo_out", "checkpoints", "data")
TIMEOUT_S = 900


class Mutation(NamedTuple):
    rule: str
    old: str
    new: str
    tests: str               # what pytest is given: files, -k expressions
    is_fast: bool = False


def lines(*text: str) -> str:
    return "".join(f"{line}\n" for line in text)


RULES = "tests/test_rules.py -k "
MUTATIONS = {
    "calibration_on_validation_in_run": Mutation(
        "calibration reads training data only",
        "    stats = collect_hessians(cfg, run, model, data.train, cfg.gptq_calibration_batches)",
        "    stats = collect_hessians(cfg, run, model, data.val, cfg.gptq_calibration_batches)",
        RULES + "calibration_reads", True),
    "calibration_on_validation_in_warm_up": Mutation(
        "calibration reads training data only",
        "collect_hessians(cfg, run, model, data.train, num_batches=run.world_size)",
        "collect_hessians(cfg, run, model, data.val, num_batches=run.world_size)",
        RULES + "calibration_reads"),
    "constant_learning_rate": Mutation(
        "the learning rate follows its schedule",
        "optimizer.step(step, lr_factor(cfg, progress))", "optimizer.step(step, 1.0)",
        RULES + "factor_of_its_progress", True),
    "average_before_the_step": Mutation(
        "the average takes in the weights after the step",
        lines("        optimizer.step(step, lr_factor(cfg, progress))", "        average.update()"),
        lines("        average.update()", "        optimizer.step(step, lr_factor(cfg, progress))"),
        RULES + "average_takes_in", True),
    "another_decay": Mutation(
        "the average has the decay that is set",
        "WeightAverage(model, cfg.ema_decay)", "WeightAverage(model, 0.9 * cfg.ema_decay)",
        RULES + "average_takes_in"),
    "stop_without_calibration": Mutation(
        "training stops early enough for calibration",
        "clock_s + step_s + calibration_s > cfg.max_wallclock_seconds", "clock_s + step_s > "
                                                                        "cfg.max_wallclock_seconds",
        "tests/test_training.py -k one_more_step_and_calibration"),
    "stop_rule_not_told_of_calibration": Mutation(
        "training stops early enough for calibration",
        "clock.longest_recent(), calibration_s))", "clock.longest_recent(), 0.0))",
        RULES + "calibration_measured_in_warm_up"),
    "train_clock_halved": Mutation(
        "the training clock is the time that passed",
        "    train_s = clock.timer.seconds()\n", "    train_s = clock.timer.seconds() / 2\n",
        RULES + "training_clock", True),
    "train_clock_without_calibration": Mutation(
        "calibration belongs to the training clock",
        "clock_s, budget_s = train_s + calibration_s,", "clock_s, budget_s = train_s,",
        RULES + "training_clock"),
    "eval_clock_after_reading": Mutation(
        "the evaluation clock holds reading, planning and hints",
        lines("    timer = Timer(run)", "    tokens, byte_counts = data.load_validation()"),
        lines("    tokens, byte_counts = data.load_validation()", "    timer = Timer(run)"),
        RULES + "evaluation_clock", True),
    "eval_clock_after_planning": Mutation(
        "the evaluation clock holds reading, planning and hints",
        "    scored = certified_order(phases, docs, C)\n",
        lines("    timer = Timer(run)", "    scored = certified_order(phases, docs, C)"),
        RULES + "evaluation_clock"),
    "eval_clock_after_hints": Mutation(
        "the evaluation clock holds reading, planning and hints",
        "    stream = make_stream(run, tokens, byte_counts, hints, cfg)\n",
        lines("    stream = make_stream(run, tokens, byte_counts, hints, cfg)", "    timer = Timer(run)"),
        RULES + "evaluation_clock"),
    "artifact_over_the_limit": Mutation(
        "an artifact 1,000 bytes over the limit is refused",
        "if room >= 0]", "if room >= -1000]", RULES + "over_the_limit", True),
    "artifact_over_the_limit_taken_first": Mutation(
        "an artifact 1,000 bytes over the limit is refused",
        "if 0 <= room and (", "if -1000 <= room and (", RULES + "over_the_limit"),
    "packed_size_halved": Mutation(
        "the code counts with the bytes of the packed script",
        "    return code.num_bytes\n", "    return code.num_bytes // 2\n", "tests/test_pack.py -k "
                                                                           "counts_the_packed", True),
    "coverage_check_removed": Mutation(
        "every target counts once",
        "if score.tokens != len(tokens) - 1:", "if False:", RULES + "leaves_a_target_out"),
    "over_budget_report_removed": Mutation(
        "an evaluation over its budget is reported",
        "if cfg.eval_wallclock_seconds and seconds > "
        "cfg.eval_wallclock_seconds:", "if False:", RULES + "over_its_budget"),
    "ttt_warm_up_removed": Mutation(
        "test-time training is compiled before its clock starts",
        lines("    model.sizes_vary = cfg.compile", "    if cfg.compile:"),
        lines("    model.sizes_vary = cfg.compile", "    if False:"), RULES + "warm_up_of_test_time"),
    "finite_check_at_step_1_only": Mutation(
        "a loss that is not finite ends the run at any step",
        "        loss_sum += loss\n", "        loss_sum += loss if step == 0 else 0\n",
        "tests/test_pipeline.py -k between_two_log_lines"),
    "adapters_into_the_wrong_document": Mutation(
        "adapters and their optimizer begin anew with each document",
        lines("                bank = reusable", "                bank.reset()"), lines("                "
                                                                                        "bank = reusable"),
        "tests/test_ttt.py"),
    "hints_one_token_early": Mutation(
        "a hint is counted from tokens that have been scored",
        "hints = ngram_hints(tokens, order, doc_start,", "hints = ngram_hints(tokens, np.roll(order, -1), "
                                                         "doc_start,",
        "tests/test_ttt.py"),
    "global_phase_on_unscored_documents": Mutation(
        "the base learns from scored documents only",
        "is_last = (scored.phase == 0) &", "is_last = (scored.phase == scored.phase.max()) &",
        "tests/test_hints.py tests/test_ttt.py"),
    "weights_in_memory_scored": Mutation(
        "what ships is scored",
        "    model.load_state_dict(decode_model(cfg, streams, notes))", "    dict(decode_model(cfg, "
                                                                        "streams, notes))",
        "tests/test_pipeline.py -k artifact_again"),
    "rank_skips_training_rows": Mutation(
        "every row is trained on by one rank",
        "self.rank, None, self.world_size)", "self.rank, None, self.world_size + (self.world_size > 1))",
        "tests/test_data.py -k rank_r_of_R", True),
    "rank_skips_scored_rows": Mutation(
        "every row is scored by one rank",
        "len(tokens) - 1, width * run.world_size):", "len(tokens) - 1, width * (run.world_size + (run.rank "
                                                     "== 1))):",
        "tests/test_training.py -k same_targets_as_one"),
    "sidecar_off_by_one_in_plain_scores": Mutation(
        "a target counts its own bytes",
        "(x[1:].astype(np.int64)).to(run.device) for x in (tokens, byte_counts))",
        "(x.astype(np.int64)).to(run.device) for x in (tokens[1:], byte_counts[:-1]))",
        RULES + "bytes_are_those", True),
    "sidecar_off_by_one_in_ttt": Mutation(
        "a target counts its own bytes",
        "meter.add(tilted, stream.byte_counts[target + 1], scored)", "meter.add(tilted, "
                                                                     "stream.byte_counts[target], scored)",
        RULES + "bytes_are_those"),
}


def apply(mutation: Mutation, source: str) -> str:
    """The mutated program. Raises ValueError unless the text to replace occurs exactly once."""
    found = source.count(mutation.old)
    if found != 1:
        raise ValueError(f"expected this text once in train_gpt.py, found it {found} times:\n{mutation.old}\n"
                         "adapt the mutation to the program")
    return source.replace(mutation.old, mutation.new)


def survives(mutation: Mutation) -> tuple[bool, str]:
    """Whether the tests pass on a mutated copy, and pytest's closing line."""
    with tempfile.TemporaryDirectory(prefix="mutant_") as folder:
        copy = Path(shutil.copytree(REPO, Path(folder) / "repo", ignore=LEFT_OUT))
        program = copy / "train_gpt.py"
        program.write_text(apply(mutation, program.read_text(encoding="utf-8")), encoding="utf-8")
        files, _, words = mutation.tests.partition(" -k ")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files.split(),
                   *(["-k", words] if words else [])]
        env = {"VECTORS_DIR": str(REPO.parent / "shared" / "vectors"), **os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest could not run {mutation.tests}: {(done.stdout + done.stderr)[-2000:]}")
    return done.returncode == 0, done.stdout.strip().splitlines()[-1]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *MUTATIONS])
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(arguments)
    chosen = {name: mutation for name, mutation in MUTATIONS.items()
              if (not options.names or name in options.names) and (mutation.is_fast or not options.fast)}
    survivors = 0
    for name, mutation in chosen.items():
        if options.list:
            print(f"{name}: {mutation.rule}")
            continue
        start = time.monotonic()
        has_survived, closing = survives(mutation)
        survivors += has_survived
        print(f"{'SURVIVED' if has_survived else 'caught  '} {name:<38} {time.monotonic() - start:5.0f} s  "
              f"{mutation.tests}"
              f"{'  ' + closing if has_survived else ''}", flush=True)
    if not options.list:
        print(f"mutants mutations:{len(chosen)} survivors:{survivors}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
