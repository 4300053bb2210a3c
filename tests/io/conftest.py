"""Buckets without a network: gs:// and s3:// are folders of this machine, for fsspec and for TensorStore."""

import contextlib
import io
import shutil
from pathlib import Path

import fsspec
import pytest
from fsspec.registry import _registry


class Bucket(fsspec.AbstractFileSystem):
    """An object storage: files appear whole when they are closed, and a folder is there when something is in it.

    Objects lie in the folder `root`, which tests set.
    """

    protocol = ("gs", "gcs", "s3")
    root: Path

    @classmethod
    def _strip_protocol(cls, path):
        return path.partition("://")[2].rstrip("/") if "://" in path else path.strip("/")

    def info(self, path, **_):
        path = self._strip_protocol(path)
        place = self.root / path
        if place.is_file():
            found = place.stat()
            return {"name": path, "size": found.st_size, "type": "file", "generation": found.st_mtime_ns}
        if place.is_dir() and any(file.is_file() for file in place.rglob("*")):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        if self.info(path)["type"] == "file":
            entries = [self.info(path)]
        else:
            entries = []
            for place in sorted((self.root / path).iterdir()):
                with contextlib.suppress(FileNotFoundError):
                    entries.append(self.info(f"{path}/{place.name}"))
        return entries if detail else [entry["name"] for entry in entries]

    def _open(self, path, mode="rb", **_):
        place = self.root / self._strip_protocol(path)
        if mode == "rb":
            if not place.is_file():
                raise FileNotFoundError(path)
            return place.open("rb")
        assert mode == "wb", f"object storage has no mode {mode}"
        return _Upload(place)

    def rm_file(self, path):
        (self.root / self._strip_protocol(path)).unlink()

    def rm(self, path, recursive=False, maxdepth=None):
        place = self.root / self._strip_protocol(path)
        if place.is_dir() and recursive:
            shutil.rmtree(place)
        else:
            place.unlink()

    def makedirs(self, path, exist_ok=False):
        pass

    def mkdir(self, path, create_parents=True, **_):
        pass


class _Upload(io.BytesIO):
    def __init__(self, place: Path):
        super().__init__()
        self._place = place

    def close(self):
        if not self.closed:
            self._place.parent.mkdir(parents=True, exist_ok=True)
            partial = self._place.with_name(self._place.name + ".upload")
            partial.write_bytes(self.getvalue())
            partial.replace(self._place)
        super().close()


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder that stands for all buckets: gs://NAME/x and s3://NAME/x are bucket / "NAME/x"."""
    root = tmp_path / "buckets"
    root.mkdir()
    monkeypatch.setattr(Bucket, "root", root, raising=False)
    for scheme in Bucket.protocol:
        monkeypatch.setitem(_registry, scheme, Bucket)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return root
