"""Carry weights between PyTorch state dicts and our parameter trees, both ways, by one table of name rules.

A rule is a pair of templates such as

    Rule("decoder.up_blocks.{i}.resnets.{j}.{part}", "decoder/up_{i}/resnet_{j}/{part}")

in which `{name}` stands for one path component (digits for i, j, k; letters, digits and underscores otherwise). A rule
names modules; their tensors follow from the number of dimensions and from what our network has there:

    weight, 4-d (out, in, h, w)  <->  kernel (h, w, in, out)
    weight, 2-d (out, in)        <->  kernel (in, out)
    weight, 2-d (rows, width)    <->  embedding (rows, width)
    weight, 1-d                  <->  scale
    bias                         <->  bias

A tensor that is not the weight or bias of a module (a running mean, a table of positions) is named by a rule itself,
and is carried over as it is.

Every tensor on either side must be covered, with the shape that the network expects: what is missing, surplus or
misshapen is listed by name, the first few and how many more there are, in one `InputError`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lpl_jax.errors import InputError, some, some_of_each


class Rule(NamedTuple):
    """Templates of the name of a module, or tensor, in a PyTorch state dict and of its path in our parameter tree."""

    theirs: str
    ours: str


def _pattern(template: str) -> re.Pattern:
    def group(match: re.Match) -> str:
        component = "[0-9]+" if match[1] in ("i", "j", "k") else "[A-Za-z0-9_]+"
        return f"(?P<{match[1]}>{component})"

    return re.compile(re.sub(r"\\{(\w+)\\}", group, re.escape(template)))


def _rename(name: str, rules: Sequence[tuple[re.Pattern, str]]) -> str | None:
    for pattern, template in rules:
        if match := pattern.fullmatch(name):
            return template.format(**match.groupdict())
    return None


def _to_ours(
    name: str, tensor: np.ndarray, rules: Sequence[tuple[re.Pattern, str]], expected: Mapping
) -> tuple[str | None, np.ndarray]:
    """Path in our tree, None where no rule knows the name, and the array there."""
    module, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return _rename(name, rules), tensor
    path = _rename(module, rules)
    if path is None:
        return None, tensor
    if leaf == "bias":
        return f"{path}/bias", tensor
    if tensor.ndim == 1:
        return f"{path}/scale", tensor
    if f"{path}/embedding" in expected:
        return f"{path}/embedding", tensor
    return f"{path}/kernel", tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _to_theirs(path: str, array: np.ndarray, rules: Sequence[tuple[re.Pattern, str]]) -> tuple[str | None, np.ndarray]:
    """The inverse of `_to_ours`."""
    module, _, leaf = path.rpartition("/")
    name = _rename(module, rules) if leaf in ("kernel", "embedding", "scale", "bias") else None
    if name is None:
        return _rename(path, rules), array
    if leaf == "kernel":
        array = np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T)
    return f"{name}.{'bias' if leaf == 'bias' else 'weight'}", array


def import_params(tensors: Mapping[str, np.ndarray], rules: Sequence[Rule], shapes: Mapping, *, where: str) -> dict:
    """Our parameter tree from a PyTorch state dict.

    Args:
      tensors: name -> array, in PyTorch's layout.
      rules: the family's table.
      shapes: parameter tree of anything with `.shape` (from `jax.eval_shape`): what the network expects.
      where: what the tensors came from, for messages.

    Raises:
      InputError: tensors that no rule knows, parameters that nothing or two tensors fill, or shapes that differ; they
        are named.
    """
    compiled = [(_pattern(rule.theirs), rule.ours) for rule in rules]
    expected: dict[str, Any] = flatten_dict(shapes, sep="/")  # pyright: ignore[reportAssignmentType]  # of leaves alone
    found, surplus, odd = {}, [], []
    for name, tensor in tensors.items():
        path, array = _to_ours(name, np.asarray(tensor), compiled, expected)
        if path not in expected:
            surplus.append(f"surplus {name}")
            continue
        if path in found:
            odd.append(f"{name} repeats {path}")
        elif array.shape != tuple(expected[path].shape):
            odd.append(f"{name} has shape {tuple(tensor.shape)}, {path} needs {tuple(expected[path].shape)}")
        found[path] = array
    missing = [f"missing {path}" for path in expected if path not in found]
    if count := len(surplus) + len(odd) + len(missing):
        raise InputError(f"{where}: {count} parameters do not fit: {some_of_each(surplus, odd, missing)}")
    return unflatten_dict(found, sep="/")


def export_params(params: Mapping, rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """The PyTorch state dict of a parameter tree: the inverse of `import_params`.

    Raises:
      InputError: parameters that no rule knows; all are named.
    """
    compiled = [(_pattern(rule.ours), rule.theirs) for rule in rules]
    tensors, unknown = {}, []
    for path, array in flatten_dict(params, sep="/").items():
        name, tensor = _to_theirs(path, np.asarray(array), compiled)
        if name is None:
            unknown.append(path)
        tensors[name] = tensor
    if unknown:
        raise InputError(f"no rule to export the parameters {some(unknown)}")
    return tensors
