"""A run walked as data: which rooms its calls lead through, and which of them a call comes back into."""

import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from flax import nnx

import rehyat_jax

_ROOT = Path(rehyat_jax.__file__).parents[1]
#: At hand everywhere: what they call is called by whoever uses them.
_TOOLS = {"rehyat_jax/errors.py", "rehyat_jax/runtime"}


def room_of(file: str) -> str | None:
    """``rehyat_jax/attention`` of ``…/rehyat_jax/attention/scan.py``; None of what is not ours, and of tools."""
    path = Path(file)
    if not path.is_relative_to(_ROOT) or path.relative_to(_ROOT).parts[0] not in ("rehyat_jax", "train"):
        return None
    room = "/".join(path.relative_to(_ROOT).parts[:2])
    return None if room in _TOOLS else room


class Trips:
    """
    Attributes:
        rooms: those that were passed, in the order in which they were first entered.
        returns: calls back into a room, by (room, the room that calls, function): a room further up the same chain of
            calls, which the chain had left.
        carrying: those of them that were handed an array, or a module of them.
    """

    def __init__(self) -> None:
        self.rooms: list[str] = []
        self.returns: Counter[tuple[str, str, str]] = Counter()
        self.carrying: Counter[tuple[str, str, str]] = Counter()
        self._room_of: dict[str, str | None] = {}
        #: Of every Python frame below the beginning: whether it entered a room.
        self._entered: list[bool] = []
        #: The rooms that this chain of calls has entered.
        self._chain: list[str] = []

    def __call__(self, frame, event, argument) -> None:
        if event == "call":
            code = frame.f_code
            if code.co_filename not in self._room_of:
                self._room_of[code.co_filename] = room_of(code.co_filename)
            room = self._room_of[code.co_filename]
            enters = room is not None and code.co_name != "<module>" and self._chain[-1:] != [room]
            self._entered.append(enters)
            if not enters:
                return
            if room in self._chain:
                what = room, self._chain[-1], f"{Path(code.co_filename).stem}.{code.co_qualname}"
                self.returns[what] += 1
                self.carrying[what] += _handed_arrays(frame)
            elif room not in self.rooms:
                self.rooms.append(room)
            self._chain.append(room)
        elif event == "return" and self._entered and self._entered.pop():
            self._chain.pop()


def _handed_arrays(frame) -> bool:
    names, *more, values = inspect.getargvalues(frame)
    # Not random numbers to come: a module made for its shapes alone is given such.
    given = [values[name] for name in (*names, *filter(None, more))]
    return any(hasattr(leaf, "dtype") for x in given if not isinstance(x, nnx.Rngs) for leaf in jax.tree.leaves(x))


@contextmanager
def walked() -> Iterator[Trips]:
    """Follows every Python call of this thread while it is open."""
    trips = Trips()
    sys.setprofile(trips)
    try:
        yield trips
    finally:
        sys.setprofile(None)
        trips.carrying = +trips.carrying
