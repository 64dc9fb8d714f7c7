"""Section 15: every attention backend computes causal attention inside segments, as written out here."""
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import train_gpt as gpt
from helpers import tiny_config


def attend_by_definition(q, k, v, cu_seqlens):
    """One softmax over one masked score matrix per query head; head h reads key/value head h // (H/G)."""
    N, H, K = q.shape
    group = H // k.shape[1]
    position = torch.arange(N, device=q.device)
    segment = torch.bucketize(position, cu_seqlens.long()[1:], right=True)
    mask = (segment[:, None] == segment) & (position[:, None] >= position)
    heads = []
    for head in range(H):
        scores = (q[:, head] @ k[:, head // group].T / K ** 0.5).masked_fill(~mask, -torch.inf)
        heads.append(scores.softmax(-1) @ v[:, head // group])
    return torch.stack(heads, 1)


def random_qkv(N, H, G, K, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N, heads, K, generator=generator).to(device, dtype) for heads in (H, G, G)]


def longest(cu_seqlens):
    return int(cu_seqlens.diff().max())


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any), st.sampled_from([(4, 2), (4, 4), (3, 1)]),
       st.integers(0, 9))
@settings(max_examples=40)
def test_math_attention_follows_the_definition(lengths, heads, seed):
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    q, k, v = random_qkv(sum(lengths), *heads, 8, seed)
    out = gpt.attend_math(q, k, v, cu_seqlens, longest(cu_seqlens))
    torch.testing.assert_close(out, attend_by_definition(q, k, v, cu_seqlens), rtol=0, atol=2e-6)


def test_gradients_of_math_attention_follow_the_definition():
    cu_seqlens = torch.tensor([0, 5, 5, 17, 20, 20], dtype=torch.int32)
    leaves = [x.double().requires_grad_() for x in random_qkv(20, 4, 2, 8)]
    weight = random_qkv(20, 4, 4, 8, seed=1)[0].double()
    grads = [torch.autograd.grad((attend(*leaves) * weight).sum(), leaves) for attend in (
        lambda *x: gpt.attend_math(*x, cu_seqlens, 12), lambda *x: attend_by_definition(*x, cu_seqlens))]
    for found, expected in zip(*grads):
        torch.testing.assert_close(found, expected)


def test_segments_cannot_see_each_other_nor_the_future():
    cu_seqlens = torch.tensor([0, 7, 20], dtype=torch.int32)
    q, k, v = random_qkv(20, 4, 2, 8)
    before = gpt.attend_math(q, k, v, cu_seqlens, 13)
    k[:7] += 1
    v[:7] -= 3
    k[15:] *= 2
    v[15:] += 5
    after = gpt.attend_math(q, k, v, cu_seqlens, 13)
    assert torch.equal(before[7:15], after[7:15])
    assert not torch.equal(before[:7], after[:7]) and not torch.equal(before[15:], after[15:])


def test_the_first_token_of_a_segment_returns_its_own_value():
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    q, k, v = random_qkv(9, 4, 2, 8)
    out = gpt.attend_math(q, k, v, cu_seqlens, 5)
    for first in (0, 4):
        torch.testing.assert_close(out[first], v[first].repeat_interleave(2, 0))


def test_a_machine_without_gpu_gets_plain_math_and_the_log_says_why(capsys):
    attend, kernel = gpt.choose_attention(gpt.Run(tiny_config()))
    assert attend is gpt.attend_math and not kernel.repeats_kv
    assert capsys.readouterr().out == 'attention backend:math reason:"no GPU"\n'


FA4_KERNEL = gpt.AttentionKernel(None, None, repeats_kv=True)


def pretend_gpu(monkeypatch, capability, fa3=None, fa4=None):
    def loader(attend, kernel, name):
        def load():
            if attend is None:
                raise ImportError(f"No module named '{name}'")
            return attend, kernel
        return load
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(gpt, "flash_attention_3", loader(fa3, gpt.autograd_attention(fa3), "flash_attn_interface"))
    monkeypatch.setattr(gpt, "flash_attention_4", loader(fa4, FA4_KERNEL, "flash_attn"))
    return lambda **changes: gpt.Run(tiny_config(**changes), device=torch.device("cuda"))


def test_flash_attention_3_comes_first_then_4(monkeypatch, capsys):
    three, four = object(), object()
    attend, kernel = gpt.choose_attention(pretend_gpu(monkeypatch, (9, 0), three, four)())
    assert attend is three and not kernel.repeats_kv       # made from `attend` by autograd
    assert 'attention backend:flash_attention_3 reason:"first choice"' in capsys.readouterr().out
    assert gpt.choose_attention(pretend_gpu(monkeypatch, (9, 0), None, four)()) == (four, FA4_KERNEL)
    out = capsys.readouterr().out
    assert "attention backend:flash_attention_4" in out and "No module named 'flash_attn_interface'" in out


def test_a_gpu_without_fast_attention_stops_the_run_unless_slowness_is_allowed(monkeypatch, capsys):
    run = pretend_gpu(monkeypatch, (9, 0))
    with pytest.raises(gpt.ConfigError, match="no fast attention kernel .*requirements-gpu.txt.*ALLOW_SLOW=1"):
        gpt.choose_attention(run())
    assert gpt.choose_attention(run(allow_slow=True))[0] is gpt.attend_torch_varlen
    assert "attention backend:torch_varlen reason:" in capsys.readouterr().out


@pytest.mark.parametrize(("capability", "backend"), [((9, 0), "quack_epilogue"), ((10, 0), "cublas"), ((12, 0), "cublas")])
def test_products_of_the_kernel_for_hopper_are_taken_on_hopper_alone(monkeypatch, capability, backend):
    lines = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(gpt, "quack_products", lambda: "products")
    run = types.SimpleNamespace(cfg=gpt.Config(), device=torch.device("cuda"), log=lines.append)
    assert (gpt.choose_products(run) == "products") == (backend == "quack_epilogue")
    assert lines[0].startswith(f"products backend:{backend} ")


def test_the_plain_loss_is_not_that_of_the_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpt, "triton", object())
    for cfg, refused in ((gpt.Config(), ""), (gpt.Config(fused_ce_enabled=False), "FUSED_CE_ENABLED=0")):
        assert gpt.refuse_kernels(types.SimpleNamespace(cfg=cfg, device=torch.device("cuda"))) == refused


def test_an_older_gpu_is_told_which_compute_capability_is_needed(monkeypatch):
    with pytest.raises(gpt.ConfigError, match="needs compute capability 9.0, found 8.0"):
        gpt.choose_attention(pretend_gpu(monkeypatch, (8, 0), object(), object())())


def test_an_attention_kernel_without_autograd_has_the_gradients_of_attend():
    cu_seqlens = torch.tensor([0, 5, 5, 17, 20, 20], dtype=torch.int32)
    inputs, dy = random_qkv(20, 4, 2, 8), random_qkv(20, 4, 4, 8, seed=1)[0]
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected_y = gpt.attend_math(*leaves, cu_seqlens, 12)
    expected = torch.autograd.grad(expected_y, leaves, dy)
    kernel = gpt.autograd_attention(gpt.attend_math)
    with torch.no_grad():
        y, state = kernel.forward(*inputs, cu_seqlens, 12)
        found = kernel.backward(dy, *inputs, y, state, cu_seqlens, 12)
    assert not y.requires_grad and torch.equal(y, expected_y)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_compiled_blocks_and_kernels_call_flash_attention_4_alike(monkeypatch):
    """With something simple in the place of the library's two functions: values and gradients, eager and compiled."""
    def forward(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, return_lse):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k == 8 and causal and return_lse
        return 2 * q + 3 * k + 5 * v, q.new_zeros(q.shape[1], len(q))

    def backward(q, k, v, y, dy, lse, *, causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k == 8 and causal
        assert torch.equal(y, 2 * q + 3 * k + 5 * v) and lse.shape == (q.shape[1], len(q))
        return 2 * dy, 3 * dy, 5 * dy
    library = types.ModuleType("flash_attn.cute.interface")
    library._flash_attn_fwd, library._flash_attn_bwd = forward, backward
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, library.__name__, library)
    attend, kernel = gpt.flash_attention_4()
    cu_seqlens = torch.tensor([0, 3, 11], dtype=torch.int32)
    (q, k, v), dy = random_qkv(11, 4, 4, 8), random_qkv(11, 4, 4, 8, seed=1)[0]
    expected = [2 * q + 3 * k + 5 * v, 2 * dy, 3 * dy, 5 * dy]
    for run in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = run(*leaves, cu_seqlens, 8)
        torch.testing.assert_close([y, *torch.autograd.grad(y, leaves, dy)], expected)
    y, state = kernel.forward(q, k, v, cu_seqlens, 8)
    torch.testing.assert_close([y, *kernel.backward(dy, q, k, v, y, state, cu_seqlens, 8)], expected)
    assert kernel.repeats_kv


# GPU

def gpu_backends():
    """(name, loader) of every backend a GPU may use; a loader raises ImportError where the library is absent."""
    return [("flash_attention_3", lambda: gpt.flash_attention_3()[0]),
            ("flash_attention_4", lambda: gpt.flash_attention_4()[0]),
            ("torch_varlen", lambda: gpt.attend_torch_varlen), ("math", lambda: gpt.attend_math)]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "load"), gpu_backends(), ids=[name for name, _ in gpu_backends()])
@pytest.mark.parametrize("lengths", [[300], [1, 17, 0, 128, 256, 3, 0, 0], [64] * 5], ids=["one", "mixed", "even"])
def test_gpu_backend_equals_math_forward_and_backward(name, load, lengths):
    try:
        attend = load()
    except (ImportError, OSError) as error:
        pytest.skip(f"{name}: {error}")
    if name.startswith("flash") and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip(f"{name} needs compute capability 9.0")
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device="cuda")
    max_seqlen = max(256, max(lengths))                        # as in training: a bound, not the maximum itself
    inputs = random_qkv(sum(lengths), 8, 4, 64, dtype=torch.bfloat16, device="cuda")
    weight = random_qkv(sum(lengths), 8, 8, 64, seed=1, dtype=torch.bfloat16, device="cuda")[0]
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = attend(*leaves, cu_seqlens, max_seqlen)
    found = [out, *torch.autograd.grad((out.float() * weight.float()).sum(), leaves)]
    exact = [x.double().requires_grad_() for x in inputs]
    expected_out = attend_by_definition(*exact, cu_seqlens)
    expected = [expected_out, *torch.autograd.grad((expected_out * weight.double()).sum(), exact)]
    for value, reference in zip(found, expected):
        # bf16 keeps 8 bits: 2**-8 per rounding, a few roundings (probabilities, output, their gradients) in a row.
        error = (value.double() - reference).norm() / reference.norm()
        assert error < 0.015, f"{name}: relative error {error:.4f}"
        assert (value.double() - reference).abs().max() < 0.06 * reference.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[300], [1, 17, 0, 128, 256, 3, 0, 0]], ids=["one", "mixed"])
def test_flash_attention_4_without_autograd_equals_math(lengths):
    try:
        _, kernel = gpt.flash_attention_4()
    except (ImportError, OSError) as error:
        pytest.skip(f"flash_attention_4: {error}")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("flash_attention_4 needs compute capability 9.0")
    assert kernel.repeats_kv
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device="cuda")
    q, k, v = random_qkv(sum(lengths), 8, 8, 64, dtype=torch.bfloat16, device="cuda")
    dy = random_qkv(sum(lengths), 8, 8, 64, seed=1, dtype=torch.bfloat16, device="cuda")[0]
    longest = max(lengths)
    y, state = kernel.forward(q, k, v, cu_seqlens, longest)
    found = [y, *kernel.backward(dy, q, k, v, y, state, cu_seqlens, longest)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected_y = attend_by_definition(*exact, cu_seqlens)
    expected = [expected_y, *torch.autograd.grad(expected_y, exact, dy.double())]
    for value, reference in zip(found, expected):          # bounds as for the backends above
        assert value.shape == reference.shape
        assert (value.double() - reference).norm() <= 0.015 * reference.norm()
        assert (value.double() - reference).abs().max() < 0.06 * reference.abs().max()
