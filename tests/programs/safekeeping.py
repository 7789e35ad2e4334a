"""Leaves a pipe with the service manager (sd_pid_notify_with_fds(3)), and reads what an earlier start has left there.

Prints `first`, or `again` and what the pipe held. Where WORD is given it is put into the pipe first.
"""

import array
import os
import socket
import sys
import time


def notify(text, descriptors=()):
    name = os.environ["NOTIFY_SOCKET"]
    address = "\0" + name[1:] if name.startswith("@") else name
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        to.sendmsg([text.encode()], rights, 0, address)


if os.environ.get("LISTEN_PID") == str(os.getpid()):
    assert os.environ["LISTEN_FDNAMES"] == "pipe", os.environ
    print("again", os.read(3, 100).decode(), flush=True)
else:
    read, write = os.pipe()
    os.write(write, sys.argv[1].encode())
    notify("FDSTORE=1\nFDNAME=pipe\nFDPOLL=0", [read])
    # Closed on the other side when the service manager has taken everything before (sd_notify_barrier(3)).
    ours, theirs = os.pipe()
    notify("BARRIER=1", [theirs])
    os.close(theirs)
    assert os.read(ours, 1) == b""
    print("first", flush=True)
notify("READY=1")
time.sleep(1000)
