"""The autoencoder on devices of its own, or by rows and columns of the picture: one device's frames, and what moves."""

import re
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from shared.devices import on_devices
from shared.tiers import chosen
from shared.training import HYBRID, random_module, write_teacher

from rehyat_jax import MeshConfig, TextToVideo
from rehyat_jax.cli import main
from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.models.memory import Making, Networks, VideoShape, networks_need
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.vae import WanVAE
from rehyat_jax.runtime.devices import PictureDevices
from rehyat_jax.runtime.mesh_config import picture_grid
from rehyat_jax.sampling import codec as programs
from rehyat_jax.sampling.codec import Codec, moved, to_float
from rehyat_jax.streams.stream import Stream

#: Narrow, with every kind of layer of the published ones; latents of 4 x 6, which eight devices have as four rows and
#: two columns.
AUTOENCODERS = {
    "Wan2.1": VAEConfig(
        base_dim=4,
        z_dim=4,
        dim_mult=(1, 2, 2),
        temperal_downsample=(False, True),
        num_res_blocks=1,
        latents_mean=(0.1,) * 4,
        latents_std=(2.0,) * 4,
    ),
    "Wan2.2": VAEConfig.from_dict(
        VAEConfig.wan22().to_dict() | {"base_dim": 4, "decoder_base_dim": 4, "num_res_blocks": 1}
    ),
}
ROWS, COLUMNS, LATENTS = 4, 6, 3


def _by_rows() -> dict[str, dict]:
    """Of each autoencoder: how far frames and latents are from one device's, the decoder's collectives by kind, the
    sizes of what is gathered, and into how many parts the state lies."""
    found = {}
    for name in chosen(list(AUTOENCODERS), test=1):
        config = AUTOENCODERS[name]
        vae = random_module(lambda config=config: WanVAE(config, rngs=nnx.Rngs(0)), 0)
        picture = PictureDevices(jax.devices(), apart=False)
        one = Codec(vae)
        parts = Codec(moved(vae, picture), devices=picture)
        rng = np.random.default_rng(0)
        latents = rng.standard_normal((1, LATENTS, ROWS, COLUMNS, config.z_dim), np.float32)
        sides = (side * config.spatial_factor for side in (ROWS, COLUMNS))
        video = rng.integers(0, 256, (1, 5, *sides, 3), np.uint8)

        def frames(codec, latents=latents):
            made = list(codec.decode(jnp.asarray(latents), pixels=to_float))
            return np.concatenate([np.asarray(each) for each, _ in made], axis=1), made[-1][1]

        (expected, _), (sharded, state) = frames(one), frames(parts)
        # An image or a beginning, in the wider run.
        encoded = [np.asarray(each.encode(video, frames_per_step=1)) for each in chosen([one, parts], test=0)]
        place = picture.sharding(height=ROWS, width=COLUMNS)
        compiled = programs.decode_next.lower(
            parts.weights,
            jax.device_put(jnp.asarray(latents[:, :1]), place),
            state,
            graph=parts.graph,
            pixels=to_float,
            sharded=place,
        ).compile()
        text = compiled.as_text()
        # But for the one bit that says whether all pixels are finite.
        kinds = re.findall(r"= \w+\[\d\S* (all-gather|collective-permute|all-reduce|all-to-all|reduce-scatter)\(", text)
        gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text)
        largest = max(jax.tree.leaves(state), key=lambda x: x.size)
        found[name] = {
            "frames": float(np.abs(sharded - expected).max()),
            "latents": float(np.abs(encoded[1] - encoded[0]).max() / np.abs(encoded[0]).max()) if encoded else 0.0,
            "kinds": sorted(set(kinds)),
            "gathered": sorted({int(np.prod([int(n) for n in sizes.split(",")])) for sizes in gathered}),
            "width": config.dim_mult[-1] * config.decoder_dim,
            "parts": largest.size // largest.addressable_shards[0].data.size,
        }
    return found


def _apart() -> dict[str, object]:
    """A stream whose frames are decoded on another device, beside the same stream without: blocks, and in which order
    the parts of a chunk are dispatched."""
    folder = write_teacher(Path(tempfile.mkdtemp()))

    def opened(vae, mesh) -> TextToVideo:
        return TextToVideo.from_pretrained(
            folder, hybrid=HYBRID, mesh=mesh, vae_devices=vae, cache_dir=folder / "cache"
        )

    def steered(pipe: TextToVideo) -> list[np.ndarray]:
        """Chunks, another prompt, a fork with other noise, saved and gone on with."""
        stream = pipe.open_stream("a red square", beginning=None)
        blocks = [next(stream) for _ in range(3)]
        stream.change_prompt("a blue disc")
        blocks += [next(stream) for _ in range(2)]
        fork = stream.fork(seed=5)
        blocks += [next(fork), next(stream)]
        stream.save(folder / "saved")
        again = pipe.resume_stream(folder / "saved")
        return [*blocks, next(again), next(again), next(stream), next(stream)]

    mesh = MeshConfig(fsdp=1, tensor=2)
    beside, alone = opened(1, mesh), opened(None, mesh)
    order: list[str] = []
    denoise, decode = type(beside.session(beside.settings())).denoise_chunk, Codec.decode

    def denoised(self, states, keys, text_kv, first_frame, condition=None):
        order.append(f"denoise {int(first_frame)}")
        return denoise(self, states, keys, text_kv, first_frame, condition)

    def decoded(self, latents, state=None, **how):
        """Waits for the next chunk, which would never come if it were begun later."""
        end = time.monotonic() + 60
        while (first := how["first_frame"]) and f"denoise {first + 1}" not in order and time.monotonic() < end:
            time.sleep(0.01)
        order.append(f"decode {first}")
        return decode(self, latents, state, **how)

    session = type(beside.session(beside.settings()))
    session.denoise_chunk, Codec.decode = denoised, decoded
    stream: Stream = beside.open_stream("a red square")
    for _ in range(3):
        next(stream)
    session.denoise_chunk, Codec.decode = denoise, decode
    assert stream._ahead is not None
    ahead, decoder = stream._ahead[1].result()[0], jax.tree.leaves(stream.state.decoder)[0]
    expected = steered(alone)
    pairs = zip(steered(beside), expected, strict=True)
    return {
        "same": [bool(np.array_equal(a, b)) for a, b in pairs],
        "order": order,
        "decoder": [device.id for device in decoder.devices()],
        "latents": [device.id for device in ahead.devices()],
        "vae": [device.id for device in jax.tree.leaves(beside.session(beside.settings()).codec.weights)[0].devices()],
        "on the mesh": max(
            int(np.abs(one.astype(int) - other).max())
            for one, other in zip(opened("mesh", mesh).open_stream("a red square"), expected[:2], strict=False)
        ),
    }


def _measured() -> dict[str, dict]:
    return {"by rows": _by_rows(), "apart": _apart()}


@pytest.fixture(scope="module")
def measured():
    return on_devices("test_vae_devices", "_measured")


@pytest.mark.wider
def test_by_rows_and_columns_it_is_one_device(measured):
    """Float32 sums in another order, some dozen convolutions of order one; the decoder goes frame by frame, its state
    handed on, and lies in eight parts."""
    for name, found in measured["by rows"].items():
        assert found["frames"] < 1e-5, name
        assert found["latents"] < 1e-5, name
        assert found["parts"] == 8, name


@pytest.mark.wider
def test_halos_move_and_only_attention_within_a_frame_is_gathered(measured):
    """Gathered are the keys and values of the smallest frame's pixels, by rows and by columns; of the next larger
    frame the activations would be twice as many."""
    for name, found in measured["by rows"].items():
        assert found["kinds"] == ["all-gather", "collective-permute"], name
        assert max(found["gathered"]) <= ROWS * COLUMNS * 2 * found["width"], name


def test_a_stream_decoded_elsewhere_is_the_same_bit_for_bit(measured):
    """On the mesh of two itself it is so to rounding: a level of 255 at the edge of a pixel's."""
    assert measured["apart"]["same"] == [True] * 11
    assert measured["apart"]["on the mesh"] <= 1


def test_the_next_chunk_is_begun_before_frames_are_waited_for(measured):
    """The first block waits for nothing else. The mesh is the devices 0 and 1; the decoder's is 2."""
    found = measured["apart"]
    assert found["order"] == ["denoise 0", "decode 0", "denoise 1", "denoise 2", "decode 1", "denoise 3", "decode 2"]
    assert found["decoder"] == found["vae"] == [2]
    assert found["latents"][0] in (0, 1)


def test_a_picture_is_divided_by_rows_first():
    """Wan2.1's latents of 480p and 720p."""
    grids = {
        size: [picture_grid(n, height=size[0], width=size[1]) for n in (2, 4, 8)] for size in ((60, 104), (90, 160))
    }
    assert grids == {(60, 104): [(2, 1), (4, 1), (4, 2)], (90, 160): [(2, 1), (2, 2), (2, 4)]}
    with pytest.raises(
        ConfigError, match=r"7 devices cannot have equal parts of a picture of 60 x 104 .* 1, 2, 3, 4, 5, 6 can"
    ):
        picture_grid(7, height=60, width=104)


@pytest.mark.parametrize("command", [["generate", "a koala", "--out", "koala.mp4"], ["serve"]], ids=lambda c: c[0])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--vae-devices", "1"], "vae_devices 1 beside the transformer's one are 2 devices, and there are 1"),
        (["--vae-devices", "mesh"], "vae_devices mesh needs a mesh of several devices"),
        (["--vae-devices", "0"], "--vae-devices must be a whole number of 1 or more, or mesh, not '0'"),
    ],
)
def test_impossible_devices_are_one_sentence(command, options, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*command, *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"vae_devices": 0}, "vae_devices must be a whole number of 1 or more, not 0"),
        ({"vae_devices": 1, "vae_tile": 64}, "give one of them"),
        ({"vae_devices": 1}, "there are 1"),
    ],
)
def test_python_refuses_the_same(how, said):
    with pytest.raises(RehyatError, match=said):
        TextToVideo.from_pretrained("mini-sprites", **how)


def test_memory_is_of_the_fuller_device():
    """1.3B's numbers: on TPUs and GPUs the transformer's devices are rid of the decoder, which is halved by two."""
    gib, shape = 1 << 30, VideoShape(frames=81, height=480, width=832, steps=50, guided=True)
    networks = Networks(
        model=WanConfig.t2v_1_3b(),
        vae=VAEConfig.wan(),
        dtype=jnp.dtype(jnp.bfloat16),
        transformer=3 * gib,
        blocks=2 * gib,
        text_encoder=11 * gib,
        decoder=gib // 2,
        text_blocks=10 * gib,
        text_layers=24,
    )

    def need(vae) -> int:
        making = Making(hybrid=None, streams=False, vae_devices=vae, mesh=MeshConfig(fsdp=1, tensor=2))
        return networks_need(networks, shape, making, on="tpu").on_device

    assert need(1) <= need(None) - gib // 2
    assert need("mesh") < need(None)
