"""The exception tree: stable codes, one printable line, and nothing that a terminal would obey."""

import inspect
import pickle
import re
from pathlib import Path

import pytest

from activations import errors
from activations.errors import CorruptFileError, UndertowError, printable

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, UndertowError)]
DRAWN = re.compile(r"[├└]── (\w+Error) +([a-z-]+) ")


def test_every_error_is_public_and_the_list_is_sorted():
    assert errors.__all__ == sorted(errors.__all__)
    assert {cls.__name__ for cls in CLASSES} | {"printable"} == set(errors.__all__)


def test_the_tree_in_the_docstring_shows_every_error_with_its_code():
    drawn = dict(DRAWN.findall(errors.__doc__))
    assert drawn == {cls.__name__: cls.code for cls in CLASSES if cls is not UndertowError}


def test_the_tree_in_the_docstring_shows_every_parent():
    lines = [(line.index("── "), *DRAWN.findall(line)) for line in errors.__doc__.splitlines() if DRAWN.findall(line)]
    open_branches: dict[int, str] = {}
    for depth, (name, _) in lines:
        open_branches[depth] = name
        parent = open_branches.get(depth - 4, "UndertowError")
        assert getattr(errors, name).__base__.__name__ == parent


def test_codes_are_unique():
    assert len({cls.code for cls in CLASSES}) == len(CLASSES)


def test_str_gives_path_message_and_hint():
    error = CorruptFileError("the header is broken", path=Path("ckpt/x"), hint="Fetch it again.")
    assert str(error) == "ckpt/x: the header is broken. Fetch it again."


def test_str_does_not_repeat_a_path_that_the_message_names():
    error = CorruptFileError("'ckpt/x' is broken.", path="ckpt/x", hint="Fetch it again.")
    assert str(error) == "'ckpt/x' is broken. Fetch it again."


def test_str_of_a_bare_error_is_its_message():
    assert str(UndertowError("wrong")) == "wrong"


def test_to_dict_is_what_a_record_holds():
    error = CorruptFileError("broken", path=Path("x"), hint="Mend it.")
    assert error.to_dict() == {"code": "corrupt-file", "path": "x", "message": "broken", "hint": "Mend it."}


def test_an_error_survives_a_process_boundary():
    error = pickle.loads(pickle.dumps(CorruptFileError("broken", path="x", hint="Mend it.")))
    assert type(error) is CorruptFileError
    assert str(error) == "x: broken. Mend it."


@pytest.mark.parametrize(
    "hostile",
    ["\x1b[2Jgone", "two\nlines", "re\rturn", "\u202egnp.exe", "\ud800", "\x9b31m", "\u2028line"],
    ids=["escape", "newline", "return", "right-to-left", "surrogate", "c1-escape", "line-separator"],
)
def test_nothing_that_a_terminal_obeys_is_printed(hostile):
    shown = str(UndertowError(f"tensor {hostile}", path=f"/x/{hostile}", hint=hostile))
    assert shown.isprintable()
    assert "\\" in shown


def test_text_that_is_safe_is_printed_as_it_is():
    assert printable("model.layers.0.wéight 模型 <b>") == "model.layers.0.wéight 模型 <b>"


def test_long_text_is_cut_and_marked():
    assert printable("x" * 300, limit=10) == "xxxxxxxxx…"
    assert printable("x" * 10, limit=10) == "x" * 10
