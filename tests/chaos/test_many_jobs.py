"""A sample of `make many-jobs`."""

from tests.chaos.many_jobs import run_together


def test_jobs_that_start_in_the_same_moment_do_not_meet():
    run_together(3, 120)
