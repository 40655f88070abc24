"""Devices by their names; imports no Pallas."""

from __future__ import annotations


def is_hopper(device_kind: str) -> bool:
    """By ``jax.Device.device_kind``."""
    return any(name in device_kind for name in ("H100", "H200", "GH200", "H800", "H20"))
