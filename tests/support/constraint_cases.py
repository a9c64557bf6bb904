"""Tables of cases for constraints: id -> (kwargs, responses that satisfy it, responses that do not)."""

from m2rl.domains import instruct
from m2rl.domains.constraints import CONSTRAINTS


def rows(cases):
    """(id, kwargs, response, whether it satisfies the constraint) of every case."""
    return [
        (id, kwargs, response, good)
        for id, table in cases.items()
        for kwargs, right, wrong in table
        for responses, good in ((right, True), (wrong, False))
        for response in responses
    ]


def check(id, kwargs, response, good):
    verdict = instruct.verify(response, {"constraints": [{"id": id, "kwargs": kwargs}]})
    assert (verdict.reward, verdict.status) == ((1.0, "ok") if good else (0.0, "wrong")), verdict
    assert good or id in verdict.detail, verdict


def check_every_id_has_two_of_each_kind(cases, ids):
    assert len(cases) == ids and cases.keys() <= CONSTRAINTS.keys()
    for wanted in (True, False):
        assert all(sum(id == other and good == wanted for other, _, _, good in rows(cases)) >= 2 for id in cases)
