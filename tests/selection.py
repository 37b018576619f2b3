"""The choice of tests to run: ``TOKENFLEX_TESTS=all`` asks for those that are for releases too.

Without it ``make test`` leaves out the tests marked ``release``, and takes a part of long lists of
random or combined cases. ``make test-release`` runs all.
"""

from __future__ import annotations

import os

ALL = os.environ.get("TOKENFLEX_TESTS") == "all"
