#!/usr/bin/env python3
"""Make the submission: a self-extracting train_gpt.py and the files it needs, in one folder.

    python pack.py FOLDER          write FOLDER (must not exist), then check that the packed script is the
                                   same program
    python report.py pack FOLDER   the same

The packed script is a small Python file whose one string literal holds the program, without comments and
docstrings, compressed by LZMA. It unpacks the program in memory and leaves the lines where Python's `inspect`
looks for them, because Triton reads the source of its kernels; no file is written. Its length on disk is the
code size that a run counts. Any Python from 3.10 on packs the same bytes, and runs them.
"""
from __future__ import annotations

import ast
import io
import itertools
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parent
COMPANIONS = ("run.sh", "launch.py", "lossless_caps.py", "caseops_encoder.py", "caseops_merges.py",
              "prepare_caseops_data.py", "requirements.txt", "requirements-gpu.txt", "tokenizers", "LICENSE",
              "README.md")
LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 3, "lp": 0, "pb": 0,
                 "dict_size": 1 << 20}]
# Latin-1 makes every byte one character, so that the payload needs no base64. __file__ stays that of the packed
# script; the program's own file name exists in linecache only, and its time None says that there is no file to
# compare with.
LOADER = """#coding:latin1
import linecache,lzma
p=__file__+".unpacked.py"
s=lzma.decompress("%s".encode("latin1"),lzma.FORMAT_RAW,filters=%s).decode()
linecache.cache[p]=len(s),None,s.splitlines(True),p
exec(compile(s,p,"exec"))
"""
ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\0": "\\0"}


# --- minify: spans to drop come from the syntax tree, the rest is copied token by token. Unlike ast.unparse,
# whose output depends on Python's version, this gives the same text everywhere.

class _Spans(ast.NodeVisitor):
    """Spans (start, end, replacement) of what the program does not need to run: docstrings and hints; C source is
    shortened. Hints stay where they are read: class fields, and arguments of decorated functions (kernels)."""

    def __init__(self, source: str) -> None:
        self.source, self.spans = source, []
        self._lines = _lines(source)
        self._starts = [0, *itertools.accumulate(map(len, self._lines))]
        self._in_function = False
        self.visit(ast.parse(source))

    def at(self, line: int, byte: int) -> int:
        """Index in the source of a position of the syntax tree, whose columns count bytes."""
        return self._starts[line - 1] + len(self._lines[line - 1].encode()[:byte].decode())

    def start(self, node: ast.AST) -> int:
        return self.at(node.lineno, node.col_offset)

    def end(self, node: ast.AST) -> int:
        return self.at(node.end_lineno, node.end_col_offset)

    def drop(self, start: int, end: int, replacement: str = "") -> None:
        self.spans.append((start, end, replacement))

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and node.value.lstrip().startswith("#include"):
            text = self.source[self.start(node):self.end(node)]
            if not text.startswith(C_QUOTE):
                raise ValueError(f"line {node.lineno}: expected C source in {C_QUOTE} quotes, found "
                                 f"{text[:8]}")
            self.drop(self.start(node), self.end(node), f'{C_QUOTE}{strip_c(node.value)}"""')

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Nothing inside an f-string changes; older Pythons do not know positions there."""

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._visit_definition(node, in_function=False)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if not node.decorator_list:
            self._drop_hints(node)
        self._visit_definition(node, in_function=True)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if self._in_function and node.value is not None:
            self.drop(self.end(node.target), self.end(node.annotation))
        self.generic_visit(node)

    def _visit_definition(self, node: ast.ClassDef | ast.FunctionDef, in_function: bool) -> None:
        outside, self._in_function = self._in_function, in_function
        self.generic_visit(node)
        self._in_function = outside
        first = node.body[0]
        is_value = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        if is_value and isinstance(first.value.value, str):
            self.drop(self.start(first), self.end(first), "" if len(node.body) > 1 else "pass")

    def _drop_hints(self, node: ast.FunctionDef) -> None:
        args = node.args
        for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg):
            if arg is not None and arg.annotation is not None:
                self.drop(self.start(arg) + len(arg.arg), self.end(arg.annotation))
        if node.returns is not None:
            self.drop(self.source.rindex("->", 0, self.start(node.returns)), self.end(node.returns))


C_QUOTE = 'r"""'
# Operators that two neighbours must not become.
LONG_OPERATORS = {"**", "//", "<<", ">>", "->", ":=", "==", "!=", "<=", ">=", "+=", "-=", "*=", "/=", "%=",
                  "&=", "|=", "^=", "@=", "..."}


def strip_c(source: str) -> str:
    """C source without comments, indentation and blank lines; string and character literals stay as they
    are."""
    literal_or_comment = r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|/\*.*?\*/|//[^\n]*"""
    source = re.sub(literal_or_comment, lambda m: m[1] or " ", source, flags=re.S)
    return "\n".join(line.strip() for line in source.splitlines() if line.strip()) + "\n"


def minify(source: str) -> str:
    """The same program without what _Spans drops, comments and spare blanks. The module's docstring stays:
    --help prints
    it."""
    for start, end, replacement in sorted(_Spans(source).spans, reverse=True):
        source = source[:start] + replacement + source[end:]
    lines, line, depth, starts_line = [], "", 0, True
    for kind, text in _tokens(source):
        if kind == tokenize.INDENT:
            depth += 1
        elif kind == tokenize.DEDENT:
            depth -= 1
        elif kind == tokenize.NEWLINE:
            lines.append(line)
            line, starts_line = "", True
        elif starts_line:
            line, starts_line, previous = " " * depth + text, False, text
        else:
            line += " " * _needs_blank(previous, text) + text
            previous = text
    return "\n".join(lines) + "\n"


def _lines(source: str) -> list[str]:
    return io.StringIO(source).readlines()             # str.splitlines would also cut at other characters


def _tokens(source: str) -> Iterator[tuple[int, str]]:
    """(kind, text) of every token that counts; an f-string is one token, as it was before Python 3.12."""
    lines, depth, begin = _lines(source), 0, (0, 0)
    opening, closing = (getattr(tokenize, name, None) for name in ("FSTRING_START", "FSTRING_END"))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == opening:
            begin, depth = token.start if depth == 0 else begin, depth + 1
        elif token.type == closing:
            depth -= 1
            if depth == 0:
                yield tokenize.STRING, _slice(lines, begin, token.end)
        elif depth == 0 and token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
            yield token.type, token.string


def _slice(lines: list[str], begin: tuple[int, int], end: tuple[int, int]) -> str:
    (first, left), (last, right) = begin, end
    if first == last:
        return lines[first - 1][left:right]
    return lines[first - 1][left:] + "".join(lines[first:last - 1]) + lines[last - 1][:right]


def _needs_blank(left: str, right: str) -> bool:
    """Whether two neighbouring tokens would read as something else without a blank between them."""
    a, b = left[-1], right[0]
    if (a.isalnum() or a == "_") and (b.isalnum() or b == "_"):
        return True
    return a + b in LONG_OPERATORS or left[0].isdigit() and b == "."


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
    """Documents that repeat themselves, in the shard format: enough to train a few steps and to open
    hints."""
    import numpy as np
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    phrase = rng.integers(8, 8192, 40)
    for name, count in (("train", 20_000), ("val", 480), ("val_bytes", 480)):
        if name == "val_bytes":
            values = np.full(count, 3)
        else:
            values = np.where(rng.random(count) < 0.9, np.resize(phrase, count), rng.integers(8, 8192, count))
        values[::97] = 0 if name == "val_bytes" else 1
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, count
        (folder / f"fineweb_{name}_000000.bin").write_bytes(header.tobytes() + values.astype("<u2").tobytes())


# A pipeline with every part of the record's, small enough for seconds.
TOY_SETTINGS = dict(
    RUN_ID="toy", ALLOW_UNVERIFIED=1, ITERATIONS=2, MAX_WALLCLOCK_SECONDS=0, WARMUP_STEPS=0, COMPILE=0,
    NUM_LAYERS=4,
    LOOP_START=1, LOOP_END=1, PARALLEL_START_LAYER=3, MODEL_DIM=32, NUM_HEADS=2, NUM_KV_HEADS=1, ROPE_DIMS=8,
    TRAIN_BATCH_TOKENS=512, TRAIN_SEQ_LEN=64, VAL_BATCH_TOKENS=1024, EVAL_SEQ_LEN=64,
    GPTQ_CALIBRATION_BATCHES=2,
    TTT_EVAL_SEQ_LEN=64, TTT_CHUNK_SIZE=32, TTT_BATCH_SIZE=2, TTT_LORA_RANK=4, PHASED_TTT_PREFIX_DOCS=2,
    GLOBAL_TTT_CHUNK_TOKENS=64, TOKEN_ORDER=4)
NUMBERS = re.compile(r"\d+/\d+ train_loss: \S+|Serialized model.*|artifact written.*|.*val_loss:\S+ "
                     r"val_bpb:\S+"
                     r"|ngram_tilt:hints.*|ttt_phased:.*")


# What Python and a C compiler need of the caller's environment. Settings stay outside: toy runs have their own.
KEPT_VARIABLES = "PATH", "HOME", "TMPDIR", "CC", "LD_LIBRARY_PATH", "PYTHONPATH"


def toy_environment(**settings: object) -> dict[str, str]:
    """The environment of a toy run: on the CPU, with these settings only."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": 1, **settings}
    return kept | {name: str(value) for name, value in settings.items()}


def run_pipeline(script: Path, folder: Path) -> tuple[str, list[str]]:
    """(--help, every number of a whole toy run) of a script, started from another folder; RuntimeError if it
    fails."""
    environment = toy_environment(**TOY_SETTINGS, DATA_PATH=folder.parent / "data",
                                  TOKENIZER_PATH=REPO / "tokenizers" / "caseops_8192.model")
    folder.mkdir()
    outputs = []
    for arguments in (["--help"], []):
        done = subprocess.run([sys.executable, str(script), *arguments], cwd=folder, text=True,
                              capture_output=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{script} fails: {(done.stderr or done.stdout).strip()[-2000:]}")
        outputs.append(done.stdout)
    return outputs[0], [match[0] for line in outputs[1].splitlines() if (match := NUMBERS.match(line))]


def differences(packed: tuple[str, list[str]], readable: tuple[str, list[str]]) -> list[str]:
    """What differs between two results of run_pipeline, in sentences."""
    (packed_help, found), (readable_help, expected) = packed, readable
    told = ["--help differs"] if packed_help != readable_help else []
    if len(expected) < 10:
        told.append(f"expected a whole run, found only {expected}")
    return told + [f"packed: {a}, readable: {b}" for a, b in itertools.zip_longest(found, expected) if a != b]


def compare(packed: Path, readable: Path) -> list[str]:
    """Train, quantize, restore and score with both scripts. Returns what differs, in sentences."""
    with tempfile.TemporaryDirectory(prefix="train_gpt_check_") as work:
        write_toy_shards(Path(work) / "data")
        try:
            return differences(run_pipeline(packed, Path(work) / "packed"),
                               run_pipeline(readable, Path(work) / "readable"))
        except RuntimeError as error:
            return [str(error)]


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
    except (NotADirectoryError, PermissionError) as error:
        print(f"error: {folder}: {error.strerror}; name a folder that can be made", file=sys.stderr)
        return 2
    found = compare((folder / "train_gpt.py").resolve(), REPO / "train_gpt.py")
    print(f"pack folder:{folder} code_bytes:{code_bytes} same_program:{int(not found)}")
    for difference in found:
        print(f"error: {difference}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
