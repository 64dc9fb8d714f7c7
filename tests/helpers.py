"""Plain functions shared by the tests and by the worker of the two-process tests."""
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train_gpt as gpt

# The record run as the project's specification states it, written down a second time on purpose.
RECORD_SETTINGS = {
    "SEED": "42", "ITERATIONS": "20000", "MAX_WALLCLOCK_SECONDS": "600", "GPTQ_RESERVE_SECONDS": "4",
    "TRAIN_BATCH_TOKENS": "786432", "TRAIN_SEQ_LEN": "2048", "WARMUP_STEPS": "20", "WARMDOWN_FRAC": "0.75",
    "MIN_LR": "0.1", "ENABLE_LOOPING_AT": "0.35", "NUM_LOOPS": "2", "LOOP_START": "3", "LOOP_END": "5",
    "PARALLEL_START_LAYER": "8", "VOCAB_SIZE": "8192", "NUM_LAYERS": "11", "MODEL_DIM": "512", "NUM_HEADS": "8",
    "NUM_KV_HEADS": "4", "MLP_MULT": "4.0", "GATE_WINDOW": "12", "SPARSE_ATTN_GATE_SCALE": "1.0",
    "QK_GAIN_INIT": "5.25", "ROPE_BASE": "10000", "ROPE_DIMS": "16", "LOGIT_SOFTCAP": "30",
    "TIED_EMBED_INIT_STD": "0.005", "FUSED_CE_ENABLED": "1", "TIED_EMBED_LR": "0.03", "EMBED_WD": "0.085",
    "SCALAR_LR": "0.02", "ADAM_WD": "0.02", "BETA1": "0.9", "BETA2": "0.95", "ADAM_EPS": "1e-8",
    "MATRIX_LR": "0.028", "MUON_WD": "0.095", "MUON_MOMENTUM": "0.97", "MUON_MOMENTUM_WARMUP_START": "0.92",
    "MUON_MOMENTUM_WARMUP_STEPS": "1500", "MUON_BACKEND_STEPS": "5", "MUON_ROW_NORMALIZE": "1",
    "GRAD_CLIP_NORM": "0.3", "EMA_DECAY": "0.9965", "VAL_BATCH_TOKENS": "524288", "EVAL_SEQ_LEN": "2560",
    "TTT_EVAL_SEQ_LEN": "2560", "MATRIX_BITS": "6", "EMBED_BITS": "7", "GPTQ_CALIBRATION_BATCHES": "16",
    "ATTN_CLIP_SIGMAS": "13.0", "MLP_CLIP_SIGMAS": "11.5", "EMBED_CLIP_SIGMAS": "14.0", "COMPRESSOR": "pergroup",
    "AWQ_LITE_ENABLED": "1", "AWQ_LITE_BITS": "8", "AWQ_LITE_GROUP_TOP_K": "1", "AWQ_LITE_GROUP_SIZE": "64",
    "LQER_ENABLED": "1", "LQER_ASYM_ENABLED": "1", "LQER_RANK": "2", "LQER_ASYM_GROUP": "32", "LQER_TOP_K": "4",
    "TTT_ENABLED": "1", "TTT_LORA_RANK": "80", "TTT_LORA_ALPHA": "144", "TTT_WARM_START_A": "1",
    "TTT_LORA_LR": "1e-4", "TTT_BETA2": "0.999", "TTT_WEIGHT_DECAY": "2.0", "TTT_CHUNK_SIZE": "48",
    "TTT_BATCH_SIZE": "64", "TTT_K_LORA": "1", "TTT_O_LORA": "1", "TTT_MLP_LORA": "1",
    "PHASED_TTT_PREFIX_DOCS": "1000", "GLOBAL_TTT_LR": "0.001", "GLOBAL_TTT_MOMENTUM": "0.9",
    "GLOBAL_TTT_CHUNK_TOKENS": "32768", "GLOBAL_TTT_BATCH_SEQS": "32", "GLOBAL_TTT_GRAD_CLIP": "1.0",
    "NGRAM_TILT_ENABLED": "1", "TOKEN_ORDER": "16", "TOKEN_THRESHOLD": "0.8", "TOKEN_BOOST": "2.625"}

# Settings of the record run that have one possible value here.
RECORD_FIXED_SETTINGS = {
    "PARALLEL_FINAL_LANE": "mean", "XSA_LAST_N": "11", "GATED_XSA": "1", "SMEAR_GATE_ENABLED": "1",
    "SPARSE_ATTN_GATE_ENABLED": "1", "SPARSE_ATTN_GATE_INIT_STD": "0", "SKIP_GATES_ENABLED": "1", "LN_SCALE": "1",
    "ROPE_YARN": "0", "TIE_EMBEDDINGS": "1", "CASEOPS_ENABLED": "1", "LQER_SCOPE": "all", "LQER_GAIN_SELECT": "0",
    "TTT_OPTIMIZER": "adam", "TTT_BETA1": "0", "TTT_GRAD_STEPS": "1", "PHASED_TTT_NUM_PHASES": "1", "GLOBAL_TTT_EPOCHS": "1",
    "GLOBAL_TTT_RESPECT_DOC_BOUNDARIES": "1", "GLOBAL_TTT_WARMUP_CHUNKS": "0", "NGRAM_HINT_PRECOMPUTE_OUTSIDE": "0",
    "ASYM_LOGIT_RESCALE": "1", "MATRIX_CLIP_SIGMAS": "12.85", "LQER_FACTOR_BITS": "4", "TEMPERATURE_SCALE": "1",
    "VAL_DOC_FRACTION": "1", "WITHIN_BOOST": "0", "WORD_BOOST": "0", "AGREE_ADD_BOOST": "0", "SKYLIGHT_MUON": "0",
    "ATTN_OUT_GATE_ENABLED": "0", "GATED_ATTN_ENABLED": "0", "GATED_ATTN_QUANT_GATE": "0", "TTT_EVAL_BATCHES": "0",
    "FORCE_STOP_STEP": "0"}

# A model with every part of the real one, small enough for a laptop: two looped layers, one two-lane layer.
TINY = dict(vocab_size=64, num_layers=5, model_dim=32, num_heads=4, num_kv_heads=2, mlp_mult=2.0, num_loops=2,
            loop_start=1, loop_end=2, parallel_start_layer=4, gate_window=12, rope_dims=4,
            iterations=4, max_wallclock_seconds=0.0, train_batch_tokens=8 * 96, train_seq_len=32, warmup_steps=0,
            tied_embed_init_std=0.1, val_batch_tokens=8 * 64, eval_seq_len=32, gptq_calibration_batches=3,
            ttt_eval_seq_len=32, ttt_chunk_size=8, ttt_batch_size=4, ttt_lora_rank=4, phased_ttt_prefix_docs=4,
            global_ttt_chunk_tokens=64, token_order=6, compile=False, allow_unverified=True)


def tiny_config(**changes: Any) -> gpt.Config:
    return gpt.Config(**{**TINY, **changes})


def archive_config(weights: Mapping[str, np.ndarray], forward: Mapping[str, np.ndarray], longest_row: int = 0,
                   **changes: Any) -> gpt.Config:
    """The configuration of the reduced model, every size from the archives; rows may have longest_row tokens."""
    sequences = -(-max(longest_row, len(forward["tokens_in"])) // TINY["train_seq_len"])
    vocab_size, model_dim = weights["tok_emb"].shape
    sizes = dict(
        vocab_size=vocab_size, model_dim=model_dim, num_layers=len(weights["wq"]), num_heads=int(forward["n_heads"]),
        num_kv_heads=int(forward["n_kv_heads"]), mlp_mult=weights["w_up"].shape[1] / model_dim,
        rope_dims=int(forward["rope_dims"]), gate_window=int(forward["gate_window"]), num_loops=int(forward["n_loops"]),
        loop_start=int(forward["loop_start"]), loop_end=int(forward["loop_end"]),
        parallel_start_layer=int(forward["parallel_start"]),
        train_batch_tokens=gpt.ROWS_PER_STEP * sequences * TINY["train_seq_len"])
    return tiny_config(**{**sizes, **changes})


# Parameters that the archives do not know and that start as the identity. Name a new one here.
ADDED_PARAMETERS: frozenset[str] = frozenset()


def archive_model(weights: Mapping[str, np.ndarray], cfg: gpt.Config, dtype: torch.dtype = torch.float32,
                  added: frozenset[str] = ADDED_PARAMETERS) -> gpt.GPT:
    """A model with every tensor of the archive. `added` parameters keep their initial value and are frozen, so that
    norms and steps are those of the archive; any other name that only one side has is an error."""
    model = gpt.GPT(cfg, dtype)
    named = dict(model.named_parameters())
    assert named.keys() - weights.keys() == added, "parameters that are not in the archive: see ADDED_PARAMETERS"
    assert weights.keys() <= named.keys(), "the archive has tensors that the model does not know"
    with torch.no_grad():
        for name, p in named.items():
            if name in added:
                p.requires_grad_(False)
            else:
                assert p.shape == weights[name].shape, name
                p.copy_(torch.from_numpy(np.array(weights[name])))
    return model


def training_row(inputs: torch.Tensor, targets: torch.Tensor, cu_seqlens: torch.Tensor) -> gpt.Row:
    """A row that comes from no shard."""
    return gpt.Row(inputs, targets, cu_seqlens)


def random_model(cfg: gpt.Config, seed: int = 0, **kwargs: Any) -> gpt.GPT:
    """A model whose gates, scales and zero-initialized matrices all have an effect."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = gpt.GPT(cfg, **kwargs)
        for name, p in model.named_parameters():
            if name in gpt.PARAMETER_TABLE["muon"]:
                p.copy_(torch.randn(p.shape) / p.shape[-1] ** 0.5)
            elif "softcap" not in name:
                p.add_(0.3 * torch.randn(p.shape))
        model.q_gain.clamp_(0.5, 2.0)
        model.softcap_pos.fill_(20.0)
        model.softcap_neg.fill_(12.0)
    return model


def freeze_caps(model: gpt.GPT, cap: float) -> None:
    """The reference's training loss: one symmetric cap that nothing trains."""
    with torch.no_grad():
        for p in (model.softcap_pos, model.softcap_neg):
            p.fill_(cap)
            p.requires_grad_(False)


def logits_of(model: gpt.GPT, hidden: torch.Tensor) -> torch.Tensor:
    """Capped fp32 logits, written out from the definition."""
    raw = (hidden @ model.tok_emb.to(hidden.dtype).T).float()
    cap = torch.where(raw > 0, model.softcap_pos, model.softcap_neg)
    return cap * torch.tanh(raw / cap)


def write_shard(path: Path, values: np.ndarray) -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(values)
    path.write_bytes(header.tobytes() + np.asarray(values).astype("<u2").tobytes())
    return path


def random_documents(rng: np.random.Generator, num_tokens: int, vocab_size: int = 64, mean: int = 40) -> np.ndarray:
    """A stream of exactly num_tokens tokens made of whole documents, each beginning with BOS."""
    tokens = rng.integers(2, vocab_size, num_tokens)
    tokens[rng.random(num_tokens) < 1 / mean] = gpt.BOS
    tokens[0] = gpt.BOS
    return tokens.astype(np.uint16)


def write_dataset(folder: Path, train: tuple[int, ...] = (2000, 1500), val: tuple[int, ...] = (300, 250),
                  vocab_size: int = 64, seed: int = 0, tokenizer: Path | None = None) -> Path:
    """A data folder with shards, byte sidecar and, when a tokenizer is given, a manifest."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for series, sizes in (("train", train), ("val", val)):
        for index, size in enumerate(sizes):
            tokens = random_documents(rng, size, vocab_size)
            counts[write_shard(folder / f"fineweb_{series}_{index:06d}.bin", tokens).name] = size
            if series == "val":
                values = np.where(tokens == gpt.BOS, 0, rng.integers(1, 9, size))
                counts[write_shard(folder / f"fineweb_val_bytes_{index:06d}.bin", values).name] = size
    if tokenizer is not None:
        write_manifest(folder, counts, tokenizer, vocab_size)
    return folder


def write_manifest(folder: Path, counts: Mapping[str, int], tokenizer: Path, vocab_size: int) -> None:
    """manifest.json of the shards in `folder`, as prepare_caseops_data.py would write it."""
    def sha256(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    sidecars = [np.fromfile(folder / name, "<u2", offset=1024) for name in counts if "val_bytes" in name]
    manifest = {"files": {name: {"values": count, "sha256": sha256(folder / name)}
                          for name, count in counts.items()},
                "val": {"tokens": sum(map(len, sidecars)),
                        "sidecar_bytes": sum(int(v.sum()) for v in sidecars)},
                "tokenizer": {"file": tokenizer.name, "sha256": sha256(tokenizer), "vocab_size": vocab_size,
                              "bos_id": 1, "operator_ids": [4, 5, 6, 7]}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def stated_settings(text: str) -> dict[str, list[str]]:
    """Every NAME=value, NAME=${NAME:-value} and NAME="value" of a shell script outside comments, in order."""
    found: dict[str, list[str]] = {}
    pattern = r"""(?<![\w$"{-])([A-Z][A-Z0-9_]+)=(?:"?\$\{\1:-([^}]*)\}"?|"([^"$]*)"|'([^']*)'|([^\s"'$();|&\\]+))"""
    for line in text.splitlines():
        for match in re.finditer(pattern, re.sub(r"(^|\s)#.*", "", line)):
            found.setdefault(match[1], []).append(next(v for v in match.groups()[1:] if v is not None))
    return found
