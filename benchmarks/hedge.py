"""Would a tilt whose boost is learnt while scoring beat a fixed one? Answered from dumped probabilities.

    python benchmarks/hedge.py DUMP.npz

DUMP.npz holds, for every target that has a hint, in the order in which targets are scored:

    nll          (n,) nats of the target under the model alone
    log_q_hint   (n,) model's log-probability of the hinted token
    is_hit       (n,) whether the hint is the target
    other_nats   ()   sum of nats over targets without a hint, to which every boost gives the same
    bytes        ()   bytes of the original text

Each boost b makes a distribution: the hint's probability times exp(b), renormalized. The hedge predicts with
their weighted mean, again a distribution. A weight is proportional to the probability that its boost gave to
the targets scored so far, so a prediction depends on earlier targets only, and the total loss exceeds that of
the best single boost by at most ln(number of boosts) nats. `share` gives up some of that to follow changes.
"""
from __future__ import annotations

import argparse
import sys

import numpy as np

BOOSTS = (0.0, 0.66, 1.31, 1.97, 2.62, 3.28, 3.94, 5.25)


def boosted_nll(nll: np.ndarray, log_q_hint: np.ndarray, is_hit: np.ndarray,
                boosts: np.ndarray) -> np.ndarray:
    """Nats of each target (n, K) when each of the boosts (K,) is applied to its hint."""
    q_hint = np.exp(np.minimum(log_q_hint, 0.0))
    return nll[:, None] - boosts * is_hit[:, None] + np.log1p(q_hint[:, None] * np.expm1(boosts))


def hedge_nll(candidates: np.ndarray, share: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Nats of each target (n,) under the mixture of K candidates with nats (n, K), and its weights (n, K).

    share   part of the weight that is dealt out evenly again after every target, in [0, 1).
    """
    num_targets, num_candidates = candidates.shape
    log_weights = np.full(num_candidates, -np.log(num_candidates))
    losses, used = np.empty(num_targets), np.empty(candidates.shape)
    for target, nats in enumerate(candidates):
        used[target] = np.exp(log_weights)               # 1. the weights are fixed before the target counts
        joint = log_weights - nats
        loss = -np.logaddexp.reduce(joint)               # 2. score
        losses[target] = loss
        log_weights = joint + loss                       # 3. only then learn from it
        if share:
            log_weights = np.log((1 - share) * np.exp(log_weights) + share / num_candidates)
    return losses, used


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump")
    parser.add_argument("--boosts", default=",".join(map(str, BOOSTS)), help="default %(default)s")
    options = parser.parse_args(arguments)
    boosts = np.array([float(boost) for boost in options.boosts.split(",")])
    with np.load(options.dump, allow_pickle=False) as dump:
        nll, log_q_hint, is_hit = (dump[name].astype(np.float64) for name in ("nll", "log_q_hint", "is_hit"))
        other_nats, num_bytes = float(dump["other_nats"]), int(dump["bytes"])
    candidates = boosted_nll(nll, log_q_hint, is_hit, boosts)

    def bpb(nats: np.ndarray) -> float:
        return (float(nats.sum()) + other_nats) / np.log(2) / num_bytes

    for boost, nats in zip(boosts, candidates.T):
        print(f"hedge fixed_boost:{boost:g} bpb:{bpb(nats):.6f}")
    for share in (0.0, 1e-4, 1e-3):
        losses, weights = hedge_nll(candidates, share)
        print(f"hedge share:{share:g} bpb:{bpb(losses):.6f} mean_boost:{(weights @ boosts).mean():.3f} "
              f"last_boost:{weights[-1] @ boosts:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
