"""What a training says at its end."""

from mmkd.engine.next_steps import next_steps


def test_the_best_checkpoint_is_tested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'it is'
    folder.mkdir()
    config = str(folder / 'a.py')
    assert next_steps(config, str(folder)) == []
    (folder / 'epoch_2.pth').write_bytes(b'weights')
    (folder / 'last_checkpoint').write_text(str(folder / 'epoch_2.pth'))
    assert next_steps(config, str(folder), compare_with='/other') == [
        'Next:',
        "  mmkd test 'it is/a.py' 'it is/epoch_2.pth'",
        "  mmkd report /other 'it is'",
        "  mmkd export 'it is/a.py' 'it is/epoch_2.pth' --onnx",
    ]
    (folder / 'best_coco_bbox_mAP_epoch_1.pth').write_bytes(b'weights')
    lines = next_steps(config, str(folder))
    best = 'it is/best_coco_bbox_mAP_epoch_1.pth'
    assert lines[0] == (
        f'The best checkpoint is {best}, the last it is/epoch_2.pth.'
    )
    assert lines[2] == f"  mmkd test 'it is/a.py' '{best}'"
