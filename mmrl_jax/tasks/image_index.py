"""A cache on disk of the properties of the image files of a folder.

The check of an image decodes it completely, which takes hours for a million images. A file with
unchanged modification time and size is not decoded again, nor is an image in a table whose bytes
have a known digest.

    ~/.cache/mmrl_jax/images/<digest of the folder's path>.json     or in $XDG_CACHE_HOME

Files that cannot be used are not cached, because the failure may have been one of the disk. If the
cache cannot be written, or is damaged, all images are decoded.
"""

from collections.abc import Callable
import contextlib
import hashlib
import json
import os
import pathlib
import threading

from mmrl_jax.data import files
from mmrl_jax.data.images import ImageInfo

# Version of the entries, and of the rules that decide whether an image can be used.
VERSION = 1


class ImageIndex:
    """Cached properties of the images of one folder, with thread-safe look-ups.

    Hazard: a file that is rewritten with the same size within the resolution of the file system's
    clock counts as unchanged, as with make.

    Args:
      root: Directory of the folder.
      read: Decodes the bytes of a file and returns the properties of the image; raises if the image
        cannot be used.
    """

    def __init__(self, root: pathlib.Path, read: Callable[[bytes], ImageInfo]):
        import PIL

        self._root, self._read = root, read
        self._version = [VERSION, PIL.__version__, str(root)]
        self._path: pathlib.Path | None = None
        with contextlib.suppress(RuntimeError):
            name = hashlib.blake2b(str(root).encode(), digest_size=16).hexdigest()
            self._path = files.cache_directory() / "images" / f"{name}.json"
        self._entries = self._load()
        self._changed = False
        # Records that share an image may look it up concurrently; it is decoded only once.
        self._locks = [threading.Lock() for _ in range(64)]

    def look_up(self, path: pathlib.Path) -> ImageInfo:
        """Returns the properties of an image file of the folder.

        Raises:
          OSError: If the file does not exist or cannot be read.
          Exception: Any exception that `read` raises.
        """
        name, stat = str(path.relative_to(self._root)), path.stat()
        return self._look_up(name, (stat.st_mtime_ns, stat.st_size), path.read_bytes)

    def look_up_data(self, data: bytes) -> ImageInfo:
        """Returns the properties of an encoded image, which is known by a digest of its bytes.

        Raises:
          Exception: Any exception that `read` raises.
        """
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        return self._look_up(f"digest:{digest}", (0, len(data)), lambda: data)

    def _look_up(self, name: str, stamp: tuple[int, int], data: Callable[[], bytes]) -> ImageInfo:
        with self._locks[hash(name) % len(self._locks)]:
            if name in self._entries and self._entries[name][0] == stamp:
                return self._entries[name][1]
            info = self._read(data())
            self._entries[name] = stamp, info
            self._changed = True
            return info

    def save(self) -> None:
        """Writes the cache atomically; does nothing if it cannot be written."""
        if self._path is None or not self._changed:
            return
        images = {name: [*stamp, *info] for name, (stamp, info) in self._entries.items()}
        # The name is unique to the process, because processes of one run may write concurrently.
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_text(json.dumps({"version": self._version, "images": images}))
                temporary.replace(self._path)
            finally:
                temporary.unlink(missing_ok=True)  # It still exists if, say, the disk is full.
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
