"""Section 16: every kernel computes what the plain function that it replaces defines, values and gradients.

Without a GPU Triton's interpreter runs the kernels (conftest.py switches it on), in fp32 and on tiny shapes.
"""
import contextlib
import dataclasses
import importlib.util
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import pack
import train_gpt as gpt
from helpers import freeze_caps, random_model, tiny_config

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MATH = gpt.autograd_attention(gpt.attend_math)
ATTENTION = {False: MATH, True: MATH._replace(repeats_kv=True)}


@gpt.jit
def _count_kernel(out_ptr, N):
    for row in range(gpt.tl.program_id(0), N, gpt.tl.num_programs(0)):
        gpt.tl.store(out_ptr + row, row)


@pytest.fixture(scope="module", autouse=True)
def _something_runs_kernels():
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET=0 keeps the interpreter off")
    out = torch.zeros(3, device=DEVICE)
    try:
        _count_kernel[(2,)](out, 3)
    except Exception as error:                             # those of Triton 3.5 and 3.6 fail with numpy 2.4
        if DEVICE == "cuda":
            raise
        pytest.skip(f"Triton {gpt.triton.__version__} cannot interpret a loop here: {error}")
    assert out.tolist() == [0, 1, 2]


def small_config(**changes):
    """Two layers, a serial one that loops and one with two lanes."""
    sizes = dict(vocab_size=24, model_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, loop_start=0, loop_end=0,
                 parallel_start_layer=1, gate_window=6)
    return tiny_config(**{**sizes, **changes})


def small_model(**changes):
    return random_model(small_config(**changes)).to(DEVICE)


def randn(*shape):
    return torch.randn(*shape).to(DEVICE)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_same(found, expected, tolerance=1e-4):
    """Equal but for fp32 rounding; a sum over tokens may cancel, so a small absolute error is allowed too."""
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].shape == expected[name].shape, name
        error = (found[name] - expected[name]).norm().item()
        assert error <= tolerance * expected[name].norm().item() + 2e-5, f"{name}: {error:.2e}"


@contextlib.contextmanager
def few_programs():
    """Kernels that walk over rows do so in several turns, as on long rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt, "walking_grid", lambda tile, N, heads=1, programs=2: (2, heads))
        patch.setattr(gpt, "PROGRAMS", 2)
        patch.setitem(gpt.HEAD_TILE, "ROWS", 4)
        patch.setitem(gpt.HEAD_BACKWARD_TILE, "ROWS", 4)
        patch.setitem(gpt.OWN_TILE, "ROWS", 4)
        patch.setitem(gpt.OWN_BACKWARD_TILE, "ROWS", 4)
        patch.setitem(gpt.FLAT_TILE, "BLOCK", 64)
        yield


# --- one kernel at a time -----------------------------------------------------------------------------------

@pytest.mark.parametrize("residual", [None, "mixed", "lane"])
@pytest.mark.parametrize(("skip_kind", "adds"), [(None, True), ("other", False), ("x", True)])
def test_mix_and_norm(residual, skip_kind, adds):
    model, N, layer_index, row = small_model(model_dim=24), 7, 1, 1
    D, W = model.cfg.model_dim, model.cfg.gate_window
    w = gpt.kernel_weights(model)
    buffers, grads = gpt.kernel_gradients(model)
    x, x0, saved, dn, dout, extra, dx0_before = (randn(N, D) for _ in range(7))
    dgate, scale = randn(N, model.cfg.num_heads), randn(1)
    leaves = [t.requires_grad_() for t in (x, x0, saved)]
    weights = model.layer_weights(dict(model.named_parameters()))[layer_index]
    skip = {None: None, "other": saved, "x": x}[skip_kind]
    plain_skip = None if skip is None else (skip, model.skip_weights[row], model.skip_gates[row])

    blended = gpt.blend_skip(x, plain_skip)
    z, n = gpt.mix_and_norm(x, x0, plain_skip, weights.resid_mix, weights.ln_scale)
    loss = (n * dn).sum() + ((n[:, :W] @ weights.attn_gate.detach().T) * dgate).sum()
    if residual == "mixed":
        loss = loss + (z * dout).sum()
    if residual == "lane":
        loss = loss + scale.item() * (blended * dout).sum()
    names = ["x", "x0", "saved", "resid_mix", "skip_weights", "skip_gates"]
    sources = [*leaves, model.resid_mix, model.skip_weights, model.skip_gates]
    expected = dict(zip(names, torch.autograd.grad(loss, sources, allow_unused=True)))
    if adds:
        expected["x"] = expected["x"] + extra
        expected["x0"] = expected["x0"] + dx0_before

    with torch.no_grad(), few_programs():
        for keep, value in (("none", x), ("mix", z), ("blend", blended)):
            if keep != "blend" or skip is not None:
                kept, state = gpt.mix_and_norm_forward(w, w.layers[layer_index], x, x0, skip, row, keep)
                assert_same({keep: kept, "n": state.n}, {keep: value, "n": n})
        dx0 = dx0_before.clone()
        dout_of = None if residual is None else gpt.Residual(dout, residual, scale if residual == "lane" else None)
        sums = gpt.MixSums(grads.layers[layer_index], grads, dx0, adds)
        dx, dskip = gpt.mix_and_norm_backward(w, w.layers[layer_index], state, dn, dout_of, sums,
                                              extra if adds else None, dgate)
        without = gpt.mix_and_norm_backward(w, w.layers[layer_index], state, dn, dout_of, None,
                                            extra if adds else None, dgate)
    assert_same({"x": without[0], "saved": without[1]} if dskip is not None else {"x": without[0]},
                {"x": dx, "saved": dskip} if dskip is not None else {"x": dx})
    assert (dskip is None) == (skip_kind != "other")
    found = {"x": dx, "x0": dx0, "saved": dskip} | {name: buffers[name] for name in names[3:]}
    for name in [name for name in names if expected[name] is None]:      # not read: nothing, or an untouched zero
        assert found[name] is None or not found[name].any()
        del found[name], expected[name]
    assert_same(found, expected)


@pytest.mark.parametrize("residual", ["mixed", "lane"])
def test_norm_before_the_mlp(residual):
    model, N = small_model(), 5
    w = gpt.kernel_weights(model)
    x, dn, dout, extra = (randn(N, model.cfg.model_dim) for _ in range(4))
    scale = randn(1) if residual == "lane" else None
    x.requires_grad_()
    n = model.ln_scale[1] * gpt.rms_norm(x)
    loss = (n * dn).sum() + ((1 if scale is None else scale.item()) * x * dout).sum() + (x * extra).sum()
    expected, = torch.autograd.grad(loss, x)
    with torch.no_grad():
        kept, state = gpt.mix_and_norm_forward(w, w.layers[1], x)
        residual = gpt.Residual(dout, residual, scale)
        dx, dskip = gpt.mix_and_norm_backward(w, w.layers[1], state, dn, residual, extra=extra)
    assert kept is x and dskip is None
    assert_same({"n": state.n, "x": dx}, {"n": n, "x": expected})


@pytest.mark.parametrize(("heads", "kv_heads", "rope_dims", "repeats_kv"), [
    (2, 1, 6, False), (2, 1, 8, True), (2, 2, 4, False), (4, 2, 2, True)])
def test_attention_with_prepare_qk_and_remove_own_value(heads, kv_heads, rope_dims, repeats_kv):
    cfg, N = small_config(model_dim=32, num_heads=heads, num_kv_heads=kv_heads, rope_dims=rope_dims,
                          sparse_attn_gate_scale=1.5), 9
    model = random_model(cfg).to(DEVICE)
    H, G, K = heads, kv_heads, cfg.head_dim
    cu_seqlens, longest = int32(0, 1, 1, 6, N, N), 6
    w = gpt.kernel_weights(model)
    buffers, grads = gpt.kernel_gradients(model)
    grads.layers[1].qkv.zero_()
    weights = model.layer_weights(dict(model.named_parameters()))[1]
    n, dgated = randn(N, cfg.model_dim).requires_grad_(), randn(N, cfg.model_dim)
    cos, sin = (table[:N] for table in model.rope.unbind())

    wqkv = [model.wq, model.wk, model.wv]
    q, k, v = (F.linear(n, p[1])[None].unflatten(-1, (-1, K)) for p in wqkv)
    q, k = gpt.prepare_qk(q, k, weights.q_gain, cos, sin)
    y = gpt.attend_math(q[0], k[0], v[0], cu_seqlens, longest)
    gate = weights.attn_gate, cfg.sparse_attn_gate_scale
    gated = gpt.remove_own_value(y[None], v, n[None], weights.xsa_alpha, *gate)[0]
    names = ["n", "wq", "wk", "wv", "q_gain", "xsa_alpha", "attn_gate"]
    sources = [n, *wqkv, model.q_gain, model.xsa_alpha, model.attn_gate]
    expected = dict(zip(names, torch.autograd.grad((gated * dgated).sum(), sources)))

    at = gpt.Layout(N, cu_seqlens, longest, model.rope, cfg.sparse_attn_gate_scale, ATTENTION[repeats_kv],
                     gpt.PLAIN_PRODUCTS)
    with torch.no_grad(), few_programs():
        state = gpt.attention_forward(w.layers[1], n, at, None)
        dn, dgate = gpt.attention_backward(w.layers[1], state, dgated, at, grads.layers[1], True, None, None, None)
    copies = H // G if repeats_kv else 1
    values = {"q": q[0], "k": k[0].repeat_interleave(copies, 1), "v": v[0].repeat_interleave(copies, 1), "gated": gated}
    assert_same({name: getattr(state, name) for name in values}, values)
    dn[:, :cfg.gate_window] += dgate @ weights.attn_gate
    found = {"n": dn} | {name: buffers[name] for name in names[4:]}
    found |= dict(zip(names[1:4], buffers["qkv"].split([p.shape[1] for p in wqkv], 1)))
    for name in names[1:4]:                                # only layer 1 has been written
        found[name], expected[name] = found[name][1], expected[name][1]
    assert_same(found, expected)


def test_a_value_of_zero_has_a_finite_gradient():
    model, N = small_model(), 2
    layer = gpt.kernel_weights(model).layers[1]
    layer.qkv[-model.cfg.kv_dim:] = 0
    at = gpt.Layout(N, int32(0, N), N, model.rope, 1.0, MATH, gpt.PLAIN_PRODUCTS)
    n, dgated = (randn(N, model.cfg.model_dim) for _ in range(2))
    with torch.no_grad():
        state = gpt.attention_forward(layer, n, at, None)
        dn, _ = gpt.attention_backward(layer, state, dgated, at, None, True, None, None, None)
    assert dn.isfinite().all()


def test_a_cast_is_renewed_in_its_own_memory():
    model = small_model()
    cast = gpt.kernel_weights(model)
    tensors = [*cast[:-1], *(t for layer in cast.layers for t in layer)]
    addresses = [t.data_ptr() for t in tensors]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    assert gpt.kernel_weights(model, cast) is cast         # with gradients on, as where the base has been adapted
    fresh = gpt.kernel_weights(model)
    for t, new, address in zip(tensors, [*fresh[:-1], *(t for layer in fresh.layers for t in layer)], addresses):
        assert t.data_ptr() == address and torch.equal(t, new)


def test_leaky_square():
    n, w_up, w_down, dout = randn(7, 6).requires_grad_(), randn(20, 6), randn(6, 20), randn(7, 6)
    up = (n @ w_up.T).detach().requires_grad_()
    act = gpt.leaky_square(up)
    expected, = torch.autograd.grad(act @ w_down.T, up, dout)
    with torch.no_grad(), few_programs():
        found_act = gpt.up_product(n, w_up)
        dup = gpt.down_product_backward(dout, w_down, found_act)
    assert_same({"act": found_act, "dup": dup}, {"act": act, "dup": expected})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_activation_keeps_the_sign_in_its_last_bit_and_is_rounded_without_bias(dtype):
    spacing = 2.0 ** (-22 if dtype == torch.float32 else -6)      # of values with a given last bit, just above 1
    sign_bit, N = gpt.sign_bit(dtype), 4096
    up = torch.cat([randn(N - 3), torch.tensor([0.0, 1e4, -1e4]).to(DEVICE)])
    exact_up = up.double().requires_grad_()
    exact = gpt.leaky_square(exact_up)
    slope, = torch.autograd.grad(exact.sum(), exact_up)
    act, dup = torch.empty(N, dtype=dtype, device=DEVICE), torch.empty(N).to(DEVICE)
    block = dict(SLOPE=gpt.LEAKY_SLOPE, SIGN_BIT=sign_bit, BLOCK=1024)
    gpt._leaky_square_forward_kernel[(4,)](up, act, N, **block)
    gpt._leaky_square_backward_kernel[(4,)](act, torch.ones_like(dup), dup, N, **block)
    bits = act.float().view(torch.int32)
    assert torch.equal((bits & sign_bit) != 0, up < 0)
    relative = (act.double() - exact.detach()) / exact.detach().clamp_min(1e-30)
    assert relative.abs().max() <= spacing / 2 + 2 ** -22 and relative.mean().abs() < spacing / 50 + 2 ** -23
    assert ((dup - slope).abs() <= (spacing / 2 + 2 ** -22) * slope.abs() + 1e-6).all()


def test_embed_with_bos_and_rows_shorter_than_the_batch():
    model, B, T = small_model(model_dim=24), 2, 7
    tokens = torch.randint(2, model.cfg.vocab_size, (B, T), device=DEVICE)
    tokens[0, 0] = tokens[0, 3] = tokens[1, 6] = gpt.BOS   # the second row has no previous token at its start either
    tokens[0, 4] = tokens[0, 5]                            # one row of the embedding gets several gradients
    w = gpt.kernel_weights(model)
    buffers, grads = gpt.kernel_gradients(model)
    grads.tok_emb.zero_()
    N, D, window = B * T, model.cfg.model_dim, len(model.smear_w)
    dx0, dx = randn(N, D), randn(N, D)
    names = ["tok_emb", "smear_w", "smear_lambda"]
    sources = [getattr(model, name) for name in names]
    expected_x0 = gpt.embed(tokens, *sources, torch.float32).flatten(0, 1)
    expected = dict(zip(names, torch.autograd.grad((expected_x0 * (dx0 + dx)).sum(), sources)))
    with torch.no_grad(), few_programs():
        x0, rstd = torch.empty(N, D, device=DEVICE), torch.empty(N, device=DEVICE)
        gpt._embed_forward_kernel[gpt.row_grid(gpt.NORM_TILE, N)](
            tokens.flatten(), w.tok_emb, w.smear_w, w.smear_lambda, x0, rstd, N, T, BOS=gpt.BOS, D=D, BLOCK_D=32,
            WINDOW=window, EPS=gpt.RMS_EPS, **gpt.NORM_TILE)
        gpt._embed_backward_kernel[gpt.walking_grid(gpt.NORM_TILE, N)](
            tokens.flatten(), w.tok_emb, w.smear_w, w.smear_lambda, x0, rstd, dx0, dx, grads.tok_emb, grads.smear_w,
            grads.smear_lambda, N, T, BOS=gpt.BOS, D=D, BLOCK_D=32, WINDOW=window, **gpt.NORM_TILE)
    assert_same({"x0": x0} | {name: buffers[name] for name in names}, {"x0": expected_x0} | expected)


@pytest.mark.parametrize("V", [16, 21])
@pytest.mark.parametrize("row_scale", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_loss_and_its_gradients_with_hints(V, row_scale, in_place):
    N = 6
    logits = (15 * randn(N, V)).requires_grad_()
    targets, hints = torch.randint(0, V, (2, N), device=DEVICE).unbind()
    with torch.no_grad():
        logits[0, 0], logits[1, 1] = 0.0, 500.0
    caps = torch.tensor([110.0, 12.0], device=DEVICE, requires_grad=True)      # fp32 cannot hold exp(110)
    log_probs = gpt.softcap_logits(logits, *caps).log_softmax(-1)
    nll = -log_probs.gather(-1, targets[:, None])[:, 0]
    factors = randn(N) if row_scale else torch.full((N,), 0.25, device=DEVICE)
    dlogits, = torch.autograd.grad((nll * factors).sum(), logits, retain_graph=True)
    dcaps = torch.stack([torch.autograd.grad(loss, caps, retain_graph=True)[0] for loss in nll])
    with torch.no_grad():
        raw = logits.clone()
        found_d = raw if in_place else torch.empty_like(raw)
        found_nll, found_hint, found_dcaps = gpt.softcap_ce(
            raw, targets, caps, hints=hints, dlogits=found_d, scale=0.25, row_scale=factors if row_scale else None,
            has_sums=True)
        plain_nll, _, _ = gpt.softcap_ce(logits.clone(), targets, caps)
    expected = {"nll": nll, "hint": log_probs.gather(-1, hints[:, None])[:, 0], "dlogits": dlogits, "dcaps": dcaps}
    assert_same({"nll": found_nll, "hint": found_hint, "dlogits": found_d, "dcaps": found_dcaps}, expected)
    torch.testing.assert_close(plain_nll, found_nll, rtol=0, atol=0)


@pytest.mark.parametrize("has_delta", [False, True])
def test_kernel_score(has_delta):
    model, N = small_model(), 7
    V = model.cfg.vocab_size
    targets, hints = torch.randint(0, V, (2, N), device=DEVICE).unbind()
    delta = randn(N, V) if has_delta else None
    head = model.tok_emb, model.softcap_pos, model.softcap_neg
    arguments = randn(N, model.cfg.model_dim), *head, targets, hints, delta
    with torch.no_grad():
        found, expected = gpt.kernel_score(*arguments), gpt.score_tokens(*arguments)
    assert_same(dict(zip("nh", found)), dict(zip("nh", expected)))


# --- blocks -------------------------------------------------------------------------------------------------

def random_adapters(cfg, B, kinds, has_mlp, rank=3, scale=0.7):
    """(the definition's adapters, their leaves by name, the kernels' form of the same, room for its gradients)"""
    D, out = cfg.model_dim, dict(q=cfg.model_dim, k=cfg.kv_dim, v=cfg.kv_dim, o=cfg.model_dim, mlp=cfg.model_dim)
    names = [*kinds, *(["mlp"] if has_mlp else [])]
    plain = {kind: gpt.LowRank(0.5 * randn(B, rank, D), 0.5 * randn(B, out[kind], rank), scale) for kind in names}
    leaves = {f"{kind} {side}": getattr(plain[kind], side).requires_grad_() for kind in names for side in "AB"}
    detached = {kind: (a.A.detach(), a.B.detach()) for kind, a in plain.items()}
    slot = gpt.SlotAdapters(tuple(kinds), torch.cat([detached[kind][0] for kind in kinds], 1),
                            {kind: detached[kind][1] for kind in kinds}, *detached.get("mlp", (None, None)), scale)
    room = slot._replace(A=torch.empty_like(slot.A), B={kind: torch.empty_like(b) for kind, b in slot.B.items()},
                         mlp_A=torch.empty_like(slot.mlp_A) if has_mlp else None,
                         mlp_B=torch.empty_like(slot.mlp_B) if has_mlp else None)
    return gpt.LayerAdapters(**plain), leaves, slot, room


def adapter_gradients(room):
    """Those that the kernels have written, by the names of random_adapters."""
    R = room.A.shape[1] // len(room.kinds)
    found = {}
    for index, kind in enumerate(room.kinds):
        found |= {f"{kind} A": room.A[:, index * R:(index + 1) * R], f"{kind} B": room.B[kind]}
    return found if room.mlp_A is None else found | {"mlp A": room.mlp_A, "mlp B": room.mlp_B}


def layer_gradients(model, index, layer):
    """Gradients of one layer's parameters by name, from those of the kernels' folded matrices."""
    widths = [p.shape[1] for p in (model.wq, model.wk, model.wv)]
    found = dict(zip(("wq", "wk", "wv"), layer.qkv.split(widths)))
    for name, scale in (("wo", "attn_scale"), ("w_down", "mlp_scale")):
        found[name] = getattr(model, scale)[index][:, None] * getattr(layer, name)
        found[scale] = (getattr(model, name)[index] * getattr(layer, name)).sum(-1)
    for name in ("w_up", "q_gain", "xsa_alpha", "attn_gate", "resid_mix", "lane_post", "lane_resid"):
        found[name] = getattr(layer, name)
    return found


def check_block(is_parallel, skip_kind, *, kinds=(), has_mlp=False, repeats_kv=False, is_parting=False,
                has_places=False):
    """A block on kernels against its plain form: values, gradients of inputs, and of adapters or else of weights;
    has_places: only of some positions of the result."""
    model, index, row = small_model(), int(is_parallel), 0
    cfg, B, T = model.cfg, 2, 5
    D, N = cfg.model_dim, B * T
    w, (_, grads) = gpt.kernel_weights(model), gpt.kernel_gradients(model)
    x, lane1, x0, saved = (randn(B, T, D).requires_grad_() for _ in range(4))
    lane1 = x if is_parting else lane1
    dout, dout1, extra, dx0_before = (randn(N, D) for _ in range(4))
    adapters, leaves, slot, room = gpt.LayerAdapters(), {}, None, None
    if kinds:
        adapters, leaves, slot, room = random_adapters(cfg, B, kinds, has_mlp)
    skip = {None: None, "other": saved, "x": x}[skip_kind]
    cu_seqlens = int32(*range(0, N + 1, T)) if kinds else int32(0, 1, 4, 4, N)
    longest = T if kinds else N - 4
    cos, sin = (table[:T] for table in model.rope.unbind())
    packing = gpt.Packing(cu_seqlens, longest, cos, sin, gpt.attend_math, cfg.sparse_attn_gate_scale)
    weights = model.layer_weights(dict(model.named_parameters()))[index]
    plain_skip = None if skip is None else (skip, model.skip_weights[row], model.skip_gates[row])
    block = gpt.parallel_block if is_parallel else gpt.serial_block
    streams = (x, lane1) if is_parallel else (x,)
    outputs = block(*streams, x0, plain_skip, weights, packing, adapters)
    outputs = outputs if is_parallel else (outputs,)
    outputs = [out.flatten(0, 1) for out in outputs]
    places = torch.tensor([1, 3, T, N - 1], device=DEVICE) if has_places else None
    if has_places:
        outputs, dout, dout1 = [out[places] for out in outputs], dout[places], dout1[places]
    loss = sum((out * d).sum() for out, d in zip(outputs, (dout, dout1)))
    trained = {name: getattr(model, name) for name in gpt.LayerWeights._fields if name != "ln_scale"}
    sources = {"x": x, "lane1": lane1, "x0": x0, "saved": saved} | leaves
    if not kinds:
        sources |= trained | {"skip_weights": model.skip_weights, "skip_gates": model.skip_gates}
    expected = {}
    for name, grad in zip(sources, torch.autograd.grad(loss, list(sources.values()), allow_unused=True)):
        if grad is not None:
            expected[name] = grad.flatten(0, 1) if name in ("x", "lane1", "x0", "saved") else grad
    adds_extra = not is_parallel or is_parting
    expected["x"] = expected["x"] + extra if adds_extra else expected["x"]
    expected["x0"] = expected["x0"] + dx0_before
    if kinds:                                              # nobody asks for it where the weights are frozen
        del expected["x0"]

    at = gpt.Layout(T, cu_seqlens, longest, model.rope, cfg.sparse_attn_gate_scale, ATTENTION[repeats_kv],
                     gpt.PLAIN_PRODUCTS)
    flat = {name: t.detach().flatten(0, 1) for name, t in (("x", x), ("lane1", lane1), ("x0", x0), ("saved", saved))}
    flat_skip = {None: None, "other": flat["saved"], "x": flat["x"]}[skip_kind]
    b = gpt.Backward(w, at, None if kinds else grads, dx0_before.clone())
    own = (slot, room) if kinds else ()
    with torch.no_grad():
        if is_parallel:
            *values, state = gpt.parallel_forward(w, w.layers[index], flat["x"], flat["lane1"], flat["x0"], flat_skip,
                                                  row, at, own[0] if own else None, places)
            dx, dlane1, dskip = gpt.parallel_backward(b, index, state, dout, dout1, is_parting,
                                                      extra if adds_extra else None, True, True, *own)
        else:
            *values, state = gpt.serial_forward(w, w.layers[index], flat["x"], flat["x0"], flat_skip, row, at, *own[:1])
            (dx, dskip), dlane1 = gpt.serial_backward(b, index, state, dout, extra, True, True, *own), None
    assert_same(dict(enumerate(values)), dict(enumerate(outputs)))
    found = {"x": dx} | ({} if kinds else {"x0": b.dx0})
    found |= {"lane1": dlane1} if dlane1 is not None else {}
    found |= {"saved": dskip} if dskip is not None else {}
    if is_parting:
        del expected["lane1"]                              # the same tensor as x
    if kinds:
        found |= adapter_gradients(room)
    else:
        found |= layer_gradients(model, index, grads.layers[index])
        if skip is not None:
            found |= {"skip_weights": grads.skip_weights, "skip_gates": grads.skip_gates}
        expected = {name: grad[index] if name in trained else grad for name, grad in expected.items()}
        for name in ("lane_post", "lane_resid"):
            if not is_parallel:
                assert not found.pop(name).any()
    assert_same(found, expected)


@pytest.mark.parametrize(("skip_kind", "repeats_kv"), [(None, False), ("other", True), ("x", False)])
def test_serial_block(skip_kind, repeats_kv):
    check_block(False, skip_kind, repeats_kv=repeats_kv)


@pytest.mark.parametrize(("skip_kind", "is_parting"), [(None, True), ("other", False), ("other", True), ("x", False)])
def test_parallel_block(skip_kind, is_parting):
    with few_programs():
        check_block(True, skip_kind, is_parting=is_parting)


@pytest.mark.parametrize(("kinds", "is_parting"), [("qv", True), ("qkvo", False), ("qkvo", True)])
def test_parallel_block_of_which_only_some_places_are_read(kinds, is_parting, wide_tiles):
    check_block(True, "other", kinds=kinds, has_mlp=kinds == "qkvo", is_parting=is_parting, has_places=True)


@pytest.mark.parametrize("is_parallel", [False, True], ids=["serial", "parallel"])
@pytest.mark.parametrize(("kinds", "has_mlp"), [("qv", False), ("qkv", True), ("qvo", False), ("qkvo", True)])
def test_block_with_adapters(kinds, has_mlp, is_parallel, wide_tiles):
    check_block(is_parallel, "other", kinds=kinds, has_mlp=has_mlp, repeats_kv="k" in kinds)


# --- the whole model ----------------------------------------------------------------------------------------

def random_row(cfg, lengths, seed=0):
    """A row of segments with these lengths; some of its documents begin with BOS, some segments are parts of one."""
    generator = torch.Generator().manual_seed(seed)
    N = sum(lengths)
    inputs, targets = torch.randint(0, cfg.vocab_size, (2, N), generator=generator).unbind()
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    inputs[bounds[1:-1:2].long() % N] = gpt.BOS
    return gpt.Row(inputs.to(DEVICE), targets.to(DEVICE), bounds.to(DEVICE))


def check_model(cfg, looping, lengths, repeats_kv=False, seed=0, model=None):
    """The loss and the gradients of a row on kernels against plain ones; returns the kernels' gradients."""
    model = model or random_model(cfg, seed).to(DEVICE)
    row, cap = random_row(cfg, lengths, seed), max(lengths)
    # On a GPU the kernels take its own tanh in the loss, which knows 11 bits.
    tolerance = 2e-4 if DEVICE == "cpu" else 0.05
    loss, expected = gpt.row_gradients(model, row, looping=looping, segment_cap=cap)
    found_loss, found = gpt.Kernels(ATTENTION[repeats_kv]).row_gradients(model, row, looping=looping, segment_cap=cap)
    torch.testing.assert_close(found_loss, loss, rtol=tolerance, atol=tolerance)
    for name in found.keys() - expected.keys():
        assert name in gpt.unused_parameters(cfg) and not found.pop(name).any()
    for name, grad in found.items():
        assert grad.is_contiguous() and grad.dtype == torch.float32, name
    assert_same(found, expected, tolerance)
    return found


@contextlib.contextmanager
def wider_tiles():
    """Fewer programs: the interpreter takes its time for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpt.NORM_TILE, "ROWS", 16)
        patch.setitem(gpt.NORM_BACKWARD_TILE, "ROWS", 16)
        yield


@pytest.fixture
def wide_tiles():
    with wider_tiles():
        yield


MODELS = {                                                 # every shape in which skips, lanes and loops can meet
    "lanes begin in the decoder": dict(num_layers=4, loop_start=1, loop_end=2, parallel_start_layer=3, num_loops=1),
    "lanes begin in the encoder": dict(num_layers=4, loop_start=0, loop_end=0, parallel_start_layer=1, num_loops=1),
    "one stream, odd layers": dict(num_layers=3, loop_start=1, loop_end=1, parallel_start_layer=3, num_loops=1),
    "two layers": dict(num_layers=2, num_kv_heads=2, num_loops=1),
}


@pytest.mark.parametrize("looping", [False, True], ids=["loops_off", "loops_on"])
@pytest.mark.parametrize("shape", MODELS)
def test_gradients_of_a_row(shape, looping, wide_tiles):
    check_model(small_config(**MODELS[shape]), looping, [4, 1, 0, 3, 1, 0], repeats_kv=looping)


@st.composite
def model_shapes(draw):
    layers = draw(st.integers(2, 3))
    start = draw(st.integers(0, layers - 2))
    end = draw(st.integers(start, layers - 2))
    heads, width = draw(st.sampled_from([(2, 16), (4, 32), (2, 32)]))
    return dict(num_layers=layers, loop_start=start, loop_end=end,
                parallel_start_layer=draw(st.integers(end + 1, layers)), num_loops=draw(st.integers(0, 1)),
                model_dim=width, num_heads=heads, num_kv_heads=draw(st.sampled_from([1, 2])),
                rope_dims=2 * draw(st.integers(1, width // heads // 2)), gate_window=draw(st.integers(1, width)),
                mlp_mult=draw(st.sampled_from([0.5, 1.0, 3.0])), vocab_size=draw(st.integers(9, 40)),
                sparse_attn_gate_scale=draw(st.sampled_from([0.5, 2.0])))


@given(model_shapes(), st.booleans(), st.booleans(), st.integers(0, 99),
       st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any))
@settings(max_examples=5)
def test_gradients_of_random_models_and_rows(shape, looping, repeats_kv, seed, lengths):
    with wider_tiles():
        check_model(small_config(**shape), looping, lengths, repeats_kv, seed)


def test_frozen_caps_get_no_gradient(wide_tiles):
    model = small_model()
    freeze_caps(model, 20.0)
    found = check_model(model.cfg, False, [5, 4], model=model)
    assert {name for name, _ in model.named_parameters()} - found.keys() == {"softcap_pos", "softcap_neg"}


def test_gradients_belong_to_the_caller(wide_tiles):
    model, kernels = small_model(), gpt.Kernels(MATH)
    row = random_row(model.cfg, [3, 2])
    before = {name: p.clone() for name, p in model.state_dict().items()}
    first, second = (kernels.row_gradients(model, row, looping=False, segment_cap=3)[1] for _ in range(2))
    kept = {name: grad.clone() for name, grad in second.items()}
    for grad in first.values():
        grad.fill_(torch.nan)
    assert all(torch.equal(second[name], kept[name]) for name in kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("looping", [False, True])
def test_hidden_states_of_several_rows(looping, wide_tiles):
    model, B, T = small_model(), 2, 6
    tokens = torch.randint(0, model.cfg.vocab_size, (B, T), device=DEVICE)
    segments = int32(0, 4, T, T, 2 * T), T
    with torch.no_grad():
        expected = model(tokens, looping=looping, segments=segments)
    found = gpt.Kernels(MATH).hidden(model, tokens, looping=looping, segments=segments)
    assert found.dtype == expected.dtype
    assert_same({"hidden": found}, {"hidden": expected})


def test_gradients_of_adapters_through_the_whole_model(wide_tiles):
    model, B, T, looping = small_model(num_layers=3, parallel_start_layer=2, loop_end=1, num_loops=1), 2, 4, True
    plan = gpt.execution_plan(model.cfg, looping)
    model.requires_grad_(False)
    tokens = torch.randint(0, model.cfg.vocab_size, (B, T), device=DEVICE)
    plain, leaves, slots, rooms = zip(*(random_adapters(model.cfg, B, "qkvo", True) for _ in plan))
    hidden = model(tokens, looping=looping, adapters=plain)
    dhidden = randn(*hidden.shape)
    named = {f"slot {slot} {name}": leaf for slot, own in enumerate(leaves) for name, leaf in own.items()}
    expected = dict(zip(named, torch.autograd.grad((hidden * dhidden).sum(), list(named.values()))))
    kernels = gpt.Kernels(ATTENTION[True])
    at = kernels.layout(model, T, int32(0, T, 2 * T), T)
    with torch.no_grad():
        w = gpt.kernel_weights(model)
        found_hidden, tape = gpt.forward_pass(model, w, tokens.flatten(), at, looping, slots)
        gpt.backward_pass(model, w, tape, dhidden.flatten(0, 1), at, looping, None, slots, rooms)
    assert_same({"hidden": found_hidden.view_as(hidden)}, {"hidden": hidden})
    found = {f"slot {slot} {name}": grad for slot, room in enumerate(rooms)
             for name, grad in adapter_gradients(room).items()}
    assert_same(found, expected)


def test_the_packed_script_has_the_same_kernels(tmp_path, repo, monkeypatch, wide_tiles):
    path = tmp_path / "packed_train_gpt.py"
    path.write_text(pack.minify((repo / "train_gpt.py").read_text(encoding="utf-8")))
    spec = importlib.util.spec_from_file_location("packed_train_gpt", path)
    packed = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, packed)
    spec.loader.exec_module(packed)
    for tile in ("NORM_TILE", "NORM_BACKWARD_TILE"):
        getattr(packed, tile)["ROWS"] = getattr(gpt, tile)["ROWS"]
    model = small_model()
    row = random_row(model.cfg, [4, 1])
    results = []
    for module in (gpt, packed):
        attention = module.autograd_attention(module.attend_math)
        results.append(module.Kernels(attention).row_gradients(model, row, looping=False, segment_cap=4)[1])
    assert_same(results[1], results[0], 1e-6 if DEVICE == "cpu" else 1e-4)


# --- GPU ----------------------------------------------------------------------------------------------------

def needs_hopper():
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")


@pytest.mark.gpu
@pytest.mark.parametrize("looping", [False, True], ids=["loops_off", "loops_on"])
def test_bf16_gradients_at_the_records_widths(looping):
    needs_hopper()
    cfg = dataclasses.replace(gpt.Config(), train_batch_tokens=8 * 4096, val_batch_tokens=8 * 4096, allow_slow=True,
                              compile=False)
    run = gpt.Run(cfg, device=torch.device("cuda"))
    model = gpt.GPT(cfg)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in ("wo", "w_down"):
                p.copy_(torch.randn(p.shape) / p.shape[-1] ** 0.5)
            elif name == "tok_emb":
                p.mul_(20)                                 # so that the logits are not all alike
            elif name not in gpt.PARAMETER_TABLE["muon"] and "softcap" not in name:
                p.add_(0.1 * torch.randn(p.shape))
    model = model.cuda()
    row = random_row(cfg, [1, 2000, 0, 300, 1, 1, 1200, 593, 0])
    attend, attention = gpt.choose_attention(run)
    _, exact = gpt.row_gradients(model, row, looping=looping, segment_cap=2048)
    model.compute_dtype, model.ops = torch.bfloat16, gpt.Ops(attend=attend)
    plain_loss, plain = gpt.row_gradients(model, row, looping=looping, segment_cap=2048)
    kernels = gpt.Kernels(attention, gpt.choose_products(run))
    loss, found = kernels.row_gradients(model, row, looping=looping, segment_cap=2048)
    assert abs(loss - plain_loss) < 0.01
    worse = {}
    for name in exact:
        size = exact[name].norm()
        error, plain_error = (((grads[name] - exact[name]).norm() / size).item() for grads in (found, plain))
        print(f"{name}: kernels {error:.4f} plain {plain_error:.4f}")
        if error > 1.2 * plain_error + 0.01:
            worse[name] = error, plain_error
    assert not worse


@pytest.mark.gpu
@pytest.mark.parametrize("N", [4096, 1000])
def test_quack_products_equal_the_plain_ones(N):
    needs_hopper()
    try:
        products = gpt.quack_products()
    except (ImportError, OSError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        pytest.skip(f"quack: {error}")
    n, dout = (torch.randn(N, 512, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    w_up, w_down = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) / shape[1] ** 0.5
                    for shape in ((2048, 512), (512, 2048)))
    up = n.double() @ w_up.double().T
    act = products.up(n, w_up)
    is_negative = (act.view(torch.int16) & 1) != 0
    assert torch.equal(is_negative, up < 0) or up[is_negative != (up < 0)].abs().max() < 1e-4
    root = act.double().sqrt()                             # the slope is that of the activations as they were stored
    expected = {"act": gpt.leaky_square(up),
                "dup": (dout.double() @ w_down.double()) * torch.where(is_negative, -2 * gpt.LEAKY_SLOPE, 2.0) * root}
    found = {"act": act, "dup": products.down_backward(dout, w_down, act)}
    for name, value in expected.items():                   # act keeps one bit less than bf16: 2**-8 at most
        assert found[name].dtype == torch.bfloat16
        assert (found[name].double() - value).norm() <= 0.006 * value.norm(), name


@pytest.mark.gpu
@pytest.mark.parametrize("V", [8192, 777])
def test_the_gpus_own_tanh_changes_the_loss_less_than_bf16_does(V):
    logits = (20 * torch.randn(512, V, device="cuda")).bfloat16()
    targets = torch.randint(0, V, (512,), device="cuda")
    caps = torch.tensor([30.0, 25.0], device="cuda")
    results = []
    for approximate in (False, True):
        dlogits = torch.empty_like(logits)
        nll, _, dcaps = gpt.softcap_ce(logits, targets, caps, dlogits=dlogits, has_sums=True, approximate=approximate)
        results.append((nll.double(), dlogits.double(), dcaps.double()))
    (nll, dlogits, dcaps), (found_nll, found_dlogits, found_dcaps) = results
    assert (found_nll - nll).abs().max() <= 2 * 30 * 2 ** -10          # of the target's logit and of the sum's
    assert abs((found_nll - nll).mean()) <= 30 * 2 ** -11
    assert (found_dlogits - dlogits).norm() <= 0.02 * dlogits.norm()
    assert (found_dcaps.mean(0) - dcaps.mean(0)).norm() <= 0.02 * dcaps.norm() / 512 ** 0.5
