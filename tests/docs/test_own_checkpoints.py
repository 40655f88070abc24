"""The pages on a Wan checkpoint of one's own followed line by line, in their order, by a reader whose checkpoints have
the published files' layouts and names, and networks of a few thousand random numbers."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from diffusers import UniPCMultistepScheduler, WanPipeline
from PIL import Image
from safetensors.torch import save_file
from shared.checkpoint import tiny_tokenizer
from shared.families import tiny_ti2v
from shared.lora import everywhere, random_lora, written
from shared.pages import PAGES, console
from shared.taehv import taehv_tensors
from shared.weights import release_networks, write_few_step_file, write_release

from rehyat_jax import cli
from rehyat_jax.video.io import write_video

pytestmark = pytest.mark.full

#: What a folder of tiny networks says of itself; the published ones have the authors' sizes.
DEFAULTS = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2}
_MODEL = "--model.num-layers 2 --model.num-attention-heads 2 --model.ffn-dim 48 --model.text-dim 32 --model.freq-dim 32"
_VIDEOS = "--sources.0.height 32 --sources.0.width 32 --sources.0.batch 1 --held-out 1 --steps 1 --updates-per-point 1"
_CLIPS = "--buckets.0.frames 9 --buckets.0.batch 1 --steps 1"
#: What a line is given more, by its beginning (the longest that fits), so that the published sizes become the tiny
#: ones': the last word on an option counts.
SMALLER = {
    "rehyat distill wan_1_3b_distill --teacher self-forcing": f"--sources.0.frames 21 {_VIDEOS} {_MODEL}",
    "rehyat distill wan_1_3b_distill": f"--sources.0.frames 9 --num-inference-steps 2 {_VIDEOS} {_MODEL}",
    "rehyat finetune wan_1_3b_finetune": f"{_CLIPS} {_MODEL}",
    "rehyat prepare": "--frames 9 --size 32x32",
}
#: Other models' trainings (`train/test_images_and_experts.py`), the bundled model's evaluation, servers
#: (`serve/test_process.py`).
ELSEWHERE = ("wan_i2v_14b", "wan_a14b", "rehyat eval sprites", "rehyat serve", "mini-sprites", "koala", "lemon")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """What a reader has downloaded."""
    folder, networks = tmp_path_factory.mktemp("home"), release_networks()
    for name in ("Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B"):
        write_release(folder / name, networks)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    whole = WanPipeline(tokenizer=tiny_tokenizer(), scheduler=scheduler, **networks)
    whole.save_pretrained(folder / "Wan2.1-T2V-1.3B-Diffusers")
    tiny_ti2v(folder / "Wan2.2-TI2V-5B")
    for model in folder.iterdir():
        (model / "rehyat_defaults.json").write_text(json.dumps(DEFAULTS))
    write_few_step_file(networks["transformer"], folder / "self_forcing_dmd.pt")
    save_file(taehv_tensors(z_dim=16, patch=1), folder / "taew2_1.safetensors")
    shapes = {name: tensor.shape for name, tensor in networks["transformer"].state_dict().items()}
    for seed, name in enumerate(("style", "other")):
        file, _ = written("ComfyUI", random_lora(shapes, everywhere(2), seed=seed), folder / "loras" / name)
        shutil.copy(file, folder / f"{name}.safetensors")
    Image.fromarray(np.full((48, 64, 3), 99, np.uint8)).save(folder / "face.png")
    (folder / "prompts.txt").write_text("a red fox\na blue bird\n")
    (folder / "videos").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (9, 32, 32, 3), np.uint8)
        write_video(folder / "videos" / f"{number}.mp4", pixels, fps=16)
        (folder / "videos" / f"{number}.txt").write_text("a red fox\n")
    return folder


def follow(line: str) -> None:
    if not line.startswith("rehyat "):
        subprocess.run(["bash", "-ec", line], check=True)
        return
    more = max((start for start in SMALLER if line.startswith(start)), key=len, default="")
    words = [os.path.expanduser(word) for word in shlex.split(f"{line} {SMALLER.get(more, '')}")]
    assert cli.main(words[1:]) == 0, line


def lines(name: str) -> list[str]:
    page = next(page for page in PAGES if page.stem == name)
    return [line for line in console(page) if not any(word in line for word in ELSEWHERE)]


def test_every_line_makes_what_it_says(home, tmp_path, monkeypatch):
    """In one folder, in which what the reader was told to have lies: pages do not stand in each other's way."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    for brought in [*home.glob("*.safetensors"), *home.glob("*.p[nt]*"), home / "prompts.txt"]:
        shutil.copy(brought, tmp_path)
    shutil.copytree(home / "videos", tmp_path / "videos")
    for line in lines("convert"):
        follow(line)
    for video in ("fox", "few", "stream", "smile"):
        assert Path(f"{video}.mp4").exists(), video
    # What the next pages call by other names.
    shutil.copytree("out/wan-1.3b-distilled", home / "distilled")
    shutil.copytree("out/wan-1.3b-student", home / "wan-student")
    for line in lines("lora"):
        follow(line)
    for video in ("styled", "int8", "int8-most", "little"):
        assert Path(f"{video}.mp4").exists(), video
    assert (home / "student" / "transformer" / "rehyat").is_dir()
    for line in lines("stream"):
        if "5b" not in line:
            follow(line)
    assert Path("preview.mp4").exists()
