"""The order in which a layer's experts lie in a file. Apart: the bench that measures what orders bring uses it too.

Experts that tokens select together are often missing together, and what lies next to each other can be read at once.
"""

import numpy as np
from numpy.typing import NDArray


def co_selection_order(together: NDArray[np.int64]) -> list[int]:
    """Orders experts so that those that are selected together often become neighbours; a permutation of all of them.

    `together` [n_expert, n_expert] counts the tokens that selected both. The pairs that are selected together most
    often are joined first, as long as each expert has two neighbours at most and no circle closes (the greedy
    heuristic for the longest path); the chains then follow each other, that of the most selected pair first.
    """
    n_expert = len(together)
    counts = together + together.T
    first, second = np.triu_indices(n_expert, 1)
    chains = {expert: [expert] for expert in range(n_expert)}
    for pair in np.argsort(-counts[first, second], kind="stable").tolist():
        left, right = chains.get(int(first[pair])), chains.get(int(second[pair]))
        # Only the ends of a chain are still there to be joined.
        if left is None or right is None or left is right:
            continue
        ends = left[0], left[-1], right[0], right[-1]
        left = left if left[-1] == first[pair] else left[::-1]
        right = right if right[0] == second[pair] else right[::-1]
        for end in ends:
            chains.pop(end, None)
        joined = left + right
        chains[joined[0]] = chains[joined[-1]] = joined
    order: list[int] = []
    for chain in {id(chain): chain for chain in chains.values()}.values():
        order += chain
    return order
