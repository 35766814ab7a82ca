import math

import pytest

from textcond.data.rows import Problems
from textcond.data.run import Run


def test_lines_of_a_query_may_lie_anywhere_and_ranks_decide(tmp_path):
    path = tmp_path / "run.tsv"
    path.write_text("10\tb\t2\n11\tx\t1\n\n10\ta\t1\n10\tb\t3\n")
    run = Run(path)
    assert list(run.documents("10")) == ["a", "b"]
    assert math.isnan(run.documents("11")["x"])
    assert run.documents("12") == {}
    path.write_text("q Q0 b 2 0.5 tag\nq Q0 a 1 0.75 tag")
    assert list(Run(path).documents("q").items()) == [("a", 0.75), ("b", 0.5)]
    assert Run(path).digest != run.digest


def test_malformed_lines_are_errors_or_skipped(tmp_path):
    path = tmp_path / "run.tsv"
    path.write_text("q\ta\t1\nq\tb\nq\tc\tbest\nq\td\t2\n")
    with pytest.raises(ValueError, match=r"run\.tsv:2: 'q\\tb' is no line of a run"):
        Run(path)
    problems = Problems("skip")
    assert list(Run(path, problems=problems).documents("q")) == ["a", "d"]
    assert problems.skipped == 2
    with pytest.raises(ValueError, match="packed"):
        Run(tmp_path / "run.tsv.gz")
    with pytest.raises(FileNotFoundError):
        Run(tmp_path / "none.tsv")
