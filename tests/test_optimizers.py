"""Sections 5 and 6: Muon, AdamW groups, the row-defined step, schedules and the weight average."""
import re

import numpy as np
import pytest
import torch
from torch import nn

import train_gpt as gpt
from helpers import archive_config, archive_model, freeze_caps, random_model, tiny_config, training_row


def new_muon(params, dtype=torch.float32, weight_decay=0.0):
    cfg = tiny_config(muon_wd=weight_decay)
    run = gpt.Run(cfg)
    run.compute_dtype = dtype
    return gpt.Muon(cfg, run, params)


# Polar Express

def polar_cases(vectors):
    return sorted({m[1] for key in vectors if (m := re.fullmatch(r"pe_(\w+)_in", key))})


def test_polar_express_in_fp32_equals_the_reference(load_vectors):
    vectors = load_vectors("optimizer")
    for case in polar_cases(vectors):
        for steps, suffix in ((5, "out_fp32"), (3, "out_fp32_3steps")):
            out = gpt.polar_express(torch.from_numpy(vectors[f"pe_{case}_in"]), steps, torch.float32).numpy()
            tolerance = 1e-3 if case == "lowrank" else 1e-5
            assert np.abs(out - vectors[f"pe_{case}_{suffix}"]).max() <= tolerance, (case, steps)


def test_polar_express_in_bf16_stays_close_to_fp32(load_vectors):
    vectors = load_vectors("optimizer")
    for case in polar_cases(vectors):
        if case != "lowrank":                                  # bf16 amplifies noise in its null space
            out = gpt.polar_express(torch.from_numpy(vectors[f"pe_{case}_in"]), 5, torch.bfloat16)
            expected = vectors[f"pe_{case}_out_fp32"]
            assert out.dtype == torch.bfloat16
            assert np.linalg.norm(out.float().numpy() - expected) <= 0.08 * np.linalg.norm(expected), case


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 48, 16), (3, 16, 48)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape):
    G = torch.randn(shape)
    out = gpt.polar_express(G, 5, torch.float32)
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.7 and values.max() < 1.3
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    core = U.mT @ out @ Vh.mT
    assert (core - core.diagonal(dim1=-2, dim2=-1).diag_embed()).abs().max() < 1e-3


def test_a_zero_matrix_stays_zero():
    assert torch.equal(gpt.polar_express(torch.zeros(2, 4, 6), 5), torch.zeros(2, 4, 6, dtype=torch.bfloat16))


# Muon

@pytest.mark.parametrize(("dtype", "name", "tolerance"), [(torch.float32, "fp32", 1e-5), (torch.bfloat16, "bf16", 5e-3)],
                         ids=["fp32", "bf16"])
def test_muon_updates_equal_the_reference(load_vectors, dtype, name, tolerance):
    vectors = load_vectors("optimizer")
    banks = sorted({m[1] for key in vectors if (m := re.fullmatch(r"muon_bank_(\w+)_w0", key))})
    params = {bank: nn.Parameter(torch.from_numpy(vectors[f"muon_bank_{bank}_w0"].copy())) for bank in banks}
    muon = new_muon(list(params.values()), dtype, float(vectors["muon_weight_decay"]))
    for step, (lr, momentum) in enumerate(zip(vectors["muon_lr"], vectors["muon_momentum"])):
        grads = {p: torch.from_numpy(vectors[f"muon_bank_{bank}_grads"][step].copy()) for bank, p in params.items()}
        muon.step(grads, float(lr), float(momentum))
        for bank, p in params.items():
            error = np.abs(p.detach().numpy() - vectors[f"muon_bank_{bank}_w_after{step + 1}_{name}"]).max()
            assert error <= tolerance, f"bank {bank}, step {step + 1}: off by {error:.2e}"
    assert all(buffer.dtype == torch.float32 for buffer in muon.momentum_buffers)


def test_matrices_of_one_shape_share_a_bank_and_do_not_mix():
    params = [nn.Parameter(torch.randn(n, 8, 6)) for n in (2, 3)] + [nn.Parameter(torch.randn(2, 6, 8))]
    grads = {p: torch.randn_like(p) for p in params}
    alone = []
    for p in params:
        copy = nn.Parameter(p.detach().clone())
        new_muon([copy], weight_decay=0.1).step({copy: grads[p].clone()}, 0.02, 0.9)
        alone.append(copy)
    together = new_muon(params, weight_decay=0.1)
    assert [len(bank) for bank in together.banks] == [2, 1]
    together.step({p: g.clone() for p, g in grads.items()}, 0.02, 0.9)
    for p, expected in zip(params, alone):
        torch.testing.assert_close(p, expected, rtol=0, atol=1e-6)


def test_tall_matrices_take_longer_steps():
    """The update of a matrix with rows > cols is scaled by sqrt(rows / cols)."""
    tall = nn.Parameter(torch.zeros(1, 32, 8))
    new_muon([tall]).step({tall: torch.randn(1, 32, 8)}, 1.0, 0.9)
    values = torch.linalg.svdvals(tall.detach())
    assert values.min() > 2 * 0.7 and values.max() < 2 * 1.3


# Parameter table

def test_every_parameter_is_trained_by_exactly_one_group():
    model = gpt.GPT(tiny_config())
    routed = [id(p) for group in gpt.route_parameters(model).values() for p in group]
    assert sorted(routed) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t | {"embed": ()}, r"missing \['tok_emb'\]"),
    (lambda t: t | {"embed": ("tok_emb", "pos_emb")}, r"unknown \['pos_emb'\]"),
    (lambda t: t | {"embed": ("tok_emb", "wq")}, r"repeated \['wq'\]")])
def test_a_table_that_does_not_cover_every_parameter_once_is_refused(monkeypatch, change, message):
    monkeypatch.setattr(gpt, "PARAMETER_TABLE", change(gpt.PARAMETER_TABLE))
    with pytest.raises(ValueError, match="every parameter exactly once.*" + message):
        gpt.route_parameters(gpt.GPT(tiny_config()))


def test_adamw_groups_have_the_rates_and_decays_of_their_settings():
    cfg = tiny_config()
    optimizer = gpt.Optimizer(cfg, gpt.Run(cfg), gpt.GPT(cfg))
    decay = {group["name"]: group["weight_decay"] for group in optimizer.adamw.param_groups}
    assert decay == {"embed": cfg.embed_wd, "scalar": cfg.adam_wd, "softcap": 0.0}
    assert optimizer.base_lr == {"embed": cfg.tied_embed_lr, "scalar": cfg.scalar_lr, "softcap": cfg.scalar_lr}
    assert all(group["betas"] == (cfg.beta1, cfg.beta2) and group["eps"] == cfg.adam_eps
               for group in optimizer.adamw.param_groups)


# The step

def random_gradients(model, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def total_norm(tensors):
    return torch.cat([x.flatten() for x in tensors]).norm()


def test_each_row_is_clipped_by_itself_and_rows_are_averaged():
    cfg = tiny_config()
    model = gpt.GPT(cfg)
    optimizer = gpt.Optimizer(cfg, gpt.Run(cfg), model)
    expected = None
    for seed, scale in enumerate((1.0, 1e-4, 100.0)):
        row = random_gradients(model, scale, seed)
        grads = [row[name].clone() for name in optimizer.names]
        norm = total_norm(grads)
        assert abs(optimizer.add_row(row) / norm - 1) < 1e-5                   # the norm before clipping
        factor = min(1.0, cfg.grad_clip_norm / (norm + 1e-6))
        clipped = [factor * g for g in grads]
        expected = clipped if expected is None else [a + b for a, b in zip(expected, clipped)]
    for found, wanted in zip(optimizer.grad_sum, expected):
        torch.testing.assert_close(found, wanted)
    seen = {}
    optimizer.muon.step = lambda grads, lr, momentum: seen.update(
        grads={p: grad.clone() for p, grad in grads.items()}, lr=lr, momentum=momentum)
    optimizer.step(3, 0.5)
    assert seen["lr"] == cfg.matrix_lr * 0.5 and seen["momentum"] == gpt.muon_momentum(cfg, 3)
    for p, wanted in zip(optimizer.params, expected):
        torch.testing.assert_close(seen["grads"][p], wanted / 3)


def test_the_first_adam_step_moves_against_the_gradient_by_the_learning_rate():
    cfg = tiny_config()
    model = random_model(cfg)
    optimizer = gpt.Optimizer(cfg, gpt.Run(cfg), model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = random_gradients(model)
    sign = {name: grad.sign() for name, grad in grads.items()}
    optimizer.add_row(grads)
    optimizer.step(0, 0.5)
    for group, lr, decay in (("embed", cfg.tied_embed_lr, cfg.embed_wd), ("scalar", cfg.scalar_lr, cfg.adam_wd),
                             ("softcap", cfg.scalar_lr, 0.0)):
        for name in gpt.PARAMETER_TABLE[group]:
            expected = before[name] * (1 - 0.5 * lr * decay) - 0.5 * lr * sign[name]
            error = (getattr(model, name) - expected).abs()
            assert error.median() < 1e-6 and error.max() < 0.5 * lr, name      # tiny gradients meet epsilon


def test_caps_never_fall_below_one():
    cfg = tiny_config(scalar_lr=5.0)
    model = random_model(cfg)
    with torch.no_grad():
        model.softcap_pos.fill_(1.5)
    optimizer = gpt.Optimizer(cfg, gpt.Run(cfg), model)
    optimizer.add_row({name: torch.full_like(p, 0.01) for name, p in model.named_parameters()})
    optimizer.step(0, 1.0)
    assert model.softcap_pos.item() == 1.0 and 1.0 < model.softcap_neg.item() < 12.0


def test_frozen_caps_are_left_out_of_the_norm_and_stay():
    cfg = tiny_config()
    model = gpt.GPT(cfg)
    freeze_caps(model, 30.0)
    optimizer = gpt.Optimizer(cfg, gpt.Run(cfg), model)
    grads = {name: torch.ones_like(p) for name, p in model.named_parameters() if p.requires_grad}
    count = sum(p.numel() for p in model.parameters()) - 2
    assert abs(optimizer.add_row(grads).item() / count ** 0.5 - 1) < 1e-5
    optimizer.step(0, 1.0)
    assert model.softcap_pos.item() == model.softcap_neg.item() == 30.0


def test_reset_forgets_every_buffer():
    cfg = tiny_config()
    models = [random_model(cfg), random_model(cfg)]
    optimizers = [gpt.Optimizer(cfg, gpt.Run(cfg), model) for model in models]
    optimizers[0].add_row(random_gradients(models[0], seed=5))
    optimizers[0].step(0, 1.0)
    models[0].load_state_dict(models[1].state_dict())
    optimizers[0].add_row(random_gradients(models[0], seed=6))       # a half-finished step is forgotten too
    optimizers[0].reset()
    for model, optimizer in zip(models, optimizers):
        for step in range(2):
            optimizer.add_row(random_gradients(model, seed=step))
            optimizer.step(step, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models)))


def test_a_parameter_without_gradient_stops_training_and_is_named():
    cfg = tiny_config()
    model = gpt.GPT(cfg)
    optimizer = gpt.Optimizer(cfg, gpt.Run(cfg), model)
    grads = random_gradients(model)
    del grads["xsa_alpha"], grads["w_up"]
    with pytest.raises(ValueError, match=r"found none of \['w_up', 'xsa_alpha'\]"):
        optimizer.add_row(grads)
    assert optimizer.num_rows == 0


def test_parameters_that_the_shape_leaves_unused_get_no_gradient_and_no_error():
    cfg = tiny_config(parallel_start_layer=5)                  # of five layers: no lanes
    model = random_model(cfg)
    tokens = torch.randint(2, 64, (32,))
    row = training_row(tokens, tokens.roll(-1), torch.tensor([0, 32], dtype=torch.int32))
    optimizer = gpt.Optimizer(cfg, gpt.Run(cfg), model)
    for looping in (False, True):
        _, grads = gpt.row_gradients(model, row, looping=looping, segment_cap=32)
        assert optimizer.names and set(optimizer.names) - grads.keys() == {"lane_post", "lane_resid"}
        optimizer.add_row(grads)
    assert gpt.unused_parameters(tiny_config()) == set()


@pytest.mark.parametrize("shape", [{"num_loops": 0}, {"num_layers": 2, "loop_start": 0, "loop_end": 0,
                                                      "parallel_start_layer": 1}, {"parallel_start_layer": 3}])
@pytest.mark.parametrize("looping", [False, True])
def test_every_shape_uses_all_parameters_that_it_claims_to_use(shape, looping):
    cfg = tiny_config(**shape)
    model = random_model(cfg)
    tokens = torch.randint(2, 64, (32,))
    row = training_row(tokens, tokens.roll(-1), torch.tensor([0, 32], dtype=torch.int32))
    _, grads = gpt.row_gradients(model, row, looping=looping, segment_cap=32)
    assert {name for name, _ in model.named_parameters()} - grads.keys() == gpt.unused_parameters(cfg)


def test_four_training_steps_equal_the_reference(load_vectors):
    steps, weights = load_vectors("train_steps"), load_vectors("model_weights")
    forward = load_vectors("model_forward")
    longest = max(len(steps[key]) for key in steps if key.endswith("_tokens"))
    cfg = archive_config(weights, forward, longest_row=longest)
    model = archive_model(weights, cfg)
    freeze_caps(model, float(forward["train_softcap"]))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, average = gpt.Optimizer(cfg, gpt.Run(cfg), model), gpt.WeightAverage(model, cfg.ema_decay)
    cap, rows = int(steps["segment_cap"]), int(steps["accum"])

    def assert_tensor(name, found, expected):
        error = np.abs(found.detach().numpy() - expected).max()
        assert error <= (2e-4 if name == "tok_emb" else 5e-5), f"{name}: off by {error:.2e}"

    for step in range(len(steps["loss"])):
        losses = []
        for row in range(rows):
            tokens = steps[f"step{step}_micro{row}_tokens"].astype(np.int64)
            bounds = torch.from_numpy(gpt.segment_bounds(tokens[:-1], cap))
            inputs, targets = torch.from_numpy(tokens[:-1]), torch.from_numpy(tokens[1:])
            loss, grads = gpt.row_gradients(model, training_row(inputs, targets, bounds),
                                            looping=bool(steps["looping"][step]), segment_cap=cap)
            norm = optimizer.add_row(grads).item()
            assert abs(norm - steps["grad_norm_before_clip"][step, row]) <= 1e-4 * max(1, norm)
            losses.append(loss.item())
        assert abs(np.mean(losses) - steps["loss"][step]) <= 1e-4
        optimizer.step(int(steps["step_index"][step]), float(steps["lr_multiplier"][step]))
        average.update()
        prefix, seen = f"after{step + 1}_", 0
        for key in (key for key in steps if key.startswith(prefix)):
            name = key.removeprefix(prefix)
            if name.startswith("deltanorm_"):
                name = name.removeprefix("deltanorm_")
                if name.startswith("softcap"):                 # the archive keeps the file's caps: distance zero
                    assert steps[key] == 0
                    continue
                distance = (getattr(model, name) - start[name]).norm().item()
                assert abs(distance - steps[key]) <= 1e-3 * steps[key], key
            else:
                assert_tensor(name, getattr(model, name), steps[key])
            seen += 1
        assert seen
    for key, expected in steps.items():
        if m := re.fullmatch(r"final_(\w+)_layer(\d+)", key):
            assert_tensor(m[1], getattr(model, m[1])[int(m[2])], expected)
    average.apply()
    for key, expected in steps.items():
        if key.startswith("ema_"):
            assert_tensor(key.removeprefix("ema_"), getattr(model, key.removeprefix("ema_")), expected)


# Schedules and average

def test_schedules_equal_the_reference(load_vectors):
    vectors, cfg = load_vectors("schedules"), gpt.Config()
    for fraction, factor, looping in zip(vectors["wallclock_fraction"], vectors["lr_multiplier"], vectors["looping"]):
        assert abs(gpt.lr_factor(cfg, float(fraction)) - factor) <= 1e-12
        assert (fraction >= cfg.enable_looping_at) == looping
    for step, momentum in zip(vectors["step"], vectors["muon_momentum"]):
        assert abs(gpt.muon_momentum(cfg, int(step)) - momentum) <= 1e-12
    columns = str(vectors["global_sgd_lr_columns"]).split(",")
    for row in vectors["global_sgd_lr"]:
        entry = dict(zip(columns, row))
        lr = gpt.global_sgd_lr(cfg.global_ttt_lr, int(entry["num_chunks"]), int(entry["chunk_index"]))
        assert abs(lr - entry["lr"]) <= 1e-12


def test_learning_rate_never_falls_below_its_floor_and_is_one_without_warmdown():
    cfg = tiny_config(min_lr=0.2, warmdown_frac=0.5)
    factors = [gpt.lr_factor(cfg, x) for x in np.linspace(0, 1.2, 50)]
    assert factors[0] == 1.0 and min(factors) == factors[-1] == 0.2 and sorted(factors, reverse=True) == factors
    assert gpt.lr_factor(tiny_config(warmdown_frac=0.0), 1.0) == 1.0


def test_momentum_without_warmup_is_constant():
    cfg = tiny_config(muon_momentum_warmup_steps=0)
    assert gpt.muon_momentum(cfg, 0) == gpt.muon_momentum(cfg, 10 ** 6) == cfg.muon_momentum


def test_weight_average_is_the_plain_recursion_without_bias_correction():
    model = nn.Linear(3, 2)
    average, shadow = gpt.WeightAverage(model, 0.9), model.weight.detach().double().clone()
    for step in range(5):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        average.update()
        shadow = 0.9 * shadow + 0.1 * model.weight.detach().double()
    trained = model.weight.detach().clone()
    average.apply()
    torch.testing.assert_close(model.weight.detach().double(), shadow, rtol=0, atol=1e-6)
    assert not torch.allclose(model.weight, trained)
