"""Large files are converted in bounded memory."""

from __future__ import annotations

import subprocess
import sys

import h5py
import numpy as np
import pytest

from genpol.data.formats import open_dataset

NUM_ROWS, LENGTH = 2_600_000, 1000
SCRIPT = """
import resource, sys
from pathlib import Path
from genpol.data import formats
from genpol.data.formats import d4rl, ogbench
import h5py

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak()
formats.convert(Path(sys.argv[1]), Path(sys.argv[2]))
print((peak() - before) * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.fixture
def arrays():
    """Return random numbers, which do not compress."""
    rng = np.random.default_rng(0)
    ends = np.arange(NUM_ROWS) % LENGTH == LENGTH - 1
    return {
        "observations": rng.standard_normal((NUM_ROWS, 28), dtype=np.float32),
        "actions": rng.uniform(-1, 1, (NUM_ROWS, 5)).astype(np.float32),
        "terminals": ends,
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["big.npz", "big.hdf5"])
def test_a_file_of_300_mb_takes_less_than_200_mb(tmp_path, arrays, name):
    path = tmp_path / name
    if name == "big.npz":
        np.savez_compressed(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for key, array in arrays.items():
                file.create_dataset(key, data=array, compression="gzip", compression_opts=1)
    assert path.stat().st_size > 300e6
    command = [sys.executable, "-c", SCRIPT, str(path), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 200e6
    assert open_dataset(tmp_path / "out").num_trajectories == NUM_ROWS // LENGTH
