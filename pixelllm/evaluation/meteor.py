"""METEOR 1.5 through the Java program that `pycocoevalcap` carries.

Optional: needs Java and `pip install pycocoevalcap`. The program is talked to line by line
(`SCORE` gives a caption's statistics, `EVAL` turns statistics into scores), with the options of
COCO caption evaluation. It takes PTB tokens joined by blanks for COCO's numbers; it normalises raw
captions too, which dense captioning relies on.
"""

from __future__ import annotations

import importlib.util
import os
import selectors
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from pixelllm.evaluation.captions import check_ids, tokenize_pairs

_HEAP = "2G"  # memory of the Java program


class MeteorUnavailable(RuntimeError):
    """Java or the package is absent, or the program stopped; the message says what to do."""


class Meteor:
    """A running METEOR program; use as a context manager, it ends with the block.

    Raises MeteorUnavailable on entering where Java or the package is absent; in `scores` where
    the program stops or needs more than `timeout` seconds for one answer (the first includes
    reading the paraphrase table).
    """

    def __init__(self, timeout: float = 120.0):
        self.timeout = timeout

    def __enter__(self) -> Meteor:
        jar = _find_jar()
        self._errors = tempfile.TemporaryFile()  # a pipe nobody reads would block the program
        try:
            self._process = subprocess.Popen(
                [
                    *("java", "-Dfile.encoding=UTF-8", "-Duser.language=en", f"-Xmx{_HEAP}"),
                    *("-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"),
                ],
                cwd=jar.parent,  # where the program looks for its paraphrase table
                env={**os.environ, "LC_ALL": "C.UTF-8"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
            )
        except OSError as error:
            self._errors.close()
            raise MeteorUnavailable(f"Java could not be started for METEOR: {error}") from error
        self._unread = b""
        return self

    def __exit__(self, *exception) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                pipe.close()
            except BrokenPipeError:  # the program went first, with our last line unread
                pass
        self._process.wait()
        self._errors.close()

    def scores(
        self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]
    ) -> tuple[float, list[float]]:
        """Corpus METEOR, of the pooled statistics, and METEOR of every caption, in [0, 1].

        Every caption needs at least one reference (else ValueError); an empty one scores 0.
        """
        if not hypotheses or len(hypotheses) != len(references):
            counts = f"{len(hypotheses)} hypotheses and {len(references)} lists of references"
            raise ValueError(f"{counts}: expected as many of each, and one at least")
        lines = []
        for index, (caption, texts) in enumerate(zip(hypotheses, references, strict=True)):
            if isinstance(texts, str) or not texts:
                raise ValueError(f"item {index}: expected a list of references, got {texts!r}")
            lines.append(" ||| ".join(["SCORE", *map(_one_line, texts), _one_line(caption)]))
        statistics = []
        for line in lines:
            self._write(line)
            statistics.append(self._read())
        self._write(" ||| ".join(["EVAL", *statistics]))
        values = [float(self._read()) for _ in range(len(lines) + 1)]
        return values[-1], values[:-1]

    def _write(self, line: str) -> None:
        try:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise MeteorUnavailable(self._diagnosis("stopped")) from None

    def _read(self) -> str:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(self.timeout):
                    reason = f"did not answer in {self.timeout:g} s"
                    raise MeteorUnavailable(self._diagnosis(reason))
                chunk = os.read(self._process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise MeteorUnavailable(self._diagnosis("stopped"))
                self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode().strip()

    def _diagnosis(self, what: str) -> str:
        # pread: the program shares the file's position, and may still be writing.
        said = os.pread(self._errors.fileno(), 1 << 16, 0).decode(errors="replace").strip()[-500:]
        return f"the METEOR program {what}; it needs {_HEAP} of memory. It said: {said or '-'}"


def score_meteor(hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> float:
    """Corpus METEOR of raw captions in [0, 1], tokenised as COCO does; see `score_captions`."""
    check_ids(hypotheses, references)
    candidates, truths = tokenize_pairs(hypotheses, references)
    with Meteor() as meteor:
        joined = [[" ".join(tokens) for tokens in texts] for texts in truths]
        return meteor.scores([" ".join(tokens) for tokens in candidates], joined)[0]


def unavailable_reason() -> str | None:
    """Why METEOR cannot run here, with the remedy; None where it can."""
    try:
        _find_jar()
    except MeteorUnavailable as error:
        return str(error)
    return None


def _find_jar() -> Path:
    if shutil.which("java") is None:
        raise MeteorUnavailable("METEOR needs Java 8+, but no `java` is on the PATH")
    spec = importlib.util.find_spec("pycocoevalcap")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise MeteorUnavailable("METEOR needs pycocoevalcap: pip install 'pixelllm[meteor]'")
    jar = Path(folders[0]) / "meteor" / "meteor-1.5.jar"
    if not jar.exists():
        raise MeteorUnavailable(f"{jar} is missing: reinstall pycocoevalcap")
    return jar


def _one_line(caption: str) -> str:
    """A caption that cannot be taken for the protocol's own separators."""
    return " ".join(caption.splitlines()).replace("|||", "").replace("  ", " ")
