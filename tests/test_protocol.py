"""Pair lists and verification numbers. Run: python -m pytest tests/test_protocol.py"""

import itertools
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import sklearn.model_selection

import protocol
from config import InputError

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


# --- reading --------------------------------------------------------------------------------------


def lfw_lines(folds: int, per_fold: int, genuine_first: bool = False) -> list[str]:
    """An LFW list in which a pair's names tell its fold: G<fold>_<n> and I<fold>_<n>."""
    genuine = [[f"G{f}_{n}\t1\t2" for n in range(per_fold)] for f in range(folds)]
    impostor = [[f"I{f}_{n}\t1\tJ{f}_{n}\t12" for n in range(per_fold)] for f in range(folds)]
    if genuine_first:
        body = [line for part in genuine + impostor for line in part]
    else:
        body = [line for fold in range(folds) for line in genuine[fold] + impostor[fold]]
    return [f"{folds}\t{per_fold}", *body]


def write(path: Path, lines: list[str], end: str = "\n") -> Path:
    path.write_bytes((end.join(lines) + end).encode())
    return path


@pytest.mark.parametrize("genuine_first", [False, True])
def test_the_kind_comes_from_the_columns_and_the_fold_from_the_count(tmp_path, genuine_first):
    pairs = protocol.read_pairs(write(tmp_path / "p.txt", lfw_lines(10, 3, genuine_first)))
    assert len(pairs) == 60
    for left, right, same, fold in zip(
        pairs.left, pairs.right, pairs.same, pairs.fold, strict=True
    ):
        assert left[0] == ("G" if same else "I")
        assert int(left[1 : left.index("_")]) == fold
        assert right == (left[:-1] + "2" if same else right)
    assert pairs.folds_from == "10 folds as listed"
    assert pairs.left[0] == "G0_0/G0_0_0001"
    assert pairs.right[list(pairs.same).index(False)] == "J0_0/J0_0_0012"


def same_pairs(a: protocol.Pairs, b: protocol.Pairs) -> bool:
    return (
        a.left == b.left
        and a.right == b.right
        and bool(np.all(a.same == b.same))
        and bool(np.all(a.fold == b.fold))
    )


def test_row_38_line_ends_blanks_and_tabs_do_not_matter(tmp_path):
    lines = lfw_lines(2, 2)
    plain = protocol.read_pairs(write(tmp_path / "plain", lines))
    for name, changed, end in (
        ("crlf", lines, "\r\n"),
        ("cr", lines, "\r"),
        ("trailing", [line + " \t " for line in lines], "\n"),
        ("spaces", [line.replace("\t", "  ") for line in lines], "\n"),
        ("mixed", [line.replace("\t", "\t ") for line in lines], "\n"),
        ("empty", ["", *lines, "", "  "], "\n"),
        ("bom", ["\ufeff" + lines[0], *lines[1:]], "\n"),
    ):
        assert same_pairs(plain, protocol.read_pairs(write(tmp_path / name, changed, end))), name
    (tmp_path / "unfinished").write_bytes("\n".join(lines).encode())  # no line end at the end
    assert same_pairs(plain, protocol.read_pairs(tmp_path / "unfinished"))


def test_listed_pairs_with_and_without_folds(tmp_path):
    lines = ["# a comment", "a b/1.jpg\tc/2.jpg\t1", "a b/1.jpg\t.\\d\\3.png\tdifferent"] * 2
    pairs = protocol.read_pairs(write(tmp_path / "p.tsv", lines))
    assert pairs.left == ["a b/1.jpg"] * 4 and pairs.right == ["c/2.jpg", "d/3.png"] * 2
    assert pairs.same.tolist() == [True, False] * 2 and pairs.line.tolist() == [2, 3, 5, 6]
    assert pairs.fold.tolist() == [0, 0, 1, 1] and "cut" in pairs.folds_from
    assert pairs.where(3) == f"{tmp_path / 'p.tsv'}:6"

    lines = [f"a/{i} b/{i} {i % 2} {7 - i % 3}" for i in range(12)]  # blanks, folds 5 to 7
    pairs = protocol.read_pairs(write(tmp_path / "folds.tsv", lines))
    assert pairs.fold.tolist() == [2 - i % 3 for i in range(12)]
    assert pairs.folds_from == "3 folds as listed"


def test_a_list_without_folds_is_cut_into_ten_contiguous_shares(tmp_path):
    lines = [f"a/{i}\tb/{i}\t{int(i < 25)}" for i in range(60)]  # 25 genuine, then 35 impostor
    pairs = protocol.read_pairs(write(tmp_path / "p.tsv", lines))
    for kind in (pairs.same, ~pairs.same):
        sizes = np.bincount(pairs.fold[kind])
        assert len(sizes) == 10 and sizes.max() - sizes.min() <= 1
        assert (np.diff(pairs.fold[kind]) >= 0).all()


def test_view_1_has_one_fold_which_is_cut(tmp_path):
    lines = ["20", *(f"G{n} 1 2" for n in range(20)), *(f"I{n} 1 J{n} 1" for n in range(20))]
    pairs = protocol.read_pairs(write(tmp_path / "view1", lines))
    assert np.bincount(pairs.fold).tolist() == [4] * 10
    assert "names none" in pairs.folds_from
    lines = [f"{n}a\t{n}b\t{n % 2}\t7" for n in range(20)]
    pairs = protocol.read_pairs(write(tmp_path / "one", lines))
    assert np.bincount(pairs.fold).tolist() == [2] * 10 and "names one" in pairs.folds_from


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["2\t2", *lfw_lines(2, 2)[2:]], "p:1: this line promises 2 x 2 genuine pairs, 3 are"),
        (lfw_lines(2, 2)[:-1], "p:1: this line promises 2 x 2 impostor pairs, 3 are"),
        ([*lfw_lines(2, 2), "extra\t1\t2"], "2 x 2 genuine pairs, 5 are listed"),
        ([*lfw_lines(1, 2)[:2], "A\t1"], "p:3: 2 columns"),
        ([*lfw_lines(1, 2)[:2], "A\t1\tB\t2\t3"], "p:3: 5 columns"),
        ([*lfw_lines(1, 2)[:2], "A\t1\tx2"], "p:3: 'x2' is not a photo number of A"),
        ([*lfw_lines(1, 2)[:2], "A\t0\t1"], "p:3: '0' is not a photo number"),
        ([*lfw_lines(1, 2)[:2], "A\t1\tA\t2"], "p:3: an impostor pair (four columns) of one name"),
        (["1 1", "A\t1\t1", "B 1 C 1"], "p:2: the same photo twice (A/A_0001)"),
        (["a\tb\t1", "c\tc\t0", "d\te\t1", "f\tg\t0"], "p:2: the same photo twice (c)"),
        (["a\tb\t1", "c\td\t2"], "p:2: unknown label '2'"),
        (["Abel_Pacheco\t1\t4"], "p:1: unknown label '4'"),
        (["a\tb\t1", "c\td\t0\t1"], "p:2: 4 columns, 3 in the lines above"),
        (["a\tb\t1\t0", "c\td\t0\tx"], "p:2: 'x' is not the number of a fold"),
        (["a\tb\t1", "c d 0 1 2 3"], "p:2: 6 columns"),
        (["a\tb\t1", "\tb\t1"], "p:2: an empty path"),
        (["1\t1", "\t1\t2", "B 1 C 1"], "p:2: an empty name"),
        (["a\tb\t1", "c\td\t1"], "no impostor pair"),
        (["a\tb\t0"], "no genuine pair"),
        (["a\tb\t0", "a\tc\t1"], "at least two genuine and two impostor"),
        ([], "no pairs in this file"),
        (["a\0b"], "not a text file"),
    ],
)
def test_row_38_a_bad_list_is_refused_with_its_line(tmp_path, lines, says):
    with pytest.raises(InputError) as refusal:
        protocol.read_pairs(write(tmp_path / "p", lines))
    assert says in str(refusal.value) and "\n" not in str(refusal.value)
    assert str(tmp_path / "p") in str(refusal.value)


def test_a_file_that_is_no_text_or_is_not_there_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\x80\x04\x95\xff\xfe")
    for name in ("binary", "absent", "."):
        with pytest.raises(InputError, match=name):
            protocol.read_pairs(tmp_path / name)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs LFW's own lists")
def test_lfws_own_lists():
    pairs = protocol.read_pairs(SHARED / "pairs.txt")
    assert len(pairs) == 6000 and pairs.same.sum() == 3000
    assert (pairs.fold == np.arange(6000) // 600).all()
    assert (pairs.same == (np.arange(6000) % 600 < 300)).all()
    assert pairs.left[0] == "Abel_Pacheco/Abel_Pacheco_0001"
    view1 = protocol.read_pairs(SHARED / "pairsDevTest.txt")
    assert len(view1) == 1000 and np.bincount(view1.fold).tolist() == [100] * 10


# --- angles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [0.0, 1e-9, 1e-6, 0.1, 30, 90, 150, 179.9, 180 - 1e-6, 180.0])
def test_angles_are_exact_to_the_last_digits_at_both_ends(degrees):
    angle = np.radians(degrees)
    left = np.array([[3.0, 0.0]])
    right = 7 * np.array([[np.cos(angle), np.sin(angle)]])
    assert abs(protocol.theta(left, right)[0] - degrees) <= 1e-13 * max(degrees, 1)


def test_angles_of_random_embeddings_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((2, 50, 512)).astype(np.float32)
    expected = [
        np.degrees(np.arccos(sum(a * b) / (sum(a * a) ** 0.5 * sum(b * b) ** 0.5)))
        for a, b in zip(left.astype(float).tolist(), right.astype(float).tolist(), strict=True)
        for a, b in [(np.array(a), np.array(b))]
    ]
    np.testing.assert_allclose(protocol.theta(left, right), expected, atol=1e-10)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_row_39_an_embedding_without_an_angle_is_refused(bad):
    rows = np.ones((3, 4), dtype=np.float32)
    broken = rows.copy()
    broken[1] = bad
    with pytest.raises(ValueError, match="no angle"):
        protocol.theta(rows, broken)


# --- accuracy -------------------------------------------------------------------------------------


def scores(seed: int, n: int = 200, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    same = rng.random(n) < 0.5
    angles = np.where(same, rng.normal(55, 12, n), rng.normal(80, 9, n))
    return (angles.round(-1) if ties else angles), same


def brute_threshold(angles: list[float], same: list[bool]) -> tuple[float, int]:
    """The same choice by trying every threshold on every pair."""
    values = sorted(set(angles))
    tried = [values[0] - 0.5]
    tried += [(a + b) / 2 for a, b in itertools.pairwise(values)]
    tried += [values[-1] + 0.5]
    right = [sum((a < t) == s for a, s in zip(angles, same, strict=True)) for t in tried]
    best = [t for t, count in zip(tried, right, strict=True) if count == max(right)]
    return best[(len(best) - 1) // 2], max(right)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_the_best_of_all(seed, ties):
    angles, same = scores(seed, ties=ties)
    expected, right = brute_threshold(angles.tolist(), same.tolist())
    assert protocol.best_threshold(angles, same) == pytest.approx(expected, abs=1e-12)
    accuracy, cut = protocol.tuned_accuracy(angles, same)
    assert accuracy == right / len(angles) and cut == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_ten_folds_equal_kfold_with_a_loop(seed, ties):
    angles, same = scores(seed, ties=ties)
    fold = np.arange(len(angles)) // 20
    folds = protocol.kfold_accuracy(angles, same, fold)
    splits = sklearn.model_selection.KFold(10, shuffle=False).split(angles)
    for number, (train, test) in enumerate(splits):
        cut, _ = brute_threshold(angles[train].tolist(), same[train].tolist())
        right = sum((angles[i] < cut) == same[i] for i in test)
        assert folds.threshold[number] == pytest.approx(cut, abs=1e-12)
        assert folds.accuracy[number] == pytest.approx(right / len(test), abs=1e-12)
    mean = sum(folds.accuracy) / 10
    sigma = (sum((a - mean) ** 2 for a in folds.accuracy) / 9) ** 0.5  # LFW's README
    assert folds.mean == pytest.approx(mean, abs=1e-12)
    assert folds.std == pytest.approx(sigma, abs=1e-12)
    assert folds.standard_error == pytest.approx(sigma / 10**0.5, abs=1e-12)


def test_the_threshold_never_sees_the_fold_it_is_applied_to():
    """Fold 0 alone would choose 25; the others are separated by 65."""
    angles = np.array([10.0, 20.0, 30.0, 40.0] + [50.0, 60.0, 70.0, 80.0] * 2)
    same = np.array([True, True, False, False] * 3)
    folds = protocol.kfold_accuracy(angles, same, np.arange(12) // 4)
    assert folds.threshold[0] == 65 and folds.accuracy[0] == 0.5


def test_separable_scores_are_cut_in_the_middle_of_the_gap():
    angles, same = np.array([10.0, 20.0, 80.0, 90.0] * 2), np.array([True, True, False, False] * 2)
    folds = protocol.kfold_accuracy(angles, same, np.arange(8) // 4)
    assert folds.threshold.tolist() == [50, 50] and folds.mean == 1 and folds.std == 0


def test_a_pair_exactly_at_the_threshold_is_refused():
    angles = np.array([10.0, 20.0, 15.0, 15.0])  # fold 0 sets 15 for fold 1
    folds = protocol.kfold_accuracy(angles, np.array([True, False] * 2), np.array([0, 0, 1, 1]))
    assert folds.threshold[1] == 15 and folds.accuracy[1] == 0.5
    folds = protocol.kfold_accuracy(
        angles, np.array([True, False, False, False]), np.arange(4) // 2
    )
    assert folds.accuracy[1] == 1


def test_neighbouring_floats_are_still_told_apart():
    low = 60.0
    angles, same = np.array([low, np.nextafter(low, 90)]), np.array([True, False])
    assert protocol.tuned_accuracy(angles, same)[0] == 1


def test_row_39_all_scores_equal():
    angles, same, fold = np.full(40, 70.0), np.arange(40) % 2 == 0, np.arange(40) // 4
    folds = protocol.kfold_accuracy(angles, same, fold)
    assert folds.mean == 0.5 and folds.std == 0 and np.isfinite(folds.threshold).all()
    assert protocol.auc(angles, same) == 0.5 and protocol.eer(angles, same) == 0.5
    assert protocol.tar_at_far(angles, same, 0.1) == pytest.approx(0.1)
    assert protocol.d_prime(angles, same) is None


@pytest.mark.parametrize("extreme", [0.0, 180.0])
def test_row_39_all_scores_at_an_end(extreme):
    angles, same, fold = np.full(40, extreme), np.arange(40) % 2 == 0, np.arange(40) // 4
    assert protocol.kfold_accuracy(angles, same, fold).mean == 0.5


def test_row_39_a_fold_of_one_kind_is_scored():
    angles, same = scores(3, 60)
    folds = protocol.kfold_accuracy(angles, same, np.where(same, 0, 1))
    # The genuine fold gets the threshold that refuses every impostor pair, and the other way round.
    refuse, accept = angles[~same].min() - 0.5, angles[same].max() + 0.5
    assert folds.threshold.tolist() == [refuse, accept]
    expected = [np.mean(angles[same] < refuse), np.mean(angles[~same] >= accept)]
    assert folds.accuracy.tolist() == expected


def test_row_39_what_has_no_number_is_refused():
    angles, same = scores(0, 40)
    with pytest.raises(ValueError, match="one fold only"):
        protocol.kfold_accuracy(angles, same, np.zeros(40, dtype=int))
    broken = angles.copy()
    broken[7] = np.nan
    for measure in (protocol.auc, protocol.eer, protocol.roc, protocol.tuned_accuracy):
        with pytest.raises(ValueError, match="not finite"):
            measure(broken, same)
    with pytest.raises(ValueError, match="not finite"):
        protocol.kfold_accuracy(broken, same, np.arange(40) // 4)
    for measure in (protocol.auc, protocol.eer, protocol.roc, protocol.d_prime):
        with pytest.raises(ValueError, match="both genuine and impostor"):
            measure(angles, np.ones(40, dtype=bool))
    with pytest.raises(ValueError, match="one of each per pair"):
        protocol.auc(angles, same[:-1])


# --- curves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_curve_equals_scikit_learn(seed, ties):
    angles, same = scores(seed, 500, ties)
    far, tar = protocol.roc(angles, same)
    sk_far, sk_tar, _ = sklearn.metrics.roc_curve(same, -angles, drop_intermediate=False)
    np.testing.assert_allclose(far, sk_far, atol=1e-12)
    np.testing.assert_allclose(tar, sk_tar, atol=1e-12)
    sk_auc = sklearn.metrics.roc_auc_score(same, -angles)
    assert protocol.auc(angles, same) == pytest.approx(sk_auc, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_auc_is_the_share_of_pairs_in_the_right_order(ties):
    angles, same = scores(11, 120, ties)
    wins = Fraction(0)
    for g in angles[same]:
        for i in angles[~same]:
            wins += Fraction(1) if g < i else Fraction(1, 2) if g == i else Fraction(0)
    expected = float(wins / int(same.sum()) / int((~same).sum()))
    assert protocol.auc(angles, same) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_eer_lies_on_the_curve_where_both_errors_are_equal(seed, ties):
    angles, same = scores(seed, 300, ties)
    rate = protocol.eer(angles, same)
    sk_far, sk_tar, _ = sklearn.metrics.roc_curve(same, -angles, drop_intermediate=False)
    # Independent: bisection on the curve, joined by straight lines and walked by its length.
    walk = np.arange(len(sk_far), dtype=float)
    low, high = 0.0, float(len(sk_far) - 1)
    for _ in range(100):
        middle = (low + high) / 2
        if np.interp(middle, walk, sk_far) < 1 - np.interp(middle, walk, sk_tar):
            low = middle
        else:
            high = middle
    assert rate == pytest.approx(np.interp(high, walk, sk_far), abs=1e-12)


def test_tar_at_far_counts_the_genuine_pairs_below_the_kth_impostor():
    """Without ties, TAR at FAR k/n is the share of genuine pairs closer than impostor k + 1, and
    stays so until k + 1 impostors are let in."""
    angles, same = scores(4, 800)
    impostors = sorted(angles[~same])
    for k in (1, 2, 5, 40):
        expected = sum(angles[same] < impostors[k]) / sum(same)
        for far in (k / len(impostors), (k + 0.7) / len(impostors)):
            assert protocol.tar_at_far(angles, same, far) == pytest.approx(expected, abs=1e-12)


def test_tar_at_far_is_none_where_no_impostor_can_measure_it():
    same = np.arange(2000) < 1000
    angles = np.where(same, 50.0, 90.0) + np.arange(2000) / 1000
    assert protocol.tar_at_far(angles, same, 1e-3) == 1
    assert protocol.tar_at_far(angles[:-1], same[:-1], 1e-3) is None
    assert protocol.tar_at_far(angles, same, 1e-4) is None


def test_d_prime_of_known_normals():
    angles = np.array([40.0, 60.0, 80.0, 100.0])  # both kinds have sigma 10, the means are 40 apart
    assert protocol.d_prime(angles, np.array([True, True, False, False])) == pytest.approx(4)


def test_six_thousand_pairs_take_less_than_a_second():
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((2, 6000, 512)).astype(np.float32)
    same, fold = np.arange(6000) % 600 < 300, np.arange(6000) // 600
    start = time.perf_counter()
    angles = protocol.theta(left, right)
    protocol.kfold_accuracy(angles, same, fold)
    protocol.tuned_accuracy(angles, same)
    for measure in (protocol.auc, protocol.eer, protocol.d_prime):
        measure(angles, same)
    for far in (1e-1, 1e-2, 1e-3, 1e-4):
        protocol.tar_at_far(angles, same, far)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("angle", [33.3333, 60.123456789, 70.0, 70.1])
def test_row_39_d_prime_of_equal_angles_is_none_whatever_they_are(angle):
    angles, same = np.full(40, angle), np.arange(40) % 2 == 0
    assert protocol.d_prime(angles, same) is None
    apart = np.where(same, angle, angle + 1.7)
    assert protocol.d_prime(apart, same) is None


def test_row_38_a_path_may_begin_with_the_sign_of_a_comment(tmp_path):
    lines = [
        "# a comment",
        "#1/a.jpg\tb.jpg\t1",
        "c.jpg\td.jpg\t0",
        "",
        "e.jpg\tf.jpg\t0",
        "g.jpg\th.jpg\t1",
    ]
    (tmp_path / "p.tsv").write_text("\n".join(lines))
    pairs = protocol.read_pairs(tmp_path / "p.tsv")
    assert len(pairs) == 4 and pairs.left[0] == "#1/a.jpg"


def test_row_38_a_pair_with_both_answers_is_refused(tmp_path):
    (tmp_path / "p.tsv").write_text("a\tb\t1\nc\td\t0\nb\ta\t0\n")
    with pytest.raises(InputError, match=r"p\.tsv:3: the pair of line 1 with the other label"):
        protocol.read_pairs(tmp_path / "p.tsv")
    (tmp_path / "p.tsv").write_text(f"{'9' * 5000}\nx 1 2\n")
    with pytest.raises(InputError):
        protocol.read_pairs(tmp_path / "p.tsv")


def test_row_39_folds_of_one_kind_each_are_refused(tmp_path):
    (tmp_path / "p.tsv").write_text("a\tb\t1\t0\nc\td\t1\t0\ne\tf\t0\t1\ng\th\t0\t1\n")
    with pytest.raises(InputError, match="beside fold 0 there are pairs of one kind only"):
        protocol.read_pairs(tmp_path / "p.tsv")


# --- a threshold for use --------------------------------------------------------------------------


@pytest.mark.parametrize("far", [1e-3, 1e-2, 0.1, 0.5])
def test_no_higher_threshold_keeps_the_false_accept_rate(far):
    angles = np.random.default_rng(3).normal(88, 5, 4000)
    threshold = protocol.threshold_at_far(angles, far)
    assert np.mean(angles < threshold) <= far < np.mean(angles <= threshold)


def test_a_threshold_with_equal_angles_accepts_none_of_them():
    angles = np.array([70.0, 80.0, 80.0, 80.0, 90.0, 90.0, 90.0, 90.0, 90.0, 90.0])
    assert protocol.threshold_at_far(angles, 0.2) == 80.0
    assert protocol.threshold_at_far(angles, 1.0) == 90.0  # an angle of a photo itself is not asked
    with pytest.raises(ValueError, match="10 impostor pairs can't show"):
        protocol.threshold_at_far(angles, 0.05)
