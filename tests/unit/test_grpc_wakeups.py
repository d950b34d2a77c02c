"""gRPC's asyncio client on a busy event loop, each time in a process of its own: a process has one event queue."""

from __future__ import annotations

import subprocess
import sys

CALLS = 400
PROGRAM = f"""
import asyncio, sys, time
from concurrent.futures import ThreadPoolExecutor
import grpc, grpc.aio
from deployments import grpc_wakeups

if sys.argv[1] == "installed":
    grpc_wakeups.install()

async def turns(port):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{{port}}") as channel:
        call = channel.unary_unary("/service/echo")
        await call(b"ready", wait_for_ready=True)
        answers = asyncio.gather(*(call(b"again") for _ in range({CALLS})))
        turns = 0
        while not answers.done():
            time.sleep(0.01)  # a busy loop: meanwhile, events come
            turns += 1
            await asyncio.sleep(0)
        assert await answers == [b"again"] * {CALLS}
        return turns

with ThreadPoolExecutor(4) as pool:
    server = grpc.server(pool)
    echo = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("service", {{"echo": echo}}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(asyncio.run(turns(port)))
    server.stop(0)
"""


def turns(how: str) -> int:
    """Return how many turns of a busy loop it takes until all calls are answered."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def test_a_busy_loop_gets_all_events_that_have_come_in_one_turn() -> None:
    installed, alone = turns("installed"), turns("alone")
    assert installed < CALLS // 4
    assert 2 * installed < alone, "gRPC does so by itself: deployments/grpc_wakeups.py can go"
