"""Forward passes side by side: their turns, what each sees of its own, and the end of all when one fails."""

from __future__ import annotations

from contextvars import ContextVar
from functools import partial

import pytest

from secateur.lockstep import Lockstep


@pytest.mark.parametrize("number", [1, 2, 5])
def test_no_pass_comes_in_front_of_a_layer_before_all_have_left_the_one_before_it(number):
    lockstep, events = Lockstep(), []

    def forward(own):
        for layer in range(3):
            lockstep.give_way()
            events.append((layer, own))

    lockstep.run([partial(forward, own) for own in range(number)])
    assert events == [(layer, own) for layer in range(3) for own in range(number)]
    assert lockstep.passes == 1
    lockstep.give_way()  # nobody to give way to


def test_each_pass_has_context_variables_of_its_own():
    lockstep, found, own = Lockstep(), [], ContextVar("own", default="outside")

    def forward(number):
        assert own.get() == "outside"
        own.set(number)
        lockstep.give_way()
        found.append(own.get())

    lockstep.run([partial(forward, number) for number in range(3)])
    assert found == [0, 1, 2]
    assert own.get() == "outside"


def test_an_error_of_one_pass_ends_all(capsys):
    lockstep, ended, done = Lockstep(), [], []

    def forward(number):
        try:
            lockstep.give_way()
            if number == 1:
                raise ArithmeticError("of the second")
            lockstep.give_way()
            done.append(number)
        finally:
            ended.append(number)

    with pytest.raises(ArithmeticError, match="of the second"):
        lockstep.run([partial(forward, number) for number in range(4)])
    assert sorted(ended) == [0, 1, 2, 3]
    assert not done
    assert lockstep.passes == 1
    assert capsys.readouterr().err == ""
    lockstep.run([partial(done.append, number) for number in range(2)])
    assert done == [0, 1]


def test_as_many_passes_as_their_hidden_states_have_room():
    assert Lockstep().width(1) == 1
    assert Lockstep(room=1000).width(100) == 5
    assert Lockstep(room=1000).width(10**6) == 1
