"""nginx with `grpc_pass`: what one would put in the gateway's place if one did not need to route."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import grpc

# One worker, as the gateway is one process, and buffers that hold the largest message. Connections stay: nginx would
# otherwise close one after 1000 calls.
_CONFIG = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{ worker_connections 1024; }}
http {{
  access_log {folder}/access.log;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  client_max_body_size 0;
  client_body_buffer_size 1m;
  keepalive_requests 1000000000;
  upstream service {{
    server {upstream};
    keepalive 128;
    keepalive_requests 1000000000;
  }}
  server {{
    listen 127.0.0.1:{port} http2;
    location / {{
      grpc_pass grpc://service;
      grpc_read_timeout 1h;
    }}
  }}
}}
"""


def program(name: str, setting: str, package: str) -> str:
    """The path of a program that the environment variable `setting` names, or of that name on the PATH.

    Raises RuntimeError that says how to get it.
    """
    found = os.environ.get(setting) or shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if not found:
        raise RuntimeError(f"{name} is missing: apt-get install {package}, or set {setting} to its path")
    return found


@contextmanager
def running(upstream: str, port: int) -> Iterator[None]:
    """nginx on 127.0.0.1:`port` in front of `upstream` (host:port), taking connections. Raises RuntimeError."""
    executable = program("nginx", "INKWELL_BENCH_NGINX", "nginx-light")
    with tempfile.TemporaryDirectory(prefix="nginx-") as folder:
        config = Path(folder) / "nginx.conf"
        config.write_text(_CONFIG.format(folder=folder, upstream=upstream, port=port))
        log = Path(folder) / "error.log"
        process = subprocess.Popen([executable, "-e", str(log), "-p", folder, "-c", str(config)])
        try:
            with closing(grpc.insecure_channel(f"127.0.0.1:{port}")) as channel:
                connected = grpc.channel_ready_future(channel)
                while not connected.done():
                    if process.poll() is not None:
                        raise RuntimeError(f"nginx did not start:\n{log.read_text(errors='replace')}")
                    time.sleep(0.05)
            yield
        finally:
            process.terminate()
            process.wait()
