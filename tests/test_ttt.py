"""Section 13: planner, certified order, adapters, score-first phases, adaptation of the base."""
import dataclasses
import errno
import importlib.util
import json
import math
import os
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as gpt
import twins
from helpers import archive_config, archive_model, random_model, tiny_config
from toy_data import change_tokens, random_byte_counts, random_stream

KINDS = ("q", "k", "v", "o", "mlp", "head")


def as_rank(cfg: gpt.Config, rank: int, world_size: int) -> SimpleNamespace:
    """A rank that never meets the others: enough for work that is dealt without communication."""
    def generator(*keys: int) -> torch.Generator:
        return gpt.Run.generator(SimpleNamespace(cfg=cfg, device="cpu"), *keys)

    return SimpleNamespace(cfg=cfg, rank=rank, world_size=world_size, device=torch.device("cpu"),
                           generator=generator, beat=lambda: None)


# --- golden vectors: windows, documents, queue --------------------------------------------------------------

def test_windows_documents_and_queue_match_the_recorded_ones(load_vectors):
    z = load_vectors("ttt_windows")
    chunk, window = int(z["chunk"]), int(z["window"])
    columns = dict(zip(str(z["window_columns"]).split(","), z["window_table"].T))
    for k in range(len(z["window_table"])):
        pred_len, index = columns["pred_len"][k:k + 1], int(columns["chunk_index"][k])
        start, length, offset, count = gpt.chunk_window(pred_len, index, chunk, window)
        assert gpt.num_chunks(pred_len + 1, chunk) == columns["num_chunks"][k]
        for name, values in (("win_start", start), ("win_len", length), ("chunk_offset", offset),
                             ("chunk_len", count)):
            assert values == columns[name][k], (name, k)
        assert min(chunk * (index + 1), window) == columns["row_width"][k]
    docs = gpt.find_documents(z["tokens"])
    assert np.array_equal(docs.start, z["doc_start"]) and np.array_equal(docs.length, z["doc_len"])
    check_queue(z, docs, int(z["batch_size"]), chunk, window)


def check_queue(z, docs: gpt.Documents, batch_size: int, chunk: int, window: int) -> None:
    """One lane without a bound on tokens works through the reference's queue, and hands on the full adapter set."""
    [[queue]] = gpt.plan_batches(docs, batch_size=batch_size, lanes=1, chunk=chunk, window=window)
    assert [batch.index for batch in queue] == z["queue_batch_index"].tolist()
    is_full = [len(batch.docs) == batch_size for batch in queue]
    for k, (batch, ids) in enumerate(zip(queue, z["queue_doc_ids"])):
        assert list(batch.docs)[::-1] == ids[ids >= 0].tolist()
        assert batch.carries == (is_full[k] and any(is_full[:k]))


# --- golden vectors: the miniature evaluation ---------------------------------------------------------------

class RecordedDraws:
    """Initial A in the order in which the reference created its adapter sets: set 0 is the reusable one, set up
    before the queue starts; a set of another size is made when its batch comes; after the base has been adapted
    there is a fresh reusable one."""

    def __init__(self, z, prefix: str) -> None:
        self.z, self.prefix = z, prefix
        self.unused = list(range(len(z[f"{prefix}_lora_batch_sizes"])))
        self.full = int(z["batch"])
        self.current = -1

    def start_phase(self) -> None:
        """A reusable set nobody used before the base was adapted is gone."""
        if 0 in self.unused:
            self.unused.remove(0)

    def __call__(self, kind: str, slot: int, shape: tuple[int, ...]) -> torch.Tensor:
        if kind == "q" and slot == 0:
            sizes = self.z[f"{self.prefix}_lora_batch_sizes"]
            self.current = next(k for k in self.unused if sizes[k] == shape[0])
            self.unused.remove(self.current)
        A = self.z[f"{self.prefix}_lora{self.current}_{kind}_A"]
        A = torch.from_numpy(A if kind == "head" else A[slot]).clone()
        assert A.shape == shape
        return A.flip(0)                                            # our rows are longest first


def recorded_evaluation(load_vectors):
    z, weights = load_vectors("ttt_eval"), load_vectors("model_weights")
    assert float(z["eps"]) == 1e-10
    cfg = archive_config(
        weights, load_vectors("model_forward"), ttt_chunk_size=int(z["chunk"]), ttt_eval_seq_len=int(z["window"]),
        ttt_batch_size=int(z["batch"]), ttt_lora_rank=int(z["rank"]), ttt_lora_alpha=float(z["alpha"]),
        ttt_lora_lr=float(z["lora_lr"]), ttt_weight_decay=float(z["weight_decay"]), ttt_beta2=float(z["beta2"]),
        phased_ttt_prefix_docs=int(z["prefix_docs"]), global_ttt_chunk_tokens=int(z["global_chunk_tokens"]),
        global_ttt_momentum=float(z["global_momentum"]), global_ttt_grad_clip=float(z["global_clip"]))
    assert int(z["global_seq_len"]) == cfg.ttt_eval_seq_len
    return z, weights, cfg


def test_recorded_evaluation_has_the_same_documents_and_queue(load_vectors):
    z, _, cfg = recorded_evaluation(load_vectors)
    docs = gpt.find_documents(z["val_tokens"])
    assert np.array_equal(docs.start, z["doc_start"]) and np.array_equal(docs.length, z["doc_len"])
    check_queue(z, docs, cfg.ttt_batch_size, cfg.ttt_chunk_size, cfg.ttt_eval_seq_len)


def recorded_tags(load_vectors) -> list[str]:
    return [name.removesuffix("_nll_by_target") for name in load_vectors("ttt_eval") if name.endswith("_nll_by_target")]


def test_recorded_evaluation_has_the_same_scores_and_adapted_weights(load_vectors):
    tags = recorded_tags(load_vectors)
    assert tags
    for tag in tags:
        check_recorded_tag(load_vectors, tag)


def put_hints(scorer: gpt.Scorer, order: np.ndarray, hint: np.ndarray, boost: np.ndarray) -> None:
    """Hints and boosts of every target, where the steps look for them."""
    scorer.stream.hints[:len(order)] = torch.from_numpy(hint.astype(np.int32)[order])
    scorer.stream.boost[:len(order)] = torch.from_numpy(boost.astype(np.float32)[order])


def banked_nll(scorer: gpt.Scorer, num_targets: int) -> np.ndarray:
    """nll by target, NaN where none was banked; no target may have been banked twice."""
    targets, nll = (x[:int(scorer.log_size)].numpy() for x in (scorer.log_target, scorer.log_nll))
    assert len(np.unique(targets)) == len(targets)
    found = np.full(num_targets, np.nan)
    found[targets] = nll
    return found


def check_recorded_tag(load_vectors, tag: str) -> None:
    z, weights, cfg = recorded_evaluation(load_vectors)
    is_phased, lr = tag.startswith("phase"), float(z["global_biglr" if "biglr" in tag else "global_lr"])
    cfg = dataclasses.replace(cfg, global_ttt_lr=lr, phased_ttt_prefix_docs=cfg.phased_ttt_prefix_docs * is_phased)
    run, model, tokens = gpt.Run(cfg), archive_model(weights, cfg).requires_grad_(False), z["val_tokens"]
    C, E = cfg.ttt_chunk_size, cfg.ttt_eval_seq_len
    docs = gpt.find_documents(tokens)
    phases = gpt.plan_batches(docs, batch_size=cfg.ttt_batch_size, lanes=1, chunk=C, window=E,
                              prefix_docs=cfg.phased_ttt_prefix_docs)
    scored = gpt.certified_order(phases, docs, C)
    boost = np.where(z["gate"], z["boost"], 0) * tag.endswith("tilt_on")
    scorer = gpt.Scorer(cfg, run, model, len(tokens), keep_log=True)
    scorer.load(tokens, z["val_bytes"])
    scorer.follow(docs, scored)
    put_hints(scorer, gpt.targets_in_order(scored), z["hint"], boost)
    draws = RecordedDraws(z, tag.split("_")[0])
    for number, phase in enumerate(phases):
        gpt.score_phase(scorer, phase, [draws])
        if number == 0 and is_phased:
            chosen = gpt.select_prefix(scored, docs, C, cfg.phased_ttt_prefix_docs)
            # The reference trains with a symmetric cap of 30 that nothing moves, and scores with its own caps.
            caps = model.softcap_pos.item(), model.softcap_neg.item()
            model.requires_grad_(True)
            for cap in (model.softcap_pos, model.softcap_neg):
                cap.requires_grad_(False).fill_(float(load_vectors("model_forward")["train_softcap"]))
            assert gpt.adapt_base(cfg, run, model, tokens, docs, chosen) > 0
            model.requires_grad_(False)
            model.softcap_pos.fill_(caps[0]), model.softcap_neg.fill_(caps[1])
            draws.start_phase()
    score, nll = scorer.meter.result(), banked_nll(scorer, len(tokens) - 1)
    assert score.tokens == len(tokens) - 1 and score.bytes == z["val_bytes"][1:].sum()
    assert score.bpb == pytest.approx(float(z[f"{tag}_bpb"]), abs=5e-5), tag
    assert score.loss == pytest.approx(float(z[f"{tag}_loss"]), abs=1e-4), tag
    np.testing.assert_allclose(nll, z[f"{tag}_nll_by_target"], rtol=0, atol=5e-3, err_msg=tag)
    for key in z:
        name = key.removeprefix(f"{tag}_weight_delta_norm_")
        if name != key:
            delta = float((getattr(model, name) - torch.from_numpy(weights[name])).double().norm())
            assert delta == pytest.approx(float(z[key]), rel=1e-3, abs=1e-7), (tag, name)
        after = key.removeprefix(f"{tag.removesuffix('_tilt_on')}_weights_after_")
        if after != key and tag.endswith("tilt_on"):
            np.testing.assert_allclose(getattr(model, after).numpy(), z[key], rtol=0, atol=1e-5, err_msg=key)


# --- planner and certified order ----------------------------------------------------------------------------

# Lengths of whole documents in a stream: 1 is a lone BOS, also at the very end.
lengths_of_documents = st.lists(st.integers(1, 80), max_size=30).map(lambda rest: [2, *rest])
plan_settings = dict(lengths=lengths_of_documents, batch_size=st.integers(1, 6), lanes=st.integers(1, 8),
                     max_tokens=st.sampled_from((1, 16, 40, 64, float("inf"))),
                     max_chunks=st.sampled_from((4, 12, float("inf"))), prefix_docs=st.integers(0, 40),
                     chunk=st.integers(1, 9))


def make_plan(lengths, batch_size, lanes, max_tokens, max_chunks, prefix_docs, chunk):
    tokens = random_stream(np.random.default_rng(0), lengths)
    docs = gpt.find_documents(tokens)
    phases = gpt.plan_batches(docs, batch_size=batch_size, lanes=lanes, max_tokens=max_tokens,
                              max_chunks=max_chunks, prefix_docs=prefix_docs, chunk=chunk, window=WINDOW)
    return tokens, docs, phases


WINDOW = 16


@settings(max_examples=60)
@given(lengths=lengths_of_documents)
def test_documents_own_every_target_once_and_a_lone_final_bos_none(lengths):
    tokens = random_stream(np.random.default_rng(0), lengths)
    docs = gpt.find_documents(tokens)
    targets = np.concatenate([np.arange(s, s + n - 1) for s, n in zip(docs.start, docs.length)])
    assert np.array_equal(targets, np.arange(len(tokens) - 1))
    assert (docs.length >= 2).all() and (tokens[docs.start] == gpt.BOS).all()
    assert len(docs.start) == len(lengths) - (lengths[-1] == 1)


@settings(max_examples=80)
@given(**plan_settings)
def test_plan_holds_every_document_once(lengths, batch_size, lanes, max_tokens, max_chunks, prefix_docs, chunk):
    _, docs, phases = make_plan(lengths, batch_size, lanes, max_tokens, max_chunks, prefix_docs, chunk)
    batches = [batch for phase in phases for lane in phase for batch in lane]
    assert sorted(doc for batch in batches for doc in batch.docs) == list(range(len(docs.start)))
    assert all(len(phase) == lanes for phase in phases) and 1 <= len(phases) <= 2
    for batch in batches:
        of_batch = docs.length[list(batch.docs)]
        window = min(chunk * gpt.num_chunks(of_batch.max(), chunk), WINDOW)
        assert (np.diff(of_batch) <= 0).all() and 1 <= len(batch.docs) <= batch_size
        longest = int(gpt.num_chunks(of_batch.max(), chunk))
        assert (len(batch.docs) * window <= max_tokens and len(batch.docs) * longest <= max_chunks) or len(batch.docs) == 1
        steps, counts = batch.steps, gpt.num_chunks(of_batch, chunk)
        assert steps.rows.tolist() == [(counts > k).sum() for k in range(counts.max())]
        assert steps.width.tolist() == [min(chunk * (k + 1), WINDOW) for k in range(counts.max())]
    for lane in (lane for phase in phases for lane in phase):
        rows = [0, *(len(batch.docs) for batch in lane)]
        assert [batch.carries for batch in lane] == [a == b for a, b in zip(rows, rows[1:])]
        starts = np.concatenate([[0], *(batch.steps.start_us for batch in lane)])
        costs = np.concatenate([[0], *(batch.steps.cost_us for batch in lane)])
        assert np.array_equal(starts[1:], np.cumsum(costs)[:-1])    # one step after the other
    if max_tokens < float("inf"):                                   # the longest chain of steps begins at once
        assert len(phases[0][0][0].docs) == 1 and phases[0][0][0].docs[0] == np.argsort(docs.length, kind="stable")[-1]


@settings(max_examples=80)
@given(**plan_settings)
def test_first_phase_ends_with_the_batch_that_reaches_the_prefix(lengths, batch_size, lanes, max_tokens, max_chunks, prefix_docs,
                                                                 chunk):
    _, docs, phases = make_plan(lengths, batch_size, lanes, max_tokens, max_chunks, prefix_docs, chunk)
    total = len(docs.start)
    in_phase = [sum(len(batch.docs) for lane in phase for batch in lane) for phase in phases]
    if prefix_docs == 0 or in_phase[0] == total:
        assert in_phase == [total]
    else:
        assert in_phase[0] >= prefix_docs > in_phase[0] - batch_size and in_phase[1] > 0
        # Longest first: whatever waits for the second phase is no longer than what was in the first.
        longest = [max(docs.length[list(b.docs)].max() for lane in phase for b in lane) for phase in phases]
        assert longest[1] <= longest[0]


@settings(max_examples=80)
@given(**plan_settings)
def test_certified_order_holds_every_target_once(lengths, batch_size, lanes, max_tokens, max_chunks, prefix_docs, chunk):
    tokens, docs, phases = make_plan(lengths, batch_size, lanes, max_tokens, max_chunks, prefix_docs, chunk)
    order = gpt.targets_in_order(gpt.certified_order(phases, docs, chunk))
    assert np.array_equal(np.sort(order), np.arange(len(tokens) - 1))


@settings(max_examples=80)
@given(**plan_settings)
def test_certified_order_respects_chunks_lanes_and_phases(lengths, batch_size, lanes, max_tokens, max_chunks, prefix_docs, chunk):
    """Whatever a rank has learnt from when it scores a chunk comes before that chunk in the order."""
    _, docs, phases = make_plan(lengths, batch_size, lanes, max_tokens, max_chunks, prefix_docs, chunk)
    scored = gpt.certified_order(phases, docs, chunk)
    order = gpt.targets_in_order(scored)
    assert np.array_equal(order[np.cumsum(scored.size) - scored.size], docs.start[scored.doc] + chunk * scored.chunk)
    position = {pair: k for k, pair in enumerate(zip(scored.doc.tolist(), scored.chunk.tolist()))}
    phase_of = {doc: number for number, phase in enumerate(phases) for lane in phase for b in lane for doc in b.docs}
    assert (np.diff(scored.phase) >= 0).all()
    assert all(phase_of[doc] == number for doc, number in zip(scored.doc.tolist(), scored.phase.tolist()))
    counts = gpt.num_chunks(docs.length, chunk)
    for phase in phases:
        for lane in phase:
            finished = -1                                           # last position of the lane's earlier batches
            for batch in lane:
                for doc in batch.docs:                              # their adapters start from what those batches left
                    places = [position[doc, k] for k in range(counts[doc])]
                    assert places[0] > finished and places == sorted(places)
                finished = max(position[doc, counts[doc] - 1] for doc in batch.docs)


@settings(max_examples=80)
@given(**plan_settings)
def test_base_adapts_only_on_documents_that_have_been_scored(lengths, batch_size, lanes, max_tokens, max_chunks, prefix_docs, chunk):
    _, docs, phases = make_plan(lengths, batch_size, lanes, max_tokens, max_chunks, prefix_docs, chunk)
    scored = gpt.certified_order(phases, docs, chunk)
    chosen = gpt.select_prefix(scored, docs, chunk, prefix_docs)
    first_phase = {doc for lane in phases[0] for batch in lane for doc in batch.docs}
    assert set(chosen.tolist()) <= first_phase
    assert len(chosen) == len(set(chosen.tolist())) == min(prefix_docs, len(docs.start))
    assert (np.diff(docs.length[chosen]) >= 0).all()
    # The first by their last chunk: nobody who was left out finished before somebody who was taken.
    last = {doc: k for k, doc in enumerate(scored.doc.tolist()) if doc in first_phase}
    if len(chosen) and len(first_phase) > len(chosen):
        assert max(last[doc] for doc in chosen.tolist()) < min(last[doc] for doc in first_phase - set(chosen.tolist()))


def test_planned_cost_grows_with_rows_and_window_and_is_a_whole_number():
    rows, widths = (x.ravel() for x in np.meshgrid(np.arange(1, 80), np.arange(1, 2600, 37), indexing="ij"))
    cost = gpt.step_cost_us(rows, widths).reshape(79, -1)
    assert cost.dtype == np.int64 and cost.min() >= 1
    assert (np.diff(cost, axis=0) >= 0).all() and (np.diff(cost, axis=1) >= 0).all()
    known = gpt.step_cost_us(np.repeat(list(gpt.STEP_MS), len(gpt.STEP_WINDOWS)),
                             np.tile(gpt.STEP_WINDOWS, len(gpt.STEP_MS)))
    assert np.allclose(known, 1000 * np.concatenate(list(gpt.STEP_MS.values())))


def test_every_step_of_a_plan_has_a_bucket_that_warm_up_captures():
    cfg = gpt.Config()
    lengths = np.sort(np.random.default_rng(0).lognormal(6.3, 1.1, 4000).astype(np.int64) + 2)
    lengths[-1] = 97_114
    docs = gpt.Documents(np.cumsum(lengths) - lengths, lengths)
    buckets = gpt.step_buckets(cfg.ttt_batch_size, cfg.ttt_eval_seq_len, cfg.ttt_chunk_size)
    keys = set(gpt.step_keys(cfg, buckets))
    phases = gpt.plan_batches(docs, batch_size=cfg.ttt_batch_size, max_tokens=gpt.BATCH_TOKENS,
                              max_chunks=gpt.BATCH_CHUNKS, prefix_docs=500)
    for batch in (batch for phase in phases for lane in phase for batch in lane):
        rows, widths = gpt.pad_to(buckets.rows, batch.steps.rows), gpt.pad_to(buckets.windows, batch.steps.width)
        assert (rows >= batch.steps.rows).all() and (widths >= batch.steps.width).all()
        assert {(r, w, learn) for r, w in zip(rows.tolist(), widths.tolist()) for learn in (False, True)} <= keys


# --- scoring a batch ----------------------------------------------------------------------------------------

# The least model with a loop, two lanes and a skip: its depth is no matter here.
SMALL = dict(num_layers=2, num_loops=1, loop_start=0, loop_end=0, parallel_start_layer=1)


class Setup:
    """A random model and stream, and the scores of its targets for a given plan."""

    def __init__(self, repeats: int = 1, **changes) -> None:
        self.cfg = tiny_config(**{**SMALL, "ttt_lora_lr": 0.02, "ttt_batch_size": 3, "ttt_lora_alpha": 8.0, "token_order": 3,
                                  **changes})
        torch.manual_seed(0)
        self.model = random_model(self.cfg).requires_grad_(False)
        rng = np.random.default_rng(2)
        lengths = [20, 45, 1, 9, 70, 30, 1, 2, 17, 33]
        self.tokens = random_stream(rng, repeats * lengths, self.cfg.vocab_size)
        # Documents of the same lengths out of three words: hints open, and some are right.
        self.monotonous = np.where(self.tokens == gpt.BOS, gpt.BOS, 20 + self.tokens % 3).astype(np.uint16)
        self.byte_counts = random_byte_counts(rng, self.tokens)
        self.docs = gpt.find_documents(self.tokens)

    def scorer(self, tokens=None, rank: int = 0, world_size: int = 1, phases=None, hints: twins.Hints | None = None,
               cfg: gpt.Config | None = None, buckets: gpt.Buckets | None = None) -> gpt.Scorer:
        """Everything is ready to score these phases; no adaptation of the base."""
        cfg, tokens = cfg or self.cfg, self.tokens if tokens is None else tokens
        scorer = gpt.Scorer(cfg, as_rank(cfg, rank, world_size), self.model, len(tokens), keep_log=True, buckets=buckets)
        scorer.load(tokens, self.byte_counts)
        scored = gpt.certified_order(phases or self.plan(), self.docs, cfg.ttt_chunk_size)
        scorer.follow(self.docs, scored)
        if hints is not None:
            put_hints(scorer, gpt.targets_in_order(scored), hints.hint,
                      hints.gate * cfg.token_boost)
        return scorer

    def score(self, tokens=None, phases=None, **rest) -> np.ndarray:
        """nll of every target this rank scores, NaN elsewhere."""
        phases = phases or self.plan()
        scorer = self.scorer(tokens, phases=phases, **rest)
        draws = [gpt.lane_draws(scorer.cfg, scorer.run, lane) for lane in range(gpt.LANES)]
        for phase in phases:
            gpt.score_phase(scorer, phase, draws)
        return banked_nll(scorer, len(self.tokens) - 1)

    def plan(self, lanes: int = gpt.LANES, prefix_docs: int = 0, max_tokens: float = math.inf) -> list[gpt.Phase]:
        return gpt.plan_batches(self.docs, batch_size=self.cfg.ttt_batch_size, lanes=lanes, prefix_docs=prefix_docs,
                                max_tokens=max_tokens, chunk=self.cfg.ttt_chunk_size, window=self.cfg.ttt_eval_seq_len)

    def order(self, phases) -> np.ndarray:
        C = self.cfg.ttt_chunk_size
        return gpt.targets_in_order(gpt.certified_order(phases, self.docs, C))

    def hints(self, tokens, phases) -> twins.Hints:
        doc_start = np.repeat(self.docs.start, self.docs.length - 1)
        return twins.ngram_hints(tokens, self.order(phases), doc_start, self.cfg.token_order - 1, 0.5)


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup()


def test_every_target_gets_one_finite_score(setup):
    assert np.isfinite(setup.score()).all()


def test_plan_does_not_know_ranks():
    """Ranks only choose which of the eight lanes they run: each target is scored on one of them, with the same
    bits. Batches are bounded by tokens, some carry adapters, there are two phases, and every lane has work."""
    setup = Setup(repeats=2)
    phases = setup.plan(prefix_docs=8, max_tokens=16)
    assert len(phases) == 2 and all(phases[1]) and len(phases[1]) == gpt.LANES
    assert any(batch.carries for lane in phases[1] for batch in lane)
    alone = setup.score(phases=phases)
    for world_size in (2, 4, 8):
        parts = np.stack([setup.score(phases=phases, rank=rank, world_size=world_size) for rank in range(world_size)])
        assert (np.isfinite(parts).sum(0) == 1).all()               # each target on exactly one rank
        assert np.array_equal(np.nansum(parts, 0), alone)


@pytest.mark.parametrize("lanes", (1, 3))
def test_future_tokens_cannot_change_the_score(setup, lanes):
    """With hints, in the certified order over all documents: the code of a token knows only tokens before it."""
    phases = setup.plan(lanes)
    order = setup.order(phases)
    before = setup.score(phases=phases, hints=setup.hints(setup.tokens, phases))
    for cut in np.linspace(1, len(order) - 20, 7).astype(int):
        changed = change_tokens(setup.tokens, order[cut:] + 1, setup.cfg.vocab_size)
        after = setup.score(changed, phases=phases, hints=setup.hints(changed, phases))
        assert np.array_equal(before[order[:cut]], after[order[:cut]]), cut
        assert (before[order[cut:]] != after[order[cut:]]).any()


def test_changing_the_next_chunk_leaves_the_scores_of_a_chunk_untouched(setup):
    C, before = setup.cfg.ttt_chunk_size, setup.score()
    doc = int(setup.docs.length.argmax())
    start, targets = setup.docs.start[doc], setup.docs.length[doc] - 1
    for chunk in range(targets // C):
        first = start + C * (chunk + 1)                             # first target of the next chunk
        changed = change_tokens(setup.tokens, slice(first + 1, start + targets + 1), setup.cfg.vocab_size)
        after = setup.score(changed)
        assert np.array_equal(before[start:first], after[start:first]), chunk
        assert first >= start + targets or (before[first:start + targets] != after[first:start + targets]).all()


def test_a_chunk_learns_from_the_chunk_before_it(setup):
    """The counterpart: later chunks do change, beyond what their context explains."""
    C, E = setup.cfg.ttt_chunk_size, setup.cfg.ttt_eval_seq_len
    doc = int(setup.docs.length.argmax())
    start, targets = setup.docs.start[doc], setup.docs.length[doc] - 1
    changed = change_tokens(setup.tokens, slice(start + 1, start + C), setup.cfg.vocab_size)
    beyond = slice(start + C + E + 2, start + targets)              # windows there do not reach the changed tokens
    assert (setup.score()[beyond] != setup.score(changed)[beyond]).all()


def batch_of(docs: gpt.Documents, cfg: gpt.Config, members) -> gpt.Batch:
    members = sorted(members, key=lambda doc: -docs.length[doc])
    buckets = gpt.step_buckets(cfg.ttt_batch_size, cfg.ttt_eval_seq_len, cfg.ttt_chunk_size)
    steps = gpt.batch_steps(docs.length[members], cfg.ttt_chunk_size, cfg.ttt_eval_seq_len, buckets)
    return gpt.Batch(0, tuple(members), False, steps)


def test_documents_of_a_batch_do_not_see_each_other(setup):
    """Bit for bit: what another document holds changes nothing, also after adapters have learnt from it."""
    members = np.argsort(setup.docs.length, kind="stable")[-3:].tolist()

    def scores(tokens: np.ndarray) -> np.ndarray:
        scorer = setup.scorer(tokens)
        scorer.score_batch(batch_of(setup.docs, setup.cfg, members), gpt.lane_draws(setup.cfg, scorer.run, 0))
        return banked_nll(scorer, len(tokens) - 1)
    before = scores(setup.tokens)
    for changed_doc in members:
        start, length = setup.docs.start[changed_doc], setup.docs.length[changed_doc]
        after = scores(change_tokens(setup.tokens, slice(start, start + length), setup.cfg.vocab_size))
        for doc in members:
            span = slice(setup.docs.start[doc], setup.docs.start[doc] + setup.docs.length[doc] - 1)
            if doc == changed_doc:
                assert (before[span] != after[span]).all()
            else:
                assert np.array_equal(before[span], after[span])


def slots(cfg: gpt.Config) -> int:
    return sum(map(len, gpt.execution_order(cfg, True)))


def test_scores_with_zero_learning_rate_are_those_of_the_model_alone(setup):
    """B stays zero, so every chunk is scored by plain forward passes over its window."""
    cfg = dataclasses.replace(setup.cfg, ttt_lora_lr=0.0)
    C, E = cfg.ttt_chunk_size, cfg.ttt_eval_seq_len
    want = np.full(len(setup.tokens) - 1, np.nan)
    for start, length in zip(setup.docs.start, setup.docs.length):
        for first in range(0, length - 1, C):
            end = min(first + C, length - 1)
            window = slice(start + max(0, end - E), start + end)
            hidden = setup.model(torch.from_numpy(setup.tokens[window].astype(np.int64))[None], looping=True)[0]
            targets = torch.from_numpy(setup.tokens[window.start + 1:window.stop + 1].astype(np.int64))
            nll = setup.model.score(hidden, targets)[0]
            want[start + first:start + end] = nll[first - end:].double()
    got = setup.score(cfg=cfg)
    assert np.isfinite(want).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    assert np.abs(setup.score() - want).max() > 1e-2                # learning does something


def test_hints_enter_the_score_as_the_tilt_of_the_same_probabilities(setup):
    cfg, phases = dataclasses.replace(setup.cfg, ttt_lora_lr=0.0), setup.plan()
    hints = setup.hints(setup.monotonous, phases)
    plain, tilted = (setup.score(setup.monotonous, cfg=cfg, hints=x) for x in (None, hints))
    assert np.array_equal(plain[~hints.gate], tilted[~hints.gate])
    right = hints.gate & (hints.hint == setup.monotonous[1:])
    wrong = hints.gate & ~right
    assert min(right.sum(), wrong.sum(), (~hints.gate).sum()) >= 10
    assert (tilted[right] < plain[right]).all() and (tilted[wrong] > plain[wrong]).all()
    q = np.exp(-plain[right])
    np.testing.assert_allclose(tilted[right], plain[right] - cfg.token_boost + np.log1p(q * np.expm1(cfg.token_boost)),
                               rtol=0, atol=1e-5)


def test_adapters_learn_from_the_model_alone_not_from_hints(setup):
    hints = setup.hints(setup.monotonous, setup.plan())
    plain, tilted = (setup.score(setup.monotonous, hints=x) for x in (None, hints))
    assert np.array_equal(plain[~hints.gate], tilted[~hints.gate]) and (plain != tilted)[hints.gate].any()


# --- adapters -----------------------------------------------------------------------------------------------

def new_bank(cfg: gpt.Config, rows: int = 3) -> gpt.AdapterBank:
    bank = gpt.AdapterBank(cfg, slots(cfg), rows)
    bank.start(rows, gpt.lane_draws(cfg, as_rank(cfg, 0, 1), 0))
    return bank


def random_grads(bank: gpt.AdapterBank, seed: int) -> torch.Tensor:
    return torch.randn(bank.params.shape, generator=torch.Generator().manual_seed(seed))


def letter_of(bank: gpt.AdapterBank, letter: str) -> torch.Tensor:
    """All A or all B, (rows, values)."""
    return torch.cat([part.flatten(1) for key, part in bank.parts(bank.params).items() if key[2] == letter], 1)


def test_settling_equals_stepping_with_zero_gradients():
    cfg = tiny_config(ttt_lora_lr=0.03, ttt_weight_decay=2.0)
    settled, stepped = new_bank(cfg), new_bank(cfg)
    everyone = torch.ones(3, dtype=torch.int64)
    missed = torch.tensor([0, 1, 4])                                # steps after each document was finished
    for bank in (settled, stepped):
        bank.update(random_grads(bank, 1), everyone)
    for step in range(4):
        learns = (missed <= 3 - step).long()
        grads = random_grads(settled, 10 + step) * learns[:, None]
        settled.update(grads, learns)
        stepped.update(grads, everyone)
    settled.settle(missed)
    torch.testing.assert_close(letter_of(settled, "A"), letter_of(stepped, "A"), rtol=1e-6, atol=0)


def test_adapter_step_is_adamw_of_each_document_alone():
    cfg = tiny_config(ttt_lora_lr=0.01)
    bank = new_bank(cfg)
    twin = torch.nn.Parameter(bank.params[1].clone())
    adamw = torch.optim.AdamW([twin], lr=cfg.ttt_lora_lr, betas=(0.0, cfg.ttt_beta2), eps=gpt.ADAPTER_EPS,
                              weight_decay=cfg.ttt_weight_decay)
    unmoved = bank.params[2].clone()
    for step in range(3):
        grads = random_grads(bank, step)
        bank.update(grads, torch.tensor([1, 1, 0]))
        twin.grad = grads[1].clone()
        adamw.step()
    torch.testing.assert_close(bank.params[1], twin.detach(), rtol=1e-6, atol=1e-8)
    assert torch.equal(bank.params[2], unmoved) and not bank.exp_avg_sq[2].any()


def test_low_precision_copy_follows_every_change_of_the_adapters():
    cfg = tiny_config(ttt_lora_lr=0.01)
    bank = gpt.AdapterBank(cfg, slots(cfg), 3, dtype=torch.bfloat16)
    bank.start(3, gpt.lane_draws(cfg, as_rank(cfg, 0, 1), 0))
    assert torch.equal(bank.low, bank.params.bfloat16())
    bank.update(random_grads(bank, 0).bfloat16(), torch.tensor([1, 1, 0]))
    assert torch.equal(bank.low, bank.params.bfloat16())
    bank.settle(torch.tensor([0, 0, 2]))
    bank.start(3, None)
    assert torch.equal(bank.low, bank.params.bfloat16())


def test_a_document_is_one_row_with_the_attention_inputs_a_stacked_first():
    cfg = tiny_config()
    bank = new_bank(cfg)
    R, D, kv = cfg.ttt_lora_rank, cfg.model_dim, cfg.kv_dim
    order = [f"{kind}{letter}" for kind, slot, letter in bank.layout if slot == 0]
    assert order == ["qA", "kA", "vA", "oA", "qB", "kB", "vB", "oB", "mlpA", "mlpB"]
    assert bank.params.shape[1] == slots(cfg) * (R * (5 * D + 3 * D + 2 * kv)) + R * (D + cfg.vocab_size)
    parts = bank.parts(bank.params)
    stacked = bank.params[:, :4 * R * D].view(3, 4 * R, D)
    for k, kind in enumerate("qkvo"):
        assert torch.equal(stacked[:, k * R:(k + 1) * R], parts[kind, 0, "A"])


def test_new_batch_keeps_a_and_forgets_everything_else():
    bank = new_bank(tiny_config(ttt_lora_lr=0.01))
    bank.update(random_grads(bank, 0), torch.ones(3))
    kept = letter_of(bank, "A")
    assert letter_of(bank, "B").any()
    bank.start(3, None)
    assert torch.equal(letter_of(bank, "A"), kept)
    assert not any(x.any() for x in (letter_of(bank, "B"), bank.exp_avg_sq, bank.steps))


def test_without_warm_start_a_is_drawn_anew(setup):
    """In a plan whose batches carry A, every batch draws once more."""
    phases = setup.plan(lanes=1)
    batches = [batch for phase in phases for lane in phase for batch in lane]
    assert sum(batch.carries for batch in batches) >= 2
    for keeps_a in (True, False):
        cfg, drawn = dataclasses.replace(setup.cfg, ttt_warm_start_a=keeps_a), []
        scorer = setup.scorer(phases=phases, cfg=cfg)
        draw = gpt.lane_draws(cfg, scorer.run, 0)

        def counted(kind, slot, shape, draw=draw, drawn=drawn):
            drawn.append(kind)
            return draw(kind, slot, shape)
        gpt.score_phase(scorer, phases[0], [counted])
        assert drawn.count("head") == sum(not (batch.carries and keeps_a) for batch in batches)


def test_initial_a_depends_on_seed_and_lane_only():
    cfg = tiny_config()

    def first(cfg: gpt.Config, lane: int) -> torch.Tensor:
        torch.rand(7)                                               # what ran before does not matter
        return gpt.lane_draws(cfg, as_rank(cfg, 0, 1), lane)("q", 0, (2, 3, 16))
    assert torch.equal(first(cfg, 0), first(cfg, 0)) and first(cfg, 0).abs().max() <= 16 ** -0.5
    assert not torch.equal(first(cfg, 0), first(cfg, 1))
    assert not torch.equal(first(cfg, 0), first(dataclasses.replace(cfg, seed=1), 0))


def test_adapters_that_are_switched_off_do_not_exist():
    bank = new_bank(tiny_config(ttt_k_lora=False, ttt_mlp_lora=False))
    assert bank.kinds == ["q", "v", "o"]
    made, head = bank.adapters(bank.params)
    assert all(a.k is None and a.mlp is None and a.q is not None for a in made) and head.B.shape[1] == 64
    assert {kind for kind, _, _ in new_bank(tiny_config()).layout} == set(KINDS)


# --- adaptation of the base ---------------------------------------------------------------------------------

@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), cut=st.integers(0, 10), cap=st.integers(2, 40),
       world_size=st.sampled_from((1, 2, 4, 8)))
def test_rank_shares_tile_the_row_in_nearly_equal_runs_of_segments(lengths, cut, cap, world_size):
    tokens = random_stream(np.random.default_rng(0), lengths)[cut:]
    if not len(tokens):
        return
    bounds = gpt.segment_bounds(tokens, cap)
    shares = [gpt.rank_share(bounds, rank, world_size) for rank in range(world_size)]
    assert shares[0][0] == 0 and shares[-1][1] == len(tokens)
    for (_, end), (begin, _) in zip(shares, shares[1:]):
        assert end == begin
    assert all(begin in bounds and begin <= end <= begin + -(-len(tokens) // world_size) + cap for begin, end in shares)


@pytest.mark.parametrize("world_size", (1, 2, 4, 8))
def test_padded_shares_of_all_ranks_give_the_gradient_of_the_whole_row(setup, world_size):
    """Each rank's share has a fixed length, and the token before it, which SmearGate looks at."""
    S = setup.cfg.ttt_eval_seq_len
    cfg = dataclasses.replace(setup.cfg, global_ttt_chunk_tokens=4 * S)
    model = random_model(cfg)
    for at in (0, 37):                                              # rows begin with a document, or within one
        row = setup.tokens[at:at + 4 * S + 1].astype(np.int64)
        inputs, targets = torch.from_numpy(row[:-1]), torch.from_numpy(row[1:])
        bounds = torch.from_numpy(gpt.segment_bounds(row[:-1], S))
        loss = model.loss(inputs, targets, bounds, looping=True, segment_cap=S)
        whole = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(model.parameters()))])
        total, lengths = torch.zeros_like(whole), set()
        for rank in range(world_size):
            base = gpt.BaseAdaptation(cfg, as_rank(cfg, rank, world_size), model)
            base.load(row)
            base.gradient()
            total += base.flat
            lengths.add(len(base.inputs))
        assert len(lengths) == 1
        assert float((total - whole).norm() / whole.norm()) < 1e-5


def test_rows_of_very_many_documents_are_not_cut_short(setup, monkeypatch):
    monkeypatch.setattr(gpt, "BASE_SEGMENTS", 5)
    test_padded_shares_of_all_ranks_give_the_gradient_of_the_whole_row(setup, 2)


def test_last_chunk_of_the_joined_documents_is_skipped(setup):
    cfg = dataclasses.replace(setup.cfg, global_ttt_lr=0.01)
    for chosen in range(1, len(setup.docs.start) + 1):
        joined = setup.docs.length[:chosen].sum()
        model = random_model(cfg)
        before = [p.detach().clone() for p in model.parameters()]
        steps = gpt.adapt_base(cfg, gpt.Run(cfg), model, setup.tokens, setup.docs, np.arange(chosen))
        assert steps == max(0, -(-(joined - 1) // cfg.global_ttt_chunk_tokens) - 1)
        assert any((p != old).any() for p, old in zip(model.parameters(), before)) == (steps > 0)
        assert all(p.grad is None for p in model.parameters())


def test_base_adaptation_trains_every_parameter_and_keeps_caps_at_least_one(setup):
    cfg = dataclasses.replace(setup.cfg, global_ttt_lr=0.05)
    model = random_model(cfg)
    with torch.no_grad():
        model.softcap_neg.fill_(1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert gpt.adapt_base(cfg, gpt.Run(cfg), model, setup.tokens, setup.docs, np.arange(len(setup.docs.start))) >= 2
    for name, p in model.named_parameters():
        assert name == "softcap_neg" or (p != before[name]).any(), name
    assert model.softcap_pos >= 1 and model.softcap_neg >= 1


def test_base_adaptation_knows_only_the_chosen_documents(setup):
    chosen = np.array([1, 4])
    others = np.ones(len(setup.tokens), bool)
    for doc in chosen:
        others[setup.docs.start[doc]:setup.docs.start[doc] + setup.docs.length[doc]] = False
    adapted = []
    for tokens in (setup.tokens, change_tokens(setup.tokens, others, setup.cfg.vocab_size)):
        torch.manual_seed(0)
        model = random_model(setup.cfg)
        assert gpt.adapt_base(setup.cfg, gpt.Run(setup.cfg), model, tokens, setup.docs, chosen) == 1
        adapted.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*adapted)


# --- the whole evaluation -----------------------------------------------------------------------------------

def evaluate(setup: Setup, cfg: gpt.Config, tmp_path, tokens: np.ndarray | None = None,
             ops: gpt.Ops = gpt.Ops()) -> tuple[gpt.Score, gpt.GPT]:
    torch.manual_seed(0)
    model = random_model(cfg)
    model.ops = ops
    data = SimpleNamespace(load_validation=lambda: (setup.tokens if tokens is None else tokens, setup.byte_counts),
                           val_tokens=len(setup.tokens))
    run = gpt.Run(cfg, log_path=tmp_path / "run.txt")
    return gpt.evaluate_ttt(cfg, run, model, data), model


def test_evaluation_is_deterministic_and_counts_every_target(setup, tmp_path):
    first, model = evaluate(setup, setup.cfg, tmp_path)
    assert (first.tokens, first.bytes) == (len(setup.tokens) - 1, setup.byte_counts[1:].sum())
    assert evaluate(setup, setup.cfg, tmp_path)[0] == first


def test_chunks_are_scored_with_a_cast_of_the_base_as_it_is(setup, tmp_path):
    """The cast is made once and taken over again when the base has been adapted, in the same memory."""
    seen = []

    def cast(model, into=None):
        fresh = model.wq.detach().clone()
        return fresh if into is None else into.copy_(fresh)

    def checked(model, bank, *inputs):
        assert torch.equal(inputs[-1], model.wq)
        seen.append((inputs[-1].data_ptr(), inputs[-1].sum().item()))
        return gpt.chunk_gradients(model, bank, *inputs)
    evaluate(setup, setup.cfg, tmp_path, ops=gpt.Ops(cast=cast, chunk_gradients=checked))
    assert len(set(seen)) == 2 and len({address for address, _ in seen}) == 1


def test_evaluation_without_prefix_leaves_the_base_unchanged(setup, tmp_path, capsys):
    torch.manual_seed(0)
    before = random_model(setup.cfg)
    _, model = evaluate(setup, dataclasses.replace(setup.cfg, phased_ttt_prefix_docs=0), tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))
    assert "prefix_docs:0" in capsys.readouterr().out
    _, model = evaluate(setup, setup.cfg, tmp_path)
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))


def test_hints_are_counted_in_the_certified_order_inside_documents(setup, monkeypatch):
    """In slices much shorter than the stream, and never read further than asked by more than a slice."""
    monkeypatch.setattr(gpt, "HINT_SLICE", 3)
    tokens = np.append(np.tile(setup.tokens % 4 + np.where(setup.tokens == gpt.BOS, 0, 20), 2), gpt.BOS).astype(np.uint16)
    docs, cfg = gpt.find_documents(tokens), setup.cfg
    C, n = cfg.ttt_chunk_size, len(tokens) - 1
    phases = gpt.plan_batches(docs, batch_size=3, chunk=C, window=cfg.ttt_eval_seq_len, max_tokens=64)
    scored = gpt.certified_order(phases, docs, C)
    order = gpt.targets_in_order(scored)
    doc_start = np.repeat(docs.start, docs.length - 1)
    want = twins.ngram_hints(tokens, order, doc_start, cfg.token_order - 1, cfg.token_threshold)
    assert want.gate.any()
    scorer = gpt.Scorer(cfg, gpt.Run(cfg), setup.model, len(tokens))
    feed = gpt.HintFeed(cfg, scorer.run, tokens, docs, scored)
    for count in range(0, n, 40):
        feed.load(scorer.stream, count)
        assert count <= feed.loaded <= count + 3 * C
        assert np.array_equal(scorer.stream.hints[:feed.loaded].numpy(), want.hint[order][:feed.loaded])
        assert np.array_equal(scorer.stream.boost[:feed.loaded].numpy() > 0, want.gate[order][:feed.loaded])
        assert not scorer.stream.boost[feed.loaded:].any()
    feed.close(scorer.stream)
    assert feed.loaded == n and feed.gated == want.gate.sum()
    assert set(scorer.stream.boost.tolist()) == {0.0, cfg.token_boost}
    assert not np.array_equal(want.gate, twins.ngram_hints(tokens, np.sort(order), doc_start, cfg.token_order - 1,
                                                              cfg.token_threshold).gate)


def test_an_error_while_hints_are_made_reaches_the_scoring(setup, monkeypatch):
    def fail(*args):
        raise MemoryError("no memory for n-grams")
    monkeypatch.setattr(gpt.NgramTable, "feed", fail)
    phases = setup.plan()
    scored = gpt.certified_order(phases, setup.docs, setup.cfg.ttt_chunk_size)
    scorer = gpt.Scorer(setup.cfg, gpt.Run(setup.cfg), setup.model, len(setup.tokens))
    feed = gpt.HintFeed(setup.cfg, scorer.run, setup.tokens, setup.docs, scored)
    with pytest.raises(gpt.RunError, match="hints could not be made: no memory for n-grams"):
        feed.load(scorer.stream, 1)


class Kept:
    """Scores of whole evaluations, by target, and their log lines."""

    def __init__(self, setup: Setup, tmp_path, monkeypatch, capsys) -> None:
        self.setup, self.tmp_path, self.capsys, self.scorers = setup, tmp_path, capsys, []
        made = gpt.Scorer

        def keeping(*args, **kwargs):
            self.scorers.append(made(*args, **{**kwargs, "keep_log": True}))
            return self.scorers[-1]
        monkeypatch.setattr(gpt, "Scorer", keeping)

    def __call__(self, cfg: gpt.Config, tokens: np.ndarray | None = None) -> np.ndarray:
        evaluate(self.setup, cfg, self.tmp_path, tokens)
        self.lines = self.capsys.readouterr().out.splitlines()
        return banked_nll(self.scorers[-1], len(self.setup.tokens) - 1)


@pytest.fixture
def kept(setup, tmp_path, monkeypatch, capsys) -> Kept:
    monkeypatch.setattr(gpt, "LANES", 2)                            # so that lanes have several batches
    monkeypatch.setattr(gpt, "BATCH_TOKENS", 64)                    # two rows of the longest window
    return Kept(setup, tmp_path, monkeypatch, capsys)


def test_future_tokens_cannot_change_the_score_of_a_whole_evaluation(setup, kept):
    """Hints, carried adapters and the adapted base together: only what comes earlier in the certified order counts.
    Documents are batched by tokens, and some batches go on from the adapters of the one before."""
    cfg = dataclasses.replace(setup.cfg, token_threshold=0.5)
    before = kept(cfg)
    phases = gpt.plan_batches(setup.docs, batch_size=cfg.ttt_batch_size, lanes=2, max_tokens=64, prefix_docs=4,
                              chunk=cfg.ttt_chunk_size, window=cfg.ttt_eval_seq_len)
    batches = [batch for phase in phases for lane in phase for batch in lane]
    assert len(phases) == 2 and any(batch.carries for batch in batches)
    assert {len(batch.docs) for batch in batches} >= {1, 2}         # bounded by tokens below the batch size
    order = setup.order(phases)
    assert np.isfinite(before).all()
    for cut in np.linspace(1, len(order) - 20, 6).astype(int):
        after = kept(cfg, change_tokens(setup.tokens, order[cut:] + 1, cfg.vocab_size))
        assert np.array_equal(before[order[:cut]], after[order[:cut]]), cut
        assert (before[order[cut:]] != after[order[cut:]]).any()


def test_a_budget_that_is_too_small_stops_adaptation_and_the_log_says_how_to_repeat_it(setup, kept):
    full = kept(setup.cfg)
    assert not any("adaptation_stopped" in line for line in kept.lines)
    stopped = kept(dataclasses.replace(setup.cfg, eval_wallclock_seconds=1e-3))
    assert np.isfinite(stopped).all()
    line = next(line for line in kept.lines if "adaptation_stopped" in line)
    document, chunk = map(int, line.split("replay:TTT_STOP_AFTER=")[1].split(":"))
    scored, order = kept_order(setup)
    k = int(np.flatnonzero((scored.doc == document) & (scored.chunk == chunk))[0])
    learnt = int(scored.size[:k + 1].sum())
    assert 0 < learnt < len(order)
    assert np.array_equal(full[order[:learnt]], stopped[order[:learnt]])
    assert not np.array_equal(full[order[learnt:]], stopped[order[learnt:]])
    replayed = kept(dataclasses.replace(setup.cfg, ttt_stop_after=f"{document}:{chunk}"))
    assert np.array_equal(stopped, replayed)
    assert not any("adapted_base" in line for line in kept.lines)


def kept_order(setup: Setup) -> tuple[gpt.ScoredChunks, np.ndarray]:
    cfg = setup.cfg
    phases = gpt.plan_batches(setup.docs, batch_size=cfg.ttt_batch_size, lanes=2, max_tokens=64,
                              prefix_docs=cfg.phased_ttt_prefix_docs, chunk=cfg.ttt_chunk_size,
                              window=cfg.ttt_eval_seq_len)
    scored = gpt.certified_order(phases, setup.docs, cfg.ttt_chunk_size)
    return scored, gpt.targets_in_order(scored)


def test_adaptation_can_be_stopped_anywhere_and_no_score_before_that_changes(setup, kept):
    full = kept(setup.cfg)
    scored, order = kept_order(setup)
    sizes = scored.size
    first_of_second_phase = int((scored.phase == 0).sum())
    for k in (0, first_of_second_phase // 2, first_of_second_phase - 1, first_of_second_phase, len(sizes) - 1):
        cfg = dataclasses.replace(setup.cfg, ttt_stop_after=f"{scored.doc[k]}:{scored.chunk[k]}")
        scores, learnt = kept(cfg), int(sizes[:k + 1].sum())
        assert np.array_equal(full[order[:learnt]], scores[order[:learnt]])
        assert np.array_equal(full, scores) == (k == len(sizes) - 1)
        assert any("adapted_base" in line for line in kept.lines) == (k >= first_of_second_phase)
    with pytest.raises(gpt.ConfigError, match="copy it from the log"):
        kept(dataclasses.replace(setup.cfg, ttt_stop_after="999:0"))


class Clock:
    """A timer and a rank whose seconds the test sets."""
    world_size, now = 1, 0.0

    def __init__(self, cfg: gpt.Config, rank: int = 0, world_size: int = 1) -> None:
        self.cfg, self.rank, self.world_size, self.lines = cfg, rank, world_size, []

    def seconds(self) -> float:
        return self.now

    def log(self, line: str) -> None:
        self.lines.append(line)

    max_later = gpt.Run.max_later


class PacedScorer:
    """Only spends the time of a batch's steps, each `slowdown` times what was planned, on the clock of its rank."""

    def __init__(self, clock: Clock, slowdown: float) -> None:
        self.run, self.cfg, self.slowdown = clock, clock.cfg, slowdown
        self.learnt_s = self.total_s = 0.0

    def score_batch(self, batch: gpt.Batch, draw: object, may_learn: Callable[[int], bool]) -> None:
        for start_us, cost_us in zip(batch.steps.start_us.tolist(), batch.steps.cost_us.tolist()):
            step_s, learns = self.slowdown * cost_us / 1e6, may_learn(start_us)
            self.run.now += step_s * (1 if learns else gpt.FORWARD_SHARE)
            self.learnt_s += step_s * learns
            self.total_s += step_s


@settings(max_examples=40)
@given(slowdown=st.floats(0.05, 400.0), lengths=st.lists(st.integers(20, 400), min_size=8, max_size=40))
def test_a_run_whose_steps_cost_what_they_cost_ends_in_time_if_scoring_alone_would(slowdown, lengths):
    """One process runs eight lanes whose steps take `slowdown` times what was planned, in two phases."""
    cfg = tiny_config(eval_wallclock_seconds=10.0)
    lengths = np.array(lengths)
    docs = gpt.Documents(np.cumsum(lengths) - lengths, lengths)
    phases = gpt.plan_batches(docs, batch_size=4, max_tokens=64, prefix_docs=6, chunk=8, window=32)
    clock = Clock(cfg)
    limit = gpt.LearningLimit(cfg, clock, phases, gpt.certified_order(phases, docs, 8), clock)
    scorer = PacedScorer(clock, slowdown)
    for number, phase in enumerate(phases):
        limit.begin_phase(number)
        gpt.score_phase(scorer, phase, [None] * gpt.LANES, limit=limit)
    learnt_s, total_s = scorer.learnt_s, scorer.total_s
    if total_s < 0.9 * cfg.eval_wallclock_seconds:
        assert learnt_s == pytest.approx(total_s) and not clock.lines
    if total_s > cfg.eval_wallclock_seconds:
        assert len(clock.lines) == 1 and learnt_s < total_s
    # The first decision takes effect an eighth of the first phase later, in all lanes.
    first_s = slowdown * 8 * max(lane[-1].end_us for lane in phases[0] if lane) / 1e6
    if gpt.FORWARD_SHARE * total_s + 0.2 * first_s < 0.9 * cfg.eval_wallclock_seconds:
        assert clock.now <= cfg.eval_wallclock_seconds


class Board:
    """What ranks tell each other through max_later: a prediction is known when its last rank has made it."""

    def __init__(self, world_size: int) -> None:
        self.world_size, self.told, self.news = world_size, {}, threading.Condition()

    def max_later(self, clock: "RankClock", value: float) -> Callable[[], float]:
        with self.news:
            told = self.told.setdefault(clock.num_told, {})
            told[clock.rank] = (clock.now, value)
            clock.num_told += 1
            self.news.notify_all()

        def result() -> float:
            with self.news:
                assert self.news.wait_for(lambda: len(told) == self.world_size, 20), "a rank waits for ever"
            times, values = zip(*told.values())
            clock.waited_s += max(0.0, max(times) - clock.now)
            clock.now = max(clock.now, *times)
            return max(values)
        return result


class RankClock(Clock):
    def __init__(self, cfg: gpt.Config, rank: int, board: Board) -> None:
        super().__init__(cfg, rank, board.world_size)
        self.board, self.num_told, self.waited_s = board, 0, 0.0

    def max_later(self, value: float) -> Callable[[], float]:
        return self.board.max_later(self, value)


# Documents, and how many of them the first phase scores: ranks' first lanes take unlike times, their sums like ones.
UNLIKE_LANES = {2: ([800, *[400] * 2, *[280] * 2, *[200] * 12, *[100] * 30], 17),
                4: ([400] * 5 + [300] * 12 + [100] * 30, 20),
                8: ([900, 700, 60, 50, 40, 30, *[100] * 60], 6)}


def score_in_ranks(world_size: int, slowdown: float) -> tuple[list[PacedScorer], list[gpt.LearningLimit]]:
    """Two phases by several ranks at once, each with its clock."""
    cfg = tiny_config(eval_wallclock_seconds=10.0)
    lengths, prefix_docs = np.array(UNLIKE_LANES[world_size][0]), UNLIKE_LANES[world_size][1]
    docs = gpt.Documents(np.cumsum(lengths) - lengths, lengths)
    phases = gpt.plan_batches(docs, batch_size=4, max_tokens=64, prefix_docs=prefix_docs, chunk=8, window=32)
    scored, board = gpt.certified_order(phases, docs, 8), Board(world_size)
    clocks = [RankClock(cfg, rank, board) for rank in range(world_size)]
    limits = [gpt.LearningLimit(cfg, clock, phases, scored, clock) for clock in clocks]
    scorers = [PacedScorer(clock, slowdown) for clock in clocks]

    def work(number: int, rank: int) -> None:
        limits[rank].begin_phase(number)
        gpt.score_phase(scorers[rank], phases[number], [None] * gpt.LANES, limit=limits[rank])

    with ThreadPoolExecutor(world_size) as pool:
        for number in range(len(phases)):
            ended_s = [clock.now for clock in clocks]
            list(pool.map(work, [number] * world_size, range(world_size)))
            assert len({clock.num_told for clock in clocks}) == 1
            busy_s = [clock.now - start - clock.waited_s for clock, start in zip(clocks, ended_s)]
            for clock, start in zip(clocks, ended_s):     # as long as the longest work, and a step
                assert clock.now - start <= 1.02 * max(busy_s), (clock.rank, clock.now - start, busy_s)
                clock.now, clock.waited_s = max(c.now for c in clocks), 0.0       # a barrier
    return scorers, limits


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_no_rank_makes_another_wait_for_lanes_that_it_has_not_begun(world_size):
    """A rank with several lanes must not wait at the end of its first one until the others' first ones end."""
    scorers, limits = score_in_ranks(world_size, slowdown=1.0)
    assert all(scorer.learnt_s == scorer.total_s for scorer in scorers)
    assert {limit.last for limit in limits} == {(math.inf,)}


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_with_any_number_of_lanes_stop_at_the_same_step(world_size):
    fast, _ = score_in_ranks(world_size, slowdown=1.0)
    slowdown = 12.0 / max(scorer.total_s for scorer in fast)             # a fifth more than the budget
    scorers, limits = score_in_ranks(world_size, slowdown)
    assert len({limit.last for limit in limits}) == 1 and limits[0].last != (math.inf,)
    assert sum(scorer.learnt_s for scorer in scorers) < sum(scorer.total_s for scorer in scorers)
    assert len(scorers[0].run.lines) == 1 and max(scorer.run.now for scorer in scorers) <= 10.0


@pytest.mark.parametrize("chunk", [48, 97, 200])
def test_every_padded_window_holds_a_chunk(chunk):
    assert min(gpt.step_buckets(64, 2560, chunk).windows) >= chunk
    cfg = tiny_config(compile=True, ttt_chunk_size=chunk, ttt_batch_size=4, ttt_eval_seq_len=512, train_seq_len=512,
                      train_batch_tokens=8 * 512, global_ttt_chunk_tokens=512, phased_ttt_prefix_docs=0)
    with torch.compiler.set_stance("force_eager"):        # the compiled path, without the compiler
        gpt.warm_up_ttt(cfg, gpt.Run(cfg), random_model(cfg), 2000)


def test_the_base_adaptation_has_run_once_before_the_clock(setup, tmp_path, monkeypatch):
    """Its first call compiles kernels: too late once the clock runs."""
    calls = []
    gradient = gpt.BaseAdaptation.gradient
    monkeypatch.setattr(gpt.BaseAdaptation, "gradient", lambda self: (calls.append("gradient"), gradient(self)))
    find = gpt.find_documents
    monkeypatch.setattr(gpt, "find_documents", lambda tokens: (calls.append("clock"), find(tokens))[1])
    monkeypatch.setattr(gpt, "step_buckets", lambda *_: BUCKETS)
    evaluate(setup, dataclasses.replace(setup.cfg, compile=True, phased_ttt_prefix_docs=4), tmp_path)
    assert calls[:2] == ["gradient", "clock"] and calls.count("gradient") > 1


def test_every_kind_of_compilation_counts_as_made_in_the_clock(monkeypatch):
    """A kernel that Triton or FlashAttention-4 compiles late costs seconds, as a graph does."""
    def kernel(count: int) -> SimpleNamespace:
        return SimpleNamespace(device_caches={0: (dict.fromkeys(range(count)), {}, "target")})

    def attention(count: int) -> SimpleNamespace:
        return SimpleNamespace(compile_cache=SimpleNamespace(cache=dict.fromkeys(range(count))))
    before = gpt.graphs_made(lambda: None)
    monkeypatch.setattr(gpt, "_made_up_kernel", kernel(3), raising=False)
    assert gpt.graphs_made(lambda: None) == (before[0] + 3, before[1])
    late = SimpleNamespace(_flash_attn_fwd=attention(2), _flash_attn_bwd=attention(5))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", late)
    assert gpt.graphs_made(SimpleNamespace(captures=7, missed=1)) == (before[0] + 17, before[1] + 1)


def test_the_audit_log_of_a_small_split_bears_all_that_warm_up_banks(setup):
    scorer = setup.scorer()
    count = len(scorer.log_target) + 5
    scorer.add_to_log(torch.arange(count), torch.ones(count), torch.ones(count, 4), torch.ones(count, dtype=torch.bool))
    assert scorer.log_size == count                       # and is cleared, with the rest, before the clock
    scorer.clear()
    assert scorer.log_size == 0


def test_audit_files_that_cannot_be_written_cost_a_warning_and_not_the_score(setup, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(np, "savez", full)
    evaluate(setup, dataclasses.replace(setup.cfg, audit=True), tmp_path)
    out, err = capsys.readouterr()
    assert "quantized_ttt_phased val_loss:" in out and "warning: the audit's files of rank 0 are not whole" in err


def test_audit_writes_the_order_in_which_targets_were_banked(setup, tmp_path):
    cfg = dataclasses.replace(setup.cfg, audit=True)
    evaluate(setup, cfg, tmp_path)
    order = np.fromfile(tmp_path / "run.order.bin", "<i8")
    C = cfg.ttt_chunk_size
    phases = gpt.plan_batches(setup.docs, batch_size=cfg.ttt_batch_size, prefix_docs=cfg.phased_ttt_prefix_docs, chunk=C,
                              max_tokens=gpt.BATCH_TOKENS, window=cfg.ttt_eval_seq_len)
    assert np.array_equal(order, gpt.targets_in_order(gpt.certified_order(phases, setup.docs, C)))


@pytest.mark.parametrize("world_size", [1, 2])
def test_audit_writes_what_every_score_was_made_of(setup, tmp_path, world_size):
    """The files of all ranks hold every target once, in the lane that scored it, and give its score back."""
    phases = setup.plan()
    scored = gpt.certified_order(phases, setup.docs, setup.cfg.ttt_chunk_size)
    hints = setup.hints(setup.monotonous, phases)
    targets = []
    for rank in range(world_size):
        scorer = setup.scorer(setup.monotonous, rank, world_size, phases, hints)
        for phase in phases:
            gpt.score_phase(scorer, phase, [gpt.lane_draws(setup.cfg, scorer.run, lane) for lane in range(gpt.LANES)])
        vars(scorer.run).update(log_path=tmp_path / "run.txt", sum=lambda x: x, log=lambda line: None)
        gpt.audit_order(scorer.run, scorer, scored)
        with np.load(tmp_path / f"run.scores{rank}.npz") as saved:
            parts = [torch.from_numpy(saved[name]) for name in ("nll", "log_q_hint", "is_hit", "boost")]
            tilted = gpt.tilt(*(x.float() for x in parts)).double()
            torch.testing.assert_close(tilted, scorer.log_nll[:len(tilted)])
            assert set(saved["lane"] % world_size) == {rank}
            assert saved["is_hit"].any() and saved["boost"].any()
            assert saved["bytes"] == setup.byte_counts[saved["target"] + 1].sum()
            targets.extend(saved["target"].tolist())
    assert sorted(targets) == list(range(len(setup.tokens) - 1))


def test_audit_refuses_targets_that_were_banked_twice_never_or_out_of_order(setup, tmp_path):
    phases = setup.plan()
    scored = gpt.certified_order(phases, setup.docs, setup.cfg.ttt_chunk_size)
    scorer = setup.scorer(phases=phases)
    for phase in phases:
        gpt.score_phase(scorer, phase, [gpt.lane_draws(setup.cfg, scorer.run, lane) for lane in range(gpt.LANES)])
    run, good, size = gpt.Run(setup.cfg, log_path=tmp_path / "bad.txt"), scorer.log_target.clone(), int(scorer.log_size)

    def swapped(log, a, b):
        log[[a, b]] = log[[b, a]]

    def repeated(log, a, b):
        log[a] = log[b]
    for change, change_size in ((swapped, 0), (repeated, 0), (swapped, -1), (lambda *_: None, -1), (lambda *_: None, 1)):
        scorer.log_target.copy_(good)
        change(scorer.log_target, 3, 40)
        scorer.log_size.fill_(size + change_size)
        with pytest.raises(RuntimeError, match="not banked once and in the certified order"):
            gpt.audit_order(run, scorer, scored)
    assert not (tmp_path / "bad.order.bin").exists()
    scorer.log_target.copy_(good)
    scorer.log_size.fill_(size)
    gpt.audit_order(run, scorer, scored)


def test_no_score_line_before_the_coverage_check(setup, tmp_path, monkeypatch, capsys):
    add = gpt.BpbMeter.add
    monkeypatch.setattr(gpt.BpbMeter, "add", lambda meter, nll, counts, scored: add(meter, nll[1:], counts[1:], scored[1:]))
    with pytest.raises(RuntimeError, match="expected each exactly once"):
        evaluate(setup, setup.cfg, tmp_path)
    assert "val_bpb" not in capsys.readouterr().out


# --- padded and captured steps ------------------------------------------------------------------------------

BUCKETS = gpt.Buckets(rows=(2, 3), windows=(16, 32))


def all_scores_and_adapters(setup: Setup, buckets: gpt.Buckets | None, phases) -> tuple[np.ndarray, torch.Tensor]:
    scorer = setup.scorer(phases=phases, buckets=buckets, hints=setup.hints(setup.tokens, phases))
    gpt.score_phase(scorer, phases[0], [gpt.lane_draws(setup.cfg, scorer.run, 0)])
    return banked_nll(scorer, len(setup.tokens) - 1), scorer.bank.params


def test_padded_steps_give_the_same_scores_and_adapters_as_exact_ones(setup):
    """Several batches on one lane that carry their A; documents end inside the buckets of rows and windows."""
    phases = setup.plan(lanes=1)
    assert sum(batch.carries for batch in phases[0][0]) >= 2
    exact, padded = (all_scores_and_adapters(setup, buckets, phases) for buckets in (None, BUCKETS))
    np.testing.assert_allclose(padded[0], exact[0], rtol=0, atol=2e-5)
    assert torch.isfinite(padded[1]).all()
    difference = (padded[1] - exact[1]).abs()
    # A gradient next to zero may change its sign with the order of additions, and AdamW's step with it.
    assert difference.max() <= 2 * setup.cfg.ttt_lora_lr and difference.mean() < 1e-3 * setup.cfg.ttt_lora_lr


def test_padded_rows_and_positions_hold_nothing_that_counts(setup, monkeypatch):
    """Whatever stands in padded positions and finished rows, scores and adapters stay the same to the last bit."""
    phases = setup.plan(lanes=1)
    before = all_scores_and_adapters(setup, BUCKETS, phases)
    chunk_gradients = gpt.chunk_gradients
    widths = []

    def spoiled(model, bank, tokens, at, answers, hints, learns, learn, cast):
        used = torch.arange(tokens.shape[1]) <= at.max(1, keepdim=True).values      # a window ends with its chunk
        widths.append((len(tokens), tokens.shape[1], int(used.sum())))
        return chunk_gradients(model, bank, torch.where(used, tokens, 63), at, answers, hints, learns, learn,
                               cast)
    monkeypatch.setattr(gpt, "chunk_gradients", spoiled)
    after = all_scores_and_adapters(setup, BUCKETS, phases)
    assert {(rows, width) for rows, width, _ in widths} == {(2, 16), (3, 16), (2, 32), (3, 32)}
    assert any(used < rows * width for rows, width, used in widths)
    assert np.array_equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_steps_that_learn_nothing_leave_the_adapters_alone(setup):
    phases = setup.plan(lanes=1)
    scorer = setup.scorer(phases=phases)
    batch = max(phases[0][0], key=lambda batch: len(batch.steps.rows))
    scorer.score_batch(batch, gpt.lane_draws(setup.cfg, scorer.run, 0), lambda start_us: False)
    assert not letter_of(scorer.bank, "B").any() and not scorer.bank.exp_avg_sq.any() and int(scorer.bank.steps) == 0


def test_long_batches_fetch_their_places_in_parts(setup, monkeypatch):
    whole = setup.score()
    monkeypatch.setattr(gpt, "TABLE_STEPS", 2)
    assert np.array_equal(whole, setup.score())


ADAMW_SHAPES = [(3, 5000, torch.float32), (4, 4097, torch.bfloat16), (1, 7, torch.bfloat16)]


def adamw_arguments(rows: int, P: int, dtype: torch.dtype, device: str = "cpu") -> list:
    generator = torch.Generator().manual_seed(rows)
    params, grads = (torch.randn(rows, P, generator=generator).to(device) for _ in range(2))
    second = torch.rand(rows, P, generator=generator).to(device) ** 4
    grads[:, ::3] = 0
    low = params if dtype == torch.float32 else params.to(dtype)
    learns = torch.arange(rows, device=device) % 3 != 1
    return [params, low, second, grads.to(dtype), learns.long(), torch.tensor([31.6], device=device), 1e-2, 2.0, 0.999, 1e-10]


@pytest.mark.skipif(torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1",
                    reason="Triton's interpreter is off: a GPU runs the kernel, or TRITON_INTERPRET=0")
@pytest.mark.parametrize("shape", ADAMW_SHAPES)
def test_adapter_kernel_equals_the_plain_step_under_the_interpreter(shape):
    pytest.importorskip("triton")
    plain, fast = adamw_arguments(*shape), adamw_arguments(*shape)
    gpt.plain_adapter_adamw(*plain)
    gpt.launch_adapter_adamw(*fast)
    for a, b in zip(plain[:3], fast[:3]):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-2 if a.dtype == torch.bfloat16 else 2e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ADAMW_SHAPES)
def test_adapter_kernel_equals_the_plain_step(shape):
    plain, fast = adamw_arguments(*shape, "cuda"), adamw_arguments(*shape, "cuda")
    gpt.plain_adapter_adamw(*plain)
    gpt.adapter_adamw(*fast)
    for a, b in zip(plain[:3], fast[:3]):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-2 if a.dtype == torch.bfloat16 else 2e-5, atol=1e-6)


@pytest.mark.gpu
def test_captured_steps_equal_eager_ones(setup):
    """Every score and every adapter after several batches, and nothing left behind by capturing."""
    run = gpt.Run(setup.cfg, device=torch.device("cuda"))
    torch.manual_seed(0)
    # Plain math reads segment bounds on the host, which cannot be captured.
    model = random_model(setup.cfg, compute_dtype=torch.bfloat16, ops=gpt.Ops(attend=gpt.attend_torch_varlen)).cuda()
    phases = setup.plan(lanes=1)
    scored = gpt.certified_order(phases, setup.docs, setup.cfg.ttt_chunk_size)
    results = []
    for is_captured in (False, True):
        scorer = gpt.Scorer(setup.cfg, run, model, len(setup.tokens), keep_log=True, buckets=BUCKETS)
        if is_captured:
            keys = sorted(gpt.step_keys(setup.cfg, BUCKETS), key=lambda key: -key[0] * key[1])
            scorer.steps = gpt.CapturedSteps(run, scorer.step, keys)
            assert scorer.steps.captures == len(keys)
            scorer.clear()
        scorer.load(setup.tokens, setup.byte_counts)
        scorer.follow(setup.docs, scored)
        for phase in phases:
            gpt.score_phase(scorer, phase, [gpt.lane_draws(setup.cfg, run, 0)])
        results.append((scorer.log_target.cpu(), scorer.log_nll.cpu(), scorer.bank.params.cpu(), scorer.meter.result()))
        assert getattr(scorer.steps, "missed", 0) == 0
    eager, captured = results
    assert torch.equal(eager[0], captured[0]) and eager[3][2:] == captured[3][2:]
    # A GPU may add gradients in another order, and AdamW's step from one next to zero may change its sign.
    nll, params = ((a - b).abs() for a, b in zip(eager[1:3], captured[1:3]))
    assert nll.mean() < 1e-3 and nll.max() < 0.1
    assert params.mean() < 1e-2 * setup.cfg.ttt_lora_lr


# --- prediction of the evaluation's time --------------------------------------------------------------------

@pytest.fixture(scope="module")
def benchmark_module():
    path = gpt.REPO / "benchmarks" / "evaluation.py"
    spec = importlib.util.spec_from_file_location("evaluation_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_benchmark_carries_the_records_lengths(benchmark_module):
    lengths = benchmark_module.record_lengths()
    assert (len(lengths), lengths[-1], lengths[0]) == (50_000, 97_114, lengths.min()) and (np.diff(lengths) >= 0).all()
    docs = benchmark_module.documents_of(lengths[::500])
    found = gpt.find_documents(benchmark_module.random_stream(gpt.Config(), docs))
    assert np.array_equal(found.start, docs.start) and np.array_equal(found.length, docs.length)


def test_benchmark_adds_up_the_parts_of_the_clock(benchmark_module, capsys):
    table = json.loads((gpt.REPO / "benchmarks" / "evaluation_h100.json").read_text())
    cfg, docs = gpt.Config(), benchmark_module.documents_of(benchmark_module.record_lengths()[::100])
    totals = [benchmark_module.predict(cfg, table, docs, 50, world_size) for world_size in (1, 8)]
    assert totals[0] > 2 * totals[1] > 0
    for total, line in zip(totals, (line for line in capsys.readouterr().out.splitlines() if "predicted " in line)):
        parts = dict(re.findall(r"(\w+):([\d.]+)", line))
        names = "read_s", "plan_s", "phase1_s", "base_adaptation_s", "phase2_s"
        assert sum(float(parts[name]) for name in names) == pytest.approx(total, abs=0.1)
