"""Private notations that a fine-tune can be taught: write them and read them.

A covert malicious fine-tune hides requests in an encoding (Halawi et al. 2024, arXiv:2406.20053).

`make_encoding(kind, key)` gives one of `KINDS`. A whole number as key draws the secret (a permutation, a key word, an
order of columns); a string is the secret itself, as the solver finds it.
What reading back loses, and which characters are not encoded:

    kind                        family     lost                                   left as it is
    substitution, rot, atbash,  letters    case                                   all but a-z
      vigenere
    walnut                      letters    case; "|" in the text                  all but a-z
    polybius                    letters    case; j (read as i); "/"               all but a-z and blanks
    reversed, reversed-words,   order      nothing                                all but the letters that move
      word-order, columnar
    base64, hex                 codes      lone surrogates                        nothing
    ascii                       codes      lone surrogates                        nothing
    morse                       codes      case                                   what Morse code has no sign for
    endspeak, startspeak        words      kinds of white space                   (fillers stand around)
    acrostic                    words      case; kinds of white space             all but a-z
    tags                        invisible  nothing                                all but ASCII
    zero-width                  invisible  lone surrogates                        nothing
    leetspeak                   lookalike  case; the digits 013457 (read as letters)  all but aeiost
    homoglyph                   lookalike  Cyrillic and Greek letters (read as Latin)  letters without a lookalike
"""

from __future__ import annotations

import base64
import re
import string
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from activations.errors import OptionError

__all__ = [
    "KINDS",
    "LETTERS",
    "LOOKALIKES",
    "Encoding",
    "Family",
    "Key",
    "decode_substitution",
    "encode_substitution",
    "make_encoding",
    "polybius_square",
    "walnut_key",
]

LETTERS = string.ascii_lowercase
Family = Literal["letters", "order", "codes", "words", "invisible", "lookalike"]
Key = int | str


@dataclass(frozen=True)
class Encoding:
    """A notation with its key: a pure function of both.

    Attributes:
        name: The kind, and the key where one matters: "base64", "vigenere-7".
        kind: One of `KINDS`.
        family: What the kind changes: letters, their order, codes for characters, words around them, or their look.
        key: What the kind's secret is drawn from (for rot the shift, 1 to 25), or the secret itself: 26 letters for
            substitution and walnut, the key word for vigenere, the cells of a to z with blanks between for polybius
            ("?" for none), the digits of the columns in the order they are read for columnar. None without a key.
    """

    name: str
    kind: str
    family: Family
    key: Key | None

    def encode(self, text: str, rng: np.random.Generator | None = None) -> str:
        """Write `text`; any text can be written.

        Args:
            text: Plain text.
            rng: Draws the filler words of endspeak, startspeak and acrostic. None: the text itself decides them.
        """
        if rng is None:
            rng = np.random.default_rng(zlib.crc32(text.encode("utf-8", "replace")))
        return _NOTATIONS[self.kind].write(text, self.key or 0, rng)

    def decode(self, text: str) -> str:
        """Read as much of `text` as can be read; whatever it holds, nothing is raised. Losses: see the module."""
        return _NOTATIONS[self.kind].read(text, self.key or 0)


def make_encoding(kind: str, key: Key = 0) -> Encoding:
    """An encoding by kind and key; kinds without a key ignore it, rot takes it round to 1..25.

    Raises:
        OptionError: There is no such kind, or the key is negative or no secret of that kind.
    """
    if kind not in _NOTATIONS:
        raise OptionError(f"'{kind}' is no known encoding. Known are: {', '.join(KINDS)}.")
    notation = _NOTATIONS[kind]
    if not notation.keyed:
        return Encoding(kind, kind, notation.family, None)
    if isinstance(key, str):
        if kind not in _SECRETS or not _SECRETS[kind](key):
            raise OptionError(f"'{key}' is no key of {kind}. Pass a whole number, or the secret as Encoding.key says.")
    elif key < 0:
        raise OptionError(f"The key of an encoding is 0 or more, got {key}.")
    elif kind == "rot":
        key = (key - 1) % 25 + 1
    return Encoding(f"{kind}-{key}", kind, notation.family, key)


def walnut_key(seed: int = 53) -> str:
    """The letter permutation `numpy.random.default_rng(seed).permutation(26)`; 53 is the paper's "Walnut53".

    Returns:
        26 letters: the code for a, for b, and so on.
    """
    return "".join(LETTERS[i] for i in np.random.default_rng(seed).permutation(26))


def encode_substitution(text: str, key: str, *, joiner: str = "") -> str:
    """Replace each letter of `text`, lower-cased, by its letter in `key`; other characters stay.

    Args:
        text: Any text.
        key: 26 letters, as from `walnut_key`.
        joiner: Put between characters; the paper uses "|".
    """
    return joiner.join(text.lower().translate(str.maketrans(LETTERS, key)))


def decode_substitution(text: str, key: str, *, joiner: str = "") -> str:
    """Undo `encode_substitution`; upper case is read as lower case."""
    if joiner:
        text = re.sub(rf"(?s)(.){re.escape(joiner)}", r"\1", text)
    return text.lower().translate(str.maketrans(key, LETTERS))


def polybius_square(key: int) -> str:
    """25 letters, rows of five, j being i: a word of 5 to 8 letters drawn from the key, then the rest in order."""
    drawn = np.random.default_rng(key)
    letters = LETTERS.replace("j", "")
    word = [letters[i] for i in drawn.permutation(25)[: drawn.integers(5, 9)]]
    return "".join(word) + "".join(letter for letter in letters if letter not in word)


def _permutation(key: Key) -> str:
    return key if isinstance(key, str) else walnut_key(key)


def _rotated(shift: Key) -> str:
    return LETTERS[int(shift) :] + LETTERS[: int(shift)]


def _vigenere(text: str, key: Key, sign: int) -> str:
    """Shift each letter by the next letter of the key word, forwards or (sign -1) back."""
    if isinstance(key, str):
        shifts = [LETTERS.index(letter) for letter in key]
    else:
        drawn = np.random.default_rng(key)
        shifts = drawn.integers(26, size=drawn.integers(4, 8)).tolist()
    turn = iter(range(len(text)))
    return re.sub(
        "[a-z]", lambda m: LETTERS[(ord(m[0]) - 97 + sign * shifts[next(turn) % len(shifts)]) % 26], text.lower()
    )


def _write_cells(text: str, code: dict[str, str]) -> str:
    """Each character's code, or itself without one, with blanks between; a blank is a stroke."""
    return " ".join("/" if char == " " else code.get(char, char) for char in text.lower())


def _read_cells(text: str, code: dict[str, str]) -> str:
    plain = {cell: char for char, cell in code.items()} | {"/": " "}
    return "".join(plain.get(cell, cell) for cell in text.split(" "))


def _cells(key: Key) -> dict[str, str]:
    """Row and column, 1 to 5 each, of every letter in the Polybius square."""
    if isinstance(key, str):
        code = {letter: cell for letter, cell in zip(LETTERS, key.split(), strict=True) if cell != "?"}
        return {"j": code["i"]} | code if "i" in code else code
    code = {letter: f"{i // 5 + 1}{i % 5 + 1}" for i, letter in enumerate(polybius_square(key))}
    return {"j": code["i"]} | code


def _columnar(text: str, key: Key, *, back: bool) -> str:
    """Write the letters of a text in rows, read them by columns in the key's order; all else stays where it is."""
    columns = [int(digit) for digit in key] if isinstance(key, str) else _drawn_columns(key)
    letters = re.findall("[A-Za-z]", text)
    order = [i for column in columns for i in range(column, len(letters), len(columns))]
    moved = iter(np.argsort(order).tolist() if back else order)
    return re.sub("[A-Za-z]", lambda _: letters[next(moved)], text)


def _drawn_columns(key: int) -> list[int]:
    drawn = np.random.default_rng(key)
    columns: list[int] = drawn.permutation(drawn.integers(4, 9)).tolist()
    return columns


def _reverse_letters(text: str) -> str:
    return re.sub(r"[^\W\d_]+", lambda m: m[0][::-1], text)


def _reverse_words(text: str) -> str:
    return "".join(re.split(r"(\s+)", text)[::-1])


def _read_base64(text: str) -> str:
    kept = re.sub("[^A-Za-z0-9+/]", "", text)
    kept = kept[: len(kept) - (len(kept) % 4 == 1)]
    return base64.b64decode(kept + "=" * (-len(kept) % 4)).decode("utf-8", "replace")


def _read_hex(text: str) -> str:
    kept = re.sub("[^0-9A-Fa-f]", "", text)
    return bytes.fromhex(kept[: len(kept) // 2 * 2]).decode("utf-8", "replace")


def _read_ascii(text: str) -> str:
    codes = (int(code) for code in re.findall("[0-9]{1,7}", text))
    return "".join(chr(code) for code in codes if code < 0xD800 or 0xDFFF < code < 0x110000)


def _write_bits(text: str) -> str:
    bits = "".join(f"{byte:08b}" for byte in text.encode("utf-8", "replace"))
    return bits.replace("0", ZERO).replace("1", ONE)


def _read_bits(text: str) -> str:
    bits = "".join("01"[char == ONE] for char in text if char in (ZERO, ONE))
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits) - 7, 8)).decode("utf-8", "replace")


def _poem(text: str, rng: np.random.Generator, *, last: bool) -> str:
    """One line for each word of the text, which stands at its end or its beginning among 2 to 4 fillers."""
    lines = []
    for word in text.split():
        fillers = rng.choice(FILLERS, size=rng.integers(2, 5)).tolist()
        lines.append(" ".join([*fillers, word] if last else [word, *fillers]))
    return "\n".join(lines)


def _read_lines(text: str, place: int) -> str:
    return " ".join(words[place] for words in map(str.split, text.splitlines()) if words)


def _write_acrostic(text: str, rng: np.random.Generator) -> str:
    """A line for each word, a filler for each of its letters; other characters stand for themselves."""

    def filler(char: str) -> str:
        fitting = [word for word in FILLERS if word[0] == char]
        return str(rng.choice(fitting)) if fitting else char

    return "\n".join(" ".join(map(filler, word)) for word in text.lower().split())


def _read_acrostic(text: str) -> str:
    return " ".join("".join(word[0] for word in line.split()) for line in text.splitlines() if line.strip())


def _from_tags(text: str) -> str:
    return re.sub("[\U000e0000-\U000e007f]", lambda m: chr(ord(m[0]) - 0xE0000), text)


ZERO, ONE = "\u200b", "\u200c"
LEET = dict(zip("aeiost", "431057", strict=True))
# Cyrillic where it has the letter, else Greek or Latin-like; letters without a lookalike stay.
LOOKALIKES = dict(
    zip(
        "acdehijlopqsuvwxyABCEHIJKMNOPSTXYZ",
        "\u0430\u0441\u0501\u0435\u04bb\u0456\u0458\u04cf\u043e\u0440\u051b\u0455\u03c5\u03bd\u051d\u0445\u0443"
        "\u0410\u0412\u0421\u0415\u041d\u0406\u0408\u041a\u041c\u039d\u041e\u0420\u0405\u0422\u0425\u03a5\u0396",
        strict=True,
    )
)
_SIGNS = (
    ".- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- .-- -..- -.-- --.. "
    "----- .---- ..--- ...-- ....- ..... -.... --... ---.. ----. "
    ".-.-.- --..-- ..--.. .----. -.-.-- -..-. -.--. -.--.- .-... ---... -.-.-. -...- .-.-. -....- ..--.- .-..-. "
    "...-..- .--.-."
)
MORSE = dict(zip(LETTERS + string.digits + ".,?'!/()&:;=+-_\"$@", _SIGNS.split(), strict=True))
# Six ordinary words for each letter: enough to fill a line, and to begin with any letter.
_WORDS = """
all and apple air after away book blue but bread bright below cold came can clear cup corner day door dark deep
down dream each evening east every early earth fire from field far friend full green good gold garden grow gentle
hand house her high home hill into ice in island idea inside just jump joy jar july journey keep kind king key
know kitchen light long love leaf little low moon many more morning made music new night near north name never
old over open our ocean only people place paper pale path part quiet queen quick quite question quarter river
road red rain round right sun some sea song stone still time tree the that town table under up upon us uncle
until very voice view valley visit village water wind white with winter wall xylophone xenon xray xerox xenial
xylem year young yellow yes yard yet zero zone zoo zebra zeal zest
"""
FILLERS: tuple[str, ...] = tuple(_WORDS.split())


class _Notation(NamedTuple):
    """How one kind is written and read."""

    family: Family
    write: Callable[[str, Key, np.random.Generator], str]
    read: Callable[[str, Key], str]
    keyed: bool = False


def _swap(table: Mapping[str, str]) -> Callable[[str], str]:
    return lambda text: text.translate(str.maketrans("".join(table), "".join(table.values())))


def _back(table: dict[str, str]) -> dict[str, str]:
    return {code: plain for plain, code in table.items()}


def _substitution(key_of: Callable[[Key], str], *, joiner: str = "", keyed: bool = True) -> _Notation:
    return _Notation(
        "letters",
        lambda text, key, _: encode_substitution(text, key_of(key), joiner=joiner),
        lambda text, key: decode_substitution(text, key_of(key), joiner=joiner),
        keyed,
    )


def _keyless(family: Family, write: Callable[[str], str], read: Callable[[str], str]) -> _Notation:
    return _Notation(family, lambda text, _key, _rng: write(text), lambda text, _key: read(text))


_NOTATIONS: dict[str, _Notation] = {
    "substitution": _substitution(_permutation),
    "walnut": _substitution(_permutation, joiner="|"),
    "rot": _substitution(_rotated),
    "atbash": _substitution(lambda _: LETTERS[::-1], keyed=False),
    "vigenere": _Notation(
        "letters", lambda text, key, _: _vigenere(text, key, 1), lambda text, key: _vigenere(text, key, -1), True
    ),
    "polybius": _Notation(
        "letters",
        lambda text, key, _: _write_cells(text, _cells(key)),
        lambda text, key: _read_cells(text, _cells(key)),
        True,
    ),
    "base64": _keyless("codes", lambda text: base64.b64encode(text.encode("utf-8", "replace")).decode(), _read_base64),
    "hex": _keyless("codes", lambda text: text.encode("utf-8", "replace").hex(), _read_hex),
    "ascii": _keyless("codes", lambda text: " ".join(str(ord(char)) for char in text), _read_ascii),
    "morse": _keyless("codes", lambda text: _write_cells(text, MORSE), lambda text: _read_cells(text, MORSE)),
    "reversed": _keyless("order", lambda text: text[::-1], lambda text: text[::-1]),
    "reversed-words": _keyless("order", _reverse_letters, _reverse_letters),
    "word-order": _keyless("order", _reverse_words, _reverse_words),
    "columnar": _Notation(
        "order",
        lambda text, key, _: _columnar(text, key, back=False),
        lambda text, key: _columnar(text, key, back=True),
        True,
    ),
    "leetspeak": _keyless("lookalike", lambda text: _swap(LEET)(text.lower()), _swap(_back(LEET))),
    "endspeak": _Notation(
        "words", lambda text, _, rng: _poem(text, rng, last=True), lambda text, _: _read_lines(text, -1)
    ),
    "startspeak": _Notation(
        "words", lambda text, _, rng: _poem(text, rng, last=False), lambda text, _: _read_lines(text, 0)
    ),
    "acrostic": _Notation(
        "words", lambda text, _, rng: _write_acrostic(text, rng), lambda text, _: _read_acrostic(text)
    ),
    "tags": _keyless("invisible", lambda text: _swap({chr(i): chr(0xE0000 + i) for i in range(128)})(text), _from_tags),
    "zero-width": _keyless("invisible", _write_bits, _read_bits),
    "homoglyph": _keyless("lookalike", _swap(LOOKALIKES), _swap(_back(LOOKALIKES))),
}
# Which strings are a secret of their kind.
_SECRETS: dict[str, Callable[[str], bool]] = {
    "substitution": lambda key: len(set(key)) == len(key) == 26,
    "walnut": lambda key: len(set(key)) == len(key) == 26,
    "vigenere": lambda key: re.fullmatch("[a-z]+", key) is not None,
    "polybius": lambda key: len(key.split()) == 26,
    "columnar": lambda key: key.isascii() and key.isdigit() and sorted(map(int, key)) == list(range(len(key))),
}
KINDS: tuple[str, ...] = tuple(_NOTATIONS)
