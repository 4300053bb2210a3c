"""The FID network equals PyTorch on the same random weights: a twin written here, and torch-fidelity's own class."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lpl_jax.errors import InputError
from lpl_jax.evaluation.inception import SIDE, Inception, Network, init
from lpl_jax.evaluation.inception_weights import save

torch.set_num_threads(1)
TOLERANCE = 1e-5  # of the largest value, over some 50 layers in float32; the requirement is 1e-4


@pytest.fixture(scope="module")
def inception():
    return init(jax.random.key(3))


@pytest.fixture(scope="module")
def tensors(inception, tmp_path_factory):
    """The weights as a PyTorch state dict."""
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save(inception, path)
    return load_file(path)


def two_images(height, width):
    """Noise and a colour gradient, so that features of the two differ."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    gradient = 255 * np.stack([rows, columns, 1 - rows], -1)
    return np.stack([noise, gradient]).astype(np.uint8)


features = jax.jit(Inception.features)


class Twin:
    """The network in PyTorch's functions, from its description and the tensors' names alone; NCHW."""

    def __init__(self, tensors):
        self.tensors = tensors

    def unit(self, x, name, stride=1, padding=0):
        weight, *norm = (
            self.tensors[f"{name}.{leaf}"]
            for leaf in ("conv.weight", "bn.running_mean", "bn.running_var", "bn.weight", "bn.bias")
        )
        return F.batch_norm(F.conv2d(x, weight, stride=stride, padding=padding), *norm, eps=0.001).relu()

    def chain(self, x, *units):
        for name, *arguments in units:
            x = self.unit(x, name, *arguments)
        return x

    def average(self, x):
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    def mixed_35(self, x, b):
        double = self.chain(x, (f"{b}.branch3x3dbl_1",), (f"{b}.branch3x3dbl_2", 1, 1), (f"{b}.branch3x3dbl_3", 1, 1))
        five = self.chain(x, (f"{b}.branch5x5_1",), (f"{b}.branch5x5_2", 1, 2))
        pooled = self.unit(self.average(x), f"{b}.branch_pool")
        return torch.cat([self.unit(x, f"{b}.branch1x1"), five, double, pooled], 1)

    def to_17(self, x, b="Mixed_6a"):
        double = self.chain(x, (f"{b}.branch3x3dbl_1",), (f"{b}.branch3x3dbl_2", 1, 1), (f"{b}.branch3x3dbl_3", 2))
        return torch.cat([self.unit(x, f"{b}.branch3x3", 2), double, F.max_pool2d(x, 3, 2)], 1)

    def mixed_17(self, x, b):
        wide, tall = (1, (0, 3)), (1, (3, 0))
        seven = self.chain(x, (f"{b}.branch7x7_1",), (f"{b}.branch7x7_2", *wide), (f"{b}.branch7x7_3", *tall))
        double = self.unit(x, f"{b}.branch7x7dbl_1")
        for number, arguments in enumerate((tall, wide, tall, wide), start=2):
            double = self.unit(double, f"{b}.branch7x7dbl_{number}", *arguments)
        pooled = self.unit(self.average(x), f"{b}.branch_pool")
        return torch.cat([self.unit(x, f"{b}.branch1x1"), seven, double, pooled], 1)

    def to_8(self, x, b="Mixed_7a"):
        small = self.chain(x, (f"{b}.branch3x3_1",), (f"{b}.branch3x3_2", 2))
        large = self.chain(x, (f"{b}.branch7x7x3_1",), (f"{b}.branch7x7x3_2", 1, (0, 3)))
        large = self.chain(large, (f"{b}.branch7x7x3_3", 1, (3, 0)), (f"{b}.branch7x7x3_4", 2))
        return torch.cat([small, large, F.max_pool2d(x, 3, 2)], 1)

    def mixed_8(self, x, b, pool):
        wide, tall = (1, (0, 1)), (1, (1, 0))
        single = self.unit(x, f"{b}.branch3x3_1")
        double = self.chain(x, (f"{b}.branch3x3dbl_1",), (f"{b}.branch3x3dbl_2", 1, 1))
        ends = [self.unit(single, f"{b}.branch3x3_2a", *wide), self.unit(single, f"{b}.branch3x3_2b", *tall)]
        ends += [self.unit(double, f"{b}.branch3x3dbl_3a", *wide), self.unit(double, f"{b}.branch3x3dbl_3b", *tall)]
        return torch.cat([self.unit(x, f"{b}.branch1x1"), *ends, self.unit(pool(x), f"{b}.branch_pool")], 1)

    def features(self, x):
        """299x299 images in [-1, 1) -> pool, spatial features, logits."""
        x = self.chain(x, ("Conv2d_1a_3x3", 2), ("Conv2d_2a_3x3",), ("Conv2d_2b_3x3", 1, 1))
        x = self.chain(F.max_pool2d(x, 3, 2), ("Conv2d_3b_1x1",), ("Conv2d_4a_3x3",))
        x = F.max_pool2d(x, 3, 2)
        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self.mixed_35(x, block)
        x = self.to_17(x)
        for block in ("Mixed_6b", "Mixed_6c"):
            x = self.mixed_17(x, block)
        spatial = self.unit(x, "Mixed_6d.branch1x1")[:, :7]
        for block in ("Mixed_6d", "Mixed_6e"):
            x = self.mixed_17(x, block)
        x = self.mixed_8(self.to_8(x), "Mixed_7b", self.average)
        x = self.mixed_8(x, "Mixed_7c", lambda x: F.max_pool2d(x, 3, 1, 1))
        pool = x.mean((2, 3))
        spatial = spatial.permute(0, 2, 3, 1).flatten(1)
        return {"pool": pool, "spatial": spatial, "logits": pool @ self.tensors["fc.weight"].T}


def tf1_resized(images):
    """(B, H, W, 3) -> (B, 3, 299, 299), as TensorFlow 1: two taps at i * old / 299."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).double()
    for axis in (2, 3):
        old = x.shape[axis]
        position = torch.arange(SIDE, dtype=torch.float32) * torch.tensor(old / SIDE, dtype=torch.float32)
        lower = position.floor().long()
        upper = (lower + 1).clamp(max=old - 1)
        weight = (position - lower).double().reshape([-1 if i == axis else 1 for i in range(4)])
        x = torch.lerp(x.index_select(axis, lower), x.index_select(axis, upper), weight.expand(1, 1, *weight.shape[2:]))
    return x.float()


def assert_close(ours, theirs):
    """Within the tolerance, and so is the difference of the two images, which may be small beside what they share."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())
    difference = theirs[0] - theirs[1]
    np.testing.assert_allclose(ours[0] - ours[1], difference, rtol=0, atol=10 * TOLERANCE * np.abs(difference).max())


def test_equals_twin(inception, tensors):
    images = two_images(50, 70)
    with torch.inference_mode():
        expected = Twin(tensors).features((tf1_resized(images) - 128) / 128)
    ours = features(inception, images)
    assert {name: array.shape for name, array in ours.items()} == {
        "pool": (2, 2048),
        "spatial": (2, 2023),
        "logits": (2, 1008),
    }
    for name, array in expected.items():
        assert_close(ours[name], array)


@pytest.fixture(scope="module")
def their_module(torch_fidelity):
    return torch_fidelity("feature_extractor_inceptionv3")


def test_equals_torch_fidelity(their_module, inception, tensors, tmp_path):
    """Theirs also reads our names: all of them and no others."""
    path = tmp_path / "weights.pth"
    torch.save(tensors, path)
    theirs = their_module.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )
    spatial = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: spatial.append(output))
    images = two_images(64, 64)
    with torch.inference_mode():
        pool, logits = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
    ours = features(inception, images)
    assert_close(ours["pool"], pool)
    assert_close(ours["logits"], logits)
    assert_close(ours["spatial"], spatial[0][:, :7].permute(0, 2, 3, 1).flatten(1))


def test_all_products_have_the_highest_precision(inception):
    """On a CPU the tests above would not notice: TPUs multiply in bfloat16 unless told otherwise, GPUs in TF32."""
    images = jnp.zeros((1, SIDE, SIDE, 3))
    program = jax.make_jaxpr(lambda params: Network().apply({"params": params}, images))(inception.params)
    products = [e for e in program.eqns if e.primitive.name in ("conv_general_dilated", "dot_general")]
    assert len(products) == 94 + 1  # convolutions and the last layer
    highest = jax.lax.Precision.HIGHEST
    assert all(product.params["precision"] in (highest, (highest, highest)) for product in products)


@pytest.mark.parametrize(
    "images",
    [np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.uint8)],
)
def test_other_images_are_refused(images):
    with pytest.raises(InputError, match="needed: .B, H, W, 3., uint8"):
        Inception({}).features(images)


def test_random_weights_depend_on_the_key_alone(inception):
    chex.assert_trees_all_equal(init(jax.random.key(3)), inception)
    same = jax.tree.map(np.array_equal, init(jax.random.key(4)), inception)
    assert not any(jax.tree.leaves(same))
