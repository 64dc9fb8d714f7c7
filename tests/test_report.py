"""report.py: numbers in README, tables and submission come from logs, and false or stale ones are noticed."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest

import report
import runlog
from log_samples import BYTES, TARGETS, write_log

NATS_PER_BIT_PER_BYTE = math.log(2) * BYTES / TARGETS


def score(bpb):
    """The fields of a final score that fits the published data."""
    return {"ttt": f"{bpb:.8f}", "ttt_loss": f"{bpb * NATS_PER_BIT_PER_BYTE:.8f}", "running": f"{bpb:.6f}"}


@pytest.fixture
def checkout(repo, tmp_path):
    """A folder with this repository's README and an empty logs/."""
    shutil.copy(repo / "README.md", tmp_path)
    (tmp_path / "logs").mkdir()
    return tmp_path


@pytest.fixture
def three_logs(tmp_path):
    return [
        write_log(tmp_path / "runs", name=f"seed{seed}", seed=seed, **score(bpb))
        for seed, bpb in ((42, 1.125), (0, 1.0625), (7, 1.1875))
    ]


def run(*arguments, **kwargs):
    return report.main(list(map(str, arguments)), **kwargs)


# --- README and submission.json -----------------------------------------------------------------------------


def test_scores_in_readme_and_submission_are_those_of_the_logs(checkout):
    for seed, bpb in ((42, 1.125), (0, 1.0625), (7, 1.1875)):
        write_log(checkout / "logs", name=f"seed{seed}", seed=seed, **score(bpb))
    assert run(repo=checkout) == 0
    told = json.loads((checkout / "submission.json").read_text())
    assert (told["val_bpb"], told["val_bpb_std"], told["seeds"]) == (1.125, 0.0625, [0, 7, 42])
    assert told["seed_results"]["7"]["val_bpb"] == 1.1875 and told["logs"]["7"] == "logs/seed7.txt"
    assert told["seed_results"]["7"]["train_time_s"] == 596.047 and all(told["compliance"].values())
    assert told["date"] == "2026-11-24" and told["python_version"] == "3.12.3" and "errors" not in told
    text = (checkout / "README.md").read_text()
    assert "**1.12500 ± 0.06250 bits per byte**" in text and "| `seed7` | 7 | 4,852 | 596,047 |" in text
    assert "| this project | mean of 3 |" in text and "From `seed7.txt`" in text


def test_without_record_runs_nothing_is_claimed(checkout):
    write_log(checkout / "logs", name="one_gpu", world_size=1, budget="180.0")
    assert run(repo=checkout) == 0
    told = json.loads((checkout / "submission.json").read_text())
    assert told["val_bpb"] is None and told["seed_results"] == {} and "no score" in told["blurb"]
    text = (checkout / "README.md").read_text()
    assert "Record runs: none logged yet." in text and "| `one_gpu` | 1x NVIDIA H100 80GB HBM3 |" in text


def test_partial_runs_show_hardware_data_and_the_settings_that_differ(checkout):
    path = write_log(
        checkout / "logs", name="other", world_size=1, budget="180.0", val_tokens=499_931, prefix_setting=100
    )
    path.write_text(path.read_text().replace("  num_heads", "  data_path: .data/proxy\n  num_heads"))
    assert run(repo=checkout) == 0
    (line,) = [
        line for line in (checkout / "README.md").read_text().splitlines() if line.startswith("| `other`")
    ]
    assert "own text (proxy), 80 shards, 499,931 validation tokens" in line
    assert "`MAX_WALLCLOCK_SECONDS=180` `PHASED_TTT_PREFIX_DOCS=100`" in line and "beta2" not in line.lower()


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"eval_ms": 600_500, "eval_s": "600.5"}, "eval_within_600s"),
        ({"model_bytes": 15_957_811, "total_bytes": 16_000_001}, "total_within_16000000_bytes"),
        ({"stop_ms": 600_200, "clock_s": "603.3"}, "train_within_600s"),
    ],
)
def test_a_record_run_beyond_a_limit_is_refused_and_when_forced_not_called_compliant(
    checkout, capsys, changes, limit
):
    write_log(checkout / "logs", **changes)
    before = (checkout / "README.md").read_text()
    assert run(repo=checkout) == 1 and "do not bear a submission" in capsys.readouterr().err
    assert (checkout / "README.md").read_text() == before and not (checkout / "submission.json").exists()
    assert run("--force", repo=checkout) == 0
    told = json.loads((checkout / "submission.json").read_text())
    assert told["compliance"][limit] is False and told["errors"]
    assert "NOT within all limits" in (checkout / "README.md").read_text()


def test_two_record_runs_of_one_seed_are_refused(checkout, capsys):
    for name in ("first", "second"):
        write_log(checkout / "logs", name=name)
    assert run(repo=checkout) == 1
    assert "one log per seed" in capsys.readouterr().err


def test_existing_results_are_never_emptied_silently(checkout, capsys):
    path = write_log(checkout / "logs")
    assert run(repo=checkout) == 0
    path.unlink()
    assert run(repo=checkout) == 1 and "nothing is emptied silently" in capsys.readouterr().err
    assert json.loads((checkout / "submission.json").read_text())["val_bpb"] == 1.05872644
    assert run("--force", repo=checkout) == 0
    assert json.loads((checkout / "submission.json").read_text())["val_bpb"] is None


def test_check_notices_a_new_log_and_a_touched_number(checkout, capsys):
    assert run(repo=checkout) == 0 and run("--check", repo=checkout) == 0
    write_log(checkout / "logs", world_size=1)
    before = (checkout / "README.md").read_text()
    assert run("--check", repo=checkout) == 1
    assert "README.md is stale" in capsys.readouterr().err
    assert (checkout / "README.md").read_text() == before
    assert run(repo=checkout) == 0 and run("--check", repo=checkout) == 0
    path = checkout / "submission.json"
    path.write_text(path.read_text().replace('"val_bpb": null', '"val_bpb": 1.0'))
    assert run("--check", repo=checkout) == 1


def test_a_readme_without_markers_is_refused(checkout, capsys):
    path = checkout / "README.md"
    path.write_text(path.read_text().replace("<!-- /results -->", ""))
    assert run(repo=checkout) == 1
    assert "<!-- /results -->" in capsys.readouterr().err


def test_a_damaged_log_is_refused_by_name_and_other_files_are_passed_over(checkout, capsys):
    (checkout / "logs" / "notes.txt").write_text("not a log\n")
    assert run(repo=checkout) == 0
    path = write_log(checkout / "logs", name="damaged")
    path.write_text(path.read_text().replace("val_loss:2.31688589 ", ""))
    assert run(repo=checkout) == 1 and "damaged.txt" in capsys.readouterr().err


def test_author_and_id_come_from_options_then_the_file_then_git(checkout):
    write_log(checkout / "logs")
    subprocess.run(["git", "init", "-q"], cwd=checkout, check=True)
    for name, value in (("user.name", "A. Git"), ("github.user", "agit")):
        subprocess.run(["git", "config", name, value], cwd=checkout, check=True)
    assert run(repo=checkout) == 0 and not json.loads((checkout / "submission.json").read_text())["author"]
    subprocess.run(["git", "add", "logs"], cwd=checkout, check=True)
    assert run(repo=checkout) == 0
    told = json.loads((checkout / "submission.json").read_text())
    assert (told["author"], told["github_id"]) == ("A. Git", "agit")
    assert run("--author", "B. Told", "--github-id", "btold", repo=checkout) == 0
    assert run(repo=checkout) == 0
    told = json.loads((checkout / "submission.json").read_text())
    assert (told["author"], told["github_id"]) == ("B. Told", "btold")


def test_the_committed_files_are_fresh(checkout, repo):
    """With the committed logs only: anybody may have others of their own."""
    listed = subprocess.run(["git", "ls-files", "logs"], cwd=repo, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout, so committed logs cannot be told from others")
    for name in (*listed.stdout.split(), "submission.json"):
        shutil.copy(repo / name, checkout / name)
    assert run("--check", repo=checkout) == 0, "run `python report.py` and commit the result"


# --- table, check, pr ---------------------------------------------------------------------------------------


def test_the_table_has_a_row_per_run_then_mean_and_sample_deviation(three_logs, capsys):
    assert run("table", *three_logs) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| `seed42` | 42 | 4,852 | 596,047 | 1.06366570 | 1.07119392 | 1.12500000 |")
    assert lines[2].endswith("| 521.1 | 42,190 | 15,942,131 | 15,984,321 |")
    assert "| **mean** | n = 3 |" in lines[5] and " 1.12500000 |" in lines[5] and " 0.06250000 |" in lines[6]


def test_the_public_records_give_their_published_means(repo, capsys, tmp_path):
    data = repo / "tests" / "data"
    assert (
        run(
            "table",
            data / "pr2124_seed42.log",
            data / "pr2124_seed0.log",
            "--against",
            *sorted(data.glob("pr2135_*.log")),
            "--json",
            tmp_path / "all.json",
        )
        == 0
    )
    told = json.loads((tmp_path / "all.json").read_text())
    assert told["mean"]["BPB with TTT"] == pytest.approx(1.05953936) and len(told["runs"]) == 2
    assert told["comparison"]["BPB with TTT"]["difference"] == pytest.approx(1.05953936 - 1.05650768)
    out = capsys.readouterr().out
    assert "1.05650768" in out and out.count("does not hold in this reading") == 2 and "worse by" in out


def test_welch_equals_scipy_and_needs_two_runs_on_both_sides():
    stats = pytest.importorskip("scipy.stats")
    ours, theirs = [1.0, 1.2, 1.1], [1.4, 1.5, 1.3, 1.6]
    expected = stats.ttest_ind(theirs, ours, equal_var=False)
    assert report.welch(ours, theirs) == pytest.approx((expected.statistic, expected.df))
    assert report.p_better(ours, theirs) == pytest.approx(expected.pvalue / 2)
    assert report.welch([1.0], theirs) is None and report.p_better([1.0], theirs) is None


@pytest.mark.parametrize(
    ("gain_nats", "per_token", "per_byte"),
    [(0.02, True, True), (0.008, True, False), (0.002, False, False), (-0.02, False, False)],
)
def test_the_record_rule_is_told_in_both_readings(tmp_path, gain_nats, per_token, per_byte):
    pytest.importorskip("scipy")

    def runs(name, gain):
        bpbs = [1.06 + 0.00001 * k - gain / NATS_PER_BIT_PER_BYTE for k in range(3)]
        return report.read_all(
            [write_log(tmp_path, f"{name}{k}", seed=k, **score(bpb)) for k, bpb in enumerate(bpbs)]
        )

    told = report.record_rule(runs("new", gain_nats), runs("old", 0.0))
    assert ["The rule holds" in text for text in told] == [per_token, per_byte]
    assert told[0].startswith("Read per token") and told[1].startswith("Read per byte")


def test_without_scipy_the_table_says_what_is_missing(three_logs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert run("table", *three_logs, "--against", *three_logs) == 0
    out = capsys.readouterr().out
    assert "scipy is missing" in out and "requirements-report.txt" in out


def test_check_prints_one_line_per_finding_and_fails_on_errors(tmp_path, capsys):
    good = write_log(tmp_path, "good", shards=78)
    assert run("check", good) == 0
    assert capsys.readouterr().out.splitlines() == [
        "warning: good: training shards: 78 of the 80 published shards",
        "check runs:1 errors:0 warnings:1",
    ]
    assert run("check", write_log(tmp_path, "bad", eval_s="421.1")) == 1
    assert "error: bad: clocks: eval_time is 521,127 ms, total_eval_time 421.1 s" in capsys.readouterr().out


def test_a_pull_request_prints_warnings_and_refuses_errors(three_logs, tmp_path, capsys):
    assert run("pr", *three_logs) == 0
    text = capsys.readouterr().out
    assert (
        "**val_bpb 1.12500 ± 0.06250** (3 seeds)" in text
        and "SEED=42 ./run.sh" in text
        and "What a reader must know" not in text
    )
    assert run("pr", write_log(tmp_path, "few", shards=78)) == 0
    text = capsys.readouterr().out
    assert "What a reader must know" in text and "1 of the three runs" in text
    bad = write_log(tmp_path, "bad", adapted=1250)
    assert run("pr", bad) == 1 and "1,250" in capsys.readouterr().err
    assert run("pr", bad, "--force") == 0
    text = capsys.readouterr().out
    assert text.startswith("# NOT A RECORD") and "fail the checks" in text


@pytest.mark.slow
def test_a_packed_folder_is_whole_and_runs(tmp_path, capsys, monkeypatch):
    """Its run.sh is run; test_pack.py compares the packed script with the readable one."""
    import pack

    monkeypatch.setattr(pack, "compare", lambda packed, readable: [])
    folder = tmp_path / "submission"
    code_bytes = len(pack.pack_script((report.REPO / "train_gpt.py").read_text(encoding="utf-8")))
    logs = [
        write_log(
            tmp_path / "runs",
            f"seed{seed}",
            seed=seed,
            code_bytes=code_bytes,
            model_bytes=15_900_000,
            total_bytes=15_900_000 + code_bytes,
        )
        for seed in (1, 2, 3)
    ]
    assert run("pack", folder, *logs, "--author", "A", "--github-id", "a") == 0, capsys.readouterr().err
    names = {path.name for path in folder.iterdir()}
    assert {
        "train_gpt.py",
        "run.sh",
        "README.md",
        "submission.json",
        "requirements.txt",
        "requirements-gpu.txt",
        "tokenizers",
        "prepare_caseops_data.py",
        "lossless_caps.py",
        "train_seed1.log",
        "train_seed2.log",
        "train_seed3.log",
    } <= names
    told = json.loads((folder / "submission.json").read_text())
    assert (
        told["logs"] == {str(seed): f"train_seed{seed}.log" for seed in (1, 2, 3)} and told["author"] == "A"
    )
    assert told["compliance"]["three_seeds"] and "| `seed1` | 1 |" in (folder / "README.md").read_text()
    assert not (folder / "toy").exists() and not (folder / "logs").exists()


def test_logs_of_other_code_are_not_packed(tmp_path, capsys, monkeypatch):
    import pack

    monkeypatch.setattr(pack, "main", lambda arguments: pack.write_folder(report.Path(arguments[0])) * 0)
    assert run("pack", tmp_path / "new", write_log(tmp_path, code_bytes=10, model_bytes=15_984_311)) == 1
    assert "made by other code" in capsys.readouterr().err and not (tmp_path / "new").exists()
    (same,) = report.read_all([write_log(tmp_path, code_bytes=4, model_bytes=15_984_317)])
    assert report._is_code_of(b"code", same) and not report._is_code_of(b"codes", same)
    same.identity["code_sha256"] = report.hashlib.sha256(b"code").hexdigest()
    assert report._is_code_of(b"code", same) and not report._is_code_of(b"edoc", same)


@pytest.fixture
def packable(tmp_path, monkeypatch):
    """A log and a stand-in for pack.py, so that `report.py pack` makes a folder within a moment."""
    import pack

    def make(arguments):
        report.Path(arguments[0]).mkdir(parents=True)
        (report.Path(arguments[0]) / "train_gpt.py").write_bytes(b"code")
        return 0

    monkeypatch.setattr(pack, "main", make)
    monkeypatch.setattr(report, "run_folder", lambda folder: None)
    return write_log(tmp_path, code_bytes=4, model_bytes=15_984_317)


@pytest.mark.parametrize("fault", ["--against", "other program", "run.sh", "interrupted"])
def test_packing_that_fails_leaves_nothing_and_the_name_is_free(packable, tmp_path, monkeypatch, fault):
    import pack

    folder, options = tmp_path / "new" / "submission", ["--author", "A", "--github-id", "a"]

    def fail(folder):
        raise KeyboardInterrupt if fault == "interrupted" else report.ReportError("run.sh fails there")

    with monkeypatch.context() as patch:
        if fault == "other program":
            make = pack.main
            patch.setattr(pack, "main", lambda arguments: make(arguments) + 1)
        elif fault != "--against":
            patch.setattr(report, "run_folder", fail)
        if fault == "interrupted":
            with pytest.raises(KeyboardInterrupt):
                run("pack", folder, packable, *options)
        else:
            against = ["--against", tmp_path / "typo.txt"] if fault == "--against" else []
            assert run("pack", folder, packable, *options, *against) == (2 if against else 1)
    assert not folder.exists()
    assert run("pack", folder, packable, *options) == 0 and (folder / "submission.json").exists()
    assert run("pack", folder, packable, *options) == 2 and (folder / "submission.json").exists()


def test_a_table_whose_json_cannot_be_written_is_not_printed(three_logs, tmp_path, capsys):
    assert run("table", *three_logs, "--json", tmp_path / "absent" / "all.json") == 2
    shown = capsys.readouterr()
    assert not shown.out and "absent/all.json: No such file" in shown.err


# --- pictures and watching ----------------------------------------------------------------------------------


def test_the_page_is_self_contained_and_shows_what_the_logs_hold(tmp_path, repo, capsys):
    pytest.importorskip("matplotlib")
    page = tmp_path / "page.html"
    assert (
        run("html", write_log(tmp_path), "--against", repo / "tests/data/pr2124_seed42.log", "--out", page)
        == 0
    )
    text = page.read_text()
    pictures = sorted((tmp_path / "page").glob("*.png"))
    assert len(pictures) == 12 and all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert text.count("data:image/png;base64,") == 12 and text.count("prefers-color-scheme: dark") == 7
    assert not re.search(r'(src|href)="(?!data:)', text) and "Read per byte" in text
    for title in ("Training loss", "Training speed", "Where the wall-clock went", "Bytes by tensor group"):
        assert title in text
    assert f"wrote {page}" in capsys.readouterr().out


def test_pictures_without_data_are_left_out(tmp_path):
    pytest.importorskip("matplotlib")
    path = write_log(tmp_path, is_finished=False)
    path.write_text(
        "".join(
            line
            for line in path.read_text().splitlines(keepends=True)
            if not line.startswith(("ttt batch", "artifact attempt"))
        )
    )
    assert run("html", path, "--out", tmp_path / "page.html") == 0
    assert {p.stem.split("_")[0] for p in (tmp_path / "page").glob("*.png")} == {
        "scores",
        "loss",
        "speed",
        "stages",
    }


@pytest.mark.slow
def test_the_page_opens_in_a_browser(tmp_path):
    pytest.importorskip("matplotlib")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on the PATH")
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    assert run("html", write_log(tmp_path), "--out", page) == 0
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--screenshot={picture}",
            "--window-size=1160,3200",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    from matplotlib import image

    shown = image.imread(picture)
    assert shown.shape[:2] == (3200, 1160) and shown[..., :3].std() > 0.05  # not an empty page


def test_watching_shows_speed_time_left_and_scores(tmp_path, capsys):
    pytest.importorskip("rich")
    path = write_log(tmp_path)
    path.write_text(path.read_text().split("stopping_early")[0])
    assert run("watch", path, "--once") == 0
    out = capsys.readouterr().out
    assert "6,482,476" in out and "s left" in out and "final score" not in out
    assert run("watch", write_log(tmp_path), "--once") == 0
    assert "1.058726 bits per byte" in capsys.readouterr().out


def test_watching_waits_for_a_log_and_ends_with_the_run(tmp_path, monkeypatch, capsys):
    watch = pytest.importorskip("watch", reason="rich is not installed")
    path = tmp_path / "any.txt"
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: path.exists() or write_log(tmp_path))
    assert watch.watch(path) == 0
    assert f"{path} does not exist yet; waiting for it" in capsys.readouterr().err
    short = write_log(tmp_path, "short", is_finished=False)
    short.write_text(short.read_text().replace("  seed:", "  prequant_only: 1\n  seed:", 1))
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: pytest.fail("it goes on after the run's end"))
    assert watch.watch(short) == 0
    short.write_text(short.read_text().replace("prequant_only: 1", "ttt_enabled: 0"))
    assert watch.watch(short) == 0


def test_watch_counts_time_and_batches(tmp_path, repo):
    watch = pytest.importorskip("watch", reason="rich is not installed")
    (running,) = runlog.read_runs(write_log(tmp_path, is_finished=False))
    assert watch.train_progress(running) == (1.0, 0.0) and watch.scoring_progress(running) == 1.0
    running.stop_ms = running.pre = None
    done, left = watch.train_progress(running)
    assert done == pytest.approx(1 - left / 596) and 0.9 < done < 1
    assert (
        watch.sparkline([1, 2, 3], 10) == "▁▅█"
        and watch.sparkline([5, 5], 10) == "▁▁"
        and watch.sparkline([], 9) == ""
    )


# --- usage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "pull request"),
        (["table", "--help"], 0, "--against"),
        (["pack", "--help"], 0, "new folder"),
        (["--verify"], 2, "unrecognized"),
        (["tabel", "x"], 2, "invalid choice"),
        (["table"], 2, "required"),
        (["html", "x"], 2, "--out"),
        (["table", "absent.txt"], 2, "absent.txt: expected a log file"),
    ],
)
def test_usage(arguments, code, words, capsys):
    assert run(*arguments) == code
    assert words in "".join(capsys.readouterr())


def test_the_plain_call_needs_no_extra_packages(checkout, repo):
    """scipy, matplotlib and rich hidden: README and submission are still written."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('scipy', 'matplotlib', 'rich', 'pictures', 'watch'), None));"
        "import report; from pathlib import Path; sys.exit(report.main([], Path(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(checkout)],
        cwd=repo,
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr


def test_tokens_of_different_text_are_not_compared(tmp_path):
    plain = report.read_all([write_log(tmp_path, "plain")])
    joined = report.read_all([write_log(tmp_path, "joined", data_source="manifest merges:99")])
    assert report.record_rule(joined, joined)[0].startswith("Read per token: worse by 0.00000")
    told = report.record_rule(joined, plain)
    assert told[0].startswith("Read per token: not to be compared") and told[1].startswith("Read per byte: worse")


def test_scores_on_other_data_are_not_compared(tmp_path):
    def runs(name, **changes):
        return report.read_all([write_log(tmp_path, f"{name}{seed}", seed=seed, **changes) for seed in (1, 2)])

    def small(name, num_bytes, targets=499_930):
        return runs(name, val_tokens=targets + 1, targets=targets, num_bytes=num_bytes)

    published, own = runs("published"), small("own", 1_565_286)
    for ours, theirs in ((published, own), (own, small("other", 1_565_287)), (published + own, published)):
        told = report.record_rule(ours, theirs)
        assert [text.split(",")[0] for text in told] == [
            f"Read per {unit}: not to be compared" for unit in ("token", "byte")
        ]
        assert "The rule holds" not in report.comparison(ours, theirs)
        differences = report.compare(ours, theirs)
        assert differences["BPB with TTT"]["difference"] is differences["loss with TTT"]["p"] is None
        assert differences["steps"]["difference"] == 0
    for theirs in (small("same", 1_565_286), own):
        assert "not to be compared" not in report.comparison(own, theirs)
    # Pairs joined before logs said so: the same bytes in other tokens.
    told = report.record_rule(small("joined", 1_565_286, 403_434), own)
    assert told[0].startswith("Read per token: not to be compared") and told[1].startswith("Read per byte: worse")


def test_the_pull_request_joins_as_many_pairs_as_the_runs_had_and_states_their_settings(tmp_path):
    import train_gpt as gpt

    paths = [write_log(tmp_path, f"joined{seed}", seed=seed, data_source="manifest merges:40") for seed in (1, 2)]
    paths[0].write_text(paths[0].read_text().replace("  seed:", "  rdo_lambda: 1.0\n  seed:", 1))
    runs = report.read_all([*paths, write_log(tmp_path, "plain")])
    shards = gpt.Config().data_path
    commands = report.pull_request(runs, []).split("## Reproduce")[1].split("```")[1].splitlines()
    # `frontier` would join all pairs, and change settings that these runs have as the record has them.
    assert commands[2:] == [
        "python3 prepare_caseops_data.py download",
        f"python3 prepare_caseops_data.py fuse {shards} {shards}_fused40 --merges 40",
        f"SEED=1 DATA_PATH={shards}_fused40 RDO_LAMBDA=1 ./run.sh",
        f"SEED=2 DATA_PATH={shards}_fused40 ./run.sh",
        "SEED=42 ./run.sh",
    ]
    assert "40 joined pairs" in report.data_of(runs[0])


def test_the_pull_request_names_the_folder_that_the_download_makes():
    import prepare_caseops_data as prepare
    import train_gpt as gpt

    assert gpt.Config().data_path == str(prepare.DEFAULT_DOWNLOAD_ROOT / prepare.PUBLISHED_NAME)


def test_what_a_run_is_follows_its_settings(tmp_path):
    path = write_log(tmp_path, "small", data_source="manifest merges:99")
    plain = report.technique(*report.read_all([write_log(tmp_path, "plain")]))
    assert plain.startswith("11 layers of width 512, layers 3 to 5 run 3 times, two lanes from layer 8")
    assert "6 and 7 bits" in plain and "15-token" in plain and "trellis" not in plain and "joined" not in plain
    path.write_text(path.read_text().replace("  seed:", "  rdo_lambda: 1.0\n  num_layers: 5\n  model_dim: 32\n  seed:", 1))
    small = report.technique(*report.read_all([path]))
    assert small.startswith("5 layers of width 32") and "trellis" in small and "99 frequent token pairs" in small


def test_only_logs_that_git_knows_are_results(tmp_path):
    (tmp_path / "logs").mkdir()
    write_log(tmp_path / "logs", "mine")
    assert report._logs_of_git(tmp_path) is None
    for command in (["init", "-q"], ["add", "logs/mine.txt"]):
        assert report._logs_of_git(tmp_path) in (None, set())
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert report._logs_of_git(tmp_path) == {"mine.txt"}
