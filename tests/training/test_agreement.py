import jax
import numpy as np

from mpt_jax.config import MeshConfig
from mpt_jax.partitioning import make_mesh
from mpt_jax.training.agreement import Agreement


def clock(*times):
    return iter(times).__next__


def test_one_process_asks_nobody():
    alone = Agreement(make_mesh(MeshConfig()), clock=clock(100.0, 104.5, 105.0))
    alone.ask(stop=True)
    assert alone.answer(stop=False) == (False, 4.5)
    assert alone.answer(stop=True) == (True, 5.0)


def test_of_several_any_may_stop_and_the_first_has_the_time(monkeypatch):
    """Eight devices, all of one process that believes it is one of two."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    first = Agreement(mesh, clock=clock(100.0, 104.56))
    first.ask(stop=True)
    assert first.answer(stop=False) == (True, 4.5)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    second = Agreement(mesh, clock=clock(7000.0))
    second.ask(stop=False)
    assert second.answer(stop=True) == (False, 0.0)


def test_the_answer_is_of_all_devices(monkeypatch):
    """One process wants to stop: its devices are two of the eight."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    agreement = Agreement(make_mesh(MeshConfig()), clock=clock(0.0))
    votes = np.zeros((8, 2), np.int32)
    votes[4:6, 0], votes[0:2, 1] = 1, 123
    agreement._asked = agreement._maximum(jax.device_put(votes, agreement._rows))
    assert agreement.answer(stop=False) == (True, 12.3)
