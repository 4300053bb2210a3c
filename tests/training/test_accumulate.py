import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lpl_jax.parallel import MeshConfig, make_mesh, put_batch, put_replicated
from lpl_jax.training import Frozen, create_state, step
from lpl_jax.training.accumulate import over_parts
from lpl_jax.training.objective import LossOutput, Samples


def run(rows, count):
    def one(carry, rows, key):
        drawn = jax.random.normal(key, rows["x"].shape)
        output = LossOutput(
            means={"loss": jnp.mean(rows["x"])},
            counts={"decoded": jnp.float32(3)},
            samples=Samples(rows["x"], drawn, rows["x"] > 0),
        )
        return carry + jnp.sum(rows["x"]), output

    return jax.jit(lambda rows: over_parts(one, 0.0, rows, jax.random.key(0), count))(rows)


def test_parts_come_in_turn_and_are_joined():
    x = np.arange(8, dtype=np.float32)
    total, output = run({"x": x, "absent": None}, 4)
    assert (float(total), float(output.means["loss"]), float(output.counts["decoded"])) == (28, 3.5, 12)
    given, drawn, _ = (np.asarray(values) for values in output.samples)
    np.testing.assert_array_equal(given, [0, 4, 1, 5, 2, 6, 3, 7])
    assert len(set(drawn.tolist())) == 8  # each part has its own key


def test_one_part_is_the_function_itself():
    drawn = run({"x": np.zeros(8, np.float32)}, 1)[1].samples.perceptual
    np.testing.assert_array_equal(drawn, jax.random.normal(jax.random.key(0), (8,)))


def test_no_row_moves_to_another_device():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = put_batch({"x": np.arange(8, dtype=np.float32)}, mesh)

    def program(rows, key):
        return over_parts(lambda carry, part, _: (carry, LossOutput({"loss": part["x"] * 2})), 0, rows, key, 2)[1].means

    with jax.set_mesh(mesh):
        compiled = jax.jit(program).lower(rows, put_replicated(jax.random.key(0), mesh)).compile()
    assert not [
        move for move in ("all-to-all", "collective-permute", "all-gather") if f" {move}(" in compiled.as_text()
    ]
    np.testing.assert_array_equal(compiled(rows, put_replicated(jax.random.key(0), mesh))["loss"], [1, 5, 9, 13])


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_a_step_of_several_parts_is_that_of_the_whole_batch(sizes, monkeypatch):
    """With a loss of two parameters; the network's are in test_step."""

    def small(params, batch, key, frozen, *, t, noise, **_):
        loss = jnp.mean(jnp.square(batch["x"] @ params["kernel"] - noise) * t[:, None])
        return loss, LossOutput({"loss": loss})

    monkeypatch.setattr(step, "losses", small)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    rng = np.random.default_rng(0)
    x, kernel, t, noise = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((16, 256), (256, 1), 16, (16, 1))
    )
    batch, optimizer = put_batch({"x": x}, mesh), optax.sgd(1.0)
    results = []
    for parts in (1, 4):
        objective = step.Objective(None, None, resolution=32, null_label=0, accumulate=parts)
        state = create_state(lambda given: given, optimizer, (), mesh, {"kernel": jnp.array(kernel)})
        given = dict(objective=objective, optimizer=optimizer, t=t, noise=noise)
        with jax.set_mesh(mesh):
            results.append(
                jax.jit(functools.partial(step.train_step, **given))(state, batch, jax.random.key(0), Frozen(None))
            )
    (whole, expected), (state, metrics) = results
    assert (int(state.step), int(whole.step)) == (1, 1)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)
    gradient = kernel - whole.params["kernel"]
    np.testing.assert_allclose(kernel - state.params["kernel"], gradient, atol=1e-5 * np.abs(gradient).max())
