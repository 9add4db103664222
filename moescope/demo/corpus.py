"""The demo's corpus: six clearly different kinds of text, written by a seeded generator of our own.

Everything that can be checked is true: sums are right, JSON parses, code runs, lists that claim an
order have it. A document is *held out* by a hash of its prompt, so no document that begins like a
held-out one is ever trained on. The stories are in `stories.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from zlib import crc32

from moescope.demo import stories

HELD_OUT_ONE_IN = 16


@dataclass(frozen=True, slots=True)
class Document:
    domain: str
    text: str
    prompt: str  # a prefix of `text`, enough to know what comes next


# --------------------------------------------------------------------------------------- arithmetic


def _sum(r: Random, a: int | None = None) -> tuple[str, int]:
    """One true line, and its result. With `a`, the line begins with it."""
    sign = r.choice("++--x")
    if sign == "x" and (a is None or a <= 12):
        a, b = (r.randint(1, 12) if a is None else a), r.randint(1, 10)
        return f"{a} x {b} = {a * b}", a * b
    if sign == "+":
        a, b = (r.randint(0, 60) if a is None else a), r.randint(1, r.choice((9, 39)))
        return f"{a} + {b} = {a + b}", a + b
    a = r.randint(1, 99) if a is None else a
    b = r.randint(0, min(a, r.choice((9, 39))))
    return f"{a} - {b} = {a - b}", a - b


def _sums(r: Random) -> list[str]:
    return ["Sums:"] + [_sum(r)[0] for _ in range(r.randint(6, 14))]


def _chain(r: Random) -> list[str]:
    lines, value = ["Each sum begins where the last one ended:"], r.randint(1, 30)
    for _ in range(r.randint(6, 12)):
        line, value = _sum(r, value)
        lines.append(line)
    return lines


def _table(r: Random) -> list[str]:
    n, sign = r.randint(2, 20), r.choice(("x", "+"))
    start = r.randint(1, 6)
    rows = range(start, start + r.randint(6, 12))
    name = "The table of" if sign == "x" else "Adding to"
    return [f"{name} {n}:"] + [f"{n} {sign} {i} = {n * i if sign == 'x' else n + i}" for i in rows]


def arithmetic(r: Random) -> tuple[str, str]:
    """Lines `a + b = c` under a heading."""
    lines = r.choices((_sums, _chain, _table), (3, 2, 1))[0](r)
    return "\n".join(lines), "\n".join(lines[:3]) + "\n"


# --------------------------------------------------------------------------------------------- json

TOWNS = stories.words(
    "Ashford Belmont Bern Brighton Cork Dover Ghent Lyon Milan Oslo Porto Riga Turin Utrecht "
    "Vienna York"
)
COLOURS = stories.words("black blue brown green grey orange pink purple red silver white yellow")
GOODS = stories.words(
    "apple pear plum bread butter candle cheese cup egg honey lamp lemon onion pen rope salt soap "
    "tea"
)
TITLES = stories.phrases(
    "The Last Lamp|A Year of Rain|The Stone Garden|Seven Bridges|The Quiet Harbour|"
    "Letters to Oslo|The Glass Hill|Winter Bread|The Blue Door|A Map of Birds|The Long Field|"
    "Salt and Honey"
)
HOBBIES = stories.words(
    "chess drawing football music reading running sailing singing swimming painting dancing cooking"
)
SKIES = stories.words("sunny cloudy rainy snowy windy foggy")


def _name(r: Random) -> str:
    return r.choice(stories.GIRLS + stories.BOYS)


def _order(r: Random) -> dict[str, object]:
    price, count = r.randint(1, 12), r.randint(1, 9)
    return {"item": r.choice(GOODS), "price": price, "count": count, "total": price * count}


SCHEMAS: dict[str, Callable[[Random], dict[str, object]]] = {
    "people": lambda r: {
        "name": _name(r),
        "age": r.randint(5, 80),
        "town": r.choice(TOWNS),
        "likes": r.sample(HOBBIES, r.randint(1, 3)),
    },
    "animals": lambda r: {
        "animal": r.choice(stories.ANIMALS),
        "name": _name(r),
        "colour": r.choice(COLOURS),
        "tame": r.random() < 0.5,
    },
    "books": lambda r: {
        "title": r.choice(TITLES),
        "author": _name(r),
        "year": r.randint(1900, 2025),
        "pages": r.randint(40, 600),
    },
    "weather": lambda r: {
        "town": r.choice(TOWNS),
        "sky": r.choice(SKIES),
        "degrees": {"min": (low := r.randint(-9, 20)), "max": low + r.randint(2, 12)},
    },
    "orders": _order,
    "points": lambda r: {
        "id": r.randint(1, 99),
        "at": [r.randint(-50, 50), r.randint(-50, 50)],
        "label": r.choice("ABCDEFGH") if r.random() < 0.7 else None,
    },
    "users": lambda r: {
        "id": r.randint(100, 999),
        "user": _name(r).lower(),
        "active": r.random() < 0.6,
        "roles": r.sample(("admin", "editor", "guest", "reader"), r.randint(1, 2)),
    },
}


def json_lines(r: Random) -> tuple[str, str]:
    """One JSON object a line, all of one schema, under a heading."""
    name, make = r.choice(tuple(SCHEMAS.items()))
    rows = [json.dumps(make(r)) for _ in range(r.randint(4, 9))]
    lines = [f"JSON, {name}, one a line:", *rows]
    return "\n".join(lines), "\n".join(lines[:2]) + "\n"


# -------------------------------------------------------------------------------------------- lists

UNITS = stories.phrases(
    "loaves of bread|bottles of milk|bags of rice|jars of honey|cups of tea|bars of soap|"
    "boxes of candles|pounds of apples|bunches of carrots|tins of beans|packets of salt|"
    "slices of cheese|baskets of plums"
)
CHORES = stories.phrases(
    "water the plants|call the baker|clean the kitchen|mend the fence|write to {name}|"
    "buy new shoes|feed the cat|wash the windows|visit {name}|sweep the floor|paint the door|"
    "find the lost key|read one chapter|take the dog out|return the books|bake a cake for {name}"
)
DISHES: dict[str, tuple[str, ...]] = {
    "soup": stories.phrases(
        "wash the {veg}|cut the {veg} into small pieces|heat some oil in a large pot|"
        "add the {veg} and stir|pour in {n} cups of water|let it boil for {m} minutes|"
        "add salt and taste it|serve it hot"
    ),
    "tea": stories.phrases(
        "fill the kettle with water|warm the pot|put {n} spoons of tea in the pot|"
        "pour in the hot water|wait for {n} minutes|add milk or lemon|drink it while it is warm"
    ),
    "a salad": stories.phrases(
        "wash the {veg}|slice the {veg}|mix oil and lemon in a bowl|add salt and pepper|"
        "put everything in a large bowl|toss it well|leave it for {m} minutes|serve it with bread"
    ),
    "bread": stories.phrases(
        "warm {n} cups of water|stir in the yeast|add the flour and salt|knead it for {m} minutes|"
        "leave it to rise for one hour|shape the loaf|bake it for {m} minutes|let it cool"
    ),
    "an omelette": stories.phrases(
        "break {n} eggs into a bowl|beat them with a fork|add salt and pepper|"
        "melt butter in a pan|pour in the eggs|add the {veg}|fold it in half|serve it at once"
    ),
}
VEGETABLES = stories.words("carrots onions tomatoes beans potatoes leeks peppers mushrooms")


def _recipe(r: Random) -> list[str]:
    dish, steps = r.choice(tuple(DISHES.items()))
    fill = {"veg": r.choice(VEGETABLES), "n": r.randint(2, 6), "m": r.randint(2, 12) * 5}
    chosen = [step for step in steps if r.random() < 0.9]
    lines = [f"{i}. {step.format_map(fill).capitalize()}." for i, step in enumerate(chosen, 1)]
    return [f"How to make {dish} with {_name(r)}:", *lines]


def _shopping(r: Random) -> list[str]:
    items = r.sample(UNITS, r.randint(4, 9))
    head = r.choice(("Shopping list", "To buy", "In the basket"))
    return [f"{head} for {_name(r)}:"] + [f"- {r.randint(2, 12)} {item}" for item in items]


def _chores(r: Random) -> list[str]:
    items = [chore.format(name=_name(r)) for chore in r.sample(CHORES, r.randint(4, 8))]
    day = r.choice(stories.words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"))
    return [f"To do on {day}:"] + [f"[{r.choice('x ')}] {item}" for item in items]


def _sorted(r: Random) -> list[str]:
    what, pool = r.choice(
        (
            ("Names", stories.GIRLS + stories.BOYS),
            ("Animals", stories.ANIMALS),
            ("Towns", TOWNS),
            ("Colours", COLOURS),
        )
    )
    items = sorted(r.sample(list(pool), r.randint(5, 9)))
    return [f"{what} in the order of the alphabet:"] + [f"* {item}" for item in items]


def lists(r: Random) -> tuple[str, str]:
    """Shopping, chores, numbered steps, sorted names: one item a line."""
    lines = r.choice((_recipe, _shopping, _chores, _sorted))(r)
    return "\n".join(lines), "\n".join(lines[:3]) + "\n"


# --------------------------------------------------------------------------------------------- code

NOUNS = stories.words(
    "apple book boat bird card coin cup egg flag hat key lamp page pear seed ship star stone tree "
    "word"
)


def _code_total(r: Random) -> list[str]:
    noun, name = r.choice(NOUNS), r.choice(("total", "count", "result"))
    values = [r.randint(1, 9) for _ in range(r.randint(2, 4))]
    return [
        f"def sum_{noun}s({noun}s):",
        f'    """Return the sum of all {noun}s."""',
        f"    {name} = 0",
        f"    for {noun} in {noun}s:",
        f"        {name} += {noun}",
        f"    return {name}",
        "",
        "",
        f"assert sum_{noun}s({values}) == {sum(values)}",
    ]


def _code_extreme(r: Random) -> list[str]:
    noun, (word, sign, pick) = (
        r.choice(NOUNS),
        r.choice((("largest", ">", max), ("smallest", "<", min))),
    )
    values = [r.randint(1, 99) for _ in range(r.randint(2, 4))]
    return [
        f"def {word}_{noun}({noun}s):",
        f'    """Return the {word} of the {noun}s."""',
        f"    best = {noun}s[0]",
        f"    for {noun} in {noun}s[1:]:",
        f"        if {noun} {sign} best:",
        f"            best = {noun}",
        "    return best",
        "",
        "",
        f"assert {word}_{noun}({values}) == {pick(values)}",
    ]


def _code_filter(r: Random) -> list[str]:
    noun, limit = r.choice(NOUNS), r.randint(2, 50)
    word, sign = r.choice((("above", ">"), ("below", "<"), ("from", ">=")))
    return [
        f"def {noun}s_{word}({noun}s, limit={limit}):",
        f'    """Keep the {noun}s {word} the limit."""',
        f"    return [{noun} for {noun} in {noun}s if {noun} {sign} limit]",
        "",
        "",
        f"print({noun}s_{word}([{r.randint(1, 60)}, {r.randint(1, 60)}]))",
    ]


def _code_class(r: Random) -> list[str]:
    noun, holder = r.choice(NOUNS), r.choice(("Box", "Shelf", "Bag", "Store"))
    verb = r.choice(("add", "put", "push"))
    return [
        f"class {noun.capitalize()}{holder}:",
        f'    """Holds some {noun}s."""',
        "",
        "    def __init__(self):",
        f"        self.{noun}s = []",
        "",
        f"    def {verb}(self, {noun}):",
        f"        self.{noun}s.append({noun})",
        "",
        "    def __len__(self):",
        f"        return len(self.{noun}s)",
    ]


def _code_print(r: Random) -> list[str]:
    noun, count = r.choice(NOUNS), r.randint(2, 12)
    test = r.choice((f"{noun} % 2 == 0", f"{noun} % 3 == 0", f"{noun} > {r.randint(1, 9)}"))
    return [
        f"for {noun} in range({count}):",
        f"    if {test}:",
        f'        print("{noun}", {noun})',
        "    else:",
        f'        print("no {noun}")',
    ]


def _code_maths(r: Random) -> list[str]:
    noun, n = r.choice(NOUNS), r.randint(2, 9)
    word, sign, answer = r.choice(
        (("add", "+", n + 1), ("multiply", "*", n), ("subtract", "-", 1 - n))
    )
    return [
        f"def {word}_{noun}({noun}, step={n}):",
        f'    """Return the {noun} {sign} step."""',
        f"    return {noun} {sign} step",
        "",
        "",
        f"assert {word}_{noun}(1) == {answer}",
    ]


def code(r: Random) -> tuple[str, str]:
    """Short Python that runs: functions with an assertion, loops, a class."""
    pieces = (_code_total, _code_extreme, _code_filter, _code_class, _code_print, _code_maths)
    parts = [r.choice(pieces)(r) for _ in range(r.randint(1, 3))]
    text = "\n\n\n".join("\n".join(part) for part in parts)
    return text, "\n".join(parts[0][:2]) + "\n"


# ----------------------------------------------------------------------------------------- counting


def _english(n: int) -> str:
    ones = stories.words(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen"
    )
    if n < 20:
        return ones[n]
    ten = stories.words("twenty thirty forty fifty sixty seventy eighty ninety")[n // 10 - 2]
    return f"{ten}-{ones[n % 10]}" if n % 10 else ten


def _french(n: int) -> str:
    ones = stories.words(
        "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze "
        "seize dix-sept dix-huit dix-neuf"
    )
    if n < 20:
        return ones[n]
    if n == 80:
        return "quatre-vingts"
    tens = stories.words(
        "vingt trente quarante cinquante soixante soixante quatre-vingt quatre-vingt"
    )
    base, rest = tens[n // 10 - 2], n % 20 if n >= 60 else n % 10
    if rest == 0:
        return base
    return f"{base} et {ones[rest]}" if rest in (1, 11) and n < 80 else f"{base}-{ones[rest]}"


def _german(n: int) -> str:
    ones = stories.words(
        "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn "
        "fünfzehn sechzehn siebzehn achtzehn neunzehn"
    )
    if n < 20:
        return ones[n]
    ten = stories.words("zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig")[
        n // 10 - 2
    ]
    return f"{'ein' if n % 10 == 1 else ones[n % 10]}und{ten}" if n % 10 else ten


def _spanish(n: int) -> str:
    ones = stories.words(
        "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince "
        "dieciséis diecisiete dieciocho diecinueve veinte veintiuno veintidós veintitrés "
        "veinticuatro veinticinco veintiséis veintisiete veintiocho veintinueve"
    )
    if n < 30:
        return ones[n]
    ten = stories.words("treinta cuarenta cincuenta sesenta setenta ochenta noventa")[n // 10 - 3]
    return f"{ten} y {ones[n % 10]}" if n % 10 else ten


def _italian(n: int) -> str:
    ones = stories.words(
        "zero uno due tre quattro cinque sei sette otto nove dieci undici dodici tredici "
        "quattordici quindici sedici diciassette diciotto diciannove"
    )
    if n < 20:
        return ones[n]
    ten = stories.words("venti trenta quaranta cinquanta sessanta settanta ottanta novanta")[
        n // 10 - 2
    ]
    if n % 10 in (1, 8):
        ten = ten[:-1]
    return ten + ("tré" if n % 10 == 3 else ones[n % 10] if n % 10 else "")


def _dutch(n: int) -> str:
    ones = stories.words(
        "nul een twee drie vier vijf zes zeven acht negen tien elf twaalf dertien veertien "
        "vijftien zestien zeventien achttien negentien"
    )
    if n < 20:
        return ones[n]
    ten = stories.words("twintig dertig veertig vijftig zestig zeventig tachtig negentig")[
        n // 10 - 2
    ]
    return f"{ones[n % 10]}{'ën' if n % 10 in (2, 3) else 'en'}{ten}" if n % 10 else ten


def _japanese(n: int) -> str:
    ones = "零一二三四五六七八九"
    if n < 10:
        return ones[n]
    return (ones[n // 10] if n >= 20 else "") + "十" + (ones[n % 10] if n % 10 else "")


LANGUAGES: dict[str, Callable[[int], str]] = {
    "English": _english,
    "French": _french,
    "German": _german,
    "Spanish": _spanish,
    "Italian": _italian,
    "Dutch": _dutch,
    "Japanese": _japanese,
}


def counting(r: Random) -> tuple[str, str]:
    """Numbers from 0 to 99 in words, up or down, by steps, in one language or two."""
    name, say = r.choice(tuple(LANGUAGES.items()))
    length, step = r.randint(8, 20), r.choices((1, 2, 3, 5, 10), (6, 2, 1, 1, 1))[0]
    length = min(length, 99 // step)
    first = r.randint(0, 99 - (length - 1) * step)
    row = list(range(first, first + length * step, step))
    how = "" if step == 1 else f" by {_english(step)}s"
    if r.random() < 0.3:
        row.reverse()
        how += " backwards"
    if r.random() < 0.25:
        items = [f"{n} is {say(n)}" for n in row]
        head, glue = f"Numbers in {name}{how}:", "\n"
    elif r.random() < 0.15:
        other, say_other = r.choice([pair for pair in LANGUAGES.items() if pair[0] != name])
        items = [f"{say(n)}: {say_other(n)}" for n in row]
        head, glue = f"{name} and {other}{how}:", "\n"
    else:
        items, head, glue = [say(n) for n in row], f"Counting in {name}{how}:", ", "
    end = "." if glue == ", " else ""
    return f"{head}\n{glue.join(items)}{end}", f"{head}\n{glue.join(items[:3])}{glue.rstrip(' ')}"


# --------------------------------------------------------------------------------------- the corpus

DOMAINS: dict[str, Callable[[Random], tuple[str, str]]] = {
    "story": stories.tell,
    "arithmetic": arithmetic,
    "json": json_lines,
    "list": lists,
    "code": code,
    "counting": counting,
}
WEIGHTS = (4, 5, 3, 3, 3, 4)


def held_out(prompt: str) -> bool:
    return crc32(prompt.encode()) % HELD_OUT_ONE_IN == 0


def documents(seed: int, *, held: bool = False, domain: str | None = None) -> Iterator[Document]:
    """An endless stream, the same for the same arguments: for training, or with `held` held out."""
    r = Random(f"{seed} {held} {domain}")
    names = tuple(DOMAINS)
    while True:
        name = domain or r.choices(names, WEIGHTS)[0]
        text, prompt = DOMAINS[name](r)
        assert text.startswith(prompt), (text, prompt)
        if held_out(prompt) == held:
            yield Document(name, text, prompt)


def prompts(domain: str, count: int, seed: int = 7) -> list[str]:
    """Distinct held-out prompts of one domain.

    Before an indented line a prompt ends without its newline: the tokenizer joins the two.
    """
    found: dict[str, None] = {}
    for document in documents(seed, held=True, domain=domain):
        indented = document.text.startswith(f"{document.prompt} ")
        found.setdefault(document.prompt.rstrip("\n") if indented else document.prompt)
        if len(found) == count:
            break
    return list(found)
