"""core.kernels: the choice of backend, the measure of error, and the comparison with a reference."""

import numpy as np
import pytest
import torch

from paperbook.core import kernels
from paperbook.core.kernels import BackendUnavailable, check_against_reference, choose_backend, relative_error

pytest.importorskip("hypothesis")  # not on GPU machines
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

INF, NAN = float("inf"), float("nan")
ALL = ("torch", "numba", "triton")


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("PAPERBOOK_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernels, "_importable", lambda name: True)


@pytest.mark.parametrize("device, available, chosen", [
    ("cpu", ("torch",), "torch"), ("cpu", ALL, "numba"), ("cpu", ("torch", "triton"), "torch"),
    ("cuda", ALL, "triton"), ("cuda:1", ALL, "triton"), (torch.device("cuda", 0), ("torch", "numba"), "torch"),
    ("mps", ALL, "torch"),
])
def test_auto(device, available, chosen):
    assert choose_backend(device=device, available=available) == chosen


def test_auto_falls_back_when_something_is_not_installed(monkeypatch):
    monkeypatch.setattr(kernels, "_importable", lambda name: name == "torch")
    assert choose_backend(device="cpu", available=ALL) == choose_backend(device="cuda", available=ALL) == "torch"
    with pytest.raises(BackendUnavailable, match="pip install numba"):
        choose_backend("numba", available=ALL)


@pytest.mark.parametrize("requested, device, available, says", [
    ("numba", "cpu", ("torch",), "no numba form. Use one of: torch"),
    ("numba", "cuda", ALL, "numba runs on cpu, the tensors are on cuda"),
    ("triton", "cpu", ALL, "TRITON_INTERPRET=1"),
    ("auto", "cuda", ("numba",), "nothing serves cuda"),
])
def test_named_and_impossible_is_refused(requested, device, available, says):
    with pytest.raises(BackendUnavailable, match=says):
        choose_backend(requested, device=device, available=available)


def test_unknown_name():
    with pytest.raises(ValueError, match="backend='cupy' is unknown"):
        choose_backend("cupy")


def test_environment_replaces_auto_only(monkeypatch):
    monkeypatch.setenv("PAPERBOOK_BACKEND", "torch")
    assert choose_backend(available=ALL) == "torch" and choose_backend("numba", available=ALL) == "numba"
    monkeypatch.setenv("PAPERBOOK_BACKEND", "cupy")
    with pytest.raises(ValueError, match="PAPERBOOK_BACKEND='cupy'"):
        choose_backend(available=ALL)


def test_triton_interpreter_serves_the_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("triton", device="cpu", available=ALL) == "triton"
    assert choose_backend(device="cpu", available=ALL) == "numba"  # auto never picks an interpreter


@pytest.mark.parametrize("out, ref, error", [
    ([3.0, 4.5], [3.0, 4.0], 0.1), ([], [], 0.0), ([0.0], [0.0], 0.0), ([1e-9], [0.0], INF),
    ([1.0, -INF], [1.0, -INF], 0.0), ([INF], [-INF], INF), ([1.0], [INF], INF), ([INF], [1.0], INF),
    ([NAN], [1.0], INF), ([1.0], [NAN], INF), ([NAN], [NAN], INF), (2, 1, 1.0),
])
def test_relative_error(out, ref, error):
    assert relative_error(out, ref) == pytest.approx(error)


def test_relative_error_takes_any_tensor():
    grad = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    assert relative_error(grad, np.ones(3)) == relative_error(np.ones(3, np.int8), torch.ones(3)) == 0
    with pytest.raises(ValueError, match=r"out has shape \(3,\), ref \(1, 3\)"):
        relative_error(np.ones(3), np.ones((1, 3)))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8), st.floats(0.1, 1e3), st.floats(-0.5, 0.5))
@settings(max_examples=50, deadline=None)
def test_relative_error_ignores_scale_and_sees_a_factor(values, scale, wrong):
    ref = np.array(values) + 1.0
    if np.linalg.norm(ref) < 1e-6:
        return
    error = relative_error(ref * (1 + wrong), ref)
    assert error == pytest.approx(abs(wrong), abs=1e-9)
    assert relative_error(scale * ref * (1 + wrong), scale * ref) == pytest.approx(error, abs=1e-9)


def cases(dtype=torch.float32):
    for n in (0, 1, 5):
        yield f"n={n}", {"x": torch.randn(n, dtype=torch.float64).to(dtype), "pair": [torch.ones(n, dtype=dtype)]}


def reference(x, pair):
    assert x.dtype == pair[0].dtype == torch.float64
    return x * 2, (x * pair[0]).sum()


def good(x, pair):
    return x + x, (x * pair[0]).sum()


def test_rows_of_agreeing_backends():
    rows = check_against_reference({"a": good, "b": good}, reference, cases())
    assert [(row["backend"], row["case"]) for row in rows] == [(b, f"n={n}") for n in (0, 1, 5) for b in "ab"]
    assert all(row["error"] < 1e-6 for row in rows)


@pytest.mark.parametrize("wrong, says", [
    (lambda x, pair: (x * 2.01, x.sum()), r"bad on n=5: relative error .*allowed"),
    (lambda x, pair: x * 2, "1 outputs instead of 2"),
    (lambda x, pair: (x[None] * 2, x.sum()), r"out has shape \(1, 5\)"),
    (lambda x, pair: (x * NAN, x.sum()), "relative error inf"),
])
def test_every_wrong_backend_is_named(wrong, says):
    with pytest.raises(AssertionError, match=says) as caught:
        check_against_reference({"good": good, "bad": wrong}, reference, cases())
    assert "good on" not in str(caught.value)


def test_backends_cannot_spoil_each_others_input():
    def spoils(x, pair):
        result = good(x.clone(), pair)
        x.zero_()
        pair[0].zero_()
        return result

    check_against_reference({"spoils": spoils, "good": good}, reference, cases())


def test_tolerance_by_narrowest_type():
    def rounded(x, pair):
        return tuple(t.to(torch.bfloat16).to(t.dtype) for t in good(x, pair))

    check_against_reference({"half": rounded}, reference, cases(torch.bfloat16))
    with pytest.raises(AssertionError):
        check_against_reference({"half": rounded}, reference, cases(torch.float32))
    with pytest.raises(ValueError, match="no entry for float32"):
        check_against_reference({"half": rounded}, reference, cases(), rtol={torch.bfloat16: 1})


def test_comparing_nothing_is_an_error():
    with pytest.raises(ValueError, match="nothing was compared"):
        check_against_reference({}, reference, cases())
    with pytest.raises(ValueError, match="nothing was compared"):
        check_against_reference({"a": good}, reference, [])
