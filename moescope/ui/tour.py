"""What the embedded demo model is asked when nobody asks it anything: one prompt of each domain."""

from __future__ import annotations

PROMPTS = ("Once upon a time",)
