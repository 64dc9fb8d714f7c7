"""Streams of documents with chosen lengths, and a complete data folder that a run can learn from."""
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

import train_gpt as gpt
from helpers import TINY, write_manifest, write_shard

VAL_LENGTHS = (9, 2, 17, 31, 2, 70, 12, 25, 40, 5, 8, 2, 16)


def random_stream(rng: np.random.Generator, lengths: Sequence[int], vocab_size: int = 64) -> np.ndarray:
    """Documents of the given lengths (BOS included, the next BOS not), uint16; their other tokens are 8 or more."""
    return np.concatenate([np.append(gpt.BOS, rng.integers(8, vocab_size, n - 1)) for n in lengths]).astype(np.uint16)


def random_byte_counts(rng: np.random.Generator, tokens: np.ndarray) -> np.ndarray:
    return np.where(tokens == gpt.BOS, 0, rng.integers(1, 6, len(tokens))).astype(np.uint16)


def change_tokens(tokens: np.ndarray, where: np.ndarray | slice, vocab_size: int = 64) -> np.ndarray:
    """A copy with every token there replaced by another one, except BOS: documents stay as they are."""
    changed = tokens.copy()
    old = changed[where].astype(np.int64)
    changed[where] = np.where(old == gpt.BOS, old, 8 + (old - 8 + 17) % (vocab_size - 8))
    return changed


def environment(**changes: Any) -> dict[str, str]:
    """The settings of tiny_config as environment variables."""
    return {name.upper(): str(int(value) if isinstance(value, bool) else value)
            for name, value in {**TINY, **changes}.items()}


def write_run_data(folder: Path, vocab_size: int = 64, val_lengths: Sequence[int] = VAL_LENGTHS, seed: int = 0) -> Path:
    """Training and validation shards, byte sidecar, tokenizer and manifest.

    Documents repeat a few short cycles, so that there is something to learn and hints open.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    cycles = [np.tile(rng.integers(8, vocab_size, 5), 20) for _ in range(4)]

    def documents(lengths: Sequence[int]) -> np.ndarray:
        return np.concatenate([np.append(gpt.BOS, cycles[rng.integers(4)][:n - 1]) for n in lengths])

    files = {f"fineweb_train_{k:06d}.bin": documents(rng.integers(2, 90, 120)) for k in range(2)}
    files["fineweb_val_000000.bin"] = val = documents(val_lengths)
    files["fineweb_val_bytes_000000.bin"] = random_byte_counts(rng, val)
    for name, values in files.items():
        write_shard(folder / name, values)
    model = io.BytesIO()
    words = ("".join(rng.choice(list("abcdefghijkl"), 4)) for _ in range(400))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words, model_writer=model, model_type="bpe", vocab_size=vocab_size, pad_id=0,
        bos_id=gpt.BOS, eos_id=2, unk_id=3, user_defined_symbols=[chr(0xE001 + k) for k in range(4)], minloglevel=2)
    (folder / "toy.model").write_bytes(model.getvalue())
    write_manifest(folder, {name: len(values) for name, values in files.items()}, folder / "toy.model", vocab_size)
    return folder
