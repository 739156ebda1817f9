"""Working copies of the repository for tests that run the chain; the checkout is not touched."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from sae_research import paths


class Workspace:
    """A copy of the repository in a folder of its own, run with this environment's Python."""

    def __init__(self, root: Path):
        self.root = root
        self.env = {
            **{
                k: v
                for k, v in os.environ.items()
                if not k.startswith(("GIT_", "DVC_", "SAE_RESEARCH_", "PYTEST_"))
            },
            "PYTHONPATH": str(root),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }

    def start(self, *words: str, **options) -> subprocess.Popen:
        """Start `python -m sae_research ...` in a process group of its own."""
        command = [sys.executable, "-m", "sae_research", *words]
        given = {"cwd": self.root, "env": self.env, "start_new_session": True, "text": True}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, **given, **pipes, **options)

    def run(self, *words: str, rc: int = 0) -> str:
        """What `python -m sae_research ...` prints, after it ended as expected."""
        return self.ended(self.start(*words), rc)

    def ended(self, process: subprocess.Popen, rc: int = 0) -> str:
        printed, _ = process.communicate(timeout=900)
        assert process.returncode == rc, printed
        return printed

    def call(self, *words: str) -> str:
        """What another command prints."""
        done = subprocess.run(
            words, cwd=self.root, env=self.env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def commit(self) -> None:
        """Make the copy a git checkout with everything committed."""
        self.call("git", "init", "-q")
        self.call("git", "add", "-A")
        self.call(
            "git",
            "-c",
            "user.name=t",
            "-c",
            "user.email=t@example.org",
            "commit",
            "-q",
            "-m",
            "start",
        )

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace one piece of text in a file."""
        text = (self.root / name).read_text()
        assert text.count(old) == 1, f"{name} holds {old!r} {text.count(old)} times"
        (self.root / name).write_text(text.replace(old, new))

    def files(self, *patterns: str) -> dict[str, bytes]:
        """Content of all files that match, by their path in the copy."""
        found = {p for pattern in patterns for p in self.root.glob(pattern) if p.is_file()}
        return {p.relative_to(self.root).as_posix(): p.read_bytes() for p in sorted(found)}


def copied(root: Path) -> Workspace:
    """A copy of every file that git would commit (without git, of all but the generated ones)."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=paths.ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0:
        names = [n for n in listed.stdout.decode().split("\0") if n and (paths.ROOT / n).is_file()]
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(paths.ROOT / name, root / name)
    else:
        skip = shutil.ignore_patterns(
            ".venv",
            "__pycache__",
            "scratch",
            "runs",
            "artefacts",
            "smoke",
            ".reproduce",
            "cache",
            "tmp",
        )
        shutil.copytree(paths.ROOT, root, dirs_exist_ok=True, ignore=skip)
    return Workspace(root)
