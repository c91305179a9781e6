"""The checks that stop a run, alone: flag on the device, float16's scaler, watch of the loss."""

import math

import pytest
import torch

from glmtune.training.faults.loss_watch import judge_course
from glmtune.training.watch import FIRST_STEPS, NotFiniteError

CPU = torch.device("cpu")


@pytest.fixture
def start(hand_training):
    """A function that starts a training by hand on the CPU."""
    return lambda at_once, scaler=None: hand_training(CPU, at_once, scaler)


FAULTS = [
    ({"loss": math.nan}, "loss", "the loss is nan"),
    ({"loss": math.inf}, "loss", "the loss is inf"),
    ({"grads": (math.nan, 1.0)}, "gradient", "the norm of the gradient is nan"),
    ({"grads": (1.0, -math.inf)}, "gradient", "the norm of the gradient is inf"),
]


@pytest.mark.parametrize(("numbers", "what", "words"), FAULTS)
def test_on_a_cpu_the_step_itself_stops(start, numbers, what, words):
    training = start(at_once=True)
    training.step()
    before = training.snapshot()
    with pytest.raises(NotFiniteError, match=words) as stop:
        training.step(**numbers)
    assert (stop.value.fault.step, stop.value.fault.what) == (1, what)
    assert all(map(torch.equal, training.snapshot(), before))


@pytest.mark.parametrize(("numbers", "what", "words"), FAULTS)
def test_on_a_gpu_no_step_changes_anything_until_the_host_comes_by(
    start, numbers, what, words, monkeypatch
):
    training = start(at_once=False)
    monkeypatch.setattr(training.watch, "_look", lambda: None)  # the device is far behind
    training.step()
    training.step()
    training.watch.sync()
    before = training.snapshot()
    training.step(**numbers)
    training.step()  # launched before the host knows
    training.step(loss=math.inf)
    assert all(map(torch.equal, training.snapshot(), before))
    with pytest.raises(NotFiniteError, match=words) as stop:
        training.watch.sync()
    assert (stop.value.fault.step, stop.value.fault.what) == (2, what)


def test_on_a_gpu_the_next_step_knows(start):
    training = start(at_once=False)
    training.step()
    training.step(loss=math.nan)
    with pytest.raises(NotFiniteError) as stop:
        training.step()
    assert stop.value.fault.step == 1


@pytest.mark.parametrize("loss", [math.nan, 1.0])
def test_a_weight_is_named_before_what_it_spoils_and_where_it_spoils_nothing(start, loss):
    training = start(at_once=True)
    training.weights[1].data[0] = math.inf
    with pytest.raises(NotFiniteError, match="a weight of the adapter is inf") as stop:
        training.step(loss=loss)
    assert stop.value.fault.what == "weight"


def test_large_weights_are_no_fault(start):
    training = start(at_once=True)
    training.weights[0].data.fill_(1e30)
    training.step()


def test_the_random_state_is_that_of_the_start_of_the_bad_step(start, monkeypatch):
    training = start(at_once=False)
    monkeypatch.setattr(training.watch, "_look", lambda: None)
    training.step()
    torch.manual_seed(7)
    wanted = torch.get_rng_state()
    training.step(loss=math.nan)
    torch.rand(3)
    training.step()
    with pytest.raises(NotFiniteError) as stop:
        training.watch.sync()
    assert torch.equal(stop.value.fault.random_state.cpu, wanted)


def scaler(scale):
    return torch.amp.GradScaler("cpu", init_scale=scale)


def test_float16_skips_an_overflow_and_goes_on(start):
    training = start(at_once=False, scaler=scaler(2.0**16))
    training.step()
    before = [w.detach().clone() for w in training.weights]
    training.step(grads=(math.inf, 1.0))
    assert all(map(torch.equal, training.weights, before))
    training.step()
    training.watch.sync()
    assert training.scaler.get_scale() == 2.0**15
    assert not torch.equal(training.weights[0], before[0])


def test_float16_stops_when_the_smallest_scale_overflows(start):
    training = start(at_once=True, scaler=scaler(4.0))
    training.step(grads=(math.inf, 1.0))
    training.step(grads=(math.inf, 1.0))
    assert training.scaler.get_scale() == 1
    with pytest.raises(NotFiniteError, match="gradient"):
        training.step(grads=(math.inf, 1.0))


def test_float16_stops_at_once_when_the_loss_itself_is_not_finite(start):
    training = start(at_once=False, scaler=scaler(2.0**16))
    training.step()
    before = [w.detach().clone() for w in training.weights]
    training.step(loss=math.nan)
    with pytest.raises(NotFiniteError, match="loss is nan"):
        training.step()
    assert all(map(torch.equal, training.weights, before))


def test_weights_without_a_gradient_are_told_once(start):
    training = start(at_once=True)
    training.step(grads=(0.0, 1.0))
    assert training.watch.unmoved() == []  # lora_A has none before lora_B has moved
    for _ in range(FIRST_STEPS - 1):
        training.step(grads=(0.0, 1.0))
    assert training.watch.unmoved() == [0]
    assert training.watch.unmoved() == []


def test_a_gradient_in_any_of_the_first_steps_is_enough(start):
    training = start(at_once=True)
    for step in range(FIRST_STEPS):
        training.step(grads=(1.0 * (step == 2), 0.5))
    assert training.watch.unmoved() == []


@pytest.mark.parametrize(
    ("losses", "words", "stops"),
    [
        ([], None, False),
        ([5.0], None, False),
        ([5.0, 4.0, 3.0], None, False),
        ([5.0, 4.0, 16.0], "explodes: 16, after 4.5 usually and 5 at first", False),
        ([5.0, 4.0, 16.0, 30.0, 20.0], "explodes: 20, after 4.5 usually", True),
        ([5.0, 16.0, 30.0, 20.0], "explodes", True),  # from the start
        ([5.0, 4.0, 16.0, 30.0, 3.0], None, False),  # back to normal
        ([5.0, 0.01, 0.02, 0.9, 1.2, 1.1], None, False),  # noise below the base's loss
        ([5.0, 5.5, 7.0, 9.0, 11.0], None, False),  # bad, but within three times
        ([5.0, 0.0], "exactly 0", False),
        ([5.0, 0.0, 0.0, 0.0], "exactly 0", True),
        ([5.0, 0.0, 0.0, 1e-6], None, False),
        ([0.0, 0.0, 0.0], "exactly 0", True),
        ([5.0, 0.0, 0.0, 20.0], "explodes", False),  # rows of each kind are counted separately
    ],
)
def test_the_course_of_the_loss(losses, words, stops):
    course = judge_course(losses)
    assert (course is None) == (words is None)
    if course:
        assert words in course.words
        assert course.stops == stops
