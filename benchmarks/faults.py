"""
Interrupted runs: jobs that are killed at random moments, or lose their disk, the permission to write, a shard, or another process.

`python benchmarks/faults.py` takes some minutes and prints a Markdown table. The result of each job is compared with that of an
uninterrupted one. Needs Linux. Jobs are forks of this process, which has imported everything and computed nothing.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import BertTokenizer, CLIPImageProcessor


ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# ruff: noqa: E402

from conftest import WORDS, tiny_model, write_pairs

from iclip_hf import ICLIPProcessor, cli
from iclip_hf.data.pairs import load_pairs
from iclip_hf.explainers.collection import explain_collection, open_images
from iclip_hf.explainers.localizer import Localizer
from iclip_hf.models.loading import load_iclip
from iclip_hf.training.feature_cache import FeatureCache


KILLS = {"training": 20, "cache": 10, "collection": 10, "evaluation": 10, "export": 10}
FORK = multiprocessing.get_context("fork")

# ---------------------------------------------------------------------------------------------------- inputs of the jobs


def make_inputs(folder: Path) -> None:
    """A tiny model, pairs, photographs with masks, and a `train.yaml`."""
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    image_processor = CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    processor = ICLIPProcessor(image_processor, BertTokenizer(vocab=str(folder / "vocab.txt")), patch_size=8)
    tiny_model().save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    write_pairs(folder / "pairs.tar", 600)
    write_pairs(folder / "held_out.tar", 17, seed=1)
    (folder / "train.yaml").write_text(
        f"""
        model: {folder}/model
        data: [{folder}/pairs.tar]
        validation_data: [{folder}/held_out.tar]
        image_size: 32
        batch_size: 16
        max_steps: 30
        num_workers: 0
        eval_steps: 3
        checkpoint_steps: 1
        pictures: 0
        report_to: none
        """
    )
    draws = np.random.default_rng(0)
    for number in range(60):
        for kind, pixels in (
            ("images", draws.integers(0, 256, (40, 60, 3))),
            ("masks", draws.integers(0, 3, (40, 60))),
        ):
            path = folder / "data" / kind / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    (folder / "data" / "classes.txt").write_text("dog\ncat\n")


# ------------------------------------------------------------------------------------------------------------------ jobs


def training(inputs: Path, output: Path, *more) -> None:
    sys.exit(cli.main(["train", "--config", f"{inputs}/train.yaml", "--output_dir", str(output), "--resume", *more]))


def cache(inputs: Path, output: Path) -> None:
    model, processor = load_iclip(inputs / "model")
    FeatureCache(output, model, processor, Accelerator(cpu=True)).images(
        load_pairs(inputs / "pairs.tar"), batch_size=16
    )


def collection(inputs: Path, output: Path) -> None:
    localizer = Localizer(inputs / "model", ["dog", "red ball"])
    images = open_images([inputs / "data" / "images"])
    explain_collection(localizer, images, output, images_per_file=3, num_workers=1, progress=False)


def evaluation(inputs: Path, output: Path) -> None:
    options = ["--dataset", "folder", "--data-root", f"{inputs}/data", "--methods", "itsm", "attention"]
    output.mkdir(exist_ok=True)
    if cli.main(["evaluate", *options, "--model", f"{inputs}/model", "--output", f"{output}/scores.json"]):
        raise SystemExit(2)


def export(inputs: Path, output: Path) -> None:
    output.mkdir(exist_ok=True)
    done = (output / "model").exists()  # then it refuses, rightly
    if cli.main(["export", f"{inputs}/model", f"{output}/model"]) and not done:
        raise SystemExit(2)


JOBS = {job.__name__: job for job in (training, cache, collection, evaluation, export)}


def result(name: str, output: Path) -> dict:
    """Returns what a job has written, without what may differ between equal runs, such as times."""
    if name == "training":
        weights = {"weights": (output / "model.safetensors").read_bytes()}
        state = json.loads((output / "results.json").read_text())
        return weights | {key: state[key] for key in ("step", "metrics", "best")}
    if name == "evaluation":
        scores = json.loads((output / "scores.json").read_text())
        return {key: scores[key] for key in ("protocol", "results", "per_class")} | {
            "csv": (output / "scores.csv").read_text()
        }
    if name == "collection":
        return {path.name: pq.read_table(path).to_pylist() for path in output.glob("*.parquet")}
    pattern = "model/*" if name == "export" else "images/*/*.npy"
    return {path.name: path.read_bytes() for path in output.glob(pattern)}


def rubbish(output: Path) -> list[str]:
    """Returns the partial and hidden files that a finished job left behind."""
    paths = [path.relative_to(output) for path in output.rglob("*")]
    return [str(path) for path in paths if "partial" in path.name or path.parts[0].startswith(".model.")]


# ---------------------------------------------------------------------------------------------------- running and killing


class Run:
    """A job in a process of its own, whose output goes through a pipe."""

    def __init__(self, job: Callable, *arguments, before: Callable = lambda: None, environment: dict | None = None):
        self._said, says = os.pipe()
        os.set_blocking(self._said, False)
        self.began = time.perf_counter()
        self._process = FORK.Process(target=self._run, args=(says, job, arguments, before, environment or {}))
        self._process.start()
        os.close(says)
        self.pid = self._process.pid

    def _run(self, says, job, arguments, before, environment) -> None:
        os.dup2(says, 1)
        os.dup2(says, 2)
        os.environ |= environment
        before()
        try:
            job(*arguments)
        except (OSError, ValueError) as error:  # of functions; commands print it themselves
            print("error:", error, file=sys.stderr, flush=True)
            sys.exit(2)

    def wait(self, timeout: float = 300) -> int | None:
        """Returns the exit code; None if it still runs."""
        self._process.join(timeout)
        return self._process.exitcode

    def kill(self) -> bool:
        """Sends SIGKILL. Returns False if the job had ended before."""
        alive = self.wait(0) is None
        self._process.kill()
        return self.wait() == -signal.SIGKILL and alive

    def said(self) -> str:
        """Returns the error message, or else the last line of the output, shortened and without the folder."""
        said = os.read(self._said, 2**20).decode(errors="replace")
        sentence = re.findall(r"(?:error|iclip \w+): (.*)", said)
        last = (sentence or said.splitlines() or [""])[-1].replace(f"{tempfile.tempdir}/", "").replace("|", "/")
        return f"{last:.300}" + " ..." * (len(last) > 300)


class Faults:
    """All faults. The jobs write to `folder`, and the lines of the table are in `rows`."""

    def __init__(self, folder: Path):
        self.folder, self.inputs = folder, folder / "inputs"
        self.rows, self.failures = [], 0
        self.inputs.mkdir()
        assert Run(make_inputs, self.inputs).wait() == 0
        self.whole, self.took = {}, {}
        for name in JOBS:
            run = self.start(name, self.output(name, "whole"))
            assert run.wait() == 0, run.said()
            self.took[name] = time.perf_counter() - run.began
            self.whole[name] = result(name, self.output(name, "whole"))

    def output(self, name: str, fault: str) -> Path:
        return self.folder / f"{name}-{fault.replace(' ', '-')}"

    def start(self, name: str, output: Path, *more, **options) -> Run:
        return Run(JOBS[name], self.inputs, output, *more, **options)

    def tell(self, fault: str, name: str, times: int, seen: str, good: bool) -> None:
        self.failures += not good
        self.rows.append(f"| {fault} | {name} | {times} | {'' if good else '**FAILED** '}{seen} |")
        print(self.rows[-1], flush=True)

    def resumed(self, name: str, output: Path, *more) -> str:
        """Runs the job to its end. Returns "" if its result is that of the uninterrupted one, otherwise the problem."""
        run = self.start(name, output, *more)
        if run.wait() != 0:
            return run.said()
        same = result(name, output) == self.whole[name]
        return ("" if same else "another result") + (f"left {rubbish(output)}" if rubbish(output) else "")

    def kills(self) -> None:
        """Kills each job at moments that are uniform over its duration. It is resumed until it ends, then started anew."""
        for name, times in KILLS.items():
            killed, problems, number = 0, [], 0
            while killed < times:
                output = self.output(name, f"kill {number}")
                while killed < times:
                    run = self.start(name, output)
                    time.sleep(random.uniform(0, self.took[name]))
                    if not run.kill():
                        break
                    killed += 1
                if problem := self.resumed(name, output):
                    problems.append(problem)
                number += 1
            seen = "; ".join(problems) or "resumed, the result is the uninterrupted one"
            self.tell("kill -9 at a random moment", name, times, seen, not problems)

    def told(self, fault: str, name: str, output: Path, run: Run, repair: Callable[[], object] = lambda: None) -> None:
        """Checks that the run ends with an error message and exit code 2, and resumes once the fault is removed."""
        code, said = run.wait(), run.said()
        repair()
        problem = self.resumed(name, output)
        seen = f"{'' if code == 2 else f'exit {code}: '}{said}; then {problem or 'the uninterrupted result'}"
        self.tell(fault, name, 1, seen, code == 2 and not problem)

    def no_writing(self, fault: str, before: Callable[[Path], None]) -> None:
        for name in JOBS:
            output = self.output(name, fault)
            run = self.start(name, output, before=partial(before, output))
            self.told(fault, name, output, run, lambda: output.exists() and output.chmod(0o755))  # noqa: B023

    def a_shard_disappears(self) -> None:
        shard, aside = self.inputs / "pairs.tar", self.inputs / "aside"
        output = self.output("training", "shard")
        run = self.started(output)
        os.replace(shard, aside)
        self.told("a shard disappears", "training", output, run, lambda: os.replace(aside, shard))

        output = self.output("cache", "shard")
        self.resumed("cache", output)
        next(output.rglob("00001.npy")).unlink()
        problem = self.resumed("cache", output)
        self.tell("a shard of the cache disappears", "cache", 1, problem or "made again, the same bytes", not problem)

    def a_worker_dies(self) -> None:
        output = self.output("training", "worker")
        run = self.started(output, "--num_workers", "2")
        os.kill(int(_children(run.pid)[0]), signal.SIGKILL)
        self.told("a data-loading worker dies", "training", output, run)

    def started(self, output: Path, *more) -> Run:
        """Starts a training and returns it once it has written two checkpoints."""
        run = self.start("training", output, *more)
        _until(lambda: len(list(output.glob("checkpoint-*"))) > 1)
        return run

    def two_runs(self) -> None:
        """A job that locks its folder must refuse the second run; the others write whole files, of which those of one run remain."""
        for name in JOBS:
            output, claims = self.output(name, "two"), name not in ("evaluation", "export")
            first = self.start(name, output)
            _until(lambda: output.exists() and (not claims or any(output.rglob(".iclip-hf.lock"))))  # noqa: B023
            os.kill(first.pid, signal.SIGSTOP)  # so that the second starts while it runs
            second = self.start(name, output)
            second.wait()
            os.kill(first.pid, signal.SIGCONT)
            codes, said = [first.wait(), second.wait()], (first.said(), second.said())
            refused = next((words for code, words in zip(codes, said) if code == 2), "")
            good = (
                sorted(codes) == [0, 2] if claims else 0 in codes and (codes == [0, 0] or "expected a new" in refused)
            )
            problem = self.resumed(name, output) if good else f"{codes} {said}"
            seen = f"one is refused: {refused}" if refused else "both end"
            self.tell(
                "two runs on one output folder", name, 1, problem or f"{seen}; the undisturbed result", not problem
            )

    def two(self, name: str, output: Path) -> list[Run]:
        """Starts the job in two processes of one group, as torchrun does."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "1"} for rank in range(2)]
        return [self.start(name, output, environment=shared | rank) for rank in ranks]

    def a_process_dies(self) -> None:
        """Kills one of two processes. The other must end with an error message, and two new processes must resume."""
        signs = {"training": "checkpoint-*", "cache": "images/*/*.npy", "collection": "*.parquet"}
        for name in ("training", "cache", "collection", "evaluation"):
            undisturbed, output = self.output(name, "two processes"), self.output(name, "process")
            began = time.perf_counter()
            assert [run.wait() for run in self.two(name, undisturbed)] == [0, 0]
            took = time.perf_counter() - began
            code = 0
            while code == 0:  # an evaluation writes nothing on the way; if it had ended, it is killed earlier
                first, second = self.two(name, output)
                if name in signs:
                    _until(lambda: any(output.glob(signs[name])))  # noqa: B023
                else:
                    took /= 2
                    time.sleep(took)
                killed, began = second.kill(), time.perf_counter()
                code, ended = first.wait(60), time.perf_counter() - began
            first.kill()
            said = first.said()
            codes = [run.wait() for run in self.two(name, output)]
            same = codes == [0, 0] and result(name, output) == result(name, undisturbed)
            seen = f"the other ends after {ended:.1f} s: {said}; then {'the uninterrupted result' if same else codes}"
            good = killed and code == 2 and "Another process of this run ended" in said and same
            self.tell("one of two processes dies", name, 1, seen, good)

    def __call__(self) -> None:
        self.kills()
        self.no_writing("disk full", _limit_files)
        self.no_writing("read-only folder", _read_only)
        self.a_shard_disappears()
        self.two_runs()
        self.a_worker_dies()
        self.a_process_dies()


def _until(condition: Callable[[], bool], timeout: float = 60) -> None:
    end = time.perf_counter() + timeout
    while not condition():
        if time.perf_counter() > end:
            raise TimeoutError("A job did not come as far as the fault.")
        time.sleep(0.02)


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _limit_files(folder: Path) -> None:
    """Limits all files that the process writes to a thousand bytes, which has the effect of a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def _read_only(folder: Path) -> None:
    """Makes a folder without permission to write. Root also gives up its capabilities, which would allow it to write."""
    folder.mkdir()
    folder.chmod(0o555)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    ctypes.CDLL(None).capset(header, data)


def main() -> None:
    random.seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        os.environ |= {"ICLIP_CACHE": folder, "TOKENIZERS_PARALLELISM": "false"}
        print("| what | job | times | seen |\n|---|---|---|---|", flush=True)
        faults = Faults(Path(folder))
        faults()
    print(f"\n{sum(KILLS.values())} kills; {faults.failures} of {len(faults.rows)} lines failed.")
    sys.exit(faults.failures > 0)


if __name__ == "__main__":
    main()
