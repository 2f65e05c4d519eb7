"""Detectors of MMDetection label, too."""

import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config

from mmkd.errors import ConfigError
from mmkd.label.detector import MMDetector, build_detector
from tests.helpers import toy
from tests.helpers.lively import lively, photos


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    """The config and the checkpoint of a detector that finds something."""
    folder = tmp_path_factory.mktemp('network')
    cfg = toy.plain(folder, toy.RETINANET)
    path = toy.write(cfg, folder / 'detector.py')
    torch.manual_seed(0)
    model = lively(toy.detector(cfg.model), (96, 128))
    meta = dict(dataset_meta=dict(classes=toy.stock_classes()))
    checkpoint = folder / 'detector.pth'
    torch.save(dict(state_dict=model.state_dict(), meta=meta), checkpoint)
    return str(path), str(checkpoint)


def test_it_finds_what_mmdets_own_call_finds(network):
    config, checkpoint = network
    detector = build_detector(dict(config=config, checkpoint=checkpoint))
    assert isinstance(detector, MMDetector)
    assert list(detector.classes) == toy.stock_classes()
    stock = init_detector(config, checkpoint, device='cpu')
    images = photos(2)
    rgb = [np.ascontiguousarray(image[..., ::-1]) for image in images]
    found = detector.detect(rgb, ['a', 'b'])
    for each, image in zip(found, images, strict=True):
        expected = inference_detector(stock, image).pred_instances
        assert len(expected) > 0
        np.testing.assert_allclose(each.boxes, expected.bboxes, rtol=1e-5)
        np.testing.assert_allclose(each.scores, expected.scores, rtol=1e-5)
        assert each.labels.tolist() == expected.labels.tolist()


def test_classes_as_text_are_handed_over(network, tmp_path, monkeypatch):
    """As mmdet's own inferencer hands them to Grounding DINO and GLIP."""
    cfg = Config.fromfile(network[0])
    steps = cfg.test_dataloader.dataset.pipeline
    steps[-1].meta_keys = (*steps[-1].meta_keys, 'text', 'custom_entities')
    detector = MMDetector(cfg, 'it', network[1], ['cat', 'traffic light'])
    assert detector.classes == ('cat', 'traffic light')
    asked, step = [], detector.model.test_step

    def note(batch):
        asked.extend(batch['data_samples'])
        return step(batch)

    monkeypatch.setattr(detector.model, 'test_step', note)
    detector.detect([np.zeros((32, 32, 3), np.uint8)], ['a'])
    assert asked[0].text == 'cat . traffic light . '
    assert asked[0].custom_entities is True


def test_what_does_not_run_by_itself():
    with pytest.raises(ConfigError, match='--texts is for detectors of MMD'):
        build_detector(dict(type='mmkd.OnnxDetector', file='a'), ['cat'])
