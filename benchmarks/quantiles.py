"""What the outlier mask costs: order statistics by counting and by `lax.top_k`, alone and within the perceptual loss.

    python -m benchmarks.quantiles                       times on this machine
    python -m benchmarks.quantiles --topology v5e:1x1    memory and traffic of programs compiled for a TPU (libtpu)
    python -m benchmarks.quantiles --quick

Times: both quantiles of a map, float32 and bfloat16; and value and gradient of the loss of one image through a decoder
of Stable Diffusion's widths (random weights), with either method and without a mask. Methods take turns. With a
topology nothing runs: the compiler's plan for both quantiles of (4, 512, 512, 128) in bfloat16, and for value and
gradient of the loss on given features of one 512 px image, is reported as bytes accessed and temporaries over the size
of the input. The result is printed and written to benchmarks/results.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path

from benchmarks import common
from lpl_jax.cost import topology as topologies
from lpl_jax.cost.topology import Topology
from lpl_jax.tools.cli import Parser, run_main

SHAPES = {False: ((1, 256, 256, 128), (1, 512, 512, 32)), True: ((1, 64, 64, 16),)}
METHODS = ("counting", "top_k")


def both_quantiles(features, method: str):
    from lpl_jax.losses.outliers import inner_range

    return inner_range(features, 0.02, method)


def variants():
    """Configurations of the loss by the method of its mask."""
    from lpl_jax.losses import LPLConfig

    config = LPLConfig.paper()
    found = {name: dataclasses.replace(config, quantile_method=name) for name in METHODS}
    return {"no mask": dataclasses.replace(config, mask_layers="none"), **found}


def time_maps(shapes, repeats: int) -> list[dict]:
    import jax
    import numpy as np

    rows = []
    for shape in shapes:
        for dtype in ("float32", "bfloat16"):
            maps = jax.numpy.asarray(np.random.default_rng(0).standard_normal(shape, np.float32), dtype)
            runs = {
                name: common.blocking(jax.jit(functools.partial(both_quantiles, method=name)), maps) for name in METHODS
            }
            seconds = common.interleaved(runs, repeats)
            medians = {name: common.spread(values) for name, values in seconds.items()}
            ratio = common.paired_ratio(seconds["top_k"], seconds["counting"])
            rows.append(dict(shape=shape, dtype=dtype, **medians, top_k_over_counting=round(ratio, 2)))
    return rows


def time_loss(resolution: int, repeats: int, quick: bool) -> dict:
    """Of one image, and the share of it that the mask takes."""
    import jax

    from lpl_jax.autoencoders import AutoencoderConfig
    from lpl_jax.losses import latent_perceptual_loss

    config = AutoencoderConfig.tiny() if quick else AutoencoderConfig()
    autoencoder = common.random_autoencoder(config)
    pred, target = common.latents(config, resolution, 1)

    @functools.partial(jax.jit, static_argnums=3)
    def value_and_gradient(autoencoder, pred, target, lpl):
        def loss(z0_hat):
            return latent_perceptual_loss(autoencoder, lpl, z0_hat=z0_hat, z0=target)[0].sum()

        return jax.value_and_grad(loss)(pred)

    runs = {
        name: common.blocking(value_and_gradient, autoencoder, pred, target, lpl) for name, lpl in variants().items()
    }
    seconds = common.interleaved(runs, repeats)
    shares = {name: 1 - 1 / common.paired_ratio(seconds[name], seconds["no mask"]) for name in METHODS}
    return dict(
        resolution=resolution,
        seconds={name: common.spread(values) for name, values in seconds.items()},
        share_of_the_mask={name: round(share, 3) for name, share in shares.items()},
    )


def plan(compiled, size: int) -> dict:
    """Bytes accessed and temporaries over `size` bytes."""
    accessed, temporary = compiled.cost_analysis()["bytes accessed"], compiled.memory_analysis().temp_size_in_bytes
    return dict(bytes_accessed=round(accessed / size, 2), temporaries=round(temporary / size, 3), bytes=int(accessed))


def plans(topology: Topology, quick: bool) -> dict:
    """Programs compiled for a TPU that is not there."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from lpl_jax.losses import perceptual_distance

    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for no device cannot be read back
    device = topologies.devices(topology)[0]

    def shaped(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=SingleDeviceSharding(device))

    maps = shaped(1, 64, 64, 128) if quick else shaped(4, 512, 512, 128)
    alone = {
        name: plan(jax.jit(functools.partial(both_quantiles, method=name)).lower(maps).compile(), 2 * maps.size)
        for name in METHODS
    }
    side = 16 if quick else 64
    features = [
        shaped(1, side * r, side * r, c) for r, c in zip((1, 2, 4, 8, 8), (512, 512, 512, 256, 128), strict=True)
    ]

    def value_and_gradient(pred, target, lpl):
        def loss(maps):
            return perceptual_distance(lpl, predicted=maps, clean=target)[0].sum()

        return jax.value_and_grad(loss)(pred)

    size = sum(2 * each.size for each in features)
    loss = {
        name: plan(jax.jit(functools.partial(value_and_gradient, lpl=lpl)).lower(features, features).compile(), size)
        for name, lpl in variants().items()
    }
    return dict(topology=topology.name, quantiles_over_the_input=alone, loss_over_the_predicted_features=loss)


def main(argv) -> int:
    flags = Parser(__doc__.splitlines()[0])
    flags.add_argument("--topology", help="compile for this TPU, such as v5e:1x1, in place of running")
    flags.add_argument("--quick", action="store_true", help="small shapes")
    flags.add_argument("--resolution", type=int, default=128, help="side of the image of the whole loss")
    flags.add_argument("--repeats", type=int, default=5, help="timed runs of each method")
    flags.add_argument("--results", type=Path, default=common.RESULTS, help="folder for the result")
    args = flags.parse_args(argv)
    if args.topology:
        topology = topologies.parse(args.topology)
        os.environ.update(topologies.environment(topology))  # before jax is imported
        found, name = plans(topology, args.quick), "quantiles_tpu"
    else:
        resolution = 32 if args.quick else args.resolution
        found, name = (
            dict(
                maps=time_maps(SHAPES[args.quick], args.repeats),
                loss=time_loss(resolution, args.repeats, args.quick),
            ),
            "quantiles",
        )
    result = dict(date=common.today(), **found, machine=common.machine())
    print(json.dumps(found, indent=1))
    print(common.write(result, name, args.results))
    return 0


if __name__ == "__main__":
    run_main(main)
