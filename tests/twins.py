"""Plain Python definitions of the C routines of train_gpt.py (section 18): the C must equal them bit for bit.

They are slow and meant to be read. Names and the order of steps are those of the C, where they are explained.
"""
import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch

import train_gpt as gpt

VOTES, NODES, LEVELS, PARTS = 4, gpt.NODES, gpt.LEVELS, 18
FULL = (1 << 64) - 1


def clamp(x: int, low: int, high: int) -> int:
    return min(max(x, low), high)


def divide(a: int, b: int) -> int:
    """a / b rounded towards zero, like C."""
    return a // b if a >= 0 else -(-a // b)


# --- arithmetic coder and decisions -------------------------------------------------------------------------

class Coder:
    """Arithmetic coder with adaptive decisions; `data` None encodes, else decodes."""

    def __init__(self, data: bytes | None) -> None:
        self.squash, self.stretch, self.rate, self.prior = (table.tolist() for table in gpt._tables())
        self.decode = data is not None
        self.data = iter(data or b"")
        self.low, self.high = 0, FULL
        self.out = bytearray()
        self.code = int.from_bytes(bytes(next(self.data, 0) for _ in range(8)), "big")

    def bit(self, bit: int, p: int) -> int:
        """Code one bit that is 1 with probability p / 65536; returns it."""
        middle = self.low + ((self.high - self.low) >> 16) * p
        if self.decode:
            bit = int(self.code <= middle)
        if bit:
            self.high = middle
        else:
            self.low = middle + 1
        while self.low >> 56 == self.high >> 56:
            self.out.append(self.high >> 56)
            self.low = self.low << 8 & FULL
            self.high = self.high << 8 & FULL | 255
            self.code = self.code << 8 & FULL | next(self.data, 0)
        return bit

    def finish(self) -> bytes:
        return bytes(self.out) + bytes([(self.low >> 56) + 1])

    def probability(self, logit: int) -> int:
        return self.squash[clamp(logit, -2047, 2047) + 2048]

    def decide(self, counters: list, cells: list[int], weight_sets: list, bit: int, max_age: int,
               speed: int) -> int:
        """One decision: counters[k][cells[k]] vote, two weight sets mix the votes; all learn in place."""
        votes = [self.stretch[table[cell] >> 20] for table, cell in zip(counters, cells)]
        dots = [sum(w * vote for w, vote in zip(weights, votes)) for weights in weight_sets]
        bit = self.bit(bit, self.probability(sum(dots) >> 19))
        for weights, dot in zip(weight_sets, dots):
            error = ((bit << 16) - self.probability(dot >> 18)) * speed
            for k, vote in enumerate(votes):
                weights[k] += vote * error + (1 << 19) >> 20
        for table, cell in zip(counters, cells):
            p, age = table[cell] >> 10, table[cell] & 1023
            target = 4194303 if bit else 0
            p += (target - p) * self.rate[age] >> 16
            if age < max_age:
                age += 1
            table[cell] = p << 10 | age
        return bit

    def number(self, value: int, bits: int) -> int:
        result = 0
        for k in reversed(range(bits)):
            result = result << 1 | self.bit(value >> k & 1, 32768)
        return result

    def share(self, value: int, odds: list[int]) -> int:
        """Three bits, each with one fast counter."""
        node = 1
        for k in (2, 1, 0):
            bit = self.bit(value >> k & 1, odds[node])
            odds[node] += (bit << 16) - odds[node] >> 6
            node = node << 1 | bit
        return node & 7


# --- codes --------------------------------------------------------------------------------------------------

def refit(gram: list[list[int]], n: int) -> list[list[int]]:
    """Coefficients (12 fractional bits) of the ridge regression of every column on those to its left.

    gram  sums over n rows of products of two columns, column 0 the constant. L D L' of the shrunk correlations
    has 28 fractional bits.
    """
    size, one = len(gram), 1 << 28
    keep = n * 250 // (n + 1000)
    sd = [math.isqrt(gram[i][i] + n) + 1 for i in range(size)]
    L: list[list[int]] = []
    D: list[int] = []
    coefficients = []
    for i in range(size):
        scaled: list[int] = []                      # row i of L D
        for j in range(i):
            correlation = divide(gram[i][j] << 24, sd[i] * sd[j]) * keep >> 4
            scaled.append(correlation - (sum(a * b for a, b in zip(scaled, L[j])) >> 28))
        L.append([divide(s << 28, D[j]) for j, s in enumerate(scaled)])
        explained = sum(a * b >> 28 for a, b in zip(L[i], scaled))
        D.append(max(one - explained, 1 << 16))
        b = L[i][:]                                 # solve (L left of i)' b = row i of L, from the last
        for j in reversed(range(i)):
            for k in range(j):
                b[k] -= b[j] * L[j][k] >> 28
        coefficients.append([clamp(divide((b[j] >> 8) * sd[i], sd[j]) >> 8, -32767, 32767) for j in range(i)])
    return coefficients


def level(variance: int) -> int:
    """Step of the variance axis, 8 to an octave."""
    variance = clamp(variance, 16, 1 << 19)
    octave = variance.bit_length() - 1
    return (octave - 4) * 8 + (variance >> octave - 3 & 7)


def next_state(state: int, bit: int) -> int:
    """The trellis' state after a code, whose parity is the state's and whose second-lowest bit is `bit`."""
    return state >> 1 ^ 33 * (state & 1) ^ 10 * bit


@dataclass
class Row:
    """Variances of one row, and what is known of it beforehand."""
    seen: int
    expected: int
    recent: int
    rest: int
    budget: int
    spent: int = 0
    similar: list = field(default_factory=list)     # (share in 1/8, regression errors) of rows like it
    left: list = field(default_factory=lambda: [8])


class CodesCoder:
    """Codes (matrices, rows, cols) to bytes, or bytes into `codes`. alike (rows, 2) asks for regression."""

    def __init__(self, codes: np.ndarray, alike: np.ndarray | None, trellis: int, data: bytes | None) -> None:
        self.coder = Coder(data)
        self.rate = self.coder.rate
        matrices, self.rows, self.cols = codes.shape
        self.lines = codes.reshape(-1, self.cols)
        self.alike, self.trellis = alike, trellis
        self.regress = alike is not None
        self.is_valid = True
        self.counters = []
        for copies in (2, 2, PARTS, PARTS):
            table = []
            for step in range(LEVELS):
                table += copies * self.coder.prior[step * NODES:(step + 1) * NODES]
            self.counters.append(table)
        fresh = (1 << 18) // VOTES
        self.by_part = [[[fresh] * VOTES for _ in range(NODES)] for _ in range(PARTS)]
        self.by_blend = [[[fresh] * VOTES for _ in range(NODES)] for _ in range(LEVELS)]
        self.slow, self.fast = [0] * self.cols, [0] * self.cols
        self.state = [0] * self.cols
        self.age = self.energy = 0
        self.errors: list[list[int]] = []           # of the regression, by row
        self.odds = [[32768] * 8, [32768] * 8]
        self.gram = [[0] * (self.cols + 1) for _ in range(self.cols + 1)]
        self.coefficients = [[0] * column for column in range(self.cols + 1)]
        self.refit_at = 16

    def run(self) -> bytes | None:
        """The stream; None when a code is off the trellis."""
        for row, line in enumerate(self.lines):
            state = self.start_row(row)
            if self.regress and row:
                self.code_similar_rows(state, row)
            if self.regress and row >= self.refit_at:
                self.coefficients = refit(self.gram, row)
                self.refit_at += self.refit_at // 3 + 1
            self.errors.append([])
            for j in range(self.cols):
                line[j] = self.code(state, j, int(line[j]))
            self.learn_row(state, row)
        return self.coder.finish() if self.is_valid else None

    def start_row(self, row: int) -> Row:
        mean = sum(self.slow) // self.cols if row else 6 << 18
        if row % self.rows == 0:                    # a new matrix
            self.age = 12 if row else 6
            self.fast = self.slow[:] if row else [mean] * self.cols
            self.slow = [mean] * self.cols
        if row % self.rows % gpt.TRELLIS_ROWS == 0:
            self.state = [0] * self.cols
        rest = mean * self.cols
        return Row(seen=mean, expected=mean, recent=mean, rest=rest, budget=self.energy if row else rest)

    def code_similar_rows(self, r: Row, row: int) -> None:
        for k in range(2):
            named = int(self.alike[row, k])
            share = self.coder.share(named & 7, self.odds[k])
            if not share:
                break
            which = self.coder.number(named >> 3, row.bit_length())
            r.similar.append((share, self.errors[which if which < row else 0]))

    def predict(self, r: Row, j: int) -> tuple[int, int]:
        """(by the regression alone, with similar rows) in 1/16 of an integer."""
        if not self.regress:
            return 0, 0
        own = sum(t * code for t, code in zip(self.coefficients[j + 1], r.left))
        own = own + (128 << self.trellis) >> 8 + self.trellis
        shared = sum(errors[j] * share for share, errors in r.similar) >> 3
        return own, clamp(own + shared, -1023, 1023)

    def row_ratio(self, r: Row, j: int) -> int:
        """Energy of this row's codes over what their columns lead to expect, times 256."""
        if self.regress:
            return clamp((r.seen << 8) // (r.expected + 1), 64, 1024)
        excess = clamp(divide(r.budget - r.spent << 8, max(r.rest, 0) + 1), 64, 1024) - 256
        to_come = self.cols - j
        return 256 + divide(excess * to_come, to_come + (self.cols >> 6))

    def code(self, r: Row, j: int, code: int) -> int:
        """Code one symbol and learn from it; returns it."""
        own, mu = self.predict(r, j)
        odd = self.trellis & self.state[j]
        m = mu - 8 * odd + 8 >> 4
        rest = mu - 8 * odd - 16 * m
        flip = -1 if rest < 0 else 1
        part, side = rest * flip, 0
        ratio = self.row_ratio(r, j)
        if not self.regress:
            part, side = clamp((ratio - 256 >> 5) + 4, 0, 8) + 9 * odd, odd
        A = self.slow[j] >> 10
        B = A * ratio >> 8
        F = (self.fast[j] >> 10) * ratio >> 8
        blend = level(B * 4 + F * 3 + (r.recent >> 10) >> 3)
        views = [level(A) * 2 + side, level(F) * 2 + side, blend * PARTS + part, level(B) * PARTS + part]
        t = 0 if self.coder.decode else ((code - odd >> self.trellis) - m) * flip
        t = self.code_distance(views, part, blend, t)
        if self.coder.decode:
            code = clamp((t * flip + m << self.trellis) + odd, -128, 127)
        if self.trellis and code & 1 != odd:
            self.is_valid = False
        self.learn_code(r, j, code, own, mu)
        return code

    def code_distance(self, views: list[int], part: int, blend: int, t: int) -> int:
        """The distance t: zero? negative? then is its size 2 or more, 3 or more, ..."""
        def decide(node: int, bit: bool) -> int:
            cells = [view * NODES + node for view in views]
            weight_sets = [self.by_part[part][node], self.by_blend[blend][node]]
            return self.coder.decide(self.counters, cells, weight_sets, int(bit), 1000, 2)

        if decide(0, t == 0):
            return 0
        sign = -1 if decide(1, t < 0) else 1
        found = 1
        while found < NODES - 1 and decide(found + 1, abs(t) > found):
            found += 1
        if found == NODES - 1:
            while found < 255 and self.coder.bit(int(abs(t) > found), 32768):
                found += 1
        return sign * found

    def learn_code(self, r: Row, j: int, code: int, own: int, mu: int) -> None:
        value = code * (16 >> self.trellis)
        r.left.append(code)
        if self.trellis:
            self.state[j] = next_state(self.state[j], code >> 1 & 1)
        self.errors[-1].append(clamp(value - own, -32767, 32767))
        variance = clamp(value - mu, -1023, 1023) ** 2 << 10
        step = self.rate[min(j + 16, 400)]
        r.seen += (variance - r.seen) * step >> 16
        r.expected += (self.slow[j] - r.expected) * step >> 16
        r.recent += variance - r.recent >> 4
        r.spent += variance
        r.rest -= self.slow[j]
        self.slow[j] += (variance - self.slow[j]) * self.rate[min(self.age, 1023)] >> 16
        self.fast[j] += (variance - self.fast[j]) * self.rate[min(self.age, 250)] >> 16

    def learn_row(self, r: Row, row: int) -> None:
        self.age += 1
        if row:
            self.energy += (r.spent - self.energy) * self.rate[min(row, 1023)] >> 16
        else:
            self.energy = r.spent
        if self.regress:
            for i, a in enumerate(r.left):
                for j, b in enumerate(r.left):
                    self.gram[i][j] += a * b


# --- words --------------------------------------------------------------------------------------------------

def code_words(words: np.ndarray, stride: int, data: bytes | None) -> bytes:
    """The stream of `words` (uint16), or fill `words` from `data`: high byte, then low byte, bit by bit."""
    coder = Coder(data)
    counters = [[[1 << 31 | 2] * 65536 for _ in range(VOTES)] for _ in range(2)]
    weights = [[[[105000] * VOTES for _ in range(2)] for _ in range(8)] for _ in range(2)]
    for i in range(len(words)):
        previous = int(words[i - 1]) if i else 0
        back = int(words[i - stride]) if i >= stride else 0
        word = 0 if coder.decode else int(words[i])
        high = 0
        for half in range(2):
            views = [0, previous >> 8, back >> 8, previous >> 12 << 4 | back >> 12]
            if half:
                after_previous = 1 + (previous >> 4 & 15) if previous >> 8 == high else 0
                after_back = 1 + (back >> 1 & 127) if back >> 8 == high else 0
                views = [0, high, after_previous, after_back]
            node = 1
            for k in reversed(range(8)):
                bit = word >> (k + 8 - 8 * half) & 1
                cells = [view << 8 | node for view in views]
                node = node << 1 | coder.decide(counters[half], cells, weights[half][k], bit, 250, 60)
            high = high << 8 | node & 255
        words[i] = high
    return coder.finish()


# --- in place of the C --------------------------------------------------------------------------------------

def run_coder(routine: str, buffer: np.ndarray, decode: bool, values: np.ndarray, *options) -> int:
    """train_gpt._run_coder without C."""
    if not values.size:
        return 0
    data = buffer.tobytes() if decode else None
    if routine == "code_codes":
        trellis, alike = options
        stream = CodesCoder(values, alike, trellis, data).run()
    else:
        stream = code_words(values, *options, data)
    if stream is None:
        return -1
    if not decode:
        kept = np.frombuffer(stream, np.uint8)[:len(buffer)]
        buffer[:len(kept)] = kept
    return len(stream)


@contextlib.contextmanager
def instead_of_c() -> Iterator[None]:
    """Inside, encode_codes, decode_codes, encode_words and decode_words run these definitions."""
    with mock.patch.object(gpt, "_run_coder", run_coder):
        yield


# --- trellis rounding, fast on small shapes -----------------------------------------------------------------

def numpy_trellis_round(x: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """train_gpt.plain_trellis_round to the last bit, several times faster where lines are few."""
    x, limit = x.numpy().T, limit.numpy()[:, None]
    residue = np.arange(4, dtype=np.float32)
    low, high = np.ceil((-limit - residue) / 4), np.floor((limit - residue) / 4)
    points = 4 * np.clip(np.floor((x[..., None] - residue) / 4 + np.float32(0.5)), low, high) + residue
    state = np.arange(gpt.TRELLIS_STATES)
    sources = np.stack([gpt.next_state(state, bit).argsort() for bit in (0, 1)])
    residues = (sources & 1) + np.array([[0], [2]])
    costs = np.square(x[..., None] - points)[..., residues]         # (n, lines, 2, states)
    took = np.empty((*x.shape, gpt.TRELLIS_STATES), bool)
    cost = np.where(state == 0, np.float32(0), np.float32(1e30)) + np.zeros((x.shape[1], 1), np.float32)
    for i, total in enumerate(costs):
        total += cost.take(sources, 1)
        np.less(total[:, 1], total[:, 0], out=took[i])
        np.minimum(total[:, 0], total[:, 1], out=cost)
    line, found = np.arange(x.shape[1]), np.empty(x.shape, int)
    at = cost.argmin(-1)
    for i in reversed(range(len(x))):
        bit = took[i, line, at].astype(int)
        found[i] = residues[bit, at]
        at = sources[bit, at]
    return torch.from_numpy(np.take_along_axis(points, found[..., None], -1)[..., 0].T.copy())


# Decorates a test that rounds by the trellis and is about something else.
fast_trellis = mock.patch.object(gpt, "trellis_round", numpy_trellis_round)


# --- n-gram hints -------------------------------------------------------------------------------------------

class Hints(NamedTuple):
    """Per target: hinted token int32 (0 where closed), gate bool, confidence fp32 (0 where it is new)."""
    hint: np.ndarray
    gate: np.ndarray
    confidence: np.ndarray


def closed_hints(count: int) -> Hints:
    return Hints(np.zeros(count, np.int32), np.zeros(count, bool), np.zeros(count, np.float32))


def ngram_hints(tokens: np.ndarray, order: np.ndarray, doc_start: np.ndarray, context: int,
                threshold: float) -> Hints:
    """Walk the targets in `order`; look each context of `context` tokens up, then count the target that follows it.

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
        key = tuple(tokens[begin:i + 1].tolist())
        entry = table.setdefault(key, {"counts": {}, "total": 0, "top": 0, "best": 0})
        if entry["total"]:
            confidence[i] = np.float32(entry["best"]) / np.float32(entry["total"])
            if confidence[i] >= np.float32(threshold):
                hint[i], gate[i] = entry["top"], True
        target = int(tokens[i + 1])
        count = entry["counts"].get(target, 0) + 1
        entry["counts"][target] = count
        entry["total"] += 1
        if count > entry["best"]:
            entry["top"], entry["best"] = target, count
    return hints


def c_ngram_hints(tokens: np.ndarray, order: np.ndarray, doc_start: np.ndarray, context: int,
                  threshold: float) -> Hints:
    """ngram_hints by train_gpt.NgramTable, all targets at once."""
    table = gpt.NgramTable(tokens, len(order), context, threshold)
    found, confidence = table.feed(order, doc_start[order])
    hints = closed_hints(len(tokens) - 1)
    hints.hint[order] = np.maximum(found, 0)
    hints.gate[order] = found >= 0
    hints.confidence[order] = confidence
    return hints
