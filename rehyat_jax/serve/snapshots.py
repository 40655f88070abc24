"""States of a stream to go back to, as many as fit into a budget: densely of late, sparsely of long ago."""

from __future__ import annotations

from typing import Any


class Snapshots:
    """Streams by the number of chunks before them.

    Args:
        most_bytes: what their arrays may take, each counted once however many snapshots share it; the oldest and the
            newest stay in any case.
    """

    def __init__(self, most_bytes: int, kept: dict[int, Any]) -> None:
        self._most, self._kept = most_bytes, dict(kept)
        #: Of each, its arrays' sizes by identity, which holds as long as the snapshot has them.
        self._arrays = {number: _arrays(snapshot.state) for number, snapshot in kept.items()}
        #: Of all arrays; any thread may read it.
        self.bytes = self._sum()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, number: int, snapshot: Any) -> None:
        """Add the newest, and drop others as far as need be."""
        self._kept[number], self._arrays[number] = snapshot, _arrays(snapshot.state)
        while (size := self._sum()) > self._most and len(self._kept) > 2:
            gone = self._least()
            del self._kept[gone], self._arrays[gone]
        self.bytes = size

    def nearest(self, number: int) -> int | None:
        """The newest that has no more chunks before it; None: there is none so early."""
        return max((kept for kept in self._kept if kept <= number), default=None)

    def __getitem__(self, number: int) -> Any:
        return self._kept[number]

    @property
    def first(self) -> int:
        return min(self._kept)

    def cut(self, number: int) -> None:
        """Drop those of more chunks."""
        self._kept = self.up_to(number)
        self._arrays = {kept: self._arrays[kept] for kept in self._kept}
        self.bytes = self._sum()

    def up_to(self, number: int) -> dict[int, Any]:
        return {kept: snapshot for kept, snapshot in self._kept.items() if kept <= number}

    def _sum(self) -> int:
        return sum({name: size for arrays in self._arrays.values() for name, size in arrays.items()}.values())

    def _least(self) -> int:
        """The one without which least is lost: the gap that it leaves is the shortest for its age, so that those kept
        become twice as sparse with each doubling of the age, and their count stays."""
        numbers = sorted(self._kept)
        newest = numbers[-1]
        gaps = {b: (c - a) / (newest - b) for a, b, c in zip(numbers, numbers[1:], numbers[2:], strict=False)}
        return min(gaps, key=lambda number: gaps[number])


def _arrays(tree: Any) -> dict[int, int]:
    import jax

    return {id(leaf): getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(tree)}
