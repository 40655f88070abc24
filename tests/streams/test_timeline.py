"""Timelines: sentences by second, from a file or a mapping, and a stream that follows one."""

import itertools

import pytest
from shared.numbered import FRAMES, Numbered

from rehyat_jax.errors import RehyatError
from rehyat_jax.streams.timeline import Timeline

GOOD = """
# a comment
0 = "a cat"
4.5 = "a dog"   # and a word beside it
"6" = 'a "bird"'
"""


@pytest.fixture
def file(tmp_path):
    def write(text: str):
        path = tmp_path / "t.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_file_has_a_sentence_a_line(file):
    timeline = Timeline.read(file(GOOD))
    assert timeline == Timeline({0.0: "a cat", 4.5: "a dog", 6.0: 'a "bird"'})
    assert [timeline.at(second) for second in (0, 4.4, 4.5, 5.9, 6, 1e6)] == ["a cat"] * 2 + ["a dog"] * 2 + [
        'a "bird"'
    ] * 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('0 = "a"\n\n1 = 5\n', "line 3: a sentence is a text"),
        ('0 = "a"\n2 = "b"\n1 = "c"\n', "line 3: seconds rise from line to line, and 1 comes after 2"),
        ('0 = "a"\n0 = "b"\n', "line 2: seconds rise"),
        ('1 = "a"\n', "line 1: the first sentence counts from second 0"),
        ('0 = "a"\nsoon = "b"\n', "line 2: not seconds and a sentence"),
        ('0 = "a\n', "line 1: not seconds and a sentence"),
        ('0 = "a"\n[1]\n', "line 2: not seconds"),
        ('0 = "a"\ninf = "b"\n', "line 2: a second is a finite number"),
        ('0 = "  "\n', "line 1: a sentence is a text that is not empty"),
        ("# nothing\n", "has no sentence"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(file, text, words):
    with pytest.raises(RehyatError, match=words):
        Timeline.read(file(text))


@pytest.mark.parametrize("sentences", [{}, {1: "a"}, {0: "a", 2: "b", 1: "c"}, {0: 5}, {"0": "a"}, {True: "a"}])
def test_a_mapping_is_checked_as_a_file(sentences):
    with pytest.raises(RehyatError, match="timeline"):
        Timeline(sentences)


def test_a_stream_follows_it_chunk_by_chunk():
    """Four frames a chunk at 16 a second: chunks begin at 0, 0.25, 0.5, …; a sentence from 0.3 on counts from 0.5."""
    stream = Numbered("whatever")
    shown = []
    for _ in itertools.islice(Timeline({0: "a", 0.3: "b", 0.75: "c"}).follow(stream, fps=16), 5):
        shown.append((stream.frames_done - FRAMES, stream.prompt))
    assert shown == [(0, "a"), (4, "a"), (8, "b"), (12, "c"), (16, "c")]
