"""report.py: numbers in README and submission.json come from logs, and stale ones are noticed."""
import json
import shutil
import subprocess

import pytest

import report

LOG = """\
  gptq_reserve_seconds: 4.0
  max_wallclock_seconds: {budget}
  seed: {seed}
versions python:3.12.1 torch:2.11.0+cu130 numpy:2.4.6 triton:3.6.0 device:"{device}" world_size:{world_size} compute_dtype:bfloat16
run run_id:any tokenizer:any.model data_source:check_figures
val_tokens: {val_tokens}
model_params:35945761
source:
  seed: 99
quantized_ttt_phased val_loss:9.9 val_bpb:9.9
source_end
500/20000 train_loss: 2.5734 train_time: 0.8m tok/s: 8152722
stopping_early: wallclock_cap train_time: 596047ms step: 4852/20000
train speed loops_off_tok_per_s:8090000 loops_off_step_ms:97.2 loops_on_tok_per_s:5460000 loops_on_step_ms:144.0 steps:4852
peak memory allocated: 41737 MiB reserved: 47034 MiB
diagnostic pre-quantization post-ema val_loss:2.32769483 val_bpb:{pre} eval_time:9771ms targets:47853341 bytes:151080000
Serialized model: 135421514 bytes
GPTQ:collected 67 Hessians in 3.1s
train clock_s:599.1 steps_s:596.0 calibration_s:3.1 budget_s:600
Code size (uncompressed): 219377 bytes
Code size (compressed): 42190 bytes
Serialized model quantized+pergroup: 15942131 bytes
Total submission size quantized+pergroup: {total_bytes} bytes
diagnostic quantized val_loss:2.34416937 val_bpb:1.25 eval_time:78945ms targets:47853341 bytes:151080000
ttt batch:1/2 bpb:1.26 documents:64 doc_len:340-341 lane:0 phase:1/2
"""
TTT = """\
quantized_ttt_phased val_loss:2.5 val_bpb:{ttt} eval_time:521127ms targets:47853341 bytes:151080000
total_eval_time:{eval_s}s
"""
RECORD = dict(budget="600.0", seed=42, device="NVIDIA H100 80GB HBM3", world_size=8, val_tokens=47_853_342, pre=1.2,
              total_bytes=15_984_321, ttt=1.125, eval_s=521.1)


def write_log(folder, name="any", ttt_done=True, **changes):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.txt"
    path.write_text((LOG + TTT * ttt_done).format(**RECORD | changes))
    return path


@pytest.fixture
def checkout(repo, tmp_path):
    """A folder with this repository's README and an empty logs/."""
    shutil.copy(repo / "README.md", tmp_path)
    (tmp_path / "logs").mkdir()
    return tmp_path


@pytest.mark.parametrize(("line", "event", "fields"), [
    ("  matrix_lr: 0.028", "", {"matrix_lr": "0.028"}),
    ("500/20000 train_loss: 2.5734 tok/s: 8152722", "500/20000", {"train_loss": "2.5734", "tok/s": "8152722"}),
    ("stopping_early: wallclock_cap step: 4852/20000", "", {"stopping_early": "wallclock_cap", "step": "4852/20000"}),
    ("diagnostic quantized val_bpb:1.07", "diagnostic quantized", {"val_bpb": "1.07"}),
    ("layer_loop:enabled step:2146 encoder:[0, 1, 2] decoder:[5]", "",
     {"layer_loop": "enabled", "step": "2146", "encoder": "[0, 1, 2]", "decoder": "[5]"}),
    ('attention backend:math reason:"no GPU"', "attention", {"backend": "math", "reason": "no GPU"}),
    ("ngram_tilt:precompute_done elapsed=11.70s", "", {"ngram_tilt": "precompute_done", "elapsed": "11.70s"}),
    ("a line without fields", "a line without fields", {})])
def test_lines_are_split_in_event_and_fields(line, event, fields):
    assert report.parse_line(line) == (event, fields)


def test_a_log_gives_its_facts_and_nothing_from_the_source_in_it(tmp_path):
    result = report.read_log(write_log(tmp_path))
    assert (result.seed, result.steps, result.train_clock_s, result.eval_s) == (42, 4852, 599.1, 521.1)
    assert (result.pre_bpb, result.quantized_bpb, result.ttt_bpb, result.ttt_loss) == (1.2, 1.25, 1.125, 2.5)
    assert (result.code_bytes, result.total_bytes, result.peak_mib) == (42190, 15_984_321, 41737)
    assert result.tok_per_s == (8_090_000, 5_460_000) and result.hardware == "8x NVIDIA H100 80GB HBM3"
    assert result.is_record and all(result.compliance.values())


@pytest.mark.parametrize("changes", [
    {"world_size": 1}, {"device": "NVIDIA H200"}, {"budget": "180.0"}, {"val_tokens": 499_931}, {"ttt_done": False}])
def test_other_machines_budgets_data_and_unfinished_runs_do_not_count(tmp_path, changes):
    assert not report.read_log(write_log(tmp_path, **changes)).is_record


def test_a_resumed_run_does_not_count(tmp_path):
    path = write_log(tmp_path)
    path.write_text(path.read_text() * 2)
    assert not report.read_log(path).is_record


def test_a_log_without_any_score_is_left_out(tmp_path):
    path = write_log(tmp_path)
    path.write_text(path.read_text().split("diagnostic")[0])
    assert report.read_log(path) is None


def test_a_damaged_log_is_refused_by_name(tmp_path):
    path = write_log(tmp_path, name="damaged")
    path.write_text(path.read_text().replace("  seed: 42\n", ""))
    with pytest.raises(ValueError, match="damaged.txt"):
        report.read_log(path)


@pytest.mark.parametrize(("changes", "limit"), [
    ({"eval_s": 600.5}, "eval_within_600s"), ({"total_bytes": 16_000_001}, "total_within_16000000_bytes")])
def test_a_record_run_beyond_a_limit_is_not_called_compliant(checkout, changes, limit):
    write_log(checkout / "logs", **changes)
    assert report.main([], checkout) == 0
    assert json.loads((checkout / "submission.json").read_text())["compliance"][limit] is False
    assert "NOT within all limits" in (checkout / "README.md").read_text()


def test_scores_in_readme_and_submission_are_those_of_the_logs(checkout):
    for seed, ttt in ((42, 1.125), (0, 1.0625), (7, 1.1875)):
        write_log(checkout / "logs", name=f"seed{seed}", seed=seed, ttt=ttt)
    assert report.main([], checkout) == 0
    told = json.loads((checkout / "submission.json").read_text())
    assert (told["val_bpb"], told["val_bpb_std"], told["seeds"]) == (1.125, 0.0625, [0, 7, 42])
    assert told["seed_results"]["7"]["val_bpb"] == 1.1875 and told["logs"]["7"] == "logs/seed7.txt"
    text = (checkout / "README.md").read_text()
    assert "**1.12500 ± 0.06250 bits per byte**" in text and "| 7 | 1.20000 | 1.25000 | 1.18750 | 4,852 |" in text


def test_without_record_runs_nothing_is_claimed(checkout):
    write_log(checkout / "logs", name="one_gpu", world_size=1, budget="180.0")
    assert report.main([], checkout) == 0
    told = json.loads((checkout / "submission.json").read_text())
    assert told["val_bpb"] is None and told["seed_results"] == {} and "no score" in told["blurb"]
    assert "Record runs: none logged yet." in (checkout / "README.md").read_text()
    assert "| `one_gpu` | 1x NVIDIA H100 80GB HBM3 | 180 s |" in (checkout / "README.md").read_text()


def test_two_record_runs_of_one_seed_are_refused(checkout, capsys):
    for name in ("first", "second"):
        write_log(checkout / "logs", name=name)
    assert report.main([], checkout) == 1
    assert "one log per seed" in capsys.readouterr().err


def test_check_notices_a_new_log_and_a_touched_number(checkout, capsys):
    assert report.main([], checkout) == 0 and report.main(["--check"], checkout) == 0
    write_log(checkout / "logs", world_size=1)
    before = (checkout / "README.md").read_text()
    assert report.main(["--check"], checkout) == 1
    assert "README.md is stale" in capsys.readouterr().err
    assert (checkout / "README.md").read_text() == before
    assert report.main([], checkout) == 0 and report.main(["--check"], checkout) == 0
    path = checkout / "submission.json"
    path.write_text(path.read_text().replace('"val_bpb": null', '"val_bpb": 1.0'))
    assert report.main(["--check"], checkout) == 1


def test_a_readme_without_markers_is_refused(checkout, capsys):
    path = checkout / "README.md"
    path.write_text(path.read_text().replace("<!-- /results -->", ""))
    assert report.main([], checkout) == 1
    assert "<!-- /results -->" in capsys.readouterr().err


def test_the_committed_files_are_fresh(checkout, repo):
    """With the committed logs only: anybody may have others of their own."""
    listed = subprocess.run(["git", "ls-files", "logs"], cwd=repo, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout, so committed logs cannot be told from others")
    for name in (*listed.stdout.split(), "submission.json"):
        shutil.copy(repo / name, checkout / name)
    assert report.main(["--check"], checkout) == 0, "run `python report.py` and commit the result"


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["--verify"], 2)])
def test_usage(arguments, code, capsys):
    assert report.main(arguments) == code
    assert "--check" in "".join(capsys.readouterr())
