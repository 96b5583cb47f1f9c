"""The sizes of layers that keep a state of fixed size in place of keys and values, and the GGUF keys of them."""

import math
from dataclasses import dataclass

from slimoe.offload.errors import ModelFileError
from slimoe.offload.gguf.header import Value
from slimoe.offload.gguf.metadata_keys import AGAIN, MetadataKeys
from slimoe.offload.model.architecture import Architecture, Recurrence

_USUAL_INTERVAL = 4


@dataclass(frozen=True, slots=True)
class RecurrentSpec:
    """Which `layers` are recurrent, and what they keep of a sequence.

    A causal convolution of `n_conv` taps over `n_channels` keeps its last inputs. A gated delta net reads queries, keys
    and values from it, `n_group` heads of queries and keys and `n_rank` of values, of `n_state` values each, and keeps
    a matrix for each value head; both are 0 without one.
    """

    kind: Recurrence
    layers: tuple[bool, ...]
    n_conv: int
    n_channels: int
    n_state: int = 0
    n_group: int = 0
    n_rank: int = 0

    @property
    def n_inner(self) -> int:
        """Values of all value heads of a token."""
        return self.n_state * self.n_rank

    @property
    def n_conv_kept(self) -> int:
        """Values that a layer's convolution keeps of a sequence."""
        return (self.n_conv - 1) * self.n_channels

    @property
    def n_matrix_kept(self) -> int:
        """Values of the matrices that a layer's delta net keeps of a sequence."""
        return self.n_state * self.n_state * self.n_rank

    @property
    def n_parts(self) -> int:
        """Into how many equal rows both of these are cut, so that several threads can copy them."""
        return math.gcd(self.n_rank, self.n_conv_kept) if self.n_rank else 1


def read_recurrent(keys: MetadataKeys, architecture: Architecture, n_embd: int, n_layer: int) -> RecurrentSpec | None:
    """What the keys say of recurrent layers, None where there are none.

    Raises ModelFileError for what is missing or contradicts itself.
    """
    if architecture.recurrence is None:
        return None
    read = _read_short_conv if architecture.recurrence == "short_conv" else _read_delta_net
    spec = read(keys, n_embd, n_layer)
    if all(spec.layers):
        raise ModelFileError(keys.gguf.path, "no layer has attention.", AGAIN)
    if spec.n_conv < 2:
        raise ModelFileError(keys.gguf.path, "its convolutions see a single token, which cannot be.", AGAIN)
    return spec if any(spec.layers) else None


def _read_short_conv(keys: MetadataKeys, n_embd: int, n_layer: int) -> RecurrentSpec:
    name, n_block = "attention.head_count_kv", keys.count("block_count")
    counts = keys.integers(name, n_block) if keys.is_array(name) else (keys.count(name),) * n_block
    is_recurrent = tuple(n == 0 for n in counts[:n_layer])
    return RecurrentSpec("short_conv", is_recurrent, keys.count("shortconv.l_cache"), n_embd)


def _read_delta_net(keys: MetadataKeys, _: int, n_layer: int) -> RecurrentSpec:
    n_state, n_group, n_rank = (keys.count(f"ssm.{name}") for name in ("state_size", "group_count", "time_step_rank"))
    n_inner = keys.count("ssm.inner_size")
    if n_inner != n_state * n_rank or n_rank % n_group:
        problem = f"its delta net has {n_inner} values in {n_rank} heads of {n_state}, and {n_group} key heads."
        raise ModelFileError(keys.gguf.path, problem, AGAIN)
    n_channels = n_inner + 2 * n_group * n_state
    layers = _recurrent_layers(keys, keys.count("block_count"))[:n_layer]
    return RecurrentSpec("delta_net", layers, keys.count("ssm.conv_kernel"), n_channels, n_state, n_group, n_rank)


def _recurrent_layers(keys: MetadataKeys, n_block: int) -> tuple[bool, ...]:
    name = "attention.recurrent_layers"
    if keys.has(name):
        return tuple(entry > 0 for entry in keys.integers(name, n_block, most=1))
    interval = keys.count("full_attention_interval", _USUAL_INTERVAL)
    return tuple((layer + 1) % interval != 0 for layer in range(n_block))


def recurrent_metadata(spec: RecurrentSpec, n_head_kv: int) -> dict[str, Value]:
    """The keys and values that `read_recurrent` reads, without prefix."""
    if spec.kind == "short_conv":
        counts = [0 if is_recurrent else n_head_kv for is_recurrent in spec.layers]
        return {"shortconv.l_cache": spec.n_conv, "attention.head_count_kv": counts}
    return {
        "ssm.conv_kernel": spec.n_conv,
        "ssm.inner_size": spec.n_inner,
        "ssm.state_size": spec.n_state,
        "ssm.time_step_rank": spec.n_rank,
        "ssm.group_count": spec.n_group,
        "attention.recurrent_layers": list(spec.layers),
    }
