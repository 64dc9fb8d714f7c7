"""Section 11: containers that refuse damage, codes and tensors that come back bit for bit."""
import dataclasses
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as gpt
import twins
from helpers import random_model, tiny_config

SHAPES = (dict(), dict(num_layers=3, model_dim=24, num_kv_heads=2, loop_end=1, parallel_start_layer=2, mlp_mult=1.5),
          dict(vocab_size=9, num_layers=4, num_loops=0, parallel_start_layer=4, embed_bits=5, matrix_bits=4),
          dict(awq_lite_group_size=8, awq_lite_group_top_k=3, lqer_rank=3, lqer_asym_group=8, lqer_top_k=6),
          dict(awq_lite_enabled=False, lqer_asym_enabled=False), dict(rdo_lambda=1.0),
          dict(rdo_lambda=0.5, vocab_size=600, awq_lite_group_size=8))


def model_with_statistics(cfg: gpt.Config, seed: int = 0) -> tuple[gpt.GPT, gpt.Calibration]:
    """A random model and the statistics of white calibration activations."""
    model = random_model(cfg, seed).requires_grad_(False)
    keys = {m.tap: getattr(model, m.group).shape[-1] for m in gpt.list_matrices(cfg)}
    return model, gpt.Calibration({key: 4 * torch.eye(cols) for key, cols in keys.items()}, dict.fromkeys(keys, 4), 1)


def quantized_model(cfg: gpt.Config, seed: int = 0) -> tuple[dict[str, gpt.Quantized], dict[str, torch.Tensor]]:
    return gpt.quantize(cfg, gpt.Run(cfg), *model_with_statistics(cfg, seed))


def as_rank_zero(cfg: gpt.Config, run_id: str = "r") -> gpt.Run:
    run = gpt.Run(cfg)
    run.run_id = run_id
    return run


def write_quantized(cfg, run, quantized, passed) -> None:
    gpt.write_file(gpt.artifact_path(run), gpt.build_container(
        gpt.ARTIFACT_MAGIC, cfg, *gpt.encode_model(cfg, quantized, passed)))


# --- codes and tensors --------------------------------------------------------------------------------------

def test_recorded_codes_round_trip_through_streams_and_container(load_vectors, tmp_path):
    z = load_vectors("serialization")
    groups: dict[str, list[np.ndarray]] = {}
    for name in sorted(key for key in z if key.startswith("q_")):
        groups.setdefault(name.split("_")[-1], []).append(z[name])
    assert groups
    stacks = {kind: np.stack(members) for kind, members in groups.items()}
    cfg, path = tiny_config(), tmp_path / "codes.artifact"
    gpt.write_file(path, gpt.build_container(gpt.ARTIFACT_MAGIC, cfg, {
        kind: gpt.encode_codes(stack) for kind, stack in stacks.items()}))
    for kind, stream in gpt.read_container(path, gpt.ARTIFACT_MAGIC, cfg)[0].items():
        restored = gpt.decode_codes(stream)
        assert restored.dtype == np.int8 and np.array_equal(restored, stacks[kind]), kind


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), st.integers(0, 2**31), st.sampled_from((1, 7, 31, 127)))
def test_codes_of_any_shape_round_trip(shape, seed, limit):
    codes = np.random.default_rng(seed).integers(-limit, limit + 1, shape).astype(np.int8)
    restored = gpt.decode_codes(gpt.encode_codes(codes))
    assert restored.dtype == np.int8 and np.array_equal(restored, codes)


def test_extreme_code_values_round_trip():
    for codes in (np.full((2, 3, 4), -128, np.int8), np.zeros((1, 64, 64), np.int8),
                  np.arange(-128, 128).astype(np.int8).reshape(1, 16, 16)):
        assert np.array_equal(gpt.decode_codes(gpt.encode_codes(codes)), codes)


def test_skewed_codes_cost_fewer_bytes_than_they_occupy():
    codes = np.random.default_rng(0).normal(0, 2, (2, 128, 128)).round().astype(np.int8)
    assert len(gpt.encode_codes(codes)) < 0.7 * codes.nbytes


# --- the whole artifact -------------------------------------------------------------------------------------

@twins.fast_trellis
@pytest.mark.parametrize("changes", SHAPES)
def test_restored_weights_equal_the_dequantized_ones_bit_for_bit(changes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = tiny_config(**changes)
    quantized, passed = quantized_model(cfg)
    run, model = as_rank_zero(cfg), gpt.GPT(cfg)
    write_quantized(cfg, run, quantized, passed)
    gpt.read_artifact(cfg, run, model)
    for name, q in quantized.items():
        group, _, layer = name.partition(".")
        W = getattr(model, group)
        assert torch.equal(W[int(layer)] if layer else W, gpt.dequantize(q)), name
    for name, value in passed.items():
        assert torch.equal(getattr(model, name), value.float()), name
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_one_line_of_the_table_changes_the_bits_of_a_group_everywhere(monkeypatch):
    monkeypatch.setitem(gpt.TENSOR_GROUPS, "wk", gpt.TENSOR_GROUPS["wk"]._replace(bits="embed_bits"))
    cfg = tiny_config(embed_bits=3, awq_lite_group_size=8, awq_lite_group_top_k=200, lqer_enabled=False)
    quantized, passed = quantized_model(cfg)
    assert all(q.protect_starts for q in quantized.values())
    state = gpt.decode_model(cfg, *gpt.encode_model(cfg, quantized, passed))
    for m in gpt.list_matrices(cfg):
        q = quantized[m.name]
        plain = torch.ones(q.codes.shape[1], dtype=torch.bool)
        for start in q.protect_starts:
            plain[start:start + q.group_size] = False
        limit = gpt.code_limit(cfg.embed_bits if m.group in ("wk", "tok_emb") else cfg.matrix_bits)
        assert not plain.any() or int(q.codes[:, plain].abs().max()) <= limit, m.name
        restored = state[m.group][m.layer] if gpt.TENSOR_GROUPS[m.group].is_bank else state[m.group]
        assert torch.equal(restored, gpt.dequantize(q)), m.name


def test_artifacts_of_the_same_model_are_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = tiny_config()
    model = quantized_model(cfg)
    for run_id in "ab":
        write_quantized(cfg, as_rank_zero(cfg, run_id), *model)
    first, second = (gpt.artifact_path(as_rank_zero(cfg, run_id)).read_bytes() for run_id in "ab")
    assert first == second


def test_size_report_adds_the_file_and_the_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cfg, run = tiny_config(), as_rank_zero(tiny_config())
    gpt.write_artifact(cfg, run, *model_with_statistics(cfg))
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines() if ": " in line and "bytes" in line)
    sizes = {key: int(value.split()[0]) for key, value in lines.items() if value.endswith(" bytes")}
    model_bytes = sizes["Serialized model quantized+pergroup"]
    assert model_bytes == gpt.artifact_path(run).stat().st_size
    assert sizes["Total submission size quantized+pergroup"] == model_bytes + sizes["Code size (compressed)"]


@pytest.fixture
def fitted():
    """Configuration, run, model, statistics, and the artifact at the configured clip sigmas."""
    cfg = tiny_config()
    run, (model, stats) = as_rank_zero(cfg), model_with_statistics(cfg)
    return cfg, run, model, stats, gpt.fit_artifact(cfg, run, model, stats, 10**9)


def test_every_setting_of_a_tensor_group_shapes_the_artifact_and_no_checkpoint():
    cfg = tiny_config()
    settings = {name for spec in gpt.TENSOR_GROUPS.values() for name in (spec.bits, spec.clip_sigmas)}
    assert settings <= gpt.shaping_settings(gpt.ARTIFACT_MAGIC, cfg).keys()
    assert not settings & gpt.shaping_settings(gpt.CHECKPOINT_MAGIC, cfg).keys()


def test_an_artifact_that_fits_keeps_the_configured_clip_sigmas(fitted):
    cfg, run, model, stats, data = fitted
    streams = gpt.encode_model(cfg, *gpt.quantize(cfg, run, model, stats))
    assert data == gpt.build_container(gpt.ARTIFACT_MAGIC, cfg, *streams)
    assert gpt.fit_artifact(cfg, run, model, stats, len(data)) == data


def test_an_artifact_over_the_limit_gets_the_smallest_larger_steps_that_fit(fitted, monkeypatch, capsys):
    cfg, run, model, stats, data = fitted
    monkeypatch.setattr(gpt, "RATE_TOLERANCE", 400)
    limit = len(data) - 3000
    fits = gpt.fit_artifact(cfg, run, model, stats, limit)
    assert limit - 400 <= len(fits) <= limit
    assert "artifact attempt:2 sigma_factor:1." in capsys.readouterr().out


def test_fill_artifact_spends_spare_bytes_on_smaller_steps(fitted, monkeypatch):
    cfg, run, model, stats, data = fitted
    monkeypatch.setattr(gpt, "RATE_TOLERANCE", 400)
    limit = len(data) + 2000
    full = gpt.fit_artifact(dataclasses.replace(cfg, fill_artifact=True), run, model, stats, limit)
    assert limit - 400 <= len(full) <= limit
    assert gpt.fit_artifact(cfg, run, model, stats, limit) == data


def test_a_model_that_cannot_fit_is_refused(fitted):
    cfg, run, model, stats, _ = fitted
    with pytest.raises(gpt.ArtifactError, match="fit 500 bytes"):
        gpt.fit_artifact(cfg, run, model, stats, 500)


def test_checkpoint_restores_fp32_weights_exactly(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cfg, run = tiny_config(), as_rank_zero(tiny_config())
    model, restored = random_model(cfg), random_model(cfg, seed=1)
    gpt.write_checkpoint(cfg, run, model)
    gpt.read_checkpoint(cfg, run, restored)
    for (name, p), q in zip(model.named_parameters(), restored.parameters()):
        assert torch.equal(p, q), name
    size = gpt.checkpoint_path(run).stat().st_size
    assert f"Serialized model: {size} bytes" in capsys.readouterr().out


# --- refusals -----------------------------------------------------------------------------------------------

@pytest.fixture
def container(tmp_path):
    """A path and settings of a small valid file."""
    cfg, path = tiny_config(), tmp_path / "folder" / "a.artifact"
    streams = {"one": b"first stream", "two": bytes(range(256)), "empty": b""}
    gpt.write_file(path, gpt.build_container(gpt.ARTIFACT_MAGIC, cfg, streams))
    assert gpt.read_container(path, gpt.ARTIFACT_MAGIC, cfg)[0] == streams
    return path, cfg


def refuse(path, cfg, match, magic=gpt.ARTIFACT_MAGIC):
    with pytest.raises(gpt.ArtifactError, match=match) as caught:
        gpt.read_container(path, magic, cfg)
    assert str(path) in str(caught.value)


def test_every_changed_byte_is_refused(container):
    path, cfg = container
    good = path.read_bytes()
    for at in range(len(good)):
        damaged = bytearray(good)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        refuse(path, cfg, "beginning with" if at < 8 else "truncated or corrupted")


def test_every_truncation_and_appended_bytes_are_refused(container):
    path, cfg = container
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        refuse(path, cfg, "not a file of that kind" if length < 8 else "truncated or corrupted")
    path.write_bytes(good + b"\0")
    refuse(path, cfg, "truncated or corrupted")


def test_foreign_missing_and_swapped_files_are_refused(container, tmp_path):
    path, cfg = container
    foreign = tmp_path / "weights.pt"
    foreign.write_bytes(b"PK\x03\x04" + bytes(200))
    refuse(foreign, cfg, "not a file of that kind")
    refuse(path, cfg, "not a file of that kind", magic=gpt.CHECKPOINT_MAGIC)
    refuse(tmp_path / "absent", cfg, "cannot be read.*check RUN_ID")
    refuse(tmp_path, cfg, "cannot be read")


def test_another_format_version_is_refused(container, monkeypatch):
    path, cfg = container
    monkeypatch.setattr(gpt, "FORMAT_VERSION", gpt.FORMAT_VERSION + 1)
    gpt.write_file(path, gpt.build_container(gpt.ARTIFACT_MAGIC, cfg, {}))
    monkeypatch.undo()
    refuse(path, cfg, f"format version {gpt.FORMAT_VERSION + 1}, expected {gpt.FORMAT_VERSION}")


def test_a_setting_younger_than_the_file_counts_as_its_default(container, monkeypatch):
    path, cfg = container
    with monkeypatch.context() as before:
        shaping = gpt.shaping_settings
        before.setattr(gpt, "shaping_settings", lambda *args: {
            name: value for name, value in shaping(*args).items() if name != "half_rows_until"})
        gpt.write_file(path, gpt.build_container(gpt.ARTIFACT_MAGIC, cfg, {}))
    gpt.read_container(path, gpt.ARTIFACT_MAGIC, cfg)
    with pytest.raises(gpt.ArtifactError, match=r"HALF_ROWS_UNTIL=0\.0 \(now 0\.3\)"):
        gpt.read_container(path, gpt.ARTIFACT_MAGIC, dataclasses.replace(cfg, half_rows_until=0.3))


def test_other_model_settings_are_refused_by_name_and_value(container):
    path, cfg = container
    refuse(path, dataclasses.replace(cfg, num_loops=3, rope_base=500.0), r"NUM_LOOPS=2 \(now 3\).*ROPE_BASE=10000.0 \(now 500.0\)")
    # Settings that do not change the meaning of the weights may differ.
    gpt.read_container(path, gpt.ARTIFACT_MAGIC, dataclasses.replace(cfg, eval_seq_len=16, ttt_lora_lr=0.5))


@pytest.mark.parametrize("fail_at", ("fsync", "replace"))
def test_failed_write_leaves_the_old_file_and_no_debris(container, monkeypatch, fail_at):
    path, cfg = container
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")
    monkeypatch.setattr(os, fail_at, fail)
    with pytest.raises(OSError, match="disk full"):
        gpt.write_file(path, b"x" * 100)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_only_rank_zero_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg, run = tiny_config(), as_rank_zero(tiny_config())
    run.rank = 1
    gpt.write_checkpoint(cfg, run, random_model(cfg))
    gpt.write_artifact(cfg, run, *model_with_statistics(cfg))
    assert not list(tmp_path.rglob("*.*"))
