"""The packed script: what is dropped, what stays, and that it is the same program."""
import ast
import subprocess
import sys

import numpy as np
import pytest

import pack
import train_gpt as gpt

SCRIPT = """#!/usr/bin/env python3
\"\"\"Kept: --help prints it.\"\"\"
import sys
from typing import NamedTuple

C = r\"\"\"
#include <stdint.h>
/* a comment */
int f(void) { return 1; }   // another
\"\"\"


class Pair(NamedTuple):
    \"\"\"Dropped.\"\"\"
    first: int
    second: str = "a\\0b"


def twin_add(a: int, b: int) -> int:
    return a + b


def add(a: int, b: int) -> int:
    \"\"\"Dropped.\"\"\"
    total: int = a + b        # a comment
    return total


if __name__ == "__main__":
    print(__doc__, add(1, 2), Pair(1), sys.argv[1:], "int f" in C)
"""


@pytest.mark.parametrize("data", (b"\\05", b"\x00\x00" + b"07", b"\\\x00" + b"1", bytes(range(256)) * 2,
                                  np.random.default_rng(0).integers(0, 256, 200_000, np.uint8).tobytes()))
def test_any_bytes_survive_as_a_literal(data, tmp_path):
    script = tmp_path / "literal.py"
    script.write_bytes(('#coding:latin1\nimport sys\nsys.stdout.buffer.write("%s".encode("latin1"))'
                        % pack.as_literal(data)).encode("latin1"))
    assert subprocess.run([sys.executable, str(script)], capture_output=True).stdout == data


def test_minified_script_keeps_fields_and_drops_docstrings_hints_and_twins():
    small = pack.minify(SCRIPT)
    assert "Kept" in small and "first: int" in small and "int f(void)" in small
    assert not any(word in small for word in ("Dropped", "comment", "twin_add", "total: int", "b: int"))
    assert len(small) < len(SCRIPT)


def test_packed_script_prints_what_the_readable_one_prints(tmp_path):
    outputs = []
    for name, data in (("readable.py", SCRIPT.encode()), ("packed.py", pack.pack_script(SCRIPT))):
        (tmp_path / name).write_bytes(data)
        done = subprocess.run([sys.executable, tmp_path / name, "x", "y"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] and "Kept" in outputs[0]


def test_packed_script_passes_on_exit_codes(tmp_path):
    (tmp_path / "p.py").write_bytes(pack.pack_script("import sys\nsys.exit(3)\n"))
    assert subprocess.run([sys.executable, tmp_path / "p.py"]).returncode == 3


@pytest.mark.parametrize("payload", ["x = 1\n", "y = '" + "quoted \"text\" " * 9 + "'\n"])
def test_packed_script_is_latin_1_and_parses(payload):
    packed = pack.pack_script(payload)
    ast.parse(packed)
    assert b"\0" not in packed and b"\r" not in packed


def test_training_script_keeps_its_size_limit_and_loses_its_twins(repo):
    source = (repo / "train_gpt.py").read_text(encoding="utf-8")
    assert len(pack.pack_script(source)) <= 48_000                     # room for the kernels; 42,190 is the reference's code
    names = {node.name for node in ast.walk(ast.parse(pack.minify(source)))
             if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert "encode_codes" in names and not {"twin_codes", "twin_words", "twin_ngram_hints"} & names


def test_run_counts_the_packed_script(repo, capsys):
    assert gpt.report_code_size(gpt.Run(gpt.Config()), None) == len(pack.pack_script(
        (repo / "train_gpt.py").read_text(encoding="utf-8")))
    assert "artifact code_form:packed\n" in capsys.readouterr().out


def test_packed_training_script_is_the_same_program(tmp_path, repo):
    (tmp_path / "train_gpt.py").write_bytes(pack.pack_script((repo / "train_gpt.py").read_text(encoding="utf-8")))
    assert pack.compare(tmp_path / "train_gpt.py", repo / "train_gpt.py") == []


def test_existing_folder_is_refused(tmp_path, capsys):
    assert pack.main([str(tmp_path)]) == 2
    assert "exists; name a new folder" in capsys.readouterr().err
