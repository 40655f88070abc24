"""Open a page on which a sentence becomes a video without an end, and is changed while one watches."""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from rehyat_jax.cli.arguments import parse_options, parse_steps
from rehyat_jax.cli.generate_options import parse_vae_devices
from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime.eight_bits import Kind, named
from rehyat_jax.runtime.heap import share_one_arena
from rehyat_jax.runtime.mesh_config import MeshConfig, devices_left

if TYPE_CHECKING:
    from rehyat_jax.pipeline import TextToVideo

_log = logging.getLogger(__name__)

_LOCAL = ("127.0.0.1", "::1", "localhost")
#: A model that knows no more words than these has them suggested.
_FEW_WORDS = 400
_EXAMPLE = "a koala moving right quickly on a red background"


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serve a model on a page, over a WebSocket (/v1/realtime/video) and as growing mp4 files (/v1/streams/ID.mp4).

    Only this machine can reach it, unless another --host is given; then a token is needed, which is printed.
    """

    model: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME|DIR")] = ()
    """A bundled model's name, or a model's folder; all of its blocks must be converted. mini-sprites when not given.
    Again for another to choose from, of as many frames a second; the first is meant where a client names none."""

    host: Annotated[str, tyro.conf.arg(metavar="ADDRESS")] = "127.0.0.1"
    """Where to listen. Any other than this machine's own needs a token."""

    port: Annotated[int, tyro.conf.arg(metavar="N")] = 8765
    """Port; 0: any that is free."""

    token: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """What clients must show: Authorization: Bearer TEXT, or ?token=TEXT. Else $REHYAT_TOKEN, which no list of
    processes shows."""

    names: Annotated[tuple[str, ...], tyro.conf.arg(metavar="HOST")] = ()
    """Further names under which the server may be reached."""

    browser: bool = False
    """Open the page in a browser."""

    ahead: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 1.0
    """A chunk is begun while less video than this is ready for the furthest viewer: more is safer on a machine with
    other work, less shows a changed sentence sooner."""

    streams: Annotated[int, tyro.conf.arg(metavar="N")] = 8
    """Streams at once."""

    idle: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 300.0
    """A stream without viewers is ended after so long."""

    batch: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Streams that are made at once as rows of one batch, as far as they are of one size and settings; rounded down to
    a power of two. When not given, 8 on an accelerator, and 1 on a CPU."""

    steps: Annotated[str | None, tyro.conf.arg(metavar="N|auto")] = None
    """Denoising steps where a client asks for none. auto: the most of the model's list with which this machine makes
    frames as fast as they are shown, measured first; where none does the fewest, and playback slows evenly."""

    log: Annotated[Literal["text", "json"], tyro.conf.arg(metavar="text|json")] = "text"
    """json: what happens as JSON, an object a line, on the standard error. text: warnings alone."""

    folder: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Keep streams here, saved as they grow: a server that is started again goes on with them. When not given they are
    gone with the server."""

    dtype: Annotated[Literal["float32", "bfloat16"], tyro.conf.arg(metavar="float32|bfloat16")] = "float32"
    """Number format of the transformer and the text encoder."""

    lora: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="FILE[:STRENGTH]")] = ()
    """A LoRA file or folder of any dialect, merged into the transformer's weights. Again for another."""

    quantize: Annotated[Kind | None, tyro.conf.arg(metavar="int8|int8-weights|fp8")] = None
    """Keep the matrices of the transformer's and the text encoder's blocks in eight bits on the device, and with int8
    make the transformer's products so (rehyat generate --help says more)."""

    quantize_except: Annotated[tuple[str, ...], tyro.conf.arg(metavar="LAYER …")] = ()
    """Layers that --quantize leaves as they are in every block: attn1.to_q, or attn2 for all that is in it."""

    offload: bool = False
    """For a device with little memory: the transformer's and the text encoder's blocks stay in the host's memory and
    are fetched one at a time, and the text encoder leaves once a prompt is embedded. Slower."""

    vae_tile: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """For little memory as well: frames are decoded by tiles of so many pixels a side (256), with blended seams."""

    decoder: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A small decoder in the place of the VAE's: TAEHV's file for the models' latents (taew2_1, of Wan2.2's 5B
    taew2_2). Coarser frames, much sooner."""

    mesh: MeshConfig = MeshConfig(fsdp=1)
    """Devices to generate on, over which the model is divided; one when not given."""

    vae_devices: Annotated[str | None, tyro.conf.arg(metavar="N|mesh")] = None
    """Devices of the autoencoder's own, so many after those of --mesh: a stream's frames are decoded there while its
    next chunk is made, which a changed sentence throws away. mesh: those of --mesh."""

    force: bool = False
    """Begin although memory is estimated to be too small."""


def main(argv: list[str]) -> None:
    """``rehyat serve``; returns when it is stopped by Ctrl-C or SIGTERM, after the chunk under way."""
    options = parse_options(Serve, argv, command="serve")
    if not 0 <= options.port < 65536:
        raise RehyatError(f"--port must be a whole number from 0 to 65535, not {options.port}")
    for name in ("ahead", "idle", "streams"):
        if not 0 < getattr(options, name) < 1e9:
            raise RehyatError(f"--{name} must be above 0, not {getattr(options, name)}")
    if options.batch is not None and not 1 <= options.batch <= 1024:
        raise RehyatError(f"--batch must be a whole number from 1 to 1024, not {options.batch}")
    steps = parse_steps(options.steps)
    share_one_arena()  # before JAX has threads
    if options.log == "json":
        from rehyat_jax.serve.logs import log_json

        log_json()
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    try:
        import starlette  # noqa: F401
        import uvicorn
        import websockets  # noqa: F401
    except ModuleNotFoundError as error:
        raise RehyatError(f"rehyat serve needs {error.name}: pip install 'rehyat-jax[serve]'") from error

    from rehyat_jax.cli.serve_models import Models
    from rehyat_jax.pipeline import TextToVideo
    from rehyat_jax.runtime.platform import device_kind, platform
    from rehyat_jax.serve.app import About, make_app
    from rehyat_jax.serve.guard import Access
    from rehyat_jax.serve.host import Host
    from rehyat_jax.serve.limits import Limits
    from rehyat_jax.serve.steerable import Pace
    from rehyat_jax.streams.together import Together

    names = tuple(dict.fromkeys(options.model or ("mini-sprites",)))
    how: Any = {"dtype": options.dtype, "loras": options.lora}
    how |= {"quantize": named(options.quantize, options.quantize_except)}
    how["vae_devices"] = parse_vae_devices(options.vae_devices)
    how |= {"offload": options.offload, "vae_tile": options.vae_tile, "decoder": options.decoder}
    meshes = {name: _check_room(options, name, steps) for name in names}
    opened = {name: TextToVideo.from_pretrained(name, mesh=mesh, **how) for name, mesh in meshes.items()}
    models = Models(opened, steps)
    pipe = models.pipes[names[0]]
    batch = options.batch or (1 if platform() == "cpu" else 8)
    token = (
        options.token
        or os.environ.get("REHYAT_TOKEN")
        or (None if options.host in _LOCAL else secrets.token_urlsafe(16))
    )
    access = Access(hosts=(*Access().hosts, *_named(options.host), *options.names), token=token)
    words = _words(pipe)
    about = About(
        model=names[0],
        models=models.about(),
        device=device_kind(),
        words=words,
        example=_EXAMPLE if set(_EXAMPLE.split()) <= set(words) else "",
    )
    host = Host(
        models.opened,
        resume=models.resumed,
        describe=models.described,
        together=Together(batch) if batch > 1 else None,
        folder=options.folder,
        pace=Pace(fps=pipe.fps, ahead=options.ahead),
        limits=Limits(streams=options.streams, idle=options.idle),
    )
    host.restored.wait()  # whoever comes back finds the stream
    parts = models.warm_up()

    def warm() -> None:  # a part a turn, and none once somebody is there, whose stream does the rest
        if not host.names() and next(parts, False):
            host.call(warm)

    host.call(warm)
    config = uvicorn.Config(
        make_app(host, about, access=access),
        host=options.host,
        port=options.port,
        log_level="warning",
        log_config=None if options.log == "json" else uvicorn.config.LOGGING_CONFIG,
        ws_max_size=1 << 16,
        ws_per_message_deflate=False,  # video is compressed already
        timeout_graceful_shutdown=5,
        server_header=False,
    )
    _Announced(config, options, token).run()
    host.close()


def _check_room(options: Serve, name: str, steps: int | Literal["auto"] | None) -> MeshConfig | None:
    """
    Returns:
        The mesh to generate on.

    Raises:
        ConfigError: this machine has no room for one stream of the model's own size, or the mesh does not divide it.
    """
    import jax

    from rehyat_jax.models.folder import find_model, read_defaults
    from rehyat_jax.models.memory import Making, VideoShape, preview_config, student_config, video_need
    from rehyat_jax.models.wan.sharding import check_picture, mesh_for_video
    from rehyat_jax.runtime.memory import check_memory

    folder = find_model(name)
    defaults = read_defaults(folder)
    shape = VideoShape(
        frames=defaults.num_frames,
        height=defaults.height,
        width=defaults.width,
        steps=steps if isinstance(steps, int) else max([defaults.num_inference_steps, *defaults.offered_steps]),
        guided=defaults.guidance_scale > 1,
    )
    mesh, vae = None, parse_vae_devices(options.vae_devices)
    left = devices_left(vae, options.mesh, found=jax.device_count())
    if not options.mesh.single:
        mesh = mesh_for_video(
            options.mesh,
            folder,
            hybrid=student_config(folder),
            frames=None,
            guided=shape.guided,
            streams=True,
            devices=left,
        )
    check_picture(vae, mesh, folder, height=shape.height, width=shape.width)
    making = Making(
        hybrid=student_config(folder),
        streams=True,
        remember=defaults.remember,
        mesh=mesh,
        offload=options.offload,
        vae_tile=options.vae_tile,
        vae_devices=vae,
        preview=preview_config(options.decoder),
    )
    eight_bits = options.quantize is not None and not options.quantize_except
    need = video_need(folder, shape, making, dtype=options.dtype, eight_bits=eight_bits)
    check_memory(need, what=f"streams of {defaults.width}x{defaults.height}", force=options.force)
    return mesh


def _Announced(config, options: Serve, token: str | None):
    """A uvicorn server that says where it is once it listens."""
    import uvicorn

    class Announced(uvicorn.Server):
        async def startup(self, sockets: list | None = None) -> None:
            await super().startup(sockets)
            if not self.started:
                return
            port = self.servers[0].sockets[0].getsockname()[1]
            shown = f"[{options.host}]" if ":" in options.host else options.host
            address = f"http://{shown}:{port}/" + (f"?token={token}" if token else "")
            if options.log == "json":
                _log.info("listening", extra={"address": address})
            else:
                print(f"rehyat: {address} (Ctrl-C ends it)", file=sys.stderr, flush=True)
            if options.browser:
                import webbrowser

                webbrowser.open(address)

    return Announced(config)


def _named(host: str) -> tuple[str, ...]:
    return (f"[{host}]",) if ":" in host else (host,)


def _words(pipe: TextToVideo) -> tuple[str, ...]:
    """The words of a model that knows few."""
    words = pipe.text.tokenizer.words
    return tuple(words) if len(words) <= _FEW_WORDS else ()
