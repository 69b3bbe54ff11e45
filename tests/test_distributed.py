"""What several processes agree on."""

import os
import subprocess
import sys

from iclip_hf.utils.files import folder_lock


SCRIPT = """
import sys
from pathlib import Path
from iclip_hf.utils.distributed import agreed, shared_folder_lock, this_process

state = this_process("train")
assert agreed(state.process_index) == 0
try:
    with shared_folder_lock(Path(sys.argv[1]), state):
        print("claimed", flush=True)
        state.wait_for_everyone()
except BlockingIOError as error:
    print(error, flush=True)
"""


def test_all_agree_with_the_first_and_its_claim_is_that_of_all(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2".split(), script, tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}

    def said() -> str:
        options = {"env": environment, "capture_output": True, "text": True, "timeout": 120, "check": True}
        return subprocess.run([*map(str, command)], **options).stdout

    assert said().count("claimed") == 2
    with folder_lock(tmp_path):
        assert said().count("another run is writing here") == 2
