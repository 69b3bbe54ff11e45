"""What several processes agree on, and what is left of a run when one of them dies."""

import os
import socket
import subprocess
import sys

import pytest

from iclip_hf.utils.distributed import partner_errors
from iclip_hf.utils.files import folder_lock


BEGIN = """
import os, sys
from pathlib import Path
import torch
from iclip_hf.utils.distributed import agreed, shared_folder_lock, partner_errors, this_process

torch.set_num_threads(1)
state = this_process("train")
"""
# Not by the interpreter: threads of torch can abort its end when the other process is gone already.
END = """
sys.stdout.flush()
os._exit(0)
"""


def two(script: str, *arguments) -> list[tuple[int, str]]:
    """Runs a script in two processes that know each other; exit code and output of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}  # without the first, Accelerate warns
    command = [sys.executable, "-c", BEGIN + script + END, *map(str, arguments)]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said)]


def test_all_agree_with_the_first_and_its_claim_is_that_of_all(tmp_path):
    script = """
assert agreed(state.process_index) == 0
try:
    with shared_folder_lock(Path(sys.argv[1]), state):
        print("claimed", flush=True)
        state.wait_for_everyone()
except BlockingIOError as error:
    print(error, flush=True)
"""
    assert all(code == 0 and said == "claimed\n" for code, said in two(script, tmp_path))
    with folder_lock(tmp_path):
        assert all("another run is writing here" in said for _, said in two(script, tmp_path))


@pytest.mark.parametrize(("dies", "work"), [(0, "state.wait_for_everyone()"), (1, "agreed(1)"), (1, "gradient()")])
def test_the_death_of_a_partner_is_one_sentence(dies, work):
    script = f"""
def gradient():
    net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3))
    for _ in range(10):
        net(torch.ones(1, 3)).sum().backward()

state.wait_for_everyone()
if state.process_index == {dies}:
    os._exit(9)
for message in ("size mismatch", "CUDA error: the launch timed out and was terminated"):
    try:
        with partner_errors("go on"):
            raise RuntimeError(message)
    except RuntimeError as error:  # nobody died of it
        assert str(error) == message
try:
    with partner_errors("go on"):
        {work}
except OSError as error:
    print(error, flush=True)
    os._exit(2)
"""
    results = two(script)
    assert results[dies][0] == 9
    code, said = results[1 - dies]
    assert code == 2 and said.startswith("Another process of this run ended or no longer answers (")
    assert said.endswith("); see its output, then go on.\n") and len(said.splitlines()) == 1


def test_without_partners_an_error_is_what_it_was():
    with pytest.raises(RuntimeError, match="closed by peer"), partner_errors("go on"):
        raise RuntimeError("closed by peer")
