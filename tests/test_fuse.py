"""Second-pass merges: ids that cannot occur, joining and splitting, whole directories there and back."""
import dataclasses
import functools
import hashlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import caseops_merges
import lossless_caps
import prepare_caseops_data as prepare
import train_gpt as gpt
from caseops_encoder import BOS_ID, FIRST_BYTE_ID, ModelFile, PrepareError, Tokenizer
from caseops_merges import Joiner, Merge, Merges, free_ids, join_by_definition, learn, parts_of, split_tokens
from test_prepare import OFFICIAL, charsmap_rules

FIXED = settings(derandomize=True, deadline=None, max_examples=300, database=None)
BYTES = range(FIRST_BYTE_ID, FIRST_BYTE_ID + 256)


@pytest.fixture(scope="module")
def shipped() -> ModelFile:
    return ModelFile.read(prepare.SHIPPED_TOKENIZER)


@pytest.fixture(scope="module", params=["shipped", "official"])
def model(request, shipped) -> ModelFile:
    if request.param == "shipped":
        return shipped
    path = request.getfixturevalue("vectors_dir").parent / "reference_tokenizer" / OFFICIAL
    if not path.is_file():
        pytest.skip(f"the official tokenizer is not at {path}; it comes with the official data set")
    return ModelFile.read(path)


@pytest.fixture(params=["C", "numpy"])
def routine(request, monkeypatch) -> str:
    """Both ways to join and count; without a compiler everything goes through numpy."""
    if request.param == "C" and caseops_merges._library() is None:
        pytest.skip("the C routine cannot be built: no C compiler")
    if request.param == "numpy":
        monkeypatch.setattr(caseops_merges, "_library", lambda: None)
    return request.param


def documents(count: int, seed: int = 5) -> list[str]:
    rng = np.random.default_rng(seed)
    words = ["The", "NASA", "launch", "of", "the", "iPhone", "caf\u00e9", "", "don\u2019t", "U.S.A.",
             "\u00bd", "x\n\ny", "1999", "in", "a.", "And", "\ue001", "...", "......", "\u2026", "\u2122",
             "z\x01\x02"]
    return [" ".join(rng.choice(words, rng.integers(0, 60))) for _ in range(count)]


def build(folder: Path, count: int = 120, **options) -> Path:
    source = folder.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(count)))
    prepare.build(source, folder, **{"val_docs": 40, "shard_tokens": 700, "show_progress": False, **options})
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("sound") / "shards")


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "shards"))


def fuse(folder: Path, out: Path, num_merges: int = 6, **options) -> dict:
    return prepare.fuse(folder, out, num_merges, show_progress=False, **options)


def unfuse(folder: Path, out: Path, **options) -> None:
    prepare.unfuse(folder, out, show_progress=False, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """All but what verify remembers, which holds times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".checked.json"}


def series(folder: Path, name: str) -> np.ndarray:
    paths = sorted(folder.glob(f"fineweb_{name}_" + "[0-9]" * 6 + ".bin"))
    return np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in paths])


def rewrite(path: Path, values: np.ndarray) -> None:
    path.write_bytes(prepare.shard_header(len(values)) + values.astype("<u2").tobytes())


def without_manifest(folder: Path, monkeypatch) -> None:
    """Turn a directory into one that passes for the published export."""
    (folder / "manifest.json").unlink()
    tokens, counts = series(folder, "val"), series(folder, "val_bytes")
    monkeypatch.setattr(prepare, "PUBLISHED_VAL_TOKENS", (len(tokens), len(tokens)))
    monkeypatch.setattr(prepare, "PUBLISHED_TARGETS", len(tokens) - 1)
    monkeypatch.setattr(prepare, "PUBLISHED_TARGET_BYTES", int(counts[1:].sum()))
    monkeypatch.setattr(prepare, "DEFAULT_VAL_DOCS", int((tokens == BOS_ID).sum()))
    monkeypatch.setattr(prepare, "DEFAULT_SHARD_TOKENS", 700)
    monkeypatch.setattr(prepare, "PUBLISHED_TOKENIZER_SHA256",
                        hashlib.sha256(next(folder.glob("*.model")).read_bytes()).hexdigest())
    max(folder.glob("fineweb_train_*.bin")).unlink()


# -- ids that cannot occur

def test_no_character_and_no_rule_of_the_map_gives_a_free_id_and_every_other_byte_id_is_given(model):
    """All code points, alone and among others, and all that the map rewrites go through the transform and the
    tokenizer. The byte ids that come out are exactly those that are not free."""
    code_points = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    rules = charsmap_rules(model.charsmap)
    outputs = set(model.charsmap[4 + int.from_bytes(model.charsmap[:4], "little"):].decode().split("\0"))
    tokenizer = Tokenizer(model)
    seen = set()
    for texts in (code_points, rules, sorted(outputs), [f"a{char}b" for char in code_points]):
        for at in range(0, len(texts), 4096):
            seen |= set(tokenizer.ids(lossless_caps.encode(" ".join(texts[at:at + 4096]))))
    # At the end of a document nothing follows that could change what a character becomes.
    seen |= {token for code in range(256) for token in tokenizer.ids(lossless_caps.encode(chr(code)))}
    assert set(BYTES) - seen == set(free_ids(model))


def test_each_class_of_free_bytes_of_the_official_tokenizer(model):
    """Bytes that no UTF-8 holds, ASCII characters with a piece, and what normalization removes."""
    pieces = {piece.text for piece in model.pieces if piece.kind == 1}
    not_utf8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
    with_piece = {code for code in range(0x80) if chr(code) in pieces}
    controls = {*range(1, 0x20), 0x20, 0x7F}
    assert set(free_ids(model)) == {FIRST_BYTE_ID + byte for byte in not_utf8 | with_piece | controls}
    if model.path.name == OFFICIAL:
        assert (len(not_utf8), len(with_piece), len(controls)) == (13, 53, 33)
    # Capital letters are not free: normalization makes them after the transform has removed them.
    assert not {FIRST_BYTE_ID + code for code in range(ord("A"), ord("Z") + 1)} & set(free_ids(model))


@functools.cache
def proof_of(path: Path) -> tuple[set[int], Tokenizer]:
    model = ModelFile.read(path)
    return set(free_ids(model)), Tokenizer(model)


@FIXED
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_no_text_gives_a_free_id(text):
    free, tokenizer = proof_of(prepare.SHIPPED_TOKENIZER)
    assert not free & set(tokenizer.ids(lossless_caps.encode(text)))


def test_a_tokenizer_that_works_otherwise_has_no_proof(shipped):
    with pytest.raises(PrepareError, match="free ids can be proved, found that the tokenizer is not a BPE"):
        free_ids(dataclasses.replace(shipped, slow_reason="the tokenizer is not a BPE model"))


# -- joining and splitting

@st.composite
def merges_and_tokens(draw) -> tuple[list[Merge], np.ndarray]:
    """Merges over few ids, some of earlier joined ones, some of an id with itself; long runs are likely."""
    ids = [300, 301, 302, 303]
    merges = []
    for number in range(draw(st.integers(1, 6))):
        left, right = draw(st.sampled_from(ids)), draw(st.sampled_from(ids))
        merges.append(Merge(left, right, 20 + number))
        ids.append(20 + number)
    tokens = draw(st.lists(st.sampled_from([300, 301, 302, 303, BOS_ID, 999]), max_size=60))
    return merges, np.array(tokens, np.uint16)


def joined_word_by_word(tokens: list[int], merges: list[Merge]) -> list[int]:
    for merge in merges:
        out, at = [], 0
        while at < len(tokens):
            is_pair = tokens[at:at + 2] == [merge.left, merge.right]
            out.append(merge.id if is_pair else tokens[at])
            at += 1 + is_pair
        tokens = out
    return tokens


@FIXED
@given(merges_and_tokens())
def test_joining_is_left_to_right_merge_after_merge_and_splitting_undoes_it(case):
    merges, tokens = case
    want = joined_word_by_word(tokens.tolist(), merges)
    defined, starts = join_by_definition(tokens, merges)
    joined, fast_starts = Joiner(merges).join(tokens, with_starts=True)
    assert defined.tolist() == joined.tolist() == want
    assert starts.tolist() == fast_starts.tolist()
    assert split_tokens(joined, merges).tolist() == tokens.tolist()
    lengths = np.diff(starts, append=len(tokens))
    parts = parts_of(merges)
    for token, start, length in zip(want, starts.tolist(), lengths.tolist()):
        assert list(parts.get(token, [token])) == tokens[start:start + length].tolist()
    assert (joined == BOS_ID).sum() == (tokens == BOS_ID).sum()


def test_merges_of_merges_agree_with_the_definition_on_long_streams():
    rng = np.random.default_rng(11)
    deepest = 0
    for _ in range(100):
        ids, merges = [300, 301, 302], []
        for number in range(8):
            left, right = rng.choice(ids, 2).tolist()
            merges.append(Merge(left, right, 20 + number))
            ids.append(20 + number)
        tokens = rng.choice([300, 301, 302, BOS_ID], 500, p=[0.5, 0.3, 0.15, 0.05]).astype(np.uint16)
        want = joined_word_by_word(tokens.tolist(), merges)
        assert Joiner(merges).join(tokens)[0].tolist() == join_by_definition(tokens, merges)[0].tolist() == want
        deepest = max(deepest, *(len(parts_of(merges).get(token, ())) for token in want))
    assert deepest > 4


def test_forbidden_ids_are_named(routine):
    joiner = Joiner([Merge(300, 301, 20)], forbidden=[25])
    for tokens, where in (([300, 301, 20], "token 2 is 20"), ([300, 25], "token 1 is 25"),
                          ([20], "token 0 is 20")):
        with pytest.raises(ValueError, match=where):
            joiner.join(np.array(tokens, np.uint16))
    assert joiner.join(np.zeros(0, np.uint16))[0].tolist() == []


@pytest.mark.parametrize("first_ranks", [2, 512])
def test_learning_takes_the_most_frequent_pair_first(routine, monkeypatch, first_ranks):
    monkeypatch.setattr(caseops_merges, "_FIRST_RANKS", first_ranks)
    rng = np.random.default_rng(3)
    share = [0.2, 0.2, 0.15, 0.1, *[0.35 / 9] * 9]
    tokens = rng.choice([BOS_ID, *range(300, 312)], 4000, p=share).astype(np.uint16)
    merges = learn(tokens, 8, list(range(20, 30)))
    assert [merge.id for merge in merges] == list(range(20, 28))
    left = tokens.tolist()
    for merge in merges:
        counts = Counter(pair for pair in zip(left, left[1:]) if BOS_ID not in pair)
        most = max(counts.values())
        assert (merge.left, merge.right) == min(pair for pair, count in counts.items() if count == most)
        before = len(left)
        left = joined_word_by_word(left, [merge])
        assert merge.count == before - len(left)


def test_learning_stops_when_ids_or_pairs_run_out(routine):
    with pytest.raises(PrepareError, match="expected 1 to 2"):
        learn(np.arange(300, 310, dtype=np.uint16), 3, [20, 21])
    with pytest.raises(PrepareError, match="at least twice, found 0"):
        learn(np.array([1, 300, 301, 1, 302], np.uint16), 1, [20, 21])


# -- directories

@pytest.mark.parametrize("options", [{}, {"edge_bytes": "attach"}, {"shard_tokens": 10**6}])
def test_unfuse_restores_every_byte(tmp_path, options, routine):
    folder = build(tmp_path / "shards", **options)
    manifest = fuse(folder, tmp_path / "fused", 12)
    assert manifest["train"]["tokens"] < len(series(folder, "train"))
    assert manifest["merges"]["count"] == 12
    rows = json.loads((tmp_path / "fused" / "merges.json").read_text())["merges"]
    assert [row["id"] for row in rows] == free_ids(ModelFile.read(prepare.SHIPPED_TOKENIZER))[:12]
    unfuse(tmp_path / "fused", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "fused", "shards", "shards.jsonl"]


def test_tokens_sidecar_and_document_starts_agree_with_the_definition(folder, tmp_path):
    manifest = fuse(folder, tmp_path / "fused")
    merges = Merges.read(tmp_path / "fused" / "merges.json", ModelFile.read(prepare.SHIPPED_TOKENIZER)).merges
    for path in sorted(folder.glob("fineweb_*.bin")):
        values = np.fromfile(path, "<u2", offset=1024)
        found = np.fromfile(tmp_path / "fused" / path.name, "<u2", offset=1024)
        if "val_bytes" in path.name:
            tokens = np.fromfile(folder / path.name.replace("val_bytes", "val"), "<u2", offset=1024)
            starts = join_by_definition(tokens, merges)[1]
            want = [values[start:end].sum() for start, end in zip(starts, [*starts[1:], len(tokens)])]
        else:
            want = join_by_definition(values, merges)[0]
        assert np.array_equal(found, want), path.name
    # Bits per byte are per byte of the original text: nothing is lost or gained.
    original = json.loads((folder / "manifest.json").read_text())
    assert manifest["val"]["sidecar_bytes"] == original["val"]["sidecar_bytes"]
    assert int(series(tmp_path / "fused", "val_bytes").sum()) == int(series(folder, "val_bytes").sum())
    assert manifest["docs_val"] == original["docs_val"] and manifest["docs_train"] == original["docs_train"]


def test_merges_are_learnt_on_training_shards_only(folder, tmp_path):
    fuse(folder, tmp_path / "one")
    for path in folder.glob("fineweb_val_0*.bin"):
        tokens = np.fromfile(path, "<u2", offset=1024)
        rewrite(path, np.where(tokens == BOS_ID, tokens, 320))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {path.name: {"values": path.stat().st_size // 2 - 512,
                                     "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
                         for path in folder.glob("fineweb_*.bin")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    fuse(folder, tmp_path / "two")
    assert (tmp_path / "one" / "merges.json").read_bytes() == (tmp_path / "two" / "merges.json").read_bytes()


def test_a_given_list_is_used_as_it_is(folder, tmp_path):
    fuse(folder, tmp_path / "six")
    fuse(folder, tmp_path / "three", 3)
    fuse(folder, tmp_path / "given", 3, merges_from=tmp_path / "six" / "merges.json")
    assert contents(tmp_path / "given") == contents(tmp_path / "three")
    with pytest.raises(PrepareError, match="--merges 7: expected 1 to 6"):
        fuse(folder, tmp_path / "more", 7, merges_from=tmp_path / "six" / "merges.json")


def test_the_output_does_not_depend_on_workers(folder, tmp_path):
    fuse(folder, tmp_path / "one")
    fuse(folder, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_published_export_needs_no_manifest(folder, tmp_path, monkeypatch):
    without_manifest(folder, monkeypatch)
    manifest = fuse(folder, tmp_path / "fused")
    assert manifest["fused_from"]["manifest"] is None
    assert prepare.verify(tmp_path / "fused", show_progress=False) == []
    unfuse(tmp_path / "fused", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)
    monkeypatch.setattr(prepare, "PUBLISHED_TARGET_BYTES", 5)
    with pytest.raises(PrepareError, match="expected sound shards, found: Without a manifest"):
        fuse(folder, tmp_path / "again")


def test_an_interrupted_run_goes_on_where_it_stopped(folder, tmp_path, monkeypatch):
    fuse(folder, tmp_path / "whole")
    convert, done = prepare._fuse_shard, []

    def stop_at_third(*arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments[-1])
        convert(*arguments)

    monkeypatch.setattr(prepare, "_fuse_shard", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        fuse(folder, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()
    first, again = list(done), []

    def note(*arguments):
        again.append(arguments[-1])
        convert(*arguments)

    monkeypatch.setattr(prepare, "_fuse_shard", note)
    fuse(folder, tmp_path / "fused")
    assert first and not set(first) & set(again)
    assert contents(tmp_path / "fused") == contents(tmp_path / "whole")


def test_what_another_run_left_is_not_used(folder, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(prepare, "_fused_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            fuse(folder, tmp_path / "fused", 3)
    fuse(folder, tmp_path / "fused", 6)
    fuse(folder, tmp_path / "whole", 6)
    assert contents(tmp_path / "fused") == contents(tmp_path / "whole")


def test_refusals_say_what_to_do(folder, tmp_path, shipped):
    fuse(folder, tmp_path / "fused")
    free = len(free_ids(shipped))
    for source, out, count, words in (
            (tmp_path / "fused", "new", 3, "joined already; `unfuse` them first"),
            (folder, "fused", 3, "found one that exists; choose another OUT"),
            (folder, "new", 0, f"--merges 0: expected 1 to {free}"),
            (folder, "new", free + 1, f"--merges {free + 1}: expected 1 to {free}"),
            (folder / "nothing", "new", 3, "expected a directory of shards, found none")):
        with pytest.raises(PrepareError, match=words):
            fuse(source, tmp_path / out, count)
    with pytest.raises(PrepareError, match="nothing to undo"):
        unfuse(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_input_that_holds_a_free_id_is_refused_and_leaves_nothing(folder, tmp_path, shipped):
    path = folder / "fineweb_train_000001.bin"
    tokens = np.fromfile(path, "<u2", offset=1024)
    tokens[17] = free_ids(shipped)[-1]
    rewrite(path, tokens)
    with pytest.raises(PrepareError, match="000001.bin: expected the file that the manifest lists"):
        fuse(folder, tmp_path / "fused")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PrepareError, match=f"found: token 17 is {tokens[17]}; the shard was joined before"):
        fuse(folder, tmp_path / "fused")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]


def test_damaged_and_missing_shards_are_refused(folder, tmp_path):
    path = folder / "fineweb_val_bytes_000000.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-2])
    with pytest.raises(PrepareError, match="expected a complete token shard"):
        fuse(folder, tmp_path / "fused")
    path.unlink()
    with pytest.raises(PrepareError, match="expected fineweb_val_bytes shards without gaps"):
        fuse(folder, tmp_path / "fused")
    path.write_bytes(data)
    (folder / "fineweb_train_000000.bin").unlink()
    with pytest.raises(PrepareError, match="expected fineweb_train shards without gaps"):
        fuse(folder, tmp_path / "fused")


def test_fewer_training_shards_than_listed_are_allowed_there_and_back(folder, tmp_path):
    max(folder.glob("fineweb_train_*.bin")).unlink()
    fuse(folder, tmp_path / "fused")
    assert prepare.verify(tmp_path / "fused", show_progress=False) == []
    unfuse(tmp_path / "fused", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)


def test_sums_that_do_not_fit_are_refused(folder, tmp_path):
    for path in folder.glob("fineweb_val_bytes_*.bin"):
        rewrite(path, np.full(path.stat().st_size // 2 - 512, 40_000))
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name]["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PrepareError, match="at most 65,535 original bytes per joined token, found 80,000"):
        fuse(folder, tmp_path / "fused")


# -- verify and the training script

def test_verify_knows_merges(folder, tmp_path, capsys):
    manifest = fuse(folder, tmp_path / "fused")
    assert prepare.verify(tmp_path / "fused", show_progress=False) == []
    assert f"verify merges:6 sha256:{manifest['merges']['sha256'][:16]}" in capsys.readouterr().out


def only_violation(folder: Path) -> str:
    found = prepare.verify(folder, show_progress=False)
    assert len(found) == 1, found
    return found[0]


def test_verify_names_each_damage_to_merges(folder, tmp_path):
    fuse(folder, tmp_path / "fused")
    fused = tmp_path / "fused"
    merges = (fused / "merges.json").read_bytes()
    (fused / "merges.json").write_bytes(merges.replace(b'"count": ', b'"count": 1'))
    assert "The merges are unusable" in only_violation(fused) and "found others" in only_violation(fused)
    (fused / "merges.json").unlink()
    assert "expected the list of merges" in only_violation(fused)
    (fused / "merges.json").write_bytes(merges)
    next(fused.glob("*.exceptions.npy")).unlink()
    assert "`unfuse` could not restore" in only_violation(fused)


def test_verify_tells_unjoined_and_unexplained_tokens(folder, tmp_path):
    fuse(folder, tmp_path / "fused")
    fused = tmp_path / "fused"
    manifest = json.loads((fused / "manifest.json").read_text())
    del manifest["merges"]
    (fused / "manifest.json").write_text(json.dumps(manifest))
    found = prepare.verify(fused, show_progress=False)
    assert any("ids that the tokenizer never gives" in sentence for sentence in found)
    fuse(folder, tmp_path / "more", 7)
    for name in ("merges.json", "manifest.json"):
        shutil.copy(tmp_path / "more" / name, fused)
    found = prepare.verify(fused, show_progress=False)
    assert any("pairs of tokens that the merges should have joined" in sentence for sentence in found)


def test_a_list_of_merges_is_checked(folder, tmp_path, shipped):
    fuse(folder, tmp_path / "fused")
    path = tmp_path / "fused" / "merges.json"
    content = json.loads(path.read_text())
    first = content["merges"][0]
    for change, words in (
            ({"format": 2}, "expected a list of merges of format 1"),
            ({"merges": []}, "expected a list of merges of format 1"),
            ({"tokenizer_sha256": "0" * 64}, "use the tokenizer that they were learnt with"),
            ({"merges": [first, first]}, "into ids that the tokenizer never gives"),
            ({"merges": [first | {"id": 300}]}, "into ids that the tokenizer never gives"),
            ({"merges": [first | {"pair": [BOS_ID, 300]}]}, "expected merges of known ids"),
            ({"merges": [first | {"pair": [300]}]}, "expected a list of merges of format 1"),
            ({"merges": [first | {"pair": [free_ids(shipped)[-1], 300]}]}, "expected merges of known ids")):
        path.write_text(json.dumps(content | change))
        with pytest.raises(PrepareError, match=words):
            Merges.read(path, shipped)


def test_the_training_script_reads_fused_shards_and_checks_their_merges(folder, tmp_path):
    fuse(folder, tmp_path / "fused")
    cfg = gpt.Config(data_path=str(tmp_path / "fused"))
    data = gpt.Dataset.open(cfg)
    tokens, counts = data.load_validation()
    assert len(tokens) == len(counts) < len(series(folder, "val"))
    assert gpt.check_tokenizer(cfg, data).name == "caseops_8192.model"
    path = tmp_path / "fused" / "merges.json"
    merges = path.read_bytes()
    path.write_bytes(merges + b"\n")
    with pytest.raises(gpt.DataError, match="merges.json"):
        gpt.check_tokenizer(cfg, data)
    path.unlink()
    with pytest.raises(gpt.DataError, match="merges.json"):
        gpt.check_tokenizer(cfg, data)


def test_joined_shards_are_reused_only_where_they_were_made_of_what_is_there(folder, tmp_path, capsys):
    out = tmp_path / "fused"

    def reuse() -> tuple[int, str]:
        code = prepare.main(["fuse", str(folder), str(out), "--merges", "6", "--reuse"])
        return code, capsys.readouterr().err

    assert reuse() == (0, "")
    before = contents(out)
    assert reuse() == (0, "") and contents(out) == before
    last = max(folder.glob("fineweb_train_*.bin"))
    data, manifest = last.read_bytes(), (out / "manifest.json").read_text()
    for damage in (lambda: last.unlink(), lambda: last.write_bytes(data + b"12"),
                   lambda: last.with_name("fineweb_train_000099.bin").write_bytes(data),
                   lambda: (out / "manifest.json").write_text('{"files": {}}')):
        damage()
        code, told = reuse()
        assert code == 1 and f"remove {out} to join them again" in told and contents(out).keys() == before.keys()
        last.with_name("fineweb_train_000099.bin").unlink(missing_ok=True)
        last.write_bytes(data)
        (out / "manifest.json").write_text(manifest)
    assert reuse() == (0, "")
    shutil.rmtree(folder)                                      # kept elsewhere: nothing to compare with
    assert reuse() == (0, "") and contents(out) == before


def test_command_line(repo, folder, tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, repo / "prepare_caseops_data.py", *map(str, arguments)],
                              capture_output=True, text=True, check=False)

    done = run("fuse", folder, tmp_path / "fused", "--merges", 4)
    assert done.returncode == 0 and "fuse series:train tokens_before:" in done.stdout, done.stderr
    assert f"DATA_PATH={tmp_path / 'fused'}" in done.stdout
    done = run("fuse", folder, tmp_path / "fused", "--merges", 4)
    assert done.returncode == 2 and "choose another OUT" in done.stderr and "Traceback" not in done.stderr
    assert run("fuse", folder, tmp_path / "new", "--merges", 4, "--learn-tokens", 0).returncode == 2
    assert run("unfuse", tmp_path / "fused", tmp_path / "back").returncode == 0
    assert contents(tmp_path / "back") == contents(folder)
