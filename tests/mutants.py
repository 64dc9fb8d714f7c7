#!/usr/bin/env python3
"""Break one rule at a time in a copy of the repository and see whether the tests that claim the rule notice.

    python tests/mutants.py                 every mutation; the table is committed as tests/mutants.txt
    python tests/mutants.py NAME ...        only these
    python tests/mutants.py --fast          those that continuous integration runs
    python tests/mutants.py --list

A mutation is an exact replacement in train_gpt.py. One whose text is not found is an error: a change of the
program must carry its mutations along. Exit code 1 when a mutation survives, that is when its tests pass, or
when tests that claim a rule fail without any mutation, for then they prove nothing.
"""
from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from processes import FORKS

REPO = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".pytest_cache", "demo_out", "checkpoints",
                                  "data")
TIMEOUT_S = 900


class Mutation(NamedTuple):
    old: str
    new: str
    tests: str               # a test file, or "FILE -k EXPRESSION"
    is_fast: bool = False


def lines(*text: str) -> str:
    return "".join(f"{line}\n" for line in text)


RULES, TTT, HINTS = "tests/test_rules.py -k ", "tests/test_ttt.py -k ", "tests/test_hints.py -k "
STEP = "        optimizer.step(step, lr_factor(cfg, progress) * parts ** -0.5)"
CALIBRATION_READS = RULES + "calibration_reads"
AVERAGE = RULES + "average_takes_in"
TRAIN_CLOCK = RULES + "training_clock"
EVAL_CLOCK = RULES + "evaluation_clock"
OVER_THE_LIMIT = RULES + "over_the_limit"
WHOLE_EVALUATION = TTT + "whole_evaluation"
BYTES = RULES + "bytes_are_those"

# Mutations by name, under the rule that each breaks.
BROKEN_RULES: dict[str, dict[str, Mutation]] = {
    "calibration reads training data only": {
        "calibration_on_validation_in_run": Mutation(
            "collect_hessians(cfg, run, model, data.train, cfg.gptq_calibration_batches)",
            "collect_hessians(cfg, run, model, data.val, cfg.gptq_calibration_batches)",
            CALIBRATION_READS),
        "calibration_on_validation_in_warm_up": Mutation(
            "collect_hessians(cfg, run, model, data.train, num_batches=run.world_size)",
            "collect_hessians(cfg, run, model, data.val, num_batches=run.world_size)",
            CALIBRATION_READS)},
    "the learning rate follows its schedule": {
        "constant_learning_rate": Mutation(
            "optimizer.step(step, lr_factor(cfg, progress) * ",
            "optimizer.step(step, 1.0 * ",
            RULES + "factor_of_its_progress")},
    "the average takes in the weights after each step, with the decay that is set": {
        "average_before_the_step": Mutation(
            lines(STEP, "        average.update()"),
            lines("        average.update()", STEP),
            AVERAGE),
        "another_decay": Mutation(
            "WeightAverage(model, cfg.ema_decay)",
            "WeightAverage(model, 0.9 * cfg.ema_decay)",
            AVERAGE)},
    "training stops early enough for calibration": {
        "stop_without_calibration": Mutation(
            "clock_s + step_s + calibration_s > cfg.max_wallclock_seconds",
            "clock_s + step_s > cfg.max_wallclock_seconds",
            "tests/test_training.py -k one_more_step_and_calibration", is_fast=True),
        "stop_rule_not_told_of_calibration": Mutation(
            "clock.longest_recent(), calibration_s))",
            "clock.longest_recent(), 0.0))",
            RULES + "calibration_measured_in_warm_up")},
    "the training clock is the time that passed, with calibration": {
        "train_clock_halved": Mutation(
            "    train_s = clock.timer.seconds()\n",
            "    train_s = clock.timer.seconds() / 2\n",
            TRAIN_CLOCK),
        "train_clock_without_calibration": Mutation(
            "clock_s, budget_s = train_s + calibration_s,",
            "clock_s, budget_s = train_s,",
            TRAIN_CLOCK)},
    "the evaluation clock holds reading, planning and hints": {
        "eval_clock_after_reading": Mutation(
            lines("    timer = Timer(run)", "    tokens, byte_counts = data.load_validation()"),
            lines("    tokens, byte_counts = data.load_validation()", "    timer = Timer(run)"),
            EVAL_CLOCK),
        "eval_clock_after_planning": Mutation(
            "    scored = certified_order(phases, docs, C)\n",
            lines("    timer = Timer(run)", "    scored = certified_order(phases, docs, C)"),
            EVAL_CLOCK),
        "eval_clock_after_hints": Mutation(
            "    limit = LearningLimit(cfg, run, phases, scored, timer)\n",
            lines("    timer = Timer(run)", "    limit = LearningLimit(cfg, run, phases, scored, timer)"),
            EVAL_CLOCK, is_fast=True)},
    "no kernel is compiled inside the evaluation clock": {
        "base_adaptation_first_runs_in_the_clock": Mutation(
            lines("                with torch.enable_grad():", "                    base.gradient()"),
            "                pass\n",
            TTT + "before_the_clock")},
    "an artifact over the limit is refused": {
        "artifact_over_the_limit": Mutation(
            "if room >= 0]", "if room >= -1000]", OVER_THE_LIMIT, is_fast=True),
        "artifact_over_the_limit_taken_first": Mutation(
            "if 0 <= room and (", "if -1000 <= room and (", OVER_THE_LIMIT),
        "total_over_the_limit": Mutation(
            "if model_bytes + code_bytes > SIZE_LIMIT:",
            "if model_bytes + code_bytes > SIZE_LIMIT + 1000:",
            RULES + "together_stay_within")},
    "the code counts with the bytes of the packed script": {
        "packed_size_halved": Mutation(
            "return ShippedCode(form, len(data),",
            "return ShippedCode(form, len(data) // 2,",
            "tests/test_pack.py -k counts_the_packed")},
    "every target counts once": {
        "coverage_check_removed": Mutation(
            "if score.tokens != len(tokens) - 1:", "if False:", RULES + "leaves_a_target_out")},
    "an evaluation over its budget is reported": {
        "over_budget_report_removed": Mutation(
            "if cfg.eval_wallclock_seconds and seconds > cfg.eval_wallclock_seconds:",
            "if False:",
            RULES + "over_its_budget")},
    "test-time training is compiled before its clock starts": {
        "ttt_warm_up_removed": Mutation(
            "    elif buckets is not None:                             # one graph serves all sizes\n",
            "    elif False:\n",
            RULES + "warm_up_of_test_time"),
        "ttt_warm_up_without_learning": Mutation(
            lines("        scorer.step(buckets.rows[-1], buckets.windows[0], True)",
                  "        scorer.step(buckets.rows[0], buckets.windows[-1], True)"),
            "        scorer.step(buckets.rows[-1], buckets.windows[-1], False)\n",
            RULES + "warm_up_of_test_time")},
    "a loss that is not finite ends the run at any step": {
        "finite_check_at_step_1_only": Mutation(
            "loss_sum += loss",
            "loss_sum += 0 * loss_sum if step else loss",
            "tests/test_pipeline.py -k between_two_log_lines"),
        "finite_check_at_logged_steps_only": Mutation(
            '    require_finite(run, f"train_loss up to step {steps}", run.sum(loss_sum).item())\n', "",
            "tests/test_pipeline.py -k after_the_last_log_line")},
    "adapters and their optimizer belong to one document and begin anew with it": {
        "adapters_of_the_document_before": Mutation(
            lines('            if letter == "B":', "                part.zero_()"),
            lines('            if letter == "B":', "                pass"),
            TTT + "new_batch_keeps_a"),
        "optimizer_of_the_document_before": Mutation(
            "        self.exp_avg_sq[:rows].zero_()\n", "", TTT + "new_batch_keeps_a"),
        "adapters_learn_from_the_document_beside": Mutation(
            "self.bank.update(grads, learns)",
            "self.bank.update(grads.roll(1, 0), learns)",
            TTT + "do_not_see_each_other")},
    "a hint is counted from tokens that have been scored": {
        "hints_one_token_early": Mutation(
            "doc_start)[0].tobytes()",
            "doc_start)[0][np.minimum(np.arange(1, len(doc_start) + 1), len(doc_start) - 1)].tobytes()",
            TTT + "hints_are_counted", is_fast=True),
        "target_counted_before_its_hint_is_looked_up": Mutation(
            "        if (g->total) {\n",
            lines("        g->best += token == top;", "        if (++g->total) {"),
            HINTS + "later_tokens_cannot"),
        "hint_of_the_next_target": Mutation(
            "hints = stream.tokens[target + 1].long(), stream.hints[place].long()",
            "hints = stream.tokens[target + 1].long(), stream.hints[place + 1].long()",
            TTT + "hints_enter_the_score")},
    "a chunk is scored by weights that have not learnt from it": {
        "learn_before_scoring": Mutation(
            "        gradients = self.model.ops.chunk_gradients or chunk_gradients\n",
            lines("        gradients = self.model.ops.chunk_gradients or chunk_gradients",
                  "        if learn:",
                  "            arguments = self.model, self.bank, inputs, at, answers, hints, learns, True",
                  "            self.bank.update(gradients(*arguments)[2], learns)"),
            WHOLE_EVALUATION)},
    "scores come from the adapted base": {
        "stale_cast": Mutation(
            "            scorer.renew_cast()\n",
            "",
            TTT + "cast_of_the_base_as_it_is", is_fast=True)},
    "gradients come from the weights as they are": {
        "stale_training_cast": Mutation(
            "        self.cast = self.model.ops.cast(self.model, self.cast)\n",
            "        self.cast = self.cast or self.model.ops.cast(self.model, self.cast)\n",
            "tests/test_training.py -k cast_of_the_weights")},
    "the base learns from scored documents only": {
        "global_phase_on_unscored_documents": Mutation(
            "is_last = (scored.phase == 0) &",
            "is_last = (scored.phase == scored.phase.max()) &",
            TTT + "base_adapts_only_on_documents"),
        "global_phase_on_all_documents": Mutation(
            "chosen = select_prefix(scored, docs, C, prefix)",
            "chosen = np.arange(len(docs.start))",
            WHOLE_EVALUATION),
        "global_phase_before_the_first": Mutation(
            lines("        limit.begin_phase(number)",
                  '        score_phase(scorer, phase, draws, f"{number + 1}/{len(phases)}", limit)'),
            lines("        limit.begin_phase(number)",
                  "        if number == 0 and len(phases) > 1:",
                  "            chosen = select_prefix(scored, docs, C, prefix)",
                  "            adapt_base(cfg, run, model, tokens, docs, chosen)",
                  '        score_phase(scorer, phase, draws, f"{number + 1}/{len(phases)}", limit)'),
            WHOLE_EVALUATION)},
    "what ships is scored": {
        "weights_in_memory_scored": Mutation(
            "    model.load_state_dict(decode_model(cfg, streams, notes))\n",
            "    decode_model(cfg, streams, notes)\n",
            "tests/test_pipeline.py -k artifact_again")},
    "every row is trained on, or scored, by one rank": {
        "rank_skips_training_rows": Mutation(
            "self.rank, None, self.world_size)",
            "self.rank, None, self.world_size + (self.world_size > 1))",
            "tests/test_data.py -k rank_r_of_R", is_fast=True),
        "rank_skips_scored_rows": Mutation(
            "range(width * run.rank, len(tokens) - 1, width * run.world_size):",
            "range(width * run.rank, len(tokens) - 1, width * (run.world_size + (run.rank == 1))):",
            "tests/test_scoring.py -k ranks_together"),
        "rank_skips_lanes": Mutation(
            "    mine = range(run.rank, len(phase), run.world_size)\n",
            "    mine = range(run.rank, len(phase), run.world_size + (run.rank == 1))\n",
            TTT + "plan_does_not_know_ranks"),
        "rank_skips_a_segment_of_the_base_adaptation": Mutation(
            "    return int(cuts[rank]), int(cuts[rank + 1])\n",
            "    return int(cuts[rank]) + (rank == 1), int(cuts[rank + 1])\n",
            TTT + "rank_shares_tile")},
    "a target counts its own bytes": {
        "sidecar_off_by_one_in_plain_scores": Mutation(
            "(torch.from_numpy(x[1:].astype(np.int64)).to(run.device) for x in (tokens, byte_counts))",
            "(torch.from_numpy(x.astype(np.int64)).to(run.device) for x in (tokens[1:], byte_counts[:-1]))",
            BYTES, is_fast=True),
        "sidecar_off_by_one_in_ttt": Mutation(
            "stream.byte_counts[target + 1], scored)",
            "stream.byte_counts[target], scored)",
            BYTES)}}

MUTATIONS = {name: mutation for mutations in BROKEN_RULES.values() for name, mutation in mutations.items()}


def apply(mutation: Mutation, source: str) -> str:
    """The mutated program. Raises ValueError unless the text to replace occurs exactly once."""
    found = source.count(mutation.old)
    if found != 1:
        raise ValueError(f"expected this text once in train_gpt.py, found it {found} times:\n{mutation.old}\n"
                         "adapt the mutation to the program")
    return source.replace(mutation.old, mutation.new)


def run_pytest(copy: Path, arguments: list[str], env: dict[str, str], output: Path) -> None:
    """pytest in a fork, on a copy of the repository; the exit code is pytest's."""
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(copy)
    sys.dont_write_bytecode = True
    sys.path[:] = [path for path in sys.path if not Path(path or REPO).is_relative_to(REPO)]
    import pytest
    code = pytest.main(arguments)
    sys.stdout.flush()
    os._exit(code)


def tests_pass(tests: str, mutation: Mutation | None = None) -> tuple[bool, str]:
    """Whether these tests pass on a copy, mutated where a mutation is given, and pytest's closing lines."""
    with tempfile.TemporaryDirectory(prefix="mutant_") as folder:
        copy = Path(shutil.copytree(REPO, Path(folder) / "repo", ignore=LEFT_OUT))
        program, output = copy / "train_gpt.py", Path(folder) / "output.txt"
        if mutation is not None:
            program.write_text(apply(mutation, program.read_text(encoding="utf-8")), encoding="utf-8")
        files, _, words = tests.partition(" -k ")
        arguments = ["-q", "-x", "-p", "no:cacheprovider", "--tb=line", *files.split(),
                     *(["-k", words] if words else [])]
        env = {"VECTORS_DIR": str(REPO.parent / "shared" / "vectors"), **os.environ}
        process = FORKS.Process(target=run_pytest, args=(copy, arguments, env, output))
        process.start()
        process.join(TIMEOUT_S)
        if process.exitcode is None:
            process.kill()
            process.join()
        told = output.read_text(encoding="utf-8", errors="replace")
    if process.exitcode not in (0, 1):
        raise RuntimeError(f"pytest could not run {tests}: exit code {process.exitcode}, {told[-2000:]}")
    return process.exitcode == 0, "\n".join(told.strip().splitlines()[-2:])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *MUTATIONS])
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(arguments)
    chosen = [name for name, mutation in MUTATIONS.items()
              if (not options.names or name in options.names) and (mutation.is_fast or not options.fast)]
    survivors, broken, start = 0, set(), time.monotonic()
    for tests in dict.fromkeys(MUTATIONS[name].tests for name in chosen if not options.list):
        pass_unbroken, closing = tests_pass(tests)
        if not pass_unbroken:
            broken.add(tests)
            print(f"FAILS WITHOUT A MUTATION {tests}\n{closing}", flush=True)
    for rule, mutations in BROKEN_RULES.items():
        mine = [name for name in mutations if name in chosen]
        if mine:
            print(f"\n{rule}")
        for name in mine:
            if options.list:
                print(f"    {name}")
                continue
            has_survived, closing = tests_pass(mutations[name].tests, mutations[name])
            survivors += has_survived
            print(f"    {'SURVIVED' if has_survived else 'caught  '} {name:<44} {mutations[name].tests}",
                  flush=True)
    if not options.list:
        print(f"\nmutants mutations:{len(chosen)} survivors:{survivors} failing_unmutated:{len(broken)}")
        print(f"elapsed_s:{time.monotonic() - start:.0f}", file=sys.stderr)
    return 1 if survivors or broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
