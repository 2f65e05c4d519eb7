"""What a detector produced in one step, and the taps that record it.

This is the only module with taps. A tap is an interception of a method, such
as a module's ``forward``, on the instance; it exists only while a step is
being recorded, so that a detector carries nothing of mmkd's between
steps and its copies (EMA) are clean.
"""

import difflib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmcv.cnn import ConvModule
from torch import Tensor, nn

from mmkd.errors import TapError

from .facts import DetectorFacts, RoIFacts, RPNFacts, box_heads, read_facts

# Taps that are set on every detector that has such a module; what they hold,
# its loss holds, too.
STANDARD_TAPS = ('rpn_head', 'bbox_head')
# Where dense heads assign objects to priors: PAA's second, final assignment,
# DDOD's of the classes, what nearly all call, and YOLOX's for one image.
ASSIGNING = (
    'paa_reassign',
    'get_cls_targets',
    'get_targets',
    '_get_targets_single',
)


@dataclass
class RoIOutputs:
    """One head's predictions for the boxes on which it was trained.

    N is the number of boxes sampled in the batch, K the head's classes.
    """

    facts: RPNFacts | RoIFacts
    """About the RPN, or about the stage of the RoI head."""
    boxes: Tensor
    """Anchors (N, 4) as xyxy, or RoIs (N, 5) as image index + xyxy; pixels."""
    logits: Tensor | None
    """RPN: (N, 1) of a sigmoid or (N, 2) of a softmax head; RoI: (N, K+1);
    None without classification."""
    deltas: Tensor | None
    """(N, 4), class-specific RoI heads (N, 4K); None without regression."""
    labels: Tensor
    """(N,); 0..K-1 are objects, K is the background."""
    label_weights: Tensor
    """(N,)."""
    targets: Tensor
    """(N, 4) regression targets of the objects, as the head's loss sees
    them: deltas, or xyxy pixels where ``facts.decoded_targets`` is set."""
    target_weights: Tensor
    """(N, 4); 0 for background."""
    avg_factor: float | Tensor
    """What the head divides its own sums by."""
    index: tuple[Tensor, Tensor] | None = None
    """RPN: image and flat anchor index of each sampled anchor."""


@contextmanager
def intercepted(
    owner: object, name: str, after: Callable[..., None]
) -> Iterator[None]:
    """Call ``after(result, *args, **kwargs)`` behind ``owner.name(...)``.

    What others have put on the instance is there again afterwards.
    """
    original = getattr(owner, name)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        after(result, *args, **kwargs)
        return result

    with replaced(owner, name, call):
        yield


@contextmanager
def replaced(owner: object, name: str, value: Any) -> Iterator[None]:
    """Shadow an attribute on the instance, and take the shadow away again."""
    attributes = vars(owner)
    shadowed = name in attributes
    original = attributes.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if shadowed:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def flatten_levels(maps: Iterable[Tensor], channels: int) -> Tensor:
    """Per-level maps (B, A*c, H, W) to (B, sum of H*W*A, c).

    The order is that of MMDetection's anchors: level, row, column, anchor.
    """
    return torch.cat(
        [
            level.permute(0, 2, 3, 1).reshape(len(level), -1, channels)
            for level in maps
        ],
        dim=1,
    )


def tensors_in(output: Any) -> tuple[Tensor, ...]:
    """The tensors of a module's (nested) output in their order."""
    if isinstance(output, Tensor):
        return (output,)
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if not isinstance(output, list | tuple):
        return ()
    return tuple(tensor for item in output for tensor in tensors_in(item))


class StepRecord:
    """The tensors that a detector's own forward or loss has produced.

    Args:
        model: The detector.
        paths: Module paths to tap beside the standard ones, for instance
            ``'backbone.layer3'``, and paths of methods, for instance
            ``'pre_decoder'``.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str] = ()) -> None:
        self.model: Any = model
        self.paths = tuple(paths)
        self.note = ''
        """What to add to the message of a tap that never fired."""
        self.peers: dict[str, StepRecord] = {}
        """What the networks have produced that train beside this one."""
        self.cache: dict[str, Any] = {}
        """What methods have derived in this step, for each other."""
        self._fired: dict[str, list[Any]] = {}
        self._anchor_targets: tuple[Any, tuple] | None = None
        self._roi_calls: dict[int, tuple[dict, dict]] = {}
        self._dense_targets: list[Any] = []

    @functools.cached_property
    def facts(self) -> DetectorFacts:
        """What the detector's heads predict."""
        return read_facts(self.model)

    @contextmanager
    def recording(self) -> Iterator['StepRecord']:
        """Record what passes the taps within the context."""
        with ExitStack() as stack:
            for path, owner, name in self._tapped():
                # Not a forward hook: some heads call ``forward`` itself.
                record = functools.partial(self._record_output, path)
                stack.enter_context(intercepted(owner, name, record))
            rpn = getattr(self.model, 'rpn_head', None)
            if hasattr(rpn, 'get_targets'):
                stack.enter_context(
                    intercepted(rpn, 'get_targets', self._record_anchors)
                )
            dense = getattr(self.model, 'bbox_head', None)
            assigning = [name for name in ASSIGNING if hasattr(dense, name)]
            if assigning:
                stack.enter_context(
                    intercepted(dense, assigning[0], self._record_targets)
                )
            for stage, head in enumerate(box_heads(self.model)):
                if hasattr(head, 'loss_and_target'):
                    taken = functools.partial(self._record_rois, stage)
                    stack.enter_context(
                        intercepted(head, 'loss_and_target', taken)
                    )
            yield self

    def features(self, path: str) -> tuple[Tensor, ...]:
        """The output of the module at ``path``, a tensor a level.

        ``'neck'`` is the backbone's output in a detector without a neck. A
        module that ran several times (a head shared by the levels) gives its
        outputs in the order of the calls. An activation that works in place
        on an output has changed it, except within a ``ConvModule``, whose
        parts are copied before.

        Raises:
            TapError: If the module did not run in this step.
        """
        path = self._resolved(path)
        if path not in self._fired:
            raise TapError(
                f'the tap "{path}" of {type(self.model).__name__} never '
                f'fired: {self._why_silent(path)} Fired: '
                f'{", ".join(self._fired) or "none"}.{self.note}'
            )
        return tensors_in(self._fired[path])

    def raw(self, path: str) -> Any:
        """The output of the last call of the module at ``path``, as it is."""
        self.features(path)
        return self._fired[self._resolved(path)][-1]

    @functools.cached_property
    def anchors(self) -> RoIOutputs:
        """The RPN's predictions on its sampled anchors.

        Raises:
            TapError: If the detector's loss has not trained an RPN.
        """
        if self._anchor_targets is None:
            raise TapError(
                f'{type(self.model).__name__} has trained no RPN in this step'
            )
        anchor_list, targets = self._anchor_targets
        scores, deltas = self.raw('rpn_head')[:2]
        facts = self.facts.rpn
        assert facts is not None
        labels, weights, box_targets, box_weights = (
            torch.cat(levels, dim=1) for levels in targets[:4]
        )
        image, anchor = weights.nonzero(as_tuple=True)
        index = (image, anchor)
        return RoIOutputs(
            facts=facts,
            boxes=torch.cat([as_tensor(a) for a in anchor_list[0]])[anchor],
            logits=flatten_levels(scores, facts.columns)[index],
            deltas=flatten_levels(deltas, 4)[index],
            labels=labels[index],
            label_weights=weights[index],
            targets=box_targets[index],
            target_weights=box_weights[index],
            avg_factor=targets[4],
            index=index,
        )

    @functools.cached_property
    def rois(self) -> list[RoIOutputs]:
        """Each RoI stage's predictions on its sampled RoIs.

        Raises:
            TapError: If the detector's loss has not trained a RoI head.
        """
        if not self._roi_calls:
            raise TapError(
                f'{type(self.model).__name__} has trained no RoI box head in '
                'this step'
            )
        samples = []
        for stage, (call, result) in sorted(self._roi_calls.items()):
            labels, weights, targets, target_weights = result['bbox_targets']
            samples.append(
                RoIOutputs(
                    facts=self.facts.rois[stage],
                    boxes=call['rois'],
                    logits=call['cls_score'],
                    deltas=call['bbox_pred'],
                    labels=labels,
                    label_weights=weights,
                    targets=targets,
                    target_weights=target_weights,
                    avg_factor=max(len(labels), 1),
                )
            )
        return samples

    @property
    def dense_targets(self) -> list[Any]:
        """What a dense head's assignment returned: see :mod:`.dense`.

        Raises:
            TapError: If the head has assigned nothing in a way that is known.
        """
        if not self._dense_targets:
            head = getattr(self.model, 'bbox_head', None)
            raise TapError(
                f'the {type(head).__name__} of {type(self.model).__name__} '
                'has trained on no assignment that could be read in this '
                f'step: none of {", ".join(ASSIGNING)} was called.'
            )
        return self._dense_targets

    def _resolved(self, path: str) -> str:
        alone = path == 'neck' and getattr(self.model, 'neck', None) is None
        return 'backbone' if alone else path

    def _why_silent(self, path: str) -> str:
        modules = [
            name
            for name, _ in self.model.named_modules()
            if name.partition('.')[0] != 'distillation'
        ]
        if path in modules:
            return (
                'the module did not run. Name one that does in the forward '
                'pass.'
            )
        close = difflib.get_close_matches(path, modules, n=1)
        hint = f'Did you mean "{close[0]}"? ' if close else ''
        parts = ', '.join(name for name in modules if name and '.' not in name)
        return f'there is no such module. {hint}The detector has {parts}.'

    def _tapped(self) -> Iterator[tuple[str, Any, str]]:
        """Give each path with the owner and the name of what is tapped."""
        asked = map(self._resolved, self.paths)
        for path in dict.fromkeys((*STANDARD_TAPS, *asked)):
            parent, _, name = path.rpartition('.')
            try:
                owner = self.model.get_submodule(parent)
            except AttributeError:
                # A path that a method asks for is reported where it is read.
                continue
            part = getattr(owner, name, None)
            if isinstance(part, nn.Module):
                yield path, part, 'forward'
            elif callable(part):
                yield path, owner, name

    def _record_output(
        self, path: str, output: Any, *_: Any, **__: Any
    ) -> None:
        parent = self.model.get_submodule(path.rpartition('.')[0])
        if isinstance(parent, ConvModule):
            output = output.clone()  # before its activation in place
        self._fired.setdefault(path, []).append(output)

    def _record_targets(self, result: Any, *_: Any, **__: Any) -> None:
        self._dense_targets.append(result)

    def _record_anchors(
        self, result: tuple, anchor_list: Any, *_: Any, **__: Any
    ) -> None:
        self._anchor_targets = (anchor_list, result)

    def _record_rois(
        self, stage: int, result: dict, *args: Any, **kwargs: Any
    ) -> None:
        names = ('cls_score', 'bbox_pred', 'rois')
        self._roi_calls[stage] = (
            {**dict(zip(names, args, strict=False)), **kwargs},
            result,
        )


def as_tensor(boxes: Any) -> Tensor:
    """A plain tensor of boxes, also from MMDetection's box structures."""
    return boxes if isinstance(boxes, Tensor) else boxes.tensor
