"""LoRAs of a model that is loaded: merged into its weights, given other strengths, taken off."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

from rehyat_jax.adapters.lora import Lora, loras_of
from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime import arguments


@runtime_checkable
class OnDisk(Protocol):
    """Weights on disk, and the LoRAs that were merged into them as they were read."""

    @property
    def loras(self) -> tuple[Lora, ...]: ...

    def changed(self, module: Any, loras: tuple[Lora, ...], /) -> tuple[Any, Any]:
        """The module with other LoRAs, and that as its weights on disk."""


class HasLoras:
    """What a pipeline does with LoRAs; its transformer is had from disk again with each set of them."""

    transformer: Any
    #: None of a pipeline of modules, without their files.
    _weights: OnDisk | None

    @property
    def loras(self) -> dict[str, float]:
        """The strengths of the LoRAs in the transformer's weights, by name."""
        return {} if self._weights is None else {lora.name: lora.strength for lora in self._weights.loras}

    def load_lora(
        self,
        path: str | os.PathLike[str],
        *,
        strength: float | int = 1.0,
        name: str | None = None,
        into: Literal["high", "low"] | None = None,
    ) -> str:
        """Merge a LoRA of any dialect into the transformer's weights, beside those that are there.

        Calls and streams begun from now on have it; a stream that is open goes on as it was begun.

        Args:
            path: a file, or PEFT's folder.
            strength: 1 as it was trained, 0 not at all; negative: the contrary.
            name: for `set_loras` and `unload_lora`; the file's without its ending when not given.
            into: of a model of two experts (Wan2.2's A14B), the one by noise level that it is for; both when not given.

        Returns:
            The name.

        Raises:
            CheckpointError: it is damaged, no LoRA, for another model, or another kind of adapter.
            RehyatError: the name is taken; the pipeline was made of modules, without their files.
        """
        plain = arguments.user_path("path", path)
        chosen = "" if name is None else arguments.text("name", name)
        if into is not None:
            arguments.choice("into", into, ("high", "low"))
        lora = Lora(plain, arguments.number("strength", strength), chosen, into)
        self._merge([*self._on_disk().loras, lora])
        return lora.name

    def set_loras(self, strengths: Mapping[str, float | int]) -> None:
        """Give loaded LoRAs these strengths, and those that are not named 0 (diffusers' ``set_adapters``).

        Raises:
            RehyatError: there is none of such a name, or a strength is no finite number.
        """
        loaded = self._on_disk().loras
        for name in strengths:
            self._check_loaded(name)
        self._merge(
            dataclasses.replace(lora, strength=arguments.number(lora.name, strengths.get(lora.name, 0.0)))
            for lora in loaded
        )

    def unload_lora(self, name: str | None = None) -> None:
        """Take one LoRA off, or all: of the last, the weights are the base's bit for bit.

        Raises:
            RehyatError: there is none of such a name.
        """
        if name is not None:
            self._check_loaded(name)
        self._merge(lora for lora in self._on_disk().loras if name not in (None, lora.name))

    def _check_loaded(self, name: str) -> None:
        if name not in self.loras:
            raise arguments.wrong("name", name, f"that of a loaded LoRA ({', '.join(self.loras) or 'there is none'})")

    def _on_disk(self) -> OnDisk:
        if self._weights is None:
            raise RehyatError(
                "this pipeline was made of modules, without their files: give load_transformer the LoRAs, or make it "
                "by from_pretrained"
            )
        return self._weights

    def _merge(self, loras: Iterable[Lora]) -> None:
        self.transformer, self._weights = self._on_disk().changed(self.transformer, loras_of(loras))
