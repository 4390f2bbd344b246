"""Actions of a run: when they are due, and in which order they are taken."""

import pytest

from wan.training.cadence import Action, Cadence, Every


def taken(*actions: tuple[str, Every, dict[str, bool]], epochs: int = 4, steps_per_epoch: int = 3) -> list[str]:
    """Names of the actions as a run takes them, each with its step (s) or epoch (e)."""
    calls: list[str] = []

    def action(name: str, every: Every, settings: dict[str, bool]) -> Action:
        return Action(every, lambda i: calls.append(f"{name} s{i}"), lambda i: calls.append(f"{name} e{i}"), **settings)

    cadence = Cadence([action(*given) for given in actions])
    for epoch in range(1, epochs + 1):
        for step in range((epoch - 1) * steps_per_epoch + 1, epoch * steps_per_epoch + 1):
            cadence.after_step(step)
        cadence.after_epoch(epoch, epoch * steps_per_epoch, last=epoch == epochs)
    return calls


def test_steps_and_epochs_are_counted_from_1():
    assert taken(("a", Every(steps=5), {})) == ["a s5", "a s10"]
    assert taken(("a", Every(epochs=2), {})) == ["a e2", "a e4"]
    assert taken(("a", Every(), {})) == []


def test_actions_are_taken_in_the_order_given():
    assert taken(("b", Every(steps=6), {}), ("a", Every(steps=4), {})) == ["a s4", "b s6", "a s8", "b s12", "a s12"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["s6", "e1", "e3", "s12"]),  # the steps 6 and 12 end the epochs 2 and 4
        ({"once": False}, ["s6", "e1", "e2", "e3", "e4", "s12"]),
        ({"once": False, "at_end": False}, ["s6", "e1", "e2", "e3", "s12"]),
    ],
)
def test_an_epoch_repeats_its_last_step_and_ends_the_run_only_for_actions_that_say_so(settings, expected):
    found = taken(("a", Every(steps=6, epochs=1), settings))
    assert sorted(found) == sorted(f"a {when}" for when in expected)
