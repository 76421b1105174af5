"""What is known of the image files of a folder, kept on disk from one process to the next.

To know that an image can be used, it is decoded as a whole, which takes hours for a million of
them. A file whose time of change and size are those that it had then is not decoded again.

    ~/.cache/mmrl_jax/images/<digest of the folder's path>.json     or in $XDG_CACHE_HOME

A file that cannot be used is not kept: what failed may have been the disk. Where nothing can be
written, or where what is written there is damaged, everything is decoded, as in a first process.
"""

from collections.abc import Callable
import contextlib
import hashlib
import json
import os
import pathlib
import threading

from mmrl_jax.tasks.images import ImageInfo

# Of what an entry holds, and of the rules by which an image can be used.
VERSION = 1


def cache_directory() -> pathlib.Path:
    """Where indices are kept.

    Raises:
      RuntimeError: the user has no home directory.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(cache) if cache else pathlib.Path.home() / ".cache") / "mmrl_jax/images"


class ImageIndex:
    """The index of one folder; several threads may look up files at the same time.

    Hazard: a file that is rewritten with equal size within the resolution of the file system's
    clock is taken for the one before, as by make.

    Args:
      root: the folder.
      read: decodes a file: bytes -> what is known of the image; raises if it cannot be used.
    """

    def __init__(self, root: pathlib.Path, read: Callable[[bytes], ImageInfo]):
        import PIL

        self._root, self._read = root, read
        self._version = [VERSION, PIL.__version__, str(root)]
        self._path: pathlib.Path | None = None
        with contextlib.suppress(RuntimeError):
            name = hashlib.blake2b(str(root).encode(), digest_size=16).hexdigest()
            self._path = cache_directory() / f"{name}.json"
        self._known = self._load()
        self._changed = False
        # Several records of one image are looked up at the same time, and it is decoded once.
        self._locks = [threading.Lock() for _ in range(64)]

    def look_up(self, path: pathlib.Path) -> ImageInfo:
        """What is known of an image file of the folder.

        Raises:
          OSError: there is no such file, or it cannot be read.
          Exception: as `read` does.
        """
        name, stat = str(path.relative_to(self._root)), path.stat()
        written = (stat.st_mtime_ns, stat.st_size)
        with self._locks[hash(name) % len(self._locks)]:
            if name in self._known and self._known[name][0] == written:
                return self._known[name][1]
            info = self._read(path.read_bytes())
            self._known[name] = written, info
            self._changed = True
            return info

    def save(self) -> None:
        """Writes the index in one atomic replacement; where it cannot be written, nothing."""
        if self._path is None or not self._changed:
            return
        images = {name: [*written, *info] for name, (written, info) in self._known.items()}
        # Processes of one run may write at the same time.
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_text(json.dumps({"version": self._version, "images": images}))
                temporary.replace(self._path)
            finally:
                temporary.unlink(missing_ok=True)  # What a full disk has cut off.
            self._changed = False

    def _load(self) -> dict[str, tuple[tuple[int, int], ImageInfo]]:
        if self._path is None:
            return {}
        try:
            stored = json.loads(self._path.read_bytes())
            if stored["version"] != self._version:
                return {}
            return {
                str(name): (
                    (int(time), int(size)),
                    ImageInfo(str(digest), str(mode), int(width), int(height)),
                )
                for name, (time, size, digest, mode, width, height) in stored["images"].items()
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}
