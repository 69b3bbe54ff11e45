"""
The pipeline and the live demo under parallel clients: errors, wrong answers, and growth of memory.

`python benchmarks/concurrency.py [seconds]` (two minutes by default, for each of the two) prints a Markdown table. Every client has its
own image and texts, and compares each answer with one that was computed alone before. Clients of the demo use HTTP from another
process; those of the pipeline are threads of this one. Needs Linux with glibc.

Memory is sampled against the number of answers: what the process holds, and what it holds after the allocator returned free memory,
which is what is in use. The slope of the latter over the second half is what each answer leaves behind.
"""

from __future__ import annotations

import ctypes
import io
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial

import httpx
import numpy as np
import torch
from measuring import machine, memory
from PIL import Image

from iclip_hf import ImageTextSimilarityMapPipeline
from iclip_hf.demo.app import launch
from iclip_hf.models.embedded import embedded_model
from iclip_hf.models.loading import load_iclip


CLIENTS = 32
WORDS = ["dog", "cat", "red ball", "sky", "a car", "grass", "person", "water", "house", "bicycle", "tree", "table"]


def question(client: int) -> tuple[Image.Image, list[str]]:
    """An image of its own size and content, and three texts."""
    draws = np.random.default_rng(client)
    pixels = Image.fromarray(draws.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return pixels.resize((200 + 8 * client, 320 - 4 * client)), [WORDS[(client + step) % 12] for step in (0, 3, 7)]


# Answers so far, also of the clients in another process.
answered = multiprocessing.get_context("spawn").Value("q", 0)


def count_in(counter) -> None:
    """Initialises the other process."""
    global answered
    answered = counter


def ask_until(end: float, ask: Callable[[], object], expected: object) -> tuple[list[float], list[str]]:
    """Asks the same until `end`. Returns the seconds of each answer, and the problems."""
    taken, wrong = [], []
    while time.time() < end:
        began = time.time()
        try:
            answer = ask()
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")
        else:
            if not same(answer, expected):
                wrong.append("another answer")
        with answered:
            answered.value += 1
        taken.append(time.time() - began)
    return taken, wrong


def same(answer: list, expected: list) -> bool:
    """Returns whether texts are equal, and scores and maps up to the rounding of other batches and threads."""
    return len(answer) == len(expected) and all(
        text == other and abs(score - other_score) < 1e-3 and map_.shape == other_map.shape
        and np.abs(map_ - other_map).mean() < 1e-2
        for (text, score, map_), (other, other_score, other_map) in zip(answer, expected)
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- questions


def of_pipeline(pipe, client: int) -> list:
    image, texts = question(client)
    answers = sorted(pipe(image, texts), key=lambda answer: answer["label"])
    return [(answer["label"], answer["score"], answer["map"].numpy()) for answer in answers]


def of_demo(address: str, client: int) -> list:
    """Uploads an image, calls the app and reads the answer, as a browser does."""
    image, texts = question(client)
    file = io.BytesIO()
    image.save(file, "PNG")
    with httpx.Client(base_url=f"{address}gradio_api/", timeout=120) as http:
        (path,) = http.post("upload", files={"files": ("image.png", file.getvalue())}).raise_for_status().json()
        photo = {"path": path, "orig_name": "image.png", "meta": {"_type": "gradio.FileData"}}
        event = (
            http.post("call/explain", json={"data": [photo, ", ".join(texts), "itsm", False]})
            .raise_for_status()
            .json()
        )
        lines = http.get(f"call/explain/{event['event_id']}").text.splitlines()
    if "event: complete" not in lines:
        raise ValueError(" ".join(lines)[:200])
    value = json.loads(lines[lines.index("event: complete") + 1].removeprefix("data: "))[0]

    def stretched(raw_map: list[float]) -> np.ndarray:
        return (np.array(raw_map) - min(raw_map)) / np.ptp(raw_map)

    return [(text["text"], text["cosine"], stretched(text["map"])) for text in value["texts"]]


def in_parallel(ask: Callable[[int], list], seconds: float) -> list[tuple[list[float], list[str]]]:
    """Runs each client in a thread of its own, after each was answered alone."""
    expected = [ask(client) for client in range(CLIENTS)]
    end = time.time() + seconds
    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(lambda client: ask_until(end, lambda: ask(client), expected[client]), range(CLIENTS)))


def from_outside(address: str, seconds: float) -> list[tuple[list[float], list[str]]]:
    """Runs the demo's clients in another process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), count_in, (answered,)) as pool:
        return pool.submit(in_parallel, partial(of_demo, address), seconds).result()


def report(name: str, run: Callable[[], list[tuple[list[float], list[str]]]]) -> bool:
    """Prints a line of the table, with the memory of this process. Returns whether all answers were right."""
    samples, ended = [], threading.Event()
    answered.value = 0

    def watch() -> None:
        while not ended.wait(1):
            held = memory()
            ctypes.CDLL(None).malloc_trim(0)
            samples.append((answered.value, held, memory()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    answers = run()
    ended.set()
    watcher.join()
    taken = sorted(second for seconds, _ in answers for second in seconds)
    wrong = [problem for _, problems in answers for problem in problems]
    count, held, used = np.array([sample for sample in samples if sample[0] >= len(taken) / 2]).T
    third = -(-len(count) // 3)  # of the second half, for means over several samples

    def between(values: np.ndarray) -> str:
        return f"{values[:third].mean():,.0f} -> {values[-third:].mean():,.0f}"

    print(
        f"| {name} | {len(taken):,} | {len(wrong)} {' '.join(sorted(set(wrong))[:2])} | {taken[len(taken) // 2]:.2f} / "
        f"{taken[int(0.99 * len(taken))]:.2f} | {between(held)} | {between(used)} | {1024 * np.polyfit(count, used, 1)[0]:+.1f} |",
        flush=True,
    )
    return bool(taken) and not wrong


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 120
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    folder = embedded_model()
    model, processor = load_iclip(folder)
    print(f"{machine('gradio')}; {CLIENTS} clients, {seconds:.0f} seconds each\n")
    print(
        "| what | answers | wrong | seconds, median / 99 % | MiB held, second half | of them in use | KiB in use an answer |\n"
        "|---|---|---|---|---|---|---|",
        flush=True,
    )
    pipe = ImageTextSimilarityMapPipeline(model=model, processor=processor, device="cpu")
    good = report("pipeline", lambda: in_parallel(partial(of_pipeline, pipe), seconds))
    app = launch(str(folder), "127.0.0.1", prevent_thread_lock=True, quiet=True)
    good &= report("live demo", lambda: from_outside(app.local_url, seconds))
    app.close()
    sys.exit(not good)


if __name__ == "__main__":
    main()
