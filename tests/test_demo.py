"""demo.py: the pieces that build its corpus. `./run.sh demo` itself is the test of the rest."""
import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

import demo
import train_gpt as gpt


def test_docstrings_come_in_order_under_their_names_and_nothing_is_imported():
    source = b'''"""Module text."""
raise SystemExit("imported")

class Outer:
    """Outer text."""
    def method(self):
        """Method text."""
    class Inner:
        async def wait(self):
            """Wait text."""

def undocumented():
    pass
'''
    assert demo.docstrings(source) == ("Module text.\n\nOuter\n\nOuter text.\n\nOuter.method\n\nMethod text.\n\n"
                                       "Outer.Inner.wait\n\nWait text.")


def test_a_module_without_docstrings_gives_no_text():
    assert demo.docstrings(b"x = 1\n") == ""


def test_modules_leave_out_tests_foreign_packages_and_broken_files(tmp_path):
    for name, source in (("json/__init__.py", '"""kept"""'), ("json/test/__init__.py", '"""test"""'),
                         ("site-packages/json.py", '"""foreign"""'), ("bisect.py", '"""broken'),
                         ("ast.py", '"""also"""')):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert demo.library_modules(tmp_path) == {"module:ast": "also", "module:json.__init__": "kept"}


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 40))
def test_cut_keeps_the_longest_prefix_of_whole_characters(text, limit):
    kept = demo.cut(text, limit)
    assert text.startswith(kept) and len(kept.encode()) <= limit
    assert kept == text or len(text[:len(kept) + 1].encode()) > limit


def test_documents_are_cut_and_a_paragraph_counts_once():
    long, shared = "x " * 5000, "shared " * 100
    documents = demo.make_documents({"a": shared + "\n\n" + "a " * 300, "b": shared + "\n\n" + "b " * 300, "c": long,
                                     "d": "too short"})
    assert set(documents) == {"a", "b", "c"}
    assert len(documents["c"].encode()) <= demo.MAX_DOC_BYTES
    assert sum("shared" in text for text in documents.values()) == 1


def test_the_order_of_documents_does_not_depend_on_the_order_of_texts():
    texts = {name: f"{name} " * 300 for name in "abcdef"}
    assert demo.make_documents(texts) == demo.make_documents(dict(reversed(texts.items())))


def test_validation_takes_the_first_documents_and_training_the_rest():
    documents = {str(k): str(k) * 1000 for k in range(10)}
    validation, training = demo.split(documents, 2500)
    assert validation == ["0" * 1000, "1" * 1000, "2" * 1000] and training == [str(k) * 1000 for k in range(3, 10)]


@pytest.fixture(scope="module")
def topics():
    pytest.importorskip("pydoc_data.topics", reason="this Python has no pydoc topics")
    return demo.make_documents(demo.language_topics())


def test_the_language_reference_gives_documents_without_shared_paragraphs(topics):
    paragraphs = [p for text in topics.values() for p in text.split("\n\n")]
    # Only a paragraph that was cut at the size limit, or stripped there, can equal another one.
    assert len(topics) > 40 and len(paragraphs) - len(set(paragraphs)) <= len(topics) // 10


def test_every_validation_token_has_the_same_context_with_and_without_ttt():
    corpus = demo.Corpus({"val": {"tokens": 1001}}, 0, longest=300)
    settings = demo.SETTINGS | demo.context_settings(corpus)
    cfg = gpt.Config.from_env({name: str(value) for name, value in settings.items()})
    assert gpt.eval_row_tokens(cfg) >= 1000 and cfg.eval_seq_len == cfg.ttt_eval_seq_len == 300


def test_last_match_wins_when_a_log_is_read():
    assert demo.find(r"^a:(\d)", ["a:1", "b:2", "a:3", "c:4"]) == "3"


def test_the_demo_has_the_layers_loops_and_lanes_of_the_record_run():
    changed = set(demo.SETTINGS)
    assert not changed & {"NUM_LAYERS", "NUM_LOOPS", "LOOP_START", "LOOP_END", "PARALLEL_START_LAYER",
                          "ENABLE_LOOPING_AT", "GATE_WINDOW", "LQER_ENABLED", "AWQ_LITE_ENABLED", "TTT_ENABLED"}
    assert re.search(r"^demo_out/$", (Path(demo.__file__).parent / ".gitignore").read_text(), re.M)


@pytest.mark.parametrize(("text", "seconds"), [("65", 65.0), ("30", 30.0), ("1e3", 1000.0)])
def test_demo_seconds_are_a_number_of_seconds(text, seconds):
    assert demo.train_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "nan", "inf", "-5", "0", "5", "1e9"])
def test_bad_demo_seconds_end_with_exit_code_2_and_touch_nothing(text, monkeypatch, capsys):
    monkeypatch.setenv("DEMO_SECONDS", text)
    monkeypatch.setattr(demo, "run_demo", lambda seconds: pytest.fail("started"))
    assert demo.main([]) == 2
    assert f"DEMO_SECONDS={text}: expected" in capsys.readouterr().err


def test_ctrl_c_ends_the_demo_with_one_line_and_exit_code_130(monkeypatch, capsys):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupted)
    assert demo.main([]) == 130
    assert capsys.readouterr().err.strip().splitlines() == ["error: interrupted; demo_out/ holds what was done"]


def test_ctrl_c_ends_the_running_script_too(monkeypatch, tmp_path):
    class Process:
        returncode, ended = None, False

        @property
        def stdout(self):
            raise KeyboardInterrupt

        def terminate(self):
            self.ended = True

        def wait(self):
            assert self.ended

    process = Process()
    monkeypatch.setattr(demo.subprocess, "Popen", lambda *_, **__: process)
    with pytest.raises(KeyboardInterrupt):
        demo.run_script(demo.Progress(1), "train", 1)
    assert process.ended


def test_wrong_arguments_get_a_sentence_and_exit_code_2(capsys):
    assert demo.main(["nonsense"]) == 2 and "invalid choice" in capsys.readouterr().err
    assert demo.main(["--help"]) == 0 and "DEMO_SECONDS" in capsys.readouterr().out


def test_pictures_of_the_demo_say_where_they_are_or_what_is_missing(monkeypatch, tmp_path):
    from log_samples import write_log
    monkeypatch.setattr(demo, "REPO", tmp_path)
    log = write_log(tmp_path)
    pytest.importorskip("matplotlib")
    assert demo.draw_pictures(log, tmp_path / "report.html") == "pictures: report.html and 12 PNG files in report/"
    assert (tmp_path / "report.html").is_file()
    monkeypatch.setitem(sys.modules, "pictures", None)
    assert "pip install -r requirements-report.txt" in demo.draw_pictures(log, tmp_path / "report.html")


def test_the_proxy_takes_documents_of_a_file(tmp_path):
    docs = tmp_path / "docs.jsonl"
    docs.write_text("".join(json.dumps({"text": f"A short text, number {k}, about nothing at all."}) + "\n"
                            for k in range(60)))
    manifest = demo.write_proxy(tmp_path / "new" / "proxy", docs)
    assert (manifest["docs_val"], manifest["docs_train"]) == (3, 57)


def test_the_file_of_documents_is_looked_for_where_the_caller_is(tmp_path, monkeypatch):
    named = []
    monkeypatch.setattr(demo, "write_proxy", lambda out, docs: named.append(docs) or {"train": {"tokens": 1},
                                                                                      "val": {"tokens": 1}})
    for arguments in (["--docs", "d.jsonl"], ["--docs", "/d.jsonl"], []):
        assert demo.main(["corpus", "new", "--base", str(tmp_path), *arguments]) == 0
    assert named == [tmp_path / "d.jsonl", Path("/d.jsonl"), None]


def test_the_proxy_of_a_file_is_not_taken_for_that_of_the_packages(tmp_path, monkeypatch):
    made = []

    def texts(folders):
        made.append(folders)
        return {f"package:{k}": f"Package {k} is described here. " * 20 for k in range(40)}

    monkeypatch.setattr(demo, "language_topics", dict)
    monkeypatch.setattr(demo, "library_modules", lambda library: {})
    monkeypatch.setattr(demo, "package_modules", texts)
    monkeypatch.setattr(demo, "PROXY_VAL_BYTES", 5_000)
    docs, out = tmp_path / "docs.jsonl", tmp_path / "proxy"
    docs.write_text("".join(json.dumps({"text": f"A short text, number {k}."}) + "\n" for k in range(60)))
    assert demo.write_proxy(out, docs)["docs_train"] == 57
    of_packages = demo.write_proxy(out, None)
    assert len(made) == 1 and of_packages["docs_train"] < 40
    assert demo.write_proxy(out, None) == of_packages and len(made) == 1          # made already: nothing to do
    assert demo.write_proxy(out, docs)["docs_train"] == 57


def test_docstrings_of_packages_leave_out_their_tests(tmp_path):
    for name, source in (("kept/core.py", '"""kept"""'), ("kept/tests/test_core.py", '"""test"""'), ("bad.py", '"""')):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert demo.package_modules([tmp_path]) == {"package:kept.core": "kept"}
