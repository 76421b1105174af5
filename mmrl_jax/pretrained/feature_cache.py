"""Features of frozen towers on disk, so that an image is encoded once.

    directory/<tower and preprocessing>/<first two digits>/<image>

Names are hashes. An entry is a BLAKE2b digest of the features in msgpack, and they follow it.
"""

from collections.abc import Callable, Mapping
import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any

from flax.serialization import msgpack_restore, msgpack_serialize
import jax
import numpy as np

DIGEST = 32  # Bytes.


def _digest(*parts: bytes) -> bytes:
    h = hashlib.blake2b(digest_size=DIGEST)
    for part in parts:
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
    return h.digest()


def tower_hash(params: Any, config: Mapping[str, Any]) -> str:
    """Hash of all that a tower's features depend on: its parameters and its config, for JSON."""
    parts = [json.dumps(config, sort_keys=True).encode()]
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        x = np.asarray(x)
        parts += [f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}".encode(), x.tobytes()]
    return _digest(*parts).hex()


class FeatureCache:
    """Features by image, tower and preprocessing.

    Attributes:
      hits: images whose features were read.
      misses: images whose features were computed.
      unreadable: those of the misses that had a damaged entry, which is then replaced.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, tower: str, preprocessing: Mapping[str, Any]
    ):
        """Opens the cache.

        Args:
          directory: made if absent; several processes may share it.
          tower: see `tower_hash`.
          preprocessing: for JSON, all that happens to an image before the tower. A deterministic
            augmentation is its 'augmentation'.
        """
        settings = json.dumps(preprocessing, sort_keys=True).encode()
        self._directory = pathlib.Path(directory) / _digest(tower.encode(), settings).hex()
        self._augmentation = preprocessing.get("augmentation")
        self.hits = self.misses = self.unreadable = 0

    def get_or_compute(
        self,
        images: np.ndarray,
        encode: Callable[[np.ndarray], Mapping[str, Any]],
        *,
        augmentation: str | None = None,
    ) -> dict[str, np.ndarray]:
        """Features of images, computed where they are not on disk.

        Args:
          images: uint8 [B, H, W, C], before preprocessing.
          encode: images [B, H, W, C] -> features by name, [B, ...]. It always gets B images, those
            that are missing and repetitions of them, so that it is compiled once.
          augmentation: id of the augmentation that `encode` applies.

        Returns:
          Features by name, [B, ...].

        Raises:
          ValueError: the images are not uint8 [B, H, W, C], or the augmentation is not that of the
            key, so that features would be read which belong to another one.
        """
        if augmentation != self._augmentation:
            raise ValueError(
                f"augmentation={augmentation!r}, but this cache is of {self._augmentation!r}: "
                "name a deterministic one as preprocessing['augmentation'], and encode randomly "
                "augmented images without a cache."
            )
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}, but must be uint8 [B, H, W, C]."
            )
        shape = str(images.shape[1:]).encode()
        names = [_digest(shape, image.tobytes()).hex() for image in images]
        paths = [self._directory / name[:2] / name for name in names]
        rows = [self._read(path) for path in paths]
        missing = [i for i, row in enumerate(rows) if row is None]
        self.hits += len(rows) - len(missing)
        self.misses += len(missing)
        if missing:
            computed = encode(images[np.resize(missing, len(images))])
            features = {name: np.asarray(x) for name, x in computed.items()}
            for k, i in enumerate(missing):
                row = {name: x[k] for name, x in features.items()}
                _write(paths[i], row)
                rows[i] = row
        return jax.tree.map(lambda *xs: np.stack(xs), *rows)

    def _read(self, path: pathlib.Path) -> dict[str, np.ndarray] | None:
        try:
            entry = path.read_bytes()
        except FileNotFoundError:
            return None
        digest, payload = entry[:DIGEST], entry[DIGEST:]
        if _digest(payload) != digest:
            self.unreadable += 1
            return None
        return msgpack_restore(payload)


def _write(path: pathlib.Path, features: Mapping[str, np.ndarray]) -> None:
    """Writes an entry under another name first, so that no reader finds half of one."""
    payload = msgpack_serialize(dict(features))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(_digest(payload) + payload)
    os.replace(file.name, path)
