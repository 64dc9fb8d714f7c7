"""Second-pass merges: join frequent pairs of tokens into ids that a tokenizer can never give.

A CaseOps tokenizer has 256 byte pieces, but many bytes cannot occur: those that no UTF-8 holds, characters
that normalization removes, and characters with a piece of their own. `free_ids` finds them by proof from the
model file. `learn` gives each of them a frequent pair of tokens; a pair may hold earlier joined ids, never a
BOS. The size of the vocabulary stays; a text has fewer tokens.

`Joiner` and `split_tokens` work on token ids alone, so finished shards are converted without their documents.
`python prepare_caseops_data.py fuse` and `unfuse` do that for whole directories.

Contents: free ids · merges and their file · definition · C routine · learning · byte counts
"""

import ctypes
import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import lossless_caps
from caseops_encoder import (
    BOS_ID,
    FIRST_BYTE_ID,
    OPERATOR_IDS,
    CompileError,
    ModelFile,
    PrepareError,
    UsageError,
    compile_c,
)

MERGES_NAME = "merges.json"
SPACE_MARK = "\u2581"
_NUM_IDS = 1 << 16
_NORMAL_PIECE = 1


# -----------------------------------------------------------------------------
# Free ids: byte pieces that no text can give, whatever the corpus

def free_ids(model: ModelFile) -> list[int]:
    """Return the byte ids that encoding a document can never give, ascending.

    A byte id appears only in the spelling of a character that is left after normalization and has no piece of
    its own. So a byte is free unless some reachable character without a piece has it in its UTF-8 form.
    Raises PrepareError for a tokenizer that does not encode as this reasoning assumes.
    """
    if model.slow_reason:
        raise PrepareError(f"{model.path}: expected a tokenizer whose free ids can be proved, found that "
                           f"{model.slow_reason}; use the official CaseOps tokenizer or one made by "
                           "--train-tokenizer")
    is_spelled = _can_remain(model.charsmap).copy()
    normal = [piece.text for piece in model.pieces if piece.kind == _NORMAL_PIECE]
    has_piece = [ord(text) for text in normal if len(text) == 1]
    is_spelled[[*has_piece, *map(ord, lossless_caps.OPERATORS)]] = False
    occurring = set(_text(np.flatnonzero(is_spelled)).encode("utf-8"))
    return [FIRST_BYTE_ID + byte for byte in range(256) if byte not in occurring]


@functools.lru_cache(maxsize=1)
def _can_remain(charsmap: bytes) -> np.ndarray:
    """Return for every code point whether it can stand in transformed and then normalized text.

    These are the characters that the map's rules write, and those that pass unchanged: they have no rule of
    their own and the transform lets them through. Spaces are written as the space mark.
    """
    size = int.from_bytes(charsmap[:4], "little")
    units = np.frombuffer(charsmap[4:4 + size], "<u4").astype(np.int64)
    can_remain = np.zeros(0x110000, bool)
    # The rules' texts, each ended by a zero byte, follow the trie.
    can_remain[[ord(char) for char in set(charsmap[4 + size:].decode("utf-8")) - {"\0"}]] = True
    codes = np.flatnonzero(~_IS_SURROGATE)
    is_capital = (codes >= ord("A")) & (codes <= ord("Z"))
    can_remain[codes[~_has_rule(units, codes) & ~is_capital]] = True
    can_remain[ord(SPACE_MARK)] |= can_remain[ord(" ")]
    can_remain[ord(" ")] = False
    return can_remain


_IS_SURROGATE = (np.arange(0x110000) >= 0xD800) & (np.arange(0x110000) < 0xE000)


def _text(codes: np.ndarray) -> str:
    return codes.astype("<u4").tobytes().decode("utf-32-le")


def _has_rule(units: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return for each code point whether the double-array trie `units` of a map has it alone as a key.

    A unit holds a label (bits 0-7, and 31 for values), whether a key ends here (8), and the offset (10-30,
    scaled by 256 if bit 9 is set) that, xor a byte, leads to the next unit.
    """
    offsets = units >> 10 << ((units & 512) >> 6)
    has_rule = np.zeros(len(codes), bool)
    num_bytes = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    for length in range(1, 5):
        chosen = np.flatnonzero(num_bytes == length)
        text = _text(codes[chosen]).encode("utf-8")
        keys = np.frombuffer(text, np.uint8).reshape(-1, length).astype(np.int64)
        place = np.full(len(keys), offsets[0])
        matches = np.ones(len(keys), bool)
        for label in keys.T:
            place ^= label
            matches &= place < len(units)
            unit = units[np.where(matches, place, 0)]
            matches &= (unit & 0x800000FF) == label
            place ^= offsets[np.where(matches, place, 0)]
        has_rule[chosen] = matches & (unit >> 8 & 1 == 1)
    return has_rule


# -----------------------------------------------------------------------------
# Merges and their file

@dataclasses.dataclass(frozen=True)
class Merge:
    """The pair of ids (left, right), wherever it stands, becomes `id`; in learning that was `count` times."""
    left: int
    right: int
    id: int
    count: int = 0


@dataclasses.dataclass(frozen=True)
class Merges:
    """Merges in the order in which they are applied, and the file's content that says so."""
    merges: tuple[Merge, ...]
    data: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def first(self, count: int) -> "Merges":
        """Return the first `count` merges alone."""
        content = json.loads(self.data)
        return type(self)(self.merges[:count], _file_content(
            content["merges"][:count], content["tokenizer_sha256"], content.get("learnt_on")))

    @classmethod
    def make(cls, merges: Sequence[Merge], model: ModelFile, learnt_on: dict) -> "Merges":
        """Write merges for `model` as a merges.json; `learnt_on` says where the counts come from."""
        parts = parts_of(merges)
        texts = {merge.id: "".join(_readable(model, part) for part in parts[merge.id]) for merge in merges}
        rows = [{"id": merge.id, "pair": [merge.left, merge.right], "count": merge.count,
                 "text": texts[merge.id]} for merge in merges]
        return cls(tuple(merges), _file_content(rows, model.sha256, learnt_on))

    @classmethod
    def read(cls, path: Path, model: ModelFile) -> "Merges":
        """Read a merges.json; raise PrepareError when it is damaged or belongs to another tokenizer."""
        path = Path(path)
        try:
            data = path.read_bytes()
            content = json.loads(data)
            pairs = [(*row["pair"], row) for row in content["merges"]]
            rows = [Merge(left, right, row["id"], row.get("count", 0)) for left, right, row in pairs]
            made_for = content["tokenizer_sha256"]
            is_sound = content["format"] == 1 and all(
                type(value) is int and 0 <= value < _NUM_IDS
                for row in rows for value in (row.left, row.right, row.id))
        except OSError as error:
            raise UsageError(f"{path}: expected the list of merges, found: {error.strerror}; copy "
                             f"{path.name} from where the shards were made") from None
        except (ValueError, KeyError, TypeError):
            is_sound = False
        if not is_sound or not rows:
            raise PrepareError(f"{path}: expected a list of merges of format 1, found something else; copy "
                               "it again from where the shards were made")
        if made_for != model.sha256:
            raise PrepareError(f"{path}: expected merges for the tokenizer {model.path.name} "
                               f"({model.sha256[:16]}...), found some for {str(made_for)[:16]}...; use the "
                               "tokenizer that they were learnt with")
        known, targets = set(range(len(model.pieces))) - {BOS_ID}, set(free_ids(model))
        for number, row in enumerate(rows, start=1):
            # A free id is a part only once an earlier merge has made it.
            if not {row.left, row.right} <= known - targets or row.id not in targets:
                raise PrepareError(f"{path}: expected merges of known ids into ids that the tokenizer never "
                                   f"gives, found {row.left} and {row.right} into {row.id} (merge {number}); "
                                   "copy it again from where the shards were made")
            targets.remove(row.id)
        return cls(tuple(rows), data)


def _file_content(rows: list[dict], tokenizer_sha256: str, learnt_on: dict | None) -> bytes:
    head = json.dumps({"format": 1, "tokenizer_sha256": tokenizer_sha256, "learnt_on": learnt_on}, indent=1)
    lines = ",\n  ".join(map(json.dumps, rows))
    return f'{head[:-2]},\n "merges": [\n  {lines}\n ]\n}}\n'.encode("ascii")


def parts_of(merges: Sequence[Merge]) -> dict[int, tuple[int, ...]]:
    """Return for each joined id the ids of the tokenizer that it stands for."""
    parts: dict[int, tuple[int, ...]] = {}
    for merge in merges:
        parts[merge.id] = parts.get(merge.left, (merge.left,)) + parts.get(merge.right, (merge.right,))
    return parts


def _readable(model: ModelFile, token: int) -> str:
    names = dict(zip(OPERATOR_IDS, ("<TITLE>", "<ALLCAPS>", "<CAPNEXT>", "<ESC>")))
    return names.get(token, model.pieces[token].text)


# -----------------------------------------------------------------------------
# Definition: what joining and splitting are

def join_by_definition(tokens: np.ndarray, merges: Sequence[Merge]) -> tuple[np.ndarray, np.ndarray]:
    """Apply the merges one after the other, each from left to right to pairs that do not overlap.

    tokens   (n,) uint16, without any of the ids that the merges make.
    Returns the joined tokens (m,) uint16 and the place of each one's first part in `tokens`, (m,) int64.
    """
    starts = np.arange(len(tokens))
    for merge in merges:
        places = np.flatnonzero((tokens[:-1] == merge.left) & (tokens[1:] == merge.right))
        if merge.left == merge.right:
            # In a run of equal tokens every other place begins a pair.
            new_run = np.diff(places, prepend=-2) != 1
            run_start = np.repeat(places[new_run], np.diff(np.flatnonzero(new_run), append=len(places)))
            places = places[(places - run_start) % 2 == 0]
        is_kept = np.ones(len(tokens), bool)
        is_kept[places + 1] = False
        tokens = tokens.copy()
        tokens[places] = merge.id
        tokens, starts = tokens[is_kept], starts[is_kept]
    return tokens, starts


def split_tokens(tokens: np.ndarray, merges: Sequence[Merge]) -> np.ndarray:
    """Return what `Joiner.join` was given: every joined id replaced by its parts."""
    lengths, firsts, parts = _part_table(merges)
    parts = parts.astype(np.uint16)
    blocks = [parts[_part_index(lengths[block], firsts[block])] for block in _blocks(tokens)]
    return np.concatenate(blocks or [np.zeros(0, np.uint16)])


def _blocks(values: np.ndarray) -> list[np.ndarray]:
    # Blocks whose index arrays stay in the processor's cache.
    return [values[at:at + (1 << 15)] for at in range(0, len(values), 1 << 15)]


def _part_table(merges: Sequence[Merge]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the number of parts of every id, where its parts begin in one list, and that list."""
    lengths, firsts = np.ones(_NUM_IDS, np.int64), np.arange(_NUM_IDS)
    parts: list[int] = []
    for token, its_parts in parts_of(merges).items():
        lengths[token], firsts[token] = len(its_parts), _NUM_IDS + len(parts)
        parts += its_parts
    return lengths, firsts, np.append(np.arange(_NUM_IDS), np.array(parts, np.int64))


def _part_index(lengths: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    """Return firsts[i], firsts[i] + 1, ... (lengths[i] of them) for each i in turn."""
    ends = np.cumsum(lengths)
    return np.repeat(firsts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


# -----------------------------------------------------------------------------
# C routine: the same in one pass, some hundred times faster

# The stream is cut wherever no merge, early or late, could reach across. What lies between two cuts is short,
# and there the earliest merge that applies is applied until none does. That is the order of the definition,
# because a merge makes an id that only later merges know.
_C_SOURCE = r"""
#include <stdint.h>

enum { NO_MERGE = 0xFFFF, FORBIDDEN = 0xFFFF };

static int64_t join_run(uint16_t *ids, uint32_t *starts, int64_t count, const uint16_t *kind,
                        int64_t num_kinds, const uint16_t *merge_of, const uint16_t *merges) {
    for (;;) {
        int best = NO_MERGE;
        for (int64_t i = 0; i + 1 < count; i++) {
            int found = merge_of[kind[ids[i]] * num_kinds + kind[ids[i + 1]]];
            if (found < best) best = found;
        }
        if (best == NO_MERGE) return count;
        uint16_t left = merges[3 * best], right = merges[3 * best + 1], id = merges[3 * best + 2];
        int64_t to = 0;
        for (int64_t i = 0; i < count; i++, to++) {
            int is_pair = i + 1 < count && ids[i] == left && ids[i + 1] == right;
            if (starts) starts[to] = starts[i];
            ids[to] = is_pair ? id : ids[i];
            i += is_pair;
        }
        count = to;
    }
}

/* Join `count` tokens. kind_in, kind: number of each id among those that merges know, 0 for all others; in
   kind_in ids that the input must not hold are FORBIDDEN. may_meet, merge_of: by two kinds, whether a merge
   could reach across, and which merge joins the two. merges: left, right, id of each. joined, starts: room
   for `count`; starts may be NULL. Returns the number of tokens now, or -1 - i when token i is forbidden. */
int64_t merges_join(const uint16_t *tokens, int64_t count, const uint16_t *kind_in, const uint16_t *kind,
                    int64_t num_kinds, const uint8_t *may_meet, const uint16_t *merge_of,
                    const uint16_t *merges, uint16_t *joined, uint32_t *starts) {
    int64_t size = 0;
    for (int64_t i = 0; i < count;) {
        int64_t first = size;
        int64_t here = kind_in[tokens[i]];
        for (;;) {
            if (here == FORBIDDEN) return -1 - i;
            joined[size] = tokens[i];
            if (starts) starts[size] = (uint32_t)i;
            size++;
            i++;
            if (!here || i == count) break;
            int64_t next = kind_in[tokens[i]];
            if (next != FORBIDDEN && !may_meet[here * num_kinds + next]) break;
            here = next;
        }
        if (size - first > 1)
            size = first + join_run(joined + first, starts ? starts + first : starts, size - first, kind,
                                    num_kinds, merge_of, merges);
    }
    return size;
}

/* Count adjacent pairs of tokens with rank below num_ranks in counts[left * num_ranks + right]. */
void merges_count(const uint16_t *tokens, int64_t count, const uint16_t *rank, int64_t num_ranks,
                  int64_t *counts) {
    if (!count) return;
    int64_t left = rank[tokens[0]];
    for (int64_t i = 1; i < count; i++) {
        int64_t right = rank[tokens[i]];
        if (left < num_ranks && right < num_ranks) counts[left * num_ranks + right]++;
        left = right;
    }
}
"""


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return the compiled routines, or None without a C compiler."""
    try:
        library = ctypes.CDLL(str(compile_c(_C_SOURCE, "caseops_merges")))
    except (CompileError, OSError):
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.merges_join.restype = size
    library.merges_join.argtypes = [pointer, size, pointer, pointer, size, *[pointer] * 5]
    library.merges_count.restype = None
    library.merges_count.argtypes = [pointer, size, pointer, size, pointer]
    return library


class Joiner:
    """`join_by_definition` for many arrays, by the C routine where there is a compiler.

    forbidden   ids that the input must not hold; the ids that the merges make always are.
    """

    def __init__(self, merges: Sequence[Merge], forbidden: Sequence[int] = ()):
        self.merges = tuple(merges)
        known = sorted({token for merge in merges for token in (merge.left, merge.right, merge.id)})
        num_kinds = len(known) + 1
        self._kind = np.zeros(_NUM_IDS, np.uint16)
        self._kind[known] = np.arange(1, num_kinds)
        self._kind_in = self._kind.copy()
        self._kind_in[[*forbidden, *(merge.id for merge in merges)]] = 0xFFFF
        self._may_meet = np.zeros((num_kinds, num_kinds), np.uint8)
        self._merge_of = np.full((num_kinds, num_kinds), 0xFFFF, np.uint16)
        parts = parts_of(merges)
        for number, merge in enumerate(merges):
            last, first = parts.get(merge.left, [merge.left])[-1], parts.get(merge.right, [merge.right])[0]
            self._may_meet[self._kind[last], self._kind[first]] = 1
            pair = self._kind[merge.left], self._kind[merge.right]
            self._merge_of[pair] = min(number, self._merge_of[pair])
        self._table = np.array([(merge.left, merge.right, merge.id) for merge in merges], np.uint16)

    def join(self, tokens: np.ndarray, with_starts: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        """Return joined tokens and, if asked for, where each began; see `join_by_definition`.

        Raises ValueError with the place and id of a forbidden token.
        """
        library = _library()
        tokens = np.ascontiguousarray(tokens, np.uint16)
        if library is None:
            bad = np.flatnonzero(self._kind_in[tokens] == 0xFFFF)
            if len(bad):
                raise ValueError(f"token {bad[0]:,} is {tokens[bad[0]]}")
            joined, starts = join_by_definition(tokens, self.merges)
            return joined, starts if with_starts else None
        joined = np.empty(len(tokens), np.uint16)
        starts = np.empty(len(tokens), np.uint32) if with_starts else None
        size = library.merges_join(
            tokens.ctypes.data, len(tokens), self._kind_in.ctypes.data, self._kind.ctypes.data,
            len(self._may_meet), self._may_meet.ctypes.data, self._merge_of.ctypes.data,
            self._table.ctypes.data, joined.ctypes.data, None if starts is None else starts.ctypes.data)
        if size < 0:
            raise ValueError(f"token {-1 - size:,} is {tokens[-1 - size]}")
        return joined[:size], None if starts is None else starts[:size]


# -----------------------------------------------------------------------------
# Learning: always the most frequent pair next

_FIRST_RANKS = 512                        # a table of 512 x 512 counts stays in the processor's cache


def learn(tokens: np.ndarray, num_merges: int, targets: Sequence[int]) -> list[Merge]:
    """Choose `num_merges` pairs greedily: the most frequent one, joined everywhere, then again.

    tokens    (n,) uint16 of training documents, each beginning with BOS, which is never part of a pair.
    targets   ids to use, in this order.
    Of equally frequent pairs the one with the lowest (left, right) wins. Raises PrepareError when `targets`
    or the pairs that occur at least twice run out.
    """
    if not 1 <= num_merges <= len(targets):
        raise UsageError(f"--merges {num_merges}: expected 1 to {len(targets)}, the number of ids that the "
                         "tokenizer never gives")
    merges: list[Merge] = []
    frequency = np.zeros(_NUM_IDS, np.int64)
    for part in np.array_split(tokens, 1 + len(tokens) // (1 << 22)):
        frequency += np.bincount(part, minlength=_NUM_IDS)
    for target in targets[:num_merges]:
        left, right, pairs = _most_frequent_pair(tokens, frequency)
        if pairs < 2:
            raise PrepareError(f"--merges {num_merges}: expected as many pairs of tokens that occur at least "
                               f"twice, found {len(merges)}; ask for fewer or give more training shards")
        before = len(tokens)
        merge = Merge(left, right, target)
        tokens, _ = Joiner([merge]).join(tokens)
        count = before - len(tokens)
        merges.append(dataclasses.replace(merge, count=count))
        for token, change in ((left, -count), (right, -count), (target, count)):
            frequency[token] += change
    return merges


def _most_frequent_pair(tokens: np.ndarray, frequency: np.ndarray) -> tuple[int, int, int]:
    """Return (left, right, number of adjacent places) of the most frequent pair without BOS.

    A pair is no more frequent than its rarer token. So a table over the most frequent tokens is enough once
    its best pair beats the most frequent token outside.
    """
    candidates = np.argsort(-frequency, kind="stable")
    candidates = candidates[(candidates != BOS_ID) & (frequency[candidates] > 0)]
    num_ranks = _FIRST_RANKS
    while True:
        chosen = np.sort(candidates[:num_ranks])
        counts = _pair_counts(tokens, chosen)
        best = int(counts.argmax()) if len(chosen) else 0
        most = int(counts.flat[best]) if len(chosen) else 0
        outside = frequency[candidates[num_ranks]] if num_ranks < len(candidates) else -1
        if most > outside:
            if not most:
                return 0, 0, 0
            return int(chosen[best // len(chosen)]), int(chosen[best % len(chosen)]), most
        num_ranks *= 2


def _pair_counts(tokens: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Count the adjacent pairs of the ids `chosen` (k,) in a table (k, k) int64."""
    size = len(chosen)
    rank = np.full(_NUM_IDS, 0xFFFF, np.uint16)
    rank[chosen] = np.arange(size)
    counts = np.zeros((size, size), np.int64)
    library = _library()
    if library is not None:
        tokens = np.ascontiguousarray(tokens, np.uint16)
        library.merges_count(tokens.ctypes.data, len(tokens), rank.ctypes.data, size, counts.ctypes.data)
        return counts
    for start in range(0, len(tokens) - 1, 1 << 22):
        ranks = rank[tokens[start:start + (1 << 22) + 1]].astype(np.int64)
        left, right = ranks[:-1], ranks[1:]
        is_counted = (left < size) & (right < size)
        pairs = left[is_counted] * size + right[is_counted]
        counts += np.bincount(pairs, minlength=size * size).reshape(size, size)
    return counts


# -----------------------------------------------------------------------------
# Byte counts: those of a joined token are summed; what the sum forgets is kept apart

def join_bytes(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sum the byte counts (n,) uint16 of each joined token, int64 (m,); `starts` (m,) is what `join` gave."""
    sums, first = [np.zeros(0, np.int64)], 0
    for block in _blocks(starts):
        end = int(starts[first + len(block)]) if first + len(block) < len(starts) else len(values)
        first += len(block)
        begin = int(block[0])
        sums.append(np.add.reduceat(values[begin:end].astype(np.int64), block.astype(np.int64) - begin))
    return np.concatenate(sums)


def split_bytes(joined: np.ndarray, values: np.ndarray, merges: Sequence[Merge],
                model: ModelFile) -> np.ndarray:
    """Guess the byte counts of the parts (n,) uint16 from the sums (m,) of the tokens `joined` (m,).

    Every part gets what its piece usually stands for and the rest goes to the first part that begins with a
    space, which may stand for several, or else to the last part. Folded characters make exceptions, so what
    was joined is restored exactly only with the list that `byte_exceptions` gives.
    """
    lengths, firsts, parts = _part_table(merges)
    usual = np.zeros(_NUM_IDS, np.int64)
    usual[:len(model.pieces)] = [_usual_bytes(model, token) for token in range(len(model.pieces))]
    usual_sum, takes_rest = usual.copy(), np.zeros(_NUM_IDS, np.int64)
    for token, its_parts in parts_of(merges).items():
        usual_sum[token] = usual[list(its_parts)].sum()
        spaces = [at for at, part in enumerate(its_parts) if model.pieces[part].text.startswith(SPACE_MARK)]
        takes_rest[token] = spaces[0] if spaces else len(its_parts) - 1
    usual_of_parts = usual[parts]
    blocks = [np.zeros(0, np.uint16)]
    for ids, sums in zip(_blocks(joined), _blocks(values)):
        count = lengths[ids]
        starts = np.cumsum(count) - count
        guess = np.empty(count.sum(), np.int64)
        guess[starts] = sums              # right for every token that was not joined
        is_joined = count > 1
        ids, sums, count, starts = ids[is_joined], sums[is_joined], count[is_joined], starts[is_joined]
        guess[_part_index(count, starts)] = usual_of_parts[_part_index(count, firsts[ids])]
        guess[starts + takes_rest[ids]] += sums.astype(np.int64) - usual_sum[ids]
        blocks.append(np.clip(guess, 0, 0xFFFF).astype(np.uint16))
    return np.concatenate(blocks)


def _usual_bytes(model: ModelFile, token: int) -> int:
    if token < FIRST_BYTE_ID:
        return 0                          # BOS and operators; the other specials do not occur
    if token < FIRST_BYTE_ID + 256:
        return 1
    return len(model.pieces[token].text.replace(SPACE_MARK, " ").encode("utf-8"))


EXCEPTION = np.dtype([("place", "<u4"), ("bytes", "<u2")])


def byte_exceptions(values: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """Return the places (EXCEPTION records) where the true byte counts differ from those of `split_bytes`."""
    places = np.flatnonzero(values != guess)
    exceptions = np.empty(len(places), EXCEPTION)
    exceptions["place"], exceptions["bytes"] = places, values[places]
    return exceptions
