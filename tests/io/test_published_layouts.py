"""Weights as people publish and trainers write them: every layout in every loader is the same network."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from lpl_jax import autoencoders, denoisers, text
from lpl_jax.autoencoders import AutoencoderConfig, TinyAutoencoderConfig
from lpl_jax.denoisers import MMDiTConfig
from lpl_jax.denoisers.weights import load_params
from lpl_jax.errors import InputError
from lpl_jax.evaluation import inception_weights
from lpl_jax.losses import latent_lpips_weights
from lpl_jax.text.config import ClipConfig, TextConfig
from lpl_jax.text.model import Clip
from lpl_jax.text.model import init as init_clip

KL = AutoencoderConfig.tiny(encoder_channels=(8, 16), decoder_channels=(8, 16))
TINY = TinyAutoencoderConfig(encoder_width=8, decoder_width=8, encoder_blocks=(1, 1), decoder_blocks=(1, 1))
SD3 = MMDiTConfig(hidden=16, depth=2, heads=2, context_dim=8, pooled_dim=8, base_grid=4)
OWN = denoisers.preset("tiny", depth=1, hidden=16, heads=2)
CLIP = ClipConfig(text=TextConfig(8, layers=1, heads=2, mlp_width=8, vocab_size=32, positions=8, eos_token_id=2))
SMALL_INCEPTION = {
    "Conv2d_1a_3x3": {"conv": {"kernel": (3, 3, 3, 2)}, "bn": {"mean": (2,)}},
    "fc": {"kernel": (4, 1008), "bias": (1008,)},
}
SMALL_LPIPS = {"slice_1": {"layer_0": {"kernel": (3, 3, 4, 2), "bias": (2,)}}, "lin_0": {"kernel": (1, 1, 2, 1)}}


def exact(shapes):
    """Values that float16 and bfloat16 hold, too."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: (rng.integers(-100, 100, leaf.shape) / 64).astype(np.float32), shapes)


def random(init, config):
    return exact(jax.eval_shape(lambda: init(config, jax.random.key(0))))


def arrays(shapes):
    return jax.tree.map(lambda shape: np.zeros(shape, np.float32), shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))


class Loader(NamedTuple):
    save: Callable[[Path], Any]  # writes the plain form into a folder that is new
    load: Callable[..., Any]  # source, variant= -> parameters


def clip_params():
    params = random(lambda config, key: init_clip(config, key).params, CLIP)
    return Clip(params, CLIP)


def put_file(name, module, shapes):
    def save(folder):
        folder.mkdir()
        tensors = module.export_params(exact(arrays(shapes)), module.RULES)
        save_file(tensors, folder / name)

    return save


LOADERS = {
    "KL autoencoder": Loader(
        lambda folder: autoencoders.save(random(autoencoders.init, KL), folder),
        lambda source, **options: autoencoders.load(source, **options).params,
    ),
    "TAESD": Loader(
        lambda folder: autoencoders.save(random(autoencoders.init, TINY), folder),
        lambda source, **options: autoencoders.load(source, **options).params,
    ),
    "text tower": Loader(
        lambda folder: text.save(clip_params(), folder),
        lambda source, **options: text.load(source, **options).params,
    ),
    "MMDiT of diffusers": Loader(
        lambda folder: denoisers.save(SD3, random(denoisers.init, SD3), folder),
        lambda source, **options: load_params(SD3, source, **options),
    ),
    "MMDiT of lpl_jax": Loader(
        lambda folder: denoisers.save(OWN, random(denoisers.init, OWN), folder, layout="lpl_jax"),
        lambda source, **options: denoisers.load(source, **options)[1],
    ),
    "FID network": Loader(
        put_file("model.safetensors", inception_weights, SMALL_INCEPTION),
        lambda source: inception_weights.load(source).params,
    ),
    "LatentLPIPS": Loader(
        put_file("model.safetensors", latent_lpips_weights, SMALL_LPIPS),
        lambda source: latent_lpips_weights.load(source).params,
    ),
}
WITH_VARIANT = [name for name in LOADERS if name not in ("FID network", "LatentLPIPS")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Loader -> (folder, tensors, parameters) of the plain form; of two large networks a few layers stand for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception_weights, "shapes", lambda: arrays(SMALL_INCEPTION))
        patch.setattr(latent_lpips_weights, "shapes", lambda _channels: arrays(SMALL_LPIPS))
        made = {}
        for name, loader in LOADERS.items():
            folder = tmp_path_factory.mktemp("plain") / "it"
            loader.save(folder)
            (file,) = folder.glob("*.safetensors")
            made[name] = folder, load_file(file), loader.load(folder)
        yield made


def check_same(found, expected):
    found, expected = (flatten_dict(tree, sep="/") for tree in (found, expected))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


# --- layouts: each writes into a folder that has config.json and no weights; what is loaded, None for the folder


def one(name, change=lambda tensors: tensors):
    def write(folder, tensors):
        save_file({key: np.ascontiguousarray(array) for key, array in change(tensors).items()}, folder / name)

    return write


def pickled(name, change=lambda tensors: tensors, **options):
    def write(folder, tensors):
        torch.save(change({key: torch.tensor(array) for key, array in tensors.items()}), folder / name, **options)

    return write


def cast(dtype):
    return lambda tensors: {key: array.astype(dtype) for key, array in tensors.items()}


def under(prefix, others=()):
    """Under a prefix, beside tensors of something else."""

    def change(tensors):
        strange = {f"{other}something.weight": np.ones((2, 2), np.float32) for other in others}
        return {f"{prefix}{key}": array for key, array in tensors.items()} | strange

    return change


def parts(pattern, index, save=one, count=2):
    """Spread over files that `pattern` names, with an index, or without (None)."""

    def write(folder, tensors):
        names, places = sorted(tensors), {}
        for number in range(count):
            file = pattern.format(f"{number + 1:05d}-of-{count:05d}")
            own = names[number::count]
            save(file)(folder, {key: tensors[key] for key in own})
            places |= dict.fromkeys(own, file)
        if index is not None:
            (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))

    return write


def several(*writers):
    def write(folder, tensors):
        for writer in writers:
            writer(folder, tensors)

    return write


def encoded(encoding):
    def write(folder, tensors):
        one("model.safetensors")(folder, tensors)
        config = folder / "config.json"
        if config.is_file():
            config.write_text(config.read_text(), encoding=encoding)

    return write


def counters(tensors):
    step = {"step": np.array(3, np.int64), "ema.num_updates": np.array(5, np.int32)}
    names = {"x.num_batches_tracked": np.array([7], np.int64), "decay": np.array(0.999, np.float32)}
    return tensors | step | names | {"x.position_ids": np.arange(4, dtype=np.float32)}


def wrong(tensors):
    return {key: array + 1 for key, array in tensors.items()}


D = "diffusion_pytorch_model"
LAYOUTS = {
    "diffusers": one(f"{D}.safetensors"),
    "transformers": one("model.safetensors"),
    "another name": one("my-finetune.safetensors"),
    "float16": one(f"{D}.fp16.safetensors", cast(np.float16)),
    "bfloat16": one(f"{D}.bf16.safetensors", cast(ml_dtypes.bfloat16)),
    "float64": one(f"{D}.safetensors", cast(np.float64)),
    "non_ema": one(f"{D}.non_ema.safetensors"),
    "ema_only": one("model.ema_only.safetensors"),
    "full precision first": several(
        one(f"{D}.fp16.safetensors", wrong), one(f"{D}.non_ema.safetensors", wrong), one(f"{D}.safetensors")
    ),
    "shards": parts(D + "-{}.safetensors", f"{D}.safetensors.index.json"),
    "shards of fp16": parts(D + ".fp16-{}.safetensors", f"{D}.safetensors.index.fp16.json"),
    "shards of fp16, older": parts(D + "-{}.fp16.safetensors", f"{D}.fp16.safetensors.index.json"),
    "shards of transformers": parts("model-{}.safetensors", "model.safetensors.index.json", count=3),
    "shards without an index": parts(D + "-{}.safetensors", None),
    "shards of .bin": parts(D + "-{}.bin", f"{D}.bin.index.json", pickled),
    "shards of .bin of transformers": parts("pytorch_model-{}.bin", "pytorch_model.bin.index.json", pickled),
    ".bin": pickled("pytorch_model.bin"),
    ".pt": pickled("model.pt"),
    ".pth as before PyTorch 1.6": pickled("x.pth", _use_new_zipfile_serialization=False),
    "a pickle called safetensors": pickled(f"{D}.safetensors"),
    "safetensors called .bin": several(
        one("x.safetensors"), lambda folder, _: (folder / "x.safetensors").rename(folder / f"{D}.bin")
    ),
    ".ckpt of a trainer": pickled(
        "last.ckpt",
        lambda tensors: {
            "state_dict": under("model.")(tensors),
            "global_step": 3,
            "args": argparse.Namespace(lr=0.1, out=Path("x")),
            "best": np.float64(0.5),
            "optimizer": {"state": {0: {"exp_avg": torch.ones(2), "step": torch.tensor(1)}}},
        },
    ),
    "module.": one(f"{D}.safetensors", under("module.")),
    "_orig_mod.": one(f"{D}.safetensors", under("_orig_mod.")),
    "nested": one(f"{D}.safetensors", under("module._orig_mod.ema.model.module.")),
    "ema. alone": one(f"{D}.safetensors", under("ema.")),
    "vae. beside others": one(f"{D}.safetensors", under("vae.", ("unet.", "text_encoder."))),
    "checkpoint of LDM": one(f"{D}.safetensors", under("first_stage_model.", ("model.diffusion_model.", "model_ema."))),
    "plain beside an average": one(f"{D}.safetensors", lambda t: t | under("ema.")(wrong(t))),
    "counters": one(f"{D}.safetensors", counters),
    "a byte order mark": encoded("utf-8-sig"),
    "UTF-16": encoded("utf-16"),
    "an optimizer beside it": several(one(f"{D}.safetensors"), pickled("optimizer.bin"), pickled("scheduler.bin")),
    "files of macOS": several(
        one(f"{D}.safetensors"), lambda folder, _: (folder / f"._{D}.safetensors").write_bytes(b"\0")
    ),
}


@pytest.fixture
def folder_of(plain, tmp_path):
    """Loader -> (its folder without weights, its tensors, the parameters)."""

    def get(name):
        folder, tensors, params = plain[name]
        there = tmp_path / name.replace(" ", "_")
        there.mkdir()
        if (folder / "config.json").is_file():
            shutil.copy(folder / "config.json", there)
        return there, tensors, params

    return get


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_every_loader_is_the_plain_form(layout, folder_of):
    for name, loader in LOADERS.items():
        folder, tensors, params = folder_of(name)
        LAYOUTS[layout](folder, tensors)
        check_same(loader.load(folder), params)


@pytest.mark.parametrize("layout", ["float16", ".bin", "shards of fp16", ".ckpt of a trainer"])
def test_the_file_itself_is_a_source(layout, folder_of):
    for name, loader in LOADERS.items():
        folder, tensors, params = folder_of(name)
        LAYOUTS[layout](folder, tensors)
        files = sorted(file for file in folder.iterdir() if file.name != "config.json")
        (source,) = [file for file in files if file.suffix == ".json"] or files
        check_same(loader.load(source), params)


@pytest.mark.parametrize("name", WITH_VARIANT)
def test_a_variant_is_chosen_by_name(name, folder_of):
    folder, tensors, params = folder_of(name)
    one(f"{D}.non_ema.safetensors", wrong)(folder, tensors)
    one(f"{D}.fp16.safetensors")(folder, tensors)
    load = LOADERS[name].load
    check_same(load(folder, variant="fp16"), params)
    with pytest.raises(InputError) as caught:
        load(folder)
    for part in ("several variants", f"{D}.fp16.safetensors, {D}.non_ema.safetensors", "choose a variant"):
        assert part in str(caught.value)
    with pytest.raises(InputError, match="no variant 'bf16': .*fp16.safetensors"):
        load(folder, variant="bf16")


@pytest.mark.parametrize("name", WITH_VARIANT)
def test_a_variant_may_be_inside_the_file(name, folder_of):
    folder, tensors, params = folder_of(name)
    both = lambda t: under("model.")({k: v + 1 for k, v in t.items()}) | under("ema.")(t)  # noqa: E731
    pickled("x.pt", lambda t: {"opt": {}, **both(t)})(folder, tensors)
    load = LOADERS[name].load
    check_same(load(folder, variant="ema"), params)
    with pytest.raises(InputError, match="several sets of weights: ema, model; choose one as the variant"):
        load(folder)
    with pytest.raises(InputError, match="has no variant 'fp16': x.pt; inside: ema, model"):
        load(folder, variant="fp16")


def bytes_of(content):
    return lambda folder, tensors: (folder / f"{D}.safetensors").write_bytes(content)


def cut(folder, tensors):
    one(f"{D}.safetensors")(folder, tensors)
    whole = (folder / f"{D}.safetensors").read_bytes()
    (folder / f"{D}.safetensors").write_bytes(whole[: len(whole) * 2 // 3])


def cut_pickle(folder, tensors):
    pickled(f"{D}.bin")(folder, tensors)
    whole = (folder / f"{D}.bin").read_bytes()
    (folder / f"{D}.bin").write_bytes(whole[: len(whole) * 2 // 3])


def lacking(folder, tensors):
    parts(D + "-{}.safetensors", None, count=3)(folder, tensors)
    (folder / f"{D}-00002-of-00003.safetensors").unlink()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
BROKEN = {
    "a git-lfs pointer": (bytes_of(LFS), "is a git-lfs pointer.*git lfs pull"),
    "a web page": (bytes_of(b"\n<!DOCTYPE html>\n<html>Sign in"), "is a web page"),
    "an empty file": (bytes_of(b""), "is an empty file"),
    "noise": (bytes_of(bytes(range(256))), "is damaged, cut short or not a file of weights"),
    "a cut file": (cut, "is damaged, cut short"),
    "a cut pickle": (cut_pickle, "is damaged"),
    "a shard that is missing": (lacking, "lacks parts 2 of 3"),
    "nothing": (lambda folder, tensors: None, "no weights|has no config.json|is not a file|are not at"),
    "two names": (several(one("a.safetensors"), one("b.safetensors")), "several names: a.safetensors, b.safetensors"),
    "int8": (
        one(f"{D}.safetensors", lambda t: {k: (v > 0).astype(np.int8) for k, v in t.items()}),
        r"\(I8\).*given, possible dtypes are F64, F32, F16, BF16",
    ),
    "not a number": (one(f"{D}.safetensors", lambda t: {k: v * np.nan for k, v in t.items()}), "infinite or undefined"),
    "another network": (
        one(f"{D}.safetensors", lambda t: {k[::-1]: v for k, v in t.items()}),
        "do not fit|out of all proportion",
    ),
    "surplus": (
        one(f"{D}.safetensors", lambda t: t | {f"extra{i}.weight": np.ones(2, np.float32) for i in range(1000)}),
        r"1000 parameters do not fit: surplus extra0.*; and 995 more",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_read_is_one_short_line_in_every_loader(what, folder_of):
    write, words = BROKEN[what]
    for name, loader in LOADERS.items():
        folder, tensors, _ = folder_of(name)
        write(folder, tensors)
        with pytest.raises(InputError, match=words) as caught:
            loader.load(folder)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000
