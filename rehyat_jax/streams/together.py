"""Several streams of one model, each at its own place in time, advanced as rows of one batch.

A stream joins and leaves at any chunk: its state is its own before and after. Batches have sizes of powers of two, so
that few programs are compiled. What a row makes is what the stream makes alone, to the arithmetic: products of other
shapes sum in another order (float32: some 1e-6 of the latents, at most one level of 255 of a pixel), and nothing of one
row reaches another.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from rehyat_jax.errors import NotFiniteError, RehyatError
from rehyat_jax.sampling.programs import Row
from rehyat_jax.streams.stream import Stream

_log = logging.getLogger(__name__)


def advance_together(streams: Sequence[Stream]) -> list[UInt8[np.ndarray, "F H W 3"] | RehyatError]:
    """The next block of each stream, as ``next`` gives it, made in one batch; of a row that fails, why.

    Args:
        streams: two or more, of which each `Stream.shares` with each.

    Raises:
        RehyatError: one of them is at its end, or was interrupted; then none has advanced.
    """
    session = streams[0]._session
    firsts = [stream._check_goes_on() for stream in streams]
    before = [stream.state for stream in streams]
    rows = tuple(Row(s.keys, stream._precomputed(s), s.first_frame) for stream, s in zip(streams, before, strict=True))
    latents, states = session.denoise_chunks(tuple(state.states for state in before), rows)
    finite = np.asarray(jnp.isfinite(latents).all(axis=tuple(range(1, latents.ndim))))
    shown, decoders = session.codec.decode_rows(latents, tuple(state.decoder for state in before))
    finite_pixels = np.logical_and.reduce([np.asarray(each.finite) for each in shown])
    frames = np.concatenate([np.asarray(each.frames) for each in shown], axis=2)
    blocks: list[np.ndarray | RehyatError] = []
    for i, (stream, first) in enumerate(zip(streams, firsts, strict=True)):
        if not (finite[i] and finite_pixels[i]):
            blocks.append(NotFiniteError(f"{stream._chunk_name()} made numbers that are not finite"))
        else:
            session.show(latents[i], first_frame=first, to=stream.on_latents)
            stream._newest = frames[i, 0]
            blocks.append(stream._newest)
        after = jnp.asarray(first + session.chunk_shape[0], jnp.int32)
        stream._ahead = None
        stream.state = before[i]._replace(states=states[i], decoder=decoders[i], first_frame=after)
    return blocks


class Together:
    """Puts streams into batches of sizes that are compiled, and has the next size compiled beside them.

    No stream waits for the compiler: until a size is ready smaller ones are used.

    Args:
        most: rows of the largest batch; rounded down to a power of two. 1: every stream by itself.
    """

    def __init__(self, most: int) -> None:
        self._sizes = [1 << i for i in range(1, most.bit_length()) if 1 << i <= most]
        #: By size: a stream of each kind whose program is ready, or being made.
        self._ready: dict[int, list[Stream]] = {size: [] for size in self._sizes}
        self._compiling: threading.Thread | None = None

    def batches(self, streams: Sequence[Stream]) -> list[list[int]]:
        """The numbers of the streams that are to be advanced together, each of them once; alone is a list of one."""
        kinds: list[list[int]] = []
        for number, stream in enumerate(streams):
            kind = next((kind for kind in kinds if stream.shares(streams[kind[0]])), None)
            if kind is None:
                kinds.append([number])
            else:
                kind.append(number)
        batches = []
        for kind in kinds:
            self._prepare([streams[number] for number in kind])
            while kind:
                like = streams[kind[0]]
                size = max((s for s in self._sizes if s <= len(kind) and self._is_ready(s, like)), default=1)
                batches.append(kind[:size])
                del kind[:size]
        return batches

    def advance(self, streams: Sequence[Stream]) -> list[Any]:
        """`advance_together`; of one stream, its next block."""
        return [next(streams[0])] if len(streams) == 1 else advance_together(streams)

    def know(self, size: int, stream: Stream) -> None:
        """Batches of this size of streams like this one are compiled already."""
        self._ready[size].append(stream)

    def close(self) -> None:
        """Wait for what is being compiled."""
        if self._compiling is not None:
            self._compiling.join()

    def _is_ready(self, size: int, like: Stream) -> bool:
        return any(kind.shares(like) for kind in self._ready[size])

    def _prepare(self, streams: list[Stream]) -> None:
        """Compile, in a thread of its own, the largest size that these would fill; then those below it, into which
        they fall apart when one leaves."""
        wanted = [size for size in self._sizes if size <= len(streams) and not self._is_ready(size, streams[0])]
        if not wanted or (self._compiling is not None and self._compiling.is_alive()):
            return
        size = wanted[-1]
        copies = [stream.fork() for stream in streams[:size]]

        def compiled() -> None:
            try:
                advance_together(copies)
                self.know(size, copies[0])
            except Exception:
                _log.exception("streams cannot be advanced %d at a time", size)
                self._sizes = [other for other in self._sizes if other != size]

        self._compiling = threading.Thread(target=compiled, name="rehyat-compile", daemon=True)
        self._compiling.start()
