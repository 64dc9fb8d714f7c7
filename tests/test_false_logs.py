"""runlog.check: committed logs are believed, and every edit of one that makes it say two things is found.

The edits are those of a review that looked for lies which pass. What is a single statement of a log, such as a loss
with its BPB, cannot be found; README's section on submissions says so.
"""

import re

import pytest

import runlog

ONE, TWO = "h200_330s_graphs_base_seed42", "h200x2_40s_rehearsal"       # on one GPU and on two
OTHER = "h200_330s_graphs_base_seed1337"                                # another run of ONE's recipe


@pytest.fixture(scope="module")
def texts(repo):
    return {name: (repo / "logs" / f"{name}.txt").read_text() for name in (ONE, TWO, OTHER)}


def edit(text, *edits):
    for pattern, replacement in edits:
        text, changes = re.subn(pattern, replacement, text, flags=re.M)
        assert changes, f"{pattern!r} is not in the log"
    return text


def findings(folder, *texts, level="error"):
    runs = []
    for number, text in enumerate(texts):
        path = folder / f"run{number}.txt"
        path.write_text(text)
        runs += runlog.read_runs(path)
    return [finding for finding in runlog.check(runs) if finding.level == level]


# --- what is true stays so ----------------------------------------------------------------------------------


def test_committed_logs_are_called_false_only_for_what_they_lack(repo):
    """Each start says the errors that its kind brings: a part of a run, or beyond a limit; none contradicts itself."""
    runs = []
    for path in sorted(repo.glob("logs/*")):
        if path.suffix in (".txt", ".out"):
            try:
                runs += (starts := runlog.read_runs(path))
            except runlog.NotALog:
                continue
            for run in starts:
                is_whole = None not in (run.stop_ms, run.pre, run.ttt, run.total_bytes)
                is_whole |= run.resumed == "quantize_only" and run.ttt is not None
                expected = {
                    "one uninterrupted run": run.starts > 1 or run.resumed is not None,
                    "complete log": not is_whole,
                    "16,000,000 bytes": (run.total_bytes or 0) > runlog.SIZE_LIMIT,
                }
                told = {finding.rule for finding in runlog.check([run]) if finding.level == "error"}
                assert told == {rule for rule, is_due in expected.items() if is_due}, run.name
    assert not any(finding.rule == "one log per run" for finding in runlog.check(runs))


def test_what_the_check_knows_of_the_program_is_so():
    import train_gpt as gpt

    assert runlog.default_settings() == gpt.shown_settings(gpt.Config())
    assert runlog.CODE_MARGIN == gpt.CODE_MARGIN and runlog.SIZE_LIMIT == gpt.SIZE_LIMIT


def test_what_every_log_says_in_its_own_way_is_believed(tmp_path, texts):
    """A log without the newest settings, line ends of another system, a slower last rank."""
    older = edit(texts[ONE], (r"^  (half|quarter)_rows_until: .*\n", ""))
    slower = edit(texts[TWO], ("load_ms:1836 compile_ms:35487 sum_ms:128535",
                               "load_ms:1936 compile_ms:35587 sum_ms:128735"))
    for text in (older, texts[ONE].replace("\n", "\r\n"), slower):
        assert findings(tmp_path, text) == []


# --- what is false is found ---------------------------------------------------------------------------------

COMMAND, WHOLE, ONCE, CLOCKS = "settings against command", "complete log", "one uninterrupted run", "clocks"
HEADER, SIZES, DOCUMENTS = "header against body", "sizes", "documents"
RETYPED = {
    # settings
    "seed": (COMMAND, "^  seed: 42", "  seed: 7"),
    "run_id": (COMMAND, "^  run_id: base_42", "  run_id: other"),
    "a setting of the command": (COMMAND, "^  ema_decay: 0.97", "  ema_decay: 0.9965"),
    "a setting of the command is gone": (COMMAND, "^  ema_decay: .*\n", ""),
    "a default": (COMMAND, "^  matrix_lr: 0.028", "  matrix_lr: 0.03"),
    "layers": (COMMAND, "^  num_layers: 11", "  num_layers: 12"),
    "width of the MLP": (COMMAND, "^  mlp_mult: 4.0", "  mlp_mult: 5.0"),
    "stop of adaptation": (COMMAND, "^  ttt_stop_after: ", "  ttt_stop_after: 12:3"),
    "audit": (COMMAND, "^  audit: 1", "  audit: 0"),
    "no test-time training": (COMMAND, "^  ttt_enabled: 1", "  ttt_enabled: 0"),
    "no quantization": (COMMAND, "^  prequant_only: 0", "  prequant_only: 1"),
    "no hints": (COMMAND, "^  ngram_tilt_enabled: 1", "  ngram_tilt_enabled: 0"),
    "unverified data": (COMMAND, "^  allow_unverified: 0", "  allow_unverified: 1"),
    "filled artifact": (COMMAND, "^  fill_artifact: 0", "  fill_artifact: 1"),
    "half rows": (COMMAND, "^  half_rows_until: 0.0", "  half_rows_until: 0.35"),
    "budget": (HEADER, "^  max_wallclock_seconds: 330.0", "  max_wallclock_seconds: 600.0"),
    "budget of evaluation": (CLOCKS, "^  eval_wallclock_seconds: 600.0", "  eval_wallclock_seconds: 6000.0"),
    "prefix documents": (HEADER, "^  phased_ttt_prefix_docs: 100", "  phased_ttt_prefix_docs: 200"),
    "settings cut": (COMMAND, "(?:^  ttt_.*\n)+", ""),
    "a command that cannot be read": (COMMAND, "command:\"AUDIT=1", "command:\"AUDIT='1"),
    # clocks and steps
    "time of a progress line": (CLOCKS, "train_time_ms:318502", "train_time_ms:118502"),
    "minutes of a progress line": (CLOCKS, "train_time: 5.3m", "train_time: 5.4m"),
    "training stop": (CLOCKS, "train_time: 325554ms", "train_time: 319000ms"),
    "steps_ms": (CLOCKS, "steps_ms:325554", "steps_ms:300000"),
    "steps_s": (CLOCKS, "steps_s:325.6", "steps_s:300.6"),
    "clock_s": (CLOCKS, "clock_s:327.9", "clock_s:300"),
    "budget of the clock": (CLOCKS, "budget_s:330", "budget_s:600"),
    "calibration": (CLOCKS, "Hessians in 2.4s elapsed_ms:2379", "Hessians in 0.4s elapsed_ms:379"),
    "steps of the stop": ("training steps", "step: 458/20000", "step: 508/20000"),
    "steps of the speed": ("training steps", "steps:458", "steps:508"),
    "limit of steps": ("training steps", "step: 458/20000", "step: 458/30000"),
    "all step counts": (CLOCKS, "(steps?): ?458", r"\1:470"),
    "speed": (CLOCKS, "loops_off_tok_per_s:1402839", "loops_off_tok_per_s:1802839"),
    "time of a step": (CLOCKS, "loops_on_step_ms:831.5", "loops_on_step_ms:500.0"),
    "speeds that do not make the time": (CLOCKS, r"(speed.*)560.6(.*)831.5", r"\g<1>559.6\g<2>820.5"),
    "evaluation, two lines": (CLOCKS, r"eval_time:16232ms(.*\n.*):16.2s total_eval_ms:16232",
                              r"eval_time:6232ms\1:6.2s total_eval_ms:6232"),
    "total_eval_ms": (CLOCKS, "total_eval_ms:16232", "total_eval_ms:6232"),
    "total_eval_time": (CLOCKS, "total_eval_time:16.2s", "total_eval_time:6.2s"),
    "eval_ms": (CLOCKS, "eval eval_ms:16232", "eval eval_ms:6232"),
    "compilation": (CLOCKS, "compile_ms:45844", "compile_ms:844"),
    "loading": (CLOCKS, "load_ms:1657 compile", "load_ms:657 compile"),
    # sizes
    "parameters": (SIZES, "^model_params:35945761", "model_params:25945761"),
    "model": (SIZES, r"quantized\+pergroup: 15883378", "quantized+pergroup: 15783378"),
    "total": (SIZES, r"quantized\+pergroup: 15946646", "quantized+pergroup: 15846646"),
    "model and total": (SIZES, r"15883378 bytes(\nTotal.*: )15946646", r"15783378 bytes\g<1>15846646"),
    "code and total": (SIZES, r"compressed\): 63268([\s\S]*)15946646", r"compressed): 53268\g<1>15936646"),
    "attempt twice": (SIZES, "^(artifact attempt.*\n)", r"\1\1"),
    "a group": (SIZES, "w_up_bytes:5023766", "w_up_bytes:5013766"),
    "form of the code": (SIZES, "code_form:packed", "code_form:source"),
    # documents, tokens, processes, names
    "documents": (HEADER, "total_docs:500", "total_docs:600"),
    "documents and the rest": (DOCUMENTS, "total_docs:500 prefix_docs:100 suffix_docs:400",
                               "total_docs:600 prefix_docs:100 suffix_docs:500"),
    "documents of a batch": (DOCUMENTS, "documents:48", "documents:64"),
    "adapted documents": (HEADER, "adapted_base documents:100", "adapted_base documents:200"),
    "a planned batch": (DOCUMENTS, r"batches:\[5,6\]", "batches:[5,7]"),
    "tokens": ("totals", "val_tokens: 500743", "val_tokens: 400743"),
    "audited targets": ("totals", "^audit targets:500742", "audit targets:500741"),
    "hints": ("totals", "total_targets=500742", "total_targets=400742"),
    "artifact of another run": ("one name", "file:base_42.artifact", "file:base_1337.artifact"),
    "processes": (WHOLE, "world_size:1 ", "world_size:8 "),
    "last line cut short": (WHOLE, r" sum_ms:\d+ limit_ms:600000$", ""),
}
CUT = {
    "train speed": "^train speed.*\n",
    "train clock": "^train clock.*\n",
    "calibration": "^GPTQ:collected.*\n",
    "training stop": "^stopping_early.*\n",
    "reserve": "^gptq:reserving.*\n",
    "parameters": "^model_params.*\n",
    "versions": "^versions.*\n",
    "code": "^code commit.*\n",
    "command": "^run command.*\n",
    "documents": "^ttt_phased.*\n",
    "plan": "^ttt plan.*\n",
    "all batches": "^ttt batch.*\n",
    "adaptation": "^ttt adapted_base.*\n",
    "hints": "^ngram_tilt.*\n",
    "diagnostic": "^diagnostic pre.*\n",
    "training progress": r"^\d+/20000.*\n",
    "five progress lines": r"^(?:100|150|200|250|300)/20000.*\n",
    "looping": "^layer_loop.*\n",
    "audit": "^audit .*\n",
    "clocks of evaluation": "^eval .*\n",
    "total evaluation": "^total_eval.*\n",
    "attempt": "^artifact attempt.*\n",
    "milliseconds of evaluation": " total_eval_ms:16232",
}


@pytest.mark.parametrize("name", RETYPED)
def test_one_of_two_statements_retyped(tmp_path, texts, name):
    rule, pattern, replacement = RETYPED[name]
    told = findings(tmp_path, edit(texts[ONE], (pattern, replacement)))
    assert rule in {finding.rule for finding in told}, told


@pytest.mark.parametrize("name", CUT)
def test_lines_cut(tmp_path, texts, name):
    assert WHOLE in {finding.rule for finding in findings(tmp_path, edit(texts[ONE], (CUT[name], "")))}


def test_cutting_what_shows_the_form_makes_no_older_log(tmp_path, texts):
    """The date alone, or one field alone, shows the present form."""
    dated = edit(texts[ONE], (" date:2026-11-30", " date:2026-11-24"), ("^run command.*\n", ""))
    bare = edit(texts[ONE], ("^run command.*\n", ""), (" (train_time|clock|load|elapsed|total_eval)_ms:\\d+", ""),
                ("^eval .*\n", ""))
    for text in (dated, bare):
        assert WHOLE in {finding.rule for finding in findings(tmp_path, text)}


@pytest.mark.parametrize(("pattern", "replacement"), [
    (r"^ttt batch:3/6.*\n", ""),
    (r"^ttt batch:\d/5.*\n", ""),
    (r"^(ttt batch:3/6.*\n)", r"\1\1"),
    ("^ttt batch:3/6", "ttt batch:3/7"),
])
def test_batches_cut_or_added(tmp_path, texts, pattern, replacement):
    told = findings(tmp_path, edit(texts[ONE], (pattern, replacement)))
    assert DOCUMENTS in {finding.rule for finding in told}


@pytest.mark.parametrize(("edits", "rule"), [
    ([("world_size:2 ", "world_size:8 "), ("NVIDIA H200", "NVIDIA H100 80GB HBM3")], "number of processes"),
    ([("^ttt batch.*\n", "")], WHOLE),
    ([("^ttt batch:17/53.*\n", "")], DOCUMENTS),
    ([("^barrier .*\n", "")], WHOLE),
    ([("total_docs:6250", "total_docs:250"), ("suffix_docs:6125", "suffix_docs:125")], DOCUMENTS),
    ([("(eval_time|total_eval_ms):91212", r"\1:61212"), ("total_eval_time:91.2s", "total_eval_time:61.2s")], CLOCKS),
    ([("eval eval_ms:91212 load_ms:1836", "eval eval_ms:91212 load_ms:836")], CLOCKS),
])
def test_of_several_processes(tmp_path, texts, edits, rule):
    assert rule in {finding.rule for finding in findings(tmp_path, edit(texts[TWO], *edits))}


@pytest.mark.parametrize(("mark", "rule"), [
    ("attention backend", COMMAND),                      # settings of one, all else of the other
    ("ema:applying", CLOCKS),                            # training of one, the rest of the other
    ("artifact code_form", "one name"),
    ("ttt_phased", "one name"),
])
def test_parts_of_two_runs_pasted_together(tmp_path, texts, mark, rule):
    pasted = texts[OTHER][:texts[OTHER].index(mark)] + texts[ONE][texts[ONE].index(mark):]
    assert rule in {finding.rule for finding in findings(tmp_path, pasted)}


@pytest.mark.parametrize("mark", ["attention backend", "ttt_phased", "versions"])
def test_a_part_that_was_run_again(tmp_path, texts, mark):
    """A run that died before its score, with the body of the start that went on from it."""
    died, again = texts[ONE].split("quantized_ttt_phased")[0], texts[ONE][texts[ONE].index(mark):]
    for text in (died + again, texts[ONE] + again):
        assert ONCE in {finding.rule for finding in findings(tmp_path, text)}


def test_one_run_is_not_two_seeds(tmp_path, texts):
    """Even with its command retyped."""
    copy = edit(texts[ONE], ("^  seed: 42", "  seed: 7"), ("RUN_ID=base_42", "RUN_ID=base_42 SEED=7"))
    assert {finding.rule for finding in findings(tmp_path, texts[ONE], copy)} == {"one log per run"}
    other_training = edit(copy, ("train_loss: 2.5145", "train_loss: 2.5144"))
    assert {finding.rule for finding in findings(tmp_path, texts[ONE], other_training)} == {"one log per run"}
    assert not any(finding.rule == "one log per run" for finding in findings(tmp_path, texts[ONE], texts[OTHER]))


def test_a_training_time_retyped_in_all_its_lines_fits_no_speed(tmp_path, texts):
    text = edit(texts[ONE], ("325554", "320000"), ("steps_s:325.6", "steps_s:320.0"),
                ("clock_s:327.9", "clock_s:322.4"), ("clock_ms:327934", "clock_ms:322379"))
    assert CLOCKS in {finding.rule for finding in findings(tmp_path, text)}


def test_without_its_batches_a_retyped_score_does_not_pass(tmp_path, texts):
    told = findings(tmp_path, edit(texts[ONE], ("^ttt batch.*\n", ""), ("val_loss:2.63970888", "val_loss:2.58691470"),
                                   ("val_bpb:1.21829059", "val_bpb:1.19392478")))
    assert WHOLE in {finding.rule for finding in told}


# The run's own warnings

OVER_TRAINING = [
    ("Hessians in 2.4s elapsed_ms:2379", "Hessians in 8.4s elapsed_ms:8379"),
    ("clock_s:327.9 steps_s:325.6 calibration_s:2.4", "clock_s:333.9 steps_s:325.6 calibration_s:8.4"),
    ("clock_ms:327934 steps_ms:325554 calibration_ms:2379", "clock_ms:333934 steps_ms:325554 calibration_ms:8379"),
    ("^data checked split:val", "train warning over_budget_ms:3934 budget_s:330\ndata checked split:val"),
]
OVER_EVALUATION = [
    ("eval_time:16232ms", "eval_time:611000ms"),
    ("total_eval_time:16.2s total_eval_ms:16232$",
     "total_eval_time:611.0s total_eval_ms:611000\neval warning over_budget_s:11.000 budget_s:600"),
    ("eval eval_ms:16232 load_ms:1657 compile_ms:45844 sum_ms:63734",
     "eval eval_ms:611000 load_ms:1657 compile_ms:45844 sum_ms:658501"),
]


def test_an_honest_run_over_its_own_budget_is_told_of(tmp_path, texts):
    text = edit(texts[ONE], *OVER_TRAINING)
    assert findings(tmp_path, text) == []
    assert any("over_budget_ms:3934" in finding.text for finding in findings(tmp_path, text, level="warning"))
    told = findings(tmp_path, edit(texts[ONE], *OVER_EVALUATION))
    assert [finding.text for finding in told] == ["evaluation took 611,000 ms"]


@pytest.mark.parametrize(("edits", "rule"), [
    ([*OVER_TRAINING, ("^train warning.*\n", "")], CLOCKS),                      # the warning cut
    ([*OVER_TRAINING, ("clock_ms:333934", "clock_ms:329934"), ("clock_s:333.9", "clock_s:329.9"),
      ("_ms:8379", "_ms:4379"), ("8\\.4", "4.4")], CLOCKS),                       # all but the warning
    ([*OVER_EVALUATION, ("^eval warning.*\n", "")], CLOCKS),
    ([*OVER_EVALUATION, ("(eval_time|total_eval_ms):611000", r"\1:521127"), ("611.0s", "521.1s")],
     "600 s of evaluation"),
    ([*OVER_EVALUATION, ("(eval_time|eval_ms):611000", r"\1:521127"), ("611.0s", "521.1s"),
      ("658501", "568628")], CLOCKS),                                            # all but the warning
    ([("^Code size .unc", "artifact warning over_limit_bytes:84321 limit_bytes:16000000\nCode size (unc")], SIZES),
])
def test_a_warning_that_stands_or_is_cut_gives_the_lie_away(tmp_path, texts, edits, rule):
    assert rule in {finding.rule for finding in findings(tmp_path, edit(texts[ONE], *edits))}


@pytest.mark.parametrize(("edits", "words"), [
    ([("^layer_loop.*\n", ""),
      ("^stopping", 'train warning:"looping never began, yet evaluation loops" enable_looping_at:0.35\nstopping')],
     "looping never began"),
    ([("^ttt batch:2/6", "ttt adaptation_stopped phase:2 chunks_learnt:9/10 predicted_s:590.0 budget_s:600 "
                         "replay:TTT_STOP_AFTER=12:3\nttt batch:2/6")], "stopped learning after 9/10 chunks"),
    ([("^  ttt_stop_after: ", "  ttt_stop_after: 12:3"), (" python train", " TTT_STOP_AFTER=12:3 python train")],
     "TTT_STOP_AFTER=12:3"),
])
def test_what_the_run_warned_of_is_told(tmp_path, texts, edits, words):
    text = edit(texts[ONE], *edits)
    assert any(words in finding.text for finding in findings(tmp_path, text, level="warning"))
    assert not {finding.rule for finding in findings(tmp_path, text)} & {WHOLE, COMMAND}
