"""Downloads from a server on this machine, archives made up here, and one process at a time."""

import hashlib
import os
import stat
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from certtrain.data.download import fetch, unpack
from certtrain.errors import InputError
from certtrain.locking import exclusive
from certtrain.run_folder import clear_leftovers, temporary_of

CONTENT = os.urandom(3_000_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server:
    """Serves CONTENT; may cut connections off, or not know ranges."""

    def __init__(self):
        self.ranges, self.cut_after, self.skips, self.content = [], None, True, CONTENT
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                outer.ranges.append(asked)
                if self.path != "/file":
                    return self.send_error(404)
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and outer.skips else 0
                if start >= len(outer.content):
                    return self.send_error(416)
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(outer.content) - 1}/{len(outer.content)}")
                self.send_header("Content-Length", str(len(outer.content) - start))
                self.end_headers()
                self.wfile.write(outer.content[start:][: outer.cut_after])

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/file"


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


class TestFetch:
    def test_a_whole_file(self, server, tmp_path):
        fetch([server.url], tmp_path / "new" / "a.zip", MD5)
        assert (tmp_path / "new" / "a.zip").read_bytes() == CONTENT
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.zip"]
        fetch([server.url], tmp_path / "new" / "a.zip", MD5)
        assert server.ranges == [None]  # there already

    def test_goes_on_where_it_was_cut_off(self, server, tmp_path):
        server.cut_after = 1_000_000
        for round in (1, 2):
            with pytest.raises(InputError, match=rf"lost after {round}000000 of 3000000 bytes.*accepted: .*{MD5}"):
                fetch([server.url], tmp_path / "a", MD5)
            assert not (tmp_path / "a").exists() and (tmp_path / "a.part").stat().st_size == round * 1_000_000
        fetch([server.url], tmp_path / "a", MD5)
        assert (tmp_path / "a").read_bytes() == CONTENT and not (tmp_path / "a.part").exists()
        assert server.ranges == [None, "bytes=1000000-", "bytes=2000000-"]

    def test_starts_again_where_the_server_cannot_skip(self, server, tmp_path):
        server.skips = False
        (tmp_path / "a.part").write_bytes(CONTENT[:500])
        fetch([server.url], tmp_path / "a", MD5)
        assert (tmp_path / "a").read_bytes() == CONTENT and server.ranges == ["bytes=500-"]

    @pytest.mark.parametrize("whole", [True, False])
    def test_a_part_that_is_complete_or_too_long(self, whole, server, tmp_path):
        (tmp_path / "a.part").write_bytes(CONTENT if whole else CONTENT + b"x")
        if whole:
            fetch([server.url], tmp_path / "a", MD5)
        else:
            with pytest.raises(InputError, match="found md5"):
                fetch([server.url], tmp_path / "a", MD5)
            assert not list(tmp_path.iterdir())
            fetch([server.url], tmp_path / "a", MD5)
        assert (tmp_path / "a").read_bytes() == CONTENT

    def test_another_content_is_refused_and_forgotten(self, server, tmp_path):
        server.content = CONTENT[:-1] + b"?"
        with pytest.raises(InputError, match=rf"/a: could not be downloaded \(.*found md5 .*accepted: .*{MD5}"):
            fetch([server.url], tmp_path / "a", MD5)
        assert not list(tmp_path.iterdir())

    def test_a_wrong_file_in_its_place_is_replaced(self, server, tmp_path):
        (tmp_path / "a").write_bytes(b"wrong")
        fetch([server.url], tmp_path / "a", MD5)
        assert (tmp_path / "a").read_bytes() == CONTENT

    def test_the_next_mirror_is_asked(self, server, tmp_path):
        fetch([f"{server.url}-gone", "http://127.0.0.1:1/", "no url", server.url], tmp_path / "a", MD5)
        assert (tmp_path / "a").read_bytes() == CONTENT

    def test_all_mirrors_are_named(self, server, tmp_path):
        with pytest.raises(InputError) as caught:
            fetch([f"{server.url}-gone", "no url"], tmp_path / "a", MD5)
        assert "404" in str(caught.value) and "no url" in str(caught.value) and "\n" not in str(caught.value)

    def test_a_local_url(self, tmp_path):
        (tmp_path / "source").write_bytes(CONTENT)
        (tmp_path / "a.part").write_bytes(b"xyz")  # such URLs cannot skip
        fetch([(tmp_path / "source").as_uri()], tmp_path / "a", MD5)
        assert (tmp_path / "a").read_bytes() == CONTENT


def zipped(path, entries, links=()):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries.items():
            file.writestr(name, content)
        for name in links:
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            file.writestr(entry, "/etc/passwd")
    return path


class TestUnpack:
    def test_the_folder_takes_its_name(self, tmp_path):
        archive = zipped(tmp_path / "a.zip", {"top/": "", "top/x/y.txt": "hello", "top/z": ""})
        unpack(archive, "top", tmp_path / "target")
        assert (tmp_path / "target" / "x" / "y.txt").read_text() == "hello"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "target"]

    @pytest.mark.parametrize(
        "name", ["top/../../evil", "../evil", "/evil", "/top/evil", "evil", "other/x", "top\\..\\evil", "topper/x"]
    )
    def test_paths_that_lead_out_are_refused(self, name, tmp_path):
        archive = zipped(tmp_path / "a.zip", {"top/x": "", name: "evil"})
        with pytest.raises(InputError, match=r"a\.zip: found the entry .*; accepted: files and folders below top/"):
            unpack(archive, "top", tmp_path / "in" / "target")
        assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]

    def test_links_are_refused(self, tmp_path):
        archive = zipped(tmp_path / "a.zip", {"top/x": ""}, links=["top/link"])
        with pytest.raises(InputError, match="'top/link'"):
            unpack(archive, "top", tmp_path / "target")
        assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]

    def test_broken_archives_leave_nothing(self, tmp_path):
        whole = zipped(tmp_path / "a.zip", {f"top/{number}": os.urandom(1000) for number in range(9)}).read_bytes()
        flipped = bytearray(whole)
        flipped[4000] ^= 1
        for content in (b"", b"no zip", whole[: len(whole) // 2], bytes(flipped)):
            (tmp_path / "a.zip").write_bytes(content)
            with pytest.raises(InputError, match=r"a\.zip: cannot be unpacked .*; accepted"):
                unpack(tmp_path / "a.zip", "top", tmp_path / "target")
            assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


class TestAlone:
    def test_the_second_waits(self, tmp_path):
        order = []

        def second():
            with exclusive(tmp_path / ".lock", "it", wait=True) as locked:
                order.append(("second", locked))

        with exclusive(tmp_path / ".lock", "it", wait=True) as locked:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join(0.2)
            order.append(("first", locked))
        thread.join(10)
        assert order == [("first", True), ("second", True)] and not list(tmp_path.iterdir())

    def test_an_error_lets_the_next_one_in(self, tmp_path):
        with pytest.raises(KeyError), exclusive(tmp_path / ".lock", "it", wait=True):
            raise KeyError
        with exclusive(tmp_path / ".lock", "it", wait=True) as locked:
            assert locked

    def test_where_none_can_be_made(self, tmp_path):
        """What is to be written there then says why it cannot be."""
        (tmp_path / "file").write_text("")
        for name in ("none", "file"):
            with exclusive(tmp_path / name / ".lock", "it", wait=True) as locked:
                assert not locked

    def test_leftovers_of_that_file_alone_are_cleared(self, tmp_path):
        target = tmp_path / "a.b"
        kept = [target, tmp_path / ".a.b.tmp", tmp_path / ".aXb.12.tmp", tmp_path / ".a.b.c.12.tmp", tmp_path / "x.tmp"]
        for path in [*kept, tmp_path / ".a.b.999999.tmp", temporary_of(target)]:
            path.write_text("")
        (tmp_path / ".a.b.77.tmp" / "below").mkdir(parents=True)
        clear_leftovers(target)
        assert sorted(tmp_path.iterdir()) == sorted(kept)
