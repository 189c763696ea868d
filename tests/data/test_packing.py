import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt_jax.data import packing
from tests.data.oracle import segments


@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1),
    eos_id=st.integers(0, 3),
)
@settings(deadline=None)
def test_segments_end_after_each_eos(rows, eos_id):
    batch = packing.as_batch(np.array(rows), eos_id=eos_id)
    assert batch["segment_ids"].tolist() == [segments(row, eos_id) for row in rows]
    assert batch["tokens"].tolist() == rows
    assert (batch["loss_mask"] == 1).all()
    assert {(a.dtype, a.shape) for a in batch.values()} == {
        (np.dtype(np.int32), (len(rows), 5))
    }


def test_no_id_is_padding():
    batch = packing.as_batch(np.zeros((2, 4)), eos_id=7)
    assert (batch["segment_ids"] == 1).all()
    assert (batch["loss_mask"] == 1).all()
