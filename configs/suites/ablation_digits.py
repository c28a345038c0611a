"""Every sequence mixer and every switch of DiffuSSM on the digits, one change at a time, 60 measured seconds each.

    python -m diffussm_jax.compare configs/suites/ablation_digits.py --workdir=runs/compare_ablation_digits

Takes about an hour and a half on two CPU cores. The baseline is that of configs/suites/digits.py: S4D in both
directions, S4D-Lin, zero-order hold, M = 2, raster order, a fixed position embedding, no gate.
"""

from pathlib import Path

from diffussm_jax.compare import Budget, Suite, load_suite
from diffussm_jax.config import override

BASELINE = "DiffuSSM"
MIXERS = ("s4", "lssl", "s6", "attention", "conv")
SWITCHES = {
    "Hourglass and patches": {
        "M = 1": {"model.hourglass_ratio": 1},
        "M = 4": {"model.hourglass_ratio": 4},
        "P = 2": {"model.patch_size": 2},
    },
    "Directions and scans": {
        "one direction": {"model.mixer.bidirectional": False},
        "2-D scan": {"model.mixer.scan": "2d"},
        "zigzag scan": {"model.mixer.scan": "zigzag"},
        "no position embedding": {"model.has_position_embedding": False},
    },
    "Initialization and discretization": {
        "S4D-LegS": {"model.mixer.initialization": "legs"},
        "S4D-Inv": {"model.mixer.initialization": "inv"},
        "random": {"model.mixer.initialization": "random"},
        "bilinear": {"model.mixer.discretization": "bilinear"},
        "gate (adaLN-Zero)": {"model.has_gate": True},
    },
}
NOTES = (
    "One change at a time of the smallest example, scikit-learn's 8 x 8 digits. Changes of the mixer keep width, depth "
    "and state size, not the number of parameters or the time of a step: see the costs. Sequences are short here (64 "
    "positions), and so nothing is said about long ones."
)


def get_suite():
    suite = load_suite(str(Path(__file__).with_name("digits.py")))
    base = suite.configs[suite.baseline]
    configs = {BASELINE: base}
    for name in MIXERS:
        configs[name] = override(base, {"model.mixer.name": name})
    for switches in SWITCHES.values():
        configs |= {name: override(base, changes) for name, changes in switches.items()}
    return Suite(
        title="Mixers and switches of DiffuSSM on the digits",
        notes=NOTES,
        configs=configs,
        budget=Budget("seconds", 60),
        num_losses=20,
        groups={"Mixers": MIXERS, **{title: tuple(switches) for title, switches in SWITCHES.items()}},
    )
