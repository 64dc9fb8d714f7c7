"""Preparation: exact ids and bytes, split, shards, robustness, tokenizer training."""
import contextlib
import errno
import gzip
import hashlib
import io
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import caseops_encoder
import lossless_caps
import prepare_caseops_data as prepare
from caseops_encoder import DocumentEncoder, ModelFile, PrepareError, Tokenizer, encode_document
from records import records

OFFICIAL = "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
FIXED = settings(derandomize=True, deadline=None, max_examples=300, database=None)

# White space, deleted characters, expansions, composition, operators, and what plain text is made of.
TRICKY = ("\t\n\x0c\r  "
          "\u00a0\u200b\ufeff\ufffd\u2581\x01\x02\x0b\x1f\x7f\x9f\x00\u0085\u00ad\u200d\u00a8\u00b4\u00bd\u2026\ufb01\u0301\u0308\u2122\uff21\u00df\u1100\u1161\u4e00\ufdfa\u337f\u2019\u2014\u201c\U0001f600"
          "aabeEB07.,<" + lossless_caps.OPERATORS)
texts = st.text(alphabet=st.one_of(st.sampled_from(TRICKY), st.sampled_from("etaoins ETA ."),
                                   st.characters(exclude_categories=["Cs"])), max_size=40)


@pytest.fixture(scope="module")
def official(vectors_dir) -> Path:
    path = vectors_dir.parent / "reference_tokenizer" / OFFICIAL
    if not path.is_file():
        pytest.skip(f"the official tokenizer is not at {path}; it comes with the official data set")
    return path


@pytest.fixture(scope="module")
def shipped() -> Tokenizer:
    return Tokenizer(ModelFile.read(prepare.SHIPPED_TOKENIZER))


@pytest.fixture(scope="module")
def library() -> Path:
    try:
        return caseops_encoder.compile_encoder()
    except caseops_encoder.CompileError as error:
        pytest.skip(f"the C encoder cannot be built: {error}")


@pytest.fixture(scope="module")
def fast(shipped, library) -> DocumentEncoder:
    encoder = DocumentEncoder(shipped, library)
    assert not encoder.reason
    return encoder


def write_docs(path: Path, docs: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in docs), "ascii")
    return path


def read_shards(folder: Path, series: str) -> np.ndarray:
    paths = sorted(folder.glob(f"fineweb_{series}_" + "[0-9]" * 6 + ".bin"))
    return np.concatenate([np.fromfile(path, "<u2")[512:] for path in paths] or [np.zeros(0, np.uint16)])


def all_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def some_docs(count: int) -> list[str]:
    rng = np.random.default_rng(7)
    words = ["The", "NASA", "launch", "of", "iPhone", "caf\u00e9", "", "don\u2019t", "U.S.A.", "\u00bd",
             "x\n\ny", "1999"]
    return [" ".join(rng.choice(words, rng.integers(0, 60))) for _ in range(count)]


def build(docs: Path, out: Path, **options) -> dict:
    return prepare.build(docs, out, **{"val_docs": 3, "show_progress": False, **options})


# -- ids and bytes

def check_encoder(encoder: DocumentEncoder, text: str) -> None:
    want_ids, want_values, *want_edges = encode_document(encoder.tokenizer, text)
    ids, values, *edges = encoder.encode(text)
    want = [1, *want_ids], [0, *want_values], want_edges
    assert (ids.tolist(), values.tolist(), edges) == want, ascii(text)
    assert encoder.encode_ids(text).tolist() == [1, *want_ids]


def test_vectors_with_the_official_tokenizer(official, vectors_dir):
    tokenizer = Tokenizer(ModelFile.read(official))
    encoder = DocumentEncoder(tokenizer)
    for record in records(vectors_dir, "caseops_vectors.jsonl.gz"):
        expected = (record["token_ids"], record["bytes_per_token"], *record["edge_bytes"])
        assert encode_document(tokenizer, record["text"]) == expected, record["id"]
        check_encoder(encoder, record["text"])


@FIXED
@given(texts)
def test_bytes_of_tokens_and_edges_sum_to_the_document(shipped, text):
    ids, values, lead, trail = encode_document(shipped, text)
    assert len(ids) == len(values)
    assert sum(values) + lead + trail == len(text.encode())


@FIXED
@given(texts)
def test_fast_encoder_equals_the_library(fast, text):
    check_encoder(fast, text)


@settings(FIXED, max_examples=60)
@given(st.lists(texts, min_size=1, max_size=4))
def test_encoding_does_not_depend_on_earlier_documents(shipped, fast, library, documents):
    fresh = DocumentEncoder(shipped, library)
    for text in documents:
        for seen, new in zip(fast.encode(text), fresh.encode(text)):
            assert np.array_equal(seen, new)


def charsmap_rules(charsmap: bytes) -> list[str]:
    """Return the keys of the double-array trie that a character map begins with."""
    size = int.from_bytes(charsmap[:4], "little")
    units = np.frombuffer(charsmap[4:4 + size], "<u4").astype(np.int64)
    bases = (np.arange(len(units)) ^ (units >> 10 << ((units & 512) >> 6))).tolist()
    # A child of a node stands at the node's base xor its label, so children are found by place xor label.
    children: dict[int, list[tuple[int, int]]] = {}
    inner = np.flatnonzero((units >> 31 == 0) & (units & 255 > 0))
    for place, label in zip(inner.tolist(), (units[inner] & 255).tolist()):
        children.setdefault(place ^ label, []).append((place, label))
    ends_rule = (units >> 8 & 1).tolist()
    rules, todo = [], [(0, b"")]
    while todo:
        place, key = todo.pop()
        if ends_rule[place]:
            rules.append(key.decode())
        todo += [(child, key + bytes([label])) for child, label in children.get(bases[place], ())]
    return rules


def test_no_rule_of_the_official_map_touches_plain_text_or_crosses_a_space(shipped):
    rules = charsmap_rules(shipped.model.charsmap)
    assert len(rules) > 200_000
    plain = set(map(chr, range(33, 127))) | set("\u2013\u2014\u2018\u2019\u201c\u201d")
    assert not [rule for rule in rules if len(rule) > 1 and (" " in rule or "\n" in rule)]
    # A plain letter may begin a rule (e + acute accent), which is why one odd character makes a stretch odd.
    assert not [rule for rule in rules if plain.issuperset(rule) or not plain.isdisjoint(rule[1:])]


def test_long_stretches_many_tokens_and_a_memo_that_overflows(fast, monkeypatch):
    monkeypatch.setattr(DocumentEncoder, "MAX_MEMO_BYTES", 1 << 18)
    for text in ["x" * 1000 + " " + "ab" * 5000 + "\n\n" + "\u00e9" * 3000, "a" + " " * 70000 + "b",
                 "\ufdfa" * 5000, " " * 1000, "\n \x01 \n  A",
                 " ".join(f"{number} {number:x}" for number in range(20000))]:
        check_encoder(fast, text)


def test_without_a_compiler_the_build_is_the_same(tmp_path, monkeypatch, capsys):
    docs = write_docs(tmp_path / "docs.jsonl", some_docs(12))
    build(docs, tmp_path / "fast")
    caseops_encoder.compile_encoder.cache_clear()
    monkeypatch.setattr(caseops_encoder.shutil, "which", lambda name: None)
    build(docs, tmp_path / "slow")
    assert 'reason:"no C compiler' in capsys.readouterr().err
    assert all_files(tmp_path / "fast") == all_files(tmp_path / "slow")


@pytest.mark.parametrize("script, reason", [
    ("echo 'no stdint.h' >&2; exit 1", "cc failed: no stdint.h"),
    ('while [ "$1" != -o ]; do shift; done; echo junk > "$2"', "cannot be loaded"),
    (None, "cannot be run"),
])
def test_a_compiler_that_does_not_work_is_named(tmp_path, monkeypatch, capsys, script, reason):
    (tmp_path / "cc").write_text(f"#!/bin/sh\n{script}\n" if script else "no program")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    caseops_encoder.compile_encoder.cache_clear()
    build(write_docs(tmp_path / "docs.jsonl", some_docs(12)), tmp_path / "out")
    caseops_encoder.compile_encoder.cache_clear()
    err = capsys.readouterr().err
    assert "encoder:library reason:" in err and reason in err


def test_a_tokenizer_with_another_character_map_uses_the_library(tmp_path):
    model = caseops_encoder.ModelFile.read(prepare.SHIPPED_TOKENIZER)
    path = tmp_path / "other.model"
    path.write_bytes(prepare._with_charsmap(model.data, b""))
    encoder = DocumentEncoder(Tokenizer(ModelFile.read(path)))
    assert "character map" in encoder.reason
    check_encoder(encoder, "\u00bd The NASA Launch")


class OldProcessor:
    """The interface of SentencePiece 0.2.0 to 0.2.2, answered by the installed release."""
    def __init__(self, processor):
        self._processor = processor

    def encode_as_immutable_proto(self, text):
        mapping = self._processor.encode_as_offset_mapping(text)
        pieces = [type("Piece", (), {"id": i, "begin": begin, "end": end})
                  for i, (begin, end) in zip(mapping["ids"], mapping["offsets"])]
        return type("Proto", (), {"pieces": pieces})


def test_both_alignment_interfaces_are_probed(shipped, monkeypatch):
    has_new = hasattr(sentencepiece.SentencePieceProcessor, "encode_as_offset_mapping")
    assert shipped.alignment == ("encode_as_offset_mapping" if has_new else "encode_as_immutable_proto")
    if has_new:
        make = sentencepiece.SentencePieceProcessor
        monkeypatch.setattr(sentencepiece, "SentencePieceProcessor", lambda **kw: OldProcessor(make(**kw)))
        old = Tokenizer(shipped.model)
        assert old.alignment == "encode_as_immutable_proto"
        assert encode_document(old, "The \u00bd caf\u00e9 ") == encode_document(shipped, "The \u00bd "
                                                                                         "caf\u00e9 ")
    monkeypatch.setattr(sentencepiece, "SentencePieceProcessor", lambda **kw: object())
    with pytest.raises(PrepareError, match="install a release from 0.2.0"):
        Tokenizer(shipped.model)


# -- split and shards

def test_shard_vectors_with_the_official_tokenizer(official, vectors_dir, tmp_path):
    for record in records(vectors_dir, "caseops_shard_vectors.jsonl.gz"):
        out = tmp_path / record["id"]
        manifest = build(write_docs(tmp_path / "docs.jsonl", record["docs"]), out, sp=official,
                         val_docs=record["val_docs"], shard_tokens=record["shard_tokens"])
        assert {path.name for path in out.glob("*.bin")} == set(record["files"])
        for name, facts in record["files"].items():
            digest = hashlib.sha256((out / name).read_bytes()).hexdigest()
            assert digest == facts["sha256"], (record["id"], name)
            assert manifest["files"][name] == {"values": len(facts["values"]), "sha256": facts["sha256"]}


def test_first_documents_are_validation_and_the_rest_training(tmp_path, shipped):
    documents = some_docs(9)
    manifest = build(write_docs(tmp_path / "docs.jsonl", documents), tmp_path / "out", shard_tokens=50)
    for series, part in (("val", documents[:3]), ("train", documents[3:])):
        want = [token for text in part for token in [1, *shipped.ids(lossless_caps.encode(text))]]
        assert read_shards(tmp_path / "out", series).tolist() == want
        assert manifest[series]["tokens"] == len(want)
        assert manifest[series]["bos"] == manifest[f"docs_{series}"] == len(part)
    sizes = [facts["values"] for name, facts in manifest["files"].items() if "train" in name]
    assert set(sizes[:-1]) == {50} and 0 < sizes[-1] <= 50
    on_disk = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert on_disk == manifest
    copy = tmp_path / "out" / manifest["tokenizer"]["file"]
    assert copy.read_bytes() == prepare.SHIPPED_TOKENIZER.read_bytes()


def test_manifest_sums(tmp_path):
    documents = ["  lead", "trail\n", "\u200b", "x\ud800y", "more training"]
    for edge_bytes in ("drop", "attach"):
        out = tmp_path / edge_bytes
        docs = write_docs(tmp_path / "docs.jsonl", documents)
        manifest = build(docs, out, val_docs=4, edge_bytes=edge_bytes)
        val = manifest["val"]
        sidecar = read_shards(out, "val_bytes")
        assert val["original_bytes"] == 6 + 6 + 3 + 5
        assert val["edge_bytes"] == 2 + 1 + 3
        assert val["sidecar_bytes"] == sidecar.sum() == (14 if edge_bytes == "drop" else 17)
        assert manifest["edge_bytes"] == edge_bytes
        assert manifest["replaced_surrogates"] == 1
    assert set(manifest) == {"format", "transform", "tokenizer", "library", "source_sha256", "docs_val",
                             "docs_train", "shard_tokens", "edge_bytes", "files", "train", "val",
                             "replaced_surrogates"}


def test_attached_edges_make_the_sidecar_sum_to_each_document(tmp_path):
    documents = ["  lead", "trail\n", "\ufeffBOM", "\x01Abc", "abc \x01", "\u2581x\u2581", "   ", "", "plain"]
    build(write_docs(tmp_path / "docs.jsonl", documents), tmp_path / "out", val_docs=9, edge_bytes="attach")
    starts = np.flatnonzero(read_shards(tmp_path / "out", "val") == 1)
    sums = np.add.reduceat(read_shards(tmp_path / "out", "val_bytes"), starts).tolist()
    assert sums == [6, 6, 6, 4, 5, 7, 0, 0, 5]


def test_parallel_build_equals_serial_build(tmp_path, monkeypatch):
    # Each document repeats a paragraph, so that the input spans several batches.
    docs = write_docs(tmp_path / "docs.jsonl", [(text + " ") * 20 for text in some_docs(900)])
    assert docs.stat().st_size > 3 * prepare._BATCH_BYTES
    options = {"val_docs": 77, "shard_tokens": 5000, "max_train_tokens": 300_000}
    build(docs, tmp_path / "serial", **options)
    build(docs, tmp_path / "parallel", workers=2, **options)
    assert all_files(tmp_path / "serial") == all_files(tmp_path / "parallel")


def test_output_does_not_depend_on_how_lines_are_batched(tmp_path, monkeypatch):
    docs = write_docs(tmp_path / "docs.jsonl", some_docs(60))
    build(docs, tmp_path / "large", shard_tokens=100, max_train_tokens=700)
    monkeypatch.setattr(prepare, "_BATCH_BYTES", 1)
    build(docs, tmp_path / "small", shard_tokens=100, max_train_tokens=700)
    assert all_files(tmp_path / "large") == all_files(tmp_path / "small")


def test_limits_keep_whole_documents(tmp_path):
    docs = write_docs(tmp_path / "docs.jsonl", some_docs(40))
    whole = build(docs, tmp_path / "whole")
    starts = np.flatnonzero(read_shards(tmp_path / "whole", "train") == 1)
    lengths = np.diff(np.append(starts, whole["train"]["tokens"]))
    limited = build(docs, tmp_path / "tokens", max_train_tokens=200)
    assert limited["train"]["tokens"] == max(n for n in np.cumsum(lengths) if n <= 200)
    assert build(docs, tmp_path / "documents", train_docs=5)["train"]["tokens"] == lengths[:5].sum()
    assert limited["source_sha256"] == hashlib.sha256(docs.read_bytes()).hexdigest()


def test_separate_validation_file(tmp_path):
    train, val = (write_docs(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(4)]) for name in "tv")
    manifest = build(train, tmp_path / "out", val_docs=None, val_docs_file=val)
    assert (manifest["docs_val"], manifest["docs_train"]) == (4, 4)
    assert manifest["source_sha256"].keys() == {"t.jsonl", "v.jsonl"}
    assert build(train, tmp_path / "two", val_docs=2, val_docs_file=val)["docs_val"] == 2
    with pytest.raises(PrepareError, match="expected another file"):
        build(train, tmp_path / "same", val_docs_file=train)


def test_the_source_manifest_decides_the_split(tmp_path):
    docs = write_docs(tmp_path / "docs_selected.jsonl", some_docs(6))
    (tmp_path / "docs_selected.source_manifest.json").write_text('{"docs_val": 2}')
    assert build(docs, tmp_path / "out", val_docs=None)["docs_val"] == 2
    with pytest.raises(PrepareError, match="--val-docs 3: expected 2"):
        build(docs, tmp_path / "other", val_docs=3)
    (tmp_path / "docs_selected.source_manifest.json").write_text('{"docs_val": "2"}')
    with pytest.raises(PrepareError, match="expected `docs_val` to be a number"):
        build(docs, tmp_path / "other", val_docs=None)


def test_too_few_documents_for_the_default_split(tmp_path):
    docs = write_docs(tmp_path / "docs.jsonl", ["only one"])
    with pytest.raises(PrepareError, match="expected more than 1 documents, found no more"):
        build(docs, tmp_path / "out", val_docs=None)
    assert not list((tmp_path / "out").iterdir())


def test_documents_longer_than_a_shard_and_without_tokens(tmp_path, capsys):
    documents = ["", "word " * 100, "\u200b", "train " * 100, ""]
    manifest = build(write_docs(tmp_path / "docs.jsonl", documents), tmp_path / "out", shard_tokens=7)
    assert manifest["val"]["bos"] == 3 and manifest["train"]["bos"] == 2
    assert max(facts["values"] for facts in manifest["files"].values()) == 7
    assert read_shards(tmp_path / "out", "val")[-1] == 1
    assert "3 documents have no tokens" in capsys.readouterr().err


# -- robustness

@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_compressed_documents_and_their_damage(tmp_path, suffix):
    documents = [f"Document {i} about {'x' * i}" for i in range(200)]
    plain = write_docs(tmp_path / "docs.jsonl", documents)
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        # Two frames, as parallel compressors write them.
        half = len(plain.read_bytes()) // 2
        compress = zstandard.ZstdCompressor().compress
        packed = compress(plain.read_bytes()[:half]) + compress(plain.read_bytes()[half:])
    else:
        packed = {".gz": gzip, ".xz": lzma}[suffix].compress(plain.read_bytes())
    path = tmp_path / f"docs.jsonl{suffix}"
    path.write_bytes(packed)
    want, got = build(plain, tmp_path / "plain"), build(path, tmp_path / "packed")
    assert got["files"] == want["files"]
    assert got["source_sha256"] == hashlib.sha256(packed).hexdigest()
    path.write_bytes(packed[:-9])
    with pytest.raises(PrepareError, match="found damage or an early end after line"):
        build(path, tmp_path / "cut")
    assert not list((tmp_path / "cut").iterdir())


@pytest.mark.parametrize("line, found, workers", [
    (b'{"text": "half', "malformed JSON", 1), (b"{'text': 1}", "malformed JSON", 2),
    (b'{"text": "\xff"}', "invalid start byte", 1), (b'{"text": 5}', "`text` of type int", 1),
    (b'{"text": null}', "`text` of type NoneType", 1), (b'{"body": "x"}', "body", 1),
    (b"[1]", "a JSON list", 1), (b"[" * 100_000, "nested too deeply", 1),
])
def test_bad_records_name_line_and_document(tmp_path, line, found, workers):
    docs = tmp_path / "docs.jsonl"
    docs.write_bytes(b'{"text": "one"}\n\n  \n"a bare string"\n' + line + b"\n")
    with pytest.raises(PrepareError, match=r"docs\.jsonl line 5 \(document 2\): expected") as caught:
        build(docs, tmp_path / "out", val_docs=1, workers=workers)
    assert found in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_blank_lines_do_not_shift_document_numbers(tmp_path):
    docs = tmp_path / "docs.jsonl"
    docs.write_bytes(b'\n{"text": "one"}\n\n \r\n{"text": "two"}\n"three"\n\n{"text": "four"}')
    manifest = build(docs, tmp_path / "out")
    assert (manifest["docs_val"], manifest["docs_train"]) == (3, 1)


def test_a_value_that_does_not_fit_names_the_document(tmp_path):
    docs = write_docs(tmp_path / "docs.jsonl", ["fine", "a" + " " * 70_000 + "b"])
    with pytest.raises(PrepareError, match=r"document 1: expected at most 65,535 original bytes per token, "
                                            "found 70,001"):
        build(docs, tmp_path / "out")
    # Training documents have no sidecar, so there the run of spaces does no harm.
    assert build(docs, tmp_path / "train", val_docs=1)["docs_train"] == 1
    build(write_docs(docs, ["a" + " " * 65_534 + "b"]), tmp_path / "fits")
    assert read_shards(tmp_path / "fits", "val_bytes").max() == 65_535


def test_existing_shards_are_refused_or_replaced(tmp_path):
    out = tmp_path / "out"
    build(write_docs(tmp_path / "docs.jsonl", some_docs(30)), out, shard_tokens=60)
    before = all_files(out)
    few = write_docs(tmp_path / "few.jsonl", some_docs(5))
    with pytest.raises(PrepareError, match="pass --overwrite"):
        build(few, out)
    assert all_files(out) == before
    build(few, out, overwrite=True)
    build(few, tmp_path / "fresh")
    assert all_files(out) == all_files(tmp_path / "fresh")


def test_shards_of_one_split_alone_are_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "fineweb_val_000000.bin").write_bytes(b"someone else's")
    with pytest.raises(PrepareError, match="expected no shards, found 1"):
        build(write_docs(tmp_path / "docs.jsonl", some_docs(5)), tmp_path / "out")


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    docs = write_docs(tmp_path / "docs.jsonl", some_docs(50))

    class FullDisk(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 1100:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    def open_on_full_disk(path, mode="r", **options):
        return io.BufferedRandom(FullDisk(path, "w+"), 64) if mode == "w+b" else open(path, mode, **options)

    monkeypatch.setattr(prepare, "open", open_on_full_disk, raising=False)
    with pytest.raises(PrepareError, match="expected room for the shards, found: No space left.*free some"):
        build(docs, tmp_path / "out", shard_tokens=1000)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("moment", ["encoding", "publishing"])
def test_an_interrupted_build_is_restarted_or_completed(tmp_path, monkeypatch, moment):
    docs, out = write_docs(tmp_path / "docs.jsonl", some_docs(30)), tmp_path / "out"
    build(docs, tmp_path / "want", shard_tokens=40)
    calls = 0
    function = {"encoding": (prepare.ShardWriter, "append"), "publishing": (os, "replace")}[moment]
    original = getattr(*function)

    def interrupted(*args):
        nonlocal calls
        # Both staged JSON files are renamed, too, before the shards are.
        calls += not str(args[0]).endswith(prepare.STAGING_NAME)
        if calls == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(*function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(docs, out, shard_tokens=40)
    monkeypatch.undo()
    assert not (out / "manifest.json").exists()
    for path in out.glob("fineweb_*.bin"):
        assert path.read_bytes() == (tmp_path / "want" / path.name).read_bytes()
    assert len(list(out.glob("fineweb_*.bin"))) == (0 if moment == "encoding" else 1)
    build(docs, out, shard_tokens=40)
    assert all_files(out) == all_files(tmp_path / "want")


def test_a_killed_build_leaves_no_final_name_and_restarts(tmp_path):
    docs, out = write_docs(tmp_path / "docs.jsonl", some_docs(30)), tmp_path / "out"
    program = ("import os, prepare_caseops_data as p\n"
               "p.ShardWriter.finish = lambda self: os.kill(os.getpid(), 9)\n"
               f"p.build({str(docs)!r}, {str(out)!r}, val_docs=3, shard_tokens=40, show_progress=False)")
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(prepare.__file__).parent, check=False)
    assert done.returncode == -9
    assert [path.name for path in out.iterdir()] == [".partial"]
    build(docs, out, shard_tokens=40)
    build(docs, tmp_path / "want", shard_tokens=40)
    assert all_files(out) == all_files(tmp_path / "want")


def test_workers_end_with_a_killed_build(tmp_path):
    docs, out = write_docs(tmp_path / "docs.jsonl", some_docs(30)), tmp_path / "out"
    program = ("import os, prepare_caseops_data as p\n"
               "p.ShardWriter.append = lambda self, values: os.kill(os.getpid(), 9)\n"
               f"p.build({str(docs)!r}, {str(out)!r}, val_docs=3, workers=2, show_progress=False)")
    # Workers hold the other end of the pipe, so this returns only when the last of them is gone.
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(prepare.__file__).parent, check=False,
                          capture_output=True, timeout=60)
    assert done.returncode == -9, done.stderr


def test_a_build_interrupted_after_its_last_renaming_is_complete(tmp_path, monkeypatch):
    docs, out = write_docs(tmp_path / "docs.jsonl", some_docs(30)), tmp_path / "out"
    want = build(docs, tmp_path / "want")
    replace = os.replace

    def interrupted_after_manifest(old, new):
        replace(old, new)
        if Path(new) == out / "manifest.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted_after_manifest)
    monkeypatch.setattr(prepare, "_discarded_on_error", lambda out: contextlib.nullcontext(out / ".partial"))
    with pytest.raises(KeyboardInterrupt):
        build(docs, out)
    monkeypatch.undo()
    assert (out / ".partial" / "settings.json").exists()
    assert build(docs, out) == want
    assert all_files(out) == all_files(tmp_path / "want")


def test_half_a_build_beside_a_finished_one_is_not_published(tmp_path):
    docs, out = write_docs(tmp_path / "docs.jsonl", some_docs(30)), tmp_path / "out"
    build(docs, out)
    (out / ".partial").mkdir()
    (out / ".partial" / "settings.json").write_text("{}")
    (out / ".partial" / "fineweb_train_000000.bin").write_bytes(b"half")
    with pytest.raises(PrepareError, match="expected no shards"):
        build(docs, out)
    assert (out / "fineweb_train_000000.bin").read_bytes() != b"half"


def test_a_staged_build_is_not_taken_for_that_of_changed_documents(tmp_path, monkeypatch):
    def interrupt(out):
        raise KeyboardInterrupt

    docs, out = write_docs(tmp_path / "docs.jsonl", ["one", "two", "three", "four"]), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "_publish", interrupt)
        build(docs, out)
    write_docs(docs, ["One", "Two", "Three", "Four"])
    os.utime(docs, (1, 1))
    with pytest.raises(PrepareError, match="expected no shards"):
        build(docs, out)


def test_blank_lines_after_the_last_wanted_document(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_BATCH_BYTES", 1)
    docs = tmp_path / "docs.jsonl"
    docs.write_bytes(b'"one"\n"two"\n' + b"\n" * 10)
    assert build(docs, tmp_path / "out", val_docs=1, train_docs=1)["docs_train"] == 1


def test_missing_and_foreign_files_are_named(tmp_path, shipped):
    docs = write_docs(tmp_path / "docs.jsonl", some_docs(5))
    with pytest.raises(PrepareError, match="nothing.jsonl: expected a readable document file"):
        build(tmp_path / "nothing.jsonl", tmp_path / "out")
    with pytest.raises(PrepareError, match="expected a SentencePiece model, found"):
        build(docs, tmp_path / "out", sp=tmp_path / "nothing.model")
    damaged = tmp_path / "damaged.model"
    damaged.write_bytes(shipped.model.data[:200_000])
    with pytest.raises(PrepareError, match="damaged.model: expected"):
        build(docs, tmp_path / "out", sp=damaged)
    with pytest.raises(PrepareError, match="expected documents, found none"):
        build(write_docs(tmp_path / "empty.jsonl", []), tmp_path / "out")
    assert not any((tmp_path / "out").glob("*"))


def test_a_tokenizer_without_operators_is_refused(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(some_docs(50)), model_writer=model, model_type="bpe", vocab_size=330,
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2)
    (tmp_path / "plain.model").write_bytes(model.getvalue())
    with pytest.raises(PrepareError, match="expected the operators U\\+E001 to U\\+E004"):
        ModelFile.read(tmp_path / "plain.model")


# -- tokenizer

def test_shipped_tokenizer_has_the_official_layout():
    model = ModelFile.read(prepare.SHIPPED_TOKENIZER)
    recorded = model.path.with_name(model.path.name + ".sha256").read_text().split()
    assert recorded == [model.sha256, model.path.name]
    check_layout(model, 8192)


def check_layout(model: ModelFile, vocab_size: int) -> None:
    pieces = model.pieces
    assert len(pieces) == vocab_size
    assert [piece.text for piece in pieces[:4]] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert [piece.kind for piece in pieces[:4]] == [3, 3, 3, 2]
    assert "".join(piece.text for piece in pieces[4:8]) == lossless_caps.OPERATORS
    assert [piece.text for piece in pieces[8:264]] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert [piece.score for piece in pieces[264:]] == [-i for i in range(vocab_size - 264)]
    assert not any(letter in piece.text for piece in pieces[264:] for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert not any("\u2581" in piece.text[1:] for piece in pieces[264:])
    assert hashlib.sha256(model.charsmap).hexdigest() == prepare.OFFICIAL_CHARSMAP_SHA256
    assert not model.slow_reason


def trainer_fields(data: bytes) -> dict[int, list]:
    fields: dict[int, list] = {}
    for number, value, _ in caseops_encoder.proto_fields(data):
        if number == caseops_encoder.TRAINER_SPEC:
            for key, field, _ in caseops_encoder.proto_fields(value):
                fields.setdefault(key, []).append(field)
    return fields


def test_training_reads_only_training_documents_of_the_named_sources(tmp_path):
    rows = [{"text": f"document {i}", "source": source} for i, source in enumerate(["a", "b", "a", "b", "c"])]
    docs = tmp_path / "docs.jsonl"
    docs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(prepare.training_documents(docs, 1)) == [f"document {i}" for i in (1, 2, 3, 4)]
    assert list(prepare.training_documents(docs, 1, ["a", "c"])) == ["document 2", "document 4"]


def test_trained_tokenizer_has_the_official_fields(tmp_path):
    too_long = "Zebra " * 700
    documents = [text for text in some_docs(300)] + ["", " \n ", "a\0b", too_long]
    data = prepare.train_tokenizer(documents, 320)
    model = prepare.write_tokenizer(tmp_path / "small.model", data)
    check_layout(model, len(model.pieces))
    assert len(model.pieces) <= 320
    fields = trainer_fields(data)
    fields.pop(4)
    shipped = trainer_fields(prepare.SHIPPED_TOKENIZER.read_bytes())
    shipped.pop(4)
    assert fields == shipped
    # Only the document above 4,192 bytes has a z.
    assert not any("z" in piece.text for piece in model.pieces[264:])
    assert (tmp_path / "small.model.sha256").read_text() == f"{model.sha256}  small.model\n"
    check_encoder(DocumentEncoder(Tokenizer(model)), "The NASA \u00bd\u200bLaunch <x> Zebra")


def test_too_little_text_for_a_tokenizer(tmp_path):
    with pytest.raises(PrepareError, match="expected enough text"):
        prepare.train_tokenizer([], 320)


def test_a_tokenizer_of_another_size_than_asked_for_is_not_written(tmp_path, capsys):
    docs = write_docs(tmp_path / "docs.jsonl", some_docs(30))
    arguments = ["--docs", str(docs), "--val-docs", "1", "--sp", str(tmp_path / "new.model"), "--train-tokenizer"]
    assert prepare.main([*arguments, "4000"]) == 1
    assert "expected enough text for 4,000 pieces, found text for " in capsys.readouterr().err
    assert not list(tmp_path.glob("new.model*"))


def test_an_interrupt_while_a_tokenizer_is_trained_is_told_as_such(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        yield "some text"
        raise KeyboardInterrupt
    docs = write_docs(tmp_path / "docs.jsonl", some_docs(30))
    monkeypatch.setattr(prepare, "training_documents", interrupted)
    code = prepare.main(["--docs", str(docs), "--val-docs", "1", "--sp", str(tmp_path / "new.model"),
                         "--train-tokenizer", "300"])
    errors = capsys.readouterr().err
    assert code == 130 and "interrupted" in errors and "enough text" not in errors
    assert not list(tmp_path.glob("new.model*"))


# -- command line

def run(repo: Path, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, repo / "prepare_caseops_data.py", *map(str, arguments)],
                          capture_output=True, text=True, check=False)


def test_command_line_trains_and_builds(repo, tmp_path):
    docs = write_docs(tmp_path / "docs.jsonl", some_docs(300))
    training = ["--docs", docs, "--val-docs", 20, "--train-tokenizer", 300, "--sp", tmp_path / "new.model"]
    done = run(repo, *training, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert f"DATA_PATH={tmp_path / 'out'}\n" in done.stdout
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["tokenizer"]["file"] == "new.model" and (tmp_path / "out" / "new.model").exists()
    assert run(repo, "verify", tmp_path / "out").returncode == 0
    done = run(repo, *training)
    assert done.returncode == 2 and "pass --overwrite" in done.stderr


def test_command_line_errors(tmp_path, capsys):
    def run(*arguments) -> SimpleNamespace:
        try:
            code = prepare.main(list(map(str, arguments)))
        except SystemExit as stop:                        # argparse has told what is wrong
            code = stop.code
        return SimpleNamespace(returncode=code, stderr=capsys.readouterr().err)

    docs = write_docs(tmp_path / "docs.jsonl", ["one", "two"])
    for arguments in (["--docs", docs], ["--docs", docs, "--out", tmp_path, "--val-docs", "-1"],
                      ["--docs", docs, "--out", tmp_path, "--workers", "0"], ["verify"], ["--nonsense"],
                      ["--docs", docs, "--train-tokenizer", "100"],
                      ["--docs", docs, "--train-tokenizer", "300"], ["download", "--train-shards", "0"]):
        done = run(*arguments)
        assert done.returncode == 2, arguments
        assert "error:" in done.stderr
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "fineweb_val_000000.bin").write_bytes(b"")
    done = run("--docs", docs, "--out", tmp_path / "used", "--train-tokenizer", 300)
    assert done.returncode == 2 and "expected no shards" in done.stderr, "the tokenizer is trained first"
    done = run("--docs", docs, "--train-tokenizer", 300, "--sp", tmp_path / "new.model")
    assert done.returncode == 1 and "after the first 50,000" in done.stderr
    docs.write_text("not json\n")
    done = run("--docs", docs, "--out", tmp_path / "out", "--val-docs", 1)
    assert done.returncode == 1
    assert "line 1 (document 0)" in done.stderr and "Traceback" not in done.stderr
