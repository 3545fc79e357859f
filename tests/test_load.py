"""Many clients at once: no answer is lost or wrong, and none depends on the others."""

import json

import pytest

from musicgen.bench.load import Load, send_requests, serving
from musicgen.core import Layout
from musicgen.generation.generate import generate
from musicgen.generation.loader import open_model
from musicgen.generation.request import Request


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Layout:
    "A root that holds nothing but a small model that has learnt nothing."
    import torch

    from musicgen.model.files import save_model
    from musicgen.model.lstm import MusicLSTM, MusicLSTMConfig

    layout = Layout(tmp_path_factory.mktemp("a root"))
    torch.manual_seed(0)
    save_model(MusicLSTM(MusicLSTMConfig(hidden=32, head=16, sources=("example",))), layout.model)
    return layout


@pytest.fixture(scope="module")
def expected(untrained) -> dict:
    "Requests of many kinds, with the bytes that each has when it is generated alone."
    kinds = [
        dict(instruments=["Violin", "Cello"], bars=2),
        dict(instruments=["Drums"], bars=3, time_signature="3/4"),
        dict(instruments=["Piano"] * 5, bars=1, temperature=1.4),
        dict(key="D minor", bars=4),
    ]
    requests = [Request(**kind, seed=seed) for seed in range(3) for kind in kinds]
    takes = [(request, generate(open_model(untrained), request)[0]) for request in requests]
    return {
        json.dumps(request.to_dict()): (take.midi, len(take.score.notes)) for request, take in takes
    }


def test_many_clients_are_all_served(untrained, expected, monkeypatch):
    "Sixty clients, two workers, a queue of four: all are served in the end, with the right bytes."
    monkeypatch.setenv("MUSICGEN_API_PLAYERS", "2")
    monkeypatch.setenv("MUSICGEN_API_QUEUE", "4")
    with serving(untrained) as (address, process):
        burst = send_requests(address, expected, clients=60)
        longer = send_requests(address, expected, clients=5, seconds=3, pid=process.pid)
    assert burst.wrong == longer.wrong == [] and len(burst.waits) == 60
    assert burst.later > 0, "nobody had to come again: the queue has no limit"
    assert len(longer.waits) > 10 and longer.later == 0 and len(longer.held) >= 2
    assert isinstance(burst, Load) and burst.notes > 0


def test_wrong_bytes_and_lost_answers_are_counted(untrained, expected):
    "What the load test reports of a service that mixes up its clients, and of one that is gone."
    other = dict(zip(expected, [*expected.values()][1:] + [*expected.values()][:1], strict=True))
    with serving(untrained) as (address, _):
        mixed = send_requests(address, other, clients=len(other))
    assert len(mixed.wrong) == len(other) and "other bytes" in mixed.wrong[0]
    gone = send_requests(address, expected, clients=2)
    assert len(gone.wrong) == 2 and "lost" in gone.wrong[0]
