"""Samplers against independent solvers, known ODEs and Gaussian data, where the exact answer is a formula."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpl_jax.diffusion import ddim_grid, flow_grid, paradigm, sample
from lpl_jax.errors import InputError

EULER_TABLEAU = (np.zeros((1, 1)), np.ones(1), np.zeros(1))
THREE_EIGHTHS = (
    np.array([[0, 0, 0, 0], [1 / 3, 0, 0, 0], [-1 / 3, 1, 0, 0], [1, -1, 1, 0]]),
    np.array([1, 3, 3, 1]) / 8,
    np.array([0, 1 / 3, 2 / 3, 1]),
)
CLASSIC = (
    np.array([[0, 0, 0, 0], [1 / 2, 0, 0, 0], [0, 1 / 2, 0, 0], [0, 0, 1, 0]]),
    np.array([1, 2, 2, 1]) / 6,
    np.array([0, 1 / 2, 1 / 2, 1]),
)


def runge_kutta(velocity, z, grid, tableau):
    """Any explicit Runge-Kutta method, from its Butcher tableau, in float64."""
    matrix, weights, nodes = tableau
    for t, t_next in itertools.pairwise(grid):
        slopes = []
        for row, node in zip(matrix, nodes, strict=True):
            stage = z + (t_next - t) * sum((w * k for w, k in zip(row, slopes, strict=False)), np.zeros_like(z))
            slopes.append(velocity(stage, t + node * (t_next - t)))
        z = z + (t_next - t) * sum(w * k for w, k in zip(weights, slopes, strict=True))
    return z


# --- grids ---


def test_ddim_grid_trailing():
    grid = ddim_grid(paradigm("v"), 50)
    np.testing.assert_array_equal(grid, np.arange(999, 0, -20))
    assert grid.dtype == np.int32
    for steps in (1, 3, 7, 15, 30, 999, 1000):
        grid = ddim_grid(paradigm("v"), steps)
        assert grid.shape == (steps,) and grid[0] == 999 and grid[-1] >= 0 and np.all(np.diff(grid) < 0)


def test_ddim_grid_leading():
    np.testing.assert_array_equal(ddim_grid(paradigm("eps"), 50, "leading"), np.arange(980, -1, -20))
    np.testing.assert_array_equal(ddim_grid(paradigm("eps"), 50, "leading", 1), np.arange(981, 0, -20))


def test_flow_grid():
    np.testing.assert_array_equal(flow_grid(paradigm("flow"), 4), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(
        flow_grid(paradigm("flow", schedule_rescale=2), 4), [1, 6 / 7, 2 / 3, 0.4, 0], rtol=1e-15
    )


def test_the_denoiser_sees_the_grid_in_the_paradigms_own_unit():
    """A network that returns its time: the sum of the steps tells which times it was given, and how often."""

    def denoise(z, t):
        assert t.shape == (2,)
        assert t.dtype == (jnp.float32 if flow else jnp.int32)
        return jnp.broadcast_to(t.astype(jnp.float32)[:, None], z.shape)

    flow, zeros = True, jnp.zeros((2, 3))
    euler = sample(denoise, zeros, paradigm("flow"), sampler="euler", steps=4)
    np.testing.assert_allclose(euler, -0.25 * (1 + 0.75 + 0.5 + 0.25), rtol=1e-6)  # never at t = 0
    np.testing.assert_allclose(sample(denoise, zeros, paradigm("flow"), sampler="rk4", steps=4), -0.5, rtol=1e-6)

    flow = False
    one_step = sample(denoise, zeros, paradigm("v"), steps=1)
    np.testing.assert_array_equal(one_step, -999.0)  # z0_hat = -v at pure noise


# --- solvers ---


def field(xp, z, t):
    return xp.sin(2 * z + 3 * t) + 0.5 * xp.cos(5 * t) * z


@pytest.mark.parametrize(("sampler", "tableau"), [("euler", EULER_TABLEAU), ("rk4", THREE_EIGHTHS)])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_flow_steps_equal_an_independent_solver(sampler, tableau, factor):
    p = paradigm("flow", schedule_rescale=factor)
    noise = np.random.default_rng(0).standard_normal((2, 3, 3, 4))
    expected = runge_kutta(functools.partial(field, np), noise, flow_grid(p, 5), tableau)
    ours = sample(lambda z, t: field(jnp, z, t[:, None, None, None]), jnp.asarray(noise), p, sampler=sampler, steps=5)
    # float32: about 10 roundings of 6e-8 a step on values of O(1), 5 steps, amplified by exp(2.5) at most
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    if sampler == "rk4":  # the tolerance can tell the 3/8 rule from the classic one
        assert np.abs(runge_kutta(functools.partial(field, np), noise, flow_grid(p, 5), CLASSIC) - ours).max() > 1e-4


@pytest.mark.parametrize(("sampler", "order", "steps"), [("euler", 1, (256, 512, 1024)), ("rk4", 4, (4, 8, 16))])
def test_order_of_convergence(sampler, order, steps):
    """dz/dt = -2 t z^2 has the solution 1 / z = t^2 + c."""
    start, exact = 0.7, 1 / (1 / 0.7 - 1)

    def solve(count):
        noise = jnp.full((1, 1), start)
        return sample(lambda z, t: -2 * t[:, None] * z**2, noise, paradigm("flow"), sampler=sampler, steps=count)

    errors = np.array([abs(float(solve(count)[0, 0]) - exact) for count in steps])
    # The smallest error of rk4, 6e-6, has float32 rounding of about 5e-7 in it: 0.13 of a power of two.
    np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), order, atol=0.3)


# --- Gaussian data: z0 ~ N(mean, std^2) ---

MEAN, STD = 0.8, 0.5


def gaussian_denoiser(p):
    """The best possible network for this data, in the paradigm's own parametrisation."""

    def denoise(z, t):
        alpha, sigma = (x[:, None] for x in p.alpha_sigma(t))
        z0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (z - alpha * MEAN)
        if p.name == "flow":
            # (z - alpha z0) / sigma without dividing by sigma = 0
            eps = (sigma / (alpha**2 * STD**2 + sigma**2)) * (z - alpha * MEAN)
            return eps - z0
        eps = (z - alpha * z0) / sigma
        return eps if p.name == "eps" else alpha * eps - sigma * z0

    return denoise


def exact_flow_map(p, noise):
    """Where the probability-flow ODE takes this noise: quantiles are kept, so Gaussians are mapped affinely."""
    alpha, sigma = (0.0, 1.0) if p.name == "flow" else (table[-1] for table in p.tables())
    return MEAN + STD * (noise - alpha * MEAN) / np.sqrt(alpha**2 * STD**2 + sigma**2)


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize(
    ("name", "sampler", "steps", "error"),
    [
        ("eps", "ddim", 1000, 0.03),
        ("v", "ddim", 1000, 0.03),
        ("flow", "euler", 200, 0.03),
        ("flow", "rk4", 20, 1e-4),
    ],
)
def test_gaussian_data_is_sampled_exactly_in_the_limit(name, sampler, steps, error, factor):
    p = paradigm(name, schedule_rescale=factor)
    noise = jax.random.normal(jax.random.key(0), (4096, 1))
    run = jax.jit(
        lambda noise, steps: sample(gaussian_denoiser(p), noise, p, sampler=sampler, steps=steps), static_argnums=1
    )
    exact = exact_flow_map(p, np.asarray(noise, np.float64))
    fine, coarse = (np.asarray(run(noise, count)) for count in (steps, steps // 5))
    assert np.abs(fine - exact).max() < error
    assert np.abs(fine - exact).max() < 0.3 * np.abs(coarse - exact).max()  # it converges
    # The distribution itself: four standard errors of 4096 draws, and what the ODE leaves.
    assert abs(fine.mean() - MEAN) < 4 * STD / 64 + error
    assert abs(fine.std() - STD) < 4 * STD / 90 + error


@pytest.mark.parametrize("steps", [15, 30, 70])
def test_ddim_ends_clean_when_the_steps_do_not_divide_the_schedule(steps):
    """A network that knows z0 gets it back exactly, whatever the grid: no noise may be left after the last step."""
    p, z0 = paradigm("v"), jax.random.normal(jax.random.key(1), (2, 8))

    def denoise(z, t):
        alpha, sigma = (x[:, None] for x in p.alpha_sigma(t))
        return alpha * (z - alpha * z0) / sigma - sigma * z0

    latents, trajectory = sample(
        denoise, jax.random.normal(jax.random.key(0), (2, 8)), p, steps=steps, return_trajectory=True
    )
    np.testing.assert_allclose(latents, z0, atol=1e-5)
    np.testing.assert_array_equal(latents, trajectory[-1])
    # on the way, z has the level of the point where it is evaluated next: z - alpha z0 = sigma eps with one eps
    alpha, sigma = (table[ddim_grid(p, steps)[1:]] for table in p.tables())
    eps = (np.asarray(trajectory[:-1], np.float64) - alpha[:, None, None] * z0) / sigma[:, None, None]
    np.testing.assert_allclose(eps, np.broadcast_to(eps[0], eps.shape), atol=1e-4)  # the last sigma is 0.04


# --- interface ---


def test_trajectory_holds_z_after_every_step():
    p, noise = paradigm("flow"), jax.random.normal(jax.random.key(0), (2, 3))
    latents, trajectory = sample(gaussian_denoiser(p), noise, p, sampler="euler", steps=6, return_trajectory=True)
    assert trajectory.shape == (6, 2, 3)
    np.testing.assert_array_equal(trajectory[-1], latents)
    first = sample(lambda z, t: gaussian_denoiser(p)(z, t) * (t[:, None] == 1), noise, p, sampler="euler", steps=6)
    np.testing.assert_allclose(trajectory[0], first, atol=1e-6)


@pytest.mark.parametrize(("name", "sampler"), [("eps", "ddim"), ("flow", "euler"), ("flow", "rk4")])
def test_one_compilation_whatever_the_noise(name, sampler):
    chex.clear_trace_counter()
    jit = functools.partial(jax.jit, static_argnames=("p", "steps"))

    def run(weight, noise, p, steps):
        return sample(lambda z, t: weight * z, noise, p, sampler=sampler, steps=steps)

    once = jit(chex.assert_max_traces(run, n=1))
    outputs = [once(w, jnp.full((2, 3), v), p=paradigm(name), steps=3) for w, v in ((0.1, 1.0), (0.2, 1.0), (0.1, 2.0))]
    assert len({float(x[0, 0]) for x in outputs}) == 3
    text = jit(run).lower(0.1, jnp.ones((2, 3)), p=paradigm(name), steps=3).as_text()
    assert text.count("stablehlo.while") == 1  # the steps are a loop, not unrolled


def test_the_size_of_the_program_does_not_depend_on_the_steps():
    def size(steps):
        jaxpr = jax.make_jaxpr(lambda z: sample(lambda z, t: jnp.tanh(z), z, paradigm("v"), steps=steps))(
            jnp.ones((1, 2))
        )
        return len(jaxpr.eqns)

    assert size(2) == size(40)


@pytest.mark.parametrize("name", ["eps", "v", "flow"])
def test_bfloat16_network_and_noise_leave_the_latents_in_float32(name):
    p = paradigm(name)
    latents = sample(
        lambda z, t: (0.1 * z).astype(jnp.bfloat16), jnp.ones((2, 3), jnp.bfloat16), p, sampler=p.samplers[0], steps=3
    )
    assert latents.dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flow", {"sampler": "ddim"}, "sampler of paradigm 'flow' must be one of euler, rk4, got 'ddim'"),
        ("flow", {}, "sampler of paradigm 'flow' must be one of euler, rk4, got 'ddim'"),
        ("eps", {"sampler": "euler"}, "sampler of paradigm 'eps' must be one of ddim, got 'euler'"),
        ("v", {"sampler": "rk4"}, "sampler of paradigm 'v' must be one of ddim, got 'rk4'"),
        ("v", {"sampler": "heun"}, "one of ddim, got 'heun'"),
        ("v", {"steps": 0}, "steps must be an integer between 1 and 1000, got 0"),
        ("eps", {"steps": 1001}, "between 1 and 1000, got 1001"),
        ("flow", {"sampler": "rk4", "steps": 2.5}, "steps must be an integer of at least 1, got 2.5"),
        ("eps", {"spacing": "linspace"}, "one of trailing, leading, got 'linspace'"),
        ("eps", {"offset": 1}, "offset belongs to spacing='leading'"),
        ("eps", {"spacing": "leading", "offset": 20}, "offset must be between 0 and 19 for 50 of 1000 steps, got 20"),
        ("v", {"spacing": "leading"}, "cannot start from noise with zero terminal SNR"),
        ("flow", {"sampler": "euler", "spacing": "leading"}, "spacing and offset belong to ddim"),
    ],
)
def test_impossible_requests(name, options, message):
    with pytest.raises(InputError, match=message) as error:
        sample(lambda z, t: z, jnp.ones((1, 2)), paradigm(name), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "sampler"), [("v", "ddim"), ("flow", "euler"), ("flow", "rk4")])
def test_a_prediction_of_another_shape(name, sampler):
    with pytest.raises(InputError, match="z_t and prediction must have the same shape"):
        sample(lambda z, t: z[..., :1], jnp.ones((1, 2)), paradigm(name), sampler=sampler)
