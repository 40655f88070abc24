"""The processes of one run watch each other: when one is gone the others end, each with a sentence.

A collective waits for every process, and for one that died as long as the platform's own timeouts, which are minutes,
or for ever. A connection of the operating system's own is closed at once with the process that held it.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rehyat_jax.errors import RehyatError

#: What a process says that ends as it should.
_GOODBYE = b"."
_TOKEN = 16
#: Seconds in which all have to be connected, and in which a failure of a collective is told from a peer's end.
_BEGIN, _AFTER = 120.0, 5.0
#: Exit code of a process that another one left.
_LEFT = 1


@contextmanager
def watched(coordinator: str | None) -> Iterator[None]:
    """The run of one of several processes, which have joined already; alone, nothing happens.

    Args:
        coordinator: address and port of the first process; its host is where the first one listens.

    Raises:
        RehyatError: the others cannot be reached.
    """
    import jax

    if jax.process_count() == 1:
        yield
        return
    links = _first_links() if jax.process_index() == 0 else [_link_to_first(coordinator)]
    for number, link in links:
        threading.Thread(target=_watch, args=(number, link), name=f"rehyat-peer-{number}", daemon=True).start()
    try:
        yield
    except RehyatError:
        raise
    except Exception:
        time.sleep(_AFTER)  # a collective may fail before the watcher, which knows why, has woken
        raise
    for _, link in links:
        with suppress(OSError):
            link.sendall(_GOODBYE)


def _first_links() -> list[tuple[int, socket.socket]]:
    import jax

    server = socket.create_server(("", 0))
    token = secrets.token_bytes(_TOKEN)
    host = socket.gethostname().encode()[:64].ljust(64, b"\0")
    _agreed(host + token + server.getsockname()[1].to_bytes(4, "big"))
    links: dict[int, socket.socket] = {}
    end = time.monotonic() + _BEGIN
    with server:
        while len(links) < jax.process_count() - 1:
            server.settimeout(max(end - time.monotonic(), 0.01))
            try:
                link, _ = server.accept()
                link.settimeout(_BEGIN)
                said = _exactly(link, _TOKEN + 4)
            except OSError as error:
                if time.monotonic() < end:
                    continue
                raise RehyatError("the processes of this run cannot reach each other") from error
            number = int.from_bytes(said[_TOKEN:], "big")
            if secrets.compare_digest(said[:_TOKEN], token) and 0 < number < jax.process_count():
                links[number] = link
            else:
                link.close()
    return list(links.items())


def _link_to_first(coordinator: str | None) -> tuple[int, socket.socket]:
    import jax

    told = _agreed(bytes(64 + _TOKEN + 4))
    host = told[:64].rstrip(b"\0").decode() if coordinator is None else coordinator.rpartition(":")[0].strip("[]")
    token, port = told[64 : 64 + _TOKEN], int.from_bytes(told[64 + _TOKEN :], "big")
    try:
        link = socket.create_connection((host, port), timeout=_BEGIN)
        link.sendall(token + jax.process_index().to_bytes(4, "big"))
    except OSError as error:
        raise RehyatError(f"the first process of this run cannot be reached at {host}:{port}: {error}") from error
    return 0, link


def _agreed(said: bytes) -> bytes:
    """What the first process says."""
    import numpy as np
    from jax.experimental import multihost_utils

    heard = multihost_utils.broadcast_one_to_all(np.frombuffer(said, np.uint8))
    return np.asarray(heard, np.uint8).tobytes()


def _exactly(link: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        if not (more := link.recv(count - len(found))):
            raise OSError("closed")
        found += more
    return found


def _watch(number: int, link: socket.socket) -> None:
    with suppress(OSError):
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        link.settimeout(None)
        if link.recv(1) == _GOODBYE:
            return
    # JAX would wait for the one that is gone, at its own end as well.
    line = f"rehyat: process {number} of this run has ended before its time, and so this one ends\n"
    sys.stdout.flush()
    with suppress(OSError):
        os.write(2, line.encode())
    os._exit(_LEFT)
