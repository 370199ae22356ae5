"""Identities of a set that also stand in a list of test people, whatever the spelling.

    names = read_names(Path("people.txt"))               # LFW's people.txt, or a name a line
    twins = find_overlap(identities, names)              # identity -> the name it is like, and how

Names are compared without case, accents, punctuation and order of their words. Whoever is alike by
0.9 (difflib's ratio) counts too: a training set loses little by one person too many, a test is
spoiled by one too few. Names with digits, such as `n000012`, must be equal.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from difflib import SequenceMatcher
from pathlib import Path

from config import InputError
from manifest import EXCLUDED, Row

ALIKE = 0.9  # "Anne Lee" and "Ann Lee": 0.93; "Jean Marie Le Pen" without "Le": 0.9
# Letters that are to Unicode no others with an accent; of the sharp s, case folding makes ss.
_LETTERS = str.maketrans(
    {"ł": "l", "ø": "o", "đ": "d", "ħ": "h", "ŧ": "t", "\u0131": "i"}
    | {"æ": "ae", "œ": "oe", "ð": "d", "þ": "th"}
)
_SHARED = 0.45  # of the trigrams: below it no ratio reaches 0.9 in names of 6 letters and more


def read_names(path: Path) -> list[str]:
    """The names of a list. LFW's people.txt: counts on lines of their own, `name<TAB>photos`.

    Of `Ann Lee,5` the 5 is a count too. That of `Ann Lee 5` may be one or part of the name: both
    stand among the names. Raises InputError: not there, no text, or no name in it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"{path} can't be read ({said}): name a list of people") from error
    # LFW's: how many sets, and how many names in each. Of a plain list the numbers are names.
    if lines and lines[0].strip().isdigit() and any("\t" in line for line in lines):
        lines = [line for line in lines if not line.strip().isdigit()]
    names = []
    for line in lines:
        name = re.sub(r"\s*,\s*\d+$", "", line.split("\t")[0].strip())
        names += dict.fromkeys((name, re.sub(r"\s+\d+$", "", name)))
    names = [name for name in names if normalise(name)]
    if not names:
        raise InputError(f"{path} holds no name: it takes LFW's people.txt, or a name a line")
    return names


def normalise(name: str) -> str:
    """`García_José` -> `garcia jose`, and so `Jose Garcia`; `Łukasz Sørensen` is plain, too."""
    plain = unicodedata.normalize("NFKD", name.casefold()).translate(_LETTERS)
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return " ".join(sorted(re.findall(r"[^\W_]+", plain)))


def find_overlap(identities: Iterable[str], names: Iterable[str]) -> dict[str, tuple[str, float]]:
    """-> those of the identities that are like a name: the name as the list has it, and the ratio.

    Pairs are looked at only where they share trigrams: 10 thousand identities against LFW's 5,749
    names take seconds.
    """
    known = {normalise(name): name for name in names}
    plain = list(known)
    index: dict[str, list[int]] = defaultdict(list)  # trigram -> names
    for number, name in enumerate(plain):
        if not re.search(r"\d", name):
            for gram in _trigrams(name):
                index[gram].append(number)
    sizes = [len(_trigrams(name)) for name in plain]
    found = {}
    for identity in identities:
        mine = normalise(identity)
        if mine in known:
            found[identity] = known[mine], 1.0
        elif mine and not re.search(r"\d", mine):
            best = max(_alike(mine, plain, index, sizes), default=(0.0, ""))
            if best[0] >= ALIKE:
                found[identity] = known[best[1]], best[0]
    return found


def excluded_rows(photos: Iterable, names: Path | None) -> dict[str, Row]:
    """Manifest rows of the photos whose identities the list names, by source.

    Raises InputError: it names all of them.
    """
    if names is None:
        return {}
    photos = list(photos)
    people = {photo.identity for photo in photos}
    found = find_overlap(people, read_names(names))
    if len(found) == len(people):
        raise InputError(f"{names} names every identity of the set: leave out --exclude-names")
    reasons = {
        identity: f"named {'' if ratio == 1 else 'much '}like {name} in {names.name}"
        for identity, (name, ratio) in found.items()
    }
    return {
        photo.source: Row(photo.source, photo.identity, "", EXCLUDED, reasons[photo.identity])
        for photo in photos
        if photo.identity in reasons
    }


def _alike(
    mine: str, plain: list[str], index: dict[str, list[int]], sizes: list[int]
) -> Iterable[tuple[float, str]]:
    """Ratio and name of all that share enough trigrams."""
    grams = _trigrams(mine)
    shared = Counter(number for gram in grams for number in index.get(gram, ()))
    for number, count in shared.items():
        if 2 * count >= _SHARED * (len(grams) + sizes[number]):
            yield SequenceMatcher(None, mine, plain[number], autojunk=False).ratio(), plain[number]


def _trigrams(name: str) -> set[str]:
    padded = f"  {name.replace(' ', '  ')} "
    return {padded[at : at + 3] for at in range(len(padded) - 2)}
