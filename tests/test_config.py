"""Section 1: settings. Every bad value stops the run with a message that says how to fix it."""
import dataclasses
import math
import subprocess
import sys

import pytest
from hypothesis import given, strategies as st

import train_gpt as gpt
from helpers import RECORD_FIXED_SETTINGS, RECORD_SETTINGS, tiny_config


def test_defaults_are_the_record_run():
    assert gpt.Config.from_env(RECORD_SETTINGS) == gpt.Config()


def test_every_model_training_and_evaluation_setting_has_a_record_value():
    of_this_project = {"run_id", "data_path", "tokenizer_path", "compile", "allow_slow", "allow_unverified",
                       "prequant_only", "quantize_only", "ttt_eval_only", "audit", "eval_wallclock_seconds",
                       "fill_artifact", "rdo_lambda", "tilt_mode", "skip_check", "ttt_stop_after",
                       "block_kernels", "cuda_graphs", "checkpoint_dir", "quiet",
                       "half_rows_until", "quarter_rows_until"}
    names = {field.name for field in dataclasses.fields(gpt.Config)}
    assert {name.lower() for name in RECORD_SETTINGS} == names - of_this_project


def test_fixed_settings_are_accepted_at_the_value_of_the_record_run():
    assert gpt.Config.from_env({**RECORD_SETTINGS, **RECORD_FIXED_SETTINGS}) == gpt.Config()
    assert gpt.Config.from_env({"TEMPERATURE_SCALE": "1.0", "WITHIN_BOOST": "0.0"}) == gpt.Config()


@pytest.mark.parametrize("name", sorted(RECORD_FIXED_SETTINGS))
def test_fixed_settings_are_refused_at_any_other_value(name):
    with pytest.raises(gpt.ConfigError, match=rf"^{name}=7\.5: expected .*because .*unset it$"):
        gpt.Config.from_env({name: "7.5"})


@pytest.mark.parametrize("name", ["WITHIN_BOOST", "WORD_BOOST"])
def test_channels_that_look_at_the_scored_token_are_refused_as_not_causal(name):
    with pytest.raises(gpt.ConfigError, match="not causal"):
        gpt.Config.from_env({name: "1"})


@pytest.mark.parametrize("name", ["VAL_LOSS_EVERY", "EVAL_STRIDE", "ROPE_TRAIN_SEQ_LEN", "EMBED_LR"])
def test_retired_settings_are_refused_with_the_reason(name):
    with pytest.raises(gpt.ConfigError, match=rf"^{name} is retired: .+; unset it$"):
        gpt.Config.from_env({name: "0"})


@pytest.mark.parametrize(("name", "hint"), [
    ("TTT_MASK", "--help"), ("LQER_GROUP_SIZE", "--help"), ("MUON_BETA", "--help"), ("GPTQ_BLOCK", "--help"),
    ("AWQ_LITE_TOP_K", "--help"), ("TTT_LORA_RNK", "TTT_LORA_RANK"), ("XSA_LAST", "XSA_LAST_N"),
    ("ITERATION", "ITERATIONS"), ("ITERATIONSS", "ITERATIONS"), ("SEEDS", "SEED"),
    ("MATRIX_RL", "MATRIX_LR"), ("MODEL_DIMS", "MODEL_DIM"), ("GRAD_CLIP_NORMS", "GRAD_CLIP_NORM"),
    ("WITHIN_BOOSTS", "WITHIN_BOOST"), ("QUANTISE_ONLY", "QUANTIZE_ONLY"), ("DATA_PATHS", "DATA_PATH")])
def test_misspelt_settings_are_refused(name, hint):
    with pytest.raises(gpt.ConfigError, match="unknown setting " + name) as caught:
        gpt.Config.from_env({name: "1"})
    assert hint in str(caught.value)


def test_other_programs_variables_are_left_alone():
    names = """PATH HOME PWD OLDPWD SHELL USER LOGNAME LANG LC_ALL TERM EDITOR VISUAL EDIT PAGER HOSTNAME TMPDIR TZ
        MAIL DISPLAY VIRTUAL_ENV PYTHONPATH PYTHONUNBUFFERED CC CXX CFLAGS CUDA_VISIBLE_DEVICES CUDA_HOME
        LD_LIBRARY_PATH OMP_NUM_THREADS MKL_NUM_THREADS RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK
        ROLE_RANK ROLE_NAME ROLE_WORLD_SIZE GROUP_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID
        TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_USE_AGENT_STORE TORCH_NCCL_ASYNC_ERROR_HANDLING NCCL_DEBUG
        NPROC_PER_NODE VECTORS_DIR SLURM_JOB_ID TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR HF_HOME _ SHLVL""".split()
    assert gpt.Config.from_env(dict.fromkeys(names, "1")) == gpt.Config()


@pytest.mark.parametrize(("name", "text", "expected"), [
    ("COMPILE", "true", "0 or 1"), ("COMPILE", "", "0 or 1"), ("TTT_ENABLED", "2", "0 or 1"),
    ("NUM_LAYERS", "11.0", "a whole number"), ("NUM_LAYERS", "eleven", "a whole number"),
    ("ITERATIONS", "", "a whole number"), ("MATRIX_LR", "fast", "a finite number"),
    ("MATRIX_LR", "nan", "a finite number"), ("EMA_DECAY", "inf", "a finite number")])
def test_ill_typed_values_are_refused(name, text, expected):
    with pytest.raises(gpt.ConfigError, match=f"^{name}='{text}': expected {expected}$"):
        gpt.Config.from_env({name: text})


def test_a_number_beyond_all_bounds_is_refused_like_any_other():
    with pytest.raises(gpt.ConfigError, match="SEED=9+: expected a value between"):
        gpt.Config.from_env({"SEED": "9" * 400})


@pytest.mark.parametrize(("name", "text"), [
    ("ITERATIONS", "0"), ("SEED", "-1"), ("VOCAB_SIZE", "100000"), ("EMA_DECAY", "1.5"), ("MATRIX_LR", "-0.1"),
    ("WARMDOWN_FRAC", "2"), ("MUON_BACKEND_STEPS", "6"), ("MATRIX_BITS", "9"), ("MATRIX_BITS", "1"),
    ("TOKEN_THRESHOLD", "1.1"), ("TOKEN_ORDER", "1"), ("LOGIT_SOFTCAP", "0.5"), ("TTT_CHUNK_SIZE", "0"), ("TOKEN_BOOST", "89"), ("LOGIT_SOFTCAP", "150"),
    ("MAX_WALLCLOCK_SECONDS", "-1"), ("ADAM_EPS", "-1e-8")])
def test_values_out_of_range_are_refused_with_the_range(name, text):
    with pytest.raises(gpt.ConfigError, match=rf"^{name}=\S+: expected a value between \S+ and \S+"):
        gpt.Config.from_env({name: text})


@pytest.mark.parametrize("name", ["BETA1", "BETA2", "TTT_BETA2"])
def test_adam_decays_of_one_are_refused_before_anything_starts(name):
    with pytest.raises(gpt.ConfigError, match=name):
        gpt.Config.from_env({name: "1"})


def test_listed_choices_are_named():
    with pytest.raises(gpt.ConfigError, match=r"^COMPRESSOR=brotli: expected one of \['pergroup'\]"):
        gpt.Config.from_env({"COMPRESSOR": "brotli"})


@pytest.mark.parametrize(("env", "names"), [
    ({"MODEL_DIM": "500"}, "MODEL_DIM NUM_HEADS"),
    ({"NUM_HEADS": "8", "NUM_KV_HEADS": "3"}, "NUM_HEADS NUM_KV_HEADS"),
    ({"ROPE_DIMS": "15"}, "ROPE_DIMS"), ({"ROPE_DIMS": "128"}, "ROPE_DIMS"),
    ({"GATE_WINDOW": "513"}, "GATE_WINDOW MODEL_DIM"),
    ({"MLP_MULT": "1.3333"}, "MLP_MULT MODEL_DIM"),
    ({"LOOP_START": "6"}, "LOOP_START LOOP_END"),
    ({"LOOP_END": "8"}, "LOOP_END PARALLEL_START_LAYER"),
    ({"PARALLEL_START_LAYER": "12"}, "PARALLEL_START_LAYER NUM_LAYERS"),
    ({"TRAIN_BATCH_TOKENS": "786433"}, "TRAIN_BATCH_TOKENS"),
    ({"TRAIN_SEQ_LEN": "1000"}, "TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN"),
    ({"VAL_BATCH_TOKENS": "8000"}, "VAL_BATCH_TOKENS EVAL_SEQ_LEN"),
    ({"GPTQ_RESERVE_SECONDS": "600"}, "GPTQ_RESERVE_SECONDS MAX_WALLCLOCK_SECONDS"),
    ({"TTT_CHUNK_SIZE": "2560"}, "TTT_CHUNK_SIZE TTT_EVAL_SEQ_LEN"),
    ({"GLOBAL_TTT_CHUNK_TOKENS": "1000"}, "GLOBAL_TTT_CHUNK_TOKENS TTT_EVAL_SEQ_LEN"),
    ({"RUN_ID": "a", "PREQUANT_ONLY": "1", "QUANTIZE_ONLY": "1"}, "PREQUANT_ONLY QUANTIZE_ONLY"),
    ({"QUANTIZE_ONLY": "1"}, "QUANTIZE_ONLY RUN_ID"), ({"TTT_EVAL_ONLY": "1"}, "TTT_EVAL_ONLY RUN_ID"),
    ({"RUN_ID": "../elsewhere"}, "RUN_ID"), ({"TTT_STOP_AFTER": "7"}, "TTT_STOP_AFTER")])
def test_contradictory_settings_are_refused_with_the_values_found(env, names):
    with pytest.raises(gpt.ConfigError) as caught:
        gpt.Config.from_env(env)
    message, _, found = str(caught.value).rpartition("; found ")
    for name in names.split():
        assert name in message and f"{name}=" in found


def test_a_configuration_cannot_be_changed_after_it_was_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        gpt.Config().seed = 1


def test_settings_are_read_from_the_given_mapping():
    cfg = gpt.Config.from_env({"SEED": "7", "MATRIX_LR": "1e-3", "COMPILE": "0", "DATA_PATH": "x"})
    assert (cfg.seed, cfg.matrix_lr, cfg.compile, cfg.data_path) == (7, 1e-3, False, "x")


def test_derived_sizes_follow_the_settings():
    cfg = gpt.Config()
    assert (cfg.head_dim, cfg.kv_dim, cfg.mlp_dim, cfg.row_tokens) == (64, 256, 2048, 98304)


@given(st.text("AB", max_size=5), st.text("AB", max_size=5))
def test_edit_distance_counts_insertions_deletions_and_replacements(a, b):
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))
    assert gpt.edit_distance(a, b) == slow(a, b)


def test_the_settings_table_has_one_documented_line_per_setting():
    lines = gpt.settings_table().splitlines()[2:]
    fields = dataclasses.fields(gpt.Config)
    assert len(lines) == len(fields)
    for line, field in zip(lines, fields):
        name, default, meaning = [cell.strip() for cell in line.strip("|").split("|")]
        assert name == f"`{field.name.upper()}`" and meaning
        if default:
            assert gpt.Config.from_env({field.name.upper(): default.strip("`")}) == gpt.Config()


def test_help_prints_the_settings_table(capsys):
    assert gpt.main(["--help"]) == 0
    assert gpt.settings_table() in capsys.readouterr().out


def test_arguments_are_refused_because_settings_are_environment_variables(capsys):
    assert gpt.main(["--seed=1"]) == 2
    assert "settings are environment variables" in capsys.readouterr().err


def test_a_bad_setting_ends_with_exit_code_2_before_a_log_is_opened(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TTT_MASK", "1")
    assert gpt.main([]) == 2
    assert "unknown setting TTT_MASK" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_missing_data_ends_with_exit_code_1_and_a_way_out(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "nowhere"))
    assert gpt.main([]) == 1
    assert "no such folder; run prepare_caseops_data.py" in capsys.readouterr().err


def test_importing_the_script_has_no_side_effects(repo, tmp_path):
    code = "import os, sys; before = dict(os.environ); import train_gpt; assert dict(os.environ) == before"
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={"PYTHONPATH": str(repo), "TTT_MASK": "1", "PATH": "/usr/bin:/bin"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_are_refused_inside_python_too():
    with pytest.raises(gpt.ConfigError, match="^MATRIX_LR=nan: expected a value between"):
        tiny_config(matrix_lr=math.nan)
