"""Damages a sound file of every format again and again, and reads the results.

    python tests/stress/mutated_files.py --count 2000 [--seed 0] [--only vd.dat]

Each damaged file must be read, into finite numbers that are not all zero, or be refused in one line
that names it, within 64 MiB of memory and 30 seconds. Exit code 0 when all of this held; a file
that broke it stays in --keep.
"""

import argparse
import contextlib
import faulthandler
import io
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.scan_files import MAKERS, damaged, read, read_or_refuse

SECONDS = 30
ADDRESS_SPACE = 6 * 2**30
"""A library that allocates beyond it fails here instead of taking the machine's memory."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Reads damaged files of every format.")
    parser.add_argument("--count", type=int, default=2000, help="Files of all formats together.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=MAKERS, help="One format.")
    parser.add_argument("--keep", type=Path, default=Path("mutated-files"))
    options = parser.parse_args()
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    warnings.simplefilter("ignore")
    names = [options.only] if options.only else list(MAKERS)
    wrong = 0
    for number, name in enumerate(names):
        share = options.count // len(names) + (number < options.count % len(names))
        wrong += stress(name, share, options.seed, options.keep)
    print(f"{options.count} files, {wrong} wrong")
    return 1 if wrong else 0


def stress(name: str, count: int, seed: int, keep: Path) -> int:
    """Number of damaged files of one format with which a reader did what it may not."""
    wrong = taken = 0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        whole = MAKERS[name](Path(folder) / f"whole-{name}")
        read(whole)  # imports what the format needs, so that its memory is not counted
        content = whole.read_bytes()
        for number in range(count):
            path = Path(folder) / name
            path.write_bytes(damaged(content, random.Random(f"{seed}-{name}-{number}")))
            if name == "bart.cfl":
                header = whole.with_suffix(".hdr").read_bytes()
                if number % 2:
                    header = damaged(header, random.Random(f"{seed}-{name}-header-{number}"))
                    path.write_bytes(content)
                path.with_suffix(".hdr").write_bytes(header)
            output = io.StringIO()
            signal.alarm(SECONDS)
            try:
                with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                    taken += read_or_refuse(path)
                assert not output.getvalue(), f"printed: {output.getvalue()[:200]}"
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                keep.mkdir(exist_ok=True)
                kept = keep / f"{seed}-{number}-{name}"
                kept.write_bytes(path.read_bytes())
                print(f"{kept}: {type(error).__name__}: {error}", file=sys.stderr)
                wrong += 1
            finally:
                signal.alarm(0)
    seconds = time.perf_counter() - start
    print(f"{name}: {count} files, {taken} read, {wrong} wrong, {seconds:.0f} s", flush=True)
    return wrong


def _too_slow(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, _too_slow)
    sys.exit(main())
