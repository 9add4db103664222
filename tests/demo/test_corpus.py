"""The demo's corpus says what is true, the same every time, and keeps its held-out side apart."""

from __future__ import annotations

import ast
import json
from itertools import islice

import pytest

from moescope.demo import corpus

COUNT = 300


def some(domain: str, count: int = COUNT) -> list[corpus.Document]:
    return list(islice(corpus.documents(5, domain=domain), count))


def test_the_same_seed_writes_the_same_text() -> None:
    one, again, other = (
        [d.text for d in islice(corpus.documents(seed), COUNT)] for seed in (5, 5, 6)
    )
    assert one == again
    assert one != other


def test_every_domain_comes_and_no_document_is_empty() -> None:
    found = {d.domain for d in islice(corpus.documents(5), COUNT)}
    assert found == set(corpus.DOMAINS)
    for domain in corpus.DOMAINS:
        texts = [d.text for d in some(domain)]
        assert min(map(len, texts)) > 20
        assert len(set(texts)) > 0.9 * COUNT, f"{domain} repeats itself"


def test_sums_are_right() -> None:
    signs = set()
    for document in some("arithmetic"):
        for line in document.text.split("\n")[1:]:
            a, sign, b, equals, c = line.split(" ")
            worked = {"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b)}
            assert (equals, worked[sign]) == ("=", int(c)), line
            signs.add(sign)
    assert signs == {"+", "-", "x"}


def test_json_parses_and_a_document_keeps_one_schema() -> None:
    schemas = set()
    for document in some("json"):
        rows = [json.loads(line) for line in document.text.split("\n")[1:]]
        keys = {tuple(row) for row in rows}
        assert len(keys) == 1 and len(rows) >= 4
        schemas |= keys
    assert len(schemas) == len(corpus.SCHEMAS)


def test_code_parses_and_its_assertions_hold() -> None:
    for document in some("code"):
        tree = ast.parse(document.text)
        exec(compile(tree, "demo", "exec"), {"print": lambda *words: None})


def test_lists_that_claim_an_order_have_it() -> None:
    claimed = [d.text.split("\n") for d in some("list") if "order of the alphabet" in d.text]
    assert claimed
    for _, *items in claimed:
        assert items == sorted(items)


@pytest.mark.parametrize(
    ("language", "number", "word"),
    [
        ("English", 42, "forty-two"),
        ("French", 71, "soixante et onze"),
        ("French", 80, "quatre-vingts"),
        ("French", 81, "quatre-vingt-un"),
        ("French", 99, "quatre-vingt-dix-neuf"),
        ("German", 21, "einundzwanzig"),
        ("German", 36, "sechsunddreißig"),
        ("Spanish", 22, "veintidós"),
        ("Spanish", 45, "cuarenta y cinco"),
        ("Italian", 28, "ventotto"),
        ("Italian", 33, "trentatré"),
        ("Dutch", 22, "tweeëntwintig"),
        ("Dutch", 85, "vijfentachtig"),
        ("Japanese", 10, "十"),
        ("Japanese", 47, "四十七"),
    ],
)
def test_numbers_in_words(language: str, number: int, word: str) -> None:
    assert corpus.LANGUAGES[language](number) == word


def test_number_words_are_distinct() -> None:
    for name, say in corpus.LANGUAGES.items():
        assert len({say(n) for n in range(100)}) == 100, name


def test_stories_fill_every_blank_and_get_the_article_right() -> None:
    for document in some("story"):
        assert "{" not in document.text
        for word, following in zip(document.text.split(), document.text.split()[1:], strict=False):
            if word in ("a", "A"):
                assert following[0].lower() not in "aeio", f"{word} {following}"


@pytest.mark.parametrize("domain", corpus.DOMAINS)
def test_no_training_document_begins_like_a_held_out_one(domain: str) -> None:
    held = corpus.prompts(domain, 20)
    assert len(set(held)) == 20
    begins = tuple(held)
    assert not [d.text for d in some(domain, 1000) if d.text.startswith(begins)]
