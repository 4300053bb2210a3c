"""The FID network's weights from files: what is read, found and refused."""

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lpl_jax.errors import InputError
from lpl_jax.evaluation.inception import init
from lpl_jax.evaluation.inception_weights import PUBLISHED, find_weights, load, save
from lpl_jax.io.fingerprints import fingerprint

PYTORCH_FID, TORCH_FIDELITY = PUBLISHED


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_both_kinds_of_files_hold_the_same(tmp_path):
    inception = init(jax.random.key(0))
    save(inception, tmp_path / "fid.safetensors")
    tensors = load_file(tmp_path / "fid.safetensors")
    assert tensors["Mixed_6d.branch7x7_2.conv.weight"].shape == (160, 160, 1, 7)
    assert tensors["fc.weight"].shape == (1008, 2048)
    counters = {name.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for name in tensors}
    torch.save(counters | tensors, tmp_path / PYTORCH_FID)

    assert fingerprint(load(tmp_path / "fid.safetensors").params) == fingerprint(inception.params)
    loaded = load(tmp_path)  # the folder
    np.testing.assert_array_equal(
        loaded.params["Mixed_7c"]["branch_pool"]["bn"]["var"], tensors["Mixed_7c.branch_pool.bn.running_var"]
    )
    assert fingerprint(loaded.params) == fingerprint(inception.params)
    loaded.params["Conv2d_1a_3x3"]["bn"]["mean"] += 1e-6
    assert fingerprint(loaded.params) != fingerprint(inception.params)
    with pytest.raises(InputError, match="a new file is needed"):
        save(inception, tmp_path / "fid.safetensors")


def test_what_does_not_fit_is_named(tmp_path):
    tensors = {
        "Conv2d_1a_3x3.bn.running_mean": torch.zeros(3),
        "Mixed_5b.branch1x1.conv.weight": torch.zeros(64, 192, 3, 3),
        "Mixed_5b.branch9x9.bn.running_var": torch.zeros(64),
        "head.weight": torch.zeros(2, 2),
    }
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(InputError) as raised:
        load(tmp_path / "odd.safetensors")
    message = str(raised.value)
    for part in (
        "Conv2d_1a_3x3.bn.running_mean has shape (3,), Conv2d_1a_3x3/bn/mean needs (32,)",
        "Mixed_5b.branch1x1.conv.weight has shape (64, 192, 3, 3), ",
        "Mixed_5b/branch1x1/conv/kernel needs (1, 1, 192, 64)",
        "surplus Mixed_5b.branch9x9.bn.running_var;",
        "surplus head.weight",
        "missing Conv2d_1a_3x3/bn/bias",
        "and 465 more",
    ):
        assert part in message
    assert f"{94 * 5 + 2 + 2} parameters do not fit" in message  # all but two of the network's, two of its, two others


@pytest.mark.parametrize(
    "tensors",
    [{"fc.weight": torch.zeros(1000, 4)}, {"AuxLogits.fc.bias": torch.zeros(4), "fc.weight": torch.zeros(1008, 4)}],
)
def test_torchvision_is_refused(tmp_path, tensors):
    save_file(tensors, tmp_path / "tv.safetensors")
    with pytest.raises(InputError, match="another Inception v3"):
        load(tmp_path / "tv.safetensors")


def test_damaged_file_is_refused(tmp_path):
    (tmp_path / "half.pth").write_bytes(b"PK\3\4 and no more")
    with pytest.raises(InputError, match="half.pth is damaged"):
        load(tmp_path / "half.pth")


def test_found_in_the_usual_places_in_order(home):
    for path in (
        home / ".cache/torch/hub/checkpoints" / TORCH_FIDELITY,
        home / ".cache/torch/hub/checkpoints" / PYTORCH_FID,
        home / ".cache/lpl_jax" / TORCH_FIDELITY,
        home / ".cache/lpl_jax" / PYTORCH_FID,
    ):  # each goes before those that are there already
        put(path)
        assert find_weights() == path
    assert find_weights("~/.cache/lpl_jax") == path
    given = put(home / "mine.pth")
    assert find_weights(given) == given


@pytest.mark.parametrize("given", [None, "elsewhere.pth", "."])
def test_missing_file_says_what_to_do(home, monkeypatch, given):
    monkeypatch.chdir(home)
    with pytest.raises(InputError) as raised:
        load(given)
    message = str(raised.value)
    assert "\n" not in message
    for part in (
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        str(home / ".cache/lpl_jax/pt_inception-2015-12-05-6726825d.pth"),
        "--features classifier",
        given or ".cache/torch/hub/checkpoints",
    ):
        assert part in message
