"""Work in processes: what a job costs beside its work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_prep.writing.pool import in_processes


@dataclass
class Work:
    """A work function that is bound to something large, and counts how often that is handed over."""

    handed: int = 0

    def __getstate__(self) -> dict[str, Any]:
        self.handed += 1
        return self.__dict__

    def __call__(self, job: int) -> int:
        return job * job


def test_what_work_is_bound_to_is_handed_to_each_worker_once() -> None:
    work = Work()
    assert sorted(in_processes(work, range(37), workers=2)) == [(job, job * job) for job in range(37)]
    assert 1 <= work.handed <= 2, "once a worker, not once a job"
