#!/usr/bin/env python3
"""The whole pipeline in minutes on a CPU, on text that every Python carries: `./run.sh demo`.

    corpus -> tokenizer -> shards -> train -> average -> quantize -> artifact -> restore -> score, TTT and tilt on/off

The corpus is pydoc's language reference and the standard library's docstrings, one document per topic or module.
The model has the record model's architecture (layers, loops, lanes, gates) at a small width. Everything is written
to demo_out/, which is emptied first; DEMO_SECONDS sets the training time (default 65, at least 30).

    python demo.py corpus DIR [--docs FILE]     shards for ./run.sh proxy, made with the shipped tokenizer

The proxy's corpus is the same text and the docstrings of every installed package, or the documents of a JSON Lines
file. It is small, so a run reads it many times: good for trying whether something works and how fast, not for scores.
"""
from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

REPO = Path(__file__).resolve().parent
OUT = REPO / "demo_out"
VOCAB_SIZE = 2048
MAX_DOC_BYTES, MIN_DOC_BYTES = 8_000, 400
VAL_BYTES = 30_000           # about 10,000 tokens
DEFAULT_SECONDS, LEAST_SECONDS = 65.0, 30.0       # calibration alone can take 15 s on a busy CPU
PROXY_VAL_BYTES = 1_500_000  # about 450,000 tokens
# Only the time left uses these: what follows training, in tokens of training, and a first guess of the speed.
WORK_AFTER_TRAINING, TOKENS_PER_SECOND = 85_000, 2000.0

# The architecture of the record run at a width that two CPU cores can train.
MODEL = dict(VOCAB_SIZE=VOCAB_SIZE, MODEL_DIM=128, NUM_HEADS=4, NUM_KV_HEADS=2)
TRAINING = dict(TRAIN_BATCH_TOKENS=8 * 256, TRAIN_SEQ_LEN=256, MAX_WALLCLOCK_SECONDS=DEFAULT_SECONDS,
                GPTQ_RESERVE_SECONDS=4, GPTQ_CALIBRATION_BATCHES=16, WARMUP_STEPS=0, MUON_MOMENTUM_WARMUP_STEPS=50,
                EMA_DECAY=0.9, TIED_EMBED_INIT_STD=0.02)
SCORING = dict(TTT_CHUNK_SIZE=160, TTT_BATCH_SIZE=4, TTT_LORA_LR=1e-3, TTT_LORA_RANK=16, PHASED_TTT_PREFIX_DOCS=4)
SETTINGS = dict(RUN_ID="demo", COMPILE=0, DATA_PATH="shards", **MODEL, **TRAINING, **SCORING)


# --- corpus -------------------------------------------------------------------------------------------------

def language_topics() -> dict[str, str]:
    """pydoc's topics: the sections of the language reference, by name."""
    from pydoc_data.topics import topics
    return {f"topic:{name}": text for name, text in topics.items()}


def docstrings(source: bytes) -> str:
    """Every docstring of a module, in order, each under the name of what it describes. Nothing is imported."""
    def walk(node: ast.AST, prefix: str) -> Iterator[str]:
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                name = f"{prefix}{child.name}"
                if text := ast.get_docstring(child):
                    yield f"{name}\n\n{text}"
                yield from walk(child, f"{name}.")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")              # other people's escape sequences
        tree = ast.parse(source)
    return "\n\n".join(filter(None, [ast.get_docstring(tree), *walk(tree, "")]))


def library_modules(library: Path) -> dict[str, str]:
    """Docstrings of the standard library below `library`, by module; tests and installed packages are left out."""
    found = {}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if parts[0] in sys.stdlib_module_names and not {"test", "tests", "idlelib", "lib2to3"} & set(parts):
            try:
                found["module:" + ".".join(parts)] = docstrings(path.read_bytes())
            except (SyntaxError, ValueError):            # a few files are templates, or kept broken for tests
                continue
    return found


def file_docstrings(path: Path) -> str:
    """docstrings of a file; "" for one that cannot be read or parsed."""
    with contextlib.suppress(SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return docstrings(path.read_bytes())
    return ""


def package_modules(folders: Iterable[Path]) -> dict[str, str]:
    """Docstrings of the installed packages in `folders`, by module; tests are left out. Nothing is imported."""
    paths = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if not {"test", "tests", "testing"} & set(parts):
                paths["package:" + ".".join(parts)] = path
    with ProcessPoolExecutor() as pool:                  # machines with GPUs hold gigabytes of packages
        texts = pool.map(file_docstrings, paths.values(), chunksize=64)
        return {name: text for name, text in zip(paths, texts) if text}


def cut(text: str, limit: int = MAX_DOC_BYTES) -> str:
    """The longest prefix of `text` of at most `limit` bytes of UTF-8."""
    return text.encode("utf-8", "ignore")[:limit].decode("utf-8", "ignore")


def make_documents(texts: dict[str, str]) -> dict[str, str]:
    """Documents in a fixed shuffled order. Topics repeat each other's sections: a paragraph counts where it is first.

    Thus no paragraph of a validation document is in the training part.
    """
    seen: set[str] = set()
    documents = {}
    for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest()):
        kept = []
        for paragraph in re.split(r"\n\s*\n", texts[name].strip()):
            if paragraph not in seen:
                seen.add(paragraph)
                kept.append(paragraph)
        text = cut("\n\n".join(kept)).strip()
        if len(text.encode()) >= MIN_DOC_BYTES:
            documents[name] = text
    return documents


def split(documents: dict[str, str], val_bytes: int = VAL_BYTES) -> tuple[list[str], list[str]]:
    """(validation, training) texts: the first documents that hold val_bytes, and the rest."""
    validation, training, size = [], [], 0
    for text in documents.values():
        (validation if size < val_bytes else training).append(text)
        size += len(text.encode())
    return validation, training


class Corpus(NamedTuple):
    manifest: dict
    train_bytes: int
    longest: int                 # tokens of the longest validation document, with the BOS after it


def prepare(out: Path) -> Corpus:
    """Write documents, a tokenizer trained on the training part only, shards, sidecar and manifest."""
    import prepare_caseops_data as prepare_data
    validation, training = split(make_documents(language_topics() | library_modules(
        Path(sysconfig.get_paths()["stdlib"]))))
    with open(out / "docs.jsonl", "w", encoding="utf-8") as file:
        for text in validation + training:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    # The trainer leaves out texts above 4,192 bytes, so it gets paragraphs.
    paragraphs = (paragraph for text in training for paragraph in text.split("\n\n"))
    model = out / f"caseops_{VOCAB_SIZE}.model"
    prepare_data.write_tokenizer(model, prepare_data.train_tokenizer(paragraphs, VOCAB_SIZE))
    manifest = prepare_data.build(out / "docs.jsonl", out / "shards", model, val_docs=len(validation),
                                  show_progress=False)
    tokens = np.fromfile(out / "shards" / "fineweb_val_000000.bin", "<u2", offset=prepare_data.HEADER_BYTES)
    lengths = np.diff(np.flatnonzero(tokens == prepare_data.BOS_ID), append=len(tokens))
    return Corpus(manifest, sum(len(text.encode()) for text in training), int(lengths.max()) + 1)


def write_proxy(out: Path, docs: Path | None) -> dict:
    """Shards for a run on a GPU at the record's shapes, from `docs` or from what is installed; returns the manifest.

    Those from what is installed are kept, and known by a file beside the manifest; a file's are made again."""
    import prepare_caseops_data as prepare_data
    is_installed = docs is None
    note = out / "of_installed_packages"
    if is_installed and note.exists() and (out / "manifest.json").exists():
        return json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    with contextlib.ExitStack() as stack:
        if docs is not None:
            source = prepare_data.DocumentFile(docs)
            val_docs = max(1, min(500, sum(1 for _ in source.lines()) // 20))
            source.close()
        else:
            paths = {Path(sysconfig.get_paths()[name]) for name in ("purelib", "platlib")}
            texts = language_topics() | library_modules(Path(sysconfig.get_paths()["stdlib"])) | package_modules(
                sorted(paths))
            validation, training = split(make_documents(texts), PROXY_VAL_BYTES)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="proxy_"))
            docs, val_docs = Path(folder) / "docs.jsonl", len(validation)
            with open(docs, "w", encoding="utf-8") as file:
                for text in validation + training:
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        out.parent.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        manifest = prepare_data.build(docs, out, val_docs=val_docs, overwrite=out.exists())
    if is_installed:
        note.touch()
    return manifest


def context_settings(corpus: Corpus) -> dict[str, int]:
    """Windows that hold the longest document and an evaluation row that holds all.

    Plain scores and TTT scores then give every token the same context, so their difference is what TTT did.
    """
    rows = -(-corpus.manifest["val"]["tokens"] // corpus.longest)
    return dict(EVAL_SEQ_LEN=corpus.longest, VAL_BATCH_TOKENS=8 * rows * corpus.longest,
                TTT_EVAL_SEQ_LEN=corpus.longest, GLOBAL_TTT_CHUNK_TOKENS=corpus.longest)


# --- running train_gpt.py -----------------------------------------------------------------------------------

class Progress:
    """One line that says what is going on and about how long the rest will take; rewritten in place on a terminal."""

    def __init__(self, total_s: float) -> None:
        self.start, self.end, self.shown = time.monotonic(), time.monotonic() + total_s, 0.0
        self.is_terminal = sys.stdout.isatty()

    def expect(self, left_s: float) -> None:
        self.end = time.monotonic() + left_s

    def show(self, text: str) -> None:
        now = time.monotonic()
        if now - self.shown < (0.5 if self.is_terminal else 10):
            return
        self.shown = now
        line = f"[{now - self.start:4.0f} s, about {max(self.end - now, 1):3.0f} s left] {text}"
        print(f"\r{line[:100]:<100}" if self.is_terminal else line, end="" if self.is_terminal else "\n", flush=True)

    def stage(self, text: str) -> None:
        """A line that stays."""
        if self.is_terminal:
            print(f"\r{'':<100}\r", end="")
        self.shown = 0.0
        print(f"[{time.monotonic() - self.start:4.0f} s] {text}", flush=True)


def run_script(progress: Progress, stage: str, left_s: float, **settings: object) -> list[str]:
    """Run train_gpt.py with SETTINGS and `settings`; returns its log lines. Exits with its messages if it fails."""
    # Threads that spin long while they wait slow everything down many times when other programs use the processor;
    # those that sleep at once halve the speed of a quiet one.
    env = {"GOMP_SPINCOUNT": "10000"} | os.environ | {n: str(value) for n, value in (SETTINGS | settings).items()}
    process = subprocess.Popen([sys.executable, str(REPO / "train_gpt.py")], cwd=OUT, env=env, text=True,
                               encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    progress.expect(left_s)
    lines, doing = [], stage
    try:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if match := re.match(r"(\d+/\d+ train_loss: \S+|layer_loop:enabled step:\d+|GPTQ:collected|diagnostic [a-z -]+"
                                 r"|ttt batch:\S+ bpb:\S+)", lines[-1]):
                doing = f"{stage}: {match[1].strip()}"
            elif match := re.match(r"train speed .*loops_on_tok_per_s:(\d+)", lines[-1]):
                progress.expect(20 + WORK_AFTER_TRAINING / float(match[1]))
            progress.show(doing)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if process.wait():
        print("\n".join(["", *lines[-15:]]))
        sys.exit(f"error: train_gpt.py failed in stage '{stage}' (exit code {process.returncode}); its log is in "
                 f"{OUT.name}/logs")
    return lines


def find(pattern: str, lines: list[str]) -> str:
    """Group 1 of the last line that matches."""
    return next(m[1] for line in reversed(lines) if (m := re.search(pattern, line)))


# --- main ---------------------------------------------------------------------------------------------------

def train_seconds(text: str) -> float:
    """DEMO_SECONDS as a number; ValueError with a sentence when it is none or too small for a step and calibration."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not LEAST_SECONDS <= seconds <= 86_400:
        raise ValueError(f"DEMO_SECONDS={text}: expected seconds of training, {LEAST_SECONDS:g} to 86400")
    return seconds


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND")
    corpus = commands.add_parser("corpus", help="write the shards of ./run.sh proxy")
    corpus.add_argument("folder", metavar="DIR", type=Path)
    corpus.add_argument("--docs", metavar="FILE", type=Path, help="JSON Lines with a field `text` instead")
    corpus.add_argument("--base", metavar="DIR", type=Path, default=Path(), help="where FILE is looked for")
    try:
        options = parser.parse_args(argv)
        seconds = train_seconds(os.environ.get("DEMO_SECONDS", f"{DEFAULT_SECONDS:g}"))
    except SystemExit as stop:
        return stop.code or 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        if "folder" in options:
            from caseops_encoder import PrepareError

            try:
                manifest = write_proxy(options.folder, options.docs and options.base / options.docs)
            except PrepareError as error:
                print(f"error: {error}", file=sys.stderr)
                return error.exit_code
            except (FileExistsError, NotADirectoryError, PermissionError) as error:
                print(f"error: {error.filename}: {error.strerror}; name a folder that can be made", file=sys.stderr)
                return 2
            print(f"proxy folder:{options.folder} train_tokens:{manifest['train']['tokens']} "
                  f"val_tokens:{manifest['val']['tokens']}")
            return 0
        return run_demo(seconds)
    except KeyboardInterrupt:
        print("\nerror: interrupted; demo_out/ holds what was done", file=sys.stderr)
        return 130


def run_demo(seconds: float) -> int:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    after_training_s = 20 + WORK_AFTER_TRAINING / TOKENS_PER_SECOND
    progress = Progress(10 + seconds + after_training_s)
    times: list[tuple[str, float]] = []
    mark = time.monotonic()

    def done(stage: str) -> None:
        nonlocal mark
        times.append((stage, time.monotonic() - mark))
        mark = time.monotonic()

    progress.stage("corpus, tokenizer and shards from Python's own documentation")
    corpus = prepare(OUT)
    done("corpus, tokenizer, shards")
    progress.stage(f"train {seconds:.0f} s, quantize, restore, score with TTT and tilt")
    context = context_settings(corpus) | {"MAX_WALLCLOCK_SECONDS": seconds}
    main_run = run_script(progress, "train", 5 + seconds + after_training_s, **context)
    done("train, quantize, score")
    shutil.copy(OUT / "logs" / "demo.txt", OUT / "train_log.txt")        # the runs below go on in the same log
    ttt_s = float(find(r"^total_eval_time:([\d.]+)s", main_run))
    progress.stage("score the artifact again: TTT on, tilt off")
    no_tilt = run_script(progress, "TTT, no tilt", 20 + 1.1 * ttt_s, **context, TTT_EVAL_ONLY=1,
                         NGRAM_TILT_ENABLED=0)
    done("score: TTT, no tilt")
    progress.stage("score the artifact again: TTT off, tilt on")
    # Adapters that never move change nothing, so whole documents can be scored at once.
    no_ttt = run_script(progress, "tilt, no TTT", 10, **context, TTT_EVAL_ONLY=1, TTT_LORA_LR=0,
                        PHASED_TTT_PREFIX_DOCS=0, TTT_CHUNK_SIZE=corpus.longest - 1)
    done("score: tilt, no TTT")
    code = report(corpus, main_run, no_tilt, no_ttt, times)
    print(draw_pictures(OUT / "train_log.txt", OUT / "report.html"))
    return code


def draw_pictures(log: Path, page: Path) -> str:
    """Make the page of `report.py html` and say where it is, or what is missing for it."""
    try:
        import pictures
        from report import record_table
    except ImportError as error:
        return f"no pictures ({error}): python3 -m pip install -r requirements-report.txt"
    import runlog
    runs = runlog.read_runs(log)
    written = pictures.write_page(page, runs, parts=[("Results", record_table(runs))])
    return f"pictures: {page.relative_to(REPO)} and {len(written) - 1} PNG files in {page.with_suffix('').relative_to(REPO)}/"


def report(corpus: Corpus, main_run: list[str], no_tilt: list[str], no_ttt: list[str],
           times: list[tuple[str, float]]) -> int:
    """Print the table; returns 1 unless test-time training lowered the score, with and without tilt."""
    manifest, ttt = corpus.manifest, r"^quantized_ttt_phased .*val_bpb:(\S+)"
    before = float(find(r"^diagnostic pre-quantization post-ema .*val_bpb:(\S+)", main_run))
    plain = float(find(r"^diagnostic quantized .*val_bpb:(\S+)", main_run))
    both, ttt_only, tilt_only = (float(find(ttt, lines)) for lines in (main_run, no_tilt, no_ttt))
    rows = [
        ("training documents", f"{manifest['docs_train']:,}", f"{corpus.train_bytes:,} bytes"),
        ("validation documents", f"{manifest['docs_val']:,}",
         f"{manifest['val']['original_bytes']:,} bytes, {manifest['val']['tokens']:,} tokens"),
        ("parameters", f"{int(find(r'^model_params:(.+)', main_run)):,}", ""),
        ("training steps", find(r"^train speed .*steps:(\d+)", main_run), ""),
        ("BPB before quantization", f"{before:.4f}", ""),
        ("BPB after quantization", f"{plain:.4f}", f"{plain - before:+.4f}"),
        ("  with tilt", f"{tilt_only:.4f}", f"{tilt_only - plain:+.4f}"),
        ("BPB with TTT", f"{ttt_only:.4f}", f"{ttt_only - plain:+.4f} from TTT"),
        ("  with TTT and tilt", f"{both:.4f}", f"{both - tilt_only:+.4f} from TTT, {both - ttt_only:+.4f} from tilt"),
        ("artifact bytes", f"{int(find(r'^Serialized model quantized.*: (.+) bytes', main_run)):,}", ""),
        *((f"time: {stage}", f"{seconds:.1f} s", "") for stage, seconds in times),
        ("time: total", f"{sum(seconds for _, seconds in times):.1f} s", "")]
    print()
    for name, value, note in rows:
        print(f"{name:<34}{value:>12}   {note}".rstrip())
    has_helped = ttt_only < plain and both < tilt_only
    print("\ntest-time training lowered the score" if has_helped else
          "\nerror: test-time training did not lower the score", flush=True)
    return 0 if has_helped else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
