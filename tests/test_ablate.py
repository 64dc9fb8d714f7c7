"""ablate.py: arms and seeds are run once, compared in pairs, and never across cards or texts."""
import json
import math
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ablate
from ablate import AblationError, Result, read_arms, read_result, reach, saved_at_equal
from log_samples import BYTES, write_log
from toy_data import environment, write_run_data

# Stands for train_gpt.py: BPB falls with ITERATIONS and BETA2; every run is noted in the file RUNS.
SCRIPT = """\
import os
with open(os.environ["RUNS"], "a") as file:
    print(os.environ["RUN_ID"], os.environ["TRITON_CACHE_DIR"], os.environ.get("MATRIX_LR"), file=file)
if os.environ["SEED"] == os.environ.get("BROKEN_SEED"):
    raise SystemExit("out of memory")
steps, beta2 = int(os.environ["ITERATIONS"]), float(os.environ.get("BETA2", 0.95))
card = os.environ.get("CARD", "H100")
print(f'versions python:3 torch:2.11.0 device:"{card}" world_size:1')
for step in range(10, steps + 1, 10):
    print(f"{step}/{steps} train_loss: {10 - step / 10 - beta2:.4f} train_time: 0.0m tok/s: 5")
print(f"train speed loops_off_step_ms:100.0 steps:{steps}")
bpb = 3 - steps / 100 - beta2 + int(os.environ["SEED"]) / 1000
print(f"diagnostic pre-quantization post-ema val_loss:2.5 val_bpb:{bpb:.8f} eval_time:9ms targets:7 bytes:21")
"""


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A folder with a stand-in script, data and arms file; bench.run() runs ablate.py on them."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "fineweb_val_000000.bin").write_bytes(b"x")
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setenv("RUNS", str(tmp_path / "runs.txt"))

    class Bench:
        path = tmp_path

        def write(self, text: str) -> None:
            common = f'[common]\nDATA_PATH = "{tmp_path}/data"\nITERATIONS = 100\n'
            (tmp_path / "arms.toml").write_text(text.replace("[common]\n", common))

        def run(self, *options: str) -> int:
            return ablate.main([str(tmp_path / "arms.toml"), "--out", str(tmp_path / "out"), *options],
                               tmp_path / "script.py")

        def runs(self) -> list[str]:
            path = tmp_path / "runs.txt"
            return path.read_text().splitlines() if path.exists() else []

        def results(self) -> dict:
            return json.loads((tmp_path / "out" / "results.json").read_text())

    made = Bench()
    made.write('base = "base"\nseeds = [1, 2]\n[common]\n[arms.base]\n[arms.beta]\nBETA2 = 0.99\n')
    return made


# -- logs

def test_a_log_is_read(tmp_path):
    result = read_result(write_log(tmp_path, pre=1.2, quantized=1.25, ttt=1.125, loss=2.4).read_text().splitlines())
    assert (result.device, result.torch) == ("8x NVIDIA H100 80GB HBM3", "2.11.0+cu130")
    assert (result.steps, result.train_s) == (4852, 596.0)
    assert result.curve == [(1, 9.0087), (500, 2.5734), (4500, 2.4)]
    assert (result.pre_bpb, result.quantized_bpb, result.ttt_bpb) == (1.2, 1.25, 1.125)
    assert result.final_bpb == 1.125
    assert (result.eval_s, result.total_bytes, result.params) == (521.127, 15_984_321, 35_945_761)
    assert result.val_bytes == BYTES


def test_seconds_come_from_the_mean_steps_when_nothing_states_them():
    speed = "train speed loops_off_step_ms:100.0 loops_on_step_ms:150.0 steps:30"
    assert read_result(["layer_loop:enabled step:10 frac:0.3", speed]).train_s == pytest.approx(4.0)
    assert read_result(["train speed loops_off_step_ms:100.0 steps:30"]).train_s == pytest.approx(3.0)
    assert read_result(["layer_loop:enabled step:0 frac:0.3", "train speed loops_on_step_ms:150.0 steps:30"]
                       ).train_s == pytest.approx(4.5)


def test_a_cut_line_is_named():
    with pytest.raises(AblationError, match="'versions python:3.12' without 'world_size'"):
        read_result(["versions python:3.12"])


# -- arms files

@pytest.mark.parametrize(("text", "words"), [
    ("base = ", "expected TOML"),
    ('base = "b"\n[arms.a]\n', "found base 'b', arms \\['a'\\]"),
    ('base = "a"\nsize = 3\n[arms.a]\n', "\\['size'\\]"),
    ('base = "a"\nseeds = [1, 1]\n[arms.a]\n', "different whole numbers, found \\[1, 1\\]"),
    ('base = "a"\n[arms.a]\nBETA3 = 1\n', "arm a: .*BETA3"),
    ('base = "a"\n[arms.a]\nTTT_MASK = 1\n', "arm a: .*TTT_MASK"),
    ('base = "a"\n[arms.a]\nBETA2 = 2\n', "arm a: BETA2=2"),
    ('base = "a"\n[arms.a]\nQUALITY = 2\n', "expected settings of train_gpt.py, found \\['QUALITY'\\]"),
    ('base = "a"\n[arms.a]\nSEED = 2\n', "without SEED"),
    ('base = "a"\n[arms.a]\nDATA_PATH = "$NO_SUCH_FOLDER_/x"\n', "expected the variable to be set"),
    ('base = "a"\n[arms.a]\nDATA_PATH = "nowhere"\n', "expected token shards, found none"),
    ('base = []\n[arms.a]\n', "found \\['base'\\]"), ('base = "a"\narms = 5\n', "found \\['arms'\\]"),
    ('base = "a"\nseeds = 42\n[arms.a]\n', "found \\['seeds'\\]"),
    ('base = "a"\ncurve = 120\n[arms.a]\n', "found \\['curve'\\]"),
    ('base = "a"\ncurve = [1]\ncurve_setting = 3\n[arms.a]\n', "found \\['curve_setting'\\]"),
    ('base = "a"\ncommon = 3\n[arms.a]\n', "found \\['common'\\]"),
    ('base = "a"\n[arms]\nr = 5\n[arms.a]\n', "found \\['arms.r'\\]"),
    ('base = "a"\nseeds = [[1]]\n[arms.a]\n', "different whole numbers, found \\[\\[1\\]\\]"),
    ('base = "a"\n[arms.a]\nDATA_PATH = 5\n', "DATA_PATH=5: expected a path in quotes"),
    ('base = "a"\n[arms.a]\nMLP_MULT = [4]\n', "MLP_MULT=\\[4\\]: expected a text, a number"),
    (b'base = "a"\n[arms.a]\n# \xff\n', "expected TOML")])
def test_a_wrong_arms_file_is_refused_before_anything_runs(bench, capsys, text, words):
    (bench.path / "arms.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert bench.run() == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (bench.path / "runs.txt").exists() and not (bench.path / "out").exists()


@pytest.mark.parametrize("seeds", ["42,42", "42,042", "1,x", "1,"])
def test_seeds_of_the_command_line_are_different_whole_numbers_too(bench, capsys, seeds):
    assert bench.run("--seeds", seeds) == 2
    assert f"--seeds {seeds}: expected different whole numbers" in capsys.readouterr().err
    assert not bench.runs()


@pytest.mark.parametrize("options", [(), ("--table",)])
@pytest.mark.parametrize("out", ["script.py", "script.py/out"])
def test_an_out_that_is_no_folder_is_refused(bench, capsys, options, out):
    assert bench.run("--out", str(bench.path / out), *options) == 2
    assert f"--out {bench.path / out}: " in capsys.readouterr().err and not bench.runs()


def test_a_manifest_of_something_else_is_named(bench, capsys):
    for text in ('{"files": ["a.bin"]}', "[]", "{"):
        (bench.path / "data" / "manifest.json").write_text(text)
        assert bench.run() == 2 and "expected a manifest of token shards" in capsys.readouterr().err


def test_common_settings_and_the_base_curve(bench):
    bench.write('base = "base"\ncurve = [50, 200]\ncurve_setting = "ITERATIONS"\n[common]\nCOMPILE = false\n'
                '[arms.base]\n[arms.long]\nITERATIONS = 300\n')
    arms = read_arms(bench.path / "arms.toml")
    assert {arm: settings["ITERATIONS"] for arm, settings in arms.settings.items()} == {
        "base": "100", "long": "300", "base@50": "50", "base@200": "200"}
    assert all(settings["COMPILE"] == "0" for settings in arms.settings.values())
    assert arms.curve == ("base@50", "base@200") and arms.seeds == (42,)


# -- running

def test_every_arm_and_seed_runs_once_and_in_pairs(bench, monkeypatch):
    monkeypatch.setenv("MATRIX_LR", "0.5")             # settings come from the file alone
    assert bench.run() == 0
    names, caches, rates = zip(*(line.split() for line in bench.runs()))
    assert [name.rsplit("-", 1)[0] for name in names] == ["base-1", "beta-1", "base-2", "beta-2"]
    assert len(set(caches)) == 1 and set(rates) == {"None"}
    assert bench.run() == 0 and len(bench.runs()) == 4
    # Another seed is all that is missing; another script makes every run a new one.
    assert bench.run("--seeds", "1,3") == 0 and len(bench.runs()) == 6
    (bench.path / "script.py").write_text(SCRIPT + "# changed\n")
    assert bench.run("--only", "beta") == 0 and len(bench.runs()) == 10


def test_changed_settings_and_data_are_run_again_and_moved_data_is_not(bench):
    assert bench.run() == 0
    text = (bench.path / "arms.toml").read_text()
    (bench.path / "data").rename(bench.path / "moved")
    (bench.path / "arms.toml").write_text(text.replace("/data", "/moved"))
    assert bench.run() == 0 and len(bench.runs()) == 4
    (bench.path / "arms.toml").write_text(text.replace("/data", "/moved").replace("0.99", "0.98"))
    assert bench.run() == 0 and len(bench.runs()) == 6
    (bench.path / "moved" / "fineweb_val_000000.bin").write_bytes(b"longer")
    assert bench.run() == 0 and len(bench.runs()) == 10


def test_a_failed_run_is_reported_and_tried_again(bench, monkeypatch, capsys):
    monkeypatch.setenv("BROKEN_SEED", "1")
    assert bench.run() == 1
    shown = capsys.readouterr()
    assert "exit code 1" in shown.err and "out of memory" in shown.err
    assert "Not finished: `base-1" in shown.out
    assert bench.results()["arms"]["beta"]["seeds"] == [2]
    monkeypatch.delenv("BROKEN_SEED")
    assert bench.run() == 0 and len(bench.runs()) == 6


def test_a_damaged_result_is_named_and_kept(bench, capsys):
    assert bench.run() == 0
    path = next((bench.path / "out" / "runs").glob("beta-1-*/result.json"))
    for text in (b"", b"\xff", b"[]", b'{"curve": []}'):
        path.write_bytes(text)
        for options in ((), ("--table",)):
            assert bench.run(*options) == 1 and f"{path}: expected the result" in capsys.readouterr().err
        assert path.read_bytes() == text and len(bench.runs()) == 4


def test_output_that_is_no_utf_8_does_not_cost_the_run(bench):
    (bench.path / "script.py").write_text(SCRIPT + r"""
import sys
sys.stdout.flush()
sys.stdout.buffer.write(b"\xff\n")
""")
    assert bench.run("--seeds", "1") == 0
    assert bench.results()["arms"]["beta"]["seeds"] == [1]


def test_no_run_begins_that_would_end_too_late(bench, capsys):
    assert bench.run("--seconds", "-1") == 1
    assert "expected finished runs, found none" in capsys.readouterr().err
    assert not (bench.path / "runs.txt").exists()


def test_a_terminated_comparison_ends_its_run_and_keeps_what_is_finished(bench, repo):
    (bench.path / "script.py").write_text(
        SCRIPT + "import time\nif 'beta' in os.environ['RUN_ID']: time.sleep(60)\n")
    start = (f"import sys; sys.path.insert(0, {str(repo)!r}); import ablate, pathlib; "
             "sys.exit(ablate.main(sys.argv[2:], pathlib.Path(sys.argv[1])))")
    command = [sys.executable, "-c", start, bench.path / "script.py", bench.path / "arms.toml", "--out",
               bench.path / "out"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 50
        while time.monotonic() < until and len(bench.runs()) < 2:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
        assert "finished runs are kept" in process.stderr.read()
    assert len(list((bench.path / "out" / "runs").glob("*/result.json"))) == 1


# -- comparing

def test_the_table_has_paired_differences_and_what_is_saved(bench):
    bench.write('base = "base"\nseeds = [1, 2]\ncurve = [50, 200]\ncurve_setting = "ITERATIONS"\n[common]\n'
                '[arms.base]\n[arms.beta]\nBETA2 = 0.99\n')
    assert bench.run() == 0
    beta = bench.results()["arms"]["beta"]
    # The stand-in gains 0.04 BPB, which costs the base 4 steps more; its training loss likewise.
    assert beta["pre_bpb_difference"]["mean"] == pytest.approx(-0.04)
    assert beta["pre_bpb_difference"]["error"] == pytest.approx(0, abs=1e-9)
    assert beta["steps_saved"]["mean"] == pytest.approx(1 - 100 / 104)
    assert beta["seconds_saved"]["mean"] == pytest.approx(1 - 100 / 104)
    assert beta["steps_saved_by_train_loss"]["mean"] == pytest.approx(0.4 / 90)
    shown = (bench.path / "out" / "results.md").read_text()
    assert "| **base** (base) | 1 2 | 100 | 10.0 | 1.05150 |" in shown and "`beta`: `BETA2=0.99`" in shown
    assert "-0.04000 ± 0.00000" in shown and "+3.8 ± 0.0 %" in shown


def test_runs_on_different_cards_are_never_compared(bench, monkeypatch, capsys):
    assert bench.run("--seeds", "1") == 0
    monkeypatch.setenv("CARD", "H200")
    assert bench.run() == 1
    words = "runs on different cards cannot be compared: 1x H100: base 1, beta 1; 1x H200: base 2, beta 2"
    assert words in capsys.readouterr().err


def result(**changes) -> Result:
    facts = {"device": "1x A", "torch": "2", "steps": 10, "train_s": 1.0, "pre_bpb": 2.0, "val_bytes": 9}
    return Result(**facts | changes)


@pytest.mark.parametrize(("changes", "words"), [
    ({"device": "1x B"}, "different cards"), ({"torch": "3"}, "different torch releases"),
    ({"val_bytes": 10}, "different numbers of validation bytes")])
def test_what_cannot_be_compared_is_refused(changes, words):
    arms = ablate.Arms("a", (1,), {"a": {}, "b": {}}, ())
    same = {("a", 1): "text", ("b", 1): "text"}
    with pytest.raises(AblationError, match=words):
        ablate.compare(arms, {("a", 1): result(), ("b", 1): result(**changes)}, same)
    with pytest.raises(AblationError, match="different texts"):
        ablate.compare(arms, {("a", 1): result(), ("b", 1): result()}, same | {("b", 1): "other"})


def test_errors_are_those_of_paired_differences():
    arms = ablate.Arms("a", (1, 2, 3), {"a": {}, "b": {}}, ())
    base, ours = {1: 2.0, 2: 3.0, 3: 4.0}, {1: 1.9, 2: 2.8, 3: 3.95}
    results = {("a", seed): result(pre_bpb=value) for seed, value in base.items()} | {
        ("b", seed): result(pre_bpb=value) for seed, value in ours.items()}
    difference = ablate.compare(arms, results, dict.fromkeys(results, "t"))["b"]["pre_bpb_difference"]
    paired = [ours[seed] - base[seed] for seed in base]
    assert difference.mean == pytest.approx(statistics.fmean(paired))
    assert difference.error == pytest.approx(statistics.stdev(paired) / math.sqrt(3))
    # A seed that only one of them has does not count; one seed has no error.
    results = {key: each for key, each in results.items() if key not in (("a", 2), ("b", 3))}
    difference = ablate.compare(arms, results, dict.fromkeys(results, "t"))["b"]["pre_bpb_difference"]
    assert (difference.count, difference.error) == (1, None)


def test_what_is_saved_is_read_off_the_last_stage_that_all_have():
    """Of a base with test-time training, an arm without it that quantizes to the same score saves nothing."""
    arms = ablate.Arms("a", (1,), {name: {} for name in ("a", "b", "a@5", "a@20")}, ("a@5", "a@20"))
    bpb = {("a@5", 1): 2.2, ("a", 1): 2.0, ("a@20", 1): 1.9, ("b", 1): 2.0}
    steps = {("a@5", 1): 5, ("a", 1): 10, ("a@20", 1): 20, ("b", 1): 10}
    results = {key: result(steps=steps[key], pre_bpb=bpb[key] - 0.1, quantized_bpb=bpb[key], ttt_bpb=bpb[key] - 0.3)
               for key in bpb}
    results["b", 1].ttt_bpb = None
    saved = ablate.compare(arms, results, dict.fromkeys(results, "t"))["b"]
    assert saved["steps_saved"].mean == saved["seconds_saved"].mean == 0
    results["a@20", 1].quantized_bpb = results["a@20", 1].ttt_bpb = None     # a base curve that ends earlier, too
    results["b", 1].pre_bpb = 1.85                                           # half-way from the base to a@20
    saved = ablate.compare(arms, results, dict.fromkeys(results, "t"))["b"]
    assert saved["steps_saved"].mean == pytest.approx(1 - 10 / 15)
    results["a@5", 1].pre_bpb = None
    assert ablate.compare(arms, results, dict.fromkeys(results, "t"))["b"]["steps_saved"] is None


@pytest.mark.parametrize("setting", ["DATA_PATH", "TRAIN_BATCH_TOKENS", "VOCAB_SIZE", "HALF_ROWS_UNTIL",
                                     "QUARTER_ROWS_UNTIL"])
def test_training_losses_are_compared_where_steps_take_the_same_tokens(setting):
    curves = {"a": [(20, 6.0), (40, 5.0), (60, 4.0), (80, 3.0)], "b": [(20, 5.0), (40, 4.0), (60, 3.0), (80, 2.0)]}
    results = {(arm, 1): result(curve=curve) for arm, curve in curves.items()}
    for changed, is_compared in (({}, True), ({setting: "1"}, False)):
        arms = ablate.Arms("a", (1,), {"a": {}, "b": changed}, ())
        saved = ablate.compare(arms, results, dict.fromkeys(results, "t"))["b"]["steps_saved_by_train_loss"]
        assert (saved is not None) == is_compared


@given(st.lists(st.floats(0.1, 5), min_size=2, max_size=8), st.floats(0, 1))
def test_a_level_is_found_between_the_points_of_a_falling_curve(drops, share):
    heights = [10 - sum(drops[:k]) for k in range(len(drops) + 1)]
    curve = [(float(10 * k), height) for k, height in enumerate(heights)]
    level = heights[0] + share * (heights[-1] - heights[0])
    at = reach(curve, level)
    left = int(min(at // 10, len(drops) - 1))
    assert heights[left] + (at - 10 * left) / 10 * (heights[left + 1] - heights[left]) == pytest.approx(level)
    assert reach(curve, heights[0] + 1) is None and reach(curve, heights[-1] - 1) is None


def test_saved_is_read_off_the_base_curve_or_else_off_the_arm_s():
    base = [(50, 3.0), (100, 2.0), (200, 1.0)]
    assert saved_at_equal(base, [(100, 1.5)], (100, 2.0)) == pytest.approx(1 - 100 / 150)
    assert saved_at_equal(base, [(100, 2.5)], (100, 2.0)) == pytest.approx(1 - 100 / 75)
    assert saved_at_equal(base, [(100, 2.0)], (100, 2.0)) == 0
    assert saved_at_equal(base, [(80, 2.0)], (100, 2.0)) == pytest.approx(0.2)
    # Better than the base ever was: when did the arm have the base's last score?
    assert saved_at_equal([(100, 2.0)], [(50, 2.5), (100, 1.5)], (100, 2.0)) == pytest.approx(0.25)
    assert saved_at_equal([(100, 2.0)], [(100, 1.5)], (100, 2.0)) is None


def test_joined_shards_have_the_text_of_what_they_were_made_from(tmp_path):
    files = {"fineweb_train_000000.bin": {"values": 5, "sha256": "1"},
             "fineweb_val_000000.bin": {"values": 3, "sha256": "2"}}
    fused = {name: facts | {"sha256": facts["sha256"] + "f"} for name, facts in files.items()}
    other = {name: facts | {"sha256": facts["sha256"] + "o"} for name, facts in files.items()}
    for name, manifest in (("plain", {"files": files}), ("other", {"files": other}),
                           ("fused", {"files": fused, "fused_from": {"files": files}})):
        (tmp_path / name).mkdir()
        for shard in files:
            (tmp_path / name / shard).write_bytes(b"x")
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    plain, fused, other = (ablate.data_hashes(tmp_path / name) for name in ("plain", "fused", "other"))
    assert plain[0] == fused[0] != other[0] and len({plain[1], fused[1], other[1]}) == 3


def real_comparison() -> tuple[int, dict, list]:
    """Exit code, results and checkpoints left of two arms of the tiny model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, out = write_run_data(folder / "data"), folder / "out"
        env = environment(iterations=6, prequant_only=True, warmdown_frac=0.5)
        common = "\n".join(f'{name} = "{value}"' for name, value in env.items() if name != "SEED")
        (folder / "arms.toml").write_text(
            f'base = "base"\nseeds = [7]\n[common]\nDATA_PATH = "{data}"\n{common}\n[arms.base]\n'
            "[arms.slow]\nMATRIX_LR = 0.001\nTIED_EMBED_LR = 0.001\n")
        code = ablate.main([str(folder / "arms.toml"), "--out", str(out)])
        return code, json.loads((out / "results.json").read_text()), list(out.glob("runs/*/checkpoints"))


@pytest.mark.early(work=real_comparison)
def test_the_real_script_on_a_cpu(early):
    """Two arms of the tiny model: equal first losses (same data, same start), and different ends."""
    code, content, checkpoints = early(real_comparison)
    assert code == 0
    base, slow = (run["curve"] for run in content["runs"])
    assert base[0] == slow[0] and base[-1] != slow[-1] and base[-1][0] == 6
    assert content["arms"]["slow"]["pre_bpb_difference"]["count"] == 1
    assert content["runs"][0]["steps"] == 6 and content["runs"][0]["train_s"] > 0
    assert not checkpoints


def test_the_committed_arms_file_is_sound(repo, tmp_path, monkeypatch):
    for name in ("shards", "fused3", "fused12", "fused40", "fused99"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "fineweb_val_000000.bin").write_bytes(b"x")
    monkeypatch.setenv("DATA", str(tmp_path))
    arms = read_arms(repo / "benchmarks" / "frontier_arms.toml")
    assert len(arms.runs(repo / "train_gpt.py")) == len(arms.settings) * len(arms.seeds)
    block = re.search(r"    frontier\)\n.*?;;", (repo / "run.sh").read_text(), re.S)[0]       # what it changes in the record
    stated = dict(re.findall(r"\b([A-Z_]+)=([\d.]+)", block))
    common = arms.settings["record"]
    changed = {name: value for name, value in arms.settings["frontier"].items() if common.get(name) != value}
    assert stated and {**stated, "DATA_PATH": str(tmp_path / "fused99")} == changed
