"""Companions and benchmarks: 2 for what a command line names wrongly, 1 for what a check or the work itself finds."""
import os
import runpy
import sys

import pytest

import train_gpt as gpt
from log_samples import write_log

REPO = gpt.REPO


@pytest.fixture
def call(monkeypatch, tmp_path, capfd):
    """Run a script as the command line would, in tmp_path; returns (exit code, text on stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("something else\n")
    (tmp_path / "docs.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    write_log(tmp_path, "log")

    def run(script: str, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(REPO / script), *arguments])
        try:
            runpy.run_path(str(REPO / script), run_name="__main__")
        except SystemExit as stop:
            return stop.code or 0, capfd.readouterr().err
        return 0, capfd.readouterr().err
    return run


SHARDS = ("--merges", "all")
TOKENIZER = ("--sp", str(REPO / "tokenizers" / "caseops_8192.model"))
PREPARE, REHEARSAL = "prepare_caseops_data.py", "benchmarks/rehearsal.py"


@pytest.mark.parametrize("line", [
    ("report.py", "table", "absent"), ("report.py", "check", "file"), ("report.py", "check", "folder"),
    ("report.py", "pr", "log.txt", "--against", "absent"), ("report.py", "html", "absent", "--out", "a.html"),
    ("report.py", "table", "log.txt", "--json", "absent/a.json"), ("report.py", "watch", "file", "--once"),
    ("report.py", "watch", "file"), ("report.py", "watch", "folder"),
    ("report.py", "pack", "folder", "log.txt", "--force"), ("report.py", "nonsense"),
    ("pack.py", "folder"), ("pack.py", "file/new"), ("pack.py",),
    ("ablate.py", "absent", "--out", "new"), ("ablate.py", "file", "--out", "new"),
    ("check.py", "--nonsense"), ("lossless_caps.py", "nonsense"),
    ("demo.py", "corpus", "new", "--docs", "absent"), ("demo.py", "corpus", "file/new"), ("demo.py", "nonsense"),
    ("launch.py", "2", "absent.py"), ("launch.py", "2", "folder"), ("launch.py", "0", "file"), ("launch.py",),
    (PREPARE, "verify", "absent"), (PREPARE, "verify"), (PREPARE, "unfuse", "absent", "new"),
    (PREPARE, "fuse", "absent", "new", *SHARDS), (PREPARE, "fuse", "folder", "new", "--merges", "few"),
    (PREPARE, "--docs", "absent", "--out", "new"), (PREPARE, "--docs", "docs.jsonl", "--out", "file/new", *TOKENIZER),
    (PREPARE, "--docs", "docs.jsonl", "--out", "new", "--sp", "absent"),
    (PREPARE, "--docs", "docs.jsonl", "--out", "new", "--sp", "file"),
    ("benchmarks/evaluation.py", "--save", "absent/table.json"), ("benchmarks/training.py", "--out", "folder"),
    ("benchmarks/evaluation.py", "--plan-only", "absent"), ("benchmarks/hedge.py", "absent"),
    ("benchmarks/prepare.py", "--docs", "absent"), ("benchmarks/prepare.py", "--docs", "docs.jsonl", "--sp", "absent"),
    ("benchmarks/rounding.py", "--sizes", "large"), ("benchmarks/rounding.py",),
    ("benchmarks/rounding.py", "--sizes", "12,inf"), ("benchmarks/rounding.py", "--sizes", "nan"),
    ("benchmarks/readouts.py", "nonsense"),
    (REHEARSAL, "table", "absent"), (REHEARSAL, "run", "--data", "absent", "--out", "new"),
    (REHEARSAL, "run", "--data", "folder", "--out", "new", "--against", "absent"),
    (REHEARSAL, "run", "--data", "folder", "--out", "file/new"), (REHEARSAL, "nodes", "--out", "file/new"),
    (REHEARSAL, "validation", "folder", "--source", "absent"), ("benchmarks/training.py", "--paths", "nonsense"),
    (REHEARSAL, "validation", "new", "--source", "folder", "--share", "0"),
], ids=" ".join)
def test_what_is_named_wrongly_ends_with_two_and_in_words(call, tmp_path, line):
    before = {path for path in tmp_path.rglob("*")}
    code, told = call(*line)
    assert code == 2 and told and "Traceback" not in told
    assert {path for path in tmp_path.rglob("*")} == before                  # nothing was begun


@pytest.mark.parametrize("script", ["evaluation", "rounding", "training"])
def test_a_bad_setting_ends_a_benchmark_with_two(call, monkeypatch, script):
    for name in os.environ.keys() & {field.upper() for field in gpt.Config.__dataclass_fields__}:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TTT_LORA_RNK", "1")
    code, told = call(f"benchmarks/{script}.py")
    assert code == 2 and "did you mean TTT_LORA_RANK" in told


@pytest.mark.parametrize("sizes", ["0", "-1", "1000", "16,inf", "15.9,0.0"])
def test_sizes_that_no_artifact_can_have_are_refused_before_weights_are_read(call, monkeypatch, sizes):
    monkeypatch.setenv("RUN_ID", "absent")
    code, told = call("benchmarks/rounding.py", f"--sizes={sizes}")
    assert code == 2 and f"--sizes {sizes}: expected numbers between 0 and 1000" in told


def test_what_a_check_or_the_work_finds_ends_with_one(call, tmp_path):
    write_log(tmp_path, "slow", eval_s="1200.0")
    (tmp_path / "damaged.txt").write_text((tmp_path / "log.txt").read_text() + "1/3 train_loss: \n")
    for line in (("report.py", "check", "slow.txt"), ("report.py", "check", "damaged.txt"),
                 (REHEARSAL, "table", "damaged.txt"), (PREPARE, "verify", "folder"),
                 (PREPARE, "--docs", "file", "--out", "new")):
        assert call(*line)[0] == 1, line


def test_a_missing_script_is_named_once(call):
    code, told = call("launch.py", "4", "absent.py")
    assert code == 2 and told.count("absent.py") == told.count("\n") == 1
