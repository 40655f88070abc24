"""The seam between a transformer block and its self-attention: a mixer, its configuration, and the registry of both.

A mixer takes the teacher's q, k and v, after norm and positions, and gives the block's attention output. It is two
classes in one file: a frozen configuration, which answers all that needs no arrays and makes the module; and the
module, which holds the mixer's own parameters (`MixerParam`) and computes. It knows heads and tokens, and no model.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import jax
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rehyat_jax.errors import ConfigError
from rehyat_jax.runtime.mesh import Dimension, mesh_in_force, spec_of

#: More than any video has; small enough that products of them stay meaningful.
MOST_FRAMES = 1 << 16


class Weights(NamedTuple):
    """The weights that some queries give every key, before the common normaliser; float32.

    Softmax: e^(q·k/√D − c), with the stabiliser c. Linear: φ_q·φ_k, with the state's decay.
    """

    softmax: Float[Array, "B H Q N"]
    linear: Float[Array, "B H Q N"]
    #: Which of the two counts for a key, if any.
    softmax_set: Bool[Array, "Q N"]
    linear_set: Bool[Array, "Q N"]


class Mixer(nnx.Module):
    """A block's self-attention, between the teacher's projections. Time-major tokens, a whole number of frames."""

    def __call__(
        self,
        q: Float[Array, "B N H D"],
        k: Float[Array, "B N H D"],
        v: Float[Array, "B N H D"],
        *,
        frame: int,
        tokens: int | None = None,
    ) -> Float[Array, "B N H D"]:
        """A whole video, sharded over the mesh in force.

        Args:
            frame: tokens of a frame.
            tokens: how many there are; those after them are padding, where the result is of no consequence.

        Raises:
            ConfigError: time is sharded, and the mixer has no form for that.
        """
        raise NotImplementedError

    def init_state(self, *, batch: int, frame: int, dtype: DTypeLike) -> Any:
        """The mixer state before a video's first chunk: a pytree whose shapes do not depend on the video's length."""
        raise NotImplementedError

    def step(
        self,
        q: Float[Array, "B N H D"],
        k: Float[Array, "B N H D"],
        v: Float[Array, "B N H D"],
        state: Any,
        *,
        frame: int,
        first: int | Int[Array, ""],
    ) -> tuple[Float[Array, "B N H D"], Any]:
        """The next chunks of a video, from its frame ``first`` on, and the state after them."""
        raise NotImplementedError

    def state_dimensions(self) -> Any:
        """The dimensions of a state's axes, by which a mesh shards them: a tree like the state, a tuple for each array.
        By default None: every device has the whole state."""
        return None

    def state_specs(self, state: Any, *, leading: int = 0) -> Any:
        """How a state is sharded over the mesh in force, a `PartitionSpec` for each array.

        Args:
            leading: axes that stand before the state's own.
        """
        if (dimensions := self.state_dimensions()) is None:
            return jax.tree.map(lambda _: PartitionSpec(), state)
        return jax.tree.map(lambda x, axes: spec_of(x.shape, *[None] * leading, *axes), state, dimensions)

    def sharded(self, state: Any) -> Any:
        """A state under the sharding constraints of the mesh in force."""
        if mesh_in_force() is None or self.state_dimensions() is None:
            return state
        return jax.tree.map(jax.lax.with_sharding_constraint, state, self.state_specs(state))

    def weights(
        self, q: Float[Array, "B N H D"], k: Float[Array, "B N H D"], *, queries: Int[Array, " Q"], frame: int
    ) -> Weights | None:
        """For losses and health figures: the dense equation for a sample of the queries (numbers of tokens).

        None: the mixer's output is no weighted mean of the values.
        """
        return None


class MixerConfig:
    """Base of the configurations: frozen dataclasses, whole numbers declared by `whole`, choices by ``Literal``."""

    #: Tells it from the other mixers, on disk and in messages.
    name: ClassVar[str]
    #: Whether a block with it is converted: the teacher's own softmax is not.
    converts: ClassVar[bool] = True
    #: What its parameters can be distilled by; nothing where it has none.
    losses: ClassVar[tuple[Literal["l1", "score"], ...]] = ("l1",)
    #: Frames of a chunk: a stream goes by whole chunks, and sharded time is whole chunks on each device.
    chunk_frames: int

    def __post_init__(self) -> None:
        check_fields(self)

    def make(self, *, heads: int, head_dim: int, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> Mixer:
        """The module of one block, newly initialised."""
        raise NotImplementedError

    def why_not_stream(self) -> str | None:
        """None, or what blocks with it do (as in "blocks 0-2 …") that keeps a model from being run chunk by chunk."""
        return None

    def flops(self, *, frames: int, frame: int, heads: int, head_dim: int) -> int:
        """Floating-point operations of one forward pass on one video, two for each element of a product."""
        raise NotImplementedError

    def divided(self, head_dim: int) -> Mapping[Dimension, int]:
        """The sizes of its parameters' dimensions, beside heads, that a mesh must divide."""
        return {}

    def implemented(self, by: Literal["reference", "scan", "pallas"]) -> Any:
        """The same mixer computed by a named implementation, where it had been left to ``"auto"``."""
        if getattr(self, "implementation", None) == "auto":
            return dataclasses.replace(self, implementation=by)  # type: ignore[type-var]
        return self

    @classmethod
    def fields(cls, *, written: bool = False) -> tuple[str, ...]:
        """The names of its fields, or of those alone that files have."""
        found: Any = cls
        return tuple(f.name for f in dataclasses.fields(found) if not (written and "unwritten" in f.metadata))

    def to_dict(self) -> dict[str, Any]:
        """Its name, and all that says what it computes."""
        return {"mixer": self.name} | {name: getattr(self, name) for name in self.fields(written=True)}


def whole(default: int, least: int, most: int) -> Any:
    """A dataclass field that is a whole number from ``least`` to ``most``."""
    return dataclasses.field(default=default, metadata={"range": (least, most)})


def unwritten(default: Any) -> Any:
    """A dataclass field that says how something is computed, not what: files do not have it."""
    return dataclasses.field(default=default, metadata={"unwritten": True})


Registered = TypeVar("Registered", bound=type[MixerConfig])

_MIXERS: dict[str, type[MixerConfig]] = {}


def register(config: Registered) -> Registered:
    """Make a mixer's configuration known by its ``name``; a decorator.

    A package may also declare it as an entry point of the group ``rehyat_jax.mixers``, under that name: the commands
    then find it without being told to import the package.

    Raises:
        ConfigError: another mixer has the name.
    """
    known = _MIXERS.setdefault(config.name, config)
    if (known.__module__, known.__qualname__) != (config.__module__, config.__qualname__):
        raise ConfigError(f"there is already a mixer {config.name!r}: {known.__module__}.{known.__qualname__}")
    _MIXERS[config.name] = config
    return config


def mixer_named(name: Any) -> type[MixerConfig]:
    """
    Raises:
        ConfigError: none is registered by that name.
    """
    if isinstance(name, str) and name not in _MIXERS:
        for entry in importlib.metadata.entry_points(group="rehyat_jax.mixers", name=name):
            entry.load()
    if not isinstance(name, str) or name not in _MIXERS:
        raise ConfigError(
            f"there is no mixer {str(name)[:80]!r}, only {', '.join(sorted(_MIXERS))}; one of another package is "
            "registered when that is imported"
        )
    return _MIXERS[name]


def read_mixer(source: Any) -> MixerConfig:
    """The inverse of `MixerConfig.to_dict`.

    Raises:
        ConfigError: an unknown mixer or name, or an impossible value.
    """
    if not isinstance(source, Mapping) or "mixer" not in source:
        raise ConfigError(f"a mixer is an object with its name under 'mixer', not {str(source)[:80]!r}")
    kind, values = mixer_named(source["mixer"]), {key: value for key, value in source.items() if key != "mixer"}
    known = set(kind.fields(written=True))
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"mixer {kind.name!r} has no {str(unknown[0])[:80]!r}; it has {', '.join(sorted(known))}")
    return kind(**values)


def check_fields(config: Any) -> None:
    """Whole numbers within their range, choices and booleans of a configuration.

    Raises:
        ConfigError: a value is not what its field is declared to be.
    """
    title = type(config).__name__
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if "range" in field.metadata:
            least, most = field.metadata["range"]
            if not is_whole(value, least, most):
                raise ConfigError(f"{title}.{field.name} must be a whole number from {least} to {most}, not {value!r}")
        elif get_origin(hint) is Literal:
            if not isinstance(value, str) or value not in get_args(hint):
                raise ConfigError(f"{title}.{field.name} must be one of {get_args(hint)}, not {value!r}")
        elif hint is bool and not isinstance(value, bool):
            raise ConfigError(f"{title}.{field.name} must be true or false, not {value!r}")


def is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
