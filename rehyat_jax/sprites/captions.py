"""Sentences for scenes, and back: ``parse(caption(description)) == description``.

    a lemon moving down slowly and a mushroom moving up and left quickly on a blue background
    an object passes behind a pillar on a red background

The object named last is in front. The occlusion sentence leaves the object's name out: only memory can carry identity.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from rehyat_jax.errors import RehyatError
from rehyat_jax.sprites.world import DIRECTIONS, GROUNDS, NAMES, SPEEDS, Occlusions, Scenes

_PLURALS = frozenset({"grapes", "cherries"})
_OCCLUSION = "an object passes behind a pillar"


class Movement(NamedTuple):
    """One object's part of a caption, in the caption's own words: ("lemon", "up and left", "quickly")."""

    name: str
    direction: str
    speed: str


class Description(NamedTuple):
    """What a caption says. No movement at all means the occlusion scene."""

    movements: tuple[Movement, ...]
    ground: str


def describe(scenes: Scenes | Occlusions) -> list[Description]:
    """What the captions of a batch say."""
    grounds = [list(GROUNDS)[g] for g in np.asarray(scenes.grounds)]
    if isinstance(scenes, Occlusions):
        return [Description((), ground) for ground in grounds]
    count, objects, directions, speeds = (
        np.asarray(a) for a in (scenes.counts, scenes.objects, scenes.directions, scenes.speeds)
    )
    return [
        Description(
            tuple(
                Movement(NAMES[objects[b, n]], DIRECTIONS[directions[b, n]], list(SPEEDS)[speeds[b, n]])
                for n in range(count[b])
            ),
            ground,
        )
        for b, ground in enumerate(grounds)
    ]


def caption(description: Description) -> str:
    """The sentence for one scene."""
    phrases = [f"{_article(m.name)} {m.name} moving {m.direction} {m.speed}" for m in description.movements]
    return f"{' and '.join(phrases) or _OCCLUSION} on {_article(description.ground)} {description.ground} background"


def captions(scenes: Scenes | Occlusions) -> list[str]:
    """The sentences of a batch."""
    return [caption(description) for description in describe(scenes)]


def parse(text: str) -> Description:
    """What a caption says.

    Raises:
        RehyatError: the text is not a caption of this world.
    """
    match = _CAPTION.fullmatch(text)
    if match is None:
        raise RehyatError(f"not a caption of the sprite world: {text[:200]!r}")
    description = Description(tuple(Movement(*found) for found in _PHRASE.findall(match["what"])), match["ground"])
    # What the patterns let through and the grammar does not: a wrong article.
    if caption(description) != text:
        raise RehyatError(f"not a caption of the sprite world (did you mean {caption(description)!r}?): {text[:200]!r}")
    return description


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can contain, sorted."""
    everything = [_OCCLUSION, "a an some moving and on background", *NAMES, *DIRECTIONS, *SPEEDS, *GROUNDS]
    return tuple(sorted({word for text in everything for word in text.split()}))


def _article(name: str) -> str:
    if name in _PLURALS:
        return "some"
    return "an" if name[0] in "aeiou" else "a"


def _either(words: object) -> str:
    # Longest first, so that "down" does not hide "down and left".
    return "|".join(sorted(words, key=len, reverse=True))  # type: ignore[call-overload]


_WORDS = rf"(?:an?|some) ({_either(NAMES)}) moving ({_either(DIRECTIONS)}) ({_either(SPEEDS)})"
_PHRASE = re.compile(_WORDS)
_ONE = re.sub(r"\((?!\?)", "(?:", _WORDS)
_CAPTION = re.compile(
    rf"(?P<what>{_ONE}(?: and {_ONE})?|{_OCCLUSION}) on an? (?P<ground>{_either(GROUNDS)}) background"
)
