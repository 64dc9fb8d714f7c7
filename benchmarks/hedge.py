"""Would a tilt whose boost is learnt while scoring beat a fixed one? Answered from dumped probabilities.

    python benchmarks/hedge.py logs/RUN_ID.scores0.npz ...

The files are what a run with AUDIT=1 leaves, one from each rank: every target in the order in which it was
scored, with its nats under the model alone, the model's log-probability of the hinted token, whether the hint
is the target, and its lane. Every lane learns weights of its own, because lanes run side by side.

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
    parser.add_argument("scores", nargs="+", help="score files of one run")
    parser.add_argument("--boosts", default=",".join(map(str, BOOSTS)), help="default %(default)s")
    options = parser.parse_args(arguments)
    try:
        boosts = np.array([float(boost) for boost in options.boosts.split(",")])
    except ValueError as error:
        parser.error(f"--boosts {options.boosts}: expected numbers and commas, found: {error}")
    candidates, lanes, other_nats, num_bytes, hinted, count = [], [], 0.0, 0, 0, 0
    for path in options.scores:
        try:
            with np.load(path, allow_pickle=False) as file:
                saved = {name: file[name] for name in ("nll", "log_q_hint", "boost", "is_hit", "lane", "bytes")}
        except (OSError, ValueError, KeyError, AttributeError) as error:
            parser.error(f"{path}: expected a score file of a run with AUDIT=1, found: {error}")
        nll, log_q_hint, boost = (saved[name].astype(np.float64) for name in ("nll", "log_q_hint", "boost"))
        has_hint = boost > 0
        other_nats += nll[~has_hint].sum()
        num_bytes += int(saved["bytes"])
        is_hit = saved["is_hit"][has_hint].astype(np.float64)
        candidates.append(boosted_nll(nll[has_hint], log_q_hint[has_hint], is_hit, boosts))
        lanes.append(saved["lane"][has_hint])              # no two ranks share a lane
        hinted, count = hinted + int(has_hint.sum()), count + len(nll)
    candidates, lanes = np.concatenate(candidates), np.concatenate(lanes)
    print(f"hedge targets:{count} hinted:{hinted} lanes:{len(np.unique(lanes))}")

    def bpb(nats: float) -> float:
        return (nats + other_nats) / np.log(2) / num_bytes

    for boost, nats in zip(boosts, candidates.sum(0)):
        print(f"hedge fixed_boost:{boost:g} bpb:{bpb(nats):.6f}")
    for share in (0.0, 1e-4, 1e-3):
        nats, last = 0.0, []
        for lane in np.unique(lanes):
            losses, weights = hedge_nll(candidates[lanes == lane], share)
            nats += losses.sum()
            last.append(weights[-1] @ boosts)
        print(f"hedge share:{share:g} bpb:{bpb(nats):.6f} last_boost:{np.mean(last):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
