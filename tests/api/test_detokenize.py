"""Token ids to text, piece by piece, and stop strings in it."""

import pytest
from api.harness import END, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from loramux.server.api.detokenize import MAX_HELD_TOKENS, Detokenizer, Stopped, StopStrings

TOKENIZER = byte_tokenizer()


def pieces(ids: list[int], prompt: list[int] | None = None) -> list[str]:
    stream = Detokenizer(TOKENIZER, prompt or [])
    return [*(stream.feed(token) for token in ids), stream.flush()]


def test_characters_appear_when_they_are_complete() -> None:
    assert pieces(list("aé€😀b".encode())) == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]


def test_special_tokens_are_silent() -> None:
    assert pieces([97, END, 98]) == ["a", "", "b", ""]


def test_an_incomplete_character_comes_at_the_end() -> None:
    assert pieces([97, 0xE2, 0x82]) == ["a", "", "", "�"]


def test_garbage_is_let_go_in_bounded_time() -> None:
    stream = Detokenizer(TOKENIZER, [])
    silent = 0
    for _ in range(500):
        silent = silent + 1 if stream.feed(0xFF) == "" else 0
        assert silent <= MAX_HELD_TOKENS
        assert len(stream._held) <= MAX_HELD_TOKENS + 1


def test_a_prompt_that_ends_inside_a_character() -> None:
    assert "".join(pieces(list(b"b"), prompt=[0xE2])) == "b"


chunk = st.one_of(
    st.text(max_size=4).map(lambda text: list(text.encode("utf-8", "ignore"))),
    st.lists(st.integers(0, 255), max_size=6),
    st.integers(1, 30).map(lambda n: [0xFF] * n),
    st.just([END]),
)


@given(st.lists(chunk, max_size=12), st.text(max_size=5))
def test_pieces_add_up_to_the_whole(chunks: list[list[int]], prompt: str) -> None:
    ids = [token for part in chunks for token in part]
    assert "".join(pieces(ids, list(prompt.encode("utf-8", "ignore")))) == TOKENIZER.decode(ids)


def run(stops: list[str], text: list[str], **options: bool) -> tuple[str, str | None]:
    stream = StopStrings(stops, **options)
    shown = ""
    for piece in text:
        result = stream.feed(piece)
        if isinstance(result, Stopped):
            return shown + result.text, result.stop
        shown += result
    return shown + stream.flush(), None


def test_stop_inside_one_piece() -> None:
    assert run(["END"], ["abENDcd"]) == ("ab", "END")


def test_stop_across_pieces_never_leaks() -> None:
    stream = StopStrings(["END"])
    assert stream.feed("aE") == "a"
    assert stream.feed("N") == ""
    assert stream.feed("D!") == Stopped("", "END")


def test_a_false_start_is_shown_late() -> None:
    assert run(["END"], ["aE", "N", "x"]) == ("aENx", None)
    assert run(["END"], ["aE", "N"]) == ("aEN", None)
    assert run(["aab"], ["a", "a", "a", "b"]) == ("a", "aab")


def test_the_earliest_stop_wins_and_the_longest_at_one_place() -> None:
    assert run(["cd", "b"], ["abcd"]) == ("a", "b")
    assert run(["b", "bc"], ["abcd"]) == ("a", "bc")


def test_the_stop_can_be_included() -> None:
    assert run(["\n"], ["a", "\n", "b"], include=True) == ("a\n", "\n")


def test_unarmed_text_passes() -> None:
    stream = StopStrings(["a"])
    assert stream.feed("aaa", armed=False) == "aaa"
    assert stream.feed("ba") == Stopped("b", "a")


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@given(
    text=st.text(alphabet="ab", max_size=30),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_equals_searching_the_whole_text(size: int, text: str, stops: list[str]) -> None:
    found = [text.find(stop) for stop in stops if stop in text]
    # an occurrence counts when it is complete, so the one that ends first may hide one that starts earlier
    shown, stop = run(stops, [text[i : i + size] for i in range(0, len(text), size)])
    assert (stop is None) == (not found)
    if stop is None:
        assert shown == text
    else:
        assert not any(other in shown for other in stops)
        assert text.startswith(shown + stop)
