"""Draws ``docs/images/method.svg``: which frames a query sees how, and how the state takes them over.

python docs/notebook/draw_method.py
"""

from __future__ import annotations

from pathlib import Path

FRAMES, CHUNK, OVERLAP = 12, 3, 1
CELL = 26
SOFTMAX, LINEAR, LATER, INK, PALE = "#4878b0", "#e8a33d", "#f1f1ef", "#222222", "#777777"


def rect(
    x: float, y: float, width: float, height: float, fill: str, *, line: str = "#ffffff", stroke: float = 1
) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="{line}" '
        f'stroke-width="{stroke}"/>'
    )


def text(x: float, y: float, words: str, *, anchor: str = "middle", size: int = 13, fill: str = INK) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{fill}">{words}</text>'


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    return (
        f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" stroke="{INK}" stroke-width="1.5" marker-end="url(#head)"/>'
    )


def lowered(number: int) -> str:
    return f'<tspan dy="4" font-size="9">{number}</tspan><tspan dy="-4">&#8203;</tspan>'


def colour(query_chunk: int, key: int) -> str:
    """Of a key's frame for the queries of a chunk; causal."""
    begin, end = max(query_chunk * CHUNK - OVERLAP, 0), (query_chunk + 1) * CHUNK
    return LINEAR if key < begin else SOFTMAX if key < end else LATER


def matrix(left: float, top: float) -> list[str]:
    """The parallel form: a square for every pair of frames."""
    parts = [text(left + FRAMES * CELL / 2, top - 30, "keys’ frame")]
    for i in range(FRAMES):
        parts.append(text(left + (i + 0.5) * CELL, top - 8, str(i), size=11, fill=PALE))
        parts.append(text(left - 8, top + (i + 0.68) * CELL, str(i), anchor="end", size=11, fill=PALE))
        parts += [rect(left + j * CELL, top + i * CELL, CELL, CELL, colour(i // CHUNK, j)) for j in range(FRAMES)]
    middle = top + FRAMES * CELL / 2
    parts.append(f'<g transform="rotate(-90 {left - 38} {middle})">{text(left - 38, middle, "queries’ frame")}</g>')
    for t in range(FRAMES // CHUNK):
        y = top + t * CHUNK * CELL
        parts.append(rect(left + t * CHUNK * CELL, y, CHUNK * CELL, CHUNK * CELL, "none", line=INK, stroke=2))
        parts.append(text(left + FRAMES * CELL + 8, y + CHUNK * CELL / 2 + 4, f"chunk {t}", anchor="start"))
    return parts


def step(left: float, top: float, t: int) -> list[str]:
    """The recurrence at chunk t: what it reads, and what enters the state after it."""
    begin, following = max(t * CHUNK - OVERLAP, 0), max((t + 1) * CHUNK - OVERLAP, 0)
    parts = [text(left, top - 12, f"chunk {t}", anchor="start", size=14)]
    for j in range(FRAMES):
        x = left + j * CELL
        parts.append(rect(x, top, CELL, CELL, colour(t, j)))
        parts.append(text(x + CELL / 2, top + 17, str(j), size=11, fill=PALE if colour(t, j) == LATER else "#ffffff"))
    mine = left + t * CHUNK * CELL
    parts.append(rect(mine, top, CHUNK * CELL, CELL, "none", line=INK, stroke=2))
    parts.append(text(mine + CHUNK * CELL / 2, top - 8, "queries", size=12))
    window = left + begin * CELL
    parts.append(text(window - 6, top + CELL + 18, f"in s{lowered(t)}", anchor="end", size=12))
    # The frames that are in the window now and not in the next chunk's.
    state = top + 2.9 * CELL
    parts.append(rect(window + 1, top + CELL + 3, (following - begin) * CELL - 2, 5, LINEAR))
    middle = window + (following - begin) * CELL / 2
    parts.append(arrow(middle, top + CELL + 10, middle, state - 4))
    parts.append(rect(window - 2.2 * CELL, state, (following - begin + 4.4) * CELL, CELL, LINEAR))
    words = f"s{lowered(t + 1)} = s{lowered(t)} + frames {begin} to {following - 1}"
    parts.append(text(middle, state + 17, words))
    return parts


def legend(left: float, top: float) -> list[str]:
    parts = []
    for fill, words in [
        (SOFTMAX, "softmax: the chunk and the overlap before it"),
        (LINEAR, "linear: φ_q·φ_k, through the state s, z"),
        (LATER, "not seen (not causal: linear too)"),
    ]:
        parts += [rect(left, top, 16, 16, fill, line=PALE), text(left + 24, top + 13, words, anchor="start")]
        left += 330 if fill == SOFTMAX else 300
    return parts


def drawing() -> str:
    parts = [
        text(70, 28, "Parallel form", anchor="start", size=16),
        text(560, 28, "Recurrence", anchor="start", size=16),
        *matrix(70, 92),
        *step(560, 92, 1),
        *step(560, 244, 2),
        text(
            560, 388, "The overlap is not in the state while a chunk still sees it by softmax.", anchor="start", size=12
        ),
        *legend(70, 436),
    ]
    body = "\n".join(parts)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1010 470" font-family="Arial, sans-serif">
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>
<rect width="1010" height="470" fill="#ffffff"/>
{body}
</svg>
"""


if __name__ == "__main__":
    Path(__file__).parents[1].joinpath("images", "method.svg").write_text(drawing())
