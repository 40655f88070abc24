"""Settings follow the model and the size: the authors' table, a folder's own word first, kept through convert."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from shared.checkpoint import save_tiny_checkpoint

from rehyat_jax.errors import ConfigError
from rehyat_jax.models.checkpoints import convert, describe
from rehyat_jax.models.folder import Defaults, read_defaults, read_scheduler
from rehyat_jax.models.wan.advice import NEGATIVE_PROMPT, advised
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.sampling import FlowSchedule, UniPC

SMALL, LARGE = WanConfig.t2v_1_3b(), WanConfig.t2v_14b()


@pytest.mark.parametrize(
    ("config", "width", "height", "shift", "guidance"),
    [
        # Wan-Video/Wan2.1 README: 1.3B 8 and 6; generate.py: 14B 5 and 5; its conversion at 480p: 3.
        (SMALL, 832, 480, 8.0, 6.0),
        (SMALL, 480, 832, 8.0, 6.0),
        (SMALL, 1280, 720, 8.0, 6.0),
        (LARGE, 1280, 720, 5.0, 5.0),
        (LARGE, 720, 1280, 5.0, 5.0),
        (LARGE, 960, 960, 5.0, 5.0),
        (LARGE, 832, 480, 3.0, 5.0),
        (LARGE, 480, 832, 3.0, 5.0),
        (LARGE, 624, 624, 3.0, 5.0),
        (LARGE, None, None, 5.0, 5.0),
        (SMALL, None, None, 8.0, 6.0),
    ],
)
def test_settings_follow_model_and_size(config, width, height, shift, guidance):
    advice = advised(config, width=width, height=height)
    assert (advice.shift, advice.guidance_scale) == (shift, guidance)
    assert (advice.num_inference_steps, advice.num_frames, advice.fps) == (50, 81, 16)
    assert advice.negative_prompt.startswith("色调艳丽，过曝，静态")
    assert advice.negative_prompt.endswith("倒着走")


def test_the_larger_models_own_size_is_720p():
    assert (advised(LARGE).width, advised(LARGE).height) == (1280, 720)
    assert (advised(SMALL).width, advised(SMALL).height) == (832, 480)


def release(folder, config=SMALL):
    """A release's folder, as far as its settings are read: the transformer's configuration and its tensors' names."""
    folder.mkdir()
    original = {
        "dim": config.dim,
        "num_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "ffn_dim": config.ffn_dim,
        "model_type": "t2v",
    }
    (folder / "config.json").write_text(json.dumps(original))
    save_file({"time_projection.1.bias": np.zeros(1, np.float32)}, folder / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.mark.parametrize(("config", "shift", "at_480p"), [(SMALL, 8.0, 8.0), (LARGE, 5.0, 3.0)])
def test_a_release_is_run_as_its_authors_run_it(config, shift, at_480p, tmp_path):
    folder = release(tmp_path / "release", config)
    defaults = read_defaults(folder)
    assert read_scheduler(folder) == (FlowSchedule(grid="official", shift=shift), UniPC())
    assert defaults.advised_schedule(height=480, width=832) == FlowSchedule(grid="official", shift=at_480p)
    assert defaults.guidance_scale == advised(config).guidance_scale
    assert (defaults.height, defaults.width) == (advised(config).height, advised(config).width)
    assert defaults.negative_prompt == NEGATIVE_PROMPT


def test_a_folders_own_word_comes_first(tmp_path):
    folder = release(tmp_path / "release", LARGE)
    (folder / "rehyat_defaults.json").write_text(json.dumps({"guidance_scale": 2, "height": 64, "width": 64}))
    assert (read_defaults(folder).guidance_scale, read_defaults(folder).height) == (2, 64)
    assert read_defaults(folder).num_inference_steps == 50
    save_tiny_checkpoint(tmp_path / "tiny", shift=4.0)
    assert read_scheduler(tmp_path / "tiny")[0] == FlowSchedule(grid="diffusers", shift=4.0)
    assert read_defaults(tmp_path / "tiny").advised_schedule(height=720, width=1280) is None
    # WanPipeline has no negative prompt of its own.
    assert read_defaults(tmp_path / "tiny").negative_prompt == ""


@pytest.mark.parametrize("change", [{"schedule": "mine"}, {"schedule": 3}, {"negative_prompt": 1}, {"model": 1}])
def test_settings_that_make_no_sense_are_named(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        Defaults.from_dict(change)


def test_settings_are_printed_and_kept_through_convert(tmp_path):
    """The diffusers layout without a scheduler stands for a release; written and read again, nothing changes."""
    save_tiny_checkpoint(tmp_path / "in")
    (tmp_path / "in" / "scheduler" / "scheduler_config.json").unlink()
    convert(tmp_path / "in", tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "again")
    for folder in ("in", "out", "again"):
        assert read_scheduler(tmp_path / folder) == (FlowSchedule(grid="official", shift=8.0), UniPC())
        assert read_defaults(tmp_path / folder) == read_defaults(tmp_path / "in")
        said = str(describe(tmp_path / folder))
        for word in ("832x480, 81 frames", "50 of UniPC", "guidance 6", "shift 8", "'official'", "色调艳丽", "1.3B"):
            assert word in said
    # And diffusers reads the same shift.
    config = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert config["flow_shift"] == 8.0
