"""
A griffe extension: renders docstrings in the style of transformers, which none of griffe's parsers reads, as Markdown.
"""

import inspect
import re
from collections.abc import Iterator

import griffe


_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):\n((?:(?: +.*)?(?:\n|$))+)", re.MULTILINE)
_REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")
_EXCEPTION = re.compile(r"`[\w.]+(Error|Exception)`")


class TransformersDocstrings(griffe.Extension):
    """Renders sections such as `Args:` as lists, and [`Name`] as a link to the object of that name."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        objects = list(_objects(pkg))
        targets = {}
        for obj in objects:
            if not obj.is_module:
                link = f"[{{}}][{obj.path}]" if obj.docstring else "{}"
                parts, module = obj.path.split("."), obj.module.path.split(".")
                targets |= {".".join(parts[start:]): link for start in range(len(module) + 1)}
        for obj in objects:
            if obj.docstring:
                text = _SECTION.sub(_as_list, inspect.cleandoc(obj.docstring.value))
                obj.docstring.value = _REFERENCE.sub(lambda match: _as_link(match[1], targets), text)


def _objects(parent: griffe.Object) -> Iterator[griffe.Object]:
    yield parent
    for member in parent.members.values():
        if not member.is_alias:
            yield from _objects(member)


def _as_list(section: re.Match) -> str:
    """
    A bullet for each item. Indented lines continue the item above, and so do further lines of Returns and Raises.
    """
    items: list[str] = []
    for line in inspect.cleandoc(section[2]).splitlines():
        continues = {"Returns": True, "Yields": True, "Raises": not _EXCEPTION.match(line)}.get(section[1], False)
        if items and (continues or not line or line.startswith(" ")):
            items[-1] += f"\n    {line.strip()}"
        else:
            items.append(line)
    return "\n".join([f"**{section[1]}**\n", *(f"- {item}" for item in items)]) + "\n\n"


def _as_link(name: str, targets: dict[str, str]) -> str:
    """An unknown name becomes a link without a target, which `mkdocs build --strict` refuses."""
    return targets.get(name, f"[{{}}][{name}]").format(f"`{name.rpartition('.')[2]}`")
