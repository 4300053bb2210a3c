"""Every choice of the Latent Perceptual Loss in one frozen dataclass, with the two published readings as presets."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from typing_extensions import override

from lpl_jax.errors import InputError, nearest
from lpl_jax.fields import Check, Part, above, between, check_names, each, field, one_of, whole, word_or
from lpl_jax.limits import CALIBRATED_SHARE, NOISE_LEVEL, SIDE, WEIGHT
from lpl_jax.losses.outliers import kernel_sizes
from lpl_jax.losses.quantiles import METHODS

# Taps from this number on, counted from 0, are the deep ones: upscaled at least fourfold over the first.
FIRST_DEEP_TAP = 2
# The public code counts the upscaling of taps by their number: 1, 2, 4, 8 and no more (2^min(i, 3)).
_LAST_UPSCALED_TAP = 3
# Outlier filters are stated for the largest maps of a 512 px image.
_REFERENCE_MAP_SIZE = 512


def upscaling_by_number(tap: int) -> int:
    """Upscaling of a tap, counted from 0, over the first, as far as its number tells it: 1, 2, 4, 8, 8, ..."""
    return 2 ** min(tap, _LAST_UPSCALED_TAP)


MOST_TAPS = 64
_WIDEST = 1023
_ODD = Check(
    lambda value: 1 <= value <= _WIDEST and value % 2 == 1,
    f"odd, 1 to {_WIDEST:,} (an even window has no centre pixel)",
)
_MASKED = each(whole(0, MOST_TAPS - 1), MOST_TAPS)
_MASKS = ("deep", "all", "none")


@dataclasses.dataclass(frozen=True)
class LPLConfig(Part, section="lpl"):
    """What the Latent Perceptual Loss compares, how, and on which samples (arXiv 2411.04873, Sec. 3.2).

    Field defaults are those of the paper, except that the gate and the weight have none: `LPLConfig.paper()` and
    `LPLConfig.reference()` set them. The dataclass is hashable and serves as a static argument of `jax.jit`.

    Raises InputError for a value that is not possible or two fields that contradict each other.
    """

    # --- which samples ---
    tau: float | None = field(
        None,
        "largest noise level sigma/alpha that takes part (inf: all), for tau_ref_resolution",
        above(0, NOISE_LEVEL, or_infinite=True),
    )
    tau_ref_resolution: int | None = field(
        None, "image side that tau is stated for; tau grows linearly with the side. Given together with tau", SIDE
    )
    batch: Literal["all", "active"] = field("all", "average over all samples, or the ones under tau: all | active")
    extra_weight: Literal["none", "min_snr"] = field("none", "weight per sample: none | min_snr (uses loss.gamma)")

    # --- which features ---
    taps: int | str = field(
        "all",
        "maps that are compared: all of the decoder (mid, up_0, ..) | a number: the first so many | rgb: decoded "
        "images, compared as they are (statistics, masks, omega and post_quant_conv=False do not apply)",
        word_or(whole(1, MOST_TAPS), "all", "rgb"),
    )
    post_quant_conv: bool = field(
        True, "latents pass through the decoder's 1x1 convolution (the public example leaves it out)"
    )

    # --- statistics ---
    stats: Literal["predicted", "clean", "separate", "none"] = field(
        "predicted", "maps whose statistics normalise both features: predicted | clean | separate (its own each) | none"
    )
    norm: Literal["channel_std", "channel_vector"] = field(
        "channel_std",
        "channel_std (zero mean, unit variance of each channel over the kept pixels) | channel_vector (unit length of "
        "each pixel's channels)",
    )
    norm_eps: float = field(1e-6, "added to the variance (channel_std), or to the length (channel_vector)", above(0, 1))
    stats_grad: bool = field(True, "gradient flows through the statistics of the predicted features")

    # --- outlier mask ---
    mask_on: Literal["predicted", "clean"] = field("predicted", "outliers are looked for in predicted | clean features")
    mask_layers: str | tuple[int, ...] = field(
        "deep",
        "masked taps: deep (up_1 and all after it) | all | none | tap numbers counted from 0 = mid",
        Check(
            lambda value: value in _MASKS or (isinstance(value, tuple) and _MASKED.holds(value)),
            f"{', '.join(_MASKS)}, or tap numbers ({_MASKED.possible})",
        ),
    )
    mask_zero_input: bool = field(False, "zero the masked map before it is measured (channel_vector only)")
    kernel_scaling: Literal["auto", "fixed"] = field(
        "auto", "filter widths follow the size of the map, as stated for 512 x 512 (auto), or are fixed by tap (fixed)"
    )
    quantile: float = field(0.02, "quantiles of the outlier test", between(0, 0.5, ends="low"))
    quantile_method: str = field(
        "auto", "how quantiles are found, to the same values: auto (the fastest) | top_k | counting", one_of(*METHODS)
    )
    opening: int = field(5, "width of the filter that grows outliers", _ODD)
    closing: int = field(3, "width of the filter that removes specks", _ODD)

    # --- reductions; channels are always averaged, masked maps counting as zero ---
    metric: Literal["mse", "l1"] = field("mse", "mse | l1")
    spatial: Literal["mean", "sum"] = field("mean", "over the kept pixels of a map: mean | sum")
    omega: Literal["inverse", "number", "uniform", "literal"] = field(
        "inverse",
        "weight of tap i = 0, 1, .. with upscaling r over the first: inverse 1/r | number 2^-min(i,3), as the public "
        "code, the same in decoders of factor 8 | uniform 1 | literal 2^-r, as printed",
    )
    layers: Literal["sum", "mean"] = field("sum", "over taps: sum | mean")

    # --- weight of the loss in training (not applied here) ---
    weight: float | None = field(None, "weight of the loss; or calibrate it by target_share", WEIGHT)
    target_share: float | None = field(
        None, "calibrate the weight to this share of the total loss (paper: 0.2)", CALIBRATED_SHARE
    )

    @override
    def check(self) -> None:
        self._check_gate()
        self._check_masks()
        self._check_statistics()
        if self.weight is not None and self.target_share is not None:
            raise InputError(f"lpl.weight={self.weight} and lpl.target_share={self.target_share}: give one of the two")

    @classmethod
    def paper(cls, **overrides: Any) -> "LPLConfig":
        """The paper (Eq. 2 and 3, Sec. 3.2, A.3): per-channel statistics and masks of the prediction.

        The gate is at tau = 3 for 512 px, within the range 3 to 6 that it found best (Fig. 6). Sums over pixels
        are read as means and the depth weight as 1/r; the weight is calibrated to a fifth of the total loss.
        """
        defaults = dict(tau=3.0, tau_ref_resolution=512, target_share=0.2)
        return cls._from_preset(defaults, overrides)

    @classmethod
    def reference(cls, **overrides: Any) -> "LPLConfig":
        """The public PyTorch example (diffusers, `examples/research_projects/lpl`).

        With its shared norm, depth weights and outlier masks on, as the paper's results need. Its gate, timestep
        < 200 of the 1000-step scaled-linear schedule, becomes a noise level between those of steps 199 and 200, stated
        for 256 px: on a schedule rescaled for another size the same steps are active.
        """
        defaults = dict(
            tau=0.5705,
            tau_ref_resolution=256,
            batch="active",
            post_quant_conv=False,
            stats="clean",
            norm="channel_vector",
            stats_grad=False,
            mask_on="clean",
            mask_zero_input=True,
            kernel_scaling="fixed",
            omega="number",
            layers="mean",
            weight=1.0,
        )
        return cls._from_preset(defaults, overrides)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "LPLConfig":
        """`paper` or `reference` by name, with fields replaced."""
        presets = {"paper": cls.paper, "reference": cls.reference}
        if name not in presets:
            near = nearest(name, presets)
            raise InputError(f"lpl.preset={name!r} is not possible{near}: it must be none, {', '.join(presets)}")
        return presets[name](**overrides)

    @classmethod
    def _from_preset(cls, defaults, overrides):
        check_names(overrides, [item.name for item in dataclasses.fields(cls)], "lpl.{}")
        # A new value does not inherit the unit, or the alternative, that the preset gave for the old one.
        if "tau" in overrides:
            defaults.pop("tau_ref_resolution")
        if overrides.get("weight") is not None:
            defaults.pop("target_share", None)
        if overrides.get("target_share") is not None:
            defaults.pop("weight", None)
        return cls(**{**defaults, **overrides})

    def tau_at(self, resolution: float) -> float:
        """The threshold on sigma/alpha for images with this side in pixels: tau * resolution / tau_ref_resolution.

        With it the same timesteps are active at every size, if the noise schedule is rescaled with the size too.
        Where the schedule is not, give the size that is trained as `tau_ref_resolution`.
        """
        if self.tau is None or self.tau_ref_resolution is None:
            raise InputError("lpl.tau is not set; give tau and tau_ref_resolution, or start from a preset")
        if not resolution > 0:
            raise InputError(f"resolution={resolution} is not a positive number of pixels")
        return self.tau * resolution / self.tau_ref_resolution

    def tap_names(self, of_decoder: Sequence[str]) -> tuple[str, ...]:
        """Names of the compared maps, in order, of a decoder that has maps with these names (`config.tap_names`).

        Raises:
          InputError: more taps than the decoder has, or a masked one that is not among those compared.
        """
        if self.taps == "rgb":
            return ("rgb",)
        count = len(of_decoder)
        wanted = self.taps if isinstance(self.taps, int) else count
        if wanted > count:
            raise InputError(
                f"lpl.taps={self.taps}: the decoder has {count} maps ({', '.join(of_decoder)}); possible: all, 1 to "
                f"{count}, or rgb"
            )
        self.check_masked(wanted)
        return tuple(of_decoder[:wanted])

    def masked(self, tap: int) -> bool:
        """Whether outliers are masked in this tap, counted from 0 = mid."""
        if self.taps == "rgb":
            return False
        if isinstance(self.mask_layers, tuple):
            return tap in self.mask_layers
        return self.mask_layers == "all" or (self.mask_layers == "deep" and tap >= FIRST_DEEP_TAP)

    def check_masked(self, count: int) -> None:
        """Raises InputError where a masked tap is not among so many that are compared."""
        if isinstance(self.mask_layers, tuple) and any(tap >= count for tap in self.mask_layers):
            raise InputError(f"lpl.mask_layers={self.mask_layers!r}: tap numbers go from 0 to {count - 1}")

    def kernels(self, tap: int, size: int) -> tuple[int, int]:
        """(closing, opening) filter widths of this tap for maps with `size` pixels on the shorter side."""
        by_number = 2**_LAST_UPSCALED_TAP / upscaling_by_number(tap)
        factor = by_number if self.kernel_scaling == "fixed" else _REFERENCE_MAP_SIZE / size
        return kernel_sizes(self.closing, self.opening, factor)

    def _check_gate(self):
        if self.tau is not None and self.tau_ref_resolution is None:
            raise InputError(
                f"lpl.tau={self.tau} has no unit: give tau_ref_resolution too, the image side in pixels it is for"
            )
        if self.tau is None and self.tau_ref_resolution is not None:
            raise InputError(f"lpl.tau_ref_resolution={self.tau_ref_resolution} is given without tau")

    def _check_masks(self):
        if isinstance(self.taps, int):
            self.check_masked(self.taps)
        if self.taps == "rgb" and isinstance(self.mask_layers, tuple):
            raise InputError(f"lpl.mask_layers={self.mask_layers} with taps='rgb': decoded images are not masked")

    def _check_statistics(self):
        if self.stats_grad and self.stats in ("clean", "none"):
            raise InputError(
                f"lpl.stats_grad=True with stats={self.stats!r}: only statistics of the prediction have a gradient "
                "(stats 'predicted' or 'separate'); set stats_grad=False"
            )
        if self.mask_zero_input and self.norm == "channel_std":
            raise InputError(
                "lpl.mask_zero_input=True with norm='channel_std': masked pixels are left out of these statistics; "
                "set mask_zero_input=False or norm='channel_vector'"
            )
