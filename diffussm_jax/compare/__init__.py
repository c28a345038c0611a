"""Compares models at equal budgets: `python -m diffussm_jax.compare configs/suites/digits.py --workdir=FOLDER`.

    suite     what a suite file returns, and how many steps each config makes
    measure   times a training step and sampling of all configs, in turns
    runs      trains and scores each config with each seed
    results   reads work directories, and says which differences are significant
    lengths   latency and memory against the number of positions
    plan      what each config needs of a machine
    report    the report: `page` writes it, with the figures of `charts`

docs/compare.md is the guide.
"""

from diffussm_jax.compare.suite import Budget, Suite, load_suite

__all__ = ["Budget", "Suite", "load_suite"]
