"""Costs by module are those of the jaxpr and of the compiler, and each stands under the module that causes it."""

import functools
from collections import Counter

import flax.linen as nn
import jax
import pytest

from diffussm_jax.models import S4D, Backbone, DiffuSSM
from diffussm_jax.models.backbone import class_labels
from diffussm_jax.models.costs import module_of, modules, saved_bytes, table

SHAPE = (8, 8, 3)
MODEL = DiffuSSM(width=16, depth=3, conditioners=class_labels(3), mixer=functools.partial(S4D, state_size=4))


class Convolutions(Backbone):
    """Two convolutions, one of them in groups, with a residual block that is computed again."""

    @nn.compact
    def __call__(self, x_t, t, condition=None, *, train=False):
        x = nn.Conv(8, (3, 3), name="inputs")(x_t)
        x = x + nn.remat(nn.Conv)(8, (5, 5), feature_group_count=2, strides=1, name="middle")(nn.silu(x))
        return nn.Conv(self.num_outputs * x_t.shape[-1], (3, 3), strides=(1, 1), name="outputs")(x)


CONVOLUTIONS = Convolutions(conditioners={})


def test_name_stacks_lead_to_modules():
    params = {"blocks": {"ssm": {"forward": {"C": 0}}, "W0": {"kernel": 0}}, "final": {"kernel": 0}}
    assert module_of("jvp(Net)/blocks/ssm.phases/dni,dnj->dij", params) == "blocks/ssm"
    assert module_of("transpose(jvp(Net))/blocks/W0/bj,jd->bd", params) == "blocks/W0"
    assert module_of("Net/final", params) == "final"
    assert module_of("Net/other", params) == ""


def test_convolutions_are_counted_as_the_papers_do():
    H, W, C = SHAPE
    costs = CONVOLUTIONS.costs(SHAPE)
    expected = {"inputs": 9 * C * 8, "middle": 25 * (8 // 2) * 8, "outputs": 9 * 8 * 2 * C}
    assert costs.multiply_adds == {name: H * W * count for name, count in expected.items()}
    assert costs.recomputed == costs.multiply_adds["middle"]


def test_convolutions_are_those_of_the_compiler():
    model = CONVOLUTIONS.clone()
    params, arguments = model.abstract_params(SHAPE), model.abstract_arguments(SHAPE, 4)
    flops = jax.jit(model.apply_params).lower(params, *arguments).compile().cost_analysis()["flops"]
    # XLA counts no products with the zeros around the image, and some elementwise work.
    inside = {"inputs": (22 / 24) ** 2, "middle": (34 / 40) ** 2, "outputs": (22 / 24) ** 2}
    products = sum(inside[name] * count for name, count in model.costs(SHAPE).multiply_adds.items())
    assert 1 <= flops / (2 * 4 * products) < 1.05


def test_a_formula_is_the_count():
    """DiffuSSM counts by the paper's formula, other backbones by the jaxpr: the same for DiffuSSM without its SSMs."""
    for options in ({}, {"patch_size": 2, "has_gate": True}):
        model = MODEL.clone(mixer=functools.partial(S4D, state_size=4, method="recurrent"), **options)
        assert Backbone.costs(model, SHAPE).total == model.costs(SHAPE).total


@pytest.mark.parametrize("remat", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("none", "dots")), "block"])
def test_rows_add_up(remat):
    model = MODEL.clone(remat=remat)
    rows, costs = modules(model, SHAPE), model.costs(SHAPE)
    totals = [sum(column) for column in zip(*(row[1:] for row in rows), strict=True)]
    assert totals[0] == sum(costs.parameters.values())
    assert totals[1] == costs.total + costs.mixer
    by_name = {row.name: row for row in rows}
    assert by_name["blocks/W0"].parameters == 3 * (16 * 16 + 16)
    assert by_name["blocks/W0"].multiply_adds == costs.multiply_adds["blocks/W0"]
    assert by_name["blocks/ssm"].multiply_adds == costs.mixer

    def residuals(batch_size):
        def gradient(params, *batch):
            return jax.vjp(lambda p: model.apply_params(p, *batch), params)[1]

        arguments = model.abstract_params(SHAPE), *model.abstract_arguments(SHAPE, batch_size)
        leaves = jax.tree.leaves(jax.eval_shape(gradient, *arguments))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    grown = residuals(3) - residuals(2)
    # A residual that several operations read stands several times among the leaves.
    assert 0.5 * grown <= totals[2] <= grown


def test_what_is_saved_stands_where_it_is_made():
    model = MODEL.clone(remat="block")
    arguments = model.abstract_params(SHAPE), *model.abstract_arguments(SHAPE, 2)
    found = saved_bytes(model.apply_params, *arguments)
    J, D = 32, 16
    assert found["blocks"] == 3 * 2 * J * D * 4  # the input of each block, float32
    everything = saved_bytes(MODEL.apply_params, *arguments)
    assert isinstance(everything, Counter) and everything["blocks"] > 10 * found["blocks"]
    assert everything["blocks/ssm"] > 0 == found["blocks/ssm"]


def test_the_table_names_the_share_of_the_mixers():
    lines = table(modules(MODEL, SHAPE)).splitlines()
    assert lines[0].split() == "module parameters multiply-adds, M saved for backward, MB".split()
    assert lines[-2].split()[0] == "total" and lines[-1].startswith("share of the sequence mixers")
    share = float(lines[-1].split()[-3].rstrip("%")) / 100
    an_ssm = 16 * (2 * (1 + 1 + 2 + 2) + 1 + 1)  # log_neg_re, im, B and C of two pairs, log_dt and D
    assert share == pytest.approx(3 * 2 * an_ssm / sum(MODEL.costs(SHAPE).parameters.values()), abs=1e-3)
