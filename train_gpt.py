#!/usr/bin/env python3
"""Train a 16 MB language model in ten minutes, ship it, and score it: the whole run in one file.

    train -> average -> quantize -> artifact -> restore -> diagnostics -> score-first test-time training

Run it through run.sh (`SEED=42 ./run.sh`), or by hand on any machine:

    DATA_PATH=shards python train_gpt.py         one process, GPU or CPU
    python launch.py 8 train_gpt.py              the record machine; torchrun works too
    python train_gpt.py --help                   every setting, its default and meaning

Settings are environment variables; nothing else is read from outside. Importing this has no side effects.

Dimensions: B documents in a batch, T positions, N = B*T flattened, D model width, H query heads, G key/value
heads, K head width, F MLP width, V vocabulary, L layers, R adapter rank. Weights: (out, in), like nn.Linear.

Contents
    definitions   1 configuration, 2 runtime, 3 data, 4 model, 5 schedules and EMA, 6 optimizers, 7 training,
                  8 quantization, 9 weight coder, 10 artifact, 11 scoring, 12 hints and order,
                  13 test-time training, 14 pipeline
    fast paths    15 attention kernels, 16 Triton kernels, 17 compilation, 18 C sources, each naming what it
                  replaces
    start         19 main

References
  [GQA]  Ainslie et al. 2023, grouped-query attention    [RoPE] Su et al. 2021, rotary positions
  [XSA]  Zhai 2026, exclusive self attention             [Muon] Jordan et al. 2024, orthogonalized momentum
  [PE]   Amsel et al. 2025, Polar Express                [GPTQ] Frantar et al. 2022, quantization by columns
  [AWQ]  Lin et al. 2023, activation-aware quantization  [LQER] Zhang et al. 2024, low-rank error correction
  [LoRA] Hu et al. 2021, low-rank adapters               [TTT]  Sun et al. 2020, test-time training
  [lpaq] Mahoney 2005, weighing context models           [TCQ]  Marcellin & Fischer 1990, trellis coding
  [REF]  openai/parameter-golf PR #2124, the run whose behaviour and hyperparameters this script follows
"""
from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import functools
import gc
import hashlib
import itertools
import json
import linecache
import lzma
import math
import os
import platform
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:                                                     # Windows has no file locks of this kind
    import fcntl
except ImportError:
    fcntl = None
try:                                                     # Triton comes with CUDA builds of torch only
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def jit(kernel: Callable) -> Callable:
    """triton.jit; without Triton the undecorated function, which nothing calls."""
    return kernel if triton is None else triton.jit(kernel)


# --- 1 configuration ----------------------------------------------------------------------------------------
# The only reader of settings: names, types, defaults, meaning, and the relations between them.

class ConfigError(ValueError):
    """A setting is unknown, ill-typed, out of range, or contradicts another one."""


def knob(default: Any, doc: str, low: float = -math.inf, high: float = math.inf, choices: tuple = ()) -> Any:
    """A field of Config: its default, what it means, and which values are allowed."""
    return dataclasses.field(default=default, metadata=dict(doc=doc, low=low, high=high, choices=choices))


BELOW_ONE = 1 - 1e-9         # decays of 1 would divide by zero in Adam's bias correction
# Settings of the reference that have one meaning here. Any other value would silently do something else.
FIXED_SETTINGS: dict[str, tuple[str, str]] = {name: (value, reason) for value, reason, names in (
    ("1", "the architecture always has it", "GATED_XSA SMEAR_GATE_ENABLED SPARSE_ATTN_GATE_ENABLED "
     "SKIP_GATES_ENABLED LN_SCALE TIE_EMBEDDINGS ASYM_LOGIT_RESCALE"),
    ("11", "every layer has exclusive self attention, however many there are", "XSA_LAST_N"),
    ("mean", "the two lanes are always averaged", "PARALLEL_FINAL_LANE"),
    ("0", "gates always start at one half", "SPARSE_ATTN_GATE_INIT_STD"),
    ("1", "bytes are always counted from the CaseOps sidecar", "CASEOPS_ENABLED"),
    ("all", "every quantized matrix competes", "LQER_SCOPE"),
    ("0", "the feature does not exist in this script", "LQER_GAIN_SELECT TTT_EVAL_BATCHES FORCE_STOP_STEP "
     "ROPE_YARN SKYLIGHT_MUON ATTN_OUT_GATE_ENABLED GATED_ATTN_ENABLED GATED_ATTN_QUANT_GATE "
     "NGRAM_HINT_PRECOMPUTE_OUTSIDE GLOBAL_TTT_WARMUP_CHUNKS"),
    ("0", "that n-gram channel looks at the token being scored before choosing its hint, which is not causal",
     "WITHIN_BOOST WORD_BOOST AGREE_ADD_BOOST"),
    ("4", "the symmetric fallback packs 4 bits", "LQER_FACTOR_BITS"),
    ("fixed", "no other mode exists yet", "TILT_MODE"),
    ("12.85", "no tensor falls in that class", "MATRIX_CLIP_SIGMAS"),
    ("adam", "adapters are trained with AdamW", "TTT_OPTIMIZER"),
    ("0", "adapters have no first moment", "TTT_BETA1"),
    ("1", "no other value is implemented", "TTT_GRAD_STEPS PHASED_TTT_NUM_PHASES GLOBAL_TTT_EPOCHS "
     "GLOBAL_TTT_RESPECT_DOC_BOUNDARIES TEMPERATURE_SCALE VAL_DOC_FRACTION")) for name in names.split()}
RETIRED_SETTINGS = {
    "VAL_LOSS_EVERY": "validation data is not read before the last training step",
    "EVAL_STRIDE": "plain evaluation has no overlap",
    "ROPE_TRAIN_SEQ_LEN": "rotary positions are never rescaled",
    "EMBED_LR": "embeddings are tied; set TIED_EMBED_LR",
    **dict.fromkeys("BETA2_NORMUON UW_FLOOR GATED_ATTN_INIT_STD ATTN_OUT_GATE_SRC WORD_ORDER WORD_NORMALIZE "
                    "GLOBAL_TTT_WARMUP_START_LR".split(), "it has no effect in the record run")}
OWNED_PREFIXES = tuple((
    "TTT_ LQER_ MUON_ GLOBAL_TTT_ PHASED_TTT_ NGRAM_ GPTQ_ AWQ_LITE_ XSA_ SPARSE_ATTN_ TIED_EMBED_ LOOP_ "
    "TOKEN_ WITHIN_ WORD_ PARALLEL_ ROPE_ TRAIN_ VAL_ EVAL_ MATRIX_ WARMDOWN_ WARMUP_ GATED_ SKYLIGHT_ "
    "SMEAR_ LOGIT_ EMBED_ ADAM_ EMA_ ENABLE_LOOP").split())


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run; the environment variable is the field name in capitals."""
    # run
    seed: int = knob(42, "PRNG seed, equal on all ranks", 0, 2**31 - 1)
    run_id: str = knob("", "names log, checkpoint and artifact; default: seed and start time")
    data_path: str = knob("data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved",
                          "folder of shards")
    tokenizer_path: str = knob(
        "", "SentencePiece model; default: the one named by the data, else the shipped one")
    compile: bool = knob(True, "0 runs every graph without torch.compile")
    block_kernels: bool = knob(
        True, "0 runs the blocks through torch.compile also on a Hopper GPU; to compare the two")
    cuda_graphs: bool = knob(True, "0 runs the kernels' rows and chunk steps launch by launch; to compare")
    allow_slow: bool = knob(False, "1 lets a CUDA run go on without FlashAttention-3/4 or the block kernels")
    allow_unverified: bool = knob(False, "1 lets a run use shards without manifest or check figures")
    prequant_only: bool = knob(False, "1 stops after training and the first diagnostic")
    quantize_only: bool = knob(False, "1 starts from the checkpoint of RUN_ID instead of training")
    ttt_eval_only: bool = knob(False, "1 starts from the artifact of RUN_ID")
    audit: bool = knob(False, "1 checks that every target was banked once and in order, and writes the order "
                       "and what each score was made of beside the log")
    checkpoint_dir: str = knob("checkpoints", "folder of checkpoints and artifacts")
    skip_check: bool = knob(False, "1 skips the preflight that run.sh makes")
    quiet: bool = knob(False, "1: plain log lines only, no progress line on a terminal")
    # model
    vocab_size: int = knob(8192, "tokens in the vocabulary", 9, 65536)
    num_layers: int = knob(11, "physical layers", 2, 256)
    model_dim: int = knob(512, "residual width D", 1)
    num_heads: int = knob(8, "query heads H", 1)
    num_kv_heads: int = knob(4, "key/value heads G [GQA]", 1)
    mlp_mult: float = knob(4.0, "MLP width F over D", 0.1)
    num_loops: int = knob(2, "extra passes over the looped layers once looping is on", 0)
    loop_start: int = knob(3, "first looped layer", 0)
    loop_end: int = knob(5, "last looped layer", 0)
    parallel_start_layer: int = knob(8, "first layer with separate attention and MLP lanes", 0)
    gate_window: int = knob(12, "residual channels that SmearGate and attention gate read", 1)
    sparse_attn_gate_scale: float = knob(1.0, "factor inside the attention gate's sigmoid")
    qk_gain_init: float = knob(5.25, "initial query gain per head")
    rope_base: float = knob(10000.0, "rotary base [RoPE]", 1.0)
    rope_dims: int = knob(16, "rotary channels per head", 2)
    logit_softcap: float = knob(30.0, "initial value of both logit caps", 1.0, 120.0)
    tied_embed_init_std: float = knob(0.005, "standard deviation of the initial embedding", 0.0)
    # training
    iterations: int = knob(20000, "step cap; also the schedule's length when MAX_WALLCLOCK_SECONDS=0", 1)
    max_wallclock_seconds: float = knob(
        600.0, "training budget, calibration included; 0: schedule by step", 0.0)
    gptq_reserve_seconds: float = knob(4.0, "part of the budget kept for calibration", 0.0)
    train_batch_tokens: int = knob(786432, "tokens per optimizer step, always 8 rows", 8)
    quarter_rows_until: float = knob(
        0.0, "progress until which a step takes quarter rows, at half the learning rates", 0.0, 1.0)
    half_rows_until: float = knob(
        0.0, "progress until which a step takes half rows, at 1/sqrt(2) of the learning rates", 0.0, 1.0)
    train_seq_len: int = knob(2048, "longest attention segment in training; calibration sequence length", 1)
    warmup_steps: int = knob(20, "warm-up steps of every kind of row, with and without loops; undone", 0)
    warmdown_frac: float = knob(0.75, "part of the budget over which the learning rate falls", 0.0, 1.0)
    min_lr: float = knob(0.1, "floor of the learning-rate factor", 0.0, 1.0)
    enable_looping_at: float = knob(0.35, "progress at which looping switches on", 0.0, 1.0)
    matrix_lr: float = knob(0.028, "Muon learning rate", 0.0)
    muon_wd: float = knob(0.095, "Muon weight decay", 0.0)
    muon_momentum: float = knob(0.97, "Muon momentum", 0.0, 1.0)
    muon_momentum_warmup_start: float = knob(0.92, "Muon momentum at step 0", 0.0, 1.0)
    muon_momentum_warmup_steps: int = knob(1500, "steps until MUON_MOMENTUM is reached", 0)
    muon_backend_steps: int = knob(5, "Polar Express iterations [PE]", 1, 5)
    muon_row_normalize: bool = knob(True, "scale every row of the momentum to unit length first")
    tied_embed_lr: float = knob(0.03, "AdamW learning rate of the embedding", 0.0)
    embed_wd: float = knob(0.085, "AdamW weight decay of the embedding", 0.0)
    scalar_lr: float = knob(0.02, "AdamW learning rate of gains, gates, scales and caps", 0.0)
    adam_wd: float = knob(0.02, "AdamW weight decay of gains, gates and scales", 0.0)
    beta1: float = knob(0.9, "AdamW first-moment decay", 0.0, BELOW_ONE)
    beta2: float = knob(0.95, "AdamW second-moment decay", 0.0, BELOW_ONE)
    adam_eps: float = knob(1e-8, "AdamW epsilon", 0.0)
    grad_clip_norm: float = knob(0.3, "global gradient norm allowed to one row", 1e-9)
    ema_decay: float = knob(0.9965, "decay of the weight average per step", 0.0, 1.0)
    fused_ce_enabled: bool = knob(True, "0 computes the training loss with plain torch also on a GPU")
    # evaluation
    val_batch_tokens: int = knob(524288, "tokens of plain evaluation per 8 rows", 8)
    eval_seq_len: int = knob(2560, "sequence length and longest segment of plain evaluation", 1)
    eval_wallclock_seconds: float = knob(
        600.0, "evaluation budget: adaptation stops where its end would come too near; 0: no limit", 0.0)
    # quantization
    matrix_bits: int = knob(6, "bits of attention and MLP codes", 2, 8)
    embed_bits: int = knob(7, "bits of embedding codes", 2, 8)
    gptq_calibration_batches: int = knob(16, "calibration batches of one training row's tokens each", 1)
    attn_clip_sigmas: float = knob(13.0, "attention: clip range in row standard deviations", 0.1)
    mlp_clip_sigmas: float = knob(11.5, "MLP: clip range in row standard deviations", 0.1)
    embed_clip_sigmas: float = knob(14.0, "embedding: clip range in row standard deviations", 0.1)
    fill_artifact: bool = knob(False, "1 lowers the clip sigmas until the artifact fills the size limit")
    rdo_lambda: float = knob(0.0, "0: plain GPTQ; above: trellis rounding, and a share, up to 1, of the way "
                             "to steps for which a bit buys the same loss in every matrix", 0.0, 1.0)
    compressor: str = knob("pergroup", "stream layout of the artifact", choices=("pergroup",))
    awq_lite_enabled: bool = knob(True, "protect the most salient column groups [AWQ]")
    awq_lite_bits: int = knob(8, "bits of a protected group", 2, 8)
    awq_lite_group_top_k: int = knob(1, "number of protected groups in the whole model", 0)
    awq_lite_group_size: int = knob(64, "columns per protected group", 1)
    lqer_enabled: bool = knob(True, "add low-rank corrections [LQER]")
    lqer_asym_enabled: bool = knob(True, "2-bit A and 4-bit grouped B; 0: 4-bit rows for both")
    lqer_rank: int = knob(2, "rank of a correction", 1)
    lqer_asym_group: int = knob(32, "elements of B per scale", 1)
    lqer_top_k: int = knob(4, "number of corrected matrices", 0)
    # test-time training
    ttt_enabled: bool = knob(True, "0 ends the run after the quantized diagnostic")
    ttt_eval_seq_len: int = knob(2560, "longest window of a chunk", 2)
    ttt_chunk_size: int = knob(48, "targets scored between two adapter updates", 1)
    ttt_batch_size: int = knob(64, "documents per batch", 1)
    ttt_lora_rank: int = knob(80, "rank of each per-document adapter [LoRA]", 1)
    ttt_lora_alpha: float = knob(144.0, "adapter scale times rank")
    ttt_lora_lr: float = knob(1e-4, "adapter learning rate", 0.0)
    ttt_beta2: float = knob(0.999, "adapter AdamW second-moment decay", 0.0, BELOW_ONE)
    ttt_weight_decay: float = knob(2.0, "adapter AdamW weight decay", 0.0)
    ttt_warm_start_a: bool = knob(
        True, "keep A between batches of one lane that have as many rows; 0 draws it anew")
    ttt_stop_after: str = knob(
        "", "document:chunk after which nothing learns any more; repeats a run that stopped there")
    ttt_k_lora: bool = knob(True, "adapters on the key projection")
    ttt_o_lora: bool = knob(True, "adapters on the attention output")
    ttt_mlp_lora: bool = knob(True, "adapters on the MLP")
    phased_ttt_prefix_docs: int = knob(1000, "scored documents the base weights are adapted on; 0: none", 0)
    global_ttt_lr: float = knob(0.001, "SGD learning rate of the base adaptation", 0.0)
    global_ttt_momentum: float = knob(0.9, "SGD momentum", 0.0, 1.0)
    global_ttt_chunk_tokens: int = knob(32768, "tokens per SGD step", 1)
    global_ttt_batch_seqs: int = knob(32, "most sequences per SGD step", 1)
    global_ttt_grad_clip: float = knob(1.0, "global gradient norm of an SGD step", 1e-9)
    ngram_tilt_enabled: bool = knob(True, "0 scores with the model alone")
    token_order: int = knob(16, "n-gram order: context tokens plus one", 2, 64)
    token_threshold: float = knob(0.8, "confidence from which a hint is used", 0.0, 1.0)
    token_boost: float = knob(2.625, "log-odds added to a hinted token", 0.0, 50.0)

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Config":
        """Read every setting from `env`; ConfigError for unknown, misspelt, retired or ill-typed ones."""
        kinds = {name.upper(): (name, kind) for name, kind in get_type_hints(cls).items()}
        for key in sorted(env):
            if key in RETIRED_SETTINGS:
                raise ConfigError(f"{key} is retired: {RETIRED_SETTINGS[key]}; unset it")
            if key in FIXED_SETTINGS:
                value, reason = FIXED_SETTINGS[key]
                if env[key] != value and _number(env[key]) != _number(value):
                    raise ConfigError(f"{key}={env[key]}: expected {value}, because {reason}; unset it")
            elif key not in kinds:
                _refuse_misspelt(key, (*kinds, *FIXED_SETTINGS))
        values = {name: parse_value(key, kind, env[key]) for key, (name, kind) in kinds.items() if key in env}
        return cls(**values)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value, meta = field.name.upper(), getattr(self, field.name), field.metadata
            low, high, choices = meta["low"], meta["high"], meta["choices"]
            if choices and value not in choices:
                raise ConfigError(f"{name}={value}: expected one of {list(choices)}")
            if not isinstance(value, (bool, str)) and not low <= value <= high:
                raise ConfigError(f"{name}={value}: expected a value between {low} and {high}")
        for holds, expected, *names in _relations(self):
            if not holds:
                found = ", ".join(f"{name}={getattr(self, name.lower())}" for name in names)
                raise ConfigError(f"{expected.format(*names)}; found {found}")

    resumes = property(lambda self: self.quantize_only or self.ttt_eval_only)
    head_dim = property(lambda self: self.model_dim // self.num_heads)
    kv_dim = property(lambda self: self.num_kv_heads * self.head_dim)
    mlp_dim = property(lambda self: int(self.mlp_mult * self.model_dim))
    row_tokens = property(lambda self: self.train_batch_tokens // ROWS_PER_STEP)
    # Bound on segments in training and plain evaluation; one number, so that both use the same graphs.
    longest_segment = property(lambda self: max(self.train_seq_len, self.eval_seq_len))
    # Bound on the positions of any row: training, plain evaluation, test-time training, base adaptation.
    longest_row = property(lambda self: max(self.row_tokens, self.val_batch_tokens // ROWS_PER_STEP,
                                            self.ttt_eval_seq_len, self.global_ttt_chunk_tokens + 1))


ROWS_PER_STEP = 8            # one optimizer step is 8 rows on any number of GPUs
BOS = 1
OPERATOR_IDS = (4, 5, 6, 7)  # the four CaseOps operators
SIZE_LIMIT = 16_000_000      # bytes of code plus weights
CODE_MARGIN = 256            # left free, should another liblzma pack the same script a little longer


def _relations(cfg: Config) -> tuple[tuple, ...]:
    """What must hold between settings: the condition, the sentence that says it, the settings in it."""
    return (
        (cfg.model_dim % cfg.num_heads == 0, "{} must be a multiple of {}", "MODEL_DIM", "NUM_HEADS"),
        (cfg.num_heads % cfg.num_kv_heads == 0, "{} must be a multiple of {}", "NUM_HEADS", "NUM_KV_HEADS"),
        (cfg.rope_dims % 2 == 0 and cfg.rope_dims <= cfg.head_dim,
         f"{{}} must be even and at most the head width {cfg.head_dim}", "ROPE_DIMS"),
        (cfg.gate_window <= cfg.model_dim, "{} must be at most {}", "GATE_WINDOW", "MODEL_DIM"),
        (cfg.mlp_dim == cfg.mlp_mult * cfg.model_dim, "{} times {} must be whole", "MLP_MULT", "MODEL_DIM"),
        (cfg.loop_start <= cfg.loop_end < cfg.parallel_start_layer <= cfg.num_layers,
         "expected {} <= {} < {} <= {}", "LOOP_START", "LOOP_END", "PARALLEL_START_LAYER", "NUM_LAYERS"),
        (cfg.train_batch_tokens % (ROWS_PER_STEP * cfg.train_seq_len) == 0,
         f"{{}} must be a multiple of {ROWS_PER_STEP} * {{}}: one step is {ROWS_PER_STEP} rows of whole "
         "sequences", "TRAIN_BATCH_TOKENS", "TRAIN_SEQ_LEN"),
        (cfg.half_rows_until == 0 or cfg.row_tokens % 2 == 0,
         f"with {{}} {{}} must be a multiple of {2 * ROWS_PER_STEP}",
         "HALF_ROWS_UNTIL", "TRAIN_BATCH_TOKENS"),
        (cfg.quarter_rows_until == 0 or cfg.row_tokens % 4 == 0,
         f"with {{}} {{}} must be a multiple of {4 * ROWS_PER_STEP}",
         "QUARTER_ROWS_UNTIL", "TRAIN_BATCH_TOKENS"),
        (cfg.quarter_rows_until <= cfg.half_rows_until or cfg.half_rows_until == 0,
         "{} must be at most {}, unless that is 0", "QUARTER_ROWS_UNTIL", "HALF_ROWS_UNTIL"),
        (cfg.val_batch_tokens // ROWS_PER_STEP >= cfg.eval_seq_len,
         f"{{}}/{ROWS_PER_STEP} must hold one sequence of {{}}", "VAL_BATCH_TOKENS", "EVAL_SEQ_LEN"),
        (cfg.ttt_chunk_size < cfg.ttt_eval_seq_len,
         "{} must be below {}", "TTT_CHUNK_SIZE", "TTT_EVAL_SEQ_LEN"),
        (cfg.global_ttt_chunk_tokens >= cfg.ttt_eval_seq_len or cfg.phased_ttt_prefix_docs == 0,
         "{} must hold one sequence of {}", "GLOBAL_TTT_CHUNK_TOKENS", "TTT_EVAL_SEQ_LEN"),
        (cfg.gptq_reserve_seconds < cfg.max_wallclock_seconds or cfg.max_wallclock_seconds == 0,
         "{} must be below {}", "GPTQ_RESERVE_SECONDS", "MAX_WALLCLOCK_SECONDS"),
        (cfg.prequant_only + cfg.quantize_only + cfg.ttt_eval_only <= 1,
         "set at most one of {}, {}, {}", "PREQUANT_ONLY", "QUANTIZE_ONLY", "TTT_EVAL_ONLY"),
        (cfg.run_id or not cfg.resumes,
         "{} and {} need {}, the run to go on from", "QUANTIZE_ONLY", "TTT_EVAL_ONLY", "RUN_ID"),
        (re.fullmatch(r"(\d+:\d+)?", cfg.ttt_stop_after),
         "{} must be document:chunk, two whole numbers", "TTT_STOP_AFTER"),
        (re.fullmatch(r"(?!\.\.?$)[\w.+-]{0,100}", cfg.run_id),
         "{} must be the beginning of a file name, at most 100 letters, digits and . _ + -", "RUN_ID"))


def _number(text: str, kind: type = float) -> float:
    """`text` as a number; NaN, which equals nothing, if it is none."""
    try:
        return kind(text)
    except ValueError:
        return math.nan


def parse_value(key: str, kind: type, text: str) -> Any:
    """`text` as bool (exactly 0 or 1), int, finite float, or str; raises ConfigError naming `key`."""
    if kind is bool and text in ("0", "1"):
        return text == "1"
    if kind is str:
        return text
    if kind in (int, float) and abs(value := _number(text, kind)) < math.inf:
        return value
    expected = {bool: "0 or 1", int: "a whole number", float: "a finite number"}[kind]
    raise ConfigError(f"{key}={text!r}: expected {expected}")


def _refuse_misspelt(key: str, known: Sequence[str]) -> None:
    """Raise ConfigError if `key`, which names no setting, has our prefix or is nearly one of `known`."""
    if key.startswith(OWNED_PREFIXES):
        near = difflib.get_close_matches(key, known, 3, 0.6)
        advice = f"; did you mean {' or '.join(near)}?" if near else ";"
        raise ConfigError(f"unknown setting {key}{advice} `python train_gpt.py --help` lists all settings")
    for name in known:
        # Short names have innocent neighbours in any environment (EDIT is two edits from AUDIT).
        allowed = 2 if min(len(name), len(key)) >= 7 else 1
        if abs(len(name) - len(key)) <= allowed and edit_distance(key, name) <= allowed:
            raise ConfigError(f"unknown setting {key}; did you mean {name}? Unset it or correct its name")


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def settings_table() -> str:
    """The table of `--help` and of the README: name, default, meaning."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(Config):
        default = int(field.default) if isinstance(field.default, bool) else field.default
        shown = "" if default == "" else f"`{default}`"
        rows.append(f"| `{field.name.upper()}` | {shown} | {field.metadata['doc']} |")
    return "\n".join(rows)


# --- 2 runtime ----------------------------------------------------------------------------------------------
# Rank, device, collectives and the log file. At world size 1 every collective is a no-op.

REPO = Path(__file__).resolve().parent
HANG_LIMIT_S, START_LIMIT_S = 100.0, 1800.0      # silence allowed to a stage, to a slow one
SIGNAL_GRACE_S = 3.0                             # then a call that does not return is abandoned
DISK_RETRY_S = 5.0


class RunError(RuntimeError):
    """The run cannot go on, or its result cannot be believed; the text is one sentence for the user."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived; args[0] is its number."""


class Run:
    """Process-wide facts and services; create with Run.start(), use as a context manager. `sum` and
    `broadcast` work in place on tensors of any dtype on the run's device.

    origin      SHA-256 of tokenizer, joined pairs and code, written into checkpoints and artifacts.
    last_good   the last finite number that the run reported, in words, for error messages.
    clocks      seconds of "load", "compile" and "eval", for the readings of the evaluation limit.
    """

    def __init__(self, cfg: Config, rank: int = 0, world_size: int = 1,
                 device: torch.device = torch.device("cpu"), log_path: Path | None = None) -> None:
        self.cfg, self.rank, self.world_size, self.device = cfg, rank, world_size, device
        # bf16 matmuls on GPUs; CPUs are for checks and small demos, where fp32 is both exact and faster.
        self.compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.run_id, self.log_path = cfg.run_id, log_path
        self.origin: dict[str, str] = {}
        self.last_good = "none yet"
        self.clocks: dict[str, float] = {}
        self._host_group = self._store = self._log_file = None
        self._unwritten = bytearray()            # log lines that are not in the file yet
        self._writing = threading.RLock()        # the loader's thread logs too
        self._has_begun = False
        self._ended = threading.Event()
        self._shows_progress = rank == 0 and not cfg.quiet and sys.stdout.isatty()
        self._progress_width, self._progress_at = 0, 0.0
        self.stage("start", START_LIMIT_S)

    @classmethod
    def start(cls, cfg: Config, env: Mapping[str, str] = os.environ) -> "Run":
        """Join the ranks that the launcher started (or run alone), pick the device, claim RUN_ID (rank 0)."""
        rank, world_size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        local_rank = int(env.get("LOCAL_RANK", 0))
        if world_size < 1 or ROWS_PER_STEP % world_size:
            raise ConfigError(f"WORLD_SIZE={world_size}: expected 1, 2, 4 or 8, because one optimizer step "
                              f"is {ROWS_PER_STEP} rows dealt evenly to the ranks; set NPROC_PER_NODE "
                              "for run.sh, --nproc_per_node for torchrun")
        device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda":
            last = int(env.get("LOCAL_WORLD_SIZE", local_rank + 1)) - 1       # so that all ranks refuse alike
            if last >= torch.cuda.device_count():
                raise ConfigError(f"LOCAL_RANK={last}: expected below {torch.cuda.device_count()}, the GPUs "
                                  "of this machine; start fewer processes")
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")
        run = cls(cfg, rank, world_size, device)
        if world_size > 1:
            run._join_ranks()
        run.run_id = run.share(cfg.run_id or f"seed{cfg.seed}_{time.strftime('%Y%m%d_%H%M%S')}")
        run.log_path = Path("logs") / f"{run.run_id}.txt"
        if rank == 0:
            run._claim_run_id()
        return run

    def _join_ranks(self) -> None:
        backend, device = ("nccl", self.device) if self.device.type == "cuda" else ("gloo", None)
        self._store, _, _ = next(dist.rendezvous("env://", self.rank, self.world_size))
        dist.init_process_group(backend, store=self._store, rank=self.rank, world_size=self.world_size,
                                device_id=device)
        # _watch limits waits, with a limit of its own for each stage; NCCL's are ended by torch after 10 min.
        self._host_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
        threading.Thread(target=self._watch, daemon=True).start()

    def _claim_run_id(self) -> None:
        """Open and lock the log; refuse the name of a run that goes on, or that has left something behind."""
        try:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            self._log_file = os.open(self.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(f"{self.log_path}: cannot be written ({error.strerror}); correct the folder's "
                              "permissions") from None
        try:
            if fcntl is not None:              # the lock belongs to the open file: a killed run leaves none
                fcntl.flock(self._log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"RUN_ID={self.run_id}: a run of this name is going on; wait for it, or choose "
                              "another RUN_ID") from None
        except OSError:
            pass                               # this file system has no locks
        left = [path for path in (self.log_path, checkpoint_path(self), artifact_path(self))
                if path.exists() and path.stat().st_size]
        if left and not self.cfg.resumes:
            self._close_log()
            raise ConfigError(f"RUN_ID={self.run_id}: {left[0]} exists from an earlier run; choose another "
                              "RUN_ID, remove that run's files, or go on from it with QUANTIZE_ONLY=1 or "
                              "TTT_EVAL_ONLY=1")

    def begin(self) -> None:
        """Call when every check of the start has passed: from here on log and program text are kept."""
        if self.rank == 0 and not self._has_begun:
            save(self, self.log_path.with_suffix(".source.py.xz"), lzma.compress(program_source().encode()))
        self._has_begun = True
        self._write_log()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        self._ended.set()
        self.progress("")
        if self._log_file is not None:
            # The error's text may name folders, and logs are published; stderr has it.
            self._unwritten += f"error {kind.__name__}\n".encode() if kind else b""
            self._has_begun |= kind is None
            self._close_log()
        if dist.is_initialized() and error is None:   # after an error the other ranks may not answer any more
            dist.destroy_process_group()

    def _close_log(self) -> None:
        self._write_log()
        if not os.fstat(self._log_file).st_size:
            self.log_path.unlink(missing_ok=True)       # a start that failed leaves no log
        os.close(self._log_file)
        self._log_file = None

    def _write_log(self) -> None:
        """Write what waits. A full disk must not end a run: what does not fit waits for the next line."""
        with self._writing, contextlib.suppress(OSError):
            while self._has_begun and self._unwritten:
                del self._unwritten[:os.write(self._log_file, self._unwritten)]

    def log(self, line: str) -> None:
        """Write one line to stdout and to logs/<RUN_ID>.txt (rank 0 only)."""
        self.beat()
        if self.rank == 0:
            self.progress("")
            with self._writing:
                self._show(line + "\n")
                if self._log_file is not None:
                    self._unwritten += f"{line}\n".encode()
                    self._write_log()

    @staticmethod
    def _show(text: str) -> None:
        """Print, where stdout still takes it: a full disk or a reader that is gone must not end a run."""
        with contextlib.suppress(OSError):
            print(text, end="", flush=True)

    def progress(self, text: str) -> None:
        """Show `text` in one line that rewrites itself: on a terminal, unless QUIET=1. "" removes it."""
        self.beat()
        now = time.monotonic()
        is_due = now - self._progress_at >= 0.2 if text else self._progress_width > 0
        if self._shows_progress and is_due:
            text = text[:shutil.get_terminal_size().columns - 1]
            self._show(f"\r{text:<{self._progress_width}}" + ("" if text else "\r"))
            self._progress_width, self._progress_at = len(text), now

    def stage(self, name: str, limit_s: float = HANG_LIMIT_S) -> None:
        """Say what begins now. With several ranks, one that makes no progress for limit_s ends the run."""
        self.stage_name, self._limit_s = name, limit_s
        self.beat()

    def beat(self) -> None:
        """Progress was made: called by every log line, step and collective."""
        self._beat_at = time.monotonic()

    def _watch(self) -> None:
        """End this rank when it makes no progress: it hangs, or waits in a collective for one that does."""
        while not self._ended.wait(min(1.0, self._limit_s / 4)):
            silence_s = time.monotonic() - self._beat_at
            if silence_s > self._limit_s:
                report(self, f"error: rank {self.rank} made no progress for {silence_s:.0f} s in stage "
                       f"{self.stage_name}: it hangs, or waits for a rank that does; look at the GPUs and "
                       "start again")
                os._exit(1)

    def share(self, value: Any) -> Any:
        """Rank 0's value (JSON) on every rank, through the host: a decision must not stall the GPU."""
        if self.world_size == 1:
            return value
        box = [json.dumps(value)]
        dist.broadcast_object_list(box, src=0, group=self._host_group)
        self.beat()
        return json.loads(box[0])

    def agree(self, values: Sequence[float]) -> list[float]:
        """Rank 0's `values` on every rank."""
        return self.share(list(values))

    def sum(self, x: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def sum_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over ranks of tensors of one dtype, in one reduction; new tensors unless the run is alone."""
        if self.world_size == 1:
            return list(tensors)
        flat = self.sum(torch.cat([t.flatten() for t in tensors]))
        return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors)]

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        if self.world_size > 1:
            dist.broadcast(x, source)
        return x

    def max_later(self, value: float) -> Callable[[], float]:
        """Start finding the largest `value` of all ranks, through the host; the result waits for it."""
        box = torch.tensor(value, dtype=torch.float64)
        if self.world_size == 1:
            return box.item
        work = dist.all_reduce(box, dist.ReduceOp.MAX, group=self._host_group, async_op=True)
        return lambda: (work.wait(), box.item())[1]

    def barrier(self, before: str) -> None:
        """Wait for all ranks to have come this far; the log tells how long each waited for the last one."""
        if self.world_size > 1:
            self.sync()
            begin = time.perf_counter()
            dist.barrier(group=self._host_group)
            waits_s = [torch.zeros((), dtype=torch.float64) for _ in range(self.world_size)]
            mine_s = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
            dist.all_gather(waits_s, mine_s, group=self._host_group)
            waits_ms = [round(1000 * wait_s.item(), 1) for wait_s in waits_s]
            last = waits_ms.index(min(waits_ms))
            self.log(f'barrier before:"{before}" last_rank:{last} waits_ms:{waits_ms}')

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def generator(self, *keys: int) -> torch.Generator:
        """A generator on the run's device that depends on SEED and `keys` only."""
        state = np.random.SeedSequence((self.cfg.seed, *keys)).generate_state(1, np.uint64)
        return torch.Generator(self.device).manual_seed(int(state[0]) >> 1)


def report(run: Run | None, sentence: str, is_shared: bool = True) -> bool:
    """Print an error on stderr unless another rank has told one; says whether this rank was the first.
    is_shared: before ranks have joined, whether all of them meet it."""
    is_first = os.environ.get("RANK", "0") == "0" or not is_shared
    if run is not None and run._store is not None:
        with contextlib.suppress(RuntimeError):      # the store ends with rank 0, which has told its error
            is_first = run._store.add("errors_told", 1) == 1
    if is_first:
        if run is not None:
            run.progress("")
        print(sentence, file=sys.stderr, flush=True)
    return is_first


class Timer:
    """Seconds since creation, with the device drained at both ends."""

    def __init__(self, run: Run) -> None:
        self.run = run
        run.sync()
        self.start = time.perf_counter()

    def seconds(self) -> float:
        self.run.sync()
        return time.perf_counter() - self.start


def require_finite(run: Run, what: str, *values: Tensor | float) -> None:
    """Raise RunError unless all values are finite. On a GPU it waits for them: not for use inside steps."""
    for value in values:
        if not torch.isfinite(torch.as_tensor(value)).all():
            shown = f" is {value}" if isinstance(value, float) else " holds NaN or infinity"
            raise RunError(f"{what}{shown} in stage {run.stage_name}; last good value: {run.last_good}; "
                           "lower MATRIX_LR or check the data")


def save(run: Run, path: Path, data: bytes) -> None:
    """write_file that loses nothing to a full disk: says what is missing and waits until it works."""
    told = None
    while True:
        try:
            return write_file(path, data)
        except OSError as error:
            if told != (told := error.strerror):
                run.log(f'write waiting file:{path.name} bytes:{len(data)} reason:"{told}; mend that or make '
                        f'{len(data):,} bytes of room in {path.parent.name}, they wait in memory"')
            time.sleep(DISK_RETRY_S)


@contextlib.contextmanager
def catch_signals(give_up: Callable[[int], None]) -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted in the main thread. Where that is stuck in a call that does not
    return, another thread calls give_up(signal number) after SIGNAL_GRACE_S; it must end the process."""
    def interrupt(number: int, frame: Any) -> None:
        for handled in previous:
            signal.signal(handled, signal.SIG_IGN)       # a second one must not disturb the way out
        raise Interrupted(number)

    def watch() -> None:
        with open(receiver, "rb", buffering=0) as pipe:  # the C handler writes, whatever the main thread does
            number = pipe.read(1)
            if number and not ended.wait(SIGNAL_GRACE_S):
                give_up(number[0])

    ended, (receiver, sender) = threading.Event(), os.pipe()
    os.set_blocking(sender, False)
    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    previous_fd = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)
        ended.set()
        os.close(sender)


# --- 3 data -------------------------------------------------------------------------------------------------
# Shard files, the checks that make their numbers believable, and the two loaders.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
SEGMENT_PAD = 64             # cu_seqlens are padded to a multiple of this many entries
GRAPH_TOKENS_PER_SEGMENT = 384     # rows of shorter segments are rare: they get no CUDA graph of their own
CHECKED_NAME = ".checked.json"                   # beside the shards: what reading every value has found
# Of the published CaseOps export.
CHECK_FIGURES = {"train_shards": 80, "val_tokens": (47_851_521, 47_853_568),
                 "val_bytes": {"targets": 47_851_520, "bytes": 151_074_499, "tolerance": 2},
                 "tokenizer": {"file": "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model",
                               "sha256": "97754754561f20def5edd99765ca0668f880bd94e67316d54aa10ab25f45cc4d"}}


class DataError(ValueError):
    """A data file is missing, damaged, or not what the configuration says."""


def read_shard_header(path: Path) -> int:
    """Number of values in a shard. Raises DataError unless magic, version and file size are right."""
    with open(path, "rb") as file:
        raw, have = file.read(SHARD_HEADER_BYTES), path.stat().st_size
    if len(raw) < SHARD_HEADER_BYTES:
        raise DataError(f"{path}: expected a token shard with a header of {SHARD_HEADER_BYTES:,} bytes, "
                        f"found a file of {have:,}; it is cut off, fetch this shard again")
    magic, version, count = struct.unpack_from("<3i", raw)
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise DataError(f"{path}: expected a token shard (magic {SHARD_MAGIC}, version {SHARD_VERSION}), "
                        f"found {magic} and {version}; it is of another family, prepare the data again")
    want = SHARD_HEADER_BYTES + 2 * count
    if count <= 0 or have != want:
        raise DataError(f"{path}: header promises {count:,} tokens ({want:,} bytes), found {have:,} bytes; "
                        "the file is empty or its download incomplete, fetch this shard again")
    return count


def read_shard(path: Path) -> np.ndarray:
    """The values of a shard, uint16 (count,)."""
    read_shard_header(path)
    return np.fromfile(path, dtype="<u2", offset=SHARD_HEADER_BYTES)


def find_shards(folder: Path, series: str) -> list[Path]:
    """Files fineweb_<series>_000000.bin ... in numeric order; DataError when none or one is missing."""
    if not folder.is_dir():
        raise DataError(f"DATA_PATH={folder}: no such folder; run prepare_caseops_data.py or correct it")
    pattern = re.compile(rf"fineweb_{series}_\d{{6}}\.bin")
    found = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    if not found:
        raise DataError(f"{folder}: no fineweb_{series}_*.bin; run prepare_caseops_data.py or set DATA_PATH")
    for number, path in enumerate(found):
        if path.name != (wanted := f"fineweb_{series}_{number:06d}.bin"):
            raise DataError(f"{folder}: {wanted} is missing; fetch it again")
    return found


SHARD_FACTS = ("sha256", "first", "largest", "total", "head_total")


def read_facts(path: Path, head: int) -> dict[str, Any]:
    """SHA-256 of a shard and its first, largest and summed values; head_total: those of the first `head`."""
    data = np.memmap(path, mode="r")
    values = data[SHARD_HEADER_BYTES:].view("<u2")
    totals = (int(part.sum(dtype=np.int64)) for part in (values, values[:head]))
    found = hashlib.sha256(data).hexdigest(), int(values[0]), int(values.max()), *totals
    return dict(zip(SHARD_FACTS, found))


def file_stamp(path: Path, head: int) -> list[int]:
    """What must be unchanged for remembered facts to hold."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, head]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Checked file lists of one data folder. Only headers have been read until check_values."""
    folder: Path
    train: tuple[Path, ...]
    val: tuple[Path, ...]
    val_bytes: tuple[Path, ...]
    val_tokens: int
    manifest: dict | None

    @classmethod
    def open(cls, cfg: Config) -> "Dataset":
        """Check headers, numbering, sidecar lengths, and that the splits belong together (DataError)."""
        folder = Path(cfg.data_path)
        series = [tuple(find_shards(folder, name)) for name in ("train", "val", "val_bytes")]
        counts = {path.name: read_shard_header(path) for paths in series for path in paths}
        tokens, byte_counts = ([counts[path.name] for path in paths] for paths in series[1:])
        if tokens != byte_counts:
            raise DataError(f"{folder}: every fineweb_val_bytes shard must be as long as its fineweb_val "
                            f"shard; found {tokens} tokens and {byte_counts} byte counts; prepare again")
        val_tokens, manifest = sum(tokens), cls._manifest(folder, counts)
        (low, high), most = CHECK_FIGURES["val_tokens"], CHECK_FIGURES["train_shards"]
        is_published = low <= val_tokens <= high and len(series[0]) <= most
        if not (manifest or cfg.allow_unverified or is_published):
            raise DataError(
                f"{folder}: without manifest.json only the published export is trusted ({low:,} to {high:,} "
                f"validation tokens, at most {most} training shards), found {val_tokens:,} and "
                f"{len(series[0])}; prepare the data with prepare_caseops_data.py, which writes one, or set "
                "ALLOW_UNVERIFIED=1 if you are sure that training and validation do not overlap")
        return cls(folder, *series, val_tokens, manifest)

    @staticmethod
    def _manifest(folder: Path, counts: dict[str, int]) -> dict | None:
        path = folder / "manifest.json"
        if not path.exists():
            return None
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            listed = {name: int(entry["values"]) for name, entry in manifest["files"].items()}
            val, tokenizer = manifest["val"], manifest["tokenizer"]
            needed = (tokenizer["file"], val["tokens"], val["sidecar_bytes"],
                      *(entry["sha256"] for entry in manifest["files"].values()),
                      *(manifest["merges"][name] for name in ("file", "count", "sha256")
                        if "merges" in manifest))
            if None in needed:
                raise ValueError("a hash or a total is null")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: not a manifest of this family ({error}); prepare again") from error
        # A partial download may leave out training shards at the end, never a file of the validation split.
        wrong = sorted(name for name in listed.keys() | counts.keys()
                       if listed.get(name) != counts.get(name) and (name in counts or "_val_" in name))
        if wrong:
            raise DataError(f"{folder}: manifest.json and files disagree: {wrong[0]} should hold "
                            f"{listed.get(wrong[0])} values, found {counts.get(wrong[0])} ({len(wrong)} such "
                            "files); both splits must come from one preparation run")
        return manifest

    def check_values(self, cfg: Config, run: Run, split: str, read: bool = True) -> bool:
        """Check every value of the files of `split` ("train" or "val"): hashes and totals against manifest or
        published figures, token range, first BOS. What is found is remembered beside the shards, so that only
        new or changed files are read. False, without reading, if read=False and something is not remembered;
        DataError names what is wrong. Rank 0 does it while the others wait for the answer."""
        if run.rank != 0:
            return run.share(None)
        timer = Timer(run)
        stamps: dict[Path, list[int]] = {}                   # taken before reading: a later change shows
        for paths in (self.train,) if split == "train" else (self.val, self.val_bytes):
            # one more than targets, because a target's bytes stand one position later
            left = CHECK_FIGURES["val_bytes"]["targets"] + 1 if split == "val" else 0
            for path in paths:
                head = min(left, (path.stat().st_size - SHARD_HEADER_BYTES) // 2)
                stamps[path] = file_stamp(path, head)
                left -= head
        remembered = self._remembered()
        facts = {path: remembered[path.name][1] for path, stamp in stamps.items()
                 if path.name in remembered and remembered[path.name][0] == stamp}
        unread = [path for path in stamps if path not in facts]
        if unread and not read:
            return run.share(False)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            facts.update(zip(unread, pool.map(read_facts, unread, [stamps[path][-1] for path in unread])))
        self._judge(cfg, split, facts)
        if unread:
            remembered.update({path.name: [stamps[path], facts[path]] for path in unread})
            content = json.dumps({"format": 1, "files": remembered})
            with contextlib.suppress(OSError):               # a folder that cannot be written is read again
                write_file(self.folder / CHECKED_NAME, content.encode())
        run.log(f"data checked split:{split} files:{len(stamps)} read:{len(unread)} "
                f"elapsed_ms:{1000 * timer.seconds():.0f}")
        return run.share(True)

    def _remembered(self) -> dict[str, Any]:
        try:
            checked = json.loads((self.folder / CHECKED_NAME).read_text(encoding="utf-8"))
            return {name: [stamp, {fact: facts[fact] for fact in SHARD_FACTS}]
                    for name, (stamp, facts) in checked["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}                                        # nothing remembered: read everything

    def _judge(self, cfg: Config, split: str, facts: Mapping[Path, dict[str, Any]]) -> None:
        for path, found in facts.items():
            want = self.manifest["files"][path.name]["sha256"] if self.manifest else found["sha256"]
            if want != found["sha256"]:
                raise DataError(f"{path}: SHA-256 {found['sha256'][:16]}..., but manifest.json says "
                                f"{want[:16]}...; the file is damaged or from another preparation run, fetch "
                                "or prepare it again")
            if path not in self.val_bytes and found["largest"] >= cfg.vocab_size:
                raise DataError(f"{path}: expected tokens below VOCAB_SIZE={cfg.vocab_size}, found "
                                f"{found['largest']}; set VOCAB_SIZE as in the preparation, or prepare again")
        if split == "train":
            return
        first = facts[self.val[0]]["first"]
        if first != BOS:
            raise DataError(f"{self.val[0]}: the validation split must begin with BOS ({BOS}), found token "
                            f"{first}; prepare the validation split again")
        sidecar = [facts[path] for path in self.val_bytes]
        if self.manifest:
            found = {"tokens": self.val_tokens, "sidecar_bytes": sum(shard["total"] for shard in sidecar)}
            said = {name: self.manifest["val"][name] for name in found}
            if said != found:
                raise DataError(f"{self.folder}: validation split with {found}, but manifest.json says "
                                f"{said}; prepare the data again")
        elif not cfg.allow_unverified:
            published = CHECK_FIGURES["val_bytes"]
            num_bytes = sum(shard["head_total"] for shard in sidecar) - sidecar[0]["first"]
            if abs(num_bytes - published["bytes"]) > published["tolerance"]:
                raise DataError(f"{self.folder}: the first {published['targets']:,} validation targets stand "
                                f"for {num_bytes:,} bytes, the published export's for "
                                f"{published['bytes']:,}; fetch the fineweb_val_bytes shards again")

    def load_validation(self) -> tuple[np.ndarray, np.ndarray]:
        """All validation tokens and their byte counts, uint16 (tokens,) each; call check_values first."""
        tokens, byte_counts = ([read_shard(path) for path in paths] for paths in (self.val, self.val_bytes))
        return np.concatenate(tokens), np.concatenate(byte_counts)


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_tokenizer(cfg: Config, data: Dataset) -> Path:
    """Find the tokenizer of this run; refuse what configuration, manifest or published export contradict."""
    manifest, published = data.manifest or {}, CHECK_FIGURES["tokenizer"]
    stated = manifest.get("tokenizer") or ({} if cfg.allow_unverified else published)
    names = [stated["file"]] if stated else [published["file"], "caseops_8192.model"]
    folders = (data.folder, Path("tokenizers"), REPO / "tokenizers")
    candidates = [folder / name for name in names for folder in folders]
    if cfg.tokenizer_path:
        candidates = [Path(cfg.tokenizer_path)]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        wanted = " or ".join(dict.fromkeys(map(str, candidates)))
        raise DataError(f"no tokenizer: expected {wanted}; set TOKENIZER_PATH")
    digest = sha256_of(path)
    recorded = path.with_name(path.name + ".sha256")
    beside = (recorded.read_text().split() or ["(nothing)"])[0] if recorded.exists() else None
    source = "the shards' manifest" if manifest else "the published export"
    for name, want in ((source, stated.get("sha256")), (recorded.name, beside)):
        if want and want != digest:
            raise DataError(f"{path}: SHA-256 {digest[:16]}..., but {name} says {want[:16]}...; use the "
                            "tokenizer the shards were made with")
    if merges := manifest.get("merges"):            # pairs of tokens joined by `prepare_caseops_data.py fuse`
        file = data.folder / Path(str(merges["file"])).name
        found = sha256_of(file) if file.is_file() else "no file"
        if found != merges["sha256"]:
            raise DataError(f"{file}: expected the merges that the shards were made with, SHA-256 "
                            f"{merges['sha256']}, found {found}; copy it from where the shards were made")
    import sentencepiece                            # only this check needs it
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: not a SentencePiece model ({error})") from error
    expected = {"vocab_size": cfg.vocab_size, "bos_id": BOS, "operator_ids": list(OPERATOR_IDS)}
    said = {name: stated.get(name, value) for name, value in expected.items()}
    found = {"vocab_size": model.vocab_size(), "bos_id": model.bos_id(),
             "operator_ids": [model.piece_to_id(chr(0xE001 + k)) for k in range(4)]}
    if found != expected or said != expected:
        raise DataError(f"{path}: expected {expected}, found {found} in the model and {said} in the shards' "
                        "manifest; set VOCAB_SIZE and TOKENIZER_PATH to match the data")
    return path


def segment_bounds(tokens: np.ndarray, cap: int, pad: int = SEGMENT_PAD) -> np.ndarray:
    """cu_seqlens of a flat row, int32 [0, ..., n]: documents start at BOS, segments are cut every `cap`
    tokens, and n is repeated (empty segments) up to a multiple of `pad` entries."""
    n = len(tokens)
    starts = np.union1d(0, np.flatnonzero(tokens == BOS))
    pieces = -(-np.diff(starts, append=n) // cap)
    within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return pad_bounds(np.append(np.repeat(starts, pieces) + within * cap, n), pad)


def pad_bounds(bounds: np.ndarray, pad: int = SEGMENT_PAD) -> np.ndarray:
    """`bounds` as int32, the last one repeated up to a multiple of `pad` entries."""
    return np.pad(bounds, (0, -len(bounds) % pad), mode="edge").astype(np.int32)


class Row(NamedTuple):
    """One flat training row on the run's device. A loader leaves cu_seqlens in the host's memory, where
    RowGradients picks it up."""
    inputs: Tensor          # (T,) int64
    targets: Tensor         # (T,) int64
    cu_seqlens: Tensor      # (segments + 1,) int32, padded

    def part(self, begin: int, end: int) -> Row:
        """Positions [begin, end) of a loader's row, whose documents are cut there."""
        bounds = self.cu_seqlens.numpy()
        inside = bounds[(bounds > begin) & (bounds < end)] - begin
        local = torch.from_numpy(pad_bounds(np.concatenate([[0], inside, [end - begin]])))
        cu_seqlens = local.pin_memory() if self.inputs.is_cuda else local
        return Row(self.inputs[begin:end], self.targets[begin:end], cu_seqlens)


class PackingLoader:
    """The endless stream of training rows, in shard order; rank r of R yields rows r, R + r, 2R + r, ... A
    row is row_tokens inputs and their targets; consecutive rows do not overlap. A shard is read from its
    first BOS; its tail that holds no full row is dropped. A thread prepares rows ahead, in the same order."""
    PREFETCH = 3

    def __init__(self, paths: Sequence[Path], row_tokens: int, segment_cap: int, rank: int = 0,
                 world_size: int = 1, device: torch.device = torch.device("cpu"),
                 warn: Callable[[str], None] = lambda line: None) -> None:
        self.paths, self.row_tokens, self.segment_cap = paths, row_tokens, segment_cap
        self.rank, self.world_size, self.device, self._warn = rank, world_size, device, warn
        self._rows, self._reader = self._host_rows(), ThreadPoolExecutor(1)
        self._ahead = [self._reader.submit(next, self._rows) for _ in range(self.PREFETCH)]

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)

    def __next__(self) -> Row:
        self._ahead.append(self._reader.submit(next, self._rows))
        inputs, targets, bounds = self._ahead[0].result()
        del self._ahead[0]                            # an error stays first: the next call meets it too
        # From pinned memory, so the copies overlap with what the GPU is doing.
        on_device = (x.to(self.device, non_blocking=True) for x in (inputs, targets))
        return Row(*on_device, bounds)

    def spans(self) -> Iterator[np.ndarray]:
        """All spans of row_tokens + 1 tokens, for ever."""
        span = self.row_tokens + 1
        while True:
            is_empty = True
            for path in self.paths:
                tokens = read_shard(path)
                from_bos = tokens[np.argmax(tokens == BOS):] if BOS in tokens else tokens[:0]
                if len(from_bos) < span:
                    self._warn(f"data warning shard:{path.name} tokens:{len(tokens)} skipped: no BOS, or "
                               f"shorter than one row of {span} tokens")
                for start in range(0, len(from_bos) - span + 1, span):
                    yield from_bos[start:start + span]
                    is_empty = False
            if is_empty:
                raise DataError(f"no training shard holds one row of {span:,} tokens from its first BOS on; "
                                "lower TRAIN_BATCH_TOKENS or prepare more data")

    def _host_rows(self) -> Iterator[tuple]:
        for span in itertools.islice(self.spans(), self.rank, None, self.world_size):
            bounds = segment_bounds(span[:-1], self.segment_cap)
            arrays = span[:-1].astype(np.int64), span[1:].astype(np.int64), bounds
            tensors = map(torch.from_numpy, arrays)
            yield tuple(x.pin_memory() if self.device.type == "cuda" else x for x in tensors)


def split_rows(rows: Iterator[Row], count: int, parts: int) -> Iterator[Row]:
    """The first parts of `count` rows, then their second parts, and so on: `parts` steps for one."""
    while parts == 1:
        yield next(rows)
    while True:
        whole = [next(rows) for _ in range(count)]
        size = len(whole[0].inputs) // parts
        for begin in range(0, parts * size, size):
            for row in whole:
                yield row.part(begin, begin + size)


def calibration_batches(paths: Sequence[Path], seq_len: int, batch_seqs: int,
                        seed: int = 0) -> Iterator[np.ndarray]:
    """Batches of random sequences, int64 (batch_seqs, seq_len + 1) each, for ever; document borders are
    ignored. Every file gets a random phase and a random order of its sequences; each row is drawn from a file
    with probability proportional to what the file has left. When all are used up they are dealt anew."""
    rng = np.random.Generator(np.random.PCG64(seed))
    shards = [np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES) for path in paths]

    def deal(tokens: np.ndarray) -> list[int]:
        spare = len(tokens) - 1 - seq_len               # below 0: not even one sequence
        phase = int(rng.integers(min(seq_len - 1, max(0, spare)) + 1))
        count = max(0, (len(tokens) - 1 - phase) // seq_len)
        return (phase + seq_len * rng.permutation(count)).tolist()

    left = np.zeros(len(shards))
    while True:
        batch = np.empty((batch_seqs, seq_len + 1), dtype=np.int64)
        for row in range(batch_seqs):
            if not left.any():
                stacks = [deal(tokens) for tokens in shards]
                left = np.array([float(len(stack)) for stack in stacks])
                if not left.any():
                    raise DataError(f"no training shard holds one sequence of {seq_len + 1:,} tokens; lower "
                                    "TRAIN_SEQ_LEN or prepare more data")
            shard = int(rng.choice(len(shards), p=left / left.sum()))
            start = stacks[shard].pop()
            left[shard] -= 1
            batch[row] = shards[shard][start:start + seq_len + 1]
        yield batch


# --- 4 model ------------------------------------------------------------------------------------------------
# One forward pass for training, evaluation and test-time training: plain functions of one layer's weights.

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def attend_math(q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Plain causal softmax attention of each segment (N, H, K); query head h reads key/value head h // (H/G).
    cu_seqlens (segments + 1,) int32 ascending from 0 to N; empty segments are allowed."""
    bounds = cu_seqlens.tolist()
    out = []
    for start, end in zip(bounds, bounds[1:]):
        if end > start:
            q, k, v = (x[start:end].transpose(0, 1)[None] for x in (q_NHK, k_NGK, v_NGK))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            out.append(y[0].transpose(0, 1))
    return torch.cat(out)


def softcap_logits(logits: Tensor, cap_pos: Tensor, cap_neg: Tensor) -> Tensor:
    """cap * tanh(logits / cap), with cap_pos for positive logits and cap_neg for the others."""
    cap = torch.where(logits > 0, cap_pos, cap_neg)
    return cap * torch.tanh(logits / cap)


def softcap_loss(hidden_ND: Tensor, tok_emb_VD: Tensor, cap_pos: Tensor, cap_neg: Tensor,
                 targets_N: Tensor) -> Tensor:
    """Mean nll in nats of the tied, softcapped head; logits and loss fp32. Defines FusedSoftcapLoss."""
    logits_NV = F.linear(hidden_ND, tok_emb_VD.to(hidden_ND.dtype)).float()
    return F.cross_entropy(softcap_logits(logits_NV, cap_pos, cap_neg), targets_N)


RMS_EPS = 2.0 ** -23


class LowRank(NamedTuple):
    """One adapter per document: x -> (x Aᵀ) Bᵀ * scale [LoRA]. A (B, R, in), B (B, out, R), fp32."""
    A: Tensor
    B: Tensor
    scale: float

    def __call__(self, x_BTD: Tensor) -> Tensor:
        # A from the left, so that its gradient comes out in the layout of A.
        low = torch.bmm(self.A.to(x_BTD.dtype), x_BTD.transpose(1, 2)).transpose(1, 2)
        return torch.bmm(low, self.B.to(x_BTD.dtype).transpose(1, 2)) * self.scale


def adapted(y: Tensor, x_BTD: Tensor, adapter: LowRank | None) -> Tensor:
    """y, plus what the adapter of each document makes of x."""
    return y if adapter is None else y + adapter(x_BTD)


# The adapters of one execution slot, LowRank each; None costs nothing.
LayerAdapters = namedtuple("LayerAdapters", "q k v o mlp", defaults=[None] * 5)


class LayerWeights(NamedTuple):
    """Views of one layer's parameters, fp32. Each field is a parameter (L, ...) of GPT of the same name."""
    wq: Tensor              # (D, D)
    wk: Tensor              # (G*K, D)
    wv: Tensor              # (G*K, D)
    wo: Tensor              # (D, D)
    w_up: Tensor            # (F, D)
    w_down: Tensor          # (D, F)
    q_gain: Tensor          # (H,)
    xsa_alpha: Tensor       # (H,), tanh of it is the share of the own value that is removed
    attn_gate: Tensor       # (H, gate_window)
    attn_scale: Tensor      # (D,)
    mlp_scale: Tensor       # (D,)
    resid_mix: Tensor       # (2, D): of the residual stream, of x0
    lane_post: Tensor       # (2, 2): from attention or MLP, to lane 0 or 1
    lane_resid: Tensor      # (2,): of each lane
    ln_scale: Tensor        # 0-d constant, 1 / sqrt(layer + 1)


class Packing(NamedTuple):
    """Where attention may look: segment bounds in the flattened tokens; rotary tables of the T positions."""
    cu_seqlens: Tensor      # (segments + 1,) int32
    max_seqlen: int
    cos: Tensor             # (T, 1, rope_dims / 2) fp32
    sin: Tensor
    attend: Attend
    gate_scale: float


Tap = Callable[[int, str, Tensor], None]        # (layer, "qkv" | "o" | "up" | "down", that matrix's input)
LayerTap = Callable[[str, Tensor], None]        # a Tap that knows its layer
Skip = tuple[Tensor, Tensor, Tensor] | None     # (kept encoder output, weight, gate)


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + 2⁻²³) over the last axis; statistics fp32, result in the dtype of x."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + RMS_EPS)).to(x.dtype)


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first channels of each head, channel j paired with j + rope_dims/2 [RoPE]."""
    half = cos.shape[-1]
    a, b, rest = x_BTHK.split([half, half, x_BTHK.shape[-1] - 2 * half], -1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], -1)


def blend_skip(x: Tensor, skip: Skip) -> Tensor:
    """Per channel from the scaled encoder output (gate → 0) to the running value (gate → 1)."""
    if skip is None:
        return x
    saved, weight, gate = skip
    a = torch.sigmoid(gate).to(x.dtype)
    return (1 - a) * (weight.to(x.dtype) * saved) + a * x


def mix_and_norm(x: Tensor, x0: Tensor, skip: Skip, resid_mix: Tensor,
                 ln_scale: Tensor) -> tuple[Tensor, Tensor]:
    """(z, n): the residual stream after skip blend and mix with x0, and its scaled norm for a sub-layer."""
    mix = resid_mix.to(x.dtype)
    z = mix[0] * blend_skip(x, skip) + mix[1] * x0
    return z, ln_scale.to(x.dtype) * rms_norm(z)


def prepare_qk(q_BTHK: Tensor, k_BTGK: Tensor, q_gain: Tensor, cos: Tensor,
               sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys as attention takes them: normed per head, rotated, queries times their head's gain.
    fp32 inside, results in the dtype of the input."""
    q = rotate(rms_norm(q_BTHK.float()), cos, sin) * q_gain[:, None]
    k = rotate(rms_norm(k_BTGK.float()), cos, sin)
    return q.to(q_BTHK.dtype), k.to(k_BTGK.dtype)


def remove_own_value(y_BTHK: Tensor, v_BTGK: Tensor, n_BTD: Tensor, xsa_alpha: Tensor, attn_gate: Tensor,
                     gate_scale: float) -> Tensor:
    """What each head saw, without its share along the token's own value [XSA], times the head's sparse gate,
    which reads the first channels of n. fp32 inside; (B, T, D) in the dtype of n."""
    B, T, H, K = y_BTHK.shape
    G = v_BTGK.shape[2]
    y = y_BTHK.reshape(B, T, G, H // G, K).float()
    unit = F.normalize(v_BTGK.float(), dim=-1, eps=1e-12)[:, :, :, None]
    y = y - torch.tanh(xsa_alpha).view(G, H // G, 1) * (y * unit).sum(-1, keepdim=True) * unit
    window = n_BTD[..., :attn_gate.shape[-1]]
    gate = torch.sigmoid(gate_scale * F.linear(window, attn_gate.to(n_BTD.dtype)).float())
    return (y * gate.view(B, T, G, H // G, 1)).reshape(B, T, H * K).to(n_BTD.dtype)


LEAKY_SLOPE = 0.3


def leaky_square(z: Tensor) -> Tensor:
    """The MLP's activation φ(z) = leaky_relu(z, LEAKY_SLOPE)²."""
    return F.leaky_relu(z, LEAKY_SLOPE).square()


def attention(n_BTD: Tensor, w: LayerWeights, packing: Packing, adapters: LayerAdapters,
              tap: LayerTap | None) -> Tensor:
    """Attention sub-layer of a normed and scaled input: GQA, QK norm, gated XSA and a sparse output gate."""
    B, T, D = n_BTD.shape
    dtype = n_BTD.dtype
    kv_dim, H = w.wk.shape[0], w.q_gain.shape[0]
    K, G = D // H, kv_dim * H // D
    # One product for all three: the input is read once, and its gradient needs no additions.
    q, k, v = F.linear(n_BTD, torch.cat([w.wq, w.wk, w.wv]).to(dtype)).split([D, kv_dim, kv_dim], -1)
    q = adapted(q, n_BTD, adapters.q).reshape(B, T, H, K)
    k = adapted(k, n_BTD, adapters.k).reshape(B, T, G, K)
    v = adapted(v, n_BTD, adapters.v).reshape(B, T, G, K)
    q, k = prepare_qk(q, k, w.q_gain, packing.cos, packing.sin)
    y = packing.attend(q.reshape(B * T, H, K), k.reshape(B * T, G, K), v.reshape(B * T, G, K),
                       packing.cu_seqlens, packing.max_seqlen)
    y = remove_own_value(y.reshape(B, T, H, K), v, n_BTD, w.xsa_alpha, w.attn_gate, packing.gate_scale)
    if tap is not None:
        tap("qkv", n_BTD)
        tap("o", y)
    return adapted(F.linear(y, w.wo.to(dtype)), n_BTD, adapters.o)


def mlp(n_BTD: Tensor, w: LayerWeights, adapters: LayerAdapters, tap: LayerTap | None) -> Tensor:
    """Down(φ(Up n))."""
    act = leaky_square(F.linear(n_BTD, w.w_up.to(n_BTD.dtype)))
    if tap is not None:
        tap("up", n_BTD)
        tap("down", act)
    return adapted(F.linear(act, w.w_down.to(n_BTD.dtype)), n_BTD, adapters.mlp)


def embed(tokens_BT: Tensor, tok_emb: Tensor, smear_w: Tensor, smear_lambda: Tensor,
          dtype: torch.dtype) -> Tensor:
    """Normed embedding after SmearGate, which adds a gated copy of the previous one unless this is BOS."""
    e = F.embedding(tokens_BT, tok_emb).to(dtype)
    gate = smear_lambda * torch.sigmoid((e[..., :len(smear_w)].float() * smear_w).sum(-1, keepdim=True))
    gate = (gate * (tokens_BT != BOS)[..., None]).to(dtype)
    return rms_norm(e + gate * F.pad(e[:, :-1], (0, 0, 1, 0)))


def serial_block(x: Tensor, x0: Tensor, skip: Skip, w: LayerWeights, packing: Packing,
                 adapters: LayerAdapters, tap: LayerTap | None = None) -> Tensor:
    """Attention, then MLP, on one residual stream (B, T, D)."""
    dtype = x.dtype
    z, n = mix_and_norm(x, x0, skip, w.resid_mix, w.ln_scale)
    z = z + w.attn_scale.to(dtype) * attention(n, w, packing, adapters, tap)
    n = w.ln_scale.to(dtype) * rms_norm(z)
    return z + w.mlp_scale.to(dtype) * mlp(n, w, adapters, tap)


def parallel_block(lane0: Tensor, lane1: Tensor, x0: Tensor, skip: Skip, w: LayerWeights, packing: Packing,
                   adapters: LayerAdapters, tap: LayerTap | None = None) -> tuple[Tensor, Tensor]:
    """Attention reads lane 0 (mixed with x0 and the skip), the MLP reads lane 1, both write to both lanes."""
    dtype = lane0.dtype
    resid, post = w.lane_resid.to(dtype), w.lane_post.to(dtype)
    lane0 = blend_skip(lane0, skip)
    _, n = mix_and_norm(lane0, x0, None, w.resid_mix, w.ln_scale)          # the lane itself goes on unmixed
    a = w.attn_scale.to(dtype) * attention(n, w, packing, adapters, tap)
    n = w.ln_scale.to(dtype) * rms_norm(lane1)
    m = w.mlp_scale.to(dtype) * mlp(n, w, adapters, tap)
    return (resid[0] * lane0 + post[0, 0] * a + post[1, 0] * m,
            resid[1] * lane1 + post[0, 1] * a + post[1, 1] * m)


def finish(lane0: Tensor, lane1: Tensor) -> Tensor:
    """The head's input: normed mean of the lanes."""
    return rms_norm(0.5 * (lane0 + lane1))


def score_tokens(hidden_ND: Tensor, tok_emb: Tensor, cap_pos: Tensor, cap_neg: Tensor, targets_N: Tensor,
                 hints_N: Tensor, delta_NV: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(nll of the target, log-probability of the hinted token), both (N,) fp32, over the full vocabulary;
    delta_NV is an adapter's addition to the raw logits. The product rounds to the compute dtype, the rest is
    fp32."""
    logits = F.linear(hidden_ND, tok_emb.to(hidden_ND.dtype)).float()
    if delta_NV is not None:
        logits = logits + delta_NV.float()
    log_probs = F.log_softmax(softcap_logits(logits, cap_pos, cap_neg), -1)
    picked = log_probs.gather(-1, torch.stack([targets_N, hints_N], -1))
    return -picked[:, 0], picked[:, 1]


def no_cast(model: GPT, into: Any = None) -> None:
    """The cast of Ops for functions that cast every weight where they use it."""


def row_gradients(model: GPT, row: Row, *, looping: bool, segment_cap: int, weights: Tensor | None = None,
                  cast: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss in nats of one training row (0-d fp32, detached) and its gradient by parameter name.

    The gradients, fp32 in their parameter's shape and contiguous, belong to the caller, who may change them.
    Frozen parameters and those that the loss does not depend on are absent. segment_cap bounds the segments'
    lengths. weights (T,) fp32: the loss is the sum of the tokens' losses times these, in place of their mean.
    cast is what the cast of Ops has made of the model's present weights, None to make it here.
    """
    # The number of documents in a row varies; only the attention kernel sees it.
    segments = mark_varying(row.cu_seqlens, 0)
    if weights is None:
        loss = model.loss(row.inputs, row.targets, segments, looping=looping, segment_cap=segment_cap)
    else:
        hidden = model(row.inputs[None], looping=looping, segments=(segments, segment_cap),
                       ops=model.ops.plain())[0]
        nll, _ = score_tokens(hidden, model.tok_emb, model.softcap_pos, model.softcap_neg, row.targets,
                              row.targets)
        loss = (nll * weights).sum()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    found = {name: grad.contiguous() for name, grad in zip(trained, grads) if grad is not None}
    return loss.detach(), found


def hidden_states(model: GPT, tokens_BT: Tensor, *, looping: bool, segments: tuple[Tensor, int]) -> Tensor:
    """Final normed hidden states (B, T, D), from which nothing goes backward."""
    return model(tokens_BT, looping=looping, segments=segments).detach()


class Ops(NamedTuple):
    """Everything heavy that the model runs: the plain definitions, unless choose_ops(run) found faster ones.
    GPT.forward, loss and score call these and nothing else that takes time; training takes a row's gradients
    from row_gradients alone, so that an Ops may replace forward and backward by what knows no autograd.
    cast(model, into) makes of the weights what row_gradients and chunk_gradients compute with, for as long as
    the weights stay; with `into`, an earlier result, in its memory."""
    cast: Callable[..., Any] = no_cast
    attend: Attend = attend_math
    embed: Callable[..., Tensor] = embed
    serial: Callable[..., Tensor] = serial_block
    parallel: Callable[..., tuple[Tensor, Tensor]] = parallel_block
    finish: Callable[[Tensor, Tensor], Tensor] = finish
    score: Callable[..., tuple[Tensor, Tensor]] = score_tokens
    loss: Callable[..., Tensor] = softcap_loss
    row_gradients: Callable[..., tuple[Tensor, dict[str, Tensor]]] = row_gradients
    hidden: Callable[..., Tensor] = hidden_states
    chunk_gradients: Callable[..., tuple] | None = None    # None: chunk_gradients of section 13

    def plain(self) -> Ops:
        """The plain functions on the same attention and loss: for taps, and for work too short to compile."""
        return Ops(attend=self.attend, loss=self.loss)


def execution_order(cfg: Config, looping: bool) -> tuple[list[int], list[int]]:
    """Layers in order of execution: encoder (whose outputs are kept) and decoder (which takes them)."""
    loop = list(range(cfg.loop_start, cfg.loop_end + 1))
    passes = 1 + cfg.num_loops if looping else 1
    order = [*range(cfg.loop_start), *loop * passes, *range(cfg.loop_end + 1, cfg.num_layers)]
    half = len(order) // 2
    return order[:half], order[half:]


class Execution(NamedTuple):
    """One execution of a layer; its place in the plan is its slot."""
    layer: int
    is_parallel: bool        # two lanes instead of one residual stream
    is_kept: bool            # its output, lane 0, waits for the decoder
    skip_from: int | None    # slot whose kept output is blended in
    skip_row: int | None     # row of skip_weights and skip_gates that blends it


def execution_plan(cfg: Config, looping: bool) -> list[Execution]:
    """Every execution of a forward pass in order. The decoder takes the encoder's outputs, last one first."""
    encoder, decoder = execution_order(cfg, looping)
    last = len(encoder) - 1
    plan = [Execution(layer, layer >= cfg.parallel_start_layer, True, None, None) for layer in encoder]
    for row, layer in enumerate(decoder):
        skip = (last - row, row) if row <= last else (None, None)
        plan.append(Execution(layer, layer >= cfg.parallel_start_layer, False, *skip))
    return plan


def unused_parameters(cfg: Config) -> set[str]:
    """Parameters that no execution reads in a model of this shape."""
    has_lanes = cfg.parallel_start_layer < cfg.num_layers
    return set() if has_lanes else {"lane_post", "lane_resid"}


class GPT(nn.Module):
    """Weights of the model and the order in which the blocks run.

    Banks hold one matrix per layer: wq, wo (L, D, D), wk, wv (L, G*K, D), w_up (L, F, D), w_down (L, D, F).
    All parameters are fp32; `compute_dtype` is the dtype of activations and of every matrix product; `ops`
    are the functions that every forward pass, loss and score runs on unless it is given others.
    """

    def __init__(self, cfg: Config, compute_dtype: torch.dtype = torch.float32, ops: Ops = Ops()) -> None:
        super().__init__()
        self.cfg, self.compute_dtype, self.ops = cfg, compute_dtype, ops
        L, D, H, Fd, kv = cfg.num_layers, cfg.model_dim, cfg.num_heads, cfg.mlp_dim, cfg.kv_dim
        num_skips = min(map(len, execution_order(cfg, True)))

        def orthogonal(rows: int, cols: int) -> Tensor:
            return torch.stack([nn.init.orthogonal_(torch.empty(rows, cols)) for _ in range(L)])

        # More threads are slower by far for matrices this small, and one is the same on any number of ranks.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        initial = {
            "tok_emb": torch.randn(cfg.vocab_size, D) * cfg.tied_embed_init_std,
            "wq": orthogonal(D, D),
            "wk": orthogonal(kv, D),
            "wv": orthogonal(kv, D),
            "wo": torch.zeros(L, D, D),
            "w_up": orthogonal(Fd, D),
            "w_down": torch.zeros(L, D, Fd),
            "q_gain": torch.full((L, H), cfg.qk_gain_init),
            "xsa_alpha": torch.zeros(L, H),
            "attn_gate": torch.zeros(L, H, cfg.gate_window),
            "attn_scale": torch.ones(L, D),
            "mlp_scale": torch.ones(L, D),
            "resid_mix": torch.tensor([1.0, 0.0])[:, None].repeat(L, 1, D),
            "skip_weights": torch.ones(num_skips, D),
            "skip_gates": torch.zeros(num_skips, D),
            "lane_post": torch.ones(L, 2, 2),
            "lane_resid": torch.full((L, 2), 1.1),
            "smear_w": torch.zeros(cfg.gate_window),
            "smear_lambda": torch.zeros(1),
            "softcap_pos": torch.tensor(cfg.logit_softcap),
            "softcap_neg": torch.tensor(cfg.logit_softcap)}
        torch.set_num_threads(threads)
        for name, value in initial.items():
            self.register_parameter(name, nn.Parameter(value.contiguous()))
        self.register_buffer("ln_scale", torch.arange(1, L + 1).rsqrt(), persistent=False)
        self.register_buffer("rope", self._rotary_tables(cfg.longest_row), persistent=False)

    def _rotary_tables(self, count: int) -> Tensor:
        """Cosines and sines (2, count, 1, rope_dims / 2) of the rotary angles, exact in fp32."""
        half = self.cfg.rope_dims // 2
        freq = self.cfg.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = (torch.arange(count, dtype=torch.float64)[:, None] * freq)[:, None]
        return torch.stack([angle.cos(), angle.sin()]).float()

    def layer_weights(self, banks: Mapping[str, Tensor]) -> list[LayerWeights]:
        """The views of every layer, from the parameters by name."""
        views = {name: banks[name].unbind() for name in LayerWeights._fields if name != "ln_scale"}
        views["ln_scale"] = self.ln_scale.unbind()
        return [LayerWeights(**{name: bank[layer] for name, bank in views.items()})
                for layer in range(self.cfg.num_layers)]

    def forward(self, tokens_BT: Tensor, *, looping: bool, segments: tuple[Tensor, int] | None = None,
                adapters: Sequence[LayerAdapters] | None = None, tap: Tap | None = None,
                ops: Ops | None = None, sizes_vary: bool = False) -> Tensor:
        """Final normed hidden states (B, T, D) in the compute dtype.

        segments    (cu_seqlens, longest segment) of a flat row (B = 1); None: a row is one causal sequence.
        adapters    one LayerAdapters per layer execution; with them the weights are constants, no gradients.
        tap         called with (layer, "qkv" | "o" | "up" | "down", input of that matrix); needs plain ops.
        ops         functions to run on in place of the model's own.
        sizes_vary  tells the compiler that B and T change from call to call (test-time training).
        """
        ops = ops or self.ops
        B, T = tokens_BT.shape
        if T > self.rope.shape[1]:
            raise ValueError(f"expected rows of at most {self.rope.shape[1]:,} tokens, the longest of this "
                             f"configuration, found {T:,}; raise a setting behind Config.longest_row")
        if segments is None:
            segments = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=tokens_BT.device), T
        cu_seqlens, max_seqlen = segments
        vary = mark_varying if sizes_vary else lambda x, *dims: x
        cos, sin = (vary(table[:T], 0) for table in self.rope.unbind())
        gate_scale = self.cfg.sparse_attn_gate_scale
        packing = Packing(vary(cu_seqlens, 0), max_seqlen, cos, sin, ops.attend, gate_scale)
        banks = {name: p if adapters is None else p.detach() for name, p in self.named_parameters()}
        layers = self.layer_weights(banks)
        skip_weights, skip_gates = banks["skip_weights"].unbind(), banks["skip_gates"].unbind()
        plan = execution_plan(self.cfg, looping)

        x0 = ops.embed(vary(tokens_BT, 0, 1), banks["tok_emb"], banks["smear_w"], banks["smear_lambda"],
                       self.compute_dtype)
        # A copy: the compiler builds one more variant of a block for arguments that share memory.
        lane0 = x0.clone()
        if adapters is None:
            adapters = [LayerAdapters()] * len(plan)
        else:
            lane0.requires_grad_()                         # like every later one: one variant to compile
        lane1: Tensor | None = None                        # until the lanes part
        vary(x0, 0, 1)
        kept: dict[int, Tensor] = {}                       # encoder outputs by slot, until they are taken
        for slot, execution in enumerate(plan):
            weights = layers[execution.layer]
            layer_tap = None if tap is None else functools.partial(tap, execution.layer)
            skip = None
            if execution.skip_from is not None:
                row = execution.skip_row
                skip = kept.pop(execution.skip_from), skip_weights[row], skip_gates[row]
            vary(lane0, 0, 1)
            if execution.is_parallel:
                lane1 = vary(lane0.clone() if lane1 is None else lane1, 0, 1)
                lane0, lane1 = ops.parallel(lane0, lane1, x0, skip, weights, packing, adapters[slot],
                                            layer_tap)
            else:
                lane0 = ops.serial(lane0, x0, skip, weights, packing, adapters[slot], layer_tap)
            if execution.is_kept:
                kept[slot] = lane0
        lane1 = lane0.clone() if lane1 is None else lane1
        return ops.finish(vary(lane0, 0, 1), vary(lane1, 0, 1))

    def loss(self, tokens_T: Tensor, targets_T: Tensor, cu_seqlens: Tensor, *, looping: bool,
             segment_cap: int) -> Tensor:
        """Mean training nll in nats of one flat row; segment_cap bounds the segments' lengths."""
        hidden = self(tokens_T[None], looping=looping, segments=(cu_seqlens, segment_cap))[0]
        return self.ops.loss(hidden, self.tok_emb, self.softcap_pos, self.softcap_neg, targets_T)

    def score(self, hidden_ND: Tensor, targets_N: Tensor, hints_N: Tensor | None = None,
              delta_NV: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(nll of targets, log-probability of hints) of hidden states; without hints the second equals -nll.
        With an adapter's delta_NV the weights are constants without gradients."""
        hints_N = targets_N.clone() if hints_N is None else hints_N
        head = self.tok_emb, self.softcap_pos, self.softcap_neg
        if delta_NV is not None:
            mark_varying(delta_NV, 0)
            head = tuple(p.detach() for p in head)
        for x in (hidden_ND, targets_N, hints_N):
            mark_varying(x, 0)
        return self.ops.score(hidden_ND, *head, targets_N, hints_N, delta_NV)


# --- 5 schedules and EMA ------------------------------------------------------------------------------------
# Pure functions of progress in [0, 1] or of the step, and the weight average.

def lr_factor(cfg: Config, progress: float) -> float:
    """1, then linear to 0 over the last WARMDOWN_FRAC of the budget, but never below MIN_LR."""
    if progress < 1 - cfg.warmdown_frac or cfg.warmdown_frac == 0:
        return 1.0
    return max((1 - progress) / cfg.warmdown_frac, cfg.min_lr)


def muon_momentum(cfg: Config, step: int) -> float:
    """Linear from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM over the warm-up steps."""
    done = min(step / cfg.muon_momentum_warmup_steps, 1.0) if cfg.muon_momentum_warmup_steps else 1.0
    return cfg.muon_momentum_warmup_start + done * (cfg.muon_momentum - cfg.muon_momentum_warmup_start)


def global_sgd_lr(base_lr: float, num_chunks: int, chunk: int) -> float:
    """Half a cosine over the chunks of the base adaptation."""
    return base_lr * 0.5 * (1 + math.cos(math.pi * chunk / max(num_chunks - 1, 1)))


class WeightAverage:
    """Exponential moving average of all parameters in fp32, without bias correction."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.params = decay, list(model.parameters())
        self.shadow = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.shadow, self.params, 1 - self.decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the average into the model."""
        torch._foreach_copy_(self.params, self.shadow)


# --- 6 optimizers -------------------------------------------------------------------------------------------
# Muon for matrices, AdamW for the rest, routed by one table that must cover every parameter exactly once.

PARAMETER_TABLE: dict[str, tuple[str, ...]] = {
    "muon": ("wq", "wk", "wv", "wo", "w_up", "w_down"),
    "embed": ("tok_emb",),
    "scalar": ("q_gain", "xsa_alpha", "attn_gate", "attn_scale", "mlp_scale", "resid_mix", "skip_weights",
               "skip_gates", "lane_post", "lane_resid", "smear_w", "smear_lambda"),
    "softcap": ("softcap_pos", "softcap_neg"),
}
POLAR_EXPRESS = ((8.156554524902461, -22.48329292557795, 15.878769915207462),
                 (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                 (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def route_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters per optimizer group; raises ValueError unless the table covers every one exactly once."""
    named = dict(model.named_parameters())
    listed = [name for names in PARAMETER_TABLE.values() for name in names]
    if sorted(listed) != sorted(named):
        missing, unknown = sorted(named.keys() - set(listed)), sorted(set(listed) - named.keys())
        repeated = sorted({name for name in listed if listed.count(name) > 1})
        raise ValueError(f"PARAMETER_TABLE must list every parameter exactly once; missing {missing}, "
                         f"unknown {unknown}, repeated {repeated}")
    return {group: [named[name] for name in names] for group, names in PARAMETER_TABLE.items()}


def polar_express(G: Tensor, steps: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Orthogonalize the matrices of the last two axes: singular values near one, vectors kept [PE]."""
    X = G.to(dtype)
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in POLAR_EXPRESS[:steps]:
        S = X @ X.mT
        X = a * X + (b * S + c * (S @ S)) @ X
    return X.mT if tall else X


class Muon:
    """Momentum, row normalization and orthogonalization of matrix banks, sharded over ranks [Muon].
    Parameters (L, rows, cols) of one matrix shape form a bank; its matrices are dealt to the ranks in equal
    shares (padded with zeros), so every rank keeps the momentum of its own share only. Gradients are reduced
    in fp32, updates gathered in the compute dtype."""

    def __init__(self, cfg: Config, run: Run, params: Sequence[nn.Parameter]) -> None:
        self.cfg, self.run = cfg, run
        shapes = dict.fromkeys(p.shape[-2:] for p in params)
        self.banks = [[p for p in params if p.shape[-2:] == shape] for shape in shapes]
        self.banks.sort(key=lambda bank: -sum(p.numel() for p in bank))    # the largest reduction goes first
        self.momentum_buffers: list[Tensor] = []          # one per bank, from the first step on

    def update_direction(self, grad: Tensor, buffer: Tensor, momentum: float) -> Tensor:
        """Advance `buffer` and return the orthogonal update of each matrix, in the compute dtype."""
        buffer.mul_(momentum).add_(grad)
        u = grad + momentum * buffer
        if self.cfg.muon_row_normalize:
            u = u / u.norm(dim=-1, keepdim=True).clamp_min(1e-7)
        return polar_express(u, self.cfg.muon_backend_steps, self.run.compute_dtype)

    @torch.no_grad()
    def step(self, grads: dict[nn.Parameter, Tensor], lr: float, momentum: float) -> None:
        """Apply one update from this rank's gradients; the average over ranks is taken here."""
        # 1. launch all reductions
        reductions = [_reduce_scatter_mean(self.run, torch.cat([grads[p] for p in bank]))
                      for bank in self.banks]
        if not self.momentum_buffers:
            self.momentum_buffers = [torch.zeros_like(shard) for shard, _ in reductions]
        gathers = []
        for (shard, wait), buffer in zip(reductions, self.momentum_buffers):    # 2. update the own share
            wait()
            gathers.append(_all_gather(self.run, self.update_direction(shard, buffer, momentum)))
        for bank, (update, wait) in zip(self.banks, gathers):         # 3. gather, and apply to every replica
            wait()
            lengths = [len(p) for p in bank]
            for p, part in zip(bank, update[:sum(lengths)].split(lengths)):
                rows, cols = p.shape[-2:]
                p.mul_(1 - lr * self.cfg.muon_wd)
                p.add_(part.to(p.dtype), alpha=-lr * math.sqrt(max(1.0, rows / cols)))


def _reduce_scatter_mean(run: Run, full: Tensor) -> tuple[Tensor, Callable[[], Any]]:
    """This rank's share of the mean over ranks of `full` (L, rows, cols); call the second before reading."""
    if run.world_size == 1:
        return full, lambda: None
    full = F.pad(full, (0, 0, 0, 0, 0, -len(full) % run.world_size)).div_(run.world_size)
    shards = full.chunk(run.world_size)
    if run.device.type == "cuda":
        shard = torch.empty_like(shards[0])
        return shard, dist.reduce_scatter_tensor(shard, full, async_op=True).wait
    run.sum(full)                                         # gloo has no reduce-scatter
    return shards[run.rank].clone(), lambda: None


def _all_gather(run: Run, shard: Tensor) -> tuple[Tensor, Callable[[], Any]]:
    """All ranks' shards in rank order, and a function to call before reading them."""
    if run.world_size == 1:
        return shard, lambda: None
    full = shard.new_empty(len(shard) * run.world_size, *shard.shape[1:])
    return full, dist.all_gather_into_tensor(full, shard.contiguous(), async_op=True).wait


class Optimizer:
    """One optimizer step: each row's gradient is clipped by itself, rows are averaged, Muon and AdamW run."""

    def __init__(self, cfg: Config, run: Run, model: GPT) -> None:
        self.cfg, self.run, self.model, self.unused = cfg, run, model, unused_parameters(cfg)
        # Frozen parameters (the caps, in tests of the reference's symmetric loss) do not count in the norm.
        groups = {group: [p for p in params if p.requires_grad]
                  for group, params in route_parameters(model).items()}
        self.params = [p for params in groups.values() for p in params]
        name_of = {p: name for name, p in model.named_parameters()}
        self.names = [name_of[p] for p in self.params]
        self.small = [p for group, params in groups.items() if group != "muon" for p in params]
        self.muon = Muon(cfg, run, groups["muon"])
        self.base_lr = {"embed": cfg.tied_embed_lr, "scalar": cfg.scalar_lr, "softcap": cfg.scalar_lr}
        weight_decay = {"embed": cfg.embed_wd, "scalar": cfg.adam_wd, "softcap": 0.0}
        self.adamw = torch.optim.AdamW(
            [{"params": groups[name], "name": name, "weight_decay": weight_decay[name]}
             for name in self.base_lr],
            betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)
        self.grad_sum = [torch.zeros_like(p) for p in self.params]     # of num_rows rows, clipped
        self.num_rows = 0

    def reset(self) -> None:
        """Forget all state, as if no step had been taken."""
        self.muon.momentum_buffers.clear()
        self.adamw.state.clear()
        self.clear()

    @torch.no_grad()
    def clear(self) -> None:
        """Forget the rows since the last step."""
        torch._foreach_zero_(self.grad_sum)
        self.num_rows = 0
        self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def add_row(self, grads: Mapping[str, Tensor]) -> Tensor:
        """Add the gradient of one row's mean loss, by parameter name, clipped to GRAD_CLIP_NORM. Returns its
        norm before clipping (0-d tensor). Raises ValueError for a parameter without gradient, unless the
        model's shape leaves it unused."""
        missing = sorted(set(self.names) - grads.keys() - self.unused)
        if missing:
            raise ValueError(f"expected a gradient of every trained parameter, found none of {missing}; the "
                             "loss does not depend on them: use them, remove them, or list them in "
                             "unused_parameters")
        row = []
        for name, p in zip(self.names, self.params):
            row.append(grads[name] if name in grads else torch.zeros_like(p))
        norm = torch.nn.utils.get_total_norm(row)
        limit = self.cfg.grad_clip_norm
        factor = torch.where(norm > limit, limit / (norm + 1e-6), torch.ones_like(norm))
        for total, grad in zip(self.grad_sum, row):
            total.addcmul_(grad, factor)                  # clipped and added in one pass
        self.num_rows += 1
        return norm

    @torch.no_grad()
    def step(self, step: int, lr_factor: float) -> None:
        """Average the rows of all ranks and update every parameter."""
        torch._foreach_div_(self.grad_sum, self.num_rows)
        grads = dict(zip(self.params, self.grad_sum))
        for p, total in zip(self.small, self.run.sum_all([grads[p] for p in self.small])):
            p.grad = total.div_(self.run.world_size)
        for group in self.adamw.param_groups:
            group["lr"] = self.base_lr[group["name"]] * lr_factor
        self.adamw.step()
        self.muon.step(grads, self.cfg.matrix_lr * lr_factor, muon_momentum(self.cfg, step))
        # A cap below one nat could not express a confident token.
        torch._foreach_clamp_min_([self.model.softcap_pos, self.model.softcap_neg], 1.0)
        self.clear()


# --- 7 training ---------------------------------------------------------------------------------------------
# Compile warm-up that leaves nothing behind, the step, and a wall-clock stop all ranks agree on.

class StepClock:
    """Rank 0's training clock. The host runs at most one step ahead of the GPU: reading it stalls nothing."""

    def __init__(self, run: Run) -> None:
        self.run, self.timer = run, Timer(run)
        self.ends = [0.0]                    # seconds at which training began and each finished step ended
        self.events: list[Any] = []          # CUDA events of steps not yet known to have ended

    def step_done(self) -> None:
        """Call after queueing a step; waits until the step before it has ended."""
        if self.run.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self.events.append(event)
            if len(self.events) < 2:
                return
            self.events.pop(0).synchronize()
        self.ends.append(time.perf_counter() - self.timer.start)

    def longest_recent(self) -> float:
        ends = self.ends[-9:]
        return max((b - a for a, b in zip(ends, ends[1:])), default=0.0)

    def now(self) -> float:
        """Seconds at which the next step can begin: the last known end plus the steps still queued."""
        before, last = self.ends[-2:][0], self.ends[-1]
        return last + len(self.events) * (last - before)


def plan_step(cfg: Config, step: int, clock_s: float, step_s: float,
              calibration_s: float) -> tuple[float, bool]:
    """(progress, stop?) before step `step` that begins at clock_s and may last step_s, then calibration."""
    if cfg.max_wallclock_seconds == 0:
        return step / cfg.iterations, False
    progress = clock_s / (cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds)
    return progress, progress >= 1 or clock_s + step_s + calibration_s > cfg.max_wallclock_seconds


class RowGradients:
    """What a rank does with a training row: its gradient goes, clipped, into the optimizer's sum and its mean
    loss into `loss` (0-d fp32), all at fixed addresses. With the block kernels and after `capture` it is one
    CUDA graph for each number of tokens, number of segments and state of the loops; a row of more segments
    than usual runs without, in memory of its own beside that of the graphs."""

    def __init__(self, cfg: Config, run: Run, model: GPT, optimizer: Optimizer) -> None:
        self.cfg, self.run, self.model, self.optimizer = cfg, run, model, optimizer
        self.loss = torch.zeros((), device=run.device)
        self.cast: Any = None
        self.replay: CapturedSteps | None = None
        # What graphs read: inputs and targets (row_tokens,) int64, cu_seqlens int32 by number of tokens.
        self.inputs, self.targets = (torch.zeros(0, dtype=torch.int64) for _ in range(2))
        self.bounds: dict[int, Tensor] = {}

    def begin(self) -> None:
        """Before the first row of a step: the weights have changed."""
        self.loss.zero_()
        self.cast = self.model.ops.cast(self.model, self.cast)

    def capture(self, states: Sequence[tuple[int, bool]]) -> None:
        """Make the graphs of rows, from random tokens; states: (parts of a row, looping?)."""
        cfg = self.cfg
        size, device = (cfg.row_tokens,), self.run.device
        self.inputs, self.targets = (torch.randint(2, cfg.vocab_size, size, device=device) for _ in range(2))
        keys, usual = [], min(GRAPH_TOKENS_PER_SEGMENT, max(cfg.train_seq_len // 2, 1))
        for length, looping in {(cfg.row_tokens // parts, looping) for parts, looping in states}:
            most = SEGMENT_PAD * max(length // usual // SEGMENT_PAD, 1)
            self.bounds[length] = torch.linspace(0, length, most, device=self.run.device).int()
            keys += [(length, segments, looping) for segments in range(SEGMENT_PAD, most + 1, SEGMENT_PAD)]
        keys.sort(key=lambda key: (key[2], key), reverse=True)
        loads = [key for key in keys if key[1] == len(self.bounds[key[0]])]
        self.begin()
        self.replay = CapturedSteps(self.run, self.add_loaded, keys, loads)
        self.optimizer.clear()                            # capturing has added rows

    def add_loaded(self, length: int, segments: int, looping: bool) -> None:
        """`add` of the row that lies in the buffers."""
        bounds = self.bounds[length][:segments]
        self.add(Row(self.inputs[:length], self.targets[:length], bounds), looping)

    def add(self, row: Row, looping: bool) -> None:
        """The gradient and the loss of a row, all of it on the run's device."""
        loss, grads = self.model.ops.row_gradients(self.model, row, looping=looping, cast=self.cast,
                                                   segment_cap=self.cfg.longest_segment)
        self.optimizer.add_row(grads)
        self.loss += loss

    def __call__(self, row: Row, looping: bool) -> None:
        """`add` of a loader's row, by a graph where there is one for it."""
        num_rows = self.optimizer.num_rows
        length, segments = len(row.inputs), len(row.cu_seqlens)
        if self.replay and (length, segments, looping) in self.replay.graphs:
            self.inputs[:length].copy_(row.inputs)
            self.targets[:length].copy_(row.targets)
            self.bounds[length][:segments].copy_(row.cu_seqlens, non_blocking=True)
            self.replay(length, segments, looping)
        else:
            if self.replay:
                self.replay.missed += 1
            cu_seqlens = row.cu_seqlens.to(self.run.device, non_blocking=True)
            self.add(row._replace(cu_seqlens=cu_seqlens), looping)
        self.optimizer.num_rows = num_rows + 1            # a graph does not count


def train_rows(work: RowGradients, rows: Iterator[Row], count: int, looping: bool) -> Tensor:
    """The gradients of this rank's next rows, into the optimizer's sum. Returns the sum of their losses."""
    work.begin()
    for _ in range(count):
        work.run.beat()
        work(next(rows), looping)
    return work.loss.clone()


ROW_PARTS = {1: "whole", 2: "half", 4: "quarter"}


def row_parts(cfg: Config, progress: float) -> int:
    """Of how many steps a row is."""
    return 4 if progress < cfg.quarter_rows_until else 2 if progress < cfg.half_rows_until else 1


def row_states(cfg: Config) -> list[tuple[int, bool]]:
    """(parts of a row, looping?) of every kind of step that training may come to, in order."""
    looping_at = cfg.enable_looping_at if cfg.num_loops else 1.0
    changes = sorted({0.0, cfg.quarter_rows_until, cfg.half_rows_until, looping_at} - {1.0})
    return list(dict.fromkeys((row_parts(cfg, at), at >= looping_at) for at in changes))


def estimate_calibration(cfg: Config, run: Run, data: Dataset, model: GPT) -> float:
    """Seconds that collecting the Hessians will take, with a margin of a fifth."""
    # Two batches, of which the second is timed: the first pays for workspaces and library start-up.
    for _ in range(2):
        timer = Timer(run)
        collect_hessians(cfg, run, model, data.train, num_batches=run.world_size)
        batch_s = timer.seconds()
    return 1.2 * batch_s * -(-cfg.gptq_calibration_batches // run.world_size)


def warm_up(cfg: Config, run: Run, data: Dataset, work: RowGradients) -> float:
    """Compile, capture and run every training graph, then put everything back. Returns seconds of
    calibration."""
    timer, calibration_s, states = Timer(run), 0.0, row_states(cfg)
    model, optimizer = work.model, work.optimizer
    before = WeightAverage(model, decay=1.0)              # never updated: a copy to go back to
    with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
        if run.device.type == "cuda" and cfg.cuda_graphs and model.ops.cast is not no_cast:    # the kernels
            work.capture(states)
        loader = make_loader(cfg, run, data)
        for parts, looping in states:
            name = f"{ROW_PARTS[parts]}_" * (parts > 1) + "loop_" * looping + "warmup_step"
            rows = split_rows(loader, 1, parts)
            for step in range(cfg.warmup_steps):
                train_rows(work, rows, 1, looping)
                optimizer.step(step, 1.0)
                if step < 3 or (step + 1) % 10 == 0 or step + 1 == cfg.warmup_steps:
                    run.log(f"{name}: {step + 1}/{cfg.warmup_steps}")
        loader.close()
        if cfg.max_wallclock_seconds and not cfg.prequant_only:
            calibration_s = estimate_calibration(cfg, run, data, model)
    before.apply()
    optimizer.reset()
    if work.replay:
        work.replay.missed = 0
    run.log(f"warmup elapsed_s:{timer.seconds():.1f} calibration_estimate_s:{calibration_s:.1f}")
    return calibration_s


def make_loader(cfg: Config, run: Run, data: Dataset) -> PackingLoader:
    return PackingLoader(data.train, cfg.row_tokens, cfg.train_seq_len, run.rank, run.world_size, run.device,
                         run.log)


def is_logged(cfg: Config, done: int) -> bool:
    """Whether step `done`, counted from 1, gets a line: the first 5, tenths to 100, fiftieths, ITERATIONS."""
    return done <= 5 or done % (10 if done <= 100 else 50) == 0 or done == cfg.iterations


def log_step(cfg: Config, run: Run, clock: StepClock, done: int, tokens: int, losses: Tensor) -> None:
    """One line about step `done`, `tokens` into the run. losses (2,): this rank's sums of the rows' mean
    losses, of this step and of all; raises RunError unless both are finite."""
    mean_loss, every_loss = (run.sum(losses) / ROWS_PER_STEP).tolist()        # waits for the step's end
    elapsed_s = time.perf_counter() - clock.timer.start
    run.log(f"{done}/{cfg.iterations} train_loss: {mean_loss:.4f} train_time: {elapsed_s / 60:.1f}m "
            f"tok/s: {tokens / elapsed_s:.0f} train_time_ms:{1000 * elapsed_s:.0f}")
    require_finite(run, f"train_loss up to step {done}", every_loss)
    run.last_good = f"train_loss {mean_loss:.4f} at step {done}"


class Mark(NamedTuple):
    """A point of the training run."""
    steps: int
    tokens: int
    seconds: float


def log_speed(run: Run, loop_on: Mark | None, end: Mark, replay: CapturedSteps | None) -> None:
    """Speed before and after looping began, rows without a graph, and the peak of GPU memory."""
    speeds = ""
    switch = loop_on or end
    for name, since, until in (("loops_off", Mark(0, 0, 0.0), switch), ("loops_on", switch, end)):
        count, seconds = until.steps - since.steps, until.seconds - since.seconds
        if count and seconds > 0:                # looping began at an estimated time, which may be off
            speeds += (f"{name}_tok_per_s:{(until.tokens - since.tokens) / seconds:.0f} "
                       f"{name}_step_ms:{1000 * seconds / count:.1f} ")
    graphs = f"graphs:{replay.captures} rows_without_graph:{replay.missed} " if replay else ""
    run.log(f"train speed {speeds}{graphs}steps:{end.steps}")
    if run.device.type == "cuda":
        run.log(f"peak memory allocated: {torch.cuda.max_memory_allocated(run.device) >> 20} MiB "
                f"reserved: {torch.cuda.max_memory_reserved(run.device) >> 20} MiB")


def train(cfg: Config, run: Run, data: Dataset, model: GPT) -> float:
    """Train to the end of the budget or ITERATIONS; the model keeps the average. Returns seconds."""
    optimizer = Optimizer(cfg, run, model)
    if cfg.max_wallclock_seconds:
        run.log(f"gptq:reserving {cfg.gptq_reserve_seconds:g}s, effective="
                f"{1000 * (cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds):.0f}ms")
    run.stage("compilation", START_LIMIT_S)
    work = RowGradients(cfg, run, model, optimizer)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)    # a graph's memory is counted where it is captured
    calibration_s = warm_up(cfg, run, data, work)
    average = WeightAverage(model, cfg.ema_decay)
    loader = make_loader(cfg, run, data)
    rows_per_rank = ROWS_PER_STEP // run.world_size
    rows, parts, tokens = loader, 1, 0
    loop_on: Mark | None = None
    run.barrier("training")
    run.stage("training")
    clock, loss_sum = StepClock(run), torch.zeros((), device=run.device)
    for step in range(cfg.iterations):
        progress, stop = run.agree(plan_step(cfg, step, clock.now(), clock.longest_recent(), calibration_s))
        if stop:
            break
        now = row_parts(cfg, progress)
        if now < parts or step == 0 and now != parts:     # never back, should the clock's estimate fall
            parts, rows = now, split_rows(loader, rows_per_rank, now)
            run.log(f"rows:{ROW_PARTS[parts]} step:{step} frac:{progress:.3f}")
        if loop_on is None and cfg.num_loops and progress >= cfg.enable_looping_at:
            loop_on = Mark(step, tokens, clock.now())
            encoder, decoder = execution_order(cfg, True)
            run.log(f"layer_loop:enabled step:{step} frac:{progress:.3f} encoder:{encoder} decoder:{decoder}")
        if progress > 0:
            left_s = clock.now() * (1 / progress - 1)
            run.progress(f"step {step}/{cfg.iterations}, {run.last_good}, {left_s:.0f} s left")

        # The step: gradients of all rows, Muon and AdamW, the average.
        loss = train_rows(work, rows, rows_per_rank, looping=loop_on is not None)
        loss_sum += loss                                  # NaN and infinity stay: no step goes unchecked
        optimizer.step(step, lr_factor(cfg, progress) * parts ** -0.5)
        average.update()
        tokens += cfg.train_batch_tokens // parts

        clock.step_done()
        if is_logged(cfg, step + 1):
            log_step(cfg, run, clock, step + 1, tokens, torch.stack([loss, loss_sum]))
    steps = step if stop else cfg.iterations
    if not steps:
        raise ConfigError(f"MAX_WALLCLOCK_SECONDS={cfg.max_wallclock_seconds:g} leaves no time for a step "
                          f"beside {calibration_s:.1f} s of calibration; raise it or lower "
                          "GPTQ_CALIBRATION_BATCHES")
    train_s = clock.timer.seconds()
    loader.close()
    require_finite(run, f"train_loss up to step {steps}", run.sum(loss_sum).item())
    if cfg.num_loops and loop_on is None:
        run.log('train warning:"looping never began, yet evaluation loops; train longer, lower '
                f'ENABLE_LOOPING_AT, or set NUM_LOOPS=0" enable_looping_at:{cfg.enable_looping_at:g}')
    if stop:
        run.log(f"stopping_early: wallclock_cap train_time: {1000 * train_s:.0f}ms "
                f"step: {steps}/{cfg.iterations}")
    log_speed(run, loop_on, Mark(steps, tokens, train_s), work.replay)
    work.replay = None                                    # gives the graphs' memory back
    run.log("ema:applying EMA weights")
    average.apply()
    require_finite(run, f"the averaged weights after step {steps}", *model.parameters())
    return train_s


# --- 8 quantization -----------------------------------------------------------------------------------------
# Calibration statistics, GPTQ, protected column groups, low-rank correction: fp32 matrices to int8 codes.

class TensorGroup(NamedTuple):
    """How one parameter is quantized and stored."""
    bits: str                # name of the setting that holds them, as for clip_sigmas
    clip_sigmas: str
    tap: str                 # the model's name of the matrices' input, whose statistics weigh rounding errors
    coding_turn: int         # streams are coded in this order, so the longest jobs come first
    halved_axis: int | None = None     # of the codes (matrices, rows, cols): two streams, balanced threads
    is_bank: bool = True     # one matrix per layer, not a single one
    regress: bool = False    # the coder predicts codes from those to their left, where they are correlated

    def members(self, cfg: Config) -> int:
        return cfg.num_layers if self.is_bank else 1


# Every quantized parameter, and all that tells one from another: quantization, encoding and decoding read it.
TENSOR_GROUPS = {
    "tok_emb": TensorGroup("embed_bits", "embed_clip_sigmas", "head", 0, halved_axis=1, is_bank=False,
                           regress=True),
    "wq": TensorGroup("matrix_bits", "attn_clip_sigmas", "qkv", 3),
    "wk": TensorGroup("matrix_bits", "attn_clip_sigmas", "qkv", 5),
    "wv": TensorGroup("matrix_bits", "attn_clip_sigmas", "qkv", 6),
    "wo": TensorGroup("matrix_bits", "attn_clip_sigmas", "o", 4),
    "w_up": TensorGroup("matrix_bits", "mlp_clip_sigmas", "up", 1, halved_axis=0),
    "w_down": TensorGroup("matrix_bits", "mlp_clip_sigmas", "down", 2, halved_axis=0),
}


class MatrixId(NamedTuple):
    """One matrix of a group: "wq.0" (layer 0 of group "wq", input "qkv.0") or "tok_emb" (input "head")."""
    name: str
    group: str
    layer: int
    tap: str


def list_matrices(cfg: Config, groups: Sequence[str] | None = None) -> list[MatrixId]:
    """Every quantized matrix of these groups, all when None, group by group and layer by layer."""
    found = []
    for group in TENSOR_GROUPS if groups is None else groups:
        spec = TENSOR_GROUPS[group]
        for layer in range(spec.members(cfg)):
            suffix = f".{layer}" if spec.is_bank else ""
            found.append(MatrixId(group + suffix, group, layer, spec.tap + suffix))
    return found


GPTQ_DAMP, GPTQ_BLOCK = 0.01, 128
SCALE_FLOOR = 1e-10          # keeps a constant row from dividing by zero


class Matrix(NamedTuple):
    """One matrix to quantize: W (rows, cols), H (cols, cols), act_rms (cols,), fp32.
    grad_sq is the mean squared gradient of W."""
    W: Tensor
    H: Tensor
    act_rms: Tensor
    bits: int
    clip_sigmas: float
    grad_sq: float = 0.0


class Factors(NamedTuple):
    """Packed low-rank correction: A = qA*sA (rows, r), B = qB*sB (r, cols); int8 codes, fp16 scales.

    Asymmetric packing: sA is 0-d, sB holds one scale per lqer_asym_group elements of B in row-major order.
    Symmetric packing: one scale per row of A and of B.
    """
    qA: Tensor
    sA: Tensor
    qB: Tensor
    sB: Tensor


class Quantized(NamedTuple):
    """codes (rows, cols) int8, scale (rows,) fp16.
    Columns [start, start + group_size) of each protected start use scale_high (rows,) fp16 instead."""
    codes: Tensor
    scale: Tensor
    protect_starts: tuple[int, ...] = ()
    group_size: int = 0
    scale_high: Tensor | None = None
    factors: Factors | None = None


def code_limit(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def row_scale(W: Tensor, clip_sigmas: float, max_code: int) -> Tensor:
    """fp16 step of each row: clip_sigmas standard deviations (unbiased) spread over max_code codes."""
    return (clip_sigmas * W.std(-1) / max_code).clamp_min(SCALE_FLOOR).half()


# Trellis rounding [TCQ]: codes count half steps. From row to row of a column a state machine says whether the
# code is even or odd, so that a code costs no more bits than one of whole steps, while the choice of path
# reaches points almost as dense as half steps: about a quarter less squared error for the same bits. The
# machine is Ungerboeck's of 64 states; a code has the parity of its state.
TRELLIS_STATES = 64
TRELLIS_ROWS = 256           # the machine starts anew, in state 0, every TRELLIS_ROWS rows of a matrix


def next_state(state: Tensor, bit: Tensor | int) -> Tensor:
    """The trellis' state after a code whose second-lowest bit, code >> 1 & 1, is `bit`."""
    return state >> 1 ^ 33 * (state & 1) ^ 10 * bit


def plain_trellis_round(x: Tensor, limit: Tensor) -> Tensor:
    """The valid codes of each line with the least Σ (x - code)² [Viterbi]; defines trellis_round.
    x (lines, n) fp32 in half steps, limit (lines,) fp32 largest magnitude. Returns fp32 codes (lines, n)."""
    residue = torch.arange(4, device=x.device)
    low = ((-limit[:, None] - residue) / 4).ceil()
    high = ((limit[:, None] - residue) / 4).floor()
    # (lines, n, 4): the nearest code of each residue modulo 4
    points = 4 * ((x[..., None] - residue) / 4 + 0.5).floor().clamp(low[:, None], high[:, None]) + residue
    errors = (x[..., None] - points).square()
    state = torch.arange(TRELLIS_STATES, device=x.device)
    # (2, states): for each bit the one state that leads to a state, and the residue of the code that does
    sources = torch.stack([next_state(state, bit).argsort() for bit in (0, 1)])
    residues = (sources & 1) + torch.tensor([[0], [2]], device=x.device)
    cost = torch.where(state == 0, 0.0, 1e30).expand(len(x), -1)
    took = []
    for i in range(x.shape[1]):
        cost_0, cost_1 = (cost[:, sources[bit]] + errors[:, i, residues[bit]] for bit in (0, 1))
        took.append((cost_1 < cost_0).long())
        cost = torch.minimum(cost_0, cost_1)
    codes = torch.empty_like(x)
    line = torch.arange(len(x), device=x.device)
    at = cost.argmin(-1)
    for i in reversed(range(x.shape[1])):
        bit = took[i][line, at]
        codes[:, i] = points[line, i, residues[bit, at]]
        at = sources[bit, at]
    return codes


def round_column(x: Tensor, limit: Tensor, trellis: bool) -> Tensor:
    """Codes of one column in M matrices, x (M, rows) in steps (half steps for the trellis), limit (M, 1)."""
    if not trellis:
        return x.round().clamp(-limit, limit)
    rows = x.shape[1]
    # Clamped, for a weight out of reach must not swamp the path's cost.
    lines = F.pad(x.clamp(-limit, limit), (0, -rows % TRELLIS_ROWS)).view(-1, TRELLIS_ROWS)
    codes = trellis_round(lines, limit.repeat_interleave(len(lines) // len(x), 0)[:, 0])
    return codes.view(len(x), -1)[:, :rows]


def gptq(W: Tensor, H: Tensor, scale: Tensor, max_code: int, high: Tensor | None = None,
         scale_high: Tensor | None = None, max_high: int = 0, trellis: bool = False) -> Tensor:
    """Round W to integer codes column by column, pushing each error onto later columns [GPTQ, alg. 1].

    W      (M, rows, cols) fp32, M matrices of one shape, left unchanged.
    H      (M, cols, cols) fp32 mean of x xᵀ over calibration tokens; dead inputs (zero diagonal) are allowed.
    scale  (M, rows) step per row; codes lie in [-max_code, max_code].
    high   (cols,) bool: columns that use scale_high (M, rows) and max_high instead.
    trellis  codes of trellis_round; scales and limits are then in half steps.
    Returns int8 codes (M, rows, cols). Raises ValueError when shapes disagree or the damped H is not positive
    definite.
    """
    M, rows, cols = W.shape
    if H.shape != (M, cols, cols) or scale.shape != (M, rows):
        raise ValueError(f"gptq: for W {tuple(W.shape)} expected H {(M, cols, cols)} and scale {(M, rows)}, "
                         f"found {tuple(H.shape)} and {tuple(scale.shape)}")
    H = H.double()                                    # fp64 factors: an fp32 inverse loses the small columns
    diag = H.diagonal(dim1=-2, dim2=-1).clone()
    dead = diag == 0
    diag = torch.where(dead, 1.0, diag)
    diag = diag + GPTQ_DAMP * diag.mean(-1, keepdim=True)
    H = H.diagonal_scatter(diag, dim1=-2, dim2=-1)
    order = diag.sort(dim=-1, descending=True, stable=True).indices
    H = H.gather(1, order[:, :, None].expand_as(H)).gather(2, order[:, None, :].expand_as(H))
    factor, info = torch.linalg.cholesky_ex(H)
    if info.any():
        raise ValueError("gptq: the damped Hessian is not positive definite; the calibration activations are "
                         "not finite or the batches are too few")
    U = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).float()
    # Column-major copies (M, cols, rows) in this order: every step below touches whole columns.
    columns = order[:, :, None].expand(M, cols, rows)
    work = W.masked_fill(dead[:, None], 0.0).mT.gather(1, columns)
    codes = torch.empty_like(work)
    steps = scale.float()[:, None].expand(M, cols, rows)
    limits = torch.full((cols,), float(max_code), device=W.device)
    if high is not None:
        steps = torch.where(high[:, None], scale_high.float()[:, None], steps)
        limits = torch.where(high, float(max_high), limits)
    steps, limits = steps.gather(1, columns), limits[order]
    for start in range(0, cols, GPTQ_BLOCK):
        end = min(start + GPTQ_BLOCK, cols)
        block = work[:, start:end].clone()
        errors = torch.empty_like(block)
        for j in range(end - start):
            step, limit = steps[:, start + j], limits[:, start + j, None]
            q = round_column(block[:, j] / step.clamp_min(SCALE_FLOOR), limit, trellis)
            codes[:, start + j] = q
            errors[:, j] = (block[:, j] - q * step) / U[:, start + j, start + j, None]
            block[:, j:] -= U[:, start + j, start + j:end, None] * errors[:, j, None]
        work[:, end:] -= U[:, start:end, end:].mT @ errors
    return torch.empty_like(codes).scatter_(1, columns, codes).mT.to(torch.int8).contiguous()


STEP_FACTORS = 0.3, 2.0      # coarser steps save fewer bits than they promise; README, negative results


def balance_steps(matrices: Mapping[str, Matrix], share: float) -> dict[str, Matrix]:
    """Scale each matrix's clip sigmas so that a bit buys the same loss everywhere.

    To second order an error e of a weight costs e² times its squared gradient noise, and a bit per weight
    always quarters e²; so the sum is least where grad_sq * step² is equal. `share` 1 goes all the way there,
    0 stays; the total of bits stays about the same.
    """
    steps = [row_scale(m.W, m.clip_sigmas, code_limit(m.bits)).float() for m in matrices.values()]
    cost = np.array([m.grad_sq * float(step.square().mean()) for m, step in zip(matrices.values(), steps)])
    if not np.isfinite(cost).all():
        raise ValueError("balance_steps: calibration gradients are not finite; the run has diverged, lower "
                         "MATRIX_LR")
    log_cost = np.log(cost.clip(1e-300))
    has_gradient = cost > 0                           # a matrix without gradient keeps its steps
    counts = np.array([m.W.numel() for m in matrices.values()])
    weights = np.where(has_gradient, counts, 0) + 1e-9            # an average needs one that is not zero
    mean = np.average(log_cost, weights=weights)
    factors = np.where(has_gradient, np.exp(share * (mean - log_cost) / 2).clip(*STEP_FACTORS), 1.0)
    return {name: m._replace(clip_sigmas=m.clip_sigmas * factor)
            for (name, m), factor in zip(matrices.items(), factors.tolist())}


def select_protected(matrices: Mapping[str, Matrix], group_size: int, top_k: int,
                     bits: int) -> dict[str, list[int]]:
    """Start columns of the top_k most salient groups among all matrices with fewer than `bits` bits [AWQ].

    score(group) = Σ over its columns of act_rms · mean |W|; the earlier one wins a tie; partial groups do not
    compete.
    """
    scored = []
    for name, m in matrices.items():
        if m.bits < bits:
            salience = m.act_rms * m.W.abs().mean(0)
            whole = len(salience) // group_size * group_size
            for group, score in enumerate(salience[:whole].view(-1, group_size).sum(-1).tolist()):
                scored.append((score, name, group * group_size))
    chosen: dict[str, list[int]] = {}
    for _, name, start in sorted(scored, key=lambda item: -item[0])[:top_k]:
        chosen.setdefault(name, []).append(start)
    return {name: sorted(starts) for name, starts in chosen.items()}


def top_components(E: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A = U S (rows, rank) and B = Vᵀ (rank, cols) of the largest singular values of E."""
    # Through the fp64 Gram matrix of the shorter side: only a few components of a long matrix are wanted.
    E64 = E.double()
    tall = E.shape[0] >= E.shape[1]
    vectors = torch.linalg.eigh(E64.mT @ E64 if tall else E64 @ E64.mT).eigenvectors[:, -rank:].flip(-1)
    if tall:
        return (E64 @ vectors).float(), vectors.mT.float().contiguous()
    B = vectors.mT @ E64
    norm = B.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return (vectors * norm.mT).float(), (B / norm).float()


def pack_factors(A: Tensor, B: Tensor, group: int, asymmetric: bool = True) -> Factors:
    """Pack A in 2 bits and B in 4 bits with grouped scales; in 4 bits per row where groups do not fit."""
    def pack(x: Tensor, peak: Tensor, half_range: float) -> tuple[Tensor, Tensor]:     # 1.5: codes -2 ... 1
        scale = (peak.clamp_min(SCALE_FLOOR) / half_range).half()
        codes = (x / scale.float().clamp_min(SCALE_FLOOR)).round()
        return codes.clamp(math.ceil(-half_range - 0.5), math.floor(half_range)).to(torch.int8), scale

    if asymmetric and B.numel() % group == 0:
        qA, sA = pack(A, A.abs().max(), 1.5)
        grouped = B.reshape(-1, group)
        qB, sB = pack(grouped, grouped.abs().amax(-1, keepdim=True), 7.5)
    else:
        (qA, sA), (qB, sB) = (pack(x, x.abs().amax(-1, keepdim=True), 7) for x in (A, B))
    return Factors(qA, sA.squeeze(-1) if sA.ndim else sA, qB.view_as(B), sB.squeeze(-1))


def correction(f: Factors) -> Tensor:
    """The fp32 matrix (rows, cols) that packed factors stand for."""
    if f.sA.ndim == 0:
        B = (f.qB.float().view(len(f.sB), -1) * f.sB.float()[:, None]).view(f.qB.shape)
        return (f.qA.float() * f.sA.float()) @ B
    return (f.qA.float() * f.sA.float()[:, None]) @ (f.qB.float() * f.sB.float()[:, None])


def dequantize(q: Quantized) -> Tensor:
    """The fp32 matrix (rows, cols) that will be used: codes times steps, protected columns, correction."""
    W = q.codes.float() * q.scale.float()[:, None]
    for start in q.protect_starts:
        columns = slice(start, start + q.group_size)
        W[:, columns] = q.codes[:, columns].float() * q.scale_high.float()[:, None]
    return W if q.factors is None else W + correction(q.factors)


def quantize_matrices(cfg: Config, run: Run, matrices: Mapping[str, Matrix]) -> dict[str, Quantized]:
    """Quantize matrices: protect groups, round with GPTQ, correct the worst; the same result on every rank.
    Matrices of one shape are rounded together. Ranks take the shapes in turn and exchange the codes."""
    trellis, group_size = cfg.rdo_lambda > 0, cfg.awq_lite_group_size
    if trellis:
        matrices = balance_steps(matrices, cfg.rdo_lambda)
    top_k = cfg.awq_lite_group_top_k if cfg.awq_lite_enabled else 0
    protected = select_protected(matrices, group_size, top_k, cfg.awq_lite_bits)
    batches: dict[tuple, list[str]] = {}
    for name, m in matrices.items():
        batches.setdefault((m.W.shape, m.bits, tuple(protected.get(name, ()))), []).append(name)

    def row_steps(m: Matrix, bits: int, columns: Tensor | slice) -> Tensor:
        """row_scale; for the trellis half of it, but not so fine that int8 fails to reach these columns."""
        if not trellis:
            return row_scale(m.W, m.clip_sigmas, code_limit(bits))
        finest = (m.W[:, columns].abs().amax(-1) / 127).half()
        return torch.maximum(row_scale(m.W, m.clip_sigmas, 2 * code_limit(bits)), finest)

    done: dict[str, Quantized] = {}
    rounded = []
    for index, (((rows, cols), bits, starts), names) in enumerate(batches.items()):
        batch = [matrices[name] for name in names]
        device = batch[0].W.device
        scales = torch.stack([row_steps(m, bits, slice(None)) for m in batch])
        high = highs = None
        if starts:
            high = torch.zeros(cols, dtype=torch.bool, device=device)
            for start in starts:
                high[start:start + group_size] = True
            highs = torch.stack([row_steps(m, cfg.awq_lite_bits, high) for m in batch])
        # The trellis' steps are balanced: only int8 is a limit.
        limit, limit_high = (127 if trellis else code_limit(n) for n in (bits, cfg.awq_lite_bits))
        codes = torch.empty(len(batch), rows, cols, dtype=torch.int8, device=device)
        if index % run.world_size == run.rank:
            W, H = torch.stack([m.W for m in batch]), torch.stack([m.H for m in batch])
            codes.copy_(gptq(W, H, scales, limit, high, highs, limit_high, trellis))
        rounded.append(codes)
        for k, name in enumerate(names):
            protection = (starts, group_size, highs[k]) if starts else ()
            done[name] = Quantized(codes[k], scales[k], *protection)
    for index, codes in enumerate(rounded):
        run.broadcast(codes, index % run.world_size)
    if cfg.lqer_enabled:
        done |= correct_worst(cfg, matrices, done)
    return {name: done[name] for name in matrices}


def correct_worst(cfg: Config, matrices: Mapping[str, Matrix],
                  done: Mapping[str, Quantized]) -> dict[str, Quantized]:
    """The lqer_top_k matrices with the largest quantization errors, each with a correction [LQER]."""
    residuals = {name: m.W - dequantize(done[name]) for name, m in matrices.items()}
    corrected = {}
    for name in sorted(residuals, key=lambda name: -residuals[name].norm().item())[:cfg.lqer_top_k]:
        A, B = top_components(residuals[name], cfg.lqer_rank)
        corrected[name] = done[name]._replace(
            factors=pack_factors(A, B, cfg.lqer_asym_group, cfg.lqer_asym_enabled))
    return corrected


class Calibration(NamedTuple):
    """Σ x xᵀ per tapped input, fp32 (cols, cols), and the number of x; Σ squared_gradients if RDO_LAMBDA."""
    sums: dict[str, Tensor]
    counts: dict[str, int]
    num_batches: int
    grad_sq: dict[str, Tensor] = {}


GRADIENT_SEQS = 4            # sequences of each calibration batch whose gradient is taken, in one pass


@torch.enable_grad()
def squared_gradients(model: GPT, tokens_BT: Tensor) -> dict[str, Tensor]:
    """Mean squared gradient per matrix of each group, (L,) or (1,).
    Over few tokens a gradient is all noise, and the variance of that is the curvature."""
    hidden = model(tokens_BT[:, :-1], looping=True, ops=model.ops.plain()).flatten(0, 1)
    targets = tokens_BT[:, 1:].flatten()
    loss = softcap_loss(hidden, model.tok_emb, model.softcap_pos, model.softcap_neg, targets)
    grads = torch.autograd.grad(loss, [getattr(model, group) for group in TENSOR_GROUPS])
    means = {}
    for (group, spec), grad in zip(TENSOR_GROUPS.items(), grads):
        squares = grad.square()
        means[group] = squares.flatten(1).mean(1) if spec.is_bank else squares.mean().view(1)
    return means


@torch.no_grad()
def collect_hessians(cfg: Config, run: Run, model: GPT, paths: Sequence[Path],
                     num_batches: int) -> Calibration:
    """Input statistics of every quantized matrix over the first `num_batches` calibration batches.
    Looping is on; each execution of a looped layer counts. Rank r runs the batches r, R + r, ..."""
    # All keys from the start: with fewer batches than ranks some add nothing, but take part in the sums.
    widths = {m.tap: getattr(model, m.group).shape[-1] for m in list_matrices(cfg)}
    sums = {key: torch.zeros(width, width, device=run.device) for key, width in widths.items()}
    counts = dict.fromkeys(widths, 0)
    grad_sq = {}
    if cfg.rdo_lambda:
        grad_sq = {group: torch.zeros(spec.members(cfg), device=run.device)
                   for group, spec in TENSOR_GROUPS.items()}

    def add(key: str, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        sums[key] += torch.mm(x.T, x, out_dtype=torch.float32) if x.is_cuda else x.T @ x
        counts[key] += len(x)

    batches = calibration_batches(paths, cfg.train_seq_len, cfg.row_tokens // cfg.train_seq_len)
    for index, batch in zip(range(num_batches), batches):
        run.beat()
        if index % run.world_size == run.rank:
            tokens = torch.from_numpy(batch).to(run.device)
            hidden = model(tokens[:, :-1].contiguous(), looping=True, ops=model.ops.plain(),
                           tap=lambda layer, kind, x: add(f"{kind}.{layer}", x))
            add("head", hidden)
            for name, value in squared_gradients(model, tokens[:GRADIENT_SEQS]).items() if grad_sq else ():
                grad_sq[name] += value
    if run.world_size > 1:
        for total in (*sums.values(), *grad_sq.values()):
            run.sum(total)
        counts = dict(zip(counts, run.sum(torch.tensor(list(counts.values()), device=run.device)).tolist()))
    return Calibration(sums, counts, num_batches, grad_sq)


def quantize(cfg: Config, run: Run, model: GPT, stats: Calibration,
             sigma_factor: float = 1.0) -> tuple[dict[str, Quantized], dict[str, Tensor]]:
    """(quantized matrices by name "wq.0" ... "tok_emb", pass-through parameters as fp16).
    sigma_factor scales all clip sigmas: larger steps, fewer bytes."""
    timer = Timer(run)
    passed = pass_through(model)
    matrices: dict[str, Matrix] = {}
    for m in list_matrices(cfg):
        spec, total = TENSOR_GROUPS[m.group], stats.sums[m.tap]
        weights = getattr(model, m.group).detach()
        matrices[m.name] = Matrix(
            W=weights[m.layer] if spec.is_bank else weights,
            H=total / stats.num_batches,
            act_rms=(total.diagonal() / stats.counts[m.tap]).sqrt(),
            bits=getattr(cfg, spec.bits),
            clip_sigmas=getattr(cfg, spec.clip_sigmas) * sigma_factor,
            grad_sq=float(stats.grad_sq[m.group][m.layer]) if stats.grad_sq else 0.0)
    quantized = quantize_matrices(cfg, run, matrices)
    for name, q in quantized.items():
        if q.protect_starts or q.factors is not None:
            run.log(f"quantize matrix:{name} protected_columns:{list(q.protect_starts)} "
                    f"lqer_rank:{0 if q.factors is None else q.factors.qB.shape[0]}")
    run.log(f"quantize matrices:{len(matrices)} elapsed_s:{timer.seconds():.1f}")
    return quantized, passed


def pass_through(model: GPT) -> dict[str, Tensor]:
    """Every parameter that is not quantized, as fp16; raises ArtifactError when a value does not fit that."""
    passed = {}
    for name, p in model.named_parameters():
        if name not in TENSOR_GROUPS:
            passed[name] = p.detach().half()
            lost = p.detach()[~passed[name].isfinite()]
            if len(lost):
                raise ArtifactError(f"{name} is stored as fp16: expected magnitudes below 65,520, found "
                                    f"{lost[0]:g}; the run has diverged (lower SCALAR_LR), or the model must "
                                    "scale it down")
    return passed


@torch.no_grad()
def sort_hidden_units(model: GPT) -> None:
    """Order each layer's MLP units by the deviation of their w_up row: same function, row scales nearly free.

    ValueError for weights that are not finite, and where sorting w_up and w_down alone would change the
    function: their shapes disagree, or another parameter of the layers has an axis as long as the hidden one
    (told by its length, where no side of an attention matrix has that too).
    """
    named = dict(model.named_parameters())
    up, down = named.pop("w_up"), named.pop("w_down")
    num_layers, units, width = up.shape
    if down.shape != (num_layers, width, units):
        raise ValueError(f"sort_hidden_units: for w_up {tuple(up.shape)} expected w_down "
                         f"{(num_layers, width, units)}, found {tuple(down.shape)}")
    other_sides = {side for name in ("wq", "wk", "wv", "wo") for side in named[name].shape[1:]}
    per_unit = [name for name, p in named.items() if p.shape[:1] == (num_layers,) and units in p.shape[1:]]
    if per_unit and units not in other_sides:
        raise ValueError("sort_hidden_units: expected hidden units in w_up and w_down only, found "
                         f"{per_unit} with an axis of {units} too; sort them along")
    for name, bank in (("w_up", up), ("w_down", down)):
        if not bank.isfinite().all():
            raise ValueError(f"sort_hidden_units: expected finite weights, found others in {name}; the run "
                             "has diverged, lower MATRIX_LR")
    for layer in range(num_layers):
        order = up[layer].std(-1).argsort(stable=True)
        up[layer] = up[layer, order]
        down[layer] = down[layer][:, order]


# --- 9 weight coder -----------------------------------------------------------------------------------------
# Codes and scales to bytes and back: streams and their checks. The C that does it is in section 18.

# The coder of codes and scales is context mixing [lpaq]. A symbol is a few binary decisions (zero? sign?
# magnitude above 1? above 2? ...). For each, four adaptive counters chosen by different views of the past
# vote, a logistic mixer weighs the votes, and a binary arithmetic coder spends -log2 p bits. Weights are
# close to Gaussian and rows have nearly equal energy (their step is proportional to their deviation), so the
# views are estimates of the local variance: of the column, of the row so far, and of what is left of its
# energy. With `regress` (the embedding needs it) code j of a row is predicted from codes 0..j-1 by a ridge
# regression that both sides refit from the rows already coded, plus a share of the regression error of up to
# two earlier rows that the encoder names. All arithmetic that the decoder repeats is integer.
NODES = 32                  # decisions of one symbol: zero?, negative?, then magnitude >= 2, >= 3, ...
LEVELS = 128                # steps of the variance axis, 8 per octave, from 1/16 upwards
MAX_REGRESSED = 512, 65536  # columns, rows: keeps the 32- and 64-bit sums of the regression exact


@functools.cache
def _tables() -> tuple[np.ndarray, ...]:
    """squash (logit/256 -> p/65536), stretch (its inverse), counter rates, Gaussian counters; integers."""
    power = [1 << 40]                                       # e**(k/256)
    for _ in range(2047):
        power.append(power[-1] * 4311777323 >> 32)
    upper = [min((p << 16) // ((1 << 40) + p), 65520) for p in power]
    squash = np.array([16] + [65536 - p for p in upper[:0:-1]] + upper, np.int32)
    stretch = (np.searchsorted(squash, np.arange(4096) * 16 + 8).clip(1, 4095) - 2048).astype(np.int32)
    rate = np.array([131072 // (2 * age + 3) for age in range(1024)], np.int32)
    prior = []
    for step in range(LEVELS):
        variance = (2 * (8 + step % 8) + 1) << step // 8   # middle of the step, 1/256 code**2
        ratio = max((1 << 32) - (1 << 29) // variance, 0)   # exp(-1 / 2 variance) as (1 - z/1024)**1024
        for _ in range(10):
            ratio = ratio * ratio >> 32
        density = [1 << 32]
        factor = ratio
        for _ in range(255):
            density.append(density[-1] * factor >> 32)
            factor = factor * (ratio * ratio >> 32) >> 32
        tail = [sum(density[k:]) for k in range(NODES)]
        p = [(density[0] << 22) // (density[0] + 2 * tail[1]), 1 << 21]
        p += [(tail[k] << 22) // max(tail[k - 1], 1) for k in range(2, NODES)]
        trust = 30                                          # age that the counters begin with
        prior += [min(max(q, 1 << 14), (1 << 22) - (1 << 14)) << 10 | trust for q in p]
    return squash, stretch, rate, np.array(prior, np.uint32)


STREAM_HEADER = struct.Struct("<4s2B3I")      # magic, kind, option, then matrices, rows, columns
STREAM_MAGIC = b"CMX1"
CODES, WORDS = 0, 1                    # kinds of streams
REGRESS, TRELLIS = 1, 2                # options of a stream of codes; that of words is 1 for differences
MAX_SYMBOLS = 1 << 27                  # a header may not ask for more, nor for more than its payload can hold


def _run_coder(routine: str, buffer: np.ndarray, decode: bool, values: np.ndarray,
               *options: int | np.ndarray | None) -> int:
    """Run code_codes or code_words of C_SOURCE: `values` to bytes in `buffer`, or back.
    Returns the length of the stream, which may exceed the buffer, or -1 for codes off the trellis."""
    if not values.size:
        return 0
    tables = _tables()                 # held by name: threads that race for the cache may own the only one
    code = int.from_bytes(buffer[:8].tobytes().ljust(8, b"\0"), "big")
    coder = np.array([*(x.ctypes.data for x in (*tables, buffer)), buffer.size, decode, 8 * decode, 0, 0,
                      0, 2 ** 64 - 1, code], np.uint64)
    length = call_c(routine, coder, values, *values.shape, *options)
    if length == -2:
        raise MemoryError(f"no memory to code {values.shape}")
    return length


def _encode(routine: str, values: np.ndarray, *options: int | np.ndarray | None) -> bytes:
    buffer = np.empty(2 * values.nbytes + 64, np.uint8)
    length = _run_coder(routine, buffer, False, values, *options)
    if length < 0:
        raise ValueError("expected codes of trellis_round, found a code of the wrong parity; encode these "
                         "with trellis=False")
    if length > buffer.size:           # codes far from any Gaussian; the first pass has counted their bytes
        buffer = np.empty(length, np.uint8)
        _run_coder(routine, buffer, False, values, *options)
    return buffer[:length].tobytes()


def similar_rows(rows: np.ndarray, block: int = 512) -> np.ndarray:
    """(rows, 2): 8 * index + share of the two earlier rows that help most after linear structure; 0 ends.

    Only the encoder searches, so floating point is safe here: any answer decodes (another machine's matrix
    library may name other rows in a near tie; the stream then differs, not what it decodes to).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.from_numpy(rows).to(device).float()
    x -= x.mean(0)
    covariance = x.T @ x / len(x)
    shrunk = 0.8 * covariance + 0.2 * torch.diag(covariance.diagonal() + 1e-3)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(shrunk), x.T, upper=False).T.contiguous()
    norm = white.norm(dim=1) + 1e-9
    unit = white / norm[:, None]
    alike = torch.zeros(len(x), 2, dtype=torch.int32, device=device)
    for start in range(0, len(x), block):
        index = torch.arange(start, min(start + block, len(x)), device=device)
        rest = white[index]
        for k in range(2):
            top, best = (rest @ unit[:start + len(index)].T).tril(start - 1).max(1)
            cosine = (top / (rest.norm(dim=1) + 1e-9)).clamp_max(0.999)
            gain_bits = -rows.shape[1] / 2 * torch.log2(1 - cosine ** 2) - torch.log2(index + 1.0) - 1
            share = (8 * top / norm[best]).round().clamp(0, 7) * (gain_bits > 0)
            share *= k == 0 or alike[index, 0] > 0
            alike[index, k] = torch.where(share > 0, best * 8 + share.long(), 0).int()
            rest = rest - share[:, None] / 8 * white[best]
    return alike.cpu().numpy()


def _pack(kind: int, option: int, shape: tuple, payload: bytes, content: np.ndarray) -> bytes:
    head = STREAM_HEADER.pack(STREAM_MAGIC, kind, option, *shape)
    body = head + payload + struct.pack("<I", zlib.crc32(content.tobytes(), zlib.crc32(head)))
    return body + struct.pack("<I", zlib.crc32(body))


def _unpack(stream: bytes, kind: int) -> tuple[int, tuple, np.ndarray]:
    """Check all that can be checked before decoding; return option, shape, payload."""
    if len(stream) < STREAM_HEADER.size + 8 or stream[:4] != STREAM_MAGIC:
        raise ValueError(f"expected a {STREAM_MAGIC.decode()} stream, found {len(stream)} bytes starting "
                         f"{bytes(stream[:4])!r}")
    if zlib.crc32(stream[:-4]) != int.from_bytes(stream[-4:], "little"):
        raise ValueError(f"stream of {len(stream)} bytes fails its checksum: truncated or damaged, write it "
                         "again")
    _, found_kind, option, *shape = STREAM_HEADER.unpack_from(stream)
    payload = np.frombuffer(stream, np.uint8)[STREAM_HEADER.size:-8]
    if found_kind != kind:
        raise ValueError(f"stream of kind {found_kind}, expected {kind}: not ours")
    symbols = math.prod(shape) if kind == CODES else shape[1]
    is_too_wide = kind == CODES and option & REGRESS and not can_regress(shape)
    if symbols > min(MAX_SYMBOLS, 32768 * len(payload)) or is_too_wide:
        raise ValueError(f"stream of {len(stream)} bytes cannot hold shape {shape}: its header is damaged")
    return option, tuple(shape), payload


def _check_content(stream: bytes, content: np.ndarray) -> None:
    head, checksum = stream[:STREAM_HEADER.size], int.from_bytes(stream[-8:-4], "little")
    if zlib.crc32(content.tobytes(), zlib.crc32(head)) != checksum:
        raise ValueError(f"stream of {len(stream)} bytes decodes to other values than were written: damaged, "
                         "or words with another base")


def can_regress(shape: tuple) -> bool:
    return shape[2] <= MAX_REGRESSED[0] and shape[0] * shape[1] <= MAX_REGRESSED[1]


def encode_codes(codes: np.ndarray, *, regress: bool = False, trellis: bool = False) -> bytes:
    """Code one tensor group.

    codes    (matrices, rows, cols) int8; rows have comparable variance.
    regress  predict each code from the codes to its left in the row; pays where columns are correlated.
    trellis  the codes come from trellis_round, TRELLIS_ROWS rows at a time from row 0 of each matrix.
    Returns a stream that carries its shape and checksums. Raises ValueError when a shape or dtype is not
    codable.
    """
    codes = np.ascontiguousarray(codes)
    if codes.dtype != np.int8 or codes.ndim != 3:
        raise ValueError(f"expected int8 codes (matrices, rows, cols), found {codes.dtype} {codes.shape}")
    if regress and not can_regress(codes.shape):
        raise ValueError(f"regress=True takes at most {MAX_REGRESSED} columns and rows, found {codes.shape}; "
                         "use False")
    alike = similar_rows(codes.reshape(-1, codes.shape[2])) if regress and codes.size else None
    payload = _encode("code_codes", codes, int(trellis), alike)
    return _pack(CODES, REGRESS * regress + TRELLIS * trellis, codes.shape, payload, codes)


def decode_codes(stream: bytes) -> np.ndarray:
    """Invert encode_codes. Raises ValueError on a truncated, damaged or foreign stream."""
    option, shape, payload = _unpack(stream, CODES)
    codes = np.zeros(shape, np.int8)
    alike = np.zeros((shape[0] * shape[1], 2), np.int32) if option & REGRESS else None    # not read
    _run_coder("code_codes", payload, True, codes, int(option & TRELLIS > 0), alike)
    _check_content(stream, codes)
    return codes


def ordered(words: np.ndarray) -> np.ndarray:
    """Bits of fp16 values (uint16) to integers in the order of the values, so that differences are small."""
    return np.where(words >> 15, ~words, words | 0x8000).astype(np.uint16)


def encode_words(words: np.ndarray, *, stride: int = 1, base: np.ndarray | None = None) -> bytes:
    """Code uint16 bit patterns of fp16 values, exactly.

    stride   distance to an earlier word that is likely similar (the same channel in the layer before).
    base     same length: code the difference to it; both sides must know it.
    Differences to the previous word are tried too (sorted values); the shorter stream wins.
    """
    words = np.ascontiguousarray(words, np.uint16).ravel()
    if stride < 1 or base is not None and len(base) != len(words):
        raise ValueError(f"expected stride >= 1 and a base of {len(words)} words, found stride {stride}, "
                         f"base {base}")
    values = ordered(words) if base is None else ordered(words) - ordered(base)
    plain, delta = (_encode("code_words", v, stride) for v in (values, np.diff(values, prepend=np.uint16(0))))
    is_difference = len(delta) < len(plain)
    return _pack(WORDS, int(is_difference), (1, len(words), stride), delta if is_difference else plain, words)


def decode_words(stream: bytes, *, base: np.ndarray | None = None) -> np.ndarray:
    """Invert encode_words, `base` as given there. ValueError on a truncated, damaged or foreign one."""
    is_difference, (_, length, stride), payload = _unpack(stream, WORDS)
    values = np.zeros(length, np.uint16)
    _run_coder("code_words", payload, True, values, stride)
    if is_difference:
        values = np.cumsum(values, dtype=np.uint16)
    if base is not None and len(base) != length:
        raise ValueError(f"stream holds {length} words, but base has {len(base)}")
    if base is not None:
        values = values + ordered(base)
    words = np.where(values >> 15, values & 0x7FFF, ~values).astype(np.uint16)     # the inverse of ordered()
    _check_content(stream, words)
    return words


# --- 10 artifact --------------------------------------------------------------------------------------------
# Container: checked, atomic files. Layout: what the artifact holds, a code stream per tensor group. Rate
# control: steps that make it fit, and the size report.

FORMAT_VERSION = 4
CHECKPOINT_MAGIC, ARTIFACT_MAGIC = b"GOLFFP32", b"GOLFCODE"
# Settings that do not shape what a file holds: how and where a run goes, scoring, and for a checkpoint
# quantization. Every other setting does, so that a new one is compared unless it is listed here.
RUN_FIELDS = tuple("run_id data_path tokenizer_path compile block_kernels cuda_graphs allow_ prequant_only "
                   "quantize_only ttt_eval_only audit checkpoint_dir skip_check quiet "
                   "fused_ce_enabled".split())
SCORING_FIELDS = ("val_batch_tokens", "eval_", "ttt_", "phased_ttt_", "global_ttt_", "ngram_", "token_")
QUANTIZATION_FIELDS = (*(name for spec in TENSOR_GROUPS.values() for name in (spec.bits, spec.clip_sigmas)),
                       "gptq_calibration", "fill_", "rdo_", "compressor", "awq_", "lqer_")


class ArtifactError(ValueError):
    """A checkpoint or artifact is missing, damaged, made otherwise, or cannot hold the model."""


# --- 10a container ---

def shaping_settings(magic: bytes, cfg: Config) -> dict[str, Any]:
    """Settings that shaped a file of this kind."""
    others = RUN_FIELDS + SCORING_FIELDS + (QUANTIZATION_FIELDS if magic == CHECKPOINT_MAGIC else ())
    return {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)
            if not field.name.startswith(others)}


def build_container(magic: bytes, cfg: Config, streams: Mapping[str, bytes],
                    notes: Mapping[str, Any] | None = None,
                    origin: Mapping[str, str] | None = None) -> bytes:
    """Named byte streams with the settings that shaped them, notes (JSON), Run.origin and a SHA-256. Layout:
    magic (8), version u32, header length u32, header (zlib JSON), streams, SHA-256 of all before (32)."""
    header = zlib.compress(json.dumps({
        "settings": shaping_settings(magic, cfg), "origin": origin or {},
        "streams": [[name, len(stream)] for name, stream in streams.items()], "notes": notes or {}},
        separators=(",", ":")).encode(), 9)
    numbers = np.array([FORMAT_VERSION, len(header)], "<u4").tobytes()
    body = b"".join([magic, numbers, header, *streams.values()])
    return body + hashlib.sha256(body).digest()


def write_file(path: Path, data: bytes) -> None:
    """Write a file that appears under its name only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_container(path: Path, magic: bytes, cfg: Config, run: Run | None = None,
                   sha256: str = "") -> tuple[dict[str, bytes], dict[str, Any]]:
    """Streams and notes of a file made by build_container. Raises ArtifactError unless every check holds: the
    file's SHA-256 where given, settings, and with `run` its tokenizer; other code is a warning."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); check RUN_ID, or run the earlier "
                            "stage first") from error
    if data[:8] != magic:
        raise ArtifactError(f"{path}: expected a file beginning with {magic!r}, found {data[:8]!r}; this is "
                            "not a file of that kind")
    if len(data) < 48 or hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise ArtifactError(f"{path}: checksum mismatch over {len(data):,} bytes; the file is truncated or "
                            "corrupted, write it again")
    if sha256 not in ("", found := hashlib.sha256(data).hexdigest()):
        raise ArtifactError(f"{path}: SHA-256 {found[:16]}..., but rank 0 has {sha256[:16]}...; all ranks "
                            "must read the same file, look at the disk and start again")
    version, header_bytes = np.frombuffer(data[8:16], "<u4").tolist()
    if version != FORMAT_VERSION:
        raise ArtifactError(f"{path}: format version {version}, expected {FORMAT_VERSION}; write it again "
                            "with this script")
    header = json.loads(zlib.decompress(data[16:16 + header_bytes]))
    now = shaping_settings(magic, cfg)
    made = {name: getattr(Config, name) for name in now} | header["settings"]     # newer ones were as default
    differing = [name for name in {**made, **now} if made.get(name) != now.get(name)]
    if differing:
        shown = {name: [int(x) if isinstance(x, bool) else x for x in (made.get(name), now.get(name))]
                 for name in differing}
        changes = ", ".join(f"{name.upper()}={old} (now {new})" for name, (old, new) in shown.items())
        raise ArtifactError(f"{path}: made with other settings: {changes}; set them as they were")
    made, now = header["origin"], run.origin if run else {}
    differing = [name for name in made if made[name] != now.get(name, made[name])]
    if "tokenizer" in differing:
        raise ArtifactError(f"{path}: made with a tokenizer of SHA-256 {made['tokenizer'][:16]}..., now "
                            f"{now['tokenizer'][:16]}...; set TOKENIZER_PATH and DATA_PATH as they were")
    if "merges" in differing:
        raise ArtifactError(f"{path}: made with other joined pairs; set DATA_PATH as it was")
    if "code" in differing:
        run.log(f"artifact warning file:{path.name} made_with_code:{made['code'][:16]} "
                f"code:{now['code'][:16]}")
    streams = {}
    at = 16 + header_bytes
    for name, length in header["streams"]:
        streams[name] = data[at:at + length]
        at += length
    return streams, header["notes"]


def _in_threads(work: Callable, items: Sequence) -> list:
    """work(item) of every item in order; C routines run at the same time, the first items first."""
    with ThreadPool(max(1, min(len(items), os.cpu_count() or 1))) as pool:
        return pool.map(work, items, chunksize=1)


def checkpoint_path(run: Run) -> Path:
    return Path(run.cfg.checkpoint_dir) / f"{run.run_id}.weights"


def artifact_path(run: Run) -> Path:
    return Path(run.cfg.checkpoint_dir) / f"{run.run_id}.artifact"


def write_checkpoint(cfg: Config, run: Run, model: GPT) -> None:
    """Save the averaged fp32 weights (rank 0)."""
    if run.rank == 0:
        streams = {name: p.detach().cpu().numpy().tobytes() for name, p in model.named_parameters()}
        data = build_container(CHECKPOINT_MAGIC, cfg, streams, origin=run.origin)
        save(run, checkpoint_path(run), data)
        run.log(f"Serialized model: {len(data)} bytes")
    run.barrier("calibration")


def read_checkpoint(cfg: Config, run: Run, model: GPT) -> None:
    streams, _ = read_container(checkpoint_path(run), CHECKPOINT_MAGIC, cfg, run)
    model.load_state_dict({name: torch.frombuffer(bytearray(streams[name]), dtype=p.dtype).view_as(p)
                           for name, p in model.named_parameters()})


# --- 10b layout ---

# Settings that say how many bits the codes have, in the order of the artifact's notes.
BITS_SETTINGS = (*dict.fromkeys(spec.bits for spec in TENSOR_GROUPS.values()), "awq_lite_bits")
CODING_ORDER = sorted(TENSOR_GROUPS, key=lambda group: TENSOR_GROUPS[group].coding_turn)


def group_streams(group: str) -> list[str]:
    return [group] if TENSOR_GROUPS[group].halved_axis is None else [f"{group}:1", f"{group}:2"]


def split_codes(group: str, codes: np.ndarray) -> list[np.ndarray]:
    """The parts of codes (matrices, rows, cols) in group_streams; rows are cut where the trellis restarts."""
    axis = TENSOR_GROUPS[group].halved_axis
    if axis is None:
        return [codes]
    middle = codes.shape[axis] // 2
    if axis == 1:
        middle -= middle % TRELLIS_ROWS
    return np.split(codes, [middle], axis)


def join_codes(group: str, parts: Sequence[Tensor]) -> Tensor:
    """Invert split_codes."""
    return torch.cat(list(parts), TENSOR_GROUPS[group].halved_axis or 0)


def _fp16_words(tensors: Sequence[Tensor]) -> np.ndarray:
    return torch.cat([t.detach().cpu().half().flatten() for t in tensors]).numpy().view(np.uint16)


def _high_scale_base(scale: Tensor, group: str, bits: Mapping[str, int]) -> np.ndarray:
    """What scale_high is but for rounding, given scale: both sides derive it and code the difference."""
    ratio = code_limit(bits[TENSOR_GROUPS[group].bits]) / code_limit(bits["awq_lite_bits"])
    return _fp16_words([scale.float() * ratio])


def encode_model(cfg: Config, quantized: Mapping[str, Quantized],
                 passed: Mapping[str, Tensor]) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(streams, notes) of the artifact: codes and scales per tensor group, corrections, pass-through tensors.
    Notes say what streams cannot: shapes of pass-through tensors, protected columns, kinds of corrections."""
    bits = {name: getattr(cfg, name) for name in BITS_SETTINGS}
    protected = {m.name: m.group for m in list_matrices(cfg) if quantized[m.name].protect_starts}
    corrected = {name: q.factors for name, q in quantized.items() if q.factors is not None}
    wide = [name for name, t in passed.items() if t.shape[-1:] == (cfg.model_dim,)]
    rest = [name for name in passed if name not in wide]
    jobs: dict[str, Callable[[], bytes]] = {}             # the longest job first
    for group in CODING_ORDER:
        members = [quantized[m.name] for m in list_matrices(cfg, [group])]
        codes = np.stack([q.codes.cpu().numpy() for q in members])
        regress = TENSOR_GROUPS[group].regress and can_regress(codes.shape)
        for name, part in zip(group_streams(group), split_codes(group, codes)):
            jobs[name] = functools.partial(encode_codes, part, regress=regress, trellis=cfg.rdo_lambda > 0)
        jobs[f"{group}:scale"] = functools.partial(encode_words, _fp16_words([q.scale for q in members]),
                                                   stride=codes.shape[1])
    for name, group in protected.items():
        q = quantized[name]
        jobs[f"{name}:high"] = functools.partial(encode_words, _fp16_words([q.scale_high]),
                                                 base=_high_scale_base(q.scale, group, bits))
    for name, f in corrected.items():
        jobs[f"{name}:qA"] = functools.partial(encode_codes, f.qA[None].cpu().numpy())
        jobs[f"{name}:qB"] = functools.partial(encode_codes, f.qB.mT[None].cpu().numpy())
    jobs["wide"] = functools.partial(encode_words, _fp16_words([passed[name] for name in wide]),
                                     stride=cfg.model_dim)
    scales = [scale for f in corrected.values() for scale in (f.sA, f.sB)]
    jobs["rest"] = functools.partial(encode_words, _fp16_words([passed[name] for name in rest] + scales))
    notes = {"passed": [[name, list(passed[name].shape)] for name in (*wide, *rest)],
             "num_wide": len(wide),
             "bits": list(bits.values()),
             "protected": {name: [quantized[name].group_size, *quantized[name].protect_starts]
                           for name in protected},
             "corrected": [[name, list(f.sA.shape), list(f.sB.shape)] for name, f in corrected.items()]}
    streams = _in_threads(lambda job: job(), list(jobs.values()))
    return dict(zip(jobs, streams)), notes


def decode_model(cfg: Config, streams: Mapping[str, bytes], notes: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict the artifact stands for, fp32; the exact values dequantize() gave before encoding."""
    coded = [name for group in CODING_ORDER for name in group_streams(group)]
    coded += [name for name in streams if name.endswith((":qA", ":qB"))]
    arrays = _in_threads(lambda name: decode_codes(streams[name]), coded)
    codes = {name: torch.from_numpy(array) for name, array in zip(coded, arrays)}
    state, factors = decode_passed(streams, notes, codes)
    bits = dict(zip(BITS_SETTINGS, notes["bits"]))
    for group in CODING_ORDER:
        stack = join_codes(group, [codes[name] for name in group_streams(group)])
        scales = decode_fp16(streams[f"{group}:scale"]).view(stack.shape[:2])
        members = []
        for m, matrix_codes, scale in zip(list_matrices(cfg, [group]), stack, scales):
            q = Quantized(matrix_codes, scale, factors=factors.get(m.name))
            if m.name in notes["protected"]:
                group_size, *starts = notes["protected"][m.name]
                high = decode_fp16(streams[f"{m.name}:high"], _high_scale_base(scale, group, bits))
                q = q._replace(protect_starts=tuple(starts), group_size=group_size, scale_high=high)
            members.append(dequantize(q))
        state[group] = torch.stack(members) if TENSOR_GROUPS[group].is_bank else members[0]
    return state


def decode_fp16(stream: bytes, base: np.ndarray | None = None) -> Tensor:
    """A stream of encode_words as the flat fp16 tensor it stands for."""
    return torch.from_numpy(decode_words(stream, base=base).view(np.float16))


def decode_passed(streams: Mapping[str, bytes], notes: Mapping[str, Any],
                  codes: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Factors]]:
    """Pass-through parameters, fp32, and low-rank corrections by matrix, whose scales end stream "rest"."""
    shapes = [shape for _, shape in notes["passed"]]
    shapes += [shape for _, *pair in notes["corrected"] for shape in pair]
    flat = torch.cat([decode_fp16(streams["wide"]), decode_fp16(streams["rest"])])
    parts = flat.split([math.prod(shape) for shape in shapes])
    values = iter([part.reshape(tuple(shape)) for part, shape in zip(parts, shapes)])
    passed = {name: next(values).float() for name, _ in notes["passed"]}
    factors = {name: Factors(codes[f"{name}:qA"][0], next(values), codes[f"{name}:qB"][0].mT.contiguous(),
                             next(values)) for name, *_ in notes["corrected"]}
    return passed, factors


# --- 10c rate control ---

RATE_TOLERANCE, RATE_ATTEMPTS = 4096, 8          # bytes below the limit that are as good as none
SMALLEST_SIGMA_FACTOR = 0.5                      # below, real weights would begin to clip


def write_artifact(cfg: Config, run: Run, model: GPT, stats: Calibration) -> str:
    """Quantize, encode, make it fit; rank 0 writes and reports it. Returns its SHA-256 on every rank."""
    code = shipped_code()
    reason = ' reason:"no pack.py beside the script"' if "lzma" in code.form else ""
    run.log(f"artifact code_form:{code.form}{reason}")
    run.log(f"Code size (uncompressed): {code.source_bytes} bytes")
    run.log(f"Code size (compressed): {code.num_bytes} bytes")
    code_bytes = int(run.agree([code.num_bytes])[0])
    data, digest = fit_artifact(cfg, run, model, stats, SIZE_LIMIT - code_bytes - CODE_MARGIN), ""
    if run.rank == 0:
        path, digest = artifact_path(run), hashlib.sha256(data).hexdigest()
        save(run, path, data)
        model_bytes = path.stat().st_size                 # what is counted is what lies on the disk
        run.log(f"artifact written file:{path.name} sha256:{digest}")
        run.log(f"Serialized model quantized+{cfg.compressor}: {model_bytes} bytes")
        run.log(f"Total submission size quantized+{cfg.compressor}: {model_bytes + code_bytes} bytes")
        if model_bytes + code_bytes > SIZE_LIMIT:
            raise ArtifactError(f"{path}: {model_bytes:,} bytes and {code_bytes:,} of code exceed "
                                f"{SIZE_LIMIT:,}; raise ATTN_, MLP_ and EMBED_CLIP_SIGMAS")
    return run.share(digest)


class ShippedCode(NamedTuple):
    """The script that ships: its form, bytes and SHA-256, and the bytes of the program's own text."""
    form: str
    num_bytes: int
    sha256: str
    source_bytes: int


def program_source() -> str:
    """The text of this program as it runs, also when it came out of the packed script."""
    return "".join(linecache.getlines(main.__code__.co_filename))


@functools.cache
def shipped_code() -> ShippedCode:
    """What counts as code: the packed script; this file where it is the packed one. Both have one hash."""
    source = program_source().encode()
    if main.__code__.co_filename != __file__:             # run by the loader that pack.py writes
        form, data = "packed_file", Path(__file__).read_bytes()
    elif (REPO / "pack.py").is_file():
        import pack
        form, data = "packed", pack.pack_script(source.decode())
    else:
        form, data = "lzma_of_source", lzma.compress(source, preset=9 | lzma.PRESET_EXTREME)
    return ShippedCode(form, len(data), hashlib.sha256(data).hexdigest(), len(source))


def fit_artifact(cfg: Config, run: Run, model: GPT, stats: Calibration, limit: int) -> bytes:
    """The artifact's bytes (on rank 0), at most `limit`: configured clip sigmas where they fit, else larger.
    With FILL_ARTIFACT=1 smaller ones where there is room. Scaling all steps by f saves log2(f) bits per
    weight, which finds the factor in a few attempts. Raises ArtifactError when none fits."""
    weights = sum(getattr(model, group).numel() for group in TENSOR_GROUPS)
    factor, tried = 1.0, {}
    for attempt in range(RATE_ATTEMPTS):
        timer = Timer(run)
        quantized, passed = quantize(cfg, run, model, stats, factor)
        coding = Timer(run)
        data = b""
        if run.rank == 0:
            streams, notes = encode_model(cfg, quantized, passed)
            data = build_container(ARTIFACT_MAGIC, cfg, streams, notes, run.origin)
            codes = {group: sum(len(streams[name]) for name in group_streams(group))
                     for group in CODING_ORDER}
            run.log(f"artifact attempt:{attempt + 1} sigma_factor:{factor:.6f} model_bytes:{len(data)} "
                    f"room_bytes:{limit - len(data)} elapsed_s:{timer.seconds():.1f} "
                    f"encode_s:{coding.seconds():.1f} "
                    + " ".join(f"{name}_bytes:{size}" for name, size in codes.items())
                    + f" small_bytes:{sum(map(len, streams.values())) - sum(codes.values())}")
        room = limit - int(run.agree([len(data)])[0])
        tried[factor] = room, data
        if 0 <= room and (room <= RATE_TOLERANCE or (factor == 1.0 and not cfg.fill_artifact)):
            break
        bits_to_save = (RATE_TOLERANCE / 2 - room) * 8 / weights              # per weight
        factor = max(factor * 2.0 ** min(4.0, bits_to_save), SMALLEST_SIGMA_FACTOR)
        if factor in tried:
            break
    fitting = [f for f, (room, _) in tried.items() if room >= 0]
    if not fitting:
        smallest = limit - max(room for room, _ in tried.values())
        raise ArtifactError(f"no clip sigmas found that fit {limit:,} bytes in {RATE_ATTEMPTS} attempts "
                            f"(smallest {smallest:,}), each with coarser steps; shrink the model")
    return tried[min(fitting)][1]


def read_artifact(cfg: Config, run: Run, model: GPT, sha256: str = "") -> None:
    """Replace the model's weights by what ships: every rank must find the file that rank 0 wrote or reads."""
    timer = Timer(run)
    if not sha256:
        with contextlib.suppress(OSError):                # read_container says why
            sha256 = sha256_of(artifact_path(run)) if run.rank == 0 else ""
        sha256 = run.share(sha256)
    streams, notes = read_container(artifact_path(run), ARTIFACT_MAGIC, cfg, run, sha256)
    model.load_state_dict(decode_model(cfg, streams, notes))
    require_finite(run, "the artifact's weights", *model.parameters())
    run.clocks["load"] = seconds = timer.seconds()
    run.log(f"artifact load_s:{seconds:.1f} load_ms:{1000 * seconds:.0f}")


# --- 11 scoring ---------------------------------------------------------------------------------------------
# Nats, tokens and bytes summed in fp64, the one conversion to bits per byte, and plain evaluation.

SCORE_CHUNK = 16384          # positions whose logits exist at one time


class Score(NamedTuple):
    loss: float              # nats per token
    bpb: float               # bits per byte of original text
    tokens: int
    bytes: int

    def log_fields(self, seconds: float) -> str:
        return (f"val_loss:{self.loss:.8f} val_bpb:{self.bpb:.8f} eval_time:{1000 * seconds:.0f}ms "
                f"targets:{self.tokens} bytes:{self.bytes}")


class BpbMeter:
    """Sums over scored targets. fp64: an fp32 sum stops counting tokens at 2**24, and validation has 48M."""

    def __init__(self, run: Run) -> None:
        self.run, self.sums = run, torch.zeros(3, dtype=torch.float64, device=run.device)

    def add(self, nll: Tensor, byte_counts: Tensor, scored: Tensor | None = None) -> None:
        """Bank nll (nats) and bytes of targets of one shape; `scored` masks those that count."""
        scored = torch.ones_like(nll, dtype=torch.bool) if scored is None else scored
        self.sums += torch.stack([
            torch.where(scored, x, 0).sum(dtype=torch.float64) for x in (nll, scored, byte_counts)])

    def result(self) -> Score:
        """Totals over all ranks; call once, at the end."""
        nats, tokens, num_bytes = self.run.sum(self.sums.clone()).tolist()
        if not num_bytes:
            raise DataError("the scored targets carry no bytes; the byte sidecar is all zero, prepare it "
                            "again")
        score = Score(nats / tokens, nats / (math.log(2) * num_bytes), int(tokens), int(num_bytes))
        require_finite(self.run, "val_loss", score.loss)
        self.run.last_good = f"val_loss {score.loss:.4f} in stage {self.run.stage_name}"
        return score


def eval_row_tokens(cfg: Config) -> int:
    """Targets per row of plain evaluation: as many whole sequences as fit an eighth of VAL_BATCH_TOKENS."""
    return cfg.val_batch_tokens // ROWS_PER_STEP // cfg.eval_seq_len * cfg.eval_seq_len


def score_row(cfg: Config, run: Run, model: GPT, tokens: np.ndarray, byte_counts: np.ndarray, meter: BpbMeter,
              looping: bool) -> None:
    """Bank every target of one flat row of tokens (length + 1,). A compiled model gets the row padded to a
    training row and with gradients on, though nothing goes backward: then the graphs of training serve here,
    and nothing is compiled for two diagnostics."""
    length, inputs = len(tokens) - 1, tokens[:-1].astype(np.int64)
    if cfg.compile:
        # On the right, where causal attention does not see it.
        inputs = np.pad(inputs, (0, max(cfg.row_tokens, eval_row_tokens(cfg)) - length))
    bounds = mark_varying(torch.from_numpy(segment_bounds(inputs, cfg.eval_seq_len)).to(run.device), 0)
    with torch.set_grad_enabled(cfg.compile):
        hidden = model.ops.hidden(model, torch.from_numpy(inputs).to(run.device)[None], looping=looping,
                                  segments=(bounds, cfg.longest_segment))[0]
    targets, counts = (torch.from_numpy(x[1:].astype(np.int64)).to(run.device) for x in (tokens, byte_counts))
    with torch.no_grad():
        for at in range(0, length, SCORE_CHUNK):
            span = slice(at, min(at + SCORE_CHUNK, length))
            meter.add(model.score(hidden[span].clone(), targets[span].clone())[0], counts[span])


def evaluate_plain(cfg: Config, run: Run, model: GPT, tokens: np.ndarray, byte_counts: np.ndarray,
                   looping: bool = True) -> Score:
    """Score every target after the first token in flat rows of whole sequences, dealt to the ranks. Rows
    begin at multiples of their length on any world size, so the context of a target does not depend on it."""
    width, meter = eval_row_tokens(cfg), BpbMeter(run)
    for start in range(width * run.rank, len(tokens) - 1, width * run.world_size):
        span = slice(start, start + width + 1)
        run.beat()
        score_row(cfg, run, model, tokens[span], byte_counts[span], meter, looping)
    return meter.result()


def diagnose(cfg: Config, run: Run, model: GPT, data: Dataset, name: str) -> Score:
    """One diagnostic line: plain evaluation of the model as it is."""
    if cfg.compile:
        warm, width = Timer(run), eval_row_tokens(cfg)
        random_tokens = np.random.default_rng(cfg.seed).integers(2, cfg.vocab_size, width + 1)
        score_row(cfg, run, model, random_tokens, np.ones(width + 1, np.int64), BpbMeter(run), looping=True)
        run.log(f"diagnostic compile done ({warm.seconds():.1f}s)")
    run.stage(f"diagnostic {name}")
    timer = Timer(run)
    score = evaluate_plain(cfg, run, model, *data.load_validation())
    run.log(f"diagnostic {name} {score.log_fields(timer.seconds())}")
    return score


# --- 12 hints and order -------------------------------------------------------------------------------------
# N-gram hints and the tilt of their probability; the plan of batches and the one certified order of scoring.

class NgramTable:
    """Hints from an exact table, in C, of targets in slices: each knows what those before have counted. The
    hint is the token that first reached the highest count after the same `context` tokens; its gate opens
    where its share of all counts, its confidence, is at least `threshold`, both as fp32."""

    def __init__(self, tokens: np.ndarray, num_targets: int, context: int, threshold: float) -> None:
        """Room for num_targets targets of the stream tokens (N,) uint16; MemoryError when there is none."""
        capacity = 3 * num_targets // 2 + 1024                # more than n-grams there can be
        self.table, self.tokens = np.zeros((capacity, 4), np.uint32), np.ascontiguousarray(tokens, np.uint16)
        self.context, self.threshold = context, threshold

    def feed(self, order: np.ndarray, doc_start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Look up and count the targets `order`; target i is token i + 1. A context that would begin before
        doc_start, the first token of the target's document, gives no hint and is not counted. All (n,), int64
        in; returns hinted tokens int32, -1 where closed, and confidences fp32, 0 where new."""
        order, doc_start = (np.ascontiguousarray(x, np.int64) for x in (order, doc_start))
        hint, confidence = np.empty(len(order), np.int32), np.empty(len(order), np.float32)
        call_c("ngram_feed", self.table, len(self.table), self.tokens, self.context,
               ctypes.c_float(self.threshold), len(order), order, doc_start, hint, confidence)
        return hint, confidence


def tilt(nll: Tensor, log_q_hint: Tensor, is_hit: Tensor, boost: Tensor) -> Tensor:
    """nll of the target once the hint's probability is multiplied by exp(boost) and renormalized; fp32."""
    return nll - boost * is_hit + torch.log1p(log_q_hint.clamp_max(0.0).exp() * torch.expm1(boost))


LANES = 8                    # independent sequences of batches; R ranks run 8/R lanes each
BATCH_TOKENS = 82_000        # most rows x window tokens of a chunk step, before padding; bounds its memory
BATCH_CHUNKS = 16_000        # most rows x chunks of the longest document; short batches balance the lanes
# Chunk steps are padded on the right to these sizes, so that few shapes exist. Chosen by planned cost on the
# record's document lengths: 54 windows would be 4 % faster, with four times as many graphs to capture.
ROW_BUCKETS = (2, 4, 8, 16, 32, 48, 64)
WINDOW_BUCKETS = (96, 192, 288, 384, 528, 672, 864, 1056, 1248, 1680, 2112, 2560)
# Milliseconds of a learning chunk step by rows, at each of STEP_WINDOWS; balances lanes, orders their steps.
# Measured on one H100 by benchmarks/evaluation.py (logs/evaluation_h100.out).
STEP_WINDOWS = (96, 384, 864, 1248, 1680, 2112, 2560)
STEP_MS = {
    2: (3.18, 3.61, 4.5, 5.4, 6.43, 7.41, 8.38),
    8: (3.9, 5.51, 9.29, 12.26, 16.78, 20.64, 25.32),
    16: (4.97, 8.37, 16.31, 22.55, 31.4, 39.02, 48.46),
    32: (7.4, 14.96, 30.64, 43.76, 60.16, 75.36, 93.51),
    48: (10.29, 22.09, 45.14, 64.52, 88.96, 113.41, 138.76),
    64: (12.37, 28.62, 59.42, 84.69, 113.12, 141.55, 171.03)}


class Documents(NamedTuple):
    """start (n,) first token, length (n,) tokens with the next document's BOS; int64. Targets: length - 1."""
    start: np.ndarray
    length: np.ndarray


def find_documents(tokens: np.ndarray) -> Documents:
    """Documents begin at BOS and own the next BOS as their last target. A lone final BOS has no target."""
    starts = np.flatnonzero(tokens == BOS).astype(np.int64)
    lengths = np.append(starts[1:] + 1, len(tokens)) - starts
    return Documents(starts[lengths >= 2], lengths[lengths >= 2])


def num_chunks(length: np.ndarray, chunk: int) -> np.ndarray:
    """Chunks of documents with `length` tokens, that is length - 1 targets."""
    return -(-(length - 1) // chunk)


class Buckets(NamedTuple):
    """The sizes chunk steps are padded to; ascending, the last one holds any step."""
    rows: tuple[int, ...]
    windows: tuple[int, ...]


def step_buckets(batch_size: int, window: int, chunk: int) -> Buckets:
    """Sizes up to a whole batch and the longest window, which all hold a chunk."""
    return Buckets(*((*(size for size in sizes if low <= size < last), last)
                     for sizes, low, last in ((ROW_BUCKETS, 0, batch_size), (WINDOW_BUCKETS, chunk, window))))


def pad_to(sizes: Sequence[int], x: np.ndarray) -> np.ndarray:
    """The smallest of the ascending `sizes` that is at least x."""
    return np.asarray(sizes)[np.searchsorted(sizes, x)]


class Steps(NamedTuple):
    """The chunk steps of a batch; int64 (steps,) each."""
    rows: np.ndarray         # unfinished documents
    width: np.ndarray        # longest window
    start_us: np.ndarray     # planned start within the phase, microseconds
    cost_us: np.ndarray      # planned duration if adapters learn


def batch_steps(lengths: np.ndarray, chunk: int, window: int, buckets: Buckets, start_us: int = 0) -> Steps:
    """Steps of a batch that starts at start_us; lengths descending. Step k scores every chunk k there is."""
    counts = num_chunks(lengths, chunk)
    index = np.arange(counts[0])
    rows = np.searchsorted(-counts, -index, side="left")
    width = np.minimum(chunk * (index + 1), window)
    cost_us = step_cost_us(pad_to(buckets.rows, rows), pad_to(buckets.windows, width))
    return Steps(rows, width, start_us + np.cumsum(cost_us) - cost_us, cost_us)


def step_cost_us(rows: np.ndarray, width: np.ndarray,
                 step_ms: Mapping[int, Sequence[float]] = STEP_MS) -> np.ndarray:
    """A table of milliseconds between its entries, and beyond its last rows, by straight lines; whole
    microseconds, at least 1."""
    table = np.stack([np.interp(width, STEP_WINDOWS, ms) for ms in step_ms.values()])
    known = np.array(list(step_ms))
    low = np.clip(np.searchsorted(known, rows, side="right") - 1, 0, len(known) - 2)
    share = np.maximum(rows - known[low], 0) / (known[low + 1] - known[low])
    column = np.arange(len(rows))
    ms = table[low, column] * (1 - share) + table[low + 1, column] * share
    return np.maximum(np.rint(1000 * ms), 1).astype(np.int64)


class Batch(NamedTuple):
    """Documents scored together, longest first, so that the unfinished ones are always the first rows."""
    index: int               # counts batches by ascending length
    docs: tuple[int, ...]
    carries: bool            # A of the lane's previous batch goes on; else it is drawn anew
    steps: Steps

    @property
    def end_us(self) -> int:
        return int(self.steps.start_us[-1] + self.steps.cost_us[-1])


Phase = list[list[Batch]]    # batches of each lane, in order


def plan_batches(docs: Documents, *, batch_size: int, lanes: int = LANES, max_tokens: float = math.inf,
                 max_chunks: float = math.inf, prefix_docs: int = 0, chunk: int = 48,
                 window: int = 2560) -> list[Phase]:
    """Deal all documents to lanes, in one or two phases. Depends on document lengths and settings only.

    Batches of documents of similar length have at most batch_size rows, max_tokens of rows x longest window
    and max_chunks of rows x longest document's chunks; one that a bound makes smaller gets one of ROW_BUCKETS
    rows, or one. They are queued longest first, each in the lane with least planned time. With max_tokens
    the longest document is a batch of its own and starts first: its chunks are the longest chain of steps.
    The first phase ends with the batch that brings the documents to prefix_docs (0: a single phase).

    A batch carries A of the lane's previous batch of the phase if that one had as many rows. Without bounds
    only the batch of the longest documents may have fewer than batch_size rows; it comes first, so the rule
    says what the reference does: full batches hand one set of adapters on, and the odd one has its own."""
    by_length = np.argsort(docs.length, kind="stable")
    chunks = num_chunks(docs.length[by_length], chunk)
    is_bounded = max_tokens < math.inf
    cuts, left = [0], len(by_length) - is_bounded
    while cuts[-1] < left:
        size = min(batch_size, left - cuts[-1])
        while size > 1:
            longest = int(chunks[cuts[-1] + size - 1])
            if size * min(chunk * longest, window) <= max_tokens and size * longest <= max_chunks:
                break
            size = max([rows for rows in ROW_BUCKETS if rows < size], default=1)
        cuts.append(cuts[-1] + size)
    if is_bounded:
        cuts.append(len(by_length))
    batches = [by_length[begin:end][::-1] for begin, end in zip(cuts, cuts[1:])]
    alone = len(batches) - 1 if is_bounded else -1
    buckets, boundary = step_buckets(batch_size, window, chunk), min(prefix_docs, len(by_length))
    phases: list[Phase] = []
    seen = 0
    for index in sorted(range(len(batches)), key=lambda k: (k != alone, -docs.length[batches[k][0]])):
        if not phases or (len(phases) == 1 and 0 < boundary <= seen):
            phases.append([[] for _ in range(lanes)])
            loads = [0] * lanes
        members, lane = batches[index], loads.index(min(loads))
        steps = batch_steps(docs.length[members], chunk, window, buckets, loads[lane])
        before = phases[-1][lane]
        carries = bool(before) and len(before[-1].docs) == len(members)
        before.append(Batch(index, tuple(members.tolist()), carries, steps))
        loads[lane] = before[-1].end_us
        seen += len(members)
    return phases


class ScoredChunks(NamedTuple):
    """Every (document, chunk) of a plan in the certified order; int64 (chunks,) each."""
    doc: np.ndarray
    chunk: np.ndarray
    first: np.ndarray        # its first target; target i is token i + 1
    size: np.ndarray         # how many targets it has
    phase: np.ndarray
    start_us: np.ndarray     # planned start of its step within the phase
    lane: np.ndarray


def certified_order(phases: Sequence[Phase], docs: Documents, chunk: int) -> ScoredChunks:
    """The one total order in which chunks count as scored: by phase, planned start of the step, lane, row.
    Every prediction depends only on tokens before it in this order, whatever the number of ranks and their
    speed. Planned times, not numbers of steps, keep lanes together whose steps cost unequally."""
    tables = []
    for phase, lanes in enumerate(phases):
        for lane, batches in enumerate(lanes):
            for batch in batches:
                counts = num_chunks(docs.length[list(batch.docs)], chunk)
                row = np.repeat(np.arange(len(counts)), counts)
                index = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
                columns = np.asarray(batch.docs)[row], index, phase, batch.steps.start_us[index], lane, row
                tables.append(np.stack(np.broadcast_arrays(*columns)))
    doc, index, phase, start_us, lane, row = np.concatenate(tables, axis=1)
    # One key, equal to sorting by the four in turn but several times faster.
    parts = phase, start_us, lane, row
    order = np.argsort(np.ravel_multi_index(parts, [int(part.max()) + 1 for part in parts]), kind="stable")
    size = np.minimum(chunk, docs.length[doc] - 1 - chunk * index)
    columns = doc, index, docs.start[doc] + chunk * index, size, phase, start_us, lane
    return ScoredChunks(*(column[order] for column in columns))


def targets_in_order(scored: ScoredChunks) -> np.ndarray:
    """Target indices in the certified order, int64."""
    before = np.cumsum(scored.size) - scored.size
    return np.repeat(scored.first - before, scored.size) + np.arange(scored.size.sum())


def select_prefix(scored: ScoredChunks, docs: Documents, chunk: int, prefix_docs: int) -> np.ndarray:
    """Documents for the base adaptation: first prefix_docs of phase 0 by their last chunk, shortest first."""
    is_last = (scored.phase == 0) & (scored.chunk == num_chunks(docs.length[scored.doc], chunk) - 1)
    chosen = scored.doc[is_last][:prefix_docs]
    return chosen[np.lexsort((chosen, docs.length[chosen]))]     # a stable sort of all documents by length


HINT_SLICE = 8192            # chunks whose hints are made, written and read at one time


class HintFeed:
    """Hints of every target in the certified order, made by one process per node beside the scoring. It
    appends them (int32, -1 where closed) to an unnamed file; each rank reads what its next step needs."""

    def __init__(self, cfg: Config, run: Run, tokens: np.ndarray, docs: Documents,
                 scored: ScoredChunks) -> None:
        self.cfg, self.run, self.tokens, self.docs, self.scored = cfg, run, tokens, docs, scored
        self.total, self.loaded, self.gated = len(tokens) - 1, 0, 0
        self.waited_s = self.made_s = 0.0
        self.error: BaseException | None = None
        stamp, = run.agree([time.time_ns() // 1000])
        path, self.maker = Path(tempfile.gettempdir()) / f"train_gpt_hints_{stamp:.0f}", None
        for is_my_turn in (run.rank == 0, run.rank > 0):                # on its node rank 0 is the maker
            if is_my_turn:
                try:
                    self.file = open(path, "x+b")
                    self.maker = threading.Thread(target=self._make, daemon=True)
                except FileExistsError:
                    self.file = open(path, "rb")
            run.barrier("hints")
        if self.maker:
            path.unlink()
            self.maker.start()

    def _make(self) -> None:
        start = time.perf_counter()
        try:
            context, threshold = self.cfg.token_order - 1, self.cfg.token_threshold
            table = NgramTable(self.tokens, self.total, context, threshold)
            for at in range(0, len(self.scored.doc), HINT_SLICE):
                part = ScoredChunks(*(x[at:at + HINT_SLICE] for x in self.scored))
                doc_start = np.repeat(self.docs.start[part.doc], part.size)
                self.file.write(table.feed(targets_in_order(part), doc_start)[0].tobytes())
                self.file.flush()
        except BaseException as error:                                  # for the thread that waits
            self.error = error
        self.made_s = time.perf_counter() - start

    def load(self, stream: Stream, count: int) -> None:
        """Put the hints of at least the first `count` targets of the certified order on the device."""
        start = time.perf_counter()
        while self.loaded < count:
            data = os.pread(self.file.fileno(), 4 * HINT_SLICE * self.cfg.ttt_chunk_size, 4 * self.loaded)
            hint = np.frombuffer(data, np.int32, len(data) // 4)
            if not len(hint):
                if self.error:
                    raise RunError(f"hints could not be made: {self.error}") from self.error
                time.sleep(0.0005)
                continue
            self.gated += int((hint >= 0).sum())
            end = self.loaded + len(hint)
            hint_on_device = to_device(self.run, hint)
            stream.hints[self.loaded:end] = hint_on_device.clamp_min(0)
            stream.boost[self.loaded:end] = (hint_on_device >= 0) * self.cfg.token_boost
            self.loaded = end
        self.waited_s += time.perf_counter() - start

    def close(self, stream: Stream) -> None:
        """Read what is left and log the totals."""
        self.load(stream, self.total)
        if self.maker:
            self.maker.join()
        self.file.close()
        self.run.log(f"ngram_tilt:hints total={self.total} gated={self.gated} token_gate={self.gated} "
                     "within_gate=0 word_gate=0 agree2plus=0")
        self.run.log(f"ngram_tilt:precompute_done elapsed={self.made_s:.2f}s total_targets={self.total}")


def to_device(run: Run, x: np.ndarray) -> Tensor:
    """A copy on the run's device that waits for nothing: its source is pinned, and freed once read."""
    copy = torch.from_numpy(x.copy())
    return copy.pin_memory().to(run.device, non_blocking=True) if run.device.type == "cuda" else copy


# --- 13 test-time training ----------------------------------------------------------------------------------
# Documents are scored chunk by chunk; only then their own adapters, and once the base, learn from them [TTT].

def chunk_window(pred_len: np.ndarray, index: int, chunk: int, window: int) -> tuple[np.ndarray, ...]:
    """The window of chunk `index` of documents with pred_len targets; the last one ends with its document.
    Returns its first token within the document, its length, where in it the chunk begins, and the chunk's
    targets; (documents,) each."""
    end = np.minimum(chunk * (index + 1), pred_len)
    start = np.maximum(0, end - window)
    return start, end - start, chunk * index - start, end - chunk * index


DrawA = Callable[[str, int, tuple[int, ...]], Tensor]     # (kind, slot, shape) -> initial A


class AdapterBank:
    """Adapters of the documents of one batch and their optimizer state; documents are rows and never mix.

    A document's values are one row of P, so that one kernel updates them all. For each execution slot: A of
    q, k, v and o, which read the same input, one below the other as (kinds * R, D); B of each, (out, R); A
    and B of the MLP. Last A and B of the head.

    params      (rows, P) fp32
    low         (rows, P) their copy in the compute dtype, which the model reads; if that is fp32, `params`
    exp_avg_sq  (rows, P) fp32, AdamW's second moment; the first is the gradient itself, as TTT_BETA1 is 0
    steps       (1,) int64, AdamW steps of this batch"""

    def __init__(self, cfg: Config, num_slots: int, rows: int, device: torch.device | str = "cpu",
                 dtype: torch.dtype = torch.float32) -> None:
        self.cfg, self.num_slots = cfg, num_slots
        R, D = cfg.ttt_lora_rank, cfg.model_dim
        out = {"q": D, "k": cfg.kv_dim, "v": cfg.kv_dim, "o": D, "mlp": D, "head": cfg.vocab_size}
        self.kinds = [kind for kind in ("q", "k", "v", "o", "mlp") if getattr(cfg, f"ttt_{kind}_lora", True)]
        # (kind, slot, letter) of every matrix in the order of its place in a row, and its shape.
        keys = [(kind, slot, letter) for slot in range(num_slots) for kinds in ("qkvo", ("mlp",))
                for letter in "AB" for kind in kinds if kind in self.kinds]
        keys += [("head", num_slots, letter) for letter in "AB"]
        self.layout = {key: (R, D) if key[2] == "A" else (out[key[0]], R) for key in keys}
        self.sizes = [math.prod(shape) for shape in self.layout.values()]
        self.params = torch.zeros(rows, sum(self.sizes), device=device)
        self.low = self.params if dtype == torch.float32 else torch.zeros_like(self.params, dtype=dtype)
        self.exp_avg_sq = torch.zeros_like(self.params)
        self.steps = torch.zeros(1, dtype=torch.int64, device=device)

    def parts(self, flat: Tensor) -> dict[tuple[str, int, str], Tensor]:
        """Views of (rows, P): every matrix as (rows, *shape) by kind, slot and letter. Backward, the split is
        one concatenation."""
        return {key: part.unflatten(1, shape)
                for (key, shape), part in zip(self.layout.items(), flat.split(self.sizes, 1))}

    def adapters(self, flat: Tensor) -> tuple[list[LayerAdapters], LowRank]:
        """The adapters of every slot and of the head, over (rows, P)."""
        parts, scale = self.parts(flat), self.cfg.ttt_lora_alpha / self.cfg.ttt_lora_rank

        def made(kind: str, slot: int) -> LowRank:
            A, B = (mark_varying(parts[kind, slot, letter], 0) for letter in "AB")
            return LowRank(A, B, scale)

        slots = range(self.num_slots)
        return ([LayerAdapters(**{kind: made(kind, slot) for kind in self.kinds}) for slot in slots],
                made("head", self.num_slots))

    @torch.no_grad()
    def start(self, rows: int, draw: DrawA | None) -> None:
        """Begin a batch of `rows` documents: B and optimizer state zero, A drawn, or kept if draw is None."""
        self.steps.zero_()
        self.exp_avg_sq[:rows].zero_()
        for (kind, slot, letter), part in self.parts(self.params[:rows]).items():
            if letter == "B":
                part.zero_()
            elif draw is not None:
                part.copy_(draw(kind, slot, tuple(part.shape)))
        self.low[:rows].copy_(self.params[:rows])

    @torch.no_grad()
    def update(self, grads: Tensor, learns: Tensor) -> None:
        """One AdamW step of the first rows from their gradients (rows, P); those with learns (rows,) 0 stay
        as they are, until `settle`."""
        cfg, rows = self.cfg, len(grads)
        self.steps += 1
        unbias = (1 - cfg.ttt_beta2 ** self.steps.double()).rsqrt().float()
        adapter_adamw(self.params[:rows], self.low[:rows], self.exp_avg_sq[:rows], grads, learns, unbias,
                      cfg.ttt_lora_lr, cfg.ttt_weight_decay, cfg.ttt_beta2, ADAPTER_EPS)

    @torch.no_grad()
    def settle(self, missed_steps: Tensor) -> None:
        """Give the first documents (rows,) the weight decay of the steps after they were finished."""
        factor = (1 - self.cfg.ttt_lora_lr * self.cfg.ttt_weight_decay) ** missed_steps.double()
        for (kind, slot, letter), part in self.parts(self.params[:len(missed_steps)]).items():
            if letter == "A":                                         # B ends with its batch
                part.mul_(factor.float()[:, None, None])


ADAPTER_EPS = 1e-10


def plain_adapter_adamw(params: Tensor, low: Tensor, exp_avg_sq: Tensor, grads: Tensor, learns: Tensor,
                        unbias: Tensor, lr: float, weight_decay: float, beta2: float, eps: float) -> None:
    """The definition of adapter_adamw: AdamW with beta1 = 0, in place on rows with learns (rows,) != 0.
    params, exp_avg_sq fp32, low, grads in the compute dtype, all (rows, P); unbias (1,) fp32 is
    (1 - beta2 ** step) ** -0.5."""
    is_learning = (learns != 0)[:, None]
    grads = grads.float()
    second = exp_avg_sq * beta2 + grads * grads * (1 - beta2)
    stepped = params * (1 - lr * weight_decay) - lr * grads / (second.sqrt() * unbias + eps)
    exp_avg_sq.copy_(torch.where(is_learning, second, exp_avg_sq))
    params.copy_(torch.where(is_learning, stepped, params))
    low.copy_(params)


class Stream(NamedTuple):
    """The validation split on the device, and what is known of each target before it is scored."""
    tokens: Tensor           # (N,) int32
    byte_counts: Tensor      # (N,) int32, by token position
    hints: Tensor            # (N - 1,) int32, in the certified order
    boost: Tensor            # (N - 1,) fp32, in the certified order; 0 where no hint is used


def chunk_gradients(model: GPT, bank: AdapterBank, tokens_BT: Tensor, at_BC: Tensor, answers_BC: Tensor,
                    hints_BC: Tensor, learns_B: Tensor, learn: bool,
                    cast: Any = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Forward, score and gradient of one chunk of each document, with the adapters in the bank's first rows.

    tokens_BT   windows, int64, padded on the right; every row is one causal sequence
    at_BC       positions of the chunk in its window, int64; only there are logits made
    answers_BC  targets, int64; hints_BC hinted tokens, int64
    learns_B    1 where the document has a later chunk, else 0
    cast        as in row_gradients
    Returns nll and log-probability of the hints, (B, C) fp32, detached, and (B, P) in the compute dtype the
    gradient of the sum over learning documents of their mean nll; None unless `learn`.
    """
    B, C = at_BC.shape
    leaf = mark_varying(bank.low[:B].detach().requires_grad_(), 0)
    # With compiled graphs also a forward pass alone keeps gradients on: then it needs no graphs of its own.
    with torch.set_grad_enabled(learn or bank.cfg.compile):
        slots, head = bank.adapters(leaf)
        hidden = model(tokens_BT, looping=True, adapters=slots, sizes_vary=bank.cfg.compile)
        hidden = hidden.gather(1, at_BC[..., None].expand(-1, -1, hidden.shape[-1]))
        nll, log_q = model.score(hidden.flatten(0, 1), answers_BC.flatten(), hints_BC.flatten(),
                                 head(hidden).flatten(0, 1))
        nll = nll.view(B, C)
        grads = torch.autograd.grad((nll.mean(1) * learns_B).sum(), leaf)[0] if learn else None
    return nll.detach(), log_q.detach().view(B, C), grads


TABLE_STEPS = 256            # chunk steps of a batch whose places are on the device at one time
# Columns of that table, per step and row; int64. `place` counts the targets scored before the chunk.
ChunkTable = namedtuple("ChunkTable", "begin size offset count place learns")


class Scorer:
    """All that a chunk step reads and writes, at fixed addresses: a step is a function of (rows, width,
    learn) alone, and the host reads nothing back. `steps` runs a step, here the definition itself."""

    def __init__(self, cfg: Config, run: Run, model: GPT, num_tokens: int, *, keep_log: bool = False,
                 buckets: Buckets | None = None) -> None:
        """Room for a stream of num_tokens. Steps are padded to `buckets`, or not at all. keep_log keeps every
        banked score in the order of banking: the first `log_size` of log_target, log_nll and log_tilt."""
        self.cfg, self.run, self.model, self.buckets = cfg, run, model, buckets
        zeros = functools.partial(torch.zeros, device=run.device)
        self.stream = Stream(*(zeros(num_tokens, dtype=torch.int32) for _ in range(3)), zeros(num_tokens))
        self.cast = model.ops.cast(model)                 # of the base weights; see renew_cast
        num_slots = sum(map(len, execution_order(cfg, True)))
        self.bank = AdapterBank(cfg, num_slots, cfg.ttt_batch_size, run.device, model.compute_dtype)
        self.meter = BpbMeter(run)
        self.table = zeros(TABLE_STEPS, len(ChunkTable._fields), cfg.ttt_batch_size, dtype=torch.int64)
        self.index = zeros(1, dtype=torch.int64)          # the chunk of every document that is scored next
        log_room = num_tokens if keep_log else 0          # the last entry takes what is not scored
        self.log_target = zeros(log_room, dtype=torch.int64)
        self.log_nll = zeros(log_room, dtype=torch.float64)
        self.log_tilt = zeros(log_room, 4)                # what tilt made log_nll of
        self.log_size = zeros(1, dtype=torch.int64)
        self.steps: Callable[[int, int, bool], None] = self.step

    def load(self, tokens: np.ndarray, byte_counts: np.ndarray) -> None:
        for buffer, values in zip(self.stream, (tokens, byte_counts)):
            buffer[:len(values)] = to_device(self.run, values.astype(np.int32))

    def clear(self) -> None:
        """Forget all that has been scored and learnt."""
        bank = self.bank
        for tensor in (bank.params, bank.low, bank.exp_avg_sq, bank.steps, self.meter.sums, self.table,
                       self.index, self.log_target, self.log_nll, self.log_tilt, self.log_size):
            tensor.zero_()

    def renew_cast(self) -> None:
        """Take over base weights that have changed."""
        self.model.ops.cast(self.model, self.cast)

    def step(self, rows: int, width: int, learn: bool) -> None:
        """Score one chunk of each of the first `rows` documents, then learn from it. Rows that are finished,
        or beyond the batch, count nothing and learn nothing."""
        stream, C = self.stream, self.cfg.ttt_chunk_size
        row = ChunkTable(*self.table.index_select(0, self.index % TABLE_STEPS)[0, :, :rows, None].unbind())
        last = (row.size - 1).clamp_min(0)
        position = torch.arange(width, device=self.run.device)
        window = stream.tokens[row.begin + torch.minimum(position, last)]
        inputs = torch.where(position < row.size, window, 0).long()
        within = torch.arange(C, device=self.run.device)
        at = torch.minimum(row.offset + within, last)                 # (rows, C) positions in the window
        scored = within < row.count
        place = row.place + torch.minimum(within, (row.count - 1).clamp_min(0))
        target = row.begin + at                                       # target i is token i + 1
        answers, hints = stream.tokens[target + 1].long(), stream.hints[place].long()
        learns = row.learns[:, 0]
        # 1. scored by weights that never saw the chunk
        gradients = self.model.ops.chunk_gradients or chunk_gradients
        nll, log_q, grads = gradients(self.model, self.bank, inputs, at, answers, hints, learns, learn,
                                      self.cast)
        with torch.no_grad():
            parts = nll, log_q, answers == hints, stream.boost[place]
            tilted = tilt(*parts)
            # 2. banked; it is never revised
            self.meter.add(tilted, stream.byte_counts[target + 1], scored)
            if len(self.log_target):
                self.add_to_log(target, tilted, torch.stack([x.float() for x in parts], -1), scored)
            # 3. only then learn from it
            if grads is not None:
                self.bank.update(grads, learns)
            self.index += 1

    def add_to_log(self, target: Tensor, nll: Tensor, parts: Tensor, scored: Tensor) -> None:
        scored, last = scored.flatten(), len(self.log_target) - 1
        spot = torch.where(scored, self.log_size + scored.cumsum(0) - 1, last)
        spot = spot.clamp_max(last)                       # warm-up may bank more than a small split holds
        self.log_target[spot] = target.flatten()
        self.log_nll[spot] = nll.flatten().double()
        self.log_tilt[spot] = parts.flatten(0, -2)
        self.log_size += scored.sum()

    def follow(self, docs: Documents, scored: ScoredChunks, hints: HintFeed | None = None) -> None:
        """The documents of the stream, the certified order of their chunks, and who brings the hints."""
        counts = num_chunks(docs.length, self.cfg.ttt_chunk_size)
        self.docs, self.hints, self.first_chunk = docs, hints, np.cumsum(counts) - counts
        # Targets before chunk k of document d in the certified order, at [first_chunk[d] + k].
        self.places = np.empty(len(scored.size), np.int64)
        self.places[self.first_chunk[scored.doc] + scored.chunk] = np.cumsum(scored.size) - scored.size

    def upload_table(self, members: Sequence[int], first: int) -> np.ndarray:
        """Bring the places of the next chunks of a batch to the device. Returns how many targets of the
        certified order each step needs the hints of."""
        C, pred_len = self.cfg.ttt_chunk_size, self.docs.length[members] - 1
        counts = num_chunks(pred_len + 1, C)
        index = np.arange(first, min(first + TABLE_STEPS, counts.max()))[:, None]
        start, length, offset, count = chunk_window(pred_len, index, C, self.cfg.ttt_eval_seq_len)
        count = np.maximum(count, 0)                                  # finished documents have none
        place = self.places[self.first_chunk[members] + np.minimum(index, counts - 1)]
        learns = C * (index + 1) < pred_len
        columns = ChunkTable(self.docs.start[members] + start, length, offset, count, place, learns)
        table = np.zeros((len(index), *self.table.shape[1:]), np.int64)
        table[:, :, :len(members)] = np.stack(np.broadcast_arrays(*columns), axis=1)
        self.table[:len(index)] = to_device(self.run, table)
        return (place + count).max(axis=1)

    def score_batch(self, batch: Batch, draw: DrawA | None,
                    may_learn: Callable[[int], bool] = lambda start_us: True) -> None:
        """Score all chunks of a batch, each before anything has learnt from it; adapters learn after every
        chunk while may_learn(planned start of the step). draw gives the initial A; None keeps it."""
        members, shapes = list(batch.docs), batch.steps[:2]
        if self.buckets is not None:
            shapes = (pad_to(sizes, x) for sizes, x in zip(self.buckets, shapes))
        rows, widths, starts_us = (x.tolist() for x in (*shapes, batch.steps.start_us))
        self.bank.start(len(members), draw)
        self.index.zero_()
        for step, start_us in enumerate(starts_us):
            self.run.beat()
            if step % TABLE_STEPS == 0:
                needed = self.upload_table(members, step)
            if self.hints is not None:
                self.hints.load(self.stream, int(needed[step % TABLE_STEPS]))
            has_next = step + 1 < len(starts_us)
            self.steps(rows[step], widths[step], may_learn(start_us) and has_next)
        counts = num_chunks(self.docs.length[members], self.cfg.ttt_chunk_size)
        self.bank.settle(to_device(self.run, counts.max() - counts))


def lane_draws(cfg: Config, run: Run, lane: int) -> DrawA:
    """Initial values of A, uniform(±1/sqrt(in)), from a generator of the lane's own."""
    generator = run.generator(lane)
    return lambda kind, slot, shape: torch.empty(shape, device=run.device).uniform_(
        -1 / math.sqrt(shape[-1]), 1 / math.sqrt(shape[-1]), generator=generator)


FORWARD_SHARE = 0.43         # cost of a chunk step that only scores, relative to one that learns (at most)
CHECKPOINTS = 16             # times in a phase at which ranks agree whether adaptation must stop
BUDGET_SHARE = 0.97          # part of the evaluation budget that a prediction may fill


class LearningLimit:
    """Up to which step adapters and base learn, so that the evaluation ends within EVAL_WALLCLOCK_SECONDS.
    `last` is (phase, planned start, lane) of the last learning step: steps before it in the certified order
    learn, later ones only score. TTT_STOP_AFTER gives it beforehand and so repeats a run that was cut short.

    At checkpoint k of a phase each rank predicts when it would end if adaptation stopped at checkpoint k + 2,
    the next but one. At checkpoint k + 1 all know the latest prediction; if that is too late, adaptation
    stops there. So nobody waits for a rank that is less than a checkpoint behind. A rank with several lanes
    predicts in its first one, at its end for all checkpoints that are left, and goes on meanwhile."""

    def __init__(self, cfg: Config, run: Run, phases: Sequence[Phase], scored: ScoredChunks,
                 timer: Timer) -> None:
        self.cfg, self.run, self.scored, self.timer = cfg, run, scored, timer
        # Planned time of every lane in each phase; a rank's lanes run one after the other.
        self.lanes_us = [[lane[-1].end_us if lane else 0 for lane in phase] for phase in phases]
        self.slowdown, self.last, self.phase = 1.0, (math.inf,), 0
        self.is_open = not cfg.ttt_stop_after and cfg.eval_wallclock_seconds > 0
        if cfg.ttt_stop_after:
            doc, chunk = map(int, cfg.ttt_stop_after.split(":"))
            found = np.flatnonzero((scored.doc == doc) & (scored.chunk == chunk))
            if not len(found):
                raise ConfigError(f"TTT_STOP_AFTER={cfg.ttt_stop_after}: expected document:chunk, found none "
                                  f"such in {scored.doc.max() + 1} documents; copy it from the log to repeat")
            self.last = tuple(int(x[found[0]]) for x in (scored.phase, scored.start_us, scored.lane))

    def begin_phase(self, phase: int) -> None:
        self.phase, self.checkpoint, self.at_us = phase, 0, 0
        self.interval_us = -(-max(self.lanes_us[phase]) // CHECKPOINTS)
        self.latest: list[Callable[[], float]] = []       # predictions of all ranks, by checkpoint
        self.phase_start_s = self.timer.seconds()

    def may_learn(self, lane: int, start_us: int) -> bool:
        self.pass_checkpoints(start_us)
        return (self.phase, start_us, lane) <= self.last

    def base_may_learn(self) -> bool:
        """After the current phase."""
        return (self.phase + 1,) <= self.last

    def end_lane(self) -> None:
        """Every step of a lane has been queued: other ranks must not wait for what this one does next."""
        self.at_us = self.lanes_us[self.phase][self.run.rank]
        self.predict_up_to(CHECKPOINTS)

    def end_phase(self) -> None:
        """Every step of the phase has been queued; all ranks learn whether adaptation stopped in it."""
        self.pass_checkpoints(math.inf)
        for latest in self.latest:
            latest()

    def pass_checkpoints(self, at_us: float) -> None:
        """Before a step that was planned to begin at at_us, in any lane."""
        while self.is_open and self.checkpoint <= CHECKPOINTS and self.checkpoint * self.interval_us <= at_us:
            self.at_us = max(self.at_us, min(at_us, self.lanes_us[self.phase][self.run.rank]))
            self.predict_up_to(self.checkpoint)
            latest = self.latest[self.checkpoint - 1]() if self.checkpoint else 0.0
            if latest > BUDGET_SHARE * self.cfg.eval_wallclock_seconds:
                self.stop(self.checkpoint * self.interval_us, latest)
            self.checkpoint += 1

    def predict_up_to(self, checkpoint: int) -> None:
        """Take part in the predictions up to this checkpoint's: every rank in all of a phase, or in none."""
        while self.is_open and len(self.latest) <= min(checkpoint, CHECKPOINTS - 1):
            self.latest.append(self.run.max_later(self.predict_s((len(self.latest) + 2) * self.interval_us)))

    def predict_s(self, stop_us: int) -> float:
        """When this rank would end if adaptation stopped at planned time stop_us of this phase."""
        elapsed_s = self.timer.seconds() - self.phase_start_s
        if self.at_us > 0:
            self.slowdown = 1e6 * elapsed_s / self.at_us
        rank, ranks = self.run.rank, self.run.world_size
        mine_us = self.lanes_us[self.phase][rank::ranks]
        learning_us = sum(min(lane_us, stop_us) for lane_us in mine_us)
        scoring_us = sum(mine_us) - learning_us
        for lanes_us in self.lanes_us[self.phase + 1:]:
            scoring_us += max(sum(lanes_us[rank::ranks]) for rank in range(ranks))
        return self.phase_start_s + self.slowdown * (learning_us + FORWARD_SHARE * scoring_us) / 1e6

    def stop(self, at_us: int, predicted_s: float) -> None:
        self.predict_up_to(CHECKPOINTS)
        self.is_open, self.last = False, (self.phase, at_us - 1, math.inf)
        scored = self.scored
        has_learnt = (scored.phase < self.phase) | ((scored.phase == self.phase) & (scored.start_us < at_us))
        k = int(has_learnt.sum()) - 1
        self.run.log(f"ttt adaptation_stopped phase:{self.phase + 1} chunks_learnt:{k + 1}/{len(scored.doc)} "
                     f"predicted_s:{predicted_s:.1f} budget_s:{self.cfg.eval_wallclock_seconds:g} "
                     f"replay:TTT_STOP_AFTER={scored.doc[k]}:{scored.chunk[k]}")


def score_phase(scorer: Scorer, phase: Phase, draws: Sequence[DrawA], label: str = "",
                limit: LearningLimit | None = None) -> None:
    """Run this rank's lanes of one phase, one after the other, with the draws of each; a label logs them."""
    run = scorer.run
    mine = range(run.rank, len(phase), run.world_size)
    total, done = sum(len(phase[lane]) for lane in mine), 0
    planned_us, done_us = sum(phase[lane][-1].end_us for lane in mine if phase[lane]), 0
    start = time.perf_counter()
    for lane in mine:
        may_learn = functools.partial(limit.may_learn, lane) if limit else lambda start_us: True
        for batch in phase[lane]:
            keeps_a = batch.carries and scorer.cfg.ttt_warm_start_a
            scorer.score_batch(batch, None if keeps_a else draws[lane], may_learn)
            done += 1
            done_us += batch.end_us - int(batch.steps.start_us[0])
            if label and run.rank == 0:
                nats, _, num_bytes = scorer.meter.sums.tolist()
                bpb = nats / math.log(2) / max(num_bytes, 1)
                longest, shortest = scorer.docs.length[[batch.docs[0], batch.docs[-1]]]
                run.log(f"ttt batch:{done}/{total} bpb:{bpb:.6f} documents:{len(batch.docs)} "
                        f"doc_len:{shortest}-{longest} lane:{lane} phase:{label}")
                left_s = (time.perf_counter() - start) * (planned_us - done_us) / done_us
                run.progress(f"phase {label}: batch {done}/{total}, bpb {bpb:.4f}, {left_s:.0f} s left")
        if limit:
            limit.end_lane()
    if limit:
        limit.end_phase()


def rank_share(bounds: np.ndarray, rank: int, world_size: int) -> tuple[int, int]:
    """[begin, end) of this rank's part of a row, cut only at the segment bounds [0, ..., tokens], in nearly
    equal lengths: no part is longer than an even one and a segment."""
    ideal = np.arange(world_size + 1) * bounds[-1] / world_size
    cuts = bounds[np.abs(bounds[:, None] - ideal).argmin(0)]
    return int(cuts[rank]), int(cuts[rank + 1])


BASE_SEGMENTS = 512          # segments of a rank's share that fixed shapes have room for
# longer shares keep a GPU busy without a CUDA graph, and would cost it memory
BASE_CAPTURE_TOKENS = 20_000


class BaseAdaptation:
    """The gradient of a rank's share of one SGD step over all base weights, at fixed addresses and shapes.

    inputs, targets  (length,) int64: the token before the share where there is one, which only SmearGate
                     looks at, then the share, then padding
    weights          (length,) fp32: 1 / tokens of the whole row on the share, 0 elsewhere
    bounds           (BASE_SEGMENTS,) int32 cu_seqlens, the last one repeated
    flat             (parameters,) fp32 gradient of every trained parameter, one after the other"""

    def __init__(self, cfg: Config, run: Run, model: GPT) -> None:
        self.cfg, self.run, self.model = cfg, run, model
        S = cfg.ttt_eval_seq_len
        row_tokens = min(cfg.global_ttt_batch_seqs, cfg.global_ttt_chunk_tokens // S) * S
        length = 1 + min(row_tokens, -(-row_tokens // run.world_size) + S)
        zeros = functools.partial(torch.zeros, device=run.device)
        self.inputs, self.targets = (zeros(length, dtype=torch.int64) for _ in range(2))
        self.weights, self.bounds = zeros(length), zeros(BASE_SEGMENTS, dtype=torch.int32)
        self.names, self.trained = zip(*((name, p) for name, p in model.named_parameters()
                                         if p.requires_grad))
        self.flat, self.momentum = (zeros(sum(p.numel() for p in self.trained)) for _ in range(2))
        self.replay: Callable[[], None] | None = None                 # a captured `gradient`

    def load(self, row: np.ndarray) -> None:
        """Take this rank's share of a row of tokens (length + 1,)."""
        S, length = self.cfg.ttt_eval_seq_len, len(self.inputs)
        bounds = segment_bounds(row[:-1], S, pad=1)
        begin, end = rank_share(bounds, self.run.rank, self.run.world_size)
        lead = int(begin > 0)
        size = end - begin + lead
        tokens, weights = np.zeros((2, length), np.int64), np.zeros(length, np.float32)
        tokens[:, :size] = row[begin - lead:end], row[begin - lead + 1:end + 1]
        weights[lead:size] = 1 / (len(row) - 1)
        inside = bounds[(bounds > begin) & (bounds < end)] - begin + lead
        local = np.concatenate([np.arange(lead), [lead], inside, np.arange(size, length, S), [length]])
        local = np.pad(local, (0, max(BASE_SEGMENTS - len(local), 0)), constant_values=length)
        for buffer, values in ((self.inputs, tokens[0]), (self.targets, tokens[1]), (self.weights, weights)):
            buffer.copy_(to_device(self.run, values))
        self.segments = to_device(self.run, local.astype(np.int32))
        self.fits = len(local) == BASE_SEGMENTS           # else very many short documents: not to be replayed
        if self.fits:
            self.segments = self.bounds.copy_(self.segments)

    def gradient(self) -> None:
        """Fill `flat`. Eager: the shapes are those of no other graph."""
        row = Row(self.inputs, self.targets, self.segments)
        _, grads = self.model.ops.row_gradients(self.model, row, looping=True,
                                                segment_cap=self.cfg.ttt_eval_seq_len, weights=self.weights)
        # Parameters that this model's shape leaves unused have none.
        grads = [grads[name] if name in grads else torch.zeros_like(p)
                 for name, p in zip(self.names, self.trained)]
        self.flat.copy_(torch.cat([grad.flatten() for grad in grads]))

    @torch.no_grad()
    def step(self, row: np.ndarray, lr: float) -> None:
        """One step of SGD with momentum on a row of tokens (length + 1,), its gradient clipped."""
        self.load(row)
        with torch.enable_grad():
            (self.replay if self.replay and self.fits else self.gradient)()
        self.run.sum(self.flat)
        norm = torch.linalg.vector_norm(self.flat)
        self.flat *= (self.cfg.global_ttt_grad_clip / (norm + 1e-6)).clamp_max(1.0)
        self.momentum.mul_(self.cfg.global_ttt_momentum).add_(self.flat)
        parts = self.momentum.split([p.numel() for p in self.trained])
        moves = [part.view_as(p) for part, p in zip(parts, self.trained)]
        torch._foreach_add_(self.trained, moves, alpha=-lr)
        torch._foreach_clamp_min_([self.model.softcap_pos, self.model.softcap_neg], 1.0)


def adapt_base(cfg: Config, run: Run, model: GPT, tokens: np.ndarray, docs: Documents, chosen: np.ndarray,
               base: BaseAdaptation | None = None) -> int:
    """Train all base weights with SGD on documents that have been scored. Returns the number of steps.
    The documents are joined in the given order and cut in chunks; the last chunk is skipped. Ranks take
    contiguous runs of whole segments of a chunk; gradients are weighted by tokens, so the split does not
    matter."""
    joined = np.concatenate([tokens[s:s + n] for s, n in zip(docs.start[chosen], docs.length[chosen])])
    C, S, seqs = cfg.global_ttt_chunk_tokens, cfg.ttt_eval_seq_len, cfg.global_ttt_batch_seqs
    num = -(-(len(joined) - 1) // C)
    steps = [(chunk, first) for chunk in range(num - 1) for first in range(0, C // S, seqs)]
    base = base or BaseAdaptation(cfg, run, model)
    for chunk, first in steps:
        run.beat()
        at, size = chunk * C + first * S, min(seqs, C // S - first) * S
        base.step(joined[at:at + size + 1], global_sgd_lr(cfg.global_ttt_lr, num, chunk))
    return len(steps)


def step_keys(cfg: Config, buckets: Buckets) -> list[tuple[int, int, bool]]:
    """(rows, width, learn) of every padded chunk step that a plan may need, the largest first."""
    smallest_rows = [1, *(size + 1 for size in buckets.rows)]
    smallest_width = [1, *(size + 1 for size in buckets.windows)]
    keys = [(rows, width, learn) for rows, least in zip(buckets.rows, smallest_rows)
            for width, narrowest in zip(buckets.windows, smallest_width) for learn in (True, False)
            if least * narrowest <= BATCH_TOKENS]
    return sorted(keys, key=lambda key: (key[0] * key[1], key), reverse=True)


def warm_up_ttt(cfg: Config, run: Run, model: GPT, num_tokens: int) -> tuple[Scorer, BaseAdaptation | None]:
    """What scores num_tokens tokens and adapts the base; all graphs are made on random tokens."""
    timer = Timer(run)
    is_cuda = run.device.type == "cuda"
    sizes = cfg.ttt_batch_size, cfg.ttt_eval_seq_len, cfg.ttt_chunk_size
    buckets = step_buckets(*sizes) if cfg.compile or is_cuda else None
    scorer = Scorer(cfg, run, model, num_tokens, keep_log=cfg.audit, buckets=buckets)
    base = None
    if cfg.phased_ttt_prefix_docs:
        base = BaseAdaptation(cfg, run, model)
    if buckets is not None:
        generator = np.random.default_rng(cfg.seed)
        random_tokens = generator.integers(2, cfg.vocab_size, num_tokens)
        scorer.load(random_tokens, np.ones_like(random_tokens))
        size = min(cfg.ttt_eval_seq_len, num_tokens - 1)
        count = min(cfg.ttt_chunk_size, size)
        columns = ChunkTable(begin=0, size=size, offset=0, count=count, place=0, learns=1)
        scorer.table.copy_(torch.tensor(columns, device=run.device)[:, None].expand_as(scorer.table))
        keys = step_keys(cfg, buckets)
        if base:
            base.load(generator.integers(2, cfg.vocab_size, len(base.inputs)))
            if is_cuda and cfg.cuda_graphs and len(base.inputs) <= BASE_CAPTURE_TOKENS:
                base.replay = CapturedSteps(run, base.gradient, [()])
            else:                                         # compiles its kernels here, not inside the clock
                with torch.enable_grad():
                    base.gradient()
    if is_cuda and cfg.cuda_graphs:
        # Steps that only score run what steps that learn have loaded, but for the loss.
        loads = [*(key for key in keys if key[2]), keys[-1]]
        scorer.steps = CapturedSteps(run, scorer.step, keys, loads)
    elif buckets is not None:                             # one graph serves all sizes
        scorer.step(buckets.rows[-1], buckets.windows[0], True)
        scorer.step(buckets.rows[0], buckets.windows[-1], True)
    scorer.clear()
    run.clocks["compile"] = seconds = timer.seconds()
    run.log(f"ttt_lora:compile warmup done ({seconds:.1f}s) elapsed_ms:{1000 * seconds:.0f}")
    return scorer, base


def evaluate_ttt(cfg: Config, run: Run, model: GPT, data: Dataset) -> Score:
    """The final score: every target once, in the certified order; the data are read inside its clock."""
    scorer, base = warm_up_ttt(cfg, run, model, data.val_tokens)
    run.barrier("scoring")
    made_before = graphs_made(scorer.steps)
    run.stage("scoring")
    timer = Timer(run)
    tokens, byte_counts = data.load_validation()
    docs, C = find_documents(tokens), cfg.ttt_chunk_size
    prefix = min(cfg.phased_ttt_prefix_docs, len(docs.start))
    phases = plan_batches(docs, batch_size=cfg.ttt_batch_size, lanes=LANES, max_tokens=BATCH_TOKENS,
                          max_chunks=BATCH_CHUNKS, prefix_docs=prefix, chunk=C, window=cfg.ttt_eval_seq_len)
    scored = certified_order(phases, docs, C)
    scorer.load(tokens, byte_counts)
    scorer.follow(docs, scored, HintFeed(cfg, run, tokens, docs, scored) if cfg.ngram_tilt_enabled else None)
    limit = LearningLimit(cfg, run, phases, scored, timer)
    run.log(f"ttt_phased: total_docs:{len(docs.start)} prefix_docs:{prefix} "
            f"suffix_docs:{len(docs.start) - prefix} num_phases:1 boundaries:[{prefix}]")
    log_plan(run, phases, timer)
    draws = [lane_draws(cfg, run, lane) for lane in range(LANES)]
    for number, phase in enumerate(phases):
        limit.begin_phase(number)
        score_phase(scorer, phase, draws, f"{number + 1}/{len(phases)}", limit)
        if number == 0 and len(phases) > 1 and limit.base_may_learn():
            run.barrier("base adaptation")
            phase_timer = Timer(run)
            chosen = select_prefix(scored, docs, C, prefix)
            steps = adapt_base(cfg, run, model, tokens, docs, chosen, base)
            scorer.renew_cast()
            run.log(f"ttt adapted_base documents:{len(chosen)} sgd_steps:{steps} "
                    f"elapsed_s:{phase_timer.seconds():.1f} eval_time_s:{timer.seconds():.1f}")
    run.barrier("the score")
    score, seconds = scorer.meter.result(), timer.seconds()
    run.clocks["eval"] = seconds
    made, missed = (b - a for a, b in zip(made_before, graphs_made(scorer.steps)))
    if scorer.hints is not None:
        scorer.hints.close(scorer.stream)
        run.log(f"ttt hints waited_ms:{1000 * scorer.hints.waited_s:.0f}")
    if run.device.type == "cuda":
        run.log(f"ttt peak_allocated_mib:{torch.cuda.max_memory_allocated(run.device) >> 20} "
                f"graphs_made_in_clock:{made} steps_without_graph:{missed}")
    if score.tokens != len(tokens) - 1:
        raise RuntimeError(f"scored {score.tokens:,} of {len(tokens) - 1:,} targets; "
                           "expected each exactly once")
    if cfg.audit:
        audit_order(run, scorer, scored)
    run.log(f"quantized_ttt_phased {score.log_fields(seconds)}")
    run.log(f"total_eval_time:{seconds:.1f}s total_eval_ms:{1000 * seconds:.0f}")
    if cfg.eval_wallclock_seconds and seconds > cfg.eval_wallclock_seconds:
        run.log(f"eval warning over_budget_s:{seconds - cfg.eval_wallclock_seconds:.3f} "
                f"budget_s:{cfg.eval_wallclock_seconds:g}")
    return score


def log_plan(run: Run, phases: Sequence[Phase], timer: Timer) -> None:
    """The plan's constants, and per phase the steps of the busiest lane and the planned time."""
    steps = [max(sum(len(batch.steps.rows) for batch in lane) for lane in phase) for phase in phases]
    planned_s = [max(lane[-1].end_us for lane in phase if lane) / 1e6 for phase in phases]
    batches = [sum(map(len, phase)) for phase in phases]
    run.log(f"ttt plan lanes:{LANES} batch_tokens:{BATCH_TOKENS} batch_chunks:{BATCH_CHUNKS} "
            f"batches:{batches} steps_per_lane:{steps} planned_s:{[round(x, 3) for x in planned_s]} "
            f"ready_ms:{1000 * timer.seconds():.0f}".replace(", ", ","))


def audit_order(run: Run, scorer: Scorer, scored: ScoredChunks) -> None:
    """Check that every rank has banked the targets of its lanes once and in the certified order. Write the
    whole order beside the log (int64, raw), and from every rank what its scores were made of (npz): target,
    lane, nll, log_q_hint, is_hit, boost, and the bytes of all targets of the rank."""
    order = targets_in_order(scored)
    lane = np.repeat(scored.lane + LANES * scored.phase, scored.size)
    places = np.argsort(lane, kind="stable")              # a rank banks phase by phase, lane by lane
    places = places[lane[places] % LANES % run.world_size == run.rank]
    expected, size = order[places], int(scorer.log_size)
    banked = scorer.log_target[:size].cpu().numpy()
    is_wrong = torch.tensor(int(not np.array_equal(banked, expected)), device=run.device)
    if num_wrong := run.sum(is_wrong).item():
        raise RuntimeError(f"audit: the targets of {num_wrong} of {run.world_size} ranks were not banked "
                           "once and in the certified order")
    nll, log_q_hint, is_hit, boost = scorer.log_tilt[:size].T.cpu().numpy()
    num_bytes = scorer.stream.byte_counts[torch.from_numpy(banked + 1).to(run.device)].sum().item()
    path, data = run.log_path.with_suffix(".order.bin"), order.astype("<i8").tobytes()
    try:
        np.savez(run.log_path.with_suffix(f".scores{run.rank}.npz"), target=banked, lane=lane[places] % LANES,
                 nll=nll, log_q_hint=log_q_hint, is_hit=is_hit > 0, boost=boost, bytes=num_bytes)
        if run.rank == 0:
            path.write_bytes(data)
    except OSError as error:                              # the score must not be lost
        print(f"warning: the audit's files of rank {run.rank} are not whole: {error}", file=sys.stderr)
    run.log(f"audit targets:{len(order)} order_file:{path} sha256:{hashlib.sha256(data).hexdigest()}")


# --- 14 pipeline --------------------------------------------------------------------------------------------
# The run as one visible sequence.

def shown_settings(cfg: Config) -> dict[str, str]:
    """Every setting as logs show it, sorted by name: logs are published, home folders are not."""
    shown = {name: str(int(value) if isinstance(value, bool) else value)
             for name, value in sorted(dataclasses.asdict(cfg).items())}
    for name in ("data_path", "tokenizer_path", "checkpoint_dir"):
        shown[name] = "/".join(Path(shown[name]).parts[-2:])
    return shown


def find_commit() -> str:
    """Commit id of this script with +dirty when the checkout differs from it; "none" outside a checkout."""
    git = ["git", "-C", str(REPO)]
    try:
        for command in (["ls-files", "--error-unmatch", Path(__file__).name],
                        ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+dirty"]):
            done = subprocess.run([*git, *command], capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def joined_pairs(data: Dataset) -> tuple[int, str]:
    """How many token pairs `prepare_caseops_data.py fuse` joined in these shards, and its list's SHA-256."""
    merges = (data.manifest or {}).get("merges", {"count": 0, "sha256": ""})
    return merges["count"], merges["sha256"]


def log_start(cfg: Config, run: Run, data: Dataset, tokenizer: Path, model: GPT) -> None:
    gpu = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else platform.machine()
    run.log(f"versions python:{platform.python_version()} torch:{torch.__version__} numpy:{np.__version__} "
            f"triton:{triton.__version__ if triton else 'none'} device:\"{gpu}\" world_size:{run.world_size} "
            f"compute_dtype:{str(run.compute_dtype).removeprefix('torch.')}")
    data_source = "manifest" if data.manifest else "unverified" if cfg.allow_unverified else "check_figures"
    count, digest = joined_pairs(data)
    joined = f" merges:{count} merges_sha256:{digest[:16]}" if count else ""
    run.log(f"run run_id:{run.run_id} date:{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d} "
            f"tokenizer:{tokenizer.name} data_source:{data_source}{joined}")
    changed = [f"{name.upper()}={shlex.quote(value)}" for name, value in shown_settings(cfg).items()
               if getattr(cfg, name) != getattr(Config, name)]
    run.log(f'run command:"{" ".join([*changed, "python", Path(sys.argv[0]).name])}"')
    if run.rank == 0:
        run.log(f"code commit:{find_commit()} code_sha256:{shipped_code().sha256} "
                f"source_sha256:{hashlib.sha256(program_source().encode()).hexdigest()} "
                f"source_file:logs/{run.run_id}.source.py.xz")
    run.log(f"train_shards: {len(data.train)}")
    run.log(f"val_tokens: {data.val_tokens}")
    run.log(f"model_params:{sum(p.numel() for p in model.parameters())}")


def check_ready(cfg: Config, run: Run, data: Dataset, model: GPT) -> None:
    """Try now whatever the run needs after training: compiler, and room for hints and for what it leaves."""
    if not cfg.prequant_only:
        compile_c(C_SOURCE)
    if run.rank != 0:
        return
    temporary, needed = Path(tempfile.gettempdir()), 4 * data.val_tokens
    makes_hints = cfg.ttt_enabled and cfg.ngram_tilt_enabled and not cfg.prequant_only
    if makes_hints and (room := shutil.disk_usage(temporary).free) < needed:
        raise RunError(f"{temporary}: expected room for {needed:,} bytes, found {room:,}; free some, or set "
                       "TMPDIR")
    if cfg.ttt_eval_only:                                 # leaves a log, no more
        return
    folder, needed = Path(cfg.checkpoint_dir), SIZE_LIMIT + 4 * sum(p.numel() for p in model.parameters())
    try:
        probe = folder / f".probe.{os.getpid()}"
        write_file(probe, b"probe")
        probe.unlink()
        room = shutil.disk_usage(folder).free
    except OSError as error:
        raise RunError(f"CHECKPOINT_DIR={folder}: expected a folder to write to, found: {error.strerror}; "
                       "correct the path or its permissions") from error
    if room < needed:
        raise RunError(f"CHECKPOINT_DIR={folder}: expected room for {needed:,} bytes, found {room:,}; free "
                       "some, or name another folder")


def build_model(cfg: Config, run: Run) -> GPT:
    """The model with the fastest functions that work here; what takes the host long goes on side by side."""
    with ThreadPoolExecutor() as pool:
        model = pool.submit(GPT, cfg, run.compute_dtype)
        if not cfg.prequant_only:
            pool.submit(compile_c, C_SOURCE)              # an error is raised again by check_ready
        ops = choose_ops(run)                             # imports the kernel libraries
    model = model.result()
    model.ops = ops
    return model.to(run.device)


def run_pipeline(cfg: Config, run: Run) -> None:
    data = Dataset.open(cfg)
    tokenizer = check_tokenizer(cfg, data)
    run.origin = {"tokenizer": sha256_of(tokenizer), "merges": joined_pairs(data)[1],
                  "code": shipped_code().sha256}
    torch.manual_seed(cfg.seed)
    for name, value in shown_settings(cfg).items():       # readers of logs take a run to begin here
        run.log(f"  {name}: {value}")
    model = build_model(cfg, run)
    for p in model.parameters():
        run.broadcast(p.data)                             # replicas start equal to the last bit
    check_ready(cfg, run, data, model)
    if not cfg.ttt_eval_only:
        data.check_values(cfg, run, "train")
    # Until the last step only headers of validation files are read, and what an earlier verify remembered.
    is_val_checked = data.check_values(cfg, run, "val", read=cfg.resumes)
    log_start(cfg, run, data, tokenizer, model)

    artifact_sha256 = ""
    if not cfg.ttt_eval_only:
        train_s = None
        if cfg.quantize_only:
            read_checkpoint(cfg, run, model)
            run.begin()
        else:
            run.begin()
            train_s = train(cfg, run, data, model)
            sort_hidden_units(model)
            run.stage("writing the checkpoint", math.inf)
            write_checkpoint(cfg, run, model)
        if not cfg.prequant_only:
            stats = calibrate(cfg, run, data, model, train_s)
        if not is_val_checked:
            run.stage("checking the validation split", START_LIMIT_S)
            data.check_values(cfg, run, "val")
        run.stage("compilation for the diagnostics", START_LIMIT_S)
        diagnose(cfg, run, model, data, "pre-quantization post-ema")
        if cfg.prequant_only:
            return
        run.stage("quantization", math.inf)
        artifact_sha256 = write_artifact(cfg, run, model, stats)
    run.stage("reading the artifact", START_LIMIT_S)
    read_artifact(cfg, run, model, artifact_sha256)       # score what ships, not what trained
    run.begin()
    run.stage("compilation for the diagnostics", START_LIMIT_S)
    diagnose(cfg, run, model, data, "quantized")
    if cfg.ttt_enabled:
        run.stage("compilation for scoring", START_LIMIT_S)
        evaluate_ttt(cfg, run, model, data)
        clocks_ms = {f"{name}_ms": 1000 * run.max_later(run.clocks.get(name, 0.0))()       # slowest ranks'
                     for name in ("eval", "load", "compile")}
        clocks_ms |= {"sum_ms": sum(clocks_ms.values()), "limit_ms": 1000 * cfg.eval_wallclock_seconds}
        run.log("eval " + " ".join(f"{name}:{clock:.0f}" for name, clock in clocks_ms.items()))


def calibrate(cfg: Config, run: Run, data: Dataset, model: GPT, train_s: float | None) -> Calibration:
    """Calibration statistics, and what the training clock has come to with them (None: no training)."""
    # Without training before it, calibration meets kernels that are not compiled yet.
    run.stage("calibration", START_LIMIT_S if train_s is None else HANG_LIMIT_S)
    timer = Timer(run)
    stats = collect_hessians(cfg, run, model, data.train, cfg.gptq_calibration_batches)
    calibration_s = timer.seconds()
    require_finite(run, "a calibration statistic", *stats.sums.values())
    run.log(f"GPTQ:collected {len(list_matrices(cfg))} Hessians in {calibration_s:.1f}s "
            f"elapsed_ms:{1000 * calibration_s:.0f}")
    if train_s is not None:
        clock_s, budget_s = train_s + calibration_s, cfg.max_wallclock_seconds
        run.log(f"train clock_s:{clock_s:.1f} steps_s:{train_s:.1f} calibration_s:{calibration_s:.1f} "
                f"budget_s:{budget_s:g} clock_ms:{1000 * clock_s:.0f} steps_ms:{1000 * train_s:.0f} "
                f"calibration_ms:{1000 * calibration_s:.0f}")
        if budget_s and clock_s > budget_s:
            run.log(f"train warning over_budget_ms:{1000 * (clock_s - budget_s):.0f} budget_s:{budget_s:g}")
    return stats


# === Fast paths: from here on everything is a faster way to do something above, and names what it replaces.


# --- 15 attention kernels -----------------------------------------------------------------------------------
# Faster attend_math, chosen once and logged: attend(q, k, v, cu_seqlens, max_seqlen) computes the same.

def attend_torch_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """FlashAttention-2 as torch ships it (CUDA, fp16/bf16)."""
    return torch.ops.aten._flash_attention_forward(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
                                                   0.0, True, False)[0]


def flash_attention_3() -> tuple[Attend, AttentionKernel]:
    from flash_attn_interface import flash_attn_varlen_func

    def attend_fa3(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True)
        return out[0] if isinstance(out, tuple) else out
    return attend_fa3, autograd_attention(attend_fa3)


def flash_attention_4() -> tuple[Attend, AttentionKernel]:
    """For the kernels each query head gets its own copy of its key/value head: then FlashAttention-4 needs
    neither zeros to add to nor a pass that sums over heads (measured on an H100, 98,304 tokens in segments of
    at most 2,048: 0.48 ms forward, 1.04 ms backward; with grouped heads 0.47 and 1.32)."""
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor,
                max_seqlen: int) -> tuple[Tensor, Tensor]:
        y, lse = _flash_attn_fwd(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
                                 max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, causal=True,
                                 return_lse=True)[:2]
        return y, lse

    def backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, cu_seqlens: Tensor,
                 max_seqlen: int) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = _flash_attn_bwd(q, k, v, y, dy, lse, causal=True, cu_seqlens_q=cu_seqlens,
                                     cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen,
                                     max_seqlen_k=max_seqlen)[:3]
        return dq, dk, dv

    # Custom ops with fake implementations keep torch.compile from looking inside the kernel library.
    forward_op = torch.library.custom_op("golf::fa4_fwd", forward, mutates_args=())
    backward_op = torch.library.custom_op("golf::fa4_bwd", backward, mutates_args=())

    @forward_op.register_fake
    def _(q, k, v, cu_seqlens, max_seqlen):
        return torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)

    @backward_op.register_fake
    def _(dy, q, k, v, y, lse, cu_seqlens, max_seqlen):
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    def setup(ctx, inputs, output):
        *tensors, ctx.max_seqlen = inputs
        ctx.save_for_backward(*tensors, *output)

    def differentiate(ctx, dy, dlse):
        q, k, v, cu_seqlens, y, lse = ctx.saved_tensors
        return *backward_op(dy.contiguous(), q, k, v, y, lse, cu_seqlens, ctx.max_seqlen), None, None

    forward_op.register_autograd(differentiate, setup_context=setup)

    def attend_fa4(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        return forward_op(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens, max_seqlen)[0]
    return attend_fa4, AttentionKernel(forward, backward, repeats_kv=True)


def choose_attention(run: Run) -> tuple[Attend, AttentionKernel]:
    """The fastest backend that works here, logged with the reason, with and without autograd; a slow one on
    CUDA needs ALLOW_SLOW=1."""
    if run.device.type == "cpu":
        run.log('attention backend:math reason:"no GPU"')
        return attend_math, autograd_attention(attend_math)
    capability = torch.cuda.get_device_capability(run.device)
    refused = []
    for name, load in (("flash_attention_3", flash_attention_3), ("flash_attention_4", flash_attention_4)):
        try:
            if capability < (9, 0) or (load is flash_attention_3 and capability[0] != 9):
                raise ImportError(f"needs compute capability 9.0, found {capability[0]}.{capability[1]}")
            attend, kernel = load()
        except (ImportError, OSError, AttributeError, RuntimeError, TypeError) as error:
            # Packages whose halves do not match fail in all of these ways.
            refused.append(f"{name}: {error}")
            continue
        run.log(f'attention backend:{name} reason:"{"; ".join(refused) or "first choice"}"')
        return attend, kernel
    if not run.cfg.allow_slow:
        raise ConfigError(f"no fast attention kernel ({'; '.join(refused)}); install requirements-gpu.txt, "
                          "or set ALLOW_SLOW=1 to run with torch's FlashAttention-2")
    run.log(f'attention backend:torch_varlen reason:"{"; ".join(refused)}"')
    return attend_torch_varlen, autograd_attention(attend_torch_varlen)


# --- 16 Triton kernels --------------------------------------------------------------------------------------
# The whole model forward and backward, without autograd, and trellis rounding. Streams are flattened: (N, D).
# First the kernels, each under the plain function that it replaces; then what calls them, in the order of a
# forward pass.
#
# What this saves is passes over memory: a layer's small functions read and write a stream of N*D values about
# 80 times when compiled one by one and about 40 times here. Sums over tokens (gradients of gains, scales and
# gates) are kept in registers while a program walks over its rows and added to memory once, at its end.

# mix_and_norm: z = mix0 * blend(x, skip) + mix1 * x0, n = ln_scale * z / rms(z); and the plain scaled norm of
# x. Forward, one pass reads x, skip and x0 and writes z and n. Backward, one pass takes the gradients of n
# and z, adds that of the attention gate's window, adds to the one sum of all gradients of x0, and writes
# those of x and of the skip. The backward of a norm needs z / rms(z): it is made again of what SUMS, the
# gradients of weights, need anyway; without SUMS, which leave out x0's gradient too, n / ln_scale stands in.
@jit
def _mix_norm_forward_kernel(x_ptr, x0_ptr, skip_ptr, mix_ptr, skip_weight_ptr, skip_gate_ptr, scale_ptr,
                             z_ptr, n_ptr, rstd_ptr, N, D: tl.constexpr, BLOCK_D: tl.constexpr,
                             ROWS: tl.constexpr, MIX: tl.constexpr, SKIP: tl.constexpr, KEEP: tl.constexpr,
                             EPS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_D)
    at = row[:, None].to(tl.int64) * D + col[None]
    inside = (row < N)[:, None] & (col < D)[None]
    z = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if SKIP:
        weight = tl.load(skip_weight_ptr + col, mask=col < D, other=0.0)[None]
        a = tl.sigmoid(tl.load(skip_gate_ptr + col, mask=col < D, other=0.0))[None]
        z = (1 - a) * weight * tl.load(skip_ptr + at, mask=inside, other=0.0).to(tl.float32) + a * z
        if KEEP == "blend":
            tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=inside)
    if MIX:
        mix = tl.load(mix_ptr + col, mask=col < D, other=0.0)[None]
        mix0 = tl.load(mix_ptr + D + col, mask=col < D, other=0.0)[None]
        z = mix * z + mix0 * tl.load(x0_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if KEEP == "mix":
            tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=inside)
    rstd = tl.rsqrt(tl.sum(z * z, 1) / D + EPS)
    n = z * (rstd * tl.load(scale_ptr))[:, None]
    tl.store(n_ptr + at, n.to(n_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < N)


@jit
def _mix_norm_backward_kernel(dn_ptr, n_ptr, rstd_ptr, scale_ptr, dres_ptr, res_scale_ptr, dextra_ptr,
                              dgate_ptr, attn_gate_ptr, x_ptr, x0_ptr, skip_ptr, mix_ptr, skip_weight_ptr,
                              skip_gate_ptr, dx_ptr, dx0_ptr, dskip_ptr, dmix_ptr, dweight_ptr,
                              dskip_gate_ptr, N, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
                              STAGES: tl.constexpr, HEADS: tl.constexpr, WINDOW: tl.constexpr,
                              MIX: tl.constexpr, RES: tl.constexpr, EXTRA: tl.constexpr, GATE: tl.constexpr,
                              SKIP: tl.constexpr, SKIP_IS_X: tl.constexpr, ADDS_X0: tl.constexpr,
                              SUMS: tl.constexpr):
    col = tl.arange(0, BLOCK_D)
    in_width = col < D
    scale = tl.load(scale_ptr)
    res_scale = 1.0
    if RES == "lane":
        res_scale = tl.load(res_scale_ptr)
    if MIX:
        mix = tl.load(mix_ptr + col, mask=in_width, other=0.0)[None]
        mix0 = tl.load(mix_ptr + D + col, mask=in_width, other=0.0)[None]
        dmix = tl.zeros((ROWS, BLOCK_D), tl.float32)
        dmix0 = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if SKIP:
        weight = tl.load(skip_weight_ptr + col, mask=in_width, other=0.0)[None]
        a = tl.sigmoid(tl.load(skip_gate_ptr + col, mask=in_width, other=0.0))[None]
        dweight = tl.zeros((ROWS, BLOCK_D), tl.float32)
        dskip_gate = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * D + col[None]
        inside = (row < N)[:, None] & in_width[None]
        dn = tl.load(dn_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if GATE:                        # the attention gate reads the first channels of n
            for head in tl.static_range(HEADS):
                gate = tl.load(attn_gate_ptr + head * WINDOW + col, mask=col < WINDOW, other=0.0)[None]
                dn += tl.load(dgate_ptr + row * HEADS + head, mask=row < N, other=0.0)[:, None] * gate
        rstd = tl.load(rstd_ptr + row, mask=row < N, other=0.0)[:, None]
        if SUMS:
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            x0 = tl.load(x0_ptr + at, mask=inside, other=0.0).to(tl.float32)
            blend = x
            if SKIP:
                skip = x
                if not SKIP_IS_X:
                    skip = tl.load(skip_ptr + at, mask=inside, other=0.0).to(tl.float32)
                blend = (1 - a) * weight * skip + a * x
            unit = (mix * blend + mix0 * x0) * rstd
        else:
            unit = tl.load(n_ptr + at, mask=inside, other=0.0).to(tl.float32) / scale
        dz = (dn - unit * (tl.sum(dn * unit, 1) / D)[:, None]) * (scale * rstd)
        if RES == "mixed":              # the residual stream goes on from the mixed z
            dz += tl.load(dres_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if SUMS:
            dmix += dz * blend
            dmix0 += dz * x0
            dx0 = mix0 * dz
            if ADDS_X0:
                dx0 += tl.load(dx0_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx0_ptr + at, dx0.to(dx0_ptr.dtype.element_ty), mask=inside)
        if MIX:
            dz = mix * dz
        if RES == "lane":               # the residual stream goes on from the lane before mixing
            dz += res_scale * tl.load(dres_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if SKIP:
            if SUMS:
                dweight += dz * (1 - a) * skip
                dskip_gate += dz * (x - weight * skip)
            dskip = (1 - a) * weight * dz
            dz = a * dz
            if SKIP_IS_X:
                dz += dskip
            else:
                tl.store(dskip_ptr + at, dskip.to(dskip_ptr.dtype.element_ty), mask=inside)
        if EXTRA:
            dz += tl.load(dextra_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dz.to(dx_ptr.dtype.element_ty), mask=inside)
    if SUMS:
        tl.atomic_add(dmix_ptr + col, tl.sum(dmix, 0), mask=in_width)
        tl.atomic_add(dmix_ptr + D + col, tl.sum(dmix0, 0), mask=in_width)
        if SKIP:
            slope = tl.sum(a * (1 - a), 0)
            tl.atomic_add(dweight_ptr + col, tl.sum(dweight, 0), mask=in_width)
            tl.atomic_add(dskip_gate_ptr + col, tl.sum(dskip_gate, 0) * slope, mask=in_width)


# prepare_qk: per head, u = x / rms(x); out = gain * (u * cos + partner(u) * signed sin). One pass each way;
# the norm is taken again from the products (N, D + 2*G*K), which are kept in place of normed copies. REPEAT
# copies keys and values for every query head, and the backward adds the copies' gradients up; values also
# take that of remove_own_value.
@jit
def _rotation(table_ptr, position, POSITIONS, K: tl.constexpr, HALF: tl.constexpr):
    """cos and signed sin of every channel of a head, and the channel each one is paired with."""
    channel = tl.arange(0, K)
    turns = (channel < 2 * HALF)[None]
    at = position[:, None] * HALF + (channel % HALF)[None]
    cos = tl.load(table_ptr + at, mask=turns, other=1.0)
    sin = tl.load(table_ptr + POSITIONS * HALF + at, mask=turns, other=0.0)
    partner = tl.where(channel < HALF, channel + HALF, tl.where(channel < 2 * HALF, channel - HALF, channel))
    return cos, tl.where((channel < HALF)[None], sin, -sin), partner


@jit
def _prepare_qk_forward_kernel(qkv_ptr, table_ptr, gain_ptr, q_ptr, k_ptr, v_ptr, N, T, POSITIONS,
                               H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
                               ROWS: tl.constexpr, REPEAT: tl.constexpr, EPS: tl.constexpr):
    row, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    channel = tl.arange(0, K)
    inside = (row < N)[:, None]
    source = qkv_ptr + row[:, None].to(tl.int64) * ((H + 2 * G) * K) + head * K
    x = tl.load(source + channel[None], mask=inside, other=0.0).to(tl.float32)
    if head < H + G:
        cos, sin, partner = _rotation(table_ptr, row % T, POSITIONS, K, HALF)
        other = tl.load(source + partner[None], mask=inside, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / K + EPS)[:, None]
        x = (x * cos + other * sin) * rstd
    if head < H:
        x *= tl.load(gain_ptr + head)
        tl.store(q_ptr + (row[:, None].to(tl.int64) * H + head) * K + channel[None],
                 x.to(q_ptr.dtype.element_ty), mask=inside)
    else:
        group = (head - H) % G
        for copy in tl.static_range(REPEAT):
            at = (row[:, None].to(tl.int64) * (G * REPEAT) + group * REPEAT + copy) * K + channel[None]
            if head < H + G:
                tl.store(k_ptr + at, x.to(k_ptr.dtype.element_ty), mask=inside)
            else:
                tl.store(v_ptr + at, x.to(v_ptr.dtype.element_ty), mask=inside)


@jit
def _prepare_qk_backward_kernel(qkv_ptr, dq_ptr, dk_ptr, dv_ptr, dv_own_ptr, table_ptr, gain_ptr, dqkv_ptr,
                                dgain_ptr, N, T, POSITIONS, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
                                HALF: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
                                REPEAT: tl.constexpr, SUMS: tl.constexpr, EPS: tl.constexpr):
    head = tl.program_id(1)
    channel = tl.arange(0, K)
    group = (head - H) % G
    gain = 1.0
    if head < H:
        gain = tl.load(gain_ptr + head)
    dgain = tl.zeros((ROWS,), tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        inside = (row < N)[:, None]
        at_head = row[:, None].to(tl.int64) * ((H + 2 * G) * K) + head * K
        own = row[:, None].to(tl.int64) * (G * K) + group * K + channel[None]
        if head >= H + G:
            dx = tl.load(dv_own_ptr + own, mask=inside, other=0.0).to(tl.float32)
            for copy in tl.static_range(REPEAT):
                at = (row[:, None].to(tl.int64) * (G * REPEAT) + group * REPEAT + copy) * K
                dx += tl.load(dv_ptr + at + channel[None], mask=inside, other=0.0).to(tl.float32)
        else:
            cos, sin, partner = _rotation(table_ptr, row % T, POSITIONS, K, HALF)
            if head < H:
                at = (row[:, None].to(tl.int64) * H + head) * K
                dx = tl.load(dq_ptr + at + channel[None], mask=inside, other=0.0).to(tl.float32)
                other = tl.load(dq_ptr + at + partner[None], mask=inside, other=0.0).to(tl.float32)
            else:
                dx = tl.zeros((ROWS, K), tl.float32)
                other = tl.zeros((ROWS, K), tl.float32)
                for copy in tl.static_range(REPEAT):
                    at = (row[:, None].to(tl.int64) * (G * REPEAT) + group * REPEAT + copy) * K
                    dx += tl.load(dk_ptr + at + channel[None], mask=inside, other=0.0).to(tl.float32)
                    other += tl.load(dk_ptr + at + partner[None], mask=inside, other=0.0).to(tl.float32)
            dx = dx * cos - other * sin
            x = tl.load(qkv_ptr + at_head + channel[None], mask=inside, other=0.0).to(tl.float32)
            rstd = tl.rsqrt(tl.sum(x * x, 1) / K + EPS)[:, None]
            unit = x * rstd
            along = tl.sum(dx * unit, 1)
            dgain += along
            dx = (dx - unit * (along / K)[:, None]) * (gain * rstd)
        tl.store(dqkv_ptr + at_head + channel[None], dx.to(dqkv_ptr.dtype.element_ty), mask=inside)
    if SUMS:
        if head < H:
            tl.atomic_add(dgain_ptr + head, tl.sum(dgain, 0))


# remove_own_value: with unit = v / |v| and t = tanh(alpha), y' = y - t * <y, unit> * unit, times the gate
# sigmoid(gate_scale * <window of n, weight>). One pass each way for all heads keeps nothing but its inputs.
@jit
def _own_value_forward_kernel(y_ptr, v_ptr, v_stride, n_ptr, alpha_ptr, attn_gate_ptr, gated_ptr, gate_scale,
                              N, D: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
                              WINDOW: tl.constexpr, BLOCK_W: tl.constexpr, ROWS: tl.constexpr):
    row, channel, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, K), tl.arange(0, BLOCK_W)
    inside = (row < N)[:, None]
    long_row = row[:, None].to(tl.int64)
    window = tl.load(n_ptr + long_row * D + col[None], mask=inside & (col < WINDOW)[None],
                     other=0.0).to(tl.float32)
    for group in tl.static_range(G):
        v = tl.load(v_ptr + long_row * v_stride + group * K + channel[None], mask=inside,
                    other=0.0).to(tl.float32)
        unit = v / tl.maximum(tl.sqrt(tl.sum(v * v, 1)), 1e-12)[:, None]
        for member in tl.static_range(H // G):
            head = group * (H // G) + member
            at = long_row * D + head * K + channel[None]
            y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
            alpha = tl.load(alpha_ptr + head)
            tanh = 1 - 2 / (tl.exp(2 * alpha) + 1)
            y -= (tanh * tl.sum(y * unit, 1))[:, None] * unit
            gate = tl.load(attn_gate_ptr + head * WINDOW + col, mask=col < WINDOW, other=0.0)[None]
            y *= tl.sigmoid(gate_scale * tl.sum(window * gate, 1))[:, None]
            tl.store(gated_ptr + at, y.to(gated_ptr.dtype.element_ty), mask=inside)


@jit
def _own_value_backward_kernel(dgated_ptr, y_ptr, v_ptr, v_stride, n_ptr, alpha_ptr, attn_gate_ptr, dy_ptr,
                               dv_ptr, dgate_ptr, dalpha_ptr, dattn_gate_ptr, gate_scale, N, D: tl.constexpr,
                               H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr,
                               BLOCK_W: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
                               SUMS: tl.constexpr):
    channel, col = tl.arange(0, K), tl.arange(0, BLOCK_W)
    group = tl.program_id(1)
    heads = tl.arange(0, H // G)
    dalpha = tl.zeros((ROWS, H // G), tl.float32)
    dattn_gate = tl.zeros((H // G, BLOCK_W), tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        inside = (row < N)[:, None]
        long_row = row[:, None].to(tl.int64)
        window = tl.load(n_ptr + long_row * D + col[None], mask=inside & (col < WINDOW)[None],
                         other=0.0).to(tl.float32)
        v = tl.load(v_ptr + long_row * v_stride + group * K + channel[None], mask=inside,
                    other=0.0).to(tl.float32)
        length = tl.sqrt(tl.sum(v * v, 1))[:, None]
        unit = v / tl.maximum(length, 1e-12)
        dunit = tl.zeros((ROWS, K), tl.float32)
        for member in tl.static_range(H // G):
            head = group * (H // G) + member
            at = long_row * D + head * K + channel[None]
            y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
            dgated = tl.load(dgated_ptr + at, mask=inside, other=0.0).to(tl.float32)
            alpha = tl.load(alpha_ptr + head)
            tanh = 1 - 2 / (tl.exp(2 * alpha) + 1)
            weight = tl.load(attn_gate_ptr + head * WINDOW + col, mask=col < WINDOW, other=0.0)[None]
            gate = tl.sigmoid(gate_scale * tl.sum(window * weight, 1))[:, None]
            along = tl.sum(y * unit, 1)[:, None]
            dlogit = gate * (1 - gate) * gate_scale * tl.sum(dgated * (y - tanh * along * unit), 1)[:, None]
            tl.store(dgate_ptr + row[:, None] * H + head, dlogit, mask=inside)
            dy = gate * dgated
            dalong = tl.sum(dy * unit, 1)[:, None]
            dunit -= tanh * (along * dy + dalong * y)
            tl.store(dy_ptr + at, (dy - tanh * dalong * unit).to(dy_ptr.dtype.element_ty), mask=inside)
            if SUMS:
                mine = (heads == member)[None]
                dalpha -= tl.where(mine, (1 - tanh * tanh) * along * dalong, 0.0)
                dattn_gate += tl.where((heads == member)[:, None], tl.sum(dlogit * window, 0)[None], 0.0)
        dv = (dunit - unit * tl.sum(dunit * unit, 1)[:, None]) / tl.maximum(length, 1e-12)
        dv = tl.where(length > 1e-12, dv, dunit / 1e-12)
        tl.store(dv_ptr + long_row * (G * K) + group * K + channel[None], dv.to(dv_ptr.dtype.element_ty),
                 mask=inside)
    if SUMS:
        head = group * (H // G) + heads
        tl.atomic_add(dalpha_ptr + head, tl.sum(dalpha, 0))
        tl.atomic_add(dattn_gate_ptr + head[:, None] * WINDOW + col[None], dattn_gate,
                      mask=(col < WINDOW)[None])


# leaky_square: φ(u) = s² u² + (1 - s²) relu(u)², s = LEAKY_SLOPE. Only φ is kept for the backward, not u: φ'
# is 2 √φ for positive u and -2 s √φ for negative, and the sign of u goes into the last bit of φ's mantissa
# (SIGN_BIT, counted in the bits of an fp32), which φ is rounded to spare. Saves a write of (N, F).
@jit
def _leaky_square_forward_kernel(u_ptr, act_ptr, count, SLOPE: tl.constexpr, SIGN_BIT: tl.constexpr,
                                 BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(u_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    positive = tl.maximum(u, 0.0)
    act = SLOPE * SLOPE * u * u + (1 - SLOPE * SLOPE) * positive * positive
    bits = act.to(tl.int32, bitcast=True)
    sign = tl.where(u < 0, SIGN_BIT, 0)
    bits = ((bits + (SIGN_BIT - sign)) & (-2 * SIGN_BIT)) | sign     # the nearest value with that last bit
    tl.store(act_ptr + at, bits.to(tl.float32, bitcast=True).to(act_ptr.dtype.element_ty), mask=at < count)


@jit
def _leaky_square_backward_kernel(act_ptr, dact_ptr, du_ptr, count, SLOPE: tl.constexpr,
                                  SIGN_BIT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    act = tl.load(act_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    dact = tl.load(dact_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    is_negative = (act.to(tl.int32, bitcast=True) & SIGN_BIT) != 0
    du = dact * tl.sqrt(act) * tl.where(is_negative, -2 * SLOPE, 2.0)
    tl.store(du_ptr + at, du.to(du_ptr.dtype.element_ty), mask=at < count)


# The lanes of parallel_block: out_k = resid_k * lane_k + post_0k * attn + post_1k * mlp. One pass each way;
# the backward also takes the six sums over all values that are the gradients of resid and post.
@jit
def _lanes_forward_kernel(lane0_ptr, lane1_ptr, attn_ptr, mlp_ptr, resid_ptr, post_ptr, out0_ptr, out1_ptr,
                          count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    attn = tl.load(attn_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    mlp = tl.load(mlp_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    lane0 = tl.load(lane0_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    lane1 = tl.load(lane1_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    out0 = tl.load(resid_ptr) * lane0 + tl.load(post_ptr) * attn + tl.load(post_ptr + 2) * mlp
    out1 = tl.load(resid_ptr + 1) * lane1 + tl.load(post_ptr + 1) * attn + tl.load(post_ptr + 3) * mlp
    tl.store(out0_ptr + at, out0.to(out0_ptr.dtype.element_ty), mask=at < count)
    tl.store(out1_ptr + at, out1.to(out1_ptr.dtype.element_ty), mask=at < count)


@jit
def _lanes_backward_kernel(dout0_ptr, dout1_ptr, lane0_ptr, lane1_ptr, attn_ptr, mlp_ptr, post_ptr, dattn_ptr,
                           dmlp_ptr, dresid_ptr, dpost_ptr, count, BLOCK: tl.constexpr, SUMS: tl.constexpr):
    post00, post01 = tl.load(post_ptr), tl.load(post_ptr + 1)
    post10, post11 = tl.load(post_ptr + 2), tl.load(post_ptr + 3)
    resid0 = tl.zeros((BLOCK,), tl.float32)
    resid1 = tl.zeros((BLOCK,), tl.float32)
    dpost00 = tl.zeros((BLOCK,), tl.float32)
    dpost01 = tl.zeros((BLOCK,), tl.float32)
    dpost10 = tl.zeros((BLOCK,), tl.float32)
    dpost11 = tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < count
        dout0 = tl.load(dout0_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dout1 = tl.load(dout1_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dattn_ptr + at, (post00 * dout0 + post01 * dout1).to(dattn_ptr.dtype.element_ty),
                 mask=inside)
        tl.store(dmlp_ptr + at, (post10 * dout0 + post11 * dout1).to(dmlp_ptr.dtype.element_ty), mask=inside)
        if SUMS:
            attn = tl.load(attn_ptr + at, mask=inside, other=0.0).to(tl.float32)
            mlp = tl.load(mlp_ptr + at, mask=inside, other=0.0).to(tl.float32)
            resid0 += dout0 * tl.load(lane0_ptr + at, mask=inside, other=0.0).to(tl.float32)
            resid1 += dout1 * tl.load(lane1_ptr + at, mask=inside, other=0.0).to(tl.float32)
            dpost00 += dout0 * attn
            dpost01 += dout1 * attn
            dpost10 += dout0 * mlp
            dpost11 += dout1 * mlp
    if SUMS:
        tl.atomic_add(dresid_ptr, tl.sum(resid0, 0))
        tl.atomic_add(dresid_ptr + 1, tl.sum(resid1, 0))
        tl.atomic_add(dpost_ptr, tl.sum(dpost00, 0))
        tl.atomic_add(dpost_ptr + 1, tl.sum(dpost01, 0))
        tl.atomic_add(dpost_ptr + 2, tl.sum(dpost10, 0))
        tl.atomic_add(dpost_ptr + 3, tl.sum(dpost11, 0))


# finish: the norm of half the sum of the lanes. Its backward is that of mix_and_norm without a mix.
@jit
def _finish_forward_kernel(lane0_ptr, lane1_ptr, out_ptr, rstd_ptr, N, D: tl.constexpr, BLOCK_D: tl.constexpr,
                           ROWS: tl.constexpr, EPS: tl.constexpr):
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    at = row[:, None].to(tl.int64) * D + col[None]
    inside = (row < N)[:, None] & (col < D)[None]
    mean = 0.5 * (tl.load(lane0_ptr + at, mask=inside, other=0.0).to(tl.float32)
                  + tl.load(lane1_ptr + at, mask=inside, other=0.0).to(tl.float32))
    rstd = tl.rsqrt(tl.sum(mean * mean, 1) / D + EPS)
    tl.store(out_ptr + at, (mean * rstd[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < N)


# embed: e' = e[token] + lambda * sigmoid(<window of e, w>) * e[token before], normed; nothing is added to BOS
# or to the first token of a row. The backward adds each token's gradient to both embeddings' rows in memory.
@jit
def _embed_forward_kernel(tokens_ptr, emb_ptr, smear_w_ptr, smear_lambda_ptr, x0_ptr, rstd_ptr, N, T,
                          BOS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr,
                          ROWS: tl.constexpr, EPS: tl.constexpr):
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    inside = (row < N)[:, None] & (col < D)[None]
    token = tl.load(tokens_ptr + row, mask=row < N, other=0)
    smeared = (row < N) & (row % T > 0) & (token != BOS)
    before = tl.load(tokens_ptr + row - 1, mask=smeared, other=0)
    e = tl.load(emb_ptr + token[:, None] * D + col[None], mask=inside, other=0.0).to(tl.float32)
    previous = tl.load(emb_ptr + before[:, None] * D + col[None], mask=inside & smeared[:, None],
                       other=0.0).to(tl.float32)
    weight = tl.load(smear_w_ptr + col, mask=col < WINDOW, other=0.0)[None]
    gate = tl.load(smear_lambda_ptr) * tl.sigmoid(tl.sum(e * weight, 1))
    e += gate[:, None] * previous
    rstd = tl.rsqrt(tl.sum(e * e, 1) / D + EPS)
    at = row[:, None].to(tl.int64) * D + col[None]
    tl.store(x0_ptr + at, (e * rstd[:, None]).to(x0_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < N)


@jit
def _embed_backward_kernel(tokens_ptr, emb_ptr, smear_w_ptr, smear_lambda_ptr, x0_ptr, rstd_ptr, dx0_ptr,
                           dx_ptr, demb_ptr, dsmear_w_ptr, dsmear_lambda_ptr, N, T, BOS: tl.constexpr,
                           D: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr):
    col = tl.arange(0, BLOCK_D)
    in_width = col < D
    weight = tl.load(smear_w_ptr + col, mask=col < WINDOW, other=0.0)[None]
    smear = tl.load(smear_lambda_ptr)
    dweight = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dsmear = tl.zeros((ROWS,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < N)[:, None] & in_width[None]
        at = row[:, None].to(tl.int64) * D + col[None]
        token = tl.load(tokens_ptr + row, mask=row < N, other=0)
        smeared = (row < N) & (row % T > 0) & (token != BOS)
        before = tl.load(tokens_ptr + row - 1, mask=smeared, other=0)
        e = tl.load(emb_ptr + token[:, None] * D + col[None], mask=inside, other=0.0).to(tl.float32)
        previous = tl.load(emb_ptr + before[:, None] * D + col[None], mask=inside & smeared[:, None],
                           other=0.0).to(tl.float32)
        x0 = tl.load(x0_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dx0 = tl.load(dx0_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dx0 += tl.load(dx_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < N, other=0.0)
        de = (dx0 - x0 * (tl.sum(dx0 * x0, 1) / D)[:, None]) * rstd[:, None]
        gate = tl.sigmoid(tl.sum(e * weight, 1))
        dgate = tl.where(smeared, tl.sum(de * previous, 1), 0.0)
        dlogit = (dgate * smear * gate * (1 - gate))[:, None]
        dsmear += dgate * gate
        dweight += tl.where((col < WINDOW)[None], dlogit * e, 0.0)
        tl.atomic_add(demb_ptr + before[:, None] * D + col[None], (smear * gate)[:, None] * de,
                      mask=inside & smeared[:, None], sem="relaxed")
        tl.atomic_add(demb_ptr + token[:, None] * D + col[None], de + dlogit * weight, mask=inside,
                      sem="relaxed")
    tl.atomic_add(dsmear_w_ptr + col, tl.sum(dweight, 0), mask=col < WINDOW)
    tl.atomic_add(dsmear_lambda_ptr, tl.sum(dsmear, 0))


# softcap_loss and score_tokens: nll and its gradient in one pass over logits (a program per row), which may
# be overwritten. A compiled loss reads and writes them several times.
@jit
def _tanh(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32,
                                         is_pure=True, pack=1)
    return 1 - 2 / (tl.exp(2 * x) + 1)


@jit
def _softcap_ce_kernel(logits_ptr, targets_ptr, hints_ptr, caps_ptr, nll_ptr, log_hint_ptr, dcaps_ptr,
                       dlogits_ptr, row_scale_ptr, V, BLOCK: tl.constexpr, PARTIAL: tl.constexpr,
                       HINTS: tl.constexpr, GRAD: tl.constexpr, SUMS: tl.constexpr, ROW_SCALE: tl.constexpr,
                       SCALE: tl.constexpr, APPROXIMATE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    logits_ptr += row * V
    if PARTIAL:
        logits = tl.load(logits_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
    else:
        logits = tl.load(logits_ptr + cols).to(tl.float32)
    cap_pos, cap_neg = tl.load(caps_ptr), tl.load(caps_ptr + 1)
    shift = tl.maximum(cap_pos - 60, 0.0)          # no capped logit exceeds cap_pos, so exp never overflows
    target = tl.load(targets_ptr + row)
    logit = tl.load(logits_ptr + target).to(tl.float32)
    cap = tl.where(logit > 0, cap_pos, cap_neg)
    target_capped = cap * _tanh(logit / cap, APPROXIMATE)
    if HINTS:
        logit = tl.load(logits_ptr + tl.load(hints_ptr + row)).to(tl.float32)
        cap = tl.where(logit > 0, cap_pos, cap_neg)
        hint_capped = cap * _tanh(logit / cap, APPROXIMATE)
    positive = logits > 0
    ratio = logits * tl.where(positive, 1 / cap_pos, 1 / cap_neg)
    tanh = _tanh(ratio, APPROXIMATE)
    grad = tl.exp(tl.where(positive, cap_pos, cap_neg) * tanh - shift)
    if PARTIAL:
        grad = tl.where(cols < V, grad, 0.0)
    # also a barrier: every logit has been read before one is overwritten
    total = tl.sum(grad, 0)
    log_total = tl.log(total) + shift
    tl.store(nll_ptr + row, log_total - target_capped)
    if HINTS:
        tl.store(log_hint_ptr + row, hint_capped - log_total)
    if GRAD:
        grad = grad * (1 / total) - tl.where(cols == target, 1.0, 0.0)      # d nll / d capped
        slope = 1 - tanh * tanh                                             # d capped / d logits
        if SUMS:
            # Read again, from the cache: kept in registers they halve the programs that fit.
            if PARTIAL:
                logits = tl.load(logits_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
            else:
                logits = tl.load(logits_ptr + cols).to(tl.float32)
            positive = logits > 0
            # d nll / d cap
            dcap = grad * (tanh - logits * tl.where(positive, 1 / cap_pos, 1 / cap_neg) * slope)
            tl.store(dcaps_ptr + 2 * row, tl.sum(tl.where(positive, dcap, 0.0), 0))
            tl.store(dcaps_ptr + 2 * row + 1, tl.sum(tl.where(positive, 0.0, dcap), 0))
        scale = SCALE
        if ROW_SCALE:
            scale = tl.load(row_scale_ptr + row)
        dlogits_ptr += row * V
        grad = (grad * slope * scale).to(dlogits_ptr.dtype.element_ty)
        if PARTIAL:
            tl.store(dlogits_ptr + cols, grad, mask=cols < V)
        else:
            tl.store(dlogits_ptr + cols, grad)


# A program of a kernel that sums over tokens walks over many rows and adds what it has summed at its end;
# more programs hide more latency. Tiles, warps and programs were tuned on an H100 at 98,304 tokens.
NORM_TILE = dict(ROWS=2, num_warps=2)
NORM_BACKWARD_TILE = dict(ROWS=2, STAGES=1, num_warps=2)
HEAD_TILE = dict(ROWS=32, num_warps=4)
HEAD_BACKWARD_TILE = dict(ROWS=16, STAGES=1, num_warps=4)
OWN_TILE = dict(ROWS=8, num_warps=2)
OWN_BACKWARD_TILE = dict(ROWS=8, STAGES=2, num_warps=2)
FLAT_TILE = dict(BLOCK=2048, num_warps=4)
CE_WARPS = 16                # one program holds a row of 8,192 logits in registers
PROGRAMS = 1056              # 8 for each of 132 multiprocessors
HEAD_PROGRAMS = 4 * PROGRAMS


class KernelLayer(NamedTuple):
    """One layer's weights as the kernels read them, or the gradients of exactly these (fp32).
    Output scales are folded into the matrices: wo is attn_scale * wo, w_down is mlp_scale * w_down."""
    qkv: Tensor             # (D + 2*G*K, D) compute dtype: wq, wk, wv one below the other
    wo: Tensor              # (D, D) compute dtype
    w_up: Tensor            # (F, D) compute dtype
    w_down: Tensor          # (D, F) compute dtype
    attn_scale: Tensor      # (D,) compute dtype
    mlp_scale: Tensor       # (D,) compute dtype
    q_gain: Tensor          # fp32 like all that follow; see LayerWeights
    xsa_alpha: Tensor
    attn_gate: Tensor
    resid_mix: Tensor
    lane_post: Tensor
    lane_resid: Tensor
    ln_scale: Tensor


class KernelWeights(NamedTuple):
    """All weights as the kernels read them, or the gradients of exactly these."""
    tok_emb: Tensor         # (V, D) compute dtype
    smear_w: Tensor         # fp32 like all that follow
    smear_lambda: Tensor
    skip_weights: Tensor
    skip_gates: Tensor
    caps: Tensor            # (2,): softcap_pos, softcap_neg
    layers: list[KernelLayer]


class AttentionKernel(NamedTuple):
    """forward(q, k, v, cu_seqlens, max_seqlen) -> (y, state); backward(dy, q, k, v, y, state, cu_seqlens,
    max_seqlen) -> (dq, dk, dv). With repeats_kv every query head gets its own copy of its key/value head."""
    forward: Callable[..., tuple[Tensor, Any]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    repeats_kv: bool = False


class Products(NamedTuple):
    """The two products around the MLP's activation: up(n, w_up) -> act = φ(w_up n), whose last bits keep the
    signs of w_up n; down_backward(dout, w_down, act) -> gradient of w_up n from that of the MLP's output."""
    up: Callable[[Tensor, Tensor], Tensor]
    down_backward: Callable[[Tensor, Tensor, Tensor], Tensor]


class Layout(NamedTuple):
    """B rows of T positions, flattened to N = B*T: where attention may look, and the kernels to use."""
    T: int
    cu_seqlens: Tensor
    max_seqlen: int
    rope: Tensor            # (2, positions, 1, rope_dims / 2)
    gate_scale: float
    attention: AttentionKernel
    products: Products

    def at_places(self, places: Tensor | None) -> Layout:
        """For work on that many positions in all, as many in each row."""
        if places is None:
            return self
        return self._replace(T=len(places) // (len(self.cu_seqlens) - 1))


class SlotAdapters(NamedTuple):
    """Adapters of one execution slot in the compute dtype, or their gradients; R is the rank, B documents."""
    kinds: tuple[str, ...]  # those of q, k, v, o that have adapters, in this order; all of them read n
    A: Tensor               # (B, len(kinds) * R, D), stacked
    B: dict[str, Tensor]    # (B, out, R) of each kind
    mlp_A: Tensor | None    # (B, R, D)
    mlp_B: Tensor | None    # (B, D, R)
    scale: float


@torch.no_grad()
def kernel_weights(model: GPT, into: KernelWeights | None = None) -> KernelWeights:
    """The model's weights as the kernels read them; the cast of Ops. Small fp32 ones are the model's own."""
    dtype = model.compute_dtype
    qkv = torch.cat([model.wq, model.wk, model.wv], 1).to(dtype)
    wo = (model.attn_scale[:, :, None] * model.wo).to(dtype)
    w_down = (model.mlp_scale[:, :, None] * model.w_down).to(dtype)
    caps = torch.stack([model.softcap_pos, model.softcap_neg])
    banks = {name: getattr(model, name) for name in KernelLayer._fields if name != "qkv"}
    banks |= {"qkv": qkv, "wo": wo, "w_up": model.w_up.to(dtype), "w_down": w_down,
              "attn_scale": model.attn_scale.to(dtype), "mlp_scale": model.mlp_scale.to(dtype)}
    made = KernelWeights(model.tok_emb.to(dtype), model.smear_w, model.smear_lambda, model.skip_weights,
                         model.skip_gates, caps, kernel_layers(banks))
    if into is None:
        return made
    for old, new in zip([into[:-1], *into.layers], [made[:-1], *made.layers]):
        torch._foreach_copy_(old, new)
    return into


def kernel_layers(banks: Mapping[str, Tensor]) -> list[KernelLayer]:
    views = {name: banks[name].detach().unbind() for name in KernelLayer._fields}
    return [KernelLayer(**{name: bank[layer] for name, bank in views.items()})
            for layer in range(len(banks["qkv"]))]


def kernel_gradients(model: GPT) -> tuple[dict[str, Tensor], KernelWeights]:
    """(fp32 buffers by name, the same as views in the layout of KernelWeights). Large matrices are left
    unset: their first product writes them; everything else starts at zero and is added to."""
    first_written = {"wo", "w_up", "w_down", "tok_emb"}
    grads = {}
    for name, p in model.named_parameters():
        if name not in ("wq", "wk", "wv"):
            grads[name] = torch.empty_like(p) if name in first_written else torch.zeros_like(p)
    rows = sum(getattr(model, name).shape[1] for name in ("wq", "wk", "wv"))
    grads["qkv"] = model.wq.new_empty(len(model.wq), rows, model.wq.shape[2])
    grads["ln_scale"] = model.ln_scale                     # a constant: nothing reads or writes this entry
    caps = torch.zeros(2, device=model.wq.device)
    return grads, KernelWeights(grads["tok_emb"], grads["smear_w"], grads["smear_lambda"],
                                grads["skip_weights"], grads["skip_gates"], caps, kernel_layers(grads))


def autograd_attention(attend: Attend) -> AttentionKernel:
    """An AttentionKernel from any `attend` that autograd can differentiate."""
    def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Any]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            y = attend(*leaves, cu_seqlens, max_seqlen)
        return y.detach(), (leaves, y)

    def backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, state: Any, cu_seqlens: Tensor,
                 max_seqlen: int) -> tuple[Tensor, ...]:
        leaves, out = state
        return torch.autograd.grad(out, leaves, dy)
    return AttentionKernel(forward, backward)


def sign_bit(dtype: torch.dtype) -> int:
    """The last bit of a mantissa of that type, among the bits of an fp32."""
    return 1 << (0 if dtype == torch.float32 else 16)


def up_product(n: Tensor, w_up: Tensor) -> Tensor:
    act = n @ w_up.T
    grid = triton.cdiv(act.numel(), FLAT_TILE["BLOCK"]),
    _leaky_square_forward_kernel[grid](act, act, act.numel(), SLOPE=LEAKY_SLOPE,
                                       SIGN_BIT=sign_bit(act.dtype), **FLAT_TILE)
    return act


def down_product_backward(dout: Tensor, w_down: Tensor, act: Tensor) -> Tensor:
    dact = dout @ w_down
    grid = triton.cdiv(act.numel(), FLAT_TILE["BLOCK"]),
    _leaky_square_backward_kernel[grid](act, dact, dact, act.numel(), SLOPE=LEAKY_SLOPE,
                                        SIGN_BIT=sign_bit(act.dtype), **FLAT_TILE)
    return dact


PLAIN_PRODUCTS = Products(up_product, down_product_backward)


def quack_products() -> Products:
    """The same in bf16 with φ and φ' in the products' epilogues, by quack. Raises ImportError and what else a
    half-matching installation raises."""
    import cutlass.cute as cute
    from cutlass import Float32, Int32
    from cutlass._mlir_helpers.arith import bitcast
    from cutlass.cutlass_dsl import T
    from quack.epilogue.frontend import gemm_epilogue
    from quack.gemm_config import GemmConfig
    tiles = GemmConfig(tile_m=128, tile_n=160, pingpong=True, cluster_m=2, cluster_n=1,
                       is_dynamic_persistent=False, device_capacity=9)
    slope, square = LEAKY_SLOPE, LEAKY_SLOPE ** 2

    # As in _leaky_square_forward_kernel and _leaky_square_backward_kernel.
    @gemm_epilogue()
    def with_activation(acc):
        positive = cute.arch.fmax(acc, Float32(0.0))
        act = square * (acc * acc) + (1 - square) * (positive * positive)
        sign = (Int32(bitcast(acc.ir_value(), T.i32())) >> 15) & 0x10000
        bits = Int32(bitcast(act.ir_value(), T.i32())) + (0x10000 - sign)
        return {"D": Float32(bitcast(((bits & -0x20000) | sign).ir_value(), T.f32()))}

    @gemm_epilogue()
    def times_slope(acc, c):
        sign = (Int32(bitcast(c.ir_value(), T.i32())) >> 16) & 1
        return {"D": acc * cute.math.sqrt(c, fastmath=True) * (2.0 - 2.0 * (1.0 + slope) * sign.to(Float32))}

    def up(n: Tensor, w_up: Tensor) -> Tensor:
        act = n.new_empty(len(n), len(w_up))
        with_activation(n, w_up.T, config=tiles, tuned=False, out={"D": act})
        return act

    def down_backward(dout: Tensor, w_down: Tensor, act: Tensor) -> Tensor:
        dup = torch.empty_like(act)
        times_slope(dout, w_down, act, config=tiles, tuned=False, out={"D": dup})
        return dup
    return Products(up, down_backward)


def add_product(total: Tensor, dout: Tensor, x: Tensor, is_first: bool) -> None:
    """Add doutᵀ x, the gradient of a weight in x @ weight.T, to total (out, in) fp32; the first sets it."""
    # CPUs have no product of low precision with an fp32 result
    if not dout.is_cuda:
        product = dout.float().T @ x.float()
        total.copy_(product) if is_first else total.add_(product)
    elif is_first:
        torch.mm(dout.T, x, out_dtype=torch.float32, out=total)
    else:
        total.add_(torch.mm(dout.T, x, out_dtype=torch.float32))


def row_grid(tile: Mapping[str, int], N: int) -> tuple[int]:
    return triton.cdiv(N, tile["ROWS"]),


def walking_grid(tile: Mapping[str, int], N: int, heads: int = 1,
                 programs: int = PROGRAMS) -> tuple[int, int]:
    """A bounded number of programs, each of which walks over rows in equal strides, for each of `heads`."""
    return min(triton.cdiv(N, tile["ROWS"]), max(programs // heads, 132)), heads


# mix_and_norm, and the plain scaled norm where x0 is None.

class NormState(NamedTuple):
    """What the backward of a norm needs. x, x0 and skip are the tensors that were mixed."""
    x: Tensor
    x0: Tensor | None
    skip: Tensor | None
    skip_row: int | None
    n: Tensor               # (N, D), the result
    rstd: Tensor            # (N,) fp32


def mix_and_norm_forward(w: KernelWeights, layer: KernelLayer, x: Tensor, x0: Tensor | None = None,
                         skip: Tensor | None = None, skip_row: int | None = None,
                         keep: str = "none") -> tuple[Tensor, NormState]:
    """mix_and_norm in one pass; (N, D). Also returns, by `keep`, the stream after the "blend" with the skip,
    after the "mix" with x0, or ("none") the input itself."""
    N, D = x.shape
    n, rstd = torch.empty_like(x), torch.empty(N, device=x.device)
    kept = x if keep == "none" else torch.empty_like(x)
    row = skip_row or 0
    _mix_norm_forward_kernel[row_grid(NORM_TILE, N)](
        x, x if x0 is None else x0, x if skip is None else skip,
        layer.resid_mix, w.skip_weights[row], w.skip_gates[row], layer.ln_scale, kept, n, rstd, N,
        D=D, BLOCK_D=triton.next_power_of_2(D), MIX=x0 is not None, SKIP=skip is not None, KEEP=keep,
        EPS=RMS_EPS, **NORM_TILE)
    return kept, NormState(x, x0, skip, skip_row, n, rstd)


class Residual(NamedTuple):
    """The gradient that reaches a stream past the sub-layer: of the stream after ("mixed") or before ("lane")
    mixing; in the second case times scale (0-d)."""
    dout: Tensor
    kind: str
    scale: Tensor | None = None


class MixSums(NamedTuple):
    """Where the gradients of a block's mixing go."""
    layer: KernelLayer
    w: KernelWeights
    dx0: Tensor             # (N, D), the sum of all blocks' gradients of x0
    adds_x0: bool           # False: this block sets it

    def of_row(self, skip_row: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.dx0, self.layer.resid_mix, self.w.skip_weights[skip_row], self.w.skip_gates[skip_row]


def mix_and_norm_backward(w: KernelWeights, layer: KernelLayer, s: NormState, dn: Tensor,
                          residual: Residual | None, sums: MixSums | None = None, extra: Tensor | None = None,
                          dgate: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(gradient of x plus `extra`, gradient of the skip). dgate (N, H) fp32 is the gradient of the attention
    gate's logits, which read n too. Gradients of weights and of x0 are added to `sums`, if any."""
    N, D = dn.shape
    dx = torch.empty_like(dn)
    # the first decoder layer takes the stream's own last value
    skip_is_x = s.skip is s.x
    dskip = None if s.skip is None or skip_is_x else torch.empty_like(dn)
    row = s.skip_row or 0
    H, window = layer.attn_gate.shape
    has_scale = residual is not None and residual.scale is not None

    def given(x: Tensor | None) -> Tensor:
        return dn if x is None else x                    # in the place of tensors that the flags leave unread

    added = (dn, dn, dn, dn) if sums is None else sums.of_row(row)
    _mix_norm_backward_kernel[walking_grid(NORM_BACKWARD_TILE, N)](
        dn, s.n, s.rstd, layer.ln_scale,
        residual.dout if residual else dn, residual.scale if has_scale else dn, given(extra), given(dgate),
        layer.attn_gate, s.x, given(s.x0), given(s.skip),
        layer.resid_mix, w.skip_weights[row], w.skip_gates[row],
        dx, added[0], given(dskip), *added[1:], N,
        D=D, BLOCK_D=triton.next_power_of_2(D), HEADS=H, WINDOW=window, MIX=s.x0 is not None,
        RES=residual.kind if residual else "none", EXTRA=extra is not None, GATE=dgate is not None,
        SKIP=s.skip is not None, SKIP_IS_X=skip_is_x, ADDS_X0=sums is not None and sums.adds_x0,
        SUMS=sums is not None, **NORM_BACKWARD_TILE)
    return dx, dskip


# The attention sub-layer up to its output product: prepare_qk, attend, remove_own_value, with adapters.

class AttentionState(NamedTuple):
    n: Tensor               # (N, D) input
    qkv: Tensor             # (N, D + 2*G*K) products before norm and rotation
    q: Tensor               # (N, H, K)
    k: Tensor               # (N, G, K), or (N, H, K) when repeated
    v: Tensor
    y: Tensor               # (N, H, K) what the heads saw
    state: Any              # of the AttentionKernel
    low: Tensor | None      # (B, T, kinds * R) what the adapters' A made of n
    # The rest of the sub-layer, with M rows: all, or those of `places` where nothing reads the others.
    places: Tensor | None   # (M,) int64
    own: tuple[Tensor, Tensor, Tensor]       # y (M, H, K), v (M, G*K) and n (M, D) of these rows
    gated: Tensor           # (M, D) input of the output product


def head_sizes(layer: KernelLayer) -> tuple[int, int, int]:
    """(H, G, K) of a layer."""
    H, D = len(layer.q_gain), layer.qkv.shape[1]
    K = D // H
    return H, (len(layer.qkv) - D) // (2 * K), K


def adapter_parts(a: SlotAdapters, layer: KernelLayer) -> Iterator[tuple[str, slice, slice]]:
    """(kind, its columns of the low-rank activations, its columns of qkv) of the adapters on q, k and v."""
    H, G, K = head_sizes(layer)
    columns = {"q": slice(0, H * K), "k": slice(H * K, (H + G) * K), "v": slice((H + G) * K, (H + 2 * G) * K)}
    R = a.A.shape[1] // len(a.kinds)
    for index, kind in enumerate(a.kinds):
        if kind in columns:
            yield kind, slice(index * R, (index + 1) * R), columns[kind]


def pick(x: Tensor, places: Tensor | None) -> Tensor:
    return x if places is None else x.index_select(0, places)


def spread(x: Tensor, places: Tensor | None, N: int) -> Tensor:
    """The (N, ...) of which pick took x; zero in between. Where places repeat, x must be zero."""
    return x if places is None else x.new_zeros(N, *x.shape[1:]).index_copy_(0, places, x)


def attention_forward(layer: KernelLayer, n: Tensor, at: Layout, adapters: SlotAdapters | None,
                      places: Tensor | None = None) -> AttentionState:
    N, D = n.shape
    H, G, K = head_sizes(layer)
    qkv, low = n @ layer.qkv.T, None
    if adapters is not None:
        low = torch.bmm(n.view(-1, at.T, D), adapters.A.transpose(1, 2))
        for kind, part, columns in adapter_parts(adapters, layer):
            target = qkv.view(-1, at.T, qkv.shape[1])[..., columns]
            target.baddbmm_(low[..., part], adapters.B[kind].transpose(1, 2), alpha=adapters.scale)
    repeats = at.attention.repeats_kv
    q, k = n.new_empty(N, H, K), n.new_empty(N, H if repeats else G, K)
    own_v = qkv[:, (H + G) * K:]
    v = torch.empty_like(k) if repeats else own_v.view(N, G, K)
    # v is read where it lies unless it is to be repeated
    heads = H + 2 * G if repeats else H + G
    _prepare_qk_forward_kernel[(triton.cdiv(N, HEAD_TILE["ROWS"]), heads)](
        qkv, at.rope, layer.q_gain, q, k, v, N, at.T, at.rope.shape[1],
        H=H, G=G, K=K, HALF=at.rope.shape[-1], REPEAT=H // G if repeats else 1, EPS=RMS_EPS, **HEAD_TILE)
    y, state = at.attention.forward(q, k, v, at.cu_seqlens, at.max_seqlen)
    own = pick(y, places), pick(own_v, places), pick(n, places)
    gated, window = torch.empty_like(own[2]), layer.attn_gate.shape[1]
    _own_value_forward_kernel[row_grid(OWN_TILE, len(gated))](
        own[0], own[1], own[1].stride(0), own[2],
        layer.xsa_alpha, layer.attn_gate, gated, at.gate_scale, len(gated),
        D=D, H=H, G=G, K=K, WINDOW=window, BLOCK_W=triton.next_power_of_2(window), **OWN_TILE)
    return AttentionState(n, qkv, q, k, v, y, state, low, places, own, gated)


def attention_backward(layer: KernelLayer, s: AttentionState, dgated: Tensor, at: Layout,
                       grad: KernelLayer | None, is_first: bool, adapters: SlotAdapters | None,
                       adapter_grads: SlotAdapters | None, dlow: Tensor | None) -> tuple[Tensor, Tensor]:
    """(gradient of n but for the gate's share, gradient of the gate's logits (N, H) fp32). dlow holds the
    part of the output's adapter and receives the others."""
    (N, D), M = s.n.shape, len(dgated)
    H, G, K = head_sizes(layer)
    (y, own_v, n), window = s.own, layer.attn_gate.shape[1]
    dy, dgate = torch.empty_like(dgated), torch.empty(M, H, device=n.device)
    dv_own = n.new_empty(M, G * K)
    has_sums = grad is not None
    _own_value_backward_kernel[walking_grid(OWN_BACKWARD_TILE, M, G)](
        dgated, y, own_v, own_v.stride(0), n, layer.xsa_alpha, layer.attn_gate, dy, dv_own, dgate,
        grad.xsa_alpha if has_sums else dgate, grad.attn_gate if has_sums else dgate, at.gate_scale, M,
        D=D, H=H, G=G, K=K, WINDOW=window, BLOCK_W=triton.next_power_of_2(window), SUMS=has_sums,
        **OWN_BACKWARD_TILE)
    dy, dv_own, dgate = (spread(x, s.places, N) for x in (dy, dv_own, dgate))
    dq, dk, dv = at.attention.backward(dy.view(N, H, K), s.q, s.k, s.v, s.y, s.state, at.cu_seqlens,
                                       at.max_seqlen)
    dqkv = torch.empty_like(s.qkv)
    _prepare_qk_backward_kernel[walking_grid(HEAD_BACKWARD_TILE, N, H + 2 * G, HEAD_PROGRAMS)](
        s.qkv, dq, dk, dv, dv_own, at.rope, layer.q_gain,
        dqkv, grad.q_gain if has_sums else dgate, N, at.T, at.rope.shape[1],
        H=H, G=G, K=K, HALF=at.rope.shape[-1], REPEAT=s.k.shape[1] // G, SUMS=has_sums, EPS=RMS_EPS,
        **HEAD_BACKWARD_TILE)
    if has_sums:
        add_product(grad.qkv, dqkv, s.n, is_first)
    dn = dqkv @ layer.qkv
    if adapters is not None:
        for kind, part, columns in adapter_parts(adapters, layer):
            dout = dqkv.view(-1, at.T, dqkv.shape[1])[..., columns]
            scaled_bmm(dout, adapters.B[kind], adapters.scale, out=dlow[..., part])
            scaled_bmm(dout.transpose(1, 2), s.low[..., part], adapters.scale, out=adapter_grads.B[kind])
        torch.bmm(dlow.transpose(1, 2), s.n.view(-1, at.T, D), out=adapter_grads.A)
        dn.view(-1, at.T, D).baddbmm_(dlow, adapters.A)
    return dn, dgate


def scaled_bmm(a: Tensor, b: Tensor, scale: float, out: Tensor) -> None:
    torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


# Adapters on a sub-layer's output (o, mlp): out += channel_scale * scale * (low Bᵀ).

class OutputAdapter(NamedTuple):
    """What the backward of such an adapter needs."""
    low: Tensor             # (B, M / B, R) what A made of the input
    B: Tensor               # (B, D, R) times channel_scale


def add_output_adapter(out: Tensor, low: Tensor, B: Tensor, channel_scale: Tensor,
                       scale: float) -> OutputAdapter:
    scaled = B * channel_scale[:, None]
    out.view(*low.shape[:2], -1).baddbmm_(low, scaled.transpose(1, 2), alpha=scale)
    return OutputAdapter(low, scaled)


def output_adapter_backward(dout: Tensor, s: OutputAdapter, channel_scale: Tensor, scale: float, dB: Tensor,
                            dlow: Tensor) -> None:
    """Write the gradients of B and of `low`."""
    dout = dout.view(*s.low.shape[:2], -1)
    scaled_bmm(dout.transpose(1, 2), s.low, scale, out=dB)
    dB.mul_(channel_scale[:, None])
    scaled_bmm(dout, s.B, scale, out=dlow)


def add_attention_adapter(layer: KernelLayer, s: AttentionState, out: Tensor,
                          a: SlotAdapters | None) -> OutputAdapter | None:
    if a is None or "o" not in a.kinds:
        return None
    low = s.low[..., output_part(a)]
    if s.places is not None:
        low = pick(low.flatten(0, 1), s.places).view(len(low), -1, low.shape[2])
    return add_output_adapter(out, low, a.B["o"], layer.attn_scale, a.scale)


def output_part(a: SlotAdapters) -> slice:
    """The columns of the low-rank activations that the attention output's adapter reads."""
    R = a.A.shape[1] // len(a.kinds)
    first = a.kinds.index("o") * R
    return slice(first, first + R)


# mlp: product, φ, product, with adapters.

class MlpState(NamedTuple):
    n: Tensor               # (N, D) input
    act: Tensor             # (N, F) = φ(w_up n), with signs; see Products
    low: Tensor | None      # (B, T, R) what the adapter's A made of n


def mlp_forward(layer: KernelLayer, n: Tensor, at: Layout, adapters: SlotAdapters | None) -> MlpState:
    """All but the output product, which the blocks add to their stream."""
    low = None
    if adapters is not None and adapters.mlp_A is not None:
        low = torch.bmm(n.view(-1, at.T, n.shape[1]), adapters.mlp_A.transpose(1, 2))
    return MlpState(n, at.products.up(n, layer.w_up), low)


def add_mlp_adapter(layer: KernelLayer, s: MlpState, out: Tensor,
                    a: SlotAdapters | None) -> OutputAdapter | None:
    if s.low is None:
        return None
    return add_output_adapter(out, s.low, a.mlp_B, layer.mlp_scale, a.scale)


def mlp_backward(layer: KernelLayer, block: BlockState, dout: Tensor, at: Layout, grad: KernelLayer | None,
                 is_first: bool, adapters: SlotAdapters | None, adapter_grads: SlotAdapters | None) -> Tensor:
    """Gradient of n from that of the (scaled) output."""
    s = block.mlp
    dup = at.products.down_backward(dout, layer.w_down, s.act)
    if grad is not None:
        add_product(grad.w_down, dout, s.act, is_first)
        add_product(grad.w_up, dup, s.n, is_first)
    dn = dup @ layer.w_up
    if block.mlp_adapter is not None:
        dlow = torch.empty_like(s.low)
        output_adapter_backward(dout, block.mlp_adapter, layer.mlp_scale, adapters.scale,
                                adapter_grads.mlp_B, dlow)
        torch.bmm(dlow.transpose(1, 2), s.n.view(-1, at.T, dn.shape[1]), out=adapter_grads.mlp_A)
        dn.view(-1, at.T, dn.shape[1]).baddbmm_(dlow, adapters.mlp_A)
    return dn


# serial_block and parallel_block.

class BlockState(NamedTuple):
    attn_norm: NormState
    attn: AttentionState
    mlp_norm: NormState
    mlp: MlpState
    attn_adapter: OutputAdapter | None
    mlp_adapter: OutputAdapter | None
    # parallel blocks only: lane 0 after the skip, and what both sub-layers wrote
    lane0: Tensor | None = None
    attn_out: Tensor | None = None
    mlp_out: Tensor | None = None


def serial_forward(w: KernelWeights, layer: KernelLayer, x: Tensor, x0: Tensor, skip: Tensor | None,
                   skip_row: int | None, at: Layout,
                   adapters: SlotAdapters | None = None) -> tuple[Tensor, BlockState]:
    """serial_block on flattened (N, D) streams. The stream is one buffer, to which both sub-layers add their
    output in the products that make them."""
    z, attn_norm = mix_and_norm_forward(w, layer, x, x0, skip, skip_row, keep="mix")
    attn = attention_forward(layer, attn_norm.n, at, adapters)
    z.addmm_(attn.gated, layer.wo.T)
    attn_adapter = add_attention_adapter(layer, attn, z, adapters)
    _, mlp_norm = mix_and_norm_forward(w, layer, z)
    mlp = mlp_forward(layer, mlp_norm.n, at, adapters)
    z.addmm_(mlp.act, layer.w_down.T)
    mlp_adapter = add_mlp_adapter(layer, mlp, z, adapters)
    return z, BlockState(attn_norm, attn, mlp_norm, mlp, attn_adapter, mlp_adapter)


def attention_side_backward(layer: KernelLayer, s: BlockState, dattn: Tensor, at: Layout,
                            grad: KernelLayer | None, is_first: bool, adapters: SlotAdapters | None,
                            adapter_grads: SlotAdapters | None) -> tuple[Tensor, Tensor]:
    """attention_backward from the gradient of the sub-layer's (scaled) output."""
    if grad is not None:
        add_product(grad.wo, dattn, s.attn.gated, is_first)
    dlow = None if adapters is None else torch.empty_like(s.attn.low)
    if s.attn_adapter is not None:
        room = dlow[..., output_part(adapters)]
        dlow_o = room if s.attn.places is None else torch.empty_like(s.attn_adapter.low)
        output_adapter_backward(dattn, s.attn_adapter, layer.attn_scale, adapters.scale,
                                adapter_grads.B["o"], dlow_o)
        if s.attn.places is not None:
            room.copy_(spread(dlow_o.flatten(0, 1), s.attn.places, len(s.attn.n)).view_as(room))
    return attention_backward(layer, s.attn, dattn @ layer.wo, at, grad, is_first,
                              adapters, adapter_grads, dlow)


class Backward(NamedTuple):
    """What all blocks of one backward pass share."""
    w: KernelWeights
    at: Layout
    grads: KernelWeights | None         # of the weights; None leaves them out, and so that of x0
    dx0: Tensor                         # (N, D), the sum of all blocks' gradients of x0

    def sums(self, index: int, adds_x0: bool) -> MixSums | None:
        if self.grads is None:
            return None
        return MixSums(self.grads.layers[index], self.grads, self.dx0, adds_x0)


def serial_backward(b: Backward, index: int, s: BlockState, dout: Tensor, extra: Tensor | None,
                    is_first: bool, adds_dx0: bool, adapters: SlotAdapters | None = None,
                    adapter_grads: SlotAdapters | None = None) -> tuple[Tensor, Tensor | None]:
    """(gradient of x plus `extra`, gradient of the skip) of layer `index`. is_first: no later execution of
    this layer has written its gradients yet."""
    layer = b.w.layers[index]
    grad = None if b.grads is None else b.grads.layers[index]
    dn = mlp_backward(layer, s, dout, b.at, grad, is_first, adapters, adapter_grads)
    dz, _ = mix_and_norm_backward(b.w, layer, s.mlp_norm, dn, Residual(dout, "mixed"))
    dn, dgate = attention_side_backward(layer, s, dz, b.at, grad, is_first, adapters, adapter_grads)
    return mix_and_norm_backward(b.w, layer, s.attn_norm, dn, Residual(dz, "mixed"), b.sums(index, adds_dx0),
                                 extra, dgate)


def parallel_forward(w: KernelWeights, layer: KernelLayer, lane0: Tensor, lane1: Tensor, x0: Tensor,
                     skip: Tensor | None, skip_row: int | None, at: Layout,
                     adapters: SlotAdapters | None = None,
                     places: Tensor | None = None) -> tuple[Tensor, Tensor, BlockState]:
    """parallel_block on flattened (N, D) lanes. With places (M,), as many in each of the B rows, only these
    positions of the result, (M, D): all but keys and values is left out elsewhere."""
    keep = "none" if skip is None else "blend"
    lane0, attn_norm = mix_and_norm_forward(w, layer, lane0, x0, skip, skip_row, keep)
    attn = attention_forward(layer, attn_norm.n, at, adapters, places)
    lane0, lane1 = pick(lane0, places), pick(lane1, places)
    attn_out = attn.gated @ layer.wo.T
    attn_adapter = add_attention_adapter(layer, attn, attn_out, adapters)
    _, mlp_norm = mix_and_norm_forward(w, layer, lane1)
    mlp = mlp_forward(layer, mlp_norm.n, at.at_places(places), adapters)
    mlp_out = mlp.act @ layer.w_down.T
    mlp_adapter = add_mlp_adapter(layer, mlp, mlp_out, adapters)
    out0, out1 = torch.empty_like(lane0), torch.empty_like(lane0)
    grid = triton.cdiv(out0.numel(), FLAT_TILE["BLOCK"]),
    _lanes_forward_kernel[grid](lane0, lane1, attn_out, mlp_out, layer.lane_resid, layer.lane_post, out0,
                                out1, out0.numel(), **FLAT_TILE)
    return out0, out1, BlockState(attn_norm, attn, mlp_norm, mlp, attn_adapter, mlp_adapter,
                                  lane0, attn_out, mlp_out)


def parallel_backward(b: Backward, index: int, s: BlockState, dout0: Tensor, dout1: Tensor, parts_lanes: bool,
                      extra: Tensor | None, is_first: bool, adds_dx0: bool,
                      adapters: SlotAdapters | None = None, adapter_grads: SlotAdapters | None = None
                      ) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients (of lane 0, of lane 1, of the skip); where the block parts_lanes, both lanes were one stream:
    (their sum plus `extra`, None, of the skip). dout0 and dout1 have the rows of the block's result."""
    layer, places, N = b.w.layers[index], s.attn.places, len(s.attn.n)
    grad = None if b.grads is None else b.grads.layers[index]
    dattn, dmlp = torch.empty_like(dout0), torch.empty_like(dout0)
    has_sums = grad is not None
    grid = min(triton.cdiv(dout0.numel(), FLAT_TILE["BLOCK"]), PROGRAMS),
    _lanes_backward_kernel[grid](
        dout0, dout1, s.lane0, s.mlp_norm.x, s.attn_out, s.mlp_out, layer.lane_post, dattn, dmlp,
        grad.lane_resid if has_sums else dattn, grad.lane_post if has_sums else dattn, dout0.numel(),
        SUMS=has_sums, **FLAT_TILE)
    dn = mlp_backward(layer, s, dmlp, b.at.at_places(places), grad, is_first, adapters, adapter_grads)
    residual = Residual(dout1, "lane", layer.lane_resid[1:])
    adds_extra = parts_lanes and places is None
    dlane1, _ = mix_and_norm_backward(b.w, layer, s.mlp_norm, dn, residual,
                                      extra=extra if adds_extra else None)
    dlane1 = spread(dlane1, places, N)
    if parts_lanes and not adds_extra and extra is not None:
        dlane1 += extra
    dn, dgate = attention_side_backward(layer, s, dattn, b.at, grad, is_first, adapters, adapter_grads)
    residual = Residual(spread(dout0, places, N), "lane", layer.lane_resid)
    dlane0, dskip = mix_and_norm_backward(b.w, layer, s.attn_norm, dn, residual, b.sums(index, adds_dx0),
                                          dlane1 if parts_lanes else extra, dgate)
    return dlane0, None if parts_lanes else dlane1, dskip


# GPT.forward and its gradient.

class Tape(NamedTuple):
    """What a forward pass leaves for its backward, which uses it up."""
    tokens: Tensor          # (N,)
    x0: Tensor              # (N, D)
    rstd0: Tensor           # (N,) fp32
    blocks: list[BlockState]
    lane0: Tensor           # (M, D) as the next two
    hidden: Tensor
    rstd: Tensor            # (N,) fp32, of which the first M are set
    places: Tensor | None   # (M,) int64; None: all N


def forward_pass(model: GPT, w: KernelWeights, tokens_N: Tensor, at: Layout, looping: bool,
                 adapters: Sequence[SlotAdapters] | None = None, is_kept: bool = True,
                 places: Tensor | None = None) -> tuple[Tensor, Tape]:
    """GPT.forward: the final normed hidden states (N, D), and the tape for backward_pass (if is_kept). With
    places (M,), as many in each row, only those positions of the result, (M, D)."""
    N, D = len(tokens_N), w.tok_emb.shape[1]
    block_d = triton.next_power_of_2(D)
    x0 = w.tok_emb.new_empty(N, D)
    rstd0, rstd = torch.empty(2, N, device=x0.device)
    _embed_forward_kernel[row_grid(NORM_TILE, N)](
        tokens_N, w.tok_emb, w.smear_w, w.smear_lambda, x0, rstd0, N, at.T,
        BOS=BOS, D=D, BLOCK_D=block_d, WINDOW=len(w.smear_w), EPS=RMS_EPS, **NORM_TILE)
    lane0, lane1 = x0, None
    blocks, kept = [], {}
    plan = execution_plan(model.cfg, looping)
    for slot, run in enumerate(plan):
        layer = w.layers[run.layer]
        skip = None if run.skip_from is None else kept.pop(run.skip_from)
        own = None if adapters is None else adapters[slot]
        if run.is_parallel:
            lane1 = lane0 if lane1 is None else lane1
            last_places = places if slot == len(plan) - 1 else None
            lane0, lane1, state = parallel_forward(w, layer, lane0, lane1, x0, skip, run.skip_row, at, own,
                                                   last_places)
        else:
            lane0, state = serial_forward(w, layer, lane0, x0, skip, run.skip_row, at, own)
        if is_kept:
            blocks.append(state)
        if run.is_kept:
            kept[slot] = lane0
    if not plan[-1].is_parallel:
        lane0 = lane1 = pick(lane0, places)
    hidden, M = torch.empty_like(lane0), len(lane0)
    _finish_forward_kernel[row_grid(NORM_TILE, M)](lane0, lane1, hidden, rstd, M, D=D, BLOCK_D=block_d,
                                                   EPS=RMS_EPS, **NORM_TILE)
    return hidden, Tape(tokens_N, x0, rstd0, blocks, lane0, hidden, rstd, places)


def backward_pass(model: GPT, w: KernelWeights, tape: Tape, dhidden: Tensor, at: Layout, looping: bool,
                  grads: KernelWeights | None, adapters: Sequence[SlotAdapters] | None = None,
                  adapter_grads: Sequence[SlotAdapters] | None = None) -> None:
    """Add the gradients of all weights into `grads`, or write those of all adapters into adapter_grads."""
    plan = execution_plan(model.cfg, looping)
    N, D = tape.x0.shape
    b = Backward(w, at, grads, torch.empty_like(tape.x0))
    # finish is a norm too, of half the sum of the lanes: half its gradient for each lane, all for one stream.
    unit_layer = w.layers[0]._replace(ln_scale=torch.ones((), device=dhidden.device))
    last_norm = NormState(tape.lane0, None, None, None, tape.hidden, tape.rstd)
    d0, _ = mix_and_norm_backward(w, unit_layer, last_norm, dhidden, None)
    d0 = d1 = d0.mul_(0.5) if plan[-1].is_parallel else spread(d0, tape.places, N)
    # gradients of kept outputs, until their block is reached
    waiting: dict[int, Tensor] = {}
    seen: set[int] = set()
    for slot in reversed(range(len(plan))):
        run, state = plan[slot], tape.blocks.pop()
        # reaches the stream between this block and the one before
        extra = waiting.pop(slot - 1, None)
        own = None if adapters is None else (adapters[slot], adapter_grads[slot])
        common = run.layer not in seen, slot < len(plan) - 1, *(own or ())
        if run.is_parallel:
            parts_lanes = slot == 0 or not plan[slot - 1].is_parallel
            d0, d1, dskip = parallel_backward(b, run.layer, state, d0, d1, parts_lanes, extra, *common)
        else:
            d0, dskip = serial_backward(b, run.layer, state, d0, extra, *common)
        seen.add(run.layer)
        if dskip is not None:
            waiting[run.skip_from] = dskip
    if grads is not None:
        _embed_backward_kernel[walking_grid(NORM_TILE, N)](
            tape.tokens, w.tok_emb, w.smear_w, w.smear_lambda, tape.x0, tape.rstd0, b.dx0, d0,
            grads.tok_emb, grads.smear_w, grads.smear_lambda, N, at.T,
            BOS=BOS, D=D, BLOCK_D=triton.next_power_of_2(D), WINDOW=len(w.smear_w), **NORM_TILE)


# softcap_loss, score_tokens, row_gradients.

def softcap_ce(logits: Tensor, targets: Tensor, caps: Tensor, *, hints: Tensor | None = None,
               dlogits: Tensor | None = None, scale: float = 1.0, row_scale: Tensor | None = None,
               has_sums: bool = False, approximate: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(nll of targets, log-probability of hints, d nll / d caps (N, 2)) of raw logits (N, V), fp32.

    dlogits  receives the gradient of the nll times `scale` or row_scale (N,); may be the logits themselves.
    approximate  takes the GPU's own tanh, whose error of 2**-11 is a quarter of the rounding of bf16 logits.
    The second result is only set with `hints`, the third with has_sums.
    """
    N, V = logits.shape
    nll = torch.empty(N, device=logits.device)
    log_hint = torch.empty_like(nll) if hints is not None else nll
    dcaps = torch.empty(N, 2, device=logits.device) if has_sums else nll
    block = triton.next_power_of_2(V)
    _softcap_ce_kernel[(N,)](
        logits, targets, targets if hints is None else hints, caps, nll, log_hint, dcaps,
        logits if dlogits is None else dlogits, nll if row_scale is None else row_scale, V,
        BLOCK=block, PARTIAL=block != V, HINTS=hints is not None, GRAD=dlogits is not None, SUMS=has_sums,
        ROW_SCALE=row_scale is not None, SCALE=scale, APPROXIMATE=approximate, num_warps=CE_WARPS)
    return nll, log_hint, dcaps


class FusedSoftcapLoss(torch.autograd.Function):
    """softcap_loss for CUDA: one pass over the logits gives the loss and puts its gradient in their place."""

    @staticmethod
    def forward(ctx, hidden_ND: Tensor, tok_emb_VD: Tensor, cap_pos: Tensor, cap_neg: Tensor,
                targets_N: Tensor) -> Tensor:
        weight = tok_emb_VD.to(hidden_ND.dtype)
        logits_NV = hidden_ND @ weight.T
        nll_N, _, dcaps_N2 = softcap_ce(logits_NV, targets_N, torch.stack([cap_pos, cap_neg]),
                                        dlogits=logits_NV, has_sums=True)
        ctx.save_for_backward(hidden_ND, weight, logits_NV, dcaps_N2)
        return nll_N.mean()

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden_ND, weight, dlogits_NV, dcaps_N2 = ctx.saved_tensors
        scale = grad / len(hidden_ND)
        dhidden = (dlogits_NV @ weight).mul_(scale)
        dweight = torch.mm(dlogits_NV.T, hidden_ND, out_dtype=torch.float32).mul_(scale)
        dcaps = dcaps_N2.sum(0, dtype=torch.float64) * scale
        return dhidden, dweight, dcaps[0].float(), dcaps[1].float(), None


def kernel_score(hidden_ND: Tensor, tok_emb: Tensor, cap_pos: Tensor, cap_neg: Tensor, targets_N: Tensor,
                 hints_N: Tensor, delta_NV: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """score_tokens without gradients; the logits keep the product's fp32 sums."""
    logits = fp32_product(hidden_ND, tok_emb.to(hidden_ND.dtype))
    if delta_NV is not None:
        logits += delta_NV
    nll, log_hint, _ = softcap_ce(logits, targets_N, torch.stack([cap_pos, cap_neg]), hints=hints_N)
    return nll, log_hint


def fp32_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in fp32, from operands of low precision where the device can."""
    if x.is_cuda:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return x.float() @ weight.float().T


class Kernels(NamedTuple):
    """The hand-written path: forward and backward of the whole model, called in place of autograd.
    choose_ops(run) makes one; its methods replace the functions of Ops that they are named after."""
    attention: AttentionKernel
    products: Products = PLAIN_PRODUCTS

    def layout(self, model: GPT, T: int, cu_seqlens: Tensor, max_seqlen: int) -> Layout:
        return Layout(T, cu_seqlens, max_seqlen, model.rope, model.cfg.sparse_attn_gate_scale, *self)

    @torch.no_grad()
    def hidden(self, model: GPT, tokens_BT: Tensor, *, looping: bool, segments: tuple[Tensor, int]) -> Tensor:
        """GPT.forward without gradients, (B, T, D)."""
        at = self.layout(model, tokens_BT.shape[1], *segments)
        hidden, _ = forward_pass(model, kernel_weights(model), tokens_BT.flatten(), at, looping,
                                 is_kept=False)
        return hidden.view(*tokens_BT.shape, -1)

    @torch.no_grad()
    def row_gradients(self, model: GPT, row: Row, *, looping: bool, segment_cap: int,
                      weights: Tensor | None = None,
                      cast: KernelWeights | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """row_gradients of section 4. The scales that kernel_weights folds into matrices get their gradients
        here: for W' = scale * W, d scale is the row sum of dW' * W, and dW is scale * dW'."""
        w = kernel_weights(model) if cast is None else cast
        at = self.layout(model, len(row.inputs), row.cu_seqlens, segment_cap)
        hidden, tape = forward_pass(model, w, row.inputs, at, looping)
        grads, views = kernel_gradients(model)
        logits = hidden @ w.tok_emb.T
        if weights is None:
            weights = torch.full((len(hidden),), 1 / len(hidden), device=hidden.device)
        nll, _, dcaps = softcap_ce(logits, row.targets, w.caps, dlogits=logits, row_scale=weights,
                                   has_sums=True, approximate=hidden.is_cuda)
        add_product(views.tok_emb, logits, hidden, is_first=True)
        dhidden = logits @ w.tok_emb
        del logits
        backward_pass(model, w, tape, dhidden, at, looping, views)
        grads["softcap_pos"], grads["softcap_neg"] = (dcaps.double().T @ weights.double()).float().unbind()
        names = "wq", "wk", "wv"
        parts = grads.pop("qkv").split([getattr(model, name).shape[1] for name in names], 1)
        grads |= {name: part.contiguous() for name, part in zip(names, parts)}
        for name, scale in (("wo", "attn_scale"), ("w_down", "mlp_scale")):
            grads[scale] = (grads[name] * getattr(model, name)).sum(-1)
            grads[name] *= getattr(model, scale)[:, :, None]
        absent = unused_parameters(model.cfg)
        return nll @ weights, {name: grads[name] for name, p in model.named_parameters()
                               if p.requires_grad and name not in absent}

    @torch.no_grad()
    def chunk_gradients(self, model: GPT, bank: AdapterBank, tokens_BT: Tensor, at_BC: Tensor,
                        answers_BC: Tensor, hints_BC: Tensor, learns_B: Tensor, learn: bool,
                        cast: KernelWeights | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """chunk_gradients of section 13; logits keep the product's fp32 sums."""
        B, T = tokens_BT.shape
        C, w = at_BC.shape[1], kernel_weights(model) if cast is None else cast
        cu_seqlens = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=tokens_BT.device)
        at = self.layout(model, T, cu_seqlens, T)
        slots, (head_A, head_B) = slot_adapters(bank, bank.low[:B])
        places = (at_BC + T * torch.arange(B, device=at_BC.device)[:, None]).flatten()
        hidden, tape = forward_pass(model, w, tokens_BT.flatten(), at, True, slots, learn, places)
        picked = hidden.view(B, C, -1)
        low, scale = torch.bmm(picked, head_A.transpose(1, 2)), slots[0].scale
        logits = fp32_product(picked.flatten(0, 1), w.tok_emb)
        logits.view(B, C, -1).add_(torch.bmm(low, head_B.transpose(1, 2)), alpha=scale)
        dlogits = torch.empty_like(logits, dtype=hidden.dtype) if learn else None
        row_scale = (learns_B / C).repeat_interleave(C, output_size=B * C)
        nll, log_q, _ = softcap_ce(logits, answers_BC.flatten(), w.caps, hints=hints_BC.flatten(),
                                   dlogits=dlogits, row_scale=row_scale)
        nll, log_q = nll.view(B, C), log_q.view(B, C)
        if not learn:
            return nll, log_q, None
        grads = torch.empty_like(bank.low[:B])
        grad_slots, (grad_A, grad_B) = slot_adapters(bank, grads)
        dlogits_BCV = dlogits.view(B, C, -1)
        scaled_bmm(dlogits_BCV.transpose(1, 2), low, scale, out=grad_B)
        dlow = torch.bmm(dlogits_BCV, head_B) * scale
        torch.bmm(dlow.transpose(1, 2), picked, out=grad_A)
        dhidden = dlogits @ w.tok_emb
        dhidden.view(B, C, -1).baddbmm_(dlow, head_A)
        # Places repeat only where a document is at its end, and there all gradients are zero.
        backward_pass(model, w, tape, dhidden, at, True, None, slots, grad_slots)
        return nll, log_q, grads


def slot_adapters(bank: AdapterBank, flat: Tensor) -> tuple[list[SlotAdapters], tuple[Tensor, Tensor]]:
    """Views of adapters (B, P), or of their gradients, as the kernels read them: of every slot, and A and B
    of the head. In a bank's rows the A of q, k, v and o of one slot lie one below the other."""
    parts = bank.parts(flat)
    kinds = tuple(kind for kind in bank.kinds if kind != "mlp")
    scale = bank.cfg.ttt_lora_alpha / bank.cfg.ttt_lora_rank
    slots = []
    for slot in range(bank.num_slots):
        first = parts[kinds[0], slot, "A"]
        rows, R, D = first.shape
        stacked = first.as_strided((rows, len(kinds) * R, D), first.stride())
        outputs = {kind: parts[kind, slot, "B"] for kind in kinds}
        slots.append(SlotAdapters(kinds, stacked, outputs, parts.get(("mlp", slot, "A")),
                                  parts.get(("mlp", slot, "B")), scale))
    return slots, (parts["head", bank.num_slots, "A"], parts["head", bank.num_slots, "B"])


if triton is not None:
    @triton.jit
    def _trellis_kernel(x_ptr, limit_ptr, codes_ptr, took_ptr, N: tl.constexpr, STATES: tl.constexpr):
        line = tl.program_id(0)
        limit = tl.load(limit_ptr + line)
        x_ptr += line * N
        codes_ptr += line * N
        took_ptr += line * N
        state = tl.arange(0, STATES)
        from_0 = _trellis_source(state, 0)
        from_1 = _trellis_source(state, 1)
        low = (from_0 & 1).to(tl.float32)
        cost = tl.where(state == 0, 0.0, 1e30)
        for i in range(N):
            x = tl.load(x_ptr + i)
            at_0 = _trellis_point(x, low, limit)
            at_1 = _trellis_point(x, low + 2, limit)
            cost_0 = tl.gather(cost, from_0, 0) + (x - at_0) * (x - at_0)
            cost_1 = tl.gather(cost, from_1, 0) + (x - at_1) * (x - at_1)
            took = cost_1 < cost_0
            cost = tl.where(took, cost_1, cost_0)
            tl.store(took_ptr + i, tl.sum(took.to(tl.int64) << state.to(tl.int64), 0))
        at = tl.argmin(cost, 0).to(tl.int64)
        tl.debug_barrier()                           # what one thread has stored all are about to read
        for i in range(N - 1, -1, -1):
            bit = tl.load(took_ptr + i) >> at & 1
            at = _trellis_source(at, bit)
            residue = (2 * bit + (at & 1)).to(tl.float32)
            tl.store(codes_ptr + i, _trellis_point(tl.load(x_ptr + i), residue, limit))

    @triton.jit
    def _trellis_source(state, bit):                 # the state whose next_state(., bit) this is
        parity = state >> 5
        return 2 * (state ^ 33 * parity ^ 10 * bit) + parity

    @triton.jit
    def _trellis_point(x, residue, limit):
        k = tl.floor((x - residue) * 0.25 + 0.5)
        k = tl.minimum(tl.maximum(k, tl.ceil((-limit - residue) * 0.25)), tl.floor((limit - residue) * 0.25))
        return 4 * k + residue


def trellis_round(x: Tensor, limit: Tensor) -> Tensor:
    """plain_trellis_round(x, limit); on a GPU by one kernel, a program per line."""
    if not x.is_cuda or triton is None:
        return plain_trellis_round(x, limit)
    x = x.contiguous()
    codes = torch.empty_like(x)
    took = torch.empty(x.shape, dtype=torch.int64, device=x.device)
    _trellis_kernel[(len(x),)](x, limit, codes, took, N=x.shape[1], STATES=TRELLIS_STATES, num_warps=1)
    return codes


if triton is not None:
    @triton.jit
    def _adapter_adamw_kernel(params_ptr, low_ptr, exp_avg_sq_ptr, grads_ptr, learns_ptr, unbias_ptr, P, lr,
                              decay, beta2, eps, HAS_LOW: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(1).to(tl.int64)
        if tl.load(learns_ptr + row) != 0:
            cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            inside = cols < P
            at = row * P + cols
            grad = tl.load(grads_ptr + at, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0.0) * beta2 + grad * grad * (1 - beta2)
            param = tl.load(params_ptr + at, mask=inside, other=0.0) * decay
            param -= lr * grad / (tl.sqrt(second) * tl.load(unbias_ptr) + eps)
            tl.store(exp_avg_sq_ptr + at, second, mask=inside)
            tl.store(params_ptr + at, param, mask=inside)
            if HAS_LOW:
                tl.store(low_ptr + at, param.to(low_ptr.dtype.element_ty), mask=inside)


ADAMW_BLOCK = 4096


def adapter_adamw(params: Tensor, low: Tensor, exp_avg_sq: Tensor, grads: Tensor, learns: Tensor,
                  unbias: Tensor, lr: float, weight_decay: float, beta2: float, eps: float) -> None:
    """plain_adapter_adamw; on a GPU by one kernel, which does not touch the rows that do not learn."""
    if not params.is_cuda or triton is None:
        return plain_adapter_adamw(params, low, exp_avg_sq, grads, learns, unbias,
                                   lr, weight_decay, beta2, eps)
    launch_adapter_adamw(params, low, exp_avg_sq, grads, learns, unbias, lr, weight_decay, beta2, eps)


def launch_adapter_adamw(params: Tensor, low: Tensor, exp_avg_sq: Tensor, grads: Tensor, learns: Tensor,
                         unbias: Tensor, lr: float, weight_decay: float, beta2: float, eps: float) -> None:
    rows, P = params.shape
    _adapter_adamw_kernel[(triton.cdiv(P, ADAMW_BLOCK), rows)](
        params, low, exp_avg_sq, grads.contiguous(), learns.contiguous(), unbias, P,
        lr, 1 - lr * weight_decay, beta2, eps,
        HAS_LOW=low.data_ptr() != params.data_ptr(), BLOCK=ADAMW_BLOCK)


# --- 17 compilation -----------------------------------------------------------------------------------------
# One place that selects and logs every fast path of the model; torch.compile, and sizes that may vary.

RECOMPILE_LIMIT = 64         # variants of one block: with and without skip, gradient, adapters; their sizes


def mark_varying(x: Tensor, *dims: int) -> Tensor:
    """Tell the compiler that these sizes change between calls, so that one graph serves them all."""
    for dim in dims:
        if x.shape[dim] > 1:                              # size 1 always gets a graph of its own
            torch._dynamo.maybe_mark_dynamic(x, dim)
    return x


def choose_ops(run: Run) -> Ops:
    """The fastest functions that work here, each choice logged with its reason. Raises ConfigError where a
    fast path is missing on a GPU and ALLOW_SLOW=0."""
    cfg = run.cfg
    is_gpu = run.device.type == "cuda"
    attend, attention = choose_attention(run)
    ops = Ops(attend=attend, loss=choose_loss(run))
    refused = refuse_kernels(run)
    if not refused:
        kernels = Kernels(attention, choose_products(run))
        run.log('blocks backend:kernels reason:"first choice"')
        return ops._replace(cast=kernel_weights, row_gradients=kernels.row_gradients, hidden=kernels.hidden,
                            score=kernel_score, chunk_gradients=kernels.chunk_gradients)
    if is_gpu and not cfg.allow_slow:
        raise ConfigError(f"no block kernels ({refused}); a run on other paths is slower by a third or "
                          "more, allow it by ALLOW_SLOW=1")
    if not cfg.compile:
        run.log(f'blocks backend:plain reason:"{refused}; COMPILE=0"')
        return ops
    run.log(f'blocks backend:compiled reason:"{refused}" recompile_limit:{RECOMPILE_LIMIT}')
    return compile_ops(ops, whole_graphs=is_gpu)


def refuse_kernels(run: Run) -> str:
    """Why the kernels of section 16 cannot run the blocks here; empty where they can."""
    cfg = run.cfg
    if run.device.type != "cuda":
        return "no GPU"
    if triton is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(run.device) < (9, 0):
        return "not tried on GPUs before compute capability 9.0"
    group = cfg.num_heads // cfg.num_kv_heads
    if cfg.head_dim < 16 or cfg.head_dim & (cfg.head_dim - 1) or group & (group - 1):
        return f"head width {cfg.head_dim} (from 16 on) and heads per key {group} must be powers of two"
    if cfg.model_dim % 16 or cfg.mlp_dim % 16:
        return f"widths {cfg.model_dim} and {cfg.mlp_dim} must be multiples of 16"
    if not cfg.fused_ce_enabled:
        return "FUSED_CE_ENABLED=0"
    return "" if cfg.block_kernels else "BLOCK_KERNELS=0"


def choose_products(run: Run) -> Products:
    """The products around the MLP's activation, with it as their epilogue where quack is there; logged."""
    if torch.cuda.get_device_capability(run.device)[0] != 9:
        refused = "quack: its kernel used here is one for compute capability 9"
    elif run.cfg.mlp_dim % 32 or run.cfg.model_dim % 32:
        refused = "a width is no multiple of 32"
    else:
        try:
            products = quack_products()
        except (ImportError, OSError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            refused = f"quack: {error}"
        else:
            run.log('products backend:quack_epilogue reason:"first choice"')
            return products
    run.log(f'products backend:cublas reason:"{refused}"')
    return PLAIN_PRODUCTS


def choose_loss(run: Run) -> Callable[..., Tensor]:
    """The training loss, in one kernel where there is a GPU and Triton; logged with the reason."""
    if not run.cfg.fused_ce_enabled:
        refused = "FUSED_CE_ENABLED=0"
    elif run.device.type != "cuda":
        refused = "no GPU"
    elif triton is None:
        refused = "Triton is not installed"
    else:
        run.log('loss backend:fused_triton reason:"first choice"')
        return FusedSoftcapLoss.apply
    run.log(f'loss backend:plain reason:"{refused}"')
    return softcap_loss


def compile_ops(ops: Ops, whole_graphs: bool) -> Ops:
    """`ops` with its blocks, embedding, last norm and scores compiled. Sizes are static unless marked with
    mark_varying. Blocks are compiled one by one and shared by all layers: eleven times less to compile than
    the whole model. Without whole_graphs a graph may break, as on CPUs, where attention is a loop.

    The compiler's limit on variants is a setting of the process (one per function needs torch 2.13); this
    raises it to RECOMPILE_LIMIT, and nothing else in this file changes the compiler's settings."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    compiled = {}
    for name in ("embed", "serial", "parallel", "finish", "score"):
        compiled[name] = torch.compile(getattr(ops, name), fullgraph=whole_graphs)
    return ops._replace(**compiled)


# CUDA graphs of training rows and chunk steps

class CapturedSteps:
    """step(*key) as one CUDA graph per key: replaying it is one launch instead of hundreds. The step must do
    the same work on the same addresses whenever it is called with that key, and read nothing back. All graphs
    share one memory pool, because no two run at a time and what they leave behind is in the step's own
    buffers, which the caller clears: capturing runs every step once.

    captures  graphs made; missed  steps without a graph, which ran eagerly
    """

    def __init__(self, run: Run, step: Callable[..., None], keys: Sequence[tuple],
                 loads: Sequence[tuple] | None = None) -> None:
        """Capture `keys`, the largest step first, so that the others find room in its memory. Before that the
        steps `loads` (None: all) run once: they compile and load whatever `keys` need."""
        self.step, self.captures, self.missed = step, 0, 0
        self.graphs: dict[tuple, Any] = {}
        stream, pool = torch.cuda.Stream(run.device), torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream(run.device))
        with torch.cuda.stream(stream):
            for key in keys if loads is None else loads:
                step(*key)
            stream.synchronize()
            gc.collect()
            gc.disable()                      # freeing somebody's graph or event would spoil a capture
            torch.cuda.empty_cache()          # what the eager steps held is room for the pool
            try:
                for key in keys:
                    self.graphs[key] = torch.cuda.CUDAGraph()
                    # Other threads (hints, NCCL's watchdog) may call the driver meanwhile.
                    self.graphs[key].capture_begin(pool=pool, capture_error_mode="thread_local")
                    step(*key)
                    self.graphs[key].capture_end()
                    self.captures += 1
            finally:
                gc.enable()
        torch.cuda.current_stream(run.device).wait_stream(stream)

    def __call__(self, *key: Any) -> None:
        if key in self.graphs:
            self.graphs[key].replay()
        else:
            self.missed += 1
            self.step(*key)


def graphs_made(steps: Callable) -> tuple[int, int]:
    """(graphs and kernels compiled or loaded by this process and graphs captured by `steps`, calls of `steps`
    that had none) so far. Kernels of quack are not counted."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    made = dynamo.counters["stats"]["unique_graphs"] if dynamo else 0
    for kernel in list(globals().values()):               # Triton: one kernel for each kind of arguments
        for caches in getattr(kernel, "device_caches", {}).values():
            made += len(caches[0])
    flash_attention = sys.modules.get("flash_attn.cute.interface")
    for name in ("_flash_attn_fwd", "_flash_attn_bwd", "_bwd_preprocess", "_bwd_postprocess_convert"):
        function = getattr(flash_attention, name, None)
        made += len(getattr(getattr(function, "compile_cache", None), "cache", ()))
    return made + getattr(steps, "captures", 0), getattr(steps, "missed", 0)


# --- 18 C sources -------------------------------------------------------------------------------------------
# Coder and hints, compiled once per process.

@functools.cache
def compile_c(source: str) -> ctypes.CDLL:
    """Load C source, compiled once per process; RunError with the compiler's message when that fails."""
    compiler = os.environ.get("CC", "cc")
    with tempfile.TemporaryDirectory(prefix="train_gpt_") as folder:
        library = f"{folder}/code.so"
        for target in (["-march=native"], []):            # not every compiler knows its own machine
            # -fwrapv: even a forged stream must not meet undefined behaviour.
            command = [*shlex.split(compiler), "-O3", *target, "-fwrapv", "-std=c99", "-shared", "-fPIC",
                       "-o", library, "-xc", "-"]
            try:
                done = subprocess.run(command, input=source, capture_output=True, text=True)
                if done.returncode == 0:
                    return ctypes.CDLL(library)
            except FileNotFoundError:
                raise RunError(f"no C compiler: expected `{compiler}` on the PATH; install gcc or "
                               "clang") from None
            except OSError as error:
                raise RunError(f"`{compiler}`, or what it makes in {folder}, cannot be run ({error}); "
                               "correct CC or TMPDIR") from None
        raise RunError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")


def call_c(function: str, *arguments: Any) -> int:
    """Call a function of C_SOURCE: arrays go as pointers to data, None as a null pointer, int as int64."""
    routine = getattr(compile_c(C_SOURCE), function)
    routine.restype = ctypes.c_int64
    return routine(*(ctypes.c_void_p(x.ctypes.data) if isinstance(x, np.ndarray) else
                     ctypes.c_int64(x) if isinstance(x, int) else x for x in arguments))


C_SOURCE = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef int16_t i16;
typedef uint16_t u16;
typedef int32_t i32;
typedef uint32_t u32;
typedef int64_t i64;
typedef uint64_t u64;
enum { VOTES = 4, NODES = 32, LEVELS = 128, PARTS = 18, TRELLIS_ROWS = 256 };

static inline int clamp(i64 x, int lo, int hi) {
    return x < lo ? lo : x > hi ? hi : x;
}

static void fill(void *cells, i64 bytes, u32 value) {
    u32 *cell = cells;
    for (i64 i = 0; i < bytes / 4; i++)
        cell[i] = value;
}

// --- arithmetic coder [lpaq], bounds of 64 bits ---

typedef struct {                            // as _run_coder() fills it
    const i32 *squash, *stretch, *rate;
    const u32 *prior;
    uint8_t *buf;
    i64 cap, decode, pos, max_age, speed;   // counters age up to max_age; weights learn with this speed
    u64 lo, hi, code;
} Coder;

// `p` of 65536 of the interval goes to bit 1; leading bytes on which both bounds agree leave at once.
static inline int code_bit(Coder *c, int bit, u32 p) {
    u64 mid = c->lo + ((c->hi - c->lo) >> 16) * p;
    if (c->decode)
        bit = c->code <= mid;
    if (bit)
        c->hi = mid;
    else
        c->lo = mid + 1;
    for (; !((c->lo ^ c->hi) >> 56); c->pos++) {
        if (c->decode)                      // past the end it reads zeros
            c->code = c->code << 8 | (c->pos < c->cap ? c->buf[c->pos] : 0);
        else if (c->pos < c->cap)
            c->buf[c->pos] = c->hi >> 56;
        c->lo <<= 8;
        c->hi = c->hi << 8 | 255;
    }
    return bit;
}

static i64 finish(Coder *c) {               // one byte suffices, for zeros follow
    if (!c->decode && c->pos < c->cap)
        c->buf[c->pos] = (c->lo >> 56) + 1;
    return c->pos + 1;
}

// Bits after a leading one, each with a fast counter of `odds` where there are some.
static int code_number(Coder *c, int value, int bits, i32 *odds) {
    int v = 1;
    while (bits--) {
        int bit = code_bit(c, value >> bits & 1, odds ? odds[v] : 32768);
        if (odds)
            odds[v] += ((bit << 16) - odds[v]) >> 6;
        v = v << 1 | bit;
    }
    return v;
}

typedef struct {                            // who votes on a decision
    u32 *counters[VOTES];                   // each 22 bits of probability and 10 bits of age
    i32 (*weights[2])[VOTES];               // of the votes: two sets, chosen by different contexts
} Voters;

static inline int probability(const Coder *c, i64 logit) {
    return c->squash[clamp(logit, -2047, 2047) + 2048];
}

// Both sets of weights are averaged, each learns from its own error; a counter moves by 1/(age + 1.5).
static inline int decide(Coder *c, const Voters *v, int counter, int node, int bit) {
    int vote[VOTES];
    i32 *wa = v->weights[0][node], *wb = v->weights[1][node];
    i64 a = 0, b = 0;
    for (int k = 0; k < VOTES; k++) {
        vote[k] = c->stretch[v->counters[k][counter] >> 20];
        a += (i64)wa[k] * vote[k];
        b += (i64)wb[k] * vote[k];
    }
    bit = code_bit(c, bit, probability(c, (a + b) >> 19));
    i64 error_a = ((bit << 16) - probability(c, a >> 18)) * c->speed;
    i64 error_b = ((bit << 16) - probability(c, b >> 18)) * c->speed;
    for (int k = 0; k < VOTES; k++) {
        wa[k] += (vote[k] * error_a + (1 << 19)) >> 20;
        wb[k] += (vote[k] * error_b + (1 << 19)) >> 20;
        u32 *cell = v->counters[k] + counter, age = *cell & 1023;
        i32 p = *cell >> 10;
        p += ((i64)((bit ? 4194303 : 0) - p) * c->rate[age]) >> 16;
        *cell = (u32)p << 10 | (age + (age < c->max_age));
    }
    return bit;
}

// --- codes of a tensor group ---
//
// Predictions and errors are in 1/16 of an integer; column variances have 18 fractional bits. For each code:
//   ratio  energy of this row's codes over what their columns lead to expect, 256 where they are equal
//   A      variance of the column over all rows (slow), 8 fractional bits
//   B      A scaled by ratio
//   F      variance of the column over the last rows (fast), scaled by ratio
//   blend  level of a mix of B, F and the variance of the row's last codes
//   part   0..8: how far the prediction lies from an integer; without regression, where it is always 0,
//          the level of ratio, plus 9 for the odd codes of the trellis
// Four counters vote: of A and F (apart for odd codes without regression), of blend and B (apart by part).

typedef struct {
    i32 slow, fast;                 // variance
    i32 state;                      // of the trellis
} Column;

typedef struct {                    // what both sides learn while they code
    u32 counters[VOTES][PARTS][LEVELS][NODES];
    i32 by_part[PARTS][NODES][VOTES], by_blend[LEVELS][NODES][VOTES];   // weights
    int rows, cols, trellis, regress;
    const i32 *rate;                // of learning, by age
    i32 rate_slow, rate_fast;       // of the column variances in the row at hand
    i64 age;                        // rows that the column variances rest on
    i64 energy;                     // sum of the variances of a typical row
    i32 odds[2][8];                 // of the shares of similar rows
    i64 refit_at;                   // row
    i64 *L;                         // unit lower triangle of L D L', 28 fractional bits; D is on its diagonal
    i32 *gram;                      // sums of products of two columns, column 0 the constant
    Column *column;
    i16 *T;                         // coefficients, 12 fractional bits
    i16 *left;                      // this row's codes so far, after the constant
    i16 *error;                     // regression error of every code
    // Of the row at hand: means of variances of its codes so far, of their columns, of its last codes; sums
    // of its codes so far, of the columns to come, of a whole row. Its place and those of similar rows in
    // `error`, their shares in 1/8.
    i64 seen, expected, recent, spent, rest, budget, first, similar[2];
    int share[2];
} Model;

typedef struct {                    // where a code is looked for
    int own, mu;                    // prediction by the regression alone, and with the similar rows
    int odd, m, flip;               // code: odd + (m + flip * t) whole steps; t is coded, flip points to mu
    Voters voters;
} Place;

static inline int level(i64 v) {    // variance, 8 fractional bits -> step of the variance axis
    v = clamp(v, 16, 1 << 19);
    int e = 31 - __builtin_clz((u32)v);
    return (e - 4) * 8 + (v >> (e - 3) & 7);
}

static Model *new_model(const Coder *c, i64 matrices, i64 rows, i64 cols, int trellis, int regress) {
    i64 d = cols + 1, pairs = regress ? d * d : 0, errors = regress ? matrices * rows * cols : 0;
    Model *g = calloc(sizeof(Model) + 14 * pairs + 16 * d + d * sizeof(Column) + 2 * d + 2 * errors, 1);
    if (!g)
        return NULL;
    g->L = (i64 *)(g + 1);
    g->gram = (i32 *)(g->L + pairs + 2 * d);        // after two rows for refit()
    g->column = (Column *)(g->gram + pairs);
    g->T = (i16 *)(g->column + d);
    g->left = g->T + pairs;
    g->error = g->left + d;
    g->rows = rows;
    g->cols = cols;
    g->trellis = trellis;
    g->regress = regress;
    g->rate = c->rate;
    g->refit_at = 16;
    g->left[0] = 8;
    for (int i = 0; i < VOTES * PARTS; i++)
        memcpy(g->counters[i / PARTS][i % PARTS], c->prior, 4 * LEVELS * NODES);
    fill(g->by_part, sizeof g->by_part, (1 << 18) / VOTES);
    fill(g->by_blend, sizeof g->by_blend, (1 << 18) / VOTES);
    fill(g->odds, sizeof g->odds, 32768);
    return g;
}

// Ridge regression of every column on those to its left, of n rows: L D L' = keep * correlations + (1 - keep)
// * identity. Trust grows with the rows seen.
static void refit(Model *g, i64 n) {
    i64 d = g->cols + 1, keep = n * 250 / (n + 1000);
    i64 *sd = g->L + d * d, *b = sd + d;
    for (int i = 0; i < d; i++) {
        i64 *Li = g->L + i * d, square = g->gram[i * d + i] + n;
        for (sd[i] = 1 << 16; sd[i] * sd[i] > square;)
            sd[i] = (sd[i] + square / sd[i]) / 2;   // Newton's root, from above
        sd[i]++;
        for (int j = 0; j < i; j++) {
            const i64 *Lj = g->L + j * d;
            i64 target = g->gram[i * d + j] * (1ll << 24) / (sd[i] * sd[j]) * keep >> 4;
            i64 dot = 0;
            for (int k = 0; k < j; k++)
                dot += Li[k] * Lj[k];
            Li[j] = target - (dot >> 28);
        }
        i64 unexplained = 1 << 28;
        for (int j = 0; j < i; j++) {
            b[j] = Li[j] * (1 << 28) / g->L[j * d + j];
            unexplained -= b[j] * Li[j] >> 28;
            Li[j] = b[j];
        }
        Li[i] = unexplained < 1 << 16 ? 1 << 16 : unexplained;
        for (int j = i - 1; j >= 0; j--) {          // coefficients b: (L left of i)' b = row i of L
            for (int k = 0; k < j; k++)
                b[k] -= b[j] * g->L[j * d + k] >> 28;
            g->T[i * d + j] = clamp((b[j] >> 8) * sd[i] / sd[j] >> 8, -32767, 32767);
        }
    }
}

// What is expected of a row before its first code.
static void start_row(Model *g, i64 row) {
    i64 mean = 0;
    for (int j = 0; j < g->cols; j++)
        mean += g->column[j].slow;
    mean = row ? mean / g->cols : 6 << 18;
    if (row % g->rows == 0) {       // a new matrix: one estimate starts from the last matrix, one afresh
        g->age = row ? 12 : 6;
        for (int j = 0; j < g->cols; j++) {
            g->column[j].fast = row ? g->column[j].slow : mean;
            g->column[j].slow = mean;
        }
    }
    if (row % g->rows % TRELLIS_ROWS == 0)
        for (int j = 0; j < g->cols; j++)
            g->column[j].state = 0;
    g->rate_slow = g->rate[clamp(g->age, 0, 1023)];
    g->rate_fast = g->rate[clamp(g->age, 0, 250)];
    g->seen = g->expected = g->recent = mean;
    g->spent = 0;
    g->rest = mean * g->cols;
    g->budget = row ? g->energy : g->rest;
    g->first = row * g->cols;
    g->share[0] = g->share[1] = 0;
}

// Up to two earlier rows named by the encoder, whose regression errors this row is expected to share.
static void code_similar_rows(Coder *c, Model *g, i64 row, const i32 *alike) {
    int bits = 32 - __builtin_clz((u32)row);
    for (int k = 0; k < 2; k++) {
        g->share[k] = code_number(c, alike[k] & 7, 3, g->odds[k]) & 7;
        if (!g->share[k])
            break;
        int which = code_number(c, alike[k] >> 3, bits, NULL) - (1 << bits);
        g->similar[k] = which < row ? which * g->cols : 0;      // a forged stream may name any
    }
}

// This row against its columns. All rows have nearly the same energy (their step is proportional to their
// deviation), so what is left of it tells the scale of the codes to come, less surely towards the end; with
// regression a row goes by its past.
static inline i64 row_ratio(const Model *g, int j) {
    if (g->regress)
        return clamp((g->seen << 8) / (g->expected + 1), 64, 1024);
    i64 rest = g->rest > 0 ? g->rest : 0;
    i64 excess = clamp((g->budget - g->spent) * 256 / (rest + 1), 64, 1024) - 256;
    i64 to_come = g->cols - j;
    return 256 + excess * to_come / (to_come + (g->cols >> 6));
}

// The place nearest to the prediction. With the trellis codes count half steps; its state says odd or even.
static inline void locate(Model *g, int j, Place *p) {
    p->own = p->mu = 0;
    if (g->regress) {
        const i16 *T = g->T + (j + 1) * (g->cols + 1);
        i32 own = 0;
        for (int k = 0; k <= j; k++)
            own += T[k] * g->left[k];
        p->own = (own + (128 << g->trellis)) >> (8 + g->trellis);
        i32 shared = 0;
        for (int k = 0; k < 2; k++)
            shared += g->error[g->similar[k] + j] * g->share[k];
        p->mu = clamp(p->own + (shared >> 3), -1023, 1023);
    }
    p->odd = g->trellis & g->column[j].state;
    int near = p->mu - 8 * p->odd;
    p->m = (near + 8) >> 4;
    int rest = near - p->m * 16;
    p->flip = rest < 0 ? -1 : 1;
    i64 ratio = row_ratio(g, j);
    int part = rest * p->flip, odd = 0;
    if (!g->regress) {
        odd = p->odd;
        part = clamp(((ratio - 256) >> 5) + 4, 0, 8) + 9 * odd;
    }
    i64 A = g->column[j].slow >> 10;
    i64 B = A * ratio >> 8;
    i64 F = (g->column[j].fast >> 10) * ratio >> 8;
    int blend = level((B * 4 + F * 3 + (g->recent >> 10)) >> 3);
    p->voters = (Voters){{g->counters[0][odd][level(A)], g->counters[1][odd][level(F)],
                          g->counters[2][part][blend], g->counters[3][part][level(B)]},
                         {g->by_part[part], g->by_blend[blend]}};
}

// The distance t in whole steps: zero? negative? then is its size 2 or more, 3 or more, ...
static inline int code_distance(Coder *c, const Voters *v, int t) {
    int size = abs(t), found = 1;
    if (decide(c, v, 0, 0, t == 0))
        return 0;
    int sign = decide(c, v, 1, 1, t < 0) ? -1 : 1;
    while (found < NODES - 1 && decide(c, v, found + 1, found + 1, size > found))
        found++;
    if (found == NODES - 1)
        while (found < 255 && code_bit(c, size > found, 32768))
            found++;
    return sign * found;
}

static inline void learn_code(Model *g, int j, int code, const Place *p) {
    int value = code * (16 >> g->trellis);
    Column *column = g->column + j;
    i32 state = column->state;      // of next_state() in section 8; `code` has its parity
    g->left[j + 1] = code;
    column->state = state >> 1 ^ 33 * (state & 1) ^ 10 * (code >> 1 & 1);
    i64 distance = clamp(value - p->mu, -1023, 1023);
    i64 variance = distance * distance << 10;
    if (g->regress) {
        i32 step = g->rate[clamp(j + 16, 0, 400)];
        g->error[g->first + j] = clamp(value - p->own, -32767, 32767);
        g->seen += (variance - g->seen) * step >> 16;
        g->expected += (column->slow - g->expected) * step >> 16;
    }
    g->recent += (variance - g->recent) >> 4;
    g->spent += variance;
    g->rest -= column->slow;
    column->slow += (variance - column->slow) * g->rate_slow >> 16;
    column->fast += (variance - column->fast) * g->rate_fast >> 16;
}

static void learn_row(Model *g, i64 row) {
    i64 d = g->cols + 1;
    g->age++;
    g->energy += row ? (g->spent - g->energy) * g->rate[clamp(row, 0, 1023)] >> 16 : g->spent;
    for (int i = 0; g->regress && i < d; i++)
        for (int j = 0; j <= i; j++)
            g->gram[i * d + j] += g->left[i] * g->left[j];
}

// Codes x[matrices][rows][cols]; `alike` of similar_rows() asks for regression, NULL for none. Returns the
// bytes written, more than cap when they do not fit, -1 when a code is off the trellis.
i64 code_codes(const Coder *coder, int8_t *x, i64 matrices, i64 rows, i64 cols, i64 trellis,
               const i32 *alike) {
    Coder c = *coder;
    c.max_age = 1000;
    c.speed = 2;
    Model *g = new_model(&c, matrices, rows, cols, trellis, alike != NULL);
    if (!g)
        return -2;
    int valid = 1;
    for (i64 row = 0; row < matrices * rows; row++) {
        start_row(g, row);
        if (alike && row)
            code_similar_rows(&c, g, row, alike + 2 * row);
        if (alike && row >= g->refit_at) {
            refit(g, row);
            g->refit_at += g->refit_at / 3 + 1;
        }
        for (int j = 0; j < cols; j++) {
            i64 at = row * cols + j;
            Place p;
            locate(g, j, &p);
            int t = c.decode ? 0 : (((x[at] - p.odd) >> trellis) - p.m) * p.flip;
            t = code_distance(&c, &p.voters, t);
            if (c.decode)
                x[at] = clamp((t * p.flip + p.m) * (1 << trellis) + p.odd, -128, 127);
            if (trellis && (x[at] & 1) != p.odd)
                valid = 0;
            learn_code(g, j, x[at], &p);
        }
        learn_row(g, row);
    }
    free(g);
    return valid ? finish(&c) : -1;
}

// --- words ---

// Words x[n]: high byte, then low byte, bit by bit. Views: none, the previous word, the one `stride` back,
// both of them.
i64 code_words(const Coder *coder, u16 *x, i64 n, i64 stride) {
    Coder c = *coder;
    c.max_age = 250;
    c.speed = 60;
    u32 (*counters)[VOTES][256][256] = malloc(2 * sizeof *counters);
    if (!counters)
        return -2;
    i32 weights[2][2][8][VOTES];            // by half, set, bit
    fill(counters, 2 * sizeof *counters, 1u << 31 | 2);
    fill(weights, sizeof weights, 105000);
    for (i64 i = 0; i < n; i++) {
        int prev = i ? x[i - 1] : 0;
        int back = i >= stride ? x[i - stride] : 0;
        int word = c.decode ? 0 : x[i];
        int high = 0;
        for (int half = 0; half < 2; half++) {
            int view[VOTES] = {0, prev >> 8, back >> 8, prev >> 12 << 4 | back >> 12};
            if (half) {
                view[1] = high;
                view[2] = prev >> 8 == high ? 1 + (prev >> 4 & 15) : 0;
                view[3] = back >> 8 == high ? 1 + (back >> 1 & 127) : 0;
            }
            Voters v = {.weights = {weights[half][0], weights[half][1]}};
            for (int s = 0; s < VOTES; s++)
                v.counters[s] = counters[half][s][view[s]];
            int node = 1;
            for (int k = 7; k >= 0; k--)
                node = node << 1 | decide(&c, &v, node, k, word >> (k + 8 - 8 * half) & 1);
            high = high << 8 | (node & 255);
        }
        x[i] = high;
    }
    free(counters);
    return finish(&c);
}

// --- n-gram hints ---

// An n-gram: `length` tokens, compared one by one with those where it was seen; hashes only find it. Those
// of `context` tokens are contexts. Those one longer count a token after its context, for contexts that were
// followed by more than one token.
typedef struct {
    u32 begin, length;      // where it was seen, a context before its top token; length 0: empty
    u32 total, best;        // times it was counted; of a context, times its top token followed
} Ngram;

static inline u64 mix(u64 h, u64 x) {
    h = (h ^ x) * 0xd6e8feb86659fd93u;
    return h ^ h >> 32;
}

// Where to begin to look for a hash.
static inline i64 slot(u64 hash, i64 capacity) {
    return (unsigned __int128)hash * capacity >> 64;
}

// The place of tokens[begin...] in the table, taken now when they are new.
static inline Ngram *find(Ngram *table, i64 capacity, u64 hash, const u16 *tokens, i64 begin, u32 length) {
    for (i64 at = slot(hash, capacity);; at = at + 1 < capacity ? at + 1 : 0) {
        Ngram *g = table + at;
        if (!g->length)
            *g = (Ngram){begin, length, 0, 0};
        if (g->length == length && !memcmp(tokens + g->begin, tokens + begin, 2 * length))
            return g;
    }
}

// Looks up, then counts n targets in order. The table has room for more n-grams than 1.5 per target.
void ngram_feed(Ngram *table, i64 capacity, const u16 *tokens, i64 context, float threshold,
                i64 n, const i64 *order, const i64 *doc_start, i32 *hint, float *confidence) {
    enum { AHEAD = 16 };                    // look-ups begun early, for the table lies in slow memory
    u64 hashes[2 * AHEAD];
    for (i64 k = -AHEAD; k < n; k++) {
        i64 ahead = k + AHEAD < n ? order[k + AHEAD] : -1;
        if (ahead >= 0 && ahead + 1 - context >= doc_start[k + AHEAD]) {
            u64 h = 0;
            for (int i = 0; i < context; i++)
                h = mix(h, tokens[ahead - i]);
            hashes[(k + AHEAD) % (2 * AHEAD)] = h;
            __builtin_prefetch(table + slot(h, capacity));
        }
        if (k < 0)
            continue;
        i64 begin = order[k] + 1 - context;
        hint[k] = -1;
        confidence[k] = 0;
        if (begin < doc_start[k])
            continue;
        u64 hash = hashes[k % (2 * AHEAD)];
        Ngram *g = find(table, capacity, hash, tokens, begin, context);
        u16 top = tokens[g->begin + context], token = tokens[begin + context];
        if (g->total) {
            confidence[k] = (float)g->best / (float)g->total;
            if (confidence[k] >= threshold)
                hint[k] = top;
        }
        u32 count = g->best + 1;
        if (token != top || g->best < g->total) {
            if (g->best == g->total)        // the first token that deviates
                find(table, capacity, mix(hash, top), tokens, g->begin, context + 1)->total = g->best;
            count = ++find(table, capacity, mix(hash, token), tokens, begin, context + 1)->total;
        }
        g->total++;
        if (count > g->best) {
            g->best = count;
            g->begin = begin;
        }
    }
}
"""


# --- 19 main ------------------------------------------------------------------------------------------------
# Exit codes: 0 success, 1 a check or the run failed, 2 bad settings or usage, 130 SIGINT, 143 SIGTERM.

def main(argv: Sequence[str]) -> int:
    if argv in (["--help"], ["-h"]):
        print(f"{__doc__}\nSettings (environment variables):\n\n{settings_table()}")
        return 0
    if argv:
        print(f"unexpected arguments {argv}; settings are environment variables, see --help", file=sys.stderr)
        return 2
    run = None

    def stage() -> str:
        return run.stage_name if run else "start"

    def interrupted(number: int) -> int:
        report(run, f"interrupted by {signal.Signals(number).name} in stage {stage()}")
        return 128 + number

    try:
        with catch_signals(lambda number: os._exit(interrupted(number))):
            cfg = Config.from_env(os.environ)
            with Run.start(cfg) as run:
                run_pipeline(cfg, run)
    except (ConfigError, DataError, ArtifactError, RunError) as error:
        report(run, f"error: {error}")
        return 2 if isinstance(error, ConfigError) else 1
    except Interrupted as error:
        return interrupted(error.args[0])
    except Exception as error:
        rank = os.environ.get("RANK", "0")
        if report(run, f"error: unexpected {type(error).__name__} of rank {rank} in stage {stage()}", False):
            traceback.print_exc()
        return 1                                                # what follows another rank's error is no news
    return 0


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    if "RANK" in os.environ:            # a communicator that lost a rank may never finish its clean-up, and
        with contextlib.suppress(OSError):            # threads of a sound one need an interpreter that lives
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
