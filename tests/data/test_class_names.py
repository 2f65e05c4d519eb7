"""The spellings of classes, and the classes of built data sets."""

import json
from types import SimpleNamespace as Made

import pytest
from mmdet.datasets import (
    CocoDataset,
    LVISV1Dataset,
    Objects365V1Dataset,
    Objects365V2Dataset,
    VOCDataset,
)

from mmkd.data.class_names import (
    ALIASES,
    all_classes_of,
    classes_of,
    match_names,
    parts,
    spelling,
)

COCO = CocoDataset.METAINFO['classes']
VOC_OF_COCO = dict(
    aeroplane='airplane',
    diningtable='dining table',
    motorbike='motorcycle',
    pottedplant='potted plant',
    sofa='couch',
    tvmonitor='tv',
)


class TestMatching:
    def test_voc_is_matched_with_coco_whole(self):
        voc = VOCDataset.METAINFO['classes']
        found = match_names(voc, COCO)
        assert found == {name: VOC_OF_COCO.get(name, name) for name in voc}
        assert match_names(COCO, voc)['couch'] == 'sofa'

    @pytest.mark.parametrize(
        ('theirs', 'ours'),
        [
            # LVIS
            ('television_set', 'tv'),
            ('wineglass', 'wine glass'),
            ('car_(automobile)', 'car'),
            ('bus_(vehicle)', 'bus'),
            ('train_(railroad_vehicle)', 'train'),
            ('orange_(fruit)', 'orange'),
            ('mouse_(computer_equipment)', 'mouse'),
            ('laptop_computer', 'laptop'),
            ('cellular_telephone', 'cell phone'),
            ('ski', 'skis'),
            ('fireplug', 'fire hydrant'),
            # Open Images
            ('Mobile phone', 'cell phone'),
            ('Kitchen & dining room table', 'dining table'),
            ('Flying disc', 'frisbee'),
            # Objects365
            ('Dinning Table', 'dining table'),
            ('Moniter/TV', 'tv'),
            ('Potted Plant', 'potted plant'),
            ('Handbag/Satchel', 'handbag'),
            ('Bowl/Basin', 'bowl'),
            ('Orange/Tangerine', 'orange'),
        ],
    )
    def test_known_spellings(self, theirs, ours):
        others = [name for name in COCO if name != ours]
        assert match_names([ours], [theirs, *others]) == {ours: theirs}

    def test_every_class_of_coco_in_objects365_that_is_spelt_alike(self):
        theirs = Objects365V1Dataset.METAINFO['classes']
        found = match_names(COCO, theirs)
        assert found['tv'] == 'tv'
        missing = [name for name, match in found.items() if match is None]
        assert missing == ['bird', 'sports ball']

    def test_every_class_of_coco_in_lvis_that_is_spelt_alike(self):
        found = match_names(COCO, LVISV1Dataset.METAINFO['classes'])
        missing = [name for name, match in found.items() if match is None]
        assert missing == ['sports ball', 'hot dog', 'potted plant']

    def test_voc_in_all_that_name_its_classes(self):
        voc = VOCDataset.METAINFO['classes']
        for other in (LVISV1Dataset, Objects365V2Dataset):
            found = match_names(voc, other.METAINFO['classes'])
            missing = {name for name, match in found.items() if not match}
            assert missing <= {'bird', 'pottedplant'}

    def test_classes_of_coco_stay_apart(self):
        assert len({spelling(name) for name in COCO}) == 80
        assert match_names(COCO, COCO) == dict(zip(COCO, COCO, strict=True))

    def test_the_table_names_no_class_twice(self):
        first = [names[0] for names in ALIASES]
        assert set(first) <= set(COCO)
        others = [name for names in ALIASES for name in names[1:]]
        assert len(set(others)) == len(others)
        assert not set(others) & set(COCO)

    def test_an_equal_name_comes_first(self):
        found = match_names(['sofa', 'couch'], ['couch', 'sofa'])
        assert found == {'sofa': 'sofa', 'couch': 'couch'}
        assert match_names(['couch'], ['sofa', 'couch'])['couch'] == 'couch'

    def test_what_two_classes_are_spelt_like_is_not_guessed(self):
        # In Open Images, "Mouse" is the animal.
        animals = ['Mouse', 'Computer mouse', 'Cat']
        found = match_names(['mouse', 'cat'], animals)
        assert found == {'mouse': None, 'cat': 'Cat'}
        found = match_names(['Cat', 'CAT'], ['cat'])
        assert found == {'Cat': None, 'CAT': None}


class TestAliases:
    """Names that mean the same, from the user."""

    @pytest.mark.parametrize(
        ('ours', 'theirs'),
        [('bike', 'bicycle'), ('bicycle', 'bike'), ('Bike', 'BI-CYCLE')],
    )
    def test_they_match_in_either_direction(self, ours, theirs):
        assert match_names([ours], [theirs]) == {ours: None}
        found = match_names([ours], [theirs], dict(bike='bicycle'))
        assert found == {ours: theirs}

    def test_two_aliases_of_a_class_match_each_other(self):
        aliases = dict(bike='bicycle', velo='bicycle')
        assert match_names(['bike'], ['velo'], aliases) == {'bike': 'velo'}
        aliases = dict(bike='velo', bicycle='bike')
        assert match_names(['velo'], ['bicycle'], aliases) == {
            'velo': 'bicycle'
        }

    @pytest.mark.parametrize(
        'aliases', [dict(settee='sofa'), dict(sofa='settee')]
    )
    def test_known_spellings_stay_joined(self, aliases):
        for name in ('couch', 'sofa', 'Sofa'):
            found = match_names([name], ['settee'], aliases)
            assert found == {name: 'settee'}
        assert match_names(['couch'], ['sofa'], aliases) == {'couch': 'sofa'}

    def test_other_names_are_left_alone(self):
        aliases = dict(bike='bicycle', settee='sofa')
        assert match_names(COCO, COCO, aliases) == match_names(COCO, COCO)
        assert spelling('tvmonitor', aliases) == spelling('tv')
        assert spelling('sofa') == spelling('couch') != spelling('settee')

    def test_names_that_it_makes_equal_are_not_guessed(self):
        found = match_names(
            ['car', 'van'], ['auto'], dict(van='car', auto='car')
        )
        assert found == {'car': None, 'van': None}


class TestDataSets:
    def set_of(self, *classes):
        return Made(metainfo=dict(classes=classes))

    def test_parts_of_nested_wrappers(self):
        a, b = [1], [2]
        joined = Made(datasets=[Made(dataset=a), Made(datasets=[b])])
        assert list(parts(Made(dataset=[joined]))) == [[joined]]
        assert list(parts(joined)) == [a, b]

    def test_shorter_lists_have_to_be_the_beginning(self):
        joined = Made(
            datasets=[self.set_of('Person'), self.set_of('person', 'car')]
        )
        assert all_classes_of(joined) == ('person', 'car')
        joined.datasets.append(self.set_of('car'))
        with pytest.raises(ValueError, match='car'):
            all_classes_of(joined)

    def test_a_data_set_may_have_no_classes(self):
        assert all_classes_of(Made(metainfo={})) is None
        assert all_classes_of(Made()) is None
        assert all_classes_of(Made(metainfo=dict(classes='cat'))) == ('cat',)

    @pytest.mark.parametrize('indent', [None, 2])
    def test_labels_have_the_order_of_the_file(self, tmp_path, indent):
        path = tmp_path / 'train.json'
        names = ('person', 'chair', 'bowl', 'yak')
        content = dict(
            categories=[
                dict(id=7 - i, name=name) for i, name in enumerate(names)
            ],
            images=[
                dict(id=i, file_name='x' * 1000, width=9, height=9)
                for i in range(100)
            ],
        )
        path.write_text(json.dumps(content, indent=indent))
        dataset = CocoDataset(
            ann_file=str(path),
            metainfo=dict(classes=('bowl', 'person', 'zebra', 'chair')),
            data_prefix=dict(img=''),
            pipeline=[],
        )
        # mmdet's own labels: of the ids 7, 6, 5 the first is person
        assert dataset.cat2label == {7: 0, 6: 1, 5: 2}
        assert classes_of(dataset) == ('person', 'chair', 'bowl', 'zebra')


def test_the_page_shows_the_table(repo_root):
    page = (repo_root / 'docs' / 'how_to' / 'classes.md').read_text()
    rows = [line for line in page.splitlines() if line.startswith('| ')][1:]
    cells = [row.strip('| ').split(' | ') for row in rows]
    shown = [(first, *others.split(', ')) for first, others in cells]
    assert shown == list(ALIASES)
