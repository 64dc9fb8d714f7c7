"""Turn documents into the token shards that train_gpt.py reads: CaseOps transform, tokenizer, byte sidecar, manifest.

    python prepare_caseops_data.py --docs docs.jsonl --out DIR                    # build shards
    python prepare_caseops_data.py --docs docs.jsonl --train-tokenizer 8192 --sp my.model

Documents are JSON Lines with a string field `text` (plain, .gz, .xz or .zst). The first --val-docs documents
are the validation split and never enter the training shards. The output does not depend on --workers.

Contents: documents · tokenizer files · encoding · shards · build · training a tokenizer · command line
"""

import argparse
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import lzma
import multiprocessing
import os
import re
import shutil
import sys
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

import lossless_caps

SHARD_MAGIC, SHARD_VERSION = 20240520, 1
HEADER_BYTES = 1024
DEFAULT_SHARD_TOKENS = 10**8
DEFAULT_VAL_DOCS = 50_000
BOS_ID = 1
OPERATOR_IDS = [4, 5, 6, 7]
SHIPPED_TOKENIZER = Path(__file__).resolve().parent / "tokenizers" / "caseops_8192.model"
OFFICIAL_CHARSMAP_SHA256 = "51d3684747b35ef99cd4802f37cc1ee0c6bec4d060814f774efb1066d3c167f2"
MANIFEST_NAME = "manifest.json"
STAGING_NAME = ".partial"
SHARD_NAME = re.compile(r"fineweb_(train|val|val_bytes)_(\d{6})\.bin")
FREE_SOURCES = ("wikipedia", "podcasts", "digitalgov", "novels", "speeches", "c4", "fineweb", "fineweb_edu")


class PrepareError(Exception):
    """Something a user or a file caused; the message says what was expected, what was found and how to fix it."""


# -----------------------------------------------------------------------------
# Documents: JSON Lines in, batches of raw lines out, numbered over the whole file

_BATCH_BYTES = 1 << 19
_READ_BYTES = 1 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")


class DocumentFile:
    """A JSON Lines file, decompressed by its suffix and hashed as stored while it is read.

    After `finish()`, `sha256` is that of the whole file even when reading stopped early.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            self._raw = _HashingReader(self.path)
        except OSError as error:
            raise PrepareError(f"{path}: expected a readable document file, found: {error.strerror}; "
                               "check the path") from None
        self.size = self.path.stat().st_size
        suffix = self.path.suffix
        if suffix == ".gz":
            stream = gzip.GzipFile(fileobj=self._raw)
        elif suffix == ".xz":
            stream = lzma.LZMAFile(self._raw)
        elif suffix == ".zst":
            stream = _ZstdReader(self._raw)
        else:
            stream = self._raw
        self._stream = io.BufferedReader(stream, _READ_BYTES)

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
            raise PrepareError(f"{self.path}: expected complete {self.path.suffix} data, found damage or an early end "
                               f"after line {number:,} ({error}); fetch the file again") from None

    def finish(self) -> str:
        """Read what is left, close, and return the SHA-256 of the stored file."""
        while self._raw.read(_READ_BYTES):
            pass
        self._raw.close()
        return self._raw.sha256.hexdigest()


class _HashingReader(io.RawIOBase):
    def __init__(self, path: Path):
        self._file = open(path, "rb", buffering=0)
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
    """Decompress concatenated zstd frames, refusing a truncated one (the library's own reader just ends there)."""

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
        if split is None and is_document:
            break
        if batch and (batch_bytes >= _BATCH_BYTES or is_document and split != batch.split):
            yield batch
            batch = None
        if not batch:
            batch, batch_bytes = Batch(str(source.path), split or "none", number, documents, []), 0
        batch.lines.append(line)
        batch_bytes += len(line)
        batch.num_documents += is_document
        documents += is_document
    if batch and batch.num_documents:
        yield batch


@dataclasses.dataclass(frozen=True)
class SplitRule:
    """Which split a document index belongs to: below `val_docs` validation, then `train_docs` (None: all) training."""
    val_docs: int
    train_docs: int | None

    def __call__(self, document: int) -> str | None:
        if document < self.val_docs:
            return "val"
        return "train" if self.train_docs is None or document < self.val_docs + self.train_docs else None


def parse_documents(batch: Batch) -> Iterator[tuple[int, str, int, dict]]:
    """Yield (document index, text without lone surrogates, number replaced, record) for each non-blank line.

    Raises PrepareError with file, line and document number for malformed JSON and a missing or non-string `text`.
    """
    document = batch.first_document
    for number, line in enumerate(batch.lines, start=batch.first_line):
        if line.isspace():
            continue
        where = f"{batch.path} line {number:,} (document {document:,})"
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            raise PrepareError(f"{where}: expected UTF-8, found {error.reason} at byte {error.start} of the line; "
                               "fix or remove the line") from None
        except ValueError as error:
            raise PrepareError(f"{where}: expected one JSON object, found malformed JSON ({error}); "
                               "fix or remove the line") from None
        except RecursionError:
            raise PrepareError(f"{where}: expected one JSON object with a string `text`, found JSON nested too deeply; "
                               "fix or remove the line") from None
        if isinstance(record, str):
            record = {"text": record}
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            found = (f"`text` of type {type(text).__name__}" if isinstance(record, dict) and "text" in record else
                     f"keys {sorted(record)[:8]}" if isinstance(record, dict) else f"a JSON {type(record).__name__}")
            raise PrepareError(f"{where}: expected an object with a string field `text`, found {found}; "
                               "fix or remove the line")
        replaced = 0
        if not text.isascii():
            text, replaced = _SURROGATE.subn("\ufffd", text)
        yield document, text, replaced, record
        document += 1


# -----------------------------------------------------------------------------
# Tokenizer files: the few facts needed from the model file, read without the protobuf package

def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _proto_fields(data: bytes) -> Iterator[tuple[int, int | bytes, bytes]]:
    """Yield (field number, value, field as stored) of one protobuf message; non-varint values are bytes."""
    at = 0
    while at < len(data):
        start = at
        key, at = _read_varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _read_varint(data, at)
        else:
            if wire == 2:
                size, at = _read_varint(data, at)
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
            else:
                raise IndexError(f"wire type {wire}")
            value = data[at:at + size]
            at += size
            if len(value) != size:
                raise IndexError("cut short")
        yield key >> 3, value, data[start:at]


def _proto_dict(data: bytes) -> dict[int, int | bytes]:
    return {number: value for number, value, _ in _proto_fields(data)}


def _bytes_field(number: int, value: bytes) -> bytes:
    """Return a length-delimited protobuf field as stored."""
    stored, size = bytearray([number << 3 | 2]), len(value)
    while size > 127:
        stored.append(size & 127 | 128)
        size >>= 7
    stored.append(size)
    return bytes(stored) + value


# Field numbers of sentencepiece_model.proto.
_PIECES, _TRAINER_SPEC, _NORMALIZER_SPEC = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_NORMAL, _USER_DEFINED, _BYTE = 1, 4, 6
_MODEL_TYPE, _BPE = 3, 2
_MODEL_PREFIX, _MAX_SENTENCE_LENGTH, _WHITESPACE_SUFFIX = 2, 18, 24
_NORMALIZER_NAME, _CHARSMAP, _DUMMY_PREFIX, _REMOVE_EXTRA_SPACES, _ESCAPE_SPACES = 1, 2, 3, 4, 5


@dataclasses.dataclass
class ModelFile:
    """What matters of a SentencePiece model file."""
    path: Path
    data: bytes
    sha256: str
    pieces: list[tuple[str, int]]         # (text, type) in id order
    charsmap: bytes
    has_exact_memo: bool                  # fragments between spaces may be encoded on their own
    no_memo_reason: str

    @classmethod
    def read(cls, path: Path) -> "ModelFile":
        """Read and check a CaseOps tokenizer; raise PrepareError when its layout is not the one of this project."""
        path = Path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise PrepareError(f"{path}: expected a SentencePiece model, found: {error.strerror}; name one with --sp "
                               "or train one with --train-tokenizer") from None
        pieces, trainer, normalizer = [], {}, {}
        try:
            for field, value, _ in _proto_fields(data):
                if field == _PIECES:
                    piece = _proto_dict(value)
                    pieces.append((piece[_PIECE_TEXT].decode("utf-8"), piece.get(_PIECE_TYPE, _NORMAL)))
                elif field == _TRAINER_SPEC:
                    trainer = _proto_dict(value)
                elif field == _NORMALIZER_SPEC:
                    normalizer = _proto_dict(value)
        except (IndexError, KeyError, AttributeError, TypeError, ValueError):
            raise PrepareError(f"{path}: expected a SentencePiece model file, found {len(data):,} bytes of something "
                               "else or a damaged file; fetch it again") from None
        _check_layout(path, pieces)

        charsmap = normalizer.get(_CHARSMAP, b"")
        reason = ""
        if trainer.get(_MODEL_TYPE, 1) != _BPE:
            reason = "it is not a BPE model"
        elif hashlib.sha256(charsmap).hexdigest() != OFFICIAL_CHARSMAP_SHA256:
            reason = "its character map is not the official one"
        elif (normalizer.get(_DUMMY_PREFIX, 1), normalizer.get(_REMOVE_EXTRA_SPACES, 1),
              normalizer.get(_ESCAPE_SPACES, 1), trainer.get(_WHITESPACE_SUFFIX, 0)) != (0, 1, 1, 0):
            reason = "it treats white space differently"
        elif any("\u2581" in text[1:] for text, kind in pieces if kind == _NORMAL):
            reason = "a piece has a space after its first character"
        elif [text for text, kind in pieces if kind == _USER_DEFINED] != list(lossless_caps.OPERATORS):
            reason = "it has user-defined pieces besides the operators"
        return cls(path, data, hashlib.sha256(data).hexdigest(), pieces, charsmap, not reason, reason)


def _check_layout(path: Path, pieces: list[tuple[str, int]]) -> None:
    """Raise PrepareError unless BOS, operators and bytes have the ids that the format promises."""
    hint = "use a tokenizer made by --train-tokenizer or the official CaseOps one"
    if not 264 <= len(pieces) <= 65536:
        raise PrepareError(f"{path}: expected 264 to 65,536 pieces, found {len(pieces):,}; {hint}")
    found = [pieces[i][0] for i in OPERATOR_IDS]
    kinds = [pieces[i][1] for i in OPERATOR_IDS]
    if found != list(lossless_caps.OPERATORS) or kinds != [_USER_DEFINED] * 4:
        raise PrepareError(f"{path}: expected the operators U+E001 to U+E004 as user-defined ids 4 to 7, found "
                           f"{[ascii(piece) for piece in found]}; {hint}")
    if pieces[BOS_ID][0] != "<s>":
        raise PrepareError(f"{path}: expected <s> with id {BOS_ID}, found {pieces[BOS_ID][0]!r}; {hint}")
    if any(kind != _BYTE for _, kind in pieces[8:264]):
        raise PrepareError(f"{path}: expected the 256 byte pieces as ids 8 to 263, found others; {hint}")


# -----------------------------------------------------------------------------
# Encoding: documents to token ids, and for validation to original bytes per token

class Tokenizer:
    """The SentencePiece library behind the two questions asked of it: ids, and ids with their spans.

    Which alignment call exists depends on the release; `alignment` says which one was chosen.
    """

    def __init__(self, model: ModelFile):
        self.model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model.data)
        except RuntimeError as error:
            raise PrepareError(f"{model.path}: SentencePiece {sentencepiece.__version__} cannot load it "
                               f"({error}); fetch it again") from None
        if hasattr(self._processor, "encode_as_offset_mapping"):
            self.alignment = "encode_as_offset_mapping"
        elif hasattr(self._processor, "encode_as_immutable_proto"):
            self.alignment = "encode_as_immutable_proto"
        else:
            raise PrepareError(f"SentencePiece {sentencepiece.__version__} offers neither encode_as_offset_mapping nor "
                               "encode_as_immutable_proto, found in 0.2.0 to 0.2.3; install one of those")

    def ids(self, caseops: str) -> list[int]:
        return self._processor.encode(caseops)

    def ids_of_each(self, caseops: list[str]) -> list[list[int]]:
        # One thread: worker processes, not the library, use the other cores.
        return self._processor.encode(caseops, num_threads=1)

    def align(self, caseops: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and, for each, its half-open span of code points in `caseops`."""
        if self.alignment == "encode_as_offset_mapping":
            mapping = self._processor.encode_as_offset_mapping(caseops)
            return mapping["ids"], mapping["offsets"]
        pieces = self._processor.encode_as_immutable_proto(caseops).pieces
        return [piece.id for piece in pieces], [(piece.begin, piece.end) for piece in pieces]


def encode_document(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int], int, int]:
    """Return (ids, original bytes per id, lead, trail) of one document, without BOS: the definition of the format.

    lead, trail   original bytes before the first and after the last token's span; in no per-token value.
    The sum of everything is the UTF-8 length of `text`, which must hold no lone surrogates.
    """
    caseops = lossless_caps.encode(text)
    ids, spans = tokenizer.align(caseops)
    bytes_before = list(itertools.accumulate(lossless_caps.byte_weights(caseops), initial=0))
    if not ids:
        return [], [], bytes_before[-1], 0
    values = [bytes_before[end] - bytes_before[begin] for begin, end in spans]
    return ids, values, bytes_before[spans[0][0]], bytes_before[-1] - bytes_before[spans[-1][1]]


class DocumentEncoder:
    """`encode_document` made fast by remembering what each space-separated fragment encodes to.

    Exact, because no word, normalization rule or piece crosses a space: after the first token of a document,
    " " + fragment always gives the same ids. Leading and trailing white space inside a fragment, empty fragments
    and deleted characters only move bytes, which the loop in `ids_and_bytes` carries to the next token.
    A tokenizer for which that is not known to hold is asked for whole documents instead.
    """

    # An entry takes roughly 300 bytes; past these limits the memo starts afresh, which changes speed, not output.
    MAX_ENTRIES = 1 << 19
    MAX_CHARACTERS = 1 << 25

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._memo_ids: dict[str, bytes] = {}
        self._memo_bytes: dict[str, tuple[bytes, bytes, int]] = {}
        self._memo_characters = 0

    def ids(self, texts: list[str]) -> list[bytes]:
        """Return the native uint16 token stream of each document, BOS first."""
        bos = array("H", [BOS_ID]).tobytes()
        if not self.tokenizer.model.has_exact_memo:
            return [bos + array("H", self.tokenizer.ids(lossless_caps.encode(text))).tobytes() for text in texts]
        heads, bodies = [], []
        for text in texts:
            fragments = _fragments(text)
            head: list[int] = []
            at = 0
            while at < len(fragments) and not head:
                head = self.tokenizer.ids(lossless_caps.encode(fragments[at])) if fragments[at] else []
                at += 1
            heads.append(bos + array("H", head).tobytes())
            bodies.append(fragments[at:])
        self._learn_ids(bodies)
        lookup = self._memo_ids.__getitem__
        return [head + b"".join(map(lookup, body)) for head, body in zip(heads, bodies)]

    def ids_and_bytes(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray, int, int]]:
        """Return (uint16 tokens with BOS, uint32 original bytes of each, lead, trail) of each document."""
        if not self.tokenizer.model.has_exact_memo:
            return [self._whole(text) for text in texts]
        bodies = [_fragments(text) for text in texts]
        self._learn_bytes(bodies)
        return [self._assemble(body) for body in bodies]

    def _whole(self, text: str) -> tuple[np.ndarray, np.ndarray, int, int]:
        ids, values, lead, trail = encode_document(self.tokenizer, text)
        return np.array([BOS_ID, *ids], np.uint16), np.array([0, *values], np.uint32), lead, trail

    def _assemble(self, fragments: list[str]) -> tuple[np.ndarray, np.ndarray, int, int]:
        lead = at = 0
        tail = 0
        ids, values = [], []
        while at < len(fragments) and not ids:
            ids, values, before, tail = encode_document(self.tokenizer, fragments[at])
            # The space after a fragment that leaves no token belongs to the edge, too.
            lead += before + (0 if ids else at + 1 < len(fragments))
            at += 1
        ids_parts, values_parts = [array("H", [BOS_ID, *ids]).tobytes()], [array("I", [0, *values]).tobytes()]
        count = 1 + len(ids)
        carried: list[tuple[int, int]] = []       # (token position, bytes of folded white space before it)
        memo = self._memo_bytes
        for fragment in itertools.islice(fragments, at, None):
            fragment_ids, fragment_values, fragment_tail = memo[fragment]
            if fragment_ids:
                if tail:
                    carried.append((count, tail))
                    tail = 0
                ids_parts.append(fragment_ids)
                values_parts.append(fragment_values)
                count += len(fragment_ids) >> 1
            tail += fragment_tail
        bytes_per_token = np.frombuffer(b"".join(values_parts), np.uint32).copy()
        for position, extra in carried:
            bytes_per_token[position] += extra
        return np.frombuffer(b"".join(ids_parts), np.uint16), bytes_per_token, lead, tail

    def _learn_ids(self, bodies: list[list[str]]) -> None:
        missing = self._missing(bodies, self._memo_ids)
        # Fragments hold no newline, so one transform serves all. The operator in front keeps the leading space,
        # which the normalizer would strip; its own id is dropped again.
        caseops = lossless_caps.encode("\n".join(missing)).split("\n")
        for fragment, ids in zip(missing, self.tokenizer.ids_of_each([_CONTEXT + part for part in caseops])):
            self._memo_ids[fragment] = array("H", ids[1:]).tobytes()

    def _learn_bytes(self, bodies: list[list[str]]) -> None:
        missing = self._missing(bodies, self._memo_bytes)
        caseops = lossless_caps.encode("\n".join(missing)).split("\n")
        for fragment, part in zip(missing, caseops):
            in_context = _CONTEXT + part
            ids, spans = self.tokenizer.align(in_context)
            before = list(itertools.accumulate(lossless_caps.byte_weights(in_context), initial=0))
            values = [before[end] - before[begin] for begin, end in spans[1:]]
            self._memo_bytes[fragment] = (array("H", ids[1:]).tobytes(), array("I", values).tobytes(),
                                          before[-1] - before[spans[-1][1]])

    def _missing(self, bodies: list[list[str]], memo: dict) -> list[str]:
        if len(memo) > self.MAX_ENTRIES or self._memo_characters > self.MAX_CHARACTERS:
            memo.clear()
            self._memo_characters = 0
        missing = list(set().union(*bodies).difference(memo))
        self._memo_characters += sum(map(len, missing))
        return missing


_CONTEXT = lossless_caps.TITLE + " "


def _fragments(text: str) -> list[str]:
    # A newline is white space of one byte like the space, so it may stand in for it.
    return text.replace("\n", " ").split(" ")


@dataclasses.dataclass
class EncodedBatch:
    """What a worker returns: raw arrays and sums, so that little crosses the process border."""
    num_documents: int
    tokens: bytes                         # native uint16, every document with its BOS
    lengths: bytes                        # native int64, tokens of each document
    sidecar: bytes                        # native uint16 like tokens, empty for training documents
    text_bytes: int
    edge_bytes: int
    empty_documents: int
    replaced_surrogates: int


def encode_batch(encoder: DocumentEncoder, batch: Batch, edge_bytes: str) -> EncodedBatch:
    """Encode the documents of one batch; sidecar values only for validation."""
    documents, texts, replaced_total, text_bytes = [], [], 0, 0
    for document, text, replaced, _ in parse_documents(batch):
        documents.append(document)
        texts.append(text)
        replaced_total += replaced
        text_bytes += len(text) if text.isascii() else len(text.encode("utf-8"))
    if batch.split != "val":
        streams = encoder.ids(texts)
        lengths = np.array([len(stream) >> 1 for stream in streams], np.int64)
        return EncodedBatch(len(texts), b"".join(streams), lengths.tobytes(), b"", text_bytes, 0,
                            int((lengths == 1).sum()), replaced_total)

    tokens_parts, sidecar_parts, lengths, edge_total = [], [], [], 0
    for document, (tokens, values, lead, trail) in zip(documents, encoder.ids_and_bytes(texts)):
        edge_total += lead + trail
        if edge_bytes == "attach" and len(tokens) > 1:
            values[1] += lead
            values[-1] += trail
        if len(values) and values.max() > 0xFFFF:
            at = int(values.argmax())
            raise PrepareError(
                f"{batch.path} document {document:,}: expected at most 65,535 original bytes per token, found "
                f"{int(values[at]):,} for token {at:,} (a very long run of white space?); shorten the run in the source")
        tokens_parts.append(tokens.tobytes())
        sidecar_parts.append(values.astype(np.uint16).tobytes())
        lengths.append(len(tokens))
    lengths = np.array(lengths, np.int64)
    return EncodedBatch(len(texts), b"".join(tokens_parts), lengths.tobytes(), b"".join(sidecar_parts), text_bytes,
                        edge_total, int((lengths == 1).sum()), replaced_total)


_worker_encoder: DocumentEncoder | None = None


def _start_worker(model_path: Path) -> None:
    global _worker_encoder
    _worker_encoder = DocumentEncoder(Tokenizer(ModelFile.read(model_path)))


def _work(batch: Batch, edge_bytes: str) -> EncodedBatch:
    return encode_batch(_worker_encoder, batch, edge_bytes)


def encode_batches(todo: Iterable[Batch], model: ModelFile, edge_bytes: str, workers: int) -> Iterator[EncodedBatch]:
    """Yield the encoded form of each batch in order, whatever the number of processes."""
    if workers == 1:
        encoder = DocumentEncoder(Tokenizer(model))
        for batch in todo:
            yield encode_batch(encoder, batch, edge_bytes)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (model.path,))
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
        raise PrepareError(f"a worker process died (out of memory?); expected {workers} workers to live, "
                           "run again with fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# -----------------------------------------------------------------------------
# Shards: one continuous stream of uint16 values cut into files of equal length

class ShardWriter:
    """Write `PREFIX_%06d.bin` files of at most `shard_tokens` values and remember their lengths and hashes."""

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
            self._file.close()
            self._file = None

    def _open(self) -> None:
        self._path = self._folder / f"{self._prefix}_{len(self.files):06d}.bin"
        self._file = open(self._path, "w+b")
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

    val_docs          validation documents: the first ones of `docs`, or of `val_docs_file` when given. None means
                      what the source manifest beside `docs` says, else 50,000, or all of `val_docs_file`.
    train_docs        at most this many training documents (None: all).
    max_train_tokens  stop before the training document that would exceed this many tokens (None: never).
    edge_bytes        "drop" leaves bytes of stripped white space out of the sidecar, "attach" adds them to the
                      document's first and last token.
    Raises PrepareError for bad input, a directory in use and a full disk; `out` is then as it was before, save that
    `overwrite` has removed the earlier build.
    """
    docs, out = Path(docs), Path(out)
    model = ModelFile.read(sp)
    if not 0 < shard_tokens < 2**31:
        raise PrepareError(f"--shard-tokens {shard_tokens}: expected 1 to {2**31 - 1:,}")
    if edge_bytes not in ("drop", "attach"):
        raise PrepareError(f"--edge-bytes {edge_bytes!r}: expected drop or attach")
    if workers < 1:
        raise PrepareError(f"--workers {workers}: expected at least 1")
    val_docs_given = val_docs is not None or val_docs_file is not None
    sources = _sources(docs, val_docs_file, val_docs, train_docs)
    if not model.has_exact_memo:
        print(f"encoding:whole-documents reason:\"{model.no_memo_reason}\" (exact, but several times slower)", file=sys.stderr)

    settings = {"docs": str(docs.resolve()), "val_docs_file": str(val_docs_file), "tokenizer": model.sha256,
                "val_docs": val_docs, "shard_tokens": shard_tokens, "edge_bytes": edge_bytes,
                "train_docs": train_docs, "max_train_tokens": max_train_tokens}
    finished = _claim(out, settings, overwrite)
    if finished:
        return finished
    staging = out / STAGING_NAME
    try:
        manifest = _write_splits(staging, sources, model, shard_tokens, edge_bytes, workers, max_train_tokens,
                                 show_progress)
        if not manifest["docs_train"] and not val_docs_given:
            raise PrepareError(f"{docs}: expected more than {DEFAULT_VAL_DOCS:,} documents, found "
                               f"{manifest['docs_val']:,}, so nothing is left for training; choose a smaller --val-docs")
        shutil.copyfile(model.path, staging / model.path.name)
        # From here on an interrupted run is completed by the next one, because the staged manifest is there.
        _write_json(staging / MANIFEST_NAME, manifest)
        _publish(out)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise PrepareError(f"{out}: expected room to write, found: {error.strerror or error}; "
                           "free some space or choose another --out, then run again") from error
    except Exception:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return manifest


def _sources(docs: Path, val_docs_file: Path | None, val_docs: int | None,
             train_docs: int | None) -> list[tuple[DocumentFile, SplitRule]]:
    """Open the document files in writing order, each with its rule of which document goes to which split."""
    if val_docs_file is None:
        stated = _stated_val_docs(docs)
        if stated is not None and val_docs not in (None, stated):
            raise PrepareError(f"--val-docs {val_docs:,}: expected {stated:,} as the source manifest beside {docs} "
                               "states; leave the option out")
        if val_docs is None:
            val_docs = DEFAULT_VAL_DOCS if stated is None else stated
        return [(DocumentFile(docs), SplitRule(val_docs, train_docs))]
    if docs.resolve() == Path(val_docs_file).resolve():
        raise PrepareError(f"--val-docs-file {val_docs_file}: expected another file than --docs, found the same one, so "
                           "every validation document would be trained on; leave it out and use --val-docs")
    everything = 2**62
    return [(DocumentFile(val_docs_file), SplitRule(everything if val_docs is None else val_docs, 0)),
            (DocumentFile(docs), SplitRule(0, train_docs))]


def _stated_val_docs(docs: Path) -> int | None:
    """Return `docs_val` of the manifest that accompanies the published document file, None without one."""
    path = docs.with_name(docs.name.split(".jsonl")[0] + ".source_manifest.json")
    if not path.exists():
        return None
    try:
        stated = json.loads(path.read_text("utf-8")).get("docs_val")
    except (ValueError, AttributeError):
        raise PrepareError(f"{path}: expected a JSON object, found something else; fetch it again") from None
    return stated


def _claim(out: Path, settings: dict, overwrite: bool) -> dict | None:
    """Make `out` ready for a build, or return the manifest if an interrupted run had only the renaming left."""
    staging = out / STAGING_NAME
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (staging / MANIFEST_NAME).exists() and not overwrite:
            same = json.loads((staging / "settings.json").read_text("utf-8")) == settings
            _publish(out)
            if same:
                return json.loads((out / MANIFEST_NAME).read_text("utf-8"))
        old = sorted(path for path in out.iterdir() if path.name.startswith("fineweb_") and path.suffix == ".bin")
        if old and not overwrite:
            raise PrepareError(f"{out}: expected no shards, found {len(old)} (first {old[0].name}); choose another --out, "
                               "or pass --overwrite to remove them")
        # The manifest goes first: shards without one are never taken for a complete build.
        for path in [out / MANIFEST_NAME, *old]:
            path.unlink(missing_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        _write_json(staging / "settings.json", settings)
    except OSError as error:
        raise PrepareError(f"{out}: expected a directory to write to, found: {error.strerror or error}; "
                           "choose another --out") from None
    return None


def _publish(out: Path) -> None:
    """Rename the staged files to their final names, the manifest last; safe to repeat."""
    staging = out / STAGING_NAME
    for path in sorted(staging.iterdir(), key=lambda path: (path.name == MANIFEST_NAME, path.name)):
        if path.name != "settings.json":
            os.replace(path, out / path.name)
    shutil.rmtree(staging)


def _write_json(path: Path, content: dict) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _write_splits(staging: Path, sources: list[tuple[DocumentFile, SplitRule]], model: ModelFile, shard_tokens: int,
                  edge_bytes: str, workers: int, max_train_tokens: int | None, show_progress: bool) -> dict:
    """Encode all documents into shards under `staging` and return the manifest."""
    writers = {series: ShardWriter(staging, f"fineweb_{series}", shard_tokens)
               for series in ("val", "val_bytes", "train")}
    documents = {"val": 0, "train": 0}
    val_sums = {"sidecar_bytes": 0, "original_bytes": 0, "edge_bytes": 0}
    replaced = empty = 0
    # The split of a batch is remembered here because results come back without their input.
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
            tokens = np.frombuffer(result.tokens, np.uint16)
            num_documents = result.num_documents
            is_full = False
            if split == "train" and max_train_tokens is not None:
                ends = np.cumsum(np.frombuffer(result.lengths, np.int64))
                num_documents = int(np.searchsorted(ends, max_train_tokens - writers["train"].total, side="right"))
                is_full = num_documents < result.num_documents
                tokens = tokens[:ends[num_documents - 1] if num_documents else 0]
            writers[split].append(tokens)
            documents[split] += num_documents
            replaced += result.replaced_surrogates
            empty += result.empty_documents
            if split == "val":
                sidecar = np.frombuffer(result.sidecar, np.uint16)
                assert len(sidecar) == len(tokens)
                writers["val_bytes"].append(sidecar)
                val_sums["sidecar_bytes"] += int(sidecar.sum(dtype=np.int64))
                val_sums["original_bytes"] += result.text_bytes
                val_sums["edge_bytes"] += result.edge_bytes
            meter.update(num_documents, result.text_bytes, writers["train"].total)
            if is_full:
                break
    finally:
        encoded.close()
        meter.close()
        if sys.exc_info()[0] is not None:
            for writer in writers.values():
                writer.abandon()
    for writer in writers.values():
        writer.finish()

    attached = val_sums["edge_bytes"] if edge_bytes == "attach" else 0
    missing = val_sums["original_bytes"] - val_sums["sidecar_bytes"] - val_sums["edge_bytes"] + attached
    # With attach, documents without tokens keep their bytes to themselves.
    assert missing == 0 or edge_bytes == "attach" and empty, f"{missing} bytes of validation text are unaccounted for"
    if not sum(documents.values()):
        raise PrepareError(f"{files[-1].path}: expected documents, found none; check --docs")
    if empty:
        print(f"{empty:,} documents have no tokens (empty or only white space); each is a lone BOS", file=sys.stderr)
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
        done = sum(source.position for source in self._files) / max(1, sum(source.size for source in self._files))
        if self._max_train_tokens:
            done = max(done, train_tokens / self._max_train_tokens)
        self._bar.set_description_str(f"{self._documents:,} documents, {self._text_bytes / 1e6 / elapsed:.1f} MB/s",
                                      refresh=False)
        self._bar.update(min(done, 1.0) - self._bar.n)

    def close(self) -> None:
        self._bar.close()


# -----------------------------------------------------------------------------
# Training a tokenizer: the official fields, the official character map with any library release

def train_tokenizer(documents: Iterable[str], vocab_size: int = 8192, charsmap_from: Path = SHIPPED_TOKENIZER) -> bytes:
    """Train a CaseOps BPE tokenizer and return the model file's content.

    documents      training texts, not yet transformed. Those whose caseops form exceeds 4,192 bytes are left out,
                   as in the official training.
    charsmap_from  model file whose character map is carried over when the installed library has another one.
                   SentencePiece 0.2.0 has the official map built in and does not read it.
    Raises PrepareError when there is too little text or a file is unusable.
    """
    texts = (lossless_caps.encode(text) for text in map(_training_text, documents) if text)
    fields = dict(
        model_type="bpe", vocab_size=vocab_size, hard_vocab_limit=False, character_coverage=0.999,
        byte_fallback=True, split_digits=True, add_dummy_prefix=False,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, user_defined_symbols=list(lossless_caps.OPERATORS),
        minloglevel=1,
    )
    is_map_built_in = tuple(int(part) for part in sentencepiece.__version__.split(".")[:3]) <= (0, 2, 0)
    if is_map_built_in:
        return _run_trainer(texts, normalization_rule_name="nmt_nfkc", **fields)

    # Normalising beforehand and then training with the identity map gives the pieces that the official map gives;
    # the result is told afterwards which map and length limit it was trained with.
    donor = ModelFile.read(charsmap_from)
    if hashlib.sha256(donor.charsmap).hexdigest() != OFFICIAL_CHARSMAP_SHA256:
        raise PrepareError(f"{charsmap_from}: expected a tokenizer with the official character map, found another map; "
                           f"use {SHIPPED_TOKENIZER.name}")
    normalize = sentencepiece.SentencePieceProcessor(model_proto=donor.data).normalize
    normalized = (normalize(text).replace("\u2581", " ") for text in texts if len(text.encode("utf-8")) <= MAX_TRAINING_BYTES)
    data = _run_trainer(normalized, normalization_rule_name="identity",
                        max_sentence_length=64 * MAX_TRAINING_BYTES, **fields)
    return _with_charsmap(data, donor.charsmap)


MAX_TRAINING_BYTES = 4192                 # the library's default max_sentence_length


def _training_text(document: str) -> str:
    return _SURROGATE.sub("\ufffd", document).replace("\0", " ").strip()


def _run_trainer(texts: Iterator[str], **fields) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, **fields)
    except (RuntimeError, OSError) as error:
        raise PrepareError(f"training the tokenizer failed: expected enough text for {fields['vocab_size']:,} pieces, "
                           f"found: {error}; give more documents or ask for fewer pieces") from None
    return model.getvalue()


def _with_charsmap(data: bytes, charsmap: bytes) -> bytes:
    """Return the model file `data` with the given map named nmt_nfkc and the default sentence length limit."""
    message = b""
    for number, value, stored in _proto_fields(data):
        if number == _NORMALIZER_SPEC:
            kept = [old for key, _, old in _proto_fields(value) if key not in (_NORMALIZER_NAME, _CHARSMAP)]
            named = _bytes_field(_NORMALIZER_NAME, b"nmt_nfkc") + _bytes_field(_CHARSMAP, charsmap)
            stored = _bytes_field(number, named + b"".join(kept))
        elif number == _TRAINER_SPEC:
            kept = [old for key, _, old in _proto_fields(value) if key != _MAX_SENTENCE_LENGTH]
            stored = _bytes_field(number, b"".join(kept))
        message += stored
    return message


def training_documents(docs: Path, skip: int, sources: Iterable[str] = (), show_progress: bool = False) -> Iterator[str]:
    """Yield the texts of `docs` after the first `skip` documents, only from the named sources when any are given."""
    wanted = frozenset(sources)
    file = DocumentFile(docs)
    meter = _Meter([file], None, show_progress)
    for batch in batches(file, SplitRule(skip, None)):
        if batch.split == "train":
            text_bytes = 0
            for _, text, _, record in parse_documents(batch):
                text_bytes += len(text)
                if not wanted or record.get("source") in wanted:
                    yield text
            meter.update(batch.num_documents, text_bytes, 0)
    meter.close()


def write_tokenizer(path: Path, data: bytes) -> ModelFile:
    """Write a trained model and `PATH.sha256` beside it, and return it checked."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for target, content in ((path, data),
                                (path.with_name(path.name + ".sha256"),
                                 f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode())):
            temporary = target.with_name(target.name + STAGING_NAME)
            temporary.write_bytes(content)
            os.replace(temporary, target)
    except OSError as error:
        raise PrepareError(f"{path}: expected a place to write the tokenizer to, found: {error.strerror}; "
                           "choose another --sp") from None
    return ModelFile.read(path)


# -----------------------------------------------------------------------------
# Command line

def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code (0 done, 1 a check or the run failed, 2 bad usage)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _build_command(arguments)
    except PrepareError as error:
        print(f"prepare_caseops_data.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare_caseops_data.py: interrupted; no half-written file has a final name, run again to start over",
              file=sys.stderr)
        return 1


def _build_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="prepare_caseops_data.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Build CaseOps token shards from documents, or train a CaseOps tokenizer, or both.",
        epilog="""The validation split is the first --val-docs documents of --docs. With --val-docs-file it is the first
--val-docs documents of that file instead (all of them by default), and all of --docs is training data.""")
    add = parser.add_argument
    add("--docs", type=Path, required=True, metavar="FILE", help="JSON Lines with a string `text`: .jsonl, .gz, .xz, .zst")
    add("--out", type=Path, metavar="DIR", help="directory for shards, sidecar, tokenizer and manifest")
    add("--sp", type=Path, default=SHIPPED_TOKENIZER, metavar="MODEL",
        help="tokenizer to use, or with --train-tokenizer to write (default: tokenizers/%s)" % SHIPPED_TOKENIZER.name)
    add("--val-docs", type=int, metavar="N", help=f"validation documents (default {DEFAULT_VAL_DOCS:,})")
    add("--val-docs-file", type=Path, metavar="FILE", help="take validation documents from this file")
    add("--train-docs", type=int, metavar="N", help="use at most N training documents")
    add("--max-train-tokens", type=int, metavar="N", help="stop before the training document that would exceed N tokens")
    add("--shard-tokens", type=int, default=DEFAULT_SHARD_TOKENS, metavar="N", help="tokens per shard (default 10^8)")
    add("--edge-bytes", choices=("drop", "attach"), default="drop",
        help="bytes of white space stripped at document edges: in no token (default), or added to the outer tokens")
    add("--workers", type=int, default=1, metavar="N", help="processes; the output does not depend on it (default 1)")
    add("--overwrite", action="store_true", help="first remove the shards that DIR has")
    add("--train-tokenizer", type=int, metavar="VOCAB_SIZE", help="train a tokenizer on the training documents first")
    add("--tokenizer-sources", metavar="A,B", help="train it only on records whose `source` is listed; `free` stands "
        f"for {','.join(FREE_SOURCES)}")
    options = parser.parse_args(arguments)
    if options.out is None and options.train_tokenizer is None:
        parser.error("give --out DIR to build shards, or --train-tokenizer VOCAB_SIZE, or both")
    if options.tokenizer_sources and options.train_tokenizer is None:
        parser.error("--tokenizer-sources needs --train-tokenizer")
    if options.train_tokenizer is not None and not 264 < options.train_tokenizer <= 65536:
        parser.error(f"--train-tokenizer {options.train_tokenizer}: expected 265 to 65,536")
    for name, least in (("val_docs", 0), ("train_docs", 0), ("max_train_tokens", 1), ("shard_tokens", 1), ("workers", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: expected at least {least}")

    if options.train_tokenizer is not None:
        names = options.tokenizer_sources or ""
        skip = 0 if options.val_docs_file else _sources(options.docs, None, options.val_docs, None)[0][1].val_docs
        documents = training_documents(options.docs, skip, FREE_SOURCES if names == "free" else names.split(",") if names
                                       else (), show_progress=True)
        model = write_tokenizer(options.sp, train_tokenizer(documents, options.train_tokenizer))
        print(f"tokenizer file:{options.sp} vocab_size:{len(model.pieces)} sha256:{model.sha256}")
    if options.out is not None:
        manifest = build(options.docs, options.out, options.sp, options.val_docs, options.val_docs_file, options.workers,
                         options.shard_tokens, options.edge_bytes, options.overwrite, options.train_docs,
                         options.max_train_tokens)
        _report(options.out, manifest)
    return 0


def _report(out: Path, manifest: dict) -> None:
    train, val = manifest["train"], manifest["val"]
    print(f"train documents:{manifest['docs_train']} tokens:{train['tokens']}")
    print(f"val documents:{manifest['docs_val']} tokens:{val['tokens']} sidecar_bytes:{val['sidecar_bytes']} "
          f"original_bytes:{val['original_bytes']} edge_bytes:{val['edge_bytes']}")
    print(f"DATA_PATH={out}")
    print(f"TOKENIZER_PATH={out / manifest['tokenizer']['file']}")


if __name__ == "__main__":
    sys.exit(main())
