import json
import math

import pytest

from mpt_jax.config import StabilityConfig
from mpt_jax.training.stability import SpikeDetector, Verdict

OK, SKIPPED = Verdict.OK, Verdict.SKIPPED
SPIKE, LIMIT = Verdict.SPIKE, Verdict.NONFINITE_LIMIT


def detector(**kwargs):
    defaults = {"spike_window": 4, "spike_patience": 2, "max_skips": 2}
    return SpikeDetector(StabilityConfig(**defaults | kwargs))


def verdicts(detector, losses, finite=True):
    return [detector.observe(i, loss, finite) for i, loss in enumerate(losses, 1)]


def test_spike_after_more_than_patience_outliers_in_a_row():
    d = detector()
    assert verdicts(d, [1.0] * 4) == [OK] * 4
    assert verdicts(d, [2.1, 2.1, 2.1]) == [OK, OK, SPIKE]
    assert "step 3: loss 2.1000 is over 2 x 1.0000" in d.reason
    assert ", 3 steps in a row" in d.reason


def test_exactly_factor_times_mean_is_no_outlier():
    assert SPIKE not in verdicts(detector(), [1.0] * 4 + [2.0] * 3)


def test_a_good_loss_between_outliers_starts_the_count_again():
    losses = [1.0] * 4 + [3.0, 3.0, 1.0, 3.0, 3.0, 1.0]
    assert SPIKE not in verdicts(detector(), losses)


def test_no_outliers_before_the_window_is_full():
    # The first 9.0 fills the window; as an outlier it would make the third a spike.
    assert verdicts(detector(), [1.0] * 3 + [9.0] * 3) == [OK] * 6


def test_outliers_stay_out_of_the_mean():
    # With the 100s in it the mean would be 50.5, and 5.0 no outlier.
    assert verdicts(detector(), [1.0] * 4 + [100.0, 100.0, 5.0])[-1] is SPIKE


def test_mean_is_over_the_last_window_only():
    # Mean 1, not 50: the early losses have left.
    assert verdicts(detector(), [100.0] * 4 + [1.0] * 4 + [3.0] * 3)[-1] is SPIKE


def test_spike_is_reported_once_then_the_new_level_counts():
    d = detector()
    verdicts(d, [1.0] * 4)
    assert verdicts(d, [5.0] * 20).count(SPIKE) == 1
    assert verdicts(d, [11.0] * 3)[-1] is SPIKE


def test_patience_zero_reports_the_first_outlier():
    assert verdicts(detector(spike_patience=0), [1.0] * 4 + [3.0])[-1] is SPIKE


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1.0])
def test_nonfinite_steps_are_skipped_up_to_the_limit(loss):
    d = detector()
    assert verdicts(d, [loss] * 3, finite=False) == [SKIPPED, SKIPPED, LIMIT]
    what = "gradient" if loss == 1.0 else "loss"
    assert d.reason == f"step 3: {what} is not finite, 3 in a row (2 allowed)"


def test_nan_loss_is_not_finite_whatever_the_flag_says():
    assert detector().observe(1, math.nan, True) is SKIPPED


def test_a_finite_step_resets_the_skips():
    d = detector()
    for _ in range(3):
        assert verdicts(d, [math.nan] * 2, finite=False) == [SKIPPED] * 2
        assert d.observe(1, 1.0, True) is OK


def test_skipped_losses_neither_enter_the_mean_nor_break_a_row_of_outliers():
    d = detector()
    verdicts(d, [1.0] * 4 + [3.0, 3.0])
    assert d.observe(7, 0.5, False) is SKIPPED
    assert d.observe(8, 3.0, True) is SPIKE
    assert "x 1.0000" in d.reason


def test_nonfinite_stop_allows_none():
    assert detector(nonfinite="stop").observe(1, math.nan, False) is LIMIT


def test_state_survives_json_at_every_step():
    losses = [1.1, 0.9, math.nan, math.nan, 1.3, 1.0, 3.0, math.nan, 3.0, 3.0, 1.0]
    straight, resumed = detector(), detector()
    for step, loss in enumerate(losses):
        finite = math.isfinite(loss)
        verdict = straight.observe(step, loss, finite)
        assert resumed.observe(step, loss, finite) is verdict
        state = json.loads(json.dumps(resumed.state_dict(), allow_nan=False))
        resumed = detector()
        resumed.load_state_dict(state)
    assert resumed.state_dict() == straight.state_dict()


def test_state_loads_into_a_smaller_window():
    d = detector()
    verdicts(d, [9.0, 9.0, 1.0, 1.0])
    small = detector(spike_window=2, spike_patience=0)
    small.load_state_dict(d.state_dict())
    assert small.observe(5, 3.0, True) is SPIKE


def test_a_spike_began_at_its_first_outlier_whatever_came_between():
    config = StabilityConfig(spike_window=2, spike_patience=1, max_skips=5)
    detector = SpikeDetector(config)
    losses = [1.0, 1.0, 9.0, float("nan"), 9.0]
    verdicts = [
        detector.observe(step, loss, finite=loss == loss)
        for step, loss in enumerate(losses, start=1)
    ]
    assert verdicts[-1] is Verdict.SPIKE
    assert detector.bad_since == 3
