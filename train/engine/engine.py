"""A stage at work: its arrays on their devices, its programs, a round, a validation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PyTree

from rehyat_jax.runtime.devices import Devices
from train.engine.checkpoint import Checkpoints
from train.engine.loop import Work
from train.engine.stage import Metrics, Models, Network, Stage, State


def compile_all(lowerings: Sequence[Callable[[], jax.stages.Lowered]]) -> list[jax.stages.Compiled]:
    """Compile several programs side by side: XLA compiles outside Python's lock.

    They are traced one after the other: threads that trace together share their functions' parts by chance, and a
    program that differs in them would not be found in the compilation cache.
    """
    tracing = Lock()

    def compiled(lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Compiled:
        with tracing:
            lowered = lower()
        return lowered.compile()

    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(compiled, lowerings))


class _Parts:
    """A network in parts: its graph, what of it learns, and its other variables."""

    def __init__(self, network: Network) -> None:
        self.network, self.learns = network, None
        if network.optimizer is None:
            self.graph, self.frozen = nnx.split(network.make())
        else:
            self.graph, self.learns, self.frozen = nnx.split(network.make(), network.trainable, ...)


class Engine:
    """The programs of a stage, and their arrays on its devices or, for a plan, the shapes of these.

    Args:
        steps: optimiser steps of the whole run, by which learning rates go.
        planned: the stage's networks and data are shapes; its programs can be lowered and not run.

    Raises:
        RehyatError: whatever is wrong with the stage's networks, data or devices.
    """

    def __init__(self, stage: Stage, *, steps: int, planned: bool = False) -> None:
        self.stage, self.devices, self._steps = stage, stage.devices, steps
        devices, self.rounds = self.devices, stage.rounds()
        parts = {role: _Parts(network) for role, network in stage.networks.items()}
        inputs = {kind[0]: self.rounds[kind].inputs for kind in sorted(self.rounds)}
        self._graphs = {role: part.graph for role, part in parts.items()}
        self._networks = {role: part.network for role, part in parts.items()}
        learning = {role: part for role, part in parts.items() if part.learns is not None}
        self._measures = () if planned else tuple(stage.measures())
        if planned:
            self._frozen = {role: part.frozen for role, part in parts.items()}
            learners = {role: jax.eval_shape(part.network.init, part.learns) for role, part in learning.items()}
            carried = tuple(jax.eval_shape(functools.partial(each.begin, Devices(None))) for each in inputs.values())
            self.state = State(jax.eval_shape(lambda: jnp.zeros((), jnp.int32)), learners, carried)
            return
        self._frozen = {role: devices.parameters(part.frozen) for role, part in parts.items()}
        for each in inputs.values():
            each.frozen = devices.replicate(each.frozen)
        learners = {}
        for role, part in learning.items():
            learners[role] = devices.made(part.network.init, devices.parameters(part.learns))
            part.learns = None  # on a mesh the host's copy may go
        carried = tuple(each.begin(devices) for each in inputs.values())
        #: At the beginning of the run; its buffers are donated to the first round.
        self.state = State(devices.replicate(jnp.zeros((), jnp.int32)), learners, carried)
        self._inputs = [(devices.replicate(m.frozen), devices.batch(m.host, m.host_shapes)) for m in self._measures]

    def compile(self) -> None:
        """Every program of the run, side by side."""
        kinds = list(self.rounds)
        lowerings = [functools.partial(self.lower, kind) for kind in kinds]
        measures = [functools.partial(self._lower_measure, number) for number in range(len(self._measures))]
        compiled = compile_all([*lowerings, *measures])
        #: By kind of round.
        self.programs = dict(zip(kinds, compiled, strict=False))
        self._measurers = compiled[len(kinds) :]

    def lower(self, kind: tuple[int, ...]) -> jax.stages.Lowered:
        """The program of a kind of round, of shapes as well as of arrays."""
        each, devices, steps = self.rounds[kind], self.devices, self.stage.steps_per_round

        def program(
            state: State, networks: Mapping[str, PyTree], frozen: PyTree, host: PyTree, rates: Mapping[str, Array]
        ) -> tuple[State, Metrics]:
            models = Models(self._graphs, frozen=networks).after(state.learners)
            after, metrics = each.function(state, models, frozen, host, rates)
            return after._replace(step=state.step + steps), metrics

        sharded, host = self._state_shardings(), each.inputs.host_shapes()
        return devices.lower(
            program,
            devices.described(self.state, sharded),
            devices.described(self._frozen, devices.parameter_shardings(self._frozen)),
            devices.described(each.inputs.frozen, devices.replicated),
            devices.described(host, devices.batch_shardings(host)),
            devices.described({role: jnp.float32(0) for role in self.state.learners}, devices.replicated),
            donate=(0,),
            out=(sharded, devices.replicated),
        )

    def advance(self, state: State, step: int) -> tuple[State, Metrics]:
        """A round: all that the loop knows of a stage."""
        index, devices = step // self.stage.steps_per_round, self.devices
        kind = self.stage.round_of(index)
        inputs = self.rounds[kind].inputs
        host = devices.batch(inputs.host(index), inputs.host_shapes())
        rates = devices.replicate({role: jnp.float32(self._rate(role, step)) for role in state.learners})
        return self.programs[kind](state, self._frozen, inputs.frozen, host, rates)

    def work(self, step: int) -> Work:
        """What the round that begins at a step does."""
        each = self.rounds[self.stage.round_of(step // self.stage.steps_per_round)]
        return Work(each.clips, each.tokens, each.flops)

    def told(self, step: int) -> dict[str, float]:
        """What a line of measurements at a step says beside what was measured: learning rates, and the epoch."""
        roles = list(self.state.learners)
        last = max(step - 1, 0)
        said = {"learning_rate" if len(roles) == 1 else f"{r}/learning_rate": self._rate(r, last) for r in roles}
        epoch = self.stage.epoch(step)
        return said if epoch is None else said | {"epoch": epoch}

    def measure(self, state: State) -> list[PyTree]:
        """What the stage measures on averaged networks."""
        averages = {role: learner.ema for role, learner in state.learners.items()}
        programs = zip(self._measurers, self._inputs, strict=True)
        return [jax.device_get(program(averages, self._frozen, *inputs)) for program, inputs in programs]

    def averages(self, state: State) -> dict[str, Any]:
        """The learners with averaged variables, on the host; every process has to call it."""
        on_host = self.devices.on_host
        averages = {role: on_host(learner.ema) for role, learner in state.learners.items()}
        models = Models(self._graphs, params=averages, frozen={role: on_host(self._frozen[role]) for role in averages})
        return {role: models[role] for role in averages}

    def _lower_measure(self, number: int) -> jax.stages.Lowered:
        averages = {role: learner.ema for role, learner in self.state.learners.items()}

        def program(averages: Mapping[str, PyTree], networks: PyTree, frozen: PyTree, host: PyTree) -> PyTree:
            models = Models(self._graphs, params=averages, averages=averages, frozen=networks)
            return self._measures[number].function(models, frozen, host)

        arrays = averages, self._frozen, *self._inputs[number]
        return self.devices.lower(program, *arrays, out=self.devices.replicated)

    def _rate(self, role: str, step: int) -> float:
        optimizer = self._networks[role].optimizer
        return optimizer.rate(step, self._steps) if optimizer else 0.0

    def _state_shardings(self) -> Any:
        devices, (_, learners, carried) = self.devices, self.state
        if devices.mesh is None:
            return None
        return State(
            devices.replicated,  # type: ignore[arg-type]
            devices.parameter_shardings(learners),
            devices.batch_shardings(carried),
        )


def averages_of(networks: Mapping[str, Network], checkpoints: Checkpoints, *, step: int | None) -> dict[str, Any]:
    """The learners of a checkpoint, of ``step`` or the newest, with averaged variables.

    Raises:
        CheckpointError: see `Checkpoints.read`.
    """
    parts = {role: _Parts(network) for role, network in networks.items() if network.optimizer is not None}
    template = {"learners": {role: {"ema": part.learns} for role, part in parts.items()}}
    read = checkpoints.read(template, step=step)["learners"]
    models = Models(
        {role: part.graph for role, part in parts.items()},
        params={role: averages["ema"] for role, averages in read.items()},
        frozen={role: part.frozen for role, part in parts.items()},
    )
    return {role: models[role] for role in parts}
