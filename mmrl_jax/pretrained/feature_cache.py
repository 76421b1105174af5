"""A cache on disk of the features of frozen towers, so that each image is encoded once.

    directory/<tower and preprocessing>/<first two digits>/<image>

File names are hashes. An entry has a BLAKE2b digest of its payload, followed by the payload, which
is the features in msgpack.
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

DIGEST = 32  # Length of a digest in bytes.


def _digest(*parts: bytes) -> bytes:
    h = hashlib.blake2b(digest_size=DIGEST)
    for part in parts:
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
    return h.digest()


def tower_hash(params: Any, config: Mapping[str, Any]) -> str:
    """Returns a hash of all that determines a tower's features.

    Args:
      params: Parameters of the tower.
      config: Configuration of the tower, in values that JSON supports.

    Returns:
      Hash in hexadecimal digits.
    """
    parts = [json.dumps(config, sort_keys=True).encode()]
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        x = np.asarray(x)
        parts += [f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}".encode(), x.tobytes()]
    return _digest(*parts).hex()


class FeatureCache:
    """A cache of features by image, tower and preprocessing.

    Attributes:
      hits: Number of images whose features were read.
      misses: Number of images whose features were computed.
      unreadable: Number of the misses that had a damaged entry, which was then replaced.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, tower: str, preprocessing: Mapping[str, Any]
    ):
        """Opens the cache.

        Args:
          directory: Directory of the cache, created if absent; several processes may share it.
          tower: Hash of the tower, see `tower_hash`.
          preprocessing: Settings of all processing before the tower, in values that JSON supports.
            The key 'augmentation' is the id of a deterministic augmentation.
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
        """Returns the features of images, and computes those that are not on disk.

        Args:
          images: Images before preprocessing, uint8 [B, H, W, C].
          encode: Function from images uint8 [B, H, W, C] to features by name, [B, ...]. It always
            gets B images, the missing ones and repetitions of them, so that it compiles once.
          augmentation: Id of the augmentation that `encode` applies; None for no augmentation.

        Returns:
          Features by name, [B, ...].

        Raises:
          ValueError: The images are not uint8 [B, H, W, C], or the augmentation is not that of the
            cache, which would then return features of a different augmentation.
        """
        if augmentation != self._augmentation:
            raise ValueError(
                f"augmentation={augmentation!r}, but this cache has {self._augmentation!r}: "
                "set a deterministic one as preprocessing['augmentation'], and encode randomly "
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
    """Writes an entry under a temporary name first, so that no reader gets a partial file."""
    payload = msgpack_serialize(dict(features))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(_digest(payload) + payload)
    os.replace(file.name, path)
