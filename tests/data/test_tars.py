"""Samples of tar files: which members belong together, and every way in which people pack them."""

import bz2
import gzip
import io
import lzma
import random
import tarfile

import fsspec
import pytest

from lpl_jax.data.tar_files import seekable
from lpl_jax.data.tars import Sample, read_tar
from lpl_jax.errors import InputError

MOST = 2**20  # bytes of a member


def tar(*members, form=tarfile.PAX_FORMAT):
    """A tar file of names (their content is the name) or of (name, kind, target) of links."""
    encoded = io.BytesIO()
    with tarfile.open(fileobj=encoded, mode="w", format=form) as opened:
        for name, *link in (member if isinstance(member, tuple) else (member,) for member in members):
            info = tarfile.TarInfo(name)
            if link:
                info.type, info.linkname = link
            info.size = 0 if link else len(name.encode())
            opened.addfile(info, io.BytesIO(name.encode()))
    return encoded.getvalue()


def read(content, *, whole=True):
    return list(read_tar(seekable(io.BytesIO(content), local=whole), whole=whole))


def shown(content, **options):
    """key -> (ending of the image, endings of its parts, further images)."""
    return {each.key: (each.image, sorted(each.parts), each.further) for each in read(content, **options)}


@pytest.mark.parametrize(
    ("members", "samples"),
    [
        (["a.b.jpg", "a.b.txt", "1.0c.jpg"], {"a.b": ("jpg", ["jpg", "txt"], []), "1.0c": ("jpg", ["jpg"], [])}),
        (["a.jpg", "a.seg.png", "a.txt"], {"a": ("jpg", ["jpg", "txt"], ["a.seg.png"])}),
        (["a.depth.png", "a.jpg", "a.meta.json"], {"a": ("jpg", ["jpg"], ["a.depth.png"])}),
        (["a.jpg", "a.b.jpg", "a.b.txt"], {"a": ("jpg", ["jpg"], []), "a.b": ("jpg", ["jpg", "txt"], [])}),
        (["a.0.jpg", "a.1.jpg", "a.txt"], {"a": (None, ["txt"], ["a.0.jpg", "a.1.jpg"])}),
        (["a.JPG", "a.png", "a.npy"], {"a": ("jpg", ["jpg"], ["a.png"])}),
        (["./x/a.jpg", "x/a.cls", "/y/a.jpg"], {"x/a": ("jpg", ["cls", "jpg"], []), "y/a": ("jpg", ["jpg"], [])}),
        (["._a.jpg", "a/.b.jpg", "__MACOSX/a.jpg", "x/Thumbs.db", ".DS_Store", "README.md", "LICENSE"], {}),
        (["a.heic", "b"], {"a": (None, [], []), "b": (None, [], [])}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("whole", [True, False])
def test_samples(members, samples, whole):
    assert shown(tar(*members), whole=whole) == samples


PAIR = ["a.jpg", "a.txt", "b.jpg", "b.txt"]
BOTH = shown(tar(*PAIR))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        tar(*PAIR[:2]) + tar(*PAIR[2:]),
        gzip.compress(tar(*PAIR)),
        bz2.compress(tar(*PAIR)),
        lzma.compress(tar(*PAIR)),
        gzip.compress(tar(*PAIR[:2]) + tar(*PAIR[2:])),
        gzip.compress(tar(*PAIR[:2])) + gzip.compress(tar(*PAIR[2:])),
        tar(*PAIR) + bytes(7 * 512 + 3),
        tar(*PAIR, form=tarfile.USTAR_FORMAT)[: 8 * 512] + bytes(512),
    ],
)
def test_ways_to_pack(content, whole):
    assert shown(content, whole=whole) == BOTH
    assert [each.parts["txt"].read(MOST) for each in read(content, whole=whole)] == [b"a.txt", b"b.txt"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names(form):
    name = "d" * 90 + "/" + "é" * 100
    (sample,) = read(tar(f"{name}.jpg", f"{name}.txt", form=form))
    assert (sample.key, sample.parts["jpg"].read(MOST)) == (name, f"{name}.jpg".encode())


def test_files_of_a_sample_that_lie_apart():
    content = tar("a.jpg", "b.jpg", "a.txt", "b.txt")
    note, *samples = read(content)
    assert "not sorted" in note and {each.key: sorted(each.parts) for each in samples} == {
        "a": ["jpg", "txt"],
        "b": ["jpg", "txt"],
    }
    with pytest.raises(InputError, match="files of sample a lie apart; remote tar files are read from the front"):
        read(content, whole=False)


def test_a_file_that_is_there_twice():
    (sample,) = read(tar("a.jpg", "a.txt", "a.jpg"))
    assert sample.again == ["a.jpg"] and sample.image == "jpg"


def test_links_are_followed():
    kinds = tarfile.LNKTYPE, tarfile.SYMTYPE
    content = tar("a.jpg", ("b.jpg", kinds[0], "a.jpg"), ("c/d.jpg", kinds[1], "../b.jpg"), ("e.jpg", kinds[1], "no"),
                  ("f.jpg", kinds[1], "g.jpg"), ("g.jpg", kinds[1], "f.jpg"), ("h.jpg", tarfile.FIFOTYPE, "")
                  )  # fmt: skip
    samples = {each.key: each.parts["jpg"] for each in read(content)}
    assert [samples[key].read(MOST) for key in ("a", "b", "c/d")] == [b"a.jpg"] * 3
    for key, message in (("e", "link to no, which is not"), ("f", "leads to no file"), ("h", "neither a file nor")):
        with pytest.raises(InputError, match=message):
            samples[key].read(MOST)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"no tar file" * 100, "invalid header"),
        (tar(*PAIR) + b"junk" * 300, "data behind its end"),
        (gzip.compress(tar(*PAIR))[:-30], "its compression"),
        (bz2.compress(tar(*PAIR))[:-30], "its compression"),
        (lzma.compress(tar(*PAIR))[:-30], "its compression"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_damage_is_said(content, message, whole):
    with pytest.raises(tarfile.ReadError, match=message):
        read(content, whole=whole)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_what_was_compressed_before_the_damage_is_read(compress):
    files = [(f"{number}.jpg", bytes(random.Random(number).randbytes(300_000))) for number in range(4)]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as opened:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    content = compress(packed.getvalue())
    samples = read_tar(seekable(io.BytesIO(content[:-250_000]), local=True), whole=True)
    assert [next(samples).key for _ in range(2)] == ["0", "1"]
    with pytest.raises(tarfile.ReadError, match="its compression"):
        list(samples)


def test_other_compressions_are_refused():
    with pytest.raises(InputError, match="compressed by zstd, which is not read; possible: no compression, gzip"):
        read(b"\x28\xb5\x2f\xfd" + bytes(100))


def test_a_stream_is_read_as_far_as_it_is_wanted():
    read_so_far = []

    class Stream(io.BytesIO):
        def read(self, size):
            read_so_far.append(size)
            return super().read(size)

    content = tar(*(f"{number:05d}.jpg" for number in range(5000)))
    assert len(content) > 4 * 2**20
    samples = read_tar(seekable(Stream(content), local=False), whole=False)
    assert isinstance(next(samples), Sample) and sum(read_so_far) < len(content) / 2
    assert sum(1 for _ in samples) == 4999


def test_an_empty_tar_file_has_no_samples():
    assert read(tar()) == [] and read(bytes(1024)) == []


def test_sparse_files(tmp_path):
    """As GNU tar writes them with --sparse: a map of what is there, in the format of GNU 0.1 of pax headers."""
    content, size = b"begin" + bytes(1019) + b"end", 1027
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"GNU.sparse.size": str(size), "GNU.sparse.map": "0,5,1024,3", "GNU.sparse.name": "a.jpg"}
    kept = content[:5] + content[1024:]
    info.size = len(kept)
    encoded = io.BytesIO()
    with tarfile.open(fileobj=encoded, mode="w", format=tarfile.PAX_FORMAT) as opened:
        opened.addfile(info, io.BytesIO(kept))
    (sample,) = read(encoded.getvalue())
    assert sample.parts["jpg"].read(MOST) == content
    with fsspec.open(f"memory://{tmp_path.name}.tar", "wb") as file:
        file.write(encoded.getvalue())
    with fsspec.open(f"memory://{tmp_path.name}.tar") as file:
        assert [each.key for each in read_tar(seekable(file, local=False), whole=False)] == ["a"]
