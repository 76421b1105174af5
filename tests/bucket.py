"""A local directory that acts as a gs:// bucket for epath and for the arrays that Orbax writes."""

import os
import shutil

from etils.epath import backend, gpath
from orbax.checkpoint._src.path import gcs_utils


class _Backend(backend._OsPathBackend):
    """Maps file operations on the paths of a bucket to a local directory."""

    def __init__(self, root):
        self.root = str(root)

    def local(self, path):
        path = os.fspath(path)
        assert path.startswith("gs://"), f"{path} is outside of the bucket"
        return os.path.join(self.root, path.removeprefix("gs://"))

    def open(self, path, mode):
        assert "a" not in mode, "nothing can be appended to an object"
        return super().open(self.local(path), mode)

    def exists(self, path):
        return os.path.exists(self.local(path))

    def isdir(self, path):
        return os.path.isdir(self.local(path))

    def listdir(self, path):
        return os.listdir(self.local(path))

    def glob(self, path):
        return [f"gs://{os.path.relpath(x, self.root)}" for x in super().glob(self.local(path))]

    def walk(self, top, **options):
        for directory, *names in super().walk(self.local(top), **options):
            yield f"gs://{os.path.relpath(directory, self.root)}", *names

    def makedirs(self, path, *, exist_ok=False, mode=None):
        os.makedirs(self.local(path), exist_ok=exist_ok)

    mkdir = makedirs

    def rmtree(self, path):
        shutil.rmtree(self.local(path))

    def remove(self, path):
        os.remove(self.local(path))

    def rename(self, path, dst):
        os.rename(self.local(path), self.local(dst))

    replace = rename

    def copy(self, path, dst, overwrite):
        shutil.copyfile(self.local(path), self.local(dst))

    def stat(self, path):
        return super().stat(self.local(path))


def install(monkeypatch, root):
    """Maps gs://name to the directory `root`/name while the patch is active."""
    fake = _Backend(root)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", fake)
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    monkeypatch.setattr(
        gcs_utils,
        "get_kvstore_for_gcs",
        lambda path: {"driver": "file", "path": fake.local(path)},
    )
