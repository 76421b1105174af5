"""Files of data sets: atomic writing, fingerprints of directories, and the cache on this machine.

    ~/.cache/mmrl_jax/files/<digest of the path>.json     digests of the files of a directory
    ~/.cache/mmrl_jax/demonstrations/<digest>/            arrays that were read, see `packed`

$XDG_CACHE_HOME replaces ~/.cache. Everything in the cache can be deleted at any time.
"""

from collections.abc import Iterator
import contextlib
import hashlib
import json
import os
import pathlib

BLOCK = 1 << 22  # Number of bytes that are hashed at a time.


def cache_directory() -> pathlib.Path:
    """Returns the directory of the cache.

    Raises:
      RuntimeError: If the home directory of the user cannot be determined.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(cache) if cache else pathlib.Path.home() / ".cache") / "mmrl_jax"


@contextlib.contextmanager
def atomic(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives the path of a temporary file, which replaces `path` when the context is left.

    A process that is killed leaves either no file or the whole file. The temporary file is hidden,
    so that no reader of the data set finds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporary(directory: pathlib.Path) -> None:
    """Removes the temporary files that killed processes left in a directory."""
    for path in directory.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def digest(*parts: object) -> str:
    """Returns a digest of the `repr` of objects, as 32 hexadecimal digits."""
    result = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = repr(part).encode("utf-8", "surrogatepass")
        result.update(len(data).to_bytes(8, "little") + data)
    return result.hexdigest()


def fingerprint(directory: pathlib.Path) -> str:
    """Returns a digest of the names and contents of all files in a directory.

    Hidden files are left out. The digest of a file is cached by its size and modification time, so
    that a large data set is read once.

    Hazard: a file that is rewritten with the same size within the resolution of the file system's
    clock counts as unchanged, as with make.
    """
    root = directory.resolve()
    index: pathlib.Path | None = None
    with contextlib.suppress(RuntimeError):
        index = cache_directory() / "files" / f"{digest(str(root))}.json"
    known = _load(index)
    entries: dict[str, list] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        entry = known.get(name.as_posix())
        content = entry[2] if entry is not None and entry[:2] == stamp else file_digest(path)
        entries[name.as_posix()] = [*stamp, content]
    if index is not None and entries != known:
        with contextlib.suppress(OSError):  # Without the cache, the files are read again.
            write_text(index, json.dumps(entries))
    return digest(sorted((name, content) for name, (_, _, content) in entries.items()))


def file_digest(path: pathlib.Path) -> str:
    """Returns a digest of the contents of a file, as 32 hexadecimal digits."""
    result = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            result.update(block)
    return result.hexdigest()


def _load(index: pathlib.Path | None) -> dict[str, list]:
    try:
        entries = json.loads(index.read_bytes()) if index is not None else {}
        valid = all(len(x) == 3 and isinstance(x[2], str) for x in entries.values())
        return entries if valid else {}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
