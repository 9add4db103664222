"""The key that switches between the router's kernel and its slow twin, and what the screen says."""

from __future__ import annotations

from typing import Any

import pytest

from moescope.engine import protocol as p
from moescope.ui.widgets.status_line import StatusLine
from tests.ui import piloted
from tests.ui.piloted import Engine, running, text_of, wait_for

SAYS = "torch, 6e-08 from native"


def with_twin(monkeypatch: pytest.MonkeyPatch, twin: str) -> Engine:
    monkeypatch.setattr(piloted, "FACTS", {**piloted.FACTS, "router_twin": twin})
    return Engine()


def newest(engine: Engine, router: str) -> p.Newest:
    return p.Newest((engine.frames[20],), 0, "running", 30.0, router=router)


async def test_k_switches_to_the_twin_and_back_and_the_status_says_how_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = with_twin(monkeypatch, "torch")
    async with running(engine, size=(160, 40), tokens=20) as (_, main, pilot):
        status = main.query_one(StatusLine)
        assert "router" not in text_of(status)
        await pilot.press("K")
        assert engine.sent == [p.SlowRouter(True)]
        engine.link.push(newest(engine, SAYS))
        await wait_for(pilot, lambda: f"router {SAYS}" in text_of(status))
        await pilot.press("K")
        assert engine.sent[1:] == [p.SlowRouter(False)]
        engine.link.push(newest(engine, ""))
        await wait_for(pilot, lambda: "router" not in text_of(status))


async def test_the_key_is_only_there_where_there_are_two_ways(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def offered(twin: str) -> tuple[bool, list[Any]]:
        engine = with_twin(monkeypatch, twin)
        async with running(engine, tokens=3) as (_, main, pilot):
            await pilot.press("K")
            return "twin" in str(main.active_bindings.get("K")), engine.sent

    assert await offered("torch") == (True, [p.SlowRouter(True)])
    assert await offered("") == (False, [])
