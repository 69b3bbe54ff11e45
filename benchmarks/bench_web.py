"""The page in the browser beside ONNX Runtime in Python, on the same graphs with one thread each.

    python benchmarks/bench_web.py

The embedded model in 8 bits, headless Chromium, scikit-image's photograph of a cup. Needs npm. Prints Markdown tables.
"""

import gzip
import io
import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

from measuring import command_line, machine, memory, needed, seconds, table
from npm_server import npm_server
from PIL import Image, ImageOps

from iclip_hf import ICLIPProcessor
from iclip_hf.backends.loading import load_iclip
from iclip_hf.web.export import export_web
from iclip_hf.web.server import web_server


with needed():
    import onnxruntime
    from playwright.sync_api import Browser, Page, sync_playwright
    from skimage.data import coffee

# Times in milliseconds: when the download has ended, and when the first row of the table is there.
CLOCK = """
window.times = {};
new MutationObserver(() => {
  if (document.getElementById("status").textContent.startsWith("Starting")) times.start ??= performance.now();
  if (document.querySelector("tbody tr")) times.first ??= performance.now();
}).observe(document.body, { subtree: true, childList: true, characterData: true });
"""


@contextmanager
def opened(browser: Browser, folder: Path) -> Iterator[Page]:
    with web_server(folder, port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_selector("#go:not([disabled])")
        page.evaluate(CLOCK)
        yield page
        context.close()
        server.shutdown()


def browser_seconds(browser: Browser, folder: Path) -> tuple[float, float, float]:
    """
    Returns the seconds from the end of the download to the first map, those for a further text, and the peak memory of
    the page's process in MiB.
    """
    with opened(browser, folder) as page:
        page.fill("#texts", "cup")
        page.click("#go")
        page.locator("tbody tr").wait_for(timeout=600_000)
        times = page.evaluate("times")
        further = []
        for text in ("saucer", "spoon", "plate", "dog", "cat"):
            page.fill("#texts", text)
            page.evaluate(
                "asked = performance.now(); times.first = undefined; document.querySelector('tbody').replaceChildren()"
            )
            page.press("#texts", "Enter")
            page.locator("tbody tr", has_text=text).wait_for()
            further.append(page.evaluate("times.first - asked") / 1000)
        processes = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
        peak = max(memory("VmHWM", process["id"]) for process in processes if process["type"] == "renderer")
    return (times["first"] - times["start"]) / 1000, median(further), peak


def write_picture(browser: Browser, folder: Path, path: Path) -> None:
    """Writes a picture of the page after its first answer, without its introduction."""
    with opened(browser, folder) as page:
        page.click("#go")
        page.locator("#after").wait_for(timeout=600_000)
        picture = Image.open(io.BytesIO(page.locator("main").screenshot())).convert("RGB")
        ImageOps.expand(picture, 16, "white").save(path, quality=90)  # the margin of the page


def python_seconds(processor: ICLIPProcessor, page: Path) -> tuple[float, float]:
    """
    Returns the same seconds with ONNX Runtime in Python. The first time includes both sessions, the processor, the
    image and a text.
    """
    graphs = [gzip.decompress((page / f"{side}_model.onnx.gz").read_bytes()) for side in ("vision", "text")]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1

    def encode(text: str) -> None:
        prompts = {name: value.unsqueeze(1).numpy() for name, value in processor(labels=[text]).items()}  # (T, 1, L)
        sessions[1].run(None, prompts)

    def first() -> None:
        sessions.extend(onnxruntime.InferenceSession(graph, options) for graph in graphs)
        sessions[0].run(None, {"pixel_values": processor(images=coffee())["pixel_values"].numpy()})
        encode("cup")

    sessions: list[onnxruntime.InferenceSession] = []
    return seconds(first), median(seconds(partial(encode, text)) for text in ("saucer", "spoon", "dog"))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--picture", type=Path, help="also write a picture of the page there, as docs/web.jpg is")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        model, processor = load_iclip("embedded", dtype="float32")
        with npm_server(Path(scratch)) as cdn:
            page = export_web(model, processor, Path(scratch, "page"), cdn=cdn)
            report(processor, page, args.rounds, args.picture)


def report(processor: ICLIPProcessor, page: Path, rounds: int, picture: Path | None) -> None:
    settings = json.loads((page / "settings.json").read_text())
    files = {**settings["runtime"]["wasm"], **settings["files"]}
    print(f"{machine('onnxruntime')}; one thread each, medians of {rounds} rounds\n")
    print(table(["file", "MB"], [[name, file["bytes"] / 1e6] for name, file in files.items()]))
    print(f"\n{settings['bytes'] / 1e6:.1f} MB in all.\n")

    system = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    web, python = [], []
    with sync_playwright() as driver:
        for _ in range(rounds):  # in turns, each time in a new browser
            browser = driver.chromium.launch(executable_path=system, args=["--no-sandbox"])
            web.append(browser_seconds(browser, page))
            browser.close()
            python.append(python_seconds(processor, page))
        if picture:
            with driver.chromium.launch(executable_path=system, args=["--no-sandbox"]) as browser:
                write_picture(browser, page, picture)
            print(picture, file=sys.stderr)
    rows = []
    for number, name in enumerate(("first map after the download", "a further text")):
        pairs = [(browser[number], native[number]) for browser, native in zip(web, python)]
        ratio = median(browser / native for browser, native in pairs)
        rows.append([name, *(median(side) for side in zip(*pairs)), ratio])
    print(table(["seconds, median", "browser", "Python", "ratio"], rows))
    print(f"\nPeak memory of the page's process: {max(peak for _, _, peak in web):.0f} MiB.")


if __name__ == "__main__":
    main()
