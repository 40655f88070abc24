"""Sampling against diffusers' schedulers, then properties of the solvers and of the loop.

Tolerance of parity: 1e-5 at every one of up to 50 steps, in float32 with latents of order one. Our coefficients are
worked out in float64, those of diffusers in the precision of its levels, float32: most of what is left is that.
"""

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.programs import FOR_SPEED
from shared.tiers import examples, full

from rehyat_jax.errors import ConfigError
from rehyat_jax.sampling import (
    Euler,
    FlowSchedule,
    Guidance,
    UniPC,
    guided_velocity,
    rollout,
    sampling_step,
    sampling_steps,
    scheduler_from_config,
    scheduler_to_config,
)

SHAPE = (2, 3, 4, 5, 16)
SHIFTS = (1.0, 3.0, 5.0, 8.0)
STEPS = (1, 2, 3, 4, 10, 50)


def diffusers_scheduler(grid, *, shift, order=2):
    if grid == "diffusers-euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=order
    )


def set_timesteps(scheduler, grid, *, num_steps):
    if grid == "official":
        # Wan-Video/Wan2.1 wan/utils/fm_solvers_unipc.py: from sigma_max = 0.999 in float32 to sigma_min = 0.
        scheduler.set_timesteps(sigmas=np.linspace(float(np.float32(0.999)), 0, num_steps + 1)[:-1])
    else:
        scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(0)  # as WanPipeline does
    return scheduler


@pytest.mark.parametrize("grid", ["diffusers", "diffusers-euler", "official"])
@pytest.mark.parametrize("shift", [*SHIFTS, 0.7, 12.3])
def test_levels_and_timesteps_are_the_programs_own_bit_for_bit(grid, shift):
    schedule, scheduler = FlowSchedule(grid=grid, shift=shift), diffusers_scheduler(grid, shift=shift)
    for num_steps in [*range(1, 61), 100, 250]:
        set_timesteps(scheduler, grid, num_steps=num_steps)
        np.testing.assert_array_equal(schedule.sigmas(num_steps), scheduler.sigmas.numpy())
        np.testing.assert_array_equal(schedule.timesteps(num_steps), scheduler.timesteps.numpy())


def test_the_two_unipc_grids_differ_by_what_is_known_of_them():
    """0.0061 at shift 8 and 50 steps."""
    ours, theirs = (FlowSchedule(grid=grid, shift=8.0).sigmas(50) for grid in ("diffusers", "official"))
    assert ours[0] == np.float32(1 - 1e-6)
    assert theirs[0] == np.float32(8 * 0.999 / (1 + 7 * 0.999))
    assert np.abs(ours - theirs).max() == pytest.approx(0.0061, abs=1e-4)


def smooth_velocity(x, t):
    """Of order one, non-linear, mixing channels; in numpy, so that both sides evaluate the very same function."""
    mix = np.random.default_rng(1).normal(size=(16, 16)).astype(x.dtype) / 4
    return np.tanh(x @ mix + x.dtype.type(t / 1000)) + x.dtype.type(0.3) * x


CASES = [("diffusers-euler", Euler(), torch.float32)]
for grid in ("diffusers", "official"):
    CASES += [(grid, UniPC(order), torch.float32) for order in (1, 2)]
    # At order 3 diffusers solves for its coefficients in float32, which costs it up to 9e-5: asked in float64.
    CASES += [(grid, UniPC(order), torch.float64) for order in (1, 2, 3)]


@pytest.mark.parametrize("velocities", ["random", full("smooth")])
@pytest.mark.parametrize(("grid", "solver", "dtype"), CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_every_step_agrees_with_diffusers(grid, solver, dtype, velocities):
    """Ours in float32, theirs in ``dtype``."""
    step = jax.jit(lambda state, v, row: solver.step(state, v, coefficients=row.coefficients))
    for shift in SHIFTS:
        for num_steps in STEPS:
            scheduler = diffusers_scheduler(grid, shift=shift, order=getattr(solver, "order", 1))
            set_timesteps(scheduler, grid, num_steps=num_steps)
            scheduler.sigmas = scheduler.sigmas.to(dtype)
            steps = sampling_steps(FlowSchedule(grid=grid, shift=shift), solver, num_steps=num_steps)
            rng = np.random.default_rng(num_steps)
            noise = rng.normal(size=SHAPE).astype(np.float32)
            state, theirs = solver.init(jnp.asarray(noise)), torch.from_numpy(noise).to(dtype)
            for i, t in enumerate(scheduler.timesteps):
                if velocities == "random":
                    ours_v = theirs_v = rng.normal(size=SHAPE).astype(np.float32)
                else:
                    ours_v = smooth_velocity(np.asarray(state.latents), float(steps.timestep[i]))
                    theirs_v = smooth_velocity(theirs.numpy(), float(t))
                state = step(state, jnp.asarray(ours_v), steps.at(i))
                theirs = scheduler.step(torch.from_numpy(theirs_v).to(dtype), t, theirs, return_dict=False)[0]
                np.testing.assert_allclose(state.latents, theirs.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", ["diffusers", "official"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_diffusers_in_float64(x64, grid, order):
    """With both sides in float64 only the order of summation is left: 1e-11 over 50 steps."""
    solver = UniPC(order)
    scheduler = set_timesteps(diffusers_scheduler(grid, shift=5.0, order=order), grid, num_steps=50)
    scheduler.sigmas = scheduler.sigmas.double()
    steps = sampling_steps(FlowSchedule(grid=grid, shift=5.0), solver, num_steps=50)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=SHAPE)
    state, theirs = solver.init(jnp.asarray(noise)), torch.from_numpy(noise)
    step = jax.jit(lambda state, v, row: solver.step(state, v, coefficients=row.coefficients))
    for i, t in enumerate(scheduler.timesteps):
        v = rng.normal(size=SHAPE)
        state = step(state, jnp.asarray(v), steps.at(i))
        theirs = scheduler.step(torch.from_numpy(v), t, theirs, return_dict=False)[0]
        np.testing.assert_allclose(state.latents, theirs.numpy(), rtol=0, atol=1e-11)


def solved(velocity, noise, *, schedule, solver, num_steps):
    """The loop that makes whole videos."""
    steps = sampling_steps(schedule, solver, num_steps=num_steps)
    advance = jax.jit(lambda state, row: sampling_step(velocity, state, step=row, solver=solver))
    return rollout.per_step(advance, noise, steps=steps, solver=solver)


def scanned(velocity, noise, *, schedule, solver, num_steps):
    """The same as one program."""

    def body(state, row):
        return sampling_step(velocity, state, step=row, solver=solver), None

    return jax.lax.scan(body, solver.init(noise), sampling_steps(schedule, solver, num_steps=num_steps))[0].latents


def solve_toy(solver, sigmas):
    """The solver's last state for dx/dsigma = -x / 2 from x = 1 at the first level."""

    def body(state, coefficients):
        return solver.step(state, -state.latents / 2, coefficients=coefficients), None

    return jax.lax.scan(body, solver.init(jnp.ones((1,))), solver.coefficients(sigmas))[0]


@pytest.mark.parametrize(("solver", "expected"), [(Euler(), 1), (UniPC(1), 2), (UniPC(2), 3)], ids=str)
def test_order_of_accuracy_on_a_linear_flow(x64, solver, expected):
    """Halving the steps divides the error by 2^order; UniPC-p with its corrector has order p + 1 (arXiv 2302.04867).

    Measured in float64 from sigma 0.9 to 0.1 at even steps of lambda, before the last step: that has order 1 by design.
    """
    errors = []
    for num_steps in (40, 80, 160):
        sigmas = 1 / (1 + np.exp(np.linspace(-np.log(9), np.log(9), num_steps + 1)))
        exact = np.exp(-0.5 * (sigmas[-1] - sigmas[0]))
        if isinstance(solver, UniPC):
            # Two steps more: the first lets the corrector do the step to sigma 0.1 over, the second is the last.
            found = solve_toy(solver, np.append(sigmas, 0.05)).corrected
        else:
            found = solve_toy(solver, sigmas).latents
        errors.append(abs(float(found[0]) - exact))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, expected, atol=0.1)


@settings(max_examples=examples(25), deadline=None)
@given(
    num_steps=st.integers(1, 60),
    shift=st.floats(0.2, 20),
    solver=st.sampled_from([Euler(), UniPC(1), UniPC(2), UniPC(3)]),
)
def test_a_straight_flow_is_solved_exactly(num_steps, shift, solver):
    """All data at one point: x_sigma = (1 - sigma) d + sigma n, v = n - d is constant, and any solver ends at d."""
    grid = "diffusers-euler" if solver == Euler() else "diffusers"
    data, noise = (jnp.asarray(x, jnp.float32) for x in np.random.default_rng(num_steps).normal(size=(2, 1, 8)))
    schedule = FlowSchedule(grid=grid, shift=shift)
    latents = solved(lambda x, t: noise - data, noise, schedule=schedule, solver=solver, num_steps=num_steps)
    # The nudge of sigma_0 by 1e-6 is the only thing that is not exact; the rest is 60 roundings of 6e-8.
    np.testing.assert_allclose(latents, data, rtol=0, atol=2e-5)


@settings(max_examples=examples(50), deadline=None)
@given(num_steps=st.integers(1, 200), shift=st.floats(0.1, 50), order=st.integers(1, 3))
def test_unipc_weights_are_finite_and_the_last_step_returns_the_prediction(num_steps, shift, order):
    sigmas = FlowSchedule(grid="diffusers", shift=shift).sigmas(num_steps)
    coefficients = UniPC(order).coefficients(sigmas)
    assert all(np.isfinite(c).all() for c in coefficients)
    np.testing.assert_array_equal(coefficients.predictor[-1], np.eye(order + 1)[1])
    # A sample that is all data at every level stays so: the factor and the weights times alpha add up.
    total = coefficients.predictor[:, 0] * (1 - sigmas[:-1]) + coefficients.predictor[:, 1:].sum(1)
    np.testing.assert_allclose(total, 1 - sigmas[1:], rtol=0, atol=1e-6)


class TestLoop:
    """The scan, the loop over steps and the sweep over chunks are the same arithmetic."""

    schedule = FlowSchedule(shift=3.0)
    solver = UniPC()

    def velocity(self, x, t):
        return jnp.tanh(x * 0.7 + t.reshape(-1, 1, 1) / 1000)

    def noise(self, *shape):
        return jax.random.normal(jax.random.key(0), shape)

    def test_one_jitted_step_in_a_loop_equals_the_scan_and_compiles_once(self):
        noise = self.noise(2, 6, 4)
        run = functools.partial(scanned, schedule=self.schedule, solver=self.solver, num_steps=7)
        whole = jax.jit(functools.partial(run, self.velocity), compiler_options=FOR_SPEED)(noise)
        steps = sampling_steps(self.schedule, self.solver, num_steps=7)
        traces, done = [], []

        @functools.partial(jax.jit, compiler_options=FOR_SPEED)
        def one_step(state, step):
            traces.append(1)
            return sampling_step(self.velocity, state, step=step, solver=self.solver)

        latents = rollout.per_step(one_step, noise, steps=steps, solver=self.solver, on_step=done.append)
        assert (len(traces), done) == (1, [1, 2, 3, 4, 5, 6, 7])
        assert whole.dtype == jnp.float32
        np.testing.assert_array_equal(latents, whole)

    def test_a_traced_index_serves_as_well(self):
        noise = self.noise(1, 3, 2)
        steps = sampling_steps(self.schedule, self.solver, num_steps=5)

        def body(i, state):
            return sampling_step(self.velocity, state, step=steps.at(i), solver=self.solver)

        looped = jax.jit(lambda x: jax.lax.fori_loop(0, 5, body, self.solver.init(x)).latents)(noise)
        whole = scanned(self.velocity, noise, schedule=self.schedule, solver=self.solver, num_steps=5)
        np.testing.assert_allclose(looped, whole, rtol=0, atol=1e-6)

    def test_per_chunk_sweep_equals_per_step_sweep(self):
        """A causal network with one state per step: a scan over chunks of a scan over steps is the scan over steps of a
        scan over chunks."""
        batch, chunks, tokens, channels, num_steps = 2, 4, 3, 5, 6
        noise = self.noise(batch, chunks * tokens, channels)
        steps = sampling_steps(self.schedule, self.solver, num_steps=num_steps)

        def network(memory, x, t):
            """Reads what chunks before have left, then adds its own."""
            v = self.velocity(x, t) + 0.2 * memory[:, None, :] * jnp.ones_like(x)
            return memory + x.mean(1), v

        def whole_video(x, t):
            pieces = jnp.moveaxis(x.reshape(batch, chunks, tokens, channels), 1, 0)
            _, v = jax.lax.scan(lambda m, piece: network(m, piece, t), jnp.zeros((batch, channels)), pieces)
            return jnp.moveaxis(v, 0, 1).reshape(x.shape)

        per_step = scanned(whole_video, noise, schedule=self.schedule, solver=self.solver, num_steps=num_steps)

        def one_chunk(memories, chunk_noise):
            def one_step(state, step_and_memory):
                step, memory = step_and_memory
                t = jnp.broadcast_to(step.timestep, (batch,))
                memory, v = network(memory, state.latents, t)
                return self.solver.step(state, v, coefficients=step.coefficients), memory

            state, memories = jax.lax.scan(one_step, self.solver.init(chunk_noise), (steps, memories))
            return memories, state.latents

        pieces = jnp.moveaxis(noise.reshape(batch, chunks, tokens, channels), 1, 0)
        _, per_chunk = jax.jit(lambda p: jax.lax.scan(one_chunk, jnp.zeros((num_steps, batch, channels)), p))(pieces)
        per_chunk = jnp.moveaxis(per_chunk, 0, 1).reshape(noise.shape)
        np.testing.assert_allclose(per_chunk, per_step, rtol=0, atol=1e-5)

    def test_latents_stay_float32_under_a_bfloat16_model(self):
        seen = []

        def model(x, t, text):
            seen.append((x.dtype, t.dtype, text.dtype))
            return x * text.mean((1, 2))[:, None, None]

        text = jnp.ones((2, 3, 4))
        for guidance in (Guidance(scale=1.0), Guidance(scale=3.0), Guidance(scale=3.0, forward="two")):
            velocity = guided_velocity(model, jnp.stack([text, text]), guidance=guidance, dtype=jnp.bfloat16)
            latents = solved(velocity, self.noise(2, 3, 4), schedule=self.schedule, solver=self.solver, num_steps=2)
            assert latents.dtype == jnp.float32
        assert set(seen) == {(jnp.dtype("bfloat16"), jnp.dtype("float32"), jnp.dtype("bfloat16"))}


class TestGuidance:
    latents = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    texts = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 5, 6)), jnp.float32)
    t = jnp.asarray([10.0, 900.0], jnp.float32)

    def model(self, x, t, text):
        return jnp.sin(x + t[:, None, None]) * text.mean((1, 2))[:, None, None]

    def call(self, guidance):
        return guided_velocity(self.model, self.texts, guidance=guidance)(self.latents, self.t)

    @pytest.mark.parametrize("forward", ["one", "two"])
    def test_formula(self, forward):
        v, v_negative = (self.model(self.latents, self.t, text) for text in self.texts)
        guided = self.call(Guidance(scale=4.5, forward=forward))
        np.testing.assert_allclose(guided, v_negative + 4.5 * (v - v_negative), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
    def test_at_a_scale_of_one_or_less_the_model_runs_once_on_the_prompt(self, scale):
        np.testing.assert_array_equal(self.call(Guidance(scale=scale)), self.model(self.latents, self.t, self.texts[0]))
        guided_velocity(self.model, self.texts[:1], guidance=Guidance(scale=scale))  # no negative prompt needed

    def test_errors(self):
        with pytest.raises(ConfigError, match="negative prompt"):
            guided_velocity(self.model, self.texts[:1], guidance=Guidance(scale=2.0))
        with pytest.raises(ConfigError, match="finite"):
            Guidance(scale=float("nan"))


class TestConfig:
    @pytest.mark.parametrize(
        ("grid", "solver"), [("diffusers", UniPC(2)), ("diffusers", UniPC(3)), ("diffusers-euler", Euler())], ids=str
    )
    def test_round_trip_through_diffusers(self, grid, solver, tmp_path):
        """What we write opens in diffusers as the scheduler meant, and what it writes then reads back the same."""
        schedule = FlowSchedule(grid=grid, shift=5.0)
        config = scheduler_to_config(schedule, solver)
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        scheduler.save_pretrained(tmp_path)
        reread, _ = type(scheduler).load_config(tmp_path, return_unused_kwargs=True)
        assert scheduler_from_config(reread) == scheduler_from_config(config) == (schedule, solver)
        set_timesteps(scheduler, grid, num_steps=9)
        np.testing.assert_array_equal(schedule.sigmas(9), scheduler.sigmas.numpy())

    def test_diffusers_defaults_fill_what_a_file_leaves_out(self):
        schedule, solver = scheduler_from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"})
        assert (schedule, solver) == (FlowSchedule(grid="diffusers-euler", shift=1.0), Euler())

    @pytest.mark.parametrize(
        ("change", "culprit"),
        [
            ({"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
            ({"_class_name": None}, "None"),
            ({"use_flow_sigmas": False}, "use_flow_sigmas"),
            ({"prediction_type": "epsilon"}, "prediction_type"),
            ({"solver_type": "bh1"}, "solver_type"),
            ({"use_karras_sigmas": True}, "use_karras_sigmas"),
            ({"solver_order": 4}, "order"),
            ({"solver_order": "2"}, "solver_order"),
            ({"flow_shift": "three"}, "flow_shift"),
            ({"flow_shift": -1}, "shift"),
            ({"flow_shift": float("inf")}, "shift"),
            ({"num_train_timesteps": 1 << 60}, "num_train_timesteps"),
            ({"num_train_timesteps": True}, "num_train_timesteps"),
        ],
        ids=str,
    )
    def test_a_foreign_or_absurd_file_is_named(self, change, culprit):
        config = scheduler_to_config(FlowSchedule(), UniPC()) | change
        with pytest.raises(ConfigError, match=culprit):
            scheduler_from_config(config)

    def test_what_diffusers_cannot_do_is_not_written(self):
        with pytest.raises(ConfigError, match="official"):
            scheduler_to_config(FlowSchedule(grid="official"), UniPC())

    def test_impossible_runs(self):
        with pytest.raises(ConfigError, match="number of steps"):
            FlowSchedule().sigmas(0)
        with pytest.raises(ConfigError, match="number of steps"):
            FlowSchedule().timesteps(1001)
        with pytest.raises(ConfigError, match="coincide"):
            FlowSchedule(shift=1e9).sigmas(50)
        with pytest.raises(ConfigError, match="below 1"):
            UniPC().coefficients(FlowSchedule(grid="diffusers-euler").sigmas(4))
        with pytest.raises(ConfigError, match="order"):
            UniPC(0)
