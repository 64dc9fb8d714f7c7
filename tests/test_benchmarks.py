"""benchmarks/training.py: the command runs anywhere, and its arithmetic follows from shapes."""
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt as gpt
from helpers import tiny_config


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(gpt.REPO / "benchmarks"))
    try:
        import training
    finally:
        sys.path.pop(0)
    return training


def tiny_benchmark() -> tuple[subprocess.CompletedProcess, str]:
    """The command's end, and the file that it wrote."""
    command = [sys.executable, gpt.REPO / "benchmarks" / "training.py", "--tiny", "--steps", "2"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "table.txt"
        done = subprocess.run([*command, "--out", out], capture_output=True, text=True, timeout=300, check=False)
        return done, out.read_text() if out.exists() else ""


@pytest.mark.early(work=tiny_benchmark)
def test_the_training_benchmark_prints_a_table_and_writes_the_same_to_a_file(early):
    done, written = early(tiny_benchmark)
    assert done.returncode == 0, done.stderr
    assert written == done.stdout
    for expected in ("device:", "torch ", "settings:", "VOCAB_SIZE=64", "== kernels ==", "== compiled ==", "blocks backend:",
                     "cold:", "loops_off:", "\n  loops_on:", "\n  half_loops_off:", "tokens/s", "median of 2"):
        assert expected in done.stdout
    assert "FAILED" not in done.stdout


@pytest.mark.parametrize(("kernel", "part"), [
    ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "products"), ("splitKreduce_kernel", "products"),
    ("kernel_cutlass_kernel_quackgemm_sm90GemmSm90_object_at__tensorptr", "products"),
    ("kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90", "attention"),
    ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
    ("_softcap_ce_kernel", "loss"), ("triton_red_fused_add_mul_12", "blocks"),
    ("void at::native::vectorized_elementwise_kernel<4>", "other kernels"), ("Memset (Device)", "other kernels")])
def test_kernels_are_counted_where_they_belong(bench, kernel, part):
    assert bench.part_of(kernel) == part


def test_every_kernel_of_the_model_is_a_block_kernel_or_the_loss(bench):
    own = [name for name in vars(gpt) if name.startswith("_") and name.endswith("_kernel")
           and "trellis" not in name and "adapter" not in name]
    assert len(own) > 10
    assert {name: bench.part_of(name) for name in own} == {
        name: "loss" if "softcap" in name else "blocks" for name in own}


def test_the_arithmetic_of_a_step_follows_from_the_weights(bench):
    cfg = tiny_config()
    model = gpt.GPT(cfg)
    layer = sum(getattr(model, name)[0].numel() for name in gpt.PARAMETER_TABLE["muon"])
    slots = len(gpt.execution_plan(cfg, True))
    assert bench.product_flops(cfg, 10, slots) == 6 * 10 * (slots * layer + model.tok_emb.numel())
    # One segment of 3: 6 pairs of positions, two products of 2 * head_dim operations each, per head.
    assert bench.attention_flops(cfg, np.array([3, 0]), 1) == 3.5 * 6 * 2 * 2 * cfg.model_dim


def test_a_step_with_loops_moves_more_bytes_and_narrower_keys_fewer(bench):
    cfg = tiny_config()
    off, on = (bench.stream_passes(gpt.execution_plan(cfg, looping), 0.5) for looping in (False, True))
    assert on > off > bench.stream_passes(gpt.execution_plan(cfg, False), 0.25)


def test_the_table_shows_every_part_of_a_profiled_step(bench):
    state = {"step_ms": [12.0, 10.0, 11.0], "tokens": 1000, "loss": 3.0,
             "kernels": {"gradients": {"nvjet_a": [4.0, 7], "_softcap_ce_kernel": [1.0, 8], "fill": [0.5, 2]},
                         "update": {"nvjet_b": [2.0, 3]}},
             "flops": 2e9, "attention_flops": 1e9, "block_bytes": 1e9, "loss_bytes": 5e8}
    parts = bench.step_parts(state)
    assert parts["products"] == (4.0, 7) and parts["optimizer"] == (2.0, 3)
    assert sum(ms for ms, _ in parts.values()) == pytest.approx(11.0)
    lines = bench.describe_state("loops_off", state, {"flops_per_s": 1e12, "copy_bytes_per_s": 1e12})
    text = "\n".join(lines)
    assert "90,909 tokens/s" in text
    whole = bench.describe_path("kernels", {"loops_off": state, "peak_allocated_mib": 40000, "graphs": 8,
                                            "peak_reserved_mib": 41000, "rows_without_graph": 1}, None)
    assert "  peak memory: 40,000 MiB allocated, 41,000 MiB reserved" in whole
    assert "  CUDA graphs: 8; rows that found none: 1" in whole
    products = next(line for line in lines if line.lstrip().startswith("products"))
    assert products.split() == ["products", "4.00", "36.4%", "7", "2.00", "50%"]
    assert [line.split()[0] for line in lines if line.split()[0] in {part.split()[0] for part in bench.PARTS}]


def test_a_profile_adds_up_what_the_gpu_ran_and_nothing_else(bench, monkeypatch):
    events = [{"ph": "X", "cat": "kernel", "name": "a", "dur": 1500.0},
              {"ph": "X", "cat": "kernel", "name": "a", "dur": 500},
              {"ph": "X", "cat": "gpu_memset", "name": "Memset (Device)", "dur": 1000},
              {"ph": "M", "name": "process_name"},
              {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 9000},
              {"ph": "X", "cat": "gpu_user_annotation", "name": "Optimizer.step", "dur": 9000}]

    class Recorded:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            calls.append("recorded")

        def export_chrome_trace(self, path):
            Path(path).write_text(json.dumps({"traceEvents": events}))

    calls = []
    monkeypatch.setattr(torch.profiler, "profile", Recorded)
    found = bench.profile(lambda: calls.append("work"), lambda: calls.append("sync"))
    assert found == {"a": [2.0, 2], "Memset (Device)": [1.0, 1]}
    assert calls == ["sync", "work", "sync", "recorded"]


def test_both_halves_of_a_step_are_profiled_apart(bench, monkeypatch):
    cfg = tiny_config()
    run = gpt.Run(cfg)
    model = gpt.GPT(cfg)
    optimizer, average = gpt.Optimizer(cfg, run, model), gpt.WeightAverage(model, 0.9)
    work = gpt.RowGradients(cfg, run, model, optimizer)
    bounds = torch.tensor([0, 5, cfg.row_tokens, cfg.row_tokens], dtype=torch.int32)
    tokens = torch.arange(cfg.row_tokens) % cfg.vocab_size

    def profiled(work, sync):
        work()
        return {"optimizer" if optimizer.num_rows == 0 else "rows": [1.0, 2]}

    monkeypatch.setattr(bench, "profile", profiled)
    rows = itertools.repeat(gpt.Row(tokens, tokens.flip(0), bounds))
    found = bench.measure_parts(work, average, rows, False)
    assert found["kernels"] == {"gradients": {"rows": [1.0, 2.0]}, "update": {"optimizer": [1.0, 2.0]}}
    lengths = bounds.diff().numpy().repeat(gpt.ROWS_PER_STEP)
    assert found["attention_flops"] == bench.attention_flops(cfg, lengths, cfg.num_layers)
