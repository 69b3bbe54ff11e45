"""What several processes agree on."""

from processes import run_script


SCRIPT = """
from accelerate import Accelerator
from iclip_hf.utils.distributed import broadcast_from_main, partial_state

state = partial_state("train")
Accelerator()
print(broadcast_from_main(state.process_index), state.num_processes)
"""


def test_all_agree_with_the_first(tmp_path):
    assert [done.stdout for done in run_script(SCRIPT, tmp_path, processes=2)] == ["0 2\n"] * 2
