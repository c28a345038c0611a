"""One run on any mesh: the same losses on 1 device, on 8 in any arrangement and in two processes; resumed on others."""

import signal
import time

import numpy as np
import pytest
from runs import DIGITS, QUIET, ROOT, losses, run, start, wait

CIFAR = ROOT.parent / "shared/data/cifar10_jpg.zip"


def mesh_flags(data, fsdp, tensor):
    return f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}", f"--config.mesh.tensor={tensor}"


def digits_flags(num_steps=50):
    lengths = (f"--config.num_steps={num_steps}", "--config.checkpoint_every=1000")
    return (*DIGITS, *QUIET, *lengths, "--config.optimizer.decay=constant")


@pytest.fixture(scope="session")
def one_device_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("one_device")


@pytest.fixture(scope="session")
def on_one_device(one_device_folder):
    found = run(one_device_folder, *digits_flags())
    assert found[-1] < 0.8 * found[0]
    return found


def assert_same_losses(found, expected):
    assert len(found) == len(expected) == 50
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1)], ids=["data", "fsdp"])  # below: 2 x 2 x 2
def test_digits_train_alike_on_any_mesh(mesh, on_one_device, tmp_path):
    assert_same_losses(run(tmp_path, *digits_flags(), *mesh_flags(*mesh), num_devices=8), on_one_device)


@pytest.mark.slow
def test_two_processes_train_alike_and_stop_together(on_one_device, tmp_path):
    flags = (*digits_flags(), *mesh_flags(2, 2, 2))
    options = {"num_devices": 4, "num_processes": 2}
    processes = start(tmp_path, *flags, **options)
    while len(losses(tmp_path)) < 10:
        assert all(p.poll() is None for p in processes), (tmp_path / "output_0").read_text()[-4000:]
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)  # one of them is enough, as when one host is taken away
    wait(tmp_path, processes, code=75)
    stopped_at = len(losses(tmp_path))
    assert 10 <= stopped_at < 50 and (tmp_path / "run" / "checkpoints" / str(stopped_at)).is_dir()
    assert "Stopped by SIGTERM, saved" in (tmp_path / "output_0").read_text()
    assert_same_losses(run(tmp_path, *flags, **options), on_one_device)
    assert f"checkpoint of step {stopped_at}" in (tmp_path / "output_0").read_text()


@pytest.mark.slow
def test_fine_tuning_starts_alike_in_two_processes(on_one_device, one_device_folder, tmp_path):
    flags = (*digits_flags(2), "--config.optimizer.warmup_steps=0", f"--config.init_from={one_device_folder / 'run'}")
    expected = run(tmp_path / "one", *flags)
    assert expected[0] < 0.8 * on_one_device[0]
    found = run(tmp_path / "many", *flags, *mesh_flags(1, 2, 1), num_devices=1, num_processes=2)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR.exists(), reason="needs CIFAR-10 beside the project: ../shared/data/cifar10_jpg.zip")
def test_cifar10_trains_alike_on_a_mesh(tmp_path):
    flags = (
        *("--config=configs/cifar10.py:S", "--config.model.width=32", "--config.model.depth=2", *QUIET),
        *("--config.num_steps=50", "--config.batch_size=8", "--config.optimizer.learning_rate=1e-3"),
        *(f"--config.data.path={CIFAR}", "--config.model.state_size=8"),
    )
    expected = run(tmp_path / "one", *flags)
    assert_same_losses(run(tmp_path / "mesh", *flags, *mesh_flags(2, 2, 2), num_devices=8), expected)


@pytest.mark.slow
def test_a_run_goes_on_on_fewer_devices(on_one_device, tmp_path):
    run(tmp_path, *digits_flags(20), *mesh_flags(2, 4, 1), num_devices=8)
    run(tmp_path, *digits_flags(35), *mesh_flags(1, 2, 2), num_devices=4)
    found = run(tmp_path, *digits_flags(50), num_devices=1)
    np.testing.assert_allclose(found, on_one_device, rtol=1e-4)
