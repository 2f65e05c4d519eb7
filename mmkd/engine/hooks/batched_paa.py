"""Train plain PAA with the batched assignment."""

from contextlib import ExitStack

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from mmkd.detectors.assignment.paa import (
    assigned_by,
    check_stock_paa,
    own_costs,
)
from mmkd.detectors.facts import read_facts
from mmkd.errors import ConfigError
from mmkd.registry import HOOKS


@HOOKS.register_module()
class BatchedPAAHook(Hook):
    """Assign the candidates of all objects at once, on the GPU.

    The hook is for PAA without distillation and works with any runner.
    MMDetection fits one mixture per object with scikit-learn on the CPU. That
    is slow, and current versions of scikit-learn raise an error where an
    object's costs are close together.

    Args:
        keep_single: Make the only candidate of an object positive.
            MMDetection leaves such an object without a positive.

    Raises:
        ConfigError: If the detector's head is not PAA's.

    Example:
        >>> custom_hooks = [dict(type='mmkd.BatchedPAAHook')]
    """

    def __init__(self, *, keep_single: bool = False) -> None:
        self.keep_single = keep_single
        self._stack = ExitStack()

    def before_train(self, runner: Runner) -> None:
        model = runner.model
        model = model.module if is_model_wrapper(model) else model
        facts = read_facts(model)
        head = facts.dense and facts.dense.head
        if not hasattr(head, 'paa_reassign'):
            raise ConfigError(
                f'BatchedPAAHook is for PAAHead; {type(model).__name__} has '
                f'{type(head).__name__}. Take the hook out of custom_hooks.'
            )
        check_stock_paa(head, 'BatchedPAAHook')
        self._stack.enter_context(
            assigned_by(head, own_costs(head), keep_single=self.keep_single)
        )

    def after_train(self, runner: Runner) -> None:
        self._stack.close()
