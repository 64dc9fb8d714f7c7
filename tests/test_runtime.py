"""Section 2: ranks, collectives, the log file, names of runs, signals, seeded generators, the C compiler."""
import contextlib
import errno
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import launch
import train_gpt as gpt
from helpers import tiny_config
from toy_data import write_run_data


@pytest.fixture
def in_tmp(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("world_size", ["0", "-1", "3", "5", "6", "7", "16"])
def test_world_sizes_that_do_not_divide_a_step_are_refused(in_tmp, world_size):
    message = f"WORLD_SIZE={world_size}: expected 1, 2, 4 or 8, because one optimizer step is 8 rows"
    with pytest.raises(gpt.ConfigError, match=f"{message}.*set NPROC_PER_NODE"):
        gpt.Run.start(tiny_config(), {"WORLD_SIZE": world_size, "RANK": "0"})
    assert not list(in_tmp.iterdir())


@pytest.mark.gpu
def test_more_processes_than_gpus_are_refused(in_tmp):
    count = torch.cuda.device_count()
    message = f"LOCAL_RANK={count}: expected below {count}, the GPUs of this machine"
    with pytest.raises(gpt.ConfigError, match=message):
        gpt.Run.start(tiny_config(), {"LOCAL_RANK": str(count)})


def test_collectives_of_one_process_change_nothing():
    run, x = gpt.Run(tiny_config()), torch.tensor([1.0, 2.0])
    for collective in (run.sum, run.broadcast):
        assert collective(x) is x and x.tolist() == [1.0, 2.0]
    assert run.agree((0.5, True)) == [0.5, True]
    run.barrier("nothing")


def test_log_lines_reach_stdout_and_the_log_file_alike(in_tmp, capsys):
    with gpt.Run.start(tiny_config(run_id="abc"), {}) as run:
        run.log("first line")
        assert (in_tmp / "logs" / "abc.txt").read_text() == ""               # nothing is kept of a start
        run.begin()
        run.log("second line")
        # then at once
        assert (in_tmp / "logs" / "abc.txt").read_text() == "first line\nsecond line\n"
    assert capsys.readouterr().out == "first line\nsecond line\n"


def test_a_full_disk_delays_log_lines_and_ends_nothing(in_tmp, monkeypatch):
    with gpt.Run.start(tiny_config(run_id="abc"), {}) as run:
        run.begin()
        write = os.write
        with monkeypatch.context() as patch:
            def full(fd, data):
                if fd != run._log_file:
                    return write(fd, data)
                if len(data) < 6:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return write(fd, data[:len(data) - 5])
            patch.setattr(os, "write", full)
            run.log("first line")
            assert (in_tmp / "logs" / "abc.txt").read_text() == "first "
        run.log("second line")
    assert (in_tmp / "logs" / "abc.txt").read_text() == "first line\nsecond line\n"


def test_a_resumed_run_continues_its_own_log(in_tmp):
    for line, resumes in (("one", False), ("two", True)):
        with gpt.Run.start(tiny_config(run_id="abc", quantize_only=resumes), {}) as run:
            run.log(line)
    assert (in_tmp / "logs" / "abc.txt").read_text() == "one\ntwo\n"


def test_other_ranks_log_nothing(capsys):
    gpt.Run(tiny_config(), rank=1, world_size=2).log("hello")
    assert capsys.readouterr().out == ""


def test_a_run_without_name_is_named_after_seed_and_start(in_tmp):
    with gpt.Run.start(tiny_config(seed=7), {}) as run:
        assert re.fullmatch(r"seed7_\d{8}_\d{6}", run.run_id)
        assert run.log_path.name == f"{run.run_id}.txt"


def test_an_error_is_recorded_in_the_log_and_goes_on(in_tmp):
    with pytest.raises(gpt.DataError):
        with gpt.Run.start(tiny_config(run_id="abc"), {}) as run:
            run.begin()
            raise gpt.DataError("shard 3 is broken")
    assert (in_tmp / "logs" / "abc.txt").read_text() == "error DataError\n"


def test_a_start_that_fails_leaves_no_log_and_the_name_is_free(in_tmp):
    for _ in range(2):
        with pytest.raises(gpt.DataError):
            with gpt.Run.start(tiny_config(run_id="abc"), {}) as run:
                run.log("a line")
                raise gpt.DataError("shard 3 is broken")
        assert not list((in_tmp / "logs").iterdir())


# Names of runs

@pytest.mark.parametrize("left", ["logs/abc.txt", "weights/abc.weights", "weights/abc.artifact"])
def test_the_name_of_an_earlier_run_is_refused_unless_it_is_resumed(in_tmp, left):
    path = in_tmp / left
    path.parent.mkdir()
    path.write_text("something")
    cfg = dict(run_id="abc", checkpoint_dir="weights")
    for _ in range(2):
        message = f"RUN_ID=abc: {left} exists from an earlier run; choose another"
        with pytest.raises(gpt.ConfigError, match=message):
            gpt.Run.start(tiny_config(**cfg), {})
    assert path.read_text() == "something"
    for resumed in ("quantize_only", "ttt_eval_only"):
        with gpt.Run.start(tiny_config(**cfg, **{resumed: True}), {}):
            pass


def test_two_runs_of_one_name_at_a_time_are_refused_and_a_killed_one_leaves_no_lock(in_tmp, repo):
    code = ("import train_gpt as gpt; from helpers import tiny_config\n"
            "run = gpt.Run.start(tiny_config(run_id='abc', quantize_only=True), {})\n"
            "print('started', flush=True)\n"
            "input()")
    env = {**os.environ, "PYTHONPATH": f"{repo}{os.pathsep}{repo / 'tests'}"}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "started\n"
        for resumes in (False, True):
            with pytest.raises(gpt.ConfigError, match="RUN_ID=abc: a run of this name is going on"):
                gpt.Run.start(tiny_config(run_id="abc", ttt_eval_only=resumes), {})
        other.kill()
    with gpt.Run.start(tiny_config(run_id="abc"), {}) as run:
        assert run.run_id == "abc"


@pytest.mark.parametrize("name", [".", "..", "x" * 300])
def test_names_that_are_no_file_names_are_refused(in_tmp, name):
    with pytest.raises(gpt.ConfigError, match="RUN_ID must be the beginning of a file name.*; found RUN_ID="):
        gpt.Run.start(tiny_config(run_id=name), {})
    assert not list(in_tmp.iterdir())


# Numbers, files, signals

@pytest.mark.parametrize("bad", [float("nan"), float("inf"), torch.tensor([1.0, float("-inf")])])
def test_a_number_that_is_not_finite_names_stage_and_last_good_value(bad):
    run = gpt.Run(tiny_config())
    run.stage("training")
    run.last_good = "train_loss 2.5000 at step 100"
    gpt.require_finite(run, "train_loss", 1.0, torch.ones(3))
    message = "in stage training; last good value: train_loss 2.5000 at step 100"
    with pytest.raises(gpt.RunError, match=message):
        gpt.require_finite(run, "train_loss", 1.0, bad)


def test_saving_to_a_full_disk_waits_until_there_is_room(tmp_path, monkeypatch, capsys):
    attempts, write_file = [], gpt.write_file

    def full_twice(path, data):
        attempts.append(path)
        if len(attempts) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_file(path, data)
    monkeypatch.setattr(gpt, "write_file", full_twice)
    monkeypatch.setattr(gpt, "DISK_RETRY_S", 0.0)
    gpt.save(gpt.Run(tiny_config()), tmp_path / "x.weights", b"weights" * 200)
    assert (tmp_path / "x.weights").read_bytes() == b"weights" * 200
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "file:x.weights bytes:1400" in lines[0]
    assert "make 1,400 bytes of room" in lines[0]


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_stdout_that_takes_nothing_any_more_ends_no_run(in_tmp, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Full())
    with gpt.Run.start(tiny_config(run_id="abc"), {}) as run:
        run.begin()
        run.log("a line")
        run._shows_progress = True
        run.progress("step 1")
    assert (in_tmp / "logs" / "abc.txt").read_text() == "a line\n"


def test_two_threads_may_log_at_once(in_tmp, capsys, monkeypatch):
    """A write to a slow disk must not see its buffer change."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: (time.sleep(0.002), write(file, data))[1])
    with gpt.Run.start(tiny_config(run_id="abc"), {}) as run:
        run.begin()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda name: [run.log(f"{name} {k}") for k in range(20)], "ab"))
    lines = (in_tmp / "logs" / "abc.txt").read_text().splitlines()
    assert sorted(lines) == sorted(f"{name} {k}" for name in "ab" for k in range(20))


def test_a_file_system_without_locks_is_no_hindrance(in_tmp, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with gpt.Run.start(tiny_config(run_id="abc"), {}) as run:
        run.begin()
        run.log("a line")
    assert (in_tmp / "logs" / "abc.txt").read_text() == "a line\n"


def test_a_folder_of_logs_that_cannot_be_made_is_refused(in_tmp):
    (in_tmp / "logs").write_text("in the way")
    with pytest.raises(gpt.ConfigError, match="logs/abc.txt: cannot be written"):
        gpt.Run.start(tiny_config(run_id="abc"), {})


@pytest.mark.parametrize(("rank", "is_shared", "told"), [("0", True, True), ("1", True, False), ("1", False, True)])
def test_an_error_before_ranks_have_joined_is_told_by_those_who_meet_it(monkeypatch, capsys, rank, is_shared, told):
    monkeypatch.setenv("RANK", rank)
    assert gpt.report(None, "error: the GPU is busy", is_shared) is told
    assert capsys.readouterr().err == "error: the GPU is busy\n" * told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_interrupt_once_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with pytest.raises(gpt.Interrupted) as caught:
        with gpt.catch_signals(lambda number: pytest.fail("was not stuck")):
            try:
                os.kill(os.getpid(), number)
                time.sleep(5)
            finally:
                os.kill(os.getpid(), number)             # a second one does not disturb the way out
    assert caught.value.args == (number,) and signal.getsignal(number) is before


def test_a_call_that_does_not_return_is_abandoned(repo):
    """The main thread waits where Python's handlers cannot run; another thread ends the process."""
    code = ("import ctypes, os, train_gpt as gpt\n"
            "gpt.SIGNAL_GRACE_S = 0.2\n"
            "pause = ctypes.CDLL(None).sleep\n"
            "def wait():\n"
            "    end = __import__('time').time() + 60\n"
            "    while __import__('time').time() < end:\n"
            "        try:\n"
            "            print('waiting', flush=True)\n"
            "            pause(60)\n"
            "        except gpt.Interrupted: pass\n"
            "with gpt.catch_signals(lambda number: os._exit(100 + number)): wait()\n")
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(repo)},
                          stdout=subprocess.PIPE, text=True) as stuck:
        assert stuck.stdout.readline() == "waiting\n"
        stuck.send_signal(signal.SIGTERM)
        assert stuck.wait(timeout=20) == 100 + signal.SIGTERM


RANK = """
import os, pathlib, signal, sys, time
def write_log(number, frame):
    time.sleep(float(sys.argv[1]))                    # on the way out, within the grace
    pathlib.Path("log").write_text("error Interrupted")
    sys.exit(1)
answer = write_log if os.environ["RANK"] == sys.argv[2] else signal.SIG_IGN
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, answer)
pathlib.Path(f"started{os.environ['RANK']}").touch()
while True:
    time.sleep(0.1)
"""
LAUNCH = "import sys, launch; launch.GRACE_S = 1.5; sys.exit(launch.main(['2', 'rank.py', *sys.argv[1:]]))"


@pytest.mark.parametrize(("number", "obeying"), [(signal.SIGTERM, "none"), (signal.SIGINT, "0")])
def test_a_launch_ends_although_ranks_ignore_its_signal_and_one_may_write_its_log(in_tmp, repo, number, obeying):
    (in_tmp / "rank.py").write_text(RANK)
    env = {**os.environ, "PYTHONPATH": str(repo)}
    with subprocess.Popen([sys.executable, "-c", LAUNCH, "1.0", obeying], env=env, start_new_session=True) as run:
        try:
            while not all((in_tmp / f"started{rank}").exists() for rank in (0, 1)):
                assert run.poll() is None
                time.sleep(0.05)
            run.send_signal(number)
            assert run.wait(timeout=20) == 128 + number
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
    assert (in_tmp / "log").exists() == (obeying == "0")


def test_a_launch_gives_ranks_longer_than_they_give_themselves():
    assert launch.GRACE_S >= gpt.SIGNAL_GRACE_S + 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_on_a_terminal_and_nothing_elsewhere(monkeypatch, capsys):
    gpt.Run(tiny_config()).progress("step 1")
    assert capsys.readouterr().out == ""
    for changes, shown in ((dict(), True), (dict(quiet=True), False)):
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        run = gpt.Run(tiny_config(**changes))
        run.progress("step 1")
        run.log("a log line")
        assert ("\rstep 1" in screen.getvalue()) == shown
        assert screen.getvalue().endswith(("\r      \r" if shown else "") + "a log line\n")


@pytest.mark.parametrize("screen", [Terminal(), io.StringIO()])
def test_training_and_scoring_show_progress_on_a_terminal_only(tmp_path, monkeypatch, screen):
    write_run_data(tmp_path)
    cfg = tiny_config(data_path=str(tmp_path), allow_unverified=False, ttt_batch_size=2)
    data, model = gpt.Dataset.open(cfg), gpt.GPT(cfg)
    monotonic = itertools.count()                         # so much later each time that every text is due
    monkeypatch.setattr(gpt.time, "monotonic", lambda: float(next(monotonic)))
    monkeypatch.setattr(sys, "stdout", screen)
    run = gpt.Run(cfg)
    gpt.train(cfg, run, data, model)
    gpt.evaluate_ttt(cfg, run, model, data)
    shown = re.findall(r"\r([^\r\n]*\S)[^\r\n]*\r", screen.getvalue())
    if not screen.isatty():
        assert "\r" not in screen.getvalue() and "train_loss" in screen.getvalue()
        return
    steps = [m for text in shown if (m := re.fullmatch(
        r"step (\d)/4, train_loss \d\.\d{4} at step (\d), (\d+) s left", text))]
    assert [(m[1], m[2]) for m in steps] == [("1", "1"), ("2", "2"), ("3", "3")]
    batches = [m for text in shown if (m := re.fullmatch(
        r"phase ([12])/2: batch (\d+)/(\d+), bpb \d+\.\d{4}, (\d+) s left", text))]
    for phase in "12":
        done, total = zip(*((int(m[2]), int(m[3])) for m in batches if m[1] == phase))
        assert done == tuple(range(1, total[0] + 1))
        last = [m for m in batches if m[1] == phase][-1]
        assert last[4] == "0"


def test_the_time_left_follows_the_clock_plan_in_training_and_the_planned_cost_in_scoring(
        tmp_path, monkeypatch):
    write_run_data(tmp_path)
    cfg = tiny_config(data_path=str(tmp_path), allow_unverified=False, max_wallclock_seconds=100.0,
                      gptq_reserve_seconds=20.0, phased_ttt_prefix_docs=0, ngram_tilt_enabled=False)
    data, model, run, now_s, texts = gpt.Dataset.open(cfg), gpt.GPT(cfg), gpt.Run(cfg), [0.0], []
    monkeypatch.setattr(gpt.time, "perf_counter", lambda: now_s[0])
    monkeypatch.setattr(gpt.Run, "progress", lambda run, text: texts.append(text) if text else None)
    monkeypatch.setattr(gpt, "estimate_calibration", lambda *args: 1.0)
    train_rows, score_batch = gpt.train_rows, gpt.Scorer.score_batch

    def slow_rows(*args, **kwargs):
        now_s[0] += 15.0
        return train_rows(*args, **kwargs)

    def slow_batch(scorer, batch, *rest):                 # three times as slow as planned
        now_s[0] += 3 * (batch.end_us - int(batch.steps.start_us[0])) / 1e6
        return score_batch(scorer, batch, *rest)
    monkeypatch.setattr(gpt, "train_rows", slow_rows)
    monkeypatch.setattr(gpt.Scorer, "score_batch", slow_batch)
    gpt.train(cfg, run, data, model)
    assert [text.split(", ")[-1] for text in texts] == ["65 s left", "50 s left", "35 s left"]
    docs, texts[:] = gpt.Documents(np.array([0, 40]), np.array([41, 21])), []
    [phase] = gpt.plan_batches(docs, batch_size=1, lanes=1, chunk=cfg.ttt_chunk_size,
                               window=cfg.ttt_eval_seq_len)
    for batch in phase[0]:
        batch.steps.start_us[:] *= 1000                   # seconds, not milliseconds
        batch.steps.cost_us[:] *= 1000
    scorer = gpt.Scorer(cfg, run, model, 61)
    scorer.follow(docs, gpt.certified_order([phase], docs, cfg.ttt_chunk_size))
    gpt.score_phase(scorer, phase, [gpt.lane_draws(cfg, run, 0)], "1/1")
    left_us = phase[0][1].end_us - phase[0][0].end_us
    assert [text.split(", ")[-1] for text in texts] == [f"{3 * left_us / 1e6:.0f} s left", "0 s left"]
    assert left_us >= 1e6


def test_a_cpu_run_computes_in_fp32():
    assert gpt.Run(tiny_config()).compute_dtype == torch.float32


def test_generators_depend_on_seed_and_keys_only():
    def draw(seed, *keys):
        return torch.rand(4, generator=gpt.Run(tiny_config(seed=seed)).generator(*keys)).tolist()
    first = draw(1, 2)
    torch.manual_seed(99)
    assert draw(1, 2) == first
    assert len({tuple(draw(*keys)) for keys in ((1, 2), (1, 3), (2, 2), (2, 1), (1,), (1, 2, 3))}) == 6


def test_compiled_c_can_be_called_and_leaves_no_file(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert gpt.compile_c("int twice(int x) { return 2 * x; }").twice(21) == 42
    assert not list(tmp_path.iterdir())


def test_a_missing_c_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    message = "no C compiler: expected `no-such-compiler` on the PATH; install gcc"
    with pytest.raises(RuntimeError, match=message):
        gpt.compile_c("int x;")


def test_a_c_compiler_may_have_arguments(monkeypatch):
    monkeypatch.setenv("CC", f"{os.environ.get('CC', 'cc')} -DTIMES=3")
    assert gpt.compile_c("int times(int x) { return TIMES * x; }").times(5) == 15


def test_a_c_compiler_that_cannot_be_run_is_an_error_in_words(monkeypatch, tmp_path):
    (tmp_path / "cc").write_text("no program")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    with pytest.raises(gpt.RunError, match="cannot be run .*; correct CC or TMPDIR"):
        gpt.compile_c("int y;")


def test_an_unexpected_error_is_shown_with_its_place_and_the_rank_ends_by_itself(in_tmp, monkeypatch, capsys):
    def fail(*_):
        raise ZeroDivisionError("by nothing")
    monkeypatch.setattr(gpt, "run_pipeline", fail)
    assert gpt.main([]) == 1
    told = capsys.readouterr().err
    assert "error: unexpected ZeroDivisionError of rank 0 in stage start" in told
    assert "Traceback" in told and told.rstrip().endswith("ZeroDivisionError: by nothing")


@pytest.mark.parametrize("rank", [None, "0"])
def test_a_launched_rank_writes_all_and_ends_without_the_interpreters_clean_up(rank):
    """There threads of its communicator may meet an interpreter that is gone."""
    script = ("import atexit, runpy, sys; atexit.register(print, 'clean-up'); sys.argv = ['train_gpt.py', '--help']; "
              "runpy.run_path('train_gpt.py', run_name='__main__')")
    env = {name: value for name, value in os.environ.items() if name != "RANK"} | ({"RANK": rank} if rank else {})
    done = subprocess.run([sys.executable, "-c", script], cwd=gpt.REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "EVAL_WALLCLOCK_SECONDS" in done.stdout
    assert ("clean-up" in done.stdout) == (rank is None)


def test_the_message_of_a_failing_c_compiler_is_shown():
    with pytest.raises(RuntimeError, match="failed: .*error"):
        gpt.compile_c("this is no C")
