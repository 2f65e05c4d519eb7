"""With the 1,203 classes of LVIS, a method needs little memory of its own.

Run with ``-s``, it prints the table in ``docs/performance.md``.
"""

import pytest
import torch

from mmkd.core.distiller import build_distiller
from tests.helpers import tiny_dense
from tests.helpers import tiny_detectors as tiny
from tests.helpers.allocations import peak

CLASSES = tuple(f'class {number}' for number in range(1203))
PAIRS = {
    'KD': (tiny.retinanet, {}, 1.10),
    'SoftLabelDistillation': (tiny.retinanet, {}, 1.10),
    'CrossKD': (tiny.gfl, dict(layer=1), 1.10),
    'SoLAD': (tiny_dense.paa, {}, 1.10),
}
"""The student, the method's options, and how much it may need in all."""


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:THE TEACHER IS UNTRAINED')
@pytest.mark.parametrize('method', PAIRS)
def test_beside_the_student_and_the_teachers_outputs(method):
    config, options, limit = PAIRS[method]
    config = tiny.merged(config(), bbox_head=dict(num_classes=len(CLASSES)))
    student = tiny_dense.build(config)
    batch = tiny.batch_for(student, sizes=((256, 320),), objects=8)
    metainfo = dict(metainfo=dict(classes=CLASSES))
    source = dict(model=config, test_dataloader=dict(dataset=metainfo))
    cfg = dict(
        teacher=dict(config=source, checkpoint=None),
        methods=dict(m=dict(type=f'mmkd.{method}', **options)),
    )
    distiller = build_distiller(cfg, student, CLASSES)

    def step():
        student.zero_grad()
        student.parse_losses(student.loss(*batch))[0].backward()

    step()
    plain = peak(step)
    with torch.no_grad():
        model = distiller.teacher.model
        maps = model.bbox_head(model.extract_feat(batch[0]))
    outputs = sum(level.nbytes for level in maps[0])
    distiller.attach()
    step()
    distilled = peak(step)
    ratio = distilled / (plain + outputs)
    sizes = [f'{size / 2**20:.0f}' for size in (plain, outputs, distilled)]
    print(f'| {method} | {" | ".join(sizes)} | {ratio:.2f} |')
    assert ratio < limit
