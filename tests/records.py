"""Recorded CaseOps vectors (gzipped JSON Lines)."""
import gzip
import json
from pathlib import Path

import pytest


def records(vectors_dir: Path, name: str) -> list[dict]:
    path = vectors_dir / name
    if not path.is_file():
        pytest.skip(f"no {name} in {vectors_dir}; set VECTORS_DIR")
    with gzip.open(path, "rt", encoding="ascii") as lines:
        return [json.loads(line) for line in lines]
