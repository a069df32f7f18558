"""The stages of a run on its page: which are done, what they took, and how the run continues."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pydantic import Field

from crossmae.experiments.stages import RECORDS
from crossmae.reports import page
from crossmae.reports.run_folder import FileContent, RunFolder

PAGE_STAGE = "report"
UNFINISHED = (
    "This run is not finished: {left}. {done} The same command continues. This page shows what there is. Every number "
    "was measured by the commands shown, on the machine described at the end."
)
# States of a stage in words, by the status in its record.
STATES = {None: "not started", "started": "not finished", "stopped": "stopped", "failed": "failed"}


class StageOfPlan(FileContent):
    """A stage of the plan: name, what it does, and expected seconds."""

    name: str
    what: str
    seconds: float


class StageRecord(FileContent):
    """The record of one stage in stages.json."""

    name: str
    title: str
    command: str
    status: str
    seconds: float
    peak_memory_bytes: int


class Stages(FileContent):
    """The content of stages.json."""

    stages: list[StageRecord] = Field([])

    @property
    def totals(self) -> tuple[str, str]:
        """Total time and highest peak memory of all finished stages, as text."""
        done = [stage for stage in self.stages if stage.status == "done"]
        peak = max((stage.peak_memory_bytes for stage in done), default=0)
        return page.format_seconds(sum(stage.seconds for stage in done)), page.format_bytes(peak)

    def unfinished(self, planned: Iterable[str]) -> dict[str, str]:
        """List the stages that are not done, with their state in words.

        The stage of the page is not among them. Without a record, the states are unknown, and the list is empty.

        Args:
            planned: names of stages, of which some may have no record yet.
        """
        known = {stage.name: stage.status for stage in self.stages}
        names = [name for name in dict.fromkeys((*known, *planned)) if name != PAGE_STAGE] if known else []
        return {name: STATES.get(known.get(name), "not finished") for name in names if known.get(name) != "done"}

    def describe(self, unfinished: Mapping[str, str]) -> str:
        """Tell which stages are done, and which are not."""
        done = [stage.name for stage in self.stages if stage.status == "done"]
        left = ", ".join(f"the stage {name} is {state}" for name, state in unfinished.items())
        return UNFINISHED.format(left=left, done=f"Done: {', '.join(done)}." if done else "No stage is done.")


def stage_section(
    run: RunFolder, record: Stages, plan: Sequence[StageOfPlan], unfinished: Mapping[str, str]
) -> page.Section:
    """Show time or state, peak memory and command of every stage."""
    if not record.stages:
        return page.Section("Stages", "", [run.missing(RECORDS, "record of the stages")])
    known, planned = {stage.name: stage for stage in record.stages}, {stage.name: stage for stage in plan}
    rows: list[page.TableRow] = []
    for name in sorted(dict.fromkeys((*known, *unfinished)), key=lambda name: name == PAGE_STAGE):  # the page is last
        stage, one = known.get(name), planned.get(name)
        if stage and stage.status == "done":
            row = [name, page.format_seconds(stage.seconds), page.format_bytes(stage.peak_memory_bytes)]
        else:
            row = [name, unfinished.get(name, "this page"), "-"]
        expected = [page.format_seconds(one.seconds), one.what] if one else ["-", ""]
        rows.append([*row, *(expected if planned else [])])
    caption = (
        "The time includes the start of the program. Peak memory is the highest sum of the resident memory of a "
        "stage's processes, sampled four times a second. Shared memory counts once for each process."
    )
    columns = ["stage", "time", "peak memory", *(["planned", "plan"] if planned else [])]
    whole = "all that are done" if unfinished else "all"
    table = page.Table(columns, rows, caption, [whole, *record.totals, *(["", ""] if planned else [])])
    commands = page.Commands([(stage.title, page.folded(stage.command)) for stage in record.stages])
    return page.Section("Stages", "Each stage is one command. Run the commands in this order.", [table, commands])
