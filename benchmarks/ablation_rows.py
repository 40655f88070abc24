"""The rows of `benchmarks.ablations`: the conversions that are compared, and what each goes through."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from rehyat_jax.mixers.config import HybridConfig
from train.stages.history import History

Stage = Literal["distill", "finetune"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A conversion, and what it goes through before it is measured."""

    #: Finetuning's; distillation knows no length_norm. None: softmax, unconverted.
    hybrid: HybridConfig | None
    stages: tuple[Stage, ...] = ("distill", "finetune")
    #: For distillation.
    loss: Literal["l1", "score"] = "l1"
    #: Those have all seeds, the others one.
    headline: bool = False
    #: Measured in a long stream as well.
    streamed: bool = False
    #: For finetuning; with it chunks are remembered when they are finished, so that clips are made chunk by chunk.
    history: History = History()


_NONE, _HISTORY = History(), History(share=0.75)


def _row(
    *stages: Stage,
    loss: Literal["l1", "score"] = "l1",
    headline: bool = False,
    streamed: bool = False,
    history: History = _NONE,
    **fields: Any,
) -> Row:
    """By what differs from chunks of three frames, an overlap of one, all blocks, length_norm where it can be."""
    mixer = HybridConfig(**fields).mixer
    can = "length_norm" in mixer.fields() and mixer.why_not_stream() is None
    return Row(
        hybrid=HybridConfig(**{"length_norm": can} | fields),
        stages=stages or ("distill", "finetune"),
        loss=loss,
        headline=headline,
        streamed=streamed,
        history=history,
    )


ROWS: dict[str, Row] = {
    "base": _row(headline=True, streamed=True),
    "teacher": Row(hybrid=None, stages=(), headline=True),
    "softmax": Row(hybrid=None, stages=("finetune",), headline=True),
    "window": _row("finetune", kind="window", headline=True, streamed=True),
    "linear": _row(kind="linear", headline=True, streamed=True),
    "undistilled": _row("finetune", headline=True),
    "history": _row(history=_HISTORY, headline=True, streamed=True),
    "history, window": _row("finetune", kind="window", history=_HISTORY, headline=True),
    "chunk 1": _row(chunk_frames=1, headline=True),
    "chunk 2": _row(chunk_frames=2, headline=True),
    "overlap 0": _row(overlap_frames=0, headline=True),
    # The blocks with the smallest errors in base's line of benchmarks/results/ablations-two-cores.jsonl: so that every
    # seed has the same blocks, and the same programs.
    "blocks 5": _row(blocks=(0, 2, 6, 8, 9), headline=True),
    "blocks 8": _row(blocks=(0, 1, 2, 4, 6, 7, 8, 9), headline=True),
    "chunk 5": _row(chunk_frames=5),
    "overlap 2": _row(overlap_frames=2),
    # Attention Surgery's choice: block i keeps softmax where i mod 2 = 0; the others have none.
    "uniform": _row(kind="linear", blocks=(1, 3, 5, 7, 9)),
    "length_norm off": _row(length_norm=False),
    "causal off": _row(causal=False),
    "degree 1": _row(degree=1),
    "degree 3": _row(degree=3),
    "depth 1": _row(layers=1),
    "depth 3": _row(layers=3),
    "stabilizer lse": _row(stabilizer="lse"),
    "stabilizer none": _row(stabilizer="none"),
    "loss score": _row(loss="score"),
}
