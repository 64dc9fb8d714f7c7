"""Section 4: the model, against golden vectors and by properties; 16 and 17: the loss kernel and the compiler."""
import dataclasses
import functools

import numpy as np
import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F

import train_gpt as gpt
from helpers import (archive_config, archive_model, freeze_caps, logits_of, random_documents, random_model,
                     tiny_config, training_row)

LOOPING = pytest.mark.parametrize("looping", [False, True], ids=["off", "on"])


def tag(looping):
    return "on" if looping else "off"


def assert_near(found, expected, tolerance, what=""):
    found = found.detach().double().numpy() if isinstance(found, torch.Tensor) else np.asarray(found, np.float64)
    assert found.shape == np.shape(expected), what
    assert np.abs(found - expected).max() <= tolerance, f"{what}: off by {np.abs(found - expected).max():.2e}"


def assert_near_in_norm(found, expected, tolerance, what=""):
    found, expected = found.detach().double().numpy(), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, what
    error = np.linalg.norm(found - expected)
    assert error <= tolerance * np.linalg.norm(expected), f"{what}: off by {error / np.linalg.norm(expected):.2e}"


# Golden vectors: training and evaluation

@pytest.fixture
def golden(load_vectors):
    """(forward archive, model, inputs, targets, segments) of the reduced model."""
    forward, weights = load_vectors("model_forward"), load_vectors("model_weights")
    model = archive_model(weights, archive_config(weights, forward))
    inputs, targets = (torch.from_numpy(forward[name]) for name in ("tokens_in", "tokens_target"))
    return forward, model, inputs, targets, (torch.from_numpy(forward["cu_seqlens_padded"]), int(forward["segment_cap"]))


def test_segments_of_the_archive_are_those_of_its_tokens(golden):
    _, _, inputs, _, (cu_seqlens, cap) = golden
    assert (gpt.segment_bounds(inputs.numpy(), cap, len(cu_seqlens)) == cu_seqlens.numpy()).all()


@LOOPING
def test_logits_and_scores_equal_the_reference(golden, looping):
    forward, model, inputs, targets, segments = golden
    hidden = model(inputs[None], looping=looping, segments=segments)[0]
    nll, log_q = model.score(hidden, targets)
    assert_near(logits_of(model, hidden), forward[f"logits_eval_{tag(looping)}"], 2e-5)
    assert_near(nll, forward[f"nll_eval_{tag(looping)}"], 2e-5)
    assert torch.equal(log_q, -nll)


@LOOPING
def test_a_row_without_segments_is_one_causal_sequence(golden, looping):
    forward, model, inputs, _, _ = golden
    hidden = model(inputs[None], looping=looping)[0]
    assert_near(logits_of(model, hidden), forward[f"logits_eval_nosegments_{tag(looping)}"], 2e-5)


@LOOPING
def test_intermediate_values_equal_the_reference(golden, looping, monkeypatch):
    forward, model, inputs, _, segments = golden
    traces, plain_attention = {}, gpt.attention

    def keep(name, value):
        traces.setdefault(name, value[0])

    def traced_attention(n_BTD, *rest):
        out = plain_attention(n_BTD, *rest)
        keep("block0_attn_in", n_BTD)
        keep("block0_attn_out", out)
        return out

    def serial(x, x0, *rest):
        out = gpt.serial_block(x, x0, *rest)
        for name, value in (("x0", x0), ("block0_in", x), ("block0_out", out)):
            keep(name, value)
        return out

    def finish(lane0, lane1):
        keep("final_pre_norm", 0.5 * (lane0 + lane1))
        return gpt.finish(lane0, lane1)

    monkeypatch.setattr(gpt, "attention", traced_attention)
    hidden = model(inputs[None], looping=looping, segments=segments, ops=gpt.Ops(serial=serial, finish=finish))
    keep("final_hidden", hidden)
    names = {key.removeprefix(f"trace_{tag(looping)}_") for key in forward if key.startswith(f"trace_{tag(looping)}_")}
    assert names == traces.keys()
    for name in sorted(names):
        assert_near(traces[name], forward[f"trace_{tag(looping)}_{name}"], 2e-5, name)


@LOOPING
def test_training_loss_and_gradients_equal_the_reference(golden, looping):
    forward, model, inputs, targets, (cu_seqlens, cap) = golden
    freeze_caps(model, float(forward["train_softcap"]))
    row = training_row(inputs, targets, cu_seqlens)
    loss, grads = gpt.row_gradients(model, row, looping=looping, segment_cap=cap)
    assert_near(loss, forward[f"loss_train_{tag(looping)}"], 1e-5)
    checked = set()
    for key, expected in forward.items():
        kind, _, rest = key.partition(f"_{tag(looping)}_")
        if kind == "grad":
            assert_near_in_norm(grads[rest], expected, 1e-4, key)
        elif kind == "gradnorm" and rest == "total":
            total = torch.cat([grad.flatten() for grad in grads.values()]).norm()
            assert abs(total.item() - expected) <= 1e-4 * expected
        elif kind == "gradnorm":
            grad = grads[rest]
            norms = grad.flatten(1).norm(dim=1) if expected.ndim else grad.norm()
            assert (np.abs(norms.numpy() - expected) <= 1e-4 * expected).all(), key
        if kind in ("grad", "gradnorm"):
            checked.add(rest)
    assert checked == grads.keys() | {"total"}


@LOOPING
def test_bf16_activations_stay_close_to_fp32(golden, looping):
    forward, model, inputs, targets, segments = golden
    model.compute_dtype = torch.bfloat16
    with torch.no_grad():
        hidden = model(inputs[None], looping=looping, segments=segments)[0]
        error = logits_of(model, hidden).numpy() - forward[f"logits_eval_{tag(looping)}"]
        nll, _ = model.score(hidden, targets)
    assert hidden.dtype == torch.bfloat16 and nll.dtype == torch.float32
    assert np.abs(error).max() <= 2 * 0.21 and np.sqrt((error ** 2).mean()) <= 2 * 0.03
    assert abs(nll.mean().item() - forward[f"nll_eval_{tag(looping)}"].mean()) <= 2 * 4e-3


def test_an_archive_may_lack_only_parameters_that_are_declared_as_added(load_vectors):
    weights, forward = dict(load_vectors("model_weights")), load_vectors("model_forward")
    cfg = archive_config(weights, forward)
    del weights["xsa_alpha"]
    with pytest.raises(AssertionError, match="not in the archive"):
        archive_model(weights, cfg)
    model = archive_model(weights, cfg, added=frozenset({"xsa_alpha"}))
    assert torch.equal(model.xsa_alpha, torch.zeros_like(model.xsa_alpha)) and not model.xsa_alpha.requires_grad
    with pytest.raises(AssertionError, match="does not know"):
        archive_model(weights | {"pos_emb": weights["tok_emb"]}, cfg, added=frozenset({"xsa_alpha"}))


# Golden vectors: adapters

KINDS = ("q", "k", "v", "o", "mlp")


@pytest.fixture
def golden_lora(load_vectors):
    """(archive, model, bank holding the archive's adapters)."""
    lora, weights = load_vectors("ttt_lora_forward"), load_vectors("model_weights")
    cfg = archive_config(weights, load_vectors("model_forward"), ttt_lora_rank=int(lora["rank"]),
                         ttt_lora_alpha=float(lora["alpha"]), longest_row=lora["x"].shape[1])
    model = archive_model(weights, cfg)
    num_slots, rows = lora["lora_q_A"].shape[:2]
    bank = gpt.AdapterBank(cfg, num_slots, rows)
    for (kind, slot, letter), part in bank.parts(bank.params).items():
        value = lora[f"lora_{kind}_{letter}"]
        part.copy_(torch.from_numpy(value if kind == "head" else value[slot]))
    return lora, model, bank


def zero_b(bank):
    for (_, _, letter), part in bank.parts(bank.params).items():
        if letter == "B":
            part.zero_()


def score_with(model, lora, slots, head):
    x, y, hint = (torch.from_numpy(lora[name]) for name in ("x", "y", "hint"))
    hidden = model(x, looping=True, adapters=slots)
    nll, log_q = model.score(hidden.flatten(0, 1), y.flatten(), hint.flatten(), head(hidden).flatten(0, 1))
    return nll.view_as(y), log_q.view_as(y)


def test_scores_with_adapters_equal_the_reference(golden_lora):
    lora, model, bank = golden_lora
    nll, log_q = score_with(model, lora, *bank.adapters(bank.params))
    assert_near(nll, lora["nll"], 2e-5)
    assert_near(log_q, lora["log_q_hint"], 2e-5)


def test_adapter_gradients_equal_the_reference(golden_lora):
    lora, model, bank = golden_lora
    leaf = bank.params.clone().requires_grad_()
    nll, _ = score_with(model, lora, *bank.adapters(leaf))
    first = int(lora["chunk_offset"])
    loss = nll[:, first:first + int(lora["chunk_len"])].mean(1).sum()
    assert_near(loss, lora["train_loss"], 2e-5)
    for (kind, slot, letter), grad in bank.parts(torch.autograd.grad(loss, leaf)[0]).items():
        expected = lora[f"gradnorm_{kind}_{letter}"]
        expected = expected if kind == "head" else expected[slot]
        norms = grad.flatten(1).norm(dim=1).double().numpy()
        assert (np.abs(norms - expected) <= 1e-4 * expected).all(), (kind, slot, letter)


def test_adapters_with_zero_b_equal_the_reference(golden_lora):
    lora, model, bank = golden_lora
    zero_b(bank)
    assert_near(score_with(model, lora, *bank.adapters(bank.params))[0], lora["nll_zero_lora"], 2e-5)


def test_a_zero_adapter_is_bit_identical_to_none(golden_lora):
    lora, model, bank = golden_lora
    zero_b(bank)
    slots, head = bank.adapters(bank.params)
    x = torch.from_numpy(lora["x"])
    hidden = model(x, looping=True)
    assert torch.equal(model(x, looping=True, adapters=slots), hidden)
    y = torch.from_numpy(lora["y"]).flatten()
    plain = model.score(hidden.flatten(0, 1), y)
    assert all(torch.equal(a, b) for a, b in zip(
        model.score(hidden.flatten(0, 1), y, None, head(hidden).flatten(0, 1)), plain))


def test_an_adapter_changes_only_its_own_document(golden_lora):
    lora, model, bank = golden_lora
    before = score_with(model, lora, *bank.adapters(bank.params))[0]
    bank.params[0] *= -1.5
    after = score_with(model, lora, *bank.adapters(bank.params))[0]
    assert torch.equal(before[1:], after[1:]) and not torch.allclose(before[0], after[0])


def test_low_rank_adapter_is_scale_times_b_a_x():
    x, A, B = torch.randn(2, 3, 8), torch.randn(2, 4, 8), torch.randn(2, 5, 4)
    expected = torch.stack([2.5 * (B[d] @ A[d] @ x[d].T).T for d in range(2)])
    torch.testing.assert_close(gpt.LowRank(A, B, 2.5)(x), expected)


# Documents

def row_of(tokens, cap=32):
    return torch.from_numpy(tokens.astype(np.int64))[None], (torch.from_numpy(gpt.segment_bounds(tokens, cap)), cap)


@LOOPING
def test_documents_cannot_see_each_other(looping):
    model = random_model(tiny_config())
    tokens = random_documents(np.random.default_rng(1), 90)
    tokens[[0, 30, 60]] = gpt.BOS
    tokens[1:30], tokens[31:60], tokens[61:] = (np.arange(n) % 50 + 5 for n in (29, 29, 29))
    other = tokens.copy()
    other[31:60] = np.arange(29)[::-1] % 40 + 7
    row, segments = row_of(tokens)
    changed, _ = row_of(other)
    a, b = (model(x, looping=looping, segments=segments)[0] for x in (row, changed))
    assert torch.equal(a[:31], b[:31]) and torch.equal(a[60:], b[60:])
    assert not torch.isclose(a[31:60], b[31:60]).all(-1).any()


@LOOPING
def test_future_tokens_cannot_change_earlier_outputs(looping):
    model = random_model(tiny_config())
    tokens = random_documents(np.random.default_rng(2), 60)
    row, segments = row_of(tokens)
    for at in (1, 17, 59):
        changed = row.clone()
        changed[0, at:] = 63 - changed[0, at:].clamp_max(61)         # no BOS: the segments stay what they are
        a, b = (model(x, looping=looping, segments=segments)[0] for x in (row, changed))
        assert torch.equal(a[:at], b[:at]) and not torch.allclose(a[at], b[at])


@LOOPING
def test_packed_documents_equal_documents_alone(looping):
    """Rotary positions run on through a row, so equality is up to the rounding of relative positions."""
    model = random_model(tiny_config(global_ttt_chunk_tokens=120))
    tokens = random_documents(np.random.default_rng(3), 120, mean=15)
    row, segments = row_of(tokens, cap=128)
    packed = model(row, looping=looping, segments=segments)[0]
    starts = [*np.flatnonzero(tokens == gpt.BOS), len(tokens)]
    assert len(starts) > 4
    for start, end in zip(starts, starts[1:]):
        alone = model(row[:, start:end], looping=looping)[0]
        torch.testing.assert_close(packed[start:end], alone, rtol=0, atol=2e-4)


def test_rows_of_a_batch_equal_rows_alone():
    model = random_model(tiny_config())
    tokens = torch.randint(2, 64, (3, 20))
    together = model(tokens, looping=True)
    for index in range(3):
        torch.testing.assert_close(together[index:index + 1], model(tokens[index:index + 1], looping=True),
                                   rtol=0, atol=1e-5)


def test_padding_after_a_row_changes_nothing():
    model = random_model(tiny_config())
    row, segments = row_of(random_documents(np.random.default_rng(4), 50))
    longer = F.pad(row, (0, 14))
    bounds = torch.from_numpy(gpt.segment_bounds(longer[0].numpy(), 32))
    torch.testing.assert_close(model(longer, looping=True, segments=(bounds, 32))[:, :50],
                               model(row, looping=True, segments=segments), rtol=0, atol=1e-5)


def test_empty_segments_of_the_padded_bounds_change_nothing():
    model = random_model(tiny_config())
    row, (bounds, cap) = row_of(random_documents(np.random.default_rng(5), 50))
    tight = bounds[:int((bounds < 50).sum()) + 1]
    assert len(tight) < len(bounds)
    assert torch.equal(model(row, looping=True, segments=(bounds, cap)), model(row, looping=True, segments=(tight, cap)))


# Parts

def test_rms_norm_adds_epsilon_to_the_mean_square_and_keeps_the_dtype():
    x = torch.tensor([[3.0, -4.0], [0.0, 0.0], [1e-4, 1e-4]])
    expected = x.double() / torch.sqrt(x.double().square().mean(-1, keepdim=True) + 2.0 ** -23)
    torch.testing.assert_close(gpt.rms_norm(x).double(), expected, rtol=1e-6, atol=1e-9)
    assert gpt.rms_norm(x.bfloat16()).dtype == torch.bfloat16


def test_rotation_depends_on_relative_positions_only():
    model = gpt.GPT(tiny_config(rope_dims=6, global_ttt_chunk_tokens=500))
    q, k = torch.randn(2, 1, 1, 1, 8).unbind()

    def score(i, j):
        return (gpt.rotate(q, *model.rope[:, [i]]) * gpt.rotate(k, *model.rope[:, [j]])).sum()

    torch.testing.assert_close(score(3, 1), score(403, 401), rtol=0, atol=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3
    assert torch.equal(gpt.rotate(q, *model.rope[:, [7]])[..., 6:], q[..., 6:])


def test_rotary_angles_are_exact_in_fp32_far_into_a_row():
    model = gpt.GPT(tiny_config(rope_dims=4, global_ttt_chunk_tokens=98304))
    angle = 98303 * 10000.0 ** (-2 * np.arange(2) / 4)
    np.testing.assert_allclose(model.rope[:, 98303, 0].numpy(), [np.cos(angle), np.sin(angle)], atol=1e-7)


def test_a_row_longer_than_any_of_the_configuration_is_refused():
    cfg = tiny_config()
    tokens = torch.randint(2, 64, (1, cfg.longest_row + 1))
    with pytest.raises(ValueError, match=f"at most {cfg.longest_row} tokens.*found {cfg.longest_row + 1}"):
        gpt.GPT(cfg)(tokens, looping=False)
    assert gpt.GPT(cfg)(tokens[:, 1:], looping=False).shape == (1, cfg.longest_row, cfg.model_dim)


def test_smear_gate_reads_the_previous_token_except_at_bos_and_at_the_row_start():
    emb, window = torch.randn(8, 16), 6
    smear_w, smear_lambda = torch.randn(window), torch.tensor([0.7])
    tokens = torch.tensor([[3, 4, 1, 5, 5]])
    expected = []
    for at, token in enumerate(tokens[0].tolist()):
        e = emb[token]
        if at and token != gpt.BOS:
            e = e + 0.7 * torch.sigmoid(smear_w @ emb[token][:window]) * emb[tokens[0, at - 1]]
        expected.append(e / (e.square().mean() + 2.0 ** -23).sqrt())
    torch.testing.assert_close(gpt.embed(tokens, emb, smear_w, smear_lambda, torch.float32)[0], torch.stack(expected))


def test_full_exclusive_attention_leaves_nothing_along_the_own_value():
    cfg = tiny_config()
    model = random_model(cfg)
    with torch.no_grad():
        model.xsa_alpha.fill_(20.0)                                   # tanh = 1
    seen = {}

    def tap(layer, kind, x):
        seen.setdefault(kind, x)
    tokens = torch.randint(2, 64, (1, 12))
    model(tokens, looping=False, tap=tap)
    value = F.linear(seen["qkv"], model.wv[0]).view(12, cfg.num_kv_heads, 1, cfg.head_dim)
    heads = seen["o"].view(12, cfg.num_kv_heads, -1, cfg.head_dim)
    cosine = F.cosine_similarity(heads, value.expand_as(heads), dim=-1)
    assert cosine[1:].abs().max() < 1e-4                              # token 0 sees only itself: nothing is left of it
    assert heads[0].abs().max() < 1e-5


def test_mlp_squares_a_leaky_relu():
    unused = dict.fromkeys(gpt.LayerWeights._fields, torch.empty(0))
    w = gpt.LayerWeights(**unused | {"w_up": torch.eye(2), "w_down": torch.eye(2)})
    out = gpt.mlp(torch.tensor([[[2.0, -2.0]]]), w, gpt.LayerAdapters(), None)
    torch.testing.assert_close(out, torch.tensor([[[4.0, 0.36]]]))


def test_execution_order_of_the_record_model():
    cfg = gpt.Config()
    assert gpt.execution_order(cfg, False) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10])
    assert gpt.execution_order(cfg, True) == ([0, 1, 2, 3, 4, 5, 3, 4], [5, 3, 4, 5, 6, 7, 8, 9, 10])
    without = dataclasses.replace(cfg, num_loops=0)
    assert gpt.execution_order(without, True) == gpt.execution_order(cfg, False)


@LOOPING
@pytest.mark.parametrize("num_layers", [5, 6])
def test_the_decoder_takes_each_encoder_output_once_and_the_last_one_first(looping, num_layers):
    cfg = tiny_config(num_layers=num_layers)
    encoder, decoder = gpt.execution_order(cfg, looping)
    plan = gpt.execution_plan(cfg, looping)
    assert [execution.layer for execution in plan] == encoder + decoder
    assert [execution.is_parallel for execution in plan] == [layer >= 4 for layer in encoder + decoder]
    skips = [(execution.skip_from, execution.skip_row) for execution in plan if execution.skip_from is not None]
    assert skips == [(len(encoder) - 1 - row, row) for row in range(len(encoder))]
    assert all(plan[slot].is_kept == (slot < len(encoder)) for slot in range(len(plan)))


def test_a_tap_sees_the_input_of_every_matrix_of_every_execution_with_its_layer():
    cfg = tiny_config()
    seen = []
    tokens = torch.randint(2, 64, (1, 9))
    gpt.GPT(cfg)(tokens, looping=True, tap=lambda layer, kind, x: seen.append((layer, kind, x.shape[-1])))
    widths = {"qkv": cfg.model_dim, "o": cfg.model_dim, "up": cfg.model_dim, "down": cfg.mlp_dim}
    layers = [execution.layer for execution in gpt.execution_plan(cfg, True)]
    assert seen == [(layer, kind, width) for layer in layers for kind, width in widths.items()]


def test_the_record_model_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = gpt.GPT(gpt.Config())
    assert sum(p.numel() for p in model.parameters()) == 35_945_761
    assert len(model.skip_weights) == 8 and all(p.dtype == torch.float32 for p in model.parameters())


def test_initial_values_are_those_of_the_specification():
    cfg = tiny_config(qk_gain_init=5.25, tied_embed_init_std=0.005)
    model = gpt.GPT(cfg)
    for name in ("wq", "wk", "wv", "w_up"):
        for W in getattr(model, name):
            W = W if W.shape[0] <= W.shape[1] else W.T
            torch.testing.assert_close(W @ W.T, torch.eye(len(W)), rtol=0, atol=1e-5)
    constants = {"wo": 0, "w_down": 0, "q_gain": 5.25, "xsa_alpha": 0, "attn_gate": 0, "skip_gates": 0, "smear_w": 0,
                 "smear_lambda": 0, "attn_scale": 1, "mlp_scale": 1, "skip_weights": 1, "lane_post": 1,
                 "lane_resid": 1.1, "softcap_pos": 30, "softcap_neg": 30}
    for name, value in constants.items():
        assert torch.equal(getattr(model, name), torch.full_like(getattr(model, name), value)), name
    assert torch.equal(model.resid_mix, torch.tensor([1.0, 0.0])[:, None].expand_as(model.resid_mix))
    assert abs(model.tok_emb.std().item() / 0.005 - 1) < 0.1


def test_an_untrained_model_knows_nothing():
    cfg = tiny_config(tied_embed_init_std=0.005)
    model = gpt.GPT(cfg)
    row, (bounds, cap) = row_of(random_documents(np.random.default_rng(6), 96))
    loss = model.loss(row[0], row[0].roll(-1), bounds, looping=False, segment_cap=cap)
    assert abs(loss.item() - np.log(cfg.vocab_size)) < 0.05


def test_softcap_is_tanh_with_one_cap_for_each_sign():
    logits = torch.tensor([-100.0, -1.0, 0.0, 1.0, 100.0])
    out = gpt.softcap_logits(logits, torch.tensor(20.0), torch.tensor(5.0))
    expected = [5 * np.tanh(-20), 5 * np.tanh(-0.2), 0, 20 * np.tanh(0.05), 20 * np.tanh(5)]
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float32))


def test_both_caps_and_every_used_parameter_receive_gradients():
    model = random_model(tiny_config())
    row, (bounds, cap) = row_of(random_documents(np.random.default_rng(7), 96))
    row = training_row(row[0], row[0].roll(-1), bounds)
    _, grads = gpt.row_gradients(model, row, looping=True, segment_cap=cap)
    assert grads.keys() == {name for name, _ in model.named_parameters()}
    for name, grad in grads.items():
        assert grad.abs().sum() > 0, name


@LOOPING
def test_row_gradients_are_what_backward_accumulates_to_the_last_bit(looping):
    model = random_model(tiny_config())
    row, (bounds, cap) = row_of(random_documents(np.random.default_rng(7), 96))
    row = training_row(row[0], row[0].roll(-1), bounds)
    found_loss, found = gpt.row_gradients(model, row, looping=looping, segment_cap=cap)
    assert all(p.grad is None for p in model.parameters())
    loss = model.loss(row.inputs, row.targets, row.cu_seqlens, looping=looping, segment_cap=cap)
    loss.backward()
    assert torch.equal(found_loss, loss) and not found_loss.requires_grad
    for name, p in model.named_parameters():
        assert torch.equal(found[name], p.grad) and found[name].is_contiguous(), name


def test_frozen_parameters_have_no_gradient():
    model = random_model(tiny_config())
    freeze_caps(model, 30.0)
    tokens = torch.randint(2, 64, (32,))
    row = training_row(tokens, tokens.roll(-1), torch.tensor([0, 32], dtype=torch.int32))
    _, grads = gpt.row_gradients(model, row, looping=True, segment_cap=32)
    assert {name for name, _ in model.named_parameters()} - grads.keys() == {"softcap_pos", "softcap_neg"}


def test_weights_are_constants_beside_adapters():
    cfg = tiny_config()
    model = random_model(cfg)
    slots = len(gpt.execution_plan(cfg, True))
    bank = gpt.AdapterBank(cfg, slots, 2)
    leaf = torch.randn_like(bank.params).requires_grad_()
    adapters, head = bank.adapters(leaf)
    hidden = model(torch.randint(2, 64, (2, 9)), looping=True, adapters=adapters)
    nll, _ = model.score(hidden.flatten(0, 1), torch.zeros(18, dtype=torch.long), None, head(hidden).flatten(0, 1))
    nll.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert leaf.grad is not None


def test_training_loss_is_the_mean_of_the_scores():
    model = random_model(tiny_config())
    row, (bounds, cap) = row_of(random_documents(np.random.default_rng(8), 96))
    targets = row[0].roll(-1)
    loss = model.loss(row[0], targets, bounds, looping=True, segment_cap=cap)
    nll, _ = model.score(model(row, looping=True, segments=(bounds, cap))[0], targets)
    torch.testing.assert_close(loss, nll.mean(), rtol=1e-5, atol=0)


def test_hint_scores_are_log_probabilities_over_the_whole_vocabulary():
    model = random_model(tiny_config())
    hidden = model(torch.randint(2, 64, (1, 9)), looping=True)[0]
    every = torch.arange(64).repeat(9)
    _, log_q = model.score(hidden.repeat_interleave(64, 0), torch.zeros(9 * 64, dtype=torch.long), every)
    torch.testing.assert_close(log_q.view(9, 64).exp().sum(1), torch.ones(9))


# torch.compile

def tiny_compiled(num_loops, **changes):
    """The least model with a one-stream and a two-lane block, and skips between them."""
    cfg = tiny_config(num_layers=2, loop_start=0, loop_end=0, parallel_start_layer=1, num_loops=num_loops, compile=True,
                      **changes)
    return cfg, random_model(cfg), gpt.choose_ops(gpt.Run(cfg))


def attend_with_mask(q_NHK, k_NGK, v_NGK, cu_seqlens, max_seqlen):
    """Attention the compiler can see through; plain math looks at the bounds in Python, which splits the graph."""
    position = torch.arange(len(q_NHK))
    segment = torch.bucketize(position, cu_seqlens.long(), right=True)
    mask = (segment[:, None] == segment) & (position[:, None] >= position)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_NHK, k_NGK, v_NGK))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    with torch._dynamo.config.patch(recompile_limit=limit):            # what choose_ops changes is put back
        yield
    torch._dynamo.reset()


def with_ops(model, ops):
    """The same weights on other functions."""
    twin = gpt.GPT(model.cfg, model.compute_dtype, ops)
    twin.load_state_dict(model.state_dict())
    return twin


def assert_trains_alike(model, *choices):
    row, (bounds, cap) = row_of(random_documents(np.random.default_rng(9), 64))
    row = training_row(row[0], row[0].roll(-1), bounds)
    (loss, grads), (compiled_loss, compiled_grads) = (
        ops.row_gradients(with_ops(model, ops), row, looping=True, segment_cap=cap) for ops in choices)
    assert compiled_grads.keys() == grads.keys()
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=0)
    for name, grad in grads.items():
        assert (compiled_grads[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7, name


@pytest.mark.slow
def test_a_compiled_block_equals_the_eager_one_in_training(fresh_compiler, monkeypatch):
    """One function of the five, as scalar C++: compiling all of them would take the suite's whole minute."""
    monkeypatch.setattr(torch._inductor.config.cpp, "vec_isa_ok", False)
    _, model, compiled = tiny_compiled(num_loops=0)
    assert compiled.serial is not gpt.serial_block
    plain = gpt.Ops(attend=attend_with_mask)
    assert_trains_alike(model, plain, plain._replace(serial=compiled.serial))


def test_traced_graphs_equal_eager_ones_in_training(fresh_compiler, monkeypatch):
    """Tracing and differentiation as torch.compile does them, without the C++ compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    _, model, compiled = tiny_compiled(num_loops=1)
    assert_trains_alike(model, gpt.Ops(), compiled)


def test_traced_graphs_equal_eager_ones_with_adapters_at_every_size(fresh_compiler, monkeypatch):
    """The serial block is only traced: differentiation of symbolic sizes takes long, and the parallel block has it."""
    compile_ = torch.compile

    def traced(function, **options):
        return compile_(function, backend="eager" if function is gpt.serial_block else "aot_eager", **options)
    monkeypatch.setattr(torch, "compile", traced)
    cfg, model, compiled = tiny_compiled(num_loops=0, ttt_lora_rank=2)
    model = with_ops(model, compiled._replace(attend=attend_with_mask))
    eager = with_ops(model, gpt.Ops())
    num_slots = sum(map(len, gpt.execution_order(cfg, True)))
    bank = gpt.AdapterBank(cfg, num_slots, 4)
    bank.params.normal_()
    for (_, _, letter), part in bank.parts(bank.params).items():
        if letter == "B":
            part.mul_(0.02)
    for rows, length in ((4, 16), (3, 24)):
        tokens = torch.randint(2, 64, (rows, length))
        results = []
        for m in (eager, model):
            leaf = bank.params[:rows].clone().requires_grad_()
            slots, head = bank.adapters(leaf)
            hidden = m(tokens, looping=True, adapters=slots, sizes_vary=m is model)
            nll, log_q = m.score(hidden.flatten(0, 1), tokens.roll(-1, 1).flatten(), tokens.flatten(),
                                 head(hidden).flatten(0, 1))
            results.append((nll, log_q, *torch.autograd.grad(nll.sum(), leaf)))
        for expected, found in zip(*results):
            assert (found - expected).norm() <= 1e-4 * expected.norm() + 1e-6


def test_without_compile_the_operations_are_the_plain_functions_and_the_log_says_why(capsys):
    assert gpt.choose_ops(gpt.Run(tiny_config(compile=False))) == gpt.Ops()
    assert capsys.readouterr().out.splitlines() == [
        'attention backend:math reason:"no GPU"', 'loss backend:plain reason:"no GPU"',
        'blocks backend:plain reason:"no GPU; COMPILE=0"']


def test_compiled_blocks_keep_the_chosen_attention_and_loss(fresh_compiler, capsys):
    compiled = gpt.choose_ops(gpt.Run(tiny_config(compile=True)))
    assert compiled.plain() == gpt.Ops()
    assert compiled.row_gradients is gpt.row_gradients
    assert 'blocks backend:compiled reason:"no GPU"' in capsys.readouterr().out


@pytest.mark.parametrize(("changes", "reason"), [({"fused_ce_enabled": False}, "FUSED_CE_ENABLED=0"), ({}, "Triton")])
def test_the_plain_loss_is_chosen_with_a_reason(monkeypatch, capsys, changes, reason):
    monkeypatch.setattr(gpt, "triton", None)
    assert gpt.choose_loss(gpt.Run(tiny_config(**changes), device=torch.device("cuda"))) is gpt.softcap_loss
    assert reason in capsys.readouterr().out


def test_a_gpu_with_triton_gets_the_fused_loss(monkeypatch, capsys):
    monkeypatch.setattr(gpt, "triton", object())
    assert gpt.choose_loss(gpt.Run(tiny_config(), device=torch.device("cuda"))) == gpt.FusedSoftcapLoss.apply
    assert capsys.readouterr().out == 'loss backend:fused_triton reason:"first choice"\n'


@pytest.mark.parametrize(("capability", "changes", "reason"), [
    ((8, 0), {}, "before compute capability 9.0"), ((9, 0), {"block_kernels": False}, "BLOCK_KERNELS=0"),
    ((9, 0), {"model_dim": 32, "num_heads": 4}, "head width 8")])
def test_a_gpu_without_block_kernels_stops_the_run_unless_slowness_is_allowed(monkeypatch, capability, changes,
                                                                              reason):
    monkeypatch.setattr(gpt, "triton", object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(gpt, "choose_attention", lambda run: (gpt.attend_math, gpt.autograd_attention(gpt.attend_math)))
    sizes = {"model_dim": 64, "num_heads": 4, "num_kv_heads": 2, **changes}
    with pytest.raises(gpt.ConfigError, match=f"no block kernels .*{reason}.*ALLOW_SLOW=1"):
        gpt.choose_ops(gpt.Run(tiny_config(**sizes), device=torch.device("cuda")))
    slow = gpt.choose_ops(gpt.Run(tiny_config(**sizes, allow_slow=True), device=torch.device("cuda")))
    assert slow.row_gradients is gpt.row_gradients


def test_a_gpu_with_everything_gets_the_block_kernels(monkeypatch, capsys):
    monkeypatch.setattr(gpt, "triton", object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpt, "choose_attention", lambda run: (gpt.attend_math, gpt.autograd_attention(gpt.attend_math)))
    ops = gpt.choose_ops(gpt.Run(tiny_config(model_dim=64, num_heads=4), device=torch.device("cuda")))
    assert isinstance(ops.row_gradients.__self__, gpt.Kernels) and ops.score is gpt.kernel_score
    assert 'blocks backend:kernels reason:"first choice"' in capsys.readouterr().out


# GPU

@pytest.mark.gpu
@pytest.mark.parametrize(("N", "V"), [(300, 8192), (64, 777), (1, 100)])
def test_fused_loss_equals_the_plain_one(N, V):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, 128, generator=generator).to("cuda", torch.bfloat16)
    weight = (torch.randn(V, 128, generator=generator) * 0.8).cuda()
    targets = torch.randint(0, V, (N,), generator=generator).cuda()
    results = []
    for function in (gpt.FusedSoftcapLoss.apply, gpt.softcap_loss):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(),
                  torch.tensor(23.0, device="cuda", requires_grad=True),
                  torch.tensor(17.5, device="cuda", requires_grad=True)]
        loss = function(*leaves, targets)
        results.append((loss, torch.autograd.grad(3.0 * loss, leaves)))
    (fused, fused_grads), (plain, plain_grads) = results
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=0)
    for name, a, b in zip(("hidden", "weight", "cap_pos", "cap_neg"), fused_grads, plain_grads):
        assert a.dtype == b.dtype and a.shape == b.shape
        # The fused gradient of the logits is rounded to bf16 once, 8 bits; the caps' is summed before rounding.
        error = ((a.double() - b.double()).norm() / b.double().norm()).item()
        assert error < (1e-3 if name.startswith("cap") else 0.01), f"{name}: {error:.5f}"


@pytest.mark.gpu
@pytest.mark.slow
def test_compiled_graphs_equal_eager_ones_on_a_gpu(fresh_compiler):
    cfg = tiny_config(vocab_size=512, model_dim=256, global_ttt_chunk_tokens=160, rope_dims=16, num_layers=4, loop_start=1, loop_end=1,
                      parallel_start_layer=2, train_seq_len=96, compile=True, allow_slow=True)
    run = gpt.Run(cfg, device=torch.device("cuda"))
    model = random_model(cfg, compute_dtype=torch.bfloat16).cuda()
    compiled = gpt.choose_ops(run)
    for varies, length in ((False, 96), (True, 96), (True, 160)):
        row, (bounds, _) = row_of(random_documents(np.random.default_rng(0), length, 512), 96)
        row, bounds = row.cuda(), bounds.cuda()
        for looping in (False, True):
            results = []
            for ops in (compiled.plain(), compiled):
                hidden = model(row, looping=looping, segments=(bounds, 96), ops=ops, sizes_vary=varies)[0]
                loss = ops.loss(hidden, model.tok_emb, model.softcap_pos, model.softcap_neg, row[0].roll(-1))
                grads = torch.autograd.grad(loss, list(model.parameters()))
                results.append((loss.detach(), torch.cat([grad.flatten() for grad in grads])))
            (loss, grad), (compiled_loss, compiled_grad) = results
            # Compiled code keeps fp32 where eager code rounds between operations to bf16: differences of that size.
            torch.testing.assert_close(compiled_loss, loss, rtol=0.01, atol=0)
            assert (compiled_grad - grad).norm() <= 0.06 * grad.norm()


@pytest.mark.gpu
def test_a_gpu_in_bf16_agrees_with_the_reference_within_the_bf16_tolerance(load_vectors):
    forward, weights = load_vectors("model_forward"), load_vectors("model_weights")
    model = archive_model(weights, archive_config(weights, forward), torch.bfloat16).cuda()
    tokens, targets = (torch.from_numpy(forward[name]).cuda() for name in ("tokens_in", "tokens_target"))
    segments = torch.from_numpy(forward["cu_seqlens_padded"]).cuda(), int(forward["segment_cap"])
    for looping in (False, True):
        with torch.no_grad():
            hidden = model(tokens[None], looping=looping, segments=segments)[0]
            error = logits_of(model, hidden).cpu().numpy() - forward[f"logits_eval_{tag(looping)}"]
            nll = model.score(hidden, targets)[0].mean().item()
        assert np.abs(error).max() <= 2 * 0.21 and np.sqrt((error ** 2).mean()) <= 2 * 0.03
        assert abs(nll - forward[f"nll_eval_{tag(looping)}"].mean()) <= 2 * 4e-3
