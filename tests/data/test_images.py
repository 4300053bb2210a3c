import numpy as np
import pytest
from PIL import Image

from lpl_jax.data.images import Crop
from lpl_jax.errors import InputError


def gradient(width, height):
    """Red grows by one per column, green by one per row: a pixel tells where it came from."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8))


def test_center_crop_takes_the_centre():
    pixels = Crop(16, "center_crop")(gradient(40, 30), 0, "image")
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels[0, :, 0], np.arange(12, 28))
    np.testing.assert_array_equal(pixels[:, 0, 1], np.arange(7, 23))


def test_center_crop_refuses_a_small_image():
    with pytest.raises(InputError, match="cat.png: 20x12 pixels.*center_crop at 16"):
        Crop(16, "center_crop")(gradient(20, 12), 0, "cat.png")


@pytest.mark.parametrize(("width", "height"), [(200, 120), (90, 200), (64, 64), (20, 30)])
def test_resize_center_crop_resizes_the_shorter_side(width, height):
    """Against the rule in two steps; (20, 30) is enlarged, by the same filter."""
    image = gradient(width, height)
    pixels = Crop(64)(image, 0, "image")
    scale = 64 / min(width, height)
    resized = np.asarray(image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS))
    top, left = (resized.shape[0] - 64) // 2, (resized.shape[1] - 64) // 2
    np.testing.assert_array_equal(pixels, resized[top : top + 64, left : left + 64])


def test_random_crop_is_a_function_of_seed_and_index():
    image = gradient(200, 120)
    crop = Crop(32, "random_crop", seed=1)
    first = crop(image, 5, "image")
    np.testing.assert_array_equal(first, crop(image, 5, "image"))
    assert (first != crop(image, 6, "image")).any()
    assert (first != Crop(32, "random_crop", seed=2)(image, 5, "image")).any()


def test_random_crop_takes_squares_of_the_stated_size_from_everywhere():
    image = gradient(200, 120)
    crop = Crop(32, "random_crop", side=(0.5, 0.8))
    crops = np.stack([crop(image, i, "image") for i in range(60)]).astype(float)
    # The gradient is one level per pixel: the range of a crop, over 31 of its 32 steps, is its side.
    width = (crops[:, 0, -1, 0] - crops[:, 0, 0, 0]) * 32 / 31
    height = (crops[:, -1, 0, 1] - crops[:, 0, 0, 1]) * 32 / 31
    np.testing.assert_allclose(width, height, atol=4)
    assert 0.5 * 120 - 4 < width.min() < 0.55 * 120 and 0.75 * 120 < width.max() < 0.8 * 120 + 4
    assert crops[..., 0].min() < 15 and crops[..., 0].max() > 185, "both ends of the longer side occur"


@pytest.mark.parametrize(
    ("width", "height", "crop", "place"),
    [
        (201, 120, Crop(64), (0, 21, 22)),  # resized to 107 x 64: 43 columns to lose
        (90, 203, Crop(64), (40, 0, 0)),  # 64 x 144
        (31, 20, Crop(64), (0, 17, 18)),  # enlarged to 99 x 64
        (64, 64, Crop(64), (0, 0, 0)),
        (41, 30, Crop(16, "center_crop"), (7, 12, 13)),
        (16, 19, Crop(16, "center_crop"), (1, 0, 0)),
    ],
)
def test_control_tells_where_a_crop_lies(width, height, crop, place):
    """Top, left, and left in the mirror image: in the numbers, and by cutting there."""
    image, side = gradient(width, height), crop.resolution
    pixels, control = crop.with_control(image, 0, "image")
    np.testing.assert_array_equal(pixels, crop(image, 0, "image"))
    top, left, mirrored = place
    assert control.tolist() == [[height, width, top, left], [height, width, top, mirrored]]
    assert control.dtype == np.int32
    scale = side / min(width, height) if crop.rule == "resize_center_crop" else 1
    size = round(width * scale), round(height * scale)
    resized = np.asarray(image.resize(size, Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(resized[top : top + side, left : left + side], pixels)
    np.testing.assert_array_equal(resized[:, ::-1][top : top + side, mirrored : mirrored + side], pixels[:, ::-1])


def test_control_of_random_crops_is_counted_in_the_resized_image():
    """Squares of 84 pixels become 168: places are those in an image of twice the size, 400 x 240."""
    crop = Crop(168, "random_crop", side=(0.7, 0.7), seed=3)
    places = set()
    for index in range(8):
        pixels, control = crop.with_control(gradient(200, 120), index, "image")
        (height, width, top, left), mirrored = control.tolist()
        assert (height, width) == (120, 200) and mirrored == [120, 200, top, 400 - 168 - left]
        # Pixel 84 is centred on (place + 84.5) / 2 of the image, which is its colour plus a half. Rounding the place
        # moves that by up to 1/4, rounding the colour by up to 1/2.
        np.testing.assert_allclose(pixels[84, 84, 0], (left + 84.5) / 2 - 0.5, atol=0.76)
        np.testing.assert_allclose(pixels[84, 84, 1], (top + 84.5) / 2 - 0.5, atol=0.76)
        places.add((top, left))
    assert len(places) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 0}, "resolution=0"),
        ({"resolution": 8, "rule": "squeeze"}, "'squeeze'.*resize_center_crop"),
        ({"resolution": 8, "side": (0.5, 1.5)}, "side=.*shorter side"),
        ({"resolution": 8, "seed": -1}, "seed=-1"),
    ],
)
def test_crop_checks_its_fields(options, message):
    with pytest.raises(InputError, match=message):
        Crop(**options)


def test_crop_names_say_what_was_done():
    assert str(Crop(8)) == "resize_center_crop"
    assert str(Crop(8, "random_crop", seed=3)) == "random_crop(side=0.6-1, seed=3)"
