"""Identities of a test list. Run: python -m pytest tests/test_overlap.py"""

from difflib import SequenceMatcher

import numpy as np
import pytest

from config import InputError
from overlap import find_overlap, normalise, read_names


def test_lfws_list_and_plain_ones(tmp_path, shared):
    names = read_names(shared / "data/people.txt")
    assert len(names) == 5749 and names[0] == "Abdel_Madi_Shabneh" and "10" not in names
    (tmp_path / "plain.txt").write_text("\ufeffAnn Lee\r\n\r\n  Bob_Ray \n007\n", encoding="utf-8")
    assert read_names(tmp_path / "plain.txt") == ["Ann Lee", "Bob_Ray", "007"]


@pytest.mark.parametrize("data", [b"", b"\n\n", b"10\n\t601\n", b"\xff\xd8\xff\xe0", None])
def test_what_is_no_list_is_refused(tmp_path, data):
    if data is not None:
        (tmp_path / "people.txt").write_bytes(data)
    with pytest.raises(InputError, match=r"people\.txt (can't be read|holds no name)"):
        read_names(tmp_path / "people.txt")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("0000045\n0000099\n0000100\n", ["0000045", "0000099", "0000100"]),  # CASIA's
        ("0000045\nAnn Lee\n12\n", ["0000045", "Ann Lee", "12"]),
        ("0000045\t13\n0000099\t5\n", ["0000045", "0000099"]),
        ("2\n1\n0000045\t13\n1\n0000099\t5\n", ["0000045", "0000099"]),  # as LFW's is
    ],
)
def test_numeric_names_are_names(tmp_path, text, names):
    (tmp_path / "people.txt").write_text(text)
    assert read_names(tmp_path / "people.txt") == names


def test_counts_behind_a_comma_or_a_blank(tmp_path):
    (tmp_path / "people.txt").write_text(
        "Ann Lee 3\nBob Ray,5\nCarl Day , 12\n0000045,9\nPerson 7\n"
    )
    names = read_names(tmp_path / "people.txt")
    assert names == [
        *("Ann Lee 3", "Ann Lee", "Bob Ray", "Carl Day", "0000045", "Person 7", "Person")
    ]
    people = ["ann_lee", "bob_ray", "Day_Carl", "0000045", "person_7", "person_8", "Eve_Fox"]
    found = find_overlap(people, names)
    assert list(found) == people[:5] and all(ratio == 1 for _, ratio in found.values())


def test_letters_that_are_no_letter_with_an_accent():
    for name, plain in (
        ("Łukasz_Żółć", "lukasz zolc"),
        ("Søren Đorđević", "dordevic soren"),
        ("I\u015f\u0131l ÖZGÜR", "isil ozgur"),
        ("Strauß", "strauss"),
        ("Æsa Œuvre Þór Guðrún", "aesa gudrun oeuvre thor"),
        ("Ħal Ŧor", "hal tor"),
    ):
        assert normalise(name) == plain


def test_spelling_does_not_hide_anyone():
    for name in ("Jos\u00e9 Garc\u00eda", "Jose\u0301 Garci\u0301a", "GARCIA, Jose", "jose_garcia"):
        assert normalise(name) == "garcia jose", name
    found = find_overlap(
        ["ann_lee", "Lee_Ann", "Annie_Lee", "Bob_Ray", "Stephen_Ebberharter", "Li_Na", "id00012"],
        ["Ann_Lee", "Stephan_Eberharter", "Li_Ma", "id00013", "Somebody_Else"],
    )
    assert found["ann_lee"] == ("Ann_Lee", 1.0) and found["Lee_Ann"] == ("Ann_Lee", 1.0)
    assert found["Stephen_Ebberharter"][0] == "Stephan_Eberharter"
    assert 0.9 <= found["Stephen_Ebberharter"][1] < 1
    assert "Bob_Ray" not in found and "Li_Na" not in found and "id00012" not in found


def test_the_quick_search_finds_what_the_slow_one_does(shared):
    """Names with a letter lost, doubled or replaced, against every 20th of LFW's."""
    names = read_names(shared / "data/people.txt")[::20]
    rng = np.random.default_rng(0)
    mine = []
    for name in names[::4]:
        at = int(rng.integers(len(name)))
        mine.append(name[:at] + ("", name[at] * 2, "x")[rng.integers(3)] + name[at + 1 :])
    slow = set()
    for one in mine:
        matcher = SequenceMatcher(None, autojunk=False)
        matcher.set_seq2(normalise(one))
        for other in names:
            matcher.set_seq1(normalise(other))
            if matcher.real_quick_ratio() >= 0.91 and matcher.ratio() >= 0.91:
                slow.add(one)
    assert len(slow) > 50 and slow <= set(find_overlap(mine, names))
