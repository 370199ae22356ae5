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
    """All of one seed: each holds out other people."""
    final, ablations = list(planned("final")), list(planned("ablations"))
    for number, run in enumerate([*final, *ablations]):
        put(run, [50.0, 60.0 + number])
    drawn = curves.figure({"final": curves.of_seed_0(final), "abl": curves.of_seed_0(ablations)})
    one, other = drawn.axes
    changes = list(dict.fromkeys(run.change for run in ablations))
    of_seed_0 = [50.0 + 10 + n for n, run in enumerate(final) if run.seed == 0]
    assert 1 < len(of_seed_0) < len(final)
    assert len(other.lines) == len(changes)
    assert list(one.lines[0].get_xdata()) == [0, 100]
    assert [list(line.get_ydata()) for line in one.lines] == [[50.0, last] for last in of_seed_0]
    assert [text.get_text() for text in other.get_legend().get_texts()] == changes
    looks = {(line.get_color(), line.get_linestyle()) for line in other.lines}
    assert len(looks) == len(changes)


def test_runs_that_are_not_done_are_left_out(results):
    with pytest.raises(InputError, match=r"experiments\.py"):
        curves.main(curves.Options())
    put(next(planned("peers")), [50.0, 60.0])
    curves.main(curves.Options())
    assert (results / "runs.png").stat().st_size > 5000
