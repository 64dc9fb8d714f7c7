"""Turn documents into the token shards, byte sidecar and manifest that train_gpt.py reads.

    python prepare_caseops_data.py --docs docs.jsonl --out DIR                    # build shards
    python prepare_caseops_data.py --docs docs.jsonl --train-tokenizer 8192 --sp my.model
    python prepare_caseops_data.py verify DIR                                     # say what is wrong
    python prepare_caseops_data.py download                                       # fetch the published ones
    python prepare_caseops_data.py fuse DIR OUT --merges 40                       # join frequent token pairs
    python prepare_caseops_data.py unfuse OUT DIR                                 # and take them apart again

Documents are JSON Lines with a string field `text` (plain, .gz, .xz or .zst). The first --val-docs documents
are the validation split and never enter the training shards. The output does not depend on --workers.

Contents: documents · encoding batches · shards · build · training a tokenizer · verify · download ·
fuse · command line
"""

import argparse
import contextlib
import dataclasses
import errno
import functools
import gzip
import hashlib
import io
import json
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

import lossless_caps
from caseops_encoder import (
    BOS_ID,
    CHARSMAP,
    MAX_SENTENCE_LENGTH,
    NORMALIZER_NAME,
    NORMALIZER_SPEC,
    OFFICIAL_CHARSMAP_SHA256,
    OPERATOR_IDS,
    TRAINER_SPEC,
    CompileError,
    DocumentEncoder,
    ModelFile,
    PrepareError,
    Tokenizer,
    UsageError,
    compile_encoder,
    proto_bytes_field,
    proto_fields,
)
from caseops_merges import (
    MERGES_NAME,
    Joiner,
    Merge,
    Merges,
    byte_exceptions,
    free_ids,
    join_bytes,
    learn,
    split_bytes,
    split_tokens,
)

SHARD_MAGIC, SHARD_VERSION = 20240520, 1
HEADER_BYTES = 1024
DEFAULT_SHARD_TOKENS = 10**8
DEFAULT_VAL_DOCS = 50_000
SHIPPED_TOKENIZER = Path(__file__).resolve().parent / "tokenizers" / "caseops_8192.model"
MANIFEST_NAME = "manifest.json"
STAGING_NAME = ".partial"
SHARD_NAME = re.compile(r"fineweb_(train|val|val_bytes)_(\d{6})\.bin")
FREE_SOURCES = ("wikipedia", "podcasts", "digitalgov", "novels", "speeches", "c4", "fineweb", "fineweb_edu")


# -----------------------------------------------------------------------------
# Documents: JSON Lines in, batches of raw lines out, numbered over the whole file

_BATCH_BYTES = 1 << 19
_READ_BYTES = 1 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")


class DocumentFile:
    """A JSON Lines file, decompressed by its suffix and hashed as stored while it is read."""

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            self._raw = _HashingReader(self.path)
        except OSError as error:
            raise UsageError(f"{path}: expected a readable document file, found: {error.strerror}; "
                             "check the path") from None
        self.size = self.path.stat().st_size
        suffix = self.path.suffix
        if suffix == ".gz":
            stream = gzip.GzipFile(fileobj=self._raw)
        elif suffix == ".xz":
            stream = lzma.LZMAFile(self._raw)  # noqa: SIM115
        elif suffix == ".zst":
            stream = _ZstdReader(self._raw)
        else:
            stream = self._raw
        self._stream = io.BufferedReader(stream, _READ_BYTES)

    def identity(self) -> list:
        """Return what tells this file from another, or from a later version of itself, without reading it."""
        facts = self.path.stat()
        return [str(self.path.resolve()), facts.st_size, facts.st_mtime_ns]

    @property
    def position(self) -> int:
        """Stored (compressed) bytes read so far."""
        return self._raw.count

    def lines(self) -> Iterator[bytes]:
        """Yield the lines, blank ones included."""
        number = 0
        try:
            for number, line in enumerate(self._stream, start=1):
                yield line
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, _ZstdReader.Damaged) as error:
            raise PrepareError(f"{self.path}: expected complete {self.path.suffix} data, found damage or an "
                               f"early end after line {number:,} ({error}); fetch the file again") from None

    def finish(self) -> str:
        """Read what is left and return the SHA-256 of the stored file."""
        while self._raw.read(_READ_BYTES):
            pass
        return self._raw.sha256.hexdigest()

    def close(self) -> None:
        self._raw.close()


class _HashingReader(io.RawIOBase):
    def __init__(self, path: Path):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self.sha256 = hashlib.sha256()
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._file.readinto(buffer)
        self.sha256.update(memoryview(buffer)[:count])
        self.count += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _ZstdReader(io.RawIOBase):
    """Decompress concatenated zstd frames, refusing a truncated one (the library's reader just ends)."""

    class Damaged(Exception):
        pass

    def __init__(self, raw: io.RawIOBase):
        try:
            import zstandard
        except ImportError:
            raise PrepareError("reading .zst needs the package zstandard, which is not installed; "
                               "run `pip install zstandard`") from None
        self._raw = raw
        self._zstandard = zstandard
        self._frame = None
        self._compressed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            data = self._compressed or self._raw.read(_READ_BYTES)
            if not data:
                if self._frame is not None:
                    raise self.Damaged("the last frame is cut short")
                return 0
            if self._frame is None:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(data)
            except self._zstandard.ZstdError as error:
                raise self.Damaged(str(error)) from None
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


@dataclasses.dataclass
class Batch:
    """Consecutive lines of one split; `first_document` counts non-blank lines of the file from 0."""
    path: str
    split: str
    first_line: int
    first_document: int
    lines: list[bytes]
    num_documents: int = 0


def batches(source: DocumentFile, split_of: "SplitRule") -> Iterator[Batch]:
    """Group the lines of `source` into batches of about half a megabyte that never straddle a split."""
    batch, batch_bytes, documents = None, 0, 0
    for number, line in enumerate(source.lines(), start=1):
        is_document = not line.isspace()
        split = split_of(documents)
        if split is None:
            break
        if batch and (batch_bytes >= _BATCH_BYTES or is_document and split != batch.split):
            yield batch
            batch = None
        if not batch:
            batch, batch_bytes = Batch(str(source.path), split, number, documents, []), 0
        batch.lines.append(line)
        batch_bytes += len(line)
        batch.num_documents += is_document
        documents += is_document
    if batch and batch.num_documents:
        yield batch


@dataclasses.dataclass(frozen=True)
class SplitRule:
    """Which split a document is in: first `val_docs` validation, then `train_docs` (None: all) training."""
    val_docs: int
    train_docs: int | None

    def __call__(self, document: int) -> str | None:
        if document < self.val_docs:
            return "val"
        return "train" if self.train_docs is None or document < self.val_docs + self.train_docs else None


def parse_documents(batch: Batch) -> Iterator[tuple[int, str, int, dict]]:
    """Yield (document index, text without lone surrogates, number replaced, record) for each non-blank line.

    Raises PrepareError with file, line and document number for malformed JSON and a missing or odd `text`.
    """
    document = batch.first_document
    for number, line in enumerate(batch.lines, start=batch.first_line):
        if line.isspace():
            continue
        where = f"{batch.path} line {number:,} (document {document:,})"
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            raise PrepareError(f"{where}: expected UTF-8, found {error.reason} at byte {error.start} of the "
                               "line; fix or remove the line") from None
        except ValueError as error:
            raise PrepareError(f"{where}: expected one JSON object, found malformed JSON ({error}); "
                               "fix or remove the line") from None
        except RecursionError:
            raise PrepareError(f"{where}: expected one JSON object with a string `text`, found JSON nested "
                               "too deeply; fix or remove the line") from None
        if isinstance(record, str):
            record = {"text": record}
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            found = f"a JSON {type(record).__name__}"
            if isinstance(record, dict):
                kind = f"`text` of type {type(text).__name__}"
                found = kind if "text" in record else f"keys {sorted(record)[:8]}"
            raise PrepareError(f"{where}: expected an object with a string field `text`, found {found}; "
                               "fix or remove the line")
        replaced = 0
        if not text.isascii():
            text, replaced = _SURROGATE.subn("\ufffd", text)
        yield document, text, replaced, record
        document += 1


# -----------------------------------------------------------------------------
# Encoding batches, in this process or in workers

@dataclasses.dataclass
class EncodedBatch:
    """What a worker returns: raw arrays and sums, so that little crosses the process border."""
    num_documents: int
    tokens: np.ndarray                    # uint16, every document with its BOS
    lengths: np.ndarray                   # int64, tokens of each document
    sidecar: np.ndarray                   # uint16 like tokens, empty for training documents
    replaced: np.ndarray                  # int64, lone surrogates replaced in each document
    text_bytes: int
    edge_bytes: int


def encode_batch(encoder: DocumentEncoder, batch: Batch, edge_bytes: str) -> EncodedBatch:
    """Encode the documents of one batch; sidecar values only for validation."""
    tokens, sidecar, replaced_of_document = [], [], []
    text_bytes = edge_total = 0
    for document, text, replaced, _ in parse_documents(batch):
        replaced_of_document.append(replaced)
        text_bytes += len(text) if text.isascii() else len(text.encode("utf-8"))
        if batch.split == "train":
            tokens.append(encoder.encode_ids(text))
            continue
        ids, values, lead, trail = encoder.encode(text)
        edge_total += lead + trail
        if edge_bytes == "attach" and len(ids) > 1:
            values[1] += lead
            values[-1] += trail
        if values.max() > 0xFFFF:
            at = int(values.argmax())
            raise PrepareError(
                f"{batch.path} document {document:,}: expected at most 65,535 original bytes per token, "
                f"found {int(values[at]):,} for token {at:,} (a very long run of white space?); shorten it "
                "in the source")
        tokens.append(ids)
        sidecar.append(values.astype(np.uint16))
    return EncodedBatch(len(tokens), _joined(tokens), np.array([len(ids) for ids in tokens], np.int64),
                        _joined(sidecar), np.array(replaced_of_document, np.int64), text_bytes, edge_total)


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.uint16)


_worker_encoder: DocumentEncoder | None = None


def _start_worker(model: ModelFile, library: Path | str) -> None:
    global _worker_encoder
    _follow_parent()
    _worker_encoder = DocumentEncoder(Tokenizer(model), library)


def _follow_parent() -> None:
    # The parent decides when to stop; a second traceback from every worker would bury its message.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A worker holds both ends of the queue of batches, so it would wait for a killed parent for ever.
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(batch: Batch, edge_bytes: str) -> EncodedBatch:
    return encode_batch(_worker_encoder, batch, edge_bytes)


def encode_batches(todo: Iterable[Batch], model: ModelFile, edge_bytes: str,
                   workers: int) -> Iterator[EncodedBatch]:
    """Yield the encoded form of each batch in order, whatever the number of processes."""
    reason, library = model.slow_reason, ""
    if not reason:
        try:
            library = compile_encoder()
        except CompileError as error:
            reason = str(error)
    if reason:
        print(f'encoder:library reason:"{reason}" (same output, several times slower)', file=sys.stderr)
    if workers == 1:
        encoder = DocumentEncoder(Tokenizer(model), library)
        for batch in todo:
            yield encode_batch(encoder, batch, edge_bytes)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (model, library))
    window = deque()
    try:
        for batch in todo:
            window.append(pool.submit(_work, batch, edge_bytes))
            # A bounded window keeps memory independent of the input size when the writer is the slow part.
            if len(window) >= 3 * workers:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    except BrokenProcessPool:
        raise PrepareError(f"expected {workers} worker processes to live, found one dead (out of memory?); "
                           "run again with fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# -----------------------------------------------------------------------------
# Shards: one continuous stream of uint16 values cut into files of equal length

class ShardWriter:
    """Write `PREFIX_%06d.bin` files of at most `shard_tokens` values; `files` has lengths and hashes."""

    def __init__(self, folder: Path, prefix: str, shard_tokens: int):
        self._folder, self._prefix, self._shard_tokens = folder, prefix, shard_tokens
        self._file = None
        self._values = 0                  # in the open file
        self.total = 0
        self.files: dict[str, dict] = {}

    def append(self, values: np.ndarray) -> None:
        """Append uint16 values, beginning new files as often as needed."""
        self.total += len(values)
        while len(values):
            if self._file is None:
                self._open()
            part, values = np.split(values, [self._shard_tokens - self._values])
            data = part.astype("<u2").tobytes()
            self._file.write(data)
            self._sha256.update(data)
            self._values += len(part)
            if self._values == self._shard_tokens:
                self._close()

    def finish(self) -> None:
        """Complete the last file; an empty one is never written."""
        if self._file is not None:
            self._close()

    def abandon(self) -> None:
        """Let go of the open file without completing it."""
        if self._file is not None:
            # Closing writes what is buffered, which fails again on a full disk.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _open(self) -> None:
        self._path = self._folder / f"{self._prefix}_{len(self.files):06d}.bin"
        self._file = open(self._path, "w+b")  # noqa: SIM115
        # Nearly every shard is full, so its header, and with it the running hash, is known beforehand.
        header = shard_header(self._shard_tokens)
        self._file.write(header)
        self._sha256 = hashlib.sha256(header)
        self._values = 0

    def _close(self) -> None:
        if self._values != self._shard_tokens:
            self._file.seek(0)
            self._file.write(shard_header(self._values))
            self._file.seek(0)
            self._sha256 = hashlib.sha256()
            while data := self._file.read(_READ_BYTES):
                self._sha256.update(data)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.files[self._path.name] = {"values": self._values, "sha256": self._sha256.hexdigest()}
        self._file = None


def shard_header(num_values: int) -> bytes:
    """Return the 1,024-byte little-endian header of a shard of `num_values` values."""
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, num_values
    return header.tobytes()


# -----------------------------------------------------------------------------
# Build: everything goes to DIR/.partial first and is renamed when complete, the manifest last

def build(docs: Path, out: Path, sp: Path = SHIPPED_TOKENIZER, val_docs: int | None = None,
          val_docs_file: Path | None = None, workers: int = 1, shard_tokens: int = DEFAULT_SHARD_TOKENS,
          edge_bytes: str = "drop", overwrite: bool = False, train_docs: int | None = None,
          max_train_tokens: int | None = None, show_progress: bool = True) -> dict:
    """Write token shards, byte sidecar, tokenizer and manifest for `docs` into `out`; return the manifest.

    val_docs          validation documents: the first ones of `docs`, or of `val_docs_file` when given. None
                      means what the source manifest beside `docs` says, else 50,000, or all of that file.
    train_docs        at most this many training documents (None: all).
    max_train_tokens  stop before the training document that would exceed this many tokens (None: never).
    edge_bytes        "drop" leaves bytes of stripped white space out of the sidecar, "attach" adds them to
                      the document's first and last token.
    workers           processes; with more than one, the calling script needs `if __name__ == "__main__":`.
    Raises PrepareError for bad input, a directory in use and a full disk; `out` is then as it was before,
    save that `overwrite` has removed the earlier build.
    """
    docs, out = Path(docs), Path(out)
    model = ModelFile.read(sp)
    if not 0 < shard_tokens < 2**31:
        raise UsageError(f"--shard-tokens {shard_tokens}: expected 1 to {2**31 - 1:,}")
    if edge_bytes not in ("drop", "attach"):
        raise UsageError(f"--edge-bytes {edge_bytes!r}: expected drop or attach")
    if workers < 1:
        raise UsageError(f"--workers {workers}: expected at least 1")
    sources = _sources(docs, val_docs_file, val_docs, train_docs)
    settings = {"sources": [source.identity() for source, _ in sources],
                "val_docs": val_docs, "tokenizer": model.sha256,
                "shard_tokens": shard_tokens, "edge_bytes": edge_bytes, "train_docs": train_docs,
                "max_train_tokens": max_train_tokens}
    try:
        finished = _claim(out, settings, overwrite)
        if finished:
            return finished
        with _discarded_on_error(out) as staging:
            manifest = _write_splits(staging, sources, model, shard_tokens, edge_bytes, workers,
                                     max_train_tokens, show_progress)
            if not manifest["docs_train"] and val_docs is None and val_docs_file is None:
                raise PrepareError(f"{docs}: expected more than {manifest['docs_val']:,} documents, found no "
                                   "more, so none is left for training; choose a smaller --val-docs")
            (staging / model.path.name).write_bytes(model.data)
            # With the manifest staged, an interrupted run is completed by the next one.
            _write_json(staging / MANIFEST_NAME, manifest)
            _publish(out)
    finally:
        for source, _ in sources:
            source.close()
    return manifest


@contextlib.contextmanager
def _discarded_on_error(out: Path) -> Iterator[Path]:
    """Give the staging directory of `out`, and remove it when the build fails or is interrupted."""
    staging = out / STAGING_NAME
    try:
        yield staging
    except BaseException as error:
        # A complete staged build is kept: the next run only has to rename it.
        if not (staging / MANIFEST_NAME).exists():
            shutil.rmtree(staging, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise PrepareError(
            f"{out}: expected {'room for the shards' if is_full else 'to read and write files'}, found: "
            f"{error.strerror or error}; {'free some space' if is_full else 'check the disk'} or choose "
            "another --out, then run again") from error


def _sources(docs: Path, val_docs_file: Path | None, val_docs: int | None,
             train_docs: int | None) -> list[tuple[DocumentFile, SplitRule]]:
    """Open the document files in writing order, each with its rule of which document goes to which split."""
    if val_docs_file is None:
        return [(DocumentFile(docs), SplitRule(resolve_val_docs(docs, val_docs), train_docs))]
    if docs.resolve() == Path(val_docs_file).resolve():
        raise UsageError(f"--val-docs-file {val_docs_file}: expected another file than --docs, found the "
                         "same, so every validation document would be trained on; leave it out and use "
                         "--val-docs")
    everything = 2**62
    return [(DocumentFile(val_docs_file), SplitRule(everything if val_docs is None else val_docs, 0)),
            (DocumentFile(docs), SplitRule(0, train_docs))]


def resolve_val_docs(docs: Path, val_docs: int | None) -> int:
    """Return how many documents of `docs` are validation: as its source manifest states, as asked, or 50,000.

    Raises PrepareError when the manifest that accompanies the published document file states another number.
    """
    path = Path(docs).with_name(Path(docs).name.split(".jsonl")[0] + ".source_manifest.json")
    stated = None
    if path.exists():
        try:
            stated = json.loads(path.read_text("utf-8")).get("docs_val")
        except (ValueError, AttributeError):
            raise PrepareError(f"{path}: expected a JSON object, found something else; fetch it "
                               "again") from None
    if stated is not None and (type(stated) is not int or stated < 0):
        raise PrepareError(f"{path}: expected `docs_val` to be a number of documents, found {stated!r}; "
                           "fetch it again")
    if stated is None:
        return DEFAULT_VAL_DOCS if val_docs is None else val_docs
    if val_docs not in (None, stated):
        raise UsageError(f"--val-docs {val_docs:,}: expected {stated:,}, as {path.name} beside the "
                         "documents states; leave the option out")
    return stated


def _claim(out: Path, settings: dict, overwrite: bool) -> dict | None:
    """Make `out` ready for a build; return the manifest if an interrupted run had only the renaming left."""
    staging = out / STAGING_NAME
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not overwrite and _is_encoded(out):
            same = json.loads((staging / "settings.json").read_text("utf-8")) == settings
            _publish(out)
            if same:
                return json.loads((out / MANIFEST_NAME).read_text("utf-8"))
        old = _old_shards(out, overwrite)
        # The manifest goes first: shards without one are never taken for a complete build.
        for path in [out / MANIFEST_NAME, *old]:
            path.unlink(missing_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        _write_json(staging / "settings.json", settings)
    except OSError as error:
        raise UsageError(f"{out}: expected a directory to write to, found: {error.strerror or error}; "
                         "choose another --out") from None
    return None


def _is_encoded(out: Path) -> bool:
    """Whether an interrupted build of `out` had only renaming and tidying left."""
    staging = out / STAGING_NAME
    if (staging / MANIFEST_NAME).exists():
        return True
    # The manifest is renamed last, so beside it the settings alone mean that nothing else is missing.
    return ((out / MANIFEST_NAME).exists() and staging.is_dir()
            and [path.name for path in staging.iterdir()] == ["settings.json"])


def _old_shards(out: Path, overwrite: bool) -> list[Path]:
    """Return the shards that `out` has; raise PrepareError if there are any that may not be replaced."""
    old = sorted(out.glob("fineweb_*.bin"))
    if old and not overwrite:
        raise UsageError(f"{out}: expected no shards, found {len(old)} (first {old[0].name}); choose "
                         "another --out, or pass --overwrite to remove them")
    return old


def _publish(out: Path) -> None:
    """Rename the staged files to their final names, the manifest last; safe to repeat."""
    staging = out / STAGING_NAME
    for path in sorted(staging.iterdir(), key=lambda path: (path.name == MANIFEST_NAME, path.name)):
        if path.name != "settings.json":
            os.replace(path, out / path.name)
    shutil.rmtree(staging)


def _write_json(path: Path, content: dict) -> None:
    temporary = path.with_name(path.name + STAGING_NAME)
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _write_splits(staging: Path, sources: list[tuple[DocumentFile, SplitRule]], model: ModelFile,
                  shard_tokens: int, edge_bytes: str, workers: int, max_train_tokens: int | None,
                  show_progress: bool) -> dict:
    """Encode all documents into shards under `staging` and return the manifest."""
    writers = {series: ShardWriter(staging, f"fineweb_{series}", shard_tokens)
               for series in ("val", "val_bytes", "train")}
    documents = {"val": 0, "train": 0}
    val_sums = {"sidecar_bytes": 0, "original_bytes": 0, "edge_bytes": 0}
    replaced = empty = 0
    # Results come back without their input, so the split of each batch is remembered here.
    splits: deque[str] = deque()
    files = [source for source, _ in sources]
    meter = _Meter(files, max_train_tokens, show_progress)

    def todo() -> Iterator[Batch]:
        for source, rule in sources:
            for batch in batches(source, rule):
                splits.append(batch.split)
                yield batch

    encoded = encode_batches(todo(), model, edge_bytes, workers)
    try:
        for result in encoded:
            split = splits.popleft()
            tokens, kept = result.tokens, result.num_documents
            if split == "train" and max_train_tokens is not None:
                ends = np.cumsum(result.lengths)
                kept = int(np.searchsorted(ends, max_train_tokens - writers["train"].total, side="right"))
                tokens = tokens[:ends[kept - 1] if kept else 0]
            writers[split].append(tokens)
            documents[split] += kept
            replaced += int(result.replaced[:kept].sum())
            empty += int((result.lengths[:kept] == 1).sum())
            if split == "val":
                assert len(result.sidecar) == len(tokens)
                writers["val_bytes"].append(result.sidecar)
                val_sums["sidecar_bytes"] += int(result.sidecar.sum(dtype=np.int64))
                val_sums["original_bytes"] += result.text_bytes
                val_sums["edge_bytes"] += result.edge_bytes
            meter.update(kept, result.text_bytes, writers["train"].total)
            if kept < result.num_documents:
                break
        for writer in writers.values():
            writer.finish()
    finally:
        for writer in writers.values():
            writer.abandon()
        encoded.close()
        meter.close()

    attached = val_sums["edge_bytes"] if edge_bytes == "attach" else 0
    missing = val_sums["original_bytes"] - val_sums["sidecar_bytes"] - val_sums["edge_bytes"] + attached
    # With attach, documents without tokens keep their bytes to themselves.
    assert missing == 0 or edge_bytes == "attach" and empty, f"{missing} validation bytes are unaccounted for"
    if not sum(documents.values()):
        raise PrepareError(f"{files[-1].path}: expected documents, found none; check --docs")
    if empty:
        print(f"{empty:,} documents have no tokens (empty or only white space); each is a lone BOS",
              file=sys.stderr)
    if replaced:
        print(f"{replaced:,} lone surrogates were replaced by U+FFFD", file=sys.stderr)
    hashes = {source.path.name: source.finish() for source in files}
    return {
        "format": 1,
        "transform": lossless_caps.TRANSFORM,
        "tokenizer": {"file": model.path.name, "sha256": model.sha256, "vocab_size": len(model.pieces),
                      "bos_id": BOS_ID, "operator_ids": OPERATOR_IDS},
        "library": f"sentencepiece {sentencepiece.__version__}",
        "source_sha256": hashes if len(hashes) > 1 else next(iter(hashes.values())),
        "docs_val": documents["val"],
        "docs_train": documents["train"],
        "shard_tokens": shard_tokens,
        "edge_bytes": edge_bytes,
        "files": {name: facts for series in ("train", "val", "val_bytes")
                  for name, facts in writers[series].files.items()},
        "train": {"tokens": writers["train"].total, "bos": documents["train"]},
        "val": {"tokens": writers["val"].total, "bos": documents["val"], **val_sums},
        "replaced_surrogates": replaced,
    }


class _Meter:
    """Progress bar: documents, MB of text per second, time left (by stored bytes read or tokens written)."""

    def __init__(self, files: list[DocumentFile], max_train_tokens: int | None, is_shown: bool):
        self._files, self._max_train_tokens = files, max_train_tokens
        self._start, self._documents, self._text_bytes = time.monotonic(), 0, 0
        self._bar = tqdm(total=1.0, disable=None if is_shown else True, mininterval=0.5,
                         bar_format="{percentage:3.0f}% |{bar}| {desc} [{elapsed}<{remaining}]")

    def update(self, num_documents: int, text_bytes: int, train_tokens: int) -> None:
        self._documents += num_documents
        self._text_bytes += text_bytes
        elapsed = max(time.monotonic() - self._start, 1e-9)
        size = max(1, sum(source.size for source in self._files))
        done = sum(source.position for source in self._files) / size
        if self._max_train_tokens:
            done = max(done, train_tokens / self._max_train_tokens)
        self._bar.set_description_str(f"{self._documents:,} documents, "
                                      f"{self._text_bytes / 1e6 / elapsed:.1f} MB/s",
                                      refresh=False)
        self._bar.update(min(done, 1.0) - self._bar.n)

    def close(self) -> None:
        self._bar.close()


# -----------------------------------------------------------------------------
# Training a tokenizer: the official fields, the official character map with any library release

def train_tokenizer(documents: Iterable[str], vocab_size: int = 8192,
                    charsmap_from: Path = SHIPPED_TOKENIZER) -> bytes:
    """Train a CaseOps BPE tokenizer and return the model file's content.

    documents      training texts, not yet transformed. Those whose caseops form exceeds 4,192 bytes are left
                   out, as in the official training.
    charsmap_from  model file whose character map is carried over when the installed library has another one.
                   SentencePiece 0.2.0 has the official map built in and does not read it.
    Raises PrepareError when there is too little text or a file is unusable.
    """
    texts = (lossless_caps.encode(text) for text in map(_training_text, documents) if text)
    fields = {
        "model_type": "bpe", "vocab_size": vocab_size, "hard_vocab_limit": False, "character_coverage": 0.999,
        "byte_fallback": True, "split_digits": True, "add_dummy_prefix": False,
        "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3,
        "user_defined_symbols": list(lossless_caps.OPERATORS), "minloglevel": 1,
    }
    release = [int(part) for part in re.findall(r"\d+", sentencepiece.__version__)[:3]]
    if release <= [0, 2, 0]:
        return _run_trainer(texts, normalization_rule_name="nmt_nfkc", **fields)

    # Normalising beforehand and then training with the identity map gives the pieces that the official map
    # gives; the result is told afterwards which map and length limit it was trained with.
    donor = ModelFile.read(charsmap_from)
    if hashlib.sha256(donor.charsmap).hexdigest() != OFFICIAL_CHARSMAP_SHA256:
        raise PrepareError(f"{charsmap_from}: expected a tokenizer with the official character map, found "
                           f"another map; use {SHIPPED_TOKENIZER.name}")
    normalize = sentencepiece.SentencePieceProcessor(model_proto=donor.data).normalize
    normalized = (normalize(text).replace("\u2581", " ") for text in texts
                  if len(text.encode("utf-8")) <= MAX_TRAINING_BYTES)
    data = _run_trainer(normalized, normalization_rule_name="identity",
                        max_sentence_length=64 * MAX_TRAINING_BYTES, **fields)
    return _with_charsmap(data, donor.charsmap)


MAX_TRAINING_BYTES = 4192                 # the library's default max_sentence_length


def _training_text(document: str) -> str:
    return _SURROGATE.sub("\ufffd", document).replace("\0", " ").strip()


def _run_trainer(texts: Iterator[str], **fields) -> bytes:
    model, stopped = io.BytesIO(), []

    def noting_interrupts() -> Iterator[str]:
        # The library turns an exception of its source, an interrupt too, into an error of its own.
        try:
            yield from texts
        except BaseException as error:
            stopped.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=noting_interrupts(), model_writer=model,
                                                 **fields)
    except (RuntimeError, OSError) as error:
        if stopped and not isinstance(stopped[0], GeneratorExit):
            raise stopped[0] from None
        raise PrepareError("training the tokenizer failed: expected enough text for "
                           f"{fields['vocab_size']:,} pieces, found: {error}; give more documents or ask for "
                           "fewer pieces") from None
    found = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if found != fields["vocab_size"]:
        raise PrepareError(f"training the tokenizer failed: expected enough text for "
                           f"{fields['vocab_size']:,} pieces, "
                           f"found text for {found:,}; give more documents or ask for fewer pieces")
    return model.getvalue()


def _with_charsmap(data: bytes, charsmap: bytes) -> bytes:
    """Return the model file `data` with the given map, named nmt_nfkc, and the default sentence length."""
    message = b""
    for number, value, stored in proto_fields(data):
        if number == NORMALIZER_SPEC:
            kept = [old for key, _, old in proto_fields(value) if key not in (NORMALIZER_NAME, CHARSMAP)]
            named = proto_bytes_field(NORMALIZER_NAME, b"nmt_nfkc") + proto_bytes_field(CHARSMAP, charsmap)
            stored = proto_bytes_field(number, named + b"".join(kept))
        elif number == TRAINER_SPEC:
            kept = [old for key, _, old in proto_fields(value) if key != MAX_SENTENCE_LENGTH]
            stored = proto_bytes_field(number, b"".join(kept))
        message += stored
    return message


def training_documents(docs: Path, skip: int, sources: Iterable[str] = (),
                       show_progress: bool = False) -> Iterator[str]:
    """Yield the texts of `docs` after the first `skip` documents; if sources are named, only theirs."""
    wanted = frozenset(sources)
    file = DocumentFile(docs)
    meter = _Meter([file], None, show_progress)
    try:
        for batch in batches(file, SplitRule(skip, None)):
            if batch.split == "train":
                text_bytes = 0
                for _, text, _, record in parse_documents(batch):
                    text_bytes += len(text)
                    if not wanted or record.get("source") in wanted:
                        yield text
                meter.update(batch.num_documents, text_bytes, 0)
    finally:
        meter.close()
        file.close()


def write_tokenizer(path: Path, data: bytes) -> ModelFile:
    """Write a trained model and `PATH.sha256` beside it, and return it checked."""
    path = Path(path)
    recorded = f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for target, content in ((path, data), (path.with_name(path.name + ".sha256"), recorded)):
            temporary = target.with_name(target.name + STAGING_NAME)
            temporary.write_bytes(content)
            os.replace(temporary, target)
    except OSError as error:
        raise UsageError(f"{path}: expected a place to write the tokenizer to, found: {error.strerror}; "
                         "choose another --sp") from None
    return ModelFile.read(path)


# -----------------------------------------------------------------------------
# Verify: read every value of a shard directory and say what is wrong with it

# Check figures of the published export, from public training logs; it comes without a manifest of ours.
PUBLISHED_NAME = "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
PUBLISHED_TOKENIZER = "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
PUBLISHED_TOKENIZER_SHA256 = "97754754561f20def5edd99765ca0668f880bd94e67316d54aa10ab25f45cc4d"
PUBLISHED_VAL_TOKENS = (47_851_521, 47_853_568)
PUBLISHED_TARGETS = 47_851_520
PUBLISHED_TARGET_BYTES, PUBLISHED_TARGET_BYTES_TOLERANCE = 151_074_499, 2
PUBLISHED_TRAIN_SHARDS = 80

# what train_gpt.py remembers of files that it has read; `verify` fills it
CHECKED_NAME = ".checked.json"
OVERLAP_LIMIT = 0.001                     # share of validation documents that may recur in training by chance
_VALUES_AT_ONCE = 1 << 22
_NEVER_FROM_TEXT = (0, 2, 3)              # pad, end of sequence, unknown


@dataclasses.dataclass
class SeriesFacts:
    """Sums over all shards of one series."""
    shards: int = 0
    values: int = 0
    bos: int = 0
    total: int = 0                        # of the values; for a sidecar, bytes
    target_total: int = 0                 # of the first PUBLISHED_TARGETS values after the first


def _check_manifest_shape(manifest: dict) -> None:
    """Raise ValueError unless everything that `verify` reads from a manifest has the right type."""
    if manifest.get("format") != 1:
        raise ValueError("no `format` 1")
    files, tokenizer = manifest.get("files"), manifest.get("tokenizer")
    if not isinstance(files, dict) or not all(isinstance(facts, dict) for facts in files.values()):
        raise ValueError("no `files` with facts about each")
    name = tokenizer.get("file") if isinstance(tokenizer, dict) else None
    if not isinstance(name, str) or Path(name).name != name or type(tokenizer.get("vocab_size")) is not int:
        raise ValueError("no `tokenizer` with the name of a file and a vocabulary size")
    for split in ("train", "val"):
        sums = manifest.get(split)
        if not isinstance(sums, dict) or not all(type(value) is int for value in sums.values()):
            raise ValueError(f"no whole numbers in `{split}`")
    merges = manifest.get("merges", {"file": "", "sha256": ""})
    texts = [merges.get("file"), merges.get("sha256")] if isinstance(merges, dict) else []
    if not all(type(text) is str for text in texts) or not texts or Path(texts[0]).name != texts[0]:
        raise ValueError("no `merges` with the name of a file and its SHA-256")


class DirectoryCheck:
    """One pass over a shard directory; `violations` collects a plain sentence for each thing wrong."""

    def __init__(self, folder: Path, overlap_limit: float = OVERLAP_LIMIT, show_progress: bool = True):
        self.folder = Path(folder)
        self.violations: list[str] = []
        self.val_documents: set[bytes] = set()        # hashes, without documents that have no tokens
        self._val_in_train: set[bytes] = set()
        self._train_repeats = 0
        self._overlap_limit = overlap_limit
        self._facts = {"train": SeriesFacts(), "val": SeriesFacts(), "val_bytes": SeriesFacts()}
        self._names: dict[str, list[str]] = {series: [] for series in self._facts}
        self._values: dict[str, int] = {}             # per sound file, from its header
        self._checked: dict[str, list] = {}           # per file that was read: its stamp and facts
        if not self.folder.is_dir():
            raise UsageError(f"{folder}: expected a directory of shards, found none; check the path")
        self._manifest = self._read_manifest()
        self._model: ModelFile | None = None
        self._vocab_size = self._read_vocab_size()
        self._joiner = self._read_merges()
        self._is_impossible = self._impossible_ids()
        self._find_shards()
        size = sum((self.folder / name).stat().st_size for name in self._values)
        self._bar = tqdm(total=size, unit="B", unit_scale=True, desc="verify",
                         disable=None if show_progress else True)

    def run(self) -> list[str]:
        """Check everything, print one line per series, and return the violations."""
        try:
            self.val_documents = set(self._documents("val"))
            self._check_sidecar()
            for document in self._documents("train"):
                if document in self.val_documents:
                    self._train_repeats += 1
                    self._val_in_train.add(document)
        finally:
            self._bar.close()
        for series, facts in self._facts.items():
            detail = f"bytes:{facts.total}" if series == "val_bytes" else f"documents:{facts.bos}"
            print(f"verify series:{series} shards:{facts.shards} values:{facts.values} {detail}")
        val, sidecar = self._facts["val"], self._facts["val_bytes"]
        if val.values:
            print(f"verify bytes_per_token:{sidecar.total / val.values:.4f}")
        self._check_overlap()
        if self._manifest is None:
            self._check_published_figures()
        else:
            self._check_manifest_sums()
        if not self.violations:
            self._remember()
        return self.violations

    def _remember(self) -> None:
        """Let runs of train_gpt.py start without reading these files again (sizes and times must not
        change)."""
        path = self.folder / CHECKED_NAME
        try:
            temporary = path.with_name(CHECKED_NAME + STAGING_NAME)
            temporary.write_text(json.dumps({"format": 1, "files": self._checked}))
            os.replace(temporary, path)
        except OSError as error:
            print(f"verify remembered:0 reason:\"{error.strerror}\"")

    # -- what the directory says about itself

    def _read_manifest(self) -> dict | None:
        path = self.folder / MANIFEST_NAME
        if not path.exists():
            print("verify manifest:none")
            return None
        try:
            manifest = json.loads(path.read_text("utf-8"))
            _check_manifest_shape(manifest)
            return manifest
        except (ValueError, AttributeError) as error:
            self.violations.append(f"{MANIFEST_NAME} is not a manifest of this format ({error}).")
            return None

    def _read_vocab_size(self) -> int | None:
        stated = (self._manifest or {}).get("tokenizer") or {}
        models = [self.folder / stated["file"]] if stated else sorted(self.folder.glob("*.model"))
        if not models or not models[0].exists():
            print("verify tokenizer:none (ids are checked against the manifest only)")
            return stated.get("vocab_size")
        try:
            model = ModelFile.read(models[0])
        except PrepareError as error:
            self.violations.append(f"The tokenizer is unusable: {error}.")
            return stated.get("vocab_size")
        self._model = model
        if stated and (model.sha256, len(model.pieces)) != (stated.get("sha256"), stated.get("vocab_size")):
            self.violations.append(f"{model.path.name} is not the tokenizer that the manifest names: it has "
                                   f"{len(model.pieces):,} pieces and SHA-256 {model.sha256[:16]}..., the "
                                   f"manifest says {stated.get('vocab_size')} and "
                                   f"{str(stated.get('sha256'))[:16]}....")
        if model.path.name == PUBLISHED_TOKENIZER and model.sha256 != PUBLISHED_TOKENIZER_SHA256:
            self.violations.append(f"{model.path.name} has SHA-256 {model.sha256[:16]}..., the published "
                                   f"one has {PUBLISHED_TOKENIZER_SHA256[:16]}....")
        print(f"verify tokenizer:{model.path.name} vocab_size:{len(model.pieces)} sha256:{model.sha256[:16]}")
        return len(model.pieces)

    def _read_merges(self) -> Joiner | None:
        if "merges" not in (self._manifest or {}):
            return None
        if self._model is None:
            print("verify merges:unchecked (they need the tokenizer)")
            return None
        try:
            merges = _merges_of(self.folder, self._manifest, self._model)
        except PrepareError as error:
            self.violations.append(f"The merges are unusable: {error}.")
            return None
        for name, sha256 in self._manifest["merges"].get("exceptions", {}).items():
            path = self.folder / name
            if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
                self.violations.append(f"{name} is missing or another one, so that `unfuse` could not "
                                       "restore the sidecar; copy it from where the shards were joined.")
        print(f"verify merges:{len(merges.merges)} sha256:{merges.sha256[:16]}")
        return Joiner(merges.merges)

    def _impossible_ids(self) -> np.ndarray:
        """Return for every id whether, as far as is known, neither the tokenizer nor a merge can give it."""
        is_impossible = np.zeros(1 << 16, bool)
        has_merges = "merges" in (self._manifest or {})
        if self._model is None or self._model.slow_reason or has_merges and self._joiner is None:
            return is_impossible
        is_impossible[free_ids(self._model)] = True
        if self._joiner is not None:
            is_impossible[[merge.id for merge in self._joiner.merges]] = False
        return is_impossible

    def _find_shards(self) -> None:
        numbers: dict[str, list[int]] = {series: [] for series in self._facts}
        for path in sorted(self.folder.glob("fineweb_*.bin")):
            match = SHARD_NAME.fullmatch(path.name)
            if not match:
                self.violations.append(f"{path.name} does not follow "
                                       "fineweb_(train|val|val_bytes)_NNNNNN.bin.")
                continue
            numbers[match[1]].append(int(match[2]))
            self._names[match[1]].append(path.name)
            self._check_header(path)
        for series, found in numbers.items():
            gaps = sorted(set(range(max(found, default=-1) + 1)) - set(found))
            if gaps:
                self.violations.append(f"Numbering of fineweb_{series} has {len(gaps)} gaps, the first at "
                                       f"{gaps[0]:06d}; fetch or build the missing shards.")
            if not found:
                self.violations.append(f"There is no fineweb_{series} shard.")
        if (self.folder / STAGING_NAME).exists():
            self.violations.append(f"{STAGING_NAME} is left from an interrupted build; run the build again.")
        for name in (self._manifest or {}).get("files", {}):
            # A download may leave out the last training shards.
            if not (self.folder / name).exists() and not name.startswith("fineweb_train_"):
                self.violations.append(f"{name} is in the manifest but not in the directory.")

    def _check_header(self, path: Path) -> None:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
        magic, version, values = np.frombuffer(header[:12].ljust(12, b"\0"), "<i4").tolist()
        if size == 0:
            self.violations.append(f"{path.name} is empty; fetch or build it again.")
        elif len(header) < HEADER_BYTES or (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
            self.violations.append(f"{path.name} is not a token shard: expected magic {SHARD_MAGIC} and "
                                   f"version {SHARD_VERSION}, found {magic} and {version}.")
        elif values <= 0 or size != HEADER_BYTES + 2 * values:
            self.violations.append(f"{path.name} has the wrong size: its header promises {values:,} values "
                                   f"({HEADER_BYTES + 2 * values:,} bytes), it has {size:,} bytes.")
        else:
            self._values[path.name] = values

    # -- what the values say

    def _chunks(self, series: str) -> Iterator[np.ndarray]:
        """Yield the values of a series in pieces of bounded size, counting and hashing on the way."""
        facts = self._facts[series]
        for name in self._names[series]:
            if name not in self._values:
                continue
            stated = (self._manifest or {}).get("files", {}).get(name)
            facts.shards += 1
            sha256, status = hashlib.sha256(), (self.folder / name).stat()
            head = 0 if series == "train" else PUBLISHED_TARGETS + 1 - facts.values
            head = max(0, min(head, self._values[name]))
            about, seen = {"first": None, "largest": 0, "total": 0, "head_total": 0}, 0
            with open(self.folder / name, "rb") as file:
                sha256.update(file.read(HEADER_BYTES))
                while data := file.read(2 * _VALUES_AT_ONCE):
                    sha256.update(data)
                    values = np.frombuffer(data, "<u2")
                    about["first"] = int(values[0]) if about["first"] is None else about["first"]
                    about["largest"] = max(about["largest"], int(values.max()))
                    about["total"] += int(values.sum(dtype=np.int64))
                    about["head_total"] += int(values[:max(0, head - seen)].sum(dtype=np.int64))
                    seen += len(values)
                    first, last = max(1, facts.values), min(PUBLISHED_TARGETS + 1, facts.values + len(values))
                    if first < last:
                        targets = values[first - facts.values:last - facts.values]
                        facts.target_total += int(targets.sum(dtype=np.int64))
                    facts.values += len(values)
                    facts.total += int(values.sum(dtype=np.int64))
                    self._bar.update(len(data))
                    yield values
            stamp = [status.st_size, status.st_mtime_ns, head]
            self._checked[name] = [stamp, {"sha256": sha256.hexdigest(), **about}]
            if self._manifest is not None and not stated:
                self.violations.append(f"{name} is not in the manifest; it comes from another build.")
            elif stated and stated != {"values": self._values[name], "sha256": sha256.hexdigest()}:
                self.violations.append(f"{name} is not the file that the manifest lists: it has "
                                       f"{self._values[name]:,} values and SHA-256 "
                                       f"{sha256.hexdigest()[:16]}..., the manifest says "
                                       f"{stated.get('values')} and {str(stated.get('sha256'))[:16]}....")

    def _documents(self, series: str) -> Iterator[bytes]:
        """Yield a 16-byte hash for each document that has tokens besides BOS, checking ids on the way."""
        facts = self._facts[series]
        largest, specials, impossible, is_joined = -1, 0, 0, True
        is_first = True
        # Hashed as it comes, because in data without BOS the whole split is one document.
        document, length = hashlib.blake2b(digest_size=16), 0
        for tokens in self._chunks(series):
            if is_first and tokens[0] != BOS_ID:
                self.violations.append(f"The {series} split begins with id {int(tokens[0])}, not with BOS "
                                       f"({BOS_ID}); its first document is cut or the data was built without "
                                       "BOS.")
            is_first = False
            largest = max(largest, int(tokens.max()))
            specials += int(np.isin(tokens, _NEVER_FROM_TEXT).sum())
            impossible += int(self._is_impossible[tokens].sum())
            if self._joiner is not None and is_joined:
                original = split_tokens(tokens, self._joiner.merges)
                is_joined = np.array_equal(self._joiner.join(original)[0], tokens)
            starts = np.flatnonzero(tokens == BOS_ID)
            facts.bos += len(starts)
            for number, part in enumerate(np.split(tokens, starts)):
                if number > 0:
                    if length > 1:
                        yield document.digest()
                    document, length = hashlib.blake2b(digest_size=16), 0
                document.update(part.data)
                length += len(part)
        if length > 1:
            yield document.digest()
        if self._vocab_size is not None and largest >= self._vocab_size:
            self.violations.append(f"The {series} split has id {largest}, beyond the vocabulary of "
                                   f"{self._vocab_size:,}; shards and tokenizer do not belong together.")
        if specials:
            self.violations.append(f"The {series} split has {specials:,} ids among {_NEVER_FROM_TEXT} "
                                   "(padding, end of sequence, unknown), which documents never give.")
        if impossible:
            self.violations.append(f"The {series} split has {impossible:,} ids that the tokenizer never "
                                   "gives; it was made with another one, or pairs were joined and the "
                                   "manifest does not say so.")
        if not is_joined:
            self.violations.append(f"The {series} split has pairs of tokens that the merges should have "
                                   "joined; join the original shards again.")

    def _check_sidecar(self) -> None:
        token_lengths, byte_lengths = ([self._values.get(name) for name in self._names[series]]
                                       for series in ("val", "val_bytes"))
        if token_lengths != byte_lengths or None in token_lengths:
            self.violations.append("Validation tokens and byte sidecar differ in shards or lengths: "
                                   f"{token_lengths[:4]} and {byte_lengths[:4]} values in the first shards.")
            for _ in self._chunks("val_bytes"):
                pass
            return
        bos_bytes = operators = operators_with_bytes = 0
        previous = 0
        tokens_again = self._again("val")
        for values in self._chunks("val_bytes"):
            tokens = next(tokens_again)
            before = np.concatenate([[previous], tokens[:-1]])
            previous = tokens[-1]
            bos_bytes += int(values[tokens == BOS_ID].sum(dtype=np.int64))
            # An escaped operator stands for 3 bytes, and the first token of a document may carry edge bytes.
            is_operator = (np.isin(tokens, OPERATOR_IDS) & (before != OPERATOR_IDS[3]) & (before != BOS_ID))
            operators += int(is_operator.sum())
            operators_with_bytes += int((values[is_operator] > 0).sum())
        if bos_bytes:
            self.violations.append(f"The sidecar gives {bos_bytes:,} bytes to BOS tokens, which stand for "
                                   "none.")
        # Deleted control characters after an operator count with it, but they are rare.
        if operators_with_bytes > max(1, operators // 100):
            self.violations.append(f"The sidecar gives bytes to {operators_with_bytes:,} of {operators:,} "
                                   "case operators, which stand for none; bits per byte would come out too "
                                   "low.")
        if not self._facts["val_bytes"].total:
            self.violations.append("The sidecar sums to 0 bytes.")

    def _again(self, series: str) -> Iterator[np.ndarray]:
        for name in self._names[series]:
            with open(self.folder / name, "rb") as file:
                file.seek(HEADER_BYTES)
                while data := file.read(2 * _VALUES_AT_ONCE):
                    yield np.frombuffer(data, "<u2")

    # -- what must hold between them

    def _check_overlap(self) -> None:
        found, num_documents = len(self._val_in_train), len(self.val_documents)
        print(f"verify overlap val_documents:{found}/{num_documents} train_documents:{self._train_repeats}")
        if found > self._overlap_limit * num_documents:
            self.violations.append(
                f"{found:,} of {num_documents:,} distinct validation documents "
                f"({100 * found / num_documents:.1f} %) are also in the training shards "
                f"({self._train_repeats:,} times): the split leaks, scores on it mean nothing. Build both "
                "splits in one run.")

    def _check_manifest_sums(self) -> None:
        val, sidecar, train = self._facts["val"], self._facts["val_bytes"], self._facts["train"]
        stated_val, stated_train = self._manifest["val"], self._manifest["train"]
        pairs = [("validation tokens", stated_val.get("tokens"), val.values),
                 ("validation documents", self._manifest.get("docs_val"), val.bos),
                 ("sidecar bytes", stated_val.get("sidecar_bytes"), sidecar.total)]
        listed = [name for name in self._manifest["files"] if name.startswith("fineweb_train_")]
        if sorted(listed) == self._names["train"]:
            pairs += [("training tokens", stated_train.get("tokens"), train.values),
                      ("training documents", self._manifest.get("docs_train"), train.bos)]
        for what, stated, found in pairs:
            if stated != found:
                self.violations.append(f"The manifest states {stated} {what}, the shards hold {found:,}.")
        edge = stated_val.get("edge_bytes", 0) if self._manifest.get("edge_bytes") == "drop" else 0
        original = stated_val.get("original_bytes")
        if original is not None and sidecar.total + edge > original:
            self.violations.append(f"The sidecar and edge bytes sum to {sidecar.total + edge:,}, more than "
                                   f"the {original:,} bytes of the documents; bits per byte would come out "
                                   "too low.")

    def _check_published_figures(self) -> None:
        val, sidecar, train = self._facts["val"], self._facts["val_bytes"], self._facts["train"]
        low, high = PUBLISHED_VAL_TOKENS
        wrong = []
        if not low <= val.values <= high:
            wrong.append(f"validation has {val.values:,} tokens, expected {low:,} to {high:,}")
        if val.bos != DEFAULT_VAL_DOCS:
            wrong.append(f"validation has {val.bos:,} documents, expected {DEFAULT_VAL_DOCS:,}")
        if abs(sidecar.target_total - PUBLISHED_TARGET_BYTES) > PUBLISHED_TARGET_BYTES_TOLERANCE:
            wrong.append(f"its first {PUBLISHED_TARGETS:,} targets have {sidecar.target_total:,} bytes, "
                         f"expected {PUBLISHED_TARGET_BYTES:,}")
        if train.shards > PUBLISHED_TRAIN_SHARDS:
            wrong.append(f"training has {train.shards:,} shards, expected at most {PUBLISHED_TRAIN_SHARDS}")
        short = [name for name in self._names["train"] if self._values.get(name, 0) != DEFAULT_SHARD_TOKENS]
        if short:
            wrong.append(f"{len(short)} training shards, {short[0]} first, do not have "
                         f"{DEFAULT_SHARD_TOKENS:,} tokens")
        if wrong:
            self.violations.append("Without a manifest only the published export can be trusted, and this is "
                                   "not it: "
                                   + "; ".join(wrong) + ".")


def verify(folder: Path, overlap_limit: float = OVERLAP_LIMIT, show_progress: bool = True) -> list[str]:
    """Check a shard directory, print its figures, and return a sentence for each violation (none: sound).

    overlap_limit   share of validation documents that may also be in the training shards. Web text repeats
                    itself, so a few do; a wrong split gives tens of per cent.
    Raises PrepareError when `folder` is not a directory.
    """
    return DirectoryCheck(folder, overlap_limit, show_progress).run()


# -----------------------------------------------------------------------------
# Download: the published export, into the layout that run.sh expects

PUBLISHED_REPO = "romeerp/parameter-golf-caseops-v1"
DEFAULT_DOWNLOAD_ROOT = Path("data") / "datasets"
DOWNLOAD_STAGING_NAME = ".download"


def download(root: Path = DEFAULT_DOWNLOAD_ROOT, repo: str = PUBLISHED_REPO, revision: str = "main",
             train_shards: int = PUBLISHED_TRAIN_SHARDS) -> Path:
    """Fetch tokenizer, validation and the first `train_shards` training shards; return their directory.

    A file gets its final name once its size, and SHA-256 where the hub states one, are right; a second call
    keeps what the first has finished. Raises PrepareError when the repository lacks files or a transfer
    fails.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError, HTTPError
    except ImportError:
        raise PrepareError("download needs the package huggingface_hub, which is not installed; "
                           "run `pip install huggingface_hub`") from None
    folder = Path(root) / PUBLISHED_NAME
    staging = folder / DOWNLOAD_STAGING_NAME
    again = "check the connection and run again; finished files are kept"
    try:
        info = huggingface_hub.HfApi().repo_info(repo, repo_type="dataset", revision=revision,
                                                 files_metadata=True)
        wanted = _choose_files(repo, info.siblings or [], train_shards)
        missing = [file for file in wanted if not _has_size(folder / Path(file.rfilename).name, file.size)]
        staging.mkdir(parents=True, exist_ok=True)
        needed, free = sum(file.size for file in missing), shutil.disk_usage(staging).free
        if needed > free:
            raise PrepareError(f"{folder}: expected {needed / 1e9:.1f} GB of free space, found "
                               f"{free / 1e9:.1f} GB; free some, or fetch fewer --train-shards")
        for number, file in enumerate(missing, start=1):
            name = Path(file.rfilename).name
            print(f"download file:{name} bytes:{file.size} number:{number}/{len(missing)}", flush=True)
            staged = Path(huggingface_hub.hf_hub_download(repo, file.rfilename, repo_type="dataset",
                                                          revision=info.sha, local_dir=staging))
            _check_download(staged, file, staging)
            os.replace(staged, folder / name)
    except HFValidationError as error:
        raise UsageError(f"{repo}: expected a repository name like {PUBLISHED_REPO}, found: {error} "
                         "Check --repo") from None
    except (HTTPError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PrepareError(f"{repo}: expected to download it, found: {reason}; {again}") from error
    shutil.rmtree(staging)
    return folder


def _choose_files(repo: str, files: list, train_shards: int) -> list:
    """Return the repository's files to fetch, small ones first; raise PrepareError when some are missing."""
    shards: dict[Path, dict[str, dict[int, object]]] = {}
    for file in files:
        match = SHARD_NAME.fullmatch(Path(file.rfilename).name)
        if match:
            shards.setdefault(Path(file.rfilename).parent, {}).setdefault(match[1], {})[int(match[2])] = file
    folders = [folder for folder in shards if folder.name == PUBLISHED_NAME] or list(shards)
    if len(folders) != 1:
        raise PrepareError(f"{repo}: expected one folder of shards named {PUBLISHED_NAME}, found "
                           f"{sorted(map(str, folders)) or 'none'}; check --repo and --revision")
    series = shards[folders[0]]
    models = [file for file in files if file.rfilename.endswith(".model")]
    models = [file for file in models if Path(file.rfilename).name == PUBLISHED_TOKENIZER] or models
    if len(models) != 1:
        raise PrepareError(f"{repo}: expected one tokenizer model, found "
                           f"{[file.rfilename for file in models]}; check --repo and --revision")
    available = len(series.get("train", {}))
    if train_shards > available:
        raise UsageError(f"{repo}: expected {train_shards} training shards, found {available}; "
                         f"pass --train-shards {available}")
    manifest = [file for file in files if Path(file.rfilename) == folders[0] / MANIFEST_NAME]
    wanted = models + manifest
    for name, count in (("val", None), ("val_bytes", None), ("train", train_shards)):
        numbered = series.get(name, {})
        for number in range(len(numbered) if count is None else count):
            if number not in numbered:
                raise PrepareError(f"{repo}: expected fineweb_{name}_{number:06d}.bin, found a gap; "
                                   "check --repo and --revision")
            wanted.append(numbered[number])
        if not numbered:
            raise PrepareError(f"{repo}: expected fineweb_{name}_*.bin, found none; check --repo and "
                               "--revision")
    empty = [file.rfilename for file in wanted if not file.size]
    if empty:
        raise PrepareError(f"{repo}: expected data in every file, found {empty[0]} with no bytes; the "
                           "repository is damaged, try another --revision")
    return wanted


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _check_download(path: Path, file, staging: Path) -> None:
    """Remove the fetched file and raise PrepareError unless it has the size and hash that the hub states."""
    found = path.stat().st_size
    stated = file.lfs.sha256 if file.lfs else None
    problem = ""
    if found != file.size:
        problem = f"{file.size:,} bytes, found {found:,}"
    elif stated:
        sha256 = hashlib.sha256()
        with open(path, "rb") as data:
            while block := data.read(_READ_BYTES):
                sha256.update(block)
        if sha256.hexdigest() != stated:
            problem = f"SHA-256 {stated[:16]}..., found {sha256.hexdigest()[:16]}..."
    if problem:
        # Without the client's own notes on it the file would pass for complete in the next run.
        shutil.rmtree(staging)
        raise PrepareError(f"{path.name}: expected {problem}; the download is damaged, run again to fetch it "
                           "again")


# -----------------------------------------------------------------------------
# Fuse: join frequent token pairs into ids that cannot occur, in every shard of a directory; and the way back

DEFAULT_LEARN_TOKENS = 2 * 10**7
FUSED_SETTINGS_NAME = "settings.json"
_FACTS_SUFFIX = ".facts.json"


def fuse(folder: Path, out: Path, num_merges: int | None, sp: Path | None = None, merges_from: Path | None = None,
         learn_tokens: int = DEFAULT_LEARN_TOKENS, workers: int = 1, show_progress: bool = True) -> dict:
    """Write the shards of `folder` to `out` with frequent pairs of tokens joined; return the new manifest.

    num_merges    pairs to join, each into one of the ids that the tokenizer can never give. None: as many as
                  there are such ids, or merges given.
    sp            tokenizer file (None: the one in `folder`).
    merges_from   a merges.json whose first `num_merges` merges to use. None: learn them on the first
                  `learn_tokens` tokens of the training shards.
    workers       processes, each with one shard; the output does not depend on it.
    Shards are joined one by one: a pair across two of them stays as it is. Sidecar values are summed, so the
    total stays. Raises PrepareError for unsound input, for input that holds an id which cannot occur (joined
    before, or made with another tokenizer) and when `out` exists; an interrupted run is continued by the same
    call.
    """
    source = _ShardFolder(folder, sp)
    if source.manifest is not None and "merges" in source.manifest:
        raise UsageError(f"{folder}: expected shards as a tokenizer gives them, found pairs joined "
                         "already; `unfuse` them first")
    if source.manifest is None:
        violations = verify(folder, show_progress=show_progress)
        if violations:
            raise PrepareError(f"{folder}: expected sound shards, found: {violations[0]}"
                               f"{f' ({len(violations) - 1} more)' if violations[1:] else ''} Run `verify` "
                               "on them")
    free = free_ids(source.model)
    given = None if merges_from is None else Merges.read(merges_from, source.model)
    limit = len(free) if given is None else len(given.merges)
    num_merges = limit if num_merges is None else num_merges
    if not 1 <= num_merges <= limit:
        raise UsageError(f"--merges {num_merges}: expected 1 to {limit}, the number of "
                         f"{'ids that the tokenizer never gives' if given is None else 'merges given'}")
    settings = {"source": source.identity(), "merges": num_merges, "learn_tokens": learn_tokens,
                "merges_from": given and given.sha256}
    with _continued(out, settings) as staging:
        if (staging / MERGES_NAME).exists():
            merges = Merges.read(staging / MERGES_NAME, source.model)
        else:
            merges = (given.first(num_merges) if given is not None
                      else _learn_merges(source, num_merges, free, learn_tokens))
            temporary = staging / (MERGES_NAME + STAGING_NAME)
            temporary.write_bytes(merges.data)
            os.replace(temporary, staging / MERGES_NAME)
        convert = functools.partial(_fuse_shard, source.folder, staging, source.stated(), source.model,
                                    Joiner(merges.merges, free))
        facts = _convert_shards(convert, source, staging, workers, "fuse", show_progress)
        manifest = _fused_manifest(source, merges, facts)
        source.copy_tokenizer(staging)
        _write_json(staging / MANIFEST_NAME, manifest)
    return manifest


def _require_joined_from(folder: Path, out: Path) -> None:
    """Raise PrepareError unless `fuse` made `out` from the shards of `folder`, by their names and sizes.

    Joined shards may be all that is kept: nothing is compared where `folder` is gone.
    """
    path = out / MANIFEST_NAME
    try:
        stated = json.loads(path.read_text("utf-8"))["fused_from"]["files"]
        joined = {name: HEADER_BYTES + 2 * facts["values"] for name, facts in stated.items()}
    except (OSError, ValueError, KeyError, TypeError):
        raise PrepareError(f"{path}: expected the manifest of shards that `fuse` joined, found none; remove {out} "
                           "to join them again") from None
    found = {path.name: path.stat().st_size for path in folder.glob("fineweb_*.bin") if SHARD_NAME.fullmatch(path.name)}
    differing = sorted(name for name in joined.keys() | found.keys() if joined.get(name) != found.get(name))
    if differing and folder.exists():
        raise PrepareError(f"{out}: expected shards joined from those of {folder} ({len(found)} files), found them "
                           f"joined from {len(joined)} files; they differ in {differing[0]}"
                           f"{f' and {len(differing) - 1} more' if differing[1:] else ''}; remove {out} to join them "
                           f"again, or set DATA_PATH={out} to take them as they are")


def unfuse(folder: Path, out: Path, sp: Path | None = None, workers: int = 1,
           show_progress: bool = True) -> None:
    """Write to `out` what `fuse` made `folder` from: shards equal to the last byte, and their manifest.

    Raises PrepareError when `folder` was not made by `fuse`, is damaged or `out` exists; an interrupted run
    is continued by the same call.
    """
    source = _ShardFolder(folder, sp)
    if source.manifest is None or not isinstance(source.manifest.get("fused_from"), dict):
        raise UsageError(f"{folder}: expected shards made by `fuse`, found none that a manifest calls so; "
                         "nothing to undo")
    merges = _merges_of(source.folder, source.manifest, source.model)
    original = source.manifest["fused_from"]
    with _continued(out, {"source": source.identity(), "unfuse": True}) as staging:
        convert = functools.partial(_unfuse_shard, source.folder, staging, source.stated(), source.model,
                                    merges.merges, original["files"])
        _convert_shards(convert, source, staging, workers, "unfuse", show_progress)
        source.copy_tokenizer(staging)
        if original["manifest"] is not None:
            _write_json(staging / MANIFEST_NAME, original["manifest"])


class _ShardFolder:
    """A directory of shards with its tokenizer: which files there are and what its manifest says of them."""

    def __init__(self, folder: Path, sp: Path | None):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UsageError(f"{folder}: expected a directory of shards, found none; check the path")
        self.manifest = None
        if (self.folder / MANIFEST_NAME).exists():
            try:
                self.manifest = json.loads((self.folder / MANIFEST_NAME).read_text("utf-8"))
                _check_manifest_shape(self.manifest)
            except (ValueError, AttributeError) as error:
                raise PrepareError(f"{self.folder / MANIFEST_NAME}: expected a manifest of this format, "
                                   f"found {error}; build or fetch the shards again") from None
        self.names = self._find_names()
        self.model = self._find_tokenizer(sp)

    def _find_names(self) -> list[str]:
        numbers: dict[str, list[int]] = {"train": [], "val": [], "val_bytes": []}
        for path in self.folder.glob("fineweb_*.bin"):
            match = SHARD_NAME.fullmatch(path.name)
            if match:
                numbers[match[1]].append(int(match[2]))
        listed = {} if self.manifest is None else self.manifest["files"]
        for series, found in numbers.items():
            stated = sum(name.startswith(f"fineweb_{series}_0") for name in listed)
            if sorted(found) != list(range(len(found))) or series != "train" and len(found) < max(1, stated):
                raise PrepareError(f"{self.folder}: expected fineweb_{series} shards without gaps, found "
                                   f"{len(found)}; fetch or build the missing ones")
        if len(numbers["val"]) != len(numbers["val_bytes"]):
            raise PrepareError(f"{self.folder}: expected a sidecar for every validation shard, found "
                               f"{len(numbers['val_bytes'])} for {len(numbers['val'])}; fetch or build it "
                               "again")
        return [f"fineweb_{series}_{number:06d}.bin" for series in ("val", "train")
                for number in range(len(numbers[series]))]

    def _find_tokenizer(self, sp: Path | None) -> ModelFile:
        stated = {} if self.manifest is None else self.manifest["tokenizer"]
        inside = [self.folder / stated["file"]] if stated else sorted(self.folder.glob("*.model"))
        if sp is None and len(inside) != 1:
            raise UsageError(f"{self.folder}: expected one tokenizer file, found {len(inside)}; name one "
                             "with --sp")
        model = ModelFile.read(sp or inside[0])
        wanted = stated.get("sha256", PUBLISHED_TOKENIZER_SHA256)
        if model.sha256 != wanted:
            raise PrepareError(f"{model.path}: expected the tokenizer of these shards, with SHA-256 "
                               f"{str(wanted)[:16]}..., found {model.sha256[:16]}...; name the right one "
                               "with --sp")
        return model

    def stated(self) -> dict[str, dict]:
        """Facts that the manifest states of each file; {} without a manifest."""
        return {} if self.manifest is None else self.manifest["files"]

    def identity(self) -> list:
        """Return what tells this directory from another, or from a later state of itself, by file facts."""
        facts = [(path.name, path.stat()) for path in sorted(self.folder.iterdir())]
        return [str(self.folder.resolve()), self.model.sha256,
                [[name, stat.st_size, stat.st_mtime_ns] for name, stat in facts]]

    def copy_tokenizer(self, target: Path) -> None:
        (target / self.model.path.name).write_bytes(self.model.data)


def _sidecar_name(name: str) -> str:
    return name.replace("fineweb_val_", "fineweb_val_bytes_")


@contextlib.contextmanager
def _continued(out: Path, settings: dict) -> Iterator[Path]:
    """Give a directory beside `out` to write to and rename it to `out` at the end.

    What an interrupted run with equal `settings` left there is kept; refused input leaves nothing.
    """
    out = Path(out)
    if out.exists():
        raise UsageError(f"{out}: expected a new directory to write to, found one that exists; choose "
                         "another OUT")
    staging = out.with_name(out.name + STAGING_NAME)
    recorded = staging / FUSED_SETTINGS_NAME
    settings = json.loads(json.dumps(settings))
    try:
        if not recorded.exists() or json.loads(recorded.read_text("utf-8")) != settings:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            _write_json(recorded, settings)
        yield staging
        for path in [recorded, *staging.glob("*" + _FACTS_SUFFIX)]:
            path.unlink()
        os.rename(staging, out)
    except PrepareError:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    except OSError as error:
        raise PrepareError(f"{out}: expected to read the shards and write new ones, found: "
                           f"{error.strerror or error}; check the disk and run again, finished shards are "
                           "kept") from error


def _convert_shards(convert, source: _ShardFolder, staging: Path, workers: int, what: str,
                    show_progress: bool) -> dict[str, dict]:
    """Call convert(name) for every shard that has no facts in `staging` yet; return the facts by name."""
    if workers < 1:
        raise UsageError(f"--workers {workers}: expected at least 1")
    todo = [name for name in source.names if not (staging / (name + _FACTS_SUFFIX)).exists()]
    sizes = {name: (source.folder / name).stat().st_size for name in source.names}
    size, size_left = sum(sizes.values()), sum(sizes[name] for name in todo)
    bar = tqdm(total=size, initial=size - size_left, unit="B", unit_scale=True, desc=what,
               disable=None if show_progress else True)
    with bar:
        if workers == 1:
            for name in todo:
                convert(name)
                bar.update(sizes[name])
        else:
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(min(workers, len(todo) or 1), context, _follow_parent)
            try:
                for name, _ in zip(todo, pool.map(convert, todo)):
                    bar.update(sizes[name])
            except BrokenProcessPool:
                raise PrepareError(f"expected {workers} worker processes to live, found one dead (out of "
                                   "memory?); run again with fewer --workers") from None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    return {name: json.loads((staging / (name + _FACTS_SUFFIX)).read_text("utf-8")) for name in source.names}


def _learn_merges(source: _ShardFolder, num_merges: int, free: list[int], learn_tokens: int) -> Merges:
    parts, missing = [], learn_tokens
    for name in source.names:
        if name.startswith("fineweb_train_") and missing > 0:
            _, values, _ = _read_shard(source.folder / name, source.stated().get(name))
            parts.append(values[:missing])
            missing -= len(parts[-1])
    if not parts:
        raise PrepareError(f"{source.folder}: expected training shards to learn merges on, found none; give "
                           "a list with --merges-from")
    tokens = np.concatenate(parts)
    learnt_on = {"tokens": len(tokens), "shards": len(parts)}
    return Merges.make(learn(tokens, num_merges, free), source.model, learnt_on)


def _read_shard(path: Path, stated: dict | None) -> tuple[bytes, np.ndarray, dict]:
    """Return (header, values, {"values", "sha256"}) of a whole shard; it must be what a manifest states."""
    with open(path, "rb") as file:
        header, data = file.read(HEADER_BYTES), file.read()
    magic, version, count = np.frombuffer(header[:12].ljust(12, b"\0"), "<i4").tolist()
    if (magic, version, len(data)) != (SHARD_MAGIC, SHARD_VERSION, 2 * count) or count < 1:
        raise PrepareError(f"{path}: expected a complete token shard, found a damaged one; run `verify` on "
                           "its directory")
    sha256 = hashlib.sha256(header)
    sha256.update(data)
    facts = {"values": count, "sha256": sha256.hexdigest()}
    if stated is not None and stated != facts:
        raise PrepareError(f"{path}: expected the file that the manifest lists "
                           f"({str(stated.get('sha256'))[:16]}...), found another "
                           f"({facts['sha256'][:16]}...); build or fetch it again")
    return header, np.frombuffer(data, "<u2"), facts


def _write_shard(path: Path, header: bytes, values: np.ndarray) -> dict:
    """Write `values` under `header` with a new count; return {"values", "sha256"}."""
    header = header[:8] + len(values).to_bytes(4, "little") + header[12:]
    data = values.astype("<u2").tobytes()
    with open(path, "wb") as file:
        file.write(header)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    sha256 = hashlib.sha256(header)
    sha256.update(data)
    return {"values": len(values), "sha256": sha256.hexdigest()}


def _fuse_shard(folder: Path, staging: Path, stated: dict, model: ModelFile, joiner: Joiner,
                name: str) -> None:
    """Join one token shard and its sidecar, and write what came out to NAME.facts.json."""
    header, tokens, source = _read_shard(folder / name, stated.get(name) if stated else None)
    has_sidecar = name.startswith("fineweb_val_")
    try:
        joined, starts = joiner.join(tokens, with_starts=has_sidecar)
    except ValueError as error:
        raise PrepareError(f"{folder / name}: expected ids that the tokenizer gives, found: {error}; the "
                           "shard was joined before or made with another tokenizer") from None
    facts = {"sources": {name: source}, "files": {name: _write_shard(staging / name, header, joined)},
             "bos": int((joined == BOS_ID).sum())}
    if has_sidecar:
        sidecar = _sidecar_name(name)
        header, values, source = _read_shard(folder / sidecar, stated.get(sidecar) if stated else None)
        if len(values) != len(tokens):
            raise PrepareError(f"{folder / sidecar}: expected {len(tokens):,} values like {name}, found "
                               f"{len(values):,}; fetch or build both again")
        sums = join_bytes(values, starts)
        if sums.max() > 0xFFFF:
            raise PrepareError(f"{folder / sidecar}: expected at most 65,535 original bytes per joined "
                               f"token, found {sums.max():,}; ask for fewer --merges")
        exceptions = byte_exceptions(values, split_bytes(joined, sums, joiner.merges, model))
        data = io.BytesIO()
        np.save(data, exceptions)
        kept = _exceptions_name(sidecar)
        (staging / kept).write_bytes(data.getvalue())
        facts["sources"][sidecar] = source
        facts["files"][sidecar] = _write_shard(staging / sidecar, header, sums)
        facts["exceptions"] = {kept: hashlib.sha256(data.getvalue()).hexdigest()}
        facts["sidecar_bytes"] = int(sums.sum())
    _write_json(staging / (name + _FACTS_SUFFIX), facts)


def _exceptions_name(sidecar: str) -> str:
    return sidecar.replace(".bin", ".exceptions.npy")


def _unfuse_shard(folder: Path, staging: Path, stated: dict, model: ModelFile, merges: tuple[Merge, ...],
                  original: dict, name: str) -> None:
    """Split one token shard and its sidecar and check that what comes out is exactly what was joined."""
    header, joined, _ = _read_shard(folder / name, stated.get(name))
    restored = {name: _write_shard(staging / name, header, split_tokens(joined, merges))}
    if name.startswith("fineweb_val_"):
        sidecar = _sidecar_name(name)
        header, sums, _ = _read_shard(folder / sidecar, stated.get(sidecar))
        values = split_bytes(joined, sums, merges, model)
        kept = folder / _exceptions_name(sidecar)
        try:
            exceptions = np.load(kept, allow_pickle=False)
            values[exceptions["place"]] = exceptions["bytes"]
        except (OSError, ValueError, IndexError) as error:
            raise PrepareError(f"{kept}: expected the byte counts that sums forget, found: {error}; copy the "
                               "file from where the shards were joined") from None
        restored[sidecar] = _write_shard(staging / sidecar, header, values)
    for each, facts in restored.items():
        if facts != original.get(each):
            raise PrepareError(f"{folder / each}: expected to restore the shard with SHA-256 "
                               f"{str(original.get(each, {}).get('sha256'))[:16]}..., found "
                               f"{facts['sha256'][:16]}...; the joined shards are damaged, fetch or join "
                               "them again")
    _write_json(staging / (name + _FACTS_SUFFIX), {})


def _merges_of(folder: Path, manifest: dict, model: ModelFile) -> Merges:
    """Read the merges that a manifest names; raise PrepareError unless it was written with them."""
    merges = Merges.read(folder / manifest["merges"]["file"], model)
    if merges.sha256 != manifest["merges"]["sha256"]:
        raise PrepareError(f"{folder / manifest['merges']['file']}: expected the merges that the shards were "
                           f"made with (SHA-256 {manifest['merges']['sha256'][:16]}...), found others "
                           f"({merges.sha256[:16]}...); copy the file from where the shards were made")
    return merges


def _fused_manifest(source: _ShardFolder, merges: Merges, facts: dict[str, dict]) -> dict:
    """Return the manifest of joined shards; it holds that of the source, so that `unfuse` can restore it."""
    series = {"val": [facts[name] for name in source.names if "_val_" in name],
              "train": [facts[name] for name in source.names if "_train_" in name]}
    model = source.model
    base = source.manifest or {
        "format": 1, "transform": lossless_caps.TRANSFORM,
        "tokenizer": {"file": model.path.name, "sha256": model.sha256, "vocab_size": len(model.pieces),
                      "bos_id": BOS_ID, "operator_ids": OPERATOR_IDS},
        "shard_tokens": DEFAULT_SHARD_TOKENS, "edge_bytes": "drop", "train": {}, "val": {}}
    documents = {split: sum(each["bos"] for each in parts) for split, parts in series.items()}
    tokens = {split: sum(values["values"] for each in parts for name, values in each["files"].items()
                         if "_val_bytes_" not in name) for split, parts in series.items()}
    everything = series["train"] + series["val"]
    return base | {
        "docs_val": documents["val"], "docs_train": documents["train"],
        "files": {name: values for each in everything for name, values in each["files"].items()},
        "train": base["train"] | {"tokens": tokens["train"], "bos": documents["train"]},
        "val": base["val"] | {"tokens": tokens["val"], "bos": documents["val"],
                              "sidecar_bytes": sum(each["sidecar_bytes"] for each in series["val"])},
        "merges": {"file": MERGES_NAME, "sha256": merges.sha256, "count": len(merges.merges),
                   "exceptions": {name: sha256 for each in series["val"]
                                  for name, sha256 in each["exceptions"].items()}},
        "fused_from": {"manifest": source.manifest,
                       "files": {name: values for each in everything
                                 for name, values in each["sources"].items()}}}


# -----------------------------------------------------------------------------
# Command line

def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code (0 done, 1 a check or the run failed, 2 bad usage, also when
    what is named is not there, 130 interrupted)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"build": _build_command, "verify": _verify_command, "download": _download_command,
                "fuse": _fuse_command, "unfuse": _unfuse_command}
    is_named = bool(arguments) and arguments[0] in commands
    command = commands[arguments[0]] if is_named else _build_command
    try:
        exit_code = command(arguments[1:] if is_named else arguments)
        sys.stdout.flush()
        return exit_code
    except PrepareError as error:
        print(f"prepare_caseops_data.py: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("prepare_caseops_data.py: interrupted; no half-written file has a final name, run again",
              file=sys.stderr)
        return 130
    except OSError as error:
        if error.filename is None:
            # Standard output: close it on our terms, or the interpreter reports the error again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):        # then the reader has left, which needs no words
            print(f"prepare_caseops_data.py: {error.filename or 'standard output'}: expected to read or "
                  f"write it, found: {error.strerror}; check the path, its permissions and the disk",
                  file=sys.stderr)
    return 1


def _verify_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="prepare_caseops_data.py verify",
        description="Read every value of a shard directory, ours or another's, and say what is wrong.",
        epilog="Exit code 1 and one sentence for each violation.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--overlap-limit", type=float, default=OVERLAP_LIMIT, metavar="SHARE",
                        help="share of validation documents that may recur in training (default %(default)s)")
    options = parser.parse_args(arguments)
    if not 0 <= options.overlap_limit <= 1:
        parser.error(f"--overlap-limit {options.overlap_limit}: expected 0 to 1")
    return _print_violations(verify(options.folder, options.overlap_limit))


def _print_violations(violations: list[str]) -> int:
    for sentence in violations:
        print(f"violation: {sentence}")
    print(f"verify violations:{len(violations)}")
    return 1 if violations else 0


def _download_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="prepare_caseops_data.py download",
        description="Fetch the published CaseOps shards and tokenizer and verify them. Run again to resume.")
    parser.add_argument("--out", type=Path, default=DEFAULT_DOWNLOAD_ROOT, metavar="ROOT",
                        help=f"the shards go to ROOT/{PUBLISHED_NAME} (default {DEFAULT_DOWNLOAD_ROOT})")
    parser.add_argument("--train-shards", type=int, default=PUBLISHED_TRAIN_SHARDS, metavar="N",
                        help="training shards of 10^8 tokens, 200 MB each (default %(default)s)")
    parser.add_argument("--repo", default=PUBLISHED_REPO, help="dataset repository (default %(default)s)")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.train_shards < 1:
        parser.error(f"--train-shards {options.train_shards}: expected at least 1")
    folder = download(options.out, options.repo, options.revision, options.train_shards)
    exit_code = _print_violations(verify(folder))
    print(f"DATA_PATH={folder}")
    print(f"TOKENIZER_PATH={next(iter(sorted(folder.glob('*.model'))))}")
    return exit_code


def _merges(text: str) -> int | None:
    if text != "all" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a number or `all`, found {text!r}")
    return None if text == "all" else int(text)


def _fuse_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="prepare_caseops_data.py fuse",
        description="Join frequent pairs of tokens into ids that the tokenizer can never give, in every "
                    "shard and in the byte sidecar of a directory. Run again to resume; `unfuse` is the "
                    "exact inverse.",
        epilog="The merges are learnt on training shards only and kept in OUT/merges.json.")
    parser.add_argument("folder", type=Path, metavar="IN")
    parser.add_argument("out", type=Path, metavar="OUT", help="a directory that does not exist yet")
    parser.add_argument("--reuse", action="store_true", help="keep an OUT that was joined from just these shards")
    parser.add_argument("--merges", type=_merges, required=True, metavar="N",
                        help="pairs to join, one free id for each, or `all`: as many as there are such ids")
    parser.add_argument("--merges-from", type=Path, metavar="FILE",
                        help="use the first N merges of this merges.json instead of learning them")
    parser.add_argument("--learn-tokens", type=int, default=DEFAULT_LEARN_TOKENS, metavar="N",
                        help="learn on the first N tokens of the training shards (default %(default)s)")
    _add_conversion_options(parser)
    options = parser.parse_args(arguments)
    if options.learn_tokens < 1:
        parser.error(f"--learn-tokens {options.learn_tokens}: expected at least 1")
    if options.reuse and options.out.exists():
        _require_joined_from(options.folder, options.out)
        return 0
    manifest = fuse(options.folder, options.out, options.merges, options.sp, options.merges_from,
                    options.learn_tokens, options.workers)
    for series in ("train", "val"):
        before = sum(facts["values"] for name, facts in manifest["fused_from"]["files"].items()
                     if name.startswith(f"fineweb_{series}_0"))
        after = manifest[series]["tokens"]
        print(f"fuse series:{series} tokens_before:{before} tokens:{after} "
              f"saved:{1 - after / max(1, before):.4f}")
    print(f"fuse merges:{manifest['merges']['count']} sha256:{manifest['merges']['sha256'][:16]} "
          f"sidecar_bytes:{manifest['val']['sidecar_bytes']}")
    print(f"DATA_PATH={options.out}")
    return 0


def _unfuse_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="prepare_caseops_data.py unfuse",
        description="Restore the directory that `fuse` made IN from, to the last byte. Run again to resume.")
    parser.add_argument("folder", type=Path, metavar="IN")
    parser.add_argument("out", type=Path, metavar="OUT", help="a directory that does not exist yet")
    _add_conversion_options(parser)
    options = parser.parse_args(arguments)
    unfuse(options.folder, options.out, options.sp, options.workers)
    print(f"DATA_PATH={options.out}")
    return 0


def _add_conversion_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sp", type=Path, metavar="MODEL", help="tokenizer (default: the one in IN)")
    parser.add_argument("--workers", type=int, default=1, metavar="N",
                        help="processes, one shard each; the output does not depend on it (default 1)")


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare_caseops_data.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Build CaseOps token shards from documents, or train a CaseOps tokenizer, or both.\n"
                    "Other commands: `verify DIR`, `download`, `fuse IN OUT` and `unfuse IN OUT`, each with\n"
                    "its own --help.",
        epilog="The validation split is the first --val-docs documents of --docs. With --val-docs-file it\n"
               "is the first ones of that file (all by default), and all of --docs is training data.")
    add = parser.add_argument
    add("--docs", type=Path, required=True, metavar="FILE",
        help="JSON Lines with a string `text`: .jsonl, .gz, .xz, .zst")
    add("--out", type=Path, metavar="DIR", help="directory for shards, sidecar, tokenizer and manifest")
    add("--sp", type=Path, metavar="MODEL",
        help=f"tokenizer to use (default tokenizers/{SHIPPED_TOKENIZER.name}), or with --train-tokenizer to "
             "write (default caseops_VOCAB_SIZE.model in --out)")
    add("--val-docs", type=int, metavar="N", help=f"validation documents (default {DEFAULT_VAL_DOCS:,})")
    add("--val-docs-file", type=Path, metavar="FILE", help="take validation documents from this file")
    add("--train-docs", type=int, metavar="N", help="use at most N training documents")
    add("--max-train-tokens", type=int, metavar="N",
        help="stop before the training document that would exceed N tokens")
    add("--shard-tokens", type=int, default=DEFAULT_SHARD_TOKENS, metavar="N", help="default 10^8")
    add("--edge-bytes", choices=("drop", "attach"), default="drop",
        help="bytes of white space stripped at document edges: in no token (default), or added to the "
             "outer tokens")
    add("--workers", type=int, default=1, metavar="N",
        help="processes; the output does not depend on it (default 1)")
    add("--overwrite", action="store_true", help="first remove the shards that DIR has")
    add("--train-tokenizer", type=int, metavar="VOCAB_SIZE",
        help="first train a tokenizer on the training documents")
    add("--tokenizer-sources", metavar="A,B",
        help="train it only on records with one of these `source` fields; `free` stands for "
             + ",".join(FREE_SOURCES))
    return parser


def _build_command(arguments: list[str]) -> int:
    parser = _build_parser()
    options = parser.parse_args(arguments)
    vocab_size, model_path = options.train_tokenizer, options.sp or SHIPPED_TOKENIZER
    if options.out is None and vocab_size is None:
        parser.error("give --out DIR to build shards, or --train-tokenizer VOCAB_SIZE, or both")
    if options.tokenizer_sources and vocab_size is None:
        parser.error("--tokenizer-sources needs --train-tokenizer")
    if vocab_size is not None:
        if not 264 < vocab_size <= 65536:
            parser.error(f"--train-tokenizer {vocab_size}: expected 265 to 65,536")
        if options.sp is None and options.out is None:
            parser.error("--train-tokenizer needs --sp MODEL or --out DIR to know where to write")
        model_path = options.sp or options.out / f"caseops_{vocab_size}.model"
        if model_path.exists() and not options.overwrite:
            parser.error(f"{model_path} exists; leave out --train-tokenizer and pass it with --sp to use it, "
                         "choose another --sp, or pass --overwrite to replace it")
    least_values = {"val_docs": 0, "train_docs": 0, "max_train_tokens": 1, "shard_tokens": 1, "workers": 1}
    for name, least in least_values.items():
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: expected at least {least}")

    if vocab_size is not None:
        if options.out is not None:
            _old_shards(options.out, options.overwrite)       # training takes minutes, so ask before it
        skip = 0 if options.val_docs_file else resolve_val_docs(options.docs, options.val_docs)
        names = options.tokenizer_sources
        names = FREE_SOURCES if names == "free" else names.split(",") if names else ()
        documents = training_documents(options.docs, skip, names, show_progress=True)
        try:
            model = write_tokenizer(model_path, train_tokenizer(documents, vocab_size))
        except PrepareError as error:
            raise PrepareError(f"{error} (training reads the documents after the first {skip:,})") from None
        print(f"tokenizer file:{model_path} vocab_size:{len(model.pieces)} sha256:{model.sha256}")
    if options.out is not None:
        manifest = build(options.docs, options.out, model_path, options.val_docs, options.val_docs_file,
                         options.workers, options.shard_tokens, options.edge_bytes, options.overwrite,
                         options.train_docs, options.max_train_tokens)
        _report(options.out, manifest)
    return 0


def _report(out: Path, manifest: dict) -> None:
    train, val = manifest["train"], manifest["val"]
    if not manifest["docs_train"]:
        print("there are no training documents: all of them are validation", file=sys.stderr)
    print(f"train documents:{manifest['docs_train']} tokens:{train['tokens']}")
    print(f"val documents:{manifest['docs_val']} tokens:{val['tokens']} sidecar_bytes:{val['sidecar_bytes']} "
          f"original_bytes:{val['original_bytes']} edge_bytes:{val['edge_bytes']}")
    print(f"DATA_PATH={out}")
    print(f"TOKENIZER_PATH={out / manifest['tokenizer']['file']}")


if __name__ == "__main__":
    sys.exit(main())
