from __future__ import annotations

import signal
import threading

import numpy as np
import pytest

import scvi_ext as sx
from scvi_ext.engine.interrupt import deferred_interrupt

RUN = {"max_epochs": 4, "batch_size": 60, "n_hidden": 8, "n_latent": 2}  # 181 cells: 4 steps in an epoch, 16 in all


def press_ctrl_c(module, loss):
    signal.raise_signal(signal.SIGINT)
    return loss


@pytest.fixture(autouse=True)
def python_s_own_handler():
    """pytest may run where SIGINT is ignored, as background jobs of a shell are."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # nobody left a handler behind
    signal.signal(signal.SIGINT, before)


def test_the_first_interrupt_is_noted_and_the_second_one_interrupts():
    with deferred_interrupt() as interrupt:
        assert not interrupt.requested
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_handler_is_restored_after_an_error():
    with pytest.raises(ZeroDivisionError), deferred_interrupt():
        raise ZeroDivisionError


def test_patience_hears_of_every_signal_and_is_interrupted_by_none():
    with deferred_interrupt(patient=True) as outer:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert outer.requested


def test_patience_within_patience_is_that_of_outside():
    with deferred_interrupt(patient=True) as outer:
        with deferred_interrupt(patient=True) as inner:
            signal.raise_signal(signal.SIGINT)
            assert inner.requested
        assert outer is inner
        signal.raise_signal(signal.SIGINT)  # which outside goes on to hear of
    with deferred_interrupt() as outer, deferred_interrupt(patient=True) as inner:
        assert outer is not inner


def test_other_threads_are_left_alone():
    seen = []

    def work():
        with deferred_interrupt() as interrupt:
            seen.append((signal.getsignal(signal.SIGINT), interrupt.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(signal.default_int_handler, False)]


@pytest.mark.parametrize(
    ("step", "epochs"),
    [(1, 0), (6, 1), (8, 2), (15, 3)],
    ids=["in the first step", "within an epoch", "at the end of an epoch", "in the last step but one"],
)
def test_an_interrupted_fit_is_kept_and_usable(registered, at_training_step, step, epochs):
    at_training_step({step: press_ctrl_c})
    with pytest.raises(KeyboardInterrupt):
        sx.tl.fit(registered, **RUN)
    table = sx.get.fits(registered).loc["scvi"]
    assert (table["stop_reason"], table["epochs"], table["resumable"]) == ("interrupted", epochs, True)
    assert registered.uns["scvi_ext"]["fits"]["scvi"]["status"]["steps"] == step
    assert len(sx.get.history(registered)) == epochs
    sx.tl.get_latent(registered)
    assert np.isfinite(registered.obsm["X_scvi"]).all()


def test_what_is_kept_has_been_trained_up_to_that_step(registered, at_training_step):
    for step, key in [(5, "five"), (6, "six")]:
        at_training_step({step: press_ctrl_c})
        with pytest.raises(KeyboardInterrupt):
            sx.tl.fit(registered, key_added=key, **RUN)
    five, six = (registered.uns["scvi_ext"]["fits"][key]["state"] for key in ("five", "six"))
    name = "z_encoder.mean_encoder.weight"
    assert not np.array_equal(five[name], six[name])


def test_a_run_that_was_over_anyway_is_finished_and_interrupts_still(registered, at_training_step):
    at_training_step({16: press_ctrl_c})
    with pytest.raises(KeyboardInterrupt):
        sx.tl.fit(registered, **RUN)
    assert sx.get.fits(registered)["stop_reason"].tolist() == ["finished"]
    assert len(sx.get.history(registered)) == RUN["max_epochs"]


def test_a_copy_is_handed_back_instead_of_an_interrupt(registered, at_training_step):
    at_training_step({6: press_ctrl_c})
    copy = sx.tl.fit(registered, copy=True, **RUN)
    assert sx.get.fits(copy)["stop_reason"].tolist() == ["interrupted"]
    assert "fits" not in registered.uns["scvi_ext"]


def test_an_interrupted_fit_replaces_nothing_but_its_own_key(fitted, at_training_step):
    before = fitted.uns["scvi_ext"]["fits"]["scvi"]["state"]
    at_training_step({1: press_ctrl_c})
    with pytest.raises(KeyboardInterrupt):
        sx.tl.fit(fitted, key_added="second", **RUN)
    assert set(sx.get.fits(fitted).index) == {"ldvae", "scvi", "second"}
    assert fitted.uns["scvi_ext"]["fits"]["scvi"]["state"] is before


@pytest.mark.parametrize(("nan", "steps"), [(2, 0), (6, 4)], ids=["in the first epoch", "in the second epoch"])
def test_an_interrupt_after_a_loss_that_was_not_finite_keeps_the_last_good_state(
    registered, at_training_step, nan, steps
):
    at_training_step({nan: lambda module, loss: loss._replace(total=loss.total * np.nan), nan + 1: press_ctrl_c})
    with pytest.raises(KeyboardInterrupt):
        sx.tl.fit(registered, **RUN)
    for stop_reason, n_steps in (("interrupted", steps), ("finished", 16)):
        fit = registered.uns["scvi_ext"]["fits"]["scvi"]
        assert all(np.isfinite(array).all() for array in fit["state"].values())
        assert (fit["status"]["stop_reason"], fit["status"]["steps"]) == (stop_reason, n_steps)
        if stop_reason == "interrupted":
            sx.tl.fit(registered, resume=True)
