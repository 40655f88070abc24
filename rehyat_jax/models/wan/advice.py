"""How the authors of Wan run their models: one table by model and size.

Sources: Wan-Video/Wan2.1, ``generate.py`` (``_validate_args``: 50 steps and 81 frames of text to video, shift 5,
guidance 5, 1280x720 where no size is asked for), ``README.md`` (T2V-1.3B: shift 8 to 12, guidance 6),
``wan/configs/shared_config.py`` (16 frames a second, the negative prompt, which ``wan/text2video.py`` takes where none
is given); for the 14B at 480p the shift of its published conversion (diffusers, ``pipeline_wan.py``: "5.0 for 720P,
3.0 for 480P"). Wan2.2: Wan-Video/Wan2.2, ``wan/configs/wan_ti2v_5B.py``, ``wan_t2v_A14B.py``,
``wan_i2v_A14B.py`` and ``shared_config.py``.
"""

from __future__ import annotations

import dataclasses

from rehyat_jax.models.wan.config import VAEConfig, WanConfig

#: The authors' own, as they write it: garish, overexposed, static, blurred, subtitles, …
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice:
    """What one model is run at, at one size."""

    model: str
    width: int
    height: int
    shift: float
    guidance_scale: float
    num_inference_steps: int = 50
    num_frames: int = 81
    fps: int = 16
    negative_prompt: str = NEGATIVE_PROMPT
    #: An image goes in as a finished first latent frame (diffusers' ``expand_timesteps``).
    clean_first_frame: bool = False
    #: Of two experts: the share of the noise levels, from the lowest on, that is the second's, and its guidance.
    boundary_ratio: float | None = None
    guidance_scale_2: float | None = None

    def __str__(self) -> str:
        second = "" if self.guidance_scale_2 is None else f" and {self.guidance_scale_2:g}"
        return (
            f"{self.model} at {self.width}x{self.height}: {self.num_inference_steps} steps, shift {self.shift:g}, "
            f"guidance {self.guidance_scale:g}{second}, {self.num_frames} frames, {self.fps} a second"
        )


#: A model's first size is its own.
ADVICE = (
    Advice(model="Wan2.1-T2V-1.3B", width=832, height=480, shift=8.0, guidance_scale=6.0),
    Advice(model="Wan2.1-T2V-1.3B", width=1280, height=720, shift=8.0, guidance_scale=6.0),
    Advice(model="Wan2.1-T2V-14B", width=1280, height=720, shift=5.0, guidance_scale=5.0),
    Advice(model="Wan2.1-T2V-14B", width=832, height=480, shift=3.0, guidance_scale=5.0),
    # generate.py: 40 steps from an image; shift 3 at 480p, and 16 between two images.
    Advice(model="Wan2.1-I2V-14B", width=1280, height=720, shift=5.0, guidance_scale=5.0, num_inference_steps=40),
    Advice(model="Wan2.1-I2V-14B", width=832, height=480, shift=3.0, guidance_scale=5.0, num_inference_steps=40),
    Advice(model="Wan2.1-FLF2V-14B", width=1280, height=720, shift=16.0, guidance_scale=5.0),
    Advice(
        model="Wan2.2-TI2V-5B",
        width=1280,
        height=704,
        shift=5.0,
        guidance_scale=5.0,
        num_frames=121,
        fps=24,
        clean_first_frame=True,
    ),
    *(
        Advice(
            model=model,
            width=width,
            height=height,
            shift=shift,
            guidance_scale=high,
            guidance_scale_2=low,
            boundary_ratio=boundary,
            num_inference_steps=40,
        )
        # The authors write guidance as (low, high).
        for model, shift, (low, high), boundary in (
            ("Wan2.2-T2V-A14B", 12.0, (3.0, 4.0), 0.875),
            ("Wan2.2-I2V-A14B", 5.0, (3.5, 3.5), 0.9),
        )
        for width, height in ((1280, 720), (832, 480))
    ),
)
#: Widths from which on a transformer is taken for the larger model; others than Wan's two are run as the nearer one.
_LARGE = 3072


def published_as(config: WanConfig, *, experts: bool = False) -> str:
    """The published model that a transformer is, or is nearest to; ``experts``: it is one of two."""
    if experts:
        return "Wan2.2-T2V-A14B" if config.in_channels == config.out_channels else "Wan2.2-I2V-A14B"
    if config.in_channels == VAEConfig.wan22().z_dim:
        return "Wan2.2-TI2V-5B"
    if config.image_dim is not None:
        return "Wan2.1-I2V-14B" if config.pos_embed_seq_len is None else "Wan2.1-FLF2V-14B"
    if config.in_channels != config.out_channels:  # one of Wan2.2's two experts, alone
        return "Wan2.2-I2V-A14B"
    return "Wan2.1-T2V-14B" if config.dim >= _LARGE else "Wan2.1-T2V-1.3B"


def advised(config: WanConfig, *, height: int | None = None, width: int | None = None, experts: bool = False) -> Advice:
    """The row for a transformer (or one of two), and for the published size whose area is the nearer; without a size,
    its own."""
    model = published_as(config, experts=experts)
    rows = [advice for advice in ADVICE if advice.model == model]
    if height is None or width is None:
        return rows[0]
    area = height * width
    return min(rows, key=lambda advice: abs(advice.width * advice.height - area))
