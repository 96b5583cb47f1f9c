"""How the update of a feed-forward part joins the stream in torch, where norms or a matrix are behind its experts."""

from dataclasses import dataclass

from torch import Tensor

from slimoe.converter.forward.norms import Norm


@dataclass(frozen=True, slots=True)
class BlockEnd:
    """The norms of the experts' sum and of the whole part's output, and what multiplies all that leaves the block, [1].

    Each is None where a layer has none of it.
    """

    experts: Norm | None = None
    ffn: Norm | None = None
    scale: Tensor | None = None

    def update(self, experts: Tensor, always: Tensor | None) -> Tensor:
        """What is added to the stream [n, n_embd] for the experts' sum, and what every token passes, if any."""
        total = experts if self.experts is None else self.experts(experts)
        total = total if always is None else total + always
        return total if self.ffn is None else self.ffn(total)

    def scaled(self, h: Tensor) -> Tensor:
        """The stream [n, n_embd] as it leaves the block."""
        return h if self.scale is None else h * self.scale

    def after(self, middle: Tensor, experts: Tensor, always: Tensor | None) -> Tensor:
        """The stream behind the block, of that behind its attention."""
        return self.scaled(middle + self.update(experts, always))
