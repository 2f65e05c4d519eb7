"""The notebook runs from its first cell to its last."""

import importlib.util

import jupytext
import pytest
import torch
from mmdet.models.backbones import MobileNetV2
from nbclient import NotebookClient

from tests.helpers.toy import ROOT

FOLDER = ROOT / 'docs' / 'notebooks'


@pytest.fixture
def drawn(tmp_path):
    """Stand-ins for photos and weights, so that no network is needed."""
    path = FOLDER / 'photos.py'
    spec = importlib.util.spec_from_file_location('photos', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.drawn(tmp_path / 'data' / 'neon', train=24, val=2)
    weights = tmp_path / 'data' / 'mobilenet_v2' / 'imagenet.pth'
    weights.parent.mkdir()
    torch.save(dict(state_dict=MobileNetV2().state_dict()), weights)
    return tmp_path / 'data'


def test_it_runs(drawn, tmp_path, monkeypatch):
    monkeypatch.setenv('MMKD_EPOCHS', '1')
    monkeypatch.setenv('MMKD_DATA', str(drawn))
    monkeypatch.setenv('MMKD_WORK_DIR', str(tmp_path / 'work'))
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    notebook = jupytext.read(FOLDER / 'distil_photos.nb.py')
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name='python3',
        resources={'metadata': {'path': str(FOLDER)}},
    )
    client.execute()
    outputs = [
        output for cell in notebook.cells for output in cell.get('outputs', ())
    ]
    text = ''.join(o['text'] for o in outputs if o.output_type == 'stream')
    assert 'fgd.loss_foreground' in text
    assert 'distilled' in text.rpartition('AP50')[2]
    pictures = [o for o in outputs if 'image/png' in o.get('data', {})]
    assert len(pictures) == 1
