"""Finds messages in what a pipe brings, on either side of it."""

from collections.abc import Iterator

from slimoe.server.messages import HEADER_BYTES


class MessageBuffer:
    """Cuts a stream of bytes, arriving in pieces of any size, back into the bodies of messages."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Adds `data` and yields the bodies that it completes."""
        self._data += data
        at = 0
        while len(self._data) - at >= HEADER_BYTES:
            begin = at + HEADER_BYTES
            end = begin + int.from_bytes(self._data[at:begin], "big")
            if len(self._data) < end:
                break
            yield bytes(self._data[begin:end])
            at = end
        del self._data[:at]
