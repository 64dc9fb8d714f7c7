"""Properties of the weight coder: exact round trips, C equals its definition, damaged streams are refused."""
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch

import train_gpt as coder
import twins


@pytest.fixture
def rng() -> np.random.Generator:
    """Every test draws from a generator of its own."""
    return np.random.default_rng(5)


def gaussian_codes(rng: np.random.Generator, matrices: int, rows: int, cols: int, max_code: int,
                   std: float = 2.5) -> np.ndarray:
    columns = np.exp(0.3 * rng.standard_normal(cols))
    codes = np.rint(rng.standard_normal((matrices, rows, cols)) * columns * std + rng.standard_normal(cols))
    return np.clip(codes, -max_code, max_code).astype(np.int8)


def trellis_codes(rng: np.random.Generator, matrices: int, rows: int, cols: int,
                  std: float = 5.0) -> np.ndarray:
    x = torch.from_numpy(rng.standard_normal((cols * matrices, rows)).astype(np.float32) * std)
    codes = coder.round_column(x, torch.full((len(x), 1), 127.0), True) if x.numel() else x
    return codes.view(cols, matrices, rows).permute(1, 2, 0).to(torch.int8).contiguous().numpy()


def assert_c_and_definition_agree(codes: np.ndarray, **options: bool) -> bytes:
    """Both write the same stream, and both read the codes from it; returns it."""
    stream = coder.encode_codes(codes, **options)
    assert np.array_equal(coder.decode_codes(stream), codes)
    with twins.instead_of_c():
        assert coder.encode_codes(codes, **options) == stream
        assert np.array_equal(coder.decode_codes(stream), codes)
    return stream


SHAPES = [(1, 1, 1), (1, 1, 7), (2, 5, 1), (3, 9, 17), (1, 40, 12), (2, 0, 5), (2, 5, 0)]


@pytest.mark.parametrize("regress", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_c_writes_the_codes_stream_of_its_definition(shape, regress, rng):
    assert_c_and_definition_agree(gaussian_codes(rng, *shape, 31), regress=regress)


@pytest.mark.parametrize("regress", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 270, 4)])
def test_c_writes_the_trellis_stream_of_its_definition(shape, regress, rng):
    assert_c_and_definition_agree(trellis_codes(rng, *shape), regress=regress, trellis=True)


def test_trellis_codes_cost_one_bit_less_than_their_range_suggests(rng):
    codes = trellis_codes(rng, 3, 256, 200)
    bits = [8 * len(coder.encode_codes(codes, trellis=trellis)) / codes.size for trellis in (False, True)]
    assert bits[1] < bits[0] - 0.9


def test_codes_off_the_trellis_are_refused(rng):
    codes = gaussian_codes(rng, 1, 20, 10, 31)
    with pytest.raises(ValueError, match="wrong parity"):
        coder.encode_codes(codes, trellis=True)
    with twins.instead_of_c(), pytest.raises(ValueError, match="wrong parity"):
        coder.encode_codes(codes, trellis=True)


def test_c_follows_its_definition_while_the_regression_is_refitted(rng):
    codes = gaussian_codes(rng, 2, 150, 5, 63, std=5)
    codes[:, :, 3] = codes[:, :, 1] // 2 + codes[:, :, 0] // 3          # something to find
    assert_c_and_definition_agree(codes, regress=True)


def rows_that_repeat(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    codes = gaussian_codes(rng, 1, rows, cols, 31, std=6)
    for row in range(rows // 2, rows):
        earlier = codes[0, rng.integers(row, size=2)].astype(int)
        codes[0, row] = np.clip((5 * earlier[0] + 3 * earlier[1]) // 6 + rng.integers(-1, 2, cols), -31, 31)
    return codes


def test_rows_that_resemble_earlier_rows_are_found_and_cost_less(rng):
    codes = rows_that_repeat(rng, 60, 48)
    alike = coder.similar_rows(codes[0])
    assert (alike[:, 0] & 7).max() > 0 and (alike[:, 1] & 7).max() > 0
    assert all((entry >> 3) < row for row in range(1, 60) for entry in alike[row])
    stream = assert_c_and_definition_agree(codes, regress=True)
    assert len(stream) < 0.95 * len(coder.encode_codes(codes))


@pytest.mark.parametrize("values", [
    np.full(300, -127), np.full(300, 127), np.tile([-127, 127, 0], 100), np.r_[np.zeros(299), 127],
    np.random.default_rng(6).integers(-127, 128, 300)], ids=("lowest", "highest", "both", "lone", "uniform"))
def test_extreme_codes_round_trip(values):
    codes = values.astype(np.int8).reshape(2, 15, 10)
    for regress in (False, True):
        assert_c_and_definition_agree(codes, regress=regress)


def test_codes_larger_than_the_first_buffer_round_trip(rng):
    codes = rng.choice(np.array([-127, 127, 0], np.int8), (1, 200, 200))
    stream = coder.encode_codes(codes)
    assert len(stream) > 2 * codes.size and np.array_equal(coder.decode_codes(stream), codes)


def test_threads_that_race_for_the_tables_agree(rng):
    codes = gaussian_codes(rng, 2, 30, 32, 31)
    expected = coder.encode_codes(codes)
    for _ in range(5):
        coder._tables.cache_clear()
        with coder.ThreadPool(8) as pool:
            assert set(pool.map(lambda _: coder.encode_codes(codes), range(16), chunksize=1)) == {expected}


def test_gaussian_codes_cost_about_their_entropy(rng):
    codes = gaussian_codes(rng, 4, 256, 128, 31)
    fresh = sum(column_entropy_bytes(codes[:, :, j]) for j in range(128))
    assert len(coder.encode_codes(codes)) < 1.03 * fresh + 2000


def column_entropy_bytes(x: np.ndarray) -> float:
    p = np.bincount(x.ravel().astype(int) + 127) / x.size
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum() * x.size / 8)


@pytest.mark.parametrize("values", [
    np.zeros(0), np.ones(1), np.linspace(-3, 3, 777), np.sort(np.random.default_rng(7).standard_normal(500)),
    np.random.default_rng(8).standard_normal(600) * 1e-4, [np.inf, -np.inf, np.nan, -0.0, 0.0, 65504, 6e-8]],
    ids=("none", "one", "line", "sorted", "small", "special"))
def test_fp16_words_round_trip_bit_for_bit(values):
    words = np.asarray(values, np.float16).view(np.uint16)
    stream = coder.encode_words(words, stride=50)
    assert np.array_equal(coder.decode_words(stream), words)
    with twins.instead_of_c():
        assert coder.encode_words(words, stride=50) == stream
        assert np.array_equal(coder.decode_words(stream), words)


def test_words_close_to_a_known_base_cost_little(rng):
    base = (rng.random(3000) + 1).astype(np.float16).view(np.uint16)
    words = (base + rng.integers(-1, 2, 3000)).astype(np.uint16)
    stream = coder.encode_words(words, base=base)
    assert len(stream) < 800 and np.array_equal(coder.decode_words(stream, base=base), words)


def test_arrays_that_are_no_code_matrices_are_refused():
    for wrong in (np.zeros((1, 2, 2), np.int16), np.zeros((2, 2), np.int8)):
        with pytest.raises(ValueError, match="int8"):
            coder.encode_codes(wrong)
    with pytest.raises(ValueError, match="regress=True takes at most"):
        coder.encode_codes(np.zeros((1, 1, 513), np.int8), regress=True)


def damage(stream: bytes, rng: np.random.Generator) -> tuple[bytes, bool]:
    """One random accident: flipped bits, a cut, extra bytes, a swap, foreign content, a forged checksum."""
    data, kind = bytearray(stream), rng.integers(7)
    at = int(rng.integers(len(data)))
    if kind <= 1:
        for at in rng.integers(len(data), size=1 + kind * 5):
            data[at] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        data[at:at] = rng.bytes(int(rng.integers(1, 20)))
    elif kind == 4:
        data[at:at + 4] = rng.bytes(4)
    elif kind == 5:
        return rng.bytes(int(rng.integers(200))), False
    else:                                                 # a flip whose outer checksum was made to fit again
        data[int(rng.integers(len(data) - 4))] ^= 1 << int(rng.integers(8))
        data[-4:] = coder.zlib.crc32(bytes(data[:-4])).to_bytes(4, "little")
    return bytes(data), kind == 6


def test_a_thousand_damaged_streams_are_refused():
    rng = np.random.default_rng(11)
    codes = rows_that_repeat(rng, 30, 12).reshape(3, 10, 12)
    words = rng.standard_normal(200).astype(np.float16).view(np.uint16)
    cases = [(coder.encode_codes(codes, regress=True), coder.decode_codes, codes),
             (coder.encode_words(words, stride=20), coder.decode_words, words)]
    refused = 0
    for trial in range(1000):
        stream, decode, original = cases[trial % 2]
        broken, forged = damage(stream, rng)
        if broken == stream:
            continue
        try:                                      # only a forged stream may pass, and only if nothing changed
            decoded = decode(broken)
            assert forged and np.array_equal(decoded, original)
        except ValueError as error:
            assert "stream" in str(error)
            refused += 1
    assert refused > 950


def test_a_stream_of_the_other_kind_is_refused():
    words = np.arange(50, dtype=np.uint16)
    with pytest.raises(ValueError, match="kind"):
        coder.decode_codes(coder.encode_words(words))


def stream_of(kind: int, shape: tuple[int, int, int], payload: bytes) -> bytes:
    """A forged stream whose checksum is right."""
    body = coder.STREAM_HEADER.pack(coder.STREAM_MAGIC, kind, 0, *shape) + payload + bytes(4)
    return body + zlib.crc32(body).to_bytes(4, "little")


def test_a_forged_count_of_words_is_refused_before_it_is_decoded():
    with pytest.raises(ValueError, match="its header is damaged"):
        coder.decode_words(stream_of(coder.WORDS, (0, 2 ** 32 - 1, 1), b"\0"))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by RLIMIT_AS")
def test_too_little_memory_is_an_error_and_not_a_crash(tmp_path):
    (tmp_path / "wide").write_bytes(stream_of(coder.CODES, (1, 1, 1 << 27), b"\x7f" * 4096))
    script = f"""
import pathlib, resource
import train_gpt as gpt
gpt.compile_c(gpt.C_SOURCE)
room = 4096 * int(open('/proc/self/statm').read().split()[0]) + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (room, room))
gpt.decode_codes(pathlib.Path({str(tmp_path / 'wide')!r}).read_bytes())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=coder.REPO, capture_output=True, text=True)
    assert done.returncode == 1 and "MemoryError: no memory to code (1, 1, 134217728)" in done.stderr
