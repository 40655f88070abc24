"""The table of names against diffusers, transformers and the official naming, at full size and without memory."""

import re

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.tiers import examples
from transformers import UMT5Config, UMT5EncoderModel

from rehyat_jax.errors import CheckpointError
from rehyat_jax.models import checkpoints
from rehyat_jax.models.umt5.config import TextEncoderConfig
from rehyat_jax.models.umt5.rows import UMT5
from rehyat_jax.models.wan.config import VAEConfig, WanConfig
from rehyat_jax.models.wan.rows import TRANSFORMER, transformer_rows
from rehyat_jax.weights.plan import parameters
from rehyat_jax.weights.registry import REGISTRY, holdings, kinds
from rehyat_jax.weights.rows import renamed, torch_shape

assert checkpoints  # registers the networks
DIALECTS = ("diffusers", "original")
#: Tensors of one block and of the ends: 27 and 15 in the published T2V-1.3B, which has 825 in all.
SIZES = {
    "1.3B": (WanConfig.t2v_1_3b(), 825),
    "14B": (WanConfig.t2v_14b(), 40 * 27 + 15),
    "TI2V-5B": (WanConfig.ti2v_5b(), 825),
    "I2V-14B": (WanConfig.i2v_14b(), 40 * 32 + 23),
    "FLF2V-14B": (WanConfig.flf2v_14b(), 40 * 32 + 24),
    "I2V-A14B": (WanConfig.i2v_a14b(), 40 * 27 + 15),
}


def named_shapes(component, config, dialect):
    """The file's names and shapes, from our abstract module through the table."""
    module = REGISTRY[component].abstract(config, "float32")
    shapes = {path: leaf.get_value().shape for path, leaf in parameters(nnx.state(module)).items()}
    result = {}
    for row in REGISTRY[component].rows(config):
        shape = shapes.pop(row.ours)
        for layer in range(shape[0]) if row.stacked else [None]:
            result[row.name(dialect, layer)] = torch_shape(shape[1:] if row.stacked else shape, row.layout)
    assert not shapes
    return result


def torch_shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def on_meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("size", SIZES)
def test_transformer_names_and_shapes_are_diffusers(size):
    config, count = SIZES[size]
    with torch.device("meta"):
        theirs = WanTransformer3DModel.from_config(config.to_dict())
    assert named_shapes("transformer", config, "diffusers") == torch_shapes(theirs.state_dict())
    assert len(theirs.state_dict()) == count


@pytest.mark.parametrize("size", SIZES)
def test_original_transformer_names_are_those_that_diffusers_converts(size):
    config, count = SIZES[size]
    original = named_shapes("transformer", config, "original")
    assert len(original) == count
    # diffusers' conversion on loading leaves this one; its script renames it.
    two_images = original.pop("img_emb.emb_pos", None)
    converted = convert_wan_transformer_to_diffusers(on_meta(original))
    if two_images is not None:
        converted |= on_meta({"condition_embedder.image_embedder.pos_embed": two_images})
    assert torch_shapes(converted) == named_shapes("transformer", config, "diffusers")


def test_original_transformer_names_are_the_published_ones():
    """``WanModel``'s attributes in Wan-Video/Wan2.1 ``wan/modules/model.py``, 1.3B."""
    shapes = named_shapes("transformer", WanConfig.t2v_1_3b(), "original")
    published = {
        "patch_embedding.weight": (1536, 16, 1, 2, 2),
        "text_embedding.0.weight": (1536, 4096),
        "text_embedding.2.weight": (1536, 1536),
        "time_embedding.0.weight": (1536, 256),
        "time_embedding.2.bias": (1536,),
        "time_projection.1.weight": (9216, 1536),
        "head.modulation": (1, 2, 1536),
        "head.head.weight": (64, 1536),
        "blocks.29.modulation": (1, 6, 1536),
        "blocks.29.norm3.weight": (1536,),
        "blocks.29.norm3.bias": (1536,),
        "blocks.29.ffn.0.weight": (8960, 1536),
        "blocks.29.ffn.2.weight": (1536, 8960),
        **{f"blocks.0.{a}_attn.{p}.weight": (1536, 1536) for a in ("self", "cross") for p in "qkvo"},
        **{f"blocks.0.{a}_attn.norm_{p}.weight": (1536,) for a in ("self", "cross") for p in "qk"},
    }
    assert published.items() <= shapes.items()


@pytest.mark.parametrize("config", [VAEConfig.wan(), VAEConfig.wan22()], ids=["Wan2.1", "Wan2.2"])
def test_vae_names_and_shapes_are_diffusers_and_the_published_ones(config):
    with torch.device("meta"):
        theirs = AutoencoderKLWan.from_config(config.to_dict())
    diffusers, original = (named_shapes("vae", config, dialect) for dialect in DIALECTS)
    assert diffusers == torch_shapes(theirs.state_dict())
    assert torch_shapes(_vae_by_diffusers(on_meta(original))) == diffusers


def _vae_by_diffusers(original):
    """diffusers knows Wan2.1's names on loading; Wan2.2's are in its ``scripts/convert_wan_to_diffusers.py``, whose
    rules these are."""
    if "encoder.downsamples.0.downsamples.0.residual.0.gamma" not in original:
        return convert_wan_vae_to_diffusers(original)
    ends = {
        "conv1.": "quant_conv.", "conv2.": "post_quant_conv.",
        "encoder.conv1.": "encoder.conv_in.", "decoder.conv1.": "decoder.conv_in.",
        "encoder.head.0.": "encoder.norm_out.", "encoder.head.2.": "encoder.conv_out.",
        "decoder.head.0.": "decoder.norm_out.", "decoder.head.2.": "decoder.conv_out.",
        **{f"{side}.middle.{i}.": f"{side}.mid_block.{ours}."
           for side in ("encoder", "decoder") for i, ours in enumerate(("resnets.0", "attentions.0", "resnets.1"))},
    }  # fmt: skip
    inner = {"residual.0.": "norm1.", "residual.2.": "conv1.", "residual.3.": "norm2.", "residual.6.": "conv2."}
    inner |= {"shortcut.": "conv_shortcut."}
    converted = {}
    for name, tensor in original.items():
        short = next((new + name.removeprefix(old) for old, new in ends.items() if name.startswith(old)), name)
        for side, down, sampler in (("encoder", "down", "downsampler"), ("decoder", "up", "upsampler")):
            group = rf"{side}\.{down}samples\.(\d+)\.{down}samples\.(\d+)\."
            short = re.sub(group + r"(resample\.1|time_conv)", rf"{side}.{down}_blocks.\1.{sampler}.\3", short)
            short = re.sub(group, rf"{side}.{down}_blocks.\1.resnets.\2.", short)
        for old, new in inner.items():
            short = short.replace(f".{old}", f".{new}")
        converted[short] = tensor
    return converted


def test_umt5_xxl_names_and_shapes_are_transformers():
    with torch.device("meta"):
        theirs = UMT5EncoderModel(UMT5Config(**TextEncoderConfig.umt5_xxl().to_dict()))
    shapes = named_shapes("text_encoder", TextEncoderConfig.umt5_xxl(), "diffusers")
    # The second name of the tied embedding.
    assert shapes | {"encoder.embed_tokens.weight": (256384, 4096)} == torch_shapes(theirs.state_dict())


def test_umt5_original_names_are_the_published_ones():
    """``T5Encoder(shared_pos=False)``'s attributes in Wan-Video/Wan2.1 ``wan/modules/t5.py``: all of them."""
    block = {
        "norm1.weight": (4096,),
        "attn.q.weight": (4096, 4096),
        "attn.k.weight": (4096, 4096),
        "attn.v.weight": (4096, 4096),
        "attn.o.weight": (4096, 4096),
        "norm2.weight": (4096,),
        "ffn.gate.0.weight": (10240, 4096),
        "ffn.fc1.weight": (10240, 4096),
        "ffn.fc2.weight": (4096, 10240),
        "pos_embedding.embedding.weight": (32, 64),
    }
    published = {f"blocks.{layer}.{name}": shape for layer in range(24) for name, shape in block.items()}
    published |= {"token_embedding.weight": (256384, 4096), "norm.weight": (4096,)}
    assert named_shapes("text_encoder", TextEncoderConfig.umt5_xxl(), "original") == published


def test_gate_is_the_activated_half_in_both_dialects():
    """transformers: gelu(wi_0 x) * wi_1 x; official: fc1 x * gelu(gate x)."""
    (gate,) = renamed("blocks.3.ffn.gate.0.weight", UMT5, "original", "diffusers")
    assert gate.endswith("DenseReluDense.wi_0.weight")
    (other,) = renamed("blocks.3.ffn.fc1.weight", UMT5, "original", "diffusers")
    assert other.endswith("DenseReluDense.wi_1.weight")


def test_float32_rows_are_those_that_diffusers_keeps():
    kept = WanTransformer3DModel._keep_in_fp32_modules
    for row in transformer_rows(WanConfig.flf2v_14b()):
        assert row.float32 == any(part in kept for part in row.name("diffusers").split(".")), row


@pytest.mark.parametrize(
    "rows",
    [
        transformer_rows(WanConfig.flf2v_14b()),
        UMT5,
        REGISTRY["vae"].rows(VAEConfig()),
        REGISTRY["vae"].rows(VAEConfig.wan22()),
    ],
    ids=["transformer", "umt5", "vae", "vae2.2"],
)
@settings(deadline=None, max_examples=examples(40), derandomize=True)
@given(data=st.data(), layer=st.integers(0, 10_000))
def test_translation_there_and_back(rows, data, layer):
    row = data.draw(st.sampled_from(rows))
    number = layer if row.stacked else None
    there = renamed(row.name("diffusers", number), rows, "diffusers", "original")[0]
    assert there == row.name("original", number)
    assert renamed(there, rows, "original", "diffusers")[0] == row.name("diffusers", number)


@pytest.mark.parametrize(
    "name",
    [
        "modulation",
        "head.modulation.x",
        "xhead.modulation",
        "blocks.0.head.modulation",
        "blocks.01.modulation",
        "blocks.-1.modulation",
        "blocks..modulation",
        "blocks.1.2.modulation",
        "blocks.0xmodulation",
        "blocks.0.modulation\n",
        "blocks.٣.modulation",
        "",
    ],
)
def test_patterns_are_anchored(name):
    assert renamed(name, TRANSFORMER, "original", "diffusers") == ()


def test_no_name_means_two_things():
    for rows in (TRANSFORMER, UMT5, *(REGISTRY["vae"].rows(config) for config in (VAEConfig(), VAEConfig.wan22()))):
        for names in ([row.ours for row in rows], *([row.name(each) for row in rows] for each in DIALECTS)):
            assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("blocks.0.modulation", "blocks.0.modulation"),
        ("model.diffusion_model.blocks.0.modulation", "blocks.0.modulation"),
        ("generator_ema.model.blocks.0.modulation", "blocks.0.modulation"),
        ("module.model.head.head.weight", "head.head.weight"),
        ("model._fsdp_wrapped_module.blocks.3._fsdp_wrapped_module.ffn.0.weight", "blocks.3.ffn.0.weight"),
        ("_orig_mod.scale_shift_table", "scale_shift_table"),
        ("encoder.block.0.layer.0.layer_norm.weight", "encoder.block.0.layer.0.layer_norm.weight"),
    ],
)
def test_prefixes_are_stripped(raw, clean):
    # With a name that tells the network, under the same prefix.
    prefix = raw[: -len(clean)] if raw.endswith(clean) else "model._fsdp_wrapped_module."
    telling = {"encoder": "shared.weight", "scale_shift_table": "condition_embedder.time_proj.bias"}
    names = [raw, prefix + telling.get(clean.split(".")[0], "time_projection.1.bias")]
    (found,) = holdings(names).values()
    assert found.names[clean] == raw
    assert len(found.names) == 2


def test_the_running_average_is_taken_where_there_is_one():
    a = "head.head.weight"
    names = [f"generator.model.{a}", f"generator_ema.model.{a}", f"critic.model.{a}", "step"]
    assert holdings(names)["transformer"].names == {a: f"generator_ema.model.{a}"}
    assert holdings([names[0], *names[2:]])["transformer"].names == {a: f"generator.model.{a}"}


def test_two_names_for_one_tensor_are_refused():
    with pytest.raises(CheckpointError, match=re.escape("'head.head.weight' and 'model.head.head.weight'")):
        holdings(["head.head.weight", "model.head.head.weight"])


@pytest.mark.parametrize(
    ("component", "config"), [(each.name, config) for each in kinds() for config in each.known_by()]
)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_network_is_recognised_and_no_prefix_is_part_of_a_name(component, config, dialect):
    def named(dialect):
        return [row.name(dialect, 0 if row.stacked else None) for row in REGISTRY[component].rows(config)]

    names = named(dialect)
    ((name, found),) = holdings(names).items()
    # Where two dialects name everything alike, it is the first of them.
    alike = next(each.name for each in REGISTRY[component].dialects if named(each.name) == names)
    assert (name, found.dialect.name) == (component, alike)
    assert found.names == {name: name for name in names}
