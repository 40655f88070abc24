"""What notebooks show: players, and a bar of progress."""

import base64
import re
import sys
import types

import numpy as np

from rehyat_jax import Video, read_video
from rehyat_jax.runtime import notebook
from rehyat_jax.video import display

FRAMES = np.broadcast_to(np.arange(0, 250, 50, dtype=np.uint8)[:, None, None, None], (5, 32, 48, 3)).copy()


def test_a_video_is_one_line_and_a_player(tmp_path):
    video = Video(FRAMES)
    assert repr(video) == "Video(5 frames of 48x32, 0.3 s)"
    html = video._repr_html_()
    assert repr(video) in html
    data = base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])
    (tmp_path / "a.mp4").write_bytes(data)
    # H.264 of flat greys, enlarged eight times: three levels.
    assert np.abs(read_video(tmp_path / "a.mp4")[:, ::8, ::8].astype(int) - FRAMES).max() <= 3


def test_one_that_is_too_large_says_so(monkeypatch):
    monkeypatch.setattr(display, "_MOST_BYTES", 100)
    assert "too large for a notebook" in Video(FRAMES)._repr_html_()


def test_progress_is_one_bar_that_is_replaced(monkeypatch):
    shown = []

    class Handle:
        def update(self, bar):
            shown.append(bar)

    module = types.ModuleType("IPython.display")
    module.HTML, module.display = str, lambda bar, display_id: (shown.append(bar), Handle())[1]
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    progress = notebook.NotebookProgress()
    for done in range(3):
        progress("denoise", done, 2)
    progress("decode", 0, 5)
    assert [re.sub(r", .*", "", bar) for bar in shown] == [
        'denoise <progress value="0" max="2"></progress> 0/2',
        'denoise <progress value="2" max="2"></progress> 2/2',
        'decode <progress value="0" max="5"></progress> 0/5',
    ]


def test_this_is_no_notebook():
    assert not notebook.in_notebook()
