"""Sources of music: bad servers, Kaggle, hostile archives, folders, and repeated runs of ingest."""

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

import httpx
import pytest

from musicgen.core import Layout, Rejection, folder_digest, write_atomic
from musicgen.corpus import archives
from musicgen.corpus import download as downloads
from musicgen.corpus.download import download
from musicgen.corpus.sources import Source, read_sources
from musicgen.corpus.unpacking import unpack
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


def rejection_of(call, *arguments, **keywords) -> str:
    "The sentence with which a call is rejected: one line of a readable length."
    with pytest.raises(Rejection) as error:
        call(*arguments, **keywords)
    sentence = error.value.sentence
    assert 10 < len(sentence) < 900, sentence
    return sentence


def write_sources(root: Layout, *sources: dict):
    sources = [dict(dict(name="mine", licence="not stated"), **s) for s in sources]
    write_atomic(root.sources, "".join("- " + json.dumps(s) + "\n" for s in sources))


def rows(root: Layout) -> list[dict]:
    with open(root.manifest, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def make_zip(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as z:
        for name, data in members.items():
            z.writestr(name, data)
    return out.getvalue()


def make_tar(*members, mode: str = "w", **options) -> bytes:
    "A tar of (name, content, further fields of the header)."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, **options) as t:
        for name, data, *fields in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in (fields[0] if fields else {}).items():
                setattr(info, key, value)
            t.addfile(info, io.BytesIO(data))
    return out.getvalue()


def make_7z(members: dict[str, bytes], renamed: dict[str, str] | None = None, **options) -> bytes:
    "A 7z archive. `renamed`: name -> one of the same length that py7zr would not write."
    import py7zr

    out = io.BytesIO()
    with py7zr.SevenZipFile(out, "w", **options) as z:
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
    "A server that notes its requests, and answers as `server.answers[path]` says."

    protocol_version = "HTTP/1.1"

    def log_message(self, *a):
        pass

    def do_GET(self):
        self.close_connection = True
        self.server.requests.append(dict(self.headers, path=self.path))
        try:
            self.server.answers[self.path.split("?")[0]](self)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def reply(self, code: int = 200, body: bytes = b"", length: int | None = -1, **headers):
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length < 0 else length))
        self.end_headers()
        self.wfile.write(body)

    def file(self, data: bytes, cut: int | None = None, heed: bool = True, **headers):
        "The file or its rest, broken off after `cut` bytes. `heed`: whether `If-Range` is heeded."
        start = re.match(r"bytes=(\d+)-$", self.headers.get("Range", ""))
        same = not heed or self.headers.get("If-Range") in (None, *headers.values())
        start = int(start[1]) if start and same else 0
        body = data[start:]
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.reply(206 if start else 200, body[:cut], len(body), **headers)


@pytest.fixture
def site():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        server.daemon_threads, server.requests, server.answers = True, [], {}
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory) -> Path:
    "A bundle of one certificate: to load all of them takes longer than most of these tests."
    import certifi

    first, end, _ = certifi.contents().partition("-----END CERTIFICATE-----\n")
    return write_atomic(tmp_path_factory.mktemp("tls") / "one.pem", first + end)


@pytest.fixture(autouse=True)
def environment(monkeypatch, certificate):
    "No proxy, and few certificates."
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False), monkeypatch.delenv(name.upper(), raising=False)


def fetch(site, path: Path, address: str = "/x", **options) -> bytes:
    "The bytes of a download. `options`: of `download`, and the size and checksums of the source."
    facts = {key: options.pop(key) for key in ("bytes", "sha256", "md5") if key in options}
    source = Source("mine", "url", "MIT", url=site.url + address, **facts)
    return download(source, path, **(dict(pause=0.01, timeout=2) | options)).read_bytes()


SHA = hashlib.sha256(BIG).hexdigest()
DATE = "Mon, 02 Nov 2026 08:00:00 GMT"


@pytest.mark.parametrize(
    "headers, release",
    [
        (dict(ETag='"one"'), '"one"'),
        (dict(Last_Modified=DATE), DATE),
        (dict(ETag='W/"one"', Last_Modified=DATE), DATE),
    ],
)
def test_a_broken_download_is_resumed(site, tmp_path, headers, release):
    "On condition that the release is still the same; a weak tag is no proof of that."
    site.answers["/x"] = lambda s: s.file(
        BIG, 70_000 if len(site.requests) < 3 else None, **headers
    )
    assert fetch(site, tmp_path / "x") == BIG
    assert [r.get("Range") for r in site.requests] == [None, "bytes=70000-", "bytes=140000-"]
    assert [r.get("If-Range") for r in site.requests] == [None, release, release]
    assert os.listdir(tmp_path) == ["x"]


def test_a_broken_download_of_no_known_release(site, tmp_path):
    "It is resumed where a checksum will test the result, and starts again where nothing would."
    site.answers["/x"] = lambda s: s.file(BIG, 70_000 if len(site.requests) == 1 else None)
    assert fetch(site, tmp_path / "x") == BIG and "Range" not in site.requests[1]
    site.requests.clear()
    assert fetch(site, tmp_path / "y", sha256=SHA) == BIG
    assert site.requests[1]["Range"] == "bytes=70000-"


@pytest.mark.parametrize("heed", [True, False])
@pytest.mark.parametrize("checked", [True, False])
def test_parts_of_two_releases_are_never_joined(site, tmp_path, heed, checked):
    "Not even when the server overlooks `If-Range`, nor when only the checksum can tell."
    old, new = b"x" * len(BIG), BIG

    def answer(s):
        first = len(site.requests) == 1
        tag = {} if checked else dict(ETag='"old"' if first else '"new"')
        s.file(old if first else new, 50_000 if first else None, heed, **tag)

    site.answers["/x"] = answer
    assert fetch(site, tmp_path / "x", sha256=SHA if checked else "") == new
    assert os.listdir(tmp_path) == ["x"]


def test_a_part_that_is_whole_or_too_long(site, tmp_path):
    "Whole, of a run that was killed: nothing is fetched. Longer than the file: it starts again."
    path, part, note = (tmp_path / name for name in ("x", "x.part", "x.part.json"))
    site.answers["/x"] = lambda s: (
        s.reply(416)
        if s.headers.get("Range") == f"bytes={len(BIG) + 9}-"
        else s.file(BIG, ETag='"one"')
    )
    part.write_bytes(BIG)
    note.write_text(json.dumps(dict(release='"one"', total=len(BIG))))
    assert fetch(site, path) == BIG and site.requests == []
    path.unlink(), part.write_bytes(b"y" * (len(BIG) + 9))
    note.write_text(json.dumps(dict(release='"one"', total=0)))
    assert fetch(site, path) == BIG and len(site.requests) == 2
    for damaged in ("{", '{"release": ', "[]", "null", '{"release": 1, "total": null}'):
        path.unlink(), part.write_bytes(b"y" * 50), note.write_text(damaged)
        assert fetch(site, path) == BIG, damaged


@pytest.mark.parametrize(
    "retry_after, seconds",
    [
        ("3", 3),
        ("999999", downloads.PATIENCE),
        ("soon", 0.25),
        ("-5", 0.25),
        (email.utils.formatdate(0), 0.25),
    ],
)
def test_a_busy_server_says_how_long_to_wait(site, tmp_path, retry_after, seconds):
    pauses = []
    site.answers["/x"] = lambda s: (
        s.file(BIG) if len(site.requests) > 1 else s.reply(503, Retry_After=retry_after)
    )
    assert fetch(site, tmp_path / "x", pause=0.25, sleep=pauses.append) == BIG
    assert pauses == [seconds]


def test_attempts_double_their_pause_and_end(site, tmp_path, capsys):
    pauses = []
    site.answers["/x"] = lambda s: s.reply(500)
    sentence = rejection_of(fetch, site, tmp_path / "x", pause=1, sleep=pauses.append)
    assert "in 5 attempts" in sentence
    assert pauses == [1, 2, 4, 8] and "attempt 2 of 5" in capsys.readouterr().out


def test_attempts_that_bring_something_do_not_count(site, tmp_path, monkeypatch):
    "Nine attempts break off, and each has brought its kilobyte."
    monkeypatch.setattr(downloads, "MEGABYTE", 1000)
    site.answers["/x"] = lambda s: s.file(BIG, 22_000, ETag='"one"')
    assert fetch(site, tmp_path / "x", tries=3) == BIG and len(site.requests) == 10


def drip(s, start: bytes):
    "The start, and then a byte at a time for as long as the client listens."
    s.wfile.write(start)
    while True:
        s.wfile.write(b"a"), s.wfile.flush(), time.sleep(0.02)


OK = b"HTTP/1.1 200 OK\r\n"
SLOW = {
    "says nothing": (lambda s: s.rfile.read(), "timed out"),
    "drips a header": (lambda s: drip(s, OK + b"X-Long: "), "fewer than"),
    "drips a body": (lambda s: drip(s, OK + b"Content-Length: 9999\r\n\r\n"), "fewer than"),
    "drips a chunk": (
        lambda s: drip(s, OK + b"Transfer-Encoding: chunked\r\n\r\n9;"),
        "fewer than",
    ),
    "drips a body of no length": (lambda s: drip(s, OK + b"\r\n"), "fewer than"),
}


@pytest.mark.parametrize("kind", SLOW)
def test_a_server_that_never_comes_to_an_end(site, tmp_path, kind):
    "A time-out ends silence, and a minimum rate ends dripping, in the headers and in the body."
    site.answers["/x"], reason = SLOW[kind]
    assert reason in rejection_of(fetch, site, tmp_path / "x", tries=1, timeout=0.3)
    assert not (tmp_path / "x").exists()


LIES = {
    "longer than it is": (
        lambda s: s.reply(200, BIG[:900], 1000),
        "without sending complete message body",
    ),
    "shorter than it is": (lambda s: s.reply(200, BIG, 900), "900 bytes, expected 200000"),
    "absent": (lambda s: s.reply(200, BIG[:900], None), "900 bytes, expected 200000"),
    "broken chunks": (
        lambda s: s.wfile.write(OK + b"Transfer-Encoding: chunked\r\n\r\nff\r\nabc"),
        "incomplete",
    ),
    "no number": (
        lambda s: s.wfile.write(OK + b"Content-Length: many\r\n\r\nabc"),
        "Content-Length",
    ),
    "no http": (lambda s: s.wfile.write(b"220 mail ready\r\n\r\n" * 9), "illegal"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_about_length(site, tmp_path, lie):
    site.answers["/x"], reason = LIES[lie]
    sentence = rejection_of(fetch, site, tmp_path / "x", tries=2, bytes=len(BIG))
    assert reason.casefold() in sentence.casefold()
    assert not (tmp_path / "x").exists()


def endless(s):
    s.wfile.write(OK + b"Transfer-Encoding: chunked\r\n\r\n")
    while True:
        s.wfile.write(b"10000\r\n" + bytes(65536) + b"\r\n")


@pytest.mark.parametrize("answer", [endless, lambda s: s.reply(200, b"", 10**15)])
def test_a_size_has_a_limit(site, tmp_path, monkeypatch, answer):
    "That of the source, or the one for all sources; and nothing is kept."
    site.answers["/x"] = answer
    monkeypatch.setattr(downloads, "MAX_BYTES", 1_000_000)
    with pytest.raises(Rejection, match="more than the 5000 bytes it should have"):
        fetch(site, tmp_path / "x", bytes=5000)
    with pytest.raises(Rejection, match="more than the 1000000 bytes it may have"):
        fetch(site, tmp_path / "x")
    assert os.listdir(tmp_path) == [] and len(site.requests) == 2


def test_a_body_of_no_declared_length(site, tmp_path):
    site.answers["/x"] = lambda s: s.reply(200, BIG, None)
    assert fetch(site, tmp_path / "x") == BIG


def test_redirects(site, tmp_path):
    "Ten at most; over http and https, never down from one to the other."
    site.answers.update(
        {
            "/x": lambda s: s.reply(302, Location="/y"),
            "/y": lambda s: s.file(BIG),
            "/round": lambda s: s.reply(302, Location="/round"),
            "/local": lambda s: s.reply(302, Location="file:///etc/passwd"),
        }
    )
    assert fetch(site, tmp_path / "x") == BIG
    site.requests.clear()
    assert "redirect" in rejection_of(fetch, site, tmp_path / "r", "/round")
    assert len(site.requests) == 11
    with pytest.raises(Rejection, match="only https and http"):
        fetch(site, tmp_path / "r", "/local")
    safe = Source("mine", "url", "MIT", url="https://safe.example/x.zip")
    downloads._check_url(safe, httpx.URL("https://other.example/x.zip"))
    with pytest.raises(Rejection, match="only https is"):
        downloads._check_url(safe, httpx.URL("http://safe.example/x.zip"))


@pytest.mark.parametrize(
    "url",
    [
        "ftp://127.0.0.1/x.zip",
        "http://",
        "http://[::1",
        "nonsense",
        "http://127.0.0.1:99999/x",
    ],
)
def test_an_address_that_is_none(tmp_path, url):
    source = Source("mine", "url", "MIT", url=url)
    rejection_of(download, source, tmp_path / "x", tries=2, pause=0)


class Proxy(http.server.BaseHTTPRequestHandler):
    "A forwarding proxy."

    def log_message(self, *a):
        pass

    def do_GET(self):
        self.server.requests.append(self.path)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(self.path) as answer:
            data = answer.read()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def test_behind_a_proxy(site, tmp_path, monkeypatch):
    site.answers["/x"] = lambda s: s.file(BIG)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        proxy.requests = []
        threading.Thread(target=proxy.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.server_port}")
        assert fetch(site, tmp_path / "x") == BIG and proxy.requests == [site.url + "/x"]
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert fetch(site, tmp_path / "y") == BIG and len(proxy.requests) == 1
        proxy.shutdown()
    monkeypatch.delenv("NO_PROXY")
    with pytest.raises(Rejection, match="could not be fetched"):  # the proxy is gone
        fetch(site, tmp_path / "z", tries=1)
    monkeypatch.setenv("HTTP_PROXY", "gopher://127.0.0.1:1")
    with pytest.raises(Rejection, match="the proxy that the environment names cannot be used"):
        fetch(site, tmp_path / "z", tries=1)


def test_a_file_that_is_there_is_not_fetched_again(site, tmp_path):
    "Unless it is not what the source states now."
    site.answers["/x"] = lambda s: s.file(BIG)
    for facts in (dict(sha256=SHA.upper()), dict(sha256=SHA), {}):
        fetch(site, tmp_path / "x", **facts)
    assert len(site.requests) == 1
    (tmp_path / "x").write_bytes(b"old")
    assert fetch(site, tmp_path / "x", sha256=SHA) == BIG and len(site.requests) == 2
    sentence = rejection_of(fetch, site, tmp_path / "x", md5="0" * 32)
    for fact in ("'mine'", site.url, "0" * 32, hashlib.md5(BIG).hexdigest(), "deleted"):
        assert fact in sentence
    assert (tmp_path / "x").read_bytes() == BIG, "the old file stays until there is a better one"


SMALL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, -1))
"""
FETCH = """
import sys
from pathlib import Path
from musicgen.core import Rejection
from musicgen.corpus.download import download
from musicgen.corpus.sources import Source
try:
    download(Source("mine", "url", "MIT", url=sys.argv[1]), Path(sys.argv[2]))
except Rejection as e:
    print(e.sentence)
"""


@posix
def test_a_full_disk_and_a_kill_keep_what_came(site, tmp_path):
    site.answers["/x"] = lambda s: s.file(BIG, ETag='"one"')
    command = [sys.executable, "-c", SMALL_DISK + FETCH, site.url + "/x", tmp_path / "x"]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert "'mine' stops at 50000 bytes" in output and "are kept" in output
    assert output.count("\n") == 1
    site.answers["/x"] = lambda s: (s.file(BIG, 30_000, ETag='"one"'), s.rfile.read())
    command[2] = FETCH
    process = subprocess.Popen(command)
    until = time.monotonic() + 60
    while (tmp_path / "x.part").stat().st_size < 80_000:
        assert time.monotonic() < until, "the download does not go on"
        time.sleep(0.01)
    process.kill(), process.wait()
    site.answers["/x"] = lambda s: s.file(BIG, ETag='"one"')
    assert fetch(site, tmp_path / "x") == BIG
    assert [r.get("Range") for r in site.requests] == [None, "bytes=50000-", "bytes=80000-"]


def test_progress_shows_bytes_and_time(site, tmp_path, monkeypatch, capsys):
    site.answers["/x"] = lambda s: s.file(BIG * 20)
    monkeypatch.setattr(downloads, "PROGRESS_EVERY", 0)
    fetch(site, tmp_path / "x")
    assert re.search(r"ingest: mine \d/4 MB, \d+ s left", capsys.readouterr().out)


# ---- Kaggle, with its own client -----------------------------------------------------------------


class Kaggle(http.server.BaseHTTPRequestHandler):
    "Answers Kaggle's client as kaggle.com does."

    def log_message(self, *a):
        pass

    def answer(self, code: int, body: bytes, kind: str = "application/json", **more):
        self.send_response(code)
        headers = {"Content-Type": kind, "Content-Length": str(len(body))} | more
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(200, self.server.archive, "application/zip", ETag='"one"')

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        method, credentials = self.path.split("/")[-1], self.headers.get("Authorization", "")
        self.server.requests.append((method, credentials.split(" ")[0]))
        if method == "IntrospectToken":
            good = request["token"] == "good"
            facts = dict(active=good, username="me")
            return self.answer(200 if good else 404, json.dumps(facts).encode())
        if credentials not in ("Bearer good", "Basic bWU6Z29vZA=="):
            return self.answer(401, b'{"code": 401, "message": "no"}')
        code = dict(closed=403, missing=404).get(request["datasetSlug"])
        if code:
            return self.answer(code, json.dumps(dict(code=code, message="no")).encode())
        if method == "DownloadDataset":
            return self.answer(302, b"", "text/plain", Location=self.server.url + "/archive")
        self.answer(200, json.dumps(dict(info=dict(licenses=[dict(name="CC0-1.0")]))).encode())


@pytest.fixture(scope="session")
def credentials(tmp_path_factory):
    "The file where Kaggle's client looks for credentials: it reads the environment at its import."
    folder = tmp_path_factory.mktemp("kaggle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAGGLE_CONFIG_DIR", str(folder))
        client = pytest.importorskip("kaggle.api.kaggle_api_extended")
    assert Path(client.KaggleApi.config).parent == folder
    return folder / "kaggle.json"


@pytest.fixture
def kaggle(monkeypatch, tmp_path, credentials):
    "A server in the place of kaggle.com, and no credentials."
    credentials.unlink(missing_ok=True)
    for name in [n for n in os.environ if n.startswith("KAGGLE")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Kaggle) as server:
        server.url, server.requests = f"http://127.0.0.1:{server.server_port}", []
        server.archive = make_zip({"a.mid": A, "b.mid": B, "about.csv": b"x"})
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        env = pytest.importorskip("kagglesdk.kaggle_env")
        # The one patch of another library's insides: the client knows no setting for its address.
        monkeypatch.setitem(env._env_to_endpoint, env.KaggleEnv.PROD, server.url)
        yield server
        server.shutdown()


def sign_in(form: str, key: str, monkeypatch, credentials):
    "Leaves credentials where Kaggle's client looks for them."
    if form == "file":
        credentials.write_text(json.dumps(dict(username="me", key=key)))
        credentials.chmod(0o600)
    elif form == "token":
        monkeypatch.setenv("KAGGLE_API_TOKEN", key)
    else:
        monkeypatch.setenv("KAGGLE_USERNAME", "me"), monkeypatch.setenv("KAGGLE_KEY", key)


@pytest.mark.parametrize("form", ["file", "variables", "token"])
def test_a_data_set_of_kaggle(root, kaggle, monkeypatch, credentials, form, capfd):
    "Fetched once, with its licence, by each form of credentials."
    sign_in(form, "good", monkeypatch, credentials)
    write_sources(root, dict(kind="kaggle", slug="me/songs", licence="see the page"))
    (row,) = ingest(root)
    assert (row["files"], row["others"], row["made"]) == (2, 1, 2)
    assert {r["licence"] for r in rows(root)} == {"CC0-1.0 (says Kaggle); see the page"}
    schemes = {scheme for method, scheme in kaggle.requests if "Data" in method}
    assert schemes == {"Bearer" if form == "token" else "Basic"}
    kaggle.requests.clear()
    assert ingest(root)[0]["made"] == 0 and kaggle.requests == [], "nothing is asked again"
    assert "fetching me/songs" in capfd.readouterr().out


@pytest.mark.parametrize("form", ["file", "variables", "token"])
def test_credentials_that_kaggle_rejects(root, kaggle, monkeypatch, credentials, form):
    sign_in(form, "bad", monkeypatch, credentials)
    write_sources(root, dict(kind="kaggle", slug="me/songs"))
    with pytest.raises(Rejection, match="not accept"):
        ingest(root)
    assert not root.manifest.exists()


def test_kaggle_without_credentials_or_data(root, kaggle, monkeypatch, credentials):
    write_sources(root, dict(kind="kaggle", slug="me/songs"))
    sentence = rejection_of(ingest, root)
    for text in ("needs a Kaggle account", "kaggle.json", "KAGGLE_KEY", "KAGGLE_API_TOKEN"):
        assert text in sentence
    sign_in("variables", "good", monkeypatch, credentials)
    for slug, code in (("me/missing", 404), ("me/closed", 403)):
        write_sources(root, dict(kind="kaggle", slug=slug))
        with pytest.raises(Rejection, match=rf"{slug}.*\({code}\)"):
            ingest(root)
    write_sources(root, dict(kind="kaggle", slug="me/songs", sha256="0" * 64))
    with pytest.raises(Rejection, match="expected 000.*deleted"):
        ingest(root)
    write_sources(root, dict(kind="kaggle", slug="../../me/x"))
    with pytest.raises(Rejection, match="owner/dataset"):
        ingest(root)
    assert not [p for p in root.external.rglob("*") if p.suffix == ".zip"]


# ---- hostile archives ----------------------------------------------------------------------------


def header(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    "The header of a tar's member, which may lie about the size."
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


def lying_zip(declared: int) -> bytes:
    "A zip whose member unpacks to another size than both of its headers declare."
    data, size = make_zip({"a.mid": bytes(5_000_000)}), struct.pack("<I", 5_000_000)
    assert data.count(size) == 2
    return data.replace(size, struct.pack("<I", declared))


def linked_zip(kind: int) -> bytes:
    "A zip with a member of this Unix file type."
    link = zipfile.ZipInfo("l.mid")
    link.external_attr = (kind | 0o777) << 16
    return make_zip({"good.mid": A, link: b"/etc/passwd"})


def linked_7z() -> bytes:
    "A 7z with a symbolic link."
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
        f"{k}.zip": ((lambda name=name: make_zip({"good.mid": A, name: B})), OUT)
        for k, name in enumerate(ESCAPES)
    },
    **{
        f"{k}.tar.gz": ((lambda name=name: make_tar(("good.mid", A), (name, B), mode="w:gz")), OUT)
        for k, name in enumerate(ESCAPES)
    },
    "nul.zip": (lambda: make_zip({"evil_.mid": A}).replace(b"evil_", b"evil\0"), OUT),
    "climbs.7z": (
        lambda: make_7z({"good.mid": A, "xx/xx/evil.mid": B}, {"xx/xx/evil.mid": "../../evil.mid"}),
        OUT,
    ),
    "link.7z": (linked_7z, LINK),
    "symlink.zip": (lambda: linked_zip(stat.S_IFLNK), LINK),
    "device.zip": (lambda: linked_zip(stat.S_IFCHR), LINK),
    **{
        f"{k}.tar": (
            (lambda k=k: make_tar(("l.mid", b"", dict(type=k, linkname="/etc/passwd")))),
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
    "bomb.zip": (lambda: make_zip({"a.mid": bytes(2_000_000)}), RATIO),
    "bomb.bz2.zip": (
        lambda: make_zip({"a.mid": bytes(2_000_000)}, compression=zipfile.ZIP_BZIP2),
        RATIO,
    ),
    "bomb.lzma.zip": (
        lambda: make_zip({"a.mid": bytes(2_000_000)}, compression=zipfile.ZIP_LZMA),
        RATIO,
    ),
    "bomb.tgz": (lambda: make_tar(("a.mid", bytes(2_000_000)), mode="w:gz"), RATIO),
    "bomb.tar.bz2": (lambda: make_tar(("a.mid", bytes(2_000_000)), mode="w:bz2"), RATIO),
    "bomb.tar.xz": (lambda: make_tar(("a.txt", bytes(2_000_000)), mode="w:xz"), RATIO),
    "bomb.7z": (lambda: make_7z({"a.mid": bytes(2_000_000)}), RATIO),
    "sparse.tar": (
        lambda: make_tar(
            ("a.mid", bytes(1024), dict(pax_headers=SPARSE)), format=tarfile.PAX_FORMAT
        ),
        RATIO,
    ),
    "name.tar.gz": (
        lambda: gzip.compress(header(b"././@LongLink", 2**28, b"L") + b"a" * 2**22),
        BAD,
    ),
    "pax.tar.xz": (lambda: lzma.compress(header(b"pax", 2**30, b"x") + b"9 path=a\n" * 2**18), BAD),
    "many.zip": (lambda: make_zip({f"{k}.txt": b"" for k in range(3001)}), "limit of 3000 members"),
    "overlaps.zip": (overlapping, "total above"),
    "says less.zip": (lambda: lying_zip(3000), BAD),
    "says more.zip": (lambda: lying_zip(2**31), RATIO),
    "locked.7z": (lambda: make_7z({"a.mid": A}, password="x"), "locked"),
    "all locked.7z": (
        lambda: make_7z({"a.mid": A}, password="x", header_encryption=True),
        "locked",
    ),
    "locked.zip": (
        lambda: make_zip({"a.mid": A}).replace(
            b"PK\x01\x02\x14\x03\x14\0\0", b"PK\x01\x02\x14\x03\x14\0\1"
        ),
        "locked",
    ),
    "cut.zip": (lambda: make_zip({f"{k}.mid": BIG for k in range(3)})[:-90], BAD),
    "cut.7z": (lambda: make_7z({"a.mid": A, "b.mid": B})[:-40], BAD),
    "cut.tar.gz": (lambda: make_tar(("a.mid", BIG), mode="w:gz")[:-5000], BAD),
    "cut in a member.tar": (lambda: make_tar(("a.mid", A), ("b.mid", BIG))[:50_000], BAD),
    "cut between members.tar": (
        lambda: make_tar(("a.mid", A), ("b.mid", BIG))[: 512 + -(-len(A) // 512) * 512],
        BAD,
    ),
    "rotten.tar": (lambda: make_tar(("a.mid", A)).replace(b"ustar", b"uSTAR") + bytes(1024), BAD),
    "rotten.7z": (
        lambda: bytes(b ^ (40 < k < 60) for k, b in enumerate(make_7z({"a.mid": A}))),
        BAD,
    ),
    "page.zip": (lambda: b"<html>moved</html>" * 99, BAD),
    "inner.zip": (lambda: make_zip({"in.zip": make_zip({"../evil.mid": A})}), "in.zip/../evil.mid"),
    "inner bomb.7z": (
        lambda: make_7z({"in.tgz": make_tar(("a.mid", bytes(15_000_000)), mode="w:gz")}),
        RATIO,
    ),
    "inner bombs.zip": (
        lambda: make_zip(
            {f"{k}.zip": make_zip({"a.mid": (b"%9d" % k) * 60_000}) for k in range(40)}
        ),
        "total above",
    ),
}


def tree(folder: Path) -> dict:
    "Time and size of everything below a folder."
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive(tmp_path, monkeypatch, name):
    "Rejected with the name of the member, and nothing outside its folder has changed."
    make, problem = HOSTILE[name]
    monkeypatch.setattr(archives, "MAX_MEMBERS", 3000)
    archive, external = tmp_path / "in" / name, tmp_path / "root/data/external"
    archive.parent.mkdir(), external.mkdir(parents=True)
    archive.write_bytes(make())
    monkeypatch.chdir(archive.parent)
    before, evil = tree(tmp_path), set(Path("/tmp").glob("evil*"))
    sentence = rejection_of(unpack, archive, external / "mine")
    after = tree(tmp_path)
    assert problem in sentence and name in sentence
    if problem != BAD and name != "all locked.7z":
        assert "its member '" in sentence
    del before[external], after[external]  # the part has come and gone in it
    assert after == before
    assert set(Path("/tmp").glob("evil*")) == evil


def odd_names() -> dict[str, bytes]:
    "Harmless archives with names that are hard to write down."
    sjis = "音楽.mid".encode("shift-jis")
    return {
        "sjis.zip": make_zip({"x" * len(sjis) + ".mid": A}).replace(b"x" * len(sjis), sjis),
        "line.zip": make_zip({"a\nb.mid": A}),
        "line.tar": make_tar(("a\nb.mid", A)),
        "bytes.tar": make_tar(("\udcff\udcfe.mid", A), encoding="utf-8", errors="surrogateescape"),
        "dots.zip": make_zip({".../a.mid": A}),
        "con.zip": make_zip({"CON.mid": A}),
        "space.zip": make_zip({" .mid": A}),
        "long.tar": make_tar(("d/" * 200 + "x" * 300 + ".mid", A), format=tarfile.GNU_FORMAT),
        "stream.zip": make_zip({"a.mid:hidden.mid": A}),
        "bom.7z": make_7z({"\u202egnos.mid": A}),
    }


@pytest.mark.parametrize("name", list(odd_names()))
def test_an_archive_with_an_odd_name(root, tmp_path, name):
    (tmp_path / name).write_bytes(odd_names()[name])
    ingest(root, midi=tmp_path / name)
    (row,) = rows(root)
    assert re.fullmatch(r"mine/[\w.-]+\.mid", row["path"]) and row["origin"].isprintable()
    assert (root.raw / row["path"]).read_bytes() == A


def test_names_that_clash(root, tmp_path):
    "Equal but for case, and twice in one archive: every piece is kept."
    members = ("a.mid", A), ("A.MID", B), ("a.mid", C), ("b/a.mid", A), ("b-a.mid", tune(30))
    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "x.zip", "w") as z:
        for name, data in members:
            z.writestr(name, data)
    (row,) = ingest(root, midi=tmp_path / "x.zip")
    names = [r["path"].casefold() for r in rows(root)]
    assert row["files"] == 4 == len(set(names)) and row["twice"] == 1


FORMATS = {
    "x.zip": make_zip,
    "x.tar": lambda m: make_tar(*m.items()),
    "x.tgz": lambda m: make_tar(*m.items(), mode="w:gz"),
    "x.tar.bz2": lambda m: make_tar(*m.items(), mode="w:bz2"),
    "X.TAR.XZ": lambda m: make_tar(*m.items(), mode="w:xz"),
    "x.7z": make_7z,
    "really a tar.zip": lambda m: make_tar(*m.items()),
}


@pytest.mark.parametrize("name", FORMATS)
def test_archives_of_every_format(root, tmp_path, name):
    "With an archive inside, one inside that, and files that are no music."
    deep = make_zip({"deep.mid": C})
    inner = make_zip(
        {"b.mid": B, "deep.zip": deep, "notes.txt": b"x"}, compression=zipfile.ZIP_STORED
    )
    members = {
        "a.mid": A,
        "in.zip": inner,
        "bad.zip": inner[:100],
        "me.jpg": b"x",
        "__MACOSX/._a.mid": b"junk",
    }
    (tmp_path / name).write_bytes(FORMATS[name](members))
    (row,) = ingest(root, midi=tmp_path / name)
    assert (row["files"], row["others"], row["left_out"]) == (2, 3, 2)
    left = json.loads((root.raw / "mine/.source.json").read_text())
    assert any(s.startswith("in.zip/deep.zip: a third archive inside") for s in left["left_out"])
    assert any(s.startswith("bad.zip: it cannot be unpacked") for s in left["left_out"])
    assert left["others"] == ["__MACOSX/._a.mid", "in.zip/notes.txt", "me.jpg"]
    assert [r["origin"] for r in rows(root)] == ["local:a.mid", "local:in.zip/b.mid"]


def test_a_zip_of_64_bits(root, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z, z.open("a.mid", "w", force_zip64=True) as f:
        f.write(A)
    assert ingest(root, midi=tmp_path / "x.zip")[0]["files"] == 1


def test_7z_without_its_library(root, tmp_path, monkeypatch):
    (tmp_path / "x.7z").write_bytes(make_7z({"a.mid": A}))
    monkeypatch.setitem(sys.modules, "py7zr", None)  # Python's mark of what cannot be imported
    with pytest.raises(Rejection, match="pip install py7zr"):
        unpack(tmp_path / "x.7z", tmp_path / "out")


UNPACK = """
import sys
from pathlib import Path
from musicgen.core import Rejection
from musicgen.corpus.unpacking import unpack
try:
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
except Rejection as e:
    print(e.sentence)
"""


@posix
def test_a_full_disk_while_it_unpacks(tmp_path):
    (tmp_path / "x.zip").write_bytes(make_zip({"a.mid": BIG, "b.mid": A}))
    command = [sys.executable, "-c", SMALL_DISK + UNPACK, tmp_path / "x.zip", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "its member 'a.mid' cannot be written" in done.stdout, done
    assert os.listdir(tmp_path) == ["x.zip"]


# ---- folders and repeated runs -------------------------------------------------------------------


def fill(folder: Path, **files: bytes) -> Path:
    "The folder, with MIDI files of these names."
    for name, data in files.items():
        write_atomic(folder / f"{name}.mid", data)
    return folder


def inodes(root: Layout) -> dict:
    "What tells the files of `data/raw` from copies of them."
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in root.raw.rglob("*/*")}


def test_a_single_file(root, tmp_path):
    fill(tmp_path, one=A)
    assert ingest(root, midi=tmp_path / "one.mid")[0]["files"] == 1
    with pytest.raises(Rejection, match="takes a folder"):
        ingest(root, midi=write_atomic(tmp_path / "one.wav", b"x"))


@posix
def test_a_folder_with_all_sorts_of_things(root, tmp_path, capsys):
    "What is no music is counted and named, what is no file is passed over, and nothing hangs."
    folder = fill(tmp_path / "songs", one=A, two=B)
    os.mkfifo(folder / "pipe.mid")
    (folder / "loop").symlink_to(folder)
    (folder / "dead.mid").symlink_to("nowhere")
    for name in ("empty", "dir.mid"):
        (folder / name).mkdir()
    for name, data in (
        (".hidden.mid", A),
        ("._one.mid", b"x"),
        ("read me.txt", b"x"),
        ("a.ZIP", b"x"),
    ):
        (folder / name).write_bytes(data)
    with open(os.fsencode(folder) + b"/\xff\n.mid", "wb") as f:
        f.write(C)
    (row,) = ingest(root, midi=folder)
    assert (row["files"], row["others"]) == (3, 2)
    output = capsys.readouterr().out
    assert "2 other files (1 .zip, 1 .txt: a.ZIP, read me.txt) left alone" in output
    assert "local:??.mid" in {r["origin"] for r in rows(root)}


def test_a_folder_without_music(root, tmp_path):
    write_atomic(tmp_path / "songs/a.abc", "X:1\nK:C\n")
    sentence = rejection_of(ingest, root, midi=tmp_path / "songs")
    for text in ("1 other file (1 .abc: a.abc)", "takes .mid .midi .kar .rmi", "`globs`"):
        assert text in sentence
    (tmp_path / "songs/a.abc").unlink()
    with pytest.raises(Rejection, match="holds no file"):
        ingest(root, midi=tmp_path / "songs")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\3\4",
        b"<a/>",
        b"<score-partwise><part><measure><note><pitch/><duration>1",
        b"\xff\xfe",
        make_zip({"META-INF/container.xml": b"<a/>"}),
    ],
)
def test_scores_that_are_none(root, tmp_path, data):
    "A broken score costs that score."
    fill(tmp_path / "songs", good=A)
    (tmp_path / "songs/bad.mxl").write_bytes(data)
    write_sources(root, dict(kind="local", path=str(tmp_path / "songs"), globs=["*.mid", "*.mxl"]))
    (row,) = ingest(root)
    assert (row["files"], row["left_out"]) == (1, 1)


def musicxml(
    note: str, time: str = "<time><beats>3</beats><beat-type>4</beat-type></time>"
) -> bytes:
    "A score of one measure."
    attributes = f"<attributes><divisions>2</divisions>{time}</attributes>"
    part = f"<part id='P1'><measure>{attributes}{note}</measure></part>"
    parts = "<part-list><score-part id='P1'/></part-list>"
    return f"<score-partwise>{parts}{part}</score-partwise>".encode()


NOTE = "<note><pitch><step>{}</step><octave>{}</octave></pitch><duration>{}</duration></note>"


@pytest.mark.parametrize(
    "data",
    [
        musicxml(NOTE.format("H", 4, 2)),
        musicxml(NOTE.format("C", "", 2)),
        musicxml(NOTE.format("C", 99, 2)),
        musicxml(NOTE.format("C", 4, "long")),
        musicxml(NOTE.format("C", 4, "nan")),
        musicxml(NOTE.format("C", 4, "1e300")),
        musicxml(NOTE.format("C", 4, 2), "<time><beats>3</beats><beat-type>0</beat-type></time>"),
        musicxml("<note><pitch/><duration>2</duration></note>"),
        musicxml(NOTE.format("C", 4, 2)).replace(b">2</div", b">0</div"),
    ],
)
def test_scores_that_make_no_sense(root, tmp_path, data):
    (tmp_path / "songs").mkdir()
    (tmp_path / "songs/bad.xml").write_bytes(data)
    write_sources(root, dict(kind="local", path=str(tmp_path / "songs"), globs=["*.xml"]))
    with pytest.raises(Rejection, match="gave no piece: bad.xml: "):
        ingest(root)


def test_a_second_run_copies_nothing(root, tmp_path):
    "A new source adds a folder, a changed file is noticed, and a source without an entry goes."
    fill(tmp_path / "one", a=A), (tmp_path / "two.zip").write_bytes(make_zip({"b.mid": B}))
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
    assert [r["made"] for r in ingest(root)] == [0, 0]
    assert inodes(root) == both and tree(root.external) == unpacked
    watched = json.loads((root.raw / "watched.json").read_text())  # by the pipeline runner
    assert watched == {s["path"]: folder_digest(s["path"]) for s in (one, two)}
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
    with pytest.raises(Rejection, match="does not exist"):
        ingest(root)
    assert tree(root.raw) == before


def test_several_runs_at_once(root, tmp_path):
    "They wait for one another; the first makes everything, and the others nothing."
    (tmp_path / "x.zip").write_bytes(make_zip({f"{k}.mid": tune(k) for k in range(100)}))
    write_sources(root, dict(kind="local", path=str(tmp_path / "x.zip")))
    table = []
    threads = [threading.Thread(target=lambda: table.extend(ingest(root))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(row["made"] for row in table) == [0, 0, 0, 100] and len(rows(root)) == 100


INGEST_FOREVER = """
import itertools, os, sys
from musicgen.core import Layout
from musicgen.ingest import ingest
root, *places = sys.argv[1:]
for k in itertools.count():
    print(k, flush=True)
    for place in places:
        os.utime(place, (k, k))
    ingest(Layout(root))
"""


@posix
def test_killed_at_any_moment(root, tmp_path):
    "Five kills at different moments of an endless run: each time the next run repairs everything."
    (tmp_path / "x.zip").write_bytes(make_zip({f"{k}.mid": tune(k) for k in range(60)}))
    fill(tmp_path / "y", a=A)
    write_sources(
        root, *(dict(name=p[0], kind="local", path=str(tmp_path / p)) for p in ("x.zip", "y"))
    )
    places = root.root, tmp_path / "x.zip", tmp_path / "y/a.mid"
    command = [sys.executable, "-c", INGEST_FOREVER, *map(str, places)]
    for k in range(5):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.02 * k)
        process.kill(), process.wait(), process.stdout.close()
        assert process.returncode == -signal.SIGKILL
        ingest(root)
        assert len(rows(root)) == 61 and all((root.raw / r["path"]).exists() for r in rows(root))
        assert not list(root.raw.glob(".*"))
        assert not [p for p in root.external.glob(".*") if p.suffix in (".part", ".gone")]


def test_processes_give_the_same_bytes(tmp_path):
    "A folder of scores and tunes, read by one process and by two."
    (tmp_path / "songs").mkdir()
    jig = "X:{}\nM:6/8\nL:1/8\nK:{}\nGAB dBG|cBA GED|GAB dBG|ABG FED|\n\n"
    (tmp_path / "songs/jigs.abc").write_text(
        "".join(jig.format(k, key) for k, key in enumerate("GDACF"))
    )
    for k in range(35):
        (tmp_path / f"songs/{k}.xml").write_bytes(
            musicxml(NOTE.format("CDEFGAB"[k % 7], k % 9, 2 + k % 4))
        )
    source = dict(kind="local", path=str(tmp_path / "songs"), globs=["*.xml", "*.abc"])
    manifests = []
    for workers in (1, 2):
        root = Layout(tmp_path / str(workers))
        write_sources(root, source)
        assert ingest(root, workers=workers)[0]["files"] >= 30
        manifests.append(root.manifest.read_bytes())
    assert manifests[0] == manifests[1]


# ---- data/sources.yaml ---------------------------------------------------------------------------


def test_the_sources_of_this_project():
    "No download is enabled, and each is pinned by a checksum or a commit; all have a licence."
    sources = read_sources(HERE / "data/sources.yaml")
    for s in sources:
        assert s.licence and s.citation or s.kind == "kaggle", s.name
        assert not (s.enabled and s.kind in ("url", "kaggle")), s.name
        if s.kind == "url":
            assert s.sha256 or s.md5 or re.search(r"/[0-9a-f]{40}\b", s.url), s.name
        assert re.fullmatch(r"([0-9a-f]{64})?", s.sha256)
        assert re.fullmatch(r"([0-9a-f]{32})?", s.md5)
    text = (HERE / "data/sources.yaml").read_text("utf-8")
    assert "enabled: true" in text.split("- name")[0], "its head says how to enable a source"


def test_the_sources_agree_with_the_shared_notes():
    "Each public set that both name, with its checksum and size."
    shared = os.environ.get("MUSICGEN_SHARED")
    if not shared:
        pytest.skip("MUSICGEN_SHARED names no folder")
    sources = {s.url: s for s in read_sources(HERE / "data/sources.yaml") if s.url}
    text = (Path(shared) / "data/README.md").read_text("utf-8")
    table = re.findall(r"^\| ([^|]+) \| (http[^ |]+) \| ([^|]*) \| ([^|]*) \|", text, re.MULTILINE)
    facts = [(name, sources[url], *rest) for name, url, *rest in table if url in sources]
    assert len(facts) == 10
    for name, source, check, size in facts:
        digest = (re.findall(r"[0-9a-f]{32,64}", check) or [""])[0]
        assert digest in (source.sha256, source.md5, ""), name
        assert not size.strip().isdigit() or source.bytes == int(size), name
