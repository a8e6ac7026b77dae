import io

import pytest
from rich.console import Console

from retinaface.evaluation.benchmark_step import step_table, step_timings

# Two steps of 100 and 50 ms, after one that warms up.
MARKS = [
    ("other", 0.0),
    ("data", 10.0),
    ("forward", 30.0),
    (None, 1000.0),
    ("data", 1005.0),
    ("other", 1025.0),
    ("forward", 1030.0),
    ("optimizer", 1060.0),
    ("other", 1070.0),  # within the optimizer's step
    ("optimizer", 1080.0),
    (None, 1100.0),
    ("forward", 1110.0),
    (None, 1150.0),
    ("data", 1160.0),  # of a step that does not end
    ("other", 1400.0),
]


@pytest.fixture
def timings():
    return step_timings(MARKS, warmup=1, images_per_step=8)


def test_what_belongs_to_a_part_is_added_up(timings):
    assert timings.parts == {
        "data": [20, 0],
        "forward": [30, 40],
        "optimizer": [30, 0],
        "other": [20, 10],
    }
    assert timings.steps == [100, 50]
    assert timings.images_per_second == pytest.approx(16 / 0.15)
    assert timings.share("forward") == pytest.approx(70 / 150)
    assert sum(map(timings.share, timings.parts)) == pytest.approx(1)


def test_figures_are_plain_and_say_the_spread(timings):
    figures = timings.figures()
    assert figures["steps"] == 2
    assert figures["step"] == {"median_ms": 75, "p10_ms": 55, "p90_ms": 95}
    assert figures["parts"]["data"] == {
        "median_ms": 10,
        "p10_ms": 2,
        "p90_ms": 18,
        "share": pytest.approx(2 / 15),
    }


def test_the_table_has_a_row_per_part(timings):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(step_table(timings, "a title"))
    text = console.export_text()
    for words in ("a title", "waiting for the next batch", "35.0", "31.0-39.0", "46.7%", "106.7 images/s"):
        assert words in text
    assert "teacher" not in text
