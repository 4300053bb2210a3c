"""No damage to a file gives a traceback, and none is believed: every reader of structured files, see `fuzz_targets`.

A file that our own writers made is cut short, overwritten, encoded anew, or holds other values than it should. What is
read of it is what was written, or it is refused in a line that names it.
"""

import contextlib
import functools
import json
import re
import shutil
import time
from pathlib import Path

import fuzz_targets
import jax
import numpy as np
import pytest
from fuzz_targets import TARGETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peak_memory import peak_growth
from safetensors.numpy import save_file

import lpl_jax
from lpl_jax import autoencoders, text
from lpl_jax.errors import InputError
from lpl_jax.evaluation import classifier, frechet, image_sets
from lpl_jax.io import jsons, npy, weight_files

SLOW = ("torch",)  # it imports PyTorch
FILES = [name for name, target in TARGETS.items() if target.path is not None]
ROOT = Path(lpl_jax.__file__).parent
quick = settings(
    derandomize=True, deadline=None, max_examples=25, database=None, suppress_health_check=list(HealthCheck)
)

ODD = [
    *(None, True, False, 0, -1, 1, 0.5, 1.0, -1e300, 1e300, 2**31, 2**63, -(2**63), 10**39, float("nan"), float("inf")),
    *("", "x", "0", "../x", "/etc/passwd", "C:\\x", "a/b", "\0", "\ud800", "\udcff", "line\nline", "x" * 10_000),
    *([], {}, [[]], [1], ["x"], [None], {"a": 1}, {"": {}}, [{"key": 1}], [0] * 1000),
]


@st.composite
def damaged_bytes(draw, whole):
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from([1, 1, 2, 4, 8, 64, 10**6]))
        data[place : place + length] = draw(st.one_of(st.binary(max_size=8), st.just(data[place : place + length] * 2)))
    return bytes(data)


@st.composite
def cut_or_flipped(draw, whole):
    place = draw(st.integers(0, max(0, len(whole) - 1)))
    flipped = bytearray(whole)
    if flipped:
        flipped[place] ^= 1 << draw(st.integers(0, 7))
    return draw(st.sampled_from([whole[:place], bytes(flipped)]))


@st.composite
def other_values(draw, whole):
    """JSON of another form; of several lines, in one of them. A forger may write the checksum of it, too."""
    lines = [whole]
    with contextlib.suppress(ValueError):
        json.loads(whole)
        lines = []
    if lines:
        lines = whole.splitlines(keepends=True)
    number = draw(st.integers(0, max(0, len(lines) - 1)))
    try:
        tree = json.loads(lines[number] if lines else whole)
    except (ValueError, IndexError):
        return draw(damaged_bytes(whole))
    changed = draw(changed_tree(tree))
    if isinstance(changed, dict) and "checksum" in changed and draw(st.booleans()):
        fields = {name: value for name, value in changed.items() if name != "checksum"}
        changed = draw(st.sampled_from([fields, jsons.signed(fields)]))
    text = json.dumps(changed)
    if draw(st.integers(0, 9)) == 0:
        text = text.replace('": ', '": 1, "x": {}, "x": ', 1)  # a name twice
    new = text.encode()
    return b"".join([*lines[:number], new + b"\n", *lines[number + 1 :]]) if lines else new


@st.composite
def changed_tree(draw, tree):
    """Something at one place of it is another value, gone, or new."""
    if not isinstance(tree, dict | list) or not tree or draw(st.integers(0, 7)) == 0:
        odd = draw(st.sampled_from(ODD))
        return draw(st.sampled_from([odd, [tree], {"value": tree}]))
    names = sorted(tree) if isinstance(tree, dict) else list(range(len(tree)))
    name, what = draw(st.sampled_from(names)), draw(st.integers(0, 5))
    changed = dict(tree) if isinstance(tree, dict) else list(tree)
    if what == 0:
        del changed[name]
    elif what == 1 and isinstance(changed, dict):
        changed["surplus"] = draw(st.sampled_from(ODD))
    elif what == 1:
        changed.append(changed[name])
    else:
        changed[name] = draw(changed_tree(tree[name]))
    return changed


def encoded(whole):
    """The same text in other encodings, and what is no text."""
    text = whole.decode("latin-1")
    ways = [text.encode(name) for name in ("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1")]
    parts = whole + whole, whole[: len(whole) // 2], whole.replace(b"\n", b"\r\n"), b"\xff" + whole
    others = b"", b"\0", b"\0" * 100, b'{"a":' * 200_000, b"[" * 200_000, b"[]", b"{}", b"null", b"9" * 5000
    return [*ways, *parts, *others, b'{"a": NaN}', b'{"a": 1, "a": 2}']


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in SLOW])
def test_no_damage_gives_a_traceback_and_none_is_believed(name):
    check(name, quick)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_nor_does_much_more_damage(name):
    check(name, settings(quick, max_examples=1000))


def check(name, profile):
    target = TARGETS[name]
    for whole in target.seeds():
        target.run(whole)
        for data in encoded(whole):
            target.run(data)

        @profile
        @given(st.one_of(cut_or_flipped(whole), damaged_bytes(whole), other_values(whole)))
        def run(data):
            target.run(data)

        run()


@pytest.mark.parametrize("name", [name for name in FILES if name not in SLOW])
def test_a_folder_or_nothing_in_the_place_of_a_file_is_a_line_or_an_absence(name):
    target = TARGETS[name]
    target.run(target.seeds()[0])  # or another test's damage is what lies beside it
    path = target.path()
    path.unlink()
    fuzz_targets.refused(lambda: target.read(path))
    path.mkdir()
    fuzz_targets.refused(lambda: target.read(path))
    shutil.rmtree(path)


def test_what_fuzzers_look_for_would_be_found():
    """A reader that raises something else, names no file, or believes what it reads."""

    def made(folder):
        (folder / "x.json").write_text(json.dumps(jsons.signed({"a": 1})))
        return folder / "x.json"

    for read in (lambda _: 1 / 0, lambda _: {}["x"]):
        with pytest.raises((ZeroDivisionError, KeyError)):
            fuzz_targets.of_file(made, read).run(b"{}")

    believing = fuzz_targets.of_file(made, lambda path: json.loads(path.read_text())["a"], mark=fuzz_targets.signature)
    whole = believing.seeds()[0]
    with pytest.raises(AssertionError):
        believing.run(whole.replace(b'"a": 1', b'"a": 2'))

    def silent(path):
        if b"2" in path.read_bytes()[:9]:
            raise InputError("something is wrong")

    with pytest.raises(AssertionError, match="names no file"):
        fuzz_targets.of_file(made, silent).run(b'{"a": 2}')


# --- what a file claims, before memory is taken ---


def header(shape, kind="<f8", size=118):
    text = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}}}"
    return b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + text.encode().ljust(size - 1) + b"\n"


@pytest.mark.parametrize("shape", ["(1000000000000,)", "(1000000, 1000000)", "(3, -1)", "(True,)", "(4.0,)", "((),)"])
def test_the_header_of_an_array_is_compared_with_the_file(tmp_path, shape):
    path = tmp_path / "a.npy"
    path.write_bytes(header(shape) + b"\0" * 64)

    def read():
        with pytest.raises(InputError, match=f"{re.escape(str(path))} cannot be read as a file of arrays"):
            npy.read_npy(path)

    assert peak_growth(read) < 2**24


def test_what_inflates_a_thousandfold_is_bounded(tmp_path):
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, mu=np.zeros(2**23), sigma=np.zeros(2**23))
    assert path.stat().st_size < 2**18 < 2**27

    def read():
        with pytest.raises(InputError, match="67,108,864 bytes: at most 1,048,576 are read"):
            npy.read_npz(path, most=2**20)

    assert peak_growth(read) < 2**24


def test_an_array_that_is_there_twice_is_refused(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, pytest.warns(UserWarning):
        archive.writestr("mu.npy", header("(0,)"))
        archive.writestr("mu.npy", header("(0,)"))
    with pytest.raises(InputError, match="an array is there twice"):
        npy.read_npz(tmp_path / "a.npz")


def test_arrays_of_objects_are_not_unpickled(tmp_path):
    class Hostile:
        def __reduce__(self):
            return print, ("code of a file was run",)

    np.savez(tmp_path / "a.npz", mu=np.array([Hostile()], object))
    np.save(tmp_path / "a.npy", np.array([Hostile()], object))
    for read, name in ((npy.read_npz, "a.npz"), (npy.read_npy, "a.npy")):
        with pytest.raises(InputError, match="an array of object, not of numbers"):
            read(tmp_path / name)


def test_names_in_a_file_are_shown_in_one_line(tmp_path):
    """Found by the long form: an array whose name holds a newline."""
    np.savez(tmp_path / "a.npz", **{"mu\nx": np.zeros(2), "sigma": np.array([None])})
    save_file({"a\nb": np.full(2, np.nan, np.float32)}, tmp_path / "a.safetensors")
    for read in (frechet.read_statistics, image_sets.open_images, npy.read_npz):
        assert "\\n" in fuzz_targets.refused(lambda read=read: read(tmp_path / "a.npz"))[1] or read is npy.read_npz
    assert "'a\\nb'" in fuzz_targets.refused(lambda: weight_files.read_weights(tmp_path / "a.safetensors"))[1]


# --- configs of networks that the weights beside them cannot be of ---


def zeros(init):
    """A network of zeros."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), jax.eval_shape(init, jax.random.key(0)))


def clip(folder):
    text.save(zeros(functools.partial(text.model.init, text.ClipConfig.tiny())), folder)
    return text.load


def features(folder):
    config = classifier.ClassifierConfig(**fuzz_targets.CLASSIFIER)
    classifier.save(zeros(functools.partial(classifier.init, config)), folder)
    return classifier.load


def autoencoder(folder):
    config = autoencoders.AutoencoderConfig.tiny()
    autoencoders.save(zeros(functools.partial(autoencoders.init, config)), folder)
    return autoencoders.load


@pytest.mark.parametrize(
    ("make", "change"),
    [
        *((autoencoder, change) for change in (dict(layers_per_block=99), dict(layers_per_block=10**9))),
        *((autoencoder, change) for change in (dict(block_out_channels=[8] * 10**5), dict(latent_channels=2**16))),
        *((features, change) for change in (dict(widths=[4] * 10**4), dict(blocks=100), dict(side=10**9))),
        *((clip, {"text_config": {"num_hidden_layers": count}}) for count in (999, 10**12)),
        (clip, {"vision_config": {"hidden_size": 2**16, "num_attention_heads": 1}}),
    ],
)
def test_an_absurd_size_is_a_line_in_a_moment(tmp_path, make, change):
    load, path = make(tmp_path), tmp_path / "config.json"
    load(tmp_path)
    config = json.loads(path.read_text())
    for name, value in change.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config))

    def read():
        began = time.perf_counter()
        with pytest.raises(InputError) as caught:
            load(tmp_path)
        assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 2000
        assert time.perf_counter() - began < 5

    assert peak_growth(read) < 2**28


# --- one reader ---

# Where JSON is not of a file of ours, or is read by one who bounds it himself.
ALLOWED = {
    "io/jsons.py": "the reader itself",
    "tools/sample.py": "a copy through JSON of what is compared with it",
    "runs/workdir.py": "a copy through JSON of what is compared with it",
    "data/captions.py": "of users' images: a fault is a skip",
    "data/metadata.py": "of users' images: a fault is a skip",
}


def test_no_json_is_read_but_by_the_one_reader():
    found = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if re.search(r"json\.loads?\(|np\.load\(|allow_pickle=True|pickle\.load", path.read_text())
    }
    assert found <= ALLOWED.keys()
