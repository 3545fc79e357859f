"""Where music comes from: bad servers, Kaggle, archives that mean harm, folders, and runs that are repeated."""

import copy
import csv
import email.utils
import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
import zipfile
import zlib
from pathlib import Path

import pytest

from musicgen.core import Layout, Rejection, folder_digest, write_atomic
from musicgen.corpus import archives
from musicgen.corpus import download as room
from musicgen.corpus.archives import unpack
from musicgen.corpus.download import Source, download, read_sources
from musicgen.ingest import ingest
from musicgen.music.midi import write_midi
from musicgen.music.score import make_score

HERE = Path(__file__).resolve().parent.parent
posix = pytest.mark.skipif(os.name != "posix", reason="a limit, signal or file of POSIX")


def tune(key: int) -> bytes:
    return write_midi(make_score([(240 * k, 0, key + k % 12, 240, 80) for k in range(64)], [40]))


A, B, C = tune(48), tune(60), tune(72)
BIG = hashlib.shake_256(b"music").digest(200_000)  # what a server sends: nothing in it repeats


@pytest.fixture
def root(tmp_path) -> Layout:
    return Layout(tmp_path / "a root")


def refusal_of(does, *words, **more) -> str:
    with pytest.raises(Rejection) as refused:
        does(*words, **more)
    assert 10 < len(refused.value.sentence) < 900, refused.value.sentence
    return refused.value.sentence


def write_sources(root: Layout, *sources: dict):
    sources = [dict(dict(name="mine", licence="not stated"), **s) for s in sources]
    write_atomic(root.sources, "".join("- " + json.dumps(s) + "\n" for s in sources))


def rows(root: Layout) -> list[dict]:
    with open(root.manifest, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def zipped(members: dict[str, bytes], **how) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **dict(dict(compression=zipfile.ZIP_DEFLATED), **how)) as z:
        for name, data in members.items():
            z.writestr(name, data)
    return out.getvalue()


def tarred(*members, mode: str = "w", **how) -> bytes:
    "A tar of (name, content, more facts of the header)."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, **how) as t:
        for name, data, *facts in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in (facts[0] if facts else {}).items():
                setattr(info, key, value)
            t.addfile(info, io.BytesIO(data))
    return out.getvalue()


def sevened(members: dict[str, bytes], renamed: dict[str, str] | None = None, **how) -> bytes:
    "A 7z archive; `renamed` puts a name of the same length in the place of one that py7zr would not write."
    import py7zr

    out = io.BytesIO()
    with py7zr.SevenZipFile(out, "w", **how) as z:
        if renamed:
            z.set_encoded_header_mode(False)
        for name, data in members.items():
            z.writestr(data, name)
    data = bytearray(out.getvalue())
    if not renamed:
        return bytes(data)
    for old, new in renamed.items():
        at = data.index(old.encode("utf-16-le"))
        data[at : at + 2 * len(old)] = new.encode("utf-16-le")
    start, size = struct.unpack("<QQ", data[12:28])
    data[28:32] = struct.pack("<I", zlib.crc32(data[32 + start : 32 + start + size]))
    data[8:12] = struct.pack("<I", zlib.crc32(data[12:32]))
    return bytes(data)


# ---- downloads, from servers that misbehave ----------------------------------------------------


class Site(http.server.BaseHTTPRequestHandler):
    "A server whose manners the server object holds: `manners[path]` answers."

    protocol_version = "HTTP/1.1"

    def log_message(self, *a):
        pass

    def do_GET(self):
        self.close_connection = True
        self.server.asked.append(dict(self.headers, path=self.path))
        try:
            self.server.manners[self.path.split("?")[0]](self)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def say(self, code: int = 200, body: bytes = b"", length: int | None = -1, **headers):
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length < 0 else length))
        self.end_headers()
        self.wfile.write(body)

    def file(self, data: bytes, cut: int | None = None, obey: bool = True, **headers):
        "The file, or the part that is asked for when it still is of this release; broken off after `cut` bytes."
        start = re.match(r"bytes=(\d+)-$", self.headers.get("Range", ""))
        same = not obey or self.headers.get("If-Range") in (None, *headers.values())
        start = int(start[1]) if start and same else 0
        body = data[start:]
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.say(206 if start else 200, body[:cut], len(body), **headers)


@pytest.fixture
def site():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        server.daemon_threads, server.asked, server.manners = True, [], {}
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="session")
def tls():
    return __import__(
        "httpx"
    ).create_ssl_context()  # to make one takes longer than most of these tests


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch, tls):
    monkeypatch.setattr("httpx._transports.default.create_ssl_context", lambda **_: tls)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False), monkeypatch.delenv(name.upper(), raising=False)


def fetch(site, path: Path, address: str = "/x", **how) -> bytes:
    facts = {key: how.pop(key) for key in ("bytes", "sha256", "md5") if key in how}
    source = Source("mine", "url", "MIT", url=site.url + address, **facts)
    return download(source, path, **dict(dict(pause=0.01, timeout=2), **how)).read_bytes()


SHA = hashlib.sha256(BIG).hexdigest()
DATE = "Mon, 02 Nov 2026 08:00:00 GMT"


@pytest.mark.parametrize(
    "known, asks",
    [
        (dict(ETag='"one"'), '"one"'),
        (dict(Last_Modified=DATE), DATE),
        (dict(ETag='W/"one"', Last_Modified=DATE), DATE),
    ],
)
def test_a_broken_download_goes_on(site, tmp_path, known, asks):
    "And says of which release its half is; a weak tag is no proof."
    site.manners["/x"] = lambda s: s.file(BIG, 70_000 if len(site.asked) < 3 else None, **known)
    assert fetch(site, tmp_path / "x") == BIG
    assert [a.get("Range") for a in site.asked] == [None, "bytes=70000-", "bytes=140000-"]
    assert [a.get("If-Range") for a in site.asked] == [None, asks, asks] and os.listdir(
        tmp_path
    ) == ["x"]


def test_a_broken_download_of_no_known_release(site, tmp_path):
    "It goes on where a checksum will tell, and begins anew where nothing would."
    site.manners["/x"] = lambda s: s.file(BIG, 70_000 if len(site.asked) == 1 else None)
    assert fetch(site, tmp_path / "x") == BIG and "Range" not in site.asked[1]
    site.asked.clear()
    assert (
        fetch(site, tmp_path / "y", sha256=SHA) == BIG and site.asked[1]["Range"] == "bytes=70000-"
    )


@pytest.mark.parametrize("obey", [True, False])
@pytest.mark.parametrize("checked", [True, False])
def test_halves_of_two_releases_are_never_glued(site, tmp_path, obey, checked):
    "Not even when the server overlooks `If-Range`; nor when only the checksum can tell."
    old, new = b"x" * len(BIG), BIG
    tags = {} if checked else dict(ETag=['"old"', '"new"'])

    def answer(s):
        now = min(len(site.asked), 2) - 1
        s.file(
            (old, new)[now],
            50_000 if now == 0 else None,
            obey,
            **{k: v[now] for k, v in tags.items()},
        )

    site.manners["/x"] = answer
    assert fetch(site, tmp_path / "x", **dict(sha256=SHA) if checked else {}) == new
    assert os.listdir(tmp_path) == ["x"]


def test_a_part_that_is_whole_or_too_long(site, tmp_path):
    "Killed before it got its name: nothing is fetched again. Longer than the file: begun anew."
    path, part = tmp_path / "x", tmp_path / "x.part"
    site.manners["/x"] = lambda s: (
        s.say(416)
        if s.headers.get("Range") == f"bytes={len(BIG) + 9}-"
        else s.file(BIG, ETag='"one"')
    )
    part.write_bytes(BIG)
    room._note(part).write_text(json.dumps(dict(release='"one"', total=len(BIG))))
    assert fetch(site, path) == BIG and site.asked == []
    path.unlink(), part.write_bytes(b"y" * (len(BIG) + 9))
    room._note(part).write_text(json.dumps(dict(release='"one"', total=0)))
    assert fetch(site, path) == BIG and len(site.asked) == 2
    for note in ("{", '{"release": ', "[]", "null"):
        path.unlink(missing_ok=True), part.write_bytes(b"y" * 50), room._note(part).write_text(note)
        assert fetch(site, path) == BIG, note


@pytest.mark.parametrize(
    "asks, waits",
    [
        ("3", 3),
        ("999999", room.PATIENCE),
        ("soon", 0.25),
        ("-5", 0.25),
        (email.utils.formatdate(0), 0.25),
    ],
)
def test_a_busy_server_says_how_long_to_wait(site, tmp_path, monkeypatch, asks, waits):
    slept = []
    monkeypatch.setattr(room.time, "sleep", slept.append)
    site.manners["/x"] = lambda s: (
        s.file(BIG) if len(site.asked) > 1 else s.say(503, Retry_After=asks)
    )
    assert fetch(site, tmp_path / "x", pause=0.25) == BIG and slept == [waits]


def test_attempts_double_their_pause_and_end(site, tmp_path, monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(room.time, "sleep", slept.append)
    site.manners["/x"] = lambda s: s.say(500)
    assert "in 5 attempts" in refusal_of(fetch, site, tmp_path / "x", pause=1)
    assert slept == [1, 2, 4, 8] and "attempt 2 of 5" in capsys.readouterr().out


def test_attempts_that_bring_something_do_not_count(site, tmp_path, monkeypatch):
    "Nine breaks in nine attempts, each with its kilobyte."
    monkeypatch.setattr(room, "MEGABYTE", 1000)
    site.manners["/x"] = lambda s: s.file(BIG, 22_000, ETag='"one"')
    assert fetch(site, tmp_path / "x", tries=3) == BIG and len(site.asked) == 10


def dawdle(s, *parts: bytes):
    "Say the first part, and then a byte at a time."
    s.wfile.write(parts[0])
    for _ in range(200):
        s.wfile.write(b"a"), s.wfile.flush(), time.sleep(0.02)


@pytest.mark.parametrize(
    "kind, says",
    [
        ("stalls", "timed out"),
        ("greets slowly", "fewer than"),
        ("drips", "fewer than"),
        ("drips a chunk", "fewer than"),
        ("drips without length", "fewer than"),
    ],
)
def test_a_server_that_takes_its_time(site, tmp_path, kind, says):
    "Time-outs hold against silence, a rate holds against dripping, in the greeting as in the file."
    site.manners["/x"] = dict(
        stalls=lambda s: time.sleep(2),
        drips=lambda s: dawdle(s, b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"),
        **{"drips without length": lambda s: dawdle(s, b"HTTP/1.1 200 OK\r\n\r\n")},
    ).get(kind) or (
        lambda s: dawdle(
            s,
            b"HTTP/1.1 200 OK\r\nX-Long: "
            if kind == "greets slowly"
            else b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9;",
        )
    )
    begun = time.monotonic()
    assert says in refusal_of(fetch, site, tmp_path / "x", tries=1, timeout=0.3)
    assert time.monotonic() - begun < 2 and not (tmp_path / "x").exists()


LIES = {
    "longer than it is": (
        lambda s: s.say(200, BIG[:900], 1000),
        "without sending complete message body",
    ),
    "shorter than it is": (lambda s: s.say(200, BIG, 900), "900 bytes, expected 200000"),
    "absent": (lambda s: s.say(200, BIG[:900], None), "900 bytes, expected 200000"),
    "broken chunks": (
        lambda s: s.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc"),
        "incomplete",
    ),
    "no number": (
        lambda s: s.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nabc"),
        "Content-Length",
    ),
    "no http": (lambda s: s.wfile.write(b"220 mail ready\r\n\r\n" * 9), "illegal"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_about_length(site, tmp_path, lie):
    site.manners["/x"], says = LIES[lie]
    assert (
        says.casefold()
        in refusal_of(fetch, site, tmp_path / "x", tries=2, bytes=len(BIG)).casefold()
    )
    assert not (tmp_path / "x").exists()


def endless(s):
    s.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        s.wfile.write(b"10000\r\n" + bytes(65536) + b"\r\n")


@pytest.mark.parametrize("answer", [endless, lambda s: s.say(200, b"", 10**15)])
def test_a_size_has_a_limit(site, tmp_path, monkeypatch, answer):
    "The source's, or one for all; and nothing is kept."
    site.manners["/x"] = answer
    monkeypatch.setattr(room, "MAX_BYTES", 1_000_000)
    assert "more than the 5000 bytes it should have" in refusal_of(
        fetch, site, tmp_path / "x", bytes=5000
    )
    assert "more than the 1000000 bytes it may have" in refusal_of(fetch, site, tmp_path / "x")
    assert os.listdir(tmp_path) == [] and len(site.asked) == 2


def test_no_length_is_no_harm(site, tmp_path):
    site.manners["/x"] = lambda s: s.say(200, BIG, None)
    assert fetch(site, tmp_path / "x") == BIG


def test_redirects(site, tmp_path):
    "Ten at most; over http and https, never down from one to the other."
    site.manners.update(
        {
            "/x": lambda s: s.say(302, Location="/y"),
            "/y": lambda s: s.file(BIG),
            "/round": lambda s: s.say(302, Location="/round"),
            "/local": lambda s: s.say(302, Location="file:///etc/passwd"),
        }
    )
    assert fetch(site, tmp_path / "x") == BIG
    site.asked.clear()
    assert "redirect" in refusal_of(fetch, site, tmp_path / "r", "/round") and len(site.asked) == 11
    assert "only https and http" in refusal_of(fetch, site, tmp_path / "r", "/local")
    import httpx

    source = Source("mine", "url", "MIT", url="https://safe.example/x.zip")
    with room._client(source, 1) as client:
        (hop,) = client.event_hooks["request"]
        hop(httpx.Request("GET", "https://other.example/x.zip"))
        assert "only https is" in refusal_of(hop, httpx.Request("GET", "http://safe.example/x.zip"))


def test_addresses_that_are_none(site, tmp_path):
    for url in (
        "ftp://127.0.0.1/x.zip",
        "http://",
        "http://[::1",
        "nonsense",
        "http://127.0.0.1:99999/x",
    ):
        refusal_of(
            download, Source("mine", "url", "MIT", url=url), tmp_path / "x", tries=2, pause=0
        )


class Proxy(http.server.BaseHTTPRequestHandler):
    "A forwarding proxy."

    def log_message(self, *a):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(self.path) as answer:
            data = answer.read()
        (
            self.send_response(200),
            self.send_header("Content-Length", str(len(data))),
            self.end_headers(),
        )
        self.wfile.write(data)


def test_behind_a_proxy(site, tmp_path, monkeypatch):
    site.manners["/x"] = lambda s: s.file(BIG)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        proxy.asked = []
        threading.Thread(target=proxy.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.server_port}")
        assert fetch(site, tmp_path / "x") == BIG and proxy.asked == [site.url + "/x"]
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert fetch(site, tmp_path / "y") == BIG and len(proxy.asked) == 1
        proxy.shutdown()
    monkeypatch.delenv("NO_PROXY")
    assert "could not be fetched" in refusal_of(fetch, site, tmp_path / "z", tries=1), (
        "the proxy is gone"
    )
    monkeypatch.setenv("HTTP_PROXY", "gopher://127.0.0.1:1")
    assert "proxy" in refusal_of(fetch, site, tmp_path / "z", tries=1)


def test_what_is_there_is_not_asked_for(site, tmp_path):
    "Unless it is not what the source promises now."
    site.manners["/x"] = lambda s: s.file(BIG)
    for facts in (dict(sha256=SHA.upper()), dict(sha256=SHA), {}):
        fetch(site, tmp_path / "x", **facts)
    assert len(site.asked) == 1
    (tmp_path / "x").write_bytes(b"old")
    assert fetch(site, tmp_path / "x", sha256=SHA) == BIG and len(site.asked) == 2
    said = refusal_of(fetch, site, tmp_path / "x", md5="0" * 32)
    assert all(
        w in said for w in ("'mine'", site.url, "0" * 32, hashlib.md5(BIG).hexdigest(), "deleted")
    )
    assert (tmp_path / "x").read_bytes() == BIG, (
        "what was there stays until there is something better"
    )


FETCH = (
    "import sys\nfrom pathlib import Path\nfrom musicgen.core import Rejection\nfrom musicgen.corpus.download import Source, download\n"
    "try: download(Source('mine', 'url', 'MIT', url=sys.argv[1]), Path(sys.argv[2]))\n"
    "except Rejection as e: print(e.sentence)"
)


@posix
def test_a_full_disk_and_a_kill_keep_what_came(site, tmp_path):
    site.manners["/x"] = lambda s: s.file(BIG, ETag='"one"')
    full = (
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, -1))\n"
    )
    words = [sys.executable, "-c", full + FETCH, site.url + "/x", tmp_path / "x"]
    said = subprocess.run(words, capture_output=True, text=True, timeout=60).stdout
    assert "'mine' stops at 50000 bytes" in said and "are kept" in said and said.count("\n") == 1
    site.manners["/x"] = lambda s: (s.file(BIG, 30_000, ETag='"one"'), time.sleep(5))
    words[2] = FETCH
    process = subprocess.Popen(words)
    until = time.monotonic() + 20
    while (tmp_path / "x.part").stat().st_size < 80_000:
        assert time.monotonic() < until
        time.sleep(0.01)
    process.kill(), process.wait()
    site.manners["/x"] = lambda s: s.file(BIG, ETag='"one"')
    assert fetch(site, tmp_path / "x") == BIG
    assert [a.get("Range") for a in site.asked] == [None, "bytes=50000-", "bytes=80000-"]


def test_progress_tells_bytes_and_time(site, tmp_path, monkeypatch, capsys):
    site.manners["/x"] = lambda s: s.file(BIG * 20)
    monkeypatch.setattr(room.Progress.__init__, "__defaults__", ("", 1, 0))
    fetch(site, tmp_path / "x")
    assert re.search(r"ingest: mine \d/4 MB, \d+ s left", capsys.readouterr().out)


# ---- Kaggle, with its own client -----------------------------------------------------------------


class Kaggle(http.server.BaseHTTPRequestHandler):
    "What the client asks of kaggle.com."

    def log_message(self, *a):
        pass

    def answer(self, code: int, body: bytes, kind: str = "application/json", **more):
        self.send_response(code), self.send_header("Content-Type", kind)
        for key, value in more.items():
            self.send_header(key, value)
        (
            self.send_header("Content-Length", str(len(body))),
            self.end_headers(),
            self.wfile.write(body),
        )

    def do_GET(self):
        self.answer(200, self.server.archive, "application/zip", ETag='"one"')

    def do_POST(self):
        asks = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        what, who = self.path.split("/")[-1], self.headers.get("Authorization", "")
        self.server.asked.append((what, who.split(" ")[0]))
        if what == "IntrospectToken":
            good = asks["token"] == "good"
            return self.answer(
                200 if good else 404, json.dumps(dict(active=good, username="me")).encode()
            )
        if who not in ("Bearer good", "Basic bWU6Z29vZA=="):
            return self.answer(401, b'{"code": 401, "message": "no"}')
        code = dict(closed=403, missing=404).get(asks["datasetSlug"])
        if code:
            return self.answer(code, json.dumps(dict(code=code, message="no")).encode())
        if what == "DownloadDataset":
            return self.answer(302, b"", "text/plain", Location=self.server.url + "/archive")
        self.answer(200, json.dumps(dict(info=dict(licenses=[dict(name="CC0-1.0")]))).encode())


@pytest.fixture
def kaggle(monkeypatch, tmp_path):
    for name in [n for n in os.environ if n.startswith("KAGGLE")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Kaggle) as server:
        server.url, server.asked = f"http://127.0.0.1:{server.server_port}", []
        server.archive = zipped({"a.mid": A, "b.mid": B, "about.csv": b"x"})
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        env = pytest.importorskip("kagglesdk.kaggle_env")
        monkeypatch.setitem(env._env_to_endpoint, env.KaggleEnv.PROD, server.url)
        from kaggle.api.kaggle_api_extended import KaggleApi

        monkeypatch.setattr(KaggleApi, "config", str(tmp_path / "kaggle.json"))
        yield server
        server.shutdown()


def sign_in(how: str, key: str, monkeypatch, tmp_path):
    if how == "file":
        (tmp_path / "kaggle.json").write_text(json.dumps(dict(username="me", key=key)))
        (tmp_path / "kaggle.json").chmod(0o600)
    elif how == "token":
        monkeypatch.setenv("KAGGLE_API_TOKEN", key)
    else:
        monkeypatch.setenv("KAGGLE_USERNAME", "me"), monkeypatch.setenv("KAGGLE_KEY", key)


@pytest.mark.parametrize("how", ["file", "variables", "token"])
def test_a_data_set_of_kaggle(root, kaggle, monkeypatch, tmp_path, how, capfd):
    "Fetched once, with its licence, by each form of credentials."
    sign_in(how, "good", monkeypatch, tmp_path)
    write_sources(root, dict(kind="kaggle", slug="me/songs", licence="see the page"))
    (row,) = ingest(root)
    assert (row["files"], row["others"], row["made"]) == (2, 1, 2)
    assert {r["licence"] for r in rows(root)} == {"CC0-1.0 (says Kaggle); see the page"}
    assert {sign for what, sign in kaggle.asked if "Data" in what} == {
        "Bearer" if how == "token" else "Basic"
    }
    kaggle.asked.clear()
    assert ingest(root)[0]["made"] == 0 and kaggle.asked == [], "nothing is asked again"
    assert "fetching me/songs" in capfd.readouterr().out


@pytest.mark.parametrize("how", ["file", "variables", "token"])
def test_credentials_that_kaggle_refuses(root, kaggle, monkeypatch, tmp_path, how):
    sign_in(how, "bad", monkeypatch, tmp_path)
    write_sources(root, dict(kind="kaggle", slug="me/songs"))
    assert "not accept" in refusal_of(ingest, root) and not root.manifest.exists()


def test_kaggle_without_credentials_or_data(root, kaggle, monkeypatch, tmp_path):
    write_sources(root, dict(kind="kaggle", slug="me/songs"))
    said = refusal_of(ingest, root)
    assert all(
        words in said
        for words in ("needs a Kaggle account", "kaggle.json", "KAGGLE_KEY", "KAGGLE_API_TOKEN")
    )
    sign_in("variables", "good", monkeypatch, tmp_path)
    for slug, says in (("me/missing", "(404)"), ("me/closed", "(403)")):
        write_sources(root, dict(kind="kaggle", slug=slug))
        assert says in (said := refusal_of(ingest, root)) and slug in said
    write_sources(root, dict(kind="kaggle", slug="me/songs", sha256="0" * 64))
    assert "expected 000" in (said := refusal_of(ingest, root)) and "deleted" in said
    write_sources(root, dict(kind="kaggle", slug="../../me/x"))
    assert "owner/dataset" in refusal_of(ingest, root)
    assert not [p for p in root.external.rglob("*") if p.suffix == ".zip"]


# ---- archives that mean harm ---------------------------------------------------------------------


def header(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    "A tar header that says what it is told to say."
    text = (
        name.ljust(100, b"\0")
        + b"0000644\0"
        + b"0000000\0" * 2
        + b"%011o\0" % size
        + b"00000000000\0"
    )
    text = (text + b" " * 8 + kind).ljust(257, b"\0") + b"ustar\00000"
    text = bytearray(text.ljust(512, b"\0"))
    text[148:156] = b"%06o\0 " % sum(text)
    return bytes(text)


def overlapping() -> bytes:
    "Two thousand entries that share one body."
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a.mid", hashlib.shake_256(b"a").digest(5000) * 20)
        z.filelist += [copy.copy(z.filelist[0]) for _ in range(2000)]
    return out.getvalue()


def lying_zip(says: int) -> bytes:
    "A zip whose member unpacks to another size than both of its headers say."
    data, real = bytearray(zipped({"a.mid": bytes(5_000_000)})), struct.pack("<I", 5_000_000)
    assert data.count(real) == 2
    return bytes(data).replace(real, struct.pack("<I", says))


def linked(kind: int) -> bytes:
    link = zipfile.ZipInfo("l.mid")
    link.external_attr = (kind | 0o777) << 16
    return zipped({"good.mid": A, link: b"/etc/passwd"})


def sevened_link() -> bytes:
    import py7zr

    out, link = io.BytesIO(), Path(os.environ.get("TMPDIR", "/tmp")) / f"link-{os.getpid()}.mid"
    link.symlink_to("/etc/passwd")
    try:
        with py7zr.SevenZipFile(out, "w") as z:
            z.write(link, "l.mid")
    finally:
        link.unlink()
    return out.getvalue()


OUT, LINK, RATIO, BAD = "leads outside", "link or device", "times its size", "cannot be unpacked"
ESCAPES = [
    "../evil.mid",
    "a/../../evil.mid",
    "/tmp/evil.mid",
    "..\\evil.mid",
    "C:\\evil.mid",
    "C:evil.mid",
    "\\\\host\\evil.mid",
    "//host/evil.mid",
    "a/..\\..\\evil.mid",
]
SPARSE = {
    "GNU.sparse.map": "0,512,999999999488,512",
    "GNU.sparse.size": "1000000000000",
    "GNU.sparse.numblocks": "2",
}
HOSTILE = {
    **{
        f"{k}.zip": ((lambda name=name: zipped({"good.mid": A, name: B})), OUT)
        for k, name in enumerate(ESCAPES)
    },
    **{
        f"{k}.tar.gz": ((lambda name=name: tarred(("good.mid", A), (name, B), mode="w:gz")), OUT)
        for k, name in enumerate(ESCAPES)
    },
    "nul.zip": (lambda: zipped({"evil_.mid": A}).replace(b"evil_", b"evil\0"), OUT),
    "climbs.7z": (
        lambda: sevened({"good.mid": A, "xx/xx/evil.mid": B}, {"xx/xx/evil.mid": "../../evil.mid"}),
        OUT,
    ),
    "link.7z": (sevened_link, LINK),
    "symlink.zip": (lambda: linked(stat.S_IFLNK), LINK),
    "device.zip": (lambda: linked(stat.S_IFCHR), LINK),
    **{
        f"{k}.tar": (
            (lambda k=k: tarred(("l.mid", b"", dict(type=k, linkname="/etc/passwd")))),
            LINK,
        )
        for k in (
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
            tarfile.CHRTYPE,
            tarfile.BLKTYPE,
            tarfile.FIFOTYPE,
        )
    },
    "bomb.zip": (lambda: zipped({"a.mid": bytes(2_000_000)}), RATIO),
    "bomb.bz2.zip": (
        lambda: zipped({"a.mid": bytes(2_000_000)}, compression=zipfile.ZIP_BZIP2),
        RATIO,
    ),
    "bomb.lzma.zip": (
        lambda: zipped({"a.mid": bytes(2_000_000)}, compression=zipfile.ZIP_LZMA),
        RATIO,
    ),
    "bomb.tgz": (lambda: tarred(("a.mid", bytes(2_000_000)), mode="w:gz"), RATIO),
    "bomb.tar.bz2": (lambda: tarred(("a.mid", bytes(2_000_000)), mode="w:bz2"), RATIO),
    "bomb.tar.xz": (lambda: tarred(("a.txt", bytes(2_000_000)), mode="w:xz"), RATIO),
    "bomb.7z": (lambda: sevened({"a.mid": bytes(2_000_000)}), RATIO),
    "sparse.tar": (
        lambda: tarred(("a.mid", bytes(1024), dict(pax_headers=SPARSE)), format=tarfile.PAX_FORMAT),
        RATIO,
    ),
    "name.tar.gz": (
        lambda: gzip.compress(header(b"././@LongLink", 2**28, b"L") + b"a" * 2**22),
        BAD,
    ),
    "pax.tar.xz": (lambda: lzma.compress(header(b"pax", 2**30, b"x") + b"9 path=a\n" * 2**18), BAD),
    "many.zip": (lambda: zipped({f"{k}.txt": b"" for k in range(3001)}), "limit of 3000 members"),
    "overlaps.zip": (overlapping, "total above"),
    "says less.zip": (lambda: lying_zip(3000), BAD),
    "says more.zip": (lambda: lying_zip(2**31), RATIO),
    "locked.7z": (lambda: sevened({"a.mid": A}, password="x"), "locked"),
    "all locked.7z": (
        lambda: sevened({"a.mid": A}, password="x", header_encryption=True),
        "locked",
    ),
    "locked.zip": (
        lambda: zipped({"a.mid": A}).replace(
            b"PK\x01\x02\x14\x03\x14\0\0", b"PK\x01\x02\x14\x03\x14\0\1"
        ),
        "locked",
    ),
    "cut.zip": (lambda: zipped({f"{k}.mid": BIG for k in range(3)})[:-90], BAD),
    "cut.7z": (lambda: sevened({"a.mid": A, "b.mid": B})[:-40], BAD),
    "cut.tar.gz": (lambda: tarred(("a.mid", BIG), mode="w:gz")[:-5000], BAD),
    "cut in a member.tar": (lambda: tarred(("a.mid", A), ("b.mid", BIG))[:50_000], BAD),
    "cut between members.tar": (
        lambda: tarred(("a.mid", A), ("b.mid", BIG))[: 512 + -(-len(A) // 512) * 512],
        BAD,
    ),
    "rotten.tar": (lambda: tarred(("a.mid", A)).replace(b"ustar", b"uSTAR") + bytes(1024), BAD),
    "rotten.7z": (
        lambda: bytes(b ^ (40 < k < 60) for k, b in enumerate(sevened({"a.mid": A}))),
        BAD,
    ),
    "page.zip": (lambda: b"<html>moved</html>" * 99, BAD),
    "inner.zip": (lambda: zipped({"in.zip": zipped({"../evil.mid": A})}), "in.zip/../evil.mid"),
    "inner bomb.7z": (
        lambda: sevened({"in.tgz": tarred(("a.mid", bytes(15_000_000)), mode="w:gz")}),
        RATIO,
    ),
    "inner bombs.zip": (
        lambda: zipped({f"{k}.zip": zipped({"a.mid": (b"%9d" % k) * 60_000}) for k in range(40)}),
        "total above",
    ),
}


def tree(folder: Path) -> dict:
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_archive_that_means_harm(tmp_path, monkeypatch, name):
    "Refused with the name of the member, and the world outside its folder is as it was."
    make, why = HOSTILE[name]
    monkeypatch.setattr(archives, "MAX_MEMBERS", 3000)
    archive, external = tmp_path / "in" / name, tmp_path / "root/data/external"
    archive.parent.mkdir(), external.mkdir(parents=True)
    archive.write_bytes(make())
    monkeypatch.chdir(archive.parent)
    before, evil = tree(tmp_path), set(Path("/tmp").glob("evil*"))
    says = refusal_of(unpack, archive, external / "mine")
    after = tree(tmp_path)
    assert why in says and name.split("/")[-1] in says, says
    if why not in (BAD,) and "all locked" not in name:
        assert "its member '" in says
    assert {p: v for p, v in after.items() if p != external} == {
        p: v for p, v in before.items() if p != external
    }
    assert set(Path("/tmp").glob("evil*")) == evil


def odd_names() -> dict[str, bytes]:
    "Harmless archives with names that are hard to write down."
    sjis = "音楽.mid".encode("shift-jis")
    return {
        "sjis.zip": zipped({"x" * len(sjis) + ".mid": A}).replace(b"x" * len(sjis), sjis),
        "line.zip": zipped({"a\nb.mid": A}),
        "line.tar": tarred(("a\nb.mid", A)),
        "bytes.tar": tarred(("\udcff\udcfe.mid", A), encoding="utf-8", errors="surrogateescape"),
        "dots.zip": zipped({".../a.mid": A}),
        "con.zip": zipped({"CON.mid": A}),
        "space.zip": zipped({" .mid": A}),
        "long.tar": tarred(("d/" * 200 + "x" * 300 + ".mid", A), format=tarfile.GNU_FORMAT),
        "stream.zip": zipped({"a.mid:hidden.mid": A}),
        "bom.7z": sevened({"\u202egnos.mid": A}),
    }


@pytest.mark.parametrize("name", list(odd_names()))
def test_an_archive_with_odd_names(root, tmp_path, name):
    (tmp_path / name).write_bytes(odd_names()[name])
    ingest(root, midi=tmp_path / name)
    (row,) = rows(root)
    assert re.fullmatch(r"mine/[\w.-]+\.mid", row["path"]) and row["origin"].isprintable()
    assert (root.raw / row["path"]).read_bytes() == A


def test_names_that_clash(root, tmp_path):
    "On a disk that knows no case, and twice in one archive: every piece is kept."
    members = ("a.mid", A), ("A.MID", B), ("a.mid", C), ("b/a.mid", A), ("b-a.mid", tune(30))
    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "x.zip", "w") as z:
        for name, data in members:
            z.writestr(name, data)
    (row,) = ingest(root, midi=tmp_path / "x.zip")
    names = [r["path"].casefold() for r in rows(root)]
    assert row["files"] == 4 == len(set(names)) and row["twice"] == 1


FORMS = {
    "x.zip": zipped,
    "x.tar": lambda m: tarred(*m.items()),
    "x.tgz": lambda m: tarred(*m.items(), mode="w:gz"),
    "x.tar.bz2": lambda m: tarred(*m.items(), mode="w:bz2"),
    "X.TAR.XZ": lambda m: tarred(*m.items(), mode="w:xz"),
    "x.7z": sevened,
    "really a tar.zip": lambda m: tarred(*m.items()),
}


@pytest.mark.parametrize("name", FORMS)
def test_archives_of_every_form(root, tmp_path, name):
    "With an archive inside, one inside that, and files that are no music."
    deep = zipped({"deep.mid": C})
    inner = zipped(
        {"b.mid": B, "deep.zip": deep, "notes.txt": b"x"}, compression=zipfile.ZIP_STORED
    )
    members = {
        "a.mid": A,
        "in.zip": inner,
        "bad.zip": inner[:100],
        "me.jpg": b"x",
        "__MACOSX/._a.mid": b"junk",
    }
    (tmp_path / name).write_bytes(FORMS[name](members))
    (row,) = ingest(root, midi=tmp_path / name)
    assert (row["files"], row["others"], row["left_out"]) == (2, 3, 2)
    left = json.loads((root.raw / "mine/.source.json").read_text())
    assert any(s.startswith("in.zip/deep.zip: a third archive inside") for s in left["left_out"])
    assert any(s.startswith("bad.zip: it cannot be unpacked") for s in left["left_out"])
    assert left["others"] == ["__MACOSX/._a.mid", "in.zip/notes.txt", "me.jpg"]
    assert [r["origin"] for r in rows(root)] == ["local:a.mid", "local:in.zip/b.mid"]


def test_a_zip_of_the_large_form(root, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z, z.open("a.mid", "w", force_zip64=True) as f:
        f.write(A)
    assert ingest(root, midi=tmp_path / "x.zip")[0]["files"] == 1


def test_7z_without_its_library(root, tmp_path, monkeypatch):
    (tmp_path / "x.7z").write_bytes(sevened({"a.mid": A}))
    monkeypatch.setattr(archives.importlib.util, "find_spec", lambda name: None)
    assert "pip install py7zr" in refusal_of(unpack, tmp_path / "x.7z", tmp_path / "out")


@posix
def test_a_full_disk_while_it_unpacks(tmp_path):
    (tmp_path / "x.zip").write_bytes(zipped({"a.mid": BIG, "b.mid": A}))
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom musicgen.core import Rejection\nfrom musicgen.corpus.archives import unpack\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (50_000, -1))\n"
        "try: unpack(Path(sys.argv[1]), Path(sys.argv[2]))\nexcept Rejection as e: print(e.sentence)"
    )
    words = [sys.executable, "-c", code, tmp_path / "x.zip", tmp_path / "out"]
    said = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert "its member 'a.mid' cannot be written" in said.stdout, said
    assert os.listdir(tmp_path) == ["x.zip"]


# ---- folders, and runs that are repeated ---------------------------------------------------------


def fill(folder: Path, **files: bytes) -> Path:
    for name, data in files.items():
        write_atomic(folder / f"{name}.mid", data)
    return folder


def inodes(root: Layout) -> dict:
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in root.raw.rglob("*/*")}


def test_a_single_file(root, tmp_path):
    fill(tmp_path, one=A)
    assert ingest(root, midi=tmp_path / "one.mid")[0]["files"] == 1
    assert "takes a folder" in refusal_of(
        ingest, root, midi=write_atomic(tmp_path / "one.wav", b"x")
    )


@posix
def test_a_folder_with_all_sorts_of_things(root, tmp_path, capsys):
    "What is no music is counted and named; what cannot be read is left out with a reason; nothing hangs."
    folder = fill(tmp_path / "songs", one=A, two=B)
    (
        os.mkfifo(folder / "pipe.mid"),
        (folder / "loop").symlink_to(folder),
        (folder / "dead.mid").symlink_to("nowhere"),
    )
    (
        (folder / ".hidden.mid").write_bytes(A),
        (folder / "._one.mid").write_bytes(b"x"),
        (folder / "empty").mkdir(),
    )
    (
        (folder / "dir.mid").mkdir(),
        (folder / "read me.txt").write_bytes(b"x"),
        (folder / "a.ZIP").write_bytes(b"x"),
    )
    open(os.fsencode(folder) + b"/\xff\n.mid", "wb").write(C)
    (row,) = ingest(root, midi=folder)
    assert (row["files"], row["others"]) == (3, 2)
    assert (
        "2 other files (1 .zip, 1 .txt: a.ZIP, read me.txt) left alone" in capsys.readouterr().out
    )
    assert "local:??.mid" in {r["origin"] for r in rows(root)}


def test_a_folder_without_music(root, tmp_path):
    write_atomic(tmp_path / "songs/a.abc", "X:1\nK:C\n")
    said = refusal_of(ingest, root, midi=tmp_path / "songs")
    assert (
        "1 other file (1 .abc: a.abc)" in said
        and "takes .mid .midi .kar .rmi" in said
        and "`globs`" in said
    )
    shutil.rmtree(tmp_path / "songs"), (tmp_path / "songs").mkdir()
    assert "holds no file" in refusal_of(ingest, root, midi=tmp_path / "songs")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\3\4",
        b"<a/>",
        b"<score-partwise><part><measure><note><pitch/><duration>1",
        b"\xff\xfe",
        zipped({"META-INF/container.xml": b"<a/>"}),
    ],
)
def test_scores_that_are_none(root, tmp_path, data):
    "A broken score costs that score."
    fill(tmp_path / "songs", good=A)
    (tmp_path / "songs/bad.mxl").write_bytes(data)
    write_sources(root, dict(kind="local", path=str(tmp_path / "songs"), globs=["*.mid", "*.mxl"]))
    (row,) = ingest(root)
    assert (row["files"], row["left_out"]) == (1, 1)


def page(note: str, time: str = "<time><beats>3</beats><beat-type>4</beat-type></time>") -> bytes:
    return (
        "<score-partwise><part-list><score-part id='P1'/></part-list><part id='P1'><measure><attributes>"
        f"<divisions>2</divisions>{time}</attributes>{note}</measure></part></score-partwise>"
    ).encode()


NOTE = "<note><pitch><step>{}</step><octave>{}</octave></pitch><duration>{}</duration></note>"


@pytest.mark.parametrize(
    "data",
    [
        page(NOTE.format("H", 4, 2)),
        page(NOTE.format("C", "", 2)),
        page(NOTE.format("C", 99, 2)),
        page(NOTE.format("C", 4, "long")),
        page(NOTE.format("C", 4, "nan")),
        page(NOTE.format("C", 4, "1e300")),
        page(NOTE.format("C", 4, 2), "<time><beats>3</beats><beat-type>0</beat-type></time>"),
        page("<note><pitch/><duration>2</duration></note>"),
        page(NOTE.format("C", 4, 2)).replace(b">2</div", b">0</div"),
    ],
)
def test_scores_that_make_no_sense(root, tmp_path, data):
    (tmp_path / "songs").mkdir()
    (tmp_path / "songs/bad.xml").write_bytes(data)
    write_sources(root, dict(kind="local", path=str(tmp_path / "songs"), globs=["*.xml"]))
    assert "gave no piece: bad.xml: " in refusal_of(ingest, root)


def test_a_second_run_copies_nothing(root, tmp_path):
    "By inode and time; a new source adds, a changed file is noticed, a removed or disabled source disappears."
    fill(tmp_path / "one", a=A), (tmp_path / "two.zip").write_bytes(zipped({"b.mid": B}))
    one, two = (
        dict(name=n, kind="local", path=str(tmp_path / p))
        for n, p in (("one", "one"), ("two", "two.zip"))
    )
    write_sources(root, one)
    ingest(root)
    first = inodes(root)
    assert ingest(root)[0]["made"] == 0 and inodes(root) == first
    write_sources(root, one, two)
    assert [r["made"] for r in ingest(root)] == [0, 1]
    both = inodes(root)
    assert first.items() < both.items() and len(rows(root)) == 2
    unpacked = tree(root.external)
    assert (
        [r["made"] for r in ingest(root)] == [0, 0]
        and inodes(root) == both
        and tree(root.external) == unpacked
    )
    watched = json.loads((root.raw / "watched.json").read_text())
    assert watched == {s["path"]: folder_digest(s["path"]) for s in (one, two)}, (
        "what a pipeline looks at for changes"
    )
    fill(tmp_path / "one", a=C)
    assert [r["made"] for r in ingest(root)] == [1, 0]
    fill(tmp_path / "one", b=A)
    assert ingest(root)[0]["files"] == 2
    (tmp_path / "one/a.mid").unlink()
    assert ingest(root)[0]["files"] == 1
    write_sources(root, dict(one, enabled=False), two)
    ingest(root)
    assert not (root.raw / "one").exists() and {r["dataset"] for r in rows(root)} == {"two"}
    write_sources(root, one)
    ingest(root)
    assert not (root.raw / "two").exists() and {r["dataset"] for r in rows(root)} == {"one"}


def test_a_source_that_fails_takes_nothing_away(root, tmp_path):
    fill(tmp_path / "one", a=A)
    one, gone = (
        dict(name=n, kind="local", path=p)
        for n, p in (("one", str(tmp_path / "one")), ("two", "/nowhere"))
    )
    write_sources(root, one), ingest(root)
    before = tree(root.raw)
    write_sources(root, gone)
    assert "does not exist" in refusal_of(ingest, root) and tree(root.raw) == before


INGEST = "import sys\nfrom musicgen.core import Layout\nfrom musicgen.ingest import ingest\n"


def test_two_at_once(root, tmp_path):
    "One waits for the other; both find all, and the second makes nothing."
    (tmp_path / "x.zip").write_bytes(zipped({f"{k}.mid": tune(k) for k in range(100)}))
    write_sources(root, dict(kind="local", path=str(tmp_path / "x.zip")))
    answers = []
    both = [threading.Thread(target=lambda: answers.extend(ingest(root))) for _ in range(4)]
    for t in both:
        t.start()
    for t in both:
        t.join()
    assert sorted(a["made"] for a in answers) == [0, 0, 0, 100] and len(rows(root)) == 100


@posix
def test_killed_at_any_moment(root, tmp_path):
    "Five kills at different moments of a run that never ends; each time the next run puts all in order."
    (tmp_path / "x.zip").write_bytes(zipped({f"{k}.mid": tune(k) for k in range(60)}))
    fill(tmp_path / "y", a=A)
    write_sources(
        root, *(dict(name=p[0], kind="local", path=str(tmp_path / p)) for p in ("x.zip", "y"))
    )
    code = INGEST + (
        "import itertools, os\nfor k in itertools.count():\n    print(k, flush=True)\n"
        "    for p in (sys.argv[2], sys.argv[3]): os.utime(p, (k, k))\n    ingest(Layout(sys.argv[1]))\n"
    )
    for k in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", code, root.root, tmp_path / "x.zip", tmp_path / "y/a.mid"],
            stdout=subprocess.PIPE,
        )
        process.stdout.readline()
        time.sleep(0.02 * k)
        process.kill(), process.wait(), process.stdout.close()
        assert process.returncode == -signal.SIGKILL
        ingest(root)
        assert len(rows(root)) == 61 and all((root.raw / r["path"]).exists() for r in rows(root))
        assert not [
            *root.raw.glob(".*"),
            *root.external.glob(".*.part"),
            *root.external.glob(".*.gone"),
        ]


def test_processes_give_the_same_bytes(tmp_path):
    "A folder of scores and tunes, read by one process and by two."
    (tmp_path / "songs").mkdir()
    jig = "X:{}\nM:6/8\nL:1/8\nK:{}\nGAB dBG|cBA GED|GAB dBG|ABG FED|\n\n"
    (tmp_path / "songs/jigs.abc").write_text(
        "".join(jig.format(k, key) for k, key in enumerate("GDACF"))
    )
    for k in range(35):
        (tmp_path / f"songs/{k}.xml").write_bytes(
            page(NOTE.format("CDEFGAB"[k % 7], k % 9, 2 + k % 4))
        )
    found = []
    for workers in (1, 2):
        root = Layout(tmp_path / str(workers))
        write_sources(
            root, dict(kind="local", path=str(tmp_path / "songs"), globs=["*.xml", "*.abc"])
        )
        assert ingest(root, workers=workers)[0]["files"] >= 30
        found.append(root.manifest.read_bytes())
    assert found[0] == found[1]


# ---- data/sources.yaml -----------------------------------------------------------------------------


def test_the_sources_that_are_written_down():
    "Nothing online is enabled, everything has a licence, and every download is pinned by a checksum or a commit."
    sources = read_sources(HERE / "data/sources.yaml")
    for s in sources:
        assert s.licence and s.citation or s.kind == "kaggle", s.name
        assert not (s.enabled and s.kind in ("url", "kaggle")), s.name
        if s.kind == "url":
            assert s.sha256 or s.md5 or re.search(r"/[0-9a-f]{40}\b", s.url), s.name
        assert re.fullmatch(r"([0-9a-f]{64})?", s.sha256) and re.fullmatch(
            r"([0-9a-f]{32})?", s.md5
        )
    text = (HERE / "data/sources.yaml").read_text("utf-8")
    assert "enabled: true" in text.split("- name")[0], "a newcomer reads how to switch one on"


def test_the_sources_agree_with_what_is_known():
    "Each public set of the shared notes, with its address, checksum and size."
    shared = os.environ.get("MUSICGEN_SHARED")
    if not shared:
        pytest.skip("MUSICGEN_SHARED names no folder")
    sources = {s.url: s for s in read_sources(HERE / "data/sources.yaml") if s.url}
    text = (Path(shared) / "data/README.md").read_text("utf-8")
    table = re.findall(r"^\| ([^|]+) \| (http[^ |]+) \| ([^|]*) \| ([^|]*) \|", text, re.MULTILINE)
    assert len(table) >= 10
    for name, url, check, size in (t for t in table if "{" not in t[1] and "LilyPond" not in t[3]):
        source = sources[url]
        digest = (re.findall(r"[0-9a-f]{32,64}", check) or [""])[0]
        assert digest in (source.sha256, source.md5, ""), name
        assert not size.strip().isdigit() or source.bytes == int(size), name
