"""The networks of this program, made known to the engine of checkpoints: what opens checkpoints is imported from here.

A network is added by one line: its component, which its family's table of names has.
"""

from rehyat_jax.models.clip.rows import IMAGE_ENCODER
from rehyat_jax.models.taehv.rows import PREVIEW_DECODER
from rehyat_jax.models.umt5.rows import TEXT_ENCODER
from rehyat_jax.models.wan.rows import WAN_LOW_NOISE, WAN_TRANSFORMER
from rehyat_jax.models.wan.vae_rows import WAN_VAE
from rehyat_jax.weights.layout import components_in
from rehyat_jax.weights.opened import open_component
from rehyat_jax.weights.plan import make_plan
from rehyat_jax.weights.registry import component, register

__all__ = ["component", "components_in", "make_plan", "open_component", "register"]

# In the order in which they are told of.
for _network in (WAN_TRANSFORMER, WAN_LOW_NOISE, WAN_VAE, TEXT_ENCODER, IMAGE_ENCODER, PREVIEW_DECODER):
    register(_network)
