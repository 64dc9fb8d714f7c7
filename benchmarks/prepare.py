"""Print the speed of each preparation stage, one process, in MB of original UTF-8 text per second.

    python benchmarks/prepare.py --docs FILE [--sp MODEL] [--megabytes N]

`library` lines ask SentencePiece about whole documents, as earlier preparations do. The stages `train`
and `val` are whole preparation: reading, JSON, encoding and, for val, the byte sidecar.
"""
import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import sentencepiece

import lossless_caps
import prepare_caseops_data as prepare
from caseops_encoder import DocumentEncoder, ModelFile, Tokenizer, encode_document


def read_texts(docs: Path, megabytes: float) -> list[str]:
    texts, size = [], 0
    for text in prepare.training_documents(docs, 0):
        texts.append(text)
        size += len(text.encode("utf-8"))
        if size >= megabytes * 1e6:
            break
    return texts


def report(stage: str, work: Callable[[], object], megabytes: float, repeats: int = 1) -> None:
    """Run `work` and print the best of its speeds, by CPU time and by wall clock."""
    cpu_s, wall_s = [], []
    for _ in range(repeats):
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        cpu_s.append(time.process_time() - cpu)
        wall_s.append(time.perf_counter() - wall)
    print(f"prepare stage:{stage} cpu_mb_per_s:{megabytes / min(cpu_s):.2f} "
          f"wall_mb_per_s:{megabytes / min(wall_s):.2f}",
          flush=True)


def whole(docs: Path, split: str, model: Path) -> None:
    """Prepare every document of `docs` for one split into a directory that is then removed."""
    with tempfile.TemporaryDirectory() as out:
        prepare.build(docs, Path(out), model, val_docs=2**31 if split == "val" else 0, show_progress=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, required=True, help="JSON Lines with a field `text`, also .gz or .xz")
    parser.add_argument("--sp", type=Path, default=prepare.SHIPPED_TOKENIZER)
    parser.add_argument("--megabytes", type=float, default=20.0)
    options = parser.parse_args()
    try:
        measure(options)
    except prepare.PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def measure(options: argparse.Namespace) -> None:
    texts = read_texts(options.docs, options.megabytes)
    size = sum(len(text.encode("utf-8")) for text in texts) / 1e6
    few = texts[:len(texts) // 5]
    few_size = sum(len(text.encode("utf-8")) for text in few) / 1e6
    caseops = [lossless_caps.encode(text) for text in texts]
    tokenizer = Tokenizer(ModelFile.read(options.sp))
    print(f"prepare documents:{len(texts)} text_mb:{size:.1f} python:{platform.python_version()} "
          f"sentencepiece:{sentencepiece.__version__} alignment:{tokenizer.alignment}")

    report("transform_forward", lambda: [lossless_caps.encode(text) for text in texts], size, 3)
    report("transform_inverse_strict", lambda: [lossless_caps.decode(text) for text in caseops], size, 3)
    report("byte_weights", lambda: [lossless_caps.byte_weights(text) for text in caseops], size)
    report("library_ids", lambda: [tokenizer.ids(lossless_caps.encode(text)) for text in few], few_size)
    report("library_ids_and_bytes", lambda: [encode_document(tokenizer, text) for text in few], few_size)
    encoder = DocumentEncoder(tokenizer)
    if encoder.reason:
        print(f'prepare encoder:library reason:"{encoder.reason}"')
    report("encoder_cold", lambda: [encoder.encode(text) for text in texts], size)
    report("encoder_warm", lambda: [encoder.encode(text) for text in texts], size)

    with tempfile.TemporaryDirectory() as folder:
        docs = Path(folder) / "docs.jsonl"
        with open(docs, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        report("train", lambda: whole(docs, "train", options.sp), size, 2)
        report("val", lambda: whole(docs, "val", options.sp), size, 2)


if __name__ == "__main__":
    sys.exit(main())
