"""README and run.sh say what the script does."""
import dataclasses

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
