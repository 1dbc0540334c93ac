"""Starting a benchmark's cell in several processes, as `torchrun` does, without its agent."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping

MODES = ("ddp", "fsdp")


def last_line_of_first(command: list[str], *, processes: int, environment: Mapping[str, str] | None = None) -> str:
    """Run `command` in so many processes that find each other; the last line that the first of them printed.

    Args:
        command: what each process runs; it joins the others with `headway.training.launch.joined`.
        processes: how many.
        environment: of all of them; this process's where not given.

    Raises:
        RuntimeError: one of them failed; the others are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict(os.environ if environment is None else environment)
    shared |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [
        subprocess.Popen(
            command,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stderr=sys.stderr,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        output, _ = running[0].communicate()
        failed = [rank for rank, process in enumerate(running) if process.wait() != 0]
    finally:
        for process in running:
            process.kill()
    if failed:
        raise RuntimeError(f"process {failed[0]} of {' '.join(command)} failed; its message is above")
    return output.splitlines()[-1]
