"""Runs one of the shipped NGINX files on this machine, before servers that listen here, to try it without containers.

    python deploy/nginx/local.py least-conn.conf --port 8080 http://127.0.0.1:30000 http://127.0.0.1:30001

One to three servers take the places of its three replicas. Ctrl-C ends it. Needs nginx (Debian's package nginx-light).
"""

from __future__ import annotations

import argparse
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

_HERE = Path(__file__).resolve().parent
_REPLICAS = (1, 2, 3)
_START_S = 10.0
# What a whole configuration has around a server of it, without a place that only root may write to.
_AROUND = """
pid {folder}/nginx.pid; error_log {folder}/error.log; daemon off; worker_processes 1;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  {shipped}
}}
"""


def config_of(name: str, urls: Sequence[str], *, port: int, folder: Path) -> str:
    """The shipped file `name` for the servers `urls`, listening on `port` of the loopback device; what NGINX writes goes to `folder`.

    Raises ValueError for more servers than the file has replicas, for none, and for URLs that are no server's.
    """
    addresses = [_address(url) for url in urls]
    if not 1 <= len(urls) <= len(_REPLICAS):
        raise ValueError(f"give one to {len(_REPLICAS)} servers, not {len(urls)}")
    shipped = (_HERE / name).read_text().replace("listen 80;", f"listen 127.0.0.1:{port};")
    for number in _REPLICAS:
        line = re.compile(rf"^( *server )octavo-{number}:30000(.*\n)", re.MULTILINE)
        address = addresses[number - 1] if number <= len(urls) else None
        shipped = line.sub("" if address is None else rf"\g<1>{address}\g<2>", shipped)
    return _AROUND.format(folder=folder, shipped=shipped)


def _address(url: str) -> str:
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        if parts.scheme == "http" and parts.hostname and parts.port and not parts.path.strip("/"):
            return parts.netloc
    except ValueError:  # a port that is none
        pass
    raise ValueError(f"{url!r} is no server's: give http://HOST:PORT, without a path")


@contextmanager
def running(name: str, urls: Sequence[str], folder: Path, *, port: int = 0) -> Iterator[str]:
    """NGINX with the shipped file `name`; gives its URL. Raises RuntimeError with its own words where it does not start."""
    if port == 0:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
    elif _listens(port):
        raise RuntimeError(f"port {port} is in use: stop what listens there, or choose another with --port")
    file = folder / "nginx.conf"
    file.write_text(config_of(name, urls, port=port, folder=folder))
    with subprocess.Popen(["nginx", "-c", str(file), "-p", str(folder)], stderr=subprocess.PIPE, text=True) as nginx:
        deadline = time.monotonic() + _START_S
        try:
            while not _listens(port):
                if nginx.poll() is not None or time.monotonic() > deadline:
                    nginx.terminate()
                    assert nginx.stderr is not None
                    raise RuntimeError(f"nginx does not start: {nginx.stderr.read().strip()}")
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            nginx.terminate()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", choices=sorted(path.name for path in _HERE.glob("*.conf")))
    parser.add_argument("urls", nargs="+", metavar="URL", help="of a running server")
    parser.add_argument("--port", type=int, default=8080, help="0 for any that is free (default: %(default)s)")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if not 0 <= given.port < 1 << 16:
            raise ValueError(f"--port {given.port} is not possible: give one from 0, any that is free, to 65535")
        with tempfile.TemporaryDirectory() as folder, running(given.file, given.urls, Path(folder), port=given.port) as url:
            print(f"{given.file} at {url}, before {', '.join(given.urls)}", flush=True)
            while _listens(int(url.rpartition(":")[2])):
                time.sleep(1)
            print("local.py: nginx has ended", file=sys.stderr)
    except KeyboardInterrupt:
        return 0
    except FileNotFoundError:
        print("local.py: nginx is not installed: apt install nginx-light", file=sys.stderr)
    except (ValueError, RuntimeError) as error:
        print(f"local.py: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
