"""
Scripts in processes of their own, forked from one that has imported the package, which takes most of the time of a new
one.
"""

import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace


_START = multiprocessing.get_context("forkserver")
_START.set_forkserver_preload(
    ["iclip_hf.cli", "iclip_hf.training.trainer", "iclip_hf.evaluation.evaluate", "datasets"]
)
COMMAND = "import sys\nfrom iclip_hf import cli\nsys.exit(cli.main(sys.argv[1:]))"


def _child(script: str, arguments: list[str], environment: dict, outputs: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(outputs / name, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = ["script", *arguments]
    exec(compile(script, "script", "exec"), {"__name__": "__main__"})


def run_script(script: str, *arguments, processes: int = 1) -> list[SimpleNamespace]:
    """
    Runs Python code, in several processes as torchrun starts them. Returns `returncode`, `stdout` and `stderr` of
    each.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
        if processes > 1:
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        free.close()
        started = []
        for rank in range(processes):
            outputs = Path(folder, str(rank))
            outputs.mkdir()
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            environment = shared | {name: str(value) for name, value in own.items() if processes > 1}
            parts = (script, [*map(str, arguments)], environment, outputs)
            started.append((outputs, _START.Process(target=_child, args=parts)))
            started[-1][1].start()
        done = []
        for outputs, process in started:
            process.join(240)
            alive = process.is_alive()
            process.kill()
            out, err = ((outputs / name).read_text() for name in ("out", "err"))
            assert not alive, f"did not end: {err}"
            done.append(SimpleNamespace(returncode=process.exitcode, stdout=out, stderr=err))
        return done
