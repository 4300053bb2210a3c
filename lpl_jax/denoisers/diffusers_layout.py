"""The `SD3Transformer2DModel` of diffusers: its configuration and the names and layouts of its tensors, both ways.

diffusers numbers its blocks; ours are stacked (see `MMDiTConfig.stacks`). Between the two stands a flat tree in which
every block has a path of its own, `block_0/attn/q/kernel`: the rules rename from there, tensor by tensor.
"""

from collections.abc import Mapping
from typing import Any, cast

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lpl_jax.denoisers.config import MMDiTConfig
from lpl_jax.denoisers.mmdit import init
from lpl_jax.errors import InputError, some
from lpl_jax.io.porting import Rule, export_params, import_params

CLASS_NAME = "SD3Transformer2DModel"
ANCHOR = "pos_embed.proj.weight"  # a tensor that every network has
POSITIONS = "pos_embed.pos_embed"  # the one tensor that is not the weight or bias of a module

# In a block: their module, ours.
BLOCK = (
    ("norm1.linear", "image_modulation"),
    ("norm1_context.linear", "context_modulation"),
    ("attn.to_q", "attn/q"),
    ("attn.to_k", "attn/k"),
    ("attn.to_v", "attn/v"),
    ("attn.to_out.0", "attn/out"),
    ("attn.norm_q", "attn/q_norm"),
    ("attn.norm_k", "attn/k_norm"),
    ("attn.add_q_proj", "context_attn/q"),
    ("attn.add_k_proj", "context_attn/k"),
    ("attn.add_v_proj", "context_attn/v"),
    ("attn.to_add_out", "context_attn/out"),
    ("attn.norm_added_q", "context_attn/q_norm"),
    ("attn.norm_added_k", "context_attn/k_norm"),
    ("attn2.to_q", "second_attn/q"),
    ("attn2.to_k", "second_attn/k"),
    ("attn2.to_v", "second_attn/v"),
    ("attn2.to_out.0", "second_attn/out"),
    ("attn2.norm_q", "second_attn/q_norm"),
    ("attn2.norm_k", "second_attn/k_norm"),
    ("ff.net.0.proj", "mlp/fc1"),
    ("ff.net.2", "mlp/fc2"),
    ("ff_context.net.0.proj", "context_mlp/fc1"),
    ("ff_context.net.2", "context_mlp/fc2"),
)
RULES = (
    Rule("pos_embed.proj", "patch_embed"),
    Rule(POSITIONS, "position_table/bias"),
    Rule("time_text_embed.timestep_embedder.linear_{i}", "time_mlp/fc{i}"),
    Rule("time_text_embed.text_embedder.linear_{i}", "pooled_mlp/fc{i}"),
    Rule("context_embedder", "context_embed"),
    *(Rule("transformer_blocks.{i}." + theirs, "block_{i}/" + ours) for theirs, ours in BLOCK),
    Rule("norm_out.linear", "head/modulation"),
    Rule("proj_out", "head/out"),
)

# The fields of config.json with the class's defaults, which count where a file leaves a field out.
DEFAULTS = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 96,
    "dual_attention_layers": (),
    "qk_norm": None,
}
INTEGERS = tuple(name for name, default in DEFAULTS.items() if isinstance(default, int))
# What the class is, in our fields; it also always has a pooled text vector.
FIXED = {
    "mlp_ratio": 4,
    "num_classes": 0,
    "control": False,
    "context_attn": "own",
    "context_mlp": "own",
    "modulation": "per_block",
    "context_modulation_chunks": 6,
    "context_pre_only": True,
}


def from_diffusers(raw: Mapping[str, Any], *, where: str) -> MMDiTConfig:
    """The configuration that a config.json of an SD3Transformer2DModel describes; `where` it is, for messages.

    Raises:
      InputError: a field that the class does not have, or a value that has no counterpart here.
    """
    given = {name: value for name, value in raw.items() if not name.startswith("_")}
    if unknown := sorted(set(given) - set(DEFAULTS)):
        raise InputError(f"{where}: field {some(unknown)} given, possible is one of {', '.join(DEFAULTS)}")
    cfg = DEFAULTS | given

    def require(holds: bool, name: str, possible: str) -> None:
        if not holds:
            raise InputError(f"{where}: {name} = {cfg[name]!r} given, possible is {possible}")

    for name in INTEGERS:
        optional = name in ("out_channels", "pos_embed_max_size") and cfg[name] is None
        require(optional or type(cfg[name]) is int, name, "an integer")
    hidden = cfg["num_attention_heads"] * cfg["attention_head_dim"]
    dual = cfg["dual_attention_layers"]
    table = cfg["pos_embed_max_size"]
    require(cfg["caption_projection_dim"] == hidden, "caption_projection_dim", f"the width of the network, {hidden}")
    require(cfg["out_channels"] in (None, cfg["in_channels"]), "out_channels", f"in_channels = {cfg['in_channels']}")
    require(cfg["pooled_projection_dim"] > 0, "pooled_projection_dim", "a positive integer")
    require(cfg["patch_size"] > 0, "patch_size", "a positive integer")
    require(cfg["qk_norm"] in (None, "rms_norm"), "qk_norm", "'rms_norm' or None")
    require(table is None or table > 0, "pos_embed_max_size", "a positive integer or None")
    require(
        isinstance(dual, list | tuple) and list(dual) == list(range(len(dual))),
        "dual_attention_layers",
        "the first so many layers: 0, 1, ...",
    )
    try:
        return MMDiTConfig(
            hidden=hidden,
            depth=cfg["num_layers"],
            heads=cfg["num_attention_heads"],
            latent_channels=cfg["in_channels"],
            patch_size=cfg["patch_size"],
            context_dim=cfg["joint_attention_dim"],
            pooled_dim=cfg["pooled_projection_dim"],
            qk_norm=cfg["qk_norm"] is not None,
            dual_attention=len(dual),
            base_grid=cfg["sample_size"] // cfg["patch_size"],
            position_table=table or 0,
            **FIXED,
        )
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def to_diffusers(config: MMDiTConfig) -> dict[str, Any]:
    """The config.json of an SD3Transformer2DModel with this configuration: the inverse of `from_diffusers`.

    What only says how to compute (attention, remat, dtype) has no place in it.

    Raises:
      InputError: the configuration has no counterpart; every field that prevents it is named.
    """
    obstacles = [
        f"{name} = {getattr(config, name)!r} (diffusers has {value!r})"
        for name, value in FIXED.items()
        if getattr(config, name) != value
    ]
    obstacles += ["pooled_dim = 0 (diffusers always has a pooled text vector)"] if not config.pooled_dim else []
    if obstacles:
        raise InputError(f"diffusers' {CLASS_NAME} has no form of this MMDiT: {'; '.join(obstacles)}")
    return {
        "_class_name": CLASS_NAME,
        "sample_size": config.base_grid * config.patch_size,
        "patch_size": config.patch_size,
        "in_channels": config.latent_channels,
        "num_layers": config.depth,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.heads,
        "joint_attention_dim": config.context_dim,
        "caption_projection_dim": config.hidden,
        "pooled_projection_dim": config.pooled_dim,
        "out_channels": config.latent_channels,
        # Without a table their network computes positions as ours does, for every grid.
        "pos_embed_max_size": config.position_table or None,
        "dual_attention_layers": list(range(config.dual_attention)),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


def from_tensors(config: MMDiTConfig, tensors: Mapping[str, np.ndarray], *, where: str) -> dict:
    """Our parameters from diffusers' tensors.

    Raises:
      InputError: missing, surplus or misshapen tensors; all are named.
    """
    shapes = jax.eval_shape(lambda: unstack(config, init(config, jax.random.key(0))))
    flat: Any = flatten_dict(import_params(tensors, RULES, shapes, where=where), sep="/")
    return restack(config, swap_scale_and_shift(config, flat))


def to_tensors(config: MMDiTConfig, params: Mapping) -> dict[str, np.ndarray]:
    """Tensors of diffusers from our parameters, float32 on the host: the inverse of `from_tensors`."""
    host = jax.tree.map(lambda array: np.asarray(array, np.float32), params)
    return export_params(swap_scale_and_shift(config, unstack(config, host)), RULES)


def unstack(config: MMDiTConfig, params: Mapping) -> dict:
    """Flat tree with a path for every block, the patch kernel as a convolution's and the position table as one row."""
    flat, stacked = {}, cast(dict[str, Any], flatten_dict(params, sep="/"))
    for path, array in stacked.items():
        group, _, rest = path.partition("/")
        if group in config.stacks:
            flat |= {f"block_{place}/{rest}": array[k] for k, place in enumerate(config.stacks[group])}
        elif group == "last_block":
            flat[f"block_{config.depth - 1}/{rest}"] = array
        else:
            flat[path] = array
    p, d = config.patch_size, config.hidden
    flat["patch_embed/kernel"] = flat["patch_embed/kernel"].reshape(p, p, config.latent_channels, d)
    if config.position_table:
        flat["position_table/bias"] = flat["position_table/bias"].reshape(1, -1, d)
    return flat


def restack(config: MMDiTConfig, flat: Mapping[str, np.ndarray]) -> dict:
    """The inverse of `unstack`: the tree of parameters."""
    tree = {path: array for path, array in flat.items() if not path.startswith("block_")}
    d, side = config.hidden, config.position_table
    tree["patch_embed/kernel"] = tree["patch_embed/kernel"].reshape(-1, d)
    if side:
        tree["position_table/bias"] = tree["position_table/bias"].reshape(side, side, d)

    def paths(place):
        return [path.partition("/")[2] for path in flat if path.startswith(f"block_{place}/")]

    for group, places in config.stacks.items():
        for rest in paths(places[0]):
            tree[f"{group}/{rest}"] = np.stack([flat[f"block_{place}/{rest}"] for place in places])
    if config.context_pre_only:
        last = config.depth - 1
        tree |= {f"last_block/{rest}": flat[f"block_{last}/{rest}"] for rest in paths(last)}
    return unflatten_dict(tree, sep="/")


def swap_scale_and_shift(config: MMDiTConfig, flat: Mapping[str, np.ndarray]) -> dict:
    """Exchange the halves of every modulation that has only the two: diffusers has the scale first. Its own inverse."""
    swapped = (f"block_{config.depth - 1}/context_modulation/", "head/modulation/")
    return {
        path: np.roll(array, config.hidden, axis=-1) if path.startswith(swapped) else array
        for path, array in flat.items()
    }
