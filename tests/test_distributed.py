"""What several processes agree on."""

from processes import run_script

from iclip_hf.utils.files import folder_lock


SCRIPT = """
import sys
from datetime import timedelta
from pathlib import Path
import torch
from accelerate import Accelerator
from iclip_hf.utils.distributed import broadcast_from_main, shared_folder_lock, partial_state

state = partial_state("train")
Accelerator()
group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
assert group.options._timeout == timedelta(hours=12)  # the first process may read data for long
assert broadcast_from_main(state.process_index) == 0
try:
    with shared_folder_lock(Path(sys.argv[1]), state):
        print("claimed")
        state.wait_for_everyone()
except BlockingIOError as error:
    print(error)
"""


def test_all_agree_with_the_first_and_its_claim_is_that_of_all(tmp_path):
    assert [done.stdout for done in run_script(SCRIPT, tmp_path, processes=2)] == ["claimed\n"] * 2
    with folder_lock(tmp_path):
        for done in run_script(SCRIPT, tmp_path, processes=2):
            assert done.returncode == 0 and "another run is writing here" in done.stdout, done.stderr
