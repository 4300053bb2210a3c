"""Every choice of the Latent Perceptual Loss in one frozen dataclass, with the two published readings as presets."""

import dataclasses
import math
from typing import Any, Literal

from lpl_jax.errors import InputError
from lpl_jax.losses.outliers import check_kernel, kernel_sizes
from lpl_jax.losses.quantiles import METHODS

TAP_NAMES = ("mid", "up_0", "up_1", "up_2", "up_3")
DEEP_TAPS = (2, 3, 4)

# Outlier filters are stated for the largest maps of a 512 px image; there the taps are this many times smaller.
_REFERENCE_MAP_SIZE = 512
_FIXED_DOWN_FACTORS = (8, 4, 2, 1, 1)

_CHOICES = {
    "stats": ("predicted", "clean", "separate", "none"),
    "norm": ("channel_std", "channel_vector"),
    "mask_on": ("predicted", "clean"),
    "kernel_scaling": ("auto", "fixed"),
    "quantile_method": METHODS,
    "spatial": ("mean", "sum"),
    "layers": ("sum", "mean"),
    "omega": ("inverse", "uniform", "literal"),
    "metric": ("mse", "l1"),
    "batch": ("all", "active"),
    "extra_weight": ("none", "min_snr"),
}


@dataclasses.dataclass(frozen=True)
class LPLConfig:
    """What the Latent Perceptual Loss compares, how, and on which samples (arXiv 2411.04873, Sec. 3.2).

    Field defaults are those of the paper, except that the gate and the weight have none: `LPLConfig.paper()` and
    `LPLConfig.reference()` set them. The dataclass is hashable and serves as a static argument of `jax.jit`.

    Raises InputError for a value that is not possible or two fields that contradict each other.
    """

    # --- which samples ---
    # Largest noise level sigma/alpha at which a sample takes part, inf = all. None = not set: the gated loss refuses.
    tau: float | None = None
    # Image side in pixels that `tau` is stated for; tau grows linearly with the side. Always given together with `tau`.
    tau_ref_resolution: int | None = None
    # Denominator of the batch mean: the full batch, or the number of samples that passed the gate.
    batch: Literal["all", "active"] = "all"
    # Per-sample weights on top of the gate; "min_snr" expects them as an argument of the gated loss.
    extra_weight: Literal["none", "min_snr"] = "none"

    # --- which features ---
    # First n of mid, up_0, .. up_3 (1 to 5), or "rgb": decoded images, compared as they are. Statistics, masks, omega
    # and post_quant_conv=False do not apply to these.
    taps: int | str = 5
    # Whether latents pass through the decoder's post_quant_conv (the public example leaves it out).
    post_quant_conv: bool = True

    # --- statistics ---
    # Maps whose statistics normalise the features: one set for both, each its own ("separate"), or no normalisation.
    stats: Literal["predicted", "clean", "separate", "none"] = "predicted"
    # "channel_std": zero mean and unit variance of each channel over the kept pixels. "channel_vector": unit length
    # of the vector of channels at each pixel.
    norm: Literal["channel_std", "channel_vector"] = "channel_std"
    # Added to the variance (channel_std) or to the length (channel_vector).
    norm_eps: float = 1e-6
    # Whether the gradient flows through the statistics of the predicted features.
    stats_grad: bool = True

    # --- outlier mask ---
    mask_on: Literal["predicted", "clean"] = "predicted"
    # "deep" (up_1, up_2, up_3), "all", "none", or tap numbers counted from 0 = mid.
    mask_layers: str | tuple[int, ...] = "deep"
    # Whether the map that the mask was computed on is set to zero outside it before channel vectors are measured.
    mask_zero_input: bool = False
    # "auto": filter widths follow the size of each map, as stated for 512 x 512. "fixed": by tap, as at 512 px images.
    kernel_scaling: Literal["auto", "fixed"] = "auto"
    quantile: float = 0.02
    # How the quantiles are found. The mask is the same with each: "auto" is the fastest one.
    quantile_method: Literal["auto", "top_k", "counting"] = "auto"
    opening: int = 5
    closing: int = 3

    # --- reductions ---
    metric: Literal["mse", "l1"] = "mse"
    # Over the kept pixels of a map. Channels are always averaged, masked maps counting as zero.
    spatial: Literal["mean", "sum"] = "mean"
    # Weight of a tap from its upscaling r over the first: 1/r, 1, or 2^-r (as printed, thought to be a misprint).
    omega: Literal["inverse", "uniform", "literal"] = "inverse"
    layers: Literal["sum", "mean"] = "sum"

    # --- weight of the loss in training (not applied here): given, or calibrated to a share of the total loss ---
    weight: float | None = None
    target_share: float | None = None

    def __post_init__(self):
        if isinstance(self.mask_layers, list):
            object.__setattr__(self, "mask_layers", tuple(self.mask_layers))
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"lpl.{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, allowed))}")
        for name in ("post_quant_conv", "stats_grad", "mask_zero_input"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"lpl.{name}={getattr(self, name)!r} is not True or False")
        self._check_gate()
        self._check_taps()
        self._check_statistics()
        self._check_weight()

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
            layers="mean",
            weight=1.0,
        )
        return cls._from_preset(defaults, overrides)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "LPLConfig":
        """`paper` or `reference` by name, with fields replaced."""
        presets = {"paper": cls.paper, "reference": cls.reference}
        if name not in presets:
            raise InputError(f"lpl preset {name!r} is not one of {', '.join(map(repr, presets))}")
        return presets[name](**overrides)

    @classmethod
    def _from_preset(cls, defaults, overrides):
        known = [field.name for field in dataclasses.fields(cls)]
        for name in overrides:
            if name not in known:
                raise InputError(f"lpl has no field {name!r}; fields: {', '.join(known)}")
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
        if self.tau is None:
            raise InputError("lpl.tau is not set; give tau and tau_ref_resolution, or start from a preset")
        if not resolution > 0:
            raise InputError(f"resolution={resolution} is not a positive number of pixels")
        return self.tau * resolution / self.tau_ref_resolution

    @property
    def tap_names(self) -> tuple[str, ...]:
        """Names of the compared maps, in order."""
        return ("rgb",) if self.taps == "rgb" else TAP_NAMES[: self.taps]

    def masked(self, tap: int) -> bool:
        """Whether outliers are masked in this tap, counted from 0 = mid."""
        if self.taps == "rgb" or self.mask_layers == "none":
            return False
        layers = {"all": range(len(TAP_NAMES)), "deep": DEEP_TAPS}.get(self.mask_layers, self.mask_layers)
        return tap in layers

    def kernels(self, tap: int, size: int) -> tuple[int, int]:
        """(closing, opening) filter widths of this tap for maps with `size` pixels on the shorter side."""
        factor = _FIXED_DOWN_FACTORS[tap] if self.kernel_scaling == "fixed" else _REFERENCE_MAP_SIZE / size
        return kernel_sizes(self.closing, self.opening, factor)

    def _check_gate(self):
        if self.tau is not None and self.tau_ref_resolution is None:
            raise InputError(
                f"lpl.tau={self.tau} has no unit: give tau_ref_resolution too, the image side in pixels it is for"
            )
        if self.tau is None and self.tau_ref_resolution is not None:
            raise InputError(f"lpl.tau_ref_resolution={self.tau_ref_resolution} is given without tau")
        if self.tau is not None and not self.tau > 0:
            raise InputError(f"lpl.tau={self.tau} must be positive (inf = every sample)")
        if self.tau_ref_resolution is not None and not 0 < self.tau_ref_resolution < math.inf:
            raise InputError(f"lpl.tau_ref_resolution={self.tau_ref_resolution} must be a positive number of pixels")

    def _check_taps(self):
        count = len(TAP_NAMES)
        if self.taps != "rgb" and not (type(self.taps) is int and 1 <= self.taps <= count):
            raise InputError(f"lpl.taps={self.taps!r} is not 1 to {count} or 'rgb'")
        if isinstance(self.mask_layers, str):
            if self.mask_layers not in ("deep", "all", "none"):
                raise InputError(
                    f"lpl.mask_layers={self.mask_layers!r} is not 'deep', 'all', 'none' or a tuple of tap numbers"
                )
        elif not isinstance(self.mask_layers, tuple) or not all(
            type(tap) is int and 0 <= tap < len(self.tap_names) for tap in self.mask_layers
        ):
            raise InputError(
                f"lpl.mask_layers={self.mask_layers!r}: tap numbers go from 0 to {len(self.tap_names) - 1} "
                f"with taps={self.taps!r}"
            )
        if self.taps == "rgb" and isinstance(self.mask_layers, tuple):
            raise InputError(f"lpl.mask_layers={self.mask_layers} with taps='rgb': decoded images are not masked")
        if not 0.0 <= self.quantile < 0.5:
            raise InputError(f"lpl.quantile={self.quantile} is outside [0, 0.5)")
        check_kernel("lpl.opening", self.opening)
        check_kernel("lpl.closing", self.closing)

    def _check_statistics(self):
        if not self.norm_eps > 0:
            raise InputError(f"lpl.norm_eps={self.norm_eps} must be positive")
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

    def _check_weight(self):
        if self.weight is not None and self.target_share is not None:
            raise InputError(f"lpl.weight={self.weight} and lpl.target_share={self.target_share}: give one of the two")
        if self.weight is not None and not 0 <= self.weight < math.inf:
            raise InputError(f"lpl.weight={self.weight} must be finite and not negative")
        if self.target_share is not None and not 0 < self.target_share < 1:
            raise InputError(f"lpl.target_share={self.target_share} is outside (0, 1)")
