"""Writes of a store that are killed, and that several processes share."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import lpl_jax
from lpl_jax import autoencoders
from lpl_jax.data import LatentStore, WebDatasetSource, write_store

ROOT = Path(lpl_jax.__file__).parents[1]


def start(shards, out, tiny_folder, *options):
    command = [sys.executable, "-m", "lpl_jax", "prepare", "--source", str(shards), "--resolution", "16"]
    command += ["--out", str(out), "--autoencoder", str(tiny_folder), "--batch-size", "1", "--tokens", "9", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


@pytest.fixture(scope="module")
def many(tmp_path_factory, tars):
    """Eight tar files of 40 images, one of them without a caption."""
    root = tmp_path_factory.mktemp("many")
    for shard in range(8):
        keys = [f"{shard:05d}{i:04d}" for i in range(40)]
        members = [m for key in keys for m in tars.sample(key, key[-4:] != "0007" and f"photo {key}", int(key))]
        (root / f"{shard:05d}.tar").write_bytes(tars.of(members))
    return root


@pytest.fixture(scope="module")
def undisturbed(many, tmp_path_factory, tiny_folder):
    path = tmp_path_factory.mktemp("undisturbed") / "store"
    return write_store(path, WebDatasetSource(str(many), 16), autoencoders.load(tiny_folder), max_skipped=8)


def assert_same(path, wanted):
    store = LatentStore(path)
    assert len(store) == len(wanted) and store.manifest.skipped == wanted.manifest.skipped
    for a, b in zip(store, wanted, strict=True):
        assert (a.key, a.label, a.captions) == (b.key, b.label, b.captions)
        np.testing.assert_allclose(a.mean, b.mean, rtol=2**-9, atol=1e-4)
    wanted_names = {shard.file for shard in wanted.manifest.shards} | {"manifest.json", "report.json"}
    assert {file.name for file in path.iterdir()} == wanted_names


@pytest.mark.slow
def test_a_killed_write_goes_on_where_it_was(many, undisturbed, tmp_path, tiny_folder):
    """SIGKILL once some units are there: the same call finishes the store, and makes none of them again."""
    out = tmp_path / "store"
    process = start(many, out, tiny_folder, "--max-skipped", "8")
    end = time.monotonic() + 240
    while len(list(out.glob("latents-*.json"))) < 2:
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (out / "manifest.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("latents-*.array_record")}
    partial = LatentStore(out, partial=True)
    count = len(partial)
    assert 2 <= len(partial.manifest.shards) < 8, "killed in the middle"
    text = finish(start(many, out, tiny_folder, "--max-skipped", "8"))
    assert f"{len(undisturbed)} images" in text
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("latents-*.array_record")}
    assert before.items() <= after.items() and count < len(undisturbed)
    assert_same(out, undisturbed)
    keys = [record.key for record in LatentStore(out)]
    assert len(set(keys)) == len(keys)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["by hand", "distributed"])
def test_two_processes_write_one_store(many, undisturbed, tmp_path, tiny_folder, how):
    out = tmp_path / "store"
    if how == "by hand":
        flags = [("--host-index", str(i), "--host-count", "2") for i in range(2)]
    else:
        port = free_port()
        flags = [
            ("--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id", str(i)) for i in range(2)
        ]
    processes = [start(many, out, tiny_folder, "--max-skipped", "8", *given) for given in flags]
    texts = [finish(process) for process in processes]
    assert (
        sum(f"{len(undisturbed)} images of {len(undisturbed) + 8} seen of 1 class at" in text for text in texts) >= 1
    ), texts
    assert_same(out, undisturbed)
    report = json.loads((out / "report.json").read_text())
    assert report["skipped"] == 8 and {entry["key"][-4:] for entry in report["skipped_images"]} == {"0007"}


def free_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
