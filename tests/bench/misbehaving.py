"""A server for tests of the harness: it misbehaves in one known way for each path.

Raw sockets and threads, nothing of the project. It says ``Running on http://127.0.0.1:PORT``; on SIGTERM it says
the text of ``--say``, waits ``--delay`` seconds and until its streams have their ends, and leaves with ``--exit-code``.
A child of its group lives on for ``--linger`` seconds, a ``--stray`` child has left the group. ``/chat`` stands for the
path given by ``--chat``. With ``--tell`` it says when it leaves.
"""

import argparse
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
TERMINAL = b'id: 9\ndata: {"type":"turn.interrupted","seq":9,"reason":"shutdown","text_length":4}\n\n'
LAST_CHUNK = b"0\r\n\r\n"
stopping = threading.Event()
ending: list[threading.Thread] = []
"""The threads of the streams that end once the server stops."""


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def token(number: int) -> bytes:
    return b'data: {"type":"turn.delta","seq":%d,"text":"<%d@%d> "}\n\n' % (number, number, time.monotonic_ns())


def read_path(sock: socket.socket) -> str:
    request = b""
    while b"\r\n\r\n" not in request:
        data = sock.recv(65536)
        if not data:
            raise ConnectionError
        request += data
    head, _, body = request.partition(b"\r\n\r\n")
    length = next(
        (int(line.split(b":")[1]) for line in head.split(b"\r\n") if b"ontent-" in line and b"gth" in line), 0
    )
    while len(body) < length:
        body += sock.recv(65536)
    return head.split()[1].decode()


def serve(sock: socket.socket) -> None:
    with sock:
        try:
            while serve_one(sock, read_path(sock)):
                pass
        except OSError:
            return


def serve_one(sock: socket.socket, path: str) -> bool:
    """Misbehave as the path says. Returns whether the connection goes on."""
    match path.strip("/").replace("chat", options.chat).split("/"):
        case ["json"]:
            sock.sendall(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{"id":"x"}')
            return True
        case ["last-json"]:
            head = (
                b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n"
            )
            sock.sendall(head + b'{"id":"x"}')
        case ["refuse"]:
            sock.sendall(
                b"HTTP/1.1 503 Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"
            )
        case ["half-refuse"]:
            sock.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 200\r\n\r\n{}")
        case ["reset-at-once"]:
            reset(sock)
        case ["close-at-once"]:
            pass
        case ["silent"]:
            time.sleep(0.3)
            sock.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}")
        case ["flood"]:
            sock.sendall(HEAD)
            for _ in range(50):
                sock.sendall(chunk(b"." * 4096))
            sys.stderr.write("all 200 KiB were taken\n")
            stopping.wait()
        case [end]:
            if end != "open":
                ending.append(threading.current_thread())
            sock.sendall(HEAD + chunk(token(1)) + chunk(token(2)))
            stopping.wait()
            finish(sock, end)
    return False


def finish(sock: socket.socket, end: str) -> None:
    """End an event stream in the way that has this name."""
    if end == "reset":
        reset(sock)
    for piece in ENDINGS[end]():
        sock.sendall(piece)
    if end == "open":
        time.sleep(60)
    time.sleep(0.1)


ENDINGS: dict[str, Callable[[], Iterable[bytes]]] = {
    "terminal": lambda: [chunk(TERMINAL) + LAST_CHUNK],
    "terminal-in-pieces": lambda: (bytes([byte]) for byte in chunk(token(3)) + chunk(TERMINAL) + LAST_CHUNK),
    "two-terminals": lambda: [chunk(TERMINAL + TERMINAL) + LAST_CHUNK],
    "clean": lambda: [LAST_CHUNK],
    "truncated": list,
    "terminal-without-last-chunk": lambda: [chunk(TERMINAL)],
    "cut-in-chunk": lambda: [b"fff\r\ndata: {"],
    "reset": list,
    "lost-token": lambda: [chunk(token(4)) + chunk(TERMINAL) + LAST_CHUNK],
    "doubled-token": lambda: [chunk(token(2)) + chunk(TERMINAL) + LAST_CHUNK],
    "garbage": lambda: [b"zzz\r\n"],
    "open": list,
}


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


parser = argparse.ArgumentParser()
parser.add_argument("--delay", type=float, default=0)
parser.add_argument("--linger", type=float, default=0)
parser.add_argument("--exit-code", type=int, default=0)
parser.add_argument("--stray", action="store_true")
parser.add_argument("--chat", default="terminal")
parser.add_argument("--say", default="")
parser.add_argument("--tell", action="store_true")
options = parser.parse_args()


def main() -> None:
    # A handler would run between two steps of the main thread, which may hold the lock of ``stopping`` just then.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    sleep = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(float(sys.argv[1]))"
    if options.stray:
        subprocess.Popen([sys.executable, "-c", sleep, "60"], start_new_session=True)
    sys.stdout.write(f"Running on http://127.0.0.1:{listener.getsockname()[1]}\n")
    sys.stdout.flush()

    def accept() -> None:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=serve, args=(sock,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    signal.sigwait({signal.SIGTERM})
    stopping.set()
    sys.stderr.write(options.say)
    if options.linger:
        subprocess.Popen([sys.executable, "-c", sleep, str(options.linger)])
    time.sleep(options.delay)
    for thread in ending:
        thread.join()
    if options.tell:
        sys.stderr.write(f"leaves at {time.monotonic()}\n")
    os._exit(options.exit_code)


if __name__ == "__main__":
    main()
