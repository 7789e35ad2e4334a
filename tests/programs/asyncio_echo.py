"""Line echo server on asyncio: each line `TEXT` is answered with `COUNT TOTAL TEXT`.

usage: asyncio_echo.py [PORT]
"""

import asyncio
import os
import sys

total = 0


async def serve(reader, writer):
    global total
    count = 0
    while line := await reader.readline():
        count += 1
        total += 1
        text = line.rstrip(b"\n")
        if text == b"pid":
            text += b" %d" % os.getpid()
        writer.write(b"%d %d %s\n" % (count, total, text))
        await writer.drain()
    writer.close()


async def main():
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    server = await asyncio.start_server(serve, "127.0.0.1", port, limit=1 << 20)
    print("ready", server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
