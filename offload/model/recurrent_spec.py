"""The sizes of layers that keep a state of fixed size in place of keys and values, and the GGUF keys of them."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from slimoe.offload.errors import ModelFileError
from slimoe.offload.gguf.header import Value
from slimoe.offload.gguf.metadata_keys import AGAIN, MetadataKeys
from slimoe.offload.model.architecture import Architecture, Recurrence

_USUAL_INTERVAL = 4


@dataclass(frozen=True, slots=True)
class RecurrentSpec:
    """Which `layers` are recurrent, and what they keep of a sequence.

    A causal convolution of `n_conv` taps over `n_channels` keeps its last inputs. A gated delta net, or Mamba-2, reads
    queries, keys and values from it (which Mamba-2 calls C, B and x): `n_group` heads of queries and keys of `n_state`
    values each, and `n_rank` heads of values, `n_inner` values in all. It keeps a matrix for each value head. All four
    are 0 without one.
    """

    kind: Recurrence
    layers: tuple[bool, ...]
    n_conv: int
    n_channels: int
    n_state: int = 0
    n_group: int = 0
    n_rank: int = 0
    n_inner: int = 0

    @property
    def n_conv_kept(self) -> int:
        """Values that a layer's convolution keeps of a sequence."""
        return (self.n_conv - 1) * self.n_channels

    @property
    def n_matrix_kept(self) -> int:
        """Values of the matrices that a layer's delta net or Mamba-2 keeps of a sequence."""
        return self.n_state * self.n_inner

    @property
    def reads_whole(self) -> bool:
        """Whether an operation reads the matrices where they lie, by the numbers of states."""
        return self.kind == "mamba2"

    @property
    def n_parts(self) -> int:
        """Into how many equal rows both of these are cut, so that several threads can copy them."""
        return math.gcd(self.n_rank, self.n_conv_kept) if self.n_rank else 1


def read_recurrent(
    keys: MetadataKeys, architecture: Architecture, n_embd: int, attending: Sequence[bool]
) -> RecurrentSpec | None:
    """What the keys say of recurrent layers, None where there are none.

    Layers that are not `attending` have neither attention nor a recurrence. Raises ModelFileError for what is missing
    or contradicts itself.
    """
    if architecture.recurrence is None:
        return None
    read = {"short_conv": _read_short_conv, "delta_net": _read_delta_net, "mamba2": _read_mamba2}
    spec = read[architecture.recurrence](keys, n_embd, len(attending))
    if all(spec.layers[layer] for layer, attends in enumerate(attending) if attends):
        raise ModelFileError(keys.gguf.path, "no layer has attention.", AGAIN)
    if spec.n_conv < 2:
        raise ModelFileError(keys.gguf.path, "its convolutions see a single token, which cannot be.", AGAIN)
    layers = tuple(is_recurrent and attends for is_recurrent, attends in zip(spec.layers, attending, strict=True))
    return replace(spec, layers=layers) if any(layers) else None


def _read_short_conv(keys: MetadataKeys, n_embd: int, n_layer: int) -> RecurrentSpec:
    return RecurrentSpec("short_conv", _without_heads(keys, n_layer), keys.count("shortconv.l_cache"), n_embd)


def _without_heads(keys: MetadataKeys, n_layer: int) -> tuple[bool, ...]:
    """The layers that have no key heads."""
    name, n_block = "attention.head_count_kv", keys.count("block_count")
    counts = keys.integers(name, n_block) if keys.is_array(name) else (keys.count(name),) * n_block
    return tuple(n == 0 for n in counts[:n_layer])


def _read_delta_net(keys: MetadataKeys, _: int, n_layer: int) -> RecurrentSpec:
    n_state, n_group, n_rank, n_inner = _state_sizes(keys)
    if n_inner != n_state * n_rank or n_rank % n_group:
        problem = f"its delta net has {n_inner} values in {n_rank} heads of {n_state}, and {n_group} key heads."
        raise ModelFileError(keys.gguf.path, problem, AGAIN)
    n_channels = n_inner + 2 * n_group * n_state
    layers = _recurrent_layers(keys, keys.count("block_count"))[:n_layer]
    sizes = n_channels, n_state, n_group, n_rank, n_inner
    return RecurrentSpec("delta_net", layers, keys.count("ssm.conv_kernel"), *sizes)


def _read_mamba2(keys: MetadataKeys, _: int, n_layer: int) -> RecurrentSpec:
    n_state, n_group, n_rank, n_inner = _state_sizes(keys)
    if n_inner % n_rank or n_rank % n_group:
        problem = f"its Mamba-2 layers have {n_inner} values in {n_rank} heads, and {n_group} groups of these."
        raise ModelFileError(keys.gguf.path, problem, AGAIN)
    sizes = n_inner + 2 * n_group * n_state, n_state, n_group, n_rank, n_inner
    return RecurrentSpec("mamba2", _without_heads(keys, n_layer), keys.count("ssm.conv_kernel"), *sizes)


def _state_sizes(keys: MetadataKeys) -> tuple[int, int, int, int]:
    """`n_state`, `n_group`, `n_rank` and `n_inner`."""
    names = ("state_size", "group_count", "time_step_rank", "inner_size")
    n_state, n_group, n_rank, n_inner = (keys.count(f"ssm.{name}") for name in names)
    return n_state, n_group, n_rank, n_inner


def _recurrent_layers(keys: MetadataKeys, n_block: int) -> tuple[bool, ...]:
    name = "attention.recurrent_layers"
    if keys.has(name):
        return tuple(entry > 0 for entry in keys.integers(name, n_block, most=1))
    interval = keys.count("full_attention_interval", _USUAL_INTERVAL)
    return tuple((layer + 1) % interval != 0 for layer in range(n_block))


def recurrent_metadata(spec: RecurrentSpec, n_head_kv: int, attention_layers: Collection[int]) -> dict[str, Value]:
    """The keys and values that `read_recurrent` reads, without prefix, where the `attention_layers` have attention."""
    layers: dict[str, Value] = {"attention.recurrent_layers": list(spec.layers)}
    if spec.kind != "delta_net":
        counts = [n_head_kv if layer in attention_layers else 0 for layer in range(len(spec.layers))]
        layers = {"attention.head_count_kv": counts}
    if spec.kind == "short_conv":
        return {"shortconv.l_cache": spec.n_conv} | layers
    return layers | {
        "ssm.conv_kernel": spec.n_conv,
        "ssm.inner_size": spec.n_inner,
        "ssm.state_size": spec.n_state,
        "ssm.time_step_rank": spec.n_rank,
        "ssm.group_count": spec.n_group,
    }
