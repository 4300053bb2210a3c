"""The train step: what it computes, that it is pure, and that the mesh does not matter."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lpl_jax import autoencoders, denoisers, parallel
from lpl_jax.diffusion import paradigm
from lpl_jax.experiment import LossConfig, OptimizerConfig
from lpl_jax.losses import LPLConfig, gated_perceptual_loss
from lpl_jax.training import Frozen, LPLTerm, Objective, create_state, losses, make_step, train_step
from lpl_jax.training.optimizer import make_optimizer
from lpl_jax.training.state import apply_gradients

MODEL = denoisers.preset("tiny", hidden=16, depth=2, heads=2, num_classes=3)
# Three taps: enough to have a masked one, and half the time to compile.
LPL = LPLConfig.paper(tau=2.0, tau_ref_resolution=32, taps=3, weight=0.5, target_share=None)
BATCH = 8


def objective(name="eps", lpl=LPL, **changes):
    """changes: fields of the objective, of its loss or of its term."""
    base = Objective(denoisers.MMDiT(MODEL), paradigm(name), resolution=32, null_label=3)
    named = {each.name for each in dataclasses.fields(LossConfig)}
    loss = LossConfig(**{field: changes.pop(field) for field in named & set(changes)})
    own = {field: changes.pop(field) for field in ("capacity", "groups") if field in changes}
    term = None if lpl is None else LPLTerm(lpl, **own)
    return dataclasses.replace(base, loss=loss, term=term, groups=own.get("groups"), **changes)


@pytest.fixture(scope="module")
def autoencoder(tiny_folder):
    return autoencoders.load(tiny_folder)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "mean": rng.standard_normal((BATCH, 4, 4, 4)).astype(np.float32),
        "logvar": np.full((BATCH, 4, 4, 4), -6, np.float32),
        "label": np.arange(BATCH, dtype=np.int32) % 3,
    }


@pytest.fixture(scope="module")
def params():
    """The output layer is zero at initialisation: a little noise makes the prediction depend on its inputs."""
    params = jax.jit(functools.partial(denoisers.init, MODEL))(jax.random.key(1))
    return jax.tree.map(lambda x: x + 0.02 * np.random.default_rng(2).standard_normal(x.shape, np.float32), params)


evaluate = jax.jit(losses, static_argnames="objective")


def run(params, batch, autoencoder, objective, key=0, weight=0.5, **fixed):
    options = dict(objective=objective, weight=jnp.float32(weight), **fixed)
    total, output = evaluate(params, batch, jax.random.key(key), Frozen(autoencoder), **options)
    return total, output.metrics


@pytest.mark.parametrize("name", ["eps", "v", "flow"])
def test_diffusion_loss_of_a_zero_prediction_is_the_power_of_the_target(name, batch, autoencoder):
    """At initialisation the network outputs exactly 0, so the loss is known without it."""
    untrained = jax.jit(functools.partial(denoisers.init, MODEL))(jax.random.key(1))
    chosen = objective(name, lpl=None)
    still = batch | {"logvar": np.full_like(batch["logvar"], -200)}  # no posterior noise: z0 is the scaled mean
    noise = np.random.default_rng(3).standard_normal((BATCH, 4, 4, 4)).astype(np.float32)
    t = chosen.paradigm.sample_t(jax.random.key(4), (BATCH,))
    total, metrics = run(untrained, still, autoencoder, chosen, t=t, noise=noise)
    target = chosen.paradigm.target(z0=autoencoder.scale(batch["mean"]), noise=noise, t=t)
    np.testing.assert_allclose(total, np.mean(np.square(target)), rtol=1e-5)
    assert set(metrics) == {"loss", "diffusion_loss"}


CHOSEN = objective(label_dropout=0.0)


@jax.jit
def _differentiated(params, batch, frozen, weight, t, noise):
    gradient = jax.value_and_grad(functools.partial(losses, objective=CHOSEN), has_aux=True)
    return gradient(params, batch, jax.random.key(0), frozen, weight=weight, t=t, noise=noise)


def differentiated(params, batch, autoencoder, weight, t, noise):
    """((total loss, its output), gradient) of `CHOSEN`: one program for all tests with fixed times and noise."""
    arguments = jax.device_get(params), batch, Frozen(autoencoder), np.float32(weight), np.asarray(t, np.int32), noise
    return _differentiated(*arguments)


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(3).standard_normal((BATCH, 4, 4, 4)).astype(np.float32)


@jax.jit
def both_losses(params, batch, autoencoder, t, noise):
    """Diffusion and perceptual loss, written out."""
    process = CHOSEN.paradigm
    z0 = autoencoder.scale(batch["mean"])
    z_t = process.add_noise(z0=z0, noise=noise, t=t)
    prediction = denoisers.MMDiT(MODEL).apply({"params": params}, z_t, process.time_input(t), batch["label"])
    diffusion = jnp.mean(jnp.square(prediction - noise))
    z0_hat = process.estimate(z_t=z_t, prediction=prediction, t=t)[0]
    alpha, sigma = process.alpha_sigma(t)
    given = dict(z0_hat=z0_hat, z0=z0, alpha=alpha, sigma=sigma, key=jax.random.key(9))
    return diffusion, gated_perceptual_loss(autoencoder, LPL, **given, resolution=32)[0]


def test_total_is_diffusion_plus_weighted_perceptual_loss(params, batch, autoencoder, noise):
    t = jnp.arange(BATCH) * 100
    still = batch | {"logvar": np.full_like(batch["logvar"], -200)}
    (total, output), _ = differentiated(params, still, autoencoder, 0.5, t, noise)
    diffusion, perceptual = both_losses(params, still, autoencoder, t, noise)
    alpha, sigma = CHOSEN.paradigm.alpha_sigma(t)
    metrics = output.metrics
    np.testing.assert_allclose(metrics["diffusion_loss"], diffusion, rtol=1e-5)
    np.testing.assert_allclose(metrics["lpl"], perceptual, rtol=1e-4)
    np.testing.assert_allclose(total, diffusion + 0.5 * perceptual, rtol=1e-4)
    np.testing.assert_allclose(metrics["lpl_share"], 0.5 * perceptual / total, rtol=1e-4)
    np.testing.assert_allclose(metrics["lpl/active_fraction"], np.mean(sigma <= 2 * alpha), rtol=1e-6)


def test_perceptual_loss_reaches_the_gradient_only_through_active_samples(params, batch, autoencoder, noise):
    low, high = np.full(BATCH, 100), np.full(BATCH, 950)

    def difference(t):
        without, with_lpl = (differentiated(params, batch, autoencoder, w, t, noise)[1] for w in (0.0, 5.0))
        return max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(np.subtract(a, b)).max(), without, with_lpl)))

    assert difference(high) == 0  # sigma/alpha is above tau everywhere
    assert difference(low) > 1e-4


class LabelOutput(nn.Module):
    """Predicts the label that it is given, in every latent pixel."""

    @nn.compact
    def __call__(self, latents, t, label, *conditions):
        return jnp.zeros_like(latents) + label[:, None, None, None] + self.param("zero", nn.initializers.zeros, ())


def test_dropped_labels_have_no_influence(batch, autoencoder):
    other, params = batch | {"label": (batch["label"] + 1) % 3}, {"zero": 0.0}
    always, never = (objective(lpl=None, model=LabelOutput(), label_dropout=share) for share in (1.0, 0.0))
    assert run(params, batch, autoencoder, always)[0] == run(params, other, autoencoder, always)[0]
    assert run(params, batch, autoencoder, never)[0] != run(params, other, autoencoder, never)[0]


class TimeInput(nn.Module):
    """Predicts the time that it is given, in every latent pixel."""

    @nn.compact
    def __call__(self, latents, t, *conditions):
        return jnp.zeros_like(latents) + t[:, None, None, None] + self.param("zero", nn.initializers.zeros, ())


def test_stratified_times(batch, autoencoder):
    """Without noise the loss is the mean of t^2, which the intervals of the two groups leave little room."""
    chosen = objective(lpl=None, model=TimeInput(), stratified_t=True, groups=2)
    edges = np.arange(BATCH // 2 + 1) / (BATCH // 2) * 1000
    noise = np.zeros((BATCH, 4, 4, 4), np.float32)
    found = [float(run({"zero": 0.0}, batch, autoencoder, chosen, key=k, noise=noise)[0]) for k in range(20)]
    assert np.mean(edges[:-1] ** 2) <= min(found) < max(found) <= np.mean(edges[1:] ** 2)
    assert len(set(found)) == 20
    plain = dataclasses.replace(chosen, loss=LossConfig())
    drawn = [float(run({"zero": 0.0}, batch, autoencoder, plain, key=k, noise=noise)[0]) for k in range(20)]
    assert np.std(drawn) > 1.5 * np.std(found)


def test_weights_of_min_snr_enter_both_losses(params, batch, autoencoder, noise):
    t = np.full(BATCH, 50)  # one t, so that one factor divides out
    plain = differentiated(params, batch, autoencoder, 0.5, t, noise)[0][1].metrics
    lpl = dataclasses.replace(LPL, extra_weight="min_snr")
    chosen = objective(lpl=lpl, weighting="min_snr", label_dropout=0.0)
    weighted = run(params, batch, autoencoder, chosen, t=t, noise=noise)[1]
    alpha, sigma = (float(x[0]) for x in paradigm("eps").alpha_sigma(t))
    factor = min((alpha / sigma) ** 2, 5.0) / (alpha / sigma) ** 2
    assert factor < 0.9
    for name in ("diffusion_loss", "lpl"):
        np.testing.assert_allclose(weighted[name], factor * plain[name], rtol=1e-4)


def fresh_state(mesh, optimizer, params):
    # Copies: the state is donated, and may share its memory with the parameters that it begins from.
    state = create_state(lambda given: given, optimizer, (0.5,), mesh, jax.tree.map(jnp.array, params))
    return state.with_weight(0.5)


def steps(sizes, params, batch, autoencoder, count=3, decoder="replicated", **changes):
    """Metrics of `count` steps on a mesh, and the state after them. decoder: as `MeshConfig.decoder`."""
    return stepper(sizes, params, batch, autoencoder, count, decoder, **changes)()


def stepper(sizes, params, batch, autoencoder, count=3, decoder="replicated", **changes):
    """function() -> `steps`, that may be called again, with the same program."""
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = parallel.make_mesh(parallel.MeshConfig(*sizes), devices)
    optimizer, _ = make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=0))
    step = make_step(objective(**changes), optimizer, fresh_state(mesh, optimizer, params), mesh)
    key = parallel.put_replicated(jax.random.key(5), mesh)
    with pytest.MonkeyPatch.context() as patch:  # kernels of this size would stay whole
        patch.setattr(parallel, "param_sharding", functools.partial(parallel.param_sharding, min_size=64))
        frozen = Frozen(parallel.put_decoder(autoencoder, mesh, decoder))
    kernel = frozen.autoencoder.params["decoder"]["conv_out"]["kernel"]
    assert kernel.is_fully_replicated == (decoder == "replicated" or sizes[1] == 1)

    def run():
        state, metrics = fresh_state(mesh, optimizer, params), []
        with jax.set_mesh(mesh):
            for _ in range(count):
                state, values = step(state, parallel.put_batch(batch, mesh), key, frozen)
                metrics.append(jax.device_get(values))
        return metrics, jax.device_get(state)

    return run


@pytest.fixture(scope="module")
def on_one_device(params, batch, autoencoder):
    return stepper((1, 1, 1), params, batch, autoencoder, capacity=4, groups=4)


@pytest.fixture(scope="module")
def one_device(on_one_device):
    return on_one_device()


@pytest.mark.slow
def test_meshes_of_1_2_4_and_8_devices_agree_without_the_perceptual_loss(params, batch, autoencoder):
    meshes = (1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (8, 1, 1), (2, 2, 2)
    runs = [steps(sizes, params, batch, autoencoder, lpl=None)[0] for sizes in meshes]
    for run_of_mesh in runs[1:]:
        for here, there in zip(run_of_mesh, runs[0], strict=True):
            for name in ("loss", "grad_norm"):
                np.testing.assert_allclose(here[name], there[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    "sizes",
    [(2, 2, 2), *(pytest.param(s, marks=pytest.mark.slow) for s in ((2, 2, 1), (1, 4, 2), (1, 2, 1), (2, 1, 2)))],
    ids=str,
)
def test_meshes_agree(sizes, params, batch, autoencoder, one_device):
    """Also with the decoder split over `fsdp`."""
    expected, expected_state = one_device
    metrics, state = steps(sizes, params, batch, autoencoder, decoder="fsdp", capacity=4, groups=4)
    for here, there in zip(metrics, expected, strict=True):
        for name in ("loss", "diffusion_loss", "lpl", "grad_norm"):
            # sums of float32 in another order
            np.testing.assert_allclose(here[name], there[name], rtol=1e-4, err_msg=name)
    # Adam divides by the root of the second moment: where a gradient is near 0 its sign may differ, for one step's rate
    chex.assert_trees_all_close(state.params, expected_state.params, rtol=0, atol=6e-3)
    means = jax.tree.map(lambda a, b: np.mean(np.abs(a - b)), state.params, expected_state.params)
    assert max(jax.tree.leaves(means)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("lpl", [None, LPL], ids=["diffusion", "lpl"])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(lpl, params, batch, autoencoder):
    """With fixed t and noise, and no other draw: four parts of two images, one after another, against eight at once."""
    noise = np.random.default_rng(3).standard_normal((BATCH, 4, 4, 4)).astype(np.float32)
    still = batch | {"logvar": np.full_like(batch["logvar"], -200)}
    state = fresh_state(parallel.make_mesh(parallel.MeshConfig(), jax.devices()[:1]), optax.sgd(1.0), params)
    results = []
    for parts in (1, 4):
        chosen = objective(lpl=lpl, label_dropout=0.0, accumulate=parts)
        step = functools.partial(
            train_step, objective=chosen, optimizer=optax.sgd(1.0), t=jnp.arange(BATCH) * 100, noise=noise
        )
        results.append(jax.jit(step)(state, still, jax.random.key(0), Frozen(autoencoder)))
    (whole, whole_metrics), (parts, metrics) = results
    names = ("loss", "diffusion_loss", "grad_norm")
    for name in names + (("lpl", "lpl/active_fraction", "lpl/decoded") if lpl else ()):
        np.testing.assert_allclose(metrics[name], whole_metrics[name], rtol=1e-5, err_msg=name)
    for a, b, start in zip(*map(jax.tree.leaves, (parts.params, whole.params, state.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(np.abs(b - start).max()) + 1e-8)


@pytest.mark.slow
def test_each_part_draws_for_itself_wherever_it_lies(params, batch, autoencoder):
    """Two parts that decode two images each, on one device and on two."""
    one, two = (
        steps(sizes, params, batch, autoencoder, count=1, capacity=2, groups=2, accumulate=2)[0][0]
        for sizes in ((1, 1, 1), (1, 2, 1))
    )
    assert one["lpl/decoded"] == 4
    for name in ("loss", "diffusion_loss", "lpl", "grad_norm"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, err_msg=name)


def test_every_step_draws_anew_and_the_same_step_the_same(on_one_device, one_device):
    metrics, state = one_device
    again, _ = on_one_device()
    assert [row["loss"] for row in again] == [row["loss"] for row in metrics]
    assert len({float(row["lpl/active_fraction"]) for row in metrics} | {float(row["loss"]) for row in metrics}) > 3
    assert state.step == 3
    assert metrics[0]["lpl/decoded"] == 4


def test_training_on_one_batch_lowers_both_losses(params, batch, autoencoder, noise):
    """With t and noise fixed the batch can be learnt by heart."""
    mesh = parallel.make_mesh(parallel.MeshConfig(), jax.devices()[:1])
    optimizer, _ = make_optimizer(OptimizerConfig(learning_rate=3e-3, warmup_steps=0))
    update = jax.jit(functools.partial(apply_gradients, optimizer=optimizer))
    state, t = fresh_state(mesh, optimizer, params), jnp.arange(BATCH) * 60 + 50
    values = []
    for _ in range(60):
        (_, output), grads = differentiated(state.params, batch, autoencoder, 0.5, t, noise)
        state, _ = update(state, grads)
        values.append((float(output.metrics["diffusion_loss"]), float(output.metrics["lpl"])))
    assert values[-1][0] < 0.8 * values[0][0]
    assert values[-1][1] < 0.8 * values[0][1]
