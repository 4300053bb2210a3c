import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from lpl_jax.errors import InputError
from lpl_jax.experiment import OptimizerConfig, ema_name
from lpl_jax.parallel import MeshConfig, constrain_batch, leaf_path, make_mesh, param_sharding, put_batch, replicated
from lpl_jax.training.ema import init_emas, update_emas
from lpl_jax.training.optimizer import make_optimizer
from lpl_jax.training.state import abstract_state, apply_gradients, create_state

DECAYS = (0.9, 0.9999)
WIDTH = 256


def init_params(key):
    """Two layers whose second dimension is a stack, as scanned blocks are, and a head."""
    keys = jax.random.split(key, 3)
    mlp = {
        "fc1": {"kernel": 0.05 * jax.random.normal(keys[0], (2, WIDTH, 2 * WIDTH)), "bias": jnp.zeros((2, 2 * WIDTH))},
        "fc2": {"kernel": 0.05 * jax.random.normal(keys[1], (2, 2 * WIDTH, WIDTH))},
    }
    head = {"kernel": 0.05 * jax.random.normal(keys[2], (WIDTH, 4)), "bias": jnp.zeros(4)}
    return {"blocks": {"mlp": mlp}, "head": head}


def predict(params, x):
    def block(x, mlp):
        return x + jnp.tanh(x @ mlp["fc1"]["kernel"] + mlp["fc1"]["bias"]) @ mlp["fc2"]["kernel"], None

    x, _ = jax.lax.scan(block, x, params["blocks"]["mlp"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.fixture(scope="module")
def optimizer():
    # A large eps: Adam divides by |g|, and where g is nearly 0 the order of a sum would show in its sign.
    return make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.1, eps=1e-3))[0]


def make_step(optimizer, state, mesh):
    """Jitted step. The output shardings are said: left to itself the partitioner may move a small leaf elsewhere."""

    def step(state, batch):
        x = constrain_batch(batch["x"])

        def loss(params):
            return jnp.mean((predict(params, x) - batch["y"]) ** 2)

        value, gradients = jax.value_and_grad(loss)(state.params)
        state, metrics = apply_gradients(state, gradients, optimizer)
        return state, {"loss": value, **metrics}

    return jax.jit(step, donate_argnums=0, out_shardings=(param_sharding(state, mesh), replicated(mesh)))


def batch_of(seed):
    """More tokens than parameters have rows: with less the partitioner would rather move activations than weights."""
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(16, 64, WIDTH)).astype("f4"), "y": rng.normal(size=(16, 64, 4)).astype("f4")}


def run(sizes, optimizer):
    """Initial state, losses of three steps on one batch, final state; on a mesh of these sizes."""
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    state = create_state(init_params, optimizer, DECAYS, mesh, jax.random.key(0))
    first, step, losses = state, make_step(optimizer, state, mesh), []
    initial = jax.tree.map(np.array, state)  # copies: the buffers are donated
    for _ in range(3):
        with jax.set_mesh(mesh):
            state, metrics = step(state, put_batch(batch_of(0), mesh))
        losses.append(float(metrics["loss"]))
    # Parameters and averages begin equal, but are not one buffer, which could not be donated twice.
    kept = [leaf_path(path) for path, leaf in jax.tree_util.tree_leaves_with_path(first) if not leaf.is_deleted()]
    assert not kept
    return initial, losses, state


@pytest.fixture(scope="module")
def on_one_device(optimizer):
    initial, losses, state = run((1, 1, 1), optimizer)
    return initial, losses, jax.device_get(state)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (1, 4, 2)])
def test_training_does_not_depend_on_the_mesh(sizes, optimizer, on_one_device, capfd):
    initial, losses, state = run(sizes, optimizer)
    chex.assert_trees_all_equal(initial, on_one_device[0])
    np.testing.assert_allclose(losses, on_one_device[1], rtol=1e-6)
    assert losses[-1] < losses[0]
    chex.assert_trees_all_close(state, on_one_device[2], rtol=1e-7, atol=1e-6)
    # The state stays where the rules put it: nothing was gathered for good.
    expected = param_sharding(state, state.step.sharding.mesh)
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), path
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def test_created_state_is_sharded_as_the_rules_say(optimizer):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    state = create_state(init_params, optimizer, DECAYS, mesh, jax.random.key(0), lpl_weight=3.0)
    adam = state.opt_state[1]
    for tree in (state.params, *state.emas.values(), adam.mu, adam.nu):
        assert tree["blocks"]["mlp"]["fc1"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")
        assert tree["blocks"]["mlp"]["fc2"]["kernel"].sharding.spec == P(None, "tensor", "fsdp")
        assert tree["head"]["kernel"].sharding.is_fully_replicated
        kernel = tree["blocks"]["mlp"]["fc1"]["kernel"]
        assert {s.data.size for s in kernel.addressable_shards} == {kernel.size // 8}
    assert state.step.dtype == jnp.int32 and int(state.step) == 0
    assert state.lpl_weight.dtype == jnp.float32 and float(state.lpl_weight) == 3.0
    assert sorted(state.emas) == ["0.9", "0.9999"]


def test_averages_of_a_new_state_are_its_parameters(on_one_device):
    initial, _, _ = on_one_device
    expected = jax.jit(init_params)(jax.random.key(0))
    for tree in (initial.params, *initial.emas.values()):
        chex.assert_trees_all_equal(tree, expected)


def test_abstract_state_is_the_created_one_without_values(optimizer):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    state = create_state(init_params, optimizer, DECAYS, mesh, jax.random.key(0))
    abstract = abstract_state(init_params, optimizer, DECAYS, mesh, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, abstract)
    same = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), state, abstract)
    assert all(jax.tree.leaves(same))


def test_state_from_existing_parameters(optimizer):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    params = jax.device_get(jax.jit(init_params)(jax.random.key(5)))
    state = create_state(lambda params: params, optimizer, DECAYS, mesh, params)
    for tree in (state.params, state.emas["0.9"]):
        chex.assert_trees_all_equal(tree, params)
    assert not state.params["blocks"]["mlp"]["fc1"]["kernel"].sharding.is_fully_replicated


def test_parameters_must_be_float32(optimizer):
    mesh = make_mesh(MeshConfig())
    with pytest.raises(InputError, match="parameter head/kernel is bfloat16"):
        create_state(lambda _: {"head": {"kernel": jnp.zeros(3, jnp.bfloat16)}}, optimizer, (), mesh, 0)


def test_gradient_norm_is_taken_before_clipping():
    optimizer, _ = make_optimizer(OptimizerConfig(clip_norm=1.0))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = {"a": {"kernel": np.zeros(3, "f4")}, "b": {"bias": np.ones(1, "f4")}}
    state = create_state(lambda params: params, optimizer, (), mesh, params)
    gradients = {"a": {"kernel": jnp.array([3.0, 0, 0])}, "b": {"bias": jnp.array([4.0])}}
    _, metrics = jax.jit(lambda state, gradients: apply_gradients(state, gradients, optimizer))(state, gradients)
    assert float(metrics["grad_norm"]) == pytest.approx(5.0, rel=1e-6)


def test_averages_start_from_the_parameters_and_match_the_closed_form():
    optimizer = optax.sgd(1.0)  # gradient -1 each step: the parameter is p0 + n after n updates
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = create_state(lambda p: p, optimizer, (0.5, 0.9), mesh, {"w": np.float32(2.0)})
    update = jax.jit(lambda state: apply_gradients(state, {"w": jnp.float32(-1)}, optimizer, ema_start=3)[0])
    for n in range(1, 4):
        state = update(state)
        assert float(state.emas["0.5"]["w"]) == float(state.emas["0.9"]["w"]) == 2.0 + n
    for _ in range(4):
        state = update(state)
    for name, decay in (("0.5", 0.5), ("0.9", 0.9)):
        # e_3 = p_3 = 5, then 4 updates: decay^4 of it, and (1 - decay) decay^(7 - k) of p_k
        expected = decay**4 * 5 + sum((1 - decay) * decay ** (7 - k) * (2 + k) for k in range(4, 8))
        assert float(state.emas[name]["w"]) == pytest.approx(expected, rel=1e-6)
    assert float(state.params["w"]) == 9.0 and int(state.step) == 7


def test_average_moves_from_the_first_update_without_a_start():
    emas = init_emas({"w": jnp.float32(1.0)}, (0.9999,))
    emas = update_emas(emas, {"w": jnp.float32(2.0)}, step=jnp.int32(1))
    assert float(emas["0.9999"]["w"]) == pytest.approx(1.0001, abs=1e-7)


def test_names_of_averages():
    assert [ema_name(d) for d in (0.9999, 0.99975, 0, 0.99999999)] == ["0.9999", "0.99975", "0.0", "0.99999999"]
    with pytest.raises(InputError, match=r"EMA decay is 1.0; it must be in \[0, 1\)"):
        ema_name(1.0)
    with pytest.raises(InputError, match="EMA decays 0.9, 0.9: each may be given once"):
        init_emas({}, (0.9, 0.9))
