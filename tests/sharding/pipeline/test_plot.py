"""Pictures of timelines: what is in them by colour; that nothing but drawing asks for Matplotlib."""

import subprocess
import sys

import numpy as np

from sharding.pipeline import make_schedule, simulate
from sharding.pipeline.plot import write_timelines

FORWARD, BACKWARD, FOR_INPUT, FOR_WEIGHTS = "#f3b944", "#57a773", "#3f9fa8", "#6f86c6"
SECOND_FORWARD = "#fae3ae"


def _share(picture: np.ndarray, color: str) -> float:
    """Share of the pixels that have a color."""
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return float((picture[..., :3] == rgb).all(axis=-1).mean())


def _drawn(path, *timelines) -> np.ndarray:
    from matplotlib.image import imread

    write_timelines(path, timelines)
    return np.round(imread(path) * 255).astype(int)


def test_areas_are_times(tmp_path):
    """1F1B of unit costs spends twice as long backward as forward, and nothing on the second chunk or on W."""
    picture = _drawn(tmp_path / "a.png", simulate(make_schedule("1f1b", 2, 4)))
    assert 1.8 < _share(picture, BACKWARD) / _share(picture, FORWARD) < 2.2
    for color in (SECOND_FORWARD, FOR_INPUT, FOR_WEIGHTS):
        assert _share(picture, color) == 0


def test_a_second_panel_adds_its_rows_and_its_colors(tmp_path):
    one, two = simulate(make_schedule("1f1b", 2, 4)), simulate(make_schedule("dualpipe", 2, 4))
    alone, both = _drawn(tmp_path / "a.png", one), _drawn(tmp_path / "b.png", one, two)
    assert both.shape[1] == alone.shape[1]
    assert both.shape[0] > alone.shape[0]
    for color in (FORWARD, BACKWARD, SECOND_FORWARD, FOR_INPUT, FOR_WEIGHTS):
        assert _share(both, color) > 0.001


def test_matplotlib_is_imported_by_drawing_alone():
    code = "import sys, sharding.pipeline.plot; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
