"""Section 3: shards, dataset checks, the packing loader and the calibration loader."""
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import train_gpt as gpt
from helpers import random_documents, tiny_config, write_dataset, write_manifest, write_shard


# Shards

def test_a_shard_reads_back_what_was_written(tmp_path):
    values = np.arange(1000, dtype=np.uint16) * 65
    assert (gpt.read_shard(write_shard(tmp_path / "a.bin", values)) == values).all()


def damage(path, how):
    data = path.read_bytes()
    header = np.frombuffer(data[:1024], "<i4").copy()
    if how == "truncated":
        path.write_bytes(data[:-2])
    elif how == "one byte short":
        path.write_bytes(data[:-1])
    elif how == "too long":
        path.write_bytes(data + b"\0\0")
    elif how == "header only":
        path.write_bytes(data[:1024])
    elif how == "short header":
        path.write_bytes(data[:100])
    elif how == "nothing":
        path.write_bytes(b"")
    elif how == "no tokens":
        header[2] = 0
        path.write_bytes(header.tobytes())
    elif how == "negative count":
        header[2] = -5
        path.write_bytes(header.tobytes() + data[1024:])
    elif how == "foreign magic":
        header[0] = 123
        path.write_bytes(header.tobytes() + data[1024:])
    elif how == "foreign version":
        header[1] = 2
        path.write_bytes(header.tobytes() + data[1024:])


INCOMPLETE = ["truncated", "one byte short", "too long", "header only", "no tokens", "negative count", "nothing",
              "short header"]
FOREIGN = ["foreign magic", "foreign version"]


@pytest.mark.parametrize("how", INCOMPLETE + FOREIGN)
@pytest.mark.parametrize("name", ["fineweb_train_000001.bin", "fineweb_val_000000.bin",
                                  "fineweb_val_bytes_000001.bin"])
def test_damaged_shard_is_refused_by_name(tmp_path, how, name):
    damage(write_dataset(tmp_path) / name, how)
    with pytest.raises(gpt.DataError, match=re.escape(name)) as caught:
        gpt.Dataset.open(tiny_config(data_path=str(tmp_path)))
    wanted = "fetch this shard again" if how in INCOMPLETE else "expected a token shard .*prepare the data again"
    assert re.search(wanted, str(caught.value))


def test_truncated_shard_says_how_many_tokens_were_promised_and_found(tmp_path):
    path = write_shard(tmp_path / "a.bin", np.ones(5000, np.uint16))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(gpt.DataError, match=r"promises 5,000 tokens \(11,024 bytes\), found 11,020 bytes"):
        gpt.read_shard(path)


# Dataset checks

def test_an_intact_folder_opens_and_only_headers_are_read(tmp_path, monkeypatch):
    write_dataset(tmp_path)
    monkeypatch.setattr(np, "fromfile", None)                  # reading tokens would fail
    data = gpt.Dataset.open(tiny_config(data_path=str(tmp_path)))
    assert ([p.name for p in data.train], data.val_tokens, data.manifest) == (
        ["fineweb_train_000000.bin", "fineweb_train_000001.bin"], 550, None)


def test_shards_are_used_in_numeric_order(tmp_path):
    write_dataset(tmp_path, train=(600,) * 12)
    names = [path.name for path in gpt.find_shards(tmp_path, "train")]
    assert names == [f"fineweb_train_{k:06d}.bin" for k in range(12)]


def test_the_byte_sidecar_is_not_taken_for_validation_tokens(tmp_path):
    write_dataset(tmp_path)
    assert all("bytes" not in path.name for path in gpt.find_shards(tmp_path, "val"))


@pytest.mark.parametrize("series", ["train", "val", "val_bytes"])
def test_a_missing_shard_number_is_refused_by_name(tmp_path, series):
    write_dataset(tmp_path)
    (tmp_path / f"fineweb_{series}_000000.bin").unlink()
    with pytest.raises(gpt.DataError, match=f"fineweb_{series}_000000.bin is missing; fetch it again"):
        gpt.Dataset.open(tiny_config(data_path=str(tmp_path)))


@pytest.mark.parametrize("series", ["train", "val", "val_bytes"])
def test_a_missing_series_is_refused(tmp_path, series):
    write_dataset(tmp_path)
    for path in gpt.find_shards(tmp_path, series):
        path.unlink()
    with pytest.raises(gpt.DataError, match=rf"no fineweb_{series}_\*.bin; run prepare_caseops_data.py"):
        gpt.Dataset.open(tiny_config(data_path=str(tmp_path)))


def test_a_missing_folder_is_refused_with_the_setting_to_correct(tmp_path):
    with pytest.raises(gpt.DataError, match="DATA_PATH=.*nowhere: no such folder"):
        gpt.Dataset.open(tiny_config(data_path=str(tmp_path / "nowhere")))


def test_a_sidecar_of_another_length_is_refused(tmp_path):
    write_dataset(tmp_path)
    write_shard(tmp_path / "fineweb_val_bytes_000001.bin", np.ones(249, np.uint16))
    with pytest.raises(gpt.DataError, match=r"\[300, 250\] tokens and \[300, 249\] byte counts"):
        gpt.Dataset.open(tiny_config(data_path=str(tmp_path)))


def test_a_sidecar_with_fewer_shards_is_refused(tmp_path):
    write_dataset(tmp_path)
    (tmp_path / "fineweb_val_bytes_000001.bin").unlink()
    with pytest.raises(gpt.DataError, match="as long as its fineweb_val shard"):
        gpt.Dataset.open(tiny_config(data_path=str(tmp_path)))


def test_validation_tokens_and_bytes_are_the_shards_in_order(tmp_path):
    write_dataset(tmp_path)
    tokens, counts = gpt.Dataset.open(tiny_config(data_path=str(tmp_path))).load_validation()
    parts = [gpt.read_shard(tmp_path / f"fineweb_val_00000{k}.bin") for k in (0, 1)]
    assert (tokens == np.concatenate(parts)).all() and len(counts) == len(tokens)


def test_data_without_manifest_needs_check_figures_or_permission(tmp_path):
    write_dataset(tmp_path)
    with pytest.raises(gpt.DataError, match="found 550 and 2; prepare the data .*ALLOW_UNVERIFIED=1"):
        gpt.Dataset.open(tiny_config(data_path=str(tmp_path), allow_unverified=False))


def test_the_published_export_is_recognised_by_its_check_figures(tmp_path, monkeypatch):
    write_dataset(tmp_path)
    monkeypatch.setattr(gpt, "CHECK_FIGURES", {"train_shards": 2, "val_tokens": (550, 551)})
    cfg = tiny_config(data_path=str(tmp_path), allow_unverified=False)
    assert gpt.Dataset.open(cfg).val_tokens == 550
    monkeypatch.setattr(gpt, "CHECK_FIGURES", {"train_shards": 1, "val_tokens": (550, 551)})
    with pytest.raises(gpt.DataError, match="ALLOW_UNVERIFIED=1"):
        gpt.Dataset.open(cfg)


@pytest.fixture
def with_manifest(tmp_path):
    """A verified data folder whose manifest names a stand-in for a tokenizer."""
    model = tmp_path / "some.model"
    model.write_bytes(b"not read here")
    write_dataset(tmp_path, tokenizer=model)
    return tmp_path, tiny_config(data_path=str(tmp_path), allow_unverified=False)


def edit_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_folder_that_agrees_with_its_manifest_is_verified(with_manifest):
    assert gpt.Dataset.open(with_manifest[1]).manifest["files"]


def test_the_last_training_shards_may_be_left_out(with_manifest):
    folder, cfg = with_manifest
    (folder / "fineweb_train_000001.bin").unlink()
    assert len(gpt.Dataset.open(cfg).train) == 1


@pytest.mark.parametrize("change", ["other count", "unlisted", "validation missing"])
def test_files_that_disagree_with_the_manifest_are_refused_by_name(with_manifest, change):
    folder, cfg = with_manifest
    if change == "other count":
        name = "fineweb_train_000000.bin"
        write_shard(folder / name, np.ones(1999, np.uint16))
        message = f"{name} should hold 2000 values, found 1999"
    elif change == "unlisted":
        name = "fineweb_train_000002.bin"
        write_shard(folder / name, np.ones(10, np.uint16))
        message = f"{name} should hold None values, found 10"
    else:
        for series in ("val", "val_bytes"):
            (folder / f"fineweb_{series}_000001.bin").unlink()
        message = "fineweb_val_000001.bin should hold 250 values, found None"
    with pytest.raises(gpt.DataError, match="manifest.json and files disagree: " + message):
        gpt.Dataset.open(cfg)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": []}', '{"files": {"a": 3}}', '{"files": {"a": {"values": "x"}}}'])
def test_a_damaged_manifest_is_refused(with_manifest, text):
    folder, cfg = with_manifest
    (folder / "manifest.json").write_text(text)
    with pytest.raises(gpt.DataError, match="manifest.json: not a manifest of this family"):
        gpt.Dataset.open(cfg)


@pytest.mark.parametrize("change", [lambda m: m.pop("tokenizer"), lambda m: m["tokenizer"].pop("file"),
                                    lambda m: m.update(tokenizer=None),
                                    lambda m: m.update(merges={"file": "merges.json", "count": 3})])
def test_a_manifest_without_tokenizer_is_refused_and_not_a_crash(with_manifest, change):
    folder, cfg = with_manifest
    edit_manifest(folder, change)
    with pytest.raises(gpt.DataError, match="manifest"):
        gpt.check_tokenizer(cfg, gpt.Dataset.open(cfg))


# Every value

def check_values(cfg, split="val", **kwargs):
    return gpt.Dataset.open(cfg).check_values(cfg, gpt.Run(cfg), split, **kwargs)


def test_sound_values_pass_and_a_second_start_reads_nothing(with_manifest, monkeypatch, capsys):
    _, cfg = with_manifest
    assert not check_values(cfg, read=False)
    assert check_values(cfg) and check_values(cfg, "train")
    monkeypatch.setattr(gpt, "read_facts", None)
    assert check_values(cfg, read=False) and check_values(cfg, "train", read=False)
    assert "data checked split:train files:2 read:0" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["fineweb_val_000001.bin", "fineweb_val_bytes_000000.bin", "fineweb_train_000001.bin"])
def test_one_changed_value_is_refused_by_name_also_after_a_sound_check(with_manifest, name):
    folder, cfg = with_manifest
    split = "train" if "train" in name else "val"
    assert check_values(cfg, split)
    values = gpt.read_shard(folder / name)
    values[7] += 1
    write_shard(folder / name, values)
    # a fault is not remembered as sound
    for _ in range(2):
        with pytest.raises(gpt.DataError, match=f"{name}: SHA-256 .* but manifest.json says .*; the file is "
                                                f"damaged"):
            check_values(cfg, split)


def test_swapped_splits_of_the_same_length_are_refused(with_manifest):
    folder, cfg = with_manifest
    other = write_dataset(folder / "other", seed=1)
    for path in other.glob("fineweb_val_*.bin"):
        (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(gpt.DataError, match="from another preparation run"):
        check_values(cfg)


@pytest.mark.parametrize("fact", ["tokens", "sidecar_bytes"])
def test_totals_other_than_the_manifest_s_are_refused(with_manifest, fact):
    folder, cfg = with_manifest
    edit_manifest(folder, lambda m: m["val"].update({fact: m["val"][fact] + 1}))
    with pytest.raises(gpt.DataError, match="validation split with .*, but manifest.json says"):
        check_values(cfg)


@pytest.mark.parametrize("change", [lambda m: m["files"]["fineweb_val_000000.bin"].pop("sha256"),
                                    lambda m: m["files"]["fineweb_val_000000.bin"].update(sha256=None),
                                    lambda m: m["val"].pop("sidecar_bytes"), lambda m: m.pop("val")])
def test_a_manifest_without_a_hash_or_total_is_refused(with_manifest, change):
    folder, cfg = with_manifest
    edit_manifest(folder, change)
    with pytest.raises(gpt.DataError, match="not a manifest of this family"):
        gpt.Dataset.open(cfg)


@pytest.mark.parametrize("split, name", [("train", "fineweb_train_000001.bin"), ("val", "fineweb_val_000001.bin")])
def test_a_token_beyond_the_vocabulary_is_refused(tmp_path, split, name):
    write_dataset(tmp_path)
    tokens = gpt.read_shard(tmp_path / name)
    tokens[-1] = 64
    write_shard(tmp_path / name, tokens)
    with pytest.raises(gpt.DataError, match=f"{name}: expected tokens below VOCAB_SIZE=64, found 64; set "
                                            f"VOCAB_SIZE"):
        check_values(tiny_config(data_path=str(tmp_path)), split)


def test_a_validation_split_without_a_first_document_is_refused(tmp_path):
    write_dataset(tmp_path)
    write_shard(tmp_path / "fineweb_val_000000.bin", np.full(300, 5))
    with pytest.raises(gpt.DataError, match=r"must begin with BOS \(1\), found token 5; prepare the "
                                            r"validation split"):
        check_values(tiny_config(data_path=str(tmp_path)))


@pytest.mark.parametrize("off, is_refused", [(0, False), (2, False), (-2, False), (3, True), (-3, True)])
def test_the_published_export_has_its_published_bytes(tmp_path, monkeypatch, off, is_refused):
    """Counted over the first targets, across the border of two shards; a target's bytes stand one position
    later."""
    write_dataset(tmp_path)
    counts = np.concatenate([gpt.read_shard(tmp_path / f"fineweb_val_bytes_00000{k}.bin") for k in (0, 1)])
    monkeypatch.setattr(gpt, "CHECK_FIGURES", {
        "train_shards": 2, "val_tokens": (550, 551),
        "val_bytes": {"targets": 400, "bytes": int(counts[1:401].sum()) + off, "tolerance": 2}})
    cfg = tiny_config(data_path=str(tmp_path), allow_unverified=False)
    if is_refused:
        with pytest.raises(gpt.DataError, match="the first 400 validation targets stand for .* bytes, the "
                                                "published"):
            check_values(cfg)
    else:
        assert check_values(cfg)


def test_damaged_memory_of_earlier_checks_is_read_anew(with_manifest, capsys):
    folder, cfg = with_manifest
    assert check_values(cfg) and "read:4" in capsys.readouterr().out
    sound = json.loads((folder / gpt.CHECKED_NAME).read_text())
    del sound["files"]["fineweb_val_000000.bin"][1]["largest"]
    for text in ("", "[]", '{"files": {"fineweb_val_000000.bin": 3}}', '{"files": 7}', json.dumps(sound)):
        (folder / gpt.CHECKED_NAME).write_text(text)
        assert check_values(cfg) and "read:4" in capsys.readouterr().out


# Tokenizer

@pytest.fixture
def shipped(repo, tmp_path):
    """A data folder made with the shipped tokenizer, a copy of which lies in it, and its configuration."""
    model = repo / "tokenizers" / "caseops_8192.model"
    if not model.is_file():
        pytest.skip(f"no {model.name} in tokenizers/")
    copy = tmp_path / model.name
    copy.write_bytes(model.read_bytes())
    write_dataset(tmp_path, tokenizer=copy, vocab_size=8192)
    return copy, tiny_config(data_path=str(tmp_path), vocab_size=8192)


def check(cfg):
    return gpt.check_tokenizer(cfg, gpt.Dataset.open(cfg))


def test_the_tokenizer_named_by_the_manifest_is_found_beside_the_data(shipped):
    assert check(shipped[1]) == shipped[0]


def test_the_shipped_tokenizer_is_used_when_nothing_else_is_named(shipped):
    copy, cfg = shipped
    (copy.parent / "manifest.json").unlink()
    copy.unlink()
    assert check(cfg).name == "caseops_8192.model"


def test_the_published_export_is_refused_with_any_other_tokenizer(shipped, monkeypatch):
    copy, cfg = shipped
    (copy.parent / "manifest.json").unlink()
    monkeypatch.setitem(gpt.CHECK_FIGURES, "val_tokens", (1, 10**9))              # pass for the published export
    published = dataclasses.replace(cfg, allow_unverified=False)
    with pytest.raises(gpt.DataError, match="no tokenizer: expected .*fineweb_8192_bpe.*; set TOKENIZER_PATH"):
        check(published)
    with pytest.raises(gpt.DataError, match="but the published export says 97754754561f20de"):
        check(dataclasses.replace(published, tokenizer_path=str(copy)))


def test_a_missing_tokenizer_is_refused_with_the_places_looked_at(shipped):
    copy, cfg = shipped
    wanted = copy.parent / "absent.model"
    with pytest.raises(gpt.DataError, match=f"no tokenizer: expected {wanted}; set TOKENIZER_PATH"):
        check(dataclasses.replace(cfg, tokenizer_path=str(wanted)))
    edit_manifest(copy.parent, lambda m: m["tokenizer"].update(file="absent.model"))
    with pytest.raises(gpt.DataError, match=f"no tokenizer: expected {wanted} or .*; set TOKENIZER_PATH"):
        check(cfg)


def test_a_tokenizer_with_another_hash_than_the_manifest_says_is_refused(shipped):
    copy, cfg = shipped
    copy.write_bytes(copy.read_bytes() + b"\0")
    with pytest.raises(gpt.DataError, match="SHA-256 .* but the shards' manifest says .*; use the tokenizer"):
        check(cfg)


def test_a_tokenizer_with_another_hash_than_its_own_file_says_is_refused(shipped):
    copy, cfg = shipped
    copy.with_name(copy.name + ".sha256").write_text("0" * 64 + "  " + copy.name)
    with pytest.raises(gpt.DataError, match="but caseops_8192.model.sha256 says 0000000000000000"):
        check(cfg)


def test_an_empty_hash_file_is_refused_and_not_a_crash(shipped):
    copy, cfg = shipped
    copy.with_name(copy.name + ".sha256").write_text("")
    with pytest.raises(gpt.DataError, match="sha256"):
        check(cfg)


def test_a_tokenizer_with_another_vocabulary_size_is_refused(shipped):
    with pytest.raises(gpt.DataError, match="'vocab_size': 4096.*'vocab_size': 8192.*set VOCAB_SIZE"):
        check(dataclasses.replace(shipped[1], vocab_size=4096))


@pytest.mark.parametrize("fact", [{"vocab_size": 8000}, {"bos_id": 2}, {"operator_ids": [8, 9, 10, 11]}])
def test_a_manifest_with_other_special_ids_is_refused(shipped, fact):
    copy, cfg = shipped
    edit_manifest(copy.parent, lambda m: m["tokenizer"].update(fact))
    with pytest.raises(gpt.DataError, match="in the shards' manifest; set VOCAB_SIZE and TOKENIZER_PATH"):
        check(cfg)


def test_a_file_that_is_no_tokenizer_is_refused(shipped):
    copy, cfg = shipped
    copy.write_bytes(b"plain text")
    listed = gpt.Dataset.open(cfg).manifest["files"]
    write_manifest(copy.parent, {name: entry["values"] for name, entry in listed.items()}, copy, 8192)
    with pytest.raises(gpt.DataError, match="not a SentencePiece model"):
        check(cfg)


# Segments

def plain_segment_bounds(tokens, cap):
    bounds = [0]
    for position in range(1, len(tokens)):
        if tokens[position] == gpt.BOS or position - bounds[-1] == cap:
            bounds.append(position)
    return [*bounds, len(tokens)]


@given(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=80), st.integers(1, 20), st.integers(1, 16))
def test_segments_begin_at_documents_and_are_cut_at_the_cap(tokens, cap, pad):
    bounds = gpt.segment_bounds(np.array(tokens), cap, pad)
    plain = plain_segment_bounds(tokens, cap)
    assert bounds[:len(plain)].tolist() == plain
    assert len(bounds) % pad == 0 and len(bounds) - len(plain) < pad and (bounds[len(plain):] == len(tokens)).all()
    assert bounds.dtype == np.int32


# Packing loader

def rows_of(paths, count, row_tokens, cap, **kwargs):
    loader = gpt.PackingLoader(paths, row_tokens, cap, **kwargs)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def same_row(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


def archive_shards(vectors, folder):
    names = sorted((k for k in vectors if re.fullmatch(r"shard\d+_tokens", k)), key=lambda k: int(re.findall(r"\d+", k)[0]))
    return [write_shard(folder / f"fineweb_train_{i:06d}.bin", vectors[name]) for i, name in enumerate(names)]


def pack_keys(vectors, world_size):
    pattern = re.compile(rf"pack_ws{world_size}_rank(\d+)_batch(\d+)_inputs")
    return [(int(m[1]), int(m[2])) for key in vectors if (m := pattern.fullmatch(key))]


def assert_is_row(row, vectors, key, pad):
    assert (row.inputs.numpy() == vectors[f"{key}_inputs"]).all()
    assert (row.targets.numpy() == vectors[f"{key}_targets"]).all()
    cap, expected = int(vectors["segment_cap"]), vectors[f"{key}_cu_seqlens"]
    bounds = gpt.segment_bounds(row.inputs.numpy(), cap, pad)
    assert bounds.dtype == expected.dtype and (bounds == expected).all()
    if pad == gpt.SEGMENT_PAD:
        assert (row.cu_seqlens.numpy() == expected).all()


def test_rows_of_one_rank_equal_the_reference(load_vectors, tmp_path):
    vectors = load_vectors("loader")
    keys = pack_keys(vectors, 1)
    stream = rows_of(archive_shards(vectors, tmp_path), 1 + max(b for _, b in keys), int(vectors["local_tokens"]),
                     int(vectors["segment_cap"]))
    for rank, batch in keys:
        assert_is_row(stream[batch], vectors, f"pack_ws1_rank{rank}_batch{batch}", int(vectors["cu_pad_multiple"]))


def test_rows_of_several_ranks_are_one_stream_dealt_in_turn(load_vectors, tmp_path):
    """Row micro-step * R + rank of the stream of one rank; nothing is dropped at the end of a shard."""
    vectors = load_vectors("loader")
    paths = archive_shards(vectors, tmp_path)
    row_tokens, cap = int(vectors["local_tokens"]), int(vectors["segment_cap"])
    sizes = sorted({int(m[1]) for key in vectors if (m := re.match(r"pack_ws(\d+)_", key))} - {1})
    assert sizes
    for world_size in sizes:
        keys = pack_keys(vectors, world_size)
        batches = 1 + max(batch for _, batch in keys)
        stream = rows_of(paths, batches * world_size, row_tokens, cap)
        mine = [rows_of(paths, batches, row_tokens, cap, rank=rank, world_size=world_size)
                for rank in range(world_size)]
        for rank, batch in keys:
            for row in (stream[batch * world_size + rank], mine[rank][batch]):
                assert_is_row(row, vectors, f"pack_ws{world_size}_rank{rank}_batch{batch}",
                              int(vectors["cu_pad_multiple"]))


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_rank_r_of_R_takes_rows_r_plus_multiples_of_R(load_vectors, tmp_path, world_size):
    vectors = load_vectors("loader")
    paths, row_tokens, cap = archive_shards(vectors, tmp_path), int(vectors["local_tokens"]), int(vectors["segment_cap"])
    stream = rows_of(paths, 5 * world_size, row_tokens, cap)
    for rank in range(world_size):
        mine = rows_of(paths, 5, row_tokens, cap, rank=rank, world_size=world_size)
        assert all(same_row(row, stream[m * world_size + rank]) for m, row in enumerate(mine))


@settings(max_examples=25)
@given(st.lists(st.integers(30, 200), min_size=1, max_size=3), st.integers(5, 25), st.integers(0, 99))
def test_every_token_from_the_first_document_on_is_read_once_in_order(tmp_path_factory, sizes, row_tokens, seed):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("shards")
    paths, expected = [], []
    for index, size in enumerate(sizes):
        tokens = np.concatenate([rng.integers(2, 9, index), random_documents(rng, size, 16)])
        paths.append(write_shard(folder / f"{index}.bin", tokens))
        expected.append(tokens[index:index + size // (row_tokens + 1) * (row_tokens + 1)])
    expected = np.concatenate(expected)
    count = len(expected) // (row_tokens + 1)
    if not count:
        return
    rows = rows_of(paths, count + 1, row_tokens, 8)
    spans = [np.append(row.inputs.numpy(), row.targets.numpy()[-1:]) for row in rows]
    assert (np.concatenate(spans[:-1]) == expected).all()
    assert all((row.inputs[1:] == row.targets[:-1]).all() for row in rows)
    assert same_row(rows[-1], rows[0])                                            # then it begins again


def test_rows_have_the_types_the_model_takes(tmp_path):
    write_dataset(tmp_path)
    row, = rows_of(gpt.find_shards(tmp_path, "train"), 1, 96, 32)
    assert (row.inputs.dtype, row.targets.dtype, row.cu_seqlens.dtype) == (torch.int64, torch.int64, torch.int32)
    assert row.inputs.shape == row.targets.shape == (96,) and len(row.cu_seqlens) % gpt.SEGMENT_PAD == 0


def test_shards_without_a_whole_row_are_skipped_with_a_warning(tmp_path):
    paths = [write_shard(tmp_path / "no_bos.bin", np.full(300, 5)), write_shard(tmp_path / "short.bin", np.ones(10)),
             write_shard(tmp_path / "good.bin", random_documents(np.random.default_rng(0), 300))]
    lines = []
    rows = rows_of(paths, 2, 96, 32, warn=lines.append)
    assert all(map(same_row, rows, rows_of(paths[2:], 2, 96, 32)))
    assert lines[0].startswith("data warning shard:no_bos.bin tokens:300 skipped")
    assert lines[1].startswith("data warning shard:short.bin tokens:10 skipped")


def test_training_data_without_any_whole_row_is_refused(tmp_path):
    with pytest.raises(gpt.DataError, match="no training shard holds one row of 97 tokens.*lower TRAIN_BATCH_TOKENS"):
        rows_of([write_shard(tmp_path / "short.bin", np.ones(20))], 1, 96, 32)


def test_a_shard_that_is_damaged_while_training_is_refused_by_name(tmp_path):
    path = write_shard(tmp_path / "broken.bin", np.ones(500))
    damage(path, "truncated")
    with pytest.raises(gpt.DataError, match="broken.bin.*fetch this shard again"):
        rows_of([path], 1, 96, 32)


def test_any_failure_of_the_reading_thread_reaches_the_caller(tmp_path, monkeypatch):
    """A thread that dies silently would let the run wait for ever."""
    path = write_shard(tmp_path / "good.bin", random_documents(np.random.default_rng(0), 300))
    monkeypatch.setattr(gpt, "segment_bounds", lambda *args: 1 / 0)
    loader = gpt.PackingLoader([path], 96, 32)
    try:
        assert isinstance(loader._ahead[0].exception(timeout=5), ZeroDivisionError)
        for _ in range(5):                                                        # as often as it asks
            with pytest.raises(ZeroDivisionError):
                next(loader)
    finally:
        loader.close()


def test_closing_a_loader_ends_its_thread(tmp_path):
    write_dataset(tmp_path)
    loader = gpt.PackingLoader(gpt.find_shards(tmp_path, "train"), 96, 32)
    next(loader)
    loader.close()
    assert not any(thread.is_alive() for thread in loader._reader._threads)


# Calibration loader

def test_calibration_batches_equal_the_reference(load_vectors, tmp_path):
    vectors = load_vectors("loader")
    paths = archive_shards(vectors, tmp_path)
    pattern = re.compile(r"seq_ws(\d+)_rank(\d+)_batch(\d+)_inputs")
    keys = [tuple(map(int, m.groups())) for key in vectors if (m := pattern.fullmatch(key))]
    for world_size, rank in sorted({key[:2] for key in keys}):
        wanted = {batch: f"seq_ws{world_size}_rank{rank}_batch{batch}" for w, r, batch in keys if (w, r) == (world_size, rank)}
        batch_seqs, seq_len = vectors[f"{wanted[0]}_inputs"].shape
        batches = gpt.calibration_batches(paths[rank::world_size], seq_len, batch_seqs, seed=rank)
        for index, batch in zip(range(max(wanted) + 1), batches):
            if index in wanted:
                assert (batch[:, :-1] == vectors[f"{wanted[index]}_inputs"]).all()
                if f"{wanted[index]}_targets" in vectors:
                    assert (batch[:, 1:] == vectors[f"{wanted[index]}_targets"]).all()


def test_calibration_uses_every_sequence_once_before_any_comes_back(tmp_path):
    seq_len = 10
    paths = [write_shard(tmp_path / f"{k}.bin", np.arange(1000 * k, 1000 * k + 205)) for k in range(3)]
    batches = gpt.calibration_batches(paths, seq_len, 4)
    starts = np.concatenate([next(batches)[:, 0] for _ in range(12)])
    assert len(set(starts)) == 48 and all(len(set(starts[starts // 1000 == k] % seq_len)) == 1 for k in range(3))


def test_calibration_without_a_whole_sequence_is_refused(tmp_path):
    path = write_shard(tmp_path / "short.bin", np.ones(20))
    with pytest.raises(gpt.DataError, match="no training shard holds one sequence of 33 tokens; lower TRAIN_SEQ_LEN"):
        next(gpt.calibration_batches([path], 32, 2))
