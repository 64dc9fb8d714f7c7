"""The hedge over the tilt's boost: a distribution, causal, and nearly as good as the best boost."""
import sys

import numpy as np
import pytest
import torch

import train_gpt as gpt


@pytest.fixture(scope="module")
def hedge(repo):
    sys.path.insert(0, str(repo / "benchmarks"))
    try:
        import hedge
    finally:
        sys.path.pop(0)
    return hedge


def some_targets(count: int = 400, hit_rate: float = 0.7, seed: int = 0) -> tuple[np.ndarray, ...]:
    """(nll, log_q_hint, is_hit): where the hint is the target, both are its probability."""
    rng = np.random.default_rng(seed)
    log_q_hint = np.log(rng.uniform(0.01, 0.9, count))
    is_hit = (rng.random(count) < hit_rate).astype(np.float64)
    left = np.log1p(-np.exp(log_q_hint))
    return np.where(is_hit, -log_q_hint, -left - np.log(rng.uniform(0.1, 1, count))), log_q_hint, is_hit


def test_one_boost_is_the_script_s_tilt(hedge):
    nll, log_q_hint, is_hit = some_targets()
    boost = torch.tensor(2.625, dtype=torch.float64)
    want = gpt.tilt(*map(torch.tensor, (nll, log_q_hint, is_hit)), boost).numpy()
    found = hedge.boosted_nll(nll, log_q_hint, is_hit, np.array([2.625]))
    assert np.allclose(found[:, 0], want, atol=1e-9)
    assert np.allclose(hedge.hedge_nll(found)[0], want, atol=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.01])
def test_the_mixture_sums_to_one_at_every_target(hedge, share):
    """Whatever the weights are by then, the probabilities of all tokens sum to one."""
    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet(np.full(9, 0.3), 50)
    hints, targets = rng.integers(9, size=(2, 50))
    boosts, rows = np.array(hedge.BOOSTS), np.arange(50)
    log_q_hint = np.log(probabilities[rows, hints])

    def candidates(tokens: np.ndarray) -> np.ndarray:
        nll, is_hit = -np.log(probabilities[rows, tokens]), (tokens == hints) * 1.0
        return hedge.boosted_nll(nll, log_q_hint, is_hit, boosts)

    weights = hedge.hedge_nll(candidates(targets), share)[1]
    total = sum((weights * np.exp(-candidates(np.full(50, token)))).sum(1) for token in range(9))
    assert np.allclose(total, 1)
    assert np.allclose(weights.sum(1), 1)


@pytest.mark.parametrize("share", [0.0, 0.01])
def test_later_targets_cannot_change_a_score(hedge, share):
    candidates = hedge.boosted_nll(*some_targets(), np.array(hedge.BOOSTS))
    changed = candidates.copy()
    changed[100:] = candidates[100:][::-1] + 1
    losses, weights = hedge.hedge_nll(candidates, share)
    again, weights_again = hedge.hedge_nll(changed, share)
    assert np.array_equal(losses[:100], again[:100]) and np.array_equal(weights[:101], weights_again[:101])
    assert not np.array_equal(losses[101:], again[101:])


@pytest.mark.parametrize("hit_rate", [0.0, 0.3, 0.95])
def test_the_loss_is_bounded_by_the_best_boost_s(hedge, hit_rate):
    candidates = hedge.boosted_nll(*some_targets(hit_rate=hit_rate), np.array(hedge.BOOSTS))
    losses, weights = hedge.hedge_nll(candidates)
    best = candidates.sum(0).min()
    assert losses.sum() <= best + np.log(len(hedge.BOOSTS)) + 1e-9
    assert weights[-1].argmax() == candidates[:-1].sum(0).argmin()


def test_a_share_follows_a_change_that_plain_weights_are_slow_to_see(hedge):
    parts = [some_targets(1000, hit_rate, seed) for seed, hit_rate in enumerate((0.99, 0.02))]
    candidates = hedge.boosted_nll(*map(np.concatenate, zip(*parts)), np.array(hedge.BOOSTS))
    assert hedge.hedge_nll(candidates, 1e-3)[0].sum() < hedge.hedge_nll(candidates)[0].sum()


def test_the_files_of_a_run_are_summed_up(hedge, tmp_path, capsys):
    """Two ranks with one lane each; targets without a hint count with the model's own nats."""
    paths, total = [], 0.0
    for rank, seed in enumerate((3, 4)):
        nll, log_q_hint, is_hit = some_targets(seed=seed)
        boost = np.where(np.arange(len(nll)) % 4, 2.625, 0.0)
        total += nll.sum()
        paths.append(str(tmp_path / f"run.scores{rank}.npz"))
        np.savez(paths[-1], target=np.arange(len(nll)), lane=np.full(len(nll), rank), nll=nll, log_q_hint=log_q_hint,
                 is_hit=is_hit > 0, boost=boost, bytes=1000)
    assert hedge.main([*paths, "--boosts", "0,2"]) == 0
    shown = capsys.readouterr().out
    assert "targets:800 hinted:600 lanes:2" in shown and "share:0.001" in shown
    assert f"fixed_boost:0 bpb:{total / np.log(2) / 2000:.6f}" in shown
