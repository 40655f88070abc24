"""The notebook runs as it stands, in a kernel of its own."""

from pathlib import Path

import pytest

_NOTEBOOK = Path(__file__).parents[2] / "docs" / "how-to" / "notebook.ipynb"


@pytest.mark.full
@pytest.mark.filterwarnings("default")  # of the kernel's client
def test_the_notebook_runs_and_its_videos_play(tmp_path):
    import nbclient
    import nbformat

    notebook = nbformat.read(_NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [
        output["data"]["text/html"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "text/html" in output.get("data", {})
    ]
    assert sum("<video" in html for html in shown) == 2  # the stream's blocks, and the fork
