"""Jobs without FlexModel, what tapped ones are compared with: run by tests/forkserver.py, which has torch already."""

import json
import pathlib
import select
import subprocess
import sys
import time

import harness

SERVER = pathlib.Path(__file__).with_name("forkserver.py")


class Server:
    """A server of this process's own, started when the first job is asked for."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, argv: list[str]) -> harness.Outcome:
        """Runs to its end what `harness.python`, `on_ranks` or `torchrun` returned."""
        if self._process is None:
            self._process = subprocess.Popen(
                [harness.BIN / "python", SERVER], env=harness.environment(), bufsize=0,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        try:
            with _Forked(argv, self._process) as job:
                return job.wait()
        except BaseException:
            self.stop()  # it has an answer left to give
            raise

    def stop(self) -> None:
        """Ends the server."""
        if self._process is not None:
            self._process.stdin.close()
            self._process.kill()
            self._process.wait()
            self._process = None


class _Forked(harness.Running):
    """A job that the server has forked."""

    def __init__(self, argv: list[str], server: subprocess.Popen[bytes]):
        super().__init__(argv)
        self._server = server
        ranks, program = harness.program_of(argv)
        for name in ("out", "err"):
            (self._files / name).touch()
        order = {"argv": program, "ranks": ranks, "out": str(self._files / "out"), "err": str(self._files / "err")}
        server.stdin.write(json.dumps(order).encode() + b"\n")
        self._began = time.monotonic()
        self._session: int = self._answer()["pid"]

    def wait(self) -> harness.Outcome:
        """Its outcome, once it has ended."""
        ended = self._answer()
        self._log(ended["cpu"], time.monotonic() - self._began)
        return harness.Outcome(ended["code"], self.out, self.err)

    def _answer(self) -> dict:
        """The next line, which was written at once."""
        if not select.select([self._server.stdout], [], [], harness.TIMEOUT)[0]:
            raise AssertionError(f"hung for {harness.TIMEOUT} s; stacks follow\n{harness.stacks()}")
        line = self._server.stdout.readline()
        assert line, "the server of untapped jobs has ended"
        return json.loads(line)

    def _is_mine(self, process: pathlib.Path) -> bool:
        return int((process / "stat").read_text().rpartition(")")[2].split()[3]) == self._session


if __name__ == "__main__":
    print(Server().run(sys.argv[1:]).text)
