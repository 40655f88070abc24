"""What a stream carries from chunk to chunk, and how it lies on disk: one safetensors file, whole or not there."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from rehyat_jax.errors import CheckpointError, ConfigError
from rehyat_jax.models.checks import LATER
from rehyat_jax.models.wan.transformer import WanTransformer
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.devices import whole_array
from rehyat_jax.runtime.files import whole_file
from rehyat_jax.sampling.condition import Condition
from rehyat_jax.sampling.experts import Experts
from rehyat_jax.sampling.noise import RANDOM
from rehyat_jax.sampling.rollout import States
from rehyat_jax.sampling.session import Session
from rehyat_jax.sampling.settings import Settings
from rehyat_jax.weights.files import DTYPES
from rehyat_jax.weights.plan import parameters
from rehyat_jax.weights.writing import INTEGERS, Outgoing, write_file

#: Positions in time are exact up to here: 48 days of video at 16 frames a second.
MOST_FRAMES = 1 << 24
_FILE = "stream.safetensors"
#: The one entry of the file's metadata, JSON.
_HEADER = "rehyat_stream"
_VERSION = 1
#: Side by side; more are no stream's.
_MOST_VIDEOS = 1 << 16


class StreamState(NamedTuple):
    """A stream after the chunks made so far; a pytree whose shapes do not depend on how many there were."""

    #: The transformer's, for each step (where chunks are committed once: one) and each of guidance's evaluations:
    #: leaves [steps, evaluations, layers, B, …]; of several transformers by noise level a tuple, each one's.
    states: States
    #: What the decoder needs of the frames before; zeros before the first.
    decoder: Any
    #: The latent frames made so far: the number of the next one.
    first_frame: Int[Array, ""]
    #: Of the noise of each video of the batch.
    keys: Key[Array, " B"]
    #: The prompts' embeddings and, with guidance, the negative prompts' after them.
    text: Float[Array, "evaluations B L D"]
    #: Of models that take images. What of it lasts beyond the first frames is saved.
    condition: Condition = Condition()


def init_state(
    session: Session,
    *,
    keys: Key[Array, " B"],
    text: Float[Array, "evaluations B L D"],
    condition: Condition | None = None,
) -> StreamState:
    """Before the first chunk.

    Raises:
        RehyatError: the transformer cannot stream.
    """
    batch = keys.shape[0]
    return StreamState(
        states=session.init_state(batch),
        decoder=session.init_decoder(batch),
        first_frame=jnp.zeros((), jnp.int32),
        keys=keys,
        text=text,
        condition=Condition() if condition is None else condition,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamRecord:
    """What lies beside a stream's arrays: how they are to be continued."""

    settings: Settings
    #: `fingerprint` of the transformer and the autoencoder that made them.
    model: str
    #: Of one video a text, of several side by side a list.
    prompt: str | Sequence[str]
    negative_prompt: str


def fingerprint(transformer: WanTransformer | Experts, vae: WanVAE, decoder: Any = None) -> str:
    """Tells a model from every other: its configurations and every bit of its parameters, the same on any device.
    Of several processes every one has to call it.

    Args:
        decoder: in the autoencoder's place, where there is one.
    """
    experts = transformer if isinstance(transformer, Experts) else Experts.of_one(transformer)
    outlines: list[WanTransformer] = [member.outline for member in experts.members]
    configs = [config for each in outlines for config in (each.config, each.hybrid and each.hybrid.to_dict())]
    others = [vae] if decoder is None else [vae, decoder]
    digest = hashlib.sha256(f"[{', '.join(map(_said, [*configs, *(each.config for each in others)]))}]".encode())
    for module in itertools.chain(experts.modules(), others):
        for name, variable in sorted(parameters(nnx.state(module)).items()):
            array = whole_array(variable.get_value())
            digest.update(f"{name} {array.shape} {array.dtype}".encode())
            digest.update(_bytes(array).data)
    return digest.hexdigest()


def _said(config: Any) -> str:
    """A configuration as it was written before it had its later fields, where they say nothing (`LATER`): streams that
    were saved then go on."""
    if not dataclasses.is_dataclass(config):
        return repr(config)
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    silent = {f.name for f in dataclasses.fields(config) if LATER in f.metadata and values[f.name] == f.default}
    said = ", ".join(f"{name}={value!r}" for name, value in values.items() if name not in silent)
    return f"{type(config).__name__}({said})"


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def save_stream(folder: str | os.PathLike[str], state: StreamState, record: StreamRecord) -> None:
    """Write a stream into a folder, which is made if need be: the new state whole, or the one before it as it was.

    Raises:
        RehyatError: the folder cannot be written, or the settings have no form on disk.
    """
    folder = Path(folder)
    content = {
        "version": _VERSION,
        "model": record.model,
        "prompt": record.prompt if isinstance(record.prompt, str) else list(record.prompt),
        "negative_prompt": record.negative_prompt,
        "settings": record.settings.to_dict(),
    }
    with whole_file(folder / _FILE) as partial:
        arrays = [_outgoing(name, leaf) for name, leaf in _leaves(_plain(state))]
        write_file(partial, arrays, metadata={_HEADER: json.dumps(content)})
    with suppress(OSError):  # the new name as well, where the system can be asked for that
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for left in folder.glob(f".{_FILE}.*.partial"):  # by a process that was killed
        with suppress(OSError):
            left.unlink()


def _outgoing(name: str, leaf: Any) -> Outgoing:
    return Outgoing(name=name, dtype=leaf.dtype, shape=leaf.shape, blocks=lambda: [_bytes(np.asarray(leaf))])


def read_record(folder: str | os.PathLike[str]) -> StreamRecord:
    """What a saved stream says of itself; its arrays are not read.

    Raises:
        CheckpointError: there is no stream, or it is damaged or foreign.
    """
    return _record(_header(Path(folder) / _FILE), Path(folder) / _FILE)


def _to_device(states: Any) -> States:
    return jax.tree.map(jnp.asarray, states)


def load_state(
    folder: str | os.PathLike[str], template: StreamState, *, place: Callable[[States], States] = _to_device
) -> StreamState:
    """A saved stream's arrays, each checked before it is believed.

    Args:
        template: arrays or shapes of the same stream, as ``jax.eval_shape`` of `init_state` gives them.
        place: the transformer's states to their devices.

    Raises:
        CheckpointError: the file is damaged, or not of a stream like the template.
    """
    path = Path(folder) / _FILE
    wanted = dict(_leaves(jax.eval_shape(_plain, template)))
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            if odd := sorted(wanted.keys() ^ set(file.keys())):
                raise CheckpointError(f"{path} {'lacks' if odd[0] in wanted else 'has no use for'} {odd[0][:200]!r}")
            arrays = {name: _checked(file, name, like, path) for name, like in wanted.items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}") from error
    tree = jax.tree.unflatten(jax.tree.structure(jax.eval_shape(_plain, template)), list(arrays.values()))
    state = cast(StreamState, tree)
    if not 0 <= int(state.first_frame) <= MOST_FRAMES:
        raise CheckpointError(f"{path} says that {int(state.first_frame)} latent frames came before")
    own = jax.tree.map(jnp.asarray, state._replace(states=None))
    return own._replace(states=place(state.states), keys=jax.random.wrap_key_data(own.keys, impl=RANDOM))


def _checked(file: Any, name: str, like: Any, path: Path) -> np.ndarray:
    """One array, once its shape and type are known to be right, and all its numbers."""
    entry = file.get_slice(name)
    shape, dtype = tuple(entry.get_shape()), (DTYPES | INTEGERS).get(entry.get_dtype())
    if shape != like.shape or dtype != like.dtype:
        raise CheckpointError(
            f"{path}: {name!r} is {entry.get_dtype()} {list(shape)} in the file, and this model's is {like.dtype.name} "
            f"{list(like.shape)}"
        )
    array = file.get_tensor(name)
    whole = np.issubdtype(array.dtype, np.integer)
    if (array < 0).any() if whole else not all(np.isfinite(part).all() for part in _parts(array)):
        raise CheckpointError(f"{path}: {name!r} holds {'a negative count' if whole else 'NaN or infinity'}")
    return array


def _parts(array: np.ndarray) -> Iterator[np.ndarray]:
    """A few megabytes at a time, so that a check takes no memory worth counting."""
    flat = array.reshape(-1)
    return (flat[start : start + (1 << 20)] for start in range(0, flat.size, 1 << 20))


def _plain(state: StreamState) -> StreamState:
    """Random keys as their numbers, and of the condition what is to be saved."""
    return state._replace(keys=jax.random.key_data(state.keys), condition=state.condition.lasting())


def _leaves(state: StreamState) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree.leaves_with_path(state):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _header(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise CheckpointError(f"there is no saved stream in {path.parent}: {path.name} is missing")
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        content = json.loads(metadata.get(_HEADER, ""))
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or no saved stream: {_first_line(error)}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no saved stream") from error
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        raise CheckpointError(f"{path} is no saved stream, or one of another version of this program")
    return content


def _record(content: Mapping[str, Any], path: Path) -> StreamRecord:
    model, negative_prompt, settings = (content.get(name) for name in ("model", "negative_prompt", "settings"))
    prompt = content.get("prompt")
    prompts = prompt if isinstance(prompt, list) and 0 < len(prompt) <= _MOST_VIDEOS else [prompt]
    texts = [model, negative_prompt, *prompts]
    if not all(isinstance(text, str) for text in texts) or not isinstance(settings, dict):
        raise CheckpointError(f"{path} is no saved stream: it lacks its settings")
    try:
        settings = Settings.from_dict(settings)
        return StreamRecord(settings=settings, model=model, prompt=prompt, negative_prompt=negative_prompt)  # type: ignore[arg-type]
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]
