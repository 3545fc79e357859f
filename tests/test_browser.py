"""A headless Chromium drives the dashboard and a notebook in JupyterLab, as a person would."""

import base64
import io
import json
import re
import zipfile
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from servers import PATIENCE, environment, free_port, running

from musicgen.core import SHIPPED_MODEL
from musicgen.music.instruments import DRUMS
from musicgen.music.midi import read_midi, write_midi
from musicgen.music.score import make_score

SLOW = PATIENCE * 1000  # the same for the browser, in its unit


@pytest.fixture
def page(browser):
    "A page that remembers whom it asked for anything."
    context = browser.new_context(viewport=dict(width=1280, height=900), accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(SLOW)
    page.asked = set()
    page.on("request", lambda request: page.asked.add(urlsplit(request.url)._replace(query="")))
    yield page
    context.close()


@contextmanager
def dashboard(repo: Path, folder: Path, **more: str):
    "The address of the page, as the bare command serves it, playing the model that ships."
    port = free_port()
    env = environment(folder, **{"MUSICGEN_PATHS_MODEL": str(SHIPPED_MODEL), **more})
    command = ["-m", "voila", "dashboards/generate.ipynb", "--no-browser", f"--port={port}"]
    nothing = "/voila/static/nothing"  # a page would start a kernel
    with running(command, port, repo, env, folder / "voila.log", nothing) as address:
        yield address


@pytest.fixture(scope="module")
def address(repo, tmp_path_factory):
    with dashboard(repo, tmp_path_factory.mktemp("voila")) as address:
        yield address


def opened(page, address: str):
    "The page at an address, when it can be used."
    page.goto(address, wait_until="commit")
    page.get_by_role("heading", name="MusicGen", exact=True).wait_for()
    page.get_by_role("button", name="Generate").wait_for()
    return page


def slide(page, name: str, value: int):
    "Types a value beside a slider."
    slider = page.locator(".widget-slider").filter(has_text=re.compile(f"^{name}"))
    readout = slider.locator(".widget-readout")
    readout.fill(str(value))
    readout.press("Enter")


def chips(page) -> list[str]:
    return [text.removesuffix("×").strip() for text in page.locator(".mg-chip").all_inner_texts()]


def takes(page, cards: int):
    "The newest take, when there are so many on the page and it can be heard."
    page.wait_for_function(f"document.querySelectorAll('.mg-takes .mg-card').length == {cards}")
    card = page.locator(".mg-takes .mg-card").first
    card.locator("audio").wait_for()
    return card


def generated(page, cards: int):
    "The newest take, when Generate has been pressed and there are so many on the page."
    page.get_by_role("button", name="Generate").click()
    return takes(page, cards)


def saved(page, button) -> tuple[str, bytes]:
    "Name and bytes of the file that a click saves."
    with page.expect_download() as waiting:
        button.click()
    return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()


def midi_of(page, card) -> bytes:
    return saved(page, card.get_by_role("link", name="Download MIDI"))[1]


def drop(page, name: str, data: bytes):
    "Drops a file on the page, as a mouse does."
    page.evaluate(
        """([name, data]) => {
        const moved = new DataTransfer()
        moved.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], name))
        for (const kind of ["dragover", "drop"])
            document.body.dispatchEvent(new DragEvent(kind, {dataTransfer: moved, bubbles: true, cancelable: true}))
    }""",
        [name, base64.b64encode(data).decode()],
    )


def refused(page, words: str):
    page.get_by_role("alert").filter(has_text=words).wait_for()


def test_choose_generate_see_hear_and_take_home(page, address, screens):
    "The way of a first visit; refusals are sentences, and nothing is asked of another machine."
    opened(page, address)
    assert page.title() == "MusicGen"
    page.get_by_role("button", name="String quartet").click()
    page.get_by_role("button", name="Cello", exact=False).wait_for()
    search = page.get_by_label("Add an instrument")
    search.fill("drums")
    search.press("Enter")
    page.locator(".mg-chip", has_text="Drums").wait_for()
    assert chips(page) == ["Violin", "Violin", "Viola", "Cello", "Drums"]
    slide(page, "Bars", 3)
    page.get_by_label("Metre").select_option("3/4")

    card = generated(page, 1)
    roll = card.get_by_role("img", name="Piano roll. Violin 1")
    assert roll.bounding_box()["width"] > 400 and card.locator("svg path").count() > 5
    sound = card.locator("audio")
    sound.evaluate("a => a.readyState || new Promise(done => a.onloadedmetadata = done)")
    assert sound.evaluate("a => a.duration") > 3 * 3 * 60 / 96  # three bars and their ring
    assert sound.get_attribute("aria-label").startswith("Seed")
    name, midi = saved(page, card.get_by_role("link", name="Download MIDI"))
    assert re.fullmatch(r"violin-viola-cello-and-1-more-3-bars-seed-\d+\.mid", name)
    score = read_midi(midi)
    assert len(score.bar_lines()) - 1 == 3 and score.metre == (3, 4)
    assert [part.program for part in score.parts] == [40, 40, 41, 42, DRUMS]
    name, stems = saved(page, card.get_by_role("button", name="Stems"))
    assert name.endswith(".stems.zip") and len(zipfile.ZipFile(io.BytesIO(stems)).namelist()) == 5
    name, mp3 = saved(page, card.get_by_role("button", name="MP3"))
    assert name.endswith(".mp3") and mp3[:2] in (b"ID", b"\xff\xfb")
    name, told = saved(page, card.get_by_role("link", name="Receipt"))
    assert name.endswith(".json") and json.loads(told)["receipt"]["request"]["bars"] == 3

    search.fill("Voilin")
    search.press("Enter")
    refused(page, "did you mean Violin")
    for left in range(4, -1, -1):
        page.locator(".mg-chip").first.click()
        page.wait_for_function(f"document.querySelectorAll('.mg-chip').length == {left}")
    page.get_by_role("button", name="Generate").click()
    refused(page, "0 parts")
    page.get_by_role("button", name="Rock band").click()
    page.locator(".mg-chip", has_text="Drums").wait_for()
    generated(page, 2)
    assert "Traceback" not in page.locator("body").inner_text()
    for scheme in ("light", "dark"):
        for name, (width, height) in dict(desktop=(1280, 900), phone=(390, 844)).items():
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size(dict(width=width, height=height))
            assert page.locator(".mg-takes .mg-card svg").first.is_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.screenshot(path=screens / f"dashboard-{name}-{scheme}.png", full_page=True)
    hosts = {url.hostname for url in page.asked if url.scheme not in ("data", "blob")}
    assert hosts == {"127.0.0.1"}


def test_go_on_from_a_take(page, address):
    "An opening by drop and by button, extend, vary, use as opening, and back to an earlier take."
    opened(page, address)
    tune = make_score([(k * 480, 0, 60 + k, 480, 90) for k in range(6)], [73], 120, (3, 4))
    drop(page, "tune.mid", write_midi(tune))
    page.get_by_text("2 bars of 3/4 at 120 bpm for Flute").wait_for()
    assert not page.get_by_role("button", name="String quartet").is_visible()
    slide(page, "Bars", 2)
    notes = lambda data: read_midi(data).notes[:, :4].tolist()
    first = midi_of(page, generated(page, 1))
    assert notes(first)[:6] == tune.notes[:, :4].tolist() and len(read_midi(first).bar_lines()) == 5
    page.get_by_role("button", name="Remove", exact=True).click()
    page.get_by_role("button", name="String quartet").wait_for()

    noise = dict(
        name="noise.mid", mimeType="audio/midi", buffer=b"this is no music, whatever its name says"
    )
    page.get_by_label("Opening: a MIDI file to continue").set_input_files(noise)
    refused(page, "noise.mid")
    drop(page, "huge.mid", bytes(1_000_001))
    refused(page, "1,000,001 bytes, above the limit of 1,000,000")
    card = page.locator(".mg-takes .mg-card").first
    card.get_by_label("Extend by").fill("1")
    card.get_by_label("Extend by").press("Enter")
    card.get_by_role("button", name="Extend").click()
    longer = takes(page, 2)
    assert "bar 5 added" in longer.inner_text() and notes(midi_of(page, longer))[
        : len(notes(first))
    ] == notes(first)
    card = page.locator(".mg-takes .mg-card").nth(1)
    card.get_by_role("button", name="Vary").click()
    varied = takes(page, 3)
    later = lambda data: [note for note in notes(data) if note[0] >= 2 * 3 * 480]
    assert "bars 1 to 2 drawn again" in varied.inner_text() and later(
        midi_of(page, varied)
    ) == later(first)
    varied.get_by_role("button", name="Use as opening").click()
    page.get_by_text("4 bars of 3/4").wait_for()
    page.get_by_role("button", name="Remove", exact=True).click()

    earlier = page.locator(".mg-earlier")
    assert earlier.count() == 3
    earlier.last.click()
    page.wait_for_function("!document.querySelector('.mg-takes h3').textContent.includes('again')")
    assert midi_of(page, page.locator(".mg-takes .mg-card").first) == first


def test_a_link_makes_the_same_music(page, address):
    "The address of the page says what is on the screen; opened anew, it plays the same."
    opened(page, address + "/?instruments=Flute,Oboe&bars=2&key=D+minor&seed=7&takes=2")
    takes(page, 2)
    assert (
        chips(page) == ["Flute", "Oboe"]
        and page.get_by_label("Key", exact=True).input_value() == "D minor"
    )
    midi = midi_of(page, page.locator(".mg-takes .mg-card").nth(1))
    page.get_by_role("button", name="Generate").focus()
    page.keyboard.press("Control+Enter")
    card = takes(page, 4)
    assert card.locator("h3").inner_text().startswith("Seed") and midi_of(page, card) != midi
    page.wait_for_function(
        "!location.search.includes('seed=7&') && location.search.includes('takes=2')"
    )
    where, again = page.url, midi_of(page, card)
    opened(page, where)
    assert midi_of(page, takes(page, 2)) == again
    opened(page, address + "/?bars=900")
    refused(page, "bars 900 is outside 1 to 64")
    assert generated(page, 1)


def test_a_link_waits_for_its_page(page, address):
    "A widget that changes on its way to the browser may not be seen to change: nothing does, until the page is there."
    told, opening = [], re.compile(rb'iopub{[^}]*"msg_type": ?"comm_open"')

    def meet(socket):
        socket.on(
            "framesent", lambda data: told.append("here") if b'{"value":true}' in data else None
        )
        socket.on(
            "framereceived", lambda data: told.append("opens") if opening.search(data) else None
        )

    page.on("websocket", meet)
    opened(page, address + "/?instruments=Flute&bars=2&seed=7")
    takes(page, 1)
    assert told[0] == "here" and "opens" in told


def test_cancel_and_keyboard(page, address, screens):
    "A long request grows bar by bar and is stopped; every control can be reached and has a name."
    opened(page, address)
    slide(page, "Bars", 64)
    slide(page, "Takes", 8)
    page.get_by_role("button", name="Generate").click()
    growing = page.locator(".mg-card:not(.mg-hidden) svg")
    page.get_by_text(re.compile(r"Bar \d+ of 64")).wait_for()
    growing.wait_for()
    small = growing.locator("path").count()
    page.get_by_text(re.compile(r"Bar \d\d of 64")).wait_for()
    assert growing.locator("path").count() >= small > 0
    page.screenshot(path=screens / "dashboard-growing.png", full_page=True)
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("Stopped. Press Generate when you are ready.").wait_for()
    assert growing.count() == 0
    nameless = page.evaluate("""() => [...document.querySelectorAll(".mg :is(button, input, select, [role=slider])")]
        .filter(one => one.offsetParent && !one.textContent.trim() && !one.getAttribute("aria-label")
                && !one.labels?.length && !one.title).map(one => one.outerHTML.slice(0, 200))""")
    assert not nameless
    reached = set()
    page.locator("body").click(position=dict(x=2, y=2))
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("""() => { const one = document.activeElement
            return one.textContent.trim() || one.getAttribute("aria-label")
                || one.labels?.[0]?.textContent || "" }""")
        )
    wanted = {
        "String quartet",
        "Opening: a MIDI file to continue",
        "Bars",
        "Mood",
        "Seed",
        "Roll the dice",
        "Generate",
    }
    assert wanted <= reached, wanted - reached


@pytest.mark.parametrize(
    "setting, value, words",
    [
        ("MUSICGEN_PATHS_MODEL", "nowhere.safetensors", "make run"),
        (
            "MUSICGEN_DASHBOARD_API",
            "http://127.0.0.1:9",
            "the API at http://127.0.0.1:9 does not answer",
        ),
    ],
)
def test_a_missing_model_or_service_is_a_sentence(browser, repo, tmp_path, setting, value, words):
    "The page is up, says what to do, and lives on."
    with dashboard(repo, tmp_path, **{setting: value}) as address:
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(SLOW)
        opened(page, address).get_by_role("button", name="Generate").click()
        refused(page, words)
        page.get_by_role("button", name="Jazz trio").click()
        page.locator(".mg-chip", has_text="Drums").wait_for()
        context.close()


def test_four_visitors_at_once(browser, address):
    "Each is served, in a kernel of their own without torch."
    pages = []
    for _ in range(4):
        context = browser.new_context()
        pages.append(context.new_page())
        pages[-1].set_default_timeout(SLOW)
        pages[-1].goto(address + f"/?bars=2&seed={len(pages)}", wait_until="commit")
    assert [takes(page, 1).locator("h3").inner_text() for page in pages] == [
        f"Seed {k}" for k in (1, 2, 3, 4)
    ]
    for page in pages:
        page.context.close()
