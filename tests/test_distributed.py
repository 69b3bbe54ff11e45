"""What several processes agree on."""

from processes import run_script

from iclip_hf.utils.files import folder_lock


SCRIPT = """
import sys
from pathlib import Path
from accelerate import Accelerator
from iclip_hf.utils.distributed import broadcast_from_main, shared_folder_lock, partial_state

state = partial_state("train")
Accelerator()
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
