"""Section 7: training as a whole, the wall clock, compile warm-up, and two processes that equal one."""
import dataclasses
import functools
import itertools
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import runlog
import train_gpt as gpt
import two_process
from helpers import random_model, tiny_config, write_dataset


@pytest.fixture
def train_tiny(tmp_path, capsys):
    """train_tiny(**changes) trains a tiny model and returns (model, log lines)."""
    write_dataset(tmp_path / "data")

    def train(model_seed=0, ops=gpt.Ops(), **changes):
        cfg = tiny_config(data_path=str(tmp_path / "data"), **changes)
        torch.manual_seed(model_seed)
        model = gpt.GPT(cfg, ops=ops)
        capsys.readouterr()
        gpt.train(cfg, gpt.Run(cfg), gpt.Dataset.open(cfg), model)
        return model, capsys.readouterr().out.splitlines()
    return train


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_training_lowers_the_loss(train_tiny):
    _, lines = train_tiny(iterations=12, ema_decay=0.5, matrix_lr=0.01, tied_embed_lr=0.01)
    losses = [float(m[1]) for line in lines if (m := re.match(r"\d+/12 train_loss: (\S+)", line))]
    assert losses[-1] < losses[0] - 0.1


def test_the_same_seed_gives_the_same_weights_bit_for_bit(train_tiny):
    assert same_weights(train_tiny()[0], train_tiny()[0])


def test_the_averaged_weights_are_what_training_leaves(train_tiny):
    averaged, _ = train_tiny(ema_decay=1.0)
    torch.manual_seed(0)
    assert same_weights(averaged, gpt.GPT(averaged.cfg))              # decay 1 keeps the initial weights
    assert not same_weights(train_tiny(ema_decay=0.0)[0], averaged)


# Compile warm-up

def test_warm_up_leaves_nothing_behind(train_tiny):
    warm, lines = train_tiny(warmup_steps=2)
    cold, _ = train_tiny(warmup_steps=0)
    assert same_weights(warm, cold)
    assert "warmup_step: 2/2" in lines and "loop_warmup_step: 2/2" in lines


@pytest.mark.parametrize("seconds", [0.0, 600.0])
def test_warm_up_restores_weights_optimizer_and_random_state(tmp_path, seconds):
    write_dataset(tmp_path)
    cfg = tiny_config(data_path=str(tmp_path), warmup_steps=2, max_wallclock_seconds=seconds)
    run, model = gpt.Run(cfg), random_model(cfg)
    optimizer = gpt.Optimizer(cfg, run, model)
    weights, state = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    work = gpt.RowGradients(cfg, run, model, optimizer)
    calibration_s = gpt.warm_up(cfg, run, gpt.Dataset.open(cfg), work)
    assert (calibration_s > 0) == (seconds > 0)
    assert all(torch.equal(p, saved) for p, saved in zip(model.parameters(), weights))
    assert torch.equal(torch.get_rng_state(), state)
    assert not optimizer.adamw.state and not optimizer.muon.momentum_buffers
    assert optimizer.num_rows == 0 and not any(total.any() for total in optimizer.grad_sum)
    assert all(p.grad is None for p in model.parameters())


# Schedule and stop

def test_looping_switches_on_once_at_its_share_of_the_steps(train_tiny):
    _, lines = train_tiny(iterations=8, enable_looping_at=0.35)
    switches = [line for line in lines if line.startswith("layer_loop:enabled")]
    assert switches == ["layer_loop:enabled step:3 frac:0.375 encoder:[0, 1, 2, 1] decoder:[2, 1, 2, 3, 4]"]


def test_looping_changes_the_training(train_tiny):
    assert not same_weights(train_tiny(enable_looping_at=0.0)[0], train_tiny(enable_looping_at=1.0)[0])
    assert not any("layer_loop" in line for line in train_tiny(num_loops=0)[1])


def test_looping_from_the_first_step_is_reported_as_such(train_tiny):
    speed = next(line for line in train_tiny(enable_looping_at=0.0)[1] if line.startswith("train speed"))
    assert "loops_on_tok_per_s" in speed and "loops_off_tok_per_s" not in speed


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_of_rows_hold_the_tokens_and_documents_of_the_whole_ones(tmp_path, parts):
    write_dataset(tmp_path)
    cfg = tiny_config(data_path=str(tmp_path))
    data = gpt.Dataset.open(cfg)
    whole, source = (gpt.make_loader(cfg, gpt.Run(cfg), data) for _ in range(2))
    split, size = gpt.split_rows(source, 2, parts), cfg.row_tokens // parts
    for _ in range(3):
        rows = [next(whole), next(whole)]
        steps = [[next(split), next(split)] for _ in range(parts)]
        for row, found in zip(rows, zip(*steps)):
            assert all(len(part.inputs) == len(part.targets) == size for part in found)
            assert torch.equal(torch.cat([part.inputs for part in found]), row.inputs)
            assert torch.equal(torch.cat([part.targets for part in found]), row.targets)
            bounds = {number * size + end for number, part in enumerate(found) for end in part.cu_seqlens.tolist()}
            assert bounds == set(row.cu_seqlens.tolist()) | {number * size for number in range(parts)}
            for part in found:
                assert part.cu_seqlens[0] == 0 and part.cu_seqlens[-1] == size
                assert (part.cu_seqlens.diff() >= 0).all() and part.cu_seqlens.dtype == torch.int32
                assert len(part.cu_seqlens) % gpt.SEGMENT_PAD == 0
    whole.close()
    source.close()


def test_half_rows_take_twice_the_steps_for_the_same_tokens(train_tiny):
    _, lines = train_tiny(iterations=8, half_rows_until=0.5, enable_looping_at=0.5, warmup_steps=1)
    assert "half_warmup_step: 1/1" in lines
    speeds = [line for line in lines if line.startswith("train speed")]
    off, on = (float(re.search(rf"{name}_tok_per_s:(\d+)", speeds[0])[1]) *
               float(re.search(rf"{name}_step_ms:(\S+)", speeds[0])[1]) / 1000 for name in ("loops_off", "loops_on"))
    assert off == pytest.approx(8 * 96 / 2, rel=0.02) and on == pytest.approx(8 * 96, rel=0.02)


def test_every_change_of_rows_is_logged_and_warmed_up(train_tiny):
    _, lines = train_tiny(iterations=8, quarter_rows_until=0.25, half_rows_until=0.625, enable_looping_at=0.5,
                          warmup_steps=1)
    assert [line for line in lines if line.startswith("rows:")] == [
        "rows:quarter step:0 frac:0.000", "rows:half step:2 frac:0.250", "rows:whole step:5 frac:0.625"]
    assert [line for line in lines if "warmup_step" in line] == [
        f"{name}warmup_step: 1/1" for name in ("quarter_", "half_", "half_loop_", "loop_")]


def test_rows_are_never_cut_again_when_the_clock_is_corrected(train_tiny, monkeypatch):
    """After a slow step the estimate of the next one's beginning may have been too late."""
    progress = iter([0.0, 0.3, 0.6, 0.4, 0.1, 0.6, 0.7, 0.8])
    monkeypatch.setattr(gpt, "plan_step", lambda *_: (next(progress), False))
    _, lines = train_tiny(iterations=8, quarter_rows_until=0.25, half_rows_until=0.5, warmup_steps=0)
    assert [line for line in lines if line.startswith("rows:")] == [
        "rows:quarter step:0 frac:0.000", "rows:half step:1 frac:0.300", "rows:whole step:2 frac:0.600"]


@pytest.mark.parametrize(("settings", "states"), [
    ({}, [(1, False), (1, True)]),
    ({"num_loops": 0}, [(1, False)]),
    ({"enable_looping_at": 0.0}, [(1, True)]),
    ({"half_rows_until": 0.35}, [(2, False), (1, True)]),
    ({"quarter_rows_until": 0.1, "half_rows_until": 0.5}, [(4, False), (2, False), (2, True), (1, True)]),
    ({"quarter_rows_until": 0.2}, [(4, False), (1, False), (1, True)]),
    ({"half_rows_until": 1.0}, [(2, False), (2, True)])])
def test_the_states_that_training_may_come_to(settings, states):
    assert gpt.row_states(tiny_config(**{"enable_looping_at": 0.35, **settings})) == states


def test_half_rows_change_the_training_and_zero_does_not(train_tiny):
    plain, _ = train_tiny(iterations=4)
    assert same_weights(plain, train_tiny(iterations=4, half_rows_until=0.0)[0])
    assert not same_weights(plain, train_tiny(iterations=4, half_rows_until=0.3)[0])


def test_parts_of_rows_scale_the_learning_rates(train_tiny, monkeypatch):
    factors = []
    step = gpt.Optimizer.step
    monkeypatch.setattr(gpt.Optimizer, "step", lambda self, number, factor: (factors.append(factor),
                                                                             step(self, number, factor)))
    train_tiny(iterations=4, warmdown_frac=0.0, quarter_rows_until=0.25, half_rows_until=0.55)
    assert factors == [0.5, 0.5**0.5, 0.5**0.5, 1.0]


@pytest.mark.parametrize(("name", "multiple"), [("half_rows_until", 16), ("quarter_rows_until", 32)])
def test_rows_must_have_parts_of_equal_length(name, multiple):
    with pytest.raises(gpt.ConfigError, match=f"TRAIN_BATCH_TOKENS must be a multiple of {multiple}"):
        tiny_config(**{name: 0.3}, train_batch_tokens=8 * 33, train_seq_len=33)


def test_half_rows_that_end_before_quarter_rows_are_refused():
    with pytest.raises(gpt.ConfigError, match="QUARTER_ROWS_UNTIL must be at most HALF_ROWS_UNTIL, unless that is 0"):
        tiny_config(quarter_rows_until=0.2, half_rows_until=0.1)


def test_every_step_computes_with_a_cast_of_the_weights_as_they_are(train_tiny):
    """Made once, and taken over in the same memory when the optimizer has changed the weights."""
    seen = []

    def cast(model, into=None):
        fresh = model.wq.detach().clone()
        return [fresh] if into is None else [into[0].copy_(fresh)]

    def checked(model, row, *, cast, **options):
        assert torch.equal(cast[0], model.wq)
        seen.append((cast[0].data_ptr(), cast[0].sum().item()))
        return gpt.row_gradients(model, row, **options)
    train_tiny(iterations=3, warmup_steps=0, ops=gpt.Ops(cast=cast, row_gradients=checked))
    assert len(set(seen)) == 3 and len({address for address, _ in seen}) == 1


def test_rows_without_a_graph_are_logged(capsys):
    run = gpt.Run(tiny_config())
    replay = types.SimpleNamespace(captures=9, missed=2)
    gpt.log_speed(run, gpt.Mark(1, 100, 1.0), gpt.Mark(3, 500, 3.0), replay)
    event, fields = runlog.parse_line(capsys.readouterr().out.splitlines()[0])
    assert event == "train speed" and fields["steps"] == "3"
    assert (fields["graphs"], fields["rows_without_graph"]) == ("9", "2")


@pytest.mark.parametrize("seconds", [0.0, 5.0])
def test_a_switch_at_a_time_that_was_estimated_wrongly_leaves_no_false_speed(capsys, seconds):
    """On a GPU the first step has not ended when looping begins at the second one."""
    gpt.log_speed(gpt.Run(tiny_config()), gpt.Mark(1, 100, seconds), gpt.Mark(3, 500, 4.0), None)
    _, fields = runlog.parse_line(capsys.readouterr().out.splitlines()[0])
    speeds = [float(value) for name, value in fields.items() if name.endswith("tok_per_s")]
    assert len(speeds) == 1 and speeds[0] > 0


class Replayed:
    """CapturedSteps without a GPU: a replayed step does the same work, but counts nothing on the host."""

    def __init__(self, run, step, keys, loads):
        assert set(loads) <= set(keys)
        self.step, self.graphs, self.captures = step, dict.fromkeys(keys), len(keys)
        self.missed = 0
        for key in loads:
            step(*key)

    def __call__(self, *key):
        optimizer = self.step.__self__.optimizer
        counted = optimizer.num_rows
        self.step(*key)
        optimizer.num_rows = counted


@pytest.mark.parametrize("segments", [64, 128])
def test_captured_rows_do_the_work_of_rows_without_graph(tmp_path, monkeypatch, segments):
    monkeypatch.setattr(gpt, "CapturedSteps", Replayed)
    write_dataset(tmp_path)
    cfg = tiny_config(data_path=str(tmp_path))
    run, found = gpt.Run(cfg), []
    for is_captured in (False, True):
        model = random_model(cfg)
        work = gpt.RowGradients(cfg, run, model, gpt.Optimizer(cfg, run, model))
        if is_captured:
            work.capture([(1, False), (2, True)])
            assert work.optimizer.num_rows == 0 and not any(total.any() for total in work.optimizer.grad_sum)
        loader = gpt.make_loader(cfg, run, gpt.Dataset.open(cfg))
        for rows, looping in ((loader, False), (gpt.split_rows(loader, 2, 2), True)):
            padded = (row._replace(cu_seqlens=F.pad(row.cu_seqlens, (0, segments - 64), value=len(row.inputs)))
                      for row in iter(functools.partial(next, rows), None))
            for _ in range(2):
                loss = gpt.train_rows(work, padded, 2, looping)
                assert work.optimizer.num_rows == 2
                found.append([loss, *(total.clone() for total in work.optimizer.grad_sum)])
                work.optimizer.step(0, 1.0)
        loader.close()
    assert work.replay.missed == (0 if segments == 64 else 8)
    assert len({loss.item() for loss, *_ in found[:4]}) == 4          # a step's loss outlives the next step
    for plain, captured in zip(found[:4], found[4:]):
        torch.testing.assert_close(captured, plain, rtol=0, atol=0)


def test_without_a_wallclock_the_schedule_follows_the_steps():
    cfg = tiny_config(iterations=10)
    assert [gpt.plan_step(cfg, step, 1e6, 1e6, 1e6) for step in (0, 5, 9)] == [(0.0, False), (0.5, False), (0.9, False)]


def test_progress_is_the_share_of_the_budget_without_the_reserve():
    cfg = tiny_config(max_wallclock_seconds=600.0, gptq_reserve_seconds=4.0)
    assert gpt.plan_step(cfg, 7, 298.0, 0.1, 4.0) == (0.5, False)
    assert gpt.plan_step(cfg, 7, 595.9, 0.05, 4.0)[1] is False
    assert gpt.plan_step(cfg, 7, 596.0, 0.0, 0.0) == (1.0, True)


def test_training_stops_while_one_more_step_and_calibration_still_fit():
    cfg = tiny_config(max_wallclock_seconds=600.0, gptq_reserve_seconds=0.0)
    assert not gpt.plan_step(cfg, 7, 580.0, 5.0, 15.0)[1]
    assert gpt.plan_step(cfg, 7, 580.0, 5.1, 15.0)[1] and gpt.plan_step(cfg, 7, 580.0, 5.0, 15.1)[1]


def test_a_tiny_budget_stops_early_and_says_so(train_tiny, monkeypatch):
    monkeypatch.setattr(gpt, "estimate_calibration", lambda *args: 0.001)     # a busy machine would leave no time
    _, lines = train_tiny(iterations=100_000, max_wallclock_seconds=0.05, gptq_reserve_seconds=0.01)
    assert "gptq:reserving 0.01s, effective=40ms" in lines
    assert any(re.fullmatch(r"stopping_early: wallclock_cap train_time: \d+ms step: \d+/100000", line) for line in lines)
    assert lines[-1] == "ema:applying EMA weights"


def test_the_clock_knows_the_longest_recent_step_and_the_steps_still_queued():
    clock = gpt.StepClock(gpt.Run(tiny_config()))
    assert (clock.now(), clock.longest_recent()) == (0.0, 0.0)
    clock.ends = [1.0, 2.5, 3.0]
    assert (clock.now(), clock.longest_recent()) == (3.0, 1.5)
    clock.events = ["a step on the device"]
    assert clock.now() == 3.5
    clock.ends = [100.0, *np.arange(101.0, 110.0)]
    assert clock.longest_recent() == 1.0


def test_a_run_that_diverges_stops_with_advice(train_tiny):
    with pytest.raises(RuntimeError, match="train_loss up to step 1 is nan in stage training; .*lower MATRIX_LR"):
        train_tiny(tied_embed_init_std=1e38)


def test_a_parameter_that_the_loss_does_not_depend_on_stops_the_training(train_tiny, monkeypatch):
    monkeypatch.setattr(gpt, "remove_own_value", lambda y, v, n, *rest: y.reshape(n.shape))
    with pytest.raises(ValueError, match=r"found none of \['attn_gate', 'xsa_alpha'\]"):
        train_tiny(warmup_steps=1)


def test_steps_are_logged_often_at_first_and_the_last_one_always():
    cfg = tiny_config(iterations=217)
    logged = [done for done in range(1, 218) if gpt.is_logged(cfg, done)]
    assert logged == [1, 2, 3, 4, 5, *range(10, 101, 10), 150, 200, 217]


def test_looping_that_never_begins_is_a_warning(train_tiny):
    _, lines = train_tiny(enable_looping_at=1.0)
    assert any(re.fullmatch(r'train warning:"looping never began,[^"]*" enable_looping_at:1', line) for line in lines)


def test_log_lines_have_the_wording_that_people_grep(train_tiny):
    _, lines = train_tiny(iterations=7, warmup_steps=1)
    assert lines[:2] == ["warmup_step: 1/1", "loop_warmup_step: 1/1"]
    steps = [line for line in lines if re.fullmatch(r"\d+/7 train_loss: \d+\.\d{4} train_time: \d+\.\dm tok/s: \d+( .*)?", line)]
    assert [int(line.split("/")[0]) for line in steps] == [1, 2, 3, 4, 5, 7]


# Two processes

def write_data(folder):
    write_dataset(folder, train=(1900, 2500), val=(500, 333))


def two_ranks():
    """The results of rank 0 and of rank 1, and the launch's output."""
    repo = gpt.REPO
    env = {**os.environ, "PYTHONPATH": f"{repo}{os.pathsep}{repo / 'tests'}", "OMP_NUM_THREADS": "1",
           "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(repo / "launch.py"), "2", str(repo / "tests" / "two_process.py")]
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        done = subprocess.run([*command, folder], cwd=folder, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return *(dict(np.load(Path(folder) / f"rank{rank}.npz")) for rank in (0, 1)), done.stdout


@pytest.fixture(scope="module")
def one_and_two(early, tmp_path_factory):
    """The results of one process, of rank 0 and of rank 1, and the launch's output."""
    folder = tmp_path_factory.mktemp("one")
    write_data(folder)
    cfg = two_process.config(folder)
    return two_process.results(cfg, gpt.Run(cfg)), *early(two_ranks)


def two_processes(test):
    return pytest.mark.two_process(pytest.mark.early(work=two_ranks)(test))


@two_processes
def test_two_processes_train_the_same_weights_as_one(one_and_two):
    """Both sum the same eight clipped gradients, in another order.

    One rounding of 2**-24 relative to the gradient's scale is amplified by Adam's division (gradients much smaller
    than others in the tensor) and by Muon's polynomials (small singular values, at most a factor of 10**3 a step).
    """
    one, rank0, rank1, _ = one_and_two
    names = [key for key in one if key.startswith("weight_")]
    assert len(names) == sum(map(len, gpt.PARAMETER_TABLE.values()))
    for name in names:
        assert (rank0[name] == rank1[name]).all(), f"{name}: the replicas differ"
        np.testing.assert_allclose(rank0[name], one[name], rtol=0, atol=1e-5, err_msg=name)


@two_processes
def test_two_processes_score_the_same_targets_as_one(one_and_two):
    one, rank0, rank1, _ = one_and_two
    for name in ("score_tokens", "score_bytes"):
        assert one[name] == rank0[name] == rank1[name]
    assert one["score_tokens"] == 500 + 333 - 1
    for name in ("score_loss", "score_bpb"):
        assert rank0[name] == rank1[name] and abs(rank0[name] - one[name]) <= 1e-12 * one[name]


@two_processes
def test_two_processes_exchange_their_codes(one_and_two):
    one, rank0, rank1, _ = one_and_two
    for name in (key for key in one if key.startswith("codes_")):
        assert (rank0[name] == rank1[name]).all() and rank0[name].any(), name
        assert (rank0[name] == one[name]).mean() > 0.98, name             # sums in another order turn near ties


@two_processes
def test_two_processes_collect_the_same_hessians_as_one(one_and_two):
    one, rank0, rank1, _ = one_and_two
    names = [key for key in one if key.startswith(("hessian_", "count_"))]
    assert names
    for name in names:
        assert (rank0[name] == rank1[name]).all()
        np.testing.assert_allclose(rank0[name], one[name], rtol=1e-5, atol=1e-6 * np.abs(one[name]).max())


@two_processes
def test_collectives_agree_on_every_rank(one_and_two):
    one, *ranks, _ = one_and_two
    assert (one["world_size"], one["sum"], one["broadcast"]) == (1, 1, 5)
    assert one["agree"].tolist() == [0.1, 1e300]
    for rank in ranks:
        assert (rank["world_size"], rank["sum"], rank["broadcast"]) == (2, 3, 5)
        assert rank["agree"].tolist() == [0.1, 1e300]


@two_processes
def test_only_rank_0_writes_the_log(one_and_two):
    lines = one_and_two[3].splitlines()
    assert lines.count("ema:applying EMA weights") == 1
    assert sum(line.startswith(f"{two_process.STEPS}/{two_process.STEPS} train_loss:") for line in lines) == 1


@pytest.mark.gpu
def test_rows_replayed_on_a_gpu_train_as_rows_without_graph():
    """Steps of whole and half rows, with more and fewer documents, at the record's widths: losses and weights."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    cfg = dataclasses.replace(gpt.Config(), train_batch_tokens=8 * 8192, val_batch_tokens=8 * 4096, allow_slow=True,
                              compile=False, train_seq_len=2048)
    run, rng = gpt.Run(cfg, device=torch.device("cuda")), np.random.default_rng(0)
    rows = []
    for num_documents in (3, 50, 90):                      # the last one has too many segments for a graph
        tokens = rng.integers(2, cfg.vocab_size, cfg.row_tokens + 1)
        tokens[rng.choice(cfg.row_tokens, num_documents, replace=False)] = gpt.BOS
        inputs, targets = (torch.from_numpy(part).cuda() for part in (tokens[:-1], tokens[1:]))
        rows.append(gpt.Row(inputs, targets, torch.from_numpy(gpt.segment_bounds(tokens[:-1], 2048))))
    results = []
    for is_captured in (False, True):
        torch.manual_seed(0)
        model = gpt.build_model(cfg, run)
        work = gpt.RowGradients(cfg, run, model, gpt.Optimizer(cfg, run, model))
        if is_captured:
            work.capture([(1, True), (2, False)])
        losses = []
        for step, (parts, looping) in enumerate([(2, False), (2, False), (1, True), (1, True)]):
            source = itertools.cycle(rows)
            losses.append(gpt.train_rows(work, gpt.split_rows(source, 3, parts), 3, looping))
            work.optimizer.step(step, 0.1)
        assert not is_captured or work.replay.missed == 2
        results.append((torch.stack(losses), torch.cat([p.detach().flatten() for p in model.parameters()])))
    (loss, weights), (captured_loss, captured_weights) = results
    torch.testing.assert_close(captured_loss, loss, rtol=1e-3, atol=0)
    # A GPU may add gradients in another order.
    assert (captured_weights - weights).norm() <= 1e-3 * weights.norm()
