"""The CaseOps transform: exact inverse, strict grammar, byte weights, streaming tool."""
import io
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lossless_caps
from lossless_caps import ALLCAPS, CAPNEXT, ESC, OPERATORS, TITLE, CaseOpsError, byte_weights, decode, encode
from records import records

exhaustive = settings(derandomize=True, deadline=None, max_examples=300, database=None)

# Ordinary text hardly ever has operators or neighbours of ASCII letters, so draw those on purpose.
NEIGHBOURS = "aAbBzZ '1_\n\u00e9\u00c9\u0130\ue000\ue005" + OPERATORS
any_text = st.text(alphabet=st.one_of(st.sampled_from(NEIGHBOURS), st.characters(exclude_categories=[])))
caseops_like = st.text(alphabet="aAb " + OPERATORS, max_size=12)

# Section 3.1 of the specification, written out.
CANONICAL = re.compile(
    f"(?:{ESC}[{OPERATORS}]"
    f"|[^A-Za-z{OPERATORS}]"
    f"|(?:{ALLCAPS}[a-z][a-z]+"
    f"|(?!{TITLE}[a-z](?:{CAPNEXT}[a-z])+(?![a-z{CAPNEXT}])){TITLE}?[a-z](?:{CAPNEXT}?[a-z])*)"
    f"(?![a-z{TITLE}{ALLCAPS}{CAPNEXT}]))*", re.DOTALL)


def notation(text: str) -> str:
    return text.translate(str.maketrans("⇑⇈↑⎋", OPERATORS))


@pytest.mark.parametrize("text, caseops", [
    ("", ""), ("The NASA Launch", "⇑the ⇈nasa ⇑launch"), ("I", "⇑i"), ("iPhone OpenAI", "i↑phone ⇑open↑a↑i"),
    ("McDONALD", "⇑mc↑d↑o↑n↑a↑l↑d"), ("ABc", "⇑a↑bc"), ("aBC", "a↑b↑c"), ("DON'T", "⇈don'⇑t"),
    ("A1B2", "⇑a1⇑b2"), ("COVID-19", "⇈covid-19"), ("U.S.A.", "⇑u.⇑s.⇑a."), ("SNAKE_CASE", "⇈snake_⇈case"),
    ("École", "École"), ("ÉCOLE", "É⇈cole"), ("E\u0301cole", "⇑e\u0301cole"), ("STRAßE", "⇈straß⇑e"),
    ("İSTANBUL", "İ⇈stanbul"), ("ǅ ß ẞ ﬁ Å \u212a ſ Ａ", "ǅ ß ẞ ﬁ Å \u212a ſ Ａ"), (TITLE, ESC + TITLE),
    (f"Mc{CAPNEXT}DONALD", f"⇑mc⎋{CAPNEXT}⇈donald"), (ESC + ESC, ESC * 4), ("\ud800", "\ud800"),
])
def test_examples_of_the_specification(text, caseops):
    assert encode(text) == notation(caseops)
    assert decode(notation(caseops)) == text


def test_encode_agrees_with_the_vectors(vectors_dir):
    for record in records(vectors_dir, "caseops_vectors.jsonl.gz"):
        assert encode(record["text"]) == record["caseops_text"], record["id"]
        assert decode(record["caseops_text"]) == record["text"], record["id"]


def test_decode_agrees_with_the_vectors(vectors_dir):
    for record in records(vectors_dir, "caseops_decode_vectors.jsonl.gz"):
        if record["canonical"]:
            assert decode(record["caseops_text"]) == record["decoded"], record["id"]
            assert decode(record["caseops_text"], strict=False) == record["decoded"], record["id"]
        else:
            with pytest.raises(CaseOpsError):
                decode(record["caseops_text"])
            decode(record["caseops_text"], strict=False)


@exhaustive
@given(any_text)
def test_round_trip_is_exact_on_any_string(text):
    caseops = encode(text)
    assert decode(caseops) == text
    assert decode(caseops, strict=False) == text
    assert not re.search("[A-Z]", caseops)


@exhaustive
@given(any_text)
def test_byte_weights_sum_to_the_original_bytes(text):
    caseops = encode(text)
    weights = byte_weights(caseops)
    assert len(weights) == len(caseops)
    assert sum(weights) == len(text.encode("utf-8", "surrogatepass"))


def test_byte_weights_of_operators_and_escapes():
    assert list(byte_weights(notation("⇑a⎋⇈b↑c⎋⎋é€😀"))) == [0, 1, 0, 3, 1, 0, 1, 0, 3, 2, 3, 4]


@exhaustive
@given(any_text, any_text)
def test_pieces_join_where_no_word_is_cut(first, second):
    if not (re.search("[A-Za-z]$", first[-1:]) and re.match("[A-Za-z]", second)):
        assert encode(first + second) == encode(first) + encode(second)


def test_strict_mode_accepts_exactly_the_grammar():
    accepted = total = 0
    for length in range(6):
        for characters in itertools.product("aA " + OPERATORS, repeat=length):
            caseops = "".join(characters)
            is_canonical = CANONICAL.fullmatch(caseops) is not None
            try:
                assert encode(decode(caseops)) == caseops
                assert is_canonical, ascii(caseops)
                accepted += 1
            except CaseOpsError as error:
                assert not is_canonical, ascii(caseops)
                assert 0 <= error.offset < len(caseops)
            total += 1
    assert 0 < accepted < total


@exhaustive
@given(caseops_like)
def test_permissive_mode_never_raises_and_strict_mode_matches_the_grammar(caseops):
    text = decode(caseops, strict=False)
    is_canonical = encode(text) == caseops
    assert is_canonical == (CANONICAL.fullmatch(caseops) is not None)
    if is_canonical:
        assert decode(caseops) == text
    else:
        with pytest.raises(CaseOpsError):
            decode(caseops)


@pytest.mark.parametrize("caseops, offset, reason", [
    ("ab ⇑", 3, "TITLE at the end"), ("a⎋b", 1, "not an operator"), ("⇑ a", 0, "not a letter"),
    ("a⇑b", 1, "inside a word"), ("a⇈bc", 1, "inside a word"), ("x ⇈a", 2, "ALLCAPS"),
    ("⇈a b", 0, "one-letter"), ("↑a", 0, "start of a word"), ("⇈ab↑c", 3, "inside an ALLCAPS word"),
    ("a↑↑b", 1, "not a letter"), ("abC", 2, "raw capital"), ("x ⇑a↑b.", 2, "fully capitalised"),
])
def test_strict_errors_name_offset_and_reason(caseops, offset, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        decode(notation(caseops))
    assert caught.value.offset == offset


def test_permissive_mode_drops_operators_with_nothing_to_act_on():
    assert decode(notation("⇑ ⇈1 ↑⎋x⇑a ⇈"), strict=False) == " 1 xA "


# -- the tool

def transform(data: bytes, action: str, strict: bool = True) -> bytes:
    sink = io.BytesIO()
    lossless_caps._transform_stream(io.BytesIO(data), sink, action, strict)
    return sink.getvalue()


@exhaustive
@given(text=st.text(alphabet=st.one_of(st.sampled_from("aAB .\n\u00e9" + OPERATORS),
                                       st.characters(exclude_categories=["Cs"]))), chunk=st.integers(1, 9))
def test_streaming_in_chunks_equals_the_whole(text, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lossless_caps, "_STREAM_CHUNK_BYTES", chunk)
        caseops = transform(text.encode(), "encode")
        assert caseops == encode(text).encode()
        assert transform(caseops, "decode") == text.encode()


def test_stream_errors_count_from_the_start_of_the_stream(monkeypatch):
    monkeypatch.setattr(lossless_caps, "_STREAM_CHUNK_BYTES", 16)
    with pytest.raises(CaseOpsError) as caught:
        transform(("é word " * 50 + "Bad").encode(), "decode")
    assert caught.value.offset == 7 * 50
    with pytest.raises(ValueError, match="byte 42: expected UTF-8"):
        transform(b"a" * 42 + b"\xff" + b"b" * 42, "encode")


def run_tool(repo: Path, *arguments: str, data: bytes = b"") -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, repo / "lossless_caps.py", *arguments], input=data,
                          capture_output=True, check=False)


def test_tool_round_trip_and_exit_codes(repo):
    text = "The NASA Launch\r\n\u00c9cole\ue001 end".encode()
    encoded = run_tool(repo, "encode", data=text)
    assert encoded.returncode == 0 and encoded.stdout == encode(text.decode()).encode()
    decoded = run_tool(repo, "decode", data=encoded.stdout)
    assert decoded.returncode == 0 and decoded.stdout == text
    bad = run_tool(repo, "decode", data=b"a B")
    assert bad.returncode == 1 and b"code point 2: raw capital 'B'" in bad.stderr
    assert run_tool(repo, "decode", "--permissive", data=b"a B").stdout == b"a B"
    assert run_tool(repo, "encode", "--permissive").returncode == 2
    assert run_tool(repo).returncode == 2


def test_tool_reports_a_full_disk(repo):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with open(full, "wb") as sink:
        done = subprocess.run([sys.executable, repo / "lossless_caps.py", "encode"], input=b"A" * 100_000,
                              stdout=sink, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert done.stderr == b"lossless_caps.py encode: expected to write the result, found: " \
                          b"No space left on device; free some space\n"


def test_tool_ends_quietly_when_interrupted(monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(lossless_caps, "_transform_stream", interrupt)
    assert lossless_caps.main(["encode"]) == 130
    assert capsys.readouterr().err == "lossless_caps.py encode: interrupted\n"
