"Random requests to the model that ships and to untrained ones: no promise is broken."

import numpy as np
import pytest
from models import write_untrained

from musicgen.bench.promises import broken_promises, promises, random_request, random_score
from musicgen.core import SHIPPED_MODEL, Layout
from musicgen.generation.generate import generate
from musicgen.generation.loader import read_model
from musicgen.generation.request import Request
from musicgen.music.midi import write_midi


def test_fifty_random_requests_are_kept():
    "Read by other programs, true to the request, and byte for byte the same once more."
    report = promises(read_model(SHIPPED_MODEL), 50)
    assert report["broken"] == [] and report["unsaid"] == [] and report["alike"] == 0
    assert report["takes"] >= 50


@pytest.mark.parametrize("seed", range(3))
def test_an_untrained_model_keeps_them_too(tmp_path, seed):
    "Large random weights; half of the requests have an opening, and many redraw bars of one."
    layout = Layout(tmp_path)
    write_untrained(layout, seed, hidden=24)
    model, rng = read_model(layout.weights), np.random.default_rng(seed)
    for k in range(25):
        fields = random_request(rng)
        if k % 2:
            fields = dict(
                opening=write_midi(random_score(rng)), seed=k, bars=int(rng.integers(1, 4))
            )
        request = Request.from_dict(fields)
        for take in generate(model, request):
            assert broken_promises(take, request, model) == [], fields
