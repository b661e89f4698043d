from __future__ import annotations

import contextlib
import io
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict, defaultdict

import numpy as np
import pandas as pd
import pytest
import torch

from scvi_ext.io._torch_archive import Record, read_torch_archive


def saved(tmp_path, content, **options):
    path = tmp_path / "model.pt"
    torch.save(content, path, **options)
    return path


def archive_of(tmp_path, pickled: bytes):
    """A file of the zip format with any program as its pickle."""
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickled)
        archive.writestr("model/version", "3\n")
    return path


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def as_global(module: str, name: str, argument: str, *, protocol_4: bool = False) -> bytes:
    """A pickle that calls ``module.name(argument)``, written by hand so that the name is exactly this one."""
    if protocol_4:
        return b"".join(
            [
                b"\x80\x04",
                *(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)),
                b"\x93X" + len(argument).to_bytes(4, "little") + argument.encode() + b"\x85R.",
            ]
        )
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


@pytest.fixture
def marker(tmp_path):
    """A folder that a malicious file would make."""
    return tmp_path / "executed"


def programs(marker) -> dict[str, bytes]:
    path = str(marker)
    python = f"__import__('os').mkdir({path!r})"
    getattr_ = "cbuiltins\ngetattr\n"
    return {
        "os": as_global("os", "mkdir", path),
        "own name of os": as_global(os.name, "mkdir", path),
        "eval": as_global("builtins", "eval", python),
        "exec": as_global("builtins", "exec", python),
        "eval of Python 2": as_global("__builtin__", "eval", python),
        "protocol 4": as_global("os", "mkdir", path, protocol_4=True),
        "instance": f"(V{path}\nios\nmkdir\n.".encode(),
        "object": f"(cos\nmkdir\nV{path}\no.".encode(),
        "attribute": f"{getattr_}({getattr_}(cos\npath\nVos\ntRVmkdir\ntR(V{path}\ntR.".encode(),
        "nested torch.load": pickle.dumps(Calls(torch.storage._load_from_bytes, pickle.dumps(Calls(os.mkdir, path)))),
        "nested pickle": pickle.dumps(Calls(pickle.loads, pickle.dumps(Calls(os.mkdir, path)))),
        "in a dict": pickle.dumps({"model_state_dict": OrderedDict(px_r=Calls(os.mkdir, path))}, protocol=2),
        "as a key": pickle.dumps({Calls(os.mkdir, path): 1}),
        "in an array": pickle.dumps(np.array([Calls(os.mkdir, path)], dtype=object)),
        "after the end": pickle.dumps({"a": Calls(os.mkdir, path)}) + b"garbage",
    }


@pytest.mark.parametrize("name", programs("x"))
def test_a_malicious_file_executes_nothing(tmp_path, marker, name):
    path = archive_of(tmp_path, programs(marker)[name])
    with pytest.raises(ValueError, match=r"refers to '[\w.]+'.*nothing in it was executed"):
        read_torch_archive(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", programs("x"))
def test_the_malicious_files_are_malicious(tmp_path, marker, name):
    path = archive_of(tmp_path, programs(marker)[name])
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        pickle.loads(archive.read("model/data.pkl"))
    assert marker.exists()


@pytest.mark.parametrize("module", ["numpy._core.multiarray", "torch._utils", "collections"])
def test_a_longer_name_below_a_permitted_one_is_refused(tmp_path, marker, module):
    path = archive_of(tmp_path, as_global(module, "os.mkdir", str(marker), protocol_4=True))
    with pytest.raises(ValueError, match="nothing in it was executed"):
        read_torch_archive(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["eval", "read_pickle", "io.common.os.mkdir"])
def test_names_of_pandas_are_not_looked_up(tmp_path, marker, name):
    found = read_torch_archive(archive_of(tmp_path, as_global("pandas", name, str(marker), protocol_4=True)))
    assert (found.name, found.args) == (f"pandas.{name}", (str(marker),))
    assert not marker.exists()


def test_a_saved_object_that_calls_a_function_is_refused_by_name(tmp_path, marker):
    content = {"model_state_dict": OrderedDict(px_r=Calls(os.mkdir, str(marker))), "var_names": np.array(["g"])}
    path = saved(tmp_path, content)
    with pytest.raises(ValueError, match=rf"'{os.name}\.mkdir'"):
        read_torch_archive(path)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["old torch", "tar", "pickle", "zip behind a pickle"])
def test_other_formats_are_refused_without_reading_them(tmp_path, marker, kind):
    path = tmp_path / "model.pt"
    evil = Calls(os.mkdir, str(marker))
    if kind == "old torch":
        torch.save({"model_state_dict": evil}, path, _use_new_zipfile_serialization=False)
    elif kind == "tar":
        with tarfile.open(path, "w") as archive:
            for name in ("storages", "tensors", "pickle"):
                content = pickle.dumps(evil)
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    else:
        path.write_bytes(pickle.dumps(evil))
    if kind == "zip behind a pickle":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("model/data.pkl", pickle.dumps({}))
        assert zipfile.is_zipfile(path)
    with pytest.raises(ValueError, match=r"does not begin like a zip file.*nothing in the file was executed"):
        read_torch_archive(path)
    assert not marker.exists()


def test_state_given_to_a_name_changes_nothing(tmp_path):
    """Python's unpickler lets a file set attributes of what it names: here, of a class made for this one mention."""
    name = b"ccollections\nOrderedDict\n"
    program = name + b"}(Vname\nVos.system\nub0" + name + b")R."
    path = archive_of(tmp_path, program)
    for _ in range(2):
        with contextlib.suppress(ValueError):
            assert read_torch_archive(path) == {}
    assert Record.name == ""
    assert OrderedDict.__name__ == "OrderedDict"


def test_containers_and_numbers_come_back(tmp_path):
    content = {
        "text": "é",
        "bytes": b"\x00\xff",
        "empty bytes": b"",
        "numbers": [1, -(2**70), 1.5, float("inf"), True, None],
        "tuple": (1, ("a",)),
        "ordered": OrderedDict(b=1, a=2),
        "default": defaultdict(dict, {"x": {"y": 1}}),
        "scalar": np.float64(2.5),
        "whole": np.int32(-3),
    }
    path = saved(tmp_path, content)
    found = read_torch_archive(path)
    assert found == content
    assert list(found["ordered"]) == ["b", "a"]
    assert type(found["ordered"]) is dict
    assert found["scalar"].dtype == np.float64
    assert found["whole"].dtype == np.int32


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(6, dtype=">f4").reshape(3, 2),
        np.array([[True], [False]]),
        np.array(["naïve", "b"]),
        np.array(["naïve", "b", None, 1], dtype=object).reshape(2, 2),
        np.array([np.float32(1.5), (1, 2)], dtype=object),
        np.array(7, dtype=np.int16),
        np.zeros((0, 3), dtype=np.uint8),
        np.array([], dtype=object),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_come_back(tmp_path, array):
    found = read_torch_archive(saved(tmp_path, {"a": array}))["a"]
    np.testing.assert_array_equal(found, array)
    assert found.dtype == array.dtype.newbyteorder("=")
    assert found.shape == array.shape


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool],
)
def test_tensors_come_back(tmp_path, dtype):
    whole = (torch.arange(24) % 5).to(dtype).reshape(4, 6)
    content = {"whole": whole, "transposed": whole.T, "part": whole[1:3, ::2], "one": whole[2, 3], "none": whole[:0]}
    found = read_torch_archive(saved(tmp_path, content))
    for name, tensor in content.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)
        assert found[name].dtype == tensor.numpy().dtype
        assert found[name].flags["C_CONTIGUOUS"]
        assert found[name].flags["WRITEABLE"]


def test_a_kind_of_tensor_that_numpy_does_not_have_is_refused_by_name(tmp_path):
    path = saved(tmp_path, torch.zeros(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="BFloat16Storage"):
        read_torch_archive(path)


def test_tables_stay_records(tmp_path):
    table = pd.DataFrame({"a": [1.0, 2.0]}, index=pd.RangeIndex(2, name="epoch"))
    found = read_torch_archive(saved(tmp_path, {"table": table}))["table"]
    assert isinstance(found, Record)
    assert found.name == "pandas.core.frame.DataFrame"


class Tensor:
    """Pickles as a tensor with any offset, shape and stride over a storage of four numbers."""

    def __init__(self, offset, shape, stride):
        self.args = offset, shape, stride

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (torch.zeros(4).untyped_storage(), *self.args, False, OrderedDict())


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (0, (2, 2), (3, 1)),
        (-1, (2,), (1,)),
        (0, (-2,), (1,)),
        (3, (2,), (-1,)),
        (0, (10**12,), (0,)),
        (0, (2, 2), (1,)),
        (0.0, (2,), (1,)),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, offset, shape, stride):
    path = tmp_path / "model.pt"
    storage = ("storage", torch.FloatStorage, "0", "cpu", 4)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return storage if isinstance(value, torch.UntypedStorage) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"a": Tensor(offset, shape, stride)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", buffer.getvalue())
        archive.writestr("model/data/0", np.zeros(4, dtype="<f4").tobytes())
    with pytest.raises(ValueError, match="cannot be read"):
        read_torch_archive(path)


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_reported(tmp_path, kept):
    path = saved(tmp_path, {"a": torch.arange(1000)})
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="cut off or damaged"):
        read_torch_archive(path)


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b"garbage",
        b"cnumpy\ndtype\n)R.",
        b"cnumpy.core.multiarray\n_reconstruct\n)R.",
        b"cbuiltins\nbytes\n(I9999999999\ntR.",
        b"](h\x00.",
        b"]q\x00h\x00a.",  # a list that contains itself
        b"c_codecs\nencode\n(Vabc\nVrot13\ntR.",
    ],
)
def test_a_pickle_that_makes_no_sense_is_reported(tmp_path, program):
    path = archive_of(tmp_path, program)
    with pytest.raises(ValueError, match="cannot be read"):
        read_torch_archive(path)
