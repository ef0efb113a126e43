"""What a person sees of a long job: a progress bar in a terminal, plain lines elsewhere."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingDisplay:
    """Shows loss, images a second and the time left."""

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        self.console = console or Console()
        self.total_steps = total_steps
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> "TrainingDisplay":
        self._bar.start()
        self._task = self._bar.add_task("training", total=self.total_steps, status="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, message: str) -> None:
        """Print one line above the bar."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def step(self, step: int, description: str) -> None:
        """Move the bar to `step` finished steps."""
        if self._task is not None:
            self._bar.update(self._task, completed=step, description=description)

    def log(self, step: int, values: dict[str, float], images_per_second: float, seconds_left: float) -> None:
        """Show the newest numbers."""
        terms = "  ".join(f"{name} {values[name]:.3f}" for name in ("loss", "contrastive", "caption") if name in values)
        status = f"{terms}  {images_per_second:.0f} images/s"
        if self._task is not None:
            self._bar.update(self._task, status=status)
        if not self.console.is_terminal:
            minutes, seconds = divmod(round(seconds_left), 60)
            self.say(f"step {step}/{self.total_steps}  {status}  {minutes}:{seconds:02d} left")
