"""Random texts without findings: languages, emoji, code, links and numbers."""

# The texts in other alphabets contain ambiguous characters on purpose.
# ruff: noqa: RUF001

from __future__ import annotations

import random
from collections.abc import Callable

SPECIAL = "<|endoftext|>"


def latin(chosen: random.Random) -> str:
    return "".join(
        chosen.choice("bdfgklmnprstv") + chosen.choice("aeiou") for _ in range(chosen.randint(1, 4))
    )


def accented(chosen: random.Random) -> str:
    return latin(chosen) + chosen.choice(["é", "ü", "ñ", "ö", "ç", "ê", "ø", "å", "ï", "ß", "ž"])


def cyrillic(chosen: random.Random) -> str:
    return "".join(chosen.choice("бвдклмнпрст") + chosen.choice("аеиоуя") for _ in range(3))


def chinese(chosen: random.Random) -> str:
    return "".join(chr(0x4E00 + chosen.randrange(0x3000)) for _ in range(4))


def kana(chosen: random.Random) -> str:
    return "".join(chr(0x3042 + chosen.randrange(70)) for _ in range(5))


def line(chosen: random.Random, word: Callable[[random.Random], str], count: int) -> str:
    words = [word(chosen) for _ in range(count)]
    words[count // 2] += ","
    return " ".join(words).capitalize() + chosen.choice([".", "!", "?"])


def prose(chosen: random.Random) -> str:
    return f"{line(chosen, latin, 12)} {line(chosen, latin, 9)}"


def european(chosen: random.Random) -> str:
    return f"«{line(chosen, accented, 10)}» – {line(chosen, accented, 8)} 25 °C, 7 €, ½"


def russian(chosen: random.Random) -> str:
    return f"{line(chosen, cyrillic, 12)} {line(chosen, cyrillic, 9)}"


def asian(chosen: random.Random) -> str:
    parts = [chinese(chosen) + kana(chosen) for _ in range(9)]
    return f"{'、'.join(parts)}。「{chinese(chosen)}」{chosen.randint(1, 9999)}円"


def emoji(chosen: random.Random) -> str:
    faces = ["😀", "👩‍🔬", "🇫🇷", "❤️", "👍🏽"]
    return f"{line(chosen, latin, 12)} {chosen.choice(faces)} {line(chosen, latin, 8)} 🎉🎉"


def code(chosen: random.Random) -> str:
    a, b, c, d, e = (latin(chosen) + latin(chosen) for _ in range(5))
    return (
        f'def {a}({b}, *{c}):\n\tif {b} < {chosen.randint(2, 99)} && "{d}" not in {c}:\n'
        f'        return {{\'{e}\': f"{{{b}!r}}", "{d}\\n": [{chosen.random():.6f}]}}\n'
        f"# {line(chosen, latin, 7)}"
    )


def link(chosen: random.Random) -> str:
    a, b, c = (latin(chosen) for _ in range(3))
    number = chosen.randint(1, 99999)
    url = f"https://{a}.example/{b}?{c}={number}&amp={number + 1}&q=R%26D#{a}"
    return f"{line(chosen, latin, 9)} {url} {line(chosen, latin, 9)} AT&T @{b}_{c} #{c}"


def numbers(chosen: random.Random) -> str:
    found = [f"{chosen.uniform(-1e6, 1e6):,.3f}" for _ in range(12)]
    return f"{latin(chosen)}: {'; '.join(found)} | {chosen.randint(1, 28)}.11.2026 ± 5 %"


FLAVOURS = (prose, european, russian, asian, emoji, code, link, numbers)


def text_of(index: int, seed: int) -> str:
    return FLAVOURS[index % len(FLAVOURS)](random.Random(f"{seed} {index}"))
