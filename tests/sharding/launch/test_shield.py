"""The forwarder before JAX's coordination service: who is behind it never hears the service hang up."""

import socket
import struct

import pytest

from sharding.launch.shield import open_shield


@pytest.fixture
def ends():
    """``(client, service)``: the two ends of a connection through a shield."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = open_shield(*listener.getsockname())
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            service, _ = listener.accept()
            with service:
                service.settimeout(30)
                yield client, service


def test_both_directions_pass(ends):
    client, service = ends
    client.sendall(b"there")
    assert service.recv(16) == b"there"
    service.sendall(b"back")
    assert client.recv(16) == b"back"


def test_what_the_client_closes_is_closed(ends):
    client, service = ends
    client.close()
    assert service.recv(16) == b""


@pytest.mark.parametrize("how", ["closed", "reset"])
def test_a_service_that_is_gone_is_silent_to_who_goes_on_sending(ends, how):
    client, service = ends
    if how == "reset":
        service.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    service.close()
    client.settimeout(0.1)
    for _ in range(5):
        client.sendall(b"heartbeat")
        with pytest.raises(TimeoutError):
            client.recv(16)
