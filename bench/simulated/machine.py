"""A machine with a device, as speeds: how long it takes for a layer's experts, played event by event.

A step waits for the device's own part of a layer, reads what its router selected, and begins both sides: the device
multiplies with the experts in its slots, takes further ones over the link and multiplies with these, while the CPU
multiplies with the others where they lie. Link and CPU read the same memory, so that each is slower while both are
busy. What the CPU computed goes to the device when it is done.
"""

from dataclasses import dataclass
from functools import cache

_DONE = 1e-15
"""Seconds of work that are rounding errors."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Speeds in bytes per second and seconds: of the device's memory, the CPU's multiplying, memory and the link.

    `device_launch` and `cpu_launch` go to each graph, `link_delay` to each transfer, however small.
    """

    device_rate: float
    cpu_rate: float
    memory_rate: float
    link_rate: float
    device_launch: float = 2e-5
    cpu_launch: float = 1e-5
    link_delay: float = 1e-5

    def copy_seconds(self, n_bytes: float) -> float:
        """Seconds to take an expert over while nothing else reads the memory."""
        return self.link_delay + n_bytes / min(self.link_rate, self.memory_rate)

    def host_seconds(self, n_bytes: float) -> float:
        """Seconds of an expert on the CPU while nothing is copied."""
        return n_bytes / min(self.cpu_rate, self.memory_rate)

    def device_seconds(self, n_bytes: float) -> float:
        """Seconds of an expert in a slot."""
        return n_bytes / self.device_rate

    def rates(self, *, cpu: bool, link: bool) -> tuple[float, float]:
        """Bytes per second that the CPU and the link get: what they ask for, or else an even part of the memory's."""
        of_cpu, of_link = self.cpu_rate if cpu else 0.0, self.link_rate if link else 0.0
        if of_cpu + of_link <= self.memory_rate:
            return of_cpu, of_link
        half = self.memory_rate / 2
        if of_link < half:
            return min(of_cpu, self.memory_rate - of_link), of_link
        if of_cpu < half:
            return of_cpu, self.memory_rate - of_cpu
        return half, half


@dataclass(slots=True)
class _Lane:
    """What one side has still to do, in order: `delay`s in seconds, and bytes that the CPU or the link carries."""

    pieces: list[tuple[str, float]]

    @property
    def kind(self) -> str:
        """What is being done: `delay`, `link` or `cpu`, empty when all is done."""
        return self.pieces[0][0] if self.pieces else ""

    def left(self, rate: float) -> float:
        """Seconds until the piece is done, at a rate of bytes per second."""
        kind, amount = self.pieces[0]
        return amount if kind == "delay" else amount / rate

    def advance(self, seconds: float, rate: float) -> None:
        """Lets time pass, at most until the piece is done."""
        kind, amount = self.pieces[0]
        amount -= seconds * (1.0 if kind == "delay" else rate)
        if amount / (1.0 if kind == "delay" else rate) <= _DONE:
            self.pieces.pop(0)
        else:
            self.pieces[0] = kind, amount


@cache
def layer_seconds(machine: Machine, n_bytes: float, n_here: int, n_uploaded: int, n_host: int) -> float:
    """Seconds of one layer's experts of `n_bytes` each: in slots, taken over the link for it, and on the CPU."""
    device, host = _Lane([]), _Lane([])
    if n_here:
        device.pieces.append(("delay", machine.device_launch + n_here * machine.device_seconds(n_bytes)))
    for _ in range(n_uploaded):
        device.pieces += [("delay", machine.link_delay), ("link", n_bytes)]
    if n_uploaded:
        device.pieces.append(("delay", machine.device_launch + n_uploaded * machine.device_seconds(n_bytes)))
    if n_host:
        host.pieces += [("delay", machine.cpu_launch), ("cpu", n_host * n_bytes), ("delay", machine.link_delay)]
    now = 0.0
    while lanes := [lane for lane in (device, host) if lane.pieces]:
        of_cpu, of_link = machine.rates(cpu=host.kind == "cpu", link=device.kind == "link")
        rates = {id(device): of_link, id(host): of_cpu}
        until = min(lane.left(rates[id(lane)]) for lane in lanes)
        for lane in lanes:
            lane.advance(until, rates[id(lane)])
        now += until
    return now
