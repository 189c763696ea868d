import math
import types

import pytest

from mpt_jax.errors import UserError
from mpt_jax.planning import topology
from mpt_jax.planning.chips import CHIPS
from mpt_jax.planning.collectives import Collective
from mpt_jax.planning.figures import Figures, Memory, roofline
from mpt_jax.planning.topology import Fabric


def torus(*shape, slice_index=0):
    """Devices with the coordinates of a TPU slice."""
    cells = [()]
    for n in shape:
        cells = [(*c, i) for c in cells for i in range(n)]
    return [types.SimpleNamespace(coords=c, slice_index=slice_index) for c in cells]


def test_every_chip_knows_its_peak_and_its_source():
    for chip in CHIPS.values():
        assert chip.flops > 1e14
        assert chip.source


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5q:4x4x4", 'did you mean "v5'),
        ("v5e:4x4x4", "has 2 dim"),
        ("v5p", "expected CHIP:SHAPE"),
        ("2*h100:8", "no slices"),
    ],
)
def test_a_wrong_topology_says_what_is_right(name, says):
    with pytest.raises(UserError, match=says.replace("*", ".")):
        topology.parse(name)


def test_a_dim_that_closes_has_two_ways_around():
    chip, mesh = CHIPS["v5p"], {"data": 4, "fsdp": 16}
    fabric = Fabric(chip, mesh, torus(4, 4, 4), (4, 4, 4))
    assert fabric.bandwidth(("data",)) == 2 * chip.link_bandwidth
    assert fabric.bandwidth(("fsdp",)) == 4 * chip.link_bandwidth
    assert fabric.bandwidth(("data", "fsdp")) == 6 * chip.link_bandwidth
    open_line = Fabric(CHIPS["v5e"], {"fsdp": 4}, torus(4, 1), (4, 1))
    assert open_line.bandwidth(("fsdp",)) == CHIPS["v5e"].link_bandwidth


def test_slices_share_their_network():
    chip, mesh = CHIPS["v5e"], {"data": 2, "fsdp": 16}
    devices = [*torus(4, 4), *torus(4, 4, slice_index=1)]
    fabric = Fabric(chip, mesh, devices, (4, 4))
    assert fabric.bandwidth(("fsdp",)) == 2 * chip.link_bandwidth
    # One member in each slice; sixteen, each of which sends its part.
    assert fabric.bandwidth(("data",)) == chip.network_bandwidth
    assert fabric.bandwidth(("data", "fsdp")) == 16 * chip.network_bandwidth
    assert 16 * chip.network_bandwidth < 2 * chip.link_bandwidth


def test_gpus_are_fast_inside_a_machine():
    chip, mesh = CHIPS["h100"], {"data": 2, "fsdp": 8, "tensor": 2}
    fabric = Fabric(chip, mesh)
    assert fabric.bandwidth(("tensor",)) == chip.link_bandwidth
    # 16 apart: one member in each machine, through its own network card.
    assert fabric.bandwidth(("data",)) == chip.network_bandwidth
    # 2, 4, 6 ... apart: four members in each of two machines.
    assert fabric.bandwidth(("fsdp",)) == 4 * chip.network_bandwidth
    assert Fabric(chip, {"fsdp": 1}).bandwidth(("fsdp",)) == math.inf


def test_the_roofline_names_what_limits():
    chip = CHIPS["h100"]
    fabric = Fabric(chip, {"fsdp": 8})
    figures = Figures(
        source="analytic",
        mesh={"fsdp": 8},
        tokens=1024,
        memory=Memory(1, 1, 1, 10),
        model_flops=8 * chip.flops * 0.5,
        causal_flops=8 * chip.flops * 0.4,
        executed_flops=8 * chip.flops,  # one second
        hbm_bytes=int(chip.hbm_bandwidth * 0.5),
        host_bytes=int(chip.host_bandwidth * 0.25),
        collectives=(
            Collective("all-gather", ("fsdp",), True, 1, 1, int(chip.link_bandwidth)),
            Collective(
                "all-reduce", ("fsdp",), False, 1, 1, int(chip.link_bandwidth * 0.5)
            ),
        ),
    )
    r = roofline(figures, fabric)
    assert r.limit == "network (fsdp)"
    assert r.host == pytest.approx(0.25)
    assert r.overlapped == pytest.approx(1.5)
    assert r.exposed == pytest.approx(0.5 + 1.0)
    assert r.mfu == pytest.approx(0.5 / 1.5)
    assert figures.memory.temporaries == 7
