"""README, CONTRIBUTING.md and run.sh say what the script does."""
import dataclasses
import re

import pytest

import train_gpt as gpt
from helpers import RECORD_SETTINGS, stated_settings


def text_of(repo, name):
    path = repo / name
    if not path.is_file():
        pytest.skip(f"{name} does not exist")
    return path.read_text(encoding="utf-8")


def test_the_readme_shows_the_settings_table(repo):
    text = text_of(repo, "README.md")
    start, end = "<!-- settings -->", "<!-- /settings -->"
    assert text.count(start) == text.count(end) == 1, f"expected one {start} and one {end} around the settings table"
    shown = text.split(start)[1].split(end)[0].strip()
    assert shown == gpt.settings_table(), f"put the table of `python train_gpt.py --help` between {start} and {end}"


def record_settings_of(script):
    """The first value run.sh states for each setting: the record run comes first, the demo overrides later."""
    names = {field.name.upper() for field in dataclasses.fields(gpt.Config)} | gpt.FIXED_SETTINGS.keys()
    return {name: values[0] for name, values in stated_settings(script).items() if name in names}


def test_run_sh_states_every_setting_of_the_record_run(repo):
    stated = record_settings_of(text_of(repo, "run.sh"))
    missing = sorted(RECORD_SETTINGS.keys() - stated.keys())
    assert not missing, f"run.sh should state {missing} as NAME=value"


def test_run_sh_states_the_values_the_script_has_as_defaults(repo):
    stated = {name: value for name, value in record_settings_of(text_of(repo, "run.sh")).items()
              if name in RECORD_SETTINGS}
    assert gpt.Config.from_env(stated) == gpt.Config()


def test_every_setting_named_by_run_sh_exists(repo):
    text = text_of(repo, "run.sh")
    owned = [name for name in stated_settings(text) if name.startswith(gpt.OWNED_PREFIXES)]
    known = {field.name.upper() for field in dataclasses.fields(gpt.Config)} | gpt.FIXED_SETTINGS.keys()
    assert not set(owned) - known


@pytest.mark.parametrize(("script", "found"), [
    ("MATRIX_LR=0.028 MUON_WD=0.095 python x", {"MATRIX_LR": ["0.028"], "MUON_WD": ["0.095"]}),
    ('export SEED="${SEED:-42}"', {"SEED": ["42"]}), ("SEED=${SEED:-7} # SEED=9", {"SEED": ["7"]}),
    ('RUN_ID="a b"; SEED=1 \\', {"RUN_ID": ["a b"], "SEED": ["1"]}), ("#SEED=3", {}), ("$SEED=3", {})])
def test_settings_are_read_off_a_shell_script(script, found):
    assert stated_settings(script) == found


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_files_and_tests_that_documents_name_exist(repo, name):
    text = text_of(repo, name)
    for path in re.findall(r"`((?:tests|logs|benchmarks|tokenizers)/[\w./]+\.\w+)(?:::\w+)?`", text):
        assert (repo / path).exists(), f"{name} names {path}"
    for script in re.findall(r"`(?:python3? )?(\w+\.py)\b", text):
        assert any((folder / script).is_file() for folder in (repo, repo / "benchmarks")), f"{name} names {script}"
    tests = "".join(path.read_text(encoding="utf-8") for path in (repo / "tests").glob("test_*.py"))
    for test in re.findall(r"\b(test_\w+)`", re.sub(r"`tests/\w+\.py`", "", text)):
        assert f"def {test}(" in tests, f"{name} names {test}"


def test_functions_that_the_rules_checklist_names_exist(repo):
    rules = text_of(repo, "README.md").split("## Rules checklist")[1].split("\n## ")[0]
    for row in rules.splitlines():
        if row.startswith("| ") and row.count("|") == 4:
            for name in re.findall(r"`([\w.]+)`", row.split("|")[2]):
                thing = gpt
                for part in name.split("."):
                    assert hasattr(thing, part), f"README's checklist names {name}"
                    thing = getattr(thing, part)


def test_the_readme_has_the_sections_in_their_order(repo):
    headings = re.findall(r"^## (.+)$", text_of(repo, "README.md"), re.M)
    wanted = ["Results", "Quick start", "How it works", "Settings", "Rules checklist", "Tests", "Change something",
              "Troubleshooting", "Negative results", "References and credits", "Licence"]
    assert headings == wanted


def test_commands_that_the_readme_names_are_those_of_run_sh(repo):
    known = set(re.findall(r"^#   \./run\.sh ([a-z][\w-]*)", text_of(repo, "run.sh"), re.M))
    named = {word for name in ("README.md", "CONTRIBUTING.md")
             for word in re.findall(r"\./run\.sh ([a-z][\w-]*)", text_of(repo, name))} - {"first"}
    assert named <= known and {"check", "seeds", "one-gpu", "proxy", "demo", "test"} <= known


def test_the_lineage_is_credited(repo):
    credits = text_of(repo, "README.md").split("## References and credits")[1]
    for number in (2018, 2060, 2007, 1967, 1948, 1953, 1923, 1908, 1855, 1514, 1145, 2124):
        assert f"#{number}" in credits
