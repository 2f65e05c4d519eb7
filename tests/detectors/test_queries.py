"""What is read of a decoder's queries is what its own head makes of them."""

import copy
import types

import pytest
import torch
from mmdet.models.dense_heads import GroundingDINOHead
from mmengine.structures import InstanceData
from torch import nn

from mmkd.detectors.blank import blank_pass
from mmkd.detectors.queries import (
    QUERY_TAPS,
    QueryOutputs,
    assigned,
    check_queries,
    read_queries,
)
from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError, TapError
from tests.helpers import tiny_detectors as tiny

LAYERS, QUERIES = 3, 12
SIZES = ((96, 128), (128, 96))
FEW = dict(group_cfg=dict(num_dn_queries=10))
DEFORMABLE = 'deformable_detr/deformable-detr'

# Config, its changes.
STOCK = {
    'detr': ('detr/detr_r50_8xb2-150e_coco.py', {}),
    'conditional': (
        'conditional_detr/conditional-detr_r50_8xb2-50e_coco.py',
        {},
    ),
    'dab': ('dab_detr/dab-detr_r50_8xb2-50e_coco.py', {}),
    'patterns': (
        'dab_detr/dab-detr_r50_8xb2-50e_coco.py',
        dict(num_patterns=2),
    ),
    'deformable': (f'{DEFORMABLE}_r50_16xb2-50e_coco.py', {}),
    'refined': (f'{DEFORMABLE}-refine_r50_16xb2-50e_coco.py', {}),
    'two-stage': (f'{DEFORMABLE}-refine-twostage_r50_16xb2-50e_coco.py', {}),
    'dino': ('dino/dino-4scale_r50_8xb2-12e_coco.py', dict(dn_cfg=FEW)),
    'ddq': (
        'ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py',
        dict(dn_cfg=FEW, dqs_cfg=dict(type='nms', iou_threshold=0.1)),
    ),
}
DENOISING = ('dino', 'ddq')
DEFORMABLES = ('deformable', 'refined', 'two-stage')
PROPOSING = ('two-stage', 'dino', 'ddq')


def built(name):
    """A stock detector, shallow and on a narrow backbone.

    The width of its transformer stays: some of its layers are 256 wide
    whatever the config says. Its weights are such that predictions differ.
    """
    path, changes = STOCK[name]
    config = tiny.stock(path)
    count = len(config.neck.in_channels)
    config = tiny.merged(
        config,
        backbone=tiny.BACKBONE,
        neck__in_channels=[16, 32, 64][-count:],
        encoder__num_layers=1,
        decoder__num_layers=LAYERS,
        num_queries=QUERIES,
        bbox_head__num_classes=3,
        test_cfg=dict(max_per_img=6),
        **changes,
    )
    model = tiny.build(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.bbox_head.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def recorded(model, batch, run):
    outputs = StepRecord(model, QUERY_TAPS)
    with outputs.recording():
        result = run(model, *batch)
    return outputs, result


def tensor_forward(model, inputs, data_samples):
    return model(inputs, copy.deepcopy(data_samples), mode='tensor')


@pytest.fixture(scope='module', params=STOCK)
def trained(request):
    """Name, detector, batch, and what its loss and the record of it say."""
    model = built(request.param)
    batch = tiny.batch_for(model, objects=(3, 1), sizes=SIZES)
    outputs, losses = recorded(model, batch, tiny.seeded_loss)
    return request.param, model, batch, outputs, losses


@pytest.fixture(scope='module', params=STOCK)
def evaluated(request):
    """Name, detector, batch, record of an eval-mode forward pass."""
    model = built(request.param).eval()
    batch = tiny.batch_for(model, objects=(3, 1), sizes=SIZES)
    with torch.no_grad():
        outputs, _ = recorded(model, batch, tensor_forward)
    return request.param, model, batch, outputs


def truth_of(batch):
    samples = batch[1]
    return [s.gt_instances for s in samples], [s.metainfo for s in samples]


def level_sizes(model, batch):
    with torch.no_grad():
        return [level.shape[-2:] for level in model.extract_feat(batch[0])]


class TestTraining:
    def test_form(self, trained):
        name, model, _, outputs, _ = trained
        read = read_queries(outputs)
        queries = QUERIES * (2 if name == 'patterns' else 1)
        width = 4 if name == 'detr' else 3
        assert read.sigmoid == (name != 'detr')
        assert read.classes == 3
        assert read.head is model.bbox_head
        assert read.logits.shape == (LAYERS, 2, queries, width)
        assert read.scores.shape == (LAYERS, 2, queries, 3)
        assert read.boxes.shape == (LAYERS, 2, queries, 4)
        assert read.hidden.shape == (LAYERS, 2, queries, 256)
        assert read.queries.shape == (2, queries, 256)
        assert read.logits.requires_grad
        assert read.boxes.requires_grad
        # 3 objects at most, each right and wrong, in 10 // 3 groups
        assert read.denoising == (3 * 2 * 3 if name in DENOISING else 0)
        assert read.distinct.shape == (LAYERS, 2, queries)
        assert read.distinct.all() == (name != 'ddq')

    def test_the_loss_of_these_queries_is_the_stock_loss(self, trained):
        name, model, batch, outputs, losses = trained
        read, head = read_queries(outputs), model.bbox_head
        for layer in range(LAYERS):
            prefix = '' if layer == LAYERS - 1 else f'd{layer}.'
            logits, boxes = read.logits[layer], read.boxes[layer]
            if name == 'ddq':
                found = head._loss_for_distinct_queries_single(
                    logits, boxes, layer, *truth_of(batch)
                )
            else:
                found = head.loss_by_feat_single(
                    logits, boxes, *truth_of(batch)
                )
            for part, loss in zip(('cls', 'bbox', 'iou'), found, strict=True):
                assert torch.equal(loss, losses[f'{prefix}loss_{part}'])

    def test_head_predicts_them_from_hidden_and_references(self, trained):
        name, model, _, outputs, _ = trained
        read = read_queries(outputs)
        references = () if name == 'detr' else (read.references,)
        if name == 'conditional':
            references = (read.references[0],)
        elif name in ('dab', 'patterns'):
            references = (torch.stack(read.references),)
        head = copy.deepcopy(model.bbox_head).eval()  # no auxiliary queries
        logits, boxes = head(read.hidden, *references)
        torch.testing.assert_close(logits, read.logits)
        torch.testing.assert_close(boxes, read.boxes)

    def test_assigned(self, trained):
        _, model, batch, outputs, losses = trained
        read, head = read_queries(outputs), model.bbox_head
        labels, boxes = assigned(outputs)
        assert labels.shape == read.logits.shape[:3]
        matched = labels < 3
        # Each object once in each layer, with its own class and box.
        assert matched.sum(-1).tolist() == [[3, 1]] * LAYERS
        for image, sample in enumerate(batch[1]):
            truth = sample.gt_instances
            height, width = sample.img_shape
            scale = boxes.new_tensor([width, height, width, height])
            for layer in range(LAYERS):
                mine = matched[layer, image]
                cx, cy, w, h = (boxes[layer, image, mine] * scale).unbind(-1)
                xyxy = torch.stack(
                    [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1
                )
                order = torch.cdist(xyxy, truth.bboxes).argmin(-1)
                assert sorted(order.tolist()) == list(range(len(truth)))
                torch.testing.assert_close(xyxy, truth.bboxes[order])
                assert torch.equal(
                    labels[layer, image, mine], truth.labels[order]
                )
        assert boxes[~matched].abs().sum() == 0
        # The matches are those of these queries, as the L1 loss tells.
        distance = (read.boxes - boxes)[matched].abs().reshape(LAYERS, -1)
        stock = [losses[f'd{i}.loss_bbox'] for i in range(LAYERS - 1)]
        expected = torch.stack([*stock, losses['loss_bbox']])
        factor = head.loss_bbox.loss_weight / 4  # objects
        torch.testing.assert_close(distance.sum(-1) * factor, expected)

    def test_encoder(self, trained):
        name, model, batch, outputs, losses = trained
        read, head = read_queries(outputs), model.bbox_head
        if name not in PROPOSING:
            assert read.encoder_logits is None
            assert read.encoder_boxes is None
            return
        logits, boxes = read.encoder_logits, read.encoder_boxes
        truth, metas = truth_of(batch)
        points = sum(int(h * w) for h, w in level_sizes(model, batch))
        assert logits.shape == (2, points, 3)
        assert boxes.shape == (2, points, 4)
        if name == 'two-stage':  # trained on all points, as object or none
            truth = [
                InstanceData(bboxes=t.bboxes, labels=0 * t.labels)
                for t in truth
            ]
        elif name == 'dino':  # on the best ones
            best = logits.amax(-1).topk(QUERIES, dim=1)[1][..., None]
            logits = logits.gather(1, best.expand(-1, -1, 3))
            boxes = boxes.gather(1, best.expand(-1, -1, 4))
        else:  # on distinct ones, which the queries' references are, too
            chosen = torch.cdist(read.references[0], boxes, p=1)
            assert chosen.amin(-1).max() < 1e-5
            best = chosen.argmin(-1)[..., None]
            logits = logits.gather(1, best.expand(-1, -1, 3))
            boxes = boxes.gather(1, best.expand(-1, -1, 4))
        found = head.loss_by_feat_single(logits, boxes, truth, metas)
        for part, loss in zip(('cls', 'bbox', 'iou'), found, strict=True):
            torch.testing.assert_close(loss, losses[f'enc_loss_{part}'])

    @pytest.mark.parametrize('name', DENOISING)
    def test_no_objects(self, name):
        """Then there is nothing to denoise, and nothing matches."""
        model = built(name)
        batch = tiny.batch_for(model, objects=0, sizes=SIZES)
        outputs, _ = recorded(model, batch, tiny.seeded_loss)
        read = read_queries(outputs)
        assert read.denoising == 0
        assert read.logits.shape == (LAYERS, 2, QUERIES, 3)
        labels, boxes = assigned(outputs)
        assert (labels == 3).all()
        assert (boxes == 0).all()


class TestEvaluation:
    def test_detections_are_the_stock_ones(self, evaluated):
        _, model, (inputs, samples), outputs = evaluated
        read = read_queries(outputs)
        with torch.no_grad():
            stock = model.predict(
                inputs, copy.deepcopy(samples), rescale=False
            )
        pixels = read.boxes_in_pixels(samples)[-1]
        for image, sample in enumerate(stock):
            scores, boxes = read.scores[-1, image], pixels[image]
            used = read.distinct[-1, image]
            scores, boxes = scores[used], boxes[used]
            if read.sigmoid:
                top, index = scores.flatten().topk(6)
                query, label = index // 3, index % 3
            else:
                best, label = scores.max(-1)
                top, query = best.topk(6)
                label = label[query]
            height, width = sample.img_shape
            limit = boxes.new_tensor([width, height, width, height])
            found = sample.pred_instances
            torch.testing.assert_close(found.scores, top)
            assert torch.equal(found.labels, label)
            expected = boxes[query].clamp(min=0).minimum(limit)
            torch.testing.assert_close(found.bboxes, expected)

    def test_no_denoising(self, evaluated):
        read = read_queries(evaluated[-1])
        assert read.denoising == 0
        assert not read.logits.requires_grad

    def test_decoder_starts_from_these(self, evaluated):
        """The queries and references, given to the decoder by hand."""
        name, model, (inputs, samples), outputs = evaluated
        read = read_queries(outputs)
        with torch.no_grad():
            encoded, decoded = model.pre_transformer(
                model.extract_feat(inputs), samples
            )
            memory = model.forward_encoder(**encoded)['memory']
            start = dict(query=read.queries, memory=memory)
            if read.positions is not None:
                start['query_pos'] = read.positions
            if name in ('dab', 'patterns'):
                start['query_pos'] = read.references[0].logit()
            elif name not in ('detr', 'conditional'):
                start['reference_points'] = read.references[0]
            hidden = model.forward_decoder(**decoded, **start)['hidden_states']
        torch.testing.assert_close(hidden, read.hidden)
        positional = ('detr', 'conditional', *DEFORMABLES)
        assert (read.positions is not None) == (name in positional)

    def test_references(self, evaluated):
        name, _, _, outputs = evaluated
        references = read_queries(outputs).references
        if name == 'detr':
            assert references is None
            return
        sizes = [reference.shape[-1] for reference in references]
        expected = {
            'conditional': [2, 2, 2],
            'deformable': [2, 2, 2],
            'refined': [2, 4, 4],
        }
        assert sizes == expected.get(name, [4, 4, 4])
        assert all(r.min() >= 0 and r.max() <= 1 for r in references)

    def test_predict_mode(self, evaluated):
        """Some heads then predict from the last layer alone."""
        name, model, batch, outputs = evaluated
        with torch.no_grad():
            again, _ = recorded(
                model, batch, lambda m, x, s: m.predict(x, copy.deepcopy(s))
            )
        every, last = read_queries(outputs), read_queries(again)
        assert len(last.hidden) == len(last.logits)
        assert torch.equal(last.logits[-1], every.logits[-1])
        assert torch.equal(last.hidden[-1], every.hidden[-1])
        if name != 'detr':
            assert len(last.references) == len(last.logits)
            assert torch.equal(last.references[-1], every.references[-1])

    def test_distinct(self, evaluated):
        """DDQ's own note, which its next pass overwrites."""
        name, model, batch, outputs = evaluated
        read = read_queries(outputs)
        if name != 'ddq':
            assert read.distinct.all()
            return
        with torch.no_grad():
            tensor_forward(model, *batch)
        heads = model.cache_dict['num_heads']
        notes = model.cache_dict['distinct_query_mask']
        assert read.distinct[0].all()
        for layer, note in enumerate(notes, 1):
            for image in range(2):
                used = note[image * heads][0]
                assert torch.equal(read.distinct[layer, image], used)
        assert not read.distinct.all()

    def test_encoder_proposes_the_first_references(self, evaluated):
        name, _, _, outputs = evaluated
        read = read_queries(outputs)
        if name not in PROPOSING:
            assert read.encoder is None
            return
        distance = torch.cdist(read.references[0], read.encoder_boxes, p=1)
        assert distance.amin(-1).max() < 1e-5
        # The padding below the first image proposes nothing.
        nothing = (read.encoder_boxes == 1).all(-1)
        assert nothing.any(1).all()
        assert not nothing.all(1).any()


def handmade(logits, *, sigmoid):
    logits = torch.tensor(logits).view(1, 1, 1, -1)
    boxes = torch.tensor([0.5, 0.25, 0.2, 0.1]).view(1, 1, 1, 4)
    return QueryOutputs(
        head=None,
        logits=logits,
        boxes=boxes,
        sigmoid=sigmoid,
        classes=2,
        hidden=torch.zeros(1, 1, 1, 8),
        queries=torch.zeros(1, 1, 8),
        positions=None,
        references=None,
        denoising=0,
        distinct=torch.ones(1, 1, 1, dtype=torch.bool),
        encoder=None,
    )


class TestByHand:
    def test_softmax_scores(self):
        three = torch.tensor(3.0).log().item()
        read = handmade([three, 0.0, 0.0], sigmoid=False)
        torch.testing.assert_close(
            read.scores.flatten(), torch.tensor([0.6, 0.2])
        )

    def test_sigmoid_scores(self):
        three = torch.tensor(3.0).log().item()
        read = handmade([three, -three], sigmoid=True)
        torch.testing.assert_close(
            read.scores.flatten(), torch.tensor([0.75, 0.25])
        )

    def test_pixels(self):
        """A box in the middle of an image 200 wide and 100 high."""
        read = handmade([0.0, 0.0], sigmoid=True)
        sample = types.SimpleNamespace(img_shape=(100, 200))
        torch.testing.assert_close(
            read.boxes_in_pixels([sample]).flatten(),
            torch.tensor([80.0, 20.0, 120.0, 30.0]),
        )


class TestRecording:
    def test_costs_nothing_where_nobody_asks(self):
        model = built('dino')
        batch = tiny.batch_for(model, sizes=SIZES)
        outputs = StepRecord(model)
        with outputs.recording():
            assert not {*QUERY_TAPS} & {*vars(model)}
            tiny.seeded_loss(model, *batch)
        with pytest.raises(TapError, match='never fired'):
            outputs.features('pre_decoder')

    def test_changes_nothing_and_leaves_nothing(self):
        model = built('dino')
        batch = tiny.batch_for(model, sizes=SIZES)
        before = [{*vars(part)} for part in model.modules()]
        stock = tiny.seeded_loss(model, *batch)
        _, losses = recorded(model, batch, tiny.seeded_loss)
        assert [{*vars(part)} for part in model.modules()] == before
        for name, loss in stock.items():
            assert torch.equal(loss, losses[name])

    def test_two_records_at_once(self):
        model = built('dino')
        batch = tiny.batch_for(model, sizes=SIZES)
        outer = StepRecord(model, QUERY_TAPS)
        with outer.recording():
            inner, _ = recorded(model, batch, tiny.seeded_loss)
        ours, theirs = read_queries(outer), read_queries(inner)
        assert torch.equal(ours.logits, theirs.logits)

    def test_is_read_once(self, trained):
        outputs = trained[3]
        assert read_queries(outputs) is read_queries(outputs)


class TestErrors:
    @pytest.mark.parametrize('config', [tiny.faster_rcnn, tiny.retinanet])
    def test_no_queries(self, config):
        model = tiny.build(config())
        outputs = blank_pass(model, QUERY_TAPS, torch.device('cpu'))
        name = type(model).__name__
        with pytest.raises(ConfigError) as caught:
            check_queries(outputs, 'student', 'Method')
        assert str(caught.value) == (
            'Method fits detectors with queries, such as DETR, Deformable '
            f'DETR, DINO and DDQ; the student is {name}: it has no decoder '
            'that predicts boxes from queries. Use a method on features, '
            'such as mmkd.FeatureHint.'
        )

    def test_words(self):
        """Grounding DINO itself needs a language model."""
        model = nn.Module()
        model.forward_decoder = model.forward
        head = tiny.stock('dino/dino-4scale_r50_8xb2-12e_coco.py').bbox_head
        del head['type']
        model.bbox_head = GroundingDINOHead(**head)
        with pytest.raises(ConfigError, match='compares queries with words'):
            check_queries(StepRecord(model, QUERY_TAPS), 'teacher', 'Method')

    def test_not_recorded(self):
        model = built('detr').eval()
        outputs = blank_pass(model, (), torch.device('cpu'))
        with pytest.raises(TapError, match=r'with mmkd.*QUERY_TAPS'):
            read_queries(outputs)

    def test_no_loss(self, evaluated):
        with pytest.raises(TapError, match='not trained on an assignment'):
            assigned(evaluated[-1])

    @pytest.mark.parametrize(
        'change',
        [
            lambda logits, boxes: (logits[..., :2], boxes),
            lambda logits, boxes: (logits, boxes[..., :2]),
            lambda logits, boxes: (logits[0], boxes[0]),
            lambda logits, boxes: (logits, boxes[:, :, :1]),
            lambda logits, boxes: (logits, boxes, boxes),
            lambda logits, boxes: ([logits], [boxes]),
            lambda logits, boxes: (),
        ],
    )
    def test_another_head(self, change):
        model = built('dino').eval()
        forward = model.bbox_head.forward
        model.bbox_head.forward = lambda **inputs: change(*forward(**inputs))
        outputs = blank_pass(model, QUERY_TAPS, torch.device('cpu'))
        with pytest.raises(ConfigError, match='DINOHead predicts for no'):
            check_queries(outputs, 'student', 'Method')

    @pytest.mark.parametrize('name', STOCK)
    def test_blank(self, name):
        model = built(name)
        outputs = blank_pass(model, QUERY_TAPS, torch.device('cpu'))
        read = check_queries(outputs, 'student', 'Method')
        assert read.logits.shape[:2] == (LAYERS, 1)
        assert model.training
