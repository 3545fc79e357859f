"Random requests of the model that ships and of hopeless ones: nothing that was promised is broken."

import numpy as np
import pytest
import torch

from musicgen.bench.promises import broken, promises, song, wish
from musicgen.core import SHIPPED_MODEL, Layout
from musicgen.generation.generate import generate, read_model
from musicgen.generation.request import Request
from musicgen.model.lstm import MusicLSTM, MusicLSTMConfig, save_model
from musicgen.music.midi import write_midi


def test_fifty_random_requests_are_kept():
    "Read by strangers, true to the request, and byte for byte the same once more."
    found = promises(read_model(SHIPPED_MODEL), 50)
    assert found["broken"] == [] and found["unsaid"] == [] and found["alike"] == 0
    assert found["takes"] >= 50


@pytest.mark.parametrize("seed", range(3))
def test_a_hopeless_model_keeps_them_too(tmp_path, seed):
    "Weights that are loud and random; most requests have an opening, and many redraw bars of it."
    torch.manual_seed(seed)
    model = MusicLSTM(MusicLSTMConfig(hidden=24, head=16, sources=("lesson",)))
    for p in model.parameters():
        p.data *= 3
    layout = Layout(tmp_path)
    save_model(model, layout.model)
    studio, dice = read_model(layout.weights), np.random.default_rng(seed)
    for k in range(25):
        asked = wish(dice)
        if k % 2:
            asked = dict(opening=write_midi(song(dice)), seed=k, bars=int(dice.integers(1, 4)))
        request = Request.from_dict(asked)
        for take in generate(studio, request):
            assert broken(take, request, studio) == [], asked
