"""Every exception of ours crosses a process boundary: message, class and attributes survive pickle and copy."""

import copy
import importlib
import inspect
import multiprocessing
import os
import pickle
import pkgutil
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from walking import walk

import certtrain
from certtrain.config import structure
from certtrain.errors import FieldError, InputError, Portable, Unwritable, check, writing
from certtrain.training import Interrupted, Training
from certtrain.training.update import NonFinite
from certtrain.verifiers.onnx_network import HiddenTensorError
from certtrain.verifiers.vnncomp import _Refuted


def own_exceptions() -> list[type[BaseException]]:
    """All that any module of the three packages defines."""
    found: dict[str, type[BaseException]] = {}
    for module in pkgutil.walk_packages(certtrain.__path__, "certtrain."):
        for value in vars(importlib.import_module(module.name)).values():
            ours = inspect.isclass(value) and value.__module__.split(".")[0] in ("certtrain", "kernels", "verifiers")
            if ours and issubclass(value, BaseException):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return [found[name] for name in sorted(found)]


MADE = {
    FieldError: lambda: FieldError("epsilon", float("inf"), "a radius >= 0"),
    Interrupted: lambda: Interrupted(signal.SIGTERM),
    NonFinite: lambda: NonFinite({"loss": float("inf"), "part": 1.0}),
    HiddenTensorError: lambda: HiddenTensorError("h", "what was found; accepted: what is"),
    Unwritable: lambda: Unwritable(28, "No space left on device", "runs/a/metrics.jsonl"),
    _Refuted: lambda: _Refuted(torch.tensor([0.5]), torch.tensor([1.0, 2.0])),
}
"""Those that take more than a message."""


def made(kind: type[BaseException]) -> BaseException:
    return MADE[kind]() if kind in MADE else kind("what was found; accepted: what is")


WAYS = {
    "pickle": lambda error: pickle.loads(pickle.dumps(error)), "copy": copy.copy, "deepcopy": copy.deepcopy,
    "oldest pickle": lambda error: pickle.loads(pickle.dumps(error, 0)),
}  # fmt: skip


def test_the_walk_finds_them():
    names = {kind.__name__ for kind in own_exceptions()}
    assert {"InputError", "FieldError", "Interrupted", "TrainingStopped", "NonFinite", "Contradiction"} <= names
    assert {"UnsupportedOperation", "_Refuted", "Unwritable"} <= names


@walk("way", WAYS)
@walk("kind", own_exceptions(), ids=lambda kind: kind.__name__)
def test_survives(kind, way):
    error = made(kind)
    error.add_note("a note")
    again = WAYS[way](error)
    assert type(again) is kind and str(again) == str(error) and again.args == error.args
    assert repr(vars(again)) == repr(vars(error))  # tensors have no plain ==
    for name in ("errno", "strerror", "filename"):
        assert getattr(again, name, None) == getattr(error, name, None)


@walk("kind", own_exceptions(), ids=lambda kind: kind.__name__)
def test_is_made_to_survive(kind):
    """A new one that is not cannot be forgotten. The checker imports nothing of ours: a message is all that its
    exception takes, and ``test_survives`` holds."""
    assert issubclass(kind, Portable) or kind.__module__.startswith("certtrain.checker.")


def test_what_cannot_be_pickled_travels_as_it_is_printed():
    error = FieldError("loss", lambda: None, "a loss")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.found == repr(error.found)


def refuse(number: int) -> None:
    structure(Training, {"epochs": -number})


def refuse_a_field(number: int) -> None:
    check(number < 0, "number", number, "a number < 0")


def test_a_settings_error_in_a_worker_reaches_the_caller():
    """Forked ones: a spawned one unpickles the same bytes, and imports everything anew."""
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as first, ProcessPoolExecutor(1, mp_context=context) as second:
        for work in (refuse, refuse_a_field):
            with pytest.raises(InputError, match=r"found -?3; accepted") as one:
                first.map_async(work, [3]).get(timeout=120)  # it waited for ever
            with pytest.raises(InputError) as two:
                second.submit(work, 3).result(timeout=120)
            assert str(one.value) == str(two.value)


@pytest.mark.slow
def test_a_spawned_worker_is_no_different():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for work in (refuse, refuse_a_field):
            with pytest.raises(InputError, match=r"found -?3; accepted"):
                pool.submit(work, 3).result(timeout=120)


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as error, writing(tmp_path / "target"):
        (tmp_path / "source").read_bytes()
    assert error.value.filename == str(tmp_path / "source")


@pytest.mark.parametrize("number", [28, 122, 30, 13, 24, 27, 5])  # ENOSPC EDQUOT EROFS EACCES EMFILE EFBIG EIO
def test_a_write_that_fails_names_its_file(number, tmp_path):
    with pytest.raises(Unwritable) as error, writing(Path("runs/a")):
        raise OSError(number, os.strerror(number))
    assert str(error.value).startswith(f"runs/a: cannot be written ({os.strerror(number)}); accepted: ")
    assert error.value.errno == number and isinstance(error.value, OSError) and isinstance(error.value, InputError)
