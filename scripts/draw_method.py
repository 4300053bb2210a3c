"""Draw docs/method.png and docs/method-dark.png, the picture of the method at the top of the README.

    python scripts/draw_method.py

Its maps are real: a rendered scene, the bundled autoencoder, masks and normalised differences of `LPLConfig.paper()`,
one channel of each tap. Only the denoiser is a stand-in, total variation denoising of z_t.
"""

from pathlib import Path

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image
from skimage.restoration import denoise_tv_chambolle

from lpl_jax import autoencoders
from lpl_jax.autoencoders import AutoencoderConfig
from lpl_jax.losses import LPLConfig, outlier_mask

DOCS = Path(__file__).parents[1] / "docs"
SIDE = 256  # pixels of the image
ALPHA, SIGMA = 0.92, 0.39  # a noise level of 0.43, under the threshold

LIGHT = {
    "page": "#ffffff", "panel": "#f3f6fa", "box": "#ffffff", "ink": "#1f2328", "soft": "#59636e", "edge": "#b9c2cc",
    "predicted": "#0969da", "clean": "#1a7f37", "loss": "#bc4c00", "outlier": "#ff3b30",
}  # fmt: skip
DARK = {
    "page": "#0d1117", "panel": "#161c25", "box": "#0d1117", "ink": "#e6edf3", "soft": "#9aa4af", "edge": "#49525d",
    "predicted": "#58a6ff", "clean": "#3fb950", "loss": "#f0883e", "outlier": "#ff3b30",
}  # fmt: skip

# Inches from the lower left corner.
WIDTH, HEIGHT = 12.4, 5.5
TOP, MIDDLE, BOTTOM = 3.98, 2.60, 1.22  # rows: prediction, comparison, data
LATENT, DENOISER, ESTIMATE, GATE, PANEL = 2.98, 4.03, 5.10, 6.12, 6.82  # columns, and the left edge of the decoder
TAPS = [(7.24, 0.58), (8.07, 0.70), (9.07, 0.86), (10.26, 1.06), (11.55, 1.06)]  # centre and side of each map


def unit(values, quantile=0.01):
    """Values brought to 0..1, but for the extremes on both sides."""
    low, high = np.quantile(values, [quantile, 1 - quantile])
    return np.clip((values - low) / (high - low), 0, 1)


def scene(side):
    """A picture of our own: striped spheres on a tiled floor, ray cast with one light; uint8 (side, side, 3)."""
    x, y = np.meshgrid(*2 * [(np.arange(side) + 0.5) / side * 2 - 1])
    ray = np.stack([x, -y - 0.28, np.full_like(x, 1.7)], -1)
    ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
    eye, light = np.array([0.0, 0.75, -3.2]), np.array([-0.55, 0.8, -0.45])
    light /= np.linalg.norm(light)
    balls = [  # centre, radius, two colours
        ((-0.62, 0.05, 0.25), 0.75, (0.78, 0.22, 0.12), (0.96, 0.80, 0.55)),
        ((0.78, -0.15, -0.35), 0.55, (0.10, 0.35, 0.62), (0.85, 0.92, 0.95)),
        ((0.25, -0.42, -1.15), 0.28, (0.90, 0.62, 0.10), (0.35, 0.18, 0.05)),
    ]
    depth = np.where(ray[..., 1] < -1e-3, (-0.7 - eye[1]) / np.minimum(ray[..., 1], -1e-3), np.inf)
    floor = eye + np.where(np.isfinite(depth), depth, 0)[..., None] * ray
    tiles = (np.floor(floor[..., 0] * 2.2) + np.floor(floor[..., 2] * 2.2)) % 2
    colour = np.where(tiles[..., None] > 0, [0.62, 0.42, 0.27], [0.86, 0.76, 0.62])
    shade = np.full(x.shape, 0.95)
    for centre, radius, *_ in balls:  # shadows on the floor
        to_centre = np.array(centre) - floor
        along = to_centre @ light
        miss = np.linalg.norm(to_centre - along[..., None] * light, axis=-1)
        shade = np.where(along > 0, np.minimum(shade, 0.38 + 0.57 * np.clip((miss / radius - 0.85) / 0.3, 0, 1)), shade)
    colour = np.where(np.isfinite(depth)[..., None], colour * shade[..., None], 0)
    sky = np.stack([0.55 + 0.2 * y, 0.62 + 0.14 * y, 0.72 + 0.02 * y], -1)
    haze = np.clip(np.where(np.isfinite(depth), depth, 1e3) / 14, 0, 1)[..., None]
    colour = colour * (1 - haze) + sky * haze
    for centre, radius, first, second in balls:
        to_eye = eye - np.array(centre)
        half = (ray * to_eye).sum(-1)
        inside = half**2 - to_eye @ to_eye + radius**2
        reach = -half - np.sqrt(np.maximum(inside, 0))
        hit = (inside > 0) & (reach < depth)
        depth = np.where(hit, reach, depth)
        normal = (eye + reach[..., None] * ray - np.array(centre)) / radius
        angle = np.arctan2(normal[..., 2], normal[..., 0]) + 1.3 * normal[..., 1]
        stripes = np.clip(0.5 + 2.5 * np.sin(7 * angle) * np.sqrt(np.maximum(1 - normal[..., 1] ** 2, 0)), 0, 1)
        skin = stripes[..., None] * first + (1 - stripes[..., None]) * np.array(second)
        diffuse = 0.25 + 0.75 * np.maximum(normal @ light, 0)
        gloss = np.maximum((2 * (normal @ light)[..., None] * normal - light) @ -np.array([0, 0.2, 1.0]), 0) ** 24
        ball = skin * diffuse[..., None] + 0.8 * gloss[..., None]
        colour = np.where(hit[..., None], ball, colour)
    return np.uint8(np.clip(colour, 0, 1) ** (1 / 1.6) * 255 + 0.5)


def maps():
    """Pictures by name: image, latents in three colours, and for each tap (predicted, difference, clean)."""
    picture = Image.fromarray(scene(4 * SIDE)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    autoencoder, config = autoencoders.load("bundled"), LPLConfig.paper()
    z0 = np.asarray(autoencoder.scale(autoencoder.encode(np.float32(picture)[None] / 127.5 - 1).mean))
    z_t = ALPHA * z0 + SIGMA * np.random.default_rng(0).standard_normal(z0.shape).astype(np.float32)
    z0_hat = denoise_tv_chambolle(z_t[0] / ALPHA, weight=0.35, channel_axis=-1)[None].astype(np.float32)
    taps = []
    both = zip(autoencoder.features(jnp.asarray(z0_hat)), autoencoder.features(jnp.asarray(z0)), strict=True)
    for tap, (predicted, clean) in enumerate(both):
        closing, opening = config.kernels(tap, predicted.shape[1])
        keep = np.ones(predicted.shape, bool)
        if config.masked(tap):
            keep = np.asarray(outlier_mask(predicted, closing=closing, opening=opening, quantile=config.quantile))
        taps.append(tap_maps(np.asarray(predicted[0]), np.asarray(clean[0]), keep[0]))
    latents = {"z0": z0[0], "z_t": z_t[0], "z0_hat": z0_hat[0]}
    return {"image": np.asarray(picture), **latent_colours(latents, picture), "taps": taps}


def latent_colours(latents, picture):
    """Each latent in the colours of the linear map that comes closest to the picture for z0."""
    rows, columns, _ = latents["z0"].shape
    small = np.asarray(picture.resize((columns, rows), Image.Resampling.BOX)) / 255
    linear, *_ = np.linalg.lstsq(with_ones(latents["z0"]).reshape(rows * columns, -1), small.reshape(-1, 3), rcond=None)
    return {name: np.clip(with_ones(latent) @ linear, 0, 1) for name, latent in latents.items()}


def with_ones(latent):
    return np.concatenate([latent, np.ones_like(latent[..., :1])], axis=-1)


def tap_maps(predicted, clean, keep):
    """One channel of a tap: most outliers where they are masked, else the one in which both maps agree best."""
    agreement = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(predicted.T, clean.T, strict=True)]
    masked = 1 - keep.mean((0, 1))
    channel = int(np.argmax(masked if masked.any() else agreement))
    predicted, clean, keep = (values[..., channel] for values in (predicted, clean, keep))
    difference = np.where(keep, predicted - clean, 0) / predicted[keep].std()
    shown = mpl.colormaps["gray"](unit(predicted))
    shown[~keep] = mpl.colors.to_rgba(LIGHT["outlier"])
    return shown, mpl.colormaps["magma"](np.clip(np.abs(difference) / 3, 0, 1)), mpl.colormaps["gray"](unit(clean))


class Canvas:
    """Shapes on one page, in inches, in the colours of a theme."""

    def __init__(self, theme):
        self.theme = theme
        self.figure = Figure(figsize=(WIDTH, HEIGHT), dpi=140, facecolor=theme["page"])
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.axis("off")

    def image(self, pixels, x, y, side, edge="edge"):
        extent = (x - side / 2, x + side / 2, y - side / 2, y + side / 2)
        interpolation = "nearest" if len(pixels) < 100 else "antialiased"
        self.axes.imshow(pixels, extent=extent, interpolation=interpolation, zorder=3)
        self.box(x, y, side, side, edge=edge, fill="none", rounding=0)

    def box(self, x, y, width, height, *, edge="edge", fill="box", rounding=0.08):
        shape = f"round,pad=0,rounding_size={rounding}" if rounding else "square,pad=0"
        colours = {"edgecolor": self.theme.get(edge, edge), "facecolor": self.theme.get(fill, fill)}
        patch = FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle=shape, linewidth=1.3, **colours)
        patch.set_zorder(3 if fill == "none" else 1)
        self.axes.add_patch(patch)

    def text(self, x, y, text, colour="ink", size=13, **style):
        style = {"ha": "center", "va": "center", "linespacing": 1.3, **style}
        self.axes.text(x, y, text, color=self.theme[colour], fontsize=size, **style)

    def arrow(self, *points, colour="soft", **style):
        """A line through the points, with a head at the last one."""
        style = {"linewidth": 1.6, "color": self.theme[colour], **style}
        self.axes.plot(*zip(*points[:-1], strict=True), solid_capstyle="butt", **style)
        head = {"arrowstyle": "-|>", "mutation_scale": 14, "shrinkA": 0, "shrinkB": 0}
        self.axes.add_patch(FancyArrowPatch(*points[-2:], **head, **style))


def draw(pictures, theme):
    page = Canvas(theme)
    decoder(page, pictures["taps"])
    denoising(page, pictures)
    losses(page)
    page.axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
    return page.figure


def denoising(page, pictures):
    """The left part: image, latent, noise, denoiser, estimate."""
    page.image(pictures["image"], 0.72, BOTTOM, 1.06)
    page.text(0.72, BOTTOM - 0.72, f"image, {SIDE} px", "soft", size=11.5)
    page.arrow((1.26, BOTTOM), (1.50, BOTTOM))
    page.box(1.95, BOTTOM, 0.90, 0.56)
    page.text(1.95, BOTTOM, "encoder")
    page.arrow((2.40, BOTTOM), (2.64, BOTTOM))
    page.image(pictures["z0"], LATENT, BOTTOM, 0.66, "clean")
    page.text(LATENT, BOTTOM - 0.54, "$z_0$", size=16)
    page.arrow((LATENT, BOTTOM + 0.35), (LATENT, MIDDLE - 0.14), colour="clean")
    page.text(LATENT, MIDDLE, r"$\oplus$", size=22)
    page.text(2.16, MIDDLE, "noise,\nlevel $t$", "soft")
    page.arrow((2.56, MIDDLE), (2.83, MIDDLE))
    page.arrow((LATENT, MIDDLE + 0.14), (LATENT, TOP - 0.35))
    page.image(pictures["z_t"], LATENT, TOP, 0.66)
    page.text(LATENT, TOP + 0.54, "$z_t$", size=16)
    page.arrow((LATENT + 0.35, TOP), (DENOISER - 0.56, TOP))
    page.box(DENOISER, TOP, 1.12, 0.66, edge="predicted")
    page.text(DENOISER, TOP, "denoiser", weight="bold")
    page.arrow((DENOISER + 0.56, TOP), (ESTIMATE - 0.34, TOP), colour="predicted")
    page.image(pictures["z0_hat"], ESTIMATE, TOP, 0.66, "predicted")
    page.text(ESTIMATE, TOP + 0.54, r"$\hat{z}_0$", size=16)


def decoder(page, taps):
    """The right part: both latents part-way through the frozen decoder, and their differences tap by tap."""
    low, high, right = 0.14, 4.98, WIDTH - 0.14
    page.box((PANEL + right) / 2, (low + high) / 2, right - PANEL, high - low, fill="panel", rounding=0.14)
    page.text(PANEL + 0.16, high - 0.23, "\u2744 frozen decoder, part-way", weight="bold", ha="left")
    page.arrow((ESTIMATE + 0.35, TOP), (TAPS[0][0] - 0.30, TOP), colour="predicted")
    page.arrow((LATENT + 0.35, BOTTOM), (TAPS[0][0] - 0.30, BOTTOM), colour="clean")
    page.text(5.0, BOTTOM + 0.20, "clean branch: no gradient", "soft")
    page.box(GATE, TOP, 0.98, 0.46, edge="predicted", rounding=0.22)
    page.text(GATE, TOP, r"$\sigma_t/\alpha_t\leq\tau$", size=14)
    page.text(GATE, TOP - 0.42, "low noise only", "soft", size=11.5)
    names = AutoencoderConfig().tap_names
    for index, ((x, side), name, (predicted, difference, clean)) in enumerate(zip(TAPS, names, taps, strict=True)):
        page.image(predicted, x, TOP, side, "predicted")
        page.image(difference, x, MIDDLE, side, "loss")
        page.image(clean, x, BOTTOM, side, "clean")
        page.arrow((x, TOP - side / 2), (x, MIDDLE + side / 2))
        page.arrow((x, BOTTOM + side / 2), (x, MIDDLE - side / 2))
        page.text(x, 0.45, name, size=12.5, weight="bold", va="baseline")
        page.text(x, 0.29, f"{len(clean)} \u00d7 {len(clean)}", "soft", size=11.5)
        if index:
            before, width = TAPS[index - 1]
            for y, colour in ((TOP, "predicted"), (BOTTOM, "clean")):
                page.arrow((before + width / 2, y), (x - side / 2, y), colour=colour)


def losses(page):
    """The middle: what is summed, and the way of the gradient."""
    page.box(4.62, MIDDLE, 2.30, 0.62, edge="loss", rounding=0.14)
    page.text(4.62, MIDDLE, r"$\mathcal{L}_\mathrm{diffusion} + w\,\mathcal{L}_\mathrm{LPL}$", size=16)
    page.arrow((DENOISER, TOP - 0.33), (DENOISER, MIDDLE + 0.31), colour="loss")
    (last, side), first = TAPS[-1], TAPS[0][0]
    page.arrow((last, MIDDLE), (first, MIDDLE), (5.77, MIDDLE), colour="loss")
    page.text(6.30, MIDDLE + 0.28, r"$\sum_l\,\omega_l$", size=14)
    each_tap = "each tap: mask outliers, normalise\nchannels, square the difference"
    page.text(5.02, MIDDLE - 0.64, each_tap, "soft", size=11.5)
    way = [(last, TOP + side / 2), (last, 5.24), (DENOISER, 5.24), (DENOISER, TOP + 0.33)]
    page.arrow(*way, colour="loss", linestyle=(0, (4, 2)))
    page.text((last + DENOISER) / 2, 5.24, "gradient", "loss", bbox={"facecolor": page.theme["page"], "linewidth": 0})
    page.box(9.98, 4.74, 0.13, 0.13, edge="outlier", fill="outlier", rounding=0)
    page.text(10.12, 4.74, "outliers", "soft", size=11.5, ha="left")
    page.text(0.19, 5.10, "Latent Perceptual Loss", size=15, weight="bold", ha="left")
    page.text(0.19, 4.45, "compares estimate and data\nin the features of the\nfrozen decoder", "soft", ha="left")


def save(figure, path):
    """As a PNG of 256 colours."""
    figure.canvas.draw()
    pixels = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    pixels.quantize(256, kmeans=4, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    mpl.rcParams.update({"mathtext.fontset": "cm", "font.family": "DejaVu Sans"})
    found = maps()
    for name, theme in (("method.png", LIGHT), ("method-dark.png", DARK)):
        save(draw(found, theme), DOCS / name)
