"""The port at which the ranks of a launch meet."""

import errno
import socket
import sys
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from vlm_distill.launch import reserved_port


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the port is free again before ranks name it")
def test_a_reserved_port_is_the_ranks_alone():
    with reserved_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use") as refused:
            other.bind(("127.0.0.1", port))
        assert refused.value.errno == errno.EADDRINUSE
        limit = timedelta(seconds=10)
        first = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=limit)
        TCPStore("127.0.0.1", port, is_master=False, timeout=limit).set("rank 1", "here")
        assert first.get("rank 1") == b"here"
