"""A short soak; the full one of 20,000 is `pytest bench/bench_verify.py -k soak --benchmark-only -s`."""

from soak import soak


def test_a_mixed_run_with_hostile_tasks_loses_nothing_and_leaves_nothing():
    report = soak(800)
    assert report.lost == []
    assert report.surprising == []
    assert report.survivors == []
    assert report.files == []
    assert len(set(report.processes[1:])) == 1, report.processes
    assert sum(sum(counts.values()) for counts in report.statuses.values()) == 800
