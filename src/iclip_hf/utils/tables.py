"""Tables for a terminal and in Markdown."""

from collections.abc import Sequence


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
