"""TFRecord files without TensorFlow, and their conversion to array_record.

A file is a sequence of records, without a header (tensorflow.org/tutorials/load_data/tfrecord):

    uint64   length           little-endian
    uint32   masked CRC-32C of the length
    bytes    data [length]
    uint32   masked CRC-32C of the data
"""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import shutil
import struct

from mmrl_jax.data import files, tfds_files
from mmrl_jax.data.crc32c import masked_crc32c
from mmrl_jax.data.records import Invalid, InvalidData, Quarantine

HEADER, FOOTER = struct.Struct("<QI"), struct.Struct("<I")


class Shard:
    """Random access to the records of a TFRecord file, whose checksums are verified.

    The headers of all records are read when the file is opened. The index ends at the first header
    that is damaged, because the place of the next record is then unknown.

    Attributes:
      damage: Why the index ends before the end of the file; None if it does not.

    Args:
      path: Path of the file.

    Raises:
      OSError: If the file cannot be read.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._records: list[tuple[int, int]] = []  # Offset and length of the data of each record.
        self.damage: Invalid | None = None
        size, offset = path.stat().st_size, 0
        with path.open("rb") as file:
            while offset < size and self.damage is None:
                file.seek(offset)
                header, place = file.read(HEADER.size), f"byte {offset} of {path.name}"
                if len(header) < HEADER.size:
                    self.damage = Invalid("truncated shard", f"{place}: the file ends.")
                    break
                length, checksum = HEADER.unpack(header)
                end = offset + HEADER.size + length + FOOTER.size
                if masked_crc32c(header[:8]) != checksum:
                    self.damage = Invalid(
                        "damaged shard", f"{place}: the checksum of the length is wrong."
                    )
                elif end > size:
                    self.damage = Invalid(
                        "truncated shard", f"{place}: a record of {length} bytes is cut off."
                    )
                else:
                    self._records.append((offset + HEADER.size, length))
                    offset = end

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> bytes:
        """Returns the data of a record.

        Raises:
          Invalid: If the file has no such record, or its checksum is wrong.
        """
        if index >= len(self):
            raise self.damage or Invalid(
                "truncated shard", f"{self._path.name} has {len(self)} records only."
            )
        offset, length = self._records[index]
        with self._path.open("rb") as file:
            file.seek(offset)
            data = file.read(length + FOOTER.size)
        (checksum,) = FOOTER.unpack(data[length:])
        if masked_crc32c(data[:length]) != checksum:
            raise Invalid(
                "damaged shard",
                f"record {index} of {self._path.name}: the checksum of the data is wrong.",
            )
        return data[:length]


def to_array_record(directory: str | os.PathLike, output: str | os.PathLike) -> Quarantine:
    """Converts a TFDS data set of TFRecord files to array_record, with the same records.

    `tfds.data_source` reads only the latter. Files that exist in `output` are not written again, so
    that an interrupted conversion can be resumed.

    Args:
      directory: Directory of one version of the data set, with a dataset_info.json.
      output: Directory of the result, which is created.

    Returns:
      The records that could not be read, which the result does not have.

    Raises:
      ImportError: If array-record is not installed.
      InvalidData: If the directory has no data set of TFRecord files.
    """
    module = tfds_files.import_array_record(directory)
    source, target, quarantine = pathlib.Path(directory), pathlib.Path(output), Quarantine()
    info = tfds_files.read_info(source)
    if info["fileFormat"] != "tfrecord":
        raise InvalidData(f"{source} has files of the format {info['fileFormat']}, not tfrecord.")
    for split in info["splits"]:
        old = tfds_files.shards(source, info, split["name"], "tfrecord")
        split["filepathTemplate"] = tfds_files.TEMPLATE
        new = tfds_files.shards(target, info, split["name"], "array_record")
        kept = []
        for path, result, declared in zip(old.paths, new.paths, old.lengths, strict=True):
            if not result.exists():
                with files.atomic(result) as temporary:
                    writer = module.ArrayRecordWriter(str(temporary), "group_size:1")
                    for record in _valid_records(path, declared):
                        writer.write(record)
                    writer.close()
            kept.append(module.ArrayRecordReader(str(result)).num_records())
            lost = Invalid("damaged shard", f"{kept[-1]} of {declared} records can be read.")
            for _ in range(declared - kept[-1]):
                quarantine.add(path.name, lost)
        split["shardLengths"] = [str(x) for x in kept]
    for path in (*source.glob("*.json"), *source.glob("*.txt")):  # Features, names of labels.
        shutil.copy(path, target / path.name)
    text = json.dumps(info | {"fileFormat": "array_record"}, indent=2)
    files.write_text(target / tfds_files.INFO, text)
    return quarantine


def _valid_records(path: pathlib.Path, declared: int) -> Iterator[bytes]:
    """Yields the undamaged records of a file, which may be missing."""
    if not path.is_file():
        return
    shard = Shard(path)
    for index in range(declared):
        with contextlib.suppress(Invalid):
            yield shard.read(index)
