"""Section 12: n-gram hints by definition and in C, what they may depend on, and the tilt of a probability."""
import functools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as gpt
import twins

BOTH = pytest.mark.parametrize("hints_of", (twins.ngram_hints, twins.c_ngram_hints), ids=("plain", "c"))


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    """Every NgramTable compiles its C code; here they share one library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt, "compile_c", functools.cache(gpt.compile_c))
        yield


def certified_stream(lengths, seed: int, alphabet: int = 3, lanes: int = 2, batch_size: int = 2, chunk: int = 4):
    """Random documents over a small alphabet, and their targets in the certified order of a small plan.

    Returns tokens, order, doc_start and the documents.
    """
    rng = np.random.default_rng(seed)
    tokens = np.concatenate([np.append(gpt.BOS, rng.integers(8, 8 + alphabet, n - 1)) for n in lengths]).astype(np.uint16)
    docs = gpt.find_documents(tokens)
    phases = gpt.plan_batches(docs, batch_size=batch_size, lanes=lanes, max_tokens=40, chunk=chunk, window=16)
    order = gpt.targets_in_order(gpt.certified_order(phases, docs, chunk))
    doc_start = np.zeros(len(tokens) - 1, np.int64)
    for start, length in zip(docs.start, docs.length):
        doc_start[start:start + length - 1] = start
    return tokens, order, doc_start, docs


def same(first: twins.Hints, second: twins.Hints) -> bool:
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(first, second))


# --- golden vectors -----------------------------------------------------------------------------------------

@BOTH
def test_every_recorded_stream_and_variant_is_exact(load_vectors, hints_of):
    z = load_vectors("ngram")
    variants = sorted(name.removesuffix("_hint") for name in z if name.endswith("_hint"))
    assert variants
    for variant in variants:
        stream, order, percent = re.fullmatch(r"(.+?)(?:_order(\d+)_thr(\d+))?", variant).groups()
        tokens = z[f"{stream}_tokens"]
        n = len(tokens) - 1
        context = int(order or 16) - 1
        hints = hints_of(tokens, np.arange(n), np.zeros(n, np.int64), context, int(percent or 80) / 100)
        for name, values in hints._asdict().items():
            if f"{variant}_{name}" in z:
                assert np.array_equal(values, z[f"{variant}_{name}"]), (variant, name)
        assert not hints.hint[~hints.gate].any(), variant


def test_tilt_matches_the_recorded_values_in_both_precisions(load_vectors):
    z = load_vectors("tilt")
    logits, target, hint = (torch.from_numpy(z[name]) for name in ("logits", "target", "hint"))
    boost = torch.from_numpy(np.where(z["gate"], z["boost"], 0).astype(np.float32))
    nll, log_q = torch.from_numpy(z["nll"]), torch.from_numpy(z["log_q_hint"])
    single = gpt.tilt(nll, log_q, target == hint, boost)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, torch.from_numpy(z["nll_tilted_f32"]), rtol=0, atol=2e-6)
    double = gpt.tilt(nll.double(), log_q.double(), target == hint, boost.double())
    torch.testing.assert_close(double, torch.from_numpy(z["nll_tilted_f64"]), rtol=0, atol=2e-6)
    # The recorded inputs are what log-softmax gives, except where log q was raised to test the clamp.
    log_probs = logits.log_softmax(-1)
    torch.testing.assert_close(-log_probs[torch.arange(len(target)), target], nll, rtol=0, atol=1e-5)


# --- the table ----------------------------------------------------------------------------------------------

# Lone BOS documents and a lone final BOS included; a stream without any target is refused when it is loaded.
streams = dict(lengths=st.lists(st.integers(1, 60), max_size=6).map(lambda rest: [3, *rest]), seed=st.integers(0, 10_000))


@settings(max_examples=60)
@given(**streams, alphabet=st.integers(1, 5), context=st.integers(1, 9), threshold=st.sampled_from((0.0, 0.5, 0.8, 1.0)))
def test_c_equals_the_definition_in_certified_orders(lengths, seed, alphabet, context, threshold):
    tokens, order, doc_start, _ = certified_stream(lengths, seed, alphabet)
    arguments = tokens, order, doc_start, context, threshold
    assert same(twins.c_ngram_hints(*arguments), twins.ngram_hints(*arguments))


def test_c_equals_the_definition_where_contexts_and_counted_tokens_fill_the_table():
    """Two-token contexts over 40 tokens: thousands of counted pairs beside the contexts, so that they collide."""
    rng = np.random.default_rng(0)
    tokens = np.append(gpt.BOS, rng.integers(8, 48, 12_000)).astype(np.uint16)
    n = len(tokens) - 1
    arguments = tokens, np.arange(n), np.zeros(n, np.int64), 2, 0.5
    assert same(twins.c_ngram_hints(*arguments), twins.ngram_hints(*arguments))


@settings(max_examples=40)
@given(**streams, size=st.integers(1, 50))
def test_hints_made_in_slices_are_those_made_at_once(lengths, seed, size):
    tokens, order, doc_start, _ = certified_stream(lengths, seed)
    whole = twins.c_ngram_hints(tokens, order, doc_start, 3, 0.6)
    table = gpt.NgramTable(tokens, len(order), 3, 0.6)
    for at in range(0, len(order), size):
        part = order[at:at + size]
        hint, confidence = table.feed(part, doc_start[part])
        assert np.array_equal(hint, np.where(whole.gate, whole.hint, -1)[part])
        assert np.array_equal(confidence, whole.confidence[part])


@pytest.mark.parametrize("context", (1, 3, 4, 5, 8, 15, 63))
def test_contexts_that_differ_in_one_token_are_told_apart(context):
    """A repeated run teaches a hint; one changed token anywhere in its context must silence it."""
    run = np.arange(100, 100 + context)
    for changed in range(context):
        other = run.copy()
        other[changed] = 7000
        tokens = np.concatenate([run, [50], run, [50], other, [50]]).astype(np.uint16)
        n = len(tokens) - 1
        hints = twins.c_ngram_hints(tokens, np.arange(n), np.zeros(n, np.int64), context, 0.8)
        assert hints.gate[2 * context] and hints.hint[2 * context] == 50
        assert not hints.gate[n - 1] and hints.confidence[n - 1] == 0


@BOTH
@settings(max_examples=40)
@given(**streams, data=st.data())
def test_later_tokens_cannot_change_earlier_hints(hints_of, lengths, seed, data):
    """Prefix-only in the certified order; document starts stay, because the order itself is built on them."""
    tokens, order, doc_start, _ = certified_stream(lengths, seed)
    cut = data.draw(st.integers(0, len(order) - 1))
    changed = tokens.copy()
    later = order[cut:] + 1
    later = later[tokens[later] != gpt.BOS]
    changed[later] = np.random.default_rng(seed + 1).integers(8, 11, len(later))
    before, after = (hints_of(t, order, doc_start, 3, 0.6) for t in (tokens, changed))
    for name in twins.Hints._fields:
        # The target at `cut` itself has been changed: its own hint must not know.
        assert np.array_equal(getattr(before, name)[order[:cut + 1]], getattr(after, name)[order[:cut + 1]]), name


@BOTH
@settings(max_examples=30)
@given(**streams, context=st.integers(1, 8))
def test_contexts_lie_inside_their_document(hints_of, lengths, seed, context):
    tokens, order, doc_start, docs = certified_stream(lengths, seed, alphabet=1)
    hints = hints_of(tokens, order, doc_start, context, 0.5)
    position = np.arange(len(tokens) - 1) - doc_start               # of the last context token in its document
    assert not hints.confidence[position < context - 1].any()
    assert not hints.gate[position < context - 1].any()


@BOTH
def test_a_document_border_hides_what_an_undivided_stream_would_show(hints_of):
    tokens = np.tile([gpt.BOS, 20, 21, 22], 6).astype(np.uint16)
    n = len(tokens) - 1
    whole = hints_of(tokens, np.arange(n), np.zeros(n, np.int64), 4, 0.8)
    apart = hints_of(tokens, np.arange(n), np.arange(n) // 4 * 4, 4, 0.8)
    assert whole.gate[7:].all()                                     # every context of the second period is known
    # Only BOS 20 21 22 -> BOS fits inside a document.
    assert np.array_equal(np.flatnonzero(apart.gate), np.arange(7, n, 4)) and (apart.hint[apart.gate] == gpt.BOS).all()


@BOTH
def test_hints_follow_the_scoring_order_not_the_stream(hints_of):
    """Two equal documents: whichever is scored second gets the hints."""
    body = [gpt.BOS, 30, 31, 32, 33]
    tokens = np.array([*body, *body, gpt.BOS], np.uint16)
    doc_start = np.repeat([0, 5], 5)
    forward = hints_of(tokens, np.arange(10), doc_start, 2, 0.8)
    backward = hints_of(tokens, np.r_[5:10, 0:5], doc_start, 2, 0.8)
    assert not forward.gate[:5].any() and forward.gate[6:].all()
    assert not backward.gate[5:].any() and backward.gate[1:5].all()


@BOTH
def test_ties_keep_the_incumbent_and_the_threshold_is_inclusive(hints_of):
    follow = [40, 41, 41, 40, 40, 40, 40, 40]                       # after the context (9,)
    tokens = np.array([t for y in follow for t in (9, y)] + [9, 40], np.uint16)
    n = len(tokens) - 1
    hints = hints_of(tokens, np.arange(n), np.zeros(n, np.int64), 1, 0.5)
    seen = [i for i in range(n) if tokens[i] == 9]
    # Counts before each look-up: -, 40:1, 1-1 (40 first), 41:2 of 3, 2-2 (41 was first to reach 2), 40:3 of 5, ...
    assert hints.hint[seen].tolist() == [0, 40, 40, 41, 41, 40, 40, 40, 40]
    shares = [0, 1, 1 / 2, 2 / 3, 2 / 4, 3 / 5, 4 / 6, 5 / 7, 6 / 8]
    assert np.array_equal(hints.confidence[seen], np.array(shares, np.float32))
    assert hints.gate[seen].tolist() == [False] + [True] * 8


@BOTH
def test_targets_left_out_of_the_order_are_neither_hinted_nor_counted(hints_of):
    tokens = np.tile(np.array([11, 12, 13], np.uint16), 5)
    order = np.arange(9, len(tokens) - 1)
    hints = hints_of(tokens, order, np.zeros(len(tokens) - 1, np.int64), 2, 0.8)
    assert not hints.confidence[:12].any() and hints.gate[12:].all()
    assert not any(x.any() for x in hints_of(tokens, order[:0], np.zeros(len(tokens) - 1, np.int64), 2, 0.8))


def test_missing_or_failing_compiler_is_reported(monkeypatch):
    compile_c = gpt.compile_c.__wrapped__
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(RuntimeError, match="no C compiler.*no-such-compiler.*install gcc or clang"):
        compile_c("int f(void) { return 0; }")
    monkeypatch.delenv("CC")
    with pytest.raises(RuntimeError, match="failed:.*error"):
        compile_c("this is no C")


# --- tilt ---------------------------------------------------------------------------------------------------

@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), boost=st.floats(0, 12), spread=st.floats(0.01, 20))
def test_tilted_probabilities_sum_to_one(seed, boost, spread):
    generator = torch.Generator().manual_seed(seed)
    log_probs = (spread * torch.randn(50, generator=generator, dtype=torch.float64)).log_softmax(-1)
    hint = int(torch.randint(50, (), generator=generator))
    tilted = gpt.tilt(-log_probs, log_probs[hint].expand(50), torch.arange(50) == hint,
                      torch.tensor(boost, dtype=torch.float64))
    assert float((-tilted).exp().sum()) == pytest.approx(1.0, abs=1e-12)
    odds = (-tilted).exp() / log_probs.exp()
    assert float(odds[hint] / odds[hint - 1]) == pytest.approx(np.exp(boost), rel=1e-9)


def test_closed_gates_change_nothing_and_right_hints_always_help():
    nll = torch.rand(100) * 12
    log_q = -torch.rand(100) * 12
    hit = torch.arange(100) < 50
    assert torch.equal(gpt.tilt(nll, log_q, hit, torch.zeros(100)), nll)
    change = gpt.tilt(torch.where(hit, -log_q, nll), log_q, hit, torch.full((100,), 2.625)) - torch.where(hit, -log_q, nll)
    assert (change[hit] <= 0).all() and (change[~hit] >= 0).all()


def test_a_log_probability_rounded_above_zero_counts_as_zero():
    args = torch.tensor([1e-6]), torch.tensor([True]), torch.tensor([2.625])
    assert torch.equal(gpt.tilt(args[0], torch.tensor([3e-7]), *args[1:]), gpt.tilt(args[0], torch.tensor([0.0]), *args[1:]))
