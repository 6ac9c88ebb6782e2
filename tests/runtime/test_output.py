"""A folder that cannot be written, or that another run writes in, is told of in one line."""

import errno
import os

import pytest

from data.errors import UserError
from vlm_distill.runtime.launch import mistake_of
from vlm_distill.runtime.output import cause_of, claim, put_in_place


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"output: .*run: file exists; choose another"):
        claim(tmp_path / "run")


def test_read_only(tmp_path):
    tmp_path.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # whom permissions bind
    try:
        with pytest.raises(UserError, match="permission denied; choose another folder"):
            claim(tmp_path / "run")
    finally:
        if root:
            os.seteuid(0)
        tmp_path.chmod(0o755)


def test_one_run_at_a_time(tmp_path):
    (ready, tell), (wait, end) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        held = claim(tmp_path)
        os.write(tell, b"x")
        os.read(wait, 1)
        held.close()
        os._exit(0)
    os.read(ready, 1)
    with pytest.raises(UserError, match="another run is writing there"):
        claim(tmp_path)
    os.write(end, b"x")
    os.waitpid(child, 0)
    claim(tmp_path).close()


def test_a_full_disk_says_how_much_is_free(tmp_path):
    error = OSError(errno.ENOSPC, "whatever", str(tmp_path / "file"))
    assert str(cause_of(error, tmp_path)).startswith(f"{tmp_path / 'file'}: no space left on device, ")
    # DeepSpeed copies a script of its own into each checkpoint.
    copied = OSError(errno.ENOSPC, "whatever", "/site-packages/deepspeed/zero_to_fp32.py", None, str(tmp_path / "copy"))
    for said in (cause_of(copied, tmp_path), mistake_of(copied)):
        assert str(said).startswith(f"{tmp_path / 'copy'}: no space left on device")
    in_consequence = RuntimeError("unexpected pos 64 vs 0")
    in_consequence.__context__ = error  # as PyTorch does
    assert "no space left" in str(cause_of(in_consequence, tmp_path))
    from_safetensors = ValueError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "no space left" in str(cause_of(from_safetensors, tmp_path))
    assert cause_of(RuntimeError("a bug"), tmp_path) is None


def test_replaced_when_whole(tmp_path):
    folder = tmp_path / "student"
    put_in_place(folder, lambda path: (path / "weights").write_text("old"), "student")

    def fail(path):
        (path / "weights").write_text("half")
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(UserError, match="no space left"):
        put_in_place(folder, fail, "student")
    assert (folder / "weights").read_text() == "old"
    put_in_place(folder, lambda path: (path / "weights").write_text("new"), "student")
    assert (folder / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
