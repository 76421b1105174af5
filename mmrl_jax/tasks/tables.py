"""Finds the tables of a data set in a directory, and reads their rows one by one.

metadata.jsonl                       imagefolder: a line of JSON for each record
train.jsonl                          a line of JSON for each record, as for TRL
data/train-00000-of-00002.parquet    rows with encoded images, as the hub stores them
"""

import bisect
from collections import OrderedDict
from collections.abc import Callable, Mapping
import functools
import hashlib
import itertools
import json
import pathlib
import threading
from typing import Any

from mmrl_jax.data import lerobot
from mmrl_jax.tasks.samples import short_repr

METADATA, FILES_OPTION = "metadata.jsonl", "dataset.files"
# Patterns of the tables of a directory; the first one with a match is that of its tables.
PATTERNS = (METADATA, "*.jsonl", "*.parquet", "data/*.parquet")
# A row is read with its row group. Those that were read last are kept in so much memory.
MAX_GROUP_BYTES = 2**30

Row = Callable[[], Mapping[str, Any]]


def find_tables(
    root: pathlib.Path, files: str | None, *, option: str = FILES_OPTION
) -> list[pathlib.Path]:
    """Returns the paths of the tables of a data set, sorted by name.

    Args:
      root: Directory of the data set.
      files: Pattern of the paths of its tables relative to the directory; None for the first of
        `PATTERNS` that matches.
      option: Name of the option that has `files`, for messages.

    Raises:
      ValueError: If there is no table, one is of an unknown format, or without `files` there are
        tables of several splits.
    """
    path = pathlib.PurePath(files or "")
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{option}={files!r} must be relative to the directory and in it.")
    patterns = PATTERNS if files is None else (files,)
    paths = next(filter(None, (sorted(root.glob(pattern)) for pattern in patterns)), [])
    if not paths:
        raise ValueError(
            f"{root / METADATA} does not exist; write a line of JSON with file_name, prompt and "
            "answer for each image, or give a directory with *.jsonl or *.parquet files."
            if files is None
            else f"{option}={files!r} matches no file in {root}; correct the pattern."
        )
    for path in paths:
        if path.suffix not in READERS:
            raise ValueError(f"{path} is a table of unknown format; use {', '.join(READERS)}.")
    # Names such as train-00000-of-00002.parquet begin with the split; 0000.parquet has none.
    splits = sorted({path.stem.partition("-")[0].rstrip("0123456789") for path in paths})
    if files is None and len(splits) > 1:
        example = paths[0].relative_to(root).with_name(f"{splits[0]}*{paths[0].suffix}")
        raise ValueError(
            f"{root} has the tables {short_repr([path.name for path in paths])}; choose those of "
            f"one split with {option}, for example '{example}'."
        )
    return paths


class RowGroups:
    """The row groups in memory of all tables of a folder, with thread-safe look-ups.

    The last ones are kept, of at most `MAX_GROUP_BYTES` bytes together, or one.
    """

    def __init__(self) -> None:
        # Each table with its number of bytes, by its file and number.
        self._groups: OrderedDict[tuple[pathlib.Path, int], tuple[Any, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: tuple[pathlib.Path, int], read: Callable[[], Any]) -> Any:
        """Returns a row group, which is read if it is not in memory.

        Args:
          key: Path of the file, and number of the row group in it.
          read: Reads the row group as a pyarrow.Table.
        """
        with self._lock:  # Neighboring rows are read by several threads.
            if key not in self._groups:
                table = read()
                self._groups[key] = table, table.nbytes
                self._bytes += table.nbytes
            self._groups.move_to_end(key)
            while self._bytes > MAX_GROUP_BYTES and len(self._groups) > 1:
                _, (_, size) = self._groups.popitem(last=False)
                self._bytes -= size
            return self._groups[key][0]


def read_rows(path: pathlib.Path, groups: RowGroups) -> dict[int, Row]:
    """Returns a function that reads a row, by the number of the row or line counted from 1.

    Args:
      path: Path of the table.
      groups: Row groups in memory, which the tables of a folder share.

    Raises:
      ValueError: If the extra `data` (pyarrow) is not installed, which reads parquet, the file is
        not parquet, or its row groups are too large to read at once.
    """
    return READERS[path.suffix](path, groups)


def fingerprint(path: pathlib.Path) -> bytes:
    """Returns the contents of a table of text, and a digest of one in parquet."""
    if path.suffix == ".jsonl":
        return path.read_bytes()
    with path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).digest()


def _json_rows(path: pathlib.Path, groups: RowGroups) -> dict[int, Row]:
    # Lines are split as bytes: str.splitlines() would also split at U+2028, which may occur within
    # a line of JSON, and invalid UTF-8 in one record would make the whole file unreadable.
    lines = enumerate(path.read_bytes().split(b"\n"), start=1)
    return {number: functools.partial(_json_row, line) for number, line in lines if line.strip()}


def _json_row(line: bytes) -> dict[str, Any]:
    columns = json.loads(line)
    if not isinstance(columns, dict):
        raise ValueError(f"{short_repr(columns)} is not an object; write {{...}}.")
    return columns


def _parquet_rows(path: pathlib.Path, groups: RowGroups) -> dict[int, Row]:
    table = _Parquet(path, groups)
    return {i + 1: functools.partial(table.row, i) for i in range(table.length)}


class _Parquet:
    """Rows of a parquet file in any order."""

    def __init__(self, path: pathlib.Path, in_memory: RowGroups):
        try:
            arrow, parquet = lerobot.import_pyarrow(path)
        except ImportError as error:
            raise ValueError(str(error)) from error
        try:
            self._file = parquet.ParquetFile(path)
        except arrow.ArrowInvalid as error:
            raise ValueError(f"{path} cannot be read ({error}); write it again.") from error
        metadata = self._file.metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > MAX_GROUP_BYTES:
            raise ValueError(
                f"{path} has a row group of {largest} bytes, which would be in memory at once; "
                "write it again with smaller ones: pyarrow.parquet.write_table(table, path, "
                "row_group_size=100)."
            )
        # Number of the first row of each row group, and the number of all rows.
        self._starts = [0, *itertools.accumulate(group.num_rows for group in groups)]
        self._path, self._in_memory = path, in_memory

    @property
    def length(self) -> int:
        """Number of rows."""
        return self._starts[-1]

    def row(self, number: int) -> dict[str, Any]:
        """Returns a row as Python values."""
        group = bisect.bisect_right(self._starts, number) - 1
        read = functools.partial(self._file.read_row_group, group)
        table = self._in_memory.get((self._path, group), read)
        (row,) = table.slice(number - self._starts[group], 1).to_pylist()
        return row


READERS: dict[str, Callable[[pathlib.Path, RowGroups], dict[int, Row]]] = {
    ".jsonl": _json_rows,
    ".parquet": _parquet_rows,
}
