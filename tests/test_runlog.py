"""runlog.py: logs of the whole family are read, and what is false or against the rules in them is found."""

import math

import pytest

import runlog
from log_samples import BYTES, TARGETS, write_log


def read(path):
    (run,) = runlog.read_runs(path)
    return run


def found(runs, level="error"):
    return [finding for finding in runlog.check(runs) if finding.level == level]


@pytest.fixture(scope="session")
def public(repo):
    """The runs of PR #2124 and PR #2135, from excerpts of their logs."""
    return {path.stem: read(path) for path in sorted((repo / "tests" / "data").glob("*.log"))}


# --- reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "event", "fields"),
    [
        (
            "500/20000 train_loss: 2.5734 tok/s: 8152722",
            "500/20000",
            {"train_loss": "2.5734", "tok/s": "8152722"},
        ),
        (
            "stopping_early: wallclock_cap step: 4852/20000",
            "",
            {"stopping_early": "wallclock_cap", "step": "4852/20000"},
        ),
        ("diagnostic quantized val_bpb:1.07", "diagnostic quantized", {"val_bpb": "1.07"}),
        (
            "layer_loop:enabled step:2146 encoder:[0, 1, 2] decoder:[5]",
            "",
            {"layer_loop": "enabled", "step": "2146", "encoder": "[0, 1, 2]", "decoder": "[5]"},
        ),
        ('attention backend:math reason:"no GPU"', "attention", {"backend": "math", "reason": "no GPU"}),
        (
            "ngram_tilt:precompute_done elapsed=11.70s",
            "",
            {"ngram_tilt": "precompute_done", "elapsed": "11.70s"},
        ),
        ("a line without fields", "a line without fields", {}),
    ],
)
def test_lines_are_split_in_event_and_fields(line, event, fields):
    assert runlog.parse_line(line) == (event, fields)


def test_public_logs_give_their_published_tables(public):
    run = public["pr2124_seed42"]
    assert (run.pre.bpb, run.quantized.bpb, run.ttt.bpb, run.ttt.loss) == (
        1.06357301,
        1.07110057,
        1.05872644,
        2.31688588,
    )
    assert (run.eval_ms, run.total_eval_s, run.stop_ms, run.total_bytes, run.steps) == (
        521127,
        521.1,
        596047,
        15_984_321,
        4852,
    )
    assert (public["pr2124_seed0"].ttt.bpb + run.ttt.bpb) / 2 == pytest.approx(1.05953936, abs=1e-9)
    scores = [run.ttt.bpb for name, run in public.items() if name.startswith("pr2135")]
    assert len(scores) == 3 and f"{sum(scores) / 3:.5f}" == "1.05651"


def test_our_logs_give_their_facts_and_nothing_from_the_source_in_them(tmp_path):
    run = read(write_log(tmp_path))
    assert (run.seed, run.steps, run.stop_ms, run.train_clock_ms, run.eval_ms) == (
        42,
        4852,
        596047,
        599100,
        521127,
    )
    assert (run.ttt.bpb, run.ttt.targets, run.ttt.bytes, run.code_bytes) == (
        1.05872644,
        TARGETS,
        BYTES,
        42190,
    )
    assert (
        run.tok_per_s == (8_090_000, 5_460_000)
        and run.hardware == "8x NVIDIA H100 80GB HBM3"
        and run.is_record
    )
    assert (
        run.groups == {"tok_emb": 2368389, "w_up": 5433508} and run.identity["data_source"] == "check_figures"
    )
    assert dict(run.stages())["training"] == 596.047 and dict(run.stages())["compilation of scoring"] == 30


def test_speed_without_a_speed_line_comes_from_the_progress_lines(public):
    off, on = public["pr2124_seed42"].tok_per_s
    assert off == 8090276 and 5.3e6 < on < 5.6e6


def test_unrounded_milliseconds_win_over_rounded_seconds(tmp_path):
    path = write_log(tmp_path)
    path.write_text(
        path.read_text().replace(
            "clock_s:599.1 steps_s:596.0 calibration_s:3.1 budget_s:600",
            "clock_s:599.1 steps_s:596.0 budget_s:600 clock_ms:599147 steps_ms:596047",
        )
    )
    assert read(path).train_clock_ms == 599147


def test_a_log_with_two_runs_shows_both(tmp_path):
    path = write_log(tmp_path)
    path.write_text(path.read_text() + path.read_text().replace("1.05872644", "1.5"))
    first, second = runlog.read_runs(path)
    assert (first.name, second.name, first.ttt.bpb, second.ttt.bpb) == ("any#1", "any#2", 1.05872644, 1.5)
    assert not first.is_record and not second.is_record
    assert any("holds 2 starts" in finding.text for finding in found([first, second]))


def test_committed_logs_are_read(repo):
    names = [
        run.name for path in sorted((repo / "logs").glob("h100_*.txt")) for run in runlog.read_runs(path)
    ]
    assert names if list((repo / "logs").glob("h100_*.txt")) else True


@pytest.mark.parametrize(
    "damage",
    [
        ("val_bpb:1.05872644 ", ""),
        ("eval_time:521127ms", "eval_time:soon"),
        ("total_docs:50000 ", ""),
        ("(compressed): 42190", "(compressed):"),
    ],
)
def test_a_damaged_line_is_refused_by_name_or_found_missing(tmp_path, damage):
    path = write_log(tmp_path, name="damaged")
    path.write_text(path.read_text().replace(*damage))
    try:
        run = read(path)
    except runlog.LogError as error:
        assert "damaged.txt" in str(error)
    else:
        assert any("no line says" in finding.text for finding in found([run]))


@pytest.mark.parametrize("text", ["", "hello\n", "quantized_ttt_phased val_loss:1 val_bpb:1 eval_time:1ms\n"])
def test_other_files_are_no_logs(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(runlog.NotALog, match="notes.txt"):
        runlog.read_runs(path)
    with pytest.raises(runlog.LogError, match="correct the path"):
        runlog.read_runs(tmp_path / "absent.txt")


@pytest.mark.parametrize(
    "changes",
    [
        {"world_size": 1},
        {"device": "NVIDIA H200"},
        {"budget": "180.0"},
        {"val_tokens": 499_931},
        {"is_finished": False},
    ],
)
def test_other_machines_budgets_data_and_unfinished_runs_are_no_record(tmp_path, changes):
    assert not read(write_log(tmp_path, **changes)).is_record


# --- checks -------------------------------------------------------------------------------------------------


def test_a_sound_record_run_has_no_error(tmp_path):
    assert runlog.check([read(write_log(tmp_path))]) == []


# Each change makes one number false or breaks one rule, and the finding names it.
FALSE = {
    "score": ({"ttt": "1.04872644"}, "loss and BPB make"),
    "loss": ({"ttt_loss": "2.30688589"}, "loss and BPB make"),
    "diagnostic": ({"pre": "1.05366570"}, "loss and BPB make"),
    "byte count": (
        {"num_bytes": 161_074_499, "ttt_loss": "2.47024638", "pre": "0.99763007", "quantized": "1.00469091"},
        "byte sidecar",
    ),
    "coverage": ({"targets": TARGETS - 5000, "num_bytes": BYTES - 15786}, "targets of"),
    "hints": ({"hints": TARGETS - 5}, "hints were made"),
    "nan": ({"ttt": "nan"}, "nan"),
    "infinite loss": ({"loss": "inf"}, "inf"),
    "sum of sizes": ({"total_bytes": 15_900_000}, "make 15,984,321"),
    "size limit": ({"model_bytes": 15_957_811, "total_bytes": 16_000_001}, "hold 16,000,001 bytes"),
    "size limit by the parts": (
        {"model_bytes": 15_957_811, "total_bytes": 15_999_999},
        "hold 15,999,999 bytes",
    ),
    "eval limit unrounded": ({"eval_ms": 600_001, "eval_s": "600.0"}, "evaluation took 600,001 ms"),
    "eval seconds": ({"eval_s": "421.1"}, "total_eval_time 421.1"),
    "train limit": ({"stop_ms": 600_001, "clock_s": "603.1"}, "optimizer steps took 600,001 ms"),
    "train clock": ({"clock_s": "590.0"}, "train clock"),
    "reserve": ({"effective": 598_000}, "leave 596,000"),
    "reserve of the header": ({"reserving": "2"}, "reserves 4 s"),
    "prefix documents": ({"adapted": 1250}, "1,250"),
    "prefix boundary": ({"prefix": 1250, "suffix": 48750}, "1,250"),
    "documents": ({"suffix": 40000}, "do not add up"),
    "data": ({"data_source": "unverified"}, "data_source:unverified"),
    "more shards than there are": ({"shards": 81}, "81 shards"),
    "unfinished": ({"is_finished": False}, "no line says final score"),
}


@pytest.mark.parametrize("name", FALSE)
def test_a_false_number_or_broken_limit_is_an_error(tmp_path, name):
    changes, words = FALSE[name]
    assert any(words in finding.text for finding in found([read(write_log(tmp_path, **changes))]))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("4500/20000", "400/20000", "do not increase"),
        ("train_time: 9.1m", "train_time: 9.9m", "the line says 9.9"),
        ("train_time: 9.1m tok/s: 6482476", "train_time: 0.5m tok/s: 117989475", "training time falls"),
        ("4500/20000 train_loss", "4900/20000 train_loss", "stopped at step 4852"),
        (f" targets:{TARGETS} bytes:{BYTES}", "", "no totals in the score line"),
        ("frac:0.350", "frac:0.200", "looping was to begin"),
        ("  seed: 42\n", "", "seed"),
        (
            "total_eval_time",
            "quantized_ttt_phased val_loss:2.3 val_bpb:1.05 eval_time:1ms\ntotal_eval_time",
            "2 final score lines",
        ),
        ("  train_batch", "  quantize_only: 1\n  train_batch", "QUANTIZE_ONLY=1"),
    ],
)
def test_a_log_that_contradicts_itself_is_found(tmp_path, old, new, words):
    path = write_log(tmp_path)
    path.write_text(path.read_text().replace(old, new, 1))
    assert any(words in finding.text for finding in found(runlog.read_runs(path)))


def test_on_one_gpu_the_last_running_score_is_the_final_one(tmp_path):
    run = read(write_log(tmp_path, world_size=1))
    assert any("last batch left 1.059000" in finding.text for finding in found([run]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"clock_s": "601.4", "stop_ms": 598_347, "effective": 598_000},
            "steps and calibration took 601,400 ms",
        ),
        ({"eval_ms": 580_000, "eval_s": "580.0"}, "with loading and compilation"),
        ({"shards": 78}, "78 of the 80"),
        ({"world_size": 4}, "record machine"),
    ],
)
def test_what_breaks_only_the_harshest_reading_is_a_warning(tmp_path, changes, words):
    run = read(write_log(tmp_path, **changes))
    assert any(words in finding.text for finding in found([run], "warning"))


def test_published_runs_pass_but_the_one_made_with_other_settings(public):
    by_run = {finding.run for finding in found(list(public.values())) if finding.run != "all runs"}
    assert by_run == {"pr2124_seed1234"}
    told = " ".join(finding.text for finding in found([public["pr2124_seed1234"]]))
    assert "1,000" in told and "1,250" in told and "596,000" in told and "598,000" in told
    best = [run for name, run in public.items() if name.startswith("pr2135")]
    assert found(best) == [] and any("606,5" in finding.text for finding in found(best, "warning"))


def test_settings_that_differ_across_seeds_are_listed(tmp_path):
    first, second = write_log(tmp_path, "first", seed=1), write_log(tmp_path, "second", seed=2)
    assert found([read(first), read(second)]) == []
    second.write_text(second.read_text().replace("beta2: 0.95", "beta2: 0.99"))
    (finding,) = found([read(first), read(second)])
    assert "beta2 is 0.95 in first, 0.99 in second" in finding.text


def test_one_seed_counts_once_and_runs_share_machine_and_data(tmp_path):
    runs = [read(write_log(tmp_path, "a")), read(write_log(tmp_path, "b", shards=79))]
    told = [str(finding) for finding in found(runs)]
    assert any("seed 42 occurs 2 times" in text for text in told) and any(
        "same training shards" in text for text in told
    )


def test_runs_on_other_joined_pairs_are_not_one_recipe(tmp_path):
    logs = [write_log(tmp_path, f"s{seed}", seed=seed, data_source=f"manifest merges:9 merges_sha256:{digest}")
            for seed, digest in ((1, "00a1"), (2, "00a1"), (3, "00b2"))]
    older = write_log(tmp_path, "older", seed=4, data_source="manifest merges:9")      # did not say which
    assert found([read(path) for path in (*logs[:2], older)]) == []
    (finding,) = found([read(path) for path in (*logs, older)])
    assert "same joined pairs: 00a1 in s1, 00a1 in s2, 00b2 in s3" in str(finding)


def test_other_code_is_a_warning(tmp_path):
    first, second = write_log(tmp_path, "first", seed=1), write_log(tmp_path, "second", seed=2)
    for path, code in ((first, "aa"), (second, "bb")):
        path.write_text(
            path.read_text().replace("train_shards", f"code commit:abc code_sha256:{code}\ntrain_shards", 1)
        )
    assert any(finding.rule == "same code" for finding in found([read(first), read(second)], "warning"))
    first.write_text(first.read_text().replace("commit:abc", "commit:abc+dirty"))
    assert any("not committed" in finding.text for finding in found([read(first)], "warning"))


def test_unrounded_clocks_of_loading_and_compilation_count_in_the_harshest_reading(tmp_path):
    path = write_log(tmp_path)
    path.write_text(
        path.read_text()
        + "eval eval_ms:521127 load_ms:40000 compile_ms:38874 sum_ms:600001 limit_ms:600000\n"
    )
    assert any("600,001 ms with loading" in finding.text for finding in found([read(path)], "warning"))


def test_with_few_steps_looping_may_begin_one_step_late(tmp_path):
    path = write_log(tmp_path)
    path.write_text(
        path.read_text()
        .replace("step: 4852/", "step: 4/")
        .replace("steps:4852", "steps:4")
        .replace("frac:0.350", "frac:0.500")
    )
    assert not any("looping" in finding.text for finding in found([read(path)]))


@pytest.mark.parametrize(("late_ms", "is_honest"), [(2500, True), (3500, False)])
def test_the_last_step_of_a_slow_machine_may_end_after_the_reserve_began(tmp_path, late_ms, is_honest):
    path = write_log(tmp_path, stop_ms=596_000 + late_ms)
    path.write_text(path.read_text().replace("loops_on_step_ms:144.0", "loops_on_step_ms:3000.0"))
    assert is_honest == (not any("at most a step" in finding.text for finding in found([read(path)])))


def test_small_losses_are_rounded_as_far_as_large_ones(tmp_path):
    run = read(write_log(tmp_path))
    for thousandths in range(50, 300, 7):
        for name, part in (("pre", 1000.1), ("quantized", 990.1), ("ttt", 1010.1)):
            loss, bpb = thousandths / part, thousandths / part / 3 / math.log(2)
            setattr(run, name, runlog.Diagnostic(round(loss, 8), round(bpb, 8), 1.0, 480_000, 1_440_000))
        assert not [finding for finding in found([run]) if finding.rule == "val_loss against val_bpb"]


# Half rows and joined tokens: steps and tokens that are not the record's

def half_rows_log(folder, until: str, switch: str, tokens_per_s: int):
    """The sample with half rows until step 2,146, its 500th step after 0.8 minutes."""
    path = write_log(folder)
    text = path.read_text().replace("  iterations:", f"  half_rows_until: {until}\n  iterations:")
    text = text.replace("layer_loop:enabled", f"{switch}layer_loop:enabled")
    text = text.replace("8152722", str(tokens_per_s)).replace("tok/s: 6482476", "tok/s: 4937000")
    path.write_text(text)
    return read(path)


@pytest.mark.parametrize(("switch", "half_steps"), [
    ("", 2146), ("rows:half step:0 frac:0.0\nrows:whole step:1000 frac:0.2\n", 1000)])
def test_half_rows_count_half(tmp_path, switch, half_steps):
    run = half_rows_log(tmp_path, "0.35", switch, 4_076_361)
    assert run.tokens_at(0) == 0 and run.tokens_at(500) == 500 * 393216
    assert run.tokens_at(4852) == half_steps * 393216 + (4852 - half_steps) * 786432


def test_quarter_rows_count_a_quarter(tmp_path):
    changes = "rows:quarter step:0 frac:0.0\nrows:half step:100 frac:0.1\nrows:whole step:300 frac:0.3\n"
    run = half_rows_log(tmp_path, "0.35", changes, 4_076_361)
    assert [run.tokens_at(step) for step in (40, 100, 200, 400)] == [
        786432 * rows for rows in (10, 25, 75, 225)]


def test_a_run_of_half_rows_fits_its_own_clock(tmp_path):
    rule = "header against body"
    good = half_rows_log(tmp_path / "good", "0.35", "", 4_076_361)       # 500 half steps in 48.2 s
    assert not [finding for finding in found([good]) if finding.rule == rule]
    as_whole = half_rows_log(tmp_path / "whole", "0.0", "", 4_076_361)
    assert "step 500: 4,076,361 tokens/s make 1.61 minutes" in " ".join(finding.text for finding in found([as_whole]))


@pytest.mark.parametrize(("num_bytes", "is_published"), [(BYTES, True), (BYTES + 6000, True), (BYTES - 3, False),
                                                         (BYTES + 9000, False)])
def test_joined_tokens_of_the_published_split_are_known_by_their_bytes(tmp_path, num_bytes, is_published):
    fewer = 38_700_000
    changes = dict(val_tokens=fewer + 1, targets=fewer, hints=fewer, num_bytes=num_bytes)
    run = read(write_log(tmp_path, data_source="manifest merges:99", **changes))
    assert run.merges == 99 and run.is_published_data == is_published
    assert not read(write_log(tmp_path, data_source="manifest", **changes)).is_published_data
    assert not any("byte sidecar" in finding.text for finding in found([run]))
