"""core.bench: what the stopwatch measures, in which order, and how it summarises."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy.stats import t

from paperbook.core import bench
from paperbook.core.bench import Comparison, compare, interval, machine, peak_memory

MIB = 2**20


def test_rows_are_paired_by_round():
    """B is always exactly twice as fast, while the machine slows down tenfold."""
    base = [float(i) for i in range(1, 11)]
    rows = Comparison({"A": base, "B": [t / 2 for t in base]}, "A", {}).rows()
    assert [row["ratio"] for row in rows] == [1.0, 2.0]
    assert rows[1]["ratio_p20"] == rows[1]["ratio_p80"] == 2.0
    assert rows[0]["median_s"] == 5.5 and rows[0]["repeats"] == 10


@pytest.mark.parametrize("q", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_quantiles_agree_with_numpy(q, n):
    values = list(np.random.default_rng(n).normal(size=n))
    assert bench._quantile(values, q) == pytest.approx(np.quantile(values, q))


def test_order_alternates_and_synchronize_brackets_every_sample():
    events = []

    def case(name):
        return lambda: (events.append(name), time.sleep(bench._SAMPLE_S * 1.1))

    compare({"A": case("A"), "B": case("B")}, baseline="A", repeats=2, warmup=1, synchronize=lambda: events.append("|"))
    text = "".join(events)
    assert text.endswith("|A||B|" + "|B||A|"), text


def test_short_calls_are_repeated_and_long_ones_are_not():
    counts = {"short": 0, "long": 0}

    def short():
        counts["short"] += 1

    def long():
        counts["long"] += 1
        time.sleep(0.005)

    compare({"short": short, "long": long}, baseline="long", repeats=3, warmup=1)
    assert counts["long"] == 1 + 3 + 3 and counts["short"] > 100


@pytest.mark.parametrize("wrong, says", [
    (dict(baseline="C"), "baseline='C' is not among the cases: A"),
    (dict(baseline="A", repeats=0), "repeats=0"),
    (dict(baseline="A", warmup=0), "warmup=0"),
])
def test_bad_arguments(wrong, says):
    with pytest.raises(ValueError, match=says):
        compare({"A": lambda: None}, **wrong)


def test_an_error_in_a_case_is_the_callers():
    with pytest.raises(ZeroDivisionError):
        compare({"A": lambda: 1 / 0}, baseline="A")


def test_print_names_units_baseline_and_threads():
    text = str(Comparison({"dense": [2e-3], "sparse": [5e-7]}, "dense", {"torch": 2}))
    assert "2 ms" in text and "500 ns" in text and "4000.00x" in text and "'dense'" in text and "torch 2" in text


def test_machine_is_plain_and_loads_nothing():
    code = "import sys; from paperbook.core.bench import machine; m = machine(); print('torch' in sys.modules, m['slug'])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("False ")
    host = machine()
    assert set(host) == {"slug", "cpu", "cores", "memory_gb", "gpu", "threads", "versions"}
    assert "torch" in host["versions"] and os.uname().nodename not in str(host)  # no host names in records


def test_slug_of_a_gpu(monkeypatch):
    monkeypatch.setattr(bench, "_gpu_name", lambda: "NVIDIA H100 80GB HBM3")
    assert machine()["slug"] == "nvidia-h100-80gb-hbm3"


@pytest.mark.parametrize("exact", [True, False])
def test_peak_memory_counts_what_was_freed(monkeypatch, exact):
    if exact and not bench._reset_high_water():
        pytest.skip("this system keeps no high-water mark")
    if not exact:
        monkeypatch.setattr(bench, "_reset_high_water", lambda: False)

    def greedy():
        scratch = np.ones(96 * MIB, np.uint8)
        time.sleep(0.03)
        return int(scratch[-1])

    result, peak = peak_memory(greedy)
    assert result == 1 and 90 * MIB < peak < 112 * MIB
    assert peak_memory(lambda: None)[1] < 4 * MIB


def test_peak_memory_passes_errors_on_and_stops_its_thread(monkeypatch):
    monkeypatch.setattr(bench, "_reset_high_water", lambda: False)
    with pytest.raises(KeyError):
        peak_memory(lambda: {}["x"])
    import threading

    assert not [t for t in threading.enumerate() if isinstance(t, bench._Sampler)]


@pytest.mark.gpu
def test_gpu_time_waits_and_memory_is_the_devices():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x = torch.randn(8192, 8192, device="cuda")
    rows = compare({"small": lambda: x[:64] @ x, "large": lambda: x @ x}, baseline="large", repeats=5).rows()
    assert rows[0]["ratio"] > 5  # without waiting, both would only be launches
    _, peak = peak_memory(lambda: (x + 1).sum().item())
    assert 256 * MIB <= peak < 300 * MIB


@pytest.mark.parametrize("values", [[1.0, 2.0], [3, 3, 3], [0.1, -5.0, 2.2, 7.0, 1e3]])
def test_interval_agrees_with_scipy(values):
    middle, half = interval(values)
    scale = np.std(values, ddof=1) / len(values) ** 0.5
    low, high = t.interval(0.95, len(values) - 1, np.mean(values), scale) if scale else (3, 3)
    np.testing.assert_allclose((middle - half, middle + half), (low, high))


def test_interval_needs_two_runs_for_a_width_and_one_for_a_mean():
    assert interval([4]) == (4.0, None)
    with pytest.raises(ValueError, match="values is empty"):
        interval([])
