"""Runs jobs without FlexModel in processes that are forked when torch has been imported, which is most of a job's time.

A line of JSON on stdin is a job: `argv` (a program and its arguments), `ranks` (null for one process of no group), and
the files `out` and `err`. Answers are lines too: the process's id, which is that of its group, then its exit code and
the seconds of CPU. Only for references: what is tapped starts as jobs do.
"""

import gc
import json
import os
import runpy
import sys

import launcher


def import_torch() -> None:
    """What nearly every program imports, or an optimizer of torch's for it."""
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel  # noqa: F401

    gc.collect()
    gc.freeze()


def next_job() -> dict:
    """Serves until the end of the input; returns in the process of each job."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            return json.loads(line)
        print(json.dumps({"pid": pid}), flush=True)
        _, status, usage = os.wait4(pid, 0)
        used = round(usage.ru_utime + usage.ru_stime, 2)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "cpu": used}), flush=True)
    sys.exit()


def become(job: dict) -> None:
    """A session and files of its own."""
    os.setsid()
    for number, path in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    if job["ranks"] is not None:
        code = launcher.launch(job["ranks"])
        if code is not None:
            os._exit(code)
    sys.argv = job["argv"]
    sys.path[0] = os.path.dirname(sys.argv[0])


if __name__ == "__main__":
    import_torch()
    become(next_job())
    runpy.run_path(sys.argv[0], run_name="__main__")
