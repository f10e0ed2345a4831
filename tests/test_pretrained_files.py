"""Files of other people that lie: truncated, flipped, with lengths and counts of their own choice.

Only `UserError` may come out, soon and in little memory. The `safetensors` library is the oracle of
what is whole in its format; the `gguf` library wrote the file of the other.
"""

import dataclasses
import json
import shutil
import struct
import time
import tracemalloc
from pathlib import Path

import gguf as library
import jax
import numpy as np
import pytest
import safetensors as rust
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lm import pretrained
from lm.config import UserError
from lm.pretrained import gguf, safetensors, tensors
from lm.pretrained.settings import Llama

TINY = Path(__file__).parent / "pretrained" / "llama"
SECONDS, BYTES = 2.0, 8 << 20  # of one hostile file of a few kilobytes


def paired(w: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k (`permute` of its convert_hf_to_gguf.py)."""
    return (
        w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    )


NAMES = {
    **{"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
    **{"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"},
    **{"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm"},
    **{"post_attention_layernorm": "ffn_norm", "model.layers": "blk"},
    **{"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
}


def write_gguf(path: Path, **changes: object) -> dict[str, np.ndarray]:
    """The tiny Llama as llama.cpp would convert it, without its rotation's scaling."""
    writer = library.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500.0)
    writer.add_rope_dimension_count(4)
    letters = [chr(c) for c in range(33, 73)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(letters)
    writer.add_token_types([3, *[1] * 39])
    writer.add_token_merges(["$ %"] if "$%" in letters else [])
    writer.add_chat_template("{{ messages[0].content }}")
    arrays = {}
    for name, entry in safetensors.entries(TINY / "model.safetensors").items():
        array = tensors.read(entry)
        arrays[name] = array
        if "q_proj" in name or "k_proj" in name:
            array = paired(array, 4 if "q_proj" in name else 2)
        for old, new in NAMES.items():
            name = name.replace(old, new)
        writer.add_tensor(name, array)
    for name, value in changes.items():
        writer.add_tensor(name.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """A whole GGUF file."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path.read_bytes()


def test_a_gguf_file_is_the_model_that_it_was_made_of(tmp_path):
    """Catches queries and keys left in GGUF's order, and heads counted wrongly when turned."""
    write_gguf(tmp_path / "a.gguf")
    loaded, folder = pretrained.load(tmp_path / "a.gguf"), pretrained.load(TINY)
    assert loaded.config.rope_scaling == () and loaded.config.rope_base == 500
    for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(folder.params), strict=True):
        assert np.array_equal(a, b)
    assert loaded.tokenizer.chat([{"role": "user", "content": "hi"}]) == "hi"


def test_llama_3_s_rotation_is_known_by_its_factors(tmp_path):
    """GGUF has one factor for each of the H/2 frequencies."""
    base, (factor, low, high, before) = 500.0, (8.0, 1.0, 4.0, 8192.0)
    found = []
    for i in range(2):  # transformers' own way of saying it, in wavelengths
        wave = 2 * np.pi * base ** (i / 2)
        smooth = (before / wave - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        found.append(1 if wave < before / high else factor if wave > before / low else between)
    write_gguf(tmp_path / "a.gguf", rope_freqs__weight=np.array(found, np.float32))
    assert pretrained.load(tmp_path / "a.gguf").config.rope_scaling == (8, 1, 4, 8192)
    write_gguf(tmp_path / "b.gguf", rope_freqs__weight=np.array([1, 3], np.float32))
    with pytest.raises(UserError, match="not Llama 3.1's or 3.2's"):
        pretrained.load(tmp_path / "b.gguf")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16"])
def test_quantised_numbers_are_those_of_the_library(kind, tmp_path, monkeypatch):
    """In pieces smaller than the tensor, the last one not full."""
    monkeypatch.setattr(tensors, "_PIECE", 96)
    kinds = library.GGMLQuantizationType
    array = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    raw = library.quants.quantize(array, kinds[kind])
    writer = library.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("x", raw, raw_dtype=kinds[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = tensors.read(gguf.open_gguf(tmp_path / "a.gguf").entries["x"])
    assert np.array_equal(got.astype(np.float32), library.quants.dequantize(raw, kinds[kind]))
    assert abs(got.astype(np.float32) - array).max() < 0.5


# What a file may be spoilt with: (how, place in the file, value).
SPOILT = st.lists(
    st.tuples(
        st.sampled_from(["byte", "u32", "u64", "cut", "insert"]),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from([0, 1, 2, 8, 9, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40])
        | st.sampled_from([1 << 62, 1 << 63, (1 << 64) - 1])
        | st.integers(0, (1 << 64) - 1),
    ),
    min_size=1,
    max_size=4,
)


def spoil(data: bytes, changes: list, head: int) -> bytes:
    """The bytes with the changes, all but cuts in the first `head`, where the lengths are."""
    out = bytearray(data)
    for how, place, value in changes:
        at = int(place * (min(head, len(out)) if how != "cut" else len(out)))
        if how == "cut":
            del out[at:]
        elif how == "insert":
            out[at:at] = value.to_bytes(8, "little")
        else:
            size = {"byte": 1, "u32": 4, "u64": 8}[how]
            out[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(out)


def opened(path: Path, read: object) -> str:
    """What reading a hostile file comes to: the sentence, or nothing; refuses to wait for it."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        for entry in read(path).values():
            if tensors.readable(entry.kind):
                tensors.read(entry)
        return ""
    except UserError as error:
        assert len(str(error)) < 1000
        return str(error)
    finally:
        seconds, (_, peak) = time.process_time() - begin, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert seconds < SECONDS and peak < BYTES, f"{seconds:.1f} s and {peak:,} bytes"


@settings(max_examples=400, deadline=None)
@given(changes=SPOILT)
def test_a_spoilt_gguf_file_is_refused_or_read(whole, changes, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "spoilt.gguf"
    path.write_bytes(spoil(whole, changes, 1600))
    opened(path, lambda p: gguf.open_gguf(p).entries)


@settings(max_examples=40, deadline=None)
@given(changes=SPOILT)
def test_a_spoilt_gguf_file_loads_or_not(whole, changes, tmp_path_factory):
    """All the way: metadata of wrong types, sizes that no tensor has, a tokenizer that is none."""
    path = tmp_path_factory.getbasetemp() / "spoilt.gguf"
    path.write_bytes(spoil(whole, changes, 1600))
    try:
        pretrained.load(path)
    except UserError as error:
        assert len(str(error)) < 2000


def said(value: object) -> bytes:
    """A value of the metadata, with its type."""
    kinds: dict[type, tuple[int, str]] = {bool: (7, "?"), int: (11, "q"), float: (12, "d")}
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, list | np.ndarray):
        parts = [said(v.item() if isinstance(v, np.generic) else v) for v in value]
        kind = parts[0][:4] if parts else struct.pack("<I", 4)
        values = b"".join(part[4:] for part in parts)
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(parts)) + values
    kind, letter = kinds[type(value)]
    return struct.pack(f"<I{letter}", kind, value)


ODD = ("", "x", -1, 0, 3, (1 << 63) - 1, 0.5, float("nan"), -1e308, True, [], ["x"], [1, 2], [0.5])


def test_every_key_of_another_type(whole, tmp_path):
    """What a key holds may be anything: each of them becomes each of these."""
    (tmp_path / "a.gguf").write_bytes(whole)
    metadata, entries = gguf.open_gguf(tmp_path / "a.gguf")
    start = min(entry.start for entry in entries.values())
    described_at = min(whole.index(text(name)) for name in entries)
    tail = whole[described_at:start].rstrip(b"\0")
    loaded = 0
    for key in metadata:
        for value in ODD:
            changed = metadata | {key: value}
            keys = b"".join(text(name) + said(v) for name, v in changed.items())
            head = header(tensors=len(entries), keys=len(changed), rest=keys) + tail
            head += b"\0" * (-len(head) % 32)
            (tmp_path / "b.gguf").write_bytes(head + whole[start:])
            try:
                pretrained.load(tmp_path / "b.gguf")
                loaded += 1
            except UserError as error:
                assert len(str(error)) < 2000, key
    assert 0 < loaded < len(metadata) * len(ODD)


def test_every_key_of_a_config_of_another_type(tmp_path):
    shutil.copytree(TINY, tmp_path / "m")
    before = json.loads((TINY / "config.json").read_text())
    rope = before["rope_parameters"]
    read = {field.name for field in dataclasses.fields(Llama)} | {"model_type"}
    loaded = 0
    for value in (*ODD, None, {}, {"rope_type": "llama3"}, 1 << 70):
        changes = [{key: value} for key in before if key in read]
        changes += [{"rope_parameters": rope | {key: value}} for key in rope]
        for change in changes:
            (tmp_path / "m" / "config.json").write_text(json.dumps(before | change))
            try:
                pretrained.load(tmp_path / "m")
                loaded += 1
            except UserError as error:
                assert len(str(error)) < 2000, change
    assert loaded > 0


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(*, tensors: int = 0, keys: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def described(name: str, shape: tuple, kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


DEEP = text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 2000

LIES = {
    "nothing": (b"", "more, which are not there"),
    "another format": (b"GGML" + b"\0" * 40, "does not begin with GGUF"),
    "an old version": (header(version=1), "version 1"),
    "the other byte order": (header(version=3 << 24), "other byte order"),
    "a million tensors": (header(tensors=1 << 20), "1,048,576 tensors"),
    "more keys than bytes": (header(keys=1 << 63), "keys; at most 4,096"),
    "keys that are not there": (header(keys=4000), "not there"),
    "a name of 8 EB": (header(keys=1, rest=struct.pack("<Q", 1 << 63)), "bytes of a text"),
    "a text of 100 MB": (
        header(keys=1, rest=text("a") + struct.pack("<IQ", 8, 100 << 20)),
        "not there",
    ),
    "an array of 2^60": (
        header(keys=1, rest=text("a") + struct.pack("<IIQ", 9, 0, 1 << 60)),
        "numbers in 'a'",
    ),
    "texts without end": (
        header(keys=1, rest=text("a") + struct.pack("<IIQ", 9, 8, 1 << 60)),
        "texts in 'a'",
    ),
    "arrays in arrays": (header(keys=1, rest=DEEP), "array of type 9"),
    "an unknown type": (header(keys=1, rest=text("a") + struct.pack("<I", 77)), "unknown type 77"),
    "a key twice": (header(keys=2, rest=(text("a") + struct.pack("<IB", 0, 1)) * 2), "twice"),
    "no UTF-8": (header(keys=1, rest=struct.pack("<Q", 2) + b"\xff\xfe"), "not UTF-8"),
    "2^60 numbers": (header(tensors=1, rest=described("x", (1 << 60,), 0, 0)), "has the shape"),
    "a product that overflows": (
        header(tensors=1, rest=described("x", (1 << 32, 1 << 32), 0, 0)),
        "has the shape",
    ),
    "no numbers": (header(tensors=1, rest=described("x", (0,), 0, 0)), "has the shape"),
    "a hundred axes": (header(tensors=1, rest=described("x", (1,) * 100, 0, 0)), "100 axes"),
    "an unknown kind": (header(tensors=1, rest=described("x", (1,), 999, 0)), "unknown kind 999"),
    "half a block": (header(tensors=1, rest=described("x", (33,), 2, 0)), "no multiple of 32"),
    "a place past the end": (
        header(tensors=1, rest=described("x", (1,), 0, 1 << 40)),
        "the file has",
    ),
    "a place that wraps": (
        header(tensors=1, rest=described("x", (1,), 0, (1 << 64) - 32)),
        "the file has",
    ),
    "a crooked place": (header(tensors=1, rest=described("x", (1,), 0, 7)), "no multiple of 32"),
    "one over another": (
        header(tensors=2, rest=b"".join(described(n, (1,), 0, 0) for n in "xy")) + b"\0" * 99,
        "overlaps",
    ),
    "a name twice": (
        header(tensors=2, rest=described("x", (1,), 0, 0) * 2) + b"\0" * 99,
        "stands twice",
    ),
    "an alignment of 0": (
        header(keys=1, rest=text("general.alignment") + struct.pack("<II", 4, 0)),
        "no power of two",
    ),
    "an alignment of NaN": (
        header(keys=1, rest=text("general.alignment") + struct.pack("<If", 6, float("nan"))),
        "no power of two",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_gguf_file_that_lies(name, tmp_path):
    data, says = LIES[name]
    (tmp_path / "a.gguf").write_bytes(data)
    assert says in opened(tmp_path / "a.gguf", lambda p: gguf.open_gguf(p).entries)


def packed(head: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(kind: str, shape: object, *places: object) -> dict:
    return {"dtype": kind, "shape": shape, "data_offsets": list(places)}


SAFE = packed(
    {"a": entry("F32", [2, 1], 0, 8), "b": entry("BF16", [], 8, 10), "__metadata__": {"x": "y"}},
    bytes(range(10)),
)


@settings(max_examples=400, deadline=None)
@given(changes=SPOILT)
@example(changes=[])
def test_a_spoilt_safetensors_file_is_what_the_library_says(changes, tmp_path_factory):
    """Both refuse, or both find the same tensors. Only a name that stands twice we refuse alone."""
    path = tmp_path_factory.getbasetemp() / "spoilt.safetensors"
    path.write_bytes(spoil(SAFE, changes, len(SAFE)))
    said = opened(path, safetensors.entries)
    try:
        with rust.safe_open(path, "numpy") as file:
            want = {k: file.get_slice(k) for k in file.keys()}  # noqa: SIM118 - not a mapping
            want = {k: (v.get_dtype(), tuple(v.get_shape())) for k, v in want.items()}
    except rust.SafetensorError:
        assert said
        return
    if said:
        assert "twice" in said, said
        return
    got = safetensors.entries(path)
    assert {k: (e.kind, e.shape) for k, e in got.items()} == want


LIES_OF_SAFETENSORS = {
    "nothing": (b"", "the file has 0"),
    "a header of 8 EB": (packed({}, length=1 << 63), "its header says"),
    "a header of 100 MB": (packed(b"{}" + b" " * 40, length=100 << 20), "its header says"),
    "no JSON": (packed(b"\xff\xfe{}"), "is not JSON"),
    "JSON without end": (packed(b"[" * 100_000), "is not JSON"),
    "a list": (packed([1]), "no JSON object"),
    "NaN": (packed(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'), "NaN"),
    "a long number": (packed(b'{"a":' + b"9" * 9999 + b"}"), "is not JSON"),
    "metadata of numbers": (packed({"__metadata__": {"a": 1}}), "no mapping of texts"),
    "no record": (packed({"a": 1}), "lacks a dtype"),
    "an unknown kind": (packed({"a": entry("F31", [1], 0, 4)}, b"1234"), "lacks a dtype"),
    "a kind that is a list": (packed({"a": entry([], [1], 0, 4)}, b"1234"), "lacks a dtype"),
    "a shape that is a text": (packed({"a": entry("F32", "1", 0, 4)}, b"1234"), "F32 '1'"),
    "a negative size": (packed({"a": entry("F32", [-1], 0, 4)}, b"1234"), "its bytes are"),
    "half a size": (packed({"a": entry("F32", [0.5], 0, 4)}, b"1234"), "its bytes are"),
    "true": (packed({"a": entry("F32", [True], 0, 4)}, b"1234"), "its bytes are"),
    "a million axes": (packed({"a": entry("F32", [9] * 10**6, 0, 4)}, b"1234"), "its bytes are"),
    "bytes for another shape": (packed({"a": entry("F32", [2], 0, 4)}, b"1234"), "its bytes are"),
    "places backwards": (packed({"a": entry("F32", [1], 4, 0)}, b"1234"), "its bytes are"),
    "three places": (packed({"a": entry("F32", [1], 0, 4, 4)}, b"1234"), "lacks a dtype"),
    "past the end": (packed({"a": entry("F32", [9], 0, 36)}, b"1234"), "the file has"),
    "a gap": (packed({"a": entry("U8", [1], 1, 2)}, b"12"), "its tensors take"),
    "more than the tensors": (packed({"a": entry("U8", [1], 0, 1)}, b"12"), "its tensors take"),
    "one over another": (
        packed({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"123"),
        "overlaps",
    ),
    "a name twice": (packed(b'{"a":1,"a":2}'), "twice"),
}


@pytest.mark.parametrize("name", LIES_OF_SAFETENSORS)
def test_a_safetensors_file_that_lies(name, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "BYTES", 64 << 20)  # headers of a megabyte are among them
    data, says = LIES_OF_SAFETENSORS[name]
    (tmp_path / "a.safetensors").write_bytes(data)
    assert says in opened(tmp_path / "a.safetensors", safetensors.entries)


def test_a_file_cut_short_while_it_is_read(tmp_path):
    """By plain reads that is a sentence; in a mapped file it would kill the process."""
    path = tmp_path / "a.safetensors"
    path.write_bytes((TINY / "model.safetensors").read_bytes())
    found = list(safetensors.entries(path).values())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="has become shorter while it was read"):
        tensors.read(max(found, key=lambda e: e.start))


def test_whole_numbers_are_no_weights(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(packed({"a": entry("I32", [1], 0, 4)}, b"1234"))
    with pytest.raises(UserError, match="holds I32, which are no floating numbers"):
        tensors.read(safetensors.entries(path)["a"])
