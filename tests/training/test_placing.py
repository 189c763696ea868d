"""Which rows a process reads, for jobs whose other processes are not there."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mpt_jax.training import placing

B, L = 16, 4


class Device:
    def __init__(self, process_index):
        self.process_index = process_index


@pytest.fixture
def share_of(monkeypatch):
    """Share of a process in a job; spans: process -> rows of each of its devices."""

    def share(process, spans):
        index = {
            Device(p): (slice(*span), slice(None))
            for p, held in spans.items()
            for span in held
        }
        sharding = SimpleNamespace(devices_indices_map=lambda shape: index)
        monkeypatch.setattr(jax, "process_index", lambda: process)
        return placing.share(sharding, (B, L))

    return share


def test_one_process_has_all_rows(share_of):
    share = share_of(0, {0: [(0, 8), (8, 16)]})
    assert share == placing.Share(tuple(range(B)), 0, 1, True, B)


def test_parts_are_those_of_the_devices_in_their_order(share_of):
    spans = {0: [(8, 12), (12, 16)], 1: [(0, 4), (4, 8)]}
    assert share_of(0, spans).rows == tuple(range(8, 16))
    assert (share_of(0, spans).index, share_of(1, spans).index) == (1, 0)
    assert share_of(0, spans).count == 2


def test_a_mesh_may_lay_the_rows_of_a_host_apart(share_of):
    spans = {0: [(0, 4), (8, 12)], 1: [(4, 8), (12, 16)]}
    share = share_of(1, spans)
    assert share.rows == (4, 5, 6, 7, 12, 13, 14, 15)
    assert (share.index, share.count) == (1, 2)


def test_processes_that_split_the_model_read_the_same_rows(share_of):
    """Two parts, of two processes each; the first of each saves their position."""
    spans = {0: [(0, 8)], 1: [(0, 8)], 2: [(8, 16)], 3: [(8, 16)]}
    found = [share_of(process, spans) for process in range(4)]
    assert [(s.index, s.count, s.first) for s in found] == [
        (0, 2, True), (0, 2, False), (1, 2, True), (1, 2, False),
    ]  # fmt: skip


@pytest.mark.parametrize("spec", [("a",), (("a", "b"),), (None, "b"), ("b", "a")])
def test_rows_arrive_where_they_belong(spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    rows_BL = np.arange(B * L, dtype=np.int32).reshape(B, L)
    share = placing.share(sharding, (B, L))
    placed = placing.place({"tokens": rows_BL}, sharding, share)["tokens"]
    assert placed.sharding == sharding
    np.testing.assert_array_equal(placed, rows_BL)
