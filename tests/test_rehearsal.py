"""benchmarks/rehearsal.py: its validation set is the record's in small, its table follows from logs,
and what it says of faults and nodes holds."""
import json
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

import train_gpt as gpt
from helpers import tiny_config
from log_samples import write_log
from toy_data import write_run_data


@pytest.fixture(scope="module")
def rehearsal():
    sys.path.insert(0, str(gpt.REPO / "benchmarks"))
    try:
        import rehearsal
    finally:
        sys.path.remove(str(gpt.REPO / "benchmarks"))
    return rehearsal


# --- validation ---------------------------------------------------------------------------------------------

def test_the_validation_set_has_the_records_lengths_and_passes_every_check_of_a_run(rehearsal, tmp_path):
    source, folder = write_run_data(tmp_path / "source"), tmp_path / "made"
    notes = rehearsal.make_validation(folder, source, share=1000, train_shards=5)
    cfg = tiny_config(data_path=str(folder), allow_unverified=False)
    data, run = gpt.Dataset.open(cfg), gpt.Run(cfg)
    assert gpt.check_tokenizer(cfg, data).parent == folder and len(data.train) == 5
    for split in ("train", "val"):
        assert data.check_values(cfg, run, split)
    tokens, num_bytes = data.load_validation()
    docs = gpt.find_documents(tokens)
    assert sorted(docs.length) == rehearsal.stratified_lengths(1000).tolist()
    assert notes == rehearsal.notes_of(folder)
    assert notes == {"share": 1000, "documents": len(docs.start), "prefix_docs": 1}
    text = gpt.read_shard(source / "fineweb_val_000000.bin")
    assert set(tokens.tolist()) == set(text.tolist())
    assert not num_bytes[tokens == gpt.BOS].any() and num_bytes[tokens != gpt.BOS].all()


@pytest.mark.parametrize("option", ["--share", "--train-shards"])
@pytest.mark.parametrize("value", ["0", "-3", "1001", "some"])
def test_a_share_and_training_shards_are_whole_numbers_from_one_on(rehearsal, tmp_path, capsys, option, value):
    source, folder = write_run_data(tmp_path / "source"), tmp_path / "made"
    assert rehearsal.main(["validation", str(folder), "--source", str(source), option, value]) == 2
    assert f"argument {option}: {value!r}: expected a whole number from 1 to 1000" in capsys.readouterr().err
    assert not folder.exists()


def test_a_folder_is_made_when_all_that_it_will_hold_is_known(rehearsal, tmp_path):
    source, folder = write_run_data(tmp_path / "source"), tmp_path / "made"
    with pytest.raises(ValueError):
        rehearsal.make_validation(folder, source, share=0, train_shards=1)
    assert not folder.exists()


@pytest.mark.parametrize("share", [2, 8, 50])
def test_a_stratified_share_holds_its_part_of_the_targets(rehearsal, share):
    part, whole = rehearsal.stratified_lengths(share), rehearsal.evaluation.record_lengths()
    assert len(part) == len(whole) // share
    assert rehearsal.record_targets(part) * share == pytest.approx(rehearsal.record_targets(whole), rel=0.01)


@pytest.mark.parametrize(("hardware", "gpu"), [("4x NVIDIA H200", "H200"), ("4x NVIDIA H100 80GB HBM3", "H100"),
                                               ("4x x86_64", "H100")])
def test_scaling_a_run_that_took_what_was_predicted_gives_what_is_predicted_for_all(rehearsal, tmp_path, hardware,
                                                                                   gpu):
    notes, part = {"share": 100}, rehearsal.stratified_lengths(100)
    predicted_s = rehearsal.predicted_seconds(gpt.Config(), part, 10, 4, gpu)
    run = SimpleNamespace(path=tmp_path / "log", world_size=4, ttt=SimpleNamespace(ms=1000 * predicted_s), hardware=hardware,
                          phased={"total_docs": len(part), "prefix_docs": 10},
                          setting=lambda name: getattr(gpt.Config(), name))
    rows = dict(rehearsal.scale_evaluation(run, notes))
    by_plan = [value for name, value in rows.items()
               if "on 4 GPUs, measured times" in name and "planned" in name]
    assert by_plan == [rows["evaluation of all on 4 GPUs, predicted"]]
    run.phased["total_docs"] += 1
    with pytest.raises(rehearsal.RehearsalError, match="--data"):
        list(rehearsal.scale_evaluation(run, notes))


# --- table --------------------------------------------------------------------------------------------------

def test_the_table_follows_from_the_logs(rehearsal, tmp_path, capsys):
    eight = write_log(tmp_path / "logs", "eight")
    one = write_log(tmp_path / "logs", "one", world_size=1)
    one.write_text(one.read_text().replace("tok_per_s:8090000", "tok_per_s:1070000")
                   .replace("tok_per_s:5460000", "tok_per_s:700000"))
    (tmp_path / "gpu_busy.csv").write_text("training,0,90\ntraining,0,100\ntraining,1,80\nscoring,0,50\n")
    assert rehearsal.main(["table", str(eight), "--against", str(one)]) == 0
    rows = dict(re.fullmatch(r"\| (.*) \| (.*) \|", line).groups()
                for line in capsys.readouterr().out.splitlines())
    assert rows["steps"] == "4,852"
    assert rows["tokens/s, loops off / on"] == "8,090,000 / 5,460,000"
    assert rows["tokens/s per GPU, loops off / on"] == "1,011,250 / 682,500"
    assert rows["scaling efficiency against 1 GPU (one)"] == "94.5 % / 97.5 %"
    assert rows["time: training"] == "596.0 s" and rows["time: calibration"] == "3.1 s"
    assert rows["time: scoring with test-time training"] == "521.1 s"
    assert rows["peak memory allocated per GPU, training"] == "41,737 MiB"
    assert rows["GPU without a kernel in training, mean by GPU (2 samples)"] == "5 %, 20 %"
    assert rows["barriers"] == "not in the log, as of one process"
    eight.write_text(eight.read_text() + 'barrier before:"the score" last_rank:1 waits_ms:[812.4, 0.1]\n')
    assert rehearsal.main(["table", str(eight)]) == 0
    assert "| barrier before the score: last rank, wait of each | 1; 812.4, 0.1 ms |" in capsys.readouterr().out


def test_of_several_starts_the_table_shows_the_last_that_trained(rehearsal, tmp_path, capsys):
    path = write_log(tmp_path / "logs", "again")
    first = path.read_text()
    head = first[:first.index("gptq:reserving")].replace("  seed: 42", "  seed: 42\n  ttt_eval_only: 1")
    path.write_text(first.replace("step: 4852/", "step: 4800/").replace("steps:4852", "steps:4800") + first + head)
    assert rehearsal.main(["table", str(path), "--against", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "| measured | again#2 |" in shown and "| steps | 4,852 |" in shown
    assert "| scaling efficiency against 8 GPU (again#2) | 100.0 % / 100.0 % |" in shown
    path.write_text(head)                                 # nothing trained: the last start
    assert rehearsal.read_log(path).resumed == "ttt_eval_only"


@pytest.mark.parametrize("named", ["2,3", "2, 3,0", "GPU-c,GPU-d", None])
def test_samples_are_of_the_gpus_that_the_run_sees(rehearsal, tmp_path, monkeypatch, named):
    smi = tmp_path / "nvidia-smi"
    rows = "".join(f"{index}, GPU-{'abcd'[index]}, {90 + index}\n" for index in (0, 1, 2, 3))
    smi.write_text(f"#!/bin/sh\ncat <<END\n{rows}{rows}2, GPU-c, [N/A]\nEND\nexec sleep 60\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    wanted, saved = ([2, 3] if named else [0, 1]), tmp_path / "busy.csv"
    until = time.monotonic() + 10
    with rehearsal.BusySampler(tmp_path / "log", saved, 2):
        while time.monotonic() < until and not (saved.exists() and saved.read_text().count("\n") >= 4):
            time.sleep(0.02)
    assert saved.read_text().splitlines() == [f"start,{index},{90 + index}" for index in wanted] * 2


def test_a_stage_is_known_by_the_line_that_begins_it(rehearsal, tmp_path):
    text = rehearsal.runlog.SOURCE.sub("", write_log(tmp_path).read_text())
    found = [rehearsal.stage_of(text[:end.end()]) for end in re.finditer("\n", text)]
    reached = list(dict.fromkeys(found))
    assert reached == [stage for stage in ["start", *rehearsal.BEGINS] if stage in reached]
    assert {"training", "diagnostic before", "quantization", "end"} <= set(reached)


# --- faults and nodes ---------------------------------------------------------------------------------------

def test_an_outcome_that_breaks_a_promise_is_told(rehearsal, tmp_path):
    fault, stage = rehearsal.FAULTS["killed"], rehearsal.STAGES["calibration"]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "rehearsal.weights").write_bytes(b"broken")
    launch = SimpleNamespace(process=SimpleNamespace(returncode=0),
                             texts=lambda: ("", "it ended in stage training"))
    problems = rehearsal.check_outcome(launch, fault, stage, 15.1, tmp_path, {})
    assert [problem.split(":")[0].split(", ")[0] for problem in problems[:4]] == [
        "ended after 15.1 s", "exit code 0", "no message names stage calibration", "no message names a rank"]
    assert "rehearsal.weights: expected a file beginning with" in problems[4]
    launch.process.returncode = None
    assert rehearsal.check_outcome(launch, fault, stage, 75.0, tmp_path, {}) == ["still running after 75 s"]


def test_losses_are_compared_line_by_line(rehearsal):
    one = ["1/20 train_loss: 9.0", "diagnostic quantized val_loss:2.5 val_bpb:1.0"]
    assert rehearsal.largest_difference(one, one) == 0
    assert rehearsal.largest_difference(one, [one[0], one[1].replace("2.5", "2.25")]) == 0.25
    for other in (one[::-1], one[:1]):
        assert rehearsal.largest_difference(one, other) == float("inf")
    assert rehearsal.losses_of("\n".join(["any", *one])) == one


def rehearse(*arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(gpt.REPO)}
    return subprocess.run([sys.executable, str(gpt.REPO / "benchmarks" / "rehearsal.py"), *arguments], env=env,
                          capture_output=True, text=True)


def faults() -> subprocess.CompletedProcess:
    script = str(gpt.REPO / "tests" / "two_process_limit.py")
    return rehearse("faults", "--processes", "2", "--together", "--script", script)


def nodes() -> subprocess.CompletedProcess:
    return rehearse("nodes", "--processes", "2", "--launches", "2", "--set", "ITERATIONS=3", "--set", "TTT_EVAL_SEQ_LEN=64",
                    "--set", "TTT_CHUNK_SIZE=63")


@pytest.mark.slow
@pytest.mark.two_process
@pytest.mark.early(work=faults)
def test_every_fault_in_every_stage_is_met_as_promised(early):
    done = early(faults)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row.strip("| ").split(" | ") for row in done.stdout.splitlines()[2:]]
    stages = {"training": "training", "calibration": "calibration", "evaluation": "scoring"}
    assert {row[0] for row in rows} == {f"{fault} in {name}" for fault in ("killed", "stopped") for name in stages}
    for case, ended, _, outcome, last_words in rows:
        fault, _, name = case.split()
        assert outcome == "as it should" and f"in stage {stages[name]}" in last_words, case
        assert ("rank 1 was killed" if fault == "killed" else "made no progress") in last_words, case
        assert float(ended.removesuffix(" s")) < 40, case


@pytest.mark.slow
@pytest.mark.two_process
@pytest.mark.early(work=nodes)
def test_two_rendezvous_members_compute_what_one_launch_does_and_write_once(early):
    done = early(nodes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "identical:1 largest_difference:0 of_two_equal_launches:0 files_written_once:1" in done.stdout


@pytest.mark.parametrize(("arguments", "message"), [
    (["run"], "run needs --data"), (["faults", "--processes", "1"], "at least two processes"),
    (["nodes", "--processes", "1"], "even number"), (["table", "no.txt"], "no.txt: expected a log file"),
    (["faults", "--set", "iterations=3"], "expected NAME=VALUE"),
    (["faults", "--only", "killed"], "invalid choice")])
def test_wrong_usage_gets_a_sentence_and_exit_code_two(rehearsal, capsys, arguments, message):
    assert rehearsal.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_log_to_compare_with_is_read_before_anything_runs(rehearsal, tmp_path, monkeypatch, capsys):
    (tmp_path / "damaged.txt").write_text(write_log(tmp_path).read_text() + "1/3 train_loss: \n")
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(rehearsal.subprocess, "Popen", lambda *arguments, **options: pytest.fail("a run was begun"))
    for name, code in (("absent.txt", 2), ("data", 2), ("damaged.txt", 1)):
        assert rehearsal.main(["run", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--against",
                               str(tmp_path / name)]) == code
        assert f"{name}: " in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_existing_folders_are_left_alone(rehearsal, tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rehearsal.txt").write_text("a log")
    folder = str(tmp_path)
    for arguments in (["validation", folder, "--source", folder], ["nodes", "--out", folder],
                      ["run", "--data", folder, "--out", folder]):
        assert rehearsal.main(arguments) == 2 and "exists" in capsys.readouterr().err
    assert (tmp_path / "logs" / "rehearsal.txt").read_text() == "a log"


def test_a_manifest_of_any_other_folder_notes_nothing(rehearsal, tmp_path):
    assert rehearsal.notes_of(tmp_path) == rehearsal.notes_of(None) == {}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {}}))
    assert rehearsal.notes_of(tmp_path) == {}


def test_toy_shards_are_a_data_folder_of_the_family(rehearsal, tmp_path):
    folder = rehearsal.write_toy(tmp_path / "toy", documents=5, longest=60)
    cfg = gpt.Config(data_path=str(folder), vocab_size=rehearsal.TOY_VOCAB)
    data = gpt.Dataset.open(cfg)
    assert data.manifest and gpt.check_tokenizer(cfg, data).parent == folder
    assert len(gpt.find_documents(np.asarray(data.load_validation()[0])).start) == 5
