"""The data of `mmkd distill --data`: folders in a known layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.data import read_json, read_voc_xml
from mmkd.errors import ConfigError

FOLDERS = {'coco': 'data/coco', 'voc': 'data/VOCdevkit/VOC2007'}
"""Where ``mmkd prepare`` leaves what it makes."""
VOC_SPLITS = (('train', 'val'), ('trainval', 'test'), ('train', 'test'))


@dataclass
class Data:
    """Training and validation data: the entries of two data sets' configs."""

    classes: tuple[str, ...]
    train: dict[str, Any]
    val: dict[str, Any]
    metric: dict[str, Any]


def find_data(name: str) -> Data:
    """The data of ``coco``, ``voc`` or a folder in one of these layouts.

    COCO's layout: ``annotations/*train*.json`` and ``*val*.json``, and
    folders of images that the files are named after
    (``instances_train2017.json``, ``train2017``). VOC's: ``Annotations``,
    ``JPEGImages`` and ``ImageSets/Main``, there or one folder below.

    Raises:
        ConfigError: If the folder is none of them.
    """
    root = Path(FOLDERS.get(name, name)).absolute()
    for folder in (root, *sorted(p for p in root.glob('*') if p.is_dir())):
        if (folder / 'ImageSets' / 'Main').is_dir():
            return _voc(folder)
    if (root / 'annotations').is_dir():
        return _coco(root)
    remedy = (
        f'Run `mmkd prepare {name}`.'
        if name in FOLDERS
        else 'Expected annotations/*.json (COCO) or ImageSets/Main (VOC).'
    )
    raise ConfigError(f'{root} holds no data in a known layout. {remedy}')


def _coco(root: Path) -> Data:
    found: dict[str, dict[str, Any]] = {}
    for split in ('train', 'val'):
        files = sorted((root / 'annotations').glob(f'*{split}*.json'))
        files = [f for f in files if 'instances' in f.name] or files
        if not files:
            raise ConfigError(
                f'{root}/annotations has no file of the split "{split}" '
                f'(*{split}*.json).'
            )
        names = (files[0].stem.removeprefix('instances_'), split, 'images')
        images = next((n for n in names if (root / n).is_dir()), '')
        found[split] = dict(
            type='CocoDataset',
            data_root=f'{root}/',
            ann_file=f'annotations/{files[0].name}',
            data_prefix=dict(img=f'{images}/' if images else ''),
        )
    content = read_json(root / found['train']['ann_file'])
    rows = sorted(content['categories'], key=lambda row: row['id'])
    annotations = str(root / found['val']['ann_file'])
    return Data(
        tuple(row['name'] for row in rows),
        found['train'],
        found['val'],
        dict(type='CocoMetric', metric='bbox', ann_file=annotations),
    )


def _voc(folder: Path) -> Data:
    lists = folder / 'ImageSets' / 'Main'
    for splits in VOC_SPLITS:
        if all((lists / f'{split}.txt').is_file() for split in splits):
            break
    else:
        raise ConfigError(
            f'{lists} has neither train.txt and val.txt, nor trainval.txt '
            'and test.txt.'
        )
    root = folder.parent
    train, val = (
        dict(
            type='VOCDataset',
            data_root=f'{root}/',
            ann_file=f'{folder.name}/ImageSets/Main/{split}.txt',
            data_prefix=dict(sub_data_root=f'{folder.name}/'),
        )
        for split in splits
    )
    names: dict[str, None] = {}
    for line in (lists / f'{splits[0]}.txt').read_text().split():
        path = folder / 'Annotations' / f'{line}.xml'
        for item in read_voc_xml(path.read_bytes(), path).objects:
            names.setdefault(item.name)
    metric = dict(type='VOCMetric', metric='mAP', eval_mode='area')
    return Data(tuple(sorted(names)), train, val, metric)
