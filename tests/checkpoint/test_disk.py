"""Files past the page cache: a failure means bytes that are lost or doubled at a block's edge, or memory that is used again while
somebody reads it."""

import os
import threading

import pytest

from minitron_mcore.checkpoint import disk

SIZES = [0, 1, 4095, 4096, 4097, 3 * 8192, 3 * 8192 + 5, 100_001]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(disk, "BLOCK", 8192)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_is_read(tmp_path, size):
    data, path = os.urandom(size), tmp_path / "file"
    with disk.Output(path) as file:
        for start in range(0, size, 3000):  # parts that end in the middle of blocks, and one longer than a block
            assert file.tell() == start
            file.write(data[start : start + 3000] if start != 6000 else data[start:])
            if start == 6000:
                break
    assert path.read_bytes() == data
    assert bytes(disk.Recent(2, size).load(path)) == data


def test_a_file_system_that_refuses_at_the_first_request(tmp_path):
    """A request of no aligned length is what such a file system answers with EINVAL."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(10_000))
    file = disk._open(path, os.O_RDONLY)
    try:
        try:
            os.preadv(file, [bytearray(77)], 0)
            pytest.skip("this file system takes any request")
        except OSError:
            pass
        found = bytearray(77)
        assert disk._asked(lambda: os.preadv(file, [found], 0), file) == 77
        assert found == path.read_bytes()[:77]
        with pytest.raises(OSError):  # what has another cause is not tried again
            disk._asked(lambda: os.preadv(file, [found], -2), file)
    finally:
        os.close(file)


def test_held_files_stay_while_somebody_reads(tmp_path):
    contents = {f"{n}": os.urandom(5000 + n) for n in range(5)}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    recent = disk.Recent(2, 6000)
    recent.load(tmp_path / "0")
    with recent.using("0") as first:
        for name in ("1", "2", "3"):
            recent.load(tmp_path / name)
        assert bytes(first) == contents["0"]
    recent.load(tmp_path / "4")
    with recent.using("0") as gone, recent.using("4") as last:
        assert gone is None and bytes(last) == contents["4"]
    assert len(recent.slots) <= 3


def test_many_threads_read_what_they_ask_for(tmp_path):
    contents = {f"{n}": os.urandom(9000 + n) for n in range(8)}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    recent, wrong = disk.Recent(3, 10_000), []

    def work(seed: int) -> None:
        for n in range(200):
            name = str((n * seed) % 8)
            with recent.using(name) as held:
                if held is not None:
                    wrong.extend([name] if bytes(held) != contents[name] else [])
                    continue
            recent.load(tmp_path / name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 3, 5, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
