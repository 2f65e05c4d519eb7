import http.server
import threading

import pytest


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves a folder, as well or badly as its server is told to."""

    protocol_version = 'HTTP/1.1'

    def do_GET(self):
        site = self.server
        name = self.path.rpartition('/')[2]
        asked = self.headers['Range']
        site.asked.append((name, asked))
        file = site.folder / name
        if not file.is_file():
            return self.send_error(404)
        body = file.read_bytes()
        start = int(asked[6:-1]) if asked and site.ranges else 0
        if start >= len(body):
            return self.send_error(416)
        self.close_connection = True
        self.send_response(206 if start else 200)
        if start:
            given = f'bytes {start}-{len(body) - 1}/{len(body)}'
            self.send_header('Content-Range', given)
        cut = site.cuts.pop(0) if site.cuts else None
        sent = body[start:][:cut]
        if site.chunked:
            self.send_header('Transfer-Encoding', 'chunked')
            self.end_headers()
            end = b'0\r\n\r\n' if cut is None else b''
            self.wfile.write(b'%x\r\n%s\r\n' % (len(sent), sent) + end)
        else:
            length = site.claims or len(body) - start
            self.send_header('Content-Length', str(length))
            self.end_headers()
            self.wfile.write(sent)
        self.wfile.flush()
        if cut is not None:
            site.at_cut()

    def log_message(self, *_):
        pass


class Site(http.server.ThreadingHTTPServer):
    """What tests set (how it serves) and read (who asked for what)."""

    daemon_threads = True
    block_on_close = False
    ranges = True
    chunked = False
    claims: int | None = None

    def __init__(self, folder):
        super().__init__(('127.0.0.1', 0), Handler)
        folder.mkdir()
        self.folder = folder
        self.url = f'http://127.0.0.1:{self.server_port}'
        self.asked: list[tuple[str, str | None]] = []
        self.cuts: list[int] = []
        """After how many bytes the next connections break."""
        self.at_cut = lambda: None

    def close(self):
        self.shutdown()
        self.server_close()


@pytest.fixture
def site(tmp_path):
    """A web server on this machine."""
    site = Site(tmp_path / 'site')
    threading.Thread(target=site.serve_forever, args=(0.01,)).start()
    yield site
    site.close()
