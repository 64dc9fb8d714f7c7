#!/usr/bin/env python3
"""Compare plain GPTQ with RDO_LAMBDA on the averaged weights of an earlier run, at equal bytes.

    RUN_ID=h100_180s DATA_PATH=shards python benchmarks/rounding.py          settings as of that run
    RUN_ID=h100_180s DATA_PATH=shards python benchmarks/rounding.py --sizes 10,12,14,15.9

With --sizes: what quantization costs at each of these sizes of the artifact (millions of bytes), plain and with
RDO_LAMBDA=1; read off it how large a model suits the limit. Without: plain GPTQ, the trellis alone, RDO_LAMBDA
of 0.5 and 1, and 1 without protected columns or without low-rank corrections, each as many bytes as plain GPTQ
or at most 4 kB less. Given are the bytes, BPB of the validation text without test-time training, and the tax:
BPB above that of the unquantized weights. Everything goes to the log of run `<RUN_ID>_rounding`, with the
seconds of each stage; its artifacts lie beside those of the earlier run.
"""
import argparse
import dataclasses
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as gpt  # noqa: E402

VARIANTS = (                               # the first one's bytes are what the others may spend
    {}, {"rdo_lambda": 1e-9},                             # next to 0: no step is scaled
    {"rdo_lambda": 0.5}, {"rdo_lambda": 1.0}, {"rdo_lambda": 1.0, "awq_lite_enabled": False},
    {"rdo_lambda": 1.0, "lqer_enabled": False})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", metavar="MB,...", help="sizes of the artifact, millions of bytes")
    options = parser.parse_args()
    try:
        sizes = [float(size) for size in options.sizes.split(",")] if options.sizes else []
        if not all(0 < size < 1000 for size in sizes):
            raise ValueError
    except ValueError:
        parser.error(f"--sizes {options.sizes}: expected numbers between 0 and 1000 with commas between them")
    try:
        measure([round(size * 1e6) for size in sizes])
    except gpt.ConfigError as error:
        parser.error(str(error))
    except (gpt.DataError, gpt.ArtifactError, gpt.RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(sizes: list[int]) -> None:
    cfg = gpt.Config.from_env(os.environ)
    if not cfg.run_id:
        raise gpt.ConfigError("RUN_ID is not set: expected that of a run with a checkpoint")
    plain = dataclasses.replace(cfg, run_id=f"{cfg.run_id}_rounding", rdo_lambda=0.0, fill_artifact=False)
    with gpt.Run.start(plain) as run:
        data = gpt.Dataset.open(plain)
        tokens, byte_counts = data.load_validation()
        model = gpt.build_model(plain, run)
        checkpoint = gpt.checkpoint_path(run).with_name(f"{cfg.run_id}.weights")
        streams, _ = gpt.read_container(checkpoint, gpt.CHECKPOINT_MAGIC, plain)
        model.load_state_dict({name: torch.frombuffer(bytearray(streams[name]), dtype=p.dtype).view_as(p)
                               for name, p in model.named_parameters()})
        gpt.log_start(plain, run, data, gpt.check_tokenizer(plain, data), model)
        run.begin()
        weights = {name: p.clone() for name, p in model.state_dict().items()}
        stats = gpt.collect_hessians(dataclasses.replace(plain, rdo_lambda=1.0), run, model, data.train,
                                     plain.gptq_calibration_batches)

        def bpb() -> float:
            return gpt.evaluate_plain(plain, run, model, tokens, byte_counts).bpb

        def rounded(variant: gpt.Config, limit: int) -> tuple[int, float]:
            """Bytes of the artifact and its BPB; the model has its own weights again afterwards."""
            artifact = gpt.fit_artifact(variant, run, model, stats, limit)
            if run.rank == 0:
                gpt.write_file(gpt.artifact_path(run), artifact)
            run.barrier("reading the artifact")
            gpt.read_artifact(variant, run, model)
            score = bpb()
            model.load_state_dict(weights)
            return int(run.agree([len(artifact)])[0]), score

        unquantized = bpb()
        run.log(f"rounding unquantized_bpb:{unquantized:.6f}")
        for size in sizes:
            for share in (0.0, 1.0):
                filled = dataclasses.replace(plain, fill_artifact=True, rdo_lambda=share)
                num_bytes, score = rounded(filled, size)
                run.log(f"rounding rdo_lambda:{share:g} limit_bytes:{size} bytes:{num_bytes} bpb:{score:.6f} "
                        f"tax:{score - unquantized:.6f}")
        plain_tax, limit = None, gpt.SIZE_LIMIT
        for settings in () if sizes else VARIANTS:
            variant = dataclasses.replace(plain, fill_artifact=plain_tax is not None, **settings)
            num_bytes, score = rounded(variant, limit)
            if plain_tax is None:                         # plain GPTQ, the size and tax to compare with
                plain_tax, limit = score - unquantized, num_bytes
            shown = " ".join(f"{name}:{float(value):g}" for name, value in settings.items()) or "rdo_lambda:0"
            run.log(f"rounding {shown} bytes:{num_bytes} bpb:{score:.6f} "
                    f"tax:{score - unquantized:.6f} relative_tax:{(score - unquantized) / plain_tax:.3f}")


if __name__ == "__main__":
    sys.exit(main())
