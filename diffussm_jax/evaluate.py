"""Scores samples: python -m diffussm_jax.evaluate --workdir=runs/digits --features=digits --num_samples=1000

Writes report.json, report.txt and report.html: FID, sFID, IS, precision, recall and more, each with an interval and the
protocol. Other uses:

    --samples=FILE.npz --reference=REFERENCE.npz     score files in ADM's convention, or a folder of images
    --make_reference=REFERENCE.npz --data=PATH       statistics of real images
    --workdir=RUN --sweep=num_steps:10,20,50         score every combination of sampling options
    --compare A B                                    say which scores of two reports differ by more than the noise
    --convert=WEIGHTS                                read pretrained weights of Inception or DINOv2 once
"""

import re
import sys

import jax
from absl import app, flags
from etils import epath
from tqdm import tqdm

from diffussm_jax import cli, evaluate_images, evaluate_real
from diffussm_jax.config_keys import MAX_SEED
from diffussm_jax.evaluate_job import REPORT, Job, evaluate, write_report
from diffussm_jax.evaluate_sweep import Swept, best_of, combinations, parse_sweeps, sweep_csv, sweep_plot
from diffussm_jax.evaluation.classifier import CLASSIFIERS
from diffussm_jax.evaluation.extractor import DISTANCES
from diffussm_jax.evaluation.report import (
    check_report,
    compare,
    other_differences,
    protocol_line,
    text_comparison,
    text_report,
)
from diffussm_jax.evaluation.scores import SCORES, name_of
from diffussm_jax.io import check_path, check_writable, read_json, weights_hash, write_whole
from diffussm_jax.options import check_names
from diffussm_jax.run import Run, load_run, read_config

_FLAGS = flags.FlagValues()  # of its own, so that several programs can be imported together
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run, or of an export, to sample from.", flag_values=_FLAGS)
_SAMPLES = flags.DEFINE_string(
    "samples",
    None,
    "In place of --workdir: an .npz (arr_0, arr_1), a folder, zip or tar of images.",
    flag_values=_FLAGS,
)
_REFERENCE = flags.DEFINE_string(
    "reference", None, "Statistics, .npz of ADM or --make_reference. Default: the real images.", flag_values=_FLAGS
)
_DATA = flags.DEFINE_string(
    "data", "", "Real images: a folder, zip, tar, tfds:NAME, or digits. Default: the run's.", flag_values=_FLAGS
)
_SPLIT = flags.DEFINE_string("split", None, "Split of --data. Default: found in it.", flag_values=_FLAGS)
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", None, "Pixels to crop --data to. Default: those of the samples.", lower_bound=1, flag_values=_FLAGS
)
_FEATURES = flags.DEFINE_enum(
    "features",
    None,
    list(DISTANCES),
    "Network of the features. Default: that of --reference; digits for runs on digits; else inception.",
    flag_values=_FLAGS,
)
_WEIGHTS = flags.DEFINE_string(
    "weights",
    "",
    "File of the network's weights. Default: those that --convert read, or a classifier is trained.",
    flag_values=_FLAGS,
)
_SCORES = flags.DEFINE_list("scores", list(SCORES), "Scores to compute.", flag_values=_FLAGS)
_PRECISION_RECALL = flags.DEFINE_enum(
    "precision_recall",
    "float32",
    ["float32", "adm_float16"],
    "Arithmetic of precision and recall; adm_float16 adds those with the rounding of ADM's evaluator.",
    flag_values=_FLAGS,
)
_BOOTSTRAP = flags.DEFINE_integer(
    "bootstrap", None, "Resamples of each interval. Default: 200, or 10 for large features.", lower_bound=2,
    flag_values=_FLAGS,
)  # fmt: skip
_NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", None, "Samples of --workdir. Default: 50,000, or 1,000 for classifiers.", lower_bound=10,
    flag_values=_FLAGS,
)  # fmt: skip
_LABELS = flags.DEFINE_enum(
    "labels",
    evaluate_images.BALANCED,
    [evaluate_images.BALANCED, evaluate_images.RANDOM],
    "Classes of samples: all in turn, or drawn at random.",
    flag_values=_FLAGS,
)
_SAMPLING = cli.define_sampling(_FLAGS)
_SWEEP = flags.DEFINE_multi_string(
    "sweep", [], "KEY:VALUE,VALUE,... of config.sampling, such as num_steps:10,20; may be repeated.", flag_values=_FLAGS
)
_SWEEP_SCORE = flags.DEFINE_string(
    "sweep_score", None, "Score of the plot and of the best. Default: the Fréchet distance.", flag_values=_FLAGS
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=MAX_SEED, flag_values=_FLAGS)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Samples per batch.", lower_bound=1, flag_values=_FLAGS)
_FEATURE_BATCH_SIZE = flags.DEFINE_integer(
    "feature_batch_size", 64, "Images per batch of the feature network.", lower_bound=1, flag_values=_FLAGS
)
_CHECKPOINT, _EMA_SIGMA = cli.define_checkpoint(_FLAGS)
_GUIDE = cli.define_guide(_FLAGS)
_VAE = flags.DEFINE_string("vae", None, "Autoencoder that decodes latents. Default: config.", flag_values=_FLAGS)
_OUT = flags.DEFINE_string("out", None, "Folder to write. Default: in WORKDIR/evaluation.", flag_values=_FLAGS)
_MAKE_REFERENCE = flags.DEFINE_string(
    "make_reference", None, "Write the statistics of --data to this .npz.", flag_values=_FLAGS
)
_CONVERT = flags.DEFINE_string(
    "convert", None, "Convert this file of pretrained weights, of the network --features.", flag_values=_FLAGS
)
_COMPARE = flags.DEFINE_bool(
    "compare", False, "Whether to compare two arguments: each a report, or several with commas.", flag_values=_FLAGS
)
_DISTRIBUTED = flags.DEFINE_string(
    "distributed", "auto", "auto, none, or COORDINATOR:PORT,NUM_PROCESSES,PROCESS_ID.", flag_values=_FLAGS
)
_COMPILATION_CACHE = cli.define_compilation_cache(_FLAGS)
# Flags that mean nothing without --workdir, or with what is in the second row.
_OF_RUNS = ("num_samples", "labels", "sampler", "steps", "guidance_scale", "sweep", "seed", "checkpoint", "ema_sigma")
_OF_RUNS += ("guide", "vae")
_OF_SCORES = ("reference", "samples", "scores", "precision_recall", "bootstrap", "out")


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def _open_run() -> Run:
    return load_run(
        _WORKDIR.value,
        _CHECKPOINT.value,
        ema_sigma=_EMA_SIGMA.value,
        guide=_GUIDE.value,
        vae=_VAE.value,
        **_SAMPLING(),
    )


def _choose_features() -> str:
    if _FEATURES.value:
        return _FEATURES.value
    if _REFERENCE.value:
        return evaluate_real.about_reference(_REFERENCE.value).get("extractor", "inception")
    on_digits = _DATA.value == "digits" or (
        _WORKDIR.value and not _DATA.value and read_config(_WORKDIR.value).data.source == "digits"
    )
    return "digits" if on_digits else "inception"


def _open_real(features: str, image_size: int | None) -> evaluate_real.RealData | None:
    """The real images of --data or of the run, if they are needed: for a classifier, or in place of a reference."""
    is_classifier = features in CLASSIFIERS
    if _REFERENCE.value and (not is_classifier or _WEIGHTS.value) and not _DATA.value:
        return None
    path = _DATA.value or ("digits" if features == "digits" and not _WORKDIR.value else "")
    config = read_config(_WORKDIR.value) if _WORKDIR.value else None
    size = CLASSIFIERS[features].image_size if is_classifier else _IMAGE_SIZE.value or image_size
    return evaluate_real.open_real_data(path, run_config=config, image_size=size, split=_SPLIT.value)


def _make_job(features: str, image_size: int) -> Job:
    real = _open_real(features, image_size)
    extractor = evaluate_real.open_extractor(features, _WEIGHTS.value, real, _say)
    batch_size = _FEATURE_BATCH_SIZE.value
    return Job(
        extractor=extractor,
        reference=evaluate_real.open_reference(_REFERENCE.value, extractor, real, batch_size),
        real=real,
        chosen=_SCORES.value,
        mode=_PRECISION_RECALL.value,
        num_resamples=_BOOTSTRAP.value,
        batch_size=batch_size,
    )


def _default_out(run: Run | None, features: str, num_samples: int) -> epath.Path:
    if run is None:
        path = epath.Path(_SAMPLES.value)
        return path.parent / f"{path.name.removesuffix('.npz')}_{features}"
    of_labels = "" if _LABELS.value == evaluate_images.BALANCED else f"_{_LABELS.value}"
    name = f"{run.samples_name(_SEED.value, _EMA_SIGMA.value)}_n{num_samples}{of_labels}_{features}"
    return epath.Path(_WORKDIR.value) / "evaluation" / name


def _images(run: Run, out: epath.Path, about: dict, num_samples: int) -> evaluate_images.Images:
    return evaluate_images.of_run(
        run,
        out / "samples",
        about,
        num_samples=num_samples,
        label_choice=_LABELS.value,
        seed=_SEED.value,
        batch_size=_BATCH_SIZE.value,
    )


def _evaluate(job: Job, images: evaluate_images.Images, out: epath.Path, **options) -> dict:
    with tqdm(total=images.num_images, unit="image", dynamic_ncols=True, disable=jax.process_index() > 0) as bar:
        report, pictures = evaluate(job, images, progress=bar.update, **options)
    if jax.process_index() == 0:
        write_report(out, report, pictures, f"{job.extractor.distance} and other scores: {out.name}")
    return report


def _check_scores(distance: str) -> str:
    """The name of the score that a sweep is judged by. Raises ValueError for a score that is not computed."""
    check_names(_SCORES.value, SCORES, "score")
    names = {}
    for key in _SCORES.value:
        of_key = [name_of(name, distance) for name in SCORES[key][1]]
        names |= {key: of_key[0]} | {name: name for name in of_key}
    asked = _SWEEP_SCORE.value or _SCORES.value[0]
    check_names([asked], names, "score of --sweep_score")
    return names[asked]


def _score_run() -> int:
    """Scores a run, or sweeps its sampling options."""
    features, sweeps = _choose_features(), combinations(parse_sweeps(_SWEEP.value))
    sweep_score = _check_scores(DISTANCES[features])
    run = _open_run()
    if run.guide is not None and run.config.sampling.guidance_scale == 1 and not _SWEEP.value:
        raise ValueError("--guide does nothing with config.sampling.guidance_scale = 1: give a larger --guidance_scale")
    variants = [run.with_sampling(**values) for values in sweeps]  # wrong values end here
    num_samples = _NUM_SAMPLES.value or (1_000 if features in CLASSIFIERS else 50_000)
    out = epath.Path(_OUT.value or _default_out(run, features, num_samples))
    check_writable(out / REPORT)
    job = _make_job(features, run.config.data.image_size)
    about = {
        "checkpoint_sha256": weights_hash(jax.device_get(run.params)),
        "ema": "of the checkpoint" if _EMA_SIGMA.value is None else f"post hoc, sigma_rel {_EMA_SIGMA.value:g}",
    }
    if run.guide is not None:
        about["guide_sha256"] = weights_hash(jax.device_get(run.guide.params))
    if _SWEEP.value:
        return _sweep(job, list(zip(sweeps, variants, strict=True)), out, about, num_samples, sweep_score)
    return _report(_evaluate(job, _images(run, out, about, num_samples), out), out)


def _score_files() -> int:
    features = _choose_features()
    _check_scores(DISTANCES[features])
    images = evaluate_images.of_path(_SAMPLES.value, _BATCH_SIZE.value)
    out = epath.Path(_OUT.value or _default_out(None, features, images.num_images))
    check_writable(out / REPORT)
    return _report(_evaluate(_make_job(features, images.image_size), images, out), out)


def _report(report: dict, out: epath.Path) -> int:
    _say(text_report(report) + f"\n\nWrote {out}/report.html, report.txt and {REPORT}.")
    return 0


def _sweep(
    job: Job, variants: list[tuple[dict, Run]], out: epath.Path, about: dict, num_samples: int, score: str
) -> int:
    points = []
    for values, run in variants:
        name = "_".join(f"{key}-{value}" for key, value in values.items())
        folder = out / f"sweep_{re.sub('[^-.,+0-9A-Za-z_]', '', name)}"
        report = _evaluate(job, _images(run, folder, about, num_samples), folder, is_complete=False)
        check_names([score], report["scores"], "score of --sweep_score")  # the samples or the network may not permit it
        points.append(Swept(values, report))
        _say(f"{points[-1].name}: {_value_of(points[-1], score)}")
    best, near = best_of(points, score)
    if jax.process_index() == 0:
        write_whole(out / "sweep.csv", sweep_csv(points))
        try:
            write_whole(out / "sweep.png", sweep_plot(points, score))
        except ValueError as error:  # without matplotlib
            print(f"No plot: {error}", file=sys.stderr)
    _say(
        f"The best: {best.name}, {_value_of(best, score)}.\n"
        f"Its interval overlaps with: {'; '.join(point.name for point in near) or 'none'}.\n"
        f"Its protocol: {protocol_line(best.report['protocol'])}\n"
        f"Wrote {out}/sweep.csv" + (" and sweep.png." if (out / "sweep.png").exists() else ".")
    )
    return 0


def _value_of(point: Swept, name: str) -> str:
    score = point.report["scores"][name]
    return f"{name} {score['value']:.4g} ({score['low']:.4g} ... {score['high']:.4g})"


def _reports(argument: str) -> list[dict]:
    """The reports of an argument of --compare: files, or folders that hold a report.json, with commas between them."""
    found = []
    for name in argument.split(","):
        path = epath.Path(name)
        path = path / REPORT if path.is_dir() else path
        if not path.exists():
            raise FileNotFoundError(f"there is no report {path}")
        found.append(read_json(path))
        check_report(found[-1], str(path))
    return found


def _compare(*arguments: str) -> int:
    a, b = map(_reports, arguments)
    print(text_comparison(compare(a, b)))
    if differing := other_differences(a[0], b[0]):
        print("\nThe first reports of both sides also differ in\n  " + "\n  ".join(differing))
    return 0


def _write_reference() -> int:
    path = epath.Path(_MAKE_REFERENCE.value)
    if path.suffix != ".npz":
        raise ValueError(f"--make_reference must be a path that ends in .npz, got {path}")
    check_writable(path)
    features = _choose_features()
    real = _open_real(features, None)
    extractor = evaluate_real.open_extractor(features, _WEIGHTS.value, real, _say)
    num_images = len(evaluate_real.rows_of_reference(extractor, len(real.training)))
    with tqdm(total=num_images, unit="image", dynamic_ncols=True, disable=jax.process_index() > 0) as bar:
        reference = evaluate_real.reference_of_images(extractor, real, _FEATURE_BATCH_SIZE.value, bar.update)
    if jax.process_index() == 0:
        evaluate_real.write_reference(path, reference)
    _say(f"Wrote {path}: {features} statistics of {num_images:,} images of {real.description}.")
    return 0


def _check_flags() -> None:
    """Raises UsageError for flags that would be ignored."""
    ignored: tuple[str, ...] = ()
    if _MAKE_REFERENCE.value:
        ignored = (*_OF_RUNS, *_OF_SCORES)
    elif _SAMPLES.value:
        ignored = _OF_RUNS
    if not _SWEEP.value:
        ignored += ("sweep_score",)
    if not _DATA.value or _DATA.value == "digits":
        ignored += ("split", "image_size")
    if found := [f"--{name}" for name in ignored if _FLAGS[name].present]:
        raise app.UsageError(f"{', '.join(found)} would have no effect here")


def main(*arguments: str) -> int:
    """Scores, and returns the exit code."""
    if _COMPARE.value:
        if len(arguments) != 2:
            raise app.UsageError(f"--compare takes two reports, A B, got {len(arguments)}")
        return _compare(*arguments)
    if arguments:
        raise app.UsageError(f"arguments without --compare: {' '.join(arguments)}")
    if _CONVERT.value:
        print(f"Wrote {evaluate_real.convert_weights(_CONVERT.value, _FEATURES.value or 'inception')}.")
        return 0
    if bool(_WORKDIR.value) == bool(_SAMPLES.value) and not _MAKE_REFERENCE.value:
        raise app.UsageError("give --workdir=FOLDER, a run to sample from, or --samples=FILE, images to score")
    _check_flags()
    for path in filter(None, (_WORKDIR.value, _OUT.value, _REFERENCE.value, _MAKE_REFERENCE.value)):
        check_path(path)
    cli.join_hosts(_DISTRIBUTED.value)
    cli.keep_freed_memory()
    cli.use_compilation_cache(_COMPILATION_CACHE.value)
    if _MAKE_REFERENCE.value:
        return _write_reference()
    return _score_run() if _WORKDIR.value else _score_files()


if __name__ == "__main__":
    cli.run(main, _FLAGS, num_arguments=None)
