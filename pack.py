#!/usr/bin/env python3
"""Make the submission: a self-extracting train_gpt.py and the files it needs, in one folder.

    python pack.py FOLDER          write FOLDER (must not exist), then check that the packed script is the same program
    python report.py pack FOLDER   the same

The packed script is a small Python file whose one string literal holds the program, without comments and docstrings,
compressed by LZMA. It unpacks itself to a private temporary folder and runs from there, because Triton reads the source
of its kernels from a file. Its length on disk is the code size that a run counts.
"""
from __future__ import annotations

import ast
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent
COMPANIONS = ("run.sh", "lossless_caps.py", "caseops_encoder.py", "caseops_merges.py", "prepare_caseops_data.py",
              "requirements.txt", "requirements-gpu.txt", "tokenizers", "LICENSE", "README.md")
LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 3, "lp": 0, "pb": 0,
                 "dict_size": 1 << 20}]
# Latin-1 makes every byte one character, so that the payload needs no base64. PACKED_FILE tells the program its own
# length on disk; everything else about it is as if the readable script ran.
LOADER = """#coding:latin1
import lzma,os,runpy,tempfile
with tempfile.TemporaryDirectory(prefix="train_gpt_") as d:
 p=os.path.join(d,"train_gpt.py")
 with open(p,"wb") as f:f.write(lzma.decompress("%s".encode("latin1"),lzma.FORMAT_RAW,filters=%s))
 runpy.run_path(p,{"PACKED_FILE":os.path.abspath(__file__)},"__main__")
"""
ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\0": "\\0"}


def strip_c(source: str) -> str:
    """C source without comments, indentation and blank lines."""
    source = re.sub(r"/\*.*?\*/|//[^\n]*", "", source, flags=re.S)
    return "\n".join(line.strip() for line in source.splitlines() if line.strip()) + "\n"


class _Strip(ast.NodeTransformer):
    """Drop what the program does not need to run: docstrings, hints, twins; shorten C source.

    A twin is the plain definition of a C routine, kept for readers and tests; its name says so.
    Hints stay where they are read: class fields, and arguments of decorated functions (custom operators, kernels).
    """

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str) and node.value.lstrip().startswith("#include"):
            return ast.Constant(strip_c(node.value))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST | None:
        return None if _is_twin(node.name) else self._without_docstring(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        if _is_twin(node.name):
            return None
        if not node.decorator_list:
            node.returns = None
            arguments = node.args
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg,
                             arguments.kwarg):
                if argument is not None:
                    argument.annotation = None
        node.body = [_without_hint(statement) for statement in node.body]
        return self._without_docstring(node)

    def _without_docstring(self, node):
        self.generic_visit(node)
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = node.body[1:] or [ast.Pass()]
        return node


def _is_twin(name: str) -> bool:
    return name.lower().lstrip("_").startswith("twin")


def _without_hint(statement: ast.stmt) -> ast.stmt:
    if isinstance(statement, ast.AnnAssign) and statement.value is not None:
        return ast.Assign([statement.target], statement.value)
    return statement


def minify(source: str) -> str:
    """The same program without what _Strip drops. The module's docstring stays: --help prints it."""
    return ast.unparse(ast.fix_missing_locations(_Strip().visit(ast.parse(source)))) + "\n"


def as_literal(data: bytes) -> str:
    """What stands between the quotes of a Latin-1 string literal whose characters are these bytes."""
    # The escape \0 would run into a digit that follows it.
    return re.sub("\0[0-7]?|[" + re.escape("".join(ESCAPES)) + "]",
                  lambda m: ESCAPES[m[0]] if m[0] in ESCAPES else "\\000" + m[0][1], data.decode("latin1"))


def pack_script(source: str) -> bytes:
    """The self-extracting form of a script."""
    payload = lzma.compress(minify(source).encode(), lzma.FORMAT_RAW, filters=LZMA_FILTERS)
    return (LOADER % (as_literal(payload), LZMA_FILTERS)).encode("latin1")


def write_folder(folder: Path) -> int:
    """Write the submission to `folder` and return the code size. Raises FileExistsError when it exists."""
    packed = pack_script((REPO / "train_gpt.py").read_text(encoding="utf-8"))
    folder.mkdir(parents=True)
    (folder / "train_gpt.py").write_bytes(packed)
    for name in COMPANIONS:
        (shutil.copytree if (REPO / name).is_dir() else shutil.copy2)(REPO / name, folder / name)
    return len(packed)


def write_toy_shards(folder: Path) -> None:
    """Random documents in the shard format, enough for three steps of a small model."""
    import numpy as np
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name, count, byte_counts in (("train", 20_000, False), ("val", 2_000, False), ("val_bytes", 2_000, True)):
        values = np.full(count, 3) if byte_counts else rng.integers(8, 8192, count)
        values[::97] = 0 if byte_counts else 1
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, count
        (folder / f"fineweb_{name}_000000.bin").write_bytes(header.tobytes() + values.astype("<u2").tobytes())


def compare(packed: Path, readable: Path) -> list[str]:
    """Run both scripts: --help, then three steps of a small model. Returns what differs, in sentences."""
    with tempfile.TemporaryDirectory(prefix="train_gpt_check_") as work:
        write_toy_shards(Path(work) / "data")
        settings = dict(
            os.environ, DATA_PATH="data", ALLOW_UNVERIFIED="1", TOKENIZER_PATH=str(REPO / "tokenizers/caseops_8192.model"),
            ITERATIONS="3", MAX_WALLCLOCK_SECONDS="0", WARMUP_STEPS="0", COMPILE="0", PREQUANT_ONLY="1", MODEL_DIM="32",
            NUM_HEADS="2", NUM_KV_HEADS="1", ROPE_DIMS="8", TRAIN_BATCH_TOKENS="2048", TRAIN_SEQ_LEN="64",
            VAL_BATCH_TOKENS="2048", EVAL_SEQ_LEN="64", CUDA_VISIBLE_DEVICES="")
        outputs = []
        for script in (packed, readable):
            help_text, run = (subprocess.run([sys.executable, str(script), *arguments], cwd=work, text=True,
                                             capture_output=True, env=settings) for arguments in (["--help"], []))
            losses = [line.split(" train_time")[0] for line in run.stdout.splitlines() if "train_loss" in line]
            if help_text.returncode or run.returncode:
                return [f"{script} fails: {(help_text.stderr + run.stderr).strip()[-2000:]}"]
            outputs.append((help_text.stdout, losses))
    (packed_help, packed_losses), (readable_help, readable_losses) = outputs
    return [*(["--help differs"] if packed_help != readable_help else []),
            *([f"losses differ: {packed_losses} packed, {readable_losses} readable"]
              if packed_losses != readable_losses or len(packed_losses) != 3 else [])]


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        is_help = argv in (["--help"], ["-h"])
        print(__doc__, file=sys.stdout if is_help else sys.stderr)
        return 0 if is_help else 2
    folder = Path(argv[0])
    try:
        code_bytes = write_folder(folder)
    except FileExistsError:
        print(f"error: {folder} exists; name a new folder or remove it", file=sys.stderr)
        return 2
    differences = compare((folder / "train_gpt.py").resolve(), REPO / "train_gpt.py")
    print(f"pack folder:{folder} code_bytes:{code_bytes} same_program:{int(not differences)}")
    for difference in differences:
        print(f"error: {difference}", file=sys.stderr)
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
