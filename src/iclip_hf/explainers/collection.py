"""Explanation of whole collections of images with the same texts, as Parquet files for `datasets.load_dataset`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from ..backends.identity import changed
from ..data.pairs import PairDataset, load_pairs
from ..data.sources import image_files
from ..model.explanation import Explanation
from ..model.images import load_image
from ..utils.digests import content_digest
from ..utils.distributed import shared_folder_lock, this_process
from ..utils.extras import require_extra
from ..utils.files import atomic_write, check_new_folder
from ..utils.prefetch import prefetch_map, spare_processors
from .localizer import Localizer


with require_extra("collections"):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature


# One row for each image. Masks are 1-bit PNG files, which `datasets` decodes.
_POINTS = List(List(Value("int32")))
_FEATURES = Features(
    {
        "image": Value("string"),
        "height": Value("int32"),
        "width": Value("int32"),
        "texts": List(
            {
                "text": Value("string"),
                "score": Value("float32"),
                "presence": Value("float32"),
                "regions": List(
                    {
                        "score": Value("float32"),
                        "box": List(Value("int32"), length=4),
                        "positive_points": _POINTS,
                        "negative_points": _POINTS,
                    }
                ),
                "raw_map": List(List(Value("float32"))),
                "mask": ImageFeature(),
            }
        ),
    }
)


# Settings of the explanations in a folder. Hidden, because `datasets` reads all visible files of a folder.
STATE_FILE = ".iclip-explain.json"


class ImageFolder:
    """The image files of a folder and its subfolders, ordered by name, without hidden ones."""

    def __init__(self, folder: Path):
        self.folder, self._paths = folder, sorted(image_files(folder))
        if not self._paths:
            raise FileNotFoundError(f"{folder}: there are neither images nor .tar shards in this folder.")

    def __len__(self) -> int:
        return len(self._paths)

    def image(self, index: int) -> tuple[str, Image.Image]:
        """Returns the path within the folder, and the image. Raises like `load_image`."""
        path = self._paths[index]
        return path.relative_to(self.folder).as_posix(), load_image(path)

    def fingerprint(self) -> str:
        """Returns 16 hex digits over the names and the content of the files, which the first call reads."""
        return content_digest(self._paths, self.folder)


def open_images(sources: Sequence[str | os.PathLike]) -> ImageFolder | PairDataset:
    """
    Opens the images of a folder with its subfolders, or of webdataset shards: `.tar` files, patterns such as
    "cc3m/{00000..00331}.tar", or a folder of shards. Images need no captions.

    Raises:
        `FileNotFoundError`: there are no images. `ValueError`: a folder of images is combined with other sources.
    """
    paths = map(Path, sources)
    folders = [path for path in paths if path.is_dir() and not any(path.glob("*.[tT][aA][rR]"))]
    if folders and len(sources) > 1:
        raise ValueError(f"Name one folder of images, or webdataset shards alone, not {[str(s) for s in sources]}.")
    return ImageFolder(folders[0]) if folders else load_pairs(sources)


class CollectionReport(NamedTuple):
    """The Parquet files of a collection, the number of explained images, and an error message for each image that is not readable."""

    files: list[Path]
    images: int
    broken: list[str]


def explain_collection(
    localizer: Localizer,
    images: ImageFolder | PairDataset,
    output: Path,
    *,
    batch_size: int = 8,
    images_per_file: int = 256,
    num_workers: int | None = None,
    progress: bool = True,
) -> CollectionReport:
    """
    Explains all images and writes Parquet files `explanations-00000-of-00004.parquet`, ... with one row for each image, for
    `load_dataset("parquet", data_dir=output)`.

    Files are written atomically, and existing files are not computed again, so the same call continues after an interruption. A state
    file that describes texts, model and images is written before them, and a folder of another description is refused. Under
    `accelerate launch` the processes share the files. The number of processes does not change the files.

    Args:
        localizer ([`Localizer`]), images, output: texts and model, the result of `open_images`, and the folder to write into.
        batch_size (`int`): number of images in one forward pass.
        images_per_file (`int`): number of rows of a file, the most that an interruption loses.
        num_workers (`int`, *optional*): number of threads that decode images and compute masks; `spare_processors` if not given.
        progress (`bool`): whether the first process shows a progress bar.

    Raises:
        `ValueError`: the folder contains files of other images or texts, another model or other options.
        `OSError`: it contains other files or cannot be written, or another run is writing there.
    """
    check_new_folder(output, STATE_FILE)
    state = this_process("collections")
    parts = [range(len(images))[start : start + images_per_file] for start in range(0, len(images), images_per_file)]
    files = [output / f"explanations-{number:05d}-of-{len(parts):05d}.parquet" for number in range(len(parts))]
    with state.main_process_first():  # the first process caches the digests of the files for the others
        fingerprint = images.fingerprint()
    settings = {**localizer.settings, "images": fingerprint, "images_per_file": images_per_file}
    described = output / STATE_FILE
    with shared_folder_lock(output, state):
        if described.exists() and (differing := changed(json.loads(described.read_text()), settings)):
            raise ValueError(
                f"{output}: this folder holds explanations of other {', '.join(differing)}; choose another output folder."
            )
        with atomic_write(described) as temporary:
            temporary.write_text(json.dumps(settings))
        missing = [(part, file) for part, file in zip(parts, files) if not file.exists()]
        state.wait_for_everyone()  # before any process adds a file: all must share the same list
        mine = missing[state.process_index :: state.num_processes]
        bar = tqdm(
            total=sum(len(part) for part, _ in mine), unit="image", disable=not (progress and state.is_main_process)
        )
        with ThreadPoolExecutor(num_workers or spare_processors()) as pool, bar:
            for part, file in mine:
                rows, broken = [], []
                explained = localizer.explain_all(images.image, part, pool, batch_size)
                for name, row in prefetch_map(pool, _row, explained, 2 * batch_size):
                    if row is None:
                        broken.append(name)
                    else:
                        rows.append(row)
                    bar.update()
                metadata = {b"iclip": json.dumps({"settings": settings, "broken": broken}).encode()}
                schema = _FEATURES.arrow_schema
                table = pa.Table.from_pylist(rows, schema.with_metadata({**schema.metadata, **metadata}))
                with atomic_write(file) as unfinished:
                    pq.write_table(table, unfinished)
        state.wait_for_everyone()
    written = [pq.read_metadata(file) for file in files]
    broken = [name for one in written for name in json.loads(one.metadata[b"iclip"])["broken"]]
    return CollectionReport(files, sum(one.num_rows for one in written), broken)


def _row(found: tuple[str, Explanation | None]) -> tuple[str, dict | None]:
    """Returns the name of an image, and its row if it could be read."""
    name, explanation = found
    name = name.encode(errors="backslashreplace").decode()  # Parquet files are UTF-8, but names may have any bytes
    if explanation is None:
        return name, None
    encoder, (height, width) = ImageFeature(), explanation.size
    texts = [
        {**text, "raw_map": list(raw), "mask": encoder.encode_example(Image.fromarray(mask))}
        for (text, mask), raw in zip(explanation.records_and_masks(), explanation.raw_maps.numpy())
    ]
    return name, {"image": name, "height": height, "width": width, "texts": texts}
