"""Backbones that learn from images without labels."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmdet.utils import register_all_modules
from mmengine.logging import print_log
from mmengine.model import BaseModel, BaseModule, ModuleDict
from mmengine.registry import MODELS as ALL_MODELS
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from mmkd.errors import ConfigError
from mmkd.losses import NTXentLoss, SimilarityKLLoss
from mmkd.registry import MODELS

from .augment import Distortion


class Projector(nn.Sequential):
    """The layers between a backbone and the loss, left out afterwards.

    Each layer is linear, with a batch norm, and all but the last end in a
    ReLU; the last one has no bias. SimCLRv2 fine-tunes a classifier from the
    first of the layers; a detector has no place for it.

    Source: Chen, Kornblith, Swersky, Norouzi, Hinton, "Big Self-Supervised
    Models are Strong Semi-Supervised Learners", NeurIPS 2020,
    https://arxiv.org/abs/2006.10029, and the official code
    (google-research/simclr, ``tf2/model.py``). Hidden layers are as wide as
    the backbone's last map, there and here.

    Args:
        width: The channels of the backbone's last map.
        out: The length of a projection; 128 there.
        layers: The number of layers; 3 in SimCLRv2, 2 in SimCLR.
    """

    def __init__(self, width: int, out: int = 128, layers: int = 3) -> None:
        steps: list[nn.Module] = []
        for number in range(1, layers + 1):
            last = number == layers
            linear = nn.Linear(width, out if last else width, bias=False)
            nn.init.normal_(linear.weight, std=0.01)
            norm = nn.BatchNorm1d(linear.out_features)
            steps += [linear, norm]
            if last:
                norm.register_parameter('bias', None)
            else:
                steps.append(nn.ReLU(inplace=True))
        super().__init__(*steps)


class Network(BaseModule):
    """A detector's backbone with a projector.

    Args:
        backbone: The config of the backbone.
        mean: What the detector subtracts from each channel of its images, in
            their order; empty without normalisation.
        std: What it divides by.
        rgb: Whether the channels are red, green and blue; else the reverse.
        size: The sides of the images that it will see, in pixels.
        projection: The length of a projection.
        layers: The number of the projector's layers.

    Attributes:
        thawed: What of the backbone's config does not hold here, in words.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        *,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        rgb: bool = True,
        size: int,
        projection: int = 128,
        layers: int = 3,
    ) -> None:
        super().__init__()
        register_all_modules(init_default_scope=False)
        cfg = {'_scope_': 'mmdet', **copy.deepcopy(dict(backbone))}
        with DefaultScope.overwrite_default_scope('mmdet'):
            self.backbone: Any = ALL_MODELS.build(cfg)
        self.thawed = thaw(self.backbone)
        self.rgb = rgb
        for name, values in (('mean', mean or (0.0,)), ('std', std or (1.0,))):
            value = torch.tensor(values).view(-1, 1, 1)
            self.register_buffer(name, value, persistent=False)
        width = last_map(self.backbone, size).shape[1]
        self.projector = Projector(width, projection, layers)

    def features(self, images: Tensor) -> Tensor:
        """Return the means of the last map, (B, C).

        Args:
            images: (B, 3, H, W), RGB from 0 to 1.
        """
        pixels = 255 * (images if self.rgb else images.flip(1))
        return self.backbone((pixels - self.mean) / self.std)[-1].mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Return the projections of images, (B, D)."""
        return self.projector(self.features(images))


def thaw(backbone: Any) -> list[str]:
    """Let all of a backbone train, and its batch norms learn.

    Detectors freeze the first stages and the statistics of batch norms to keep
    what ImageNet has taught them. Here they are to be taught.

    Returns:
        What was changed, in words.
    """
    changed = []
    frozen = [p for p in backbone.parameters() if not p.requires_grad]
    if frozen:
        stages = getattr(backbone, 'frozen_stages', -1)
        why = f' (frozen_stages={stages})' if stages >= 0 else ''
        changed.append(f'{len(frozen)} frozen parameters{why} are trained')
        backbone.requires_grad_(True)
    if hasattr(backbone, 'frozen_stages'):
        backbone.frozen_stages = -1
    if getattr(backbone, 'norm_eval', False):
        changed.append('batch norms learn (norm_eval=False)')
        backbone.norm_eval = False
    backbone.train()
    return changed


def last_map(backbone: nn.Module, size: int) -> Tensor:
    """Return the last map of a blank image.

    Raises:
        ConfigError: If the backbone gives none for images of this size.
    """
    training = backbone.training
    try:
        backbone.eval()  # which returns None in some backbones
        with torch.no_grad():
            found = backbone(torch.zeros(1, 3, size, size))[-1]
        if isinstance(found, Tensor) and found.dim() == 4 and found.numel():
            return found
        problem = f'got {type(found).__name__}'
        if isinstance(found, Tensor):
            problem = f'got {tuple(found.shape)}'
    except Exception as error:  # any backbone, any reason
        problem = f'{type(error).__name__}: {error}'
    finally:
        backbone.train(training)
    raise ConfigError(
        f'the backbone {type(backbone).__name__} has to give maps (B, C, H, W)'
        f' of images of {size} x {size}, of which the last is trained on: '
        f'{problem}. Give another --size, or another config.'
    )


@MODELS.register_module()
class ContrastivePretraining(BaseModel):
    """Train backbones on two views of each image, alone or together.

    Each network has the loss NT-Xent of its own projections. With
    ``kl_weights``, it also learns from the similarities between images that
    the others find (DoGo): the mean of :class:`SimilarityKLLoss` over the
    other networks. All networks see the same views, each in the normalisation
    of its own detector.

    Args:
        networks: For each name the options of a :class:`Network`.
        size: The sides of the views, in pixels.
        temperature: That of NT-Xent.
        kl_weights: For each network the weight of the others' similarities;
            empty if every network learns alone.
        kl_temperature: That of these similarities.
        strength: Of the changes of colour; see :class:`Distortion`.
        blur: The probability of a blur.
        projection: The length of a projection.
        layers: The number of the projectors' layers.

    Raises:
        ConfigError: If an option is outside its range.
        PackageError: If kornia is not installed.
    """

    def __init__(
        self,
        *,
        networks: Mapping[str, Mapping[str, Any]],
        size: int,
        temperature: float = 0.1,
        kl_weights: Sequence[float] = (),
        kl_temperature: float = 0.1,
        strength: float = 1.0,
        blur: float = 0.5,
        projection: int = 128,
        layers: int = 3,
    ) -> None:
        super().__init__()
        if kl_weights and len(kl_weights) != len(networks):
            raise ConfigError(
                'ContrastivePretraining.kl_weights must have a weight for '
                f'each network ({", ".join(networks)}), got '
                f'{list(kl_weights)}.'
            )
        self.distortion = Distortion(size=size, strength=strength, blur=blur)
        self.networks = ModuleDict(
            {
                name: Network(
                    **options,
                    size=size,
                    projection=projection,
                    layers=layers,
                )
                for name, options in networks.items()
            }
        )
        for name, network in self.networks.items():
            for change in network.thawed:
                print_log(f'{name}: {change} in pretraining', 'current')
        self.contrast = NTXentLoss(temperature=temperature)
        self.comparisons = {
            name: SimilarityKLLoss(
                temperature=kl_temperature, loss_weight=weight
            )
            for name, weight in zip(networks, kl_weights, strict=False)
        }

    def views(self, inputs: Tensor) -> Tensor:
        """Distort crops; return all first views, then all second ones.

        Args:
            inputs: (B, 2, 3, size, size), uint8, RGB.

        Returns:
            (2B, 3, size, size), RGB from 0 to 1.
        """
        return self.distortion(inputs.transpose(0, 1).flatten(0, 1) / 255)

    def forward(
        self, inputs: Tensor, data_samples: None = None, mode: str = 'loss'
    ) -> dict[str, Tensor]:
        """Return the losses of two views, or the projections.

        Args:
            inputs: (B, 2, 3, size, size), uint8, RGB.
            data_samples: There are none; MMEngine passes the argument.
            mode: ``'loss'``, or ``'tensor'`` for the projections (2B, D) of
                each network.
        """
        views = self.views(inputs)
        projected = {n: network(views) for n, network in self.networks.items()}
        return self.losses(projected) if mode == 'loss' else projected

    def losses(self, projected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses of projections, (2B, D) of each network."""
        pairs = {name: z.chunk(2) for name, z in projected.items()}
        found = {}
        for name, (first, second) in pairs.items():
            found[f'{name}.loss_nt_xent'] = self.contrast(first, second)
            others = [pair for peer, pair in pairs.items() if peer != name]
            if others and name in self.comparisons:
                compare = self.comparisons[name]
                parts = [compare((first, second), pair) for pair in others]
                found[f'{name}.loss_kl'] = torch.stack(parts).mean()
        return found
