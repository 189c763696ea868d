import threading

import pytest

from mpt_jax.data.ledger import ENOUGH_ROWS, Ledger
from mpt_jax.data.sources import Document, Rejected
from mpt_jax.errors import DataError

GOOD = Document("text", "f", 1)
DROPPED = Rejected("filtered", "too short", "", "f", 2)


def bad(line: int, reason: str = "bad JSON") -> Rejected:
    return Rejected("bad", reason, "at character 3", "f.jsonl", line)


def test_the_first_bad_row_stops_by_default():
    ledger = Ledger()
    assert ledger.admit("c4", GOOD) == "text"
    with pytest.raises(DataError, match=r"^f\.jsonl:7: bad JSON: at .*max_bad_") as e:
        ledger.admit("c4", bad(7))
    assert ledger.error is e.value


def test_a_share_of_bad_rows_is_allowed_and_noted_ever_more_rarely(capsys):
    ledger = Ledger(0.02)
    for line in range(20):
        assert ledger.admit("c4", bad(line)) is None
    with pytest.raises(DataError, match=r"21 of 21 rows of c4 are bad, over .*=0\.02"):
        ledger.admit("c4", bad(20))
    notes = capsys.readouterr().err.splitlines()
    assert [note.split()[3] for note in notes] == ["1", "2", "3", "10"]
    assert "f.jsonl:0: bad JSON: at character 3" in notes[0]


def test_the_share_grows_with_the_rows():
    ledger = Ledger(0.01)
    for line in range(2 * ENOUGH_ROWS):
        ledger.admit("c4", bad(line) if line % 100 == 99 else GOOD)
    assert ledger.summary()["c4"]["bad"] == {"bad JSON": 20}


def test_each_source_has_its_own_share():
    ledger = Ledger(0.001)
    for source in "abc":
        ledger.admit(source, bad(1))
    with pytest.raises(DataError, match="of b are bad"):
        ledger.admit("b", bad(2))


def test_the_summary_counts_by_reason():
    ledger = Ledger(0.5)
    for row in (GOOD, GOOD, DROPPED, bad(1), bad(2, "not UTF-8"), bad(3)):
        ledger.admit("c4", row)
    assert ledger.summary() == {
        "c4": {
            "documents": 2,
            "bad": {"bad JSON": 2, "not UTF-8": 1},
            "filtered": {"too short": 1},
        }
    }


def test_the_end_is_exact():
    ledger = Ledger(0.1)
    ledger.admit("c4", bad(1))
    for _ in range(8):
        ledger.admit("c4", GOOD)
    with pytest.raises(DataError, match=r"c4: 1 bad JSON\. 1 of 9 rows"):
        ledger.finish()
    ledger.admit("c4", GOOD)
    ledger.finish()


def test_a_source_that_keeps_nothing_is_an_error():
    ledger = Ledger()
    ledger.admit("c4", DROPPED)
    with pytest.raises(DataError, match="c4: none of its 1 rows is kept"):
        ledger.finish()


def test_threads_lose_no_count():
    ledger = Ledger()
    threads = [
        threading.Thread(target=lambda: [ledger.admit("c4", GOOD) for _ in range(2000)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.summary()["c4"]["documents"] == 8000
