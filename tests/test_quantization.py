"""Section 10: rounding with GPTQ, protected columns, low-rank corrections, calibration statistics."""
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt as gpt
import twins
from helpers import random_model, tiny_config, write_dataset

PROTECTED_GROUP = 64                # quantization.md §1; gptq.npz records only the starts


def as_tensor(x) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x))


def weighted_error(W: torch.Tensor, dequantized: torch.Tensor, H: torch.Tensor) -> float:
    """Σ over rows of E H Eᵀ, in fp64."""
    E = (W - dequantized).double()
    return float(((E @ H.double()) * E).sum())


def correlated_hessian(cols: int, seed: int, tokens: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, cols, generator=generator) @ torch.randn(cols, cols, generator=generator)
    return x.T @ x / tokens


def plain_rounding(W: torch.Tensor, scale: torch.Tensor, max_code: int) -> torch.Tensor:
    return (W / scale.float()[:, None]).round().clamp(-max_code, max_code).to(torch.int8)


# --- golden vectors -----------------------------------------------------------------------------------------

def test_gptq_matches_every_recorded_case(load_vectors):
    z = load_vectors("gptq")
    cases = sorted(name[:-2] for name in z if name.endswith("_W"))
    assert cases
    for case in cases:
        W, H = as_tensor(z[f"{case}_W"]).float(), as_tensor(z[f"{case}_H"])
        limit, sigmas = int(z[f"{case}_clip_range"]), float(z[f"{case}_clip_sigmas"])
        scale = gpt.row_scale(W, sigmas, limit)
        assert torch.equal(scale, as_tensor(z[f"{case}_scale"])), case
        starts = tuple(z[f"{case}_protect_starts"].tolist()) if f"{case}_protect_starts" in z else ()
        high = scale_high = None
        if starts:
            high = torch.zeros(W.shape[1], dtype=torch.bool)
            for start in starts:
                high[start:start + PROTECTED_GROUP] = True
            scale_high = gpt.row_scale(W, sigmas, 127)
            assert torch.equal(scale_high, as_tensor(z[f"{case}_scale_hi"])), case
        codes = gpt.gptq(W[None], H[None], scale[None], limit, high, scale_high[None] if starts else None, 127)[0]
        want = as_tensor(z[f"{case}_Q"])
        difference = (codes.int() - want.int()).abs()
        assert (difference == 0).double().mean() >= 0.999 and difference.max() <= 1, case

        recorded = gpt.dequantize(gpt.Quantized(want, scale, starts, PROTECTED_GROUP if starts else 0, scale_high))
        torch.testing.assert_close(recorded, as_tensor(z[f"{case}_dequant"]), rtol=0, atol=1e-6)
        ours = gpt.dequantize(gpt.Quantized(codes, scale, starts, PROTECTED_GROUP if starts else 0, scale_high))
        assert weighted_error(W, ours, H) == pytest.approx(float(z[f"{case}_weighted_error"]), rel=1e-3), case


def test_factor_packing_is_exact_from_given_factors(load_vectors):
    z = load_vectors("lqer")
    A, B = as_tensor(z["A"]), as_tensor(z["B"])
    group = B.numel() // len(z["sB"])
    packed = gpt.pack_factors(A, B, group)
    for name, value in packed._asdict().items():
        assert torch.equal(value, as_tensor(z[name])), name
    torch.testing.assert_close(gpt.correction(packed), as_tensor(z["delta"]), rtol=0, atol=1e-6)
    symmetric = gpt.pack_factors(A, B, group, asymmetric=False)
    for name, value in symmetric._asdict().items():
        assert torch.equal(value, as_tensor(z[f"sym_{name}"])), name


def test_factors_from_a_residual_match_up_to_the_sign_of_each_component(load_vectors):
    z = load_vectors("lqer")
    A_want, B_want = as_tensor(z["A"]), as_tensor(z["B"])
    A, B = gpt.top_components(as_tensor(z["E"]), A_want.shape[1])
    sign = torch.sign((B * B_want).sum(-1))
    torch.testing.assert_close(A * sign, A_want, rtol=0, atol=1e-4)
    torch.testing.assert_close(B * sign[:, None], B_want, rtol=0, atol=1e-4)
    packed = gpt.pack_factors(A * sign, B * sign[:, None], B.numel() // len(z["sB"]))
    assert torch.equal(packed.qA, as_tensor(z["qA"])) and torch.equal(packed.qB, as_tensor(z["qB"]))


def archive_matrices(z, cfg) -> dict[str, gpt.Matrix]:
    """The large tensors of quant_pipeline.npz with the bits and clip range of their class."""
    matrices = {}
    for name in (key[:-2] for key in z if key.endswith("_Q")):
        kind = name.split("_")[0]
        sigmas = {"emb": cfg.embed_clip_sigmas, "up": cfg.mlp_clip_sigmas, "down": cfg.mlp_clip_sigmas}.get(
            kind, cfg.attn_clip_sigmas)
        bits = int(re.search(r"int(\d)\)", str(z[f"{name}_method"]))[1])
        assert bits == (cfg.embed_bits if kind == "emb" else cfg.matrix_bits)
        matrices[name] = gpt.Matrix(*(as_tensor(z[f"{name}_{part}"]).float() for part in ("W", "H", "act_rms")), bits, sigmas)
    return matrices


def method_of(bits: int, q: gpt.Quantized) -> str:
    """How the reference names what was done to a matrix."""
    text = f"gptq (int{bits})" + ("+awqgrpint8" if q.protect_starts else "")
    return text if q.factors is None else text + ("+lqer_asym" if q.factors.sA.ndim == 0 else "+lqer")


def factors_with_signs_of(residual: torch.Tensor, want_qA: torch.Tensor, group: int) -> gpt.Factors:
    """Our factors of a residual, packed with the recorded sign of each component: the 2-bit code is not symmetric."""
    A, B = gpt.top_components(residual, want_qA.shape[1])
    sign = torch.where((A * want_qA.float()).sum(0) < 0, -1.0, 1.0)
    return gpt.pack_factors(A * sign, B * sign[:, None], group)


def test_whole_quantization_selects_and_restores_as_recorded(load_vectors):
    z = load_vectors("quant_pipeline")
    cfg = gpt.Config(lqer_rank=int(z["lqer_rank"]), lqer_asym_group=int(z["lqer_group"]), lqer_top_k=int(z["lqer_top_k"]),
                   awq_lite_group_size=int(z["protect_group"]))
    matrices = archive_matrices(z, cfg)
    done = gpt.quantize_matrices(cfg, gpt.Run(cfg), matrices)
    assert list(done) == list(matrices)
    for name, q in done.items():
        assert method_of(matrices[name].bits, q) == str(z[f"{name}_method"]), name
        assert torch.equal(q.scale, as_tensor(z[f"{name}_scale"])), name
        assert list(q.protect_starts) == (z[f"{name}_protect_starts"].tolist() if f"{name}_protect_starts" in z else []), name
        if q.protect_starts:
            assert torch.equal(q.scale_high, as_tensor(z[f"{name}_scale_hi"])), name
        difference = (q.codes.int() - as_tensor(z[f"{name}_Q"]).int()).abs()
        assert (difference == 0).double().mean() >= 0.999 and difference.max() <= 1, name
        residual = matrices[name].W - gpt.dequantize(q._replace(codes=as_tensor(z[f"{name}_Q"]), factors=None))
        if f"{name}_lqer_qA" in z:
            q = q._replace(factors=factors_with_signs_of(residual, as_tensor(z[f"{name}_lqer_qA"]), cfg.lqer_asym_group))
            same = [(a.int() - as_tensor(z[f"{name}_lqer_{part}"]).int()).abs() for part, a in
                    (("qA", q.factors.qA), ("qB", q.factors.qB))]
            assert all((d == 0).double().mean() >= 0.99 and d.max() <= 1 for d in same), name
            for part in ("sA", "sB"):
                torch.testing.assert_close(getattr(q.factors, part), as_tensor(z[f"{name}_lqer_{part}"]), rtol=2e-3, atol=0)
            # From here on the recorded codes and factors: dequantization itself must be exact.
            q = q._replace(factors=gpt.Factors(*(as_tensor(z[f"{name}_lqer_{part}"]) for part in gpt.Factors._fields)))
        elif q.factors is not None:                               # symmetric: not recorded, and blind to signs
            A, B = gpt.top_components(residual, cfg.lqer_rank)
            q = q._replace(factors=gpt.pack_factors(A, B, cfg.lqer_asym_group))
        W = gpt.dequantize(q._replace(codes=as_tensor(z[f"{name}_Q"])))
        head, sums = as_tensor(z[f"{name}_dequant_head16"]), as_tensor(z[f"{name}_dequant_row_checksum"])
        if torch.equal(head, head.bfloat16().float()):            # the reference's embedding is bf16, ours fp32
            W = W.bfloat16().float()
        torch.testing.assert_close(W[:len(head)], head, rtol=0, atol=1e-5)
        torch.testing.assert_close(W.double().sum(-1), sums.double(), rtol=0, atol=1e-5 * W.shape[1])
        assert float((matrices[name].W - W).double().norm()) == pytest.approx(float(z[f"{name}_err_fro"]), rel=1e-4), name


def test_pass_through_tensors_survive_as_fp16(load_vectors):
    z = load_vectors("quant_pipeline")
    names = [key.removesuffix("_roundtrip") for key in z if key.endswith("_roundtrip")]
    assert names
    for name in names:
        stored = gpt.decode_fp16(gpt.encode_words(gpt._fp16_words([as_tensor(z[f"{name}_W"])])))
        assert torch.equal(stored.float(), as_tensor(z[f"{name}_roundtrip"]).flatten()), name


# --- properties ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
def test_identity_hessian_reproduces_rounding(seed):
    W = torch.randn(2, 24, 150, generator=torch.Generator().manual_seed(seed))
    scale = torch.stack([gpt.row_scale(m, 10.0, 31) for m in W])
    codes = gpt.gptq(W, torch.eye(150).expand(2, -1, -1), scale, 31)
    for m, s, c in zip(W, scale, codes):
        assert torch.equal(c, plain_rounding(m, s, 31))


@pytest.mark.parametrize("seed", range(4))
def test_correlated_hessian_beats_rounding(seed):
    W = torch.randn(20, 140, generator=torch.Generator().manual_seed(100 + seed))
    H = correlated_hessian(140, seed)
    scale = gpt.row_scale(W, 10.0, 15)
    codes = gpt.gptq(W[None], H[None], scale[None], 15)[0]
    error, rounding = (weighted_error(W, gpt.dequantize(gpt.Quantized(c, scale)), H)
                       for c in (codes, plain_rounding(W, scale, 15)))
    assert error < 0.7 * rounding


def test_matrices_quantized_together_equal_matrices_quantized_alone():
    W = torch.randn(3, 16, 70, generator=torch.Generator().manual_seed(7))
    H = torch.stack([correlated_hessian(70, seed) for seed in range(3)])
    scale = torch.stack([gpt.row_scale(m, 11.0, 31) for m in W])
    together = gpt.gptq(W, H, scale, 31)
    for k in range(3):
        assert torch.equal(together[k], gpt.gptq(W[k:k + 1], H[k:k + 1], scale[k:k + 1], 31)[0])


def test_dead_inputs_get_code_zero_and_weights_are_left_unchanged():
    W = torch.randn(8, 40, generator=torch.Generator().manual_seed(3))
    H = correlated_hessian(40, 3)
    dead = torch.tensor([0, 17, 39])
    H[dead], H[:, dead] = 0.0, 0.0
    before = W.clone()
    codes = gpt.gptq(W[None], H[None], gpt.row_scale(W, 11.0, 31)[None], 31)[0]
    assert not codes[:, dead].any() and codes.any()
    assert torch.equal(W, before)


def test_codes_stay_within_their_limits():
    W = torch.randn(16, 64, generator=torch.Generator().manual_seed(4))
    high = torch.arange(64) < 32
    codes = gpt.gptq(W[None], correlated_hessian(64, 4)[None], gpt.row_scale(W, 1.0, 7)[None], 7, high,
                   gpt.row_scale(W, 1.0, 127)[None], 127)[0]
    assert codes[:, ~high].abs().max() == 7 and 7 < codes[:, high].abs().max() <= 127


@twins.fast_trellis
@pytest.mark.parametrize("rdo_lambda", (0.0, 1.0))
def test_constant_and_zero_rows_do_not_produce_nan(rdo_lambda):
    W = torch.zeros(3, 32)
    W[1] = 0.5
    cfg = tiny_config(awq_lite_enabled=False, lqer_enabled=False, rdo_lambda=rdo_lambda)
    q = gpt.quantize_matrices(cfg, gpt.Run(cfg), {"m": gpt.Matrix(W, torch.eye(32), torch.ones(32), 6, 11.5)})["m"]
    assert gpt.dequantize(q).isfinite().all()
    assert float(gpt.dequantize(q)[0].abs().max()) < 1e-6


@twins.fast_trellis
def test_a_constant_row_does_not_spoil_the_trellis_of_the_others():
    W = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    W[0] = 0.5
    scale = gpt.row_scale(W, 12.0, 62)[None]
    codes = gpt.gptq(W[None], torch.eye(64)[None], scale, 62, trellis=True)[0, 1:]
    step = 2 * scale[0, 1:, None].float()
    assert float(((W[1:] - codes * step / 2) / step).square().mean()) * 12 < 0.82


@twins.fast_trellis
@pytest.mark.parametrize("bits", (6, 8))
@pytest.mark.parametrize("protect", (False, True))
def test_trellis_steps_reach_the_largest_weight_however_fine(bits, protect):
    generator = torch.Generator().manual_seed(0)
    W, act_rms = torch.randn(256, 64, generator=generator), torch.ones(64)
    act_rms[16:32] = 3.0
    cfg = tiny_config(awq_lite_enabled=protect, awq_lite_group_size=16, lqer_enabled=False, rdo_lambda=1.0)
    for clip_sigmas in (13.0, 3.9, 0.5):
        matrix = gpt.Matrix(W, torch.eye(64) * act_rms ** 2, act_rms, bits, clip_sigmas)
        q = gpt.quantize_matrices(cfg, gpt.Run(cfg), {"m": matrix})["m"]
        assert q.protect_starts == ((16,) if protect and bits < 8 else ())
        step = clip_sigmas / gpt.code_limit(bits)
        # Where the step would be finer than int8 can reach, it is the largest weight over 127.
        finest = float(W.abs().amax(1).mean()) / 127
        assert float((W - gpt.dequantize(q)).square().mean()) < max(step / 2, finest) ** 2 / 3


def test_disagreeing_shapes_and_unusable_hessians_are_refused():
    W = torch.randn(1, 4, 8)
    with pytest.raises(ValueError, match=r"expected H \(1, 8, 8\).*found \(1, 9, 9\)"):
        gpt.gptq(W, torch.eye(9)[None], torch.ones(1, 4), 31)
    with pytest.raises(ValueError, match="not positive definite"):
        gpt.gptq(W, -torch.eye(8)[None] - 0.5, torch.ones(1, 4), 31)
    with pytest.raises(ValueError, match="not positive definite"):
        gpt.gptq(W, torch.full((1, 8, 8), float("nan")), torch.ones(1, 4), 31)


def test_protection_takes_the_most_salient_whole_groups_and_the_earlier_on_ties():
    W, H = torch.ones(4, 20), torch.eye(20)
    matrices = {"a": gpt.Matrix(W, H, torch.ones(20), 6, 13.0), "b": gpt.Matrix(W, H, torch.ones(20), 6, 13.0),
                "eight": gpt.Matrix(100 * W, H, torch.ones(20), 8, 13.0)}
    assert gpt.select_protected(matrices, 8, 1, 8) == {"a": [0]}
    assert gpt.select_protected(matrices, 8, 3, 8) == {"a": [0, 8], "b": [0]}
    salient = torch.ones(20)
    salient[16:] = 1000.0                                          # an incomplete group does not compete
    salient[8:16] = 2.0
    assert gpt.select_protected({**matrices, "b": matrices["b"]._replace(act_rms=salient)}, 8, 1, 8) == {"b": [8]}
    assert gpt.select_protected(matrices, 8, 0, 8) == {}


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (5, 64)])
def test_top_components_are_the_best_low_rank_approximation(shape):
    E = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    A, B = gpt.top_components(E, 2)
    U, S, Vt = torch.linalg.svd(E, full_matrices=False)
    torch.testing.assert_close(A @ B, U[:, :2] * S[:2] @ Vt[:2], rtol=0, atol=1e-4)
    torch.testing.assert_close(B @ B.T, torch.eye(2), rtol=0, atol=1e-5)


def test_packing_falls_back_to_symmetric_when_groups_do_not_fit():
    A, B = torch.randn(10, 2), torch.randn(2, 33)
    packed = gpt.pack_factors(A, B, 32)
    assert packed.sA.shape == (10,) and packed.sB.shape == (2,)
    assert packed.qA.abs().max() <= 7 and packed.qB.abs().max() <= 7
    assert torch.nn.functional.cosine_similarity(gpt.correction(packed).flatten(), (A @ B).flatten(), dim=0) > 0.97


def test_balanced_steps_cost_the_same_loss_at_the_same_total_of_bits():
    generator = torch.Generator().manual_seed(0)
    matrices = {f"m{k}": gpt.Matrix(torch.randn(16 * (1 + k), 32, generator=generator), torch.eye(32), torch.ones(32), 6,
                                    12.0, grad_sq=1e-6 * 2.0 ** -k) for k in range(3)}
    balanced = gpt.balance_steps(matrices, 1.0)

    def log_step(m):
        return 0.5 * np.log(float(gpt.row_scale(m.W, m.clip_sigmas, 31).double().square().mean()))

    costs = [np.log(m.grad_sq) + 2 * log_step(m) for m in balanced.values()]
    assert np.ptp(costs) < 1e-3
    assert all(m.clip_sigmas == 12 for m in gpt.balance_steps(matrices, 0.0).values())
    changes = {name: log_step(balanced[name]) - log_step(m) for name, m in matrices.items()}
    assert sum(changes[name] * m.W.numel() for name, m in matrices.items()) == pytest.approx(0, abs=0.5)
    assert abs(changes["m0"]) > 0.1
    with_dead = gpt.balance_steps(matrices | {"dead": matrices["m0"]._replace(grad_sq=0.0)}, 1.0)
    assert with_dead["dead"].clip_sigmas == 12
    assert all(with_dead[name].clip_sigmas == pytest.approx(m.clip_sigmas) for name, m in balanced.items())
    with pytest.raises(ValueError, match="not finite"):
        gpt.balance_steps({"m": matrices["m0"]._replace(grad_sq=float("nan"))}, 1.0)
    extreme = {"a": matrices["m0"]._replace(grad_sq=1e3), "b": matrices["m1"]}
    assert [round(m.clip_sigmas / 12, 6) for m in gpt.balance_steps(extreme, 1.0).values()] == list(gpt.STEP_FACTORS)


def test_corrections_go_to_the_largest_residuals():
    generator = torch.Generator().manual_seed(6)
    matrices = {f"m{k}": gpt.Matrix(size * torch.randn(16, 64, generator=generator), correlated_hessian(64, k),
                                  torch.ones(64), 6, 11.5) for k, size in enumerate((1.0, 5.0, 0.1, 3.0))}
    done = gpt.quantize_matrices(tiny_config(lqer_top_k=2, awq_lite_enabled=False), gpt.Run(tiny_config()), matrices)
    assert [name for name, q in done.items() if q.factors is not None] == ["m1", "m3"]
    off = gpt.quantize_matrices(tiny_config(lqer_enabled=False, awq_lite_enabled=False), gpt.Run(tiny_config()), matrices)
    assert all(q.factors is None and not q.protect_starts for q in off.values())
    assert all(torch.equal(off[name].codes, done[name].codes) for name in matrices)


# --- trellis rounding -----------------------------------------------------------------------------------------

def on_trellis(codes: np.ndarray) -> np.ndarray:
    """Which lines of codes (lines, n) every state of the machine allows, bool (lines,)."""
    state, valid = np.zeros(len(codes), int), np.ones(len(codes), bool)
    for code in codes.T.astype(int):
        valid &= code & 1 == state & 1
        state = state >> 1 ^ 33 * (state & 1) ^ 10 * (code >> 1 & 1)
    return valid


def test_trellis_rounding_finds_the_best_of_all_valid_codes():
    x, limit = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)) * 2, torch.tensor([2.0, 3, 4, 5, 5])
    found = gpt.plain_trellis_round(x, limit)
    for line in range(5):
        span = np.arange(-int(limit[line]), int(limit[line]) + 1)
        every = np.stack(np.meshgrid(*[span] * 6), -1).reshape(-1, 6)
        best = ((every[on_trellis(every)] - x[line].numpy()) ** 2).sum(-1).min()
        assert float((found[line] - x[line]).square().sum()) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize(("lines", "n"), [(1, 9), (7, 256)])
def test_trellis_rounding_in_numpy_is_that_of_the_definition_to_the_last_bit(lines, n):
    x = torch.randn(lines, n, generator=torch.Generator().manual_seed(3)) * 6
    x[0, ::2] = 1.5                                                        # as near to one code as to the next
    limit = torch.arange(lines) * 9.0 + 2
    assert torch.equal(twins.numpy_trellis_round(x, limit), gpt.plain_trellis_round(x, limit))


def test_trellis_rounding_has_three_quarters_of_the_error_of_plain_rounding():
    x = torch.randn(100, 256, generator=torch.Generator().manual_seed(2)) * 5
    codes = gpt.plain_trellis_round(x, torch.full((100,), 62.0))
    assert float((x - codes).square().mean()) / 4 < 0.78 / 12              # in whole steps


@twins.fast_trellis
@pytest.mark.parametrize("rows", (5, 256, 300))
def test_trellis_codes_are_valid_within_limits_and_lower_the_weighted_error(rows):
    H, W = correlated_hessian(48, rows), torch.randn(2, rows, 48, generator=torch.Generator().manual_seed(rows))
    plain, half = (torch.stack([gpt.row_scale(w, 12.0, limit) for w in W]) for limit in (31, 62))
    codes = gpt.gptq(W, torch.stack([H, H]), half, 62, trellis=True)
    for matrix in codes.numpy():
        for start in range(0, rows, gpt.TRELLIS_ROWS):
            assert on_trellis(matrix[start:start + gpt.TRELLIS_ROWS].T).all()
    if rows > 5:
        rounded = gpt.gptq(W, torch.stack([H, H]), plain, 31)
        errors = [weighted_error(W[0], c[0] * s[0, :, None].float(), H) for c, s in ((rounded, plain), (codes, half))]
        assert errors[1] < 0.85 * errors[0]
    tight = gpt.gptq(W, torch.stack([H, H]), half / 20, 7, trellis=True)
    assert tight.abs().max() == 7


@pytest.mark.gpu
@pytest.mark.parametrize("trellis", (False, True))
def test_gptq_on_a_gpu_gives_the_codes_of_the_cpu(trellis):
    parts = 2 if trellis else 1
    H = torch.stack([correlated_hessian(192, seed, 1024) for seed in (1, 2)])
    W = torch.randn(2, 300, 192, generator=torch.Generator().manual_seed(3))
    scale = torch.stack([gpt.row_scale(w, 12.0, 31 * parts) for w in W])
    want = gpt.gptq(W, H, scale, 31 * parts, trellis=trellis)
    got = gpt.gptq(W.cuda(), H.cuda(), scale.cuda(), 31 * parts, trellis=trellis).cpu()
    errors = [weighted_error(W[0], c[0] * scale[0, :, None].float(), H[0]) for c in (want, got)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    if not trellis:
        assert float((got == want).float().mean()) >= 0.98


@pytest.mark.gpu
def test_trellis_kernel_gives_the_codes_of_its_definition():
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(4)) * 6
    limit = torch.tensor([5.0, 62.0] * 25)
    want, got = gpt.plain_trellis_round(x, limit), gpt.trellis_round(x.cuda(), limit.cuda()).cpu()
    assert float((got == want).float().mean()) >= 0.999
    assert float((got - x).square().mean()) == pytest.approx(float((want - x).square().mean()), rel=1e-5)


# --- calibration --------------------------------------------------------------------------------------------

def as_rank(cfg, rank: int, world_size: int):
    """A rank whose collectives do nothing: only its own share of the work is seen."""
    return SimpleNamespace(cfg=cfg, rank=rank, world_size=world_size, device=torch.device("cpu"), sum=lambda x: x,
                           beat=lambda: None)


def test_calibration_counts_every_execution_of_a_looped_layer(tmp_path):
    cfg = tiny_config()
    write_dataset(tmp_path)
    model = random_model(cfg).requires_grad_(False)
    paths = sorted(tmp_path.glob("fineweb_train_*.bin"))
    stats = gpt.collect_hessians(cfg, gpt.Run(cfg), model, paths, 2)
    tokens = 2 * cfg.row_tokens
    executions = [layer for part in gpt.execution_order(cfg, True) for layer in part]
    for layer in range(cfg.num_layers):
        for kind, width in (("qkv", cfg.model_dim), ("o", cfg.model_dim), ("up", cfg.model_dim), ("down", cfg.mlp_dim)):
            assert stats.counts[f"{kind}.{layer}"] == tokens * executions.count(layer)
            assert stats.sums[f"{kind}.{layer}"].shape == (width, width)
    assert stats.counts["head"] == tokens
    # The head reads normed states: the mean square of its inputs is one.
    assert float(stats.sums["head"].diagonal().sum()) / tokens / cfg.model_dim == pytest.approx(1.0, abs=1e-3)


def test_squared_gradients_are_those_of_the_training_loss():
    cfg = tiny_config()
    model = random_model(cfg)
    tokens = torch.randint(2, cfg.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    found = gpt.squared_gradients(model, tokens)
    hidden = model(tokens[:, :-1], looping=True)
    logits = gpt.softcap_logits(hidden @ model.tok_emb.T, model.softcap_pos, model.softcap_neg)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    torch.testing.assert_close(found["tok_emb"][0], model.tok_emb.grad.square().mean())
    for layer in range(cfg.num_layers):
        torch.testing.assert_close(found["w_up"][layer], model.w_up.grad[layer].square().mean())
    assert found.keys() == set(gpt.TENSOR_GROUPS)


def test_ranks_share_calibration_batches_without_changing_the_sum(tmp_path):
    cfg = tiny_config()
    write_dataset(tmp_path)
    model, paths = random_model(cfg), sorted(tmp_path.glob("fineweb_train_*.bin"))
    whole = gpt.collect_hessians(cfg, gpt.Run(cfg), model, paths, 5)
    parts = [gpt.collect_hessians(cfg, as_rank(cfg, rank, 2), model, paths, 5) for rank in range(2)]
    assert parts[0].counts["head"] == 3 * cfg.row_tokens and parts[1].counts["head"] == 2 * cfg.row_tokens
    for key, total in whole.sums.items():
        torch.testing.assert_close(parts[0].sums[key] + parts[1].sums[key], total, rtol=1e-5, atol=1e-3)
        assert parts[0].counts[key] + parts[1].counts[key] == whole.counts[key]


def test_every_parameter_is_either_quantized_or_passed_through(tmp_path):
    cfg = tiny_config()
    write_dataset(tmp_path)
    model = random_model(cfg).requires_grad_(False)
    run = gpt.Run(cfg)
    stats = gpt.collect_hessians(cfg, run, model, sorted(tmp_path.glob("fineweb_train_*.bin")), 2)
    quantized, passed = gpt.quantize(cfg, run, model, stats)
    assert {name.split(".")[0] for name in quantized} | passed.keys() == {name for name, _ in model.named_parameters()}
    assert not {name.split(".")[0] for name in quantized} & passed.keys()
    assert len(quantized) == 1 + 6 * cfg.num_layers
    assert all(t.dtype == torch.float16 for t in passed.values())
    for name, q in quantized.items():
        group, _, layer = name.partition(".")
        W = getattr(model, group)[int(layer)] if layer else getattr(model, group)
        limit = gpt.code_limit(getattr(cfg, gpt.TENSOR_GROUPS[group].bits))
        assert float((gpt.dequantize(q) - W).norm() / W.norm()) < 10 / limit, name


def test_a_value_too_large_for_fp16_is_refused_by_name_and_value():
    model = random_model(tiny_config()).requires_grad_(False)
    model.mlp_scale[1, 3] = 65_519.0                               # rounds to the largest fp16, 65,504
    assert float(gpt.pass_through(model)["mlp_scale"][1, 3]) == 65_504
    model.mlp_scale[2, 5] = -65_520.0
    with pytest.raises(gpt.ArtifactError, match="mlp_scale .*found -65520.*SCALAR_LR"):
        gpt.pass_through(model)
    model.mlp_scale[2, 5] = float("nan")
    with pytest.raises(gpt.ArtifactError, match="mlp_scale .*found nan"):
        gpt.pass_through(model)


def test_every_group_has_a_turn_of_its_own_and_its_parts_join_again():
    turns = [spec.coding_turn for spec in gpt.TENSOR_GROUPS.values()]
    assert sorted(turns) == list(range(len(turns)))
    for group in gpt.TENSOR_GROUPS:
        codes = np.random.default_rng(0).integers(-31, 32, (5, 600, 3)).astype(np.int8)
        parts = gpt.split_codes(group, codes)
        assert len(parts) == len(gpt.group_streams(group)) and all(part.size for part in parts)
        assert np.array_equal(gpt.join_codes(group, [torch.from_numpy(part) for part in parts]), codes)


# --- order of hidden units ----------------------------------------------------------------------------------

def test_sorting_hidden_units_orders_their_deviations_and_keeps_the_function():
    cfg = tiny_config()
    model = random_model(cfg)
    tokens = torch.randint(2, cfg.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens, looping=True)
        up, down = model.w_up.clone(), model.w_down.clone()
        gpt.sort_hidden_units(model)
        after = model(tokens, looping=True)
    assert not torch.equal(model.w_up, up)
    assert (model.w_up.std(-1).diff(dim=-1) >= 0).all()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    for layer in range(cfg.num_layers):                    # the same units, each with its row and its column
        pairs = [{(float(u.sum()), float(d.sum())) for u, d in zip(W_up[layer], W_down[layer].T)}
                 for W_up, W_down in ((up, down), (model.w_up.detach(), model.w_down.detach()))]
        assert pairs[0] == pairs[1]


def test_hidden_units_that_cannot_be_sorted_are_refused():
    cfg = tiny_config()
    model = random_model(cfg).requires_grad_(False)
    model.w_down[3, 2, 1] = float("inf")
    before = model.w_up.clone()
    with pytest.raises(ValueError, match="finite weights, found others in w_down"):
        gpt.sort_hidden_units(model)
    assert torch.equal(model.w_up, before)
    model = random_model(cfg)
    model.unit_bias = torch.nn.Parameter(torch.zeros(cfg.num_layers, cfg.mlp_dim))
    with pytest.raises(ValueError, match=r"found \['unit_bias'\] with an axis of 64 too"):
        gpt.sort_hidden_units(model)
    model = random_model(cfg)
    model.w_down = torch.nn.Parameter(torch.zeros(cfg.num_layers, cfg.model_dim, cfg.mlp_dim - 1))
    with pytest.raises(ValueError, match=r"expected w_down \(5, 32, 64\), found \(5, 32, 63\)"):
        gpt.sort_hidden_units(model)
