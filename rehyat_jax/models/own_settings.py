"""How a model is sampled where a call does not say: its own settings filled in, sizes cut, all checked."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from rehyat_jax.errors import RehyatError, RehyatWarning
from rehyat_jax.models.folder import Defaults
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.runtime import arguments
from rehyat_jax.sampling import FlowSchedule, Solver
from rehyat_jax.sampling.rollout import ContextNoise, check_context_noise
from rehyat_jax.sampling.settings import Settings

#: Beyond this, attention over all tokens is out of reach of any machine: 720p at 81 frames has 75,600 tokens.
MOST_TOKENS = 1 << 20
LARGEST_SIDE = 1 << 14


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnSettings:
    """Of a model: what a call leaves out, and which sizes it makes."""

    transformer: WanConfig
    vae: VAEConfig
    defaults: Defaults
    schedule: FlowSchedule
    solver: Solver
    #: Whether there is a low-noise expert beside the other.
    two_experts: bool = False

    def schedule_at(self, *, height: int | None = None, width: int | None = None) -> FlowSchedule:
        """The noise levels of a video of this size (the model's own when not given), where none are asked for."""
        size = {"height": given_or(height, self.defaults.height), "width": given_or(width, self.defaults.width)}
        return self.defaults.advised_schedule(**size) or self.schedule

    def settings(
        self,
        *,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | int | None = None,
        guidance_scale_2: float | int | None = None,
        schedule: FlowSchedule | None = None,
        solver: Solver | None = None,
        remember: ContextNoise | None = None,
        first_chunk_steps: int | None = None,
    ) -> Settings:
        """What a call with these arguments is made with: the model's defaults filled in, sizes cut, all checked.

        Raises:
            RehyatError: an impossible value.
        """
        if schedule is not None and not isinstance(schedule, FlowSchedule):
            raise arguments.wrong("schedule", schedule, "a FlowSchedule")
        if solver is not None and not isinstance(solver, Solver):
            raise arguments.wrong("solver", solver, "a solver as Euler() or UniPC()")
        frames, height, width = self._size(
            num_frames=given_or(num_frames, self.defaults.num_frames),
            height=given_or(height, self.defaults.height),
            width=given_or(width, self.defaults.width),
        )
        settings = Settings(
            num_frames=frames,
            height=height,
            width=width,
            num_inference_steps=arguments.whole_number(
                "num_inference_steps", given_or(num_inference_steps, self.defaults.num_inference_steps), least=1
            ),
            guidance_scale=arguments.number("guidance_scale", given_or(guidance_scale, self.defaults.guidance_scale)),
            guidance_scale_2=self._second_guidance(guidance_scale, guidance_scale_2),
            schedule=given_or(schedule, self.schedule_at(height=height, width=width)),
            solver=given_or(solver, self.solver),
            first_chunk_steps=self._first_chunk_steps(first_chunk_steps),
            remember=check_context_noise(given_or(remember, self.defaults.remember)),
        )
        # Each says what is wrong, before the text encoder is read.
        _ = settings.guidances, settings.steps(), settings.steps(of_first_chunk=True)
        return settings

    def _first_chunk_steps(self, asked: Any) -> int | None:
        """
        Raises:
            RehyatError: it is no whole number.
        """
        if asked is None:
            return self.defaults.first_chunk_steps
        return arguments.whole_number("first_chunk_steps", asked, least=1)

    def _second_guidance(self, guidance_scale: Any, guidance_scale_2: Any) -> float | None:
        """
        Raises:
            RehyatError: there is one expert, or it is no number.
        """
        if guidance_scale_2 is None:
            scale = None if guidance_scale is not None else self.defaults.guidance_scale_2
            return float(scale) if scale is not None and self.two_experts else scale
        if not self.two_experts:
            raise RehyatError("guidance_scale_2 is the second expert's, and this model has one")
        return arguments.number("guidance_scale_2", guidance_scale_2)

    def _size(self, *, num_frames: Any, height: Any, width: Any) -> tuple[int, int, int]:
        """Frames, height and width as they can be made; diffusers' rounding and warnings."""
        sizes: dict[str, int] = {}
        for name, value, most in (
            ("num_frames", num_frames, MOST_TOKENS * 4),
            ("height", height, LARGEST_SIDE),
            ("width", width, LARGEST_SIDE),
        ):
            sizes[name] = arguments.whole_number(name, value, least=1, most=most)
        num_frames, height, width = sizes.values()
        time, space = self.vae.temporal_factor, self.vae.spatial_factor
        patch = self.transformer.patch_size
        frames = (num_frames // time * time + 1) if num_frames % time != 1 % time else num_frames
        rows, columns = (height // (space * patch[1]), width // (space * patch[2]))
        if not rows or not columns:
            raise RehyatError(
                f"a video of {width}x{height} is too small: the smallest is {space * patch[2]}x{space * patch[1]}"
            )
        size = (rows * space * patch[1], columns * space * patch[2])
        if frames != num_frames:
            _warn(f"this model makes {time}k + 1 frames: {frames} instead of {num_frames}")
        if size != (height, width):
            _warn(
                f"this model makes sides that are multiples of {space * patch[2]} and {space * patch[1]}: "
                f"{size[1]}x{size[0]} instead of {width}x{height}"
            )
        tokens = ((frames - 1) // time + 1) // patch[0] * rows * columns
        if tokens > MOST_TOKENS:
            raise RehyatError(
                f"{frames} frames of {size[1]}x{size[0]} are {tokens} tokens; more than {MOST_TOKENS} cannot be made"
            )
        return frames, *size


def given_or(value: Any, default: Any) -> Any:
    """An argument, or where it is None the model's own value."""
    return default if value is None else value


def _warn(message: str) -> None:
    warnings.warn(message, RehyatWarning, stacklevel=6)  # at the call of the pipeline
