"""The checkpoint that ships: small, in the published layout, and what `figures.json` says it is."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from moescope.demo import CHECKPOINT, corpus, measure

README = Path(measure.__file__).with_name("README.md")
MEGABYTE = 1_000_000


def read(name: str) -> dict[str, Any]:
    return json.loads((CHECKPOINT / name).read_text())


def header() -> dict[str, dict[str, Any]]:
    with (CHECKPOINT / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return entries


def figures() -> dict[str, Any]:
    return json.loads(measure.FIGURES.read_text())


def test_the_folder_is_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in CHECKPOINT.iterdir()}
    assert set(sizes) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) <= 8 * MEGABYTE


def test_config_is_olmoe_trained_without_renormalisation() -> None:
    config = read("config.json")
    assert config["model_type"] == "olmoe"
    assert config["architectures"] == ["OlmoeForCausalLM"]
    assert config["norm_topk_prob"] is False
    assert config["clip_qkv"] is None
    assert config["torch_dtype"] == "bfloat16"
    assert config["num_experts"] >= 16
    assert 2 <= config["num_experts_per_tok"] <= config["num_experts"] // 4
    assert config["rope_theta"] == 10000.0


def test_tensors_have_the_published_names_and_shapes() -> None:
    config, entries = read("config.json"), header()
    h, i, e = config["hidden_size"], config["intermediate_size"], config["num_experts"]
    expected = {
        "model.embed_tokens.weight": [config["vocab_size"], h],
        "model.norm.weight": [h],
        "lm_head.weight": [config["vocab_size"], h],
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        expected |= {f"{prefix}.self_attn.{x}_proj.weight": [h, h] for x in "qkvo"}
        expected |= {f"{prefix}.self_attn.{x}_norm.weight": [h] for x in "qk"}
        expected |= {f"{prefix}.{x}_layernorm.weight": [h] for x in ("input", "post_attention")}
        expected[f"{prefix}.mlp.gate.weight"] = [e, h]
        for expert in range(e):
            name = f"{prefix}.mlp.experts.{expert}"
            expected |= {f"{name}.{x}_proj.weight": [i, h] for x in ("gate", "up")}
            expected[f"{name}.down_proj.weight"] = [h, i]
    assert {name: entry["shape"] for name, entry in entries.items()} == expected
    assert {entry["dtype"] for entry in entries.values()} == {"BF16"}


def test_the_tokenizer_gives_held_out_text_back() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    assert tokenizer.token_to_id("<|endoftext|>") == read("config.json")["eos_token_id"]
    assert tokenizer.get_vocab_size() == read("config.json")["vocab_size"]
    assert tokenizer.truncation is None and tokenizer.padding is None
    for text in [*(corpus.prompts(domain, 1)[0] for domain in corpus.DOMAINS), "naïve 🦉\t\n"]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("1234").ids) == 4


def test_figures_are_of_this_checkpoint() -> None:
    weights = (CHECKPOINT / "model.safetensors").read_bytes()
    assert figures()["model_sha256"] == hashlib.sha256(weights).hexdigest()
    assert len(figures()["score_sum"]) == read("config.json")["num_hidden_layers"]


def test_targets_follow_from_the_figures_and_are_met() -> None:
    measured = figures()
    assert measured["targets"] == measure.targets(measured)
    missed = {name: row for name, row in measured["targets"].items() if not row["met"]}
    assert not missed


def test_the_readme_states_these_figures() -> None:
    text = README.read_text()
    for name, row in figures()["targets"].items():
        assert f"{row['value']:g}" in text, name


def test_it_writes_right_lines_as_trained_and_drifts_under_the_fault() -> None:
    from tokenizers import Tokenizer

    run = measure.engine_runner(CHECKPOINT)
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    shares = {}
    for variant in (measure.TRAINED, measure.FAULT):
        right = []
        for prompt in corpus.prompts("json", 3):
            result = run(tokenizer.encode(prompt).ids, variant, 80)
            written = measure.lines_written(tokenizer.decode(result.token_ids), result.ended)
            right += [measure.json_form(line, prompt.split("\n")[0]) for line in written]
        shares[variant] = sum(right) / max(1, len(right))
    assert shares[measure.TRAINED] == 1.0
    assert shares[measure.FAULT] < 0.8
