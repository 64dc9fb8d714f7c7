"""benchmarks/readouts.py: blends are what they say, and every model it leaves is read by what comes after."""
import sys

import numpy as np
import pytest
import torch

import train_gpt as gpt
from helpers import tiny_config
from toy_data import environment, write_run_data


@pytest.fixture
def readouts(monkeypatch):
    monkeypatch.setattr(gpt, "WeightAverage", gpt.WeightAverage)        # main puts its own there
    monkeypatch.setattr(gpt, "diagnose", gpt.diagnose)
    sys.path.insert(0, str(gpt.REPO / "benchmarks"))
    try:
        import readouts
    finally:
        sys.path.remove(str(gpt.REPO / "benchmarks"))
    return readouts


def settings(folder, **changes) -> dict[str, str]:
    return environment(data_path=folder / "data", run_id="toy", allow_unverified=False, warmup_steps=1,
                       ema_decay=0.5, iterations=10**6, max_wallclock_seconds=2.5, gptq_reserve_seconds=0.5,
                       num_layers=2, num_loops=1, loop_start=0, loop_end=0, parallel_start_layer=1, **changes)


def test_a_blend_lies_between_average_and_weights(readouts):
    readouts.KeptAverage.half_s = 0.0
    model = gpt.GPT(tiny_config())
    kept = readouts.KeptAverage(model, 0.5)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    kept.update()
    half_way = [average.clone() for average in kept.shadow]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    kept.update()
    kept.apply()
    for with_embedding in (False, True):
        for name, value in kept.blend(0.4, with_embedding).items():
            share = 0.4 if with_embedding or name != "tok_emb" else 0.0
            torch.testing.assert_close(value, start[name] + share * 2.0 + (1 - share) * 1.25)
    for kept_then, average in zip(kept.half, half_way):
        assert torch.equal(kept_then, average)           # later steps leave it alone
    for (name, p), average in zip(model.named_parameters(), kept.shadow):
        assert torch.equal(p, average), name


def test_a_readout_logs_every_blend_and_leaves_both_checkpoints(readouts, tmp_path, monkeypatch, capsys):
    write_run_data(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    env = settings(tmp_path)
    assert readouts.main([], env) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("readout ")]
    assert [line.split(" bpb:")[0] for line in lines] == [
        *(f"readout share:{share:g} embedding:{kind}" for share in readouts.SHARES for kind in ("average", "blended")),
        "readout half_way"]
    assert (tmp_path / "logs" / "toy.txt").read_text().count("readout ") == len(lines)
    cfg = gpt.Config.from_env(env)
    final, half = (gpt.read_container(tmp_path / "checkpoints" / f"{name}.weights", gpt.CHECKPOINT_MAGIC, cfg)[0]
                   for name in ("toy", "toy_half"))
    assert final.keys() == half.keys() and any(final[name] != half[name] for name in final)
    for streams in (final, half):                         # in the order that makes row scales nearly free
        up = np.frombuffer(streams["w_up"], np.float32).reshape(cfg.num_layers, cfg.mlp_dim, cfg.model_dim)
        assert (np.diff(up.std(-1), axis=1) * np.sign(up.std(-1)[:, -1:] - up.std(-1)[:, :1]) >= -1e-6).all()


@pytest.mark.parametrize(("changes", "message"), [
    (dict(WORLD_SIZE="2"), "expected one process"), (dict(WORLD_SIZE="x"), "WORLD_SIZE=x: expected one process"),
    (dict(WORLD_SIZE="0"), "WORLD_SIZE=0: expected one process"),
    (dict(MAX_WALLCLOCK_SECONDS="0"), "MAX_WALLCLOCK_SECONDS above 0"),
    (dict(TTT_EVAL_ONLY="1"), "TTT_EVAL_ONLY")])
def test_what_a_readout_cannot_be_made_of_is_refused(readouts, tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(tmp_path)
    assert readouts.main([], {**settings(tmp_path), **changes}) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
