"""Outlier masks against a PyTorch implementation (kthvalue, MaxPool2d) and against facts worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lpl_jax.errors import InputError
from lpl_jax.losses import outlier_mask
from lpl_jax.losses.outliers import inner_range, kernel_sizes

FULL = dict(closing=3, opening=5)
HALF = dict(closing=1, opening=3)


def torch_mask(features, closing, opening, quantile=0.02):
    """The same mask with PyTorch's order statistics and pooling; features (B, H, W, C) as NumPy."""
    maps = torch.from_numpy(np.ascontiguousarray(features)).permute(0, 3, 1, 2)
    flat = maps.flatten(2)
    count = flat.shape[-1]
    low = flat.kthvalue(max(int(count * quantile), 1), dim=-1).values[..., None, None]
    high = flat.kthvalue(int(count * (1 - quantile)), dim=-1).values[..., None, None]
    margin = 2 * flat.std(dim=-1)[..., None, None]
    inlier = ((maps > low - margin) & (maps < high + margin)).float()
    inlier = torch.nn.MaxPool2d(closing, stride=1, padding=(closing - 1) // 2)(inlier)
    inlier = -torch.nn.MaxPool2d(opening, stride=1, padding=(opening - 1) // 2)(-inlier)
    return inlier.bool().permute(0, 2, 3, 1).numpy()


def with_blob(height, width, seed=0, shape=(64, 64), at=(12, 14), value=50.0):
    maps = np.random.default_rng(seed).standard_normal((1, *shape, 1)).astype(np.float32)
    maps[0, at[0] : at[0] + height, at[1] : at[1] + width] = value
    return maps


@pytest.mark.parametrize("kernels", [FULL, HALF, dict(closing=5, opening=9), dict(closing=1, opening=1)])
@pytest.mark.parametrize("shape", [(6, 6), (9, 17), (40, 24)])
def test_equals_torch_on_heavy_tails_with_ties(shape, kernels):
    rng = np.random.default_rng(sum(shape))
    maps = rng.standard_t(1.5, (4, *shape, 16)).astype(np.float32)
    maps[:2] = np.round(maps[:2] * 4) / 4  # many equal values
    for channel in range(16):  # one blob of up to 4 x 4 each, at borders too
        row, column = rng.integers(-3, shape[0]), rng.integers(-3, shape[1])
        maps[1, max(row, 0) : row + 4, max(column, 0) : column + 4, channel] = 40.0
    mask = np.asarray(outlier_mask(maps, **kernels))
    assert mask.dtype == bool and mask.shape == maps.shape
    np.testing.assert_array_equal(mask, torch_mask(maps, **kernels))
    if shape == (40, 24) and kernels["closing"] < 5:
        assert 0.001 < np.mean(~mask) < 0.5


def test_range_is_exact_order_statistics():
    maps = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    ordered = np.sort(maps.reshape(2, 1024, 3), axis=1)
    low, high = inner_range(jnp.asarray(maps), 0.02)
    np.testing.assert_array_equal(low[:, 0, 0], ordered[:, 20 - 1])
    np.testing.assert_array_equal(high[:, 0, 0], ordered[:, 1003 - 1])


def test_range_of_few_values_is_clamped():
    maps = np.random.default_rng(0).standard_normal((1, 4, 4, 2)).astype(np.float32)  # int(16 * 0.02) = 0
    low, high = inner_range(jnp.asarray(maps), 0.02)
    np.testing.assert_array_equal(low, maps.min((1, 2), keepdims=True))
    np.testing.assert_array_equal(high[0, 0, 0], np.sort(maps.reshape(16, 2), axis=0)[15 - 1])
    assert np.asarray(outlier_mask(maps[:, :1, :1], **FULL)).shape == (1, 1, 1, 2)


@pytest.mark.parametrize(("value", "kept"), [(3.39, True), (3.5, False)])
def test_deviation_has_one_degree_less(value, kept):
    # 12 times -1, 12 times 1 and one value: 3.39 lies between the thresholds 1 + 2 s with N (3.37) and N - 1 (3.42).
    maps = np.array([-1.0] * 12 + [1.0] * 12 + [value], np.float32).reshape(1, 5, 5, 1)
    mask = np.asarray(outlier_mask(maps, closing=1, opening=1, quantile=0.1))
    assert mask[0, 4, 4, 0] == kept and mask.sum() == 24 + kept


@pytest.mark.parametrize("side", [1, 2, 3, 4, 6])
def test_blobs_at_full_size(side):
    masked = ~np.asarray(outlier_mask(with_blob(side, side), **FULL))[0, :, :, 0]
    # Specks below the closing width vanish, others keep their place and gain a rim of one pixel.
    expected = np.zeros((64, 64), bool)
    if side >= 3:
        expected[11 : 13 + side, 13 : 15 + side] = True
    np.testing.assert_array_equal(masked, expected)


@pytest.mark.parametrize("side", [1, 2, 3, 5])
def test_blobs_at_half_size(side):
    masked = ~np.asarray(outlier_mask(with_blob(side, side), **HALF))[0, :, :, 0]
    assert masked.sum() == (side + 2) ** 2 and masked[11 : 13 + side, 13 : 15 + side].all()


def test_negative_outliers_count_too():
    assert (~np.asarray(outlier_mask(with_blob(4, 4, value=-50.0), **FULL))).sum() == 36


def test_border_pixels_outside_do_not_matter():
    # A 3 x 3 blob in the corner: nothing outside erases it or widens it, so its rim shows on the two inner sides only.
    masked = ~np.asarray(outlier_mask(with_blob(3, 3, at=(0, 61)), **FULL))[0, :, :, 0]
    assert masked.sum() == 16 and masked[:4, 60:].all()
    # A one pixel thin line along the border has inliers on one side only, which is enough to erase it.
    assert np.asarray(outlier_mask(with_blob(1, 5, at=(0, 10)), **FULL)).all()


def test_gaussian_maps_are_kept():
    maps = np.random.default_rng(0).standard_normal((2, 64, 64, 8)).astype(np.float32)
    assert np.asarray(outlier_mask(maps, **FULL)).all()


def test_constant_maps_are_masked_whole_and_alone():
    maps = with_blob(4, 4).repeat(3, axis=-1)
    maps[..., 1] = 0.1  # its float32 sum over 4096 pixels is not exact
    mask = np.asarray(outlier_mask(maps, **FULL))
    assert not mask[..., 1].any()
    assert mask[..., 0].sum() == mask[..., 2].sum() == 64 * 64 - 36


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_maps_are_not_hidden(value):
    assert np.asarray(outlier_mask(with_blob(4, 4, value=value), **FULL)).all()


def test_bfloat16_is_decided_in_float32():
    maps = np.random.default_rng(3).standard_t(1.5, (2, 24, 24, 8)).astype(np.float32)
    maps = jnp.asarray(maps, jnp.bfloat16)
    expected = torch_mask(np.asarray(maps, np.float32), **HALF)
    assert not expected.all()
    np.testing.assert_array_equal(outlier_mask(maps, **HALF), expected)


def test_no_gradient_and_jit():
    maps = jnp.asarray(with_blob(4, 4))
    masked_sum = jax.jit(lambda x: jnp.sum(jnp.where(outlier_mask(x, **FULL), x, 0.0)))
    gradient = np.asarray(jax.grad(masked_sum)(maps))
    np.testing.assert_array_equal(gradient, np.asarray(outlier_mask(maps, **FULL)).astype(np.float32))


@pytest.mark.parametrize(
    ("down_factor", "expected"),
    [
        (1, (3, 5)),
        (2, (1, 3)),
        (3, (1, 3)),  # ceil gives 1 and 2
        (4, (1, 3)),
        (5, (1, 1)),
        (8, (1, 1)),
        (1.25, (3, 5)),  # ceil gives 3 and 4
        (0.5, (5, 11)),  # twice the size: 6 and 10 made odd
    ],
)
def test_kernel_rule(down_factor, expected):
    assert kernel_sizes(3, 5, down_factor) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(closing=2, opening=5), "closing=2"),
        (dict(closing=3, opening=4), "opening=4"),
        (dict(closing=3, opening=0), "opening=0"),
        (dict(closing=3.0, opening=5), "closing=3.0"),
        (dict(closing=3, opening=5, quantile=0.5), "quantile=0.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        outlier_mask(jnp.zeros((1, 8, 8, 1)), **arguments)


def test_bad_shape():
    with pytest.raises(InputError, match=r"\(8, 8, 1\)"):
        outlier_mask(jnp.zeros((8, 8, 1)), **FULL)
