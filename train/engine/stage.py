"""A stage of training: which networks there are, which of them learn and by what, on which data; no loop, no folder.

`train.engine.engine.Engine` makes the programs of a stage and `train.engine.run.RunConfig` runs them. What a run
carries from round to round is a `State`, whole in every checkpoint.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int, PyTree

from rehyat_jax.runtime.devices import Devices
from train.engine.folder import RunFolder
from train.engine.gradients import Mean, gradients_of
from train.engine.optimizer import OptimizerConfig, Shares, Skipped, TrainState

#: Values to log, by name, of each step of a round.
Metrics = dict[str, Array]


class State(NamedTuple):
    """All that a run carries from round to round; random keys are derived from the round."""

    step: Int[Array, ""]
    #: By role: what learns.
    learners: dict[str, TrainState]
    #: What each kind of round carries on its own: rollouts, streams; None where that is nothing.
    carried: tuple[PyTree, ...]

    @property
    def skipped(self) -> dict[str, Skipped]:
        """Of each learner."""
        return {role: learner.skipped for role, learner in self.learners.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A network in its role (student, teacher, critic, …): how it is made, and how it learns."""

    #: Loads or initialises it. Called once, when it is needed: an export needs the learners alone.
    make: Callable[[], nnx.Module]
    #: None: frozen.
    optimizer: OptimizerConfig | None = None
    #: Which of its variables learn; the others are frozen parameters.
    trainable: Any = nnx.Param
    #: Of the learning rate, by variable type.
    shares: Shares = dataclasses.field(default_factory=dict)
    #: Its variables have a leading axis of networks that each learn for themselves.
    stacked: bool = False

    def init(self, params: PyTree) -> TrainState:
        """The train state of its trainable variables, before the first step.

        Raises:
            ValueError: it is frozen.
        """
        if self.optimizer is None:
            raise ValueError("a frozen network has no train state")
        return (jax.jit(jax.vmap(self.optimizer.init)) if self.stacked else self.optimizer.init)(params)


class Models:
    """The networks of a run as modules, inside a program: ``models["student"]``."""

    def __init__(
        self,
        graphs: Mapping[str, Any],
        *,
        params: Mapping[str, PyTree] = MappingProxyType({}),
        averages: Mapping[str, PyTree] = MappingProxyType({}),
        frozen: Mapping[str, PyTree] = MappingProxyType({}),
    ) -> None:
        """
        Args:
            graphs: of every role's module.
            params, averages: of the learners, their trainable variables and the moving averages of these.
            frozen: of every role, its other variables.
        """
        self._graphs, self._params, self._averages, self._frozen = graphs, params, averages, frozen

    def __contains__(self, role: str) -> bool:
        return role in self._graphs

    def __getitem__(self, role: str) -> Any:
        return self._merged(role, self._params)

    def average(self, role: str) -> Any:
        """The learner with the moving average of its variables."""
        return self._merged(role, self._averages)

    def after(self, learners: Mapping[str, TrainState]) -> Models:
        """The same networks, the learners at these train states."""
        return Models(
            self._graphs,
            params={role: learner.params for role, learner in learners.items()},
            averages={role: learner.ema for role, learner in learners.items()},
            frozen=self._frozen,
        )

    def with_params(self, role: str, params: PyTree) -> Models:
        """The same networks, one learner with other variables."""
        return Models(self._graphs, params={**self._params, role: params}, averages=self._averages, frozen=self._frozen)

    def _merged(self, role: str, params: Mapping[str, PyTree]) -> Any:
        states = [states[role] for states in (params, self._frozen) if jax.tree.leaves(states.get(role))]
        return nnx.merge(self._graphs[role], *(states or [nnx.State({})]))


#: From the networks and a batch: the means that are minimised, each times its weight, and those that are only logged.
Loss = Callable[[Models, Any], Mapping[str, Mean]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """One learner's optimiser step on a batch."""

    role: str
    loss: Loss
    #: It is due at the last of each so many steps, after the updates of every step: 1, or whole rounds.
    every: int = 1
    #: Parts that a batch is cut into along its rows, one after the other: less memory, the same gradient.
    parts: int = 1

    def due(self, index: int, *, steps_per_round: int) -> bool:
        """Whether round ``index`` makes it.

        Raises:
            ValueError: its steps are no whole rounds.
        """
        if self.every > 1 and self.every % steps_per_round:
            raise ValueError(f"an update every {self.every} steps is due inside a round of {steps_per_round}")
        return self.every == 1 or (index + 1) * steps_per_round % self.every == 0

    def apply(self, models: Models, learner: TrainState, batch: Any, rate: Array, network: Network) -> Any:
        """The learner after the step, and values to log; inside jit."""
        if network.optimizer is None:
            raise ValueError(f"{self.role} is frozen")

        def loss(params: PyTree, part: Any) -> Mapping[str, Mean]:
            return self.loss(models.with_params(self.role, params), part)

        gradients, values = gradients_of(loss, learner.params, batch, parts=self.parts)
        values = {**values, "gradient_norm": optax.tree.norm(gradients)}
        return network.optimizer.apply(learner, gradients, rate, shares=network.shares), values


class Inputs(abc.ABC):
    """What one kind of round is given; every shape in it is known before the first round."""

    #: Arrays that a round reads and does not change, replicated.
    frozen: PyTree = None

    @abc.abstractmethod
    def host(self, index: int) -> PyTree:
        """The host batch of round ``index`` of the run, random keys among it; all of it, or this process's rows.

        A function of ``index`` alone, so that a resumed run has the same.
        """

    @abc.abstractmethod
    def host_shapes(self) -> PyTree:
        """Shapes and dtypes of a whole host batch."""

    def begin(self, devices: Devices) -> PyTree:
        """What is carried before the first round: the first axis of each array is its rows. None: nothing is."""
        return None


class Data(Inputs):
    """Where the batches of one kind of round come from."""

    @abc.abstractmethod
    def draw(
        self, models: Models, carried: PyTree, host: PyTree, frozen: PyTree
    ) -> tuple[PyTree, Callable[[Int[Array, ""]], Any]]:
        """What is carried on, and the batch of each of the round's steps, from its number; inside jit."""


RoundFunction = Callable[[State, Models, PyTree, PyTree, Mapping[str, Array]], tuple[State, Metrics]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """One kind of round: the program that it is, and what that is given."""

    #: From the state, the networks, ``inputs.frozen``, a host batch and each learner's learning rate to the state after
    #: the round (but for its step, which is counted elsewhere) and values to log; inside jit.
    function: RoundFunction
    inputs: Inputs
    #: Floating-point operations; 0: not known.
    flops: float = 0.0
    #: Clips that it learns from, each as often as it serves, and their tokens; 0: not known.
    clips: int = 0
    tokens: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """Something measured now and then with averaged networks, on the same inputs each time."""

    #: From the networks, ``frozen`` and ``host`` to whatever `Stage.report` is given; inside jit.
    function: Callable[[Models, PyTree, PyTree], PyTree]
    frozen: PyTree
    #: Sharded by rows, and all of it or this process's share.
    host: PyTree
    host_shapes: PyTree


class Stage(abc.ABC):
    """A stage of training, built from its frozen configuration.

    An ordinary one says its `networks`, `updates` and `data`, and how its result is written. One whose update is no
    gradient of a loss gives its `rounds` itself.
    """

    #: Optimiser steps of a round: so far a round counts.
    steps_per_round: int = 1
    updates: tuple[Update, ...] = ()
    #: Steps from one validation to the next, 0: never; and whether there is one before the first step.
    validate_every: int = 0
    validate_first: bool = False

    @property
    @abc.abstractmethod
    def networks(self) -> Mapping[str, Network]:
        """By role."""

    @property
    @abc.abstractmethod
    def devices(self) -> Devices:
        """What the run is on."""

    def data(self) -> Sequence[Data]:
        """One for each kind of batch."""
        raise NotImplementedError(f"{type(self).__name__} has neither data nor rounds")

    def which(self, index: int) -> int:
        """Which data round ``index`` draws from."""
        return 0

    def title(self, data: int) -> str:
        """A round on such data in words, for a plan."""
        return ""

    def flops(self, data: int) -> float:
        """Floating-point operations of a round on such data; 0: not known."""
        return 0.0

    def clips(self, data: int) -> int:
        """Clips that a round on such data learns from, each as often as it serves; 0: not known."""
        return 0

    def tokens(self, data: int) -> int:
        """The transformer's tokens of these clips; 0: not known."""
        return 0

    def epoch(self, step: int) -> float | None:
        """How often all clips have served by a step; None: they have no number."""
        return None

    def rounds(self) -> dict[tuple[int, ...], Round]:
        """Every kind of round of the run, by what `round_of` says of an index."""
        networks, kinds = self.networks, {}
        cycle = math.lcm(*(update.every for update in self.updates))
        dues = [self._due(index) for index in range(cycle)]
        for place, data in enumerate(self.data()):
            for due in dict.fromkeys(dues):
                kinds[(place, *due)] = Round(
                    function=self._learning(networks, data, place, [self.updates[number] for number in due]),
                    inputs=data,
                    flops=self.flops(place),
                    clips=self.clips(place),
                    tokens=self.tokens(place),
                )
        return kinds

    def round_of(self, index: int) -> tuple[int, ...]:
        """The kind of round ``index``: its place in `State.carried`, then what tells it from others there."""
        return (self.which(index), *self._due(index))

    def _due(self, index: int) -> tuple[int, ...]:
        """The numbers of the updates that round ``index`` makes."""
        steps = self.steps_per_round
        return tuple(number for number, u in enumerate(self.updates) if u.due(index, steps_per_round=steps))

    def measures(self) -> Sequence[Measure]:
        """What a validation measures."""
        return ()

    def report(
        self, results: Sequence[PyTree], averages: Callable[[], Mapping[str, Any]], *, step: int, folder: RunFolder
    ) -> dict[str, float]:
        """Values to log of a validation.

        Args:
            results: of `measures`.
            averages: fetches the learners with averaged variables, by role; every process has to call it.
            folder: for whatever else is to be kept; the first process alone writes.
        """
        return {}

    @abc.abstractmethod
    def export(self, averages: Mapping[str, Any], folder: Path) -> None:
        """Write the result, whole or not at all, from the learners with averaged variables, by role.

        Raises:
            CheckpointError: it cannot be written.
        """

    def _learning(
        self, networks: Mapping[str, Network], data: Data, place: int, due: Sequence[Update]
    ) -> RoundFunction:
        """The updates that are due: those of every step on each of a round's batches in order, others on its last."""

        def function(
            state: State, models: Models, frozen: PyTree, host: PyTree, rates: Mapping[str, Array]
        ) -> tuple[State, Metrics]:
            carried, batch = data.draw(models, state.carried[place], host, frozen)

            def step(
                learners: dict[str, TrainState], number: Array, *, updates: Sequence[Update]
            ) -> tuple[dict[str, TrainState], Metrics]:
                metrics: Metrics = {}
                drawn = batch(number)
                for update in updates:
                    role, now = update.role, models.after(learners)
                    learner, values = update.apply(now, learners[role], drawn, rates[role], networks[role])
                    learners = {**learners, role: learner}
                    prefix = f"{role}/" if len(self.updates) > 1 else ""
                    metrics |= {prefix + name: value for name, value in values.items()}
                return learners, metrics

            numbers = jnp.arange(self.steps_per_round, dtype=jnp.int32)
            often = functools.partial(step, updates=[update for update in due if update.every == 1])
            learners, metrics = jax.lax.scan(often, state.learners, numbers)
            if seldom := [update for update in due if update.every > 1]:
                learners, last = step(learners, numbers[-1], updates=seldom)
                metrics |= jax.tree.map(lambda x: x[None], last)
            everything = (*state.carried[:place], carried, *state.carried[place + 1 :])
            return State(state.step, learners, everything), metrics

        return function
