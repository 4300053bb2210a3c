"""Carry weights between PyTorch state dicts and our parameter trees, both ways, by one table of name rules.

A rule is a pair of templates such as

    Rule("decoder.up_blocks.{i}.resnets.{j}.{part}", "decoder/up_{i}/resnet_{j}/{part}")

in which `{name}` stands for one path component (digits for i, j, k; letters, digits and underscores otherwise). A rule
names modules; their tensors follow from the number of dimensions:

    weight, 4-d (out, in, h, w)  <->  kernel (h, w, in, out)
    weight, 2-d (out, in)        <->  kernel (in, out)
    weight, 1-d                  <->  scale
    bias                         <->  bias

Every tensor on either side must be covered, with the shape that the network expects: whatever is missing, surplus or
misshapen is listed by name, all of it, in one `InputError`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lpl_jax.errors import InputError


class Rule(NamedTuple):
    """Templates of a module's name in a PyTorch state dict and of its path in our parameter tree."""

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


def _to_ours(leaf: str, tensor: np.ndarray) -> tuple[str, np.ndarray]:
    if leaf == "bias":
        return "bias", tensor
    if tensor.ndim == 1:
        return "scale", tensor
    return "kernel", tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _to_theirs(leaf: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    if leaf == "bias":
        return "bias", array
    if leaf == "scale":
        return "weight", array
    return "weight", np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T)


def import_params(tensors: Mapping[str, np.ndarray], rules: Sequence[Rule], shapes: Mapping, *, where: str) -> dict:
    """Our parameter tree from a PyTorch state dict.

    Args:
      tensors: name -> array, in PyTorch's layout.
      rules: the family's table.
      shapes: parameter tree of anything with `.shape` (from `jax.eval_shape`): what the network expects.
      where: what the tensors came from, for messages.
    Raises:
      InputError: tensors that no rule knows, parameters that nothing or two tensors fill, or shapes that differ; all
        are named.
    """
    compiled = [(_pattern(rule.theirs), rule.ours) for rule in rules]
    expected = flatten_dict(shapes, sep="/")
    found, problems = {}, []
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        renamed = _rename(module, compiled) if leaf in ("weight", "bias") else None
        if renamed is None:
            problems.append(f"surplus {name}")
            continue
        ours, array = _to_ours(leaf, np.asarray(tensor))
        path = f"{renamed}/{ours}"
        if path not in expected:
            problems.append(f"surplus {name}")
        elif path in found:
            problems.append(f"{name} repeats {path}")
        elif array.shape != tuple(expected[path].shape):
            problems.append(f"{name} has shape {tuple(tensor.shape)}, {path} needs {tuple(expected[path].shape)}")
        found[path] = array
    problems += [f"missing {path}" for path in expected if path not in found]
    if problems:
        raise InputError(f"{where}: {len(problems)} parameters do not fit: " + "; ".join(problems))
    return unflatten_dict(found, sep="/")


def export_params(params: Mapping, rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """The PyTorch state dict of a parameter tree: the inverse of `import_params`.

    Raises:
      InputError: parameters that no rule knows; all are named.
    """
    compiled = [(_pattern(rule.ours), rule.theirs) for rule in rules]
    tensors, unknown = {}, []
    for path, array in flatten_dict(params, sep="/").items():
        module, _, leaf = path.rpartition("/")
        renamed = _rename(module, compiled)
        if renamed is None:
            unknown.append(path)
            continue
        theirs, tensor = _to_theirs(leaf, np.asarray(array))
        tensors[f"{renamed}.{theirs}"] = tensor
    if unknown:
        raise InputError("no rule to export the parameters " + ", ".join(unknown))
    return tensors
