#!/usr/bin/env python3
"""Train once and read out many models: the average of the weights, the weights, blends of both, and half-way.

    RUN_ID=readouts DATA_PATH=shards python benchmarks/readouts.py            settings as of train_gpt.py

One process runs train_gpt.py to its first diagnostic. Then the log gets BPB of the validation text, without
quantization and test-time training, of share * weights + (1 - share) * average, once with the blended embedding
and once with its average. Two checkpoints are left: <RUN_ID>.weights, the average as of any run, and
<RUN_ID>_half.weights, that of half the training time. `benchmarks/rounding.py --sizes` tells what either loses
by quantization at any size.
"""
import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as gpt  # noqa: E402

SHARES = (0.2, 0.4, 0.6, 1.0)            # of the weights; the average alone is the run's own diagnostic


class KeptAverage(gpt.WeightAverage):
    """The average of a run that keeps it half-way, and at the end the weights beside it."""

    half_s: float                        # seconds of training after which half of it is done
    latest: "KeptAverage"                # the one that the run made

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, decay)
        self.names = [name for name, _ in model.named_parameters()]
        self.begin_s: float | None = None
        self.half: list[Tensor] = []
        self.weights: list[Tensor] = []
        KeptAverage.latest = self

    def update(self) -> None:
        super().update()
        self.begin_s = self.begin_s or time.monotonic()
        if not self.half and time.monotonic() - self.begin_s >= self.half_s:
            self.half = [average.clone() for average in self.shadow]

    def apply(self) -> None:
        self.weights = [p.detach().clone() for p in self.params]
        super().apply()

    def blend(self, share: float, with_embedding: bool) -> dict[str, Tensor]:
        """share * weights + (1 - share) * average by name; without the embedding, that is its average."""
        pairs = zip(self.names, self.shadow, self.weights)
        return {name: average.lerp(weights, share if with_embedding or name != "tok_emb" else 0.0)
                for name, average, weights in pairs}


def read_out(cfg: gpt.Config, run: gpt.Run, model: gpt.GPT, data: gpt.Dataset, name: str) -> gpt.Score:
    """The run's diagnostic; then the same of every blend, and the checkpoint of half-way."""
    score = plain_diagnose(cfg, run, model, data, name)
    kept = KeptAverage.latest
    if not kept.half:
        raise gpt.RunError("training ended within one step of half-way; raise MAX_WALLCLOCK_SECONDS")
    final = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens, byte_counts = data.load_validation()
    for share in SHARES:
        for with_embedding in (False, True):
            model.load_state_dict(kept.blend(share, with_embedding))
            bpb = gpt.evaluate_plain(cfg, run, model, tokens, byte_counts).bpb
            run.log(f"readout share:{share:g} embedding:{'blended' if with_embedding else 'average'} "
                    f"bpb:{bpb:.6f} difference:{bpb - score.bpb:+.6f}")

    model.load_state_dict(dict(zip(kept.names, kept.half)))
    bpb = gpt.evaluate_plain(cfg, run, model, tokens, byte_counts).bpb
    gpt.sort_hidden_units(model)
    streams = {name: p.detach().cpu().numpy().tobytes() for name, p in model.named_parameters()}
    path = gpt.checkpoint_path(run).with_name(f"{run.run_id}_half.weights")
    gpt.write_file(path, gpt.build_container(gpt.CHECKPOINT_MAGIC, cfg, streams, origin=run.origin))
    run.log(f"readout half_way bpb:{bpb:.6f} file:{path.name}")
    model.load_state_dict(final)
    return score


plain_diagnose = gpt.diagnose


def main(argv: Sequence[str], env: Mapping[str, str]) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    if env.get("WORLD_SIZE", "1") != "1":
        print(f"error: WORLD_SIZE={env['WORLD_SIZE']}: expected one process, because every rank would keep its own "
              "half-way; start it with python", file=sys.stderr)
        return 2
    try:
        cfg = dataclasses.replace(gpt.Config.from_env(env), prequant_only=True)
        if cfg.resumes or not cfg.max_wallclock_seconds:
            raise gpt.ConfigError("a readout trains for a time: expected MAX_WALLCLOCK_SECONDS above 0 and neither "
                                  "QUANTIZE_ONLY nor TTT_EVAL_ONLY")
        KeptAverage.half_s = (cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds) / 2
        gpt.WeightAverage, gpt.diagnose = KeptAverage, read_out
        with gpt.Run.start(cfg) as run:
            gpt.run_pipeline(cfg, run)
    except (gpt.ConfigError, gpt.DataError, gpt.ArtifactError, gpt.RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, gpt.ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
