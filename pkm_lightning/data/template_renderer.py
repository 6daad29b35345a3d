"""A chat template in its process, which renders one conversation after another and is ended where it takes too long."""

from __future__ import annotations

import contextlib
import json
import select
import signal
import subprocess
import sys
from typing import Any

from pkm_lightning.data import template_process
from pkm_lightning.errors import ConfigError

__all__ = ["Message", "TemplateRenderer"]

#: A turn: its `role` (`system`, `user`, `assistant`) and `content`.
Message = dict[str, str]

#: Seconds that a template may compute per request, and on the clock, where its process waits for a processor.
SECONDS, PATIENCE = 10, 60


class TemplateRenderer:
    """The process of a template, which starts with the first request.

    Args:
        template: Jinja text.
        names: of the control tokens `bos_token` and `eos_token`.
        source: where the template comes from, for messages.
    """

    def __init__(self, template: str, names: dict[str, str], source: str) -> None:
        self.template, self.names, self.source = template, names, source
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns the answer to a request (see `template_process.py`); the process stays for the next one.

        Raises:
            ConfigError: the template cannot be compiled, or the process has ended or been ended.
        """
        if self._process is None:
            self.compile()
        return self._exchange(request)

    def compile(self) -> None:
        """Starts the process with the template.

        Raises:
            ConfigError: the template cannot be compiled.
        """
        # -P: the folder of the program is no place to import from.
        command = [sys.executable, "-P", template_process.__file__, str(SECONDS)]
        # A session of its own: Ctrl-C reaches this process alone, which ends the other.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        answer = self._exchange({"template": self.template, "globals": self.names})
        if "error" in answer:
            self.close()
            raise self.error(answer["error"])

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()  # type: ignore[union-attr]
            self._process = None

    def error(self, reason: str) -> ConfigError:
        """Returns the error that the template cannot be used for a reason."""
        return ConfigError(f"{self.source}: the chat template cannot be used ({reason}).")

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        line = b""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            if not select.select([process.stdout], [], [], PATIENCE)[0]:
                self.close()
                raise self.error(f"it has not ended after {PATIENCE} s")
            line = process.stdout.readline()
        if not line.endswith(b"\n"):
            code = process.wait()
            self.close()
            if -code in (signal.SIGPROF, signal.SIGKILL):
                raise self.error(f"it has not ended after {SECONDS} s of computing")
            raise self.error("it crashes Jinja")
        answer: dict[str, Any] = json.loads(line)
        return answer
