"""Co-learning label-assignment distillation (CoLAD)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from mmkd.core.method import Method
from mmkd.data.batch import Batch
from mmkd.detectors.assignment.colearning import find_indicator
from mmkd.detectors.assignment.fit import dense_facts, is_paa
from mmkd.detectors.assignment.paa import check_stock_paa
from mmkd.detectors.assignment.shared import SharedAssignment
from mmkd.detectors.dense_checks import check_same_priors
from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError
from mmkd.peers.view import networks_of
from mmkd.registry import METHODS
from mmkd.teachers.view import TeacherView
from mmkd.utils import Official

from .lad import BOX_WEIGHTINGS, CODE


@METHODS.register_module(name=['CoLAD', 'CoLearningAssignment'])
class CoLAD(Method):
    r"""CoLAD: networks that train together on one shared assignment.

    The student and its peers each train by their own stock PAA loss, on the
    same positives. For every image, object and level, the costs of the
    pre-assigned candidates are those of the network with the larger
    indicator (:func:`.switch`). The rest is PAA: the cheapest candidates of
    each level are joined, so one mixture can hold costs of several networks.

    The networks may differ in depth and width, but not in their priors. Each
    starts from its own initialisation or checkpoint. The method is only for
    heads of PAA, because other dynamic assigners do not expose their costs.

    The share of the groups that a network has decided is logged as
    ``<method>.share_<network>``.

    Source: Nguyen et al., "Improving Object Detection by Label Assignment
    Distillation", WACV 2022, https://arxiv.org/abs/2108.10520. Its official
    code (cybercore-co-ltd/CoLAD) fails on an image without candidates, and on
    one where no object has two of them on a level. With equal indicators its
    second network provides the costs; here it is the student. The published
    46.0 AP (test-dev) belongs to another pair, a ResNet-101 with COP
    (``mmkd.COPHead``) beside a ResNet-50 that starts
    from trained weights, for 24 epochs at several scales.

    Args:
        indicator: ``'std_mean'``, ``'fisher'``, or the name of a function in
            ``mmkd.INDICATORS``.
        box_weighting: See :class:`~mmkd.methods.lad.LAD`.
        keep_single: See :class:`~mmkd.methods.lad.LAD`.
        loss_weight: 0 switches the sharing off, and each network trains
            alone.

    Raises:
        ConfigError: If an option is unknown or the networks do not fit.
    """

    learns_from: ClassVar[str] = 'peers'
    steers = True
    official = (
        Official(
            code=CODE,
            compared='tests/methods/test_colad.py::TestOfficialCode',
            options=dict(
                indicator='std_mean', box_weighting='none', keep_single=False
            ),
            differs='Equal indicators are decided for the student.',
        ),
    )

    def __init__(
        self,
        *,
        indicator: str = 'std_mean',
        box_weighting: str = 'iou',
        keep_single: bool = False,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        self.check_choice(BOX_WEIGHTINGS, box_weighting=box_weighting)
        self.indicator = find_indicator(
            indicator, f'{type(self).__name__}.indicator'
        )
        self.box_weighting, self.keep_single = box_weighting, keep_single

    def prepare(self, student: StepRecord, teacher: TeacherView) -> None:
        name = type(self).__name__
        for role, record in networks_of(student).items():
            facts = dense_facts(record.facts, name)
            if not is_paa(facts.head):
                raise ConfigError(
                    f'{name} fits PAA heads; the {role} has {facts.kind}.'
                )
            check_stock_paa(facts.head, f'{name} ({role})')
            first = dense_facts(student.facts, name)
            check_same_priors(first, facts, name, shapes=True)

    @contextmanager
    def steer(
        self, student: StepRecord, teacher: TeacherView, batch: Batch
    ) -> Iterator[None]:
        heads = {
            name: dense_facts(record.facts, type(self).__name__)
            for name, record in networks_of(student).items()
        }
        shared = SharedAssignment(
            heads,
            self.indicator,
            weighted_boxes=self.box_weighting == 'iou',
            keep_single=self.keep_single,
        )
        with shared.steering():
            yield
        self.statistics = {
            f'share_{name}': share
            for name, share in zip(heads, shared.switched.share, strict=True)
        }
