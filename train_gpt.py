#!/usr/bin/env python3
"""Train a 16 MB language model in ten minutes, ship it, and score it: the whole run in one file.

    train -> average -> quantize -> artifact -> restore -> diagnostics -> score-first test-time training

Run it through run.sh (`SEED=42 ./run.sh`), or by hand on any machine:

    DATA_PATH=shards python train_gpt.py                            one process, GPU or CPU
    python launch.py 8 train_gpt.py                                 the record machine; torchrun works too
    python train_gpt.py --help                                      every setting, its default and meaning

Settings are environment variables; nothing else is read from outside. Importing this file has no side effects.

Dimensions: B documents in a batch, T positions, N = B*T flattened, D model width, H query heads, G key/value
heads, K head width, F MLP width, V vocabulary, L layers, R adapter rank. Weights are (out, in) like nn.Linear.

Contents, definitions: 1 configuration   2 runtime   3 data   4 model   5 schedules and EMA   6 optimizers
           7 training   8 quantization   9 weight coder   10 artifact   11 scoring   12 hints and order
           13 test-time training   14 pipeline
Fast paths, each naming what it replaces: 15 attention kernels   16 Triton kernels   17 compilation
           18 C sources   19 main

References:
  [GQA]   Ainslie et al. 2023, grouped-query attention          [RoPE]  Su et al. 2021, rotary positions
  [XSA]   Zhai 2026, exclusive self attention                   [Muon]  Jordan et al. 2024, orthogonalized momentum
  [PE]    Amsel et al. 2025, Polar Express                      [GPTQ]  Frantar et al. 2022
  [AWQ]   Lin et al. 2023, activation-aware quantization        [LQER]  Zhang et al. 2024, low-rank error correction
  [LoRA]  Hu et al. 2021                                        [TTT]   Sun et al. 2020, test-time training
  [lpaq]  Mahoney 2005, adaptive weighing of context models     [TCQ]   Marcellin & Fischer 1990, trellis-coded q.
  [REF]   openai/parameter-golf PR #2124, the run whose behaviour and hyperparameters this script follows
"""
from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import functools
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


# --- 1 configuration ----------------------------------------------------------------------------------------
# The only reader of settings: names, types, defaults, meaning, and the relations between them.

class ConfigError(ValueError):
    """A setting is unknown, ill-typed, out of range, or contradicts another one."""


def knob(default: Any, doc: str, low: float = -math.inf, high: float = math.inf, choices: tuple = ()) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc, "low": low, "high": high, "choices": choices})


BELOW_ONE = 1 - 1e-9         # decays of 1 would divide by zero in Adam's bias correction
# Settings of the reference that have one meaning here. Any other value would silently do something else.
FIXED_SETTINGS: dict[str, tuple[str, str]] = {
    name: (value, reason) for names, value, reason in (
        ("GATED_XSA SMEAR_GATE_ENABLED SPARSE_ATTN_GATE_ENABLED SKIP_GATES_ENABLED LN_SCALE TIE_EMBEDDINGS "
         "ASYM_LOGIT_RESCALE", "1", "the architecture always has it"),
        ("XSA_LAST_N", "11", "every layer has exclusive self attention, however many there are"),
        ("PARALLEL_FINAL_LANE", "mean", "the two lanes are always averaged"),
        ("SPARSE_ATTN_GATE_INIT_STD", "0", "gates always start at one half"),
        ("CASEOPS_ENABLED", "1", "bytes are always counted from the CaseOps sidecar"),
        ("LQER_SCOPE", "all", "every quantized matrix competes"),
        ("LQER_GAIN_SELECT TTT_EVAL_BATCHES FORCE_STOP_STEP ROPE_YARN SKYLIGHT_MUON ATTN_OUT_GATE_ENABLED "
         "GATED_ATTN_ENABLED GATED_ATTN_QUANT_GATE NGRAM_HINT_PRECOMPUTE_OUTSIDE GLOBAL_TTT_WARMUP_CHUNKS", "0",
         "the feature does not exist in this script"),
        ("WITHIN_BOOST WORD_BOOST AGREE_ADD_BOOST", "0",
         "that n-gram channel looks at the token being scored before choosing its hint, which is not causal"),
        ("LQER_FACTOR_BITS", "4", "the symmetric fallback packs 4 bits"),
        ("TILT_MODE", "fixed", "no other mode exists yet"),
        ("MATRIX_CLIP_SIGMAS", "12.85", "no tensor falls in that class"),
        ("TTT_OPTIMIZER", "adam", "adapters are trained with AdamW"),
        ("TTT_GRAD_STEPS PHASED_TTT_NUM_PHASES GLOBAL_TTT_EPOCHS GLOBAL_TTT_RESPECT_DOC_BOUNDARIES "
         "TEMPERATURE_SCALE VAL_DOC_FRACTION", "1", "no other value is implemented"))
    for name in names.split()}
RETIRED_SETTINGS = {
    "VAL_LOSS_EVERY": "validation data is not read before the last training step",
    "EVAL_STRIDE": "plain evaluation has no overlap",
    "ROPE_TRAIN_SEQ_LEN": "rotary positions are never rescaled",
    "EMBED_LR": "embeddings are tied; set TIED_EMBED_LR",
    **dict.fromkeys(("BETA2_NORMUON", "UW_FLOOR", "GATED_ATTN_INIT_STD", "ATTN_OUT_GATE_SRC", "WORD_ORDER",
                     "GLOBAL_TTT_WARMUP_START_LR", "WORD_NORMALIZE"), "it has no effect in the record run"),
}
OWNED_PREFIXES = tuple((
    "TTT_ LQER_ MUON_ GLOBAL_TTT_ PHASED_TTT_ NGRAM_ GPTQ_ AWQ_LITE_ XSA_ SPARSE_ATTN_ TIED_EMBED_ LOOP_ TOKEN_ "
    "WITHIN_ WORD_ PARALLEL_ ROPE_ TRAIN_ VAL_ EVAL_ MATRIX_ WARMDOWN_ WARMUP_ GATED_ SKYLIGHT_ SMEAR_ LOGIT_ EMBED_ "
    "ADAM_ EMA_ ENABLE_LOOP").split())


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run; the environment variable is the field name in capitals."""
    # run
    seed: int = knob(42, "PRNG seed, equal on all ranks", 0, 2**31 - 1)
    run_id: str = knob("", "names log, checkpoint and artifact; default: seed and start time")
    data_path: str = knob("data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved", "folder of shards")
    tokenizer_path: str = knob("", "SentencePiece model; default: the one named by the data, else the shipped one")
    compile: bool = knob(True, "0 runs every graph without torch.compile")
    allow_slow: bool = knob(False, "1 lets a CUDA run go on without FlashAttention-3/4 or torch.compile")
    allow_unverified: bool = knob(False, "1 lets a run use shards without manifest or check figures")
    prequant_only: bool = knob(False, "1 stops after training and the first diagnostic")
    quantize_only: bool = knob(False, "1 starts from the checkpoint of RUN_ID instead of training")
    ttt_eval_only: bool = knob(False, "1 starts from the artifact of RUN_ID")
    audit: bool = knob(False, "1 writes the full scoring order beside the log and checks its coverage")
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
    logit_softcap: float = knob(30.0, "initial value of both logit caps", 1.0)
    tied_embed_init_std: float = knob(0.005, "standard deviation of the initial embedding", 0.0)
    # training
    iterations: int = knob(20000, "step cap; also the schedule's length when MAX_WALLCLOCK_SECONDS=0", 1)
    max_wallclock_seconds: float = knob(600.0, "training budget, calibration included; 0: schedule by step", 0.0)
    gptq_reserve_seconds: float = knob(4.0, "part of the budget kept for calibration", 0.0)
    train_batch_tokens: int = knob(786432, "tokens per optimizer step, always 8 rows", 8)
    train_seq_len: int = knob(2048, "longest attention segment in training; calibration sequence length", 1)
    warmup_steps: int = knob(20, "compile warm-up steps per loop state, undone afterwards", 0)
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
    eval_wallclock_seconds: float = knob(600.0, "evaluation budget; exceeding it is reported", 0.0)
    # quantization
    matrix_bits: int = knob(6, "bits of attention and MLP codes", 2, 8)
    embed_bits: int = knob(7, "bits of embedding codes", 2, 8)
    gptq_calibration_batches: int = knob(16, "calibration batches of one training row's tokens each", 1)
    attn_clip_sigmas: float = knob(13.0, "attention: clip range in row standard deviations", 0.1)
    mlp_clip_sigmas: float = knob(11.5, "MLP: clip range in row standard deviations", 0.1)
    embed_clip_sigmas: float = knob(14.0, "embedding: clip range in row standard deviations", 0.1)
    fill_artifact: bool = knob(False, "1 lowers the clip sigmas until the artifact fills the size limit")
    rdo_lambda: float = knob(0.0, "0: plain GPTQ; above: trellis rounding, and a share, up to 1, of the way to "
                             "steps for which a bit buys the same loss in every matrix", 0.0, 1.0)
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
    ttt_beta1: float = knob(0.0, "adapter AdamW first-moment decay", 0.0, BELOW_ONE)
    ttt_beta2: float = knob(0.999, "adapter AdamW second-moment decay", 0.0, BELOW_ONE)
    ttt_weight_decay: float = knob(2.0, "adapter AdamW weight decay", 0.0)
    ttt_warm_start_a: bool = knob(True, "keep A between full batches of one lane; 0 draws it anew")
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
    token_boost: float = knob(2.625, "log-odds added to a hinted token", 0.0)

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Config":
        """Read every setting from `env`. Raises ConfigError for unknown, misspelt, retired or ill-typed ones."""
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
        return cls(**{name: parse_value(key, kind, env[key]) for key, (name, kind) in kinds.items() if key in env})

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value, meta = field.name.upper(), getattr(self, field.name), field.metadata
            if meta["choices"] and value not in meta["choices"]:
                raise ConfigError(f"{name}={value}: expected one of {list(meta['choices'])}")
            if not isinstance(value, (bool, str)) and not meta["low"] <= value <= meta["high"]:
                raise ConfigError(f"{name}={value}: expected a value between {meta['low']} and {meta['high']}")
        for ok, message in (
                (self.model_dim % self.num_heads == 0, "MODEL_DIM must be a multiple of NUM_HEADS"),
                (self.num_heads % self.num_kv_heads == 0, "NUM_HEADS must be a multiple of NUM_KV_HEADS"),
                (self.rope_dims % 2 == 0 and self.rope_dims <= self.head_dim,
                 f"ROPE_DIMS must be even and at most the head width {self.head_dim}"),
                (self.gate_window <= self.model_dim, "GATE_WINDOW must be at most MODEL_DIM"),
                (self.mlp_dim * 1.0 == self.mlp_mult * self.model_dim, "MLP_MULT times MODEL_DIM must be whole"),
                (self.loop_start <= self.loop_end < self.parallel_start_layer <= self.num_layers,
                 "expected LOOP_START <= LOOP_END < PARALLEL_START_LAYER <= NUM_LAYERS"),
                (self.train_batch_tokens % (ROWS_PER_STEP * self.train_seq_len) == 0, "TRAIN_BATCH_TOKENS must be a "
                 f"multiple of {ROWS_PER_STEP} * TRAIN_SEQ_LEN: one step is {ROWS_PER_STEP} rows of whole sequences"),
                (self.val_batch_tokens // ROWS_PER_STEP >= self.eval_seq_len,
                 f"VAL_BATCH_TOKENS/{ROWS_PER_STEP} must hold one sequence of EVAL_SEQ_LEN"),
                (self.gptq_reserve_seconds < self.max_wallclock_seconds or self.max_wallclock_seconds == 0,
                 "GPTQ_RESERVE_SECONDS must be below MAX_WALLCLOCK_SECONDS"),
                (self.ttt_chunk_size < self.ttt_eval_seq_len, "TTT_CHUNK_SIZE must be below TTT_EVAL_SEQ_LEN"),
                (self.phased_ttt_prefix_docs == 0 or self.global_ttt_chunk_tokens >= self.ttt_eval_seq_len,
                 "GLOBAL_TTT_CHUNK_TOKENS must hold one sequence of TTT_EVAL_SEQ_LEN"),
                (self.prequant_only + self.quantize_only + self.ttt_eval_only <= 1,
                 "set at most one of PREQUANT_ONLY, QUANTIZE_ONLY, TTT_EVAL_ONLY"),
                (self.run_id or not (self.quantize_only or self.ttt_eval_only),
                 "QUANTIZE_ONLY and TTT_EVAL_ONLY need RUN_ID, the run to go on from"),
                (re.fullmatch(r"[\w.+-]*", self.run_id), "RUN_ID may hold letters, digits and . _ + - only")):
            if not ok:
                raise ConfigError(f"{message}; found " + ", ".join(
                    f"{name}={getattr(self, name.lower())}" for name in re.findall(r"\b[A-Z][A-Z_]+[A-Z]\b", message)
                    if hasattr(self, name.lower())))

    head_dim = property(lambda self: self.model_dim // self.num_heads)
    kv_dim = property(lambda self: self.num_kv_heads * self.head_dim)
    mlp_dim = property(lambda self: int(self.mlp_mult * self.model_dim))
    row_tokens = property(lambda self: self.train_batch_tokens // ROWS_PER_STEP)
    # Bound on segments in training and plain evaluation; one number, so that both use the same graphs.
    longest_segment = property(lambda self: max(self.train_seq_len, self.eval_seq_len))


ROWS_PER_STEP = 8            # one optimizer step is 8 rows on any number of GPUs
BOS = 1
OPERATOR_IDS = (4, 5, 6, 7)  # the four CaseOps operators
SIZE_LIMIT = 16_000_000      # bytes of code plus weights
# left free, should another release of liblzma pack the same script a little longer
CODE_MARGIN = 256


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
    if kind in (int, float) and math.isfinite(value := _number(text, kind)):
        return value
    expected = {bool: "0 or 1", int: "a whole number", float: "a finite number"}[kind]
    raise ConfigError(f"{key}={text!r}: expected {expected}")


def _refuse_misspelt(key: str, known: Sequence[str]) -> None:
    if key.startswith(OWNED_PREFIXES):
        near = difflib.get_close_matches(key, known, 3, 0.6)
        raise ConfigError(f"unknown setting {key}" + (f"; did you mean {' or '.join(near)}?" if near else "")
                          + " `python train_gpt.py --help` lists all settings")
    for name in known:
        # Short names have innocent neighbours in any environment (EDIT is two edits from AUDIT).
        allowed = 2 if min(len(name), len(key)) >= 7 else 1
        if abs(len(name) - len(key)) <= allowed and key != name and edit_distance(key, name) <= allowed:
            raise ConfigError(f"unknown setting {key}; did you mean {name}? Unset it or correct its name")


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def settings_table() -> str:
    """The table of `--help` and of the README: name, default, meaning."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(Config):
        default = int(field.default) if isinstance(field.default, bool) else field.default
        rows.append(f"| `{field.name.upper()}` | {f'`{default}`' if default != '' else ''} | {field.metadata['doc']} |")
    return "\n".join(rows)


# --- 2 runtime ----------------------------------------------------------------------------------------------
# Rank, device, collectives and the log file. At world size 1 every collective is a no-op.

REPO = Path(__file__).resolve().parent
# silence allowed to a stage; hashing and compiling may take longer
HANG_LIMIT_S, START_LIMIT_S = 100.0, 1800.0
SIGNAL_GRACE_S = 3.0                              # then a call that does not return is abandoned
DISK_RETRY_S = 5.0
LONGEST_RUN_ID = 100


class RunError(RuntimeError):
    """The run cannot go on, or its result cannot be believed; the text is one sentence for the user."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived; args[0] is its number."""


class Run:
    """Process-wide facts and services; create with Run.start(), use as a context manager. `sum` and `broadcast` work
    in place on tensors of any dtype on the run's device.

    origin      SHA-256 of tokenizer and code, written into checkpoints and artifacts.
    last_good   the last finite number that the run reported, in words, for error messages.
    clocks      seconds of "load", "compile" and "eval", for the readings of the evaluation limit.
    """

    def __init__(self, cfg: Config, rank: int = 0, world_size: int = 1, device: torch.device | None = None,
                 log_path: Path | None = None) -> None:
        self.cfg, self.rank, self.world_size = cfg, rank, world_size
        self.device = device or torch.device("cpu")
        # bf16 matmuls on GPUs; CPUs are for checks and small demos, where fp32 is both exact and faster.
        self.compute_dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.run_id, self.log_path = cfg.run_id, log_path
        self.origin: dict[str, str] = {}
        self.last_good = "none yet"
        self.clocks: dict[str, float] = {}
        self._host_group = self._store = self._log_file = None
        self._unwritten = bytearray()            # log lines that are not in the file yet
        self._has_begun = False
        self._ended = threading.Event()
        self._shows_progress = rank == 0 and not cfg.quiet and sys.stdout.isatty()
        self._progress_width, self._progress_at = 0, 0.0
        self.stage("start", START_LIMIT_S)

    @classmethod
    def start(cls, cfg: Config, env: Mapping[str, str] = os.environ) -> "Run":
        """Join the ranks that the launcher started (or run alone), pick the device, claim RUN_ID on rank
        0."""
        rank, world_size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        local_rank = int(env.get("LOCAL_RANK", 0))
        if ROWS_PER_STEP % world_size:
            raise ConfigError(f"WORLD_SIZE={world_size}: expected 1, 2, 4 or 8, because one optimizer step is "
                              f"{ROWS_PER_STEP} rows dealt evenly to the ranks; change --nproc_per_node")
        if cfg.run_id in (".", "..") or len(cfg.run_id) > LONGEST_RUN_ID:
            raise ConfigError(f"RUN_ID={cfg.run_id[:20]!r} ({len(cfg.run_id)} characters): expected the "
                              f"beginning of a "
                              f"file name, at most {LONGEST_RUN_ID} characters and neither . nor ..; choose "
                              f"another")
        device = torch.device("cpu")
        if torch.cuda.is_available():
            # so that all ranks refuse, not only some
            last = int(env.get("LOCAL_WORLD_SIZE", local_rank + 1)) - 1
            if last >= torch.cuda.device_count():
                raise ConfigError(f"LOCAL_RANK={last}: expected below {torch.cuda.device_count()}, the GPUs "
                                  f"of "
                                  "this machine; lower NPROC_PER_NODE")
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")
        run = cls(cfg, rank, world_size, device)
        if world_size > 1:
            run._join_ranks()
        started = datetime.datetime.now().strftime(f"seed{cfg.seed}_%Y%m%d_%H%M%S")
        run.run_id = run.share(run.run_id or started)
        run.log_path = Path("logs") / f"{run.run_id}.txt"
        if rank == 0:
            run._claim_run_id()
        return run

    def _join_ranks(self) -> None:
        if not dist.is_initialized():
            on_gpu = self.device.type == "cuda"
            self._store, _, _ = next(dist.rendezvous("env://", self.rank, self.world_size))
            dist.init_process_group("nccl" if on_gpu else "gloo", store=self._store, rank=self.rank,
                                    world_size=self.world_size, device_id=self.device if on_gpu else None)
        # _watch limits every wait, with a limit of its own for each stage.
        self._host_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
        threading.Thread(target=self._watch, daemon=True).start()

    def _claim_run_id(self) -> None:
        """Open and lock the log; refuse the name of a run that goes on, or that has left something behind."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        # The lock belongs to the open file, so a run that is killed leaves none.
        self._log_file = os.open(self.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(self._log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._log_file)
            self._log_file = None
            raise ConfigError(f"RUN_ID={self.run_id}: a run of this name is going on; wait for it, or choose "
                              "another RUN_ID") from None
        resumes = self.cfg.quantize_only or self.cfg.ttt_eval_only
        left = [path for path in (self.log_path, checkpoint_path(self), artifact_path(self))
                if path.exists() and path.stat().st_size]
        if left and not resumes:
            self._close_log()
            raise ConfigError(f"RUN_ID={self.run_id}: {left[0]} exists from an earlier run; choose another "
                              f"RUN_ID, "
                              "remove that run's files, or go on from it with QUANTIZE_ONLY=1 or "
                              "TTT_EVAL_ONLY=1")

    def begin(self) -> None:
        """Call when every check of the start has passed: from here on the log is kept."""
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
        if dist.is_initialized() and error is None:     # after an error the other ranks may not answer any more
            dist.destroy_process_group()

    def _close_log(self) -> None:
        self._write_log()
        if not os.fstat(self._log_file).st_size:
            self.log_path.unlink(missing_ok=True)       # a start that failed leaves no log
        os.close(self._log_file)
        self._log_file = None

    def _write_log(self) -> None:
        """Write what waits. A full disk must not end a run: what does not fit waits for the next line."""
        with contextlib.suppress(OSError):
            while self._has_begun and self._unwritten:
                del self._unwritten[:os.write(self._log_file, self._unwritten)]

    def log(self, line: str) -> None:
        """Write one line to stdout and to logs/<RUN_ID>.txt (rank 0 only)."""
        self.beat()
        if self.rank == 0:
            self.progress("")
            print(line, flush=True)
            if self._log_file is not None:
                self._unwritten += f"{line}\n".encode()
                self._write_log()

    def progress(self, text: str) -> None:
        """Show `text` in one line that rewrites itself: on a terminal, on rank 0, unless QUIET=1. "" removes
        it."""
        self.beat()
        now = time.monotonic()
        is_due = now - self._progress_at >= 0.2 if text else self._progress_width > 0
        if not (self._shows_progress and is_due):
            return
        text = text[:shutil.get_terminal_size().columns - 1]
        print(f"\r{text:<{self._progress_width}}" + ("" if text else "\r"), end="", flush=True)
        self._progress_width, self._progress_at = len(text), now

    def stage(self, name: str, limit_s: float = HANG_LIMIT_S) -> None:
        """Say what begins now. With several ranks, one that makes no progress for limit_s ends the run."""
        self.stage_name, self._limit_s = name, limit_s
        self.beat()

    def beat(self) -> None:
        """Progress was made: called by every log line, step and collective."""
        self._beat_at = time.monotonic()

    def _watch(self) -> None:
        """End this rank when it makes no progress: it hangs, or waits in a collective for another that
        does."""
        while not self._ended.wait(min(1.0, self._limit_s / 4)):
            silence_s = time.monotonic() - self._beat_at
            if silence_s > self._limit_s:
                self.report(f"error: rank {self.rank} made no progress for {silence_s:.0f} s in stage "
                            f"{self.stage_name}: it hangs, or waits for a rank that does; look at the GPUs "
                            f"and start again")
                os._exit(1)

    def report(self, sentence: str) -> bool:
        """Print an error on stderr unless another rank has told one already; says whether this rank was the
        first."""
        is_first = self.rank == 0
        if self._store is not None:
            # the store ends with rank 0, which has then told its error
            with contextlib.suppress(RuntimeError):
                is_first = self._store.add("errors_told", 1) == 1
        if is_first:
            self.progress("")
            print(sentence, file=sys.stderr, flush=True)
        return is_first

    def share(self, value: Any) -> Any:
        """Rank 0's value (JSON) on every rank."""
        if self.world_size == 1:
            return value
        box = [json.dumps(value)]
        dist.broadcast_object_list(box, src=0, group=self._host_group)
        self.beat()
        return json.loads(box[0])

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

    def agree(self, values: Sequence[float]) -> list[float]:
        """Rank 0's `values` on every rank, float64; through the host, so that decisions do not stall the GPU."""
        if self.world_size == 1:
            return list(values)
        box = torch.tensor(list(values), dtype=torch.float64)
        dist.broadcast(box, src=0, group=self._host_group)
        self.beat()
        return box.tolist()

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self._host_group)
            self.beat()

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def generator(self, *keys: int) -> torch.Generator:
        """A generator on the run's device that depends on SEED and `keys` only."""
        return torch.Generator(self.device).manual_seed(int(np.random.SeedSequence(
            (self.cfg.seed, *keys)).generate_state(1, np.uint64)[0] >> np.uint64(1)))


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
    """Raise RunError unless every value is finite. On a GPU it waits for the values: not for use inside
    steps."""
    for value in values:
        if not bool(torch.isfinite(torch.as_tensor(value)).all()):
            shown = f" is {value}" if isinstance(value, float) else " holds NaN or infinity"
            raise RunError(f"{what}{shown} in stage {run.stage_name}; last good value: {run.last_good}; "
                           f"lower MATRIX_LR "
                           "or check the data")


def save(run: Run, path: Path, data: bytes) -> None:
    """write_file that loses nothing to a full disk: says what is missing and waits, until it works or is
    interrupted."""
    told = None
    while True:
        try:
            return write_file(path, data)
        except OSError as error:
            if told != (told := error.strerror):
                run.log(f'write waiting file:{path.name} bytes:{len(data)} reason:"{told}; make '
                        f'{len(data):,} bytes of '
                        f'room in {path.parent.name}, the weights wait in memory"')
            time.sleep(DISK_RETRY_S)


@contextlib.contextmanager
def catch_signals(give_up: Callable[[int], None]) -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted in the main thread. Where that is stuck in a call that does not
    return,
    give_up(signal number) is called from another thread after SIGNAL_GRACE_S; it must end the process."""
    def interrupt(number: int, frame: Any) -> None:
        for handled in previous:
            signal.signal(handled, signal.SIG_IGN)       # a second one must not disturb the way out
        raise Interrupted(number)

    def watch() -> None:
        # written by the C handler, whatever the main thread does
        number = os.read(receiver, 1)
        if number and not ended.wait(SIGNAL_GRACE_S):
            give_up(number[0])

    if threading.current_thread() is not threading.main_thread():
        yield                                            # only a main thread may handle signals
        return
    ended, (receiver, sender) = threading.Event(), os.pipe()
    os.set_blocking(sender, False)
    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    previous_fd = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)
        ended.set()
        os.close(sender)
        watcher.join()
        os.close(receiver)


# --- 3 data -------------------------------------------------------------------------------------------------
# Shard files, the checks that make their numbers believable, and the two loaders.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
SEGMENT_PAD = 64             # cu_seqlens are padded to a multiple of this many entries
CHECKED_NAME = ".checked.json"                   # beside the shards: what reading every value has found
READ_AT_ONCE = 1 << 24
CHECK_FIGURES = {"train_shards": 80, "val_tokens": (47_851_521, 47_853_568),       # of the published CaseOps export
                 "val_bytes": {"targets": 47_851_520, "bytes": 151_074_499, "tolerance": 2},
                 "tokenizer": {"file": "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model",
                               "sha256": "97754754561f20def5edd99765ca0668f880bd94e67316d54aa10ab25f45cc4d"}}


class DataError(ValueError):
    """A data file is missing, damaged, or not what the configuration says."""


def read_shard_header(path: Path) -> int:
    """Number of values in a shard. Raises DataError unless magic, version and file size are right."""
    with open(path, "rb") as file:
        raw = file.read(SHARD_HEADER_BYTES)
    if len(raw) < SHARD_HEADER_BYTES:
        raise DataError(f"{path}: expected a token shard with a header of {SHARD_HEADER_BYTES:,} bytes, "
                        f"found a file of "
                        f"{len(raw):,}; it is cut off, fetch this shard again")
    header = np.frombuffer(raw, dtype="<i4")
    if header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise DataError(f"{path}: expected a token shard (magic {SHARD_MAGIC}, version {SHARD_VERSION}), found "
                        f"{header[:2].tolist()}; this is no shard of this family, prepare the data again")
    count, have = int(header[2]), path.stat().st_size
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
    """Files fineweb_<series>_000000.bin ... in numeric order; DataError when there is none or one is missing."""
    pattern = re.compile(rf"fineweb_{series}_(\d{{6}})\.bin")
    if not folder.is_dir():
        raise DataError(f"DATA_PATH={folder}: no such folder; run prepare_caseops_data.py or correct the path")
    found = sorted((int(m[1]), path) for path in folder.iterdir() if (m := pattern.fullmatch(path.name)))
    if not found:
        raise DataError(f"{folder}: no fineweb_{series}_*.bin; run prepare_caseops_data.py or correct DATA_PATH")
    missing = sorted(set(range(found[-1][0] + 1)) - {number for number, _ in found})
    if missing:
        raise DataError(f"{folder}: fineweb_{series}_{missing[0]:06d}.bin is missing; fetch it again")
    return [path for _, path in found]


def read_facts(path: Path, head: int) -> dict[str, Any]:
    """SHA-256 of a shard and its first, largest and summed values; head_total sums the first `head` of
    them."""
    sha256, first, largest, total, head_total, seen = hashlib.sha256(), None, 0, 0, 0, 0
    with open(path, "rb") as file:
        sha256.update(file.read(SHARD_HEADER_BYTES))
        while data := file.read(READ_AT_ONCE):
            sha256.update(data)
            values = np.frombuffer(data, "<u2")
            first = int(values[0]) if first is None else first
            largest = max(largest, int(values.max()))
            total += int(values.sum(dtype=np.int64))
            head_total += int(values[:max(0, head - seen)].sum(dtype=np.int64))
            seen += len(values)
    return {"sha256": sha256.hexdigest(), "first": first, "largest": largest, "total": total,
            "head_total": head_total}


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
        """Check headers, numbering, sidecar lengths and that both splits belong together; raises DataError."""
        folder = Path(cfg.data_path)
        train, val, sidecar = (tuple(find_shards(folder, series)) for series in ("train", "val", "val_bytes"))
        counts = {path.name: read_shard_header(path) for path in (*train, *val, *sidecar)}
        tokens, byte_counts = ([counts[path.name] for path in paths] for paths in (val, sidecar))
        if tokens != byte_counts:
            raise DataError(f"{folder}: every fineweb_val_bytes shard must be as long as its fineweb_val shard; found "
                            f"{tokens} tokens and {byte_counts} byte counts; prepare the validation split again")
        val_tokens, manifest = sum(tokens), cls._manifest(folder, counts)
        if manifest is None and not cfg.allow_unverified:
            low, high = CHECK_FIGURES["val_tokens"]
            if not low <= val_tokens <= high or len(train) > CHECK_FIGURES["train_shards"]:
                raise DataError(
                    f"{folder}: without manifest.json only the published export is trusted ({low:,} to {high:,} "
                    f"validation tokens, at most {CHECK_FIGURES['train_shards']} training shards), found {val_tokens:,} "
                    f"and {len(train)}; prepare the data with prepare_caseops_data.py, which writes a manifest, or "
                    "set ALLOW_UNVERIFIED=1 if you are sure that training and validation do not overlap")
        return cls(folder, train, val, sidecar, val_tokens, manifest)

    @staticmethod
    def _manifest(folder: Path, counts: dict[str, int]) -> dict | None:
        path = folder / "manifest.json"
        if not path.exists():
            return None
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            listed = {name: int(entry["values"]) for name, entry in manifest["files"].items()}
            totals = manifest["val"]
            needed = (manifest["tokenizer"]["file"], totals["tokens"], totals["sidecar_bytes"],
                      *(entry["sha256"] for entry in manifest["files"].values()))
            if None in needed:
                raise ValueError("a hash or a total is null")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a manifest of this family ({error}); prepare the data again") from error
        # A partial download may leave out training shards at the end, never a file of the validation split.
        wrong = sorted(name for name in listed.keys() | counts.keys()
                       if listed.get(name) != counts.get(name) and (name in counts or "_val_" in name))
        if wrong:
            raise DataError(f"{folder}: manifest.json and files disagree: {wrong[0]} should hold "
                            f"{listed.get(wrong[0])} values, found {counts.get(wrong[0])} ({len(wrong)} such files); "
                            "both splits must come from one preparation run")
        return manifest

    def check_values(self, cfg: Config, run: Run, split: str, read: bool = True) -> bool:
        """Check every value of the files of `split` ("train" or "val"): hashes and totals against the
        manifest or the
        published figures, token range, first BOS. What is found is remembered beside the shards, so that only
        new or
        changed files are read. False, without reading, if read=False and something is not remembered;
        DataError names
        what is wrong."""
        timer = Timer(run)
        series = [self.train] if split == "train" else [self.val, self.val_bytes]
        heads: dict[Path, int] = {}
        for paths in series:
            left = CHECK_FIGURES["val_bytes"]["targets"] + 1             # a target's bytes stand one later
            for path in paths:
                count = (path.stat().st_size - SHARD_HEADER_BYTES) // 2
                heads[path] = min(left, count) if split == "val" else 0
                left -= heads[path]
        remembered = self._remembered()
        facts = {path: remembered[path.name][1] for path, head in heads.items()
                 if path.name in remembered and remembered[path.name][0] == file_stamp(path, head)}
        unread = [path for path in heads if path not in facts]
        if unread and not read:
            return False
        # before reading: a later change shows
        stamps = {path: file_stamp(path, heads[path]) for path in unread}
        with ThreadPool(max(1, min(len(unread), os.cpu_count() or 1))) as pool:
            found = pool.map(lambda path: read_facts(path, heads[path]), unread, chunksize=1)
        facts.update(zip(unread, found))
        self._judge(cfg, series, facts)
        if unread:
            remembered.update({path.name: [stamps[path], facts[path]] for path in unread})
            # a folder that cannot be written is read again
            with contextlib.suppress(OSError):
                content = json.dumps({"format": 1, "files": remembered})
                write_file(self.folder / CHECKED_NAME, content.encode())
        run.log(f"data checked split:{split} files:{len(heads)} read:{len(unread)} "
                f"elapsed_ms:{1000 * timer.seconds():.0f}")
        return True

    def _remembered(self) -> dict[str, Any]:
        try:
            checked = json.loads((self.folder / CHECKED_NAME).read_text(encoding="utf-8"))
            return {name: [stamp, {**facts}] for name, (stamp, facts) in checked["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}                                                    # nothing remembered: read everything

    def _judge(self, cfg: Config, series: Sequence[Sequence[Path]],
               facts: Mapping[Path, dict[str, Any]]) -> None:
        for path in facts if self.manifest else ():
            want, found = self.manifest["files"][path.name]["sha256"], facts[path]["sha256"]
            if want != found:
                raise DataError(f"{path}: SHA-256 {found[:16]}..., but manifest.json says {want[:16]}...; "
                                f"the file is "
                                "damaged or from another preparation run, fetch or prepare it again")
        for path in series[0]:
            if facts[path]["largest"] >= cfg.vocab_size:
                raise DataError(f"{path}: expected tokens below VOCAB_SIZE={cfg.vocab_size}, found "
                                f"{facts[path]['largest']}; set VOCAB_SIZE as in the preparation, or "
                                f"prepare again")
        if len(series) == 1:
            return
        if facts[series[0][0]]["first"] != BOS:
            raise DataError(f"{series[0][0]}: the validation split must begin with BOS ({BOS}), found token "
                            f"{facts[series[0][0]]['first']}; prepare the validation split again")
        total = sum(facts[path]["total"] for path in series[1])
        if self.manifest:
            stated = self.manifest["val"]
            found = {"tokens": self.val_tokens, "sidecar_bytes": total}
            said = {name: stated[name] for name in found}
            if said != found:
                raise DataError(f"{self.folder}: validation split with {found}, but manifest.json says "
                                f"{said}; prepare "
                                "the data again")
        elif not cfg.allow_unverified:
            published = CHECK_FIGURES["val_bytes"]
            head = sum(facts[path]["head_total"] for path in series[1]) - facts[series[1][0]]["first"]
            if abs(head - published["bytes"]) > published["tolerance"]:
                raise DataError(
                    f"{self.folder}: the first {published['targets']:,} validation targets stand for "
                    f"{head:,} bytes, "
                    f"the published export's for {published['bytes']:,}; fetch the fineweb_val_bytes shards "
                    f"again")

    def load_validation(self) -> tuple[np.ndarray, np.ndarray]:
        """All validation tokens and their byte counts, uint16 (tokens,) each."""
        tokens, counts = (np.concatenate([read_shard(path) for path in paths])
                          for paths in (self.val, self.val_bytes))
        if len(tokens) < 2 or tokens[0] != BOS:
            raise DataError(f"{self.folder}: the validation split must hold at least two tokens and begin with BOS "
                            f"({BOS}), found {len(tokens)} tokens beginning with {tokens[:1].tolist()}")
        return tokens, counts


def check_tokenizer(cfg: Config, data: Dataset) -> Path:
    """Find the tokenizer of this run; refuse one that is not what configuration, manifest or published export say."""
    if data.manifest:
        stated, source = data.manifest["tokenizer"], "the shards' manifest"
    elif cfg.allow_unverified:
        stated, source = {}, ""
    else:
        stated, source = CHECK_FIGURES["tokenizer"], "the published export"
    path = _find_tokenizer(cfg, data, stated)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    recorded = path.with_name(path.name + ".sha256")
    beside = (recorded.read_text().split() or ["(nothing)"])[0] if recorded.exists() else None
    for name, want in ((source, stated.get("sha256")), (recorded.name, beside)):
        if want and want != digest:
            raise DataError(f"{path}: SHA-256 {digest[:16]}..., but {name} says {want[:16]}...; use the "
                            f"tokenizer "
                            "the shards were made with")
    import sentencepiece                                  # only this check needs it
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: not a SentencePiece model ({error})") from error
    expected = {"vocabulary size": cfg.vocab_size, "BOS id": BOS, "operator ids": list(OPERATOR_IDS)}
    found = {"vocabulary size": model.vocab_size(), "BOS id": model.bos_id(),
             "operator ids": [model.piece_to_id(chr(0xE001 + k)) for k in range(4)]}
    said = {"vocabulary size": stated.get("vocab_size", cfg.vocab_size), "BOS id": stated.get("bos_id", BOS),
            "operator ids": list(stated.get("operator_ids", OPERATOR_IDS))}
    if found != expected or said != expected:
        raise DataError(f"{path}: expected {expected}, found {found} in the model and {said} in the shards' manifest; "
                        "set VOCAB_SIZE and TOKENIZER_PATH to match the data")
    return path


def _find_tokenizer(cfg: Config, data: Dataset, stated: Mapping[str, Any]) -> Path:
    if cfg.tokenizer_path:
        candidates = [Path(cfg.tokenizer_path)]
    else:
        names = [stated["file"]] if stated else [CHECK_FIGURES["tokenizer"]["file"], "caseops_8192.model"]
        folders = (data.folder, Path("tokenizers"), REPO / "tokenizers")
        candidates = [folder / name for name in names for folder in folders]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        wanted = " or ".join(dict.fromkeys(map(str, candidates)))
        raise DataError(f"no tokenizer: expected {wanted}; set TOKENIZER_PATH")
    return path


def segment_bounds(tokens: np.ndarray, cap: int, pad: int = SEGMENT_PAD) -> np.ndarray:
    """cu_seqlens of a flat row, int32 [0, ..., n]: documents start at BOS, segments are cut every `cap` tokens, and
    n is repeated (empty segments) up to a multiple of `pad` entries."""
    n = len(tokens)
    starts = np.union1d(0, np.flatnonzero(tokens == BOS))
    pieces = -(-np.diff(starts, append=n) // cap)
    within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    bounds = np.append(np.repeat(starts, pieces) + within * cap, n)
    return np.pad(bounds, (0, -len(bounds) % pad), constant_values=n).astype(np.int32)


class Row(NamedTuple):
    """One flat training row on the run's device; `shard` is the index of the file it came from."""
    inputs: Tensor          # (T,) int64
    targets: Tensor         # (T,) int64
    cu_seqlens: Tensor      # (segments + 1,) int32, padded
    shard: int


class PackingLoader:
    """The endless stream of training rows, in shard order; rank r of R yields rows r, R + r, 2R + r, ... A row is
    row_tokens inputs and their targets; consecutive rows do not overlap. A shard is read from its first BOS; its tail
    that holds no full row is dropped. A thread prepares rows ahead, in the same order."""
    PREFETCH = 3

    def __init__(self, paths: Sequence[Path], row_tokens: int, segment_cap: int, rank: int = 0, world_size: int = 1,
                 device: torch.device | str = "cpu", warn: Callable[[str], None] = lambda line: None) -> None:
        self.paths, self.row_tokens, self.segment_cap = list(paths), row_tokens, segment_cap
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self._warn, self._rows, self._reader = warn, self._host_rows(), ThreadPoolExecutor(1)
        self._ahead = [self._reader.submit(next, self._rows) for _ in range(self.PREFETCH)]

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)

    def __next__(self) -> Row:
        self._ahead.append(self._reader.submit(next, self._rows))
        inputs, targets, bounds, shard = self._ahead[0].result()      # an error stays first: the next call meets it too
        del self._ahead[0]
        # From pinned memory, so the copies overlap with what the GPU is doing.
        return Row(*(x.to(self.device, non_blocking=True) for x in (inputs, targets, bounds)), shard)

    def spans(self) -> Iterator[tuple[np.ndarray, int]]:
        """All spans of row_tokens + 1 tokens with their shard index, for ever."""
        span = self.row_tokens + 1
        while True:
            used = 0
            for shard, path in enumerate(self.paths):
                tokens = read_shard(path)
                bos = np.flatnonzero(tokens == BOS)
                cursor = int(bos[0]) if len(bos) else len(tokens)
                if cursor + span > len(tokens):
                    self._warn(f"data warning shard:{path.name} tokens:{len(tokens)} skipped: no BOS, or shorter "
                               f"than one row of {span} tokens")
                while cursor + span <= len(tokens):
                    yield tokens[cursor:cursor + span], shard
                    cursor += span
                    used += 1
            if not used:
                raise DataError(f"no training shard holds one row of {span:,} tokens from its first BOS on; lower "
                                "TRAIN_BATCH_TOKENS or prepare more data")

    def _host_rows(self) -> Iterator[tuple]:
        for span, shard in itertools.islice(self.spans(), self.rank, None, self.world_size):
            row = torch.from_numpy(span.astype(np.int64))
            item = (row[:-1].clone(), row[1:].clone(), torch.from_numpy(segment_bounds(span[:-1], self.segment_cap)))
            yield *(x.pin_memory() if self.device.type == "cuda" else x for x in item), shard


def calibration_batches(paths: Sequence[Path], seq_len: int, batch_seqs: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Batches of random sequences, int64 (batch_seqs, seq_len + 1) each, for ever; document borders are ignored.
    Every file gets a random phase and a random order of its sequences; each row is drawn from a file with
    probability proportional to what the file has left. When all are used up they are dealt anew."""
    rng = np.random.Generator(np.random.PCG64(seed))
    shards = [np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES) for path in paths]

    def deal() -> list[list[int]]:
        stacks = []
        for tokens in shards:
            max_phase = min(seq_len - 1, max(0, len(tokens) - seq_len - 1))
            phase = int(rng.integers(max_phase + 1)) if max_phase else 0
            stacks.append((phase + seq_len * rng.permutation(max(0, (len(tokens) - 1 - phase) // seq_len))).tolist())
        if not any(stacks):
            raise DataError(f"no training shard holds one sequence of {seq_len + 1:,} tokens; lower TRAIN_SEQ_LEN or "
                            "prepare more data")
        return stacks

    stacks: list[list[int]] = []
    while True:
        batch = np.empty((batch_seqs, seq_len + 1), dtype=np.int64)
        for row in range(batch_seqs):
            stacks = stacks if any(stacks) else deal()
            left = np.array([len(stack) for stack in stacks], dtype=np.float64)
            shard = int(rng.choice(len(shards), p=left / left.sum()))
            start = stacks[shard].pop()
            batch[row] = shards[shard][start:start + seq_len + 1]
        yield batch


# --- 4 model ------------------------------------------------------------------------------------------------
# One forward pass for training, evaluation and test-time training: plain functions of one layer's weights.

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def attend_math(q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Plain causal softmax attention of each segment, query head h reading key/value head h // (H/G); (N, H, K).
    cu_seqlens (segments + 1,) int32 ascending from 0 to N; empty segments are allowed."""
    bounds, out = cu_seqlens.tolist(), []
    for start, end in zip(bounds, bounds[1:]):
        if end > start:
            q, k, v = (x[start:end].transpose(0, 1)[None] for x in (q_NHK, k_NGK, v_NGK))
            out.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)


def softcap_logits(logits: Tensor, cap_pos: Tensor, cap_neg: Tensor) -> Tensor:
    """cap * tanh(logits / cap), with cap_pos for positive logits and cap_neg for the others."""
    cap = torch.where(logits > 0, cap_pos, cap_neg)
    return cap * torch.tanh(logits / cap)


def softcap_loss(hidden_ND: Tensor, tok_emb_VD: Tensor, cap_pos: Tensor, cap_neg: Tensor, targets_N: Tensor) -> Tensor:
    """Mean nll in nats of the tied, softcapped head; logits and loss fp32. The definition of FusedSoftcapLoss."""
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

# Views of one layer's parameters; see GPT for shapes.
LayerWeights = NamedTuple("LayerWeights", [(name, Tensor) for name in (
    "wq", "wk", "wv", "wo", "w_up", "w_down", "q_gain", "xsa_alpha", "attn_gate", "attn_scale", "mlp_scale",
    "resid_mix", "lane_post", "lane_resid", "ln_scale")])


class Packing(NamedTuple):
    """Where attention may look: segment bounds in the flattened tokens; rotary tables of the T positions."""
    cu_seqlens: Tensor      # (segments + 1,) int32
    max_seqlen: int
    cos: Tensor             # (T, 1, rope_dims / 2) fp32
    sin: Tensor
    attend: Attend
    gate_scale: float


Tap = Callable[[str, Tensor], None]
Skip = tuple[Tensor, Tensor, Tensor] | None               # (kept encoder output, weight, gate)


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + 2⁻²³) over the last axis; statistics fp32, result in the dtype of x."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + RMS_EPS)).to(x.dtype)


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first channels of each head, channel j paired with j + rope_dims/2 [RoPE]."""
    half = cos.shape[-1]
    a, b, rest = x_BTHK.split([half, half, x_BTHK.shape[-1] - 2 * half], -1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], -1)


def attention(n_BTD: Tensor, w: LayerWeights, packing: Packing, adapters: LayerAdapters, tap: Tap | None) -> Tensor:
    """Attention sub-layer of a normed and scaled input: GQA with QK norm, gated XSA and a sparse output gate."""
    B, T, D = n_BTD.shape
    dtype, kv_dim, H = n_BTD.dtype, w.wk.shape[0], w.q_gain.shape[0]
    K, G = D // H, kv_dim * H // D
    # One product for all three: the input is read once, and its gradient needs no additions.
    q, k, v = F.linear(n_BTD, torch.cat([w.wq, w.wk, w.wv]).to(dtype)).split([D, kv_dim, kv_dim], -1)
    q = adapted(q, n_BTD, adapters.q).reshape(B, T, H, K)
    k = adapted(k, n_BTD, adapters.k).reshape(B, T, G, K)
    v = adapted(v, n_BTD, adapters.v).reshape(B, T, G, K)
    q = rotate(rms_norm(q.float()), packing.cos, packing.sin) * w.q_gain[:, None]
    k = rotate(rms_norm(k.float()), packing.cos, packing.sin)
    y = packing.attend(q.to(dtype).reshape(B * T, H, K), k.to(dtype).reshape(B * T, G, K), v.reshape(B * T, G, K),
                       packing.cu_seqlens, packing.max_seqlen)
    # XSA: remove from each head what lies along the token's own value direction.
    y = y.reshape(B, T, G, H // G, K).float()
    unit = F.normalize(v.float(), dim=-1, eps=1e-12)[:, :, :, None]
    y = y - torch.tanh(w.xsa_alpha).view(G, H // G, 1) * (y * unit).sum(-1, keepdim=True) * unit
    window = w.attn_gate.shape[-1]
    gate = torch.sigmoid(packing.gate_scale * F.linear(n_BTD[..., :window], w.attn_gate.to(dtype)).float())
    y = (y * gate.view(B, T, G, H // G, 1)).reshape(B, T, D).to(dtype)
    if tap is not None:
        tap("qkv", n_BTD)
        tap("o", y)
    return adapted(F.linear(y, w.wo.to(dtype)), n_BTD, adapters.o)


def mlp(n_BTD: Tensor, w: LayerWeights, adapters: LayerAdapters, tap: Tap | None) -> Tensor:
    """Down(φ(Up n)) with φ(z) = leaky_relu(z, 0.3)²."""
    act = F.leaky_relu(F.linear(n_BTD, w.w_up.to(n_BTD.dtype)), 0.3).square()
    if tap is not None:
        tap("up", n_BTD)
        tap("down", act)
    return adapted(F.linear(act, w.w_down.to(n_BTD.dtype)), n_BTD, adapters.mlp)


def blend_skip(x: Tensor, skip: Skip) -> Tensor:
    """Per channel from the scaled encoder output (gate → 0) to the running value (gate → 1)."""
    if skip is None:
        return x
    saved, weight, gate = skip
    a = torch.sigmoid(gate).to(x.dtype)
    return (1 - a) * (weight.to(x.dtype) * saved) + a * x


def embed(tokens_BT: Tensor, tok_emb: Tensor, smear_w: Tensor, smear_lambda: Tensor, dtype: torch.dtype) -> Tensor:
    """Normed embedding after SmearGate, which adds a gated copy of the previous token's unless this one is BOS."""
    e = F.embedding(tokens_BT, tok_emb).to(dtype)
    gate = smear_lambda * torch.sigmoid((e[..., :len(smear_w)].float() * smear_w).sum(-1, keepdim=True))
    gate = (gate * (tokens_BT != BOS)[..., None]).to(dtype)
    return rms_norm(e + gate * F.pad(e[:, :-1], (0, 0, 1, 0)))


def serial_block(x: Tensor, x0: Tensor, skip: Skip, w: LayerWeights, packing: Packing, adapters: LayerAdapters,
                 tap: Tap | None = None) -> Tensor:
    """Attention, then MLP, on one residual stream (B, T, D)."""
    dtype = x.dtype
    mix, scale = w.resid_mix.to(dtype), w.ln_scale.to(dtype)
    z = mix[0] * blend_skip(x, skip) + mix[1] * x0
    z = z + w.attn_scale.to(dtype) * attention(scale * rms_norm(z), w, packing, adapters, tap)
    return z + w.mlp_scale.to(dtype) * mlp(scale * rms_norm(z), w, adapters, tap)


def parallel_block(lane0: Tensor, lane1: Tensor, x0: Tensor, skip: Skip, w: LayerWeights, packing: Packing,
                   adapters: LayerAdapters, tap: Tap | None = None) -> tuple[Tensor, Tensor]:
    """Attention reads lane 0 (mixed with x0 and the skip), the MLP reads lane 1, both write to both lanes."""
    dtype = lane0.dtype
    mix, scale, resid, post = (p.to(dtype) for p in (w.resid_mix, w.ln_scale, w.lane_resid, w.lane_post))
    lane0 = blend_skip(lane0, skip)
    a = w.attn_scale.to(dtype) * attention(scale * rms_norm(mix[0] * lane0 + mix[1] * x0), w, packing, adapters, tap)
    m = w.mlp_scale.to(dtype) * mlp(scale * rms_norm(lane1), w, adapters, tap)
    return (resid[0] * lane0 + post[0, 0] * a + post[1, 0] * m,
            resid[1] * lane1 + post[0, 1] * a + post[1, 1] * m)


def finish(lane0: Tensor, lane1: Tensor) -> Tensor:
    """The head's input: normed mean of the lanes."""
    return rms_norm(0.5 * (lane0 + lane1))


def score_tokens(hidden_ND: Tensor, tok_emb: Tensor, cap_pos: Tensor, cap_neg: Tensor, targets_N: Tensor,
                 hints_N: Tensor, delta_NV: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(nll of the target, log-probability of the hinted token), both (N,) fp32, over the full vocabulary; delta_NV is
    an adapter's addition to the raw logits. The product rounds to the compute dtype, the rest is fp32."""
    logits = F.linear(hidden_ND, tok_emb.to(hidden_ND.dtype)).float()
    if delta_NV is not None:
        logits = logits + delta_NV.float()
    log_probs = F.log_softmax(softcap_logits(logits, cap_pos, cap_neg), -1)
    picked = log_probs.gather(-1, torch.stack([targets_N, hints_N], -1))
    return -picked[:, 0], picked[:, 1]


class Graphs(NamedTuple):
    """The model's functions, eager or compiled; GPT.forward calls these and nothing else heavy."""
    embed: Callable = embed
    serial: Callable = serial_block
    parallel: Callable = parallel_block
    finish: Callable = finish
    score: Callable = score_tokens


def execution_order(cfg: Config, looping: bool) -> tuple[list[int], list[int]]:
    """Layer indices in order of execution, split in encoder (whose outputs are kept) and decoder (which takes them)."""
    loop = list(range(cfg.loop_start, cfg.loop_end + 1))
    order = [*range(cfg.loop_start), *loop * (1 + cfg.num_loops * looping), *range(cfg.loop_end + 1, cfg.num_layers)]
    return order[:len(order) // 2], order[len(order) // 2:]


class GPT(nn.Module):
    """Weights of the model and the order in which the blocks run.
    Banks hold one matrix per layer: wq, wo (L, D, D), wk, wv (L, G*K, D), w_up (L, F, D), w_down (L, D, F).
    All parameters are fp32; `compute_dtype` is the dtype of activations and of every matrix product."""
    LAYER_PARAMETERS = LayerWeights._fields[:-1]

    def __init__(self, cfg: Config, compute_dtype: torch.dtype = torch.float32, attend: Attend = attend_math) -> None:
        super().__init__()
        self.cfg, self.compute_dtype, self.attend = cfg, compute_dtype, attend
        self.graphs = Graphs()
        self.sizes_vary = False      # batch and length change from call to call (test-time training)
        L, D, H, Fd, kv = cfg.num_layers, cfg.model_dim, cfg.num_heads, cfg.mlp_dim, cfg.kv_dim
        num_skips = min(map(len, execution_order(cfg, True)))

        def orthogonal(rows: int, cols: int) -> Tensor:
            return torch.stack([nn.init.orthogonal_(torch.empty(rows, cols)) for _ in range(L)])

        initial = {
            "tok_emb": torch.randn(cfg.vocab_size, D) * cfg.tied_embed_init_std,
            "wq": orthogonal(D, D), "wk": orthogonal(kv, D), "wv": orthogonal(kv, D), "wo": torch.zeros(L, D, D),
            "w_up": orthogonal(Fd, D), "w_down": torch.zeros(L, D, Fd),
            "q_gain": torch.full((L, H), cfg.qk_gain_init), "xsa_alpha": torch.zeros(L, H),
            "attn_gate": torch.zeros(L, H, cfg.gate_window),
            "attn_scale": torch.ones(L, D), "mlp_scale": torch.ones(L, D),
            "resid_mix": torch.tensor([1.0, 0.0])[:, None].repeat(L, 1, D),
            "skip_weights": torch.ones(num_skips, D), "skip_gates": torch.zeros(num_skips, D),
            "lane_post": torch.ones(L, 2, 2), "lane_resid": torch.full((L, 2), 1.1),
            "smear_w": torch.zeros(cfg.gate_window), "smear_lambda": torch.zeros(1),
            "softcap_pos": torch.tensor(cfg.logit_softcap), "softcap_neg": torch.tensor(cfg.logit_softcap)}
        for name, value in initial.items():
            self.register_parameter(name, nn.Parameter(value.contiguous()))
        self.register_buffer("ln_scale", torch.arange(1, L + 1).rsqrt(), persistent=False)
        self.register_buffer("rope", torch.empty(2, 0, 1, cfg.rope_dims // 2), persistent=False)
        self.reserve_positions(max(cfg.row_tokens, cfg.val_batch_tokens // ROWS_PER_STEP, cfg.ttt_eval_seq_len,
                                   cfg.global_ttt_chunk_tokens))

    def reserve_positions(self, count: int) -> None:
        """Make the rotary tables at least `count` positions long; angles are exact fp32."""
        if self.rope.shape[1] < count:
            half = self.cfg.rope_dims // 2
            freq = self.cfg.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
            angle = (torch.arange(count, dtype=torch.float64)[:, None] * freq)[:, None]
            self.rope = torch.stack([angle.cos(), angle.sin()]).float().to(self.rope.device)

    def forward(self, tokens_BT: Tensor, *, looping: bool, segments: tuple[Tensor, int] | None = None,
                adapters: Sequence[LayerAdapters] | None = None, tap: Tap | None = None,
                graphs: Graphs | None = None) -> Tensor:
        """Final normed hidden states (B, T, D) in the compute dtype.

        segments  (cu_seqlens, longest segment) of a flat row (B = 1); None: each row is one causal sequence.
        adapters  one LayerAdapters per layer execution.
        tap       called with ("qkv" | "o" | "up" | "down", input of that matrix) and ("layer", index) in eager mode.
        """
        g = graphs or self.graphs
        B, T = tokens_BT.shape
        self.reserve_positions(T)
        cu_seqlens, max_seqlen = segments or (
            torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=tokens_BT.device), T)
        vary = mark_varying if self.sizes_vary else lambda x, *dims: x
        cos, sin = (vary(table[:T], 0) for table in self.rope.unbind())
        packing = Packing(vary(cu_seqlens, 0), max_seqlen, cos, sin, self.attend, self.cfg.sparse_attn_gate_scale)
        layers = [LayerWeights(*views) for views in zip(
            *(getattr(self, name).unbind() for name in self.LAYER_PARAMETERS), self.ln_scale.unbind())]
        encoder, decoder = execution_order(self.cfg, looping)
        gates = list(zip(self.skip_weights.unbind(), self.skip_gates.unbind()))
        slots = adapters or [LayerAdapters()] * (len(encoder) + len(decoder))

        x0 = g.embed(vary(tokens_BT, 0, 1), self.tok_emb, self.smear_w, self.smear_lambda, self.compute_dtype)
        # A copy: the compiler builds one more variant of a block for arguments that are one tensor or views of one.
        lane0 = lane1 = x0.clone() if adapters is None else x0.clone().requires_grad_()
        vary(x0, 0, 1)
        saved: list[Tensor] = []
        for slot, layer in enumerate(encoder + decoder):
            if tap is not None:
                tap("layer", torch.tensor(layer))
            row = slot - len(encoder)
            skip = (saved.pop(), *gates[row]) if 0 <= row < len(gates) and saved else None
            vary(lane0, 0, 1)
            if layer < self.cfg.parallel_start_layer:
                lane0 = lane1 = g.serial(lane0, x0, skip, layers[layer], packing, slots[slot], tap)
            else:
                lane1 = lane1.clone() if lane1 is lane0 else lane1
                lane0, lane1 = g.parallel(lane0, vary(lane1, 0, 1), x0, skip, layers[layer], packing, slots[slot], tap)
            if row < 0:
                saved.append(lane0)
        return g.finish(vary(lane0, 0, 1), vary(lane1.clone() if lane1 is lane0 else lane1, 0, 1))

    def loss(self, tokens_T: Tensor, targets_T: Tensor, cu_seqlens: Tensor, *, looping: bool,
             segment_cap: int, graphs: Graphs | None = None) -> Tensor:
        """Mean training nll in nats of one flat row; segment_cap bounds the segments' lengths."""
        hidden = self(tokens_T[None], looping=looping, segments=(cu_seqlens, segment_cap), graphs=graphs)[0]
        fused = self.cfg.fused_ce_enabled and hidden.is_cuda and triton is not None
        loss = FusedSoftcapLoss.apply if fused else softcap_loss
        return loss(hidden, self.tok_emb, self.softcap_pos, self.softcap_neg, targets_T)

    def score(self, hidden_ND: Tensor, targets_N: Tensor, hints_N: Tensor | None = None,
              delta_NV: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(nll of targets, log-probability of hints) of hidden states; without hints the second equals -nll."""
        hints_N = targets_N.clone() if hints_N is None else hints_N
        for x in (hidden_ND, targets_N, hints_N, delta_NV):
            if x is not None:
                mark_varying(x, 0)
        return self.graphs.score(hidden_ND, self.tok_emb, self.softcap_pos, self.softcap_neg, targets_N, hints_N,
                                 delta_NV)


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
        raise ValueError(f"PARAMETER_TABLE must list every parameter exactly once; missing "
                         f"{sorted(named.keys() - set(listed))}, unknown {sorted(set(listed) - named.keys())}, "
                         f"repeated {sorted({name for name in listed if listed.count(name) > 1})}")
    return {group: [named[name] for name in names] for group, names in PARAMETER_TABLE.items()}


def polar_express(G: Tensor, steps: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Orthogonalize the matrices in the last two axes: singular values near one, same singular vectors [PE]."""
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
    Parameters (L, rows, cols) of one matrix shape form a bank; its matrices are dealt to the ranks in equal shares
    (padded with zeros), so every rank keeps the momentum of its own share only. Gradients are reduced in fp32,
    updates gathered in the compute dtype."""

    def __init__(self, params: Sequence[nn.Parameter], run: Run, weight_decay: float = 0.0, backend_steps: int = 5,
                 row_normalize: bool = True) -> None:
        self.run, self.weight_decay = run, weight_decay
        self.backend_steps, self.row_normalize = backend_steps, row_normalize
        shapes = dict.fromkeys(tuple(p.shape[-2:]) for p in params)
        self.banks = [[p for p in params if tuple(p.shape[-2:]) == shape] for shape in shapes]
        self.banks.sort(key=lambda bank: -sum(p.numel() for p in bank))      # the largest reduction starts first
        self.momentum_buffers: list[Tensor | None] = [None] * len(self.banks)

    def reset(self) -> None:
        self.momentum_buffers = [None] * len(self.banks)

    def update_direction(self, grad: Tensor, buffer: Tensor, momentum: float) -> Tensor:
        """Advance `buffer` and return the orthogonal update of each matrix, in the compute dtype."""
        buffer.mul_(momentum).add_(grad)
        u = grad + momentum * buffer
        if self.row_normalize:
            u = u / u.norm(dim=-1, keepdim=True).clamp_min(1e-7)
        return polar_express(u, self.backend_steps, self.run.compute_dtype)

    @torch.no_grad()
    def step(self, grads: dict[nn.Parameter, Tensor], lr: float, momentum: float) -> None:
        """Apply one update from this rank's gradients; the average over ranks is taken here."""
        # 1. launch all reductions
        reductions = [_reduce_scatter_mean(self.run, torch.cat([grads[p] for p in bank])) for bank in self.banks]
        gathers = []
        for index, (shard, wait) in enumerate(reductions):            # 2. update the own share
            wait()
            if self.momentum_buffers[index] is None:
                self.momentum_buffers[index] = torch.zeros_like(shard)
            update = self.update_direction(shard, self.momentum_buffers[index], momentum)
            gathers.append(_all_gather(self.run, update))
        for bank, (update, wait) in zip(self.banks, gathers):         # 3. gather, and apply to every replica
            wait()
            lengths = [len(p) for p in bank]
            for p, part in zip(bank, update[:sum(lengths)].split(lengths)):
                rows, cols = p.shape[-2:]
                p.mul_(1 - lr * self.weight_decay)
                p.add_(part.to(p.dtype), alpha=-lr * math.sqrt(max(1.0, rows / cols)))


def _reduce_scatter_mean(run: Run, full: Tensor) -> tuple[Tensor, Callable[[], Any]]:
    """This rank's share of the mean of `full` (L, rows, cols) over ranks, and a function to call before reading it."""
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
    """One optimizer step: every row's gradient is clipped by itself, rows are averaged, then Muon and AdamW run."""

    def __init__(self, cfg: Config, run: Run, model: GPT) -> None:
        self.cfg, self.run, self.model = cfg, run, model
        groups = route_parameters(model)
        # Frozen parameters (the caps, in tests of the reference's symmetric loss) take no part in the norm either.
        self.params = [p for group in groups.values() for p in group if p.requires_grad]
        self.small = [p for name, group in groups.items() if name != "muon" for p in group if p.requires_grad]
        self.muon = Muon(groups["muon"], run, cfg.muon_wd, cfg.muon_backend_steps, cfg.muon_row_normalize)
        self.base_lr = {"embed": cfg.tied_embed_lr, "scalar": cfg.scalar_lr, "softcap": cfg.scalar_lr}
        weight_decay = {"embed": cfg.embed_wd, "scalar": cfg.adam_wd, "softcap": 0.0}
        self.adamw = torch.optim.AdamW(
            [{"params": groups[name], "name": name, "weight_decay": weight_decay[name]} for name in self.base_lr],
            betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)
        self.grad_sum: list[Tensor] = []
        self.num_rows = 0

    def reset(self) -> None:
        """Forget all state, as if no step had been taken."""
        self.muon.reset()
        self.adamw.state.clear()
        self.grad_sum, self.num_rows = [], 0
        self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def add_row(self) -> Tensor:
        """Take over the gradient of one row's mean loss, clipped to GRAD_CLIP_NORM. Returns its norm (0-d tensor)."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        norm = torch.nn.utils.get_total_norm(grads)
        limit = self.cfg.grad_clip_norm
        torch._foreach_mul_(grads, torch.where(norm > limit, limit / (norm + 1e-6), 1.0))
        if self.num_rows:
            torch._foreach_add_(self.grad_sum, grads)
        else:
            self.grad_sum = grads
        self.num_rows += 1
        self.model.zero_grad(set_to_none=True)
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
        self.grad_sum, self.num_rows = [], 0
        self.model.zero_grad(set_to_none=True)


# --- 7 training ---------------------------------------------------------------------------------------------
# Compile warm-up that leaves nothing behind, the step, and a wall-clock stop all ranks agree on.

LOG_EVERY, LOG_FIRST = 50, 5
WARMUP_SEGMENT_PADS = (64, 128, 192, 256)        # padded cu_seqlens lengths of ordinary rows


class StepClock:
    """Rank 0's training clock. The host runs at most one step ahead of the GPU, so reading it stalls nothing."""

    def __init__(self, run: Run) -> None:
        self.run, self.timer = run, Timer(run)
        self.ends: list[float] = []          # seconds at which each finished step ended
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
        ends = [0.0, *self.ends][-9:]
        return max((b - a for a, b in zip(ends, ends[1:])), default=0.0)

    def now(self) -> float:
        """Seconds at which the next step can begin: the last known end plus the steps still queued."""
        last = [0.0, *self.ends][-2:]
        return last[-1] + len(self.events) * (last[-1] - last[0]) if self.ends else 0.0


def plan_step(cfg: Config, step: int, clock_s: float, step_s: float, calibration_s: float) -> tuple[float, bool]:
    """(progress, stop?) before step `step` that may begin at clock_s, may last step_s, and leaves calibration."""
    if cfg.max_wallclock_seconds == 0:
        return step / cfg.iterations, False
    progress = clock_s / (cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds)
    return progress, progress >= 1 or clock_s + step_s + calibration_s > cfg.max_wallclock_seconds


def train_rows(cfg: Config, run: Run, model: GPT, optimizer: Optimizer, loader: PackingLoader, rows: int,
               looping: bool) -> Tensor:
    """Forward and backward of this rank's rows; gradients wait in the optimizer. Returns the sum of mean losses."""
    total = torch.zeros((), device=run.device)
    for _ in range(rows):
        run.beat()
        row = next(loader)
        # The number of documents in a row varies; only the attention kernel sees it.
        loss = model.loss(row.inputs, row.targets, mark_varying(row.cu_seqlens, 0), looping=looping,
                          segment_cap=cfg.longest_segment)
        loss.backward()
        optimizer.add_row()
        total += loss.detach()
    return total


def warm_up(cfg: Config, run: Run, data: Dataset, model: GPT, optimizer: Optimizer) -> float:
    """Compile and run every training graph, then put everything back. Returns the seconds calibration will take."""
    timer = Timer(run)
    before = WeightAverage(model, decay=1.0)              # an average that is never updated: a copy to go back to
    rng = torch.get_rng_state(), torch.cuda.get_rng_state(run.device) if run.device.type == "cuda" else None
    loader = make_loader(cfg, run, data)
    for looping, name in ((False, "warmup_step"), (True, "loop_warmup_step")):
        row = next(loader)
        for pad in WARMUP_SEGMENT_PADS if cfg.compile and cfg.warmup_steps else ():
            bounds = torch.arange(0, cfg.row_tokens + 1, cfg.train_seq_len, dtype=torch.int32)
            bounds = mark_varying(F.pad(bounds, (0, -len(bounds) % pad), value=cfg.row_tokens).to(run.device), 0)
            model.loss(row.inputs, row.targets, bounds, looping=looping, segment_cap=cfg.longest_segment).backward()
            model.zero_grad(set_to_none=True)
        for step in range(cfg.warmup_steps):
            train_rows(cfg, run, model, optimizer, loader, 1, looping)
            optimizer.step(step, 1.0)
            if step < 3 or (step + 1) % 10 == 0 or step + 1 == cfg.warmup_steps:
                run.log(f"{name}: {step + 1}/{cfg.warmup_steps}")
    loader.close()
    calibration_s = 0.0
    if cfg.max_wallclock_seconds and not cfg.prequant_only:
        # Two batches, of which the second is timed: the first pays for workspaces and library start-up.
        for _ in range(2):
            batch_timer = Timer(run)
            collect_hessians(cfg, run, model, data.train, num_batches=run.world_size)
            batch_s = batch_timer.seconds()
        calibration_s = 1.2 * batch_s * -(-cfg.gptq_calibration_batches // run.world_size)
    before.apply()
    optimizer.reset()
    torch.set_rng_state(rng[0])
    if rng[1] is not None:
        torch.cuda.set_rng_state(rng[1], run.device)
    run.log(f"warmup done elapsed_s:{timer.seconds():.1f} calibration_estimate_s:{calibration_s:.1f}")
    return calibration_s


def make_loader(cfg: Config, run: Run, data: Dataset) -> PackingLoader:
    return PackingLoader(data.train, cfg.row_tokens, cfg.train_seq_len, run.rank, run.world_size, run.device, run.log)


def train(cfg: Config, run: Run, data: Dataset, model: GPT) -> float:
    """Train until the budget or ITERATIONS ends and leave the averaged weights in the model. Returns train seconds."""
    optimizer = Optimizer(cfg, run, model)
    if cfg.max_wallclock_seconds:
        run.log(f"gptq:reserving {cfg.gptq_reserve_seconds:g}s, effective="
                f"{1000 * (cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds):.0f}ms")
    run.stage("compilation", START_LIMIT_S)
    calibration_s = warm_up(cfg, run, data, model, optimizer)
    average = WeightAverage(model, cfg.ema_decay)
    loader = make_loader(cfg, run, data)
    looping, loop_on = False, None
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    run.barrier()
    run.stage("training")
    clock, loss_sum = StepClock(run), torch.zeros((), device=run.device)
    for step in range(cfg.iterations):
        progress, stop = run.agree(plan_step(cfg, step, clock.now(), clock.longest_recent(), calibration_s))
        if stop:
            break
        if not looping and cfg.num_loops and progress >= cfg.enable_looping_at:
            looping, loop_on = True, (step, clock.now())
            encoder, decoder = execution_order(cfg, True)
            run.log(f"layer_loop:enabled step:{step} frac:{progress:.3f} encoder:{encoder} decoder:{decoder}")
        loss = train_rows(cfg, run, model, optimizer, loader, ROWS_PER_STEP // run.world_size, looping)
        # NaN and infinity stay in a sum: no step goes unchecked
        loss_sum += loss
        optimizer.step(step, lr_factor(cfg, progress))
        average.update()
        clock.step_done()
        done = step + 1
        if done <= LOG_FIRST or done % LOG_EVERY == 0 or done == cfg.iterations:
            mean_loss, every_loss = (run.sum(torch.stack([loss, loss_sum])) / ROWS_PER_STEP).tolist()
            seconds = time.perf_counter() - clock.timer.start
            run.log(f"{done}/{cfg.iterations} train_loss: {mean_loss:.4f} train_time: {seconds / 60:.1f}m "
                    f"tok/s: {done * cfg.train_batch_tokens / seconds:.0f} "
                    f"train_time_ms:{1000 * seconds:.0f}")
            require_finite(run, f"train_loss up to step {done}", every_loss)
            run.last_good = f"train_loss {mean_loss:.4f} at step {done}"
    steps = step if stop else cfg.iterations
    if not steps:
        raise ConfigError(f"MAX_WALLCLOCK_SECONDS={cfg.max_wallclock_seconds:g} leaves no time for a step beside "
                          f"{calibration_s:.1f} s of calibration; raise it or lower GPTQ_CALIBRATION_BATCHES")
    if cfg.num_loops and not looping:
        run.log(f"train warning: looping never began (ENABLE_LOOPING_AT={cfg.enable_looping_at:g}), yet evaluation loops; "
                "train longer, lower it, or set NUM_LOOPS=0")
    train_s = clock.timer.seconds()
    loader.close()
    require_finite(run, f"train_loss up to step {steps}", run.sum(loss_sum).item())
    if stop:
        run.log(f"stopping_early: wallclock_cap train_time: {1000 * train_s:.0f}ms step: {steps}/{cfg.iterations}")
    loop_step, loop_s = loop_on or (steps, train_s)
    halves = (("loops_off", loop_step, loop_s), ("loops_on", steps - loop_step, train_s - loop_s))
    run.log("train speed " + "".join(
        f"{name}_tok_per_s:{count * cfg.train_batch_tokens / seconds:.0f} {name}_step_ms:{1000 * seconds / count:.1f} "
        for name, count, seconds in halves if count) + f"steps:{steps}")
    if run.device.type == "cuda":
        run.log(f"peak memory allocated: {torch.cuda.max_memory_allocated(run.device) >> 20} MiB "
                f"reserved: {torch.cuda.max_memory_reserved(run.device) >> 20} MiB")
    run.log("ema:applying EMA weights")
    average.apply()
    require_finite(run, f"the averaged weights after step {steps}", *model.parameters())
    return train_s


# --- 8 quantization -----------------------------------------------------------------------------------------
# Calibration statistics, GPTQ, protected column groups, low-rank correction: fp32 matrices to int8 codes.

MATRIX_NAMES = ("wq", "wk", "wv", "wo", "w_up", "w_down")
TAPPED_BY = {"wq": "qkv", "wk": "qkv", "wv": "qkv", "wo": "o", "w_up": "up", "w_down": "down"}
GPTQ_DAMP, GPTQ_BLOCK = 0.01, 128
SCALE_FLOOR = 1e-10          # keeps a constant row from dividing by zero


class Matrix(NamedTuple):
    """One matrix to quantize: W (rows, cols), H (cols, cols), act_rms (cols,), fp32; mean squared gradient of W."""
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
    """codes (rows, cols) int8, scale (rows,) fp16; columns [start, start + group) of each protected start use high."""
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


# Trellis rounding [TCQ]: codes count half steps. From row to row of a column a state machine says whether the code is
# even or odd, so that a code costs no more bits than one of whole steps, while the choice of path reaches points almost
# as dense as half steps: about a quarter less squared error for the same bits. The machine is Ungerboeck's of 64
# states: parity = state & 1, bit = code >> 1 & 1, next state = state >> 1 ^ 33 * parity ^ 10 * bit.
TRELLIS_STATES, TRELLIS_ROWS = 64, 256               # it starts anew, in state 0, every TRELLIS_ROWS rows of a matrix


def plain_trellis_round(x: Tensor, limit: Tensor) -> Tensor:
    """The valid codes of each line with the least Σ (x - code)² [Viterbi]; defines trellis_round.
    x (lines, n) fp32 in half steps, limit (lines,) fp32 largest magnitude. Returns fp32 codes (lines, n)."""
    residue, state = torch.arange(4, device=x.device), torch.arange(TRELLIS_STATES, device=x.device)
    low, high = ((-limit[:, None] - residue) / 4).ceil(), ((limit[:, None] - residue) / 4).floor()
    # (lines, n, 4): the nearest code of each residue modulo 4
    points = 4 * ((x[..., None] - residue) / 4 + 0.5).floor().clamp(low[:, None], high[:, None]) + residue
    errors = (x[..., None] - points).square()
    parity = state >> 5                              # a state's top bit is the parity of the code that led to it
    sources = [2 * (state ^ 33 * parity ^ 10 * bit) + parity for bit in (0, 1)]
    cost, took = torch.where(state == 0, 0.0, 1e30).expand(len(x), -1), []
    for i in range(x.shape[1]):
        either = [cost[:, source] + errors[:, i, parity + 2 * bit] for bit, source in enumerate(sources)]
        took.append(either[1] < either[0])
        cost = torch.minimum(*either)
    at, codes, line = cost.argmin(-1), torch.empty_like(x), torch.arange(len(x), device=x.device)
    for i in reversed(range(x.shape[1])):
        bit = took[i][line, at].long()
        codes[:, i] = points[line, i, 2 * bit + (at >> 5)]
        at = 2 * (at ^ 33 * (at >> 5) ^ 10 * bit) + (at >> 5)
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
        raise ValueError(f"gptq: for W {tuple(W.shape)} expected H {(M, cols, cols)} and scale {(M, rows)}, found "
                         f"{tuple(H.shape)} and {tuple(scale.shape)}")
    H = H.double()                                        # fp64 factors: an fp32 inverse loses the small columns
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
    # Column-major work copy (M, cols, rows): every step below touches whole columns.
    work = W.masked_fill(dead[:, None], 0.0).mT.gather(1, order[:, :, None].expand(M, cols, rows)).contiguous()
    codes = torch.empty_like(work)
    steps = scale.float()[:, None].expand(M, cols, rows)
    limits = torch.full((cols,), float(max_code), device=W.device)
    if high is not None:
        steps = torch.where(high[:, None], scale_high.float()[:, None], steps)
        limits = torch.where(high, float(max_high), limits)
    for start in range(0, cols, GPTQ_BLOCK):
        end = min(start + GPTQ_BLOCK, cols)
        block, errors = work[:, start:end].clone(), torch.empty_like(work[:, start:end])
        for j in range(end - start):
            column = order[:, start + j]                  # (M,) original column index in each matrix
            step = steps[torch.arange(M, device=W.device), column]
            limit = limits[column][:, None]
            q = round_column(block[:, j] / step.clamp_min(SCALE_FLOOR), limit, trellis)
            codes[:, start + j] = q
            errors[:, j] = (block[:, j] - q * step) / U[:, start + j, start + j, None]
            block[:, j:] -= U[:, start + j, start + j:end, None] * errors[:, j, None]
        work[:, end:] -= U[:, start:end, end:].mT @ errors
    inverse = order.argsort(-1)
    return codes.gather(1, inverse[:, :, None].expand_as(codes)).mT.to(torch.int8).contiguous()


STEP_FACTORS = 0.3, 2.0      # coarser steps save fewer bits than they promise; README, negative results


def balance_steps(matrices: Mapping[str, Matrix], share: float) -> dict[str, Matrix]:
    """Scale each matrix's clip sigmas so that a bit buys the same loss everywhere, at about the same total of bits.

    To second order an error e of a weight costs e² times its squared gradient noise, and a bit per weight always
    quarters e²; so the sum is least where grad_sq * step² is equal. `share` 1 goes all the way there, 0 stays.
    """
    steps = [row_scale(m.W, m.clip_sigmas, code_limit(m.bits)).float() for m in matrices.values()]
    cost = np.array([m.grad_sq * float(step.square().mean()) for m, step in zip(matrices.values(), steps)])
    if not np.isfinite(cost).all():
        raise ValueError("balance_steps: calibration gradients are not finite; the run has diverged, lower MATRIX_LR")
    live, log_cost = cost > 0, np.log(cost.clip(1e-300))         # a matrix without gradient keeps its steps
    mean = np.average(log_cost, weights=live * [m.W.numel() for m in matrices.values()] + 1e-9)
    factors = np.where(live, np.exp(share * (mean - log_cost) / 2).clip(*STEP_FACTORS), 1.0)
    return {name: m._replace(clip_sigmas=m.clip_sigmas * f) for (name, m), f in zip(matrices.items(), factors.tolist())}


def row_steps(m: Matrix, max_code: int, trellis: bool, columns: Tensor | slice = slice(None)) -> Tensor:
    """row_scale; for the trellis half of it, but no finer than int8 can reach the largest of these columns."""
    if not trellis:
        return row_scale(m.W, m.clip_sigmas, max_code)
    return torch.maximum(row_scale(m.W, m.clip_sigmas, 2 * max_code), (m.W[:, columns].abs().amax(-1) / 127).half())


def select_protected(matrices: Mapping[str, Matrix], group_size: int, top_k: int, bits: int) -> dict[str, list[int]]:
    """Start columns of the top_k most salient groups among all matrices with fewer than `bits` bits [AWQ].

    score(group) = Σ over its columns of act_rms · mean |W|; the earlier one wins a tie; partial groups do not compete.
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


def _round_to(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return (x / scale.float().clamp_min(SCALE_FLOOR)).round().clamp(low, high).to(torch.int8)


def pack_factors(A: Tensor, B: Tensor, group: int, asymmetric: bool = True) -> Factors:
    """Pack A in 2 bits and B in 4 bits with grouped scales, or both in 4 bits per row where groups do not fit."""
    def peak(x: Tensor, dim: int | None = None) -> Tensor:
        return (x.abs().max() if dim is None else x.abs().amax(dim)).clamp_min(SCALE_FLOOR)

    if asymmetric and B.numel() % group == 0:
        sA, grouped = (peak(A) / 1.5).half(), B.reshape(-1, group)
        sB = (peak(grouped, -1) / 7.5).half()
        return Factors(_round_to(A, sA, -2, 1), sA, _round_to(grouped, sB[:, None], -8, 7).view_as(B), sB)
    sA, sB = ((peak(x, -1) / 7).half() for x in (A, B))
    return Factors(_round_to(A, sA[:, None], -7, 7), sA, _round_to(B, sB[:, None], -7, 7), sB)


def correction(f: Factors) -> Tensor:
    """The fp32 matrix (rows, cols) that packed factors stand for."""
    if f.sA.ndim == 0:
        B = (f.qB.float().view(len(f.sB), -1) * f.sB.float()[:, None]).view(f.qB.shape)
        return (f.qA.float() * f.sA.float()) @ B
    return (f.qA.float() * f.sA.float()[:, None]) @ (f.qB.float() * f.sB.float()[:, None])


def dequantize(q: Quantized) -> Tensor:
    """The fp32 matrix (rows, cols) that will be used: codes times steps, protected columns, then the correction."""
    W = q.codes.float() * q.scale.float()[:, None]
    for start in q.protect_starts:
        columns = slice(start, start + q.group_size)
        W[:, columns] = q.codes[:, columns].float() * q.scale_high.float()[:, None]
    return W if q.factors is None else W + correction(q.factors)


def quantize_matrices(cfg: Config, run: Run, matrices: Mapping[str, Matrix]) -> dict[str, Quantized]:
    """Quantize matrices: protect groups, round with GPTQ, correct the worst; the same result on every rank.
    Matrices of one shape are rounded together. Ranks take the shapes in turn and exchange the codes."""
    if cfg.rdo_lambda:
        matrices = balance_steps(matrices, cfg.rdo_lambda)
    protected = (select_protected(matrices, cfg.awq_lite_group_size, cfg.awq_lite_group_top_k, cfg.awq_lite_bits)
                 if cfg.awq_lite_enabled else {})
    batches: dict[tuple, list[str]] = {}
    for name, m in matrices.items():
        batches.setdefault((m.W.shape, m.bits, tuple(protected.get(name, ()))), []).append(name)
    done: dict[str, Quantized] = {}
    trellis, rounded = cfg.rdo_lambda > 0, []
    for index, ((shape, bits, starts), names) in enumerate(batches.items()):
        group = [matrices[name] for name in names]
        max_code, max_high = code_limit(bits), code_limit(cfg.awq_lite_bits)
        scales = torch.stack([row_steps(m, max_code, trellis) for m in group])
        high, highs = None, [None] * len(group)
        if starts:
            high = torch.zeros(shape[1], dtype=torch.bool, device=scales.device)
            for start in starts:
                high[start:start + cfg.awq_lite_group_size] = True
            highs = torch.stack([row_steps(m, max_high, trellis, high) for m in group])
        limits = (127, 127) if trellis else (max_code, max_high)          # steps are balanced: only int8 is a limit
        codes = torch.empty(len(group), *shape, dtype=torch.int8, device=scales.device)
        if index % run.world_size == run.rank:
            codes.copy_(gptq(torch.stack([m.W for m in group]), torch.stack([m.H for m in group]), scales,
                             limits[0], high, highs if starts else None, limits[1], trellis))
        rounded.append(codes)
        for name, c, s, s_high in zip(names, codes, scales, highs):
            done[name] = Quantized(c, s, starts, cfg.awq_lite_group_size if starts else 0, s_high)
    for index, codes in enumerate(rounded):
        run.broadcast(codes, index % run.world_size)
    if cfg.lqer_enabled:
        residuals = {name: matrices[name].W - dequantize(done[name]) for name in matrices}
        norms = {name: float(E.norm()) for name, E in residuals.items()}
        for name in sorted(norms, key=lambda name: -norms[name])[:cfg.lqer_top_k]:
            A, B = top_components(residuals[name], cfg.lqer_rank)
            done[name] = done[name]._replace(factors=pack_factors(A, B, cfg.lqer_asym_group, cfg.lqer_asym_enabled))
    return {name: done[name] for name in matrices}


class Calibration(NamedTuple):
    """Σ x xᵀ per tapped input, fp32 (cols, cols), and the number of x; Σ squared_gradients with RDO_LAMBDA."""
    sums: dict[str, Tensor]
    counts: dict[str, int]
    num_batches: int
    grad_sq: dict[str, Tensor] = {}


GRADIENT_SEQS = 4            # sequences of each calibration batch whose gradient is taken, in one pass


@torch.enable_grad()
def squared_gradients(model: GPT, tokens_BT: Tensor) -> dict[str, Tensor]:
    """Mean squared gradient per matrix, (L,) or (1,): over few tokens all noise, whose variance is the curvature."""
    names = "tok_emb", *MATRIX_NAMES
    hidden = model(tokens_BT[:, :-1], looping=True, graphs=Graphs()).flatten(0, 1)
    loss = softcap_loss(hidden, model.tok_emb, model.softcap_pos, model.softcap_neg, tokens_BT[:, 1:].flatten())
    grads = torch.autograd.grad(loss, [getattr(model, name) for name in names])
    return {name: g.square().flatten(1).mean(1) if g.ndim == 3 else g.square().mean().view(1)
            for name, g in zip(names, grads)}


@torch.no_grad()
def collect_hessians(cfg: Config, run: Run, model: GPT, paths: Sequence[Path], num_batches: int) -> Calibration:
    """Input statistics of every quantized matrix over the first `num_batches` calibration batches, all ranks together.
    Looping is on; each execution of a looped layer counts. Rank r runs the batches r, R + r, ..."""
    # All keys from the start: with fewer batches than ranks some ranks add nothing, but still take part in the sums.
    widths = {"head": cfg.model_dim} | {f"{kind}.{layer}": cfg.mlp_dim if kind == "down" else cfg.model_dim
                                        for layer in range(cfg.num_layers) for kind in ("qkv", "o", "up", "down")}
    sums = {key: torch.zeros(width, width, device=run.device) for key, width in widths.items()}
    counts, layer = dict.fromkeys(widths, 0), 0
    grad_sq = {name: torch.zeros(1 if name == "tok_emb" else cfg.num_layers, device=run.device)
               for name in ("tok_emb", *MATRIX_NAMES)} if cfg.rdo_lambda else {}

    def tap(kind: str, x: Tensor) -> None:
        nonlocal layer
        if kind == "layer":
            layer = int(x)
            return
        key = kind if kind == "head" else f"{kind}.{layer}"
        x = x.reshape(-1, x.shape[-1])
        sums[key] += torch.mm(x.T, x, out_dtype=torch.float32) if x.is_cuda else x.T @ x
        counts[key] += len(x)

    batches = calibration_batches(paths, cfg.train_seq_len, cfg.row_tokens // cfg.train_seq_len)
    for index, batch in zip(range(num_batches), batches):
        run.beat()
        if index % run.world_size == run.rank:
            tokens = torch.from_numpy(batch).to(run.device)
            tap("head", model(tokens[:, :-1].contiguous(), looping=True, tap=tap, graphs=Graphs()))
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
    matrices: dict[str, Matrix] = {}

    def add(name: str, W: Tensor, key: str, bits: int, clip_sigmas: float) -> None:
        total = stats.sums[key]
        act_rms = (total.diagonal() / stats.counts[key]).sqrt()
        bank, _, layer = name.partition(".")
        grad_sq = float(stats.grad_sq[bank][int(layer or 0)]) if stats.grad_sq else 0.0
        matrices[name] = Matrix(W.detach(), total / stats.num_batches, act_rms, bits, clip_sigmas * sigma_factor,
                                grad_sq)

    add("tok_emb", model.tok_emb, "head", cfg.embed_bits, cfg.embed_clip_sigmas)
    for name in MATRIX_NAMES:
        clip_sigmas = cfg.mlp_clip_sigmas if name in ("w_up", "w_down") else cfg.attn_clip_sigmas
        for layer, W in enumerate(getattr(model, name)):
            add(f"{name}.{layer}", W, f"{TAPPED_BY[name]}.{layer}", cfg.matrix_bits, clip_sigmas)
    quantized = quantize_matrices(cfg, run, matrices)
    for name, q in quantized.items():
        if q.protect_starts or q.factors is not None:
            run.log(f"quantize matrix:{name} protected_columns:{list(q.protect_starts)} "
                    f"lqer_rank:{0 if q.factors is None else q.factors.qB.shape[0]}")
    run.log(f"quantize matrices:{len(matrices)} elapsed_s:{timer.seconds():.1f}")
    passed = {name: p.detach().half() for name, p in model.named_parameters()
              if name != "tok_emb" and name not in MATRIX_NAMES}
    return quantized, passed


@torch.no_grad()
def sort_hidden_units(model: GPT) -> None:
    """Order each layer's MLP units by the deviation of their w_up row: same function, row scales nearly free to store."""
    for up, down in zip(model.w_up, model.w_down):
        order = up.std(-1).argsort(stable=True)
        up.copy_(up[order])
        down.copy_(down[:, order])


# --- 9 weight coder -----------------------------------------------------------------------------------------
# Codes and scales to bytes and back: streams and their checks. The C that does it is in section 18.

# The coder of codes and scales is context mixing [lpaq]. A symbol is a few binary decisions (zero? sign? magnitude
# above 1? above 2? ...). For each, four adaptive counters chosen by different views of the past vote, a logistic
# mixer weighs the votes, and a binary arithmetic coder spends -log2 p bits. Weights are close to Gaussian and rows
# have nearly equal energy (their step is proportional to their deviation), so the views are estimates of the local
# variance: of the column, of the row so far, and of what is left of its energy. With `regress` (the embedding needs
# it) code j of a row is predicted from codes 0..j-1 by a ridge regression that both sides refit from the rows already
# coded, plus a share of the regression error of up to two earlier rows that the encoder names. All arithmetic that
# the decoder repeats is integer.
VOTES = 4                   # counters per decision
NODES = 32                  # decisions of one symbol: zero?, negative?, then magnitude >= 2, >= 3, ...
LEVELS = 128                # steps of the variance axis, 8 per octave, from 1/16 upwards
MAX_REGRESSED = 512, 65536  # columns, rows: keeps the 32- and 64-bit sums of the regression exact


@functools.cache
def _tables() -> tuple[np.ndarray, ...]:
    """squash (logit/256 -> p/65536), stretch (its inverse), counter rates, Gaussian counters; integers only."""
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
        density, factor = [1 << 32], ratio
        for _ in range(255):
            density.append(density[-1] * factor >> 32)
            factor = factor * (ratio * ratio >> 32) >> 32
        tail = [sum(density[k:]) for k in range(NODES)]
        p = [(density[0] << 22) // (density[0] + 2 * tail[1]), 1 << 21]
        p += [(tail[k] << 22) // max(tail[k - 1], 1) for k in range(2, NODES)]
        prior += [min(max(q, 1 << 14), (1 << 22) - (1 << 14)) << 10 | 30 for q in p]   # 30: trust in the prior
    return squash, stretch, rate, np.array(prior, np.uint32)


class _Twin:
    """Arithmetic coder and mixer of CODER_C in plain Python; `data` None encodes, else decodes."""

    def __init__(self, data: bytes | None) -> None:
        self.tables = [t.tolist() for t in _tables()]
        self.lo, self.hi, self.out, self.decode = 0, (1 << 64) - 1, bytearray(), data is not None
        self.data = iter(data or b"")
        self.code = int.from_bytes(bytes(next(self.data, 0) for _ in range(8)), "big")

    def bit(self, bit: int, p: int) -> int:
        middle = self.lo + ((self.hi - self.lo) >> 16) * p
        if self.decode:
            bit = int(self.code <= middle)
        self.lo, self.hi = (self.lo, middle) if bit else (middle + 1, self.hi)
        while not (self.lo ^ self.hi) >> 56:
            self.out.append(self.hi >> 56)
            self.lo, self.hi = self.lo << 8 & (1 << 64) - 1, self.hi << 8 & (1 << 64) - 1 | 255
            self.code = self.code << 8 & (1 << 64) - 1 | next(self.data, 0)
        return bit

    def decide(self, tabs: list, cells: list, weights: list, bit: int, max_age: int, speed: int) -> int:
        """One decision; `tabs[k][cells[k]]` are the counters, `weights` the two weight vectors (updated in place)."""
        squash, stretch, rate, _ = self.tables
        votes = [stretch[tab[cell] >> 20] for tab, cell in zip(tabs, cells)]
        dots = [sum(w * v for w, v in zip(vector, votes)) for vector in weights]

        def probability(x: int) -> int:
            return squash[min(max(x, -2047), 2047) + 2048]

        bit = self.bit(bit, probability(sum(dots) >> 19))
        for vector, dot in zip(weights, dots):
            error = ((bit << 16) - probability(dot >> 18)) * speed
            vector[:] = [w + (v * error + (1 << 19) >> 20) for w, v in zip(vector, votes)]
        for tab, cell in zip(tabs, cells):
            p, age = tab[cell] >> 10, tab[cell] & 1023
            p += ((4194303 if bit else 0) - p) * rate[age] >> 16
            tab[cell] = p << 10 | min(age + 1, max(age, max_age))
        return bit

    def number(self, value: int, bits: int) -> int:
        return sum(self.bit(value >> k & 1, 32768) << k for k in reversed(range(bits)))

    def share(self, value: int, odds: list) -> int:
        v = 1
        for k in (2, 1, 0):
            bit = self.bit(value >> k & 1, odds[v])
            odds[v] += (bit << 16) - odds[v] >> 6
            v = v << 1 | bit
        return v & 7

    def finish(self) -> bytes:
        return bytes(self.out) + bytes([(self.lo >> 56) + 1])


def _twin_divide(a: int, b: int) -> int:
    return a // b if a >= 0 else -(-a // b)                  # towards zero, like C


def _twin_refit(gram: list, n: int) -> list:
    """Coefficients (12 fractional bits) of every column on those to its left."""
    size, one, L, D, T = len(gram), 1 << 28, [], [], []
    keep = n * 250 // (n + 1000)
    sd = [math.isqrt(gram[i][i] + n) + 1 for i in range(size)]
    for i in range(size):
        scaled = []
        for j in range(i):
            target = _twin_divide(gram[i][j] << 24, sd[i] * sd[j]) * keep >> 4
            scaled.append(target - (sum(s * l for s, l in zip(scaled, L[j])) >> 28))
        L.append([_twin_divide(s << 28, D[j]) for j, s in enumerate(scaled)])
        D.append(max(one - sum(l * s >> 28 for l, s in zip(L[i], scaled)), 1 << 16))
        b = L[i][:]
        for j in reversed(range(i)):
            b[:j] = [v - (b[j] * l >> 28) for v, l in zip(b, L[j])]
        T.append([min(max(_twin_divide((b[j] >> 8) * sd[i], sd[j]) >> 8, -32767), 32767) for j in range(i)])
    return T


def _twin_level(variance: int) -> int:
    variance = min(max(variance, 16), 1 << 19)
    e = variance.bit_length() - 1
    return (e - 4) * 8 + (variance >> e - 3 & 7)


def twin_codes(codes: np.ndarray, alike: np.ndarray | None, trellis: int, data: bytes | None = None) -> bytes:
    """Specification of code_codes: return the stream of `codes`, or fill `codes` from `data`."""
    coder = _Twin(data)
    alike = None if alike is None else alike.tolist()
    _, _, rate, prior = coder.tables
    tabs = [[prior[level * NODES + node] for level in range(LEVELS) for _ in range(copies) for node in range(NODES)]
            for copies in (2, 2, 18, 18)]
    fresh = [(1 << 18) // VOTES] * VOTES
    by_part = [[fresh[:] for _ in range(NODES)] for _ in range(18)]
    by_blend = [[fresh[:] for _ in range(NODES)] for _ in range(LEVELS)]
    matrices, rows, cols = codes.shape
    slow, fast, n, refit_at, energy, errors = [], [], 0, 16, 0, []
    regress, odds = alike is not None, [[32768] * 8, [32768] * 8]
    gram, T = [[0] * (cols + 1) for _ in range(cols + 1)], [[0] * cols for _ in range(cols + 1)]
    for row in range(matrices * rows):
        line = codes[row // rows, row % rows]
        mean = sum(slow) // cols if row else 6 << 18
        if row % rows == 0:
            n = 12 if row else 6
            slow, fast = [mean] * cols, slow if row else [mean] * cols
        seen, expected, recent, spent = mean, mean, mean, 0
        rest = mean * cols
        budget = energy if row else rest
        left = [8]
        if row % rows % TRELLIS_ROWS == 0:
            states = [0] * cols
        shares, models = [], []
        while regress and row and len(shares) < 2 and (
                share := coder.share(alike[row][len(shares)] & 7, odds[len(shares)])):
            which = coder.number(alike[row][len(shares)] >> 3, row.bit_length())
            models.append(errors[which if which < row else 0])
            shares.append(share)
        errors.append([])
        if regress and row >= refit_at:
            T, refit_at = _twin_refit(gram, row), refit_at + refit_at // 3 + 1
        for j in range(cols):
            own = sum(t * v for t, v in zip(T[j + 1], left)) + (128 << trellis) >> 8 + trellis
            mu = min(max(own + (sum(model[j] * share for model, share in zip(models, shares)) >> 3), -1023), 1023)
            odd, sided = trellis & states[j], 0
            m = mu - 8 * odd + 8 >> 4
            flip = -1 if mu - 8 * odd < m * 16 else 1
            part = (mu - 8 * odd - m * 16) * flip
            ratio = min(max((seen << 8) // (expected + 1), 64), 1024)
            if not regress:
                ratio = min(max(_twin_divide(budget - spent << 8, max(rest, 0) + 1), 64), 1024) - 256
                ratio = 256 + _twin_divide(ratio * (cols - j), cols - j + (cols >> 6))
                part, sided = min(max((ratio - 256 >> 5) + 4, 0), 8) + 9 * odd, odd
            A, F = slow[j] >> 10, fast[j] >> 10
            B = A * ratio >> 8
            blend = _twin_level(B * 4 + (F * ratio >> 8) * 3 + (recent >> 10) >> 3)
            bases = [_twin_level(A) * 2 + sided, _twin_level(F * ratio >> 8) * 2 + sided, blend * 18 + part,
                     _twin_level(B) * 18 + part]
            t = 0 if coder.decode else ((int(line[j]) - odd >> trellis) - m) * flip
            found, sign = 0, 1
            for node in range(NODES):
                bit = int((t == 0, t < 0, abs(t) >= node)[min(node, 2)])
                bit = coder.decide(tabs, [base * NODES + node for base in bases],
                                   [by_part[part][node], by_blend[blend][node]], bit, 1000, 2)
                if node == 1:
                    sign, found = (-1 if bit else 1), 1
                elif bit != (node > 0):
                    break
                elif node:
                    found = node
            if found == NODES - 1:
                while found < 255 and coder.bit(int(abs(t) > found), 32768):
                    found += 1
            if coder.decode:
                line[j] = min(max((found * sign * flip + m << trellis) + odd, -128), 127)
            left.append(int(line[j]))
            if trellis and left[-1] & 1 != odd:
                raise ValueError(OFF_TRELLIS)
            states[j] = states[j] >> 1 ^ 33 * odd ^ 10 * (left[-1] >> 1 & 1)
            value = left[-1] * (16 >> trellis)
            errors[-1].append(min(max(value - own, -32767), 32767))
            variance = min(max(value - mu, -1023), 1023) ** 2 << 10
            step = rate[min(j + 16, 400)]
            seen += (variance - seen) * step >> 16
            expected += (slow[j] - expected) * step >> 16
            recent += variance - recent >> 4
            spent, rest = spent + variance, rest - slow[j]
            slow[j] += (variance - slow[j]) * rate[min(n, 1023)] >> 16
            fast[j] += (variance - fast[j]) * rate[min(n, 250)] >> 16
        n += 1
        energy += (spent - energy) * rate[min(row, 1023)] >> 16 if row else spent
        if regress:
            gram = [[g + a * b for g, b in zip(line_g, left)] for line_g, a in zip(gram, left)]
    return coder.finish()


def twin_words(words: np.ndarray, stride: int, data: bytes | None = None) -> bytes:
    """Specification of code_words: return the stream of `words` (uint16), or fill `words` from `data`."""
    coder = _Twin(data)
    tabs = [[[1 << 31 | 2] * 65536 for _ in range(VOTES)] for _ in range(2)]
    weights = [[[[105000] * VOTES for _ in range(2)] for _ in range(8)] for _ in range(2)]
    for i in range(len(words)):
        prev, back = (int(words[i - lag]) if i >= lag else 0 for lag in (1, stride))
        word = 0 if coder.decode else int(words[i])
        high = 0
        for half in range(2):
            views = [0, prev >> 8, back >> 8, prev >> 12 << 4 | back >> 12]
            if half:
                views = [0, high, 1 + (prev >> 4 & 15) if prev >> 8 == high else 0,
                         1 + (back >> 1 & 127) if back >> 8 == high else 0]
            node = 1
            for k in reversed(range(8)):
                bit = word >> (k + 8 - 8 * half) & 1
                cells = [view << 8 | node for view in views]
                node = node << 1 | coder.decide(tabs[half], cells, weights[half][k], bit, 250, 60)
            high = high << 8 | node & 255
        words[i] = high
    return coder.finish()


STREAM_HEADER = struct.Struct("<4s2B3I")      # magic, kind, option, then matrices, rows, columns
STREAM_MAGIC, CODES, WORDS = b"CMX1", 0, 1
REGRESS, TRELLIS = 1, 2                # options of a stream of codes
OFF_TRELLIS = "expected codes of trellis_round, found a code of the wrong parity; encode these with trellis=False"
MAX_SYMBOLS = 1 << 27                  # a header may not ask for more, nor for more than its payload could hold


def _run(function: str, buffer: np.ndarray, decode: bool, values: np.ndarray, *numbers) -> int:
    tables = _tables()                 # held by name: threads that race for the cache may own the only reference
    routine = getattr(compile_c(CODER_C), function)
    routine.restype = ctypes.c_int64
    return routine(
        *[ctypes.c_void_p(table.ctypes.data) for table in tables], ctypes.c_void_p(buffer.ctypes.data),
        ctypes.c_int64(buffer.size), int(decode), ctypes.c_void_p(values.ctypes.data), *numbers)


def _code_values(values: np.ndarray, option: int, data: bytes | None, use_twin: bool) -> bytes:
    """Encode int8 codes (option: REGRESS, TRELLIS) or uint16 words (option: stride), or decode `data` into `values`."""
    if not values.size:
        return b""
    name, numbers = "code_words", [*values.shape, option]
    if values.dtype == np.int8:
        alike, trellis = None, int(option & TRELLIS > 0)
        if option & REGRESS:
            rows = values.reshape(-1, values.shape[2])
            alike = np.zeros((len(rows), 2), np.int32) if data is not None else similar_rows(rows)
        if use_twin:
            return twin_codes(values, alike, trellis, data)
        name, numbers = "code_codes", [*values.shape, trellis, 0 if alike is None else alike.ctypes.data]
    elif use_twin:
        return twin_words(values, option, data)
    arguments = values, *map(ctypes.c_int64, numbers)
    if data is not None:
        _run(name, np.frombuffer(data, np.uint8), True, *arguments)
        return b""
    buffer = np.empty(2 * values.nbytes + 64, np.uint8)
    length = _run(name, buffer, False, *arguments)
    if length < 0:
        raise ValueError(OFF_TRELLIS)
    if length > buffer.size:                # codes far from any Gaussian; the first pass has counted their bytes
        buffer = np.empty(length, np.uint8)
        _run(name, buffer, False, *arguments)
    return buffer[:length].tobytes()


def similar_rows(rows: np.ndarray, block: int = 512) -> np.ndarray:
    """(rows, 2): 8 * index + share of the two earlier rows that help most once linear structure is removed; 0 ends.

    Only the encoder searches, so floating point is safe here: any answer decodes (another machine's matrix library may
    name other rows in a near tie; the stream then differs, not what it decodes to).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.from_numpy(rows).to(device).float()
    x -= x.mean(0)
    covariance = x.T @ x / len(x)
    shrunk = 0.8 * covariance + 0.2 * torch.diag(covariance.diagonal() + 1e-3)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(shrunk), x.T, upper=False).T.contiguous()
    norm = white.norm(dim=1) + 1e-9
    unit, alike = white / norm[:, None], torch.zeros(len(x), 2, dtype=torch.int32, device=device)
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


def _unpack(stream: bytes, kind: int) -> tuple[bytes, int, tuple, bytes, int]:
    """Check all that can be checked before decoding; return head, option, shape, payload, checksum of the content."""
    if len(stream) < STREAM_HEADER.size + 8 or stream[:4] != STREAM_MAGIC:
        raise ValueError(f"expected a {STREAM_MAGIC.decode()} stream, found {len(stream)} bytes starting "
                         f"{bytes(stream[:4])!r}")
    if zlib.crc32(stream[:-4]) != int.from_bytes(stream[-4:], "little"):
        raise ValueError(f"stream of {len(stream)} bytes fails its checksum: truncated or damaged, write it again")
    _, found_kind, option, *shape = STREAM_HEADER.unpack_from(stream)
    payload = stream[STREAM_HEADER.size:-8]
    if found_kind != kind:
        raise ValueError(f"stream of kind {found_kind}, expected {kind}: not ours")
    symbols = math.prod(shape if kind == CODES else shape[:2])
    if symbols > min(MAX_SYMBOLS, 32768 * len(payload)) or kind == CODES and option & REGRESS and not can_regress(shape):
        raise ValueError(f"stream of {len(stream)} bytes cannot hold shape {shape}: its header is damaged")
    return stream[:STREAM_HEADER.size], option, tuple(shape), payload, int.from_bytes(stream[-8:-4], "little")


def can_regress(shape: tuple) -> bool:
    return shape[2] <= MAX_REGRESSED[0] and shape[0] * shape[1] <= MAX_REGRESSED[1]


def encode_codes(codes: np.ndarray, *, regress: bool = False, trellis: bool = False, use_twin: bool = False) -> bytes:
    """Code one tensor group.

    codes    (matrices, rows, cols) int8; rows have comparable variance.
    regress  predict each code from the codes to its left in the row; pays where columns are correlated.
    trellis  the codes come from trellis_round, TRELLIS_ROWS rows at a time from row 0 of each matrix.
    Returns a stream that carries its shape and checksums. Raises ValueError when a shape or dtype is not codable.
    """
    codes = np.ascontiguousarray(codes)
    if codes.dtype != np.int8 or codes.ndim != 3:
        raise ValueError(f"expected int8 codes (matrices, rows, cols), found {codes.dtype} {codes.shape}")
    if regress and not can_regress(codes.shape):
        raise ValueError(f"regress=True takes at most {MAX_REGRESSED} columns and rows, found {codes.shape}; "
                         "use False")
    option = REGRESS * regress + TRELLIS * trellis
    return _pack(CODES, option, codes.shape, _code_values(codes, option, None, use_twin), codes)


def decode_codes(stream: bytes, *, use_twin: bool = False) -> np.ndarray:
    """Invert encode_codes. Raises ValueError on a truncated, damaged or foreign stream."""
    head, option, shape, payload, checksum = _unpack(stream, CODES)
    codes = np.zeros(shape, np.int8)
    _code_values(codes, option, payload, use_twin)
    if zlib.crc32(codes.tobytes(), zlib.crc32(head)) != checksum:
        raise ValueError(f"stream of {len(stream)} bytes decodes to other codes than were written: damaged")
    return codes


def ordered(words: np.ndarray) -> np.ndarray:
    """Bits of fp16 values (uint16) to integers in the order of the values, so that differences are small."""
    return np.where(words >> 15, ~words, words | 0x8000).astype(np.uint16)


def encode_words(words: np.ndarray, *, stride: int = 1, base: np.ndarray | None = None,
                 use_twin: bool = False) -> bytes:
    """Code uint16 bit patterns of fp16 values, exactly.

    stride   distance to an earlier word that is likely similar (the same channel in the layer before).
    base     same length: code the difference to it; both sides must know it.
    Differences to the previous word are tried too (sorted values); the shorter stream wins.
    """
    words = np.ascontiguousarray(words, np.uint16).ravel()
    if stride < 1 or base is not None and len(base) != len(words):
        raise ValueError(f"expected stride >= 1 and a base of {len(words)} words, found stride {stride}, base {base}")
    values = ordered(words) - (0 if base is None else ordered(base))
    candidates = [values, np.diff(values, prepend=values.dtype.type(0))]
    coded = [_code_values(v.astype(np.uint16), stride, None, use_twin) for v in candidates]
    best = len(coded[1]) < len(coded[0])
    return _pack(WORDS, int(best), (1, len(words), stride), coded[best], words)


def decode_words(stream: bytes, *, base: np.ndarray | None = None, use_twin: bool = False) -> np.ndarray:
    """Invert encode_words; `base` as given there. Raises ValueError on a truncated, damaged or foreign stream."""
    head, is_difference, (_, length, stride), payload, checksum = _unpack(stream, WORDS)
    values = np.zeros(length, np.uint16)
    _code_values(values, stride, payload, use_twin)
    if is_difference:
        values = np.cumsum(values, dtype=np.uint16)
    if base is not None and len(base) != length:
        raise ValueError(f"stream holds {length} words, but base has {len(base)}")
    values = values + (np.uint16(0) if base is None else ordered(base))
    words = np.where(values >> 15, values & 0x7FFF, ~values).astype(np.uint16)         # the inverse of ordered()
    if zlib.crc32(words.tobytes(), zlib.crc32(head)) != checksum:
        raise ValueError(f"stream of {len(stream)} bytes decodes to other words than were written: damaged, or "
                         "another base")
    return words


# --- 10 artifact --------------------------------------------------------------------------------------------
# Checked, atomic files of tensors; one code stream per tensor group; rate control and the size report.

FORMAT_VERSION = 4
CHECKPOINT_MAGIC, ARTIFACT_MAGIC = b"GOLFWGHT", b"GOLFCODE"
STREAM_GROUPS = ("tok_emb", "w_up", "w_down", "wq", "wo", "wk", "wv")      # the longest job first
HALVED_GROUPS = STREAM_GROUPS[:3]                # two streams each, so that no thread works twice as long as the others
# Settings that do not shape what a file holds: how and where a run goes, scoring, and for a checkpoint
# quantization.
# Every other setting does, so that a new one is compared unless it is listed here.
RUN_FIELDS = tuple("run_id data_path tokenizer_path compile allow_ prequant_only quantize_only "
                   "ttt_eval_only audit "
                   "checkpoint_dir skip_check quiet fused_ce_enabled".split())
SCORING_FIELDS = ("val_batch_tokens", "eval_", "ttt_", "phased_ttt_", "global_ttt_", "ngram_", "token_")
QUANTIZATION_FIELDS = ("matrix_bits", "embed_bits", "gptq_calibration", "attn_clip", "mlp_clip", "embed_clip",
                       "fill_", "rdo_", "compressor", "awq_", "lqer_")


class ArtifactError(ValueError):
    """A checkpoint or artifact is missing, damaged, or made with other settings or another tokenizer."""


def shaping_settings(magic: bytes, cfg: Config) -> dict[str, Any]:
    """Settings that shaped a file of this kind."""
    others = RUN_FIELDS + SCORING_FIELDS + (QUANTIZATION_FIELDS if magic == CHECKPOINT_MAGIC else ())
    return {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)
            if not field.name.startswith(others)}


def build_container(magic: bytes, cfg: Config, streams: Mapping[str, bytes],
                    notes: Mapping[str, Any] | None = None,
                    origin: Mapping[str, str] | None = None) -> bytes:
    """Named byte streams with the settings that shaped them, notes (JSON), Run.origin and a SHA-256.
    Layout: magic (8), version u32, header length u32, header (zlib JSON), streams, SHA-256 of all before (32)."""
    header = zlib.compress(json.dumps({
        "settings": shaping_settings(magic, cfg), "origin": origin or {},
        "streams": [[name, len(stream)] for name, stream in streams.items()], "notes": notes or {}},
        separators=(",", ":")).encode(), 9)
    body = b"".join([magic, np.array([FORMAT_VERSION, len(header)], "<u4").tobytes(), header, *streams.values()])
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
    """Streams and notes of a file made by build_container; raises ArtifactError unless every check holds: the
    file's
    SHA-256 where given, settings, and with `run` its tokenizer. Other code is a warning."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); check RUN_ID, or run the earlier stage "
                            "first") from error
    if data[:8] != magic:
        raise ArtifactError(f"{path}: expected a file beginning with {magic!r}, found {data[:8]!r}; this is not a "
                            "file of that kind")
    if len(data) < 48 or hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise ArtifactError(f"{path}: checksum mismatch over {len(data):,} bytes; the file is truncated or "
                            "corrupted, write it again")
    if sha256 not in ("", found := hashlib.sha256(data).hexdigest()):
        raise ArtifactError(f"{path}: SHA-256 {found[:16]}..., but rank 0 has {sha256[:16]}...; all ranks "
                            f"must "
                            "read the same file, look at the disk and start again")
    version, header_bytes = np.frombuffer(data[8:16], "<u4").tolist()
    if version != FORMAT_VERSION:
        raise ArtifactError(f"{path}: format version {version}, expected {FORMAT_VERSION}; write it again with this "
                            "script")
    header = json.loads(zlib.decompress(data[16:16 + header_bytes]))
    made, now = header["settings"], shaping_settings(magic, cfg)
    differing = [name for name in {**made, **now} if made.get(name) != now.get(name)]
    if differing:
        changes = ", ".join(f"{name.upper()}={made.get(name)} (now {now.get(name)})" for name in differing)
        raise ArtifactError(f"{path}: made with other settings: {changes}; set them as they were")
    _check_origin(path, header["origin"], run)
    cuts = np.cumsum([16 + header_bytes, *(length for _, length in header["streams"])]).tolist()
    return {name: data[a:b] for (name, _), a, b in zip(header["streams"], cuts, cuts[1:])}, header["notes"]


def _check_origin(path: Path, made: Mapping[str, str], run: Run | None) -> None:
    now = run.origin if run else {}
    differing = [name for name in made if name in now and made[name] != now[name]]
    if "tokenizer" in differing:
        raise ArtifactError(f"{path}: made with a tokenizer of SHA-256 {made['tokenizer'][:16]}..., now "
                            f"{now['tokenizer'][:16]}...; set TOKENIZER_PATH and DATA_PATH as they were")
    if "code" in differing:
        run.log(f"artifact warning file:{path.name} made_with_code:{made['code'][:16]} "
                f"code:{now['code'][:16]}")


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Names, dtypes, shapes and raw little-endian values in one byte string; unpack_tensors is the exact inverse."""
    index = json.dumps([[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()])
    parts = [np.array([len(index)], "<u4").tobytes(), index.encode()]
    return b"".join(parts + [t.detach().cpu().contiguous().numpy().tobytes() for t in tensors.values()])


def unpack_tensors(data: bytes) -> dict[str, Tensor]:
    length = int(np.frombuffer(data[:4], "<u4")[0])
    tensors, offset = {}, 4 + length
    for name, dtype, shape in json.loads(data[4:4 + length]):
        count = math.prod(shape)
        values = np.frombuffer(data, np.dtype(dtype), count, offset)
        tensors[name] = torch.from_numpy(values.copy()).reshape(shape)
        offset += values.nbytes
    return tensors


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
        tensors = pack_tensors(dict(model.named_parameters()))
        data = build_container(CHECKPOINT_MAGIC, cfg, {"weights": tensors}, origin=run.origin)
        save(run, checkpoint_path(run), data)
        run.log(f"Serialized model: {len(data)} bytes")
    run.barrier()


def read_checkpoint(cfg: Config, run: Run, model: GPT) -> None:
    streams, _ = read_container(checkpoint_path(run), CHECKPOINT_MAGIC, cfg, run)
    model.load_state_dict(unpack_tensors(streams["weights"]))


def group_streams(group: str) -> list[str]:
    return [f"{group}:1", f"{group}:2"] if group in HALVED_GROUPS else [group]


def split_codes(group: str, codes: np.ndarray) -> list[np.ndarray]:
    """The parts of codes (matrices, rows, cols) in group_streams: rows of the embedding, matrices of the others."""
    axis, cut = (1, codes.shape[1] // 2 // TRELLIS_ROWS * TRELLIS_ROWS) if group == "tok_emb" else (0, len(codes) // 2)
    return np.split(codes, [cut], axis) if group in HALVED_GROUPS else [codes]


def group_members(cfg: Config, group: str) -> list[str]:
    return [group] if group == "tok_emb" else [f"{group}.{layer}" for layer in range(cfg.num_layers)]


def _fp16_words(tensors: Sequence[Tensor]) -> np.ndarray:
    return torch.cat([t.detach().cpu().half().flatten() for t in tensors]).numpy().view(np.uint16)


def _high_scale_base(scale: Tensor, bits: int, high_bits: int) -> np.ndarray:
    """What scale_high is but for rounding, given scale: both sides derive it, only the difference is coded."""
    return _fp16_words([scale.float() * (code_limit(bits) / code_limit(high_bits))])


def encode_model(cfg: Config, quantized: Mapping[str, Quantized],
                 passed: Mapping[str, Tensor]) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(streams, notes) of the artifact: codes and scales per tensor group, corrections, pass-through tensors.
    The notes say what the streams cannot: shapes of pass-through tensors, protected columns, kinds of corrections."""
    wide = [name for name, t in passed.items() if t.shape[-1:] == (cfg.model_dim,)]
    rest = [name for name in passed if name not in wide]
    jobs: dict[str, Callable[[], bytes]] = {}             # the longest job first
    for group in STREAM_GROUPS:
        members = [quantized[name] for name in group_members(cfg, group)]
        codes = np.stack([q.codes.cpu().numpy() for q in members])
        regress = group == "tok_emb" and can_regress(codes.shape)
        for name, part in zip(group_streams(group), split_codes(group, codes)):
            jobs[name] = functools.partial(encode_codes, part, regress=regress, trellis=cfg.rdo_lambda > 0)
        jobs[f"{group}:scale"] = functools.partial(encode_words, _fp16_words([q.scale for q in members]),
                                                   stride=codes.shape[1])
    corrected = {name: q.factors for name, q in quantized.items() if q.factors is not None}
    protected = {name: q for name, q in quantized.items() if q.protect_starts}
    for name, q in protected.items():
        bits = cfg.embed_bits if name == "tok_emb" else cfg.matrix_bits
        jobs[f"{name}:high"] = functools.partial(encode_words, _fp16_words([q.scale_high]),
                                                 base=_high_scale_base(q.scale, bits, cfg.awq_lite_bits))
    for name, f in corrected.items():
        jobs[f"{name}:qA"] = functools.partial(encode_codes, f.qA[None].cpu().numpy())
        jobs[f"{name}:qB"] = functools.partial(encode_codes, f.qB.mT[None].cpu().numpy())
    scales = [part for f in corrected.values() for part in (f.sA, f.sB)]
    jobs["wide"] = functools.partial(encode_words, _fp16_words([passed[name] for name in wide]), stride=cfg.model_dim)
    jobs["rest"] = functools.partial(encode_words, _fp16_words([*(passed[name] for name in rest), *scales]))
    notes = {"passed": [[name, list(passed[name].shape)] for name in (*wide, *rest)], "num_wide": len(wide),
             "bits": [cfg.embed_bits, cfg.matrix_bits, cfg.awq_lite_bits],
             "protected": {name: [q.group_size, *q.protect_starts] for name, q in protected.items()},
             "corrected": [[name, list(f.sA.shape), list(f.sB.shape)] for name, f in corrected.items()]}
    return dict(zip(jobs, _in_threads(lambda job: job(), list(jobs.values())))), notes


def decode_model(cfg: Config, streams: Mapping[str, bytes], notes: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict the artifact stands for, fp32; the exact values dequantize() gave before encoding."""
    coded = sum(map(group_streams, STREAM_GROUPS), []) + [name for name in streams if name.endswith((":qA", ":qB"))]
    arrays = _in_threads(lambda name: decode_codes(streams[name]), coded)
    codes = {name: torch.from_numpy(array) for name, array in zip(coded, arrays)}

    def words(name: str, base: np.ndarray | None = None) -> Tensor:
        return torch.from_numpy(decode_words(streams[name], base=base).view(np.float16))

    def take(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        parts = flat.split([math.prod(shape) for shape in shapes])
        return [part.reshape(tuple(shape)) for part, shape in zip(parts, shapes)]

    passed, wide = notes["passed"], notes["num_wide"]
    rest_shapes = [shape for _, shape in passed[wide:]]
    rest = take(words("rest"), rest_shapes + [shape for _, *pair in notes["corrected"] for shape in pair])
    values = take(words("wide"), [shape for _, shape in passed[:wide]]) + rest[:len(rest_shapes)]
    state = {name: t.float() for (name, _), t in zip(passed, values)}
    factor_scales = iter(rest[len(rest_shapes):])
    factors = {name: Factors(codes[f"{name}:qA"][0], sA, codes[f"{name}:qB"][0].mT.contiguous(), sB)
               for (name, *_), sA, sB in zip(notes["corrected"], factor_scales, factor_scales)}
    embed_bits, matrix_bits, high_bits = notes["bits"]
    for group in STREAM_GROUPS:
        stack, members = torch.cat([codes[name] for name in group_streams(group)], int(group == "tok_emb")), []
        for name, c, scale in zip(group_members(cfg, group), stack, words(f"{group}:scale").view(stack.shape[:2])):
            q = Quantized(c, scale, factors=factors.get(name))
            if name in notes["protected"]:
                group_size, *starts = notes["protected"][name]
                base = _high_scale_base(scale, embed_bits if name == "tok_emb" else matrix_bits, high_bits)
                q = q._replace(protect_starts=tuple(starts), group_size=group_size,
                               scale_high=words(f"{name}:high", base))
            members.append(dequantize(q))
        state[group] = members[0] if group == "tok_emb" else torch.stack(members)
    return state


RATE_TOLERANCE, RATE_ATTEMPTS = 4096, 8          # bytes below the limit that are as good as none
SMALLEST_SIGMA_FACTOR = 0.5                      # below, real weights would begin to clip


def write_artifact(cfg: Config, run: Run, model: GPT, stats: Calibration) -> str:
    """Quantize, encode, make it fit; rank 0 writes and reports the artifact. Returns its SHA-256 on every
    rank."""
    code_bytes = int(run.agree([report_code_size(run) if run.rank == 0 else 0])[0])
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
                                f"{SIZE_LIMIT:,}; raise "
                                "ATTN_, MLP_ and EMBED_CLIP_SIGMAS")
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
    """What counts as code: the packed script, this very file when it is what runs. Readable and packed have
    one hash."""
    source = program_source().encode()
    if main.__code__.co_filename != __file__:             # run by the loader that pack.py writes
        form, data = "packed_file", Path(__file__).read_bytes()
    elif (REPO / "pack.py").is_file():
        import pack
        form, data = "packed", pack.pack_script(source.decode())
    else:
        form, data = "lzma_of_source", lzma.compress(source, preset=9 | lzma.PRESET_EXTREME)
    return ShippedCode(form, len(data), hashlib.sha256(data).hexdigest(), len(source))


def report_code_size(run: Run) -> int:
    """Bytes of the script that ships, logged."""
    code = shipped_code()
    run.log(f"artifact code_form:{code.form}" + (' reason:"no pack.py beside the '
                                                 'script"' if "lzma" in code.form else ""))
    run.log(f"Code size (uncompressed): {code.source_bytes} bytes")
    run.log(f"Code size (compressed): {code.num_bytes} bytes")
    return code.num_bytes


def fit_artifact(cfg: Config, run: Run, model: GPT, stats: Calibration, limit: int) -> bytes:
    """The artifact's bytes (on rank 0), at most `limit`: the configured clip sigmas where they fit, else larger ones.
    With FILL_ARTIFACT=1 smaller ones where there is room. Scaling all steps by f saves log2(f) bits per weight, which
    finds the factor in a few attempts. Raises ArtifactError when none fits."""
    weights = sum(getattr(model, name).numel() for name in STREAM_GROUPS)
    factor, tried = 1.0, {}
    for attempt in range(RATE_ATTEMPTS):
        timer = Timer(run)
        quantized, data, coding = quantize(cfg, run, model, stats, factor), b"", Timer(run)
        if run.rank == 0:
            streams, notes = encode_model(cfg, *quantized)
            data = build_container(ARTIFACT_MAGIC, cfg, streams, notes, run.origin)
            codes = {group: sum(len(streams[name]) for name in group_streams(group)) for group in STREAM_GROUPS}
            run.log(f"artifact attempt:{attempt + 1} sigma_factor:{factor:.6f} model_bytes:{len(data)} "
                    f"room_bytes:{limit - len(data)} elapsed_s:{timer.seconds():.1f} encode_s:{coding.seconds():.1f} "
                    + " ".join(f"{name}_bytes:{size}" for name, size in codes.items())
                    + f" small_bytes:{sum(map(len, streams.values())) - sum(codes.values())}")
        room = limit - int(run.agree([len(data)])[0])
        tried[factor] = room, data
        if 0 <= room and (room <= RATE_TOLERANCE or (factor == 1.0 and not cfg.fill_artifact)):
            break
        factor = max(factor * 2.0 ** min(4.0, (RATE_TOLERANCE / 2 - room) * 8 / weights), SMALLEST_SIGMA_FACTOR)
        if factor in tried:
            break
    fitting = [f for f, (room, _) in tried.items() if room >= 0]
    if not fitting:
        smallest = limit - max(room for room, _ in tried.values())
        raise ArtifactError(f"no clip sigmas found that fit {limit:,} bytes in {RATE_ATTEMPTS} attempts (smallest "
                            f"{smallest:,}); raise ATTN_, MLP_ and EMBED_CLIP_SIGMAS or shrink the model")
    return tried[min(fitting)][1]


def read_artifact(cfg: Config, run: Run, model: GPT, sha256: str = "") -> None:
    """Replace the model's weights by what ships; every rank must find the file that rank 0 wrote, or else
    reads."""
    timer = Timer(run)
    if not sha256:
        path = artifact_path(run)
        is_readable = run.rank == 0 and path.is_file()    # otherwise read_container says why
        sha256 = run.share(hashlib.sha256(path.read_bytes()).hexdigest() if is_readable else "")
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


class BpbMeter:
    """Sums over scored targets. fp64: an fp32 sum stops counting single tokens at 2**24, and validation has 48M."""

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
            raise DataError("the scored targets carry no bytes; the byte sidecar is all zero, prepare it again")
        score = Score(nats / tokens, nats / (math.log(2) * num_bytes), int(tokens), int(num_bytes))
        require_finite(self.run, "val_loss", score.loss)
        self.run.last_good = f"val_loss {score.loss:.4f} in stage {self.run.stage_name}"
        return score


def eval_row_tokens(cfg: Config) -> int:
    """Targets per row of plain evaluation: as many whole sequences as one rank's eighth of VAL_BATCH_TOKENS holds."""
    return cfg.val_batch_tokens // ROWS_PER_STEP // cfg.eval_seq_len * cfg.eval_seq_len


def score_row(cfg: Config, run: Run, model: GPT, tokens: np.ndarray, byte_counts: np.ndarray, meter: BpbMeter,
              looping: bool) -> None:
    """Bank every target of one flat row of tokens (length + 1,). A compiled model gets the row padded to a training
    row and with gradients on, though nothing goes backward: then the graphs of training serve here, and nothing is
    compiled for two diagnostics."""
    length, inputs = len(tokens) - 1, tokens[:-1].astype(np.int64)
    if cfg.compile:
        inputs = np.pad(inputs, (0, max(cfg.row_tokens, eval_row_tokens(cfg)) - length))      # causal: nothing sees it
    bounds = mark_varying(torch.from_numpy(segment_bounds(inputs, cfg.eval_seq_len)).to(run.device), 0)
    with torch.set_grad_enabled(cfg.compile):
        hidden = model(torch.from_numpy(inputs).to(run.device)[None], looping=looping,
                       segments=(bounds, cfg.longest_segment))[0].detach()
    targets, counts = (torch.from_numpy(x[1:].astype(np.int64)).to(run.device) for x in (tokens, byte_counts))
    with torch.no_grad():
        for at in range(0, length, SCORE_CHUNK):
            span = slice(at, min(at + SCORE_CHUNK, length))
            meter.add(model.score(hidden[span].clone(), targets[span].clone())[0], counts[span])


def evaluate_plain(cfg: Config, run: Run, model: GPT, tokens: np.ndarray, byte_counts: np.ndarray,
                   looping: bool = True) -> Score:
    """Score every target after the first token in flat rows of whole sequences, dealt to the ranks. Rows begin at
    multiples of their length on any world size, so the context of a target does not depend on it."""
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
    run.log(f"diagnostic {name} val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f} "
            f"eval_time:{1000 * timer.seconds():.0f}ms targets:{score.tokens} bytes:{score.bytes}")
    return score


# --- 12 hints and order -------------------------------------------------------------------------------------
# N-gram hints and the tilt of their probability; the plan of batches and the one certified order of scoring.

class Hints(NamedTuple):
    """Per target: hinted token int32 (0 where closed), gate bool, confidence fp32 (0 where the context is new)."""
    hint: np.ndarray
    gate: np.ndarray
    confidence: np.ndarray


def closed_hints(count: int) -> Hints:
    return Hints(np.zeros(count, np.int32), np.zeros(count, bool), np.zeros(count, np.float32))


def twin_ngram_hints(tokens: np.ndarray, order: np.ndarray, doc_start: np.ndarray, context: int,
                      threshold: float) -> Hints:
    """The definition: walk the targets in `order`; look each context up, then count the target.

    tokens     (N,) uint16 stream; target i is tokens[i + 1].
    order      (n,) int64 targets in the order in which they are scored, each at most once.
    doc_start  (N - 1,) int64 first token of the document that target i is scored in; a context that would reach
               before it gives no hint and is not counted.
    The hint is the token that first reached the highest count; the gate opens where its share of all counts is at
    least `threshold`, both as fp32.
    """
    hint, gate, confidence = hints = closed_hints(len(tokens) - 1)
    table: dict[tuple, dict] = {}
    for i in order.tolist():
        begin = i + 1 - context
        if begin < doc_start[i]:
            continue
        entry = table.setdefault(tuple(tokens[begin:i + 1].tolist()), {"counts": {}, "total": 0, "top": 0, "best": 0})
        if entry["total"]:
            confidence[i] = np.float32(entry["best"]) / np.float32(entry["total"])
            if confidence[i] >= np.float32(threshold):
                hint[i], gate[i] = entry["top"], True
        target = int(tokens[i + 1])
        count = entry["counts"][target] = entry["counts"].get(target, 0) + 1
        entry["total"] += 1
        if count > entry["best"]:
            entry["top"], entry["best"] = target, count
    return hints


def ngram_hints(tokens: np.ndarray, order: np.ndarray, doc_start: np.ndarray, context: int,
                threshold: float) -> Hints:
    """twin_ngram_hints in C, exactly; raises MemoryError when the table does not fit."""
    tokens, order, doc_start = (np.ascontiguousarray(x, dtype) for x, dtype in (
        (tokens, np.uint16), (order, np.int64), (doc_start, np.int64)))
    n = len(tokens) - 1
    if len(doc_start) != n or (len(order) and not 0 <= order.min() <= order.max() < n):
        raise ValueError(f"ngram_hints: expected doc_start of {n} targets and order within them, found "
                         f"{len(doc_start)} and {order.min()}..{order.max()}")
    hints = closed_hints(n)
    pointer = lambda x: ctypes.c_void_p(x.ctypes.data)                       # noqa: E731
    if compile_c(NGRAM_C).ngram_hints(
            pointer(tokens), pointer(order), ctypes.c_int64(len(order)), pointer(doc_start), ctypes.c_int(context),
            ctypes.c_float(threshold), *map(pointer, hints)):
        raise MemoryError(f"no memory for n-grams of {len(order):,} targets; free about {len(order) * 45 >> 20} MiB")
    return hints


def tilt(nll: Tensor, log_q_hint: Tensor, is_hit: Tensor, boost: Tensor) -> Tensor:
    """nll of the target after multiplying the hint's probability by exp(boost) and renormalizing; all (...,) fp32."""
    return nll - boost * is_hit + torch.log1p(log_q_hint.clamp_max(0.0).exp() * torch.expm1(boost))


LANES = 8                    # independent sequences of batches; R ranks run 8/R lanes each
SPLIT_TOKENS = 1920          # a batch with a longer document is dealt to all lanes, which bounds the memory of a step
STEP_COST_TOKENS = 8000      # launch overhead of one chunk step in tokens of forward and backward; balances lanes


class Documents(NamedTuple):
    """start (n,) first token, length (n,) tokens including the next document's BOS; int64. Targets: length - 1."""
    start: np.ndarray
    length: np.ndarray


def find_documents(tokens: np.ndarray) -> Documents:
    """Documents begin at BOS and own the following BOS as their last target. A lone final BOS has no target."""
    starts = np.flatnonzero(tokens == BOS).astype(np.int64)
    lengths = np.append(starts[1:] + 1, len(tokens)) - starts
    return Documents(starts[lengths >= 2], lengths[lengths >= 2])


class Batch(NamedTuple):
    """Documents scored together, shortest first; `index` counts batches of equal size by ascending length."""
    index: int
    docs: tuple[int, ...]
    is_full: bool            # full batches of a lane reuse its adapters; others get fresh ones


Phase = list[list[Batch]]    # batches of each lane, in order


def plan_batches(docs: Documents, *, batch_size: int, lanes: int = LANES, split_tokens: int = SPLIT_TOKENS,
                 prefix_docs: int = 0, chunk: int = 48, window: int = 2560) -> list[Phase]:
    """Deal all documents to lanes, in one or two phases. Depends on document lengths and settings only.
    Batches of documents of similar length are queued longest first; each goes to the lane with the least work.
    The first phase ends with the batch that brings the number of documents to prefix_docs (0: a single phase)."""
    by_length = np.argsort(docs.length, kind="stable")
    batches = [by_length[at:at + batch_size] for at in range(0, len(by_length), batch_size)]
    phases: list[Phase] = [[[] for _ in range(lanes)]]
    loads, seen, boundary = np.zeros(lanes), 0, min(prefix_docs, len(by_length))
    for b in sorted(range(len(batches)), key=lambda b: -docs.length[batches[b]].max()):
        if 0 < boundary <= seen and len(phases) == 1:
            phases.append([[] for _ in range(lanes)])
            loads[:] = 0
        members = batches[b]
        parts = lanes if docs.length[members].max() > split_tokens else 1
        for part in range(min(parts, len(members))):
            share = members[part::parts]
            lane = int(loads.argmin())
            phases[-1][lane].append(Batch(b, tuple(share.tolist()), parts == 1 and len(share) == batch_size))
            loads[lane] += batch_cost(docs.length[share], chunk, window)
        seen += len(members)
    return phases


def num_chunks(length: np.ndarray, chunk: int) -> np.ndarray:
    """Chunks of documents with `length` tokens, that is length - 1 targets."""
    return -(-(length - 1) // chunk)


def batch_cost(lengths: np.ndarray, chunk: int, window: int) -> float:
    """Work of a batch in tokens: each chunk recomputes the window of every unfinished document."""
    steps = np.arange(num_chunks(lengths, chunk).max())
    active = (num_chunks(lengths, chunk)[None] > steps[:, None]).sum(1)
    return float((active * np.minimum(chunk * (steps + 1), window) + STEP_COST_TOKENS).sum())


class ScoredChunks(NamedTuple):
    """Every (document, chunk) of a plan in the certified order; int64 (chunks,) each."""
    doc: np.ndarray
    chunk: np.ndarray
    phase: np.ndarray


def certified_order(phases: Sequence[Phase], docs: Documents, chunk: int) -> ScoredChunks:
    """The one total order in which chunks count as scored: by phase, step of the lane, lane, row. Every prediction
    depends only on tokens before it in this order, whatever the number of ranks and their speed."""
    tables = []
    for phase, lanes in enumerate(phases):
        for lane, batches in enumerate(lanes):
            first_step = 0
            for batch in batches:
                counts = num_chunks(docs.length[list(batch.docs)], chunk)
                row = np.repeat(np.arange(len(counts)), counts)
                index = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
                doc = np.asarray(batch.docs)[row]
                tables.append(np.stack(np.broadcast_arrays(phase, first_step + index, lane, row, doc, index)))
                first_step += int(counts.max())
    phase, step, lane, row, doc, chunk_index = np.concatenate(tables, axis=1)
    order = np.lexsort((row, lane, step, phase))
    return ScoredChunks(doc[order], chunk_index[order], phase[order])


def targets_in_order(scored: ScoredChunks, docs: Documents, chunk: int) -> np.ndarray:
    """Target indices (target i is token i + 1) in the certified order, int64."""
    first = docs.start[scored.doc] + chunk * scored.chunk
    counts = np.minimum(chunk, docs.length[scored.doc] - 1 - chunk * scored.chunk)
    return np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


def select_prefix(scored: ScoredChunks, docs: Documents, chunk: int, prefix_docs: int) -> np.ndarray:
    """Documents for the base adaptation: the first prefix_docs of phase 0 by their last chunk, shortest first."""
    is_last = (scored.phase == 0) & (scored.chunk == num_chunks(docs.length[scored.doc], chunk) - 1)
    chosen = scored.doc[is_last][:prefix_docs]
    return chosen[np.lexsort((chosen, docs.length[chosen]))]          # a stable sort of all documents by length


# --- 13 test-time training ----------------------------------------------------------------------------------
# Documents are scored chunk by chunk; only then do their own adapters, and once the base, learn from them [TTT].

class Window(NamedTuple):
    """Where one chunk of each document lies; arrays (documents,)."""
    start: np.ndarray        # first input token, counted from the document's start
    length: np.ndarray       # input tokens
    offset: np.ndarray       # the chunk's first position in the window
    count: np.ndarray        # targets of the chunk


def chunk_window(pred_len: np.ndarray, index: int, chunk: int, window: int) -> Window:
    """The window of chunk `index` of documents with pred_len targets; the last window ends with its document."""
    end = np.minimum(chunk * (index + 1), pred_len)
    start = np.maximum(0, end - window)
    return Window(start, end - start, chunk * index - start, end - chunk * index)


DrawA = Callable[[str, int, tuple[int, ...]], Tensor]     # (kind, slot, shape) -> initial A


class AdapterBank:
    """Adapters and optimizer state of one batch; documents are rows and never mix. `params` holds A (rows, R, in) and
    B (rows, out, R) of every slot and kind, fp32, A before B."""

    def __init__(self, cfg: Config, num_slots: int, rows: int, device: torch.device, draw: DrawA) -> None:
        self.cfg, self.rows, self.draw = cfg, rows, draw
        kinds = {"q": cfg.model_dim, "k": cfg.kv_dim, "v": cfg.kv_dim, "o": cfg.model_dim, "mlp": cfg.model_dim}
        self.kinds = [kind for kind in kinds if getattr(cfg, f"ttt_{kind}_lora", True)]
        self.names = [(kind, slot) for slot in range(num_slots) for kind in self.kinds] + [("head", num_slots)]
        R, D = cfg.ttt_lora_rank, cfg.model_dim
        self.params: list[Tensor] = []
        for kind, slot in self.names:
            out = kinds.get(kind, cfg.vocab_size)
            self.params += [draw(kind, slot, (rows, R, D)), torch.zeros(rows, out, R, device=device)]
        self.exp_avg, self.exp_avg_sq = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.steps = [torch.zeros((), device=device) for _ in self.params]

    def reset(self) -> None:
        """For a new batch: B and all optimizer state to zero; A stays unless TTT_WARM_START_A=0."""
        for tensors in (self.params[1::2], self.exp_avg, self.exp_avg_sq, self.steps):
            torch._foreach_zero_(tensors)
        if not self.cfg.ttt_warm_start_a:
            for (kind, slot), A in zip(self.names, self.params[::2]):
                A.copy_(self.draw(kind, slot, tuple(A.shape)))

    def leaves(self, first: int) -> list[Tensor]:
        """The parameters of documents first, first + 1, ..., ready to be differentiated."""
        return [mark_varying(p[first:].detach().requires_grad_(), 0) for p in self.params]

    def adapters(self, leaves: Sequence[Tensor]) -> tuple[list[LayerAdapters], LowRank]:
        """The adapters of every slot and of the head, over `leaves`."""
        scale = self.cfg.ttt_lora_alpha / self.cfg.ttt_lora_rank
        made = [LowRank(A, B, scale) for A, B in zip(leaves[::2], leaves[1::2])]
        n = len(self.kinds)
        slots = [LayerAdapters(**dict(zip(self.kinds, made[at:at + n]))) for at in range(0, len(made) - 1, n)]
        return slots, made[-1]

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], first: int) -> None:
        """One AdamW step of documents first, first + 1, ... from gradients of exactly these rows."""
        from torch.optim.adamw import adamw
        cfg = self.cfg
        # The fused kernel reads gradients in the parameters' layout without asking.
        adamw([p[first:] for p in self.params], [grad.contiguous() for grad in grads], [m[first:] for m in self.exp_avg],
              [v[first:] for v in self.exp_avg_sq], [], self.steps, fused=True, amsgrad=False, maximize=False,
              beta1=cfg.ttt_beta1, beta2=cfg.ttt_beta2, lr=cfg.ttt_lora_lr, weight_decay=cfg.ttt_weight_decay, eps=1e-10)

    @torch.no_grad()
    def settle(self, missed_steps: Tensor) -> None:
        """Give each document (rows,) the weight decay of the steps the batch took after it was finished."""
        factor = (1 - self.cfg.ttt_lora_lr * self.cfg.ttt_weight_decay) ** missed_steps.double()
        for A in self.params[::2]:
            A.mul_(factor.float()[:, None, None])


class Stream(NamedTuple):
    """The validation split on the device, and what is known of each target before it is scored."""
    tokens: Tensor           # (N,) int32
    byte_counts: Tensor      # (N,) int32, by token position
    hints: Tensor            # (N - 1,) int32, by target
    boost: Tensor            # (N - 1,) fp32; 0 where no hint is used


def score_batch(cfg: Config, run: Run, model: GPT, stream: Stream, docs: Documents, batch: Batch, bank: AdapterBank,
                meter: BpbMeter, nll_by_target: Tensor | None = None) -> None:
    """Score all chunks of a batch, each before anything has learnt from it; adapters learn after every chunk.
    Documents are sorted by length, so the unfinished ones are always the last rows. nll_by_target (N - 1,) fp64
    receives every scored (tilted) nll when given."""
    C, E = cfg.ttt_chunk_size, cfg.ttt_eval_seq_len
    start, length = docs.start[list(batch.docs)], docs.length[list(batch.docs)]
    counts = num_chunks(length, C)
    within = torch.arange(C, device=run.device)
    to_device = lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(run.device, non_blocking=True)   # noqa: E731
    for index in range(int(counts.max())):
        run.beat()
        first, first_learning = (int(np.searchsorted(counts, index + k, side="right")) for k in (0, 1))
        if cfg.compile:                                   # a lone row would need graphs of its own
            first = max(0, min(first, len(counts) - 2))
        w = chunk_window(length[first:] - 1, index, C, E)
        width = min(C * (index + 1), E)
        begin, size, offset, count = to_device(np.stack([start[first:] + w.start, w.length, w.offset, w.count]))[..., None]
        position = torch.arange(width, device=run.device)
        inputs = torch.where(position < size, stream.tokens[begin + torch.minimum(position, size - 1)], 0).long()
        at = torch.minimum(offset + within, size - 1)                 # (documents, C) positions in the window
        scored = within < count
        target = begin + at                                           # target i is token i + 1
        leaves = bank.leaves(first)
        slots, head = bank.adapters(leaves)
        hidden = model(inputs, looping=True, adapters=slots)
        hidden = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
        answers, hints = stream.tokens[target + 1].long(), stream.hints[target].long()
        nll, log_q = model.score(hidden.flatten(0, 1), answers.flatten(), hints.flatten(), head(hidden).flatten(0, 1))
        nll, log_q = nll.view_as(target), log_q.view_as(target)       # 1. scored by weights that never saw the chunk
        tilted = tilt(nll.detach(), log_q.detach(), answers == hints, stream.boost[target])
        meter.add(tilted, stream.byte_counts[target + 1], scored)     # 2. banked; it is never revised
        if nll_by_target is not None:
            nll_by_target[target[scored]] = tilted[scored].double()
        if first_learning < len(batch.docs):                          # 3. only then learn from it
            learning = first_learning - first
            grads = torch.autograd.grad(nll[learning:].mean(1).sum(), leaves)
            bank.step([grad[learning:] for grad in grads], first_learning)
    bank.settle(to_device(counts.max() - counts))


def lane_draws(cfg: Config, run: Run, lane: int) -> DrawA:
    """Initial values of A, uniform(±1/sqrt(in)), from a generator of the lane's own."""
    generator = run.generator(lane)
    return lambda kind, slot, shape: torch.empty(shape, device=run.device).uniform_(
        -1 / math.sqrt(shape[-1]), 1 / math.sqrt(shape[-1]), generator=generator)


def score_phase(cfg: Config, run: Run, model: GPT, stream: Stream, docs: Documents, phase: Phase, meter: BpbMeter,
                draws: Sequence[DrawA], label: str = "", nll_by_target: Tensor | None = None) -> None:
    """Run this rank's lanes of one phase, one lane after the other."""
    slots = sum(map(len, execution_order(cfg, True)))
    mine = range(run.rank, len(phase), run.world_size)
    total, done = sum(len(phase[lane]) for lane in mine), 0
    for lane in mine:
        reusable = None
        for batch in phase[lane]:
            if batch.is_full and reusable is not None:
                bank = reusable
                bank.reset()
            else:
                bank = AdapterBank(cfg, slots, len(batch.docs), run.device, draws[lane])
                reusable = bank if batch.is_full else reusable
            score_batch(cfg, run, model, stream, docs, batch, bank, meter, nll_by_target)
            del bank
            done += 1
            if label and run.rank == 0:
                nats, _, num_bytes = meter.sums.tolist()
                lengths = docs.length[list(batch.docs)]
                run.log(f"ttt batch:{done}/{total} bpb:{nats / math.log(2) / max(num_bytes, 1):.6f} "
                        f"documents:{len(lengths)} doc_len:{lengths.min()}-{lengths.max()} lane:{lane} phase:{label}")


def adapt_base(cfg: Config, run: Run, model: GPT, tokens: np.ndarray, docs: Documents, chosen: np.ndarray) -> int:
    """Train all base weights with SGD on documents that have been scored. Returns the number of steps.
    The documents are joined in the given order and cut in chunks; the last chunk is skipped. Ranks take contiguous
    runs of whole documents of a chunk; gradients are weighted by tokens, so the split does not matter."""
    joined = np.concatenate([tokens[s:s + n] for s, n in zip(docs.start[chosen], docs.length[chosen])])
    C, S = cfg.global_ttt_chunk_tokens, cfg.ttt_eval_seq_len
    num = -(-(len(joined) - 1) // C)
    steps = [(chunk, first) for chunk in range(num - 1) for first in range(0, C // S, cfg.global_ttt_batch_seqs)]
    trained = [p for p in model.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(trained, lr=cfg.global_ttt_lr, momentum=cfg.global_ttt_momentum)
    for chunk, first in steps:
        run.beat()
        sgd.param_groups[0]["lr"] = global_sgd_lr(cfg.global_ttt_lr, num, chunk)
        at, size = chunk * C + first * S, min(cfg.global_ttt_batch_seqs, C // S - first) * S
        begin, end = rank_share(joined[at:at + size], run.rank, run.world_size)
        model.zero_grad(set_to_none=True)
        if end > begin:
            row = torch.from_numpy(joined[at + begin:at + end + 1].astype(np.int64)).to(run.device)
            bounds = torch.from_numpy(segment_bounds(joined[at + begin:at + end], S)).to(run.device)
            # Eager: a hundred short steps take less time than compiling them would.
            loss = model.loss(row[:-1], row[1:].clone(), bounds, looping=True, segment_cap=S, graphs=Graphs())
            (loss * ((end - begin) / size)).backward()
        for p, grad in zip(trained, run.sum_all([torch.zeros_like(p) if p.grad is None else p.grad for p in trained])):
            p.grad = grad
        torch.nn.utils.clip_grad_norm_(trained, cfg.global_ttt_grad_clip)
        sgd.step()
        with torch.no_grad():
            torch._foreach_clamp_min_([model.softcap_pos, model.softcap_neg], 1.0)
    model.zero_grad(set_to_none=True)
    return len(steps)


def rank_share(tokens: np.ndarray, rank: int, world_size: int) -> tuple[int, int]:
    """[begin, end) of this rank's part of a row, cut only where documents begin, in nearly equal lengths."""
    starts = np.concatenate([[0], np.flatnonzero(tokens == BOS), [len(tokens)]])
    ideal = np.arange(world_size + 1) * len(tokens) / world_size
    cuts = starts[np.abs(starts[:, None] - ideal).argmin(0)]
    cuts[0], cuts[-1] = 0, len(tokens)
    return int(cuts[rank]), int(cuts[rank + 1])


def warm_up_ttt(cfg: Config, run: Run, model: GPT) -> None:
    """Compile and run, on random tokens, the graphs that test-time training will use."""
    timer = Timer(run)
    model.sizes_vary = cfg.compile
    if cfg.compile:
        C, E = cfg.ttt_chunk_size, cfg.ttt_eval_seq_len
        lengths = np.array([2 * C + 1] * (cfg.ttt_batch_size - 1) + [E + 3 * C])
        tokens = np.random.default_rng(cfg.seed).integers(2, cfg.vocab_size, lengths.sum() + 1).astype(np.uint16)
        docs = Documents(np.cumsum(lengths) - lengths, lengths)
        slots = sum(map(len, execution_order(cfg, True)))
        stream = make_stream(run, tokens, np.ones_like(tokens), None, cfg)
        for rows in sorted({cfg.ttt_batch_size, min(2, cfg.ttt_batch_size)}, reverse=True):
            members = tuple(range(cfg.ttt_batch_size - rows, cfg.ttt_batch_size))
            score_batch(cfg, run, model, stream, docs, Batch(0, members, False),
                        AdapterBank(cfg, slots, rows, run.device, lane_draws(cfg, run, LANES)), BpbMeter(run))
    run.clocks["compile"] = seconds = timer.seconds()
    run.log(f"ttt_lora:compile warmup done ({seconds:.1f}s) elapsed_ms:{1000 * seconds:.0f}")


def make_stream(run: Run, tokens: np.ndarray, byte_counts: np.ndarray, hints: Hints | None, cfg: Config) -> Stream:
    hints = hints or closed_hints(len(tokens) - 1)
    return Stream(*(torch.from_numpy(x).to(run.device) for x in (
        tokens.astype(np.int32), byte_counts.astype(np.int32), hints.hint, hints.gate * np.float32(cfg.token_boost))))


def make_hints(cfg: Config, run: Run, tokens: np.ndarray, order: np.ndarray, docs: Documents) -> Hints | None:
    """Hints of all targets, counted in the certified order on rank 0 and sent to the others; logged."""
    if not cfg.ngram_tilt_enabled:
        return None
    timer, n = Timer(run), len(tokens) - 1
    hints = closed_hints(n)
    if run.rank == 0:
        doc_start = np.repeat(docs.start, docs.length - 1)
        doc_start = np.pad(doc_start, (0, n - len(doc_start)))        # nothing follows a lone final BOS
        hints = ngram_hints(tokens, order, doc_start, cfg.token_order - 1, cfg.token_threshold)
    if run.world_size > 1:
        hint, gate = (run.broadcast(torch.from_numpy(x).to(run.device)).cpu().numpy() for x in hints[:2])
        hints = Hints(hint, gate, hints.confidence)                   # only rank 0 knows the confidence, nobody needs it
    gated = int(hints.gate.sum())
    run.log(f"ngram_tilt:hints total={n} gated={gated} token_gate={gated} within_gate=0 word_gate=0 agree2plus=0")
    run.log(f"ngram_tilt:precompute_done elapsed={timer.seconds():.2f}s total_targets={n}")
    return hints


def evaluate_ttt(cfg: Config, run: Run, model: GPT, data: Dataset) -> Score:
    """The final score: every target once, in the certified order, with hints and adapters; reads data in its clock."""
    model.requires_grad_(False)
    warm_up_ttt(cfg, run, model)
    run.barrier()
    run.stage("scoring")
    timer = Timer(run)
    tokens, byte_counts = data.load_validation()
    docs, C = find_documents(tokens), cfg.ttt_chunk_size
    prefix = min(cfg.phased_ttt_prefix_docs, len(docs.start))
    phases = plan_batches(docs, batch_size=cfg.ttt_batch_size, prefix_docs=prefix, chunk=C, window=cfg.ttt_eval_seq_len)
    scored = certified_order(phases, docs, C)
    order = targets_in_order(scored, docs, C) if run.rank == 0 else np.empty(0, np.int64)
    hints = make_hints(cfg, run, tokens, order, docs)
    stream = make_stream(run, tokens, byte_counts, hints, cfg)
    run.log(f"ttt_phased: total_docs:{len(docs.start)} prefix_docs:{prefix} suffix_docs:{len(docs.start) - prefix} "
            f"num_phases:1 boundaries:[{prefix}]")
    if cfg.audit and run.rank == 0:
        audit_order(run, order, len(tokens) - 1)
    meter, draws = BpbMeter(run), [lane_draws(cfg, run, lane) for lane in range(LANES)]
    for number, phase in enumerate(phases):
        score_phase(cfg, run, model, stream, docs, phase, meter, draws, f"{number + 1}/{len(phases)}")
        if number == 0 and len(phases) > 1:
            run.barrier()
            phase_timer = Timer(run)
            model.requires_grad_(True)
            chosen = select_prefix(scored, docs, C, prefix)
            steps = adapt_base(cfg, run, model, tokens, docs, chosen)
            model.requires_grad_(False)
            run.log(f"ttt adapted_base documents:{len(chosen)} sgd_steps:{steps} elapsed_s:{phase_timer.seconds():.1f} "
                    f"eval_time_s:{timer.seconds():.1f}")
    score, seconds = meter.result(), timer.seconds()
    run.clocks["eval"] = seconds
    if run.device.type == "cuda":
        run.log(f"ttt peak_allocated_mib:{torch.cuda.max_memory_allocated(run.device) >> 20}")
    run.log(f"quantized_ttt_phased val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f} eval_time:{1000 * seconds:.0f}ms "
            f"targets:{score.tokens} bytes:{score.bytes}")
    run.log(f"total_eval_time:{seconds:.1f}s total_eval_ms:{1000 * seconds:.0f}")
    if score.tokens != len(tokens) - 1:
        raise RuntimeError(f"scored {score.tokens:,} of {len(tokens) - 1:,} targets; every target must count once")
    if cfg.eval_wallclock_seconds and seconds > cfg.eval_wallclock_seconds:
        run.log(f"eval warning over_budget_s:{seconds - cfg.eval_wallclock_seconds:.1f} "
                f"budget_s:{cfg.eval_wallclock_seconds:g}")
    return score


def audit_order(run: Run, order: np.ndarray, num_targets: int) -> None:
    """Check that the order holds every target exactly once and write it beside the log (int64, raw)."""
    if len(order) != num_targets or not np.array_equal(np.sort(order), np.arange(num_targets)):
        raise RuntimeError("audit: the scoring order does not hold every target exactly once")
    path, data = run.log_path.with_suffix(".order.bin"), order.astype("<i8").tobytes()
    path.write_bytes(data)
    run.log(f"audit targets:{num_targets} order_file:{path} sha256:{hashlib.sha256(data).hexdigest()}")


# --- 14 pipeline --------------------------------------------------------------------------------------------
# The run as one visible sequence.

def shown_value(name: str, value: Any) -> str:
    """A setting as logs show it: logs are published, home folders are not."""
    if name in ("data_path", "tokenizer_path", "checkpoint_dir"):
        return "/".join(Path(value).parts[-2:])
    return str(int(value) if isinstance(value, bool) else value)


def find_commit() -> str:
    """Commit id of this script with +dirty when the checkout differs from it; "none" outside a checkout."""
    try:
        for command in (["ls-files", "--error-unmatch", Path(__file__).name],
                        ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+dirty"]):
            done = subprocess.run(["git", "-C", str(REPO), *command], capture_output=True, text=True,
                                  check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def log_start(cfg: Config, run: Run, data: Dataset, tokenizer: Path, model: GPT) -> None:
    fields = sorted(dataclasses.fields(cfg), key=lambda field: field.name)
    for field in fields:
        run.log(f"  {field.name}: {shown_value(field.name, getattr(cfg, field.name))}")
    gpu = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else platform.machine()
    run.log(f"versions python:{platform.python_version()} torch:{torch.__version__} numpy:{np.__version__} "
            f"triton:{triton.__version__ if triton else 'none'} device:\"{gpu}\" world_size:{run.world_size} "
            f"compute_dtype:{str(run.compute_dtype).removeprefix('torch.')}")
    if data.manifest:
        data_source = "manifest"
    else:
        data_source = "unverified" if cfg.allow_unverified else "check_figures"
    run.log(f"run run_id:{run.run_id} date:{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d} "
            f"tokenizer:{tokenizer.name} data_source:{data_source}")
    changed = [f"{field.name.upper()}={shlex.quote(shown_value(field.name, getattr(cfg, field.name)))}"
               for field in fields if getattr(cfg, field.name) != field.default]
    run.log(f'run command:"{" ".join([*changed, "python", Path(sys.argv[0]).name])}"')
    if run.rank == 0:
        source = program_source().encode()
        path = run.log_path.with_suffix(".source.py.xz")
        save(run, path, lzma.compress(source))
        run.log(f"code commit:{find_commit()} code_sha256:{shipped_code().sha256} "
                f"source_sha256:{hashlib.sha256(source).hexdigest()} source_file:logs/{path.name}")
    run.log(f"train_shards: {len(data.train)}")
    run.log(f"val_tokens: {data.val_tokens}")
    run.log(f"model_params:{sum(p.numel() for p in model.parameters())}")


def check_ready(cfg: Config, run: Run, model: GPT) -> None:
    """Try now whatever the run needs after training: compiler, packed script, room in writable folders."""
    for source in () if cfg.prequant_only else (CODER_C, NGRAM_C):
        try:
            compile_c(source)
        except RuntimeError as error:
            raise RunError(str(error)) from error
    if run.rank != 0:
        return
    shipped_code()
    weights = 4 * sum(p.numel() for p in model.parameters())
    for setting, folder, needed in (("CHECKPOINT_DIR", Path(cfg.checkpoint_dir), weights + SIZE_LIMIT),
                                    ("the log folder", run.log_path.parent, 2 ** 20)):
        probe = folder / f".probe.{os.getpid()}"
        try:
            write_file(probe, b"probe")
            probe.unlink()
            room = shutil.disk_usage(folder).free
        except OSError as error:
            raise RunError(f"{setting}={folder}: expected a folder to write to, found: {error.strerror}; "
                           f"correct the path "
                           "or its permissions") from error
        if room < needed:
            raise RunError(f"{setting}={folder}: expected room for {needed:,} bytes, found {room:,}; free "
                           f"some, or name "
                           "another folder with CHECKPOINT_DIR")


def check_data(cfg: Config, run: Run, data: Dataset, split: str, read: bool = True) -> bool:
    """check_values on rank 0 while the others wait."""
    return run.share(data.check_values(cfg, run, split, read) if run.rank == 0 else False)


def run_pipeline(cfg: Config, run: Run) -> None:
    data = Dataset.open(cfg)
    tokenizer = check_tokenizer(cfg, data)
    run.origin = {"tokenizer": hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
                  "code": shipped_code().sha256}
    torch.manual_seed(cfg.seed)
    model = GPT(cfg, run.compute_dtype).to(run.device)
    for p in model.parameters():
        run.broadcast(p.data)                             # replicas start equal to the last bit
    check_ready(cfg, run, model)
    if run.device.type == "cuda" and not cfg.allow_slow and not (cfg.compile and triton is not None):
        raise ConfigError("a GPU run without torch.compile or Triton is several times slower; allow it by ALLOW_SLOW=1")
    if not cfg.ttt_eval_only:
        check_data(cfg, run, data, "train")
    # Until the last step only the headers of validation files are read, and what an earlier verify
    # remembered.
    trains = not (cfg.quantize_only or cfg.ttt_eval_only)
    is_val_checked = check_data(cfg, run, data, "val", read=not trains)
    log_start(cfg, run, data, tokenizer, model)
    model.attend = choose_attention(run)
    model.graphs = make_graphs(run)

    artifact_sha256 = ""
    if not cfg.ttt_eval_only:
        train_s = 0.0
        if trains:
            run.begin()
            train_s = train(cfg, run, data, model)
            sort_hidden_units(model)
            run.stage("writing the checkpoint", math.inf)
            write_checkpoint(cfg, run, model)
        else:
            read_checkpoint(cfg, run, model)
            run.begin()
        if not cfg.prequant_only:
            stats = calibrate(cfg, run, data, model, train_s if trains else None)
        if not is_val_checked:
            run.stage("checking the validation split", START_LIMIT_S)
            check_data(cfg, run, data, "val")
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
        clocks = {name: 1000 * run.clocks.get(name, 0.0) for name in ("eval", "load", "compile")}
        run.log("eval " + " ".join(f"{name}_ms:{clock:.0f}" for name, clock in clocks.items())
                + f" sum_ms:{sum(clocks.values()):.0f} limit_ms:{1000 * cfg.eval_wallclock_seconds:.0f}")


def calibrate(cfg: Config, run: Run, data: Dataset, model: GPT, train_s: float | None) -> Calibration:
    """Calibration statistics, collected on the training clock, and what that clock has come to (None: no
    training)."""
    run.stage("calibration")
    timer = Timer(run)
    stats = collect_hessians(cfg, run, model, data.train, cfg.gptq_calibration_batches)
    calibration_s = timer.seconds()
    require_finite(run, "a calibration statistic", *stats.sums.values())
    run.log(f"GPTQ:collected {1 + len(MATRIX_NAMES) * cfg.num_layers} Hessians in {calibration_s:.1f}s "
            f"elapsed_ms:{1000 * calibration_s:.0f}")
    if train_s is not None:
        clock_s, budget_s = train_s + calibration_s, cfg.max_wallclock_seconds
        run.log(f"train clock_s:{clock_s:.1f} steps_s:{train_s:.1f} calibration_s:{calibration_s:.1f} "
                f"budget_s:{budget_s:g} clock_ms:{1000 * clock_s:.0f} steps_ms:{1000 * train_s:.0f} "
                f"calibration_ms:{1000 * calibration_s:.0f}")
        if budget_s and clock_s > budget_s:
            run.log(f"train warning over_budget_ms:{1000 * (clock_s - budget_s):.0f} budget_s:{budget_s:g}")
    return stats


# === Fast paths: from here on everything is only a faster way to do something above, and names what it replaces.


# --- 15 attention kernels -----------------------------------------------------------------------------------
# Faster attend_math, chosen once and logged: attend(q, k, v, cu_seqlens, max_seqlen) computes the same.

def attend_torch_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """FlashAttention-2 as torch ships it (CUDA, fp16/bf16)."""
    return torch.ops.aten._flash_attention_forward(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
                                                   0.0, True, False)[0]


def _load_flash_attention_3() -> Attend:
    from flash_attn_interface import flash_attn_varlen_func

    def attend_fa3(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True)
        return out[0] if isinstance(out, tuple) else out
    return attend_fa3


def _load_flash_attention_4() -> Attend:
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    # Custom ops with fake implementations keep torch.compile from looking inside the kernel library.
    @torch.library.custom_op("golf::fa4_fwd", mutates_args=())
    def fa4_fwd(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
        out, lse = _flash_attn_fwd(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen,
                                   max_seqlen_k=max_seqlen, causal=True, return_lse=True)[:2]
        return out, lse

    @fa4_fwd.register_fake
    def _(q, k, v, cu_seqlens, max_seqlen):
        return torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)

    @torch.library.custom_op("golf::fa4_bwd", mutates_args=())
    def fa4_bwd(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor,
                max_seqlen: int) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = _flash_attn_bwd(q, k, v, out, dout, lse, causal=True, cu_seqlens_q=cu_seqlens,
                                     cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen)[:3]
        return dq, dk, dv

    @fa4_bwd.register_fake
    def _(dout, q, k, v, out, lse, cu_seqlens, max_seqlen):
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    def setup(ctx, inputs, output):
        *tensors, ctx.max_seqlen = inputs
        ctx.save_for_backward(*tensors, *output)

    def backward(ctx, dout, dlse):
        q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
        return *fa4_bwd(dout.contiguous(), q, k, v, out, lse, cu_seqlens, ctx.max_seqlen), None, None

    fa4_fwd.register_autograd(backward, setup_context=setup)

    def attend_fa4(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        return fa4_fwd(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens, max_seqlen)[0]
    return attend_fa4


def choose_attention(run: Run) -> Attend:
    """The fastest backend that works here, logged with the reason; a slow one on CUDA needs ALLOW_SLOW=1."""
    if run.device.type == "cpu":
        run.log('attention backend:math reason:"no GPU"')
        return attend_math
    capability = torch.cuda.get_device_capability(run.device)
    refused = []
    for name, load in (("flash_attention_3", _load_flash_attention_3), ("flash_attention_4", _load_flash_attention_4)):
        try:
            if capability < (9, 0) or (load is _load_flash_attention_3 and capability[0] != 9):
                raise ImportError(f"needs compute capability 9.0, found {capability[0]}.{capability[1]}")
            attend = load()
        except (ImportError, OSError, AttributeError, RuntimeError, TypeError) as error:      # half-matching packages
            refused.append(f"{name}: {error}")
            continue
        run.log(f'attention backend:{name} reason:"{"; ".join(refused) or "first choice"}"')
        return attend
    if not run.cfg.allow_slow:
        raise ConfigError(f"no fast attention kernel ({'; '.join(refused)}); install requirements-gpu.txt, or set "
                          "ALLOW_SLOW=1 to run with torch's FlashAttention-2")
    run.log(f'attention backend:torch_varlen reason:"{"; ".join(refused)}"')
    return attend_torch_varlen


# --- 16 Triton kernels --------------------------------------------------------------------------------------
# Each kernel names the plain torch function that defines it.

if triton is not None:
    @triton.jit
    def _softcap_ce_kernel(logits_ptr, targets_ptr, caps_ptr, nll_ptr, dcaps_ptr, vocab_size, BLOCK: tl.constexpr,
                           PARTIAL: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        cols = tl.arange(0, BLOCK)
        if PARTIAL:
            logits = tl.load(logits_ptr + row * vocab_size + cols, mask=cols < vocab_size, other=0.0).to(tl.float32)
        else:
            logits = tl.load(logits_ptr + row * vocab_size + cols).to(tl.float32)
        positive = logits > 0
        cap_pos, cap_neg = tl.load(caps_ptr), tl.load(caps_ptr + 1)
        ratio = logits * tl.where(positive, 1 / cap_pos, 1 / cap_neg)
        tanh = 1 - 2 / (tl.exp(2 * ratio) + 1)
        capped = tl.where(positive, cap_pos, cap_neg) * tanh
        if PARTIAL:
            capped = tl.where(cols < vocab_size, capped, -float("inf"))
        top = tl.max(capped, 0)
        grad = tl.exp(capped - top)
        total = tl.sum(grad, 0)
        hit = cols == tl.load(targets_ptr + row)
        tl.store(nll_ptr + row, top + tl.log(total) - tl.sum(tl.where(hit, capped, 0.0), 0))
        grad = grad * (1 / total) - tl.where(hit, 1.0, 0.0)                     # d nll / d capped
        slope = 1 - tanh * tanh                                                 # d capped / d logits
        dcap = grad * (tanh - ratio * slope)                                    # d nll / d cap; 0 outside
        tl.store(dcaps_ptr + 2 * row, tl.sum(tl.where(positive, dcap, 0.0), 0))
        tl.store(dcaps_ptr + 2 * row + 1, tl.sum(tl.where(positive, 0.0, dcap), 0))
        grad = (grad * slope).to(logits_ptr.dtype.element_ty)
        if PARTIAL:
            tl.store(logits_ptr + row * vocab_size + cols, grad, mask=cols < vocab_size)
        else:
            tl.store(logits_ptr + row * vocab_size + cols, grad)


CE_WARPS = 32       # one program holds a row of 8,192 logits in registers; tuned on H100


class FusedSoftcapLoss(torch.autograd.Function):
    """softcap_loss for CUDA: one pass over the logits gives the loss and overwrites them with its gradient."""

    @staticmethod
    def forward(ctx, hidden_ND: Tensor, tok_emb_VD: Tensor, cap_pos: Tensor, cap_neg: Tensor,
                targets_N: Tensor) -> Tensor:
        weight = tok_emb_VD.to(hidden_ND.dtype)
        logits_NV = hidden_ND @ weight.T
        N, V = logits_NV.shape
        nll_N = torch.empty(N, device=logits_NV.device)
        dcaps_N2 = torch.empty(N, 2, device=logits_NV.device)
        block = triton.next_power_of_2(V)
        _softcap_ce_kernel[(N,)](logits_NV, targets_N, torch.stack([cap_pos, cap_neg]), nll_N, dcaps_N2, V,
                                 BLOCK=block, PARTIAL=block != V, num_warps=CE_WARPS)
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


if triton is not None:
    @triton.jit
    def _trellis_kernel(x_ptr, limit_ptr, codes_ptr, took_ptr, N: tl.constexpr, STATES: tl.constexpr):
        first, limit = tl.program_id(0) * N, tl.load(limit_ptr + tl.program_id(0))
        x_ptr, codes_ptr, took_ptr = x_ptr + first, codes_ptr + first, took_ptr + first
        state = tl.arange(0, STATES)
        parity = state >> 5
        from_0 = 2 * (state ^ 33 * parity) + parity
        from_1 = 2 * (state ^ 33 * parity ^ 10) + parity
        low = parity.to(tl.float32)
        cost = tl.where(state == 0, 0.0, 1e30)
        for i in range(N):
            x = tl.load(x_ptr + i)
            at_0, at_1 = _trellis_point(x, low, limit), _trellis_point(x, low + 2, limit)
            cost_0 = tl.gather(cost, from_0, 0) + (x - at_0) * (x - at_0)
            cost_1 = tl.gather(cost, from_1, 0) + (x - at_1) * (x - at_1)
            took = cost_1 < cost_0
            cost = tl.where(took, cost_1, cost_0)
            tl.store(took_ptr + i, tl.sum(took.to(tl.int64) << state.to(tl.int64), 0))
        at = tl.argmin(cost, 0).to(tl.int64)
        tl.debug_barrier()                           # what one thread has stored all are about to read
        for i in range(N - 1, -1, -1):
            bit = tl.load(took_ptr + i) >> at & 1
            tl.store(codes_ptr + i, _trellis_point(tl.load(x_ptr + i), (2 * bit + (at >> 5)).to(tl.float32), limit))
            at = 2 * (at ^ 33 * (at >> 5) ^ 10 * bit) + (at >> 5)

    @triton.jit
    def _trellis_point(x, residue, limit):
        k = tl.floor((x - residue) * 0.25 + 0.5)
        k = tl.minimum(tl.maximum(k, tl.ceil((-limit - residue) * 0.25)), tl.floor((limit - residue) * 0.25))
        return 4 * k + residue


def trellis_round(x: Tensor, limit: Tensor) -> Tensor:
    """plain_trellis_round(x, limit); on a GPU by one kernel, a program per line."""
    if not x.is_cuda or triton is None:
        return plain_trellis_round(x, limit)
    x, codes, took = x.contiguous(), torch.empty_like(x), torch.empty(x.shape, dtype=torch.int64, device=x.device)
    _trellis_kernel[(len(x),)](x, limit, codes, took, N=x.shape[1], STATES=TRELLIS_STATES, num_warps=1)
    return codes


# --- 17 compilation -----------------------------------------------------------------------------------------
# torch.compile of the model's functions, and sizes that may vary.

def mark_varying(x: Tensor, *dims: int) -> Tensor:
    """Tell the compiler that these sizes change between calls, so that one graph serves them all."""
    for dim in dims:
        if x.shape[dim] > 1:                              # size 1 always gets a graph of its own
            torch._dynamo.maybe_mark_dynamic(x, dim)
    return x


def make_graphs(run: Run) -> Graphs:
    """Compiled functions; eager ones when COMPILE=0. Sizes are static unless marked with mark_varying.
    Blocks are compiled one by one and shared by all layers: eleven times less to compile than the whole model.
    On CPUs plain attention loops over segments in Python, so a graph may break there and only there."""
    if not run.cfg.compile:
        return Graphs()
    # Serial and parallel blocks exist with and without skip, gradient and adapters.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return Graphs(*(torch.compile(fn, fullgraph=run.device.type == "cuda") for fn in Graphs()))


# --- 18 C sources -------------------------------------------------------------------------------------------
# Coder and hints, compiled once per process.

@functools.cache
def compile_c(source: str) -> ctypes.CDLL:
    """Load C source, compiled once per process; RuntimeError with the compiler's message when that does not work."""
    with tempfile.TemporaryDirectory(prefix="train_gpt_") as folder:
        library, compiler = f"{folder}/code.so", os.environ.get("CC", "cc")
        for target in (["-march=native"], []):            # not every compiler knows its own machine
            # -fwrapv: even a forged stream must not meet undefined behaviour.
            command = [compiler, "-O3", *target, "-fwrapv", "-std=c99", "-shared", "-fPIC", "-o", library, "-xc", "-"]
            try:
                done = subprocess.run(command, input=source, capture_output=True, text=True)
            except FileNotFoundError:
                raise RuntimeError(f"no C compiler: expected `{compiler}` on the PATH; install gcc or clang") from None
            if done.returncode == 0:
                return ctypes.CDLL(library)
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")


CODER_C = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef uint8_t u8; typedef int16_t i16; typedef uint16_t u16;
typedef int32_t i32; typedef uint32_t u32; typedef int64_t i64; typedef uint64_t u64;
enum { VOTES = 4, NODES = 32, LEVELS = 128, TRELLIS_ROWS = 256 };
typedef struct {
    const i32 *squash, *stretch, *rate; const u32 *prior;  // tables of _tables()
    u64 lo, hi, code; u8 *buf; i64 pos, cap; int decode;
} Coder;
static inline int clamp(i64 x, int lo, int hi) { return x < lo ? lo : x > hi ? hi : x; }
// Arithmetic coder [lpaq] with 64-bit bounds: `p` of 65536 goes to bit 1; equal leading bytes leave at once.
static inline int code_bit(Coder *c, int bit, u32 p) {
    u64 mid = c->lo + ((c->hi - c->lo) >> 16) * p;
    if (c->decode) bit = c->code <= mid;
    if (bit) c->hi = mid; else c->lo = mid + 1;
    for (; !((c->lo ^ c->hi) >> 56); c->lo <<= 8, c->hi = c->hi << 8 | 255, c->pos++)
        if (c->decode) c->code = c->code << 8 | (c->pos < c->cap ? c->buf[c->pos] : 0);
        else if (c->pos < c->cap) c->buf[c->pos] = c->hi >> 56;
    return bit;
}
static void start(Coder *c) {
    if (c->decode) for (; c->pos < 8; c->pos++) c->code = c->code << 8 | (c->pos < c->cap ? c->buf[c->pos] : 0);
}
static i64 finish(Coder *c) {  // one byte suffices: past the end the decoder reads zeros
    if (!c->decode && c->pos < c->cap) c->buf[c->pos] = (c->lo >> 56) + 1;
    return c->pos + 1;
}
// One decision. A counter is 22 bits of probability and 10 bits of age; it moves by 1/(age + 1.5).
// Two weight sets, chosen by different contexts, are averaged; each learns from its own error.
static inline int decide(Coder *c, u32 **cell, i32 *wa, i32 *wb, int bit, u32 max_age, int speed) {
    int vote[VOTES]; i64 a = 0, b = 0;
    for (int k = 0; k < VOTES; k++) {
        vote[k] = c->stretch[*cell[k] >> 20];
        a += (i64)wa[k] * vote[k]; b += (i64)wb[k] * vote[k];
    }
    bit = code_bit(c, bit, c->squash[clamp((a + b) >> 19, -2047, 2047) + 2048]);
    i64 ea = ((bit << 16) - c->squash[clamp(a >> 18, -2047, 2047) + 2048]) * speed;
    i64 eb = ((bit << 16) - c->squash[clamp(b >> 18, -2047, 2047) + 2048]) * speed;
    for (int k = 0; k < VOTES; k++) {
        wa[k] += (vote[k] * ea + (1 << 19)) >> 20;
        wb[k] += (vote[k] * eb + (1 << 19)) >> 20;
        u32 age = *cell[k] & 1023; i32 p = *cell[k] >> 10;
        p += ((i64)((bit ? 4194303 : 0) - p) * c->rate[age]) >> 16;
        *cell[k] = (u32)p << 10 | (age + (age < max_age));
    }
    return bit;
}
static inline int level(i64 v) {  // variance in 1/256 code**2 -> step of the variance axis
    v = v < 16 ? 16 : v > 1 << 19 ? 1 << 19 : v;
    int e = 31 - __builtin_clz((u32)v);
    return (e - 4) * 8 + (v >> (e - 3) & 7);
}
static int code_number(Coder *c, int value, int bits) {
    int v = 0;
    while (bits--) v = v << 1 | code_bit(c, value >> bits & 1, 32768);
    return v;
}
static int code_share(Coder *c, int value, i32 *odds) {  // 3 bits, each with one fast counter
    int v = 1;
    for (int k = 2; k >= 0; k--) {
        int bit = code_bit(c, value >> k & 1, odds[v]);
        odds[v] += ((bit << 16) - odds[v]) >> 6;
        v = v << 1 | bit;
    }
    return v & 7;
}
// Ridge regression of every column on the columns to its left (column 0 is the constant).
typedef struct { i64 n, next; i32 *gram; i64 *L; i16 *T; } Fit;
static i64 isqrt(i64 v) {
    i64 r = 0;
    for (i64 b = 1ll << 31; b; b >>= 1) if ((r | b) * (r | b) <= v) r |= b;
    return r;
}
static void refit(Fit *f, int d) {
    i64 keep = f->n * 250 / (f->n + 1000), *L = f->L, *D = malloc(8 * d), *v = malloc(8 * d), *sd = malloc(8 * d);
    for (int i = 0; i < d; i++) sd[i] = isqrt(f->gram[(i64)i * d + i] + f->n) + 1;
    // L D L' = keep * correlations + (1 - keep) * identity, 28 fractional bits; trust grows with the rows seen
    for (int i = 0; i < d; i++) {
        i64 *Li = L + (i64)i * d, s = 0;
        for (int j = 0; j < i; j++) {
            i64 *Lj = L + (i64)j * d, c = f->gram[(i64)i * d + j] * (1ll << 24) / (sd[i] * sd[j]) * keep >> 4, dot = 0;
            for (int k = 0; k < j; k++) dot += Li[k] * Lj[k];
            Li[j] = c - (dot >> 28);
        }
        for (int j = 0; j < i; j++) { i64 l = Li[j] * (1 << 28) / D[j]; s += l * Li[j] >> 28; Li[j] = l; }
        D[i] = (1 << 28) - s; if (D[i] < 1 << 16) D[i] = 1 << 16;
        memcpy(v, Li, 8 * i);      // coefficients b of column i solve (left part of L)' b = row i of L
        for (int j = i - 1; j >= 0; j--) {
            for (int k = 0; k < j; k++) v[k] -= v[j] * L[(i64)j * d + k] >> 28;
            f->T[(i64)i * d + j] = clamp((v[j] >> 8) * sd[i] / sd[j] >> 8, -32767, 32767);
        }
    }
    free(D); free(v); free(sd);
}
// Codes x[matrices][rows][cols]; returns the bytes written, or more than cap when they do not fit.
i64 code_codes(const i32 *squash, const i32 *stretch, const i32 *rate, const u32 *prior, u8 *buf, i64 cap, int decode,
               int8_t *x, i64 matrices, i64 rows, i64 cols, i64 trellis, const i32 *alike) {
    Coder c = {squash, stretch, rate, prior, 0, ~0ull, 0, buf, 0, cap, decode};
    int d = cols + 1, n = 0, regress = alike != 0, valid = 1;
    u32 *tab = malloc(4ll * NODES * LEVELS * 40), *tabs[VOTES] = {tab};
    tabs[1] = tab + NODES * LEVELS * 2; tabs[2] = tabs[1] + NODES * LEVELS * 2; tabs[3] = tabs[2] + NODES * LEVELS * 18;
    for (int k = 0; k < VOTES; k++)
        for (int l = 0, copies = k < 2 ? 2 : 18; l < LEVELS * copies; l++)
            memcpy(tabs[k] + l * NODES, prior + l / copies * NODES, 4 * NODES);
    i32 *wa = malloc(4 * NODES * VOTES * (18 + LEVELS)), *wb = wa + 18 * NODES * VOTES;
    for (int i = 0; i < NODES * VOTES * (18 + LEVELS); i++) wa[i] = (1 << 18) / VOTES;
    u8 *state = calloc(d, 1);                                             // of the trellis, per column
    i32 *slow = malloc(8 * cols), *fast = slow + cols;                    // column variances, 18 fractional bits
    i16 *left = calloc(d, 2);
    Fit f = {0, 16, calloc(regress ? d * d : 1, 4), calloc(regress ? d * d : 1, 8), calloc(regress ? d * d : 1, 2)};
    i16 *error = calloc(regress ? matrices * rows * cols : 1, 2);         // of the regression, 1/16 code
    i32 odds[16];
    for (int i = 0; i < 16; i++) odds[i] = 32768;
    i64 energy = 0;                                                       // of a typical row
    start(&c);
    for (i64 row = 0; row < matrices * rows; row++, n++) {
        i64 mean = 6 << 18;
        if (row) { mean = 0; for (int j = 0; j < cols; j++) mean += slow[j]; mean /= cols; }
        if (row % rows == 0) {     // a new matrix: one column estimate starts from the last matrix, one afresh
            n = row ? 12 : 6;
            for (int j = 0; j < cols; j++) { fast[j] = row ? slow[j] : mean; slow[j] = mean; }
        }
        i32 rate_slow = rate[n < 1023 ? n : 1023], rate_fast = rate[n < 250 ? n : 250];
        i64 seen = mean, expected = mean, recent = mean, spent = 0;       // variances of the row so far
        i64 rest = mean * cols, budget = row ? energy : rest;             // sums over the rest of the row
        left[0] = 8;
        if (row % rows % TRELLIS_ROWS == 0) memset(state, 0, d);
        int share[2] = {0, 0}; const i16 *model[2] = {error, error};      // earlier rows that resemble this one
        for (int k = 0; regress && row && k < 2; k++) {
            if (!(share[k] = code_share(&c, alike[2 * row + k] & 7, odds + 8 * k))) break;
            int which = code_number(&c, alike[2 * row + k] >> 3, 32 - __builtin_clz((u32)row));
            model[k] += (which < row ? which : 0) * cols;
        }
        if (regress && f.n >= f.next) { refit(&f, d); f.next += f.next / 3 + 1; }
        for (int j = 0; j < cols; j++) {
            i32 mu = 0, own = 0;                                          // prediction in 1/16 code
            if (regress) {
                const i16 *T = f.T + (i64)(j + 1) * d;
                for (int k = 0; k <= j; k++) own += T[k] * left[k];
                own = (own + (128 << trellis)) >> (8 + trellis);
                mu = clamp(own + (model[0][j] * share[0] + model[1][j] * share[1] >> 3), -1023, 1023);
            }
            // Code the distance to the nearest integer m; mirrored so that the rest `part` is >= 0. With the trellis x
            // counts half codes, and its state says whether this one is a half above an integer.
            int odd = trellis & state[j], near = mu - 8 * odd, sided = 0;
            int m = (near + 8) >> 4, part = near - m * 16, flip = part < 0 ? -1 : 1;
            part *= flip;
            // This row against its columns. All rows have nearly the same energy (their step is proportional to their
            // deviation), so what is left of it tells the scale of the codes to come; predicted rows go by their past.
            i64 ratio = clamp((seen << 8) / (expected + 1), 64, 1024);
            if (!regress) {
                ratio = clamp((budget - spent) * 256 / ((rest > 0 ? rest : 0) + 1), 64, 1024) - 256;
                ratio = 256 + ratio * (cols - j) / (cols - j + (cols >> 6));   // less sure towards the end
                part = clamp(((ratio - 256) >> 5) + 4, 0, 8) + 9 * odd; sided = odd;
            }
            i64 A = slow[j] >> 10, B = (A * ratio) >> 8, F = fast[j] >> 10;
            int blend = level((B * 4 + (F * ratio >> 8) * 3 + (recent >> 10)) >> 3);
            int views[VOTES] = {level(A) * 2 + sided, level(F * ratio >> 8) * 2 + sided, blend * 18 + part,
                                level(B) * 18 + part};
            u32 *cell[VOTES];
            for (int k = 0; k < VOTES; k++) cell[k] = tabs[k] + views[k] * NODES;
            i32 *pa = wa + part * NODES * VOTES, *pb = wb + blend * NODES * VOTES;
            i64 at = row * cols + j;
            int t = decode ? 0 : ((x[at] - odd >> trellis) - m) * flip, size = t < 0 ? -t : t, found = 0, sign = 1;
            for (int node = 0; node < NODES; node++, pa += VOTES, pb += VOTES) {
                int bit = decide(&c, cell, pa, pb, node == 0 ? t == 0 : node == 1 ? t < 0 : size >= node, 1000, 2);
                for (int k = 0; k < VOTES; k++) cell[k]++;
                if (node == 1) { sign = bit ? -1 : 1; found = 1; }
                else if (bit != (node > 0)) break;
                else if (node) found = node;
            }
            if (found == NODES - 1) while (found < 255 && code_bit(&c, size > found, 32768)) found++;
            if (decode) x[at] = clamp((found * sign * flip + m) * (1 << trellis) + odd, -128, 127);
            left[j + 1] = x[at]; valid &= !trellis | (x[at] & 1) == odd;
            if (trellis) state[j] = state[j] >> 1 ^ 33 * odd ^ 10 * (x[at] >> 1 & 1);
            int value = x[at] * (16 >> trellis);
            if (regress) error[at] = clamp(value - own, -32767, 32767);
            i64 e = clamp(value - mu, -1023, 1023), var = e * e << 10;
            i32 r = rate[j + 16 < 400 ? j + 16 : 400];
            seen += (var - seen) * r >> 16; expected += (slow[j] - expected) * r >> 16;
            recent += (var - recent) >> 4; spent += var; rest -= slow[j];
            slow[j] += (var - slow[j]) * rate_slow >> 16; fast[j] += (var - fast[j]) * rate_fast >> 16;
        }
        energy += row ? (spent - energy) * rate[row < 1023 ? row : 1023] >> 16 : spent;
        if (regress) {
            f.n++;
            for (int i = 0; i < d; i++) for (int j = 0; j <= i; j++) f.gram[(i64)i * d + j] += left[i] * left[j];
        }
    }
    free(tab); free(wa); free(slow); free(left); free(error); free(f.gram); free(f.L); free(f.T); free(state);
    return valid ? finish(&c) : -1;
}
// Words x[n]: high byte, then low byte, bit by bit; views: none, the previous word, the word `stride` back.
i64 code_words(const i32 *squash, const i32 *stretch, const i32 *rate, const u32 *prior,
               u8 *buf, i64 cap, int decode, u16 *x, i64 n, i64 stride) {
    Coder c = {squash, stretch, rate, prior, 0, ~0ull, 0, buf, 0, cap, decode};
    u32 *tab = malloc(4ll * 8 << 16);
    i32 w[16 * 2 * VOTES];
    for (int i = 0; i < 8 << 16; i++) tab[i] = 1u << 31 | 2;
    for (int i = 0; i < 16 * 2 * VOTES; i++) w[i] = 105000;
    start(&c);
    for (i64 i = 0; i < n; i++) {
        int prev = i ? x[i - 1] : 0, back = i >= stride ? x[i - stride] : 0, v = decode ? 0 : x[i], high = 0;
        for (int half = 0; half < 2; half++) {
            int node = 1, view[VOTES] = {0, prev >> 8, back >> 8, prev >> 12 << 4 | back >> 12};
            if (half) {
                view[0] = 0; view[1] = high;
                view[2] = prev >> 8 == high ? 1 + (prev >> 4 & 15) : 0;
                view[3] = back >> 8 == high ? 1 + (back >> 1 & 127) : 0;
            }
            for (int k = 7; k >= 0; k--) {
                u32 *cell[VOTES]; i32 *pw = w + (half * 8 + k) * 2 * VOTES;
                for (int s = 0; s < VOTES; s++) cell[s] = tab + ((half * VOTES + s) << 16) + (view[s] << 8) + node;
                node = node << 1 | decide(&c, cell, pw, pw + VOTES, v >> (k + 8 - 8 * half) & 1, 250, 60);
            }
            high = half ? high << 8 | (node & 255) : node & 255;
        }
        x[i] = high;
    }
    free(tab);
    return finish(&c);
}
"""


NGRAM_C = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
/* A context is kept as the position that first showed it, and compared token by token: hashes only find a place. */
typedef struct { uint32_t seen_at, total, best; uint16_t top; } Entry;        /* seen_at 0: empty */
/* Counts per (context, token) exist only for contexts that were followed by more than one token. */
typedef struct { uint64_t key; uint32_t count; } Count;                       /* count 0: empty */
typedef struct { Count *slots; uint64_t mask, used; } Counts;
static uint64_t mix(uint64_t x) {
    x ^= x >> 32; x *= 0xd6e8feb86659fd93u; x ^= x >> 32; x *= 0xd6e8feb86659fd93u; return x ^ (x >> 32);
}
static uint64_t hash_context(const uint16_t *context, int length) {
    uint64_t h = 0;
    for (int i = 0; i < length; i += 4) {
        uint64_t word = 0;
        memcpy(&word, context + i, 2 * (length - i < 4 ? length - i : 4));
        h = mix(h ^ word) + 0x9e3779b97f4a7c15u;
    }
    return mix(h);
}
static uint32_t *find_count(Counts *c, uint64_t key) {
    if (2 * (c->used + 1) > c->mask + 1) {                                    /* at most half full: grow fourfold */
        Counts bigger = { calloc(4 * (c->mask + 1), sizeof(Count)), 4 * (c->mask + 1) - 1, 0 };
        if (!bigger.slots) return NULL;
        for (uint64_t i = 0; i <= c->mask; i++)
            if (c->slots[i].count) *find_count(&bigger, c->slots[i].key) = c->slots[i].count;
        free(c->slots);
        *c = bigger;
    }
    uint64_t at = mix(key) & c->mask;
    while (c->slots[at].count && c->slots[at].key != key) at = (at + 1) & c->mask;
    if (!c->slots[at].count) { c->slots[at].key = key; c->used++; }
    return &c->slots[at].count;
}
/* Returns 0, or 1 when memory ran out. */
int ngram_hints(const uint16_t *tokens, const int64_t *order, int64_t num_targets, const int64_t *doc_start,
                int context, float threshold, int32_t *hint, uint8_t *gate, float *confidence) {
    enum { AHEAD = 16 };                                                      /* hides the latency of table look-ups */
    uint64_t capacity = 1024, hashes[2 * AHEAD];
    while (3 * capacity < 4 * (uint64_t)num_targets) capacity *= 2;
    Entry *table = calloc(capacity, sizeof(Entry));
    Counts counts = { calloc(1024, sizeof(Count)), 1023, 0 };
    int failed = !table || !counts.slots;
    for (int64_t k = -AHEAD; k < num_targets && !failed; k++) {
        int64_t ahead = k + AHEAD < num_targets ? order[k + AHEAD] : -1;
        if (ahead >= 0 && ahead + 1 - context >= doc_start[ahead]) {
            uint64_t h = hash_context(tokens + ahead + 1 - context, context) & (capacity - 1);
            hashes[(k + AHEAD) % (2 * AHEAD)] = h;
            __builtin_prefetch(&table[h]);
        }
        if (k < 0) continue;
        int64_t i = order[k], begin = i + 1 - context;
        if (begin < doc_start[i]) continue;
        uint64_t at = hashes[k % (2 * AHEAD)];
        while (table[at].seen_at && memcmp(tokens + table[at].seen_at - context, tokens + begin, 2 * context))
            at = (at + 1) & (capacity - 1);
        Entry *e = &table[at];
        uint16_t y = tokens[i + 1];
        if (!e->seen_at) {
            *e = (Entry){ (uint32_t)(i + 1), 1, 1, y };
            continue;
        }
        confidence[i] = (float)e->best / (float)e->total;
        if (confidence[i] >= threshold) { hint[i] = e->top; gate[i] = 1; }
        if (e->total == e->best && y == e->top) { e->total++; e->best++; continue; }
        if (e->total == e->best) {                                            /* the first deviating token */
            uint32_t *c = find_count(&counts, at << 16 | e->top);
            if (!c) { failed = 1; break; }
            *c = e->best;
        }
        uint32_t *c = find_count(&counts, at << 16 | y);
        if (!c) { failed = 1; break; }
        e->total++;
        if (++*c > e->best) { e->top = y; e->best = *c; }
    }
    free(table);
    free(counts.slots);
    return failed;
}
"""


# --- 19 main ------------------------------------------------------------------------------------------------
# Exit codes: 0 success, 1 a check or the run failed, 2 bad settings or usage, 130 and 143 after SIGINT and
# SIGTERM.

def main(argv: Sequence[str]) -> int:
    if argv:
        is_help = list(argv) in (["--help"], ["-h"])
        print(f"{__doc__}\nSettings (environment variables):\n\n{settings_table()}" if is_help else
              f"unexpected arguments {list(argv)}; settings are environment variables, see --help",
              file=sys.stdout if is_help else sys.stderr)
        return 0 if is_help else 2
    run = None

    def tell(sentence: str) -> bool:
        if run is not None:
            return run.report(sentence)
        if is_first := os.environ.get("RANK", "0") == "0":        # settings are wrong on all ranks alike
            print(sentence, file=sys.stderr, flush=True)
        return is_first

    def interrupted(number: int) -> int:
        tell(f"interrupted by {signal.Signals(number).name} in stage {run.stage_name if run else 'start'}")
        return 128 + number

    try:
        with catch_signals(lambda number: os._exit(interrupted(number))):
            cfg = Config.from_env(os.environ)
            run = Run.start(cfg)
            with run:
                run_pipeline(cfg, run)
    except (ConfigError, DataError, ArtifactError, RunError) as error:
        tell(f"error: {error}")
        return 2 if isinstance(error, ConfigError) else 1
    except Interrupted as error:
        return interrupted(error.args[0])
    except Exception as error:
        if tell(f"error: unexpected {type(error).__name__} in stage {run.stage_name if run else 'start'}"):
            raise
        # what follows another rank's error is no news
        return 1
    return 0


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    if exit_code and "RANK" in os.environ:
        # a communicator that lost a rank may never finish its clean-up
        os._exit(exit_code)
    sys.exit(exit_code)
