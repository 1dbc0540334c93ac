"""Weights & Biases and trackio: the metrics of a run sent to a tracker, for those who ask for one.

Both packages are imported only when asked for. A run keeps one tracked run for its whole life: its id lies in
`tracking.json` of the run's folder, and a resume goes on with it. Neither package's credentials are read or stored here:
they find their own.
"""

from __future__ import annotations

import importlib
import json
import secrets
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

from headway.errors import TrainingError
from headway.training.config import TrainConfig
from headway.training.run_directory import TRACKING, write_text

TrackerName = Literal["wandb", "trackio"]

_OFFLINE = {"wandb": "set WANDB_MODE=offline to send later", "trackio": "see its message"}
# Its terminal recorder would fight with the screen of the run, and source code is nobody's business.
_WANDB_SETTINGS = {"console": "off", "save_code": False}


class Tracker:
    """One tracked run.

    Metrics are told with a step of their own (`step`), so that a step told late is not thrown away. A tracker that fails
    while the run goes on costs a warning, not the run: metrics.jsonl has everything.

    Args:
        name: which package.
        folder: of the run.
        project: that the tracked run belongs to.
        options: of the run, shown beside its metrics.
        notice: told once where the tracker fails.

    Raises:
        TrainingError: the package is not installed, or cannot start.
    """

    def __init__(
        self,
        name: TrackerName,
        *,
        folder: Path,
        project: str,
        options: Mapping[str, Any],
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.name, self._notice, self._failed = name, notice, False
        package = _package(name)
        known = _known(folder).get(name)
        self.continued = known is not None
        self.run_id = known or f"{folder.resolve().name}-{secrets.token_hex(4)}"
        # Before the tracker hears of it: a kill in between must not make a second tracked run.
        write_text(folder / TRACKING, json.dumps(_known(folder) | {name: self.run_id}, indent=2) + "\n")
        try:
            # What they say is for a person, and stdout is for the run's JSON document.
            with redirect_stdout(sys.stderr):
                self._run = _start(name, package, self.run_id, folder=folder, project=project, options=dict(options))
        except Exception as error:  # of many packages beneath: network, credentials, disk
            raise TrainingError(
                f"{name} could not start a run: {' '.join(str(error).split())}; {_OFFLINE[name]}, or drop --track"
            ) from error
        self._package = package

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Tell the figures of a step."""

        def tell() -> None:
            if self.name == "wandb":
                self._run.log({**values, "step": step})
            else:
                self._package.log(dict(values), step=step)

        self._try(tell, f"the figures of step {step}")

    def close(self) -> None:
        """Send what is left."""

        def end() -> None:
            with redirect_stdout(sys.stderr):
                self._run.finish() if self.name == "wandb" else self._package.finish()

        self._try(end, "the end of the run")

    def _try(self, action: Callable[[], None], what: str) -> None:
        try:
            action()
        except Exception as error:  # a month of training does not end because a server does
            if not self._failed:
                detail = " ".join(str(error).split()) or type(error).__name__
                self._notice(
                    f"warning: {self.name} did not take {what}: {detail}; metrics.jsonl has them, further failures are silent"
                )
            self._failed = True


def tracker_opener(
    config: TrainConfig, *, notice: Callable[[str], None] = lambda text: None
) -> Callable[[Path], Tracker] | None:
    """What opens the tracked run that a configuration asks for, given the run's folder; None where it asks for none."""
    name = config.track
    if name is None:
        return None
    return lambda folder: Tracker(
        name, folder=folder, project=config.track_project, options=config.to_dict(), notice=notice
    )


def _start(name: TrackerName, package: Any, run_id: str, *, folder: Path, project: str, options: dict[str, Any]) -> Any:
    if name == "trackio":
        return package.init(project=project, name=run_id, resume="allow", config=options)
    run = package.init(
        project=project,
        id=run_id,
        name=folder.resolve().name,
        resume="allow",
        config=options,
        dir=str(folder),
        settings=dict(_WANDB_SETTINGS),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _package(name: TrackerName) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TrainingError(
            f"track={name} needs the package {name}, which is not installed ({error}); install it with pip install {name}, "
            f"or drop --track"
        ) from error


def _known(folder: Path) -> dict[str, str]:
    """Ids of the run at its trackers; none where there is no file, or a damaged one."""
    try:
        content = json.loads((folder / TRACKING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(run) for name, run in content.items()} if isinstance(content, dict) else {}
