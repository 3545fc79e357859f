"""A crowd at the service's door: nothing lost, nothing wrong, and bytes that do not depend on who plays beside."""

import json

import pytest

from musicgen.bench.load import Load, press, serving
from musicgen.core import Layout
from musicgen.generation.generate import generate, open_model
from musicgen.generation.request import Request


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Layout:
    "A root that holds nothing but a model that has learnt nothing."
    import torch

    from musicgen.model.lstm import MusicLSTM, MusicLSTMConfig, save_model

    layout = Layout(tmp_path_factory.mktemp("a house"))
    torch.manual_seed(0)
    save_model(MusicLSTM(MusicLSTMConfig(hidden=32, head=16, sources=("lesson",))), layout.model)
    return layout


@pytest.fixture(scope="module")
def known(house) -> dict:
    "Requests of many kinds, with the bytes that each has when it is played alone."
    kinds = [
        dict(instruments=["Violin", "Cello"], bars=2),
        dict(instruments=["Drums"], bars=3, time_signature="3/4"),
        dict(instruments=["Piano"] * 5, bars=1, temperature=1.4),
        dict(key="D minor", bars=4),
    ]
    requests = [Request(**kind, seed=seed) for seed in range(3) for kind in kinds]
    takes = [(request, generate(open_model(house), request)[0]) for request in requests]
    return {
        json.dumps(request.to_dict()): (take.midi, len(take.score.notes)) for request, take in takes
    }


def test_a_crowd_loses_nothing(house, known, monkeypatch):
    "Sixty clients, two players, four places in the queue: all are served in the end, each with the right bytes."
    monkeypatch.setenv("MUSICGEN_API_PLAYERS", "2")
    monkeypatch.setenv("MUSICGEN_API_QUEUE", "4")
    with serving(house) as (address, process):
        crowd = press(address, known, clients=60)
        longer = press(address, known, clients=5, seconds=3, pid=process.pid)
    assert crowd.wrong == longer.wrong == [] and len(crowd.waits) == 60
    assert crowd.later > 0, "nobody was told to come again: the queue has no end"
    assert len(longer.waits) > 10 and longer.later == 0 and len(longer.held) >= 2
    assert isinstance(crowd, Load) and crowd.notes > 0


def test_wrong_bytes_and_lost_answers_are_noticed(house, known):
    "What the load test would say of a service that mixes up its clients, and of one that is gone."
    other = dict(zip(known, [*known.values()][1:] + [*known.values()][:1], strict=True))
    with serving(house) as (address, _):
        mixed = press(address, other, clients=len(other))
    assert len(mixed.wrong) == len(other) and "other bytes" in mixed.wrong[0]
    gone = press(address, known, clients=2)
    assert len(gone.wrong) == 2 and "lost" in gone.wrong[0]
