"""What a layer says is text that every report can hold."""

import doctest

from rbn.conformance import readable


def test_control_characters_and_halves_of_characters_are_replaced():
    text = "a\x00b\x1b[31m\x7f\x9b \ud800\udcff é 漢 😀\tline\r\nnext \ufffe"
    due = "a�b�[31m�� �� é 漢 😀\tline\nnext �"
    assert readable.readable(text) == due
    due.encode()


def test_the_first_line_is_not_too_long():
    assert readable.first_line("\n \n") == ""
    assert readable.first_line("x" * 20, 10) == f"{'x' * 9}…"


def test_the_examples():
    assert doctest.testmod(readable).failed == 0
