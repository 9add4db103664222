"""Every key as data: what it does, where it works, how help and footer name it.

Bindings are made from these tables, so nothing a key does can miss from the help or the palette.
Each has an id, by which a keymap can move it. `footer` keys stand on the last line, eight at most.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from textual.binding import Binding, BindingType


@dataclass(frozen=True, slots=True)
class Key:
    """One row: `id` is unique in its table; `keys` in Textual's names, joined by commas."""

    id: str
    keys: str
    action: str
    label: str  # in the footer and the palette
    tip: str = ""  # one sentence
    footer: bool = False
    shown: str | None = None  # how the key is written
    priority: bool = False
    palette: bool = True
    when: str = ""  # `live`, in a `replay`, `always`; else once a model is there


def when(state: str, *rows: Key) -> tuple[Key, ...]:
    return tuple(replace(row, when=state) for row in rows)


FORK = "Another lane from this token on: forbid, force or scale experts, or any variant."
CHANGE = "Where this router's first expert or the variant changed."

APP = (
    Key("quit", "ctrl+q", "leave", "Quit", "End moescope.", priority=True),
    Key("help", "question_mark,f1", "help_keys", "Help", "Every key.", True, "?"),
)

MAIN = (
    Key("pause", "space", "pause", "Pause", "Pause, or go on.", True, "space"),
    Key("step", "full_stop", "step", "Step", "One token, then pause again.", True, "."),
    Key("back", "comma", "back", "Back", "One token back in what is recorded.", shown=","),
    Key("shown_next", "v", "shown(1)", "Variant", "Next variant on the same logits.", True),
    Key("shown_previous", "V", "shown(-1)", "Previous variant", "On the same logits."),
    Key("compare", "c", "compare", "Compare", "Two lanes side by side.", True),
    Key("balance", "b", "balance", "Balance", "How evenly each layer uses its experts."),
    Key("inspect", "enter", "inspect", "Inspect", "The token, layer by layer.", True, "⏎"),
    Key("export", "e", "export", "Export", "Save the trace, in one of several formats.", True),
    Key("layer_up", "up,k", "layer(-1)", "Layer up", "The router above.", shown="↑"),
    Key("layer_down", "down,j", "layer(1)", "Layer down", "The router below.", shown="↓"),
    Key("pick_left", "left,h", "pick(-1)", "Picked expert left", "Round the end."),
    Key("pick_right", "right,l", "pick(1)", "Picked expert right", "Round the end."),
    Key("expert_left", "shift+left", "expert(-1)", "Expert left", "The next in number."),
    Key("expert_right", "shift+right", "expert(1)", "Expert right", "The next in number."),
    Key("token_back", "left_square_bracket", "token(-1)", "Previous token", shown="["),
    Key("token_on", "right_square_bracket", "token(1)", "Next token", shown="]"),
    Key("change_back", "left_curly_bracket", "change(-1)", "Previous change", CHANGE, shown="{"),
    Key("change_on", "right_curly_bracket", "change(1)", "Next change", CHANGE, shown="}"),
    Key("first", "home", "edge(0)", "First token"),
    Key("last", "end", "edge(-1)", "Newest token"),
    Key("find", "slash", "find", "Find", "L17, E062, L17E062, @412 or text.", shown="/"),
    Key("hit_next", "n", "hit(1)", "Next hit"),
    Key("hit_previous", "N", "hit(-1)", "Previous hit"),
    Key("go_to", "g", "go_to", "Go to token", "A position."),
    Key("add_variant", "plus", "add_variant", "Add variant", "Any expression.", shown="+"),
    Key("zoom_in", "z", "zoom(1)", "Zoom in", "Larger cells on the map."),
    Key("zoom_out", "Z", "zoom(-1)", "Zoom out", "Smaller cells on the map."),
    Key("tint", "t", "tint", "Tint", "Colour tokens by Σ, margin, entropy, p or novelty."),
    Key("follow", "f", "follow", "Follow", "Stay at the newest token."),
    Key("lane", "w", "lane", "Watch next lane", "This screen shows one lane at a time."),
    *when(
        "live",
        Key("prompt", "i", "prompt", "Prompt", "Type a prompt; esc leaves it.", True),
        Key("stop", "ctrl+c", "stop", "Stop generating"),
        Key("fork", "exclamation_mark", "fork", "Fork", FORK, shown="!"),
        Key("rerun", "r", "rerun(False)", "Rerun", "The same prompt with the same seed."),
        Key("reseed", "ctrl+r", "rerun(True)", "Rerun, new seed", "The same prompt."),
        Key("sampling", "s", "sampling", "Sampling", "Temperature, top-k, top-p, seed, length."),
        Key("twin", "K", "twin", "Kernel or twin", "Route in the kernel's slow twin, and compare."),
        Key("chat", "ctrl+t", "chat", "Chat template", "Apply the model's chat template, or not."),
        *(
            Key(
                f"generate_{letter}",
                letter,
                f"generate('{letter}')",
                f"Generate with {letter}",
                "From the next token on.",
            )
            for letter in "ABCDEFGH"
        ),
    ),
    *when(
        "replay",
        Key("mark", "m", "mark", "Bookmark", "Mark this token, or unmark it."),
        Key("diagnose", "d", "diagnose", "Diagnose", "Name the router that made this trace."),
    ),
    Key("open", "o", "open", "Open", "Another model, or a trace.", when="always"),
    Key("slower", "less_than_sign", "speed(-1)", "Slower", "Tokens at a reading pace.", shown="<"),
    Key("faster", "greater_than_sign", "speed(1)", "Faster", "Up to full speed.", shown=">"),
    Key("jump", "ctrl+o", "jump", "Jump", "A letter on every panel: that one, full size."),
    *(
        Key(f"panel_{n}", str(n), f"panel('{name}')", f"Panel: {name}", "Show it, or hide it.")
        for n, name in enumerate(("map", "layer", "sums", "token"), start=1)
    ),
    Key(
        "leave", "q,escape", "back_out", "Back", "Leave what is open.", palette=False, when="always"
    ),
)

COMPARE = (
    Key("pause", "space", "pause", "Pause", "Pause, or go on.", True, "space"),
    Key("token_back", "left_square_bracket", "token(-1)", "Back", "Previous token.", shown="["),
    Key("token_on", "right_square_bracket", "token(1)", "On", "Next token.", True, "]"),
    Key("diff_back", "left_curly_bracket", "difference(-1)", "Difference back", shown="{"),
    Key("diff_on", "right_curly_bracket", "difference(1)", "Next ≠", "Difference.", True, "}"),
    Key("first", "g", "first", "First ≠", "The first other experts on the same tokens.", True),
    Key("layer_up", "up,k", "layer(-1)", "Layer up", shown="↑"),
    Key("layer_down", "down,j", "layer(1)", "Layer down", shown="↓"),
    Key("shape", "d", "mode", "View", "Experts of one lane only, layers, each lane.", True, "d"),
    Key(
        "same", "t", "same_tokens", "Same tokens", "All lanes fed A's text, or each its own.", True
    ),
    Key("swap", "x", "swap", "Swap", "The two lanes change sides."),
    Key("other", "w", "other", "Other lane", "Which lane stands on the right."),
    Key("add_lane", "plus", "add_lane", "Add lane", "A lane under any expression.", shown="+"),
    Key("follow", "f", "follow", "Follow", "Stay at the newest token."),
    Key("prompt", "i", "prompt", "Prompt", "A prompt for all lanes."),
    Key("rerun", "r", "rerun", "Rerun", "All lanes, the same prompt."),
    Key("stop", "ctrl+c", "stop", "Stop generating"),
    Key("leave", "q,escape,c", "leave", "Main screen", "", True, "esc"),
)

TOKEN = (
    Key("token_back", "left_square_bracket", "token(-1)", "Previous", "", True, "["),
    Key("token_on", "right_square_bracket", "token(1)", "Next", "", True, "]"),
    Key("layer_up", "up,k", "layer(-1)", "Layer up", shown="↑"),
    Key("layer_down", "down,j", "layer(1)", "Layer down", shown="↓"),
    Key("sort", "s", "sort", "Sort", "By layer, Σ, entropy, margin, or picks kept.", True),
    Key("ties", "n", "ties", "Near ties", "Only layers with a near tie.", True),
    Key("shown", "v", "shown(1)", "Variant", "On the same logits.", True),
    Key("copy", "y", "copy", "Copy", "This token as JSON.", True),
    Key("leave", "q,escape,enter", "leave", "Close", "", True, "esc"),
)

BALANCE = (
    Key("pause", "space", "pause", "Pause", "Pause, or go on.", True, "space"),
    Key("layer_up", "up,k", "layer(-1)", "Layer up", "", True, "↑"),
    Key("layer_down", "down,j", "layer(1)", "Layer down", "", True, "↓"),
    Key("token_back", "left_square_bracket", "token(-1)", "Previous token", shown="["),
    Key("token_on", "right_square_bracket", "token(1)", "Next token", shown="]"),
    Key("lane", "w", "lane", "Next lane", "Each lane is counted by itself.", True),
    Key("leave", "q,escape,b", "leave", "Close", "", True, "esc"),
)

TABLES = {"app": APP, "main": MAIN, "compare": COMPARE, "token": TOKEN, "balance": BALANCE}


def bindings(where: str) -> list[BindingType]:
    """The bindings of one screen, in footer order."""
    from textual.binding import Binding

    hidden = ("tab", "focus_next"), ("shift+tab", "focus_previous")
    return [
        *(Binding(key, f"app.{action}", show=False, system=True) for key, action in hidden),
        *(_binding(where, key) for key in TABLES[where]),
    ]


def _binding(where: str, key: Key) -> Binding:
    from textual.binding import Binding

    return Binding(
        key.keys,
        key.action,
        key.label,
        show=key.footer,
        key_display=key.shown,
        priority=key.priority,
        tooltip=key.tip,
        id=f"{where}.{key.id}",
    )
