"""What is stored comes back bit for bit, a file broken or foreign is refused, and an interrupted one goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from activations import store as module
from activations.errors import PathMissingError, StoreError
from activations.store import ActivationStore, Provenance

PROVENANCE = Provenance(
    model="base",
    fingerprint="f" * 64,
    tuned="",
    dtype="float32",
    d_model=4,
    hook_points=("blocks.0.hook_resid_post", "blocks.1.hook_resid_post"),
    pooling="last",
    system="",
    template_hash="a" * 64,
    prompts_name="set",
    prompts_hash="b" * 64,
    n_prompts=5,
    harmful=(True, False, True, False, True),
    pair_ids=("1", "1", "zwei", "3", "4"),
    version="0.0.0",
)
FIRST, SECOND = PROVENANCE.hook_points
VECTORS = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
GOLDEN = Path(__file__).parents[1] / "golden" / "activations.attributes.json"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "activations.h5"


def filled(path: Path, provenance: Provenance = PROVENANCE, order: tuple[int, ...] = (3, 1, 4, 0, 2)) -> Path:
    with ActivationStore.create(path, provenance) as store:
        for rows in (order[:2], order[2:]):
            store.append(rows, [1] * len(rows), VECTORS[:, rows])
    return path


def test_vectors_come_back_in_the_order_of_the_prompts(path: Path) -> None:
    with ActivationStore.open(filled(path)) as store:
        assert store.provenance == PROVENANCE
        assert store.missing == []
        np.testing.assert_array_equal(store.read_layer(FIRST), VECTORS[0])
        np.testing.assert_array_equal(store.read_layer(SECOND, rows=[4, 0]), VECTORS[1, [4, 0]])


@pytest.mark.parametrize("pooling", ["all", "all@answer"])
def test_tokens_come_back_prompt_by_prompt(pooling: str, path: Path) -> None:
    provenance = dataclasses.replace(PROVENANCE, pooling=pooling, n_prompts=2, harmful=None, pair_ids=None)
    with ActivationStore.create(path, provenance) as store:
        store.append([1, 0], [2, 3], VECTORS)
    with ActivationStore.open(path) as store:
        assert store.provenance == provenance
        first, second = store.read_tokens(SECOND)
        np.testing.assert_array_equal(first, VECTORS[1, 2:])
        np.testing.assert_array_equal(second, VECTORS[1, :2])
        with pytest.raises(StoreError, match="holds every token"):
            store.read_layer(SECOND)


def test_bfloat16_is_stored_in_two_bytes_and_without_loss(path: Path) -> None:
    provenance = dataclasses.replace(PROVENANCE, dtype="bfloat16")
    values = torch.from_numpy(VECTORS).bfloat16().float().numpy()
    values[0, 0] = [np.inf, -0.0, 1e-40, -3e38]
    values = torch.from_numpy(values).bfloat16().float().numpy()
    with ActivationStore.create(path, provenance) as store:
        store.append(range(5), [1] * 5, values)
    with ActivationStore.open(path) as store:
        np.testing.assert_array_equal(store.read_layer(FIRST).view(np.uint32), values[0].view(np.uint32))
    with h5py.File(path) as file:
        assert file[FIRST].dtype == np.uint16
        assert file.attrs["stored_dtype"] == "bfloat16"


def test_other_values_are_rounded_to_bfloat16_as_torch_rounds_them() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, size=(1000, 8), dtype=np.uint32)
    bits[0] = [0x7F7FFFFF, 0x7F800001, 0xFFFFFFFF, 0x7F800000, 0x3F808000, 0x3F818000, 0x00007FFF, 0x80000001]
    values = bits.view(np.float32)
    stored = module._from_disk(module._to_disk(values, "bfloat16"), "bfloat16")
    np.testing.assert_array_equal(stored, torch.from_numpy(values).bfloat16().float().numpy())


@pytest.mark.parametrize(
    ("pooling", "stored"),
    [("mean", "float32"), ("mean@user", "float32"), ("last", "bfloat16"), ("all@answer", "bfloat16")],
)
def test_only_means_of_a_bfloat16_model_need_more_than_two_bytes(pooling: str, stored: str) -> None:
    assert dataclasses.replace(PROVENANCE, dtype="bfloat16", pooling=pooling).stored_dtype == stored


def test_the_attributes_are_what_others_read(path: Path) -> None:
    with h5py.File(filled(path)) as file:
        attributes = {name: np.asarray(value).tolist() for name, value in sorted(file.attrs.items())}
        layout = {name: [str(data.dtype), list(data.shape), list(data.chunks or [])] for name, data in file.items()}
    found = {"attributes": attributes, "layout": layout}
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    assert found == json.loads(GOLDEN.read_text(encoding="utf-8"))


# Interruptions


def test_an_interrupted_file_knows_what_is_missing_and_goes_on(path: Path) -> None:
    with ActivationStore.create(path, PROVENANCE) as store:
        store.append([2, 0], [1, 1], VECTORS[:, [2, 0]])
    with ActivationStore.open(path) as store, pytest.raises(StoreError, match="3 prompts, such as 1, are not finished"):
        store.read_layer(FIRST)
    with ActivationStore.resume(path, PROVENANCE) as store:
        assert store.missing == [1, 3, 4]
        np.testing.assert_array_equal(store.read_layer(FIRST, rows=[0, 2]), VECTORS[0, [0, 2]])
        store.append([1, 3, 4], [1, 1, 1], VECTORS[:, [1, 3, 4]])
        np.testing.assert_array_equal(store.read_layer(SECOND), VECTORS[1])


def test_vectors_whose_prompts_were_never_written_down_do_not_count(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = module.write_at

    def dies_before_done(data: h5py.Dataset, start: int, values: np.ndarray) -> None:
        if data.name == "/done":
            raise KeyboardInterrupt
        whole(data, start, values)

    with ActivationStore.create(path, PROVENANCE) as store:
        store.append([2], [1], VECTORS[:, [2]])
        monkeypatch.setattr(module, "write_at", dies_before_done)
        with pytest.raises(KeyboardInterrupt):
            store.append([0, 1], [1, 1], np.full((2, 2, 4), np.nan, np.float32))
        monkeypatch.undo()
    with ActivationStore.resume(path, PROVENANCE) as store:
        assert store.missing == [0, 1, 3, 4]
        rows = [0, 1, 3, 4]
        store.append(rows, [1] * 4, VECTORS[:, rows])
        np.testing.assert_array_equal(store.read_layer(FIRST), VECTORS[0])


def test_a_full_disk_is_a_named_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with ActivationStore.create(path, PROVENANCE) as store:
        monkeypatch.setattr(module, "write_at", full)
        with pytest.raises(StoreError, match="No space left on device"):
            store.append([0], [1], VECTORS[:, [0]])


def test_a_disk_that_is_still_full_when_the_file_is_closed_hides_no_error(path: Path) -> None:
    class Full:
        def close(self) -> None:
            raise RuntimeError("Can't decrement id ref count (file write failed)")

    with pytest.raises(StoreError, match="file write failed"), ActivationStore(path, Full(), PROVENANCE):
        pass
    with pytest.raises(StoreError, match="the first fault"), ActivationStore(path, Full(), PROVENANCE):
        raise StoreError("the first fault")


BATCHES = {
    "finished": ([2], [1], (2, 1, 4), "finished already"),
    "twice": ([1, 1], [1, 1], (2, 2, 4), "finished already"),
    "unknown prompt": ([5], [1], (2, 1, 4), "prompts below 5"),
    "too few vectors": ([0, 1], [1, 1], (2, 1, 4), "expected .2, 2, 4."),
    "too few lengths": ([0, 1], [2], (2, 2, 4), "2 prompts"),
    "no vector": ([0], [0], (2, 0, 4), "at least one"),
    "narrow": ([0], [1], (2, 1, 1), "expected .2, 1, 4."),
    "a hook point short": ([0], [1], (1, 1, 4), "expected .2, 1, 4."),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_that_does_not_fit_changes_nothing(name: str, path: Path) -> None:
    rows, lengths, shape, reason = BATCHES[name]
    with ActivationStore.create(path, PROVENANCE) as store:
        store.append([2], [1], VECTORS[:, [2]])
        with pytest.raises(StoreError, match=reason):
            store.append(rows, lengths, np.zeros(shape, np.float32))
        rest = [0, 1, 3, 4]
        store.append(rest, [1] * 4, VECTORS[:, rest])
        np.testing.assert_array_equal(store.read_layer(SECOND), VECTORS[1])


def test_another_thread_may_write_and_close(path: Path) -> None:
    writer = ActivationStore.create(path, PROVENANCE)

    def write() -> None:
        with writer:
            writer.append(range(5), [1] * 5, VECTORS)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    with ActivationStore.resume(path, PROVENANCE) as store:
        np.testing.assert_array_equal(store.read_layer(FIRST), VECTORS[0])


OTHERS = {
    "model": "other",
    "fingerprint": "e" * 64,
    "tuned": "c" * 64,
    "dtype": "bfloat16",
    "d_model": 8,
    "hook_points": (FIRST,),
    "pooling": "max",
    "system": "T4",
    "template_hash": "c" * 64,
    "prompts_name": "other",
    "prompts_hash": "c" * 64,
    "n_prompts": 4,
    "template": "plain text",
    "truncated_to": 512,
    "regions_hash": "c" * 64,
    "config_hash": "c" * 64,
    "harmful": None,
    "pair_ids": None,
    "version": "9.9.9",
}


def test_every_part_of_the_provenance_is_tested() -> None:
    assert set(OTHERS) == {field.name for field in dataclasses.fields(Provenance)}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_provenance_is_not_gone_on_with(name: str, path: Path) -> None:
    filled(path)
    other = dataclasses.replace(PROVENANCE, **{name: OTHERS[name]})
    with pytest.raises(StoreError, match=f"{name} is .* in the file, expected ") as caught:
        ActivationStore.resume(path, other)
    assert (caught.value.code, caught.value.path) == ("store", str(path))
    with ActivationStore.resume(path, PROVENANCE):
        pass


# Files that are broken, foreign or hostile


def test_nothing_is_overwritten(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(StoreError, match="is there already"):
        ActivationStore.create(path, PROVENANCE)
    assert path.read_text() == "precious"


def test_a_file_that_cannot_be_made_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file or directory"):
        ActivationStore.create(tmp_path / "no" / "folder.h5", PROVENANCE)


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(PathMissingError, match="no activations at this path"):
        ActivationStore.open(path)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.find(VECTORS[0, 3].tobytes())] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_is_an_error_and_not_a_number(path: Path) -> None:
    flip_a_bit(filled(path))
    with ActivationStore.open(path) as store:
        np.testing.assert_array_equal(store.read_layer(SECOND), VECTORS[1])
        with pytest.raises(StoreError, match="cannot be read"):
            store.read_layer(FIRST)


def test_a_row_under_another_prompts_number_is_an_error_and_not_a_number(path: Path) -> None:
    with h5py.File(filled(path), "r+") as file:
        file["done"][:2] = file["done"][:2][::-1]
    with ActivationStore.open(path) as store, pytest.raises(StoreError, match="prompt 1 cannot be read"):
        store.read_layer(FIRST)


@pytest.mark.parametrize(
    ("schema", "hint"),
    [("undertow.activations/1", "An older undertow"), ("undertow.activations/3", "A newer undertow")],
)
def test_a_file_of_another_version_is_refused_with_the_reason(schema: str, hint: str, path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["schema"] = schema
        # What version 1 had, and version 2 takes for hostile.
        file.create_dataset(FIRST, data=np.zeros((5, 4), np.float32), chunks=(5, 4), fletcher32=True)
    with pytest.raises(StoreError, match=f"has the schema '{schema}', expected 'undertow.activations/2'") as caught:
        ActivationStore.open(path)
    assert hint in (caught.value.hint or "")


def truncate(path: Path) -> None:
    # The last chunk is the one of `done`, and 4096 bytes long.
    path.write_bytes(path.read_bytes()[:-4200])


def truncate_vectors(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: data.find(VECTORS[1, 2].tobytes()) + 8])


def no_hdf5(path: Path) -> None:
    path.write_bytes(b"hello")


def newer_schema(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["schema"] = "undertow.activations/3"


def schema_of_many(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["schema"] = ["undertow.activations/2"] * 2


def lost_attribute(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file.attrs["fingerprint"]


def garbled_attribute(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["d_model"] = "many"


def external_link(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file[FIRST]
        file[FIRST] = h5py.ExternalLink("/etc/hostname", "/")


def soft_link(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file[FIRST]
        file[FIRST] = h5py.SoftLink(f"/{SECOND}")


def external_storage(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file[FIRST]
        file.create_dataset(FIRST, (5, 4), np.float32, external=[("/etc/hostname", 0, 80)])


def compression_bomb(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file[FIRST]
        file.create_dataset(FIRST, data=np.zeros((200_000, 4), np.float32), compression="gzip")


def empty_claim(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file[FIRST].resize(10**9, axis=0)


def other_width(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file[FIRST]
        file.create_dataset(FIRST, data=np.zeros((5, 3), np.float32))


def lost_layer(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file[FIRST]


def lost_rows(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file[SECOND].resize(4, axis=0)


def invented_prompt(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["done"][0] = [99, 1]


def repeated_prompt(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["done"][0] = file["done"][1]


def hole_in_the_list(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["done"][0] = [0, 0]


def endless_prompts(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["done"][:, 1] = 2**62


def other_type(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file[FIRST]
        file.create_dataset(FIRST, data=np.zeros((5, 4), "S4"))


def flat_layer(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file[FIRST]
        file.create_dataset(FIRST, data=np.zeros(5, np.float32), chunks=(2,))


def void_layer(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file[FIRST]
        file[FIRST] = h5py.Empty("f")


def lost_checksums(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["checksums"]


def list_without_columns(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["done"]
        file["done"] = np.int64(1)


def test_a_broken_table_in_a_file_that_claims_to_be_written_holds_nobody_up(path: Path) -> None:
    data = bytearray(filled(path).read_bytes())
    data[11] |= 0b101
    for at in range(512, len(data) - 4):
        # Object headers, of the file and of each data set.
        if data[at : at + 5] == b"OHDR\x02":
            data[at + 40] ^= 1
    path.write_bytes(data)
    start = time.monotonic()
    with pytest.raises(StoreError, match="cannot be read"):
        ActivationStore.open(path)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        truncate_vectors,
        no_hdf5,
        newer_schema,
        schema_of_many,
        lost_attribute,
        garbled_attribute,
        external_link,
        soft_link,
        external_storage,
        compression_bomb,
        empty_claim,
        other_width,
        lost_layer,
        lost_rows,
        invented_prompt,
        repeated_prompt,
        hole_in_the_list,
        endless_prompts,
        other_type,
        flat_layer,
        void_layer,
        lost_checksums,
        list_without_columns,
    ],
)
def test_a_damaged_or_hostile_file_is_refused(damage: Callable[[Path], None], path: Path) -> None:
    damage(filled(path))
    with pytest.raises(StoreError) as caught:
        ActivationStore.open(path)
    assert caught.value.path == str(path)
    assert caught.value.hint
