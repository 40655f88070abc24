"""How often a test that kills at random moments does so."""

import os

#: SIGKILLs at random moments, each in another place of the same sequence. ``REHYAT_TEST_KILLS=50`` is full strength.
KILLS = int(os.environ.get("REHYAT_TEST_KILLS", "10"))
