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


def test_a_panel_a_group_a_line_a_run_a_colour_a_change(results):
    final, ablations = list(planned("final")), list(planned("ablations"))
    for number, run in enumerate([*final, *ablations]):
        put(run, [50.0, 60.0 + number])
    drawn = curves.figure({"final": final, "ablations": ablations})
    one, other = drawn.axes
    assert len(one.lines) == len(final) and len(other.lines) == len(ablations)
    assert list(one.lines[0].get_xdata()) == [0, 100]
    assert list(one.lines[1].get_ydata()) == [50.0, 61.0]
    assert one.lines[0].get_color() == one.lines[1].get_color()
    shown = [text.get_text() for text in other.get_legend().get_texts()]
    assert shown == list(dict.fromkeys(run.change for run in ablations))
    looks = {run.change: set() for run in ablations}
    for run, line in zip(ablations, other.lines, strict=True):
        looks[run.change].add((line.get_color(), line.get_linestyle()))
    assert all(len(found) == 1 for found in looks.values())
    assert len(set.union(*looks.values())) == len(looks)


def test_runs_that_are_not_done_are_left_out(results):
    with pytest.raises(InputError, match=r"experiments\.py"):
        curves.main(curves.Options())
    put(next(planned("peers")), [50.0, 60.0])
    curves.main(curves.Options())
    assert (results / "runs.png").stat().st_size > 5000
