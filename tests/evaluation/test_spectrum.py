"""Power spectra against NumPy's FFT, signals whose spectra are known, and the files of the figures."""

import csv

import jax
import numpy as np
import pytest
from PIL import Image, ImageFilter

from lpl_jax.data.sources import PhotoSource
from lpl_jax.errors import InputError
from lpl_jax.evaluation import spectrum, spectrum_plots
from lpl_jax.evaluation.spectrum import SpectrumSum

WEIGHTS = np.array([0.299, 0.587, 0.114])


def noise(count, side, seed=0):
    """Independent grey levels, equal in the three channels: white noise of variance (256^2 - 1) / 12 / 255^2."""
    grey = np.random.default_rng(seed).integers(0, 256, (count, side, side, 1), dtype=np.uint8)
    return grey.repeat(3, axis=-1)


def reference_power(images):
    """The definition, in float64, with loops over frequencies left to NumPy."""
    luminance = images.astype(np.float64) @ WEIGHTS / 255
    return np.abs(np.fft.fftshift(np.fft.fft2(luminance), axes=(1, 2))) ** 2 / luminance[0].size


def reference_profile(power):
    """Ring by ring, in polar coordinates found from np.fft.fftfreq."""
    side = power.shape[-1]
    k = np.fft.fftshift(np.fft.fftfreq(side, 1 / side))
    radius = np.round(np.sqrt(k[:, None] ** 2 + k[None] ** 2))
    return np.stack([power[..., radius == f].mean(axis=-1) for f in range(side // 2 + 1)], axis=-1)


@pytest.fixture(scope="module")
def photos():
    source = PhotoSource(64, crops=2)
    return np.stack([source[i].image for i in range(len(source))])


@pytest.fixture(scope="module")
def blurred(photos):
    return np.stack([np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1))) for image in photos])


@pytest.mark.parametrize("side", [16, 33])
def test_power_and_profile_equal_numpy(side):
    images = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    ours, reference = np.asarray(spectrum.power(images)), reference_power(images)
    assert (ours.shape, ours.dtype) == ((3, side, side), np.float32)
    # A coefficient is the sum of up to 1089 numbers below 1, rounded at 6e-8 in each of about ten stages; power near 0
    # is relatively worse, hence the absolute part, at a mean power of 0.05.
    np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)
    profile = SpectrumSum.of_images(images).profiles
    assert (profile.shape, profile.dtype) == ((3, side // 2 + 1), np.float32)
    np.testing.assert_allclose(profile, reference_profile(reference), rtol=1e-5)
    np.testing.assert_array_equal(spectrum.radial_profile(ours)[..., 0], ours[:, side // 2, side // 2])


def test_channels_have_the_weights_of_luminance():
    colours = np.zeros((3, 8, 8, 3), np.uint8)
    colours[range(3), ..., range(3)] = 255
    dc = spectrum.power(colours)[:, 4, 4]  # of a constant c: (64 c)^2 / 64
    np.testing.assert_allclose(dc, 64 * WEIGHTS**2, rtol=1e-5)


def test_parseval(photos):
    """Mean power over the frequencies = mean square over the pixels."""
    luminance = photos.astype(np.float64) @ WEIGHTS / 255
    np.testing.assert_allclose(
        np.asarray(spectrum.power(photos), np.float64).mean(axis=(1, 2)), (luminance**2).mean(axis=(1, 2)), rtol=1e-5
    )


def test_a_cosine_has_all_its_power_on_its_ring():
    side, kx, ky = 64, 9, 12  # |k| = 15
    x = np.arange(side)
    wave = 127.5 + 100 * np.cos(2 * np.pi * (kx * x[None] + ky * x[:, None]) / side)
    image = np.round(wave).astype(np.uint8)[None, ..., None].repeat(3, axis=-1)
    power = np.array(spectrum.power(image))[0]
    places = {(side // 2 + ky, side // 2 + kx), (side // 2 - ky, side // 2 - kx)}
    power[side // 2, side // 2] = 0
    assert set(zip(*np.unravel_index(np.argsort(power.ravel())[-2:], power.shape), strict=True)) == places
    # Amplitude a at +k and at -k: (a / 2)^2 * side^2 each. Rounding by half a level changes a by 2 / pi levels at most.
    for place in places:
        assert power[place] == pytest.approx((100 / 255 / 2) ** 2 * side**2, rel=0.013)
    profile = SpectrumSum.of_images(image).profile
    assert np.argmax(profile[1:]) + 1 == 15
    assert np.delete(profile[1:], 14).max() < 1e-4 * profile[15]  # rounding only


def test_white_noise_is_flat():
    profile = SpectrumSum.of_images(noise(64, 32)).profile
    variance = (256**2 - 1) / 12 / 255**2
    # Power of noise scatters as much as its mean; a ring has at least 8 places, half of them independent, in 64 images:
    # 1 / sqrt(256) = 6 % at the lowest frequency.
    np.testing.assert_allclose(profile[1:], variance, rtol=0.25)
    np.testing.assert_allclose(profile[8:], variance, rtol=0.06)


def test_corners_are_left_out():
    side = 16
    image = np.indices((side, side)).sum(axis=0) % 2  # a chequerboard: all but the mean at (8, 8), |k| = 11.3 > 8
    image = (255 * image).astype(np.uint8)[None, ..., None].repeat(3, axis=-1)
    assert spectrum.power(image)[0, 0, 0] == pytest.approx(0.25 * side**2, rel=1e-5)
    assert SpectrumSum.of_images(image).profile[1:].max() < 1e-12


def test_profile_of_the_mean_is_mean_of_the_profiles(photos):
    spectra = SpectrumSum.of_images(photos)
    np.testing.assert_allclose(spectra.profile, reference_profile(spectra.power), rtol=1e-5)


def test_batches_and_parts_add_up(photos):
    whole = SpectrumSum.of_images(photos)
    parts = SpectrumSum.of_batches(photos[start : start + 5] for start in range(0, len(photos), 5))
    assert (parts.count, parts.resolution) == (len(photos), 64)
    np.testing.assert_allclose(parts.total, whole.total, rtol=1e-6)
    np.testing.assert_allclose(parts.profiles, whole.profiles, rtol=1e-6)
    assert parts.total.dtype == np.float64
    merged = SpectrumSum.merge([SpectrumSum.of_images(photos[:9]), SpectrumSum.of_images(photos[9:])])
    np.testing.assert_allclose(merged.total, whole.total, rtol=1e-12)
    np.testing.assert_allclose(merged.power, whole.total / len(photos), rtol=1e-12)


def test_identical_sets_have_no_error(photos):
    a, b = SpectrumSum.of_images(photos), SpectrumSum.of_images(photos)
    assert spectrum.band_errors(a, b) == {"low": 0, "middle": 0, "high": 0}
    np.testing.assert_array_equal(spectrum.log_ratio_map(a, b), np.zeros((64, 64)))


def test_blur_loses_the_high_band(photos, blurred):
    sharp, soft = SpectrumSum.of_images(photos), SpectrumSum.of_images(blurred)
    errors = spectrum.band_errors(soft, sharp)
    assert errors == spectrum.band_errors(sharp, soft)
    # A Gaussian of 1 pixel: log10 exp(-(2 pi f / 64)^2) is 0.4 at f = 10, 2.7 at f = 25 (PIL's has thicker tails).
    assert errors["low"] < 0.4 < errors["middle"] < errors["high"]
    ratio = spectrum.log_ratio_map(soft, sharp)
    # Away from the axes, which show the step between opposite borders of an image, too: there is no window.
    assert ratio[32, 32] == pytest.approx(0, abs=0.01) and ratio[50, 50] < -1 and ratio[10, 50] < -1


def test_error_curve_is_the_difference_of_logarithms(photos):
    """Half the contrast: a quarter of the power at every frequency but 0, up to the rounding to 8 bits."""
    mean = photos.mean(axis=(1, 2, 3), keepdims=True)
    half = np.round(mean + (photos - mean) / 2).astype(np.uint8)
    a, b = SpectrumSum.of_images(half), SpectrumSum.of_images(photos)
    curve = spectrum.error_curve(a, b)
    assert curve.shape == (33,)
    np.testing.assert_allclose(curve[1:20], np.log10(4), atol=0.02)
    np.testing.assert_allclose(curve, np.abs(np.log10(a.profile) - np.log10(b.profile)), rtol=1e-12)


def test_bands_are_cut_where_the_paper_cuts():
    frequency = np.arange(257.0)
    means = spectrum.band_means(frequency, 512)
    assert means == {"low": np.arange(1, 75).mean(), "middle": np.arange(75, 151).mean(), "high": 203.5}
    means = spectrum.band_means(np.stack([frequency[:129], 2 * frequency[:129]]), 256)  # limits 37.5 and 75
    np.testing.assert_array_equal(means["low"], [19, 38])
    np.testing.assert_array_equal(means["middle"], [56.5, 113])
    np.testing.assert_array_equal(means["high"], [102, 204])
    assert all(np.isfinite(mean) for mean in spectrum.band_means(np.ones(4), 7).values())
    with pytest.raises(InputError, match="at 6 pixels.*at least 7"):
        spectrum.band_means(np.ones(4), 6)
    with pytest.raises(InputError, match="129 frequencies: 512 pixels have 257"):
        spectrum.band_means(frequency[:129], 512)


@pytest.mark.parametrize("side", [16, 250])
@pytest.mark.parametrize("value", [0, 77, 255])
def test_flat_images_have_the_power_of_the_floor(side, value):
    flat = SpectrumSum.of_images(np.full((2, side, side, 3), value, np.uint8))
    logarithm = spectrum.log_power(flat.profile)
    np.testing.assert_array_equal(logarithm[1:], -12)
    places = spectrum.log_power(flat.power)
    places[side // 2, side // 2] = -12
    np.testing.assert_array_equal(places, -12)  # at 250 pixels the mean's rounding would be 30 times the floor
    expected = -12 if value == 0 else 2 * np.log10(value / 255 * side)
    assert logarithm[0] == pytest.approx(expected, abs=1e-5)
    other = SpectrumSum.of_images(noise(2, side))
    assert (
        np.isfinite(spectrum.error_curve(flat, other)).all() and np.isfinite(spectrum.log_ratio_map(flat, other)).all()
    )
    assert spectrum.band_errors(flat, other)["high"] > 9  # noise has -1.1


def test_bootstrap_of_the_error(photos, blurred):
    """Resampled profiles go through the same two functions, in one array."""
    a, b = SpectrumSum.of_images(blurred), SpectrumSum.of_images(photos)
    rows = np.random.default_rng(0).integers(0, a.count, (50, a.count))
    draws = spectrum.profile_error(a.profiles[rows].mean(axis=1), b.profiles[rows].mean(axis=1))
    high = spectrum.band_means(draws, 64)["high"]
    assert high.shape == (50,) and high.min() < spectrum.band_errors(a, b)["high"] < high.max()


def test_what_cannot_be_used_is_refused():
    with pytest.raises(InputError, match="24x16 pixels: needed: square"):
        spectrum.power(np.zeros((1, 16, 24, 3), np.uint8))
    with pytest.raises(InputError, match=r"\(1, 16, 16, 3\), float32: needed: .*uint8"):
        SpectrumSum.of_images(np.zeros((1, 16, 16, 3), np.float32))
    with pytest.raises(InputError, match=r"\(16, 16, 3\)"):
        spectrum.power(np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(InputError, match=r"radial profile of an array \(16, 8\)"):
        spectrum.radial_profile(np.zeros((16, 8), np.float32))
    small, large = (SpectrumSum(np.ones((side, side)), np.ones((2, side // 2 + 1), np.float32)) for side in (8, 9))
    for function in (spectrum.error_curve, spectrum.band_errors, spectrum.log_ratio_map):
        with pytest.raises(InputError, match="8 and of 9 pixels cannot be compared"):
            function(small, large)
    with pytest.raises(InputError, match="8 and of 9 pixels cannot be added"):
        SpectrumSum.merge([small, large])
    with pytest.raises(InputError, match="no images"):
        SpectrumSum.of_batches([])
    with pytest.raises(InputError, match="not finite"):
        spectrum.log_power(np.array([1, np.nan]))


def test_spectra_of_a_sharded_batch():
    """Eight devices, two images each: the same numbers."""
    images = noise(16, 16)
    mesh = jax.make_mesh((8,), ("data",))
    sharded = jax.device_put(images, jax.NamedSharding(mesh, jax.P("data")))
    ours, reference = SpectrumSum.of_images(sharded), SpectrumSum.of_images(images)
    np.testing.assert_allclose(ours.profiles, reference.profiles, rtol=1e-5)
    np.testing.assert_allclose(ours.total, reference.total, rtol=1e-3)


def colours(path):
    """The picture as numbers, and how many of its pixels are clearly red and clearly blue."""
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    difference = picture[..., 0] - picture[..., 2]
    return picture, (difference > 40).sum(), (difference < -40).sum()


def test_maps_are_drawn_and_kept(tmp_path, photos, blurred):
    sharp, soft = SpectrumSum.of_images(photos), SpectrumSum.of_images(blurred)
    ratio = spectrum.log_ratio_map(soft, sharp)
    spectrum_plots.plot_maps(tmp_path / "a.png", {"soft/sharp": ratio})
    spectrum_plots.plot_maps(tmp_path / "b.png", {"sharp, soft": -ratio, "same": ratio * 0})
    with np.load(tmp_path / "b.npz", allow_pickle=False) as kept:
        assert list(kept["titles"]) == ["sharp, soft", "same"]
        np.testing.assert_array_equal(kept["log_ratios"], np.stack([-ratio, ratio * 0]))
    one, red, blue_in_one = colours(tmp_path / "a.png")
    assert blue_in_one > 10 * red  # beyond the colour bar, which has both in equal parts, blurred is weaker all over
    two, red, blue = colours(tmp_path / "b.png")
    assert red > 10 * blue and two.shape[1] > 1.5 * one.shape[1]
    spectrum_plots.plot_maps(tmp_path / "rows.png", {f"set {index}": ratio for index in range(5)})  # 4 and 1
    rows, _, blue_in_rows = colours(tmp_path / "rows.png")
    assert rows.shape[0] == 2 * one.shape[0] and blue_in_rows > 3 * blue_in_one
    with pytest.raises(InputError, match="at least one map"):
        spectrum_plots.plot_maps(tmp_path / "c.png", {})
    with pytest.raises(InputError, match=r"\(8, 8\), \(9, 9\)"):
        spectrum_plots.plot_maps(tmp_path / "c.png", {"a": np.zeros((8, 8)), "b": np.zeros((9, 9))})
    with pytest.raises(InputError, match="c.pdf.*ends in .png"):
        spectrum_plots.plot_maps(tmp_path / "c.pdf", {"a": ratio})
    assert not list(tmp_path.glob("c.*"))


def test_error_curves_are_drawn_and_kept(tmp_path, photos, blurred):
    sharp, soft = SpectrumSum.of_images(photos), SpectrumSum.of_images(blurred)
    spectrum_plots.plot_errors(tmp_path / "errors.png", {"soft, 1 px": soft, "same": sharp}, sharp)
    assert (colours(tmp_path / "errors.png")[0] < 200).any()
    with (tmp_path / "errors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = ["log10_power:reference", "log10_power:soft, 1 px", "error:soft, 1 px", "log10_power:same", "error:same"]
    assert list(rows[0]) == ["frequency", *names]
    table = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    np.testing.assert_array_equal(table["frequency"], np.arange(33))
    np.testing.assert_array_equal(table["error:soft, 1 px"], spectrum.error_curve(soft, sharp))  # every digit
    np.testing.assert_array_equal(table["error:same"], 0)
    np.testing.assert_array_equal(table["log10_power:reference"], np.log10(sharp.profile))
    np.testing.assert_array_equal(
        np.abs(table["log10_power:soft, 1 px"] - table["log10_power:reference"]), table["error:soft, 1 px"]
    )
    with pytest.raises(InputError, match="no sets"):
        spectrum_plots.plot_errors(tmp_path / "none.png", {}, sharp)
