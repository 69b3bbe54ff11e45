"""Text files with a row in each line: .csv, .tsv and .jsonl."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ..columns import LABEL_COLUMNS, Columns
from .source import PackedRows, Source


TABLES = (".csv", ".tsv", ".jsonl")
METADATA = ("metadata.jsonl", "metadata.csv")  # the table of a folder, as in an `imagefolder` of `datasets`


def read_table(path: Path, columns: Columns) -> Source:
    """
    Reads a text file in UTF-8: .csv or .tsv (without quoting) with a header line, or .jsonl. Fields of a .csv are
    separated by ",", ";" or tab, whichever is most frequent in its header. Raises `ValueError` if a line is no row, or
    there is no column of images or captions.
    """
    rows, image_names, found_columns = PackedRows(), PackedRows(), {}
    read = _json_rows if path.suffix.lower() == ".jsonl" else _csv_rows
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for row in read(file):
                found_columns |= dict.fromkeys(row)  # of all rows, because rows of a .jsonl may have different ones
                name = next((row[column] for column in columns.image if row.get(column)), None)
                image_names.append(name if isinstance(name, str) else None)
                rows.append({column: row[column] for column in (*columns.caption, *LABEL_COLUMNS) if column in row})
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: this table is not UTF-8 ({error}); save it as UTF-8.") from error
    if rows:
        columns.check(path, found_columns)
    return Source(path, path.parent, columns, rows, image_names, [path])


def _json_rows(file: TextIO) -> Iterator[dict]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"{row!r:.100}")  # the end of the sentence below
            except ValueError as error:
                raise ValueError(f"{file.name}, line {number}: this is no JSON object: {error}.") from error
            yield row


def _csv_rows(file: TextIO) -> Iterator[dict]:
    dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    if file.name.lower().endswith(".csv"):
        dialect = {"delimiter": max(",;\t", key=file.readline().count), "skipinitialspace": True, "strict": True}
        file.seek(0)
    lines = csv.reader(file, **dialect)
    try:
        header = next(lines, [])
        if twice := [name for name in filter(None, header) if header.count(name) > 1]:
            raise csv.Error(f"the header names the column {twice[0]!r} twice; rename one of them")
        for fields in filter(None, lines):
            if len(fields) != len(header):
                raise csv.Error(f"{len(fields)} fields instead of {len(header)}; text with a separator needs quotes")
            yield dict(zip(header, fields))
    except csv.Error as error:
        raise ValueError(f"{file.name}, line {lines.line_num}: this is no row of the table: {error}.") from error
