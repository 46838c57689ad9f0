from __future__ import annotations

import torch

from deeplab_fast import __version__, info
from deeplab_fast.ops import dispatch, native


def test_info_prints_versions_devices_and_the_table(capsys):
    info.main()
    text = capsys.readouterr().out
    assert f"deeplab_fast {__version__}" in text
    assert f"torch {torch.__version__}" in text
    assert native.status() in text
    assert "\ncpu: " in text and "\ncuda" in text
    rows = text.split("\n\n")[-1].splitlines()
    assert rows[0].split() == ["op", "device", "backend", "runs"]
    cells = [row.split(maxsplit=3) for row in rows[1:]]
    expected = [
        [name, kind, backend]
        for name, op in dispatch.OPS.items()
        for kind in ("cpu", "cuda")
        for backend in op.backends
    ]
    assert [cell[:3] for cell in cells] == expected
    assert all(cell[3] in ("auto", "yes") or cell[3].startswith("no: ") for cell in cells)
    assert ["confusion_matrix", "cpu", "native" if native.load() else "reference", "auto"] in cells


def test_without_the_extension_every_no_has_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(native, "load", lambda: None)
    info.main()
    text = capsys.readouterr().out
    assert "native kernels: none, deeplab_fast._C is not built" in text
    assert "native     no: deeplab_fast._C is not built (reinstall with a C++ compiler" in text
    assert "reference  auto" in text


def test_a_package_that_is_missing_is_said_to_be():
    assert info.version_of("torch").partition("+")[0] == torch.__version__.partition("+")[0]
    assert info.version_of("no-such-package-anywhere") == "not installed"
