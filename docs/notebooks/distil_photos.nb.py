# ---
# jupyter:
#   jupytext:
#     formats: nb.py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Distil on real photos, and look at pictures
#
# This notebook distils a small tree detector from a larger one, on photos from
# the air, on a CPU. It was executed when this page was built.
#
# The photos are those of `make demo`: 247 tiles of 256 x 256 pixels, in which
# tree crowns are marked. With one seed and 24 validation tiles the numbers
# prove little; [Results](../results.md) has three seeds.

# %% tags=["remove-output"]
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'  # more threads wait for each other

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from mmdet.apis import inference_detector, init_detector
from photos import imagenet, photos

# %matplotlib inline

# %%
os.chdir('../..')  # from the notebook's folder to the root of the checkout
EPOCHS = int(os.environ.get('MMKD_EPOCHS', '6'))
WORK = Path(os.environ.get('MMKD_WORK_DIR', 'work_dirs/notebook'))
ROOT = Path(os.environ.get('MMKD_DATA', 'data'))
DATA, WEIGHTS = photos(ROOT), imagenet(ROOT)
print(len(list((DATA / 'train').iterdir())), 'tiles to train on')

# %% [markdown]
# ## Three configs
#
# Both are GFL detectors. The teacher has a MobileNetV2 that starts from
# ImageNet, the student a ResNet-18 of a quarter of its width that starts from
# scratch. Both are stock detectors. Only the third config says anything about
# distillation: who teaches, and by which method.

# %%
SHARED = f"""
data_root = {str(DATA) + '/'!r}
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs={EPOCHS}, val_interval={EPOCHS})
default_hooks = dict(logger=dict(interval=3))
"""
INIT = WEIGHTS and dict(type='Pretrained', checkpoint=str(WEIGHTS))
START = f'model = dict(backbone=dict(init_cfg={INIT}))'
DISTILLATION = f"""
distillation = dict(
    teacher=dict(
        config={str(WORK / 'teacher.py')!r},
        checkpoint={str(WORK / 'teacher' / f'epoch_{EPOCHS}.pth')!r},
    ),
    methods=dict(fgd=dict(type='mmkd.FGD')),
)
"""
WORK.mkdir(parents=True, exist_ok=True)
for name, base, text in (
    ('teacher', 'teacher', SHARED + START),
    ('student', 'student', SHARED),
    ('distilled', 'student', SHARED + DISTILLATION),
):
    path = os.path.relpath(f'configs/neon/{base}.py', WORK)
    (WORK / f'{name}.py').write_text(f'_base_ = [{path!r}]\n{text}')

print((WORK / 'distilled.py').read_text())

# %% [markdown]
# ## Train
#
# This is `mmkd train CONFIG --work-dir FOLDER`. The teacher comes first. The
# student and the distilled student have the same schedule, data and seed.

# %%
for name in ('teacher', 'student', 'distilled'):
    command = [sys.executable, '-m', 'mmkd', 'train', str(WORK / f'{name}.py')]
    command += ['--work-dir', str(WORK / name)]
    subprocess.run(command, check=True, capture_output=True)
    print(name, 'is trained')

# %% [markdown]
# ## The log
#
# The student's losses keep their stock names. The losses of distillation begin
# with the name of the method, `fgd`, and are already weighted.


# %%
def log(name):
    """The lines of a training's log: one dict per entry."""
    newest = sorted((WORK / name).glob('*/vis_data/scalars.json'))[-1]
    return [json.loads(line) for line in newest.read_text().splitlines()]


losses = [entry for entry in log('distilled') if 'loss' in entry]
for key in sorted(k for k in losses[-1] if 'loss_' in k):
    print(f'{key:28}{losses[0][key]:8.3f} ->{losses[-1][key]:8.3f}')

# %% [markdown]
# ## Scores
#
# COCO's AP on the validation tiles, in per cent.

# %%
print(f'{"":12}{"AP":>6}{"AP50":>6}')
for name in ('teacher', 'student', 'distilled'):
    # A network that finds nothing at all has no entry.
    found = [entry for entry in log(name) if 'coco/bbox_mAP' in entry] or [{}]
    scores = (
        found[-1].get(f'coco/bbox_{key}', 0) for key in ('mAP', 'mAP_50')
    )
    print(f'{name:12}' + ''.join(f'{100 * score:6.1f}' for score in scores))

# %% [markdown]
# ## Pictures
#
# A distilled checkpoint is a stock checkpoint: MMDetection's own functions
# load it, with the student's config, and nothing of mmkd is involved.

# %%
CHECKPOINT = f'epoch_{EPOCHS}.pth'
models = {
    name: init_detector(
        str(WORK / f'{config}.py'),
        str(WORK / name / CHECKPOINT),
        device='cpu',
    )
    for name, config in {
        'student': 'student',
        'distilled': 'student',
        'teacher': 'teacher',
    }.items()
}
truth = json.loads((DATA / 'annotations' / 'val.json').read_text())
chosen = truth['images'][:3]


def draw(axis, boxes, colour):
    """Draw boxes (x, y, width, height)."""
    for x, y, width, height in boxes:
        axis.add_patch(
            Rectangle((x, y), width, height, fill=False, edgecolor=colour)
        )


def found_by(model, path, number):
    """The best boxes of an image, as many as there are trees."""
    found = inference_detector(model, str(path)).pred_instances
    corners = found.bboxes[:number]
    return [(x, y, u - x, v - y) for x, y, u, v in corners.tolist()]


figure, axes = plt.subplots(
    len(chosen), 4, figsize=(12, 3 * len(chosen)), squeeze=False
)
for row, image in zip(axes, chosen, strict=True):
    path = DATA / 'val' / image['file_name']
    marked = [
        each['bbox']
        for each in truth['annotations']
        if each['image_id'] == image['id']
    ]
    panels = {'ground truth': marked} | {
        name: found_by(model, path, len(marked))
        for name, model in models.items()
    }
    for axis, (name, boxes) in zip(row, panels.items(), strict=True):
        axis.imshow(plt.imread(path))
        axis.set_title(name)
        axis.axis('off')
        draw(axis, boxes, 'white' if name == 'ground truth' else 'yellow')
figure.tight_layout()
plt.show()

# %% [markdown]
# Each picture shows as many boxes as there are trees, the most certain ones
# first.
#
# ## Next
#
# * `mmkd report` turns the three work dirs into a page with curves, scores and
#   more pictures.
# * [Your own data](../tutorials/own_data.md) does the same with your photos.
# * [Results](../results.md) has measurements with several seeds.
