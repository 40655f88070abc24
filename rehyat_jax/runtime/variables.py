"""Variable types by which parameters are told apart, as ``nnx.state``, ``nnx.DiffState`` and optimisers take them.

A path says where a parameter lies and nothing of what it is: a group (its learning rate, what is frozen, what decays)
is a filter by these types.
"""

from __future__ import annotations

from flax import nnx


class MixerParam(nnx.Param):
    """What a transformer block's mixer has beside the teacher's parameters: a student's own part."""


class HeadKernel(MixerParam):
    """A matrix for every head, ``[*blocks, heads, inputs, outputs]``."""


class GateParam(MixerParam):
    """A number for every head that starts at 0, where it changes nothing, and has far to go from there."""
