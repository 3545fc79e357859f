"""One request, four doors: the same bytes, and the same sentence when it is refused."""
import base64
import html
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile

import pytest
import uvicorn
from fastapi.testclient import TestClient

from musicgen.cli import main
from musicgen.core import Layout, Refusal
from musicgen.generate import SHIPPED, Request, generate, instruments, open_studio, regenerate, verify
from musicgen.panel import Panel
from musicgen.score import read_midi
from musicgen.serve import make_app

ASKED = dict(instruments=["Violin", "Violin", "Cello", "Drums"], bars=3, tempo=84,
             time_signature="3/4", key="D minor", temperature=1.1, seed=7)
WRONG = [dict(bars=0), dict(bars=65), dict(tempo=29.5), dict(instruments=["Voilin"]),
         dict(instruments=["Piano"] * 17), dict(time_signature="4/3"), dict(key="H flat"),
         dict(takes=9), dict(seed=-1), dict(temperature=2.5), dict(style="polka")]


def write_untrained(layout: Layout, seed: int = 0):
    "A model that has learnt nothing, and has loud opinions."
    import torch

    from musicgen.model import MusicLSTM, MusicLSTMConfig, save_model
    torch.manual_seed(seed)
    model = MusicLSTM(MusicLSTMConfig(hidden=32, head=16, sources=("lesson",)))
    for p in model.parameters(): p.data *= 3
    save_model(model, layout.model)


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Layout:
    "A root that holds nothing but a model."
    layout = Layout(tmp_path_factory.mktemp("a house"))
    write_untrained(layout)
    return layout


@pytest.fixture(scope="module")
def api(house):
    "The REST door of the house."
    with TestClient(make_app(house)) as opened: yield opened


def options(asked: dict) -> list[str]:
    "A request as words for the shell."
    words = []
    for name, value in asked.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += ["--" + name.replace("_", "-"), text]
    return words


def shell(*words) -> subprocess.CompletedProcess:
    "The shell command in a process of its own."
    command = [sys.executable, "-m", "musicgen.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def music(house) -> bytes:
    "What the one door gives for `ASKED`."
    return generate(open_studio(house), Request.from_dict(ASKED))[0].midi


def test_the_music_is_what_was_asked(music):
    score = read_midi(music)
    assert [p.name for p in score.parts] == ["Violin 1", "Violin 2", "Cello", "Drums"]
    assert score.metre == (3, 4) and round(score.bpm, 2) == 84
    assert len(score.bar_lines()) == 4 and len(score.notes) > 4


def test_shell_gives_the_same_bytes(house, music, tmp_path):
    done = shell("generate", "--root", house.root, *options(ASKED), "-o", tmp_path / "out.mid")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no progress in a pipe"
    assert done.stdout.startswith(str(tmp_path / "out.mid")) and done.stdout.count("\n") == 1
    assert (tmp_path / "out.mid").read_bytes() == music
    assert os.listdir(tmp_path) == ["out.mid"]


def test_rest_gives_the_same_bytes(api, music):
    answer = api.post("/generate", json=ASKED)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].split(";")[0] == "audio/midi"
    assert answer.content == music


def played(desk, asked: dict) -> list[bytes]:
    "The MIDI bytes behind the links of a panel whose widgets were set to what is asked."
    desk.warm.join(60)
    desk.controls.fresh.value = False   # or each press takes a seed of its own
    desk.picker.show(asked["instruments"])
    for name, value in asked.items():
        if name != "instruments": desk.controls.of[name].value = value
    desk.play()
    desk.thread.join(120)
    links = [re.findall(r'href="data:audio/midi;base64,([^"]+)"', card.value)
             for card in desk.takes.children]
    return [base64.b64decode(found) for links_of_one in links for found in links_of_one]


def test_panel_gives_the_same_bytes(house, music):
    assert played(Panel(house), ASKED) == [music]


def test_panel_gives_the_same_bytes_through_the_api(house, address, music, tmp_path):
    "As docker compose sets it: the panel has no model of its own and asks the service."
    assert played(Panel(Layout(tmp_path), api=address), ASKED) == [music]


@pytest.fixture(scope="module")
def address(house):
    "A service that listens, on a port that was free."
    server = uvicorn.Server(uvicorn.Config(make_app(house), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive(): time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


@pytest.fixture
def nobody_plays(monkeypatch):
    "The settings name a model that is not there, so that the one that ships does not step in."
    monkeypatch.setenv("MUSICGEN_PATHS_MODEL", "nowhere.safetensors")


def test_panel_refuses_with_the_same_sentence(house, tmp_path, monkeypatch):
    with pytest.raises(Refusal) as refused: Request(instruments=["Flute"] * 17)
    desk = Panel(house)
    assert played(desk, dict(instruments=["Flute"] * 17)) == []
    assert refused.value.sentence.lower() in html.unescape(desk.message.value).lower()
    monkeypatch.setenv("MUSICGEN_PATHS_MODEL", "nowhere.safetensors")
    empty = Panel(Layout(tmp_path))
    assert played(empty, dict(bars=1, instruments=["Flute"])) == []
    assert "no model at" in html.unescape(empty.message.value)
    assert not empty.go.disabled, "it can be tried again"


def test_takes_are_the_same_through_all_doors(house, tmp_path):
    asked = ASKED | dict(takes=3, bars=2)
    ours = [take.midi for take in generate(open_studio(house), Request.from_dict(asked))]
    assert len(set(ours)) == 3
    status = main(["generate", "--root", str(house.root), *options(asked),
                   "-o", str(tmp_path / "out.mid")])
    assert status == 0
    assert [(tmp_path / f"out-{k}.mid").read_bytes() for k in (1, 2, 3)] == ours


def test_rest_gives_the_same_takes(house, api):
    asked = ASKED | dict(takes=3, bars=2)
    ours = [take.midi for take in generate(open_studio(house), Request.from_dict(asked))]
    answer = api.post("/generate", json=asked)
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as z:
        assert [z.read(n) for n in sorted(z.namelist()) if n.endswith(".mid")] == ours


def test_a_file_is_made_again_and_known_again(house, music, tmp_path):
    studio = open_studio(house)
    assert regenerate(studio, music).midi == music
    assert verify(music, studio)["verdict"] == "ours, untouched"
    (tmp_path / "one.mid").write_bytes(music)
    root = ["--root", house.root]
    assert shell("verify", tmp_path / "one.mid", *root).returncode == 0
    assert shell("regenerate", tmp_path / "one.mid", *root).returncode == 0
    assert (tmp_path / "one-again.mid").read_bytes() == music
    same = shell("regenerate", tmp_path / "one.mid", "-o", tmp_path / "one.mid", *root)
    assert same.returncode == 2 and (tmp_path / "one.mid").read_bytes() == music


@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: "-".join(map(str, w)))
def test_a_refusal_is_the_same_sentence(house, wrong, capsys, tmp_path):
    "In Python and in the shell: one sentence, status 2, nothing written."
    with pytest.raises(Refusal) as refused:
        generate(open_studio(house), Request.from_dict(wrong))
    sentence = refused.value.sentence
    status = main(["generate", "--root", str(house.root), *options(wrong),
                   "-o", str(tmp_path / "out.mid")])
    said = capsys.readouterr()
    assert (status, said.out, said.err) == (2, "", f"musicgen: {sentence}\n")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: "-".join(map(str, w)))
def test_rest_refuses_with_the_same_sentence(house, api, wrong):
    with pytest.raises(Refusal) as refused:
        generate(open_studio(house), Request.from_dict(wrong))
    answer = api.post("/generate", json=wrong)
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["detail"] == refused.value.sentence


def test_rest_refuses_what_is_no_request(api):
    for body in (b"", b"{", b"[]", b"null", b'{"bars": 1e999}', b'{"baars": 3}', b"\xff",
                 b"9" * 5000):
        answer = api.post("/generate", content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422), (body, answer.text)
        assert 5 < len(answer.json()["detail"]) < 400 and "\n" not in answer.json()["detail"]


def test_no_model_is_the_fault_of_the_service(tmp_path, nobody_plays):
    done = shell("generate", "--root", tmp_path, "-o", tmp_path / "out.mid")
    assert done.returncode == 3 and "there is no model" in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == "" and not os.listdir(tmp_path)


def test_the_model_that_ships_plays_where_nothing_was_trained(tmp_path):
    "An empty root: the shell makes music all the same, and the file can be made again."
    out = tmp_path / "out.mid"
    done = shell("generate", "--root", tmp_path, "--instruments", "Violin,Cello", "--bars", "4",
                 "--seed", "7", "-o", out)
    assert done.returncode == 0, done.stderr
    assert verify(out.read_bytes(), open_studio(Layout(tmp_path)))["verdict"] == "ours, untouched"
    assert SHIPPED.stat().st_size <= 16e6 and (SHIPPED.parent / "README.md").exists()


def test_no_model_is_503(tmp_path, nobody_plays):
    with TestClient(make_app(Layout(tmp_path))) as api:
        answer = api.post("/generate", json=dict(bars=1))
        assert answer.status_code == 503 and "there is no model" in answer.text
        assert api.get("/instruments").status_code == 200


def test_rest_lists_who_can_play(api):
    assert api.get("/instruments").json() == instruments()
    assert api.get("/health").status_code == 200


TOLD = """import sys
from musicgen import cli
cli._progress = lambda: lambda done, bars: print(done, flush=True)
sys.exit(cli.main(sys.argv[1:]))"""


@pytest.mark.skipif(os.name != "posix", reason="a signal of POSIX")
def test_ctrl_c_stops_the_shell_and_leaves_nothing(house, tmp_path):
    "Pressed in the second bar of 64."
    words = ["generate", "--root", house.root, "--bars", 64, "--takes", 8,
             "--time-signature", "16/4", "--instruments", ",".join(16 * ["Piano"]),
             "-o", tmp_path / "out.mid"]
    process = subprocess.Popen([sys.executable, "-c", TOLD, *map(str, words)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert process.stdout.readline() == "1\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and said == "musicgen: stopped; nothing was written\n"
    assert not os.listdir(tmp_path)


# What a door costs before it is entered.

ROOMS = "generate serve panel cli".split()
HEAVY = "torch pandas papermill music21 optuna nbformat doit".split()


def test_importing_a_door_loads_nothing_heavy(repo):
    for room in ROOMS:
        code = f"import sys, musicgen.{room}\nprint([m for m in {HEAVY} if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], cwd=repo, text=True,
                              capture_output=True)
        assert done.stdout == "[]\n", f"{room}: {done.stdout}{done.stderr}"


QUIET = """
import builtins, io, socket, sys
def refuse(*args, **more): raise AssertionError(f"a connection at import: {args}")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
socket.create_connection = refuse
def watch(event, args):
    if event == "open" and str(args[0]).endswith((".pt", ".safetensors", ".sf2", "settings.ini")):
        print("opened", args[0])
    if event in ("subprocess.Popen", "socket.connect"): print(event, args)
sys.addaudithook(watch)
for room in sys.argv[1:]: __import__("musicgen." + room)
print("quiet")
"""


def test_importing_a_room_asks_nobody_and_opens_no_model(repo, house):
    "No network, no model, no SoundFont, no settings, no process: at import nothing happens."
    rooms = sorted(p.stem for p in (repo / "musicgen").glob("*.py") if p.stem[0] != "_")
    assert len(rooms) >= 15
    done = subprocess.run([sys.executable, "-c", QUIET, *rooms], cwd=house.root, text=True,
                          capture_output=True, env=os.environ | dict(PYTHONPATH=str(repo)))
    assert done.stdout == "quiet\n", done.stdout + done.stderr


def test_the_base_brings_what_the_dashboard_stands_on(repo):
    "Voila and ipywidgets do not name a kernel; without one the page of a light environment is an error."
    import tomllib
    base = tomllib.loads((repo / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    names = {re.match(r"[\w-]+", line)[0] for line in base}
    kernel = json.loads((repo / "dashboards/generate.ipynb").read_text("utf-8"))["metadata"]["kernelspec"]["name"]
    assert kernel == "python3" and {"voila", "ipywidgets", "ipykernel"} <= names and "torch" not in names


def test_the_wheel_is_the_base_and_plays_alone(repo, house, music, tmp_path):
    "A wheel of this clone, unpacked where the clone is not, with no pandas and no torch: music."
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (repo / name).exists(): shutil.copy(repo / name, clone)
    shutil.copytree(repo / "musicgen", clone / "musicgen",
                    ignore=shutil.ignore_patterns("__pycache__"))
    (clone / "README.md").touch()
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q",
             "-w", str(tmp_path / "dist"), str(clone)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    wheel, = (tmp_path / "dist").glob("musicgen-*.whl")
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        told = z.read(next(n for n in names if n.endswith("METADATA"))).decode()
        z.extractall(tmp_path / "site")
    assert not [n for n in names if n.startswith(("nbs", "tests", "data"))]
    needs = [line.split(":", 1)[1] for line in told.splitlines()
             if line.startswith("Requires-Dist") and "extra" not in line]
    assert needs and not [n for n in needs if any(h in n for h in ("torch", "pandas", "papermill"))]
    code = ("import sys\nfor name in ('torch', 'pandas', 'papermill'): sys.modules[name] = None\n"
            "import musicgen; print(musicgen.__file__)\n"
            "from musicgen.cli import main; sys.exit(main(sys.argv[1:]))")
    words = ["generate", "--root", house.root, *options(ASKED), "-o", tmp_path / "out.mid"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], text=True, cwd=tmp_path,
                          capture_output=True, timeout=120,
                          env=os.environ | dict(PYTHONPATH=str(tmp_path / "site")))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert (tmp_path / "out.mid").read_bytes() == music


def test_the_file_is_read_by_others(music):
    "mido and pretty_midi see the parts, the metre and the tempo that were asked for."
    import mido
    import pretty_midi
    plain = mido.MidiFile(file=io.BytesIO(music))
    assert plain.type == 1 and plain.ticks_per_beat == 480 and len(plain.tracks) == 5
    heard = pretty_midi.PrettyMIDI(io.BytesIO(music))
    assert [(i.name, i.is_drum) for i in heard.instruments] == [
        ("Violin 1", False), ("Violin 2", False), ("Cello", False), ("Drums", True)]
    metre = heard.time_signature_changes[0]
    assert (metre.numerator, metre.denominator) == (3, 4)
