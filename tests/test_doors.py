"""One rule at every door of Python: an argument error is a RehyatError that names the argument, what was given and what
is accepted. Types are not checked on the way as they are in other tests."""

import jaxtyping
import numpy as np
import pytest
from shared.training import write_teacher

import rehyat_jax as rj
from rehyat_jax.errors import RehyatError

#: How it is called, and the beginning of what is said.
CASES = {
    "pipe(5)": "prompt must be a text or a list of texts that is not empty, not 5",
    "pipe([])": "prompt must be a text or a list of texts that is not empty, not []",
    "pipe(None)": "prompt must be a text or a list of texts that is not empty, not None",
    "pipe('a', **SMALL, negative_prompt=['b'])": "negative_prompt must be a text, not ['b']",
    "pipe('a', num_frames='5')": "num_frames must be a whole number from 1 to",
    "pipe('a', num_frames=5.0)": "num_frames must be a whole number from 1 to",
    "pipe('a', height=np.float32(64))": "height must be a whole number from 1 to",
    "pipe('a', width=True)": "width must be a whole number from 1 to",
    "pipe('a', num_frames=5, num_inference_steps=2.5)": "num_inference_steps must be a whole number of 1 or more, not",
    "pipe('a', num_frames=5, guidance_scale='a')": "guidance_scale must be a finite number, not 'a'",
    "pipe('a', num_frames=5, guidance_scale=float('nan'))": "guidance_scale must be a finite number, not nan",
    "pipe('a', **SMALL, seed='7')": "seed must be a whole number from 0 to 4294967295, not '7'",
    "pipe('a', **SMALL, seed=2**64)": "seed must be a whole number from 0 to 4294967295, not 184467",
    "pipe('a', **SMALL, seed=2**32)": "seed must be a whole number from 0 to 4294967295, not 4294967296",
    "pipe('a', **SMALL, seed=-1)": "seed must be a whole number from 0 to 4294967295, not -1",
    "pipe('a', **SMALL, output='gif')": "output must be uint8 or float, not 'gif'",
    "pipe('a', **SMALL, noise='x')": "noise must be an array, not 'x'",
    "pipe('a', **SMALL, schedule='x')": "schedule must be a FlowSchedule, not 'x'",
    "pipe('a', **SMALL, solver=3)": "solver must be a solver as Euler() or UniPC(), not 3",
    "pipe('a', **SMALL, on_step=5)": "on_step must be a function of a phase, the steps done and those in all, not 5",
    "pipe('a', **SMALL, on_latents=5)": "on_latents must be a function of latents that are seen, not 5",
    "pipe.open_stream('a', on_latents=5)": "on_latents must be a function of latents that are seen, not 5",
    "pipe.decode(np.zeros((4, 4, 16)))": "latents must be an array [B, T, h, w, z], not array(",
    "rj.TextToVideo.from_pretrained('mini-sprites', decoder=5)": "decoder must be a path, not 5",
    "pipe.open_stream('a', first_chunk_steps='3')": "first_chunk_steps must be a whole number of 1 or more, not '3'",
    "pipe.open_stream('a', first_chunk_steps=0)": "first_chunk_steps must be a whole number of 1 or more, not 0",
    "pipe.open_stream('a', beginning=5)": "beginning must be an array of frames, or a video's path, not 5",
    "stream.save(5)": "folder must be a path, not 5",
    "rj.TextToVideo.from_pretrained('mini-sprites', cache_dir=5)": "cache_dir must be a path, not 5",
    "rj.TextToVideo.from_pretrained('mini-sprites', repair_prompts='no')": "repair_prompts must be True or False, not",
    "rj.TextToVideo.from_pretrained('mini-sprites', loras='a.safetensors')": "loras must be a list of LoRAs, not 'a.sa",
    "rj.write_video(OUT, np.zeros((2, 16, 16, 3)))": "frames must be uint8 [F, H, W, 3], not float64 [2, 16, 16, 3]",
    "rj.write_video(OUT, [5])": "frames must be uint8 [F, H, W, 3], not 5",
    "rj.write_video(5, np.zeros((2, 16, 16, 3), np.uint8))": "path must be a path, not 5",
    "rj.read_video(5)": "path must be a path, not 5",
    "pipe.open_stream(5)": "prompt must be a text or a list of texts that is not empty, not 5",
    "pipe.open_stream('a', seed=1.5)": "seed must be a whole number from 0 to",
    "pipe.open_stream('a', remember='x')": 'remember must be "steps" or a noise level from 0 to below 1, not',
    "pipe.resume_stream(5)": "folder must be a path, not 5",
    "stream.change_prompt(5)": "prompt must be a text or a list of texts that is not empty, not 5",
    "stream.change_prompt('a', 5)": "negative_prompt must be a text, not 5",
    "stream.fork(seed='x')": "seed must be a whole number from 0 to",
    "rj.TextToVideo.from_pretrained('mini-sprites', dtype='bf16')": (
        "dtype must be float32 or bfloat16 or float16, not 'bf16'"
    ),
    "rj.TextToVideo.from_pretrained('mini-sprites', hybrid='3+1')": 'hybrid must be "auto", None or a HybridConfig',
    "rj.TextToVideo.from_pretrained(5)": "the model must be a path, not 5",
    "rj.TextToVideo.from_pretrained('~/no-such-model')": "there is no folder '~/no-such-model'",
    "rj.load_vae(5)": "path must be a path, not 5",
    "rj.load_vae('mini-sprites', dtype='bf16')": "dtype must be float32 or bfloat16 or float16, not 'bf16'",
}
#: What is accepted, and the shape that comes of it.
ACCEPTED = {
    "pipe('a', num_frames=np.int64(5), num_inference_steps=np.int32(1), guidance_scale=np.float32(1))": (5, 32, 32, 3),
    "pipe('a', **SMALL, seed=np.uint32(2**32 - 1))": (5, 32, 32, 3),
    "pipe('a', **SMALL, negative_prompt=None)": (5, 32, 32, 3),
    "pipe(('a', 'b'), **SMALL)": (2, 5, 32, 32, 3),
    "pipe('a', num_frames=5, num_inference_steps=1, guidance_scale=1)": (5, 32, 32, 3),
}


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict[str, object]:
    """What a case names."""
    folder = write_teacher(tmp_path_factory.mktemp("model"))
    pipe = rj.TextToVideo.from_pretrained(folder, hybrid=rj.HybridConfig(chunk_frames=1, overlap_frames=1))
    stream = pipe.open_stream("a", num_inference_steps=1, guidance_scale=1.0)
    small = {"num_frames": 5, "num_inference_steps": 1, "guidance_scale": 1.0}
    return {"rj": rj, "np": np, "pipe": pipe, "stream": stream, "OUT": "/nowhere/a.mp4", "SMALL": small}


@pytest.fixture(autouse=True)
def types_are_not_checked():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("case", CASES)
def test_arguments_that_are_wrong_are_named(names, case):
    with pytest.raises(RehyatError) as raised:
        eval(case, names)
    assert str(raised.value).startswith(CASES[case])


@pytest.mark.parametrize("case", ACCEPTED)
def test_arguments_of_any_library_are_taken(names, case):
    assert eval(case, names).shape == ACCEPTED[case]
