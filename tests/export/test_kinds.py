"""Each kind of detector that the page lists as one that exports, exports."""

import pytest

from mmkd.export.check import check
from tests.export.kinds import KINDS, exported, pictures

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')


@pytest.mark.slow
@pytest.mark.parametrize('name', KINDS)
def test_onnxruntime_finds_what_pytorch_finds(name):
    model, canvas, graph = exported(name, KINDS[name])
    found = check(model, graph, canvas, pictures(4))
    assert found.boxes > 20
    assert found.same, found
    assert found.score < 1e-3
