"""Puts tables into a page, each between the lines that have its name.

python benchmarks/insert.py docs/speed.md runs/bench_explain.md runs/bench_training.md
"""

import re
import sys
from pathlib import Path

from iclip_hf.utils.files import atomic_write


def insert(page: Path, name: str, text: str) -> None:
    """
    Replaces the text between `<!-- name -->` and `<!-- end -->` in a page. Raises `ValueError` if the page has no such
    lines.
    """
    section = re.compile(rf"(?<=^<!-- {name} -->\n).*?(?=^<!-- end -->$)", re.MULTILINE | re.DOTALL)
    content, count = section.subn(lambda _: f"\n{text.strip()}\n\n", page.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{page}: there is no line <!-- {name} --> with a line <!-- end --> below it.")
    with atomic_write(page) as temporary:
        temporary.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    page, *tables = map(Path, sys.argv[1:])
    for table in tables:
        insert(page, table.stem, table.read_text(encoding="utf-8"))
