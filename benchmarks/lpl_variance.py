"""How noisy the perceptual loss and its gradient get when only some images of a batch are decoded.

    python -m benchmarks.lpl_variance
    python -m benchmarks.lpl_variance --pool 256 --batches 200

Photographs at 64 px and the bundled autoencoder. The denoiser is the best linear one of white latents, D = sigma z_t,
plus a linear layer W z_t + b that is zero: the gradient is that of W and b, 20 numbers. A pool of rows at evenly spread
timesteps is decoded once; then many batches are drawn from it, in groups as in training, and of each the loss and
gradient are taken from all rows under the threshold or from K rows of the batch, at independent and at stratified
timesteps. Reported are, over batches: variance / mean^2 of the loss, summed variance / squared norm of the
gradient, both over those with all rows decoded at independent timesteps, and how far their means lie from those of the
pool, in standard errors (the largest of 20). The result is printed and written to benchmarks/results.
"""

import functools
from pathlib import Path

import numpy as np

from benchmarks import common
from lpl_jax.tools.cli import Parser, run_main

RESOLUTION, TAU = 64, 3.0  # the paper's threshold, at the size that is measured
SHARES = (None, 1 / 2, 1 / 4, 1 / 8, 1 / 12, 1 / 16)  # of a batch; rounded down to equal parts of the groups


def decoded_pool(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows at timesteps of (i + 1/2) / count: active (N,), losses (N,) and gradients (N, 20), 0 where not active."""
    import jax
    import jax.numpy as jnp

    from lpl_jax import autoencoders
    from lpl_jax.data import open_source
    from lpl_jax.diffusion import paradigm
    from lpl_jax.losses import LPLConfig, latent_perceptual_loss

    autoencoder = autoencoders.load("bundled")
    config = LPLConfig.paper(tau=TAU, tau_ref_resolution=RESOLUTION)
    source = open_source("photos", RESOLUTION, crops=min(64, max(1, count // 8)), seed=seed)
    rng = np.random.default_rng(seed)
    images = np.stack([source[int(i)].image for i in rng.permutation(len(source))[:count]])
    encode = jax.jit(lambda autoencoder, images: autoencoder.scale(autoencoder.encode(images / 127.5 - 1).mean))
    clean = np.concatenate(
        [encode(autoencoder, images[i : i + 64].astype(np.float32)) for i in range(0, len(images), 64)]
    )
    process = paradigm("eps")
    t = process.time_of(jnp.asarray((np.arange(count) + 0.5) / count, jnp.float32))
    alpha, sigma = (np.asarray(x)[:, None, None, None] for x in process.alpha_sigma(t))
    z0 = clean[rng.integers(len(clean), size=count)]
    z_t = alpha * z0 + sigma * rng.standard_normal(z0.shape, np.float32)
    active = (sigma <= TAU * alpha).reshape(-1)

    @functools.partial(jax.jit, static_argnums=3)
    def value_and_gradient(autoencoder, z0_hat, z0, config):
        loss, pull = jax.vjp(lambda z: latent_perceptual_loss(autoencoder, config, z0_hat=z, z0=z0)[0], z0_hat)
        return loss, pull(jnp.ones_like(loss))[0]

    losses, gradients = np.zeros(count), np.zeros((count, 20))
    for rows in np.array_split(np.flatnonzero(active), -(-active.sum() // 64)):
        rows = np.resize(rows, 64)  # of one size, so that there is one program
        loss, by_estimate = value_and_gradient(autoencoder, alpha[rows] * z_t[rows], z0[rows], config)
        by_prediction = -(sigma / alpha)[rows] * np.asarray(by_estimate, np.float64)
        losses[rows] = loss
        kernel = np.einsum("nhwc,nhwd->ncd", by_prediction, z_t[rows]).reshape(len(rows), -1)
        gradients[rows] = np.concatenate([kernel, by_prediction.sum((1, 2))], axis=1)
    return active, losses, gradients


def rows_of_group(share: float, batch: int, groups: int) -> int:
    """Decoded rows of each group, as `loss.lpl_capacity=economical` rounds them."""
    return max(1, int(share * batch / groups))


def estimates(pool, share: float | None, stratified: bool, *, batches: int, batch: int, groups: int, seed: int):
    """Loss (batches,) and gradient (batches, 20) of batches drawn from the pool."""
    active, losses, gradients = pool
    rng = np.random.default_rng(seed)
    count, size = len(active), batch // groups
    rows = None if share is None else rows_of_group(share, batch, groups)
    values, slopes = np.zeros(batches), np.zeros((batches, gradients.shape[1]))
    for index in range(batches):
        u = rng.random((groups, size))
        if stratified:
            u = (np.arange(size) + u) / size  # the order within a group does not matter here
        chosen = np.minimum((u * count).astype(int), count - 1)
        weights = active[chosen].astype(float)
        if rows is not None:
            order = np.argsort(-(weights + 0.5 * rng.random(weights.shape)), axis=1)
            kept = np.zeros_like(weights)
            np.put_along_axis(kept, order[:, :rows], 1.0, axis=1)
            weights *= kept * np.maximum(weights.sum(1, keepdims=True) / rows, 1.0)
        values[index] = np.sum(weights * losses[chosen]) / batch
        slopes[index] = np.einsum("gs,gsp->p", weights, gradients[chosen]) / batch
    return values, slopes


def measure(pool, *, batch: int, groups: int, **options) -> list[dict]:
    """A row for each share and each way to draw timesteps."""
    mean_loss, mean_gradient = pool[1].mean(), pool[2].mean(0)
    rows, dense = [], None
    for stratified in (False, True):
        for share in SHARES:
            values, slopes = estimates(pool, share, stratified, batch=batch, groups=groups, **options)
            found = (
                values.var(ddof=1) / mean_loss**2,
                np.sum(slopes.var(0, ddof=1)) / np.sum(mean_gradient**2),
            )
            dense = found if dense is None else dense
            errors = np.abs(slopes.mean(0) - mean_gradient) / (slopes.std(0, ddof=1) / len(slopes) ** 0.5)
            rows.append(
                dict(
                    decoded=None if share is None else rows_of_group(share, batch, groups) * groups,
                    timesteps="stratified" if stratified else "independent",
                    loss_variance=round(found[0], 6),
                    gradient_variance=round(found[1], 6),
                    loss_over_dense=round(found[0] / dense[0], 2),
                    gradient_over_dense=round(found[1] / dense[1], 2),
                    loss_bias_in_errors=round(
                        abs(values.mean() - mean_loss) / (values.std(ddof=1) / len(values) ** 0.5), 2
                    ),
                    gradient_bias_in_errors=round(float(errors.max()), 2),
                )
            )
    return rows


def main(argv) -> int:
    flags = Parser(__doc__.splitlines()[0])
    flags.add_argument("--pool", type=int, default=4096, help="decoded rows")
    flags.add_argument("--batches", type=int, default=2000, help="batches that are drawn")
    flags.add_argument("--batch", type=int, default=256, help="images of a batch")
    flags.add_argument("--groups", type=int, default=1, help="groups of a batch")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--results", type=Path, default=common.RESULTS, help="folder for the result")
    args = flags.parse_args(argv)
    options = dict(batches=args.batches, batch=args.batch, groups=args.groups, seed=args.seed)
    pool = decoded_pool(args.pool, args.seed)
    rows = measure(pool, **options)
    settings = dict(resolution=RESOLUTION, tau=TAU, pool=args.pool, active_fraction=float(pool[0].mean()), **options)
    result = dict(date=common.today(), settings=settings, rows=rows, machine=common.machine())
    print(
        f"{'decoded':8} {'timesteps':12} {'loss var':>9} {'/ dense':>8} {'grad var':>9} {'/ dense':>8}   bias (errors)"
    )
    for row in rows:
        numbers = f"{row['loss_variance']:9.5f} {row['loss_over_dense']:8.2f} {row['gradient_variance']:9.4f}"
        bias = f"{row['loss_bias_in_errors']:.1f}, {row['gradient_bias_in_errors']:.1f}"
        name = f"{row['decoded'] or 'all':<8} {row['timesteps']:12}"
        print(f"{name} {numbers} {row['gradient_over_dense']:8.2f}   {bias}")
    print(common.write(result, "lpl_variance", args.results))
    return 0


if __name__ == "__main__":
    run_main(main)
