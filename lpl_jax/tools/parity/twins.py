"""Independent twins of the Latent Perceptual Loss in PyTorch, one for each preset.

`reference_loss` follows the steps of the public PyTorch example (diffusers, `examples/research_projects/lpl`) on its
arrays, (B, C, H, W). `paper_loss` is written from the text of the paper (arXiv 2411.04873, Eq. 2 and 3, Sec. 3.2): maps
(B, H, W, C) in float64, one sample and channel at a time, masks from sorted values and a look at every neighbourhood.
Neither shares a line with `lpl_jax.losses`. A map that is masked entirely counts as 0 in both (printed: 0/0).

`REFERENCE_OPTIONS` and `PAPER_OPTIONS` name the settings that are compared: options of the twin, fields of `LPLConfig`.
"""

import math
from typing import Any

import numpy as np
import torch


def reference_mask(y, down, closing=3, opening=5):
    """Inliers of NCHW maps."""
    ko, kc = -(-opening // down), -(-closing // down)
    ko, kc = 3 if ko == 2 else ko, 1 if kc == 2 else kc
    flat = y.flatten(2)
    n = flat.shape[2]
    q1 = flat.kthvalue(max(int(n * 0.02), 1), dim=2).values[:, :, None, None]
    q2 = flat.kthvalue(int(n * (1 - 0.02)), dim=2).values[:, :, None, None]
    margin = 2 * flat.std(dim=2)[:, :, None, None]
    inlier = ((y > q1 - margin) & (y < q2 + margin)).to(y.dtype)
    inlier = torch.nn.functional.max_pool2d(inlier, kc, 1, (kc - 1) // 2)
    inlier = -torch.nn.functional.max_pool2d(-inlier, ko, 1, (ko - 1) // 2)
    return inlier.bool().to(y.dtype)


def reference_loss(xs, ys, norm_type="shared", pow_law=True, outliers=True, loss_type="mse") -> Any:
    """Per-sample loss of NCHW feature lists: x predicted, y clean. Their number decides weights and masks."""
    total = 0
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        my = torch.ones_like(y)
        if outliers and i >= 2:
            my = reference_mask(y, down=2 if i == 2 else 1)
            y = y * my
        if norm_type == "shared":
            length = (y**2).sum(1, keepdim=True).sqrt() + 1e-6
            x, y = x / length, y / length
        elif norm_type == "default":
            x = x / ((x**2).sum(1, keepdim=True).sqrt() + 1e-10)
            y = y / ((y**2).sum(1, keepdim=True).sqrt() + 1e-10)
        term = ((x - y).abs() if loss_type == "l1" else (x - y) ** 2) * my
        weight = 2.0 ** -min(i, 3) if pow_law else 1.0
        total = total + (term.sum((2, 3)) * weight / my.sum((2, 3)).clamp(min=1)).mean(1)
    return total / len(xs)


SEPARATE = dict(stats="separate", stats_grad=True, norm_eps=1e-10)
REFERENCE_OPTIONS = {
    "paper_settings": (dict(), dict()),
    "l1_uniform": (dict(loss_type="l1", pow_law=False), dict(metric="l1", omega="uniform")),
    "no_outliers": (dict(outliers=False), dict(mask_layers="none")),
    "own_norms": (dict(norm_type="default"), SEPARATE),
    "command_line_defaults": (
        dict(norm_type="default", pow_law=False, outliers=False),
        dict(SEPARATE, omega="uniform", mask_layers="none"),
    ),
    "batch_norm_type_is_no_norm": (dict(norm_type="batch"), dict(stats="none")),
    "two_up_blocks": (dict(), dict(taps=3)),
    "mid_only": (dict(), dict(taps=1)),
}


def paper_mask(map_, closing, opening):
    """Inliers of one (H, W) map, in NumPy: sorted values and an explicit look at every pixel's neighbours."""
    values = np.sort(map_.ravel())
    n = values.size
    low, high = values[max(int(n * 0.02), 1) - 1], values[int(n * (1 - 0.02)) - 1]
    margin = 2 * map_.std(ddof=1)
    inlier = (map_ > low - margin) & (map_ < high + margin)
    return _neighbours(_neighbours(inlier, closing, np.any, False), opening, np.all, True)


def _neighbours(mask, width, reduce, outside):
    padded = np.pad(mask, width // 2, constant_values=outside)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (width, width))
    return reduce(windows, axis=(2, 3))


def paper_kernels(size):
    """Widths of the filters for a map of this side: closing, opening."""
    factor = max(1, 512 / size)
    opening, closing = math.ceil(5 / factor), math.ceil(3 / factor)
    return (1 if closing == 2 else closing), (3 if opening == 2 else opening)


def paper_loss(ph, phi, *, mask_on="predicted", layers=range(2, 99), kernels=paper_kernels, stats="predicted",
              grad=True, spatial="mean", omega="inverse", l1=False, mean_of_layers=False):  # fmt: skip
    """Loss per sample of float64 (B, H, W, C) maps."""
    losses = []
    for b in range(ph[0].shape[0]):
        loss = 0
        for layer, (x, y) in enumerate(zip(ph, phi, strict=True)):
            d = []
            for c in range(x.shape[-1]):
                p, t = x[b, :, :, c], y[b, :, :, c]
                keep = torch.ones_like(p, dtype=torch.bool)
                if layer in layers:
                    source = (p if mask_on == "predicted" else t).detach().numpy()
                    keep = torch.from_numpy(paper_mask(source, *kernels(p.shape[0])))
                p, t = p[keep], t[keep]
                if not len(p):
                    d.append(x.new_zeros(()))
                    continue
                mine, other = _standardised(p, t, stats, grad)
                error = (mine - other).abs() if l1 else (mine - other) ** 2
                d.append(error.mean() if spatial == "mean" else error.sum())
            r = x.shape[1] / ph[0].shape[1]
            weight = {"inverse": 1 / r, "uniform": 1, "literal": 2**-r}[omega]
            loss = loss + weight * sum(d) / len(d)
        losses.append(loss / len(ph) if mean_of_layers else loss)
    return torch.stack(losses)


def _standardised(p, t, stats, grad):
    def moments(values):
        values = values if grad else values.detach()
        return values.mean(), (values.var(correction=0) + 1e-6).sqrt()

    own = {"predicted": (p, p), "clean": (t, t), "separate": (p, t), "none": None}[stats]
    if own is None:
        return p, t
    (m1, s1), (m2, s2) = moments(own[0]), moments(own[1])
    return (p - m1) / s1, (t - m2) / s2


PAPER_OPTIONS = {
    "preset": (dict(), dict()),
    "stop_gradient_on_statistics": (dict(grad=False), dict(stats_grad=False)),
    "clean_statistics": (dict(stats="clean", grad=False), dict(stats="clean", stats_grad=False)),
    "separate_statistics": (dict(stats="separate"), dict(stats="separate")),
    "separate_statistics_without_gradient": (
        dict(stats="separate", grad=False),
        dict(stats="separate", stats_grad=False),
    ),
    "no_statistics": (dict(stats="none"), dict(stats="none", stats_grad=False)),
    "clean_mask_everywhere": (
        dict(mask_on="clean", layers=range(5)),
        dict(mask_on="clean", mask_layers="all"),
    ),
    "mask_of_two_taps": (dict(layers=(1, 3)), dict(mask_layers=(1, 3))),
    "large_kernels": (
        dict(kernels=lambda size: (3, 5) if size == 128 else (1, 3)),
        dict(kernel_scaling="fixed"),
    ),
    "sums": (dict(spatial="sum", mean_of_layers=True), dict(spatial="sum", layers="mean")),
    "l1_literal": (dict(l1=True, omega="literal"), dict(metric="l1", omega="literal")),
    "uniform": (dict(omega="uniform"), dict(omega="uniform")),
}
