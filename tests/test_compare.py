"""The program `diffussm_jax.compare`: budgets, schedules, what is significant, and two tiny configs from end to end.

The two are perceptrons, which compile fast. No classifier is trained: features are means of the image's quarters.
"""

import csv
import json
import math
import shutil
import signal
from html.parser import HTMLParser
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from programs import run_program
from tiny import tiny_config

from diffussm_jax import load_run
from diffussm_jax.compare import __main__ as compare
from diffussm_jax.compare import plan as compare_plan
from diffussm_jax.compare import runs as compare_runs
from diffussm_jax.compare.lengths import length_blocks, read_lengths
from diffussm_jax.compare.page import Figure, Figures, Items, Table, Text, html_page, write_markdown
from diffussm_jax.compare.report import make_blocks, mean_and_deviation
from diffussm_jax.compare.results import LOSS, Results, RunResult, holm, read_results, statements, welch
from diffussm_jax.compare.suite import Budget, Schedule, Suite, load_suite, make_schedule, open_schedule
from diffussm_jax.config import override, to_plain
from diffussm_jax.evaluation.extractor import FEATURES, PROBABILITIES, Extractor
from diffussm_jax.models import Costs
from diffussm_jax.plan import DoesNotFitError, Plan
from diffussm_jax.validation import validate

ROOT = Path(__file__).parents[1]
SUITES = sorted(ROOT.glob("configs/suites/*.py"))
SUITE = """
from diffussm_jax.compare import Budget, Suite
from diffussm_jax.config import override
from tiny import tiny_config

def mlp(width):
    return override(tiny_config(), {"imports": ("extensions.backbone",), "model.name": "mlp", "model.width": width})

def get_suite():
    return Suite(title="Widths", notes="A < B", configs={"w/16": mlp(16), "w/32": mlp(32)}, budget=Budget("steps", 13),
                 seeds=(0, 1), num_samples=20, num_losses=4, num_scores=2)
"""


def entry(step_ms=10.0, batch_size=8, multiply_adds=1000, **more):
    return {"step_ms": step_ms, "batch_size": batch_size, "multiply_adds": multiply_adds, **more}


def suite_of(*names, **options):
    options = {"title": "t", "budget": Budget("seconds", 60)} | options
    return Suite(configs={name: tiny_config() for name in names}, **options)


# Budgets and schedules


@pytest.mark.parametrize(
    "text,expected",
    [
        ("steps:100", 100),
        ("images:1000", 125),  # of 8 images each
        ("images:1007", 125),
        ("flops:4.8e6", 100),  # a step is 3 passes x 2 x 1000 multiply-adds x 8 images = 48,000
        ("seconds:60", 240),  # of 250 ms each
        ("seconds:0.1", 1),
        ("seconds:0.75", 3),
    ],
)
def test_a_budget_becomes_steps(text, expected):
    assert Budget.parse(text).num_steps(batch_size=8, multiply_adds=1000, step_ms=250.0) == expected
    with pytest.raises(ValueError, match=r"1e\+300 \w+ is .* steps"):
        Budget(text.partition(":")[0], 1e300).num_steps(batch_size=8, multiply_adds=1000, step_ms=250.0)


@pytest.mark.parametrize("text", ["steps", "minutes:3", "steps:0", "steps:-1", "seconds:inf", "seconds:nan", "steps:x"])
def test_a_wrong_budget_is_refused(text):
    with pytest.raises(ValueError, match=rf"KIND:AMOUNT.*steps, images, flops, seconds.*got '{text}'"):
        Budget.parse(text)


def test_all_are_read_at_the_same_step():
    """60 s are 6000 and 1234 steps; 1234 / 10 losses are 123 steps each, 5 of which are a score."""
    suite = suite_of("fast", "slow", num_losses=10, num_scores=2)
    found = make_schedule(suite, {"fast": entry(10.0), "slow": entry(60e3 / 1234.5)})
    assert found == Schedule(
        budget="60 seconds",
        interval=123,
        keep_every=615,
        equal_steps=1230,
        num_steps={"fast": 6000, "slow": 1234},
    )
    assert found.scored_steps("fast") == [615, 1230, 6000] and found.scored_steps("slow") == [615, 1230, 1234]


@pytest.mark.parametrize("num_steps", range(1, 30))
def test_schedules_of_few_steps_fit(num_steps):
    suite = suite_of("a", budget=Budget("steps", num_steps), num_losses=6, num_scores=3)
    found = make_schedule(suite, {"a": entry()})
    assert 0 < found.equal_steps <= num_steps < found.equal_steps + found.keep_every + 6
    assert found.keep_every % found.interval == 0 == found.equal_steps % found.keep_every


def test_a_schedule_stays_when_configs_join(tmp_path):
    measured = {"a": entry(10.0), "b": entry(20.0), "c": {"error": "it does not run"}}
    first = open_schedule(suite_of("a", "b", "c"), measured, tmp_path)
    assert first.num_steps == {"a": 6000, "b": 3000}
    joined = open_schedule(suite_of("a", "d"), measured | {"d": entry(60.0)}, tmp_path)
    assert joined.num_steps == {"a": 6000, "b": 3000, "d": 1000} and joined.equal_steps == first.equal_steps == 3000
    assert joined.scored_steps("d") == [1000]
    with pytest.raises(ValueError, match=r"holds a comparison at 60 seconds.*now it would be 5 steps.*choose another"):
        open_schedule(suite_of("a", budget=Budget("steps", 5)), measured, tmp_path)
    with pytest.raises(ValueError, match="no config of the suite was measured"):
        make_schedule(suite_of("c"), measured)


BROKEN = {
    "no file": (None, "there is no suite"),
    "no suite": ("x = 1", r"defines no get_suite\(\)"),
    "another type": ("def get_suite():\n    return {}", "must return a Suite, got dict"),
    "no config": ("{}", "no config"),
    "folders": ('{"a b": config(), "a_b": config()}', "same folder: a b, a_b"),
    "a key": ('{"a": config(), "b": config(**{"model.width": 13})}', r"the config 'b' .*width.*multiple of 4.*13"),
    "decay": ('{"a": config(**{"optimizer.decay": "cosine"})}', r"'a'.*decay is 'cosine'; with 'constant'"),
    "data": ('{"a": config(), "b": config(**{"data.random_flip": True})}', r"'b'.*not those of 'a': data.random_flip"),
    "no loss": ('{"a": config(**{"data.eval_split": "", "eval_every": 0})}', r"'a'.*needs config.data.eval_split"),
    "seeds": ('{"a": config()}, seeds=(1, 1)', r"seeds must be different.*\[1, 1\]"),
    "score": ('{"a": config()}, scores=("fid",)', "fid"),
    "features": ('{"a": config()}, features="vgg"', "vgg"),
    "stage": ('{"a": config()}, stages=("trian",)', 'Did you mean "train"'),
    "no stage": ('{"a": config()}, stages=()', "stages must be some of plan, measure"),
    "group": ('{"a": config()}, groups={"g": ("b",)}', "group 'g'"),
    "intervals": ('{"a": config()}, num_losses=5, num_scores=2', "num_scores must divide num_losses"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_suites_are_refused(case, tmp_path):
    code, message = BROKEN[case]
    path = tmp_path / "suite.py"
    if code is not None:
        if code.startswith("{"):
            code = (
                "from diffussm_jax.compare import *\nfrom diffussm_jax.config import override\n"
                "from tiny import tiny_config\ndef config(**changes):\n    return override(tiny_config(), changes)\n"
                f"def get_suite():\n    return Suite(title='t', budget=Budget('steps', 1), configs={code})"
            )
        path.write_text(code)
    with pytest.raises(ValueError, match=message):
        load_suite(str(path)).check()


def test_an_argument_reaches_the_suite(tmp_path):
    path = tmp_path / "suite.py"
    path.write_text("def get_suite(x):\n    raise ValueError('got ' + x)")
    with pytest.raises(ValueError, match=r"got b\.zip"):
        load_suite(f"{path}:b.zip")
    path.write_text("def get_suite():\n    return None")
    with pytest.raises(ValueError, match=r"takes no argument, got 'b\.zip'"):
        load_suite(f"{path}:b.zip")


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_the_suites_of_the_package_are_valid(path):
    suite = load_suite(str(path))
    suite.check()
    assert f"diffussm_jax.compare configs/suites/{path.name}" in path.read_text().split('"""')[1]
    for config in suite.configs.values():
        validate(config)


# Significance


def t_tail(t, freedom):
    """The two-sided p-value of Student's t, by the integral of its density."""
    x = np.linspace(0, abs(t), 200_001)
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    return 1 - 2 * np.trapezoid(constant * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x)


def test_welch_and_holm_are_those_of_the_books():
    a, b = np.array([1.0, 2.0, 3.0]), np.array([4.0, 6.0, 8.0, 10.0])
    errors = np.array([a.var(ddof=1) / 3, b.var(ddof=1) / 4])
    freedom = errors.sum() ** 2 / (errors**2 / [2, 3]).sum()
    assert welch(a, b) == pytest.approx(t_tail((a.mean() - b.mean()) / math.sqrt(errors.sum()), freedom), abs=1e-9)
    assert welch(a, b) == welch(b, a)
    assert math.isnan(welch([1.0], b)) and math.isnan(welch([1.0, 1.0], [2.0, 2.0]))
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, math.nan, 0.9])[::2] == pytest.approx([0.8, 0.9])


def results_of(values, *, is_better="lower", errors=(), num_steps=100, equal_steps=100):
    """Results of {name: value of each seed} at step 100."""
    runs = [
        RunResult(
            name=name,
            seed=seed,
            num_steps=num_steps,
            error="FloatingPointError: not finite" if (name, seed) in errors else "",
            values={LOSS: {50: 2 * value, 100: value}, "FD-digits": {100: value}} if value is not None else {},
            grids={},
            config=to_plain(tiny_config()),
        )
        for name, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]
    num_all = {name: num_steps for name in values}
    return Results(
        names=list(values),
        schedule=Schedule(budget="100 steps", interval=50, keep_every=100, equal_steps=equal_steps, num_steps=num_all),
        measured={name: full_entry() for name in values},
        runs=runs,
        is_better={LOSS: "lower", "FD-digits": is_better},
    )


def full_entry():
    more = {"machine": "m", "at": "t", "parameters": 7, "mixer_multiply_adds": None, "images_per_second": 800.0}
    return entry(step_ms_of_turns=[10.0], sampling_ms_per_image=1.0, memory_mb=3.0, **more)


def test_nothing_is_claimed_that_the_seeds_do_not_show():
    values = {
        "base": [1.0, 1.1, 0.9],
        "lower": [0.1, 0.12, 0.11],
        "higher": [2.0, 2.1, 1.9],
        "near": [1.05, 1.2, 0.95],
        "one": [0.1],
        "none": [None, None, None],
    }
    found = {s.name: s for s in statements(results_of(values), "FD-digits", "equal")}
    assert found["lower"].words == "better" and found["higher"].words == "worse"
    assert found["near"].words == "not distinguishable with 3 seeds"
    assert found["one"].words == "not tested: one seed" and found["none"].words == "no value"
    assert found["higher"].difference == pytest.approx(1.0)
    assert found["higher"].p_holm == pytest.approx(3 * welch(values["higher"], values["base"]))  # the first of three
    other = {s.name: s.words for s in statements(results_of(values, is_better="higher"), "FD-digits", "equal")}
    assert other["lower"] == "worse" and other["higher"] == "better"
    same = {"base": [1.0, 1.0], "b": [2.0, 2.0], "c": [1.0, 1.1, 1.2]}
    assert [s.words for s in statements(results_of(same), LOSS, "equal")] == [
        "not tested: seeds agree",
        "not distinguishable with 3 against 2 seeds",
    ]


def test_means_have_the_digits_of_their_deviation():
    assert mean_and_deviation([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert mean_and_deviation([0.0712, 0.0701]) == "0.07065 ± 0.00078"
    assert mean_and_deviation([0.5, 0.5]) == "0.5000 ± 0.0000"
    assert mean_and_deviation([0.25]) == "0.25 (1 seed)" and mean_and_deviation([]) == "-"


def test_a_failed_run_is_named_and_left_out_of_curves():
    results = results_of({"base": [1.0, 1.2], "b": [2.0, 3.0]}, errors={("b", 1)})
    suite = suite_of("base", "b", seeds=(0, 1, 2))
    texts = [block.text for block in make_blocks(suite, results) if isinstance(block, Text) and block.is_warning]
    assert "1 of 2 runs of b failed (seed 1): FloatingPointError: not finite" in texts[1]
    assert texts[0] == "base has not run with seed 2 yet." and texts[2] == "b has not run with seed 2 yet."
    assert results.curve("b", LOSS) == [(50, 4.0, 0.0), (100, 2.0, 0.0)]
    (step, mean, deviation), _ = results.curve("base", LOSS)
    assert (step, mean) == (50, pytest.approx(2.2)) and deviation == pytest.approx(np.std([2.0, 2.4], ddof=1))
    assert results.seconds("b", 100) == pytest.approx(1.0)
    tables = [block for block in make_blocks(suite, results) if isinstance(block, Table)]
    assert tables[2].rows[1][:5] == ["b", "1 of 2", "100", "1", "2.50 ± 0.71"]


# Pages


def test_a_page_needs_no_other_file(tmp_path):
    blocks = [
        Text("a < b", is_warning=True),
        Items(["x & y"]),
        Table(["<i>", "|"], [["1", "a|b"]]),
        Figures([Figure("A grid", b"png"), Figure("A grid", "<svg></svg>")]),
    ]
    page = html_page("<title>", blocks)
    assert "<i>" not in page and "a &lt; b" in page and "data:image/png;base64,cG5n" in page
    write_markdown(tmp_path / "page.md", "T", blocks)
    text = (tmp_path / "page.md").read_text()
    assert "**a < b**" in text and r"| 1 | a\|b |" in text and "![A grid](a_grid.svg)" in text
    assert (tmp_path / "a_grid.png").read_bytes() == b"png"


def test_lengths_cross_where_the_lines_do(tmp_path):
    """Lines of slope 1 and 2 through (1000, 20): they cross there, between the measured lengths."""
    rows = [
        {"name": name, "length": L, "ms": 20 * (L / 1000) ** slope, "tokens": 1, "memory_mb": slope * L}
        for L in (256, 4096)
        for name, slope in (("linear", 1), ("quadratic", 2))
    ]
    path = tmp_path / "lengths.json"
    path.write_text(json.dumps({"machine": "this one", "rows": rows}))
    blocks = length_blocks(read_lengths(path))
    texts = [text for block in blocks if isinstance(block, Items) for text in block.texts]
    assert texts == [
        "quadratic takes less below 1,000 positions, linear above.",
        "linear takes less than quadratic at all lengths that were measured.",
    ]
    picture = next(block for block in blocks if isinstance(block, Figures)).figures[0].content
    assert "L = 1,000" in picture
    for wrong in ("[]", "{}", '{"rows": [{"name": "a", "length": 0, "ms": 1}]}', '{"rows": [1]}', "{"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"lengths\.json"):
            read_lengths(path)


# From end to end


def quarters(params, images):
    x = images.astype(jnp.float32) / 255
    features = x.reshape(len(x), 2, x.shape[1] // 2, 2, x.shape[2] // 2).mean((2, 4)).reshape(len(x), 4)
    return {FEATURES: features, PROBABILITIES: jnp.exp(features) / jnp.exp(features).sum(1, keepdims=True)}


@pytest.fixture(scope="module", autouse=True)
def stand_in():
    patch = pytest.MonkeyPatch()
    extractor = Extractor("digits", quarters, {}, "a" * 64, 1, "FD-digits", 8)
    patch.setattr(compare_runs, "open_extractor", lambda *arguments: extractor)
    yield
    patch.undo()


def run(suite, workdir, *flags, code=0):
    arguments = (suite, f"--workdir={workdir}", "--turns=2", "--compilation_cache=auto", *flags)
    found, printed = run_program(compare.main, *arguments, flag_values=compare._FLAGS, num_arguments=1)
    assert found == code, printed
    return printed


def rows_of(workdir):
    with open(workdir / "report" / "comparison.csv", newline="") as file:
        return {(row["name"], row["seed"], row["reading"]): row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def suite_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("suite") / "widths.py"
    path.write_text(SUITE)
    return path


@pytest.fixture(scope="module")
def compared(suite_file, tmp_path_factory):
    """The folder of a comparison with seed 0. At first one of its two runs failed."""
    workdir, patch = tmp_path_factory.mktemp("compared"), pytest.MonkeyPatch()
    train = compare_runs.train

    def failing(experiment, folder):
        if "w_32" in str(folder):
            raise FloatingPointError("the loss was not finite")
        return train(experiment, folder)

    patch.setattr(compare_runs, "train", failing)
    printed = run(suite_file, workdir, "--seeds=0", code=1)
    patch.undo()
    assert "1 runs failed" in printed
    assert "w/32 failed (seed 0): FloatingPointError" in (workdir / "report/comparison.md").read_text().replace(
        "1 of 1 runs of ", ""
    )
    printed = run(suite_file, workdir, "--seeds=0")
    assert "training w/32, seed 0: 13 steps" in printed and "training w/16" not in printed and "a step" not in printed
    return workdir


def test_a_comparison_from_end_to_end(compared):
    schedule = json.loads((compared / "schedule.json").read_text())
    assert schedule == {
        "budget": "13 steps",
        "interval": 3,
        "keep_every": 6,
        "equal_steps": 12,
        "num_steps": {"w/16": 13, "w/32": 13},
    }
    measured = json.loads((compared / "measured.json").read_text())
    assert measured["w/32"]["parameters"] > measured["w/16"]["parameters"] > 1000
    assert measured["w/32"]["step_ms"] == pytest.approx(np.median(measured["w/32"]["step_ms_of_turns"]))
    folder = compared / "runs" / "w_32-seed0"
    assert {int(path.name) for path in (folder / "checkpoints").iterdir()} == {6, 12, 13}
    with open(folder / "metrics.csv", newline="") as file:
        losses = {int(row["step"]): float(row["eval_loss"]) for row in csv.DictReader(file)}
    assert list(losses) == [3, 6, 9, 12, 13]
    rows, scores = rows_of(compared), json.loads((folder / "scores.json").read_text())
    assert list(scores["steps"]) == ["6", "12", "13"] and scores["about"]["num_samples"] == 20
    for reading, step in (("equal", 12), ("end", 13)):
        row = rows["w/32", "0", reading]
        assert float(row["held-out loss"]) == pytest.approx(losses[step], rel=1e-5) and int(row["step"]) == step
        assert float(row["FD-digits"]) == pytest.approx(scores["steps"][str(step)]["FD-digits"]["value"], rel=1e-5)
        assert float(row["seconds"]) == pytest.approx(step * measured["w/32"]["step_ms"] / 1e3, rel=1e-5)
    images, labels = load_run(folder, 12).sample(20)
    features = np.asarray(quarters({}, images)[PROBABILITIES])
    assert float(rows["w/32", "0", "equal"]["accuracy-digits"]) == pytest.approx((features.argmax(-1) == labels).mean())


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.tags, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, text):
        self.texts.append(text)


def test_the_page_holds_everything(compared):
    page = Page((compared / "report" / "comparison.html").read_text())
    assert all(link.startswith("data:image/png;base64,") for link in page.links) and len(page.links) == 4
    assert page.tags.count("svg") == 4 and "script" not in page.tags
    assert "A < B" in page.texts and "model.width=32" in page.texts
    assert any("not tested: one seed" in text for text in page.texts)
    text = (compared / "report" / "comparison.md").read_text()
    for name in ("held_out_loss_against_seconds.svg", "w_16_seed_0_at_step_12.png"):
        assert f"({name})" in text and (compared / "report" / name).exists()


def test_what_is_done_is_not_repeated(compared, suite_file, tmp_path, monkeypatch):
    workdir = shutil.copytree(compared, tmp_path / "again")
    before, folder = rows_of(workdir), workdir / "runs" / "w_32-seed0"
    (folder / "result.json").unlink()
    scores = json.loads((folder / "scores.json").read_text())
    del scores["steps"]["12"]
    (folder / "scores.json").write_text(json.dumps(scores))
    shutil.rmtree(workdir / "report")
    printed = run(suite_file, workdir, "--seeds=0")
    assert "training w/32" in printed and "training w/16" not in printed
    assert next(line for line in printed.splitlines() if "FD-digits" in line).startswith(
        "w_32-seed0, step 12: FD-digits"
    )
    assert printed.count("FD-digits") == 1
    assert rows_of(workdir) == before
    (folder / "result.json").unlink()
    monkeypatch.setattr(compare_runs, "train", lambda *arguments: signal.SIGTERM)
    assert "Stopped by SIGTERM. Repeat the command" in run(suite_file, workdir, "--seeds=0", code=75)
    monkeypatch.setattr(compare_runs, "train", lambda *arguments: None)
    run(suite_file, workdir, "--seeds=0")
    monkeypatch.setattr(compare_runs, "train", None)  # nothing is trained any more
    run(suite_file, workdir, "--seeds=0", "--only=w/32,w/16", "--stages=report")
    assert next(iter(rows_of(workdir)))[0] == "w/32"


def test_runs_of_other_folders_join_the_report(compared, suite_file, tmp_path):
    """Seed 1 in a folder of its own, with the same measurements; then all four runs in one report."""
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(compared / "measured.json", other)
    run(suite_file, other, "--seeds=1", "--only=w/16")
    shutil.rmtree(other / "report")
    workdir = shutil.copytree(compared, tmp_path / "first")
    run(suite_file, workdir, "--stages=report", f"--merge={other}")
    rows = rows_of(workdir)
    assert {seed for name, seed, _ in rows if name == "w/16"} == {"0", "1"}
    assert {seed for name, seed, _ in rows if name == "w/32"} == {"0"}
    text = (workdir / "report" / "comparison.md").read_text()
    assert "**w/32 has not run with seed 1 yet.**" in text and "not tested: one seed" in text
    printed = run(suite_file, workdir, "--stages=report", f"--merge={other},{compared}", code=1)
    assert "is the second run of 'w/16' with seed 0" in printed
    config = json.loads((other / "runs/w_16-seed1/config.json").read_text())
    config["optimizer"]["learning_rate"] = 0.5
    (other / "runs/w_16-seed1/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="a run of another config than 'w/16' with seed 0"):
        read_results(workdir, names=["w/16"], merged=[other])


def test_a_plan_has_the_hours_of_equal_images(tmp_path, monkeypatch):
    """10^12 multiply-adds an image at 50 % of four chips of 197 TFLOP/s: 65.7 images/s. The second does not fit."""
    suite = tmp_path / "suite.py"
    suite.write_text(SUITE.replace('Budget("steps", 13)', 'Budget("images", 1e6), stages=("plan",)'))
    change = {"model.remat": "block"}

    def plan_of(config, machine):
        if config.model.width == 32:
            raise DoesNotFitError("too large")
        return Plan(
            machine=machine,
            mesh={"data": 4},
            batch_size=8,
            settings={},
            state_bytes={},
            batch_bytes=0,
            peak_bytes=2**30,
            costs=Costs({"a": 7}, {"a": 10**12}),
            collectives=[],
            compile_seconds=0,
        )

    monkeypatch.setattr(compare_plan, "make_plan", plan_of)
    monkeypatch.setattr(
        compare_plan,
        "search",
        lambda config, machine: (plan_of(override(config, {"model.width": 16}), machine), change),
    )
    printed = run(suite, tmp_path, "--topology=v5e:2x2", "--mfu=0.5")
    first, second = json.loads((tmp_path / "report" / "plan.json").read_text())
    rate = 0.5 * 4 * 197e12 / 6e12
    assert first["images_per_second"] == pytest.approx(rate) and first["num_images"] == 10**6
    assert first["chip_hours"] == pytest.approx(4 * 1e6 / rate / 3600)
    assert first["own_images"] == 12 * 8 and first["own_chip_hours"] == pytest.approx(4 * 96 / rate / 3600)
    assert second["change"] == "--config.model.remat=block" and "w/32: does not fit: too large" in printed
    assert "| w/16 | 0.0 | 1000.0 | 8 | 1.00 | as it is | 66 |" in printed
    assert (tmp_path / "report" / "plan.html").exists()


def test_wrong_flags_are_refused(compared, suite_file, tmp_path):
    cases = [
        (["--budget=steps"], "KIND:AMOUNT"),
        (["--seeds=a"], "--seeds must be whole numbers"),
        (["--only=w/8"], "w/8"),
        (["--stages=train,plan"], "the stage plan goes alone"),
        (["--stages=plan"], "needs --topology"),
        (["--budget=steps:14"], "holds a comparison at 13 steps"),
        ([f"--merge={tmp_path}", "--stages=report"], "holds no comparison"),
        ([f"--lengths={tmp_path}/no.json", "--stages=report"], "no.json"),
    ]
    for flags, message in cases:
        assert message in run(suite_file, compared, *flags, code=1)
    assert "begin with --stages=measure" in run(suite_file, tmp_path, "--stages=train", code=1)
