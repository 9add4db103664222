"""A deterministic toy model in numpy: everything a session asks of one, in microseconds.

Routing is real (`kernels.route` with each lane's own policies, and what the experts add depends on
their weights), so variants change tokens as they do in a real model. The state of a lane is one
vector a token, which makes copies and truncation exact. `open_fake` is what the engine's process
loads in tests; special names of the model make it misbehave.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.engine.interpreter import Draw, Router, StepOutput
from moescope.engine.protocol import Loading, LoadRequest
from moescope.engine.sampling import Expectation, largest
from moescope.errors import ExitCode, MoescopeError
from moescope.kernels import route
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring
from moescope.trace.frames import RecordLevel

VOCAB, HIDDEN, LAYERS, EXPERTS, TOP_K = 48, 24, 3, 8, 3
END = 47
LETTERS = "abcdefghijklmnopqrstuvwxyz .,!0123456789"  # ids 0 to 39; 40 to 42 are bytes of "é", "…"
BYTES = {40: b"\xc3", 41: b"\xa9", 42: b"\xe2"}
USER, ASSISTANT = 45, 46


def spec(**policy: Any) -> RouterSpec:
    return RouterSpec(
        RouterPolicy(num_experts_per_tok=TOP_K, **policy),
        RouterWiring(num_experts=EXPERTS, router_dtype="float32", combine_dtype="float32"),
    )


class FakeInterpreter:
    """Lanes of hidden vectors. `poison` (a token id) makes the router of layer 1 give NaN. With
    `expects`, it keeps no logits of a prompt."""

    device, dtype, draws, expects = "cpu", "float32", False, False

    def __init__(self, seed: int = 0, poison: int | None = None, sharpness: float = 3.0) -> None:
        random = np.random.default_rng(seed)
        draw = lambda *shape: random.normal(size=shape) / np.sqrt(shape[-1])  # noqa: E731
        self.embedding = random.normal(size=(VOCAB, HIDDEN))
        self.mix = 0.9 * draw(HIDDEN, HIDDEN)
        self.gates = 4.0 * draw(LAYERS, EXPERTS, HIDDEN)
        self.experts = 6.0 * draw(LAYERS, EXPERTS, HIDDEN, HIDDEN)
        self.head = sharpness * draw(VOCAB, HIDDEN)
        self.poison = poison
        self.routers = tuple(Router(layer, spec(), {}) for layer in range(LAYERS))
        self.vocab_size = VOCAB
        self.kernels = {"router": "reference"}
        self.capacity = 0
        self.states: list[list[NDArray[Any]]] = []
        self.policies: dict[int, Sequence[RouterPolicy]] = {}
        self.shadows: Sequence[Sequence[RouterPolicy]] = ()
        self.calls: list[tuple[tuple[int, ...], int]] = []
        self.hook: Callable[[FakeInterpreter], None] = lambda _: None

    def open(self, lanes: int, capacity: int) -> None:
        self.states += [[] for _ in range(lanes - len(self.states))]
        self.capacity = max(self.capacity, capacity)

    def set_policies(self, lane: int, policies: Sequence[RouterPolicy]) -> None:
        assert lane < len(self.states) and len(policies) == LAYERS
        self.policies[lane] = policies

    def set_shadows(self, policies: Sequence[Sequence[RouterPolicy]]) -> None:
        self.shadows = policies

    def run(
        self,
        lanes: Sequence[int],
        token_ids: NDArray[np.int64],
        *,
        all_logits: bool = False,
        record: RecordLevel = "weights",
        draws: Sequence[Draw] | None = None,
        next_ids: NDArray[np.int64] | None = None,
    ) -> StepOutput:
        assert next_ids is None or self.expects
        self.calls.append((tuple(lanes), token_ids.shape[1]))
        self.hook(self)
        rows = [
            [self._token(lane, int(token)) for token in ids]
            for lane, ids in zip(lanes, token_ids, strict=True)
        ]
        top_k = max(len(step[1]["expert_ids"][0]) for row in rows for step in row)
        logits = np.stack([[step[0] for step in row] for row in rows]).astype(np.float32)
        stacked = {
            name: np.stack([[_wide(step[1][name], name, top_k) for step in row] for row in rows])
            for name in rows[0][0][1]
        }
        bad = np.isnan(stacked["score_sum"]).any(axis=(0, 1))
        shadows = self._shadowed(stacked["logits"]) if self.shadows else {}
        expected = None
        if next_ids is not None:
            assert next_ids.shape == token_ids.shape
            expected = [_told(*row) for row in zip(logits, next_ids.tolist(), strict=True)]
            logits = logits[:, -1:]
        return StepOutput(
            logits=logits if all_logits else logits[:, -1:],
            expected=expected,
            invalid_router=int(bad.argmax()) if bad.any() else None,
            router_logits=stacked.pop("logits"),
            **stacked,
            **shadows,
        )

    def _shadowed(self, logits: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Router logits [N, T, L, E] under every shadow variant."""
        found: dict[str, list[Any]] = {"expert_ids": [], "weights": [], "score_sum": []}
        for policies in self.shadows:
            for layer, policy in enumerate(policies):
                router = replace(self.routers[layer].spec, policy=policy)
                routing = route(logits[:, :, layer].reshape(-1, EXPERTS), router)
                for name, values in found.items():
                    values.append(_wide(np.asarray(getattr(routing, name)), name, EXPERTS))
        shape = (*logits.shape[:2], len(self.shadows), LAYERS)

        def whole(name: str) -> NDArray[Any]:
            by_row = np.stack(found[name], 1)
            return by_row.reshape(*shape, *by_row.shape[2:])

        return {
            "shadow_ids": whole("expert_ids").astype(np.int16),
            "shadow_weights": whole("weights"),
            "shadow_sums": whole("score_sum"),
        }

    def _token(self, lane: int, token: int) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
        state = self.states[lane]
        assert len(state) < self.capacity, "fed beyond the capacity"
        hidden = self.embedding[token] + (self.mix @ state[-1] if state else 0.0)
        found: dict[str, list[Any]] = {}
        for layer, policy in enumerate(self.policies[lane]):
            normed = hidden / np.sqrt((hidden**2).mean() + 1e-6)
            logits = (self.gates[layer] @ normed).astype(np.float32)
            if layer == 1 and token == self.poison:
                logits[2] = np.nan
            router = replace(self.routers[layer].spec, policy=policy)
            routing = route(logits[None], router, keep_logits=True)
            for expert, weight in zip(routing.expert_ids[0], routing.weights[0], strict=True):
                if expert >= 0:
                    hidden = hidden + weight * np.tanh(self.experts[layer, expert] @ normed)
            for name in _FIELDS:
                found.setdefault(name, []).append(np.asarray(getattr(routing, name))[0])
        state.append(np.tanh(hidden))
        arrays = {name: _rows(values, name) for name, values in found.items()}
        return self.head @ state[-1], arrays

    def length(self, lane: int) -> int:
        return len(self.states[lane])

    def truncate(self, lane: int, length: int) -> None:
        del self.states[lane][length:]

    def copy(self, source: int, target: int, length: int) -> None:
        assert length <= len(self.states[source])
        self.states[target] = list(self.states[source][:length])

    def cache_bytes(self, lanes: int, capacity: int) -> int:
        return lanes * capacity * HIDDEN * 8


_FIELDS = (
    *("expert_ids", "weights", "scores", "score_sum"),
    *("mass", "entropy", "margin", "runner_up", "logits"),
)


def _wide(values: NDArray[Any], name: str, top_k: int) -> NDArray[Any]:
    if name not in ("expert_ids", "weights", "scores"):
        return values
    fill = -1 if name == "expert_ids" else 0
    return np.pad(values, ((0, 0), (0, top_k - values.shape[1])), constant_values=fill)


def _told(rows: NDArray[np.float32], nexts: Sequence[int]) -> list[Expectation | None]:
    """What is kept of the rows of a prompt: the last whole, of others what frames tell."""
    found: list[Expectation | None] = [Expectation.of(row) for row in rows]
    for at, token in enumerate(nexts[:-1]):
        if (whole := found[at]) is not None:
            best = largest(rows[at], 8).tolist()
            after = (token, float(rows[at][token]), whole.rank(token))
            values = rows[at][best].tolist()
            found[at] = Expectation(None, whole.log_sum, best, values, after)
    return found


def _rows(values: list[Any], name: str) -> NDArray[Any]:
    dtype = np.int16 if name in ("expert_ids", "runner_up") else np.float32
    if name in ("expert_ids", "weights", "scores"):
        widest = max(len(v) for v in values)
        fill = -1 if name == "expert_ids" else 0
        values = [np.pad(v, (0, widest - len(v)), constant_values=fill) for v in values]
    return np.asarray(values, dtype)


class FakeTokenizer:
    """One id a character, bytes for the rest, and a chat template."""

    end_ids: tuple[int, ...] = (END,)
    has_chat_template = True
    hash = "fake"

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        ids: list[int] = []
        for part in text.replace("<u>", "\x01").replace("<a>", "\x02").replace("<e>", "\x03"):
            special = {"\x01": USER, "\x02": ASSISTANT, "\x03": END}
            ids += [special[part]] if part in special else [LETTERS.index(part)]
        return ids

    def _bytes(self, token: int) -> bytes:
        if token in BYTES:
            return BYTES[token]
        return LETTERS[token].encode() if token < len(LETTERS) else b""

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self._bytes, ids)).decode("utf-8", "replace")

    def piece(self, token: int) -> str:
        if token in BYTES:
            return f"<0x{BYTES[token][0]:02X}>"
        return LETTERS[token] if token < len(LETTERS) else f"<{token}>"

    def stream(self, after: Sequence[int] = ()) -> FakeStream:
        stream = FakeStream(self)
        for token in after:
            stream.push(token)
        return stream

    def render_chat(self, messages: Any, system: str | None = None) -> str:
        parts = []
        for message in messages:
            mark = "<a>" if message["role"] == "assistant" else "<u>"
            # What a template does to an answer: strips it, so that ids can change.
            parts.append(mark + message["content"].strip() + ("<e>" if mark == "<a>" else ""))
        return "".join(parts) + "<a>"


class FakeStream:
    def __init__(self, tokenizer: FakeTokenizer) -> None:
        self.tokenizer, self.held = tokenizer, b""

    def push(self, token: int) -> str:
        self.held += self.tokenizer._bytes(token)
        text = self.held.decode("utf-8", "ignore")
        if text or not self.held:
            rest = self.held[len(text.encode()) :]
            self.held = rest if rest[:1] in (b"\xc3", b"\xe2") else b""
            return text
        return ""

    def flush(self) -> str:
        text, self.held = self.held.decode("utf-8", "replace"), b""
        return text


@dataclass(slots=True)
class FakeModel:
    interpreter: FakeInterpreter = field(default_factory=FakeInterpreter)
    facts: dict[str, Any] = field(
        default_factory=lambda: {"name": "fake", "family": "fake", "context": 512}
    )
    checkpoint: Any = None
    memory: dict[str, int] = field(default_factory=dict)


def fake(**options: Any) -> FakeModel:
    return FakeModel(FakeInterpreter(**options))


def open_fake(
    request: LoadRequest, progress: Callable[[Loading], None]
) -> tuple[FakeModel, FakeTokenizer]:
    """A loader for the engine's process. The model's name says how to misbehave."""
    behaviour = request.model.partition(":")[2]
    for done in range(4):
        progress(Loading("reading", done, 3, "fake.safetensors"))
    if behaviour == "refused":
        raise MoescopeError("fake: config.json: expected a MoE", code=ExitCode.CHECKPOINT)
    if behaviour == "endless":
        while True:
            progress(Loading("reading", 1, 3, "fake.safetensors"))
            time.sleep(0.002)
    model = fake(poison=20 if behaviour == "poison" else None)
    if behaviour in HOOKS:
        model.interpreter.hook = HOOKS[behaviour]
    tokenizer = FakeTokenizer()
    tokenizer.end_ids = ()  # it runs until it is told to stop
    model.facts["context"] = 100_000
    return model, tokenizer


def _after(count: int, act: Callable[[], None]) -> Callable[[FakeInterpreter], None]:
    def hook(interpreter: FakeInterpreter) -> None:
        if len(interpreter.calls) > count:
            act()

    return hook


def _raise(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


class Panic(BaseException):
    """What a native library throws: no Exception."""


HOOKS: dict[str, Callable[[FakeInterpreter], None]] = {
    "slow": lambda _: time.sleep(0.002),
    "memory": _after(5, _raise(MemoryError())),
    "panic": _after(5, _raise(Panic("secret prompt"))),
    "killed": _after(5, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "prints": lambda _: os.write(1, b"noise") and os.write(2, b"noise") and None,
}
