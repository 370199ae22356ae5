"""Fetching a file, from a server on localhost. Run: python -m pytest tests/test_download.py"""

import errno
import hashlib
import http.client
import http.server
import os
import re
import socket
import ssl
import threading
import urllib.request

import pytest

import checkpoint
import download
from config import InputError
from download import File, fetch

DATA = bytes(range(256)) * 5000


class Handler(http.server.BaseHTTPRequestHandler):
    """`server.mode` says what goes wrong; `server.ranges` collects what was asked for."""

    def do_GET(self):
        mode, asked = self.server.mode, self.headers.get("Range")
        self.server.ranges.append(asked)
        data = b"<html>our mirror has moved</html>" if mode == "page" else DATA
        start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked and mode != "no ranges" else 0
        if mode == "gone":
            return self.send_error(404)
        if start >= len(data):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : start + 300_000] if mode == "cut" else data[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.mode, server.ranges = "whole", []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def file(server) -> File:
    address = f"http://127.0.0.1:{server.server_port}/files/1"
    return File("faces.tgz", address, hashlib.sha256(DATA).hexdigest())


def refused(file: File, folder) -> str:
    with pytest.raises(InputError) as error:
        fetch(file, folder)
    assert "\n" not in str(error.value) and file.url in str(error.value)
    return str(error.value)


def files(folder) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name != download._LOCK]


def test_row15_a_file_is_fetched_once(server, file, tmp_path):
    assert fetch(file, tmp_path / "new") == tmp_path / "new/faces.tgz"
    assert (tmp_path / "new/faces.tgz").read_bytes() == DATA
    fetch(file, tmp_path / "new")
    assert server.ranges == [None]
    assert files(tmp_path / "new") == ["faces.tgz"]


@pytest.mark.parametrize("then", ["whole", "no ranges"])
def test_row15_a_cut_download_is_resumed(server, file, tmp_path, then):
    server.mode = "cut"
    said = refused(file, tmp_path)
    assert "cut off, 980,000 bytes are missing" in said and "300,000 bytes are kept" in said
    assert "600,000 bytes are kept" in refused(file, tmp_path)
    server.mode = then  # a server that ignores the range sends all of it again
    assert fetch(file, tmp_path).read_bytes() == DATA
    assert server.ranges == [None, "bytes=300000-", "bytes=600000-"]


def test_row15_a_part_that_is_whole_already_is_used(server, file, tmp_path):
    (tmp_path / "faces.tgz.part").write_bytes(DATA)
    assert fetch(file, tmp_path).read_bytes() == DATA


@pytest.mark.parametrize("part", [b"", b"x" * 1000, b"x" * 2_000_000])
def test_row15_another_content_is_deleted(server, file, tmp_path, part):
    if part:
        (tmp_path / "faces.tgz.part").write_bytes(part)
    else:
        server.mode = "page"
    said = refused(file, tmp_path)
    assert f"not {file.sha256}" in said and re.search(r"sha256 [0-9a-f]{64}", said)
    assert f"put the published one there yourself as {tmp_path / 'faces.tgz'}" in said
    assert not files(tmp_path)


def test_row15_no_mirror_no_network(server, file, tmp_path):
    server.mode = "gone"
    assert f"HTTP 404); or put the file there yourself as {tmp_path}" in refused(file, tmp_path)
    nobody = file._replace(url="http://127.0.0.1:1/files/1")
    said = refused(nobody, tmp_path)
    assert "refused" in said and file.sha256 in said and str(tmp_path / "faces.tgz") in said
    unknown = file._replace(url="http://no-such-host.invalid/1")
    assert f"put the file there yourself as {tmp_path}" in refused(unknown, tmp_path)
    assert not files(tmp_path)


def test_row15_another_file_of_that_name_is_left_alone(server, file, tmp_path):
    (tmp_path / "faces.tgz").write_bytes(b"my own")
    assert "is not the published file" in refused(file, tmp_path)
    assert (tmp_path / "faces.tgz").read_bytes() == b"my own" and not server.ranges


def test_row15_a_silent_server_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert "timed out" in refused(File("a.tgz", f"http://127.0.0.1:{port}/", "0"), tmp_path)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EHOSTUNREACH, "No route to host"), ssl.SSLError("bad record mac"),
     TimeoutError("timed out")],
)  # fmt: skip
def test_row15_what_the_network_raises_while_it_sends_is_told(
    server, file, tmp_path, monkeypatch, error
):
    real, calls = http.client.HTTPResponse.read, []

    def read(self, size=None):
        calls.append(size)
        if len(calls) == 2:
            raise error
        return real(self, 200_000)

    monkeypatch.setattr(http.client.HTTPResponse, "read", read)
    said = refused(file, tmp_path)
    assert str(error) in said and "200,000 bytes are kept, run again to go on" in said
    monkeypatch.undo()
    assert fetch(file, tmp_path).read_bytes() == DATA
    assert server.ranges == [None, "bytes=200000-"]


def test_a_server_that_breaks_off_before_its_answer_is_told(file, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise OSError(errno.EHOSTUNREACH, "No route to host")  # of getresponse(): not wrapped

    monkeypatch.setattr(urllib.request, "urlopen", broken)
    assert "No route to host" in refused(file, tmp_path)


def test_a_full_disk_names_the_file(file, tmp_path):
    (tmp_path / "faces.tgz.part").symlink_to("/dev/full")
    with pytest.raises(OSError) as error:
        fetch(file, tmp_path)
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(tmp_path / "faces.tgz.part")


def test_two_downloads_at_once_do_not_share_a_part(server, file, tmp_path):
    with (
        checkpoint.lock(tmp_path, download._LOCK),
        pytest.raises(InputError, match=f"in use by process {os.getpid()}"),
    ):
        fetch(file, tmp_path)
    assert not server.ranges and not files(tmp_path)
    fetch(file, tmp_path)
    with checkpoint.lock(tmp_path, download._LOCK):
        assert fetch(file, tmp_path).read_bytes() == DATA  # what is there is used all the same


def test_the_hashes_are_scikit_learns():
    lfw = pytest.importorskip("sklearn.datasets._lfw")
    known = {lfw.FUNNELED_ARCHIVE, *lfw.TARGETS}
    ours = {download.LFW, *download.LFW_PAIRS}
    assert {tuple(file) for file in ours} <= {tuple(file) for file in known}
