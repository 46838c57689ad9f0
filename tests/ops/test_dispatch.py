from __future__ import annotations

import pytest
import torch

from deeplab_fast.errors import UserError
from deeplab_fast.ops import confusion_matrix, dispatch, native

LABELS = torch.zeros(4, dtype=torch.uint8)


def backend(why_not: str | None, *measured: str) -> dispatch.Backend:
    return dispatch.Backend(lambda *_: None, lambda *_: why_not, measured)


@pytest.fixture
def op(monkeypatch):
    """Registers a table under the name `toy` for one test."""

    def add(**table: dispatch.Backend) -> None:
        monkeypatch.setitem(dispatch.OPS, "toy", dispatch.Op(print, table, lambda device: (LABELS,)))

    monkeypatch.setattr(dispatch, "requested", dict)
    return add


def test_auto_takes_the_first_without_an_objection(op):
    op(first=backend("too small", "cpu"), second=backend(None, "cpu"), third=backend(None, "cpu"))
    assert dispatch.choose("toy", [LABELS]) == "second"
    assert dispatch.explain("toy", LABELS) == {"first": "too small", "second": None, "third": None}


def test_auto_prefers_a_measured_backend(op):
    op(first=backend(None, "cuda"), second=backend(None, "cpu"))
    assert dispatch.choose("toy", [LABELS]) == "second"
    op(first=backend(None), second=backend("no"))
    assert dispatch.choose("toy", [LABELS]) == "first"


def test_a_named_backend_runs_or_raises_its_reason(op):
    op(first=backend("needs sm_90", "cpu"), second=backend(None, "cpu"), third=backend(None, "cpu"))
    assert dispatch.choose("toy", [LABELS], "third") == "third"
    with pytest.raises(UserError, match="toy cannot run on the backend 'first': needs sm_90"):
        dispatch.choose("toy", [LABELS], "first")


def test_no_backend_at_all_names_every_reason(op):
    op(first=backend("needs sm_90"), second=backend("needs bf16"))
    with pytest.raises(UserError, match=r"\(first: needs sm_90; second: needs bf16\)"):
        dispatch.choose("toy", [LABELS])


def test_the_variable_names_a_backend_and_the_caller_overrules_it(op, monkeypatch):
    op(first=backend(None, "cpu"), second=backend("needs sm_90", "cpu"))
    monkeypatch.setattr(dispatch, "requested", lambda: {"toy": "second"})
    assert dispatch.choose("toy", [LABELS], "first") == "first"
    with pytest.raises(UserError, match="needs sm_90"):
        dispatch.choose("toy", [LABELS])


def test_the_variable_is_parsed(op):
    op(fast=backend(None, "cpu"), reference=backend(None, "cpu"))
    assert dispatch.parse_request("") == dispatch.parse_request("auto") == {}
    assert dispatch.parse_request("fast") == {"toy": "fast"}
    assert dispatch.parse_request("reference") == dict.fromkeys(dispatch.OPS, "reference") | {"toy": "reference"}
    assert dispatch.parse_request("toy=fast, confusion_matrix=auto") == {
        "toy": "fast",
        "confusion_matrix": "auto",
    }
    with pytest.raises(UserError, match="is 'quick'; expected one of fast, native, reference, triton, or op=backend"):
        dispatch.parse_request("quick")
    with pytest.raises(UserError, match="names the op 'tay'; expected one of .*confusion_matrix, .*toy"):
        dispatch.parse_request("tay=fast")
    with pytest.raises(UserError, match="asks for toy=native; toy has fast, reference and auto"):
        dispatch.parse_request("toy=native")


def test_the_variable_is_read_from_the_environment(monkeypatch):
    dispatch.requested.cache_clear()
    monkeypatch.setenv(dispatch.VARIABLE, "confusion_matrix=reference")
    try:
        confusion_matrix(LABELS, LABELS, 2)
        assert dispatch.last_backend("confusion_matrix") == "reference"
        monkeypatch.setenv(dispatch.VARIABLE, "native")  # read once
        assert dispatch.requested() == {"confusion_matrix": "reference"}
    finally:
        dispatch.requested.cache_clear()


def test_without_the_extension_auto_runs_the_reference(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: None)
    confusion_matrix(LABELS, LABELS, 2)
    assert dispatch.last_backend("confusion_matrix") == "reference"
    with pytest.raises(UserError, match="'native': deeplab_fast._C is not built"):
        confusion_matrix(LABELS, LABELS, 2, backend="native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_op_of_lists_has_the_kernels_of_the_op_of_one(dtype):
    """A list of weights is cast as a weight is."""
    x = torch.zeros(1, 2, 3, 3, dtype=dtype)
    with dispatch.requesting(""):
        one, many = (dispatch.has_kernel(name, x) for name in ("separable_conv", "separable_conv_concat"))
    assert one == many
    with dispatch.requesting("separable_conv_concat=reference"):
        assert not dispatch.has_kernel("separable_conv_concat", x)


def test_native_is_chosen_on_the_cpu_where_it_is_built():
    if native.load() is None:
        pytest.skip("deeplab_fast._C is not built")
    confusion_matrix(LABELS, LABELS, 2)
    assert dispatch.last_backend("confusion_matrix") == "native"
