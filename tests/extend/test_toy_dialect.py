"""The page on adding a dialect, run as it stands: one from outside the package is loaded, described, converted."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from rehyat_jax.weights.registry import REGISTRY

PAGE = Path(__file__).parents[2] / "docs" / "extend" / "dialect.md"


@pytest.fixture
def model(tmp_path):
    """Heads of 128, as a file without a configuration must have."""
    torch.manual_seed(0)
    made = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, text_dim=8, freq_dim=8, ffn_dim=16, num_layers=2
    )
    made.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_page_as_it_stands(model, tmp_path, monkeypatch):
    snippets = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(snippets) == 5
    monkeypatch.setitem(REGISTRY, "transformer", REGISTRY["transformer"])  # set back at the end
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"MODEL": model}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"{PAGE.name}[{number}]", "exec"), names)
    assert "toy" in {dialect.name for dialect in REGISTRY["transformer"].dialects}
