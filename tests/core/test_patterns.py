"""LIKE and regular expressions match as PostgreSQL's; what cannot be translated is refused."""

from __future__ import annotations

import re
import time
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walstream.dialects import MAX_TEXT_BYTES, bounded
from walstream.patterns import PatternError, like, linear_expression, regular_expression


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("", [""], ["a"]),
        ("abc", ["abc"], ["ab", "abcd", "ABC"]),
        ("a%", ["a", "abc", "a\n"], ["ba"]),
        ("%a", ["a", "ba", "\na"], ["ab"]),
        ("%a%", ["a", "bab"], ["b"]),
        ("a%%b", ["ab", "axb"], ["a"]),
        ("a_c", ["abc", "a\nc", "aéc"], ["ac", "abbc"]),
        ("%a%b%c", ["abc", "xaxbxc", "aabbcc"], ["acb", "abcd"]),
        ("%ab%ab%", ["abab"], ["abxa", "ab"]),
        ("%_%", ["a"], [""]),
        (r"100\%", ["100%"], ["1000"]),
        (r"\a\_\\", ["a_\\"], ["ab\\"]),
        ("a.c[d]", ["a.c[d]"], ["abcd"]),
        ("%", ["", "anything"], []),
    ],
)
def test_like_matches_the_whole_text(pattern: str, matching: list[str], others: list[str]) -> None:
    matches = like(pattern)
    assert [text for text in [*matching, *others] if matches(text)] == matching


def test_ilike_folds_by_character() -> None:
    matches = like("ÀÉ%i_", fold_case=True)
    assert matches("àéxİx")
    assert not matches("àexix")


@pytest.mark.parametrize("pattern", ["\\", "a\\", "%\\", "\\\\\\"])
def test_a_like_pattern_does_not_end_with_its_escape(pattern: str) -> None:
    with pytest.raises(PatternError, match="must not end with a backslash"):
        like(pattern)


@pytest.mark.timeout(20)
def test_like_does_not_slow_down_on_many_wildcards() -> None:
    assert not like("%a" * 30 + "%b")("a" * 2000)


@given(st.text(alphabet="ab%_\\"), st.text(alphabet="ab\\%\n"))
def test_like_agrees_with_its_definition(pattern: str, text: str) -> None:
    try:
        matches = like(pattern)
    except PatternError:
        return
    assert matches(text) == _like_by_definition(pattern, text)


def _like_by_definition(pattern: str, text: str) -> bool:
    if not pattern:
        return not text
    match pattern[0]:
        case "%":
            rest = pattern[1:]
            return any(_like_by_definition(rest, text[skip:]) for skip in range(len(text) + 1))
        case "_":
            return bool(text) and _like_by_definition(pattern[1:], text[1:])
        case "\\":
            return text[:1] == pattern[1] and _like_by_definition(pattern[2:], text[1:])
        case character:
            return text[:1] == character and _like_by_definition(pattern[1:], text[1:])


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("b", ["abc"], ["B"]),
        ("^a.c$", ["abc", "a\nc"], ["abcd", "abc\n"]),
        ("a|^$", ["xa", ""], ["b"]),
        ("(ab)+c", ["ababc"], ["ac"]),
        ("(?:a|b){2,3}$", ["ab", "bab"], ["a"]),
        ("^a{2}$", ["aa"], ["a", "aaa"]),
        ("^a{2,}?$", ["aaa"], ["a"]),
        ("^a{0}$", [""], ["a"]),
        ("a{,2}b{", ["a{,2}b{"], ["aab"]),
        ("(?=ab)a", ["ab"], ["ac"]),
        ("a(?!b)", ["ac"], ["ab"]),
        ("(?<=a)b", ["ab"], ["cb"]),
        ("(?<!a)b", ["cb"], ["ab"]),
        (r"\mcat\M", ["a cat", "cat"], ["cats", "concat"]),
        (r"[[:<:]]cat[[:>:]]", ["a cat"], ["cats", "concat"]),
        (r"\ycat", ["a cat"], ["concat"]),
        (r"\Ycat", ["concat"], ["cat"]),
        (r"\Y", ["", "ab", " "], ["a"]),
        (r"\Aab\Z", ["ab"], ["ab\n"]),
        (r"^\d\s\w$", ["1 _", "2\té"], ["a b"]),
        (r"^\D\S\W$", ["ab!"], ["1b!", "a !", "abc"]),
        (r"^\s$", ["\u2003"], ["\xa0", "\x1c", "\x85"]),
        (r"\a\b\B\e\f\n\r\t\v", ["\a\b\\\x1b\f\n\r\t\v"], [""]),
        (r"\u00e9\U0001F600\x41", ["é😀A"], ["e"]),
        (r"\0\012\cA", ["\0\n\x01"], [""]),
        (r"\.\*\$\é", [".*$é"], ["a"]),
        ("[a-c]", ["b"], ["d", "-"]),
        ("[^a-c]", ["d", "\n"], ["b"]),
        ("[]a]", ["]", "a"], ["b"]),
        ("[^]a]", ["b"], ["]", "a"]),
        ("[a-]", ["-", "a"], ["b"]),
        ("[-a]", ["-", "a"], ["b"]),
        ("[a^&|~[]", ["^", "&", "|", "~", "["], ["b"]),
        (r"[\]\\\d\s\w-]", ["]", "\\", "1", " ", "é", "-"], ["!"]),
        (r"[\x41-\x43]", ["B"], ["D"]),
        ("^[[:alpha:]]$", ["é", "漢", "٣"], ["1", "_", "²"]),
        ("^[[:alnum:]_]$", ["é", "1", "_"], ["-", "²"]),
        ("^[[:digit:]]$", ["1"], ["٣"]),
        ("^[[:upper:]]$", ["É", "ǅ"], ["é"]),
        ("^[[:lower:]]$", ["é", "ǅ"], ["É", "ᾈ"]),
        ("^[[:punct:]]$", ["!", "€", "²"], ["a", " "]),
        ("^[[:space:]]$", [" ", "\n"], ["\xa0"]),
        ("^[[:blank:]]$", [" ", "\t"], ["\n"]),
        ("^[[:cntrl:]]$", ["\x01", "\x9f"], ["a"]),
        ("^[[:graph:]]$", ["a", "\xa0"], [" ", "\n"]),
        ("^[[:print:]]$", ["a", " "], ["\n"]),
        ("^[[:xdigit:]]$", ["f", "F", "0"], ["g"]),
        ("^[[:ascii:]]$", ["a", "\x01"], ["é"]),
        ("^[^[:alpha:][:digit:]]$", ["!"], ["a", "1"]),
        ("***=a.c", ["a.c"], ["abc"]),
        ("***:a.c", ["abc"], ["ac"]),
        ("(?q)a.c", ["a.c"], ["abc"]),
        ("(?i)aÉ", ["Aé", "aÉ"], ["ae"]),
        ("***:(?i)a", ["A"], ["b"]),
        ("(?ic)a", ["a"], ["A"]),
        ("(?n)^b.$", ["a\nbc\nd"], ["a\nb"]),
        ("(?m)a[^x]", ["ab"], ["a\n", "ax"]),
        ("(?p)^a.b$", ["a b"], ["a\nb", "x\na b"]),
        ("(?w)^a.b$", ["a\nb", "x\na b"], ["ab"]),
        ("(?n)[^\n]", ["a"], ["\n"]),
        (r"(?n)\W", ["\n"], ["a"]),
        ("(?st)a.b", ["a\nb"], ["ab"]),
        ("", ["", "a"], []),
        ("()", ["", "a"], []),
    ],
)
def test_a_regular_expression_is_translated(
    pattern: str, matching: list[str], others: list[str]
) -> None:
    matches = regular_expression(pattern)
    assert [text for text in [*matching, *others] if matches(text)] == matching
    if any(letter in pattern for letter in LOOKING):
        with pytest.raises(PatternError, match="here"):
            linear_expression(pattern)
        return
    matches = linear_expression(pattern)
    assert [text for text in [*matching, *others] if matches(text)] == matching


LOOKING: Final = ("(?=", "(?!", "(?<", r"\m", r"\M", r"\y", r"\Y", "[[:<:]]", "[[:>:]]")
"""What RE2 cannot do."""


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("ks", ["KS"], ["\u212as", "k\u017f"]),
        ("ǆ", ["ǆ", "Ǆ"], ["ǅ"]),
        ("ß", ["ß"], ["ẞ", "SS"]),
        ("^[a-c]$", ["B"], ["D"]),
        ("^[ä]$", ["Ä"], ["a"]),
        ("^[Z-a]$", ["z", "A", "_"], ["b"]),
        ("^[[:upper:]]$", ["a", "A"], ["1"]),
        ("(?c)a", ["a"], ["A"]),
        ("***=A.", ["a."], ["ab"]),
        (r"\x41", ["a"], ["b"]),
    ],
)
def test_case_is_folded_as_postgres_folds_it(
    pattern: str, matching: list[str], others: list[str]
) -> None:
    for engine in (regular_expression, linear_expression):
        matches = engine(pattern, fold_case=True)
        assert [text for text in [*matching, *others] if matches(text)] == matching


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"(a)\1", r"\\1"),
        ("[[.hyphen.]]", r"\[\."),
        ("[[=a=]]", r"\[="),
        ("[[:alpha:]-z", "not closed"),
        ("[a-[:digit:]]", r"\[:"),
        ("[[:letter:]]", "no character class"),
        ("(?x)a b", "option 'x'"),
        ("(?b)a", "option 'b'"),
        ("***a", r"\*\*\*"),
        (r"\q", r"\\q"),
        (r"[\D]", r"\\D"),
        ("a\\", "stands at the end"),
        ("[a\\", "stands at the end"),
        (r"\U00110000", "no character"),
        ("(a", "not closed"),
        ("a)", "not opened"),
        ("[a", "not closed"),
        ("[", "not closed"),
        ("*a", "nothing that can be repeated"),
        ("^*", "nothing that can be repeated"),
        ("a**", "nothing that can be repeated"),
        ("(?=a)*", "nothing that can be repeated"),
        ("a|*", "nothing that can be repeated"),
        ("(*a)", "nothing that can be repeated"),
        ("a{256}", "0 to 255"),
        ("a{2,1}", "0 to 255"),
        ("a{2x}", "{m,n}"),
        ("[b-a]", "ends before it starts"),
        ("(?<=a*)b", "cannot be translated"),
        ("(" * 5000 + ")" * 5000, "cannot be translated"),
    ],
)
def test_what_cannot_be_translated_is_refused(pattern: str, reason: str) -> None:
    with pytest.raises(PatternError, match=reason):
        regular_expression(pattern)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"(a)\1", r"\\1"),
        ("(?=a)", "ahead or behind here"),
        (r"\ycat\y", "edges of words"),
        ("((a{100}){100}){100}", "cannot be translated: invalid repetition"),
        (r"\w{200}", "cannot be translated: pattern too large|cost too much"),
        (r"\w{30}", "cost too much"),
        (r"\uD800", "half of a character"),
    ],
)
def test_what_clients_may_not_have_is_refused(pattern: str, reason: str) -> None:
    with pytest.raises(PatternError, match=reason):
        linear_expression(pattern)


@pytest.mark.parametrize(
    "pattern", ["(a*)*$", "(a|a)*$", "(.*a){12}b", "^(([a-z])+.)+[A-Z]([a-z])+$"]
)
def test_the_patterns_of_clients_take_no_long_time(pattern: str) -> None:
    matches = linear_expression(pattern)
    began = time.perf_counter()
    matches("a" * (MAX_TEXT_BYTES - 1) + "!")
    assert time.perf_counter() - began < 2


def test_the_patterns_of_clients_are_not_tried_on_long_texts() -> None:
    matches = linear_expression("a")
    assert matches("a" * MAX_TEXT_BYTES)
    with pytest.raises(ValueError, match="too long"):
        matches("é" * (MAX_TEXT_BYTES // 2 + 1))


def test_nor_is_like() -> None:
    matches = bounded(like("%a", fold_case=False))
    assert matches("a" * MAX_TEXT_BYTES)
    with pytest.raises(ValueError, match="too long"):
        matches("a" * (MAX_TEXT_BYTES + 1))


def test_a_long_range_is_not_folded() -> None:
    with pytest.raises(PatternError, match="too long"):
        regular_expression("[\x01-\U0010ffff]", fold_case=True)


@given(
    st.text(alphabet="ab(|)[]^$*+?{}12,.:=!<-\\dwmMyYAZ \n") | st.text(), st.booleans(), st.text()
)
def test_any_pattern_is_translated_or_refused(pattern: str, fold_case: bool, text: str) -> None:  # noqa: FBT001
    try:
        matches = regular_expression(pattern, fold_case=fold_case)
        linear = linear_expression(pattern, fold_case=fold_case)
    except PatternError:
        return
    if r"\w" in pattern.lower() and not text.isascii():  # beyond ASCII Python's \w is its own
        return
    assert matches(text[:10]) is linear(text[:10])


@given(st.text())
def test_an_escaped_text_matches_itself(text: str) -> None:
    escaped = re.sub(r"(?=[^\w])", r"\\", text)
    assert regular_expression(rf"\A(?:{escaped})\Z")(text)
    assert linear_expression(rf"\A(?:{escaped})\Z")(text)
