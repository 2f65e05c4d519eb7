"""Gradients of two processes beside those of one with the whole batch.

Run as a script, it is one of the two processes.
"""

import argparse
import contextlib
import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.logging import MessageHub
from mmengine.model import MMDistributedDataParallel
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmkd.core.distiller import build_distiller
from mmkd.detectors.shrink import noise_batch
from tests.helpers import tiny_dense, toy
from tests.helpers import tiny_detectors as tiny
from tests.helpers.several import PREDICTING, described

TOLERANCE = 3e-5
"""Up to here a relative difference is one of rounding in single precision."""
WIDTH, HEIGHT = 128, 96
FULL = (HEIGHT, WIDTH)
TWO = 2  # images of a process

Gradients = dict[str, Tensor]
Differences = dict[str, float]


@dataclass(frozen=True)
class Kind:
    """A whole batch of four images; each process gets two of them.

    All halves are padded to the same size. Otherwise not even plain training
    would be equal, because what a network makes of an image depends on its
    padding.
    """

    objects: Sequence[int]
    sizes: Sequence[tuple[int, int]] = (FULL,) * 4
    scale: float = 1.0
    """Factor of the objects' sides, which are 24 to 60 pixels."""
    ignored: Sequence[int] = ()
    """The images whose objects are marked as ignored (crowds)."""


KINDS: Mapping[str, Kind] = {
    'objects': Kind((2, 3, 1, 2)),
    'one without': Kind((2, 3, 0, 0)),
    'all without': Kind((0, 0, 0, 0)),
    'one and many': Kind((1, 0, 12, 9)),
    'crowds and tiny': Kind((2, 2, 3, 1), scale=0.06, ignored=(0, 1)),
    'padded': Kind(
        (2, 3, 1, 2), sizes=(FULL, (64, 96), (HEIGHT, 64), (32, WIDTH))
    ),
}
"""What can make the processes' shares of a batch unlike each other."""


@dataclass(frozen=True)
class Case:
    """A method with its options between detectors."""

    method: str
    """Its name in ``mmkd``, or '' for plain training."""
    detectors: Sequence[str]
    """Names of configs in this file, one after the other."""
    options: Mapping[str, Any] = field(default_factory=dict)
    apart: str = ''
    """What the processes do on their own, if they are not equal to one."""
    without: str = ''
    """A pattern of the method's losses that are left out."""
    peers: int = 0
    teachers: int = 1
    norms: bool = False
    """Leave the batch norm in the method's layers in training."""
    whole: bool = False
    """Compare the gradients of all losses, the networks' own included."""
    steps: int = 1
    """Batches whose gradients are accumulated."""

    note: str = ''
    """What is special about the case, for the table."""

    @property
    def names(self) -> list[str]:
        parts = [self.method or 'plain training', *self.settings]
        return [f'{", ".join(parts)} on {name}' for name in self.detectors]

    @property
    def settings(self) -> list[str]:
        """The options, and what else is special."""
        options = [f'{k}={v!r}' for k, v in self.options.items()]
        return options + ([self.note] if self.note else [])


OWN = "the networks' own losses, as in plain training"
NORMS = f'batch norm in its own layers, and {OWN}'
STATISTICS = 'statistics of the batch, which are those of a process'
BATCH = 'the relation within a class, which spans the batch of a process'
ROIS = ('faster_rcnn', 'cascade_rcnn')
NECK = ('retinanet', 'faster_rcnn')
PEERS = dict(peers=1, teachers=0)
LAST = (*tiny_dense.LAST, 'retina_cls', 'retina_reg', 'gfl_cls', 'gfl_reg')
LAST = (*LAST, 'conv_cls', 'conv_reg', 'conv_centerness')
"""The predicting layers of all dense heads."""
SURE = dict(score_thr=0.6, doubtful_thr=0.4)
ROI_LAYER = 'roi_head.bbox_head.shared_fcs.1'

CASES = (
    Case('', ('atss',), whole=True),
    Case(
        '',
        ('retinanet', 'fcos', 'paa', 'faster_rcnn'),
        apart='normalisers, or their lower limits, of a process',
        whole=True,
    ),
    Case('CWD', NECK),
    Case('CrossKD', ('retinanet', 'gfl'), dict(layer=1), apart=STATISTICS),
    Case('CrossKD', ('retinanet', 'gfl'), dict(layer=1, align='image')),
    Case('CrossKD', ('atss',), dict(layer=1, align=None, quality_weight=1.0)),
    Case('DIST', ('retinanet', 'faster_rcnn'), apart=BATCH),
    Case('DIST', ('retinanet', *ROIS), dict(per_image=True)),
    Case('DIST', ('fcos',), dict(dense='priors'), apart=BATCH),
    Case('DIST', ('fcos',), dict(dense='priors', per_image=True)),
    Case('DKD', ('fcos', *ROIS)),
    Case('FBKD', NECK, apart=STATISTICS),
    Case('FBKD', NECK, dict(per_image=True)),
    Case('FGD', NECK),
    Case('FasterRCNNDistillation', ROIS),
    Case('FeatureHint', NECK),
    Case('FeatureHint', ('faster_rcnn',), dict(source=ROI_LAYER)),
    Case('FoundationFeatures', NECK),
    Case('KD', ('retinanet', 'atss', 'fcos', 'yolox', *ROIS)),
    Case('KD', NECK, teachers=2, note='a list of two teachers'),
    Case('KD', NECK, steps=2, note='gradients of two batches accumulated'),
    Case('LAD', ('paa', 'tood', 'yolox'), whole=True, apart=OWN),
    Case('LD', ('gfl',), dict(kd_weight=10.0)),
    Case('LD', ('gfl',), dict(kd_weight=10.0, normalize=True)),
    Case(
        'LD',
        ('gfl',),
        dict(kd_weight=10.0, normalize=False),
        apart='sums over the batch of a process, as in the official code',
    ),
    Case('MGD', NECK, apart='random masks, which each process draws itself'),
    Case('MGD', NECK, dict(mask_ratio=0.0)),
    Case('PKD', NECK, apart=STATISTICS),
    Case('PKD', NECK, dict(per_image=True)),
    Case('SoLAD', ('paa',), note='without the losses that it steers'),
    Case('SoftLabelDistillation', ('retinanet', 'atss')),
    Case('SoftLabelDistillation', ('atss',), dict(task_loss=False)),
    Case('TaT', NECK),
    Case('TaT', NECK, dict(per_image=False), apart=STATISTICS),
    Case('TeacherBoxes', ('atss',), SURE, whole=True),
    Case('TeacherBoxes', NECK, SURE, whole=True, apart=OWN),
    Case('CoLAD', ('paa',), whole=True, apart=OWN, **PEERS),
    Case('DCM', ('fcos',), apart=OWN, **PEERS),
    Case(
        'DCM',
        ('fcos',),
        without='aux',
        note='without the task losses of its heads',
        **PEERS,
    ),
    Case('DML', ('retinanet', 'fcos', *ROIS), **PEERS),
    Case('DML', ('atss', *ROIS), dict(box_weight=1.0), **PEERS),
    Case('FFSD', ('fcos',), apart=NORMS, norms=True, peers=2, teachers=0),
    Case(
        'FFSD',
        ('fcos',),
        without='fusion$',
        peers=2,
        teachers=0,
        note='batch norm frozen, without the task loss of its head',
    ),
    Case('OneTeacherSeveralStudents', NECK, peers=2),
)


def configs() -> dict[str, Callable[[], Any]]:
    names = ('retinanet', 'fcos', 'gfl', 'faster_rcnn', 'cascade_rcnn')
    found = {name: getattr(tiny, name) for name in names}
    for name in ('atss', 'paa', 'tood', 'rtmdet', 'yolox'):
        found[name] = getattr(tiny_dense, name)
    return found


def config(name: str) -> Any:
    """A tiny detector's config that samples the same boxes every time."""
    model = configs()[name]()
    if 'rpn' in model.get('train_cfg', {}):
        train = model.train_cfg
        rcnn = train.rcnn if isinstance(train.rcnn, list) else [train.rcnn]
        for stage in (train.rpn, *rcnn):
            stage.sampler.type = 'ToyFirstSampler'
    return model


def build(case: Case, detector: str) -> nn.Module:
    """A student with its distiller attached; nothing of it is random."""
    model = config(detector)
    student = drawn(model, 1)
    if case.method:
        distil(case, model, student)
    for name, module in student.named_modules():
        if isinstance(module, _BatchNorm) and not (
            case.norms and 'methods' in name
        ):
            module.eval()
            module.train = lambda mode=True, kept=module: kept
    return student


def distil(case: Case, model: Any, student: nn.Module) -> None:
    """Attach the case's distiller."""
    cfg: dict[str, Any] = dict(
        methods=dict(m=dict(type=f'mmkd.{case.method}', **case.options)),
        peers={
            f'peer{n}': dict(config=dict(model=model))
            for n in range(case.peers)
        },
    )
    teachers = [described(model, tiny.CLASSES)] * case.teachers
    if teachers:
        cfg['teacher'] = teachers if len(teachers) > 1 else teachers[0]
    distiller = build_distiller(cfg, student, tiny.CLASSES)
    for seed, teacher in enumerate(distiller.networks.values(), 10):
        trained = spread(tiny.build(model, seed=seed), seed)
        teacher.model.load_state_dict(trained.state_dict())
    for seed, peer in enumerate(distiller.peers.values(), 20):
        peer.model.load_state_dict(drawn(model, seed).state_dict())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in distiller.methods.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * noise)  # some layers start at 0
    distiller.attach()


def drawn(model: Any, seed: int) -> nn.Module:
    """A network whose predictions differ, with running statistics."""
    return spread(tiny.build(model, seed=seed), seed).train()


def spread(network: Any, seed: int) -> nn.Module:
    """Draw the predicting layers; the rest stays as it is."""
    # TOOD assigns by predictions from its fifth epoch on.
    MessageHub.get_current_instance().update_info('epoch', 9)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if name.endswith('weight') and any(
            part in PREDICTING or part in LAST for part in name.split('.')
        ):
            noise = torch.randn(parameter.shape, generator=generator)
            # The features of YOLOX's coarse level are large.
            scale = 0.02 if 'multi_level' in name else 0.1
            parameter.data.copy_(scale * noise)
    return tiny.in_eval(network)


def batch_of(kind: Kind, seed: int) -> dict[str, list]:
    """The four images, as a data loader gives them."""
    batch = noise_batch(kind.sizes, kind.objects, seed=seed)
    for sample in batch['data_samples']:
        boxes = sample.gt_instances.bboxes
        boxes[:, 2:] = boxes[:, :2] + kind.scale * (
            boxes[:, 2:] - boxes[:, :2]
        )
        height, width = sample.img_shape
        boxes[:, 0::2].clamp_(max=width)
        boxes[:, 1::2].clamp_(max=height)
    for image in kind.ignored:
        sample = batch['data_samples'][image]
        sample.ignored_instances = sample.gt_instances
        sample.gt_instances = sample.gt_instances[:0]
    return batch


def gradients(case: Case, model: nn.Module, kind: Kind) -> Gradients:
    """The gradients of a step, as this process has them before the step."""
    student = getattr(model, 'module', model)
    student.zero_grad()
    for step in range(case.steps):
        batch = batch_of(kind, seed=step)
        if student is not model:
            half = slice(TWO * dist.get_rank(), TWO * (dist.get_rank() + 1))
            batch = {key: value[half] for key, value in batch.items()}
        data = student.data_preprocessor(batch, training=True)
        last = step == case.steps - 1 or student is model
        with contextlib.nullcontext() if last else model.no_sync():
            losses = model(**copy.deepcopy(data), mode='loss')
            total(case, losses).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in student.named_parameters()
        if p.requires_grad
    }


def total(case: Case, losses: Mapping[str, Any]) -> Tensor:
    """The sum of the losses that are compared; the rest counts 0 times."""
    parts = []
    for name, loss in losses.items():
        if 'loss' not in name:
            continue
        counts = case.whole or (
            name.startswith('m.loss_')
            and not (case.without and re.search(case.without, name))
        )
        for part in loss if isinstance(loss, list) else [loss]:
            parts.append(part.mean() * float(counts))
    return torch.stack(parts).sum()


def part_of(name: str) -> str:
    """The network, or the layers of the method, that a parameter is in."""
    if name.startswith('distillation.peers.'):
        return name.split('.')[2]
    return 'method' if name.startswith('distillation.') else 'student'


def difference(found: Gradients, expected: Gradients) -> float:
    """The largest relative difference (L2 norm) of a part's gradient."""
    assert found.keys() == expected.keys()
    squares: dict[str, list[float]] = {}
    for name, gradient in expected.items():
        square = squares.setdefault(part_of(name), [0.0, 0.0])
        square[0] += (found[name] - gradient).double().square().sum().item()
        square[1] += gradient.double().square().sum().item()
    return max(
        (apart / size) ** 0.5 if size else float(apart > 0)
        for apart, size in squares.values()
    )


def chosen(pattern: str) -> list[tuple[str, Case, str]]:
    """Name, case and detector of those that a pattern selects."""
    return [
        (name, case, detector)
        for case in CASES
        for name, detector in zip(case.names, case.detectors, strict=True)
        if re.search(pattern, name)
    ]


def measured(folder: Path, pattern: str = '') -> dict[str, Differences]:
    """Start both processes; each case's difference for each kind of batch."""
    script = 'tests/helpers/processes.py'
    jobs = [
        toy.Job(folder / f'log{rank}', script, str(rank), str(folder), pattern)
        for rank in range(2)
    ]
    for job in jobs:
        assert job.wait() == 0, job.text()[-3000:]
    return {
        name: toy.load(folder / f'{number}.pth')
        for number, (name, *_) in enumerate(chosen(pattern))
    }


def main() -> None:
    """Be one of two processes.

    Each first computes every other case alone, with the whole batch.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument('rank', type=int)
    parser.add_argument('folder', type=Path)
    parser.add_argument('pattern')
    args = parser.parse_args()
    models = [
        (name, case, build(case, detector))
        for name, case, detector in chosen(args.pattern)
    ]
    for number, (_, case, model) in enumerate(models):
        if number % 2 == args.rank:
            path = args.folder / f'{number}.pth'
            torch.save(all_kinds(case, model), path)
    dist.init_process_group(
        'gloo',
        init_method=f'file://{args.folder / "store"}',
        rank=args.rank,
        world_size=2,
    )
    for number, (name, case, model) in enumerate(models):
        wrapped = MMDistributedDataParallel(model, find_unused_parameters=True)
        found = all_kinds(case, wrapped)
        if number % 2 == args.rank:
            path = args.folder / f'{number}.pth'
            expected = toy.load(path)
            result = {k: difference(found[k], expected[k]) for k in KINDS}
            torch.save(result, path)
            print(name, *(f'{each:.1e}' for each in result.values()))
    dist.barrier()
    dist.destroy_process_group()


def all_kinds(case: Case, model: nn.Module) -> dict[str, Gradients]:
    return {name: gradients(case, model, kind) for name, kind in KINDS.items()}


def wrong(found: Mapping[str, Differences]) -> list[str]:
    """What was measured and does not agree with what the case says."""
    cases = {name: case for name, case, _ in chosen('')}
    return [
        f'{name}: {differences}'
        for name, differences in found.items()
        if (max(differences.values()) > TOLERANCE) != bool(cases[name].apart)
    ]


if __name__ == '__main__':
    main()
