"""A place of this machine to listen at, taken before a model is loaded, so that a port in use is said at once.

A server of uvicorn's runs there in a thread for as long as a block lasts.
"""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nestling.errors import OptionError


def listening(host: str, port: int) -> tuple[socket.socket, str]:
    """A socket that is bound, and the address that browsers and clients find it under, such as ``http://host:8000``.

    Args:
        port: 0 for one that is free.

    Raises:
        OptionError: the host cannot be found, or the port is in use or not allowed.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        place = socket.socket(family)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
    except (OSError, UnicodeError) as error:
        raise OptionError(
            f"host={host!r}, port={port}: cannot listen there ({error}); "
            "choose another port, or 0 for one that is free"
        ) from error
    shown = f"[{host}]" if ":" in host else host
    return place, f"http://{shown}:{place.getsockname()[1]}"


@contextmanager
def in_a_thread(server: Any, place: socket.socket, name: str) -> Iterator[None]:
    """A uvicorn server in a thread, which has started when the block begins and has ended when it is left.

    Args:
        place: a socket that is bound; the caller closes it.
        name: of the thread.
    """
    thread = threading.Thread(target=server.run, args=([place],), name=name, daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        thread.join()
