"""Download of the published export, by the real hub client against a small server on loopback."""
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import prepare_caseops_data as prepare

pytest.importorskip("huggingface_hub", reason="download needs huggingface_hub")

REPO_ID = "someone/tiny-caseops"
COMMIT = "c" * 40
PREFIX = f"datasets/datasets/{prepare.PUBLISHED_NAME}"


class Hub(ThreadingHTTPServer):
    """The few endpoints that the client uses, for one dataset repository held in memory."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.hold(files)

    def hold(self, files: dict[str, bytes]) -> None:
        """Begin anew with these files."""
        self.files = files
        self.stated_sha256: dict[str, str] = {}       # instead of the true ones
        self.stated_sizes: dict[str, int] = {}
        self.breaks: dict[str, list[int]] = {}        # path -> bytes after which its next connections break
        self.served: list[tuple[str, int]] = []       # (path, first byte) of each GET of a file

    def sha256(self, path: str) -> str:
        return self.stated_sha256.get(path, hashlib.sha256(self.files[path]).hexdigest())

    def size(self, path: str) -> int:
        return self.stated_sizes.get(path, len(self.files[path]))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        if path.startswith(f"/api/datasets/{REPO_ID}/revision/"):
            siblings = [{"rfilename": name, "size": hub.size(name), "blobId": "b" * 40,
                         "lfs": {"sha256": hub.sha256(name), "size": hub.size(name), "pointerSize": 134}}
                        for name in hub.files]
            info = {"id": REPO_ID, "sha": COMMIT, "siblings": siblings}
            self.send(200, json.dumps(info).encode(), with_body, {"Content-Type": "application/json"})
            return
        name = path.removeprefix(f"/datasets/{REPO_ID}/resolve/{COMMIT}/")
        if name not in hub.files:
            self.send(404, b"", with_body, {"X-Error-Code": "RepoNotFound"})
            return
        data, start = hub.files[name], 0
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hub.sha256(name)}"', "Accept-Ranges": "bytes",
                   "X-Linked-Size": str(len(data))}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted:
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if with_body:
            hub.served.append((name, start))
        limit = hub.breaks[name].pop(0) if with_body and hub.breaks.get(name) else None
        self.send(206 if wanted else 200, data[start:], with_body, headers, limit)

    def send(self, status: int, body: bytes, with_body: bool, headers: dict[str, str],
             limit: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body if limit is None else body[:limit])
        # Fewer bytes than the header promised, then silence: what a lost connection looks like.
        self.close_connection = with_body and limit is not None


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, bytes]:
    """A repository laid out like the published one, small, with the manifest that lets `verify` trust it."""
    folder = tmp_path_factory.mktemp("published")
    docs = folder / "docs.jsonl"
    docs.write_text("".join(json.dumps({"text": f"Document {i} says Hello {'again ' * (i % 5)}"}) + "\n"
                            for i in range(600)))
    prepare.build(docs, folder / "out", val_docs=100, shard_tokens=2000, show_progress=False)
    files = {f"{PREFIX}/{path.name}": path.read_bytes() for path in (folder / "out").iterdir()}
    model = prepare.SHIPPED_TOKENIZER.name
    files[f"datasets/tokenizers/{model}"] = files.pop(f"{PREFIX}/{model}")
    files["README.md"] = b"not needed"
    return files


# Runs the commands that arrive as lines of JSON, one after the other, and answers each with a line. How often it tries
# again is tested, not how long it waits before that.
COMMANDS = """
import contextlib, io, json, sys, time, traceback
import prepare_caseops_data as prepare
time.sleep = lambda seconds: None
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = prepare.main(json.loads(line))
        except BaseException:
            code = traceback.print_exc() or 1
    print(json.dumps([code, out.getvalue(), err.getvalue()]), file=sys.__stdout__, flush=True)
"""


@pytest.fixture(scope="module")
def client(repo, tmp_path_factory):
    """(the hub, a process that runs commands on it): the client reads the hub's address when it is imported."""
    server = Hub({})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1",
                   "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(tmp_path_factory.mktemp("hub_home")),
                   "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONPATH": str(repo)}
    # A leftover token or proxy of the machine has no part in the test.
    for key in ("HF_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        environment.pop(key, None)
    with subprocess.Popen([sys.executable, "-c", COMMANDS], env=environment, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield server, process
        process.stdin.close()
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(client, published) -> Hub:
    server, _ = client
    server.hold(dict(published))
    return server


@pytest.fixture
def download(client):
    """download(root, *arguments) runs the command of that name in the client's process."""
    _, process = client

    def run(root: Path, *arguments: str, train_shards: int = 2) -> subprocess.CompletedProcess:
        command = ["download", "--out", str(root), "--repo", REPO_ID, "--train-shards", str(train_shards), *arguments]
        print(json.dumps(command), file=process.stdin, flush=True)
        return subprocess.CompletedProcess(command, *json.loads(process.stdout.readline()))
    return run


def test_download_fetches_verifies_and_names_the_paths(download, hub, published, tmp_path):
    done = download(tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    folder = tmp_path / prepare.PUBLISHED_NAME
    names = {path.name for path in folder.iterdir()}
    assert names == {"manifest.json", ".checked.json", "caseops_8192.model", "fineweb_train_000000.bin",
                     "fineweb_train_000001.bin",
                     *(Path(name).name for name in published if "fineweb_val_" in name)}
    for name, data in published.items():
        if Path(name).name in names:
            assert (folder / Path(name).name).read_bytes() == data
    assert "verify violations:0" in done.stdout
    assert f"DATA_PATH={folder}\nTOKENIZER_PATH={folder / 'caseops_8192.model'}\n" in done.stdout

    hub.served.clear()
    assert download(tmp_path).returncode == 0
    assert hub.served == [], "finished files are fetched again"
    assert download(tmp_path, train_shards=3).returncode == 0
    assert [name for name, _ in hub.served] == [f"{PREFIX}/fineweb_train_000002.bin"]


def test_a_lost_connection_is_tried_again_within_the_run(download, hub, published, tmp_path):
    broken = f"{PREFIX}/fineweb_train_000000.bin"
    hub.breaks[broken] = [1500]
    done = download(tmp_path)
    assert done.returncode == 0, done.stderr
    assert len([name for name, _ in hub.served if name == broken]) == 2
    assert (tmp_path / prepare.PUBLISHED_NAME / "fineweb_train_000000.bin").read_bytes() == published[broken]


def test_an_interrupted_download_keeps_finished_files(download, hub, published, tmp_path):
    broken = f"{PREFIX}/fineweb_train_000000.bin"
    hub.breaks[broken] = [1500] + [0] * 50
    first = download(tmp_path)
    assert first.returncode == 1
    assert "expected to download it" in first.stderr and "run again" in first.stderr
    assert "Traceback" not in first.stderr
    folder = tmp_path / prepare.PUBLISHED_NAME
    assert not (folder / "fineweb_train_000000.bin").exists()
    finished = {name for name, _ in hub.served} - {broken}
    assert finished
    hub.breaks.clear()
    hub.served.clear()
    second = download(tmp_path)
    assert second.returncode == 0, second.stderr
    assert not {name for name, _ in hub.served} & finished
    assert (folder / "fineweb_train_000000.bin").read_bytes() == published[broken]


def test_a_wrong_hash_is_refused_and_fetched_again(download, hub, published, tmp_path):
    broken = f"{PREFIX}/fineweb_val_000000.bin"
    hub.stated_sha256[broken] = hashlib.sha256(b"something else").hexdigest()
    done = download(tmp_path)
    assert done.returncode == 1
    assert "fineweb_val_000000.bin: expected SHA-256" in done.stderr
    assert not (tmp_path / prepare.PUBLISHED_NAME / "fineweb_val_000000.bin").exists()
    hub.stated_sha256.clear()
    assert download(tmp_path).returncode == 0


def test_empty_and_short_files_are_refused(download, hub, tmp_path):
    shard = f"{PREFIX}/fineweb_val_bytes_000000.bin"
    hub.stated_sizes[shard] = len(hub.files[shard]) + 100
    done = download(tmp_path)
    assert done.returncode == 1 and "fineweb_val_bytes_000000.bin" in done.stderr
    assert not (tmp_path / prepare.PUBLISHED_NAME / "fineweb_val_bytes_000000.bin").exists()
    hub.stated_sizes.clear()
    hub.files[shard] = b""
    done = download(tmp_path)
    assert done.returncode == 1 and "with no bytes" in done.stderr


def test_missing_parts_of_a_repository_are_named(download, hub, tmp_path):
    done = download(tmp_path, train_shards=50)
    assert done.returncode == 2 and "expected 50 training shards, found" in done.stderr
    del hub.files[f"{PREFIX}/fineweb_val_bytes_000000.bin"]
    done = download(tmp_path)
    assert done.returncode == 1 and "fineweb_val_bytes_" in done.stderr
    hub.files.clear()
    done = download(tmp_path)
    assert done.returncode == 1 and "expected one folder of shards" in done.stderr
    done = download(tmp_path, "--repo", "someone/nothing")
    assert done.returncode == 1 and "someone/nothing: expected to download it" in done.stderr
    done = download(tmp_path, "--repo", "not a/name")
    assert done.returncode == 2 and "not a/name: expected a repository name" in done.stderr


def test_violations_of_the_fetched_data_set_the_exit_code(download, hub, tmp_path):
    del hub.files[f"{PREFIX}/manifest.json"]
    done = download(tmp_path)
    assert done.returncode == 1
    assert "violation: Without a manifest only the published export can be trusted" in done.stdout
