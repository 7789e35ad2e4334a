"""Line echo server with a thread for each connection; answers as asyncio_echo.py does.

usage: thread_echo.py [PORT]
"""

import os
import socketserver
import sys
import threading

lock = threading.Lock()
total = 0


class Connection(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True

    def handle(self):
        global total
        for count, line in enumerate(self.rfile, start=1):
            with lock:
                total += 1
                now = total
            text = line.rstrip(b"\n")
            if text == b"pid":
                text += b" %d" % os.getpid()
            self.wfile.write(b"%d %d %s\n" % (count, now, text))


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128


port = int(sys.argv[1]) if len(sys.argv) > 1 else 0
with Server(("127.0.0.1", port), Connection) as server:
    print("ready", server.server_address[1], flush=True)
    server.serve_forever()
