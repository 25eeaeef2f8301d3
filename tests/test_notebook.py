"""image_captioning.ipynb runs from top to bottom, with no network and in a folder of its own."""

import shutil
import time

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "image_captioning.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    notebook = nbformat.read(shutil.copy(NOTEBOOK, tmp_path), as_version=4)
    began = time.monotonic()
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    print(f"{time.monotonic() - began:.0f} s")
    assert (tmp_path / "notebook_run" / "gallery" / "index.html").is_file()


def test_the_notebook_is_committed_with_its_outputs_and_small():
    nbformat = pytest.importorskip("nbformat")
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert NOTEBOOK.stat().st_size < 2e6
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) >= 2
