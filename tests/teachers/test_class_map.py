"""The student's classes and pixels as the teacher knows them."""

import pytest
import torch
from mmdet.datasets import CocoDataset, VOCDataset

from mmkd.errors import ConfigError
from mmkd.teachers.class_map import ClassMap
from mmkd.teachers.renormalize import Renormalize
from tests.helpers import tiny_detectors as tiny

# ---------------------------------------------------------- class map


def test_classes_are_mapped_by_name():
    student = ('cat', 'dog', 'cow', 'yak')
    teacher = ('cow', 'bus', 'cat')
    mapped = ClassMap(student, teacher)
    assert not mapped.identical
    assert mapped.shared == ['cat', 'cow']
    assert mapped.student_index.tolist() == [0, 2]
    assert mapped.teacher_index.tolist() == [2, 0]
    # The background is the last label of each.
    assert mapped.to_teacher.tolist() == [2, -1, 0, -1, 3]
    assert mapped.to_student.tolist() == [2, -1, 0]
    assert str(mapped) == '2 shared by name: cat, cow (student 4, teacher 3)'


def test_identical_classes_are_told_from_reordered_ones():
    same = ClassMap(['a', 'b'], ('a', 'b'))
    assert same.identical
    assert str(same) == 'identical (2 classes)'
    assert same.to_teacher.tolist() == [0, 1, 2]
    assert not ClassMap(['a', 'b'], ['b', 'a']).identical


def test_no_shared_class_lists_both():
    with pytest.raises(ConfigError) as error:
        ClassMap(('bus', 'car'), ('cat', 'dog'))
    assert 'Student: bus, car. Teacher: cat, dog.' in str(error.value)


def test_a_class_named_twice_cannot_be_mapped():
    with pytest.raises(ConfigError, match=r'teacher names a class twice \(a'):
        ClassMap(['a', 'b'], ['a', 'b', 'a'])


# ------------------------------------------------------ re-normalisation

PYTORCH = dict(
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
)
CAFFE = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0])
PREPROCESSORS = {
    'pytorch': PYTORCH,
    'caffe': CAFFE,
    'unit': dict(mean=[0, 0, 0], std=[255, 255, 255], bgr_to_rgb=True),
    'none, padded with 114': dict(pad_value=114.0),
    'one mean': dict(mean=[127.5], std=[60.0]),
    'one mean, flipped': dict(mean=[127.5], std=[60.0], bgr_to_rgb=True),
    'other padding': dict(PYTORCH, pad_value=1),
}


def preprocessor(name, divisor=32):
    config = tiny.faster_rcnn()
    config.data_preprocessor = dict(
        type='DetDataPreprocessor',
        pad_size_divisor=divisor,
        **PREPROCESSORS[name],
    )
    return tiny.build(config).data_preprocessor


@pytest.mark.parametrize('of_teacher', PREPROCESSORS)
@pytest.mark.parametrize('of_student', ['pytorch', 'caffe', 'one mean'])
def test_teacher_sees_its_own_preprocessing(of_student, of_teacher):
    ours, theirs = preprocessor(of_student), preprocessor(of_teacher)
    options = dict(sizes=((96, 100), (50, 128), (96, 128)))
    batch = ours(tiny.raw_batch(**options), training=True)
    expected = theirs(tiny.raw_batch(**options), training=True)['inputs']
    inputs, samples = batch['inputs'], batch['data_samples']
    before = inputs.clone()
    convert = Renormalize(ours, theirs)
    result = convert(inputs, samples)
    assert torch.equal(inputs, before)  # the student's batch is its own
    # In units of the teacher's standard deviation.
    unit = expected[2].std()
    torch.testing.assert_close(
        result / unit, expected / unit, atol=1e-5, rtol=0
    )
    assert convert.needed == (of_student != of_teacher)
    assert (result is inputs) == (of_student == of_teacher)


def test_other_padding_granularity_needs_no_conversion():
    ours, theirs = preprocessor('pytorch', 32), preprocessor('pytorch', 1)
    assert not Renormalize(ours, theirs).needed


class TestSpellings:
    VOC = VOCDataset.METAINFO['classes']
    COCO = CocoDataset.METAINFO['classes']

    def test_a_coco_teacher_teaches_all_of_voc(self):
        mapped = ClassMap(self.VOC, self.COCO)
        assert mapped.shared == list(self.VOC)
        assert not mapped.unmatched
        assert len(mapped.unused) == 60
        assert mapped.renamed == dict(
            aeroplane='airplane',
            diningtable='dining table',
            motorbike='motorcycle',
            pottedplant='potted plant',
            sofa='couch',
            tvmonitor='tv',
        )
        sofa, couch = self.VOC.index('sofa'), self.COCO.index('couch')
        assert mapped.to_teacher[sofa] == couch
        assert mapped.to_student[couch] == sofa
        assert 'sofa (couch)' in str(mapped)

    def test_the_same_classes_in_other_spellings_are_identical(self):
        mapped = ClassMap(['sofa', 'Cat'], ['couch', 'cat'])
        assert mapped.identical
        assert mapped.renamed == dict(sofa='couch', Cat='cat')
        assert not ClassMap(['sofa', 'cat'], ['cat', 'couch']).identical
        assert not ClassMap(['sofa'], ['couch', 'cat']).identical

    def test_what_is_given_by_hand_wins(self):
        by_hand = {'sofa': 'bed', 'cat': None, 'pony': 'horse'}
        mapped = ClassMap(
            ['sofa', 'cat', 'pony', 'dog', 'yak'],
            ['couch', 'bed', 'cat', 'horse', 'dog'],
            by_hand,
        )
        assert mapped.shared == ['sofa', 'pony', 'dog']
        assert mapped.teacher_index.tolist() == [1, 3, 4]
        assert mapped.unmatched == ['yak']  # but not the cat
        assert mapped.unused == ['couch', 'cat']

    def test_a_class_that_is_taken_by_hand_is_taken(self):
        mapped = ClassMap(['van', 'car'], ['car', 'bus'], {'van': 'car'})
        assert mapped.shared == ['van']
        assert mapped.unmatched == ['car']

    @pytest.mark.parametrize(
        ('by_hand', 'message'),
        [
            ({'yak': 'cat'}, "the student has no class 'yak'. It has: dog, b"),
            ({'dog': 'yak'}, "the teacher has no class 'yak'. It has: cat, b"),
            ({'dog': 'cat', 'b': 'cat'}, r'two of the student \(cat\)'),
        ],
    )
    def test_wrong_names_by_hand(self, by_hand, message):
        with pytest.raises(ConfigError, match=message):
            ClassMap(['dog', 'b'], ['cat', 'b'], by_hand)
