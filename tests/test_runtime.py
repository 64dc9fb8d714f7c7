"""Section 2: ranks, collectives, the log file, seeded generators, the C compiler."""
import re

import pytest
import torch

import train_gpt as gpt
from helpers import tiny_config


@pytest.fixture
def in_tmp(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("world_size", ["3", "5", "6", "7", "16"])
def test_world_sizes_that_do_not_divide_a_step_are_refused(in_tmp, world_size):
    with pytest.raises(gpt.ConfigError, match=f"WORLD_SIZE={world_size}: expected 1, 2, 4 or 8, because one optimizer "
                                              "step is 8 rows.*change --nproc_per_node"):
        gpt.Run.start(tiny_config(), {"WORLD_SIZE": world_size, "RANK": "0"})
    assert not list(in_tmp.iterdir())


@pytest.mark.gpu
def test_more_processes_than_gpus_are_refused(in_tmp):
    count = torch.cuda.device_count()
    with pytest.raises(gpt.ConfigError, match=f"LOCAL_RANK={count}: expected below {count}, the GPUs of this machine"):
        gpt.Run.start(tiny_config(), {"LOCAL_RANK": str(count)})


def test_collectives_of_one_process_change_nothing():
    run, x = gpt.Run(tiny_config()), torch.tensor([1.0, 2.0])
    for collective in (run.sum, run.broadcast):
        assert collective(x) is x and x.tolist() == [1.0, 2.0]
    assert run.agree((0.5, True)) == [0.5, True]
    run.barrier()


def test_log_lines_reach_stdout_and_the_log_file_alike(in_tmp, capsys):
    with gpt.Run.start(tiny_config(run_id="abc"), {}) as run:
        run.log("first line")
        run.log("for the file", file_only=True)
        assert (in_tmp / "logs" / "abc.txt").read_text() == "first line\nfor the file\n"       # written at once
    assert capsys.readouterr().out == "first line\n"


def test_a_resumed_run_continues_its_own_log(in_tmp):
    for line in ("one", "two"):
        with gpt.Run.start(tiny_config(run_id="abc"), {}) as run:
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
        with gpt.Run.start(tiny_config(run_id="abc"), {}):
            raise gpt.DataError("shard 3 is broken")
    assert (in_tmp / "logs" / "abc.txt").read_text() == "error DataError\n"


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
    with pytest.raises(RuntimeError, match="no C compiler: expected `no-such-compiler` on the PATH; install gcc"):
        gpt.compile_c("int x;")


def test_the_message_of_a_failing_c_compiler_is_shown():
    with pytest.raises(RuntimeError, match="failed: .*error"):
        gpt.compile_c("this is no C")
