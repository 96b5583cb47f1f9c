"""Which experts a layer of a token uploads and replaces, by hand, with a policy whose values stay as they are given."""

import numpy as np

from slimoe.offload.cache.policy import PolicyContext, make_policy
from slimoe.offload.experts.layer_uploads import LayerUploads, Upload
from slimoe.offload.machine.upload_costs import UploadCosts

VALUES = np.array([[0.9, 0.8, 0.1, 0.2], [0.7, 0.05, 0.3, 0.6]])
HERE = np.array([[True, False, True, False], [False, True, False, False]])
ONE_KIND = np.zeros(VALUES.shape, np.int32)
CHEAP = UploadCosts(host=1.0, device=0.1, copy=0.5, host_beside=1.0, copy_beside=0.5)
DEAR = UploadCosts(host=1.0, device=0.1, copy=150.0, host_beside=1.0, copy_beside=150.0)


def uploads_with(costs: UploadCosts, kinds: np.ndarray = ONE_KIND) -> LayerUploads:
    uploads = LayerUploads(make_policy("static", PolicyContext(2, 4, 2, VALUES)), costs, kinds)
    uploads.begin_token(HERE)
    return uploads


def test_the_most_used_come_first_and_the_least_used_leave() -> None:
    uploads = uploads_with(CHEAP)
    assert uploads.choose(1, np.array([3, 0]), 0) == [Upload(0, (0, 2))]
    assert uploads.choose(0, np.array([1]), 1) == [Upload(1, (1, 1))]
    uploads.begin_token(HERE)
    assert uploads.choose(0, np.array([1]), 1) == [Upload(1, (1, 1))]


def test_an_expert_of_the_layer_itself_never_leaves() -> None:
    assert uploads_with(CHEAP).choose(0, np.array([3]), 1) == [Upload(3, (1, 1))]
    uploads = uploads_with(CHEAP)
    uploads.begin_token(HERE & np.array([[True], [False]]))
    assert uploads.choose(0, np.array([1, 3]), 0) == [Upload(1, None)]


def test_a_copy_that_takes_long_is_made_only_for_an_expert_that_earns_it_back() -> None:
    """An exchange saves 0.9 s for each of the uses that are more, over 256 tokens, with a margin of 1.3."""
    uploads = uploads_with(DEAR)
    assert uploads.choose(0, np.array([3]), 1) == []
    assert uploads.choose(1, np.array([0]), 1) == []
    assert uploads.choose(0, np.array([1]), 1) == []
    assert uploads_with(DEAR).choose(1, np.array([0]), 1) == []
    longer = UploadCosts(host=1.0, device=0.1, copy=100.0, host_beside=1.0, copy_beside=100.0)
    assert uploads_with(longer).choose(1, np.array([0]), 1) == [Upload(0, (0, 2))]


def test_only_an_expert_of_the_same_kind_leaves() -> None:
    kinds = np.array([[0, 0, 1, -1], [0, 1, 1, 0]], np.int32)
    uploads = uploads_with(CHEAP, kinds)
    assert uploads.choose(1, np.array([2]), 0) == [Upload(2, (0, 2))]
    assert uploads.choose(1, np.array([0]), 0) == [Upload(0, None)]


def test_where_many_come_and_go_later_uses_count_less() -> None:
    """Two uploads in each token leave a resident four tokens: a copy that repays within hundreds is not made."""
    uploads = uploads_with(CHEAP)
    for _ in range(100):
        assert len(uploads.choose(1, np.array([0, 3]), 0)) == 1
        assert len(uploads.choose(0, np.array([1]), 1)) == 1
        uploads.begin_token(HERE)
    uploads.costs = UploadCosts(host=1.0, device=0.1, copy=10.0, host_beside=1.0, copy_beside=10.0)
    assert uploads.choose(1, np.array([0]), 1) == []
    for _ in range(100):
        uploads.begin_token(HERE)
    assert uploads.choose(1, np.array([0]), 1) == [Upload(0, (0, 2))]
