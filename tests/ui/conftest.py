"""Screens look the same wherever the tests run: no colour switches of the caller's environment."""

from __future__ import annotations

import os

# Textual reads some of these when it is imported, so they go before any test module is.
for name in [n for n in os.environ if n in ("NO_COLOR", "COLORTERM") or n.startswith("TEXTUAL")]:
    del os.environ[name]
os.environ["TEXTUAL_ANIMATIONS"] = "none"
