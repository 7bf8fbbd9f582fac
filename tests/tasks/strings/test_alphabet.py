import pytest

from instrdiv.tasks.strings.alphabet import LETTERS, Alphabet
from instrdiv.tasks.tokens import END, SEPARATOR


def test_encode_and_decode_are_inverse():
    for size in (1, 2, 26, 62):
        alphabet = Alphabet(size)
        assert alphabet.decode(alphabet.encode(LETTERS[:size])) == LETTERS[:size]


def test_tokens_show_as_text():
    assert Alphabet(26).decode_tokens([0, 3, SEPARATOR, 4, END]) == "_a#b$"


@pytest.mark.parametrize("size", [0, 63])
def test_a_size_without_letters_is_refused(size):
    with pytest.raises(ValueError, match="1 to 62"):
        Alphabet(size)


def test_a_character_outside_is_named():
    with pytest.raises(ValueError, match="'c' is not in the alphabet 'ab'"):
        Alphabet(2).encode("abc")
