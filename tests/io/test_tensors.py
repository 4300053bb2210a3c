"""Files of tensors: what each of their users may rely on, beside what is tested with the loaders themselves."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from lpl_jax.errors import InputError
from lpl_jax.io.jsons import read_json
from lpl_jax.io.tensors import read_file
from lpl_jax.io.weight_files import read_weights

INDEX = "model.safetensors.index.json"
ONES = np.ones(2, np.float32)


def refused(read, words, *args, **options):
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        read(*args, **options)
    assert "\n" not in str(caught.value)


def write_parts(folder, parts, places):
    for name, tensors in parts.items():
        save_file(tensors, folder / name)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def test_parts_have_each_tensor_once_and_where_the_index_says(tmp_path):
    one, two = "one.safetensors", "two.safetensors"
    write_parts(tmp_path, {one: {"a": ONES}, two: {"b": 2 * ONES}}, {"a": one, "b": two})
    np.testing.assert_equal(read_weights(tmp_path), {"a": ONES, "b": 2 * ONES})
    write_parts(tmp_path, {}, {"a": one, "b": one, "c": two})
    refused(read_weights, "not where it says: b, c", tmp_path)
    write_parts(tmp_path, {two: {"a": ONES}}, {"a": one, "b": two})
    refused(read_weights, f"{two} repeats tensors of another part: a", tmp_path)


@pytest.mark.parametrize("places", [{}, ["a"], {"a": 3}, None])
def test_a_map_of_anything_else_is_refused(places, tmp_path):
    write_parts(tmp_path, {}, places)
    refused(read_weights, "has no weight_map of tensor names to file names", tmp_path)


def test_what_is_no_finite_float_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": ONES, "x.ids": np.arange(2, dtype=np.int8), "y": np.array([1, np.inf], np.float32)}, path)
    refused(read_file, "x.ids (I8) given, possible dtypes are F64, F32, F16, BF16", path)
    torch.save({"a": torch.ones(2), "x.ids": torch.arange(2, dtype=torch.int8)}, tmp_path / "w.bin")
    refused(read_file, "x.ids (int8) given, possible dtypes are F64, F32, F16, BF16", tmp_path / "w.bin")
    save_file({"a": ONES, "y": np.array([1, np.inf], np.float32)}, path)
    refused(read_file, "infinite or undefined values in y", path)


def test_counters_are_no_parameters_and_an_index_may_name_them(tmp_path):
    part = "one.safetensors"
    write_parts(tmp_path, {part: {"a": ONES, "x.ids": np.arange(2)}}, {"a": part, "x.ids": part})
    np.testing.assert_equal(read_weights(tmp_path), {"a": ONES})
    np.testing.assert_equal(read_file(tmp_path / part), {"a": ONES})


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(InputError, match="none.safetensors: no such file"):
        read_file(tmp_path / "none.safetensors")


def test_json_that_is_something_else_is_called_so(tmp_path):
    path = tmp_path / "config.json"
    for content, words in (
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a git-lfs pointer"),
        (b"<html>", "it is a web page"),
        (b"", "it is an empty file"),
    ):
        path.write_bytes(content)
        refused(read_json, words, path)
