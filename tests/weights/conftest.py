"""The three networks, small enough to be written and read often."""

import pytest
from shared.weights import release_networks


@pytest.fixture(scope="module")
def models():
    return release_networks()
