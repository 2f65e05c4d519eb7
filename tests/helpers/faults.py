"""Deliberately broken methods, teachers and runners: the known traps."""

import torch
from mmengine.dist import is_distributed
from mmengine.registry import RUNNERS
from torch import nn

from mmkd.core.method import Method
from mmkd.engine.runner import DistillationRunner
from mmkd.registry import METHODS
from mmkd.teachers.frozen import FrozenDetector


class OnNeck(Method):
    """Compares the levels of the necks; subclasses say how."""

    student_paths = teacher_paths = ('neck',)

    def forward(self, student, teacher, batch):
        ours = student.features('neck')
        theirs = teacher.features('neck', student, 'neck')
        losses = [
            self.compare(s, t) for s, t in zip(ours, theirs, strict=True)
        ]
        return {'neck': torch.stack(losses).sum()}

    def compare(self, student, teacher):
        return (student - teacher).square()[..., :1].mean()


@METHODS.register_module()
class SilentlyZero(OnNeck):
    def compare(self, student, teacher):
        return 0 * super().compare(student, teacher)


@METHODS.register_module()
class Detached(OnNeck):
    def compare(self, student, teacher):
        return super().compare(student.detach(), teacher)


@METHODS.register_module()
class ZeroUnderDDP(OnNeck):
    def compare(self, student, teacher):
        return (not is_distributed()) * super().compare(student, teacher)


@METHODS.register_module()
class SpansPadding(OnNeck):
    """A softmax over all positions, padding included."""

    def compare(self, student, teacher):
        s, t = (x.flatten(2).log_softmax(-1) for x in (student, teacher))
        return (t.exp() * (t - s)).sum(-1).mean()


@METHODS.register_module()
class Overflows(OnNeck):
    """Finite in float32; squares of 1000 are not in float16."""

    def compare(self, student, teacher):
        distance = (student[..., :1] - teacher[..., :1]) * 1000
        return (distance * distance).mean() * 1e-6


@METHODS.register_module()
class NaNGradient(OnNeck):
    """In float16 the summand is 0, whose root has an infinite slope."""

    def compare(self, student, teacher):
        nothing = student[..., :1] - student[..., :1].detach()
        root = (nothing * nothing + 1e-12).sqrt()
        return super().compare(student, teacher) + root.mean()


@METHODS.register_module()
class Explodes(OnNeck):
    def compare(self, student, teacher):
        return 1e6 * super().compare(student, teacher)


@METHODS.register_module()
class ExplodesAtFirst(OnNeck):
    """In the first two steps alone."""

    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer('steps', torch.zeros(()))

    def forward(self, student, teacher, batch):
        self.steps += 1
        factor = torch.where(self.steps > 2, 1.0, 1e6)
        losses = super().forward(student, teacher, batch)
        return {name: factor * loss for name, loss in losses.items()}


@METHODS.register_module()
class IsNaN(OnNeck):
    def compare(self, student, teacher):
        return super().compare(student, teacher) * float('nan')


@METHODS.register_module()
class HoldsTeacher(OnNeck):
    """The teacher becomes a child of the student, and is saved with it."""

    def prepare(self, student, teacher):
        self.network = teacher.record.model


@METHODS.register_module()
class GrowsStudent(OnNeck):
    """A layer of its own within the student: a foreign key."""

    def prepare(self, student, teacher):
        student.model.neck.extra = nn.Conv2d(1, 1, 1)

    def compare(self, student, teacher):
        return super().compare(student, teacher)


@METHODS.register_module()
class ChangesStudent(OnNeck):
    """Stays when its weight is 0."""

    def prepare(self, student, teacher):
        student.model.bbox_head.loss_cls.loss_weight = 2.0


@METHODS.register_module()
class TeachesPeersAlone(OnNeck):
    """The student's part of a loss between peers has no gradient."""

    learns_from = 'peers'
    peer_paths = ('neck',)

    def forward(self, student, teacher, batch):
        (peer,) = student.peers.values()
        pairs = zip(
            student.features('neck'), peer.features('neck'), strict=True
        )
        losses = [self.compare(s.detach(), p) for s, p in pairs]
        return {'neck': torch.stack(losses).sum()}


@METHODS.register_module()
class TeachesNobody(TeachesPeersAlone):
    def compare(self, student, teacher):
        return super().compare(student, teacher.detach())


@METHODS.register_module()
class IdleAdapter(OnNeck):
    def prepare(self, student, teacher):
        self.unused = nn.Conv2d(1, 1, 1)


@METHODS.register_module()
class IgnoresClassMap(Method):
    """Class logits one by one, whatever the classes are called."""

    def forward(self, student, teacher, batch):
        (ours, _), (theirs, _) = student.raw('bbox_head'), teacher.raw_dense
        losses = [
            (s - t)[..., :1].square().mean()
            for s, t in zip(ours, theirs, strict=True)
        ]
        return {'cls': torch.stack(losses).sum()}


# ------------------------------------------------------------------- runners


def register(cls):
    RUNNERS.register_module(name=f'Fault{cls.__name__}')(cls)
    return cls


@register
class InitialisesTeacher(DistillationRunner):
    def _init_model_weights(self):
        super()._init_model_weights()
        self.distiller.teacher.model.init_weights()
        nn.init.normal_(self.distiller.teacher.model.backbone.conv1.weight)


@register
class InitialisesStudent(DistillationRunner):
    """After everything has been loaded."""

    def load_or_resume(self):
        super().load_or_resume()
        nn.init.normal_(self.model.backbone.conv1.weight)


@register
class SharesPixels(DistillationRunner):
    """The teacher gets the student's batch as it is."""

    def _attach(self):
        super()._attach()
        self.distiller.teacher.renormalize.needed = False


@register
class KeepsChannelOrder(DistillationRunner):
    def _attach(self):
        super()._attach()
        self.distiller.teacher.renormalize.flip = False


@register
class OnlyNormsInEval(DistillationRunner):
    def _attach(self):
        super()._attach()
        model = self.distiller.teacher.model.train()
        for module in model.modules():
            if 'Norm' in type(module).__name__:
                module.eval()


@register
class MapsByNumber(DistillationRunner):
    def _attach(self):
        super()._attach()
        classes = self.distiller.teacher.class_map
        classes.teacher_index = torch.arange(len(classes.shared))


class Eager(FrozenDetector):
    """Draws random numbers in every step."""

    def view(self, batch):
        torch.rand(1)
        return super().view(batch)


@register
class DrawsNumbers(DistillationRunner):
    def _attach(self):
        super()._attach()
        self.distiller.teacher.__class__ = Eager


@register
class TrainsTeacher(DistillationRunner):
    def _attach(self):
        super()._attach()
        self.distiller.teacher.model.requires_grad_(True)


@register
class SavesTeacher(DistillationRunner):
    """Under a key of its own."""

    def call_hook(self, fn_name, **kwargs):
        super().call_hook(fn_name, **kwargs)
        if fn_name == 'before_save_checkpoint':
            state = self.distiller.teacher.model.state_dict()
            kwargs['checkpoint']['teacher'] = {
                f'teacher.{k}': v for k, v in state.items()
            }
