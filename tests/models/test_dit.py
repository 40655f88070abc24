"""The transformer against diffusers' ``WanTransformer3DModel`` on the same random weights, then its own promises."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from flax import nnx
from safetensors.numpy import load_file
from shared import tiers
from shared.wan import TINY, Case, abstract, by_diffusers, by_us, inputs, ported, reference, relative, scans

from rehyat_jax.errors import RehyatError
from rehyat_jax.models.checkpoints import save_transformer
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.positions import rotary_embedding
from rehyat_jax.models.wan.transformer import WanTransformer

CASES = {
    "as_wan": Case(
        WanConfig(num_layers=3, num_attention_heads=3, attention_head_dim=22, ffn_dim=95, text_dim=24, freq_dim=64),
        (5, 6, 14),
        7,
        (999.0, 371.28),
    ),
    "patches_of_one_pixel": Case(
        dataclasses.replace(TINY, num_attention_heads=5, in_channels=3, out_channels=5, patch_size=(1, 1, 1)),
        (3, 5, 7),
        1,
        (0.0, 1000.0, 0.125),
    ),
    "patches_in_time": Case(
        WanConfig(
            num_layers=2,
            num_attention_heads=1,
            attention_head_dim=64,
            ffn_dim=50,
            in_channels=7,
            out_channels=2,
            text_dim=31,
            freq_dim=256,
            patch_size=(2, 1, 3),
            eps=1e-5,
        ),
        (6, 5, 9),
        20,
        (634.73,),
    ),
    "one_frame_many_heads": Case(
        dataclasses.replace(TINY, num_layers=1, num_attention_heads=4, attention_head_dim=22),
        (1, 2, 10),
        13,
        (17.0, 936.5, 936.51, 1.0),
    ),
    "bundled": Case(dataclasses.replace(WanConfig.mini_sprites(), num_layers=2), (3, 6, 4), 20, (500.0, 250.4)),
}


def test_zeros_after_a_text_cost_one_token(tmp_path):
    """diffusers on a text padded to 512 tokens, ours on the text itself: 1e-4 absolute; a longer text is refused."""
    case = next(iter(CASES.values()))
    model, (latents, times, text) = reference(case.config, seed=0), inputs(case)
    theirs = by_diffusers(model, latents, times, np.pad(text, ((0, 0), (0, 512 - case.text), (0, 0))))
    assert relative(by_diffusers(model, latents, times, text), theirs) > 0.01
    ours = ported(model, tmp_path)
    mine = nnx.jit(lambda model, *given: model(*given, text_tokens=512))(ours, latents, times, text)
    np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=0)
    with pytest.raises(RehyatError, match="does not fit"):
        ours(*map(jnp.asarray, (latents, times, text)), text_tokens=case.text - 1)


@pytest.mark.parametrize("name", tiers.breadth(CASES, test=2))
def test_agrees_with_diffusers(name, tmp_path):
    """1e-4 absolute on activations of order one, in float32."""
    case = CASES[name]
    model = reference(case.config, seed=len(name))
    arguments = inputs(case)
    theirs = by_diffusers(model, *arguments)
    assert 0.3 < theirs.std() < 3
    np.testing.assert_allclose(by_us(ported(model, tmp_path), *arguments), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["as_wan", tiers.full("patches_of_one_pixel")])
def test_each_frame_may_have_a_time_of_its_own(name, tmp_path):
    """diffusers with a time for each token, as Wan2.2's 5B has it: 1e-4 absolute; one for all frames as one alone."""
    case = CASES[name]
    model = reference(case.config, seed=3)
    latents, times, text = inputs(case)
    frames, tokens = case.sizes[0], np.prod([s // p for s, p in zip(case.sizes, case.config.patch_size, strict=True)])
    each = np.random.default_rng(3).uniform(0, 1000, (len(times), frames)).astype(np.float32)
    theirs = by_diffusers(model, latents, np.repeat(each, tokens // frames, axis=1), text)
    assert relative(by_diffusers(model, latents, times, text), theirs) > 0.01
    ours = ported(model, tmp_path)
    np.testing.assert_allclose(by_us(ours, latents, each, text), theirs, atol=1e-4, rtol=0)
    alike = by_us(ours, latents, np.repeat(times[:, None], frames, axis=1), text)
    np.testing.assert_allclose(alike, by_us(ours, latents, times, text), atol=1e-5, rtol=0)
    with pytest.raises(RehyatError, match="cannot have times"):
        ours(*map(jnp.asarray, (latents, each[:, :-1], text)))


def test_gradients_agree_with_diffusers(tmp_path):
    """Of every parameter, exported under diffusers' names: 1e-4 of each tensor's norm, in float32.

    Keys' biases are left out: softmax hardly sees them, and their gradient is rounding.
    """
    case = CASES["as_wan"]
    model = reference(case.config, seed=1)
    ours = ported(model, tmp_path)
    latents, times, text = inputs(case)
    direction = np.random.default_rng(1).standard_normal((*latents.shape[:4], 16), np.float32)
    out = model(
        torch.from_numpy(latents).permute(0, 4, 1, 2, 3),
        torch.from_numpy(times),
        torch.from_numpy(text),
        return_dict=False,
    )[0]
    (out.permute(0, 2, 3, 4, 1) * torch.from_numpy(direction)).sum().backward()

    gradient = nnx.jit(nnx.grad(lambda m: jnp.sum(m(*map(jnp.asarray, (latents, times, text))) * direction)))(ours)
    save_transformer(nnx.merge(nnx.graphdef(ours), gradient), tmp_path / "gradients")
    found = load_file(tmp_path / "gradients" / "diffusion_pytorch_model.safetensors")
    wanted = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    assert found.keys() == wanted.keys()
    errors = {name: relative(found[name], wanted[name]) for name in wanted if not name.endswith("to_k.bias")}
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.full
def test_one_block_of_wan_1_3b(tmp_path):
    """Width 1536, 12 heads of 128, feed-forward 8960, 512 text tokens: 2e-4 relative on what the block adds."""
    config = WanConfig(num_layers=1, text_dim=8, freq_dim=8)
    model = reference(config, seed=0)
    graph, layers = nnx.split(ported(model, tmp_path).blocks)
    block = nnx.merge(graph, jax.tree.map(lambda x: x[0], layers))
    rng = np.random.default_rng(0)
    x, text, modulation = (rng.standard_normal((1, n, 1536), np.float32) for n in (3 * 5 * 7, 512, 6))
    modulation *= 0.5
    with torch.no_grad():
        rotary = model.rope(torch.zeros(1, 16, 3, 10, 14))
        theirs = model.blocks[0](*map(torch.from_numpy, (x, text, modulation)), rotary).numpy()
    modulation = modulation[:, None]
    ours = np.asarray(block(*map(jnp.asarray, (x, text, modulation)), rotary_embedding(128, jnp.arange(3), 5, 7)))
    assert relative(ours - x, theirs - x) < 2e-4


@pytest.mark.parametrize("dtype", tiers.breadth(["bfloat16", "float16"]))
def test_half_precision_is_as_near_to_float32_as_diffusers_is(dtype, tmp_path):
    """bf16 keeps 8 bits, each rounding an rms of 2^-9/√3 relative; some thirty in a row make 0.6 %, and 3 % is five
    times that (float16: three bits more, an eighth). Nor may it be worse than diffusers' own half precision by more
    than chance.
    """
    case = CASES["as_wan"]
    model = reference(case.config, seed=2)
    arguments = inputs(case)
    exact = by_diffusers(model, *arguments)
    ours = ported(model, tmp_path, dtype=jnp.dtype(dtype))
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "theirs", torch_dtype=getattr(torch, dtype))
    error = relative(by_us(ours, *arguments), exact)
    assert error < {"bfloat16": 0.03, "float16": 0.004}[dtype]
    assert error < 1.3 * relative(by_diffusers(theirs, *arguments), exact)


def test_what_wan_keeps_in_float32_under_bf16(tmp_path):
    """Parameters by diffusers' ``_keep_in_fp32_modules``; of the computation: sums, roots, softmax, sinusoids."""
    case = CASES["as_wan"]
    model = ported(reference(case.config, seed=3), tmp_path, dtype=jnp.bfloat16)
    kept = {
        ".".join(map(str, path))
        for path, leaf in nnx.to_flat_state(nnx.state(model))
        if leaf.get_value().dtype == jnp.float32
    }
    assert kept == {
        "scale_shift_table",
        "blocks.scale_shift_table",
        "blocks.norm2.scale",
        "blocks.norm2.bias",
        *(f"condition_embedder.time_embedder.linear_{i}.{part}" for i in (1, 2) for part in ("kernel", "bias")),
    }
    program = str(jax.make_jaxpr(model)(*inputs(case)))
    for operation in ("rsqrt", "exp", "cos", "sin", "reduce_sum"):
        lines = [line for line in program.splitlines() if f"= {operation}[" in line or f"= {operation} " in line]
        assert lines, operation
        assert all(":f32[" in line for line in lines), lines


def test_padding_of_the_text_is_attended_to_as_in_diffusers(tmp_path):
    """Wan pads the text with zeros to 512 tokens and masks nothing: equal to diffusers there (1e-4), and not the same
    as without padding."""
    case = dataclasses.replace(CASES["as_wan"], text=512)
    model = reference(case.config, seed=4)
    ours = ported(model, tmp_path)
    latents, times, text = inputs(case)
    text[:, 11:] = 0
    padded = by_us(ours, latents, times, text)
    np.testing.assert_allclose(padded, by_diffusers(model, latents, times, text), atol=1e-4, rtol=0)
    assert np.abs(padded - by_us(ours, latents, times, text[:, :11])).max() > 0.05


def test_samples_of_a_batch_do_not_meet(tmp_path):
    """Each alone as in company, to the rounding of sums taken in another order: 1e-5."""
    case = CASES["one_frame_many_heads"]
    model = ported(reference(case.config, seed=5), tmp_path)
    arguments = inputs(case)
    together = by_us(model, *arguments)
    for i in range(len(case.times)):
        np.testing.assert_allclose(by_us(model, *(x[i : i + 1] for x in arguments))[0], together[i], atol=1e-5, rtol=0)


def test_whole_timesteps_are_the_fractional_ones(tmp_path):
    case = dataclasses.replace(CASES["as_wan"], times=(999.0, 37.0))
    model = ported(reference(case.config, seed=6), tmp_path)
    latents, times, text = inputs(case)
    whole = by_us(model, latents, times.astype(np.int32), text)
    np.testing.assert_array_equal(whole, by_us(model, latents, times, text))


@pytest.mark.parametrize("config", [WanConfig.t2v_1_3b(), WanConfig.t2v_14b()], ids=["1.3B", "14B"])
def test_published_sizes_without_memory(config):
    """As many parameters as diffusers' model on the meta device, and none of them allocated."""
    state = nnx.state(abstract(config), nnx.Param)
    leaves = jax.tree.leaves(state)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    with torch.device("meta"):
        theirs = WanTransformer3DModel.from_config(config.to_dict())
    assert sum(leaf.size for leaf in leaves) == sum(p.numel() for p in theirs.parameters())


def test_layers_are_one_scan():
    """The program is traced once a block: its size does not grow with depth."""
    sizes = []
    for depth in (2, 7):
        case = dataclasses.replace(CASES["as_wan"], config=dataclasses.replace(TINY, num_layers=depth))
        graph, state = nnx.split(abstract(case.config))
        program = jax.make_jaxpr(lambda p, *x, graph=graph: nnx.merge(graph, p)(*x))(state, *inputs(case)).jaxpr
        assert scans(program) == [depth]
        sizes.append(len(str(program).splitlines()))
    assert sizes[0] == sizes[1]


def test_starts_by_predicting_nothing():
    """Wan's initialisation: the last projection is zero, every other matrix is not."""
    model = nnx.jit(lambda: WanTransformer(TINY, rngs=nnx.Rngs(0)))()
    case = Case(TINY, (2, 4, 6), 5, (300.0,))
    assert not by_us(model, *inputs(case)).any()
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] in ("kernel", "scale_shift_table") and path[0] != "proj_out":
            assert leaf.get_value().std() > 0, path
    layers = model.blocks.attn1.to_q.kernel.get_value()
    assert not np.array_equal(layers[0], layers[1])


@pytest.mark.parametrize("sizes", [(3, 4, 6), (2, 3, 6), (2, 4, 7)])
def test_indivisible_sizes_are_named(sizes):
    config = dataclasses.replace(TINY, patch_size=(2, 2, 3))
    model = abstract(config)
    with pytest.raises(RehyatError) as raised:
        model(*map(jnp.asarray, inputs(Case(config, sizes, 3, (1.0,)))))
    sentence = str(raised.value)
    assert all(str(size) in sentence for size in sizes)
    assert "(2, 2, 3)" in sentence
    assert "\n" not in sentence


def test_a_video_longer_than_the_table_of_positions(tmp_path):
    """diffusers' table ends at 1,024 positions; given a longer one it makes what ours makes by the formula: 1e-4."""
    config = dataclasses.replace(TINY, num_layers=1, patch_size=(1, 1, 1))
    case = Case(config, (1030, 1, 1), 4, (423.0,))
    model = reference(config, seed=7)
    longer = copy.deepcopy(model)
    longer.rope = type(model.rope)(config.attention_head_dim, config.patch_size, max_seq_len=2048)
    arguments = inputs(case)
    ours = by_us(ported(model, tmp_path), *arguments)
    np.testing.assert_allclose(ours, by_diffusers(longer, *arguments), atol=1e-4, rtol=0)
