"""What is fuzzed: readers of files, given any bytes. Short in tests/test_damage.py, long by benchmarks/fuzz.py.

A target has valid files (`seeds`), which fuzzers change, and `run`, which reads what it is given as such a file. It
returns where the bytes are read, or refused with an InputError of one line; anything else that it raises is a fault.
"""

import dataclasses
import functools
import gzip
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import fuzz_media
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from safetensors.numpy import save_file

from lpl_jax import denoisers
from lpl_jax.autoencoders import AutoencoderConfig, diffusers_config
from lpl_jax.configs import base
from lpl_jax.cost import guard
from lpl_jax.data import LatentStore, Manifest, TextInfo, parts, records
from lpl_jax.data.examples import Skipped
from lpl_jax.data.manifest import Shard
from lpl_jax.denoisers import diffusers_layout
from lpl_jax.denoisers import weights as denoiser_weights
from lpl_jax.errors import InputError
from lpl_jax.evaluation import cards, classifier, evaluate, extract, frechet, image_sets, prompts
from lpl_jax.experiment import build
from lpl_jax.io import jsons, npy, weight_files
from lpl_jax.io.atomic import write_bytes, write_json
from lpl_jax.runs import workdir
from lpl_jax.text import config as text_config
from lpl_jax.text import tokenizer
from lpl_jax.training import logging


class Target(NamedTuple):
    """path: of the file that `run` writes, where it is one."""

    seeds: Callable[[], list[bytes]]
    run: Callable[[bytes], None]
    path: Callable[[], Path] | None = None
    read: Callable[[Path], Any] | None = None


def of_bytes(seeds: Callable[[], list[bytes]], read: Callable[[bytes], Any]) -> Target:
    """Of a reader of bytes."""

    def run(data: bytes) -> None:
        refused(lambda: read(data))

    return Target(seeds, run)


def of_file(
    make: Callable[[Path], Path], read: Callable[[Path], Any], *, mark: Callable[[bytes], bytes] | None = None
) -> Target:
    """Of a reader of a file.

    make: function(new folder) -> a valid file in it, with all that it needs beside it. mark: of a file that holds a
    checksum, the checksum: as long as it is among the bytes, what is read is what was written, or nothing.
    """

    @functools.cache
    def valid() -> tuple[Path, bytes, Any]:
        path = make(Path(tempfile.mkdtemp(prefix="lpl_jax-fuzz-")))
        return path, path.read_bytes(), read(path)

    def run(data: bytes) -> None:
        path, whole, before = valid()
        write_bytes(path, data)
        found, error = refused(lambda: read(path))
        if error is not None:
            assert str(path.parent) in error, f"names no file: {error}"
        elif mark is not None and mark(whole) in data:
            np.testing.assert_equal(found, before)

    return Target(lambda: [valid()[1]], run, lambda: valid()[0], read)


def refused(read: Callable[[], Any]) -> tuple[Any, str | None]:
    """(what is read, None), or (None, the line that says why it is not)."""
    try:
        return read(), None
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 100_000, str(error)[:1000]
        return None, str(error)


# --- checksums ---


def signature(content: bytes) -> bytes:
    """Of a JSON file of ours."""
    return re.findall(rb'"checksum": "([0-9a-f]{64})"', content)[-1]


def digest(content: bytes) -> bytes:
    """Of an .npz file of ours: what the archive's directory says of its checksum."""
    place = content.rindex(b"checksum.npy")
    return content[content.rindex(b"PK\x01\x02", 0, place) : place + len(b"checksum.npy")]


def anything(content: bytes) -> bytes:
    """Where every part of the file has a checksum."""
    return b""


# --- valid files, made by our own writers ---

TEXT = TextInfo("bundled", "0" * 64, 5, 100, 2, ("txt",))
MANIFEST = Manifest(
    autoencoder="tiny",
    weights_hash="0" * 64,
    scaling_factor=0.5,
    shift_factor=0.0,
    latent_channels=4,
    downsample=8,
    resolution=16,
    crop="center_crop",
    dtype="float16",
    class_names=("ant", "bee"),
    source="a folder",
    source_fingerprint="1" * 64,
    source_identity={"names": "2" * 64, "sizes": "3" * 64},
    text=TEXT,
)
UNITS = ("a.tar", "b.tar")
SKIPPED = Skipped("c.png", "b.tar", "c.png: not an image", True)


def store(folder: Path) -> Path:
    """A store of four records in two shards; the path of the second one."""
    rng, shards = np.random.default_rng(0), []
    for number in range(2):
        name = f"latents-{number:05d}-of-00002.array_record"
        writer = ArrayRecordWriter(str(folder / name), "group_size:1,uncompressed")
        for index in range(2):
            row = np.zeros(1, MANIFEST.record_dtype)
            row["moments"] = rng.standard_normal(row["moments"].shape)
            writer.write(records.pack(row[0], f"{number}/{index}", ["a caption"]))
        writer.close()
        content = (folder / name).read_bytes()
        shards.append(Shard(name, 2, len(content), hashlib.sha256(content).hexdigest()))
    manifest = dataclasses.replace(MANIFEST, shards=tuple(shards), skipped=1)
    write_json(folder / "manifest.json", manifest.to_dict())
    return folder / shards[-1].file


def manifest(folder: Path) -> Path:
    store(folder)
    return folder / "manifest.json"


def unfinished(folder: Path) -> Path:
    """A store whose second unit is not there yet; the path of its plan."""
    store(folder)
    whole = LatentStore(folder).manifest
    (folder / "manifest.json").unlink()
    parts.write_plan(folder, MANIFEST, UNITS)
    unit = parts.UnitRecord(UNITS[0], whole.shards[0], (parts.listed(SKIPPED),), 2)
    write_json(folder / "latents-00000-of-00002.json", unit.to_dict())
    return folder / "plan.json"


def report(folder: Path) -> Path:
    store(folder)
    found = LatentStore(folder).manifest
    made = parts.Report(5, 4, found.num_bytes, 1, found.shards, (SKIPPED,))
    write_json(folder / "report.json", made.to_dict())
    return folder / "report.json"


def store_values(path: Path, partial: bool = False) -> list[Any]:
    opened = LatentStore(path.parent, partial=partial)
    return [opened.manifest, [list(record) for record in opened]]


def experiment(folder: Path) -> Path:
    config = base.get_config()
    identity = workdir.StoreIdentity("a" * 64, "b" * 64, True, "a folder")
    workdir.write_config(build(config), folder, config.to_dict(), workdir.Inputs(identity, "c" * 64, finite=True))
    workdir.write_classes(("ant", "bee"), folder)
    return folder / "config.json"


def metrics(folder: Path) -> Path:
    with logging.MetricLogger(folder) as logger:
        for step in range(3):
            logger.write(step, {"loss": 1.5 / (step + 1), "share": np.arange(2.0), "bad": np.nan})
    return folder / "metrics.jsonl"


def card(folder: Path) -> Path:
    values = {"fid": cards.Metric(3.25, 3.0, 3.5), "cfd": cards.Metric(1.0)}
    made = {"num_images": 50, "resolution": 8, "sampling.guidance": 1.5, "checkpoint.weights": "params"}
    return cards.write_card(cards.Card(values, {"sfid": "no"}, made, {"date": "today"}), folder)


def statistics(folder: Path) -> Path:
    features = np.random.default_rng(0).standard_normal((20, 6))
    frechet.write_statistics(
        folder / "statistics.npz", frechet.statistics(features), frechet.statistics(features[:, :3])
    )
    return folder / "statistics.npz"


def cached(folder: Path) -> Path:
    arrays = {"pool": np.ones((3, 4), np.float32), "power": np.ones((8, 8)), "profiles": np.ones((3, 5), np.float32)}
    extract.write_part(folder / "part-000000-000003.npz", arrays)
    return folder / "part-000000-000003.npz"


def read_cached(path: Path) -> Any:
    """A part that cannot be used is computed again."""
    found = extract.read_part(path, 3)
    if found is None:
        raise InputError(f"{path} is computed again")
    return found


def spectra(folder: Path) -> Path:
    arrays = {f"{name}_power": np.ones((8, 8)) for name in ("images", "reference")}
    arrays |= {f"{name}_profile": np.ones(5) for name in ("images", "reference")}
    npy.write_npz(folder / "spectrum.npz", arrays)
    return folder / "spectrum.npz"


def samples(folder: Path) -> Path:
    path = card(folder).with_name("samples.npy")
    np.save(path, np.zeros((2, 8, 8, 3), np.uint8))
    return path


def image_set(folder: Path) -> Path:
    np.savez_compressed(folder / "images.npz", np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3))
    return folder / "images.npz"


def weights(folder: Path) -> Path:
    tensors = {"a": np.ones((2, 3), np.float32), "b": np.arange(4, dtype=np.float16), "step": np.arange(1)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder / "model.safetensors"


def index(folder: Path) -> Path:
    save_file({"a": np.ones(2, np.float32)}, folder / "one.safetensors")
    save_file({"b": np.ones(3, np.float32)}, folder / "two.safetensors")
    path = folder / "model.safetensors.index.json"
    places = {"a": "one.safetensors", "b": "two.safetensors"}
    write_json(path, {"metadata": {"total_size": 20}, "weight_map": places})
    return path


def torch_weights(folder: Path) -> Path:
    import torch

    torch.save({"state_dict": {"a": torch.ones(2, 3), "b": torch.arange(4.0)}, "epoch": 3}, folder / "model.pt")
    return folder / "model.pt"


def written(name: str, content: Mapping[str, Any] | list[Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write_json(folder / name, content)
        return folder / name

    return make


def one_file(folder: Path) -> Path:
    """A denoiser with its config inside."""
    text = json.dumps({"_class_name": denoiser_weights.CLASS_NAME, **dataclasses.asdict(denoisers.preset("tiny"))})
    save_file({"a": np.ones(2, np.float32)}, folder / "one.safetensors", {denoiser_weights.CLASS_NAME: text})
    return folder / "one.safetensors"


def read_one_file(path: Path) -> Any:
    tensors = weight_files.read_weights(path)
    fields = denoiser_weights._config_inside(path)
    return tensors, fields and denoiser_weights._config_from_fields(fields, where=str(path))


MERGES = [("a", "n"), ("an", "t</w>"), ("b", "e"), ("be", "e</w>")]


def vocabulary(name: str) -> Callable[[Path], Path]:
    """A folder with a tokenizer: vocab.json, merges.txt and settings."""

    def make(folder: Path) -> Path:
        write_json(folder / "vocab.json", tokenizer.vocabulary_of(MERGES))
        write_bytes(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, MERGES)]).encode())
        write_json(folder / "tokenizer_config.json", {"pad_token": {"content": "!"}, "model_max_length": 10**30})
        return folder / name

    return make


def gzipped(folder: Path) -> Path:
    lines = ["version", *map(" ".join, MERGES)]
    write_bytes(folder / "merges.txt.gz", gzip.compress("\n".join(lines).encode()))
    return folder / "merges.txt.gz"


def numbers(path: Path) -> Any:
    words = tokenizer.Tokenizer.load(path, cleaning="transformers")
    return words.fingerprint, words.vocab_size, words("an ant", 6)


def tokenizer_json(folder: Path) -> Path:
    vocabulary("vocab.json")(folder)
    tokenizer.Tokenizer.load(folder)._core.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").unlink()
    return folder / "tokenizer.json"


def lines(folder: Path) -> Path:
    write_bytes(folder / "prompts.txt", "an ant\na b\u00e9e\n".encode())
    return folder / "prompts.txt"


AUTOENCODER = diffusers_config.to_diffusers(AutoencoderConfig.tiny())
CLIP = text_config.to_transformers(text_config.ClipConfig.tiny())
DENOISER = {"_class_name": denoiser_weights.CLASS_NAME, **dataclasses.asdict(denoisers.preset("tiny"))}
SD3 = {"_class_name": diffusers_layout.CLASS_NAME, **diffusers_layout.DEFAULTS}
CLASSIFIER = {"name": "small", "classes": ["ant", "bee"], "side": 16, "stem": 4, "widths": [4, 8], "blocks": 1}
GUARD = {"jax": "0.1", "cases": {"1 device": {"operations": 12.0, "bytes": 3}}}

TARGETS: dict[str, Target] = {
    "json": of_bytes(
        lambda: [b'{"a": [1, 2.5, true, null, "text"], "b": {"c": "\\u00e9"}}', b'"\xef\xbb\xbf"', b"[1e3, -0.0]"],
        lambda data: jsons.parse(data, "a file"),
    ),
    "manifest": of_file(manifest, store_values, mark=signature),
    "shard": of_file(store, store_values, mark=anything),
    "plan": of_file(unfinished, functools.partial(store_values, partial=True), mark=signature),
    "unit": of_file(
        lambda folder: unfinished(folder).with_name("latents-00000-of-00002.json"),
        functools.partial(store_values, partial=True),
        mark=signature,
    ),
    "report": of_file(report, lambda path: parts.read_report(path.parent), mark=signature),
    "config": of_file(experiment, lambda path: workdir.read_experiment(path.parent), mark=signature),
    "inputs": of_file(
        lambda folder: experiment(folder).with_name("inputs.json"),
        lambda path: workdir.read_inputs(path.parent),
        mark=signature,
    ),
    "classes": of_file(
        lambda folder: experiment(folder).with_name("classes.json"),
        lambda path: workdir.read_classes(path.parent),
        mark=signature,
    ),
    "metrics": of_file(metrics, lambda path: logging.read_metrics(path.parent)),
    "card": of_file(card, cards.read_card, mark=signature),
    "guard": of_file(written("guard.json", GUARD), guard.read),
    "statistics": of_file(
        statistics, lambda path: [frechet.read_statistics(path, kind) for kind in ("pool", "spatial")], mark=digest
    ),
    "features": of_file(cached, read_cached, mark=digest),
    "spectra": of_file(
        spectra, lambda path: [vars(each) for each in evaluate.read_spectra(path.parent) or ()], mark=digest
    ),
    "samples": of_file(samples, lambda path: cards.read_samples(path.parent, cards.read_card(path.parent))),
    "images": of_file(image_set, lambda path: image_sets.open_images(path)[:]),
    "prompts": of_file(lines, lambda path: prompts.read_prompts(path).lines),
    "safetensors": of_file(weights, weight_files.read_weights),
    "index": of_file(index, lambda path: weight_files.read_weights(path.parent)),
    "torch": of_file(torch_weights, weight_files.read_weights),
    "autoencoder": of_file(
        written("config.json", AUTOENCODER),
        lambda path: diffusers_config.from_diffusers(jsons.read_json(path), name=str(path)),
    ),
    "clip": of_file(
        written("config.json", CLIP), lambda path: text_config.from_transformers(jsons.read_json(path), name=str(path))
    ),
    "denoiser": of_file(
        written("config.json", DENOISER),
        lambda path: denoiser_weights._config_from_fields(jsons.read_json(path), where=str(path)),
    ),
    "sd3": of_file(
        written("config.json", SD3),
        lambda path: diffusers_layout.from_diffusers(jsons.read_json(path), where=str(path)),
    ),
    "denoiser-file": of_file(one_file, read_one_file),
    "classifier": of_file(written("config.json", CLASSIFIER), classifier._read_config),
    "vocabulary": of_file(vocabulary("vocab.json"), lambda path: numbers(path.parent)),
    "merges": of_file(vocabulary("merges.txt"), lambda path: numbers(path.parent)),
    "tokenizer-settings": of_file(vocabulary("tokenizer_config.json"), lambda path: numbers(path.parent)),
    "tokenizer": of_file(tokenizer_json, lambda path: numbers(path.parent)),
    "merges-gz": of_file(gzipped, numbers),
}
TARGETS |= {name: of_bytes(*reader) for name, reader in fuzz_media.READERS.items()}
