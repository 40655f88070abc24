"""Generation on virtual devices: the video of one device, streams that change their devices, what is exchanged."""

import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from shared.devices import on_devices
from shared.tiers import chosen, tier
from shared.training import write_teacher

from rehyat_jax import HybridConfig, MeshConfig, TextToVideo
from rehyat_jax.cli import main
from rehyat_jax.errors import ConfigError
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.sharding import generation_mesh
from rehyat_jax.runtime.hlo import work
from rehyat_jax.runtime.offload import bytes_on_device
from rehyat_jax.sampling import programs
from rehyat_jax.sampling.condition import Condition
from rehyat_jax.sampling.noise import video_keys
from rehyat_jax.streams.together import advance_together
from rehyat_jax.weights import load

#: Chunks of two latent frames of sixteen tokens; the video is four of them, and has guidance.
HYBRID = HybridConfig(chunk_frames=2, overlap_frames=1, decay=True, length_norm=True)
FRAMES = 15
PUBLISHED = HybridConfig()
MESHES = [
    {"fsdp": 2, "context": 2, "tensor": 2},
    {"data": 2},
    {"fsdp": 8},
    {"context": 4},
    {"tensor": 2},
    {"data": 2, "context": 4},
]


def _mesh(sizes) -> MeshConfig:
    return MeshConfig(**{"fsdp": 1, **sizes})


def _pipe(folder: Path, *, hybrid: HybridConfig | None = HYBRID, mesh: MeshConfig | None = None) -> TextToVideo:
    return TextToVideo.from_pretrained(folder, hybrid=hybrid, mesh=mesh, cache_dir=folder / "cache")


def _latents(pipe: TextToVideo) -> np.ndarray:
    """Of a whole video with guidance, from the noise of a seed."""
    session = pipe.session(pipe.settings(num_frames=FRAMES))
    noise = np.random.default_rng(0).normal(size=(1, *session.shape)).astype(np.float32)
    return np.asarray(session.denoise(jnp.asarray(noise), session.embed(pipe.text, ["a red square"], "dull")))


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(one).max())


def _whole_videos() -> dict[str, float]:
    """The largest difference of the latents from those of one device, as a share of their largest number."""
    folder, found = write_teacher(Path(tempfile.mkdtemp())), {}
    for hybrid in chosen((HYBRID, None), test=1):
        one = _latents(_pipe(folder, hybrid=hybrid))
        for sizes in chosen(MESHES, test=1):
            on_mesh = _latents(_pipe(folder, hybrid=hybrid, mesh=_mesh(sizes)))
            found[f"{'student' if hybrid else 'teacher'} {sizes}"] = _apart(one, on_mesh)
    return found


def _measured() -> dict[str, dict]:
    """In one process of eight devices, whose programs are compiled once for all of it."""
    found = {"videos": _whole_videos(), "streamed": _streamed()}
    return found | ({"exchanged": _exchanged()} if tier in ("rest", "all") else {})


@pytest.fixture(scope="module")
def measured():
    return on_devices("test_generation_on_mesh", "_measured")


@pytest.fixture(scope="module")
def whole_videos(measured):
    return measured["videos"]


@pytest.mark.wider
def test_a_mesh_makes_the_video_of_one_device(whole_videos):
    """Two steps of UniPC with guidance; float32 sums in another order, of 36 numbers at most: some 1e-6."""
    assert max(whole_videos.values()) < 1e-5, whole_videos


def _streamed() -> dict[str, list]:
    """Of a stream's blocks on each mesh, in levels of 255: how far from one device's; of what was saved there and gone
    on with, there and on one device; whether a layer's matrix was on the host alone while the weights were read, and
    whether all layers' were; and into how many parts the linear states are cut."""
    folder, found = write_teacher(Path(tempfile.mkdtemp())), {}

    def frames(stream, count: int) -> np.ndarray:
        return np.concatenate([next(stream) for _ in range(count)]).astype(int)

    def far(one: np.ndarray, other: np.ndarray) -> int:
        return int(np.abs(one - other).max())

    one = _pipe(folder)
    stream = one.open_stream("a red square")
    begun = frames(stream, 1)
    stream.save(folder / "saved")
    rest = frames(stream, 2)
    aligned, held = load._aligned, []

    def counted(shape, dtype):
        held.append(tuple(shape))
        return aligned(shape, dtype)

    for sizes in chosen([{"tensor": 2, "context": 2}, {"automatic": True}, *MESHES[:-1]], test=1):
        held.clear()
        load._aligned = counted
        pipe = _pipe(folder, mesh=_mesh(sizes))
        load._aligned = aligned
        by_layer = [(*layers, WAN_DIM, WAN_FFN) in held for layers in ((), (2,))]
        stream = pipe.open_stream("a red square")
        here = frames(stream, 1)
        stream.save(folder / "here")
        after = frames(stream, 2)
        state = stream.state.states.s
        found[str(sizes)] = [
            far(here, begun),
            far(after, rest),
            far(frames(pipe.resume_stream(folder / "saved"), 2), rest),
            far(frames(one.resume_stream(folder / "here"), 2), rest),
            far(frames(pipe.resume_stream(folder / "here"), 2), after),
            by_layer,
            state.nbytes // state.addressable_shards[0].data.nbytes,
        ]
    return found


#: Of `shared.training.WAN`, whose feed-forward has the largest matrix.
WAN_DIM, WAN_FFN = 24, 32


@pytest.fixture(scope="module")
def streamed(measured):
    return measured["streamed"]


@pytest.mark.wider
def test_a_stream_goes_on_upon_other_devices(streamed):
    """One level of 255 is a rounding of the latents (some 1e-6) at the edge of a pixel's; on the same mesh there is
    none."""
    for sizes, (here, after, taken_over, given_back, again, *_) in streamed.items():
        assert max(here, after, taken_over, given_back) <= 1, sizes
        assert again == 0, sizes


@pytest.mark.wider
def test_weights_are_read_a_tensor_at_a_time(streamed):
    assert all(by_layer == [True, False] for *_, by_layer, _ in streamed.values())


def test_states_lie_by_heads(streamed):
    """Two heads: over the two devices of tensor, where context would divide them further."""
    assert streamed["{'tensor': 2, 'context': 2}"][-1] == 2


def _together() -> dict[str, list]:
    """Two streams advanced as rows of a batch: how far their blocks are from one device's, in levels of 255, and a
    device's bytes of the weights as a share of all."""
    folder, found = write_teacher(Path(tempfile.mkdtemp())), {}
    prompts = ["a red square", "a blue disc"]

    def opened(pipe: TextToVideo) -> list:
        return [pipe.open_stream(prompt, seed=seed) for seed, prompt in enumerate(prompts)]

    alone = [np.concatenate([next(stream) for _ in range(3)])[-FRAMES_OF_CHUNK:] for stream in opened(_pipe(folder))]
    for sizes in ({"data": 2}, {"data": 2, "tensor": 2}):
        pipe = _pipe(folder, mesh=_mesh(sizes))
        streams = opened(pipe)
        for stream in streams:
            next(stream)
        advance_together(streams)
        blocks = advance_together(streams)
        weights = nnx.state(pipe.transformer)
        share = bytes_on_device(weights) / sum(x.nbytes for x in jax.tree.leaves(weights))
        far = [int(np.abs(a.astype(int) - b).max()) for a, b in zip(alone, blocks, strict=True)]
        found[str(sizes)] = [far, share]
    return found


#: Two latent frames of two.
FRAMES_OF_CHUNK = 4


@pytest.mark.full
def test_streams_together_over_data_are_those_alone():
    """One level of 255 is a rounding at the edge of a pixel's. Over tensor nearly all weights are cut in two."""
    found = on_devices("test_generation_on_mesh", "_together", devices=4)
    assert all(max(far) <= 1 for far, _ in found.values()), found
    assert found["{'data': 2}"][1] == 1
    assert 0.5 < found["{'data': 2, 'tensor': 2}"][1] < 0.75


def _exchanged() -> dict[str, list]:
    """Collectives of a compiled chunk and of a step of a whole video: kinds, and the sizes of what is gathered in the
    loop over blocks."""
    folder, found = write_teacher(Path(tempfile.mkdtemp())), {}
    for name, sizes in {"chunk": {"tensor": 2}, "step": {"context": 2}}.items():
        pipe = _pipe(folder, mesh=_mesh(sizes))
        session = pipe.session(pipe.settings(num_frames=FRAMES))
        text, steps = session.embed(pipe.text, ["a red square"], "dull"), session.settings.steps()
        with session.computing():
            if name == "chunk":
                given = session.init_state(1), *session.devices.replicate((video_keys(0, count=1),))
                program = programs.denoise_chunk.lower(
                    session.weights,
                    *given,
                    session.precompute_text_kv(text),
                    jnp.int32(0),
                    steps,
                    Condition(),
                    graph=session.graph,
                    shape=session.chunk_shape,
                    sampler=session.sampler,
                )
            else:
                state = session.sampler.solver.init(jnp.zeros((1, *session.shape), jnp.float32))
                program = programs.denoise_step.lower(
                    session.weights,
                    jax.tree.map(jnp.asarray, state),
                    steps.at(0),
                    programs.Padded(text, 512),
                    Condition(),
                    graph=session.graph,
                    sampler=session.sampler,
                )
            text_of_program = program.compile().as_text()
        collectives = work(text_of_program, devices=2).collectives
        gathers = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(.*/while/", text_of_program)
        sizes = {int(np.prod([int(n) for n in each.split(",")])) for each in gathers}
        found[name] = [sorted({c.kind for c in collectives}), sorted(sizes)]
    return found


@pytest.fixture(scope="module")
def exchanged(measured):
    return measured["exchanged"]


@pytest.mark.full
def test_in_a_stream_cut_by_heads_no_weight_is_gathered(exchanged):
    """Products are summed where heads and hidden units meet; nothing else moves."""
    assert exchanged["chunk"] == [["all-reduce"], []]


@pytest.mark.full
def test_converted_blocks_gather_weights_and_no_activations(exchanged):
    """What crosses time are the overlap and the states, by permutes; a layer's matrices are gathered, of 24 x 24, 24 x
    32 and 12 x 24 or 24 x 24 of two heads. Tokens and their keys would be 2 x 32 x 24 numbers."""
    kinds, gathered = exchanged["step"]
    assert "collective-permute" in kinds
    assert "all-to-all" not in kinds
    assert gathered
    assert set(gathered) <= {WAN_DIM * WAN_DIM, WAN_DIM * WAN_FFN, 2 * 12 * 24, 2 * 24 * 24}


def test_impossible_meshes_are_sentences():
    model, of_one = WanConfig.t2v_1_3b(), {"rows": 2, "devices": 8}

    def chosen_mesh(sizes, frames: int | None, hybrid=PUBLISHED) -> MeshConfig:
        return generation_mesh(MeshConfig(**sizes), model, hybrid=hybrid, latent_frames=frames, **of_one)

    with pytest.raises(ConfigError, match="12 heads do not divide by tensor = 8"):
        chosen_mesh({"tensor": 8, "fsdp": 1}, None)
    with pytest.raises(ConfigError, match="is 16 devices, and there are 8"):
        chosen_mesh({"data": 16, "fsdp": 1}, None)
    with pytest.raises(ConfigError, match="whole chunks of 3"):
        chosen_mesh({"context": 8, "fsdp": 1}, 21)
    # Both of guidance's evaluations, then time; a stream by heads.
    assert chosen_mesh({"automatic": True}, 21) == MeshConfig(fsdp=2, context=4)
    assert chosen_mesh({"automatic": True}, None) == MeshConfig(fsdp=1, context=2, tensor=4)
    assert chosen_mesh({"automatic": True}, 21, hybrid=None) == MeshConfig(fsdp=2, context=4)


@pytest.mark.parametrize(
    "command", [["generate", "a koala", "--out", "koala.mp4"], ["serve"], ["eval", "sprites"]], ids=lambda c: c[0]
)
def test_a_mesh_of_more_devices_than_there_are_is_one_sentence(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--mesh.tensor", "2"]) == 2
    assert "tensor 2 is 2 devices, and there are 1" in capsys.readouterr().err
