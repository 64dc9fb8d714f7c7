"""Section 14: planner, certified order, adapters, score-first phases, adaptation of the base."""
import dataclasses
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
    return SimpleNamespace(cfg=cfg, rank=rank, world_size=world_size, device=torch.device("cpu"),
                           generator=lambda *keys: gpt.Run.generator(SimpleNamespace(cfg=cfg, device="cpu"), *keys))


# --- golden vectors: windows, documents, queue --------------------------------------------------------------

def test_windows_documents_and_queue_match_the_recorded_ones(load_vectors):
    z = load_vectors("ttt_windows")
    chunk, window = int(z["chunk"]), int(z["window"])
    columns = dict(zip(str(z["window_columns"]).split(","), z["window_table"].T))
    for k in range(len(z["window_table"])):
        pred_len, index = columns["pred_len"][k:k + 1], int(columns["chunk_index"][k])
        w = gpt.chunk_window(pred_len, index, chunk, window)
        assert gpt.num_chunks(pred_len + 1, chunk) == columns["num_chunks"][k]
        for name, values in (("win_start", w.start), ("win_len", w.length), ("chunk_offset", w.offset),
                             ("chunk_len", w.count)):
            assert values == columns[name][k], (name, k)
        assert min(chunk * (index + 1), window) == columns["row_width"][k]
    docs = gpt.find_documents(z["tokens"])
    assert np.array_equal(docs.start, z["doc_start"]) and np.array_equal(docs.length, z["doc_len"])
    check_queue(z, docs, int(z["batch_size"]), chunk, window)


def check_queue(z, docs: gpt.Documents, batch_size: int, chunk: int, window: int) -> None:
    """One lane without splitting works through the reference's queue."""
    [[queue]] = gpt.plan_batches(docs, batch_size=batch_size, lanes=1, split_tokens=2**40, chunk=chunk, window=window)
    assert [batch.index for batch in queue] == z["queue_batch_index"].tolist()
    for batch, ids in zip(queue, z["queue_doc_ids"]):
        assert list(batch.docs) == ids[ids >= 0].tolist()
        assert batch.is_full == (len(batch.docs) == batch_size)


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
        return A


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


def check_recorded_tag(load_vectors, tag: str) -> None:
    z, weights, cfg = recorded_evaluation(load_vectors)
    is_phased, lr = tag.startswith("phase"), float(z["global_biglr" if "biglr" in tag else "global_lr"])
    cfg = dataclasses.replace(cfg, global_ttt_lr=lr, phased_ttt_prefix_docs=cfg.phased_ttt_prefix_docs * is_phased)
    run, model, tokens = gpt.Run(cfg), archive_model(weights, cfg).requires_grad_(False), z["val_tokens"]
    C, E = cfg.ttt_chunk_size, cfg.ttt_eval_seq_len
    docs = gpt.find_documents(tokens)
    phases = gpt.plan_batches(docs, batch_size=cfg.ttt_batch_size, lanes=1, split_tokens=2**40, chunk=C, window=E,
                              prefix_docs=cfg.phased_ttt_prefix_docs)
    scored = gpt.certified_order(phases, docs, C)
    boost = np.where(z["gate"], z["boost"], 0) * tag.endswith("tilt_on")
    stream = gpt.Stream(*(torch.from_numpy(np.asarray(x)) for x in (
        tokens.astype(np.int32), z["val_bytes"].astype(np.int32), z["hint"].astype(np.int32), boost.astype(np.float32))))
    meter, nll = gpt.BpbMeter(run), torch.full((len(tokens) - 1,), float("nan"), dtype=torch.float64)
    draws = RecordedDraws(z, tag.split("_")[0])
    for number, phase in enumerate(phases):
        gpt.score_phase(cfg, run, model, stream, docs, phase, meter, [draws], nll_by_target=nll)
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
    score = meter.result()
    assert score.tokens == len(tokens) - 1 and score.bytes == z["val_bytes"][1:].sum()
    assert score.bpb == pytest.approx(float(z[f"{tag}_bpb"]), abs=5e-5), tag
    assert score.loss == pytest.approx(float(z[f"{tag}_loss"]), abs=1e-4), tag
    np.testing.assert_allclose(nll.numpy(), z[f"{tag}_nll_by_target"], rtol=0, atol=5e-3, err_msg=tag)
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
                     split_tokens=st.integers(5, 100), prefix_docs=st.integers(0, 40), chunk=st.integers(1, 9))


def make_plan(lengths, batch_size, lanes, split_tokens, prefix_docs, chunk):
    tokens = random_stream(np.random.default_rng(0), lengths)
    docs = gpt.find_documents(tokens)
    phases = gpt.plan_batches(docs, batch_size=batch_size, lanes=lanes, split_tokens=split_tokens,
                              prefix_docs=prefix_docs, chunk=chunk, window=16)
    return tokens, docs, phases


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
def test_plan_holds_every_document_once(lengths, batch_size, lanes, split_tokens, prefix_docs, chunk):
    _, docs, phases = make_plan(lengths, batch_size, lanes, split_tokens, prefix_docs, chunk)
    batches = [batch for phase in phases for lane in phase for batch in lane]
    assert sorted(doc for batch in batches for doc in batch.docs) == list(range(len(docs.start)))
    assert all(len(phase) == lanes for phase in phases) and 1 <= len(phases) <= 2
    for batch in batches:
        of_batch = docs.length[list(batch.docs)]
        assert (np.diff(of_batch) >= 0).all() and 1 <= len(batch.docs) <= batch_size
    # Batches of one index are the parts of one batch: split only when one of its documents is long.
    for index in {batch.index for batch in batches}:
        parts = [batch for batch in batches if batch.index == index]
        longest = max(docs.length[list(part.docs)].max() for part in parts)
        size = sum(len(part.docs) for part in parts)
        assert len(parts) == (min(lanes, size) if longest > split_tokens else 1)
        assert all(part.is_full == (size == batch_size and longest <= split_tokens) or lanes == 1 for part in parts)


@settings(max_examples=80)
@given(**plan_settings)
def test_first_phase_ends_with_the_batch_that_reaches_the_prefix(lengths, batch_size, lanes, split_tokens, prefix_docs,
                                                                 chunk):
    _, docs, phases = make_plan(lengths, batch_size, lanes, split_tokens, prefix_docs, chunk)
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
def test_certified_order_holds_every_target_once(lengths, batch_size, lanes, split_tokens, prefix_docs, chunk):
    tokens, docs, phases = make_plan(lengths, batch_size, lanes, split_tokens, prefix_docs, chunk)
    order = gpt.targets_in_order(gpt.certified_order(phases, docs, chunk), docs, chunk)
    assert np.array_equal(np.sort(order), np.arange(len(tokens) - 1))


@settings(max_examples=80)
@given(**plan_settings)
def test_certified_order_respects_chunks_lanes_and_phases(lengths, batch_size, lanes, split_tokens, prefix_docs, chunk):
    """Whatever a rank has learnt from when it scores a chunk comes before that chunk in the order."""
    _, docs, phases = make_plan(lengths, batch_size, lanes, split_tokens, prefix_docs, chunk)
    scored = gpt.certified_order(phases, docs, chunk)
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
def test_base_adapts_only_on_documents_that_have_been_scored(lengths, batch_size, lanes, split_tokens, prefix_docs, chunk):
    _, docs, phases = make_plan(lengths, batch_size, lanes, split_tokens, prefix_docs, chunk)
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


def test_plan_does_not_know_ranks():
    """Ranks only choose which of the eight lanes they run; together they run each once."""
    for world_size in (1, 2, 4, 8):
        lanes = [lane for rank in range(world_size) for lane in range(rank, gpt.LANES, world_size)]
        assert sorted(lanes) == list(range(gpt.LANES))


# --- scoring a batch ----------------------------------------------------------------------------------------

class Setup:
    """A random model and stream, and the scores of its targets for a given plan."""

    def __init__(self, **changes) -> None:
        self.cfg = tiny_config(**{"ttt_lora_lr": 0.02, "ttt_batch_size": 3, "ttt_lora_alpha": 8.0, "token_order": 3,
                                  **changes})
        torch.manual_seed(0)
        self.model = random_model(self.cfg).requires_grad_(False)
        rng = np.random.default_rng(2)
        self.tokens = random_stream(rng, [20, 45, 1, 9, 70, 30, 1, 2, 17, 33], self.cfg.vocab_size)
        self.byte_counts = random_byte_counts(rng, self.tokens)
        self.docs = gpt.find_documents(self.tokens)

    def score(self, tokens=None, rank: int = 0, world_size: int = 1, phases=None, hints: gpt.Hints | None = None,
              cfg: gpt.Config | None = None) -> np.ndarray:
        """nll of every target this rank scores, NaN elsewhere; no adaptation of the base."""
        cfg, tokens = cfg or self.cfg, self.tokens if tokens is None else tokens
        run = as_rank(cfg, rank, world_size)
        stream = gpt.make_stream(run, tokens, self.byte_counts, hints, cfg)
        nll = torch.full((len(tokens) - 1,), float("nan"), dtype=torch.float64)
        draws = [gpt.lane_draws(cfg, run, lane) for lane in range(gpt.LANES)]
        for phase in phases or self.plan():
            gpt.score_phase(cfg, run, self.model, stream, self.docs, phase, gpt.BpbMeter(run), draws, nll_by_target=nll)
        return nll.numpy()

    def plan(self, lanes: int = gpt.LANES, prefix_docs: int = 0) -> list[gpt.Phase]:
        return gpt.plan_batches(self.docs, batch_size=self.cfg.ttt_batch_size, lanes=lanes, prefix_docs=prefix_docs,
                                chunk=self.cfg.ttt_chunk_size, window=self.cfg.ttt_eval_seq_len)

    def order(self, phases) -> np.ndarray:
        C = self.cfg.ttt_chunk_size
        return gpt.targets_in_order(gpt.certified_order(phases, self.docs, C), self.docs, C)

    def hints(self, tokens, phases) -> gpt.Hints:
        doc_start = np.repeat(self.docs.start, self.docs.length - 1)
        return twins.ngram_hints(tokens, self.order(phases), doc_start, self.cfg.token_order - 1, 0.5)


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup()


def test_every_target_gets_one_finite_score(setup):
    assert np.isfinite(setup.score()).all()


def test_scores_do_not_depend_on_the_number_of_ranks(setup):
    alone = setup.score()
    for world_size in (2, 4, 8):
        parts = np.stack([setup.score(rank=rank, world_size=world_size) for rank in range(world_size)])
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


def test_documents_of_a_batch_do_not_see_each_other(setup):
    run, cfg = as_rank(setup.cfg, 0, 1), setup.cfg
    members = tuple(np.argsort(setup.docs.length, kind="stable")[-3:].tolist())

    def scores(tokens: np.ndarray) -> np.ndarray:
        nll = torch.full((len(tokens) - 1,), float("nan"), dtype=torch.float64)
        bank = gpt.AdapterBank(cfg, slots(cfg), 3, run.device, gpt.lane_draws(cfg, run, 0))
        gpt.score_batch(cfg, run, setup.model, gpt.make_stream(run, tokens, setup.byte_counts, None, cfg), setup.docs,
                        gpt.Batch(0, members, True), bank, gpt.BpbMeter(run), nll)
        return nll.numpy()
    before = scores(setup.tokens)
    for changed_doc in members:
        start, length = setup.docs.start[changed_doc], setup.docs.length[changed_doc]
        after = scores(change_tokens(setup.tokens, slice(start, start + length), cfg.vocab_size))
        for doc in members:
            span = slice(setup.docs.start[doc], setup.docs.start[doc] + setup.docs.length[doc] - 1)
            if doc == changed_doc:
                assert (before[span] != after[span]).all()
            else:
                np.testing.assert_allclose(before[span], after[span], rtol=0, atol=1e-6)


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
    hints = setup.hints(setup.tokens, phases)
    assert hints.gate.any() and not hints.gate.all()
    plain, tilted = setup.score(cfg=cfg), setup.score(cfg=cfg, hints=hints)
    assert np.array_equal(plain[~hints.gate], tilted[~hints.gate])
    right = hints.gate & (hints.hint == setup.tokens[1:])
    q = np.exp(-plain[right])
    np.testing.assert_allclose(tilted[right], plain[right] - cfg.token_boost + np.log1p(q * np.expm1(cfg.token_boost)),
                               rtol=0, atol=1e-5)


def test_adapters_learn_from_the_model_alone_not_from_hints(setup):
    phases = setup.plan()
    hints = setup.hints(setup.tokens, phases)
    assert np.array_equal(setup.score()[~hints.gate], setup.score(hints=hints)[~hints.gate])


# --- adapters -----------------------------------------------------------------------------------------------

def new_bank(cfg: gpt.Config, rows: int = 3) -> gpt.AdapterBank:
    return gpt.AdapterBank(cfg, slots(cfg), rows, torch.device("cpu"), gpt.lane_draws(cfg, as_rank(cfg, 0, 1), 0))


def random_grads(bank: gpt.AdapterBank, seed: int, first: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p[first:].shape, generator=generator) for p in bank.params]


def test_settling_equals_stepping_with_zero_gradients():
    cfg = tiny_config(ttt_lora_lr=0.03, ttt_weight_decay=2.0)
    settled, stepped = new_bank(cfg), new_bank(cfg)
    missed = [4, 1, 0]                                              # steps after each document was finished
    for bank in (settled, stepped):
        bank.step(random_grads(bank, 1), 0)
    for step in range(4):
        first = sum(m > 3 - step for m in missed)                   # documents finished before this step
        active = random_grads(settled, 10 + step)
        settled.step([x[first:] for x in active], first)
        stepped.step([torch.cat([torch.zeros_like(x[:first]), x[first:]]) for x in active], 0)
    settled.settle(torch.tensor(missed))
    for a, b in zip(settled.params[::2], stepped.params[::2]):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_adapter_step_is_adamw_of_each_document_alone():
    cfg = tiny_config(ttt_lora_lr=0.01)
    bank = new_bank(cfg)
    twins = [torch.nn.Parameter(p[1].clone()) for p in bank.params]
    adamw = torch.optim.AdamW(twins, lr=cfg.ttt_lora_lr, betas=(cfg.ttt_beta1, cfg.ttt_beta2), eps=1e-10,
                              weight_decay=cfg.ttt_weight_decay)
    for step in range(3):
        grads = random_grads(bank, step)
        bank.step(grads, 0)
        for p, grad in zip(twins, grads):
            p.grad = grad[1].clone()
        adamw.step()
    for p, twin in zip(bank.params, twins):
        torch.testing.assert_close(p[1], twin.detach(), rtol=1e-6, atol=1e-8)


def test_new_batch_keeps_a_and_forgets_everything_else():
    bank = new_bank(tiny_config(ttt_lora_lr=0.01))
    bank.step(random_grads(bank, 0), 0)
    kept = [A.clone() for A in bank.params[::2]]
    assert all(B.any() for B in bank.params[1::2])
    bank.reset()
    assert all(torch.equal(A, old) for A, old in zip(bank.params[::2], kept))
    assert not any(x.any() for x in (*bank.params[1::2], *bank.exp_avg, *bank.exp_avg_sq, *bank.steps))


def test_without_warm_start_a_is_drawn_anew():
    bank = new_bank(tiny_config(ttt_warm_start_a=False))
    before = [A.clone() for A in bank.params[::2]]
    bank.reset()
    assert not any(torch.equal(A, old) for A, old in zip(bank.params[::2], before))


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
    assert {kind for kind, _ in new_bank(tiny_config()).names} == set(KINDS)


# --- adaptation of the base ---------------------------------------------------------------------------------

@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), cut=st.integers(0, 10),
       world_size=st.sampled_from((1, 2, 4, 8)))
def test_rank_shares_tile_the_row_and_cut_only_at_documents(lengths, cut, world_size):
    tokens = random_stream(np.random.default_rng(0), lengths)[cut:]
    shares = [gpt.rank_share(tokens, rank, world_size) for rank in range(world_size)]
    assert shares[0][0] == 0 and shares[-1][1] == len(tokens)
    for (_, end), (begin, _) in zip(shares, shares[1:]):
        assert end == begin
    assert all(begin <= end and (begin in (0, len(tokens)) or tokens[begin] == gpt.BOS) for begin, end in shares)


@pytest.mark.parametrize("world_size", (2, 4, 8))
def test_token_weighted_shares_give_the_gradient_of_the_whole_row(setup, world_size):
    cfg, model = setup.cfg, random_model(setup.cfg)
    row, S = setup.tokens[:129], setup.cfg.ttt_eval_seq_len

    def gradient(begin: int, end: int) -> torch.Tensor:
        model.zero_grad()
        if end > begin:
            inputs, targets = (torch.from_numpy(row[begin + k:end + k].astype(np.int64)) for k in (0, 1))
            bounds = torch.from_numpy(gpt.segment_bounds(row[begin:end], S))
            (model.loss(inputs, targets, bounds, looping=True, segment_cap=S) * ((end - begin) / 128)).backward()
            return torch.cat([p.grad.flatten() for p in model.parameters()])
        return torch.zeros(sum(p.numel() for p in model.parameters()))
    whole = gradient(0, 128)
    parts = sum(gradient(*gpt.rank_share(row[:128], rank, world_size)) for rank in range(world_size))
    assert float((parts - whole).norm() / whole.norm()) < 1e-5
    assert cfg.compile is False


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

def evaluate(setup: Setup, cfg: gpt.Config, tmp_path, tokens: np.ndarray | None = None) -> tuple[gpt.Score, gpt.GPT]:
    torch.manual_seed(0)
    model = random_model(cfg)
    data = SimpleNamespace(load_validation=lambda: (setup.tokens if tokens is None else tokens, setup.byte_counts))
    run = gpt.Run(cfg, log_path=tmp_path / "run.txt")
    return gpt.evaluate_ttt(cfg, run, model, data), model


def test_evaluation_is_deterministic_and_counts_every_target(setup, tmp_path):
    first, model = evaluate(setup, setup.cfg, tmp_path)
    assert (first.tokens, first.bytes) == (len(setup.tokens) - 1, setup.byte_counts[1:].sum())
    assert evaluate(setup, setup.cfg, tmp_path)[0] == first
    assert not any(p.requires_grad for p in model.parameters())


def test_evaluation_without_prefix_leaves_the_base_unchanged(setup, tmp_path, capsys):
    torch.manual_seed(0)
    before = random_model(setup.cfg)
    _, model = evaluate(setup, dataclasses.replace(setup.cfg, phased_ttt_prefix_docs=0), tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))
    assert "prefix_docs:0" in capsys.readouterr().out
    _, model = evaluate(setup, setup.cfg, tmp_path)
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))


def test_hints_are_counted_in_the_certified_order_inside_documents(setup):
    tokens = np.append(np.tile(setup.tokens % 4 + np.where(setup.tokens == gpt.BOS, 0, 20), 2), gpt.BOS).astype(np.uint16)
    docs, cfg = gpt.find_documents(tokens), setup.cfg
    phases = gpt.plan_batches(docs, batch_size=3, chunk=cfg.ttt_chunk_size, window=cfg.ttt_eval_seq_len)
    order = gpt.targets_in_order(gpt.certified_order(phases, docs, cfg.ttt_chunk_size), docs, cfg.ttt_chunk_size)
    doc_start = np.repeat(docs.start, docs.length - 1)
    hints = gpt.make_hints(cfg, gpt.Run(cfg), tokens, order, docs)
    arguments = doc_start, cfg.token_order - 1, cfg.token_threshold
    for got, want in zip(hints, twins.ngram_hints(tokens, order, *arguments)):
        assert np.array_equal(got, want)
    assert not np.array_equal(hints.gate, twins.ngram_hints(tokens, np.sort(order), *arguments).gate)
    assert gpt.make_hints(dataclasses.replace(cfg, ngram_tilt_enabled=False), gpt.Run(cfg), tokens, order, docs) is None


def test_future_tokens_cannot_change_the_score_of_a_whole_evaluation(setup, tmp_path, monkeypatch):
    """Hints, carried adapters and the adapted base together: only what comes earlier in the certified order counts."""
    kept = []
    score_phase = gpt.score_phase
    monkeypatch.setattr(gpt, "score_phase", lambda *args: score_phase(*args, nll_by_target=kept[-1]))
    cfg = dataclasses.replace(setup.cfg, token_threshold=0.5)

    def scores(tokens: np.ndarray) -> np.ndarray:
        kept.append(torch.full((len(tokens) - 1,), float("nan"), dtype=torch.float64))
        evaluate(setup, cfg, tmp_path, tokens)
        return kept[-1].numpy()
    before = scores(setup.tokens)
    phases = setup.plan(prefix_docs=cfg.phased_ttt_prefix_docs)
    order = setup.order(phases)
    assert len(phases) == 2 and np.isfinite(before).all()
    for cut in np.linspace(1, len(order) - 20, 6).astype(int):
        after = scores(change_tokens(setup.tokens, order[cut:] + 1, cfg.vocab_size))
        assert np.array_equal(before[order[:cut]], after[order[:cut]]), cut
        assert (before[order[cut:]] != after[order[cut:]]).any()


def test_audit_writes_the_order_and_refuses_one_with_gaps(setup, tmp_path):
    cfg = dataclasses.replace(setup.cfg, audit=True)
    evaluate(setup, cfg, tmp_path)
    order = np.fromfile(tmp_path / "run.order.bin", "<i8")
    C = cfg.ttt_chunk_size
    phases = gpt.plan_batches(setup.docs, batch_size=cfg.ttt_batch_size, prefix_docs=cfg.phased_ttt_prefix_docs, chunk=C,
                              window=cfg.ttt_eval_seq_len)
    assert np.array_equal(order, gpt.targets_in_order(gpt.certified_order(phases, setup.docs, C), setup.docs, C))
    run = gpt.Run(cfg, log_path=tmp_path / "bad.txt")
    for bad in (order[1:], np.append(order, 0), np.where(order == 3, 4, order)):
        with pytest.raises(RuntimeError, match="every target exactly once"):
            gpt.audit_order(run, bad, len(setup.tokens) - 1)
    assert not (tmp_path / "bad.order.bin").exists()
