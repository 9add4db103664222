"""Screens look the same wherever the tests run: no colour switches of the caller's environment."""

from __future__ import annotations

import os

# Textual reads some of these when it is imported, so they go before any test module is.
KEPT = "TEXTUAL_SNAPSHOT_TEMPDIR"  # how the workers of one run find their report
for name in [n for n in os.environ if n in ("NO_COLOR", "COLORTERM") or n.startswith("TEXTUAL")]:
    if name != KEPT:
        del os.environ[name]
os.environ["TEXTUAL_ANIMATIONS"] = "none"
