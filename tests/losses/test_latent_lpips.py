"""LatentLPIPS against a PyTorch network of the published architecture and names, and its weights from files."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.torch import load_file, save_file
from torch import nn

from lpl_jax.errors import InputError
from lpl_jax.losses.latent_lpips import LatentLPIPS, init, latent_lpips
from lpl_jax.losses.latent_lpips_weights import PUBLISHED, load, save

# torchvision's vgg16_bn: widths of the convolutions, P for a max-pool that stays and I for one that became an identity.
LAYERS = [64, 64, "I", 128, 128, "I", 256, 256, 256, "I", 512, 512, 512, "P", 512, 512, 512, "P"]
SLICES = ((0, 7), (7, 14), (14, 24), (24, 34), (34, 44))
CHANNELS = (64, 128, 256, 512, 512)


class Trunk(nn.Module):
    def __init__(self, latent_channels):
        super().__init__()
        layers, inputs = [], latent_channels
        for layer in LAYERS:
            if isinstance(layer, int):
                layers += [nn.Conv2d(inputs, layer, 3, padding=1), nn.BatchNorm2d(layer), nn.ReLU()]
                inputs = layer
            else:
                layers.append(nn.MaxPool2d(2, 2) if layer == "P" else nn.Identity())
        for number, (start, end) in enumerate(SLICES, 1):
            part = nn.Sequential()
            for place in range(start, end):
                part.add_module(str(place), layers[place])
            setattr(self, f"slice{number}", part)


class Calibration(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))


class Twin(nn.Module):
    """The distance without augmentation and without L1 term, with the names of the published state dicts."""

    def __init__(self, latent_channels):
        super().__init__()
        self.net = Trunk(latent_channels)
        for i, channels in enumerate(CHANNELS):
            setattr(self, f"lin{i}", Calibration(channels))
        self.lins = nn.ModuleList([getattr(self, f"lin{i}") for i in range(5)])

    def forward(self, pred, target):
        total = 0
        for number, lin in enumerate(self.lins, 1):
            part = getattr(self.net, f"slice{number}")
            pred, target = part(pred), part(target)
            a, b = (maps / torch.sqrt((maps**2).sum(1, keepdim=True) + 1e-8) for maps in (pred, target))
            total = total + lin.model((a - b) ** 2).mean((1, 2, 3))
        return total


@pytest.fixture(scope="module")
def network():
    return init(jax.random.key(0))


@pytest.fixture(scope="module")
def weights_file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "lpips.safetensors"
    save(network, path)
    return path


@pytest.fixture(scope="module")
def twin(weights_file):
    torch.set_num_threads(1)
    twin = Twin(4).eval()
    twin.load_state_dict(load_file(weights_file), strict=True)
    return twin.requires_grad_(False)


@jax.jit
def value_and_gradients(network, pred, target):
    """Values, and the gradient of their sum with respect to all three."""

    def loss(network, pred, target):
        values = latent_lpips(network, z0_hat=pred, z0=target)
        return values.sum(), values

    gradients, values = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(network, pred, target)
    return values, gradients


def latents(height, width, channels=4, seed=0):
    rng = np.random.default_rng(seed)
    target = rng.standard_normal((2, height, width, channels))
    pred = target + np.array([0.1, 1.0])[:, None, None, None] * rng.standard_normal(target.shape)
    return pred.astype(np.float32), target.astype(np.float32)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 16), (5, 11)])
def test_value_and_gradient_equal_pytorch(height, width, network, twin):
    pred, target = latents(height, width)
    values, (of_network, gradient, of_target) = value_and_gradients(network, pred, target)

    theirs = torch.tensor(pred.transpose(0, 3, 1, 2), requires_grad=True)
    expected = twin(theirs, torch.tensor(target.transpose(0, 3, 1, 2)))
    expected.sum().backward()
    assert values.shape == (2,)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, expected.detach(), rtol=1e-4)
    wanted = theirs.grad.numpy().transpose(0, 2, 3, 1)
    for sample in range(2):
        error = np.linalg.norm(gradient[sample] - wanted[sample]) / np.linalg.norm(wanted[sample])
        assert error < 1e-3, f"sample {sample}"
    of_others = of_target, of_network
    chex.assert_trees_all_equal(of_others, jax.tree.map(np.zeros_like, of_others))


def test_no_distance_and_no_gradient_between_equal_latents_and_dead_features(network):
    pred, target = latents(8, 8)
    ordinary, (_, slope, _) = value_and_gradients(network, pred, target)
    values, (_, gradient, _) = value_and_gradients(network, target, target)
    # The two branches round differently: features differ by some 1e-6 of their size.
    assert (values < 1e-10 * ordinary.max()).all()
    assert np.abs(gradient).max() < 1e-4 * np.abs(slope).max()
    # Normalisations that leave nothing above zero: the features of all five slices are zero.
    flat = flatten_dict(network.params)
    dead = dict(flat)
    for number, layer in ((1, 4), (2, 11), (3, 21), (4, 31), (5, 41)):
        dead[f"slice_{number}", f"layer_{layer}", "bias"] -= 1e6
    values, (_, gradient, _) = value_and_gradients(LatentLPIPS(unflatten_dict(dead), 4), pred, target)
    np.testing.assert_array_equal(values, 0)
    np.testing.assert_array_equal(gradient, 0)


def test_latents_that_do_not_fit_are_refused(network):
    for shapes, message in (
        (((2, 8, 8, 4), (2, 8, 4, 4)), "both have shape"),
        (((2, 8, 8, 16),) * 2, "16 channels: this LatentLPIPS is for 4"),
        (((2, 8, 3, 4),) * 2, "8 x 3: LatentLPIPS needs sides of at least 4"),
    ):
        with pytest.raises(InputError, match=message):
            latent_lpips(network, z0_hat=jnp.zeros(shapes[0]), z0=jnp.zeros(shapes[1]))
    for channels in (0, 4.0):
        with pytest.raises(InputError, match=f"latent_channels={channels} is not a positive integer"):
            init(jax.random.key(0), channels)


def same(a, b):
    assert a.latent_channels == b.latent_channels
    chex.assert_trees_all_equal(a.params, b.params)


def test_published_file_is_read(twin, weights_file, network, tmp_path):
    state = twin.state_dict()
    assert len([name for name in state if name.startswith("lins.")]) == 5
    assert any(name.endswith("num_batches_tracked") for name in state)
    torch.save(state, tmp_path / PUBLISHED["sd15"])
    same(load(tmp_path / PUBLISHED["sd15"]), network)
    same(load(weights_file), network)
    with pytest.raises(InputError, match="a new file is needed"):
        save(network, weights_file)


def test_sixteen_channels_are_recognised(tmp_path):
    network = init(jax.random.key(1), 16)
    assert network.params["slice_1"]["layer_0"]["kernel"].shape == (3, 3, 16, 64)
    save(network, tmp_path / "sd3.safetensors")
    same(load(tmp_path / "sd3.safetensors"), network)


def test_what_does_not_fit_is_named(weights_file, tmp_path):
    tensors = load_file(weights_file)
    del tensors["net.slice2.8.running_mean"], tensors["lin3.model.1.weight"]
    tensors["net.slice5.40.weight"] = torch.zeros(512, 512, 1, 1)
    tensors["net.slice5.44.weight"], tensors["head.weight"] = torch.zeros(2), torch.zeros(3)
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(InputError) as raised:
        load(tmp_path / "odd.safetensors")
    message = str(raised.value)
    for part in (
        "6 parameters do not fit",
        "missing slice_2/layer_8/mean",
        "missing lin_3/kernel",
        "surplus lins.3.model.1.weight",
        "net.slice5.40.weight has shape (512, 512, 1, 1), slice_5/layer_40/kernel needs (3, 3, 512, 512)",
        "surplus net.slice5.44.weight",
        "surplus head.weight",
    ):
        assert part in message
    tensors = load_file(weights_file)
    tensors["lins.2.model.1.weight"] = tensors["lins.2.model.1.weight"] + 1
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"lins.2.model.1.weight should repeat lin2.model.1.weight and differ"):
        load(tmp_path / "other.safetensors")


def test_missing_file_says_where_it_is_published(tmp_path):
    with pytest.raises(InputError, match=r"none.pth is not a file: .* at https://\S+/ in sd15_latest_vgg16_tuned.pth"):
        load(tmp_path / "none.pth")
