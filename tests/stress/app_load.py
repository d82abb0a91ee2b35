"""Many people at once on the page: uploads, reconstructions, views, downloads and texts.

    python tests/stress/app_load.py --people 20 --minutes 5 [--keep-at-most 400]

Each person opens the page, works through the rooms with a small scan, and closes it, again and
again. Exit code 0 when nobody saw an error, results were those of the person's own scan, the memory
of the server did not grow beyond --keep-at-most MiB after the first round of everyone, and no file
was left at the end.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from gradio_client import Client, handle_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.app_rooms import CHOICE, WINDOW
from helpers.small_codec import small_config
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.io import write_scan
from nirvana.mri.model.checkpoint import save_codec
from nirvana.mri.model.codec import CodecModel

SETTLE_SECONDS = 15
PATIENCE_SECONDS = 120


class Load:
    """People who use the page until a time, and what went wrong.

    Args:
        address: of the page.
        scans: a file for each person.
        end: when they stop, by `time.monotonic`.
    """

    def __init__(self, address: str, scans: list[Path], end: float) -> None:
        self.address, self.scans, self.end = address, scans, end
        self.rounds = [0] * len(scans)
        self.seconds: dict[str, list[float]] = {}
        self.errors: list[str] = []

    def person(self, number: int) -> None:
        """Works through the rooms until the end."""
        choose = random.Random(number)
        while time.monotonic() < self.end and not self.errors:
            try:
                self.visit(number, choose)
                self.rounds[number] += 1
            except Exception as error:
                self.errors.append(f"person {number}: {type(error).__name__}: {error}")

    def visit(self, number: int, choose: random.Random) -> None:
        """One session of a person."""
        scan = self.scans[number]
        # Downloads are checked by the browser's test; here they would only fill a disk.
        patience = {"timeout": PATIENCE_SECONDS}  # one or two cores serve everyone
        client = Client(self.address, verbose=False, download_files=False, httpx_kwargs=patience)
        try:
            _, name = self.timed(client, "scan_upload", [handle_file(str(scan))])
            assert scan.name in name, name
            found = self.timed(client, "reconstruct", ["Nirvana"], "2", *WINDOW, *CHOICE)
            assert scan.stem in found[3], found[3]
            for slice_number in (1, 2):
                view = (choose.uniform(20, 80), choose.uniform(50, 150), 2, 50, 50)
                assert "data:image/png" in self.timed(client, "scan_view", slice_number, *view)
            if choose.random() < 0.3:
                self.timed(client, "write_files", ["NIfTI", "HDF5"])
            if choose.random() < 0.3:
                prompt = f"Person {number} writes"
                self.timed(client, "colour", prompt, ["as it is"], "loss")
                self.timed(client, "continue", prompt, ["as it is"], 8, 0.8, 0.95, number)
        finally:
            client.close()

    def timed(self, client: Client, name: str, *values: Any) -> Any:
        """Calls a callback of the page and notes how long it took."""
        start = time.monotonic()
        result = client.predict(*values, api_name=f"/{name}")
        self.seconds.setdefault(name, []).append(time.monotonic() - start)
        return result


def memory(server: psutil.Process) -> float:
    """MiB of the server."""
    return server.memory_info().rss / 2**20


def make_scans(folder: Path, count: int) -> list[Path]:
    """A small scan for each person."""
    scans = []
    for number in range(count):
        image = np.random.default_rng(number).random((4, 64, 64), dtype=np.float32)
        scan = simulate_scan(image, f"person{number}", number, Simulation(num_coils=4))
        write_scan(folder / f"person{number}.h5", scan)
        scans.append(folder / f"person{number}.h5")
    return scans


def main() -> int:
    parser = argparse.ArgumentParser(description="Loads the page.")
    parser.add_argument("--people", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--keep-at-most", type=float, default=400.0, help="MiB of growth.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        save_codec(CodecModel(small_config("none"), None).eval(), folder / "codec")
        scans, temporary = make_scans(folder, options.people), folder / "tmp"
        temporary.mkdir()
        command = [sys.executable, "-m", "nirvana", "app", "--port", "0", "--max-mb", "16"]
        command += ["--codec", str(folder / "codec"), "--device", "cpu"]
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(temporary)},
        ) as program:
            assert program.stdout is not None
            address = program.stdout.readline().split()[0]
            try:
                wrong = run(address, scans, options, psutil.Process(program.pid), temporary)
            finally:
                program.terminate()
        if any(temporary.iterdir()):
            wrong.append(f"left after the end: {sorted(temporary.iterdir())}")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def run(
    address: str, scans: list[Path], options: Any, server: psutil.Process, temporary: Path
) -> list[str]:
    """Loads the server, prints the figures, and returns what was wrong."""
    load = Load(address, scans, time.monotonic() + 60 * options.minutes)
    threads = [threading.Thread(target=load.person, args=(n,)) for n in range(len(scans))]
    for thread in threads:
        thread.start()
    first, peak = None, 0.0
    while any(thread.is_alive() for thread in threads):
        time.sleep(1)
        used = memory(server)
        peak = max(peak, used)
        if first is None and min(load.rounds) >= 1:
            first = used
            print(f"after one round of everyone: {first:.0f} MiB", flush=True)
    time.sleep(SETTLE_SECONDS)  # until the server has noticed that the last ones left
    left = [path for path in temporary.rglob("*") if path.is_file()]
    print(f"{sum(load.rounds)} sessions of {len(scans)} people, {min(load.rounds)} at least each")
    for name, seconds in load.seconds.items():
        middle, most = np.median(seconds), max(seconds)
        print(f"{name}: {len(seconds)} calls, median {middle:.2f} s, at most {most:.2f} s")
    print(f"memory of the server: at most {peak:.0f} MiB, at the end {memory(server):.0f} MiB")
    wrong = load.errors[:5]
    if first is None:
        wrong.append("not everyone finished a round: give more --minutes")
    elif peak - first > options.keep_at_most:
        wrong.append(f"memory grew by {peak - first:.0f} MiB after the first round")
    if left:
        wrong.append(f"{len(left)} files were left by closed sessions, such as {left[0]}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
