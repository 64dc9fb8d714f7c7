"""Verification of shard directories: sound ones pass, each kind of damage gives its sentence."""
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import prepare_caseops_data as prepare
import train_gpt as gpt


def documents(count: int) -> list[str]:
    return [f"Document number {i} says Hello {'again ' * (i % 7)}" for i in range(count)]


def build(folder: Path, docs: list[str], val_docs: int, **options) -> Path:
    source = folder.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in docs))
    prepare.build(source, folder, val_docs=val_docs, show_progress=False, **options)
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("sound") / "shards", documents(60), 20, shard_tokens=150)


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "shards"))


def violations(folder: Path) -> list[str]:
    return prepare.verify(folder, show_progress=False)


def only_violation(folder: Path) -> str:
    found = violations(folder)
    assert len(found) == 1, found
    return found[0]


def rewrite(path: Path, values: np.ndarray) -> None:
    path.write_bytes(prepare.shard_header(len(values)) + values.astype("<u2").tobytes())


def values(path: Path) -> np.ndarray:
    return np.fromfile(path, "<u2")[512:]


def forget_hashes(folder: Path) -> None:
    """Make the manifest agree with the files, so that only checks of the values themselves can object."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    shards = {file.name: file.read_bytes() for file in sorted(folder.glob("fineweb_*.bin"))}
    manifest["files"] = {name: {"values": len(data) // 2 - 512, "sha256": hashlib.sha256(data).hexdigest()}
                         for name, data in shards.items()}
    totals = {series: [values(folder / name) for name in shards if name.startswith(f"fineweb_{series}_0")]
              for series in ("train", "val", "val_bytes")}
    totals = {series: np.concatenate(parts) for series, parts in totals.items() if parts}
    manifest["docs_val"] = int((totals["val"] == 1).sum())
    manifest["val"] |= {"tokens": len(totals["val"]), "sidecar_bytes": int(totals["val_bytes"].sum())}
    if "train" in totals:
        manifest["docs_train"] = int((totals["train"] == 1).sum())
        manifest["train"] = {"tokens": len(totals["train"]), "bos": manifest["docs_train"]}
    path.write_text(json.dumps(manifest))


def test_a_sound_directory_passes_and_reports_its_figures(folder, capsys):
    assert violations(folder) == []
    manifest = json.loads((folder / "manifest.json").read_text())
    printed = capsys.readouterr().out
    shards = len(list(folder.glob("fineweb_val_0*")))
    assert f"series:val shards:{shards} values:{manifest['val']['tokens']}" in printed
    assert f"bytes:{manifest['val']['sidecar_bytes']}" in printed
    assert "overlap val_documents:0/20 train_documents:0" in printed


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_documents_across_reads_and_shards_are_whole(folder, monkeypatch, chunk):
    monkeypatch.setattr(prepare, "_VALUES_AT_ONCE", chunk)
    check = prepare.DirectoryCheck(folder, show_progress=False)
    assert check.run() == []
    stream = np.concatenate([values(path) for path in sorted(folder.glob("fineweb_val_0*.bin"))])
    parts = np.split(stream, np.flatnonzero(stream == 1))[1:]
    assert check.val_documents == {hashlib.blake2b(part.tobytes(), digest_size=16).digest() for part in parts}


@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_leaky_split_is_caught(tmp_path, has_manifest):
    """Training shards that begin at document 10 beside the true validation split of the first 50."""
    docs = documents(100)
    leaky, right = build(tmp_path / "leaky", docs, 10), build(tmp_path / "right", docs, 50)
    for path in right.glob("fineweb_val_*.bin"):
        shutil.copy(path, leaky)
    if has_manifest:
        assert any("is not the file that the manifest lists" in sentence for sentence in violations(leaky))
        forget_hashes(leaky)
    else:
        (leaky / "manifest.json").unlink()
    found = [sentence for sentence in violations(leaky) if "leaks" in sentence]
    assert len(found) == 1 and "40 of 50 distinct validation documents (80.0 %)" in found[0]


def test_chance_repeats_are_told_from_leaks(tmp_path):
    docs = documents(40)
    folder = build(tmp_path / "shards", [*docs[:20], docs[3], *docs[20:]], 20)
    assert "1 of 20" in only_violation(folder)
    assert prepare.verify(folder, overlap_limit=0.05, show_progress=False) == []


def test_empty_documents_do_not_count_as_overlap(tmp_path):
    assert violations(build(tmp_path / "shards", ["", "one", "", "two", ""], 2)) == []


@pytest.mark.parametrize("damage, sentence", [
    (lambda data: b"", "is empty"),
    (lambda data: data[:100], "is not a token shard"),
    (lambda data: b"\x01" + data[1:], "expected magic 20240520"),
    (lambda data: data[:-2], "has the wrong size"),
    (lambda data: data + b"\0\0", "has the wrong size"),
    (lambda data: data[:8] + b"\0\0\0\0" + data[12:1024], "has the wrong size"),
])
def test_damaged_headers_and_sizes(folder, damage, sentence):
    path = folder / "fineweb_train_000001.bin"
    path.write_bytes(damage(path.read_bytes()))
    assert any(found.startswith(path.name) and sentence in found for found in violations(folder))


def test_a_changed_value_breaks_the_manifest_hash(folder):
    path = folder / "fineweb_train_000000.bin"
    changed = values(path)
    changed[5] = 300 if changed[5] != 300 else 301
    rewrite(path, changed)
    assert "is not the file that the manifest lists" in only_violation(folder)


def test_gaps_foreign_names_and_missing_files(folder):
    (folder / "fineweb_train_000000.bin").unlink()
    shutil.copy(folder / "fineweb_train_000001.bin", folder / "fineweb_train_7.bin")
    found = " ".join(violations(folder))
    assert "Numbering of fineweb_train has 1 gaps, the first at 000000" in found
    assert "fineweb_train_7.bin does not follow" in found
    (folder / "fineweb_val_bytes_000000.bin").unlink()
    found = " ".join(violations(folder))
    assert "fineweb_val_bytes_000000.bin is in the manifest but not in the directory" in found
    assert "Validation tokens and byte sidecar differ" in found


def test_fewer_training_shards_than_listed_are_allowed(folder):
    max(folder.glob("fineweb_train_*.bin")).unlink()
    assert violations(folder) == []


def test_a_split_that_begins_inside_a_document(folder):
    path = folder / "fineweb_train_000000.bin"
    rewrite(path, values(path)[1:])
    forget_hashes(folder)
    assert "The train split begins with id" in only_violation(folder)


@pytest.mark.parametrize("token, sentence", [(9000, "has id 9000, beyond the vocabulary of 8,192"),
                                             (2, "padding, end of sequence")])
def test_ids_that_no_document_gives(folder, token, sentence):
    path = folder / "fineweb_train_000000.bin"
    changed = values(path)
    changed[3] = token
    rewrite(path, changed)
    forget_hashes(folder)
    assert sentence in only_violation(folder)


def test_a_sidecar_that_counts_operators_is_caught(folder):
    for path in folder.glob("fineweb_val_bytes_*.bin"):
        tokens, counts = values(folder / path.name.replace("val_bytes", "val")), values(path)
        counts[np.isin(tokens, [4, 5, 6, 7])] = 3
        rewrite(path, counts)
    forget_hashes(folder)
    found = violations(folder)
    assert any("case operators, which stand for none" in sentence for sentence in found)
    assert any("more than the" in sentence for sentence in found)


def test_a_sidecar_of_another_length_and_bytes_on_bos(folder):
    path = folder / "fineweb_val_bytes_000000.bin"
    counts = values(path)
    counts[0] = 9
    rewrite(path, counts)
    forget_hashes(folder)
    assert any("9 bytes to BOS" in sentence for sentence in violations(folder))
    rewrite(path, counts[:-1])
    assert any("differ in shards or lengths" in sentence for sentence in violations(folder))


def test_attached_edges_and_escapes_are_not_mistaken_for_damage(tmp_path):
    docs = [f"  \ue001 Padded {i}\n" for i in range(30)]
    assert violations(build(tmp_path / "shards", docs, 15, edge_bytes="attach")) == []


def test_a_manifest_or_tokenizer_of_another_build(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokenizer"]["sha256"] = "0" * 64
    manifest["docs_val"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = " ".join(violations(folder))
    assert "is not the tokenizer that the manifest names" in found
    assert "The manifest states 21 validation documents, the shards hold 20" in found
    (folder / "manifest.json").write_text("[]")
    assert any("is not a manifest of this format" in sentence for sentence in violations(folder))


@pytest.mark.parametrize("field, content", [
    ("files", {"fineweb_val_000000.bin": 5}), ("tokenizer", "name"), ("tokenizer", {}),
    ("tokenizer", {"file": "../other.model"}), ("tokenizer", {"file": 5}), ("val", [1]),
    ("val", {"tokens": "many"}), ("train", None),
])
def test_a_manifest_of_odd_content_is_a_violation(folder, field, content):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {field: content}))
    assert any("is not a manifest of this format" in sentence for sentence in violations(folder))


def test_without_a_manifest_only_the_published_figures_are_trusted(folder, monkeypatch):
    (folder / "manifest.json").unlink()
    assert "this is not it: validation has" in only_violation(folder)
    # The same directory passes once the check figures are its own.
    tokens, counts = (np.concatenate([values(path) for path in sorted(folder.glob(f"fineweb_{series}_0*"))])
                      for series in ("val", "val_bytes"))
    monkeypatch.setattr(prepare, "PUBLISHED_VAL_TOKENS", (len(tokens), len(tokens) + 5))
    monkeypatch.setattr(prepare, "PUBLISHED_TARGETS", len(tokens) - 3)
    monkeypatch.setattr(prepare, "PUBLISHED_TARGET_BYTES", int(counts[1:-2].sum()) + 1)
    monkeypatch.setattr(prepare, "DEFAULT_VAL_DOCS", 20)
    monkeypatch.setattr(prepare, "DEFAULT_SHARD_TOKENS", 150)
    max(folder.glob("fineweb_train_*.bin")).unlink()
    assert violations(folder) == []
    monkeypatch.setattr(prepare, "PUBLISHED_TARGET_BYTES", int(counts[1:-2].sum()) + 3)
    assert "targets have" in only_violation(folder)


def test_a_run_reads_nothing_again_after_verify(folder, monkeypatch, capsys):
    """And what verify remembers is what the run itself would have found."""
    assert violations(folder) == []
    remembered = json.loads((folder / gpt.CHECKED_NAME).read_text())["files"]
    cfg = gpt.Config(data_path=str(folder))
    data, run = gpt.Dataset.open(cfg), gpt.Run(cfg)
    for split in ("train", "val"):
        assert data.check_values(cfg, run, split, read=False)
    assert capsys.readouterr().out.count("read:0") == 2
    (folder / gpt.CHECKED_NAME).unlink()
    for split in ("train", "val"):
        assert not data.check_values(cfg, run, split, read=False) and data.check_values(cfg, run, split)
    assert json.loads((folder / gpt.CHECKED_NAME).read_text())["files"] == remembered


def test_a_directory_with_violations_is_not_remembered(folder):
    path = folder / "fineweb_train_000000.bin"
    rewrite(path, values(path)[1:])
    forget_hashes(folder)
    assert violations(folder) and not (folder / gpt.CHECKED_NAME).exists()


def test_command_line_exit_codes(repo, folder):
    def run(*arguments):
        script = repo / "prepare_caseops_data.py"
        return subprocess.run([sys.executable, script, "verify", *map(str, arguments)],
                              capture_output=True, text=True, check=False)

    assert run(folder).returncode == 0
    (folder / "fineweb_train_000000.bin").write_bytes(b"")
    done = run(folder)
    assert done.returncode == 1 and "violation: fineweb_train_000000.bin is empty" in done.stdout
    done = run(folder / "nothing")
    assert done.returncode == 2 and "expected a directory of shards" in done.stderr
    assert run(folder, "--overlap-limit", 7).returncode == 2
    (folder / "fineweb_train_000000.bin").unlink()
    (folder / "fineweb_train_000000.bin").mkdir()
    done = run(folder)
    assert done.returncode == 1 and "fineweb_train_000000.bin: expected to read or write it" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_gets_no_traceback(repo, folder):
    script = repo / "prepare_caseops_data.py"
    with subprocess.Popen([sys.executable, script, "verify", folder], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
