"""What can differ between the architectures that the engine runs: each axis is a field, in llama.cpp's own key names.

`graph.attention`, `graph.router` and `graph.expert_ffn` read them, and ask for no name. A new axis is a field with the
value that the architectures before it have as its default.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal


class RopeType(IntEnum):
    """Which values of a head rotate together, as ggml numbers it: neighbours, or a value and the one half a head on."""

    NORM = 0
    NEOX = 2


@dataclass(frozen=True, slots=True)
class Router:
    """How a router's logits become expert weights: softmax over all experts, of which the selected ones may be scaled
    to a sum of 1.
    """

    renormalise: bool = True


When = Literal["model", "attention", "ffn", "router", "dense", "experts"]
"""Where a tensor belongs: to the model as a whole, or to each layer that has such a part."""


@dataclass(frozen=True, slots=True)
class TensorRole:
    """One kind of weight: its `role`, which is llama.cpp's name of the tensor, its shape in ggml's order, where it is.

    The shape is given in sizes that have names: see `tensor_list.sizes`.
    """

    role: str
    ne: tuple[str, ...]
    when: When
    is_optional: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """One value of `general.architecture`, and the models that carry it.

    `qk_norm`: queries and keys are normalised before the rotation, each head by itself or all heads as one row.
    `width_key` names the key of an expert's width; without the key it is the dense width over the experts used.
    """

    name: str
    models: str
    tensors: tuple[TensorRole, ...]
    rope: RopeType = RopeType.NORM
    qk_norm: Literal["none", "head", "row"] = "none"
    router: Router = Router()
    width_key: Literal["feed_forward_length", "expert_feed_forward_length"] = "feed_forward_length"
    may_be_dense: bool = False
