"""A server for tests that deploys with another option, and so with new replicas, whenever it gets SIGUSR1.

python redeploying.py STUDY PORT
"""

from __future__ import annotations

import signal
import sys
import threading

from deployments.local import running

if __name__ == "__main__":
    asked, ended = threading.Semaphore(0), threading.Event()
    options = {"cpus": 1, "length": 400, "max_tokens": 300, "queue": 200}
    with running(sys.argv[1], int(sys.argv[2]), 2, **options) as server:
        signal.signal(signal.SIGUSR1, lambda *_: asked.release())
        signal.signal(signal.SIGTERM, lambda *_: (ended.set(), asked.release()))
        print("playground:", server.url, flush=True)
        queue = 200
        while not asked.acquire(timeout=3600) or not ended.is_set():
            queue += 1
            server.deploy(queue=queue)
            print("deployed again", flush=True)
