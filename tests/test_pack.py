"""The packed script: what is dropped, what stays, that it is the same program, and that every Python packs it
alike."""
import ast
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


def add(a: int, b: int) -> int:
    \"\"\"Dropped.\"\"\"
    total: int = a + b        # a comment
    return total


if __name__ == "__main__":
    print(__doc__, add(1, 2), Pair(1), sys.argv[1:], "int f" in C)
"""


@pytest.mark.parametrize("data", ids=range(5), argvalues=(
    b"\\05", b"\x00\x00" + b"07", b"\\\x00" + b"1", bytes(range(256)) * 2,
    np.random.default_rng(0).integers(0, 256, 200_000, np.uint8).tobytes()))
def test_any_bytes_survive_as_a_literal(data, tmp_path):
    script = tmp_path / "literal.py"
    script.write_bytes(('#coding:latin1\nimport sys\nsys.stdout.buffer.write("%s".encode("latin1"))'
                        % pack.as_literal(data)).encode("latin1"))
    assert subprocess.run([sys.executable, str(script)], capture_output=True).stdout == data


def test_minified_script_keeps_fields_and_drops_docstrings_and_hints():
    small = pack.minify(SCRIPT)
    assert "Kept" in small and "first:int" in small and "int f(void)" in small
    assert not any(word in small for word in ("Dropped", "comment", "total:int", "b:int"))
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


def test_training_script_keeps_its_size_limit(repo):
    source = (repo / "train_gpt.py").read_text(encoding="utf-8")
    assert len(pack.pack_script(source)) <= 65_000        # the block kernels alone take 10,000


def test_run_counts_the_packed_script(repo):
    packed = pack.pack_script((repo / "train_gpt.py").read_text(encoding="utf-8"))
    assert (gpt.shipped_code().form, gpt.shipped_code().num_bytes) == ("packed", len(packed))


# Minifying

class WithoutDropped(ast.NodeTransformer):
    """A syntax tree without docstrings and hints in functions; of C source only what is not a blank."""

    def visit_FunctionDef(self, node):
        if not node.decorator_list:
            node.returns = None
            for arg in ast.walk(node.args):
                if isinstance(arg, ast.arg):
                    arg.annotation = None
        for parent in ast.walk(node):
            for field in ("body", "orelse"):
                if isinstance(getattr(parent, field, None), list) and not isinstance(parent, ast.ClassDef):
                    setattr(parent, field, list(map(without_hint, getattr(parent, field))))
        return self.visit_definitions(node)

    def visit_definitions(self, node):
        self.generic_visit(node)
        if not isinstance(node, ast.Module) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node

    visit_ClassDef = visit_Module = visit_definitions

    def visit_Constant(self, node):
        if isinstance(node.value, str) and node.value.lstrip().startswith("#include"):
            return ast.Constant("".join(pack.strip_c(node.value).split()))
        return node


def without_hint(statement):
    if isinstance(statement, ast.AnnAssign) and statement.value is not None:
        return ast.Assign([statement.target], statement.value)
    return statement


AWKWARD = '''#!/usr/bin/env python3
"""Kept."""
import dataclasses


@dataclasses.dataclass
class A:
    x: int = 1            # é, a comment after a character of two bytes


def f(a: int, /, *args: "str", b: dict[str, int] = {"é": 1}, **more: float) -> tuple[int, ...]:
    """Dropped."""
    é: int = 3; total: int = a if b else -a
    text = f"{a!r:>{10}} {{#}} {b['é'] if b else ''} {a:{'x' if a else ''}}"  f"""{total
      + 1} "quoted" # not a comment
    """
    for k in (1, 2):
        if k not in(1, ) :
            z: int = 1
            return (1 .real, 1. , 0xF or 2 in [1], a<-a, a ** -1, not a)[0]
    def inner(q: int) -> None: "dropped too"
    class B:
        y: int = 2
    return lambda *a, **k: (a, k), text, a \\
        + 1


print(f(1)[1:], A())
'''


@pytest.mark.parametrize("which", ["awkward", "train_gpt.py", "lossless_caps.py", "prepare_caseops_data.py"])
def test_minifying_changes_nothing_but_what_is_dropped(repo, which):
    source = AWKWARD if which == "awkward" else (repo / which).read_text(encoding="utf-8")
    small = pack.minify(source)
    before, after = (ast.dump(WithoutDropped().visit(ast.parse(text))) for text in (source, small))
    assert before == after
    assert len(small) < 0.9 * len(source)


def test_c_keeps_its_literals_and_loses_its_comments():
    source = ('#include <a.h>\n/* a\n b */ char *s = "// kept /* kept */", c = \'"\';  // gone\n\n'
              '  int x = a /* gap */ / b;\n')
    assert pack.strip_c(source).split() == (
        '#include <a.h> char *s = "// kept /* kept */", c = \'"\'; int x = a / b;').split()


def pythons():
    """Every Python from 3.10 to 3.13 that is found here, on the path or under pyenv."""
    found = {sys.executable}
    for minor in range(10, 14):
        on_path = shutil.which(f"python3.{minor}")
        found |= {on_path} if on_path else set()
        versions = gpt.Path.home() / ".pyenv" / "versions"
        found |= {str(path) for path in versions.glob(f"3.{minor}.*/bin/python")}
    return sorted(path for path in found
                  if subprocess.run([path, "-c", "import lzma"], capture_output=True).returncode == 0)


def test_every_python_packs_the_same_bytes_and_compiles_them(repo, tmp_path):
    """What is counted is what ships, whichever Python packs it; the program's text is valid for all of
    them."""
    source = (repo / "train_gpt.py").read_text(encoding="utf-8")
    packed, small = pack.pack_script(source), tmp_path / "small.py"
    small.write_text(pack.minify(source), encoding="utf-8")
    script = ("import hashlib, pathlib, sys, pack\n"
              "packed = pack.pack_script(pathlib.Path('train_gpt.py').read_text(encoding='utf-8'))\n"
              "compile(pathlib.Path(sys.argv[1]).read_text(encoding='utf-8'), 'x', 'exec')\n"
              "print(len(packed), hashlib.sha256(packed).hexdigest())")
    compile(small.read_text(encoding="utf-8"), "x", "exec")
    for python in pythons():
        if python != sys.executable:
            done = subprocess.run([python, "-B", "-c", script, str(small)], cwd=repo, text=True, capture_output=True)
            assert done.stdout == f"{len(packed)} {hashlib.sha256(packed).hexdigest()}\n", (python, done.stderr)


def test_a_margin_is_left_for_another_release_of_the_compressor(monkeypatch, capsys):
    limits = []
    monkeypatch.setattr(gpt, "fit_artifact", lambda *args: limits.append(args[-1]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpt.write_artifact(gpt.Config(), gpt.Run(gpt.Config()), None, None)
    assert limits[0] + gpt.shipped_code().num_bytes == gpt.SIZE_LIMIT - gpt.CODE_MARGIN
    assert "artifact code_form:packed\n" in capsys.readouterr().out


# The packed program

SOURCE_READER = """
import inspect, pathlib, sys, tempfile
REPO = pathlib.Path(__file__).resolve().parent
def kernel(x):
    return x + 1
if __name__ == "__main__":
    print(inspect.getsource(kernel), REPO, list(pathlib.Path(tempfile.gettempdir()).iterdir()))
    sys.stdout.flush()
    if sys.argv[1:]:
        import time; time.sleep(60)
"""


def test_packed_script_finds_its_folder_and_its_source_and_writes_nothing(tmp_path):
    """inspect.getsource is how Triton reads kernels; the folder is where tokenizers and data are looked
    for."""
    packed, temporary = tmp_path / "folder" / "p.py", tmp_path / "temporary"
    packed.parent.mkdir()
    temporary.mkdir()
    packed.write_bytes(pack.pack_script(SOURCE_READER))
    env = {**os.environ, "TMPDIR": str(temporary)}
    for python in pythons():
        done = subprocess.run([python, str(packed)], capture_output=True, text=True, env=env, cwd="/")
        assert done.stdout == f"def kernel(x):\n return x+1\n {packed.parent} []\n", done.stderr
    command = [sys.executable, str(packed), "wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as waiting:
        assert waiting.stdout.readline()
        waiting.send_signal(signal.SIGKILL)
    assert not list(temporary.iterdir())


TRITON_SCRIPT = """
import torch, triton, triton.language as tl
@triton.jit
def add_one(x_ptr, n, BLOCK: tl.constexpr):
    \\"\\"\\"Dropped.\\"\\"\\"
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)   # a comment
    tl.store(x_ptr + at, tl.load(x_ptr + at, mask=at < n) + 1, mask=at < n)
x = torch.zeros(5)
add_one[(1,)](x, 5, BLOCK=8)
compiled = torch.compile(lambda x: x * 2 + 1, fullgraph=True, backend="eager")
print(x.tolist(), compiled(x).tolist())
"""


def test_packed_triton_kernels_and_compiled_functions_run(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "p.py").write_bytes(pack.pack_script(TRITON_SCRIPT.replace('\\', '')))
    done = subprocess.run([sys.executable, tmp_path / "p.py"], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.stdout == f"{[1.0] * 5} {[3.0] * 5}\n", done.stderr


def whole_runs() -> dict[str, tuple[str, list[str]]]:
    """What toy runs of the readable, of the packed and of a wrongly packed script give, by name."""
    readable, line = gpt.REPO / "train_gpt.py", "hint[k] = top;"
    source, strip_c = readable.read_text(encoding="utf-8"), pack.strip_c
    assert line in source
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pack.write_toy_shards(folder / "data")
        (folder / "packed.py").write_bytes(pack.pack_script(source))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pack, "strip_c", lambda text: strip_c(text).replace(line, ";"))
            (folder / "broken.py").write_bytes(pack.pack_script(source))
        scripts = {"readable": readable, "packed": folder / "packed.py", "broken": folder / "broken.py"}
        with ThreadPoolExecutor(2) as pool:
            runs = pool.map(lambda name: pack.run_pipeline(scripts[name], folder / name), scripts)
            return dict(zip(scripts, runs))


@pytest.mark.slow
@pytest.mark.early(work=whole_runs)
def test_packed_training_script_is_the_same_program(early):
    """Both train, quantize, restore and score the same, down to the artifact's hash."""
    runs = early(whole_runs)
    assert pack.differences(runs["packed"], runs["readable"]) == []


@pytest.mark.slow
@pytest.mark.early(work=whole_runs)
def test_a_c_source_that_packing_breaks_is_noticed(early):
    """Without one of its lines the hint counter still compiles; only a run that uses hints can tell."""
    runs = early(whole_runs)
    found = pack.differences(runs["broken"], runs["readable"])
    assert any("ngram_tilt:hints" in difference for difference in found)


def test_settings_of_the_caller_do_not_reach_the_toy_runs(tmp_path, monkeypatch):
    script, settings = tmp_path / "script.py", {"CHECKPOINT_DIR", "NGRAM_TILT_ENABLED", "PREQUANT_ONLY", "TTT_ENABLED"}
    for name in settings:
        monkeypatch.setenv(name, "0")
    script.write_text("import os; print(*os.environ)\n")
    names = set(pack.run_pipeline(script, tmp_path / "run")[0].split())
    assert {"PATH", "ITERATIONS", "DATA_PATH"} <= names and not names & settings


@pytest.mark.parametrize("found", [[], ["packed: 1, readable: 2"]])
def test_a_packed_script_that_is_another_program_fails(tmp_path, monkeypatch, capsys, found):
    compared = []
    monkeypatch.setattr(pack, "compare", lambda *scripts: compared.append(scripts) or found)
    assert pack.main([str(tmp_path / "new")]) == len(found)
    assert compared == [(tmp_path / "new" / "train_gpt.py", gpt.REPO / "train_gpt.py")]
    shown = capsys.readouterr()
    assert f"same_program:{int(not found)}" in shown.out and shown.err == "".join(f"error: {line}\n" for line in found)


def test_existing_folder_is_refused(tmp_path, capsys):
    assert pack.main([str(tmp_path)]) == 2
    assert "exists; name a new folder" in capsys.readouterr().err
