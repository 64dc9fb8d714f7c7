#!/usr/bin/env python3
"""Compare plain GPTQ with RDO_LAMBDA on the averaged weights of an earlier run, at equal bytes.

    RUN_ID=h100_180s DATA_PATH=shards python benchmarks/rounding.py          settings as of that run

For each variant: bytes of the artifact, seconds to quantize, encode and decode, BPB of the validation text without
test-time training, and the quantization tax (BPB above that of the unquantized weights) relative to plain GPTQ.
All clip sigmas are scaled until the artifact is as long as plain GPTQ's, to within 3,000 bytes.
"""
import dataclasses
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as gpt  # noqa: E402

TOLERANCE_BYTES = 3000


def main() -> None:
    plain = gpt.Config.from_env(os.environ)
    with gpt.Run.start(dataclasses.replace(plain, run_id=f"{plain.run_id}_rounding")) as run:
        run.run_id = plain.run_id
        data = gpt.Dataset.open(plain)
        tokens, byte_counts = data.load_validation()
        model = gpt.GPT(plain, run.compute_dtype).to(run.device)
        model.attend, model.graphs = gpt.choose_attention(run), gpt.make_graphs(run)
        gpt.read_checkpoint(plain, run, model)
        gpt.sort_hidden_units(model)
        weights = {name: p.clone() for name, p in model.state_dict().items()}
        stats = gpt.collect_hessians(dataclasses.replace(plain, rdo_lambda=1.0), run, model, data.train,
                                     plain.gptq_calibration_batches)

        def bpb() -> float:
            return gpt.evaluate_plain(plain, run, model, tokens, byte_counts).bpb

        def measure(cfg: gpt.Config, target: int | None) -> tuple[int, float, str]:
            """(bytes, BPB, seconds of each stage) at the sigma factor that gives `target` bytes."""
            factor, count = 1.0, sum(weights[name].numel() for name in gpt.STREAM_GROUPS)
            for _ in range(6):
                times, clock = [], gpt.Timer(run)
                quantized = gpt.quantize(cfg, run, model, stats, factor)
                times.append(clock.seconds())
                streams, notes = gpt.encode_model(cfg, *quantized)
                times.append(clock.seconds())
                size = len(gpt.build_container(gpt.ARTIFACT_MAGIC, cfg, streams, notes))
                if target is None or abs(size - target) <= TOLERANCE_BYTES:
                    break
                factor *= 2.0 ** ((size - target) * 8 / count)
            start = time.perf_counter()
            model.load_state_dict(gpt.decode_model(cfg, streams, notes))
            decode_s, score = time.perf_counter() - start, bpb()
            model.load_state_dict(weights)
            return size, score, (f"sigma_factor:{factor:.4f} quantize_s:{times[0]:.2f} "
                                 f"encode_s:{times[1] - times[0]:.2f} decode_s:{decode_s:.2f}")

        unquantized = bpb()
        size, score, rest = measure(plain, None)
        plain_tax = score - unquantized
        print(f"rounding unquantized_bpb:{unquantized:.6f} rdo_lambda:0 bytes:{size} bpb:{score:.6f} "
              f"tax:{plain_tax:.6f} {rest}", flush=True)
        for share in (1e-9, 0.5, 1.0):                # next to 0: the trellis alone
            found, score, rest = measure(dataclasses.replace(plain, rdo_lambda=share), size)
            off = "" if abs(found - size) <= TOLERANCE_BYTES else " (not at equal bytes)"
            print(f"rounding rdo_lambda:{share:g} bytes:{found}{off} bpb:{score:.6f} tax:{score - unquantized:.6f} "
                  f"relative_tax:{(score - unquantized) / plain_tax:.3f} {rest}", flush=True)


if __name__ == "__main__":
    main()
