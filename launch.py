#!/usr/bin/env python3
"""Start a script once per GPU of this machine, and end all of its processes together.

    python launch.py PROCESSES SCRIPT [ARGUMENTS]

Sets the variables that torchrun sets (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT).
Unlike torchrun it adds nothing to what the script says and keeps its exit code: 0 when every rank succeeded, 130
or 143 after SIGINT or SIGTERM, else the largest code of a rank that ended by itself; 2 without a SCRIPT to start.
`torchrun` works too.
"""
from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

# For ranks to end by themselves after a signal or another's failure, and once more after SIGTERM: a rank that is
# stuck gives up within SIGNAL_GRACE_S of train_gpt.py, and nobody is killed while it writes its log.
GRACE_S = 5.0
POLL_S = 0.1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(count: int, command: list[str]) -> list[subprocess.Popen]:
    # torch's C++ side warns at length when a rank is gone, which another rank has then explained.
    shared = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ,
              "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [subprocess.Popen([sys.executable, *command], env=env) for env in ranks]


def wait(processes: list[subprocess.Popen], seconds: float = float("inf"), received: Sequence[int] = ()) -> None:
    """Wait until all have ended or the time is over; without a time, until one has failed or a signal was received."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if None not in codes or (seconds == float("inf") and (received or any(codes))):
            return
        time.sleep(POLL_S)


def main(arguments: list[str]) -> int:
    if len(arguments) < 2 or not arguments[0].isdigit() or int(arguments[0]) < 1:
        print(__doc__, file=sys.stderr)
        return 2
    if not os.path.isfile(arguments[1]):          # else every rank would say so
        print(f"error: {arguments[1]}: expected a script, found no such file; correct the path", file=sys.stderr)
        return 2
    received: list[int] = []

    def forward(number: int, frame: object) -> None:
        received.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    processes: list[subprocess.Popen] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    started = start(int(arguments[0]), arguments[1:])
    early = list(received)                # signals that came while they were being started
    processes += started
    for number in early:
        for process in processes:
            process.send_signal(number)
    wait(processes, received=received)
    wait(processes, GRACE_S)
    ended = [process.returncode for process in processes if process.poll() is not None]
    for end in (subprocess.Popen.terminate, subprocess.Popen.kill):
        for process in processes:
            if process.poll() is None:
                end(process)
                process.send_signal(signal.SIGCONT)       # a stopped one sees the first signal only then
        wait(processes, GRACE_S)
    if received:
        return 128 + received[0]
    killed = [rank for rank, process in enumerate(processes) if process.returncode == -signal.SIGKILL]
    if -signal.SIGKILL in ended:
        print(f"error: rank {killed[0]} was killed; the machine may be out of memory, look at its "
              f"log", file=sys.stderr)
    return max((1 if code < 0 else code for code in ended), default=1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
