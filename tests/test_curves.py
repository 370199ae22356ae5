"""The picture of the experiments' curves. Run: python -m pytest tests/test_curves.py"""

import pytest

from benchmarks import curves, experiments
from benchmarks.experiments import Run, planned, write
from config import InputError

HEAD = ("photos_seen", "validation", "loss")


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    monkeypatch.setattr(curves, "OUT", tmp_path / "runs.png")
    return tmp_path


def put(run: Run, scores: list[float]) -> None:
    run.curves.parent.mkdir(exist_ok=True)
    rows = [dict(zip(HEAD, (100 * k, score, 1.0), strict=True)) for k, score in enumerate(scores)]
    write(run.curves, HEAD, rows)


def test_a_panel_a_group_a_line_a_change(results):
    final, ablations = list(planned("final")), list(planned("ablations"))
    for number, run in enumerate([*final, *ablations]):
        put(run, [50.0, 60.0 + number])
    drawn = curves.figure({"final": final, "ablations": ablations})
    one, other = drawn.axes
    changes = list(dict.fromkeys(run.change for run in ablations))
    assert len(one.lines) == 2 and len(other.lines) == len(changes)
    assert list(one.lines[0].get_xdata()) == [0, 100]
    assert list(one.lines[0].get_ydata()) == [50.0, 60.5]  # the mean of two seeds
    assert list(one.lines[1].get_ydata()) == [50.0, 62.0]
    assert [text.get_text() for text in other.get_legend().get_texts()] == changes
    looks = {(line.get_color(), line.get_linestyle()) for line in other.lines}
    assert len(looks) == len(changes)


def test_a_seed_with_another_number_of_photos_is_read_at_the_first_ones(results):
    runs = list(planned("final"))[:2]
    head = HEAD[:2]
    for run, step in zip(runs, (100, 50), strict=True):
        run.curves.parent.mkdir(exist_ok=True)
        write(run.curves, head, [dict(zip(head, (step * k, 10.0 * k), strict=True))
                                 for k in range(4)])  # fmt: skip
    seen, scores = curves.mean_curve(runs)
    assert seen.tolist() == [0, 100, 200, 300]
    assert scores.tolist() == [0.0, 15.0, 25.0, 30.0]


def test_runs_that_are_not_done_are_left_out(results):
    with pytest.raises(InputError, match=r"experiments\.py"):
        curves.main(curves.Options())
    put(next(planned("peers")), [50.0, 60.0])
    curves.main(curves.Options())
    assert (results / "runs.png").stat().st_size > 5000
