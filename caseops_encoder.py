"""Encode documents with a CaseOps tokenizer: token ids, and how many original bytes each of them stands for.

`encode_document` defines the result by asking the SentencePiece library for its alignment. `DocumentEncoder`
gives the same an order of magnitude faster: the text between two spaces always encodes alike, so a C routine
encodes each distinct stretch once and remembers it. Without a C compiler, or with a tokenizer for which that
is not known to be exact, `DocumentEncoder` falls back to the definition and says why in its `reason`.

Contents: tokenizer files · the library · definition · fast encoder
"""

import atexit
import ctypes
import dataclasses
import functools
import hashlib
import itertools
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece

import lossless_caps

BOS_ID = 1
OPERATOR_IDS = [4, 5, 6, 7]
FIRST_BYTE_ID = 8
OFFICIAL_CHARSMAP_SHA256 = "51d3684747b35ef99cd4802f37cc1ee0c6bec4d060814f774efb1066d3c167f2"


class PrepareError(Exception):
    """Something a user or a file caused; the message says what was expected and found, and how to fix it."""
    exit_code = 1


class UsageError(PrepareError):
    """What the user named is wrong: not there, of another kind, or there already where a new one is wanted."""
    exit_code = 2


# -----------------------------------------------------------------------------
# Tokenizer files: the few facts needed from the model file, read without the protobuf package

# Field numbers of sentencepiece_model.proto.
PIECES, TRAINER_SPEC, NORMALIZER_SPEC = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_MODEL_TYPE, _WHITESPACE_SUFFIX = 3, 24
MAX_SENTENCE_LENGTH = 18
NORMALIZER_NAME, CHARSMAP, _DUMMY_PREFIX, _REMOVE_EXTRA_SPACES, _ESCAPE_SPACES = 1, 2, 3, 4, 5
_NORMAL, _USER_DEFINED, _BYTE = 1, 4, 6
_BPE = 2


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def proto_fields(data: bytes) -> Iterator[tuple[int, int | bytes, bytes]]:
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


def proto_bytes_field(number: int, value: bytes) -> bytes:
    """Return a length-delimited protobuf field as stored."""
    stored, size = bytearray([number << 3 | 2]), len(value)
    while size > 127:
        stored.append(size & 127 | 128)
        size >>= 7
    stored.append(size)
    return bytes(stored) + value


def _proto_dict(data: bytes) -> dict[int, int | bytes]:
    return {number: value for number, value, _ in proto_fields(data)}


@dataclasses.dataclass(frozen=True)
class Piece:
    """One vocabulary entry; `kind` is the type number of the model file."""
    text: str
    score: float
    kind: int


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """What matters of a SentencePiece model file."""
    path: Path
    data: bytes
    sha256: str
    pieces: list[Piece]                   # in id order
    charsmap: bytes
    slow_reason: str                      # why text between spaces cannot be encoded on its own; "" if it can

    @classmethod
    def read(cls, path: Path) -> "ModelFile":
        """Read a CaseOps tokenizer; raise PrepareError when its layout is not the one of this project."""
        path = Path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UsageError(f"{path}: expected a SentencePiece model, found: {error.strerror}; name one "
                             "with --sp or train one with --train-tokenizer") from None
        pieces, trainer, normalizer = [], {}, {}
        try:
            for field, value, _ in proto_fields(data):
                if field == PIECES:
                    piece = _proto_dict(value)
                    text, kind = piece[_PIECE_TEXT].decode("utf-8"), piece.get(_PIECE_TYPE, _NORMAL)
                    score = struct.unpack("<f", piece.get(_PIECE_SCORE, b"\0\0\0\0"))[0]
                    pieces.append(Piece(text, score, kind))
                elif field == TRAINER_SPEC:
                    trainer = _proto_dict(value)
                elif field == NORMALIZER_SPEC:
                    normalizer = _proto_dict(value)
        except (IndexError, KeyError, AttributeError, TypeError, ValueError, struct.error):
            raise UsageError(f"{path}: expected a SentencePiece model file, found {len(data):,} bytes of "
                             "something else or a damaged file; fetch it again") from None
        _check_layout(path, pieces)
        charsmap = normalizer.get(CHARSMAP, b"")
        return cls(path, data, hashlib.sha256(data).hexdigest(), pieces, charsmap,
                   _slow_reason(pieces, trainer, normalizer, charsmap))


def _check_layout(path: Path, pieces: list[Piece]) -> None:
    """Raise PrepareError unless BOS, operators and bytes have the ids that the format promises."""
    hint = "use a tokenizer made by --train-tokenizer or the official CaseOps one"
    if not FIRST_BYTE_ID + 256 <= len(pieces) <= 65536:
        raise UsageError(f"{path}: expected {FIRST_BYTE_ID + 256} to 65,536 pieces, found {len(pieces):,}; "
                         f"{hint}")
    found = [pieces[at] for at in OPERATOR_IDS]
    wanted = [(operator, _USER_DEFINED) for operator in lossless_caps.OPERATORS]
    if [(piece.text, piece.kind) for piece in found] != wanted:
        raise UsageError(f"{path}: expected the operators U+E001 to U+E004 as user-defined ids 4 to 7, "
                         f"found {', '.join(ascii(piece.text) for piece in found)}; {hint}")
    if pieces[BOS_ID].text != "<s>":
        raise UsageError(f"{path}: expected <s> with id {BOS_ID}, found {pieces[BOS_ID].text!r}; {hint}")
    if any(piece.kind != _BYTE for piece in pieces[FIRST_BYTE_ID:FIRST_BYTE_ID + 256]):
        raise UsageError(f"{path}: expected the 256 byte pieces from id {FIRST_BYTE_ID} on, found others; "
                         f"{hint}")


def _slow_reason(pieces: list[Piece], trainer: dict, normalizer: dict, charsmap: bytes) -> str:
    if trainer.get(_MODEL_TYPE, 1) != _BPE:
        return "the tokenizer is not a BPE model"
    if hashlib.sha256(charsmap).hexdigest() != OFFICIAL_CHARSMAP_SHA256:
        return "the tokenizer's character map is not the official one"
    spaces = [normalizer.get(field, 1) for field in (_DUMMY_PREFIX, _REMOVE_EXTRA_SPACES, _ESCAPE_SPACES)]
    if spaces != [0, 1, 1] or trainer.get(_WHITESPACE_SUFFIX, 0):
        return "the tokenizer treats white space differently"
    if any("\u2581" in piece.text[1:] for piece in pieces if piece.kind == _NORMAL):
        return "a piece of the tokenizer has a space after its first character"
    if [piece.text for piece in pieces if piece.kind == _USER_DEFINED] != list(lossless_caps.OPERATORS):
        return "the tokenizer has user-defined pieces besides the operators"
    return ""


# -----------------------------------------------------------------------------
# The library: ids, and ids with their spans; which alignment call exists depends on the release

class Tokenizer:
    """A SentencePiece processor; `alignment` names the call that the installed release offers for spans."""

    def __init__(self, model: ModelFile):
        self.model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model.data)
        except RuntimeError as error:
            raise PrepareError(f"{model.path}: expected a model that SentencePiece "
                               f"{sentencepiece.__version__} can load, found: {error}; fetch it "
                               "again") from None
        if hasattr(self._processor, "encode_as_offset_mapping"):
            self.alignment = "encode_as_offset_mapping"
        elif hasattr(self._processor, "encode_as_immutable_proto"):
            self.alignment = "encode_as_immutable_proto"
        else:
            raise PrepareError("expected encode_as_offset_mapping or encode_as_immutable_proto, found "
                               f"neither in SentencePiece {sentencepiece.__version__}; install a release "
                               "from 0.2.0 to 0.2.3")

    def ids(self, caseops: str) -> list[int]:
        """Return the ids of caseops text."""
        return self._processor.encode(caseops)

    def align(self, caseops: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and, for each, its half-open span of code points in `caseops`."""
        if self.alignment == "encode_as_offset_mapping":
            mapping = self._processor.encode_as_offset_mapping(caseops)
            return mapping["ids"], mapping["offsets"]
        pieces = self._processor.encode_as_immutable_proto(caseops).pieces
        return [piece.id for piece in pieces], [(piece.begin, piece.end) for piece in pieces]


# -----------------------------------------------------------------------------
# Definition

def encode_document(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int], int, int]:
    """Return (ids, original bytes per id, lead, trail) of one document, without BOS.

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


# -----------------------------------------------------------------------------
# Fast encoder: a C routine with a memo; the library is asked about stretches with unusual characters only

# A stretch is the text between two spaces or newlines. It can be encoded on its own because no word, rule of
# the character map or piece crosses a space. In plain stretches (visible ASCII and the usual quotation marks
# and dashes) normalization changes nothing, so transform, merges and byte counts are a few loops.
_C_SOURCE = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { BOS = 1, TITLE = 4, ALLCAPS = 5, CAPNEXT = 6, FIRST_BYTE = 8, MAX_STRETCH = 256, UNKNOWN = -1 };

typedef struct { uint64_t hash; int64_t key; int32_t key_bytes, is_head; int64_t ids; int32_t count;
                 int64_t lead, tail; } Entry;

typedef struct {
    /* vocabulary: piece bytes -> id and score; an empty slot has id UNKNOWN */
    uint8_t *text; int64_t *piece_at; int32_t *piece_bytes; float *score;
    int32_t *piece_slot; uint64_t piece_mask;
    /* memo: stretch bytes -> entry; ids and values share one index */
    Entry *entries; int64_t num_entries, max_entries; int32_t *slots; uint64_t slot_mask;
    uint8_t *keys; int64_t key_bytes, max_key_bytes;
    uint16_t *ids; uint32_t *values; int64_t num_ids, max_ids;
} Encoder;

static uint64_t hash_bytes(const uint8_t *data, int64_t count, uint64_t seed) {
    uint64_t hash = seed ^ 0x9E3779B97F4A7C15ull ^ (uint64_t)count;
    while (count >= 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        hash = (hash ^ word) * 0xD6E8FEB86659FD93ull;
        hash ^= hash >> 32;
        data += 8; count -= 8;
    }
    uint64_t word = 0;
    memcpy(&word, data, count);
    hash = (hash ^ word) * 0xD6E8FEB86659FD93ull;
    hash ^= hash >> 32;
    hash *= 0xD6E8FEB86659FD93ull;
    return hash ^ hash >> 32;
}

static int32_t find_piece(const Encoder *e, const uint8_t *data, int32_t count) {
    for (uint64_t slot = hash_bytes(data, count, 0) & e->piece_mask;; slot = (slot + 1) & e->piece_mask) {
        int32_t id = e->piece_slot[slot];
        if (id == UNKNOWN) return id;
        if (e->piece_bytes[id] == count && !memcmp(e->text + e->piece_at[id], data, count)) return id;
    }
}

void encoder_free(Encoder *e) {
    if (!e) return;
    free(e->text); free(e->piece_at); free(e->piece_bytes); free(e->score); free(e->piece_slot);
    free(e->entries); free(e->slots); free(e->keys); free(e->ids); free(e->values); free(e);
}

/* Forget every stretch; the vocabulary stays. */
void encoder_clear(Encoder *e) {
    e->num_entries = e->key_bytes = e->num_ids = 0;
    memset(e->slots, 0xFF, (e->slot_mask + 1) * sizeof *e->slots);
}

/* Bytes held by the memo. */
int64_t encoder_memory(const Encoder *e) {
    return e->max_entries * (int64_t)sizeof *e->entries + (int64_t)(e->slot_mask + 1) * 4
        + e->max_key_bytes + e->max_ids * 6;
}

/* text: all pieces end to end, piece i being bytes ends[i-1]..ends[i]; is_normal: merges may form it. */
Encoder *encoder_new(const uint8_t *text, const int64_t *ends, const float *score, const uint8_t *is_normal,
                     int32_t count) {
    Encoder *e = calloc(1, sizeof *e);
    if (!e) return NULL;
    e->piece_mask = 1;
    while (e->piece_mask < 4 * (uint64_t)count) e->piece_mask <<= 1;
    int64_t slots = e->piece_mask--;
    e->text = malloc(ends[count - 1] + 1); e->piece_at = malloc(count * 8);
    e->piece_bytes = malloc(count * 4); e->score = malloc(count * 4); e->piece_slot = malloc(slots * 4);
    e->max_entries = 1 << 12; e->slot_mask = (1 << 14) - 1; e->max_key_bytes = e->max_ids = 1 << 16;
    e->entries = malloc(e->max_entries * sizeof *e->entries); e->slots = malloc((e->slot_mask + 1) * 4);
    e->keys = malloc(e->max_key_bytes); e->ids = malloc(e->max_ids * 2); e->values = malloc(e->max_ids * 4);
    if (!e->text || !e->piece_at || !e->piece_bytes || !e->score || !e->piece_slot || !e->entries || !e->slots
        || !e->keys || !e->ids || !e->values) { encoder_free(e); return NULL; }
    memcpy(e->text, text, ends[count - 1]);
    memcpy(e->score, score, count * 4);
    memset(e->piece_slot, 0xFF, slots * 4);
    for (int32_t id = 0; id < count; id++) {
        e->piece_at[id] = id ? ends[id - 1] : 0;
        e->piece_bytes[id] = (int32_t)(ends[id] - e->piece_at[id]);
        if (!is_normal[id]) continue;
        uint64_t slot = hash_bytes(text + e->piece_at[id], e->piece_bytes[id], 0) & e->piece_mask;
        while (e->piece_slot[slot] != UNKNOWN) slot = (slot + 1) & e->piece_mask;
        e->piece_slot[slot] = id;
    }
    encoder_clear(e);
    return e;
}

static int grow(void **data, int64_t *capacity, int64_t needed, size_t item) {
    if (needed <= *capacity) return 1;
    int64_t larger = *capacity * 2 > needed ? *capacity * 2 : needed;
    void *moved = realloc(*data, larger * item);
    if (!moved) return 0;
    *data = moved; *capacity = larger;
    return 1;
}

static int grow_ids(Encoder *e, int64_t needed) {
    int64_t capacity = e->max_ids;
    return grow((void **)&e->values, &capacity, needed, 4) && grow((void **)&e->ids, &e->max_ids, needed, 2);
}

static Entry *find(const Encoder *e, const uint8_t *key, int64_t count, int is_head, uint64_t hash) {
    for (uint64_t slot = hash & e->slot_mask; e->slots[slot] >= 0; slot = (slot + 1) & e->slot_mask) {
        Entry *entry = e->entries + e->slots[slot];
        if (entry->hash == hash && entry->key_bytes == count && entry->is_head == is_head
            && !memcmp(e->keys + entry->key, key, count)) return entry;
    }
    return NULL;
}

/* Add an entry whose ids and values, `count` of them, already stand at the end of e->ids and e->values. */
static Entry *add(Encoder *e, const uint8_t *key, int64_t key_bytes, int is_head, uint64_t hash,
                  int32_t count, int64_t lead, int64_t tail) {
    if (!grow((void **)&e->entries, &e->max_entries, e->num_entries + 1, sizeof *e->entries)
        || !grow((void **)&e->keys, &e->max_key_bytes, e->key_bytes + key_bytes, 1)) return NULL;
    if (4 * (uint64_t)(e->num_entries + 1) > 3 * e->slot_mask) {
        uint64_t mask = 2 * e->slot_mask + 1;
        int32_t *slots = malloc((mask + 1) * 4);
        if (!slots) return NULL;
        memset(slots, 0xFF, (mask + 1) * 4);
        for (int64_t i = 0; i < e->num_entries; i++) {
            uint64_t slot = e->entries[i].hash & mask;
            while (slots[slot] >= 0) slot = (slot + 1) & mask;
            slots[slot] = (int32_t)i;
        }
        free(e->slots); e->slots = slots; e->slot_mask = mask;
    }
    uint64_t slot = hash & e->slot_mask;
    while (e->slots[slot] >= 0) slot = (slot + 1) & e->slot_mask;
    e->slots[slot] = (int32_t)e->num_entries;
    Entry *entry = e->entries + e->num_entries++;
    *entry = (Entry){hash, e->key_bytes, (int32_t)key_bytes, is_head, e->num_ids, count, lead, tail};
    memcpy(e->keys + e->key_bytes, key, key_bytes);
    e->key_bytes += key_bytes; e->num_ids += count;
    return entry;
}

/* Store what the library says about a stretch. Returns 0 when memory is short. */
int encoder_add(Encoder *e, const uint8_t *key, int64_t key_bytes, int is_head, const uint16_t *ids,
                const uint32_t *values, int32_t count, int64_t lead, int64_t tail) {
    if (!grow_ids(e, e->num_ids + count)) return 0;
    memcpy(e->ids + e->num_ids, ids, count * 2);
    memcpy(e->values + e->num_ids, values, count * 4);
    return add(e, key, key_bytes, is_head, hash_bytes(key, key_bytes, is_head), count, lead, tail) != NULL;
}

static void emit(Encoder *e, int32_t *count, int id, int value) {
    e->ids[e->num_ids + *count] = (uint16_t)id;
    e->values[e->num_ids + *count] = (uint32_t)value;
    ++*count;
}

/* Merge one segment: always the adjacent pair that forms the piece of highest score, leftmost on a tie. */
static void encode_segment(Encoder *e, const uint8_t *segment, int bytes, int32_t *count) {
    int start[MAX_STRETCH + 4], n = 0;
    int32_t pair[MAX_STRETCH + 4];          /* piece formed by symbols i and i+1 */
    for (int i = 0; i < bytes; i++) if ((segment[i] & 0xC0) != 0x80) start[n++] = i;
    start[n] = bytes;
    for (int i = 0; i + 1 < n; i++) pair[i] = find_piece(e, segment + start[i], start[i + 2] - start[i]);
    for (;;) {
        int best = -1;
        for (int i = 0; i + 1 < n; i++)
            if (pair[i] != UNKNOWN && (best < 0 || e->score[pair[i]] > e->score[pair[best]])) best = i;
        if (best < 0) break;
        memmove(start + best + 1, start + best + 2, (n - best - 1) * sizeof *start);
        memmove(pair + best, pair + best + 1, (n - best - 1) * sizeof *pair);
        n--;
        for (int i = best > 0 ? best - 1 : 0; i <= best && i + 1 < n; i++)
            pair[i] = find_piece(e, segment + start[i], start[i + 2] - start[i]);
    }
    for (int i = 0; i < n; i++) {
        const uint8_t *symbol = segment + start[i];
        int size = start[i + 1] - start[i];
        /* The space mark, three bytes here, is one byte of the text. */
        int value = symbol[0] == 0xE2 && symbol[1] == 0x96 ? size - 2 : size;
        int32_t id = find_piece(e, symbol, size);
        if (id != UNKNOWN) emit(e, count, id, value);
        else for (int k = 0; k < size; k++) emit(e, count, FIRST_BYTE + symbol[k], k + 1 == size ? value : 0);
    }
}

static int is_letter(uint8_t c) { c |= 32; return c >= 'a' && c <= 'z'; }
static int is_upper(uint8_t c) { return c >= 'A' && c <= 'Z'; }

/* Transform and encode a plain stretch; is_head: it begins the document, so no space comes before it. */
static Entry *learn_plain(Encoder *e, const uint8_t *text, int bytes, int is_head, uint64_t hash) {
    uint8_t segment[MAX_STRETCH + 3];
    int size = 0;
    int32_t count = 0;
    /* Each byte gives at most an operator and a token, the space mark at most three. */
    if (!grow_ids(e, e->num_ids + 2 * bytes + 3)) return NULL;
    if (!is_head) { memcpy(segment, "\xE2\x96\x81", 3); size = 3; }
    for (int i = 0; i < bytes;) {
        if (!is_letter(text[i])) { segment[size++] = text[i++]; continue; }
        int end = i, upper = 0;
        while (end < bytes && is_letter(text[end])) upper += is_upper(text[end++]);
        int is_allcaps = upper == end - i && upper > 1;
        for (int first = i; i < end; i++) {
            if (is_allcaps ? i == first : is_upper(text[i])) {
                if (size) encode_segment(e, segment, size, &count);
                size = 0;
                emit(e, &count, is_allcaps ? ALLCAPS : i == first ? TITLE : CAPNEXT, 0);
            }
            segment[size++] = text[i] | 32;
        }
    }
    if (size) encode_segment(e, segment, size, &count);
    return add(e, text, bytes, is_head, hash, count, 0, 0);
}

/* Encode one document, `bytes` of UTF-8, BOS first.

   ids, values     room for `capacity` tokens; when more are needed nothing useful is written.
   edges           set to the bytes before the first and after the last token.
   missing         room for `max_missing` stretches that only the library can encode, each as
                   (start, bytes, is_head).
   Returns the number of tokens, or minus that of missing stretches, or INT64_MIN when memory is short. */
int64_t encoder_document(Encoder *e, const uint8_t *text, int64_t bytes, uint16_t *ids, uint32_t *values,
                         int64_t capacity, int64_t *edges, int64_t *missing, int64_t max_missing) {
    int64_t count = 0, lead = 0, tail = 0, num_missing = 0;
    int is_head = 1;
    if (capacity > 0) { ids[0] = BOS; values[0] = 0; }
    count = 1;
    for (int64_t start = 0; start <= bytes;) {
        int64_t end = start;
        int is_plain = 1;
        for (; end < bytes; end++) {
            uint8_t c = text[end];
            if (c == ' ' || c == '\n') break;
            if (c > ' ' && c < 0x7F) continue;
            if (c == 0xE2 && end + 2 < bytes && text[end + 1] == 0x80) {
                uint8_t last = text[end + 2];
                if ((last & 0xFE) == 0x98 || last == 0x93 || last == 0x94 || (last & 0xFE) == 0x9C) {
                    end += 2;
                    continue;
                }
            }
            is_plain = 0;
        }
        int64_t size = end - start;
        int is_last = end == bytes;
        if (!size) {
            if (is_head) lead += !is_last; else tail++;
        } else {
            uint64_t hash = hash_bytes(text + start, size, is_head);
            Entry *entry = find(e, text + start, size, is_head, hash);
            if (!entry && is_plain && size <= MAX_STRETCH) {
                entry = learn_plain(e, text + start, (int)size, is_head, hash);
                if (!entry) return INT64_MIN;
            }
            if (!entry) {
                if (num_missing < max_missing) {
                    int64_t *record = missing + 3 * num_missing;
                    record[0] = start; record[1] = size; record[2] = is_head;
                }
                num_missing++;
                /* Whether the next stretch is a head depends on the answer; come back for it. */
                if (is_head) return -1;
            } else if (!entry->count) {
                if (is_head) lead += entry->lead + !is_last; else tail += entry->tail;
            } else {
                if (count + entry->count <= capacity) {
                    memcpy(ids + count, e->ids + entry->ids, entry->count * 2);
                    memcpy(values + count, e->values + entry->ids, entry->count * 4);
                    values[count] += (uint32_t)tail;
                }
                lead += entry->lead;
                tail = entry->tail;
                count += entry->count;
                is_head = 0;
            }
        }
        start = end + 1;
    }
    edges[0] = lead; edges[1] = tail;
    return num_missing ? -(num_missing < max_missing ? num_missing : max_missing) : count;
}
"""


class CompileError(Exception):
    """The C routine cannot be built here; the message is the reason."""


@functools.cache
def compile_encoder() -> Path:
    """Compile the C routine, once per process, check that it loads, and return the library's path.

    Raises CompileError with the reason.
    """
    library = compile_c(_C_SOURCE, "caseops_encoder")
    _load(library)
    return library


def compile_c(source: str, name: str) -> Path:
    """Compile C source to the shared library `name`.so and return its path.

    The file lies in a private temporary directory until this process ends, so that workers can load it, too.
    Raises CompileError with the reason.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise CompileError("no C compiler (cc, gcc or clang) is installed")
    try:
        folder = tempfile.TemporaryDirectory(prefix="caseops_")
        atexit.register(folder.cleanup)
        code, library = Path(folder.name) / f"{name}.c", Path(folder.name) / f"{name}.so"
        code.write_text(source, "utf-8")
        done = subprocess.run([compiler, "-std=c99", "-O2", "-shared", "-fPIC", "-o", library, code],
                              capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompileError(f"{Path(compiler).name} cannot be run ({error})") from None
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise CompileError(f"{Path(compiler).name} failed: {last_line}")
    return library


class DocumentEncoder:
    """`encode_document` for many documents, by the C routine where it is exact and can be built.

    library   a path from `compile_encoder`, None to compile here, "" to use the definition.
    reason    why documents go through the definition; "" when the C routine is used.
    """

    # Past this the memo starts afresh, which changes the speed, never the output.
    MAX_MEMO_BYTES = 1 << 28
    _MAX_MISSING = 1 << 10

    def __init__(self, tokenizer: Tokenizer, library: Path | str | None = None):
        self.tokenizer = tokenizer
        self.reason = tokenizer.model.slow_reason or ("asked for" if library == "" else "")
        self._native = None
        if self.reason:
            return
        try:
            self._lib = _load(compile_encoder() if library is None else library)
        except CompileError as error:
            self.reason = str(error)
            return
        self._native = self._new_native(tokenizer.model.pieces)
        self._edges = np.zeros(2, np.int64)
        self._missing = np.zeros((self._MAX_MISSING, 3), np.int64)
        self._make_room(1 << 16)

    def __del__(self):
        if getattr(self, "_native", None):
            self._lib.encoder_free(self._native)

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray, int, int]:
        """Return (uint16 tokens with BOS, uint32 original bytes of each, lead, trail) of one document.

        `text` must hold no lone surrogates.
        """
        if self._native is None:
            ids, values, lead, trail = encode_document(self.tokenizer, text)
            return np.array([BOS_ID, *ids], np.uint16), np.array([0, *values], np.uint32), lead, trail
        return self._encode_native(text)

    def encode_ids(self, text: str) -> np.ndarray:
        """Return the uint16 tokens of one document, BOS first."""
        if self._native is None:
            return np.array([BOS_ID, *self.tokenizer.ids(lossless_caps.encode(text))], np.uint16)
        return self._encode_native(text)[0]

    def _encode_native(self, text: str) -> tuple[np.ndarray, np.ndarray, int, int]:
        data = text.encode("utf-8")
        if self._lib.encoder_memory(self._native) > self.MAX_MEMO_BYTES:
            # A new memo, because clearing would keep the memory.
            self._lib.encoder_free(self._native)
            self._native = self._new_native(self.tokenizer.model.pieces)
        while True:
            count = self._lib.encoder_document(self._native, data, len(data), *self._pointers,
                                               self._edges.ctypes.data, self._missing.ctypes.data,
                                               self._MAX_MISSING)
            if count == -2**63:
                raise MemoryError("no memory left for the encoder's memo")
            if count < 0:
                for start, size, is_head in self._missing[:-count].tolist():
                    self._ask_library(data[start:start + size], is_head)
            elif count > len(self._ids):
                self._make_room(2 * count)
            else:
                lead, trail = self._edges.tolist()
                return self._ids[:count].copy(), self._values[:count].copy(), lead, trail

    def _ask_library(self, stretch: bytes, is_head: int) -> None:
        """Store the encoding of a stretch: at the start of a document, or after something and a space."""
        text = stretch.decode("utf-8")
        if is_head:
            ids, values, lead, tail = encode_document(self.tokenizer, text)
        else:
            # The operator in front keeps the space that the normalizer would strip; its own id is dropped.
            caseops = f"{lossless_caps.TITLE} {lossless_caps.encode(text)}"
            ids, spans = self.tokenizer.align(caseops)
            before = list(itertools.accumulate(lossless_caps.byte_weights(caseops), initial=0))
            ids, values, lead = ids[1:], [before[end] - before[begin] for begin, end in spans[1:]], 0
            tail = before[-1] - before[spans[-1][1]]
        ids, values = np.array(ids, np.uint16), np.array(values, np.uint32)
        if not self._lib.encoder_add(self._native, stretch, len(stretch), is_head, ids.ctypes.data,
                                     values.ctypes.data, len(ids), lead, tail):
            raise MemoryError("no memory left for the encoder's memo")

    def _make_room(self, capacity: int) -> None:
        self._ids, self._values = np.zeros(capacity, np.uint16), np.zeros(capacity, np.uint32)
        self._pointers = self._ids.ctypes.data, self._values.ctypes.data, capacity

    def _new_native(self, pieces: list[Piece]) -> int:
        texts = [piece.text.encode("utf-8") for piece in pieces]
        ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        scores = np.array([piece.score for piece in pieces], np.float32)
        is_normal = np.array([piece.kind == _NORMAL for piece in pieces], np.uint8)
        native = self._lib.encoder_new(b"".join(texts), ends.ctypes.data, scores.ctypes.data,
                                       is_normal.ctypes.data, len(pieces))
        if not native:
            raise MemoryError("no memory left for the encoder's vocabulary")
        return native


def _load(library: Path) -> ctypes.CDLL:
    pointer, size, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    try:
        lib = ctypes.CDLL(str(library))
    except OSError as error:
        raise CompileError(f"the compiled routine cannot be loaded ({error})") from None
    for name, result, arguments in (
            ("encoder_new", pointer, [ctypes.c_char_p, pointer, pointer, pointer, flag]),
            ("encoder_free", None, [pointer]),
            ("encoder_memory", size, [pointer]),
            ("encoder_add", flag, [pointer, ctypes.c_char_p, size, flag, pointer, pointer, flag, size, size]),
            ("encoder_document", size,
             [pointer, ctypes.c_char_p, size, pointer, pointer, size, pointer, pointer, size])):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib
