"""Where another machine's device is reached, and asking whether it answers.

ggml ends the whole process when it cannot connect, or when what answers is no RPC server or one of another version,
and waits forever for a server that is busy, since one serves one client at a time. So the greeting is exchanged once
before ggml gets to see the endpoint. Source: `rpc_serve_client` and `negotiate_hello` of ggml-rpc.cpp, ggml 0.25.3.
"""

import re
import socket
import struct
from dataclasses import dataclass

from slimoe.offload.errors import DeviceError, UsageError
from slimoe.offload.ggml.library import chosen

PATIENCE_SECONDS = 3.0
_ENDPOINT = re.compile(r"([^\s:/\[\]]+):([0-9]{1,5})")
_HELLO = 14
_CAPS_BYTES = 24  # what either side can do besides TCP; zeros say nothing
_REQUEST = struct.pack("<BQ", _HELLO, _CAPS_BYTES) + bytes(_CAPS_BYTES)
_RESPONSE = struct.Struct(f"<Q4B{_CAPS_BYTES}x")
_START = "Start one there with llama.cpp's rpc-server and check --rpc."


@dataclass(frozen=True, slots=True)
class RpcEndpoint:
    """A host's name or IPv4 address, the only kinds that ggml takes, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        """HOST:PORT, as ggml takes it."""
        return f"{self.host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether the device's memory is this machine's."""
        return self.host == "localhost" or self.host.startswith("127.")


def parse_endpoint(text: str) -> RpcEndpoint:
    """The endpoint that a person wrote as HOST:PORT; raises UsageError for anything else."""
    match = _ENDPOINT.fullmatch(text)
    if match is None or not 0 < int(match[2]) < 65536:
        raise UsageError(
            f"--rpc is {text!r}, which is no endpoint. Write a name or IPv4 address and a port, such as 10.0.0.7:50052."
        )
    return RpcEndpoint(match[1], int(match[2]))


def check_answers(endpoint: RpcEndpoint, version: tuple[int, int]) -> None:
    """Greets the server and hangs up; raises DeviceError within seconds unless it speaks this protocol version."""
    major, minor, patch = spoken_version(endpoint)
    if major != version[0] or minor > version[1]:
        raise DeviceError(
            f"The RPC server {endpoint} speaks version {major}.{minor}.{patch} of ggml's protocol, but "
            f"{version[0]}.{version[1]} is needed. Build it from the llama.cpp that {chosen()} comes with."
        )


def spoken_version(endpoint: RpcEndpoint) -> tuple[int, int, int]:
    """The protocol version that a server speaks; raises DeviceError within seconds where none answers."""
    try:
        found = socket.getaddrinfo(endpoint.host, endpoint.port, socket.AF_INET, socket.SOCK_STREAM)
        address = found[0][4]
        with socket.create_connection((str(address[0]), endpoint.port), PATIENCE_SECONDS) as connection:
            connection.sendall(_REQUEST)
            answer = _received(connection, _RESPONSE.size)
    except TimeoutError:
        raise DeviceError(
            f"The RPC server {endpoint} does not answer within {PATIENCE_SECONDS:g} seconds. "
            "It serves one client at a time: end the other one, or check that it runs."
        ) from None
    except OSError as error:
        raise DeviceError(f"No RPC server answers at {endpoint} ({error.strerror or error}). {_START}") from None
    if len(answer) != _RESPONSE.size or _RESPONSE.unpack(answer)[0] != _RESPONSE.size - 8:
        raise DeviceError(f"What answers at {endpoint} is no RPC server of ggml, or one of another version. {_START}")
    _, major, minor, patch, _ = _RESPONSE.unpack(answer)
    return major, minor, patch


def refuses(endpoint: RpcEndpoint) -> bool:
    """Whether the endpoint refuses connections, so that certainly no server runs there any more."""
    try:
        socket.create_connection((endpoint.host, endpoint.port), PATIENCE_SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def _received(connection: socket.socket, n_bytes: int) -> bytes:
    """What arrives until `n_bytes` are there or the other side is done."""
    data = b""
    while len(data) < n_bytes and (piece := connection.recv(n_bytes - len(data))):
        data += piece
    return data
