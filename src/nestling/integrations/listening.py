"""A place of this machine to listen at, taken before a model is loaded, so that a port in use is said at once."""

import socket

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
