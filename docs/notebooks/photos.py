"""What the notebook needs: aerial tiles, or drawings, and weights."""

import json
from pathlib import Path

import cv2
import numpy as np

from mmkd.cli.main import main

SIZE = 256


def photos(root: Path) -> Path:
    """A folder with train/, val/ and annotations/, in COCO's layout.

    It is ``root/neon``, which is downloaded if it is not there. Without a
    network, a few green discs on brown ground are drawn instead.
    """
    real = root / 'neon'
    if real.exists() or main(['prepare', 'neon', '--root', str(root)]) == 0:
        return real
    print('No photos: the notebook goes on with drawings of trees.')
    return drawn(root / 'drawn', train=24, val=4)


def imagenet(root: Path) -> Path | None:
    """ImageNet weights for the teacher; None where they can't be fetched."""
    path = root / 'mobilenet_v2' / 'imagenet.pth'
    command = ['prepare', 'mobilenet_v2', '--root', str(root)]
    if path.exists() or main(command) == 0:
        return path
    print('No weights: the teacher starts from scratch, and is a poor one.')
    return None


def drawn(folder: Path, **splits: int) -> Path:
    """Draw images of trees, as many of each split as is said."""
    random = np.random.default_rng(0)
    for split, number in splits.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        images, boxes = [], []
        for key in range(number):
            name = f'{key}.png'
            picture, found = _trees(random)
            cv2.imwrite(str(folder / split / name), picture)
            images.append(
                dict(id=key, file_name=name, width=SIZE, height=SIZE)
            )
            for x, y, radius in found:
                side = 2 * radius
                boxes.append(
                    dict(
                        id=len(boxes) + 1,
                        image_id=key,
                        category_id=1,
                        bbox=[x - radius, y - radius, side, side],
                        area=side**2,
                        iscrowd=0,
                    )
                )
        content = dict(
            images=images,
            annotations=boxes,
            categories=[dict(id=1, name='Tree')],
        )
        (folder / 'annotations').mkdir(exist_ok=True)
        path = folder / 'annotations' / f'{split}.json'
        path.write_text(json.dumps(content))
    return folder


def _trees(
    random: np.random.Generator,
) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """A picture (BGR), and the centre and radius of each tree in pixels."""
    brown = np.array([90, 120, 150])
    noise = random.integers(-20, 20, (SIZE, SIZE, 3))
    picture = np.clip(brown + noise, 0, 255).astype(np.uint8)
    found = []
    for _ in range(8):
        radius = int(random.integers(12, 28))
        x, y = map(int, random.integers(radius, SIZE - radius, 2))
        cv2.circle(picture, (x, y), radius, (40, 110, 50), -1)
        found.append((x, y, radius))
    return picture, found
