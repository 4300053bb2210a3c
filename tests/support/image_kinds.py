"""Image files of all kinds that people have, made here, each with the pixels that a viewer shows on white paper."""

import functools
import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms

HEIGHT, WIDTH = 24, 32


def smooth(seed=0, channels=3):
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    return image if channels == 3 else image[..., 0]


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(size, bits, colour, rows, *chunks):
    """A PNG by hand: its header, `chunks` of (kind, content), and the rows as they are."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0))
    others = b"".join(chunk(*each) for each in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + others + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png16(levels, *chunks):
    """A PNG of 16 bits per channel: uint16 (H, W) or (H, W, 3). Pillow writes none in colour."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    return png(levels.shape[1::-1], 16, 0 if levels.ndim == 2 else 2, rows, *chunks)


def tiff(size, bits, photometric, data):
    """A grey-scale TIFF by hand, little-endian, of one strip."""
    tags = {256: size[0], 257: size[1], 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: size[1]}
    tags[279] = len(data)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def packed12(levels):
    """Rows of 12-bit numbers, two in three bytes."""
    first, second = levels[:, ::2].astype(int), levels[:, 1::2].astype(int)
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8).tobytes()


def on_white(image, alpha):
    alpha = alpha[..., None] / 255
    return np.rint(image * alpha + 255 * (1 - alpha)).astype(np.uint8)


def repeated(grey):
    return np.repeat(np.asarray(grey, np.uint8)[..., None], 3, -1)


def lab(image):
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.applyTransform(Image.fromarray(image), ImageCms.buildTransform(*profiles, "RGB", "LAB"))


@functools.cache
def kinds():
    """Name -> (bytes of the file, uint8 (H, W, 3), how far a level may be off)."""
    return _plain() | _transparent() | _deep() | _several() | _with_texts()


def _plain():
    image, grey = smooth(), smooth(channels=1)
    palette = Image.fromarray(image).quantize(16)
    bits = Image.fromarray(grey).convert("1")
    return {
        "png": (encoded(image), image, 0),
        "bmp": (encoded(image, "BMP"), image, 0),
        "tiff": (encoded(image, "TIFF"), image, 0),
        "tiff-lzw": (encoded(image, "TIFF", compression="tiff_lzw"), image, 0),
        "webp": (encoded(image, "WEBP", lossless=True), image, 0),
        "jpeg": (encoded(image, "JPEG", quality=95), image, 20),
        "avif": (encoded(image, "AVIF", quality=95), image, 20),
        "gif": (encoded(palette, "GIF"), np.asarray(palette.convert("RGB")), 0),
        "palette": (encoded(palette), np.asarray(palette.convert("RGB")), 0),
        "1-bit": (encoded(bits), repeated(np.asarray(bits) * 255), 0),
        "grey": (encoded(grey), repeated(grey), 0),
        "grey-jpeg": (encoded(grey, "JPEG", quality=95), repeated(grey), 12),
        "cmyk-jpeg": (encoded(Image.fromarray(image).convert("CMYK"), "JPEG", quality=95), image, 20),
        "cmyk-tiff": (encoded(Image.fromarray(image).convert("CMYK"), "TIFF"), image, 1),
        "ycbcr-tiff": (encoded(Image.fromarray(image).convert("YCbCr"), "TIFF"), image, 4),
        "lab-tiff": (encoded(lab(image // 2 + 64), "TIFF"), image // 2 + 64, 12),
    }


def _transparent():
    image, grey, alpha = smooth(), smooth(channels=1), smooth(1, channels=1)
    rgba, la = np.concatenate([image, alpha[..., None]], -1), np.stack([grey, alpha], -1)
    opaque = np.concatenate([image, np.full_like(alpha[..., None], 255)], -1)
    palette = Image.fromarray(image).quantize(16)
    indices, colours = np.asarray(palette), np.asarray(palette.convert("RGB"))
    levels = bytes(range(0, 256, 16))
    keyed, key = image.copy(), (9, 8, 7)
    keyed[3:9, 4:20] = key
    hole = np.where((keyed == key).all(-1), 0, 255)
    return {
        "rgba": (encoded(rgba), on_white(image, alpha), 1),
        "rgba-opaque": (encoded(opaque), image, 0),
        "rgba-tiff": (encoded(rgba, "TIFF"), on_white(image, alpha), 1),
        "rgba-webp": (encoded(rgba, "WEBP", lossless=True, exact=True), on_white(image, alpha), 1),
        "grey-alpha": (encoded(Image.fromarray(la, "LA")), on_white(repeated(grey), alpha), 1),
        "palette-alphas": (
            encoded(palette, transparency=levels),
            on_white(colours, np.array(list(levels))[indices]),
            1,
        ),
        "palette-key": (encoded(palette, transparency=3), on_white(colours, np.where(indices == 3, 0, 255)), 0),
        "gif-key": (encoded(palette, "GIF", transparency=3), on_white(colours, np.where(indices == 3, 0, 255)), 0),
        "rgb-key": (encoded(keyed, transparency=key), on_white(keyed, hole), 0),
        "grey-key": (
            encoded(grey, transparency=int(grey[0, 0])),
            on_white(repeated(grey), np.where(grey == grey[0, 0], 0, 255)),
            0,
        ),
    }


def _deep():
    image, grey = smooth(), smooth(channels=1)
    low = np.random.default_rng(2).integers(0, 256, image.shape, np.uint16)
    deep, deep_grey = image.astype(np.uint16) << 8 | low, grey.astype(np.uint16) << 8 | low[..., 0]
    key = int(deep_grey[5, 5])
    hole = np.where(deep_grey == key, 0, 255)
    big = Image.frombytes("I;16B", (WIDTH, HEIGHT), deep_grey.astype(">u2").tobytes())
    return {
        "colour-16": (png16(deep), image, 0),
        "grey-16": (png16(deep_grey), repeated(grey), 0),
        "grey-16-key": (png16(deep_grey, (b"tRNS", struct.pack(">H", key))), on_white(repeated(grey), hole), 0),
        "grey-16-tiff": (encoded(deep_grey, "TIFF"), repeated(grey), 0),
        "grey-16-big-endian": (encoded(big, "TIFF"), repeated(grey), 0),
        "grey-16-negative": (
            tiff((WIDTH, HEIGHT), 16, 0, (65535 - deep_grey).astype("<u2").tobytes()),
            repeated(grey),
            0,
        ),
        "grey-12": (tiff((WIDTH, HEIGHT), 12, 1, packed12(deep_grey >> 4)), repeated(grey), 0),
    }


def _several():
    first, *others = [Image.fromarray(smooth(seed)) for seed in range(3)]
    palettes = [frame.quantize(16) for frame in (first, *others)]
    several = dict(save_all=True, append_images=others)
    return {
        "frames-png": (encoded(first, **several), smooth(), 0),
        "frames-webp": (encoded(first, "WEBP", lossless=True, **several), smooth(), 0),
        "frames-gif": (
            encoded(palettes[0], "GIF", save_all=True, append_images=palettes[1:]),
            np.asarray(palettes[0].convert("RGB")),
            0,
        ),
        "pages-tiff": (encoded(smooth(), "TIFF", **several), smooth(), 0),
        "pictures-jpeg": (encoded(smooth(), "MPO", quality=95, **several), smooth(), 20),
        "frames-avif": (encoded(smooth(), "AVIF", quality=95, **several), smooth(), 20),
    }


def _with_texts():
    """What front ends and editors put into PNGs: workflows, profiles, and what would fill the memory."""
    rows = b"".join(b"\0" + row.tobytes() for row in smooth())
    noise = np.random.default_rng(3).integers(32, 127, 2**21, np.uint8).tobytes()
    zeros = zlib.compress(bytes(2**26))
    chunks = {
        "text": (b"tEXt", b"workflow\0" + noise),
        "compressed-text": (b"zTXt", b"workflow\0\0" + zlib.compress(noise)),
        "text-bomb": (b"zTXt", b"workflow\0\0" + zeros),
        "unicode-bomb": (b"iTXt", b"workflow\0\1\0\0\0" + zeros),
        "profile-bomb": (b"iCCP", b"profile\0\0" + zeros),
    }
    return {name: (png((WIDTH, HEIGHT), 8, 2, rows, part), smooth(), 0) for name, part in chunks.items()}


def damaged():
    """Name -> (bytes of the file, what is said of it)."""
    image = smooth()
    flipped = bytearray(encoded(image))
    flipped[len(flipped) // 2] ^= 1
    key = (b"tRNS", struct.pack(">HHH", 1, 2, 3))
    return {
        "float": (encoded(image[..., 0].astype(np.float32), "TIFF"), "floating point"),
        "integers": (encoded(image[..., 0].astype(np.int32), "TIFF"), "32-bit integers"),
        "colour-16-key": (png16(image.astype(np.uint16) << 8, key), "a transparent colour of 16 bits"),
        "ppm": (encoded(image, "PPM"), "a PNM file, which is not read; possible: JPEG, PNG"),
        "empty": (b"", "not an image that can be read"),
        "text": (b"404: not found", "not an image that can be read"),
        "flipped-bit": (bytes(flipped), "wrong checksum"),
        "png-start": (encoded(image)[:8], "the end of the file is missing"),
        "png-without-end": (encoded(image)[:-12], "the end of the file is missing"),
    }


def bombs():
    """Name -> small files whose headers claim to be huge."""
    image = smooth()
    size = WIDTH, HEIGHT

    def claiming(content, old, new):
        assert content.count(old) >= 1
        return content.replace(old, new, 1)

    jpeg, gif, bmp = encoded(image, "JPEG"), encoded(Image.fromarray(image).quantize(4), "GIF"), encoded(image, "BMP")
    extended = encoded(np.dstack([image, image[..., :1]]), "WEBP")
    return {
        "png": png((60_000, 60_000), 8, 2, b""),
        "png-line": png((2**31 - 1, 1), 1, 0, b""),
        "jpeg": claiming(jpeg, struct.pack(">HH", HEIGHT, WIDTH), struct.pack(">HH", 65_000, 65_000)),
        "gif": claiming(gif, struct.pack("<HH", *size), struct.pack("<HH", 65_000, 65_000)),
        "bmp": claiming(bmp, struct.pack("<ii", *size), struct.pack("<ii", 60_000, 60_000)),
        "tiff": tiff((60_000, 60_000), 16, 1, bytes(100)),
        "webp": extended[:24] + b"\xfe\xff\x00\xfe\xff\x00" + extended[30:],
        "avif": claiming(encoded(image, "AVIF"), struct.pack(">II", *size), struct.pack(">II", 60_000, 60_000)),
    }
