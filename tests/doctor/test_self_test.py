"""The self-test is green on what is shipped, and red where a bit differs."""

import json
import os
import time

import pytest
import torch

from mmkd.doctor import self_test, zero_weight
from mmkd.doctor.command import main
from mmkd.doctor.families import CONFIGS
from mmkd.engine.runner import DistillationRunner
from tests.helpers import toy

RETINANET = 'retinanet/retinanet_r50_fpn_1x_coco.py'
CONDITIONS = ('EMA', 'accumulation', 'bf16')


def families(names):
    return [name.partition('/')[0] for name in names]


class TestDraw:
    def test_it_is_the_seeds(self):
        names, left_out = self_test.drawn(3, 6)
        assert (names, left_out) == self_test.drawn(3, 6)
        assert names != self_test.drawn(4, 6)[0]
        assert len(set(families(names))) == 6
        for name in names:
            assert (CONFIGS / name).is_file()
            assert self_test.case(name, 3) == self_test.case(name, 3)
        assert len({self_test.case(RETINANET, seed) for seed in range(9)}) > 5

    def test_families_come_again_when_all_had_their_turn(self):
        names, _ = self_test.drawn(0, 4, '^(atss|paa)/')
        assert sorted(set(families(names))) == ['atss', 'paa']
        assert len(names) > 4  # with a pattern: all of them
        assert families(names[:4]) in (
            ['atss', 'paa'] * 2,
            ['paa', 'atss'] * 2,
        )

    @pytest.mark.parametrize(
        ('name', 'why'),
        [
            (RETINANET, ''),
            ('lvis/mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1.py', ''),
            ('fast_rcnn/fast-rcnn_r50_fpn_1x_coco.py', ''),
            (
                'glip/glip_atss_swin-t_a_fpn_dyhead_16xb2_ms-2x_funtune_coco.py',
                'language model',
            ),
            ('retinanet/retinanet_tta.py', 'no model'),
            ('solov2/solov2-light_r50-dcn_fpn_ms-3x_coco.py', 'train_cfg'),
            ('cascade_rpn/cascade-rpn_r50-caffe_fpn_1x_coco.py', 'build'),
            ('carafe/faster-rcnn_r50_fpn-carafe_1x_coco.py', 'CPU'),
            (
                'mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py',
                'panoptic',
            ),
        ],
    )
    def test_the_rule(self, name, why):
        found = self_test.excluded(name)
        assert why in found
        assert bool(why) == bool(found)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A case, its config, and what stock training makes of it."""
    root = tmp_path_factory.mktemp('drawn') / 'coco'
    self_test.draw_photos(root, tuple(toy.stock_classes()), seed=0)
    case = zero_weight.Case(RETINANET, 5, ('FGD',), CONDITIONS)
    cfg = zero_weight.stock_config(case, root, **zero_weight.SIZES[0])
    return case, cfg, zero_weight.trained(cfg)


class TestComparison:
    def difference(self, run, **options):
        case, cfg, stock = run
        cfg = zero_weight.distilled(cfg, 'FGD', case)
        cfg.distillation.methods.zero.update(options)
        return zero_weight.difference(stock, zero_weight.trained(cfg))

    def test_what_is_compared(self, run):
        _, _, stock = run
        kinds = {name.partition(' ')[0] for name in stock.tensors}
        assert kinds == {'weight', 'average', 'optimiser'}
        kinds = {' '.join(name.split()[:2]) for name in stock.numbers}
        assert kinds == {'settings of', 'random state'}
        assert len(stock.losses) == 3

    def test_equal(self, run):
        assert self.difference(run) == ''

    def test_a_weight(self, run):
        assert self.difference(run, loss_weight=1e-3)

    def test_a_random_number(self, run, monkeypatch):
        detach = DistillationRunner._detach

        def detach_and_draw(runner):
            detach(runner)
            torch.rand(())

        monkeypatch.setattr(DistillationRunner, '_detach', detach_and_draw)
        assert self.difference(run) == 'random state of torch'

    def test_a_bit_of_a_buffer_that_no_loss_shows(self, run):
        _, _, stock = run
        changed = dict(stock.tensors)
        name = next(name for name in changed if 'running_var' in name)
        changed[name] = changed[name].clone()
        changed[name][0] = torch.nextafter(changed[name][0], torch.tensor(9.0))
        other = zero_weight.Outcome(stock.losses, changed, stock.numbers)
        assert name in zero_weight.difference(stock, other)


class TestCommand:
    OPTIONS = ('--self-test', '--only', f'^{RETINANET}$', '--seed', '1')

    def test_the_table_and_the_status(self, tmp_path, capsys):
        path = tmp_path / 'result.json'
        assert main([*self.OPTIONS, '--json', str(path)]) == 0
        text = capsys.readouterr().out
        assert 'seed 1' in text
        assert f'torch {torch.__version__}' in text
        assert '1 of 1 are equal, bit for bit' in text
        (facts,) = json.loads(path.read_text())['cases']
        assert (facts['name'], facts['verdict']) == (RETINANET, 'equal')
        assert facts['method']

    @pytest.mark.parametrize(
        ('work', 'said'),
        [
            (lambda *_: os._exit(3), 'its process ended: status 3'),
            (lambda *_: os.kill(os.getpid(), 9), 'its process ended: SIGKILL'),
            (lambda *_: time.sleep(600), 'it hung and was killed'),
        ],
        ids=['exit', 'killed', 'hangs'],
    )
    def test_what_dies_is_no_success(self, work, said, monkeypatch, capsys):
        monkeypatch.setattr(self_test, 'examine', work)
        if 'hung' in said:
            monkeypatch.setattr(self_test, 'PATIENCE', 1)
        assert main(self.OPTIONS) == 1
        text = capsys.readouterr().out
        assert said in text
        assert '0 of 1 are equal' in text

    def test_stock_losses_that_overflow_are_not_compared(
        self, monkeypatch, capsys
    ):
        def explosive(*args, **options):
            cfg = stock_config(*args, **options)
            cfg.optim_wrapper.optimizer.lr = 1e30
            return cfg

        stock_config = zero_weight.stock_config
        monkeypatch.setattr(zero_weight, 'stock_config', explosive)
        assert main(self.OPTIONS) == 1
        text = capsys.readouterr().out
        assert 'stock training fails: RuntimeError: loss, loss_bbox' in text
        assert '0 of 0 are equal' in text
        assert '1 more do not train here without mmkd either' in text

    @pytest.mark.parametrize('arguments', [[], ['a.py', '--self-test']])
    def test_either_a_config_or_the_self_test(self, arguments, capsys):
        with pytest.raises(SystemExit):
            main(arguments)
        assert 'either a config or --self-test' in capsys.readouterr().err
