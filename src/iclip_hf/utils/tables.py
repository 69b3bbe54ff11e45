"""Names that people type, and tables for a terminal and in Markdown."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


def known(name: str, names: Iterable[str], kind: str) -> str:
    """
    Returns the one of `names` that is meant. Upper and lower case count as equal, and so do "-" and "_". Raises
    `ValueError` for any other name, see [`unknown`].
    """
    names = [*names]
    if name in names:  # also one of two names that differ in case alone
        return name
    meant = {_folded(choice): choice for choice in names}
    if _folded(name) not in meant:
        raise ValueError(unknown(name, names, kind))
    return meant[_folded(name)]


def unknown(name: str, names: Iterable[str], kind: str) -> str:
    """
    Returns the sentence about a name that is none of `names`, with the most similar one. `kind` says what the names
    are, such as "method".
    """
    meant = {_folded(choice): choice for choice in names}
    similar = get_close_matches(_folded(name), meant, n=1, cutoff=0.5)
    question = f"; did you mean {meant[similar[0]]!r}?" if similar else "."
    return f"There is no {kind} {name!r}{question} Choose one of {', '.join(meant.values())}."


def _folded(name: str) -> str:
    return str(name).lower().replace("-", "_")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool = False) -> list[str]:
    """
    Returns the lines of a table with aligned columns, in Markdown or for a terminal. For a terminal, the first column
    is aligned left and the others right. Columns whose cells are all empty are left out. In Markdown, a "|" in a
    cell is escaped.
    """
    columns = [[*column] for column in zip(headings, *rows) if any(column[1:])]
    if markdown:
        columns = [[cell.replace("|", r"\|") for cell in column] for column in columns]
        for column in columns:
            column.insert(1, "-" * max(3, *map(len, column)))
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*columns)
    if markdown:
        return [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines]
    aligned = ([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])] for first, *others in lines)
    return ["  ".join(["", *cells]) for cells in aligned]
