"""``python -m rehyat_jax``: the same program as ``rehyat``."""

import sys

from rehyat_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
