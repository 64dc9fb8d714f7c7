"""Section 11: sums of nats, tokens and bytes, and plain evaluation of every target."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as gpt
from helpers import archive_config, archive_model, random_model, tiny_config
from toy_data import change_tokens, random_byte_counts, random_stream


def one_process(cfg: gpt.Config) -> gpt.Run:
    return gpt.Run(cfg)


# --- golden vectors -----------------------------------------------------------------------------------------

def recorded_setup(load_vectors):
    z, weights = load_vectors("eval_val"), load_vectors("model_weights")
    S, row_seqs = int(z["seq_len"]), int(z["row_seqs"])
    cfg = archive_config(weights, load_vectors("model_forward"), eval_seq_len=S,
                        val_batch_tokens=gpt.ROWS_PER_STEP * S * row_seqs)
    assert gpt.eval_row_tokens(cfg) == S * row_seqs
    return z, cfg, archive_model(weights, cfg)


def test_plain_evaluation_matches_the_recorded_one_on_the_sequences_it_covers(load_vectors):
    z, cfg, model = recorded_setup(load_vectors)
    covered = int(z["scored_seqs"]) * int(z["seq_len"]) + 1
    score = gpt.evaluate_plain(cfg, one_process(cfg), model, z["val_tokens"][:covered], z["val_bytes"][:covered])
    assert score.loss == pytest.approx(float(z["loss"]), abs=1e-5)
    assert score.bpb == pytest.approx(float(z["bpb"]), abs=1e-5)
    assert score.tokens == covered - 1


def test_plain_evaluation_also_covers_what_the_reference_drops(load_vectors):
    z, cfg, model = recorded_setup(load_vectors)
    tokens, counts = z["val_tokens"], z["val_bytes"]
    score = gpt.evaluate_plain(cfg, one_process(cfg), model, tokens, counts)
    assert score.tokens == len(tokens) - 1 and score.bytes == counts[1:].sum()
    covered = int(z["scored_seqs"]) * int(z["seq_len"]) + 1
    head, tail = (gpt.evaluate_plain(cfg, one_process(cfg), model, *(x[span] for x in (tokens, counts)))
                  for span in (slice(None, covered), slice(covered - 1, None)))
    assert score.loss * score.tokens == pytest.approx(head.loss * head.tokens + tail.loss * tail.tokens, rel=1e-6)


# --- meter --------------------------------------------------------------------------------------------------

def test_bits_per_byte_is_nats_over_ln2_times_bytes():
    meter = gpt.BpbMeter(one_process(tiny_config()))
    meter.add(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4, 0, 1]))
    meter.add(torch.tensor([[0.5, 7.0]]), torch.tensor([[2, 9]]), torch.tensor([[True, False]]))
    score = meter.result()
    assert score == gpt.Score(pytest.approx(6.5 / 4), pytest.approx(6.5 / (math.log(2) * 7)), 4, 7)


def test_masked_positions_may_hold_anything():
    meter = gpt.BpbMeter(one_process(tiny_config()))
    meter.add(torch.tensor([1.0, float("nan"), float("inf")]), torch.tensor([1, 5, 5]), torch.tensor([True, False, False]))
    assert meter.result() == gpt.Score(1.0, pytest.approx(1 / math.log(2)), 1, 1)


def test_meter_keeps_counting_single_tokens_beyond_fp32_precision():
    meter = gpt.BpbMeter(one_process(tiny_config()))
    meter.sums += torch.tensor([2.0**24, 2.0**24, 2.0**24], dtype=torch.float64)
    for _ in range(3):
        meter.add(torch.ones(1), torch.ones(1, dtype=torch.int64))
    assert meter.result() == gpt.Score(1.0, pytest.approx(1 / math.log(2)), 2**24 + 3, 2**24 + 3)


def test_targets_without_any_byte_are_refused():
    meter = gpt.BpbMeter(one_process(tiny_config()))
    meter.add(torch.ones(3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(gpt.DataError, match="byte sidecar is all zero"):
        meter.result()


# --- plain evaluation ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny_model():
    cfg = tiny_config()
    return cfg, random_model(cfg).requires_grad_(False)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(lengths=st.lists(st.integers(1, 120), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_every_target_is_counted_once_with_its_own_bytes(tiny_model, lengths, seed):
    cfg, model = tiny_model
    rng = np.random.default_rng(seed)
    tokens = random_stream(rng, [*lengths, 2], cfg.vocab_size)
    counts = random_byte_counts(rng, tokens)
    score = gpt.evaluate_plain(cfg, one_process(cfg), model, tokens, counts)
    assert (score.tokens, score.bytes) == (len(tokens) - 1, counts[1:].sum())


def test_context_is_cut_at_rows_documents_and_the_segment_cap(tiny_model):
    """The score equals that of each segment seen alone."""
    cfg, model = tiny_model
    rng = np.random.default_rng(3)
    tokens = random_stream(rng, [10, 70, 5, 1, 90, 45], cfg.vocab_size).astype(np.int64)
    counts = random_byte_counts(rng, tokens)
    width, nats = gpt.eval_row_tokens(cfg), 0.0
    for row in range(0, len(tokens) - 1, width):
        inputs, targets = tokens[row:row + width + 1][:-1], tokens[row:row + width + 1][1:]
        # Attention is cut at segments, SmearGate only at BOS: so hide the keys, not the tokens.
        bounds = [0]
        for at in range(1, len(inputs)):
            if inputs[at] == gpt.BOS or at - bounds[-1] == cfg.eval_seq_len:
                bounds.append(at)
        bounds = torch.tensor([*bounds, len(inputs)], dtype=torch.int32)
        hidden = model(torch.from_numpy(inputs)[None], looping=True, segments=(bounds, cfg.eval_seq_len))[0]
        nats += float(model.score(hidden, torch.from_numpy(targets))[0].double().sum())
    score = gpt.evaluate_plain(cfg, one_process(cfg), model, tokens.astype(np.uint16), counts)
    assert score.loss * score.tokens == pytest.approx(nats, rel=1e-7)


@pytest.mark.parametrize("world_size", (2, 4, 8))
def test_ranks_together_score_what_one_process_scores(tiny_model, world_size, monkeypatch):
    cfg, model = tiny_model
    rng = np.random.default_rng(4)
    tokens = random_stream(rng, [50, 300, 20, 2, 131], cfg.vocab_size)
    counts = random_byte_counts(rng, tokens)
    sums = []
    monkeypatch.setattr(gpt.BpbMeter, "result", lambda meter: sums.append(meter.sums) or None)
    for rank in range(world_size):
        run = SimpleNamespace(cfg=cfg, rank=rank, world_size=world_size, device=torch.device("cpu"),
                              beat=lambda: None)
        gpt.evaluate_plain(cfg, run, model, tokens, counts)
    gpt.evaluate_plain(cfg, one_process(cfg), model, tokens, counts)
    whole = sums.pop()
    total = torch.stack(sums).sum(0)
    assert torch.equal(total[1:], whole[1:]) and total[0].item() == pytest.approx(whole[0].item(), rel=1e-12)


def test_future_tokens_cannot_change_the_plain_score(tiny_model, monkeypatch):
    cfg, model = tiny_model
    rng = np.random.default_rng(5)
    tokens = random_stream(rng, [40, 60], cfg.vocab_size)
    changed = change_tokens(tokens, slice(70, None))
    kept = []
    monkeypatch.setattr(gpt.BpbMeter, "add", lambda meter, nll, counts, scored=None: kept.append(nll))
    monkeypatch.setattr(gpt.BpbMeter, "result", lambda meter: None)
    for stream in (tokens, changed):
        gpt.evaluate_plain(cfg, one_process(cfg), model, stream, np.ones(len(stream), np.uint16))
    first, second = torch.cat(kept[:len(kept) // 2]), torch.cat(kept[len(kept) // 2:])
    assert torch.equal(first[:69], second[:69]) and not torch.equal(first, second)


def test_logits_in_slices_give_the_same_score(tiny_model, monkeypatch):
    cfg, model = tiny_model
    rng = np.random.default_rng(6)
    tokens = random_stream(rng, [200], cfg.vocab_size)
    counts = random_byte_counts(rng, tokens)
    whole = gpt.evaluate_plain(cfg, one_process(cfg), model, tokens, counts)
    monkeypatch.setattr(gpt, "SCORE_CHUNK", 7)
    sliced = gpt.evaluate_plain(cfg, one_process(cfg), model, tokens, counts)
    assert sliced.bpb == pytest.approx(whole.bpb, rel=1e-6) and sliced[2:] == whole[2:]
