"""What outlives the weights when a model is opened anew within other limits, for it to go on where it was."""

from dataclasses import dataclass

from slimoe.offload.cache.expert_uses import ExpertUses
from slimoe.offload.cache.policy import Policy
from slimoe.offload.memory.kv_store import KVStore


@dataclass(slots=True, eq=False)
class Carried:
    """The KV caches, how often each expert was selected, and what the cache policy has learnt, if there is one."""

    kv: KVStore
    uses: ExpertUses
    policy: Policy | None = None
