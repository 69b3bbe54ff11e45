"""
A hook of MkDocs: makes the site of pages that GitHub shows as they are, by changing their links to what is outside of
`docs/`.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).parents[1]
# Pages of the site by the files of the repository that they are.
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def on_files(files, config):
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, **kwargs):
    return relinked(markdown, page.file.src_uri)


def relinked(markdown: str, page: str) -> str:
    """
    Returns the text of a page with links of the site: to another page; to an object in the API reference, in place of
    a link with its name to its module; and none to other files outside of `docs/`.
    """
    sources = {name: source for source, name in OUTSIDE.items()}
    folder = posixpath.dirname(sources.get(page, f"docs/{page}"))

    def replace(link: re.Match) -> str:
        image, text, target, anchor = link.groups(default="")
        path = posixpath.normpath(posixpath.join(folder, target))
        if not (ROOT / path).exists():
            return link[0]  # no link, or one that MkDocs reports
        if path.startswith("src/"):
            module = path.removeprefix("src/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            name = text.strip("`()")
            return f"[{text}][{module if name == module else f'{module}.{name}'}]"
        if not path.startswith("docs/") and path not in OUTSIDE:
            return text
        place = posixpath.relpath(OUTSIDE.get(path, path.removeprefix("docs/")), posixpath.dirname(page) or ".")
        return f"{image}[{text}]({place}{anchor})"

    return _LINK.sub(replace, markdown)
