"""Every notebook runs from top to bottom, as `nbdev_test` runs it: examples, asserts, `## Run`.

The notebooks of a folder are a class of tests, which one process runs.
"""

import os
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parent.parent / "nbs"


def notebooks(folder: str) -> type:
    "A test class that runs the notebooks of one folder of nbs."
    paths = sorted(p for p in (NBS / folder).glob("*.ipynb") if not p.name.startswith((".", "_")))
    assert paths, f"nbs/{folder} holds no notebook"

    class Notebooks:
        @pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)
        def test_it_runs(self, path, capfd):
            from nbdev.test import test_nb

            before = dict(os.environ)
            try:
                passed, _ = test_nb(path)
            finally:
                os.environ.clear()
                os.environ.update(before)
            assert passed, f"{path.name} fails:\n{capfd.readouterr().err[-3000:]}"

    return Notebooks


TestTutorials = pytest.mark.slow(notebooks("tutorials"))
TestSpine = pytest.mark.slow(notebooks("."))
TestBench = pytest.mark.slow(notebooks("bench"))
TestEvaluation = pytest.mark.slow(notebooks("evaluation"))
TestApp = notebooks("app")
TestCorpus = notebooks("corpus")
TestGeneration = notebooks("generation")
TestModel = notebooks("model")
TestMusic = notebooks("music")
