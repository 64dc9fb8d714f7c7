"""check.py: what could waste a run is found before it starts, with the fix; and run.sh asks before every record run."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import check
import train_gpt as gpt
from log_samples import write_log
from toy_data import write_run_data


def levels(items):
    return {item.name: item.level for item in items}


def texts(items, level):
    return " ".join(item.text for item in items if item.level == level)


@pytest.fixture
def fake_smi(tmp_path, monkeypatch):
    """fake_smi(gpus=..., apps=..., throttled=...) puts an nvidia-smi on the PATH that answers with these rows."""

    def install(gpus="0, GPU-a, NVIDIA H100 80GB HBM3, 81559, 81000, 580.1", apps="", throttled="Not Active", listed=""):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        script = folder / "nvidia-smi"
        script.write_text(f"""#!/bin/sh
case "$1" in
    -L) echo "{listed}" ;;
    *compute-apps*) echo "{apps}" ;;
    *sw_power_cap*) echo "GPU-a, 0, Active" ;;
    *clocks_event*) echo "GPU-a, 0, {throttled}"; echo "GPU-other, 1, Active" ;;
    *) echo "{gpus}" ;;
esac
""")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return install


@pytest.fixture
def one_h100(monkeypatch, fake_smi):
    """A machine with one H100 and FlashAttention-3, as far as torch and nvidia-smi say."""
    fake_smi()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    find_spec = check.importlib.util.find_spec
    monkeypatch.setattr(
        check.importlib.util,
        "find_spec",
        lambda name: True if name in ("flash_attn_interface", "triton") else find_spec(name),
    )


# --- settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [("SEDE", "SEED"), ("SEEDS", "SEED"), ("SKIP_CHEK", "SKIP_CHECK"), ("NPROC_PER_NOD", "NPROC_PER_NODE")],
)
def test_a_name_near_a_setting_is_an_error_that_names_it(name, meant):
    _, items = check.check_settings(gpt, {name: "1"})
    assert f"did you mean {meant}?" in texts(items, "error") or f"did you mean {meant}" in texts(
        items, "error"
    )


@pytest.mark.parametrize("name", ["EDITOR", "HOME", "PATH", "SHELL", "LANG", "SSH_TTY", "SEED", "SKIP_CHECK"])
def test_ordinary_variables_are_left_alone(name):
    cfg, items = check.check_settings(gpt, {name: "1"})
    assert cfg is not None and not texts(items, "error")


def test_refused_settings_are_told_once_and_changed_ones_are_listed():
    cfg, items = check.check_settings(gpt, {"ITERATION": "5"})
    assert cfg is None and texts(items, "error").count("ITERATION;") == 1 and len(items) == 1
    cfg, items = check.check_settings(gpt, {"EMA_DECAY": "0.9"})
    assert cfg.ema_decay == 0.9 and "EMA_DECAY=0.9" in texts(items, "ok")


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("SEDE", "SEED", 1),
        ("SEED", "SEED", 0),
        ("SEE", "SEED", 1),
        ("EDIT", "AUDIT", 2),
        ("ab", "ba", 1),
        ("abc", "", 3),
    ],
)
def test_two_swapped_letters_are_one_edit(a, b, distance):
    assert check.transposed_distance(a, b) == check.transposed_distance(b, a) == distance


# --- machine ------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_and_small_models_may_go_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (item,) = check.check_gpus(gpt.Config(), {})
    assert item.level == "error" and "./run.sh demo" in item.text
    (item,) = check.check_gpus(gpt.Config(train_batch_tokens=16384), {})
    assert item.level == "warning"


def test_a_driver_whose_gpus_torch_cannot_use_is_told_apart(monkeypatch, fake_smi):
    fake_smi()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (item,) = check.check_gpus(gpt.Config(), {})
    assert "cannot use them" in item.text


def test_a_free_gpu_is_fine_but_one_is_no_record_machine(one_h100):
    items = list(check.check_gpus(gpt.Config(), {}))
    found = levels(items)
    assert found["gpu"] == "warning" and "one-gpu" in texts(items, "warning")
    assert found["other runs"] == found["throttling"] == found["attention"] == found["driver"] == "ok"


def test_somebody_else_on_the_gpu_is_an_error(one_h100, fake_smi):
    fake_smi(apps="GPU-a, 77, /usr/bin/python3, 40000")
    assert "process 77 (python3, 40000 MiB)" in texts(check.check_gpus(gpt.Config(), {}), "error")
    fake_smi(apps="GPU-b, 77, /usr/bin/python3, 40000")
    assert not texts(check.check_gpus(gpt.Config(), {}), "error")
    fake_smi(gpus="0, GPU-a, NVIDIA H100 80GB HBM3, 81559, 60000, 580.1")
    assert "not visible here" in texts(check.check_gpus(gpt.Config(), {}), "warning")


FOUR = [{"index": str(i), "uuid": f"GPU-{letter}0{letter}0"} for i, letter in enumerate("abcd")]
MIG_LIST = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-a0a0)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-b0b0)
  MIG 1g.10gb     Device  0: (UUID: MIG-17c9)
  MIG 1g.10gb     Device  1: (UUID: MIG-2e55)"""


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        (None, "abcd"),
        ("0,2", "ac"),
        ("GPU-c0c0", "c"),
        ("GPU-d, 1", "db"),
        ("MIG-2e55", "b"),
        ("MIG-17c9,MIG-2e55", "b"),
        ("MIG-GPU-c0c0/1/0", "c"),
        ("1,-1,2", "b"),
        ("", ""),
    ],
)
def test_gpus_are_named_by_number_uuid_or_slice(fake_smi, text, chosen):
    fake_smi(listed=MIG_LIST)
    assert [gpu["uuid"][4] for gpu in check.choose_visible(FOUR, text)] == list(chosen)


def test_only_the_gpu_named_by_its_uuid_is_looked_at(one_h100, fake_smi):
    rows = "0, GPU-a, NVIDIA H100 80GB HBM3, 81559, 9, 580.1\n1, GPU-b, NVIDIA H100 80GB HBM3, 81559, 81000, 580.1"
    fake_smi(gpus=rows, apps="GPU-a, 77, python3, 40000")
    items = list(check.check_gpus(gpt.Config(), {"CUDA_VISIBLE_DEVICES": "GPU-b"}))
    assert not texts(items, "error") and "81,000 MiB free" in texts(items, "ok")


def test_a_slice_of_a_gpu_is_no_record_machine_and_has_its_own_memory(one_h100, fake_smi, monkeypatch):
    fake_smi(gpus="1, GPU-b0b0, NVIDIA H100 80GB HBM3, [N/A], [N/A], 580.1", listed=MIG_LIST,
             apps="GPU-b0b0, 77, python3, 4000")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=9856 << 20))
    items = list(check.check_gpus(gpt.Config(), {"CUDA_VISIBLE_DEVICES": "MIG-17c9"}))
    found = levels(items)
    assert found["gpu"] == found["gpu models"] == found["other runs"] == "warning"
    assert "free are 9,856" in texts(items, "error")


def test_a_throttled_gpu_is_a_warning(one_h100, fake_smi):
    fake_smi(throttled="Active")
    warnings = texts(check.check_gpus(gpt.Config(), {}), "warning")
    assert "GPU 0: hw_slowdown" in warnings and "GPU 1" not in warnings        # others may be at work
    assert "power_cap" not in warnings                     # every GPU at full load reports it


def test_older_drivers_are_asked_by_their_names(monkeypatch):
    def older(query):
        return [["GPU-a", "0", "Active"]] if query.endswith("clocks_throttle_reasons.hw_slowdown") else []

    monkeypatch.setattr(check, "ask_smi", older)
    assert "GPU 0: hw_slowdown" in check.check_throttling({"GPU-a"}).text
    monkeypatch.setattr(check, "ask_smi", lambda query: [])
    assert "not known" in check.check_throttling({"GPU-a"}).text


@pytest.mark.parametrize("processes", ["3", "8"])
def test_processes_must_divide_a_step_and_have_a_gpu_each(one_h100, processes):
    assert "NPROC_PER_NODE" in texts(check.check_gpus(gpt.Config(), {"NPROC_PER_NODE": processes}), "error")


def test_a_missing_kernel_is_an_error_unless_slow_runs_are_allowed(monkeypatch):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: True if name == "triton" else None)
    monkeypatch.setattr(check, "version_of", lambda name: None)
    assert "requirements-gpu.txt" in texts(check.check_kernels(gpt.Config(), (9, 0)), "error")
    assert not texts(check.check_kernels(gpt.Config(allow_slow=True), (9, 0)), "error")
    assert "FlashAttention-2" in texts(check.check_kernels(gpt.Config(), (8, 0)), "error")
    assert "COMPILE=0" in texts(check.check_kernels(gpt.Config(compile=False), (8, 0)), "error")


def test_a_kernel_package_that_cannot_be_imported_is_an_error(monkeypatch):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: name in ("triton", "flash_attn") or None)
    monkeypatch.setattr(check, "version_of", check.pinned(check.REPO / "requirements-gpu.txt").get)
    told = texts(check.check_kernels(gpt.Config(), (9, 0)), "error")
    assert "nvidia-cutlass-dsl is installed, but `import cutlass` finds nothing" in told and "PYTHONPATH" in told


def test_memory_is_compared_with_the_peak_of_a_log_of_such_a_model(monkeypatch):
    known = SimpleNamespace(peak_mib=41054, path=SimpleNamespace(name="known.txt"))
    monkeypatch.setattr(check, "find_log", lambda *_: known)
    assert "41,054 MiB per rank (known.txt)" in texts(check.check_memory(gpt.Config(), [24000.0]), "error")
    assert not texts(check.check_memory(gpt.Config(), [80000.0]), "error")


def test_a_missing_compiler_is_an_error(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    gpt.compile_c.cache_clear()
    assert "no-such-compiler" in texts(check.check_compiler(gpt), "error")


def test_missing_packages_end_the_check_with_the_command(monkeypatch):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    items = list(check.check_all({}))
    assert "missing: torch" in items[-1].text and "-m pip install -r requirements.txt" in items[-1].text


def test_pins_are_those_of_this_python(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text(
        '# text\na==1.0\nb==1; python_version < "3.4"\nb==2; python_version >= "3.4"\n'
        f'c==3; python_version == "3.{sys.version_info[1]}"\nd>=1,<2\n'
    )
    assert check.pinned(path) == {"a": "1.0", "b": "2", "c": "3"}


# --- data, disk, names --------------------------------------------------------------------------------------


def test_data_that_are_missing_or_unverified_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no such folder" in texts(check.check_data(gpt, gpt.Config(data_path="absent"))[1], "error")
    write_run_data(tmp_path / "shards")
    tokens, items = check.check_data(gpt, gpt.Config(data_path="shards", vocab_size=64))
    assert tokens > 0 and not texts(items, "error")
    assert "not the published split" in texts(items, "warning") and "never verified" in texts(
        items, "warning"
    )
    (tmp_path / "shards" / "manifest.json").unlink()
    assert "manifest.json" in texts(check.check_data(gpt, gpt.Config(data_path="shards"))[1], "error")


def test_validation_tokens_are_not_read(tmp_path, monkeypatch):
    write_run_data(tmp_path / "shards")
    monkeypatch.setattr(gpt, "read_shard", lambda path: pytest.fail(f"read {path}"))
    assert check.check_data(gpt, gpt.Config(data_path=str(tmp_path / "shards"), vocab_size=64))[0] > 0


def test_a_full_disk_a_file_in_the_way_and_a_locked_folder_are_errors(tmp_path, monkeypatch):
    assert check.check_folder(tmp_path / "new" / "deeper", 10, "logs").level == "ok"
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    assert "is a file" in check.check_folder(tmp_path / "file", 10, "logs").text
    assert "make room" in check.check_folder(tmp_path, 10**18, "logs").text
    if os.geteuid():
        tmp_path.chmod(0o500)
        assert "cannot write" in check.check_folder(tmp_path, 10, "logs").text


def test_a_name_that_was_used_is_an_error_unless_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path / "logs", "old")
    (item,) = check.check_names(gpt.Config(run_id="old"), {})
    assert item.level == "error" and "logs/old.txt" in item.text
    assert list(check.check_names(gpt.Config(run_id="new"), {}))[0].level == "ok"
    (tmp_path / "logs" / "failed.txt").write_text("")
    assert list(check.check_names(gpt.Config(run_id="failed"), {}))[0].level == "ok"
    assert list(check.check_names(gpt.Config(run_id="old", quantize_only=True), {}))[0].level == "error"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "old.weights").write_text("weights")
    assert list(check.check_names(gpt.Config(run_id="old", quantize_only=True), {}))[0].level == "ok"


def test_clocks_that_do_not_fit_are_told(monkeypatch):
    monkeypatch.setattr(check, "find_log", lambda *_: None)
    assert "more than the reserve" in texts(
        check.check_clocks(gpt.Config(gptq_calibration_batches=64), {"NPROC_PER_NODE": "1"}, None), "warning"
    )
    assert not texts(check.check_clocks(gpt.Config(), {"NPROC_PER_NODE": "8"}, None), "warning")
    known = SimpleNamespace(
        eval_ms=160_000, val_tokens=500_000, world_size=1, path=SimpleNamespace(name="known.txt")
    )
    monkeypatch.setattr(check, "find_log", lambda *_: known)
    assert "about 1,600 s of 600 s by known.txt" in texts(
        check.check_clocks(gpt.Config(), {"NPROC_PER_NODE": "1"}, 5_000_000), "warning"
    )


# --- run.sh -------------------------------------------------------------------------------------------------


def run_sh(repo, *arguments, cwd=None, **settings):
    env = {name: value for name, value in os.environ.items() if name not in ("SEED", "SKIP_CHECK")}
    return subprocess.run(
        ["bash", str(repo / "run.sh"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=env | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | settings,
    )


def test_a_record_run_does_not_start_on_errors(repo):
    told = run_sh(repo, SEDE="3", DATA_PATH="absent")
    assert (
        told.returncode == 1
        and "not started" in told.stderr
        and told.stdout.startswith(f"python: {sys.executable}")
    )
    assert (
        "did you mean SEED" in told.stdout
        and "no such folder" in told.stdout
        and "ok       compiler" not in told.stdout
    )


def test_the_check_alone_gets_its_arguments_and_starts_nothing(repo, tmp_path):
    told = run_sh(fake_run(repo, tmp_path), "check", "--quiet", PYTHON="./python")
    assert told.returncode == 0 and "checked --quiet" in told.stdout and "train" not in told.stdout


def test_every_item_is_one_line_and_errors_give_exit_code_1(monkeypatch, capsys):
    monkeypatch.setattr(
        check, "check_all", lambda env: [check.Item("ok", "a", "fine"), check.Item("error", "b", "fix it")]
    )
    assert check.main([]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "ok       a                fine",
        "error    b                fix it",
        "check ok:1 warnings:0 errors:1; SKIP_CHECK=1 runs all the same",
    ]
    assert check.main(["--quiet"]) == 1 and "fine" not in capsys.readouterr().out
    assert check.main(["--nonsense"]) == 2 and check.main(["--help"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("seeds",), "name the seeds"),
        (("seeds", "x"), "whole number"),
        (("seeds", "42", "042"), "whole number"),
        (("seeds", "42", "42"), "named twice"),
        (("one-gpu",), "no GPU found"),
        (("nonsense",), "unknown command"),
    ],
)
def test_run_sh_refuses_wrong_usage_with_exit_code_2(repo, tmp_path, arguments, words):
    told = run_sh(fake_run(repo, tmp_path), *arguments, PYTHON="./python")
    assert told.returncode == 2 and words in told.stderr


@pytest.mark.parametrize(
    ("command", "companion"),
    [("check", "check.py"), ("frontier", "caseops_merges.py"), ("seeds", "report.py"), ("proxy", "demo.py"), ("demo", "demo.py"), ("test", "tests")],
)
def test_a_command_whose_companion_is_not_in_a_submission_is_refused_in_a_sentence(
    repo, tmp_path, command, companion
):
    shutil.copy(repo / "run.sh", tmp_path)
    told = run_sh(tmp_path, command, "42")
    assert told.returncode == 2 and told.stdout == ""
    assert told.stderr == (
        f"error: ./run.sh {command} needs {companion}, which is in the repository, not here; run it there\n"
    )


@pytest.mark.parametrize("processes", ["three", "3", "0"])
def test_one_gpu_refuses_numbers_of_processes_that_do_not_divide_a_step(repo, tmp_path, processes):
    told = run_sh(fake_run(repo, tmp_path), "one-gpu", NPROC_PER_NODE=processes, PYTHON="./python")
    assert told.returncode == 2 and told.stderr.startswith("error: ") and told.stderr.count("\n") == 1


def test_one_gpu_says_the_budget_that_holds(repo, tmp_path):
    told = run_sh(fake_run(repo, tmp_path), "one-gpu", NPROC_PER_NODE="2", MAX_WALLCLOCK_SECONDS="30", PYTHON="./python")
    assert "one-gpu: 2 GPUs, 30 s of training" in told.stdout


def test_run_sh_says_how_to_install_what_an_interpreter_lacks(repo, tmp_path):
    empty = tmp_path / "python"
    empty.write_text("#!/bin/sh\nexit 1\n")
    empty.chmod(0o755)
    told = run_sh(repo, "check", PYTHON=str(empty))
    assert told.returncode == 2 and f"{empty} -m pip install -r requirements.txt" in told.stderr


def fake_run(repo, tmp_path):
    """run.sh in a folder whose train_gpt.py and check.py only print the settings they got."""
    tmp_path.mkdir(parents=True, exist_ok=True)
    for name in ("run.sh", "demo.py"):
        shutil.copy(repo / name, tmp_path)
    names = ("MAX_WALLCLOCK_SECONDS", "GPTQ_RESERVE_SECONDS", "EVAL_WALLCLOCK_SECONDS", "SEED", "DATA_PATH")
    (tmp_path / "train_gpt.py").write_text(
        f"import os; print('train', *(os.environ.get(n) for n in {names}))\n"
    )
    (tmp_path / "check.py").write_text("import sys; print('checked', *sys.argv[1:])\n")
    python = tmp_path / "python"  # answers run.sh's question at once, runs scripts as ever
    python.write_text(
        f'#!/bin/sh\n[ "$1" = - ] && echo "python 3 torch 2 gpus 0" && exit\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    return tmp_path


def test_one_gpu_multiplies_every_budget_and_outside_values_win(repo, tmp_path):
    folder = fake_run(repo, tmp_path)
    told = run_sh(folder, "one-gpu", NPROC_PER_NODE="1", PYTHON="./python").stdout
    assert "train 4800 32 4800 42" in told and "checked" in told
    assert (
        "train 100 32 4800 7"
        in run_sh(
            folder, "one-gpu", NPROC_PER_NODE="1", MAX_WALLCLOCK_SECONDS="100", SEED="7", PYTHON="./python"
        ).stdout
    )


def test_the_check_can_be_skipped_and_is_absent_from_a_submission(repo, tmp_path):
    folder = fake_run(repo, tmp_path)
    assert "checked" not in run_sh(folder, SKIP_CHECK="1", PYTHON="./python").stdout
    (folder / "check.py").unlink()
    told = run_sh(folder, PYTHON="./python")
    assert told.returncode == 0 and "train 600 4 None 42" in told.stdout


def test_run_sh_takes_an_interpreter_whose_path_has_a_blank(repo, tmp_path):
    folder = fake_run(repo, tmp_path / "a b")
    told = run_sh(folder, "check", PYTHON=str(folder / "python"))
    assert told.returncode == 0 and "checked" in told.stdout, told.stderr


def test_run_sh_works_in_its_own_folder_whatever_cdpath_says(repo, tmp_path):
    fake_run(repo, tmp_path / "here")
    other = fake_run(repo, tmp_path / "elsewhere" / "here")
    (other / "check.py").write_text("print('elsewhere')\n")
    told = run_sh(Path("here"), "check", PYTHON="./python", CDPATH=str(tmp_path / "elsewhere"), cwd=tmp_path)
    assert told.returncode == 0 and "checked" in told.stdout and "elsewhere" not in told.stdout


def test_options_of_the_shell_may_be_exported(repo, tmp_path):
    settings = dict(SHELLOPTS="braceexpand:hashall", BASHOPTS="cmdhist", SEED="7", PYTHON="./python")
    told = run_sh(fake_run(repo, tmp_path), **settings)
    assert told.returncode == 0 and "train 600 4 None 7" in told.stdout, told.stderr


def test_seeds_runs_one_after_the_other_then_tables_checks_and_packs(repo, tmp_path):
    folder = fake_run(repo, tmp_path)
    (folder / "report.py").write_text("import sys; print('report', *sys.argv[1:])\n")
    told = run_sh(folder, "seeds", "42", "0", "1234", PYTHON="./python")
    assert told.returncode == 0, told.stderr
    lines = [line for line in told.stdout.splitlines() if line.startswith(("train", "report"))]
    assert [line.split()[4] for line in lines[:3]] == ["42", "0", "1234"]
    assert [line.split()[1] for line in lines[3:]] == ["table", "check", "pack"]
    logs = lines[3].split()[2:]
    assert [log.split("_")[0] for log in logs] == ["logs/seed42", "logs/seed0", "logs/seed1234"]
    assert lines[5].split()[2].startswith("submission_") and lines[5].split()[3:] == logs
    (folder / "report.py").write_text("import sys; sys.exit(sys.argv[1] == 'check')\n")
    assert run_sh(folder, "seeds", "1", PYTHON="./python").returncode == 1


def test_proxy_makes_its_corpus_first_and_trains_briefly_on_it(repo, tmp_path):
    folder = fake_run(repo, tmp_path)
    (folder / "demo.py").write_text("import sys; print('demo', *sys.argv[1:])\n")
    (tmp_path / "caller").mkdir()
    told = run_sh(folder, "proxy", "--docs", "mine.jsonl", PYTHON="./python", cwd=tmp_path / "caller")
    assert told.returncode == 0, told.stderr
    lines = [line for line in told.stdout.splitlines() if line.startswith(("demo", "checked", "train"))]
    corpus = f"demo corpus .data/proxy --base {tmp_path / 'caller'} --docs mine.jsonl"
    assert lines == [corpus, "checked --quiet", "train 180 4 None 42 .data/proxy"]


def frontier_run(repo, tmp_path):
    """fake_run, with a data preparation that says what it is asked for and makes the folder."""
    folder = fake_run(repo, tmp_path)
    shutil.copy(repo / "caseops_merges.py", folder)
    (folder / "prepare_caseops_data.py").write_text(
        "import pathlib, sys; print('prepare', *sys.argv[1:7])\n"
        "out = pathlib.Path(sys.argv[3]); out.mkdir(parents=True, exist_ok=True)\n"
        "for name in ('manifest.json', 'merges.json'): (out / name).write_text('{}')\n"
    )
    names = ("QUARTER_ROWS_UNTIL", "HALF_ROWS_UNTIL", "RDO_LAMBDA", "FILL_ARTIFACT", "MAX_WALLCLOCK_SECONDS", "DATA_PATH")
    (folder / "train_gpt.py").write_text(
        f"import os; print('train', *(os.environ.get(n) for n in {names}))\n"
    )
    return folder


def test_frontier_has_tokens_joined_once_and_states_its_levers(repo, tmp_path):
    folder = frontier_run(repo, tmp_path)
    for _ in range(2):                             # --reuse compares what is there with the shards
        told = run_sh(folder, "frontier", DATA_PATH="shards/", PYTHON="./python")
        assert told.returncode == 0, told.stderr
        lines = [line for line in told.stdout.splitlines() if line.startswith(("prepare", "checked", "train"))]
        joined = "prepare fuse shards shards_fused --merges all --reuse"
        assert lines == [joined, "checked --quiet", "train 0.1 0.5 1 1 600 shards_fused"]


def test_frontier_knows_where_the_published_shards_lie(repo, tmp_path):
    import train_gpt as gpt
    told = run_sh(frontier_run(repo, tmp_path), "frontier", PYTHON="./python")
    path = gpt.Config().data_path
    assert told.returncode == 0 and f"prepare fuse {path} {path}_fused" in told.stdout


def test_frontier_takes_joined_shards_as_they_are_and_outside_values_win(repo, tmp_path):
    folder = frontier_run(repo, tmp_path)
    (folder / "joined").mkdir()
    (folder / "joined" / "merges.json").write_text("{}")
    told = run_sh(folder, "frontier", DATA_PATH="joined", RDO_LAMBDA="0", PYTHON="./python")
    assert "prepare" not in told.stdout and "train 0.1 0.5 0 1 600 joined" in told.stdout


def test_frontier_stops_when_tokens_cannot_be_joined(repo, tmp_path):
    folder = frontier_run(repo, tmp_path)
    (folder / "prepare_caseops_data.py").write_text("import sys; sys.exit('no shards')\n")
    told = run_sh(folder, "frontier", DATA_PATH="shards", PYTHON="./python")
    assert told.returncode == 1 and "no shards" in told.stderr and "train" not in told.stdout
