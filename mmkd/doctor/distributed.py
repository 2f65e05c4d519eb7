"""A step that is wrapped for distributed training."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as torch_dist
from mmengine.model import MMDistributedDataParallel
from torch import Tensor

from .conditions import SECTION, TOLERANCE, differing
from .patient import Patient
from .report import some


def check_distributed(patient: Patient) -> None:
    """Check that every loss is the same in a distributed run."""
    if torch_dist.is_initialized():
        return
    plain = _values(patient.distilled_step().distilled)
    with group_of_one():
        wrapped = _wrapped_losses(patient)
    lost = {**dict.fromkeys(plain, 0.0), **wrapped}
    changed = differing(plain, lost, TOLERANCE)
    if changed:
        patient.report.find(
            f'{some(changed)}: the value in one process is not that of the '
            'model wrapped for distributed training.',
            'warns',
        )
    else:
        patient.report.say(
            SECTION, 'wrapped for distributed training, losses are the same'
        )


@contextmanager
def group_of_one() -> Iterator[None]:
    """Make a process group of this process alone.

    Networks that are wrapped for it must be gone at its end. The last wrapper
    that knows a group joins the group's threads while it holds Python's lock,
    and the threads may be waiting for that lock.
    """
    torch_dist.init_process_group(
        'gloo', store=torch_dist.HashStore(), rank=0, world_size=1
    )
    try:
        yield
    finally:
        torch_dist.destroy_process_group()


def _wrapped_losses(patient: Patient) -> dict[str, float]:
    wrapper = MMDistributedDataParallel(
        module=patient.student,
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=False,
    )
    return _values(patient.distributed_step(wrapper).distilled)


def _values(distilled: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    return {
        name: float(loss.detach())
        for losses in distilled.values()
        for name, loss in losses.items()
    }
