"""What a command shows of its progress where there is no terminal, and where there is one."""

import pytest
from rich.console import Console

from m2rl.display import Display


def shown(display: Display, total: int, **options) -> None:
    display.start("sft", **options)
    for done in range(1, total + 1):
        display.update(done, "loss 1", total)
    display.stop()


@pytest.mark.parametrize(("total", "lines"), [(100, 10), (7, 7)])
def test_without_a_terminal_it_says_every_tenth(total, lines, capsys):
    shown(Display(), total)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == lines and said[-1] == f"sft {total}/{total}  loss 1"


def test_an_interval_replaces_the_tenths(capsys):
    shown(Display(), 100, every_s=1000.0)
    assert capsys.readouterr().out == ""
    shown(Display(), 3, every_s=1e-9)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_other_ranks_are_silent(capsys):
    display = Display(False)
    shown(display, 10)
    display.say("nothing")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("total", [None, 20])
def test_on_a_terminal_the_bar_shows_the_count(total, capsys):
    display = Display(stderr=True)
    display.console = Console(stderr=True, force_terminal=True, width=100)
    display.start("convert", total)
    display.update(12, "rows")
    display.stop()
    out, bar = capsys.readouterr()
    assert out == "" and ("12/20" if total else "12 ") in bar and "rows" in bar
