"""Two nodes of torchrun, which are two process groups of this machine that meet over loopback."""

import os
import socket
import subprocess
import sys
import time

MEET = ("--nnodes=2", "--rdzv-backend=c10d")


def start_nodes(words, folder, options=MEET, **more):
    """Start torchrun twice with `-m words`, the second once the first keeps the store of the rendezvous.

    Each node has one process; their output is in `folder`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = ["--nproc-per-node=1", f"--rdzv-endpoint=127.0.0.1:{port}"]
    more = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, **more}
    nodes = []
    for number in range(2):
        with (folder / f"node{number}.txt").open("w") as log:
            start = [sys.executable, "-m", "torch.distributed.run", *options, *here, "-m", *words]
            nodes.append(subprocess.Popen(start, stdout=log, stderr=subprocess.STDOUT, **more))
        wait_for(lambda: socket.create_connection(("127.0.0.1", port)).close() is None, 120)
    return nodes


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise TimeoutError(f"not within {seconds} s")
