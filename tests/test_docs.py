"""Links in the documentation lead to files that exist, and the commands and examples in it run as they stand.

Every fenced block of bash or Python in README.md and docs/ runs in a copy of the repository, page by page. A comment
before a block says what is different here:

    <!-- short PROGRAM: FLAGS -->   adds flags to each `python -m diffussm_jax.PROGRAM` of the block, to save time
    <!-- not run: REASON -->        what the block needs and tests do not have
    <!-- command: NAME -->          .ci/run runs it, with a virtual environment of its own

`.venv/bin/python` is the Python of the tests. `.venv/bin/pip install` only checks that the extras exist. A block whose
extra is large and not installed, such as `plan`, is left out.
"""

import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*.md")])
# README first, and data.md, which makes latents, before bench.md, which reads them.
WITH_BLOCKS = [ROOT / "README.md", ROOT / "docs/data.md"]
WITH_BLOCKS += sorted({*ROOT.glob("docs/*.md")} - {*WITH_BLOCKS})
BLOCK = re.compile(r"(?P<notes>(?:<!-- [^\n]* -->\n)*)```(?P<language>bash|python)\n(?P<code>.*?)^```$", re.M | re.S)
NOTE = re.compile(r"<!-- (?:(?P<kind>not run|command)|short (?P<program>[a-z_ ]+)): (?P<text>.*) -->")
DIGITS_RUN = "DIFFUSSM_DIGITS_RUN"  # the folder of a trained run, if there is one
SHORT_DIGITS = ("--config.num_steps=2", "--config.eval_every=0", "--config.sample_every=0", "--config.model.depth=1")

# A program's flags of a block are in a variable such as SHORT_bench_ssm; later flags override earlier ones.
PYTHON = f"""#!/usr/bin/env bash
words=()
if [[ $1 == -m && $2 == diffussm_jax.* ]]; then
  name=SHORT_${{2#diffussm_jax.}}
  [[ $2 != *.bench ]] || name+=_$3
  words=(${{!name:-}})
fi
exec {sys.executable} "$@" "${{words[@]}}"
"""
PIP = f"""#!{sys.executable}
import re, sys
from importlib.util import find_spec
sys.path.insert(0, {str(ROOT / "tests")!r})
from test_docs import EXTRAS, MISSING, MODULES
names = ",".join(re.findall(r"\\[([\\w,-]+)\\]", " ".join(sys.argv))).split(",")
assert sys.argv[1] == "install" and set(names) <= EXTRAS | {{""}}, sys.argv
sys.exit(MISSING if any(find_spec(MODULES.get(name, "sys")) is None for name in names) else 0)
"""
MODULES = {"plan": "libtpu", "plan-gpu": "jax_cuda13_plugin", "cuda12": "jax_cuda12_plugin"}  # of large extras
MISSING = 75
EXTRAS = set(metadata.metadata("diffussm_jax").get_all("Provides-Extra"))


class Block(NamedTuple):
    language: str
    code: str
    kind: str | None  # "not run" or "command"
    flags: dict[str, str]  # by the name of their variable


def blocks(page):
    found = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        notes = [NOTE.fullmatch(line) for line in match["notes"].splitlines()]
        assert all(notes), f"{page}: unknown note in {match['notes']}"
        flags = {}
        for note in notes:
            if note["program"]:
                variable = f"SHORT_{note['program'].replace(' ', '_')}"
                flags[variable] = f"{flags.get(variable, '')} {note['text']}"
        kind = next((n["kind"] for n in notes if n["kind"]), None)
        found.append(Block(match["language"], match["code"], kind, flags))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_the_readme_is_short_and_leads_to_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    assert all(f"](docs/{page.name})" in readme for page in ROOT.glob("docs/*.md"))


def test_every_block_of_a_page_is_found():
    for page in WITH_BLOCKS:
        fences = re.findall(r"^```(?:bash|python)$", page.read_text(encoding="utf-8"), re.M)
        assert len(fences) == len(blocks(page)), page


@pytest.fixture(scope="session")
def copy(tmp_path_factory):
    """A copy of what the pages need of the repository, with the data that they name."""
    copy = tmp_path_factory.mktemp("docs") / "diffussm_jax"
    for name in ("configs", "diffussm_jax"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, content in {"python": PYTHON, "pip": PIP}.items():
        path = copy / ".venv" / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    noise = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    for i, pixels in enumerate(noise):
        path = copy / "FOLDER" / f"class_{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    with zipfile.ZipFile(copy / "cifar10.zip", "w") as cifar:
        for i in range(40):  # 0.png ... 9.png of ten classes
            cifar.write(copy / "FOLDER" / f"class_{i % 2}" / f"{i % 20}.png", f"{_split(i)}/class_{i % 10}/{i}.jpg")
    if run := os.environ.get(DIGITS_RUN):
        shutil.copytree(run, copy / "runs" / "digits")
    else:
        command = [".venv/bin/python", "-m", "diffussm_jax.main", "--config=configs/digits.py", "--workdir=runs/digits"]
        subprocess.run([*command, *SHORT_DIGITS, "--config.optimizer.warmup_steps=0"], cwd=copy, check=True)
    return copy


def _split(i):
    return "train" if i < 20 else "test"


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_run(page, copy):
    to_run = [block for block in blocks(page) if block.kind is None]
    if not to_run:
        pytest.skip("the page has no block that runs here")
    for block in to_run:
        shell = ["bash", "-euo", "pipefail", "-c", block.code]
        command = shell if block.language == "bash" else [".venv/bin/python", "-c", block.code]
        done = subprocess.run(command, cwd=copy, env=os.environ | block.flags, capture_output=True, text=True)
        assert done.returncode in (0, MISSING), f"{block.code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
