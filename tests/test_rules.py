"""Rules of the competition that a change of one line could break unnoticed; tests/mutants.py breaks them on
purpose."""
import itertools

import numpy as np
import pytest
import torch

import train_gpt as gpt
from helpers import tiny_config
from toy_data import VAL_LENGTHS, random_byte_counts, random_stream, write_run_data


class Clock:
    """time.perf_counter that stands still until it is told to go on."""

    def __init__(self, monkeypatch):
        self.now_s = 1000.0
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(gpt.time, "perf_counter", lambda: self.now_s)

    def takes(self, owner, name, seconds):
        """Let every call of a function take so long."""
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            self.now_s += seconds
            return function(*args, **kwargs)
        self.monkeypatch.setattr(owner, name, timed)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def setting(tmp_path):
    """setting(**changes) is (cfg, run, data, model) on toy data."""
    def make(**changes):
        write_run_data(tmp_path / "data")
        cfg = tiny_config(data_path=str(tmp_path / "data"), allow_unverified=False, **changes)
        torch.manual_seed(0)
        return cfg, gpt.Run(cfg), gpt.Dataset.open(cfg), gpt.GPT(cfg)
    return make


# Training

def test_calibration_reads_training_shards_only_in_the_run_and_in_warm_up(setting, monkeypatch):
    cfg, run, data, model = setting(iterations=1, max_wallclock_seconds=600.0)
    collect, read = gpt.collect_hessians, []

    def recording(cfg, run, model, paths, num_batches):
        read.append(tuple(paths))
        return collect(cfg, run, model, paths, num_batches)
    monkeypatch.setattr(gpt, "collect_hessians", recording)
    gpt.train(cfg, run, data, model)
    in_warm_up = len(read)
    gpt.calibrate(cfg, run, data, model, 1.0)
    assert in_warm_up > 0 and len(read) == in_warm_up + 1
    assert all(paths == data.train for paths in read)


def test_every_step_uses_the_factor_of_its_progress(setting, monkeypatch):
    cfg, run, data, model = setting(iterations=8)
    step, factors = gpt.Optimizer.step, []
    monkeypatch.setattr(gpt.Optimizer, "step", lambda self, index, factor: factors.append(factor) or step(
        self, index, factor))
    gpt.train(cfg, run, data, model)
    assert factors == [gpt.lr_factor(cfg, k / 8) for k in range(8)] and len(set(factors)) > 4


def test_the_average_takes_in_the_weights_after_every_step_with_the_set_decay(setting, monkeypatch):
    cfg, run, data, model = setting(iterations=3, ema_decay=0.25)
    step, seen = gpt.Optimizer.step, [[p.detach().clone() for p in model.parameters()]]

    def recording(self, index, factor):
        step(self, index, factor)
        seen.append([p.detach().clone() for p in model.parameters()])
    monkeypatch.setattr(gpt.Optimizer, "step", recording)
    gpt.train(cfg, run, data, model)
    average = seen[0]
    for weights in seen[1:]:
        average = [0.25 * mean + 0.75 * p for mean, p in zip(average, weights)]
    for mean, p in zip(average, model.parameters()):
        torch.testing.assert_close(p, mean, rtol=1e-5, atol=1e-6)


def test_training_stops_early_enough_for_the_calibration_measured_in_warm_up(setting, monkeypatch):
    cfg, run, data, model = setting(iterations=2, max_wallclock_seconds=600.0)
    plan, planned = gpt.plan_step, []
    monkeypatch.setattr(gpt, "warm_up", lambda *args: 12.5)
    monkeypatch.setattr(gpt, "plan_step", lambda *args: planned.append(args[-1]) or plan(*args))
    gpt.train(cfg, run, data, model)
    assert planned == [12.5, 12.5]


def test_the_training_clock_is_steps_and_calibration(setting, clock, capsys):
    cfg, run, data, model = setting(iterations=3)
    clock.takes(gpt, "train_rows", 10.0)
    clock.takes(gpt, "collect_hessians", 7.0)
    train_s = gpt.train(cfg, run, data, model)
    assert train_s == 30.0
    gpt.calibrate(cfg, run, data, model, train_s)
    assert "clock_ms:37000 steps_ms:30000 calibration_ms:7000" in capsys.readouterr().out


# Evaluation

def test_the_evaluation_clock_holds_reading_planning_hints_and_scoring(setting, clock, capsys):
    cfg, run, data, model = setting()
    takes_s = {"plan_batches": 2.0, "certified_order": 4.0, "HintFeed": 8.0, "LearningLimit": 16.0,
               "adapt_base": 32.0, "warm_up_ttt": 1000.0}
    for name, seconds in takes_s.items():
        clock.takes(gpt, name, seconds)
    clock.takes(gpt.Dataset, "load_validation", 1.0)
    gpt.evaluate_ttt(cfg, run, model, data)
    assert "total_eval_ms:63000" in capsys.readouterr().out


@pytest.mark.parametrize("over", [False, True])
def test_an_evaluation_over_its_budget_is_reported(setting, clock, capsys, over):
    cfg, run, data, model = setting(eval_wallclock_seconds=9.5 if over else 10.5)
    clock.takes(gpt.Dataset, "load_validation", 10.0)
    gpt.evaluate_ttt(cfg, run, model, data)
    assert ("eval warning over_budget_s:0.5" in capsys.readouterr().out) == over


def test_an_evaluation_that_leaves_a_target_out_ends_the_run(setting, monkeypatch, capsys):
    cfg, run, data, model = setting(ngram_tilt_enabled=False, phased_ttt_prefix_docs=0)
    score_phase = gpt.score_phase
    monkeypatch.setattr(gpt, "score_phase", lambda scorer, phase, *rest: score_phase(
        scorer, [phase[0], *([] for _ in phase[1:])], *rest))
    with pytest.raises(RuntimeError, match="expected each exactly once"):
        gpt.evaluate_ttt(cfg, run, model, data)
    assert "val_bpb" not in capsys.readouterr().out


def test_warm_up_of_test_time_training_takes_steps_on_random_tokens(setting, monkeypatch):
    """Otherwise compilation would fall into the evaluation clock."""
    cfg, run, data, model = setting(compile=True)
    step, learns = gpt.Scorer.step, []

    def recording(scorer, rows, width, learn):
        assert len(scorer.stream.tokens.unique()) > 30
        learns.append(learn)
        step(scorer, rows, width, learn)
        assert scorer.meter.sums[1] > 0                   # it did score something
    monkeypatch.setattr(gpt.Scorer, "step", recording)
    scorer, _ = gpt.warm_up_ttt(cfg, run, model, data.val_tokens)
    assert any(learns) and not scorer.meter.sums.any()


def test_bytes_are_those_of_the_targets_themselves(setting):
    """Position by position: a sidecar read one token early or late gives other bytes to at least one
    target."""
    cfg, run, data, model = setting()
    model.requires_grad_(False)
    tokens = random_stream(np.random.default_rng(0), VAL_LENGTHS)
    docs, total = gpt.find_documents(tokens), len(tokens)
    phases = gpt.plan_batches(docs, batch_size=4, chunk=cfg.ttt_chunk_size, window=cfg.ttt_eval_seq_len)
    draws = [gpt.lane_draws(cfg, run, lane) for lane in range(gpt.LANES)]
    for position in (0, 1, 8, 9, 10, total - 2, total - 1):
        counts = np.zeros(total, np.uint16)
        counts[[position, 5]] = 1000, 1
        score = gpt.evaluate_plain(cfg, run, model, tokens, counts)
        assert score.bytes == (1 if position == 0 else 1001)
        scorer = gpt.Scorer(cfg, run, model, total)
        scorer.load(tokens, counts)
        scorer.follow(docs, gpt.certified_order(phases, docs, cfg.ttt_chunk_size))
        gpt.score_phase(scorer, phases[0], draws)
        assert scorer.meter.result().bytes == score.bytes


# Size

@pytest.mark.parametrize("short_by, tries", [(1, [50_000]), (1000, [50_000]), (1000, [50_000, 48_500])])
def test_an_artifact_over_the_limit_is_not_accepted(setting, monkeypatch, short_by, tries):
    """Larger steps are tried instead; without any that fit the run ends."""
    cfg, run, data, model = setting()
    sizes = itertools.chain([50_000], tries, itertools.repeat(tries[-1]))
    monkeypatch.setattr(gpt, "quantize", lambda *args: ({}, {}))
    streams = {name: b"" for group in gpt.CODING_ORDER for name in gpt.group_streams(group)}
    monkeypatch.setattr(gpt, "encode_model", lambda *args: (streams, {}))
    monkeypatch.setattr(gpt, "build_container", lambda *args: bytes(next(sizes)))
    assert len(gpt.fit_artifact(cfg, run, model, None, 50_000)) == 50_000
    if len(tries) > 1:
        assert len(gpt.fit_artifact(cfg, run, model, None, 50_000 - short_by)) == tries[-1]
        return
    with pytest.raises(gpt.ArtifactError, match="no clip sigmas found that fit"):
        gpt.fit_artifact(cfg, run, model, None, 50_000 - short_by)


@pytest.mark.parametrize("over", [0, 1, 1000])
def test_script_and_artifact_together_stay_within_the_limit(setting, monkeypatch, tmp_path, over):
    """Also when the search for clip sigmas hands on an artifact that is too long."""
    cfg, run, data, model = setting(run_id="size", checkpoint_dir=str(tmp_path))
    limits = []

    def fit(cfg, run, model, stats, limit):
        limits.append(limit)
        return bytes(gpt.SIZE_LIMIT - 40_000 + over)
    monkeypatch.setattr(gpt, "shipped_code", lambda: gpt.ShippedCode("packed", 40_000, "0" * 64, 200_000))
    monkeypatch.setattr(gpt, "fit_artifact", fit)
    if over:
        with pytest.raises(gpt.ArtifactError, match="of code exceed 16,000,000; raise"):
            gpt.write_artifact(cfg, run, model, None)
    else:
        gpt.write_artifact(cfg, run, model, None)
    assert limits[0] <= gpt.SIZE_LIMIT - 40_000


def test_a_toy_stream_has_bytes_at_its_ends():
    """What the tests of the sidecar rely on."""
    tokens = random_stream(np.random.default_rng(0), VAL_LENGTHS)
    counts = random_byte_counts(np.random.default_rng(0), tokens)
    assert counts[0] == 0 and counts[-1] > 0
