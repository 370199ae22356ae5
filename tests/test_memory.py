"""The benchmark of memory, without its load. Run: python -m pytest tests/test_memory.py"""

import pytest

from benchmarks import memory
from conftest import manifest_row, write_manifest
from manifest import REJECTED


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """-> a function that watches a script of one line in the place of pre_process.py."""

    def run(line: str) -> None:
        (tmp_path / "pre_process.py").write_text(line)
        monkeypatch.setattr(memory, "ROOT", tmp_path)
        memory.watch(tmp_path / "src", tmp_path, 3)

    return run


@pytest.mark.parametrize(("end", "code"), [("sys.exit(2)", 2), ("os.abort()", 1)])
def test_a_failure_of_what_is_measured_is_a_failure(watch, capsys, end, code):
    with pytest.raises(SystemExit) as error:
        watch(f"import os, sys; {end}")
    assert error.value.code == code and "pre_process.py failed" in capsys.readouterr().out


def test_rejected_photos_are_told(watch, tmp_path, capsys):
    rows = [manifest_row("a/1.jpg"), manifest_row("a/2.jpg", REJECTED)]
    write_manifest(tmp_path, [*rows, manifest_row("a/3.jpg", REJECTED)])
    watch("print('done')")
    out = capsys.readouterr().out
    assert "done" in out and "WARNING: 2 of 3 photos were rejected: 2 no face found" in out
    write_manifest(tmp_path, rows[:1])
    assert memory.rejected(tmp_path) == ""
