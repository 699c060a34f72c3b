"""A place to listen at, and a server that runs there in a thread."""

import socket
import threading

import pytest

from nestling.errors import OptionError
from nestling.integrations.listening import in_a_thread, listening


class Server:
    """One of uvicorn's, as far as a thread goes."""

    started = should_exit = False

    def run(self, sockets):
        self.name, self.sockets = threading.current_thread().name, sockets
        self.started = True
        while not self.should_exit:
            pass


def test_a_server_runs_for_as_long_as_the_block_lasts_and_ends_with_an_error_too():
    place, url = listening("127.0.0.1", 0)
    server = Server()
    with place, pytest.raises(KeyError), in_a_thread(server, place, "nestling-test"):
        assert server.started and server.name == "nestling-test" and server.sockets == [place]
        assert url == f"http://127.0.0.1:{place.getsockname()[1]}"
        raise KeyError
    assert "nestling-test" not in [thread.name for thread in threading.enumerate()]


def test_a_port_that_is_taken_is_said():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(OptionError, match="cannot listen there"):
            listening("127.0.0.1", other.getsockname()[1])
