"""Conventions of the package that no linter knows."""

import ast
import importlib
import inspect
import pkgutil
import re
import typing
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing
import pytest
from jaxtyping import AbstractArray, Float, TypeCheckError

import lpl_jax
from lpl_jax.denoisers.embeddings import patchify
from lpl_jax.diffusion import paradigm
from lpl_jax.errors import InputError
from lpl_jax.losses import LPLConfig, active_samples

ROOT = Path(lpl_jax.__file__).parent
WITH_SHAPES = ("autoencoders", "denoisers", "diffusion", "losses")
PACKAGES = [module.name for module in pkgutil.iter_modules([str(ROOT)]) if module.ispkg]
UNSHAPED = (jax.Array, np.ndarray, numpy.typing.ArrayLike)


def public_functions(package):
    """(name, function) of what `__all__` names: functions, and the public methods of its classes."""
    return [(name, item) for name, item in public_items(package) if is_ours(item)]


def is_ours(item):
    return inspect.isfunction(item) and item.__module__.startswith("lpl_jax.")


def public_items(package):
    module = importlib.import_module(f"lpl_jax.{package}")
    for name in getattr(module, "__all__", ()):
        item = getattr(module, name)
        if inspect.isclass(item):
            for base in item.__mro__:
                for method, function in vars(base).items():
                    if method == "__call__" or not method.startswith("_"):
                        yield f"{package}.{name}.{method}", function
        else:
            yield f"{package}.{name}", item


def arrays_in(hint):
    """The kinds of arrays (dtype and shape) that an annotation takes: itself, or those in a union."""
    if hint in UNSHAPED or (isinstance(hint, type) and issubclass(hint, AbstractArray)):
        return {hint}
    return set().union(*map(arrays_in, typing.get_args(hint)))


def parameters(function):
    """(parameter, kinds of arrays in its annotation)."""
    hints = typing.get_type_hints(function)
    return [(each, arrays_in(hints.get(each.name))) for each in inspect.signature(function).parameters.values()]


def positional_of_one_shape(function):
    kinds = Counter(kind for _, found in parameters(function) for kind in found - {jax.Array})
    shared = {kind for kind, count in kinds.items() if count > 1}
    return [each.name for each, found in parameters(function) if found & shared and each.kind != each.KEYWORD_ONLY]


@pytest.mark.parametrize("package", PACKAGES)
def test_arrays_of_one_shape_go_by_keyword(package):
    found = {name: positional_of_one_shape(function) for name, function in public_functions(package)}
    assert {name: arrays for name, arrays in found.items() if arrays} == {}


def test_arrays_of_one_shape_would_be_found():
    latents = Float[jax.Array, "b h w c"]

    def swapped(z_t: latents, prediction: Sequence[latents] | None, t: Float[jax.Array, "b 1"], *, noise: latents): ...

    assert positional_of_one_shape(swapped) == ["z_t", "prediction"]
    checked = [name for package in WITH_SHAPES for name, function in public_functions(package) if parameters(function)]
    assert {"diffusion.Paradigm.estimate", "losses.latent_lpips", "autoencoders.Autoencoder.decode"} < set(checked)


@pytest.mark.parametrize("package", WITH_SHAPES)
def test_public_functions_say_what_they_take_and_the_shapes_of_arrays(package):
    for name, function in public_functions(package):
        hints = typing.get_type_hints(function)
        named = [each.name for each, _ in parameters(function) if each.kind != each.VAR_KEYWORD]
        assert [each for each in (*named, "return") if each not in ("self", "cls", *hints)] == [], name
        assert not any(arrays_in(hint) & {jax.Array, np.ndarray} for hint in hints.values()), name


def test_shapes_are_checked_while_tests_run():
    """Calls that would work, but with arrays that are not those of the signature."""
    with pytest.raises(TypeCheckError, match="patchify"):
        patchify(jnp.zeros((1, 4, 4, 4), int), 2)
    with pytest.raises(TypeCheckError, match="active_samples"):
        active_samples(LPLConfig.paper(), alpha=jnp.ones(3), sigma=jnp.ones(1), resolution=512)


def test_a_refusal_in_words_comes_before_the_check_of_shapes():
    with pytest.raises(InputError, match="z0 and noise must have the same shape"):
        paradigm("flow").add_noise(z0=jnp.zeros((1, 2)), noise=jnp.zeros((1, 3)), t=jnp.zeros(1))


def test_numpy_arrays_will_do():
    assert patchify(np.zeros((1, 4, 4, 4), np.float32), 2).shape == (1, 4, 16)


def library_table():
    """(package, name in its column) of every row of README's table: what begins a piece of code there."""
    for line in (ROOT.parent / "README.md").read_text().splitlines():
        if row := re.fullmatch(r"\| `lpl_jax\.(\w+)` \| (.*) \|", line):
            for name in re.findall(r"`([A-Za-z_]+)[^`]*`", row[2]):
                yield row[1], name


def fields_of(item):
    """Fields of a dataclass."""
    return getattr(item, "__dataclass_fields__", {})


def test_what_readme_names_is_in_its_package():
    """In `__all__`, or a method of a class that is."""
    missing = []
    for package, name in library_table():
        module = importlib.import_module(f"lpl_jax.{package}")
        public = getattr(module, "__all__", [])
        inside = [getattr(module, each) for each in public]
        if name not in public and not any(hasattr(each, name) or name in fields_of(each) for each in inside):
            missing.append(f"{package}.{name}")
    assert missing == []
    assert {("losses", "latent_perceptual_loss"), ("autoencoders", "decode")} < set(library_table())


def positional(function):
    arguments = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    return [name for name in arguments if name not in ("self", "cls")]


def test_no_function_takes_more_than_seven_positional_arguments():
    found = {
        f"{path.relative_to(ROOT)}:{getattr(node, 'name', 'lambda')}"
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.Lambda) and len(positional(node)) > 7
    }
    assert found == set()


# From the ground up; what stands in one line may use each other.
LAYERS = (
    ("errors", "redaction", "stopping", "xla_flags"),
    ("fields", "limits", "io", "distributed"),
    ("parallel", "compile_cache"),
    ("autoencoders", "denoisers", "text", "diffusion"),
    ("losses",),
    ("experiment", "analysis"),
    ("configs", "data"),
    ("runs",),
    ("evaluation",),
    ("training",),
    ("cost",),
    ("tools",),
)
FLOOR = {name: floor for floor, names in enumerate(LAYERS) for name in names}


def imported(path):
    """The parts of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lpl_jax."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lpl_jax":
            rest = node.module.split(".")[1:]
            yield from rest[:1] or (alias.name for alias in node.names)


def test_no_part_imports_one_above_it():
    parts = [path for path in sorted(ROOT.iterdir()) if path.suffix == ".py" or (path / "__init__.py").exists()]
    parts = {path.stem: path for path in parts if not path.stem.startswith("__")}
    assert parts.keys() == FLOOR.keys()
    for name, place in parts.items():
        for path in place.rglob("*.py") if place.is_dir() else [place]:
            above = {other for other in imported(path) if FLOOR.get(other, 0) > FLOOR[name]}
            assert above == set(), path
