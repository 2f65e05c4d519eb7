"""The command that measures what watching a training costs."""

import re

from tests.helpers import toy


def test_shares_of_an_iteration(tmp_path):
    cfg = toy.distilled(tmp_path / 'run', images=4)
    path = toy.write(cfg, tmp_path / 'config.py')
    job = toy.tool(tmp_path / 'log', 'tools/watch_cost.py', path)
    assert job.process.exitcode == 0, job.text()
    rows = dict(re.findall(r'^(\S[\w. ]+?) +([\d.]+) ms', job.text(), re.M))
    whole = float(rows.pop('an iteration'))
    parts = [float(part) for part in rows.values()]
    assert {'LossCheckHook._before', 'Batch.copies'} <= rows.keys()
    assert 0 < sum(parts) < whole
    (share,) = re.findall(r'^together +([\d.]+) %', job.text(), re.M)
    assert abs(float(share) - 100 * sum(parts) / whole) < 0.5
