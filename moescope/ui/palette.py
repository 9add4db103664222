"""Places in the command palette: `L17E062` or `@412` typed there moves the cursor.

Imported when the palette is opened, not before the first frame.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from textual.command import Hit, Hits, Provider

from moescope.ui.find import Place, parse


class Places(Provider):
    """What `find.parse` understands as an address."""

    async def search(self, query: str) -> Hits:
        screen: Any = self.screen
        go, table = getattr(screen, "go", None), getattr(screen, "table", None)
        if go is None or table is None:
            return
        place = parse(query, table)
        if isinstance(place, Place):
            yield Hit(
                1.0, f"Go to {query.strip()}", partial(go, place), help="Move the cursor there"
            )
