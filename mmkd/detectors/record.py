"""What a detector produced in one step, and the taps that record it.

This is the only module with taps. A tap intercepts a method of an instance,
such as a module's ``forward``. It exists only while a step is being recorded,
so that between steps a detector carries nothing of mmkd, and its copies (EMA)
are clean.
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
from mmkd.utils import process_share

from .facts import DetectorFacts, RoIFacts, RPNFacts, box_heads, read_facts

# These taps are set on every detector that has such a module. What they keep
# is kept by its loss as well.
STANDARD_TAPS = ('rpn_head', 'bbox_head')
# Where dense heads assign objects to priors: PAA's second, final assignment,
# DDOD's assignment of the classes, the method that nearly all heads call, and
# YOLOX's method for one image.
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
    """The facts of the RPN, or of the stage of the RoI head."""
    boxes: Tensor
    """Anchors (N, 4) as xyxy, or RoIs (N, 5) as image index and xyxy, in
    pixels."""
    logits: Tensor | None
    """RPN: (N, 1) for a sigmoid or (N, 2) for a softmax head. RoI: (N, K+1).
    None without classification."""
    deltas: Tensor | None
    """(N, 4), or (N, 4K) if class-specific; None without regression."""
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
    """What the head divides its own sums by: the number of boxes, but for
    the RPN's images without a positive anchor, which count one more."""
    index: tuple[Tensor, Tensor] | None = None
    """For the RPN, the image and flat index of each sampled anchor."""

    @functools.cached_property
    def number(self) -> Tensor:
        """``avg_factor``, averaged over the processes.

        In all of them together it is at least 1.
        """
        part = self.label_weights.new_ones(()) * self.avg_factor
        return process_share(part, least=1)


@contextmanager
def intercepted(
    owner: object, name: str, after: Callable[..., None]
) -> Iterator[None]:
    """Call ``after(result, *args, **kwargs)`` after ``owner.name(...)``.

    Afterwards the instance has again what others have put on it.
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
    """Shadow an attribute on the instance within the context."""
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
    """Join maps (B, A*c, H, W) of the levels to (B, sum of H*W*A, c).

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
    """Return the tensors of a module's nested output in their order."""
    if isinstance(output, Tensor):
        return (output,)
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if not isinstance(output, list | tuple):
        return ()
    return tuple(tensor for item in output for tensor in tensors_in(item))


def tap(model: nn.Module, path: str) -> tuple[Any, str] | None:
    """Return what :func:`intercepted` takes for the module at a path.

    Args:
        model: The detector.
        path: A module such as ``'backbone.layer3'``, or a method such as
            ``'pre_decoder'``.

    Returns:
        The owner and the name; None if there is no such path.
    """
    parent, _, name = path.rpartition('.')
    try:
        owner = model.get_submodule(parent)
    except AttributeError:
        return None
    part = getattr(owner, name, None)
    if isinstance(part, nn.Module):
        return part, 'forward'
    return (owner, name) if callable(part) else None


class StepRecord:
    """The tensors that a detector's own forward or loss has produced.

    Args:
        model: The detector.
        paths: Paths to tap in addition to the standard ones: modules such as
            ``'backbone.layer3'`` and methods such as ``'pre_decoder'``.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str] = ()) -> None:
        self.model: Any = model
        self.paths = tuple(paths)
        self.note = ''
        """A text to add to the message about a tap that never fired."""
        self.peers: dict[str, StepRecord] = {}
        """The records of the networks that train beside this one, by name."""
        self.cache: dict[str, Any] = {}
        """What methods have derived in this step, to share it."""
        self.maps: Any = None
        """On unlabelled images: the levels that the heads are given."""
        self.without_gradients: set[str] = set()
        """The taps that fired where gradients were switched off."""
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
                # No forward hook, because some heads call ``forward`` itself.
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
        """Return the output of the module at ``path``, a tensor per level.

        In a detector without a neck, ``'neck'`` is the backbone's output. A
        module that ran several times (a head shared by the levels) gives its
        outputs in the order of the calls. An activation that works in place
        has changed the output before it, except within a ``ConvModule``,
        whose parts are copied.

        Raises:
            TapError: If the module did not run in this step.
        """
        path = self.resolved(path)
        if path not in self._fired:
            raise TapError(
                f'the tap "{path}" of {type(self.model).__name__} never '
                f'fired: {self._why_silent(path)} Fired: '
                f'{", ".join(self._fired) or "none"}.{self.note}'
            )
        return tensors_in(self._fired[path])

    def raw(self, path: str) -> Any:
        """Return the output of the module's last call as it is."""
        self.features(path)
        return self._fired[self.resolved(path)][-1]

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
                    avg_factor=len(labels),
                )
            )
        return samples

    @property
    def dense_targets(self) -> list[Any]:
        """What a dense head's assignment returned; see ``dense.py``.

        Raises:
            TapError: If the head has assigned nothing in a way that is known.
        """
        if not self._dense_targets:
            head = getattr(self.model, 'bbox_head', None)
            raise TapError(
                f'the {type(head).__name__} of {type(self.model).__name__} '
                'has not trained on an assignment that could be read in this '
                f'step: none of {", ".join(ASSIGNING)} was called.{self.note}'
            )
        return self._dense_targets

    @property
    def fired(self) -> list[str]:
        """The taps that fired, in the order in which they were done."""
        return list(self._fired)

    def resolved(self, path: str) -> str:
        """Return the path that is tapped; see :meth:`features`."""
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
        """Yield each path with the owner and the name of what is tapped."""
        asked = map(self.resolved, self.paths)
        for path in dict.fromkeys((*STANDARD_TAPS, *asked)):
            found = tap(self.model, path)
            if found is not None:
                yield path, *found
            # A missing path is reported where a method reads it.

    def _record_output(
        self, path: str, output: Any, *_: Any, **__: Any
    ) -> None:
        parent = self.model.get_submodule(path.rpartition('.')[0])
        if isinstance(parent, ConvModule):
            output = output.clone()  # before the activation works in place
        if not torch.is_grad_enabled():
            self.without_gradients.add(path)
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
    """Return boxes, or a box structure of MMDetection, as a plain tensor."""
    return boxes if isinstance(boxes, Tensor) else boxes.tensor
