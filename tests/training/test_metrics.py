import pytest

from mpt_jax import config
from mpt_jax.training import metrics

RTOL = 1e-12  # the expectations are the same few float64 operations in another order
PUBLISHED_RTOL = 6e-4  # tokens/s are published as integers: half of 1 in 1013


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def meter(clock, **kwargs):
    return metrics.Throughput(100, tokens_per_step=512, clock=clock, **kwargs)


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200 NVL", 835),
    ],
)
def test_peak_flops_of_known_devices(kind, tera):
    assert metrics.peak_flops(kind) == tera * 1e12


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "",
        "TPU v4 lite",
        "TPU v55",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "Tesla T4",
    ],
)
def test_peak_flops_of_an_unknown_device_is_none(kind):
    assert metrics.peak_flops(kind) is None


@pytest.mark.parametrize(
    ("seq_len", "n_params", "tokens_per_second", "mfu"),
    [(2048, 6_658_859_008, 4641, 0.6423), (65536, 6_918_905_856, 1013, 0.4697)],
)
def test_flops_per_token_reproduces_published_mfu(
    seq_len, n_params, tokens_per_second, mfu
):
    # LLM Foundry, scripts/train/benchmarking/README.md: 7B on 8 x A100-80, per GPU.
    m = config.ModelConfig(d_model=4096, n_heads=32, n_layers=32)
    flops = metrics.flops_per_token(m, seq_len, n_params)
    peak = metrics.peak_flops("NVIDIA A100-SXM4-80GB")
    assert tokens_per_second * flops.full / peak == pytest.approx(
        mfu, rel=PUBLISHED_RTOL
    )


def test_flops_per_token_causal_halves_attention_only():
    m = config.ModelConfig(d_model=64, n_layers=3)
    flops = metrics.flops_per_token(m, 128, 1000)
    assert flops.full == 6 * 1000 + 12 * 3 * 64 * 128
    assert flops.causal == 6 * 1000 + 6 * 3 * 64 * 128


def test_flops_per_token_does_not_count_an_untied_lookup():
    untied = config.ModelConfig(d_model=64, vocab_size=256, tie_word_embeddings=False)
    tied = config.ModelConfig(d_model=64, vocab_size=256)
    assert metrics.flops_per_token(
        untied, 128, 100_000 + 256 * 64
    ) == metrics.flops_per_token(tied, 128, 100_000)


def test_throughput_rates(clock):
    flops = metrics.FlopsPerToken(full=1e9, causal=5e8)
    m = meter(clock, flops=flops, peak_flops=1e12)
    for _ in range(10):
        with m.data_wait():
            clock.pass_(0.5)
        clock.pass_(1.5)
    rates = m.log(10)
    assert rates.tokens_per_second == pytest.approx(256, rel=RTOL)
    assert rates.data_wait_share == pytest.approx(0.25, rel=RTOL)
    assert rates.eta_seconds == pytest.approx(180, rel=RTOL)
    assert rates.mfu == pytest.approx(0.256, rel=RTOL)
    assert rates.mfu_causal == pytest.approx(0.128, rel=RTOL)


def test_throughput_without_peak_has_no_mfu(clock):
    m = meter(clock, flops=metrics.FlopsPerToken(full=1.0, causal=1.0))
    clock.pass_(2)
    known = m.log(1).metrics()
    assert set(known) == {"tokens_per_second", "data_wait_share", "eta_seconds"}


def test_throughput_forgets_logs_outside_the_window(clock):
    m = meter(clock, window=2)
    clock.pass_(100)  # a slow start, outside the window of the last log
    m.log(1)
    for step in (2, 3):
        clock.pass_(1)
        rates = m.log(step)
    assert rates.tokens_per_second == pytest.approx(512, rel=RTOL)


def test_throughput_excludes_pauses_even_nested(clock):
    m = meter(clock)
    clock.pass_(1)
    with m.pause():
        clock.pass_(40)
        with m.pause():
            clock.pass_(50)
    clock.pass_(1)
    assert m.log(2).tokens_per_second == pytest.approx(512, rel=RTOL)


def test_throughput_excludes_a_pause_that_raises(clock):
    m = meter(clock)

    def fail():
        with m.pause():
            clock.pass_(90)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    clock.pass_(1)
    assert m.log(1).tokens_per_second == pytest.approx(512, rel=RTOL)


def test_throughput_after_resume_counts_only_its_own_steps(clock):
    m = meter(clock, start_step=90)
    clock.pass_(2)
    rates = m.log(92)
    assert rates.tokens_per_second == pytest.approx(512, rel=RTOL)
    assert rates.eta_seconds == pytest.approx(8, rel=RTOL)


def test_throughput_restart_drops_compilation_and_allows_rollback(clock):
    m = meter(clock)
    clock.pass_(300)
    m.restart(1)
    assert m.log(1) == metrics.Rates()
    clock.pass_(4)
    assert m.log(5).tokens_per_second == pytest.approx(512, rel=RTOL)
    with pytest.raises(ValueError, match="got 3 after 5"):
        m.log(3)
    m.restart(3)
    clock.pass_(1)
    assert m.log(4).tokens_per_second == pytest.approx(512, rel=RTOL)
