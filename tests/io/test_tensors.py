"""Files of tensors: what each of their users may rely on, beside what is tested with the loaders themselves."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from lpl_jax.errors import InputError
from lpl_jax.io.tensors import read_file, read_folder

NAMES = ("w.safetensors", "w.safetensors.index.json")
ONES = np.ones(2, np.float32)


def refused(read, words, *args, **options):
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        read(*args, **options)
    assert "\n" not in str(caught.value)


def write_parts(folder, parts, places):
    for name, tensors in parts.items():
        save_file(tensors, folder / name)
    (folder / NAMES[1]).write_text(json.dumps({"weight_map": places}))


def test_parts_have_each_tensor_once_and_where_the_index_says(tmp_path):
    one, two = "one.safetensors", "two.safetensors"
    write_parts(tmp_path, {one: {"a": ONES}, two: {"b": 2 * ONES}}, {"a": one, "b": two})
    np.testing.assert_equal(read_folder(tmp_path, NAMES), {"a": ONES, "b": 2 * ONES})
    write_parts(tmp_path, {}, {"a": one, "b": one, "c": two})
    refused(read_folder, "not where it says: b, c", tmp_path, NAMES)
    write_parts(tmp_path, {two: {"a": ONES}}, {"a": one, "b": two})
    refused(read_folder, f"{two} repeats tensors of another part: a", tmp_path, NAMES)


@pytest.mark.parametrize("places", [{}, ["a"], {"a": 3}, None])
def test_a_map_of_anything_else_is_refused(places, tmp_path):
    write_parts(tmp_path, {}, places)
    refused(read_folder, "has no weight_map of tensor names to file names", tmp_path, NAMES)


def test_torch_files_are_read_only_where_asked_for(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "w.bin")
    np.testing.assert_equal(read_file(tmp_path / "w.bin", torch_files=True), {"a": ONES})
    refused(read_file, "w.bin is damaged or not a safetensors file", tmp_path / "w.bin")
    write_parts(tmp_path, {}, {"a": "w.bin"})
    np.testing.assert_equal(read_folder(tmp_path, NAMES, torch_files=True), {"a": ONES})
    refused(read_folder, "names 'w.bin'; possible: .safetensors files beside it", tmp_path, NAMES)


def test_what_is_no_finite_float_is_refused_unless_ignored(tmp_path):
    save_file({"a": ONES, "x.ids": np.arange(2), "y": np.array([1, np.inf], np.float32)}, tmp_path / NAMES[0])
    refused(read_file, "x.ids (I64) given, possible dtypes are F64, F32, F16, BF16", tmp_path / NAMES[0])
    refused(read_file, "infinite or undefined values in y", tmp_path / NAMES[0], ignore=".ids")
    np.testing.assert_equal(read_file(tmp_path / NAMES[0], ignore=(".ids", "y")), {"a": ONES})

    torch.save({"a": torch.ones(2), "x.ids": torch.arange(2)}, tmp_path / "w.bin")
    refused(read_file, "x.ids (int64) given, possible dtypes are float64", tmp_path / "w.bin", torch_files=True)
    np.testing.assert_equal(read_file(tmp_path / "w.bin", torch_files=True, ignore=".ids"), {"a": ONES})


def test_an_index_may_name_what_is_ignored(tmp_path):
    part = "one.safetensors"
    write_parts(tmp_path, {part: {"a": ONES, "x.ids": np.arange(2)}}, {"a": part, "x.ids": part})
    np.testing.assert_equal(read_folder(tmp_path, NAMES, ignore=".ids"), {"a": ONES})


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(InputError, match="none.safetensors: no such file"):
        read_file(tmp_path / "none.safetensors")
