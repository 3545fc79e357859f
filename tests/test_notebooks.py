"""Every notebook runs from top to bottom, as `nbdev_test` runs it: examples, asserts, `## Run`."""

import os
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parent.parent / "nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not p.name.startswith((".", "_")))
NOTEBOOKS = [p for p in NOTEBOOKS if ".ipynb_checkpoints" not in p.parts]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(NBS).with_suffix("")))
def test_a_notebook_runs(path, capfd):
    from nbdev.test import test_nb

    before = dict(os.environ)
    try:
        passed, _ = test_nb(path)
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert passed, f"{path.name} fails:\n{capfd.readouterr().err[-3000:]}"
