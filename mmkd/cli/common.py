"""What ``mmkd train`` and ``mmkd test`` share."""

import argparse
import os
import os.path as osp

from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config
from mmengine.runner import Runner

from mmkd.detectors.source import load_config
from mmkd.engine.runner import runner_class
from mmkd.utils import add_cfg_options, check_seed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what both take, the config first."""
    parser.add_argument('config', help='config file, or mmkd::NAME')
    parser.add_argument(
        '--work-dir', help='folder of what is written (default: work_dirs/…)'
    )
    add_cfg_options(parser)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher (default: %(default)s)',
    )
    # torch.distributed.launch passes one of them, torchrun neither.
    parser.add_argument(
        '--local_rank',
        '--local-rank',
        type=int,
        default=0,
        help=argparse.SUPPRESS,
    )


def read_config(args: argparse.Namespace) -> Config:
    """Read the config, with what the command line says."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = load_config(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        name = osp.basename(args.config.rpartition('::')[2])
        cfg.work_dir = osp.join('work_dirs', osp.splitext(name)[0])
    return cfg


def build_runner(cfg: Config) -> Runner:
    """Build the runner that the config names, or else MMEngine's."""
    check_seed(cfg.get('randomness') or {})
    # Compiled parts of MMDetection recompile often; see its tools/train.py.
    setup_cache_size_limit_of_dynamo()
    return runner_class(cfg).from_cfg(cfg)
