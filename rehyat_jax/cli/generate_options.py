"""The options of ``rehyat generate``, and the words among them that are read."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime.eight_bits import Kind
from rehyat_jax.runtime.mesh_config import MeshConfig, VaeDevices
from rehyat_jax.runtime.processes import Processes

if TYPE_CHECKING:
    from rehyat_jax.mixers.config import HybridConfig
    from rehyat_jax.sampling.rollout import ContextNoise


@dataclasses.dataclass(frozen=True)
class Generate:
    """Make a video from a sentence: an mp4, and beside it a contact sheet (.png) and a record of the run (.json).

    Or from sentences by second (--timeline), or a video for each line of a file (--prompts).

    What is not given is the model's own advice.
    """

    prompt: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="PROMPT")]] = None
    """What to show."""

    timeline: Annotated[Path | None, tyro.conf.arg(metavar="FILE.toml")] = None
    """Sentences by second, one a line, in the place of PROMPT: 0 = "a koala …", then 4.5 = "a lemon …". A chunk shows
    the sentence that counts at its first frame."""

    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A video for each line, in the place of PROMPT, in the folder --out: {prompt}-{i}.mp4. The same command goes on
    with what is missing."""

    count: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Of --prompts: videos of each line, with the noise of the seeds from --seed on."""

    beginning: Annotated[Path | None, tyro.conf.arg(name="from", metavar="CLIP")] = None
    """Go on from a video: its last frames, scaled and cropped to the size, come first and count. Per-chunk."""

    model: Annotated[str, tyro.conf.arg(metavar="NAME|DIR")] = "mini-sprites"
    """A bundled model's name, or the folder of a Wan2.1 checkpoint (diffusers or original layout)."""

    lora: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="FILE[:STRENGTH]")] = ()
    """A LoRA file or folder of any dialect, merged into the transformer's weights; 1 as it was trained. Again for
    another. Of two experts it is merged into both, with high: or
    low: before FILE into one."""

    image: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """What the video begins with, scaled and cropped to its size; for models that take images, and for those that make
    a video chunk by chunk."""

    last_image: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """What the video ends with, for models that take two images."""

    out: Annotated[Path, tyro.conf.arg(metavar="FILE|DIR|-")] = Path("video.mp4")
    """Where the video is to stand: .mp4, .webp or .gif; a new folder of numbered PNGs; - for raw frames (rows of RGB)
    to a pipe."""

    frames: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Number of frames: any in a per-chunk sweep, 4k + 1 else."""

    sweep: Annotated[Literal["per-step", "per-chunk"] | None, tyro.conf.arg(metavar="per-step|per-chunk")] = None
    """per-step: all frames at each step; any model. per-chunk: all steps at each chunk of frames, in memory that does
    not grow, written while it is made; a model whose blocks are all converted. When not given: per-chunk where the
    model can, else per-step. The video is the same, but for a last chunk that is cut and for --remember."""

    remember: Annotated[str | None, tyro.conf.arg(metavar="steps|LEVEL")] = None
    """What the later chunks of a per-chunk sweep see of one. steps: what it was at their own noise level, so that the
    video is that of a per-step sweep. A noise level from 0 to below 1: the finished chunk with so much noise, in the
    memory of one step; for a model that was trained so. When not given: as the model was trained."""

    offload: bool = False
    """For a device with little memory: the transformer's and the text encoder's blocks stay in the host's memory and
    are fetched one at a time, and the text encoder leaves once a prompt is embedded. Slower."""

    vae_tile: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """For little memory as well: frames are decoded by tiles of so many pixels a side (256), with blended seams."""

    decoder: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A small decoder in the place of the VAE's: TAEHV's file for the model's latents (taew2_1, of Wan2.2's 5B
    taew2_2). Coarser frames, much sooner."""

    resume: bool = False
    """Go on with a per-chunk video that was interrupted or killed, from FILE.mp4.state: the same command with
    --resume. With another prompt, the rest shows that."""

    overwrite: bool = False
    """Replace FILE.mp4 if there is one."""

    hybrid: Annotated[str | None, tyro.conf.arg(metavar="CHUNK+OVERLAP")] = None
    """Convert every block on loading, as 3+1: chunks of 3 latent frames that see 1 before them. The feature maps are
    untrained: this shows that a model streams, not how well."""

    size: Annotated[str | None, tyro.conf.arg(metavar="WxH")] = None
    """Width and height in pixels, as 832x480."""

    steps: Annotated[str | None, tyro.conf.arg(metavar="N|auto")] = None
    """Number of denoising steps. auto: the most of the model's list with which this machine makes frames as fast as
    they are shown; measured first."""

    guidance: Annotated[float | None, tyro.conf.arg(metavar="G")] = None
    """How strongly the prompt guides; 1 or less: without guidance, in half the time."""

    guidance_2: Annotated[float | None, tyro.conf.arg(metavar="G")] = None
    """Guidance of the low-noise expert, for models of two (Wan2.2's A14B); as --guidance when that alone is given."""

    negative: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """What not to show; the model's own when not given."""

    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """The same seed and settings make the same video."""

    solver: Annotated[Literal["unipc", "euler"] | None, tyro.conf.arg(metavar="unipc|euler")] = None
    """Solver of the flow."""

    grid: Annotated[
        Literal["diffusers", "diffusers-euler", "official"] | None,
        tyro.conf.arg(metavar="diffusers|diffusers-euler|official"),
    ] = None
    """Whose noise levels."""

    shift: Annotated[float | None, tyro.conf.arg(metavar="X")] = None
    """Shift of the noise levels: the larger the video, the larger."""

    dtype: Annotated[Literal["float32", "bfloat16"], tyro.conf.arg(metavar="float32|bfloat16")] = "float32"
    """Number format of the transformer and the text encoder; the autoencoder stays in float32."""

    quantize: Annotated[Kind | None, tyro.conf.arg(metavar="int8|int8-weights|fp8")] = None
    """Keep the matrices of the transformer's and the text encoder's blocks in eight bits on the device: half of what
    bfloat16 takes. int8: the transformer's products are made in int8 as well, as accelerators are fast at.
    int8-weights: products stay as they are, nearer to the model's own. fp8: so too, and files in fp8 are kept as they
    are."""

    quantize_except: Annotated[tuple[str, ...], tyro.conf.arg(metavar="LAYER …")] = ()
    """Layers that --quantize leaves as they are in every block: attn1.to_q, or attn2 for all that is in it."""

    repair_prompts: bool = True
    """Repair the prompts' text (curly quotes, full-width letters, mistaken encodings), as Wan's own code does."""

    mesh: MeshConfig = MeshConfig(fsdp=1)
    """Devices to generate on, over which the model is divided; one when not given."""

    vae_devices: Annotated[str | None, tyro.conf.arg(metavar="N|mesh")] = None
    """Devices of the autoencoder's own, so many after those of --mesh: a per-chunk video's frames are decoded there
    while its next chunk is made. mesh: those of --mesh. Of several each has some rows and columns of the picture. When
    not given, the first device."""

    processes: Processes = Processes()
    """Of several hosts: the same command on each, and --mesh over the devices of all. The first writes the video; a
    per-chunk one goes on (--resume) where all can read its state."""

    cache_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of compiled programs and prompt embeddings (else $REHYAT_CACHE_DIR, else the user's cache folder)."""

    force: bool = False
    """Begin although the memory of this machine is estimated to be too small."""


def parse_hybrid(text: str | None) -> HybridConfig | Literal["auto"]:
    """Of a chunk and an overlap; the folder's own where there is none."""
    if text is None:
        return "auto"
    match = re.fullmatch(r"(\d{1,6})\+(\d{1,6})", text.strip(), flags=re.ASCII)
    if not match:
        raise RehyatError(f"--hybrid must be a chunk and an overlap in latent frames as 3+1, not {text!r}")
    from rehyat_jax.mixers.config import HybridConfig

    return HybridConfig(chunk_frames=int(match[1]), overlap_frames=int(match[2]))


def parse_remember(text: str | None) -> ContextNoise | None:
    if text is None or text == "steps":
        return text  # type: ignore[return-value]
    try:
        return float(text)
    except ValueError:
        raise RehyatError(f"--remember must be steps or a noise level from 0 to below 1, not {text[:80]!r}") from None


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    """Width and height."""
    if size is None:
        return None, None
    match = re.fullmatch(r"(\d{1,6})[xX×*](\d{1,6})", size.strip(), flags=re.ASCII)
    if not match:
        raise RehyatError(f"--size must be a width and a height as 832x480, not {size!r}")
    return int(match[1]), int(match[2])


def parse_vae_devices(text: str | None) -> VaeDevices | None:
    """How many, or the mesh's."""
    if text is None or text == "mesh":
        return text  # type: ignore[return-value]
    if not re.fullmatch(r"\d{1,6}", text, flags=re.ASCII) or int(text) < 1:
        raise RehyatError(f"--vae-devices must be a whole number of 1 or more, or mesh, not {text[:80]!r}")
    return int(text)
