"""What is replaced under the same name is noticed, and a copy that keeps times is the same: every source and cache."""

import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from lpl_jax.data import FolderSource, LatentStore, open_source, write_store
from lpl_jax.errors import InputError
from lpl_jax.io.fingerprints import fingerprint_files
from lpl_jax.tools import sweep


def png(value):
    encoded = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(encoded, "PNG", compress_level=0)
    return encoded.getvalue()


def images_of(root, tars):
    (root / "a").mkdir(parents=True)
    for number in range(3):
        (root / f"a/{number}.png").write_bytes(png(number))
    return str(root)


def captions_of(root, tars):
    images_of(root, tars)
    for number in range(3):
        (root / f"a/{number}.txt").write_text(f"photo {number}")
    return str(root)


def shards_of(root, tars):
    root.mkdir()
    for number in range(3):
        (root / f"{number}.tar").write_bytes(tars.of(tars.sample("k", f"photo {number}", number)))
    return str(root)


# Name -> (how it is made, a file in it, options of `open_source`).
SOURCES = {
    "images": (images_of, "a/1.png", {}),
    "captions": (captions_of, "a/1.txt", {"captions": ("txt",)}),
    "a subset": (images_of, "a/1.png", {"limit": 2}),
    "tar files": (shards_of, "1.tar", {"captions": ("txt",)}),
}


def replace(path):
    """Other content of the same size, at another time."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))
    assert path.stat().st_size == len(content)


@pytest.mark.parametrize("identity", ["times", "content"])
@pytest.mark.parametrize("name", SOURCES)
def test_a_source_is_its_content(tmp_path, tars, name, identity):
    make, file, options = SOURCES[name]

    def seen(root):
        return open_source(str(root), 16, identity=identity, **options).fingerprint

    make(tmp_path / "one", tars)
    before = seen(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copy2)
    assert seen(tmp_path / "two") == before, "a copy that keeps times"
    os.utime(tmp_path / "two" / file, ns=(1, 1))
    assert (seen(tmp_path / "two") == before) == (identity == "content"), "another time"
    replace(tmp_path / "one" / file)
    assert seen(tmp_path / "one") != before, "another content of the same size"


def test_what_a_source_does_not_read_does_not_count(tmp_path, tars):
    captions_of(tmp_path / "one", tars)
    before = FolderSource(tmp_path / "one", 16).fingerprint
    replace(tmp_path / "one/a/1.txt")
    assert FolderSource(tmp_path / "one", 16).fingerprint == before


def test_a_file_that_is_not_there_is_another_state(tmp_path):
    (tmp_path / "a").write_text("")
    files = {"a": str(tmp_path / "a")}
    for identity in ("times", "content"):
        (tmp_path / "a").touch()
        there = fingerprint_files(files, identity)
        (tmp_path / "a").unlink()
        assert fingerprint_files(files, identity) != there
    with pytest.raises(InputError, match="identity='names'; possible: times, content"):
        fingerprint_files(files, "names")


@pytest.mark.parametrize("name", ["images", "captions", "tar files"])
@pytest.mark.parametrize("complete", [True, False])
def test_a_store_is_not_gone_on_with_when_its_source_has_changed(tmp_path, tars, autoencoder, name, complete):
    make, file, options = SOURCES[name]
    spec, out = make(tmp_path / "source", tars), tmp_path / "store"

    def stop(images):
        if images and len(LatentStore(out, partial=True)):
            raise KeyboardInterrupt

    def write(spec, **more):
        return write_store(out, open_source(spec, 16, **options), autoencoder, batch_size=1, shard_records=1, **more)

    if complete:
        write(spec)
    else:
        with pytest.raises(KeyboardInterrupt):
            write(spec, on_progress=stop)
    before = sorted(path.name for path in out.iterdir())
    replace(tmp_path / "source" / file)
    with pytest.raises(InputError, match="have changed since: other change times; delete this store, or give another"):
        write(spec)
    assert sorted(path.name for path in out.iterdir()) == before
    shutil.copytree(tmp_path / "source", tmp_path / "moved", copy_function=shutil.copy2)
    with pytest.raises(InputError, match="already holds another latent store"):
        write(str(tmp_path / "moved"))


def test_a_store_of_a_moved_source_is_gone_on_with(tmp_path, tars, autoencoder):
    images_of(tmp_path / "one", tars)
    first = write_store(tmp_path / "store", FolderSource(tmp_path / "one", 16), autoencoder)
    (tmp_path / "one").rename(tmp_path / "two")
    again = write_store(tmp_path / "store", FolderSource(tmp_path / "two", 16), autoencoder)
    assert again.identity == first.identity


def test_stores_of_one_source_are_the_same_images_and_of_another_are_not(tmp_path, tars, autoencoder):
    images_of(tmp_path / "one", tars)
    source = FolderSource(tmp_path / "one", 16)
    store = write_store(tmp_path / "a", source, autoencoder)
    again = write_store(tmp_path / "b", source, autoencoder, shard_records=2)
    assert again.identity.records != store.identity.records and again.identity.same_images(store.identity)
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    assert LatentStore(tmp_path / "moved").identity == store.identity
    assert not write_store(tmp_path / "c", source, autoencoder, dtype="float32").identity.same_images(store.identity)
    replace_image = tmp_path / "one/a/1.png"
    replace_image.write_bytes(png(99))
    other = write_store(tmp_path / "d", FolderSource(tmp_path / "one", 16), autoencoder)
    assert not other.identity.same_images(store.identity) and not store.identity.same_images(other.identity)


def test_a_store_of_a_version_that_knew_names_alone_is_not_taken_for_the_same(tmp_path, tars, autoencoder):
    images_of(tmp_path / "one", tars)
    write_store(tmp_path / "a", FolderSource(tmp_path / "one", 16), autoencoder)
    fields = json.loads((tmp_path / "a/manifest.json").read_text())
    del fields["checksum"]
    fields |= {"source_fingerprint": 64 * "0", "source_identity": None}
    (tmp_path / "a/manifest.json").write_text(json.dumps(fields))
    assert LatentStore(tmp_path / "a").identity.images is None
    with pytest.raises(InputError, match="an earlier version made it, which noted their names alone"):
        write_store(tmp_path / "a", FolderSource(tmp_path / "one", 16), autoencoder)


def test_a_reference_that_was_replaced_is_evaluated_against_again(tmp_path, tars):
    spec = images_of(tmp_path / "one", tars)
    before = sweep._reference(["lpl", "eval", f"--reference={spec}"])
    assert sweep._reference(["lpl", "eval", f"--reference={spec}"]) == before
    replace(tmp_path / "one/a/1.png")
    assert sweep._reference(["lpl", "eval", f"--reference={spec}"]) != before
    assert sweep._reference(["lpl", "eval"]) is None
