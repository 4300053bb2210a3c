"""Buckets without a network: gs:// and s3:// are folders of this machine, for fsspec and for TensorStore."""

import contextlib
import http.server
import io
import json
import re
import shutil
import threading
import urllib.parse
from pathlib import Path

import fsspec
import pytest
from fsspec.registry import _registry
from orbax.checkpoint._src.path import gcs_utils


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


class _Handler(http.server.BaseHTTPRequestHandler):
    """What TensorStore asks of Google Cloud Storage: objects are read, written, listed and deleted."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        place, query = self._asked()
        if place is None:
            return self._list(query)
        if not place.is_file():
            return self._answer(404)
        generation = str(place.stat().st_mtime_ns)
        if query.get("ifGenerationNotMatch") == generation:
            return self._answer(304)
        content = place.read_bytes()
        headers = {"x-goog-generation": generation, "x-goog-stored-content-length": str(len(content))}
        if not (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            return self._answer(200, content, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self._answer(206, content[first : last + 1], headers)

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        parsed = urllib.parse.urlparse(self.path)
        query = dict(urllib.parse.parse_qsl(parsed.query))
        name = f"{parsed.path.split('/')[5]}/{query['name']}"
        place = Bucket.root / name
        generation = str(place.stat().st_mtime_ns) if place.is_file() else "0"
        if query.get("ifGenerationMatch", generation) != generation:
            return self._answer(412)
        with Bucket().open(name, "wb") as file:
            file.write(content)
        return self._describe(name)

    def do_DELETE(self):
        place, _ = self._asked()
        if not place.is_file():
            return self._answer(404)
        place.unlink()
        return self._answer(204)

    def _asked(self):
        """The file of the object that is asked for (None: the request is for a list), and the options."""
        parsed = urllib.parse.urlparse(self.path)
        bucket, _, name = parsed.path.removeprefix("/storage/v1/b/").partition("/o")
        query = dict(urllib.parse.parse_qsl(parsed.query))
        self.bucket = bucket
        return (Bucket.root / bucket / urllib.parse.unquote(name[1:]) if name else None), query

    def _list(self, query):
        folder = Bucket.root / self.bucket
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        first, last = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
        return self._answer(200, json.dumps({"items": [{"name": n} for n in names if first <= n < last]}).encode())

    def _describe(self, name):
        found, (bucket, _, key) = (Bucket.root / name).stat(), name.partition("/")
        about = {"bucket": bucket, "name": key, "size": str(found.st_size), "generation": str(found.st_mtime_ns)}
        return self._answer(200, json.dumps(about).encode())

    def _answer(self, status, content=b"", headers=()):
        self.send_response(status)
        for name, value in {**dict(headers), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture(scope="session")
def _storage_server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def checkpoint_bucket(bucket, monkeypatch, _storage_server):
    """As `bucket`, and Orbax's arrays go there, too: TensorStore, which has a way of its own, asks a local server."""
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", _storage_server)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    return bucket
