"""The folder loop: shares, resumption, files left out."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from nirvana import InputError
from nirvana.mri.batch_run import (
    BatchResult,
    ScanJob,
    Share,
    batch_folder,
    run_batch,
    share_of,
)
from nirvana.mri.pipeline import distinct_names


def jobs_in(folder: Path, names: str = "abcde", **settings: Any) -> list[ScanJob]:
    """Jobs of files, which are made where they are not there."""
    made = []
    for number, name in enumerate(names):
        file = folder / f"{name}.h5"
        if not file.exists():
            file.write_text(name)
        job = ScanJob(file, (file,), folder / "out" / name, number, {"seed": number, **settings})
        made.append(job)
    return made


class Work:
    """Copies a scan's text; a text "bad" cannot be used."""

    def __init__(self) -> None:
        self.checked: list[str] = []
        self.done: list[str] = []

    def check(self, job: ScanJob) -> None:
        self.checked.append(job.scan.stem)
        if job.scan.read_text() == "bad":
            raise InputError(f"{job.scan} is bad")

    def __call__(self, job: ScanJob, folder: Path) -> dict[str, Any]:
        if job.scan.read_text() == "bad":
            raise InputError(f"{job.scan} is bad")
        (folder / "image").write_text(job.scan.read_text())
        self.done.append(job.scan.stem)
        return {"volume": job.scan.stem}

    def run(self, jobs: list[ScanJob], **options: Any):
        return run_batch(jobs, self.check, self, out=jobs[0].folder.parent, **options)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): file.read_text()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_a_bad_file_is_refused_before_any_work(tmp_path: Path) -> None:
    jobs, work = jobs_in(tmp_path), Work()
    jobs[3].scan.write_text("bad")
    with pytest.raises(InputError, match=r"d\.h5 is bad"):
        work.run(jobs)
    assert work.done == []
    assert not (tmp_path / "out").exists()


def test_bad_files_are_left_out(tmp_path: Path) -> None:
    jobs, work, lines = jobs_in(tmp_path), Work(), []
    for number in (1, 3):
        jobs[number].scan.write_text("bad")
    found = work.run(jobs, skip=True, notify=lines.append)
    assert work.checked == []
    assert work.done == ["a", "c", "e"]
    assert [one["volume"] for one in found.scans] == ["a", "c", "e"]
    assert found.skipped == [(job.scan, f"{job.scan} is bad") for job in (jobs[1], jobs[3])]
    assert len(lines) == 2
    assert (found.left, found.kept) == (0, 0)
    # A mended file is taken up again, and nothing else.
    jobs[1].scan.write_text("mended")
    again = Work()
    found = again.run(jobs_in(tmp_path), skip=True, resume=True)
    assert again.done == ["b"]
    assert [one["volume"] for one in found.scans] == ["a", "b", "c", "e"]
    assert [path.stem for path, _ in found.skipped] == ["d"]
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["a", "b", "c", "d.skipped.json", "e"]
    # A bad file that is removed leaves nothing behind.
    Work().run(jobs_in(tmp_path, "abc") + jobs_in(tmp_path, "e"), skip=True, resume=True)
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["a", "b", "c", "e"]


def test_finished_scans_are_kept(tmp_path: Path) -> None:
    Work().run(jobs_in(tmp_path, "abc"))
    before = contents(tmp_path / "out")
    again = Work()
    found = again.run(jobs_in(tmp_path, "abc"), resume=True)
    assert (again.done, again.checked, found.kept) == ([], [], 3)
    assert contents(tmp_path / "out") == before
    anew = Work()
    anew.run(jobs_in(tmp_path, "abc"))
    assert anew.done == ["a", "b", "c"]


def test_what_was_made_otherwise_is_made_again(tmp_path: Path) -> None:
    Work().run(jobs_in(tmp_path))
    (tmp_path / "a.h5").write_text("longer")  # another size
    status = (tmp_path / "b.h5").stat()
    os.utime(tmp_path / "b.h5", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    record = tmp_path / "out" / "c" / "metrics.json"
    record.write_text(record.read_text()[:-5])
    again = Work()
    again.run(jobs_in(tmp_path), resume=True)
    assert again.done == ["a", "b", "c"]
    other = Work()
    other.run(jobs_in(tmp_path, codec="other"), resume=True)
    assert other.done == ["a", "b", "c", "d", "e"]


def test_half_written_results_are_removed(tmp_path: Path) -> None:
    jobs = jobs_in(tmp_path)
    out = tmp_path / "out"
    for name in (".a.x1.partial", ".c.x2.old", ".process-1-of-7"):
        (out / name).mkdir(parents=True)
        (out / name / "file").write_text("half")
    batch_folder(out, [job.folder.name for job in jobs])
    Work().run(jobs)
    assert sorted(file.name for file in out.iterdir()) == ["a", "b", "c", "d", "e"]


def test_other_things_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    with pytest.raises(InputError, match="thesis"):
        batch_folder(tmp_path, ["a", "b"])


def test_two_processes_do_not_take_the_same_share(tmp_path: Path) -> None:
    jobs = jobs_in(tmp_path)

    class Twice(Work):
        def __call__(self, job: ScanJob, folder: Path) -> dict[str, Any]:
            with pytest.raises(InputError, match="another process works there"):
                Work().run(jobs)
            return super().__call__(job, folder)

    Twice().run(jobs)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_shares_are_the_whole(size: int, tmp_path: Path) -> None:
    jobs, done = jobs_in(tmp_path), []
    for index in range(size):
        work = Work()
        found = work.run(jobs, share=Share(task=index, tasks=size))
        done += work.done
        assert len(found.scans) == len(done)
        assert found.left == 5 - len(done)
    assert sorted(done) == ["a", "b", "c", "d", "e"]
    alone = tmp_path / "alone"
    alone.mkdir()
    Work().run(jobs_in(alone))
    ours, theirs = contents(tmp_path / "out"), contents(alone / "out")
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.endswith("image"):
            assert ours[name] == theirs[name]


def test_the_reporting_process_ends_last(tmp_path: Path) -> None:
    """Until the others have cleared up: then a launcher ends them at its exit code."""
    jobs, first = jobs_in(tmp_path), Share(0, 2)
    (second,) = (each for each in first.launched() if not each.reports)
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Work):
        def __call__(self, job: ScanJob, folder: Path) -> dict[str, Any]:
            begun.set()
            assert go_on.wait(60)
            return super().__call__(job, folder)

    other = threading.Thread(target=lambda: Slow().run(jobs, share=second))
    reporting: list[BatchResult] = []
    report = threading.Thread(target=lambda: reporting.append(Work().run(jobs, share=first)))
    other.start()
    assert begun.wait(60)
    report.start()
    report.join(0.3)
    assert report.is_alive()
    go_on.set()
    report.join(60)
    assert [len(each.scans) for each in reporting] == [5]
    assert not second.lock(tmp_path / "out").exists()
    other.join(60)


def test_the_share_of_a_process() -> None:
    assert share_of({}) == Share()
    assert share_of({"RANK": "2", "WORLD_SIZE": "4"}) == Share(2, 4)
    array = {
        "SLURM_ARRAY_TASK_ID": "7",
        "SLURM_ARRAY_TASK_COUNT": "4",
        "SLURM_ARRAY_TASK_MIN": "1",
        "SLURM_ARRAY_TASK_MAX": "10",
        "SLURM_ARRAY_TASK_STEP": "3",
    }
    third = share_of(array)
    assert (third.index, third.size) == (2, 4)
    assert third.launched() == [third]
    both = share_of({**array, "RANK": "1", "WORLD_SIZE": "2"})
    assert (both.index, both.size) == (5, 8)
    assert [number for number in range(16) if both.takes(number)] == [5, 13]
    assert [each.index for each in both.launched()] == [4, 5]
    assert [each.reports for each in both.launched()] == [True, False]
    short = share_of({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "3"})
    assert (short.index, short.size) == (1, 3)


@pytest.mark.parametrize("change", [{"ID": "4"}, {"MAX": "9"}, {"ID": "0"}, {"COUNT": "2"}])
def test_an_uneven_array_is_refused(change: dict[str, str]) -> None:
    values = {"ID": "3", "COUNT": "3", "MIN": "1", "MAX": "5", "STEP": "2", **change}
    with pytest.raises(InputError, match="not evenly numbered"):
        share_of({f"SLURM_ARRAY_TASK_{name}": value for name, value in values.items()})


def test_records_hold_no_tuples(tmp_path: Path) -> None:
    """What is compared with a record in a file has the form that the file gives it."""
    (job,) = jobs_in(tmp_path, "a", formats=("hdf5", "png"))
    assert job.record == json.loads(json.dumps(job.record))


def test_files_have_distinct_names():
    names = {
        ("a.h5", "b.nii.gz"): ["a", "b"],
        ("x/a.h5", "x/a.nii.gz", "x/b.h5"): ["a.h5", "a.nii.gz", "b"],
        ("x/a.h5", "y/a.h5", "x/a.h5"): ["x/a.h5", "y/a.h5", "x/a.h5"],
    }
    for paths, expected in names.items():
        assert distinct_names([Path(path) for path in paths]) == expected
    images = [Path("a.h5"), Path("a.h5"), Path("a.npy")]
    assert distinct_names(images, ["-0", "-1", "-0"]) == ["a.h5-0", "a-1", "a.npy-0"]
